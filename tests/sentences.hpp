// The sentences that headers write, to be compared with those that tests raise.
#pragma once

#include <gtest/gtest.h>

#include <cctype>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace sentences {

// The literals that a call of fail() is given as its sentence: all of `header` behind "fail(Errc::", adjacent ones
// joined.
inline std::set<std::string> of_text(const std::string& header) {
  std::set<std::string> sentences;
  for (std::size_t at = header.find("fail("); at != std::string::npos; at = header.find("fail(", at + 1)) {
    std::size_t i = at + 5;
    while (std::isspace(static_cast<unsigned char>(header[i])) != 0) ++i;
    if (header.compare(i, 6, "Errc::") != 0 || (at > 0 && header[at - 1] == '_')) continue;
    std::string sentence;
    int depth = 0, argument = 0;
    const auto finish = [&] {
      if (!sentence.empty()) sentences.insert(sentence);
      sentence.clear();
    };
    for (; i < header.size() && depth >= 0; ++i) {
      const char c = header[i];
      if (c == '"') {
        std::string literal;
        for (++i; header[i] != '"'; ++i) literal += header[i] == '\\' ? header[++i] : header[i];
        if (argument == 1) sentence += literal;
        continue;
      }
      if (c == ',' && depth == 0) ++argument;
      if (c == '(' || c == '{') ++depth;
      if (c == ')' || c == '}') --depth;
      if (std::isspace(static_cast<unsigned char>(c)) == 0) finish();
    }
  }
  return sentences;
}

inline std::string without_comments(const std::string& text) {
  std::string code;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line); code += '\n') {
    const std::size_t first = line.find_first_not_of(' ');
    if (first == std::string::npos || line.compare(first, 2, "//") != 0) code += line;
  }
  return code;
}

// Where the headers are.
inline std::string folder() { return (std::filesystem::path(__FILE__).parent_path() / "../include/fastv/").string(); }

// The sentences of some headers, by file name.
inline std::set<std::string> of_headers(const std::vector<std::string>& names) {
  std::set<std::string> all;
  for (const std::string& name : names) {
    std::ifstream file(folder() + name);
    EXPECT_TRUE(file.is_open()) << folder() << name;
    std::ostringstream text;
    text << file.rdbuf();
    all.merge(of_text(without_comments(text.str())));
  }
  return all;
}

// Every sentence that is written is raised.
inline void expect_raised(const std::set<std::string>& written, const std::set<std::string>& raised) {
  for (const std::string& sentence : written) EXPECT_EQ(raised.count(sentence), 1u) << "no case raises: " << sentence;
}

}  // namespace sentences

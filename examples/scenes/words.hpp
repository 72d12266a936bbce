// The words the scenes model knows, and the prompt it was taught with.
#pragma once

#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace scenes {

// One word a line; the line's number is the token's id.
class Vocabulary {
 public:
  static constexpr int system_tokens = 33;

  explicit Vocabulary(const std::string& path) {
    std::ifstream in(path);
    if (!in) throw std::runtime_error("cannot open the vocabulary " + path);
    for (std::string word; std::getline(in, word);) {
      ids_.emplace(word, static_cast<int>(words_.size()));
      words_.push_back(word);
    }
  }

  int size() const { return static_cast<int>(words_.size()); }
  int id(const std::string& word) const {
    const auto found = ids_.find(word);
    if (found == ids_.end())
      throw std::invalid_argument("the model does not know the word \"" + word + "\"; it knows: " + known());
    return found->second;
  }
  const std::string& word(int id) const { return words_.at(static_cast<std::size_t>(id)); }

  // Splits at blanks; punctuation may touch a word; capital letters do not matter.
  std::vector<int> encode(const std::string& text) const {
    std::string spaced;
    for (const char c : text) {
      if (c == '?' || c == '.' || c == ':')
        spaced += {' ', c, ' '};
      else
        spaced += c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    }
    std::istringstream in(spaced);
    std::vector<int> tokens;
    for (std::string word; in >> word;) tokens.push_back(id(word));
    return tokens;
  }
  std::string decode(const std::vector<int>& tokens) const {
    std::string text;
    for (const int token : tokens) text += (text.empty() ? "" : " ") + word(token);
    return text;
  }

  int begin() const { return id("<s>"); }
  int end() const { return id("</s>"); }

  // The prompt around the picture: before() | visual tokens | after(question). The system prompt is 33 tokens without a
  // meaning of their own.
  std::vector<int> before() const {
    std::vector<int> tokens = {begin()};
    for (int i = 0; i < system_tokens; ++i) tokens.push_back(id("<sys" + std::to_string(i) + ">"));
    tokens.push_back(id("user"));
    return tokens;
  }
  std::vector<int> after(const std::string& question) const {
    std::vector<int> tokens = encode(question);
    tokens.push_back(id("assistant"));
    tokens.push_back(id(":"));
    return tokens;
  }

 private:
  std::string known() const {
    std::string text;
    for (const std::string& word : words_)
      if (word.front() != '<') text += (text.empty() ? "" : " ") + word;
    return text;
  }

  std::vector<std::string> words_;
  std::unordered_map<std::string, int> ids_;
};

}  // namespace scenes

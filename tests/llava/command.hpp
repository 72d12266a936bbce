// Runs llama.cpp's own program from a test.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

// Where there is no llama-mtmd-cli, the test is skipped, and says so.
#define NEEDS_MTMD_CLI()                                                                                   \
  if (std::string(FASTV_MTMD_CLI).empty())                                                                 \
  GTEST_SKIP() << "llama-mtmd-cli was not found: nothing is tested here. sh cmake/llama_cpp.sh builds it " \
                  "into the prefix that -DFASTV_LLAMA_CPP_DIR names."

struct CommandResult {
  int status;
  std::string output;  // of stdout
};

// The arguments go to the program as they are. What it says on stderr is shown only if it fails.
inline CommandResult run_command(const std::vector<std::string>& arguments) {
  std::string line;
  for (const std::string& argument : arguments) {
    std::string quoted;
    for (const char c : argument) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
    line += "'" + quoted + "' ";
  }
  const std::string errors = testing::TempDir() + "command_errors_" + std::to_string(getpid()) + ".txt";
  CommandResult result{-1, ""};
  std::FILE* pipe = popen((line + "2>'" + errors + "'").c_str(), "r");
  if (pipe == nullptr) return result;
  char piece[4096];
  for (std::size_t count; (count = std::fread(piece, 1, sizeof(piece), pipe)) != 0;) result.output.append(piece, count);
  result.status = pclose(pipe);
  if (result.status != 0) {
    std::fputs(("failed: " + line + "\n").c_str(), stderr);
    std::ifstream said(errors);
    for (std::string one; std::getline(said, one);) std::fputs((one + "\n").c_str(), stderr);
  }
  std::remove(errors.c_str());
  return result;
}

// The same with llama-mtmd-cli, which ends without waiting for its logger (llama.cpp's issue 22142), so that now and
// then, on a busy machine, the last words do not come out. The very last ones are two line ends: without them it is run
// again.
inline CommandResult run_mtmd_cli(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), FASTV_MTMD_CLI);
  CommandResult result{-1, ""};
  for (int attempt = 0; attempt < 20; ++attempt) {
    result = run_command(arguments);
    const std::size_t size = result.output.size();
    if (result.status != 0 || (size >= 2 && result.output.compare(size - 2, 2, "\n\n") == 0)) break;
  }
  return result;
}

inline std::string stripped(const std::string& text) {
  const auto first = text.find_first_not_of(" \n"), last = text.find_last_not_of(" \n");
  return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

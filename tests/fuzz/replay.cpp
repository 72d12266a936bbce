// fuzz_replay TARGET FOLDER : runs a fuzz target over the files of a folder, without a fuzzer, with any compiler.
#include <dirent.h>

#include <cstring>
#include <fstream>
#include <iterator>

#include "fuzz.hpp"

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fputs("usage: fuzz_replay TARGET FOLDER; targets:", stderr);
    for (const fuzz::Target* t = fuzz::targets(); t != nullptr; t = t->next) std::fprintf(stderr, " %s", t->name);
    std::fputs("\n", stderr);
    return 2;
  }
  const fuzz::Target* target = fuzz::targets();
  while (target != nullptr && std::strcmp(target->name, argv[1]) != 0) target = target->next;
  if (target == nullptr) {
    std::fprintf(stderr, "there is no fuzz target %s\n", argv[1]);
    return 2;
  }
  std::vector<std::string> files;
  if (DIR* folder = opendir(argv[2])) {
    while (const dirent* entry = readdir(folder))
      if (entry->d_name[0] != '.') files.push_back(std::string(argv[2]) + "/" + entry->d_name);
    closedir(folder);
  }
  std::sort(files.begin(), files.end());
  for (const std::string& file : files) {
    std::ifstream stream(file, std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
    const fuzz::Block<std::uint8_t> data(bytes);
    fuzz::Input in(data.data(), data.size());
    std::fprintf(stderr, "%s\r", file.c_str());  // the last one named is the one that stopped
    target->run(in);
  }
  std::printf("\n%s: %zu inputs\n", target->name, files.size());
  return files.empty() ? 1 : 0;  // a folder that is not there proves nothing
}

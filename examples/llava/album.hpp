// What a vision encoder made of pictures, each looked at once: kept in a file, so that hundreds of them take no memory.
#pragma once

#include <cstdint>
#include <map>

#include "engine.hpp"

namespace llava {

// Its file lies in $TMPDIR (/tmp), without a name, and goes when the album does.
class Album {
 public:
  Album();  // throws std::runtime_error where no file can be made
  ~Album();
  Album(const Album&) = delete;
  Album& operator=(const Album&) = delete;

  bool has(const std::string& picture) const { return places_.count(picture) != 0; }
  // Throws std::runtime_error where the disk is full.
  void keep(const std::string& picture, const std::vector<float>& rows);
  std::vector<float> rows(const std::string& picture) const;

  // The prompt with the rows of its pictures, which Vision::prompt() has left here.
  Prompt complete(const Prompt& prompt) const;

 private:
  struct Place {
    std::uint64_t offset;  // bytes into the file
    std::size_t floats;
  };
  std::string folder_;
  int file_;
  std::uint64_t end_ = 0;
  std::map<std::string, Place> places_;
};

}  // namespace llava

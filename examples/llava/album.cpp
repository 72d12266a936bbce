#include "album.hpp"

#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace llava {

Album::Album() {
  const char* folder = std::getenv("TMPDIR");
  folder_ = folder == nullptr || *folder == '\0' ? "/tmp" : folder;
  std::string path = folder_ + "/fastv-llava-XXXXXX";
  file_ = mkstemp(path.data());
  if (file_ < 0)
    throw std::runtime_error("cannot make a temporary file in " + folder_ + " (" + std::strerror(errno) +
                             "): set TMPDIR to a folder that can be written to");
  unlink(path.c_str());
}
Album::~Album() { close(file_); }

void Album::keep(const std::string& picture, const std::vector<float>& rows) {
  const auto* bytes = reinterpret_cast<const char*>(rows.data());
  const std::size_t count = rows.size() * sizeof(float);
  for (std::size_t done = 0; done < count;) {
    const ssize_t some = pwrite(file_, bytes + done, count - done, static_cast<off_t>(end_ + done));
    if (some < 0 && errno == EINTR) continue;
    if (some <= 0)
      throw std::runtime_error("cannot keep the " + std::to_string(count >> 10) + " KiB of a picture in " + folder_ +
                               " (" + std::strerror(errno) + "): set TMPDIR to a folder with more room");
    done += static_cast<std::size_t>(some);
  }
  places_[picture] = {end_, rows.size()};
  end_ += count;
}

std::vector<float> Album::rows(const std::string& picture) const {
  const Place& place = places_.at(picture);
  std::vector<float> rows(place.floats);
  auto* bytes = reinterpret_cast<char*>(rows.data());
  const std::size_t count = rows.size() * sizeof(float);
  for (std::size_t done = 0; done < count;) {
    const ssize_t some = pread(file_, bytes + done, count - done, static_cast<off_t>(place.offset + done));
    if (some < 0 && errno == EINTR) continue;
    if (some <= 0)
      throw std::runtime_error("cannot read a picture back from " + folder_ + " (" + std::strerror(errno) +
                               "): set TMPDIR to another folder");
    done += static_cast<std::size_t>(some);
  }
  return rows;
}

Prompt Album::complete(const Prompt& prompt) const {
  Prompt whole = prompt;
  for (Piece& piece : whole.pieces)
    if (!piece.picture.empty()) piece.rows = rows(piece.picture);
  return whole;
}

}  // namespace llava

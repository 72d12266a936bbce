// Reads MNIST's IDX files (http://yann.lecun.com/exdb/mnist describes the format).
#pragma once

#include <cstdint>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace scenes {

// Handwritten digits: images are 28 x 28 bytes each, 0 = paper, 255 = ink.
struct Mnist {
  static constexpr int side = 28;
  std::vector<std::uint8_t> images;  // [count, 28, 28]
  std::vector<std::uint8_t> labels;  // [count], 0..9

  std::size_t count() const { return labels.size(); }
  const std::uint8_t* image(std::size_t i) const { return images.data() + i * side * side; }
};

inline std::vector<std::uint8_t> read_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot open " + path);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

inline std::uint32_t big_endian32(const std::vector<std::uint8_t>& bytes, std::size_t at) {
  return (std::uint32_t{bytes[at]} << 24) | (std::uint32_t{bytes[at + 1]} << 16) | (std::uint32_t{bytes[at + 2]} << 8) |
         std::uint32_t{bytes[at + 3]};
}

// folder holds train-images-idx3-ubyte, train-labels-idx1-ubyte and the two t10k files;
// part is "train" or "t10k".
inline Mnist read_mnist(const std::string& folder, const std::string& part) {
  const std::string image_path = folder + "/" + part + "-images-idx3-ubyte";
  const std::string label_path = folder + "/" + part + "-labels-idx1-ubyte";
  const std::vector<std::uint8_t> images = read_bytes(image_path);
  const std::vector<std::uint8_t> labels = read_bytes(label_path);
  if (images.size() < 16 || big_endian32(images, 0) != 0x803 || big_endian32(images, 8) != Mnist::side ||
      big_endian32(images, 12) != Mnist::side)
    throw std::runtime_error(image_path + " is not an IDX file of 28 x 28 images");
  if (labels.size() < 8 || big_endian32(labels, 0) != 0x801)
    throw std::runtime_error(label_path + " is not an IDX file of labels");
  const std::size_t count = big_endian32(images, 4);
  if (big_endian32(labels, 4) != count || images.size() != 16 + count * Mnist::side * Mnist::side ||
      labels.size() != 8 + count)
    throw std::runtime_error(image_path + " and " + label_path + " do not hold the " + std::to_string(count) +
                             " digits that their headers promise");
  for (std::size_t i = 0; i < count; ++i)
    if (labels[8 + i] > 9)
      throw std::runtime_error(label_path + " holds the label " + std::to_string(labels[8 + i]) + ", not a digit");
  return {{images.begin() + 16, images.end()}, {labels.begin() + 8, labels.end()}};
}

}  // namespace scenes

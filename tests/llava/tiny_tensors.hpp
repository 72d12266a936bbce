// Tensors of random weights, and how they get into a GGUF file: what the writers of tiny_gguf.hpp share.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gguf_writer.hpp"
#include "tiny_gguf.hpp"

namespace tiny_gguf {

using gguf::Sink;
using gguf::Writer;

// splitmix64 (Steele, Lea, Flood 2014).
class Random {
 public:
  // Each tensor has a stream of its own: one more tensor changes no other.
  Random(std::uint64_t seed, const std::string& tensor) : state_(seed) {
    for (const char c : tensor) state_ = (state_ ^ static_cast<unsigned char>(c)) * 0x100000001B3u;  // FNV-1a
  }
  std::uint64_t bits() {
    std::uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  // Nearly normal, deviation 1: four uniform numbers of 16 bits, added. Exact until the one multiplication.
  float normal() {
    const std::uint64_t b = bits();
    const auto sum = static_cast<std::int32_t>((b & 0xFFFF) + (b >> 16 & 0xFFFF) + (b >> 32 & 0xFFFF) + (b >> 48));
    return static_cast<float>(sum - 131070) * 2.6429e-5f;  // sqrt(3) / 2^16
  }

 private:
  std::uint64_t state_;
};

inline std::int64_t product(const std::vector<std::int64_t>& extents) {
  std::int64_t count = 1;
  for (const std::int64_t extent : extents) count *= extent;
  return count;
}

// Adds tensors of random weights to a file.
class Tensors {
 public:
  Tensors(Writer& file, std::uint64_t seed, ggml_type type) : file_(file), seed_(seed), type_(type) {}

  // Extents innermost first; entries have the given deviation.
  void matrix(const std::string& name, const std::vector<std::int64_t>& extents, float deviation) {
    add(name, type_, extents, 0, deviation);
  }
  // [columns, rows] with deviation gain / sqrt(columns), which keeps the size of what goes through it.
  void linear(const std::string& name, std::int64_t columns, std::int64_t rows, float gain = 1) {
    matrix(name, {columns, rows}, gain / std::sqrt(static_cast<float>(columns)));
  }
  void vector(const std::string& name, std::int64_t size, float mean, float deviation) {
    table(name, {size}, mean, deviation);
  }
  // F32 whatever the type of the matrices is.
  void table(const std::string& name, const std::vector<std::int64_t>& extents, float mean, float deviation) {
    add(name, GGML_TYPE_F32, extents, mean, deviation);
  }
  void norm(const std::string& name, std::int64_t size) { vector(name, size, 1, 0.2f); }
  void bias(const std::string& name, std::int64_t size) { vector(name, size, 0, 0.2f); }
  // A layer norm's scale and shift; a linear layer with a bias.
  void layer_norm(const std::string& name, std::int64_t size) {
    norm(name + ".weight", size);
    bias(name + ".bias", size);
  }
  void affine(const std::string& name, std::int64_t columns, std::int64_t rows, float gain = 1) {
    linear(name + ".weight", columns, rows, gain);
    bias(name + ".bias", rows);
  }

 private:
  // Large tensors repeat a pool of whole blocks. Its size in blocks is a prime, so that rows begin at other blocks of
  // it each time around.
  void add(const std::string& name, ggml_type type, const std::vector<std::int64_t>& extents, float mean,
           float deviation) {
    const std::int64_t unit = std::max<std::int64_t>(32, ggml_blck_size(type));
    const std::int64_t count = product(extents), pool = std::min(count, unit * (unit > 32 ? 8191 : 65537));
    file_.add(name, type, extents, [=, seed = seed_](const Sink& sink) {
      Random random(seed, name);
      std::vector<float> values(static_cast<std::size_t>(pool));
      // In double, where the product is exact, so that a fused multiply-add gives the same.
      for (float& value : values)
        value = static_cast<float>(double{mean} + double{deviation} * double{random.normal()});
      const std::int64_t block = ggml_blck_size(type);
      std::vector<char> bytes(ggml_row_size(type, pool));
      ggml_quantize_chunk(type, values.data(), bytes.data(), 0, pool / block, block, nullptr);
      for (std::size_t left = ggml_row_size(type, count); left != 0;) {
        const std::size_t some = std::min(left, bytes.size());
        sink(bytes.data(), some);
        left -= some;
      }
    });
  }

  Writer& file_;
  std::uint64_t seed_;
  ggml_type type_;
};

inline void require(bool holds, const std::string& message) {
  if (!holds) throw std::runtime_error("tiny_gguf: " + message);
}

}  // namespace tiny_gguf

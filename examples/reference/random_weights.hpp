// Weights for a decoder that has learnt nothing: tests of arithmetic and measurements of time need no more.
#pragma once

#include "ops.hpp"

namespace reference {

// A source of weights for Decoder: uniform, scaled so that activations keep their size, the same on every machine.
class RandomWeights {
 public:
  explicit RandomWeights(std::uint64_t seed, bool qkv_bias = false, bool tied_head = false)
      : seed_(seed), qkv_bias_(qkv_bias), tied_head_(tied_head) {}

  bool has(const std::string& name) const {
    if (ends_with(name, ".bias")) return qkv_bias_;
    return !(tied_head_ && ends_with(name, "lm_head.weight"));
  }

  // [rows, columns]: norms are near 1, biases and matrices near 0.
  Matrix matrix(const std::string& name, Eigen::Index rows, Eigen::Index columns) const {
    const bool is_norm = name.find("norm") != std::string::npos;
    const float spread = rows == 1 ? 0.2f : std::sqrt(3.0f / static_cast<float>(columns));
    std::uint64_t state = seed_;
    for (const char c : name) state = (state ^ static_cast<unsigned char>(c)) * 0x100000001B3u;  // FNV-1a
    return Matrix::NullaryExpr(rows, columns, [&] {
      state = state * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX generator
      const auto unit = static_cast<float>(static_cast<std::int32_t>(state >> 32)) / 2147483648.0f;  // [-1, 1)
      return (is_norm ? 1.0f : 0.0f) + spread * unit;
    });
  }

 private:
  static bool ends_with(const std::string& text, const std::string& end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
  }
  std::uint64_t seed_;
  bool qkv_bias_, tied_head_;
};

}  // namespace reference

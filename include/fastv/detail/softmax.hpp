// fastv: the parts of a softmax, and sums of many rows.
#pragma once

#include "math.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
inline namespace FASTV_KIND {

// Lanes of partial sums, so that the compiler may vectorise a sum without reordering one.
inline constexpr std::size_t lanes = 32;

// out += factor * values. In blocks of constant size, which compilers vectorise at -O2 as well.
template <class Score, class T>
inline void add_to(Score* __restrict out, const T* __restrict values, std::size_t count, Score factor = 1) noexcept {
  const std::size_t whole = count / lanes * lanes;
  for (std::size_t i = 0; i < whole; i += lanes)
    for (std::size_t lane = 0; lane < lanes; ++lane)
      out[i + lane] += factor * static_cast<Score>(to_float(values[i + lane]));
  for (std::size_t i = whole; i < count; ++i) out[i] += factor * static_cast<Score>(to_float(values[i]));
}

// Bits of the greatest magnitude: above infinity's where one is NaN.
inline std::uint32_t greatest_magnitude(const float* values, std::size_t count) noexcept {
  std::uint32_t most = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t magnitude = bits_of(values[i]) & ~FloatBits<float>::sign;
    most = magnitude > most ? magnitude : most;
  }
  return most;
}

// Greatest of logits[0 .. keys); NaN where one is NaN or +infinity; -infinity where every key is hidden.
inline float greatest(const float* logits, std::size_t keys) noexcept {
  // Positive values and their bits grow alike; of negative ones only NaN lies above -infinity. So one unsigned
  // comparison finds NaN of either sign and +infinity.
  const auto unusable = [](float logit) {
    const std::uint32_t bits = bits_of(logit), positive = 1 - (bits >> 31);
    return (bits & ~FloatBits<float>::sign) + positive > FloatBits<float>::infinity ? 1u : 0u;
  };
  float highest[lanes];
  std::uint32_t bad[lanes] = {};
  for (std::size_t lane = 0; lane < lanes; ++lane) highest[lane] = logits[0];
  const auto block = [&](const float* from, std::size_t count) {
    for (std::size_t lane = 0; lane < count; ++lane) {
      bad[lane] |= unusable(from[lane]);
      highest[lane] = from[lane] > highest[lane] ? from[lane] : highest[lane];
    }
  };
  for (std::size_t i = 0; i + lanes <= keys; i += lanes) block(logits + i, lanes);
  if (keys >= lanes)
    block(logits + keys - lanes, lanes);  // the rest, and some again
  else
    block(logits, keys);
  float most = highest[0];
  std::uint32_t any_bad = 0;
  for (std::size_t lane = 0; lane < lanes; ++lane) {
    most = highest[lane] > most ? highest[lane] : most;
    any_bad |= bad[lane];
  }
  return any_bad != 0 ? nan_value<float>() : most;
}

// logits -> exp(logits - most), in place; returns their sum. Keep = false: the sum alone, and the logits stay.
template <bool Keep = true>
inline float exponentials(float* logits, std::size_t keys, float most) noexcept {
  float sums[lanes] = {};
  const auto block = [&](float* values) {
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      const float e = exp_of_negative(values[lane] - most);
      if constexpr (Keep) values[lane] = e;
      sums[lane] += e;
    }
  };
  const std::size_t whole = keys / lanes * lanes;
  for (std::size_t i = 0; i < whole; i += lanes) block(logits + i);
  float rest[lanes];  // the last ones, then -infinity, whose exponential is 0
  for (float& value : rest) value = minus_infinity<float>();
  std::memcpy(rest, logits + whole, (keys - whole) * sizeof(float));
  block(rest);
  if constexpr (Keep) std::memcpy(logits + whole, rest, (keys - whole) * sizeof(float));
  float sum = 0;
  for (std::size_t lane = 0; lane < lanes; ++lane) sum += sums[lane];
  return sum;
}

}  // namespace FASTV_KIND
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

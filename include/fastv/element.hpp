// fastv: element types of the engine's tensors, and floats read as their bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastv {

// Storage types, defined by their bits, so that Eigen::half, ggml_fp16_t, at::Half, __half and their bfloat16
// brothers map onto them without a copy (cast the pointer).
struct half {          // IEEE 754 binary16
  std::uint16_t bits;  // sign, 5 of exponent, 10 of fraction
};
struct bfloat16 {      // the upper half of a float
  std::uint16_t bits;  // sign, 8 of exponent, 7 of fraction
};

namespace detail {

template <class To, class From>
inline To bit_cast(const From& from) noexcept {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Floats are classified and compared by their bits: -ffast-math lets a compiler assume that NaN and infinities do not
// exist, and then drops the tests for them. By reference, since clang 18 and later take a float that is handed over by
// value to be neither.
template <class T>
struct FloatBits;
template <>
struct FloatBits<float> {
  using Word = std::uint32_t;
  static constexpr Word sign = 0x80000000u, infinity = 0x7f800000u, quiet_nan = 0x7fc00000u;
};
template <>
struct FloatBits<double> {
  using Word = std::uint64_t;
  static constexpr Word sign = 0x8000000000000000u, infinity = 0x7ff0000000000000u, quiet_nan = 0x7ff8000000000000u;
};

template <class T>
using Word = typename FloatBits<T>::Word;

template <class T>
inline Word<T> bits_of(const T& value) noexcept {
  return bit_cast<Word<T>>(value);
}
template <class T>
inline bool is_nan(const T& value) noexcept {
  return (bits_of(value) & ~FloatBits<T>::sign) > FloatBits<T>::infinity;
}
template <class T>
inline bool is_infinite(const T& value) noexcept {
  return (bits_of(value) & ~FloatBits<T>::sign) == FloatBits<T>::infinity;
}
template <class T>
inline T nan_value() noexcept {
  return bit_cast<T>(FloatBits<T>::quiet_nan);
}

// An unsigned integer that orders like the float: greater float, greater key. NaN has key 0, below all others, and -0
// has the key of +0.
template <class T>
inline Word<T> order_key(const T& value) noexcept {
  constexpr Word<T> sign = FloatBits<T>::sign;
  const Word<T> bits = bits_of(value), magnitude = bits & static_cast<Word<T>>(~sign);
  const Word<T> key = bits == magnitude ? (bits | sign) : static_cast<Word<T>>(sign - magnitude);
  return magnitude > FloatBits<T>::infinity ? 0 : key;
}

}  // namespace detail

// Exact for every value, NaN and infinities included (denormals need a thread that does not flush them to zero). No
// branch and no table, so loops over it vectorise without F16C.
inline float to_float(half value) noexcept {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
  // Re-bias the exponent from 15 to 127 by a product, which also normalises denormals.
  const float scaled = detail::bit_cast<float>(magnitude) * 5.192296858534828e33f;  // 2^112
  std::uint32_t bits = detail::bit_cast<std::uint32_t>(scaled);
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN keep their exponent
  return detail::bit_cast<float>(bits | (static_cast<std::uint32_t>(value.bits & 0x8000u) << 16));
}
inline float to_float(bfloat16 value) noexcept {
  return detail::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}
inline float to_float(float value) noexcept { return value; }
inline double to_float(double value) noexcept { return value; }

}  // namespace fastv

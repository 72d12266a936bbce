// fastv: element types of the engine's tensors, and floats read as their bits.
//
// An element type is one with a function to_float(value) that returns float or double, found by argument-dependent
// lookup: four lines make one of your own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "detail/begin.hpp"

namespace fastv {

// Storage types, defined by their bits, so that Eigen::half, ggml_fp16_t, at::Half, __half and their bfloat16
// counterparts map onto them without a copy: see as_half().
struct half {          // IEEE 754 binary16
  std::uint16_t bits;  // sign, 5 of exponent, 10 of fraction
};
struct bfloat16 {      // the upper half of a float
  std::uint16_t bits;  // sign, 8 of exponent, 7 of fraction
};
struct fp8_e4m3 {     // OCP 8-bit float, E4M3FN: no infinity, NaN is 0x7f and 0xff, at most 448
  std::uint8_t bits;  // sign, 4 of exponent, 3 of fraction
};
struct fp8_e5m2 {     // OCP 8-bit float, E5M2: the upper half of a half
  std::uint8_t bits;  // sign, 5 of exponent, 2 of fraction
};

// A pointer to any 16-bit type as one to half or bfloat16: fp16 is kept as uint16_t, _Float16, __half, at::Half, ...
template <class T>
FASTV_INLINE const half* as_half(const T* data) noexcept {
  static_assert(sizeof(T) == sizeof(half), "half precision has 16 bits an element");
  return reinterpret_cast<const half*>(data);
}
template <class T>
FASTV_INLINE const bfloat16* as_bfloat16(const T* data) noexcept {
  static_assert(sizeof(T) == sizeof(bfloat16), "bfloat16 has 16 bits an element");
  return reinterpret_cast<const bfloat16*>(data);
}

namespace detail {

// Never defined: for decltype only.
template <class T>
T&& made() noexcept;
template <class T, class = void>
inline constexpr bool has_to_float = false;

inline namespace FASTV_KIND {

template <class To, class From>
FASTV_DEVICE inline To bit_cast(const From& from) noexcept {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// condition ? a : b by masks. Of a conditional that chooses between results GCC makes a branch, and then no loop over
// to_float() vectorises.
FASTV_DEVICE inline std::uint32_t choose(bool condition, std::uint32_t a, std::uint32_t b) noexcept {
  const std::uint32_t mask = 0u - static_cast<std::uint32_t>(condition);
  return b ^ ((a ^ b) & mask);
}

// Floats are classified and compared by their bits: -ffast-math lets a compiler assume that NaN and infinities do not
// exist, and then drops the tests for them. Pass by reference: under -ffast-math clang 18 and later assume that a float
// passed by value is neither.
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
FASTV_DEVICE inline Word<T> bits_of(const T& value) noexcept {
  return bit_cast<Word<T>>(value);
}
template <class T>
FASTV_DEVICE inline bool is_nan(const T& value) noexcept {
  return (bits_of(value) & ~FloatBits<T>::sign) > FloatBits<T>::infinity;
}
template <class T>
FASTV_DEVICE inline bool is_infinite(const T& value) noexcept {
  return (bits_of(value) & ~FloatBits<T>::sign) == FloatBits<T>::infinity;
}
template <class T>
FASTV_DEVICE inline bool is_zero(const T& value) noexcept {
  return (bits_of(value) & ~FloatBits<T>::sign) == 0;
}
template <class T>
FASTV_DEVICE inline T nan_value() noexcept {
  const Word<T> bits = FloatBits<T>::quiet_nan;  // of its own: device code has no address of the constant
  return bit_cast<T>(bits);
}
template <class T>
FASTV_DEVICE inline T minus_infinity() noexcept {
  return bit_cast<T>(static_cast<Word<T>>(FloatBits<T>::sign | FloatBits<T>::infinity));
}
// -infinity, by which a bias hides a key.
FASTV_DEVICE inline bool hides(const float& bias) noexcept {
  return bits_of(bias) == (FloatBits<float>::sign | FloatBits<float>::infinity);
}

// An unsigned integer that orders like the float: greater float, greater key. NaN has key 0, below all others, and -0
// has the key of +0.
template <class T>
FASTV_DEVICE inline Word<T> order_key(const T& value) noexcept {
  constexpr Word<T> sign = FloatBits<T>::sign;
  const Word<T> bits = bits_of(value), magnitude = bits & static_cast<Word<T>>(~sign);
  const Word<T> key = bits == magnitude ? (bits | sign) : static_cast<Word<T>>(sign - magnitude);
  return magnitude > FloatBits<T>::infinity ? 0 : key;
}

}  // namespace FASTV_KIND
}  // namespace detail

inline namespace FASTV_KIND {

// Exact for every value, NaN and infinities included, also on threads that flush denormals to zero: no denormal float
// comes up on the way. No branch and no table, so loops over it vectorise without F16C.
FASTV_DEVICE inline float to_float(half value) noexcept {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fffu);
  // Re-biased from 15 to 127; infinity and NaN get the rest of their exponent.
  const std::uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
  const float tiny = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 5.9604644775390625e-8f;  // 2^-24
  const std::uint32_t bits = detail::choose(magnitude < 0x400u, detail::bit_cast<std::uint32_t>(tiny), normal);
  return detail::bit_cast<float>(bits | (static_cast<std::uint32_t>(value.bits & 0x8000u) << 16));
}
FASTV_DEVICE inline float to_float(bfloat16 value) noexcept {
  return detail::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}
FASTV_DEVICE inline float to_float(fp8_e5m2 value) noexcept {
  return to_float(half{static_cast<std::uint16_t>(value.bits << 8)});
}
FASTV_DEVICE inline float to_float(fp8_e4m3 value) noexcept {
  const std::uint32_t magnitude = value.bits & 0x7fu;
  const std::uint32_t normal = (magnitude << 20) + 0x3c000000u;                                // bias 7 to 127
  const float tiny = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0.001953125f;  // 2^-9
  std::uint32_t bits = detail::choose(magnitude < 8u, detail::bit_cast<std::uint32_t>(tiny), normal);
  bits |= magnitude == 0x7fu ? 0x7fc00000u : 0u;
  return detail::bit_cast<float>(bits | (static_cast<std::uint32_t>(value.bits & 0x80u) << 24));
}
FASTV_DEVICE inline float to_float(std::int8_t value) noexcept { return static_cast<float>(value); }
FASTV_DEVICE inline float to_float(float value) noexcept { return value; }
FASTV_DEVICE inline double to_float(double value) noexcept { return value; }

}  // namespace FASTV_KIND

namespace detail {
template <class T>
inline constexpr bool has_to_float<T, decltype(static_cast<void>(to_float(made<const T&>())))> = true;
}  // namespace detail

}  // namespace fastv

#include "detail/end.hpp"

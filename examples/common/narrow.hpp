// Floats to the element type of a model, in code of the host and of a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <fastv/element.hpp>

// Functions of both, and of a kernel alone.
#if defined(__CUDACC__)
#define EXAMPLE_BOTH __host__ __device__
#define EXAMPLE_KERNEL __device__
#else
#define EXAMPLE_BOTH
#define EXAMPLE_KERNEL
#endif

// The nearest half, of equals the even one.
template <class T>
EXAMPLE_BOTH inline T narrow(float value) {
  return value;
}
template <>
EXAMPLE_BOTH inline fastv::half narrow<fastv::half>(float value) {
  const float magnitude = fabsf(value);
  const std::uint32_t sign = copysignf(1, value) < 0 ? 0x8000u : 0u;
  if (magnitude != magnitude) return {0x7e00};
  if (magnitude >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00u)};
  int exponent = -13;  // denormal halves and those of the lowest exponent have the same unit
  if (magnitude >= 0x1p-14f) frexpf(magnitude, &exponent);
  const auto units =
      static_cast<std::uint32_t>(rintf(ldexpf(magnitude, 11 - exponent)));  // up to 2048: a carry is right
  return {static_cast<std::uint16_t>(sign | (static_cast<std::uint32_t>(exponent + 13) * 1024 + units))};
}

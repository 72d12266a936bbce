// fastv: elementary functions without <cmath>, which the core does not include; loops over them vectorise.
#pragma once

#include "../element.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
inline namespace FASTV_KIND {

// exp(x) for x <= 0 to 2 ulp (Cephes expf: argument reduced by ln 2 in two parts, degree 6). No branch and no library
// call, so that loops over it vectorise. Below -87.7, where floats turn denormal, the result is 0. x must not be NaN.
FASTV_DEVICE inline float exp_of_negative(float x) noexcept {
  // max(x, -88) on the bits, since GCC turns a comparison of floats into a branch here: of negative floats the smaller
  // has the greater bits.
  const std::uint32_t bits = bits_of(x) | FloatBits<float>::sign, lowest = bits_of(-88.0f);
  const float clipped = bit_cast<float>(bits < lowest ? bits : lowest);
  const auto power = static_cast<std::int32_t>(clipped * 1.44269504088896341f - 0.5f);  // rounds to nearest
  const float n = static_cast<float>(power);
  const float r = clipped - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bit_cast<float>(static_cast<std::uint32_t>(power + 127) << 23);
}

// tanh by exp, to about 1e-7 absolute.
FASTV_DEVICE inline float tanh_of(float x) noexcept {
  const float magnitude = x < 0 ? -x : x;
  const float e = exp_of_negative(-2.0f * magnitude);
  const float t = (1.0f - e) / (1.0f + e);
  return x < 0 ? -t : t;
}

// sqrt by Newton's method from a guess in the exponent, to 1 ulp or so; the core includes no <cmath>.
FASTV_DEVICE inline float sqrt_of(float x) noexcept {
  if (!(x > 0)) return x;
  float root = bit_cast<float>((bits_of(x) >> 1) + 0x1fbd1df5u);
  for (int i = 0; i < 4; ++i) root = 0.5f * (root + x / root);
  return root;
}

// ln(x) for normal positive x, to about 1e-7 (Cephes logf).
FASTV_DEVICE inline float log_of(float x) noexcept {
  const std::uint32_t bits = bits_of(x);
  auto power = static_cast<std::int32_t>(bits >> 23) - 126;
  float m = bit_cast<float>((bits & 0x007fffffu) | 0x3f000000u);  // [0.5, 1)
  if (m < 0.70710678f) {
    m += m;
    --power;
  }
  m -= 1.0f;
  const float z = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const auto e = static_cast<float>(power);
  return m + (m * z * p + e * -2.12194440e-4f - 0.5f * z) + e * 0.693359375f;
}

// x^exponent for x in [0, 1] and an exponent of at least 0; 0 below 1e-37, where logarithms end.
FASTV_DEVICE inline float power_of(float x, float exponent) noexcept {
  if (x < 1e-37f) return 0;
  if (exponent == 1) return x;
  const float logarithm = exponent * log_of(x);
  return logarithm < 0 ? exp_of_negative(logarithm) : 1.0f;
}

// sin and cos of an angle up to 2^30 or so, in double: reduced by pi / 2 in two parts, then Cephes' polynomials.
FASTV_DEVICE inline void sin_cos(double angle, double& sine, double& cosine) noexcept {
  const double turns = angle * 0.63661977236758134308;  // 2 / pi
  if (!(turns > -0x1p52 && turns < 0x1p52)) {           // no whole number of turns: frequencies that are none
    sine = cosine = nan_value<double>();
    return;
  }
  const auto quadrant = static_cast<std::int64_t>(turns + (turns < 0 ? -0.5 : 0.5));
  const auto n = static_cast<double>(quadrant);
  const double x = (angle - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11;
  const double z = x * x;
  const double s =
      x + x * z *
              (((((1.58962301576546568060e-10 * z - 2.50507477628578072866e-8) * z + 2.75573136213857245213e-6) * z -
                 1.98412698295895385996e-4) *
                    z +
                8.33333333332211858878e-3) *
                   z -
               1.66666666666666307295e-1);
  const double c =
      1.0 - 0.5 * z +
      z * z *
          (((((-1.13585365213876817300e-11 * z + 2.08757008419747316778e-9) * z - 2.75573141792967388112e-7) * z +
             2.48015872888517045348e-5) *
                z -
            1.38888888888730564116e-3) *
               z +
           4.16666666666665929218e-2);
  const bool odd = (quadrant & 1) != 0;
  sine = odd ? c : s;
  cosine = odd ? s : c;
  if ((quadrant & 2) != 0) sine = -sine;
  if (((quadrant + 1) & 2) != 0) cosine = -cosine;
}

}  // namespace FASTV_KIND
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

// fastv: the arithmetic under score.hpp: sums, exponentials and walks over strided and paged vectors. Everything here
// is written so that a compiler vectorises it for whatever machine it builds for, without intrinsics.
#pragma once

#include "plan.hpp"

namespace fastv {

namespace detail {

// exp(x) for x <= 0 to 2 ulp (Cephes expf: argument reduced by ln 2 in two parts, degree 6). No branch
// and no library call, so that loops over it vectorise. Below -87.7, where floats turn denormal, the
// exponent of `scale` reaches 0, and with it the result. NaN must not come in.
inline float exp_of_negative(float x) noexcept {
  // max(x, -88) on the bits, since GCC turns a comparison of floats into a branch here: of negative
  // floats the smaller has the greater bits.
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
inline float tanh_of(float x) noexcept {
  const float magnitude = x < 0 ? -x : x;
  const float e = exp_of_negative(-2.0f * magnitude);
  const float t = (1.0f - e) / (1.0f + e);
  return x < 0 ? -t : t;
}

// sqrt by Newton's method from a guess in the exponent, to 1 ulp or so; the core includes no <cmath>.
inline float sqrt_of(float x) noexcept {
  if (!(x > 0)) return x;
  float root = bit_cast<float>((bits_of(x) >> 1) + 0x1fbd1df5u);
  for (int i = 0; i < 4; ++i) root = 0.5f * (root + x / root);
  return root;
}

// Asks for a cache line that will soon be read, to lie in the second-level cache by then.
inline void prefetch(const void* from) noexcept {
#if defined(__GNUC__)
  __builtin_prefetch(from, 0, 2);
#else
  static_cast<void>(from);
#endif
}
// The same for all lines from there to there.
inline void prefetch(const unsigned char* from, const unsigned char* to) noexcept {
  for (; from < to; from += 64) prefetch(from);
}

// Lanes of partial sums, so that the compiler may vectorise a sum without reordering one.
inline constexpr std::size_t lanes = 32;

// q.k over dim elements: any type, any value, any compiler. fast_products() is its fast brother.
template <class K>
inline float dot(const float* q, const K* k, std::size_t dim) noexcept {
  float sums[lanes] = {};
  std::size_t i = 0;
  for (; i + lanes <= dim; i += lanes)
    for (std::size_t lane = 0; lane < lanes; ++lane)
      sums[lane] += q[i + lane] * static_cast<float>(to_float(k[i + lane]));
  for (std::size_t lane = 0; lane < lanes && i < dim; ++i, ++lane)
    sums[lane] += q[i] * static_cast<float>(to_float(k[i]));
  for (std::size_t width = lanes / 2; width > 0; width /= 2)
    for (std::size_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  return sums[0];
}

// Room for a query row, zeros behind it: whole steps of products_of() for every vector width.
inline constexpr std::size_t padded(std::size_t dim) noexcept { return (dim + 31) / 32 * 32; }

// Blocks of `size` that so many tokens need.
inline constexpr std::size_t blocks_for(std::size_t tokens, std::size_t size) noexcept {
  return tokens / size + (tokens % size != 0 ? 1u : 0u);
}

// No tensor has more entries, nor bytes: products of sizes below it cannot overflow.
inline constexpr std::size_t most_entries = static_cast<std::size_t>(-1) / 32;

struct Axis {
  const char* what;
  std::ptrdiff_t stride;
  std::size_t extent;
};

// Strides must not be negative, and no two entries may overlap: in order of stride, whatever the order of the axes,
// each axis must step over all that the ones before it reach. Where an axis has no entries, nothing can overlap.
template <std::size_t N>
Status check_strides(Axis (&&axes)[N], std::size_t entry) noexcept {
  for (const Axis& axis : axes)
    if (axis.stride < 0) return fail(Errc::negative_stride, axis.what, static_cast<long long>(axis.stride));
  for (const Axis& axis : axes)
    if (axis.extent == 0) return {};
  for (std::size_t i = 1; i < N; ++i)
    for (std::size_t j = i; j > 0 && axes[j].stride < axes[j - 1].stride; --j) {
      const Axis larger = axes[j - 1];
      axes[j - 1] = axes[j];
      axes[j] = larger;
    }
  if (entry > most_entries) return fail(Errc::beyond_memory, "size of an entry", number(entry), 1);
  std::size_t reach = entry;
  for (const Axis& axis : axes) {
    if (axis.extent <= 1) continue;
    const auto stride = static_cast<std::size_t>(axis.stride);
    if (stride < reach)
      return fail(Errc::overlapping_stride, axis.what, static_cast<long long>(axis.stride), number(reach));
    if (stride > (most_entries - reach) / (axis.extent - 1))
      return fail(Errc::beyond_memory, axis.what, static_cast<long long>(axis.stride), number(axis.extent));
    reach += stride * (axis.extent - 1);
  }
  return {};
}

// Calls run(first token, address of its vector in head 0, tokens) for each stretch of tokens begin .. end - 1 that
// lies in one piece: all of them, or those of one block.
template <class T, class Run>
void for_each_block(const HeadVectors<T>& vectors, std::size_t begin, std::size_t end, Run run) noexcept {
  const Pages& pages = vectors.pages;
  if (pages.block_table.empty()) {
    if (begin < end) run(begin, vectors.data + static_cast<std::ptrdiff_t>(begin) * vectors.token_stride, end - begin);
    return;
  }
  while (begin < end) {
    const std::size_t row = begin % pages.block_tokens, room = pages.block_tokens - row;
    const std::size_t count = room < end - begin ? room : end - begin;
    run(begin,
        vectors.data + static_cast<std::ptrdiff_t>(pages.block_table[begin / pages.block_tokens]) * pages.block_stride +
            static_cast<std::ptrdiff_t>(row) * vectors.token_stride,
        count);
    begin += count;
  }
}

// Calls each(head, token, address of its vector) for tokens begin .. end - 1 in the order in which they lie in
// memory.
template <class T, class Each>
void for_each_vector(const HeadVectors<T>& vectors, std::size_t begin, std::size_t end, Each each) noexcept {
  for_each_block(vectors, begin, end, [&](std::size_t first, const T* data, std::size_t count) {
    const auto at = [&](std::size_t head, std::size_t i) {
      each(head, first + i,
           data + static_cast<std::ptrdiff_t>(head) * vectors.head_stride +
               static_cast<std::ptrdiff_t>(i) * vectors.token_stride);
    };
    if (vectors.head_stride <= vectors.token_stride) {
      for (std::size_t i = 0; i < count; ++i)
        for (std::size_t head = 0; head < vectors.heads; ++head) at(head, i);
    } else {
      for (std::size_t head = 0; head < vectors.heads; ++head)
        for (std::size_t i = 0; i < count; ++i) at(head, i);
    }
  });
}

// A vector of any type and any chunking -> dim floats.
template <class T>
void widen(const HeadVectors<T>& vectors, const T* data, float* wide) noexcept {
  const std::size_t chunk = vectors.pages.chunk == 0 ? vectors.dim : vectors.pages.chunk;
  for (std::size_t c = 0; c * chunk < vectors.dim; ++c) {
    const T* part = data + static_cast<std::ptrdiff_t>(c) * vectors.pages.chunk_stride;
    for (std::size_t i = 0; i < chunk; ++i) wide[c * chunk + i] = static_cast<float>(to_float(part[i]));
  }
}

// Euclidean length of a vector.
template <class T>
float length(const HeadVectors<T>& vectors, const T* data) noexcept {
  const std::size_t chunk = vectors.pages.chunk == 0 ? vectors.dim : vectors.pages.chunk;
  float sum = 0;
  for (std::size_t i = 0; i < vectors.dim; ++i) {
    const float x =
        static_cast<float>(to_float(data[static_cast<std::ptrdiff_t>(i / chunk) * vectors.pages.chunk_stride +
                                         static_cast<std::ptrdiff_t>(i % chunk)]));
    sum += x * x;
  }
  return sqrt_of(sum);
}

// out += factor * values. In blocks of constant size, which compilers vectorise at -O2 as well.
template <class Score, class T>
inline void add_to(Score* __restrict out, const T* __restrict values, std::size_t count, Score factor = 1) noexcept {
  const std::size_t whole = count / lanes * lanes;
  for (std::size_t i = 0; i < whole; i += lanes)
    for (std::size_t lane = 0; lane < lanes; ++lane)
      out[i + lane] += factor * static_cast<Score>(to_float(values[i + lane]));
  for (std::size_t i = whole; i < count; ++i) out[i] += factor * static_cast<Score>(to_float(values[i]));
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

// logits -> exp(logits - most), in place; returns their sum.
inline float exponentials(float* logits, std::size_t keys, float most) noexcept {
  float sums[lanes] = {};
  const auto block = [&](float* values) {
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      const float e = exp_of_negative(values[lane] - most);
      values[lane] = e;
      sums[lane] += e;
    }
  };
  const std::size_t whole = keys / lanes * lanes;
  for (std::size_t i = 0; i < whole; i += lanes) block(logits + i);
  float rest[lanes];  // the last ones, and behind them -infinity, whose exponential is 0
  for (float& value : rest) value = bit_cast<float>(FloatBits<float>::sign | FloatBits<float>::infinity);
  std::memcpy(rest, logits + whole, (keys - whole) * sizeof(float));
  block(rest);
  std::memcpy(logits + whole, rest, (keys - whole) * sizeof(float));
  float sum = 0;
  for (std::size_t lane = 0; lane < lanes; ++lane) sum += sums[lane];
  return sum;
}

}  // namespace detail
}  // namespace fastv

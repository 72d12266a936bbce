// fastv: vectors of floats by the compilers' own vector types, and keys of several element types widened into them.
#pragma once

#include <utility>

#include "math.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
inline namespace FASTV_KIND {

// Room for a query row, then zeros: whole steps of products_of() for every vector width.
inline constexpr std::size_t padded(std::size_t dim) noexcept { return (dim + 31) / 32 * 32; }

// Keys of a tile. They lie an eighth of the stretch apart where they are read in place, so that walking the tiles reads 8
// streams: one core reads faster from 4 or 8 places at once than from one, and much slower from 16.
inline constexpr std::size_t streams = 8;

#if FASTV_VECTORS
inline constexpr std::size_t width = FASTV_VECTORS;
typedef float Floats __attribute__((vector_size(4 * width)));
typedef std::uint32_t Words __attribute__((vector_size(4 * width)));
typedef std::int32_t Integers __attribute__((vector_size(4 * width)));

template <class Vector, class T>
inline Vector load(const T* from) noexcept {
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}

// bit_cast() of vectors, which nvcc does not let into device code.
template <class To, class From>
inline To vector_cast(const From& from) noexcept {
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- keys to floats -----------------------------------------------------------------------------

// How 2 * width elements of a key become two vectors of floats. Two 16-bit elements share a word: the even ones are its
// low halves, the odd ones its high halves, so nothing needs to be shuffled if the query is laid out to match (arrange).
// Where infinity and NaN cannot be widened this way, `special` collects bits that tell.
struct Pair {
  Floats first, second;
};
template <class K>
struct Widened {
  static constexpr bool exists = false;
};
template <>
struct Widened<float> {
  static constexpr bool exists = true, every_value = true, keeps_denormals = true, interleaved = false;
  static constexpr float query_scale = 1.0f, logit_scale = 1.0f;
  static Pair pair(const float* k, Words&) noexcept { return {load<Floats>(k), load<Floats>(k + width)}; }
};
template <>
struct Widened<bfloat16> {
  static constexpr bool exists = true, every_value = true, keeps_denormals = true, interleaved = true;
  static constexpr float query_scale = 1.0f, logit_scale = 1.0f;
  static Pair pair(const bfloat16* k, Words&) noexcept {
    const Words words = load<Words>(k);
    return {vector_cast<Floats>(words << 16), vector_cast<Floats>(words & 0xffff0000u)};
  }
};
#if defined(__AVX2__) && defined(__F16C__)
template <>
struct Widened<half> {
  // The machine's own conversion is exact for every value, whatever it does with denormal floats.
  static constexpr bool exists = true, every_value = true, keeps_denormals = true, interleaved = false;
  static constexpr float query_scale = 1.0f, logit_scale = 1.0f;
  static Pair pair(const half* k, Words&) noexcept { return {widened(k), widened(k + width)}; }

 private:
  static Floats widened(const half* k) noexcept {
    typedef short Shorts __attribute__((vector_size(2 * width)));
    return __builtin_ia32_vcvtph2ps256(load<Shorts>(k));
  }
};
#elif defined(__aarch64__)
template <>
struct Widened<half> {
  // fcvtl, exact for every value.
  static constexpr bool exists = true, every_value = true, keeps_denormals = true, interleaved = false;
  static constexpr float query_scale = 1.0f, logit_scale = 1.0f;
  static Pair pair(const half* k, Words&) noexcept { return {widened(k), widened(k + width)}; }

 private:
  static Floats widened(const half* k) noexcept {
#if defined(__clang__)
    typedef __fp16 Halves __attribute__((vector_size(2 * width)));
    return __builtin_convertvector(load<Halves>(k), Floats);
#else  // which g++ takes apart, lane by lane
    typedef short Shorts __attribute__((vector_size(2 * width)));
    Floats wide;
    __asm__("fcvtl %0.4s, %1.4h" : "=w"(wide) : "w"(load<Shorts>(k)));
    return wide;
#endif
  }
};
#else
template <>
struct Widened<half> {
  // The bits, moved to where a float has them, are the value times 2^-112, exactly, denormals included where the thread
  // keeps them; query and logit take the factor back in two exact steps that keep clear of overflow.
  static constexpr bool exists = true, every_value = false, keeps_denormals = false, interleaved = true;
  static constexpr float query_scale = 18446744073709551616.0f, logit_scale = 281474976710656.0f;  // 2^64, 2^48
  static Pair pair(const half* k, Words& special) noexcept {
    const Words words = load<Words>(k);
    special |= (words & 0x7fff7fffu) + 0x04000400u;  // carries into a sign bit: infinity or NaN
    return {in_place(words << 16), in_place(words)};
  }

 private:
  static Floats in_place(Words upper) noexcept {  // sign and exponent in the upper half of each word
    return vector_cast<Floats>(vector_cast<Words>(vector_cast<Integers>(upper) >> 3) & 0x8fffe000u);
  }
};
#endif

// One query row in the order of Widened<K>::pair(), then zeros. q: [dim]; query: [padded(dim)].
template <class K>
void arrange(const float* q, std::size_t dim, float* query) noexcept {
  constexpr std::size_t step = 2 * width;
  const auto source = [](std::size_t place) {
    return Widened<K>::interleaved ? place % width * 2 + place / width : place;
  };
  const std::size_t whole = dim / step * step;
  for (std::size_t i = 0; i < whole; i += step)
    for (std::size_t place = 0; place < step; ++place)
      query[i + place] = q[i + source(place)] * Widened<K>::query_scale;
  for (std::size_t i = whole; i < padded(dim); ++i) {  // interleaved, the last step has gaps before dim as well
    const std::size_t from = whole + source(i - whole);
    query[i] = i - whole < step && from < dim ? q[from] * Widened<K>::query_scale : 0.0f;
  }
}

// ---- sums across vectors ------------------------------------------------------------------------

// Every other block of lanes of a (the even ones, or the odd ones), then those of b. Small blocks stay within their
// quarter of four lanes: such shuffles are the cheap ones.
template <std::size_t Block>
constexpr std::uint32_t lane_of(std::size_t lane, std::size_t odd) noexcept {
  constexpr std::size_t span = Block >= 4 ? width : 4;
  const std::size_t from_b = lane % span / (span / 2), block = lane % (span / 2) / Block * 2 + odd;
  return static_cast<std::uint32_t>(from_b * width + lane / span * span + block * Block + lane % Block);
}
template <std::size_t Block, std::size_t Odd, std::size_t... lane>
inline Floats every_other(Floats a, Floats b, std::index_sequence<lane...>) noexcept {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lane_of<Block>(lane, Odd)...);
#else
  return __builtin_shuffle(a, b, Words{lane_of<Block>(lane, Odd)...});
#endif
}
template <std::size_t Block, std::size_t Odd>
inline Floats every_other(Floats a, Floats b) noexcept {
  return every_other<Block, Odd>(a, b, std::make_index_sequence<width>());
}
// Neighbouring blocks of lanes added up: first those of a, then those of b.
template <std::size_t Block>
inline Floats fold(Floats a, Floats b) noexcept {
  return every_other<Block, 0>(a, b) + every_other<Block, 1>(a, b);
}
// Lane i of the result: the sum of all lanes of v[i]. v: [width]
inline Floats sums_of(const Floats* v) noexcept {
  Floats quads[4];
  FASTV_UNROLL
  for (std::size_t i = 0; i < 4; ++i) {
    if constexpr (width == 8)
      quads[i] = fold<4>(v[i], v[4 + i]);
    else
      quads[i] = v[i];
  }
  return fold<1>(fold<2>(quads[0], quads[1]), fold<2>(quads[2], quads[3]));
}

// [width, width] -> transposed, in place.
inline void transpose(Floats* v) noexcept {
  if constexpr (width == 8) {
    FASTV_UNROLL
    for (std::size_t i = 0; i < 4; ++i) {
      const Floats a = v[i], b = v[4 + i];
      v[i] = every_other<4, 0>(a, b);
      v[4 + i] = every_other<4, 1>(a, b);
    }
  }
  FASTV_UNROLL
  for (std::size_t i = 0; i < width; i += 4) {
    const Floats a = v[i], b = v[i + 1], c = v[i + 2], d = v[i + 3];
    const Floats ab = every_other<2, 0>(a, b), cd = every_other<2, 0>(c, d);
    const Floats ab_behind = every_other<2, 1>(a, b), cd_behind = every_other<2, 1>(c, d);
    v[i] = every_other<1, 0>(ab, cd);
    v[i + 1] = every_other<1, 1>(ab, cd);
    v[i + 2] = every_other<1, 0>(ab_behind, cd_behind);
    v[i + 3] = every_other<1, 1>(ab_behind, cd_behind);
  }
}
#endif

}  // namespace FASTV_KIND
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

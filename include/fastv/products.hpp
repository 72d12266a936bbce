// fastv: q.k for one query row and a stretch of keys, at the speed at which the keys can be read.
#pragma once

#include "kernel.hpp"

namespace fastv {
namespace detail {

// Not on 32-bit x86 without SSE2, where vectors have no registers and g++ warns of their calling convention.
#if defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ && (!defined(__i386__) || defined(__SSE2__))
#define FASTV_VECTORS 1

// ---- q.k at the speed of memory -----------------------------------------------------------------
// Vectors as wide as the machine's, by the vector types of GCC and clang, which need no header and, unlike
// loops, become the same code at -O2 and -O3 and with both compilers. Each width has a namespace of its own, so that
// translation units built for different machines may meet in one program.
#if defined(__AVX512F__)
inline namespace vectors_of_16 {
inline constexpr std::size_t width = 16;
#elif defined(__AVX2__)
inline namespace vectors_of_8 {
inline constexpr std::size_t width = 8;
#else
inline namespace vectors_of_4 {
inline constexpr std::size_t width = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * width)));
typedef std::uint32_t Words __attribute__((vector_size(4 * width)));
typedef std::int32_t Integers __attribute__((vector_size(4 * width)));

template <class Vector, class T>
inline Vector load(const T* from) noexcept {
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}
inline float sum_of(Floats v) noexcept {
  typedef float Quad __attribute__((vector_size(16)));
  float all[width];
  std::memcpy(all, &v, sizeof(v));
  Quad quad = load<Quad>(all);
  if constexpr (width >= 8) quad += load<Quad>(all + 4);
  if constexpr (width == 16) quad += load<Quad>(all + 8) + load<Quad>(all + 12);
  return (quad[0] + quad[1]) + (quad[2] + quad[3]);
}

// How 2 * width elements of a key become two vectors of floats. Two 16-bit elements share a word: the
// even ones are its low halves, the odd ones its high halves, so nothing needs to be shuffled if the
// query is laid out to match (arrange). `special` collects bits that tell whether a value could not be
// widened this way.
struct Pair {
  Floats first, second;
};
template <class K>
struct Widened {
  static constexpr bool exists = false;
};
template <>
struct Widened<float> {
  static constexpr bool exists = true, interleaved = false;
  static constexpr float query_scale = 1.0f, logit_scale = 1.0f;
  static Pair pair(const float* k, Words&) noexcept { return {load<Floats>(k), load<Floats>(k + width)}; }
};
template <>
struct Widened<bfloat16> {
  static constexpr bool exists = true, interleaved = true;
  static constexpr float query_scale = 1.0f, logit_scale = 1.0f;
  static Pair pair(const bfloat16* k, Words&) noexcept {
    const Words words = load<Words>(k);
    return {bit_cast<Floats>(words << 16), bit_cast<Floats>(words & 0xffff0000u)};
  }
};
template <>
struct Widened<half> {
  // The bits, moved to where a float has them, are the value times 2^-112, exactly, denormals included;
  // query and logit take the factor back in two exact steps that keep clear of overflow.
  static constexpr bool exists = true, interleaved = true;
  static constexpr float query_scale = 18446744073709551616.0f, logit_scale = 281474976710656.0f;  // 2^64, 2^48
  static Pair pair(const half* k, Words& special) noexcept {
    const Words words = load<Words>(k);
    special |= (words & 0x7fff7fffu) + 0x04000400u;  // carries into a sign bit: infinity or NaN
    return {in_place(words << 16), in_place(words)};
  }

 private:
  static Floats in_place(Words upper) noexcept {  // sign and exponent in the upper half of each word
    return bit_cast<Floats>(bit_cast<Words>(bit_cast<Integers>(upper) >> 3) & 0x8fffe000u);
  }
};

// One query row in the order of Widened<K>::pair(), scaled, with zeros behind it.
template <class K, class Q>
void arrange(const Q* q, std::size_t dim, float scale, float* query) noexcept {
  // From the last step on, not from dim on: interleaved, that step has gaps before dim as well.
  for (std::size_t i = dim / (2 * width) * (2 * width); i < padded(dim); ++i) query[i] = 0;
  for (std::size_t i = 0; i < dim; ++i) {
    const std::size_t step = i / (2 * width) * (2 * width), place = i - step;
    const std::size_t to = Widened<K>::interleaved ? place / 2 + place % 2 * width : place;
    query[step + to] = static_cast<float>(to_float(q[i])) * scale * Widened<K>::query_scale;
  }
}

// products[n] = q.k_n for up to four keys, `stride` elements apart; past the last, its product again.
// q from arrange(). Returns what Widened<K>::pair() marked as special.
template <class K>
inline Words four_products(const float* q, const K* k, std::ptrdiff_t stride, std::size_t keys, std::size_t dim,
                           float* products) noexcept {
  const K *a = k, *b = keys > 1 ? a + stride : a, *c = keys > 2 ? b + stride : b, *d = keys > 3 ? c + stride : c;
  K rest[4][2 * width];
  Floats a0{}, a1{}, b0{}, b1{}, c0{}, c1{}, d0{}, d1{};
  Words special{};
  for (std::size_t i = 0; i < dim; i += 2 * width) {
    if (dim - i < 2 * width) {  // the last, shorter step: with zeros behind it
      std::memset(rest, 0, sizeof(rest));
      std::memcpy(rest[0], a, (dim - i) * sizeof(K));
      std::memcpy(rest[1], b, (dim - i) * sizeof(K));
      std::memcpy(rest[2], c, (dim - i) * sizeof(K));
      std::memcpy(rest[3], d, (dim - i) * sizeof(K));
      a = rest[0], b = rest[1], c = rest[2], d = rest[3];
    }
    const Floats q0 = load<Floats>(q + i), q1 = load<Floats>(q + i + width);
    const Pair pa = Widened<K>::pair(a, special);
    a0 += q0 * pa.first;
    a1 += q1 * pa.second;
    const Pair pb = Widened<K>::pair(b, special);
    b0 += q0 * pb.first;
    b1 += q1 * pb.second;
    const Pair pc = Widened<K>::pair(c, special);
    c0 += q0 * pc.first;
    c1 += q1 * pc.second;
    const Pair pd = Widened<K>::pair(d, special);
    d0 += q0 * pd.first;
    d1 += q1 * pd.second;
    a += 2 * width, b += 2 * width, c += 2 * width, d += 2 * width;
  }
  products[0] = sum_of(a0 + a1) * Widened<K>::logit_scale;
  products[1] = sum_of(b0 + b1) * Widened<K>::logit_scale;
  products[2] = sum_of(c0 + c1) * Widened<K>::logit_scale;
  products[3] = sum_of(d0 + d1) * Widened<K>::logit_scale;
  return special;
}

// Products of every head's query with `count` keys that lie in one piece from `data` on (head 0), into
// logits[head][first
// ..], or false where a key holds a value that needs the exact way. query: [heads, padded(dim)] from arrange().
//
// Keys are taken eight at a time, all heads of them in a row where tokens are the outer axis: eight streams for the
// hardware to prefetch, and the next eight keys fetched into the second-level cache by hand, since computing alone does
// not ask for memory early enough.
template <class K>
bool fast_products(const HeadVectors<K>& keys, const K* data, std::size_t first, std::size_t count, std::size_t group,
                   const float* query, float* logits, std::size_t logits_stride) noexcept {
  constexpr std::size_t tile = 8;
  const std::size_t dim = keys.dim, stride = static_cast<std::size_t>(keys.token_stride) * sizeof(K);
  const std::size_t ahead = stride >= 2048 || stride == 0 ? tile : 16384 / stride;
  const auto at = [&](std::size_t kv_head, std::size_t i) {
    return data + static_cast<std::ptrdiff_t>(kv_head) * keys.head_stride +
           static_cast<std::ptrdiff_t>(i) * keys.token_stride;
  };
  Words special{};
  const auto four_keys = [&](std::size_t kv_head, std::size_t i) {
    const std::size_t n = count - i < 4 ? count - i : 4;
    for (std::size_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const float* q = query + head * padded(dim);
      float spare[4], *to = logits + head * logits_stride + first + i;
      special |= four_products(q, at(kv_head, i), keys.token_stride, n, dim, n == 4 ? to : spare);
      for (std::size_t j = 0; n < 4 && j < n; ++j) to[j] = spare[j];
    }
  };
  const auto one_tile = [&](std::size_t kv_head, std::size_t i) {
    for (std::size_t next = i + ahead; next < i + ahead + tile && next < count; ++next)
      prefetch(at(kv_head, next), dim * sizeof(K));
    four_keys(kv_head, i);
    if (i + 4 < count) four_keys(kv_head, i + 4);
  };
  if (keys.head_stride <= keys.token_stride) {
    for (std::size_t i = 0; i < count; i += tile)
      for (std::size_t kv_head = 0; kv_head < keys.heads; ++kv_head) one_tile(kv_head, i);
  } else {
    for (std::size_t kv_head = 0; kv_head < keys.heads; ++kv_head)
      for (std::size_t i = 0; i < count; i += tile) one_tile(kv_head, i);
  }
  std::uint32_t any = 0;
  for (std::size_t lane = 0; lane < width; ++lane) any |= special[lane];
  return !is_same<K, half> || (any & 0x80008000u) == 0;
}

#endif

// Floats that load_query() fills: the query of every head, times scale, as it is and as fast_products() wants it.
template <class Q, class K>
std::size_t query_floats(const QueryKey<Q, K>& evidence) noexcept {
  return evidence.heads * (evidence.dim + padded(evidence.dim));
}

template <class Q, class K>
void load_query(const QueryKey<Q, K>& evidence, std::size_t row, float* query) noexcept {
  const std::size_t dim = evidence.dim;
  for (std::size_t head = 0; head < evidence.heads; ++head) {
    const Q* q = evidence.query + static_cast<std::ptrdiff_t>(head) * evidence.query_head_stride +
                 static_cast<std::ptrdiff_t>(row) * evidence.query_row_stride;
    for (std::size_t i = 0; i < dim; ++i) query[head * dim + i] = static_cast<float>(to_float(q[i])) * evidence.scale;
#if defined(FASTV_VECTORS)
    if constexpr (Widened<K>::exists)
      arrange<K>(q, dim, evidence.scale, query + evidence.heads * dim + head * padded(dim));
#endif
  }
}

// logits[h, j] = scale * q_h . k_j for keys j in [begin, end).
// logits: [heads, evidence.keys]; query: from load_query(); wide: [dim] floats of scratch.
template <class Q, class K>
void product_with_keys(const QueryKey<Q, K>& evidence, std::size_t begin, std::size_t end, float* logits,
                       const float* query, float* wide) noexcept {
  const std::size_t dim = evidence.dim, group = evidence.heads / evidence.kv_heads;
  const HeadVectors<K> keys = keys_of(evidence);
  for_each_block(keys, begin, end, [&](std::size_t first, const K* data, std::size_t count) {
#if defined(FASTV_VECTORS)
    if constexpr (Widened<K>::exists) {
      if (keys.pages.chunk == 0 &&
          fast_products(keys, data, first, count, group, query + evidence.heads * dim, logits, evidence.keys))
        return;
    }
#endif
    for (std::size_t kv_head = 0; kv_head < keys.heads; ++kv_head)
      for (std::size_t i = 0; i < count; ++i) {
        widen(keys,
              data + static_cast<std::ptrdiff_t>(kv_head) * keys.head_stride +
                  static_cast<std::ptrdiff_t>(i) * keys.token_stride,
              wide);
        for (std::size_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
          logits[head * evidence.keys + first + i] = dot(query + head * dim, wide, dim);
      }
  });
}

#if defined(FASTV_VECTORS)
}  // inline namespace of this vector width: load_query() and product_with_keys() must come from the same build, since
   // the order of a query differs with it, so that neither may be merged with another's
#endif

}  // namespace detail
}  // namespace fastv

#undef FASTV_VECTORS

// fastv: q.k for one query row and a stretch of keys, at the speed at which the keys can be read.
#pragma once

#include <utility>

#include "kernel.hpp"

// Vectors as wide as the machine's, by the vector types of GCC and clang, which need no header and, unlike loops,
// become the same code at -O2 and -O3 and with both compilers. Each kind of machine has a namespace of its own, so that
// translation units built for different ones may meet in one program. None on 32-bit x86 without SSE2, where vectors
// have no registers and g++ warns of their calling convention.
#if !defined(__GNUC__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || (defined(__i386__) && !defined(__SSE2__))
#define FASTV_VECTORS 0
#define FASTV_KIND any_machine
#elif defined(__AVX512F__)
#define FASTV_VECTORS 16
#define FASTV_KIND vectors_of_16
#elif defined(__AVX2__) && defined(__F16C__)
#define FASTV_VECTORS 8
#define FASTV_KIND vectors_of_8_and_halves
#elif defined(__AVX2__)
#define FASTV_VECTORS 8
#define FASTV_KIND vectors_of_8
#else
#define FASTV_VECTORS 4
#define FASTV_KIND vectors_of_4
#endif

namespace fastv {
namespace detail {
inline namespace FASTV_KIND {

#if FASTV_VECTORS
// Loops over registers must not stay loops.
#if defined(__clang__)
#define FASTV_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FASTV_UNROLL _Pragma("GCC unroll 16")
#endif

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

// ---- keys to floats -----------------------------------------------------------------------------

// How 2 * width elements of a key become two vectors of floats. Two 16-bit elements share a word: the
// even ones are its low halves, the odd ones its high halves, so nothing needs to be shuffled if the
// query is laid out to match (arrange). Where not every value can be widened this way, `special` collects bits that
// tell.
struct Pair {
  Floats first, second;
};
template <class K>
struct Widened {
  static constexpr bool exists = false;
};
template <>
struct Widened<float> {
  static constexpr bool exists = true, every_value = true, interleaved = false;
  static constexpr float query_scale = 1.0f, logit_scale = 1.0f;
  static Pair pair(const float* k, Words&) noexcept { return {load<Floats>(k), load<Floats>(k + width)}; }
};
template <>
struct Widened<bfloat16> {
  static constexpr bool exists = true, every_value = true, interleaved = true;
  static constexpr float query_scale = 1.0f, logit_scale = 1.0f;
  static Pair pair(const bfloat16* k, Words&) noexcept {
    const Words words = load<Words>(k);
    return {bit_cast<Floats>(words << 16), bit_cast<Floats>(words & 0xffff0000u)};
  }
};
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
template <>
struct Widened<half> {
  // The machine's own conversion is exact for every value, whatever it does with denormal floats.
  static constexpr bool exists = true, every_value = true, interleaved = false;
  static constexpr float query_scale = 1.0f, logit_scale = 1.0f;
  static Pair pair(const half* k, Words&) noexcept { return {widened(k), widened(k + width)}; }

 private:
  static Floats widened(const half* k) noexcept {
    typedef short Shorts __attribute__((vector_size(2 * width)));
#if defined(__AVX512F__)
    constexpr int current_rounding = 4;
#if defined(__clang__)
    constexpr unsigned short every_lane = 0xffff;
#else
    constexpr short every_lane = -1;
#endif
    return __builtin_ia32_vcvtph2ps512_mask(load<Shorts>(k), Floats{}, every_lane, current_rounding);
#else
    return __builtin_ia32_vcvtph2ps256(load<Shorts>(k));
#endif
  }
};
#else
template <>
struct Widened<half> {
  // The bits, moved to where a float has them, are the value times 2^-112, exactly, denormals included;
  // query and logit take the factor back in two exact steps that keep clear of overflow.
  static constexpr bool exists = true, every_value = false, interleaved = true;
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
#endif

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

// ---- sums across vectors ------------------------------------------------------------------------

// Lane of a, or of b counted on from a's, that fold() adds from.
template <std::size_t Block>
constexpr std::uint32_t lane_to_fold(std::size_t lane, std::size_t odd) noexcept {
  // Small blocks stay within their quarter of four lanes: such shuffles are the cheap ones.
  constexpr std::size_t span = Block >= 4 ? width : 4;
  const std::size_t from_b = lane % span / (span / 2), block = lane % (span / 2) / Block * 2 + odd;
  return static_cast<std::uint32_t>(from_b * width + lane / span * span + block * Block + lane % Block);
}
// Neighbouring blocks of lanes added up: first those of a, then those of b.
template <std::size_t Block, std::size_t... lane>
inline Floats fold(Floats a, Floats b, std::index_sequence<lane...>) noexcept {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lane_to_fold<Block>(lane, 0)...) +
         __builtin_shufflevector(a, b, lane_to_fold<Block>(lane, 1)...);
#else
  return __builtin_shuffle(a, b, Words{lane_to_fold<Block>(lane, 0)...}) +
         __builtin_shuffle(a, b, Words{lane_to_fold<Block>(lane, 1)...});
#endif
}
template <std::size_t Block>
inline Floats fold(Floats a, Floats b) noexcept {
  return fold<Block>(a, b, std::make_index_sequence<width>());
}
// Lane i of the result: the sum of all lanes of v[i]. v: [width]
inline Floats sums_of(const Floats* v) noexcept {
  Floats quads[4];
  FASTV_UNROLL
  for (std::size_t i = 0; i < 4; ++i) {
    if constexpr (width == 16)
      quads[i] = fold<4>(fold<8>(v[i], v[4 + i]), fold<8>(v[8 + i], v[12 + i]));
    else if constexpr (width == 8)
      quads[i] = fold<4>(v[i], v[4 + i]);
    else
      quads[i] = v[i];
  }
  return fold<1>(fold<2>(quads[0], quads[1]), fold<2>(quads[2], quads[3]));
}

// ---- tiles --------------------------------------------------------------------------------------
// A tile is 8 keys by 2 query heads: 16 sums, of which as many as the machine has registers for grow at a time. A key
// is widened once for both heads if they share it. The 8 keys lie an eighth of the stretch apart, so that walking the
// tiles reads 8 streams: one core reads so half again as fast as from one.

inline constexpr std::size_t streams = 8;

template <class K>
struct Tile {
  const K *first, *second;  // the first key of either head
  std::ptrdiff_t apart;     // elements from one key to the next
  const K* key(std::size_t n) const noexcept { return first + static_cast<std::ptrdiff_t>(n) * apart; }
};

// out[h * streams + n] = partial sums of q_h . k_n. q: [Heads, padded(dim)] from arrange(); k_n: key + n * apart; next:
// as key, for a tile to come, asked for on the way; may be null. Returns what pair() marked as special.
template <std::size_t Heads, std::size_t Keys, class K>
inline Words partial_sums(const float* q, const K* key, std::ptrdiff_t apart, const K* next, std::ptrdiff_t next_apart,
                          std::size_t dim, Floats* out) noexcept {
  constexpr std::size_t line = 64;
  const auto at = [](const K* from, std::size_t n, std::ptrdiff_t stride) {
    return from + static_cast<std::ptrdiff_t>(n) * stride;
  };
  Floats sums[Heads][Keys] = {};
  Words special{};
  const auto step = [&](std::size_t i, auto key_at) __attribute__((always_inline)) {
    FASTV_UNROLL
    for (std::size_t n = 0; n < Keys; ++n) {
      const Pair k = Widened<K>::pair(key_at(n), special);
      FASTV_UNROLL
      for (std::size_t h = 0; h < Heads; ++h) {
        sums[h][n] += load<Floats>(q + h * padded(dim) + i) * k.first;
        sums[h][n] += load<Floats>(q + h * padded(dim) + i + width) * k.second;
      }
    }
  };
  std::size_t i = 0;
  for (; i + 2 * width <= dim; i += 2 * width) {
    if (next != nullptr && i * sizeof(K) % line == 0) {  // spread over the steps, not in one burst
      FASTV_UNROLL
      for (std::size_t n = 0; n < Keys; ++n) prefetch(at(next, n, next_apart) + i, 2 * width * sizeof(K));
    }
    step(
        i, [&](std::size_t n) __attribute__((always_inline)) { return at(key, n, apart) + i; });
  }
  if (i < dim) {  // the last, shorter step: with zeros behind it
    K rest[Keys][2 * width] = {};
    for (std::size_t n = 0; n < Keys; ++n) std::memcpy(rest[n], at(key, n, apart) + i, (dim - i) * sizeof(K));
    step(
        i, [&](std::size_t n) __attribute__((always_inline)) { return rest[n]; });
  }
  FASTV_UNROLL
  for (std::size_t h = 0; h < Heads; ++h) {
    FASTV_UNROLL
    for (std::size_t n = 0; n < Keys; ++n) out[h * streams + n] = sums[h][n];
  }
  return special;
}

// Products of every head's query with `count` keys that lie in one piece from `data` on (head 0), into
// logits[head][first ..], or false where there are too few keys or one holds a value that needs the exact way. query:
// [heads, padded(dim)] from arrange(). Tiles are walked in the order of memory.
template <class K>
bool fast_products(const HeadVectors<K>& keys, const K* data, std::size_t first, std::size_t count, std::size_t group,
                   const float* query, float* logits, std::size_t logits_stride) noexcept {
  constexpr std::size_t bytes_ahead = 4096, room = 4096;
  // Heads are paired within a group, or, in groups of one, across KV heads.
  const std::size_t paired = group == 1 && keys.heads > 1 ? 2 : 1, columns = (keys.heads + paired - 1) / paired;
  const bool tokens_outer = keys.head_stride <= keys.token_stride && keys.heads * group * streams <= room;
  const std::size_t heads_held = tokens_outer ? keys.heads * group : paired * group;
  if (count < streams || heads_held * streams > room) return false;
  // Along the tokens: `part` tiles, and one of the last 8 keys. So pieces of 2,048 keys are cut into odd parts, whose
  // streams do not meet in the same sets of the caches.
  const std::size_t dim = keys.dim, part = (count - 1) / streams, rows = part + 1;
  const std::size_t outer = tokens_outer ? rows : columns, inner = tokens_outer ? columns : rows;

  const auto first_token = [&](std::size_t row) { return row < part ? row : count - streams; };
  const auto tokens_apart = [&](std::size_t row) { return row < part ? part : 1; };
  const auto first_head = [&](std::size_t column) {  // the last pair overlaps the one before where heads are odd
    return (column + 1) * paired <= keys.heads ? column * paired : keys.heads - paired;
  };
  const auto tile_at = [&](std::size_t row, std::size_t column) {
    const K* key = data + static_cast<std::ptrdiff_t>(first_token(row)) * keys.token_stride +
                   static_cast<std::ptrdiff_t>(first_head(column)) * keys.head_stride;
    return Tile<K>{key, paired == 2 ? key + keys.head_stride : key,
                   static_cast<std::ptrdiff_t>(tokens_apart(row)) * keys.token_stride};
  };

  // Products wait here, [rows, heads held, streams], until several go to each row of logits together: the lines of all
  // heads' logits do not stay in the first-level cache while keys stream through it.
  float held[room + streams];
  const std::size_t fitting = room / (heads_held * streams), rows_held = fitting < 32 ? fitting : 32;
  const auto deliver = [&](std::size_t row, std::size_t count_of_rows, std::size_t head) {
    const std::size_t apart = tokens_apart(row);
    for (std::size_t h = 0; h < heads_held; ++h) {
      float* to = logits + (head + h) * logits_stride + first + first_token(row);
      for (std::size_t r = 0; r < count_of_rows; ++r) {
        const float* from = held + (r * heads_held + h) * streams;
        FASTV_UNROLL
        for (std::size_t n = 0; n < streams; ++n) to[r + n * apart] = from[n];
      }
      for (std::size_t n = 0; n < streams; ++n)  // where the next rows will go
        prefetch(to + n * apart + count_of_rows, count_of_rows * sizeof(float));
    }
  };

  Words special{};
  const auto two_heads = [&](auto shared, const float* q, const float* other_q, const Tile<K>& tile,
                             const Tile<K>& next, float* products) __attribute__((always_inline)) {
    Floats sums[2 * streams];
    if constexpr (decltype(shared)::value) {
      constexpr std::size_t at_once = width == 16 ? 8 : 4;
      for (std::size_t n = 0; n < streams; n += at_once)
        special |= partial_sums<2, at_once>(q, tile.key(n), tile.apart, next.first == nullptr ? nullptr : next.key(n),
                                            next.apart, dim, sums + n);
    } else {
      special |= partial_sums<1, streams>(q, tile.first, tile.apart, next.first, next.apart, dim, sums);
      special |=
          partial_sums<1, streams>(other_q, tile.second, tile.apart, next.second, next.apart, dim, sums + streams);
    }
    FASTV_UNROLL
    for (std::size_t i = 0; i < 2 * streams; i += width) {
      const Floats whole = sums_of(sums + i) * Widened<K>::logit_scale;
      std::memcpy(products + i, &whole, sizeof(whole));
    }
  };

  const auto whole_tile = [&](const Tile<K>& tile, const Tile<K>& next, std::size_t head, float* products) {
    const float* q = query + head * padded(dim);
    if (group == 1) return two_heads(std::false_type(), q, paired == 2 ? q + padded(dim) : q, tile, next, products);
    for (std::size_t done = 0; done < group; done += 2) {  // the last pair of an odd group overlaps the one before
      const std::size_t h = done + 2 <= group ? done : group - 2;
      two_heads(std::true_type(), q + h * padded(dim), nullptr, tile, done == 0 ? next : Tile<K>{},
                products + h * streams);
    }
  };

  struct Place {
    std::size_t outer = 0, inner = 0;
  } coming;
  const auto advance = [&](Place& place) {
    if (++place.inner == inner) place = {place.outer + 1, 0};
  };
  const std::size_t tile_bytes = dim * sizeof(K) * paired;
  for (std::size_t i = 0; i <= bytes_ahead / tile_bytes && coming.outer < outer; ++i) advance(coming);
  const auto row_of = [&](const Place& place) { return tokens_outer ? place.outer : place.inner; };
  const auto column_of = [&](const Place& place) { return tokens_outer ? place.inner : place.outer; };

  std::size_t waiting = 0;
  for (Place place; place.outer < outer; advance(place)) {
    const std::size_t row = row_of(place), head = first_head(column_of(place)) * group;
    const Tile<K> next = coming.outer < outer ? tile_at(row_of(coming), column_of(coming)) : Tile<K>{};
    if (coming.outer < outer) advance(coming);
    whole_tile(tile_at(row, column_of(place)), next, head,
               held + (waiting * heads_held + (tokens_outer ? head : 0)) * streams);
    if (tokens_outer && place.inner + 1 < inner) continue;
    ++waiting;
    if (waiting == rows_held || row + 1 >= part) {
      deliver(row + 1 - waiting, waiting, tokens_outer ? 0 : head);
      waiting = 0;
    }
  }
  std::uint32_t any = 0;
  for (std::size_t lane = 0; lane < width; ++lane) any |= special[lane];
  return Widened<K>::every_value || (any & 0x80008000u) == 0;
}
#endif

// ---- any keys -----------------------------------------------------------------------------------

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
#if FASTV_VECTORS
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
#if FASTV_VECTORS
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

}  // namespace FASTV_KIND
}  // namespace detail
}  // namespace fastv

#undef FASTV_VECTORS
#undef FASTV_KIND
#undef FASTV_UNROLL

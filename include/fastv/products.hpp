// fastv: q.k for one query row and a stretch of keys, at the speed at which the keys can be read.
#pragma once

#include <utility>

#include "kernel.hpp"

// Vectors of up to 8 floats, by the vector types of GCC and clang, which need no header and, unlike loops, become the
// same code at -O2 and -O3 and with both compilers. Not 16, since memory is the limit and an AMD Zen 4 widens half
// precision faster by eights than by sixteens. Each kind of machine has a namespace of its own, so that translation
// units built for different ones may meet in one program. None on 32-bit x86 without SSE2, where vectors have no
// registers and g++ warns of their calling convention.
#if !defined(__GNUC__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || (defined(__i386__) && !defined(__SSE2__))
#define FASTV_VECTORS 0
#define FASTV_KIND any_machine
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
#if defined(__AVX2__) && defined(__F16C__)
template <>
struct Widened<half> {
  // The machine's own conversion is exact for every value, whatever it does with denormal floats.
  static constexpr bool exists = true, every_value = true, interleaved = false;
  static constexpr float query_scale = 1.0f, logit_scale = 1.0f;
  static Pair pair(const half* k, Words&) noexcept { return {widened(k), widened(k + width)}; }

 private:
  static Floats widened(const half* k) noexcept {
    typedef short Shorts __attribute__((vector_size(2 * width)));
    return __builtin_ia32_vcvtph2ps256(load<Shorts>(k));
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

// One query row in the order of Widened<K>::pair(), with zeros behind it. q: [dim]; query: [padded(dim)]
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

// ---- tiles --------------------------------------------------------------------------------------
// A tile is 8 keys of one KV head by the query heads that share it. The keys lie an eighth of the stretch apart, so
// that walking the tiles reads 8 streams: one core reads faster from 4 or 8 places at once than from one, and much
// slower from 16.

inline constexpr std::size_t streams = 8;

template <class K>
struct Tile {
  const K* first;
  std::ptrdiff_t apart;  // elements from one key to the next
  const K* key(std::size_t n) const noexcept { return first + static_cast<std::ptrdiff_t>(n) * apart; }
};

// out[h * streams + n] = q_h . k_n for Keys keys of a tile from key `begin` on. q: [Heads, padded(dim)] from arrange();
// ahead: elements to a tile to come, whose keys are asked for on the way. Returns what pair() marked as special. Eight
// sums grow at a time: with the factors, that is what 16 registers hold.
template <std::size_t Heads, std::size_t Keys, class K>
inline Words products_of(const float* q, const Tile<K>& tile, std::ptrdiff_t ahead, std::size_t begin, std::size_t dim,
                         float* out) noexcept {
  constexpr std::size_t step_elements = 2 * width, line_elements = 64 / sizeof(K);
  Floats sums[Heads * Keys] = {};
  Words special{};
  const auto step = [&](std::size_t i, auto key_at) __attribute__((always_inline)) {
    FASTV_UNROLL
    for (std::size_t n = 0; n < Keys; ++n) {
      const Pair k = Widened<K>::pair(key_at(n), special);
      FASTV_UNROLL
      for (std::size_t h = 0; h < Heads; ++h) {
        sums[h * Keys + n] += load<Floats>(q + h * padded(dim) + i) * k.first;
        sums[h * Keys + n] += load<Floats>(q + h * padded(dim) + i + width) * k.second;
      }
    }
  };
  const auto step_at = [&](std::size_t i) __attribute__((always_inline)) {
    step(
        i, [&](std::size_t n) __attribute__((always_inline)) { return tile.key(begin + n) + i; });
  };
  std::size_t i = 0;
  for (; i + step_elements <= dim; i += step_elements) {
    if (i % line_elements == 0) {
      FASTV_UNROLL
      for (std::size_t n = 0; n < Keys; ++n) prefetch(tile.key(begin + n) + ahead + i);
    }
    step_at(i);
  }
  if (i < dim) {  // the last, shorter step: with zeros behind it
    K rest[Keys][step_elements] = {};
    for (std::size_t n = 0; n < Keys; ++n) std::memcpy(rest[n], tile.key(begin + n) + i, (dim - i) * sizeof(K));
    step(
        i, [&](std::size_t n) __attribute__((always_inline)) { return rest[n]; });
  }
  constexpr std::size_t run = Keys < width ? Keys : width;  // products that lie side by side
  FASTV_UNROLL
  for (std::size_t whole = 0; whole < Heads * Keys; whole += width) {
    const Floats products = sums_of(sums + whole) * Widened<K>::logit_scale;
    float lane[width];
    std::memcpy(lane, &products, sizeof(products));
    FASTV_UNROLL
    for (std::size_t j = 0; j < width; j += run)
      std::memcpy(out + (whole + j) / Keys * streams + begin + (whole + j) % Keys, lane + j, run * sizeof(float));
  }
  return special;
}

// Products of every head's query with `count` keys that lie in one piece from `data` on (head 0), into
// logits[head][first ..], or false where there are too few keys or one holds a value that needs the exact way. query:
// [heads, padded(dim)] from arrange(). Tiles are walked in the order of memory.
template <class K>
bool fast_products(const HeadVectors<K>& keys, const K* data, std::size_t first, std::size_t count, std::size_t group,
                   const float* query, float* logits, std::size_t logits_stride) noexcept {
  // Of each stream. Further ahead (768 bytes on an AMD Zen 3) the requests slow down by a fifth: the processor takes
  // them for streams of their own then, 16 in all.
  constexpr std::size_t bytes_ahead = 256;
  constexpr std::size_t room = 4096;  // floats
  const bool tokens_outer =
      keys.heads > 1 && keys.head_stride <= keys.token_stride && keys.heads * group * streams <= room;
  const std::size_t heads_held = tokens_outer ? keys.heads * group : group;
  if (count < streams || heads_held * streams > room) return false;
  // Along the tokens: `part` tiles, and one of the last 8 keys. So pieces of 2,048 keys are cut into odd parts, whose
  // streams do not meet in the same sets of the caches.
  const std::size_t dim = keys.dim, part = (count - 1) / streams, rows = part + 1;
  const std::size_t outer = tokens_outer ? rows : keys.heads, inner = tokens_outer ? keys.heads : rows;
  const std::ptrdiff_t outer_stride = tokens_outer ? keys.token_stride : keys.head_stride;
  const std::ptrdiff_t inner_stride = tokens_outer ? keys.head_stride : keys.token_stride;
  const auto first_token = [&](std::size_t row) { return row < part ? row : count - streams; };
  const auto tokens_apart = [&](std::size_t row) { return row < part ? part : 1; };

  // From a tile to the one asked for meanwhile: in the same walk along `inner`, or in the next. Those of the last keys
  // ask for nothing, nor does anything ask for them.
  const std::size_t line = tokens_outer ? keys.heads : part;
  const std::size_t wanted = (bytes_ahead - 1) / (dim * sizeof(K)) + 1;
  const std::size_t tiles_ahead = line > wanted ? wanted : line > 0 ? line - 1 : 0;
  const std::ptrdiff_t to_same = static_cast<std::ptrdiff_t>(tiles_ahead) * inner_stride;
  const std::ptrdiff_t to_next = outer_stride + to_same - static_cast<std::ptrdiff_t>(line) * inner_stride;

  // Products wait here, [rows, heads held, streams], until several go to each row of logits together: the lines of all
  // heads' logits do not stay in the first-level cache while keys stream through it.
  float held[room];
  const std::size_t fitting = room / (heads_held * streams), rows_held = fitting < streams ? fitting : streams;
  const auto deliver = [&](std::size_t row, std::size_t count_of_rows, std::size_t head) {
    const std::size_t apart = tokens_apart(row);
    for (std::size_t h = 0; h < heads_held; ++h) {
      float* to = logits + (head + h) * logits_stride + first + first_token(row);
      const float* from = held + h * streams;
      std::size_t r = 0;
      for (; r + width <= count_of_rows; r += width)
        for (std::size_t n = 0; n < streams; n += width) {
          Floats block[width];
          FASTV_UNROLL
          for (std::size_t i = 0; i < width; ++i) block[i] = load<Floats>(from + (r + i) * heads_held * streams + n);
          transpose(block);
          FASTV_UNROLL
          for (std::size_t i = 0; i < width; ++i) std::memcpy(to + (n + i) * apart + r, &block[i], sizeof(block[i]));
        }
      for (; r < count_of_rows; ++r)
        for (std::size_t n = 0; n < streams; ++n) to[r + n * apart] = from[r * heads_held * streams + n];
    }
  };

  Words special{};
  // The query heads of a tile, `Heads` at a time; the last of them overlap those before where they do not divide.
  const auto whole_tile = [&](auto at_once, const float* q, const Tile<K>& tile, std::ptrdiff_t ahead,
                              float* products) {
    constexpr std::size_t Heads = decltype(at_once)::value, Keys = streams / Heads;
    for (std::size_t done = 0; done < group; done += Heads) {
      const std::size_t h = done + Heads <= group ? done : group - Heads;
      for (std::size_t n = 0; n < streams; n += Keys)
        special |= products_of<Heads, Keys>(q + h * padded(dim), tile, ahead, n, dim, products + h * streams);
    }
  };
  using std::integral_constant;
  std::size_t waiting = 0;
  const auto walk = [&](std::size_t o, std::size_t i) {
    const std::size_t row = tokens_outer ? o : i, kv_head = tokens_outer ? i : o, head = kv_head * group;
    const float* q = query + head * padded(dim);
    const Tile<K> tile{data + static_cast<std::ptrdiff_t>(first_token(row)) * keys.token_stride +
                           static_cast<std::ptrdiff_t>(kv_head) * keys.head_stride,
                       static_cast<std::ptrdiff_t>(tokens_apart(row)) * keys.token_stride};
    std::ptrdiff_t ahead = 0;
    if (row < part && i + tiles_ahead < line)
      ahead = to_same;
    else if (row < part && o + 1 < (tokens_outer ? part : keys.heads))
      ahead = to_next;
    float* products = held + (waiting * heads_held + (tokens_outer ? head : 0)) * streams;
    if (group == 1)
      whole_tile(integral_constant<std::size_t, 1>(), q, tile, ahead, products);
    else if (group % 4 == 0)
      whole_tile(integral_constant<std::size_t, 4>(), q, tile, ahead, products);
    else
      whole_tile(integral_constant<std::size_t, 2>(), q, tile, ahead, products);
    if (tokens_outer && i + 1 < inner) return;
    ++waiting;
    if (waiting == rows_held || row + 1 >= part) {
      deliver(row + 1 - waiting, waiting, tokens_outer ? 0 : head);
      waiting = 0;
    }
  };
  for (std::size_t o = 0; o < outer; ++o)
    for (std::size_t i = 0; i < inner; ++i) walk(o, i);
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
    float* plain = query + head * dim;
    const std::size_t whole = dim / lanes * lanes;
    for (std::size_t i = 0; i < whole; i += lanes)  // of constant size, which compilers vectorise at -O2 as well
      for (std::size_t lane = 0; lane < lanes; ++lane)
        plain[i + lane] = static_cast<float>(to_float(q[i + lane])) * evidence.scale;
    for (std::size_t i = whole; i < dim; ++i) plain[i] = static_cast<float>(to_float(q[i])) * evidence.scale;
#if FASTV_VECTORS
    if constexpr (Widened<K>::exists) arrange<K>(plain, dim, query + evidence.heads * dim + head * padded(dim));
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

// fastv: q.k for one query row and a stretch of keys, at the speed at which the keys can be read.
//
// Every layout of a cache is read by one walk over tiles of 8 keys (tiles.hpp).
#pragma once

#include "softmax.hpp"
#include "tiles.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
inline namespace FASTV_KIND {

#if FASTV_VECTORS
// out[h * streams + n] = q_h . k_n for Keys keys of a tile from key `begin` on. q: [Heads, padded(dim)] from arrange();
// ahead: elements to a later tile, whose keys are prefetched on the way. Returns what pair() marked as special. Eight sums
// grow at a time: with the factors, that is what 16 registers hold.
template <class K, std::size_t Heads, std::size_t Keys, class Tile>
inline Words products_of(const float* q, const Tile& tile, std::ptrdiff_t ahead, std::size_t begin, std::size_t dim,
                         float* out) noexcept {
  constexpr std::size_t step_elements = 2 * width;
  Floats sums[Heads * Keys] = {};
  Words special{};
  const auto step = [&](std::size_t i, auto elements_of) __attribute__((always_inline)) {
    FASTV_UNROLL
    for (std::size_t n = 0; n < Keys; ++n) {
      const Pair k = Widened<K>::pair(elements_of(n), special);
      FASTV_UNROLL
      for (std::size_t h = 0; h < Heads; ++h) {
        sums[h * Keys + n] += load<Floats>(q + h * padded(dim) + i) * k.first;
        sums[h * Keys + n] += load<Floats>(q + h * padded(dim) + i + width) * k.second;
      }
    }
  };
  const auto step_at = [&](std::size_t i) __attribute__((always_inline)) {
    step(
        i, [&](std::size_t n) __attribute__((always_inline)) { return tile.at(begin + n, i); });
  };
  std::size_t i = 0;
  for (; i + step_elements <= dim; i += step_elements) {
    tile.template ask_ahead<Keys>(begin, i, ahead);
    step_at(i);
  }
  if (i < dim) {  // the last, shorter step: with zeros behind it
    K rest[Keys][step_elements] = {};
    for (std::size_t n = 0; n < Keys; ++n) tile.copy(begin + n, i, dim - i, rest[n]);
    step(
        i, [&](std::size_t n) __attribute__((always_inline)) { return InPlace<K>{rest[n]}; });
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

// Products of every head's query with the `count` keys of a source, into logits[head][0 ..], or false where there are too
// few keys or one holds a value that needs the exact way. query: [heads, padded(dim)] from arrange(). Tiles are walked in
// the order of memory.
template <class Source>
bool tiled_products(Source source, std::size_t kv_heads, std::size_t dim, std::size_t count, std::size_t group,
                    const float* query, float* logits, std::size_t logits_stride) noexcept {
  using K = typename Source::Element;
  // Of each stream. Further ahead (768 bytes on an AMD Zen 3) the requests slow down by a fifth: the processor takes
  // them for streams of their own then, 16 in all.
  constexpr std::size_t bytes_ahead = 256;
  constexpr std::size_t room = 4096;  // floats
  const bool tokens_outer = kv_heads > 1 && source.tokens_outer() && kv_heads * group * streams <= room;
  const std::size_t heads_held = tokens_outer ? kv_heads * group : group;
  if (count < streams || heads_held * streams > room) return false;
  // Along the tokens: `part` tiles, and one of the last 8 keys. So pieces of 2,048 keys are cut into odd parts, whose
  // streams do not meet in the same sets of the caches.
  const std::size_t part = (count - 1) / streams, rows = part + 1;
  const std::size_t outer = tokens_outer ? rows : kv_heads, inner = tokens_outer ? kv_heads : rows;
  const std::ptrdiff_t outer_stride = tokens_outer ? source.token_step() : source.head_step();
  const std::ptrdiff_t inner_stride = tokens_outer ? source.head_step() : source.token_step();
  const auto first_token = [&](std::size_t row) {
    return row == part ? count - streams : Source::adjacent ? row * streams : row;
  };
  const auto tokens_apart = [&](std::size_t row) { return row == part || Source::adjacent ? 1 : part; };

  // From a tile to the one prefetched meanwhile: in the same walk along `inner`, or in the next. Those of the last keys
  // prefetch nothing, nor are they prefetched.
  const std::size_t line = tokens_outer ? kv_heads : part;
  const std::size_t needed = (bytes_ahead - 1) / (dim * sizeof(K)) + 1;
  const std::size_t tiles_ahead = line > needed ? needed : line > 0 ? line - 1 : 0;
  const std::ptrdiff_t to_same = static_cast<std::ptrdiff_t>(tiles_ahead) * inner_stride;
  const std::ptrdiff_t to_next =
      Source::steady ? outer_stride + to_same - static_cast<std::ptrdiff_t>(line) * inner_stride : 0;

  // Products wait here, [rows, heads held, streams], until several go to each row of logits together: the lines of all
  // heads' logits do not stay in the first-level cache while keys stream through it.
  float held[room];
  const std::size_t fitting = room / (heads_held * streams), rows_held = fitting < streams ? fitting : streams;
  const auto deliver = [&](std::size_t row, std::size_t count_of_rows, std::size_t head) {
    const std::size_t apart = tokens_apart(row);
    for (std::size_t h = 0; h < heads_held; ++h) {
      float* to = logits + (head + h) * logits_stride;
      const float* from = held + h * streams;
      std::size_t r = 0;
      if constexpr (Source::adjacent) {
        for (; r < count_of_rows; ++r)
          std::memcpy(to + first_token(row + r), from + r * heads_held * streams, streams * sizeof(float));
        continue;
      }
      to += first_token(row);
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
  const auto whole_tile = [&](auto at_once, const float* q, const auto& tile, std::ptrdiff_t ahead, float* products) {
    constexpr std::size_t Heads = decltype(at_once)::value, Keys = streams / Heads;
    for (std::size_t done = 0; done < group; done += Heads) {
      const std::size_t h = done + Heads <= group ? done : group - Heads;
      for (std::size_t n = 0; n < streams; n += Keys)
        special |= products_of<K, Heads, Keys>(q + h * padded(dim), tile, ahead, n, dim, products + h * streams);
    }
  };
  using std::integral_constant;
  // slot: of held, among the rows.
  const auto walk = [&](std::size_t o, std::size_t i, std::size_t slot) {
    const std::size_t row = tokens_outer ? o : i, kv_head = tokens_outer ? i : o, head = kv_head * group;
    const float* q = query + head * padded(dim);
    const auto tile = source.tile(kv_head, first_token(row), tokens_apart(row));
    std::ptrdiff_t ahead = 0;
    if (row < part && i + tiles_ahead < line)
      ahead = to_same;
    else if (row < part && o + 1 < (tokens_outer ? part : kv_heads))
      ahead = to_next;
    float* products = held + (slot * heads_held + (tokens_outer ? head : 0)) * streams;
    if (group == 1)
      whole_tile(integral_constant<std::size_t, 1>(), q, tile, ahead, products);
    else if (group % 4 == 0)
      whole_tile(integral_constant<std::size_t, 4>(), q, tile, ahead, products);
    else
      whole_tile(integral_constant<std::size_t, 2>(), q, tile, ahead, products);
  };
  std::size_t waiting = 0;  // rows held
  std::size_t tiles_together = 1;
  if constexpr (Source::adjacent) tiles_together = source.tiles_together(rows_held);
  const auto hand_over = [&](std::size_t end, std::size_t head) {
    deliver(end - waiting, waiting, head);
    waiting = 0;
  };
  for (std::size_t o = 0, together = 1; o < outer; o += together) {
    together = 1;
    if constexpr (Source::adjacent) {  // of tiles that lie together, those of one head come first
      if (tokens_outer && o < part) together = part - o < tiles_together ? part - o : tiles_together;
    }
    for (std::size_t i = 0; i < inner; ++i) {
      const std::size_t row = tokens_outer ? o : i;
      const bool full = waiting + together > rows_held || (!Source::adjacent && row == part);
      if (full && (!tokens_outer || i == 0)) hand_over(row, tokens_outer ? 0 : o * group);
      for (std::size_t t = 0; t < together; ++t) walk(o + t, i, waiting + t);
      if (!tokens_outer) ++waiting;
    }
    if (tokens_outer)
      waiting += together;
    else
      hand_over(rows, o * group);
  }
  if (tokens_outer) hand_over(rows, 0);
  std::uint32_t any = 0;
  for (std::size_t lane = 0; lane < width; ++lane) any |= special[lane];
  return Widened<K>::every_value || (any & 0x80008000u) == 0;
}

// Does this thread flush denormal floats to zero? A product of two volatile numbers tells, whatever the compiler assumes.
inline bool flushes_denormals() noexcept {
  volatile float least = 1.17549435e-38f, half_of_it = 0.5f;
  const float denormal = least * half_of_it;
  volatile float read_back = denormal;
  const float grown = read_back * 16777216.0f;
  return is_zero(grown);
}

#endif

// The elements of keys that have an address.
template <class Keys>
struct ElementOf {
  using type = float;
};
template <class T>
struct ElementOf<Heads<T>> {
  using type = T;
};
// Whether tiles are read where the keys lie, and whether the query must be arranged for that.
#if FASTV_VECTORS
template <class Keys>
inline constexpr bool tiles_in_place = false;
template <class T>
inline constexpr bool tiles_in_place<Heads<T>> = Widened<T>::exists;
template <class Keys>
inline constexpr bool arranged = tiles_in_place<Keys> && !is_same<typename ElementOf<Keys>::type, float>;
#else
template <class Keys>
inline constexpr bool arranged = false;
#endif

// ---- any keys -----------------------------------------------------------------------------------

// q.k over dim elements: any value, any compiler. The slow counterpart of tiled_products().
inline float dot(const float* q, const float* k, std::size_t dim) noexcept {
  float sums[lanes] = {};
  std::size_t i = 0;
  for (; i + lanes <= dim; i += lanes)
    for (std::size_t lane = 0; lane < lanes; ++lane) sums[lane] += q[i + lane] * k[i + lane];
  for (std::size_t lane = 0; lane < lanes && i < dim; ++i, ++lane) sums[lane] += q[i] * k[i];
  for (std::size_t few = lanes / 2; few > 0; few /= 2)
    for (std::size_t lane = 0; lane < few; ++lane) sums[lane] += sums[lane + few];
  return sums[0];
}

// Floats that load_query() fills: the query of every head, times scale, as floats and as tiles of the keys want it.
template <class Keys>
constexpr std::size_t query_floats(std::size_t heads, std::size_t dim) noexcept {
  return heads * padded(dim) * (arranged<Keys> ? 2 : 1);
}
// Floats of one piece's tile.
constexpr std::size_t tile_floats(std::size_t dim) noexcept { return streams * padded(dim); }

// Query row `row` -> query, times scale. query: [query_floats()].
template <class Keys, class Q>
void load_query(const Heads<Q>& from, std::size_t row, float scale, float* query) noexcept {
  const std::size_t dim = from.dim, room = padded(dim);
  const Q* token = token_at(from, row);
  for (std::size_t head = 0; head < from.heads; ++head) {
    const Q* q = token + static_cast<std::ptrdiff_t>(head) * from.head_stride;
    float* plain = query + head * room;
    if (from.pages.chunk != 0) {
      widen(from, q, plain);
      for (std::size_t i = 0; i < dim; ++i) plain[i] *= scale;
    } else {
      const std::size_t whole = dim / lanes * lanes;
      for (std::size_t i = 0; i < whole; i += lanes)  // of constant size, which compilers vectorise at -O2 as well
        for (std::size_t lane = 0; lane < lanes; ++lane)
          plain[i + lane] = static_cast<float>(to_float(q[i + lane])) * scale;
      for (std::size_t i = whole; i < dim; ++i) plain[i] = static_cast<float>(to_float(q[i])) * scale;
    }
    for (std::size_t i = dim; i < room; ++i) plain[i] = 0;
#if FASTV_VECTORS
    if constexpr (arranged<Keys>)
      arrange<typename ElementOf<Keys>::type>(plain, dim, query + (from.heads + head) * room);
#endif
  }
}

#if FASTV_VECTORS
// Tiles of the keys where they lie; false where that way does not serve.
template <class K>
bool products_in_place(const Heads<K>& keys, std::size_t begin, std::size_t count, std::size_t group,
                       const float* query, float* logits, std::size_t stride, float* tile) noexcept {
  if constexpr (!Widened<K>::keeps_denormals) {
    if (flushes_denormals()) return false;
  }
  const std::size_t heads = keys.heads, dim = keys.dim;
  if (keys.pages.chunk != 0 && keys.pages.chunk != InChunks<K>::chunk) return false;
  if (keys.pages.chunk != 0)
    return tiled_products(ChunkSource<K>{keys, begin, reinterpret_cast<K*>(tile)}, heads, dim, count, group, query,
                          logits, stride);
  if (keys.pages.paged())
    return tiled_products(PageSource<K>{keys, begin}, heads, dim, count, group, query, logits, stride);
  return tiled_products(PieceSource<K>{keys, begin}, heads, dim, count, group, query, logits, stride);
}
#endif

// logits[h * stride + j - begin] = scale * q_h . k_j for keys j in [begin, end). query: from load_query(); tile:
// [tile_floats()] of scratch.
template <class Keys>
void product_with_keys(const Keys& keys, std::size_t heads, std::size_t begin, std::size_t end, const float* query,
                       float* logits, std::size_t stride, float* tile) noexcept {
  const std::size_t dim = keys.dim, group = heads / keys.heads, count = end - begin;
#if FASTV_VECTORS
  if constexpr (tiles_in_place<Keys>) {
    const float* own = query + (arranged<Keys> ? heads * padded(dim) : 0);
    if (products_in_place(keys, begin, count, group, own, logits, stride, tile)) return;
  }
  if (tiled_products(FloatSource<Keys>{keys, begin, tile}, keys.heads, dim, count, group, query, logits, stride))
    return;
#endif
  for (std::size_t kv_head = 0; kv_head < keys.heads; ++kv_head)
    for (std::size_t i = 0; i < count; ++i) {
      load_vector(keys, kv_head, begin + i, tile);
      for (std::size_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
        logits[head * stride + i] = dot(query + head * padded(dim), tile, dim);
    }
}

}  // namespace FASTV_KIND
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

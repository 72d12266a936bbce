// fastv: keys in tiles of 8, as views of where they lie: in one piece, in pages or in chunks of 16 bytes. Keys of types that
// have no fast conversion are copied into a tile first.
#pragma once

#include "lanes.hpp"
#include "prefetch.hpp"
#include "walk.hpp"

#include "begin.hpp"

#if FASTV_VECTORS
namespace fastv {
namespace detail {
inline namespace FASTV_KIND {

// ---- tiles: 8 keys of one KV head ----------------------------------------------------------------

// at(n, i): elements i .. of key n. copy(): the last ones. ask_ahead(): prefetches what lies `ahead` elements behind
// elements i .. of Keys keys from `begin` on, a step of products_of() at a time.
template <class K, class Tile>
struct PlainTile {
  const K* key(std::size_t n) const noexcept { return static_cast<const Tile*>(this)->key(n); }
  InPlace<K> at(std::size_t n, std::size_t i) const noexcept { return {key(n) + i}; }
  void copy(std::size_t n, std::size_t i, std::size_t count, K* to) const noexcept {
    std::memcpy(to, key(n) + i, count * sizeof(K));
  }
  template <std::size_t Keys>
  FASTV_INLINE void ask_ahead(std::size_t begin, std::size_t i, std::ptrdiff_t ahead) const noexcept {
    if (i % (64 / sizeof(K)) != 0) return;
    FASTV_UNROLL
    for (std::size_t n = 0; n < Keys; ++n) prefetch(key(begin + n) + ahead + i);
  }
};
template <class K>
struct EvenTile : PlainTile<K, EvenTile<K>> {
  const K* first;
  std::ptrdiff_t apart;  // elements from one key to the next
  EvenTile(const K* first_key, std::ptrdiff_t keys_apart) noexcept : first(first_key), apart(keys_apart) {}
  const K* key(std::size_t n) const noexcept { return first + static_cast<std::ptrdiff_t>(n) * apart; }
};
template <class K>
struct PointerTile : PlainTile<K, PointerTile<K>> {
  const K* keys[streams];
  const K* key(std::size_t n) const noexcept { return keys[n]; }
};
// Where memory is asked for from several places at once, a line of each in turn: rows of 2^line_bits lines, `apart` bytes
// from one to the next. One place after the other, lines arrive a third slower.
template <class K>
struct Places {
  const K* first[streams] = {};  // 2^bits of them
  std::ptrdiff_t apart = 0;
  std::size_t bits = 0, line_bits = 0;

  const unsigned char* line(std::size_t number, std::ptrdiff_t offset) const noexcept {
    const std::size_t here = number >> bits, row = here >> line_bits;
    return reinterpret_cast<const unsigned char*>(first[number % (std::size_t{1} << bits)] + offset) +
           static_cast<std::ptrdiff_t>(row) * apart +
           static_cast<std::ptrdiff_t>(64 * (here % (std::size_t{1} << line_bits)));
  }
};
// Neighbours in chunks of 16 bytes: chunk 0 of each, then chunk 1 of each, `apart` elements on.
template <class K>
struct ChunkTile {
  static constexpr std::size_t chunk = InChunks<K>::chunk, step_elements = 2 * width;
  const K* first;
  std::ptrdiff_t apart;
  // What is asked for meanwhile, a share of it in each step: lines from number `line` on, `offset` elements on.
  const Places<K>* asked = nullptr;
  std::ptrdiff_t offset = 0;
  std::size_t line = 0, steps = 0;  // steps: along a key

  InChunks<K> at(std::size_t n, std::size_t i) const noexcept {
    return {first + n * chunk + static_cast<std::ptrdiff_t>(i / chunk) * apart, apart};
  }
  void copy(std::size_t n, std::size_t i, std::size_t count, K* to) const noexcept {
    for (std::size_t done = 0; done < count; done += chunk)
      std::memcpy(to + done, at(n, i + done).k, (count - done < chunk ? count - done : chunk) * sizeof(K));
  }
  template <std::size_t Keys>
  FASTV_INLINE void ask_ahead(std::size_t begin, std::size_t i, std::ptrdiff_t) const noexcept {
    if (asked == nullptr) return;
    constexpr std::size_t bytes = Keys * step_elements * sizeof(K);  // that a step reads, and so asks for
    const std::size_t place = (begin / Keys * steps + i / step_elements) * bytes;
    if (place % 64 != 0) return;
    FASTV_UNROLL
    for (std::size_t l = 0; l < (bytes + 63) / 64; ++l) prefetch(asked->line(line + place / 64 + l, offset));
  }
};

// ---- where tiles come from ----------------------------------------------------------------------
// A source makes the tile of 8 tokens `apart` tokens apart, `token` tokens behind the first of its stretch. adjacent: it
// wants them side by side. steady: a tile further on lies at a constant distance, so that it can be prefetched.
// tiles_together(most): how many tiles of one head are read ahead of the next head's; with adjacent and tokens_outer() alone.

// A cache in one piece.
template <class K>
struct PieceSource {
  using Element = K;
  static constexpr bool adjacent = false, steady = true;
  const Heads<K>& keys;
  std::size_t first;
  bool tokens_outer() const noexcept { return keys.head_stride <= keys.token_stride; }
  std::ptrdiff_t token_step() const noexcept { return keys.token_stride; }
  std::ptrdiff_t head_step() const noexcept { return keys.head_stride; }
  EvenTile<K> tile(std::size_t head, std::size_t token, std::size_t apart) noexcept {
    return {keys.data + static_cast<std::ptrdiff_t>(first + token) * keys.token_stride +
                static_cast<std::ptrdiff_t>(head) * keys.head_stride,
            static_cast<std::ptrdiff_t>(apart) * keys.token_stride};
  }
};

// The addresses of 8 tokens in pages, found once for all heads.
template <class K>
struct PagedTokens {
  std::size_t token = static_cast<std::size_t>(-1), apart = 0;
  const K* at[streams] = {};
  // False where they are those of before.
  bool find(const Heads<K>& keys, std::size_t first, std::size_t wanted, std::size_t wanted_apart) noexcept {
    if (token == wanted && apart == wanted_apart) return false;
    token = wanted;
    apart = wanted_apart;
    for (std::size_t n = 0; n < streams; ++n) at[n] = token_at(keys, first + token + n * apart);
    return true;
  }
};

// A cache in pages.
template <class K>
struct PageSource {
  using Element = K;
  static constexpr bool adjacent = false, steady = false;
  const Heads<K>& keys;
  std::size_t first;
  PagedTokens<K> tokens = {};
  bool tokens_outer() const noexcept { return keys.head_stride <= keys.token_stride; }
  std::ptrdiff_t token_step() const noexcept { return keys.token_stride; }
  std::ptrdiff_t head_step() const noexcept { return keys.head_stride; }
  PointerTile<K> tile(std::size_t head, std::size_t token, std::size_t apart) noexcept {
    static_cast<void>(tokens.find(keys, first, token, apart));
    PointerTile<K> tile;
    for (std::size_t n = 0; n < streams; ++n)
      tile.keys[n] = tokens.at[n] + static_cast<std::ptrdiff_t>(head) * keys.head_stride;
    return tile;
  }
};

// A cache whose vectors are split into chunks of 16 bytes, which lie side by side for the tokens of a block. copy:
// [8, dim], for tiles that are not in one block. Of up to 8 tiles one head's are read together; meanwhile the next head's,
// or the first head's of the next tiles, are asked for.
template <class K>
struct ChunkSource {
  using Element = K;
  static constexpr bool adjacent = true, steady = false;
  static constexpr std::size_t chunk = InChunks<K>::chunk, tile_lines = streams * 16 / 64;  // lines of a tile's row
  const Heads<K>& keys;
  std::size_t first;
  K* copy;
  struct Row : PagedTokens<K> {
    bool neighbours = false;  // its tokens lie side by side in one block
  };
  Row rows[streams] = {};
  std::size_t together_bits = 0;   // binary logarithm of the tiles read together
  Places<K> same = {}, next = {};  // where they lie, and those behind them, in head 0

  bool tokens_outer() const noexcept { return true; }
  std::size_t tiles_together(std::size_t most) noexcept {
    together_bits = logarithm(most < streams ? most : streams);
    return std::size_t{1} << together_bits;
  }
  std::ptrdiff_t token_step() const noexcept { return 0; }
  std::ptrdiff_t head_step() const noexcept { return 0; }
  ChunkTile<K> tile(std::size_t head, std::size_t token, std::size_t apart) noexcept {
    const std::size_t number = token / streams % (std::size_t{1} << together_bits);
    Row& found = rows[number];
    if (found.find(keys, first, token, apart)) {  // the same for all heads
      found.neighbours = true;
      for (std::size_t n = 1; n < streams; ++n)
        found.neighbours = found.neighbours && found.at[n] == found.at[0] + n * chunk;
      if (number == 0) {
        place(first + token, same);
        place(first + token + (streams << together_bits), next);
      }
    }
    const std::ptrdiff_t offset = static_cast<std::ptrdiff_t>(head) * keys.head_stride;
    if (!found.neighbours) {
      for (std::size_t c = 0; c * chunk < keys.dim; ++c)
        for (std::size_t n = 0; n < streams; ++n)
          std::memcpy(copy + (c * streams + n) * chunk,
                      found.at[n] + offset + static_cast<std::ptrdiff_t>(c) * keys.pages.chunk_stride, 16);
      return {copy, static_cast<std::ptrdiff_t>(streams * chunk)};
    }
    ChunkTile<K> tile{found.at[0] + offset, keys.pages.chunk_stride};
    const bool last = head + 1 == keys.heads;
    tile.asked = last ? &next : &same;
    tile.offset = last ? 0 : offset + keys.head_stride;
    tile.line = number * tile_lines * (keys.dim / chunk);
    tile.steps = keys.dim / ChunkTile<K>::step_elements;
    return tile;
  }

 private:
  static std::size_t logarithm(std::size_t number) noexcept {  // rounded down; 0 for 0
    std::size_t bits = 0;
    while (number >> (bits + 1) != 0) ++bits;
    return bits;
  }
  // The tiles from `token` on, in head 0: a place for each block that they lie in, or several in each where those are few.
  void place(std::size_t token, Places<K>& places) const noexcept {
    const std::size_t chunks = keys.dim / chunk, in_block = logarithm(keys.pages.block_tokens / streams);
    const std::size_t tiles = in_block < together_bits ? in_block : together_bits;  // of a block, their logarithm
    const std::size_t blocks = together_bits - tiles;
    std::size_t parts = blocks < 2 ? 2 - blocks : 0;  // of a block's chunks, their logarithm
    while (chunks % (std::size_t{1} << parts) != 0) --parts;
    places.bits = blocks + parts;
    places.line_bits = tiles + logarithm(tile_lines);
    places.apart = keys.pages.chunk_stride * static_cast<std::ptrdiff_t>(sizeof(K));
    for (std::size_t p = 0; p < std::size_t{1} << places.bits; ++p) {
      const std::size_t at = token + ((p >> parts) * streams << tiles), part = p % (std::size_t{1} << parts);
      places.first[p] = token_at(keys, at < keys.tokens ? at : keys.tokens - 1) +
                        static_cast<std::ptrdiff_t>((chunks >> parts) * part) * keys.pages.chunk_stride;
    }
  }
};

// Anything that can be loaded as floats. copy: [8, dim].
template <class Keys>
struct FloatSource {
  using Element = float;
  static constexpr bool adjacent = true, steady = false;
  const Keys& keys;
  std::size_t first;
  float* copy;
  bool tokens_outer() const noexcept { return true; }
  std::size_t tiles_together(std::size_t) const noexcept { return 1; }
  std::ptrdiff_t token_step() const noexcept { return 0; }
  std::ptrdiff_t head_step() const noexcept { return 0; }
  EvenTile<float> tile(std::size_t head, std::size_t token, std::size_t apart) noexcept {
    for (std::size_t n = 0; n < streams; ++n) load_vector(keys, head, first + token + n * apart, copy + n * keys.dim);
    return {copy, static_cast<std::ptrdiff_t>(keys.dim)};
  }
};
}  // namespace FASTV_KIND
}  // namespace detail
}  // namespace fastv
#endif

#include "end.hpp"

// fastv: kept indices -> shorter tensors. Everything is moved as bytes, one memmove per run of neighbouring kept
// rows, so half precision and block-quantised caches need no special case.
#pragma once

#include "kernel.hpp"

namespace fastv {

namespace detail {

inline Status check_indices(Span<const Index> kept, std::size_t count) noexcept {
  if (!kept.empty() && kept.data() == nullptr) return fail(Errc::null_data, "kept indices");
  for (std::size_t i = 0; i < kept.size(); ++i) {
    if (i > 0 && kept[i] <= kept[i - 1])
      return fail(Errc::indices_unsorted, "", number(kept[i]), number(kept[i - 1]), number(i));
    if (kept[i] >= count) return fail(Errc::index_past_end, "", number(kept[i]), number(count), number(i));
  }
  return {};
}

inline Status check_rows(const Rows& rows) noexcept {
  if (rows.data == nullptr && rows.count != 0 && rows.planes != 0) return fail(Errc::null_data, "rows");
  return check_strides({{"row stride", rows.row_stride, rows.count}, {"plane stride", rows.plane_stride, rows.planes}},
                       rows.row_bytes);
}

// Calls move(destination row, source row, rows) for each run of neighbouring kept indices.
template <class Move>
void for_each_run(Span<const Index> kept, Move move) {
  for (std::size_t i = 0; i < kept.size();) {
    std::size_t run = 1;
    while (i + run < kept.size() && kept[i + run] == kept[i] + run) ++run;
    move(i, static_cast<std::size_t>(kept[i]), run);
    i += run;
  }
}

inline unsigned char* row_at(const Rows& rows, std::size_t plane, std::size_t row) noexcept {
  return static_cast<unsigned char*>(rows.data) + static_cast<std::ptrdiff_t>(plane) * rows.plane_stride +
         static_cast<std::ptrdiff_t>(row) * rows.row_stride;
}

// memmove() of short stretches to lower addresses, from front to back: the C library reads their ends first, where the
// hardware that reads ahead does not follow.
inline void move_down(unsigned char* to, const unsigned char* from, std::size_t bytes) noexcept {
#if defined(__GNUC__)
  typedef std::uint64_t Block __attribute__((vector_size(32)));  // of bytes, g++ would copy to the stack and back
#else
  using Block = std::uint64_t;
#endif
  std::size_t i = 0;
  for (; i + 2 * sizeof(Block) <= bytes; i += 2 * sizeof(Block)) {
    Block first, second;
    std::memcpy(&first, from + i, sizeof(Block));
    std::memcpy(&second, from + i + sizeof(Block), sizeof(Block));
    std::memcpy(to + i, &first, sizeof(Block));
    std::memcpy(to + i + sizeof(Block), &second, sizeof(Block));
  }
  if (i < bytes) std::memmove(to + i, from + i, bytes - i);
}

// Moves rows whose indices and strides have been checked. from and to may be the same tensor: indices ascend, so a
// row is read before it is overwritten. Streams: one core reads faster from several places than from one, so four
// planes are walked side by side, but follows a stream with gaps badly, so rows dropped between others are asked for as
// well. dense: no bytes between rows, neither in from nor in to. By value: the bytes written could be those of a Rows
// elsewhere.
template <bool Streams>
void move_rows(const Span<const Index> kept, const Rows from, const Rows to, const bool dense) noexcept {
  constexpr std::size_t together = 4, bytes_ahead = 256;
  const std::size_t rows_ahead = Streams ? (bytes_ahead - 1) / from.row_bytes + 1 : 0;
  for (std::size_t first = 0; first < from.planes; first += together) {
    const std::size_t last = from.planes - first < together ? from.planes : first + together;
    std::size_t asked = 0;  // rows
    for_each_run(kept, [&](std::size_t target, std::size_t source, std::size_t run) {
      const std::size_t wanted = from.count - source - run < rows_ahead ? from.count : source + run + rows_ahead;
      for (std::size_t plane = first; plane < last; ++plane) {
        unsigned char* destination = row_at(to, plane, target);
        const unsigned char* origin = row_at(from, plane, source);
        if (destination == origin) continue;
        if constexpr (Streams) {
          prefetch(row_at(from, plane, asked), row_at(from, plane, wanted));
          move_down(destination, origin, run * from.row_bytes);
        } else if (dense) {
          std::memmove(destination, origin, run * from.row_bytes);
        } else {
          for (std::size_t i = 0; i < run; ++i)
            std::memmove(row_at(to, plane, target + i), row_at(from, plane, source + i), from.row_bytes);
        }
      }
      asked = wanted;
    });
  }
}
inline void move_rows(Span<const Index> kept, const Rows& from, const Rows& to) noexcept {
  const bool dense = from.row_stride == to.row_stride && static_cast<std::size_t>(from.row_stride) == from.row_bytes;
  // Where fewer than a third stay, most of what lies between would be read in vain.
  if (dense && from.row_bytes > 0 && from.row_bytes <= 1024 && kept.size() >= from.count / 3)
    move_rows<true>(kept, from, to, dense);
  else
    move_rows<false>(kept, from, to, dense);
}

}  // namespace detail

// Moves the kept rows of every plane to its front, in place and in order; row i then holds what row kept[i] held, and
// rows past kept.size() are left as they were. Nothing is touched if an error is returned. O(bytes kept). Hidden
// states, position ids (one axis or several), KV caches in both layouts: see rows(), position_axes() and kv_rows() in
// view.hpp.
inline Status compact(Span<const Index> kept, const Rows& rows) noexcept {
  if (Status status = detail::check_rows(rows); !status) return status;
  if (Status status = detail::check_indices(kept, rows.count); !status) return status;
  detail::move_rows(kept, rows, rows);
  return {};
}

// Copies the kept rows of `from` to the front of `to`, which must not overlap it. O(bytes kept).
inline Status gather(Span<const Index> kept, const Rows& from, const Rows& to) noexcept {
  using detail::fail;
  using detail::number;
  if (Status status = detail::check_rows(from); !status) return status;
  if (Status status = detail::check_rows(to); !status) return status;
  if (Status status = detail::check_indices(kept, from.count); !status) return status;
  if (from.row_bytes != to.row_bytes)
    return fail(Errc::rows_differ, "the size of a row", number(from.row_bytes), number(to.row_bytes));
  if (from.planes != to.planes)
    return fail(Errc::rows_differ, "the number of planes", number(from.planes), number(to.planes));
  if (to.count < kept.size())
    return fail(Errc::room_too_small, "the destination", number(to.count), number(kept.size()));
  detail::move_rows(kept, from, to);
  return {};
}

// Contiguous one-dimensional data: position ids, token ids, segment ids.
template <class T>
Status compact(Span<const Index> kept, Span<T> values) noexcept {
  return compact(kept, rows(values.data(), values.size()));
}
template <class = void>
Status compact(detail::Anything, detail::Unknown) noexcept;

// A mask [rows, columns] of `element_bytes` bytes an entry, rows row_stride bytes apart, over the whole prompt on
// both axes: keeps the kept rows and of each the kept columns, in place. The rows stay row_stride bytes apart.
// O(kept^2).
inline Status compact_mask(Span<const Index> kept, void* data, std::size_t tokens, std::size_t element_bytes,
                           std::ptrdiff_t row_stride) noexcept {
  if (tokens > 0 && element_bytes > detail::most_entries / tokens)
    return detail::fail(Errc::beyond_memory, "size of an entry", detail::number(element_bytes), detail::number(tokens));
  const auto bytes = static_cast<std::ptrdiff_t>(element_bytes);
  const Rows whole{data, tokens, tokens * element_bytes, row_stride};
  if (Status status = compact(kept, whole); !status) return status;
  return compact(kept, Rows{data, tokens, element_bytes, bytes, kept.size(), row_stride});
}

// ---- paged caches -------------------------------------------------------------------------------

// What a paged compact() leaves: the blocks the kept tokens are in, in order, and those that are free again. Both are
// parts of the block table that was handed in, which compact() has reordered.
struct Blocks {
  // See above.
  Span<const Index> used, freed;
};

namespace detail {

inline unsigned char* page_row(const PagedRows& pages, Index block, std::size_t plane, std::size_t row) noexcept {
  return static_cast<unsigned char*>(pages.data) + static_cast<std::ptrdiff_t>(block) * pages.block_stride +
         static_cast<std::ptrdiff_t>(plane) * pages.plane_stride + static_cast<std::ptrdiff_t>(row) * pages.row_stride;
}

inline Status check_pages(const PagedRows& pages) noexcept {
  if (pages.block_tokens == 0) return fail(Errc::no_block_tokens, "the cache");
  const std::size_t needed = blocks_for(pages.count, pages.block_tokens);
  if (pages.block_table.size() < needed)
    return fail(Errc::block_table_short, "", number(pages.block_table.size()), number(needed));
  if (needed > 0 && pages.block_table.data() == nullptr) return fail(Errc::null_data, "the block table");
  if (pages.data == nullptr && needed > 0) return fail(Errc::null_data, "rows");
  return check_strides({{"row stride", pages.row_stride, pages.block_tokens},
                        {"plane stride", pages.plane_stride, pages.planes},
                        {"block stride", pages.block_stride, pages.block_table.size()}},
                       pages.row_bytes);
}

}  // namespace detail

// Compacts a sequence's cache within its own blocks: the kept tokens of every `block_tokens` move into the block that
// holds the first of them, so that a token which already stands at its row stays there, and a block that is kept
// whole only changes its place in the table.
//
// caches: every tensor that shares the block table, such as K and V of each layer of the group (the layers from K on;
// those below keep a longer table of their own). block_table of all of them must be the same memory; it is reordered:
// first the blocks in use, then the freed ones. Nothing is touched if an error is returned. O(bytes moved + kept).
inline Result<Blocks> compact(Span<const Index> kept, Span<const PagedRows> caches) noexcept {
  using detail::fail;
  using detail::number;
  if (caches.empty()) return {};
  if (Status status = detail::check_room(caches, caches.size(), "the caches"); !status) return {{}, status};
  const PagedRows& shared = caches[0];
  for (const PagedRows& cache : caches) {
    if (Status status = detail::check_pages(cache); !status) return {{}, status};
    if (cache.block_table.data() != shared.block_table.data() || cache.block_tokens != shared.block_tokens ||
        cache.count != shared.count)
      return {
          {},
          fail(Errc::rows_differ, "the block table, or the tokens in it,", number(shared.count), number(cache.count))};
  }
  if (Status status = detail::check_indices(kept, shared.count); !status) return {{}, status};

  const std::size_t size = shared.block_tokens, used = (kept.size() + size - 1) / size;
  const Span<Index> table = shared.block_table;
  for (const PagedRows& cache : caches)
    for (std::size_t i = 0; i < kept.size(); ++i) {
      const std::size_t row = i % size, source_row = kept[i] % size;
      const Index block = table[kept[i - row] / size], source = table[kept[i] / size];
      if (block == source && row == source_row) continue;
      for (std::size_t plane = 0; plane < cache.planes; ++plane)
        std::memmove(detail::page_row(cache, block, plane, row), detail::page_row(cache, source, plane, source_row),
                     cache.row_bytes);
    }
  // The blocks that were moved into go to the front. Their old places ascend and none lies before its new one, so
  // that what is swapped back is never asked for again.
  for (std::size_t b = 0; b < used; ++b) {
    Index& from = table[kept[b * size] / size];
    const Index block = from;
    from = table[b];
    table[b] = block;
  }
  return {{{table.data(), used}, {table.data() + used, table.size() - used}}, {}};
}

// ---- positions and masks ------------------------------------------------------------------------

// Position id of the first decoded token where the caller has position ids of its own: the greatest of all axes and
// tokens, plus one (Qwen2-VL's rule for M-RoPE; n for plain ids 0 .. n - 1). Ask before compacting the ids; kept
// tokens keep theirs. positions: [axes, count], any order. O(axes * count).
template <class T>
T next_position(Span<const T> positions) noexcept {
  T next = 0;
  for (const T position : positions) next = position >= next ? static_cast<T>(position + 1) : next;
  return next;
}

// For re-ranking while decoding: every token stays in the cache, and each step hides those that its own ranking does
// not keep. An additive bias row over the whole cache: 0 where a key is seen, `hidden` (-infinity, or the most
// negative value the kernel likes) where it is not. Keys past the prompt (decoded tokens) are always seen. O(keys).
inline Status keep_bias(Span<const Index> kept, std::size_t tokens, Span<float> bias, float hidden) noexcept {
  if (Status status = detail::check_indices(kept, tokens); !status) return status;
  if (Status status = detail::check_room(bias, tokens, "the bias row"); !status) return status;
  for (std::size_t i = 0; i < bias.size(); ++i) bias[i] = i < tokens ? hidden : 0.0f;
  for (const Index index : kept) bias[index] = 0;
  return {};
}

// The same as a bitmap, bit i % 32 of word i / 32: 1 where a key is seen. Bits past the keys are 1.
inline Status keep_bitmap(Span<const Index> kept, std::size_t tokens, Span<std::uint32_t> bitmap) noexcept {
  if (Status status = detail::check_indices(kept, tokens); !status) return status;
  if (Status status = detail::check_room(bitmap, detail::blocks_for(tokens, 32), "the bitmap"); !status) return status;
  for (std::uint32_t& word : bitmap) word = ~std::uint32_t{0};
  std::size_t next = 0;
  for (std::size_t i = 0; i < tokens; ++i) {
    if (next < kept.size() && kept[next] == i)
      ++next;
    else
      bitmap[i / 32] &= ~(std::uint32_t{1} << (i % 32));
  }
  return {};
}

}  // namespace fastv

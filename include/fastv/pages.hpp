// fastv: kept indices -> paged caches.
//
// Layers K.. have written nothing when pruning takes place, so most engines move no pages at all: they count slots
// (slots.hpp) and hand unused blocks back. These verbs are for caches that were filled before: a prompt that was run
// through every layer, or a later stage.
//
//   compact_pages   moves kept tokens to the front, in the order of the table, which stays as it is: for tables that
//                   layers below K share
//   repack_pages    moves as little as it can, and reorders the table
//   gather_pages    copies kept tokens into other blocks: copy on write, for blocks that other sequences share
//
// Prefix caching: blocks of layers below K hold every token and can be shared as ever. Those of layers K.. lack the tokens
// that this prompt's question did not ask for: share them only among requests with the same kept set (hash the kept
// indices into the block's key), or not at all. A request that is preempted and recomputed must keep its kept indices:
// ranked again by a generated token, it would keep others.
#pragma once

#include "apply.hpp"

#include "detail/begin.hpp"

namespace fastv {

// What repack_pages() leaves: parts of the block table that was handed in, reordered.
struct RepackedPages {
  Span<const Index> used;   // the blocks the kept tokens are in, in order
  Span<const Index> freed;  // the blocks that are free again
};

namespace detail {
inline namespace FASTV_KIND {

inline unsigned char* block_at(const KvPages& pages, std::size_t number) noexcept {
  if (!pages.blocks.empty()) return static_cast<unsigned char*>(pages.blocks[number]);
  return static_cast<unsigned char*>(pages.data) +
         static_cast<std::ptrdiff_t>(pages.block_table[number]) * pages.block_stride;
}
inline unsigned char* page_row(const KvPages& pages, unsigned char* block, std::size_t plane,
                               std::size_t row) noexcept {
  return block + static_cast<std::ptrdiff_t>(plane) * pages.plane_stride +
         static_cast<std::ptrdiff_t>(row) * pages.row_stride;
}

// The first of `count` blocks that is the same as an earlier one; count where none is. Written to, such a block would hold
// two lots of tokens. name(i): what tells block i from others. Without memory of its own: a filter of 8 KiB is told every
// block by four bits of its hash, and only where it knows all four are names compared. It takes 2,048 blocks at a time,
// those whose hashes lie in one part of all, so that it hardly ever knows a block that is new. O(count^2 / 2048).
template <class Name>
std::size_t find_repeated(std::size_t count, Name name) noexcept {
  constexpr std::size_t bits = 65536, at_a_time = 2048;
  const std::uint64_t parts = count / at_a_time + 1;
  std::size_t repeated = count;
  for (std::uint64_t part = 0; part < parts; ++part) {
    std::uint64_t filter[bits / 64] = {};
    for (std::size_t i = 0; i < repeated; ++i) {
      std::uint64_t hash = static_cast<std::uint64_t>(name(i)) * 0x9E3779B97F4A7C15u;  // SplitMix64's constants
      hash = (hash ^ (hash >> 31)) * 0xBF58476D1CE4E5B9u;
      if ((hash >> 32) * parts >> 32 != part) continue;
      const std::uint64_t step = hash >> 16 | 1;
      bool known = true;
      for (std::uint64_t k = 0, at = hash; k < 4; ++k, at += step) {
        const std::uint64_t bit = std::uint64_t{1} << (at % 64);
        std::uint64_t& word = filter[at / 64 % (bits / 64)];
        known = known && (word & bit) != 0;
        word |= bit;
      }
      for (std::size_t j = 0; known && j < i; ++j)
        if (name(j) == name(i)) repeated = i;
    }
  }
  return repeated;
}

inline Status check_pages(const KvPages& pages, bool written) noexcept {
  if (Status status = check_block_table(Span<const Index>(pages.block_table.data(), pages.block_table.size()),
                                        pages.blocks, pages.block_tokens, pages.count, "the cache");
      !status)
    return status;
  const std::size_t used = blocks_for(pages.count, pages.block_tokens);
  if (pages.blocks.empty() && pages.data == nullptr && used > 0) return fail_null("the cache");
  if (written) {
    const std::size_t repeated =
        pages.blocks.empty()
            ? find_repeated(used, [&](std::size_t i) { return pages.block_table[i]; })
            : find_repeated(used, [&](std::size_t i) { return reinterpret_cast<std::uintptr_t>(pages.blocks[i]); });
    if (repeated < used)
      return fail(Errc::bad_pages,
                  "block {} of the sequence is the same as an earlier one: give every block its own memory, "
                  "or gather into other blocks",
                  repeated);
  }
  return check_strides(
      {{"the cache", "row stride", pages.row_stride, pages.block_tokens},
       {"the cache", "plane stride", pages.plane_stride, pages.planes},
       {"the cache", "block stride", pages.block_stride, pages.blocks.empty() ? pages.block_table.size() : 1}},
      pages.row_bytes);
}

inline void move_page_row(const KvPages& to, unsigned char* to_block, std::size_t to_row, const KvPages& from,
                          unsigned char* from_block, std::size_t from_row) noexcept {
  if ((to_block == from_block && to_row == from_row) || from.row_bytes == 0) return;
  for (std::size_t plane = 0; plane < from.planes; ++plane)
    std::memmove(page_row(to, to_block, plane, to_row), page_row(from, from_block, plane, from_row), from.row_bytes);
}

}  // namespace FASTV_KIND
}  // namespace detail

inline namespace FASTV_KIND {

// Moves the kept tokens of every cache to the front of the sequence's own blocks, in the order of the table, which stays as
// it is: token i is then where the i-th token of the sequence was. caches: any number, with tables of their own or shared.
// Returns the blocks in use; the blocks behind them are free unless another layer group uses the table. Nothing is touched
// if an error is returned. O(bytes moved + kept).
inline Result<std::size_t> compact_pages(const KeptRows& kept, Span<const KvPages> caches) noexcept {
  if (!kept.status) return {0, kept.status};
  if (Status status = detail::expect_room(caches, caches.size(), "the caches"); !status) return {0, status};
  for (const KvPages& cache : caches) {
    // Caches share their table as a rule, which need not be searched for repeated blocks each time.
    const bool same_table = &cache != caches.data() && cache.blocks.empty() && caches[0].blocks.empty() &&
                            cache.block_table.data() == caches[0].block_table.data() &&
                            cache.block_tokens == caches[0].block_tokens && cache.count <= caches[0].count;
    if (Status status = detail::check_pages(cache, !same_table); !status) return {0, status};
    if (Status status = detail::check_kept(kept, cache.count); !status) return {0, status};
    if (cache.block_tokens != caches[0].block_tokens)
      return {0, fail(Errc::bad_pages, "the caches have blocks of {} and of {} tokens: compact them apart",
                      caches[0].block_tokens, cache.block_tokens)};
  }
  if (caches.empty()) return {0, {}};
  for (const KvPages& cache : caches)
    for (std::size_t i = 0; i < kept.indices.size(); ++i) {
      const std::size_t size = cache.block_tokens, token = kept.indices[i];
      detail::move_page_row(cache, detail::block_at(cache, i / size), i % size, cache,
                            detail::block_at(cache, token / size), token % size);
    }
  return {detail::blocks_for(kept.indices.size(), caches[0].block_tokens), {}};
}
inline Result<std::size_t> compact_pages(const KeptRows& kept, const KvPages& cache) noexcept {
  return compact_pages(kept, Span<const KvPages>(&cache, 1));
}

// Compacts a sequence's cache within its own blocks: the kept tokens of every `block_tokens` move into the block that
// holds the first of them, so that a token which already stands at its row stays there, and a block that is kept whole only
// changes its place in the table.
//
// caches: every tensor that shares the block table, such as K and V of each layer of the group (the layers from K on; those
// below keep a longer table of their own). block_table of all of them must be the same memory; it is reordered: first the
// blocks in use, then the freed ones. Nothing is touched if an error is returned. O(bytes moved + kept).
inline Result<RepackedPages> repack_pages(const KeptRows& kept, Span<const KvPages> caches) noexcept {
  if (!kept.status) return {{}, kept.status};
  if (caches.empty()) return {};
  if (Status status = detail::expect_room(caches, caches.size(), "the caches"); !status) return {{}, status};
  const KvPages& shared = caches[0];
  for (std::size_t c = 0; c < caches.size(); ++c) {
    const KvPages& cache = caches[c];
    if (!cache.blocks.empty())
      return {{},
              fail(Errc::not_supported,
                   "cache {} gives its blocks by pointers, and only a block table can be reordered: "
                   "use compact_pages()",
                   c)};
    if (Status status = detail::check_pages(cache, c == 0); !status) return {{}, status};
    if (cache.block_table.data() != shared.block_table.data())
      return {{},
              fail(Errc::bad_pages,
                   "cache {} has another block table than cache 0: hand over those that share one, and "
                   "repack others apart",
                   c)};
    if (cache.block_table.size() != shared.block_table.size() || cache.block_tokens != shared.block_tokens ||
        cache.count != shared.count)
      return {{},
              fail(Errc::bad_pages,
                   "cache {} has {} tokens in blocks of {}, unlike cache 0, with which it shares the block table", c,
                   cache.count, cache.block_tokens)};
  }
  if (Status status = detail::check_kept(kept, shared.count); !status) return {{}, status};

  const Span<const Index> rows = kept.indices;
  const std::size_t size = shared.block_tokens, used = detail::blocks_for(rows.size(), size);
  const Span<Index> table = shared.block_table;
  for (const KvPages& cache : caches)
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const std::size_t row = i % size;
      detail::move_page_row(cache, detail::block_at(cache, rows[i - row] / size), row, cache,
                            detail::block_at(cache, rows[i] / size), rows[i] % size);
    }
  // The blocks that were moved into go to the front. Their old places ascend and none lies before its new one, so that what
  // is swapped back is never needed again.
  for (std::size_t b = 0; b < used; ++b) {
    Index& from = table[rows[b * size] / size];
    const Index block = from;
    from = table[b];
    table[b] = block;
  }
  return {{{table.data(), used}, {table.data() + used, table.size() - used}}, {}};
}

// Copies the kept tokens of `from` into the blocks of `to`, in the order of its table; the block sizes may differ. For
// prefixes that other sequences share: theirs stay as they are. to.count: tokens it has room for. The blocks of `to` must
// not be among those of `from`. O(bytes copied).
inline Status gather_pages(const KeptRows& kept, const KvPages& from, const KvPages& to) noexcept {
  if (!kept.status) return kept.status;
  if (Status status = detail::check_pages(from, false); !status) return status;
  if (Status status = detail::check_pages(to, true); !status) return status;
  if (Status status = detail::check_kept(kept, from.count); !status) return status;
  if (from.row_bytes != to.row_bytes || from.planes != to.planes)
    return fail(Errc::bad_shape,
                "a token has {} planes of {} bytes at the source but {} of {} at the destination: make them equal",
                from.planes, from.row_bytes, to.planes, to.row_bytes);
  if (to.count < kept.indices.size())
    return fail(Errc::too_small, "the destination has room for {} tokens but needs {}", to.count, kept.indices.size());
  for (std::size_t i = 0; i < kept.indices.size(); ++i) {
    const std::size_t token = kept.indices[i];
    detail::move_page_row(to, detail::block_at(to, i / to.block_tokens), i % to.block_tokens, from,
                          detail::block_at(from, token / from.block_tokens), token % from.block_tokens);
  }
  return {};
}

}  // namespace FASTV_KIND

}  // namespace fastv

#include "detail/end.hpp"

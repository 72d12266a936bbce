// fastv: extents and strides of views, checked before anything is read through them.
#pragma once

#include "../status.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
inline namespace FASTV_KIND {

// Blocks of `size` that so many tokens need.
inline constexpr std::size_t blocks_for(std::size_t tokens, std::size_t size) noexcept {
  return tokens / size + (tokens % size != 0 ? 1u : 0u);
}

// No tensor has more entries, nor bytes: products of sizes below it cannot overflow.
inline constexpr std::size_t most_entries = static_cast<std::size_t>(-1) / 32;

struct Axis {
  const char* what;       // "key", say
  const char* dimension;  // "head stride", say
  std::ptrdiff_t stride;
  std::size_t extent;
};

// Strides must not be negative, and no two entries may overlap: in order of stride, whatever the order of the axes,
// each axis must step over all that the ones before it reach. Where an axis has no entries, nothing can overlap.
template <std::size_t N>
Status check_strides(Axis (&&axes)[N], std::size_t entry) noexcept {
  for (const Axis& axis : axes)
    if (axis.stride < 0)
      return fail(Errc::bad_stride, "the {} of {} is {} but must not be negative", axis.dimension, axis.what,
                  axis.stride);
  for (const Axis& axis : axes)
    if (axis.extent == 0) return {};
  for (std::size_t i = 1; i < N; ++i)
    for (std::size_t j = i; j > 0 && axes[j].stride < axes[j - 1].stride; --j) {
      const Axis larger = axes[j - 1];
      axes[j - 1] = axes[j];
      axes[j] = larger;
    }
  if (entry > most_entries)
    return fail(Errc::bad_stride, "an entry of {} has {} elements or bytes, more than any memory holds", axes[0].what,
                entry);
  std::size_t reach = entry;
  for (const Axis& axis : axes) {
    if (axis.extent <= 1) continue;
    const auto stride = static_cast<std::size_t>(axis.stride);
    if (stride < reach)
      return fail(Errc::bad_stride,
                  "the {} of {} is {} but its entries reach over {}: they would overlap, so check the "
                  "extents and their order",
                  axis.dimension, axis.what, axis.stride, reach);
    if (stride > (most_entries - reach) / (axis.extent - 1))
      return fail(Errc::bad_stride, "the {} of {} is {}, which over {} entries is more than any memory holds",
                  axis.dimension, axis.what, axis.stride, axis.extent);
    reach += stride * (axis.extent - 1);
  }
  return {};
}

// Typed data is read where it lies, so it must lie where its type may.
template <class T>
Status check_data(const T* data, const char* what) noexcept {
  if (data == nullptr) return fail_null(what);
  if (reinterpret_cast<std::uintptr_t>(data) % alignof(T) != 0)
    return fail(Errc::bad_stride,
                "the address of {} is not a multiple of {}, the alignment of its elements: copy it to aligned memory",
                what, alignof(T));
  return {};
}

// Pages: T as in KeyPages, or void.
template <class T>
Status check_block_table(Span<const Index> table, Span<T* const> blocks, std::size_t block_tokens, std::size_t tokens,
                         const char* what) noexcept {
  if (block_tokens == 0) return fail(Errc::bad_pages, "blocks of {} hold 0 tokens: state at least 1", what);
  const std::size_t needed = blocks_for(tokens, block_tokens), given = blocks.empty() ? table.size() : blocks.size();
  if (given < needed)
    return fail(Errc::bad_pages,
                "the block table of {} has {} blocks but {} are needed: hand over the whole table of the sequence",
                what, given, needed);
  if (needed == 0) return {};
  if (blocks.empty()) {
    if (table.data() == nullptr) return fail_null("the block table");
    for (std::size_t i = 0; i < needed; ++i)
      if (table[i] > max_tokens)
        return fail(Errc::bad_pages,
                    "block {} of {} is {} in the block table, as a negative int32 reads: give every block that has "
                    "tokens its number",
                    i, what, table[i]);
    return {};
  }
  if (blocks.data() == nullptr) return fail_null("the blocks");
  for (std::size_t i = 0; i < needed; ++i)
    if (blocks[i] == nullptr) return fail(Errc::null_data, "the pointer to block {} of {} is null", i, what);
  return {};
}

}  // namespace FASTV_KIND
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

// fastv: kept indices -> shorter tensors. Everything is moved as bytes, one memmove per run of
// neighbouring kept rows, so half precision and block-quantised caches need no special case.
#pragma once

#include "score.hpp"

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

// Moves rows whose indices and strides have been checked. from and to may be the same tensor: indices
// ascend, so a row is read before it is overwritten.
inline void move_rows(Span<const Index> kept, const Rows& from, const Rows& to) noexcept {
  // Short rows are over before the hardware has seen where they lead, so the ones to come are asked for by
  // hand; long ones it follows by itself.
  constexpr std::size_t ahead = 16;
  const bool hint = from.row_bytes >= 64 && from.row_bytes <= 1024;
  const bool dense = from.row_stride == to.row_stride && static_cast<std::size_t>(from.row_stride) == from.row_bytes;
  for (std::size_t plane = 0; plane < from.planes; ++plane)
    for_each_run(kept, [&](std::size_t target, std::size_t source, std::size_t run) {
      unsigned char* destination = row_at(to, plane, target);
      const unsigned char* origin = row_at(from, plane, source);
      for (std::size_t i = target + ahead; hint && i < target + run + ahead && i < kept.size(); ++i)
        prefetch(row_at(from, plane, kept[i]), from.row_bytes);
      if (destination == origin) return;
      if (dense) {
        std::memmove(destination, origin, run * from.row_bytes);
        return;
      }
      for (std::size_t i = 0; i < run; ++i)
        std::memmove(row_at(to, plane, target + i), row_at(from, plane, source + i), from.row_bytes);
    });
}

}  // namespace detail

// Moves the kept rows of every plane to its front, in place and in order; row i then holds what row
// kept[i] held, and rows past kept.size() are left as they were. Nothing is touched if an error is
// returned. O(bytes kept). Hidden states, position ids (one axis or several), KV caches in both layouts:
// see rows(), position_axes() and kv_rows() in view.hpp.
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

// A mask [rows, columns] of `element_bytes` bytes an entry, rows row_stride bytes apart, over the whole
// prompt on both axes: keeps the kept rows and of each the kept columns, in place. The rows stay
// row_stride bytes apart. O(kept^2).
inline Status compact_mask(Span<const Index> kept, void* data, std::size_t tokens, std::size_t element_bytes,
                           std::ptrdiff_t row_stride) noexcept {
  const auto bytes = static_cast<std::ptrdiff_t>(element_bytes);
  const Rows whole{data, tokens, tokens * element_bytes, row_stride};
  if (Status status = compact(kept, whole); !status) return status;
  return compact(kept, Rows{data, tokens, element_bytes, bytes, kept.size(), row_stride});
}

}  // namespace fastv

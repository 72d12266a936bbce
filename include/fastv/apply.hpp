// fastv: kept indices -> shorter tensors. Everything is moved as bytes, one memmove per run of neighbouring kept rows, so
// half precision and block-quantised caches need no special case.
#pragma once

#include "config.hpp"
#include "detail/prefetch.hpp"
#include "detail/strides.hpp"
#include "kept.hpp"

#include "detail/begin.hpp"

namespace fastv {

namespace detail {
inline namespace FASTV_KIND {

inline Status check_rows(const Rows& rows) noexcept {
  if (rows.data == nullptr && rows.count != 0 && rows.planes != 0) return fail_null("rows");
  if (rows.packed && rows.planes > 1 && rows.count > 1 && static_cast<std::size_t>(rows.row_stride) != rows.row_bytes)
    return fail(Errc::bad_stride, "packed planes need rows side by side, but the row stride is {} for rows of {} bytes",
                rows.row_stride, rows.row_bytes);
  return check_strides(
      {{"rows", "row stride", rows.row_stride, rows.count}, {"rows", "plane stride", rows.plane_stride, rows.planes}},
      rows.row_bytes);
}

// Calls move(target row, source row, rows) for each run of neighbouring kept indices.
template <class Move>
void each_run(Span<const Index> kept, Move move) {
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

// A forward memmove for short runs. glibc's reads the tail first, which defeats the hardware prefetcher.
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

// Moves rows whose indices and strides have been checked. from and to may be the same tensor: indices ascend, so a row is
// read before it is overwritten. Streams: one core reads faster from several places than from one, so four planes are
// walked side by side; it follows a stream with gaps badly, so dropped rows between others are prefetched as well. dense:
// no bytes between rows, neither in from nor in to. Pass by value: the bytes written could be those of a Rows elsewhere.
template <bool Streams>
void move_rows(const Span<const Index> kept, const Rows from, const Rows to, const bool dense) noexcept {
  constexpr std::size_t together = 4, bytes_ahead = 256;
  const std::size_t rows_ahead = Streams ? (bytes_ahead - 1) / from.row_bytes + 1 : 0;
  for (std::size_t first = 0; first < from.planes; first += together) {
    const std::size_t last = from.planes - first < together ? from.planes : first + together;
    std::size_t prefetched = 0;  // rows
    each_run(kept, [&](std::size_t target, std::size_t source, std::size_t run) {
      const std::size_t left = from.count - source - run,
                        reach = left <= rows_ahead ? from.count : source + run + rows_ahead;
      for (std::size_t plane = first; plane < last; ++plane) {
        unsigned char* destination = row_at(to, plane, target);
        const unsigned char* origin = row_at(from, plane, source);
        if (destination == origin) continue;
        if constexpr (Streams) {
          prefetch(row_at(from, plane, prefetched), row_at(from, plane, reach));
          move_down(destination, origin, run * from.row_bytes);
        } else if (dense) {
          std::memmove(destination, origin, run * from.row_bytes);
        } else {
          for (std::size_t i = 0; i < run; ++i)
            std::memmove(row_at(to, plane, target + i), row_at(from, plane, source + i), from.row_bytes);
        }
      }
      prefetched = reach;
    });
  }
}
inline void move_rows(Span<const Index> kept, const Rows& from, const Rows& to) noexcept {
  if (kept.empty() || from.row_bytes == 0) return;
  const bool dense = from.row_stride == to.row_stride && static_cast<std::size_t>(from.row_stride) == from.row_bytes;
  // Where fewer than a third stay, most of what lies between would be read in vain.
  if (dense && from.row_bytes <= 1024 && kept.size() >= from.count / 3)
    move_rows<true>(kept, from, to, dense);
  else
    move_rows<false>(kept, from, to, dense);
}

// What compact() takes beside Rows: a container of numbers.
template <class T, class = void>
inline constexpr bool has_grid = false;
template <class T>
inline constexpr bool
    has_grid<T, decltype(static_cast<void>(made<T&>().rows()), static_cast<void>(made<T&>().cols()))> = true;
template <class T, class = void>
struct IfContainer {};
template <class T>
struct IfContainer<T, decltype(static_cast<void>(*made<T&>().data()), static_cast<void>(made<T&>().size()))> {
  using type = void;
};
// What is in it.
template <class T>
struct Mutable {
  using type = T;
};
template <class T>
struct Mutable<const T> {
  using type = T;
};
template <class List>
using ValueOf = typename Mutable<typename Pointee<decltype(made<List&>().data())>::type>::type;

// Lists that are to hold positions.
template <class T>
constexpr void expect_integers() noexcept {
  static_assert(is_value<T> && static_cast<T>(1) / 2 == 0 && sizeof(T) >= 4,
                "positions and indices need integers of at least 32 bits: hand over a list of std::int32_t or "
                "std::int64_t");
}
template <class Integer>
constexpr Integer greatest_integer() noexcept {
  constexpr Integer quarter = static_cast<Integer>(Integer{1} << (8 * sizeof(Integer) - 2));
  return static_cast<Integer>(-1) > 0 ? static_cast<Integer>(-1) : static_cast<Integer>(quarter - 1 + quarter);
}

}  // namespace FASTV_KIND
}  // namespace detail

inline namespace FASTV_KIND {

// ---- rows ---------------------------------------------------------------------------------------

// Moves the kept rows of every plane to its front, in place and in order; row i then holds what row kept[i] held, and rows
// past the kept ones are left as they were. Planes that are `packed` end side by side, [planes, kept]. Hidden states,
// position ids (one axis or several), KV caches in both layouts: see rows() and position_axes() in view.hpp. Nothing is
// touched if an error is returned. O(bytes kept).
inline Status compact(const KeptRows& kept, const Rows& rows) noexcept {
  if (Status status = detail::check_rows(rows); !status) return status;
  if (Status status = detail::check_kept(kept, rows.count); !status) return status;
  if (!rows.packed || rows.planes <= 1) {
    detail::move_rows(kept.indices, rows, rows);
    return {};
  }
  if (kept.indices.empty() || rows.row_bytes == 0) return {};  // however many planes there are
  Rows from = rows, to = rows;
  from.planes = to.planes = 1;
  for (std::size_t plane = 0; plane < rows.planes; ++plane) {  // one by one: a plane may end where the next one begins
    from.data = detail::row_at(rows, plane, 0);
    to.data = static_cast<unsigned char*>(rows.data) + plane * kept.indices.size() * rows.row_bytes;
    detail::move_rows(kept.indices, from, to);
  }
  return {};
}

// A std::vector, Span or array of one number per prompt token: position ids, token ids, segment ids. Its size stays.
template <class Values, class = typename detail::IfContainer<Values>::type>
Status compact(const KeptRows& kept, Values&& values) noexcept {
  using Value = typename detail::Pointee<decltype(values.data())>::type;
  constexpr bool grid = detail::has_grid<Values>, one_by_one = detail::is_value<Value> && !detail::is_const<Value>;
  static_assert(!grid,
                "a matrix is compacted by the adaptor of its library: include <fastv/eigen.hpp>, or hand over "
                "fastv::rows(data, count, width)");
  static_assert(grid || one_by_one,
                "compact() takes one number per token, or rows: hand over one fastv::Rows at a time, and pages to "
                "fastv::compact_pages()");
  if constexpr (!grid && one_by_one)
    return compact(kept, fastv::rows(values.data(), static_cast<std::size_t>(values.size())));
  else
    return {};
}
template <class Value, std::size_t N>
Status compact(const KeptRows& kept, Value (&values)[N]) noexcept {
  return compact(kept, Span<Value>(values));
}
template <class = void>
Status compact(const KeptRows& kept, detail::UnknownRows rows) noexcept;
template <class = void>
Status compact(detail::UnknownKept kept, const Rows& rows) noexcept;

// Copies the kept rows of `from` to the front of `to`, which must not overlap it. O(bytes kept).
inline Status gather(const KeptRows& kept, const Rows& from, const Rows& to) noexcept {
  if (Status status = detail::check_rows(from); !status) return status;
  if (Status status = detail::check_rows(to); !status) return status;
  if (Status status = detail::check_kept(kept, from.count); !status) return status;
  if (from.row_bytes != to.row_bytes)
    return fail(Errc::bad_shape, "a row has {} bytes at the source but {} at the destination: make them equal",
                from.row_bytes, to.row_bytes);
  if (from.planes != to.planes)
    return fail(Errc::bad_shape, "the source has {} planes but the destination {}: make them equal", from.planes,
                to.planes);
  if (to.count < kept.indices.size())
    return fail(Errc::too_small, "the destination has room for {} rows but needs {}", to.count, kept.indices.size());
  detail::move_rows(kept.indices, from, to);
  return {};
}
template <class = void>
Status gather(const KeptRows& kept, detail::UnknownRows from, detail::Anything to = 0) noexcept;
template <class = void>
Status gather(detail::UnknownKept kept, const Rows& from, const Rows& to) noexcept;

// A mask over the whole prompt on both axes, rows(mask, n, n): keeps the kept rows and of each the kept columns, in place.
// The rows stay as far apart as they were. O(kept^2).
inline Status compact_mask(const KeptRows& kept, const Rows& mask) noexcept {
  const std::size_t n = mask.count, bytes = n == 0 ? 0 : mask.row_bytes / n;
  if (mask.planes != 1 || (n > 0 && bytes * n != mask.row_bytes))
    return fail(Errc::bad_shape,
                "the mask has {} rows of {} bytes in {} planes: hand over a square one, as in fastv::rows(mask, n, n)",
                n, mask.row_bytes, mask.planes);
  if (Status status = compact(kept, mask); !status) return status;
  const Rows columns{mask.data, n, bytes, static_cast<std::ptrdiff_t>(bytes), kept.indices.size(), mask.row_stride};
  return compact(kept, columns);
}
template <class = void>
Status compact_mask(const KeptRows& kept, detail::UnknownRows mask) noexcept;

// ---- indices, for what the engine moves itself ---------------------------------------------------

// The kept indices as the engine's integers: a std::vector, Span or other list of std::int32_t, std::int64_t, ..., `offset`
// added to each. O(kept).
template <class List, class = typename detail::IfContainer<List>::type>
Status write_indices(const KeptRows& kept, List&& out, detail::ValueOf<List> offset = 0) noexcept {
  using Integer = detail::ValueOf<List>;
  detail::expect_integers<Integer>();
  if (!kept.status) return kept.status;
  if (Status status = detail::check_indices(kept.indices, max_tokens); !status) return status;
  const Span<Integer> room(out.data(), static_cast<std::size_t>(out.size()));
  if (Status status = detail::expect_room(room, kept.indices.size(), "the list of indices"); !status) return status;
  const std::size_t last = kept.indices.empty() ? 0 : kept.indices[kept.indices.size() - 1];
  if (offset > 0 && last > static_cast<std::uint64_t>(detail::greatest_integer<Integer>() - offset))
    return fail(Errc::bad_index, "kept index {} and the offset {} are together more than {} bits hold: use wider ones",
                last, offset, 8 * sizeof(Integer));
  for (std::size_t i = 0; i < kept.indices.size(); ++i) room[i] = static_cast<Integer>(kept.indices[i]) + offset;
  return {};
}

// Calls move(target row, source row, rows) for each run of neighbouring kept rows: for hosts that copy ranges. O(kept).
template <class Move>
Status for_each_run(const KeptRows& kept, Move move) {
  if (!kept.status) return kept.status;
  if (Status status = detail::check_indices(kept.indices, max_tokens); !status) return status;
  detail::each_run(kept.indices, move);
  return {};
}

// Which visual tokens stay, numbered across the spans: the rows of tensors that hold visual tokens alone, such as
// DeepStack's. numbers: room for as many as stay. Returns how many. O(kept + spans).
inline Result<std::size_t> kept_visual_numbers(const KeptRows& kept, Span<const TokenSpan> visual,
                                               Span<Index> numbers) noexcept {
  if (!kept.status) return {0, kept.status};
  if (Status status = detail::check_indices(kept.indices, max_tokens); !status) return {0, status};
  if (Status status = validate(visual, max_tokens); !status) return {0, status};
  if (Status status = detail::expect_room(numbers, numbers.size(), "the list of numbers"); !status) return {0, status};
  std::size_t written = 0, numbered = 0, k = 0;
  for (const TokenSpan& span : visual) {
    while (k < kept.indices.size() && kept.indices[k] < span.first) ++k;
    for (; k < kept.indices.size() && kept.indices[k] < span.first + span.count; ++k) {
      if (written == numbers.size())
        return {0, fail(Errc::too_small, "the list of numbers has room for {} entries but more visual tokens stay",
                        numbers.size())};
      numbers[written++] = static_cast<Index>(numbered + (kept.indices[k] - span.first));
    }
    numbered += span.count;
  }
  return {written, {}};
}

// ---- positions and masks ------------------------------------------------------------------------

// Position id of the first decoded token where the caller has position ids of its own: the greatest of all axes and
// tokens, plus one (Qwen2-VL's rule for M-RoPE; n for plain ids 0 .. n - 1). Ask before compacting the ids; kept tokens
// keep theirs. positions: [axes, count], any order, a std::vector, Span or other list. O(axes * count).
template <class List, class = typename detail::IfContainer<const List>::type>
detail::ValueOf<const List> next_position(const List& positions) noexcept {
  using Integer = detail::ValueOf<const List>;
  Integer next = 0;
  for (std::size_t i = 0; i < static_cast<std::size_t>(positions.size()); ++i)
    next = positions.data()[i] >= next ? static_cast<Integer>(positions.data()[i] + 1) : next;
  return next;
}

// For re-ranking while decoding: every token stays in the cache, and each step hides those that its own ranking does not
// keep. An additive bias row over the whole cache: 0 where a key is seen, `hidden` (-infinity, or the most negative value
// the kernel likes) where it is not. Keys past the prompt (decoded tokens) are always seen. O(keys).
inline Status keep_bias(const KeptRows& kept, Span<float> bias, float hidden) noexcept {
  if (Status status = detail::expect_known(kept); !status) return status;
  if (Status status = detail::expect_room(bias, kept.prompt_tokens, "the bias row"); !status) return status;
  if (!bias.empty() && bias.data() == nullptr) return detail::fail_null("the bias row");  // with a prompt of 0 tokens
  for (std::size_t i = 0; i < bias.size(); ++i) bias[i] = i < kept.prompt_tokens ? hidden : 0.0f;
  for (const Index index : kept.indices) bias[index] = 0;
  return {};
}

// The same as a bitmap, bit i % 32 of word i / 32: 1 where a key is seen. Bits past the prompt are 1. O(keys).
inline Status keep_bitmap(const KeptRows& kept, Span<std::uint32_t> bitmap) noexcept {
  if (Status status = detail::expect_known(kept); !status) return status;
  const std::size_t tokens = kept.prompt_tokens;
  if (Status status = detail::expect_room(bitmap, detail::blocks_for(tokens, 32), "the bitmap"); !status) return status;
  if (!bitmap.empty() && bitmap.data() == nullptr) return detail::fail_null("the bitmap");
  for (std::uint32_t& word : bitmap) word = ~std::uint32_t{0};
  std::size_t next = 0;
  for (std::size_t i = 0; i < tokens; ++i) {
    if (next < kept.indices.size() && kept.indices[next] == i)
      ++next;
    else
      bitmap[i / 32] &= ~(std::uint32_t{1} << (i % 32));
  }
  return {};
}

}  // namespace FASTV_KIND

}  // namespace fastv

#include "detail/end.hpp"

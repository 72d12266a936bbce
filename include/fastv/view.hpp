// fastv: non-owning views of the engine's tensors.
//
// Nothing here allocates, copies or owns. A tensor is a pointer and its shape in the order of memory; typed views carry
// strides in elements, byte views in bytes. A view that was filled wrongly (null data, no heads, negative or overlapping
// strides) is found when it is used, and reported as a Status.
#pragma once

#include "element.hpp"

#include "detail/begin.hpp"

namespace fastv {

struct KvPages;
namespace detail {

// The little of <type_traits> that views need; the header itself is 3,000 lines. Never defined: for decltype only.
template <class T>
auto array_of(T*) noexcept -> T (*)[];
template <class T>
void takes(T) noexcept;
template <class T, class U>
inline constexpr bool is_same = false;
template <class T>
inline constexpr bool is_same<T, T> = true;
template <class Pointer>
struct Pointee;
template <class T>
struct Pointee<T*> {
  using type = T;
};
template <class T>
inline constexpr bool is_const = false;
template <class T>
inline constexpr bool is_const<const T> = true;
template <class T>
inline constexpr bool is_pointer = false;
template <class T>
inline constexpr bool is_pointer<T*> = true;

}  // namespace detail

// Position of a token in the prompt, or of a row in a tensor. Prompts hold at most max_tokens tokens.
using Index = std::uint32_t;
// The most tokens a prompt, or rows a batch, may have: every Index fits 31 bits.
inline constexpr std::size_t max_tokens = 0x7fffffff;

// ---- ranges -------------------------------------------------------------------------------------

// A pointer and a length. Converts from anything with data() and size(): std::vector, std::array, ...
template <class T>
class Span {
 public:
  // An empty span, a pointer and a length, an array, or anything with data() and size(); const may be added.
  FASTV_INLINE constexpr Span() noexcept {}
  FASTV_INLINE constexpr Span(T* data, std::size_t size) noexcept : data_(data), size_(size) {}
  template <std::size_t N>
  FASTV_INLINE constexpr Span(T (&array)[N]) noexcept : data_(array), size_(N) {}
  // Through a pointer to an array, since those convert by adding const alone, never from derived to base.
  template <class Container,
            class = decltype(detail::takes<T (*)[]>(detail::array_of(detail::made<Container&>().data())))>
  FASTV_INLINE constexpr Span(Container&& container) noexcept
      : data_(container.data()), size_(static_cast<std::size_t>(container.size())) {}

  // As std::span's; no index is checked.
  FASTV_INLINE constexpr T* data() const noexcept { return data_; }
  FASTV_INLINE constexpr std::size_t size() const noexcept { return size_; }
  FASTV_INLINE constexpr bool empty() const noexcept { return size_ == 0; }
  FASTV_INLINE constexpr T& operator[](std::size_t i) const noexcept { return data_[i]; }
  FASTV_INLINE constexpr T* begin() const noexcept { return data_; }
  FASTV_INLINE constexpr T* end() const noexcept { return data_ + size_; }
  FASTV_INLINE constexpr Span first(std::size_t count) const noexcept { return {data_, count}; }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

namespace detail {
template <class Pointer>
inline constexpr bool is_word = false;
template <>
inline constexpr bool is_word<std::int32_t*> = true;
template <>
inline constexpr bool is_word<const std::int32_t*> = true;
template <>
inline constexpr bool is_word<Index*> = true;
template <>
inline constexpr bool is_word<const Index*> = true;
FASTV_INLINE Span<Index> index_span(void* data, std::size_t size) noexcept { return {static_cast<Index*>(data), size}; }
FASTV_INLINE Span<const Index> index_span(const void* data, std::size_t size) noexcept {
  return {static_cast<const Index*>(data), size};
}
}  // namespace detail

// A list of 32-bit integers as one of Index, where it lies: most engines keep block tables as int32. Entries that are read
// must not be negative.
template <class List>
FASTV_INLINE auto as_index(List&& list) noexcept {
  static_assert(detail::is_word<decltype(list.data())>, "as_index() takes a list of 32-bit integers");
  return detail::index_span(list.data(), static_cast<std::size_t>(list.size()));
}

// TokenSpan::filtering_ratio where the Config decides.
inline constexpr double by_config = -1;

// Visual tokens first .. first + count - 1 of a prompt. One span is one image, one tile or one video frame. An image
// whose rows are set apart by tokens that are not candidates (AnyRes newlines) is several spans, all but the first of
// which `continue` it: they share one quota and one grid.
struct TokenSpan {
  std::size_t first;         // position of the first token
  std::size_t count;         // tokens; 0 only for an image of which earlier stages left nothing (original > 0)
  std::size_t columns = 0;   // of the image's grid, for rules that need it; 0: unknown. Read from its first span
  bool continues = false;    // part of the same image as the previous span
  std::size_t original = 0;  // tokens it had before earlier stages; 0: count. next_spans() sets it
  double filtering_ratio = by_config;  // R of this image alone, in [0, 1]. Read from its first span
};

// ---- shapes, in the order of memory -------------------------------------------------------------

// [tokens, heads, dim]: all heads of a token are adjacent.
struct TokenMajor {
  std::size_t tokens, heads, dim;   // extents
  std::ptrdiff_t token_stride = 0;  // elements from token to token; 0: heads * dim. For q, k and v packed in one row
};
// [heads, tokens, dim]: all tokens of a head are adjacent.
struct HeadMajor {
  std::size_t heads, tokens, dim;  // extents
  std::size_t capacity = 0;        // tokens each head has room for; 0: tokens
};
// [heads, chunks, tokens, chunk]: a vector is split into chunks of `chunk` elements (vLLM's key cache, whose chunks are
// 16 bytes). For the shape of one block.
struct ChunkedHeadMajor {
  std::size_t heads, chunks, tokens, chunk;  // extents
};

// Where a cache lies in pages. Token t is in block t / block_tokens of the sequence, which is block
// block_table[t / block_tokens] of the cache, or the memory that blocks[t / block_tokens] points at.
template <class T>
struct KeyPages {
  Span<const Index> block_table = {};  // of this sequence; empty: the cache is one piece, or blocks has pointers
  Span<const T* const> blocks = {};    // one pointer per block of this sequence, in place of a table
  std::size_t block_tokens = 0;        // tokens of a block
  std::ptrdiff_t block_stride = 0;     // elements from block to block of the cache, with a block_table
  std::size_t chunk = 0;               // elements of a chunk; 0: vectors are in one piece
  std::ptrdiff_t chunk_stride = 0;     // elements from chunk to chunk

  // Whether the cache lies in pages.
  FASTV_INLINE constexpr bool paged() const noexcept { return !block_table.empty() || !blocks.empty(); }
};

// Vectors of one layer, [heads, tokens, dim]: queries, keys or values, in whatever order the strides say. heads() makes
// it of a pointer and a shape.
template <class T>
struct Heads {
  const T* data;                             // head 0 of token 0; with pages, of block 0
  std::size_t heads, tokens, dim;            // extents
  std::ptrdiff_t head_stride, token_stride;  // elements from head to head and from token to token (within a block)
  KeyPages<T> pages = {};                    // of a paged cache
};

namespace detail {

// Last-resort overloads: anything converts to these, at the worst rank, so a wrong argument meets one static_assert
// instead of a list of candidates.
struct Anything {
  template <class T>
  FASTV_INLINE constexpr Anything(const T&) noexcept {}
};
template <class T>
inline constexpr bool is_heads = false;
template <class T>
inline constexpr bool is_heads<Heads<T>> = true;
// In place of a tensor that is read.
struct Unknown {
  template <class T>
  FASTV_INLINE constexpr Unknown(const T&) noexcept {
    static_assert(is_heads<T> || !is_pointer<T>,
                  "heads() takes a pointer to the elements and their shape, as in fastv::heads(data, "
                  "fastv::TokenMajor{tokens, heads, dim}); of pages, the shape of a block, its table as a list of "
                  "fastv::Index (fastv::as_index() of one of int32) and the number of tokens");
    static_assert(is_heads<T> || is_pointer<T>,
                  "fastv knows no view of this type here: include the adaptor of its engine (<fastv/eigen.hpp>, "
                  "<fastv/ggml.hpp>, <fastv/torch.hpp>), or hand over a pointer to the elements and their shape, as in "
                  "fastv::heads(data, fastv::TokenMajor{tokens, heads, dim})");
    static_assert(!is_heads<T>,
                  "query_key() takes two views and the scale of the logits, as in fastv::query_key(fastv::heads(q, "
                  "shape), fastv::heads(k, shape), 1 / std::sqrt(dim))");
  }
};
// An engine's tensor, whose adaptor must be told along which dimension its tokens lie.
template <class T>
inline constexpr bool needs_dimension = false;
// In place of a tensor whose rows are moved.
struct UnknownRows {
  template <class T>
  FASTV_INLINE constexpr UnknownRows(const T&) noexcept {
    static_assert(
        !needs_dimension<T>,
        "the dimension along which the tokens of this tensor lie is missing: it comes behind the tensor, as in "
        "fastv::compact(kept, tensor, 1), fastv::gather(...) and fastv::rows(tensor, 1)");
    static_assert(
        is_heads<T> || is_same<T, KvPages> || needs_dimension<T>,
        "fastv knows no rows of this type here: include the adaptor of its engine (<fastv/eigen.hpp>, "
        "<fastv/ggml.hpp>, <fastv/torch.hpp>), or hand over a pointer to the elements and their extents, as in "
        "fastv::rows(data, count, width)");
    static_assert(!is_heads<T>,
                  "heads are views to read: what is moved is fastv::rows(data, shape), of the same shape");
    static_assert(!is_same<T, KvPages>, "pages are moved by fastv::compact_pages(), repack_pages() or gather_pages()");
  }
};

// Products of sizes, and sizes as strides. Those that no memory could hold stay at the greatest rather than overflow, and
// are refused when the view is used.
inline constexpr std::size_t greatest_size = static_cast<std::size_t>(-1) / 2;
FASTV_INLINE constexpr std::size_t product(std::size_t a, std::size_t b) noexcept {
  return b != 0 && a > greatest_size / b ? greatest_size : a * b;
}
FASTV_INLINE constexpr std::ptrdiff_t as_stride(std::size_t entries) noexcept {
  return static_cast<std::ptrdiff_t>(entries < greatest_size ? entries : greatest_size);
}
FASTV_INLINE constexpr std::ptrdiff_t scaled(std::ptrdiff_t step, std::size_t count) noexcept {
  return step < 0 ? -as_stride(product(std::size_t{0} - static_cast<std::size_t>(step), count))
                  : as_stride(product(static_cast<std::size_t>(step), count));
}
}  // namespace detail

// Vectors in one piece: heads(key, TokenMajor{n, 8, 128}). T: an element type of element.hpp, or one with a to_float()
// of its own. Complexity: O(1), as all makers of views.
template <class T>
FASTV_INLINE constexpr Heads<T> heads(const T* data, const TokenMajor& shape) noexcept {
  static_assert(detail::has_to_float<T>,
                "this element type has no to_float(): where fp16 or bf16 is kept as uint16_t or another 16-bit type, "
                "say which, as in fastv::heads(fastv::as_half(data), shape) or fastv::as_bfloat16(data)");
  const std::ptrdiff_t dim = detail::as_stride(shape.dim);
  return {data,      shape.heads, shape.tokens,
          shape.dim, dim,         shape.token_stride != 0 ? shape.token_stride : detail::scaled(dim, shape.heads)};
}
// The same, head by head: heads(key, HeadMajor{8, n, 128}).
template <class T>
FASTV_INLINE constexpr Heads<T> heads(const T* data, const HeadMajor& shape) noexcept {
  static_assert(detail::has_to_float<T>,
                "this element type has no to_float(): where fp16 or bf16 is kept as uint16_t or another 16-bit type, "
                "say which, as in fastv::heads(fastv::as_half(data), shape) or fastv::as_bfloat16(data)");
  const std::size_t room = shape.capacity > shape.tokens ? shape.capacity : shape.tokens;
  return {data,
          shape.heads,
          shape.tokens,
          shape.dim,
          detail::as_stride(detail::product(room, shape.dim)),
          detail::as_stride(shape.dim)};
}

namespace detail {
template <class T>
FASTV_INLINE constexpr Heads<T> block_of(const T* data, const TokenMajor& shape) noexcept {
  Heads<T> view = fastv::heads(data, shape);
  view.pages.block_stride = scaled(view.token_stride, shape.tokens);
  return view;
}
template <class T>
FASTV_INLINE constexpr Heads<T> block_of(const T* data, const HeadMajor& shape) noexcept {
  Heads<T> view = fastv::heads(data, shape);
  view.pages.block_stride = scaled(view.head_stride, shape.heads);
  return view;
}
template <class T>
FASTV_INLINE constexpr Heads<T> block_of(const T* data, const ChunkedHeadMajor& shape) noexcept {
  Heads<T> view = fastv::heads(data, HeadMajor{shape.heads, shape.tokens, shape.chunk});
  view.dim = product(shape.chunks, shape.chunk);
  view.pages.chunk = shape.chunk;
  view.pages.chunk_stride = view.head_stride;
  view.head_stride = scaled(view.head_stride, shape.chunks);
  view.pages.block_stride = scaled(view.head_stride, shape.heads);
  return view;
}
}  // namespace detail

namespace detail {
// No blocks of no tokens would look like a cache in one piece; with one token each, what is missing is the table.
FASTV_INLINE constexpr std::size_t block_size(std::size_t tokens, bool no_blocks) noexcept {
  return tokens == 0 && no_blocks ? 1 : tokens;
}
}  // namespace detail

// Vectors in pages: heads(cache, HeadMajor{8, 16, 128}, block_table, n). shape: that of one block; block_table: of this
// sequence; tokens: how many it has. Blocks follow each other in the cache; where they are further apart, set
// pages.block_stride.
template <class T, class Shape>
FASTV_INLINE constexpr Heads<T> heads(const T* cache, const Shape& block, Span<const Index> block_table,
                                      std::size_t tokens) noexcept {
  Heads<T> view = detail::block_of(cache, block);
  view.pages.block_tokens = detail::block_size(block.tokens, block_table.empty());
  view.pages.block_table = block_table;
  view.tokens = tokens;
  return view;
}
// Blocks given by pointers, one per block of this sequence, each to the block's first vector.
template <class T, class Shape>
FASTV_INLINE constexpr Heads<T> heads(Span<const T* const> blocks, const Shape& block, std::size_t tokens) noexcept {
  Heads<T> view = detail::block_of(blocks.empty() ? nullptr : blocks[0], block);
  view.pages.block_tokens = detail::block_size(block.tokens, blocks.empty());
  view.pages.block_stride = 0;
  view.pages.blocks = blocks;
  view.tokens = tokens;
  return view;
}
template <class = void>
Heads<float> heads(detail::Unknown, detail::Anything = 0, detail::Anything = 0, detail::Anything = 0) noexcept;

// ---- bytes: what is moved -----------------------------------------------------------------------

// `planes` planes of `count` rows of `row_bytes` bytes: hidden states, position ids, masks and caches of any element
// type, quantised blocks included, since rows are only moved.
//
//   row(i, p) = data + p * plane_stride + i * row_stride
struct Rows {
  void* data;                       // of row 0 of plane 0; need not be aligned
  std::size_t count, row_bytes;     // rows of a plane, bytes of a row
  std::ptrdiff_t row_stride;        // bytes from row to row
  std::size_t planes = 1;           // planes that keep the same rows
  std::ptrdiff_t plane_stride = 0;  // bytes from plane to plane
  bool packed = false;              // compact() leaves the planes contiguous, [planes, kept], as position ids need it
};

namespace detail {
// What may be moved element by element: numbers, not the views of them.
template <class T>
inline constexpr bool is_value = __is_trivially_copyable(T) && sizeof(T) <= 8 && !is_pointer<T>;
template <class T>
inline constexpr bool is_value<Span<T>> = false;
template <>
inline constexpr bool is_value<void> = true;
template <class T>
inline constexpr std::size_t bytes_of = sizeof(T);
template <>
inline constexpr std::size_t bytes_of<void> = 1;
template <class T>
FASTV_INLINE constexpr void expect_values() noexcept {
  static_assert(
      is_value<T> || is_const<T>,
      "rows are moved as bytes: fastv::rows() takes a pointer to elements of at most 8 bytes; hand over blocks "
      "of a quantised type as unsigned char, and an engine's tensor by the rows(tensor, axis) of its adaptor");
  static_assert(!is_const<T>,
                "rows are moved in place: fastv::rows() takes a pointer to memory that may be written (only the source "
                "of gather() is not written: use const_cast for it)");
}
}  // namespace detail

// A tensor [count, width]. stride: elements from row to row; 0: width. A void* counts in bytes.
template <class T>
FASTV_INLINE constexpr Rows rows(T* data, std::size_t count, std::size_t width = 1,
                                 std::ptrdiff_t stride = 0) noexcept {
  detail::expect_values<T>();
  constexpr std::size_t bytes = detail::bytes_of<T>;
  void* const first = const_cast<void*>(static_cast<const void*>(data));
  return {first, count, detail::product(width, bytes),
          detail::scaled(stride != 0 ? stride : detail::as_stride(width), bytes)};
}
// A K or V cache: one plane, all heads of a token in a row; or a plane per head. Of a quantised cache, hand over
// unsigned char and the bytes of a head's vector as dim.
template <class T>
FASTV_INLINE constexpr Rows rows(T* data, const TokenMajor& shape) noexcept {
  return fastv::rows(data, shape.tokens, detail::product(shape.heads, shape.dim), shape.token_stride);
}
template <class T>
FASTV_INLINE constexpr Rows rows(T* data, const HeadMajor& shape) noexcept {
  Rows view = fastv::rows(data, shape.tokens, shape.dim);
  const std::size_t room = shape.capacity > shape.tokens ? shape.capacity : shape.tokens;
  view.planes = shape.heads;
  view.plane_stride = detail::scaled(view.row_stride, room);
  return view;
}
template <class = void>
Rows rows(detail::UnknownRows, detail::Anything = 0, detail::Anything = 0, detail::Anything = 0) noexcept;

// Position ids of several axes, [axes, count] (M-RoPE: 3 or 4). compact() leaves [axes, kept], without gaps.
template <class T>
FASTV_INLINE constexpr Rows position_axes(T* data, std::size_t axes, std::size_t count) noexcept {
  Rows view = fastv::rows(data, count);
  view.planes = axes;
  view.plane_stride = detail::scaled(view.row_stride, count);
  view.packed = true;
  return view;
}

// A cache in pages, to be moved: token t of the sequence is row t % block_tokens of block t / block_tokens, which is
// block block_table[t / block_tokens] of the cache, or what blocks[t / block_tokens] points at. Within a block, rows and
// planes are as in Rows:
//
//   [block, token, head, dim]         planes 1, row = all heads of a token
//   [block, head, token, dim]         planes heads, row = one head of a token
//   [block, head, dim/x, token, x]    planes heads * dim/x, row = x elements (vLLM's keys)
struct KvPages {
  void* data;                       // of block 0 of the cache; null where blocks has pointers
  Span<Index> block_table;          // of this sequence; repack_pages() reorders it, compact_pages() leaves it as it is
  std::size_t block_tokens;         // rows of a block
  std::ptrdiff_t block_stride;      // bytes from block to block
  std::size_t count, row_bytes;     // tokens in use, bytes of a row
  std::ptrdiff_t row_stride;        // bytes from row to row within a block
  std::size_t planes = 1;           // planes within a block
  std::ptrdiff_t plane_stride = 0;  // bytes from plane to plane within a block
  Span<void* const> blocks = {};    // one pointer per block of this sequence, in place of a table
};

namespace detail {
template <class T>
FASTV_INLINE constexpr Rows block_rows(T* data, const TokenMajor& shape) noexcept {
  return fastv::rows(data, shape);
}
template <class T>
FASTV_INLINE constexpr Rows block_rows(T* data, const HeadMajor& shape) noexcept {
  return fastv::rows(data, shape);
}
template <class T>
FASTV_INLINE constexpr Rows block_rows(T* data, const ChunkedHeadMajor& shape) noexcept {
  return fastv::rows(data, HeadMajor{product(shape.heads, shape.chunks), shape.tokens, shape.chunk});
}
}  // namespace detail

// A paged cache, from the shape of one block: pages(cache, HeadMajor{8, 16, 128}, block_table, n).
template <class T, class Shape>
FASTV_INLINE constexpr KvPages pages(T* cache, const Shape& block, Span<Index> block_table,
                                     std::size_t tokens) noexcept {
  const Rows view = detail::block_rows(cache, block);
  const std::ptrdiff_t reach = view.plane_stride != 0 ? detail::scaled(view.plane_stride, view.planes)
                                                      : detail::scaled(view.row_stride, block.tokens);
  return {cache,           block_table, block.tokens,     reach, tokens, view.row_bytes,
          view.row_stride, view.planes, view.plane_stride};
}
// The same with blocks given by pointers, one per block of this sequence. T: the cache's element type.
template <class T, class Shape>
FASTV_INLINE constexpr KvPages pages(Span<void* const> blocks, const Shape& block, std::size_t tokens) noexcept {
  const Rows view = detail::block_rows(static_cast<T*>(nullptr), block);
  return {nullptr,         {},          block.tokens,      0,     tokens, view.row_bytes,
          view.row_stride, view.planes, view.plane_stride, blocks};
}

}  // namespace fastv

#include "detail/end.hpp"

// fastv: non-owning views of the engine's tensors.
//
// Nothing here allocates, copies or owns. Typed views carry strides in elements, byte views in bytes. A view that the
// caller filled wrongly (null data, no heads, negative or overlapping strides) is found by check() when it is used,
// and reported as an Errc; see error.hpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastv {

namespace detail {

// The little of <type_traits> that views need; the header itself is 3,000 lines. Never defined: for decltype only.
template <class T>
T&& made() noexcept;
template <class T>
auto array_of(T*) noexcept -> T (*)[];
template <class T>
void takes(T) noexcept;
template <class T, class U>
inline constexpr bool is_same = false;
template <class T>
inline constexpr bool is_same<T, T> = true;

// Parameters of overloads that stand behind all others, since a user's conversion is the worst: a tensor type which no
// real overload knows ends in a sentence that says what to do, not in a list of candidates.
struct Anything {
  template <class T>
  constexpr Anything(const T&) noexcept {}
};
struct Unknown {
  template <class T>
  constexpr Unknown(const T&) noexcept {
    static_assert(!is_same<T, T>,
                  "fastv knows no view of this type here: include <fastv/eigen.hpp>, <fastv/ggml.hpp> or "
                  "<fastv/torch.hpp> for the tensors of these engines, or hand over a pointer to the elements and "
                  "their sizes, as in fastv::rows(data, count, width)");
  }
};

// A ggml_tensor, whose own bytes are not its elements'.
template <class T, class = void>
inline constexpr bool is_ggml_tensor = false;
template <class T>
inline constexpr bool is_ggml_tensor<T, decltype(static_cast<void>(made<T&>().ne), static_cast<void>(made<T&>().nb))> =
    true;

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
  constexpr Span() noexcept = default;
  constexpr Span(T* data, std::size_t size) noexcept : data_(data), size_(size) {}
  template <std::size_t N>
  constexpr Span(T (&array)[N]) noexcept : data_(array), size_(N) {}
  // Through a pointer to an array, since those convert by adding const alone, never from derived to base.
  template <class Container,
            class = decltype(detail::takes<T (*)[]>(detail::array_of(detail::made<Container&>().data())))>
  constexpr Span(Container&& container) noexcept
      : data_(container.data()), size_(static_cast<std::size_t>(container.size())) {}

  // As std::span's; no index is checked.
  constexpr T* data() const noexcept { return data_; }
  constexpr std::size_t size() const noexcept { return size_; }
  constexpr bool empty() const noexcept { return size_ == 0; }
  constexpr T& operator[](std::size_t i) const noexcept { return data_[i]; }
  constexpr T* begin() const noexcept { return data_; }
  constexpr T* end() const noexcept { return data_ + size_; }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

// Visual tokens first .. first + count - 1 of a prompt. One span is one image, one tile or one video frame. A picture
// whose rows are set apart by tokens that are not to compete (AnyRes newlines) is several spans, all but the first of
// which `continue` it: they share one quota and one grid.
struct TokenSpan {
  // Position of the first token in the prompt, and how many follow each other.
  std::size_t first;
  std::size_t count;
  std::size_t columns = 0;   // of the picture's grid, for rules that need it; 0: unknown. Read from its first span
  bool continues = false;    // the picture of the span ahead
  std::size_t original = 0;  // tokens it had before earlier stages; 0: count. remaining() sets it
};

// ---- evidence: what the visual tokens are scored by ---------------------------------------------

// Attention probabilities of layer K-1, after the softmax.
//
// Shape [heads, rows, keys]. The last keys belong to the prompt at hand; `past` keys ahead of them are earlier
// turns', attended to but no candidates. Row r belongs to prompt position keys - past - rows + r: an engine that only
// has the last prompt token's row hands over one row. Entries a row cannot see must be zero, as a causal softmax
// leaves them. Build it with probabilities(), or fill the strides (in elements) by hand.
template <class T>
struct Probabilities {
  // [heads, rows, keys], strides in elements, and leading keys that are no candidates; see above.
  const T* data;
  std::size_t heads, rows, keys;
  std::ptrdiff_t head_stride, row_stride;
  std::ptrdiff_t key_stride = 1;
  std::size_t past = 0;
  std::size_t heads_total = 0;         // of all ranks, where heads are sharded: scores are then partial sums
  Span<const float> value_norms = {};  // see value_norms() in scorers.hpp; empty: unweighted
};

// Contiguous probabilities [heads, rows, keys].
template <class T>
Probabilities<T> probabilities(const T* data, std::size_t heads, std::size_t rows, std::size_t keys) noexcept {
  return {data, heads, rows, keys, static_cast<std::ptrdiff_t>(rows * keys), static_cast<std::ptrdiff_t>(keys)};
}
template <class = void>
Probabilities<float> probabilities(detail::Unknown, detail::Anything = 0, detail::Anything = 0,
                                   detail::Anything = 0) noexcept;

// Where a cache lies in pages: token t is in block block_table[t / block_tokens], block_stride elements apart. A
// head's vector may be split into chunks of `chunk` elements, chunk_stride apart (vLLM's key cache); 0: it is in one
// piece.
struct Pages {
  Span<const Index> block_table = {};  // empty: the cache is one piece
  // Tokens of a block, elements from block to block, elements of a chunk and from chunk to chunk; see above.
  std::size_t block_tokens = 0;
  std::ptrdiff_t block_stride = 0;
  std::size_t chunk = 0;
  std::ptrdiff_t chunk_stride = 0;
};

// The keys or values of one layer: [heads, tokens, dim], in whatever order the strides (in elements) say.
template <class T>
struct HeadVectors {
  // [KV heads, tokens, dim], strides in elements; elements of a vector are adjacent, or as pages says.
  const T* data;
  std::size_t heads, tokens, dim;
  std::ptrdiff_t head_stride, token_stride;
  Pages pages = {};
};

// Queries and keys of layer K-1, after RoPE, for engines with fused attention. Scoring costs one product of each
// query row with the keys and a softmax, never an n x n map.
//
// query: [heads, rows, dim]. Row r belongs to prompt position keys - past - rows + r. Elements of a head's row are
//        adjacent.
// key:   [kv_heads, keys, dim]; query head h reads KV head h / (heads / kv_heads), the grouping of GQA and MQA. The
// last
//        keys belong to the prompt at hand; `past` keys ahead of them are
//        earlier turns', no candidates.
// The logit of a key is  scale * q.k,  then  soft_cap * tanh(logit / soft_cap) where soft_cap > 0 (Gemma 2), then +
// bias[key]  where a bias row is given (-infinity hides a key, as padding masks do).
template <class Q, class K = Q>
struct QueryKey {
  // [heads, rows, dim], strides in elements.
  const Q* query;
  std::size_t heads, rows, dim;
  std::ptrdiff_t query_head_stride, query_row_stride;

  // [kv_heads, keys, dim], strides in elements.
  const K* key;
  std::size_t kv_heads, keys;
  std::ptrdiff_t key_head_stride, key_token_stride;

  float scale;                         // 1 / sqrt(dim) in most models
  float soft_cap = 0;                  // 0: none
  Span<const float> bias = {};         // [keys] or empty
  bool causal = true;                  // a row sees the keys up to its own position; false: all keys
  std::size_t past = 0;                // leading keys that are no candidates
  std::size_t heads_total = 0;         // of all ranks, where heads are sharded: scores are then partial sums
  Span<const float> value_norms = {};  // see value_norms() in scorers.hpp; empty: unweighted
  Pages pages = {};                    // of the keys
};

// The keys of the evidence by themselves.
template <class Q, class K>
HeadVectors<K> keys_of(const QueryKey<Q, K>& evidence) noexcept {
  return {evidence.key,  evidence.kv_heads,        evidence.keys,
          evidence.dim,  evidence.key_head_stride, evidence.key_token_stride,
          evidence.pages};
}

// The strides of both usual cache layouts.
enum class KvLayout {
  token_major,  // [token, kv head, dim]
  head_major    // [kv head, token, dim]
};

// A contiguous cache in one of the two usual layouts. capacity: tokens a head-major plane has room for.
template <class T>
HeadVectors<T> head_vectors(const T* data, std::size_t heads, std::size_t tokens, std::size_t dim, KvLayout layout,
                            std::size_t capacity = 0) noexcept {
  const auto d = static_cast<std::ptrdiff_t>(dim);
  const auto room = static_cast<std::ptrdiff_t>(capacity > tokens ? capacity : tokens);
  if (layout == KvLayout::token_major) return {data, heads, tokens, dim, d, d * static_cast<std::ptrdiff_t>(heads)};
  return {data, heads, tokens, dim, d * room, d};
}

// Contiguous query [rows, heads, dim] and any keys.
template <class Q, class K>
QueryKey<Q, K> query_key(const Q* query, std::size_t heads, std::size_t rows, const HeadVectors<K>& keys,
                         float scale) noexcept {
  const auto d = static_cast<std::ptrdiff_t>(keys.dim);
  QueryKey<Q, K> evidence{query,
                          heads,
                          rows,
                          keys.dim,
                          d,
                          d * static_cast<std::ptrdiff_t>(heads),
                          keys.data,
                          keys.heads,
                          keys.tokens,
                          keys.head_stride,
                          keys.token_stride,
                          scale};
  evidence.pages = keys.pages;
  return evidence;
}

// Contiguous query [rows, heads, dim] and key cache in one of the two usual layouts.
template <class Q, class K>
QueryKey<Q, K> query_key(const Q* query, std::size_t heads, std::size_t rows, const K* key, std::size_t kv_heads,
                         std::size_t keys, std::size_t dim, float scale, KvLayout layout,
                         std::size_t capacity = 0) noexcept {
  return query_key(query, heads, rows, head_vectors(key, kv_heads, keys, dim, layout, capacity), scale);
}
template <class = void>
QueryKey<float> query_key(detail::Unknown, detail::Anything, detail::Anything = 0, detail::Anything = 0,
                          detail::Anything = 0, detail::Anything = 0, detail::Anything = 0, detail::Anything = 0,
                          detail::Anything = 0, detail::Anything = 0) noexcept;

// The keys alone, for the query-free rule of scorers.hpp: engines that must prune before the question has arrived.
template <class K>
struct KeysOnly {
  // The keys of layer K-1, and how many leading ones are no candidates.
  HeadVectors<K> keys;
  std::size_t past = 0;
};

// Scores the engine computed itself: one per visual token, spans in order; a Pruner<float> rounds doubles, so that
// close ones may tie. tokens: length of the prompt.
template <class T>
struct Scores {
  // One score per visual token, and the length of the prompt.
  Span<const T> values;
  std::size_t tokens;
};

// For the selection rules that look at no score (random, uniform). tokens: length of the prompt.
struct NoEvidence {
  std::size_t tokens;  // length of the prompt
};

// ---- bytes: what is moved -----------------------------------------------------------------------

// `planes` planes of `count` rows of `row_bytes` bytes: hidden states, position ids, masks and caches of any element
// type, quantised blocks included, since rows are only moved. Row i of plane p starts at data + p * plane_stride + i
// * row_stride (bytes).
struct Rows {
  // [planes, count, row_bytes], strides in bytes; see above.
  void* data;
  std::size_t count, row_bytes;
  std::ptrdiff_t row_stride;
  std::size_t planes = 1;
  std::ptrdiff_t plane_stride = 0;
};

// A contiguous tensor [count, width].
template <class T>
Rows rows(T* data, std::size_t count, std::size_t width = 1) noexcept {
  static_assert(!detail::is_ggml_tensor<T>,
                "the rows of a ggml_tensor are fastv::token_rows(tensor, axis) of <fastv/ggml.hpp>");
  static_assert(__is_trivially_copyable(T), "rows are moved as bytes");
  return {data, count, width * sizeof(T), static_cast<std::ptrdiff_t>(width * sizeof(T))};
}
template <class = void>
Rows rows(detail::Unknown, detail::Anything = 0, detail::Anything = 0) noexcept;

// Contiguous position ids of several axes, [axes, count] (M-RoPE: 3 or 4).
template <class T>
Rows position_axes(T* data, std::size_t axes, std::size_t count) noexcept {
  static_assert(__is_trivially_copyable(T), "rows are moved as bytes");
  return {data, count, sizeof(T), sizeof(T), axes, static_cast<std::ptrdiff_t>(count * sizeof(T))};
}

// One K or V cache of `count` tokens in either layout; element_bytes may be fractional in a quantised cache, so a
// head's vector is given in bytes. capacity: tokens a head-major plane has room for.
inline Rows kv_rows(void* data, std::size_t count, std::size_t kv_heads, std::size_t head_bytes, KvLayout layout,
                    std::size_t capacity = 0) noexcept {
  const auto bytes = static_cast<std::ptrdiff_t>(head_bytes);
  if (layout == KvLayout::token_major)
    return {data, count, kv_heads * head_bytes, static_cast<std::ptrdiff_t>(kv_heads) * bytes};
  return {data,  count,    head_bytes,
          bytes, kv_heads, bytes * static_cast<std::ptrdiff_t>(capacity > count ? capacity : count)};
}

// A cache in pages: token t of the sequence is row t % block_tokens of block block_table[t / block_tokens], and that
// block starts at data + block * block_stride (bytes). Within a block, rows and planes are as in Rows:
//   [block, token, kv head, dim]              row_bytes = all heads of a token,
//   one plane [block, kv head, token, dim]              row_bytes = one head of
//   a token, a plane per head [block, kv head, dim / x, token, x] row_bytes = x
//   elements, a plane per head and x (vLLM's key cache)
struct PagedRows {
  void* data;               // of block 0
  Span<Index> block_table;  // of this sequence; compact() reorders it
  // Rows of a block, bytes from block to block; tokens in use, bytes of a row; strides in bytes within a block.
  std::size_t block_tokens;
  std::ptrdiff_t block_stride;
  std::size_t count, row_bytes;
  std::ptrdiff_t row_stride;
  std::size_t planes = 1;
  std::ptrdiff_t plane_stride = 0;
};

}  // namespace fastv

// fastv: non-owning views of the engine's tensors.
//
// Nothing here allocates, copies or owns. Typed views carry strides in elements, byte views in bytes.
// A view that the caller filled wrongly (null data, no heads, negative or overlapping strides) is
// found by check() when it is used, and reported as an Errc; see config.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace fastv {

// Position of a token in the prompt, or of a row in a tensor. Prompts hold at most max_tokens tokens.
using Index = std::uint32_t;
inline constexpr std::size_t max_tokens = 0x7fffffff;

// ---- ranges -------------------------------------------------------------------------------------

// A pointer and a length. Converts from anything with data() and size(): std::vector, std::array, ...
template <class T>
class Span {
 public:
  constexpr Span() noexcept = default;
  constexpr Span(T* data, std::size_t size) noexcept : data_(data), size_(size) {}
  template <std::size_t N>
  constexpr Span(T (&array)[N]) noexcept : data_(array), size_(N) {}
  template <class Container, class Pointer = decltype(std::declval<Container&>().data()),
            class = std::enable_if_t<std::is_convertible<std::remove_pointer_t<Pointer> (*)[], T (*)[]>::value>>
  constexpr Span(Container&& container) noexcept
      : data_(container.data()), size_(static_cast<std::size_t>(container.size())) {}

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

// The visual tokens first .. first + count - 1 of a prompt: one image, one tile or one video frame.
struct TokenSpan {
  std::size_t first;
  std::size_t count;
  std::size_t columns = 0;  // patches in a row of the picture, for rules that need the grid; 0: unknown
};

// ---- evidence: what the visual tokens are scored by ---------------------------------------------

// Attention probabilities of layer K-1, after the softmax.
//
// Shape [heads, rows, keys]. Row r belongs to prompt position keys - rows + r: an engine that only has
// the last prompt token's row hands over one row. Entries a row cannot see must be zero, as a causal
// softmax leaves them. Build it with probabilities(), or fill the strides (in elements) by hand.
template <class T>
struct Probabilities {
  const T* data;
  std::size_t heads, rows, keys;
  std::ptrdiff_t head_stride, row_stride;
  std::ptrdiff_t key_stride = 1;
};

template <class T>
Probabilities<T> probabilities(const T* data, std::size_t heads, std::size_t rows, std::size_t keys) noexcept {
  return {data, heads, rows, keys, static_cast<std::ptrdiff_t>(rows * keys), static_cast<std::ptrdiff_t>(keys)};
}

// Queries and keys of layer K-1, after RoPE, for engines with fused attention. Scoring costs one
// product of each query row with the keys and a softmax, never an n x n map.
//
// query: [heads, rows, dim]. Row r belongs to prompt position keys - rows + r. Elements of a head's row
//        are adjacent.
// key:   [kv_heads, keys, dim], in whatever order the strides (in elements) say; query head h reads KV
//        head h / (heads / kv_heads), the grouping of GQA and MQA.
// The logit of a key is  scale * q.k,  then  soft_cap * tanh(logit / soft_cap)  where soft_cap > 0
// (Gemma 2), then  + bias[key]  where a bias row is given (-infinity hides a key, as padding masks do).
template <class Q, class K = Q>
struct QueryKey {
  const Q* query;
  std::size_t heads, rows, dim;
  std::ptrdiff_t query_head_stride, query_row_stride;

  const K* key;
  std::size_t kv_heads, keys;
  std::ptrdiff_t key_head_stride, key_token_stride;

  float scale;  // 1 / sqrt(dim) in most models
  float soft_cap = 0;
  Span<const float> bias = {};  // [keys] or empty
  bool causal = true;           // a row sees the keys up to its own position; false: all keys
};

// The strides of both usual cache layouts; the fields of QueryKey and of KvCache (apply.hpp).
enum class KvLayout {
  token_major,  // [token, kv head, dim]
  head_major    // [kv head, token, dim]
};

// Contiguous query [rows, heads, dim] and key cache in one of the two usual layouts.
// capacity: tokens a head's part of a head-major cache has room for (at least keys).
template <class Q, class K>
QueryKey<Q, K> query_key(const Q* query, std::size_t heads, std::size_t rows, const K* key, std::size_t kv_heads,
                         std::size_t keys, std::size_t dim, float scale, KvLayout layout,
                         std::size_t capacity = 0) noexcept {
  const auto d = static_cast<std::ptrdiff_t>(dim);
  const auto room = static_cast<std::ptrdiff_t>(capacity > keys ? capacity : keys);
  const bool by_token = layout == KvLayout::token_major;
  return {query,
          heads,
          rows,
          dim,
          d,
          d * static_cast<std::ptrdiff_t>(heads),
          key,
          kv_heads,
          keys,
          by_token ? d : d * room,
          by_token ? d * static_cast<std::ptrdiff_t>(kv_heads) : d,
          scale};
}

// Scores the engine computed itself: one per visual token, spans in order. tokens: length of the prompt.
template <class T>
struct Scores {
  Span<const T> values;
  std::size_t tokens;
};

// For the selection rules that look at no score (random, uniform). tokens: length of the prompt.
struct NoEvidence {
  std::size_t tokens;
};

// ---- bytes: what is moved -----------------------------------------------------------------------

// `planes` planes of `count` rows of `row_bytes` bytes: hidden states, position ids, masks and caches of
// any element type, quantised blocks included, since rows are only moved. Row i of plane p starts at
// data + p * plane_stride + i * row_stride (bytes).
struct Rows {
  void* data;
  std::size_t count, row_bytes;
  std::ptrdiff_t row_stride;
  std::size_t planes = 1;
  std::ptrdiff_t plane_stride = 0;
};

// A contiguous tensor [count, width].
template <class T>
Rows rows(T* data, std::size_t count, std::size_t width = 1) noexcept {
  static_assert(std::is_trivially_copyable<T>::value, "rows are moved as bytes");
  return {data, count, width * sizeof(T), static_cast<std::ptrdiff_t>(width * sizeof(T))};
}

// Contiguous position ids of several axes, [axes, count] (M-RoPE: 3 or 4).
template <class T>
Rows position_axes(T* data, std::size_t axes, std::size_t count) noexcept {
  static_assert(std::is_trivially_copyable<T>::value, "rows are moved as bytes");
  return {data, count, sizeof(T), sizeof(T), axes, static_cast<std::ptrdiff_t>(count * sizeof(T))};
}

// One K or V cache of `count` tokens in either layout; element_bytes may be fractional in a quantised
// cache, so a head's vector is given in bytes. capacity: tokens a head-major plane has room for.
inline Rows kv_rows(void* data, std::size_t count, std::size_t kv_heads, std::size_t head_bytes, KvLayout layout,
                    std::size_t capacity = 0) noexcept {
  const auto bytes = static_cast<std::ptrdiff_t>(head_bytes);
  if (layout == KvLayout::token_major)
    return {data, count, kv_heads * head_bytes, static_cast<std::ptrdiff_t>(kv_heads) * bytes};
  return {data,  count,    head_bytes,
          bytes, kv_heads, bytes * static_cast<std::ptrdiff_t>(capacity > count ? capacity : count)};
}

}  // namespace fastv

// fastv: what fastv/cuda.cuh takes and hands back: tensors in device memory, requests, limits. Plain C++, so that a
// scheduler compiled without nvcc may fill it in.
//
// Shapes and settings are the core's own (view.hpp, config.hpp). What differs is where the numbers lie: every pointer
// here is one of device memory, which the host hands on and never reads. Sizes are the host's.
#pragma once

#include "pruner.hpp"

#include "detail/begin.hpp"

namespace fastv {

namespace cuda {
template <class T>
struct Heads;
}  // namespace cuda

namespace detail {
namespace gpu {
template <class T>
inline constexpr bool is_device_heads = false;
template <class T>
inline constexpr bool is_device_heads<cuda::Heads<T>> = true;
// In place of a tensor in device memory.
struct Unknown {
  template <class T>
  FASTV_INLINE constexpr Unknown(const T&) noexcept {
    static_assert(
        is_device_heads<T>,
        "fastv::cuda reads device memory: make its views by fastv::cuda::heads(device_pointer, shape); a view "
        "made by fastv::heads() is one of host memory");
  }
};
}  // namespace gpu
}  // namespace detail

namespace cuda {

// ---- vectors ------------------------------------------------------------------------------------

// Queries or keys of one layer in device memory, of all sequences of a batch. heads() makes it.
//
// In one piece, the batch is packed: `layout.tokens` rows, of which Request says which are a sequence's. In pages, the
// rows are those of a sequence's own blocks, found through its row of `block_tables` or `block_pointers`.
template <class T>
struct Heads {
  fastv::Heads<T> layout;                      // data, extents and strides; in pages, of block 0
  const std::int32_t* block_tables = nullptr;  // [sequences, pages] in device memory: numbers of blocks
  const T* const* block_pointers = nullptr;    // [sequences, pages] in device memory: where blocks begin
  std::size_t pages = 0;                       // entries of a table's row; 0: in one piece
  std::ptrdiff_t offset = 0;                   // elements from where a block begins to what is meant, with pointers
};

// Vectors in one piece, packed over the batch: heads(key, TokenMajor{rows, 8, 128}). shape.tokens: rows of all
// sequences.
template <class T, class Shape>
FASTV_INLINE constexpr Heads<T> heads(const T* data, const Shape& shape) noexcept {
  return {fastv::heads(data, shape)};
}
// Vectors in pages of one cache: heads(cache, HeadMajor{8, 16, 128}, block_tables, pages). block: the shape of one block,
// TokenMajor (FlashInfer NHD, vLLM), HeadMajor (FlashInfer HND) or ChunkedHeadMajor (vLLM's x-split keys); block_tables:
// [sequences, pages] int32 in device memory. Blocks follow each other in the cache; where they are further apart (K and
// V side by side in one), set layout.pages.block_stride.
template <class T, class Shape>
FASTV_INLINE constexpr Heads<T> heads(const T* cache, const Shape& block, const std::int32_t* block_tables,
                                      std::size_t pages) noexcept {
  Heads<T> view{detail::block_of(cache, block)};
  view.layout.pages.block_tokens = block.tokens;
  view.block_tables = block_tables;
  view.pages = pages;
  return view;
}
// Vectors in pages given by pointers (turbomind): [sequences, pages] of them in device memory, each to the first vector
// of its block. offset: elements from there to what is meant, where a block holds all layers, keys and values.
template <class T, class Shape>
FASTV_INLINE constexpr Heads<T> heads(const T* const* block_pointers, const Shape& block, std::size_t pages,
                                      std::ptrdiff_t offset = 0) noexcept {
  Heads<T> view{detail::block_of(static_cast<const T*>(nullptr), block)};
  view.layout.pages.block_tokens = block.tokens;
  view.block_pointers = block_pointers;
  view.pages = pages;
  view.offset = offset;
  return view;
}

// ---- evidence -----------------------------------------------------------------------------------

// Rotation of queries that come without it: pair i of query row r by the angle positions[axis[i]][r] * frequencies[i].
// All pointers: device memory.
struct Rope {
  const float* frequencies = nullptr;       // [pairs]
  std::size_t pairs = 0;                    // 0: no rotation. Fewer than dim / 2: partial rotary
  const std::int32_t* positions = nullptr;  // [axes, axis_stride], of every row of the query tensor
  std::size_t axis_stride = 0;              // from axis to axis; of one axis it is not read
  const unsigned char* axis = nullptr;      // [pairs], M-RoPE's section of each pair; null: axis 0
  RopeLayout layout = RopeLayout::half;     // which elements are a pair
};

// Queries and keys of the layer below the stage, as fastv::QueryKey; the same formula, term by term. query_key() makes
// it. All pointers: device memory, float where not said otherwise.
template <class Q, class K = Q>
struct QueryKey {
  Heads<Q> query;                         // rows of all sequences; see Request::query_row
  Heads<K> key;                           // packed or paged; see Request::key_row
  float scale;                            // 1 / sqrt(dim) in most models
  float soft_cap = 0;                     // 0: none
  const float* bias = nullptr;            // [key rows]: of key j of sequence i, bias[key_row of i + j]; -infinity hides
  const float* sinks = nullptr;           // [heads]
  const float* alibi = nullptr;           // [heads]
  Heads<float> key_scales = {};           // [.., kv heads, 1] as the keys lie, or none: scales of an int8 cache
  bool causal = true;                     // a row sees the keys up to its own position; false: all keys
  const std::int32_t* visible = nullptr;  // [query rows]: tokens of the sequence that each row sees, in place of causal
  std::size_t window = 0;                 // sliding window, in tokens; 0: all
  std::size_t heads_total = 0;            // of all ranks; more than heads, sums would be partial: refused
  const float* value_norms = nullptr;     // [kv heads, visual tokens of the batch]
  const Q* query_bias = nullptr;          // [heads, dim], added to a query that comes without it, before RoPE
  Rope rope = {};                         // applied to a query that comes without it
};
// query_key(heads(q, TokenMajor{rows, 32, 128}), heads(k, TokenMajor{rows, 8, 128}), 1 / std::sqrt(128.0f))
template <class Q, class K>
FASTV_INLINE constexpr QueryKey<Q, K> query_key(const Heads<Q>& query, const Heads<K>& key, float scale) noexcept {
  return {query, key, scale};
}
template <class = void>
QueryKey<float> query_key(detail::gpu::Unknown, detail::gpu::Unknown, detail::Anything = 0) noexcept;

// Attention probabilities, after the softmax, [sequences, heads, query rows, keys], in device memory; Request::table_row says which
// sequence is whose. Query row r belongs to position tokens - queries + r of the prompt, with queries as in Request; key j is
// token first_key + j of the sequence.
template <class T>
struct Probabilities {
  const T* data;                       // of sequence 0
  std::size_t heads, queries, keys;    // extents
  std::ptrdiff_t sequence_stride;      // elements from sequence to sequence
  std::ptrdiff_t head_stride;          // elements from head to head
  std::ptrdiff_t query_stride;         // elements from query row to query row
  std::ptrdiff_t key_stride = 1;       // elements from key to key
  std::size_t heads_total = 0;         // of all ranks; more than heads: refused
  const float* value_norms = nullptr;  // [norm heads, visual tokens of the batch]
  std::size_t norm_heads = 0;          // KV heads of value_norms; 0: heads
};
// Contiguous ones.
template <class T>
FASTV_INLINE constexpr Probabilities<T> probabilities(const T* data, std::size_t heads, std::size_t queries,
                                                      std::size_t keys) noexcept {
  const std::ptrdiff_t row = detail::as_stride(keys), head = detail::scaled(row, queries);
  return {data, heads, queries, keys, detail::scaled(head, heads), head, row};
}

// The keys alone, as fastv::KeysOnly: minus the mean of their lengths over KV heads, for prompts whose question has not
// arrived. Keys are found as those of QueryKey. All pointers: device memory.
template <class K>
struct KeysOnly {
  Heads<K> key;                  // of the layer below the stage; see Request::key_row
  Heads<float> key_scales = {};  // [.., kv heads, 1] as the keys lie, or none: scales of an int8 cache
};
template <class K>
KeysOnly(Heads<K>) -> KeysOnly<K>;

// Scores the engine computed itself, [visual tokens of the batch], in device memory.
struct Scores {
  const float* values;  // in the order of the sequences and their visual tokens
};

// For batches of which no rule looks at scores (random, uniform, diverse with a weight and a protected share of 0).
struct NoEvidence {};

// Which row of features is a token's.
enum class FeaturesAt {
  keys,   // that of its key: vectors lie as keys, packed or paged; see Request::key_row
  rows,   // that of its hidden state in the packed batch
  visual  // that of its number among the visual tokens of the batch
};

// What Selection::diverse compares tokens by, as fastv::Features: the keys of the layer below the stage, hidden rows,
// heads(hidden, TokenMajor{rows, 1, width}), or your own. All pointers: device memory.
template <class T>
struct Features {
  Heads<T> vectors;                  // of all sequences
  FeaturesAt at = FeaturesAt::keys;  // how rows are found
  bool mean_of_heads = false;        // true: the mean of the heads, [dim]; false: all heads side by side, [heads * dim]
  std::size_t projected = 0;         // elements they are projected to, as in fastv::Features; 0: as they are
  Heads<float> scales = {};          // [.., heads, 1] as the vectors lie, or none: scales of an int8 cache

  FASTV_INLINE constexpr std::size_t width() const noexcept {  // floats of one token
    const std::size_t all = mean_of_heads ? vectors.layout.dim : vectors.layout.heads * vectors.layout.dim;
    return projected != 0 && projected < all ? projected : all;
  }
};
// Evidence of any kind and features beside it, for batches of which some rule is Selection::diverse. with_features() makes it.
template <class Evidence, class T>
struct WithFeatures {
  Evidence evidence;     // what the tokens are scored by
  Features<T> features;  // what they are compared by
};
// with_features(qk, Features<half>{...})
template <class Evidence, class T>
FASTV_INLINE constexpr WithFeatures<Evidence, T> with_features(const Evidence& evidence,
                                                               const Features<T>& features) noexcept {
  return {evidence, features};
}
// with_features(qk, qk.key): by keys as they are.
template <class Evidence, class T>
FASTV_INLINE constexpr WithFeatures<Evidence, T> with_features(const Evidence& evidence,
                                                               const Heads<T>& vectors) noexcept {
  return {evidence, {vectors}};
}

// ---- requests -----------------------------------------------------------------------------------

// Request::query_row, key_row and table_row where they follow from the rest.
inline constexpr std::size_t by_order = static_cast<std::size_t>(-1);

// One sequence of a batch, as fastv::Request, and where its queries and keys lie. The first four suffice where hidden
// states, queries and keys are packed alike and nothing came before the prompt.
struct Request {
  Config config;                      // of its first stage; a list of rows in it is read by plan()
  Span<const TokenSpan> visual;       // positions within the sequence; empty: it passes untouched
  std::size_t first;                  // its first row in the packed hidden states
  std::size_t tokens;                 // its length, without padding
  Span<const Config> later = {};      // its later stages, filtering layers ascending
  std::size_t queries = 0;            // query rows at hand, the last of the prompt; 0: all
  std::size_t query_row = by_order;   // of the query tensor, the first of them; by_order: see plan()
  std::size_t key_row = by_order;     // of packed keys, and of bias: its first key; by_order: see plan()
  std::size_t table_row = by_order;   // of the block tables; by_order: its number in the batch
  Span<const std::size_t> past = {};  // keys of earlier turns, as in Prompt: one for all layers, or one per layer
  std::size_t first_key = 0;          // tokens before the first key at hand: a sliding window has let go of them
};

// What a Pruner is to have room for. Zeros stand for what the comment says.
struct Limits {
  std::size_t sequences = 1;  // of a batch
  std::size_t tokens = 0;     // rows of a packed batch
  std::size_t visual = 0;     // visual tokens of a batch; 0: tokens
  std::size_t keys = 0;       // of the longest sequence, earlier turns included; 0: tokens. Not needed without queries
  std::size_t heads = 0;      // query heads of this rank; 0: no queries and keys
  std::size_t rows = 0;    // query rows scored by one launch; 0: one of each sequence. More of them take more launches
  std::size_t stages = 1;  // of the batch: different filtering layers among its requests
  std::size_t spans = 0;   // spans of the batch; 0: 8 a sequence
  std::size_t groups = 0;  // of tokens that compete, images or windows, of a batch; 0: 16 a sequence
  std::size_t listed = 0;  // listed and prior rows of the batch; 0: 32 a sequence

  // Selection::diverse: 4 * visual * (features + competing) bytes.
  std::size_t features = 0;   // elements of one token's features; 0: no request has that rule
  std::size_t competing = 0;  // visual tokens that compete with each other: of an image, or of a pool; 0: visual
};

// What only values can tell, one per sequence, in device memory, valid once the stage has run.
struct Counters {
  std::uint32_t nan_scores;   // ranked below all others; of Selection::diverse, or whose features are no numbers
  std::uint32_t zero_scores;  // of an image all of them: nothing ranks its tokens, and the earliest stay
  std::uint32_t infinite;     // scores that are infinite: check where they come from
  std::uint32_t
      uncorrected;  // 1: the prior rows, or the question's, attend to no visual token, so that Config::prior_rows
                    // changed nothing
};

// One stage's results. Pointers are device memory, of the Pruner; valid until plan() or reserve(). Rows count the
// packed tensors of the stage: what it finds, and what it leaves.
struct Kept {
  const std::int32_t* rows;             // [total] ascending rows of the packed tensors that stay
  const std::int32_t* positions;        // [total] of each: its position in the prompt it came from
  const std::int32_t* slots;            // [total] of each: its slot in the caches of the layers behind the stage
  const std::int32_t* cumulative;       // [sequences + 1]: sequence i is now rows [i] .. [i + 1] - 1
  const std::int32_t* cumulative_keys;  // [sequences + 1]: the same for keys, those of earlier turns included
  const std::int32_t* visual_numbers;   // [total_visual] of each kept visual token: its number among the stage's
  const Counters* counters;             // [sequences]
  const float* scores;                  // [visual tokens found], where rules looked at scores
  std::size_t total = 0;                // rows that stay
  std::size_t total_visual = 0;         // visual tokens that stay
  std::size_t longest = 0;              // most rows of any sequence
  std::size_t longest_keys = 0;         // most keys of any sequence
};

// ---- what is moved ------------------------------------------------------------------------------

// Which list gather() moves by.
enum class By {
  rows,   // hidden states, position ids: one row per token of the packed batch
  visual  // deepstack rows: one per visual token of the batch
};

// A tensor to gather, and where its kept rows go. Both are views of device memory from rows() or position_axes(), with
// the same row_bytes and planes. They must not overlap: blocks of a GPU run in any order, so that a row could be written
// before it is read. Two buffers that take turns, as engines have them for hidden states, do.
struct Move {
  Rows from;         // count: rows found
  Rows to;           // count: rows kept, or more
  By by = By::rows;  // which list
};
// The most tensors of one launch.
inline constexpr std::size_t max_moves = 16;

}  // namespace cuda
}  // namespace fastv

#include "detail/end.hpp"

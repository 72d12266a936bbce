// fastv: what a model costs under a Plan, in arithmetic and in KV cache. Shapes only.
//
// Three conventions are in use, and mixing them is why published FastV figures look irreproducible. Each
// function here says which it follows:
//
//   paper_*       Eq. 5 of the FastV paper as its tables use it: multiply-adds of ONE layer, an FFN of TWO
//                 matrices, no KV heads, no output head; only visual tokens shrink, by R * visual tokens,
//                 which is not rounded.
//   *_macs        multiply-adds of the WHOLE model as the reference decoder of examples/reference executes
//                 them: every projection, full attention rows (not the causal half), all FFN matrices, and
//                 the output head for one token.
//   *_flops       the same in floating-point operations: 2 per multiply-add.
#pragma once

#include "plan.hpp"

namespace fastv {

// Shape of a decoder-only model. Counts of elements, not bytes.
struct ModelShape {
  std::size_t layers;
  std::size_t hidden;  // d
  std::size_t heads;   // query heads
  std::size_t kv_heads;
  std::size_t head_dim;
  std::size_t intermediate;      // m, width of the FFN
  std::size_t ffn_matrices = 3;  // 3: gate, up, down (LLaMA); 2: up, down
  std::size_t vocabulary = 0;    // width of the output head; 0 leaves it out
};

// ---- the paper's convention ---------------------------------------------------------------------

// 4 n d^2 + 2 n^2 d + 2 n d m: multiply-adds of one layer on n tokens (paper section 4.2).
constexpr double paper_layer_cost(double tokens, double hidden, double intermediate) noexcept {
  return 4 * tokens * hidden * hidden + 2 * tokens * tokens * hidden + 2 * tokens * hidden * intermediate;
}

// The "FLOPs (B)" column of the paper's Table 1, in multiply-adds: the mean over the T layers of
// paper_layer_cost, K layers on `tokens` and the others on tokens - R * visual. The column is reproduced by
// 612 tokens (36 system + 576 visual); see tests/cost_test.cpp for the rows that are not.
constexpr double paper_cost(const ModelShape& shape, double tokens, double visual, std::size_t filtering_layer,
                            double filtering_ratio) noexcept {
  const auto hidden = static_cast<double>(shape.hidden), intermediate = static_cast<double>(shape.intermediate);
  const auto layers = static_cast<double>(shape.layers), full = static_cast<double>(filtering_layer);
  return (full * paper_layer_cost(tokens, hidden, intermediate) +
          (layers - full) * paper_layer_cost(tokens - filtering_ratio * visual, hidden, intermediate)) /
         layers;
}

// The "FLOPs ratio" column: paper_cost over the cost of one layer without pruning.
constexpr double paper_cost_ratio(const ModelShape& shape, double tokens, double visual, std::size_t filtering_layer,
                                  double filtering_ratio) noexcept {
  return paper_cost(shape, tokens, visual, filtering_layer, filtering_ratio) /
         paper_layer_cost(tokens, static_cast<double>(shape.hidden), static_cast<double>(shape.intermediate));
}

// ---- the whole model ----------------------------------------------------------------------------

// Multiply-adds of one layer that runs on `tokens` new tokens which attend to `keys` keys each.
constexpr std::uint64_t layer_macs(const ModelShape& shape, std::uint64_t tokens, std::uint64_t keys) noexcept {
  const std::uint64_t d = shape.hidden, q = shape.heads * shape.head_dim, kv = shape.kv_heads * shape.head_dim;
  const std::uint64_t projections = d * q + 2 * d * kv + q * d;  // query, key and value, output
  const std::uint64_t attention = 2 * keys * q;                  // q.k and probabilities.v
  const std::uint64_t ffn = shape.ffn_matrices * d * shape.intermediate;
  return tokens * (projections + attention + ffn);
}

// Multiply-adds of the prefill, with the output head for the last token only. O(layers).
inline std::uint64_t prefill_macs(const ModelShape& shape, const Plan& plan) noexcept {
  std::uint64_t total = std::uint64_t{shape.hidden} * shape.vocabulary;
  for (std::size_t layer = 0; layer < shape.layers; ++layer)
    total += layer_macs(shape, plan.tokens_in_layer(layer), plan.tokens_in_layer(layer));
  return total;
}

// Multiply-adds of decoding step `generated` (from 0), in which one token attends to the cache and to
// itself. O(layers).
inline std::uint64_t decode_macs(const ModelShape& shape, const Plan& plan, std::size_t generated) noexcept {
  std::uint64_t total = std::uint64_t{shape.hidden} * shape.vocabulary;
  for (std::size_t layer = 0; layer < shape.layers; ++layer)
    total += layer_macs(shape, 1, plan.kv_length(layer, generated + 1));
  return total;
}

inline double prefill_flops(const ModelShape& shape, const Plan& plan) noexcept {
  return 2.0 * static_cast<double>(prefill_macs(shape, plan));
}
inline double decode_flops(const ModelShape& shape, const Plan& plan, std::size_t generated) noexcept {
  return 2.0 * static_cast<double>(decode_macs(shape, plan, generated));
}

// Bytes of the K and V caches of all layers after prefill and `generated` decoding steps.
// element_bytes: 4 float, 2 half. O(layers).
inline std::uint64_t kv_bytes(const ModelShape& shape, const Plan& plan, std::size_t element_bytes,
                              std::size_t generated = 0) noexcept {
  std::uint64_t tokens = 0;
  for (std::size_t layer = 0; layer < shape.layers; ++layer) tokens += plan.kv_length(layer, generated);
  return tokens * 2 * shape.kv_heads * shape.head_dim * element_bytes;
}

}  // namespace fastv

// fastv: what a model costs under a Plan, in arithmetic and in KV cache. Shapes only.
//
// Three conventions are in use, and mixing them is why published FastV figures look irreproducible. Each function
// here says which it follows:
//
//   paper_*       Eq. 5 of the FastV paper as its tables use it: multiply-adds
//   of ONE layer, an FFN of TWO
//                 matrices, no KV heads, no output head; only visual tokens
//                 shrink, by R * visual tokens, which is not rounded.
//   *_macs        multiply-adds of the WHOLE model as the reference decoder of
//   examples/reference executes
//                 them: every projection, full attention rows (not the causal
//                 half), all FFN matrices, and the output head for one token.
//   *_flops       the same in floating-point operations: 2 per multiply-add.
#pragma once

#include "plan.hpp"

namespace fastv {

// Shape of a decoder-only model. Counts of elements, not bytes.
struct ModelShape {
  std::size_t layers;            // decoder layers
  std::size_t hidden;            // d
  std::size_t heads;             // query heads
  std::size_t kv_heads;          // key and value heads; fewer than heads under GQA
  std::size_t head_dim;          // elements of a head's vectors
  std::size_t intermediate;      // m, width of the FFN
  std::size_t ffn_matrices = 3;  // 3: gate, up, down (LLaMA); 2: up, down
  std::size_t vocabulary = 0;    // width of the output head; 0 leaves it out
};

// ---- the paper's convention ---------------------------------------------------------------------

// 4 n d^2 + 2 n^2 d + 2 n d m: multiply-adds of one layer on n tokens (paper section 4.2).
constexpr double paper_layer_cost(double tokens, double hidden, double intermediate) noexcept {
  return 4 * tokens * hidden * hidden + 2 * tokens * tokens * hidden + 2 * tokens * hidden * intermediate;
}

// The "FLOPs (B)" column of the paper's Table 1, in multiply-adds: the mean over the T layers of paper_layer_cost, K
// layers on `tokens` and the others on tokens - R * visual. The column is reproduced by 612 tokens (36 system + 576
// visual); see tests/cost_test.cpp for the rows that are not.
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

// Multiply-adds of decoding step `generated` (from 0), in which one token attends to the cache and to itself.
// O(layers).
inline std::uint64_t decode_macs(const ModelShape& shape, const Plan& plan, std::size_t generated) noexcept {
  std::uint64_t total = std::uint64_t{shape.hidden} * shape.vocabulary;
  for (std::size_t layer = 0; layer < shape.layers; ++layer)
    total += layer_macs(shape, 1, plan.kv_length(layer, generated + 1));
  return total;
}

// prefill_macs() and decode_macs() in floating-point operations, 2 per multiply-add.
inline double prefill_flops(const ModelShape& shape, const Plan& plan) noexcept {
  return 2.0 * static_cast<double>(prefill_macs(shape, plan));
}
inline double decode_flops(const ModelShape& shape, const Plan& plan, std::size_t generated) noexcept {
  return 2.0 * static_cast<double>(decode_macs(shape, plan, generated));
}

// Bytes of the K and V caches of all layers after prefill and `generated` decoding steps. element_bytes: 4 float, 2
// half. O(layers).
inline std::uint64_t kv_bytes(const ModelShape& shape, const Plan& plan, std::size_t element_bytes,
                              std::size_t generated = 0) noexcept {
  std::uint64_t tokens = 0;
  for (std::size_t layer = 0; layer < shape.layers; ++layer) tokens += plan.kv_length(layer, generated);
  return tokens * 2 * shape.kv_heads * shape.head_dim * element_bytes;
}

// ---- the planner --------------------------------------------------------------------------------

// Measured time of one layer's prefill on so many tokens.
struct LayerTime {
  // Tokens that the layer ran on, and seconds it took.
  std::size_t tokens;
  double seconds;
};

// What a prefill may cost. Exactly one kind is limited.
struct Budget {
  // What is limited.
  enum class Of {
    flops_ratio,  // prefill_macs over those without pruning
    flops,        // prefill_flops
    kv_bytes,     // kv_bytes after `generated` decoding steps
    seconds       // sum of the layers' times, read off `times`
  };
  // What is limited, and the most it may be, in the unit of `of`.
  Of of;
  double limit;
  std::size_t element_bytes = 2;     // of the KV cache
  std::size_t generated = 0;         // decoding steps that must fit as well, for kv_bytes
  Span<const LayerTime> times = {};  // tokens ascending, at least two; straight lines between and beyond them
};

namespace detail {

inline double layer_seconds(Span<const LayerTime> times, std::size_t tokens) noexcept {
  std::size_t i = 1;
  while (i + 1 < times.size() && times[i].tokens < tokens) ++i;
  const LayerTime &a = times[i - 1], &b = times[i];
  const double slope = (b.seconds - a.seconds) / static_cast<double>(b.tokens - a.tokens);
  return a.seconds + slope * (static_cast<double>(tokens) - static_cast<double>(a.tokens));
}

inline double cost_under(const ModelShape& shape, const Plan& plan, const Budget& budget) noexcept {
  switch (budget.of) {
    case Budget::Of::flops_ratio: {
      Plan whole = plan;
      whole.stages = 0;
      return static_cast<double>(prefill_macs(shape, plan)) / static_cast<double>(prefill_macs(shape, whole));
    }
    case Budget::Of::flops: return prefill_flops(shape, plan);
    case Budget::Of::kv_bytes:
      return static_cast<double>(kv_bytes(shape, plan, budget.element_bytes, budget.generated));
    case Budget::Of::seconds: break;
  }
  double seconds = 0;
  for (std::size_t layer = 0; layer < shape.layers; ++layer)
    seconds += layer_seconds(budget.times, plan.tokens_in_layer(layer));
  return seconds;
}

}  // namespace detail

// The settings that keep most visual tokens under a budget, and of those the ones that prune latest: K from
// `first_layer` to the last layer but one. The result is `settings` with filtering_layer, keep_count and (for
// reading) filtering_ratio filled in. Errors: budget_too_small, naming the least possible cost, where even dropping
// every visual token at first_layer costs too much; everything that can be wrong with the prompt or the table of
// times. O(layers^2 log visual tokens).
inline Result<Config> settings_under(const Budget& budget, const ModelShape& shape, const Prompt& prompt,
                                     std::size_t first_layer = 2, const Config& settings = {}) noexcept {
  using detail::fail;
  using detail::number;
  if (shape.layers != prompt.layers)
    return {{}, fail(Errc::layers_differ, "", number(shape.layers), number(prompt.layers))};
  if (budget.of == Budget::Of::seconds) {
    if (Status status = detail::check_room(budget.times, budget.times.size(), "layer times"); !status)
      return {{}, status};
    if (budget.times.size() < 2) return {{}, fail(Errc::bad_times, "", number(budget.times.size()))};
    for (std::size_t i = 0; i < budget.times.size(); ++i) {
      const bool ascends = i == 0 || (budget.times[i].tokens > budget.times[i - 1].tokens &&
                                      budget.times[i].seconds >= budget.times[i - 1].seconds);
      if (detail::is_nan(budget.times[i].seconds) || !(budget.times[i].seconds >= 0) || !ascends)
        return {{}, fail(Errc::bad_times, "", number(budget.times.size()), 0, number(i))};
    }
  }
  Config config = settings;
  config.filtering_layer = first_layer;
  config.keep_count = 0;
  Result<Plan> plan = make_plan(config, prompt);
  if (!plan) return {{}, plan.status};
  const auto cost = [&](std::size_t layer, std::size_t keep) {
    plan.value.stage[0] = {layer, keep};
    return detail::cost_under(shape, *plan, budget);
  };
  if (const double least = cost(first_layer, 0); detail::is_nan(budget.limit) || !(least <= budget.limit)) {
    Status status = detail::fail_real(Errc::budget_too_small, budget.limit);
    status.least = least;
    return {{}, status};
  }
  std::size_t low = 0, high = plan->visual;  // low fits
  while (low < high) {
    const std::size_t middle = low + (high - low + 1) / 2;
    if (cost(first_layer, middle) <= budget.limit)
      low = middle;
    else
      high = middle - 1;
  }
  config.keep_count = low;
  while (config.filtering_layer + 1 < prompt.layers && cost(config.filtering_layer + 1, low) <= budget.limit)
    ++config.filtering_layer;
  if (plan->visual > 0) config.filtering_ratio = 1.0 - static_cast<double>(low) / static_cast<double>(plan->visual);
  return {config, {}};
}

}  // namespace fastv

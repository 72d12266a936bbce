// fastv: what a model costs under a Plan, in arithmetic and in KV cache. Shapes only.
//
// Three conventions are in use, and mixing them is why published FastV figures look irreproducible. Each function here says
// which it follows:
//
//   paper_*   Eq. 5 of the FastV paper as its tables use it: multiply-adds of one layer, an FFN of two matrices, no KV
//             heads, no output head; only visual tokens shrink, by R * visual tokens, which is not rounded.
//   *_macs    multiply-adds of the whole model as the reference decoder of examples/reference executes them: every
//             projection, full attention rows (not the causal half), all FFN matrices, and the output head for one token.
//             Counts beyond 2^64 - 1 are reported as 2^64 - 1.
//   *_flops   the same in floating-point operations, 2 per multiply-add, in double and so without that limit.
#pragma once

#include "plan.hpp"

#include "detail/begin.hpp"

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

inline namespace FASTV_KIND {

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

}  // namespace FASTV_KIND

// ---- the whole model ----------------------------------------------------------------------------

namespace detail {
inline namespace FASTV_KIND {

// A count that stays at the largest one rather than wrapping around.
struct Capped {
  std::uint64_t value;
};
constexpr Capped operator+(Capped a, Capped b) noexcept {
  const std::uint64_t sum = a.value + b.value;
  return {sum < a.value ? ~std::uint64_t{0} : sum};
}
constexpr Capped operator*(Capped a, Capped b) noexcept {
  if (a.value != 0 && b.value > ~std::uint64_t{0} / a.value) return {~std::uint64_t{0}};
  return {a.value * b.value};
}
constexpr Capped counted(Capped, std::size_t value) noexcept { return {value}; }
constexpr double counted(double, std::size_t value) noexcept { return static_cast<double>(value); }

// Multiply-adds in Number: Capped, or double.
template <class Number>
constexpr Number layer_cost(const ModelShape& shape, std::size_t tokens, std::size_t keys) noexcept {
  const auto n = [](std::size_t value) { return counted(Number{}, value); };
  const Number d = n(shape.hidden), q = n(shape.heads) * n(shape.head_dim), kv = n(shape.kv_heads) * n(shape.head_dim);
  const Number projections = d * q + n(2) * d * kv + q * d;  // query, key and value, output
  const Number attention = n(2) * n(keys) * q;               // q.k and probabilities.v
  const Number ffn = n(shape.ffn_matrices) * d * n(shape.intermediate);
  return n(tokens) * (projections + attention + ffn);
}
// Plan::kv_length(), which stays at the largest number rather than wrapping around.
inline std::size_t keys_after(const Plan& plan, std::size_t layer, std::size_t generated) noexcept {
  const std::size_t keys = plan.kv_length(layer);
  return generated < static_cast<std::size_t>(-1) - keys ? keys + generated : static_cast<std::size_t>(-1);
}
// Decoding steps: 0 for the prefill, else the step's number from 1.
constexpr std::size_t step_of(std::size_t generated) noexcept { return generated + (generated + 1 != 0 ? 1u : 0u); }
template <class Number>
Number model_cost(const ModelShape& shape, const Plan& plan, std::size_t step) noexcept {
  Number total = counted(Number{}, shape.hidden) * counted(Number{}, shape.vocabulary);
  for (std::size_t layer = 0; layer < shape.layers; ++layer) {
    const std::size_t tokens = step == 0 ? plan.tokens_in_layer(layer) : 1;
    total = total + layer_cost<Number>(shape, tokens, keys_after(plan, layer, step));
  }
  return total;
}

}  // namespace FASTV_KIND
}  // namespace detail

inline namespace FASTV_KIND {

// Multiply-adds of one layer that runs on `tokens` new tokens which attend to `keys` keys each. O(1).
constexpr std::uint64_t layer_macs(const ModelShape& shape, std::size_t tokens, std::size_t keys) noexcept {
  return detail::layer_cost<detail::Capped>(shape, tokens, keys).value;
}

// Multiply-adds of the prefill, over the keys of earlier turns too, with the output head for the last token only.
// O(layers).
inline std::uint64_t prefill_macs(const ModelShape& shape, const Plan& plan) noexcept {
  return detail::model_cost<detail::Capped>(shape, plan, 0).value;
}

// Multiply-adds of decoding step `generated` (from 0), in which one token attends to the cache and to itself. O(layers).
inline std::uint64_t decode_macs(const ModelShape& shape, const Plan& plan, std::size_t generated) noexcept {
  return detail::model_cost<detail::Capped>(shape, plan, detail::step_of(generated)).value;
}

// prefill_macs() and decode_macs() in floating-point operations, 2 per multiply-add. O(layers).
inline double prefill_flops(const ModelShape& shape, const Plan& plan) noexcept {
  return 2.0 * detail::model_cost<double>(shape, plan, 0);
}
inline double decode_flops(const ModelShape& shape, const Plan& plan, std::size_t generated) noexcept {
  return 2.0 * detail::model_cost<double>(shape, plan, detail::step_of(generated));
}

// Bytes of the K and V caches of all layers after prefill and `generated` decoding steps, earlier turns included.
// element_bytes: 4 for float, 2 for half. At most 2^64 - 1. O(layers).
inline std::uint64_t kv_bytes(const ModelShape& shape, const Plan& plan, std::size_t element_bytes,
                              std::size_t generated = 0) noexcept {
  detail::Capped tokens{0};
  for (std::size_t layer = 0; layer < shape.layers; ++layer)
    tokens = tokens + detail::Capped{detail::keys_after(plan, layer, generated)};
  return (tokens * detail::Capped{2} * detail::Capped{shape.kv_heads} * detail::Capped{shape.head_dim} *
          detail::Capped{element_bytes})
      .value;
}

}  // namespace FASTV_KIND

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
  Span<const LayerTime> times = {};  // tokens ascending, at least two; straight lines between them and beyond the last;
                                     // below the first, its own seconds
};

namespace detail {
inline namespace FASTV_KIND {

inline double layer_seconds(Span<const LayerTime> times, std::size_t tokens) noexcept {
  if (tokens <= times[0].tokens) return times[0].seconds;  // a line extended downwards could reach below zero
  std::size_t i = 1;
  while (i + 1 < times.size() && times[i].tokens < tokens) ++i;
  const LayerTime &a = times[i - 1], &b = times[i];
  const double slope = (b.seconds - a.seconds) / static_cast<double>(b.tokens - a.tokens);
  return a.seconds + slope * (static_cast<double>(tokens) - static_cast<double>(a.tokens));
}

inline double cost_under(const ModelShape& shape, const Plan& plan, const Budget& budget) noexcept {
  switch (budget.of) {
    case Budget::Of::flops_ratio: {
      Plan whole = plan;  // over the same keys of earlier turns, layer by layer
      for (Plan::Stage& stage : whole.stage) stage.kept_visual = plan.visual;
      return model_cost<double>(shape, plan, 0) / model_cost<double>(shape, whole, 0);
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

inline Status check_times(Span<const LayerTime> times) noexcept {
  if (Status status = expect_room(times, times.size(), "layer times"); !status) return status;
  if (times.size() < 2)
    return fail(Errc::bad_setting, "the table of layer times has {} entries: give at least two", times.size());
  for (std::size_t i = 0; i < times.size(); ++i) {
    if (is_nan(times[i].seconds) || is_infinite(times[i].seconds) || !(times[i].seconds >= 0))
      return fail(Errc::bad_setting, "entry {} of the layer times is {} seconds: give a time", i, times[i].seconds);
    if (i > 0 && (times[i].tokens <= times[i - 1].tokens || times[i].seconds < times[i - 1].seconds))
      return fail(Errc::bad_setting,
                  "entry {} of the layer times, {} tokens in {} s, does not lie above the previous one: "
                  "sort them by tokens; times must not fall",
                  i, times[i].tokens, times[i].seconds);
  }
  return {};
}

}  // namespace FASTV_KIND
}  // namespace detail

inline namespace FASTV_KIND {

// The settings that keep most visual tokens under a budget, and of those the ones that prune latest: K from `first_layer`
// to the last layer but one, of those whose layer K-1 has full attention. The result is `settings` with filtering_layer,
// keep_count and (for reading) filtering_ratio filled in. Errors: over_budget, naming the least possible cost, where even
// dropping every visual token at first_layer costs too much; everything that can be wrong with the prompt or the table of
// times. O(layers^2 log visual tokens).
inline Result<Config> settings_under(const Budget& budget, const ModelShape& shape, const Prompt& prompt,
                                     std::size_t first_layer = 2, const Config& settings = {}) noexcept {
  if (shape.layers != prompt.layers)
    return {{},
            fail(Errc::bad_setting,
                 "the model's shape has {} layers but the prompt's model has {}: describe the same model", shape.layers,
                 prompt.layers)};
  if (budget.of == Budget::Of::seconds) {
    if (Status status = detail::check_times(budget.times); !status) return {{}, status};
  }
  Config config = settings;
  config.filtering_layer = first_layer;
  config.keep_count = 0;
  const auto ranks = [&](std::size_t layer) {  // whether layer - 1 has full attention, where it needs any
    Config there = config;
    there.filtering_layer = layer;
    return static_cast<bool>(detail::expect_full_attention(there, prompt));
  };
  for (std::size_t layer = first_layer; layer < prompt.layers; ++layer) {
    if (!ranks(layer)) continue;
    config.filtering_layer = first_layer = layer;
    break;
  }
  Result<Plan> plan = make_plan(config, prompt);
  if (!plan) return {{}, plan.status};
  const auto cost = [&](std::size_t layer, std::size_t keep) {
    plan.value.stage[0] = {layer, keep};
    return detail::cost_under(shape, *plan, budget);
  };
  if (const double least = cost(first_layer, 0); detail::is_nan(budget.limit) || !(least <= budget.limit))
    return {{},
            fail(Errc::over_budget,
                 "the budget is {} but even a prefill without visual tokens from layer {} on costs {}: raise it",
                 budget.limit, first_layer, least)};
  std::size_t low = 0, high = plan->visual;  // low fits
  while (low < high) {
    const std::size_t middle = low + (high - low + 1) / 2;
    if (cost(first_layer, middle) <= budget.limit)
      low = middle;
    else
      high = middle - 1;
  }
  config.keep_count = low;
  for (std::size_t layer = first_layer + 1; layer < prompt.layers && cost(layer, low) <= budget.limit; ++layer)
    if (ranks(layer)) config.filtering_layer = layer;
  if (plan->visual > 0) config.filtering_ratio = 1.0 - static_cast<double>(low) / static_cast<double>(plan->visual);
  return {config, {}};
}

}  // namespace FASTV_KIND

}  // namespace fastv

#include "detail/end.hpp"

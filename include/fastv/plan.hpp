// fastv: every length the engine needs, from shapes alone, before any value exists.
#pragma once

#include "config.hpp"

namespace fastv {

// What is known of a prompt before it runs.
struct Prompt {
  std::size_t tokens;            // n: text and visual tokens
  std::size_t layers;            // decoder layers of the model
  Span<const TokenSpan> visual;  // sorted, disjoint; empty for a prompt without pictures
};

// Visual tokens kept of `tokens`: round(tokens * (1 - R)), in double arithmetic, with the rounding error of 1 - R
// part of the rule, as the authors' llava-hf code computes it (github.com/pkunlp-icler/FastV): 35 tokens at R = 0.9
// keep 3. R must lie in [0, 1], as check(config) makes sure.
inline std::size_t kept_of(std::size_t tokens, double filtering_ratio,
                           Rounding rounding = Rounding::half_even) noexcept {
  // volatile: the product is rounded to double before anything else happens to it. Contracted into a fused
  // multiply-add below, or held in an x87 register, it would keep bits that the rule drops.
  volatile const double share = 1.0 - filtering_ratio;
  volatile const double product = static_cast<double>(tokens) * share;
  const double exact = product;
  const auto whole = static_cast<std::size_t>(exact);
  const double rest = exact - static_cast<double>(whole);
  if (rounding == Rounding::up) return whole + (rest > 0 ? 1u : 0u);
  return whole + ((rest > 0.5 || (rest == 0.5 && whole % 2 == 1)) ? 1u : 0u);
}

// Tokens of all spans together. O(spans).
inline std::size_t visual_tokens(Span<const TokenSpan> visual) noexcept {
  std::size_t count = 0;
  for (const TokenSpan& span : visual) count += span.count;
  return count;
}

namespace detail {

// One picture: a span and those that continue it.
struct Picture {
  std::size_t first_span, spans;
  std::size_t tokens, original, columns;
};

// Calls each(picture) for every picture, in order.
template <class Each>
void for_each_picture(Span<const TokenSpan> visual, Each each) {
  for (std::size_t s = 0; s < visual.size();) {
    Picture picture{s, 0, 0, 0, visual[s].columns};
    do {
      picture.tokens += visual[s].count;
      picture.original += visual[s].original == 0 ? visual[s].count : visual[s].original;
      ++picture.spans;
      ++s;
    } while (s < visual.size() && visual[s].continues);
    each(static_cast<const Picture&>(picture));
  }
}

// The count-th greatest of many unsigned keys, and how many of the count lie above it. visit(take) calls take(key)
// for each key. Radix select, one byte a pass from the top: linear, no copy, no bad case. count is at least 1.
template <class Key>
struct Cut {
  Key key;
  std::size_t above;
};
template <class Key, class Visit>
Cut<Key> find_cut(std::size_t count, Visit visit) noexcept {
  Key prefix = 0, mask = 0;
  std::size_t wanted = count;  // rank of the cut among the keys that share the prefix
  for (int shift = 8 * static_cast<int>(sizeof(Key)) - 8; shift >= 0; shift -= 8) {
    std::uint32_t histogram[256] = {};
    visit([&](Key key) { histogram[(key >> shift) & 255u] += (key & mask) == prefix ? 1u : 0u; });
    Key byte = 255;
    while (histogram[byte] < wanted) wanted -= histogram[byte--];
    prefix |= byte << shift;
    mask |= Key{255} << shift;
  }
  return {prefix, count - wanted};
}

// Shares `budget` out in proportion to weights, exactly (Hamilton's method): each gets its share rounded down, and
// what is left over goes one by one to the largest remainders, the earlier first. visit(take) calls take(weight) for
// each; give(share) is called in the same order. budget is at most the sum of the weights.
template <class Visit, class Give>
void apportion(std::size_t budget, Visit visit, Give give) noexcept {
  std::uint64_t total = 0, floors = 0;
  visit([&](std::size_t weight) { total += weight; });
  if (total == 0) return visit([&](std::size_t) { give(std::size_t{0}); });
  const auto product = [&](std::size_t weight) { return static_cast<std::uint64_t>(budget) * weight; };
  visit([&](std::size_t weight) { floors += product(weight) / total; });
  const auto left = static_cast<std::size_t>(budget - floors);
  Cut<std::uint64_t> cut{~std::uint64_t{0}, 0};
  if (left > 0)
    cut = find_cut<std::uint64_t>(left, [&](auto take) { visit([&](std::size_t w) { take(product(w) % total); }); });
  std::size_t ties = left - cut.above;
  visit([&](std::size_t weight) {
    const std::uint64_t rest = product(weight) % total;
    const bool extra = left > 0 && (rest > cut.key || (rest == cut.key && ties > 0));
    if (extra && rest == cut.key) --ties;
    give(static_cast<std::size_t>(product(weight) / total) + (extra ? 1u : 0u));
  });
}

inline std::size_t kept_of(const Config& config, std::size_t tokens, std::size_t original) noexcept {
  const std::size_t base = config.ratio_of == RatioOf::original ? original : tokens;
  const std::size_t kept = fastv::kept_of(base, config.filtering_ratio, config.rounding);
  return kept < tokens ? kept : tokens;
}

}  // namespace detail

// Visual tokens kept in the whole prompt. By count: as given. By ratio: the sum of the pictures' shares or, pooled,
// the share of them all. A prompt without visual tokens keeps 0 of 0 whatever the settings say. O(spans).
inline Result<std::size_t> kept_visual(const Config& config, Span<const TokenSpan> visual) noexcept {
  if (Status status = check(config); !status) return {0, status};
  if (Status status = detail::check_room(visual, visual.size(), "visual spans"); !status) return {0, status};
  for (const TokenSpan& span : visual)
    if (const std::size_t most = span.original > span.count ? span.original : span.count; most > max_tokens)
      return {0, detail::fail(Errc::too_many_tokens, "", detail::number(most), detail::number(max_tokens))};
  const std::size_t total = visual_tokens(visual);
  if (total == 0) return {0, {}};
  if (config.keep_count != by_ratio) {
    if (config.keep_count > total)
      return {0, detail::fail(Errc::count_above_visual, "", detail::number(config.keep_count), detail::number(total))};
    return {config.keep_count, {}};
  }
  std::size_t kept = 0, original = 0;
  detail::for_each_picture(visual, [&](const detail::Picture& picture) {
    const std::size_t share = detail::kept_of(config, picture.tokens, picture.original);
    const std::size_t least = config.min_per_picture < picture.tokens ? config.min_per_picture : picture.tokens;
    kept += share < least ? least : share;
    original += picture.original;
  });
  return {config.quota == Quota::pooled ? detail::kept_of(config, total, original) : kept, {}};
}

// How many visual tokens each picture keeps under Quota::per_picture; their sum is kept_visual().
//
// By ratio: kept_of() its tokens. By keep_count: in proportion to the pictures' tokens, rounded by Hamilton's method.
// min_per_picture raises the small ones: by ratio beyond R, by count at the cost of the others, as far as the count
// reaches; a count too small for every minimum is shared out without any.
//
// quotas: one entry per picture (the number of spans is always enough). O(spans).
inline Status picture_quotas(const Config& config, Span<const TokenSpan> visual, Span<Index> quotas) noexcept {
  const Result<std::size_t> kept = kept_visual(config, visual);
  if (!kept) return kept.status;
  const auto minimum = [&](const detail::Picture& picture) {
    return config.min_per_picture < picture.tokens ? config.min_per_picture : picture.tokens;
  };
  std::size_t pictures = 0, minima = 0;
  detail::for_each_picture(visual, [&](const detail::Picture& picture) {
    ++pictures;
    minima += minimum(picture);
  });
  if (Status status = detail::check_room(quotas, pictures, "quotas"); !status) return status;

  std::size_t i = 0;
  if (config.keep_count == by_ratio) {
    detail::for_each_picture(visual, [&](const detail::Picture& picture) {
      const std::size_t share = detail::kept_of(config, picture.tokens, picture.original), least = minimum(picture);
      quotas[i++] = static_cast<Index>(share < least ? least : share);
    });
    return {};
  }
  const bool enough = minima <= *kept;
  const auto least = [&](const detail::Picture& picture) { return enough ? minimum(picture) : 0; };
  detail::for_each_picture(visual,
                           [&](const detail::Picture& picture) { quotas[i++] = static_cast<Index>(least(picture)); });
  i = 0;
  detail::apportion(
      *kept - (enough ? minima : 0),
      [&](auto take) {
        detail::for_each_picture(visual,
                                 [&](const detail::Picture& picture) { take(picture.tokens - least(picture)); });
      },
      [&](std::size_t share) { quotas[i++] += static_cast<Index>(share); });
  return {};
}

// The most stages a schedule may have.
inline constexpr std::size_t max_stages = 8;

// Token count and KV length of every layer. Layers before the first stage run on all n tokens and keep all their KV;
// from a stage's filtering layer on they run on what it kept. A plain value: make_plan() fills it.
struct Plan {
  // One stage: the layers that run before it, and the visual tokens it keeps.
  struct Stage {
    // See above.
    std::size_t filtering_layer, kept_visual;
  };
  std::size_t tokens = 0;  // n
  std::size_t layers = 0;  // of the model
  std::size_t visual = 0;  // visual tokens in the prompt
  // Stages, in order; those past `stages` are unused.
  std::size_t stages = 0;
  Stage stage[max_stages] = {};

  // Visual tokens that `layer` (from 0) runs on at prefill.
  std::size_t visual_in_layer(std::size_t layer) const noexcept {
    std::size_t count = visual;
    for (std::size_t s = 0; s < stages && stage[s].filtering_layer <= layer; ++s) count = stage[s].kept_visual;
    return count;
  }
  // Tokens that `layer` runs on at prefill, text included.
  std::size_t tokens_in_layer(std::size_t layer) const noexcept { return tokens - visual + visual_in_layer(layer); }
  // Visual tokens and all tokens that the last layer runs on.
  std::size_t kept_visual() const noexcept { return stages == 0 ? visual : stage[stages - 1].kept_visual; }
  std::size_t kept() const noexcept { return tokens - visual + kept_visual(); }
  // KV length of `layer` after prefill and `generated` decoding steps.
  std::size_t kv_length(std::size_t layer, std::size_t generated = 0) const noexcept {
    return tokens_in_layer(layer) + generated;
  }
  // Position id of the token fed at decoding step `generated` (from 0): it counts the whole prompt, dropped tokens
  // included, in every layer. (M-RoPE and callers' own position ids: see next_position() in apply.hpp.)
  std::size_t next_position(std::size_t generated = 0) const noexcept { return tokens + generated; }
};

// The plan of a schedule of stages, filtering layers ascending; an empty one prunes nothing. scratch: one entry per
// span, needed for more than one stage. Errors: everything that can be wrong with the settings or the spans. O(stages
// * spans).
inline Result<Plan> make_plan(Span<const Config> schedule, const Prompt& prompt, Span<TokenSpan> scratch = {},
                              Span<Index> quotas = {}) noexcept {
  using detail::fail;
  using detail::number;
  if (prompt.layers == 0) return {{}, fail(Errc::no_layers)};
  if (schedule.size() > max_stages)
    return {{}, fail(Errc::too_many_stages, "", number(schedule.size()), number(max_stages))};
  if (Status status = detail::check_room(schedule, schedule.size(), "the schedule"); !status) return {{}, status};
  if (Status status = check(prompt.visual, prompt.tokens); !status) return {{}, status};

  Plan plan;
  plan.tokens = prompt.tokens;
  plan.layers = prompt.layers;
  plan.visual = visual_tokens(prompt.visual);
  Span<const TokenSpan> visual = prompt.visual;
  bool pooled = false;  // an earlier stage pooled the pictures
  for (std::size_t s = 0; s < schedule.size(); ++s) {
    const Config& config = schedule[s];
    if (Status status = check(config); !status) return {{}, status};
    if (config.filtering_layer >= prompt.layers)
      return {{}, fail(Errc::filtering_layer_past_end, "", number(config.filtering_layer), number(prompt.layers))};
    if (s > 0 && config.filtering_layer <= schedule[s - 1].filtering_layer)
      return {{},
              fail(Errc::stages_unsorted, "", number(config.filtering_layer), number(schedule[s - 1].filtering_layer),
                   number(s))};
    if (pooled && config.quota == Quota::per_picture) return {{}, fail(Errc::counts_unknown, "", 0, 0, number(s))};
    const Result<std::size_t> kept = kept_visual(config, visual);
    if (!kept) return {{}, kept.status};
    plan.stage[plan.stages++] = {config.filtering_layer, *kept};
    if (s + 1 == schedule.size() || visual.empty()) continue;

    // What the next stage finds: each picture as one span of its quota or, pooled, one span of them all.
    if (Status status = detail::check_room(scratch, visual.size(), "scratch"); !status) return {{}, status};
    if (Status status = detail::check_room(quotas, visual.size(), "quotas"); !status) return {{}, status};
    std::size_t pictures = 0;
    if (config.quota == Quota::per_picture) {
      if (Status status = picture_quotas(config, visual, quotas); !status) return {{}, status};
      detail::for_each_picture(visual, [&](const detail::Picture& picture) {
        const std::size_t count = quotas[pictures];
        scratch[pictures++] = {0, count, 0, false, picture.original};
      });
    } else {
      std::size_t original = 0;
      detail::for_each_picture(visual, [&](const detail::Picture& picture) {
        original += picture.original;
        pooled = pooled || picture.first_span > 0;
      });
      scratch[pictures++] = {0, *kept, 0, false, original};
    }
    visual = {scratch.data(), pictures};
  }
  return {plan, {}};
}

// The same for one stage.
inline Result<Plan> make_plan(const Config& config, const Prompt& prompt) noexcept {
  return make_plan(Span<const Config>(&config, 1), prompt);
}

}  // namespace fastv

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

// Visual tokens kept of `tokens`: round(tokens * (1 - R)), half to even, in double arithmetic, with the
// rounding error of 1 - R part of the rule, as the authors' llava-hf code computes it
// (github.com/pkunlp-icler/FastV): 35 tokens at R = 0.9 keep 3.
inline std::size_t kept_of(std::size_t tokens, double filtering_ratio) noexcept {
  // volatile: the product is rounded to double before anything else happens to it. Contracted into a
  // fused multiply-add below, or held in an x87 register, it would keep bits that the rule drops.
  volatile const double share = 1.0 - filtering_ratio;
  volatile const double product = static_cast<double>(tokens) * share;
  const double exact = product;
  const auto whole = static_cast<std::size_t>(exact);
  const double rest = exact - static_cast<double>(whole);
  return whole + ((rest > 0.5 || (rest == 0.5 && whole % 2 == 1)) ? 1u : 0u);
}

inline std::size_t visual_tokens(Span<const TokenSpan> visual) noexcept {
  std::size_t count = 0;
  for (const TokenSpan& span : visual) count += span.count;
  return count;
}

// Visual tokens kept in the whole prompt: by count as given, by ratio the sum of the spans' shares or,
// pooled, the share of them all. A prompt without visual tokens keeps 0 of 0 whatever the settings say.
inline Result<std::size_t> kept_visual(const Config& config, Span<const TokenSpan> visual) noexcept {
  const std::size_t total = visual_tokens(visual);
  if (total == 0) return {0, {}};
  if (config.keep_count != by_ratio) {
    if (config.keep_count > total)
      return {0, detail::fail(Errc::count_above_visual, "", detail::number(config.keep_count), detail::number(total))};
    return {config.keep_count, {}};
  }
  if (config.quota == Quota::pooled) return {kept_of(total, config.filtering_ratio), {}};
  std::size_t kept = 0;
  for (const TokenSpan& span : visual) kept += kept_of(span.count, config.filtering_ratio);
  return {kept, {}};
}

// How many visual tokens each span keeps under Quota::per_span; their sum is what the prompt keeps.
// By ratio: kept_of() each span. By keep_count: shares proportional to the spans' lengths, rounded down,
// and what is left over given one by one to the largest remainders, the earlier span first (Hamilton's
// method), so that the sum is exact. quotas: one entry per span. O(spans), by count O(spans^2).
inline Status span_quotas(const Config& config, Span<const TokenSpan> visual, Span<Index> quotas) noexcept {
  if (quotas.size() < visual.size())
    return detail::fail(Errc::room_too_small, "quotas", detail::number(quotas.size()), detail::number(visual.size()));
  if (config.keep_count == by_ratio) {
    for (std::size_t i = 0; i < visual.size(); ++i)
      quotas[i] = static_cast<Index>(kept_of(visual[i].count, config.filtering_ratio));
    return {};
  }
  const Result<std::size_t> kept = kept_visual(config, visual);
  if (!kept) return kept.status;
  const std::size_t total = visual_tokens(visual);
  const auto product = [&](std::size_t i) {
    return static_cast<std::uint64_t>(*kept) * static_cast<std::uint64_t>(visual[i].count);
  };
  std::size_t given = 0;
  for (std::size_t i = 0; i < visual.size(); ++i) {
    quotas[i] = static_cast<Index>(product(i) / total);
    given += quotas[i];
  }
  for (; given < *kept; ++given) {
    std::size_t next = visual.size();
    for (std::size_t i = 0; i < visual.size(); ++i) {
      const bool open = quotas[i] == product(i) / total;  // has not had its extra one
      if (open && (next == visual.size() || product(i) % total > product(next) % total)) next = i;
    }
    ++quotas[next];
  }
  return {};
}

// Token count and KV length of every layer. Layers 0 .. K-1 run on all n tokens and keep all their KV;
// layers K .. run on the m kept tokens. A plain value: make_plan() fills it.
struct Plan {
  std::size_t tokens = 0;  // n
  std::size_t layers = 0;
  std::size_t filtering_layer = 0;  // K
  std::size_t visual = 0;           // visual tokens in the prompt
  std::size_t kept_visual = 0;      // of them kept

  // m: tokens of the pruned prompt, text included.
  std::size_t kept() const noexcept { return tokens - visual + kept_visual; }
  // Tokens that `layer` (from 0) runs on at prefill.
  std::size_t tokens_in_layer(std::size_t layer) const noexcept { return layer < filtering_layer ? tokens : kept(); }
  // KV length of `layer` after prefill and `generated` decoding steps.
  std::size_t kv_length(std::size_t layer, std::size_t generated = 0) const noexcept {
    return tokens_in_layer(layer) + generated;
  }
  // Position id of the token fed at decoding step `generated` (from 0): it counts the whole prompt,
  // dropped tokens included, in every layer.
  std::size_t next_position(std::size_t generated = 0) const noexcept { return tokens + generated; }
};

// Errors: everything that can be wrong with the settings or the spans. O(spans).
inline Result<Plan> make_plan(const Config& config, const Prompt& prompt) noexcept {
  if (Status status = check(config); !status) return {{}, status};
  if (prompt.layers == 0) return {{}, detail::fail(Errc::no_layers)};
  if (config.filtering_layer >= prompt.layers)
    return {{},
            detail::fail(Errc::filtering_layer_past_end, "", detail::number(config.filtering_layer),
                         detail::number(prompt.layers))};
  if (Status status = check(prompt.visual, prompt.tokens); !status) return {{}, status};
  const Result<std::size_t> kept = kept_visual(config, prompt.visual);
  if (!kept) return {{}, kept.status};
  return {{prompt.tokens, prompt.layers, config.filtering_layer, visual_tokens(prompt.visual), *kept}, {}};
}

}  // namespace fastv

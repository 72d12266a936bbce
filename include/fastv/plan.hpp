// fastv: every length the engine needs, from shapes alone, before any value exists.
#pragma once

#include "config.hpp"
#include "detail/buffer.hpp"
#include "detail/rank.hpp"
#include "kept.hpp"

#include "detail/begin.hpp"

namespace fastv {

// What is known of a prompt before it runs.
struct Prompt {
  std::size_t tokens;                    // n: text and visual tokens
  std::size_t layers;                    // decoder layers of the model
  Span<const TokenSpan> visual;          // sorted, disjoint; empty for a prompt without images
  Span<const std::size_t> past = {};     // keys of earlier turns already in the cache: one for all layers, or one
                                         // each, [layers], as Slots::length() has it; empty: none
  Span<const bool> full_attention = {};  // [layers]: whether the layer has full attention; empty: all have
};

// The most stages a schedule may have.
inline constexpr std::size_t max_stages = 8;

// Token count and KV length of every layer. Layers before the first stage run on all n tokens and keep all their KV;
// from a stage's filtering layer on they run on what it kept. Layers between two stages form a group: group 0 up to the
// first stage, group s from stage s - 1 on. What earlier turns left is told apart from that, since they may have been
// pruned at other layers. A plain value: make_plan() fills it.
struct Plan {
  // One stage.
  struct Stage {
    std::size_t filtering_layer;  // layers that run before it
    std::size_t kept_visual;      // visual tokens it keeps
  };
  // Layers whose caches hold as many keys of earlier turns.
  struct Past {
    std::size_t first_layer;  // up to that of the next entry
    std::size_t keys;         // of earlier turns, in each of the layers
  };
  std::size_t tokens = 0;          // n
  std::size_t layers = 0;          // of the model
  std::size_t visual = 0;          // visual tokens in the prompt
  std::size_t stages = 0;          // stages in use; those past it are 0
  Stage stage[max_stages] = {};    // in order
  std::size_t pasts = 1;           // entries of past in use
  Past past[max_stages + 1] = {};  // by first layer, the first entry's being 0

  // Number of layer groups.
  FASTV_INLINE std::size_t groups() const noexcept { return stages + 1; }
  // Group of `layer` (from 0). O(stages), as all that take a layer.
  FASTV_INLINE std::size_t group_of(std::size_t layer) const noexcept {
    std::size_t group = 0;
    while (group < stages && stage[group].filtering_layer <= layer) ++group;
    return group;
  }
  // Tokens that the layers of `group` run on at prefill, text included.
  FASTV_INLINE std::size_t tokens_in_group(std::size_t group) const noexcept {
    return group == 0 ? tokens : tokens - visual + stage[group - 1].kept_visual;
  }
  // Tokens that `layer` runs on at prefill, text included.
  FASTV_INLINE std::size_t tokens_in_layer(std::size_t layer) const noexcept {
    return tokens_in_group(group_of(layer));
  }
  // Visual tokens that `layer` runs on at prefill.
  FASTV_INLINE std::size_t visual_in_layer(std::size_t layer) const noexcept {
    return tokens_in_layer(layer) - (tokens - visual);
  }
  // Visual tokens that the last layer runs on.
  FASTV_INLINE std::size_t kept_visual() const noexcept { return stages == 0 ? visual : stage[stages - 1].kept_visual; }
  // All tokens that the last layer runs on.
  FASTV_INLINE std::size_t kept() const noexcept { return tokens - visual + kept_visual(); }
  // Keys of earlier turns in the cache of `layer`.
  FASTV_INLINE std::size_t past_in_layer(std::size_t layer) const noexcept {
    std::size_t i = 0;
    while (i + 1 < pasts && past[i + 1].first_layer <= layer) ++i;
    return past[i].keys;
  }
  // KV length of `layer` after prefill and `generated` decoding steps, earlier turns included.
  FASTV_INLINE std::size_t kv_length(std::size_t layer, std::size_t generated = 0) const noexcept {
    return past_in_layer(layer) + tokens_in_layer(layer) + generated;
  }
  // Position id of the token fed at decoding step `generated` (from 0), counted from the start of this prompt: it counts
  // dropped tokens too, in every layer. (M-RoPE and ids of the caller's own: see next_position() in apply.hpp.)
  FASTV_INLINE std::size_t next_position(std::size_t generated = 0) const noexcept { return tokens + generated; }
};

inline namespace FASTV_KIND {

// Visual tokens kept of `tokens`, by the authors' llava-hf code (github.com/pkunlp-icler/FastV):
//
//   round(tokens * (1 - R))
//
// half to even, in double arithmetic, with the rounding error of 1 - R part of the rule: 35 tokens at R = 0.9 keep 3.
// Rounding::up is exact instead: 10 tokens at R = 0.7 keep 3. R must lie in [0, 1]. O(1).
inline std::size_t kept_count(std::size_t tokens, double filtering_ratio,
                              Rounding rounding = Rounding::half_even) noexcept {
  // volatile: the product is rounded to double before anything else happens to it. Contracted into a fused
  // multiply-add below, or held in an x87 register, it would keep bits that the rule drops.
  volatile const double share = 1.0 - filtering_ratio;
  volatile const double product = static_cast<double>(tokens) * share;
  const double exact = product;
  const auto whole = static_cast<std::size_t>(exact);
  const double rest = exact - static_cast<double>(whole);
  if (rounding == Rounding::up) {
    // Two roundings err by at most this much; what lies so close to a whole number is that number.
    const double error = static_cast<double>(tokens) * 4.5e-16;
    return whole + (rest > error ? 1u : 0u);
  }
  return whole + ((rest > 0.5 || (rest == 0.5 && whole % 2 == 1)) ? 1u : 0u);
}

// Tokens of all spans together. O(spans).
inline std::size_t visual_tokens(Span<const TokenSpan> visual) noexcept {
  std::size_t count = 0;
  for (const TokenSpan& span : visual) count += span.count;
  return count;
}

// Calls use(number, position) for every visual token: number counts across the spans, position in the prompt. The order
// in which scores are given. O(visual tokens).
template <class Use>
void for_each_visual(Span<const TokenSpan> visual, Use use) {
  std::size_t number = 0;
  for (const TokenSpan& span : visual)
    for (std::size_t i = 0; i < span.count; ++i) use(number++, span.first + i);
}

}  // namespace FASTV_KIND

namespace detail {
inline namespace FASTV_KIND {

// One image: a span and those that continue it.
struct Image {
  std::size_t first_span, spans;
  std::size_t tokens, original, columns;
  double filtering_ratio;
};

// Calls each(image) for every image, in order.
template <class Each>
void for_each_image(Span<const TokenSpan> visual, Each each) {
  for (std::size_t s = 0; s < visual.size();) {
    Image image{s, 0, 0, 0, visual[s].columns, visual[s].filtering_ratio};
    do {
      image.tokens += visual[s].count;
      image.original += visual[s].original == 0 ? visual[s].count : visual[s].original;
      ++image.spans;
      ++s;
    } while (s < visual.size() && visual[s].continues);
    each(static_cast<const Image&>(image));
  }
}

inline std::size_t share_of(const Config& config, std::size_t tokens, std::size_t original, double ratio) noexcept {
  const std::size_t base = config.ratio_of == RatioOf::original ? original : tokens;
  const std::size_t kept = kept_count(base, ratio == by_config ? config.filtering_ratio : ratio, config.rounding);
  return kept < tokens ? kept : tokens;
}
inline std::size_t minimum_of(const Config& config, const Image& image) noexcept {
  return config.min_per_image < image.tokens ? config.min_per_image : image.tokens;
}

// The images of a prompt whose settings and spans have been validated.
struct Images {
  std::size_t count = 0;   // images
  std::size_t tokens = 0;  // visual tokens
  std::size_t minima = 0;  // sum of what every image keeps at least
  std::size_t keep = 0;    // visual tokens that stay
};

inline Result<Images> count_images(const Config& config, Span<const TokenSpan> visual) noexcept {
  Images images;
  std::size_t original = 0, shares = 0;
  for_each_image(visual, [&](const Image& image) {
    const std::size_t share = share_of(config, image.tokens, image.original, image.filtering_ratio);
    const std::size_t least = minimum_of(config, image);
    ++images.count;
    images.tokens += image.tokens;
    images.minima += least;
    shares += share < least ? least : share;
    original += image.original;
  });
  if (images.tokens == 0) return {images, {}};
  if (config.keep_count != by_ratio) {
    if (config.keep_count > images.tokens)
      return {{},
              fail(Errc::bad_setting, "keep_count is {} but the prompt has {} visual tokens: use at most that",
                   config.keep_count, images.tokens)};
    images.keep = config.keep_count;
  } else if (config.quota == Quota::pooled) {
    const std::size_t share = share_of(config, images.tokens, original, by_config);
    images.keep = share < images.minima ? images.minima : share;
  } else {
    images.keep = shares;
  }
  return {images, {}};
}

// What each image keeps at least, as far as the count reaches: a count too small for every minimum has none.
inline bool minima_hold(const Config& config, const Images& images) noexcept {
  return config.min_per_image > 0 && images.minima <= images.keep;
}

// quotas, scratch: [images]. The quotas sum to images.keep.
template <class Word>
void quotas_of(const Config& config, Span<const TokenSpan> visual, const Images& images, Span<Word> quotas,
               Span<Word> scratch) noexcept {
  std::size_t i = 0;
  if (config.keep_count == by_ratio) {
    for_each_image(visual, [&](const Image& image) {
      const std::size_t share = share_of(config, image.tokens, image.original, image.filtering_ratio);
      const std::size_t least = minimum_of(config, image);
      quotas[i++] = static_cast<Word>(share < least ? least : share);
    });
    return;
  }
  const bool hold = minima_hold(config, images);
  const auto least = [&](const Image& image) { return hold ? minimum_of(config, image) : 0; };
  for_each_image(visual, [&](const Image& image) { quotas[i++] = static_cast<Word>(image.tokens - least(image)); });
  apportion(images.keep - (hold ? images.minima : 0), quotas.first(images.count), scratch.first(images.count));
  i = 0;
  for_each_image(visual, [&](const Image& image) { quotas[i++] += static_cast<Word>(least(image)); });
}

// Sequence i of a packed batch, whose rows follow the `reach` rows that the sequences before it take, padding included.
inline Status check_place(std::size_t i, std::size_t first, std::size_t tokens, std::size_t reach) noexcept {
  if (first < reach)
    return fail(Errc::bad_prompt,
                "sequence {} starts at row {} but the previous one reaches up to {}: sort them and keep them disjoint",
                i, first, reach);
  if (first > max_tokens || tokens > max_tokens - first)
    return fail(Errc::bad_prompt, "sequence {} has {} tokens from row {} on but at most {} rows are supported", i,
                tokens, first, max_tokens);
  return {};
}

// What the next stage finds, as far as shapes tell: each image as one span of its quota or, pooled, one span of them all;
// positions count the visual tokens. pooled: set where several images become one. quotas: [2 * images]; spans: [images],
// which may be `visual` itself. Returns the number of spans.
inline std::size_t spans_left(const Config& config, Span<const TokenSpan> visual, const Images& images,
                              Span<Index> quotas, Span<TokenSpan> spans, bool& pooled) noexcept {
  std::size_t image_number = 0, original = 0, position = 0;
  if (config.quota == Quota::per_image) {
    quotas_of(config, visual, images, quotas.first(images.count),
              Span<Index>(quotas.data() + images.count, images.count));
    for_each_image(visual, [&](const Image& image) {
      const std::size_t count = quotas[image_number];
      spans[image_number++] = {position, count, 0, false, image.original, image.filtering_ratio};
      position += count;
    });
    return image_number;
  }
  for_each_image(visual, [&](const Image& image) {
    original += image.original;
    pooled = pooled || image.first_span > 0;
  });
  spans[0] = {0, images.keep, 0, false, original};
  return 1;
}

}  // namespace FASTV_KIND
}  // namespace detail

inline namespace FASTV_KIND {

// Visual tokens kept in the whole prompt. By count: as given. By ratio: the sum of the images' shares or, pooled, the
// share of them all, at least the sum of the minima. A prompt without visual tokens keeps 0 of 0 whatever the settings
// say. O(spans).
inline Result<std::size_t> kept_visual(const Config& config, Span<const TokenSpan> visual,
                                       std::size_t tokens = max_tokens) noexcept {
  if (Status status = validate(config, visual, tokens); !status) return {0, status};
  const Result<detail::Images> images = detail::count_images(config, visual);
  return {images->keep, images.status};
}

// How many visual tokens each image keeps under Quota::per_image; their sum is kept_visual().
//
// By ratio: kept_count() of its tokens, or min_per_image where that is more. By keep_count: every image its min_per_image,
// and the rest in proportion to the tokens that images have beyond it, rounded by Hamilton's method; a count too small for
// every minimum is shared out without any.
//
// quotas: twice as many entries as images; the first half receives them, the second is scratch. Returns the number of
// images. O(spans).
inline Result<std::size_t> image_quotas(const Config& config, Span<const TokenSpan> visual,
                                        Span<Index> quotas) noexcept {
  if (Status status = validate(config, visual, max_tokens); !status) return {0, status};
  const Result<detail::Images> images = detail::count_images(config, visual);
  if (!images) return {0, images.status};
  if (Status status = detail::expect_room(quotas, 2 * images->count, "quotas"); !status) return {0, status};
  detail::quotas_of(config, visual, *images, quotas.first(images->count),
                    {quotas.data() + images->count, images->count});
  return {images->count, {}};
}

// The spans of the shorter sequence, for the next stage: where each image's kept tokens now stand. Positions count the
// kept tokens, and the grid is no longer known. An image that lost every token stays as one empty span, since the next
// stage's ratio may count its original tokens. left: one entry per span. Returns the number of spans written.
// O(kept + spans).
inline Result<std::size_t> next_spans(const KeptRows& rows, Span<const TokenSpan> visual,
                                      Span<TokenSpan> left) noexcept {
  const Span<const Index> kept = rows.indices;
  if (!rows.status) return {0, rows.status};
  if (Status status = detail::check_indices(kept, max_tokens); !status) return {0, status};
  if (Status status = detail::expect_room(visual, visual.size(), "visual spans"); !status) return {0, status};
  if (Status status = detail::expect_room(left, visual.size(), "spans"); !status) return {0, status};
  std::size_t written = 0, k = 0;
  for (const TokenSpan& now : visual) {
    const TokenSpan span = now;  // left may be visual itself
    while (k < kept.size() && kept[k] < span.first) ++k;
    const std::size_t first = k, original = span.original == 0 ? span.count : span.original;
    while (k < kept.size() && kept[k] < span.first + span.count) ++k;
    if (span.continues && written > 0 && (k == first || left[written - 1].count == 0)) {
      // Two spans of one image of which one is empty: they become one.
      TokenSpan& previous = left[written - 1];
      if (previous.count == 0) previous.first = first;
      previous.count += k - first;
      previous.original += original;
      continue;
    }
    left[written++] = {first, k - first, 0, span.continues, original, span.filtering_ratio};
  }
  return {written, {}};
}

}  // namespace FASTV_KIND

namespace detail {
inline namespace FASTV_KIND {

// What layer K - 1 must have where its attention ranks.
inline Status expect_full_attention(const Config& config, const Prompt& prompt) noexcept {
  if (prompt.full_attention.empty() || !uses_scores(config) || config.filtering_layer == 0) return {};
  if (prompt.full_attention.size() != prompt.layers)
    return fail(Errc::bad_shape, "full_attention has {} entries for {} layers: give one each, or none",
                prompt.full_attention.size(), prompt.layers);
  if (prompt.full_attention.data() == nullptr) return fail_null("full_attention");
  const std::size_t k = config.filtering_layer;
  if (prompt.full_attention[k - 1]) return {};
  std::size_t below = k - 1, above = k + 1;
  while (below > 0 && !prompt.full_attention[below - 1]) --below;
  while (above < prompt.layers && !prompt.full_attention[above - 1]) ++above;
  if (below > 0 && above < prompt.layers)
    return fail(Errc::bad_setting, "filtering_layer is {} but layer {} has no full attention to rank by: use {} or {}",
                k, k - 1, below, above);
  if (below > 0 || above < prompt.layers)
    return fail(Errc::bad_setting, "filtering_layer is {} but layer {} has no full attention to rank by: use {}", k,
                k - 1, below > 0 ? below : above);
  return fail(Errc::bad_setting,
              "filtering_layer is {} but no layer below the last has full attention to rank by: use "
              "Selection::uniform, or scores of your own without full_attention",
              k);
}

// What earlier turns left, as stretches of layers. O(layers), where there is a number for each.
inline Status read_past(const Prompt& prompt, Plan& plan) noexcept {
  if (prompt.past.empty()) return {};
  if (prompt.past.size() > 1 && prompt.past.size() != prompt.layers)
    return fail(Errc::bad_shape, "past has {} entries for {} layers: give one for all, or one each", prompt.past.size(),
                prompt.layers);
  if (prompt.past.data() == nullptr) return fail_null("past");
  plan.pasts = 0;
  for (std::size_t layer = 0; layer < prompt.past.size(); ++layer) {
    const std::size_t keys = prompt.past[layer];
    if (keys > max_tokens - prompt.tokens)
      return fail(Errc::bad_prompt,
                  "the prompt has {} tokens and {} keys of earlier turns but at most {} together are supported",
                  prompt.tokens, keys, max_tokens);
    if (plan.pasts > 0 && plan.past[plan.pasts - 1].keys == keys) continue;
    if (plan.pasts == sizeof(plan.past) / sizeof(plan.past[0]))
      return fail(
          Errc::not_supported,
          "past changes at more than {} layers, from layer to layer, of which {} is one too many: prune the turns "
          "of a conversation at fewer layers",
          plan.pasts - 1, layer);
    plan.past[plan.pasts++] = {layer, keys};
  }
  return {};
}

}  // namespace FASTV_KIND
}  // namespace detail

inline namespace FASTV_KIND {

// The plan of a schedule of stages, filtering layers ascending; an empty one prunes nothing. Errors: everything that can
// be wrong with the settings or the spans. Allocates one entry per span where several stages meet several images.
// O(stages * spans + layers).
inline Result<Plan> make_plan(Span<const Config> schedule, const Prompt& prompt) noexcept {
  if (prompt.layers == 0) return {{}, fail(Errc::bad_setting, "the model has 0 layers: state at least 1")};
  if (schedule.size() > max_stages)
    return {{},
            fail(Errc::bad_setting, "the schedule has {} stages but at most {} are supported", schedule.size(),
                 max_stages)};
  if (Status status = detail::expect_room(schedule, schedule.size(), "the schedule"); !status) return {{}, status};
  if (Status status = validate(prompt.visual, prompt.tokens); !status) return {{}, status};

  Plan plan;
  plan.tokens = prompt.tokens;
  plan.layers = prompt.layers;
  plan.visual = visual_tokens(prompt.visual);
  if (Status status = detail::read_past(prompt, plan); !status) return {{}, status};
  detail::Buffer<TokenSpan> spans;
  detail::Buffer<Index> quotas;
  Span<const TokenSpan> visual = prompt.visual;
  bool pooled = false;  // an earlier stage pooled several images
  for (std::size_t s = 0; s < schedule.size(); ++s) {
    const Config& config = schedule[s];
    if (Status status = validate(config, visual, prompt.tokens); !status) return {{}, status};
    if (config.filtering_layer >= prompt.layers)
      return {{},
              fail(Errc::bad_setting,
                   "filtering_layer is {} but the model has {} layers: use at most {}, so that one "
                   "layer is left to run on the shorter sequence",
                   config.filtering_layer, prompt.layers, prompt.layers - 1)};
    if (s > 0 && config.filtering_layer <= schedule[s - 1].filtering_layer)
      return {{},
              fail(Errc::bad_setting,
                   "stage {} has filtering_layer {} but the previous stage has {}: sort the stages "
                   "and keep one a layer",
                   s, config.filtering_layer, schedule[s - 1].filtering_layer)};
    if (Status status = detail::expect_full_attention(config, prompt); !status) return {{}, status};
    if (pooled && config.quota == Quota::per_image)
      return {{},
              fail(Errc::bad_setting,
                   "stage {} gives every image its own share, but an earlier stage pools them, so "
                   "that the counts depend on scores: pool this stage too",
                   s)};
    if (pooled && config.min_per_image > 0 && config.keep_count == by_ratio)
      return {{},
              fail(Errc::bad_setting,
                   "stage {} has min_per_image {} behind a stage that pools the images, so that the "
                   "count depends on scores: give a keep_count, or no minimum",
                   s, config.min_per_image)};
    const Result<detail::Images> images = detail::count_images(config, visual);
    if (!images) return {{}, images.status};
    plan.stage[plan.stages++] = {config.filtering_layer, images->keep};
    if (s + 1 == schedule.size() || visual.empty()) continue;

    if (Status status = spans.reserve(images->count); !status) return {{}, status};
    if (Status status = quotas.reserve(2 * images->count); !status) return {{}, status};
    const std::size_t left = detail::spans_left(config, visual, *images, quotas.first(2 * images->count),
                                                spans.first(images->count), pooled);
    visual = {spans.first(left).data(), left};
  }
  return {plan, {}};
}

// The same for one stage.
inline Result<Plan> make_plan(const Config& config, const Prompt& prompt) noexcept {
  return make_plan(Span<const Config>(&config, 1), prompt);
}

}  // namespace FASTV_KIND

}  // namespace fastv

#include "detail/end.hpp"

// fastv: the user's settings, and the one place where they are validated.
#pragma once

#include "status.hpp"

#include "detail/begin.hpp"

namespace fastv {

// ---- settings -----------------------------------------------------------------------------------

// Which query rows of the attention map a score is the mean of.
enum class ScoreRows {
  last,   // the last prompt token's row: what the authors' released code ranks by (default)
  all,    // mean over every row of the prompt: the wording of the paper, section 4.1
  listed  // mean over Config::listed_rows
};

// By what rule the planned count is filled.
enum class Selection {
  top_k,    // the highest scores; of equal scores the earlier token; NaN is the lowest (default)
  random,   // every subset equally likely, drawn from Config::seed; looks at no score
  uniform,  // evenly spaced (in both directions where TokenSpan::columns is given); looks at no score
  diverse   // one by one, each for its score and for what it adds to those before; see Diversity. Needs with_features()
};

// What a token adds to those already kept, cos being the cosine of two tokens' features.
enum class Novelty {
  nearest,  // 1 - the greatest cos with a kept token (default): maximal marginal relevance, max-min
  coverage,  // mean over all tokens j of max(0, cos_ij - the greatest cos_jk with a kept k, at least 0): facility location
  volume     // squared distance of its features, at unit length, from the span of the kept ones: a DPP's greedy choice
};

// How score and novelty make a value.
enum class Blend {
  sum,     // weight * s + (1 - weight) * novelty, s the score scaled to [0, 1] among those it competes with (default)
  product  // s^weight * novelty, s the score divided by the greatest; where one is negative, scaled to [0, 1]
};

// Selection::diverse: takes the token of the greatest value, again and again; of equal values that of the higher score,
// then the earlier. Published rules are settings of it:
//
//   IDPruner (MMR, arXiv 2602.13315)      {Novelty::nearest, Blend::sum, 0.5}
//   DivPrune (max-min, CVPR 2025)         {Novelty::nearest, Blend::sum, 0}
//   AnchorPrune (arXiv 2607.07033)        {Novelty::nearest, Blend::product, 1, 0.5}, at its upper bound of anchors
//   SCOPE (arXiv 2510.24214)              {Novelty::coverage, Blend::product, 1}
//   CDPruner (DPP, arXiv 2506.10967)      {Novelty::volume, Blend::product, 2}
//
// O(kept * visual * width) for nearest and volume. coverage, and nearest without scores, compare every two tokens, once
// where the tokens of an image are no more than their features are wide: O(visual^2 * width), and as many floats as that
// table has, visual^2. With more tokens they are compared again as they are kept.
struct Diversity {
  Novelty novelty = Novelty::nearest;  // what a token adds
  Blend blend = Blend::sum;            // how score and novelty make a value
  double weight = 0.5;  // sum: share of the score, in [0, 1]; product: its exponent. 0: no score is looked at, and
                        // nearest starts with the token farthest from its nearest neighbour
  // This share of the count (of what an even grid leaves of it; where images are pooled and have minima, of each minimum
  // and of the rest) goes to the highest scores, whatever they resemble, in [0, 1].
  double protected_share = 0;
};

// Who competes with whom.
enum class Quota {
  per_image,  // every image keeps its own share (default)
  pooled      // all images compete for one count
};

// How L (1 - R) becomes a whole number of tokens.
enum class Rounding {
  half_even,  // the authors' llava-hf code (default)
  up          // ceil(L (1 - R)) in exact arithmetic: the rule of TensorRT-Edge-LLM's visual pruner
};

// What R is a share of, in a schedule of several stages.
enum class RatioOf {
  remaining,  // R is the share of what earlier stages left (default; the same as original in the first stage)
  original    // R is the share of the image's tokens before any stage
};

// Config::keep_count where filtering_ratio decides.
inline constexpr std::size_t by_ratio = static_cast<std::size_t>(-1);

// One stage of pruning. A schedule of several stages is a list of them, filtering layers ascending.
struct Config {
  // K: layers that run before this stage (paper, section 4.1). 0: ahead of the first, by scores that need no layer, such as
  // your own, or logits() of layer 0's projections
  std::size_t filtering_layer = 2;
  double filtering_ratio = 0.5;             // R: share of the visual tokens that is dropped, in [0, 1]
  RatioOf ratio_of = RatioOf::remaining;    // what R is a share of
  Rounding rounding = Rounding::half_even;  // how the count is rounded
  std::size_t keep_count = by_ratio;        // visual tokens kept in the whole prompt; by_ratio: R decides
  Quota quota = Quota::per_image;           // who competes with whom
  std::size_t min_per_image = 0;            // tokens every image keeps, as far as the count reaches

  ScoreRows score_rows = ScoreRows::last;  // which query rows are averaged
  Span<const Index> prior_rows = {};       // not empty: corrected for what these rows attend to; see correct_by_prior()
  Span<const Index> listed_rows = {};      // prompt positions, for ScoreRows::listed; read during each call

  Selection selection = Selection::top_k;  // by what rule the count is filled
  std::uint64_t seed = 0;                  // for Selection::random
  double uniform_share = 0;                // top_k, diverse: this share of the count goes to an even grid, in [0, 1];
                                           // of pooled images, at most what their minima leave
  std::size_t window_rows = 0;     // top_k, diverse: windows of so many rows and columns of the grid keep a fixed share
  std::size_t window_columns = 0;  // of the count each; 0: the whole image is one window
  Diversity diversity = {};        // for Selection::diverse
};

// ---- validation ---------------------------------------------------------------------------------

namespace detail {
inline namespace FASTV_KIND {

inline bool is_share(const double& value) noexcept { return !is_nan(value) && value >= 0 && value <= 1; }

// Whether a rule shares its count out to windows, an even grid and a rest that competes.
inline bool competes(const Config& config) noexcept {
  return config.selection == Selection::top_k || config.selection == Selection::diverse;
}

// The layer whose attention ranks at filtering layer k; 0 as well ahead of the first.
inline std::size_t scored_layer(std::size_t k) noexcept { return k == 0 ? 0 : k - 1; }

inline Status check_diversity(const Diversity& diversity) noexcept {
  const double &weight = diversity.weight, &share = diversity.protected_share;
  if (diversity.blend == Blend::sum && !is_share(weight))
    return fail(Errc::bad_setting,
                "the score's weight is {} but must lie between 0 (novelty alone) and 1 (score alone)", weight);
  if (is_nan(weight) || is_infinite(weight) || !(weight >= 0))
    return fail(Errc::bad_setting, "the score's exponent is {} but must be finite and at least 0", weight);
  if (!is_share(share)) return fail(Errc::bad_setting, "protected_share is {} but must lie between 0 and 1", share);
  return {};
}

}  // namespace FASTV_KIND
}  // namespace detail

inline namespace FASTV_KIND {

// Whether the settings rank tokens by scores. Where they do not, NoEvidence serves, and an engine need not keep what scores
// are computed from.
inline bool uses_scores(const Diversity& d) noexcept { return d.weight > 0 || d.protected_share > 0; }
inline bool uses_scores(const Config& config) noexcept {
  return config.selection == Selection::top_k ||
         (config.selection == Selection::diverse && uses_scores(config.diversity));
}

// Settings that are wrong whatever the prompt. O(1).
inline Status validate(const Config& config) noexcept {
  if (detail::is_nan(config.filtering_ratio))
    return fail(Errc::bad_setting, "filtering_ratio is not a number: use a share from 0 to 1");
  if (!detail::is_share(config.filtering_ratio))
    return fail(Errc::bad_setting,
                "filtering_ratio is {} but must lie between 0 (drop none) and 1 (drop every visual token)",
                config.filtering_ratio);
  if (detail::is_nan(config.uniform_share) || !detail::is_share(config.uniform_share))
    return fail(Errc::bad_setting, "uniform_share is {} but must lie between 0 and 1", config.uniform_share);
  if (!detail::competes(config)) return {};
  if (config.selection == Selection::diverse) {
    if (Status status = detail::check_diversity(config.diversity); !status) return status;
  }
  if ((config.window_rows == 0) != (config.window_columns == 0))
    return fail(Errc::bad_setting, "the window has {} rows and {} columns: set both, or neither for none",
                config.window_rows, config.window_columns);
  if (config.window_rows != 0 && config.quota == Quota::pooled)
    return fail(Errc::bad_setting,
                "windows of {} x {} give every part of an image a fixed share, which contradicts "
                "Quota::pooled: use Quota::per_image, or no windows",
                config.window_rows, config.window_columns);
  if (config.score_rows == ScoreRows::listed) {
    if (config.listed_rows.empty())
      return fail(Errc::bad_setting,
                  "score_rows is listed but listed_rows is empty: list at least one prompt position");
    if (config.listed_rows.data() == nullptr) return detail::fail_null("listed_rows");
  }
  if (!config.prior_rows.empty() && config.prior_rows.data() == nullptr) return detail::fail_null("prior_rows");
  return {};
}

// Spans of visual tokens in a prompt of `tokens` tokens: sorted, disjoint, not empty, inside the prompt. O(spans).
inline Status validate(Span<const TokenSpan> visual, std::size_t tokens) noexcept {
  if (tokens == 0) return fail(Errc::bad_prompt, "the prompt has 0 tokens: hand over at least 1");
  if (tokens > max_tokens)
    return fail(Errc::bad_prompt, "the prompt has {} tokens but at most {} are supported", tokens, max_tokens);
  if (!visual.empty() && visual.data() == nullptr) return detail::fail_null("visual spans");
  for (std::size_t i = 0; i < visual.size(); ++i) {
    const TokenSpan& span = visual[i];
    if (span.count == 0 && span.original == 0)
      return fail(Errc::bad_prompt, "visual span {} has 0 tokens: leave it out", i);
    if (span.first > tokens || span.count > tokens - span.first) {
      const std::size_t end =
          span.count > max_tokens || span.first > max_tokens ? static_cast<std::size_t>(-1) : span.first + span.count;
      return fail(Errc::bad_prompt,
                  "visual span {} ends before position {} but the prompt has {} tokens: shorten the span", i, end,
                  tokens);
    }
    if (i > 0) {
      const TokenSpan& previous = visual[i - 1];
      if (span.first < previous.first)
        return fail(Errc::bad_prompt,
                    "visual span {} starts at position {}, before the previous span, which starts at "
                    "{}: sort the spans",
                    i, span.first, previous.first);
      if (span.first < previous.first + previous.count)
        return fail(Errc::bad_prompt,
                    "visual span {} starts at position {} but the previous span reaches up to {}: make them disjoint",
                    i, span.first, previous.first + previous.count);
    }
    if (span.continues && i == 0)
      return fail(Errc::bad_prompt, "visual span 0 continues an image but no span comes before it: clear its flag");
    if (span.original > max_tokens)
      return fail(Errc::bad_prompt, "visual span {} has {} original tokens but at most {} are supported", i,
                  span.original, max_tokens);
    if (span.original != 0 && span.original < span.count)
      return fail(Errc::bad_prompt,
                  "visual span {} has {} original tokens, fewer than the {} it has now: use next_spans() or 0", i,
                  span.original, span.count);
    const double ratio = span.filtering_ratio;
    if (detail::is_nan(ratio) || !(ratio == by_config || detail::is_share(ratio)))
      return fail(Errc::bad_prompt, "visual span {} has filtering_ratio {}: use a share from 0 to 1, or by_config", i,
                  ratio);
    if (span.continues) {
      if (ratio != by_config)
        return fail(Errc::bad_prompt,
                    "visual span {} continues an image but has a filtering_ratio of its own, {}: set it "
                    "on the image's first span",
                    i, ratio);
      continue;
    }
    std::size_t count = span.count;
    for (std::size_t j = i + 1; j < visual.size() && visual[j].continues; ++j) count += visual[j].count;
    if (span.columns != 0 && count % span.columns != 0)
      return fail(Errc::bad_prompt,
                  "visual span {} has {} columns, which do not divide the image's {} tokens into rows: "
                  "use 0 where the grid is unknown",
                  i, span.columns, count);
  }
  return {};
}

// Settings and prompt together: both of the above, and windows where a grid is unknown. O(spans).
inline Status validate(const Config& config, Span<const TokenSpan> visual, std::size_t tokens) noexcept {
  if (Status status = validate(config); !status) return status;
  if (Status status = validate(visual, tokens); !status) return status;
  const bool windows = detail::competes(config) && config.window_rows != 0;
  for (std::size_t i = 0; i < visual.size(); ++i) {
    if (visual[i].continues) continue;
    std::size_t count = visual[i].count;
    for (std::size_t j = i + 1; j < visual.size() && visual[j].continues; ++j) count += visual[j].count;
    if (windows && visual[i].columns == 0 && count > 0)
      return fail(Errc::bad_prompt,
                  "windows are asked for but the grid of visual span {} is unknown: set its columns "
                  "(an earlier stage leaves no grid)",
                  i);
    if (visual[i].filtering_ratio == by_config) continue;
    if (config.keep_count != by_ratio)
      return fail(Errc::bad_prompt,
                  "visual span {} has filtering_ratio {} but keep_count is {}, which decides: use one of them", i,
                  visual[i].filtering_ratio, config.keep_count);
    if (config.quota == Quota::pooled)
      return fail(Errc::bad_prompt,
                  "visual span {} has a filtering_ratio of its own, {}, but the images are pooled: use "
                  "Quota::per_image",
                  i, visual[i].filtering_ratio);
  }
  return {};
}

}  // namespace FASTV_KIND

}  // namespace fastv

#include "detail/end.hpp"

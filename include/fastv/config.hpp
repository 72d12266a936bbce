// fastv: the user's settings, and the one place where they are checked.
#pragma once

#include "element.hpp"
#include "error.hpp"

namespace fastv {

// ---- settings -----------------------------------------------------------------------------------

// Which rows of the attention map a score is the mean of.
enum class ScoreRows {
  last,   // the last prompt token's row: what the authors' released code ranks by (default)
  all,    // mean over every row of the prompt: the wording of the paper, section 4.1
  listed  // mean over Config::listed_rows
};

// By what rule the planned count is filled.
enum class Selection {
  top_k,   // the highest scores; of equal scores the earlier token; NaN is the lowest (default)
  random,  // every subset equally likely, drawn from Config::seed; looks at no score
  uniform  // evenly spaced (in both directions where TokenSpan::columns is given); looks at no score
};

// Who competes with whom.
enum class Quota {
  per_picture,  // every picture keeps its own share (default)
  pooled        // all pictures compete for one count
};

// How L (1 - R) becomes a whole number of tokens.
enum class Rounding {
  half_even,  // the authors' llava-hf code (default)
  up          // ceil(L (1 - R)): the rule of TensorRT-Edge-LLM's visual pruner
};

// What R is a share of, in a schedule of several stages.
enum class RatioOf {
  remaining,  // R is the share of what earlier stages left (default; the same as original in the first stage)
  original    // R is the share of the picture's tokens before any stage
};

// Config::keep_count where filtering_ratio decides.
inline constexpr std::size_t by_ratio = static_cast<std::size_t>(-1);

// One stage of pruning. A schedule of several stages is a list of them, filtering layers ascending.
struct Config {
  std::size_t filtering_layer = 2;  // K: layers that run before this stage (paper, section 4.1)
  double filtering_ratio = 0.5;     // R: share of the visual tokens that is dropped, in [0, 1]
  // See their types.
  RatioOf ratio_of = RatioOf::remaining;
  Rounding rounding = Rounding::half_even;
  std::size_t keep_count = by_ratio;  // visual tokens kept in the whole prompt; by_ratio: R decides
  Quota quota = Quota::per_picture;   // see its type
  std::size_t min_per_picture = 0;    // tokens every picture keeps where the budget allows

  ScoreRows score_rows = ScoreRows::last;  // see its type
  Span<const Index> prior_rows = {};       // not empty: corrected for what these rows attend to; see prior_corrected()
  Span<const Index> listed_rows = {};      // prompt positions, for ScoreRows::listed; read during each call

  Selection selection = Selection::top_k;  // see its type
  std::uint64_t seed = 0;                  // for Selection::random
  double uniform_share = 0;                // top_k: this share of the count goes to an even grid, in [0, 1]
  std::size_t window_rows = 0;             // top_k: every window of this many rows and columns of the grid keeps its
  std::size_t window_columns = 0;          //   share of the count; 0: the whole picture is one window
};

// ---- checks -------------------------------------------------------------------------------------

// Settings that are wrong whatever the prompt.
inline Status check(const Config& config) noexcept {
  using detail::fail;
  if (detail::is_nan(config.filtering_ratio)) return fail(Errc::ratio_not_a_number);
  if (!(config.filtering_ratio >= 0 && config.filtering_ratio <= 1))
    return detail::fail_real(Errc::ratio_out_of_range, config.filtering_ratio);
  if (config.filtering_layer == 0 && config.selection == Selection::top_k) return fail(Errc::no_attention_yet);
  if (detail::is_nan(config.uniform_share) || !(config.uniform_share >= 0 && config.uniform_share <= 1))
    return detail::fail_real(Errc::share_out_of_range, config.uniform_share);
  if ((config.window_rows == 0) != (config.window_columns == 0))
    return fail(Errc::window_incomplete, "", detail::number(config.window_rows), detail::number(config.window_columns));
  if (config.selection == Selection::top_k && config.score_rows == ScoreRows::listed) {
    if (config.listed_rows.empty()) return fail(Errc::listed_rows_empty);
    if (config.listed_rows.data() == nullptr) return fail(Errc::null_data, "listed_rows");
  }
  return {};
}

namespace detail {

// Sorted, disjoint, not empty, inside `tokens` tokens.
inline Status check_spans(Span<const TokenSpan> visual, std::size_t tokens) noexcept {
  if (tokens == 0) return fail(Errc::no_tokens);
  if (tokens > max_tokens) return fail(Errc::too_many_tokens, "", number(tokens), number(max_tokens));
  if (!visual.empty() && visual.data() == nullptr) return fail(Errc::null_data, "visual spans");
  for (std::size_t i = 0; i < visual.size(); ++i) {
    const TokenSpan& span = visual[i];
    const long long place = number(i);
    if (span.count == 0) return fail(Errc::span_empty, "", 0, 0, place);
    if (span.first >= tokens || span.count > tokens - span.first) {
      const std::size_t end =
          span.count > max_tokens || span.first > max_tokens ? static_cast<std::size_t>(-1) : span.first + span.count;
      return fail(Errc::span_past_end, "", number(end), number(tokens), place);
    }
    if (i > 0) {
      const TokenSpan& before = visual[i - 1];
      if (span.first < before.first)
        return fail(Errc::spans_unsorted, "", number(span.first), number(before.first), place);
      if (span.first < before.first + before.count)
        return fail(Errc::spans_overlap, "", number(span.first), number(before.first + before.count), place);
    }
    if (span.continues && i == 0) return fail(Errc::span_continues_nothing, "", 0, 0, place);
    if (span.original > max_tokens)
      return fail(Errc::too_many_tokens, "", number(span.original), number(max_tokens), place);
    if (span.original != 0 && span.original < span.count)
      return fail(Errc::span_original, "", number(span.original), number(span.count), place);
    if (!span.continues) {
      std::size_t count = span.count;
      for (std::size_t j = i + 1; j < visual.size() && visual[j].continues; ++j) count += visual[j].count;
      if (span.columns != 0 && count % span.columns != 0)
        return fail(Errc::span_columns, "", number(span.columns), number(count), place);
    }
  }
  return {};
}

}  // namespace detail

// Spans of visual tokens in a prompt of `tokens` tokens: sorted, disjoint, not empty, inside the prompt, and the last
// token none of theirs.
inline Status check(Span<const TokenSpan> visual, std::size_t tokens) noexcept {
  if (Status status = detail::check_spans(visual, tokens); !status) return status;
  const std::size_t last = visual.size() - 1;
  if (!visual.empty() && visual[last].first + visual[last].count == tokens)
    return detail::fail(Errc::last_token_visual, "", detail::number(tokens - 1), 0, detail::number(last));
  return {};
}

}  // namespace fastv

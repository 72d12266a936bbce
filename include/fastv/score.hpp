// fastv: evidence -> one score per visual token.
//
// The score of visual token i is the attention it receives, averaged over query heads and over the rows R of
// Config::score_rows (paper section 4.1, Eq. 4; the released code uses R = {last row}):
//
//   s_i = 1 / (H |R|)  sum_{h < H}  sum_{r in R}  softmax_j(logit[h, r, j])_i
//
// The softmax runs over the whole row, text keys included: its denominator differs from head to head and so weights the
// heads. A row before token i cannot see it and adds zero, but is counted in |R|. Where heads are sharded over ranks, H is
// heads_total, and the sum of all ranks' scores is the score.
#pragma once

#include "detail/attention.hpp"
#include "evidence.hpp"

#include "detail/begin.hpp"

namespace fastv {

namespace detail {
inline namespace FASTV_KIND {

// ---- probabilities ------------------------------------------------------------------------------

template <class T>
Status check_probabilities(const Probabilities<T>& evidence) noexcept {
  if (Status status = check_tokens(evidence, evidence.heads, evidence.queries, evidence.keys); !status) return status;
  if (Status status = check_data(evidence.data, "probabilities"); !status) return status;
  return check_strides({{"probabilities", "key stride", evidence.key_stride, evidence.keys},
                        {"probabilities", "query stride", evidence.query_stride, evidence.queries},
                        {"probabilities", "head stride", evidence.head_stride, evidence.heads}},
                       1);
}

template <class Score, class T, class ParallelFor>
Status score_probabilities(const Probabilities<T>& evidence, const Scoring& scoring, Span<Score> scores,
                           const ParallelFor& parallel_for) noexcept {
  const QueryRows& rows = scoring.queries;
  const std::size_t count = visual_tokens(scoring.visual);
  const Result<std::size_t> kv_heads = check_norms(evidence.value_norms, evidence.heads, 0, count);
  if (!kv_heads) return kv_heads.status;
  if (Status status = rows.expect_covered(evidence.queries, scoring.visual); !status) return status;

  const std::size_t first_row = evidence.prompt_tokens() - evidence.queries;
  const double share = 1 / averaged(evidence, evidence.heads, rows);
  // n tokens from `key` on, numbered from `number` on: out += terms first .. last - 1 of the sum over heads and rows.
  const auto sum = [&](auto* out, std::size_t number, std::size_t key, std::size_t n, std::size_t first,
                       std::size_t last) {
    using Sum = typename Pointee<decltype(out)>::type;
    std::size_t head = first / rows.size(), r = first % rows.size();
    for (std::size_t term = first; term < last; ++term) {
      const float* norm =
          *kv_heads == 0 ? nullptr : evidence.value_norms.data() + head / (evidence.heads / *kv_heads) * count + number;
      add_weighted(out,
                   evidence.data + static_cast<std::ptrdiff_t>(head) * evidence.head_stride +
                       static_cast<std::ptrdiff_t>(rows[r] - first_row) * evidence.query_stride +
                       static_cast<std::ptrdiff_t>(key) * evidence.key_stride,
                   evidence.key_stride, norm, n, Sum{1});
      if (++r == rows.size()) {
        r = 0;
        ++head;
      }
    }
  };
  // Few terms are summed in Score. Of many, floats would lose digits: then doubles sum up the sums of a few.
  constexpr std::size_t block = 1024, few = 64;
  const std::size_t terms = evidence.heads * rows.size();
  const bool through_doubles = sizeof(Score) < sizeof(double) && terms > few;
  in_pieces(count, parallel_for, [&](std::size_t begin, std::size_t end) {
    for_each_stretch(scoring.visual, begin, end, [&](std::size_t number, std::size_t position, std::size_t n) {
      Score* out = scores.data() + number;
      for (std::size_t i = 0; i < n; ++i) out[i] = 0;
      // Tokens before the first key at hand receive nothing.
      const std::size_t token = evidence.past + position;
      const std::size_t skipped = token >= evidence.first_key      ? 0
                                  : evidence.first_key - token < n ? evidence.first_key - token
                                                                   : n;
      const std::size_t key = token + skipped - evidence.first_key;
      if (!through_doubles) {
        if (skipped < n) sum(out + skipped, number + skipped, key, n - skipped, 0, terms);
        for (std::size_t i = 0; i < n; ++i) out[i] *= static_cast<Score>(share);
        return;
      }
      for (std::size_t i = skipped; i < n; i += block) {
        const std::size_t some = n - i < block ? n - i : block;
        double sums[block];
        float part[block];
        for (std::size_t j = 0; j < some; ++j) sums[j] = 0;
        for (std::size_t term = 0; term < terms; term += few) {
          for (std::size_t j = 0; j < some; ++j) part[j] = 0;
          sum(static_cast<float*>(part), number + i, key + (i - skipped), some, term,
              terms - term < few ? terms : term + few);
          for (std::size_t j = 0; j < some; ++j) sums[j] += static_cast<double>(part[j]);
        }
        for (std::size_t j = 0; j < some; ++j) out[i + j] = static_cast<Score>(sums[j] * share);
      }
    });
  });
  return {};
}

// ---- without queries ----------------------------------------------------------------------------

template <class Keys>
Status check_keys_only(const KeysOnly<Keys>& evidence) noexcept {
  if (Status status = check_heads(evidence.keys, "key"); !status) return status;
  if (evidence.past >= evidence.keys.tokens)
    return fail(Errc::bad_shape,
                "past is {} but there are {} keys: it counts those of earlier turns, without the prompt's",
                evidence.past, evidence.keys.tokens);
  return {};
}

template <class Score, class Keys, class ParallelFor>
Status score_keys(const KeysOnly<Keys>& evidence, const Scoring& scoring, Span<Score> scores,
                  const ParallelFor& parallel_for) noexcept {
  const Keys& keys = evidence.keys;
  if (Status status = scoring.queries.expect_default(); !status) return status;
  const std::size_t count = visual_tokens(scoring.visual), room = pieces(keys.tokens) * keys.dim;
  if (Status status = expect_room(scoring.scratch, room, "scratch"); !status) return status;
  const Score share = Score(1) / static_cast<Score>(keys.heads);
  in_pieces(count, parallel_for, [&](std::size_t begin, std::size_t end) {
    float* vector = scoring.scratch.data() + begin / keys_per_piece * keys.dim;
    for_each_stretch(scoring.visual, begin, end, [&](std::size_t number, std::size_t position, std::size_t n) {
      const std::size_t first = evidence.past + position;
      for (std::size_t i = 0; i < n; ++i) scores[number + i] = 0;
      for_each_vector(keys, first, first + n, [&](std::size_t head, std::size_t token) {
        load_vector(keys, head, token, vector);
        scores[number + (token - first)] -= share * static_cast<Score>(length_of(vector, keys.dim));
      });
    });
  });
  return {};
}

template <class T>
Status check_scores(const Scores<T>& evidence) noexcept {
  if (evidence.values.empty()) return {};
  return check_data(evidence.values.data(), "scores");
}
template <class Score, class T>
Status copy_scores(const Scores<T>& evidence, const Scoring& scoring, Span<Score> scores) noexcept {
  if (Status status = scoring.queries.expect_default(); !status) return status;
  const std::size_t count = visual_tokens(scoring.visual);
  if (evidence.values.size() != count)
    return fail(Errc::bad_shape, "{} scores were given for {} visual tokens: give one each", evidence.values.size(),
                count);
  for (std::size_t i = 0; i < count; ++i) scores[i] = static_cast<Score>(to_float(evidence.values[i]));
  return {};
}

}  // namespace FASTV_KIND
}  // namespace detail

// ---- the members that evidence.hpp declares ------------------------------------------------------

template <class T>
Status Probabilities<T>::check() const noexcept {
  return detail::check_probabilities(*this);
}
template <class T>
template <class Score, class ParallelFor>
Status Probabilities<T>::score(const Scoring& scoring, Span<Score> scores,
                               const ParallelFor& parallel_for) const noexcept {
  return detail::score_probabilities(*this, scoring, scores, parallel_for);
}
template <class Q, class Keys>
Status QueryKey<Q, Keys>::check() const noexcept {
  return detail::check_query_key(*this);
}
template <class Q, class Keys>
std::size_t QueryKey<Q, Keys>::scratch_floats() const noexcept {
  return detail::query_key_scratch(*this);
}
template <class Q, class Keys>
template <class Score, class ParallelFor>
Status QueryKey<Q, Keys>::score(const Scoring& scoring, Span<Score> scores,
                                const ParallelFor& parallel_for) const noexcept {
  return detail::score_query_key(*this, scoring, scores, parallel_for);
}
template <class Keys>
Status KeysOnly<Keys>::check() const noexcept {
  return detail::check_keys_only(*this);
}
template <class Keys>
std::size_t KeysOnly<Keys>::scratch_floats() const noexcept {
  return detail::pieces(keys.tokens) * keys.dim;
}
template <class Keys>
template <class Score, class ParallelFor>
Status KeysOnly<Keys>::score(const Scoring& scoring, Span<Score> scores,
                             const ParallelFor& parallel_for) const noexcept {
  return detail::score_keys(*this, scoring, scores, parallel_for);
}
template <class T>
Status Scores<T>::check() const noexcept {
  return detail::check_scores(*this);
}
template <class T>
template <class Score, class ParallelFor>
Status Scores<T>::score(const Scoring& scoring, Span<Score> scores, const ParallelFor&) const noexcept {
  return detail::copy_scores(*this, scoring, scores);
}

// ---- scoring ------------------------------------------------------------------------------------

inline namespace FASTV_KIND {

// Floats of scratch memory that score() wants for this evidence. O(1).
template <class Evidence>
std::size_t score_scratch(const Evidence& evidence) noexcept {
  return detail::scratch_of(evidence);
}

// One score per visual token, in the order of for_each_visual(). scores: one entry each; scratch: score_scratch()
// floats. Of queries and keys whose every visual token receives less than 1e-12, all scores are multiplied by one factor,
// so that their order survives; partial sums (heads_total) are not. Re-entrant; no allocation. Complexity: that of the
// evidence.
template <class Score, class Evidence, class ParallelFor = Serial>
Status score(const Config& config, const Evidence& evidence, Span<const TokenSpan> visual, Span<Score> scores,
             Span<float> scratch = {}, const ParallelFor& parallel_for = {}) noexcept {
  if constexpr (detail::expect_evidence<Evidence, Score>()) {
    if (Status status = validate(config); !status) return status;
    const std::size_t tokens = evidence.prompt_tokens();
    if (Status status = detail::check_evidence(evidence); !status) return status;
    if (Status status = validate(visual, tokens); !status) return status;
    if (Status status = detail::expect_room(scores, visual_tokens(visual), "scores"); !status) return status;
    return detail::score_by(evidence, Scoring{visual, {config.score_rows, config.listed_rows, tokens}, scratch}, scores,
                            parallel_for);
  } else {
    return {};
  }
}

}  // namespace FASTV_KIND

}  // namespace fastv

#include "detail/end.hpp"

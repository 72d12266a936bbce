// fastv: scores from logits with a weight for each head, before any layer has run if need be: HAWK (arXiv 2604.07812).
#pragma once

#include "score.hpp"

#include "detail/begin.hpp"

namespace fastv {

// Queries and keys without RoPE, of layer 0's projections of the embeddings at K = 0, or of layer K-1 (saved ahead of RoPE,
// or unrotate()d). logits() makes it. The score of visual token i is
//
//   s_i = sum_h w_h a_hi / |a_h|,   a_hi = mean over the rows scored by of q_hr . k_i
//
// |a_h| being the length over all visual tokens, so that no head outweighs another but by its weight: no softmax, and no
// key but the visual tokens'. HAWK's rows are those of the question (ScoreRows::listed), and its weights say how much a
// benchmark loses without the head. Logits of both signs are common, so scores are too.
//
// Heads sharded over ranks: each hands over its own weights, and the scores of all ranks add up.
template <class Q, class Keys = Heads<Q>>
struct Logits {
  Heads<Q> query;                  // [heads, queries, dim]; row r belongs to prompt position n - queries + r
  Keys key;                        // [kv heads, past + n, dim]; query head h reads KV head h / (heads / kv heads)
  Span<const float> weights = {};  // [heads], or empty: 1 / heads each
  std::size_t past = 0;            // keys of earlier turns

  FASTV_INLINE std::size_t prompt_tokens() const noexcept {  // n
    return key.tokens > past ? key.tokens - past : 0;
  }
  FASTV_INLINE Status check() const noexcept;                // pointers, extents, strides, weights
  FASTV_INLINE std::size_t scratch_floats() const noexcept;  // heads * keys and a little
  // Logits in float. A head with a logit that is NaN or infinite makes all scores NaN; one whose logits are all 0 adds
  // nothing. O(heads * visual tokens * dim), however many rows there are.
  template <class Score, class ParallelFor>
  FASTV_INLINE Status score(const Scoring& scoring, Span<Score> scores, const ParallelFor& parallel_for) const noexcept;
};

// logits(heads(q, TokenMajor{rows, 32, 128}), heads(k, TokenMajor{n, 8, 128}), weights)
template <class Q, class Keys>
FASTV_INLINE Logits<Q, Keys> logits(const Heads<Q>& query, const Keys& key, Span<const float> weights = {},
                                    std::size_t past = 0) noexcept {
  static_assert(detail::is_keys<Keys>, "logits() takes the keys as a view: fastv::heads(k, shape), or loaded_keys()");
  return {query, key, weights, past};
}

namespace detail {
inline namespace FASTV_KIND {

template <class Q, class Keys>
Status check_logits(const Logits<Q, Keys>& evidence) noexcept {
  QueryKey<Q, Keys> pair{evidence.query, evidence.key, 1.0f};
  pair.past = evidence.past;
  if (Status status = check_query_key(pair); !status) return status;
  const std::size_t heads = evidence.query.heads;
  if (evidence.weights.empty()) return {};
  if (evidence.weights.size() != heads)
    return fail(Errc::bad_shape, "{} head weights were given for {} query heads: give one each, or none",
                evidence.weights.size(), heads);
  if (evidence.weights.data() == nullptr) return fail_null("head weights");
  for (std::size_t head = 0; head < heads; ++head)
    if (is_nan(evidence.weights[head]) || is_infinite(evidence.weights[head]))
      return fail(Errc::bad_value, "the weight of head {} is {}: use a finite number", head,
                  static_cast<double>(evidence.weights[head]));
  return {};
}

template <class Q, class Keys>
std::size_t logits_scratch(const Logits<Q, Keys>& evidence) noexcept {
  const std::size_t heads = evidence.query.heads, keys = evidence.key.tokens, dim = evidence.key.dim;
  return heads * (keys + 1) + query_floats<Keys>(heads, dim) + padded(dim) + pieces(keys) * tile_floats(dim);
}

// The mean of the rows of every head -> query, as load_query() leaves it. Products with it are the mean of the products.
template <class Keys, class Q>
void load_mean_query(const Heads<Q>& from, const QueryRows& rows, std::size_t first_row, float* row,
                     float* query) noexcept {
  const std::size_t dim = from.dim, room = padded(dim);
  const float share = 1.0f / static_cast<float>(rows.size());
  for (std::size_t head = 0; head < from.heads; ++head) {
    float* plain = query + head * room;
    for (std::size_t i = 0; i < room; ++i) plain[i] = 0;
    for (std::size_t r = 0; r < rows.size(); ++r) {
      load_vector(from, head, rows[r] - first_row, row);
      for (std::size_t i = 0; i < dim; ++i) plain[i] += share * row[i];
    }
#if FASTV_VECTORS
    if constexpr (arranged<Keys>)
      arrange<typename ElementOf<Keys>::type>(plain, dim, query + (from.heads + head) * room);
#endif
  }
}

// What to multiply a head's logits with: its weight over their length, by their greatest magnitude first, so that no square
// leaves the range of floats. NaN where one is no number.
inline float factor_of_head(const float* row, std::size_t count, float weight) noexcept {
  const std::uint32_t most = greatest_magnitude(row, count);
  if (most >= FloatBits<float>::infinity) return nan_value<float>();
  if (most < 0x00800000u) return 0;  // 0, or denormal, which some threads take for 0
  const auto scale = static_cast<double>(bit_cast<float>(most));
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const double share = static_cast<double>(row[i]) / scale;
    sum += share * share;
  }
  // sum lies in [1, count].
  return static_cast<float>(static_cast<double>(weight) /
                            (scale * static_cast<double>(sqrt_of(static_cast<float>(sum)))));
}

template <class Score, class Q, class Keys, class ParallelFor>
Status score_logits(const Logits<Q, Keys>& evidence, const Scoring& scoring, Span<Score> scores,
                    const ParallelFor& parallel_for) noexcept {
  const std::size_t count = visual_tokens(scoring.visual), heads = evidence.query.heads, dim = evidence.key.dim;
  if (Status status = expect_room(scoring.scratch, logits_scratch(evidence), "scratch"); !status) return status;
  if (Status status = scoring.queries.expect_covered(evidence.query.tokens, scoring.visual); !status) return status;
  float* table = scoring.scratch.data();  // [heads, visual tokens]
  float* factors = table + heads * count;
  float* query = factors + heads;
  float* row = query + query_floats<Keys>(heads, dim);
  float* tiles = row + padded(dim);
  load_mean_query<Keys>(evidence.query, scoring.queries, evidence.prompt_tokens() - evidence.query.tokens, row, query);
  in_pieces(count, parallel_for, [&](std::size_t begin, std::size_t end) {
    float* tile = tiles + begin / keys_per_piece * tile_floats(dim);
    for_each_stretch(scoring.visual, begin, end, [&](std::size_t number, std::size_t position, std::size_t n) {
      const std::size_t first = evidence.past + position;
      product_with_keys(evidence.key, heads, first, first + n, query, table + number, count, tile);
    });
  });
  parallel_for(heads, [&](std::size_t head) {
    const float weight = evidence.weights.empty() ? 1.0f / static_cast<float>(heads) : evidence.weights[head];
    factors[head] = factor_of_head(table + head * count, count, weight);
  });
  in_pieces(count, parallel_for, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) scores[i] = 0;
    for (std::size_t head = 0; head < heads; ++head) {
      if (is_zero(factors[head])) continue;
      add_weighted(scores.data() + begin, table + head * count + begin, 1, nullptr, end - begin,
                   static_cast<Score>(factors[head]));
    }
  });
  return {};
}

}  // namespace FASTV_KIND
}  // namespace detail

template <class Q, class Keys>
Status Logits<Q, Keys>::check() const noexcept {
  return detail::check_logits(*this);
}
template <class Q, class Keys>
std::size_t Logits<Q, Keys>::scratch_floats() const noexcept {
  return detail::logits_scratch(*this);
}
template <class Q, class Keys>
template <class Score, class ParallelFor>
Status Logits<Q, Keys>::score(const Scoring& scoring, Span<Score> scores,
                              const ParallelFor& parallel_for) const noexcept {
  return detail::score_logits(*this, scoring, scores, parallel_for);
}

}  // namespace fastv

#include "detail/end.hpp"

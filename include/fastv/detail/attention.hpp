// fastv: scores from queries and keys, without an attention map.
#pragma once

#include "../evidence.hpp"
#include "qk.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
inline namespace FASTV_KIND {

// ---- what both kinds of attention have in common ------------------------------------------------

// First number of a row's keys at hand that it sees, and one past the last.
struct Range {
  std::size_t first, end;
};

template <class Evidence>
Status check_tokens(const Evidence& evidence, std::size_t heads, std::size_t queries, std::size_t keys) noexcept {
  if (heads == 0) return fail(Errc::bad_shape, "the attention has 0 heads: state at least 1");
  if (heads > max_tokens) return fail(Errc::bad_shape, "the attention has {} heads, more than any model", heads);
  if (queries == 0)
    return fail(Errc::bad_shape, "the attention has 0 query rows: hand over at least the last prompt token's");
  if (keys == 0) return fail(Errc::bad_shape, "the attention has 0 keys: hand over those of the prompt");
  if (keys > max_tokens || evidence.first_key > max_tokens - keys)
    return fail(Errc::bad_shape, "the attention has {} keys behind {} others, but at most {} tokens are supported",
                keys, evidence.first_key, max_tokens);
  if (evidence.past >= evidence.first_key + keys)
    return fail(Errc::bad_shape,
                "past is {} but the attention is over {} tokens: it counts the keys of earlier turns, "
                "without the prompt's",
                evidence.past, evidence.first_key + keys);
  if (queries > evidence.prompt_tokens())
    return fail(Errc::bad_shape,
                "the attention has {} query rows but the prompt has {} tokens: the rows are the last "
                "positions of the prompt, and the extents are given in the order of memory",
                queries, evidence.prompt_tokens());
  if (evidence.heads_total != 0 && evidence.heads_total < heads)
    return fail(Errc::bad_shape, "the attention has {} heads but heads_total is {}: it counts the heads of all ranks",
                heads, evidence.heads_total);
  return {};
}

// norms: [kv_heads, visual tokens] or empty; kv_heads 0: any number that divides heads. Returns the KV heads.
inline Result<std::size_t> check_norms(Span<const float> norms, std::size_t heads, std::size_t kv_heads,
                                       std::size_t visual) noexcept {
  if (norms.empty() || visual == 0) return {0, {}};
  if (norms.data() == nullptr) return {0, fail_null("value_norms")};
  const std::size_t given = norms.size() / visual;
  if (norms.size() % visual != 0 || (kv_heads != 0 && given != kv_heads) || heads % given != 0)
    return {0, fail(Errc::bad_shape,
                    "{} value norms were given for {} visual tokens and {} heads: give one per KV head "
                    "and visual token",
                    norms.size(), visual, kv_heads != 0 ? kv_heads : heads)};
  return {given, {}};
}

// The average divides by this.
template <class Evidence>
double averaged(const Evidence& evidence, std::size_t heads, const QueryRows& rows) noexcept {
  const std::size_t all = evidence.heads_total == 0 ? heads : evidence.heads_total;
  return static_cast<double>(all) * static_cast<double>(rows.size());
}

// out[i] += weight * p[i] * norm[i]; a token that receives nothing has its norm left unread, since it may be hidden.
template <class Sum, class T>
void add_weighted(Sum* out, const T* p, std::ptrdiff_t stride, const float* norm, std::size_t count,
                  Sum weight) noexcept {
  if (norm == nullptr && stride == 1) return add_to(out, p, count, weight);
  for (std::size_t i = 0; i < count; ++i) {
    const Sum value = static_cast<Sum>(to_float(p[static_cast<std::ptrdiff_t>(i) * stride]));
    if (norm == nullptr)
      out[i] += weight * value;
    else if (!is_zero(value))
      out[i] += weight * value * static_cast<Sum>(norm[i]);
  }
}

// ---- queries and keys ---------------------------------------------------------------------------

template <class Q, class Keys>
Status check_query_key(const QueryKey<Q, Keys>& evidence) noexcept {
  const std::size_t heads = evidence.query.heads, kv_heads = evidence.key.heads, keys = evidence.key.tokens;
  if (Status status = check_heads(evidence.query, "query"); !status) return status;
  if (Status status = check_heads(evidence.key, "key"); !status) return status;
  if (evidence.query.dim != evidence.key.dim)
    return fail(Errc::bad_shape,
                "the head dimension of query is {} but that of key is {}: hand over the same layer's, "
                "with their extents in the order of memory",
                evidence.query.dim, evidence.key.dim);
  if (heads % kv_heads != 0)
    return fail(Errc::bad_shape,
                "query has {} heads, which key's {} KV heads do not divide: check the extents and their order", heads,
                kv_heads);
  if (Status status = check_tokens(evidence, heads, evidence.query.tokens, keys); !status) return status;
  if (is_nan(evidence.scale) || is_infinite(evidence.scale) || !(evidence.scale > 0))
    return fail(Errc::bad_setting, "scale is {} but must be positive and finite, such as 1 / sqrt(head dimension)",
                static_cast<double>(evidence.scale));
  if (is_nan(evidence.soft_cap) || is_infinite(evidence.soft_cap) || !(evidence.soft_cap >= 0))
    return fail(Errc::bad_setting, "soft_cap is {} but must be positive and finite, or 0 for none",
                static_cast<double>(evidence.soft_cap));
  const auto one_each = [](Span<const float> values, std::size_t wanted, const char* name, const char* of) {
    if (values.empty()) return Status{};
    if (values.size() != wanted)
      return fail(Errc::bad_shape, "{} has {} entries for {} {}: give one each, or none", name, values.size(), wanted,
                  of);
    return values.data() == nullptr ? fail_null(name) : Status{};
  };
  if (Status status = one_each(evidence.bias, keys, "the bias row", "keys"); !status) return status;
  if (Status status = one_each(evidence.sinks, heads, "sinks", "query heads"); !status) return status;
  if (Status status = one_each(evidence.alibi, heads, "alibi", "query heads"); !status) return status;
  const Heads<float>& scales = evidence.key_scales;
  if (scales.data != nullptr || scales.pages.paged()) {
    if (Status status = check_heads(scales, "key_scales"); !status) return status;
    if (scales.heads != kv_heads || scales.tokens != keys || scales.dim != 1)
      return fail(Errc::bad_shape,
                  "key_scales is [{}, {}, {}] but needs one scale per KV head and key, {} of each head", scales.heads,
                  scales.tokens, scales.dim, keys);
  }
  if (!evidence.visible.empty()) {
    if (evidence.visible.data() == nullptr) return fail_null("visible");
    if (evidence.visible.size() != evidence.query.tokens)
      return fail(Errc::bad_shape, "visible has {} entries for {} query rows: give one each, or none",
                  evidence.visible.size(), evidence.query.tokens);
    for (std::size_t r = 0; r < evidence.visible.size(); ++r)
      if (evidence.visible[r] > evidence.first_key + keys)
        return fail(Errc::bad_shape, "query row {} sees {} tokens but the sequence has {}", r, evidence.visible[r],
                    evidence.first_key + keys);
  }
  return {};
}

// Where the evidence has several rows, room for doubles that sum them: one per visual token that has its key at hand.
template <class Q, class Keys>
std::size_t query_key_scratch(const QueryKey<Q, Keys>& evidence) noexcept {
  const std::size_t heads = evidence.query.heads, keys = evidence.key.tokens, dim = evidence.key.dim;
  const std::size_t sums = evidence.query.tokens > 1 ? 2 * keys + 1 : 0;
  return heads * (keys + 3) + query_floats<Keys>(heads, dim) + pieces(keys) * tile_floats(dim) + sums;
}

// The keys at hand that a row sees: of tokens before `end`, those of a window (0: none) that reaches up to before `own`.
FASTV_DEVICE inline Range seen_range(std::size_t own, std::size_t end, std::size_t window,
                                     std::size_t first_key) noexcept {
  const std::size_t first = window != 0 && own > window ? own - window : 0;
  const std::size_t last = end > first_key ? end - first_key : 0;
  const std::size_t begin = first > first_key ? first - first_key : 0;
  return {begin < last ? begin : last, last};
}
// The keys at hand that query row r (at prompt position `row`) sees.
template <class Q, class Keys>
Range seen_by(const QueryKey<Q, Keys>& evidence, std::size_t r, std::size_t row) noexcept {
  const std::size_t own = evidence.past + row + 1, all = evidence.first_key + evidence.key.tokens;
  const std::size_t end = !evidence.visible.empty() ? evidence.visible[r] : evidence.causal ? own : all;
  return seen_range(own, end, evidence.window, evidence.first_key);
}

// Everything between q.k and the softmax, on one head's logits of keys [first, end). row: position in the sequence.
template <class Q, class Keys>
void finish_logits(const QueryKey<Q, Keys>& evidence, std::size_t head, Range seen, std::size_t row,
                   float* logits) noexcept {
  if (evidence.key_scales.data != nullptr || evidence.key_scales.pages.paged()) {
    const std::size_t kv_head = head / (evidence.query.heads / evidence.key.heads);
    for (std::size_t key = seen.first; key < seen.end; ++key)
      logits[key] *=
          token_at(evidence.key_scales, key)[static_cast<std::ptrdiff_t>(kv_head) * evidence.key_scales.head_stride];
  }
  if (evidence.soft_cap > 0) {
    const float inverse = 1.0f / evidence.soft_cap;
    for (std::size_t key = seen.first; key < seen.end; ++key)
      if (!is_nan(logits[key])) logits[key] = evidence.soft_cap * tanh_of(logits[key] * inverse);
  }
  if (!evidence.alibi.empty()) {
    const float slope = evidence.alibi[head];
    for (std::size_t key = seen.first; key < seen.end; ++key)
      logits[key] -= slope * (static_cast<float>(row) - static_cast<float>(evidence.first_key + key));
  }
  if (!evidence.bias.empty())
    for (std::size_t key = seen.first; key < seen.end; ++key)
      logits[key] = hides(evidence.bias[key]) ? minus_infinity<float>() : logits[key] + evidence.bias[key];
}

// One head's logits of keys [first, end) -> exp(logit - greatest) in place; the greatest, sink included, and the sum, sink
// included. greatest: NaN where a logit is NaN or +infinity, -infinity where no key is seen.
struct Softmax {
  float greatest, sum;
};
template <bool Keep>
Softmax softmax_parts(float* logits, Range seen, Span<const float> sinks, std::size_t head) noexcept {
  const std::size_t count = seen.end - seen.first;
  float most = count == 0 ? minus_infinity<float>() : greatest(logits + seen.first, count);
  if (is_nan(most)) return {most, most};
  if (!sinks.empty()) {
    const float sink = sinks[head];
    if (is_nan(sink)) return {sink, sink};
    if (!hides(sink) && (hides(most) || sink > most)) most = sink;
  }
  if (is_infinite(most)) {
    if (Keep)
      for (std::size_t key = seen.first; key < seen.end; ++key) logits[key] = 0;
    return {most, 0};
  }
  float sum = count == 0 ? 0 : exponentials<Keep>(logits + seen.first, count, most);
  if (!sinks.empty() && !hides(sinks[head])) sum += exp_of_negative(sinks[head] - most);
  return {most, sum};
}

template <class Score, class Q, class Keys, class ParallelFor>
class QueryKeyScorer {
 public:
  QueryKeyScorer(const QueryKey<Q, Keys>& evidence, const Scoring& scoring, std::size_t count,
                 const ParallelFor& parallel_for) noexcept
      : evidence_(evidence), scoring_(scoring), parallel_for_(parallel_for), count_(count) {
    const std::size_t heads = evidence.query.heads, keys = evidence.key.tokens, dim = evidence.key.dim;
    logits_ = scoring.scratch.data();
    factors_ = logits_ + heads * keys;
    peaks_ = factors_ + heads;
    query_ = peaks_ + 2 * heads;
    tiles_ = query_ + query_floats<Keys>(heads, dim);
    sums_ = tiles_ + pieces(keys) * tile_floats(dim);
    share_ = 1 / averaged(evidence, heads, scoring.queries);
  }

  void run(Span<Score> scores) noexcept {
    accumulate(scores, 0);
    // Where every visual token receives next to nothing (a sink takes it all), floats run out of range and their order is
    // lost: then all are brought into range by one factor. Not those of one rank's heads: ranks would differ in it.
    if (evidence_.heads_total > evidence_.query.heads) return;
    Score highest = 0;
    for (std::size_t i = 0; i < count_; ++i)
      if (is_nan(scores[i])) return;
    for (std::size_t i = 0; i < count_; ++i) highest = scores[i] > highest ? scores[i] : highest;
    if (highest >= Score(1e-12)) return;
    const float shift = highest_exponent();
    if (!hides(shift) && !is_nan(shift) && shift < 0) accumulate(scores, shift);
  }

 private:
  static constexpr bool sums_apart = sizeof(Score) < sizeof(double);

  // Logits of one row. Calls use(head, logits).
  template <class Use>
  void for_each_head(std::size_t r, Range seen, Use use) noexcept {
    const std::size_t heads = evidence_.query.heads, keys = evidence_.key.tokens, dim = evidence_.key.dim;
    load_query<Keys>(evidence_.query, r, evidence_.scale, query_);
    in_pieces(seen.end - seen.first, parallel_for_, [&](std::size_t begin, std::size_t end) {
      product_with_keys(evidence_.key, heads, seen.first + begin, seen.first + end, query_,
                        logits_ + seen.first + begin, keys, tiles_ + begin / keys_per_piece * tile_floats(dim));
    });
    parallel_for_(heads, [&](std::size_t head) {
      float* row = logits_ + head * keys;
      finish_logits(evidence_, head, seen, evidence_.past + position_of(r), row);
      use(head, row);
    });
  }
  std::size_t position_of(std::size_t r) const noexcept {
    return evidence_.prompt_tokens() - evidence_.query.tokens + r;
  }
  // Calls use(number, key, n) for each stretch of visual tokens begin .. end - 1 that a row sees.
  template <class Use>
  void for_each_seen(Range seen, std::size_t begin, std::size_t end, Use use) const noexcept {
    for_each_stretch(scoring_.visual, begin, end, [&](std::size_t number, std::size_t position, std::size_t n) {
      const std::size_t from = evidence_.past + position, base = evidence_.first_key;
      const std::size_t low = base + seen.first > from ? base + seen.first : from;
      const std::size_t high = base + seen.end < from + n ? base + seen.end : from + n;
      if (low < high) use(number + (low - from), low - base, high - low);
    });
  }

  // shift 0: the scores. Below 0: the scores times exp(-shift).
  void accumulate(Span<Score> scores, float shift) noexcept {
    const QueryRows& rows = scoring_.queries;
    for (std::size_t i = 0; i < count_; ++i) scores[i] = 0;
    if (sums_apart && evidence_.query.tokens > 1 && rows.size() > 1) {  // one row may be listed twice
      const std::size_t first = tokens_let_go();
      double* sums = aligned_sums();
      for (std::size_t i = first; i < count_; ++i) sums[i - first] = 0;
      for (std::size_t i = 0; i < rows.size(); ++i) add_row(rows[i], sums, first, shift);
      for (std::size_t i = first; i < count_; ++i) scores[i] = static_cast<Score>(sums[i - first]);
    } else {
      for (std::size_t i = 0; i < rows.size(); ++i) add_row(rows[i], scores.data(), 0, shift);
    }
  }
  // Visual tokens before the first key at hand: they receive nothing. The others are no more than there are keys.
  std::size_t tokens_let_go() const noexcept {
    std::size_t count = 0;
    for_each_stretch(scoring_.visual, 0, count_, [&](std::size_t number, std::size_t position, std::size_t n) {
      const std::size_t token = evidence_.past + position, first = evidence_.first_key;
      if (token < first) count = number + (first - token < n ? first - token : n);
    });
    return count;
  }
  double* aligned_sums() const noexcept {
    float* at = sums_;
    while (reinterpret_cast<std::uintptr_t>(at) % alignof(double) != 0) ++at;
    return reinterpret_cast<double*>(at);
  }

  // sums: of the visual tokens from number `first` on, of which the row sees no earlier one.
  template <class Sum>
  void add_row(std::size_t position, Sum* sums, std::size_t first, float shift) noexcept {
    const std::size_t r = position - position_of(0), keys = evidence_.key.tokens;
    const Range seen = seen_by(evidence_, r, position);
    for_each_head(r, seen, [&](std::size_t head, float* row) {
      Softmax parts{};
      if (shift < 0) {
        parts = softmax_parts<false>(row, seen, evidence_.sinks, head);
        const float most = parts.greatest + shift;
        if (!is_nan(most) && !is_infinite(most))
          for_each_seen(seen, 0, count_, [&](std::size_t, std::size_t key, std::size_t n) {
            for (std::size_t i = key; i < key + n; ++i) row[i] = row[i] < most ? exp_of_negative(row[i] - most) : 1.0f;
          });
      } else {
        parts = softmax_parts<true>(row, seen, evidence_.sinks, head);
      }
      factors_[head] = is_nan(parts.greatest) ? parts.greatest : parts.sum > 0 ? 1.0f / parts.sum : 0.0f;
    });
    in_pieces(count_, parallel_for_, [&](std::size_t begin, std::size_t end) {
      for_each_seen(seen, begin, end, [&](std::size_t number, std::size_t key, std::size_t n) {
        for (std::size_t head = 0; head < evidence_.query.heads; ++head) {
          if (is_zero(factors_[head])) continue;
          const Sum weight = static_cast<Sum>(factors_[head]) * static_cast<Sum>(share_);
          const bool weighted = !evidence_.value_norms.empty() && !is_nan(factors_[head]);  // NaN whatever the norm
          const float* norm = weighted ? norms_of(head) + number : nullptr;
          add_weighted(sums + (number - first), logits_ + head * keys + key, 1, norm, n, weight);
        }
      });
    });
  }

  // Value norms of a query head's visual tokens.
  const float* norms_of(std::size_t head) const noexcept {
    return evidence_.value_norms.data() + head / (evidence_.query.heads / evidence_.key.heads) * count_;
  }
  // The greatest of logits that are numbers, without those whose norm is 0: they add nothing, however great.
  static float greatest_weighted(const float* logits, const float* norms, std::size_t count) noexcept {
    float most = minus_infinity<float>();
    for (std::size_t i = 0; i < count; ++i)
      if (!is_zero(norms[i]) && !hides(logits[i]) && (hides(most) || logits[i] > most)) most = logits[i];
    return most;
  }

  // The greatest exponent log p of any visual token that counts, over heads and rows, but for the sum of the softmax.
  float highest_exponent() noexcept {
    const QueryRows& rows = scoring_.queries;
    const std::size_t heads = evidence_.query.heads;
    for (std::size_t head = 0; head < heads; ++head) peaks_[head] = minus_infinity<float>();
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const std::size_t r = rows[i] - position_of(0);
      const Range seen = seen_by(evidence_, r, rows[i]);
      for_each_head(r, seen, [&](std::size_t head, float* row) {
        const Softmax parts = softmax_parts<false>(row, seen, evidence_.sinks, head);
        if (is_nan(parts.greatest) || is_infinite(parts.greatest)) return;
        for_each_seen(seen, 0, count_, [&](std::size_t number, std::size_t key, std::size_t n) {
          const float peak = evidence_.value_norms.empty() ? greatest(row + key, n)
                                                           : greatest_weighted(row + key, norms_of(head) + number, n);
          if (hides(peak)) return;
          const float exponent = peak - parts.greatest;
          if (hides(peaks_[head]) || exponent > peaks_[head]) peaks_[head] = exponent;
        });
      });
    }
    float most = minus_infinity<float>();
    for (std::size_t head = 0; head < heads; ++head)
      if (!hides(peaks_[head]) && (hides(most) || peaks_[head] > most)) most = peaks_[head];
    return most;
  }

  const QueryKey<Q, Keys>& evidence_;
  const Scoring& scoring_;
  const ParallelFor& parallel_for_;
  std::size_t count_;
  double share_;
  float *logits_, *factors_, *peaks_, *query_, *tiles_, *sums_;  // [heads, keys], [heads], [heads], ...
};

template <class Score, class Q, class Keys, class ParallelFor>
Status score_query_key(const QueryKey<Q, Keys>& evidence, const Scoring& scoring, Span<Score> scores,
                       const ParallelFor& parallel_for) noexcept {
  const std::size_t count = visual_tokens(scoring.visual);
  const Result<std::size_t> norms = check_norms(evidence.value_norms, evidence.query.heads, evidence.key.heads, count);
  if (!norms) return norms.status;
  if (Status status = expect_room(scoring.scratch, query_key_scratch(evidence), "scratch"); !status) return status;
  if (Status status = scoring.queries.expect_covered(evidence.query.tokens, scoring.visual); !status) return status;
  QueryKeyScorer<Score, Q, Keys, ParallelFor>(evidence, scoring, count, parallel_for).run(scores);
  return {};
}

}  // namespace FASTV_KIND
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

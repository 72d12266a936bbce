// fastv: context parallel: each rank holds the keys of a part of the prompt, and one softmax runs over all of them.
//
// score_shard() on each rank, an exchange of one SoftmaxPart per head, then merge_shards() on each rank.
#pragma once

#include "score.hpp"

#include "detail/begin.hpp"

namespace fastv {

// One head's softmax over the keys of one rank.
struct SoftmaxPart {
  float greatest = -3.0e38f;  // greatest logit; of a rank that sees no key, less than any
  float sum = 0;              // sum of exp(logit - greatest)
};

inline namespace FASTV_KIND {

// On each rank: the numerators exp(logit - greatest), times value_norms where the evidence has them, of this rank's visual
// tokens, and the part of every head's softmax. evidence: the last row's query (one row) and this rank's keys, all of
// which it sees; sinks on one rank alone. visual: spans in this rank's keys, numbered from evidence.past; they may end at
// the last key. parts: [heads]; numerators: [heads, visual tokens]; scratch: score_scratch() floats. heads_total is
// merge_shards()'s.
template <class Q, class Keys>
Status score_shard(const QueryKey<Q, Keys>& evidence, Span<const TokenSpan> visual, Span<SoftmaxPart> parts,
                   Span<float> numerators, Span<float> scratch) noexcept {
  if (Status status = evidence.check(); !status) return status;
  if (evidence.query.tokens != 1)
    return fail(Errc::bad_shape, "a shard is scored by the last prompt row alone, but the query has {} rows",
                evidence.query.tokens);
  if (evidence.heads_total != 0)
    return fail(Errc::bad_setting, "heads_total is {} in a shard's evidence: hand it to merge_shards()",
                evidence.heads_total);
  if (evidence.first_key != 0 || evidence.window != 0 || !evidence.visible.empty() || !evidence.alibi.empty())
    return fail(Errc::not_supported,
                "a shard does not know where in the sequence its keys are: apply windows, visible "
                "tokens and ALiBi as a bias row");
  if (Status status = validate(visual, evidence.prompt_tokens()); !status) return status;
  const std::size_t count = visual_tokens(visual), heads = evidence.query.heads, keys = evidence.key.tokens;
  const Result<std::size_t> norms = detail::check_norms(evidence.value_norms, heads, evidence.key.heads, count);
  if (!norms) return norms.status;
  if (Status status = detail::expect_room(parts, heads, "parts"); !status) return status;
  if (Status status = detail::expect_room(numerators, heads * count, "numerators"); !status) return status;
  if (Status status = detail::expect_room(scratch, score_scratch(evidence), "scratch"); !status) return status;
  float* logits = scratch.data();
  float* query = logits + heads * keys;
  const detail::Range all{0, keys};
  detail::load_query<Keys>(evidence.query, 0, evidence.scale, query);
  detail::product_with_keys(evidence.key, heads, 0, keys, query, logits, keys,
                            query + detail::query_floats<Keys>(heads, evidence.key.dim));
  for (std::size_t head = 0; head < heads; ++head) {
    float* row = logits + head * keys;
    detail::finish_logits(evidence, head, all, 0, row);
    const detail::Softmax softmax = detail::softmax_parts<true>(row, all, evidence.sinks, head);
    parts[head] = detail::is_infinite(softmax.greatest) ? SoftmaxPart{} : SoftmaxPart{softmax.greatest, softmax.sum};
    const float* norm =
        *norms == 0 ? nullptr : evidence.value_norms.data() + head / (heads / evidence.key.heads) * count;
    detail::for_each_stretch(visual, 0, count, [&](std::size_t first, std::size_t position, std::size_t n) {
      float* out = numerators.data() + head * count + first;
      for (std::size_t i = 0; i < n; ++i) out[i] = 0;
      detail::add_weighted(out, row + evidence.past + position, 1, norm == nullptr ? nullptr : norm + first, n, 1.0f);
    });
  }
  return {};
}

// On each rank, once every rank has all parts, [ranks, heads] in the order of the ranks: the scores of this rank's visual
// tokens, exactly those of one softmax over all keys. Put together in the order of the prompt they are the Scores to prune
// by; every rank computes with the same numbers in the same order. heads_total: of all ranks, where heads are sharded too;
// 0: those given. O(heads * (ranks + visual tokens)).
template <class Score>
Status merge_shards(Span<const SoftmaxPart> parts, std::size_t ranks, std::size_t rank, Span<const float> numerators,
                    Span<Score> scores, std::size_t heads_total = 0) noexcept {
  if (ranks == 0 || rank >= ranks || parts.size() % ranks != 0 || parts.empty())
    return fail(Errc::bad_shape, "{} softmax parts cannot be those of rank {} of {}: gather one per head and rank",
                parts.size(), rank, ranks);
  const std::size_t heads = parts.size() / ranks, count = scores.size();
  if (heads_total != 0 && heads_total < heads)
    return fail(Errc::bad_shape, "the parts are of {} heads but heads_total is {}: it counts the heads of all ranks",
                heads, heads_total);
  if (numerators.size() != heads * count)
    return fail(Errc::bad_shape, "{} numerators were given for {} heads of {} visual tokens: give one each",
                numerators.size(), heads, count);
  if (Status status = detail::expect_room(parts, parts.size(), "parts"); !status) return status;
  if (Status status = detail::expect_room(numerators, heads * count, "numerators"); !status) return status;
  if (Status status = detail::expect_room(scores, count, "scores"); !status) return status;
  for (std::size_t i = 0; i < count; ++i) scores[i] = 0;
  for (std::size_t head = 0; head < heads; ++head) {
    float most = parts[head].greatest, sum = 0;
    for (std::size_t r = 1; r < ranks; ++r)
      most = parts[r * heads + head].greatest > most ? parts[r * heads + head].greatest : most;
    for (std::size_t r = 0; r < ranks; ++r) {
      const SoftmaxPart& part = parts[r * heads + head];
      if (detail::is_nan(part.sum)) most = part.sum;
      if (!detail::is_nan(most)) sum += part.sum * detail::exp_of_negative(part.greatest - most);
    }
    const float own = parts[rank * heads + head].greatest;
    const Score weight = detail::is_nan(most) ? detail::nan_value<Score>()
                         : sum > 0            ? static_cast<Score>(detail::exp_of_negative(own - most) / sum) /
                                         static_cast<Score>(heads_total == 0 ? heads : heads_total)
                                   : Score(0);
    for (std::size_t i = 0; i < count; ++i) scores[i] += weight * static_cast<Score>(numerators[head * count + i]);
  }
  return {};
}

}  // namespace FASTV_KIND

}  // namespace fastv

#include "detail/end.hpp"

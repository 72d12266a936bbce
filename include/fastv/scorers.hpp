// fastv: rules beside FastV's own that change only what the visual tokens are ranked by, at equal count. Each cures
// some of FastV's bias towards late positions (the bottom of a picture): the last row's attention decays with
// distance under RoPE, looks at sinks, and has a prior that knows nothing of the question.
//
// They compose with every selection (windows, uniform share, quotas) and with each other, since each is a change of
// evidence or of scores:
//
//   RoPE-free        unrotate() the keys (or hand over keys saved before RoPE), then score as usual
//   value-weighted   value_norms() into the evidence, then score as usual
//   text raters      text_raters() into Config::listed_rows, then score as usual
//   prior-corrected  Config::prior_rows, or prior_corrected() on two sets of scores
//   query-free       KeysOnly as the evidence
//   key-sharded      score_shard() on each rank, merge_shards() after the ranks have exchanged their SoftmaxParts
#pragma once

#include "score.hpp"

namespace fastv {

// ---- RoPE-free: FEATHER's phi_-R (arXiv 2412.13180) ---------------------------------------------

// Which elements of a vector RoPE turns together.
enum class RopeLayout {
  half,        // pairs (i, i + dim / 2): Hugging Face's LLaMA and Qwen, ggml's NEOX
  interleaved  // pairs (2 i, 2 i + 1): the original LLaMA, ggml's NORM
};

// How keys were rotated: pair i of token t by the angle positions[axis[i]][t] * frequencies[i].
struct Rope {
  Span<const float> frequencies;         // [dim / 2], theta^(-2 i / dim) in most models
  Span<const Index> positions;           // [axes, tokens]; 1-D RoPE has one axis, M-RoPE three
  Span<const unsigned char> axis = {};   // [dim / 2], M-RoPE's section of each pair; empty: axis 0
  RopeLayout layout = RopeLayout::half;  // see its type
};

namespace detail {

// sin and cos of an angle up to 2^30 or so, in double: reduced by pi / 2 in two parts, then Cephes' polynomials.
inline void sin_cos(double angle, double& sine, double& cosine) noexcept {
  const double turns = angle * 0.63661977236758134308;  // 2 / pi
  if (!(turns > -0x1p52 && turns < 0x1p52)) {           // no whole number of turns: frequencies that are none
    sine = cosine = nan_value<double>();
    return;
  }
  const auto quadrant = static_cast<std::int64_t>(turns + (turns < 0 ? -0.5 : 0.5));
  const auto n = static_cast<double>(quadrant);
  const double x = (angle - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11;
  const double z = x * x;
  const double s =
      x + x * z *
              (((((1.58962301576546568060e-10 * z - 2.50507477628578072866e-8) * z + 2.75573136213857245213e-6) * z -
                 1.98412698295895385996e-4) *
                    z +
                8.33333333332211858878e-3) *
                   z -
               1.66666666666666307295e-1);
  const double c =
      1.0 - 0.5 * z +
      z * z *
          (((((-1.13585365213876817300e-11 * z + 2.08757008419747316778e-9) * z - 2.75573141792967388112e-7) * z +
             2.48015872888517045348e-5) *
                z -
            1.38888888888730564116e-3) *
               z +
           4.16666666666665929218e-2);
  const bool odd = (quadrant & 1) != 0;
  sine = odd ? c : s;
  cosine = odd ? s : c;
  if ((quadrant & 2) != 0) sine = -sine;
  if (((quadrant + 1) & 2) != 0) cosine = -cosine;
}

}  // namespace detail

// Undoes the rotation of cached keys, exactly up to rounding (rotations are orthogonal). The queries are best saved
// before RoPE; unrotate() serves for them too, as vectors of `rows` tokens. out: [heads, tokens, dim] floats; hand it
// on as head_vectors(out, heads, tokens, dim, KvLayout::head_major). O(tokens * dim / 2) sines, O(heads * tokens *
// dim).
template <class T, class ParallelFor = Serial>
Status unrotate(const HeadVectors<T>& vectors, const Rope& rope, Span<float> out,
                const ParallelFor& parallel_for = {}) noexcept {
  using detail::fail;
  using detail::number;
  if (Status status = check(vectors, "key", "head stride of key", "token stride of key"); !status) return status;
  const std::size_t pairs = vectors.dim / 2, tokens = vectors.tokens;
  if (vectors.dim % 2 != 0) return fail(Errc::odd_dim, "", number(vectors.dim));
  if (rope.frequencies.size() != pairs)
    return fail(Errc::rope_size, "frequencies", number(rope.frequencies.size()), number(pairs));
  if (!rope.axis.empty() && rope.axis.size() != pairs)
    return fail(Errc::rope_size, "axis", number(rope.axis.size()), number(pairs));
  if (Status status = detail::check_room(rope.frequencies, pairs, "frequencies"); !status) return status;
  if (Status status = detail::check_room(rope.axis, rope.axis.size(), "axis"); !status) return status;
  std::size_t axes = 1;
  for (const unsigned char axis : rope.axis) axes = axis + 1u > axes ? axis + 1u : axes;
  if (rope.positions.size() < axes * tokens)
    return fail(Errc::rope_size, "positions", number(rope.positions.size()), number(axes * tokens));
  if (Status status = detail::check_room(rope.positions, axes * tokens, "positions"); !status) return status;
  if (Status status = detail::check_room(out, vectors.heads * tokens * vectors.dim, "the output"); !status)
    return status;

  detail::in_pieces(tokens, parallel_for, [&](std::size_t begin, std::size_t end) {
    detail::for_each_vector(vectors, begin, end, [&](std::size_t head, std::size_t token, const T* data) {
      detail::widen(vectors, data, out.data() + (head * tokens + token) * vectors.dim);
    });
    const std::size_t step = rope.layout == RopeLayout::half ? 1 : 2,
                      other = rope.layout == RopeLayout::half ? pairs : 1;
    for (std::size_t token = begin; token < end; ++token)
      for (std::size_t pair = 0; pair < pairs; ++pair) {
        const std::size_t axis = rope.axis.empty() ? 0 : rope.axis[pair];
        double sine = 0, cosine = 1;
        // The angle is rounded to float first, as the models compute it.
        detail::sin_cos(
            static_cast<double>(static_cast<float>(rope.positions[axis * tokens + token]) * rope.frequencies[pair]),
            sine, cosine);
        for (std::size_t head = 0; head < vectors.heads; ++head) {
          float* x = out.data() + (head * tokens + token) * vectors.dim + pair * step;
          const double a = static_cast<double>(x[0]), b = static_cast<double>(x[other]);
          x[0] = static_cast<float>(a * cosine + b * sine);
          x[other] = static_cast<float>(b * cosine - a * sine);
        }
      }
  });
  return {};
}

// ---- value-weighted: CAPA (arXiv 2602.00247) ----------------------------------------------------

// Length of every visual token's value vector, [kv heads, visual tokens]: s_i = 1/H sum_h p_hi |v_hi|. Hand the
// result over as the evidence's value_norms. past: leading tokens that are no candidates. O(kv heads * visual tokens
// * dim).
template <class T>
Status value_norms(const HeadVectors<T>& values, Span<const TokenSpan> visual, Span<float> norms,
                   std::size_t past = 0) noexcept {
  using detail::number;
  if (Status status = check(values, "value", "head stride of value", "token stride of value"); !status) return status;
  if (past > values.tokens) return detail::fail(Errc::no_tokens);
  if (Status status = check(visual, values.tokens - past); !status) return status;
  const std::size_t count = visual_tokens(visual);
  if (Status status = detail::check_room(norms, values.heads * count, "value_norms"); !status) return status;
  detail::for_each_stretch(visual, 0, count, [&](std::size_t first, std::size_t position, std::size_t n) {
    const std::size_t begin = past + position;
    detail::for_each_vector(values, begin, begin + n, [&](std::size_t head, std::size_t token, const T* v) {
      norms[head * count + first + (token - begin)] = detail::length(values, v);
    });
  });
  return {};
}

// ---- text raters: SparseVLM (ICML 2025, arXiv 2410.04417) ---------------------------------------

// The text tokens of [first, first + count) that are relevant to the picture: those whose relevance
//   r_j = 1/L sum_i softmax_j(h_i . h_j)_j   over visual tokens i and text tokens j
// is at least the mean relevance. hidden: [tokens, width], rows `stride` elements apart. rows: receives their prompt
// positions, for Config::listed_rows; scratch: 2 * count floats. Returns how many there are. O(L * count * width).
template <class T>
Result<std::size_t> text_raters(const T* hidden, std::size_t tokens, std::size_t width, std::size_t stride,
                                Span<const TokenSpan> visual, TokenSpan text, Span<Index> rows,
                                Span<float> scratch) noexcept {
  using detail::fail;
  using detail::number;
  if (hidden == nullptr) return {0, fail(Errc::null_data, "hidden states")};
  if (Status status = check(visual, tokens); !status) return {0, status};
  if (visual.empty()) return {0, fail(Errc::scores_size, "", 0, 0)};
  if (text.count == 0) return {0, fail(Errc::listed_rows_empty)};
  if (text.first >= tokens || text.count > tokens - text.first)
    return {0, fail(Errc::listed_row_past_end, "", number(text.first + text.count - 1), number(tokens),
                    number(text.count - 1))};
  if (stride < width)
    return {0, fail(Errc::overlapping_stride, "row stride of hidden states", number(stride), number(width))};
  if (stride > detail::most_entries / tokens)
    return {0, fail(Errc::beyond_memory, "row stride of hidden states", number(stride), number(tokens))};
  if (Status status = detail::check_room(rows, text.count, "rows"); !status) return {0, status};
  if (Status status = detail::check_room(scratch, 2 * text.count, "scratch"); !status) return {0, status};

  float* relevance = scratch.data();
  float* logits = relevance + text.count;
  for (std::size_t j = 0; j < text.count; ++j) relevance[j] = 0;
  for (const TokenSpan& span : visual)
    for (std::size_t i = span.first; i < span.first + span.count; ++i) {
      for (std::size_t j = 0; j < text.count; ++j) {
        const T *a = hidden + i * stride, *b = hidden + (text.first + j) * stride;
        float sum = 0;
        for (std::size_t d = 0; d < width; ++d)
          sum += static_cast<float>(to_float(a[d])) * static_cast<float>(to_float(b[d]));
        logits[j] = sum;
      }
      const float most = detail::greatest(logits, text.count);
      if (detail::is_nan(most) || detail::is_infinite(most))
        return {0, fail(Errc::all_scores_nan, "", number(visual_tokens(visual)))};
      const float inverse = 1.0f / detail::exponentials(logits, text.count, most);
      for (std::size_t j = 0; j < text.count; ++j) relevance[j] += logits[j] * inverse;
    }
  float mean = 0;
  for (std::size_t j = 0; j < text.count; ++j) mean += relevance[j] / static_cast<float>(text.count);
  std::size_t found = 0;
  for (std::size_t j = 0; j < text.count; ++j)
    if (relevance[j] >= mean) rows[found++] = static_cast<Index>(text.first + j);
  // Rounding may put equal relevances a hair below their mean; the last text token then speaks for them.
  if (found == 0) rows[found++] = static_cast<Index>(text.first + text.count - 1);
  return {found, {}};
}

// ---- prior-corrected: PriorTR (arXiv 2606.24156) ------------------------------------------------

namespace detail {

// ln(x) for normal positive x, to about 1e-7 (Cephes logf).
inline float log_of(float x) noexcept {
  const std::uint32_t bits = bits_of(x);
  auto power = static_cast<std::int32_t>(bits >> 23) - 126;
  float m = bit_cast<float>((bits & 0x007fffffu) | 0x3f000000u);  // [0.5, 1)
  if (m < 0.70710678f) {
    m += m;
    --power;
  }
  m -= 1.0f;
  const float z = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const auto e = static_cast<float>(power);
  return m + (m * z * p + e * -2.12194440e-4f - 0.5f * z) + e * 0.693359375f;
}

}  // namespace detail

// S = P log((P + e) / (Q + e)), e = 1e-6: P and Q are the scores of the question's rows and of a prior row that has
// not seen the question (the separator right behind the picture), each divided by its sum. scores: P in, S out. NaN
// in either stays NaN. O(visual tokens).
template <class Score>
Status prior_corrected(Span<Score> scores, Span<const Score> prior) noexcept {
  using detail::number;
  if (prior.size() != scores.size())
    return detail::fail(Errc::scores_size, "", number(prior.size()), number(scores.size()));
  if (Status status = detail::check_room(scores, scores.size(), "scores"); !status) return status;
  if (Status status = detail::check_room(prior, prior.size(), "the prior"); !status) return status;
  Score p_sum = 0, q_sum = 0;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    p_sum += scores[i];
    q_sum += prior[i];
  }
  for (std::size_t i = 0; i < scores.size(); ++i) {
    const Score p = scores[i] / p_sum, q = prior[i] / q_sum;
    const auto ratio = static_cast<float>((p + Score(1e-6)) / (q + Score(1e-6)));
    scores[i] = detail::is_nan(ratio) ? detail::nan_value<Score>() : p * static_cast<Score>(detail::log_of(ratio));
  }
  return {};
}

// ---- key-sharded: context parallel --------------------------------------------------------------

// One head's softmax over the keys of one rank: the greatest logit, and the sum of exp(logit - greatest). A rank
// whose keys are all hidden, or that has none, has {-infinity's stand-in, 0}.
struct SoftmaxPart {
  // See above.
  float greatest = -3.0e38f;
  float sum = 0;
};

// On each rank: the numerators exp(logit - greatest) of this rank's visual tokens and the part of every head's
// softmax. evidence: the last row's query (rows = 1) and this rank's keys, all of which it sees. visual: spans in
// this rank's keys, numbered from evidence.past; they may end at the last key. parts: [heads]. numerators: [heads,
// visual tokens].
template <class Q, class K>
Status score_shard(const QueryKey<Q, K>& evidence, Span<const TokenSpan> visual, Span<SoftmaxPart> parts,
                   Span<float> numerators, Span<float> scratch) noexcept {
  if (Status status = check(evidence); !status) return status;
  if (Status status = detail::check_spans(visual, prompt_tokens(evidence)); !status) return status;
  const std::size_t count = visual_tokens(visual);
  if (Status status = detail::check_room(parts, evidence.heads, "parts"); !status) return status;
  if (Status status = detail::check_room(numerators, evidence.heads * count, "numerators"); !status) return status;
  if (Status status = detail::check_room(scratch, score_scratch(evidence), "scratch"); !status) return status;
  float* logits = scratch.data();
  float* query = logits + evidence.heads * evidence.keys;
  detail::load_query(evidence, evidence.rows - 1, query);
  detail::product_with_keys(evidence, 0, evidence.keys, logits, query, query + detail::query_floats(evidence));
  for (std::size_t head = 0; head < evidence.heads; ++head) {
    float* row = logits + head * evidence.keys;
    detail::cap_and_bias(evidence, evidence.keys, row);
    const float most = detail::greatest(row, evidence.keys);
    if (detail::is_infinite(most)) {
      parts[head] = {};
      for (std::size_t key = 0; key < evidence.keys; ++key) row[key] = 0;
    } else {
      parts[head] = {most, detail::is_nan(most) ? most : detail::exponentials(row, evidence.keys, most)};
    }
    detail::for_each_stretch(visual, 0, count, [&](std::size_t first, std::size_t position, std::size_t n) {
      for (std::size_t i = 0; i < n; ++i) numerators[head * count + first + i] = row[evidence.past + position + i];
    });
  }
  return {};
}

// On each rank, once every rank has all parts, [ranks, heads] in the order of the ranks: the scores of this rank's
// visual tokens, exactly those of one softmax over all keys. Put together in the order of the prompt they are the
// Scores to prune by; every rank computes with the same numbers in the same order. O(heads * (ranks + visual
// tokens)).
template <class Score>
Status merge_shards(Span<const SoftmaxPart> parts, std::size_t ranks, std::size_t rank, Span<const float> numerators,
                    Span<Score> scores) noexcept {
  using detail::fail;
  using detail::number;
  if (ranks == 0 || rank >= ranks || parts.size() % ranks != 0 || parts.empty())
    return fail(Errc::shard_ranks, "", number(parts.size()), number(ranks), number(rank));
  const std::size_t heads = parts.size() / ranks, count = scores.size();
  if (numerators.size() != heads * count)
    return fail(Errc::scores_size, "", number(numerators.size()), number(heads * count));
  if (Status status = detail::check_room(parts, parts.size(), "parts"); !status) return status;
  if (Status status = detail::check_room(numerators, heads * count, "numerators"); !status) return status;
  if (Status status = detail::check_room(scores, count, "scores"); !status) return status;
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
    const Score weight =
        detail::is_nan(most) || !(sum > 0)
            ? detail::nan_value<Score>()
            : static_cast<Score>(detail::exp_of_negative(own - most) / sum) / static_cast<Score>(heads);
    for (std::size_t i = 0; i < count; ++i) scores[i] += weight * static_cast<Score>(numerators[head * count + i]);
  }
  return {};
}

}  // namespace fastv

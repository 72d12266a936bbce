// fastv: changes of evidence and scores that cure some of FastV's bias towards late positions (the bottom of an image) at
// equal count: the last row's attention decays with distance under RoPE, is drawn to sinks, and has a prior that knows
// nothing of the question.
//
// They compose with every selection (windows, uniform share, quotas) and with each other:
//
//   RoPE-free        unrotate() the keys (or hand over keys saved before RoPE), then score as usual
//   value-weighted   value_norms() into the evidence, then score as usual
//   text raters      text_raters() into Config::listed_rows, then score as usual
//   prior-corrected  Config::prior_rows, or correct_by_prior() on two sets of scores
//   query-free       KeysOnly as the evidence
#pragma once

#include "score.hpp"

#include "detail/begin.hpp"

namespace fastv {

// ---- RoPE-free: FEATHER's phi_-R (arXiv 2412.13180) ---------------------------------------------

// Which elements of a vector RoPE turns together, of `pairs` pairs.
enum class RopeLayout {
  half,        // (i, i + pairs): Hugging Face's LLaMA and Qwen, ggml's NEOX
  interleaved  // (2 i, 2 i + 1): the original LLaMA, ggml's NORM
};

// How keys were rotated: pair i of token t by the angle positions[axis[i]][t] * frequencies[i].
struct Rope {
  Span<const float> frequencies;         // [pairs], theta^(-2 i / rotated dimensions) in most models. Fewer pairs than
                                         // dim / 2: partial rotary, whose elements past 2 * pairs stay as they are.
                                         // One that is no number makes its pair NaN
  Span<const Index> positions;           // [axes, tokens]; 1-D RoPE has one axis, M-RoPE three or four
  Span<const unsigned char> axis = {};   // [pairs], M-RoPE's section of each pair; empty: axis 0
  RopeLayout layout = RopeLayout::half;  // which elements are a pair
};

namespace detail {
inline namespace FASTV_KIND {

inline Status check_rope(const Rope& rope, std::size_t tokens, std::size_t dim) noexcept {
  const std::size_t pairs = rope.frequencies.size();
  if (pairs == 0 || pairs > dim / 2)
    return fail(Errc::bad_setting,
                "Rope::frequencies has {} entries but the head dimension is {}: give one per rotated pair, at most {}",
                pairs, dim, dim / 2);
  if (rope.frequencies.data() == nullptr) return fail_null("Rope::frequencies");
  if (!rope.axis.empty() && rope.axis.size() != pairs)
    return fail(Errc::bad_setting, "Rope::axis has {} entries for {} pairs: give one each, or none", rope.axis.size(),
                pairs);
  if (!rope.axis.empty() && rope.axis.data() == nullptr) return fail_null("Rope::axis");
  std::size_t axes = 1;
  for (const unsigned char axis : rope.axis) axes = axis + 1u > axes ? axis + 1u : axes;
  const std::size_t given = rope.positions.size();
  if (given < axes * tokens || (axes > 1 && tokens > 0 && given % tokens != 0))
    return fail(Errc::bad_setting,
                "Rope::positions has {} entries for {} axes of {} tokens: hand over {}, axis by axis", given, axes,
                tokens, axes * tokens);
  return tokens > 0 && rope.positions.data() == nullptr ? fail_null("Rope::positions") : Status{};
}

}  // namespace FASTV_KIND
}  // namespace detail

inline namespace FASTV_KIND {

// Undoes the rotation of cached keys, exactly up to rounding (rotations are orthogonal). The queries are best saved before
// RoPE; unrotate() serves for them too. vectors: Heads, paged or not, or LoadedKeys. out: [heads, tokens, dim] floats;
// hand it on as heads(out, HeadMajor{heads, tokens, dim}). O(tokens * pairs) sines, O(heads * tokens * dim).
template <class Vectors, class ParallelFor = Serial>
Status unrotate(const Vectors& vectors, const Rope& rope, Span<float> out,
                const ParallelFor& parallel_for = {}) noexcept {
  if (Status status = detail::check_heads(vectors, "key"); !status) return status;
  const std::size_t tokens = vectors.tokens, dim = vectors.dim, pairs = rope.frequencies.size();
  if (Status status = detail::check_rope(rope, tokens, dim); !status) return status;
  if (Status status = detail::expect_room(out, vectors.heads * tokens * dim, "the output"); !status) return status;

  detail::in_pieces(tokens, parallel_for, [&](std::size_t begin, std::size_t end) {
    detail::for_each_vector(vectors, begin, end, [&](std::size_t head, std::size_t token) {
      detail::load_vector(vectors, head, token, out.data() + (head * tokens + token) * dim);
    });
    const std::size_t step = rope.layout == RopeLayout::half ? 1 : 2;
    const std::size_t other = rope.layout == RopeLayout::half ? pairs : 1;
    for (std::size_t token = begin; token < end; ++token)
      for (std::size_t pair = 0; pair < pairs; ++pair) {
        const std::size_t axis = rope.axis.empty() ? 0 : rope.axis[pair];
        double sine = 0, cosine = 1;
        // The angle is rounded to float first, as the models compute it.
        detail::sin_cos(
            static_cast<double>(static_cast<float>(rope.positions[axis * tokens + token]) * rope.frequencies[pair]),
            sine, cosine);
        for (std::size_t head = 0; head < vectors.heads; ++head) {
          float* x = out.data() + (head * tokens + token) * dim + pair * step;
          const double a = static_cast<double>(x[0]), b = static_cast<double>(x[other]);
          x[0] = static_cast<float>(a * cosine + b * sine);
          x[other] = static_cast<float>(b * cosine - a * sine);
        }
      }
  });
  return {};
}

// ---- value-weighted: CAPA (arXiv 2602.00247) ----------------------------------------------------

// Length of every visual token's value vector, [kv heads, visual tokens], for
//
//   s_i = 1/H sum_h p_hi |v_hi|
//
// Hand the result over as the evidence's value_norms. values: Heads, paged or not, or LoadedKeys, of at most 1,024
// elements a vector, [kv heads, past + n, dim]; past: tokens of earlier turns. O(kv heads * visual tokens * dim).
template <class Values>
Status value_norms(const Values& values, Span<const TokenSpan> visual, Span<float> norms,
                   std::size_t past = 0) noexcept {
  if (Status status = detail::check_heads(values, "value"); !status) return status;
  if (past >= values.tokens)
    return fail(Errc::bad_shape,
                "past is {} but there are {} values: it counts those of earlier turns, without the prompt's", past,
                values.tokens);
  if (Status status = validate(visual, values.tokens - past); !status) return status;
  const std::size_t count = visual_tokens(visual);
  if (Status status = detail::expect_room(norms, values.heads * count, "value_norms"); !status) return status;
  float vector[1024];
  if (values.dim > 1024)
    return fail(Errc::not_supported, "values have {} elements a head but at most 1024 are supported", values.dim);
  detail::for_each_stretch(visual, 0, count, [&](std::size_t first, std::size_t position, std::size_t n) {
    const std::size_t begin = past + position;
    detail::for_each_vector(values, begin, begin + n, [&](std::size_t head, std::size_t token) {
      detail::load_vector(values, head, token, static_cast<float*>(vector));
      norms[head * count + first + (token - begin)] = detail::length_of(vector, values.dim);
    });
  });
  return {};
}

// ---- text raters: SparseVLM (ICML 2025, arXiv 2410.04417) ---------------------------------------

// The text tokens of [first, first + count) that are relevant to the images: those whose relevance
//
//   r_j = 1/L sum_i softmax_j(h_i . h_j)_j   over visual tokens i and text tokens j
//
// is at least the mean relevance. Visual tokens in that range are passed over. hidden: [tokens, width], rows `stride`
// elements apart. raters: receives their prompt positions, for Config::listed_rows; scratch: 2 * count floats. Returns
// how many there are. O(L * count * width).
template <class T>
Result<std::size_t> text_raters(const T* hidden, std::size_t tokens, std::size_t width, std::size_t stride,
                                Span<const TokenSpan> visual, TokenSpan text, Span<Index> raters,
                                Span<float> scratch) noexcept {
  if (Status status = detail::check_data(hidden, "the hidden states"); !status) return {0, status};
  if (Status status = validate(visual, tokens); !status) return {0, status};
  const std::size_t count = visual_tokens(visual);
  if (count == 0)
    return {0, fail(Errc::bad_prompt, "the prompt has no visual tokens, so no text can be relevant to them")};
  if (text.count == 0) return {0, fail(Errc::bad_prompt, "the text has 0 tokens: name those behind the images")};
  if (text.first >= tokens || text.count > tokens - text.first)
    return {0, fail(Errc::bad_prompt,
                    "the text reaches from position {} over {} tokens but the prompt has {}: use those in it",
                    text.first, text.count, tokens)};
  if (stride < width)
    return {0, fail(Errc::bad_stride,
                    "the row stride of the hidden states is {} but a row has {} elements: use at least that", stride,
                    width)};
  if (stride > detail::most_entries / tokens)
    return {0, fail(Errc::bad_stride,
                    "the row stride of the hidden states is {}, which over {} tokens is more than any memory holds",
                    stride, tokens)};
  if (Status status = detail::expect_room(raters, text.count, "raters"); !status) return {0, status};
  if (Status status = detail::expect_room(scratch, 2 * text.count, "scratch"); !status) return {0, status};

  float* relevance = scratch.data();
  float* logits = relevance + text.count;
  std::size_t words = text.count;
  for (std::size_t j = 0; j < text.count; ++j) relevance[j] = 0;
  for (const TokenSpan& span : visual)  // those within the range are no text: less than nothing, and so never relevant
    for (std::size_t i = span.first; i < span.first + span.count; ++i)
      if (i >= text.first && i - text.first < text.count) {
        relevance[i - text.first] = -1;
        --words;
      }
  if (words == 0)
    return {0, fail(Errc::bad_prompt, "all {} tokens from position {} on are visual: name those behind the images",
                    text.count, text.first)};
  for (const TokenSpan& span : visual)
    for (std::size_t i = span.first; i < span.first + span.count; ++i) {
      for (std::size_t j = 0; j < text.count; ++j) {
        const T *a = hidden + i * stride, *b = hidden + (text.first + j) * stride;
        float sum = 0;
        for (std::size_t d = 0; d < width; ++d)
          sum += static_cast<float>(to_float(a[d])) * static_cast<float>(to_float(b[d]));
        logits[j] = relevance[j] < 0 ? detail::minus_infinity<float>() : sum;
      }
      const float most = detail::greatest(logits, text.count);
      if (detail::is_nan(most) || detail::is_infinite(most))
        return {0, fail(Errc::bad_value,
                        "the relevance of the text to visual token at position {} is not a finite number: "
                        "check the hidden states",
                        i)};
      const float inverse = 1.0f / detail::exponentials(logits, text.count, most);
      for (std::size_t j = 0; j < text.count; ++j) relevance[j] += logits[j] * inverse;
    }
  float mean = 0;
  for (std::size_t j = 0; j < text.count; ++j)
    mean += relevance[j] < 0 ? 0.0f : relevance[j] / static_cast<float>(words);
  std::size_t found = 0;
  for (std::size_t j = 0; j < text.count; ++j)
    if (relevance[j] >= mean) raters[found++] = static_cast<Index>(text.first + j);
  // Rounding may put equal relevances a hair below their mean: then fall back to the last text token.
  for (std::size_t j = text.count; found == 0; --j)
    if (!(relevance[j - 1] < 0)) raters[found++] = static_cast<Index>(text.first + j - 1);
  return {found, {}};
}

// ---- prior-corrected: PriorTR (arXiv 2606.24156) ------------------------------------------------

// Corrects scores for what a row attends to before it has seen the question:
//
//   S = P log((P + e) / (Q + e)),  e = 1e-6
//
// P and Q are the scores of the question's rows and of a prior row (the separator right after the image), each divided by
// its sum. scores: P in, S out. NaN in either stays NaN. O(visual tokens).
template <class Score>
Status correct_by_prior(Span<Score> scores, Span<const Score> prior) noexcept {
  if (prior.size() != scores.size())
    return fail(Errc::bad_shape, "the prior has {} scores for {} visual tokens: give one each", prior.size(),
                scores.size());
  if (Status status = detail::expect_room(scores, scores.size(), "scores"); !status) return status;
  if (Status status = detail::expect_room(prior, prior.size(), "the prior"); !status) return status;
  struct Sum {  // of those that are numbers
    Score sum = 0;
    std::size_t numbers = 0;
    void add(const Score& score) noexcept {
      if (detail::is_nan(score)) return;
      sum += score;
      ++numbers;
    }
    bool nothing() const noexcept { return numbers > 0 && detail::is_zero(sum); }
  } question, before;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    question.add(scores[i]);
    before.add(prior[i]);
  }
  if (question.nothing() || before.nothing())
    return fail(Errc::bad_value,
                "all {} visual scores {} are 0, so that there is nothing to correct: does that row see the images?",
                scores.size(), question.nothing() ? "of the question" : "of the prior rows");
  for (std::size_t i = 0; i < scores.size(); ++i) {
    const Score p = scores[i] / question.sum, q = prior[i] / before.sum;
    const auto ratio = static_cast<float>((p + Score(1e-6)) / (q + Score(1e-6)));
    scores[i] = detail::is_nan(ratio) ? detail::nan_value<Score>() : p * static_cast<Score>(detail::log_of(ratio));
  }
  return {};
}

}  // namespace FASTV_KIND

}  // namespace fastv

#include "detail/end.hpp"

// fastv: scores from what a layer did to each token, for engines that cannot hand over queries and keys, and for layers
// that have none (recurrent ones of hybrid models).
//
//   outputs()      |o_i|, o the output of attention (or of a recurrent layer) before it is added to the residual stream:
//                  DASH (arXiv 2604.18103). Its authors halt text tokens by it; it serves as well beside FlashAttention
//   changes()      |h_i after - h_i before|, hidden rows of two layers: V2Drop, whose stages are K = 3, 17 and 22 of 32,
//                  each on the change of the layer before it
//   transitions()  softmax_i(1 - cos(x_i, f(x)_i)) |f(x)_i| / |x_i|, x and f(x) what goes into attention or a feed-forward
//                  block and what comes out, ahead of the residual: TransPrune (arXiv 2507.20630; its paper has 1 - |cos|,
//                  its code, which is followed here, no bars). The authors add up attention, feed-forward and layers, then
//                  mix_scores() half of it with attention
//
// The rows are of the prompt alone, [n, width]; only those of visual tokens are read. O(visual tokens * width).
#pragma once

#include "score.hpp"

#include "detail/begin.hpp"

namespace fastv {

// How two rows are compared.
enum class ChangeBy {
  distance,   // length of after - before; of after where there is no before
  transition  // see transitions() above
};

// Evidence of rows before and after. outputs(), changes() and transitions() make it.
template <class T>
struct Changes {
  const T* after;                    // [tokens, width]
  const T* before;                   // the same; null: none
  std::size_t tokens, width;         // n, elements of a row
  ChangeBy by = ChangeBy::distance;  // how they are compared
  std::size_t stride = 0;            // elements from row to row of after; 0: width
  std::size_t before_stride = 0;     // of before; 0: width

  FASTV_INLINE std::size_t prompt_tokens() const noexcept { return tokens; }  // n
  FASTV_INLINE Status check() const noexcept;                                 // pointers, extents, strides
  FASTV_INLINE std::size_t scratch_floats() const noexcept;                   // one for each piece of work
  // Lengths in float. A token whose row before is 0 has no transition: its score is NaN.
  template <class Score, class ParallelFor>
  FASTV_INLINE Status score(const Scoring& scoring, Span<Score> scores, const ParallelFor& parallel_for) const noexcept;
};

// outputs(o, n, 4096)
template <class T>
FASTV_INLINE Changes<T> outputs(const T* output, std::size_t tokens, std::size_t width) noexcept {
  static_assert(detail::has_to_float<T>,
                "this element type has no to_float(): see fastv::as_half() and as_bfloat16() for 16-bit ones");
  return {output, nullptr, tokens, width};
}
// changes(h_before, h, n, 4096)
template <class T>
FASTV_INLINE Changes<T> changes(const T* before, const T* after, std::size_t tokens, std::size_t width) noexcept {
  static_assert(detail::has_to_float<T>,
                "this element type has no to_float(): see fastv::as_half() and as_bfloat16() for 16-bit ones");
  return {after, before, tokens, width};
}
// transitions(x, y, n, 4096)
template <class T>
FASTV_INLINE Changes<T> transitions(const T* in, const T* out, std::size_t tokens, std::size_t width) noexcept {
  Changes<T> evidence = fastv::changes(in, out, tokens, width);
  evidence.by = ChangeBy::transition;
  return evidence;
}

namespace detail {
inline namespace FASTV_KIND {

template <class T>
Status check_changes(const Changes<T>& evidence) noexcept {
  const std::size_t tokens = evidence.tokens, columns = evidence.width;
  if (tokens == 0 || tokens > max_tokens)
    return fail(Errc::bad_shape, "the rows of a layer are {} but must be from 1 to {}", tokens, max_tokens);
  if (columns == 0) return fail(Errc::bad_shape, "the rows of a layer have 0 elements: state at least 1");
  if (evidence.by == ChangeBy::transition && evidence.before == nullptr)
    return fail(Errc::null_data, "the pointer to the rows before is null: a transition needs both");
  const auto check_rows = [&](const T* data, std::size_t stride, const char* what) {
    if (Status status = check_data(data, what); !status) return status;
    return check_strides({{what, "row stride", as_stride(stride == 0 ? columns : stride), tokens}}, columns);
  };
  if (Status status = check_rows(evidence.after, evidence.stride, "the rows of a layer"); !status) return status;
  if (evidence.before == nullptr) return {};
  return check_rows(evidence.before, evidence.before_stride, "the rows before");
}

// a.a, b.b and a.b, in lanes, so that the compiler may vectorise the sums; b null: of zeros.
struct Lengths {
  float after, before, product, distance;  // squared, but for the product
};
template <class T>
Lengths compare_rows(const T* a, const T* b, std::size_t columns) noexcept {
  float sums[4][8] = {};
  const auto add = [&](std::size_t i, std::size_t lane) {
    const auto x = static_cast<float>(to_float(a[i])), y = b == nullptr ? 0.0f : static_cast<float>(to_float(b[i]));
    sums[0][lane] += x * x;
    sums[1][lane] += y * y;
    sums[2][lane] += x * y;
    sums[3][lane] += (x - y) * (x - y);
  };
  const std::size_t whole = columns / 8 * 8;
  for (std::size_t i = 0; i < whole; i += 8)
    for (std::size_t lane = 0; lane < 8; ++lane) add(i + lane, lane);
  for (std::size_t lane = 0; lane < columns - whole; ++lane) add(whole + lane, lane);
  for (auto& sum : sums)
    for (std::size_t lane = 1; lane < 8; ++lane) sum[0] += sum[lane];
  return {sums[0][0], sums[1][0], sums[2][0], sums[3][0]};
}

template <class Score, class T, class ParallelFor>
Status score_changes(const Changes<T>& evidence, const Scoring& scoring, Span<Score> scores,
                     const ParallelFor& parallel_for) noexcept {
  if (Status status = scoring.queries.expect_default(); !status) return status;
  const std::size_t count = visual_tokens(scoring.visual), columns = evidence.width;
  if (Status status = expect_room(scoring.scratch, pieces(count), "scratch"); !status) return status;
  const std::size_t stride = evidence.stride == 0 ? columns : evidence.stride;
  const std::size_t before_stride = evidence.before_stride == 0 ? columns : evidence.before_stride;
  const bool transition = evidence.by == ChangeBy::transition;
  in_pieces(count, parallel_for, [&](std::size_t begin, std::size_t end) {
    float sum = 0;
    for_each_stretch(scoring.visual, begin, end, [&](std::size_t number, std::size_t position, std::size_t n) {
      for (std::size_t i = 0; i < n; ++i) {
        const T* before = evidence.before == nullptr ? nullptr : evidence.before + (position + i) * before_stride;
        const Lengths x = compare_rows(evidence.after + (position + i) * stride, before, columns);
        if (!transition) {
          scores[number + i] = static_cast<Score>(sqrt_of(x.distance));
          continue;
        }
        const float after = sqrt_of(x.after), length = sqrt_of(x.before), both = after * length;
        const float cosine = both > 0 ? x.product / both : 0;
        const float turned = (1.0f - cosine) - 2.0f;  // at most 0, but for rounding
        if (is_nan(x.distance) || is_infinite(x.distance) || is_zero(length)) {
          scores[number + i] = nan_value<Score>();
          continue;
        }
        const float e = exp_of_negative(turned < 0 ? turned : 0.0f);
        sum += e;
        scores[number + i] = static_cast<Score>(e * (after / length));
      }
    });
    scoring.scratch[begin / keys_per_piece] = sum;
  });
  if (!transition) return {};
  Score total = 0;
  for (std::size_t p = 0; p < pieces(count); ++p) total += static_cast<Score>(scoring.scratch[p]);
  for (std::size_t i = 0; i < count && total > 0; ++i)
    scores[i] = is_nan(scores[i]) ? nan_value<Score>() : scores[i] / total;
  return {};
}

}  // namespace FASTV_KIND
}  // namespace detail

template <class T>
Status Changes<T>::check() const noexcept {
  return detail::check_changes(*this);
}
template <class T>
std::size_t Changes<T>::scratch_floats() const noexcept {
  return detail::pieces(tokens);
}
template <class T>
template <class Score, class ParallelFor>
Status Changes<T>::score(const Scoring& scoring, Span<Score> scores, const ParallelFor& parallel_for) const noexcept {
  return detail::score_changes(*this, scoring, scores, parallel_for);
}

inline namespace FASTV_KIND {

// scores = (1 - weight) scores / sum(scores) + weight other / sum(other), as TransPrune adds attention to transitions at
// weight 1/2. NaN in either stays NaN and is left out of the sums, which must be positive. O(visual tokens).
template <class Score>
Status mix_scores(Span<Score> scores, Span<const Score> other, double weight) noexcept {
  if (other.size() != scores.size())
    return fail(Errc::bad_shape, "{} scores are to be mixed with {}: give one each for every visual token",
                scores.size(), other.size());
  if (!detail::is_share(weight))
    return fail(Errc::bad_setting, "the weight of a mixture is {} but must lie between 0 and 1", weight);
  if (Status status = detail::expect_room(scores, scores.size(), "scores"); !status) return status;
  if (Status status = detail::expect_room(other, other.size(), "the other scores"); !status) return status;
  double sums[2] = {};
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (!detail::is_nan(scores[i])) sums[0] += static_cast<double>(scores[i]);
    if (!detail::is_nan(other[i])) sums[1] += static_cast<double>(other[i]);
  }
  for (const double& sum : sums)
    if (!scores.empty() && (!(sum > 0) || detail::is_infinite(sum)))
      return fail(Errc::bad_value,
                  "scores to be mixed add up to {} but must to a positive number, since each is divided by its sum",
                  sum);
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (detail::is_nan(scores[i]) || detail::is_nan(other[i]))
      scores[i] = detail::nan_value<Score>();
    else
      scores[i] = static_cast<Score>((1 - weight) * static_cast<double>(scores[i]) / sums[0] +
                                     weight * static_cast<double>(other[i]) / sums[1]);
  }
  return {};
}

}  // namespace FASTV_KIND

}  // namespace fastv

#include "detail/end.hpp"

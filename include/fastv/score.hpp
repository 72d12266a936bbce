// fastv: evidence -> one score per visual token.
//
// The score of visual token i is the attention it receives, averaged over query heads and over the rows
// R of Config::score_rows (paper section 4.1, Eq. 4; the released code uses R = {last row}):
//
//   s_i = 1 / (H |R|)  sum_{h < H}  sum_{r in R}  softmax_j(logit[h, r, j])_i
//
// The softmax runs over the whole row, text keys included: its denominator differs from head to head and
// so weights the heads. A row before token i cannot see it and adds zero, but is counted in |R|.
#pragma once

#include "plan.hpp"

namespace fastv {

namespace detail {

// exp(x) for x <= 0 to 2 ulp (Cephes expf: argument reduced by ln 2 in two parts, degree 6). No branch
// and no library call, so that loops over it vectorise; below -87 it is 0. NaN must not come in.
inline float exp_of_negative(float x) noexcept {
  const float clipped = x < -87.0f ? -87.0f : x;
  const auto power = static_cast<std::int32_t>(clipped * 1.44269504088896341f - 0.5f);  // rounds to nearest
  const float n = static_cast<float>(power);
  const float r = clipped - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float scale = bit_cast<float>(static_cast<std::uint32_t>(power + 127) << 23);
  return x < -87.0f ? 0.0f : p * scale;
}

// tanh by exp, to about 1e-7 absolute.
inline float tanh_of(float x) noexcept {
  const float magnitude = x < 0 ? -x : x;
  const float e = exp_of_negative(-2.0f * magnitude);
  const float t = (1.0f - e) / (1.0f + e);
  return x < 0 ? -t : t;
}

// Lanes of partial sums, so that the compiler may vectorise a sum without reordering one.
inline constexpr std::size_t lanes = 32;

// q.k over dim elements.
template <class K>
inline float dot(const float* q, const K* k, std::size_t dim) noexcept {
  float sums[lanes] = {};
  std::size_t i = 0;
  for (; i + lanes <= dim; i += lanes)
    for (std::size_t lane = 0; lane < lanes; ++lane)
      sums[lane] += q[i + lane] * static_cast<float>(to_float(k[i + lane]));
  for (std::size_t lane = 0; i < dim; ++i, ++lane) sums[lane] += q[i] * static_cast<float>(to_float(k[i]));
  for (std::size_t width = lanes / 2; width > 0; width /= 2)
    for (std::size_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  return sums[0];
}

struct Axis {
  const char* what;
  std::ptrdiff_t stride;
  std::size_t extent;
};

// Strides must not be negative, and no two entries may overlap: in order of stride, whatever the order of
// the axes, each axis must step over all that the ones before it reach.
template <std::size_t N>
Status check_strides(Axis (&&axes)[N], std::size_t entry) noexcept {
  for (const Axis& axis : axes)
    if (axis.stride < 0) return fail(Errc::negative_stride, axis.what, static_cast<long long>(axis.stride));
  for (std::size_t i = 1; i < N; ++i)
    for (std::size_t j = i; j > 0 && axes[j].stride < axes[j - 1].stride; --j) {
      const Axis larger = axes[j - 1];
      axes[j - 1] = axes[j];
      axes[j] = larger;
    }
  std::size_t reach = entry;
  for (const Axis& axis : axes) {
    if (axis.extent <= 1) continue;
    const auto stride = static_cast<std::size_t>(axis.stride);
    if (stride < reach)
      return fail(Errc::overlapping_stride, axis.what, static_cast<long long>(axis.stride), number(reach));
    reach += stride * (axis.extent - 1);
  }
  return {};
}

// The rows to average over, as prompt positions: last row, all rows or the listed ones.
class RowSet {
 public:
  RowSet(const Config& config, std::size_t tokens) noexcept : config_(config), tokens_(tokens) {}
  std::size_t size() const noexcept {
    switch (config_.score_rows) {
      case ScoreRows::last: return 1;
      case ScoreRows::all: return tokens_;
      case ScoreRows::listed: break;
    }
    return config_.listed_rows.size();
  }
  std::size_t operator[](std::size_t i) const noexcept {
    switch (config_.score_rows) {
      case ScoreRows::last: return tokens_ - 1;
      case ScoreRows::all: return i;
      case ScoreRows::listed: break;
    }
    return config_.listed_rows[i];
  }
  // Every row must be a prompt position and among the last `rows` rows, which the evidence covers.
  Status check_covered(std::size_t rows) const noexcept {
    const std::size_t first = tokens_ - rows;
    if (config_.score_rows == ScoreRows::all && rows < tokens_)
      return fail(Errc::row_not_in_evidence, "", 0, number(first));
    if (config_.score_rows != ScoreRows::listed) return {};
    if (config_.listed_rows.empty()) return fail(Errc::listed_rows_empty);
    if (config_.listed_rows.data() == nullptr) return fail(Errc::null_data, "listed_rows");
    for (std::size_t i = 0; i < size(); ++i) {
      if ((*this)[i] >= tokens_)
        return fail(Errc::listed_row_past_end, "", number((*this)[i]), number(tokens_), number(i));
      if ((*this)[i] < first) return fail(Errc::row_not_in_evidence, "", number((*this)[i]), number(first));
    }
    return {};
  }

 private:
  const Config& config_;
  std::size_t tokens_;
};

inline Status check_shape(const char* what, std::size_t heads, std::size_t rows, std::size_t keys) noexcept {
  if (heads == 0) return fail(Errc::no_heads, what);
  if (rows == 0) return fail(Errc::no_rows, what);
  if (keys == 0) return fail(Errc::no_tokens);
  if (keys > max_tokens) return fail(Errc::too_many_tokens, "", number(keys), number(max_tokens));
  if (rows > keys) return fail(Errc::rows_above_keys, what, number(rows), number(keys));
  return {};
}

}  // namespace detail

// ---- prompt length of each kind of evidence -----------------------------------------------------

template <class T>
std::size_t prompt_tokens(const Probabilities<T>& evidence) noexcept {
  return evidence.keys;
}
template <class Q, class K>
std::size_t prompt_tokens(const QueryKey<Q, K>& evidence) noexcept {
  return evidence.keys;
}
template <class T>
std::size_t prompt_tokens(const Scores<T>& evidence) noexcept {
  return evidence.tokens;
}
inline std::size_t prompt_tokens(const NoEvidence& evidence) noexcept { return evidence.tokens; }

// ---- floats of scratch that score() needs -------------------------------------------------------

template <class Q, class K>
std::size_t score_scratch(const QueryKey<Q, K>& evidence) noexcept {
  return evidence.heads * (evidence.keys + evidence.dim) + evidence.dim;  // logits, query, one widened key
}
template <class Evidence>
std::size_t score_scratch(const Evidence&) noexcept {
  return 0;
}

// ---- checks -------------------------------------------------------------------------------------

template <class T>
Status check(const Probabilities<T>& evidence) noexcept {
  using detail::fail;
  if (Status status = detail::check_shape("probabilities", evidence.heads, evidence.rows, evidence.keys); !status)
    return status;
  if (evidence.data == nullptr) return fail(Errc::null_data, "probabilities");
  return detail::check_strides({{"key stride of probabilities", evidence.key_stride, evidence.keys},
                                {"row stride of probabilities", evidence.row_stride, evidence.rows},
                                {"head stride of probabilities", evidence.head_stride, evidence.heads}},
                               1);
}

template <class Q, class K>
Status check(const QueryKey<Q, K>& evidence) noexcept {
  using detail::fail;
  using detail::number;
  if (Status status = detail::check_shape("query", evidence.heads, evidence.rows, evidence.keys); !status)
    return status;
  if (evidence.kv_heads == 0) return fail(Errc::no_heads, "key");
  if (evidence.dim == 0) return fail(Errc::no_dim, "query");
  if (evidence.heads % evidence.kv_heads != 0)
    return fail(Errc::heads_not_divisible, "", number(evidence.heads), number(evidence.kv_heads));
  if (evidence.query == nullptr) return fail(Errc::null_data, "query");
  if (evidence.key == nullptr) return fail(Errc::null_data, "key");
  if (detail::is_nan(evidence.scale) || detail::is_infinite(evidence.scale) || !(evidence.scale > 0))
    return detail::fail_real(Errc::bad_scale, static_cast<double>(evidence.scale));
  if (detail::is_nan(evidence.soft_cap) || detail::is_infinite(evidence.soft_cap) || !(evidence.soft_cap >= 0))
    return detail::fail_real(Errc::bad_soft_cap, static_cast<double>(evidence.soft_cap));
  if (!evidence.bias.empty() && evidence.bias.size() != evidence.keys)
    return fail(Errc::bias_size, "", number(evidence.bias.size()), number(evidence.keys));
  if (!evidence.bias.empty() && evidence.bias.data() == nullptr) return fail(Errc::null_data, "bias");
  if (Status status = detail::check_strides({{"head stride of query", evidence.query_head_stride, evidence.heads},
                                             {"row stride of query", evidence.query_row_stride, evidence.rows}},
                                            evidence.dim);
      !status)
    return status;
  return detail::check_strides({{"head stride of key", evidence.key_head_stride, evidence.kv_heads},
                                {"token stride of key", evidence.key_token_stride, evidence.keys}},
                               evidence.dim);
}

template <class T>
Status check(const Scores<T>& evidence) noexcept {
  if (!evidence.values.empty() && evidence.values.data() == nullptr) return detail::fail(Errc::null_data, "scores");
  return {};
}

// ---- scoring ------------------------------------------------------------------------------------
// score(config, evidence, visual, scores, scratch) writes one score per visual token, spans in order.
// visual: sorted, disjoint, inside the prompt (check(visual, tokens) tells). scores: one entry per visual
// token. scratch: score_scratch(evidence) floats. Re-entrant; no allocation.

// O(heads * rows scored * visual tokens). Sums in Score.
template <class Score, class T>
Status score(const Config& config, const Probabilities<T>& evidence, Span<const TokenSpan> visual, Span<Score> scores,
             Span<float> = {}) noexcept {
  using detail::fail;
  if (Status status = check(evidence); !status) return status;
  const std::size_t count = visual_tokens(visual);
  if (scores.size() < count)
    return fail(Errc::room_too_small, "scores", detail::number(scores.size()), detail::number(count));
  const detail::RowSet rows(config, evidence.keys);
  if (Status status = rows.check_covered(evidence.rows); !status) return status;

  for (std::size_t i = 0; i < count; ++i) scores[i] = 0;
  const std::size_t first_row = evidence.keys - evidence.rows;
  for (std::size_t head = 0; head < evidence.heads; ++head) {
    for (std::size_t r = 0; r < rows.size(); ++r) {
      const T* row = evidence.data + static_cast<std::ptrdiff_t>(head) * evidence.head_stride +
                     static_cast<std::ptrdiff_t>(rows[r] - first_row) * evidence.row_stride;
      Score* out = scores.data();
      for (const TokenSpan& span : visual) {
        const T* p = row + static_cast<std::ptrdiff_t>(span.first) * evidence.key_stride;
        if (evidence.key_stride == 1) {
          for (std::size_t i = 0; i < span.count; ++i) out[i] += static_cast<Score>(to_float(p[i]));
        } else {
          for (std::size_t i = 0; i < span.count; ++i)
            out[i] += static_cast<Score>(to_float(p[static_cast<std::ptrdiff_t>(i) * evidence.key_stride]));
        }
        out += span.count;
      }
    }
  }
  const Score share = Score(1) / static_cast<Score>(evidence.heads * rows.size());
  for (std::size_t i = 0; i < count; ++i) scores[i] *= share;
  return {};
}

namespace detail {

// Softmax of logits[0 .. keys) in place, without the division: returns 1 / sum, or NaN where a logit is
// NaN or +infinity or where every key is hidden (-infinity).
inline float softmax_numerators(float* logits, std::size_t keys) noexcept {
  float highest[lanes];
  std::uint32_t bad = 0;
  for (std::size_t lane = 0; lane < lanes; ++lane) highest[lane] = logits[0];
  for (std::size_t key = 0; key < keys; ++key) {
    const std::uint32_t bits = bits_of(logits[key]);
    // NaN of either sign, or +infinity
    bad |= static_cast<std::uint32_t>((bits & ~FloatBits<float>::sign) > FloatBits<float>::infinity) |
           static_cast<std::uint32_t>(bits == FloatBits<float>::infinity);
  }
  if (bad != 0) return nan_value<float>();
  std::size_t i = 0;
  for (; i + lanes <= keys; i += lanes)
    for (std::size_t lane = 0; lane < lanes; ++lane)
      highest[lane] = logits[i + lane] > highest[lane] ? logits[i + lane] : highest[lane];
  for (std::size_t lane = 0; i < keys; ++i, ++lane)
    highest[lane] = logits[i] > highest[lane] ? logits[i] : highest[lane];
  float most = highest[0];
  for (std::size_t lane = 1; lane < lanes; ++lane) most = highest[lane] > most ? highest[lane] : most;
  if (is_infinite(most)) return nan_value<float>();

  float sums[lanes] = {};
  for (i = 0; i + lanes <= keys; i += lanes)
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      const float e = exp_of_negative(logits[i + lane] - most);
      logits[i + lane] = e;
      sums[lane] += e;
    }
  for (std::size_t lane = 0; i < keys; ++i, ++lane) {
    logits[i] = exp_of_negative(logits[i] - most);
    sums[lane] += logits[i];
  }
  float sum = 0;
  for (std::size_t lane = 0; lane < lanes; ++lane) sum += sums[lane];
  return 1.0f / sum;
}

// logits[h, j] = scale * q_h . k_j for the query row at `position`, keys 0 .. keys - 1.
// logits: [heads, evidence.keys]; query: [heads, dim] floats; wide: [dim] floats.
template <class Q, class K>
void product_with_keys(const QueryKey<Q, K>& evidence, std::size_t row, std::size_t keys, float* logits, float* query,
                       float* wide) noexcept {
  const std::size_t heads = evidence.heads, dim = evidence.dim, group = heads / evidence.kv_heads;
  for (std::size_t head = 0; head < heads; ++head) {
    const Q* q = evidence.query + static_cast<std::ptrdiff_t>(head) * evidence.query_head_stride +
                 static_cast<std::ptrdiff_t>(row) * evidence.query_row_stride;
    for (std::size_t i = 0; i < dim; ++i) query[head * dim + i] = static_cast<float>(to_float(q[i])) * evidence.scale;
  }
  const auto one_key = [&](std::size_t kv_head, std::size_t key) {
    const K* k = evidence.key + static_cast<std::ptrdiff_t>(kv_head) * evidence.key_head_stride +
                 static_cast<std::ptrdiff_t>(key) * evidence.key_token_stride;
    const std::size_t head = kv_head * group;
    if (group == 1 || std::is_same<K, float>::value) {
      for (std::size_t g = 0; g < group; ++g)
        logits[(head + g) * evidence.keys + key] = dot(query + (head + g) * dim, k, dim);
    } else {  // widen the key once for the group
      for (std::size_t i = 0; i < dim; ++i) wide[i] = static_cast<float>(to_float(k[i]));
      for (std::size_t g = 0; g < group; ++g)
        logits[(head + g) * evidence.keys + key] = dot(query + (head + g) * dim, wide, dim);
    }
  };
  // Memory is read in the order in which it lies.
  if (evidence.key_head_stride <= evidence.key_token_stride) {
    for (std::size_t key = 0; key < keys; ++key)
      for (std::size_t kv_head = 0; kv_head < evidence.kv_heads; ++kv_head) one_key(kv_head, key);
  } else {
    for (std::size_t kv_head = 0; kv_head < evidence.kv_heads; ++kv_head)
      for (std::size_t key = 0; key < keys; ++key) one_key(kv_head, key);
  }
}

}  // namespace detail

// O(heads * keys * dim) for each row scored: the keys are read once per row. Logits and softmax in
// float. A row in which a logit is NaN or +infinity makes all its probabilities NaN, as a softmax does.
template <class Score, class Q, class K>
Status score(const Config& config, const QueryKey<Q, K>& evidence, Span<const TokenSpan> visual, Span<Score> scores,
             Span<float> scratch) noexcept {
  using detail::fail;
  using detail::number;
  if (Status status = check(evidence); !status) return status;
  const std::size_t count = visual_tokens(visual);
  if (scores.size() < count) return fail(Errc::room_too_small, "scores", number(scores.size()), number(count));
  if (scratch.size() < score_scratch(evidence))
    return fail(Errc::room_too_small, "scratch", number(scratch.size()), number(score_scratch(evidence)));
  const detail::RowSet rows(config, evidence.keys);
  if (Status status = rows.check_covered(evidence.rows); !status) return status;

  float* logits = scratch.data();
  float* query = logits + evidence.heads * evidence.keys;
  float* wide = query + evidence.heads * evidence.dim;
  const std::size_t first_row = evidence.keys - evidence.rows;
  for (std::size_t i = 0; i < count; ++i) scores[i] = 0;
  const Score share = Score(1) / static_cast<Score>(evidence.heads * rows.size());

  for (std::size_t r = 0; r < rows.size(); ++r) {
    const std::size_t seen = evidence.causal ? rows[r] + 1 : evidence.keys;
    detail::product_with_keys(evidence, rows[r] - first_row, seen, logits, query, wide);
    for (std::size_t head = 0; head < evidence.heads; ++head) {
      float* row = logits + head * evidence.keys;
      if (evidence.soft_cap > 0) {
        const float inverse = 1.0f / evidence.soft_cap;
        for (std::size_t key = 0; key < seen; ++key)
          if (!detail::is_nan(row[key])) row[key] = evidence.soft_cap * detail::tanh_of(row[key] * inverse);
      }
      if (!evidence.bias.empty())
        for (std::size_t key = 0; key < seen; ++key) row[key] += evidence.bias[key];
      const Score weight = static_cast<Score>(detail::softmax_numerators(row, seen)) * share;
      Score* out = scores.data();
      for (const TokenSpan& span : visual) {
        const std::size_t visible =
            span.first >= seen ? 0 : (span.count < seen - span.first ? span.count : seen - span.first);
        for (std::size_t i = 0; i < visible; ++i) out[i] += weight * static_cast<Score>(row[span.first + i]);
        out += span.count;
      }
    }
  }
  return {};
}

// Copies the engine's own scores. O(visual tokens).
template <class Score, class T>
Status score(const Config&, const Scores<T>& evidence, Span<const TokenSpan> visual, Span<Score> scores,
             Span<float> = {}) noexcept {
  using detail::number;
  if (Status status = check(evidence); !status) return status;
  const std::size_t count = visual_tokens(visual);
  if (evidence.values.size() != count)
    return detail::fail(Errc::scores_size, "", number(evidence.values.size()), number(count));
  if (scores.size() < count) return detail::fail(Errc::room_too_small, "scores", number(scores.size()), number(count));
  for (std::size_t i = 0; i < count; ++i) scores[i] = static_cast<Score>(to_float(evidence.values[i]));
  return {};
}

}  // namespace fastv

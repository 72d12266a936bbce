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
// and no library call, so that loops over it vectorise. Below -87.7, where floats turn denormal, the
// exponent of `scale` reaches 0, and with it the result. NaN must not come in.
inline float exp_of_negative(float x) noexcept {
  // max(x, -88) on the bits, since GCC turns a comparison of floats into a branch here: of negative
  // floats the smaller has the greater bits.
  const std::uint32_t bits = bits_of(x) | FloatBits<float>::sign, lowest = bits_of(-88.0f);
  const float clipped = bit_cast<float>(bits < lowest ? bits : lowest);
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
  return p * bit_cast<float>(static_cast<std::uint32_t>(power + 127) << 23);
}

// tanh by exp, to about 1e-7 absolute.
inline float tanh_of(float x) noexcept {
  const float magnitude = x < 0 ? -x : x;
  const float e = exp_of_negative(-2.0f * magnitude);
  const float t = (1.0f - e) / (1.0f + e);
  return x < 0 ? -t : t;
}

// Asks for memory that will soon be read, to lie in the second-level cache by then.
inline void prefetch(const void* from, std::size_t bytes) noexcept {
#if defined(__GNUC__)
  for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const unsigned char*>(from) + i, 0, 2);
#else
  static_cast<void>(from);
  static_cast<void>(bytes);
#endif
}

// Lanes of partial sums, so that the compiler may vectorise a sum without reordering one.
inline constexpr std::size_t lanes = 32;

// q.k over dim elements: any type, any value, any compiler. four_products() below is its fast brother.
template <class K>
inline float dot(const float* q, const K* k, std::size_t dim) noexcept {
  float sums[lanes] = {};
  std::size_t i = 0;
  for (; i + lanes <= dim; i += lanes)
    for (std::size_t lane = 0; lane < lanes; ++lane)
      sums[lane] += q[i + lane] * static_cast<float>(to_float(k[i + lane]));
  for (std::size_t lane = 0; lane < lanes && i < dim; ++i, ++lane)
    sums[lane] += q[i] * static_cast<float>(to_float(k[i]));
  for (std::size_t width = lanes / 2; width > 0; width /= 2)
    for (std::size_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  return sums[0];
}

// Room for a query row, zeros behind it: whole steps of four_products() for every vector width.
inline constexpr std::size_t padded(std::size_t dim) noexcept { return (dim + 31) / 32 * 32; }

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

// out += factor * values. In blocks of constant size, which compilers vectorise at -O2 as well.
template <class Score, class T>
inline void add_to(Score* out, const T* values, std::size_t count, Score factor = 1) noexcept {
  std::size_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    Score sums[lanes];
    for (std::size_t lane = 0; lane < lanes; ++lane)
      sums[lane] = out[i + lane] + factor * static_cast<Score>(to_float(values[i + lane]));
    std::memcpy(out + i, sums, sizeof(sums));
  }
  for (; i < count; ++i) out[i] += factor * static_cast<Score>(to_float(values[i]));
}

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
  return evidence.heads * (evidence.keys + detail::padded(evidence.dim));  // logits, query
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
          detail::add_to(out, p, span.count);
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
  // Positive values and their bits grow alike; of negative ones only NaN lies above -infinity. So one
  // unsigned comparison finds NaN of either sign and +infinity.
  const auto unusable = [](float logit) {
    const std::uint32_t bits = bits_of(logit), positive = 1 - (bits >> 31);
    return (bits & ~FloatBits<float>::sign) + positive > FloatBits<float>::infinity ? 1u : 0u;
  };
  float highest[lanes];
  std::uint32_t bad[lanes] = {};
  for (std::size_t lane = 0; lane < lanes; ++lane) highest[lane] = logits[0];
  std::size_t i = 0;
  for (; i + lanes <= keys; i += lanes)
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      const float logit = logits[i + lane];
      bad[lane] |= unusable(logit);
      highest[lane] = logit > highest[lane] ? logit : highest[lane];
    }
  for (std::size_t lane = 0; lane < lanes && i < keys; ++i, ++lane) {
    bad[lane] |= unusable(logits[i]);
    highest[lane] = logits[i] > highest[lane] ? logits[i] : highest[lane];
  }
  float most = highest[0];
  std::uint32_t any_bad = 0;
  for (std::size_t lane = 0; lane < lanes; ++lane) {
    most = highest[lane] > most ? highest[lane] : most;
    any_bad |= bad[lane];
  }
  if (any_bad != 0 || is_infinite(most)) return nan_value<float>();

  float sums[lanes] = {};
  for (i = 0; i + lanes <= keys; i += lanes)
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      const float e = exp_of_negative(logits[i + lane] - most);
      logits[i + lane] = e;
      sums[lane] += e;
    }
  for (std::size_t lane = 0; lane < lanes && i < keys; ++i, ++lane) {
    logits[i] = exp_of_negative(logits[i] - most);
    sums[lane] += logits[i];
  }
  float sum = 0;
  for (std::size_t lane = 0; lane < lanes; ++lane) sum += sums[lane];
  return 1.0f / sum;
}

// The first element of a query or key vector.
template <class Q, class K>
inline const Q* query_at(const QueryKey<Q, K>& evidence, std::size_t head, std::size_t row) noexcept {
  return evidence.query + static_cast<std::ptrdiff_t>(head) * evidence.query_head_stride +
         static_cast<std::ptrdiff_t>(row) * evidence.query_row_stride;
}
template <class Q, class K>
inline const K* key_at(const QueryKey<Q, K>& evidence, std::size_t kv_head, std::size_t key) noexcept {
  return evidence.key + static_cast<std::ptrdiff_t>(kv_head) * evidence.key_head_stride +
         static_cast<std::ptrdiff_t>(key) * evidence.key_token_stride;
}

#if defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define FASTV_VECTORS 1

// ---- q.k at the speed of memory -----------------------------------------------------------------
// Vectors as wide as the machine's, by the vector types of GCC and clang, which need no header and, unlike
// loops, become the same code at -O2 and -O3 and with both compilers.
#if defined(__AVX512F__)
inline constexpr std::size_t width = 16;
#elif defined(__AVX2__)
inline constexpr std::size_t width = 8;
#else
inline constexpr std::size_t width = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * width)));
typedef std::uint32_t Words __attribute__((vector_size(4 * width)));
typedef std::int32_t Integers __attribute__((vector_size(4 * width)));

template <class Vector, class T>
inline Vector load(const T* from) noexcept {
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}
inline float sum_of(Floats v) noexcept {
  typedef float Quad __attribute__((vector_size(16)));
  float all[width];
  std::memcpy(all, &v, sizeof(v));
  Quad quad = load<Quad>(all);
  if constexpr (width >= 8) quad += load<Quad>(all + 4);
  if constexpr (width == 16) quad += load<Quad>(all + 8) + load<Quad>(all + 12);
  return (quad[0] + quad[1]) + (quad[2] + quad[3]);
}

// How 2 * width elements of a key become two vectors of floats. Two 16-bit elements share a word: the
// even ones are its low halves, the odd ones its high halves, so nothing needs to be shuffled if the
// query is laid out to match (arrange). `special` collects bits that tell whether a value could not be
// widened this way.
struct Pair {
  Floats first, second;
};
template <class K>
struct Widened {
  static constexpr bool exists = false;
};
template <>
struct Widened<float> {
  static constexpr bool exists = true, interleaved = false;
  static constexpr float query_scale = 1.0f, logit_scale = 1.0f;
  static Pair pair(const float* k, Words&) noexcept { return {load<Floats>(k), load<Floats>(k + width)}; }
};
template <>
struct Widened<bfloat16> {
  static constexpr bool exists = true, interleaved = true;
  static constexpr float query_scale = 1.0f, logit_scale = 1.0f;
  static Pair pair(const bfloat16* k, Words&) noexcept {
    const Words words = load<Words>(k);
    return {bit_cast<Floats>(words << 16), bit_cast<Floats>(words & 0xffff0000u)};
  }
};
template <>
struct Widened<half> {
  // The bits, moved to where a float has them, are the value times 2^-112, exactly, denormals included;
  // query and logit take the factor back in two exact steps that keep clear of overflow.
  static constexpr bool exists = true, interleaved = true;
  static constexpr float query_scale = 18446744073709551616.0f, logit_scale = 281474976710656.0f;  // 2^64, 2^48
  static Pair pair(const half* k, Words& special) noexcept {
    const Words words = load<Words>(k);
    special |= (words & 0x7fff7fffu) + 0x04000400u;  // carries into a sign bit: infinity or NaN
    return {in_place(words << 16), in_place(words)};
  }

 private:
  static Floats in_place(Words upper) noexcept {  // sign and exponent in the upper half of each word
    return bit_cast<Floats>(bit_cast<Words>(bit_cast<Integers>(upper) >> 3) & 0x8fffe000u);
  }
};

// One query row in the order of Widened<K>::pair(), scaled, with zeros behind it.
template <class K, class Q>
void arrange(const Q* q, std::size_t dim, float scale, float* query) noexcept {
  // From the last step on, not from dim on: interleaved, that step has gaps before dim as well.
  for (std::size_t i = dim / (2 * width) * (2 * width); i < padded(dim); ++i) query[i] = 0;
  for (std::size_t i = 0; i < dim; ++i) {
    const std::size_t step = i / (2 * width) * (2 * width), place = i - step;
    const std::size_t to = Widened<K>::interleaved ? place / 2 + place % 2 * width : place;
    query[step + to] = static_cast<float>(to_float(q[i])) * scale * Widened<K>::query_scale;
  }
}

// products[n] = q.k_n for up to four keys, `stride` elements apart; past the last, its product again.
// q from arrange(). Returns what Widened<K>::pair() marked as special.
template <class K>
inline Words four_products(const float* q, const K* k, std::ptrdiff_t stride, std::size_t keys, std::size_t dim,
                           float* products) noexcept {
  const K *a = k, *b = keys > 1 ? a + stride : a, *c = keys > 2 ? b + stride : b, *d = keys > 3 ? c + stride : c;
  K rest[4][2 * width];
  Floats a0{}, a1{}, b0{}, b1{}, c0{}, c1{}, d0{}, d1{};
  Words special{};
  for (std::size_t i = 0; i < dim; i += 2 * width) {
    if (dim - i < 2 * width) {  // the last, shorter step: with zeros behind it
      std::memset(rest, 0, sizeof(rest));
      std::memcpy(rest[0], a, (dim - i) * sizeof(K));
      std::memcpy(rest[1], b, (dim - i) * sizeof(K));
      std::memcpy(rest[2], c, (dim - i) * sizeof(K));
      std::memcpy(rest[3], d, (dim - i) * sizeof(K));
      a = rest[0], b = rest[1], c = rest[2], d = rest[3];
    }
    const Floats q0 = load<Floats>(q + i), q1 = load<Floats>(q + i + width);
    const Pair pa = Widened<K>::pair(a, special);
    a0 += q0 * pa.first;
    a1 += q1 * pa.second;
    const Pair pb = Widened<K>::pair(b, special);
    b0 += q0 * pb.first;
    b1 += q1 * pb.second;
    const Pair pc = Widened<K>::pair(c, special);
    c0 += q0 * pc.first;
    c1 += q1 * pc.second;
    const Pair pd = Widened<K>::pair(d, special);
    d0 += q0 * pd.first;
    d1 += q1 * pd.second;
    a += 2 * width, b += 2 * width, c += 2 * width, d += 2 * width;
  }
  products[0] = sum_of(a0 + a1) * Widened<K>::logit_scale;
  products[1] = sum_of(b0 + b1) * Widened<K>::logit_scale;
  products[2] = sum_of(c0 + c1) * Widened<K>::logit_scale;
  products[3] = sum_of(d0 + d1) * Widened<K>::logit_scale;
  return special;
}

// What product_with_keys() does, or false where a key holds a value that needs the exact way.
//
// Keys are taken eight at a time, all heads of them in a row where tokens are the outer axis: eight
// streams for the hardware to prefetch, and the next eight keys fetched into the second-level cache by
// hand, since computing alone does not ask for memory early enough.
template <class Q, class K>
bool fast_product_with_keys(const QueryKey<Q, K>& evidence, std::size_t row, std::size_t keys, float* logits,
                            float* query) noexcept {
  constexpr std::size_t tile = 8;
  const std::size_t heads = evidence.heads, dim = evidence.dim, group = heads / evidence.kv_heads;
  for (std::size_t head = 0; head < heads; ++head)
    arrange<K>(query_at(evidence, head, row), dim, evidence.scale, query + head * padded(dim));

  const std::size_t stride = static_cast<std::size_t>(evidence.key_token_stride) * sizeof(K);
  const std::size_t ahead = stride >= 2048 || stride == 0 ? tile : 16384 / stride;
  Words special{};
  const auto four_keys = [&](std::size_t kv_head, std::size_t key) {
    const std::size_t count = keys - key < 4 ? keys - key : 4;
    const K* k = key_at(evidence, kv_head, key);
    for (std::size_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const float* q = query + head * padded(dim);
      float spare[4], *to = logits + head * evidence.keys + key;
      special |= four_products(q, k, evidence.key_token_stride, count, dim, count == 4 ? to : spare);
      for (std::size_t n = 0; count < 4 && n < count; ++n) to[n] = spare[n];
    }
  };
  const auto one_tile = [&](std::size_t kv_head, std::size_t first) {
    for (std::size_t key = first + ahead; key < first + ahead + tile && key < keys; ++key) {
      prefetch(key_at(evidence, kv_head, key), dim * sizeof(K));
    }
    four_keys(kv_head, first);
    if (first + 4 < keys) four_keys(kv_head, first + 4);
  };
  if (evidence.key_head_stride <= evidence.key_token_stride) {
    for (std::size_t key = 0; key < keys; key += tile)
      for (std::size_t kv_head = 0; kv_head < evidence.kv_heads; ++kv_head) one_tile(kv_head, key);
  } else {
    for (std::size_t kv_head = 0; kv_head < evidence.kv_heads; ++kv_head)
      for (std::size_t key = 0; key < keys; key += tile) one_tile(kv_head, key);
  }
  std::uint32_t any = 0;
  for (std::size_t lane = 0; lane < width; ++lane) any |= special[lane];
  return !std::is_same<K, half>::value || (any & 0x80008000u) == 0;
}

#endif

// logits[h, j] = scale * q_h . k_j for the query row `row`, keys 0 .. keys - 1.
// logits: [heads, evidence.keys]; query: [heads, padded(dim)] floats of scratch.
template <class Q, class K>
void product_with_keys(const QueryKey<Q, K>& evidence, std::size_t row, std::size_t keys, float* logits,
                       float* query) noexcept {
#if defined(FASTV_VECTORS)
  if constexpr (Widened<K>::exists) {
    if (fast_product_with_keys(evidence, row, keys, logits, query)) return;
  }
#endif
  const std::size_t heads = evidence.heads, dim = evidence.dim, group = heads / evidence.kv_heads;
  for (std::size_t head = 0; head < heads; ++head) {
    const Q* q = query_at(evidence, head, row);
    for (std::size_t i = 0; i < dim; ++i) query[i] = static_cast<float>(to_float(q[i])) * evidence.scale;
    for (std::size_t key = 0; key < keys; ++key)
      logits[head * evidence.keys + key] = dot(query, key_at(evidence, head / group, key), dim);
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
  const std::size_t first_row = evidence.keys - evidence.rows;
  for (std::size_t i = 0; i < count; ++i) scores[i] = 0;
  const Score share = Score(1) / static_cast<Score>(evidence.heads * rows.size());

  for (std::size_t r = 0; r < rows.size(); ++r) {
    const std::size_t seen = evidence.causal ? rows[r] + 1 : evidence.keys;
    detail::product_with_keys(evidence, rows[r] - first_row, seen, logits, query);
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
        detail::add_to(out, row + span.first, visible, weight);
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

// Slow, plain answers that the library is compared with, and the random numbers of the tests. Nothing
// here calls the code under test but its types.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <ostream>
#include <string>
#include <vector>

#include "fastv/fastv.hpp"

namespace fastv {
// What gtest shows of an Errc and of a Status.
inline void PrintTo(Errc code, std::ostream* out) {
  constexpr const char* names[] = {"ok",          "bad_setting",   "bad_prompt",       "bad_shape",
                                   "bad_stride",  "null_data",     "too_small",        "bad_index",
                                   "bad_pages",   "bad_value",     "missing_evidence", "not_supported",
                                   "over_budget", "out_of_memory", "device_error"};
  const auto number = static_cast<std::size_t>(code);
  *out << "Errc::" << (number < sizeof(names) / sizeof(names[0]) ? names[number] : "?");
}
inline void PrintTo(const Status& status, std::ostream* out) {
  PrintTo(status.code, out);
  *out << " (" << status.message().c_str() << ')';
}
}  // namespace fastv

namespace oracle {

using fastv::Index;
using fastv::TokenSpan;

// SplitMix64: the standard's distributions differ between platforms.
class Rng {
 public:
  explicit Rng(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  std::size_t below(std::size_t bound) { return static_cast<std::size_t>(next() % bound); }
  std::size_t between(std::size_t low, std::size_t high) { return low + below(high - low + 1); }  // both included
  double real(double low = 0, double high = 1) {
    return low + (high - low) * static_cast<double>(next() >> 11) * 0x1p-53;
  }
  bool chance(double p) { return real() < p; }

 private:
  std::uint64_t state_;
};

// ---- element types ------------------------------------------------------------------------------

inline float float_of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline double double_of_bits(std::uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline std::uint32_t bits_of_float(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline std::uint64_t bits_of_double(double value) {
  std::uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
// By integers, so that -ffast-math can neither argue NaN away nor flush denormals.
inline bool is_nan(float value) { return (bits_of_float(value) & 0x7fffffffu) > 0x7f800000u; }
inline bool is_nan(double value) { return (bits_of_double(value) & 0x7fffffffffffffffu) > 0x7ff0000000000000u; }
// A signed integer in the order of the values (-0 and +0 are both 0).
inline std::int64_t rank_of(float value) {
  const auto magnitude = static_cast<std::int64_t>(bits_of_float(value) & 0x7fffffffu);
  return (bits_of_float(value) >> 31) != 0 ? -magnitude : magnitude;
}
inline std::int64_t rank_of(double value) {
  const auto magnitude = static_cast<std::int64_t>(bits_of_double(value) & 0x7fffffffffffffffu);
  return (bits_of_double(value) >> 63) != 0 ? -magnitude : magnitude;
}
inline float nan_float() { return float_of_bits(0x7fc00000u); }
inline float infinity() { return float_of_bits(0x7f800000u); }

// The definition of IEEE 754 binary16, read out of the standard.
inline double value_of(fastv::half h) {
  const int exponent = (h.bits >> 10) & 31, mantissa = h.bits & 1023;
  if (exponent == 31 && mantissa != 0) return static_cast<double>(nan_float());
  if (exponent == 31) return (h.bits & 0x8000) != 0 ? -HUGE_VAL : HUGE_VAL;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return (h.bits & 0x8000) != 0 ? -magnitude : magnitude;
}
inline double value_of(fastv::bfloat16 b) {
  return static_cast<double>(float_of_bits(static_cast<std::uint32_t>(b.bits) << 16));
}
inline double value_of(float f) { return static_cast<double>(f); }
inline double value_of(double d) { return d; }

// A value of type T near x; how it is rounded does not matter, for the oracles read it back.
template <class T>
T make(double x) {
  return static_cast<T>(x);
}
template <>
inline fastv::bfloat16 make(double x) {
  return {static_cast<std::uint16_t>(bits_of_float(static_cast<float>(x)) >> 16)};
}
template <>
inline fastv::half make(double x) {
  int exponent = 0;
  const int mantissa = static_cast<int>(std::frexp(std::fabs(x), &exponent) * 2048);  // 1024 .. 2047
  const int biased = exponent + 14;
  const int bits = biased <= 0 || mantissa == 0 ? 0 : (biased << 10) | (mantissa & 1023);
  return {static_cast<std::uint16_t>(bits | (x < 0 ? 0x8000 : 0))};
}

// ---- attention ----------------------------------------------------------------------------------

// Dense tensors in double, as plain as possible.
struct Attention {
  std::size_t heads = 1, kv_heads = 1, rows = 1, keys = 1, dim = 1;
  std::vector<double> query;  // [heads, rows, dim]
  std::vector<double> key;    // [kv_heads, keys, dim]
  double scale = 1, soft_cap = 0;
  std::vector<double> bias;  // [keys] or empty
  bool causal = true;
};

// softmax(q k^T) of every head and row: [heads, rows, keys], 0 where the row cannot see the key.
inline std::vector<double> probabilities(const Attention& a) {
  std::vector<double> out(a.heads * a.rows * a.keys, 0.0);
  for (std::size_t h = 0; h < a.heads; ++h) {
    const std::size_t kv_head = h / (a.heads / a.kv_heads);
    for (std::size_t r = 0; r < a.rows; ++r) {
      const std::size_t position = a.keys - a.rows + r;
      std::vector<double> e(a.keys, 0.0);
      double sum = 0;
      for (std::size_t j = 0; j < a.keys; ++j) {
        if (a.causal && j > position) continue;
        double logit = 0;
        for (std::size_t d = 0; d < a.dim; ++d)
          logit += a.query[(h * a.rows + r) * a.dim + d] * a.key[(kv_head * a.keys + j) * a.dim + d];
        logit *= a.scale;
        if (a.soft_cap > 0) logit = a.soft_cap * std::tanh(logit / a.soft_cap);
        if (!a.bias.empty()) logit += a.bias[j];
        e[j] = std::exp(logit);
        sum += e[j];
      }
      for (std::size_t j = 0; j < a.keys; ++j) out[(h * a.rows + r) * a.keys + j] = e[j] / sum;
    }
  }
  return out;
}

// Mean over all heads and the given prompt positions of p [heads, rows, keys], at the visual tokens.
inline std::vector<double> mean_scores(const std::vector<double>& p, std::size_t heads, std::size_t rows,
                                       std::size_t keys, const std::vector<Index>& positions,
                                       const std::vector<TokenSpan>& visual) {
  std::vector<double> scores;
  for (const TokenSpan& span : visual)
    for (std::size_t token = span.first; token < span.first + span.count; ++token) {
      double sum = 0;
      for (std::size_t h = 0; h < heads; ++h)
        for (const Index position : positions) {
          const std::size_t r = position - (keys - rows);
          sum += p[(h * rows + r) * keys + token];
        }
      scores.push_back(sum / static_cast<double>(heads * positions.size()));
    }
  return scores;
}

// ---- selection ----------------------------------------------------------------------------------

// Numbers of the `count` best: NaN below everything, higher first, of equals the earlier. Ascending.
template <class Score>
std::vector<Index> top(const std::vector<Score>& scores, std::size_t count) {
  std::vector<Index> order(scores.size());
  std::iota(order.begin(), order.end(), Index{0});
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) {
    const bool a_nan = is_nan(scores[a]), b_nan = is_nan(scores[b]);
    if (a_nan || b_nan) return !a_nan && b_nan;
    return rank_of(scores[a]) > rank_of(scores[b]);
  });
  order.resize(count);
  std::sort(order.begin(), order.end());
  return order;
}

// Every position outside the spans, and of the visual tokens (numbered through all spans) those chosen.
inline std::vector<Index> whole_prompt(std::size_t tokens, const std::vector<TokenSpan>& visual,
                                       const std::vector<Index>& chosen) {
  std::vector<Index> number_of(tokens, Index(-1));  // of a visual token
  Index number = 0;
  for (const TokenSpan& span : visual)
    for (std::size_t i = 0; i < span.count; ++i) number_of[span.first + i] = number++;
  std::vector<Index> kept;
  for (std::size_t position = 0; position < tokens; ++position) {
    const bool text = number_of[position] == Index(-1);
    if (text || std::count(chosen.begin(), chosen.end(), number_of[position]) > 0)
      kept.push_back(static_cast<Index>(position));
  }
  return kept;
}

// round(tokens * (1 - ratio)), half to even, read off the decimal digits of the product, which printf
// writes out exactly (a double near 1/2 has at most 54 of them).
inline std::size_t kept_of(std::size_t tokens, double ratio) {
  volatile const double share = 1 - ratio;
  volatile const double product = static_cast<double>(tokens) * share;
  char text[512];
  std::snprintf(text, sizeof(text), "%.120f", product);
  const std::string all(text), whole = all.substr(0, all.find('.')), rest = all.substr(all.find('.') + 1);
  const std::string half = "5" + std::string(rest.size() - 1, '0');
  const std::size_t floor = std::stoul(whole);
  return floor + ((rest > half || (rest == half && floor % 2 == 1)) ? 1u : 0u);
}

// Largest remainders: shares of `count` in proportion to the lengths, the earlier first among equals.
inline std::vector<std::size_t> quotas(const std::vector<std::size_t>& lengths, std::size_t count) {
  const std::size_t total = std::accumulate(lengths.begin(), lengths.end(), std::size_t{0});
  std::vector<std::size_t> share, order(lengths.size());
  for (const std::size_t length : lengths) share.push_back(count * length / total);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return count * lengths[a] % total > count * lengths[b] % total;
  });
  const std::size_t left = count - std::accumulate(share.begin(), share.end(), std::size_t{0});
  for (std::size_t i = 0; i < left; ++i) ++share[order[i]];
  return share;
}

// ceil(tokens * (1 - ratio)) in whole numbers, for ratios of whole thousandths.
inline std::size_t kept_up(std::size_t tokens, double ratio) {
  const auto thousandths = static_cast<std::size_t>(1000 - ratio * 1000 + 0.5);
  return (tokens * thousandths + 999) / 1000;
}

// One image: its spans put together.
struct Image {
  std::vector<std::size_t> positions;  // of its tokens, in the prompt
  std::size_t original = 0;            // tokens before any stage
  std::size_t columns = 0;
  double ratio = -1;  // of its own, or -1

  std::size_t tokens() const { return positions.size(); }
};
inline std::vector<Image> images_of(const std::vector<TokenSpan>& visual) {
  std::vector<Image> images;
  for (const TokenSpan& span : visual) {
    if (!span.continues) {
      images.emplace_back();
      images.back().columns = span.columns;
      images.back().ratio = span.filtering_ratio;
    }
    Image& image = images.back();
    for (std::size_t i = 0; i < span.count; ++i) image.positions.push_back(span.first + i);
    image.original += span.original == 0 ? span.count : span.original;
  }
  return images;
}

// What a prompt keeps, image by image; pooled: of all images together.
struct Counts {
  std::vector<std::size_t> least;  // of each image
  std::vector<std::size_t> quota;  // of each image, Quota::per_image
  std::size_t all = 0;             // of the prompt
};
inline std::size_t share_of(const fastv::Config& config, std::size_t tokens, std::size_t original, double ratio) {
  const std::size_t base = config.ratio_of == fastv::RatioOf::original ? original : tokens;
  return std::min(tokens, config.rounding == fastv::Rounding::up ? kept_up(base, ratio) : oracle::kept_of(base, ratio));
}
inline Counts counts_of(const fastv::Config& config, const std::vector<TokenSpan>& visual) {
  Counts counts;
  const std::vector<Image> images = images_of(visual);
  std::size_t tokens = 0, original = 0, least = 0, shares = 0;
  for (const Image& image : images) {
    counts.least.push_back(std::min(config.min_per_image, image.tokens()));
    const double ratio = image.ratio < 0 ? config.filtering_ratio : image.ratio;
    counts.quota.push_back(std::max(counts.least.back(), share_of(config, image.tokens(), image.original, ratio)));
    tokens += image.tokens();
    original += image.original;
    least += counts.least.back();
    shares += counts.quota.back();
  }
  if (tokens == 0) return counts;
  const bool by_count = config.keep_count != fastv::by_ratio;
  if (by_count)
    counts.all = config.keep_count;
  else if (config.quota == fastv::Quota::pooled)
    counts.all = std::max(least, share_of(config, tokens, original, config.filtering_ratio));
  else
    counts.all = shares;
  if (least > counts.all) counts.least.assign(images.size(), 0);  // too few for every minimum: shared out without any
  if (!by_count) return counts;
  // In proportion to what the images have above their minima.
  std::vector<std::size_t> rest;
  std::size_t left = counts.all;
  for (std::size_t i = 0; i < images.size(); ++i) {
    rest.push_back(images[i].tokens() - counts.least[i]);
    left -= counts.least[i];
  }
  counts.quota = counts.least;
  if (left == 0) return counts;
  const std::vector<std::size_t> more = quotas(rest, left);
  for (std::size_t i = 0; i < images.size(); ++i) counts.quota[i] += more[i];
  return counts;
}

// A prompt with up to `most_spans` spans of visual tokens; at least one text token at its end.
struct Layout {
  std::size_t tokens = 0;
  std::vector<TokenSpan> visual;
  std::size_t visual_tokens() const {
    std::size_t sum = 0;
    for (const TokenSpan& span : visual) sum += span.count;
    return sum;
  }
};
inline Layout random_layout(Rng& rng, std::size_t most_spans, std::size_t most_in_span) {
  Layout layout;
  const std::size_t spans = rng.between(0, most_spans);
  for (std::size_t i = 0; i < spans; ++i) {
    layout.tokens += rng.chance(0.3) ? 0 : rng.between(1, 6);  // spans may touch
    const std::size_t count = rng.between(1, most_in_span);
    layout.visual.push_back({layout.tokens, count});
    layout.tokens += count;
  }
  layout.tokens += rng.between(1, 6);
  return layout;
}

}  // namespace oracle

// Attention with everything that QueryKey can say, dense and in double; and its tensors as engines keep them. Nothing
// here calls the code under test but its makers of views.
#pragma once

#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "fastv/fastv.hpp"
#include "oracle.hpp"

namespace oracle {

using fastv::Heads;
using fastv::Span;

// ---- more element types -------------------------------------------------------------------------

// Read out of the OCP's table of formats: E4M3 has no infinity, E5M2 is half precision's upper half.
inline double value_of(fastv::fp8_e4m3 f) {
  const int exponent = (f.bits >> 3) & 15, mantissa = f.bits & 7;
  if (exponent == 15 && mantissa == 7) return static_cast<double>(nan_float());
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return (f.bits & 0x80) != 0 ? -magnitude : magnitude;
}
inline double value_of(fastv::fp8_e5m2 f) {
  const int exponent = (f.bits >> 2) & 31, mantissa = f.bits & 3;
  if (exponent == 31 && mantissa != 0) return static_cast<double>(nan_float());
  const double magnitude = exponent == 31  ? HUGE_VAL
                           : exponent == 0 ? std::ldexp(mantissa, -16)
                                           : std::ldexp(4 + mantissa, exponent - 17);
  return (f.bits & 0x80) != 0 ? -magnitude : magnitude;
}
inline double value_of(std::int8_t i) { return static_cast<double>(i); }

// The finite value of an 8-bit type that is nearest to x.
template <class T>
T nearest(double x) {
  static const std::vector<std::pair<double, std::uint8_t>> sorted = [] {
    std::vector<std::pair<double, std::uint8_t>> all;
    for (int bits = 0; bits < 256; ++bits) {
      const double value = value_of(T{static_cast<std::uint8_t>(bits)});
      if (std::isfinite(value)) all.emplace_back(value, static_cast<std::uint8_t>(bits));
    }
    std::sort(all.begin(), all.end());
    return all;
  }();
  auto above = std::lower_bound(sorted.begin(), sorted.end(), std::pair<double, std::uint8_t>(x, 0));
  if (above == sorted.end() || (above != sorted.begin() && x - (above - 1)->first < above->first - x)) --above;
  return {above->second};
}
template <>
inline fastv::fp8_e4m3 make(double x) {
  return nearest<fastv::fp8_e4m3>(x);
}
template <>
inline fastv::fp8_e5m2 make(double x) {
  return nearest<fastv::fp8_e5m2>(x);
}

// ---- attention ----------------------------------------------------------------------------------

// The fields of QueryKey, dense. bias: -HUGE_VAL hides a key.
struct Layer {
  std::size_t heads = 1, kv_heads = 1, queries = 1, keys = 1, dim = 1;
  std::vector<double> query;  // [heads, queries, dim]
  std::vector<double> key;    // [kv heads, keys, dim]
  double scale = 1, soft_cap = 0;
  std::vector<double> bias;        // [keys] or empty
  std::vector<double> sinks;       // [heads] or empty
  std::vector<double> alibi;       // [heads] or empty
  std::vector<double> key_scales;  // [kv heads, keys] or empty
  bool causal = true;
  std::vector<Index> visible;  // [queries] or empty
  std::size_t window = 0, past = 0, first_key = 0, heads_total = 0;
  std::vector<double> value_norms;  // [kv heads, visual tokens] or empty

  std::size_t prompt() const { return first_key + keys - past; }
  Index last_row() const { return static_cast<Index>(prompt() - 1); }
  Index first_row() const { return static_cast<Index>(prompt() - queries); }
};

// A layer of random queries and keys; scale is exactly a float, as the view will hold it.
inline Layer random_layer(Rng& rng, std::size_t heads, std::size_t kv_heads, std::size_t queries, std::size_t keys,
                          std::size_t dim, double reach = 2) {
  Layer a;
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.queries = queries;
  a.keys = keys;
  a.dim = dim;
  for (std::size_t i = 0; i < heads * queries * dim; ++i) a.query.push_back(rng.real(-reach, reach));
  for (std::size_t i = 0; i < kv_heads * keys * dim; ++i) a.key.push_back(rng.real(-reach, reach));
  a.scale = static_cast<double>(static_cast<float>(1 / std::sqrt(static_cast<double>(dim))));
  return a;
}

// Does query row r see key j at hand? Positions are those of the sequence, earlier turns included.
inline bool sees(const Layer& a, std::size_t r, std::size_t j) {
  const std::size_t row = a.past + a.prompt() - a.queries + r, token = a.first_key + j;
  if (a.window != 0 && token + a.window <= row) return false;
  if (!a.visible.empty()) return token < a.visible[r];
  return !a.causal || token <= row;
}

inline double logit_of(const Layer& a, std::size_t h, std::size_t r, std::size_t j) {
  const std::size_t kv_head = h / (a.heads / a.kv_heads);
  if (!a.bias.empty() && a.bias[j] == -HUGE_VAL) return -HUGE_VAL;
  double logit = 0;
  for (std::size_t d = 0; d < a.dim; ++d)
    logit += a.query[(h * a.queries + r) * a.dim + d] * a.key[(kv_head * a.keys + j) * a.dim + d];
  logit *= a.scale;
  if (!a.key_scales.empty()) logit *= a.key_scales[kv_head * a.keys + j];
  if (a.soft_cap > 0) logit = a.soft_cap * std::tanh(logit / a.soft_cap);
  const double row = static_cast<double>(a.past + a.prompt() - a.queries + r);
  if (!a.alibi.empty()) logit -= a.alibi[h] * (row - static_cast<double>(a.first_key + j));
  return a.bias.empty() ? logit : logit + a.bias[j];
}

// ln(exp(x) + exp(y)), also where both are far below what a double holds.
inline double log_add(double x, double y) {
  const double more = std::max(x, y), less = std::min(x, y);
  return less == -HUGE_VAL ? more : more + std::log1p(std::exp(less - more));
}

// ln p of one row, [keys]; -HUGE_VAL where it does not see a key.
inline std::vector<double> log_row(const Layer& a, std::size_t h, std::size_t r) {
  std::vector<double> row(a.keys, -HUGE_VAL);
  double sum = a.sinks.empty() ? -HUGE_VAL : a.sinks[h];
  for (std::size_t j = 0; j < a.keys; ++j)
    if (sees(a, r, j)) {
      row[j] = logit_of(a, h, r, j);
      sum = log_add(sum, row[j]);
    }
  for (double& x : row)
    if (x != -HUGE_VAL) x -= sum;
  return row;
}

// ln of the scores by these prompt positions, in the order of the visual tokens; -HUGE_VAL where a score is 0.
inline std::vector<double> log_scores(const Layer& a, const std::vector<Index>& positions,
                                      const std::vector<TokenSpan>& visual) {
  std::vector<std::size_t> tokens;  // of the sequence
  for (const TokenSpan& span : visual)
    for (std::size_t i = 0; i < span.count; ++i) tokens.push_back(a.past + span.first + i);
  std::vector<double> sums(tokens.size(), -HUGE_VAL);
  const std::size_t heads = a.heads_total == 0 ? a.heads : a.heads_total;
  const double averaged = static_cast<double>(heads) * static_cast<double>(positions.size());
  for (std::size_t h = 0; h < a.heads; ++h)
    for (const Index position : positions) {
      const std::vector<double> row = log_row(a, h, position - a.first_row());
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        if (tokens[i] < a.first_key || row[tokens[i] - a.first_key] == -HUGE_VAL) continue;
        double x = row[tokens[i] - a.first_key] - std::log(averaged);
        if (!a.value_norms.empty()) x += std::log(a.value_norms[h / (a.heads / a.kv_heads) * tokens.size() + i]);
        sums[i] = log_add(sums[i], x);
      }
    }
  return sums;
}
inline std::vector<double> scores_by(const Layer& a, const std::vector<Index>& positions,
                                     const std::vector<TokenSpan>& visual) {
  std::vector<double> scores = log_scores(a, positions, visual);
  for (double& x : scores) x = std::exp(x);
  return scores;
}
inline std::vector<Index> all_rows(std::size_t tokens) {
  std::vector<Index> rows(tokens);
  std::iota(rows.begin(), rows.end(), Index{0});
  return rows;
}

// ---- vectors as engines keep them ---------------------------------------------------------------

enum class Place {
  token_major,
  packed_rows,  // token-major, with queries and values between the keys of two tokens
  head_major,
  roomy_heads,  // head-major, with room for more tokens
  token_pages,
  head_pages,
  chunked_pages,  // vLLM's keys
  token_blocks,   // pages by pointers
  head_blocks,
  chunked_blocks
};
constexpr Place places[] = {Place::token_major, Place::packed_rows,   Place::head_major,    Place::roomy_heads,
                            Place::token_pages, Place::head_pages,    Place::chunked_pages, Place::token_blocks,
                            Place::head_blocks, Place::chunked_blocks};
inline bool in_chunks(Place place) { return place == Place::chunked_pages || place == Place::chunked_blocks; }

// [heads, tokens, dim] in one of these places, in shuffled blocks where there are any. `values` is changed to what the
// type holds. Memory is as long as it must be and not an element longer; whatever is no element of the tensor has all
// bits set, which is NaN in every floating type.
template <class T>
class Stored {
 public:
  Stored(Rng& rng, Place place, std::size_t heads, std::size_t tokens, std::size_t dim, std::vector<double>& values,
         std::size_t block_tokens = 16, std::size_t chunk = 0)
      : chunk_(chunk == 0 ? dim : chunk), view_{nullptr, heads, tokens, dim, 0, 0} {
    using fastv::ChunkedHeadMajor;
    using fastv::HeadMajor;
    using fastv::TokenMajor;
    const TokenMajor token_block{block_tokens, heads, dim};
    const HeadMajor head_block{heads, block_tokens, dim};
    const ChunkedHeadMajor chunk_block{heads, dim / chunk_, block_tokens, chunk_};
    const std::size_t entries = heads * dim, blocks = (tokens + block_tokens - 1) / block_tokens;
    switch (place) {
      case Place::token_major: view_ = fastv::heads(one(tokens * entries), TokenMajor{tokens, heads, dim}); break;
      case Place::packed_rows: {
        const std::size_t stride = 3 * entries + 5;
        const T* data = one((tokens - 1) * stride + entries);
        view_ = fastv::heads(data, TokenMajor{tokens, heads, dim, static_cast<std::ptrdiff_t>(stride)});
        break;
      }
      case Place::head_major: view_ = fastv::heads(one(tokens * entries), HeadMajor{heads, tokens, dim}); break;
      case Place::roomy_heads: {
        const std::size_t room = tokens + 5;
        view_ = fastv::heads(one(((heads - 1) * room + tokens) * dim), HeadMajor{heads, tokens, dim, room});
        break;
      }
      case Place::token_pages: paged(rng, token_block, blocks, tokens); break;
      case Place::head_pages: paged(rng, head_block, blocks, tokens); break;
      case Place::chunked_pages: paged(rng, chunk_block, blocks, tokens); break;
      case Place::token_blocks: view_ = fastv::heads(apart(blocks, block_tokens * entries), token_block, tokens); break;
      case Place::head_blocks: view_ = fastv::heads(apart(blocks, block_tokens * entries), head_block, tokens); break;
      case Place::chunked_blocks:
        view_ = fastv::heads(apart(blocks, block_tokens * entries), chunk_block, tokens);
        break;
    }
    for (std::size_t h = 0; h < heads; ++h)
      for (std::size_t t = 0; t < tokens; ++t)
        for (std::size_t d = 0; d < dim; ++d) {
          double& value = values[(h * tokens + t) * dim + d];
          at(place, block_tokens, h, t, d) = make<T>(value);
          value = value_of(at(place, block_tokens, h, t, d));
        }
    place_ = place;
    block_tokens_ = block_tokens;
  }
  Stored(const Stored&) = delete;

  const Heads<T>& view() const { return view_; }
  T& at(std::size_t head, std::size_t token, std::size_t d) { return at(place_, block_tokens_, head, token, d); }
  T* data() { return memory_.front().get(); }

 private:
  T* one(std::size_t size) {
    memory_.emplace_back(new T[size]);
    std::memset(static_cast<void*>(memory_.back().get()), 0xff, size * sizeof(T));
    return memory_.back().get();
  }
  template <class Shape>
  void paged(Rng& rng, const Shape& shape, std::size_t blocks, std::size_t tokens) {
    std::vector<Index> order(blocks + 3);
    std::iota(order.begin(), order.end(), Index{0});
    for (std::size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[rng.below(i + 1)]);
    table_.assign(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(blocks));
    block_ = shape.tokens * view_.heads * view_.dim;
    view_ = fastv::heads(one(order.size() * block_), shape, Span<const Index>(table_), tokens);
  }
  Span<const T* const> apart(std::size_t blocks, std::size_t block) {
    for (std::size_t b = 0; b < blocks; ++b) pointers_.push_back(one(block));
    return {pointers_.data(), pointers_.size()};
  }
  // The offsets written out once more, not by the view's strides.
  T& at(Place place, std::size_t size, std::size_t h, std::size_t t, std::size_t d) {
    const std::size_t heads = view_.heads, tokens = view_.tokens, dim = view_.dim;
    const bool paged = !table_.empty() || !pointers_.empty();
    const std::size_t row = paged ? t % size : t, many = paged ? size : tokens;
    T* base = memory_.front().get();
    if (!table_.empty()) base += table_[t / size] * block_;
    if (!pointers_.empty()) base = memory_[t / size].get();
    switch (place) {
      case Place::token_major:
      case Place::token_pages:
      case Place::token_blocks: return base[(row * heads + h) * dim + d];
      case Place::packed_rows: return base[row * (3 * heads * dim + 5) + h * dim + d];
      case Place::head_major:
      case Place::head_pages:
      case Place::head_blocks: return base[(h * many + row) * dim + d];
      case Place::roomy_heads: return base[(h * (tokens + 5) + row) * dim + d];
      case Place::chunked_pages:
      case Place::chunked_blocks: break;
    }
    return base[((h * (dim / chunk_) + d / chunk_) * many + row) * chunk_ + d % chunk_];
  }

  std::vector<std::unique_ptr<T[]>> memory_;
  std::vector<Index> table_;
  std::vector<const T*> pointers_;
  std::size_t chunk_, block_ = 0, block_tokens_ = 0;
  Place place_ = Place::token_major;
  Heads<T> view_;
};

// The small parts of a layer as the floats that a view takes, and `a` changed to what they hold.
class Parts {
 public:
  explicit Parts(Layer& a)
      : bias_(floats(a.bias)),
        sinks_(floats(a.sinks)),
        alibi_(floats(a.alibi)),
        norms_(floats(a.value_norms)),
        scales_(floats(a.key_scales)) {
    a.scale = static_cast<double>(static_cast<float>(a.scale));
    a.soft_cap = static_cast<double>(static_cast<float>(a.soft_cap));
  }
  template <class Q, class Keys>
  fastv::QueryKey<Q, Keys> of(const Layer& a, fastv::QueryKey<Q, Keys> view) const {
    view.soft_cap = static_cast<float>(a.soft_cap);
    view.bias = bias_;
    view.sinks = sinks_;
    view.alibi = alibi_;
    view.value_norms = norms_;
    if (!scales_.empty()) view.key_scales = fastv::heads(scales_.data(), fastv::HeadMajor{a.kv_heads, a.keys, 1});
    view.causal = a.causal;
    view.visible = a.visible;
    view.window = a.window;
    view.past = a.past;
    view.first_key = a.first_key;
    view.heads_total = a.heads_total;
    return view;
  }

 private:
  static std::vector<float> floats(std::vector<double>& values) {
    std::vector<float> out(values.begin(), values.end());
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(out[i]);
    return out;
  }
  std::vector<float> bias_, sinks_, alibi_, norms_, scales_;
};

// A layer's tensors: queries of Q, keys of K, and the view of both. `a` is changed to what they hold.
template <class Q, class K = Q>
struct Tensors {
  Stored<Q> query;
  Stored<K> key;
  Parts parts;
  fastv::QueryKey<Q, Heads<K>> view;

  Tensors(Rng& rng, Layer& a, Place place = Place::token_major, std::size_t block_tokens = 16, std::size_t chunk = 0,
          Place query_place = Place::token_major)
      : query(rng, query_place, a.heads, a.queries, a.dim, a.query, block_tokens),
        key(rng, place, a.kv_heads, a.keys, a.dim, a.key, block_tokens, chunk),
        parts(a),
        view(parts.of(a, fastv::query_key(query.view(), key.view(), static_cast<float>(a.scale)))) {}
};

}  // namespace oracle

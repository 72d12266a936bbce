// Random batches for the tests of fastv/cuda.cuh, and what the core makes of them.
#pragma once

#include <gtest/gtest.h>

#include "../attention.hpp"
#include "machine.hpp"

namespace batches {

using namespace fastv;
using oracle::Rng;

// A sequence with all that a Request points at.
struct Sequence {
  std::vector<TokenSpan> visual;
  std::size_t tokens = 0;
  std::vector<Config> stages;
  std::vector<Index> listed, prior;
  std::vector<std::size_t> past;
};

// What a sequence whose first packed row is `first` asks for. It holds views of the sequence.
inline cuda::Request request_of(const Sequence& s, std::size_t first) {
  cuda::Request request{Config{}, s.visual, first, s.tokens};
  if (!s.stages.empty()) {
    request.config = s.stages[0];
    request.later = Span<const Config>(s.stages.data() + 1, s.stages.size() - 1);
  }
  request.past = s.past;
  return request;
}

// A prompt of up to `most_spans` spans, some of which continue an image; with_grids: every image has one.
inline void random_prompt(Rng& rng, std::size_t most_spans, std::size_t most_in_span, bool with_grids, Sequence& s) {
  const std::size_t spans = rng.between(1, most_spans);
  for (std::size_t i = 0; i < spans; ++i) {
    s.tokens += rng.chance(0.3) ? 0 : rng.between(1, 6);
    std::size_t count = rng.between(1, most_in_span), columns = 0;
    if (with_grids) {
      columns = rng.between(1, 12);
      count = columns * rng.between(1, most_in_span / columns + 1);
    }
    TokenSpan span{s.tokens, count, columns};
    span.continues = !with_grids && i > 0 && rng.chance(0.3);
    s.visual.push_back(span);
    s.tokens += count;
  }
  s.tokens += rng.between(1, 6);
}

inline Config random_config(Rng& rng, bool with_grids, bool ranks) {
  Config config;
  config.filtering_ratio = rng.chance(0.1) ? (rng.chance(0.5) ? 0 : 1) : rng.real();
  config.rounding = rng.chance(0.5) ? Rounding::up : Rounding::half_even;
  config.ratio_of = rng.chance(0.5) ? RatioOf::original : RatioOf::remaining;
  config.quota = rng.chance(0.4) ? Quota::pooled : Quota::per_image;
  if (rng.chance(0.4)) config.min_per_image = rng.below(20);
  if (rng.chance(0.3)) config.uniform_share = rng.real();
  if (!ranks && rng.chance(0.3)) config.selection = rng.chance(0.5) ? Selection::random : Selection::uniform;
  config.seed = rng.next();
  if (with_grids && rng.chance(0.7)) {
    config.quota = Quota::per_image;
    config.window_rows = rng.between(1, 12);
    config.window_columns = rng.between(1, 12);
  }
  return config;
}

// A stretch of "device" memory, poisoned.
template <class T>
std::vector<T> poisoned(std::size_t size) {
  std::vector<T> memory(size);
  std::memset(static_cast<void*>(memory.data()), 0xA5, size * sizeof(T));
  return memory;
}

inline std::vector<Index> numbers_up_to(std::size_t count) {
  std::vector<Index> all(count);
  std::iota(all.begin(), all.end(), Index{0});
  return all;
}

// A layer's packed queries and keys, of sequences with `past` earlier keys each.
struct Packed {
  static constexpr std::size_t heads = 4, kv_heads = 2, dim = 16;
  std::vector<std::size_t> tokens, past, first, key_row;
  std::size_t rows = 0, keys = 0;
  std::vector<float> query, key;

  Packed(Rng& rng, const std::vector<std::size_t>& lengths, const std::vector<std::size_t>& earlier)
      : tokens(lengths), past(earlier) {
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      first.push_back(rows);
      key_row.push_back(keys);
      rows += tokens[i];
      keys += past[i] + tokens[i];
    }
    query.resize(rows * heads * dim);
    key.resize(keys * kv_heads * dim);
    fill(rng);
  }
  // Other numbers, where they lie.
  void fill(Rng& rng) {
    for (float& x : query) x = static_cast<float>(rng.real(-1, 1));
    for (float& x : key) x = static_cast<float>(rng.real(-1, 1));
  }
  // One sequence, as the core takes it: all its query rows.
  QueryKey<float> of(std::size_t i) const {
    QueryKey<float> view = query_key(
        fastv::heads(query.data() + first[i] * heads * dim, TokenMajor{tokens[i], heads, dim}),
        fastv::heads(key.data() + key_row[i] * kv_heads * dim, TokenMajor{past[i] + tokens[i], kv_heads, dim}), 0.7f);
    view.past = past[i];
    return view;
  }
  cuda::QueryKey<float> all() const {
    return cuda::query_key(cuda::heads(query.data(), TokenMajor{rows, heads, dim}),
                           cuda::heads(key.data(), TokenMajor{keys, kv_heads, dim}), 0.7f);
  }
};

// A list of the device's, less `less` each.
inline std::vector<Index> numbers(const std::int32_t* data, std::size_t count, std::size_t less) {
  std::vector<Index> list;
  for (std::size_t i = 0; i < count; ++i) list.push_back(static_cast<Index>(static_cast<std::size_t>(data[i]) - less));
  return list;
}

// A view of host memory as one of the tests' device, whose memory that is.
template <class T>
cuda::Heads<T> on_device(const Heads<T>& view) {
  cuda::Heads<T> device{view};
  device.layout.pages.block_table = {};
  device.layout.pages.blocks = {};
  if (!view.pages.block_table.empty()) {
    device.block_tables = reinterpret_cast<const std::int32_t*>(view.pages.block_table.data());
    device.pages = view.pages.block_table.size();
  }
  if (!view.pages.blocks.empty()) {
    device.block_pointers = view.pages.blocks.data();
    device.pages = view.pages.blocks.size();
    device.layout.data = nullptr;
  }
  return device;
}
// The same evidence: of one sequence, whose keys begin at row 0.
template <class Q, class K>
cuda::QueryKey<Q, K> on_device(const QueryKey<Q, Heads<K>>& view) {
  const auto pointer = [](Span<const float> values) { return values.empty() ? nullptr : values.data(); };
  cuda::QueryKey<Q, K> device = cuda::query_key(on_device(view.query), on_device(view.key), view.scale);
  device.soft_cap = view.soft_cap;
  device.bias = pointer(view.bias);
  device.sinks = pointer(view.sinks);
  device.alibi = pointer(view.alibi);
  device.value_norms = pointer(view.value_norms);
  if (view.key_scales.data != nullptr) device.key_scales = on_device(view.key_scales);
  device.causal = view.causal;
  device.visible = view.visible.empty() ? nullptr : reinterpret_cast<const std::int32_t*>(view.visible.data());
  device.window = view.window;
  device.heads_total = view.heads_total;
  return device;
}

// Scores of the device against the core's, to a part in a million of the greatest; NaN where those are. corrected: by
// prior rows, where the difference of two logarithms leaves less of a float.
inline void expect_near(const float* ours, Span<const float> core, bool corrected) {
  const float tolerance = corrected ? 1e-5f : 1e-6f;
  float most = 0;
  for (const float score : core)
    if (!oracle::is_nan(score)) most = (std::max)(most, std::fabs(score));
  for (std::size_t i = 0; i < core.size(); ++i) {
    ASSERT_EQ(oracle::is_nan(ours[i]), oracle::is_nan(core[i])) << "score " << i;
    if (oracle::is_nan(core[i])) continue;
    ASSERT_NEAR(ours[i], core[i], tolerance * most) << "score " << i;
  }
}

inline std::string message(const Status& status) { return status.message().c_str(); }

}  // namespace batches

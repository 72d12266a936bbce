// The toy model of scheduler.cpp: one attention head, whose keys are its values too, and nothing else.
#pragma once

#include <cmath>
#include <fastv/fastv.hpp>
#include <vector>

namespace toy {

using fastv::Index;
using std::size_t;

constexpr size_t layers = 4, dim = 12, axes = 3, window = 20;  // the last layer has a sliding window
constexpr float scale = 0.29f;
inline float weights[layers][2][dim][dim];  // of queries and keys

inline void random_numbers(std::uint32_t seed, float* out, size_t count, float most = 1) {
  for (size_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    out[i] = most * (static_cast<float>(seed >> 8) / 8388608.0f - 1);
  }
}

// A query or key, turned by its M-RoPE position ids.
inline void project(const float (&w)[dim][dim], const float* x, const Index* ids, size_t id_stride, float* out) {
  for (size_t i = 0; i < dim; ++i) {
    out[i] = 0;
    for (size_t j = 0; j < dim; ++j) out[i] += w[i][j] * x[j];
  }
  for (size_t pair = 0; pair < dim / 2; ++pair) {
    const float angle = static_cast<float>(ids[pair % axes * id_stride]) / static_cast<float>(1 + 4 * pair);
    const float a = out[pair], b = out[pair + dim / 2];
    out[pair] = a * std::cos(angle) - b * std::sin(angle);
    out[pair + dim / 2] = b * std::cos(angle) + a * std::sin(angle);
  }
}

// Adds what a query reads from keys first .. end - 1 to x.
template <class KeyAt>
void attend(const float* query, size_t first, size_t end, const KeyAt& key_at, float* x) {
  std::vector<float> sum(dim);
  float total = 0;
  for (size_t j = first; j < end; ++j) {
    float dot = 0;
    for (size_t d = 0; d < dim; ++d) dot += query[d] * key_at(j)[d];
    const float p = std::exp(scale * dot);
    total += p;
    for (size_t d = 0; d < dim; ++d) sum[d] += p * key_at(j)[d];
  }
  for (size_t d = 0; d < dim; ++d) x[d] += sum[d] / total;
}

// A cache in blocks: [blocks, block_tokens, dim].
constexpr size_t block_tokens = 8;

// One layer on rows first .. end - 1 of a packed step, whose sequence has `slots`, and its keys in the blocks of `table`; a
// real engine has a kernel here. ids: [axes, id_stride]; query: [dim], the last row's afterwards.
inline void run_layer(size_t layer, size_t first, size_t end, float* hidden, const Index* ids, size_t id_stride,
                      const fastv::Slots& slots, const std::vector<Index>& table, float* cache, float* query) {
  const auto key_at = [&](size_t slot) {
    return &cache[(table[slot / block_tokens] * block_tokens + slot % block_tokens) * dim];
  };
  for (size_t row = first; row < end; ++row) {
    const size_t slot = slots.length(layer) - (end - row), position = slots.position_of(layer, slot);
    float* x = &hidden[row * dim];
    project(weights[layer][0], x, &ids[row], id_stride, query);
    project(weights[layer][1], x, &ids[row], id_stride, key_at(slot));
    const size_t seen = slots.first_in_window(layer, position, layer + 1 < layers ? 0 : window);
    attend(query, seen, slots.slots_before(layer, position + 1), key_at, x);
  }
}

// The token whose row is fed next.
inline std::uint32_t next_token(const float* x) {
  size_t best = 0;
  for (size_t d = 1; d < dim; ++d) best = x[d] > x[best] ? d : best;
  return static_cast<std::uint32_t>(5000 + best);
}

// Position ids [axes, tokens] by Qwen2-VL's rule: text counts on, an image has its rows and columns.
inline std::vector<Index> mrope_ids(const std::vector<fastv::TokenSpan>& visual, size_t tokens) {
  std::vector<Index> ids(axes * tokens);
  Index next = 0;
  for (size_t t = 0, v = 0; t < tokens;) {
    const bool image = v < visual.size() && visual[v].first == t;
    const size_t count = image ? visual[v].count : 1, columns = image ? visual[v].columns : 1;
    for (size_t i = 0; i < count; ++i) {
      const size_t offset[axes] = {0, i / columns, i % columns};
      for (size_t axis = 0; axis < axes; ++axis) ids[axis * tokens + t + i] = next + static_cast<Index>(offset[axis]);
    }
    next += static_cast<Index>(columns > count / columns ? columns : count / columns);
    t += count;
    v += image ? 1 : 0;
  }
  return ids;
}

}  // namespace toy

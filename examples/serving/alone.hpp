// What scheduler.cpp's engine must agree with: one sequence by itself, by plain loops over contiguous keys.
#pragma once

#include "toy_model.hpp"

namespace toy {

// A prompt as a server receives it.
struct Prompt {
  size_t arrives, tokens;  // the step of its prefill, and its length
  fastv::Config config;
  std::vector<fastv::TokenSpan> visual;
  std::vector<Index> ids = {};  // [axes, tokens]

  bool prunes(size_t step, size_t layer) const {
    return step == arrives && layer == config.filtering_layer && !visual.empty();
  }
  // Row t of a step: its token, once `outputs` [steps so far, dim] have come out.
  std::uint32_t token(size_t step, size_t t, const std::vector<float>& outputs) const {
    return step == arrives ? static_cast<std::uint32_t>(100 * tokens + t) : next_token(&outputs[outputs.size() - dim]);
  }
};

// The last row of each step, [steps - arrives, dim].
inline std::vector<float> run_alone(const Prompt& prompt, size_t steps) {
  struct Row {
    size_t position;
    Index ids[axes];
    float x[dim];
  };
  Index next_id = 0;
  for (const Index id : prompt.ids) next_id = id < next_id ? next_id : id + 1;
  std::vector<float> outputs, keys[layers];
  std::vector<size_t> positions[layers];
  for (size_t step = prompt.arrives; step < steps; ++step) {
    const size_t decoded = step - prompt.arrives;
    std::vector<Row> rows(decoded == 0 ? prompt.tokens : 1);
    for (size_t t = 0; t < rows.size(); ++t) {
      rows[t].position = decoded == 0 ? t : prompt.tokens + decoded - 1;
      for (size_t axis = 0; axis < axes; ++axis)
        rows[t].ids[axis] =
            decoded == 0 ? prompt.ids[axis * prompt.tokens + t] : next_id + static_cast<Index>(decoded - 1);
      random_numbers(prompt.token(step, t, outputs), rows[t].x, dim);
    }
    float query[dim];
    for (size_t layer = 0; layer < layers; ++layer) {
      if (prompt.prunes(step, layer)) {
        fastv::Pruner<> pruner(prompt.config);
        const auto kept = pruner.prune(
            fastv::query_key(fastv::heads(static_cast<const float*>(query), fastv::TokenMajor{1, 1, dim}),
                             fastv::heads(keys[layer - 1].data(), fastv::TokenMajor{rows.size(), 1, dim}), scale),
            prompt.visual);
        std::vector<Row> left;
        for (const Index i : kept) left.push_back(rows[i]);
        rows = left;
      }
      for (Row& row : rows) {
        keys[layer].resize(keys[layer].size() + dim);
        project(weights[layer][0], row.x, row.ids, 1, query);
        project(weights[layer][1], row.x, row.ids, 1, &keys[layer][keys[layer].size() - dim]);
        positions[layer].push_back(row.position);
        size_t first = 0;
        while (layer + 1 == layers && positions[layer][first] + window <= row.position) ++first;
        attend(
            query, first, positions[layer].size(), [&](size_t j) { return &keys[layer][j * dim]; }, row.x);
      }
    }
    outputs.insert(outputs.end(), rows.back().x, rows.back().x + dim);
  }
  return outputs;
}

}  // namespace toy

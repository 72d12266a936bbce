// A toy engine's step loop with what a server has: requests that arrive while others decode, all rows of a step packed,
// settings and images of each request's own, a paged cache with two block tables a sequence (layers below K and from K
// on), M-RoPE, a sliding window. At the end each sequence is run by itself, by plain loops over contiguous keys, and must
// have come out the same.
#include <cstdio>

#include "toy_model.hpp"

namespace {

using namespace toy;

// ---- requests ------------------------------------------------------------------------------------

struct Sequence {
  size_t arrives, tokens;  // the step of its prefill, and the prompt's length
  fastv::Config config;
  std::vector<fastv::TokenSpan> visual;

  std::vector<Index> ids = {};       // [axes, tokens], the prompt's
  fastv::Plan plan = {};             // of the prompt
  fastv::Slots slots = {};           // what its caches hold
  std::vector<Index> table[2] = {};  // blocks of the layers below K, and of those from K on
  std::vector<float> outputs = {};   // [steps, dim]: the last row of each step

  bool prunes(size_t step, size_t layer) const { return step == arrives && layer == config.filtering_layer; }
  // Token and ids of row t of its step.
  std::uint32_t token(size_t step, size_t t) const {
    return step == arrives ? static_cast<std::uint32_t>(100 * tokens + t) : next_token(&outputs[outputs.size() - dim]);
  }
  Index id(size_t step, size_t axis, size_t t) const {
    if (step == arrives) return ids[axis * tokens + t];
    return fastv::next_position(fastv::Span<const Index>(ids)) + static_cast<Index>(step - arrives - 1);
  }
};

// ---- the engine ----------------------------------------------------------------------------------

constexpr size_t block_tokens = 8, blocks = 100;

bool failed(const fastv::Status& status) {
  if (!status) std::puts(status.message().c_str());
  return !status;
}

class Engine {
 public:
  Engine() {
    for (std::vector<float>& cache : cache_) cache.resize(blocks * block_tokens * dim);
  }
  bool step(size_t number, fastv::Span<Sequence> sequences);

 private:
  bool prune(size_t layer);
  void run(size_t layer);
  void print() const;

  std::vector<float> cache_[layers];  // [blocks, block_tokens, dim]
  Index free_blocks_ = blocks;        // taken from the end
  fastv::BatchPruner<> pruner_;

  // Of the step at hand.
  size_t step_ = 0, rows_ = 0;
  std::vector<Sequence*> running_;
  fastv::BatchGroup groups_[layers];
  std::vector<std::int32_t> lengths_;
  fastv::BatchPlan plan_;
  std::vector<float> hidden_;  // [rows, dim], packed
  std::vector<Index> ids_;     // [axes, rows]
  std::vector<float> query_;   // [sequences, dim]: of each one's last row, in the layer that has just run
};

bool Engine::step(size_t number, fastv::Span<Sequence> sequences) {
  // Who takes part, and what it takes, before anything runs.
  step_ = number;
  running_.clear();
  std::vector<fastv::SequenceStep> steps;
  for (Sequence& s : sequences) {
    if (number < s.arrives) continue;
    running_.push_back(&s);
    steps.push_back(number == s.arrives ? fastv::SequenceStep{&s.plan, &s.slots}
                                        : fastv::SequenceStep{nullptr, &s.slots, 1});
  }
  lengths_.resize(fastv::batch_plan_entries(steps.size(), layers));
  const auto plan = fastv::plan_batch(steps, layers, block_tokens, groups_, lengths_);
  if (failed(plan.status)) return false;
  plan_ = *plan;
  print();
  for (size_t i = 0; i < running_.size(); ++i)
    for (size_t own = 0; own < 2; ++own) {
      const size_t layer = own == 0 ? 0 : running_[i]->config.filtering_layer;
      const auto needed = static_cast<size_t>(plan_.group_of(layer).blocks[i]);
      while (running_[i]->table[own].size() < needed) running_[i]->table[own].push_back(--free_blocks_);
    }

  // The packed rows, and their position ids.
  const auto bounds = plan_.groups[0].cumulative_queries;
  rows_ = static_cast<size_t>(bounds[running_.size()]);
  hidden_.resize(rows_ * dim);
  ids_.resize(axes * rows_);
  query_.resize(running_.size() * dim);
  for (size_t i = 0; i < running_.size(); ++i) {
    const auto first = static_cast<size_t>(bounds[i]), count = static_cast<size_t>(bounds[i + 1]) - first;
    for (size_t t = 0; t < count; ++t) {
      random_numbers(running_[i]->token(number, t), &hidden_[(first + t) * dim], dim);
      for (size_t axis = 0; axis < axes; ++axis) ids_[axis * rows_ + first + t] = running_[i]->id(number, axis, t);
    }
    if (failed(running_[i]->slots.append(count))) return false;
  }

  for (size_t layer = 0; layer < layers; ++layer) {
    if (!prune(layer)) return false;
    run(layer);
  }
  const auto ends = plan_.group_of(layers - 1).cumulative_queries;
  for (size_t i = 0; i < running_.size(); ++i) {
    const float* end = hidden_.data() + static_cast<size_t>(ends[i + 1]) * dim;
    running_[i]->outputs.insert(running_[i]->outputs.end(), end - dim, end);
  }
  return true;
}

// Prunes the prompts whose K layers have run; the others pass untouched.
bool Engine::prune(size_t layer) {
  bool due = false;
  for (const Sequence* s : running_) due = due || s->prunes(step_, layer);
  if (!due) return true;
  const auto bounds = plan_.group_of(layer - 1).cumulative_queries;
  std::vector<fastv::Request> requests;
  for (size_t i = 0; i < running_.size(); ++i) {
    requests.push_back(
        {running_[i]->config, {}, static_cast<size_t>(bounds[i]), static_cast<size_t>(bounds[i + 1] - bounds[i])});
    if (running_[i]->prunes(step_, layer)) requests[i].visual = running_[i]->visual;
  }
  const fastv::KeptBatch kept = pruner_.prune(requests, [&](size_t i) {
    return fastv::query_key(fastv::heads(query_.data() + i * dim, fastv::TokenMajor{1, 1, dim}),
                            fastv::heads(cache_[layer - 1].data(), fastv::TokenMajor{block_tokens, 1, dim},
                                         running_[i]->table[0], running_[i]->slots.length(layer - 1)),
                            scale);
  });
  if (failed(kept.status)) return false;
  if (failed(fastv::compact(kept, fastv::rows(hidden_.data(), rows_, dim)))) return false;
  if (failed(fastv::compact(kept, fastv::position_axes(ids_.data(), axes, rows_)))) return false;
  for (size_t i = 0; i < running_.size(); ++i) {
    if (failed(kept.sequences[i].status)) return false;
    if (running_[i]->prunes(step_, layer) && failed(running_[i]->slots.keep(layer, kept.sequence(i)))) return false;
  }
  rows_ = kept.size();
  return true;
}

void Engine::run(size_t layer) {
  const fastv::BatchGroup& group = plan_.group_of(layer);
  for (size_t i = 0; i < running_.size(); ++i) {
    const Sequence& s = *running_[i];
    const std::vector<Index>& table = s.table[layer < s.config.filtering_layer ? 0 : 1];
    const auto key_at = [&](size_t slot) {
      return &cache_[layer][(table[slot / block_tokens] * block_tokens + slot % block_tokens) * dim];
    };
    const auto first = static_cast<size_t>(group.cumulative_queries[i]);
    const auto end = static_cast<size_t>(group.cumulative_queries[i + 1]);
    for (size_t row = first; row < end; ++row) {
      const size_t slot = s.slots.length(layer) - (end - row), position = s.slots.position_of(layer, slot);
      float* x = &hidden_[row * dim];
      float* query = &query_[i * dim];
      project(weights[layer][0], x, &ids_[row], rows_, query);
      project(weights[layer][1], x, &ids_[row], rows_, key_at(slot));
      const size_t seen = s.slots.first_in_window(layer, position, layer + 1 < layers ? 0 : window);
      attend(query, seen, s.slots.slots_before(layer, position + 1), key_at, x);
    }
  }
}

void Engine::print() const {
  for (const fastv::BatchGroup& group : plan_.groups)
    std::printf("%4zu     %zu-%zu  %6d  %6d  %9zu  %9zu  %6zu  %5zu\n", step_, group.first_layer,
                group.first_layer + group.layers - 1, group.cumulative_queries[running_.size()],
                group.cumulative_keys[running_.size()], group.longest_query, group.longest_key, group.total_blocks,
                group.added_blocks);
}

// ---- the same, one sequence by itself --------------------------------------------------------------

struct Token {
  size_t position;
  Index ids[axes];
  float x[dim];
};

std::vector<float> alone(const Sequence& request, size_t steps) {
  Sequence s{request.arrives, request.tokens, request.config, request.visual, request.ids};
  Index next_id = 0;
  for (const Index id : s.ids) next_id = id < next_id ? next_id : id + 1;
  std::vector<float> keys[layers];
  std::vector<size_t> positions[layers];
  for (size_t step = s.arrives; step < steps; ++step) {
    std::vector<Token> row(step == s.arrives ? s.tokens : 1);
    for (size_t t = 0; t < row.size(); ++t) {
      const size_t decoded = step - s.arrives;
      row[t].position = decoded == 0 ? t : s.tokens + decoded - 1;
      for (size_t axis = 0; axis < axes; ++axis)
        row[t].ids[axis] = decoded == 0 ? s.ids[axis * s.tokens + t] : next_id + static_cast<Index>(decoded - 1);
      random_numbers(s.token(step, t), row[t].x, dim);
    }
    float query[dim];
    for (size_t layer = 0; layer < layers; ++layer) {
      if (s.prunes(step, layer) && !s.visual.empty()) {
        fastv::Pruner<> pruner(s.config);
        const auto kept = pruner.prune(
            fastv::query_key(fastv::heads(static_cast<const float*>(query), fastv::TokenMajor{1, 1, dim}),
                             fastv::heads(keys[layer - 1].data(), fastv::TokenMajor{row.size(), 1, dim}), scale),
            s.visual);
        std::vector<Token> left;
        for (const Index i : kept) left.push_back(row[i]);
        row = left;
      }
      for (Token& token : row) {
        keys[layer].resize(keys[layer].size() + dim);
        project(weights[layer][0], token.x, token.ids, 1, query);
        project(weights[layer][1], token.x, token.ids, 1, &keys[layer][keys[layer].size() - dim]);
        positions[layer].push_back(token.position);
        size_t first = 0;
        while (layer + 1 == layers && positions[layer][first] + window <= token.position) ++first;
        attend(
            query, first, positions[layer].size(), [&](size_t j) { return &keys[layer][j * dim]; }, token.x);
      }
    }
    s.outputs.insert(s.outputs.end(), row.back().x, row.back().x + dim);
  }
  return s.outputs;
}

}  // namespace

int main() {
  random_numbers(7, &weights[0][0][0][0], layers * 2 * dim * dim, 0.5f);
  Engine engine;
  Sequence sequences[] = {{0, 50, {1, 0.5}, {{4, 36, 6}}},
                          {0, 80, {2, 0.75}, {{3, 24, 6}, {40, 30, 5}}},
                          {1, 20, {}, {}},
                          {2, 61, {3, 0.6}, {{10, 45, 9}}}};
  for (Sequence& s : sequences) {
    s.ids = mrope_ids(s.visual, s.tokens);
    const auto plan = fastv::make_plan(fastv::Request{s.config, s.visual, 0, s.tokens}, layers);
    if (failed(plan.status)) return 1;
    s.plan = *plan;
  }

  constexpr size_t steps = 4;
  std::puts("step  layers    rows    keys  most rows  most keys  blocks    new");
  for (size_t number = 0; number < steps; ++number)
    if (!engine.step(number, sequences)) return 1;

  int wrong = 0;
  std::puts("\nsequence  prompt  K  kept  keys below K  keys from K  next position  as if alone");
  for (const Sequence& s : sequences) {
    const std::vector<float> expected = alone(s, steps);
    bool same = s.outputs.size() == expected.size();
    for (size_t j = 0; same && j < expected.size(); ++j) same = std::fabs(s.outputs[j] - expected[j]) < 1e-4f;
    wrong += same ? 0 : 1;
    const size_t k = s.config.filtering_layer;
    std::printf("%8td  %6zu  %zu  %4zu  %12zu  %11zu  %13zu  %s\n", &s - sequences, s.tokens, k, s.plan.kept(),
                s.slots.length(k - 1), s.slots.length(k), s.slots.tokens(), same ? "yes" : "NO");
  }
  return wrong == 0 ? 0 : 1;
}

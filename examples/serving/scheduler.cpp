// A toy engine's step loop with what a server has: requests that arrive while others decode, all rows of a step packed,
// settings and images of each request's own, a paged cache with two block tables a sequence (layers below K and from K
// on), M-RoPE, a sliding window. At the end each sequence is run by itself (alone.hpp) and must have come out the same.
#include <cstdio>

#include "alone.hpp"

namespace {

using namespace toy;

struct Sequence : Prompt {
  fastv::Plan plan = {};             // of the prompt
  fastv::Slots slots = {};           // what its caches hold
  std::vector<Index> table[2] = {};  // blocks of the layers below K, and of those from K on
  std::vector<float> outputs = {};   // [steps, dim]: the last row of each step

  const std::vector<Index>& table_of(size_t layer) const { return table[layer < config.filtering_layer ? 0 : 1]; }
  Index id(size_t step, size_t axis, size_t t) const {
    if (step == arrives) return ids[axis * tokens + t];
    return fastv::next_position(fastv::Span<const Index>(ids)) + static_cast<Index>(step - arrives - 1);
  }
};

constexpr size_t blocks = 100;

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
  bool plan(fastv::Span<Sequence> sequences);
  bool fill_rows();
  bool prune(const fastv::BatchGroup& before, size_t layer);

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

void print(size_t step, const fastv::BatchGroup& group) {
  std::printf("%4zu     %zu-%zu  %6d  %6d  %9zu  %9zu  %6zu  %5zu\n", step, group.first_layer,
              group.first_layer + group.layers - 1, *(group.cumulative_queries.end() - 1),
              *(group.cumulative_keys.end() - 1), group.longest_query, group.longest_key, group.total_blocks,
              group.added_blocks);
}

// ---- the step loop -------------------------------------------------------------------------------

bool Engine::step(size_t number, fastv::Span<Sequence> sequences) {
  step_ = number;
  if (!plan(sequences) || !fill_rows()) return false;
  // Layers of one group have the same rows; between two groups prompts are pruned.
  const fastv::BatchGroup* before = nullptr;
  for (const fastv::BatchGroup& group : plan_.groups) {
    print(number, group);
    if (before != nullptr && !prune(*before, group.first_layer)) return false;
    const auto bounds = group.cumulative_queries;
    for (size_t layer = group.first_layer; layer < group.first_layer + group.layers; ++layer)
      for (size_t i = 0; i < running_.size(); ++i)
        run_layer(layer, static_cast<size_t>(bounds[i]), static_cast<size_t>(bounds[i + 1]), hidden_.data(),
                  ids_.data(), rows_, running_[i]->slots, running_[i]->table_of(layer), cache_[layer].data(),
                  &query_[i * dim]);
    before = &group;
  }
  for (size_t i = 0; i < running_.size(); ++i) {
    const float* end = hidden_.data() + static_cast<size_t>(before->cumulative_queries[i + 1]) * dim;
    running_[i]->outputs.insert(running_[i]->outputs.end(), end - dim, end);
  }
  return true;
}

// Who takes part, and what it takes, before anything runs: a prefill has a plan, a decoding step one new token.
bool Engine::plan(fastv::Span<Sequence> sequences) {
  running_.clear();
  std::vector<fastv::SequenceStep> steps;
  for (Sequence& s : sequences) {
    if (step_ < s.arrives) continue;
    running_.push_back(&s);
    steps.push_back(step_ == s.arrives ? fastv::SequenceStep{&s.plan, &s.slots}
                                       : fastv::SequenceStep{nullptr, &s.slots, 1});
  }
  lengths_.resize(fastv::batch_plan_entries(steps.size(), layers));
  const auto plan = fastv::plan_batch(steps, layers, block_tokens, groups_, lengths_);
  if (failed(plan.status)) return false;
  plan_ = *plan;
  for (size_t i = 0; i < running_.size(); ++i)
    for (const size_t layer : {size_t{0}, running_[i]->config.filtering_layer}) {
      std::vector<Index>& table = running_[i]->table[layer == 0 ? 0 : 1];
      const auto needed = static_cast<size_t>(plan_.group_of(layer).blocks[i]);
      while (table.size() < needed) table.push_back(--free_blocks_);
    }
  return true;
}

// The packed rows and their position ids.
bool Engine::fill_rows() {
  const auto bounds = plan_.groups[0].cumulative_queries;
  rows_ = static_cast<size_t>(bounds[running_.size()]);
  hidden_.resize(rows_ * dim);
  ids_.resize(axes * rows_);
  query_.resize(running_.size() * dim);
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence& s = *running_[i];
    const auto first = static_cast<size_t>(bounds[i]), count = static_cast<size_t>(bounds[i + 1]) - first;
    for (size_t t = 0; t < count; ++t) {
      random_numbers(s.token(step_, t, s.outputs), &hidden_[(first + t) * dim], dim);
      for (size_t axis = 0; axis < axes; ++axis) ids_[axis * rows_ + first + t] = s.id(step_, axis, t);
    }
    if (failed(s.slots.append(count))) return false;
  }
  return true;
}

// Prunes the prompts whose K layers have run; the others, without visual tokens here, pass untouched.
bool Engine::prune(const fastv::BatchGroup& before, size_t layer) {
  const auto bounds = before.cumulative_queries;
  std::vector<fastv::Request> requests;
  for (size_t i = 0; i < running_.size(); ++i) {
    const Sequence& s = *running_[i];
    requests.push_back({s.config, {}, static_cast<size_t>(bounds[i]), static_cast<size_t>(bounds[i + 1] - bounds[i])});
    if (s.prunes(step_, layer)) requests[i].visual = s.visual;
  }
  const fastv::KeptBatch kept = pruner_.prune(requests, [&](size_t i) {
    return fastv::query_key(fastv::heads(query_.data() + i * dim, fastv::TokenMajor{1, 1, dim}),
                            fastv::heads(cache_[layer - 1].data(), fastv::TokenMajor{block_tokens, 1, dim},
                                         running_[i]->table[0], running_[i]->slots.length(layer - 1)),
                            scale);
  });
  if (failed(kept.status) || failed(fastv::compact(kept, fastv::rows(hidden_.data(), rows_, dim))) ||
      failed(fastv::compact(kept, fastv::position_axes(ids_.data(), axes, rows_))))
    return false;
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence& s = *running_[i];
    if (failed(kept.sequences[i].status)) return false;
    if (s.prunes(step_, layer) && failed(s.slots.keep(layer, kept.sequence(i)))) return false;
  }
  rows_ = kept.size();
  return true;
}

}  // namespace

int main() {
  random_numbers(7, &weights[0][0][0][0], layers * 2 * dim * dim, 0.5f);
  Engine engine;
  Sequence sequences[] = {{{0, 50, {1, 0.5}, {{4, 36, 6}}}},
                          {{0, 80, {2, 0.75}, {{3, 24, 6}, {40, 30, 5}}}},
                          {{1, 20, {}, {}}},
                          {{2, 61, {3, 0.6}, {{10, 45, 9}}}}};
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
    const std::vector<float> expected = run_alone(s, steps);
    bool same = s.outputs.size() == expected.size();
    for (size_t j = 0; same && j < expected.size(); ++j) same = std::fabs(s.outputs[j] - expected[j]) < 1e-4f;
    wrong += same ? 0 : 1;
    const size_t k = s.config.filtering_layer;
    std::printf("%8td  %6zu  %zu  %4zu  %12zu  %11zu  %13zu  %s\n", &s - sequences, s.tokens, k, s.plan.kept(),
                s.slots.length(k - 1), s.slots.length(k), s.slots.tokens(), same ? "yes" : "NO");
  }
  return wrong == 0 ? 0 : 1;
}

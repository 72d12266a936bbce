// A small LLaMA decoder on a GPU that prunes with fastv/cuda.cuh: a packed ragged batch, a paged cache, and two groups of
// layers, before and after the filtering layer, with rows, slots and blocks of their own. Nothing between the prompt and its
// logits waits for the device.
//
// Machine is what it runs on: CUDA and cuBLAS in decoder.cu, the host in the tests. It has a Queue of kernels (queue()), a
// Pruner, allocate<T>(count), upload(to, vector), download(from, count) and
//   multiply(x, w, y, rows, in, out): y [rows, out] = x [rows, in] w^T, w [out, in]
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <fastv/cost.hpp>
#include <fastv/cuda_views.hpp>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "kernels.hpp"

namespace decoder {

struct Room {
  std::size_t sequences, tokens;  // of a batch: prompts, and all their rows
  std::size_t longest;            // slots of a sequence, decoded tokens included; at most Attention::most_slots
  float norm_eps = 1e-6f;         // of the norms
};

enum class Mode {
  whole,   // nothing is pruned
  pruned,  // the layers behind the stage run on what stays
  masked   // the slow way to the same numbers: they run on all rows, and see no key of those that go
};

template <class Machine, class T>
class Decoder {
 public:
  // weights(name, to, rows, columns) writes [rows, columns] to device memory; names are those of Hugging Face.
  template <class Weights>
  Decoder(Machine& machine, const fastv::ModelShape& shape, const Room& room, const Weights& weights)
      : machine_(machine), shape_(shape), room_(room), pages_((room.longest + block_tokens - 1) / block_tokens) {
    const std::size_t d = shape.hidden, q = shape.heads * shape.head_dim, kv = shape.kv_heads * shape.head_dim,
                      m = shape.intermediate, n = room.sequences, slots = n * pages_ * block_tokens;
    const auto load = [&](const std::string& name, std::size_t rows, std::size_t columns) {
      T* to = machine.template allocate<T>(rows * columns);
      weights(name + ".weight", to, rows, columns);
      return static_cast<const T*>(to);
    };
    embeddings_ = load("model.embed_tokens", shape.vocabulary, d);
    final_norm_ = load("model.norm", 1, d);
    head_ = load("lm_head", shape.vocabulary, d);
    for (std::size_t i = 0; i < shape.layers; ++i) {
      const std::string l = "model.layers." + std::to_string(i) + ".";
      layers_.push_back({load(l + "input_layernorm", 1, d), load(l + "post_attention_layernorm", 1, d),
                         load(l + "self_attn.q_proj", q, d), load(l + "self_attn.k_proj", kv, d),
                         load(l + "self_attn.v_proj", kv, d), load(l + "self_attn.o_proj", d, q),
                         load(l + "mlp.gate_proj", m, d), load(l + "mlp.up_proj", m, d),
                         load(l + "mlp.down_proj", d, m), machine.template allocate<T>(slots * kv),
                         machine.template allocate<T>(slots * kv)});
    }
    const std::size_t tokens = room.tokens;
    const std::pair<T**, std::size_t> wide[] = {{&hidden_, d},      {&other_, d}, {&normed_, d}, {&delta_, d},
                                                {&other_delta_, d}, {&query_, q}, {&mixed_, q},  {&key_, kv},
                                                {&value_, kv},      {&gate_, m},  {&up_, m}};
    for (const auto& [list, width] : wide) *list = machine.template allocate<T>(tokens * width);
    logits_ = machine.template allocate<T>(n * shape.vocabulary);
    mask_ = machine.template allocate<unsigned char>(slots);
    const std::pair<std::int32_t**, std::size_t> lists[] = {{&positions_, tokens}, {&tokens_, n},
                                                            {&next_positions_, n}, {&next_slots_, n},
                                                            {&cumulative_, n + 1}, {&one_each_, n + 1}};
    for (const auto& [list, count] : lists) *list = machine.template allocate<std::int32_t>(count);
    // Each group has its own tables over the blocks of its layers' caches, in an order of its own.
    std::vector<std::int32_t> blocks(n * pages_);
    std::iota(blocks.begin(), blocks.end(), 0);
    for (std::int32_t*& table : tables_) {
      std::rotate(blocks.begin(), blocks.begin() + static_cast<std::ptrdiff_t>(blocks.size() / 3), blocks.end());
      std::reverse(blocks.begin(), blocks.begin() + static_cast<std::ptrdiff_t>(blocks.size() / 2));
      table = machine.template allocate<std::int32_t>(blocks.size());
      machine.upload(table, blocks);
    }
    fastv::cuda::Limits limits;
    limits.sequences = n;
    limits.tokens = room.tokens;
    limits.keys = room.longest;
    limits.heads = shape.heads;
    status_ = pruner_.reserve(limits);
  }

  // Plans a batch, which all prune at one layer, and uploads its lists and prompts [rows, hidden], packed as the requests
  // say.
  fastv::Status plan(fastv::Span<const fastv::cuda::Request> requests, const std::vector<T>& prompt, Mode mode) {
    const fastv::Status planned = pruner_.plan(requests, shape_.layers, machine_.queue());
    if (!planned) return planned;
    std::vector<std::int32_t> cumulative{0}, positions, next, next_kept, one_each(requests.size() + 1);
    step_ = {0, 0, {cumulative_, positions_, positions_}};  // ahead of the stage slots are positions
    for (std::size_t i = 0; i < requests.size(); ++i) {
      const std::size_t tokens = requests[i].tokens, kept = mode == Mode::pruned ? pruner_.kept_tokens(0, i) : tokens;
      for (std::size_t t = 0; t < tokens; ++t) positions.push_back(static_cast<std::int32_t>(t));
      cumulative.push_back(static_cast<std::int32_t>(positions.size()));
      next.push_back(static_cast<std::int32_t>(tokens) - 1);  // of the last row; NextToken goes on from there
      next_kept.push_back(static_cast<std::int32_t>(kept) - 1);
      step_.longest = (std::max)(step_.longest, static_cast<Number>(tokens));
    }
    step_.rows = static_cast<Number>(positions.size());
    std::iota(one_each.begin(), one_each.end(), 0);
    machine_.upload(cumulative_, cumulative);
    machine_.upload(positions_, positions);
    machine_.upload(next_positions_, next);
    machine_.upload(next_slots_, next_kept);
    machine_.upload(one_each_, one_each);
    machine_.upload(hidden_, prompt);
    sequences_ = static_cast<Number>(requests.size());
    filtering_layer_ = mode == Mode::whole ? shape_.layers : pruner_.filtering_layer(0);
    mode_ = mode;
    return {};
  }

  // Queues the planned batch. The logits behind its last rows are those of the first tokens.
  fastv::Status prefill() {
    pending_ = false;
    Step step = step_;
    for (std::size_t layer = 0; layer < shape_.layers; ++layer) {
      if (layer == filtering_layer_) step = prune(layer, step);
      run_layer(layer, step);
    }
    finish(step);
    return status_;
  }

  // Queues one step: the tokens that the logits are highest for, or these, and then the logits behind them. May be
  // captured in a graph, and run again for step after step.
  fastv::Status decode(const std::int32_t* forced = nullptr) {
    run({sequences_, 1, 1}, NextToken<T>{logits_, embeddings_, forced, hidden_, tokens_, next_positions_, next_slots_,
                                         static_cast<Number>(shape_.vocabulary), width()});
    pending_ = false;
    Step step{sequences_, 1, {one_each_, next_positions_, next_positions_}};
    for (std::size_t layer = 0; layer < shape_.layers; ++layer) {
      if (layer == filtering_layer_) step.packed.slots = next_slots_;
      run_layer(layer, step);
    }
    finish(step);
    return status_;
  }

  const T* logits() const { return logits_; }             // [sequences, vocabulary]
  const std::int32_t* tokens() const { return tokens_; }  // [sequences], of the last decode()
  fastv::cuda::Kept kept() { return pruner_.kept(0); }
  std::size_t kept_tokens(std::size_t sequence) const { return pruner_.kept_tokens(0, sequence); }

 private:
  struct Layer {
    const T *attention_norm, *ffn_norm, *query, *key, *value, *output, *gate, *up, *down;
    T *keys, *values;  // the cache
  };
  struct Step {
    Number rows, longest;
    Packed packed;
  };

  template <class Kernel>
  void run(const std::array<Number, 3>& grid, const Kernel& kernel) {
    if (status_) status_ = machine_.queue().launch({grid[0], grid[1], grid[2]}, kernel);
  }
  Number width() const { return static_cast<Number>(shape_.hidden); }
  Cache<T> cache(std::size_t layer) const {
    return {layers_[layer].keys, layers_[layer].values, tables_[layer < filtering_layer_ ? 0 : 1],
            static_cast<Number>(pages_)};
  }

  // What layer `layer` - 1 has done decides. Its products are not yet added to the hidden states: both are moved.
  Step prune(std::size_t layer, const Step& step) {
    using fastv::TokenMajor;
    const auto query =
        fastv::cuda::heads(static_cast<const T*>(query_), TokenMajor{step.rows, shape_.heads, shape_.head_dim});
    const auto key = fastv::cuda::heads(static_cast<const T*>(layers_[layer - 1].keys),
                                        TokenMajor{block_tokens, shape_.kv_heads, shape_.head_dim}, tables_[0], pages_);
    const float scale = 1 / std::sqrt(static_cast<float>(shape_.head_dim));
    if (status_) status_ = pruner_.prune(0, fastv::cuda::query_key(query, key, scale), machine_.queue());
    const fastv::cuda::Kept kept = pruner_.kept(0);
    if (mode_ == Mode::masked) {
      mask(kept);
      return step;
    }
    if (status_)
      status_ = pruner_.gather(
          0,
          {{fastv::rows(hidden_, step.rows, shape_.hidden), fastv::rows(other_, kept.total, shape_.hidden)},
           {fastv::rows(delta_, step.rows, shape_.hidden), fastv::rows(other_delta_, kept.total, shape_.hidden)}},
          machine_.queue());
    std::swap(hidden_, other_);
    std::swap(delta_, other_delta_);
    return {static_cast<Number>(kept.total),
            static_cast<Number>(kept.longest),
            {kept.cumulative, kept.positions, kept.slots}};
  }
  // Hides the slots of what does not stay. By way of the host, since nobody is in a hurry here.
  void mask(const fastv::cuda::Kept& kept) {
    const std::size_t room = pages_ * block_tokens;
    std::vector<unsigned char> hidden(sequences_ * room);
    const auto before = machine_.download(step_.packed.cumulative, sequences_ + 1);
    const auto cumulative = machine_.download(kept.cumulative, sequences_ + 1);
    const auto positions = machine_.download(kept.positions, kept.total);
    for (std::size_t i = 0; i < sequences_; ++i) {
      std::fill_n(hidden.data() + i * room, before[i + 1] - before[i], static_cast<unsigned char>(1));
      for (std::int32_t row = cumulative[i]; row < cumulative[i + 1]; ++row)
        hidden[i * room + static_cast<std::size_t>(positions[static_cast<std::size_t>(row)])] = 0;
    }
    machine_.upload(mask_, hidden);
  }

  void norm(const T* weight, Number rows, const std::int32_t* ends = nullptr) {
    run({rows, 1, 1}, AddNorm<T>{hidden_, pending_ ? delta_ : nullptr, weight, normed_, ends, width(), room_.norm_eps});
  }
  void run_layer(std::size_t index, const Step& step) {
    const Layer& w = layers_[index];
    const std::size_t n = step.rows, d = shape_.hidden, m = shape_.intermediate, q = shape_.heads * shape_.head_dim,
                      kv = shape_.kv_heads * shape_.head_dim;
    const auto heads = static_cast<Number>(shape_.heads), kv_heads = static_cast<Number>(shape_.kv_heads),
               dim = static_cast<Number>(shape_.head_dim);
    norm(w.attention_norm, step.rows);
    machine_.multiply(normed_, w.query, query_, n, d, q);
    machine_.multiply(normed_, w.key, key_, n, d, kv);
    machine_.multiply(normed_, w.value, value_, n, d, kv);
    run({step.longest, sequences_, 1},
        RotateAndStore<T>{query_, key_, value_, cache(index), step.packed, heads, kv_heads, dim, 10000.0f});
    run({(step.longest + Attention<T>::tile - 1) / Attention<T>::tile, heads, sequences_},
        Attention<T>{query_, mixed_, cache(index), step.packed,
                     mode_ == Mode::masked && index >= filtering_layer_ ? mask_ : nullptr,
                     static_cast<Number>(pages_ * block_tokens), heads, kv_heads, dim});
    machine_.multiply(mixed_, w.output, delta_, n, q, d);
    pending_ = true;
    norm(w.ffn_norm, step.rows);
    machine_.multiply(normed_, w.gate, gate_, n, d, m);
    machine_.multiply(normed_, w.up, up_, n, d, m);
    run({static_cast<Number>((n * m + 255) / 256), 1, 1}, Gate<T>{gate_, up_, n * m});
    machine_.multiply(gate_, w.down, delta_, n, m, d);
  }
  void finish(const Step& step) {
    norm(final_norm_, sequences_, step.packed.cumulative);
    machine_.multiply(normed_, head_, logits_, sequences_, shape_.hidden, shape_.vocabulary);
  }

  Machine& machine_;
  typename Machine::Pruner pruner_;
  fastv::ModelShape shape_;
  Room room_;
  std::size_t pages_, filtering_layer_ = 0;
  fastv::Status status_;
  Number sequences_ = 0;
  Mode mode_ = Mode::whole;
  Step step_{};           // what a prefill begins with
  bool pending_ = false;  // delta_ is to be added to hidden_
  const T *embeddings_, *final_norm_, *head_;
  std::vector<Layer> layers_;
  T *hidden_, *other_, *normed_, *delta_, *other_delta_, *query_, *mixed_, *key_, *value_, *gate_, *up_, *logits_;
  unsigned char* mask_;
  std::int32_t *positions_, *tokens_, *next_positions_, *next_slots_, *cumulative_, *one_each_, *tables_[2];
};

}  // namespace decoder

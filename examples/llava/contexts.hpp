// The two contexts of libllama under Engine, and what is looked at, and written over, while they run.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <fastv/ggml.hpp>
#include <map>
#include <stdexcept>
#include <thread>

#include "engine.hpp"

namespace llava {

inline void require(const fastv::Status& status) {
  if (!status) throw std::invalid_argument(status.message().c_str());
}
// The view of the cache that attention's keys are: themselves, or, of an F32 cache, what they were rounded from.
inline const ggml_tensor* in_cache(const ggml_tensor* keys) {
  while (root(keys)->op != GGML_OP_NONE && keys->src[0] != nullptr) keys = keys->src[0];
  return keys;
}

// The layer whose keys a tensor of the cache holds, as libllama names it; -1 for other tensors.
inline std::int32_t layer_of_keys(const ggml_tensor* tensor) {
  constexpr const char* name = "cache_k_l";
  const char* full = root(tensor)->name;
  if (std::strncmp(full, name, std::strlen(name)) != 0) return -1;
  return static_cast<std::int32_t>(std::strtol(full + std::strlen(name), nullptr, 10));
}

template <class T>
std::vector<T> read_all(const ggml_tensor* tensor) {
  std::vector<T> values(ggml_nbytes(tensor) / sizeof(T));
  ggml_backend_tensor_get(tensor, values.data(), 0, values.size() * sizeof(T));
  return values;
}

// A context whose graphs are looked at node by node.
class Half {
 public:
  Half(llama_model* model, const EngineOptions& options, const char* name) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<std::uint32_t>(options.context);
    params.n_batch = static_cast<std::uint32_t>(options.batch);
    params.n_ubatch = static_cast<std::uint32_t>(std::min(options.micro_batch, options.batch));
    params.n_seq_max = static_cast<std::uint32_t>(options.sequences);
    params.n_threads = params.n_threads_batch =
        options.threads > 0 ? options.threads : static_cast<std::int32_t>(std::thread::hardware_concurrency());
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;  // the node that is looked at
    params.type_k = options.key_type;
    params.type_v = options.value_type;
    params.kv_unified = true;  // tokens go through the layers in the order of the batch
    params.swa_full = false;
    params.no_perf = true;
    params.cb_eval = [](ggml_tensor* node, bool ask, void* self) {
      return static_cast<Half*>(self)->on_node(node, ask);
    };
    params.cb_eval_user_data = this;
    context_.reset(llama_init_from_model(model, params));
    if (!context_)
      throw std::runtime_error("libllama makes no context of " + std::to_string(options.context) + " tokens for the " +
                               name + ": use a smaller -c, or F16 for the types of the cache");
    batch_ = llama_n_batch(context_.get());  // no more than the context
  }
  virtual ~Half() = default;

  llama_context* context() const { return context_.get(); }
  llama_memory_t memory() const { return llama_get_memory(context_.get()); }
  std::size_t batch() const { return batch_; }

 protected:
  // tokens or rows; positions [axes, count]; sequences [count]; wanted [count]: whose logits. Throws.
  void run(const std::vector<llama_token>& tokens, const float* rows, std::vector<llama_pos> positions,
           std::vector<llama_seq_id> sequences, std::vector<std::int8_t> wanted) {
    const std::size_t count = sequences.size();
    if (count > batch_)
      throw std::length_error(std::to_string(count) + " tokens go into one call, but -b, or the context, is " +
                              std::to_string(batch_) + ": raise it");
    std::vector<std::int32_t> ones(count, 1);
    std::vector<llama_seq_id*> ids(count);
    for (std::size_t i = 0; i < count; ++i) ids[i] = &sequences[i];
    // libllama reads them only.
    const llama_batch batch{static_cast<std::int32_t>(count),
                            rows == nullptr ? const_cast<llama_token*>(tokens.data()) : nullptr,
                            const_cast<float*>(rows),
                            positions.data(),
                            ones.data(),
                            ids.data(),
                            wanted.data()};
    error_ = nullptr;
    first_node_.clear();
    const std::int32_t status = llama_decode(context_.get(), batch);
    if (error_) std::rethrow_exception(error_);
    if (status == 1) throw std::length_error("the context is full: raise -c, or use shorter prompts");
    if (status != 0) throw std::runtime_error("llama_decode returns " + std::to_string(status));
  }

  // A micro-batch begins: its first node is about to be looked at.
  virtual void begin() = 0;
  // As ggml_backend_sched_eval_callback. Asked for every node ahead of a run of them; then told of those it wanted.
  virtual bool look(ggml_tensor* node, bool ask) = 0;

 private:
  bool on_node(ggml_tensor* node, bool ask) {
    if (error_) return !ask;
    try {
      if (ask && (first_node_.empty() || first_node_ == node->name)) {
        first_node_ = node->name;
        begin();
      }
      return look(node, ask);
    } catch (...) {  // not through libllama's frames
      error_ = std::current_exception();
      return !ask;
    }
  }

  LlamaContext context_;
  std::size_t batch_ = 0;
  std::exception_ptr error_;
  std::string first_node_;
};

// Layers below K: leaves hidden rows, and the evidence of layer K-1.
class Head : public Half {
 public:
  Head(const Halves& halves, const EngineOptions& options, Devices& devices)
      : Half(halves.head(), options, "layers below K"),
        devices_(devices),
        layers_(halves.facts()),
        layer_(static_cast<std::int32_t>(halves.filtering_layer()) - 1),
        last_node_(layers_.rows_of(halves.filtering_layer() - 1)),
        every_layer_(options.every_layer) {}

  // Tokens or rows of one call. last: their last token is the one that ranks.
  void run(const std::vector<llama_token>& tokens, const float* rows, std::vector<llama_pos> positions,
           std::vector<llama_seq_id> sequences, bool last) {
    done_ = 0;
    ranks_at_ = last ? sequences.size() : 0;
    const std::size_t count = sequences.size(), before = hidden.count();
    Half::run(tokens, rows, std::move(positions), std::move(sequences), std::vector<std::int8_t>(count, 0));
    if (hidden.count() == before || cells.size() < count)
      throw std::runtime_error("libllama ran the layers below K without " + last_node_ +
                               ": this architecture is built otherwise than those that were tried");
  }

  Rows hidden;                      // of all calls since it was cleared
  std::vector<std::int64_t> cells;  // of layer K-1's cache, the same

  // The attention that the last token pays to `visual` in a layer; its keys lie in cells_of_sequence, of which the first
  // `past` are earlier turns'.
  std::vector<float> scores(std::int32_t layer, fastv::Span<const fastv::TokenSpan> visual,
                            const std::vector<std::int64_t>& cells_of_sequence, std::size_t past) const {
    const auto found = evidence_.find(layer);
    if (found == evidence_.end()) throw std::runtime_error("layer K-1 has no flash attention to be looked at");
    const Evidence& e = found->second;
    if (!e.by_cell.empty()) {
      std::vector<float> all(cells_of_sequence.size() - past);
      fastv::for_each_visual(visual, [&](std::size_t, std::size_t token) {
        all[token] = e.by_cell[size(cells_of_sequence[past + token])];
      });
      return all;
    }
    const std::size_t head_dim = size(e.keys.ne[0]), kv_heads = size(e.keys.ne[2]);
    // Where no graph could rank them there, keys come to the host; they have as many bytes as the cells in use.
    std::vector<char> copy;
    const auto* data = static_cast<const char*>(e.keys.data);
    if (!is_on_host(&e.keys)) {
      copy.resize(size(e.keys.ne[1]) * e.keys.nb[1]);
      const std::size_t offset = e.keys.view_offs;
      ggml_backend_tensor_get(root(&e.keys), copy.data(), offset,
                              std::min(copy.size(), ggml_nbytes(root(&e.keys)) - offset));
      data = copy.data();
    }
    const auto to_float = ggml_get_type_traits(e.keys.type)->to_float;
    const auto load = [&](std::size_t kv_head, std::size_t token, float* out) noexcept {
      const char* key = data + size(cells_of_sequence[token]) * e.keys.nb[1] + kv_head * e.keys.nb[2];
      if (e.keys.type == GGML_TYPE_F32)
        std::memcpy(out, key, head_dim * sizeof(float));
      else
        to_float(key, out, e.keys.ne[0]);
    };
    auto evidence = fastv::query_key(fastv::heads(e.query.data(), fastv::TokenMajor{1, e.heads, head_dim}),
                                     fastv::loaded_keys(kv_heads, cells_of_sequence.size(), head_dim, load), e.scale);
    evidence.soft_cap = e.soft_cap;
    evidence.sinks = e.sinks;
    evidence.alibi = e.alibi;
    evidence.past = past;
    require(evidence.check());
    std::vector<float> scratch(evidence.scratch_floats());
    fastv::Scoring scoring{visual, {}, scratch};
    scoring.queries.tokens = evidence.prompt_tokens();
    std::vector<float> of_visual(fastv::visual_tokens(visual)), all(evidence.prompt_tokens());
    require(evidence.score(scoring, fastv::Span<float>(of_visual), fastv::Serial{}));
    fastv::for_each_visual(visual, [&](std::size_t number, std::size_t token) { all[token] = of_visual[number]; });
    return all;
  }
  bool saw(std::int32_t layer) const { return evidence_.count(layer) != 0; }

 private:
  void begin() override {}

  bool look(ggml_tensor* node, bool ask) override {
    if (node->op == GGML_OP_SET_ROWS && ask && layer_of_keys(node) == layer_) {
      const auto ids = read_all<std::int64_t>(node->src[1]);
      cells.insert(cells.end(), ids.begin(), ids.end());
      return false;
    }
    if (node->op == GGML_OP_FLASH_ATTN_EXT) {
      const std::int32_t layer = layer_of_keys(in_cache(node->src[1]));
      // Of layers with windows, keys lie in other cells, and are not all there.
      if (layer != layer_ && !(every_layer_ && layer >= 0 && layer < layer_ && !layers_.all[size(layer)].windowed))
        return false;
      if (ask) return ranks_at_ != 0 && done_ + size(node->src[0]->ne[1]) == ranks_at_;
      take_evidence(evidence_[layer], node);
      return true;
    }
    if (last_node_ != node->name) return false;
    if (ask) return true;
    hidden.append(node);
    done_ += size(ggml_nrows(node));
    return false;  // nothing behind it runs
  }

  struct Evidence {
    std::vector<float> by_cell;              // scores, where they were computed on a device: [cells]; else empty, and
    std::vector<float> query, sinks, alibi;  // [H, c]; [H] or empty
    ggml_tensor keys;                        // [c, cells, G], in the cache
    std::size_t heads;
    float scale, soft_cap;
  };
  void take_evidence(Evidence& e, const ggml_tensor* attention) {
    const ggml_tensor* q = attention->src[0];  // [c, tokens, H]
    e.keys = *in_cache(attention->src[1]);
    e.by_cell.clear();
    e.heads = size(q->ne[2]);
    const std::size_t head_dim = size(q->ne[0]);
    float max_bias = 0;
    std::memcpy(&e.scale, attention->op_params, sizeof(float));
    std::memcpy(&max_bias, attention->op_params + 1, sizeof(float));
    std::memcpy(&e.soft_cap, attention->op_params + 2, sizeof(float));
    if (!is_on_host(&e.keys) && max_bias == 0 && rank_on_device(e, attention)) return;
    e.query.resize(e.heads * head_dim);
    for (std::size_t h = 0; h < e.heads; ++h)
      ggml_backend_tensor_get(q, e.query.data() + h * head_dim, h * q->nb[2] + size(q->ne[1] - 1) * q->nb[1],
                              head_dim * sizeof(float));
    e.sinks = attention->src[4] == nullptr ? std::vector<float>{} : read_all<float>(attention->src[4]);
    e.alibi.clear();
    if (max_bias <= 0) return;
    // As ggml spreads slopes over heads (Press et al. 2022, and their rule where the heads are no power of 2).
    const auto whole = static_cast<std::size_t>(std::exp2(std::floor(std::log2(static_cast<double>(e.heads)))));
    for (std::size_t h = 0; h < e.heads; ++h) {
      const double step = h < whole ? static_cast<double>(h + 1) : static_cast<double>(2 * (h - whole) + 1) / 2;
      e.alibi.push_back(
          static_cast<float>(std::exp2(-static_cast<double>(max_bias) / static_cast<double>(whole) * step)));
    }
  }

  // So that nothing but a score a cell comes to the host. Cells of other sequences, and empty ones, are hidden by the
  // layer's own mask.
  bool rank_on_device(Evidence& e, const ggml_tensor* attention) {
    DeviceGraph graph(devices_.of(&e.keys));
    const auto borrow = [&](const ggml_tensor* t) { return t == nullptr ? nullptr : graph.borrow(t); };
    const auto by_token = [&](ggml_tensor* t) { return ggml_permute(graph.context(), t, 0, 2, 1, 3); };
    ggml_tensor* keys = graph.borrow(&e.keys);
    if (keys->type != GGML_TYPE_F32) keys = ggml_cast(graph.context(), keys, GGML_TYPE_F32);  // or queries are rounded
    const auto scores = fastv::graph::scores(graph.context(), by_token(graph.borrow(attention->src[0])), by_token(keys),
                                             e.scale, e.soft_cap, borrow(attention->src[4]), borrow(attention->src[3]));
    require(scores.status);
    if (!graph.compute(*scores)) return false;
    e.by_cell = read_all<float>(*scores);
    return true;
  }

  Devices& devices_;
  const Layers& layers_;
  std::int32_t layer_;
  std::string last_node_;
  bool every_layer_;
  std::size_t done_ = 0, ranks_at_ = 0;
  std::map<std::int32_t, Evidence> evidence_;  // by layer
};

// Layers from K on, on the tokens that are kept. libllama refuses gaps between positions, so it is told 0, 1, 2, ...
// and what it makes of them is written over before anything runs: RoPE turns by the true positions, and windows and
// ALiBi count from them. Rows are written over in the same way, from where the head left them.
class Tail : public Half {
 public:
  Tail(const Halves& halves, const EngineOptions& options)
      : Half(halves.tail(), options, "layers from K on"), halves_(halves), window_(llama_model_n_swa(halves.tail())) {}

  // The rows from `first` on. positions: true ones, of the first axis; told: as libllama is told them.
  void run(const Rows& rows, std::size_t first, const std::vector<llama_pos>& positions, std::vector<llama_pos> told,
           std::vector<llama_seq_id> sequences, std::vector<std::int8_t> wanted, const Progress& progress, double from,
           double to) {
    positions_ = &positions;
    rows_ = &rows;
    first_ = first;
    filled_ = false;
    blank_.resize(positions.size() * halves_.hidden());
    done_ = count_ = 0;
    progress_ = progress ? Progress([&](double share) { progress(from + (to - from) * share); }) : Progress();
    Half::run({}, blank_.data(), std::move(told), std::move(sequences), std::move(wanted));
    progress_ = {};
    // Else positions may have been written to other tokens than theirs.
    if (done_ + count_ != positions.size() || !filled_)
      throw std::runtime_error(
          "libllama ran the layers from K on in other micro-batches than were looked for: this "
          "architecture is built otherwise than those that were tried");
  }

 private:
  void begin() override {
    done_ += count_;
    count_ = 0;
    written_.clear();
    layers_done_ = 0;
  }

  bool look(ggml_tensor* node, bool ask) override {
    if (is_input(node->name)) {
      // In place of what was made of the rows: scaled, normed or given positions a second time.
      if (!ask) fill(node);
      return true;
    }
    if (ask)
      for (ggml_tensor* source : node->src)
        if (source != nullptr && is_embedding(source) && first_time(source)) fill(source);
    if (!ask) {
      const double rows = static_cast<double>(positions_->size());
      progress_((static_cast<double>(done_) + static_cast<double>(count_) * static_cast<double>(++layers_done_) /
                                                  static_cast<double>(halves_.layers() - halves_.filtering_layer())) /
                rows);
      return true;
    }
    if (node->op == GGML_OP_SET_ROWS) {
      const std::int32_t layer = layer_of_keys(node);
      if (layer < 0) return false;
      count_ = size(node->src[1]->ne[0]);
      if (const bool windowed = is_windowed(layer); first_time(node->src[1])) {
        const auto cells = read_all<std::int64_t>(node->src[1]);
        std::vector<llama_pos>& known = in_cell_[windowed ? 1 : 0];
        for (std::size_t i = 0; i < cells.size(); ++i) {
          if (known.size() <= size(cells[i])) known.resize(size(cells[i]) + 1, 0);
          known[size(cells[i])] = positions_->at(done_ + i);
        }
      }
    } else if (node->op == GGML_OP_ROPE && halves_.position_axes() == 1) {
      ggml_tensor* ids = node->src[1];
      if (ids->type != GGML_TYPE_I32 || root(ids)->op != GGML_OP_NONE) return false;  // no positions of tokens
      count_ = size(ids->ne[0]);
      if (first_time(ids)) ggml_backend_tensor_set(ids, positions_->data() + done_, 0, count_ * sizeof(llama_pos));
    } else if (node->op == GGML_OP_FLASH_ATTN_EXT) {
      correct_mask(node);
    } else if (progress_ && is_rows(node->name)) {
      return true;
    }
    return false;
  }

  bool is_input(const char* name) const { return !halves_.facts().input.empty() && halves_.facts().input == name; }
  // Where libllama puts the embeddings of a call, or the scheduler's copy of it on a device: "embd", "model.embed_tokens",
  // "CUDA0#embd#0", ... by the architecture, but no weight.
  bool is_embedding(const ggml_tensor* tensor) const {
    return tensor->op == GGML_OP_NONE && tensor->type == GGML_TYPE_F32 && tensor->view_src == nullptr &&
           tensor->ne[0] == static_cast<std::int64_t>(halves_.hidden()) &&
           std::strstr(tensor->name, "emb") != nullptr && std::strstr(tensor->name, ".weight") == nullptr;
  }
  void fill(ggml_tensor* tensor) {
    rows_->write(first_ + done_, tensor);
    filled_ = true;
  }
  bool is_rows(const char* name) const {
    const std::string& rows = halves_.facts().rows;
    return std::strncmp(name, rows.c_str(), rows.size()) == 0 && name[rows.size()] == '-';
  }
  bool is_windowed(std::int32_t layer) const {
    const std::size_t i = halves_.filtering_layer() + size(layer);
    return i < halves_.layers() && halves_.facts().all[i].windowed;
  }
  // Layers share what they read: each of it is written once in a micro-batch.
  bool first_time(const ggml_tensor* input) {
    if (std::find(written_.begin(), written_.end(), input) != written_.end()) return false;
    written_.push_back(input);
    return true;
  }

  template <class T, class Seen, class Hidden>
  void correct(ggml_tensor* mask, bool windowed, bool slopes, const Seen& to_seen, const Hidden& is_hidden) {
    std::vector<T> values = read_all<T>(mask);
    const std::vector<llama_pos>& known = in_cell_[windowed ? 1 : 0];
    const std::size_t cells = size(mask->ne[0]);
    const T hidden = to_seen(-INFINITY);
    for (std::size_t row = 0; row < count_; ++row)
      for (std::size_t cell = 0; cell < std::min(cells, known.size()); ++cell) {
        T& value = values[row * cells + cell];
        if (is_hidden(value)) continue;
        const llama_pos at = positions_->at(done_ + row), key = known[cell];
        if (windowed && out_of_window(key, at))
          value = hidden;
        else if (slopes)
          value = to_seen(-std::abs(static_cast<float>(at - key)));
      }
    ggml_backend_tensor_set(mask, values.data(), 0, values.size() * sizeof(T));
  }
  void correct_mask(const ggml_tensor* attention) {
    const std::int32_t layer = layer_of_keys(in_cache(attention->src[1]));
    float max_bias = 0;
    std::memcpy(&max_bias, attention->op_params + 1, sizeof(float));
    const bool windowed = layer >= 0 && is_windowed(layer), slopes = max_bias > 0;
    ggml_tensor* mask = attention->src[3];
    if (mask == nullptr || !(windowed || slopes) || !first_time(mask)) return;
    count_ = size(attention->src[0]->ne[1]);
    if (mask->type == GGML_TYPE_F16)
      correct<ggml_fp16_t>(mask, windowed, slopes, ggml_fp32_to_fp16,
                           [](ggml_fp16_t value) { return std::isinf(ggml_fp16_to_fp32(value)); });
    else
      correct<float>(
          mask, windowed, slopes, [](float value) { return value; }, [](float value) { return std::isinf(value); });
  }
  bool out_of_window(llama_pos key, llama_pos at) const {
    return halves_.facts().chunked ? key < at / window_ * window_ : at - key >= window_;
  }

  const Halves& halves_;
  std::int32_t window_;
  const Rows* rows_ = nullptr;  // of the tokens of this call, from
  std::size_t first_ = 0;       // on
  std::vector<float> blank_;    // what libllama is handed in their place: rows stay where they are
  bool filled_ = false;
  const std::vector<llama_pos>* positions_ = nullptr;  // of them
  std::size_t done_ = 0, count_ = 0;                   // tokens of micro-batches before, and of this one
  std::vector<const ggml_tensor*> written_;
  std::vector<llama_pos> in_cell_[2];  // true positions, by the cell of the cache; [1]: of layers with windows
  Progress progress_;
  std::size_t layers_done_ = 0;
};

}  // namespace llava

// The layers from K on; at K = 0 all of them.
#pragma once

#include <cmath>

#include "half.hpp"

namespace llava {

// Layers from K on, on the tokens that are kept. libllama refuses gaps between positions, so it is told 0, 1, 2, ...
// and what it makes of them is written over before anything runs: RoPE turns by the true positions, and windows and
// ALiBi count from them. Rows are written over in the same way, from where the head left them.
class Tail : public Half {
 public:
  Tail(const Halves& halves, const EngineOptions& options)
      : Half(halves.tail(), options, "layers from K on"), halves_(halves), window_(llama_model_n_swa(halves.tail())) {}

  // What a call reads, one of these.
  struct Input {
    const Rows* rows = nullptr;  // hidden rows, from
    std::size_t first = 0;       // on
    std::vector<llama_token> tokens = {};
    const float* embeddings = nullptr;  // a picture's, [count, Halves::input()]
  };
  // positions: true ones, of the first axis; told: as libllama is told them.
  void run(const Input& input, const std::vector<llama_pos>& positions, std::vector<llama_pos> told,
           std::vector<llama_seq_id> sequences, std::vector<std::int8_t> wanted, const Progress& progress, double from,
           double to) {
    positions_ = &positions;
    rows_ = input.rows;
    first_ = input.first;
    filled_ = rows_ == nullptr;
    if (rows_ != nullptr) blank_.resize(positions.size() * halves_.hidden());
    done_ = count_ = 0;
    progress_ = progress ? Progress([&](double share) { progress(from + (to - from) * share); }) : Progress();
    const float* read = rows_ != nullptr ? blank_.data() : input.embeddings;
    Half::run(input.tokens, read, std::move(told), std::move(sequences), std::move(wanted));
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
    if (rows_ != nullptr && is_input(node->name)) {
      // In place of what was made of the rows: scaled, normed or given positions a second time.
      if (!ask) fill(node);
      return true;
    }
    if (ask && rows_ != nullptr)
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
    } else if (reads_positions(node) && halves_.position_axes() == 1) {
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

  // Positions that are turned by, or looked up.
  static bool reads_positions(const ggml_tensor* node) {
    return node->op == GGML_OP_ROPE ||
           (node->op == GGML_OP_GET_ROWS && std::strstr(node->src[0]->name, "position_embd.weight") != nullptr);
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
  const Rows* rows_ = nullptr;  // see Input
  std::size_t first_ = 0;
  std::vector<float> blank_;  // what libllama is handed in their place: rows stay where they are
  bool filled_ = false;
  const std::vector<llama_pos>* positions_ = nullptr;  // of them
  std::size_t done_ = 0, count_ = 0;                   // tokens of micro-batches before, and of this one
  std::vector<const ggml_tensor*> written_;
  std::vector<llama_pos> in_cell_[2];  // true positions, by the cell of the cache; [1]: of layers with windows
  Progress progress_;
  std::size_t layers_done_ = 0;
};

}  // namespace llava

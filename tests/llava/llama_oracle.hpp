// llama.cpp itself, unmodified, as the oracle of the engine's tests and as the rival of its benchmark: a whole model
// run by llama_decode, and FastV inside it by masking.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.hpp"

namespace oracle {

class Llama {
 public:
  // piece: llama.cpp's n_ubatch. context: tokens of the KV cache. masks: hide_all_but() will be called.
  Llama(const std::string& path, int threads, std::size_t context, std::size_t piece, bool masks = true,
        ggml_type cache = GGML_TYPE_F16, bool flash = true) {
    llama_log_set(
        [](ggml_log_level level, const char* text, void*) {
          if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
        },
        nullptr);
    model_.reset(llama_model_load_from_file(path.c_str(), llama_model_default_params()));
    if (!model_) throw std::runtime_error("libllama cannot load " + path);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<std::uint32_t>(context);
    params.n_batch = static_cast<std::uint32_t>(context);
    params.n_ubatch = static_cast<std::uint32_t>(piece);
    params.n_threads = params.n_threads_batch = threads;
    params.flash_attn_type = flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.type_k = params.type_v = cache;
    params.swa_full = masks;  // so that cell i of every cache is position i of the prompt
    params.cb_eval = masks ? &Llama::on_node : nullptr;
    params.cb_eval_user_data = this;
    context_.reset(llama_init_from_model(model_.get(), params));
    if (!context_) throw std::runtime_error("libllama makes no context for " + path);
    width_ = static_cast<std::size_t>(llama_vocab_n_tokens(llama_model_get_vocab(model_.get())));
  }

  // From layer K on, keys at prompt positions that are not in `kept` are hidden, at the prefill and at every step.
  void hide_all_but(std::size_t filtering_layer, const std::vector<fastv::Index>& kept, std::size_t tokens) {
    dropped_.assign(tokens, true);
    for (const fastv::Index index : kept) dropped_[index] = false;
    masked_ahead_ = filtering_layer == 0;
    masked_behind_ = masked_ahead_ ? "" : "l_out-" + std::to_string(filtering_layer - 1);
  }

  // The map of a layer is kept, without flash attention, and its keys: last_row() gives the row of the last token, the mean
  // over heads, by the cell of the cache; head_rows() the same of each head; keys() those of all tokens, [tokens, G * c].
  void watch(std::size_t layer) {
    watched_ = "kq_soft_max-" + std::to_string(layer);
    watched_keys_ = "Kcur-" + std::to_string(layer);
  }
  const std::vector<double>& last_row() const { return last_row_; }
  const std::vector<std::vector<float>>& head_rows() const { return head_rows_; }
  const std::vector<float>& keys() const { return keys_; }

  // Logits behind the last token of a prompt, whose pieces go in as llama.cpp's own programs hand them over.
  std::vector<float> prefill(const llava::Prompt& prompt) {
    llama_memory_clear(llama_get_memory(context_.get()), true);
    keys_.clear();
    return append(prompt);
  }
  // The same behind what is there.
  std::vector<float> append(const llava::Prompt& prompt) {
    next_position_ = prompt.next_position;
    std::vector<float> logits;
    for (const llava::Piece& piece : prompt.pieces) {
      std::vector<llama_token> tokens = piece.tokens;
      std::vector<float> rows = piece.rows;
      std::vector<llama_pos> positions = piece.positions;
      llama_set_causal_attn(context_.get(), piece.causal);
      logits = run({static_cast<std::int32_t>(piece.count), rows.empty() ? tokens.data() : nullptr,
                    rows.empty() ? nullptr : rows.data(), positions.data(), nullptr, nullptr, nullptr},
                   piece.count);
    }
    llama_set_causal_attn(context_.get(), true);
    return logits;
  }
  std::vector<float> decode(llama_token token) {
    llama_pos position = next_position_++;
    return run({1, &token, nullptr, &position, nullptr, nullptr, nullptr}, 1);
  }

 private:
  std::vector<float> run(llama_batch batch, std::size_t tokens) {
    std::vector<std::int32_t> sequences(tokens, 1);
    llama_seq_id sequence = 0;
    std::vector<llama_seq_id*> ids(tokens, &sequence);
    std::vector<std::int8_t> wanted(tokens, 0);
    wanted.back() = 1;
    batch.n_seq_id = sequences.data();
    batch.seq_id = ids.data();
    batch.logits = wanted.data();
    masks_.clear();
    new_keys_.clear();
    if (const int status = llama_decode(context_.get(), batch))
      throw std::runtime_error("llama_decode returns " + std::to_string(status));
    keys_.insert(keys_.end(), new_keys_.begin(), new_keys_.end());
    const float* logits = llama_get_logits_ith(context_.get(), -1);
    return {logits, logits + width_};
  }

  static bool on_node(ggml_tensor* node, bool ask, void* self) { return static_cast<Llama*>(self)->look_at(node, ask); }
  bool look_at(ggml_tensor* node, bool ask) {
    if (!watched_.empty() && node->name == watched_) {
      if (ask) return true;
      std::vector<float> map(static_cast<std::size_t>(ggml_nelements(node)));  // [H, tokens, cells]
      ggml_backend_tensor_get(node, map.data(), 0, ggml_nbytes(node));
      const auto cells = static_cast<std::size_t>(node->ne[0]), rows = static_cast<std::size_t>(node->ne[1]),
                 heads = static_cast<std::size_t>(node->ne[2]);
      last_row_.assign(cells, 0);
      head_rows_.clear();
      for (std::size_t h = 0; h < heads; ++h) {
        const auto row = map.begin() + static_cast<std::ptrdiff_t>((h * rows + rows - 1) * cells);
        head_rows_.emplace_back(row, row + static_cast<std::ptrdiff_t>(cells));
        for (std::size_t cell = 0; cell < cells; ++cell)
          last_row_[cell] +=
              static_cast<double>(map[(h * rows + rows - 1) * cells + cell]) / static_cast<double>(heads);
      }
      return true;
    }
    // Several nodes have the name: the last is what goes into the cache.
    if (!watched_keys_.empty() && node->name == watched_keys_ && ggml_is_contiguous(node)) {
      if (ask) return true;
      new_keys_.resize(static_cast<std::size_t>(ggml_nelements(node)));
      ggml_backend_tensor_get(node, new_keys_.data(), 0, ggml_nbytes(node));
      return true;
    }
    ggml_tensor* mask = node->op == GGML_OP_FLASH_ATTN_EXT ? node->src[3]
                        : node->op == GGML_OP_SOFT_MAX     ? node->src[1]
                                                           : nullptr;
    if (mask != nullptr && std::find(masks_.begin(), masks_.end(), mask) == masks_.end()) {
      masks_.push_back(mask);
      if (masked_ahead_) hide_in(mask);
    }
    const bool here = !masked_behind_.empty() && node->name == masked_behind_;
    if (ask || !here) return ask ? here : true;
    // A mask, [keys, rows], serves all layers of its kind, with windows or without: rewritten between layers K-1 and
    // K, it holds from K on.
    for (ggml_tensor* each : masks_) hide_in(each);
    return true;
  }
  void hide_in(ggml_tensor* mask) const {
    if (mask->type == GGML_TYPE_F32)  // without flash attention
      hide<float>(mask, -INFINITY);
    else
      hide<ggml_fp16_t>(mask, ggml_fp32_to_fp16(-INFINITY));
  }
  template <class T>
  void hide(ggml_tensor* mask, T hidden) const {
    std::vector<T> values(ggml_nbytes(mask) / sizeof(T));
    ggml_backend_tensor_get(mask, values.data(), 0, ggml_nbytes(mask));
    const auto keys = static_cast<std::size_t>(mask->ne[0]);
    for (std::size_t row = 0; row * keys < values.size(); ++row)
      for (std::size_t key = 0; key < dropped_.size() && key < keys; ++key)
        if (dropped_[key]) values[row * keys + key] = hidden;
    ggml_backend_tensor_set(mask, values.data(), 0, ggml_nbytes(mask));
  }

  llava::LlamaModel model_;
  llava::LlamaContext context_;
  std::size_t width_ = 0;
  llama_pos next_position_ = 0;
  std::vector<bool> dropped_;
  bool masked_ahead_ = false;
  std::string masked_behind_, watched_, watched_keys_;
  std::vector<double> last_row_;
  std::vector<std::vector<float>> head_rows_;
  std::vector<float> keys_, new_keys_;
  std::vector<ggml_tensor*> masks_;
};

}  // namespace oracle

// A context of libllama whose graphs are looked at, and written over, while they run: see head.hpp and tail.hpp.
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>
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

}  // namespace llava

// A model as libllama runs it in two halves, the layers below K and those from K on, each of them an unmodified llama_model
// of the same file. At K = 0 there is no head, and the tail is the whole model.
#pragma once

#include <llama.h>

#include <fastv/cost.hpp>
#include <functional>

#include "layers.hpp"

namespace llava {

// Called with the share of a task that is done, 0 to 1.
using Progress = std::function<void(double)>;

struct ModelDeleter {
  void operator()(llama_model* model) const { llama_model_free(model); }
};
using LlamaModel = std::unique_ptr<llama_model, ModelDeleter>;
struct ContextDeleter {
  void operator()(llama_context* context) const { llama_free(context); }
};
using LlamaContext = std::unique_ptr<llama_context, ContextDeleter>;

struct LoadOptions {
  std::optional<std::uint32_t> filtering_layer;  // K; if not given, the smallest from 2 on that can be
  int gpu_layers = -1;                           // -ngl: layers on a GPU, from the last on; negative: all
  std::vector<std::string> servers;              // --rpc: machines that carry layers as a GPU would, HOST:PORT
};

class Halves {
 public:
  // Throws std::runtime_error or std::invalid_argument with one sentence.
  explicit Halves(const std::string& path, const LoadOptions& options = {}, const Progress& progress = {});

  std::uint32_t filtering_layer() const { return k_; }
  std::size_t layers() const { return layers_.all.size(); }
  const Layers& facts() const { return layers_; }
  const std::string& path() const { return file_.path(); }
  const std::string& architecture() const { return file_.architecture(); }

  bool has_head() const { return head_ != nullptr; }
  llama_model* head() const { return head_ ? head_.get() : tail_.get(); }  // whichever reads the prompt
  llama_model* tail() const { return tail_.get(); }
  const llama_vocab* vocabulary() const { return llama_model_get_vocab(tail_.get()); }

  // Some of its layers keep a state, which cannot go back.
  bool recurrent() const { return llama_model_is_hybrid(tail_.get()) || llama_model_is_recurrent(tail_.get()); }
  std::size_t hidden() const { return hidden_; }  // d, the width of a hidden row
  std::size_t input() const { return input_; }    // of a visual token as the projector makes it; d, or more (DeepStack)
  std::size_t position_axes() const { return axes_; }  // 4 with M-RoPE, else 1
  fastv::ModelShape cost_shape() const { return shape_; }

 private:
  ModelFile file_;
  Layers layers_;
  std::uint32_t k_;
  LlamaModel head_, tail_;
  std::size_t hidden_ = 0, input_ = 0, axes_ = 1;
  fastv::ModelShape shape_{};
};

}  // namespace llava

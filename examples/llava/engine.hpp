// Runs a decoder with ggml, and prunes visual tokens where FastV does: layers below K on the whole prompt, the others,
// and all of decoding, on what is kept. The KV cache has a length per layer.
//
// Shapes: n prompt tokens, m kept tokens, t tokens of a piece, d width, H query heads, G KV heads, c head dimension, v
// vocabulary.
#pragma once

#include <fastv/ggml.hpp>

#include "model.hpp"

namespace llava {

// A prompt as the decoder reads it: text and pictures alike as embeddings.
struct Prompt {
  std::vector<float> embeddings;         // [n, d]
  std::vector<std::int32_t> positions;   // [axes, n], an axis after the other; M-RoPE has 4
  std::vector<fastv::TokenSpan> visual;  // sorted; empty for text alone
  std::int32_t next_position = 0;        // of the first decoded token

  std::size_t tokens = 0;  // n
};

// How pruning is done; the kept tokens are the same.
enum class PruneBy {
  graph,          // nodes of the one graph of the whole prefill (default)
  between_graphs  // two graphs, and fastv::Pruner on host memory between them
};

struct EngineOptions {
  ggml_type cache_type = GGML_TYPE_F16;  // of K and V: F16 or Q8_0
  std::size_t piece = 512;               // tokens that go through the layers at a time (llama.cpp's n_ubatch)
  PruneBy prune_by = PruneBy::graph;
};

// A sequence's KV cache.
class Cache {
 public:
  // Room for what the plan says and `generated` tokens more, layer by layer.
  Cache(const Model& model, const Backends& backends, const fastv::Plan& plan, std::size_t generated, ggml_type type);

  std::size_t length(std::size_t layer) const { return layers_[layer].length; }
  std::size_t bytes() const;  // allocated

 private:
  friend class Engine;
  struct Layer {
    ggml_tensor *keys, *values;  // [G c, capacity]
    std::size_t length = 0;
    std::size_t capacity = 0;  // a multiple of the flash attention's step
  };
  ggml_context_ptr context_;
  ggml_backend_buffer_ptr buffer_;
  std::vector<Layer> layers_;
  std::int32_t next_position_ = 0;
};

struct Prefill {
  std::vector<float> logits;               // [v] behind the last prompt token
  std::vector<fastv::Index> kept;          // prompt positions that the last layer ran on, ascending
  std::vector<std::vector<float>> scores;  // per stage: [tokens of that stage], where they were ranked by scores
  double seconds = 0;                      // from the embeddings to the logits
};

class Engine {
 public:
  Engine(const Model& model, const Backends& backends, const EngineOptions& options = {})
      : model_(model), backends_(backends), options_(options) {}

  // Rows of the embedding matrix: [t] -> [t, d].
  std::vector<float> embed(const std::vector<std::int32_t>& tokens) const;

  // All lengths, before anything runs; throws std::invalid_argument with what is wrong with the settings.
  fastv::Plan plan(const Prompt& prompt, const std::vector<fastv::Config>& schedule) const;

  // A cache for one prompt and up to `generated` decoded tokens.
  Cache cache(const fastv::Plan& plan, std::size_t generated) const {
    return {model_, backends_, plan, generated, options_.cache_type};
  }

  // Runs the prompt into an empty cache. progress: share of the layers that have run.
  Prefill prefill(const Prompt& prompt, const std::vector<fastv::Config>& schedule, Cache& cache,
                  const Progress& progress = {}) const;

  // Feeds one token; returns the logits [v] of the next.
  std::vector<float> decode(std::int32_t token, Cache& cache) const;

 private:
  class Graph;

  Prefill prefill_between_graphs(const Prompt& prompt, const std::vector<fastv::Config>& schedule, Cache& cache,
                                 const Progress& progress) const;

  const Model& model_;
  const Backends& backends_;
  EngineOptions options_;
};

}  // namespace llava

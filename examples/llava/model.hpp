// The decoder of a GGUF file: its weights in the memory of the devices that will multiply by them. Architectures differ
// in how q, k and v are stored and in biases; a layer holds whatever the file has.
#pragma once

#include <functional>

#include "backends.hpp"
#include "shape.hpp"

namespace llava {

struct Layer {
  ggml_tensor *attention_norm, *ffn_norm;                                    // [d]
  ggml_tensor *qkv, *query, *key, *value, *output;                           // qkv: all three in one, or null
  ggml_tensor *qkv_bias, *query_bias, *key_bias, *value_bias, *output_bias;  // null where there is none
  ggml_tensor *gate, *up, *down;
  ggml_tensor* rope_factors;  // Llama 3; null elsewhere
};

// share: of the bytes that have been loaded, 0 to 1.
using Progress = std::function<void(double share)>;

class Model {
 public:
  Model(const std::string& path, const Backends& backends, const Progress& progress = {});

  const Shape& shape() const { return shape_; }
  const std::vector<Layer>& layers() const { return layers_; }
  ggml_tensor* token_embeddings() const { return token_embeddings_; }  // [d, v]
  ggml_tensor* output_norm() const { return output_norm_; }
  ggml_tensor* output() const { return output_; }
  ggml_tensor* output_bias() const { return output_bias_; }

 private:
  class Loader;

  GgufFile file_;
  Shape shape_;
  std::vector<ggml_context_ptr> contexts_;
  std::vector<ggml_backend_buffer_ptr> buffers_;
  std::vector<Layer> layers_;
  ggml_tensor *token_embeddings_, *output_norm_, *output_, *output_bias_;
};

}  // namespace llava

#include "model.hpp"

#include <stdexcept>

namespace llava {

// Puts each tensor where its operation runs: first all of them are placed, then each buffer is filled.
class Model::Loader {
 public:
  Loader(Model& model, const Backends& backends, const Progress& progress)
      : model_(model), backends_(backends), progress_(progress), scratch_(ggml_init({1 << 20, nullptr, true})) {}

  enum class Use { multiply, lookup, add };  // matrix product, rows of it, or element by element

  ggml_tensor* tensor(const std::string& name, const std::vector<std::int64_t>& shape, Use use) {
    const GgufFile::Tensor stored = model_.file_.tensor(name);
    if (stored.shape != shape)
      throw std::runtime_error(model_.file_.path() + ": the tensor " + name + " is " + text(stored.shape) +
                               " but the model's sizes make it " + text(shape));
    for (ggml_backend_buffer_type_t buffer : backends_.weight_buffers()) {
      if (!runs(stored, use, buffer)) continue;
      Place& place = place_of(buffer);
      ggml_tensor* made = ggml_new_tensor(place.context, stored.type, static_cast<int>(shape.size()), shape.data());
      ggml_set_name(made, name.c_str());
      place.tensors.push_back({made, stored});
      bytes_ += stored.bytes;
      return made;
    }
    throw std::runtime_error(model_.file_.path() + ": the tensor " + name + " is of type " +
                             ggml_type_name(stored.type) + ", which no device of this build of ggml multiplies by");
  }
  ggml_tensor* optional(const std::string& name, const std::vector<std::int64_t>& shape, Use use) {
    return model_.file_.has_tensor(name) ? tensor(name, shape, use) : nullptr;
  }

  void fill() {
    for (Place& place : places_) {
      if (place.buffer == ggml_backend_cpu_buffer_type()) {
        // Left where the file is mapped.
        model_.buffers_.emplace_back(ggml_backend_cpu_buffer_from_ptr(model_.file_.data(), model_.file_.size()));
        ggml_backend_buffer_set_usage(model_.buffers_.back().get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        for (const auto& [tensor, stored] : place.tensors) {
          ggml_backend_tensor_alloc(model_.buffers_.back().get(), tensor, const_cast<void*>(stored.data));
          report(stored.bytes);
        }
        continue;
      }
      model_.buffers_.emplace_back(ggml_backend_alloc_ctx_tensors_from_buft(place.context, place.buffer));
      if (!model_.buffers_.back())
        throw std::runtime_error(model_.file_.path() + ": there is no memory for its weights on " +
                                 ggml_backend_buft_name(place.buffer));
      ggml_backend_buffer_set_usage(model_.buffers_.back().get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
      for (const auto& [tensor, stored] : place.tensors) {
        ggml_backend_tensor_set(tensor, stored.data, 0, stored.bytes);
        report(stored.bytes);
      }
    }
  }

 private:
  struct Place {
    ggml_backend_buffer_type_t buffer;
    ggml_context* context;
    std::vector<std::pair<ggml_tensor*, GgufFile::Tensor>> tensors;
  };

  static std::string text(const std::vector<std::int64_t>& shape) {
    std::string out;
    for (const std::int64_t n : shape) out += (out.empty() ? "[" : ", ") + std::to_string(n);
    return out + "]";
  }

  Place& place_of(ggml_backend_buffer_type_t buffer) {
    for (Place& place : places_)
      if (place.buffer == buffer) return place;
    const std::size_t most = static_cast<std::size_t>(model_.shape_.layers) * 16 + 8;
    model_.contexts_.emplace_back(ggml_init({most * ggml_tensor_overhead(), nullptr, true}));
    places_.push_back({buffer, model_.contexts_.back().get(), {}});
    return places_.back();
  }

  // Whether the operation that this weight is for runs on it in that buffer.
  bool runs(const GgufFile::Tensor& stored, Use use, ggml_backend_buffer_type_t buffer) {
    ggml_reset(scratch_.get());
    ggml_context* ctx = scratch_.get();
    ggml_tensor* weight = ggml_new_tensor(ctx, stored.type, static_cast<int>(stored.shape.size()), stored.shape.data());
    const std::int64_t rows = 512;
    ggml_tensor* op = nullptr;
    switch (use) {
      case Use::multiply:
        op = ggml_mul_mat(ctx, weight, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, weight->ne[0], rows));
        break;
      case Use::lookup: op = ggml_get_rows(ctx, weight, ggml_new_tensor_1d(ctx, GGML_TYPE_I32, rows)); break;
      case Use::add: op = ggml_add(ctx, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, weight->ne[0], rows), weight); break;
    }
    const ggml_backend_buffer_ptr empty(ggml_backend_buft_alloc_buffer(buffer, 0));
    weight->buffer = empty.get();
    return backends_.supports(buffer, op);
  }

  void report(std::size_t bytes) {
    done_ += bytes;
    if (progress_) progress_(static_cast<double>(done_) / static_cast<double>(bytes_));
  }

  Model& model_;
  const Backends& backends_;
  const Progress& progress_;
  ggml_context_ptr scratch_;
  std::vector<Place> places_;
  std::size_t bytes_ = 0, done_ = 0;
};

Model::Model(const std::string& path, const Backends& backends, const Progress& progress)
    : file_(path), shape_(shape_of(file_)) {
  using Use = Loader::Use;
  Loader loader(*this, backends, progress);
  const std::int64_t d = shape_.hidden, q = shape_.heads * shape_.head_dim, kv = shape_.kv_heads * shape_.head_dim,
                     f = shape_.ffn;
  const std::vector<std::int64_t> embeddings = file_.tensor("token_embd.weight").shape;
  shape_.vocabulary = embeddings.size() > 1 ? embeddings[1] : 1;
  const std::int64_t v = shape_.vocabulary;

  token_embeddings_ = loader.tensor("token_embd.weight", {d, v}, Use::lookup);
  output_norm_ = loader.tensor("output_norm.weight", {d}, Use::add);
  output_ =
      loader.tensor(file_.has_tensor("output.weight") ? "output.weight" : "token_embd.weight", {d, v}, Use::multiply);
  output_bias_ = loader.optional("output.bias", {v}, Use::add);
  ggml_tensor* rope_factors = loader.optional("rope_freqs.weight", {shape_.rope_dims / 2}, Use::add);
  for (std::int64_t i = 0; i < shape_.layers; ++i) {
    const std::string block = "blk." + std::to_string(i) + ".";
    const auto weight = [&](const char* name, std::int64_t in, std::int64_t out) {
      return loader.tensor(block + name + ".weight", {in, out}, Use::multiply);
    };
    const auto bias = [&](const char* name, std::int64_t n) {
      return loader.optional(block + name + ".bias", {n}, Use::add);
    };
    Layer layer{};
    layer.attention_norm = loader.tensor(block + "attn_norm.weight", {d}, Use::add);
    layer.ffn_norm = loader.tensor(block + "ffn_norm.weight", {d}, Use::add);
    if (file_.has_tensor(block + "attn_qkv.weight")) {
      layer.qkv = weight("attn_qkv", d, q + 2 * kv);
      layer.qkv_bias = bias("attn_qkv", q + 2 * kv);
    } else {
      layer.query = weight("attn_q", d, q);
      layer.key = weight("attn_k", d, kv);
      layer.value = weight("attn_v", d, kv);
      layer.query_bias = bias("attn_q", q);
      layer.key_bias = bias("attn_k", kv);
      layer.value_bias = bias("attn_v", kv);
    }
    layer.output = weight("attn_output", q, d);
    layer.output_bias = bias("attn_output", d);
    layer.gate = weight("ffn_gate", d, f);
    layer.up = weight("ffn_up", d, f);
    layer.down = weight("ffn_down", f, d);
    layer.rope_factors = rope_factors;
    layers_.push_back(layer);
  }
  loader.fill();
}

}  // namespace llava

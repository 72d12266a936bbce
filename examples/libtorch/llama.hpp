// A LLaMA in LibTorch that prunes in its own loop through <fastv/torch.hpp>: RMSNorm, rotate-half RoPE, grouped-query
// attention, SwiGLU, a KV cache with a length per layer. Modules and parameters bear their Hugging Face names.
//
// Shapes: n prompt tokens, m kept tokens, t tokens of this call, s tokens in a cache, d hidden width, H query heads,
// G KV heads, c head dimension. One sequence: every tensor of states has a batch of 1 in front.
#pragma once

#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <cmath>
#include <fastv/torch_device.hpp>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.hpp"

namespace libtorch {

inline void require(const fastv::Status& status) {
  if (!status) throw std::runtime_error(std::string("fastv: ") + status.message().c_str());
}

// How the pruner gets at the attention of layer K-1, and what the kept tokens are moved by.
enum class Path {
  query_key,             // views of the last query and the keys in the cache; rows compacted in place (CPU)
  probabilities,         // a view of the attention map; rows compacted in place (CPU)
  device_query_key,      // ATen operations on the tensors' own device
  device_probabilities,  //
};

struct Cache {
  torch::Tensor keys, values;  // [1, G, s, c] after RoPE
  std::int64_t length() const { return keys.defined() ? keys.size(2) : 0; }
};

// One sequence: a cache per layer, and where it stands.
struct Sequence {
  std::vector<Cache> layers;       // lengths n + generated below layer K, m + generated from K on
  std::int64_t next_position = 0;  // the next token's, the same in every layer: dropped tokens count
};

// What a layer leaves for the pruner.
struct Evidence {
  torch::Tensor query, attention;  // [1, H, t, c] after RoPE; [1, H, t, s]
};

struct PruneOptions {
  fastv::Config config;
  std::vector<fastv::TokenSpan> visual;
  Path path = Path::query_key;
  // Called after each layer with its output, before any pruning; called with the kept indices.
  std::function<void(std::size_t layer, const torch::Tensor& hidden)> on_hidden = {};
  std::function<void(const torch::Tensor& kept)> on_kept = {};
};

struct RmsNormImpl : torch::nn::Module {
  RmsNormImpl(std::int64_t width, double epsilon) : eps(epsilon) {
    weight = register_parameter("weight", torch::ones(width));
  }
  torch::Tensor forward(const torch::Tensor& x) { return x * torch::rsqrt(x.square().mean(-1, true) + eps) * weight; }
  double eps;
  torch::Tensor weight;
};
TORCH_MODULE(RmsNorm);

inline torch::nn::Linear linear(std::int64_t in, std::int64_t out) {
  return torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(false));
}

// Pairs (i, i + c / 2) of x [1, heads, t, c] turned by positions [t] times theta^(-2 i / c).
inline torch::Tensor rope(const torch::Tensor& x, const torch::Tensor& positions, double theta) {
  const std::int64_t half = x.size(-1) / 2;
  const torch::Tensor frequencies = torch::pow(theta, torch::arange(half, x.options()) / -static_cast<double>(half));
  const torch::Tensor angles = positions.to(x.scalar_type()).unsqueeze(1) * frequencies;  // [t, c / 2]
  const torch::Tensor cosine = angles.cos(), sine = angles.sin(), a = x.narrow(-1, 0, half),
                      b = x.narrow(-1, half, half);
  return torch::cat({a * cosine - b * sine, b * cosine + a * sine}, -1);
}

struct AttentionImpl : torch::nn::Module {
  explicit AttentionImpl(const reference::DecoderConfig& config)
      : heads(static_cast<std::int64_t>(config.shape.heads)),
        kv_heads(static_cast<std::int64_t>(config.shape.kv_heads)),
        dim(static_cast<std::int64_t>(config.shape.head_dim)),
        theta(static_cast<double>(config.rope_theta)) {
    const auto width = static_cast<std::int64_t>(config.shape.hidden);
    q_proj = register_module("q_proj", linear(width, heads * dim));
    k_proj = register_module("k_proj", linear(width, kv_heads * dim));
    v_proj = register_module("v_proj", linear(width, kv_heads * dim));
    o_proj = register_module("o_proj", linear(heads * dim, width));
  }
  // x [1, t, d] -> [1, t, d]; appends to the cache.
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& positions, Cache& cache, Evidence& evidence) {
    const std::int64_t t = x.size(1);
    const auto by_head = [&](const torch::Tensor& y, std::int64_t count) {  // [1, t, count c] -> [1, count, t, c]
      return y.view({1, t, count, dim}).transpose(1, 2);
    };
    evidence.query = rope(by_head(q_proj(x), heads), positions, theta);
    const torch::Tensor key = rope(by_head(k_proj(x), kv_heads), positions, theta),
                        value = by_head(v_proj(x), kv_heads);
    cache.keys = cache.keys.defined() ? torch::cat({cache.keys, key}, 2) : key;
    cache.values = cache.values.defined() ? torch::cat({cache.values, value}, 2) : value;

    const std::int64_t s = cache.length(), group = heads / kv_heads;
    torch::Tensor logits = evidence.query.matmul(cache.keys.repeat_interleave(group, 1).transpose(2, 3)) * scale();
    // Kept tokens stay in order, so the mask of a pruned sequence is the plain triangle of its own length.
    logits = logits + torch::full({t, s}, -std::numeric_limits<float>::infinity(), logits.options()).triu(s - t + 1);
    evidence.attention = logits.softmax(-1);
    const torch::Tensor out = evidence.attention.matmul(cache.values.repeat_interleave(group, 1));  // [1, H, t, c]
    return o_proj(out.transpose(1, 2).reshape({1, t, heads * dim}));
  }
  double scale() const { return 1 / std::sqrt(static_cast<double>(dim)); }

  std::int64_t heads, kv_heads, dim;
  double theta;
  torch::nn::Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, o_proj{nullptr};
};
TORCH_MODULE(Attention);

struct MlpImpl : torch::nn::Module {
  MlpImpl(std::int64_t width, std::int64_t inner) {
    gate_proj = register_module("gate_proj", linear(width, inner));
    up_proj = register_module("up_proj", linear(width, inner));
    down_proj = register_module("down_proj", linear(inner, width));
  }
  torch::Tensor forward(const torch::Tensor& x) { return down_proj(torch::silu(gate_proj(x)) * up_proj(x)); }
  torch::nn::Linear gate_proj{nullptr}, up_proj{nullptr}, down_proj{nullptr};
};
TORCH_MODULE(Mlp);

struct LayerImpl : torch::nn::Module {
  explicit LayerImpl(const reference::DecoderConfig& config) {
    const auto width = static_cast<std::int64_t>(config.shape.hidden);
    const auto eps = static_cast<double>(config.rms_norm_eps);
    input_layernorm = register_module("input_layernorm", RmsNorm(width, eps));
    self_attn = register_module("self_attn", Attention(config));
    post_attention_layernorm = register_module("post_attention_layernorm", RmsNorm(width, eps));
    mlp = register_module("mlp", Mlp(width, static_cast<std::int64_t>(config.shape.intermediate)));
  }
  torch::Tensor forward(torch::Tensor x, const torch::Tensor& positions, Cache& cache, Evidence& evidence) {
    x = x + self_attn(input_layernorm(x), positions, cache, evidence);
    return x + mlp(post_attention_layernorm(x));
  }
  RmsNorm input_layernorm{nullptr}, post_attention_layernorm{nullptr};
  Attention self_attn{nullptr};
  Mlp mlp{nullptr};
};
TORCH_MODULE(Layer);

struct BackboneImpl : torch::nn::Module {
  explicit BackboneImpl(const reference::DecoderConfig& config) {
    const auto width = static_cast<std::int64_t>(config.shape.hidden);
    embed_tokens = register_module("embed_tokens",
                                   torch::nn::Embedding(static_cast<std::int64_t>(config.shape.vocabulary), width));
    layers = register_module("layers", torch::nn::ModuleList());
    for (std::size_t i = 0; i < config.shape.layers; ++i) layers->push_back(Layer(config));
    norm = register_module("norm", RmsNorm(width, static_cast<double>(config.rms_norm_eps)));
  }
  torch::nn::Embedding embed_tokens{nullptr};
  torch::nn::ModuleList layers{nullptr};
  RmsNorm norm{nullptr};
};
TORCH_MODULE(Backbone);

struct LlamaImpl : torch::nn::Module {
  explicit LlamaImpl(const reference::DecoderConfig& config) {
    model = register_module("model", Backbone(config));
    lm_head = register_module("lm_head", linear(static_cast<std::int64_t>(config.shape.hidden),
                                                static_cast<std::int64_t>(config.shape.vocabulary)));
  }

  // A prompt [1, n, d] into an empty sequence -> the last layer's output [1, m, d] ([1, n, d] where nothing is pruned).
  torch::Tensor prefill(torch::Tensor hidden, Sequence& sequence, const PruneOptions* prune = nullptr) {
    sequence.layers.resize(model->layers->size());
    const std::int64_t n = hidden.size(1);
    torch::Tensor positions = torch::arange(n, torch::TensorOptions(hidden.device()).dtype(torch::kLong));
    sequence.next_position = n;
    fastv::Pruner<float> pruner(prune == nullptr ? fastv::Config{} : prune->config);
    if (prune != nullptr)
      require(pruner.plan({static_cast<std::size_t>(n), sequence.layers.size(), prune->visual}).status);
    Evidence evidence;
    for (std::size_t layer = 0; layer < sequence.layers.size(); ++layer) {
      hidden = run_layer(layer, hidden, positions, sequence, evidence);
      if (prune == nullptr) continue;
      if (prune->on_hidden) prune->on_hidden(layer, hidden);
      if (pruner.due(layer + 1)) drop_tokens(*prune, pruner, evidence, sequence.layers[layer], hidden, positions);
    }
    return hidden;
  }

  // Feeds one token; returns the logits [vocabulary] of the next.
  torch::Tensor decode(std::int64_t token, Sequence& sequence) {
    const auto whole = torch::TensorOptions(lm_head->weight.device()).dtype(torch::kLong);
    torch::Tensor hidden = model->embed_tokens(torch::full({1, 1}, token, whole));
    const torch::Tensor position = torch::full({1}, sequence.next_position++, whole);
    Evidence evidence;
    for (std::size_t layer = 0; layer < sequence.layers.size(); ++layer)
      hidden = run_layer(layer, hidden, position, sequence, evidence);
    return logits(hidden).view({-1});
  }

  // [1, t, d] -> [1, t, vocabulary]
  torch::Tensor logits(const torch::Tensor& hidden) { return lm_head(model->norm(hidden)); }

  Backbone model{nullptr};
  torch::nn::Linear lm_head{nullptr};

 private:
  torch::Tensor run_layer(std::size_t layer, const torch::Tensor& hidden, const torch::Tensor& positions,
                          Sequence& sequence, Evidence& evidence) {
    return model->layers->ptr<LayerImpl>(layer)->forward(hidden, positions, sequence.layers[layer], evidence);
  }

  // FastV: K layers have run; hidden [1, n, d] and positions [n] shrink to the kept tokens. The caches of the layers
  // that have run stay whole, those of the layers to come will hold the kept tokens only.
  void drop_tokens(const PruneOptions& prune, fastv::Pruner<float>& pruner, const Evidence& evidence,
                   const Cache& cache, torch::Tensor& hidden, torch::Tensor& positions) {
    const double scale = model->layers->ptr<LayerImpl>(0)->self_attn->scale();
    const bool by_map = prune.path == Path::probabilities || prune.path == Path::device_probabilities;
    torch::Tensor indices;
    if (prune.path == Path::query_key || prune.path == Path::probabilities) {
      const fastv::Kept kept =
          by_map ? pruner.prune(fastv::probabilities(evidence.attention), prune.visual)
                 : pruner.prune(fastv::query_key(evidence.query, cache.keys, static_cast<float>(scale)), prune.visual);
      require(fastv::compact(kept, hidden, 1));
      require(fastv::compact(kept, positions, 0));
      indices = *fastv::kept_tensor(kept, hidden);
    } else {
      const auto kept = by_map ? fastv::device::prune(prune.config, evidence.attention, prune.visual)
                               : fastv::device::prune(prune.config, evidence.query, cache.keys, scale, prune.visual);
      require(kept.status);
      hidden = hidden.index_select(1, *kept);
      positions = positions.index_select(0, *kept);
      indices = *kept;
    }
    if (prune.on_kept) prune.on_kept(indices);
  }
};
TORCH_MODULE(Llama);

}  // namespace libtorch

// The reference decoder: a LLaMA-family transformer on Eigen that prunes in its own layer loop, with fastv's public
// API and nothing else. RMSNorm, rotate-half RoPE, grouped-query attention, optional QKV bias (Qwen), SwiGLU, a KV
// cache with a length per layer, greedy decoding. It is written to be read and to be right; it is the slow oracle of
// the tests.
//
// Shapes: n prompt tokens, m kept tokens, t tokens of this call, d hidden width, H query heads, G KV heads, c head
// dimension. One row per token.
#pragma once

#include <fastv/eigen.hpp>
#include <functional>
#include <limits>
#include <numeric>

#include "ops.hpp"

namespace reference {

struct DecoderConfig {
  fastv::ModelShape shape;
  float rms_norm_eps = 1e-6f;
  float rope_theta = 10000;
};

// The fields of a Hugging Face config.json (of its text_config, in a LLaVA).
inline DecoderConfig decoder_config(const nlohmann::json& json) {
  const auto positive = [&](const char* field) {
    const auto value = json.at(field).get<std::int64_t>();
    if (value <= 0 || value > (1 << 24))
      throw std::runtime_error(std::string("config: ") + field + " is " + std::to_string(value) +
                               ", which is no size of a decoder");
    return static_cast<std::size_t>(value);
  };
  const auto optional = [&](const char* field, std::size_t otherwise) {
    return json.contains(field) && !json[field].is_null() ? positive(field) : otherwise;
  };
  DecoderConfig config;
  fastv::ModelShape& s = config.shape;
  s = {positive("num_hidden_layers"),
       positive("hidden_size"),
       positive("num_attention_heads"),
       0,
       0,
       positive("intermediate_size"),
       3,
       positive("vocab_size")};
  s.kv_heads = optional("num_key_value_heads", s.heads);
  s.head_dim = optional("head_dim", s.hidden / s.heads);
  if (s.heads % s.kv_heads != 0 || s.head_dim == 0 || s.head_dim % 2 != 0)
    throw std::runtime_error("config: " + std::to_string(s.heads) + " heads of dimension " +
                             std::to_string(s.head_dim) + " with " + std::to_string(s.kv_heads) +
                             " KV heads: heads must be a multiple of KV heads, and the dimension even");
  if (json.value("hidden_act", "silu") != "silu")
    throw std::runtime_error("config: hidden_act is " + json["hidden_act"].dump() + " but only \"silu\" is known");
  if (json.contains("rope_scaling") && !json["rope_scaling"].is_null())
    throw std::runtime_error("config: rope_scaling is set but not supported");
  config.rms_norm_eps = json.value("rms_norm_eps", 1e-6f);
  config.rope_theta = json.value("rope_theta", 10000.0f);
  return config;
}

// One sequence: its KV cache, and where it stands.
struct Sequence {
  struct LayerCache {
    Matrix keys, values;      // [capacity, G c], the first `length` rows in use
    Eigen::Index length = 0;  // layers below K: n + t; layers from K on: m + t
  };
  std::vector<LayerCache> layers;
  std::int64_t next_position = 0;  // position id of the next token, the same in every layer
  std::uint64_t macs = 0;          // multiply-adds spent so far

  // Mask mode: layers from `masked_from` on do not see these keys (-infinity, or 0 where they do).
  std::size_t masked_from = std::numeric_limits<std::size_t>::max();
  RowVector mask;
};

enum class Mode {
  once,    // drop tokens after layer K of the prefill, and decode on the shorter cache
  mask,    // run every token through every layer, but hide the dropped ones' keys from layer K on: the slow oracle
  re_rank  // no cache: every decoding step runs the whole sequence again and prunes it anew, by the newest token's row
};

enum class EvidenceKind { query_key, probabilities };

// What to prune, and what to look at on the way. Every field may stay as it is: no pruning, no looking.
struct PrefillOptions {
  fastv::Pruner<float>* pruner = nullptr;
  std::vector<fastv::TokenSpan> visual = {};
  Mode mode = Mode::once;
  EvidenceKind evidence = EvidenceKind::query_key;
  // Called after each layer with its output [t, d], before any pruning.
  std::function<void(std::size_t layer, const Matrix& hidden)> on_hidden = {};
  // Called with each layer's attention probabilities [H, t, keys].
  std::function<void(std::size_t layer, const fastv::Probabilities<float>&)> on_attention = {};
  // Called once with what the pruner kept.
  std::function<void(const fastv::Kept&)> on_kept = {};
};

class Decoder {
 public:
  // Weights by their Hugging Face names, each after `prefix` ("language_model." in a LLaVA). Source: Tensors or
  // RandomWeights.
  template <class Source>
  Decoder(const DecoderConfig& config, const Source& tensors, const std::string& prefix = "") : config_(config) {
    const auto width = [](std::size_t n) { return static_cast<Eigen::Index>(n); };
    const fastv::ModelShape& s = config.shape;
    const Eigen::Index d = width(s.hidden), q = width(s.heads * s.head_dim), kv = width(s.kv_heads * s.head_dim),
                       f = width(s.intermediate), v = width(s.vocabulary);
    const std::string model = prefix + "model.";
    embeddings_ = tensors.matrix(model + "embed_tokens.weight", v, d);
    final_norm_ = tensors.matrix(model + "norm.weight", 1, d);
    const std::string head = prefix + "lm_head.weight";
    head_ = tensors.has(head) ? tensors.matrix(head, v, d) : embeddings_;  // tied where there is none
    for (std::size_t i = 0; i < s.layers; ++i) {
      const std::string layer = model + "layers." + std::to_string(i) + ".";
      const auto weight = [&](const char* name, Eigen::Index rows, Eigen::Index columns) {
        return tensors.matrix(layer + name + ".weight", rows, columns);
      };
      const auto bias = [&](const char* name, Eigen::Index columns) {
        const std::string full = layer + name + ".bias";
        return tensors.has(full) ? tensors.matrix(full, 1, columns) : Matrix(Matrix::Zero(1, columns));
      };
      layers_.push_back({weight("input_layernorm", 1, d), weight("post_attention_layernorm", 1, d),
                         weight("self_attn.q_proj", q, d), weight("self_attn.k_proj", kv, d),
                         weight("self_attn.v_proj", kv, d), weight("self_attn.o_proj", d, q),
                         weight("mlp.gate_proj", f, d), weight("mlp.up_proj", f, d), weight("mlp.down_proj", d, f),
                         bias("self_attn.q_proj", q), bias("self_attn.k_proj", kv), bias("self_attn.v_proj", kv)});
    }
  }

  const fastv::ModelShape& shape() const { return config_.shape; }

  // [t] token ids -> [t, d]
  Matrix embed(const std::vector<int>& tokens) const {
    Matrix out(static_cast<Eigen::Index>(tokens.size()), embeddings_.cols());
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] < 0 || tokens[i] >= embeddings_.rows())
        throw std::out_of_range("token " + std::to_string(tokens[i]) + " is not among the " +
                                std::to_string(embeddings_.rows()) + " of the vocabulary");
      out.row(static_cast<Eigen::Index>(i)) = embeddings_.row(tokens[i]);
    }
    return out;
  }

  // Runs a prompt [n, d] into an empty sequence. Returns the last layer's output: [m, d] once pruned, [n, d] else.
  Matrix prefill(Matrix hidden, Sequence& sequence, const PrefillOptions& options = {}) const {
    sequence = Sequence{};
    sequence.layers.resize(layers_.size());
    std::vector<std::int64_t> positions(static_cast<std::size_t>(hidden.rows()));
    std::iota(positions.begin(), positions.end(), std::int64_t{0});
    sequence.next_position = hidden.rows();

    const std::size_t prune_before =
        options.pruner == nullptr ? layers_.size() : planned(*options.pruner, options, hidden);
    LayerRun run;
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
      if (options.pruner != nullptr && options.pruner->due(layer)) {  // `layer` layers have run
        const fastv::Kept kept = prune(*options.pruner, options, sequence, layer, run);
        if (options.on_kept) options.on_kept(kept);
        if (options.mode == Mode::mask) {
          hide_dropped(kept, layer, sequence);
        } else {
          require(fastv::compact_rows(kept, hidden));
          require(fastv::compact(kept, fastv::Span<std::int64_t>(positions)));
          positions.resize(kept.size());
        }
      }
      run.keep_map =
          options.on_attention || (layer + 1 == prune_before && options.evidence == EvidenceKind::probabilities);
      run_layer(layer, hidden, positions, sequence, run);
      if (options.on_attention)
        options.on_attention(layer, map_view(run, hidden.rows(), sequence.layers[layer].length));
      if (options.on_hidden) options.on_hidden(layer, hidden);
    }
    return hidden;
  }

  // Feeds one token; returns the logits [1, vocabulary] of the next.
  RowVector decode(int token, Sequence& sequence) const {
    Matrix hidden = embed({token});
    const std::vector<std::int64_t> positions{sequence.next_position++};
    LayerRun run;
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) run_layer(layer, hidden, positions, sequence, run);
    return logits(hidden, sequence);
  }

  // Final norm and output head: hidden states [t, d] -> [t, vocabulary].
  Matrix logits(const Matrix& hidden, Sequence& sequence) const {
    return multiply(rms_norm(hidden, final_norm_, config_.rms_norm_eps), head_, sequence);
  }

 private:
  struct Layer {
    Matrix attention_norm, ffn_norm;          // [1, d]
    Matrix query, key, value, output;         // [H c, d], [G c, d], [G c, d], [d, H c]
    Matrix gate, up, down;                    // [f, d], [f, d], [d, f]
    Matrix query_bias, key_bias, value_bias;  // [1, H c], [1, G c], [1, G c]; zero where the model has none
  };

  // What scoring needs of the layer that has just run.
  struct LayerRun {
    bool keep_map = false;
    Matrix query;  // [t, H c], after RoPE
    Matrix map;    // [H t, keys] probabilities, where keep_map asks for them
  };

  static void require(const fastv::Status& status) {
    if (!status) throw std::runtime_error(std::string("fastv: ") + status.message().c_str());
  }

  // K, after the settings have been checked against this model.
  std::size_t planned(const fastv::Pruner<float>& pruner, const PrefillOptions& options, const Matrix& hidden) const {
    require(pruner.plan({static_cast<std::size_t>(hidden.rows()), layers_.size(), options.visual}).status);
    return pruner.config().filtering_layer;
  }

  // x w^T, counted.
  template <class X, class W>
  static Matrix multiply(const X& x, const W& w, Sequence& sequence) {
    sequence.macs += static_cast<std::uint64_t>(x.rows() * x.cols() * w.rows());
    return linear(x, w);
  }

  void run_layer(std::size_t index, Matrix& hidden, const std::vector<std::int64_t>& positions, Sequence& sequence,
                 LayerRun& run) const {
    const Layer& w = layers_[index];
    const auto c = static_cast<Eigen::Index>(config_.shape.head_dim);

    Matrix x = rms_norm(hidden, w.attention_norm, config_.rms_norm_eps);         // [t, d]
    run.query = multiply(x, w.query, sequence).rowwise() + w.query_bias.row(0);  // [t, H c]
    Matrix key = multiply(x, w.key, sequence).rowwise() + w.key_bias.row(0);     // [t, G c]
    const Matrix value = multiply(x, w.value, sequence).rowwise() + w.value_bias.row(0);
    rope(run.query, positions, c, config_.rope_theta);
    rope(key, positions, c, config_.rope_theta);
    append(sequence.layers[index], key, value);

    hidden += multiply(attend(index, sequence, run), w.output, sequence);  // [t, d]
    x = rms_norm(hidden, w.ffn_norm, config_.rms_norm_eps);
    const Matrix gated = silu(multiply(x, w.gate, sequence)).cwiseProduct(multiply(x, w.up, sequence));  // [t, f]
    hidden += multiply(gated, w.down, sequence);
  }

  static void append(Sequence::LayerCache& cache, const Matrix& key, const Matrix& value) {
    const Eigen::Index needed = cache.length + key.rows();
    if (cache.keys.rows() < needed) {
      const Eigen::Index capacity = cache.length == 0 ? needed + 32 : 2 * needed;
      cache.keys.conservativeResize(capacity, key.cols());
      cache.values.conservativeResize(capacity, key.cols());
    }
    cache.keys.middleRows(cache.length, key.rows()) = key;
    cache.values.middleRows(cache.length, key.rows()) = value;
    cache.length = needed;
  }

  // softmax(q k^T / sqrt(c)) v, head by head; query head h reads KV head h / (H / G). -> [t, H c]
  Matrix attend(std::size_t index, Sequence& sequence, LayerRun& run) const {
    const Sequence::LayerCache& cache = sequence.layers[index];
    const auto heads = static_cast<Eigen::Index>(config_.shape.heads),
               group = static_cast<Eigen::Index>(config_.shape.heads / config_.shape.kv_heads),
               c = static_cast<Eigen::Index>(config_.shape.head_dim), t = run.query.rows(), keys = cache.length;
    Matrix out(t, heads * c);
    if (run.keep_map) run.map.resize(heads * t, keys);
    for (Eigen::Index head = 0; head < heads; ++head) {
      const auto k = cache.keys.block(0, head / group * c, keys, c);                  // [keys, c]
      const auto v = cache.values.block(0, head / group * c, keys, c);                // [keys, c]
      Matrix p = multiply(run.query.middleCols(head * c, c), k, sequence) * scale();  // [t, keys]
      constexpr float hidden_key = -std::numeric_limits<float>::infinity();
      for (Eigen::Index i = 0; i < t; ++i) p.row(i).tail(t - 1 - i).setConstant(hidden_key);  // causal
      if (index >= sequence.masked_from) p.leftCols(sequence.mask.cols()).rowwise() += sequence.mask;
      softmax_rows(p);
      out.middleCols(head * c, c) = multiply(p, v.transpose(), sequence);
      if (run.keep_map) run.map.middleRows(head * t, t) = p;
    }
    return out;
  }

  float scale() const { return 1.0f / std::sqrt(static_cast<float>(config_.shape.head_dim)); }

  fastv::Probabilities<float> map_view(const LayerRun& run, Eigen::Index t, Eigen::Index keys) const {
    return fastv::probabilities(run.map.data(), config_.shape.heads, static_cast<std::size_t>(t),
                                static_cast<std::size_t>(keys));
  }

  // Before `layer` runs, by the attention of the layer ahead of it.
  fastv::Kept prune(fastv::Pruner<float>& pruner, const PrefillOptions& options, const Sequence& sequence,
                    std::size_t layer, const LayerRun& run) const {
    const auto tokens = static_cast<std::size_t>(sequence.next_position);
    const fastv::Kept kept = [&] {
      if (layer == 0) return pruner.prune(fastv::NoEvidence{tokens}, options.visual);
      if (options.evidence == EvidenceKind::probabilities)
        return pruner.prune(map_view(run, run.query.rows(), sequence.next_position), options.visual);
      return pruner.prune(fastv::query_key(run.query, sequence.layers[layer - 1].keys, tokens, config_.shape.heads,
                                           config_.shape.kv_heads, scale()),
                          options.visual);
    }();
    require(kept.status);
    return kept;
  }

  static void hide_dropped(const fastv::Kept& kept, std::size_t layer, Sequence& sequence) {
    sequence.masked_from = layer;
    sequence.mask = RowVector::Constant(sequence.next_position, -std::numeric_limits<float>::infinity());
    for (const fastv::Index index : kept) sequence.mask[index] = 0;
  }

  DecoderConfig config_;
  Matrix embeddings_, final_norm_, head_;
  std::vector<Layer> layers_;
};

inline int argmax(const RowVector& logits) {
  Eigen::Index best = 0;
  logits.maxCoeff(&best);
  return static_cast<int>(best);
}

// One step of greedy decoding: the logits [1, vocabulary] behind the token, and the sequence before it is fed.
struct Step {
  int token;
  const RowVector& logits;
  const Sequence& sequence;
};

// Greedy decoding of a prompt [n, d], up to `steps` tokens or the first for which on_step returns false.
inline std::vector<int> generate(const Decoder& decoder, Matrix prompt, std::size_t steps,
                                 const PrefillOptions& options, Sequence& sequence,
                                 const std::function<bool(const Step&)>& on_step = {}) {
  std::vector<int> tokens;
  Matrix hidden = decoder.prefill(prompt, sequence, options);
  RowVector logits = decoder.logits(hidden.bottomRows(1), sequence);
  while (tokens.size() < steps) {
    tokens.push_back(argmax(logits));
    if (on_step && !on_step({tokens.back(), logits, sequence})) break;
    if (tokens.size() == steps) break;
    if (options.mode == Mode::re_rank) {
      prompt.conservativeResize(prompt.rows() + 1, prompt.cols());
      prompt.bottomRows(1) = decoder.embed({tokens.back()});
      hidden = decoder.prefill(prompt, sequence, options);
      logits = decoder.logits(hidden.bottomRows(1), sequence);
    } else {
      logits = decoder.decode(tokens.back(), sequence);
    }
  }
  return tokens;
}

}  // namespace reference

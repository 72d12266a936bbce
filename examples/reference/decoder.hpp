// The reference decoder: a LLaMA-family transformer on Eigen that prunes in its own layer loop, with fastv's public
// API and nothing else: see prefill(). RMSNorm, rotate-half RoPE, grouped-query attention, optional QKV bias (Qwen),
// SwiGLU, a KV cache with a length per layer, greedy decoding. It is written to be read and to be right.
//
// Shapes: n prompt tokens, m kept tokens, t tokens of this call, d hidden width, H query heads, G KV heads, c head
// dimension. One row per token.
#pragma once

#include <limits>

#include "evidence.hpp"

namespace reference {

// How a prompt is pruned, and what of it stays.
struct Pruning {
  fastv::Pruner<float> pruner;
  std::vector<fastv::TokenSpan> visual;             // positions within this prompt
  EvidenceKind evidence = EvidenceKind::query_key;  // what it scores by
  fastv::Kept kept = {};                            // of the last prefill
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

  const DecoderConfig& config() const { return config_; }
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

  // Runs a prompt [n, d] behind what the sequence already holds (a new one, or earlier turns), and prunes it after layer
  // K. Returns the last layer's output [m, d].
  Matrix prefill(Matrix hidden, Sequence& sequence, Pruning& pruning) const {
    auto& [pruner, visual, evidence, stayed] = pruning;
    std::vector<std::int64_t> positions = next_positions(hidden.rows(), sequence);
    require(pruner.plan({positions.size(), layers_.size(), visual}).status);

    const auto shorten = [&](const fastv::Kept& kept) {
      require(fastv::compact(kept, hidden));
      require(fastv::compact(kept, positions));
      positions.resize(kept.size());
      return kept;
    };
    LayerRun run;
    run.keep_map = evidence == EvidenceKind::probabilities;
    if (pruner.due(0)) stayed = shorten(pruner.prune(fastv::NoEvidence{positions.size()}, visual));
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
      run_layer(layer, hidden, positions, sequence, run);
      if (pruner.due(layer + 1))
        stayed = shorten(prune_by(evidence, pruner, visual, config_, run, hidden, sequence.layers[layer]));
    }
    return hidden;
  }

  // The same without pruning: [n, d].
  Matrix prefill(Matrix hidden, Sequence& sequence) const {
    const std::vector<std::int64_t> positions = next_positions(hidden.rows(), sequence);
    LayerRun run;
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) run_layer(layer, hidden, positions, sequence, run);
    return hidden;
  }

  // Feeds one token; returns the logits [1, vocabulary] of the next.
  RowVector decode(int token, Sequence& sequence) const { return logits(prefill(embed({token}), sequence), sequence); }

  // Final norm and output head: hidden states [t, d] -> [t, vocabulary].
  Matrix logits(const Matrix& hidden, Sequence& sequence) const {
    return multiply(rms_norm(hidden, final_norm_, config_.rms_norm_eps), head_, sequence);
  }

  // ---- for loops of other shapes: chunks, several stages, masks ---------------------------------

  // Position ids of a sequence's next rows.
  std::vector<std::int64_t> next_positions(Eigen::Index rows, Sequence& sequence) const {
    sequence.layers.resize(layers_.size());
    std::vector<std::int64_t> positions(static_cast<std::size_t>(rows));
    std::iota(positions.begin(), positions.end(), sequence.next_position);
    sequence.next_position += rows;
    return positions;
  }

  // One layer on rows [t, d], in place; their keys and values go behind those of the sequence.
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

 private:
  struct Layer {
    Matrix attention_norm, ffn_norm;          // [1, d]
    Matrix query, key, value, output;         // [H c, d], [G c, d], [G c, d], [d, H c]
    Matrix gate, up, down;                    // [f, d], [f, d], [d, f]
    Matrix query_bias, key_bias, value_bias;  // [1, H c], [1, G c], [1, G c]; zero where the model has none
  };

  // x w^T, counted.
  template <class X, class W>
  static Matrix multiply(const X& x, const W& w, Sequence& sequence) {
    sequence.macs += static_cast<std::uint64_t>(x.rows() * x.cols() * w.rows());
    return linear(x, w);
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
      const auto k = cache.keys.block(0, head / group * c, keys, c);                            // [keys, c]
      const auto v = cache.values.block(0, head / group * c, keys, c);                          // [keys, c]
      Matrix p = multiply(run.query.middleCols(head * c, c), k, sequence) * scale_of(config_);  // [t, keys]
      constexpr float hidden_key = -std::numeric_limits<float>::infinity();
      for (Eigen::Index i = 0; i < t; ++i) p.row(i).tail(t - 1 - i).setConstant(hidden_key);  // causal
      if (cache.mask.cols() > 0) p.leftCols(cache.mask.cols()).rowwise() += cache.mask;       // mask mode
      softmax_rows(p);
      out.middleCols(head * c, c) = multiply(p, v.transpose(), sequence);
      if (run.keep_map) run.map.middleRows(head * t, t) = p;
    }
    return out;
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

// Greedy decoding behind a prefill, whose last row of logits is given: up to `steps` tokens, or to the token `end`.
inline std::vector<int> generate(const Decoder& decoder, RowVector logits, std::size_t steps, Sequence& sequence,
                                 int end = -1) {
  std::vector<int> tokens;
  while (tokens.size() < steps) {
    tokens.push_back(argmax(logits));
    if (tokens.back() == end || tokens.size() == steps) break;
    logits = decoder.decode(tokens.back(), sequence);
  }
  return tokens;
}

}  // namespace reference

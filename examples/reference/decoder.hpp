// The reference decoder: a LLaMA-family transformer on Eigen that prunes in its own layer loop, with fastv's public
// API and nothing else. RMSNorm, rotate-half RoPE, grouped-query attention, optional QKV bias (Qwen), SwiGLU, a KV
// cache with a length per layer, greedy decoding. It is written to be read and to be right; it is the slow oracle of
// the tests.
//
// Shapes: n prompt tokens, m kept tokens, t tokens of this call, d hidden width, H query heads, G KV heads, c head
// dimension. One row per token.
#pragma once

#include <functional>
#include <limits>

#include "evidence.hpp"

namespace reference {

enum class Mode {
  once,         // drop tokens after layer K of the prefill, and decode on the shorter cache
  mask,         // run every token through every layer, but hide the dropped ones' keys from layer K on: the slow oracle
  mask_anew,    // mask, and every decoding step hides what its own ranking drops: re-ranking over a full cache
  prefill_anew  // no cache: every decoding step runs the whole sequence again and prunes it by the newest token's row
};

// What to prune, and what to look at on the way. Every field may stay as it is: no pruning, no looking.
struct PrefillOptions {
  std::vector<fastv::Pruner<float>*> stages = {};  // filtering layers ascending
  std::vector<fastv::TokenSpan> visual = {};       // positions within this prompt
  Mode mode = Mode::once;
  EvidenceKind evidence = EvidenceKind::query_key;
  // Chunked prefill: rows run at a time, 0 for all. The layers below each stage run for every chunk before the stage.
  Eigen::Index chunk = 0;
  // Called after each layer with its output [t, d], before any pruning.
  std::function<void(std::size_t layer, const Matrix& hidden)> on_hidden = {};
  // Called with each layer's attention probabilities [H, t, keys].
  std::function<void(std::size_t layer, const fastv::Probabilities<float>&)> on_attention = {};
  // Called after each stage with what its pruner kept.
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

  // Runs a prompt [n, d] behind what the sequence already holds (a new one, or earlier turns). Returns the last layer's
  // output: [m, d] once pruned, [n, d] else.
  Matrix prefill(Matrix hidden, Sequence& sequence, const PrefillOptions& options = {}) const {
    sequence.layers.resize(layers_.size());
    std::vector<std::int64_t> positions(static_cast<std::size_t>(hidden.rows()));
    std::iota(positions.begin(), positions.end(), sequence.next_position);
    sequence.next_position += hidden.rows();
    check_plan(options, hidden);

    std::vector<fastv::TokenSpan> visual = options.visual;
    LayerRun run;
    for (std::size_t begin = 0; begin < layers_.size();) {
      std::size_t end = layers_.size();  // of the layers that run before the next stage
      for (fastv::Pruner<float>* pruner : options.stages) {
        if (pruner->due(begin)) {  // `begin` layers have run
          const fastv::Kept kept = prune_by(options.evidence, *pruner, visual, config_, run, hidden,
                                            begin == 0 ? nullptr : &sequence.layers[begin - 1]);
          if (options.on_kept) options.on_kept(kept);
          if (options.mode == Mode::mask || options.mode == Mode::mask_anew) {
            hide_dropped(kept, hidden.rows(), begin, sequence);
          } else {
            require(fastv::compact_rows(kept, hidden));
            require(fastv::compact(kept, fastv::Span<std::int64_t>(positions)));
            positions.resize(kept.size());
            const auto left = fastv::remaining(kept.indices, std::vector<fastv::TokenSpan>(visual), visual);
            require(left.status);
            visual.resize(*left);
          }
        }
        if (pruner->config().filtering_layer > begin) end = (std::min)(end, pruner->config().filtering_layer);
      }
      run_layers(begin, end, hidden, positions, sequence, options, run);
      begin = end;
    }
    return hidden;
  }

  // Feeds one token; returns the logits [1, vocabulary] of the next. options: those of the prefill, for
  // Mode::mask_anew.
  RowVector decode(int token, Sequence& sequence, const PrefillOptions& options = {}) const {
    Matrix hidden = embed({token});
    const std::vector<std::int64_t> positions{sequence.next_position++};
    LayerRun run;
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
      for (fastv::Pruner<float>* pruner : options.stages)
        if (options.mode == Mode::mask_anew && pruner->due(layer)) rank_anew(*pruner, options, layer, sequence, run);
      run_layer(layer, hidden, positions, sequence, run);
    }
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

  // The settings against this model and this prompt, before anything runs.
  void check_plan(const PrefillOptions& options, const Matrix& hidden) const {
    std::vector<fastv::Config> schedule;
    for (const fastv::Pruner<float>* pruner : options.stages) schedule.push_back(pruner->config());
    std::vector<fastv::TokenSpan> scratch(options.visual.size());
    std::vector<fastv::Index> quotas(options.visual.size());
    require(fastv::make_plan(schedule, {static_cast<std::size_t>(hidden.rows()), layers_.size(), options.visual},
                             scratch, quotas)
                .status);
  }

  // Layers begin .. end - 1 on every row of hidden, a chunk of rows after the other.
  void run_layers(std::size_t begin, std::size_t end, Matrix& hidden, const std::vector<std::int64_t>& positions,
                  Sequence& sequence, const PrefillOptions& options, LayerRun& run) const {
    const Eigen::Index chunk = options.chunk == 0 ? hidden.rows() : options.chunk;
    for (Eigen::Index first = 0; first < hidden.rows(); first += chunk) {
      const Eigen::Index rows = (std::min)(chunk, hidden.rows() - first);
      Matrix part = hidden.middleRows(first, rows);  // [t, d]
      const std::vector<std::int64_t> part_positions(positions.begin() + first, positions.begin() + first + rows);
      for (std::size_t layer = begin; layer < end; ++layer) {
        run.keep_map = options.on_attention || (layer + 1 == end && options.evidence == EvidenceKind::probabilities);
        run_layer(layer, part, part_positions, sequence, run);
        if (options.on_attention)
          options.on_attention(layer, map_view(config_, run, rows, sequence.layers[layer].length));
        if (options.on_hidden) options.on_hidden(layer, part);
      }
      hidden.middleRows(first, rows) = part;
    }
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

  // Ranks the visual tokens by the newest token's row in layer - 1, and hides the dropped ones from it in `layer` and
  // those behind. For sequences of one prompt.
  void rank_anew(fastv::Pruner<float>& pruner, const PrefillOptions& options, std::size_t layer, Sequence& sequence,
                 const LayerRun& run) const {
    const auto keys = static_cast<std::size_t>(sequence.layers[layer - 1].length);
    const auto evidence = fastv::query_key(run.query, sequence.layers[layer - 1].keys, keys, config_.shape.heads,
                                           config_.shape.kv_heads, scale_of(config_));
    const fastv::Kept kept = require(pruner.prune(evidence, options.visual));
    if (options.on_kept) options.on_kept(kept);
    RowVector mask(static_cast<Eigen::Index>(keys));
    require(fastv::keep_bias(kept.indices, keys, {mask.data(), keys}, -std::numeric_limits<float>::infinity()));
    for (; layer < layers_.size(); ++layer) sequence.layers[layer].mask = mask;
  }

  // Layers from `layer` on do not see the dropped ones of this prompt's `rows` keys.
  static void hide_dropped(const fastv::Kept& kept, Eigen::Index rows, std::size_t layer, Sequence& sequence) {
    for (; layer < sequence.layers.size(); ++layer) {
      Sequence::LayerCache& cache = sequence.layers[layer];
      // A stage behind the first finds this prompt's mask in place; the layer itself has not run yet.
      const Eigen::Index past = cache.length;
      RowVector mask = RowVector::Zero(past + rows);
      mask.head((std::min)(past, cache.mask.cols())) = cache.mask.head((std::min)(past, cache.mask.cols()));
      mask.tail(rows).setConstant(-std::numeric_limits<float>::infinity());
      for (const fastv::Index index : kept) mask[past + index] = 0;
      cache.mask = mask;
    }
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
    if (options.mode == Mode::prefill_anew) {
      sequence = Sequence{};
      prompt.conservativeResize(prompt.rows() + 1, prompt.cols());
      prompt.bottomRows(1) = decoder.embed({tokens.back()});
      hidden = decoder.prefill(prompt, sequence, options);
      logits = decoder.logits(hidden.bottomRows(1), sequence);
    } else {
      logits = decoder.decode(tokens.back(), sequence, options);
    }
  }
  return tokens;
}

}  // namespace reference

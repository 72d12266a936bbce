// What the reference decoder hands to the pruner: a sequence's caches and the layer that has just run, seen as each
// kind of evidence.
#pragma once

#include <fastv/eigen.hpp>
#include <fastv/fastv.hpp>
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
    const std::int64_t value = whole_number(json, field);
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
    RowVector mask;           // mask mode: -infinity for keys this layer does not see, 0 for the others; may be shorter
  };
  std::vector<LayerCache> layers;
  std::int64_t next_position = 0;  // position id of the next token, the same in every layer
  std::uint64_t macs = 0;          // multiply-adds spent so far
};

// What a stage scores by; see fastv/scorers.hpp.
enum class EvidenceKind {
  query_key,       // the last rows' queries and the keys in the cache (default)
  probabilities,   // the attention map
  rope_free,       // queries and keys with their rotation undone
  value_weighted,  // probabilities times the length of the value
  text_raters,     // the mean over those text rows behind the pictures that are relevant to them
  keys_only        // the keys' lengths: no query at all
};

// What scoring needs of the layer that has just run, on the rows of its last chunk.
struct LayerRun {
  bool keep_map = false;
  Matrix query;  // [t, H c], after RoPE
  Matrix map;    // [H t, keys] probabilities, where keep_map asks for them
};

inline void require(const fastv::Status& status) {
  if (!status) throw std::runtime_error(std::string("fastv: ") + status.message().c_str());
}
inline fastv::Kept require(const fastv::Kept& kept) {
  require(kept.status);
  return kept;
}

inline float scale_of(const DecoderConfig& config) {
  return 1.0f / std::sqrt(static_cast<float>(config.shape.head_dim));
}

inline fastv::Probabilities<float> map_view(const DecoderConfig& config, const LayerRun& run, Eigen::Index t,
                                            Eigen::Index keys) {
  return fastv::probabilities(run.map.data(), config.shape.heads, static_cast<std::size_t>(t),
                              static_cast<std::size_t>(keys));
}

// RoPE-free: queries and keys with their rotation undone. For a sequence without gaps in its position ids below this
// layer, as prefill() gives them: key j stands at position j.
inline fastv::Kept prune_rope_free(fastv::Pruner<float>& pruner, const fastv::QueryKey<float>& rotated,
                                   const std::vector<fastv::TokenSpan>& visual, const DecoderConfig& config,
                                   const LayerRun& run) {
  const std::size_t c = config.shape.head_dim, heads = config.shape.heads, rows = rotated.rows;
  std::vector<float> frequencies(c / 2);
  for (std::size_t i = 0; i < c / 2; ++i)
    frequencies[i] = 1.0f / std::pow(config.rope_theta, static_cast<float>(2 * i) / static_cast<float>(c));
  std::vector<fastv::Index> positions(rotated.keys);
  std::iota(positions.begin(), positions.end(), fastv::Index{0});
  std::vector<float> keys(rotated.kv_heads * rotated.keys * c), queries(heads * rows * c);
  require(fastv::unrotate(fastv::keys_of(rotated), fastv::Rope{frequencies, positions}, fastv::Span<float>(keys)));
  const fastv::Span<const fastv::Index> last(positions.data() + (rotated.keys - rows), rows);
  require(fastv::unrotate(fastv::head_vectors(run.query.data(), heads, rows, c, fastv::KvLayout::token_major),
                          fastv::Rope{frequencies, last}, fastv::Span<float>(queries)));
  fastv::QueryKey<float> evidence = rotated;
  evidence.query = queries.data();  // [H, rows, c]
  evidence.query_head_stride = static_cast<std::ptrdiff_t>(rows * c);
  evidence.query_row_stride = static_cast<std::ptrdiff_t>(c);
  evidence.key = keys.data();  // [G, keys, c]
  evidence.key_head_stride = static_cast<std::ptrdiff_t>(rotated.keys * c);
  evidence.key_token_stride = static_cast<std::ptrdiff_t>(c);
  return require(pruner.prune(evidence, visual));
}

// Text raters: the rows behind the last picture whose hidden states are relevant to the pictures.
inline fastv::Kept prune_by_raters(fastv::Pruner<float>& pruner, const fastv::QueryKey<float>& evidence,
                                   const std::vector<fastv::TokenSpan>& visual, const Matrix& hidden) {
  if (visual.empty()) return require(pruner.prune(evidence, visual));
  const auto tokens = static_cast<std::size_t>(hidden.rows()), width = static_cast<std::size_t>(hidden.cols());
  const std::size_t behind = visual.back().first + visual.back().count;
  std::vector<fastv::Index> rows(tokens - behind);
  std::vector<float> room(2 * rows.size());
  const auto raters =
      fastv::text_raters(hidden.data(), tokens, width, width, visual, {behind, tokens - behind}, rows, room);
  require(raters.status);
  rows.resize(*raters);
  fastv::Config config = pruner.config();
  config.score_rows = fastv::ScoreRows::listed;
  config.listed_rows = rows;
  std::vector<float> scores(fastv::visual_tokens(visual)), scratch(fastv::score_scratch(evidence));
  require(fastv::score<float>(config, evidence, visual, fastv::Span<float>(scores), fastv::Span<float>(scratch)));
  return require(pruner.prune(fastv::Scores<float>{scores, tokens}, visual));
}

// Prunes by the layer that has just run and its cache (null before the first layer). hidden: that layer's output on
// this prompt's tokens [n, d]; the cache may hold earlier turns in front of them.
inline fastv::Kept prune_by(EvidenceKind kind, fastv::Pruner<float>& pruner,
                            const std::vector<fastv::TokenSpan>& visual, const DecoderConfig& config,
                            const LayerRun& run, const Matrix& hidden, const Sequence::LayerCache* cache) {
  const auto tokens = static_cast<std::size_t>(hidden.rows());
  if (cache == nullptr) return require(pruner.prune(fastv::NoEvidence{tokens}, visual));
  const std::size_t past = static_cast<std::size_t>(cache->length) - tokens;
  if (kind == EvidenceKind::probabilities) {
    auto evidence = map_view(config, run, run.query.rows(), cache->length);
    evidence.past = past;
    return require(pruner.prune(evidence, visual));
  }

  auto evidence = fastv::query_key(run.query, cache->keys, past + tokens, config.shape.heads, config.shape.kv_heads,
                                   scale_of(config));
  evidence.past = past;
  RowVector mask = RowVector::Zero(cache->mask.cols() > 0 ? cache->length : 0);  // of an earlier stage in mask mode
  mask.head(cache->mask.cols()) = cache->mask;
  evidence.bias = {mask.data(), static_cast<std::size_t>(mask.size())};
  std::vector<float> norms;
  switch (kind) {
    case EvidenceKind::query_key:
    case EvidenceKind::probabilities: break;
    case EvidenceKind::rope_free: return prune_rope_free(pruner, evidence, visual, config, run);
    case EvidenceKind::text_raters: return prune_by_raters(pruner, evidence, visual, hidden);
    case EvidenceKind::keys_only:
      return require(pruner.prune(fastv::KeysOnly<float>{fastv::keys_of(evidence), past}, visual));
    case EvidenceKind::value_weighted: {
      norms.resize(config.shape.kv_heads * fastv::visual_tokens(visual));
      fastv::HeadVectors<float> values = fastv::keys_of(evidence);
      values.data = cache->values.data();
      require(fastv::value_norms(values, visual, fastv::Span<float>(norms), past));
      evidence.value_norms = norms;
      break;
    }
  }
  return require(pruner.prune(evidence, visual));
}

}  // namespace reference

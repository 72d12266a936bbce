// What the reference decoder hands to the pruner: a sequence's caches and the layer that has just run, seen as each
// kind of evidence.
#pragma once

#include <fastv/eigen.hpp>
#include <fastv/fastv.hpp>
#include <numeric>

#include "model.hpp"
#include "ops.hpp"

namespace reference {

// One sequence: its KV cache, and where it stands.
struct Sequence {
  struct LayerCache {
    Matrix keys, values;      // [capacity, G c], the first `length` rows in use
    Eigen::Index length = 0;  // layers below K: n + t; layers from K on: m + t
    RowVector mask;           // -infinity for keys this layer does not see, 0 for the others; may be shorter, or empty
  };
  std::vector<LayerCache> layers;
  std::int64_t next_position = 0;  // position id of the next token, the same in every layer
  std::uint64_t macs = 0;          // multiply-adds spent so far
};

// What a stage scores by; see fastv/evidence.hpp and fastv/remedies.hpp.
enum class EvidenceKind {
  query_key,       // the last rows' queries and the keys in the cache (default)
  probabilities,   // the attention map
  rope_free,       // queries and keys with their rotation undone
  value_weighted,  // probabilities times the length of the value
  text_raters,     // the mean over those text rows behind the images that are relevant to them
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

// The map of a layer that ran on t rows and has `keys` keys in its cache.
inline fastv::Probabilities<float> map_view(const DecoderConfig& config, const LayerRun& run, Eigen::Index t,
                                            Eigen::Index keys) {
  return fastv::probabilities(run.map.data(), config.shape.heads, static_cast<std::size_t>(t),
                              static_cast<std::size_t>(keys));
}

// Keys or queries with their rotation undone, [heads, tokens, c]. The first of them stands at position `first`, the others
// follow without gaps.
template <class Vectors>
std::vector<float> rotation_undone(const Vectors& rotated, std::size_t first, const DecoderConfig& config) {
  const std::size_t c = rotated.dim;
  std::vector<float> frequencies(c / 2);
  for (std::size_t i = 0; i < c / 2; ++i)
    frequencies[i] = 1.0f / std::pow(config.rope_theta, static_cast<float>(2 * i) / static_cast<float>(c));
  std::vector<fastv::Index> positions(rotated.tokens);
  std::iota(positions.begin(), positions.end(), static_cast<fastv::Index>(first));
  std::vector<float> out(rotated.heads * rotated.tokens * c);
  require(fastv::unrotate(rotated, fastv::Rope{frequencies, positions}, out));
  return out;
}

// RoPE-free: queries and keys with their rotation undone. For a sequence without gaps in its position ids below this
// layer, as prefill() gives them: key j stands at position j.
inline fastv::Kept prune_rope_free(fastv::Pruner<float>& pruner, const fastv::QueryKey<float>& rotated,
                                   const std::vector<fastv::TokenSpan>& visual, const DecoderConfig& config) {
  const fastv::Heads<float>&query = rotated.query, &key = rotated.key;
  const std::vector<float> queries = rotation_undone(query, key.tokens - query.tokens, config),
                           keys = rotation_undone(key, 0, config);
  fastv::QueryKey<float> evidence = rotated;
  evidence.query = fastv::heads(queries.data(), fastv::HeadMajor{query.heads, query.tokens, query.dim});
  evidence.key = fastv::heads(keys.data(), fastv::HeadMajor{key.heads, key.tokens, key.dim});
  return require(pruner.prune(evidence, visual));
}

// Text raters: the rows behind the last image whose hidden states are relevant to the images.
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
  require(fastv::score<float>(config, evidence, visual, scores, scratch));
  return require(pruner.prune(fastv::Scores<float>{scores, tokens}, visual));
}

// Prunes by the layer that has just run and its cache. hidden: that layer's output on this prompt's tokens [n, d]; the
// cache may hold earlier turns in front of them.
inline fastv::Kept prune_by(EvidenceKind kind, fastv::Pruner<float>& pruner,
                            const std::vector<fastv::TokenSpan>& visual, const DecoderConfig& config,
                            const LayerRun& run, const Matrix& hidden, const Sequence::LayerCache& cache) {
  const auto tokens = static_cast<std::size_t>(hidden.rows()), keys = static_cast<std::size_t>(cache.length);
  const std::size_t past = keys - tokens;
  if (kind == EvidenceKind::probabilities) {
    auto evidence = map_view(config, run, run.query.rows(), cache.length);
    evidence.past = past;
    return require(pruner.prune(evidence, visual));
  }

  auto evidence = fastv::query_key(fastv::heads(run.query, config.shape.heads),
                                   fastv::heads(cache.keys, config.shape.kv_heads, keys), scale_of(config));
  evidence.past = past;
  RowVector mask = RowVector::Zero(cache.mask.cols() > 0 ? cache.length : 0);
  mask.head(cache.mask.cols()) = cache.mask;
  evidence.bias = mask;
  std::vector<float> norms;
  switch (kind) {
    case EvidenceKind::query_key:
    case EvidenceKind::probabilities: break;
    case EvidenceKind::rope_free: return prune_rope_free(pruner, evidence, visual, config);
    case EvidenceKind::text_raters: return prune_by_raters(pruner, evidence, visual, hidden);
    case EvidenceKind::keys_only: return require(pruner.prune(fastv::KeysOnly{evidence.key, past}, visual));
    case EvidenceKind::value_weighted: {
      norms.resize(config.shape.kv_heads * fastv::visual_tokens(visual));
      const auto values = fastv::heads(cache.values, config.shape.kv_heads, keys);
      require(fastv::value_norms(values, visual, norms, past));
      evidence.value_norms = norms;
      break;
    }
  }
  return require(pruner.prune(evidence, visual));
}

}  // namespace reference

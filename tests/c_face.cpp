// The functions of fastv_c.h, and the same results by the C++ API.
#define FASTV_C_IMPLEMENTATION
#include "c_face.h"

using namespace fastv;

namespace {

const TokenSpan visual[] = {{first_visual, n_visual, 8}};

template <class Evidence>
std::size_t keep(const Config& config, const Evidence& evidence, fastv_index* out) {
  Pruner<> pruner(config);
  const Kept kept = pruner.prune(evidence, visual);
  for (std::size_t i = 0; i < kept.size(); ++i) out[i] = kept.indices[i];
  return kept.size();
}

template <class Q, class K>
std::size_t from(const Q* query, const K* key, double ratio, fastv_index* out) {
  const auto evidence = query_key(fastv::heads(query, TokenMajor{1, n_heads, n_dim}),
                                  fastv::heads(key, TokenMajor{n_tokens, n_kv_heads, n_dim}), 0.2f);
  return keep(Config{3, ratio}, evidence, out);
}
template <class Q>
std::size_t from(const Q* query, const void* key, int type, double ratio, fastv_index* out) {
  if (type == FASTV_HALF) return from(query, static_cast<const half*>(key), ratio, out);
  if (type == FASTV_BFLOAT16) return from(query, static_cast<const bfloat16*>(key), ratio, out);
  return from(query, static_cast<const float*>(key), ratio, out);
}

}  // namespace

extern "C" {

const size_t cxx_layout[31] = {C_FACE_LAYOUT};

size_t cxx_query_key(const void* query, int query_type, const void* key, int key_type, double ratio, fastv_index* out) {
  if (query_type == FASTV_HALF) return from(static_cast<const half*>(query), key, key_type, ratio, out);
  if (query_type == FASTV_BFLOAT16) return from(static_cast<const bfloat16*>(query), key, key_type, ratio, out);
  return from(static_cast<const float*>(query), key, key_type, ratio, out);
}

size_t cxx_paged(const float* query, const void* half_key, const fastv_index* table, double ratio, fastv_index* out) {
  const auto keys = fastv::heads(static_cast<const half*>(half_key), HeadMajor{n_kv_heads, n_block, n_dim},
                                 Span<const Index>(table, (n_tokens + n_block - 1) / n_block), n_tokens);
  return keep(Config{3, ratio}, query_key(fastv::heads(query, TokenMajor{1, n_heads, n_dim}), keys, 0.2f), out);
}

size_t cxx_options(unsigned options, const float* query, const float* key, const float* bias, const float* sinks,
                   const float* alibi, const fastv_index* visible, fastv_index* out) {
  static const Index listed[] = {20, 50, 60}, prior[] = {56};
  const auto on = [&](unsigned option) { return (options & option) != 0; };
  Config config;
  config.filtering_ratio = 0.7;
  config.score_rows = on(every_row) ? ScoreRows::all : ScoreRows::listed;
  config.listed_rows = listed;
  if (on(prior_rows)) config.prior_rows = prior;
  if (on(uniform_share)) config.uniform_share = 0.5;
  if (on(grid_windows)) config.window_rows = 1, config.window_columns = 4;
  if (on(round_up)) config.rounding = Rounding::up;
  if (on(keep_count)) config.keep_count = 21;
  if (on(of_original)) config.ratio_of = RatioOf::original;
  if (on(pooled)) config.quota = Quota::pooled;
  if (on(minimum)) config.min_per_image = 6;
  const std::size_t past = on(past_keys) ? 6 : 0, gone = on(let_go) ? 4 : 0, keys = n_tokens + past - gone;
  auto evidence = query_key(fastv::heads(query, HeadMajor{n_heads, n_tokens, n_dim}),
                            fastv::heads(key, TokenMajor{keys, n_kv_heads, n_dim}), 0.3f);
  if (on(soft_cap)) evidence.soft_cap = 0.7f;
  if (on(bias_row)) evidence.bias = {bias, keys};
  if (on(sink_logits)) evidence.sinks = {sinks, n_heads};
  if (on(alibi_slopes)) evidence.alibi = {alibi, n_heads};
  if (on(visible_keys)) evidence.visible = {visible, n_tokens};
  evidence.causal = !on(all_keys);
  if (on(sliding_window)) evidence.window = 20;
  evidence.past = past;
  evidence.first_key = gone;
  const TokenSpan images[] = {{5, 24, 8, false, 34}, {31, 16, 8, on(one_image), 20}};
  Pruner<> pruner(config);
  const Kept kept = pruner.prune(evidence, images);
  for (std::size_t i = 0; i < kept.size(); ++i) out[i] = kept.indices[i];
  return kept.size();
}

size_t cxx_probabilities(const void* data, int type, fastv_index* out) {
  const auto with = [&](const auto* p) {
    auto evidence = probabilities(p, n_heads, 2, n_tokens);
    return keep(Config{}, evidence, out);
  };
  if (type == FASTV_HALF) return with(static_cast<const half*>(data));
  if (type == FASTV_BFLOAT16) return with(static_cast<const bfloat16*>(data));
  return with(static_cast<const float*>(data));
}

size_t cxx_diverse(int novelty, int blend, int type, int folded, const float* query, const void* key,
                   fastv_index* out) {
  Config config;
  config.filtering_ratio = 0.7;
  config.selection = Selection::diverse;
  config.diversity = {static_cast<Novelty>(novelty), static_cast<Blend>(blend), 0.75, 0.25};
  const auto with = [&](const auto* k) {
    const auto keys = fastv::heads(k, TokenMajor{n_tokens, n_kv_heads, n_dim});
    const auto evidence = query_key(fastv::heads(query, TokenMajor{1, n_heads, n_dim}), keys, 0.2f);
    const std::size_t projected = folded != 0 ? 10 : 0;
    return keep(config, with_features(evidence, Features{keys, 0, folded != 0, projected}), out);
  };
  if (type == FASTV_HALF) return with(static_cast<const half*>(key));
  if (type == FASTV_BFLOAT16) return with(static_cast<const bfloat16*>(key));
  return with(static_cast<const float*>(key));
}
size_t cxx_logits(const float* query, const void* half_key, const float* weights, fastv_index* out) {
  const auto keys = fastv::heads(static_cast<const half*>(half_key), TokenMajor{n_tokens, n_kv_heads, n_dim});
  const Span<const float> given(weights, weights == nullptr ? 0 : n_heads);
  return keep(Config{}, logits(fastv::heads(query, TokenMajor{1, n_heads, n_dim}), keys, given), out);
}
size_t cxx_changes(const void* before, const void* after, int transition, fastv_index* out) {
  auto evidence = changes(static_cast<const bfloat16*>(before), static_cast<const bfloat16*>(after), n_tokens, n_dim);
  if (transition != 0) evidence.by = ChangeBy::transition;
  return keep(Config{}, evidence, out);
}

size_t cxx_random(uint64_t seed, fastv_index* out) {
  Config config;
  config.selection = Selection::random;
  config.seed = seed;
  return keep(config, NoEvidence{n_tokens}, out);
}

}  // extern "C"

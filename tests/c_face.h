/* What c_face_test.c asks of the C++ API, in c_face.cpp, which makes the functions of fastv_c.h too. */
#pragma once

#include <fastv/fastv_c.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Sizes and offsets of fastv_c.h's structs as this compiler lays them out. */
#define C_FACE_LAYOUT                                                                                                  \
  sizeof(fastv_config), offsetof(fastv_config, rounding), offsetof(fastv_config, min_per_image),                       \
      offsetof(fastv_config, prior_count), offsetof(fastv_config, seed), offsetof(fastv_config, window_columns),       \
      offsetof(fastv_config, blend), offsetof(fastv_config, protected_share), sizeof(fastv_features),                  \
      offsetof(fastv_features, projected), sizeof(fastv_changes), offsetof(fastv_changes, transition),                 \
      sizeof(fastv_span), offsetof(fastv_span, filtering_ratio), offsetof(fastv_span, continues), sizeof(fastv_heads), \
      offsetof(fastv_heads, heads), offsetof(fastv_heads, token_stride), offsetof(fastv_heads, block_stride),          \
      sizeof(fastv_query_key), offsetof(fastv_query_key, scale), offsetof(fastv_query_key, bias),                      \
      offsetof(fastv_query_key, all_keys), offsetof(fastv_query_key, heads_total), sizeof(fastv_probabilities),        \
      offsetof(fastv_probabilities, key_stride), sizeof(fastv_kept), offsetof(fastv_kept, zero_scores),                \
      sizeof(fastv_rows), offsetof(fastv_rows, packed), sizeof(fastv_message)
extern const size_t cxx_layout[31];

enum { n_heads = 4, n_kv_heads = 2, n_dim = 24, n_tokens = 61, first_visual = 5, n_visual = 40, n_block = 8 };

/* Settings and fields of the evidence, one bit each. */
enum {
  soft_cap = 1,
  bias_row = 2,
  sink_logits = 4,
  alibi_slopes = 8,
  visible_keys = 16,
  all_keys = 32,
  sliding_window = 64,
  past_keys = 128,
  let_go = 256,
  every_row = 512,
  prior_rows = 1024,
  uniform_share = 2048,
  grid_windows = 4096,
  round_up = 8192,
  keep_count = 16384,
  of_original = 32768,
  pooled = 65536,
  minimum = 131072,
  one_image = 262144,
  all_options = 524288 /* past the last */
};

/* Kept indices by the C++ API; how many there are. queries and keys as c_face_test.c makes them. */
size_t cxx_query_key(const void* query, int query_type, const void* key, int key_type, double ratio, fastv_index* out);
size_t cxx_paged(const float* query, const void* half_key, const fastv_index* table, double ratio, fastv_index* out);
size_t cxx_options(unsigned options, const float* query, const float* key, const float* bias, const float* sinks,
                   const float* alibi, const fastv_index* visible, fastv_index* out);
size_t cxx_probabilities(const void* data, int type, fastv_index* out);
size_t cxx_diverse(int novelty, int blend, int type, int folded, const float* query, const void* key, fastv_index* out);
size_t cxx_logits(const float* query, const void* half_key, const float* weights, fastv_index* out);
size_t cxx_changes(const void* before, const void* after, int transition, fastv_index* out);
size_t cxx_random(uint64_t seed, fastv_index* out);

#ifdef __cplusplus
}
#endif

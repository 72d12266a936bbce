// fastv_c.h from C99: every function once, its results against those of the C++ API.
#include "c_face.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;
static void expect_at(int line, int holds, const char* what) {
  if (holds) return;
  ++failures;
  printf("line %d: %s does not hold\n", line, what);
}
#define EXPECT(holds) expect_at(__LINE__, (holds), #holds)

static uint32_t state = 1;
static float uniform(void) {
  state = state * 1664525u + 1013904223u;
  return (float)(state >> 8) / 8388608.0f - 1.0f;
}

// Values as float, half and bfloat16; the narrow ones by their bits, for magnitudes from 2^-4 to 2.
enum { most = 8192 };
static float floats[most], query_floats[most];
static uint16_t halves[most], bfloats[most], query_halves[most], query_bfloats[most];
static void fill(float* wide, uint16_t* half, uint16_t* bfloat, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    uint32_t bits;
    wide[i] = uniform();
    memcpy(&bits, &wide[i], sizeof(bits));
    bfloat[i] = (uint16_t)(bits >> 16);
    half[i] = (uint16_t)((bits >> 16 & 0x8000u) | (0x2c00u + (state >> 8) % 0x1000u));
  }
}
static const void* as_type(int type, const float* wide, const uint16_t* half, const uint16_t* bfloat) {
  return type == FASTV_HALF ? (const void*)half : type == FASTV_BFLOAT16 ? (const void*)bfloat : (const void*)wide;
}

static const fastv_span visual[] = {{.first = first_visual, .count = n_visual, .columns = 8}};
static fastv_message why;
static int says(const char* part) { return strstr(why.text, part) != NULL; }

static fastv_index expected[n_tokens];
static int same(const fastv_kept* kept, size_t count) {
  return kept->count == count && (count == 0 || memcmp(kept->indices, expected, count * sizeof(fastv_index)) == 0);
}

static void check_layout(void) {
  const size_t layout[] = {C_FACE_LAYOUT};
  EXPECT(sizeof(layout) == sizeof(cxx_layout));
  EXPECT(memcmp(layout, cxx_layout, sizeof(layout)) == 0);
}

static void check_query_key(void) {
  fastv_config config = fastv_default_config();
  EXPECT(config.filtering_layer == 2 && config.filtering_ratio == 0.5 && config.keep_count == FASTV_BY_RATIO);
  config.filtering_layer = 3;
  for (int ratio = 1; ratio < 4; ++ratio) {
    config.filtering_ratio = ratio / 4.0;
    fastv_pruner* pruner = fastv_pruner_create(&config, &why);
    EXPECT(pruner != NULL && says("no error"));
    fastv_kept kept;
    for (int q = FASTV_FLOAT; q <= FASTV_BFLOAT16; ++q)
      for (int k = FASTV_FLOAT; k <= FASTV_BFLOAT16; ++k) {
        const void* query = as_type(q, query_floats, query_halves, query_bfloats);
        const void* key = as_type(k, floats, halves, bfloats);
        const fastv_query_key evidence = {
            .query = {.data = query, .type = q, .heads = n_heads, .tokens = 1, .dim = n_dim},
            .key = {.data = key, .type = k, .heads = n_kv_heads, .tokens = n_tokens, .dim = n_dim},
            .scale = 0.2f};
        EXPECT(fastv_prune_query_key(pruner, &evidence, visual, 1, &kept, &why) == FASTV_OK);
        EXPECT(kept.prompt_tokens == n_tokens && kept.count == n_tokens - (size_t)(n_visual * ratio / 4));
        EXPECT(same(&kept, cxx_query_key(query, q, key, k, config.filtering_ratio, expected)));
      }
    // Blocks [kv head, token, n_dim] in any order.
    const fastv_index table[] = {5, 0, 7, 2, 8, 1, 6, 3};
    const fastv_query_key paged = {.query = {.data = query_floats, .heads = n_heads, .tokens = 1, .dim = n_dim},
                                   .key = {.data = halves,
                                           .type = FASTV_HALF,
                                           .heads = n_kv_heads,
                                           .tokens = n_tokens,
                                           .dim = n_dim,
                                           .head_stride = n_block * n_dim,
                                           .token_stride = n_dim,
                                           .block_table = table,
                                           .blocks = 8,
                                           .block_tokens = n_block},
                                   .scale = 0.2f};
    EXPECT(fastv_prune_query_key(pruner, &paged, visual, 1, &kept, NULL) == FASTV_OK);
    EXPECT(same(&kept, cxx_paged(query_floats, halves, table, config.filtering_ratio, expected)));
    fastv_pruner_destroy(pruner);
  }
}

static float biases[n_tokens + 6], sinks[n_heads], slopes[n_heads];
static fastv_index visible[n_tokens];
static void prune_with(unsigned options, fastv_kept* kept, fastv_pruner** pruner) {
  static const fastv_index listed[] = {20, 50, 60}, prior[] = {56};
  fastv_config config = fastv_default_config();
  config.filtering_ratio = 0.7;
  config.score_rows = options & every_row ? FASTV_ALL_ROWS : FASTV_LISTED_ROWS;
  config.listed_rows = listed;
  config.listed_count = 3;
  if (options & prior_rows) config.prior_rows = prior, config.prior_count = 1;
  if (options & uniform_share) config.uniform_share = 0.5;
  if (options & grid_windows) config.window_rows = 1, config.window_columns = 4;
  if (options & round_up) config.rounding = FASTV_UP;
  if (options & keep_count) config.keep_count = 21;
  if (options & of_original) config.ratio_of = FASTV_OF_ORIGINAL;
  if (options & pooled) config.quota = FASTV_POOLED;
  if (options & minimum) config.min_per_image = 6;
  fastv_query_key evidence = {.query = {.data = query_floats,
                                        .heads = n_heads,
                                        .tokens = n_tokens,
                                        .dim = n_dim,
                                        .head_stride = n_tokens * n_dim,
                                        .token_stride = n_dim},
                              .key = {.data = floats, .heads = n_kv_heads, .tokens = n_tokens, .dim = n_dim},
                              .scale = 0.3f};
  if (options & soft_cap) evidence.soft_cap = 0.7f;
  if (options & bias_row) evidence.bias = biases;
  if (options & sink_logits) evidence.sinks = sinks;
  if (options & alibi_slopes) evidence.alibi = slopes;
  if (options & visible_keys) evidence.visible = visible;
  if (options & all_keys) evidence.all_keys = 1;
  if (options & sliding_window) evidence.window = 20;
  if (options & past_keys) evidence.key.tokens += 6, evidence.past = 6;
  if (options & let_go) evidence.first_key = 4, evidence.key.tokens -= 4;
  const fastv_span images[] = {
      {.first = 5, .count = 24, .columns = 8, .original = 34},
      {.first = 31, .count = 16, .columns = 8, .original = 20, .continues = (options & one_image) != 0}};
  kept->count = 0;
  *pruner = fastv_pruner_create(&config, &why);
  if (*pruner != NULL) fastv_prune_query_key(*pruner, &evidence, images, 2, kept, &why);
}

// Each option by itself must reach the library, and so change what is kept; and many together.
static void check_options(void) {
  for (int i = 0; i < n_tokens + 6; ++i) biases[i] = 2 * uniform();
  for (int i = 0; i < n_heads; ++i) sinks[i] = i == 0 ? 0.0f : 25.0f, slopes[i] = 0.05f * (float)i;
  for (int i = 0; i < n_tokens; ++i) visible[i] = (fastv_index)(i + 12 < n_tokens ? i + 12 : n_tokens);
  fastv_index plain[n_tokens];
  const size_t plain_count = cxx_options(0, query_floats, floats, biases, sinks, slopes, visible, plain);
  EXPECT(plain_count == n_tokens - 40 + 12);
  for (unsigned i = 0; i < 300; ++i) {
    const int alone = i < 19;
    const unsigned options = alone ? 1u << i : (state = state * 1664525u + 1013904223u) >> 8 & (all_options - 1);
    fastv_kept kept;
    fastv_pruner* pruner;
    prune_with(options, &kept, &pruner);
    const int agree = same(&kept, cxx_options(options, query_floats, floats, biases, sinks, slopes, visible, expected));
    if (!agree) printf("options %x: %s\n", options, why.text);
    EXPECT(agree);
    if (alone && kept.count == plain_count && memcmp(plain, kept.indices, plain_count * sizeof(fastv_index)) == 0) {
      printf("option %x changes nothing\n", options);
      EXPECT(0);
    }
    fastv_pruner_destroy(pruner);
  }
}

static void check_other_evidence(void) {
  fastv_config config = fastv_default_config();
  fastv_kept kept;
  fastv_pruner* pruner = fastv_pruner_create(&config, &why);
  for (size_t i = 0; i < most; ++i) {  // probabilities are not negative
    floats[i] = floats[i] < 0 ? -floats[i] : floats[i];
    halves[i] &= 0x7fff;
    bfloats[i] &= 0x7fff;
  }
  for (int type = FASTV_FLOAT; type <= FASTV_BFLOAT16; ++type) {
    const void* data = as_type(type, floats, halves, bfloats);
    const fastv_probabilities map = {.data = data, .type = type, .heads = n_heads, .queries = 2, .keys = n_tokens};
    EXPECT(fastv_prune_probabilities(pruner, &map, visual, 1, &kept, &why) == FASTV_OK);
    EXPECT(same(&kept, cxx_probabilities(data, type, expected)));
  }
  // The same by strides, from a map whose keys lie two apart.
  float apart[2 * 2 * n_heads * n_tokens];
  for (size_t i = 0; i < 2 * n_heads * n_tokens; ++i) apart[2 * i] = floats[i], apart[2 * i + 1] = 9;
  const fastv_probabilities strided = {.data = apart,
                                       .heads = n_heads,
                                       .queries = 2,
                                       .keys = n_tokens,
                                       .head_stride = 4 * n_tokens,
                                       .query_stride = 2 * n_tokens,
                                       .key_stride = 2};
  EXPECT(fastv_prune_probabilities(pruner, &strided, visual, 1, &kept, &why) == FASTV_OK);
  EXPECT(same(&kept, cxx_probabilities(floats, FASTV_FLOAT, expected)));
  // Of a conversation: the last keys of the same map are the prompt.
  fastv_probabilities later = {.data = floats, .heads = n_heads, .queries = 1, .keys = n_tokens, .past = 10};
  const fastv_span early[] = {{.first = 5, .count = 30}};
  EXPECT(fastv_prune_probabilities(pruner, &later, early, 1, &kept, &why) == FASTV_OK && kept.prompt_tokens == 51);
  later.first_key = 3;
  EXPECT(fastv_prune_probabilities(pruner, &later, early, 1, &kept, &why) == FASTV_OK && kept.prompt_tokens == 54);
  later.heads_total = 3;
  EXPECT(fastv_prune_probabilities(pruner, &later, early, 1, &kept, &why) == FASTV_BAD_SHAPE);
  EXPECT(says("heads_total is 3"));
  fastv_pruner_destroy(pruner);

  config.selection = FASTV_RANDOM;
  config.seed = 77;
  pruner = fastv_pruner_create(&config, &why);
  EXPECT(fastv_prune_scores(pruner, NULL, 0, n_tokens, visual, 1, &kept, &why) == FASTV_OK);
  EXPECT(same(&kept, cxx_random(77, expected)));
  fastv_pruner_destroy(pruner);

  config.keep_count = 0;  // beside an R of 1: none
  config.filtering_ratio = 1;
  pruner = fastv_pruner_create(&config, &why);
  EXPECT(fastv_prune_scores(pruner, NULL, 0, n_tokens, visual, 1, &kept, &why) == FASTV_OK);
  EXPECT(kept.count == n_tokens - n_visual);
  fastv_pruner_destroy(pruner);
}

static void check_rules(void) {
  fastv_config config = fastv_default_config();
  EXPECT(config.novelty == FASTV_NEAREST && config.blend == FASTV_SUM && config.diversity_weight == 0.5);
  config.filtering_ratio = 0.7;
  config.selection = FASTV_DIVERSE;
  config.diversity_weight = 0.75;
  config.protected_share = 0.25;
  fastv_kept kept;
  for (int novelty = FASTV_NEAREST; novelty <= FASTV_VOLUME; ++novelty)
    for (int blend = FASTV_SUM; blend <= FASTV_PRODUCT; ++blend)
      for (int type = FASTV_FLOAT; type <= FASTV_BFLOAT16; ++type)
        for (int folded = 0; folded < 2; ++folded) {
          config.novelty = novelty;
          config.blend = blend;
          fastv_pruner* pruner = fastv_pruner_create(&config, &why);
          const void* key = as_type(type, floats, halves, bfloats);
          fastv_query_key qk = {
              .query = {.data = query_floats, .heads = n_heads, .tokens = 1, .dim = n_dim},
              .key = {.data = key, .type = type, .heads = n_kv_heads, .tokens = n_tokens, .dim = n_dim},
              .scale = 0.2f};
          EXPECT(fastv_prune_query_key(pruner, &qk, visual, 1, &kept, &why) == FASTV_MISSING_EVIDENCE);
          fastv_features features = {.vectors = qk.key, .mean_of_heads = folded, .projected = folded ? 10 : 0};
          EXPECT(fastv_set_features(pruner, &features, &why) == FASTV_OK);
          EXPECT(fastv_prune_query_key(pruner, &qk, visual, 1, &kept, &why) == FASTV_OK);
          EXPECT(same(&kept, cxx_diverse(novelty, blend, type, folded, query_floats, key, expected)));
          features.vectors.type = 7;
          EXPECT(fastv_set_features(pruner, &features, NULL) == FASTV_OK);
          EXPECT(fastv_prune_query_key(pruner, &qk, visual, 1, &kept, &why) == FASTV_NOT_SUPPORTED && says("type 7"));
          features.vectors.type = type;
          features.vectors.data = NULL;
          EXPECT(fastv_set_features(pruner, &features, NULL) == FASTV_OK);
          EXPECT(fastv_prune_query_key(pruner, &qk, visual, 1, &kept, &why) == FASTV_NULL_DATA && says("features"));
          EXPECT(fastv_set_features(pruner, NULL, NULL) == FASTV_OK);
          EXPECT(fastv_prune_query_key(pruner, &qk, visual, 1, &kept, &why) == FASTV_MISSING_EVIDENCE);
          fastv_pruner_destroy(pruner);
        }
  EXPECT(fastv_set_features(NULL, NULL, NULL) == FASTV_NULL_DATA);
  config.novelty = 3;
  EXPECT(fastv_pruner_create(&config, &why) == NULL && says("novelty is 3"));
  config.novelty = 0;
  config.blend = -1;
  EXPECT(fastv_pruner_create(&config, &why) == NULL && says("blend is -1"));

  config = fastv_default_config();
  fastv_pruner* pruner = fastv_pruner_create(&config, &why);
  fastv_query_key qk = {
      .query = {.data = query_floats, .heads = n_heads, .tokens = 1, .dim = n_dim},
      .key = {.data = halves, .type = FASTV_HALF, .heads = n_kv_heads, .tokens = n_tokens, .dim = n_dim}};
  const float weights[n_heads] = {0.5f, 2, 0.25f, 1};
  EXPECT(fastv_prune_logits(pruner, &qk, weights, visual, 1, &kept, &why) == FASTV_OK);
  EXPECT(same(&kept, cxx_logits(query_floats, halves, weights, expected)));
  EXPECT(fastv_prune_logits(pruner, &qk, NULL, visual, 1, &kept, &why) == FASTV_OK);
  EXPECT(same(&kept, cxx_logits(query_floats, halves, NULL, expected)));
  EXPECT(fastv_prune_logits(pruner, NULL, NULL, visual, 1, &kept, &why) == FASTV_NULL_DATA);
  fastv_changes rows = {
      .after = bfloats, .before = query_bfloats, .type = FASTV_BFLOAT16, .tokens = n_tokens, .width = n_dim};
  for (rows.transition = 0; rows.transition < 2; ++rows.transition) {
    EXPECT(fastv_prune_changes(pruner, &rows, visual, 1, &kept, &why) == FASTV_OK);
    EXPECT(same(&kept, cxx_changes(query_bfloats, bfloats, rows.transition, expected)));
  }
  rows.transition = 0;
  rows.before = NULL;
  EXPECT(fastv_prune_changes(pruner, &rows, visual, 1, &kept, &why) == FASTV_OK);
  EXPECT(same(&kept, cxx_changes(NULL, bfloats, 0, expected)));
  rows.width = 0;
  EXPECT(fastv_prune_changes(pruner, &rows, visual, 1, &kept, &why) == FASTV_BAD_SHAPE && says("0 elements"));
  EXPECT(fastv_prune_changes(pruner, NULL, visual, 1, &kept, NULL) == FASTV_NULL_DATA);
  fastv_pruner_destroy(pruner);
}

// Two stages by scores of one's own, what is moved, and the slots, all by plain loops.
static void check_stages_and_slots(void) {
  enum { layers = 6, n = 20 };
  const fastv_span images[] = {{.first = 2, .count = 8}, {.first = 12, .count = 6, .own_ratio = 1}};  // keeps all 6
  fastv_config stages[2] = {fastv_default_config(), fastv_default_config()};
  stages[1].filtering_layer = 4;
  stages[1].filtering_ratio = 0.25;
  size_t lengths[layers];
  EXPECT(fastv_plan(stages, 2, images, 2, n, layers, lengths, &why) == FASTV_OK);
  EXPECT(lengths[0] == n && lengths[1] == n && lengths[2] == 16 && lengths[3] == 16 && lengths[4] == 15 &&
         lengths[5] == 15);

  const float scores[14] = {1, 8, 2, 7, 3, 6, 4, 5, 1, 1, 1, 1, 1, 1};
  fastv_pruner* pruner = fastv_pruner_create(&stages[0], &why);
  fastv_kept kept;
  EXPECT(fastv_prune_scores(pruner, scores, 14, n, images, 2, &kept, &why) == FASTV_OK);
  const fastv_index first[] = {0, 1, 3, 5, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19};
  EXPECT(kept.count == 16 && memcmp(kept.indices, first, sizeof(first)) == 0);

  int hidden[n][3], ids[2][n];
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < 2; ++j) hidden[i][j] = 10 * i + j, ids[j][i] = 100 * j + i;
    hidden[i][2] = -1;  // not of the row
  }
  const fastv_rows rows = {.data = hidden, .count = n, .row_bytes = 2 * sizeof(int), .row_stride = 3 * sizeof(int)};
  const fastv_rows positions = {.data = ids, .count = n, .row_bytes = sizeof(int), .planes = 2, .packed = 1};
  EXPECT(fastv_compact(&kept, &rows, &why) == FASTV_OK);
  EXPECT(fastv_compact(&kept, &positions, NULL) == FASTV_OK);
  for (int i = 0; i < 16; ++i) {
    const int was = (int)first[i];
    EXPECT(hidden[i][0] == 10 * was && hidden[i][1] == 10 * was + 1 && hidden[i][2] == -1);
    EXPECT((&ids[0][0])[i] == was && (&ids[0][0])[16 + i] == 100 + was);
  }

  fastv_slots* slots = fastv_slots_create();
  EXPECT(fastv_slots_append(slots, n, NULL) == FASTV_OK);
  EXPECT(fastv_slots_append(slots, 1, NULL) == FASTV_OK);
  EXPECT(fastv_slots_keep(slots, 2, &kept, &why) == FASTV_BAD_SHAPE && says("hold 1 of what was appended last"));
  EXPECT(fastv_slots_rollback(slots, 0, NULL) == FASTV_OK);
  EXPECT(fastv_slots_append(slots, 7, NULL) == FASTV_OK);
  EXPECT(fastv_slots_append_chunk(slots, n - 7, NULL) == FASTV_OK);
  EXPECT(fastv_slots_keep(slots, 2, &kept, &why) == FASTV_OK);
  fastv_span left[2];
  size_t spans = 99;
  EXPECT(fastv_next_spans(&kept, images, 2, left, &spans, &why) == FASTV_OK && spans == 2);
  EXPECT(left[0].first == 2 && left[0].count == 4 && left[0].original == 8 && !left[0].own_ratio && !left[0].continues);
  EXPECT(left[1].first == 8 && left[1].count == 6 && left[1].own_ratio && left[1].filtering_ratio == 0);
  fastv_pruner* second = fastv_pruner_create(&stages[1], &why);
  const float again[10] = {5, 1, 5, 5, 1, 1, 1, 1, 1, 1};
  EXPECT(fastv_prune_scores(second, again, 10, 16, left, 2, &kept, &why) == FASTV_OK && kept.count == 15);
  EXPECT(fastv_slots_keep(slots, 4, &kept, &why) == FASTV_OK);
  EXPECT(fastv_slots_append(slots, 2, NULL) == FASTV_OK);
  EXPECT(fastv_slots_tokens(slots) == 22);
  for (size_t layer = 0; layer < layers; ++layer) {
    fastv_index listed[22];
    EXPECT(fastv_slots_length(slots, layer) == lengths[layer] + 2);
    EXPECT(fastv_slots_positions(slots, layer, 0, lengths[layer] + 2, listed, NULL) == FASTV_OK);
    size_t slot = 0;
    for (fastv_index p = 0; p < 22; ++p) {
      const int dropped = (layer >= 2 && (p == 2 || p == 4 || p == 6 || p == 8)) || (layer >= 4 && p == 5);
      EXPECT(fastv_first_in_window(slots, layer, p + 3u, 4) == slot);
      EXPECT(fastv_slot_of(slots, layer, p) == (dropped ? FASTV_NO_SLOT : slot));
      if (dropped) continue;
      EXPECT(fastv_position_of(slots, layer, slot) == p);
      EXPECT(listed[slot] == p);
      ++slot;
    }
    EXPECT(fastv_position_of(slots, layer, slot) == FASTV_NO_SLOT);
  }
  fastv_slots* beam = fastv_slots_create();
  EXPECT(fastv_slots_copy(beam, slots, NULL) == FASTV_OK);
  EXPECT(fastv_slots_rollback(beam, 21, NULL) == FASTV_OK);
  EXPECT(fastv_slots_length(beam, 5) == 16 && fastv_slots_length(slots, 5) == 17);
  fastv_slots_clear(slots);
  EXPECT(fastv_slots_tokens(slots) == 0 && fastv_slots_length(slots, 5) == 0);
  fastv_slots_destroy(slots);
  fastv_slots_destroy(beam);
  fastv_pruner_destroy(pruner);
  fastv_pruner_destroy(second);
}

static void check_failures(void) {
  fastv_config config = fastv_default_config();
  config.filtering_ratio = 1.5;
  EXPECT(fastv_pruner_create(&config, &why) == NULL && says("1.5"));
  config = fastv_default_config();
  int* const settings[] = {&config.ratio_of, &config.rounding, &config.quota, &config.score_rows, &config.selection};
  const int greatest[] = {FASTV_OF_ORIGINAL, FASTV_UP, FASTV_POOLED, FASTV_LISTED_ROWS, FASTV_DIVERSE};
  for (int i = 0; i < 5; ++i) {
    const int was = *settings[i];
    *settings[i] = greatest[i] + 1;
    EXPECT(fastv_pruner_create(&config, &why) == NULL && says("must lie between 0 and"));
    *settings[i] = -1;
    EXPECT(fastv_pruner_create(&config, &why) == NULL && says("-1"));
    *settings[i] = was;
  }
  EXPECT(fastv_pruner_create(NULL, &why) == NULL && says("null"));

  // An initialiser that leaves keep_count out must not drop every visual token.
  const fastv_config short_one = {.filtering_layer = 2, .filtering_ratio = 0.5};
  EXPECT(fastv_pruner_create(&short_one, &why) == NULL && says("keep_count is 0") && says("0.5"));
  size_t left_out[4];
  EXPECT(fastv_plan(&short_one, 1, visual, 1, n_tokens, 4, left_out, &why) == FASTV_BAD_SETTING && says("keep_count"));

  fastv_pruner* pruner = fastv_pruner_create(&config, NULL);
  fastv_kept kept = {.count = 3};
  fastv_query_key evidence = {.query = {.data = query_floats, .heads = n_heads, .tokens = 1, .dim = n_dim},
                              .key = {.data = floats, .heads = 3, .tokens = n_tokens, .dim = n_dim},
                              .scale = 1};
  EXPECT(fastv_prune_query_key(pruner, &evidence, visual, 1, &kept, &why) == FASTV_BAD_SHAPE && kept.count == 0);
  EXPECT(says("4") && says("3"));
  evidence.key.heads = n_kv_heads;
  evidence.key.type = 9;
  EXPECT(fastv_prune_query_key(pruner, &evidence, visual, 1, &kept, &why) == FASTV_NOT_SUPPORTED && says("9"));
  evidence.key.type = FASTV_FLOAT;
  evidence.key.data = NULL;
  EXPECT(fastv_prune_query_key(pruner, &evidence, visual, 1, &kept, &why) == FASTV_NULL_DATA);
  evidence.key.data = floats;
  evidence.key.tokens = SIZE_MAX / 2;
  EXPECT(fastv_prune_query_key(pruner, &evidence, visual, 1, &kept, &why) == FASTV_BAD_SHAPE);
  evidence.key.tokens = n_tokens;
  evidence.key.head_stride = -5;
  EXPECT(fastv_prune_query_key(pruner, &evidence, visual, 1, &kept, &why) == FASTV_BAD_STRIDE);
  evidence.key.head_stride = 0;
  evidence.heads_total = 3;
  EXPECT(fastv_prune_query_key(pruner, &evidence, visual, 1, &kept, &why) == FASTV_BAD_SHAPE &&
         says("heads_total is 3"));
  evidence.heads_total = 0;
  evidence.heads_total = 8;
  EXPECT(fastv_prune_query_key(pruner, &evidence, visual, 1, &kept, &why) == FASTV_MISSING_EVIDENCE && says("4 of 8"));
  evidence.heads_total = 0;
  // Pages that are half described are not one piece.
  const fastv_index table[] = {0, 1};
  evidence.key.block_table = table;
  EXPECT(fastv_prune_query_key(pruner, &evidence, visual, 1, &kept, &why) == FASTV_BAD_PAGES && says("0 tokens"));
  evidence.key.block_tokens = n_block;
  EXPECT(fastv_prune_query_key(pruner, &evidence, visual, 1, &kept, &why) == FASTV_BAD_PAGES && says("0 blocks"));
  evidence.key.block_table = NULL;
  evidence.key.blocks = 8;
  EXPECT(fastv_prune_query_key(pruner, &evidence, visual, 1, &kept, &why) == FASTV_NULL_DATA && says("block table"));
  evidence.key.blocks = 0;
  EXPECT(fastv_prune_query_key(pruner, &evidence, visual, 1, &kept, &why) == FASTV_BAD_PAGES);
  evidence.key.block_tokens = 0;
  EXPECT(fastv_prune_query_key(pruner, &evidence, NULL, 1, &kept, &why) == FASTV_NULL_DATA);
  // What a prune that failed leaves keeps nothing of anything.
  fastv_rows some = {.data = query_floats, .count = 60, .row_bytes = 4};
  fastv_span next[1];
  size_t number = 7;
  fastv_slots* books = fastv_slots_create();
  EXPECT(fastv_slots_append(books, n_tokens, NULL) == FASTV_OK);
  EXPECT(fastv_compact(&kept, &some, &why) == FASTV_BAD_PROMPT && says("0 tokens"));
  EXPECT(fastv_slots_keep(books, 2, &kept, &why) == FASTV_BAD_PROMPT && says("failed"));
  EXPECT(fastv_next_spans(&kept, visual, 1, next, &number, &why) == FASTV_BAD_PROMPT && number == 0);
  fastv_slots_destroy(books);
  EXPECT(fastv_prune_query_key(NULL, &evidence, visual, 1, &kept, &why) == FASTV_NULL_DATA);
  EXPECT(fastv_prune_query_key(pruner, NULL, visual, 1, &kept, &why) == FASTV_NULL_DATA);
  EXPECT(fastv_prune_query_key(pruner, &evidence, visual, 1, NULL, &why) == FASTV_NULL_DATA);
  EXPECT(fastv_prune_probabilities(pruner, NULL, visual, 1, &kept, NULL) == FASTV_NULL_DATA);
  EXPECT(fastv_prune_scores(NULL, NULL, 0, 5, NULL, 0, &kept, NULL) == FASTV_NULL_DATA);
  EXPECT(fastv_prune_scores(pruner, floats, 39, n_tokens, visual, 1, &kept, &why) == FASTV_BAD_SHAPE && says("39"));
  fastv_span far = {.first = SIZE_MAX - 3, .count = 9};
  EXPECT(fastv_prune_scores(pruner, floats, 9, n_tokens, &far, 1, &kept, &why) == FASTV_BAD_PROMPT);

  size_t lengths[4], count;
  fastv_config many[9];
  for (int i = 0; i < 9; ++i) many[i] = config;
  EXPECT(fastv_plan(many, 9, visual, 1, n_tokens, 4, lengths, &why) == FASTV_BAD_SETTING && says("9 stages"));
  EXPECT(fastv_plan(NULL, 1, visual, 1, n_tokens, 4, lengths, &why) == FASTV_NULL_DATA);
  EXPECT(fastv_plan(&config, 1, visual, 1, n_tokens, 4, NULL, &why) == FASTV_NULL_DATA);
  EXPECT(fastv_plan(&config, 1, visual, 1, n_tokens, 2, lengths, &why) == FASTV_BAD_SETTING && says("2 layers"));

  EXPECT(fastv_prune_scores(pruner, floats, n_visual, n_tokens, visual, 1, &kept, &why) == FASTV_OK);
  fastv_rows rows = {.data = query_floats, .count = 60, .row_bytes = 4};
  EXPECT(fastv_compact(&kept, &rows, &why) == FASTV_BAD_SHAPE && says("60"));
  EXPECT(fastv_compact(NULL, &rows, NULL) == FASTV_NULL_DATA);
  EXPECT(fastv_compact(&kept, NULL, NULL) == FASTV_NULL_DATA);
  EXPECT(fastv_next_spans(&kept, visual, 1, NULL, &count, NULL) == FASTV_NULL_DATA);
  EXPECT(fastv_next_spans(&kept, NULL, 1, &far, &count, NULL) == FASTV_NULL_DATA);

  fastv_slots* slots = fastv_slots_create();
  EXPECT(fastv_slots_keep(slots, 2, &kept, &why) == FASTV_BAD_SHAPE && says("append"));
  EXPECT(fastv_slots_keep(slots, 2, NULL, NULL) == FASTV_NULL_DATA);
  EXPECT(fastv_slots_keep(NULL, 2, &kept, NULL) == FASTV_NULL_DATA);
  EXPECT(fastv_slots_append(NULL, 1, NULL) == FASTV_NULL_DATA);
  EXPECT(fastv_slots_append(slots, SIZE_MAX, NULL) == FASTV_BAD_PROMPT);
  EXPECT(fastv_slots_append_chunk(NULL, 1, NULL) == FASTV_NULL_DATA);
  EXPECT(fastv_slots_rollback(NULL, 0, NULL) == FASTV_NULL_DATA);
  EXPECT(fastv_slots_copy(slots, NULL, NULL) == FASTV_NULL_DATA);
  EXPECT(fastv_slots_copy(NULL, slots, NULL) == FASTV_NULL_DATA);
  EXPECT(fastv_slots_positions(slots, 0, 0, 1, expected, NULL) == FASTV_BAD_INDEX);
  EXPECT(fastv_slots_positions(NULL, 0, 0, 0, expected, NULL) == FASTV_NULL_DATA);
  EXPECT(fastv_slot_of(NULL, 0, 0) == FASTV_NO_SLOT && fastv_position_of(NULL, 0, 0) == FASTV_NO_SLOT);
  EXPECT(fastv_slots_tokens(NULL) == 0 && fastv_slots_length(NULL, 0) == 0);
  EXPECT(fastv_first_in_window(NULL, 0, 0, 0) == 0);
  fastv_slots_clear(NULL);
  fastv_slots_destroy(NULL);
  fastv_pruner_destroy(NULL);
  fastv_slots_destroy(slots);
  fastv_pruner_destroy(pruner);
}

int main(void) {
  fill(floats, halves, bfloats, most);
  fill(query_floats, query_halves, query_bfloats, most);
  check_layout();
  check_query_key();
  check_options();
  check_other_evidence();
  check_rules();
  check_stages_and_slots();
  check_failures();
  if (failures == 0) puts("fastv_c.h does as the C++ API");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

// fastv: the library for engines in C99.
//
// One C++ file of the program makes the functions, and is compiled as C++17:
//
//   #define FASTV_C_IMPLEMENTATION
//   #include <fastv/fastv_c.h>
//
// The engine includes the header alone. After config.filtering_layer decoder layers have run on n tokens:
//
//   fastv_config config = fastv_default_config();                  // K = 2, R = 50%
//   fastv_pruner* pruner = fastv_pruner_create(&config, NULL);     // once
//   fastv_slots* slots = fastv_slots_create();                     // for each sequence
//   ...
//   fastv_span image = {.first = 35, .count = 576};
//   fastv_query_key qk = {.query = {.data = q, .heads = 32, .tokens = 1, .dim = 128},  // of the last token
//                         .key = {.data = k, .type = FASTV_HALF, .heads = 8, .tokens = n, .dim = 128},
//                         .scale = 0.0884f};
//   fastv_kept kept;
//   fastv_message why;
//   if (fastv_prune_query_key(pruner, &qk, &image, 1, &kept, &why)) return puts(why.text);
//   fastv_rows hidden = {.data = x, .count = n, .row_bytes = 4096 * sizeof(float)};
//   fastv_rows positions = {.data = pos, .count = n, .row_bytes = sizeof(int)};
//   fastv_compact(&kept, &hidden, NULL);                           // kept.count rows are left
//   fastv_compact(&kept, &positions, NULL);
//   fastv_slots_append(slots, n, NULL);
//   fastv_slots_keep(slots, config.filtering_layer, &kept, NULL);  // key n + i of layer l goes to row
//                                                                  // fastv_slots_length(slots, l) of its cache
//
// Functions that can fail return FASTV_OK (0) or a fastv_code, and write a sentence into the message, which may be
// NULL. Fields that are 0 have the default that their comment states, and so may be left out of an initialiser.
// Meanings are those of the C++ headers; config.hpp, view.hpp, evidence.hpp and slots.hpp say more.
// As detail/begin.hpp, which the library in one file does not have beside it.
#pragma push_macro("Status")
#pragma push_macro("columns")
#pragma push_macro("slots")
#undef Status
#undef columns
#undef slots

#ifndef FASTV_C_H
#define FASTV_C_H

#include <stddef.h>
#include <stdint.h>

#ifndef FASTV_C_API
#define FASTV_C_API  // before each function: __declspec(dllexport), a visibility, ...
#endif

#ifdef __cplusplus
extern "C" {
#endif

// ---- plain data ---------------------------------------------------------------------------------

typedef uint32_t fastv_index;  // position of a token, row of a tensor, cache slot
// What went wrong.
typedef struct fastv_message {
  char text[320];  // one sentence, ended by a zero
} fastv_message;

enum fastv_code {
  FASTV_OK,
  FASTV_BAD_SETTING,
  FASTV_BAD_PROMPT,
  FASTV_BAD_SHAPE,
  FASTV_BAD_STRIDE,
  FASTV_NULL_DATA,
  FASTV_TOO_SMALL,
  FASTV_BAD_INDEX,
  FASTV_BAD_PAGES,
  FASTV_BAD_VALUE,
  FASTV_MISSING_EVIDENCE,
  FASTV_NOT_SUPPORTED,
  FASTV_OVER_BUDGET,
  FASTV_OUT_OF_MEMORY
};
enum { FASTV_FLOAT, FASTV_HALF, FASTV_BFLOAT16 };                  // element types; half and bfloat16 are 16 bits
enum { FASTV_OF_REMAINING, FASTV_OF_ORIGINAL };                    // fastv_config::ratio_of
enum { FASTV_HALF_EVEN, FASTV_UP };                                // fastv_config::rounding
enum { FASTV_PER_IMAGE, FASTV_POOLED };                            // fastv_config::quota
enum { FASTV_LAST_ROW, FASTV_ALL_ROWS, FASTV_LISTED_ROWS };        // fastv_config::score_rows
enum { FASTV_TOP_K, FASTV_RANDOM, FASTV_UNIFORM, FASTV_DIVERSE };  // fastv_config::selection
enum { FASTV_NEAREST, FASTV_COVERAGE, FASTV_VOLUME };              // fastv_config::novelty
enum { FASTV_SUM, FASTV_PRODUCT };                                 // fastv_config::blend
#define FASTV_BY_RATIO SIZE_MAX                                    // fastv_config::keep_count where the ratio decides
#define FASTV_NO_SLOT 0xffffffffu                                  // of a token that was dropped or has not come yet

// Settings of one stage: start from fastv_default_config().
typedef struct fastv_config {
  size_t filtering_layer;  // K: layers that run before the stage
  double filtering_ratio;  // R: share of the visual tokens that is dropped
  int ratio_of, rounding;
  size_t keep_count;  // visual tokens that stay; FASTV_BY_RATIO: R decides. 0 only beside an R of 1: to keep none
  int quota;
  size_t min_per_image;
  int score_rows, selection;
  const fastv_index* listed_rows;  // [listed_count] prompt positions, read at each prune; likewise prior_rows
  size_t listed_count;
  const fastv_index* prior_rows;
  size_t prior_count;
  uint64_t seed;
  double uniform_share;
  size_t window_rows, window_columns;
  int novelty, blend;  // FASTV_DIVERSE, which needs fastv_set_features(); see Diversity in config.hpp
  double diversity_weight, protected_share;
} fastv_config;

// Visual tokens first .. first + count - 1 of a prompt: one image, tile or frame, or a part of one.
typedef struct fastv_span {
  size_t first, count;
  size_t columns;          // of the grid; 0: unknown
  size_t original;         // tokens before earlier stages; 0: count
  double filtering_ratio;  // of this image alone, read where own_ratio is not 0
  int own_ratio;
  int continues;  // not 0: part of the same image as the span before
} fastv_span;

// Vectors of one layer. Strides in elements; both 0: [tokens, heads, dim]. For [heads, tokens, dim], state both.
typedef struct fastv_heads {
  const void* data;  // of a paged cache: of block 0
  int type;          // FASTV_FLOAT, ...
  size_t heads, tokens, dim;
  ptrdiff_t head_stride, token_stride;  // with pages: within a block
  const fastv_index* block_table;       // [blocks] of this sequence; NULL: one piece
  size_t blocks, block_tokens;
  ptrdiff_t block_stride;  // 0: blocks lie side by side
} fastv_heads;

// Queries and keys of layer K - 1, after RoPE. The query rows are the last of the prompt; heads share KV heads as in
// GQA.
typedef struct fastv_query_key {
  fastv_heads query, key;
  float scale, soft_cap;              // soft_cap 0: none
  const float *bias, *sinks, *alibi;  // [keys], [query heads], [query heads], or NULL
  const fastv_index* visible;         // [query rows] keys that each sees, or NULL: up to its own position
  int all_keys;                       // not 0: rows see all keys
  size_t window, past, first_key, heads_total;
} fastv_query_key;

// Attention probabilities of layer K - 1, [heads, queries, keys]. Strides in elements; 0: contiguous.
typedef struct fastv_probabilities {
  const void* data;
  int type;
  size_t heads, queries, keys;
  ptrdiff_t head_stride, query_stride, key_stride;
  size_t past, first_key, heads_total;
} fastv_probabilities;

// What FASTV_DIVERSE compares tokens by: one vector for each head and token, earlier turns' included.
typedef struct fastv_features {
  fastv_heads vectors;  // the keys of layer K - 1, hidden rows as one head, ...
  size_t past;          // tokens of earlier turns
  int mean_of_heads;    // not 0: the mean of the heads, in place of all side by side
  size_t projected;     // elements they are projected to; 0: as they are
} fastv_features;

// Rows of what a layer did to each token of the prompt, [tokens, width]. Strides in elements; 0: width.
typedef struct fastv_changes {
  const void *after, *before;  // before NULL: the length of after counts
  int type;
  size_t tokens, width, stride, before_stride;
  int transition;  // not 0: transitions() of changes.hpp; 0: the length of after - before
} fastv_changes;

// What stays. The indices ascend, count every text token, and are valid until the next prune of the same pruner.
typedef struct fastv_kept {
  const fastv_index* indices;  // [count]
  size_t count, prompt_tokens, nan_scores, zero_scores;
} fastv_kept;

// Rows to be moved as bytes: hidden states, position ids, caches. Strides in bytes.
typedef struct fastv_rows {
  void* data;
  size_t count, row_bytes;
  ptrdiff_t row_stride;    // 0: row_bytes
  size_t planes;           // 0: 1
  ptrdiff_t plane_stride;  // 0: planes lie side by side
  int packed;              // not 0: planes end side by side, as position ids of several axes must
} fastv_rows;

// ---- pruning ------------------------------------------------------------------------------------

FASTV_C_API fastv_config fastv_default_config(void);
// Tokens that each layer runs on, into layer_tokens [layers], before anything runs; its keys are as many and those of
// earlier turns. stages: [stage_count], by layer.
FASTV_C_API int fastv_plan(const fastv_config* stages, size_t stage_count, const fastv_span* visual, size_t spans,
                           size_t tokens, size_t layers, size_t* layer_tokens, fastv_message* message);

// Holds scratch memory: one for each thread, and for each stage. NULL where the settings are wrong.
typedef struct fastv_pruner fastv_pruner;
FASTV_C_API fastv_pruner* fastv_pruner_create(const fastv_config* config, fastv_message* message);
FASTV_C_API void fastv_pruner_destroy(fastv_pruner* pruner);
// What FASTV_DIVERSE compares tokens by from now on; the vectors are read at each prune. NULL: nothing any more.
FASTV_C_API int fastv_set_features(fastv_pruner* pruner, const fastv_features* features, fastv_message* message);
FASTV_C_API int fastv_prune_query_key(fastv_pruner* pruner, const fastv_query_key* evidence, const fastv_span* visual,
                                      size_t spans, fastv_kept* kept, fastv_message* message);
FASTV_C_API int fastv_prune_probabilities(fastv_pruner* pruner, const fastv_probabilities* evidence,
                                          const fastv_span* visual, size_t spans, fastv_kept* kept,
                                          fastv_message* message);
// By weighted logits: query, key and past are read of the evidence, ahead of RoPE. weights: [query heads], or NULL.
FASTV_C_API int fastv_prune_logits(fastv_pruner* pruner, const fastv_query_key* evidence, const float* weights,
                                   const fastv_span* visual, size_t spans, fastv_kept* kept, fastv_message* message);
FASTV_C_API int fastv_prune_changes(fastv_pruner* pruner, const fastv_changes* evidence, const fastv_span* visual,
                                    size_t spans, fastv_kept* kept, fastv_message* message);
// By scores of your own, one for each visual token; NULL and 0 for rules that look at none. tokens: of the prompt.
FASTV_C_API int fastv_prune_scores(fastv_pruner* pruner, const float* scores, size_t count, size_t tokens,
                                   const fastv_span* visual, size_t spans, fastv_kept* kept, fastv_message* message);
// Moves the kept rows to the front, in place.
FASTV_C_API int fastv_compact(const fastv_kept* kept, const fastv_rows* rows, fastv_message* message);
// The spans of what is left, for the next stage: left has room for `spans`, *count receives how many there are.
FASTV_C_API int fastv_next_spans(const fastv_kept* kept, const fastv_span* visual, size_t spans, fastv_span* left,
                                 size_t* count, fastv_message* message);

// ---- slots: which row of each layer's cache holds which token -----------------------------------

typedef struct fastv_slots fastv_slots;
FASTV_C_API fastv_slots* fastv_slots_create(void);  // NULL: out of memory
FASTV_C_API void fastv_slots_destroy(fastv_slots* slots);
FASTV_C_API void fastv_slots_clear(fastv_slots* slots);
FASTV_C_API int fastv_slots_append(fastv_slots* slots, size_t tokens, fastv_message* message);
// A further chunk of the prompt that the last append began, so that fastv_slots_keep() takes them as one.
FASTV_C_API int fastv_slots_append_chunk(fastv_slots* slots, size_t tokens, fastv_message* message);
FASTV_C_API int fastv_slots_keep(fastv_slots* slots, size_t filtering_layer, const fastv_kept* kept,
                                 fastv_message* message);
FASTV_C_API int fastv_slots_rollback(fastv_slots* slots, size_t tokens, fastv_message* message);
FASTV_C_API int fastv_slots_copy(fastv_slots* to, const fastv_slots* from, fastv_message* message);
FASTV_C_API size_t fastv_slots_tokens(const fastv_slots* slots);  // the next token's position
FASTV_C_API size_t fastv_slots_length(const fastv_slots* slots, size_t layer);
FASTV_C_API fastv_index fastv_slot_of(const fastv_slots* slots, size_t layer, size_t position);
FASTV_C_API fastv_index fastv_position_of(const fastv_slots* slots, size_t layer, size_t slot);
FASTV_C_API size_t fastv_first_in_window(const fastv_slots* slots, size_t layer, size_t position, size_t window);
FASTV_C_API int fastv_slots_positions(const fastv_slots* slots, size_t layer, size_t first_slot, size_t count,
                                      fastv_index* positions, fastv_message* message);

#ifdef __cplusplus
}
#endif
#endif

// ---- the definitions ----------------------------------------------------------------------------

#if defined(FASTV_C_IMPLEMENTATION) && !defined(FASTV_C_IMPLEMENTED)
#define FASTV_C_IMPLEMENTED
#ifndef __cplusplus
#error "FASTV_C_IMPLEMENTATION makes the functions of fastv_c.h, and goes into a C++ file"
#endif

#include "fastv.hpp"

struct fastv_pruner {
  fastv::Pruner<> pruner;
  fastv::detail::Buffer<fastv::TokenSpan> spans;
  fastv_features features = {};
  bool has_features = false;
};
struct fastv_slots {
  fastv::Slots slots;
};

namespace fastv {
namespace detail {
inline namespace c_face {

static_assert(is_same<fastv_index, Index> && FASTV_NO_SLOT == Slots::none && FASTV_BY_RATIO == by_ratio, "plain data");
static_assert(sizeof(fastv_message) == sizeof(Message), "messages are copied whole");
static_assert(FASTV_OK == int(Errc::ok) && FASTV_BAD_SETTING == int(Errc::bad_setting) &&
                  FASTV_BAD_PROMPT == int(Errc::bad_prompt) && FASTV_BAD_SHAPE == int(Errc::bad_shape) &&
                  FASTV_BAD_STRIDE == int(Errc::bad_stride) && FASTV_NULL_DATA == int(Errc::null_data) &&
                  FASTV_TOO_SMALL == int(Errc::too_small) && FASTV_BAD_INDEX == int(Errc::bad_index) &&
                  FASTV_BAD_PAGES == int(Errc::bad_pages) && FASTV_BAD_VALUE == int(Errc::bad_value) &&
                  FASTV_MISSING_EVIDENCE == int(Errc::missing_evidence) &&
                  FASTV_NOT_SUPPORTED == int(Errc::not_supported) && FASTV_OVER_BUDGET == int(Errc::over_budget) &&
                  FASTV_OUT_OF_MEMORY == int(Errc::out_of_memory),
              "codes are handed on");
static_assert(FASTV_OF_REMAINING == int(RatioOf::remaining) && FASTV_OF_ORIGINAL == int(RatioOf::original) &&
                  FASTV_HALF_EVEN == int(Rounding::half_even) && FASTV_UP == int(Rounding::up) &&
                  FASTV_PER_IMAGE == int(Quota::per_image) && FASTV_POOLED == int(Quota::pooled) &&
                  FASTV_LAST_ROW == int(ScoreRows::last) && FASTV_ALL_ROWS == int(ScoreRows::all) &&
                  FASTV_LISTED_ROWS == int(ScoreRows::listed) && FASTV_TOP_K == int(Selection::top_k) &&
                  FASTV_RANDOM == int(Selection::random) && FASTV_UNIFORM == int(Selection::uniform) &&
                  FASTV_DIVERSE == int(Selection::diverse) && FASTV_NEAREST == int(Novelty::nearest) &&
                  FASTV_COVERAGE == int(Novelty::coverage) && FASTV_VOLUME == int(Novelty::volume) &&
                  FASTV_SUM == int(Blend::sum) && FASTV_PRODUCT == int(Blend::product),
              "settings are handed on");

inline int report(const Status& status, fastv_message* message) noexcept {
  if (message != nullptr) std::memcpy(message->text, status.message().text, sizeof(message->text));
  return static_cast<int>(status.code);
}

// A setting that C keeps as an int. last: the greatest.
template <class Setting>
Status read_setting(int value, Setting last, const char* name, Setting& setting) noexcept {
  if (value < 0 || value > static_cast<int>(last))
    return fail(Errc::bad_setting, "{} is {} but must lie between 0 and {}", name, value, static_cast<int>(last));
  setting = static_cast<Setting>(value);
  return {};
}

inline Result<Config> read_config(const fastv_config& from) noexcept {
  Config config;
  config.filtering_layer = from.filtering_layer;
  config.filtering_ratio = from.filtering_ratio;
  config.keep_count = from.keep_count;
  config.min_per_image = from.min_per_image;
  config.listed_rows = {from.listed_rows, from.listed_count};
  config.prior_rows = {from.prior_rows, from.prior_count};
  config.seed = from.seed;
  config.uniform_share = from.uniform_share;
  config.window_rows = from.window_rows;
  config.window_columns = from.window_columns;
  if (from.keep_count == 0 && from.filtering_ratio != 1)  // an initialiser that left it out, as a rule
    return {
        {},
        fail(Errc::bad_setting,
             "keep_count is 0, so that every visual token would be dropped whatever filtering_ratio, {}, says: start "
             "from fastv_default_config(), or set filtering_ratio to 1 to keep none",
             from.filtering_ratio)};
  config.diversity.weight = from.diversity_weight;
  config.diversity.protected_share = from.protected_share;
  Status status = read_setting(from.ratio_of, RatioOf::original, "ratio_of", config.ratio_of);
  if (status) status = read_setting(from.rounding, Rounding::up, "rounding", config.rounding);
  if (status) status = read_setting(from.quota, Quota::pooled, "quota", config.quota);
  if (status) status = read_setting(from.score_rows, ScoreRows::listed, "score_rows", config.score_rows);
  if (status) status = read_setting(from.selection, Selection::diverse, "selection", config.selection);
  if (status) status = read_setting(from.novelty, Novelty::volume, "novelty", config.diversity.novelty);
  if (status) status = read_setting(from.blend, Blend::product, "blend", config.diversity.blend);
  return {config, status};
}

// Spans as the library has them, in memory that the caller keeps.
inline Result<Span<const TokenSpan>> read_spans(const fastv_span* spans, std::size_t count,
                                                Buffer<TokenSpan>& memory) noexcept {
  if (count > 0 && spans == nullptr) return {{}, fail_null("visual spans")};
  if (Status status = memory.reserve(count); !status) return {{}, status};
  for (std::size_t i = 0; i < count; ++i)
    memory[i] = {spans[i].first,    spans[i].count,
                 spans[i].columns,  spans[i].continues != 0,
                 spans[i].original, spans[i].own_ratio != 0 ? spans[i].filtering_ratio : by_config};
  return {{memory.first(count).data(), count}, {}};
}

// A stride, or what it is by default; sizes that no memory holds are found where strides are checked.
inline std::ptrdiff_t stride_or(std::ptrdiff_t stride, std::size_t otherwise) noexcept {
  return stride != 0 ? stride : static_cast<std::ptrdiff_t>(otherwise);
}

// Calls use(data) with a pointer to the element type.
template <class Use>
Status with_elements(const void* data, int type, const char* what, Use use) noexcept {
  switch (type) {
    case FASTV_FLOAT: return use(static_cast<const float*>(data));
    case FASTV_HALF: return use(static_cast<const half*>(data));
    case FASTV_BFLOAT16: return use(static_cast<const bfloat16*>(data));
  }
  return fail(Errc::not_supported, "{} has element type {}: use FASTV_FLOAT, FASTV_HALF or FASTV_BFLOAT16", what, type);
}

template <class T>
Heads<T> read_heads(const T* data, const fastv_heads& from) noexcept {
  Heads<T> view{data,
                from.heads,
                from.tokens,
                from.dim,
                stride_or(from.head_stride, from.dim),
                stride_or(from.token_stride, from.heads * from.dim)};
  if (from.block_table == nullptr && from.blocks == 0 && from.block_tokens == 0) return view;
  const bool bare = from.blocks == 0 && from.block_tokens == 0;  // a table alone: refused for its blocks of 0 tokens
  view.pages.block_table = {from.block_table, bare ? 1 : from.blocks};
  view.pages.block_tokens = from.block_tokens;
  view.pages.block_stride = stride_or(from.block_stride, from.block_tokens * from.heads * from.dim);
  return view;
}

// Vectors of any of the three types, so that evidence is compiled with features of one.
struct LoadVector {
  Heads<float> wide;
  Heads<half> halves;
  Heads<bfloat16> bfloats;
  int type;

  Status sound() const noexcept {
    if (type == FASTV_HALF) return check_heads(halves, "features");
    if (type == FASTV_BFLOAT16) return check_heads(bfloats, "features");
    if (type == FASTV_FLOAT) return check_heads(wide, "features");
    return fail(Errc::not_supported, "features have element type {}: use FASTV_FLOAT, FASTV_HALF or FASTV_BFLOAT16",
                type);
  }
  void operator()(std::size_t head, std::size_t token, float* out) const noexcept {
    if (type == FASTV_HALF) return load_vector(halves, head, token, out);
    if (type == FASTV_BFLOAT16) return load_vector(bfloats, head, token, out);
    load_vector(wide, head, token, out);
  }
};

template <class Evidence>
Status prune_into(fastv_pruner& pruner, const Evidence& evidence, const fastv_span* visual, std::size_t spans,
                  fastv_kept& out) noexcept {
  const Result<Span<const TokenSpan>> list = read_spans(visual, spans, pruner.spans);
  if (!list) return list.status;
  Kept kept;
  if (pruner.has_features && pruner.pruner.config().selection == Selection::diverse) {
    const fastv_features& f = pruner.features;
    const LoadVector load{read_heads(static_cast<const float*>(f.vectors.data), f.vectors),
                          read_heads(static_cast<const half*>(f.vectors.data), f.vectors),
                          read_heads(static_cast<const bfloat16*>(f.vectors.data), f.vectors), f.vectors.type};
    if (Status status = load.sound(); !status) return status;
    const auto vectors = loaded_keys(f.vectors.heads, f.vectors.tokens, f.vectors.dim, load);
    kept = pruner.pruner.prune(with_features(evidence, Features{vectors, f.past, f.mean_of_heads != 0, f.projected}),
                               *list);
  } else {
    kept = pruner.pruner.prune(evidence, *list);
  }
  out = {kept.indices.data(), kept.indices.size(), kept.prompt_tokens, kept.nan_scores, kept.zero_scores};
  return kept.status;
}

// C has no failed Kept: that of a prune that failed is all 0.
inline KeptRows read_kept(const fastv_kept& kept) noexcept {
  return {{kept.indices, kept.count},
          kept.prompt_tokens,
          kept.prompt_tokens != 0
              ? Status{}
              : fail(Errc::bad_prompt,
                     "the kept indices are of 0 tokens, as a prune that failed leaves them: look at "
                     "what it returned, and go on where that is FASTV_OK")};
}

}  // namespace c_face
}  // namespace detail
// In the namespace, so that names are those of the library whatever the file has declared before. C knows no
// namespaces.
extern "C" {

fastv_config fastv_default_config(void) {
  const Config c;
  return {c.filtering_layer,
          c.filtering_ratio,
          static_cast<int>(c.ratio_of),
          static_cast<int>(c.rounding),
          c.keep_count,
          static_cast<int>(c.quota),
          c.min_per_image,
          static_cast<int>(c.score_rows),
          static_cast<int>(c.selection),
          c.listed_rows.data(),
          c.listed_rows.size(),
          c.prior_rows.data(),
          c.prior_rows.size(),
          c.seed,
          c.uniform_share,
          c.window_rows,
          c.window_columns,
          static_cast<int>(c.diversity.novelty),
          static_cast<int>(c.diversity.blend),
          c.diversity.weight,
          c.diversity.protected_share};
}

int fastv_plan(const fastv_config* stages, size_t stage_count, const fastv_span* visual, size_t spans, size_t tokens,
               size_t layers, size_t* layer_tokens, fastv_message* message) {
  if ((stage_count > 0 && stages == nullptr) || layer_tokens == nullptr)
    return detail::report(detail::fail_null(layer_tokens == nullptr ? "layer_tokens" : "the stages"), message);
  Config schedule[max_stages];
  for (size_t s = 0; s < stage_count && s < max_stages; ++s) {
    const Result<Config> config = detail::read_config(stages[s]);
    if (!config) return detail::report(config.status, message);
    schedule[s] = *config;
  }
  detail::Buffer<TokenSpan> memory;
  const Result<Span<const TokenSpan>> list = detail::read_spans(visual, spans, memory);
  if (!list) return detail::report(list.status, message);
  const Result<Plan> plan = make_plan(Span<const Config>(schedule, stage_count), Prompt{tokens, layers, *list});
  for (size_t layer = 0; plan && layer < layers; ++layer) layer_tokens[layer] = plan->tokens_in_layer(layer);
  return detail::report(plan.status, message);
}

fastv_pruner* fastv_pruner_create(const fastv_config* config, fastv_message* message) {
  Result<Config> settings{{}, detail::fail_null("the settings")};
  if (config != nullptr) settings = detail::read_config(*config);
  if (settings) settings.status = validate(*settings);
  fastv_pruner* pruner = settings ? new (std::nothrow) fastv_pruner : nullptr;
  if (settings && pruner == nullptr) settings.status = fail(Errc::out_of_memory, "a pruner could not be allocated");
  if (pruner != nullptr) pruner->pruner.set_config(*settings);
  detail::report(settings.status, message);
  return pruner;
}
void fastv_pruner_destroy(fastv_pruner* pruner) { delete pruner; }

int fastv_prune_query_key(fastv_pruner* pruner, const fastv_query_key* evidence, const fastv_span* visual, size_t spans,
                          fastv_kept* kept, fastv_message* message) {
  if (kept != nullptr) *kept = {};
  if (pruner == nullptr || evidence == nullptr || kept == nullptr)
    return detail::report(detail::fail_null("the pruner, the evidence or what receives the kept indices"), message);
  const fastv_query_key& e = *evidence;
  const auto list = [](const auto* data, size_t size) { return Span(data, data == nullptr ? 0 : size); };
  return detail::report(detail::with_elements(e.query.data, e.query.type, "q",
                                              [&](const auto* query) {
                                                return detail::with_elements(
                                                    e.key.data, e.key.type, "k", [&](const auto* key) {
                                                      auto view = query_key(detail::read_heads(query, e.query),
                                                                            detail::read_heads(key, e.key), e.scale);
                                                      view.soft_cap = e.soft_cap;
                                                      view.bias = list(e.bias, e.key.tokens);
                                                      view.sinks = list(e.sinks, e.query.heads);
                                                      view.alibi = list(e.alibi, e.query.heads);
                                                      view.visible = list(e.visible, e.query.tokens);
                                                      view.causal = e.all_keys == 0;
                                                      view.window = e.window;
                                                      view.past = e.past;
                                                      view.first_key = e.first_key;
                                                      view.heads_total = e.heads_total;
                                                      return detail::prune_into(*pruner, view, visual, spans, *kept);
                                                    });
                                              }),
                        message);
}

int fastv_prune_probabilities(fastv_pruner* pruner, const fastv_probabilities* evidence, const fastv_span* visual,
                              size_t spans, fastv_kept* kept, fastv_message* message) {
  if (kept != nullptr) *kept = {};
  if (pruner == nullptr || evidence == nullptr || kept == nullptr)
    return detail::report(detail::fail_null("the pruner, the evidence or what receives the kept indices"), message);
  const fastv_probabilities& e = *evidence;
  return detail::report(detail::with_elements(e.data, e.type, "the attention",
                                              [&](const auto* data) {
                                                auto view = probabilities(data, e.heads, e.queries, e.keys);
                                                view.head_stride = detail::stride_or(e.head_stride, e.queries * e.keys);
                                                view.query_stride = detail::stride_or(e.query_stride, e.keys);
                                                view.key_stride = detail::stride_or(e.key_stride, 1);
                                                view.past = e.past;
                                                view.first_key = e.first_key;
                                                view.heads_total = e.heads_total;
                                                return detail::prune_into(*pruner, view, visual, spans, *kept);
                                              }),
                        message);
}

int fastv_set_features(fastv_pruner* pruner, const fastv_features* features, fastv_message* message) {
  if (pruner == nullptr) return detail::report(detail::fail_null("the pruner"), message);
  pruner->has_features = features != nullptr;
  if (features != nullptr) pruner->features = *features;
  return detail::report({}, message);
}

int fastv_prune_logits(fastv_pruner* pruner, const fastv_query_key* evidence, const float* weights,
                       const fastv_span* visual, size_t spans, fastv_kept* kept, fastv_message* message) {
  if (kept != nullptr) *kept = {};
  if (pruner == nullptr || evidence == nullptr || kept == nullptr)
    return detail::report(detail::fail_null("the pruner, the evidence or what receives the kept indices"), message);
  const fastv_query_key& e = *evidence;
  const Span<const float> given(weights, weights == nullptr ? 0 : e.query.heads);
  return detail::report(
      detail::with_elements(e.query.data, e.query.type, "q",
                            [&](const auto* query) {
                              return detail::with_elements(e.key.data, e.key.type, "k", [&](const auto* key) {
                                const auto view = logits(detail::read_heads(query, e.query),
                                                         detail::read_heads(key, e.key), given, e.past);
                                return detail::prune_into(*pruner, view, visual, spans, *kept);
                              });
                            }),
      message);
}

int fastv_prune_changes(fastv_pruner* pruner, const fastv_changes* evidence, const fastv_span* visual, size_t spans,
                        fastv_kept* kept, fastv_message* message) {
  if (kept != nullptr) *kept = {};
  if (pruner == nullptr || evidence == nullptr || kept == nullptr)
    return detail::report(detail::fail_null("the pruner, the evidence or what receives the kept indices"), message);
  const fastv_changes& e = *evidence;
  return detail::report(detail::with_elements(e.after, e.type, "the rows",
                                              [&](const auto* after) {
                                                auto view = changes(static_cast<decltype(after)>(e.before), after,
                                                                    e.tokens, e.width);
                                                view.by = e.transition != 0 ? ChangeBy::transition : ChangeBy::distance;
                                                view.stride = e.stride;
                                                view.before_stride = e.before_stride;
                                                return detail::prune_into(*pruner, view, visual, spans, *kept);
                                              }),
                        message);
}

int fastv_prune_scores(fastv_pruner* pruner, const float* scores, size_t count, size_t tokens, const fastv_span* visual,
                       size_t spans, fastv_kept* kept, fastv_message* message) {
  if (kept != nullptr) *kept = {};
  if (pruner == nullptr || kept == nullptr)
    return detail::report(detail::fail_null("the pruner or what receives the kept indices"), message);
  const Scores<float> evidence{{scores, count}, tokens};
  return detail::report(detail::prune_into(*pruner, evidence, visual, spans, *kept), message);
}

int fastv_compact(const fastv_kept* kept, const fastv_rows* rows, fastv_message* message) {
  if (kept == nullptr || rows == nullptr)
    return detail::report(detail::fail_null("the kept indices or the rows"), message);
  const std::ptrdiff_t row_stride = detail::stride_or(rows->row_stride, rows->row_bytes);
  return detail::report(
      compact(detail::read_kept(*kept),
              Rows{rows->data, rows->count, rows->row_bytes, row_stride, rows->planes == 0 ? 1 : rows->planes,
                   detail::stride_or(rows->plane_stride, rows->count * static_cast<std::size_t>(row_stride)),
                   rows->packed != 0}),
      message);
}

int fastv_next_spans(const fastv_kept* kept, const fastv_span* visual, size_t spans, fastv_span* left, size_t* count,
                     fastv_message* message) {
  if (kept == nullptr || count == nullptr || (left == nullptr && spans > 0))
    return detail::report(detail::fail_null("the kept indices or what receives the spans"), message);
  *count = 0;
  detail::Buffer<TokenSpan> memory;
  const Result<Span<const TokenSpan>> list = detail::read_spans(visual, spans, memory);
  if (!list) return detail::report(list.status, message);
  const Result<size_t> written = next_spans(detail::read_kept(*kept), *list, memory.first(spans));
  for (size_t i = 0; written && i < *written; ++i) {
    const TokenSpan& span = memory[i];
    const bool own = span.filtering_ratio != by_config;
    left[i] = {span.first, span.count,    span.columns, span.original, own ? span.filtering_ratio : 0,
               own,        span.continues};
  }
  *count = *written;
  return detail::report(written.status, message);
}

fastv_slots* fastv_slots_create(void) { return new (std::nothrow) fastv_slots; }
void fastv_slots_destroy(fastv_slots* slots) { delete slots; }
void fastv_slots_clear(fastv_slots* slots) {
  if (slots != nullptr) slots->slots.clear();
}
int fastv_slots_append(fastv_slots* slots, size_t tokens, fastv_message* message) {
  return detail::report(slots == nullptr ? detail::fail_null("the slots") : slots->slots.append(tokens), message);
}
int fastv_slots_append_chunk(fastv_slots* slots, size_t tokens, fastv_message* message) {
  return detail::report(slots == nullptr ? detail::fail_null("the slots") : slots->slots.append_chunk(tokens), message);
}
int fastv_slots_keep(fastv_slots* slots, size_t filtering_layer, const fastv_kept* kept, fastv_message* message) {
  if (slots == nullptr || kept == nullptr)
    return detail::report(detail::fail_null("the slots or the kept indices"), message);
  return detail::report(slots->slots.keep(filtering_layer, detail::read_kept(*kept)), message);
}
int fastv_slots_rollback(fastv_slots* slots, size_t tokens, fastv_message* message) {
  return detail::report(slots == nullptr ? detail::fail_null("the slots") : slots->slots.rollback(tokens), message);
}
int fastv_slots_copy(fastv_slots* to, const fastv_slots* from, fastv_message* message) {
  if (to == nullptr || from == nullptr) return detail::report(detail::fail_null("the slots"), message);
  return detail::report(to->slots.copy_from(from->slots), message);
}
size_t fastv_slots_tokens(const fastv_slots* slots) { return slots == nullptr ? 0 : slots->slots.tokens(); }
size_t fastv_slots_length(const fastv_slots* slots, size_t layer) {
  return slots == nullptr ? 0 : slots->slots.length(layer);
}
fastv_index fastv_slot_of(const fastv_slots* slots, size_t layer, size_t position) {
  return slots == nullptr ? FASTV_NO_SLOT : slots->slots.slot_of(layer, position);
}
fastv_index fastv_position_of(const fastv_slots* slots, size_t layer, size_t slot) {
  return slots == nullptr ? FASTV_NO_SLOT : slots->slots.position_of(layer, slot);
}
size_t fastv_first_in_window(const fastv_slots* slots, size_t layer, size_t position, size_t window) {
  return slots == nullptr ? 0 : slots->slots.first_in_window(layer, position, window);
}
int fastv_slots_positions(const fastv_slots* slots, size_t layer, size_t first_slot, size_t count,
                          fastv_index* positions, fastv_message* message) {
  if (slots == nullptr) return detail::report(detail::fail_null("the slots"), message);
  return detail::report(slots->slots.write_positions(layer, first_slot, Span<Index>(positions, count)), message);
}

}  // extern "C"

}  // namespace fastv

#endif

#pragma pop_macro("slots")
#pragma pop_macro("columns")
#pragma pop_macro("Status")

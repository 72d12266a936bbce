// fastv for ggml: pruning as nodes of a graph, on whichever backend the graph runs on.
#pragma once

#include "fastv.hpp"
#include "ggml_views.hpp"

#include "detail/begin.hpp"

namespace fastv {

namespace detail {
inline namespace FASTV_KIND {

// Positions are sorted as F32: they, and twice their number, must be exact.
inline constexpr std::size_t most_in_graph = std::size_t{1} << 23;
inline constexpr float behind_all = static_cast<float>(most_in_graph);
inline constexpr float greatest_float = 3.402823466e+38f;

// Shapes are checked by the core, on views that are never read.
inline constexpr float never_read = 0;

inline Status check_attention(const ggml_context* ctx, const ggml_tensor* q, const ggml_tensor* k, float scale,
                              float soft_cap, const ggml_tensor* sinks, const ggml_tensor* mask) noexcept {
  if (ctx == nullptr) return fail_null("the context");
  if (Status status = check_sequence(q, "query"); !status) return status;
  if (Status status = check_sequence(k, "key"); !status) return status;
  if (Status status = check_vectors(q, "query"); !status) return status;
  if (Status status = check_vectors(k, "key"); !status) return status;
  if (q->type != GGML_TYPE_F32)
    return fail(Errc::not_supported, "query is of type {}: cast it to F32", ggml_type_name(q->type));
  const auto shape_of = [](const ggml_tensor* t) {
    return fastv::heads(&never_read, HeadMajor{from_ne(t->ne[1]), from_ne(t->ne[2]), from_ne(t->ne[0])});
  };
  QueryKey<float> shape = fastv::query_key(shape_of(q), shape_of(k), scale);
  shape.soft_cap = soft_cap;
  if (Status status = shape.check(); !status) return status;
  if (sinks != nullptr && (sinks->type != GGML_TYPE_F32 || sinks->ne[0] != q->ne[1] || ggml_nrows(sinks) != 1))
    return fail(Errc::bad_shape, "the sinks are {} entries of type {}: hand over one F32 for each of {} heads",
                ggml_nelements(sinks), ggml_type_name(sinks->type), q->ne[1]);
  if (mask != nullptr && mask->type != GGML_TYPE_F32 && mask->type != GGML_TYPE_F16)
    return fail(Errc::not_supported, "the mask is of type {}: ggml reads F32 and F16", ggml_type_name(mask->type));
  if (mask != nullptr &&
      (mask->ne[0] < k->ne[2] || mask->ne[1] < q->ne[2] || mask->nb[0] != ggml_type_size(mask->type)))
    return fail(Errc::bad_shape, "the mask is [{}, {}] but the query has {} rows over {} keys", mask->ne[0],
                mask->ne[1], q->ne[2], k->ne[2]);
  return {};
}

inline Status check_positions(const ggml_context* ctx, const ggml_tensor* positions, int axes,
                              const ggml_tensor* kept) noexcept {
  if (ctx == nullptr) return fail_null("the context");
  if (positions == nullptr) return fail_null("the positions");
  if (kept == nullptr) return fail_null("the kept indices");
  if (axes < 1 || positions->ne[0] % axes != 0 || ggml_nrows(positions) != 1 || !ggml_is_contiguous(positions))
    return fail(Errc::bad_shape, "{} positions are not {} axes of one list after the other", ggml_nelements(positions),
                axes);
  return {};
}

// Scores as selection ranks them: `value` without NaN (0 instead) and with infinities as the greatest finite numbers;
// `number` is 1, and 0 where the score is NaN.
struct ScoreNodes {
  ggml_tensor *value, *number;
};
inline ScoreNodes score_nodes(ggml_context* ctx, ggml_tensor* scores) noexcept {
  // A comparison with NaN is false, and relu is a comparison.
  ggml_tensor* number = ggml_step(ctx, ggml_scale_bias(ctx, ggml_abs(ctx, scores), 1, 1));
  ggml_tensor* value = ggml_sub(ctx, ggml_relu(ctx, scores), ggml_relu(ctx, ggml_neg(ctx, scores)));
  return {ggml_clamp(ctx, value, -greatest_float, greatest_float), number};
}
// value + rank * infinity: rank -1 goes below every number, 0 stays, 1 goes above.
inline ggml_tensor* ranked(ggml_context* ctx, ggml_tensor* value, ggml_tensor* rank) noexcept {
  return ggml_add(ctx, value, ggml_scale(ctx, ggml_scale(ctx, rank, greatest_float), 2));
}

// 1 for the highest entries of each row, 0 for the others; of equal ones the earlier stays. rows: F32 [size, groups],
// without NaN. lowest: I32 [groups], group * size + the number in descending order of the lowest entry that stays.
// quota: F32 [1, groups], how many stay, and a half.
inline ggml_tensor* highest(ggml_context* ctx, ggml_tensor* rows, ggml_tensor* lowest, ggml_tensor* quota) noexcept {
  const std::int64_t size = rows->ne[0], groups = rows->ne[1];
  ggml_tensor* order = ggml_argsort(ctx, rows, GGML_SORT_ORDER_DESC);
  ggml_tensor* index = ggml_get_rows(ctx, ggml_reshape_2d(ctx, order, 1, size * groups), lowest);  // I32 [1, groups]
  ggml_tensor* cut = ggml_get_rows(ctx, ggml_reshape_3d(ctx, rows, 1, size, groups), index);       // F32 [1, 1, groups]
  ggml_tensor* distance = ggml_sub(ctx, rows, ggml_reshape_2d(ctx, cut, 1, groups));  // NaN between equal infinities
  ggml_tensor* above = ggml_step(ctx, distance);
  ggml_tensor* below = ggml_step(ctx, ggml_neg(ctx, distance));
  ggml_tensor* minus_equal = ggml_scale_bias(ctx, ggml_add(ctx, above, below), 1, -1);
  ggml_tensor* room = ggml_sub(ctx, quota, ggml_sum_rows(ctx, above));  // places left for equal ones, and a half
  ggml_tensor* early = ggml_step(ctx, ggml_add(ctx, ggml_cumsum(ctx, minus_equal), room));
  return ggml_sub(ctx, above, ggml_mul(ctx, minus_equal, early));
}

}  // namespace FASTV_KIND
}  // namespace detail

namespace graph {
inline namespace FASTV_KIND {

// The attention of the last query row, mean over query heads: F32 [keys], a node per step.
//
//   q      F32 [dim, heads, rows] after RoPE; its last row asks
//   k      [dim, kv heads, keys], keys of earlier turns ahead of the prompt's; query head h reads KV head
//          h / (heads / kv heads)
//   sinks  F32 [heads] or null: logits that belong to no token (gpt-oss)
//   mask   F16 or F32 [at least keys, at least rows]: what the layer adds to its logits; null: the row sees every key
//
// The products are summed in F32. Keys of other types than F32 are multiplied at the precision ggml has for them (on
// the CPU, F16 rounds the query to F16): ggml_cast() them to F32 where close scores must rank as prune() ranks them.
// O(1).
inline Result<ggml_tensor*> scores(ggml_context* ctx, ggml_tensor* q, ggml_tensor* k, float scale, float soft_cap = 0,
                                   ggml_tensor* sinks = nullptr, ggml_tensor* mask = nullptr) noexcept {
  if (Status status = detail::check_attention(ctx, q, k, scale, soft_cap, sinks, mask); !status)
    return {nullptr, status};
  const std::int64_t dim = q->ne[0], heads = q->ne[1], keys = k->ne[2];
  const std::size_t last = detail::from_ne(q->ne[2] - 1);
  ggml_tensor* row = ggml_view_3d(ctx, q, dim, 1, heads, q->nb[1], q->nb[1], last * q->nb[2]);  // [dim, 1, heads]
  ggml_tensor* logits = ggml_mul_mat(ctx, ggml_permute(ctx, k, 0, 2, 1, 3), row);               // [keys, 1, heads]
  ggml_prec_set_acc(logits, GGML_PREC_F32);
  if (soft_cap > 0) logits = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, logits, scale / soft_cap)), soft_cap);
  ggml_tensor* seen = mask == nullptr ? nullptr : ggml_view_2d(ctx, mask, keys, 1, mask->nb[1], last * mask->nb[1]);
  ggml_tensor* p = ggml_soft_max_ext(ctx, logits, seen, soft_cap > 0 ? 1.0f : scale, 0.0f);
  ggml_soft_max_add_sinks(p, sinks);
  p = ggml_cont(ctx, ggml_transpose(ctx, ggml_reshape_2d(ctx, p, keys, heads)));  // [heads, keys]
  return {ggml_reshape_1d(ctx, ggml_mean(ctx, p), keys), {}};
}

// The kept position ids of `axes` axes: I32 [axes * n] -> [axes * m], each axis in one piece (M-RoPE has 4 in ggml).
// (Hidden states need no help: ggml_get_rows(ctx, hidden, kept).) O(axes).
inline Result<ggml_tensor*> gather_positions(ggml_context* ctx, ggml_tensor* positions, int axes,
                                             ggml_tensor* kept) noexcept {
  if (Status status = detail::check_positions(ctx, positions, axes, kept); !status) return {nullptr, status};
  const std::int64_t n = positions->ne[0] / axes, m = kept->ne[0];
  ggml_tensor* all = nullptr;
  for (int axis = 0; axis < axes; ++axis) {
    const std::size_t first = detail::from_ne(axis * n) * positions->nb[0];
    ggml_tensor* one = ggml_view_2d(ctx, positions, 1, n, positions->nb[0], first);
    one = ggml_reshape_1d(ctx, ggml_get_rows(ctx, one, kept), m);
    all = all == nullptr ? one : ggml_concat(ctx, all, one, 0);
  }
  return {all, {}};
}

// Turns the pruning of one prompt into nodes of a graph.
//
//   fastv::graph::Pruner pruning(config);                                     // or a schedule of several stages
//   auto plan = pruning.begin({n, layers, visual});                           // all shapes, or what is wrong
//   ...                                                                       // layers 0 .. K-1 into the graph
//   auto kept = pruning.select(ctx, fastv::graph::scores(ctx, q, k, scale));  // I32 [m], ascending, or what is wrong
//   hidden = ggml_get_rows(ctx, hidden, *kept);
//   auto ids = fastv::graph::gather_positions(ctx, positions, 1, *kept);
//   ...                                                                       // layers K .. on m tokens; allocate
//   auto set = pruning.set_inputs([](ggml_tensor* t, const void* data, std::size_t bytes) {
//     ggml_backend_tensor_set(t, data, 0, bytes);
//   });
//
// All shapes are known before a value exists, so the graph stays static and runs on whichever backend the rest of it
// runs on. It keeps the tokens that fastv::select() keeps, whatever the backend's sort does with equal scores: of equal
// ones the earlier, NaN below all others. Where fastv::select() fails on the scores, the graph goes on: infinite ones
// count as the greatest finite number of their sign, and where all that compete (in an image, a window, a pool) are NaN or
// 0 the first of them stay. counts() tells. (A backend that flushes denormals, as CUDA does, ranks them as zeros, and as equal what is less than
// 1e-38 apart.)
//
// Every rule becomes, for each stage: tokens that stay in any case, and groups of tokens of which a known number stays
// each. Random and uniform selection are lists alone. Stages behind the first find their tokens in the graph itself, so
// positions within the shorter sequence may depend on scores. The object must outlive the graph.
class Pruner {
 public:
  // begin() checks the settings.
  explicit Pruner(const Config& config = {}) noexcept : Pruner(Span<const Config>(&config, 1)) {}
  // The stages of a schedule, filtering layers ascending.
  explicit Pruner(Span<const Config> schedule) noexcept : given_(schedule.size()), null_(schedule.data() == nullptr) {
    const std::size_t stages = null_ ? 0 : given_ < max_stages ? given_ : max_stages;
    for (std::size_t s = 0; s < stages; ++s) configs_[s] = schedule[s];
  }

  // Settings of a stage, below max_stages.
  const Config& config(std::size_t stage = 0) const noexcept {
    return configs_[stage < max_stages ? stage : max_stages - 1];
  }
  // Stages that select() has put into the graph since begin().
  std::size_t stage() const noexcept { return stage_; }
  // Whether the next select() comes after so many layers: see fastv::Pruner::due().
  bool due(std::size_t layers_run) const noexcept {
    return begun_ && stage_ < plan_.stages && layers_run == plan_.stage[stage_].filtering_layer;
  }

  // Everything that does not depend on a value, for one graph of this prompt. Prompt::past counts the keys of earlier
  // turns, which are attended to but are no candidates. Errors: those of make_plan(), settings that ask for other rows
  // than the last, and a stage of minima per image behind one that pools images. O(stages * tokens).
  Result<Plan> begin(const Prompt& prompt) noexcept {
    begun_ = false;
    stage_ = 0;
    const Result<Plan> plan = make_plan(Span<const Config>(null_ ? nullptr : configs_, given_), prompt);
    if (!plan) return plan;
    plan_ = *plan;
    if (Status status = prepare(prompt); !status) return {{}, status};
    begun_ = true;
    return plan;
  }

  // Tensors that select() and counts() make at most for all stages, to size a context and a graph by.
  std::size_t nodes() const noexcept {
    std::size_t sum = 0;
    for (std::size_t s = 0; s < plan_.stages; ++s) sum += 130 + 40 * stages_[s].classes;
    return sum;
  }

  // The next stage's kept tokens: I32 [m], ascending positions in the sequence that its layer ran on. scores: F32, one
  // per key, [at least past + n], keys of earlier turns first, or one per token of the sequence, [n]; may be left out
  // where no score decides. About 35 nodes, and 17 more for each further class of group sizes.
  Result<ggml_tensor*> select(ggml_context* ctx, ggml_tensor* scores = nullptr) noexcept {
    if (Status status = check_select(ctx, scores); !status) return {nullptr, status};
    ggml_tensor* kept = select_nodes(ctx, own_scores(ctx, scores));
    ++stage_;
    return {kept, {}};
  }
  // The same of scores() as it returns them; a failure is passed on.
  Result<ggml_tensor*> select(ggml_context* ctx, const Result<ggml_tensor*>& scores) noexcept {
    return scores ? select(ctx, *scores) : scores;
  }

  // How many of the visual scores that the last select() was given are NaN, 0 and infinite, and in how many of the groups
  // that compete all are 0: F32 [4], for selected(). A node that the host may put into the graph as an output, and read
  // when it has run.
  Result<ggml_tensor*> counts(ggml_context* ctx) noexcept {
    if (ctx == nullptr) return {nullptr, detail::fail_null("the context")};
    if (stage_ == 0 || scores_ == nullptr)
      return {nullptr,
              fail(Errc::missing_evidence, "counts() has no scores to count: call it after a select() that had some")};
    const auto visual = static_cast<float>(stages_[stage_ - 1].images.tokens);
    ggml_tensor* size = ggml_abs(ctx, pick(ctx, scores_, visual_tokens_));
    const auto sum = [&](ggml_tensor* ones) { return ggml_sum_rows(ctx, ggml_step(ctx, ones)); };
    ggml_tensor* numbers = sum(ggml_scale_bias(ctx, size, 1, 1));
    ggml_tensor* zeros = ggml_sub(ctx, numbers, sum(size));
    ggml_tensor* infinite = sum(ggml_scale_bias(ctx, size, 1, -detail::greatest_float));
    ggml_tensor* nans = ggml_scale_bias(ctx, numbers, -1, visual);
    ggml_tensor* unranked = competing_ == nullptr ? ggml_scale(ctx, nans, 0) : unranked_nodes(ctx);
    ggml_tensor* values = ggml_concat(ctx, ggml_concat(ctx, nans, zeros, 0), infinite, 0);
    return {ggml_concat(ctx, values, unranked, 0), {}};
  }

  // What fastv::select() says of the scores of a stage, by what counts() holds after a run: their numbers, or why they
  // rank nothing. O(1).
  Result<Selected> selected(Span<const float> counts, std::size_t stage = 0) const noexcept {
    if (Status status = check_counts(counts, stage); !status) return {{}, status};
    const Selected found{plan_.tokens_in_group(stage + 1), static_cast<std::size_t>(counts[0]),
                         static_cast<std::size_t>(counts[1])};
    const Status status = detail::check_counts(config(stage), stages_[stage].images, found.nan_scores,
                                               found.zero_scores, static_cast<std::size_t>(counts[3]));
    return {status ? found : Selected{}, status};
  }

  // Call before each run, once the graph has been allocated: set(tensor, data, bytes) for each input that select()
  // made, at most two a stage. (ggml may use an input's memory again behind its last reader.)
  template <class Set>
  Status set_inputs(const Set& set) const {
    if (!begun_ || stage_ != plan_.stages)
      return fail(Errc::bad_prompt, "{} of {} stages are in the graph: call begin(), then select() for each, first",
                  stage_, begun_ ? plan_.stages : given_);
    for (std::size_t s = 0; s < stage_; ++s)
      for (const ggml_tensor* input : {stages_[s].lists, stages_[s].values})
        if (input != nullptr && input->data == nullptr && input->buffer == nullptr)
          return fail(Errc::null_data,
                      "an input of stage {} has no memory: allocate the graph first, with what select() made in it", s);
    for (std::size_t s = 0; s < stage_; ++s) {
      const Stage& stage = stages_[s];
      if (stage.lists != nullptr)
        set(stage.lists, static_cast<const void*>(stage.places.first(0).data()),
            stage.lists_size() * sizeof(std::int32_t));
      if (stage.values != nullptr)
        set(stage.values, static_cast<const void*>(stage.floats.first(0).data()), stage.values_size() * sizeof(float));
    }
    return {};
  }

 private:
  // Tokens that compete, and how many of them stay.
  struct Group {
    std::size_t first, size, quota;  // first: of members_
  };
  // A stage's tokens are named by their place in the list of all text tokens, then all visual ones. Behind the first
  // stage the graph turns places into positions; in the first they are positions from the start.
  struct Stage {
    detail::Images images;
    std::size_t fixed = 0, competing = 0;       // tokens that stay in any case; that compete
    std::size_t rows = 0, groups = 0;           // entries of the groups' rows, padding included; groups
    std::size_t classes = 0;                    // sizes of groups
    std::size_t size[32] = {}, count[32] = {};  // of each class: entries of a row, groups
    bool in_order = true;  // rows are the competing tokens in their order: nothing needs to be sorted into them
    bool padded = false;   // some rows are longer than their group
    bool pool = false;     // a second round over all competing tokens, in which those that stay in the first come first
    std::size_t counted = 0, masked = 0;  // entries of the lists of all visual tokens, and of the mask of them
    detail::Buffer<std::int32_t>
        places;                    // [fixed + competing] tokens, [rows] which of those that compete, [competing] where
                                   // they are in the rows, [groups + pool] see highest(), [counted] visual tokens
    detail::Buffer<float> floats;  // [rows] -infinity where padded, [groups + pool] quota and a half, [groups + pool] 1
                                   // where some stay and some go, else 0, [masked]
    ggml_tensor *lists = nullptr, *values = nullptr;  // the inputs they are copied into

    std::size_t rows_at() const noexcept { return fixed + competing; }
    std::size_t inverse_at() const noexcept { return rows_at() + (in_order ? 0 : rows); }
    std::size_t lowest_at() const noexcept { return inverse_at() + (in_order ? 0 : competing); }
    std::size_t counted_at() const noexcept { return lowest_at() + groups + (pool ? 1 : 0); }
    std::size_t lists_size() const noexcept { return counted_at() + counted; }
    std::size_t quota_at() const noexcept { return padded ? rows : 0; }
    std::size_t ranks_at() const noexcept { return quota_at() + groups + (pool ? 1 : 0); }
    std::size_t mask_at() const noexcept { return ranks_at() + groups + (pool ? 1 : 0); }
    std::size_t values_size() const noexcept { return mask_at() + masked; }
  };
  using Mark = detail::Word<float>;

  // ---- what is known before a value exists ----

  Status prepare(const Prompt& prompt) noexcept {
    const std::size_t n = plan_.tokens, visual = plan_.visual, spans = prompt.visual.size();
    if (n > detail::most_in_graph)
      return fail(Errc::not_supported,
                  "the prompt has {} tokens but a graph sorts at most {}: prune between two graphs", n,
                  detail::most_in_graph);
    if (Status status = spans_.reserve(spans); !status) return status;
    if (Status status = quotas_.reserve(2 * spans); !status) return status;
    if (Status status = marks_.reserve(3 * visual + 2 * spans); !status) return status;
    if (Status status = members_.reserve(2 * visual); !status) return status;
    if (Status status = groups_.reserve(visual); !status) return status;
    if (Status status = table_.reserve(n); !status) return status;

    std::size_t text = 0, numbered = 0, position = 0;
    for (std::size_t s = 0; s < spans; ++s) {
      const TokenSpan& span = prompt.visual[s];
      spans_[s] = span;
      spans_[s].first = numbered;  // counted among the visual tokens alone
      while (position < span.first) table_[text++] = static_cast<Index>(position++);
      for (std::size_t i = 0; i < span.count; ++i) table_[n - visual + numbered++] = static_cast<Index>(position++);
    }
    while (position < n) table_[text++] = static_cast<Index>(position++);

    Span<const TokenSpan> now(spans_.first(spans).data(), spans);
    bool pooled = false;
    for (std::size_t s = 0; s < plan_.stages; ++s) {
      const Config& config = configs_[s];
      stages_[s].images = *detail::count_images(config, now);
      if (plan_.tokens_in_group(s + 1) == 0)
        return fail(Errc::bad_setting, "stage {} keeps none of {} tokens, and no graph runs on none", s,
                    plan_.tokens_in_group(s));
      if (pooled && config.min_per_image > 0)
        return fail(
            Errc::not_supported,
            "stage {} has min_per_image {} behind a stage that pools the images, so that it depends on scores which "
            "tokens are an image's: use no minimum, or prune between two graphs",
            s, config.min_per_image);
      if (detail::ranks(config, stages_[s].images)) {
        if (config.score_rows != ScoreRows::last || !config.prior_rows.empty())
          return fail(
              Errc::not_supported,
              "stage {} ranks by other rows than the last, which has no form in a graph: use ScoreRows::last without "
              "prior_rows, or prune between two graphs",
              s);
        if (Status status = QueryRows{ScoreRows::last, {}, n}.expect_covered(1, prompt.visual); !status) return status;
      }
      if (Status status = prepare_stage(s, now); !status) return status;
      if (s + 1 < plan_.stages) now = left_behind(config, now, pooled);
    }
    return {};
  }

  // What the next stage finds: each image as one span of its quota or, pooled, one span of them all.
  Span<const TokenSpan> left_behind(const Config& config, Span<const TokenSpan> visual, bool& pooled) noexcept {
    const detail::Images images = *detail::count_images(config, visual);
    const bool per_image = config.quota == Quota::per_image;
    if (per_image)
      detail::quotas_of(config, visual, images, quotas_.first(images.count), quotas_.part(images.count, images.count));
    std::size_t spans = 0, first = 0, original = 0;
    detail::for_each_image(visual, [&](const detail::Image& image) {  // overwrites no span that is still to be read
      original += image.original;
      if (per_image) {
        const std::size_t count = quotas_[spans];
        spans_[spans++] = {first, count, 0, false, image.original, image.filtering_ratio};
        first += count;
      } else {
        pooled = pooled || image.first_span > 0;
      }
    });
    if (!per_image && images.count > 0) spans_[spans++] = {0, images.keep, 0, false, original};
    return {spans_.first(spans).data(), spans};
  }

  // The groups of a stage, and the lists that its nodes read. visual: spans among the visual tokens alone.
  Status prepare_stage(std::size_t s, Span<const TokenSpan> visual) noexcept {
    Stage& stage = stages_[s];
    const Config& config = configs_[s];
    const detail::Images& images = stage.images;
    const std::size_t n = plan_.tokens_in_group(s), total = images.tokens, text = n - total;
    Mark* marks = marks_.first(0).data();
    for (std::size_t i = 0; i < total; ++i) marks[i] = 0;
    members_count_ = groups_count_ = 0;
    std::size_t pool_quota = 0;
    stage.pool = false;
    if (!detail::ranks(config, images)) {
      Index* numbers = members_.first(0).data();
      if (total > 0) {
        const Result<Selected> selected =
            detail::select_validated<float>(config, {}, visual, total, images, numbers, marks);
        if (!selected) return selected.status;
        for (std::size_t i = 0; i < total; ++i) marks[i] = 0;
        for (std::size_t i = 0; i < selected->count; ++i) marks[numbers[i]] = detail::chosen<Mark>;
      }
    } else if (config.quota == Quota::pooled) {
      if (detail::minima_hold(config, images)) {
        stage.pool = true;
        pool_quota = images.keep - spread(config, images, marks);
        add_minima(config, visual, marks);
      } else {
        add_groups(config, marks, 0, total, 0, images.keep);
      }
    } else {
      detail::quotas_of(config, visual, images, quotas_.first(images.count), quotas_.part(images.count, images.count));
      std::size_t image_number = 0, numbered = 0;
      detail::for_each_image(visual, [&](const detail::Image& image) {
        if (image.tokens > 0) add_groups(config, marks, numbered, image.tokens, image.columns, quotas_[image_number]);
        ++image_number;
        numbered += image.tokens;
      });
    }
    if (members_count_ == 0) stage.pool = false;
    return write_lists(s, text, pool_quota);
  }

  // The even grid of a pool, which leaves room for every minimum. Returns how many tokens it takes.
  static std::size_t spread(const Config& config, const detail::Images& images, Mark* marks) noexcept {
    const std::size_t share = detail::even_share(config, images.keep), room = images.keep - images.minima;
    const std::size_t even = share < room ? share : room;
    if (even > 0) detail::mark_uniform(marks, images.tokens, 0, even);
    return even;
  }
  // One group per image: what it keeps at least, beside what the grid has taken.
  void add_minima(const Config& config, Span<const TokenSpan> visual, const Mark* marks) noexcept {
    std::size_t numbered = 0;
    detail::for_each_image(visual, [&](const detail::Image& image) {
      const std::size_t least = detail::minimum_of(config, image), first = members_count_;
      for (std::size_t i = numbered; i < numbered + image.tokens; ++i)
        if (marks[i] == 0) members_[members_count_++] = static_cast<Index>(i);
      const std::size_t size = members_count_ - first, taken = image.tokens - size;
      if (size > 0) groups_[groups_count_++] = {first, size, least > taken ? least - taken : 0};
      numbered += image.tokens;
    });
  }
  // The groups of one image's n tokens, numbered from `first` on.
  void add_groups(const Config& config, Mark* marks, std::size_t first, std::size_t n, std::size_t columns,
                  std::size_t count) noexcept {
    Mark* own = marks + first;
    Mark* scratch = marks_.first(0).data() + plan_.visual;
    detail::for_each_group(config, own, n, columns, count, scratch, [&](std::size_t quota, auto tokens) {
      std::size_t size = 0, taken = 0;
      tokens([&](std::size_t i) {
        ++size;
        taken += own[i] == detail::chosen<Mark> ? 1u : 0u;
      });
      if (quota == taken) return;
      const std::size_t begin = members_count_;
      tokens([&](std::size_t i) {
        if (quota == size)
          own[i] = detail::chosen<Mark>;
        else if (own[i] != detail::chosen<Mark>)
          members_[members_count_++] = static_cast<Index>(first + i);
      });
      if (quota < size) groups_[groups_count_++] = {begin, size - taken, quota - taken};
    });
  }

  Status write_lists(std::size_t s, std::size_t text, std::size_t pool_quota) noexcept {
    Stage& stage = stages_[s];
    const std::size_t total = stage.images.tokens;
    const Mark* marks = marks_.first(0).data();
    const Index* members = members_.first(0).data();
    Index* place_of = members_.first(0).data() + plan_.visual;  // of a visual token among those that compete
    const auto class_of = [](std::size_t size) {
      std::size_t bits = 0;
      while (size >> bits != 0) ++bits;
      return bits - 1;
    };

    // Groups of similar size share the rows of one tensor, as long as the longest of them.
    for (std::size_t c = 0; c < 32; ++c) stage.size[c] = stage.count[c] = 0;
    for (std::size_t g = 0; g < groups_count_; ++g) {
      const std::size_t size = groups_[g].size, c = class_of(size);
      stage.size[c] = stage.size[c] < size ? size : stage.size[c];
      ++stage.count[c];
    }
    stage.rows = stage.classes = 0;
    for (std::size_t c = 0; c < 32; ++c) {
      stage.rows += stage.size[c] * stage.count[c];
      stage.classes += stage.count[c] > 0 ? 1u : 0u;
    }
    stage.groups = groups_count_;
    stage.competing = members_count_;
    stage.padded = stage.rows > stage.competing;
    std::size_t fixed = text;
    for (std::size_t i = 0; i < total; ++i) fixed += marks[i] == detail::chosen<Mark> ? 1u : 0u;
    stage.fixed = fixed;
    stage.counted = s == 0 && configs_[s].selection == Selection::top_k ? total : 0;
    stage.masked = s == 0 && plan_.stages > 1 ? plan_.tokens : 0;
    stage.in_order = false;  // room for all
    if (Status status = stage.places.reserve(stage.lists_size()); !status) return status;
    if (Status status = stage.floats.reserve(stage.values_size()); !status) return status;

    // Which places stay in any case, ascending by position in the first stage; then those that compete, in order.
    const auto token_at = [&](std::size_t place) { return s == 0 ? table_[place] : static_cast<Index>(place); };
    for (std::size_t i = 0; i < total; ++i) place_of[i] = 0;
    for (std::size_t i = 0; i < members_count_; ++i) place_of[members[i]] = 1;
    std::size_t t = 0, written = 0, competing = 0;
    for (std::size_t i = 0; i <= total; ++i) {
      while (t < text && (i == total || token_at(t) < token_at(text + i)))
        stage.places[written++] = static_cast<std::int32_t>(token_at(t++));
      if (i < total && marks[i] == detail::chosen<Mark>)
        stage.places[written++] = static_cast<std::int32_t>(token_at(text + i));
    }
    for (std::size_t i = 0; i < total; ++i)
      if (place_of[i] == 1) {
        place_of[i] = static_cast<Index>(competing++);
        stage.places[written++] = static_cast<std::int32_t>(token_at(text + i));
      }

    // Whether the rows are the competing tokens in their order.
    bool in_order = !stage.padded && stage.classes <= 1;
    for (std::size_t i = 0; in_order && i < members_count_; ++i) in_order = place_of[members[i]] == i;
    stage.in_order = in_order;
    std::int32_t* rows = stage.places.first(0).data() + stage.rows_at();
    std::int32_t* inverse = stage.places.first(0).data() + stage.inverse_at();
    std::int32_t* lowest = stage.places.first(0).data() + stage.lowest_at();
    float* quotas = stage.floats.first(0).data() + stage.quota_at();
    float* ranks = stage.floats.first(0).data() + stage.ranks_at();
    const auto half_more = [](std::size_t quota) { return static_cast<float>(quota) + 0.5f; };
    const auto ranked = [](std::size_t quota, std::size_t size) { return quota > 0 && quota < size ? 1.0f : 0.0f; };
    std::size_t entry = 0, group = 0;
    for (std::size_t c = 0; c < 32; ++c) {
      std::size_t row = 0;
      for (std::size_t g = 0; g < groups_count_ && row < stage.count[c]; ++g) {
        const Group& from = groups_[g];
        if (class_of(from.size) != c) continue;
        for (std::size_t i = 0; i < stage.size[c]; ++i, ++entry) {
          const bool padding = i >= from.size;
          const Index place = place_of[members[from.first + (padding ? 0 : i)]];
          if (stage.padded) stage.floats[entry] = padding ? detail::minus_infinity<float>() : 0.0f;
          if (in_order) continue;
          rows[entry] = static_cast<std::int32_t>(place);
          if (!padding) inverse[place] = static_cast<std::int32_t>(entry);
        }
        const std::size_t last = from.quota == 0 ? 0 : from.quota - 1;
        lowest[group] = static_cast<std::int32_t>(row * stage.size[c] + last);
        ranks[group] = ranked(from.quota, from.size);
        quotas[group++] = half_more(from.quota);
        ++row;
      }
    }
    if (stage.pool) {
      lowest[group] = static_cast<std::int32_t>(pool_quota == 0 ? 0 : pool_quota - 1);
      quotas[group] = half_more(pool_quota);
      ranks[group] = ranked(pool_quota, stage.competing);
    }
    for (std::size_t i = 0; i < stage.counted; ++i)
      stage.places[stage.counted_at() + i] = static_cast<std::int32_t>(token_at(text + i));
    if (stage.masked > 0) {
      float* mask = stage.floats.first(0).data() + stage.mask_at();
      for (std::size_t i = 0; i < plan_.tokens; ++i) mask[i] = 0;
      for (std::size_t i = 0; i < total; ++i) mask[token_at(text + i)] = 1;
    }
    return {};
  }

  // What counts() held.
  Status check_counts(Span<const float> counts, std::size_t stage) const noexcept {
    if (Status status = detail::expect_room(counts, 4, "the counts"); !status) return status;
    if (!begun_ || stage >= plan_.stages)
      return fail(Errc::bad_prompt, "stage {} is asked for but there are {}", stage, begun_ ? plan_.stages : 0);
    const std::size_t total = stages_[stage].images.tokens;
    for (const float count : counts.first(4))
      if (detail::is_nan(count) || !(count >= 0 && count <= static_cast<float>(total)))
        return fail(Errc::bad_value, "{} is no count of {} visual scores: hand over what counts() held after a run",
                    static_cast<double>(count), total);
    if (detail::is_zero(counts[2])) return {};
    return fail(Errc::bad_value, "{} of {} visual scores are infinite: check where they come from",
                static_cast<std::size_t>(counts[2]), total);
  }

  // ---- nodes ----

  Status check_select(const ggml_context* ctx, const ggml_tensor* scores) const noexcept {
    if (!begun_)
      return fail(Errc::bad_prompt, "select() has no prompt: call begin() first, and go on where it succeeds");
    if (stage_ == plan_.stages)
      return fail(Errc::bad_prompt,
                  "select() was called for stage {} but there are {}: call begin() for every graph that is built",
                  stage_, plan_.stages);
    if (ctx == nullptr) return detail::fail_null("the context");
    const Stage& stage = stages_[stage_];
    if (!detail::ranks(configs_[stage_], stage.images) || (scores == nullptr && stage.competing == 0)) return {};
    if (scores == nullptr)
      return fail(Errc::missing_evidence, "stage {} ranks {} tokens by scores: hand over graph::scores()", stage_,
                  stage.competing);
    if (scores->type != GGML_TYPE_F32)
      return fail(Errc::not_supported, "the scores are of type {}: cast them to F32", ggml_type_name(scores->type));
    const std::size_t n = plan_.tokens_in_group(stage_), past = past_keys(), given = detail::from_ne(scores->ne[0]);
    if (ggml_nrows(scores) != 1 || !ggml_is_contiguous(scores) || (given != n && given < past + n))
      return fail(Errc::bad_shape,
                  "there are {} scores for {} tokens behind {} keys of earlier turns: hand over one list, with one per "
                  "key or one per token",
                  ggml_nelements(scores), n, past);
    return {};
  }

  // Keys of earlier turns in the layer whose attention ranks, which is not layer -1.
  std::size_t past_keys() const noexcept { return plan_.past_in_layer(configs_[stage_].filtering_layer - 1); }

  // The scores of this sequence's own tokens, [n], or null.
  ggml_tensor* own_scores(ggml_context* ctx, ggml_tensor* scores) const noexcept {
    if (scores == nullptr || !detail::ranks(configs_[stage_], stages_[stage_].images)) return nullptr;
    const std::size_t n = plan_.tokens_in_group(stage_);
    return part(ctx, scores, detail::from_ne(scores->ne[0]) == n ? 0 : past_keys(), n);
  }

  static ggml_tensor* input(ggml_context* ctx, ggml_type type, std::size_t count, const char* name) noexcept {
    if (count == 0) return nullptr;
    ggml_tensor* tensor = ggml_new_tensor_1d(ctx, type, detail::to_ne(count));
    ggml_set_name(tensor, name);
    ggml_set_input(tensor);
    return tensor;
  }
  // Entries of a list; both types of inputs have four bytes.
  static ggml_tensor* part(ggml_context* ctx, ggml_tensor* list, std::size_t first, std::size_t count) noexcept {
    return ggml_view_1d(ctx, list, detail::to_ne(count), first * sizeof(float));
  }
  // list[indices], of F32 or I32.
  static ggml_tensor* pick(ggml_context* ctx, ggml_tensor* list, ggml_tensor* indices) noexcept {
    ggml_tensor* rows = ggml_get_rows(ctx, ggml_reshape_2d(ctx, list, 1, ggml_nelements(list)), indices);
    return ggml_reshape_1d(ctx, rows, ggml_nelements(indices));
  }

  ggml_tensor* select_nodes(ggml_context* ctx, ggml_tensor* scores) noexcept {
    Stage& stage = stages_[stage_];
    const std::size_t fixed = stage.fixed, competing = stage.competing, all = fixed + competing;
    stage.lists = input(ctx, GGML_TYPE_I32, stage.lists_size(), "fastv.lists");
    stage.values = input(ctx, GGML_TYPE_F32, stage.values_size(), "fastv.values");
    ggml_tensor* tokens = part(ctx, stage.lists, 0, all);
    ggml_tensor* mask = nullptr;  // 1 for visual tokens of the sequence
    if (stage_ == 0) {
      if (stage.counted > 0) visual_tokens_ = part(ctx, stage.lists, stage.counted_at(), stage.counted);
      if (stage.masked > 0) mask = part(ctx, stage.values, stage.mask_at(), stage.masked);
    } else {
      // All text, then all visual tokens, by position.
      mask = mask_;
      ggml_tensor* key = ggml_add(ctx, ggml_cast(ctx, kept_, GGML_TYPE_F32), ggml_scale(ctx, mask, detail::behind_all));
      ggml_tensor* order = ggml_argsort(ctx, key, GGML_SORT_ORDER_ASC);
      const std::size_t n = plan_.tokens_in_group(stage_), visual = stage.images.tokens;
      if (visual > 0) visual_tokens_ = part(ctx, order, n - visual, visual);
      tokens = pick(ctx, order, tokens);
    }
    scores_ = scores;
    competing_ = nullptr;

    ggml_tensor* kept = tokens;
    if (stage_ > 0 || competing > 0) {
      // There is no sort of I32. Keys of tokens that stay are distinct, so that every sort gives the same.
      ggml_tensor* positions = ggml_cast(ctx, tokens, GGML_TYPE_F32);
      ggml_tensor* key = positions;
      if (competing > 0) {
        competing_ = pick(ctx, scores, part(ctx, tokens, fixed, competing));
        ggml_tensor* stays = stays_nodes(ctx, competing_);
        key = ggml_add(ctx, part(ctx, positions, fixed, competing),
                       ggml_scale_bias(ctx, stays, -detail::behind_all, detail::behind_all));
        if (fixed > 0) key = ggml_concat(ctx, part(ctx, positions, 0, fixed), key, 0);
      }
      ggml_tensor* order = ggml_argsort(ctx, key, GGML_SORT_ORDER_ASC);
      kept = pick(ctx, tokens, part(ctx, order, 0, plan_.tokens_in_group(stage_ + 1)));
    }
    if (stage_ + 1 < plan_.stages) mask_ = pick(ctx, mask, kept);
    kept_ = kept;
    return kept;
  }

  // scores: F32 [competing], in order. Returns 1 for those that stay, 0 for others.
  ggml_tensor* stays_nodes(ggml_context* ctx, ggml_tensor* scores) noexcept {
    const Stage& stage = stages_[stage_];
    const detail::ScoreNodes nodes = detail::score_nodes(ctx, scores);
    ggml_tensor* not_a_number = ggml_scale_bias(ctx, nodes.number, 1, -1);  // -1 where it is none
    ggml_tensor* rows = detail::ranked(ctx, nodes.value, not_a_number);
    if (!stage.in_order) rows = pick(ctx, rows, part(ctx, stage.lists, stage.rows_at(), stage.rows));
    if (stage.padded) rows = ggml_add(ctx, rows, part(ctx, stage.values, 0, stage.rows));
    ggml_tensor* stays = nullptr;
    std::size_t entry = 0, group = 0;
    const auto top = [&](ggml_tensor* of, std::size_t size, std::size_t groups) {
      ggml_tensor* matrix = ggml_reshape_2d(ctx, of, detail::to_ne(size), detail::to_ne(groups));
      ggml_tensor* quota =
          ggml_reshape_2d(ctx, part(ctx, stage.values, stage.quota_at() + group, groups), 1, detail::to_ne(groups));
      ggml_tensor* ones =
          detail::highest(ctx, matrix, part(ctx, stage.lists, stage.lowest_at() + group, groups), quota);
      group += groups;
      return ggml_reshape_1d(ctx, ones, detail::to_ne(size * groups));
    };
    for (std::size_t c = 0; c < 32; ++c) {
      const std::size_t size = stage.size[c], groups = stage.count[c];
      if (groups == 0) continue;
      ggml_tensor* one = top(stage.classes == 1 ? rows : part(ctx, rows, entry, size * groups), size, groups);
      stays = stays == nullptr ? one : ggml_concat(ctx, stays, one, 0);
      entry += size * groups;
    }
    if (!stage.in_order) stays = pick(ctx, stays, part(ctx, stage.lists, stage.inverse_at(), stage.competing));
    if (!stage.pool) return stays;
    // What stays above every other, numbers as they are, NaN below.
    ggml_tensor* lift = ggml_mul(ctx, stays, ggml_scale_bias(ctx, not_a_number, -1, 1));  // 1, or 2 for NaN
    return top(detail::ranked(ctx, nodes.value, ggml_add(ctx, not_a_number, lift)), stage.competing, 1);
  }

  // F32 [1]: how many groups of the last stage compete by zeros alone, some to stay and some to go.
  ggml_tensor* unranked_nodes(ggml_context* ctx) noexcept {
    const Stage& stage = stages_[stage_ - 1];
    ggml_tensor* size = ggml_abs(ctx, competing_);
    ggml_tensor* zeros = ggml_sub(ctx, ggml_step(ctx, ggml_scale_bias(ctx, size, 1, 1)), ggml_step(ctx, size));
    ggml_tensor* rows = stage.in_order ? zeros : pick(ctx, zeros, part(ctx, stage.lists, stage.rows_at(), stage.rows));
    ggml_tensor* all = nullptr;  // [groups + pool]: 1 where every entry of the row is a zero
    const auto add = [&](ggml_tensor* of, std::size_t entries, std::size_t groups) {
      ggml_tensor* matrix = ggml_reshape_2d(ctx, of, detail::to_ne(entries), detail::to_ne(groups));
      ggml_tensor* sums = ggml_reshape_1d(ctx, ggml_sum_rows(ctx, matrix), detail::to_ne(groups));
      ggml_tensor* ones = ggml_step(ctx, ggml_scale_bias(ctx, sums, 1, 0.5f - static_cast<float>(entries)));
      all = all == nullptr ? ones : ggml_concat(ctx, all, ones, 0);
    };
    std::size_t entry = 0;
    for (std::size_t c = 0; c < 32; ++c) {
      const std::size_t entries = stage.size[c], groups = stage.count[c];
      if (groups == 0) continue;
      add(stage.classes == 1 ? rows : part(ctx, rows, entry, entries * groups), entries, groups);
      entry += entries * groups;
    }
    if (stage.pool) add(zeros, stage.competing, 1);
    const std::size_t groups = stage.groups + (stage.pool ? 1 : 0);
    return ggml_sum_rows(ctx, ggml_mul(ctx, all, part(ctx, stage.values, stage.ranks_at(), groups)));
  }

  std::size_t given_ = 0;  // stages, valid or not
  bool null_ = false, begun_ = false;
  std::size_t stage_ = 0;  // stages in the graph
  Plan plan_;
  Config configs_[max_stages];
  Stage stages_[max_stages];
  detail::Buffer<TokenSpan> spans_;
  detail::Buffer<Index> quotas_, members_, table_;  // table_: [n] positions of all text tokens, then of all visual ones
  detail::Buffer<Mark> marks_;
  detail::Buffer<Group> groups_;
  std::size_t members_count_ = 0, groups_count_ = 0;
  // Of the graph under construction: what the last select() read and left.
  ggml_tensor *scores_ = nullptr, *competing_ = nullptr, *visual_tokens_ = nullptr, *kept_ = nullptr, *mask_ = nullptr;
};

}  // namespace FASTV_KIND
}  // namespace graph

}  // namespace fastv

#include "detail/end.hpp"

// fastv for ggml: pruning as nodes of a graph, on whichever backend the graph runs on.
#pragma once

#include "detail/graph_lists.hpp"
#include "fastv.hpp"
#include "ggml_scores.hpp"
#include "ggml_views.hpp"

#include "detail/begin.hpp"

namespace fastv {

namespace detail {
inline namespace FASTV_KIND {

inline constexpr float behind_all = static_cast<float>(most_in_graph);  // of positions, which are sorted as F32
inline constexpr float greatest_float = 3.402823466e+38f;

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
// count as the greatest finite number of their sign, and where all that compete (in an image, a window, a pool) are NaN
// or 0 the first of them stay. counts() tells. (A backend that flushes denormals, as CUDA does, ranks them as zeros, and
// as equal what is less than 1e-38 apart.)
//
// Stages behind the first find their tokens in the graph itself, so positions within the shorter sequence may depend on
// scores. The object must outlive the graph.
class Pruner {
 public:
  // begin() checks the settings.
  explicit Pruner(const Config& config = {}) noexcept : Pruner(Span<const Config>(&config, 1)) {}
  // The stages of a schedule, filtering layers ascending.
  explicit Pruner(Span<const Config> schedule) noexcept : lists_(schedule) {}

  // Settings of a stage, below max_stages.
  const Config& config(std::size_t stage = 0) const noexcept { return lists_.config(stage); }
  // Stages that select() has put into the graph since begin().
  std::size_t stage() const noexcept { return stage_; }
  // Whether the next select() comes after so many layers: see fastv::Pruner::due().
  bool due(std::size_t layers_run) const noexcept {
    return begun_ && stage_ < plan().stages && layers_run == plan().stage[stage_].filtering_layer;
  }

  // Everything that does not depend on a value, for one graph of this prompt. Prompt::past counts the keys of earlier
  // turns, which are attended to but are no candidates. Errors: those of make_plan(), settings that ask for other rows
  // than the last, and a stage of minima per image behind one that pools images. O(stages * tokens).
  Result<Plan> begin(const Prompt& prompt) noexcept {
    stage_ = 0;
    const Status status = lists_.begin(prompt);
    begun_ = static_cast<bool>(status);
    return {begun_ ? plan() : Plan{}, status};
  }

  // Tensors that select() and counts() make at most for all stages, to size a context and a graph by.
  std::size_t nodes() const noexcept {
    std::size_t sum = 0;
    for (std::size_t s = 0; s < plan().stages; ++s) sum += 130 + 40 * lists_.stage(s).classes;
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
    const auto visual = static_cast<float>(lists_.stage(stage_ - 1).images.tokens);
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
    const Selected found{plan().tokens_in_group(stage + 1), static_cast<std::size_t>(counts[0]),
                         static_cast<std::size_t>(counts[1])};
    const Status status = detail::check_counts(config(stage), lists_.stage(stage).images, found.nan_scores,
                                               found.zero_scores, static_cast<std::size_t>(counts[3]));
    return {status ? found : Selected{}, status};
  }

  // Call before each run, once the graph has been allocated: set(tensor, data, bytes) for each input that select()
  // made, at most two a stage. (ggml may use an input's memory again behind its last reader.)
  template <class Set>
  Status set_inputs(const Set& set) const {
    if (!begun_ || stage_ != plan().stages)
      return fail(Errc::bad_prompt, "{} of {} stages are in the graph: call begin(), then select() for each, first",
                  stage_, begun_ ? plan().stages : lists_.given());
    for (std::size_t s = 0; s < stage_; ++s)
      for (const ggml_tensor* input : {inputs_[s].lists, inputs_[s].values})
        if (input != nullptr && input->data == nullptr && input->buffer == nullptr)
          return fail(Errc::null_data,
                      "an input of stage {} has no memory: allocate the graph first, with what select() made in it", s);
    for (std::size_t s = 0; s < stage_; ++s) {
      const detail::StageLists& stage = lists_.stage(s);
      const Inputs& in = inputs_[s];
      if (in.lists != nullptr)
        set(in.lists, static_cast<const void*>(stage.places.first(0).data()),
            stage.lists_size() * sizeof(std::int32_t));
      if (in.values != nullptr)
        set(in.values, static_cast<const void*>(stage.floats.first(0).data()), stage.values_size() * sizeof(float));
    }
    return {};
  }

 private:
  // What a stage's lists are copied into: null where one is empty.
  struct Inputs {
    ggml_tensor *lists = nullptr, *values = nullptr;
  };

  const Plan& plan() const noexcept { return lists_.plan(); }

  // What counts() held.
  Status check_counts(Span<const float> counts, std::size_t stage) const noexcept {
    if (Status status = detail::expect_room(counts, 4, "the counts"); !status) return status;
    if (!begun_ || stage >= plan().stages)
      return fail(Errc::bad_prompt, "stage {} is asked for but there are {}", stage, begun_ ? plan().stages : 0);
    const std::size_t total = lists_.stage(stage).images.tokens;
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
    if (stage_ == plan().stages)
      return fail(Errc::bad_prompt,
                  "select() was called for stage {} but there are {}: call begin() for every graph that is built",
                  stage_, plan().stages);
    if (ctx == nullptr) return detail::fail_null("the context");
    const detail::StageLists& stage = lists_.stage(stage_);
    if (!detail::ranks(config(stage_), stage.images) || (scores == nullptr && stage.competing == 0)) return {};
    if (scores == nullptr)
      return fail(Errc::missing_evidence, "stage {} ranks {} tokens by scores: hand over graph::scores()", stage_,
                  stage.competing);
    if (scores->type != GGML_TYPE_F32)
      return fail(Errc::not_supported, "the scores are of type {}: cast them to F32", ggml_type_name(scores->type));
    const std::size_t n = plan().tokens_in_group(stage_), past = past_keys(), given = detail::from_ne(scores->ne[0]);
    if (ggml_nrows(scores) != 1 || !ggml_is_contiguous(scores) || (given != n && given < past + n))
      return fail(Errc::bad_shape,
                  "there are {} scores for {} tokens behind {} keys of earlier turns: hand over one list, with one per "
                  "key or one per token",
                  ggml_nelements(scores), n, past);
    return {};
  }

  // Keys of earlier turns in the layer whose attention ranks, which is not layer -1.
  std::size_t past_keys() const noexcept { return plan().past_in_layer(config(stage_).filtering_layer - 1); }

  // The scores of this sequence's own tokens, [n], or null.
  ggml_tensor* own_scores(ggml_context* ctx, ggml_tensor* scores) const noexcept {
    if (scores == nullptr || !detail::ranks(config(stage_), lists_.stage(stage_).images)) return nullptr;
    const std::size_t n = plan().tokens_in_group(stage_);
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
    const detail::StageLists& stage = lists_.stage(stage_);
    Inputs& in = inputs_[stage_];
    const std::size_t fixed = stage.fixed, competing = stage.competing, all = fixed + competing;
    in.lists = input(ctx, GGML_TYPE_I32, stage.lists_size(), "fastv.lists");
    in.values = input(ctx, GGML_TYPE_F32, stage.values_size(), "fastv.values");
    ggml_tensor* tokens = part(ctx, in.lists, 0, all);
    ggml_tensor* mask = nullptr;  // 1 for visual tokens of the sequence
    if (stage_ == 0) {
      if (stage.counted > 0) visual_tokens_ = part(ctx, in.lists, stage.counted_at(), stage.counted);
      if (stage.masked > 0) mask = part(ctx, in.values, stage.mask_at(), stage.masked);
    } else {
      // All text, then all visual tokens, by position.
      mask = mask_;
      ggml_tensor* key = ggml_add(ctx, ggml_cast(ctx, kept_, GGML_TYPE_F32), ggml_scale(ctx, mask, detail::behind_all));
      ggml_tensor* order = ggml_argsort(ctx, key, GGML_SORT_ORDER_ASC);
      const std::size_t n = plan().tokens_in_group(stage_), visual = stage.images.tokens;
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
      kept = pick(ctx, tokens, part(ctx, order, 0, plan().tokens_in_group(stage_ + 1)));
    }
    if (stage_ + 1 < plan().stages) mask_ = pick(ctx, mask, kept);
    kept_ = kept;
    return kept;
  }

  // scores: F32 [competing], in order. Returns 1 for those that stay, 0 for others.
  ggml_tensor* stays_nodes(ggml_context* ctx, ggml_tensor* scores) noexcept {
    const detail::StageLists& stage = lists_.stage(stage_);
    const Inputs& in = inputs_[stage_];
    const detail::ScoreNodes nodes = detail::score_nodes(ctx, scores);
    ggml_tensor* not_a_number = ggml_scale_bias(ctx, nodes.number, 1, -1);  // -1 where it is none
    ggml_tensor* rows = detail::ranked(ctx, nodes.value, not_a_number);
    if (!stage.in_order) rows = pick(ctx, rows, part(ctx, in.lists, stage.rows_at(), stage.rows));
    if (stage.padded) rows = ggml_add(ctx, rows, part(ctx, in.values, 0, stage.rows));
    ggml_tensor* stays = nullptr;
    std::size_t entry = 0, group = 0;
    const auto top = [&](ggml_tensor* of, std::size_t size, std::size_t groups) {
      ggml_tensor* matrix = ggml_reshape_2d(ctx, of, detail::to_ne(size), detail::to_ne(groups));
      ggml_tensor* quota =
          ggml_reshape_2d(ctx, part(ctx, in.values, stage.quota_at() + group, groups), 1, detail::to_ne(groups));
      ggml_tensor* ones = detail::highest(ctx, matrix, part(ctx, in.lists, stage.lowest_at() + group, groups), quota);
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
    if (!stage.in_order) stays = pick(ctx, stays, part(ctx, in.lists, stage.inverse_at(), stage.competing));
    if (!stage.pool) return stays;
    // What stays above every other, numbers as they are, NaN below.
    ggml_tensor* lift = ggml_mul(ctx, stays, ggml_scale_bias(ctx, not_a_number, -1, 1));  // 1, or 2 for NaN
    return top(detail::ranked(ctx, nodes.value, ggml_add(ctx, not_a_number, lift)), stage.competing, 1);
  }

  // F32 [1]: how many groups of the last stage compete by zeros alone, some to stay and some to go.
  ggml_tensor* unranked_nodes(ggml_context* ctx) noexcept {
    const detail::StageLists& stage = lists_.stage(stage_ - 1);
    const Inputs& in = inputs_[stage_ - 1];
    ggml_tensor* size = ggml_abs(ctx, competing_);
    ggml_tensor* zeros = ggml_sub(ctx, ggml_step(ctx, ggml_scale_bias(ctx, size, 1, 1)), ggml_step(ctx, size));
    ggml_tensor* rows = stage.in_order ? zeros : pick(ctx, zeros, part(ctx, in.lists, stage.rows_at(), stage.rows));
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
    return ggml_sum_rows(ctx, ggml_mul(ctx, all, part(ctx, in.values, stage.ranks_at(), groups)));
  }

  detail::ScheduleLists lists_;
  bool begun_ = false;
  std::size_t stage_ = 0;  // stages in the graph
  Inputs inputs_[max_stages];
  // Of the graph under construction: what the last select() read and left.
  ggml_tensor *scores_ = nullptr, *competing_ = nullptr, *visual_tokens_ = nullptr, *kept_ = nullptr, *mask_ = nullptr;
};

}  // namespace FASTV_KIND
}  // namespace graph

}  // namespace fastv

#include "detail/end.hpp"

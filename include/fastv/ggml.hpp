// fastv for ggml graphs. Needs ggml.h and nothing else of ggml.
//
// A host that runs one graph up to layer K and another behind it prunes between the two, on views of its tensors in
// host memory: prune(pruner, q, k, ...), token_rows(tensor, axis). A host that builds one graph for the whole prompt
// puts the pruning into it as nodes: GraphPruner. All its shapes are known before a value exists, so the graph stays
// static and runs on whichever backend the rest of it runs on.
//
// Shapes are written as ggml has them, ne[0] first: q [dim, heads, rows] is what the models call Qcur.
#pragma once

#include <ggml.h>

#include "fastv.hpp"

namespace fastv {

// ---- between two graphs: tensors in host memory as views ----------------------------------------

namespace detail {

inline Status fail_type(const ggml_tensor* tensor) noexcept {
  return fail(Errc::tensor_type, ggml_type_name(tensor->type));
}

// A tensor that is to be read or moved on the host.
inline Status check_tensor(const ggml_tensor* tensor, const char* what) noexcept {
  if (tensor == nullptr || tensor->data == nullptr) return fail(Errc::null_data, what);
  if (tensor->ne[3] != 1) return fail(Errc::tensor_batch, what, tensor->ne[3]);
  return {};
}

// Calls use(data) with the tensor's data as const float*, const half* or const bfloat16*.
template <class Use>
Status with_elements(const ggml_tensor* tensor, const char* what, Use use) noexcept {
  if (Status status = check_tensor(tensor, what); !status) return status;
  switch (tensor->type) {
    case GGML_TYPE_F32: return use(static_cast<const float*>(tensor->data));
    case GGML_TYPE_F16: return use(static_cast<const half*>(tensor->data));
    case GGML_TYPE_BF16: return use(static_cast<const bfloat16*>(tensor->data));
    default: return fail_type(tensor);
  }
}

// Bytes to elements. A stride that is no whole number of elements becomes -1, which check() refuses by name.
inline std::ptrdiff_t elements(std::size_t bytes, std::size_t size) noexcept {
  return bytes % size == 0 ? static_cast<std::ptrdiff_t>(bytes / size) : -1;
}

// Heads of vectors [dim, heads, tokens] of T, by the tensor's own strides.
template <class T>
HeadVectors<T> head_vectors(const T* data, const ggml_tensor* tensor) noexcept {
  return {data,
          static_cast<std::size_t>(tensor->ne[1]),
          static_cast<std::size_t>(tensor->ne[2]),
          static_cast<std::size_t>(tensor->ne[0]),
          elements(tensor->nb[1], sizeof(T)),
          elements(tensor->nb[2], sizeof(T))};
}

}  // namespace detail

// Tokens along dimension `axis` (0, 1 or 2) of a tensor of any type, for compact() and gather():
//   hidden states [width, n]               axis 1
//   keys or values [dim, kv heads, n]      axis 2   (a view of the cache that ends at the n-th token)
//   keys or values [dim, n, kv heads]      axis 1
//   positions [n]                          axis 0   (M-RoPE's [4 n]: position_axes(data, 4, n))
// Elements of ne[0] must be adjacent, unless the axis is 0. Quantised types move as whole rows.
inline Result<Rows> token_rows(const ggml_tensor* tensor, int axis) noexcept {
  using detail::fail;
  if (Status status = detail::check_tensor(tensor, "the tensor"); !status) return {{}, status};
  if (axis < 0 || axis > 2) return {{}, fail(Errc::tensor_no_dim, "the tensor", axis, 3)};
  const auto size = [&](int i) { return static_cast<std::size_t>(tensor->ne[i]); };
  const auto stride = [&](int i) { return static_cast<std::ptrdiff_t>(tensor->nb[i]); };
  if (axis > 0 && tensor->nb[0] != ggml_type_size(tensor->type))
    return {{},
            fail(Errc::overlapping_stride, "stride of ne[0] of the tensor", static_cast<long long>(tensor->nb[0]),
                 static_cast<long long>(ggml_type_size(tensor->type)))};
  if (axis == 0) {
    if (ggml_blck_size(tensor->type) != 1) return {{}, detail::fail_type(tensor)};
    if (tensor->ne[2] != 1) return {{}, fail(Errc::tensor_batch, "the tensor", tensor->ne[2])};
    return {{tensor->data, size(0), ggml_type_size(tensor->type), stride(0), size(1), stride(1)}, {}};
  }
  const int other = 3 - axis;
  return {
      {tensor->data, size(axis), ggml_row_size(tensor->type, tensor->ne[0]), stride(axis), size(other), stride(other)},
      {}};
}

// Keys of one layer [dim, kv heads, tokens], F32, F16 or BF16: calls use(HeadVectors<T>), which returns a Status.
template <class Use>
Status with_head_vectors(const ggml_tensor* vectors, const char* what, Use use) noexcept {
  return detail::with_elements(vectors, what, [&](auto data) { return use(detail::head_vectors(data, vectors)); });
}

// Queries [dim, heads, rows] of the last prompt rows, after RoPE, and keys [dim, kv heads, keys] of layer K-1 (permute
// a cache that has them otherwise), each F32, F16 or BF16: calls use(QueryKey<Q, K>), which returns a Status.
template <class Use>
Status with_query_key(const ggml_tensor* query, const ggml_tensor* key, float scale, Use use) noexcept {
  return detail::with_elements(query, "query", [&](auto q) {
    return with_head_vectors(key, "key", [&](const auto& keys) {
      if (query->ne[0] != key->ne[0]) return detail::fail(Errc::head_dims_differ, "", query->ne[0], key->ne[0]);
      auto evidence =
          query_key(q, static_cast<std::size_t>(query->ne[1]), static_cast<std::size_t>(query->ne[2]), keys, scale);
      evidence.query_head_stride = detail::elements(query->nb[1], sizeof(*q));
      evidence.query_row_stride = detail::elements(query->nb[2], sizeof(*q));
      return use(evidence);
    });
  });
}

// Pruner::prune() by queries and keys in host memory; see with_query_key(). soft_cap: see QueryKey. past: keys of
// earlier turns ahead of this prompt's.
template <class Score, class ParallelFor = Serial>
Kept prune(Pruner<Score>& pruner, const ggml_tensor* query, const ggml_tensor* key, float scale,
           Span<const TokenSpan> visual, float soft_cap = 0, std::size_t past = 0,
           const ParallelFor& parallel_for = {}) noexcept {
  Kept kept;
  const Status status = with_query_key(query, key, scale, [&](auto evidence) {
    evidence.soft_cap = soft_cap;
    evidence.past = past;
    kept = pruner.prune(evidence, visual, parallel_for);
    return kept.status;
  });
  return status ? kept : Kept{{}, 0, 0, status};
}

// Kept indices as the I32 [m] that ggml_get_rows() reads. indices: a tensor of host memory, or use kept.indices as they
// are: they have I32's bits. O(m).
inline Status write_indices(const Kept& kept, ggml_tensor* indices) noexcept {
  if (!kept) return kept.status;
  if (Status status = detail::check_tensor(indices, "the tensor of indices"); !status) return status;
  if (indices->type != GGML_TYPE_I32) return detail::fail(Errc::tensor_index_type, ggml_type_name(indices->type));
  if (ggml_nelements(indices) != static_cast<std::int64_t>(kept.size()) || !ggml_is_contiguous(indices))
    return detail::fail(Errc::room_too_small, "the tensor of indices", ggml_nelements(indices),
                        detail::number(kept.size()));
  std::memcpy(indices->data, kept.indices.data(), kept.size() * sizeof(std::int32_t));
  return {};
}

// ---- inside one graph ---------------------------------------------------------------------------

// The attention of the last query row, mean over query heads: F32 [keys], one node per step, no mask (the last row sees
// every key). q: [dim, heads, rows], its last row asks; k: [dim, kv heads, keys]; query head h reads KV head
// h / (heads / kv heads). The logits are summed in F32 if k is F32, else at the precision of ggml_mul_mat for its type.
// q and k must be as documented: ggml_mul_mat asserts it.
inline ggml_tensor* graph_scores(ggml_context* ctx, ggml_tensor* q, ggml_tensor* k, float scale,
                                 float soft_cap = 0) noexcept {
  const std::int64_t dim = q->ne[0], heads = q->ne[1], keys = k->ne[2];
  ggml_tensor* row = ggml_view_3d(ctx, q, dim, 1, heads, q->nb[1], q->nb[1],
                                  static_cast<std::size_t>(q->ne[2] - 1) * q->nb[2]);  // [dim, 1, heads]
  ggml_tensor* logits = ggml_mul_mat(ctx, ggml_permute(ctx, k, 0, 2, 1, 3), row);      // [keys, 1, heads]
  if (soft_cap > 0) logits = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, logits, scale / soft_cap)), soft_cap);
  ggml_tensor* p = ggml_soft_max_ext(ctx, logits, nullptr, soft_cap > 0 ? 1.0f : scale, 0.0f);
  p = ggml_cont(ctx, ggml_transpose(ctx, ggml_reshape_2d(ctx, p, keys, heads)));  // [heads, keys]
  return ggml_reshape_1d(ctx, ggml_mean(ctx, p), keys);
}

// The kept rows of x [width, n] -> [width, m] (F32, or I32 if x is).
inline ggml_tensor* graph_gather(ggml_context* ctx, ggml_tensor* x, ggml_tensor* kept) noexcept {
  return ggml_get_rows(ctx, x, kept);
}

// The kept position ids of `axes` axes: I32 [axes * n] -> [axes * m], each axis in one piece (M-RoPE has 4 in ggml).
inline ggml_tensor* graph_gather_positions(ggml_context* ctx, ggml_tensor* positions, int axes,
                                           ggml_tensor* kept) noexcept {
  const std::int64_t n = positions->ne[0] / axes, m = kept->ne[0];
  ggml_tensor* all = nullptr;
  for (int axis = 0; axis < axes; ++axis) {
    ggml_tensor* one = ggml_view_2d(ctx, positions, 1, n, positions->nb[0],
                                    static_cast<std::size_t>(axis) * static_cast<std::size_t>(n) * positions->nb[0]);
    one = ggml_reshape_1d(ctx, ggml_get_rows(ctx, one, kept), m);
    all = all == nullptr ? one : ggml_concat(ctx, all, one, 0);
  }
  return all;
}

// Turns one prompt's pruning into nodes of a graph.
//
//   fastv::GraphPruner pruning(config);
//   if (auto status = pruning.plan({n, layers, visual}); !status) ...        // shapes, and what is wrong with them
//   ...                                                                       // layers 0 .. K-1 into the graph
//   ggml_tensor* kept = pruning.select(ctx, fastv::graph_scores(ctx, q, k, scale));   // I32 [m], ascending
//   hidden = fastv::graph_gather(ctx, hidden, kept);
//   positions = fastv::graph_gather_positions(ctx, positions, 1, kept);
//   ...                                                                       // layers K .. on m tokens; allocate
//   pruning.set_inputs([](ggml_tensor* t, const void* data, std::size_t bytes) {
//     ggml_backend_tensor_set(t, data, 0, bytes);
//   });
//
// Every rule of select() that ranks by one score per token, with its quotas, windows and even grid, becomes: a list of
// tokens that stay in any case, and groups of tokens that keep a known number each. Random and uniform selection are
// lists alone. Equal scores: which of them stays is the backend's choice; select_exactly() has the core's rule. The
// object must outlive the graph.
class GraphPruner {
 public:
  // plan() checks the settings.
  explicit GraphPruner(const Config& config = {}) noexcept : config_(config) {}

  // The settings it was made with.
  const Config& config() const noexcept { return config_; }
  // See Pruner::due().
  bool due(std::size_t layers_run) const noexcept { return layers_run == config_.filtering_layer; }

  // Everything that does not depend on a value. Errors: those of make_plan() and select(), and settings that ask for
  // other rows than the last. O(tokens).
  Result<Plan> plan(const Prompt& prompt) noexcept {
    using detail::fail;
    using detail::number;
    const Result<Plan> plan = make_plan(config_, prompt);
    if (!plan) return plan;
    const bool ranks = config_.selection == Selection::top_k && plan->visual > 0;
    if (ranks && (config_.score_rows != ScoreRows::last || !config_.prior_rows.empty()))
      return {{}, fail(Errc::not_in_graph)};
    const std::size_t n = plan->tokens, spans = prompt.visual.size();
    constexpr std::size_t most = std::size_t{1} << 24;  // positions are sorted as F32
    if (n > most) return {{}, fail(Errc::too_many_tokens, "", number(n), number(most))};
    Status status = spans_.reserve(spans);
    if (status) status = quotas_.reserve(spans);
    if (status) status = marks_.reserve(plan->visual);
    if (status) status = kept_.reserve(plan->kept());
    if (status) status = scores_.reserve(plan->visual);
    if (status) status = stays_.reserve(n);
    if (status) status = fixed_.reserve(n);
    if (status) status = order_.reserve(plan->visual);
    if (status) status = groups_.reserve(plan->visual);
    if (!status) return {{}, status};
    for (std::size_t s = 0; s < spans; ++s) spans_[s] = prompt.visual[s];
    visual_ = {spans_.first(spans).data(), spans};
    plan_ = *plan;
    fixed_count_ = order_count_ = groups_count_ = 0;
    fixed_input_ = order_input_ = nullptr;
    status_ = {};

    if (!ranks) {  // no score decides: the whole answer is a list
      const Result<Selected> selected = fastv::select<float>(config_, {}, visual_, n, kept_.first(plan->kept()),
                                                             quotas_.first(spans), marks_.first(plan->visual));
      if (!selected) return {{}, selected.status};
      for (const Index index : kept_.first(selected->count)) fixed_[fixed_count_++] = static_cast<std::int32_t>(index);
      return plan;
    }
    for (std::size_t i = 0; i < n; ++i) stays_[i] = 1;
    for (const TokenSpan& span : visual_)
      for (std::size_t i = 0; i < span.count; ++i) stays_[span.first + i] = 0;
    for (std::size_t i = 0; i < plan->visual; ++i) marks_[i] = 0;
    if (config_.quota == Quota::pooled) {
      status = add_groups(0, plan->visual, 0, plan->kept_visual(), 0);
    } else {
      status = picture_quotas(config_, visual_, quotas_.first(spans));
      std::size_t picture_number = 0, numbered = 0;
      detail::for_each_picture(visual_, [&](const detail::Picture& picture) {
        if (status)
          status = add_groups(numbered, picture.tokens, picture.columns, quotas_[picture_number], picture.first_span);
        ++picture_number;
        numbered += picture.tokens;
      });
    }
    if (!status) return {{}, status};
    for (std::size_t i = 0; i < n; ++i)
      if (stays_[i] != 0) fixed_[fixed_count_++] = static_cast<std::int32_t>(i);
    return plan;
  }

  // Tokens that stay, m.
  std::size_t kept() const noexcept { return plan_.kept(); }

  // scores: F32 [at least n], one per prompt token (graph_scores()); unused, and may be null, where no score decides.
  // Returns I32 [m], ascending positions in the prompt. Nodes: about 4 per group of pictures or windows of one size.
  ggml_tensor* select(ggml_context* ctx, ggml_tensor* scores) noexcept {
    ggml_tensor* all = fixed_count_ == 0 ? nullptr : fixed_input_ = input(ctx, fixed_count_, "fastv.fixed");
    if (order_count_ == 0) return all;  // ascending already
    order_input_ = input(ctx, order_count_, "fastv.order");
    ggml_tensor* competing = ggml_get_rows(ctx, ggml_reshape_2d(ctx, scores, 1, scores->ne[0]), order_input_);
    for (std::size_t g = 0, begin = 0; g < groups_count_;) {
      const Group group = groups_[g];
      std::size_t run = 1;  // neighbours of the same size and quota are rows of one tensor
      while (g + run < groups_count_ && groups_[g + run].size == group.size && groups_[g + run].quota == group.quota)
        ++run;
      const auto size = static_cast<std::int64_t>(group.size), quota = static_cast<std::int64_t>(group.quota),
                 count = static_cast<std::int64_t>(run);
      const std::size_t bytes = sizeof(float), row = group.size * bytes;
      ggml_tensor* rows = ggml_view_2d(ctx, competing, size, count, row, begin * bytes);
      ggml_tensor* best = ggml_top_k(ctx, rows, static_cast<int>(quota));  // I32 [quota, run]
      ggml_tensor* tokens = ggml_view_3d(ctx, order_input_, 1, size, count, bytes, row, begin * bytes);
      ggml_tensor* found = ggml_reshape_1d(ctx, ggml_get_rows(ctx, tokens, best), quota * count);  // prompt positions
      all = all == nullptr ? found : ggml_concat(ctx, all, found, 0);
      begin += group.size * run;
      g += run;
    }
    // There is no sort of I32; in F32 positions are exact up to 2^24 (plan() refuses longer prompts).
    ggml_tensor* ascending = ggml_argsort(ctx, ggml_cast(ctx, all, GGML_TYPE_F32), GGML_SORT_ORDER_ASC);
    const auto m = static_cast<std::int64_t>(kept());
    return ggml_reshape_1d(ctx, ggml_get_rows(ctx, ggml_reshape_2d(ctx, all, 1, m), ascending), m);
  }

  // The same by the core's own select(), for its rule on ties and NaN: a custom node, which ggml runs on the CPU. What
  // went wrong (all scores NaN, an infinite one) is in status() after the graph has run, and the first m tokens stay.
  ggml_tensor* select_exactly(ggml_context* ctx, ggml_tensor* scores) noexcept {
    if (order_count_ == 0) return select(ctx, scores);
    ggml_tensor* args[] = {scores};
    return ggml_custom_4d(ctx, GGML_TYPE_I32, static_cast<std::int64_t>(kept()), 1, 1, 1, args, 1, &run_select, 1,
                          this);
  }
  // What went wrong in the last run of select_exactly()'s node.
  const Status& status() const noexcept { return status_; }

  // Call before each run, once the graph has been allocated: set(tensor, data, bytes) for each input that select()
  // made. (ggml may use an input's memory again behind its last reader.)
  template <class Set>
  void set_inputs(const Set& set) const {
    if (fixed_input_ != nullptr)
      set(fixed_input_, static_cast<const void*>(fixed_.first(0).data()), fixed_count_ * sizeof(std::int32_t));
    if (order_input_ != nullptr)
      set(order_input_, static_cast<const void*>(order_.first(0).data()), order_count_ * sizeof(std::int32_t));
  }

 private:
  struct Group {
    std::size_t size, quota;  // tokens that compete, and how many of them stay
  };

  static ggml_tensor* input(ggml_context* ctx, std::size_t count, const char* name) noexcept {
    ggml_tensor* tensor = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, static_cast<std::int64_t>(count));
    ggml_set_name(tensor, name);
    ggml_set_input(tensor);
    return tensor;
  }

  // Prompt position of the visual token that is `number` in the count across the spans.
  std::size_t position_of(std::size_t number) const noexcept {
    std::size_t position = 0;
    detail::for_each_stretch(visual_, number, number + 1,
                             [&](std::size_t, std::size_t first, std::size_t) { position = first; });
    return position;
  }

  // The groups of one picture's n tokens, numbered from `first` on.
  Status add_groups(std::size_t first, std::size_t n, std::size_t columns, std::size_t count,
                    std::size_t span) noexcept {
    if (config_.window_rows != 0 && columns == 0)
      return detail::fail(Errc::window_needs_columns, "", 0, 0, detail::number(span));
    using Mark = detail::Word<float>;
    Mark* marks = marks_.first(0).data() + first;
    detail::for_each_group(config_, marks, n, columns, count, [&](std::size_t quota, auto tokens) {
      std::size_t size = 0, taken = 0;
      tokens([&](std::size_t i) {
        ++size;
        taken += marks[i] == detail::chosen<Mark> ? 1u : 0u;
      });
      const bool all = quota == size;
      tokens([&](std::size_t i) {
        if (all || marks[i] == detail::chosen<Mark>)
          stays_[position_of(first + i)] = 1;
        else if (quota > taken)
          order_[order_count_++] = static_cast<std::int32_t>(position_of(first + i));
      });
      if (!all && quota > taken) groups_[groups_count_++] = {size - taken, quota - taken};
    });
    return {};
  }

  static void run_select(ggml_tensor* dst, int thread, int, void* self) {
    if (thread == 0) static_cast<GraphPruner*>(self)->select_now(dst);
  }
  void select_now(ggml_tensor* dst) noexcept {
    const ggml_tensor* scores = dst->src[0];
    const auto* values = static_cast<const float*>(scores->data);
    detail::for_each_stretch(visual_, 0, plan_.visual, [&](std::size_t number, std::size_t position, std::size_t n) {
      for (std::size_t i = 0; i < n; ++i) scores_[number + i] = values[position + i];
    });
    const std::size_t m = kept();
    const Span<float> visual_scores = scores_.first(plan_.visual);
    const Result<Selected> selected =
        fastv::select<float>(config_, Span<const float>(visual_scores.data(), visual_scores.size()), visual_,
                             plan_.tokens, kept_.first(m), quotas_.first(visual_.size()), marks_.first(plan_.visual));
    status_ = selected.status;
    auto* out = static_cast<std::int32_t*>(dst->data);
    for (std::size_t i = 0; i < m; ++i) out[i] = static_cast<std::int32_t>(selected ? kept_[i] : i);
  }

  Config config_;
  Plan plan_;
  Status status_;
  Span<const TokenSpan> visual_;
  detail::Buffer<TokenSpan> spans_;
  detail::Buffer<Index> quotas_, kept_;
  detail::Buffer<detail::Word<float>> marks_;
  detail::Buffer<float> scores_;
  detail::Buffer<unsigned char> stays_;         // [n] 1: whatever the scores
  detail::Buffer<std::int32_t> fixed_, order_;  // prompt positions: that stay in any case; that compete, by group
  detail::Buffer<Group> groups_;
  std::size_t fixed_count_ = 0, order_count_ = 0, groups_count_ = 0;
  ggml_tensor *fixed_input_ = nullptr, *order_input_ = nullptr;
};

}  // namespace fastv

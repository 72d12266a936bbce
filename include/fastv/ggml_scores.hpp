// fastv for ggml: what a layer's attention says of its tokens, and their positions, as nodes of a graph.
#pragma once

#include "fastv.hpp"
#include "ggml_views.hpp"

#include "detail/begin.hpp"

namespace fastv {

namespace detail {
inline namespace FASTV_KIND {

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

}  // namespace FASTV_KIND
}  // namespace graph

}  // namespace fastv

#include "detail/end.hpp"

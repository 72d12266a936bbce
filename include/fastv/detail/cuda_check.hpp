// fastv: what can be wrong with views of device memory, told from shapes alone; and the views as kernels take them.
#pragma once

#include "cuda_combine.hpp"
#include "cuda_gather.hpp"
#include "cuda_plan.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
namespace gpu {
inline namespace FASTV_KIND {

// rows: that a packed tensor must have; tokens: of the longest sequence.
template <class T>
Status check_device_heads(const cuda::Heads<T>& view, const char* what, std::size_t rows, std::size_t tokens,
                          std::size_t widest = most_dim) noexcept {
  const fastv::Heads<T>& layout = view.layout;
  const KeyPages<T>& pages = layout.pages;
  if (layout.heads == 0) return fail(Errc::bad_shape, "{} has 0 heads: state at least 1", what);
  if (layout.dim == 0) return fail(Errc::bad_shape, "{} has head dimension 0: state at least 1", what);
  if (layout.heads > 65535) return fail(Errc::bad_shape, "{} has {} heads, more than any model", what, layout.heads);
  if (layout.dim > widest)
    return fail(Errc::not_supported, "{} has head dimension {} but at most {} is supported on the device", what,
                layout.dim, widest);
  if (pages.chunk != 0 && layout.dim % pages.chunk != 0)
    return fail(Errc::bad_shape, "chunks of {} elements do not divide the head dimension of {}, {}", pages.chunk, what,
                layout.dim);
  const std::size_t entry = pages.chunk == 0 ? layout.dim : pages.chunk;
  const bool paged = view.pages != 0 || view.block_tables != nullptr || view.block_pointers != nullptr;
  if (paged) {
    if (pages.block_tokens == 0) return fail(Errc::bad_pages, "blocks of {} hold 0 tokens: state at least 1", what);
    if (pages.block_tokens > max_tokens || view.pages > max_tokens)
      return fail(Errc::bad_pages, "{} has {} pages of {} tokens, more than int32 counts", what, view.pages,
                  pages.block_tokens);
    if (view.block_tables == nullptr && view.block_pointers == nullptr) return fail_null("the block tables");
    if (blocks_for(tokens, pages.block_tokens) > view.pages)
      return fail(Errc::bad_pages, "the block tables of {} have {} pages but {} are needed by the longest sequence",
                  what, view.pages, blocks_for(tokens, pages.block_tokens));
  } else if (layout.tokens < rows) {
    return fail(Errc::bad_shape, "{} has {} rows but the batch reaches up to row {}: hand over the packed tensor", what,
                layout.tokens, rows);
  }
  if (view.block_pointers == nullptr) {
    if (Status status = check_data(layout.data, what); !status) return status;
  }
  return check_strides({{what, "token stride", layout.token_stride, paged ? pages.block_tokens : layout.tokens},
                        {what, "head stride", layout.head_stride, layout.heads},
                        {what, "chunk stride", pages.chunk_stride, layout.dim / entry},
                        {what, "block stride", pages.block_stride, 1}},
                       entry);
}

template <class T>
Vectors<T> vectors_of(const cuda::Heads<T>& view) noexcept {
  const fastv::Heads<T>& layout = view.layout;
  return {layout.data,
          view.block_tables,
          view.block_pointers,
          layout.head_stride,
          layout.token_stride,
          layout.pages.block_stride,
          layout.pages.chunk_stride,
          view.offset,
          static_cast<std::uint32_t>(view.pages),
          static_cast<std::uint32_t>(layout.pages.block_tokens),
          static_cast<std::uint32_t>(layout.pages.chunk)};
}

// Whether every vector begins, and every 16 bytes of it lie, at a multiple of 16 bytes.
template <class T>
bool moves_wide(const Vectors<T>& v, std::size_t dim) noexcept {
  constexpr std::ptrdiff_t size = 16 / static_cast<std::ptrdiff_t>(sizeof(T));
  const auto whole = [&](std::ptrdiff_t elements) { return elements % size == 0; };
  return reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0 && whole(static_cast<std::ptrdiff_t>(dim)) &&
         whole(v.head_stride) && whole(v.token_stride) && whole(v.block_stride) && whole(v.chunk_stride) &&
         whole(v.offset_in_block) && whole(static_cast<std::ptrdiff_t>(v.chunk));
}

// Scales of `heads` heads of an int8 cache, or none.
inline Status check_scales(const cuda::Heads<float>& scales, const char* what, std::size_t heads, std::size_t rows,
                           std::size_t tokens) noexcept {
  if (scales.layout.data == nullptr && scales.block_pointers == nullptr) return {};
  if (Status status = check_device_heads(scales, what, rows, tokens); !status) return status;
  if (scales.layout.heads == heads && scales.layout.dim == 1) return {};
  return fail(Errc::bad_shape, "{} has {} heads of {} but needs one scale for each of {} KV heads", what,
              scales.layout.heads, scales.layout.dim, heads);
}

// The same shapes as the core judges them.
template <class Q, class K>
Status check_evidence(const cuda::QueryKey<Q, K>& evidence, const StagePlan& stage) noexcept {
  if (!stage.last_row_asks) return stage.last_row_asks;
  if (Status status = check_device_heads(evidence.query, "query", stage.query_rows, stage.rows_at_hand); !status)
    return status;
  if (evidence.query.pages != 0 || evidence.query.layout.pages.chunk != 0)
    return fail(Errc::not_supported, "query lies in pages or chunks: hand it over in one piece");
  if (Status status = check_device_heads(evidence.key, "key", stage.key_rows, stage.keys); !status) return status;
  static const Q query{};  // never read
  static const K key{};
  const fastv::Heads<Q>& q = evidence.query.layout;
  const fastv::Heads<K>& k = evidence.key.layout;
  auto shape =
      fastv::query_key(fastv::heads(&query, TokenMajor{1, q.heads, q.dim}),
                       fastv::heads(&key, TokenMajor{stage.keys > 0 ? stage.keys : 1, k.heads, k.dim}), evidence.scale);
  shape.soft_cap = evidence.soft_cap;
  shape.heads_total = evidence.heads_total;
  if (Status status = shape.check(); !status) return status;
  if (Status status = expect_all_heads(q.heads, evidence.heads_total); !status) return status;
  if (Status status = check_scales(evidence.key_scales, "key_scales", k.heads, stage.key_rows, stage.keys); !status)
    return status;
  const cuda::Rope& rope = evidence.rope;
  if (rope.pairs > q.dim / 2)
    return fail(Errc::bad_setting, "Rope has {} pairs but the head dimension is {}: use at most {}", rope.pairs, q.dim,
                q.dim / 2);
  if (rope.pairs > 0 && (rope.frequencies == nullptr || rope.positions == nullptr))
    return fail_null(rope.frequencies == nullptr ? "Rope::frequencies" : "Rope::positions");
  if (rope.axis != nullptr && rope.axis_stride < stage.query_rows)
    return fail(Errc::bad_setting, "Rope::axis_stride is {} but an axis has {} positions", rope.axis_stride,
                stage.query_rows);
  return {};
}

template <class T>
Status check_evidence(const cuda::Probabilities<T>& evidence, const StagePlan& stage) noexcept {
  if (!stage.last_row_asks) return stage.last_row_asks;
  if (evidence.heads == 0 || evidence.heads > 65535)
    return fail(Errc::bad_shape, "the attention has {} heads: state 1 to 65535", evidence.heads);
  if (Status status = check_data(evidence.data, "probabilities"); !status) return status;
  if (evidence.queries < stage.rows_at_hand)
    return fail(Errc::bad_shape, "the attention has {} query rows but a sequence has {} at hand: see Request::queries",
                evidence.queries, stage.rows_at_hand);
  if (evidence.keys < stage.keys)
    return fail(Errc::bad_shape, "the attention has {} keys but the longest sequence has {}", evidence.keys,
                stage.keys);
  if (evidence.heads_total != 0 && evidence.heads_total < evidence.heads)
    return fail(Errc::bad_shape, "the attention has {} heads but heads_total is {}: it counts the heads of all ranks",
                evidence.heads, evidence.heads_total);
  if (Status status = expect_all_heads(evidence.heads, evidence.heads_total); !status) return status;
  const std::size_t norm_heads = evidence.norm_heads == 0 ? evidence.heads : evidence.norm_heads;
  if (evidence.value_norms != nullptr && evidence.heads % norm_heads != 0)
    return fail(Errc::bad_shape, "norm_heads is {}, which does not divide the {} heads", norm_heads, evidence.heads);
  return check_strides({{"probabilities", "key stride", evidence.key_stride, evidence.keys},
                        {"probabilities", "query stride", evidence.query_stride, evidence.queries},
                        {"probabilities", "head stride", evidence.head_stride, evidence.heads},
                        {"probabilities", "sequence stride", evidence.sequence_stride, stage.tables}},
                       1);
}

inline Status expect_no_rows(const StagePlan& stage, const char* what) noexcept {
  if (!stage.by_rows) return {};
  return fail(Errc::missing_evidence,
              "a request chooses rows to score by, or prior rows, but {} have none: use ScoreRows::last, or attention "
              "as evidence",
              what);
}
template <class K>
Status check_evidence(const cuda::KeysOnly<K>& evidence, const StagePlan& stage) noexcept {
  if (Status status = expect_no_rows(stage, "keys alone"); !status) return status;
  if (Status status = check_device_heads(evidence.key, "key", stage.key_rows, stage.keys); !status) return status;
  return check_scales(evidence.key_scales, "key_scales", evidence.key.layout.heads, stage.key_rows, stage.keys);
}
inline Status check_evidence(const cuda::Scores& evidence, const StagePlan& stage) noexcept {
  if (Status status = expect_no_rows(stage, "scores"); !status) return status;
  return stage.jobs == 0 ? Status{} : check_data(evidence.values, "scores");
}
inline Status check_evidence(const cuda::NoEvidence&, const StagePlan& stage) noexcept {
  return stage.jobs == 0 ? Status{}
                         : fail(Errc::missing_evidence,
                                "Selection::top_k needs scores: hand over probabilities, query and key, or scores");
}

// rows: that packed hidden states have. limit: Limits::features.
template <class T>
Status check_device_features(const cuda::Features<T>& features, const StagePlan& stage, std::size_t rows,
                             std::size_t limit) noexcept {
  if (stage.contests == 0) return {};
  const bool keys = features.at == cuda::FeaturesAt::keys;
  if (!keys && (features.vectors.pages != 0 || features.scales.pages != 0))
    return fail(Errc::not_supported, "features lie in pages but are not found as keys are: see FeaturesAt");
  if (keys && stage.keys_gone)
    return fail(
        Errc::missing_evidence,
        "features are found as keys are, but of a prompt that Selection::diverse prunes some keys are no longer "
        "at hand, see Request::first_key: compare hidden rows");
  const std::size_t needed = keys                                    ? stage.compared_key_rows
                             : features.at == cuda::FeaturesAt::rows ? rows
                                                                     : stage.visual;
  if (Status status = check_device_heads(features.vectors, "features", needed, stage.compared_keys, widest_features);
      !status)
    return status;
  const std::size_t heads = features.vectors.layout.heads, width = features.width();
  if (Status status = check_scales(features.scales, "scales of features", heads, needed, stage.compared_keys); !status)
    return status;
  if (features.vectors.layout.dim > widest_features / heads || width > limit)
    return fail(Errc::too_small,
                "features have {} heads of {}, {} elements a token, but there is room for {}: project them, or raise "
                "Limits::features and reserve() again",
                heads, features.vectors.layout.dim, width, limit);
  return {};
}
inline Status expect_no_contests(const StagePlan& stage) noexcept {
  if (stage.contests == 0) return {};
  return fail(Errc::missing_evidence,
              "a request asks for Selection::diverse, which compares tokens by features: hand over "
              "cuda::with_features(evidence, keys)");
}

// A tensor to gather as the kernel takes it; `tile` 0: nothing to do.
inline Status check_move(const cuda::Move& move, std::size_t number, std::size_t found, std::size_t kept,
                         Moved& moved) noexcept {
  const Rows &from = move.from, &to = move.to;
  moved = {};
  if (from.count < found)
    return fail(Errc::bad_shape, "tensor {} has {} rows but the stage finds {}: hand over the packed tensor", number,
                from.count, found);
  if (to.count < kept)
    return fail(Errc::too_small, "the destination of tensor {} has room for {} rows but {} stay", number, to.count,
                kept);
  if (from.row_bytes != to.row_bytes || from.planes != to.planes)
    return fail(Errc::bad_shape, "tensor {} has {} bytes a row, or planes, that its destination has not: {}", number,
                from.row_bytes, to.row_bytes);
  if (from.planes > 65535 || from.row_bytes > max_tokens)
    return fail(Errc::bad_shape, "tensor {} has {} planes and {} bytes a row, more than is supported", number,
                from.planes, from.row_bytes);
  if (kept == 0 || from.row_bytes == 0 || from.planes == 0) return {};
  if (from.data == nullptr || to.data == nullptr)
    return fail_null(from.data == nullptr ? "a tensor to gather" : "the destination of a tensor to gather");
  if (from.data == to.data)
    return fail(Errc::bad_shape, "tensor {} is to be gathered in place: hand over another buffer", number);
  for (const Rows* rows : {&from, &to})
    if (Status status = check_strides({{"a tensor to gather", "row stride", rows->row_stride, rows->count},
                                       {"a tensor to gather", "plane stride", rows->plane_stride, rows->planes}},
                                      rows->row_bytes);
        !status)
      return status;
  std::uint64_t all = reinterpret_cast<std::uintptr_t>(from.data) | reinterpret_cast<std::uintptr_t>(to.data) |
                      from.row_bytes | static_cast<std::uint64_t>(from.row_stride) |
                      static_cast<std::uint64_t>(to.row_stride);
  if (from.planes > 1)
    all |= static_cast<std::uint64_t>(from.plane_stride) | static_cast<std::uint64_t>(to.plane_stride);
  std::uint32_t unit = 16;
  while (all % unit != 0) unit /= 2;
  moved.from = static_cast<const char*>(from.data);
  moved.to = static_cast<char*>(to.data);
  moved.from_row = from.row_stride;
  moved.to_row = to.row_stride;
  moved.from_plane = from.plane_stride;
  moved.to_plane = to.plane_stride;
  moved.unit = unit;
  moved.units = static_cast<std::uint32_t>(from.row_bytes / unit);
  moved.planes = static_cast<std::uint32_t>(from.planes);
  moved.count = static_cast<std::uint32_t>(kept);
  const auto threads = static_cast<std::uint32_t>(Gather::threads);
  moved.tile = moved.units >= threads / 4 ? 4 : threads / moved.units;
  return {};
}

}  // namespace FASTV_KIND
}  // namespace gpu
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

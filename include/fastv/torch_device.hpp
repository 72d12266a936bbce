// fastv for LibTorch, on the device: scores and selection where the tensors are, for GPUs. LibTorch 1.13 or newer.
//
//   auto kept = fastv::device::prune(config, q, k, scale, visual);  // int64 [m], ascending, on the device of k
//   if (!kept) return std::puts(kept.message().c_str()), 1;
//   hidden = hidden.index_select(1, *kept);                         // [1, n, width] -> [1, m, width]
//
// The same counts, ties and order as in the core. No value comes back to the host: how many tokens stay depends on
// shapes alone, so that every operation can be queued behind the layer that has just run. Hence what only values can
// tell is not reported here: of tokens that compete (those of an image, or of all in a pool) by scores that are all 0 or
// all NaN, the earliest stay, as many as planned. A Pruner that is handed device::scores() on the CPU tells. NaN is the
// lowest.
//
// In a file that nvcc compiles against a LibTorch with CUDA, tensors in a GPU's memory are scored and selected by the
// kernels of cuda.cuh, on PyTorch's current stream and in memory of its caching allocator: sums in float whatever the
// elements, and every setting; Selection::diverse compares tokens by the keys, where they are handed over. Everywhere else, and for Double or queries whose elements lie
// apart, by ATen operations; there, settings that need more than an order of scores (other selections, windows, an even
// share) are refused: a Pruner has them. Both may be in one program. device::has_kernels tells which it is.
#pragma once

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/nan_to_num.h>
#include <c10/core/GradMode.h>

#include <limits>
#include <vector>

#include "fastv.hpp"
#include "torch.hpp"

#if defined(__CUDACC__)
#if __has_include(<c10/cuda/impl/cuda_cmake_macros.h>)  // which builds of LibTorch without CUDA have not
#define FASTV_TORCH_KERNELS
#endif
#endif
#if defined(FASTV_TORCH_KERNELS)
#include "detail/torch_streams.cuh"
#endif

#include "detail/begin.hpp"

// Functions that differ have different names for the linker.
#if defined(FASTV_TORCH_KERNELS)
#define FASTV_TORCH_KIND by_kernels
#else
#define FASTV_TORCH_KIND by_operations
#endif

namespace fastv {

namespace detail {
inline namespace FASTV_KIND {

inline std::int64_t extent(std::size_t size) noexcept { return static_cast<std::int64_t>(size); }
inline at::ScalarType at_least_float(at::ScalarType type) noexcept {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}
// [a, b, c], without the batch of 1.
inline at::Tensor without_batch(const at::Tensor& tensor) { return tensor.dim() == 4 ? tensor.select(0, 0) : tensor; }
// Entries begin .. begin + count - 1 of a dimension: narrow() would take two calls.
inline at::Tensor part_of(const at::Tensor& tensor, std::int64_t dim, std::size_t begin, std::size_t count) {
  return tensor.slice(dim, extent(begin), extent(begin + count));
}
inline at::Tensor in_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}
// 0, 1, ... on the device of `like`.
inline at::Tensor counting(std::size_t count, const at::Tensor& like) {
  return at::arange(extent(count), like.options().dtype(at::kLong));
}
// Whole numbers of the host. CUDA copies pageable memory before it returns, so the host need not wait there.
template <class NumberAt>
at::Tensor upload(std::size_t count, const at::Tensor& like, NumberAt number_at) {
  const at::Tensor numbers = like.new_empty({extent(count)}, at::TensorOptions(at::kCPU).dtype(at::kLong));
  auto* out = static_cast<std::int64_t*>(numbers.data_ptr());
  for (std::size_t i = 0; i < count; ++i) out[i] = extent(number_at(i));
  return numbers.to(like.device(), at::kLong, /*non_blocking=*/like.is_cuda());
}

// Calls use(is_visual, first, count) for each stretch of text or visual tokens, in order. Spans side by side are one.
template <class Use>
void for_each_piece(Span<const TokenSpan> visual, std::size_t tokens, Use use) {
  std::size_t position = 0;
  for (std::size_t s = 0; s < visual.size();) {
    const std::size_t first = visual[s].first;
    std::size_t end = first;
    for (; s < visual.size() && visual[s].first == end; ++s) end += visual[s].count;
    if (end == first) continue;  // of an image that earlier stages emptied
    if (position < first) use(false, position, first - position);
    use(true, first, end - first);
    position = end;
  }
  if (position < tokens) use(false, position, tokens - position);
}

// ---- evidence -----------------------------------------------------------------------------------

// Attention, or queries and keys, of a prompt of n = tokens tokens behind `past` keys of earlier turns.
struct DeviceEvidence {
  at::Tensor attention;   // [heads, queries, past + n]; undefined where there are queries and keys:
  at::Tensor query, key;  // [heads, queries, dim], [kv heads, past + n, dim]
  double scale = 1;
  std::size_t queries = 0, tokens = 0, past = 0;
};

// Shapes are checked by the core, on views that are never read.
inline constexpr float unread = 0;

inline Result<DeviceEvidence> device_evidence(const at::Tensor& attention, std::size_t past) {
  const Result<Axes> axes = three_axes(attention, "attention", map_shape);
  if (!axes) return {{}, axes.status};
  Probabilities<float> shape = fastv::probabilities(&unread, axes->size[0], axes->size[1], axes->size[2]);
  shape.past = past;
  if (Status status = shape.check(); !status) return {{}, status};
  return {{without_batch(attention), {}, {}, 1, axes->size[1], shape.prompt_tokens(), past}, {}};
}
inline Result<DeviceEvidence> device_evidence(const at::Tensor& query, const at::Tensor& key, double scale,
                                              std::size_t past) {
  const Result<Axes> q = three_axes(query, "query", heads_shape), k = three_axes(key, "key", heads_shape);
  if (!q) return {{}, q.status};
  if (!k) return {{}, k.status};
  if (query.device() != key.device())
    return {
        {},
        fail(Errc::not_supported, "query is on {} but key on {}: bring both to one device",
             c10::toString(query.options().computeDispatchKey()), c10::toString(key.options().computeDispatchKey()))};
  QueryKey<float> shape =
      fastv::query_key(fastv::heads(&unread, HeadMajor{q->size[0], q->size[1], q->size[2]}),
                       fastv::heads(&unread, HeadMajor{k->size[0], k->size[1], k->size[2]}), static_cast<float>(scale));
  shape.past = past;
  if (Status status = shape.check(); !status) return {{}, status};
  return {{{}, without_batch(query), without_batch(key), scale, q->size[1], shape.prompt_tokens(), past}, {}};
}

// The wanted rows of [heads, queries, width], whose rows are the prompt's last.
inline at::Tensor rows_of(const QueryRows& rows, const at::Tensor& tensor) {
  const auto queries = static_cast<std::size_t>(tensor.size(1));
  if (rows.which == ScoreRows::last) return queries == 1 ? tensor : part_of(tensor, 1, queries - 1, 1);
  if (rows.which == ScoreRows::all) return tensor;
  const std::size_t first = rows.tokens - queries;
  return tensor.index_select(1, upload(rows.size(), tensor, [&](std::size_t i) { return rows[i] - first; }));
}

// Attention [heads, rows, past + n] of the wanted rows.
inline at::Tensor attention_of(const DeviceEvidence& evidence, const QueryRows& rows) {
  if (evidence.attention.defined()) return rows_of(rows, evidence.attention);
  const at::Tensor& key = evidence.key;
  const std::int64_t heads = evidence.query.size(0), keys = key.size(1);
  // Not every operation knows half precision on the CPU; on a GPU the sums are floats anyway, which are scaled before they
  // are rounded to logits, as where attention is not fused.
  const at::ScalarType type = key.is_cpu() ? at_least_float(key.scalar_type()) : key.scalar_type();
  // Query head h reads KV head h / (heads / kv heads): a KV head's queries are neighbours.
  const at::Tensor query = in_type(rows_of(rows, evidence.query), type).reshape({key.size(0), -1, key.size(2)});
  // Where beta is 0, CUDA's product reads nothing of what it writes to; the CPU's does.
  const std::int64_t shape[] = {key.size(0), query.size(1), keys};
  const at::Tensor product = query.is_cuda() ? query.new_empty(shape) : query.new_zeros(shape);
  const at::Tensor logits =
      product.baddbmm_(query, in_type(key, type).transpose(1, 2), /*beta=*/0, /*alpha=*/evidence.scale)
          .view({heads, -1, keys});
  if (rows.which != ScoreRows::last) {
    const at::Tensor column = counting(static_cast<std::size_t>(keys), key);
    const at::Tensor row = rows.which == ScoreRows::all
                               ? part_of(column, 0, evidence.past, rows.tokens)
                               : upload(rows.size(), key, [&](std::size_t i) { return evidence.past + rows[i]; });
    logits.masked_fill_(column.gt(row.unsqueeze(1)), -std::numeric_limits<double>::infinity());
  }
  return logits.softmax(-1, at_least_float(type));
}

// ---- scores -------------------------------------------------------------------------------------

inline QueryRows ranking_rows(const Config& config, std::size_t tokens) noexcept {
  return {config.score_rows, config.listed_rows, tokens};
}
inline QueryRows prior_rows(const Config& config, std::size_t tokens) noexcept {
  return {ScoreRows::listed, config.prior_rows, tokens};
}
inline Status expect_rows(const Config& config, const DeviceEvidence& evidence, Span<const TokenSpan> visual) noexcept {
  Status status = ranking_rows(config, evidence.tokens).expect_covered(evidence.queries, visual);
  if (status && !config.prior_rows.empty())
    status = prior_rows(config, evidence.tokens).expect_covered(evidence.queries, visual);
  return status;
}

// Mean over heads and rows of the attention that visual tokens receive: [visual tokens], at least one.
inline at::Tensor visual_mean(const DeviceEvidence& evidence, const QueryRows& rows, Span<const TokenSpan> visual) {
  const TokenSpan& last = visual[visual.size() - 1];
  const std::size_t begin = visual[0].first, end = last.first + last.count;
  const at::Tensor attention = attention_of(evidence, rows);
  const at::Tensor mean = part_of(attention, 2, evidence.past + begin, end - begin)
                              .mean(at::IntArrayRef({0, 1}), false, at_least_float(attention.scalar_type()));
  std::vector<at::Tensor> pieces;
  for_each_piece(visual, end, [&](bool is_visual, std::size_t first, std::size_t count) {
    if (is_visual) pieces.push_back(part_of(mean, 0, first - begin, count));
  });
  return pieces.size() == 1 ? pieces[0] : at::cat(pieces);
}

// By settings, spans and evidence that have been validated.
inline at::Tensor scores_of(const Config& config, const DeviceEvidence& evidence, Span<const TokenSpan> visual) {
  const at::Tensor scores = visual_mean(evidence, ranking_rows(config, evidence.tokens), visual);
  if (config.prior_rows.empty()) return scores;
  const at::Tensor prior = visual_mean(evidence, prior_rows(config, evidence.tokens), visual);
  const at::Tensor p = scores.div(scores.nansum()), q = prior.div(prior.nansum());  // as in correct_by_prior()
  return p.add(1e-6).div_(q.add_(1e-6)).log_().mul_(p);
}

template <class Kernels>
Result<at::Tensor> device_scores(const Config& config, const Result<DeviceEvidence>& evidence,
                                 Span<const TokenSpan> visual) {
  if (!evidence) return {{}, evidence.status};
  if (Status status = validate(config); !status) return {{}, status};
  if (Status status = validate(visual, evidence->tokens); !status) return {{}, status};
  if (Status status = expect_rows(config, *evidence, visual); !status) return {{}, status};
  if (visual_tokens(visual) == 0) {
    const at::Tensor& like = evidence->attention.defined() ? evidence->attention : evidence->key;
    return {like.new_empty({0}, like.options().dtype(at_least_float(like.scalar_type()))), {}};
  }
  if (at::Tensor scores = Kernels::scores(config, *evidence, visual); scores.defined()) return {std::move(scores), {}};
  return {scores_of(config, *evidence, visual), {}};
}

// ---- selection ----------------------------------------------------------------------------------

inline Status expect_device_rule(const Config& config) noexcept {
  if (config.selection == Selection::diverse)
    return fail(Errc::not_supported,
                "selection is diverse, which fastv::device has in CUDA's kernels alone and from query and key: use a "
                "Pruner, with features as evidence");
  if (config.selection != Selection::top_k)
    return fail(Errc::not_supported,
                "selection is {}, which needs no device: use a Pruner with NoEvidence, and kept_tensor()",
                config.selection == Selection::random ? "random" : "uniform");
  if (config.uniform_share != 0)
    return fail(Errc::not_supported, "uniform_share is {} but fastv::device has no even grid: use 0, or a Pruner",
                config.uniform_share);
  if (config.window_rows != 0)
    return fail(Errc::not_supported, "windows are {} x {} but fastv::device has none: use 0 x 0, or a Pruner",
                config.window_rows, config.window_columns);
  return {};
}

// What the tokens of the prompt are ranked by, the highest first: NaN above all for text, -infinity for scores that are
// NaN. [tokens]
inline at::Tensor ranks_of(const at::Tensor& scores, Span<const TokenSpan> visual, std::size_t tokens) {
  const double infinity = std::numeric_limits<double>::infinity();
  const std::size_t all = static_cast<std::size_t>(scores.size(0));
  std::size_t runs = 0, first_of_run = 0;
  for_each_piece(visual, tokens, [&](bool is_visual, std::size_t first, std::size_t) {
    runs += is_visual ? 1u : 0u;
    first_of_run = is_visual ? first : first_of_run;
  });
  const at::Tensor text =
      scores.new_full({extent(runs == 1 ? tokens : tokens - all)}, std::numeric_limits<double>::quiet_NaN());
  if (runs == 1) {
    at::Tensor run = part_of(text, 0, first_of_run, all);
    at::nan_to_num_out(run, scores, -infinity, infinity, -infinity);
    return text;
  }
  const at::Tensor ranked = scores.nan_to_num(-infinity, infinity, -infinity);
  std::vector<at::Tensor> pieces;
  std::size_t next_visual = 0, next_text = 0;
  for_each_piece(visual, tokens, [&](bool is_visual, std::size_t, std::size_t count) {
    std::size_t& next = is_visual ? next_visual : next_text;
    pieces.push_back(part_of(is_visual ? ranked : text, 0, next, count));
    next += count;
  });
  return at::cat(pieces);
}
// Positions by descending rank: the text, then the visual tokens; of equal ones the earlier first.
inline at::Tensor by_rank(const at::Tensor& ranks) {
  return std::get<1>(ranks.sort(/*stable=*/true, /*dim=*/0, /*descending=*/true));
}
// Positions in some order -> the text, then image by image, those of each in that order.
inline at::Tensor by_image(const at::Tensor& order, Span<const TokenSpan> visual, std::size_t tokens) {
  std::vector<std::size_t> image_of(tokens, 0);
  std::size_t number = 0;
  for_each_image(visual, [&](const Image& image) {
    ++number;
    for (std::size_t s = image.first_span; s < image.first_span + image.spans; ++s)
      for (std::size_t t = 0; t < visual[s].count; ++t) image_of[visual[s].first + t] = number;
  });
  const at::Tensor images = upload(tokens, order, [&](std::size_t i) { return image_of[i]; });
  return order.gather(0, std::get<1>(images.gather(0, order).sort(/*stable=*/true, /*dim=*/0, /*descending=*/false)));
}
// Of an order image by image behind `text` others: those, and the first count_of(image) of each image.
template <class CountOf>
at::Tensor first_of_images(const at::Tensor& order, Span<const TokenSpan> visual, std::size_t text, CountOf count_of) {
  std::vector<at::Tensor> parts{part_of(order, 0, 0, text)};
  std::size_t first = text;
  for_each_image(visual, [&](const Image& image) {
    parts.push_back(part_of(order, 0, first, count_of(image)));
    first += image.tokens;
  });
  return at::cat(parts);
}

// Kept indices, by settings, spans and scores that have been validated. A fixed number of operations, however many
// images there are.
inline at::Tensor kept_of(const Config& config, const at::Tensor& scores, Span<const TokenSpan> visual,
                          std::size_t tokens, const Images& images) {
  if (images.keep == images.tokens) return counting(tokens, scores);
  const std::size_t text = tokens - images.tokens;
  const at::Tensor ranks = ranks_of(scores, visual, tokens);
  at::Tensor order = by_rank(ranks);
  if (config.quota == Quota::per_image && images.count > 1) {
    std::vector<Index> quotas(2 * images.count);
    quotas_of(config, visual, images, Span<Index>(quotas.data(), images.count),
              Span<Index>(quotas.data() + images.count, images.count));
    std::size_t number = 0;
    order = first_of_images(by_image(order, visual, tokens), visual, text,
                            [&](const Image&) { return std::size_t{quotas[number++]}; });
  } else {
    if (config.quota == Quota::pooled && minima_hold(config, images)) {
      // Every image's own best go ahead of the pool, as text does.
      const at::Tensor best = first_of_images(by_image(order, visual, tokens), visual, text,
                                              [&](const Image& image) { return minimum_of(config, image); });
      order = by_rank(ranks.scatter_(0, best, std::numeric_limits<double>::quiet_NaN()));
    }
    order = part_of(order, 0, 0, text + images.keep);
  }
  return std::get<0>(order.sort());
}

template <class Kernels>
Result<at::Tensor> device_select(const Config& config, const at::Tensor& scores, Span<const TokenSpan> visual,
                                 std::size_t tokens) {
  if (Status status = validate(config, visual, tokens); !status) return {{}, status};
  const Result<Images> images = count_images(config, visual);
  const bool by_kernels = scores.defined() && Kernels::take(config, scores, false);
  if (Status status = by_kernels ? Status{} : expect_device_rule(config); !status) return {{}, status};
  if (!images) return {{}, images.status};
  if (Status status = expect_dense(scores, "scores"); !status) return {{}, status};
  if (Status status = expect_dims(scores, 1, "scores", "[visual tokens]"); !status) return {{}, status};
  if (Status status = expect_floats(scores, "scores"); !status) return {{}, status};
  if (scores.size(0) != extent(images->tokens))
    return {{},
            fail(Errc::bad_shape, "{} scores were given for {} visual tokens: give one each", scores.size(0),
                 images->tokens)};
  if (images->keep == images->tokens) return {counting(tokens, scores), {}};
  if (by_kernels) {
    if (at::Tensor kept = Kernels::kept(config, scores, visual, tokens); kept.defined()) return {std::move(kept), {}};
    if (Status status = expect_device_rule(config); !status) return {{}, status};
  }
  return {kept_of(config, scores, visual, tokens, *images), {}};
}

template <class Kernels>
Result<at::Tensor> device_prune(const Config& config, const Result<DeviceEvidence>& evidence,
                                Span<const TokenSpan> visual) {
  if (!evidence) return {{}, evidence.status};
  if (Status status = validate(config, visual, evidence->tokens); !status) return {{}, status};
  const at::Tensor& like = evidence->attention.defined() ? evidence->attention : evidence->key;
  const bool by_kernels = Kernels::take(config, like, evidence->key.defined());
  if (Status status = by_kernels ? Status{} : expect_device_rule(config); !status) return {{}, status};
  const Result<Images> images = count_images(config, visual);
  if (!images) return {{}, images.status};
  if (images->tokens == 0) return {counting(evidence->tokens, like), {}};
  if (uses_scores(config))
    if (Status status = expect_rows(config, *evidence, visual); !status) return {{}, status};
  if (images->keep == images->tokens) return {counting(evidence->tokens, like), {}};
  if (by_kernels) {
    if (at::Tensor kept = Kernels::kept(config, *evidence, visual); kept.defined()) return {std::move(kept), {}};
    if (Status status = expect_device_rule(config); !status) return {{}, status};
  }
  return {kept_of(config, scores_of(config, *evidence, visual), visual, evidence->tokens, *images), {}};
}

// In place of kernels, where there are none.
struct NoKernels {
  static constexpr bool take(const Config&, const at::Tensor&, bool) noexcept { return false; }
  static at::Tensor scores(const Config&, const DeviceEvidence&, Span<const TokenSpan>) { return {}; }
  static at::Tensor kept(const Config&, const DeviceEvidence&, Span<const TokenSpan>) { return {}; }
  static at::Tensor kept(const Config&, const at::Tensor&, Span<const TokenSpan>, std::size_t) { return {}; }
};

}  // namespace FASTV_KIND
inline namespace FASTV_TORCH_KIND {

#if defined(FASTV_TORCH_KERNELS)
using DeviceKernels = TorchKernels<TorchStreams>;
#else
using DeviceKernels = NoKernels;
#endif

}  // namespace FASTV_TORCH_KIND
}  // namespace detail

namespace device {
inline namespace FASTV_KIND {
inline namespace FASTV_TORCH_KIND {

// Whether tensors in a GPU's memory are scored and selected by the kernels of cuda.cuh.
#if defined(FASTV_TORCH_KERNELS)
inline constexpr bool has_kernels = true;
#else
inline constexpr bool has_kernels = false;
#endif

// Scores [visual tokens] in Float (Double, where the tensors are that), from attention probabilities [heads, queries,
// past + n] or [1, heads, queries, past + n]. The formula is that of score.hpp.
inline Result<at::Tensor> scores(const Config& config, const at::Tensor& attention, Span<const TokenSpan> visual,
                                 std::size_t past = 0) {
  const c10::NoGradGuard no_grad;
  return detail::device_scores<detail::DeviceKernels>(config, detail::device_evidence(attention, past), visual);
}

// The same from queries [heads, queries, dim] and keys [kv heads, past + n, dim] after RoPE, or [1, ...] of either: one
// product and a softmax of each row to rank by, which for ScoreRows::all is a map [heads, n, n]. By ATen operations on a
// GPU the product is in the keys' own type, to which logits are rounded, without a copy of the keys: of half precision,
// tokens whose scores are closer than that may change places. A model with a soft-cap, a bias or sinks hands over its
// probabilities.
inline Result<at::Tensor> scores(const Config& config, const at::Tensor& query, const at::Tensor& key, double scale,
                                 Span<const TokenSpan> visual, std::size_t past = 0) {
  const c10::NoGradGuard no_grad;
  return detail::device_scores<detail::DeviceKernels>(config, detail::device_evidence(query, key, scale, past), visual);
}

// Kept indices [m] as int64, ascending positions in the whole prompt, on the device of scores [visual tokens]. For
// Selection::top_k without windows or an even share, where there are no kernels; quotas, counts and minima as in
// fastv::select().
inline Result<at::Tensor> select(const Config& config, const at::Tensor& scores, Span<const TokenSpan> visual,
                                 std::size_t tokens) {
  const c10::NoGradGuard no_grad;
  return detail::device_select<detail::DeviceKernels>(config, scores, visual, tokens);
}

// Both: indices for index_select() along the tokens of hidden states and position ids.
inline Result<at::Tensor> prune(const Config& config, const at::Tensor& attention, Span<const TokenSpan> visual,
                                std::size_t past = 0) {
  const c10::NoGradGuard no_grad;
  return detail::device_prune<detail::DeviceKernels>(config, detail::device_evidence(attention, past), visual);
}
// The same by queries and keys.
inline Result<at::Tensor> prune(const Config& config, const at::Tensor& query, const at::Tensor& key, double scale,
                                Span<const TokenSpan> visual, std::size_t past = 0) {
  const c10::NoGradGuard no_grad;
  return detail::device_prune<detail::DeviceKernels>(config, detail::device_evidence(query, key, scale, past), visual);
}

}  // namespace FASTV_TORCH_KIND
}  // namespace FASTV_KIND
}  // namespace device

}  // namespace fastv

#undef FASTV_TORCH_KIND
#undef FASTV_TORCH_KERNELS
#include "detail/end.hpp"

// fastv: scoring and selection as ATen operations on the tensors' own device, for GPUs. LibTorch 1.13 or newer.
//
// The same counts, ties and order as the core, and no value ever comes back to the host: the number of kept tokens
// depends on shapes only, so that every operation can be queued behind the layer that has just run.
//
//   auto kept = fastv::prune_on_device(config, attention, visual);     // int64 [m], ascending, on attention's device
//   hidden = hidden.index_select(1, *kept);                            // [1, n, width] -> [1, m, width]
//
// Of equal scores the earlier token stays. NaN ranks lowest, together with -infinity; what only the values can tell
// (NaN everywhere, infinite scores) is not reported here, since that would have to wait for the device.
#pragma once

#include <limits>
#include <vector>

#include "fastv.hpp"
#include "torch.hpp"

namespace fastv {

namespace detail {

inline std::int64_t extent(std::size_t size) noexcept { return static_cast<std::int64_t>(size); }

// Rules that need more than a sort of scores. Those that look at no score need no device either.
inline Status check_device_rule(const Config& config) noexcept {
  if (Status status = check(config); !status) return status;
  if (config.selection != Selection::top_k) return fail(Errc::device_rule, "Config::selection");
  if (config.uniform_share != 0) return fail(Errc::device_rule, "Config::uniform_share");
  if (config.window_rows != 0) return fail(Errc::device_rule, "Config::window_rows");
  return {};
}

// [heads, rows, width] without the batch of 1, in float (or double, where it is that).
inline at::Tensor without_batch(const at::Tensor& tensor) {
  return tensor.dim() == 4 ? tensor.detach().squeeze(0) : tensor.detach();
}
inline at::Tensor widened(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? tensor : tensor.to(at::kFloat);
}

inline Status check_floats(const at::Tensor& tensor) noexcept {
  const at::ScalarType type = tensor.scalar_type();
  const bool known = type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
  return known ? Status{} : fail(Errc::tensor_type, c10::toString(type));
}

// Whole numbers on `like`'s device. CUDA copies pageable memory before it returns, so the host need not wait there.
inline at::Tensor upload(const RowSet& rows, const at::Tensor& like) {
  const at::Tensor values = like.new_empty({extent(rows.size())}, at::TensorOptions(at::kCPU).dtype(at::kLong));
  auto* out = static_cast<std::int64_t*>(values.data_ptr());
  for (std::size_t i = 0; i < rows.size(); ++i) out[i] = extent(rows[i]);
  return values.to(like.device(), at::kLong, /*non_blocking=*/like.is_cuda());
}

inline bool is_last(const RowSet& rows, std::size_t tokens) noexcept {
  return rows.size() == 1 && rows[0] == tokens - 1;
}

// The rows to rank by, of [heads, rows, width] whose rows are the prompt's last.
inline at::Tensor rows_of(const RowSet& rows, const at::Tensor& tensor, std::size_t tokens) {
  const std::int64_t given = tensor.size(1);
  if (is_last(rows, tokens)) return tensor.narrow(1, given - 1, 1);
  std::size_t own = 0;  // rows that stand at their own position: all of them, for ScoreRows::all
  while (own < rows.size() && rows[own] == own) ++own;
  if (own == tokens && rows.size() == tokens) return tensor;
  return tensor.index_select(1, upload(rows, tensor).sub(extent(tokens) - given));
}

// Mean over heads and rows of attention [heads, rows, keys], visual columns only: [visual tokens].
inline at::Tensor visual_mean(const at::Tensor& attention, Span<const TokenSpan> visual) {
  const at::ScalarType type = attention.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor scores = attention.new_empty({extent(visual_tokens(visual))}, attention.options().dtype(type));
  std::int64_t numbered = 0;
  for (const TokenSpan& span : visual) {
    const std::int64_t count = extent(span.count);
    scores.narrow(0, numbered, count)
        .copy_(widened(attention.narrow(2, extent(span.first), count)).mean(at::IntArrayRef({0, 1})));
    numbered += count;
  }
  return scores;
}

// Scores by the rows that the settings ask for. attention_of(rows): attention [heads, rows, keys] of a set of rows.
template <class AttentionOf>
Result<at::Tensor> scores_by(const Config& config, std::size_t tokens, std::size_t rows, Span<const TokenSpan> visual,
                             AttentionOf attention_of) {
  if (Status status = check(config); !status) return {{}, status};
  if (Status status = check(visual, tokens); !status) return {{}, status};
  const RowSet ranked(config.score_rows, config.listed_rows, tokens);
  if (Status status = ranked.check_covered(rows); !status) return {{}, status};
  const at::Tensor scores = visual_mean(attention_of(ranked), visual);
  if (config.prior_rows.empty()) return {scores, {}};
  const RowSet prior(ScoreRows::listed, config.prior_rows, tokens);  // as prior_corrected() in scorers.hpp
  if (Status status = prior.check_covered(rows); !status) return {{}, status};
  const at::Tensor other = visual_mean(attention_of(prior), visual);
  const at::Tensor p = scores.div(scores.sum()), q = other.div(other.sum());
  return {p.mul(p.add(1e-6).div(q.add(1e-6)).log()), {}};
}

}  // namespace detail

// ---- scoring ------------------------------------------------------------------------------------

// Scores [visual tokens] in float (double, where the tensors are that), from attention probabilities [heads, rows,
// keys] or [1, heads, rows, keys] of the prompt. The formula is that of score.hpp.
inline Result<at::Tensor> device_scores(const Config& config, const at::Tensor& attention,
                                        Span<const TokenSpan> visual) {
  const auto axes = detail::three_axes(attention, "attention");
  if (!axes) return {{}, axes.status};
  if (Status status = detail::check_floats(attention); !status) return {{}, status};
  const std::size_t rows = axes->size[1], tokens = axes->size[2];
  if (Status status = detail::check_shape("attention", axes->size[0], rows, tokens, 0, 0); !status) return {{}, status};
  const at::Tensor map = detail::without_batch(attention);
  return detail::scores_by(config, tokens, rows, visual,
                           [&](const detail::RowSet& set) { return detail::rows_of(set, map, tokens); });
}

// The same from queries [heads, rows, dim] and keys [kv heads, tokens, dim] after RoPE, or [1, ...]: one product and a
// softmax of each row to rank by. ScoreRows::all makes a map [heads, tokens, tokens]. A model with a soft-cap or a bias
// hands over the probabilities of its last row instead.
inline Result<at::Tensor> device_scores(const Config& config, const at::Tensor& query, const at::Tensor& key,
                                        double scale, Span<const TokenSpan> visual) {
  const auto q = detail::three_axes(query, "query"), k = detail::three_axes(key, "key");
  if (!q) return {{}, q.status};
  if (!k) return {{}, k.status};
  if (Status status = detail::check_floats(query); !status) return {{}, status};
  if (Status status = detail::check_floats(key); !status) return {{}, status};
  const std::size_t heads = q->size[0], kv_heads = k->size[0], rows = q->size[1], tokens = k->size[1];
  if (Status status = detail::check_shape("query", heads, rows, tokens, 0, 0); !status) return {{}, status};
  if (kv_heads == 0) return {{}, detail::fail(Errc::no_heads, "key")};
  if (heads % kv_heads != 0)
    return {{}, detail::fail(Errc::heads_not_divisible, "", detail::number(heads), detail::number(kv_heads))};
  if (q->size[2] != k->size[2])
    return {{}, detail::fail(Errc::head_dims_differ, "", detail::number(q->size[2]), detail::number(k->size[2]))};
  if (q->size[2] == 0) return {{}, detail::fail(Errc::no_dim, "key")};
  if (detail::is_nan(scale) || detail::is_infinite(scale) || !(scale > 0))
    return {{}, detail::fail_real(Errc::bad_scale, scale)};

  const at::Tensor queries = detail::without_batch(query), keys = detail::widened(detail::without_batch(key));
  return detail::scores_by(config, tokens, rows, visual, [&](const detail::RowSet& set) {
    using detail::extent;
    const at::Tensor ranked = detail::widened(detail::rows_of(set, queries, tokens));  // [heads, R, dim]
    // Query head h reads KV head h / (heads / kv_heads): a KV head's queries are neighbours.
    const at::Tensor logits = ranked.reshape({extent(kv_heads), -1, extent(q->size[2])})
                                  .matmul(keys.transpose(1, 2))
                                  .mul(scale)
                                  .view({extent(heads), -1, extent(tokens)});
    if (!detail::is_last(set, tokens)) {
      const at::Tensor row = detail::upload(set, logits).unsqueeze(1);  // [R, 1]
      const at::Tensor column = row.new_ones({extent(tokens)}).cumsum(0).sub(1);
      logits.masked_fill_(column.gt(row), -std::numeric_limits<double>::infinity());
    }
    return logits.softmax(-1);
  });
}

// ---- selection ----------------------------------------------------------------------------------

// Kept indices [m] as int64, ascending positions in the whole prompt, on the device of scores [visual tokens]. For
// Selection::top_k without windows or an even share; quotas, counts and minima as in select().
inline Result<at::Tensor> select_on_device(const Config& config, const at::Tensor& scores, Span<const TokenSpan> visual,
                                           std::size_t tokens) {
  using detail::extent;
  using detail::number;
  if (Status status = detail::check_device_rule(config); !status) return {{}, status};
  if (Status status = check(visual, tokens); !status) return {{}, status};
  if (Status status = detail::check_tensor(scores, "scores"); !status) return {{}, status};
  if (scores.dim() != 1) return {{}, detail::fail(Errc::tensor_dims, "scores", scores.dim(), 1)};
  if (Status status = detail::check_floats(scores); !status) return {{}, status};
  const std::size_t total = visual_tokens(visual);
  if (scores.size(0) != extent(total)) return {{}, detail::fail(Errc::scores_size, "", scores.size(0), number(total))};
  const Result<std::size_t> keep = kept_visual(config, visual);
  if (!keep) return {{}, keep.status};

  // The highest of each picture are marked: a sort puts them first.
  const at::Tensor values = scores.detach();
  const at::Tensor ranks = values.masked_fill(values.ne(values), -std::numeric_limits<double>::infinity());  // NaN
  const at::Tensor marks = ranks.new_zeros({extent(total)}, ranks.options().dtype(at::kByte));
  const auto mark = [&](std::size_t first, std::size_t count, std::size_t kept) {
    const at::Tensor order = std::get<1>(ranks.narrow(0, extent(first), extent(count)).sort(/*stable=*/true, 0, true));
    marks.narrow(0, extent(first), extent(count)).scatter_(0, order.narrow(0, 0, extent(kept)), 1);
  };
  if (config.quota == Quota::pooled) {
    mark(0, total, *keep);
  } else {
    std::vector<Index> quotas(visual.size());
    if (Status status = picture_quotas(config, visual, quotas); !status) return {{}, status};
    std::size_t picture = 0, first = 0;
    detail::for_each_picture(visual, [&](const detail::Picture& p) {
      mark(first, p.tokens, quotas[picture++]);
      first += p.tokens;
    });
  }

  // 1 for each token that stays. A stable sort puts their positions first, in order.
  const at::Tensor stays = marks.new_ones({extent(tokens)});
  std::int64_t numbered = 0;
  for (const TokenSpan& span : visual) {
    const std::int64_t count = extent(span.count);
    stays.narrow(0, extent(span.first), count).copy_(marks.narrow(0, numbered, count));
    numbered += count;
  }
  const at::Tensor order = std::get<1>(stays.sort(/*stable=*/true, 0, /*descending=*/true));
  return {order.narrow(0, 0, extent(tokens - total + *keep)), {}};
}

// Both. The kept indices [m] are ready for index_select() along the tokens of hidden states and position ids.
inline Result<at::Tensor> prune_on_device(const Config& config, const at::Tensor& attention,
                                          Span<const TokenSpan> visual) {
  if (Status status = detail::check_device_rule(config); !status) return {{}, status};
  const Result<at::Tensor> scores = device_scores(config, attention, visual);
  if (!scores) return scores;
  return select_on_device(config, *scores, visual, static_cast<std::size_t>(attention.size(-1)));
}
inline Result<at::Tensor> prune_on_device(const Config& config, const at::Tensor& query, const at::Tensor& key,
                                          double scale, Span<const TokenSpan> visual) {
  if (Status status = detail::check_device_rule(config); !status) return {{}, status};
  const Result<at::Tensor> scores = device_scores(config, query, key, scale, visual);
  if (!scores) return scores;
  return select_on_device(config, *scores, visual, static_cast<std::size_t>(key.size(-2)));
}

}  // namespace fastv

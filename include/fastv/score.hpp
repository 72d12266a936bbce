// fastv: evidence -> one score per visual token.
//
// The score of visual token i is the attention it receives, averaged over query heads and over the rows R of
// Config::score_rows (paper section 4.1, Eq. 4; the released code uses R = {last row}):
//
//   s_i = 1 / (H |R|)  sum_{h < H}  sum_{r in R}  softmax_j(logit[h, r, j])_i
//
// The softmax runs over the whole row, text keys included: its denominator differs from head to head and so weights
// the heads. A row before token i cannot see it and adds zero, but is counted in |R|. Where heads are sharded over
// ranks, H is heads_total, and the sum of all ranks' scores is the score.
#pragma once

#include "products.hpp"

namespace fastv {

namespace detail {

// Rows to average over, as prompt positions: last row, all rows or those listed.
class RowSet {
 public:
  RowSet(ScoreRows which, Span<const Index> listed, std::size_t tokens) noexcept
      : which_(which), listed_(listed), tokens_(tokens) {}
  std::size_t size() const noexcept {
    return which_ == ScoreRows::last ? 1 : which_ == ScoreRows::all ? tokens_ : listed_.size();
  }
  std::size_t operator[](std::size_t i) const noexcept {
    return which_ == ScoreRows::last ? tokens_ - 1 : which_ == ScoreRows::all ? i : listed_[i];
  }
  // Every row must be a prompt position and among the last `rows` rows, which the evidence covers.
  Status check_covered(std::size_t rows) const noexcept {
    const std::size_t first = tokens_ - rows;
    if (which_ == ScoreRows::all && rows < tokens_) return fail(Errc::row_not_in_evidence, "", 0, number(first));
    if (which_ != ScoreRows::listed) return {};
    if (listed_.empty()) return fail(Errc::listed_rows_empty);
    if (listed_.data() == nullptr) return fail(Errc::null_data, "listed_rows");
    for (std::size_t i = 0; i < size(); ++i) {
      if (listed_[i] >= tokens_)
        return fail(Errc::listed_row_past_end, "", number(listed_[i]), number(tokens_), number(i));
      if (listed_[i] < first) return fail(Errc::row_not_in_evidence, "", number(listed_[i]), number(first));
    }
    return {};
  }

 private:
  ScoreRows which_;
  Span<const Index> listed_;
  std::size_t tokens_;
};

inline Status check_shape(const char* what, std::size_t heads, std::size_t rows, std::size_t keys, std::size_t past,
                          std::size_t heads_total) noexcept {
  if (heads == 0) return fail(Errc::no_heads, what);
  if (heads > max_tokens) return fail(Errc::beyond_memory, "number of heads", number(heads), number(keys));
  if (rows == 0) return fail(Errc::no_rows, what);
  if (keys > max_tokens) return fail(Errc::too_many_tokens, "", number(keys), number(max_tokens));
  if (past >= keys) return fail(Errc::no_tokens);
  if (rows > keys - past) return fail(Errc::rows_above_keys, what, number(rows), number(keys - past));
  if (heads_total != 0 && heads_total < heads)
    return fail(Errc::heads_above_total, what, number(heads), number(heads_total));
  return {};
}

inline Status check_norms(Span<const float> norms, std::size_t kv_heads, std::size_t visual) noexcept {
  if (norms.empty()) return {};
  if (norms.data() == nullptr) return fail(Errc::null_data, "value_norms");
  if (kv_heads == 0 || norms.size() != kv_heads * visual)
    return fail(Errc::norms_size, "", number(norms.size()), number(kv_heads * visual));
  return {};
}

}  // namespace detail

// The parallel_for of every function that takes one: calls body(i) for each i in [0, count), in any order, on any
// threads, and returns when all are done. This one uses the calling thread; examples/parallel shows OpenMP and a
// pool. Results do not depend on it, bit for bit.
struct Serial {
  // Calls body(0) ... body(count - 1).
  template <class Body>
  void operator()(std::size_t count, const Body& body) const {
    for (std::size_t i = 0; i < count; ++i) body(i);
  }
};

namespace detail {

// Splits [0, count) into pieces that the caller's threads may take: calls body(begin, end) for each.
inline constexpr std::size_t keys_per_piece = 2048;
inline std::size_t pieces(std::size_t count) noexcept { return (count + keys_per_piece - 1) / keys_per_piece; }
template <class ParallelFor, class Body>
void in_pieces(std::size_t count, const ParallelFor& parallel_for, const Body& body) noexcept {
  parallel_for(pieces(count), [&](std::size_t piece) {
    const std::size_t begin = piece * keys_per_piece;
    body(begin, count - begin < keys_per_piece ? count : begin + keys_per_piece);
  });
}

}  // namespace detail

// ---- prompt length of each kind of evidence -----------------------------------------------------

// Tokens of the prompt at hand, earlier turns left out. O(1).
template <class T>
std::size_t prompt_tokens(const Probabilities<T>& evidence) noexcept {
  return evidence.keys > evidence.past ? evidence.keys - evidence.past : 0;
}
template <class Q, class K>
std::size_t prompt_tokens(const QueryKey<Q, K>& evidence) noexcept {
  return evidence.keys > evidence.past ? evidence.keys - evidence.past : 0;
}
template <class K>
std::size_t prompt_tokens(const KeysOnly<K>& evidence) noexcept {
  return evidence.keys.tokens > evidence.past ? evidence.keys.tokens - evidence.past : 0;
}
template <class T>
std::size_t prompt_tokens(const Scores<T>& evidence) noexcept {
  return evidence.tokens;
}
inline std::size_t prompt_tokens(const NoEvidence& evidence) noexcept { return evidence.tokens; }

// ---- whether it has query rows, which Config::prior_rows asks for --------------------------------

// Whether the evidence can be scored by chosen rows, as a prior needs it.
template <class Evidence>
bool has_rows(const Evidence&) noexcept {
  return true;
}
// Keys have no rows.
template <class K>
bool has_rows(const KeysOnly<K>&) noexcept {
  return false;
}
// Ready scores have no rows any more.
template <class T>
bool has_rows(const Scores<T>&) noexcept {
  return false;
}

// ---- floats of scratch that score() needs -------------------------------------------------------

// Floats of scratch memory that score() needs for this evidence; 0 for all but queries and keys. O(1).
template <class Q, class K>
std::size_t score_scratch(const QueryKey<Q, K>& evidence) noexcept {
  // logits, query, one over each head's sum; a widened key for each piece
  return evidence.heads * (evidence.keys + 1) + detail::query_floats(evidence) +
         detail::pieces(evidence.keys) * evidence.dim;
}
template <class Evidence>
std::size_t score_scratch(const Evidence&) noexcept {
  return 0;
}

// ---- checks -------------------------------------------------------------------------------------

// Extents, strides and pointers that score() would not survive. Every score() checks by itself. O(1).
template <class T>
Status check(const Probabilities<T>& evidence) noexcept {
  using detail::fail;
  if (Status status = detail::check_shape("probabilities", evidence.heads, evidence.rows, evidence.keys, evidence.past,
                                          evidence.heads_total);
      !status)
    return status;
  if (evidence.data == nullptr) return fail(Errc::null_data, "probabilities");
  return detail::check_strides({{"key stride of probabilities", evidence.key_stride, evidence.keys},
                                {"row stride of probabilities", evidence.row_stride, evidence.rows},
                                {"head stride of probabilities", evidence.head_stride, evidence.heads}},
                               1);
}

// what: "key" or "value", for the messages.
template <class T>
Status check(const HeadVectors<T>& vectors, const char* what, const char* head_stride,
             const char* token_stride) noexcept {
  using detail::fail;
  using detail::number;
  if (vectors.heads == 0) return fail(Errc::no_heads, what);
  if (vectors.dim == 0) return fail(Errc::no_dim, what);
  if (vectors.data == nullptr) return fail(Errc::null_data, what);
  if (vectors.tokens > max_tokens) return fail(Errc::too_many_tokens, "", number(vectors.tokens), number(max_tokens));
  const Pages& pages = vectors.pages;
  if (pages.chunk != 0 && vectors.dim % pages.chunk != 0)
    return fail(Errc::chunk_not_divisor, what, number(pages.chunk), number(vectors.dim));
  const std::size_t entry = pages.chunk == 0 ? vectors.dim : pages.chunk;
  const bool paged = !pages.block_table.empty();
  if (paged) {
    if (pages.block_tokens == 0) return fail(Errc::no_block_tokens, what);
    const std::size_t needed = detail::blocks_for(vectors.tokens, pages.block_tokens);
    if (pages.block_table.size() < needed)
      return fail(Errc::block_table_short, "", number(pages.block_table.size()), number(needed));
    if (pages.block_table.data() == nullptr) return fail(Errc::null_data, "the block table");
  }
  return detail::check_strides({{token_stride, vectors.token_stride, paged ? pages.block_tokens : vectors.tokens},
                                {head_stride, vectors.head_stride, vectors.heads},
                                {"chunk stride", pages.chunk_stride, vectors.dim / entry},
                                {"block stride", pages.block_stride, paged ? pages.block_table.size() : 1}},
                               entry);
}

// As check(Probabilities), and scale, soft-cap and bias.
template <class Q, class K>
Status check(const QueryKey<Q, K>& evidence) noexcept {
  using detail::fail;
  using detail::number;
  if (Status status = detail::check_shape("query", evidence.heads, evidence.rows, evidence.keys, evidence.past,
                                          evidence.heads_total);
      !status)
    return status;
  if (evidence.query == nullptr) return fail(Errc::null_data, "query");
  if (evidence.kv_heads != 0 && evidence.heads % evidence.kv_heads != 0)
    return fail(Errc::heads_not_divisible, "", number(evidence.heads), number(evidence.kv_heads));
  if (Status status = check(keys_of(evidence), "key", "head stride of key", "token stride of key"); !status)
    return status;
  if (detail::is_nan(evidence.scale) || detail::is_infinite(evidence.scale) || !(evidence.scale > 0))
    return detail::fail_real(Errc::bad_scale, static_cast<double>(evidence.scale));
  if (detail::is_nan(evidence.soft_cap) || detail::is_infinite(evidence.soft_cap) || !(evidence.soft_cap >= 0))
    return detail::fail_real(Errc::bad_soft_cap, static_cast<double>(evidence.soft_cap));
  if (!evidence.bias.empty() && evidence.bias.size() != evidence.keys)
    return fail(Errc::bias_size, "", number(evidence.bias.size()), number(evidence.keys));
  if (!evidence.bias.empty() && evidence.bias.data() == nullptr) return fail(Errc::null_data, "bias");
  return detail::check_strides({{"head stride of query", evidence.query_head_stride, evidence.heads},
                                {"row stride of query", evidence.query_row_stride, evidence.rows}},
                               evidence.dim);
}

// The keys' own check.
template <class K>
Status check(const KeysOnly<K>& evidence) noexcept {
  return check(evidence.keys, "key", "head stride of key", "token stride of key");
}

// Nothing to be wrong.
inline Status check(const NoEvidence&) noexcept { return {}; }

// A pointer where there are scores; score() compares their number with the spans'.
template <class T>
Status check(const Scores<T>& evidence) noexcept {
  if (!evidence.values.empty() && evidence.values.data() == nullptr) return detail::fail(Errc::null_data, "scores");
  return {};
}

// ---- scoring ------------------------------------------------------------------------------------
// score(config, evidence, visual, scores, scratch, parallel_for) writes one score per visual token, spans in order.
// visual: sorted, disjoint, inside the prompt. scores: one entry per visual token.
// scratch: score_scratch(evidence) floats. Re-entrant; no allocation.

namespace detail {

// Walks visual tokens begin .. end - 1, numbered across the spans: calls run(number, position, count) for each
// stretch of neighbours.
template <class Run>
void for_each_stretch(Span<const TokenSpan> visual, std::size_t begin, std::size_t end, Run run) noexcept {
  std::size_t numbered = 0;
  for (const TokenSpan& span : visual) {
    const std::size_t from = begin > numbered ? begin : numbered;
    const std::size_t to = end < numbered + span.count ? end : numbered + span.count;
    if (from < to) run(from, span.first + (from - numbered), to - from);
    numbered += span.count;
  }
}

// Soft-cap and bias of one head's logits [0, seen).
template <class Q, class K>
void cap_and_bias(const QueryKey<Q, K>& evidence, std::size_t seen, float* logits) noexcept {
  if (evidence.soft_cap > 0) {
    const float inverse = 1.0f / evidence.soft_cap;
    for (std::size_t key = 0; key < seen; ++key)
      if (!is_nan(logits[key])) logits[key] = evidence.soft_cap * tanh_of(logits[key] * inverse);
  }
  if (!evidence.bias.empty())
    for (std::size_t key = 0; key < seen; ++key) logits[key] += evidence.bias[key];
}

// What every score() does first.
template <class Score>
Status begin_score(Span<Score> scores, std::size_t count) noexcept {
  if (Status status = check_room(scores, count, "scores"); !status) return status;
  for (std::size_t i = 0; i < count; ++i) scores[i] = 0;
  return {};
}

inline std::size_t of_all(std::size_t heads, std::size_t heads_total) noexcept {
  return heads_total == 0 ? heads : heads_total;
}

}  // namespace detail

// O(heads * rows scored * visual tokens). Sums in Score.
template <class Score, class T, class ParallelFor = Serial>
Status score(const detail::RowSet& rows, const Probabilities<T>& evidence, Span<const TokenSpan> visual,
             Span<Score> scores, Span<float>, const ParallelFor& parallel_for = {}) noexcept {
  if (Status status = check(evidence); !status) return status;
  if (Status status = detail::check_spans(visual, prompt_tokens(evidence)); !status) return status;
  const std::size_t count = visual_tokens(visual), norms = evidence.value_norms.size();
  const std::size_t kv_heads = count == 0 ? 0 : norms / count;
  if (Status status = detail::check_norms(evidence.value_norms, kv_heads, count); !status) return status;
  if (kv_heads != 0 && evidence.heads % kv_heads != 0)
    return detail::fail(Errc::heads_not_divisible, "", detail::number(evidence.heads), detail::number(kv_heads));
  if (Status status = rows.check_covered(evidence.rows); !status) return status;
  if (Status status = detail::begin_score(scores, count); !status) return status;

  const std::size_t first_row = prompt_tokens(evidence) - evidence.rows;
  const Score share = Score(1) / static_cast<Score>(detail::of_all(evidence.heads, evidence.heads_total) * rows.size());
  detail::in_pieces(count, parallel_for, [&](std::size_t begin, std::size_t end) {
    detail::for_each_stretch(visual, begin, end, [&](std::size_t number, std::size_t position, std::size_t n) {
      Score* out = scores.data() + number;
      for (std::size_t head = 0; head < evidence.heads; ++head) {
        const float* norm =
            kv_heads == 0 ? nullptr : evidence.value_norms.data() + head / (evidence.heads / kv_heads) * count + number;
        for (std::size_t r = 0; r < rows.size(); ++r) {
          const T* p = evidence.data + static_cast<std::ptrdiff_t>(head) * evidence.head_stride +
                       static_cast<std::ptrdiff_t>(rows[r] - first_row) * evidence.row_stride +
                       static_cast<std::ptrdiff_t>(evidence.past + position) * evidence.key_stride;
          if (norm == nullptr && evidence.key_stride == 1) {
            detail::add_to(out, p, n);
            continue;
          }
          for (std::size_t i = 0; i < n; ++i) {
            const auto value = static_cast<Score>(to_float(p[static_cast<std::ptrdiff_t>(i) * evidence.key_stride]));
            out[i] += norm == nullptr ? value : value * static_cast<Score>(norm[i]);
          }
        }
      }
      for (std::size_t i = 0; i < n; ++i) out[i] *= share;
    });
  });
  return {};
}

// O(heads * keys * dim) for each row scored: the keys are read once per row. Logits and softmax in float. A row in
// which a logit is NaN or +infinity makes all its probabilities NaN, as a softmax does. So does a row that sees no key
// (every bias -infinity) if it is the only one; one of several, such as a row of padding, adds zero.
template <class Score, class Q, class K, class ParallelFor = Serial>
Status score(const detail::RowSet& rows, const QueryKey<Q, K>& evidence, Span<const TokenSpan> visual,
             Span<Score> scores, Span<float> scratch, const ParallelFor& parallel_for = {}) noexcept {
  if (Status status = check(evidence); !status) return status;
  if (Status status = detail::check_spans(visual, prompt_tokens(evidence)); !status) return status;
  const std::size_t count = visual_tokens(visual);
  if (Status status = detail::check_norms(evidence.value_norms, evidence.kv_heads, count); !status) return status;
  if (Status status = detail::check_room(scratch, score_scratch(evidence), "scratch"); !status) return status;
  if (Status status = rows.check_covered(evidence.rows); !status) return status;
  if (Status status = detail::begin_score(scores, count); !status) return status;

  float* logits = scratch.data();                           // [heads, keys]
  float* query = logits + evidence.heads * evidence.keys;   // from load_query()
  float* inverse = query + detail::query_floats(evidence);  // [heads]
  float* wide = inverse + evidence.heads;                   // [pieces, dim]
  const std::size_t group = evidence.heads / evidence.kv_heads, first_row = prompt_tokens(evidence) - evidence.rows;
  const Score share = Score(1) / static_cast<Score>(detail::of_all(evidence.heads, evidence.heads_total) * rows.size());

  for (std::size_t r = 0; r < rows.size(); ++r) {
    const std::size_t seen = evidence.causal ? evidence.past + rows[r] + 1 : evidence.keys;
    detail::load_query(evidence, rows[r] - first_row, query);
    detail::in_pieces(seen, parallel_for, [&](std::size_t begin, std::size_t end) {
      detail::product_with_keys(evidence, begin, end, logits, query,
                                wide + begin / detail::keys_per_piece * evidence.dim);
    });
    parallel_for(evidence.heads, [&](std::size_t head) {
      float* row = logits + head * evidence.keys;
      detail::cap_and_bias(evidence, seen, row);
      const float most = detail::greatest(row, seen);
      if (detail::is_infinite(most)) {  // it sees no key
        for (std::size_t key = 0; key < seen; ++key) row[key] = 0;
        inverse[head] = rows.size() == 1 ? detail::nan_value<float>() : 0;
      } else {
        inverse[head] = detail::is_nan(most) ? most : 1.0f / detail::exponentials(row, seen, most);
      }
    });
    detail::in_pieces(count, parallel_for, [&](std::size_t begin, std::size_t end) {
      detail::for_each_stretch(visual, begin, end, [&](std::size_t visual_number, std::size_t position, std::size_t n) {
        const std::size_t key = evidence.past + position;
        const std::size_t visible = key >= seen ? 0 : (n < seen - key ? n : seen - key);
        Score* out = scores.data() + visual_number;
        for (std::size_t head = 0; head < evidence.heads; ++head) {
          const float* row = logits + head * evidence.keys + key;
          const Score weight = static_cast<Score>(inverse[head]) * share;
          if (evidence.value_norms.empty()) {
            detail::add_to(out, row, visible, weight);
          } else {
            const float* norm = evidence.value_norms.data() + head / group * count + visual_number;
            for (std::size_t i = 0; i < visible; ++i)
              out[i] += weight * static_cast<Score>(row[i]) * static_cast<Score>(norm[i]);
          }
        }
      });
    });
  }
  return {};
}

// Copies the engine's own scores. O(visual tokens).
template <class Score, class T, class ParallelFor = Serial>
Status score(const detail::RowSet&, const Scores<T>& evidence, Span<const TokenSpan> visual, Span<Score> scores,
             Span<float> = {}, const ParallelFor& = {}) noexcept {
  using detail::number;
  if (Status status = check(evidence); !status) return status;
  if (Status status = detail::check_spans(visual, prompt_tokens(evidence)); !status) return status;
  const std::size_t count = visual_tokens(visual);
  if (evidence.values.size() != count)
    return detail::fail(Errc::scores_size, "", number(evidence.values.size()), number(count));
  if (Status status = detail::begin_score(scores, count); !status) return status;
  for (std::size_t i = 0; i < count; ++i) scores[i] = static_cast<Score>(to_float(evidence.values[i]));
  return {};
}

// Minus the mean over KV heads of the key's length: a rule that asks no query, for engines that must prune before the
// question has arrived. Keys that attract attention are short (Devoto et al., "A Simple and Effective L2 Norm-Based
// Strategy for KV Cache Compression", EMNLP 2024). O(kv heads * visual tokens * dim).
template <class Score, class K, class ParallelFor = Serial>
Status score(const detail::RowSet&, const KeysOnly<K>& evidence, Span<const TokenSpan> visual, Span<Score> scores,
             Span<float> = {}, const ParallelFor& parallel_for = {}) noexcept {
  const HeadVectors<K>& keys = evidence.keys;
  if (Status status = check(evidence); !status) return status;
  if (Status status = detail::check_spans(visual, prompt_tokens(evidence)); !status) return status;
  const std::size_t count = visual_tokens(visual);
  if (Status status = detail::begin_score(scores, count); !status) return status;
  const Score share = Score(1) / static_cast<Score>(keys.heads);
  detail::in_pieces(count, parallel_for, [&](std::size_t begin, std::size_t end) {
    detail::for_each_stretch(visual, begin, end, [&](std::size_t number, std::size_t position, std::size_t n) {
      const std::size_t first = evidence.past + position;
      detail::for_each_vector(keys, first, first + n, [&](std::size_t, std::size_t key, const K* k) {
        scores[number + (key - first)] -= share * static_cast<Score>(detail::length(keys, k));
      });
    });
  });
  return {};
}

// The rows that the settings ask for.
template <class Score, class Evidence, class ParallelFor = Serial>
Status score(const Config& config, const Evidence& evidence, Span<const TokenSpan> visual, Span<Score> scores,
             Span<float> scratch = {}, const ParallelFor& parallel_for = {}) noexcept {
  return score<Score>(detail::RowSet(config.score_rows, config.listed_rows, prompt_tokens(evidence)), evidence, visual,
                      scores, scratch, parallel_for);
}

}  // namespace fastv

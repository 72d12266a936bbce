// fastv: evidence, what the visual tokens are scored by.
//
// Evidence is any type with these members; the first two are required. The kinds below are written to the same contract.
//
//   std::size_t prompt_tokens() const        n, the length of the prompt at hand
//   Status score(scoring, scores, parallel_for) const
//                                            writes one score per visual token, in the order of for_each_visual()
//   Status check() const                     what is wrong with the shapes, before anything is read or allocated
//   std::size_t scratch_floats() const       floats of scratch memory that score() wants; none without it
//
// score() is called as score(const Scoring&, Span<Score>, const ParallelFor&) with Score float or double, on settings and
// spans that have been validated. It either averages over scoring.queries or, where it has no query rows, returns
// scoring.queries.expect_default(). Evidence that has no query rows may instead be written as
// score(Span<const TokenSpan> visual, Span<Score> scores): settings that ask for rows are then refused for it.
#pragma once

#include "plan.hpp"

#include "detail/begin.hpp"

namespace fastv {

// The parallel_for of every function that takes one: calls body(i) for each i in [0, count), in any order, on any
// threads, and returns when all are done. This one uses the calling thread; examples/serving shows OpenMP and a pool.
// Results do not depend on it, bit for bit.
struct Serial {
  // Calls body(0) ... body(count - 1).
  template <class Body>
  FASTV_INLINE void operator()(std::size_t count, const Body& body) const {
    for (std::size_t i = 0; i < count; ++i) body(i);
  }
};

// The query rows to average over, as prompt positions: the last, all, or those listed.
struct QueryRows {
  ScoreRows which = ScoreRows::last;  // last, all or listed
  Span<const Index> listed = {};      // for ScoreRows::listed
  std::size_t tokens = 0;             // n

  // Number of rows.
  FASTV_INLINE std::size_t size() const noexcept {
    return which == ScoreRows::last ? 1 : which == ScoreRows::all ? tokens : listed.size();
  }
  // Prompt position of row i.
  FASTV_INLINE std::size_t operator[](std::size_t i) const noexcept {
    return which == ScoreRows::last ? tokens - 1 : which == ScoreRows::all ? i : listed[i];
  }
  // Every row must be a prompt position among the last `queries` ones, which the evidence covers; and the last row must
  // be text where it alone ranks, since it asks the question.
  FASTV_INLINE Status expect_covered(std::size_t queries, Span<const TokenSpan> visual) const noexcept;
  // For evidence without query rows: refuses settings that choose some.
  FASTV_INLINE Status expect_default() const noexcept;
};

// What evidence is asked for.
struct Scoring {
  Span<const TokenSpan> visual;  // sorted, disjoint, inside the prompt
  QueryRows queries;             // the rows whose attention counts
  Span<float> scratch = {};      // scratch_floats() of them
};

// ---- kinds of evidence --------------------------------------------------------------------------

// Attention probabilities of layer K-1, after the softmax, [heads, queries, keys]. probabilities() makes it.
//
// Query row r belongs to prompt position n - queries + r: an engine that only has the last prompt token's row hands over
// one. Key j is token first_key + j of the sequence, of which the first `past` belong to earlier turns: attended to, but
// not candidates. So n = first_key + keys - past. Entries a row cannot see must be zero, as a causal softmax leaves
// them.
template <class T>
struct Probabilities {
  const T* data;                       // [heads, queries, keys]
  std::size_t heads, queries, keys;    // extents
  std::ptrdiff_t head_stride;          // elements from head to head
  std::ptrdiff_t query_stride;         // elements from query row to query row
  std::ptrdiff_t key_stride = 1;       // elements from key to key
  std::size_t past = 0;                // keys of earlier turns
  std::size_t first_key = 0;           // tokens before the first key at hand: a sliding window has let go of them
  std::size_t heads_total = 0;         // of all ranks, where heads are sharded: score() returns partial sums
  Span<const float> value_norms = {};  // see value_norms() in remedies.hpp; empty: unweighted

  FASTV_INLINE std::size_t prompt_tokens() const noexcept {  // n
    return first_key + keys > past ? first_key + keys - past : 0;
  }
  FASTV_INLINE Status check() const noexcept;  // pointer, extents and strides
  // The mean over heads and rows. O(heads * rows scored * visual tokens).
  template <class Score, class ParallelFor>
  FASTV_INLINE Status score(const Scoring& scoring, Span<Score> scores, const ParallelFor& parallel_for) const noexcept;
};

// Contiguous probabilities [heads, queries, keys]. head_stride: elements from head to head; 0: queries * keys.
template <class T>
FASTV_INLINE Probabilities<T> probabilities(const T* data, std::size_t heads, std::size_t queries, std::size_t keys,
                                            std::ptrdiff_t head_stride = 0) noexcept {
  static_assert(detail::has_to_float<T>,
                "this element type has no to_float(): where fp16 or bf16 is kept as uint16_t or another 16-bit type, "
                "say which, as in fastv::probabilities(fastv::as_half(data), ...) or fastv::as_bfloat16(data)");
  return {data,
          heads,
          queries,
          keys,
          head_stride != 0 ? head_stride : detail::as_stride(queries * keys),
          detail::as_stride(keys)};
}
template <class = void>
Probabilities<float> probabilities(detail::Unknown, detail::Anything = 0, detail::Anything = 0, detail::Anything = 0,
                                   detail::Anything = 0) noexcept;

namespace detail {
template <class Load, class = void>
inline constexpr bool loads_keys = false;
template <class Load>
inline constexpr bool loads_keys<Load, decltype(static_cast<void>(made<const Load&>()(
                                           std::size_t{0}, std::size_t{0}, static_cast<float*>(nullptr))))> = true;
template <class Keys>
inline constexpr bool is_keys = is_heads<Keys>;
}  // namespace detail

// Keys (or values) that only the engine can read: quantised, cyclic, scattered. load(kv_head, token, out) writes the dim
// floats of one vector; it is called from parallel_for's threads. Scoring takes 8 keys at a time from it.
template <class Load>
struct LoadedKeys {
  std::size_t heads, tokens, dim;  // KV heads, keys at hand, elements of a vector
  Load load;                       // void(std::size_t kv_head, std::size_t token, float* out), noexcept
};
namespace detail {
template <class Load>
inline constexpr bool is_keys<LoadedKeys<Load>> = true;
}  // namespace detail
// The same from a lambda: loaded_keys(8, n, 128, [&](std::size_t kv_head, std::size_t token, float* out) { ... }).
template <class Load>
FASTV_INLINE LoadedKeys<Load> loaded_keys(std::size_t heads, std::size_t tokens, std::size_t dim, Load load) noexcept {
  static_assert(detail::loads_keys<Load>,
                "loaded_keys() takes a function that writes one vector: void(std::size_t kv_head, std::size_t token, "
                "float* out), callable where it is const");
  return {heads, tokens, dim, load};
}

// Queries and keys of layer K-1, after RoPE, for engines with fused attention. query_key() makes it. Scoring costs one
// product of each query row with the keys and a softmax, never an n x n map.
//
//   query  [heads, queries, dim]   query row r belongs to prompt position n - queries + r
//   key    [kv heads, keys, dim]   query head h reads KV head h / (heads / kv heads) (GQA, MQA); key j is token
//                                  first_key + j of the sequence, of which the first `past` are earlier turns'
//
// The logit of a key, and its probability in the row:
//
//   logit  = scale * q.k * key_scale
//   logit  = soft_cap * tanh(logit / soft_cap), if soft_cap > 0 (Gemma 2)
//   logit -= alibi[head] * (position of the query - position of the key), if there are slopes
//   logit += bias[key], if there is a bias row; -infinity hides a key, whatever else it holds
//   p      = exp(logit) / (sum of exp(logit) over the keys the row sees + exp(sinks[head]), if there are sinks)
//
// Positions are those of tokens that follow each other. Where the keys at hand lack tokens that an earlier stage or turn
// dropped, a window is a bias row by the real positions (Slots::position_of()), and ALiBi needs Probabilities.
//
// Keys: Heads<T>, paged or not, or LoadedKeys.
template <class Q, class Keys = Heads<Q>>
struct QueryKey {
  Heads<Q> query;                      // [heads, queries, dim]
  Keys key;                            // [kv heads, keys, dim]
  float scale;                         // 1 / sqrt(dim) in most models
  float soft_cap = 0;                  // 0: none
  Span<const float> bias = {};         // [keys] or empty
  Span<const float> sinks = {};        // [heads] or empty: logits that belong to no token (gpt-oss)
  Span<const float> alibi = {};        // [heads] or empty: slopes
  Heads<float> key_scales = {};        // [kv heads, keys, 1] or none (data null): scale of each key of an int8 cache
  bool causal = true;                  // a row sees the keys up to its own position; false: all keys
  Span<const Index> visible = {};      // [queries] or empty: tokens of the sequence that each row sees, in place of
                                       // causal; see visible_tokens() for bidirectional images and prefix-LM
  std::size_t window = 0;              // sliding window: a row sees this many tokens up to its own; 0: all
  std::size_t past = 0;                // keys of earlier turns
  std::size_t first_key = 0;           // tokens before the first key at hand: a sliding window has let go of them
  std::size_t heads_total = 0;         // of all ranks, where heads are sharded: score() returns partial sums
  Span<const float> value_norms = {};  // see value_norms() in remedies.hpp; empty: unweighted

  FASTV_INLINE std::size_t prompt_tokens() const noexcept {  // n
    return first_key + key.tokens > past ? first_key + key.tokens - past : 0;
  }
  FASTV_INLINE Status check() const noexcept;                // pointers, extents, strides, scale, soft-cap
  FASTV_INLINE std::size_t scratch_floats() const noexcept;  // heads * keys and a little
  // Logits and softmax in float. A row in which a logit is NaN or +infinity makes all its probabilities NaN, as a softmax
  // does. A row that sees no key adds zero. O(heads * keys * dim) for each row scored: the keys are read once a row.
  template <class Score, class ParallelFor>
  FASTV_INLINE Status score(const Scoring& scoring, Span<Score> scores, const ParallelFor& parallel_for) const noexcept;
};

// query_key(heads(q, TokenMajor{1, 32, 128}), heads(k, TokenMajor{n, 8, 128}), 1 / std::sqrt(128.0f))
template <class Q, class K>
FASTV_INLINE QueryKey<Q, Heads<K>> query_key(const Heads<Q>& query, const Heads<K>& key, float scale) noexcept {
  return {query, key, scale};
}
template <class Q, class Load>
FASTV_INLINE QueryKey<Q, LoadedKeys<Load>> query_key(const Heads<Q>& query, const LoadedKeys<Load>& key,
                                                     float scale) noexcept {
  return {query, key, scale};
}
template <class = void>
QueryKey<float> query_key(detail::Unknown, detail::Anything = 0, detail::Anything = 0, detail::Anything = 0,
                          detail::Anything = 0, detail::Anything = 0, detail::Anything = 0, detail::Anything = 0,
                          detail::Anything = 0, detail::Anything = 0) noexcept;

// The keys alone: engines that must prune before the question has arrived. The score is minus the mean over KV heads of
// the key's length; keys that attract attention are short (Devoto et al., "A Simple and Effective L2 Norm-Based Strategy
// for KV Cache Compression", EMNLP 2024).
template <class Keys>
struct KeysOnly {
  static constexpr bool holds_keys = detail::is_keys<Keys>;  // true of a view of keys, which all members below need
  Keys keys;                                                 // of layer K-1, [kv heads, keys, dim]
  std::size_t past = 0;                                      // keys of earlier turns

  FASTV_INLINE std::size_t prompt_tokens() const noexcept {  // n
    return keys.tokens > past ? keys.tokens - past : 0;
  }
  FASTV_INLINE Status check() const noexcept;                // pointer, extents and strides
  FASTV_INLINE std::size_t scratch_floats() const noexcept;  // one vector for each piece of work
  // O(kv heads * visual tokens * dim).
  template <class Score, class ParallelFor>
  FASTV_INLINE Status score(const Scoring& scoring, Span<Score> scores, const ParallelFor& parallel_for) const noexcept;
};
template <class Keys>
KeysOnly(Keys, std::size_t) -> KeysOnly<Keys>;
template <class Keys>
KeysOnly(Keys) -> KeysOnly<Keys>;

// Scores the engine computed itself: one per visual token, spans in order. A Pruner<float> rounds doubles, so that close
// ones may tie.
template <class T>
struct Scores {
  Span<const T> values;  // [visual tokens]
  std::size_t tokens;    // n

  FASTV_INLINE std::size_t prompt_tokens() const noexcept { return tokens; }  // n
  FASTV_INLINE Status check() const noexcept;                                 // a pointer where there are scores
  // Copies them. O(visual tokens).
  template <class Score, class ParallelFor>
  FASTV_INLINE Status score(const Scoring& scoring, Span<Score> scores, const ParallelFor& parallel_for) const noexcept;
};

// For the selection rules that look at no score (random, uniform).
struct NoEvidence {
  std::size_t tokens;  // n

  FASTV_INLINE std::size_t prompt_tokens() const noexcept { return tokens; }  // n
  // Fails: a rule that ranks needs scores.
  template <class Score>
  FASTV_INLINE Status score(Span<const TokenSpan> visual, Span<Score> scores) const noexcept;
};

// ---- which keys a row sees ----------------------------------------------------------------------

inline namespace FASTV_KIND {

// QueryKey::visible of a model that reads its images in both directions (Gemma 3, PaliGemma): the last `visible.size()`
// prompt rows see all tokens up to themselves, those inside an image up to its end. prefix: every row sees the first
// `prefix` tokens of the prompt at least (prefix-LM); past: keys of earlier turns. O(rows + spans).
inline Status visible_tokens(Span<const TokenSpan> visual, std::size_t tokens, Span<Index> visible,
                             std::size_t prefix = 0, std::size_t past = 0) noexcept {
  if (Status status = validate(visual, tokens); !status) return status;
  if (visible.size() > tokens)
    return fail(Errc::bad_shape, "visible has {} rows but the prompt has {} tokens: give the last rows of the prompt",
                visible.size(), tokens);
  if (prefix > tokens)
    return fail(Errc::bad_prompt, "the prefix has {} tokens but the prompt has {}: use at most that", prefix, tokens);
  if (past > max_tokens - tokens)
    return fail(Errc::bad_prompt, "{} keys of earlier turns and {} tokens are more than the {} supported", past, tokens,
                max_tokens);
  if (!visible.empty() && visible.data() == nullptr) return detail::fail_null("visible");
  const std::size_t first = tokens - visible.size();
  const auto end_of = [&](std::size_t span) { return visual[span].first + visual[span].count; };
  std::size_t s = 0, image_end = 0;
  for (std::size_t row = first; row < tokens; ++row) {
    while (s < visual.size() && end_of(s) <= row) ++s;
    std::size_t end = row + 1;
    if (s < visual.size() &&
        (visual[s].first <= row || visual[s].continues)) {  // between two spans of an image as well
      if (image_end <= row) {
        std::size_t last = s;
        while (last + 1 < visual.size() && visual[last + 1].continues) ++last;
        image_end = end_of(last);
      }
      end = image_end;
    }
    visible[row - first] = static_cast<Index>(past + (end < prefix ? prefix : end));
  }
  return {};
}

}  // namespace FASTV_KIND

namespace detail {
inline namespace FASTV_KIND {

inline Status rows_covered(const QueryRows& rows, std::size_t queries, Span<const TokenSpan> visual) noexcept {
  const std::size_t first = queries < rows.tokens ? rows.tokens - queries : 0;
  if (rows.which == ScoreRows::last) {
    std::size_t spans = visual.size();
    while (spans > 0 && visual[spans - 1].count == 0) --spans;  // images that earlier stages dropped whole
    const bool asks = spans == 0 || visual[spans - 1].first + visual[spans - 1].count < rows.tokens;
    return asks
               ? Status{}
               : fail(Errc::bad_prompt,
                      "the last prompt token (position {}) is in visual span {}, but its row ranks the "
                      "visual tokens and cannot be dropped: end the span before it, or use other ScoreRows or KeysOnly",
                      rows.tokens - 1, spans - 1);
  }
  if (rows.which == ScoreRows::all) {
    if (queries >= rows.tokens) return {};
    return fail(Errc::missing_evidence,
                "all rows are to be scored by, but the evidence starts at position {}: hand over "
                "all {} query rows or change score_rows",
                first, rows.tokens);
  }
  if (rows.listed.empty())
    return fail(Errc::bad_setting, "score_rows is listed but listed_rows is empty: list at least one prompt position");
  if (rows.listed.data() == nullptr) return fail_null("listed_rows");
  for (std::size_t i = 0; i < rows.listed.size(); ++i) {
    if (rows.listed[i] >= rows.tokens)
      return fail(Errc::bad_setting, "listed row {} is {} but the prompt has {} tokens: use positions below that", i,
                  rows.listed[i], rows.tokens);
    if (rows.listed[i] < first)
      return fail(Errc::missing_evidence,
                  "the row of prompt position {} is to be scored by, but the evidence starts at "
                  "position {}: hand over more query rows or list others",
                  rows.listed[i], first);
  }
  return {};
}

inline Status rows_default(const QueryRows& rows) noexcept {
  if (rows.which == ScoreRows::last) return {};
  return fail(
      Errc::missing_evidence,
      rows.which == ScoreRows::all
          ? "score_rows is all, but this evidence has no query rows: use ScoreRows::last, or attention as evidence"
          : "rows are listed to score by, but this evidence has no query rows: clear listed_rows and prior_rows, or "
            "use attention as evidence");
}

// ---- the contract, as the library reads it ------------------------------------------------------

// Each required member as it is called, and as far as it returns what it must.
template <class Evidence, class = void>
inline constexpr bool has_prompt_tokens = false;
template <class Evidence>
inline constexpr bool
    has_prompt_tokens<Evidence, decltype(takes<std::size_t>(made<const Evidence&>().prompt_tokens()))> = true;

template <class Evidence, class Score = float, class = void>
inline constexpr bool scores_by_rows = false;
template <class Evidence, class Score>
inline constexpr bool scores_by_rows<Evidence, Score,
                                     decltype(takes<Status>(made<const Evidence&>().score(
                                         made<const Scoring&>(), made<Span<Score>>(), made<const Serial&>())))> = true;
template <class Evidence, class Score = float, class = void>
inline constexpr bool scores_by_spans = false;
template <class Evidence, class Score>
inline constexpr bool scores_by_spans<Evidence, Score,
                                      decltype(takes<Status>(made<const Evidence&>().score(
                                          made<Span<const TokenSpan>>(), made<Span<Score>>())))> = true;
template <class Evidence, class Score>
inline constexpr bool has_score = scores_by_rows<Evidence, Score> || scores_by_spans<Evidence, Score>;

template <class Evidence, class = void>
inline constexpr bool has_check = false;
template <class Evidence>
inline constexpr bool has_check<Evidence, decltype(takes<Status>(made<const Evidence&>().check()))> = true;
template <class Evidence, class = void>
inline constexpr bool has_scratch = false;
template <class Evidence>
inline constexpr bool has_scratch<Evidence, decltype(takes<std::size_t>(made<const Evidence&>().scratch_floats()))> =
    true;

// Members of these names that cannot be called so: not const, with other parameters, or returning something else. What
// is optional would be passed over in silence.
template <class Member>
inline constexpr bool is_function = false;
template <class Function, class Evidence>
inline constexpr bool is_function<Function Evidence::*> = !is_const<const Function>;  // functions are never const
template <class Evidence, class = void>
inline constexpr bool names_prompt_tokens = false;
template <class Evidence>
inline constexpr bool names_prompt_tokens<Evidence, decltype(static_cast<void>(&Evidence::prompt_tokens))> =
    is_function<decltype(&Evidence::prompt_tokens)>;
template <class Evidence, class = void>
inline constexpr bool names_check = false;
template <class Evidence>
inline constexpr bool names_check<Evidence, decltype(static_cast<void>(&Evidence::check))> =
    is_function<decltype(&Evidence::check)>;
template <class Evidence, class = void>
inline constexpr bool names_scratch = false;
template <class Evidence>
inline constexpr bool names_scratch<Evidence, decltype(static_cast<void>(&Evidence::scratch_floats))> =
    is_function<decltype(&Evidence::scratch_floats)>;

// KeysOnly itself, not a specialisation that writes the contract anew.
template <class Evidence, class = void>
inline constexpr bool lacks_keys = false;
template <class Keys>
inline constexpr bool lacks_keys<KeysOnly<Keys>, decltype(static_cast<void>(KeysOnly<Keys>::holds_keys))> =
    !KeysOnly<Keys>::holds_keys;

// Of what a call returns, the type without const and reference. Never defined.
template <class Evidence>
Evidence value_of(const Evidence&) noexcept;

// True of evidence; of anything else exactly one of these sentences stops the compiler.
template <class Evidence, class Score = float>
constexpr bool expect_evidence() noexcept {
  constexpr bool tokens = has_prompt_tokens<Evidence>, keys = tokens && !lacks_keys<Evidence>,
                 score = keys && has_score<Evidence, Score>,
                 check = score && (has_check<Evidence> || !names_check<Evidence>),
                 scratch = check && (has_scratch<Evidence> || !names_scratch<Evidence>);
  static_assert(tokens || names_prompt_tokens<Evidence>,
                "evidence is fastv::Probabilities, QueryKey, KeysOnly, Scores, NoEvidence or a type of yours with "
                "prompt_tokens() and score(), see evidence.hpp: make one of your tensors by fastv::probabilities() or "
                "fastv::query_key()");
  static_assert(tokens || !names_prompt_tokens<Evidence>,
                "prompt_tokens() of this evidence cannot be called as std::size_t prompt_tokens() const: see "
                "evidence.hpp");
  static_assert(keys || !tokens,
                "KeysOnly holds the keys as a view: fastv::heads(k, shape), an adaptor's heads(), or loaded_keys()");
  static_assert(score || !keys,
                "this evidence has prompt_tokens() but no score() const that can be called as score(const Scoring&, "
                "Span<Score>, const ParallelFor&) or score(Span<const TokenSpan>, Span<Score>) and returns a Status, "
                "Score being float or, of a Pruner<double>, double: see evidence.hpp");
  static_assert(check || !score,
                "check() of this evidence cannot be called as Status check() const, and so would check nothing: see "
                "evidence.hpp");
  static_assert(
      scratch || !check,
      "scratch_floats() of this evidence cannot be called as std::size_t scratch_floats() const, and so would "
      "ask for no memory: see evidence.hpp");
  return scratch;
}

template <class Evidence>
Status check_evidence(const Evidence& evidence) noexcept {
  if constexpr (has_check<Evidence>)
    return evidence.check();
  else
    return {};
}
// Partial sums rank nothing: every rank would keep other tokens.
inline Status expect_all_heads(std::size_t heads, std::size_t heads_total) noexcept {
  if (heads_total <= heads) return {};
  return fail(Errc::missing_evidence,
              "the evidence has {} of {} heads, whose scores are partial sums: add up those that score() returns on "
              "every rank, and prune by fastv::Scores",
              heads, heads_total);
}
template <class Evidence>
Status expect_whole(const Evidence&) noexcept {
  return {};
}
template <class T>
Status expect_whole(const Probabilities<T>& evidence) noexcept {
  return expect_all_heads(evidence.heads, evidence.heads_total);
}
template <class Q, class Keys>
Status expect_whole(const QueryKey<Q, Keys>& evidence) noexcept {
  return expect_all_heads(evidence.query.heads, evidence.heads_total);
}
// Of an adaptor's evidence, which hands out one of the above.
struct ExpectWhole {
  template <class View>
  Status operator()(const View& view) const noexcept {
    return expect_whole(view);
  }
};
template <class Evidence, class = void>
inline constexpr bool has_visit = false;
template <class Evidence>
inline constexpr bool
    has_visit<Evidence, decltype(static_cast<void>(Status(made<const Evidence&>().visit(ExpectWhole{}))))> = true;
// What evidence must be to rank by: right, and whole.
template <class Evidence>
Status check_ranking(const Evidence& evidence) noexcept {
  if (Status status = check_evidence(evidence); !status) return status;
  if constexpr (has_visit<Evidence>)
    return evidence.visit(ExpectWhole{});
  else
    return expect_whole(evidence);
}
template <class Evidence>
std::size_t scratch_of(const Evidence& evidence) noexcept {
  if constexpr (has_scratch<Evidence>)
    return evidence.scratch_floats();
  else
    return 0;
}
template <class Score, class Evidence, class ParallelFor>
Status score_by(const Evidence& evidence, const Scoring& scoring, Span<Score> scores,
                const ParallelFor& parallel_for) noexcept {
  if constexpr (scores_by_rows<Evidence, Score>) {
    return evidence.score(scoring, scores, parallel_for);
  } else {
    if (Status status = rows_default(scoring.queries); !status) return status;
    return evidence.score(scoring.visual, scores);
  }
}

}  // namespace FASTV_KIND
}  // namespace detail

FASTV_INLINE Status QueryRows::expect_covered(std::size_t queries, Span<const TokenSpan> visual) const noexcept {
  return detail::rows_covered(*this, queries, visual);
}
FASTV_INLINE Status QueryRows::expect_default() const noexcept { return detail::rows_default(*this); }
template <class Score>
Status NoEvidence::score(Span<const TokenSpan>, Span<Score>) const noexcept {
  return fail(Errc::missing_evidence,
              "Selection::top_k needs scores: hand over probabilities, query and key, or scores");
}

}  // namespace fastv

#include "detail/end.hpp"

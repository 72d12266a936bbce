// fastv: what can go wrong, each with a code and one sentence that names the numbers at fault.
#pragma once

#include <cstdio>

#include "view.hpp"

namespace fastv {

// What can go wrong at run time. Status::message() says it in a sentence, with the numbers.
enum class Errc : unsigned char {
  ok,
  // settings
  filtering_layer_past_end,  // K is not below the number of layers
  no_attention_yet,          // K = 0 with a rule that ranks by attention
  ratio_not_a_number,
  ratio_out_of_range,  // R outside [0, 1]
  count_above_visual,  // keep_count above the number of visual tokens
  listed_rows_empty,
  listed_row_past_end,
  share_out_of_range,    // uniform_share outside [0, 1], or NaN
  window_incomplete,     // only one of window_rows and window_columns
  window_needs_columns,  // windows on a picture whose grid is unknown
  stages_unsorted,       // filtering layers of a schedule do not ascend
  too_many_stages,       // above max_stages
  counts_unknown,        // a stage per picture behind a pooled one: its counts depend on scores
  // the prompt
  no_layers,
  no_tokens,
  too_many_tokens,  // above max_tokens
  span_empty,
  span_past_end,
  spans_unsorted,
  spans_overlap,
  span_columns,            // columns do not divide the picture's tokens
  span_continues_nothing,  // the first span continues a picture
  span_original,           // fewer original tokens than there are
  last_token_visual,       // the last prompt token asks the question: it must not compete
  // evidence
  null_data,
  no_heads,
  no_rows,
  no_dim,
  heads_not_divisible,  // query heads / KV heads is not whole
  negative_stride,
  overlapping_stride,
  sequences_overlap,    // sequences of a batch are not in order and disjoint
  tokens_differ,        // evidence of another length than the sequence
  row_not_in_evidence,  // a row to score by is not among the rows handed over
  rows_above_keys,      // more query rows than keys
  bad_scale,
  bad_soft_cap,
  heads_above_total,  // more heads than all ranks have
  chunk_not_divisor,  // dim is not whole chunks
  norms_size,         // not one value norm per KV head and visual token
  odd_dim,            // RoPE turns pairs
  rope_size,          // a table of Rope has the wrong length
  shard_ranks,        // parts that do not divide among the ranks
  bias_size,
  scores_size,         // not one score per visual token
  evidence_missing,    // top_k without scores
  prior_without_rows,  // prior_rows with evidence that has none
  all_scores_nan,
  infinite_score,
  // applying
  index_past_end,
  indices_unsorted,
  rows_differ,        // source and destination rows differ in size
  room_too_small,     // an output span is too short
  no_block_tokens,    // blocks of 0 tokens
  block_table_short,  // fewer blocks than the tokens need
  beyond_memory,      // a stride or a size that no memory could hold
  // planning
  bad_times,         // a table of layer times that does not ascend or has fewer than two entries
  layers_differ,     // the model's shape and the prompt state different numbers of layers
  budget_too_small,  // even the least plan is above the budget
  // memory
  out_of_memory,
  // a framework's tensors (torch.hpp, ggml.hpp)
  tensor_undefined,
  tensor_dims,           // not the number of dimensions the view has
  tensor_no_dim,         // a token dimension that the tensor does not have
  tensor_batch,          // more than one sequence
  tensor_type,           // an element type that is not read element by element
  tensor_types_differ,   // query and key
  tensor_device,         // a view of memory that the CPU cannot read
  tensor_not_dense,      // sparse, or negated lazily
  tensor_stride,         // entries that must be adjacent are not
  tensor_rows,           // dimensions that no rows and planes describe
  tensor_requires_grad,  // written in place behind autograd's back
  tensor_tokens,         // not as many along the dimension as the prompt has
  head_dims_differ,      // of query and key
  device_rule,           // a rule that is not offered as operations on the device
  tensor_index_type,     // indices that are not I32
  not_in_graph           // settings that have no form as nodes of a graph
};

// One sentence, ready to print.
struct Message {
  // The sentence, ended by a zero, of at most 255 characters.
  char text[256];
  const char* c_str() const noexcept { return text; }
};

// An Errc and the numbers its sentence names. True where nothing went wrong.
struct [[nodiscard]] Status {
  Errc code = Errc::ok;   // what went wrong
  const char* what = "";  // the argument at fault
  long long value = 0;    // its value
  long long limit = 0;    // what it had to respect
  long long place = 0;    // where: number of the span, of the row, of the token
  double real = 0;        // its value, if it is not a whole number
  double least = 0;       // what it had to reach, if that is not a whole number

  explicit operator bool() const noexcept { return code == Errc::ok; }  // true where nothing went wrong
  // The sentence for code, with these numbers.
  Message message() const noexcept;
};

// A value, or the Status that says why there is none. Read the value only where the result is true.
template <class T>
struct [[nodiscard]] Result {
  // The value, and why there is none.
  T value{};
  Status status{};

  // True where there is a value; the value, unchecked; and what status says.
  explicit operator bool() const noexcept { return static_cast<bool>(status); }
  const T& operator*() const noexcept { return value; }
  const T* operator->() const noexcept { return &value; }
  Errc code() const noexcept { return status.code; }
  Message message() const noexcept { return status.message(); }
};

inline Message Status::message() const noexcept {
  Message message{};
  const auto say = [&](const char* format, auto... numbers) {
    std::snprintf(message.text, sizeof(message.text), format, numbers...);
  };
  switch (code) {
    case Errc::ok: say("%s", "no error"); break;
    case Errc::filtering_layer_past_end:
      say("filtering_layer is %lld but the model has %lld layers: use at most %lld, so that one layer is left to run "
          "on the shorter sequence",
          value, limit, limit - 1);
      break;
    case Errc::no_attention_yet:
      say("filtering_layer is %lld, where no layer has attended yet: use Selection::random or Selection::uniform, or a "
          "filtering_layer of at least 1",
          value);
      break;
    case Errc::ratio_not_a_number: say("%s", "filtering_ratio is not a number: use a share from 0 to 1"); break;
    case Errc::ratio_out_of_range:
      say("filtering_ratio is %g but must lie between 0 (drop none) and 1 (drop every visual token)", real);
      break;
    case Errc::count_above_visual:
      say("keep_count is %lld but the prompt has %lld visual tokens: use at most %lld", value, limit, limit);
      break;
    case Errc::listed_rows_empty:
      say("%s", "score_rows is listed but listed_rows is empty: list at least one prompt position");
      break;
    case Errc::listed_row_past_end:
      say("listed_rows[%lld] is %lld but the prompt has %lld tokens: use positions below that", place, value, limit);
      break;
    case Errc::share_out_of_range: say("uniform_share is %g but must lie between 0 and 1", real); break;
    case Errc::window_incomplete:
      say("the window has %lld rows and %lld columns: set both, or neither for none", value, limit);
      break;
    case Errc::window_needs_columns:
      say("windows are asked for but the grid of visual span %lld is unknown: set its columns", place);
      break;
    case Errc::stages_unsorted:
      say("stage %lld has filtering_layer %lld but the stage ahead of it has %lld: sort the stages and keep one a "
          "layer",
          place, value, limit);
      break;
    case Errc::too_many_stages: say("the schedule has %lld stages but at most %lld are supported", value, limit); break;
    case Errc::counts_unknown:
      say("stage %lld gives every picture its own share, but the stage ahead of it pools them, so that the counts "
          "depend on scores: pool this stage too",
          place);
      break;
    case Errc::span_continues_nothing:
      say("visual span %lld continues a picture but no span is ahead of it: clear its flag", place);
      break;
    case Errc::span_original:
      say("visual span %lld has %lld original tokens, fewer than the %lld it has now: use remaining() or 0", place,
          value, limit);
      break;
    case Errc::no_layers: say("%s", "the model has 0 layers: state at least 1"); break;
    case Errc::no_tokens: say("%s", "the prompt has 0 tokens: hand over at least 1"); break;
    case Errc::too_many_tokens: say("the prompt has %lld tokens but at most %lld are supported", value, limit); break;
    case Errc::span_empty: say("visual span %lld has 0 tokens: leave it out", place); break;
    case Errc::span_past_end:
      say("visual span %lld ends before position %lld but the prompt has %lld tokens: shorten the span", place, value,
          limit);
      break;
    case Errc::spans_unsorted:
      say("visual span %lld starts at position %lld, before the span ahead of it, which starts at %lld: sort the spans",
          place, value, limit);
      break;
    case Errc::spans_overlap:
      say("visual span %lld starts at position %lld but the span ahead of it reaches up to %lld: make them disjoint",
          place, value, limit);
      break;
    case Errc::span_columns:
      say("visual span %lld has %lld columns, which do not divide its %lld tokens into rows: use 0 where the grid is "
          "unknown",
          place, value, limit);
      break;
    case Errc::last_token_visual:
      say("the last prompt token (position %lld) is in visual span %lld, but it asks the question and cannot be "
          "dropped: end the span before it",
          value, place);
      break;
    case Errc::null_data: say("the pointer to %s is null: hand over its data", what); break;
    case Errc::no_heads: say("%s has 0 heads: state at least 1", what); break;
    case Errc::no_rows: say("%s has 0 rows: hand over at least the last prompt token's", what); break;
    case Errc::no_dim: say("%s has head dimension 0: state at least 1", what); break;
    case Errc::heads_not_divisible:
      say("%lld query heads cannot be shared evenly by %lld KV heads: the first must be a multiple of the second",
          value, limit);
      break;
    case Errc::negative_stride:
      say("the %s is %lld but strides must not be negative: reverse the view", what, value);
      break;
    case Errc::overlapping_stride:
      say("the %s is %lld, so that entries of %lld overlap: use at least %lld", what, value, limit, limit);
      break;
    case Errc::sequences_overlap:
      say("sequence %lld of the batch starts at row %lld but the one ahead of it reaches up to %lld: sort them and "
          "keep them disjoint",
          place, value, limit);
      break;
    case Errc::tokens_differ:
      say("the evidence is of %lld tokens but the sequence has %lld: hand over its own", value, limit);
      break;
    case Errc::row_not_in_evidence:
      say("the row of prompt position %lld is to be scored by, but the evidence starts at position %lld: hand over "
          "more query rows or change score_rows",
          value, limit);
      break;
    case Errc::rows_above_keys:
      say("%s has %lld rows but only %lld keys: rows are the last positions of the prompt", what, value, limit);
      break;
    case Errc::bad_scale:
      say("scale is %g but must be positive and finite, such as 1 / sqrt(head dimension)", real);
      break;
    case Errc::bad_soft_cap: say("soft_cap is %g but must be positive and finite, or 0 for none", real); break;
    case Errc::bias_size:
      say("the bias row has %lld entries for %lld keys: give one each, or none", value, limit);
      break;
    case Errc::heads_above_total:
      say("%s has %lld heads but heads_total is %lld: it counts the heads of all ranks", what, value, limit);
      break;
    case Errc::chunk_not_divisor:
      say("chunks of %lld elements do not divide the head dimension of %s, %lld", value, what, limit);
      break;
    case Errc::norms_size:
      say("%lld value norms were given but %lld are needed: one per KV head and visual token", value, limit);
      break;
    case Errc::odd_dim: say("the head dimension is %lld but RoPE turns pairs: it must be even", value); break;
    case Errc::rope_size: say("Rope::%s has %lld entries but needs %lld", what, value, limit); break;
    case Errc::shard_ranks:
      say("%lld softmax parts cannot be those of rank %lld of %lld: gather one per head and rank", value, place, limit);
      break;
    case Errc::scores_size: say("%lld scores were given for %lld visual tokens: give one each", value, limit); break;
    case Errc::evidence_missing:
      say("%s", "Selection::top_k needs scores: hand over probabilities, query and key, or scores");
      break;
    case Errc::prior_without_rows:
      say("%s", "prior_rows is set but this evidence has no query rows: clear it, or use prior_corrected() yourself");
      break;
    case Errc::all_scores_nan:
      say("all %lld visual scores are NaN: check the attention or the queries and keys of layer K-1", value);
      break;
    case Errc::infinite_score:
      say("the score of visual token %lld is infinite: attention is at most 1, so check its source", place);
      break;
    case Errc::index_past_end:
      say("kept index %lld is %lld but there are %lld rows: use the tensor the indices were made for", place, value,
          limit);
      break;
    case Errc::indices_unsorted:
      say("kept index %lld is %lld, not above the one ahead of it, %lld: keep them ascending", place, value, limit);
      break;
    case Errc::rows_differ:
      say("%s is %lld at the source but %lld at the destination: make them equal", what, value, limit);
      break;
    case Errc::room_too_small: say("%s has room for %lld entries but needs %lld", what, value, limit); break;
    case Errc::no_block_tokens: say("blocks of %s hold 0 tokens: state at least 1", what); break;
    case Errc::block_table_short:
      say("the block table has %lld blocks but %lld are needed: hand over the whole table of the sequence", value,
          limit);
      break;
    case Errc::beyond_memory:
      say("the %s is %lld, which at %lld entries is more than any memory holds: check both", what, value, limit);
      break;
    case Errc::layers_differ:
      say("the model's shape has %lld layers but the prompt's model has %lld: describe the same model", value, limit);
      break;
    case Errc::bad_times:
      say("the table of %lld layer times is wrong at entry %lld: give at least two, with tokens and seconds ascending",
          value, place);
      break;
    case Errc::budget_too_small:
      say("the budget is %g but even a prefill without visual tokens behind the first layers costs %g: raise it", real,
          least);
      break;
    case Errc::out_of_memory: say("%lld bytes of scratch memory could not be allocated", value); break;
    case Errc::tensor_undefined: say("%s is an undefined tensor: hand over one with data", what); break;
    case Errc::tensor_dims:
      say("%s has %lld dimensions but needs %lld; one more in front, of size 1, is allowed where there are heads", what,
          value, limit);
      break;
    case Errc::tensor_no_dim:
      say("the token dimension is %lld but the tensor has %lld dimensions: count from 0", value, limit);
      break;
    case Errc::tensor_batch:
      say("%s is a batch of %lld, but one sequence is pruned at a time: hand over one of them", what, value);
      break;
    case Errc::tensor_type:
      say("tensors of element type %s cannot be read element by element: use Float (F32), Half (F16) or BFloat16",
          what);
      break;
    case Errc::tensor_types_differ:
      say("the element type of the key is %s but not that of the query: convert one of them with to()", what);
      break;
    case Errc::tensor_index_type: say("indices of type %s cannot be written: use a tensor of I32", what); break;
    case Errc::tensor_device:
      say("%s is not on the CPU, whose memory views read: use prune_on_device() and gather_rows(), or move it with "
          "cpu()",
          what);
      break;
    case Errc::tensor_not_dense:
      say("%s is sparse or negated lazily: make it dense with to_dense() or resolve_neg()", what);
      break;
    case Errc::tensor_stride:
      say("the last stride of %s is %lld but must be 1: call contiguous(), or transpose other dimensions only", what,
          value);
      break;
    case Errc::tensor_rows:
      say("dimension %lld of the tensor has stride %lld, which fits neither into its rows nor into one set of planes: "
          "call contiguous(), or use gather_rows()",
          place, value);
      break;
    case Errc::tensor_requires_grad:
      say("%s requires a gradient, which writing in place would falsify: use gather_rows(), or detach() it", what);
      break;
    case Errc::tensor_tokens:
      say("dimension %lld of the tensor has %lld entries but the prompt has %lld tokens: name the dimension of tokens, "
          "and narrow() a larger cache",
          place, value, limit);
      break;
    case Errc::head_dims_differ:
      say("the head dimension of the query is %lld but that of the key is %lld: hand over the same layer's", value,
          limit);
      break;
    case Errc::device_rule:
      say("%s is set but not offered on the device: copy the scores to the CPU and use a Pruner with scores()", what);
      break;
    case Errc::not_in_graph:
      say("%s",
          "inside a graph only the last row's attention can be ranked by, without a prior: use ScoreRows::last, or "
          "prune between two graphs");
      break;
  }
  return message;
}

namespace detail {

inline long long number(unsigned long long value) noexcept {
  constexpr unsigned long long most = 0x7fffffffffffffffull;
  return static_cast<long long>(value > most ? most : value);
}

inline Status fail(Errc code, const char* what = "", long long value = 0, long long limit = 0,
                   long long place = 0) noexcept {
  return {code, what, value, limit, place, 0, 0};
}
inline Status fail_real(Errc code, double real) noexcept { return {code, "", 0, 0, 0, real, 0}; }

// Whether a caller's span has the entries that are about to be read or written.
template <class T>
Status check_room(Span<T> room, std::size_t needed, const char* what) noexcept {
  if (room.size() < needed) return fail(Errc::room_too_small, what, number(room.size()), number(needed));
  if (needed > 0 && room.data() == nullptr) return fail(Errc::null_data, what);
  return {};
}

}  // namespace detail

}  // namespace fastv

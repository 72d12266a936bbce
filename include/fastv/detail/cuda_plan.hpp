// fastv: the plan of a batch for its kernels, made on the host: descriptors of sequences, groups of tokens that compete,
// and every length. Counts, quotas, windows and grids are the core's.
#pragma once

#include "cuda_words.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
namespace gpu {
inline namespace FASTV_KIND {

// What the host knows of a stage.
struct StagePlan {
  std::size_t filtering_layer = 0;
  std::size_t words_sequences = 0, words_cumulative = 0, words_cumulative_keys = 0;
  std::size_t rows = 0, visual = 0;                    // found
  std::size_t kept = 0, kept_visual = 0;               // left
  std::size_t longest = 0, longest_keys = 0;           // left
  std::size_t keys = 0, key_rows = 0, query_rows = 0;  // longest found; rows that packed tensors must have
  std::size_t rows_at_hand = 0, tables = 0;            // most query rows of a sequence; rows of the block tables
  std::size_t most_visual = 0, jobs = 0;
  bool by_rows = false;  // some request chooses rows, or a prior
  Status last_row_asks;  // or what is wrong where the last prompt token is to rank by attention

  // Of Selection::diverse.
  std::size_t contests = 0, tiles = 0, products = 0;     // products: eights of floats
  std::size_t compared_keys = 0, compared_key_rows = 0;  // as those above, of its sequences
  bool keys_gone = false;                                // some key of its prompts is no longer at hand
};

// Memory that the making of plans needs.
class Planner {
 public:
  Status reserve(const cuda::Limits& limits) noexcept {
    limits_ = limits;
    if (Status status = words_.reserve(limits); !status) return status;
    if (Status status = spans_.reserve(limits.spans); !status) return status;
    if (Status status = states_.reserve(limits.sequences); !status) return status;
    if (Status status = marks_.reserve(4 * limits.visual + 4 * limits.spans); !status) return status;
    if (Status status = kept_.reserve(limits.visual); !status) return status;
    return quotas_.reserve(2 * limits.spans);
  }

  // The plans of a batch, stage by stage. Nothing is to be read where an error is returned.
  Status plan(Span<const cuda::Request> requests, std::size_t layers) noexcept {
    words_.clear();
    stages_ = 0;
    requests_ = requests;
    if (requests.empty()) return fail(Errc::bad_prompt, "the batch has 0 sequences: hand over at least 1");
    if (Status status = expect_room(requests, requests.size(), "the requests"); !status) return status;
    if (requests.size() > limits_.sequences) return beyond("sequences", requests.size(), limits_.sequences);
    std::size_t spans = 0;
    for (std::size_t i = 0; i < requests.size(); ++i)
      if (Status status = begin(i, layers, spans); !status) return status;
    for (std::size_t layer = 0; next_layer(layer);)
      if (Status status = plan_stage(layer); !status) return status;
    return {};
  }

  std::size_t stages() const noexcept { return stages_; }
  const StagePlan& stage(std::size_t s) const noexcept { return stage_[s]; }
  const Sequence& sequence(std::size_t s, std::size_t i) const noexcept {
    return reinterpret_cast<const Sequence*>(words_.at_word(stage_[s].words_sequences))[i];
  }
  Span<const std::uint32_t> words() const noexcept { return words_.all(); }
  std::size_t sequences() const noexcept { return requests_.size(); }

 private:
  // What a sequence has come to.
  struct State {
    Plan plan;
    std::size_t stage, tokens, visual;  // its next stage; what that finds
    std::size_t spans, span_count;      // in spans_: positions count visual tokens
    bool pooled;                        // several images have become one
  };

  static Status beyond(const char* what, std::size_t needed, std::size_t limit) noexcept {
    return fail(Errc::too_small, "the batch has {} {} but there is room for {}: raise Limits and reserve() again",
                needed, what, limit);
  }
  const Config& config(std::size_t i, std::size_t stage) const noexcept {
    return stage == 0 ? requests_[i].config : requests_[i].later[stage - 1];
  }

  Status begin(std::size_t i, std::size_t layers, std::size_t& spans) noexcept {
    const cuda::Request& request = requests_[i];
    const std::size_t reach = i == 0 ? 0 : requests_[i - 1].first + requests_[i - 1].tokens;
    if (Status status = check_place(i, request.first, request.tokens, reach); !status) return status;
    if (Status status = expect_room(request.later, request.later.size(), "the later stages"); !status) return status;
    State& state = states_[i];
    state = {{}, 0, request.tokens, 0, spans, 0, false};
    // A sequence without images passes untouched, whatever its settings.
    Config schedule[max_stages];
    const std::size_t stages = request.visual.empty() ? 0 : 1 + request.later.size();
    if (stages > max_stages)
      return fail(Errc::bad_setting, "the schedule has {} stages but at most {} are supported", stages, max_stages);
    for (std::size_t s = 0; s < stages; ++s) {
      schedule[s] = config(i, s);
      if (schedule[s].selection == Selection::diverse && limits_.features == 0)
        return fail(Errc::too_small,
                    "sequence {} asks for Selection::diverse but Limits::features is 0: state the elements of a "
                    "token's features and reserve() again",
                    i);
    }
    const Result<Plan> plan =
        make_plan(Span<const Config>(schedule, stages), Prompt{request.tokens, layers, request.visual, request.past});
    if (!plan) return plan.status;
    state.plan = *plan;
    if (spans + request.visual.size() > limits_.spans)
      return beyond("spans", spans + request.visual.size(), limits_.spans);
    for (const TokenSpan& span : request.visual) {
      TokenSpan& own = spans_[spans + state.span_count++];
      own = span;
      own.first = state.visual;
      state.visual += span.count;
    }
    spans += state.span_count;
    if (state.visual > 65536)
      return fail(Errc::not_supported, "sequence {} has {} visual tokens but at most 65536 are supported on the device",
                  i, state.visual);
    const std::size_t queries = request.queries == 0 ? request.tokens : request.queries;
    if (queries > request.tokens)
      return fail(Errc::bad_shape, "sequence {} has {} query rows at hand but {} tokens: the rows are the last ones", i,
                  queries, request.tokens);
    for (std::size_t s = 0; s < stages; ++s)
      if (Status status = check_rows(i, s, queries); !status) return status;
    return {};
  }

  // Rows must be positions of what the stage finds, among those at hand.
  Status check_rows(std::size_t i, std::size_t s, std::size_t queries) const noexcept {
    const Config& own = config(i, s);
    if (!uses_scores(own)) return {};
    const cuda::Request& request = requests_[i];
    const std::size_t tokens = states_[i].plan.tokens_in_group(s);
    const std::size_t at_hand = request.queries == 0 || queries > tokens ? tokens : queries;
    if (own.score_rows != ScoreRows::last) {
      const QueryRows rows{own.score_rows, own.listed_rows, tokens};
      if (Status status = rows.expect_covered(at_hand, {}); !status) return status;
    }
    if (own.prior_rows.empty()) return {};
    return QueryRows{ScoreRows::listed, own.prior_rows, tokens}.expect_covered(at_hand, {});
  }

  // The lowest filtering layer that is still to come; false where there is none.
  bool next_layer(std::size_t& layer) const noexcept {
    bool found = false;
    for (std::size_t i = 0; i < requests_.size(); ++i) {
      const State& state = states_[i];
      if (state.stage == state.plan.stages) continue;
      const std::size_t own = state.plan.stage[state.stage].filtering_layer;
      layer = !found || own < layer ? own : layer;
      found = true;
    }
    return found;
  }

  // ---- one stage ----------------------------------------------------------------------------------

  Status plan_stage(std::size_t layer) noexcept {
    if (stages_ == limits_.stages)
      return fail(Errc::too_small,
                  "the batch has more different filtering layers than the {} that there is room for: raise "
                  "Limits::stages and reserve() again",
                  limits_.stages);
    StagePlan& stage = stage_[stages_];
    const std::size_t n = requests_.size();
    stage = {};
    stage.filtering_layer = layer;
    if (Status status = words_.take(n * sequence_words, stage.words_sequences); !status) return status;
    bool shifted = false;  // keys do not lie as hidden states do
    for (std::size_t i = 0; i < n; ++i)
      shifted = shifted || past_of(i, scored_layer(layer)) != 0 || requests_[i].first_key != 0;
    std::size_t keys = 0, queries = 0;
    for (std::size_t i = 0; i < n; ++i)
      if (Status status = plan_sequence(stage, i, layer, shifted, keys, queries); !status) return status;
    if (Status status = words_.take(n + 1, stage.words_cumulative); !status) return status;
    if (Status status = words_.take(n + 1, stage.words_cumulative_keys); !status) return status;
    std::uint32_t* cumulative = words_.at_word(stage.words_cumulative);
    std::uint32_t* cumulative_keys = words_.at_word(stage.words_cumulative_keys);
    cumulative[0] = cumulative_keys[0] = 0;
    std::size_t held = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const std::size_t kept = states_[i].tokens, behind = past_of(i, layer);
      held += behind + kept;
      if (held > max_tokens)
        return fail(Errc::bad_shape, "with sequence {} the batch has more keys than int32 counts", i);
      cumulative[i + 1] = cumulative[i] + static_cast<std::uint32_t>(kept);
      cumulative_keys[i + 1] = static_cast<std::uint32_t>(held);
      stage.longest = kept > stage.longest ? kept : stage.longest;
      stage.longest_keys = behind + kept > stage.longest_keys ? behind + kept : stage.longest_keys;
    }
    ++stages_;
    return {};
  }

  // Keys of earlier turns.
  std::size_t past_of(std::size_t i, std::size_t layer) const noexcept { return states_[i].plan.past_in_layer(layer); }

  Status plan_sequence(StagePlan& stage, std::size_t i, std::size_t layer, bool shifted, std::size_t& keys,
                       std::size_t& queries) noexcept {
    const cuda::Request& request = requests_[i];
    State& state = states_[i];
    const bool first = stages_ == 0;
    const auto word = [](std::size_t value) { return static_cast<std::uint32_t>(value); };
    Sequence s{};
    s.tokens = word(state.tokens);
    s.first = word(first ? request.first : stage.rows);
    s.row_first = word(stage.rows);
    s.visual = word(state.visual);
    s.visual_first = word(stage.visual);
    s.past = word(past_of(i, scored_layer(layer)));
    const std::size_t sequence = std::size_t{s.past} + s.tokens;
    if (request.first_key >= sequence)
      return fail(Errc::bad_shape, "sequence {} has first_key {} but {} tokens: it counts those before the first key",
                  i, request.first_key, sequence);
    s.first_key = word(request.first_key);
    s.keys = word(sequence - request.first_key);
    s.queries = word(request.queries == 0 || request.queries > state.tokens ? state.tokens : request.queries);
    const std::size_t query_row = first && request.query_row != cuda::by_order ? request.query_row
                                  : request.queries == 0                       ? s.first
                                                                               : queries;
    const std::size_t key_row = first && request.key_row != cuda::by_order ? request.key_row : shifted ? keys : s.first;
    const std::size_t table_row = request.table_row == cuda::by_order ? i : request.table_row;
    if (query_row > max_tokens - s.queries || key_row > max_tokens - s.keys || table_row > max_tokens)
      return fail(Errc::bad_shape,
                  "sequence {} has its queries at row {} and its keys at row {}, more than int32 counts", i, query_row,
                  key_row);
    s.query_row = word(query_row);
    s.key_row = word(key_row);
    s.table_row = word(table_row);
    queries += s.queries;
    keys += s.keys;
    s.first_job = word(stage.jobs);
    s.kept_first = word(stage.kept);
    s.kept_visual_first = word(stage.kept_visual);
    s.words_chosen = none;
    s.first_contest = word(stage.contests);
    s.first_tile = word(stage.tiles);
    if (first) {
      std::size_t at = 0;
      if (Status status = words_.take(3 * request.visual.size(), at); !status) return status;
      s.words_spans = word(at);
      s.spans = word(request.visual.size());
      std::uint32_t* out = words_.at_word(at);
      std::uint32_t numbered = 0;
      for (const TokenSpan& span : request.visual) {
        *out++ = word(span.first);
        *out++ = word(span.count);
        *out++ = numbered;
        numbered += word(span.count);
      }
    }
    stage.rows += state.tokens;
    stage.visual += state.visual;
    if (stage.rows > limits_.tokens) return beyond("rows", stage.rows, limits_.tokens);
    if (stage.visual > limits_.visual) return beyond("visual tokens", stage.visual, limits_.visual);

    const bool prunes = state.stage < state.plan.stages && state.plan.stage[state.stage].filtering_layer == layer;
    const std::size_t text = state.tokens - state.visual;
    if (prunes) {
      if (Status status = plan_rows(stage, s, config(i, state.stage), state, request); !status) return status;
      if (Status status = plan_selection(stage, s, config(i, state.stage), state, i); !status) return status;
      state.visual = state.plan.stage[state.stage].kept_visual;
      ++state.stage;
      state.tokens = text + state.visual;
    } else if (state.visual > 0) {
      if (Status status = words_.open_round(s, 0); !status) return status;
      if (Status status = words_.add_group(s, 0, {0, s.visual, 0, s.visual, s.visual, 0}); !status) return status;
    }
    s.past_behind = word(past_of(i, layer));
    stage.jobs += std::size_t{s.main_jobs} + s.prior_jobs;
    stage.kept += state.tokens;
    stage.kept_visual += state.visual;
    const auto raise = [](std::size_t& most, std::size_t value) { most = value > most ? value : most; };
    raise(stage.most_visual, s.visual);
    raise(stage.keys, s.main_jobs > 0 ? s.keys : 0);
    raise(stage.key_rows, s.main_jobs > 0 ? std::size_t{s.key_row} + s.keys : 0);
    raise(stage.query_rows, s.main_jobs > 0 ? std::size_t{s.query_row} + s.queries : 0);
    raise(stage.rows_at_hand, s.main_jobs > 0 ? s.queries : 0);
    raise(stage.tables, s.main_jobs > 0 ? std::size_t{s.table_row} + 1 : 0);
    raise(stage.compared_keys, s.contests > 0 ? s.keys : 0);
    raise(stage.compared_key_rows, s.contests > 0 ? std::size_t{s.key_row} + s.keys : 0);
    std::memcpy(words_.at_word(stage.words_sequences + i * sequence_words), &s, sizeof(s));
    return {};
  }

  // The rows by which it is scored.
  Status plan_rows(StagePlan& stage, Sequence& s, const Config& own, const State& state,
                   const cuda::Request& request) noexcept {
    if (!uses_scores(own) || state.visual == 0) return {};
    const QueryRows rows{own.score_rows, own.listed_rows, state.tokens};
    s.which = static_cast<std::uint32_t>(own.score_rows);
    s.main_jobs = static_cast<std::uint32_t>(rows.size());
    s.prior_jobs = static_cast<std::uint32_t>(own.prior_rows.size());
    stage.by_rows = stage.by_rows || own.score_rows != ScoreRows::last || s.prior_jobs > 0;
    // Only shapes are known of a later stage: where the prompt's last token is visual, its row ranks there neither.
    if (own.score_rows == ScoreRows::last && stage.last_row_asks)
      stage.last_row_asks = QueryRows{ScoreRows::last, {}, request.tokens}.expect_covered(1, request.visual);
    const std::size_t listed = own.score_rows == ScoreRows::listed ? own.listed_rows.size() : 0;
    std::size_t at = 0;
    if (Status status = words_.take(listed + s.prior_jobs, at); !status) return status;
    s.words_listed = static_cast<std::uint32_t>(at);
    std::uint32_t* out = words_.at_word(at);
    for (const Index row : own.listed_rows.first(listed)) *out++ = row;
    for (const Index row : own.prior_rows) *out++ = row;
    return {};
  }

  // Groups and marks, so that the device has nothing to do but to rank; and what the next stage finds.
  Status plan_selection(StagePlan& stage, Sequence& s, const Config& own, State& state, std::size_t i) noexcept {
    const Span<const TokenSpan> visual{spans_.part(state.spans, state.span_count).data(), state.span_count};
    const Result<Images> images = count_images(own, visual);
    if (!images) return images.status;
    const std::size_t total = state.visual;
    if (state.pooled && minima_hold(own, *images))
      return fail(Errc::not_supported,
                  "stage {} of sequence {} has min_per_image behind a stage that pools the images, so that what each "
                  "image has depends on scores: set it to 0",
                  state.stage, i);
    std::uint32_t* marks = marks_.first(0).data();
    std::uint32_t* scratch = marks + total;
    for (std::size_t t = 0; t < total; ++t) marks[t] = 0;
    bool marked = false;
    if (own.selection == Selection::diverse) {
      if (total > 0) {
        if (Status status = plan_contests(stage, s, own, visual, *images, marks, scratch); !status) return status;
        stage.keys_gone = stage.keys_gone || s.first_key > s.past;
      }
      marked = true;
    } else if (own.selection != Selection::top_k) {
      if (total > 0) {
        const Result<Selected> selected =
            select_validated<float>(own, {}, visual, total, *images, kept_.first(total).data(), scratch);
        if (!selected) return selected.status;
        for (std::size_t k = 0; k < selected->count; ++k) marks[kept_[k]] = chosen<std::uint32_t>;
      }
      marked = true;
    } else if (total > 0) {
      if (Status status = plan_rounds(s, own, visual, *images, marks, scratch); !status) return status;
      marked = own.uniform_share > 0;
    }
    if (marked && total > 0) {
      std::size_t at = 0;
      if (Status status = words_.take((total + 31) / 32, at); !status) return status;
      s.words_chosen = static_cast<std::uint32_t>(at);
      std::uint32_t* bits = words_.at_word(at);
      for (std::size_t t = 0; t < (total + 31) / 32; ++t) bits[t] = 0;
      for (std::size_t t = 0; t < total; ++t)
        bits[t / 32] |= marks[t] == chosen<std::uint32_t> ? std::uint32_t{1} << (t % 32) : 0u;
    }
    if (state.span_count > 0)
      state.span_count = spans_left(own, visual, *images, quotas_.first(2 * images->count),
                                    spans_.part(state.spans, images->count), state.pooled);
    return {};
  }

  // The groups of tokens that compete for a count, as select_validated() and mark_diverse() have them, in the same order:
  // add(round, first, quota, tokens). Round 0; where images of a pool have minima, round 1 is of all. marks: what the even
  // grid takes.
  template <class Add>
  void for_each_round(const Config& own, Span<const TokenSpan> visual, const Images& images, std::uint32_t* marks,
                      std::uint32_t* scratch, const Add& add) noexcept {
    std::size_t number = 0, numbered = 0;
    const auto all_of = [](std::size_t tokens) {
      return [tokens](auto take) {
        for (std::size_t t = 0; t < tokens; ++t) take(t);
      };
    };
    if (pool_has_minima(own, images)) {
      if (const std::size_t share = pool_grid(own, images); share > 0) mark_uniform(marks, images.tokens, 0, share);
      for_each_image(visual, [&](const Image& image) {
        add(0, numbered, minimum_of(own, image), all_of(image.tokens));
        numbered += image.tokens;
      });
      add(1, 0, images.keep, all_of(images.tokens));
      return;
    }
    const auto alone = [&](std::size_t first, std::size_t tokens, std::size_t columns, std::size_t count) {
      for_each_group(own, marks + first, tokens, columns, count, scratch,
                     [&](std::size_t quota, auto part) { add(0, first, quota, part); });
    };
    if (own.quota == Quota::pooled) return alone(0, images.tokens, 0, images.keep);
    quotas_of(own, visual, images, quotas_.first(images.count), quotas_.part(images.count, images.count));
    for_each_image(visual, [&](const Image& image) {
      const std::size_t quota = quotas_[number++], first = numbered;
      numbered += image.tokens;
      if (image.tokens > 0) alone(first, image.tokens, image.columns, quota);
    });
  }
  static bool pool_has_minima(const Config& own, const Images& images) noexcept {
    return own.quota == Quota::pooled && minima_hold(own, images);
  }

  // Selection::top_k.
  Status plan_rounds(Sequence& s, const Config& own, Span<const TokenSpan> visual, const Images& images,
                     std::uint32_t* marks, std::uint32_t* scratch) noexcept {
    Status status = words_.open_round(s, 0);
    int open = 0;
    for_each_round(own, visual, images, marks, scratch,
                   [&](int round, std::size_t first, std::size_t quota, auto tokens) {
                     if (status && round != open) status = words_.open_round(s, open = round);
                     if (status) status = words_.add_group(s, round, PlanWords::group_of(first, quota, tokens));
                   });
    return status;
  }

  // Selection::diverse. A group that stays as a whole is marked, and nobody compares its tokens.
  Status plan_contests(StagePlan& stage, Sequence& s, const Config& own, Span<const TokenSpan> visual,
                       const Images& images, std::uint32_t* marks, std::uint32_t* scratch) noexcept {
    s.scored = uses_scores(own) ? 1 : 0;
    s.novelty = static_cast<std::uint32_t>(own.diversity.novelty);
    s.blend = static_cast<std::uint32_t>(own.diversity.blend);
    s.weight = static_cast<float>(own.diversity.weight);
    s.rest = static_cast<float>(1 - own.diversity.weight);
    Status status;
    std::size_t words_images = none, number_of_images = 0, have_of_images = 0;
    const bool minima = pool_has_minima(own, images);
    for_each_round(own, visual, images, marks, scratch,
                   [&](int round, std::size_t first, std::size_t quota, auto tokens) {
                     const Group group = PlanWords::group_of(first, quota, tokens);
                     std::size_t have = 0;
                     tokens([&](std::size_t t) { have += marks[first + t] == chosen<std::uint32_t> ? 1u : 0u; });
                     if (!status || group.size == 0) return;
                     if (minima && round == 0) {
                       const Take image = PlanWords::take_of(own, first, first + group.size, quota, have);
                       have_of_images += quota > have ? quota : have;
                       if (images.keep >= images.tokens || image.by_score + image.by_value == 0) return;
                       status = words_.add_image(image, words_images);
                       ++number_of_images;
                       return;
                     }
                     if (quota >= group.size) {
                       tokens([&](std::size_t t) { marks[first + t] = chosen<std::uint32_t>; });
                       have = group.size;
                     }
                     Contest contest{};
                     contest.group = group;
                     contest.all = PlanWords::take_of(own, 0, group.size, quota, minima ? have_of_images : have);
                     if (quota >= group.size) contest.all = {};
                     contest.words_images = static_cast<std::uint32_t>(words_images);
                     contest.images = static_cast<std::uint32_t>(number_of_images);
                     status = words_.add_contest(s, contest, stage.products, stage.tiles);
                   });
    stage.contests += s.contests;
    return status;
  }

  cuda::Limits limits_;
  Span<const cuda::Request> requests_;
  PlanWords words_;
  Buffer<std::uint32_t> marks_;
  Buffer<TokenSpan> spans_;
  Buffer<State> states_;
  Buffer<Index> kept_, quotas_;
  std::size_t stages_ = 0;
  StagePlan stage_[max_stages];
};

}  // namespace FASTV_KIND
}  // namespace gpu
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

// fastv::Pruner: the front door. Config in, kept indices out.
#pragma once

#include "apply.hpp"
#include "remedies.hpp"
#include "select.hpp"

#include "detail/begin.hpp"

namespace fastv {

namespace detail {
inline namespace FASTV_KIND {

// Room for the intermediate values of one sequence.
template <class Score>
struct Workspace {
  Span<Score> scores, prior;  // [visual tokens]; prior only where the settings ask for a correction
  Span<Mark<Score>> marks;    // select_scratch()
  Span<float> scratch;        // score_scratch(evidence), then diverse_floats()
};

// Does the rule look at scores, and is there something to score?
inline bool scores_wanted(const Config& config, const Images& images) noexcept {
  return uses_scores(config) && images.tokens > 0;
}

// Scores by settings, spans and evidence that have been validated.
template <class Score, class Evidence, class ParallelFor>
Status score_validated(const Config& config, const Evidence& evidence, Span<const TokenSpan> visual, std::size_t tokens,
                       const Workspace<Score>& work, const ParallelFor& parallel_for) noexcept {
  const Scoring question{visual, {config.score_rows, config.listed_rows, tokens}, work.scratch};
  if (Status status = score_by(evidence, question, work.scores, parallel_for); !status) return status;
  if (config.prior_rows.empty()) return {};
  const Scoring prior{visual, {ScoreRows::listed, config.prior_rows, tokens}, work.scratch};
  if (Status status = score_by(evidence, prior, work.prior, parallel_for); !status) return status;
  return correct_by_prior(work.scores, Span<const Score>(work.prior.data(), work.prior.size()));
}

// Scores, if the rule looks at scores, and selects. kept: room for every token that stays.
template <class Score, class Evidence, class ParallelFor>
Result<Selected> prune_validated(const Config& config, const Evidence& evidence, Span<const TokenSpan> visual,
                                 std::size_t tokens, const Images& images, const Workspace<Score>& work, Index* kept,
                                 const ParallelFor& parallel_for) noexcept {
  const bool scored = scores_wanted(config, images);
  if (scored) {
    if (Status status = score_validated(config, evidence, visual, tokens, work, parallel_for); !status)
      return {{}, status};
  }
  const Span<const Score> scores{work.scores.data(), scored ? work.scores.size() : 0};
  if constexpr (has_features<Evidence>)
    return select_validated<Score>(config, scores, visual, tokens, images, kept, work.marks.data(),
                                   features_of(evidence), work.scratch.data() + (scored ? score_scratch(evidence) : 0),
                                   parallel_for);
  else
    return select_validated<Score>(config, scores, visual, tokens, images, kept, work.marks.data());
}

}  // namespace FASTV_KIND
}  // namespace detail

inline namespace FASTV_KIND {

// Scores the visual tokens of one sequence and picks those that stay.
//
// Score is the type scores are summed in: float (default) or double. Scratch memory is sized by reserve(), or by the first
// prune() of that size; after that nothing is allocated. One Pruner per sequence or per thread. Every member is noexcept;
// what can go wrong is in the result. A schedule of several stages is a Pruner per stage; next_spans() gives the second its
// spans. A Pruner belongs to the instruction sets its translation unit is compiled for (detail/begin.hpp).
template <class Score = float>
class Pruner {
 public:
  // config is copied; a list of rows in it is read at each prune(). Allocates nothing yet.
  explicit Pruner(const Config& config = {}) noexcept : config_(config) {}

  // The settings in force.
  const Config& config() const noexcept { return config_; }
  // Other settings from the next prune() on; scratch memory is kept.
  void set_config(const Config& config) noexcept { config_ = config; }

  // True once, after the layer at which to prune: layers_run counts the decoder layers that have run. At K = 0 it is true
  // before the first layer.
  bool due(std::size_t layers_run) const noexcept { return layers_run == config_.filtering_layer; }

  // All lengths before any value exists. The only place that sees the number of layers, and so the only one that can tell
  // that filtering_layer lies past the last. O(spans).
  Result<Plan> plan(const Prompt& prompt) const noexcept { return make_plan(config_, prompt); }

  // Room for prompts of up to `tokens` tokens in `spans` spans, scored from queries and keys of up to `heads` heads of
  // dimension `dim` over `past` more keys (heads 0 where there are no queries, dim 0 where there are no keys either), and
  // compared by features of up to `feature_width` floats from vectors of up to `feature_dim` elements where those are
  // averaged or projected.
  Status reserve(std::size_t tokens, std::size_t spans, std::size_t heads = 0, std::size_t dim = 0,
                 std::size_t past = 0, std::size_t feature_width = 0, std::size_t feature_dim = 0) noexcept {
    constexpr std::size_t largest = std::size_t{1} << 24;  // so that no sum below wraps around
    if (tokens > max_tokens || spans > max_tokens || past > max_tokens || heads > largest || dim > largest)
      return fail(Errc::bad_shape,
                  "room for {} tokens in {} spans and {} heads of dimension {} is more than any model needs", tokens,
                  spans, heads, dim);
    std::size_t scratch = detail::pieces(tokens + past) * (dim > 0 ? dim : 1);
    if (heads > 0) {
      QueryKey<half> shape{};  // of all element types, the one whose query takes most room
      shape.query.heads = heads;
      shape.query.tokens = tokens;  // an engine may hand over all rows where one is scored by
      shape.key.tokens = tokens + past;
      shape.key.dim = dim;
      const std::size_t of_queries = score_scratch(shape);
      scratch = of_queries > scratch ? of_queries : scratch;
    }
    std::size_t words = 0;
    if (config_.selection == Selection::diverse && feature_width > 0) {
      if (feature_width > detail::widest_features || feature_dim > detail::widest_features)
        return fail(Errc::bad_shape, "features have {} elements but at most {} are supported: project them first",
                    feature_width > feature_dim ? feature_width : feature_dim, detail::widest_features);
      if (Status status = detail::check_greedy(tokens, feature_width); !status) return status;
      scratch += detail::GreedyRoom(config_.diversity, tokens, tokens, feature_width, feature_dim).floats;
      words = detail::greedy_words(tokens);
    }
    return reserve_for(tokens, tokens, 3 * tokens + 2 * spans + words, scratch);
  }

  // evidence: Probabilities, QueryKey, KeysOnly, Scores, NoEvidence or a type of yours (evidence.hpp), of layer K-1.
  // visual: the spans of visual tokens, sorted and disjoint; an empty list keeps everything. parallel_for: see Serial.
  // Complexity: that of the evidence's score(), and O(tokens).
  template <class Evidence, class ParallelFor = Serial>
  Kept prune(const Evidence& evidence, Span<const TokenSpan> visual, const ParallelFor& parallel_for = {}) noexcept {
    if constexpr (detail::expect_evidence<Evidence, Score>())
      return prune_checked(evidence, visual, parallel_for);
    else
      return {};
  }

  // Evidence as an adaptor hands it over: one that it could not make passes its status on.
  template <class Evidence, class ParallelFor = Serial>
  Kept prune(const Result<Evidence>& evidence, Span<const TokenSpan> visual,
             const ParallelFor& parallel_for = {}) noexcept {
    if (evidence) return prune(*evidence, visual, parallel_for);
    scores_.use(0);
    return failed(evidence.status);
  }

  // The scores behind the last prune(), one per visual token, in the order of for_each_visual(); empty after a rule that
  // looks at none and after a failure. See score() for scores that are tiny.
  Span<const Score> scores() const noexcept {
    const Span<Score> used = scores_.used();
    return {used.data(), used.size()};
  }

 private:
  template <class Evidence, class ParallelFor>
  Kept prune_checked(const Evidence& evidence, Span<const TokenSpan> visual, const ParallelFor& parallel_for) noexcept {
    scores_.use(0);
    const std::size_t tokens = evidence.prompt_tokens();
    // Shapes first: spans cannot be judged by a wrong one, and it could request an absurd allocation.
    if (uses_scores(config_) && !visual.empty()) {
      if (Status status = detail::check_ranking(evidence); !status) return failed(status);
    }
    if (Status status = validate(config_, visual, tokens); !status) return failed(status);
    const Result<detail::Images> images = detail::count_images(config_, visual);
    if (!images) return failed(images.status);
    const bool scored = detail::scores_wanted(config_, *images);
    const std::size_t length = tokens - images->tokens + images->keep, marks = select_scratch(config_, visual);
    const Result<std::size_t> diverse = detail::diverse_floats(config_, *images, evidence);
    if (!diverse) return failed(diverse.status);
    const std::size_t scratch = (scored ? score_scratch(evidence) : 0) + *diverse;
    if (Status status = reserve_for(images->tokens, length, marks, scratch); !status) return failed(status);

    const detail::Workspace<Score> work{scores_.first(images->tokens),
                                        prior_.first(config_.prior_rows.empty() ? 0 : images->tokens),
                                        marks_.first(marks), scratch_.first(scratch)};
    const Span<Index> kept = kept_.first(length);
    const Result<Selected> selected =
        detail::prune_validated(config_, evidence, visual, tokens, *images, work, kept.data(), parallel_for);
    if (!selected) return failed(selected.status);
    scores_.use(scored ? images->tokens : 0);
    return {{kept.data(), length}, tokens, selected->nan_scores, selected->zero_scores, {}};
  }

  static Kept failed(const Status& status) noexcept { return {{}, 0, 0, 0, status}; }

  Status reserve_for(std::size_t visual, std::size_t kept, std::size_t marks, std::size_t scratch) noexcept {
    if (Status status = scores_.reserve(visual); !status) return status;
    if (Status status = prior_.reserve(config_.prior_rows.empty() ? 0 : visual); !status) return status;
    if (Status status = marks_.reserve(marks); !status) return status;
    if (Status status = kept_.reserve(kept); !status) return status;
    return scratch_.reserve(scratch);
  }

  Config config_;
  detail::Buffer<Score> scores_, prior_;
  detail::Buffer<Mark<Score>> marks_;
  detail::Buffer<Index> kept_;
  detail::Buffer<float> scratch_;
};

}  // namespace FASTV_KIND

}  // namespace fastv

#include "detail/end.hpp"

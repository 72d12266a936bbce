// fastv: many sequences at once, each with its own settings, lengths and images.
#pragma once

#include "pruner.hpp"

#include "detail/begin.hpp"

namespace fastv {

// One sequence of a batch. Packed (varlen) batches hold sequence i in rows cumulative[i] .. cumulative[i + 1] - 1 of their
// tensors: first = cumulative[i]. Padded ones, [sequences, longest], hold it at first = i * longest with padding on the
// right, at first = (i + 1) * longest - tokens with padding on the left; padding belongs to no sequence and is dropped.
struct Request {
  Config config;                 // its own settings
  Span<const TokenSpan> visual;  // positions within the sequence; empty: it passes untouched
  std::size_t first = 0;         // its first row in the packed tensors
  std::size_t tokens = 0;        // its length, without padding
};

// The batch's kept rows. Valid until the next prune() of the same BatchPruner.
struct [[nodiscard]] KeptBatch {
  Span<const Index> indices;     // rows of the packed tensors, ascending
  Span<const Index> cumulative;  // [sequences + 1]: sequence i is now rows cumulative[i] .. cumulative[i + 1] - 1
  Span<const Kept> sequences;  // [sequences]: positions within each; one that failed keeps every token, and its status
                               // says why
  std::size_t failed = 0;      // sequences that failed
  Status status;               // of the batch as a whole

  // True where the batch as a whole is right; see failed and sequences for its sequences.
  FASTV_INLINE explicit operator bool() const noexcept { return static_cast<bool>(status); }
  // For the verbs, on packed tensors.
  FASTV_INLINE operator KeptRows() const noexcept { return {indices, KeptRows::unknown, status}; }
  FASTV_INLINE Errc code() const noexcept { return status.code; }             // of status
  FASTV_INLINE Message message() const noexcept { return status.message(); }  // of status
  FASTV_INLINE std::size_t size() const noexcept { return indices.size(); }   // rows that stay
  // What one sequence keeps, as positions within it, for its own tensors and pages. Of one that failed: every token.
  FASTV_INLINE KeptRows sequence(std::size_t i) const noexcept {
    return {sequences[i].indices, sequences[i].prompt_tokens};
  }
};

inline namespace FASTV_KIND {

// The sequence's own plan, before any value exists. O(spans).
inline Result<Plan> make_plan(const Request& request, std::size_t layers) noexcept {
  return make_plan(request.config, Prompt{request.tokens, layers, request.visual});
}

// A Pruner for many sequences at once. Score as there; nothing is allocated once it has seen its largest batch. Every
// member is noexcept; what can go wrong is in the result, for the batch and for each sequence.
template <class Score = float>
class BatchPruner {
 public:
  // requests: sorted by first, disjoint. evidence_of(i): the evidence of sequence i alone (a view into the packed tensors),
  // asked only for sequences with visual spans, once to prune and, if scores or features rank them, once before to check
  // it and to size the scratch memory. parallel_for spreads the sequences; results do not depend on it. A sequence's
  // failure does not touch the others. Complexity: the sum of the sequences'.
  template <class EvidenceOf, class ParallelFor = Serial>
  KeptBatch prune(Span<const Request> requests, const EvidenceOf& evidence_of,
                  const ParallelFor& parallel_for = {}) noexcept {
    using Evidence = decltype(detail::value_of(evidence_of(std::size_t{0})));
    if constexpr (detail::expect_evidence<Evidence, Score>())
      return prune_checked(requests, evidence_of, parallel_for);
    else
      return {};
  }

  // The scores behind the last prune() of one sequence; empty where it was not scored, after a failure and before the first
  // prune().
  Span<const Score> scores(std::size_t i) const noexcept {
    if (i >= places_.used().size() || !places_[i].scored) return {};
    const Span<Score> part = scores_.part(places_[i].visual, places_[i].images.tokens);
    return {part.data(), part.size()};
  }

 private:
  // Where a sequence's part of each buffer begins.
  struct Place {
    std::size_t visual = 0, marks = 0, scratch = 0, kept = 0;
    bool scored = false;
    detail::Images images = {};
  };

  template <class EvidenceOf, class ParallelFor>
  KeptBatch prune_checked(Span<const Request> requests, const EvidenceOf& evidence_of,
                          const ParallelFor& parallel_for) noexcept {
    const std::size_t n = requests.size();
    places_.use(0);
    if (Status status = detail::expect_room(requests, n, "the requests"); !status) return failure(status);
    if (Status status = places_.reserve(n + 1); !status) return failure(status);
    if (Status status = sequences_.reserve(n); !status) return failure(status);
    if (Status status = cumulative_.reserve(n + 1); !status) return failure(status);

    // Every sequence gets room for all its tokens, since one that fails keeps them.
    Place next;
    for (std::size_t i = 0; i < n; ++i) {
      const Request& request = requests[i];
      const std::size_t reach = i == 0 ? 0 : requests[i - 1].first + requests[i - 1].tokens;
      if (Status status = detail::check_place(i, request.first, request.tokens, reach); !status) return failure(status);
      Place& place = places_[i] = next;
      place.scored = false;
      sequences_[i] = {};
      sequences_[i].prompt_tokens = request.tokens;
      Status& status = sequences_[i].status;
      status = examine(request, place);
      next.kept += request.tokens;
      if (!status || request.visual.empty()) continue;
      const bool scored = detail::scores_wanted(request.config, place.images);
      if (scored || request.config.selection == Selection::diverse) {
        // Checked before its size is believed: one wrong shape must not move the others' memory.
        const auto evidence = evidence_of(i);
        if (scored) status = detail::check_ranking(evidence);
        if (status) status = check_length(evidence, request);
        if (!status) continue;
        const Result<std::size_t> diverse = detail::diverse_floats(request.config, place.images, evidence);
        status = diverse.status;
        if (!status) continue;
        place.scored = scored;
        next.scratch += (scored ? score_scratch(evidence) : 0) + *diverse;
      }
      next.visual += place.images.tokens;
      next.marks += select_scratch(request.config, request.visual);
    }
    places_[n] = next;
    if (Status status = scores_.reserve(next.visual); !status) return failure(status);
    if (Status status = prior_.reserve(next.visual); !status) return failure(status);
    if (Status status = marks_.reserve(next.marks); !status) return failure(status);
    if (Status status = scratch_.reserve(next.scratch); !status) return failure(status);
    if (Status status = own_.reserve(next.kept); !status) return failure(status);
    if (Status status = kept_.reserve(next.kept); !status) return failure(status);

    parallel_for(n, [&](std::size_t i) { prune_sequence(requests[i], i, evidence_of); });
    return gather_up(requests);
  }

  static KeptBatch failure(const Status& status) noexcept { return {{}, {}, {}, 0, status}; }

  static Status examine(const Request& request, Place& place) noexcept {
    place.images = {};
    if (request.visual.empty())
      return request.tokens == 0 ? fail(Errc::bad_prompt, "the prompt has 0 tokens: hand over at least 1") : Status{};
    if (Status status = validate(request.config, request.visual, request.tokens); !status) return status;
    const Result<detail::Images> images = detail::count_images(request.config, request.visual);
    if (images) place.images = *images;
    return images.status;
  }

  template <class Evidence>
  static Status check_length(const Evidence& evidence, const Request& request) noexcept {
    const std::size_t tokens = evidence.prompt_tokens();
    if (tokens == request.tokens) return {};
    return fail(Errc::bad_shape, "the evidence is of {} tokens but the sequence has {}: hand over its own", tokens,
                request.tokens);
  }

  template <class EvidenceOf>
  void prune_sequence(const Request& request, std::size_t i, const EvidenceOf& evidence_of) noexcept {
    Place& place = places_[i];
    Kept& kept = sequences_[i];
    Index* own = own_.part(place.kept, request.tokens).data();
    std::size_t count = request.tokens;
    bool pruned = false;
    if (kept.status && !request.visual.empty()) {
      const Place& end = places_[i + 1];
      const std::size_t visual = place.images.tokens;
      const detail::Workspace<Score> work{
          scores_.part(place.visual, visual), prior_.part(place.visual, request.config.prior_rows.empty() ? 0 : visual),
          marks_.part(place.marks, end.marks - place.marks), scratch_.part(place.scratch, end.scratch - place.scratch)};
      const auto evidence = evidence_of(i);
      Result<Selected> selected{{}, check_length(evidence, request)};
      if (selected)
        selected = detail::prune_validated(request.config, evidence, request.visual, request.tokens, place.images, work,
                                           own, Serial{});
      kept.status = selected.status;
      kept.nan_scores = selected->nan_scores;
      kept.zero_scores = selected->zero_scores;
      pruned = static_cast<bool>(selected);
      if (pruned) count = selected->count;
    }
    place.scored = place.scored && pruned;
    if (!pruned)
      for (std::size_t t = 0; t < count; ++t) own[t] = static_cast<Index>(t);
    kept.indices = {own, count};
  }

  // The sequences' kept rows in the packed tensors, one after the other.
  KeptBatch gather_up(Span<const Request> requests) noexcept {
    const std::size_t n = requests.size();
    Index* kept = kept_.first(0).data();
    std::size_t failed = 0, written = 0;
    cumulative_[0] = 0;
    for (std::size_t i = 0; i < n; ++i) {
      for (const Index index : sequences_[i]) kept[written++] = static_cast<Index>(requests[i].first + index);
      cumulative_[i + 1] = static_cast<Index>(written);
      failed += sequences_[i].status ? 0u : 1u;
    }
    places_.use(n);
    return {{kept, written}, {cumulative_.first(0).data(), n + 1}, {sequences_.first(0).data(), n}, failed, {}};
  }

  detail::Buffer<Place> places_;
  detail::Buffer<Kept> sequences_;
  detail::Buffer<Score> scores_, prior_;
  detail::Buffer<Mark<Score>> marks_;
  detail::Buffer<Index> own_, kept_, cumulative_;
  detail::Buffer<float> scratch_;
};

}  // namespace FASTV_KIND

}  // namespace fastv

#include "detail/end.hpp"

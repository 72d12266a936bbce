// fastv: many sequences at once, each with its own settings, lengths and pictures.
#pragma once

#include "pruner.hpp"

namespace fastv {

// One sequence of a batch. Packed (varlen) batches hold sequence i in rows cumulative[i] .. cumulative[i + 1] - 1 of
// their tensors: first = cumulative[i]. Padded ones, [sequences, longest], hold it at first = i * longest with
// padding on the right, at first = (i + 1) * longest - tokens with padding on the left; padding is in no sequence and
// goes.
struct Request {
  Config config;                 // its own settings
  Span<const TokenSpan> visual;  // positions within the sequence; empty: it passes untouched
  std::size_t first;             // its first row in the packed tensors
  std::size_t tokens;            // its length, without padding
};

// The sequence's own plan, before any value exists.
inline Result<Plan> make_plan(const Request& request, std::size_t layers) noexcept {
  return make_plan(request.config, {request.tokens, layers, request.visual});
}

// The batch's kept rows. Valid until the next prune() of the same BatchPruner.
struct [[nodiscard]] KeptBatch {
  Span<const Index> indices;     // rows of the packed tensors, ascending: for compact() and gather()
  Span<const Index> cumulative;  // [sequences + 1]: sequence i is now rows cumulative[i] .. cumulative[i + 1] - 1
  Span<const Status> statuses;   // [sequences]: a sequence that failed keeps every token, and says why here
  Span<const Index> nan_scores;  // [sequences]
  std::size_t failed = 0;        // sequences that failed
  Status status;                 // of the batch as a whole

  // True where the batch as a whole is right (see failed and statuses for its sequences), and what status says.
  explicit operator bool() const noexcept { return static_cast<bool>(status); }
  Errc code() const noexcept { return status.code; }
  Message message() const noexcept { return status.message(); }
  // The kept rows of one sequence.
  Span<const Index> sequence(std::size_t i) const noexcept {
    return {indices.data() + cumulative[i], static_cast<std::size_t>(cumulative[i + 1] - cumulative[i])};
  }
};

// A Pruner for many sequences at once. Score as there; nothing is allocated once it has seen its largest batch. Every
// member is noexcept; what can go wrong is in the result, for the batch and for each sequence.
template <class Score = float>
class BatchPruner {
 public:
  // requests: sorted by first, disjoint. evidence_of(i): the evidence of sequence i alone (a view into the packed
  // tensors), asked only for sequences with visual tokens, once to prune and, if scores rank them, once before to check
  // it and to size the scratch memory.
  // parallel_for spreads the sequences; results do not depend on it. A sequence's failure does not touch the others.
  template <class EvidenceOf, class ParallelFor = Serial>
  KeptBatch prune(Span<const Request> requests, const EvidenceOf& evidence_of,
                  const ParallelFor& parallel_for = {}) noexcept {
    static_assert(
        detail::is_evidence<decltype(evidence_of(std::size_t{0}))>,
        "evidence_of(i) must return fastv::Probabilities, QueryKey, KeysOnly, Scores or NoEvidence of sequence "
        "i: see fastv::probabilities() and fastv::query_key()");
    const std::size_t n = requests.size();
    if (Status status = detail::check_room(requests, n, "the requests"); !status) return failure(status);
    if (Status status = slots_.reserve(n + 1); !status) return failure(status);
    if (Status status = statuses_.reserve(n); !status) return failure(status);
    if (Status status = nans_.reserve(n); !status) return failure(status);
    if (Status status = cumulative_.reserve(n + 1); !status) return failure(status);

    // Every sequence gets room for all its tokens, since one that fails keeps them.
    Slot next;
    for (std::size_t i = 0; i < n; ++i) {
      const Request& request = requests[i];
      const std::size_t reach = i == 0 ? 0 : requests[i - 1].first + requests[i - 1].tokens;
      if (request.first < reach)
        return failure(detail::fail(Errc::sequences_overlap, "", detail::number(request.first), detail::number(reach),
                                    detail::number(i)));
      if (request.first > max_tokens || request.tokens > max_tokens - request.first)
        return failure(
            detail::fail(Errc::too_many_tokens, "", detail::number(request.tokens), detail::number(max_tokens)));
      slots_[i] = next;
      statuses_[i] = check_request(request);
      next.kept += request.tokens;
      if (!statuses_[i] || request.visual.empty()) continue;
      next.visual += visual_tokens(request.visual);
      next.spans += request.visual.size();
      if (request.config.selection != Selection::top_k) continue;
      // Checked before its size is believed: one wrong shape must not move the others' memory.
      const auto evidence = evidence_of(i);
      statuses_[i] = check_length(evidence, request);
      if (statuses_[i]) statuses_[i] = check(evidence);
      if (statuses_[i]) next.scratch += score_scratch(evidence);
    }
    slots_[n] = next;
    if (Status status = scores_.reserve(next.visual); !status) return failure(status);
    if (Status status = prior_.reserve(next.visual); !status) return failure(status);
    if (Status status = marks_.reserve(next.visual); !status) return failure(status);
    if (Status status = quotas_.reserve(next.spans); !status) return failure(status);
    if (Status status = scratch_.reserve(next.scratch); !status) return failure(status);
    if (Status status = kept_.reserve(next.kept); !status) return failure(status);

    parallel_for(n, [&](std::size_t i) { prune_sequence(requests[i], i, evidence_of); });
    return gather_up(requests);
  }

  // The scores behind the last prune() of one sequence; empty where it was not scored.
  Span<const Score> scores(std::size_t i) const noexcept {
    const std::size_t count = slots_[i].scored ? slots_[i + 1].visual - slots_[i].visual : 0;
    return scores_.part(slots_[i].visual, count);
  }

 private:
  // Where a sequence's part of each buffer begins.
  struct Slot {
    std::size_t visual = 0, spans = 0, scratch = 0, kept = 0;
    bool scored = false;
  };

  static KeptBatch failure(const Status& status) noexcept { return {{}, {}, {}, {}, 0, status}; }

  static Status check_request(const Request& request) noexcept {
    if (request.visual.empty()) return request.tokens == 0 ? detail::fail(Errc::no_tokens) : Status{};
    if (Status status = check(request.config); !status) return status;
    if (Status status = check(request.visual, request.tokens); !status) return status;
    return kept_visual(request.config, request.visual).status;
  }

  template <class Evidence>
  static Status check_length(const Evidence& evidence, const Request& request) noexcept {
    const std::size_t tokens = prompt_tokens(evidence);
    if (tokens == request.tokens) return {};
    return detail::fail(Errc::tokens_differ, "", detail::number(tokens), detail::number(request.tokens));
  }

  template <class EvidenceOf>
  void prune_sequence(const Request& request, std::size_t i, const EvidenceOf& evidence_of) noexcept {
    Slot& slot = slots_[i];
    const Slot& end = slots_[i + 1];
    Index* kept = kept_.part(slot.kept, request.tokens).data();
    std::size_t count = request.tokens;
    nans_[i] = 0;
    if (statuses_[i] && !request.visual.empty()) {
      const auto evidence = evidence_of(i);
      const std::size_t visual = end.visual - slot.visual;
      const detail::Workspace<Score> work{
          scores_.part(slot.visual, visual), prior_.part(slot.visual, request.config.prior_rows.empty() ? 0 : visual),
          marks_.part(slot.visual, visual), quotas_.part(slot.spans, end.spans - slot.spans),
          scratch_.part(slot.scratch, end.scratch - slot.scratch)};
      Result<Selected> selected{{}, check_length(evidence, request)};
      if (selected)
        selected = detail::prune_one(request.config, evidence, request.visual, work, {kept, request.tokens}, Serial{});
      statuses_[i] = selected.status;
      slot.scored = selected && request.config.selection == Selection::top_k;
      if (selected) {
        nans_[i] = static_cast<Index>(selected->nan_scores);
        count = selected->count;
      }
    }
    if (!statuses_[i] || request.visual.empty()) {
      for (std::size_t t = 0; t < count; ++t) kept[t] = static_cast<Index>(t);
    }
    for (std::size_t t = 0; t < count; ++t) kept[t] += static_cast<Index>(request.first);
    cumulative_[i + 1] = static_cast<Index>(count);
  }

  // Closes the gaps between the sequences' kept rows.
  KeptBatch gather_up(Span<const Request> requests) noexcept {
    const std::size_t n = requests.size();
    Index* kept = kept_.first(0).data();
    std::size_t failed = 0;
    cumulative_[0] = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const std::size_t count = cumulative_[i + 1], to = cumulative_[i];
      if (count > 0) std::memmove(kept + to, kept + slots_[i].kept, count * sizeof(Index));
      cumulative_[i + 1] = static_cast<Index>(to + count);
      failed += statuses_[i] ? 0u : 1u;
    }
    return {{kept, cumulative_[n]},
            {cumulative_.first(0).data(), n + 1},
            {statuses_.first(0).data(), n},
            {nans_.first(0).data(), n},
            failed,
            {}};
  }

  detail::Buffer<Slot> slots_;
  detail::Buffer<Status> statuses_;
  detail::Buffer<Score> scores_, prior_;
  detail::Buffer<detail::Word<Score>> marks_;
  detail::Buffer<Index> quotas_, kept_, cumulative_, nans_;
  detail::Buffer<float> scratch_;
};

}  // namespace fastv

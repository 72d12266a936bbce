// fastv::Pruner: the front door. Config in, kept indices out.
#pragma once

#include <new>
#include <utility>

#include "apply.hpp"
#include "plan.hpp"
#include "scorers.hpp"
#include "select.hpp"

namespace fastv {

namespace detail {

// Memory that only grows, without exceptions.
template <class T>
class Buffer {
 public:
  Buffer() noexcept = default;
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() { delete[] data_; }

  Status reserve(std::size_t size) noexcept {
    if (size <= size_) return {};
    // A size whose bytes do not fit makes g++'s new T[size] throw, nothrow or not.
    const bool sane = size <= static_cast<std::size_t>(-1) / 2 / sizeof(T);
    T* data = sane ? new (std::nothrow) T[size] : nullptr;
    if (data == nullptr)
      return fail(Errc::out_of_memory, "", number(sane ? size * sizeof(T) : static_cast<std::size_t>(-1)));
    delete[] data_;
    data_ = data;
    size_ = size;
    used_ = 0;
    return {};
  }
  Span<T> first(std::size_t size) const noexcept { return {data_, size}; }
  Span<T> part(std::size_t begin, std::size_t size) const noexcept { return {data_ + begin, size}; }
  T& operator[](std::size_t i) const noexcept { return data_[i]; }
  // The entries that hold a result.
  void use(std::size_t size) noexcept { used_ = size; }
  Span<T> used() const noexcept { return {data_, used_}; }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(used_, other.used_);
  }

  T* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t used_ = 0;
};

// Room for the intermediate values of one sequence.
template <class Score>
struct Workspace {
  Span<Score> scores, prior;  // [visual tokens]; prior only where the settings ask for a correction
  Span<Word<Score>> marks;    // [visual tokens]
  Span<Index> quotas;         // [spans]
  Span<float> scratch;        // score_scratch(evidence)
};

template <class Score, class Evidence, class ParallelFor>
Status score_all(const Config& config, const Evidence& evidence, Span<const TokenSpan> visual,
                 const Workspace<Score>& work, const ParallelFor& parallel_for) noexcept {
  if (!config.prior_rows.empty() && !has_rows(evidence)) return fail(Errc::prior_without_rows);
  if (Status status = score<Score>(config, evidence, visual, work.scores, work.scratch, parallel_for); !status)
    return status;
  if (config.prior_rows.empty()) return {};
  const RowSet prior(ScoreRows::listed, config.prior_rows, prompt_tokens(evidence));
  if (Status status = score<Score>(prior, evidence, visual, work.prior, work.scratch, parallel_for); !status)
    return status;
  return prior_corrected(work.scores, Span<const Score>(work.prior.data(), work.prior.size()));
}
template <class Score, class ParallelFor>
Status score_all(const Config&, const NoEvidence&, Span<const TokenSpan>, const Workspace<Score>&,
                 const ParallelFor&) noexcept {
  return fail(Errc::evidence_missing);
}

// Scores, if the rule looks at scores, and selects. kept: room for every token that stays.
template <class Score, class Evidence, class ParallelFor>
Result<Selected> prune_one(const Config& config, const Evidence& evidence, Span<const TokenSpan> visual,
                           const Workspace<Score>& work, Span<Index> kept, const ParallelFor& parallel_for) noexcept {
  const bool scored = config.selection == Selection::top_k && work.scores.size() > 0;
  if (scored) {
    if (Status status = score_all(config, evidence, visual, work, parallel_for); !status) return {{}, status};
  }
  const Span<const Score> scores{work.scores.data(), scored ? work.scores.size() : 0};
  return select<Score>(config, scores, visual, prompt_tokens(evidence), kept, work.quotas, work.marks);
}

}  // namespace detail

namespace detail {

// Evidence is what prompt_tokens() can be asked of.
template <class Evidence, class = void>
inline constexpr bool is_evidence = false;
template <class Evidence>
inline constexpr bool is_evidence<Evidence, decltype(static_cast<void>(prompt_tokens(made<const Evidence&>())))> = true;

}  // namespace detail

// What prune() returns. The indices stay valid until the next prune() or reserve() of the same Pruner.
struct [[nodiscard]] Kept {
  Span<const Index> indices;   // ascending positions in the whole prompt; every text token is among them
  std::size_t tokens = 0;      // n: length of the prompt, and so the position id of the first decoded token
  std::size_t nan_scores = 0;  // visual scores that were NaN, ranked below all others
  Status status;               // why nothing is kept, where something is wrong

  // True where pruning succeeded; what status says; and the indices as a range.
  explicit operator bool() const noexcept { return static_cast<bool>(status); }
  Errc code() const noexcept { return status.code; }
  Message message() const noexcept { return status.message(); }
  std::size_t size() const noexcept { return indices.size(); }
  const Index* begin() const noexcept { return indices.begin(); }
  const Index* end() const noexcept { return indices.end(); }
};

// Scores the visual tokens of one sequence and picks those that stay.
//
// Score is the type scores are summed in: float (default) or double. Scratch memory is sized by reserve(), or by the
// first prune() of that size; after that nothing is allocated. One Pruner per sequence or per thread. Every member is
// noexcept; what can go wrong is in the result. A schedule of several stages is a Pruner per stage; remaining() gives
// the second its spans.
template <class Score = float>
class Pruner {
 public:
  // config is copied; a list of rows in it is read at each prune(). Allocates nothing yet.
  explicit Pruner(const Config& config = {}) noexcept : config_(config) {}

  // The settings it was made with.
  const Config& config() const noexcept { return config_; }

  // True once, after the layer at which to prune: layers_run counts the decoder layers that have run. At K = 0 it is
  // true before the first layer.
  bool due(std::size_t layers_run) const noexcept { return layers_run == config_.filtering_layer; }

  // All lengths before any value exists. The only place that sees the number of layers, and so the only one that can
  // tell that filtering_layer lies past the last. O(spans).
  Result<Plan> plan(const Prompt& prompt) const noexcept { return make_plan(config_, prompt); }

  // Room for prompts of up to `tokens` tokens in `spans` spans, scored from queries and keys of up to `heads` heads
  // of dimension `dim` (0 where the evidence is something else).
  Status reserve(std::size_t tokens, std::size_t spans, std::size_t heads = 0, std::size_t dim = 0) noexcept {
    QueryKey<float> shape{};
    shape.heads = heads;
    shape.keys = tokens;
    shape.dim = dim;
    return reserve_for(tokens, tokens, spans, heads == 0 ? 0 : score_scratch(shape));
  }

  // evidence: Probabilities, QueryKey, KeysOnly, Scores or NoEvidence of layer K-1. visual: the spans of visual
  // tokens, sorted and disjoint; an empty list keeps everything. parallel_for: see Serial. Complexity: that of
  // score() and select().
  template <class Evidence, class ParallelFor = Serial>
  Kept prune(const Evidence& evidence, Span<const TokenSpan> visual, const ParallelFor& parallel_for = {}) noexcept {
    static_assert(detail::is_evidence<Evidence>,
                  "prune() takes fastv::Probabilities, QueryKey, KeysOnly, Scores or NoEvidence: make one of your "
                  "tensors by fastv::probabilities() or fastv::query_key(); for Eigen, ggml and LibTorch include "
                  "<fastv/eigen.hpp>, <fastv/ggml.hpp> or <fastv/torch.hpp>");
    const std::size_t tokens = prompt_tokens(evidence);
    scores_.use(0);
    if (Status status = check(config_); !status) return failed(status);
    if (Status status = check(visual, tokens); !status) return failed(status);
    const Result<std::size_t> keep = kept_visual(config_, visual);
    if (!keep) return failed(keep.status);
    const std::size_t count = visual_tokens(visual), length = tokens - count + *keep;
    const bool ranks = config_.selection == Selection::top_k && count > 0;
    // Before memory is asked for: wrong shapes would ask for any amount of it.
    if (Status status = ranks ? check(evidence) : Status{}; !status) return failed(status);
    const std::size_t scratch = ranks ? score_scratch(evidence) : 0;
    if (Status status = reserve_for(count, length, visual.size(), scratch); !status) return failed(status);

    const detail::Workspace<Score> work{scores_.first(count), prior_.first(config_.prior_rows.empty() ? 0 : count),
                                        marks_.first(count), quotas_.first(visual.size()), scratch_.first(scratch)};
    const Span<Index> kept = kept_.first(length);
    const Result<Selected> selected = detail::prune_one(config_, evidence, visual, work, kept, parallel_for);
    if (!selected) return failed(selected.status);
    scores_.use(ranks ? count : 0);
    return {{kept.data(), length}, tokens, selected->nan_scores, {}};
  }

  // Evidence as an adaptor hands it over: one that it could not make passes its status on.
  template <class Evidence, class ParallelFor = Serial>
  Kept prune(const Result<Evidence>& evidence, Span<const TokenSpan> visual,
             const ParallelFor& parallel_for = {}) noexcept {
    if (evidence) return prune(*evidence, visual, parallel_for);
    scores_.use(0);
    return failed(evidence.status);
  }

  // The scores behind the last prune(), one per visual token, spans in order; empty after a rule that looks at none
  // and after a failure.
  Span<const Score> scores() const noexcept { return scores_.used(); }

 private:
  static Kept failed(const Status& status) noexcept { return {{}, 0, 0, status}; }

  Status reserve_for(std::size_t visual, std::size_t kept, std::size_t spans, std::size_t scratch) noexcept {
    if (Status status = scores_.reserve(visual); !status) return status;
    if (Status status = prior_.reserve(config_.prior_rows.empty() ? 0 : visual); !status) return status;
    if (Status status = marks_.reserve(visual); !status) return status;
    if (Status status = kept_.reserve(kept); !status) return status;
    if (Status status = quotas_.reserve(spans); !status) return status;
    return scratch_.reserve(scratch);
  }

  Config config_;
  detail::Buffer<Score> scores_, prior_;
  detail::Buffer<detail::Word<Score>> marks_;
  detail::Buffer<Index> kept_, quotas_;
  detail::Buffer<float> scratch_;
};

// apply.hpp on the result of prune(). One that failed moves nothing and passes its status on.
inline Status compact(const Kept& kept, const Rows& rows) noexcept {
  return kept ? compact(kept.indices, rows) : kept.status;
}
template <class T>
Status compact(const Kept& kept, Span<T> values) noexcept {
  return kept ? compact(kept.indices, values) : kept.status;
}
}  // namespace fastv

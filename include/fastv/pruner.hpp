// fastv::Pruner: the front door. Config in, kept indices out.
#pragma once

#include <new>
#include <utility>

#include "apply.hpp"
#include "plan.hpp"
#include "score.hpp"
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

}  // namespace detail

// What prune() returns. The indices stay valid until the next prune() or reserve() of the same Pruner.
struct [[nodiscard]] Kept {
  Span<const Index> indices;   // ascending positions in the whole prompt; every text token is among them
  std::size_t tokens = 0;      // n: length of the prompt, and so the position id of the first decoded token
  std::size_t nan_scores = 0;  // visual scores that were NaN, ranked below all others
  Status status;

  explicit operator bool() const noexcept { return static_cast<bool>(status); }
  Errc code() const noexcept { return status.code; }
  Message message() const noexcept { return status.message(); }
  std::size_t size() const noexcept { return indices.size(); }
  const Index* begin() const noexcept { return indices.begin(); }
  const Index* end() const noexcept { return indices.end(); }
};

// Scores the visual tokens of one sequence and picks those that stay.
//
// Score is the type scores are summed in: float (default) or double. Scratch memory is sized by reserve(), or
// by the first prune() of that size; after that nothing is allocated. One Pruner per sequence or per
// thread. Every member is noexcept; what can go wrong is in the result.
template <class Score = float>
class Pruner {
 public:
  explicit Pruner(const Config& config = {}) noexcept : config_(config) {}

  const Config& config() const noexcept { return config_; }

  // True once, after the layer at which to prune: layers_run counts the decoder layers that have run on
  // the whole prompt. At K = 0 it is true before the first layer.
  bool due(std::size_t layers_run) const noexcept { return layers_run == config_.filtering_layer; }

  // All lengths before any value exists. The only place that sees the number of layers, and so the only
  // one that can tell that filtering_layer lies past the last. O(spans).
  Result<Plan> plan(const Prompt& prompt) const noexcept { return make_plan(config_, prompt); }

  // Room for prompts of up to `tokens` tokens in `spans` spans, scored from queries and keys of up to
  // `heads` heads of dimension `dim` (0 where the evidence is something else).
  Status reserve(std::size_t tokens, std::size_t spans, std::size_t heads = 0, std::size_t dim = 0) noexcept {
    QueryKey<float> shape{};
    shape.heads = heads;
    shape.keys = tokens;
    shape.dim = dim;
    return reserve_for(tokens, tokens, spans, heads == 0 ? 0 : score_scratch(shape));
  }

  // evidence: Probabilities, QueryKey, Scores or NoEvidence of layer K-1. visual: the spans of visual
  // tokens, sorted and disjoint; an empty list keeps everything.
  // Complexity: that of score() and select().
  template <class Evidence>
  Kept prune(const Evidence& evidence, Span<const TokenSpan> visual) noexcept {
    const std::size_t tokens = prompt_tokens(evidence);
    scores_.use(0);
    if (Status status = check(config_); !status) return failed(status);
    if (Status status = check(visual, tokens); !status) return failed(status);
    const Result<std::size_t> keep = kept_visual(config_, visual);
    if (!keep) return failed(keep.status);
    const std::size_t count = visual_tokens(visual), length = tokens - count + *keep;
    const bool ranks = config_.selection == Selection::top_k && count > 0;
    if (Status status = reserve_for(count, length, visual.size(), ranks ? score_scratch(evidence) : 0); !status)
      return failed(status);

    if (ranks) {
      if (Status status = score_visual(evidence, visual, count); !status) return failed(status);
    }
    const Span<Index> kept = kept_.first(length);
    const Result<Selected> selected =
        select<Score>(config_, scores(), visual, tokens, kept, quotas_.first(visual.size()));
    if (!selected) return failed(selected.status);
    return {{kept.data(), length}, tokens, selected->nan_scores, {}};
  }

  // The scores behind the last prune(), one per visual token, spans in order; empty after a rule that
  // looks at none.
  Span<const Score> scores() const noexcept { return scores_.used(); }

 private:
  static Kept failed(const Status& status) noexcept { return {{}, 0, 0, status}; }

  Status reserve_for(std::size_t visual, std::size_t kept, std::size_t spans, std::size_t scratch) noexcept {
    if (Status status = scores_.reserve(visual); !status) return status;
    if (Status status = kept_.reserve(kept); !status) return status;
    if (Status status = quotas_.reserve(spans); !status) return status;
    return scratch_.reserve(scratch);
  }

  template <class Evidence>
  Status score_visual(const Evidence& evidence, Span<const TokenSpan> visual, std::size_t count) noexcept {
    const Status status =
        score<Score>(config_, evidence, visual, scores_.first(count), scratch_.first(score_scratch(evidence)));
    if (status) scores_.use(count);
    return status;
  }
  Status score_visual(const NoEvidence&, Span<const TokenSpan>, std::size_t) noexcept {
    return detail::fail(Errc::evidence_missing);
  }

  Config config_;
  detail::Buffer<Score> scores_;
  detail::Buffer<Index> kept_;
  detail::Buffer<Index> quotas_;
  detail::Buffer<float> scratch_;
};

// Moves the kept rows of a tensor to its front; see apply.hpp. A prune() that failed moves nothing.
inline Status compact(const Kept& kept, const Rows& rows) noexcept {
  return kept ? compact(kept.indices, rows) : kept.status;
}
template <class T>
Status compact(const Kept& kept, Span<T> values) noexcept {
  return kept ? compact(kept.indices, values) : kept.status;
}

}  // namespace fastv

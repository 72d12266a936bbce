// fastv: scores -> kept indices, always exactly as many as planned.
#pragma once

#include "plan.hpp"

namespace fastv {

namespace detail {

// The `count`-th greatest of the n order keys: `key`, and how many of the count lie above it. Radix
// select, one byte a pass from the top: O(n), no copy, no bad case.
template <class Key>
struct Cut {
  Key key;
  std::size_t above;
};
template <class Score>
Cut<Word<Score>> find_cut(const Score* scores, std::size_t n, std::size_t count) noexcept {
  using Key = Word<Score>;
  Key prefix = 0, mask = 0;
  std::size_t wanted = count;  // rank of the cut among the keys that share the prefix
  for (int shift = 8 * static_cast<int>(sizeof(Key)) - 8; shift >= 0; shift -= 8) {
    std::uint32_t histogram[256] = {};
    for (std::size_t i = 0; i < n; ++i) {
      const Key key = order_key(scores[i]);
      histogram[(key >> shift) & 255u] += (key & mask) == prefix ? 1u : 0u;
    }
    Key byte = 255;
    while (histogram[byte] < wanted) wanted -= histogram[byte--];
    prefix |= byte << shift;
    mask |= Key{255} << shift;
  }
  return {prefix, count - wanted};
}

// SplitMix64 (Steele, Lea, Flood 2014), so that a seed means the same on every platform.
class Random {
 public:
  explicit Random(std::uint64_t seed) noexcept : state_(seed) {}
  // Uniform in [0, bound): the high half of a 32 x 32 bit product; the bias is below bound / 2^32.
  std::size_t below(std::size_t bound) noexcept {
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return static_cast<std::size_t>(((z >> 32) * static_cast<std::uint64_t>(bound)) >> 32);
  }

 private:
  std::uint64_t state_;
};

}  // namespace detail

// Each rule writes the numbers of the `count` tokens it keeps, ascending from 0, into kept[0 .. count).
// Precondition of all: count <= n.

// The count highest scores; of equal scores the earlier; NaN below everything. O(n).
template <class Score>
void select_top_k(const Score* scores, std::size_t n, std::size_t count, Index* kept) noexcept {
  if (count == 0) return;
  const auto cut = detail::find_cut(scores, n, count);
  std::size_t ties = count - cut.above, k = 0;  // places left for tokens that equal the cut
  for (std::size_t i = 0; k < count; ++i) {     // without branches on the scores: they cannot be predicted
    const auto key = detail::order_key(scores[i]);
    const std::size_t tie = static_cast<std::size_t>(key == cut.key) & static_cast<std::size_t>(ties != 0);
    kept[k] = static_cast<Index>(i);
    k += static_cast<std::size_t>(key > cut.key) | tie;
    ties -= tie;
  }
}

// Every subset of count tokens equally likely (Knuth, The Art of Computer Programming 3.4.2, algorithm
// S). O(n).
inline void select_random(std::size_t n, std::size_t count, detail::Random& random, Index* kept) noexcept {
  for (std::size_t i = 0, k = 0; k < count; ++i)
    if (random.below(n - i) < count - k) kept[k++] = static_cast<Index>(i);
}

// Evenly spaced: without a grid (columns = 0) the middles of count equal stretches; with one, every row of
// the picture gets its even share, shifted from the row above by the golden part of a step, which spreads
// the kept tokens evenly in both directions at any count (a Fibonacci lattice). O(count + rows).
inline void select_uniform(std::size_t n, std::size_t columns, std::size_t count, Index* kept) noexcept {
  const std::uint64_t width = columns == 0 ? n : columns, height = columns == 0 ? 1 : n / columns;
  const std::uint64_t step = 65536, golden = 40503;  // 65536 / 1.618
  std::uint64_t offset = step / 2;                   // of a row's first kept token, in parts of a step
  std::size_t k = 0;
  for (std::uint64_t row = 0; row < height; ++row) {
    const std::uint64_t share = (row + 1) * count / height - row * count / height;
    for (std::uint64_t i = 0; i < share; ++i) {
      // (i + offset / step) * width / share, in parts that cannot overflow
      const std::uint64_t whole = i * width / share, rest = i * width % share;
      kept[k++] = static_cast<Index>(row * width + whole + (rest * step + offset * width) / (share * step));
    }
    if (share > 0) offset = (offset + golden) % step;
  }
}

// What select() returns: the number of kept indices, and of visual scores that are NaN.
struct Selected {
  std::size_t count = 0;
  std::size_t nan_scores = 0;
};

// Ascending positions in the whole prompt of every token that stays: all text, and of each span (or of
// all spans together, Quota::pooled) the planned number of visual tokens.
//
// scores: one per visual token, spans in order; may be empty for random and uniform.
// kept: room for all `tokens` positions is always enough; Plan::kept() is how many are written.
// quotas: one entry per span, scratch. Re-entrant; no allocation. O(tokens).
template <class Score>
Result<Selected> select(const Config& config, Span<const Score> scores, Span<const TokenSpan> visual,
                        std::size_t tokens, Span<Index> kept, Span<Index> quotas) noexcept {
  using detail::fail;
  using detail::number;
  if (Status status = check(config); !status) return {{}, status};
  if (Status status = check(visual, tokens); !status) return {{}, status};
  const std::size_t total = visual_tokens(visual);
  const Result<std::size_t> keep = kept_visual(config, visual);
  if (!keep) return {{}, keep.status};
  if (kept.size() < tokens - total + *keep)
    return {{}, fail(Errc::room_too_small, "kept indices", number(kept.size()), number(tokens - total + *keep))};

  Selected selected;
  if (config.selection == Selection::top_k) {
    if (scores.size() != total) return {{}, fail(Errc::scores_size, "", number(scores.size()), number(total))};
    if (total > 0 && scores.data() == nullptr) return {{}, fail(Errc::null_data, "scores")};
    std::size_t infinite = 0;
    for (std::size_t i = 0; i < total; ++i) {
      infinite += detail::is_infinite(scores[i]) ? 1u : 0u;
      selected.nan_scores += detail::is_nan(scores[i]) ? 1u : 0u;
    }
    for (std::size_t i = 0; infinite > 0; ++i)
      if (detail::is_infinite(scores[i])) return {{}, fail(Errc::infinite_score, "", 0, 0, number(i))};
    if (total > 0 && selected.nan_scores == total) return {{}, fail(Errc::all_scores_nan, "", number(total))};
  }
  if (config.quota == Quota::per_span) {
    if (Status status = span_quotas(config, visual, quotas); !status) return {{}, status};
  }

  detail::Random random(config.seed);
  const auto choose = [&](std::size_t first, std::size_t n, std::size_t columns, std::size_t count, Index* out) {
    switch (config.selection) {
      case Selection::top_k: select_top_k(scores.data() + first, n, count, out); break;
      case Selection::random: select_random(n, count, random, out); break;
      case Selection::uniform: select_uniform(n, columns, count, out); break;
    }
  };

  // Visual tokens are numbered 0 .. total - 1 across the spans. Pooled, their chosen numbers wait at the
  // end of `kept`, where the walk below reads them before it overwrites them.
  const std::size_t length = tokens - total + *keep;
  const Index* pool = kept.data() + (length - *keep);
  if (config.quota == Quota::pooled) choose(0, total, 0, *keep, kept.data() + (length - *keep));

  std::size_t written = 0, numbered = 0, pooled = 0, position = 0;
  const auto keep_text_up_to = [&](std::size_t end) {
    while (position < end) kept[written++] = static_cast<Index>(position++);
  };
  for (std::size_t s = 0; s < visual.size(); ++s) {
    const TokenSpan& span = visual[s];
    keep_text_up_to(span.first);
    if (config.quota == Quota::per_span) {
      Index* chosen = kept.data() + written;
      choose(numbered, span.count, span.columns, quotas[s], chosen);
      for (std::size_t i = 0; i < quotas[s]; ++i) chosen[i] += static_cast<Index>(span.first);
      written += quotas[s];
    } else {
      for (; pooled < *keep && pool[pooled] < numbered + span.count; ++pooled)
        kept[written++] = static_cast<Index>(pool[pooled] - numbered + span.first);
    }
    numbered += span.count;
    position = span.first + span.count;
  }
  keep_text_up_to(tokens);
  selected.count = written;
  return {selected, {}};
}

}  // namespace fastv

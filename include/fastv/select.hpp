// fastv: scores -> kept indices, always exactly as many as planned.
//
// Every rule works on marks, one unsigned integer a visual token: first the order key of its score, in the end all
// ones where the token stays. One walk over the prompt then writes the positions of the text and of the marked
// tokens.
#pragma once

#include "plan.hpp"

namespace fastv {

namespace detail {

template <class Mark>
inline constexpr Mark chosen = static_cast<Mark>(~Mark{0});  // above the key of every float

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

// ---- the rules ----------------------------------------------------------------------------------
// Each sets `count` of n marks to all ones. Precondition of all: count <= n.

// The highest marks; of equal ones the earlier. Marks not chosen become 0. visit(take) calls take(mark &) for each of
// the tokens that compete, in order. O(tokens).
template <class Mark, class Visit>
void mark_top(std::size_t count, Visit visit) noexcept {
  detail::Cut<Mark> cut{detail::chosen<Mark>, 0};  // of none: nothing lies above, no place is left for ties
  if (count > 0) cut = detail::find_cut<Mark>(count, [&](auto take) { visit([&](Mark& mark) { take(mark); }); });
  std::size_t ties = count - cut.above;  // places left for tokens that equal the cut
  visit([&](Mark& mark) {                // without branches on the scores: they cannot be predicted
    const std::size_t tie = static_cast<std::size_t>(mark == cut.key) & static_cast<std::size_t>(ties != 0);
    const std::size_t stays = static_cast<std::size_t>(mark > cut.key) | tie;
    ties -= tie;
    mark = static_cast<Mark>(Mark{0} - static_cast<Mark>(stays));
  });
}

// Every subset equally likely (Knuth, The Art of Computer Programming 3.4.2, algorithm S). O(n).
template <class Mark>
void mark_random(Mark* marks, std::size_t n, std::size_t count, detail::Random& random) noexcept {
  for (std::size_t i = 0, k = 0; k < count; ++i)
    if (random.below(n - i) < count - k) {
      marks[i] = detail::chosen<Mark>;
      ++k;
    }
}

// Evenly spaced: without a grid (columns = 0) the middles of count equal stretches; with one, every row of the picture
// gets its even share, shifted from the row above by the golden part of a step, which spreads the kept tokens evenly in
// both directions at any count (a Fibonacci lattice). O(count + rows).
template <class Mark>
void mark_uniform(Mark* marks, std::size_t n, std::size_t columns, std::size_t count) noexcept {
  const std::uint64_t width = columns == 0 ? n : columns, height = columns == 0 ? 1 : n / columns;
  const std::uint64_t step = 65536, golden = 40503;  // 65536 / 1.618
  std::uint64_t offset = step / 2;                   // of a row's first kept token, in parts of a step
  for (std::uint64_t row = 0; row < height; ++row) {
    const std::uint64_t share = (row + 1) * count / height - row * count / height;
    for (std::uint64_t i = 0; i < share; ++i) {
      // (i + offset / step) * width / share, in parts that cannot overflow
      const std::uint64_t whole = i * width / share, rest = i * width % share;
      marks[row * width + whole + (rest * step + offset * width) / (share * step)] = detail::chosen<Mark>;
    }
    if (share > 0) offset = (offset + golden) % step;
  }
}

namespace detail {

// Shares the count of one picture out: uniform_share of it goes to an even grid (FEATHER, arXiv 2412.13180, adds a
// strided grid; here it comes out of the count), whose marks are set, and the rest to groups of tokens, which keep
// their highest scores: one group, or one per window (Window FastV, arXiv 2502.11501, with Hamilton's rounding so that
// the count is exact).
//
// each(quota, tokens): quota counts the group's tokens that the grid has taken; tokens(take) calls take(i) for each of
// its tokens, those included, in order.
template <class Mark, class Each>
void for_each_group(const Config& config, Mark* marks, std::size_t n, std::size_t columns, std::size_t count,
                    Each each) noexcept {
  const auto rounded = static_cast<std::size_t>(static_cast<double>(count) * config.uniform_share + 0.5);
  const std::size_t even = rounded < count ? rounded : count;
  if (even > 0) mark_uniform(marks, n, columns, even);
  if (config.window_rows == 0) {
    each(count, [&](auto take) {
      for (std::size_t i = 0; i < n; ++i) take(i);
    });
    return;
  }
  const std::size_t rows = n / columns, down = (rows - 1) / config.window_rows + 1,
                    across = (columns - 1) / config.window_columns + 1;
  const auto window = [&](std::size_t w, auto take) {
    const std::size_t top = w / across * config.window_rows, left = w % across * config.window_columns;
    const std::size_t bottom = config.window_rows < rows - top ? top + config.window_rows : rows;
    const std::size_t right = config.window_columns < columns - left ? left + config.window_columns : columns;
    for (std::size_t row = top; row < bottom; ++row)
      for (std::size_t column = left; column < right; ++column) take(row * columns + column);
  };
  // Tokens of window w that the even grid has taken, or has not.
  const auto taken = [&](std::size_t w, bool by_grid) {
    std::size_t sum = 0;
    window(w, [&](std::size_t i) { sum += (marks[i] == chosen<Mark>) == by_grid ? 1u : 0u; });
    return sum;
  };
  std::size_t w = 0;
  apportion(
      count - even,
      [&](auto take) {
        for (std::size_t v = 0; v < down * across; ++v) take(taken(v, false));
      },
      [&](std::size_t share) {
        each(share + taken(w, true), [&](auto take) { window(w, take); });
        ++w;
      });
}

// The highest scores of one picture: marks are their order keys.
template <class Mark>
void mark_by_score(const Config& config, Mark* marks, std::size_t n, std::size_t columns, std::size_t count) noexcept {
  for_each_group(config, marks, n, columns, count, [&](std::size_t quota, auto tokens) {
    mark_top<Mark>(quota, [&](auto take) { tokens([&](std::size_t i) { take(marks[i]); }); });
  });
}

}  // namespace detail

// ---- select() -----------------------------------------------------------------------------------

// What select() returns: the number of kept indices, and of visual scores that are NaN.
struct Selected {
  // Kept indices, and visual scores that are NaN.
  std::size_t count = 0;
  std::size_t nan_scores = 0;
};

// Ascending positions in the whole prompt of every token that stays: all text, and of each picture (or of all
// together, Quota::pooled) the planned number of visual tokens.
//
// scores: one per visual token, spans in order; may be empty for random and uniform. kept: room for Plan::kept()
// indices. quotas: one entry per span, scratch. marks: one entry per visual token, scratch. Re-entrant; no
// allocation. O(tokens).
template <class Score>
Result<Selected> select(const Config& config, Span<const Score> scores, Span<const TokenSpan> visual,
                        std::size_t tokens, Span<Index> kept, Span<Index> quotas,
                        Span<detail::Word<Score>> marks) noexcept {
  using detail::fail;
  using detail::number;
  using Mark = detail::Word<Score>;
  if (Status status = check(config); !status) return {{}, status};
  if (Status status = check(visual, tokens); !status) return {{}, status};
  const std::size_t total = visual_tokens(visual);
  const Result<std::size_t> keep = kept_visual(config, visual);
  if (!keep) return {{}, keep.status};
  if (Status status = detail::check_room(kept, tokens - total + *keep, "kept indices"); !status) return {{}, status};
  if (Status status = detail::check_room(marks, total, "marks"); !status) return {{}, status};
  if (config.quota == Quota::per_picture) {
    if (Status status = picture_quotas(config, visual, quotas); !status) return {{}, status};
  }

  Selected selected;
  for (std::size_t i = 0; i < total; ++i) marks[i] = 0;
  if (config.selection == Selection::top_k) {
    if (scores.size() != total) return {{}, fail(Errc::scores_size, "", number(scores.size()), number(total))};
    if (total > 0 && scores.data() == nullptr) return {{}, fail(Errc::null_data, "scores")};
    std::size_t infinite = 0;
    for (std::size_t i = 0; i < total; ++i) {
      infinite += detail::is_infinite(scores[i]) ? 1u : 0u;
      selected.nan_scores += detail::is_nan(scores[i]) ? 1u : 0u;
      marks[i] = detail::order_key(scores[i]);
    }
    for (std::size_t i = 0; infinite > 0; ++i)
      if (detail::is_infinite(scores[i])) return {{}, fail(Errc::infinite_score, "", 0, 0, number(i))};
    if (total > 0 && selected.nan_scores == total) return {{}, fail(Errc::all_scores_nan, "", number(total))};
  }

  detail::Random random(config.seed);
  Status status;
  const auto choose = [&](std::size_t first, std::size_t n, std::size_t columns, std::size_t count, std::size_t span) {
    Mark* m = marks.data() + first;
    switch (config.selection) {
      case Selection::top_k:
        if (config.window_rows != 0 && columns == 0)
          status = fail(Errc::window_needs_columns, "", 0, 0, number(span));
        else
          detail::mark_by_score(config, m, n, columns, count);
        break;
      case Selection::random: mark_random(m, n, count, random); break;
      case Selection::uniform: mark_uniform(m, n, columns, count); break;
    }
  };
  if (config.quota == Quota::pooled) {
    if (total > 0) choose(0, total, 0, *keep, 0);
  } else {
    std::size_t picture_number = 0, numbered = 0;
    detail::for_each_picture(visual, [&](const detail::Picture& picture) {
      choose(numbered, picture.tokens, picture.columns, quotas[picture_number++], picture.first_span);
      numbered += picture.tokens;
    });
  }
  if (!status) return {{}, status};

  std::size_t position = 0, numbered = 0;
  const auto keep_text_up_to = [&](std::size_t end) {
    while (position < end) kept[selected.count++] = static_cast<Index>(position++);
  };
  for (const TokenSpan& span : visual) {
    keep_text_up_to(span.first);
    for (; position < span.first + span.count; ++position)
      if (marks[numbered++] == detail::chosen<Mark>) kept[selected.count++] = static_cast<Index>(position);
  }
  keep_text_up_to(tokens);
  return {selected, {}};
}

// The spans of the shorter sequence, for the next stage: where each span's kept tokens now stand, in order. Spans
// that lost every token are left out. Positions count the kept tokens; the grid is no longer known. left: one entry
// per span. Returns the number of spans written. O(kept + spans).
inline Result<std::size_t> remaining(Span<const Index> kept, Span<const TokenSpan> visual,
                                     Span<TokenSpan> left) noexcept {
  if (Status status = detail::check_room(kept, kept.size(), "kept indices"); !status) return {0, status};
  if (Status status = detail::check_room(visual, visual.size(), "visual spans"); !status) return {0, status};
  if (Status status = detail::check_room(left, visual.size(), "spans"); !status) return {0, status};
  std::size_t written = 0, k = 0,
              lost = 0;  // lost: original tokens of this picture's spans that were left out
  bool begun = false;    // a span of this picture has been written
  for (const TokenSpan& span : visual) {
    if (!span.continues) {
      begun = false;
      lost = 0;
    }
    while (k < kept.size() && kept[k] < span.first) ++k;
    const std::size_t first = k, original = span.original == 0 ? span.count : span.original;
    while (k < kept.size() && kept[k] < span.first + span.count) ++k;
    if (k > first) {
      left[written++] = {first, k - first, 0, begun, original + lost};
      begun = true;
      lost = 0;
    } else if (begun) {
      left[written - 1].original += original;
    } else {
      lost += original;
    }
  }
  return {written, {}};
}

}  // namespace fastv

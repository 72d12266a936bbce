// fastv: scores -> kept indices, always exactly as many as planned.
//
// Every rule works on marks, one unsigned integer per visual token: first the order key of its score, in the end all ones
// where the token stays. One walk over the prompt then writes the positions of the text and of the marked tokens.
#pragma once

#include "detail/greedy.hpp"
#include "detail/strides.hpp"
#include "plan.hpp"

#include "detail/begin.hpp"

namespace fastv {

// What select() needs as scratch: an unsigned integer as wide as a score.
template <class Score>
using Mark = detail::Word<Score>;

namespace detail {
inline namespace FASTV_KIND {

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

// ---- the rules: each sets `count` of n marks to all ones, count <= n ------------------------------

// The highest marks; of equal ones the earlier. Others become 0 or, with Rest, stay as they are. visit(take) calls
// take(mark &) for each of the tokens that compete, in order. O(tokens).
template <class Mark, bool Rest = false, class Visit>
void mark_top(std::size_t count, Visit visit) noexcept {
  Cut<Mark> cut{chosen<Mark>, 0};  // of none: nothing lies above, no place is left for ties
  if (count > 0) cut = find_cut<Mark>(count, [&](auto take) { visit([&](Mark& mark) { take(mark); }); });
  std::size_t ties = count - cut.above;  // places left for tokens that equal the cut
  visit([&](Mark& mark) {                // without branches on the scores: they cannot be predicted
    const std::size_t tie = static_cast<std::size_t>(mark == cut.key) & static_cast<std::size_t>(ties != 0);
    const std::size_t stays = static_cast<std::size_t>(mark > cut.key) | tie;
    ties -= tie;
    const Mark ones = static_cast<Mark>(Mark{0} - static_cast<Mark>(stays));
    mark = Rest ? static_cast<Mark>(mark | ones) : ones;
  });
}

// The same for few tokens side by side, by counting for each how many go before it. O(n^2), without branches.
inline constexpr std::size_t few_tokens = 64;
template <class Mark>
void mark_top_of_few(Mark* marks, std::size_t n, std::size_t count) noexcept {
  Mark keys[few_tokens];
  for (std::size_t i = 0; i < n; ++i) keys[i] = marks[i];
  for (std::size_t i = 0; i < n; ++i) {
    const Mark key = keys[i];
    Mark before = 0;
    for (std::size_t j = 0; j < i; ++j) before += keys[j] >= key ? 1u : 0u;
    for (std::size_t j = i + 1; j < n; ++j) before += keys[j] > key ? 1u : 0u;
    marks[i] = before < count ? chosen<Mark> : 0;
  }
}

// Every subset equally likely (Knuth, The Art of Computer Programming 3.4.2, algorithm S). O(n).
template <class Mark>
void mark_random(Mark* marks, std::size_t n, std::size_t count, Random& random) noexcept {
  for (std::size_t i = 0, k = 0; k < count; ++i)
    if (random.below(n - i) < count - k) {
      marks[i] = chosen<Mark>;
      ++k;
    }
}

// Evenly spaced: without a grid (columns = 0) the middles of count equal stretches; with one, every row of the image gets
// its even share, shifted from the row above by the golden part of a step, which spreads the kept tokens evenly in both
// directions at any count (a Fibonacci lattice). O(count + rows).
template <class Mark>
void mark_uniform(Mark* marks, std::size_t n, std::size_t columns, std::size_t count) noexcept {
  const std::uint64_t across = columns == 0 ? n : columns, down = columns == 0 ? 1 : n / columns;
  const std::uint64_t step = 65536, golden = 40503;  // 65536 / 1.618
  std::uint64_t offset = step / 2;                   // of a row's first kept token, in parts of a step
  for (std::uint64_t row = 0; row < down; ++row) {
    const std::uint64_t share = (row + 1) * count / down - row * count / down;
    for (std::uint64_t i = 0; i < share; ++i) {
      // (i + offset / step) * across / share, in parts that cannot overflow
      const std::uint64_t whole = i * across / share, rest = i * across % share;
      marks[row * across + whole + (rest * step + offset * across) / (share * step)] = chosen<Mark>;
    }
    if (share > 0) offset = (offset + golden) % step;
  }
}

// Fills a pool of n marks, some of which are chosen already, up to `count`. Not by score: those ranks are marks.
template <class Mark>
void fill_pool(const Config& config, Mark* marks, std::size_t n, std::size_t count, Random& random) noexcept {
  if (config.selection == Selection::top_k) {
    mark_top<Mark>(count, [&](auto take) {
      for (std::size_t i = 0; i < n; ++i) take(marks[i]);
    });
    return;
  }
  std::size_t free = n, left = count;
  for (std::size_t i = 0; i < n; ++i) {
    free -= marks[i] == chosen<Mark> ? 1u : 0u;
    left -= marks[i] == chosen<Mark> ? 1u : 0u;
  }
  // Number f of the free tokens: every subset alike, or the middles of `left` equal stretches of them.
  std::size_t done = 0, next = left == 0 ? 0 : free / (2 * left);
  for (std::size_t i = 0, f = 0; i < n && done < left; ++i) {
    if (marks[i] == chosen<Mark>) continue;
    const bool takes = config.selection == Selection::random ? random.below(free - f) < left - done : f == next;
    if (takes) {
      marks[i] = chosen<Mark>;
      ++done;
      next = static_cast<std::size_t>((2 * static_cast<std::uint64_t>(done) + 1) * free / (2 * left));
    }
    ++f;
  }
}

// How much of a count goes to the even grid.
inline std::size_t even_share(const Config& config, std::size_t count) noexcept {
  const auto rounded = static_cast<std::size_t>(static_cast<double>(count) * config.uniform_share + 0.5);
  return rounded < count ? rounded : count;
}

// The same of a pool whose images have minima: no more than those leave, or some image would get less than its own.
inline std::size_t pool_grid(const Config& config, const Images& images) noexcept {
  const std::size_t share = even_share(config, images.keep), room = images.keep - images.minima;
  return share < room ? share : room;
}

// Windows of an image's grid, row by row; those at the right and bottom edge may be smaller.
struct Windows {
  // One of them: its rows and columns of the grid.
  struct Window {
    std::size_t top, bottom, left, right;
    std::size_t columns;  // of the grid
    std::size_t size() const noexcept { return (bottom - top) * (right - left); }
    // Calls take(i) for each of its tokens, in order.
    template <class Take>
    void visit(Take take) const noexcept {
      for (std::size_t row = top; row < bottom; ++row)
        for (std::size_t column = left; column < right; ++column) take(row * columns + column);
    }
  };

  std::size_t rows, columns;  // of the grid
  std::size_t window_rows, window_columns;

  Windows(const Config& config, std::size_t n, std::size_t grid_columns) noexcept
      : rows(n / grid_columns),
        columns(grid_columns),
        window_rows(config.window_rows < rows ? config.window_rows : rows),
        window_columns(config.window_columns < columns ? config.window_columns : columns) {}
  std::size_t count() const noexcept { return ((rows - 1) / window_rows + 1) * ((columns - 1) / window_columns + 1); }
  // Calls use(number, window) for each.
  template <class Use>
  void for_each(Use use) const noexcept {
    std::size_t number = 0;
    for (std::size_t top = 0; top < rows; top += window_rows) {
      const std::size_t bottom = window_rows < rows - top ? top + window_rows : rows;
      for (std::size_t left = 0; left < columns; left += window_columns) {
        const std::size_t right = window_columns < columns - left ? left + window_columns : columns;
        use(number++, Window{top, bottom, left, right, columns});
      }
    }
  }
};

// A list of n tokens, in order, as those of a group are handed on: each_of(n)(take) calls take(i) for each.
inline auto each_of(std::size_t n) noexcept {
  return [n](auto take) {
    for (std::size_t i = 0; i < n; ++i) take(i);
  };
}

// Shares the count of one image out: uniform_share of it goes to an even grid (FEATHER, arXiv 2412.13180, adds a strided
// grid; here it comes out of the count), whose marks are set, and the rest to groups of tokens, which keep their highest
// scores: one group, or one per window (Window FastV, arXiv 2502.11501, with Hamilton's rounding so that the count is
// exact).
//
// each(quota, tokens): quota counts the group's tokens that the grid has taken; tokens(take) calls take(i) for each of
// its tokens, those included, in order. scratch: [2 n], where there are windows.
template <class Mark, class Each>
void for_each_group(const Config& config, Mark* marks, std::size_t n, std::size_t columns, std::size_t count,
                    Mark* scratch, Each each) noexcept {
  const std::size_t even = even_share(config, count);
  if (even > 0) mark_uniform(marks, n, columns, even);
  if (config.window_rows == 0) {
    each(count, each_of(n));
    return;
  }
  const Windows windows(config, n, columns);
  const std::size_t number = windows.count();
  const auto taken = [&](const Windows::Window& window) {
    std::size_t sum = 0;
    if (even > 0) window.visit([&](std::size_t i) { sum += marks[i] == chosen<Mark> ? 1u : 0u; });
    return sum;
  };
  windows.for_each([&](std::size_t w, const Windows::Window& window) {
    scratch[w] = static_cast<Mark>(window.size() - taken(window));
  });
  apportion(count - even, Span<Mark>(scratch, number), Span<Mark>(scratch + number, number));
  windows.for_each([&](std::size_t w, const Windows::Window& window) {
    each(static_cast<std::size_t>(scratch[w]) + taken(window), [&](auto take) { window.visit(take); });
  });
}

// Tokens that compete by scores that are all 0: `stay` of them would, by their places alone. tokens 0: there are none.
struct Unranked {
  std::size_t stay = 0, tokens = 0;
};
// Whether the tokens that tokens(take) calls take(i) for are such. Marks are their order keys; those that are chosen
// already count towards the quota and do not compete.
template <class Mark, class Tokens>
Unranked find_unranked(const Mark* marks, std::size_t quota, Tokens tokens) noexcept {
  constexpr Mark zero = static_cast<Mark>(Mark{1} << (8 * sizeof(Mark) - 1));
  std::size_t taken = 0, competing = 0;
  Mark others = 0;
  tokens([&](std::size_t i) {
    const bool chosen_already = marks[i] == chosen<Mark>;
    taken += chosen_already ? 1u : 0u;
    competing += chosen_already ? 0u : 1u;
    others = static_cast<Mark>(others | (chosen_already ? Mark{0} : marks[i] ^ zero));
  });
  const std::size_t stay = quota > taken ? quota - taken : 0;
  return others == 0 && stay > 0 && stay < competing ? Unranked{stay, competing} : Unranked{};
}
// Looks for the first group that is such, where scores alone decide, and for the image that it is in.
struct Watch {
  static constexpr std::size_t none = static_cast<std::size_t>(-1);
  bool on;
  Unranked found = {};
  std::size_t images = 0, image = none;  // seen; of what was found, none where it is of several

  template <class Mark, class Tokens>
  void group(const Mark* marks, std::size_t quota, Tokens tokens) noexcept {
    if (on && found.tokens == 0) found = find_unranked(marks, quota, tokens);
  }
  // All images as one group, ahead of what each has for itself.
  template <class Mark>
  void pool(const Mark* marks, std::size_t quota, std::size_t n) noexcept {
    group(marks, quota, each_of(n));
    on = on && found.tokens == 0;
  }
  void end_of_image() noexcept {
    if (on && found.tokens > 0 && image == none) image = images;
    ++images;
  }
};

// The highest scores of one image: marks are their order keys.
template <class Mark>
void mark_by_score(const Config& config, Mark* marks, std::size_t n, std::size_t columns, std::size_t count,
                   Mark* scratch, Watch& watch) noexcept {
  const std::size_t rows = config.window_rows;  // their product with the columns may not fit
  const bool small_groups = rows != 0 && rows <= few_tokens && config.window_columns <= few_tokens / rows;
  for_each_group(config, marks, n, columns, count, scratch, [&](std::size_t quota, auto tokens) {
    Mark few[few_tokens];
    std::size_t size = 0;
    watch.group(marks, quota, tokens);
    if (small_groups) {
      tokens([&](std::size_t i) { few[size++] = marks[i]; });
      mark_top_of_few(static_cast<Mark*>(few), size, quota);
      size = 0;
      tokens([&](std::size_t i) { marks[i] = few[size++]; });
    } else {
      mark_top<Mark>(quota, [&](auto take) { tokens([&](std::size_t i) { take(marks[i]); }); });
    }
  });
}

}  // namespace FASTV_KIND
}  // namespace detail

// ---- select() -----------------------------------------------------------------------------------

// What select() returns.
struct Selected {
  std::size_t count = 0;        // kept indices
  std::size_t nan_scores = 0;   // visual scores that are NaN; with Selection::diverse, or whose features are no numbers
  std::size_t zero_scores = 0;  // visual scores that are 0: tokens that receive no attention at all
};

namespace detail {
inline namespace FASTV_KIND {

// Is the count that of the highest scores, and is there something to rank?
inline bool ranks(const Config& config, const Images& images) noexcept {
  return config.selection == Selection::top_k && images.tokens > 0;
}

// Entries of scratch that all rules share, marks included.
inline std::size_t common_scratch(const Config& config, Span<const TokenSpan> visual, std::size_t tokens) noexcept {
  return tokens + 2 * visual.size() + (config.window_rows != 0 ? 2 * tokens : 0);
}

// Scores of which none ranks a token above another: NaN alone, or zeros alone in some of the groups that compete (an
// image, a window, a pool), where some tokens must stay and some go.
inline Status check_counts(const Config& config, const Images& images, std::size_t nan_scores, std::size_t zero_scores,
                           std::size_t unranked_groups) noexcept {
  const std::size_t total = images.tokens, layer = scored_layer(config.filtering_layer);
  if (total > 0 && nan_scores == total)
    return fail(Errc::bad_value, "all {} visual scores are NaN: check what layer {} and the tensors handed over hold",
                total, layer);
  if (unranked_groups == 0) return {};
  if (zero_scores == total)
    return fail(Errc::bad_value,
                "all {} visual scores are 0, so that nothing ranks them: does layer {} see the "
                "images (sliding window, bias, mask)?",
                total, layer);
  return fail(Errc::bad_value,
              "all scores are 0 in {} groups of visual tokens (images, windows or pools), so that nothing ranks these: "
              "does layer {} see them (sliding window, bias, mask)?",
              unranked_groups, layer);
}
// The same where the image is known.
inline Status fail_unranked(const Config& config, const Unranked& unranked, std::size_t image) noexcept {
  return fail(Errc::bad_value,
              "{} of {} tokens in image {} would stay by scores that are all 0, so that nothing ranks them: does layer "
              "{} see the image (sliding window, bias, mask)?",
              unranked.stay, unranked.tokens, image, scored_layer(config.filtering_layer));
}

// The place of evidence where none is at hand: Selection::diverse is refused.
struct NoFeatures {};

// Selection::diverse, in the groups of the other rules. words: greedy_words() of all tokens. Returns how many tokens have
// features that are no numbers.
template <class Score, class Evidence, class ParallelFor>
std::size_t mark_diverse(const Config& config, const Evidence& evidence, Span<const TokenSpan> visual,
                         Span<const Score> scores, const Images& images, Mark<Score>* marks, Mark<Score>* rest,
                         Mark<Score>* words, float* floats, Watch& watch, const ParallelFor& parallel_for) noexcept {
  using Mark = Mark<Score>;
  Greedy<Score, Evidence, ParallelFor> greedy(config, evidence, visual, scores, marks, floats, words, parallel_for);
  std::size_t broken = 0, numbered = 0;
  const auto image_alone = [&](std::size_t first, std::size_t n, std::size_t columns, std::size_t count) {
    for_each_group(config, marks + first, n, columns, count, rest, [&](std::size_t quota, auto tokens) {
      watch.group(marks + first, quota, tokens);
      broken += greedy.start(quota, [&](auto take) { tokens([&](std::size_t i) { take(first + i); }); });
      greedy.take(quota, 0, static_cast<std::size_t>(-1));
      greedy.finish();
    });
  };
  if (config.quota == Quota::per_image) {
    Mark* quotas = rest;
    rest += images.count;
    quotas_of(config, visual, images, Span<Mark>(quotas, images.count), Span<Mark>(rest, images.count));
    for_each_image(visual, [&](const Image& image) {
      if (image.tokens > 0) image_alone(numbered, image.tokens, image.columns, static_cast<std::size_t>(*quotas));
      ++quotas;
      watch.end_of_image();
      numbered += image.tokens;
    });
    return broken;
  }
  if (!minima_hold(config, images)) {
    image_alone(0, images.tokens, 0, images.keep);
    return broken;
  }
  // Every image's own first, each seeing what the ones before it kept; then the pool.
  if (const std::size_t share = pool_grid(config, images); share > 0) mark_uniform(marks, images.tokens, 0, share);
  watch.pool(marks, images.keep, images.tokens);
  broken = greedy.start(images.keep, each_of(images.tokens));
  for_each_image(visual, [&](const Image& image) {
    watch.group(marks + numbered, minimum_of(config, image), each_of(image.tokens));
    watch.end_of_image();
    greedy.take(minimum_of(config, image), numbered, numbered + image.tokens);
    numbered += image.tokens;
  });
  greedy.take(images.keep, 0, images.tokens);
  greedy.finish();
  return broken;
}

// Floats that Selection::diverse takes for features of this width.
template <class Evidence>
Result<std::size_t> diverse_floats(const Config& config, const Images& images, const Evidence& evidence) noexcept {
  if (config.selection != Selection::diverse || images.tokens == 0) return {0, {}};
  if (Status status = check_features(evidence); !status) return {0, status};
  const std::size_t elements = width_of_features(evidence);
  if (Status status = check_greedy(images.tokens, elements); !status) return {0, status};
  return {GreedyRoom(config.diversity, images.tokens, images.keep, elements, scratch_of_features(evidence)).floats, {}};
}

// Settings and spans have been validated and the images counted; kept and scratch have room. floats: diverse_floats().
template <class Score, class Evidence = NoFeatures, class ParallelFor = Serial>
Result<Selected> select_validated(const Config& config, Span<const Score> scores, Span<const TokenSpan> visual,
                                  std::size_t tokens, const Images& images, Index* kept, Mark<Score>* scratch,
                                  const Evidence& evidence = {}, float* floats = nullptr,
                                  const ParallelFor& parallel_for = {}) noexcept {
  using Mark = Mark<Score>;
  const std::size_t total = images.tokens;
  Mark* marks = scratch;
  Mark* rest = marks + total;
  Selected selected;
  if constexpr (!has_features<Evidence>) {
    if (config.selection == Selection::diverse && total > 0)
      return {{},
              fail(Errc::not_supported,
                   "Selection::diverse needs features, which are not handed over here: use a Pruner and evidence "
                   "with_features()")};
  }
  if (uses_scores(config)) {
    constexpr Mark zero_key = FloatBits<Score>::sign;
    Mark infinite = 0, nan = 0, zero = 0;  // as wide as a score, so that the loop vectorises
    for (std::size_t i = 0; i < total; ++i) {
      const Mark key = order_key(scores[i]);
      infinite += is_infinite(scores[i]) ? 1u : 0u;
      nan += key == 0 ? 1u : 0u;
      zero += key == zero_key ? 1u : 0u;
      marks[i] = key;
    }
    selected.nan_scores = static_cast<std::size_t>(nan);
    selected.zero_scores = static_cast<std::size_t>(zero);
    for (std::size_t i = 0; infinite > 0; ++i)
      if (is_infinite(scores[i]))
        return {{}, fail(Errc::bad_value, "the score of visual token {} is infinite: check where it comes from", i)};
    if (Status status = check_counts(config, images, selected.nan_scores, 0, 0); !status) return {{}, status};
  } else {
    const Mark none = config.selection == Selection::diverse ? 1 : 0;
    for (std::size_t i = 0; i < total; ++i) marks[i] = none;
  }

  const Diversity& d = config.diversity;
  const bool novelty_decides =
      config.selection == Selection::diverse && d.protected_share < 1 && !(d.blend == Blend::sum && d.weight >= 1);
  Watch watch{selected.zero_scores > 0 && !novelty_decides};  // no zero, nothing to look for
  Random random(config.seed);
  const auto choose = [&](std::size_t first, std::size_t n, std::size_t columns, std::size_t count) {
    Mark* m = marks + first;
    switch (config.selection) {
      case Selection::top_k: mark_by_score(config, m, n, columns, count, rest, watch); break;
      case Selection::random: mark_random(m, n, count, random); break;
      case Selection::uniform: mark_uniform(m, n, columns, count); break;
      case Selection::diverse: break;
    }
  };
  if (config.selection == Selection::diverse) {
    if constexpr (has_features<Evidence>) {
      if (total > 0) {
        const std::size_t broken =
            mark_diverse<Score>(config, evidence, visual, scores, images, marks, rest,
                                scratch + common_scratch(config, visual, total), floats, watch, parallel_for);
        selected.nan_scores += broken;
        if (broken == total)
          return {{},
                  fail(Errc::bad_value,
                       "the features of all {} visual tokens are NaN or infinite: check what was handed over", total)};
      }
    }
  } else if (config.quota == Quota::pooled) {
    const bool minima = minima_hold(config, images) && total > 0;
    if (minima) {
      // Every image's own best first, then the pool: what is chosen already ranks above every score.
      std::size_t numbered = 0;
      if (config.selection == Selection::top_k) {
        if (const std::size_t share = pool_grid(config, images); share > 0) mark_uniform(marks, total, 0, share);
      }
      watch.pool(marks, images.keep, total);
      for_each_image(visual, [&](const Image& image) {
        const std::size_t least = minimum_of(config, image);
        Mark* m = marks + numbered;
        watch.group(m, least, each_of(image.tokens));
        if (config.selection == Selection::top_k)
          mark_top<Mark, true>(least, [&](auto take) {
            for (std::size_t i = 0; i < image.tokens; ++i) take(m[i]);
          });
        else
          choose(numbered, image.tokens, image.columns, least);
        numbered += image.tokens;
        watch.end_of_image();
      });
      fill_pool(config, marks, total, images.keep, random);
    } else if (total > 0) {
      choose(0, total, 0, images.keep);
    }
  } else if (total > 0) {
    const Span<Mark> quotas(rest, images.count);
    Mark* after = rest + images.count;
    quotas_of(config, visual, images, quotas, Span<Mark>(after, images.count));
    rest = after;
    const Mark* quota = quotas.data();
    std::size_t numbered = 0;
    for_each_image(visual, [&](const Image& image) {
      if (image.tokens > 0) choose(numbered, image.tokens, image.columns, static_cast<std::size_t>(*quota));
      ++quota;
      watch.end_of_image();
      numbered += image.tokens;
    });
  }
  if (watch.found.tokens > 0) {
    if (selected.zero_scores == total || watch.image == Watch::none)
      return {{}, check_counts(config, images, 0, selected.zero_scores, 1)};
    return {{}, fail_unranked(config, watch.found, watch.image)};
  }

  std::size_t position = 0, numbered = 0;
  const auto keep_text_up_to = [&](std::size_t end) {
    while (position < end) kept[selected.count++] = static_cast<Index>(position++);
  };
  for (const TokenSpan& span : visual) {
    keep_text_up_to(span.first);
    for (; position < span.first + span.count; ++position)
      if (marks[numbered++] == chosen<Mark>) kept[selected.count++] = static_cast<Index>(position);
  }
  keep_text_up_to(tokens);
  return {selected, {}};
}

}  // namespace FASTV_KIND
}  // namespace detail

inline namespace FASTV_KIND {

// Entries of scratch that select() wants. O(spans).
inline std::size_t select_scratch(const Config& config, Span<const TokenSpan> visual) noexcept {
  const std::size_t tokens = visual_tokens(visual);
  return detail::common_scratch(config, visual, tokens) +
         (config.selection == Selection::diverse ? detail::greedy_words(tokens) : 0);
}

// Ascending positions in the whole prompt of every token that stays: all text, and of each image (or of all together,
// Quota::pooled) the planned number of visual tokens.
//
// scores: one per visual token, in the order of for_each_visual(); may be empty for random and uniform. kept: room for
// Plan::kept() indices. scratch: select_scratch() entries. Errors: everything that can be wrong with settings and spans,
// scores that are infinite, all NaN, or all 0 among the tokens that compete, of which some must stay and some go (an
// image, a window, a pool); Selection::diverse, which needs features. Re-entrant; no allocation. O(tokens).
template <class Score>
Result<Selected> select(const Config& config, Span<const Score> scores, Span<const TokenSpan> visual,
                        std::size_t tokens, Span<Index> kept, Span<Mark<Score>> scratch) noexcept {
  if (Status status = validate(config, visual, tokens); !status) return {{}, status};
  const Result<detail::Images> images = detail::count_images(config, visual);
  if (!images) return {{}, images.status};
  const std::size_t length = tokens - images->tokens + images->keep;
  if (Status status = detail::expect_room(kept, length, "kept indices"); !status) return {{}, status};
  if (Status status = detail::expect_room(scratch, select_scratch(config, visual), "scratch"); !status)
    return {{}, status};
  if (config.selection == Selection::top_k) {
    if (scores.size() != images->tokens)
      return {{},
              fail(Errc::bad_shape, "{} scores were given for {} visual tokens: give one each", scores.size(),
                   images->tokens)};
    if (images->tokens > 0) {
      if (Status status = detail::check_data(scores.data(), "scores"); !status) return {{}, status};
    }
  }
  return detail::select_validated<Score>(config, scores, visual, tokens, *images, kept.data(), scratch.data());
}

}  // namespace FASTV_KIND

}  // namespace fastv

#include "detail/end.hpp"

// select() and next_spans(): every rule, quota, window and NaN pattern against plain loops.
#include "fuzz.hpp"

namespace {

using namespace fuzz;

#if defined(__SIZEOF_INT128__)
__extension__ typedef unsigned __int128 Wide;
#endif

// The even grid of mark_uniform(), from its definition: kept token i of a row stands at (i + offset) * width / share.
std::vector<std::size_t> even_grid(std::size_t n, std::size_t columns, std::size_t count) {
  const std::size_t width = columns == 0 ? n : columns, height = columns == 0 ? 1 : n / columns;
  std::vector<std::size_t> places;
  std::uint64_t offset = 32768;
  for (std::size_t row = 0; row < height; ++row) {
    const std::size_t share = (row + 1) * count / height - row * count / height;
    for (std::size_t i = 0; i < share; ++i)
      places.push_back(row * width +
                       static_cast<std::size_t>((Wide{i} * 65536 + offset) * width / (Wide{share} * 65536)));
    if (share > 0) offset = (offset + 40503) % 65536;
  }
  return places;
}

// Draws as the library does: uniform in [0, bound).
std::size_t drawn(oracle::Rng& rng, std::size_t bound) {
  return static_cast<std::size_t>((rng.next() >> 32) * static_cast<std::uint64_t>(bound) >> 32);
}

// Whether some group competed by zeros alone, some to stay and some to go; whoever chooses clears it.
bool by_zeros_alone = false;
template <class Score>
void compete(const std::vector<Score>& group, std::size_t stay) {
  bool zeros = stay > 0 && stay < group.size();
  for (const Score score : group) zeros = zeros && !oracle::is_nan(score) && oracle::rank_of(score) == 0;
  by_zeros_alone = by_zeros_alone || zeros;
}

// Which of one image's tokens stay (numbers within the image), by the rules of select.hpp.
template <class Score>
std::vector<Index> choose(const fastv::Config& config, const std::vector<Score>& scores, std::size_t columns,
                          std::size_t count, oracle::Rng& rng) {
  const std::size_t n = scores.size();
  std::vector<Index> chosen;
  if (config.selection == fastv::Selection::random) {
    for (std::size_t i = 0; chosen.size() < count; ++i)
      if (drawn(rng, n - i) < count - chosen.size()) chosen.push_back(static_cast<Index>(i));
    return chosen;
  }
  std::vector<bool> by_grid(n, false);
  const bool uniform = config.selection == fastv::Selection::uniform;
  const std::size_t even =
      uniform ? count
              : (std::min)(count, static_cast<std::size_t>(static_cast<double>(count) * config.uniform_share + 0.5));
  if (even > 0)
    for (const std::size_t place : even_grid(n, columns, even)) by_grid[place] = true;
  // Windows, each with the numbers of its tokens that the grid left over.
  std::vector<std::vector<Index>> windows(1);
  if (config.window_rows == 0 || uniform) {
    for (std::size_t i = 0; i < n; ++i) windows[0].push_back(static_cast<Index>(i));
  } else {
    const std::size_t rows = n / columns;
    windows.clear();
    for (std::size_t top = 0; top < rows; top += (std::min)(config.window_rows, rows))
      for (std::size_t left = 0; left < columns; left += (std::min)(config.window_columns, columns)) {
        windows.emplace_back();
        for (std::size_t row = top; row < rows && row - top < config.window_rows; ++row)
          for (std::size_t column = left; column < columns && column - left < config.window_columns; ++column)
            windows.back().push_back(static_cast<Index>(row * columns + column));
      }
  }
  std::vector<std::size_t> weights;
  for (std::vector<Index>& window : windows) {
    std::vector<Index> left;
    for (const Index i : window) (by_grid[i] ? chosen : left).push_back(i);
    window = left;
    weights.push_back(left.size());
  }
  const bool any = std::accumulate(weights.begin(), weights.end(), std::size_t{0}) > 0;
  const std::vector<std::size_t> shares = any ? oracle::quotas(weights, count - even) : weights;
  for (std::size_t w = 0; w < windows.size(); ++w) {
    std::vector<Score> own;
    for (const Index i : windows[w]) own.push_back(scores[i]);
    if (!uniform) compete(own, shares[w]);
    for (const Index i : oracle::top(own, shares[w])) chosen.push_back(windows[w][i]);
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

// A pool in which every image keeps its minimum first, whatever the rule; then the rest by the same rule.
template <class Score>
std::vector<Index> choose_in_pool(const fastv::Config& config, const std::vector<Score>& scores,
                                  const std::vector<Image>& all, const Shares& share, oracle::Rng& rng) {
  const std::size_t n = scores.size();
  std::vector<bool> taken(n, false);
  const std::size_t minima = std::accumulate(share.least.begin(), share.least.end(), std::size_t{0});
  std::size_t left = share.kept;
  const auto take = [&](std::size_t i) {
    left -= taken[i] ? 0u : 1u;
    taken[i] = true;
  };
  if (config.selection == fastv::Selection::top_k) {
    const auto wanted = static_cast<std::size_t>(static_cast<double>(share.kept) * config.uniform_share + 0.5);
    const std::size_t even = (std::min)(wanted, share.kept - minima);
    if (even > 0)
      for (const std::size_t place : even_grid(n, 0, even)) take(place);
    std::vector<Score> others;
    for (std::size_t i = 0; i < n; ++i)
      if (!taken[i]) others.push_back(scores[i]);
    compete(others, left);
  }
  std::size_t first = 0;
  for (std::size_t p = 0; p < all.size(); first += all[p++].tokens) {
    const auto from = scores.begin() + static_cast<std::ptrdiff_t>(first);
    std::vector<Score> own(from, from + static_cast<std::ptrdiff_t>(all[p].tokens));
    std::size_t least = share.least[p];
    if (config.selection == fastv::Selection::top_k) {  // the grid's tokens count
      std::vector<Index> others;
      std::vector<Score> theirs;
      for (std::size_t i = 0; i < own.size(); ++i) {
        if (taken[first + i])
          least -= least > 0 ? 1u : 0u;
        else
          others.push_back(static_cast<Index>(i)), theirs.push_back(own[i]);
      }
      compete(theirs, least);
      for (const Index i : oracle::top(theirs, least)) take(first + others[i]);
    } else if (all[p].tokens > 0) {
      for (const Index i : choose(config, own, all[p].columns, least, rng)) take(first + i);
    }
  }
  std::vector<Index> free;
  std::vector<Score> theirs;
  for (std::size_t i = 0; i < n; ++i)
    if (!taken[i]) free.push_back(static_cast<Index>(i)), theirs.push_back(scores[i]);
  const std::size_t places = left;
  if (config.selection == fastv::Selection::top_k)
    for (const Index i : oracle::top(theirs, places)) take(free[i]);
  else if (config.selection == fastv::Selection::random)
    for (std::size_t f = 0, still = places; f < free.size() && still > 0; ++f) {
      if (drawn(rng, free.size() - f) >= still) continue;
      take(free[f]);
      --still;
    }
  else
    for (std::size_t i = 0; i < places; ++i) take(free[(2 * i + 1) * free.size() / (2 * places)]);
  std::vector<Index> chosen;
  for (std::size_t i = 0; i < n; ++i)
    if (taken[i]) chosen.push_back(static_cast<Index>(i));
  return chosen;
}

template <class Score>
std::vector<Score> draw_scores(Input& in, std::size_t n) {
  oracle::Rng rng = in.random();
  const std::size_t levels = in.between(1, 50), nans = in.below(5), kind = in.below(4);
  std::vector<Score> scores(n);
  for (Score& score : scores) {
    const std::size_t level = rng.below(levels);
    score = static_cast<Score>(static_cast<double>(level) / 7 - (kind == 1 ? 3 : 0));
    if (kind == 2) {  // denormals and the smallest differences
      const auto bits = static_cast<fastv::detail::Word<Score>>(level);
      std::memcpy(&score, &bits, sizeof(score));
    }
    if (kind == 3) score = static_cast<Score>(rng.chance(0.5) ? 0.0 : -0.0);
    if (rng.below(8) < nans) score = static_cast<Score>(rng.chance(0.5) ? oracle::nan_float() : -oracle::nan_float());
  }
  if (in.one_in(12) && n > 0) scores[in.below(n)] = static_cast<Score>(in.chance() ? HUGE_VAL : -HUGE_VAL);
  return scores;
}

template <class Score>
void select_once(Input& in) {
  oracle::Layout prompt = layout(in, 4, in.one_in(12) ? 250 : 40, false);
  const std::size_t total = prompt.visual_tokens();
  fastv::Config settings = config(in, total);
  settings.selection = static_cast<fastv::Selection>(in.one_in(4) ? in.between(1, 2) : 0);
  settings.seed = in.byte();
  if (in.one_in(3)) settings.uniform_share = in.share();
  if (in.one_in(3)) settings.window_rows = in.between(1, 9), settings.window_columns = in.between(1, 9);
  if (in.one_in(30)) (in.chance() ? settings.window_rows : settings.window_columns) = in.hostile();
  if (in.one_in(60)) {  // their product does not fit
    settings.window_rows = std::size_t{1} << in.between(0, 63);
    settings.window_columns = std::size_t{1} << in.between(0, 63);
  }
  const std::vector<Score> drawn_scores = draw_scores<Score>(in, total);

  const bool top_k = settings.selection == fastv::Selection::top_k, pooled = settings.quota == fastv::Quota::pooled;
  bool right = !top_k || (settings.window_rows == 0) == (settings.window_columns == 0);
  right = own_ratios(in, settings, prompt.visual) && right;
  const std::vector<Image> all = images(prompt.visual);
  const bool windows = settings.window_rows != 0 && top_k;
  for (const Image& image : all) right = right && !(windows && image.columns == 0 && image.tokens > 0);
  right = right && !(windows && pooled);
  bool valued = true;
  std::size_t nans = 0, zeros = 0;
  for (const Score score : drawn_scores) {
    nans += oracle::is_nan(score) ? 1u : 0u;
    zeros += oracle::rank_of(score) == 0 ? 1u : 0u;
    valued = valued && !(top_k && std::isinf(score));
  }
  const Shares share = shares(settings, all);
  valued = valued && !(top_k && total > 0 && nans == total);
  const bool settings_right = right;
  right = right && valued;
  std::vector<Index> chosen;
  by_zeros_alone = false;
  if (right && total > 0) {
    oracle::Rng rng(settings.seed);
    const std::size_t minima = std::accumulate(share.least.begin(), share.least.end(), std::size_t{0});
    if (pooled && minima > 0) {
      chosen = choose_in_pool(settings, drawn_scores, all, share, rng);
    } else if (pooled) {
      chosen = choose(settings, drawn_scores, 0, share.kept, rng);
    } else {
      std::size_t first = 0;
      for (std::size_t p = 0; p < all.size(); ++p) {
        const auto from = drawn_scores.begin() + static_cast<std::ptrdiff_t>(first);
        const std::vector<Score> own(from, from + static_cast<std::ptrdiff_t>(all[p].tokens));
        if (all[p].tokens > 0)
          for (const Index i : choose(settings, own, all[p].columns, share.quota[p], rng))
            chosen.push_back(static_cast<Index>(first + i));
        first += all[p].tokens;
      }
    }
  }
  if (right) FUZZ_CHECK(chosen.size() == share.kept);
  valued = valued && !(top_k && by_zeros_alone);
  right = right && valued;
  const std::vector<Index> expected = oracle::whole_prompt(prompt.tokens, prompt.visual, chosen);

  // Every buffer is exactly as large as it must be.
  using Mark = fastv::Mark<Score>;
  const Block<TokenSpan> visual(prompt.visual);
  const Block<Score> scores(drawn_scores);
  const std::size_t length = prompt.tokens - total + share.kept;
  const Block<Index> kept(length, Index(-1));
  const Block<Mark> scratch(fastv::select_scratch(settings, visual.view()));
  const Span<const Score> handed = top_k || in.chance() ? scores.view() : Span<const Score>();
  const auto selected =
      fastv::select<Score>(settings, handed, visual.view(), prompt.tokens, kept.span(), scratch.span());
  check_message(selected.status);
  FUZZ_CHECK(static_cast<bool>(selected) == right);
  if (settings_right && !valued) FUZZ_CHECK(selected.code() == Errc::bad_value);
  fastv::Pruner<Score> pruner(settings);
  const fastv::Kept pruned = pruner.prune(fastv::Scores<Score>{scores.view(), prompt.tokens}, visual.view());
  FUZZ_CHECK(pruned.code() == selected.code());
  if (!right) {
    FUZZ_CHECK(pruned.size() == 0 && pruned.prompt_tokens == 0 && pruner.scores().empty());
    return;
  }
  FUZZ_CHECK(selected->count == length && selected->nan_scores == (top_k ? nans : 0));
  FUZZ_CHECK(selected->zero_scores == (top_k ? zeros : 0));
  FUZZ_CHECK(std::equal(kept.begin(), kept.end(), expected.begin(), expected.end()));
  FUZZ_CHECK(std::equal(pruned.begin(), pruned.end(), expected.begin(), expected.end()));
  FUZZ_CHECK(pruned.prompt_tokens == prompt.tokens && pruned.dropped() == total - share.kept);
  FUZZ_CHECK(pruned.nan_scores == selected->nan_scores && pruned.zero_scores == selected->zero_scores);

  // Rooms that are too small, or not there.
  const auto again = [&](Span<const Score> s, Span<Index> k, Span<Mark> m) {
    return fastv::select<Score>(settings, s, visual.view(), prompt.tokens, k, m).code();
  };
  if (length > 0) {
    FUZZ_CHECK(again(scores.view(), {kept.data(), length - 1}, scratch.span()) == Errc::too_small);
    FUZZ_CHECK(again(scores.view(), {nullptr, length}, scratch.span()) == Errc::null_data);
  }
  if (scratch.size() > 0) {
    FUZZ_CHECK(again(scores.view(), kept.span(), {scratch.data(), scratch.size() - 1}) == Errc::too_small);
    FUZZ_CHECK(again(scores.view(), kept.span(), {nullptr, scratch.size()}) == Errc::null_data);
  }
  if (total > 0 && top_k) {
    FUZZ_CHECK(again({scores.data(), total - 1}, kept.span(), scratch.span()) == Errc::bad_shape);
    FUZZ_CHECK(again({nullptr, total}, kept.span(), scratch.span()) == Errc::null_data);
  }

  // The spans of what stayed, in place as the decoder does it: per image, one span for each that kept something, or one
  // empty span; originals of the spans that are gone go to those that are left.
  const Block<TokenSpan> spans(prompt.visual);
  const auto left = in.chance() ? fastv::next_spans(pruned, spans.view(), spans.span())
                                : fastv::next_spans(kept.view(), spans.view(), spans.span());
  FUZZ_CHECK(left);
  FUZZ_CHECK(fastv::validate({spans.data(), *left}, (std::max)(length, std::size_t{1})));
  std::vector<TokenSpan> there;  // that kept something
  for (std::size_t s = 0; s < prompt.visual.size(); ++s) {
    const TokenSpan& span = prompt.visual[s];
    std::size_t first = 0, count = 0;
    for (const Index index : expected) {
      first += index < span.first ? 1u : 0u;
      count += index >= span.first && index < span.first + span.count ? 1u : 0u;
    }
    if (count > 0) there.push_back({first, count});
  }
  std::size_t at = 0;
  for (const TokenSpan& span : Span<const TokenSpan>(spans.data(), *left)) {
    FUZZ_CHECK(span.columns == 0 && span.original > 0);
    if (span.count == 0) continue;
    FUZZ_CHECK(at < there.size() && span.first == there[at].first && span.count == there[at].count);
    ++at;
  }
  FUZZ_CHECK(at == there.size());
  const std::vector<Image> after = images({spans.begin(), spans.begin() + *left});
  FUZZ_CHECK(after.size() == all.size());
  std::size_t numbered = 0;
  for (std::size_t p = 0; p < all.size(); ++p) {
    std::size_t stays = 0;
    for (const Index i : chosen) stays += i >= numbered && i < numbered + all[p].tokens ? 1u : 0u;
    numbered += all[p].tokens;
    FUZZ_CHECK(after[p].tokens == stays && after[p].original == all[p].original);
    FUZZ_CHECK(after[p].filtering_ratio == all[p].filtering_ratio);
    const std::size_t end = p + 1 < after.size() ? after[p + 1].first_span : *left;
    for (std::size_t s = after[p].first_span; s < end; ++s)
      FUZZ_CHECK(spans[s].count > 0 || end == after[p].first_span + 1);
  }
}

}  // namespace

FASTV_FUZZ_TARGET(select) { in.chance() ? select_once<double>(in) : select_once<float>(in); }

// select() and remaining(): every rule, quota, window and NaN pattern against plain loops.
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

// Which of one picture's tokens stay (numbers within the picture), by the rules of select.hpp.
template <class Score>
std::vector<Index> choose(const fastv::Config& config, const std::vector<Score>& scores, std::size_t columns,
                          std::size_t count, oracle::Rng& rng) {
  const std::size_t n = scores.size();
  std::vector<Index> chosen;
  if (config.selection == fastv::Selection::random) {
    for (std::size_t i = 0; chosen.size() < count; ++i)
      if (((rng.next() >> 32) * (n - i)) >> 32 < count - chosen.size()) chosen.push_back(static_cast<Index>(i));
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
    for (const Index i : oracle::top(own, shares[w])) chosen.push_back(windows[w][i]);
  }
  std::sort(chosen.begin(), chosen.end());
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
  if (in.one_in(12) && n > 0) scores[in.below(n)] = static_cast<Score>(oracle::infinity());
  return scores;
}

template <class Score>
void select_once(Input& in) {
  const oracle::Layout prompt = layout(in, 4, in.one_in(10) ? 700 : 40);
  const std::size_t total = prompt.visual_tokens();
  fastv::Config settings = config(in, total);
  settings.selection = static_cast<fastv::Selection>(in.one_in(4) ? in.between(1, 2) : 0);
  settings.seed = in.byte();
  if (in.one_in(3)) settings.uniform_share = in.share();
  if (in.one_in(3)) settings.window_rows = in.between(1, 9), settings.window_columns = in.between(1, 9);
  if (in.one_in(30)) (in.chance() ? settings.window_rows : settings.window_columns) = in.hostile();
  const std::vector<Score> drawn = draw_scores<Score>(in, total);

  const bool top_k = settings.selection == fastv::Selection::top_k, pooled = settings.quota == fastv::Quota::pooled;
  bool right = (settings.window_rows == 0) == (settings.window_columns == 0);
  std::size_t nans = 0;
  for (const Score score : drawn) {
    nans += oracle::is_nan(score) ? 1u : 0u;
    right = right && (!top_k || !std::isinf(score));
  }
  right = right && !(top_k && total > 0 && nans == total);
  std::vector<Picture> all = pictures(prompt.visual);
  const bool windows = settings.window_rows != 0 && top_k;
  for (const Picture& picture : all) right = right && !(windows && (pooled || picture.columns == 0));

  bool fits = true;
  const std::vector<std::size_t> quota = quotas(settings, all, fits);
  const std::size_t keep = std::accumulate(quota.begin(), quota.end(), std::size_t{0});
  std::vector<Index> chosen;
  if (right && total > 0) {
    oracle::Rng rng(settings.seed);
    if (pooled) {
      chosen = choose(settings, drawn, 0, keep, rng);
    } else {
      std::size_t first = 0;
      for (std::size_t p = 0; p < all.size(); ++p) {
        const auto from = drawn.begin() + static_cast<std::ptrdiff_t>(first);
        const std::vector<Score> own(from, from + static_cast<std::ptrdiff_t>(all[p].tokens));
        for (const Index i : choose(settings, own, all[p].columns, quota[p], rng))
          chosen.push_back(static_cast<Index>(first + i));
        first += all[p].tokens;
      }
    }
  }
  const std::vector<Index> expected = oracle::whole_prompt(prompt.tokens, prompt.visual, chosen);

  // Every buffer is exactly as large as it must be.
  const Block<TokenSpan> visual(prompt.visual);
  const Block<Score> scores(drawn);
  const std::size_t length = prompt.tokens - total + keep;
  const Block<Index> kept(length, Index(-1)), room(prompt.visual.size());
  const Block<fastv::detail::Word<Score>> marks(total);
  const Span<const Score> handed = top_k || in.chance() ? scores.view() : Span<const Score>();
  const auto selected =
      fastv::select<Score>(settings, handed, visual.view(), prompt.tokens, kept.span(), room.span(), marks.span());
  check_message(selected.status);
  FUZZ_CHECK(static_cast<bool>(selected) == right);
  fastv::Pruner<Score> pruner(settings);
  const fastv::Kept pruned = pruner.prune(fastv::Scores<Score>{scores.view(), prompt.tokens}, visual.view());
  FUZZ_CHECK(pruned.code() == selected.code());
  if (!right) return;
  FUZZ_CHECK(selected->count == length && selected->nan_scores == (top_k ? nans : 0));
  FUZZ_CHECK(std::equal(kept.begin(), kept.end(), expected.begin(), expected.end()));
  FUZZ_CHECK(std::equal(pruned.begin(), pruned.end(), expected.begin(), expected.end()));

  // Rooms that are too small, or not there.
  const auto again = [&](Span<const Score> s, Span<Index> k, Span<Index> q, Span<fastv::detail::Word<Score>> m) {
    return fastv::select<Score>(settings, s, visual.view(), prompt.tokens, k, q, m).code();
  };
  FUZZ_CHECK(again(scores.view(), {kept.data(), length - 1}, room.span(), marks.span()) == Errc::room_too_small);
  FUZZ_CHECK(again(scores.view(), {nullptr, length}, room.span(), marks.span()) == Errc::null_data);
  if (total > 0) {
    FUZZ_CHECK(again(scores.view(), kept.span(), room.span(), {marks.data(), total - 1}) == Errc::room_too_small);
    FUZZ_CHECK(again(scores.view(), kept.span(), room.span(), {nullptr, total}) == Errc::null_data);
    if (!pooled) {
      FUZZ_CHECK(again(scores.view(), kept.span(), {room.data(), all.size() - 1}, marks.span()) ==
                 Errc::room_too_small);
      FUZZ_CHECK(again(scores.view(), kept.span(), {nullptr, all.size()}, marks.span()) == Errc::null_data);
    }
    if (top_k) {
      FUZZ_CHECK(again({scores.data(), total - 1}, kept.span(), room.span(), marks.span()) == Errc::scores_size);
      FUZZ_CHECK(again({nullptr, total}, kept.span(), room.span(), marks.span()) == Errc::null_data);
    }
  }

  // The spans of what stayed, in place as the decoder does it.
  const Block<TokenSpan> spans(prompt.visual);
  const auto left = fastv::remaining(kept.view(), spans.view(), spans.span());
  FUZZ_CHECK(left);
  std::size_t written = 0;
  std::vector<std::size_t> original_of_picture, now_of_picture;
  for (std::size_t s = 0; s < prompt.visual.size(); ++s) {
    const TokenSpan& span = prompt.visual[s];
    std::size_t first = 0, count = 0;
    for (const Index index : expected) {
      first += index < span.first ? 1u : 0u;
      count += index >= span.first && index < span.first + span.count ? 1u : 0u;
    }
    if (count == 0) continue;
    FUZZ_CHECK(written < *left && spans[written].first == first && spans[written].count == count);
    ++written;
  }
  FUZZ_CHECK(written == *left);
  // A picture that kept anything still knows how many tokens it had.
  const std::vector<Picture> after = pictures({spans.begin(), spans.begin() + written});
  std::size_t place = 0, numbered = 0;
  for (const Picture& picture : all) {
    std::size_t stays = 0;
    for (const Index i : chosen) stays += i >= numbered && i < numbered + picture.tokens ? 1u : 0u;
    numbered += picture.tokens;
    if (stays == 0) continue;
    FUZZ_CHECK(place < after.size() && after[place].tokens == stays && after[place].original == picture.original);
    ++place;
  }
  FUZZ_CHECK(place == after.size());
}

}  // namespace

FASTV_FUZZ_TARGET(select) { in.chance() ? select_once<double>(in) : select_once<float>(in); }

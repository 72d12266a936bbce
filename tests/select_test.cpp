// Selection against a stable sort, and what holds for every rule: ascending, unique, exactly as planned.
#include "fastv/select.hpp"

#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <set>

#include "oracle.hpp"

namespace {

using namespace fastv;
using oracle::nan_float;

// The numbers of the marked tokens.
template <class Mark>
std::vector<Index> marked(const std::vector<Mark>& marks) {
  std::vector<Index> kept;
  for (std::size_t i = 0; i < marks.size(); ++i)
    if (marks[i] == detail::chosen<Mark>) kept.push_back(static_cast<Index>(i));
  return kept;
}
template <class Score>
std::vector<Index> top_k(const std::vector<Score>& scores, std::size_t count) {
  std::vector<detail::Word<Score>> marks;
  for (const Score score : scores) marks.push_back(detail::order_key(score));
  mark_top<detail::Word<Score>>(count, [&](auto take) {
    for (auto& mark : marks) take(mark);
  });
  return marked(marks);
}
std::vector<Index> uniform(std::size_t n, std::size_t columns, std::size_t count) {
  std::vector<std::uint32_t> marks(n);
  mark_uniform(marks.data(), n, columns, count);
  return marked(marks);
}
std::vector<Index> random_subset(std::size_t n, std::size_t count, std::uint64_t seed) {
  std::vector<std::uint32_t> marks(n);
  detail::Random random(seed);
  mark_random(marks.data(), n, count, random);
  return marked(marks);
}
bool strictly_ascending_below(const std::vector<Index>& kept, std::size_t n) {
  for (std::size_t i = 0; i < kept.size(); ++i)
    if (kept[i] >= n || (i > 0 && kept[i] <= kept[i - 1])) return false;
  return true;
}

struct Outcome {
  std::vector<Index> kept;
  std::size_t nan_scores = 0;
  Status status;
};
template <class Score>
Outcome select_from(const Config& config, const std::vector<Score>& scores, const oracle::Layout& layout) {
  Outcome out;
  out.kept.assign(layout.tokens, Index(-1));
  std::vector<Index> quotas(layout.visual.size());
  std::vector<detail::Word<Score>> marks(layout.visual_tokens());
  const auto selected = select<Score>(config, scores, layout.visual, layout.tokens, out.kept, quotas, marks);
  out.status = selected.status;
  out.nan_scores = selected->nan_scores;
  out.kept.resize(selected->count);
  return out;
}

// ---- top-k --------------------------------------------------------------------------------------

// Scores of every awkward kind: many ties, NaN of both signs, zeros of both signs, denormals.
template <class Score>
std::vector<Score> awkward_scores(oracle::Rng& rng, std::size_t n) {
  const std::size_t levels = rng.between(1, 2 * n);
  const double nan_share = rng.chance(0.3) ? rng.real() : 0;
  const bool denormal = rng.chance(0.2);
  std::vector<Score> scores(n);
  for (Score& score : scores) {
    const double level = static_cast<double>(rng.below(levels)) - (rng.chance(0.3) ? static_cast<double>(levels) : 0);
    score = static_cast<Score>(level / 7);
    if (denormal) {
      const auto bits = static_cast<detail::Word<Score>>(rng.below(levels) + 1);
      std::memcpy(&score, &bits, sizeof(score));
    }
    if (rng.chance(0.05)) score = rng.chance(0.5) ? Score(0) : -Score(0);
    if (rng.chance(nan_share)) score = static_cast<Score>(nan_float());
  }
  return scores;
}

template <class Score>
class TopK : public testing::Test {};
using ScoreTypes = testing::Types<float, double>;
TYPED_TEST_SUITE(TopK, ScoreTypes, );  // the comma is for clang -Wpedantic

TYPED_TEST(TopK, EqualsAStableSortWithNaNLast) {
  oracle::Rng rng(30);
  for (int draw = 0; draw < 6000; ++draw) {
    const std::size_t n = rng.chance(0.1) ? rng.between(1, 700) : rng.between(1, 40);
    const auto scores = awkward_scores<TypeParam>(rng, n);
    const std::size_t count = rng.between(0, n);
    ASSERT_EQ(top_k(scores, count), oracle::top(scores, count)) << "draw " << draw << ", " << count << " of " << n;
  }
}

TYPED_TEST(TopK, OfEqualScoresTheEarlierStays) {
  const std::vector<TypeParam> scores = {1, 2, 1, 2, 1, 2, 3};
  EXPECT_EQ(top_k(scores, 2), (std::vector<Index>{1, 6}));
  EXPECT_EQ(top_k(scores, 3), (std::vector<Index>{1, 3, 6}));
  EXPECT_EQ(top_k(scores, 5), (std::vector<Index>{0, 1, 3, 5, 6}));
  EXPECT_EQ(top_k(std::vector<TypeParam>(9, TypeParam(0.5)), 4), (std::vector<Index>{0, 1, 2, 3}));
}

TYPED_TEST(TopK, MinusZeroTiesWithZero) {
  const std::vector<TypeParam> scores = {-TypeParam(0), TypeParam(0), -TypeParam(0), TypeParam(0)};
  EXPECT_EQ(top_k(scores, 2), (std::vector<Index>{0, 1}));
}

TYPED_TEST(TopK, NaNRanksBelowTheLowestNumberAndIsFilledUpWithInOrder) {
  const auto nan = static_cast<TypeParam>(nan_float());
  const std::vector<TypeParam> scores = {nan, -std::numeric_limits<TypeParam>::max(), -nan, 5, nan};
  EXPECT_EQ(top_k(scores, 2), (std::vector<Index>{1, 3}));
  EXPECT_EQ(top_k(scores, 3), (std::vector<Index>{0, 1, 3}));
  EXPECT_EQ(top_k(scores, 4), (std::vector<Index>{0, 1, 2, 3}));
}

TYPED_TEST(TopK, NeighbouringDenormalsAreToldApart) {
  std::vector<TypeParam> scores(5);
  for (std::size_t i = 0; i < scores.size(); ++i) {
    const auto bits = static_cast<detail::Word<TypeParam>>(i == 3 ? 1000 : 999);  // by bits: no arithmetic flushes them
    std::memcpy(&scores[i], &bits, sizeof(scores[i]));
  }
  EXPECT_EQ(top_k(scores, 1), (std::vector<Index>{3}));
}

TYPED_TEST(TopK, ScoresThatDifferInTheLastBitAreToldApart) {
  std::vector<TypeParam> scores(300, TypeParam(0.25));
  scores[250] = std::nextafter(TypeParam(0.25), TypeParam(1));
  scores[10] = std::nextafter(TypeParam(0.25), TypeParam(0));
  EXPECT_EQ(top_k(scores, 1), (std::vector<Index>{250}));
  const auto most = top_k(scores, 299);
  EXPECT_EQ(std::count(most.begin(), most.end(), Index{10}), 0);
}

// ---- random -------------------------------------------------------------------------------------

TEST(RandomRule, TheSameSeedGivesTheSameSubsetAndAnotherSeedAnother) {
  EXPECT_EQ(random_subset(576, 58, 7), random_subset(576, 58, 7));
  EXPECT_NE(random_subset(576, 58, 7), random_subset(576, 58, 8));
  EXPECT_EQ(random_subset(12, 5, 0), (std::vector<Index>{1, 2, 4, 6, 8})) << "a seed means the same in every version";
}

TEST(RandomRule, KeepsExactlySoManyAscending) {
  oracle::Rng rng(31);
  for (int draw = 0; draw < 3000; ++draw) {
    const std::size_t n = rng.between(0, 80), count = rng.between(0, n);
    ASSERT_TRUE(strictly_ascending_below(random_subset(n, count, rng.next()), n)) << count << " of " << n;
  }
}

TEST(RandomRule, ReachesEverySubsetEquallyOften) {
  // 4 of 8 tokens, 70 subsets, 35,000 seeds: chi-square with 69 degrees of freedom stays below 120 with
  // probability 0.9999; the seeds are fixed, so this passes always or never.
  std::map<std::vector<Index>, int> seen;
  for (std::uint64_t seed = 0; seed < 35000; ++seed) ++seen[random_subset(8, 4, seed)];
  EXPECT_EQ(seen.size(), 70u) << "every subset is reachable";
  double chi_square = 0;
  for (const auto& entry : seen) chi_square += (entry.second - 500.0) * (entry.second - 500.0) / 500.0;
  EXPECT_LT(chi_square, 120);
}

TEST(RandomRule, KeepsEveryTokenEquallyOften) {
  std::vector<int> seen(100, 0);
  for (std::uint64_t seed = 0; seed < 20000; ++seed)
    for (const Index i : random_subset(100, 10, seed)) ++seen[i];
  double chi_square = 0;  // 99 degrees of freedom, cells of variance 1800: below 160 with probability 0.9999
  for (const int count : seen) chi_square += (count - 2000.0) * (count - 2000.0) / 1800.0;
  EXPECT_LT(chi_square, 160);
}

// ---- uniform ------------------------------------------------------------------------------------

TEST(UniformRule, KeepsExactlySoManyAscendingWithAndWithoutAGrid) {
  for (std::size_t n = 1; n <= 72; ++n)
    for (std::size_t columns = 0; columns <= n; ++columns) {
      if (columns != 0 && n % columns != 0) continue;
      for (std::size_t count = 0; count <= n; ++count)
        ASSERT_TRUE(strictly_ascending_below(uniform(n, columns, count), n))
            << count << " of " << n << " in rows of " << columns;
    }
}

TEST(UniformRule, WithoutAGridTheGapsDifferByAtMostOne) {
  for (const std::size_t n : {10u, 97u, 576u})
    for (std::size_t count = 1; count <= n; ++count) {
      const auto kept = uniform(n, 0, count);
      std::size_t least = n, most = 0;
      for (std::size_t i = 1; i < count; ++i) {
        least = std::min<std::size_t>(least, kept[i] - kept[i - 1]);
        most = std::max<std::size_t>(most, kept[i] - kept[i - 1]);
      }
      ASSERT_TRUE(count == 1 || most - least <= 1) << count << " of " << n;
      const auto before = static_cast<std::ptrdiff_t>(kept.front());
      const auto after = static_cast<std::ptrdiff_t>(n - 1 - kept.back());
      ASSERT_LE(std::abs(before - after), 1) << "the margins match: " << count << " of " << n;
    }
}

TEST(UniformRule, MiddlesOfStretchesInTheLongestPrompt) {
  // Marks of one byte in memory that the system hands out as it is touched: a page a mark, where words would fill 8
  // GiB.
  const std::unique_ptr<std::uint8_t, void (*)(void*)> marks(static_cast<std::uint8_t*>(std::calloc(max_tokens, 1)),
                                                             std::free);
  ASSERT_NE(marks, nullptr);
  const std::size_t count = std::size_t{1} << 18;
  mark_uniform(marks.get(), max_tokens, 0, count);
  // As many places as marks, so that where all are marked, nothing else is.
  for (std::size_t i = 0; i < count; ++i)
    ASSERT_EQ(marks.get()[(2 * i + 1) * max_tokens / (2 * count)], detail::chosen<std::uint8_t>) << i;
}

TEST(UniformRule, OnAGridEveryRowAndEveryStretchOfColumnsGetsItsShare) {
  const std::size_t side = 24;
  for (const std::size_t count : {24u, 58u, 96u, 144u, 288u, 432u}) {
    const auto kept = uniform(side * side, side, count);
    std::vector<std::size_t> rows(side, 0), columns(4, 0);
    for (const Index i : kept) {
      ++rows[i / side];
      ++columns[i % side / 6];
    }
    const auto minmax = std::minmax_element(rows.begin(), rows.end());
    EXPECT_LE(*minmax.second - *minmax.first, 1u) << count;
    for (const std::size_t in_quarter : columns)  // a quarter of the columns, give or take one in each row at most
      EXPECT_NEAR(static_cast<double>(in_quarter), static_cast<double>(count) / 4, static_cast<double>(count) / 10)
          << count;
  }
}

// Mean squared distance of a patch to the nearest kept one, on a picture of `side` rows and columns.
double mean_squared_distance(std::size_t side, const std::vector<Index>& kept) {
  double sum = 0;
  for (std::size_t token = 0; token < side * side; ++token) {
    double nearest = 1e9;
    for (const Index i : kept) {
      const double down = static_cast<double>(token / side) - static_cast<double>(i / side);
      const double across = static_cast<double>(token % side) - static_cast<double>(i % side);
      nearest = std::min(nearest, down * down + across * across);
    }
    sum += nearest;
  }
  return sum / static_cast<double>(side * side);
}

TEST(UniformRule, OnAGridThePatchesLieAlmostAsCloseAsToASquareLattice) {
  // A square lattice that keeps one patch in A has a mean squared distance of A / 6.
  const std::size_t side = 24;
  for (const std::size_t count : {24u, 36u, 58u, 72u, 96u, 115u, 144u, 288u, 432u}) {
    const double lattice = static_cast<double>(side * side) / static_cast<double>(count) / 6;
    const double distance = mean_squared_distance(side, uniform(side * side, side, count));
    EXPECT_LT(distance, 1.7 * lattice) << count;
    EXPECT_LT(distance, mean_squared_distance(side, random_subset(side * side, count, 1))) << count;
  }
}

// ---- the whole prompt ---------------------------------------------------------------------------

TEST(Select, PerSpanRanksInsideEverySpan) {
  const oracle::Layout layout{12, {{1, 4}, {6, 4}}};
  const std::vector<float> scores = {9, 8, 7, 6, 1, 4, 2, 3};
  const auto selected = select_from(Config{}, scores, layout);
  EXPECT_EQ(selected.kept, (std::vector<Index>{0, 1, 2, 5, 7, 9, 10, 11}));
}

TEST(Select, PooledRanksAcrossTheSpans) {
  const oracle::Layout layout{12, {{1, 4}, {6, 4}}};
  const std::vector<float> scores = {9, 8, 7, 6, 1, 4, 2, 3};
  Config config;
  config.quota = Quota::pooled;
  const auto selected = select_from(config, scores, layout);
  EXPECT_EQ(selected.kept, (std::vector<Index>{0, 1, 2, 3, 4, 5, 10, 11}));
}

TEST(Select, CountsNaNScores) {
  const oracle::Layout layout{12, {{1, 4}, {6, 4}}};
  const std::vector<float> scores = {nan_float(), 8, 7, -nan_float(), 1, 4, nan_float(), 3};
  const auto selected = select_from(Config{}, scores, layout);
  EXPECT_EQ(selected.nan_scores, 3u);
  EXPECT_EQ(selected.kept, (std::vector<Index>{0, 2, 3, 5, 7, 9, 10, 11}));
}

TEST(Select, AnInfiniteScoreIsRefusedAndNaNIsNot) {
  const oracle::Layout layout{5, {{1, 3}}};
  EXPECT_EQ(select_from(Config{}, std::vector<float>{1, oracle::infinity(), 2}, layout).status.code,
            Errc::infinite_score);
  EXPECT_EQ(select_from(Config{}, std::vector<float>(3, nan_float()), layout).status.code, Errc::all_scores_nan);
  EXPECT_TRUE(select_from(Config{}, std::vector<float>{1, nan_float(), 2}, layout).status);
}

TEST(Select, EverySpanDrawsItsOwnRandomSubset) {
  Config config;
  config.selection = Selection::random;
  config.seed = 5;
  const auto selected = select_from(config, std::vector<float>(), oracle::Layout{121, {{0, 60}, {60, 60}}});
  const std::vector<Index> first(selected.kept.begin(), selected.kept.begin() + 30);
  std::vector<Index> second(selected.kept.begin() + 30, selected.kept.begin() + 60);
  for (Index& i : second) i -= 60;
  EXPECT_NE(first, second);
}

TEST(Select, RandomDrawsFromTheSeedOfItsSettings) {
  Config config;
  config.selection = Selection::random;
  const oracle::Layout picture{61, {{0, 60}}};
  for (const std::uint64_t seed : {0u, 5u, 6u}) {
    config.seed = seed;
    auto kept = select_from(config, std::vector<float>(), picture).kept;
    kept.pop_back();  // the text
    EXPECT_EQ(kept, random_subset(60, 30, seed));
  }
}

TEST(Select, UniformUsesTheColumnsOfItsSpan) {
  Config config;
  config.selection = Selection::uniform;
  config.filtering_ratio = 0.75;
  const oracle::Layout layout{39, {{2, 36, 6}}};
  const auto selected = select_from(config, std::vector<float>(), layout);
  auto expected = uniform(36, 6, 9);
  EXPECT_EQ(selected.kept, oracle::whole_prompt(39, layout.visual, expected));
  EXPECT_NE(expected, uniform(36, 0, 9));
}

// What the rule should choose among the visual tokens, numbered through all spans.
std::vector<Index> expected_choice(const Config& config, const std::vector<float>& scores, const oracle::Layout& layout,
                                   std::size_t planned) {
  if (config.quota == Quota::pooled) return oracle::top(scores, planned);
  std::vector<std::size_t> lengths, share;
  for (const TokenSpan& span : layout.visual) lengths.push_back(span.count);
  if (config.keep_count != by_ratio) {
    share = oracle::quotas(lengths, config.keep_count);
  } else {
    for (const std::size_t length : lengths) share.push_back(oracle::kept_of(length, config.filtering_ratio));
  }
  std::vector<Index> chosen;
  std::size_t first = 0;
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    const auto begin = scores.begin() + static_cast<std::ptrdiff_t>(first);
    const std::vector<float> own(begin, begin + static_cast<std::ptrdiff_t>(lengths[s]));
    for (const Index i : oracle::top(own, share[s])) chosen.push_back(i + static_cast<Index>(first));
    first += lengths[s];
  }
  return chosen;
}

TEST(Select, RandomShapesKeepWhatTheOracleKeepsAndAlwaysExactlyThePlan) {
  oracle::Rng rng(32);
  for (int draw = 0; draw < 6000; ++draw) {
    const oracle::Layout layout = oracle::random_layout(rng, 5, 30);
    const std::size_t total = layout.visual_tokens();
    Config config;
    config.selection = static_cast<Selection>(rng.below(3));
    config.quota = rng.chance(0.5) ? Quota::pooled : Quota::per_picture;
    config.filtering_ratio = rng.chance(0.3) ? static_cast<double>(rng.below(5)) / 4 : rng.real();
    if (rng.chance(0.4)) config.keep_count = rng.between(0, total);
    config.seed = rng.next();
    auto scores = awkward_scores<float>(rng, std::max<std::size_t>(total, 1));
    scores[rng.below(scores.size())] = 0.5f;  // not all NaN
    scores.resize(total);
    SCOPED_TRACE(testing::Message() << "draw " << draw);

    const auto plan = make_plan(config, {layout.tokens, 4, layout.visual});
    ASSERT_TRUE(plan) << plan.message().c_str();
    const auto selected = select_from(config, scores, layout);
    ASSERT_TRUE(selected.status) << selected.status.message().c_str();
    ASSERT_EQ(selected.kept.size(), plan->kept());
    ASSERT_TRUE(strictly_ascending_below(selected.kept, layout.tokens));
    const std::set<Index> kept(selected.kept.begin(), selected.kept.end());
    for (const Index text : oracle::whole_prompt(layout.tokens, layout.visual, {}))
      ASSERT_EQ(kept.count(text), 1u) << "text token " << text << " was dropped";
    if (config.selection != Selection::top_k) continue;
    ASSERT_EQ(selected.kept, oracle::whole_prompt(layout.tokens, layout.visual,
                                                  expected_choice(config, scores, layout, plan->kept_visual())));
    ASSERT_EQ(selected.nan_scores, static_cast<std::size_t>(std::count_if(scores.begin(), scores.end(),
                                                                          [](float s) { return oracle::is_nan(s); })));
  }
}

TEST(Select, RatioZeroIsTheIdentityAndRatioOneKeepsTheText) {
  oracle::Rng rng(33);
  for (int draw = 0; draw < 300; ++draw) {
    const oracle::Layout layout = oracle::random_layout(rng, 4, 20);
    std::vector<Index> identity(layout.tokens);
    std::iota(identity.begin(), identity.end(), Index{0});
    std::vector<float> scores(layout.visual_tokens());
    for (float& score : scores) score = static_cast<float>(rng.real());
    for (const Selection rule : {Selection::top_k, Selection::random, Selection::uniform})
      for (const Quota quota : {Quota::per_picture, Quota::pooled}) {
        Config config;
        config.selection = rule;
        config.quota = quota;
        config.filtering_ratio = 0;
        ASSERT_EQ(select_from(config, scores, layout).kept, identity);
        config.filtering_ratio = 1;
        ASSERT_EQ(select_from(config, scores, layout).kept, oracle::whole_prompt(layout.tokens, layout.visual, {}));
      }
  }
}

TEST(Select, ScalingTheScoresByAPowerOfTwoChangesNothing) {
  oracle::Rng rng(34);
  const oracle::Layout layout{90, {{3, 80}}};
  std::vector<float> scores(80), scaled(80);
  for (std::size_t i = 0; i < 80; ++i) {
    scores[i] = static_cast<float>(rng.real());
    scaled[i] = std::ldexp(scores[i], -20);
  }
  EXPECT_EQ(select_from(Config{}, scores, layout).kept, select_from(Config{}, scaled, layout).kept);
}

TEST(Select, WritesNothingBehindThePlannedLength) {
  const oracle::Layout layout{12, {{1, 4}, {6, 4}}};
  const std::vector<float> scores = {9, 8, 7, 6, 1, 4, 2, 3};
  for (const Quota quota : {Quota::per_picture, Quota::pooled}) {
    Config config;
    config.quota = quota;
    std::vector<Index> kept(12, Index{77}), quotas(2);
    std::vector<std::uint32_t> marks(8);
    ASSERT_TRUE(select<float>(config, scores, layout.visual, 12, kept, quotas, marks));
    EXPECT_EQ(std::vector<Index>(kept.begin() + 8, kept.end()), std::vector<Index>(4, Index{77}));
  }
}

}  // namespace

// Selection against a slow one by sorting, and what holds for every rule: ascending, unique, exactly as planned.
#include "fastv/select.hpp"

#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <set>

#include "oracle.hpp"

namespace select_test {
namespace {

using namespace fastv;
using oracle::nan_float;
using oracle::Rng;

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
  detail::mark_top<detail::Word<Score>>(count, [&](auto take) {
    for (auto& mark : marks) take(mark);
  });
  return marked(marks);
}
std::vector<Index> uniform(std::size_t n, std::size_t columns, std::size_t count) {
  std::vector<std::uint32_t> marks(n);
  detail::mark_uniform(marks.data(), n, columns, count);
  return marked(marks);
}
std::vector<Index> random_subset(std::size_t n, std::size_t count, std::uint64_t seed) {
  std::vector<std::uint32_t> marks(n);
  detail::Random random(seed);
  detail::mark_random(marks.data(), n, count, random);
  return marked(marks);
}
bool strictly_ascending_below(const std::vector<Index>& kept, std::size_t n) {
  for (std::size_t i = 0; i < kept.size(); ++i)
    if (kept[i] >= n || (i > 0 && kept[i] <= kept[i - 1])) return false;
  return true;
}

struct Outcome {
  std::vector<Index> kept;
  std::size_t nan_scores = 0, zero_scores = 0;
  Status status;
};
template <class Score>
Outcome select_from(const Config& config, const std::vector<Score>& scores, const oracle::Layout& layout) {
  Outcome out;
  out.kept.assign(layout.tokens, Index(-1));
  std::vector<Mark<Score>> scratch(select_scratch(config, layout.visual));
  const auto selected = select<Score>(config, scores, layout.visual, layout.tokens, out.kept, scratch);
  out.status = selected.status;
  out.nan_scores = selected->nan_scores;
  out.zero_scores = selected->zero_scores;
  out.kept.resize(selected->count);
  return out;
}
Outcome select_from(const Config& config, const oracle::Layout& layout) {
  return select_from(config, std::vector<float>(), layout);
}

// ---- top-k --------------------------------------------------------------------------------------

// Scores of every awkward kind: many ties, NaN of both signs, zeros of both signs, denormals.
template <class Score>
std::vector<Score> awkward_scores(Rng& rng, std::size_t n) {
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
  Rng rng(30);
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
  Rng rng(31);
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
  detail::mark_uniform(marks.get(), max_tokens, 0, count);
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

// Mean squared distance of a patch to the nearest kept one, on an image of `side` rows and columns.
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

TEST(Select, PerImageRanksInsideEveryImage) {
  const oracle::Layout layout{12, {{1, 4}, {6, 4}}};
  const std::vector<float> scores = {9, 8, 7, 6, 1, 4, 2, 3};
  const auto selected = select_from(Config{}, scores, layout);
  EXPECT_EQ(selected.kept, (std::vector<Index>{0, 1, 2, 5, 7, 9, 10, 11}));
}

TEST(Select, PooledRanksAcrossTheImages) {
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
  EXPECT_EQ(select_from(Config{}, std::vector<float>{1, oracle::infinity(), 2}, layout).status.code, Errc::bad_value);
  EXPECT_EQ(select_from(Config{}, std::vector<float>{1, -oracle::infinity(), 2}, layout).status.code, Errc::bad_value);
  EXPECT_EQ(select_from(Config{}, std::vector<float>(3, nan_float()), layout).status.code, Errc::bad_value);
  EXPECT_TRUE(select_from(Config{}, std::vector<float>{1, nan_float(), 2}, layout).status);
}

TEST(Select, EveryImageDrawsItsOwnRandomSubset) {
  Config config;
  config.selection = Selection::random;
  config.seed = 5;
  const auto selected = select_from(config, oracle::Layout{121, {{0, 60}, {60, 60}}});
  const std::vector<Index> first(selected.kept.begin(), selected.kept.begin() + 30);
  std::vector<Index> second(selected.kept.begin() + 30, selected.kept.begin() + 60);
  for (Index& i : second) i -= 60;
  EXPECT_NE(first, second);
}

TEST(Select, RandomDrawsFromTheSeedOfItsSettings) {
  Config config;
  config.selection = Selection::random;
  const oracle::Layout image{61, {{0, 60}}};
  for (const std::uint64_t seed : {0u, 5u, 6u}) {
    config.seed = seed;
    auto kept = select_from(config, image).kept;
    kept.pop_back();  // the text
    EXPECT_EQ(kept, random_subset(60, 30, seed));
  }
}

TEST(Select, UniformUsesTheColumnsOfItsImage) {
  Config config;
  config.selection = Selection::uniform;
  config.filtering_ratio = 0.75;
  const oracle::Layout layout{39, {{2, 36, 6}}};
  const auto selected = select_from(config, layout);
  auto expected = uniform(36, 6, 9);
  EXPECT_EQ(selected.kept, oracle::whole_prompt(39, layout.visual, expected));
  EXPECT_NE(expected, uniform(36, 0, 9));
}

TEST(Select, APoolGivesEveryFrameItsMinimum) {
  // Every token of the first frame scores above all others: without minima it takes the whole pool.
  std::vector<TokenSpan> frames;
  std::vector<float> scores;
  for (std::size_t f = 0; f < 4; ++f) {
    frames.push_back({1 + 9 * f, 8, 4});
    for (std::size_t i = 0; i < 8; ++i) scores.push_back(static_cast<float>(f == 0 ? 100 + i : 10 * (4 - f) + i));
  }
  const oracle::Layout layout{40, frames};
  const auto kept_of_frames = [&](const Config& config) {
    std::vector<std::size_t> of(4, 0);
    const Outcome selected = select_from(config, scores, layout);
    EXPECT_TRUE(selected.status) << selected.status.message().c_str();
    for (const Index index : selected.kept)
      for (std::size_t f = 0; f < 4; ++f) of[f] += index >= frames[f].first && index < frames[f].first + 8 ? 1u : 0u;
    return of;
  };
  for (const bool by_count : {false, true}) {
    Config config;
    config.quota = Quota::pooled;
    config.filtering_ratio = 0.75;
    if (by_count) config.keep_count = 8;
    EXPECT_EQ(kept_of_frames(config), (std::vector<std::size_t>{8, 0, 0, 0}));
    config.min_per_image = 1;
    EXPECT_EQ(kept_of_frames(config), (std::vector<std::size_t>{5, 1, 1, 1}));
    EXPECT_EQ(select_from(config, scores, layout).kept, oracle::whole_prompt(40, frames, {3, 4, 5, 6, 7, 15, 23, 31}))
        << "the best of each, then of all";
    config.min_per_image = 2;
    EXPECT_EQ(kept_of_frames(config), (std::vector<std::size_t>{2, 2, 2, 2}));
    for (const Selection rule : {Selection::random, Selection::uniform})
      for (std::uint64_t seed = 0; seed < 200; ++seed) {
        config.selection = rule;
        config.min_per_image = 1;
        config.seed = seed;
        const std::vector<std::size_t> of = kept_of_frames(config);
        ASSERT_EQ(of[0] + of[1] + of[2] + of[3], 8u);
        for (const std::size_t count : of) ASSERT_GE(count, 1u) << "seed " << seed;
      }
  }
  Config config;  // too few for a minimum each: the best of all
  config.quota = Quota::pooled;
  config.min_per_image = 1;
  config.keep_count = 3;
  EXPECT_EQ(kept_of_frames(config), (std::vector<std::size_t>{3, 0, 0, 0}));
  config.keep_count = 4;
  EXPECT_EQ(kept_of_frames(config), (std::vector<std::size_t>{1, 1, 1, 1}));
  config.keep_count = by_ratio;  // a ratio gives way to the minima
  config.filtering_ratio = 1;
  EXPECT_EQ(kept_of_frames(config), (std::vector<std::size_t>{1, 1, 1, 1}));
}

TEST(Select, APoolsEvenGridLeavesRoomForTheMinima) {
  // The grid alone would take all ten, from the first image only.
  const oracle::Layout layout{110, {{1, 100}, {102, 2}, {105, 2}}};
  Config config;
  config.quota = Quota::pooled;
  config.keep_count = 10;
  config.uniform_share = 1;
  config.min_per_image = 1;
  const Outcome selected = select_from(config, std::vector<float>(104, 0.5f), layout);
  ASSERT_TRUE(selected.status);
  const std::set<Index> kept(selected.kept.begin(), selected.kept.end());
  EXPECT_EQ(kept.size(), 110u - 104 + 10);
  EXPECT_EQ(kept.count(102) + kept.count(103), 1u);
  EXPECT_EQ(kept.count(105) + kept.count(106), 1u);
}

TEST(Select, ARandomPoolWithMinimaFavoursNoTokenOfEqualFrames) {
  const oracle::Layout layout{33, {{0, 8}, {8, 8}, {16, 8}, {24, 8}}};
  Config config;
  config.selection = Selection::random;
  config.quota = Quota::pooled;
  config.keep_count = 8;
  config.min_per_image = 1;
  std::vector<int> seen(32, 0);
  for (config.seed = 0; config.seed < 20000; ++config.seed)
    for (const Index i : select_from(config, layout).kept)
      if (i < 32) ++seen[i];
  double chi_square = 0;  // 31 degrees of freedom, cells of variance 3750: below 70 with probability 0.9999
  for (const int count : seen) chi_square += (count - 5000.0) * (count - 5000.0) / 3750.0;
  EXPECT_LT(chi_square, 70);
}

// ---- scores that rank nothing -------------------------------------------------------------------

TEST(ZeroScores, AreRefusedWhereSomethingMustBeRanked) {
  const oracle::Layout layout{12, {{1, 4}, {6, 4}}};
  for (const float zero : {0.0f, -0.0f})
    for (const Quota quota : {Quota::per_image, Quota::pooled}) {
      const std::vector<float> scores(8, zero);
      Config config;
      config.quota = quota;
      const Outcome refused = select_from(config, scores, layout);
      EXPECT_EQ(refused.status.code, Errc::bad_value);
      EXPECT_NE(std::string(refused.status.message().c_str()).find("all 8 visual scores are 0"), std::string::npos);
      EXPECT_NE(std::string(refused.status.message().c_str()).find("layer 1 "), std::string::npos);
      config.keep_count = 7;
      EXPECT_EQ(select_from(config, scores, layout).status.code, Errc::bad_value);
      for (const std::size_t count : {0u, 8u}) {
        config.keep_count = count;
        const Outcome selected = select_from(config, scores, layout);
        EXPECT_TRUE(selected.status) << "nothing to rank where " << count << " of 8 stay";
        EXPECT_EQ(selected.kept.size(), 4 + count);
        EXPECT_EQ(selected.zero_scores, 8u);
      }
      for (const Selection rule : {Selection::random, Selection::uniform}) {
        config.selection = rule;
        config.keep_count = 5;
        EXPECT_TRUE(select_from(config, scores, layout).status) << "rules that look at no score";
      }
    }
}

TEST(ZeroScores, AreCountedWhereOthersAreNot) {
  const oracle::Layout layout{12, {{1, 4}, {6, 4}}};
  const Outcome selected = select_from(Config{}, std::vector<float>{0, -0.0f, 0, 2, 0, 3, 0, 1}, layout);
  ASSERT_TRUE(selected.status);
  EXPECT_EQ(selected.zero_scores, 5u);
  EXPECT_EQ(selected.kept, (std::vector<Index>{0, 1, 4, 5, 7, 9, 10, 11})) << "of equal scores the earlier token";
  EXPECT_EQ(select_from(Config{}, std::vector<double>{0, 1, 2, 3, 0, 3, -1, 1}, layout).zero_scores, 2u);
}

// What competes is an image, a window of one, or a pool: each for itself.
TEST(ZeroScores, AreRefusedWhereAGroupHasNoOthers) {
  oracle::Layout layout{24, {{1, 8, 4}, {10, 8, 4}}};
  const std::vector<float> first_only = {1, 2, 3, 4, 5, 6, 7, 8, 0, 0, -0.0f, 0, 0, 0, 0, 0};
  const auto refused = [&](const Config& config, const std::vector<float>& scores, const char* words) {
    const Outcome out = select_from(config, scores, layout);
    EXPECT_EQ(out.status.code, Errc::bad_value) << words;
    EXPECT_NE(std::string(out.status.message().c_str()).find(words), std::string::npos) << out.status.message().c_str();
    EXPECT_EQ(select_from(config, std::vector<double>(scores.begin(), scores.end()), layout).status.code,
              Errc::bad_value);
  };
  const auto ranked = [&](const Config& config, const std::vector<float>& scores) {
    const Outcome out = select_from(config, scores, layout);
    EXPECT_TRUE(out.status) << out.status.message().c_str();
  };
  Config config;
  refused(config, first_only, "4 of 8 tokens in image 1 would stay by scores that are all 0");
  refused(config, first_only, "does layer 1 see the image");
  // Nothing is left to rank in the only image that has other scores, or nothing in the other.
  for (const double ratio : {0.0, 1.0}) {
    layout.visual[0].filtering_ratio = ratio;
    refused(config, first_only, "4 of 8 tokens in image 1");
    layout.visual[0].filtering_ratio = by_config;
    layout.visual[1].filtering_ratio = ratio;
    ranked(config, first_only);
    ranked(config, std::vector<float>(16, ratio == 0 ? 0.25f : -3.0f));  // equal, but not 0
    layout.visual[1].filtering_ratio = by_config;
  }
  std::vector<float> scores = first_only;
  scores[13] = oracle::nan_float();  // below the zeros: they are ranked above it
  ranked(config, scores);
  scores[13] = 1e-40f;
  ranked(config, scores);
  // A pool has the other image's scores; the minimum of each image has not.
  config.quota = Quota::pooled;
  ranked(config, first_only);
  config.min_per_image = 3;
  refused(config, first_only, "3 of 8 tokens in image 1");
  config.min_per_image = 8;  // all of it
  ranked(config, first_only);
  config.min_per_image = 0;
  config.uniform_share = 0.5;  // the grid takes the one score that is not 0
  scores.assign(16, 0.0f);
  ranked(config, first_only);
  scores[2] = 1;
  refused(config, scores, "all scores are 0 in 1 groups of visual tokens");
  scores[2] = 0, scores[3] = 1;
  ranked(config, scores);
  config.quota = Quota::per_image;
  refused(config, first_only, "2 of 6 tokens in image 1");
  config.uniform_share = 1;  // the grid takes all
  ranked(config, std::vector<float>(16));
  config.uniform_share = 0;
  // Windows of 2 x 2, of which one has zeros alone.
  config.window_rows = config.window_columns = 2;
  scores = {0, 0, 1, 2, 0, 0, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8};
  refused(config, scores, "2 of 4 tokens in image 0");
  scores[5] = 1;
  ranked(config, scores);
  config.window_rows = config.window_columns = 1;  // one token has nothing to be ranked against
  ranked(config, first_only);
}

// A prompt without visual tokens has no scores, and none of them is 0.
TEST(ZeroScores, NoScoresAtAllAreFine) {
  const Outcome selected = select_from(Config{}, std::vector<float>(), oracle::Layout{5, {}});
  ASSERT_TRUE(selected.status) << selected.status.message().c_str();
  EXPECT_EQ(selected.kept.size(), 5u);
}

// ---- every setting against the slow selection ---------------------------------------------------

// Whether some group of the last slow selection competed by zeros alone, some to stay and some to go.
bool by_zeros_alone = false;
void compete(const std::vector<float>& scores, const std::vector<Index>& group, std::size_t stay) {
  bool zeros = stay > 0 && stay < group.size();
  for (const Index i : group) zeros = zeros && !oracle::is_nan(scores[i]) && oracle::rank_of(scores[i]) == 0;
  by_zeros_alone = by_zeros_alone || zeros;
}

// Of tokens `from`, the `count` of the highest scores.
std::vector<Index> best_of(const std::vector<float>& scores, const std::vector<Index>& from, std::size_t count) {
  std::vector<float> own;
  for (const Index i : from) own.push_back(scores[i]);
  std::vector<Index> chosen;
  for (const Index i : oracle::top(own, count)) chosen.push_back(from[i]);
  return chosen;
}
// Of tokens `from`, the middles of `count` equal stretches.
std::vector<Index> middles_of(const std::vector<Index>& from, std::size_t count) {
  std::vector<Index> chosen;
  for (std::size_t i = 0; i < count; ++i) chosen.push_back(from[(2 * i + 1) * from.size() / (2 * count)]);
  return chosen;
}
std::vector<Index> grid_of(const std::vector<Index>& from, std::size_t columns, std::size_t count) {
  if (columns == 0) return middles_of(from, count);
  std::vector<Index> chosen;
  for (const Index i : uniform(from.size(), columns, count)) chosen.push_back(from[i]);
  return chosen;
}
std::vector<Index> without(const std::vector<Index>& from, const std::set<Index>& taken) {
  std::vector<Index> left;
  for (const Index i : from)
    if (taken.count(i) == 0) left.push_back(i);
  return left;
}
std::size_t even_of(const Config& config, std::size_t count) {
  return std::min(count, static_cast<std::size_t>(static_cast<double>(count) * config.uniform_share + 0.5));
}

// One image: a part to the even grid, and of every window its best.
std::vector<Index> slow_image(const Config& config, const std::vector<float>& scores, const std::vector<Index>& from,
                              std::size_t columns, std::size_t count) {
  if (from.empty()) return {};
  const std::size_t even = even_of(config, count);
  const std::vector<Index> grid = grid_of(from, columns, even);
  std::set<Index> chosen(grid.begin(), grid.end());
  std::vector<std::vector<Index>> windows;
  if (config.window_rows == 0) {
    windows.push_back(without(from, chosen));
  } else {
    const std::size_t rows = from.size() / columns;
    for (std::size_t top = 0; top < rows; top += config.window_rows)
      for (std::size_t left = 0; left < columns; left += config.window_columns) {
        std::vector<Index> window;
        for (std::size_t r = top; r < std::min(top + config.window_rows, rows); ++r)
          for (std::size_t c = left; c < std::min(left + config.window_columns, columns); ++c)
            window.push_back(from[r * columns + c]);
        windows.push_back(without(window, chosen));
      }
  }
  if (count > even) {
    std::vector<std::size_t> sizes;
    for (const auto& window : windows) sizes.push_back(window.size());
    const std::vector<std::size_t> shares = oracle::quotas(sizes, count - even);
    for (std::size_t w = 0; w < windows.size(); ++w) {
      compete(scores, windows[w], shares[w]);
      for (const Index i : best_of(scores, windows[w], shares[w])) chosen.insert(i);
    }
  }
  return {chosen.begin(), chosen.end()};
}

// What top_k and uniform keep of the visual tokens, numbered through all spans.
std::vector<Index> slow_choice(const Config& config, const std::vector<float>& scores,
                               const std::vector<TokenSpan>& visual) {
  const std::vector<oracle::Image> images = oracle::images_of(visual);
  const oracle::Counts counts = oracle::counts_of(config, visual);
  const bool ranks = config.selection == Selection::top_k;
  std::vector<std::vector<Index>> of_image;
  std::vector<Index> all;
  for (const oracle::Image& image : images) {
    of_image.emplace_back();
    for (std::size_t i = 0; i < image.tokens(); ++i) {
      of_image.back().push_back(static_cast<Index>(all.size()));
      all.push_back(of_image.back().back());
    }
  }
  by_zeros_alone = false;
  std::set<Index> chosen;
  const auto choose = [&](const std::vector<Index>& some) { chosen.insert(some.begin(), some.end()); };
  if (config.quota == Quota::per_image) {
    for (std::size_t i = 0; i < images.size(); ++i)
      choose(ranks ? slow_image(config, scores, of_image[i], images[i].columns, counts.quota[i])
                   : grid_of(of_image[i], images[i].columns, counts.quota[i]));
    return {chosen.begin(), chosen.end()};
  }
  const std::size_t minima = std::accumulate(counts.least.begin(), counts.least.end(), std::size_t{0});
  if (ranks) choose(grid_of(all, 0, std::min(even_of(config, counts.all), counts.all - minima)));
  if (ranks) compete(scores, without(all, chosen), counts.all - chosen.size());
  for (std::size_t i = 0; i < images.size(); ++i) {
    const std::vector<Index> free = without(of_image[i], chosen);
    const std::size_t taken = of_image[i].size() - free.size();
    if (ranks && taken < counts.least[i]) compete(scores, free, counts.least[i] - taken);
    const std::size_t have = of_image[i].size() - free.size();
    if (!ranks)
      choose(grid_of(of_image[i], images[i].columns, counts.least[i]));
    else if (have < counts.least[i])
      choose(best_of(scores, free, counts.least[i] - have));
  }
  const std::vector<Index> free = without(all, chosen);
  choose(ranks ? best_of(scores, free, counts.all - chosen.size()) : middles_of(free, counts.all - chosen.size()));
  return {chosen.begin(), chosen.end()};
}

// Images of one or several spans, with grids or without, some of them left empty by an earlier stage.
oracle::Layout random_prompt(Rng& rng, std::size_t most_spans, std::size_t most_in_span, bool grids) {
  oracle::Layout layout = oracle::random_layout(rng, most_spans, most_in_span);
  for (std::size_t i = 0; i < layout.visual.size(); ++i) {
    layout.visual[i].continues = i > 0 && rng.chance(0.3);
    if (rng.chance(0.3)) layout.visual[i].original = layout.visual[i].count + rng.below(20);
  }
  if (rng.chance(0.2)) layout.visual.insert(layout.visual.begin(), TokenSpan{0, 0, 0, false, rng.between(1, 9)});
  std::size_t first = 0;
  for (std::size_t i = 0; i <= layout.visual.size(); ++i) {
    if (i < layout.visual.size() && (i == first || layout.visual[i].continues)) continue;
    std::size_t count = 0;
    for (std::size_t s = first; s < i; ++s) count += layout.visual[s].count;
    std::vector<std::size_t> divisors;
    for (std::size_t d = 1; d <= count; ++d)
      if (count % d == 0) divisors.push_back(d);
    if (count > 0 && (grids || rng.chance(0.5))) layout.visual[first].columns = divisors[rng.below(divisors.size())];
    first = i;
  }
  return layout;
}

TEST(Select, RandomPromptsKeepWhatTheSlowSelectionKeepsAndAlwaysExactlyThePlan) {
  Rng rng(32);
  int unranked = 0;
  for (int draw = 0; draw < 6000; ++draw) {
    SCOPED_TRACE(testing::Message() << "draw " << draw);
    const bool windows = rng.chance(0.3);
    oracle::Layout layout = random_prompt(rng, 5, rng.chance(0.1) ? 200 : 30, windows);
    const std::size_t total = layout.visual_tokens();
    Config config;
    config.selection = static_cast<Selection>(rng.below(3));
    config.quota = rng.chance(0.5) && !windows ? Quota::pooled : Quota::per_image;
    config.filtering_ratio = static_cast<double>(rng.chance(0.3) ? 250 * rng.below(5) : rng.below(1001)) / 1000;
    config.rounding = rng.chance(0.5) ? Rounding::up : Rounding::half_even;
    config.ratio_of = rng.chance(0.5) ? RatioOf::original : RatioOf::remaining;
    if (rng.chance(0.4)) config.keep_count = rng.between(0, total);
    if (rng.chance(0.5)) config.min_per_image = rng.between(1, 8);
    if (rng.chance(0.4)) config.uniform_share = rng.chance(0.2) ? 1 : rng.real();
    if (windows) {
      config.window_rows = rng.between(1, 9);
      config.window_columns = rng.between(1, 9);
    }
    if (config.quota == Quota::per_image && config.keep_count == by_ratio && rng.chance(0.5))
      for (TokenSpan& span : layout.visual)
        if (!span.continues && rng.chance(0.5)) span.filtering_ratio = static_cast<double>(rng.below(1001)) / 1000;
    config.seed = rng.next();
    auto scores = awkward_scores<float>(rng, std::max<std::size_t>(total, 1));
    if (rng.chance(0.3)) {  // a stretch of zeros, which may be all that some group has
      const std::size_t first = rng.below(scores.size()), last = rng.between(first, scores.size());
      for (std::size_t i = first; i < last; ++i) scores[i] = rng.chance(0.5) ? 0.0f : -0.0f;
    }
    scores[rng.below(scores.size())] = 0.5f;  // not all NaN, nor all 0
    scores.resize(total);

    const auto plan = make_plan(config, {layout.tokens, 4, layout.visual});
    ASSERT_TRUE(plan) << plan.message().c_str();
    const auto selected = select_from(config, scores, layout);
    const std::vector<Index> slow =
        config.selection == Selection::random ? std::vector<Index>() : slow_choice(config, scores, layout.visual);
    if (config.selection == Selection::top_k && by_zeros_alone) {
      ++unranked;
      ASSERT_EQ(selected.status.code, Errc::bad_value);
      continue;
    }
    ASSERT_TRUE(selected.status) << selected.status.message().c_str();
    ASSERT_EQ(selected.kept.size(), plan->kept());
    ASSERT_TRUE(strictly_ascending_below(selected.kept, layout.tokens));
    const std::set<Index> kept(selected.kept.begin(), selected.kept.end());
    for (const Index text : oracle::whole_prompt(layout.tokens, layout.visual, {}))
      ASSERT_EQ(kept.count(text), 1u) << "text token " << text << " was dropped";
    const oracle::Counts counts = oracle::counts_of(config, layout.visual);
    const std::vector<oracle::Image> images = oracle::images_of(layout.visual);
    for (std::size_t i = 0; i < images.size(); ++i) {
      std::size_t own = 0;
      for (const std::size_t position : images[i].positions) own += kept.count(static_cast<Index>(position));
      if (config.quota == Quota::per_image) {
        ASSERT_EQ(own, counts.quota[i]) << "image " << i;
      } else {
        ASSERT_GE(own, counts.least[i]) << "image " << i;
      }
    }
    if (config.selection != Selection::random) {
      ASSERT_EQ(selected.kept, oracle::whole_prompt(layout.tokens, layout.visual, slow));
    }
    if (config.selection != Selection::top_k) continue;
    std::size_t nans = 0, zeros = 0;
    for (const float score : scores) {
      nans += oracle::is_nan(score) ? 1u : 0u;
      zeros += oracle::rank_of(score) == 0 ? 1u : 0u;
    }
    ASSERT_EQ(selected.nan_scores, nans);
    ASSERT_EQ(selected.zero_scores, zeros);
  }
  EXPECT_GT(unranked, 50);
  EXPECT_LT(unranked, 1500);
}

// ---- windows ------------------------------------------------------------------------------------

// Distinct scores in random order.
std::vector<float> distinct_scores(Rng& rng, std::size_t count) {
  std::vector<float> scores(count);
  for (std::size_t i = 0; i < count; ++i) scores[i] = static_cast<float>(i + 1) / 4096;
  for (std::size_t i = count - 1; i > 0; --i) std::swap(scores[i], scores[rng.below(i + 1)]);
  return scores;
}

TEST(Windows, OfEverySizeKeepTheBestOfTheirOwnExactly) {
  Rng rng(3);
  for (const auto& [rows, columns] :
       {std::pair<std::size_t, std::size_t>{1, 1}, {1, 12}, {12, 1}, {7, 5}, {9, 9}, {12, 10}})
    for (std::size_t high = 1; high <= 9; ++high)
      for (std::size_t wide = 1; wide <= 9; ++wide)
        for (const double share : {0.0, 0.35, 1.0}) {
          const std::size_t n = rows * columns;
          std::vector<float> scores = distinct_scores(rng, n);
          if (rng.chance(0.3))
            for (float& s : scores)
              if (rng.chance(0.2)) s = 0.5f;  // ties
          if (n > 1 && rng.chance(0.2)) scores[rng.below(n)] = oracle::nan_float();
          Config config;
          config.window_rows = high;
          config.window_columns = wide;
          config.uniform_share = share;
          const oracle::Layout layout{n + 5, {{2, n, columns}}};
          for (config.keep_count = 0; config.keep_count <= n; config.keep_count += n / 5 + 1) {
            const Outcome selected = select_from(config, scores, layout);
            ASSERT_TRUE(selected.status) << selected.status.message().c_str();
            ASSERT_EQ(selected.kept,
                      oracle::whole_prompt(n + 5, layout.visual, slow_choice(config, scores, layout.visual)))
                << config.keep_count << " of " << rows << " x " << columns << " by windows of " << high << " x " << wide
                << ", even share " << share;
          }
        }
}

TEST(Windows, OneTokenAWindowIsEvenAndOneWindowIsPlain) {
  Rng rng(4);
  const std::vector<float> scores = distinct_scores(rng, 64);
  const oracle::Layout layout{70, {{0, 64, 8}}};
  Config plain, whole;
  whole.window_rows = whole.window_columns = 8;
  EXPECT_EQ(select_from(plain, scores, layout).kept, select_from(whole, scores, layout).kept);
  whole.window_rows = whole.window_columns = 100;
  EXPECT_EQ(select_from(plain, scores, layout).kept, select_from(whole, scores, layout).kept);
  Config quarters;
  quarters.window_rows = quarters.window_columns = 4;
  quarters.filtering_ratio = 0.75;
  const auto kept = select_from(quarters, scores, layout).kept;
  for (const std::size_t corner : {0u, 4u, 32u, 36u}) {
    std::size_t inside = 0;
    for (const Index i : kept) inside += i < 64 && i / 8 / 4 == corner / 8 / 4 && i % 8 / 4 == corner % 8 / 4 ? 1 : 0;
    EXPECT_EQ(inside, 4u);
  }
}

// ---- AnyRes: images of several spans ------------------------------------------------------------

TEST(AnyRes, RowsSetApartByNewlinesAreOneImageWithOneQuotaAndOneGrid) {
  Rng rng(2);
  // 6 rows of 8 patches with a newline token behind every row, which does not compete, and a thumbnail behind them.
  oracle::Layout layout{90, {}};
  for (std::size_t row = 0; row < 6; ++row) layout.visual.push_back({3 + row * 9, 8, 8, row > 0});
  layout.visual.push_back({60, 20, 5});
  Config config;
  config.filtering_ratio = 0.75;
  const std::vector<float> scores = distinct_scores(rng, 68);
  std::vector<Index> chosen = oracle::top(std::vector<float>(scores.begin(), scores.begin() + 48), 12);
  for (const Index index : oracle::top(std::vector<float>(scores.begin() + 48, scores.end()), 5))
    chosen.push_back(48 + index);
  EXPECT_EQ(select_from(config, scores, layout).kept, oracle::whole_prompt(90, layout.visual, chosen));

  config.selection = Selection::uniform;
  const auto grid = select_from(config, layout).kept;
  EXPECT_EQ(grid.size(), 90u - 68 + 17);
  for (std::size_t row = 0; row < 6; ++row) {
    const auto in_row =
        std::count_if(grid.begin(), grid.end(), [&](Index i) { return i >= 3 + row * 9 && i < 3 + row * 9 + 8; });
    EXPECT_EQ(in_row, 2) << "every row of the grid has its even share";
  }
}

// ---- extremes -----------------------------------------------------------------------------------

TEST(Select, RatioZeroIsTheIdentityAndRatioOneKeepsTheText) {
  Rng rng(33);
  for (int draw = 0; draw < 300; ++draw) {
    const oracle::Layout layout = oracle::random_layout(rng, 4, 20);
    std::vector<Index> identity(layout.tokens);
    std::iota(identity.begin(), identity.end(), Index{0});
    std::vector<float> scores(layout.visual_tokens());
    for (float& score : scores) score = static_cast<float>(rng.real());
    for (const Selection rule : {Selection::top_k, Selection::random, Selection::uniform})
      for (const Quota quota : {Quota::per_image, Quota::pooled}) {
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
  Rng rng(34);
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
  for (const Quota quota : {Quota::per_image, Quota::pooled}) {
    Config config;
    config.quota = quota;
    std::vector<Index> kept(12, Index{77});
    std::vector<std::uint32_t> scratch(select_scratch(config, layout.visual) + 4, 77u);
    ASSERT_TRUE(select<float>(config, scores, layout.visual, 12, kept, scratch));
    EXPECT_EQ(std::vector<Index>(kept.begin() + 8, kept.end()), std::vector<Index>(4, Index{77}));
    EXPECT_EQ(std::vector<std::uint32_t>(scratch.end() - 4, scratch.end()), std::vector<std::uint32_t>(4, 77u));
  }
}

}  // namespace
}  // namespace select_test

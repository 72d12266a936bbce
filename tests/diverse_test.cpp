// Selection::diverse against the published rules as their papers and code state them, in double and with whole matrices of
// similarities; then every composition against one slow rule that the published ones have been checked with.
#include <gtest/gtest.h>

#include <functional>

#include "attention.hpp"
#include "backwards.hpp"
#include "counted_new.hpp"
#include "refused.hpp"
#include "slow_greedy.hpp"

namespace diverse_test {
namespace {

using namespace slow_greedy;

// ---- the published rules, as plain as possible ----------------------------------------------------

// A choice by a loop, and the least difference between what it took and what it left: of choices that hang on the last
// digits of a float, nothing can be said.
struct Chosen {
  std::vector<Index> tokens;  // in the order in which they were taken
  double margin = 1e9;

  std::vector<Index> sorted() const {
    std::vector<Index> s = tokens;
    std::sort(s.begin(), s.end());
    return s;
  }
  bool has(std::size_t i) const { return std::count(tokens.begin(), tokens.end(), static_cast<Index>(i)) > 0; }
  // The token of the greatest value among those not taken; -1e300 forbids.
  void take_greatest(const std::vector<double>& values) {
    std::size_t best = values.size();
    for (std::size_t i = 0; i < values.size(); ++i)
      if (!has(i) && (best == values.size() || values[i] > values[best])) best = i;
    for (std::size_t i = 0; i < values.size(); ++i)
      if (!has(i) && i != best) margin = std::min(margin, values[best] - values[i]);
    tokens.push_back(static_cast<Index>(best));
  }
};

std::vector<double> min_max(const std::vector<double>& s) {
  const auto [least, most] = std::minmax_element(s.begin(), s.end());
  std::vector<double> scaled;
  for (const double x : s) scaled.push_back((x - *least) / (*most - *least));
  return scaled;
}

// IDPruner: max lambda imp - (1 - lambda) max sim, after the most important one.
Chosen idpruner(const Matrix& x, const std::vector<double>& scores, std::size_t count, double lambda) {
  const Matrix sim = cosines(x);
  const std::vector<double> importance = min_max(scores);
  Chosen chosen;
  while (chosen.tokens.size() < count) {
    std::vector<double> mmr;
    for (std::size_t i = 0; i < x.size(); ++i) {
      double most = -2;
      for (const Index j : chosen.tokens) most = std::max(most, sim[i][j]);
      mmr.push_back(chosen.tokens.empty() ? importance[i] : lambda * importance[i] - (1 - lambda) * most);
    }
    chosen.take_greatest(mmr);
  }
  return chosen;
}

// DivPrune: the farthest from its nearest neighbour, then always the farthest from those taken.
Chosen divprune(const Matrix& x, std::size_t count) {
  const Matrix sim = cosines(x);
  Chosen chosen;
  while (chosen.tokens.size() < count) {
    std::vector<double> distance;
    for (std::size_t i = 0; i < x.size(); ++i) {
      double least = 1e9;
      if (chosen.tokens.empty()) {
        for (std::size_t j = 0; j < x.size(); ++j)
          if (j != i) least = std::min(least, 1 - sim[i][j]);
      } else {
        for (const Index j : chosen.tokens) least = std::min(least, 1 - sim[i][j]);
      }
      distance.push_back(least);
    }
    chosen.take_greatest(distance);
  }
  return chosen;
}

// AnchorPrune with `anchors` of the highest scores, then max p (1 - max sim).
Chosen anchorprune(const Matrix& x, const std::vector<double>& scores, std::size_t count, std::size_t anchors) {
  const Matrix sim = cosines(x);
  Chosen chosen;
  while (chosen.tokens.size() < count) {
    std::vector<double> values;
    for (std::size_t i = 0; i < x.size(); ++i) {
      double novelty = 1e9;
      for (const Index j : chosen.tokens) novelty = std::min(novelty, 1 - sim[i][j]);
      values.push_back(chosen.tokens.size() < std::max<std::size_t>(anchors, 1) ? scores[i] : scores[i] * novelty);
    }
    chosen.take_greatest(values);
  }
  return chosen;
}

// SCOPE: max saliency^alpha sum_j max(0, sim_ij - covered_j).
Chosen scope(const Matrix& x, const std::vector<double>& scores, std::size_t count, double alpha) {
  const Matrix sim = cosines(x);
  std::vector<double> covered(x.size(), 0.0);
  Chosen chosen;
  while (chosen.tokens.size() < count) {
    std::vector<double> gains;
    for (std::size_t i = 0; i < x.size(); ++i) {
      double gain = 0;
      for (std::size_t j = 0; j < x.size(); ++j) gain += std::max(0.0, sim[i][j] - covered[j]);
      gains.push_back(gain * std::pow(scores[i], alpha));
    }
    chosen.take_greatest(gains);
    for (std::size_t j = 0; j < x.size(); ++j) covered[j] = std::max(covered[j], sim[chosen.tokens.back()][j]);
  }
  return chosen;
}

// A DPP's greedy choice by the definition: the greatest determinant of the kernel r_i sim_ij r_j of what is taken.
Chosen dpp(const Matrix& x, const std::vector<double>& relevance, std::size_t count) {
  const Matrix sim = cosines(x);
  Chosen chosen;
  double before = 1;
  while (chosen.tokens.size() < count) {
    std::vector<double> ratios;
    for (std::size_t i = 0; i < x.size(); ++i) {
      std::vector<Index> set = chosen.tokens;
      set.push_back(static_cast<Index>(i));
      Matrix kernel(set.size(), std::vector<double>(set.size()));
      for (std::size_t a = 0; a < set.size(); ++a)
        for (std::size_t b = 0; b < set.size(); ++b)
          kernel[a][b] = relevance[set[a]] * sim[set[a]][set[b]] * relevance[set[b]];
      ratios.push_back(chosen.has(i) ? 0 : determinant(kernel) / before);
    }
    chosen.take_greatest(ratios);
    before *= ratios[chosen.tokens.back()];
  }
  return chosen;
}

// What a Pruner keeps of n visual tokens behind two tokens of text, as numbers of visual tokens.
struct Outcome {
  std::vector<Index> kept;
  std::size_t nan_scores = 0;
  Status status;
};
Outcome pruned(const Config& config, const Matrix& x, const std::vector<double>& scores) {
  const std::size_t n = x.size(), width = x[0].size();
  Matrix all(n + 3, std::vector<double>(width, 7.0));  // text has features too, which nobody looks at
  std::copy(x.begin(), x.end(), all.begin() + 2);
  const std::vector<float> features = flat(all), s(scores.begin(), scores.end());
  const TokenSpan visual[] = {{2, n}};
  Pruner<> pruner(config);
  const auto kept =
      pruner.prune(with_features(Scores<float>{s, n + 3}, heads(features.data(), TokenMajor{n + 3, 1, width})), visual);
  Outcome out{{}, kept.nan_scores, kept.status};
  for (const Index i : kept)
    if (i >= 2 && i < n + 2) out.kept.push_back(i - 2);
  return out;
}

constexpr Diversity mmr(double lambda) { return {Novelty::nearest, Blend::sum, lambda}; }
constexpr Diversity max_min = mmr(0);
constexpr Diversity scope_of(double alpha) { return {Novelty::coverage, Blend::product, alpha}; }
constexpr Diversity anchors_of(double share) { return {Novelty::nearest, Blend::product, 1, share}; }
constexpr Diversity determinantal = {Novelty::volume, Blend::product, 2};

// ---- each rule ----------------------------------------------------------------------------------

using Slow = std::function<Chosen(const Matrix&, const std::vector<double>&, std::size_t)>;
void expect_equal_to(const Diversity& diversity, const Slow& slow, std::size_t most_kept = 20) {
  Rng rng(51);
  std::size_t compared = 0;
  for (int draw = 0; draw < 60; ++draw) {
    const std::size_t n = rng.between(2, 50), width = rng.between(20, 40);
    const Matrix x = clustered(rng, n, width, rng.between(1, 8));
    const std::vector<double> scores = random_scores(rng, n);
    const std::size_t count = rng.between(1, std::min(n, most_kept));
    const Chosen expected = slow(x, scores, count);
    if (expected.margin < 1e-5) continue;
    ++compared;
    const Outcome out = pruned(diverse(diversity, count), x, scores);
    ASSERT_TRUE(out.status) << out.status.message().c_str();
    ASSERT_EQ(out.kept, expected.sorted()) << "draw " << draw << ": " << count << " of " << n << " of width " << width;
  }
  EXPECT_GT(compared, 40u);
}

TEST(Diverse, MaximalMarginalRelevanceIsIDPruners) {
  for (const double lambda : {0.1, 0.5, 0.9})
    expect_equal_to(mmr(lambda), [&](const Matrix& x, const std::vector<double>& s, std::size_t count) {
      return idpruner(x, s, count, lambda);
    });
}
TEST(Diverse, WithoutScoresItIsDivPrunes) {
  expect_equal_to(max_min,
                  [](const Matrix& x, const std::vector<double>&, std::size_t count) { return divprune(x, count); });
}
TEST(Diverse, AProtectedShareAndAProductAreAnchorPrunes) {
  for (const double share : {0.0, 0.25, 0.5})
    expect_equal_to(anchors_of(share), [&](const Matrix& x, const std::vector<double>& s, std::size_t count) {
      return anchorprune(x, s, count, static_cast<std::size_t>(static_cast<double>(count) * share + 0.5));
    });
}
TEST(Diverse, CoverageTimesSaliencyIsSCOPEs) {
  for (const double alpha : {0.5, 1.0, 1.7})
    expect_equal_to(scope_of(alpha), [&](const Matrix& x, const std::vector<double>& s, std::size_t count) {
      return scope(x, s, count, alpha);
    });
}
TEST(Diverse, VolumeTimesRelevanceSquaredIsADPPsGreedyChoice) {
  expect_equal_to(
      determinantal, [](const Matrix& x, const std::vector<double>& s, std::size_t count) { return dpp(x, s, count); },
      10);
}

// ---- compositions -------------------------------------------------------------------------------

TEST(Diverse, TheSlowRuleIsThePublishedOnes) {
  Rng rng(52);
  for (int draw = 0; draw < 60; ++draw) {
    const std::size_t n = rng.between(3, 20), count = rng.between(1, std::min<std::size_t>(n, 8));
    const Matrix x = clustered(rng, n, 20, 3);
    const std::vector<double> s = random_scores(rng, n);
    const auto slow = [&](const Diversity& diversity) {
      SlowRule rule(diversity, x, s);
      std::vector<bool> kept(n);
      rule.take(numbers(0, n), numbers(0, n), count, kept);
      std::vector<Index> list;
      for (std::size_t i = 0; i < n; ++i)
        if (kept[i]) list.push_back(static_cast<Index>(i));
      return list;
    };
    ASSERT_EQ(slow(mmr(0.3)), idpruner(x, s, count, 0.3).sorted());
    if (divprune(x, count).margin > 1e-9) {
      ASSERT_EQ(slow(max_min), divprune(x, count).sorted());
    }
    ASSERT_EQ(slow(scope_of(1)), scope(x, s, count, 1).sorted());
    ASSERT_EQ(slow(determinantal), dpp(x, s, count).sorted());
    ASSERT_EQ(slow(anchors_of(0.5)), anchorprune(x, s, count, (count + 1) / 2).sorted());
  }
}

TEST(Diverse, EveryCompositionEqualsTheSlowRule) {
  Rng rng(53);
  std::size_t compared = 0, damaged = 0;
  for (int draw = 0; draw < 250; ++draw) {
    const bool grids = rng.chance(0.5);
    const Problem problem(rng, grids, rng.chance(0.3) ? (rng.chance(0.5) ? 0.15 : 0.5) : 0);
    const Config config = random_config(rng, problem, grids);
    const auto is_nan = [](double score) { return oracle::is_nan(score); };
    if (std::all_of(problem.scores.begin(), problem.scores.end(), is_nan) ||
        std::all_of(problem.broken.begin(), problem.broken.end(), [](bool broken) { return broken; }))
      continue;  // refused, see below
    SlowRule rule(config.diversity, problem.x, problem.scores, problem.broken);
    const std::vector<Index> expected = slowly(config, problem.layout, rule);
    if (rule.margin < 1e-5) continue;
    Pruner<> pruner(config);
    const auto kept = pruner.prune(problem.evidence(), problem.layout.visual);
    ASSERT_TRUE(kept) << kept.message().c_str();
    ASSERT_EQ(std::vector<Index>(kept.begin(), kept.end()), expected) << "draw " << draw;
    std::size_t nan = 0;
    for (std::size_t i = 0; i < problem.x.size(); ++i) nan += rule.counts(i) ? 0u : 1u;
    ASSERT_EQ(kept.nan_scores, nan) << "draw " << draw;
    ASSERT_EQ(kept.size(), make_plan(config, {problem.layout.tokens, 8, problem.layout.visual})->kept());
    ++compared;
    damaged += nan > 0 ? 1u : 0u;
  }
  EXPECT_GT(compared, 150u);
  EXPECT_GT(damaged, 30u);
}

// A token without a score that stays for its image's minimum: what resembles it adds nothing.
TEST(Diverse, WhatFillsAMinimumCountsAsKept) {
  Config config = diverse({Novelty::nearest, Blend::sum, 0.1}, 2);
  config.quota = Quota::pooled;
  config.min_per_image = 1;
  const std::vector<TokenSpan> visual = {{0, 1}, {1, 2}};
  const std::vector<float> scores = {oracle::nan_float(), 0.6f, 0.5f}, features = {1, 0, 1, 0, 0, 1, 1, 1};
  Pruner<> pruner(config);
  const Kept kept =
      pruner.prune(with_features(Scores<float>{scores, 4}, heads(features.data(), TokenMajor{4, 1, 2})), visual);
  ASSERT_TRUE(kept) << kept.message().c_str();
  EXPECT_EQ(std::vector<Index>(kept.begin(), kept.end()), (std::vector<Index>{0, 2, 3}));
}

// Where scores alone decide and all are 0, nothing ranks the tokens; where novelty has a say, it does.
TEST(Diverse, ZerosAloneRankNothing) {
  const std::vector<TokenSpan> visual = {{1, 4}};
  const std::vector<float> scores(4, 0.0f), features = {1, 1, 1, 0, 0, 1, 1, 2, 3, 1, 9, 9};
  const auto evidence = with_features(Scores<float>{scores, 6}, heads(features.data(), TokenMajor{6, 1, 2}));
  const auto prunes = [&](const Diversity& diversity, std::size_t keep, double uniform_share = 0) {
    Config config = diverse(diversity, keep);
    config.uniform_share = uniform_share;
    Pruner<> pruner(config);
    const Kept kept = pruner.prune(evidence, visual);
    if (!kept) {
      EXPECT_NE(std::string(kept.message().c_str()).find("all 4 visual scores are 0"), std::string::npos);
    }
    return static_cast<bool>(kept);
  };
  EXPECT_FALSE(prunes({Novelty::nearest, Blend::sum, 1}, 2));
  EXPECT_FALSE(prunes({Novelty::volume, Blend::product, 1, 1}, 2));
  EXPECT_TRUE(prunes({Novelty::nearest, Blend::sum, 1}, 4));
  EXPECT_TRUE(prunes({Novelty::nearest, Blend::sum, 1}, 0));
  EXPECT_TRUE(prunes({Novelty::nearest, Blend::sum, 1}, 2, 1));
  EXPECT_TRUE(prunes({Novelty::nearest, Blend::sum, 0.9}, 2));
  EXPECT_TRUE(prunes({Novelty::nearest, Blend::product, 1}, 2));
  EXPECT_FALSE(prunes({Novelty::nearest, Blend::sum, 1}, 2, 0.5)) << "the grid has taken one";
}

// The same in one image of two, in the words that the other rules have for it, and in a pool or its minima.
TEST(Diverse, ZerosAloneRankNothingInAnImage) {
  const std::vector<TokenSpan> visual = {{0, 3}, {3, 3}};
  const std::vector<float> scores = {0.3f, 0.1f, 0.2f, 0, 0, 0}, features(7 * 2, 1.0f);
  const auto said = [&](Quota quota, std::size_t keep, std::size_t least, double weight) {
    std::string of_diverse;
    for (const Selection selection : {Selection::diverse, Selection::top_k}) {
      Config config = diverse({Novelty::nearest, Blend::sum, weight}, keep);
      config.selection = selection;
      config.quota = quota;
      config.min_per_image = least;
      Pruner<> pruner(config);
      const auto rows = heads(features.data(), TokenMajor{7, 1, 2});
      const Kept kept = pruner.prune(with_features(Scores<float>{scores, 7}, rows), visual);
      const std::string words = kept ? "ok" : kept.message().c_str();
      if (selection == Selection::diverse) of_diverse = words;
      if (weight >= 1) {
        EXPECT_EQ(words, of_diverse);
      }
    }
    return of_diverse;
  };
  EXPECT_NE(said(Quota::per_image, 4, 0, 1).find("2 of 3 tokens in image 1"), std::string::npos);
  EXPECT_NE(said(Quota::pooled, 4, 1, 1).find("1 of 3 tokens in image 1"), std::string::npos);
  EXPECT_EQ(said(Quota::per_image, 4, 0, 0.5), "ok");
  EXPECT_EQ(said(Quota::pooled, 4, 0, 1), "ok");
}

TEST(Diverse, ABatchKeepsWhatEachSequenceKeepsAlone) {
  Rng rng(54);
  for (int draw = 0; draw < 20; ++draw) {
    std::vector<Problem> problems;
    std::vector<Request> requests;
    std::size_t first = 0;
    for (int i = 0; i < 5; ++i) problems.emplace_back(rng, false, 0.05);
    for (const Problem& problem : problems) {
      requests.push_back({random_config(rng, problem, false), problem.layout.visual, first, problem.layout.tokens});
      if (rng.chance(0.3)) requests.back().config.selection = Selection::top_k;
      first += problem.layout.tokens;
    }
    BatchPruner<> batch;
    const auto kept = batch.prune(requests, [&](std::size_t i) { return problems[i].evidence(); });
    ASSERT_TRUE(kept) << kept.message().c_str();
    for (std::size_t i = 0; i < problems.size(); ++i) {
      Pruner<> pruner(requests[i].config);
      const auto alone = pruner.prune(problems[i].evidence(), problems[i].layout.visual);
      ASSERT_EQ(kept.sequences[i].status.code, alone.status.code);
      if (!alone) continue;
      ASSERT_EQ(std::vector<Index>(kept.sequences[i].begin(), kept.sequences[i].end()),
                std::vector<Index>(alone.begin(), alone.end()));
      ASSERT_EQ(kept.sequences[i].nan_scores, alone.nan_scores);
    }
  }
}

TEST(Diverse, ThreadsAndMemoryOfBeforeChangeNothing) {
  Rng rng(55);
  const std::size_t n = 270, width = 300;  // two pieces of work
  const Matrix x = clustered(rng, n, width, 20);
  const std::vector<float> features = flat(x);
  std::vector<float> scores(n);
  for (float& s : scores) s = static_cast<float>(rng.below(20));  // many ties
  const TokenSpan visual[] = {{0, 100}, {110, 155}};
  for (const Novelty novelty : {Novelty::nearest, Novelty::coverage, Novelty::volume})
    for (const double weight : {0.0, 0.6}) {
      const Config config = diverse({novelty, Blend::sum, weight, weight / 2}, 50);
      const auto evidence = with_features(Scores<float>{Span<const float>(scores).first(255), n},
                                          heads(features.data(), TokenMajor{n, 1, width}));
      Pruner<> serial(config), threaded(config);
      ASSERT_TRUE(threaded.reserve(n, 2, 0, 0, 0, width));
      const std::size_t before = counted_new::allocations.load();
      const auto expected = serial.prune(evidence, visual);
      ASSERT_TRUE(expected) << expected.message().c_str();
      EXPECT_GT(counted_new::allocations.load(), before);
      const std::size_t reserved = counted_new::allocations.load();
      const auto again = threaded.prune(evidence, visual);
      EXPECT_EQ(counted_new::allocations.load(), reserved) << "reserve() has room for all";
      const std::vector<Index> one(expected.begin(), expected.end());
      ASSERT_EQ(std::vector<Index>(again.begin(), again.end()), one);
      const auto split = threaded.prune(evidence, visual, Backwards());
      ASSERT_EQ(std::vector<Index>(split.begin(), split.end()), one);
    }
}

// What is reserved for a prompt serves each of its images and windows.
TEST(Diverse, RoomForManyTokensIsEnoughForFew) {
  for (const Diversity& diversity : {max_min, mmr(0.5), scope_of(1), determinantal})
    for (const std::size_t width : {0u, 1u, 30u, 100u, 129u}) {
      std::size_t before = 0;
      for (std::size_t n = 1; n < 300; ++n) {
        const std::size_t floats = detail::GreedyRoom(diversity, n, n, width, 7).floats;
        ASSERT_GE(floats, before) << n << " tokens of width " << width;
        before = floats;
      }
    }
}

// ---- ties, ranks and features -------------------------------------------------------------------

TEST(Diverse, EqualTokensAreTakenByScoreThenInOrder) {
  Rng rng(56);
  for (const std::size_t n : {3u, 8u, 9u, 64u, 131u})  // a last eight that is not full, and more than one piece
    for (const Diversity& diversity : {mmr(0.5), max_min, anchors_of(0), scope_of(1), determinantal}) {
      const Matrix x(n, clustered(rng, 1, 37, 1)[0]);
      const auto first = pruned(diverse(diversity, n / 2), x, std::vector<double>(n, 0.25));
      ASSERT_TRUE(first.status) << first.status.message().c_str();
      EXPECT_EQ(first.kept, numbers(0, n / 2));
      std::vector<double> rising(n);
      std::iota(rising.begin(), rising.end(), 1.0);
      const auto last = pruned(diverse(diversity, n / 2), x, rising);
      EXPECT_EQ(last.kept, numbers(diversity.weight > 0 ? n - n / 2 : 0, n / 2)) << n;
    }
}

TEST(Diverse, MoreTokensThanDimensionsAreFilledUpByScore) {
  Rng rng(57);
  const std::size_t n = 40, width = 4;
  const Matrix x = clustered(rng, n, width, 9);
  const std::vector<double> scores = random_scores(rng, n);
  const Chosen first = dpp(x, scores, width);
  Diversity diversity = determinantal;
  const auto out = pruned(diverse(diversity, 20), x, scores);
  ASSERT_TRUE(out.status);
  std::vector<double> rest = scores;
  for (const Index i : first.tokens) rest[i] = 2;
  EXPECT_EQ(out.kept, oracle::top(rest, 20));
}

TEST(Diverse, FeaturesOfAnyMagnitudePointTheSameWay) {
  Rng rng(58);
  const std::size_t n = 30, width = 40;
  Matrix x = clustered(rng, n, width, 6);
  const std::vector<double> scores = random_scores(rng, n);
  for (const Diversity& diversity : {mmr(0.5), scope_of(1), determinantal}) {
    const auto expected = pruned(diverse(diversity, 12), x, scores);
    Matrix scaled = x;
    for (std::size_t i = 0; i < n; ++i)
      for (double& v : scaled[i]) v *= std::ldexp(1, i % 3 == 0 ? 115 : i % 3 == 1 ? -110 : 0);
    EXPECT_EQ(pruned(diverse(diversity, 12), scaled, scores).kept, expected.kept);
  }
}

TEST(Diverse, ZerosResembleNothing) {
  Matrix x(6, std::vector<double>(8, 0.0));
  x[0][0] = x[1][0] = x[2][1] = x[3][1] = 1;
  const auto out = pruned(diverse(max_min, 4), x, {1, 1, 1, 1, 1, 1});
  EXPECT_EQ(out.kept, (std::vector<Index>{0, 2, 4, 5})) << "4 and 5 are as far from each other as from all";
}

template <class T>
void expect_features(const Features<T>& features, std::size_t token, const std::vector<double>& expected) {
  std::vector<float> out(features.width()), scratch(features.vectors.dim);
  detail::load_features_of(features, features.past + token, scratch.data(), out.data());
  ASSERT_EQ(out.size(), expected.size());
  for (std::size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(static_cast<double>(out[i]), expected[i], 1e-5);
}

TEST(Features, AreReadFromEveryPlaceSideBySideAveragedOrProjected) {
  Rng rng(59);
  const std::size_t kv_heads = 3, tokens = 20, dim = 16, past = 4;
  for (const oracle::Place place : oracle::places) {
    std::vector<double> k(kv_heads * tokens * dim);
    for (double& v : k) v = rng.real(-1, 1);
    const oracle::Stored<half> cache(rng, place, kv_heads, tokens, dim, k, 3, oracle::in_chunks(place) ? 8 : 0);
    const auto at = [&](std::size_t h, std::size_t t, std::size_t d) { return k[(h * tokens + past + t) * dim + d]; };
    const auto load = [&](std::size_t head, std::size_t token, float* out) {
      for (std::size_t d = 0; d < dim; ++d) out[d] = static_cast<float>(k[(head * tokens + token) * dim + d]);
    };
    for (std::size_t t = 0; t < tokens - past; ++t) {
      std::vector<double> side, sum(dim), folded(10), folded_sum(7);
      for (std::size_t h = 0; h < kv_heads; ++h)
        for (std::size_t d = 0; d < dim; ++d) {
          side.push_back(at(h, t, d));
          sum[d] += at(h, t, d);
          folded[(h * dim + d) % 10] += at(h, t, d) * static_cast<double>(detail::sign_of(h * dim + d));
          folded_sum[d % 7] += at(h, t, d) * static_cast<double>(detail::sign_of(d));
        }
      expect_features(Features{cache.view(), past}, t, side);
      expect_features(Features{cache.view(), past, true}, t, sum);
      expect_features(Features{cache.view(), past, false, 10}, t, folded);
      expect_features(Features{cache.view(), past, true, 7}, t, folded_sum);
      expect_features(Features{cache.view(), past, true, 500}, t, sum);
      expect_features(Features{loaded_keys(kv_heads, tokens, dim, load), past, false, 10}, t, folded);
    }
  }
}

TEST(Features, ProjectedOnesKeepCosines) {
  Rng rng(60);
  const std::size_t n = 40, width = 2048, projected = 512;
  const Matrix x = clustered(rng, n, width, 5);
  const std::vector<float> features = flat(x);
  const Features view{heads(features.data(), TokenMajor{n, 1, width}), 0, false, projected};
  std::vector<float> scratch(width);
  Matrix shorter(n, std::vector<double>(projected));
  for (std::size_t i = 0; i < n; ++i) {
    std::vector<float> out(projected);
    detail::load_features_of(view, i, scratch.data(), out.data());
    shorter[i].assign(out.begin(), out.end());
  }
  const Matrix exact = cosines(x), rough = cosines(shorter);
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j < i; ++j) {
      sum += (exact[i][j] - rough[i][j]) * (exact[i][j] - rough[i][j]);
      ASSERT_NEAR(exact[i][j], rough[i][j], 5 / std::sqrt(512.0));
    }
  EXPECT_LT(std::sqrt(sum / (n * (n - 1) / 2)), 1.2 / std::sqrt(512.0));
}

TEST(Diverse, TheKeysOfTheLayerServeBesideItsAttentionBehindEarlierTurns) {
  Rng rng(61);
  const std::size_t q_heads = 4, kv_heads = 2, past = 5, n = 40, dim = 16, tokens = past + n;
  std::vector<float> q(q_heads * dim), k(kv_heads * tokens * dim);
  for (float& v : q) v = static_cast<float>(normal(rng));
  for (float& v : k) v = static_cast<float>(normal(rng));
  const auto keys = heads(k.data(), HeadMajor{kv_heads, tokens, dim});
  auto attention = query_key(heads(q.data(), TokenMajor{1, q_heads, dim}), keys, 0.25f);
  attention.past = past;
  const TokenSpan visual[] = {{3, 30}};
  Pruner<> by_score;
  ASSERT_TRUE(by_score.prune(attention, visual));
  const std::vector<double> scores(by_score.scores().begin(), by_score.scores().end());
  Matrix x;
  for (std::size_t t = 0; t < 30; ++t) {
    x.emplace_back();
    for (std::size_t h = 0; h < kv_heads; ++h)
      for (std::size_t d = 0; d < dim; ++d)
        x.back().push_back(static_cast<double>(k[(h * tokens + past + 3 + t) * dim + d]));
  }
  const Chosen expected = idpruner(x, scores, 12, 0.5);
  ASSERT_GT(expected.margin, 1e-5);
  Pruner<> pruner(diverse(mmr(0.5), 12));
  const auto kept = pruner.prune(with_features(attention, Features{keys, past}), visual);
  ASSERT_TRUE(kept) << kept.message().c_str();
  std::vector<Index> numbers_kept;
  for (const Index i : kept)
    if (i >= 3 && i < 33) numbers_kept.push_back(i - 3);
  EXPECT_EQ(numbers_kept, expected.sorted());
  EXPECT_EQ(std::vector<float>(pruner.scores().begin(), pruner.scores().end()),
            std::vector<float>(by_score.scores().begin(), by_score.scores().end()));
}

// ---- what is refused ----------------------------------------------------------------------------

TEST(Diverse, WhatDoesNotFitIsNamed) {
  const std::size_t n = 20;
  std::vector<float> x(n * 8, 1.0f), s(n - 2, 0.5f);
  const TokenSpan visual[] = {{1, n - 2}};
  const Scores<float> scores{s, n};
  const auto with = [&](Diversity diversity, const auto& evidence) {
    Pruner<> pruner(diverse(diversity, 5));
    return pruner.prune(evidence, visual).status;
  };
  const auto rows = heads(x.data(), TokenMajor{n, 1, 8});
  EXPECT_TRUE(with(mmr(0.5), with_features(scores, rows)));
  EXPECT_TRUE(with(max_min, with_features(NoEvidence{n}, rows)));
  EXPECT_TRUE(refused(with(mmr(0.5), with_features(NoEvidence{n}, rows)), Errc::missing_evidence, "needs scores"));
  EXPECT_TRUE(refused(with(mmr(0.5), scores), Errc::missing_evidence, "with_features(evidence, keys)"));
  EXPECT_TRUE(refused(with(mmr(1.5), with_features(scores, rows)), Errc::bad_setting, "weight is 1.5"));
  EXPECT_TRUE(refused(with({Novelty::nearest, Blend::product, -1}, with_features(scores, rows)), Errc::bad_setting,
                      "exponent is -1"));
  EXPECT_TRUE(refused(with({Novelty::nearest, Blend::sum, 0.5, 2}, with_features(scores, rows)), Errc::bad_setting,
                      "protected_share is 2"));
  EXPECT_TRUE(refused(with(mmr(0.5), with_features(scores, heads(x.data(), TokenMajor{n - 1, 1, 8}))), Errc::bad_shape,
                      "of 19 tokens, 0 of earlier turns among them, but the prompt has 20"));
  EXPECT_TRUE(refused(with(mmr(0.5), with_features(scores, heads(x.data(), TokenMajor{n, 2, std::size_t{1} << 20}))),
                      Errc::bad_shape, "2 heads of 1048576 elements"));
  EXPECT_TRUE(refused(with(mmr(0.5), with_features(scores, heads(static_cast<float*>(nullptr), TokenMajor{n, 1, 8}))),
                      Errc::null_data, "features"));
  std::fill(x.begin(), x.end(), oracle::nan_float());
  EXPECT_TRUE(
      refused(with(mmr(0.5), with_features(scores, rows)), Errc::bad_value, "features of all 18 visual tokens"));
  std::vector<Index> kept(n);
  const Config config = diverse(mmr(0.5), 5);
  std::vector<Mark<float>> scratch(select_scratch(config, visual));
  EXPECT_TRUE(
      refused(select<float>(config, s, visual, n, kept, scratch).status, Errc::not_supported, "with_features()"));
  Pruner<> pruner(config);
  EXPECT_TRUE(refused(pruner.reserve(100, 1, 0, 0, 0, std::size_t{1} << 21), Errc::bad_shape, "2097152 elements"));
}

}  // namespace
}  // namespace diverse_test

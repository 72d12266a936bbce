// Scores beside attention probabilities: weighted logits, what a layer did to a token, and mixtures, each against a plain
// loop in double.
#include <gtest/gtest.h>

#include "attention.hpp"
#include "backwards.hpp"
#include "fastv/fastv.hpp"
#include "oracle.hpp"
#include "refused.hpp"

namespace rules_test {
namespace {

using namespace fastv;
using oracle::Rng;

template <class Score = double, class Evidence, class ParallelFor = Serial>
std::vector<Score> scored(const Config& config, const Evidence& evidence, const std::vector<TokenSpan>& visual,
                          const ParallelFor& parallel_for = {}) {
  std::vector<Score> scores(visual_tokens(visual));
  std::vector<float> scratch(score_scratch(evidence));
  const Status status = score<Score>(config, evidence, visual, scores, scratch, parallel_for);
  EXPECT_TRUE(status) << status.message().c_str();
  return scores;
}
Config by_rows(Span<const Index> rows) {
  Config config;
  config.score_rows = ScoreRows::listed;
  config.listed_rows = rows;
  return config;
}

// ---- logits -------------------------------------------------------------------------------------

// HAWK as written: the mean of the rows' logits, each head at unit length, weighted.
std::vector<double> hawk(const std::vector<double>& q, const std::vector<double>& k, std::size_t heads,
                         std::size_t kv_heads, std::size_t queries, std::size_t keys, std::size_t dim, std::size_t past,
                         const std::vector<Index>& rows, const std::vector<TokenSpan>& visual,
                         const std::vector<float>& weights) {
  std::vector<std::size_t> tokens;
  for (const TokenSpan& span : visual)
    for (std::size_t i = 0; i < span.count; ++i) tokens.push_back(past + span.first + i);
  std::vector<double> scores(tokens.size());
  for (std::size_t h = 0; h < heads; ++h) {
    std::vector<double> a(tokens.size());
    double length = 0;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      for (const Index row : rows)
        for (std::size_t d = 0; d < dim; ++d)
          a[i] += q[(h * queries + row - (keys - past - queries)) * dim + d] *
                  k[(h / (heads / kv_heads) * keys + tokens[i]) * dim + d] / static_cast<double>(rows.size());
      length += a[i] * a[i];
    }
    for (std::size_t i = 0; i < tokens.size(); ++i)
      scores[i] += (weights.empty() ? 1 / static_cast<double>(heads) : static_cast<double>(weights[h])) * a[i] /
                   std::sqrt(length);
  }
  return scores;
}

template <class T>
class LogitsOf : public testing::Test {};
using Elements = testing::Types<float, half, bfloat16>;
TYPED_TEST_SUITE(LogitsOf, Elements, );

TYPED_TEST(LogitsOf, AreHAWKsInEveryPlaceShapeAndSetOfRows) {
  Rng rng(71);
  for (int draw = 0; draw < 60; ++draw) {
    const std::size_t kv_heads = rng.between(1, 3), heads = kv_heads * rng.between(1, 4), dim = 8 * rng.between(1, 9);
    const std::size_t past = rng.chance(0.5) ? 0 : rng.between(1, 9), n = rng.between(12, 60), keys = past + n;
    const std::size_t queries = rng.between(1, 6);
    std::vector<double> q(heads * queries * dim), k(kv_heads * keys * dim);
    for (double& v : q) v = rng.real(-1, 1);
    for (double& v : k) v = rng.real(-1, 1);
    const oracle::Place place = oracle::places[static_cast<std::size_t>(draw) % std::size(oracle::places)];
    const oracle::Stored<TypeParam> query(rng, oracle::Place::token_major, heads, queries, dim, q);
    const oracle::Stored<TypeParam> cache(rng, place, kv_heads, keys, dim, k, 4, oracle::in_chunks(place) ? 8 : 0);
    const std::vector<TokenSpan> visual = {{1, 3}, {5, rng.between(1, n - 11)}};
    std::vector<float> weights(rng.chance(0.3) ? 0 : heads);
    for (float& w : weights) w = static_cast<float>(rng.real(-0.5, 2));
    std::vector<Index> rows(rng.between(1, queries));
    for (Index& row : rows) row = static_cast<Index>(n - queries + rng.below(queries));
    const auto evidence = logits(query.view(), cache.view(), weights, past);
    const auto expected = hawk(q, k, heads, kv_heads, queries, keys, dim, past, rows, visual, weights);
    const auto scores = scored(by_rows(rows), evidence, visual);
    for (std::size_t i = 0; i < scores.size(); ++i) ASSERT_NEAR(scores[i], expected[i], 2e-6) << "draw " << draw;
    const auto last =
        hawk(q, k, heads, kv_heads, queries, keys, dim, past, {static_cast<Index>(n - 1)}, visual, weights);
    const auto of_last = scored<float>(Config(), evidence, visual);
    for (std::size_t i = 0; i < of_last.size(); ++i) ASSERT_NEAR(static_cast<double>(of_last[i]), last[i], 2e-6);
  }
}

TEST(Logits, PruneAheadOfTheFirstLayerTheSameOnAnyThreads) {
  Rng rng(72);
  const std::size_t heads_count = 6, n = 5000, dim = 16;  // more than one piece of work
  std::vector<float> q(heads_count * 3 * dim), k(2 * n * dim);
  for (float& v : q) v = static_cast<float>(rng.real(-1, 1));
  for (float& v : k) v = static_cast<float>(rng.real(-1, 1));
  const Index rows[] = {4997, 4998, 4999};
  Config config = by_rows(rows);
  config.filtering_layer = 0;
  config.filtering_ratio = 0.9;
  const std::vector<TokenSpan> visual = {{10, 4900}};
  const auto evidence = logits(heads(q.data(), TokenMajor{3, heads_count, dim}), heads(k.data(), HeadMajor{2, n, dim}));
  Pruner<> serial(config), threaded(config);
  const auto kept = serial.prune(evidence, visual);
  ASSERT_TRUE(kept) << kept.message().c_str();
  EXPECT_EQ(kept.size(), 590u);
  const auto again = threaded.prune(evidence, visual, Backwards());
  EXPECT_EQ(std::vector<Index>(again.begin(), again.end()), std::vector<Index>(kept.begin(), kept.end()));
  EXPECT_EQ(std::vector<float>(threaded.scores().begin(), threaded.scores().end()),
            std::vector<float>(serial.scores().begin(), serial.scores().end()));
}

TEST(Logits, OfShardedHeadsAddUp) {
  Rng rng(73);
  const std::size_t n = 30, dim = 8;
  std::vector<float> q(4 * dim), k(2 * n * dim);
  for (float& v : q) v = static_cast<float>(rng.real(-1, 1));
  for (float& v : k) v = static_cast<float>(rng.real(-1, 1));
  const std::vector<float> weights = {0.5f, 1, 0.25f, 2};
  const std::vector<TokenSpan> visual = {{2, 20}};
  const auto all = scored(
      Config(), logits(heads(q.data(), HeadMajor{4, 1, dim}), heads(k.data(), HeadMajor{2, n, dim}), weights), visual);
  std::vector<double> sum(20);
  for (std::size_t rank = 0; rank < 2; ++rank) {
    const Span<const float> own(weights.data() + 2 * rank, 2);
    const auto part = scored(Config(),
                             logits(heads(q.data() + 2 * rank * dim, HeadMajor{2, 1, dim}),
                                    heads(k.data() + rank * n * dim, HeadMajor{1, n, dim}), own),
                             visual);
    for (std::size_t i = 0; i < 20; ++i) sum[i] += part[i];
  }
  for (std::size_t i = 0; i < 20; ++i) EXPECT_NEAR(sum[i], all[i], 1e-6);
}

TEST(Logits, HugeTinyAndZeroHeadsKeepTheirWeight) {
  const std::size_t n = 6;
  const std::vector<TokenSpan> visual = {{0, 4}};
  const auto of = [&](std::vector<float> q, std::vector<float> k) {
    return scored(Config(),
                  logits(heads(q.data(), HeadMajor{q.size(), 1, 1}), heads(k.data(), HeadMajor{q.size(), n, 1})),
                  visual);
  };
  // Three heads that say the same at different magnitudes, and one that says nothing.
  const std::vector<float> row = {1, -2, 3, 4, 100, 100};
  std::vector<float> k;
  for (int head = 0; head < 4; ++head) k.insert(k.end(), row.begin(), row.end());
  const auto scores = of({1e30f, 1, 1e-30f, 0}, k);
  for (std::size_t i = 0; i < 4; ++i)
    EXPECT_NEAR(scores[i], 0.75 * static_cast<double>(row[i]) / std::sqrt(30.0), 1e-6);
  // A logit that is no number makes all NaN, and that is said.
  k[7] = oracle::nan_float();
  for (const double s : of({1, 1, 1, 1}, k)) EXPECT_TRUE(oracle::is_nan(s));
}

TEST(Logits, WhatDoesNotFitIsNamed) {
  const std::vector<float> x(400, 1.0f), two = {1, 2}, bad = {1, oracle::infinity(), 1, 1};
  const std::vector<TokenSpan> visual = {{1, 5}};
  const auto with = [&](std::size_t q_heads, std::size_t kv_heads, std::size_t q_dim, Span<const float> weights,
                        std::size_t past = 0) {
    Pruner<> pruner;
    return pruner
        .prune(logits(heads(x.data(), HeadMajor{q_heads, 1, q_dim}), heads(x.data(), HeadMajor{kv_heads, 10, 4}),
                      weights, past),
               visual)
        .status;
  };
  EXPECT_TRUE(with(4, 2, 4, {}));
  EXPECT_TRUE(refused(with(4, 3, 4, {}), Errc::bad_shape, "do not divide"));
  EXPECT_TRUE(refused(with(4, 2, 5, {}), Errc::bad_shape, "head dimension of query is 5"));
  EXPECT_TRUE(refused(with(4, 2, 4, {}, 10), Errc::bad_shape, "past is 10"));
  EXPECT_TRUE(refused(with(4, 2, 4, two), Errc::bad_shape, "2 head weights were given for 4"));
  EXPECT_TRUE(refused(with(4, 2, 4, bad), Errc::bad_value, "weight of head 1 is inf"));
  EXPECT_TRUE(refused(with(4, 2, 4, {nullptr, 4}), Errc::null_data, "head weights"));
  Config config;
  config.score_rows = ScoreRows::all;
  Pruner<> pruner(config);
  EXPECT_TRUE(refused(
      pruner.prune(logits(heads(x.data(), HeadMajor{4, 1, 4}), heads(x.data(), HeadMajor{2, 10, 4})), visual).status,
      Errc::missing_evidence, "all 10 query rows"));
}

// ---- what a layer did ---------------------------------------------------------------------------

template <class T>
class ChangesOf : public testing::Test {};
TYPED_TEST_SUITE(ChangesOf, Elements, );

TYPED_TEST(ChangesOf, AreLengthsAndTransitionsOfEveryShape) {
  Rng rng(74);
  for (int draw = 0; draw < 60; ++draw) {
    const std::size_t n = rng.between(8, 40), width = rng.between(1, 70), stride = width + rng.below(4),
                      before_stride = width + rng.below(4);
    std::vector<TypeParam> after(n * stride, oracle::make<TypeParam>(100)),
        before(n * before_stride, oracle::make<TypeParam>(-7));
    std::vector<double> a(n * width), b(n * width);
    for (std::size_t t = 0; t < n; ++t)
      for (std::size_t d = 0; d < width; ++d) {
        after[t * stride + d] = oracle::make<TypeParam>(rng.real(-3, 3));
        before[t * before_stride + d] = oracle::make<TypeParam>(rng.real(-3, 3));
        a[t * width + d] = oracle::value_of(after[t * stride + d]);
        b[t * width + d] = oracle::value_of(before[t * before_stride + d]);
      }
    const std::vector<TokenSpan> visual = {{1, 2}, {4, rng.between(1, n - 5)}};
    std::vector<double> output, change, transition;
    double sum = 0;
    for (const TokenSpan& span : visual)
      for (std::size_t t = span.first; t < span.first + span.count; ++t) {
        double aa = 0, bb = 0, ab = 0, dd = 0;
        for (std::size_t d = 0; d < width; ++d) {
          const double x = a[t * width + d], y = b[t * width + d];
          aa += x * x, bb += y * y, ab += x * y, dd += (x - y) * (x - y);
        }
        output.push_back(std::sqrt(aa));
        change.push_back(std::sqrt(dd));
        const double e = std::exp(1 - ab / std::sqrt(aa * bb));
        sum += e;
        transition.push_back(e * std::sqrt(aa / bb));
      }
    for (double& x : transition) x /= sum;
    const auto with_strides = [&](Changes<TypeParam> evidence) {
      evidence.stride = stride;
      evidence.before_stride = before_stride;
      return evidence;
    };
    const auto expect = [&](const std::vector<double>& scores, const std::vector<double>& expected) {
      ASSERT_EQ(scores.size(), expected.size());
      for (std::size_t i = 0; i < scores.size(); ++i) ASSERT_NEAR(scores[i], expected[i], 1e-5 * (1 + expected[i]));
    };
    expect(scored(Config(), with_strides(outputs(after.data(), n, width)), visual), output);
    expect(scored(Config(), with_strides(changes(before.data(), after.data(), n, width)), visual), change);
    expect(scored(Config(), with_strides(transitions(before.data(), after.data(), n, width)), visual), transition);
  }
}

TEST(Changes, RankOnAnyThreadsAndZerosHaveNoTransition) {
  Rng rng(75);
  const std::size_t n = 4200, width = 6;
  std::vector<float> in(n * width), out(n * width);
  for (float& v : in) v = static_cast<float>(rng.real(-1, 1));
  for (float& v : out) v = static_cast<float>(rng.real(-1, 1));
  for (std::size_t d = 0; d < width; ++d) in[100 * width + d] = 0;
  out[200 * width] = oracle::nan_float();
  const std::vector<TokenSpan> visual = {{0, 4200}};  // up to the last token: nobody asks
  Pruner<> serial, threaded;
  const auto kept = serial.prune(transitions(in.data(), out.data(), n, width), visual);
  ASSERT_TRUE(kept) << kept.message().c_str();
  EXPECT_EQ(kept.nan_scores, 2u);
  EXPECT_TRUE(oracle::is_nan(serial.scores()[100]) && oracle::is_nan(serial.scores()[200]));
  EXPECT_FALSE(oracle::is_nan(serial.scores()[101]));
  const auto again = threaded.prune(transitions(in.data(), out.data(), n, width), visual, Backwards());
  EXPECT_EQ(std::vector<Index>(again.begin(), again.end()), std::vector<Index>(kept.begin(), kept.end()));
  for (std::size_t i = 0; i < n; ++i)
    ASSERT_EQ(oracle::bits_of_float(serial.scores()[i]), oracle::bits_of_float(threaded.scores()[i]));
}

TEST(Changes, WhatDoesNotFitIsNamed) {
  const std::vector<float> x(100, 1.0f);
  const std::vector<TokenSpan> visual = {{1, 5}};
  const float* const none = nullptr;
  const auto with = [&](Changes<float> evidence) { return Pruner<>().prune(evidence, visual).status; };
  EXPECT_TRUE(with(outputs(x.data(), 10, 8)));
  EXPECT_TRUE(refused(with(outputs(x.data(), 0, 8)), Errc::bad_shape, "rows of a layer are 0"));
  EXPECT_TRUE(refused(with(outputs(x.data(), 10, 0)), Errc::bad_shape, "0 elements"));
  EXPECT_TRUE(refused(with(outputs(none, 10, 8)), Errc::null_data, "rows of a layer"));
  EXPECT_TRUE(refused(with(transitions(none, x.data(), 10, 8)), Errc::null_data, "needs both"));
  Changes<float> close = changes(x.data(), x.data(), 10, 8);
  close.before_stride = 7;
  EXPECT_TRUE(refused(with(close), Errc::bad_stride, "row stride of the rows before is 7"));
  Config config;
  config.score_rows = ScoreRows::all;
  EXPECT_TRUE(refused(Pruner<>(config).prune(outputs(x.data(), 10, 8), visual).status, Errc::missing_evidence,
                      "no query rows"));
}

// ---- mixtures -----------------------------------------------------------------------------------

TEST(MixScores, AddsSharesOfEachSum) {
  const double nan = static_cast<double>(oracle::nan_float());
  std::vector<double> scores = {1, 3, nan, 4}, other = {10, 0, 5, 5};
  ASSERT_TRUE(mix_scores<double>(scores, other, 0.25));
  EXPECT_NEAR(scores[0], 0.75 * 1 / 8 + 0.25 * 10 / 20, 1e-12);
  EXPECT_NEAR(scores[1], 0.75 * 3 / 8, 1e-12);
  EXPECT_TRUE(oracle::is_nan(scores[2]));
  EXPECT_NEAR(scores[3], 0.75 * 4 / 8 + 0.25 * 5 / 20, 1e-12);
  std::vector<float> ones = {1, 1}, nothing = {0, 0}, three = {1, 1, 1};
  EXPECT_TRUE(refused(mix_scores<float>(ones, three, 0.5), Errc::bad_shape, "2 scores are to be mixed with 3"));
  EXPECT_TRUE(refused(mix_scores<float>(ones, ones, 1.5), Errc::bad_setting, "mixture is 1.5"));
  EXPECT_TRUE(refused(mix_scores<float>(ones, nothing, 0.5), Errc::bad_value, "add up to 0"));
  EXPECT_TRUE(refused(mix_scores<float>(ones, {nullptr, 2}, 0.5), Errc::null_data, "the other scores"));
}

// ---- published schedules ------------------------------------------------------------------------

std::vector<std::pair<std::size_t, std::size_t>> stages_of(const Schedule& schedule) {
  const TokenSpan visual[] = {{35, 576, 24}};
  const auto plan = make_plan(schedule, {631, 32, visual});
  EXPECT_TRUE(plan) << plan.message().c_str();
  std::vector<std::pair<std::size_t, std::size_t>> stages;
  for (std::size_t s = 0; s < plan->stages; ++s)
    stages.emplace_back(plan->stage[s].filtering_layer, plan->stage[s].kept_visual);
  return stages;
}
using Stages = std::vector<std::pair<std::size_t, std::size_t>>;

TEST(Recipes, AreThoseOfTheAuthorsCode) {
  EXPECT_EQ(stages_of(clse_stages(192)), (Stages{{1, 330}, {11, 210}, {21, 62}}));
  EXPECT_EQ(stages_of(clse_stages(128)), (Stages{{1, 220}, {11, 140}, {21, 41}}));
  EXPECT_EQ(stages_of(clse_stages(64)), (Stages{{1, 110}, {11, 70}, {21, 20}}));
  EXPECT_EQ(stages_of(clse_stages(150)), (Stages{{1, 258}, {11, 163}, {21, 48}}));
  EXPECT_EQ(stages_of(v2drop_stages()), (Stages{{3, 288}, {17, 144}, {22, 1}}));
  const Index question[] = {612, 613, 630}, separator[] = {611};
  const Schedule prior = priortr_stages(64, question, separator);
  EXPECT_EQ(stages_of(prior), (Stages{{3, 64}}));
  EXPECT_EQ(prior.stage[0].listed_rows.data(), question);
  EXPECT_EQ(prior.stage[0].prior_rows.data(), separator);
  std::size_t listed = 0;
  for (const Config& config : clse_stages(64)) listed += config.keep_count;
  EXPECT_EQ(listed, 200u);
}

TEST(Recipes, RunStageByStageWithTheSpansOfEach) {
  Rng rng(76);
  std::vector<TokenSpan> visual = {{35, 576}};
  std::size_t tokens = 631;
  for (const Config& config : v2drop_stages()) {
    std::vector<float> before(tokens * 4), after(tokens * 4);
    for (float& v : before) v = static_cast<float>(rng.real(-1, 1));
    for (float& v : after) v = static_cast<float>(rng.real(-1, 1));
    Pruner<> pruner(config);
    const auto kept = pruner.prune(changes(before.data(), after.data(), tokens, 4), visual);
    ASSERT_TRUE(kept) << kept.message().c_str();
    std::vector<TokenSpan> left(visual.size());
    ASSERT_TRUE(next_spans(kept, visual, left));
    visual = left;
    tokens = kept.size();
  }
  EXPECT_EQ(tokens, 56u);
}

}  // namespace
}  // namespace rules_test

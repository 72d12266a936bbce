// Lengths: kept counts, quotas, tokens and KV entries of every layer.
#include "fastv/plan.hpp"

#include <gtest/gtest.h>

#include "oracle.hpp"

namespace {

using namespace fastv;

// ---- kept_of ------------------------------------------------------------------------------------

TEST(KeptOf, EqualsTheAuthorsCodeWhereRoundingMatters) {
  // From a run of the authors' llava-hf code: round(tokens * (1 - R)) in Python.
  EXPECT_EQ(kept_of(18, 0.75), 4u);  // 4.5, half to even
  EXPECT_EQ(kept_of(14, 0.75), 4u);  // 3.5, half to even
  EXPECT_EQ(kept_of(35, 0.9), 3u);   // 3.4999999999999991: the error of 1 - R decides
  EXPECT_EQ(kept_of(15, 0.9), 1u);   // 1.4999999999999996
  EXPECT_EQ(kept_of(30, 0.9), 3u);   // 2.9999999999999996: truncation would keep 2
  EXPECT_EQ(kept_of(576, 0.9), 58u);
  EXPECT_EQ(kept_of(576, 0.5), 288u);
  EXPECT_EQ(kept_of(36, 0.75), 9u);
  EXPECT_EQ(kept_of(16, 0.9), 2u);
  EXPECT_EQ(kept_of(24, 0.25), 18u);
  EXPECT_EQ(kept_of(20, 0), 20u);
}

TEST(KeptOf, HalvesGoToTheEvenNeighbour) {
  EXPECT_EQ(kept_of(1, 0.5), 0u);
  EXPECT_EQ(kept_of(3, 0.5), 2u);
  EXPECT_EQ(kept_of(5, 0.5), 2u);
  EXPECT_EQ(kept_of(7, 0.5), 4u);
  EXPECT_EQ(kept_of(10, 0.25), 8u);  // 7.5
}

TEST(KeptOf, EqualsTheDecimalOracleForEveryLengthAndPerMille) {
  int exact_rational_differs = 0;
  for (std::size_t tokens = 0; tokens <= 700; tokens += tokens < 130 ? 1 : 23)
    for (std::size_t mille = 0; mille <= 1000; mille += mille % 50 == 0 ? 1u : 7u) {
      const double ratio = static_cast<double>(mille) / 1000;
      ASSERT_EQ(kept_of(tokens, ratio), oracle::kept_of(tokens, ratio)) << tokens << " tokens, R = " << ratio;
      const std::size_t product = tokens * (1000 - mille), rest = product % 1000;
      const std::size_t rounded = product / 1000 + (rest > 500 || (rest == 500 && product / 1000 % 2 == 1) ? 1u : 0u);
      exact_rational_differs += rounded != kept_of(tokens, ratio) ? 1 : 0;
    }
  EXPECT_GT(exact_rational_differs, 0) << "the lengths above should include some where the error of 1 - R decides";
}

TEST(KeptOf, EqualsTheDecimalOracleForRandomRatiosAndLongPrompts) {
  oracle::Rng rng(3);
  for (int i = 0; i < 20000; ++i) {
    const std::size_t tokens = rng.chance(0.5) ? rng.below(5000) : rng.below(max_tokens);
    const double ratio = rng.chance(0.5) ? rng.real() : static_cast<double>(rng.below(65)) / 64;
    ASSERT_EQ(kept_of(tokens, ratio), oracle::kept_of(tokens, ratio)) << tokens << " tokens, R = " << ratio;
  }
}

TEST(KeptOf, RatioZeroKeepsAllAndOneKeepsNone) {
  for (const std::size_t tokens : {std::size_t{0}, std::size_t{1}, std::size_t{2}, std::size_t{576}, max_tokens}) {
    EXPECT_EQ(kept_of(tokens, 0), tokens);
    EXPECT_EQ(kept_of(tokens, 1), 0u);
  }
}

// ---- kept_visual, picture_quotas -------------------------------------------------------------------

const std::vector<TokenSpan> three_pictures = {{2, 5}, {10, 5}, {20, 5}};

TEST(KeptVisual, PerSpanRoundsEachSpanAndPooledRoundsOnce) {
  Config config;  // R = 0.5: 2.5 of each, 7.5 of all
  EXPECT_EQ(*kept_visual(config, three_pictures), 6u);
  config.quota = Quota::pooled;
  EXPECT_EQ(*kept_visual(config, three_pictures), 8u);
  config.keep_count = 3;
  EXPECT_EQ(*kept_visual(config, three_pictures), 3u);
}

TEST(SpanQuotas, ByRatioRoundsEverySpanOnItsOwn) {
  const TokenSpan spans[] = {{0, 18}, {18, 14}, {40, 1}};
  Config config;
  config.filtering_ratio = 0.75;
  Index quotas[3];
  ASSERT_TRUE(picture_quotas(config, spans, quotas));
  EXPECT_EQ(std::vector<Index>(quotas, quotas + 3), (std::vector<Index>{4, 4, 0}));
}

TEST(SpanQuotas, ByCountGiveTheRestToTheLargestRemainders) {
  const TokenSpan spans[] = {{0, 50}, {50, 30}, {90, 20}};
  Config config;
  config.keep_count = 7;  // 3.5, 2.1, 1.4
  Index quotas[3];
  ASSERT_TRUE(picture_quotas(config, spans, quotas));
  EXPECT_EQ(std::vector<Index>(quotas, quotas + 3), (std::vector<Index>{4, 2, 1}));
  config.keep_count = 5;  // 2.5, 1.5, 1: of equal remainders the earlier span's
  ASSERT_TRUE(picture_quotas(config, spans, quotas));
  EXPECT_EQ(std::vector<Index>(quotas, quotas + 3), (std::vector<Index>{3, 1, 1}));
}

TEST(SpanQuotas, EqualHamiltonsMethodAndSumExactly) {
  oracle::Rng rng(4);
  for (int i = 0; i < 5000; ++i) {
    oracle::Layout layout = oracle::random_layout(rng, 7, rng.chance(0.2) ? 3 : 60);
    if (layout.visual.empty()) continue;
    std::vector<std::size_t> lengths;
    for (const TokenSpan& span : layout.visual) lengths.push_back(span.count);
    Config config;
    config.keep_count = rng.between(0, layout.visual_tokens());
    std::vector<Index> quotas(layout.visual.size());
    ASSERT_TRUE(picture_quotas(config, layout.visual, quotas));
    const auto expected = oracle::quotas(lengths, config.keep_count);
    ASSERT_TRUE(std::equal(quotas.begin(), quotas.end(), expected.begin(), expected.end())) << "draw " << i;
    ASSERT_EQ(std::accumulate(quotas.begin(), quotas.end(), std::size_t{0}), config.keep_count);
    for (std::size_t s = 0; s < lengths.size(); ++s) ASSERT_LE(quotas[s], lengths[s]);
  }
}

TEST(SpanQuotas, ProductsOfTheLargestPromptDoNotOverflow) {
  const TokenSpan spans[] = {{0, max_tokens / 2}, {max_tokens / 2, max_tokens / 2}};
  Config config;
  config.keep_count = max_tokens - 1;
  Index quotas[2];
  ASSERT_TRUE(picture_quotas(config, spans, quotas));
  EXPECT_EQ(quotas[0], max_tokens / 2);
  EXPECT_EQ(quotas[1], max_tokens / 2);
}

// ---- Plan ---------------------------------------------------------------------------------------

TEST(Plan, LlavaGeometryLayerByLayer) {
  Config config;
  config.filtering_layer = 3;
  const TokenSpan visual[] = {{35, 576}};
  const auto plan = make_plan(config, {631, 32, visual});
  ASSERT_TRUE(plan);
  EXPECT_EQ(plan->visual, 576u);
  EXPECT_EQ(plan->kept_visual(), 288u);
  EXPECT_EQ(plan->kept(), 343u);
  for (std::size_t layer = 0; layer < 32; ++layer) {
    const std::size_t expected = layer < 3 ? 631 : 343;
    EXPECT_EQ(plan->tokens_in_layer(layer), expected);
    EXPECT_EQ(plan->kv_length(layer), expected);
    EXPECT_EQ(plan->kv_length(layer, 8), expected + 8) << "every step adds one to every layer";
  }
}

TEST(Plan, TheNextPositionCountsTheDroppedTokens) {
  const TokenSpan visual[] = {{5, 36}};
  const auto plan = make_plan(Config{}, {52, 4, visual});
  EXPECT_EQ(plan->next_position(), 52u);
  EXPECT_EQ(plan->next_position(7), 59u);
}

TEST(Plan, LayerZeroPrunesBeforeTheFirstLayer) {
  Config config;
  config.filtering_layer = 0;
  config.selection = Selection::random;
  const TokenSpan visual[] = {{5, 36}};
  const auto plan = make_plan(config, {52, 4, visual});
  ASSERT_TRUE(plan);
  EXPECT_EQ(plan->tokens_in_layer(0), 34u);
}

TEST(Plan, ATextOnlyPromptKeepsEverythingWhateverTheSettings) {
  Config config;
  for (const std::size_t count : {by_ratio, std::size_t{0}, std::size_t{100}}) {
    config.keep_count = count;
    const auto plan = make_plan(config, {17, 4, {}});
    ASSERT_TRUE(plan) << plan.message().c_str();
    EXPECT_EQ(plan->kept(), 17u);
    EXPECT_EQ(plan->visual, 0u);
    EXPECT_EQ(plan->kv_length(3), 17u);
  }
}

TEST(Plan, RatioOneKeepsTheTextAlone) {
  Config config;
  config.filtering_ratio = 1;
  const auto plan = make_plan(config, {30, 4, three_pictures});
  EXPECT_EQ(plan->kept(), 15u);
}

TEST(Plan, KeptCountIsTheSumOfTheQuotas) {
  oracle::Rng rng(5);
  for (int i = 0; i < 3000; ++i) {
    const oracle::Layout layout = oracle::random_layout(rng, 5, 40);
    Config config;
    config.filtering_ratio = rng.chance(0.2) ? static_cast<double>(rng.below(5)) / 4 : rng.real();
    if (rng.chance(0.5)) config.keep_count = rng.between(0, layout.visual_tokens());
    const auto plan = make_plan(config, {layout.tokens, 4, layout.visual});
    ASSERT_TRUE(plan) << plan.message().c_str();
    std::vector<Index> quotas(layout.visual.size());
    ASSERT_TRUE(picture_quotas(config, layout.visual, quotas));
    ASSERT_EQ(plan->kept_visual(), std::accumulate(quotas.begin(), quotas.end(), std::size_t{0}));
    ASSERT_EQ(plan->kept(), layout.tokens - layout.visual_tokens() + plan->kept_visual());
  }
}

}  // namespace

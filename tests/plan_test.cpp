// Lengths: kept counts, quotas, tokens and KV entries of every layer, and the spans of the next stage.
#include "fastv/plan.hpp"

#include <gtest/gtest.h>

#include "fastv/select.hpp"
#include "oracle.hpp"

namespace plan_test {
namespace {

using namespace fastv;
using oracle::Rng;

template <class T>
::testing::AssertionResult holds(const T& result) {
  if (result) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << result.message().c_str();
}

// ---- kept_count ---------------------------------------------------------------------------------

TEST(KeptCount, EqualsTheAuthorsCodeWhereRoundingMatters) {
  // From a run of the authors' llava-hf code: round(tokens * (1 - R)) in Python.
  EXPECT_EQ(kept_count(18, 0.75), 4u);  // 4.5, half to even
  EXPECT_EQ(kept_count(14, 0.75), 4u);  // 3.5, half to even
  EXPECT_EQ(kept_count(35, 0.9), 3u);   // 3.4999999999999991: the error of 1 - R decides
  EXPECT_EQ(kept_count(15, 0.9), 1u);   // 1.4999999999999996
  EXPECT_EQ(kept_count(30, 0.9), 3u);   // 2.9999999999999996: truncation would keep 2
  EXPECT_EQ(kept_count(576, 0.9), 58u);
  EXPECT_EQ(kept_count(576, 0.5), 288u);
  EXPECT_EQ(kept_count(36, 0.75), 9u);
  EXPECT_EQ(kept_count(16, 0.9), 2u);
  EXPECT_EQ(kept_count(24, 0.25), 18u);
  EXPECT_EQ(kept_count(20, 0), 20u);
}

TEST(KeptCount, HalvesGoToTheEvenNeighbour) {
  EXPECT_EQ(kept_count(1, 0.5), 0u);
  EXPECT_EQ(kept_count(3, 0.5), 2u);
  EXPECT_EQ(kept_count(5, 0.5), 2u);
  EXPECT_EQ(kept_count(7, 0.5), 4u);
  EXPECT_EQ(kept_count(10, 0.25), 8u);  // 7.5
}

TEST(KeptCount, EqualsTheDecimalOracleForEveryLengthAndPerMille) {
  int exact_rational_differs = 0;
  for (std::size_t tokens = 0; tokens <= 700; tokens += tokens < 130 ? 1 : 23)
    for (std::size_t mille = 0; mille <= 1000; mille += mille % 50 == 0 ? 1u : 7u) {
      const double ratio = static_cast<double>(mille) / 1000;
      ASSERT_EQ(kept_count(tokens, ratio), oracle::kept_of(tokens, ratio)) << tokens << " tokens, R = " << ratio;
      const std::size_t product = tokens * (1000 - mille), rest = product % 1000;
      const std::size_t rounded = product / 1000 + (rest > 500 || (rest == 500 && product / 1000 % 2 == 1) ? 1u : 0u);
      exact_rational_differs += rounded != kept_count(tokens, ratio) ? 1 : 0;
    }
  EXPECT_GT(exact_rational_differs, 0) << "the lengths above should include some where the error of 1 - R decides";
}

TEST(KeptCount, EqualsTheDecimalOracleForRandomRatiosAndLongPrompts) {
  Rng rng(3);
  for (int i = 0; i < 20000; ++i) {
    const std::size_t tokens = rng.chance(0.5) ? rng.below(5000) : rng.below(max_tokens);
    const double ratio = rng.chance(0.5) ? rng.real() : static_cast<double>(rng.below(65)) / 64;
    ASSERT_EQ(kept_count(tokens, ratio), oracle::kept_of(tokens, ratio)) << tokens << " tokens, R = " << ratio;
  }
}

TEST(KeptCount, RatioZeroKeepsAllAndOneKeepsNone) {
  for (const std::size_t tokens : {std::size_t{0}, std::size_t{1}, std::size_t{2}, std::size_t{576}, max_tokens})
    for (const Rounding rounding : {Rounding::half_even, Rounding::up}) {
      EXPECT_EQ(kept_count(tokens, 0, rounding), tokens);
      EXPECT_EQ(kept_count(tokens, 1, rounding), 0u);
    }
}

TEST(KeptCount, UpIsExactWhereDoublesAreNot) {
  // 10 * (1 - 0.7) is 3.0000000000000004 in doubles.
  EXPECT_EQ(kept_count(10, 0.7, Rounding::up), 3u);
  EXPECT_EQ(kept_count(1000, 0.7, Rounding::up), 300u);
  EXPECT_EQ(kept_count(1001, 0.7, Rounding::up), 301u);
  EXPECT_EQ(kept_count(17, 0.75, Rounding::up), 5u);
  EXPECT_EQ(kept_count(16, 0.75, Rounding::up), 4u);
  EXPECT_EQ(kept_count(1, 0.99, Rounding::up), 1u);
  EXPECT_EQ(kept_count(max_tokens, 0.5, Rounding::up), max_tokens / 2 + 1);
}

TEST(KeptCount, UpEqualsWholeNumbersForEveryFractionAndLength) {
  // R = p / q: ceil(tokens * (q - p) / q) without a double in sight.
  for (const std::size_t q : {2u, 3u, 5u, 6u, 7u, 10u, 12u, 16u, 20u, 24u, 49u, 64u, 97u, 100u, 576u, 1000u})
    for (std::size_t p = 0; p <= q; p += q <= 100 ? 1 : 7)
      for (std::size_t tokens = 0; tokens <= 2000; ++tokens) {
        const double ratio = static_cast<double>(p) / static_cast<double>(q);
        ASSERT_EQ(kept_count(tokens, ratio, Rounding::up), (tokens * (q - p) + q - 1) / q)
            << tokens << " tokens, R = " << p << '/' << q;
      }
  Rng rng(13);
  for (int i = 0; i < 200000; ++i) {  // the longest prompts
    const std::size_t tokens = rng.below(max_tokens + 1), q = rng.between(1, 10000), p = rng.between(0, q);
    const double ratio = static_cast<double>(p) / static_cast<double>(q);
    ASSERT_EQ(kept_count(tokens, ratio, Rounding::up), (tokens * (q - p) + q - 1) / q)
        << tokens << " tokens, R = " << p << '/' << q;
  }
}

// ---- kept_visual, image_quotas ------------------------------------------------------------------

const std::vector<TokenSpan> three_images = {{2, 5}, {10, 5}, {20, 5}};

std::vector<Index> quotas_of(const Config& config, const std::vector<TokenSpan>& visual) {
  std::vector<Index> quotas(2 * visual.size() + 1, 99999);
  const Result<std::size_t> images = image_quotas(config, visual, quotas);
  EXPECT_TRUE(holds(images));
  EXPECT_EQ(quotas.back(), 99999u) << "it has no more than twice the images";
  quotas.resize(*images);
  return quotas;
}
TokenSpan with_ratio(TokenSpan span, double ratio) {
  span.filtering_ratio = ratio;
  return span;
}
std::vector<Index> narrow(const std::vector<std::size_t>& counts) {
  std::vector<Index> out;
  for (const std::size_t count : counts) out.push_back(static_cast<Index>(count));
  return out;
}

TEST(KeptVisual, PerImageRoundsEachImageAndPooledRoundsOnce) {
  Config config;  // R = 0.5: 2.5 of each, 7.5 of all
  EXPECT_EQ(*kept_visual(config, three_images), 6u);
  config.quota = Quota::pooled;
  EXPECT_EQ(*kept_visual(config, three_images), 8u);
  config.keep_count = 3;
  EXPECT_EQ(*kept_visual(config, three_images), 3u);
}

TEST(KeptVisual, APoolKeepsAtLeastTheSumOfTheMinima) {
  Config config;
  config.quota = Quota::pooled;
  config.filtering_ratio = 0.875;  // 1.875 of 15
  EXPECT_EQ(*kept_visual(config, three_images), 2u);
  config.min_per_image = 2;
  EXPECT_EQ(*kept_visual(config, three_images), 6u);
  config.min_per_image = 100;  // as many as there are
  EXPECT_EQ(*kept_visual(config, three_images), 15u);
  config.keep_count = 4;  // a count is a count
  EXPECT_EQ(*kept_visual(config, three_images), 4u);
}

TEST(KeptVisual, LooksAtTheLengthOfThePrompt) {
  EXPECT_EQ(*kept_visual({}, three_images, 25), 6u);
  EXPECT_EQ(kept_visual({}, three_images, 24).code(), Errc::bad_prompt);
}

TEST(ImageQuotas, ByRatioRoundsEveryImageOnItsOwn) {
  Config config;
  config.filtering_ratio = 0.75;
  EXPECT_EQ(quotas_of(config, {{0, 18}, {18, 14}, {40, 1}}), (std::vector<Index>{4, 4, 0}));
}

TEST(ImageQuotas, RoundUpIsTheRuleOfTensorRtEdgeLlm) {
  Config config;
  config.rounding = Rounding::up;
  config.filtering_ratio = 0.75;
  EXPECT_EQ(quotas_of(config, {{0, 16}, {20, 17}, {40, 1}}), (std::vector<Index>{4, 5, 1}));
  config.filtering_ratio = 1;
  EXPECT_EQ(quotas_of(config, {{0, 16}, {20, 1}}), (std::vector<Index>{0, 0}));
}

TEST(ImageQuotas, AnImageMayHaveARatioOfItsOwn) {
  Config config;
  config.filtering_ratio = 0.75;
  const std::vector<TokenSpan> visual = {
      {0, 16}, with_ratio({20, 16}, 0.25), with_ratio({40, 16}, 0), with_ratio({60, 16}, 1), {80, 16}};
  EXPECT_EQ(quotas_of(config, visual), (std::vector<Index>{4, 12, 16, 0, 4}));
  EXPECT_EQ(*kept_visual(config, visual), 36u);
  // Rows of one image share the ratio of the first.
  std::vector<TokenSpan> rows = {with_ratio({0, 8}, 0.25), {9, 8}, {20, 8}};
  rows[1].continues = true;
  EXPECT_EQ(quotas_of(config, rows), (std::vector<Index>{12, 2}));
}

TEST(ImageQuotas, ByCountGiveTheRestToTheLargestRemainders) {
  const std::vector<TokenSpan> visual = {{0, 50}, {50, 30}, {90, 20}};
  Config config;
  config.keep_count = 7;  // 3.5, 2.1, 1.4
  EXPECT_EQ(quotas_of(config, visual), (std::vector<Index>{4, 2, 1}));
  config.keep_count = 5;  // 2.5, 1.5, 1: of equal remainders the earlier image's
  EXPECT_EQ(quotas_of(config, visual), (std::vector<Index>{3, 1, 1}));
}

TEST(ImageQuotas, AMinimumRaisesSmallImagesByRatio) {
  Config config;
  config.filtering_ratio = 0.9;
  config.min_per_image = 2;
  const std::vector<TokenSpan> visual = {{0, 100}, {110, 3}, {120, 1}};
  EXPECT_EQ(quotas_of(config, visual), (std::vector<Index>{10, 2, 1}));
  EXPECT_EQ(*kept_visual(config, visual), 13u);
}

TEST(ImageQuotas, AMinimumByCountIsPaidByTheOthersAndTheSumIsExact) {
  Config config;
  config.keep_count = 10;
  const std::vector<TokenSpan> visual = {{0, 1000}, {1100, 10}, {1200, 10}};
  EXPECT_EQ(quotas_of(config, visual), (std::vector<Index>{10, 0, 0}));
  config.min_per_image = 1;
  EXPECT_EQ(quotas_of(config, visual), (std::vector<Index>{8, 1, 1}));
  config.keep_count = 2;  // too few for every minimum: shared out without any
  EXPECT_EQ(quotas_of(config, visual), (std::vector<Index>{2, 0, 0}));
}

// A prompt of images of one or several spans, of which earlier stages may have dropped some tokens.
std::vector<TokenSpan> random_images(Rng& rng, std::vector<TokenSpan> visual) {
  for (std::size_t i = 0; i < visual.size(); ++i) {
    visual[i].continues = i > 0 && rng.chance(0.3);
    if (rng.chance(0.3)) visual[i].original = visual[i].count + rng.below(30);
  }
  return visual;
}
// Settings for them; ratios are whole thousandths.
Config random_settings(Rng& rng, std::size_t tokens) {
  Config config;
  config.filtering_ratio = static_cast<double>(rng.chance(0.3) ? 250 * rng.below(5) : rng.below(1001)) / 1000;
  config.rounding = rng.chance(0.5) ? Rounding::up : Rounding::half_even;
  config.ratio_of = rng.chance(0.5) ? RatioOf::original : RatioOf::remaining;
  config.quota = rng.chance(0.3) ? Quota::pooled : Quota::per_image;
  if (rng.chance(0.4)) config.keep_count = rng.between(0, tokens);
  if (rng.chance(0.4)) config.min_per_image = rng.between(0, 6);
  return config;
}

TEST(ImageQuotas, EqualTheSlowCountsAndSumExactly) {
  Rng rng(4);
  for (int i = 0; i < 10000; ++i) {
    const oracle::Layout layout = oracle::random_layout(rng, 7, rng.chance(0.2) ? 3 : 60);
    std::vector<TokenSpan> visual = random_images(rng, layout.visual);
    Config config = random_settings(rng, layout.visual_tokens());
    if (config.keep_count == by_ratio && config.quota == Quota::per_image)
      for (TokenSpan& span : visual)
        if (!span.continues && rng.chance(0.3)) span.filtering_ratio = static_cast<double>(rng.below(1001)) / 1000;
    SCOPED_TRACE(testing::Message() << "draw " << i);
    const oracle::Counts counts = oracle::counts_of(config, visual);
    ASSERT_EQ(*kept_visual(config, visual), counts.all);
    if (config.quota == Quota::pooled && config.keep_count == by_ratio) continue;
    const std::vector<Index> quotas = quotas_of(config, visual);
    if (layout.visual.empty()) continue;
    ASSERT_EQ(quotas, narrow(counts.quota));
    const std::vector<oracle::Image> images = oracle::images_of(visual);
    std::size_t sum = 0, minima = 0;
    for (std::size_t s = 0; s < images.size(); ++s) {
      ASSERT_LE(quotas[s], images[s].tokens());
      sum += quotas[s];
      minima += std::min(config.min_per_image, images[s].tokens());
    }
    ASSERT_EQ(sum, counts.all);
    if (config.keep_count != by_ratio && minima > config.keep_count) continue;
    for (std::size_t s = 0; s < images.size(); ++s)
      ASSERT_GE(quotas[s], std::min(config.min_per_image, images[s].tokens()));
  }
}

TEST(ImageQuotas, ProductsOfTheLargestPromptDoNotOverflow) {
  Config config;
  config.keep_count = max_tokens - 1;
  const std::vector<TokenSpan> halves = {{0, max_tokens / 2}, {max_tokens / 2, max_tokens / 2}};
  EXPECT_EQ(quotas_of(config, halves), (std::vector<Index>{max_tokens / 2, max_tokens / 2}));
}

TEST(ImageQuotas, ThousandsOfFramesByCount) {
  std::vector<TokenSpan> frames;
  for (std::size_t i = 0; i < 5000; ++i) frames.push_back({i * 17, 16});
  Config config;
  config.keep_count = 12345;
  const std::vector<Index> quotas = quotas_of(config, frames);
  EXPECT_EQ(std::accumulate(quotas.begin(), quotas.end(), 0u), 12345u);
  EXPECT_EQ(quotas.front(), 3u);  // 2.469: the earlier ones are rounded up
  EXPECT_EQ(quotas.back(), 2u);
}

// ---- Plan ---------------------------------------------------------------------------------------

TEST(Plan, LlavaGeometryLayerByLayer) {
  Config config;
  config.filtering_layer = 3;
  const TokenSpan visual[] = {{35, 576}};
  const auto plan = make_plan(config, {631, 32, visual});
  ASSERT_TRUE(holds(plan));
  EXPECT_EQ(plan->visual, 576u);
  EXPECT_EQ(plan->kept_visual(), 288u);
  EXPECT_EQ(plan->kept(), 343u);
  EXPECT_EQ(plan->groups(), 2u);
  for (std::size_t layer = 0; layer < 32; ++layer) {
    const std::size_t expected = layer < 3 ? 631 : 343;
    EXPECT_EQ(plan->group_of(layer), layer < 3 ? 0u : 1u);
    EXPECT_EQ(plan->tokens_in_layer(layer), expected);
    EXPECT_EQ(plan->tokens_in_group(plan->group_of(layer)), expected);
    EXPECT_EQ(plan->visual_in_layer(layer), expected - 55);
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
  const TokenSpan visual[] = {{5, 36}};
  for (const Selection rule : {Selection::random, Selection::top_k, Selection::diverse}) {
    config.selection = rule;
    const auto plan = make_plan(config, {52, 4, visual});
    ASSERT_TRUE(holds(plan));
    EXPECT_EQ(plan->tokens_in_layer(0), 34u);
    EXPECT_EQ(plan->group_of(0), 1u);
    EXPECT_EQ(plan->kv_length(0, 3), 37u);
  }
}

TEST(Plan, ATextOnlyPromptKeepsEverythingWhateverTheSettings) {
  Config config;
  for (const std::size_t count : {by_ratio, std::size_t{0}, std::size_t{100}}) {
    config.keep_count = count;
    const auto plan = make_plan(config, {17, 4, {}});
    ASSERT_TRUE(holds(plan));
    EXPECT_EQ(plan->kept(), 17u);
    EXPECT_EQ(plan->visual, 0u);
    EXPECT_EQ(plan->kv_length(3), 17u);
  }
}

TEST(Plan, RatioOneKeepsTheTextAlone) {
  Config config;
  config.filtering_ratio = 1;
  const auto plan = make_plan(config, {30, 4, three_images});
  EXPECT_EQ(plan->kept(), 15u);
}

// Lengths need no scores, so that it does not matter whether the last row could rank.
TEST(Plan, TheLastTokenMayBeVisual) {
  const TokenSpan visual[] = {{16, 36}};
  const auto plan = make_plan(Config{}, {52, 4, visual});
  ASSERT_TRUE(holds(plan));
  EXPECT_EQ(plan->kept(), 34u);
  EXPECT_TRUE(holds(make_plan(Config{}, {36, 4, std::vector<TokenSpan>{{0, 36}}}))) << "nor need there be any text";
}

TEST(Plan, KeptCountIsTheSumOfTheQuotas) {
  Rng rng(5);
  for (int i = 0; i < 3000; ++i) {
    const oracle::Layout layout = oracle::random_layout(rng, 5, 40);
    Config config;
    config.filtering_ratio = rng.chance(0.2) ? static_cast<double>(rng.below(5)) / 4 : rng.real();
    if (rng.chance(0.5)) config.keep_count = rng.between(0, layout.visual_tokens());
    const auto plan = make_plan(config, {layout.tokens, 4, layout.visual});
    ASSERT_TRUE(holds(plan));
    const std::vector<Index> quotas = quotas_of(config, layout.visual);
    ASSERT_EQ(plan->kept_visual(), std::accumulate(quotas.begin(), quotas.end(), std::size_t{0}));
    ASSERT_EQ(plan->kept(), layout.tokens - layout.visual_tokens() + plan->kept_visual());
  }
}

// ---- keys of earlier turns ----------------------------------------------------------------------

Config stage_at(std::size_t layer, double ratio = 0.5) {
  Config config;
  config.filtering_layer = layer;
  config.filtering_ratio = ratio;
  return config;
}

TEST(PastKeys, OneNumberIsThatOfAllLayers) {
  const TokenSpan visual[] = {{5, 36}};
  const std::size_t past[] = {100};
  const Config schedule[] = {stage_at(1), stage_at(3)};
  Prompt prompt{52, 6, visual};
  prompt.past = past;
  const auto plan = make_plan(schedule, prompt);
  ASSERT_TRUE(holds(plan));
  for (std::size_t layer = 0; layer < 6; ++layer) {
    const std::size_t tokens = layer < 1 ? 52 : layer < 3 ? 34 : 25;
    EXPECT_EQ(plan->tokens_in_layer(layer), tokens);
    EXPECT_EQ(plan->kv_length(layer), 100 + tokens);
    EXPECT_EQ(plan->kv_length(layer, 7), 107 + tokens);
  }
  EXPECT_EQ(plan->kept(), 25u) << "earlier turns are no tokens of this prompt";
}

TEST(PastKeys, ANumberPerLayerIsItsOwn) {
  const TokenSpan visual[] = {{5, 36}};
  const std::size_t past[] = {100, 100, 60, 60, 100, 30};  // earlier turns were pruned at other layers
  const Config schedule[] = {stage_at(1), stage_at(3)};
  Prompt prompt{52, 6, visual};
  prompt.past = past;
  const auto plan = make_plan(schedule, prompt);
  ASSERT_TRUE(holds(plan));
  EXPECT_EQ(plan->pasts, 4u);
  for (std::size_t layer = 0; layer < 6; ++layer) {
    EXPECT_EQ(plan->past_in_layer(layer), past[layer]) << layer;
    EXPECT_EQ(plan->kv_length(layer, 2), past[layer] + (layer < 1 ? 52u : layer < 3 ? 34u : 25u) + 2) << layer;
  }
  for (const std::size_t entries : {2u, 3u, 5u}) {
    prompt.past = Span<const std::size_t>(past, entries);
    EXPECT_EQ(make_plan(schedule, prompt).code(), Errc::bad_shape) << entries;
  }
  EXPECT_TRUE(holds(make_plan(Span<const Config>(), Prompt{52, 6, visual, Span<const std::size_t>(past, 1)})));
}

TEST(PastKeys, TogetherWithThePromptTheyFitAnIndex) {
  const std::size_t past[] = {max_tokens - 52, 0, 0, 0, 0, max_tokens - 51};
  const auto code = [&](Span<const std::size_t> keys) { return make_plan(Config{}, Prompt{52, 6, {}, keys}).code(); };
  EXPECT_EQ(code({past, 1}), Errc::ok);
  EXPECT_EQ(code({past + 5, 1}), Errc::bad_prompt);
  EXPECT_EQ(code(past), Errc::bad_prompt);
}

// As many as a conversation leaves that Slots can follow: each of its groups may hold another number.
TEST(PastKeys, ChangeAtMostEightTimes) {
  for (const std::size_t changes : {8u, 9u}) {
    std::vector<std::size_t> past(20);
    for (std::size_t layer = 0; layer < past.size(); ++layer) past[layer] = layer < changes ? layer + 3 : changes + 3;
    const auto plan = make_plan(Config{}, Prompt{52, 20, {}, past});
    ASSERT_EQ(plan.code(), changes == 8 ? Errc::ok : Errc::not_supported);
    for (std::size_t layer = 0; plan && layer < past.size(); ++layer)
      EXPECT_EQ(plan->past_in_layer(layer), past[layer]);
  }
}

// ---- layers without full attention --------------------------------------------------------------

// filtering_layer K ranks by layer K - 1.
Status planned(const std::vector<bool>& full, Config config) {
  bool layers[16] = {};
  std::copy(full.begin(), full.end(), layers);
  Prompt prompt{52, full.size(), {}};
  prompt.full_attention = Span<const bool>(layers, full.size());
  return make_plan(config, prompt).status;
}
std::string refused(const std::vector<bool>& full, std::size_t filtering_layer) {
  const Status status = planned(full, stage_at(filtering_layer));
  EXPECT_EQ(status.code, Errc::bad_setting);
  return status.message().c_str();
}

TEST(FullAttention, TheFilteringLayerMustFollowALayerThatHasIt) {
  const std::vector<bool> gemma = {false, false, true, false, false, true, false, true};
  for (std::size_t k = 1; k < 8; ++k) EXPECT_EQ(static_cast<bool>(planned(gemma, stage_at(k))), gemma[k - 1]) << k;
  EXPECT_TRUE(holds(make_plan(stage_at(1), {52, 8, {}}))) << "nothing is known: all have it";
}

TEST(FullAttention, TheNearestLayersThatServeAreNamed) {
  const std::vector<bool> gemma = {false, false, true, false, false, true, false, true};
  EXPECT_EQ(refused(gemma, 4), "filtering_layer is 4 but layer 3 has no full attention to rank by: use 3 or 6");
  EXPECT_EQ(refused(gemma, 5), "filtering_layer is 5 but layer 4 has no full attention to rank by: use 3 or 6");
  EXPECT_EQ(refused(gemma, 1), "filtering_layer is 1 but layer 0 has no full attention to rank by: use 3");
  EXPECT_EQ(refused(gemma, 7), "filtering_layer is 7 but layer 6 has no full attention to rank by: use 6")
      << "the last layer would leave none to run on fewer tokens";
  EXPECT_NE(refused({false, false, false, true}, 2).find("Selection::uniform"), std::string::npos);
  EXPECT_NE(refused({false, false, false, false}, 3).find("filtering_layer is 3"), std::string::npos);
  // Every pattern of seven layers: what is named serves, and nothing nearer does.
  for (unsigned bits = 0; bits < 128; ++bits) {
    std::vector<bool> full;
    for (unsigned layer = 0; layer < 7; ++layer) full.push_back((bits >> layer & 1u) != 0);
    for (std::size_t k = 1; k < 7; ++k) {
      if (full[k - 1]) {
        EXPECT_TRUE(planned(full, stage_at(k)));
        continue;
      }
      std::vector<std::size_t> nearest;
      for (std::size_t below = k; below-- > 1;)
        if (full[below - 1]) {
          nearest.push_back(below);
          break;
        }
      for (std::size_t above = k + 1; above < 7; ++above)
        if (full[above - 1]) {
          nearest.push_back(above);
          break;
        }
      const std::string sentence = refused(full, k);
      std::string expected = "use Selection::uniform";
      if (nearest.size() == 1) expected = "use " + std::to_string(nearest[0]);
      if (nearest.size() == 2) expected = "use " + std::to_string(nearest[0]) + " or " + std::to_string(nearest[1]);
      EXPECT_NE(sentence.find(expected), std::string::npos) << expected << " is not in: " << sentence;
    }
  }
}

TEST(FullAttention, RulesThatLookAtNoScoreNeedNone) {
  Config config = stage_at(2);
  config.selection = Selection::uniform;
  EXPECT_TRUE(planned({false, false, false, false}, config));
  config.selection = Selection::random;
  EXPECT_TRUE(planned({false, false, false, false}, config));
  config.filtering_layer = 0;
  EXPECT_TRUE(planned({false, false, false, false}, config));
}

TEST(FullAttention, EveryStageOfAScheduleIsLookedAt) {
  const bool full[] = {false, true, false, false, true, false};
  Prompt prompt{52, 6, three_images};
  prompt.full_attention = full;
  const Config good[] = {stage_at(2), stage_at(5)}, bad[] = {stage_at(2), stage_at(4)};
  EXPECT_TRUE(holds(make_plan(good, prompt)));
  EXPECT_EQ(make_plan(bad, prompt).code(), Errc::bad_setting);
  prompt.full_attention = Span<const bool>(full, 5);
  EXPECT_EQ(make_plan(good, prompt).code(), Errc::bad_shape);
  prompt.full_attention = Span<const bool>(nullptr, 6);
  EXPECT_EQ(make_plan(good, prompt).code(), Errc::null_data);
}

// ---- next_spans ---------------------------------------------------------------------------------

std::vector<float> random_scores(Rng& rng, std::size_t count) {
  std::vector<float> scores(count);
  for (float& score : scores) score = static_cast<float>(rng.between(1, 1000)) / 1000;
  return scores;
}
std::vector<Index> select_all(const Config& config, const std::vector<float>& scores,
                              const std::vector<TokenSpan>& visual, std::size_t tokens) {
  std::vector<Index> kept(tokens);
  std::vector<Mark<float>> scratch(select_scratch(config, visual));
  const Result<Selected> selected =
      select<float>(config, scores, visual, tokens, Span<Index>(kept), Span<Mark<float>>(scratch));
  EXPECT_TRUE(holds(selected));
  kept.resize(selected->count);
  return kept;
}

TEST(NextSpans, AnImageThatLostEverythingStaysAsAnEmptySpan) {
  const std::vector<TokenSpan> visual = {{1, 3}, {5, 4, 2}, with_ratio({10, 2}, 0.25)};
  const std::vector<Index> kept = {0, 2, 4, 9, 11, 12};  // none of the second image
  std::vector<TokenSpan> left(3);
  const auto spans = next_spans(kept, visual, left);
  ASSERT_TRUE(holds(spans));
  ASSERT_EQ(*spans, 3u);
  EXPECT_EQ(left[0].first, 1u);
  EXPECT_EQ(left[0].count, 1u);
  EXPECT_EQ(left[0].original, 3u);
  EXPECT_EQ(left[1].count, 0u);
  EXPECT_EQ(left[1].original, 4u);
  EXPECT_EQ(left[1].columns, 0u) << "of a grid with holes nothing is known";
  EXPECT_EQ(left[2].first, 4u);
  EXPECT_EQ(left[2].count, 1u);
  EXPECT_EQ(left[2].filtering_ratio, 0.25);
  EXPECT_TRUE(validate(Span<const TokenSpan>(left), kept.size()));
}

TEST(NextSpans, HoldJustTheKeptVisualTokensAndTheImages) {
  Rng rng(5);
  for (int round = 0; round < 2000; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    const oracle::Layout layout = oracle::random_layout(rng, 6, 8);
    std::vector<TokenSpan> visual = layout.visual;
    for (std::size_t i = 0; i < visual.size(); ++i) visual[i].continues = i > 0 && rng.chance(0.5);
    for (TokenSpan& span : visual)
      if (!span.continues && rng.chance(0.5)) span.filtering_ratio = static_cast<double>(rng.below(5)) / 4;
    std::vector<Index> kept;
    const double share = rng.real();
    for (std::size_t i = 0; i < layout.tokens; ++i)
      if (rng.chance(share)) kept.push_back(static_cast<Index>(i));
    std::vector<TokenSpan> left(visual.size());
    const bool in_place = rng.chance(0.5);
    if (in_place) left = visual;
    const auto spans = next_spans(kept, in_place ? left : visual, left);
    ASSERT_TRUE(holds(spans));
    left.resize(*spans);
    if (!kept.empty()) {
      ASSERT_TRUE(validate(Span<const TokenSpan>(left), kept.size()));
    }
    for (std::size_t i = 0; i < left.size(); ++i)
      ASSERT_TRUE(left[i].count > 0 || (!left[i].continues && (i + 1 == left.size() || !left[i + 1].continues)))
          << "span " << i << " is empty, but its image is not";
    const std::vector<oracle::Image> before = oracle::images_of(visual), now = oracle::images_of(left);
    ASSERT_EQ(now.size(), before.size());
    for (std::size_t i = 0; i < before.size(); ++i) {
      std::vector<std::size_t> expected, got;
      for (const std::size_t position : before[i].positions)
        if (std::count(kept.begin(), kept.end(), static_cast<Index>(position)) > 0) expected.push_back(position);
      for (const std::size_t position : now[i].positions) got.push_back(kept[position]);
      ASSERT_EQ(got, expected);
      ASSERT_EQ(now[i].original, before[i].original);
      ASSERT_EQ(now[i].ratio, before[i].ratio);
      ASSERT_EQ(now[i].columns, 0u);
    }
  }
}

TEST(NextSpans, RefuseIndicesOutOfOrderAndTooLittleRoom) {
  const std::vector<TokenSpan> visual = {{1, 3}, {5, 4}};
  TokenSpan left[2];
  EXPECT_EQ(next_spans(std::vector<Index>{3, 2}, visual, left).code(), Errc::bad_index);
  EXPECT_EQ(next_spans(std::vector<Index>{2, 3}, visual, Span<TokenSpan>(left, 1)).code(), Errc::too_small);
  Kept failed;
  failed.status = fail(Errc::out_of_memory, "of some other call");
  EXPECT_EQ(next_spans(failed, visual, left).code(), Errc::out_of_memory) << "a failure is passed on";
}

// ---- schedules ----------------------------------------------------------------------------------

TEST(Schedules, WrongOnesAreNamed) {
  const std::vector<TokenSpan> visual = {{1, 20, 5}, {30, 20, 5}};
  const auto status = [&](const std::vector<Config>& schedule) { return make_plan(schedule, {60, 8, visual}).status; };
  const auto code = [&](const std::vector<Config>& schedule) { return status(schedule).code; };
  const auto pooled = [](Config config) {
    config.quota = Quota::pooled;
    return config;
  };
  const auto at_least = [](Config config, std::size_t least) {
    config.min_per_image = least;
    return config;
  };
  const auto windows = [](Config config) {
    config.window_rows = config.window_columns = 2;
    return config;
  };
  EXPECT_EQ(code({}), Errc::ok);
  EXPECT_EQ(code({stage_at(2), stage_at(4), stage_at(7)}), Errc::ok);
  EXPECT_EQ(code({stage_at(4), stage_at(4)}), Errc::bad_setting);
  EXPECT_EQ(code({stage_at(4), stage_at(2)}), Errc::bad_setting);
  EXPECT_EQ(code({stage_at(2), stage_at(8)}), Errc::bad_setting);
  EXPECT_EQ(code(std::vector<Config>(9, stage_at(2))), Errc::bad_setting);
  // Behind a pool the images' counts depend on scores.
  EXPECT_EQ(code({pooled(stage_at(2)), stage_at(4)}), Errc::bad_setting);
  EXPECT_EQ(code({stage_at(1), pooled(stage_at(2)), stage_at(4)}), Errc::bad_setting);
  EXPECT_EQ(code({pooled(stage_at(2)), pooled(stage_at(4))}), Errc::ok);
  EXPECT_EQ(code({stage_at(2), pooled(stage_at(4))}), Errc::ok);
  EXPECT_EQ(code({pooled(stage_at(2)), pooled(at_least(stage_at(4), 1))}), Errc::bad_setting);
  Config counted = pooled(at_least(stage_at(4), 1));
  counted.keep_count = 5;
  EXPECT_EQ(code({pooled(stage_at(2)), counted}), Errc::ok) << "a count is known";
  const std::vector<TokenSpan> one = {{1, 20}};
  const std::vector<Config> pool_first = {pooled(stage_at(2)), stage_at(4)};
  EXPECT_TRUE(holds(make_plan(pool_first, {60, 8, one}))) << "a pool of one image knows its count";
  // Windows: in the first stage alone, and where there is a grid.
  EXPECT_EQ(code({windows(stage_at(2)), stage_at(4)}), Errc::ok);
  EXPECT_EQ(code({stage_at(2), windows(stage_at(4))}), Errc::bad_prompt);
  EXPECT_NE(std::string(status({stage_at(2), windows(stage_at(4))}).message().c_str()).find("earlier stage"),
            std::string::npos);
  EXPECT_EQ(make_plan(windows(stage_at(2)), {60, 8, one}).code(), Errc::bad_prompt);
  EXPECT_EQ(code({pooled(windows(stage_at(2)))}), Errc::bad_setting);
  Config even = windows(stage_at(4));
  even.selection = Selection::uniform;
  EXPECT_EQ(code({stage_at(2), even}), Errc::ok) << "windows are of top_k";
}

TEST(Schedules, AnEmptyOnePrunesNothing) {
  const std::vector<TokenSpan> visual = {{1, 20}};
  const auto plan = make_plan(Span<const Config>(), {30, 8, visual});
  ASSERT_TRUE(holds(plan));
  EXPECT_EQ(plan->groups(), 1u);
  EXPECT_EQ(plan->kept(), 30u);
  for (std::size_t layer = 0; layer < 8; ++layer) EXPECT_EQ(plan->tokens_in_layer(layer), 30u);
}

TEST(Schedules, ARatioOfTheOriginalTokensCountsImagesThatVanished) {
  // Two frames of 10 pooled down to 8, all of the second frame; then a quarter of the 20, not of the 10.
  const std::vector<TokenSpan> visual = {{0, 10}, {10, 10}};
  Config schedule[] = {stage_at(1, 0.6), stage_at(2, 0.75)};
  schedule[0].quota = schedule[1].quota = Quota::pooled;
  schedule[1].ratio_of = RatioOf::original;
  const auto plan = make_plan(schedule, {21, 4, visual});
  ASSERT_TRUE(holds(plan));
  EXPECT_EQ(plan->stage[0].kept_visual, 8u);
  EXPECT_EQ(plan->stage[1].kept_visual, 5u);
  std::vector<float> scores(20, 0.1f);
  std::fill(scores.begin() + 10, scores.end(), 0.2f);
  const std::vector<Index> kept = select_all(schedule[0], scores, visual, 21);
  EXPECT_EQ(kept.size(), 9u);
  EXPECT_EQ(kept.front(), 10u);
  std::vector<TokenSpan> left(2);
  left.resize(*next_spans(kept, visual, left));
  EXPECT_EQ(select_all(schedule[1], std::vector<float>(8, 0.5f), left, 9).size(), 6u);
}

// Stages one after another, as an engine runs them, keep what the plan said before any score was known.
TEST(Schedules, KeepWhatWasPlannedWhateverTheScores) {
  Rng rng(6);
  int planned_ones = 0, refused_ones = 0, vanished = 0;
  for (int draw = 0; draw < 12000; ++draw) {
    SCOPED_TRACE(testing::Message() << "draw " << draw);
    const oracle::Layout layout = oracle::random_layout(rng, 5, rng.chance(0.5) ? 4 : 25);
    std::vector<TokenSpan> visual = layout.visual;
    for (std::size_t i = 0; i < visual.size(); ++i) visual[i].continues = i > 0 && rng.chance(0.2);
    const bool own_ratios = rng.chance(0.3);
    if (own_ratios)
      for (TokenSpan& span : visual)
        if (!span.continues && rng.chance(0.5)) span.filtering_ratio = static_cast<double>(rng.below(1001)) / 1000;
    std::vector<Config> schedule;
    std::size_t most = layout.visual_tokens();
    for (std::size_t stage = rng.between(1, 4); stage > 0; --stage) {
      Config config = random_settings(rng, most);
      if (own_ratios) {
        config.quota = Quota::per_image;
        config.keep_count = by_ratio;
      }
      if (config.keep_count != by_ratio) most = config.keep_count;
      if (rng.chance(0.3)) config.selection = rng.chance(0.5) ? Selection::random : Selection::uniform;
      if (rng.chance(0.2)) config.uniform_share = rng.real();
      config.filtering_layer = schedule.size() + 1;
      schedule.push_back(config);
    }
    const auto plan = make_plan(schedule, {layout.tokens, 8, visual});
    // Refused are a pool before a stage that needs counts, and a count above what is left; nothing else.
    bool pooled = false, wrong = false;
    for (std::size_t stage = 0; stage < schedule.size() && !wrong; ++stage) {
      const Config& config = schedule[stage];
      const auto before = make_plan(Span<const Config>(schedule.data(), stage), {layout.tokens, 8, visual});
      const std::size_t left = before->kept_visual();
      wrong = (pooled && config.quota == Quota::per_image) ||
              (pooled && config.min_per_image > 0 && config.keep_count == by_ratio) ||
              (left > 0 && config.keep_count != by_ratio && config.keep_count > left);
      pooled = pooled || (config.quota == Quota::pooled && oracle::images_of(visual).size() > 1);
    }
    ASSERT_EQ(static_cast<bool>(plan), !wrong) << plan.message().c_str();
    if (!plan) {
      ++refused_ones;
      continue;
    }
    ++planned_ones;
    std::size_t tokens = layout.tokens;
    for (std::size_t stage = 0; stage < schedule.size(); ++stage) {
      std::size_t candidates = 0;
      for (const TokenSpan& span : visual) candidates += span.count;
      const std::vector<Index> kept = select_all(schedule[stage], random_scores(rng, candidates), visual, tokens);
      if (HasFailure()) return;
      ASSERT_EQ(kept.size(), tokens - candidates + plan->stage[stage].kept_visual) << "stage " << stage;
      ASSERT_EQ(kept.size(), plan->tokens_in_layer(stage + 1));
      tokens = kept.size();
      visual.resize(*next_spans(kept, visual, visual));
      for (const oracle::Image& image : oracle::images_of(visual)) vanished += image.tokens() == 0 ? 1 : 0;
    }
    ASSERT_EQ(plan->kept(), tokens);
  }
  EXPECT_GT(planned_ones, 5000);
  EXPECT_GT(refused_ones, 500);
  EXPECT_GT(vanished, 1000);
}

}  // namespace
}  // namespace plan_test

// The cost model against the paper's tables and against sums worked out by hand, and the planner against trying every
// setting.
#include "fastv/cost.hpp"

#include <gtest/gtest.h>

#include "oracle.hpp"

namespace cost_test {
namespace {

using namespace fastv;

constexpr ModelShape llama_7b{32, 4096, 32, 32, 128, 11008};
constexpr ModelShape llama_13b{40, 5120, 40, 40, 128, 13824};
constexpr double paper_tokens = 612, paper_image = 576;  // 36 system tokens and one image

struct Published {
  std::size_t filtering_layer;
  double ratio;
  double billions;  // "FLOPs (B)"
  double percent;   // "FLOPs ratio"
};

double billions(const ModelShape& shape, const Published& row) {
  return paper_cost(shape, paper_tokens, paper_image, row.filtering_layer, row.ratio) / 1e9;
}
double percent(const ModelShape& shape, const Published& row) {
  return 100 * paper_cost_ratio(shape, paper_tokens, paper_image, row.filtering_layer, row.ratio);
}

// ---- the paper's convention ---------------------------------------------------------------------

TEST(PaperCost, BaselinesOfTable1) {
  EXPECT_NEAR(paper_layer_cost(612, 4096, 11008) / 1e9, 99.3, 0.05);
  EXPECT_NEAR(paper_layer_cost(612, 5120, 13824) / 1e9, 154.6, 0.05);
}

TEST(PaperCost, Table1Llava13BInBillions) {
  const Published rows[] = {{2, .90, 29.7, 19}, {2, .75, 50.2, 32}, {2, .50, 84.6, 55},
                            {3, .90, 33.0, 21}, {3, .75, 52.9, 34}, {3, .50, 86.4, 56},
                            {5, .90, 39.6, 26}, {5, .75, 58.4, 38}, {5, .50, 90.1, 58}};
  for (const Published& row : rows) {
    EXPECT_NEAR(billions(llama_13b, row), row.billions, 0.05) << "K = " << row.filtering_layer << ", R = " << row.ratio;
    EXPECT_EQ(std::round(percent(llama_13b, row)), row.percent)
        << "K = " << row.filtering_layer << ", R = " << row.ratio;
  }
}

TEST(PaperCost, Table1Llava7BInRoundedPercent) {
  // The 7B billions are these rounded percentages of 99.3, so the percentages are what there is to check.
  const Published rows[] = {{2, .90, 19.9, 20}, {2, .75, 32.8, 33}, {2, .50, 54.6, 55}, {3, .90, 22.8, 23},
                            {3, .75, 34.8, 35}, {3, .50, 56.6, 57}, {5, .90, 27.8, 28}, {5, .75, 39.7, 40},
                            {5, .50, 59.6, 60}, {0, .75, 28.8, 29}, {0, .50, 51.6, 52}};
  for (const Published& row : rows) {
    EXPECT_EQ(std::round(percent(llama_7b, row)), row.percent)
        << "K = " << row.filtering_layer << ", R = " << row.ratio;
    EXPECT_NEAR(row.billions, row.percent / 100 * 99.3, 0.1) << "the published billions are the rounded percentage";
  }
}

TEST(PaperCost, VideoLlavaRatios) {
  EXPECT_NEAR(100 * paper_cost_ratio(llama_7b, 2116, 2048, 2, 0.5), 52.3, 0.05);
  EXPECT_NEAR(100 * paper_cost_ratio(llama_7b, 2116, 2048, 5, 0.5), 57.1, 0.05);
}

// Published rows that the formula does not give, with what it gives. They are errata of the paper, or of
// what it leaves unsaid: a test that began to reproduce them would have changed the formula.
TEST(PaperCost, Errata) {
  const Published table1_7b{0, .90, 18.9, 19};
  EXPECT_NEAR(percent(llama_7b, table1_7b), 14.9, 0.05);   // printed: 19 %
  EXPECT_NEAR(billions(llama_7b, table1_7b), 14.8, 0.05);  // printed: 18.9
  const Published table5_13b{0, .50, 78.9, 51};
  EXPECT_NEAR(percent(llama_13b, table5_13b), 52.3, 0.05);   // printed as 51 % of 154.6
  EXPECT_NEAR(billions(llama_13b, table5_13b), 80.9, 0.05);  // printed: 78.9

  // QwenVL-Chat-7B, K = 2, R = 90, 75, 50 (printed: 71.9 B; 22, 34, 55 %). 71.9 B is 288 tokens with an FFN of
  // 22016, whose 256 visual tokens then give other percentages.
  const ModelShape qwen{32, 4096, 32, 32, 128, 22016};
  EXPECT_NEAR(paper_layer_cost(288, 4096, 22016) / 1e9, 71.9, 0.05);
  EXPECT_NEAR(100 * paper_cost_ratio(qwen, 288, 256, 2, .90), 24.9, 0.05);
  EXPECT_NEAR(100 * paper_cost_ratio(qwen, 288, 256, 2, .75), 37.3, 0.05);
  EXPECT_NEAR(100 * paper_cost_ratio(qwen, 288, 256, 2, .50), 58.1, 0.05);
}

TEST(PaperCost, PruningNothingCostsOneWholeLayer) {
  EXPECT_EQ(paper_cost_ratio(llama_7b, paper_tokens, paper_image, 2, 0), 1);
  EXPECT_EQ(paper_cost_ratio(llama_7b, paper_tokens, paper_image, 32, 0.9), 1);
  EXPECT_EQ(paper_layer_cost(2, 3, 5), 4 * 2 * 9 + 2 * 4 * 3 + 2 * 2 * 3 * 5);
}

// ---- the whole model ----------------------------------------------------------------------------

// d = 8, 4 query heads and 2 KV heads of 3, FFN of 5, 7 words.
constexpr ModelShape tiny{4, 8, 4, 2, 3, 5, 3, 7};

Plan plan_of(std::size_t filtering_layer, std::size_t tokens, std::size_t layers, std::vector<TokenSpan> visual,
             double ratio = 0.5) {
  Config config;
  config.filtering_layer = filtering_layer;
  config.filtering_ratio = ratio;
  return *make_plan(config, {tokens, layers, visual});
}

TEST(LayerMacs, EqualsTheProductsOfALayerWorkedOutByHand) {
  // Of one token: q 8x12, k and v 8x6 each, output 12x8, FFN 3 times 8x5; each key: q.k and p.v over 12.
  const std::uint64_t one = 96 + 2 * 48 + 96 + 120;
  EXPECT_EQ(layer_macs(tiny, 1, 1), one + 24);
  EXPECT_EQ(layer_macs(tiny, 1, 10), one + 240);
  EXPECT_EQ(layer_macs(tiny, 5, 10), 5 * (one + 240));
  ModelShape two_matrices = tiny;
  two_matrices.ffn_matrices = 2;
  EXPECT_EQ(layer_macs(two_matrices, 1, 1), one + 24 - 40);
}

TEST(LayerMacs, WithTwoFfnMatricesAndNoKvGroupsIsThePapersLayer) {
  ModelShape shape = llama_7b;
  shape.ffn_matrices = 2;
  EXPECT_EQ(static_cast<double>(layer_macs(shape, 612, 612)), paper_layer_cost(612, 4096, 11008));
}

TEST(PrefillMacs, SumsFullLayersPrunedLayersAndOneOutputHead) {
  const Plan plan = plan_of(1, 10, 4, {{2, 6}});  // 10 tokens in layer 0, 7 in layers 1 to 3
  const std::uint64_t expected = 10 * (408 + 24 * 10) + 3 * (7 * (408 + 24 * 7)) + 8 * 7;
  EXPECT_EQ(prefill_macs(tiny, plan), expected);
  EXPECT_EQ(prefill_flops(tiny, plan), 2.0 * static_cast<double>(expected));
}

TEST(DecodeMacs, OneTokenAttendsToTheCacheAndItself) {
  const Plan plan = plan_of(1, 10, 4, {{2, 6}});
  EXPECT_EQ(decode_macs(tiny, plan, 0), (408u + 24 * 11) + 3 * (408u + 24 * 8) + 56u);
  EXPECT_EQ(decode_macs(tiny, plan, 5), (408u + 24 * 16) + 3 * (408u + 24 * 13) + 56u);
  EXPECT_EQ(decode_flops(tiny, plan, 5), 2.0 * static_cast<double>(decode_macs(tiny, plan, 5)));
}

TEST(PrefillMacs, Llama7BAt612TokensIsAboutEightTeraflops) {
  const Plan plan = plan_of(2, 612, 32, {}, 0);
  EXPECT_NEAR(prefill_flops(llama_7b, plan) / 1e12, 8.1, 0.05);
}

// ---- KV memory ----------------------------------------------------------------------------------

TEST(KvBytes, Llava7BInHalfPrecisionIs512KiBAToken) {
  EXPECT_EQ(kv_bytes(llama_7b, plan_of(2, 1, 32, {}), 2), 512u * 1024);
  EXPECT_EQ(kv_bytes(llama_7b, plan_of(2, 576, 32, {}), 2), 288u * 1024 * 1024);
}

TEST(KvBytes, CountsFullAndPrunedLayersAndGeneratedTokens) {
  const Plan plan = plan_of(1, 10, 4, {{2, 6}});
  const std::uint64_t entry = 2 * 2 * 3 * 4;  // K and V, 2 heads of 3 floats
  EXPECT_EQ(kv_bytes(tiny, plan, 4), (10 + 3 * 7) * entry);
  EXPECT_EQ(kv_bytes(tiny, plan, 4, 5), (15 + 3 * 12) * entry);
}

TEST(KvBytes, VisualTokensShrinkTo53PercentAtK2R50) {
  const std::uint64_t text = kv_bytes(llama_7b, plan_of(2, 36, 32, {}), 2);
  const auto image_bytes = [&](double ratio) {
    return static_cast<double>(kv_bytes(llama_7b, plan_of(2, 612, 32, {{30, 576}}, ratio), 2) - text);
  };
  EXPECT_NEAR(100 * image_bytes(0.50) / image_bytes(0), 53.1, 0.05);
  EXPECT_NEAR(100 * image_bytes(0.75) / image_bytes(0), 29.7, 0.05);
}

// ---- keys of earlier turns ----------------------------------------------------------------------

TEST(PastKeys, AreAttendedToAndStoredInTheirLayers) {
  const std::size_t past[] = {100, 40, 40, 40};
  const TokenSpan visual[] = {{2, 6}};
  Config config;
  config.filtering_layer = 1;
  Prompt long_chat{10, 4, visual};
  long_chat.past = past;
  const Plan plan = *make_plan(config, long_chat);
  EXPECT_EQ(prefill_macs(tiny, plan), 10 * (408 + 24 * 110) + 3 * (7 * (408 + 24 * 47)) + 56u);
  EXPECT_EQ(decode_macs(tiny, plan, 5), (408u + 24 * 116) + 3 * (408u + 24 * 53) + 56u);
  EXPECT_EQ(kv_bytes(tiny, plan, 4, 5), (115u + 3 * 52) * 2 * 2 * 3 * 4);
  EXPECT_EQ(prefill_flops(tiny, plan), 2.0 * static_cast<double>(prefill_macs(tiny, plan)));
}

// ---- counts that fit no integer -----------------------------------------------------------------

constexpr std::uint64_t most = ~std::uint64_t{0};

TEST(Overflow, CountsStayAtTheLargestAndFlopsAreRight) {
  // A thousand layers on two billion tokens: about 2^85 multiply-adds.
  const ModelShape shape{1000, 4096, 32, 32, 128, 11008};
  const Plan plan = plan_of(2, 2000000000, 1000, {});
  EXPECT_EQ(prefill_macs(shape, plan), most);
  const double one = 4.0 * 4096 * 4096 + 2.0 * 2e9 * 4096 + 3.0 * 4096 * 11008;
  EXPECT_NEAR(prefill_flops(shape, plan) / (2e9 * 1e3 * one * 2), 1, 1e-12);
  EXPECT_GT(prefill_flops(shape, plan), 2 * 18446744073709551616.0);
  EXPECT_EQ(decode_macs(shape, plan, 0), static_cast<std::uint64_t>(1e3 * (one + 2 * 4096)));
}

TEST(Overflow, NoFactorWrapsAround) {
  const std::size_t half = std::size_t{1} << 32;
  EXPECT_EQ(layer_macs({1, half, 1, 1, half, 0, 0}, 1, 0), most) << "2^64 would wrap to 0";
  EXPECT_EQ(layer_macs({1, 1, 1, 1, 1, 1}, ~std::size_t{0}, ~std::size_t{0}), most);
  EXPECT_EQ(layer_macs({1, 1, 0, 0, 0, 1, 1}, 7, 1), 7u) << "no factor is divided by";
  EXPECT_EQ(kv_bytes({1, 1, 1, half, half, 1}, plan_of(1, 1, 4, {}), 2), most);
  EXPECT_EQ(kv_bytes({4, 1, 1, 1, 1, 1}, plan_of(1, 10, 4, {}), 1, ~std::size_t{0}), most) << "10 - 1, if it wrapped";
  EXPECT_EQ(kv_bytes({4, 1, 1, 1, 1, 1}, plan_of(1, 10, 4, {}), 1, most / 4), most);
  // The largest counts that do fit are exact.
  EXPECT_EQ(kv_bytes({1, 1, 1, half / 2, half / 2, 1}, plan_of(1, 1, 4, {}), 1), most / 2 + 1);
  EXPECT_EQ(decode_macs({1, 1, 1, 1, 1, 0, 0}, plan_of(1, 1, 4, {}), ~std::size_t{0}), most);
}

// ---- the planner --------------------------------------------------------------------------------

constexpr ModelShape llava_7b{32, 4096, 32, 32, 128, 11008, 3, 32000},
    llava_13b{40, 5120, 40, 40, 128, 13824, 3, 32000};
const std::vector<TokenSpan> image_spans = {{35, 576, 24}};

Plan unpruned(const ModelShape& shape) { return *make_plan(Span<const Config>(), {631, shape.layers, image_spans}); }

// Seconds of a layer, read off the table by hand.
double seconds_of(const std::vector<LayerTime>& times, double tokens) {
  if (tokens <= static_cast<double>(times[0].tokens)) return times[0].seconds;
  std::size_t i = 1;
  while (i + 1 < times.size() && static_cast<double>(times[i].tokens) < tokens) ++i;
  const double from = static_cast<double>(times[i - 1].tokens), to = static_cast<double>(times[i].tokens);
  return times[i - 1].seconds + (times[i].seconds - times[i - 1].seconds) * (tokens - from) / (to - from);
}
// What a plan costs under a budget, layer by layer.
double slow_cost(const ModelShape& shape, const Plan& plan, const Budget& budget) {
  double total = 0, whole = 0;
  for (std::size_t layer = 0; layer < shape.layers; ++layer) {
    const double all = static_cast<double>(plan.tokens), tokens = static_cast<double>(plan.tokens_in_layer(layer));
    const double past = static_cast<double>(plan.past_in_layer(layer));
    const double d = static_cast<double>(shape.hidden), q = static_cast<double>(shape.heads * shape.head_dim),
                 kv = static_cast<double>(shape.kv_heads * shape.head_dim),
                 ffn = static_cast<double>(shape.ffn_matrices * shape.hidden * shape.intermediate);
    const auto macs = [&](double n) { return n * (2 * d * q + 2 * d * kv + 2 * (past + n) * q + ffn); };
    switch (budget.of) {
      case Budget::Of::flops_ratio:
        total += macs(tokens);
        whole += macs(all);
        break;
      case Budget::Of::flops: total += 2 * macs(tokens); break;
      case Budget::Of::kv_bytes:
        total += (past + tokens + static_cast<double>(budget.generated)) * 2 * kv *
                 static_cast<double>(budget.element_bytes);
        break;
      case Budget::Of::seconds: total += seconds_of({budget.times.begin(), budget.times.end()}, tokens); break;
    }
  }
  const double head = static_cast<double>(shape.hidden * shape.vocabulary);
  if (budget.of == Budget::Of::flops) total += 2 * head;
  return budget.of == Budget::Of::flops_ratio ? (total + head) / (whole + head) : total;
}

// Every K and count tried one by one. A count of `nothing`: none fits.
constexpr std::size_t nothing = by_ratio;
Config by_brute_force(const Budget& budget, const ModelShape& shape, const Prompt& prompt, std::size_t first_layer) {
  Config best;
  best.keep_count = nothing;
  for (std::size_t layer = first_layer; layer < shape.layers; ++layer)
    for (std::size_t keep = 0; keep <= 576; ++keep) {
      Config config;
      config.filtering_layer = layer;
      config.keep_count = keep;
      const auto plan = make_plan(config, prompt);
      if (!plan) break;  // the layer below has no full attention
      if (slow_cost(shape, *plan, budget) > budget.limit) break;
      if (best.keep_count == nothing || keep > best.keep_count ||
          (keep == best.keep_count && layer > best.filtering_layer))
        best = config;
    }
  return best;
}

void expect_best(const Budget& budget, const ModelShape& shape, const Prompt& prompt, std::size_t first) {
  const auto ours = settings_under(budget, shape, prompt, first);
  // What costs the limit itself may lie a rounding error on either side of it.
  Budget lower = budget, higher = budget;
  lower.limit *= 1 - 1e-12;
  higher.limit *= 1 + 1e-12;
  Config slow = by_brute_force(lower, shape, prompt, first);
  if (!ours || slow.keep_count != ours->keep_count || slow.filtering_layer != ours->filtering_layer)
    slow = by_brute_force(higher, shape, prompt, first);
  if (slow.keep_count == nothing) {
    EXPECT_EQ(ours.code(), Errc::over_budget) << ours.message().c_str();
    return;
  }
  ASSERT_TRUE(ours) << ours.message().c_str();
  EXPECT_EQ(ours->keep_count, slow.keep_count);
  EXPECT_EQ(ours->filtering_layer, slow.filtering_layer);
  EXPECT_NEAR(ours->filtering_ratio, 1 - static_cast<double>(ours->keep_count) / 576, 1e-12);
  EXPECT_TRUE(make_plan(*ours, prompt));
}

constexpr ModelShape small{6, 256, 4, 2, 64, 512, 3, 1000};

TEST(Planner, KeepsMostTokensAndPrunesLatestUnderEveryKindOfBudget) {
  const std::vector<LayerTime> times = {{10, 1e-3}, {100, 4e-3}, {400, 11e-3}, {631, 30e-3}};
  for (const Budget& budget : {Budget{Budget::Of::flops_ratio, 0.55}, Budget{Budget::Of::flops_ratio, 0.99},
                               Budget{Budget::Of::flops, 0.7 * prefill_flops(small, unpruned(small))},
                               Budget{Budget::Of::kv_bytes, 2.0e6, 2, 100}, Budget{Budget::Of::kv_bytes, 1.2e6},
                               Budget{Budget::Of::seconds, 0.09, 2, 0, times}, Budget{Budget::Of::flops_ratio, 1.0},
                               Budget{Budget::Of::flops_ratio, 0.2}})
    for (const std::size_t first : {1u, 2u, 4u}) expect_best(budget, small, {631, 6, image_spans}, first);
}

TEST(Planner, CountsTheKeysOfEarlierTurns) {
  for (const std::vector<std::size_t>& past :
       {std::vector<std::size_t>{2000}, std::vector<std::size_t>{2000, 2000, 2000, 500, 500, 900},
        std::vector<std::size_t>(6)}) {
    Prompt chat{631, 6, image_spans};
    chat.past = past;
    expect_best({Budget::Of::kv_bytes, 8.5e6, 2, 10}, small, chat, 2);
    expect_best({Budget::Of::flops, 4.0e9}, small, chat, 2);
    expect_best({Budget::Of::flops_ratio, 0.6}, small, chat, 1);
  }
  // The same budget has less room for the image behind a long chat.
  const std::size_t long_past[] = {1000};
  Prompt chat{631, 6, image_spans};
  const Budget budget{Budget::Of::kv_bytes, 5.0e6};
  const auto fresh = settings_under(budget, small, chat);
  chat.past = long_past;
  const auto later = settings_under(budget, small, chat);
  ASSERT_TRUE(fresh && later);
  EXPECT_LT(later->keep_count, fresh->keep_count);
}

TEST(Planner, NothingPrunedCostsAllWhateverTheEarlierTurnsLeft) {
  const std::size_t past[] = {2000, 2000, 2000, 500, 500, 500};  // earlier turns were pruned as well
  Prompt chat{631, 6, image_spans};
  chat.past = past;
  const auto settings = settings_under({Budget::Of::flops_ratio, 1.0}, small, chat);
  ASSERT_TRUE(settings);
  EXPECT_EQ(settings->keep_count, 576u);
  EXPECT_NEAR(detail::cost_under(small, *make_plan(*settings, chat), {Budget::Of::flops_ratio, 1.0}), 1.0, 1e-12);
  const auto less = settings_under({Budget::Of::flops_ratio, 0.999}, small, chat);
  ASSERT_TRUE(less);
  EXPECT_LT(less->keep_count, 576u);
}

TEST(Planner, SkipsLayersThatCannotRank) {
  const bool alternating[] = {false, true, false, true, false, true};  // K = 2, 4
  Prompt gemma{631, 6, image_spans};
  gemma.full_attention = alternating;
  for (const double limit : {0.3, 0.5, 0.7, 0.9, 1.0})
    for (const std::size_t first : {1u, 2u, 3u, 4u}) {
      SCOPED_TRACE(testing::Message() << limit << " from layer " << first);
      expect_best({Budget::Of::flops_ratio, limit}, small, gemma, first);
      const auto settings = settings_under({Budget::Of::flops_ratio, limit}, small, gemma, first);
      if (settings) {
        EXPECT_TRUE(alternating[settings->filtering_layer - 1]);
      }
    }
  // From layer 5 on none is left that could rank.
  EXPECT_EQ(settings_under({Budget::Of::flops_ratio, 1.0}, small, gemma, 5).code(), Errc::bad_setting);
  Config even;  // a rule that looks at no score prunes anywhere
  even.selection = Selection::uniform;
  const auto settings = settings_under({Budget::Of::flops_ratio, 1.0}, small, gemma, 5, even);
  ASSERT_TRUE(settings) << settings.message().c_str();
  EXPECT_EQ(settings->filtering_layer, 5u);
}

TEST(Planner, KeepsTheOtherSettings) {
  Config settings;
  settings.quota = Quota::pooled;
  settings.min_per_image = 3;
  settings.seed = 9;
  const auto ours = settings_under({Budget::Of::flops_ratio, 0.6}, small, {631, 6, image_spans}, 2, settings);
  ASSERT_TRUE(ours);
  EXPECT_EQ(ours->quota, Quota::pooled);
  EXPECT_EQ(ours->min_per_image, 3u);
  EXPECT_EQ(ours->seed, 9u);
}

// A steep line through the first two times reaches below zero at few tokens; layers do not.
TEST(Planner, TimesNeverFallBelowTheFirst) {
  const std::vector<LayerTime> steep = {{600, 1e-3}, {631, 32e-3}};  // 1 ms a token: -544 ms at 55
  for (const std::size_t tokens : {std::size_t{0}, std::size_t{1}, std::size_t{55}, std::size_t{600}})
    EXPECT_EQ(detail::layer_seconds(steep, tokens), 1e-3);
  EXPECT_NEAR(detail::layer_seconds(steep, 610), 11e-3, 1e-12);
  EXPECT_NEAR(detail::layer_seconds(steep, 731), 132e-3, 1e-12) << "beyond the last the line goes on";
  const Prompt prompt{631, 6, image_spans};
  EXPECT_EQ(settings_under({Budget::Of::seconds, 2 * 32e-3 + 4 * 1e-3 - 1e-6, 2, 0, steep}, small, prompt).code(),
            Errc::over_budget)
      << "no layer is free";
  const auto settings = settings_under({Budget::Of::seconds, 2 * 32e-3 + 4 * 1e-3, 2, 0, steep}, small, prompt);
  ASSERT_TRUE(settings) << settings.message().c_str();
  EXPECT_EQ(settings->keep_count, 576u - 31) << "600 tokens cost what one does";
  expect_best({Budget::Of::seconds, 2 * 32e-3 + 4 * 8e-3, 2, 0, steep}, small, prompt, 2);
}

TEST(Planner, A13BFitsBelowThe7BsBudgetAsThePaperClaims) {
  const Budget budget{Budget::Of::flops, prefill_flops(llava_7b, unpruned(llava_7b))};
  EXPECT_GT(prefill_flops(llava_13b, unpruned(llava_13b)), budget.limit);
  const auto settings = settings_under(budget, llava_13b, {631, 40, image_spans});
  ASSERT_TRUE(settings) << settings.message().c_str();
  EXPECT_EQ(settings->filtering_layer, 2u);
  EXPECT_GT(settings->keep_count, 200u);  // far more than the quarter with which the paper's 13B matches its 7B
  EXPECT_LE(prefill_flops(llava_13b, *make_plan(*settings, {631, 40, image_spans})), budget.limit);
}

TEST(Planner, SaysThatNothingFitsAndWhatIsWrong) {
  const Prompt prompt{631, 32, image_spans};
  const auto none = settings_under({Budget::Of::flops_ratio, 0.01}, llava_7b, prompt);
  ASSERT_FALSE(none);
  EXPECT_EQ(none.code(), Errc::over_budget);
  EXPECT_NE(std::string(none.message().c_str()).find("0.01"), std::string::npos);
  EXPECT_EQ(settings_under({Budget::Of::flops, std::nan("")}, llava_7b, prompt).code(), Errc::over_budget);
  const std::vector<LayerTime> falling = {{10, 1.0}, {5, 2.0}}, faster = {{5, 2.0}, {10, 1.0}}, one = {{10, 1.0}},
                               negative = {{5, -1.0}, {10, 1.0}}, none_at_all = {{5, 1.0}, {10, std::nan("")}};
  for (const std::vector<LayerTime>& times : {falling, faster, one, negative, none_at_all})
    EXPECT_EQ(settings_under({Budget::Of::seconds, 1, 2, 0, times}, llava_7b, prompt).code(), Errc::bad_setting);
  EXPECT_EQ(settings_under({Budget::Of::flops, 1e20}, llava_7b, prompt, 32).code(), Errc::bad_setting);
}

TEST(Planner, APromptWithoutImagesNeedsNoSettings) {
  const auto settings = settings_under({Budget::Of::flops, 1e20}, llava_7b, {631, 32, {}});
  ASSERT_TRUE(settings) << settings.message().c_str();
  EXPECT_EQ(settings->keep_count, 0u);
  EXPECT_EQ(settings->filtering_layer, 31u);
}

}  // namespace
}  // namespace cost_test

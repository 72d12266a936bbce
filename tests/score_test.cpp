// Scores against dense attention in double. Keys of other types and places are in keys_test.cpp.
#include "fastv/score.hpp"

#include <gtest/gtest.h>

#include "attention.hpp"
#include "fastv/fastv.hpp"
#include "refused.hpp"

namespace score_test {
namespace {

using namespace fastv;
using oracle::all_rows;
using oracle::Layer;
using oracle::Place;
using oracle::random_layer;
using oracle::Rng;
using oracle::Tensors;

Config listing(const std::vector<Index>& rows) {
  Config config;
  config.score_rows = ScoreRows::listed;
  config.listed_rows = rows;
  return config;
}
Config of_all_rows() {
  Config config;
  config.score_rows = ScoreRows::all;
  return config;
}

template <class Score = float, class Evidence>
std::vector<Score> scores_of(const Config& config, const Evidence& evidence, const std::vector<TokenSpan>& visual) {
  std::vector<Score> scores(visual_tokens(visual), Score(-7));
  std::vector<float> scratch(score_scratch(evidence), oracle::nan_float());
  const Status status =
      score(config, evidence, Span<const TokenSpan>(visual), Span<Score>(scores), Span<float>(scratch));
  EXPECT_TRUE(status) << status.message().c_str();
  return scores;
}
template <class Evidence>
Status status_of(const Config& config, const Evidence& evidence, const std::vector<TokenSpan>& visual) {
  std::vector<float> scores(visual_tokens(visual)), scratch(score_scratch(evidence));
  return score(config, evidence, Span<const TokenSpan>(visual), Span<float>(scores), Span<float>(scratch));
}
template <class Score>
void expect_near(const std::vector<Score>& got, const std::vector<double>& expected, double relative = 2e-5) {
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i)
    ASSERT_NEAR(static_cast<double>(got[i]), expected[i], relative * std::fabs(expected[i]) + 1e-30)
        << "visual token " << i;
}

// Scores against their logarithms: equal; or, where every one is tiny, equal but for one factor.
template <class Score>
void expect_scores(const std::vector<Score>& got, const std::vector<double>& logs, double relative = 3e-5) {
  ASSERT_EQ(got.size(), logs.size());
  const double most = *std::max_element(logs.begin(), logs.end());
  double factor = 0;  // its logarithm
  if (most < std::log(1e-12)) {
    const auto best = static_cast<std::size_t>(std::max_element(logs.begin(), logs.end()) - logs.begin());
    if (most != -HUGE_VAL) {
      ASSERT_GT(got[best], Score(1e-12)) << "not brought into range";
      factor = std::log(static_cast<double>(got[best])) - most;
    }
  }
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double expected = std::exp(logs[i] + factor);
    ASSERT_NEAR(static_cast<double>(got[i]), expected, relative * expected + 1e-36) << "visual token " << i;
  }
}

// ---- queries and keys ---------------------------------------------------------------------------

template <class Pair>
class QueryKeyTypes : public testing::Test {};
template <class Q, class K>
struct TypePair {
  using Query = Q;
  using Key = K;
};
using TypePairs =
    testing::Types<TypePair<float, float>, TypePair<half, half>, TypePair<bfloat16, bfloat16>, TypePair<float, half>,
                   TypePair<half, float>, TypePair<half, fp8_e4m3>, TypePair<double, double>>;
TYPED_TEST_SUITE(QueryKeyTypes, TypePairs, );  // the comma is for clang -Wpedantic

TYPED_TEST(QueryKeyTypes, EqualDenseAttentionInEveryLayoutAndGrouping) {
  using Q = typename TypeParam::Query;
  using K = typename TypeParam::Key;
  Rng rng(10);
  const std::vector<TokenSpan> visual = {{2, 9}, {11, 3}, {17, 8}};
  for (const auto& [heads, kv_heads] :
       {std::pair<std::size_t, std::size_t>{1, 1}, {3, 3}, {4, 4}, {8, 2}, {6, 2}, {6, 3}, {5, 1}})
    for (const std::size_t dim : {1u, 7u, 33u, 80u, 128u})
      for (const Place place : {Place::token_major, Place::roomy_heads})
        for (const std::size_t queries : {1u, 5u, 29u}) {
          SCOPED_TRACE(testing::Message() << heads << "/" << kv_heads << " heads of " << dim << ", " << queries
                                          << " rows, place " << static_cast<int>(place));
          Layer a = random_layer(rng, heads, kv_heads, queries, 29, dim);
          const Tensors<Q, K> tensors(rng, a, place);
          const Index last = a.last_row(), first = a.first_row();
          expect_near(scores_of({}, tensors.view, visual), oracle::scores_by(a, {last}, visual));
          const std::vector<Index> listed = {(first + last) / 2, first, last};
          expect_near(scores_of(listing(listed), tensors.view, visual), oracle::scores_by(a, listed, visual));
          if (queries == 29)
            expect_near(scores_of(of_all_rows(), tensors.view, visual), oracle::scores_by(a, all_rows(29), visual));
          if (testing::Test::HasFatalFailure()) return;
        }
}

// ---- everything QueryKey can say, drawn at random -----------------------------------------------

std::vector<TokenSpan> random_spans(Rng& rng, std::size_t tokens, bool to_the_end) {
  std::vector<TokenSpan> visual;
  std::size_t at = rng.below(3);
  while (at + 2 < tokens && visual.size() < 4) {
    const std::size_t count = rng.between(1, std::max<std::size_t>(1, (tokens - at - 1) / 2));
    visual.push_back({at, count});
    at += count + rng.below(4);
  }
  if (visual.empty()) visual.push_back({0, 1});
  if (to_the_end) visual.back().count = tokens - visual.back().first;
  return visual;
}

TEST(QueryKeyScores, EqualDenseAttentionForEveryCombinationOfFields) {
  for (std::uint64_t draw = 0; draw < 1500; ++draw) {
    SCOPED_TRACE(testing::Message() << "draw " << draw);
    Rng rng(draw);
    const std::size_t kv_heads = rng.between(1, 3), heads = kv_heads * rng.between(1, 6), keys = rng.between(4, 90);
    const std::size_t first_key = rng.chance(0.7) ? 0 : rng.between(1, 60);
    const std::size_t past = rng.chance(0.6) ? 0 : rng.below(first_key + keys - 2), n = first_key + keys - past;
    const std::size_t queries = rng.chance(0.3) ? n : rng.between(1, std::min<std::size_t>(n, 6));
    Layer a = random_layer(rng, heads, kv_heads, queries, keys, rng.between(1, 40));
    a.first_key = first_key;
    a.past = past;
    a.causal = rng.chance(0.7);
    if (rng.chance(0.3)) a.window = rng.between(1, first_key + keys + 3);
    if (rng.chance(0.3))
      for (std::size_t r = 0; r < queries; ++r)
        a.visible.push_back(static_cast<Index>(rng.below(first_key + keys + 1)));
    if (rng.chance(0.3)) a.soft_cap = std::round(rng.real(1, 50));
    if (rng.chance(0.3))
      for (std::size_t h = 0; h < heads; ++h) a.sinks.push_back(rng.chance(0.1) ? -HUGE_VAL : rng.real(-5, 8));
    if (rng.chance(0.3))
      for (std::size_t h = 0; h < heads; ++h) a.alibi.push_back(rng.real(0, 0.3));
    if (rng.chance(0.3))
      for (std::size_t i = 0; i < kv_heads * keys; ++i) a.key_scales.push_back(rng.real(0.1, 2));
    if (rng.chance(0.4))
      for (std::size_t j = 0; j < keys; ++j) a.bias.push_back(rng.chance(0.15) ? -HUGE_VAL : rng.real(-3, 3));
    if (rng.chance(0.2)) a.heads_total = heads * 2;
    const ScoreRows which = queries == n && rng.chance(0.6) ? ScoreRows::all
                            : rng.chance(0.5)               ? ScoreRows::listed
                                                            : ScoreRows::last;
    const auto visual = random_spans(rng, n, which != ScoreRows::last && rng.chance(0.3));
    if (rng.chance(0.3))
      for (std::size_t i = 0; i < kv_heads * visual_tokens(visual); ++i) a.value_norms.push_back(rng.real(0.1, 3));

    const Place place = oracle::places[rng.below(10)];
    Tensors<float, half> tensors(rng, a, place, rng.between(1, 20), oracle::in_chunks(place) ? 1 : 0);
    for (std::size_t j = 0; j < a.bias.size(); ++j)
      if (a.bias[j] == -HUGE_VAL) tensors.key.at(rng.below(kv_heads), j, rng.below(a.dim)) = half{0x7e00};
    std::vector<Index> rows = {a.last_row()};
    Config config;
    config.score_rows = which;
    if (which == ScoreRows::all) rows = all_rows(n);
    if (which == ScoreRows::listed) {
      rows.clear();
      for (std::size_t i = rng.between(1, 5); i > 0; --i)  // in any order, and twice where it falls so
        rows.push_back(static_cast<Index>(rng.between(a.first_row(), a.last_row())));
      config.listed_rows = rows;
    }
    const auto logs = oracle::log_scores(a, rows, visual);
    if (a.heads_total != 0 && *std::max_element(logs.begin(), logs.end()) < std::log(1e-12)) continue;
    if (draw % 2 == 0)
      expect_scores(scores_of<float>(config, tensors.view, visual), logs);
    else
      expect_scores(scores_of<double>(config, tensors.view, visual), logs);
    if (testing::Test::HasFatalFailure()) return;
  }
}

// ---- each field by itself -----------------------------------------------------------------------

// One head of dim 1 whose logits are the keys.
struct Line {
  std::vector<float> query, keys;
  explicit Line(std::vector<float> logits, std::size_t queries = 1) : query(queries, 1.0f), keys(std::move(logits)) {}
  QueryKey<float> view() const {
    return query_key(heads(query.data(), TokenMajor{query.size(), 1, 1}),
                     heads(keys.data(), TokenMajor{keys.size(), 1, 1}), 1.0f);
  }
};

TEST(QueryKeyScores, ASinkTakesItsShareAndGivesItToNoToken) {
  const Line line({0, 0, 0, 0});
  auto evidence = line.view();
  const float sinks[] = {std::log(12.0f)};
  evidence.sinks = sinks;
  expect_near(scores_of({}, evidence, {{0, 3}}), {1.0 / 16, 1.0 / 16, 1.0 / 16}, 1e-6);
  const float none[] = {-oracle::infinity()};
  evidence.sinks = none;
  expect_near(scores_of({}, evidence, {{0, 3}}), {0.25, 0.25, 0.25}, 1e-6);
  const float broken[] = {oracle::nan_float()};
  evidence.sinks = broken;
  for (const float score : scores_of({}, evidence, {{0, 3}})) EXPECT_TRUE(oracle::is_nan(score));
}

TEST(QueryKeyScores, AlibiHalvesByDistanceCountedOverTheWholeSequence) {
  const Line line({0, 0, 0, 0});
  auto evidence = line.view();
  const float slopes[] = {std::log(2.0f)};
  evidence.alibi = slopes;
  for (const std::size_t earlier : {0u, 1000u}) {  // tokens that are gone stand between no two of these
    evidence.first_key = evidence.past = earlier;
    expect_near(scores_of({}, evidence, {{0, 3}}), {1.0 / 15, 2.0 / 15, 4.0 / 15}, 1e-6);
  }
}

TEST(QueryKeyScores, AWindowCountsTheRowItself) {
  const Line line({0, 0, 0, 0, 0, 0, 0, 0});
  auto evidence = line.view();
  evidence.window = 4;
  expect_near(scores_of({}, evidence, {{1, 6}}), {0, 0, 0, 0.25, 0.25, 0.25}, 1e-6);
  evidence.window = 1;
  expect_near(scores_of({}, evidence, {{1, 6}}), {0, 0, 0, 0, 0, 0});
}

TEST(QueryKeyScores, TokensTheWindowHasLetGoOfReceiveNothing) {
  const Line line({0, 0, 0, 0});
  auto evidence = line.view();
  evidence.first_key = 6;  // a prompt of 10, of which 4 are left
  ASSERT_EQ(evidence.prompt_tokens(), 10u);
  expect_near(scores_of({}, evidence, {{0, 3}, {4, 4}}), {0, 0, 0, 0, 0, 0.25, 0.25}, 1e-6);
  evidence.past = 5;  // the earlier turns' tokens are all gone, and one of the prompt's
  ASSERT_EQ(evidence.prompt_tokens(), 5u);
  expect_near(scores_of({}, evidence, {{0, 3}}), {0, 0.25, 0.25}, 1e-6);
}

TEST(QueryKeyScores, VisibleSaysWhatEachRowSees) {
  const Line line({0, 0, 0, 0, 0}, 5);
  auto evidence = line.view();
  const Index seen[] = {4, 4, 4, 4, 5};
  evidence.visible = seen;
  expect_near(scores_of({}, evidence, {{0, 4}}), {0.2, 0.2, 0.2, 0.2}, 1e-6);
  expect_near(scores_of(listing({1}), evidence, {{0, 4}}), {0.25, 0.25, 0.25, 0.25}, 1e-6);
  expect_near(scores_of(of_all_rows(), evidence, {{0, 5}}), {0.24, 0.24, 0.24, 0.24, 0.04}, 1e-6);
  const Index nothing[] = {0, 0, 0, 0, 0};
  evidence.visible = nothing;
  expect_near(scores_of(of_all_rows(), evidence, {{0, 5}}), {0, 0, 0, 0, 0});
}

TEST(VisibleTokens, ReadImagesInBothDirections) {
  const std::vector<TokenSpan> visual = {{2, 3}, {6, 2}};
  const auto of = [&](std::size_t rows, std::size_t prefix = 0, std::size_t past = 0) {
    std::vector<Index> visible(rows);
    const Status status = visible_tokens(visual, 10, Span<Index>(visible), prefix, past);
    EXPECT_TRUE(status) << status.message().c_str();
    return visible;
  };
  EXPECT_EQ(of(10), (std::vector<Index>{1, 2, 5, 5, 5, 6, 8, 8, 9, 10}));
  EXPECT_EQ(of(4), (std::vector<Index>{8, 8, 9, 10}));
  EXPECT_EQ(of(1), (std::vector<Index>{10}));
  EXPECT_EQ(of(0), (std::vector<Index>{}));
  EXPECT_EQ(of(10, 4), (std::vector<Index>{4, 4, 5, 5, 5, 6, 8, 8, 9, 10}));
  EXPECT_EQ(of(10, 9), (std::vector<Index>{9, 9, 9, 9, 9, 9, 9, 9, 9, 10}));
  EXPECT_EQ(of(4, 0, 100), (std::vector<Index>{108, 108, 109, 110}));
}

TEST(VisibleTokens, AnImageOfSeveralSpansEndsWithItsLast) {
  // Rows of an AnyRes image, a newline behind each; another image follows, and one that was dropped whole.
  const std::vector<TokenSpan> visual = {{1, 2}, {4, 2, 0, true}, {7, 1, 0, true}, {8, 2}, {11, 0, 0, false, 5}};
  std::vector<Index> visible(12);
  ASSERT_TRUE(visible_tokens(visual, 12, Span<Index>(visible)));
  EXPECT_EQ(visible, (std::vector<Index>{1, 8, 8, 8, 8, 8, 8, 8, 10, 10, 11, 12}));
}

TEST(VisibleTokens, RefuseWhatIsNotInThePrompt) {
  std::vector<Index> visible(11);
  const std::vector<TokenSpan> visual = {{2, 3}};
  const auto of = [&](std::size_t rows, std::size_t prefix, std::size_t past, const std::vector<TokenSpan>& spans) {
    return visible_tokens(spans, 10, Span<Index>(visible.data(), rows), prefix, past);
  };
  EXPECT_TRUE(refused(of(11, 0, 0, visual), Errc::bad_shape, "11 rows"));
  EXPECT_TRUE(refused(of(10, 11, 0, visual), Errc::bad_prompt, "prefix has 11"));
  EXPECT_TRUE(refused(of(10, 0, max_tokens, visual), Errc::bad_prompt, "earlier turns"));
  EXPECT_TRUE(refused(of(10, 0, 0, {{8, 3}}), Errc::bad_prompt, "span 0"));
  EXPECT_TRUE(refused(visible_tokens(visual, 10, Span<Index>(nullptr, 3)), Errc::null_data, "visible"));
}

// Gemma 3 and PaliGemma: ScoreRows::all over rows that see the whole of their image, and over a prefix.
TEST(VisibleTokens, ScoreBidirectionalPromptsAsDenseAttentionDoes) {
  Rng rng(12);
  const std::vector<TokenSpan> visual = {{2, 9}, {15, 12}};
  for (const std::size_t prefix : {0u, 20u})
    for (const std::size_t past : {0u, 13u})
      for (const std::size_t window : {0u, 9u})
        for (const std::size_t queries : {30u, 17u}) {
          Layer a = random_layer(rng, 4, 2, queries, 30 + past, 16);
          a.past = past;
          a.window = window;
          a.visible.resize(queries);
          ASSERT_TRUE(visible_tokens(visual, 30, Span<Index>(a.visible), prefix, past));
          const Tensors<float> tensors(rng, a);
          const std::vector<Index> listed = {a.first_row(), 17, 26};
          expect_near(scores_of(listing(listed), tensors.view, visual), oracle::scores_by(a, listed, visual));
          if (queries == 30)
            expect_near(scores_of(of_all_rows(), tensors.view, visual), oracle::scores_by(a, all_rows(30), visual));
          if (testing::Test::HasFatalFailure()) return;
        }
}

TEST(QueryKeyScores, AMinusInfiniteBiasHidesItsKeyAndOnlyThat) {
  Rng rng(13);
  Layer a = random_layer(rng, 4, 2, 1, 40, 16);
  a.bias.assign(40, 0.0);
  for (const std::size_t hidden : {0u, 7u, 8u, 39u}) a.bias[hidden] = -HUGE_VAL;
  const Tensors<float> tensors(rng, a);
  const std::vector<TokenSpan> visual = {{5, 30}};
  const auto scores = scores_of({}, tensors.view, visual);
  expect_near(scores, oracle::scores_by(a, {39}, visual));
  EXPECT_EQ(scores[2], 0.0f);
  EXPECT_EQ(scores[3], 0.0f);
  EXPECT_GT(scores[1], 0.0f);
}

TEST(QueryKeyScores, ARowThatSeesNoKeyAddsNothing) {
  Rng rng(14);
  Layer a = random_layer(rng, 2, 2, 10, 10, 16);
  const std::vector<TokenSpan> visual = {{2, 5}};
  {
    Layer hidden = a;
    hidden.bias.assign(10, -HUGE_VAL);
    const Tensors<float> tensors(rng, hidden);
    for (const float score : scores_of({}, tensors.view, visual)) EXPECT_EQ(score, 0.0f);
    for (const float score : scores_of(of_all_rows(), tensors.view, visual)) EXPECT_EQ(score, 0.0f);
  }
  a.visible.assign(10, 10);
  a.visible[3] = 0;
  const Tensors<float> tensors(rng, a);
  expect_near(scores_of(of_all_rows(), tensors.view, visual), oracle::scores_by(a, all_rows(10), visual));
}

TEST(QueryKeyScores, LogitsThatWouldOverflowAnExponentialAreFine) {
  Rng rng(15);
  Layer a = random_layer(rng, 2, 1, 1, 50, 64);
  a.scale = 16;  // logits of several hundreds: exp() of them is infinite in float
  const Tensors<float> tensors(rng, a);
  const std::vector<TokenSpan> visual = {{0, 49}};
  const auto got = scores_of({}, tensors.view, visual);
  const auto expected = oracle::scores_by(a, {49}, visual);
  for (std::size_t i = 0; i < 49; ++i) ASSERT_NEAR(static_cast<double>(got[i]), expected[i], 2e-4);
}

TEST(QueryKeyScores, ManySpansAreNumberedInOrder) {
  Rng rng(17);
  Layer a = random_layer(rng, 4, 2, 1, 300, 24);
  const Tensors<float> tensors(rng, a);
  std::vector<TokenSpan> visual;
  for (std::size_t first = 1; first < 290; first += 7) visual.push_back({first, 1 + first % 6});
  expect_near(scores_of({}, tensors.view, visual), oracle::scores_by(a, {299}, visual));
}

// Keys of earlier turns are attended to, but the spans count from the prompt at hand.
TEST(EveryEvidence, CountsSpansFromBehindTheKeysOfEarlierTurns) {
  Rng rng(19);
  const std::size_t past = 40, keys = 100;
  Layer a = random_layer(rng, 4, 2, 1, keys, 24);
  Tensors<float> tensors(rng, a);
  const std::vector<TokenSpan> whole = {{45, 20}, {70, 25}}, prompt = {{5, 20}, {30, 25}};
  const auto expect_shifted = [&](auto evidence) {
    const auto expected = scores_of({}, evidence, whole);
    evidence.past = past;
    EXPECT_EQ(scores_of({}, evidence, prompt), expected);
  };
  expect_shifted(tensors.view);
  expect_shifted(probabilities(tensors.key.data(), 4, 1, keys));
  expect_shifted(KeysOnly{tensors.key.view()});
}

TEST(QueryKeyScores, ExtremeElementsOfOneTokenMakeEveryScoreNaN) {
  Rng rng(18);
  for (const float bad : {oracle::nan_float(), -oracle::nan_float(), oracle::infinity()})
    for (const bool in_key : {false, true})
      for (const bool weighted : {false, true})
        for (const std::size_t dim : {3u, 32u, 45u}) {
          Layer a = random_layer(rng, 2, 1, 1, 12, dim);
          Tensors<float> tensors(rng, a);
          std::fill_n(tensors.query.data(), 2 * dim, 0.5f);
          std::fill_n(tensors.key.data() + 2 * dim, dim, 0.0f);  // a logit of 0 is no attention of 0
          (in_key ? tensors.key.data()[4 * dim + dim - 1] : tensors.query.data()[dim - 1]) = bad;
          if (!in_key)  // an infinite query element gives +infinity somewhere
            std::fill_n(tensors.key.data(), 12 * dim, 0.25f);
          const std::vector<float> norms(8, 2.0f);
          if (weighted) tensors.view.value_norms = norms;
          for (const float score : scores_of({}, tensors.view, {{1, 8}}))
            ASSERT_TRUE(oracle::is_nan(score)) << bad << (in_key ? " in a key" : " in a query") << ", dim " << dim;
        }
}

TEST(QueryKeyScores, TheLargestHalfIsNotTakenForInfinity) {
  for (const std::size_t dim : {1u, 31u, 64u}) {
    Rng rng(26);
    Layer a = random_layer(rng, 2, 1, 1, 9, dim);
    Tensors<half> tensors(rng, a);
    a.key[4 * dim] = 65504;
    tensors.key.at(0, 4, 0).bits = 0x7bff;
    a.query[0] = a.query[dim] = 0x1p-14;
    tensors.query.at(0, 0, 0).bits = tensors.query.at(1, 0, 0).bits = 0x0400;
    expect_near(scores_of({}, tensors.view, {{1, 7}}), oracle::scores_by(a, {8}, {{1, 7}}));
  }
}

TEST(QueryKeyScores, AnInfiniteHalfHidesOrSpoilsAsItDoesInDouble) {
  for (const std::uint16_t bits : std::vector<std::uint16_t>{0xfc00, 0x7c00, 0x7e00, 0xfe00})
    for (const std::size_t place : {0u, 30u, 31u, 32u, 36u}) {
      Rng rng(27);
      Layer a = random_layer(rng, 2, 1, 1, 9, 37);
      std::fill(a.query.begin(), a.query.end(), 0.5);
      Tensors<half> tensors(rng, a);
      tensors.key.at(0, 4, place).bits = bits;
      a.key[4 * 37 + place] = oracle::value_of(half{bits});
      SCOPED_TRACE(testing::Message() << "bits " << bits << " at " << place);
      if (bits == 0xfc00) {  // -infinity times a positive query hides the key, and only that
        expect_near(scores_of({}, tensors.view, {{1, 7}}), oracle::scores_by(a, {8}, {{1, 7}}));
      } else {
        for (const float score : scores_of({}, tensors.view, {{1, 7}})) ASSERT_TRUE(oracle::is_nan(score));
      }
    }
}

TEST(QueryKeyScores, KeysBehindTheRowAreNotEvenRead) {
  Rng rng(19);
  Layer a = random_layer(rng, 2, 2, 6, 6, 8);
  Tensors<float> tensors(rng, a);
  for (std::size_t h = 0; h < 2; ++h) tensors.key.at(h, 5, 3) = oracle::nan_float();  // the last token's key
  const std::vector<TokenSpan> visual = {{0, 5}};
  expect_near(scores_of(listing({2, 4}), tensors.view, visual), oracle::scores_by(a, {2, 4}, visual));
}

TEST(QueryKeyScores, SpreadToOneOverTheWholeRow) {
  Rng rng(21);
  Layer a = random_layer(rng, 4, 2, 1, 90, 32);
  a.causal = false;
  const Tensors<float> tensors(rng, a, Place::head_major);
  const auto scores = scores_of<double>(listing({89}), tensors.view, {{0, 90}});
  EXPECT_NEAR(std::accumulate(scores.begin(), scores.end(), 0.0), 1, 1e-6);
}

TEST(QueryKeyScores, ARowListedTwiceCountsTwice) {
  Rng rng(22);
  for (const std::size_t queries : {1u, 4u}) {
    Layer a = random_layer(rng, 4, 2, queries, 40, 8);
    const Tensors<float> tensors(rng, a);
    const std::vector<Index> rows = {39, 39, a.first_row()};
    const std::vector<TokenSpan> visual = {{1, 30}};
    expect_near(scores_of(listing(rows), tensors.view, visual), oracle::scores_by(a, rows, visual));
  }
}

TEST(QueryKeyScores, WrongFieldsAreNamed) {
  Rng rng(23);
  Layer a = random_layer(rng, 4, 2, 3, 20, 8);
  const Tensors<float> tensors(rng, a);
  const std::vector<float> floats(64, 1.0f);
  const std::vector<Index> rows(8, 20);
  const auto with = [&](auto change) {
    auto evidence = tensors.view;
    change(evidence);
    return evidence.check();
  };
  EXPECT_TRUE(with([](auto&) {}));
  EXPECT_TRUE(refused(with([](auto& e) { e.scale = 0; }), Errc::bad_setting, "scale is 0"));
  EXPECT_TRUE(refused(with([](auto& e) { e.scale = oracle::nan_float(); }), Errc::bad_setting, "scale"));
  EXPECT_TRUE(refused(with([](auto& e) { e.scale = oracle::infinity(); }), Errc::bad_setting, "scale"));
  EXPECT_TRUE(refused(with([](auto& e) { e.soft_cap = -1; }), Errc::bad_setting, "soft_cap is -1"));
  EXPECT_TRUE(refused(with([](auto& e) { e.soft_cap = oracle::infinity(); }), Errc::bad_setting, "soft_cap"));
  EXPECT_TRUE(refused(with([&](auto& e) { e.bias = {floats.data(), 19}; }), Errc::bad_shape, "19 entries for 20 keys"));
  EXPECT_TRUE(refused(with([&](auto& e) { e.bias = {nullptr, 20}; }), Errc::null_data, "bias"));
  EXPECT_TRUE(refused(with([&](auto& e) { e.sinks = {floats.data(), 2}; }), Errc::bad_shape, "sinks has 2"));
  EXPECT_TRUE(refused(with([&](auto& e) { e.sinks = {nullptr, 4}; }), Errc::null_data, "sinks"));
  EXPECT_TRUE(refused(with([&](auto& e) { e.alibi = {floats.data(), 5}; }), Errc::bad_shape, "alibi has 5"));
  EXPECT_TRUE(refused(with([&](auto& e) { e.visible = {rows.data(), 2}; }), Errc::bad_shape, "2 entries for 3"));
  EXPECT_TRUE(refused(with([&](auto& e) { e.visible = {nullptr, 3}; }), Errc::null_data, "visible"));
  const Index beyond[] = {20, 21, 20};
  EXPECT_TRUE(refused(with([&](auto& e) { e.visible = beyond; }), Errc::bad_shape, "row 1 sees 21"));
  EXPECT_TRUE(refused(with([](auto& e) { e.past = 20; }), Errc::bad_shape, "past is 20"));
  EXPECT_TRUE(refused(with([](auto& e) { e.past = 18; }), Errc::bad_shape, "3 query rows"));
  EXPECT_TRUE(refused(with([](auto& e) { e.first_key = max_tokens; }), Errc::bad_shape, "supported"));
  EXPECT_TRUE(refused(with([](auto& e) { e.heads_total = 3; }), Errc::bad_shape, "heads_total is 3"));
  EXPECT_TRUE(refused(with([](auto& e) { e.query.dim = 7; }), Errc::bad_shape, "dimension"));
  EXPECT_TRUE(refused(with([](auto& e) { e.query.heads = 3; }), Errc::bad_shape, "2 KV heads"));
  EXPECT_TRUE(refused(with([](auto& e) { e.query.tokens = 0; }), Errc::bad_shape, "0 query rows"));
  EXPECT_TRUE(refused(with([](auto& e) { e.key.tokens = 0; }), Errc::bad_shape, "0 keys"));
  auto evidence = tensors.view;
  evidence.value_norms = {floats.data(), 19};
  EXPECT_TRUE(refused(status_of({}, evidence, {{1, 10}}), Errc::bad_shape, "19 value norms"));
  evidence.value_norms = {floats.data(), 40};
  EXPECT_TRUE(refused(status_of({}, evidence, {{1, 10}}), Errc::bad_shape, "40 value norms"));
  evidence.value_norms = {nullptr, 20};
  EXPECT_TRUE(refused(status_of({}, evidence, {{1, 10}}), Errc::null_data, "value_norms"));
  EXPECT_TRUE(refused(status_of(listing({16}), tensors.view, {{1, 10}}), Errc::missing_evidence, "position 16"));
  EXPECT_TRUE(refused(status_of(listing({20}), tensors.view, {{1, 10}}), Errc::bad_setting, "listed row 0 is 20"));
  EXPECT_TRUE(refused(status_of(of_all_rows(), tensors.view, {{1, 10}}), Errc::missing_evidence, "20 query rows"));
  std::vector<float> scores(10), scratch(score_scratch(tensors.view));
  const std::vector<TokenSpan> visual = {{1, 10}};
  EXPECT_TRUE(refused(score({}, tensors.view, visual, Span<float>(scores.data(), 9), Span<float>(scratch)),
                      Errc::too_small, "9 entries"));
  EXPECT_TRUE(
      refused(score({}, tensors.view, visual, Span<float>(scores), Span<float>(scratch.data(), scratch.size() - 1)),
              Errc::too_small, "scratch"));
}

// ---- attention that is next to nothing ----------------------------------------------------------

// The top tokens must be those of the exact scores, but for any that are within rounding of each other.
template <class Score>
void expect_order(const std::vector<Score>& got, const std::vector<double>& logs) {
  for (const std::size_t count : {std::size_t{1}, std::size_t{5}, got.size() / 2}) {
    std::vector<bool> chosen(got.size());
    for (const Index i : oracle::top(got, count)) chosen[i] = true;
    double lowest = HUGE_VAL, highest = -HUGE_VAL;
    for (std::size_t i = 0; i < got.size(); ++i)
      (chosen[i] ? lowest : highest) = chosen[i] ? std::min(lowest, logs[i]) : std::max(highest, logs[i]);
    ASSERT_GT(lowest, highest - 1e-3) << "of the best " << count;
  }
}

TEST(TinyAttention, KeepsItsOrderBelowASinkInEveryHead) {
  Rng rng(30);
  const std::vector<TokenSpan> visual = {{3, 20}, {25, 30}};
  for (const double above : {30.0, 60.0, 88.0, 95.0, 200.0, 1000.0})
    for (const bool all : {false, true}) {
      Layer a = random_layer(rng, 4, 2, all ? 60 : 1, 60, 16);
      for (std::size_t h = 0; h < 4; ++h) a.sinks.push_back(above + rng.real(0, 3));
      const Tensors<float> tensors(rng, a);
      const auto logs = oracle::log_scores(a, all ? all_rows(60) : std::vector<Index>{59}, visual);
      const Config config = all ? of_all_rows() : Config{};
      expect_order(scores_of<float>(config, tensors.view, visual), logs);
      expect_order(scores_of<double>(config, tensors.view, visual), logs);
      expect_scores(scores_of<float>(config, tensors.view, visual), logs, 1e-3);
      expect_scores(scores_of<double>(config, tensors.view, visual), logs, 1e-3);
      if (testing::Test::HasFatalFailure()) FAIL() << above << " above";
    }
}

TEST(TinyAttention, KeepsItsOrderBelowATextTokenThatTakesItAll) {
  Rng rng(31);
  const std::vector<TokenSpan> visual = {{3, 50}};
  for (const double bias : {-88.0, -200.0})
    for (const bool weighted : {false, true}) {
      Layer a = random_layer(rng, 4, 2, 1, 60, 16);
      a.bias.assign(60, 0.0);
      for (std::size_t j = 3; j < 53; ++j) a.bias[j] = bias;
      if (weighted)
        for (std::size_t i = 0; i < 100; ++i) a.value_norms.push_back(rng.real(0.01, 10));
      const Tensors<float, half> tensors(rng, a);
      const auto logs = oracle::log_scores(a, {59}, visual);
      expect_order(scores_of({}, tensors.view, visual), logs);
      expect_scores(scores_of({}, tensors.view, visual), logs, 1e-3);
    }
}

// One head far below the others decides nothing, and what is hidden stays so.
TEST(TinyAttention, ComparesHeadsWithEachOther) {
  Rng rng(32);
  const std::vector<TokenSpan> visual = {{3, 50}};
  Layer a = random_layer(rng, 4, 2, 2, 60, 16);
  a.sinks = {300, 100, 108, 101};
  a.bias.assign(60, 0.0);
  a.bias[9] = -HUGE_VAL;
  a.window = 50;
  const Tensors<float> tensors(rng, a);
  const std::vector<Index> rows = {58, 59};
  const auto scores = scores_of(listing(rows), tensors.view, visual);
  expect_scores(scores, oracle::log_scores(a, rows, visual), 1e-3);
  EXPECT_EQ(scores[6], 0.0f);
}

TEST(TinyAttention, IsNotScaledUpFromWhereNothingIs) {
  const Line line({0, 0, 0, 0, 0});
  auto evidence = line.view();
  evidence.window = 1;
  EXPECT_EQ(scores_of({}, evidence, {{0, 4}}), (std::vector<float>{0, 0, 0, 0}));
}

// Partial sums of head shards are added up by the caller: a factor of one rank's own would spoil them.
TEST(TinyAttention, OfOneRanksHeadsIsLeftAsItIs) {
  Rng rng(33);
  const std::vector<TokenSpan> visual = {{3, 50}};
  Layer a = random_layer(rng, 4, 2, 1, 60, 16);
  a.sinks = {60, 60, 0, 0};
  const Tensors<float> tensors(rng, a);
  const auto expected = scores_of({}, tensors.view, visual);
  std::vector<float> sum(50, 0.0f);
  for (std::size_t rank = 0; rank < 2; ++rank) {
    auto own = tensors.view;
    own.query.heads = 2;
    own.query.data += rank * 2 * 16;
    own.key.heads = 1;
    own.key.data += rank * 16;
    own.sinks = {tensors.view.sinks.data() + 2 * rank, 2};
    own.heads_total = 4;
    const auto part = scores_of({}, own, visual);
    for (std::size_t i = 0; i < 50; ++i) sum[i] += part[i];
  }
  expect_near(sum, {expected.begin(), expected.end()}, 1e-5);
}

// ---- many terms ---------------------------------------------------------------------------------

// LLaVA's prompt, all 631 rows of 32 heads: summed in float term by term, four digits would be left.
TEST(ManyRows, LoseNoDigitsInFloat) {
  Rng rng(34);
  const std::size_t n = 631, heads = 32;
  const std::vector<TokenSpan> visual = {{35, 576}};
  const auto worst = [](const std::vector<float>& got, const std::vector<double>& expected) {
    double most = 0;
    for (std::size_t i = 0; i < got.size(); ++i)
      most = std::max(most, std::fabs(static_cast<double>(got[i]) / expected[i] - 1));
    return most;
  };
  std::vector<float> map(heads * n * n);
  std::vector<double> sums(n);
  for (std::size_t h = 0; h < heads; ++h)
    for (std::size_t r = 0; r < n; ++r)
      for (std::size_t j = 0; j < n; ++j) {
        float& p = map[(h * n + r) * n + j];
        p = j <= r ? static_cast<float>(rng.real(0, 2) / static_cast<double>(r + 1)) : 0.0f;
        sums[j] += static_cast<double>(p) / static_cast<double>(heads * n);
      }
  const std::vector<double> of_map(sums.begin() + 35, sums.begin() + 611);
  EXPECT_LT(worst(scores_of(of_all_rows(), probabilities(map.data(), heads, n, n), visual), of_map), 3e-7);

  Layer a = random_layer(rng, heads, 8, n, n, 8);
  const Tensors<half> tensors(rng, a);
  EXPECT_LT(worst(scores_of(of_all_rows(), tensors.view, visual), oracle::scores_by(a, all_rows(n), visual)), 3e-7);
}

// ---- probabilities ------------------------------------------------------------------------------

template <class T>
class ProbabilityTypes : public testing::Test {};
using Elements = testing::Types<float, double, half, bfloat16, fp8_e4m3>;
TYPED_TEST_SUITE(ProbabilityTypes, Elements, );  // the comma is for clang -Wpedantic

// The mean of p [heads, queries, keys] at the visual tokens.
std::vector<double> mean_of(const std::vector<double>& p, std::size_t heads, std::size_t queries, std::size_t keys,
                            std::size_t tokens, const std::vector<Index>& positions,
                            const std::vector<TokenSpan>& visual, const std::vector<float>& norms = {}) {
  std::vector<double> scores;
  const std::size_t count = visual_tokens(visual), kv_heads = norms.size() / count;
  for (const TokenSpan& span : visual)
    for (std::size_t t = span.first; t < span.first + span.count; ++t) {
      double sum = 0;
      for (std::size_t h = 0; h < heads && t + keys >= tokens; ++h)
        for (const Index position : positions)
          sum += p[(h * queries + position - (tokens - queries)) * keys + (t + keys - tokens)] *
                 (norms.empty() ? 1.0 : static_cast<double>(norms[h * kv_heads / heads * count + scores.size()]));
      scores.push_back(sum / static_cast<double>(heads * positions.size()));
    }
  return scores;
}

TYPED_TEST(ProbabilityTypes, EqualTheMeanInEveryAxisOrderWithGapsAnywhere) {
  Rng rng(22);
  for (int draw = 0; draw < 80; ++draw) {
    // Keys behind a window have fewer keys than the prompt tokens; those behind earlier turns more.
    const std::size_t heads = rng.between(1, 6), keys = 90, past = rng.chance(0.5) ? 0 : rng.below(20);
    const std::size_t first_key = rng.chance(0.6) ? 0 : rng.between(1, 30), n = first_key + keys - past;
    const std::size_t queries = rng.chance(0.3) ? n : rng.between(1, 4);
    const std::vector<TokenSpan> visual = {{1, 4}, {6, 1}, {7, n - 13}};
    const std::size_t extents[3] = {heads, queries, keys};
    std::size_t order[3] = {0, 1, 2};  // innermost last
    for (std::size_t i = 2; i > 0; --i) std::swap(order[i], order[rng.below(i + 1)]);
    std::ptrdiff_t strides[3], reach = static_cast<std::ptrdiff_t>(rng.between(1, 3));
    for (std::size_t i = 3; i-- > 0;) {
      strides[order[i]] = reach;
      reach = reach * static_cast<std::ptrdiff_t>(extents[order[i]]) + static_cast<std::ptrdiff_t>(rng.below(3));
    }
    std::vector<TypeParam> data(static_cast<std::size_t>(reach), oracle::make<TypeParam>(400));
    std::vector<double> p(heads * queries * keys);
    for (std::size_t h = 0; h < heads; ++h)
      for (std::size_t r = 0; r < queries; ++r)
        for (std::size_t j = 0; j < keys; ++j) {
          const auto at = static_cast<std::ptrdiff_t>(h) * strides[0] + static_cast<std::ptrdiff_t>(r) * strides[1] +
                          static_cast<std::ptrdiff_t>(j) * strides[2];
          const auto element = oracle::make<TypeParam>(rng.real(0.002, 1));
          data[static_cast<std::size_t>(at)] = element;
          p[(h * queries + r) * keys + j] = oracle::value_of(element);
        }
    // Keys past + position - first_key: the prompt's tokens before the first key at hand receive nothing.
    std::vector<float> norms;
    if (rng.chance(0.4))
      for (std::size_t i = 0; i < visual_tokens(visual) * (heads % 2 == 0 ? 2 : 1); ++i)
        norms.push_back(static_cast<float>(rng.real(0.5, 2)));
    Probabilities<TypeParam> view{data.data(), heads, queries, keys, strides[0], strides[1], strides[2]};
    view.past = past;
    view.first_key = first_key;
    view.value_norms = norms;
    ASSERT_TRUE(view.check()) << view.check().message().c_str();
    ASSERT_EQ(view.prompt_tokens(), n);
    const auto expected = [&](const std::vector<Index>& positions) {
      return mean_of(p, heads, queries, keys, n, positions, visual, norms);
    };
    const auto last = static_cast<Index>(n - 1);
    expect_near(scores_of<float>({}, view, visual), expected({last}), 1e-6);
    expect_near(scores_of<double>({}, view, visual), expected({last}), 1e-13);
    const std::vector<Index> listed = {last, static_cast<Index>(n - queries)};
    expect_near(scores_of<double>(listing(listed), view, visual), expected(listed), 1e-13);
    if (queries == n) {
      expect_near(scores_of<float>(of_all_rows(), view, visual), expected(all_rows(n)), 1e-6);
      expect_near(scores_of<double>(of_all_rows(), view, visual), expected(all_rows(n)), 1e-12);
    }
    if (testing::Test::HasFatalFailure()) FAIL() << "draw " << draw;
  }
}

TEST(ProbabilityScores, EqualTheScoresOfTheirQueriesAndKeys) {
  Rng rng(23);
  Layer a = random_layer(rng, 8, 2, 45, 45, 64);
  const Tensors<half> tensors(rng, a, Place::roomy_heads);
  std::vector<float> p;
  for (std::size_t h = 0; h < 8; ++h)
    for (std::size_t r = 0; r < 45; ++r)
      for (const double x : oracle::log_row(a, h, r)) p.push_back(static_cast<float>(std::exp(x)));
  const auto view = probabilities(p.data(), 8, 45, 45);
  const std::vector<TokenSpan> visual = {{4, 20}, {30, 10}};
  const std::vector<Index> listed = {44, 9, 31};
  for (const Config& config : {Config{}, of_all_rows(), listing(listed)}) {
    const auto from_map = scores_of(config, view, visual);
    expect_near(scores_of(config, tensors.view, visual), {from_map.begin(), from_map.end()}, 1e-5);
  }
}

TEST(ProbabilityScores, RowsThatCannotSeeATokenCountAsZero) {
  // Two tokens and a causal map: token 1 is seen by its own row alone, and the mean is still over both.
  const float map[] = {1, 0, 0.25f, 0.75f};
  EXPECT_EQ(scores_of(of_all_rows(), probabilities(map, 1, 2, 2), {{0, 2}}), (std::vector<float>{0.625f, 0.375f}));
}

TEST(ProbabilityScores, ANaNStaysWithItsToken) {
  std::vector<float> row(12, 0.1f);
  row[4] = oracle::nan_float();
  const auto scores = scores_of({}, probabilities(row.data(), 2, 1, 6), {{2, 3}});
  EXPECT_EQ(scores[0], 0.1f);
  EXPECT_EQ(scores[1], 0.1f);
  EXPECT_TRUE(oracle::is_nan(scores[2]));
}

TEST(ProbabilityScores, NormsOfTokensThatReceiveNothingAreNotRead) {
  const std::vector<float> row = {0.5f, 0.25f, 0, 0, 0.25f, 0};
  const std::vector<float> norms = {2, oracle::nan_float(), oracle::infinity()};
  auto view = probabilities(row.data(), 1, 1, 6);
  view.value_norms = norms;
  EXPECT_EQ(scores_of({}, view, {{1, 3}}), (std::vector<float>{0.5f, 0, 0}));
}

TEST(ReadyScores, AreCopiedAsTheyAre) {
  const double own[] = {0.25, -3, 1e9};
  EXPECT_EQ(scores_of({}, Scores<double>{own, 9}, {{1, 2}, {5, 1}}), (std::vector<float>{0.25f, -3, 1e9f}));
  const half halves[] = {{0x3c00}, {0xc000}, {0x0001}};
  EXPECT_EQ(scores_of({}, Scores<half>{halves, 9}, {{1, 3}}), (std::vector<float>{1, -2, 0x1p-24f}));
  EXPECT_TRUE(refused(status_of({}, Scores<half>{halves, 9}, {{1, 4}}), Errc::bad_shape, "3 scores"));
}

// ---- evidence of the user's own -----------------------------------------------------------------

// Two numbers a token that the engine keeps anyway: no query rows. A dozen lines.
struct Saliency {
  Span<const float> energy, contrast;  // [tokens]

  std::size_t prompt_tokens() const { return energy.size(); }
  template <class Score>
  Status score(Span<const TokenSpan> visual, Span<Score> scores) const {
    if (contrast.size() != energy.size())
      return fail(Errc::bad_shape, "{} energies but {} contrasts", energy.size(), contrast.size());
    for_each_visual(visual, [&](std::size_t i, std::size_t position) {
      scores[i] = static_cast<Score>(energy[position] * contrast[position]);
    });
    return {};
  }
};

// Linear attention, phi(q) . phi(k) without a softmax: rows to average over, scratch memory and threads.
struct LinearAttention {
  Span<const float> query, key;  // [tokens]

  std::size_t prompt_tokens() const { return key.size(); }
  Status check() const {
    return query.size() == key.size() ? Status{} : fail(Errc::bad_shape, "{} queries", query.size());
  }
  std::size_t scratch_floats() const { return key.size(); }
  template <class Score, class ParallelFor>
  Status score(const Scoring& scoring, Span<Score> scores, const ParallelFor& parallel_for) const {
    if (Status status = scoring.queries.expect_covered(query.size(), scoring.visual); !status) return status;
    parallel_for(key.size(), [&](std::size_t token) { scoring.scratch[token] = key[token] * key[token]; });
    for_each_visual(scoring.visual, [&](std::size_t i, std::size_t position) {
      scores[i] = 0;
      for (std::size_t r = 0; r < scoring.queries.size(); ++r)
        scores[i] += static_cast<Score>(query[scoring.queries[r]] * scoring.scratch[position]);
    });
    return {};
  }
};

TEST(OwnEvidence, OfEitherSignatureIsScored) {
  const std::vector<float> x = {1, 2, 3, 4, 5, 6}, y = {2, 3, 5, 7, 11, 13}, short_one = {1};
  const std::vector<TokenSpan> visual = {{1, 2}, {4, 1}};
  EXPECT_EQ(scores_of({}, Saliency{x, y}, visual), (std::vector<float>{6, 15, 55}));
  EXPECT_EQ(scores_of<double>({}, Saliency{x, y}, visual), (std::vector<double>{6, 15, 55}));
  EXPECT_TRUE(refused(status_of({}, Saliency{x, short_one}, visual), Errc::bad_shape, "6 energies but 1 contrasts"));
  EXPECT_EQ(scores_of({}, LinearAttention{y, x}, visual), (std::vector<float>{13 * 4, 13 * 9, 13 * 25}));
  EXPECT_EQ(scores_of(listing({0, 3}), LinearAttention{y, x}, visual), (std::vector<float>{9 * 4, 9 * 9, 9 * 25}));
  EXPECT_EQ(scores_of(of_all_rows(), LinearAttention{y, x}, visual), (std::vector<float>{41 * 4, 41 * 9, 41 * 25}));
  EXPECT_TRUE(refused(status_of({}, LinearAttention{short_one, x}, visual), Errc::bad_shape, "1 queries"));
}

TEST(OwnEvidence, AsksWhetherItsRowsCoverThePrompts) {
  const Index last_two[] = {8, 9}, beyond[] = {10};
  const std::vector<TokenSpan> visual = {{1, 4}};
  const auto covered = [&](QueryRows rows, std::size_t queries) { return rows.expect_covered(queries, visual); };
  const QueryRows last{ScoreRows::last, {}, 10}, all{ScoreRows::all, {}, 10}, listed{ScoreRows::listed, last_two, 10};
  EXPECT_TRUE(covered(last, 1));
  EXPECT_TRUE(covered(listed, 2));
  EXPECT_TRUE(refused(covered(listed, 1), Errc::missing_evidence, "position 8"));
  EXPECT_TRUE(refused(covered(all, 9), Errc::missing_evidence, "position 1"));
  for (const std::size_t queries : {10u, 11u, 1000u}) {  // more, such as those of earlier turns
    EXPECT_TRUE(covered(last, queries));
    EXPECT_TRUE(covered(all, queries));
    EXPECT_TRUE(covered(listed, queries));
  }
  EXPECT_TRUE(refused(covered({ScoreRows::listed, beyond, 10}, 1000), Errc::bad_setting, "10 tokens"));
  EXPECT_TRUE(last.expect_default());
  EXPECT_TRUE(refused(all.expect_default(), Errc::missing_evidence, "no query rows"));
}

TEST(OwnEvidence, WithoutRowsRefusesSettingsThatChooseSome) {
  const std::vector<float> x = {1, 2, 3, 4, 5, 6};
  const std::vector<TokenSpan> visual = {{1, 2}, {4, 1}};
  const auto each = [&](const auto& evidence) {
    EXPECT_TRUE(status_of({}, evidence, visual));
    EXPECT_TRUE(refused(status_of(of_all_rows(), evidence, visual), Errc::missing_evidence, "no query rows"));
    EXPECT_TRUE(refused(status_of(listing({5}), evidence, visual), Errc::missing_evidence, "no query rows"));
  };
  each(Saliency{x, x});
  each(Scores<float>{{x.data(), 3}, 6});
  each(KeysOnly{heads(x.data(), TokenMajor{6, 1, 1})});
  EXPECT_TRUE(refused(status_of({}, NoEvidence{6}, visual), Errc::missing_evidence, "needs scores"));
  EXPECT_TRUE(refused(status_of(of_all_rows(), NoEvidence{6}, visual), Errc::missing_evidence, "no query rows"));
}

// A chunk of a long prompt may end in the middle of an image. The last row cannot rank it there; all else can.
TEST(ChunkedPrefill, AChunkMayEndInsideAnImage) {
  Rng rng(35);
  Layer a = random_layer(rng, 4, 2, 40, 40, 8);
  const Tensors<float> tensors(rng, a);
  const std::vector<TokenSpan> visual = {{3, 10}, {20, 20}}, text_behind = {{3, 10}, {20, 19}};
  const auto map = probabilities(tensors.view.key.data, 1, 8, 40);
  const std::vector<float> own(30, 1.0f);
  EXPECT_TRUE(refused(status_of({}, tensors.view, visual), Errc::bad_prompt, "position 39"));
  EXPECT_TRUE(refused(status_of({}, tensors.view, visual), Errc::bad_prompt, "visual span 1"));
  EXPECT_TRUE(refused(status_of({}, map, visual), Errc::bad_prompt, "ScoreRows or KeysOnly"));
  EXPECT_TRUE(status_of({}, tensors.view, text_behind));
  const std::vector<Index> listed = {39, 17};
  expect_near(scores_of(listing(listed), tensors.view, visual), oracle::scores_by(a, listed, visual));
  expect_near(scores_of(of_all_rows(), tensors.view, visual), oracle::scores_by(a, all_rows(40), visual));
  EXPECT_TRUE(status_of(listing({39, 33}), map, visual));
  EXPECT_EQ(scores_of({}, KeysOnly{tensors.view.key}, visual).size(), 30u);
  EXPECT_EQ(scores_of({}, Scores<float>{own, 40}, visual), own);
  // An image of which an earlier stage left nothing holds no token.
  EXPECT_TRUE(status_of({}, tensors.view, {{3, 10}, {20, 19}, {40, 0, 0, false, 9}}));
  EXPECT_TRUE(
      refused(status_of({}, tensors.view, {{3, 10}, {20, 20}, {40, 0, 0, false, 9}}), Errc::bad_prompt, "span 1"));
}

// ---- the parts ----------------------------------------------------------------------------------

TEST(Exponential, IsWithinTwoUlpOfTheStandardLibrary) {
  double worst = 0;
  for (float x = 0; x > -87.0f; x -= 0.00137f) {
    const double exact = std::exp(static_cast<double>(x));
    worst = std::max(worst, std::fabs(static_cast<double>(detail::exp_of_negative(x)) - exact) / exact);
  }
  EXPECT_LT(worst, 2 * 0x1p-23);
  EXPECT_EQ(detail::exp_of_negative(0), 1.0f);
  EXPECT_EQ(detail::exp_of_negative(-1000), 0.0f);
  EXPECT_EQ(detail::exp_of_negative(-oracle::infinity()), 0.0f);
}

TEST(Tanh, IsWithinTwoTenMillionthsOfTheStandardLibrary) {
  for (float x = -30; x < 30; x += 0.0113f)
    ASSERT_NEAR(static_cast<double>(detail::tanh_of(x)), std::tanh(static_cast<double>(x)), 2e-7) << x;
  EXPECT_EQ(detail::tanh_of(oracle::infinity()), 1.0f);
  EXPECT_EQ(detail::tanh_of(-oracle::infinity()), -1.0f);
}

TEST(SquareRoot, IsWithinAnUlpOfTheStandardLibrary) {
  for (float x = 1e-37f; x < 1e37f; x *= 1.0037f)
    ASSERT_NEAR(static_cast<double>(detail::sqrt_of(x)) / std::sqrt(static_cast<double>(x)), 1, 0x1p-23) << x;
  EXPECT_EQ(detail::sqrt_of(0), 0.0f);
}

TEST(Logarithm, IsWithinTwoTenMillionthsOfTheStandardLibrary) {
  for (float x = 1e-37f; x < 1e37f; x *= 1.0037f) {
    const double exact = std::log(static_cast<double>(x));
    ASSERT_NEAR(static_cast<double>(detail::log_of(x)), exact, 2e-7 * std::max(1.0, std::fabs(exact))) << x;
  }
}

// The greatest logit, and NaN or +infinity wherever they stand.
TEST(Greatest, SeesEveryLogitOfAnyCount) {
  Rng rng(36);
  for (std::size_t count = 1; count < 140; ++count) {
    std::vector<float> logits(count);
    for (float& x : logits) x = static_cast<float>(rng.real(-9, 2));
    const std::size_t at = rng.below(count);
    logits[at] = 5;
    ASSERT_EQ(detail::greatest(logits.data(), count), 5.0f);
    for (const float bad : {oracle::nan_float(), -oracle::nan_float(), oracle::infinity()}) {
      logits[at] = bad;
      ASSERT_TRUE(oracle::is_nan(detail::greatest(logits.data(), count))) << bad << " at " << at << " of " << count;
    }
    std::fill(logits.begin(), logits.end(), -oracle::infinity());
    ASSERT_EQ(detail::greatest(logits.data(), count), -oracle::infinity());
  }
}

}  // namespace
}  // namespace score_test

// Scores against dense attention in double.
#include "fastv/score.hpp"

#include <gtest/gtest.h>

#include "oracle.hpp"

namespace {

using namespace fastv;

// ---- a random attention problem, dense and as the strided tensors of an engine ------------------

oracle::Attention random_attention(oracle::Rng& rng, std::size_t heads, std::size_t kv_heads, std::size_t rows,
                                   std::size_t keys, std::size_t dim) {
  oracle::Attention a{heads, kv_heads, rows, keys, dim, {}, {}, 0, 0, {}, true};
  for (std::size_t i = 0; i < heads * rows * dim; ++i) a.query.push_back(rng.real(-2, 2));
  for (std::size_t i = 0; i < kv_heads * keys * dim; ++i) a.key.push_back(rng.real(-2, 2));
  // As exactly a float as the view will hold.
  a.scale = static_cast<double>(static_cast<float>(1 / std::sqrt(static_cast<double>(dim))));
  return a;
}

// The same tensors in element type T, in the order [rows, heads, dim] and one of the cache layouts. `a` is
// changed to the values as stored, and everything that is no element is NaN, so that reading it shows.
template <class Q, class K>
struct Tensors {
  std::vector<Q> query;
  std::vector<K> key;
  std::vector<float> bias;
  QueryKey<Q, K> view;

  Tensors(oracle::Attention& a, KvLayout layout, std::size_t capacity = 0)
      : query(a.heads * a.rows * a.dim, nan<Q>()),
        key(a.kv_heads * std::max(a.keys, capacity) * a.dim, nan<K>()),
        bias(a.bias.begin(), a.bias.end()),
        view(query_key(query.data(), a.heads, a.rows, key.data(), a.kv_heads, a.keys, a.dim,
                       static_cast<float>(a.scale), layout, capacity)) {
    view.soft_cap = static_cast<float>(a.soft_cap);
    view.bias = bias;
    view.causal = a.causal;
    const std::size_t room = std::max(a.keys, capacity);
    for (std::size_t h = 0; h < a.heads; ++h)
      for (std::size_t r = 0; r < a.rows; ++r)
        for (std::size_t d = 0; d < a.dim; ++d)
          store(a.query[(h * a.rows + r) * a.dim + d], query[(r * a.heads + h) * a.dim + d]);
    for (std::size_t h = 0; h < a.kv_heads; ++h)
      for (std::size_t j = 0; j < a.keys; ++j)
        for (std::size_t d = 0; d < a.dim; ++d)
          store(a.key[(h * a.keys + j) * a.dim + d],
                key[(layout == KvLayout::token_major ? j * a.kv_heads + h : h * room + j) * a.dim + d]);
  }

 private:
  template <class T>
  static T nan() {
    T element;
    std::memset(&element, 0xff, sizeof(element));  // all ones is a NaN in every one of the types
    return element;
  }
  template <class T>
  static void store(double& value, T& element) {
    element = oracle::make<T>(value);
    value = oracle::value_of(element);
  }
};

std::vector<Index> all_rows(std::size_t tokens) {
  std::vector<Index> rows(tokens);
  std::iota(rows.begin(), rows.end(), Index{0});
  return rows;
}

template <class Score, class Evidence>
std::vector<Score> scores_of(const Config& config, const Evidence& evidence, const std::vector<TokenSpan>& visual) {
  const std::size_t count = visual_tokens(visual);
  std::vector<Score> scores(count, Score(-7));
  std::vector<float> scratch(score_scratch(evidence), oracle::nan_float());
  const Status status =
      score(config, evidence, Span<const TokenSpan>(visual), Span<Score>(scores), Span<float>(scratch));
  EXPECT_TRUE(status) << status.message().c_str();
  return scores;
}

template <class Score>
void expect_near(const std::vector<Score>& got, const std::vector<double>& expected, double tolerance) {
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i)
    ASSERT_NEAR(static_cast<double>(got[i]), expected[i], tolerance) << "visual token " << i;
}

// Compares with the oracle for the last row, all rows and some listed ones.
template <class Score, class Q, class K>
void expect_scores_of_attention(const Tensors<Q, K>& tensors, const oracle::Attention& a,
                                const std::vector<TokenSpan>& visual, double tolerance = 1e-6) {
  const auto p = oracle::probabilities(a);
  const auto expected = [&](const std::vector<Index>& rows) {
    return oracle::mean_scores(p, a.heads, a.rows, a.keys, rows, visual);
  };
  const auto last = static_cast<Index>(a.keys - 1), first = static_cast<Index>(a.keys - a.rows);
  Config config;
  expect_near(scores_of<Score>(config, tensors.view, visual), expected({last}), tolerance);
  const std::vector<Index> listed = {static_cast<Index>((first + last) / 2), first, last};
  config.score_rows = ScoreRows::listed;
  config.listed_rows = listed;
  expect_near(scores_of<Score>(config, tensors.view, visual), expected(listed), tolerance);
  if (a.rows != a.keys) return;
  config.score_rows = ScoreRows::all;
  expect_near(scores_of<Score>(config, tensors.view, visual), expected(all_rows(a.keys)), tolerance);
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
                   TypePair<half, float>, TypePair<float, bfloat16>, TypePair<double, double>>;
TYPED_TEST_SUITE(QueryKeyTypes, TypePairs, );  // the comma is for clang -Wpedantic

TYPED_TEST(QueryKeyTypes, EqualDenseAttentionInEveryLayoutAndGrouping) {
  using Q = typename TypeParam::Query;
  using K = typename TypeParam::Key;
  oracle::Rng rng(10);
  const std::vector<TokenSpan> visual = {{2, 9}, {11, 3}, {17, 8}};
  for (const auto& [heads, kv_heads] :
       {std::pair<std::size_t, std::size_t>{1, 1}, {3, 3}, {4, 4}, {8, 2}, {6, 2}, {6, 3}, {5, 1}})
    for (const std::size_t dim : {1u, 5u, 7u, 32u, 33u, 51u, 80u, 100u, 128u})
      for (const KvLayout layout : {KvLayout::token_major, KvLayout::head_major})
        for (const std::size_t rows : {1u, 5u, 29u}) {
          SCOPED_TRACE(testing::Message() << heads << "/" << kv_heads << " heads of " << dim << ", " << rows
                                          << " rows, layout " << static_cast<int>(layout));
          auto a = random_attention(rng, heads, kv_heads, rows, 29, dim);
          const Tensors<Q, K> tensors(a, layout, layout == KvLayout::head_major ? 37 : 0);
          expect_scores_of_attention<float>(tensors, a, visual);
          if (testing::Test::HasFatalFailure()) return;
        }
}

TEST(QueryKeyScores, SumInDoubleToo) {
  oracle::Rng rng(11);
  auto a = random_attention(rng, 8, 2, 29, 29, 40);
  const Tensors<float, half> tensors(a, KvLayout::token_major);
  expect_scores_of_attention<double>(tensors, a, {{2, 9}, {17, 8}});
}

TEST(QueryKeyScores, EqualDenseAttentionWithScaleSoftCapBiasAndWithoutCausality) {
  oracle::Rng rng(12);
  for (int draw = 0; draw < 60; ++draw) {
    const std::size_t keys = rng.between(4, 150);
    auto a = random_attention(rng, 4, 2, rng.chance(0.5) ? keys : rng.between(1, keys), keys, rng.between(1, 70));
    a.scale = static_cast<double>(static_cast<float>(rng.real(0.01, 0.5)));
    a.soft_cap = rng.chance(0.5) ? std::round(rng.real(1, 50)) : 0;
    a.causal = rng.chance(0.5);
    if (rng.chance(0.6))
      for (std::size_t j = 0; j < keys; ++j) a.bias.push_back(static_cast<double>(static_cast<float>(rng.real(-3, 3))));
    const Tensors<float, float> tensors(a, KvLayout::head_major, keys + 3);
    const std::size_t first = rng.below(keys - 2), count = rng.between(1, keys - 1 - first);
    expect_scores_of_attention<float>(tensors, a, {{first, count}}, 2e-6);
    if (HasFatalFailure()) FAIL() << "draw " << draw;
  }
}

TEST(QueryKeyScores, AMinusInfiniteBiasHidesItsKeyAndOnlyThat) {
  oracle::Rng rng(13);
  auto a = random_attention(rng, 4, 2, 1, 40, 16);
  a.bias.assign(40, 0.0);
  for (const std::size_t hidden : {0u, 7u, 8u, 39u}) a.bias[hidden] = -HUGE_VAL;
  const Tensors<float, float> tensors(a, KvLayout::token_major);
  const std::vector<TokenSpan> visual = {{5, 30}};
  expect_scores_of_attention<float>(tensors, a, visual);
  const auto scores = scores_of<float>({}, tensors.view, visual);
  EXPECT_EQ(scores[2], 0.0f);
  EXPECT_EQ(scores[3], 0.0f);
  EXPECT_GT(scores[1], 0.0f);
}

TEST(QueryKeyScores, AreNaNWhereEveryKeyIsHidden) {
  oracle::Rng rng(14);
  auto a = random_attention(rng, 2, 2, 1, 10, 16);
  a.bias.assign(10, -HUGE_VAL);
  const Tensors<float, float> tensors(a, KvLayout::token_major);
  for (const float score : scores_of<float>({}, tensors.view, {{2, 5}})) EXPECT_TRUE(oracle::is_nan(score));
}

TEST(QueryKeyScores, LogitsThatWouldOverflowAnExponentialAreFine) {
  oracle::Rng rng(15);
  auto a = random_attention(rng, 2, 1, 1, 50, 64);
  a.scale = 16;  // logits of several hundreds: exp() of them is infinite in float
  const Tensors<float, float> tensors(a, KvLayout::token_major);
  expect_scores_of_attention<float>(tensors, a, {{0, 49}}, 2e-4);
}

TEST(QueryKeyScores, OneVisualTokenNextToOneTextToken) {
  oracle::Rng rng(16);
  auto a = random_attention(rng, 2, 1, 2, 2, 3);
  const Tensors<float, float> tensors(a, KvLayout::token_major);
  expect_scores_of_attention<float>(tensors, a, {{0, 1}});
}

TEST(QueryKeyScores, ManySpansAreNumberedInOrder) {
  oracle::Rng rng(17);
  auto a = random_attention(rng, 4, 2, 1, 300, 24);
  const Tensors<float, float> tensors(a, KvLayout::token_major);
  std::vector<TokenSpan> visual;
  for (std::size_t first = 1; first < 290; first += 7) visual.push_back({first, 1 + first % 6});
  expect_scores_of_attention<float>(tensors, a, visual);
}

// Keys of earlier turns are attended to, but the spans count from the prompt at hand.
TEST(EveryEvidence, CountsSpansFromBehindTheKeysOfEarlierTurns) {
  oracle::Rng rng(19);
  const std::size_t past = 40, keys = 100;
  auto a = random_attention(rng, 4, 2, 1, keys, 24);
  Tensors<float, float> tensors(a, KvLayout::token_major);
  const std::vector<TokenSpan> whole = {{45, 20}, {70, 25}}, prompt = {{5, 20}, {30, 25}};
  auto map = probabilities(tensors.key.data(), 4, 1, keys);
  KeysOnly<float> alone{keys_of(tensors.view)};
  const auto expect_shifted = [&](auto evidence) {
    const auto expected = scores_of<float>({}, evidence, whole);
    evidence.past = past;
    EXPECT_EQ(scores_of<float>({}, evidence, prompt), expected);
  };
  expect_shifted(tensors.view);
  expect_shifted(map);
  expect_shifted(alone);
}

TEST(QueryKeyScores, ExtremeElementsOfOneTokenMakeEveryScoreNaN) {
  oracle::Rng rng(18);
  for (const float bad : {oracle::nan_float(), -oracle::nan_float(), oracle::infinity()})
    for (const bool in_key : {false, true})
      for (const std::size_t dim : {3u, 32u, 45u}) {
        auto a = random_attention(rng, 2, 1, 1, 12, dim);
        Tensors<float, float> tensors(a, KvLayout::token_major);
        std::fill(tensors.query.begin(), tensors.query.end(), 0.5f);
        (in_key ? tensors.key[4 * dim + dim - 1] : tensors.query[dim - 1]) = bad;
        if (!in_key)  // an infinite query element gives +infinity somewhere
          std::fill(tensors.key.begin(), tensors.key.end(), 0.25f);
        for (const float score : scores_of<float>({}, tensors.view, {{1, 8}}))
          ASSERT_TRUE(oracle::is_nan(score)) << bad << (in_key ? " in a key" : " in a query") << ", dim " << dim;
      }
}

// Keys whose elements are any bits of their 16-bit type, not the tame ones above.
template <class K>
void expect_dense_attention_for_any_bits(std::uint64_t seed, std::uint16_t exponents) {
  oracle::Rng rng(seed);
  for (const std::size_t dim : {1u, 16u, 37u, 64u, 100u}) {
    auto a = random_attention(rng, 4, 2, 1, 23, dim);
    Tensors<float, K> tensors(a, KvLayout::token_major);
    for (std::size_t j = 0; j < 23; ++j)
      for (std::size_t h = 0; h < 2; ++h)
        for (std::size_t d = 0; d < dim; ++d) {
          K& element = tensors.key[(j * 2 + h) * dim + d];
          element.bits = static_cast<std::uint16_t>(rng.next()) & static_cast<std::uint16_t>(0x83ff | exponents);
          a.key[(h * 23 + j) * dim + d] = oracle::value_of(element);
        }
    expect_scores_of_attention<float>(tensors, a, {{3, 15}});
  }
}

TEST(QueryKeyScores, HalfKeysOfAnyBitsEqualDenseAttention) {
  expect_dense_attention_for_any_bits<half>(24, 0x3c00);  // up to 2, denormals included
  expect_dense_attention_for_any_bits<half>(25, 0x0000);  // denormals alone
}

TEST(QueryKeyScores, TheLargestHalfIsNotTakenForInfinity) {
  for (const std::size_t dim : {1u, 31u, 64u}) {
    oracle::Rng rng(26);
    auto a = random_attention(rng, 2, 1, 1, 9, dim);
    Tensors<half, half> tensors(a, KvLayout::token_major);
    a.key[4 * dim] = 65504;
    tensors.key[4 * dim].bits = 0x7bff;
    a.query[0] = a.query[dim] = 0x1p-14;
    tensors.query[0].bits = tensors.query[dim].bits = 0x0400;
    expect_scores_of_attention<float>(tensors, a, {{1, 7}});
  }
}

TEST(QueryKeyScores, AnInfiniteHalfHidesOrSpoilsAsItDoesInDouble) {
  for (const std::uint16_t bits : std::vector<std::uint16_t>{0xfc00, 0x7c00, 0x7e00, 0xfe00})
    for (const std::size_t place : {0u, 30u, 31u, 32u, 36u}) {
      oracle::Rng rng(27);
      auto a = random_attention(rng, 2, 1, 1, 9, 37);
      std::fill(a.query.begin(), a.query.end(), 0.5);
      Tensors<half, half> tensors(a, KvLayout::token_major);
      tensors.key[4 * 37 + place].bits = bits;
      a.key[4 * 37 + place] = oracle::value_of(half{bits});
      SCOPED_TRACE(testing::Message() << "bits " << bits << " at " << place);
      if (bits == 0xfc00) {  // -infinity times a positive query hides the key, and only that
        expect_scores_of_attention<float>(tensors, a, {{1, 7}});
      } else {
        for (const float score : scores_of<float>({}, tensors.view, {{1, 7}})) ASSERT_TRUE(oracle::is_nan(score));
      }
    }
}

TEST(QueryKeyScores, KeysBehindTheRowAreNotEvenRead) {
  oracle::Rng rng(19);
  auto a = random_attention(rng, 2, 2, 6, 6, 8);
  Tensors<float, float> tensors(a, KvLayout::token_major);
  std::fill(tensors.key.end() - 16, tensors.key.end(), oracle::nan_float());  // the last token's key
  const Index rows[] = {2, 4};
  Config config;
  config.score_rows = ScoreRows::listed;
  config.listed_rows = rows;
  const std::vector<TokenSpan> visual = {{0, 5}};
  const auto expected = oracle::mean_scores(oracle::probabilities(a), 2, 6, 6, {2, 4}, visual);
  expect_near(scores_of<float>(config, tensors.view, visual), expected, 1e-6);
}

TEST(QueryKeyScores, PermutingTheHeadsChangesNothing) {
  oracle::Rng rng(20);
  auto a = random_attention(rng, 6, 6, 1, 60, 32), b = a;
  const std::size_t order[] = {3, 0, 5, 1, 4, 2};
  for (std::size_t h = 0; h < 6; ++h) {
    std::copy_n(a.query.begin() + static_cast<std::ptrdiff_t>(h * 32), 32,
                b.query.begin() + static_cast<std::ptrdiff_t>(order[h] * 32));
    std::copy_n(a.key.begin() + static_cast<std::ptrdiff_t>(h * 60 * 32), 60 * 32,
                b.key.begin() + static_cast<std::ptrdiff_t>(order[h] * 60 * 32));
  }
  const Tensors<float, float> first(a, KvLayout::token_major), second(b, KvLayout::token_major);
  const auto scores = scores_of<float>({}, first.view, {{3, 50}});
  expect_near(scores_of<float>({}, second.view, {{3, 50}}), std::vector<double>(scores.begin(), scores.end()), 1e-7);
}

TEST(QueryKeyScores, SpreadToOneOverTheWholeRow) {
  oracle::Rng rng(21);
  auto a = random_attention(rng, 4, 2, 1, 90, 32);
  const Tensors<float, float> tensors(a, KvLayout::head_major);
  const auto scores = scores_of<double>({}, tensors.view, {{0, 90}});
  EXPECT_NEAR(std::accumulate(scores.begin(), scores.end(), 0.0), 1, 1e-6);
}

// ---- probabilities ------------------------------------------------------------------------------

template <class T>
class ProbabilityTypes : public testing::Test {};
using Elements = testing::Types<float, double, half, bfloat16>;
TYPED_TEST_SUITE(ProbabilityTypes, Elements, );  // the comma is for clang -Wpedantic

TYPED_TEST(ProbabilityTypes, EqualTheMeanInEveryAxisOrderWithGapsAnywhere) {
  oracle::Rng rng(22);
  const std::vector<TokenSpan> visual = {{1, 4}, {6, 1}, {7, 77}};
  for (int draw = 0; draw < 60; ++draw) {
    const std::size_t heads = rng.between(1, 5), keys = 90, rows = rng.chance(0.5) ? keys : rng.between(1, 4);
    const std::size_t extents[3] = {heads, rows, keys};
    std::size_t order[3] = {0, 1, 2};  // innermost last
    for (std::size_t i = 2; i > 0; --i) std::swap(order[i], order[rng.below(i + 1)]);
    std::ptrdiff_t strides[3], reach = static_cast<std::ptrdiff_t>(rng.between(1, 3));
    for (std::size_t i = 3; i-- > 0;) {
      strides[order[i]] = reach;
      reach = reach * static_cast<std::ptrdiff_t>(extents[order[i]]) + static_cast<std::ptrdiff_t>(rng.below(3));
    }
    std::vector<TypeParam> data(static_cast<std::size_t>(reach), oracle::make<TypeParam>(999));
    std::vector<double> p(heads * rows * keys);
    for (std::size_t h = 0; h < heads; ++h)
      for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t j = 0; j < keys; ++j) {
          const auto at = static_cast<std::ptrdiff_t>(h) * strides[0] + static_cast<std::ptrdiff_t>(r) * strides[1] +
                          static_cast<std::ptrdiff_t>(j) * strides[2];
          const auto element = oracle::make<TypeParam>(rng.real(0.001, 1));
          data[static_cast<std::size_t>(at)] = element;
          p[(h * rows + r) * keys + j] = oracle::value_of(element);
        }
    const Probabilities<TypeParam> view{data.data(), heads, rows, keys, strides[0], strides[1], strides[2]};
    ASSERT_TRUE(check(view)) << check(view).message().c_str();
    const auto expected = [&](const std::vector<Index>& positions) {
      return oracle::mean_scores(p, heads, rows, keys, positions, visual);
    };
    Config config;
    expect_near(scores_of<float>(config, view, visual), expected({89}), 1e-6);
    expect_near(scores_of<double>(config, view, visual), expected({89}), 1e-15);
    const std::vector<Index> listed = {89, static_cast<Index>(keys - rows)};
    config.score_rows = ScoreRows::listed;
    config.listed_rows = listed;
    expect_near(scores_of<double>(config, view, visual), expected(listed), 1e-15);
    if (rows != keys) continue;
    config.score_rows = ScoreRows::all;
    expect_near(scores_of<float>(config, view, visual), expected(all_rows(keys)), 1e-6);
    if (testing::Test::HasFatalFailure()) FAIL() << "draw " << draw;
  }
}

TEST(ProbabilityScores, EqualTheScoresOfTheirQueriesAndKeys) {
  oracle::Rng rng(23);
  auto a = random_attention(rng, 8, 2, 45, 45, 64);
  const Tensors<half, half> tensors(a, KvLayout::head_major, 50);
  const auto dense = oracle::probabilities(a);
  const std::vector<float> p(dense.begin(), dense.end());
  const auto view = probabilities(p.data(), 8, 45, 45);
  const std::vector<TokenSpan> visual = {{4, 20}, {30, 10}};
  const Index listed[] = {44, 9, 31};
  for (const ScoreRows rows : {ScoreRows::last, ScoreRows::all, ScoreRows::listed}) {
    Config config;
    config.score_rows = rows;
    config.listed_rows = listed;
    const auto from_map = scores_of<float>(config, view, visual);
    expect_near(scores_of<float>(config, tensors.view, visual), {from_map.begin(), from_map.end()}, 1e-6);
  }
}

TEST(ProbabilityScores, RowsThatCannotSeeATokenCountAsZero) {
  // Two tokens and a causal map: token 1 is seen by its own row alone, and the mean is still over both.
  const float map[] = {1, 0, 0.25f, 0.75f};
  Config config;
  config.score_rows = ScoreRows::all;
  const auto scores = scores_of<float>(config, probabilities(map, 1, 2, 2), {{0, 2}});
  EXPECT_EQ(scores, (std::vector<float>{0.625f, 0.375f}));
}

TEST(ProbabilityScores, ANaNStaysWithItsToken) {
  std::vector<float> row(12, 0.1f);
  row[4] = oracle::nan_float();
  const auto scores = scores_of<float>({}, probabilities(row.data(), 2, 1, 6), {{2, 3}});
  EXPECT_EQ(scores[0], 0.1f);
  EXPECT_EQ(scores[1], 0.1f);
  EXPECT_TRUE(oracle::is_nan(scores[2]));
}

TEST(ReadyScores, AreCopiedAsTheyAre) {
  const double own[] = {0.25, -3, 1e9};
  EXPECT_EQ(scores_of<float>({}, Scores<double>{own, 9}, {{1, 2}, {5, 1}}), (std::vector<float>{0.25f, -3, 1e9f}));
  const half halves[] = {{0x3c00}, {0xc000}, {0x0001}};
  EXPECT_EQ(scores_of<float>({}, Scores<half>{halves, 9}, {{1, 3}}), (std::vector<float>{1, -2, 0x1p-24f}));
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

}  // namespace

// Changes of evidence and scores beside FastV's own rule, each against a plain loop in double.
#include "fastv/remedies.hpp"

#include <gtest/gtest.h>

#include "attention.hpp"
#include "fastv/fastv.hpp"
#include "refused.hpp"

namespace remedies_test {
namespace {

using namespace fastv;
using oracle::Place;
using oracle::Rng;
using oracle::Stored;

std::vector<float> random_floats(Rng& rng, std::size_t count) {
  std::vector<float> values(count);
  for (float& v : values) v = static_cast<float>(rng.real(-1, 1));
  return values;
}
std::vector<double> random_values(Rng& rng, std::size_t count) {
  std::vector<double> values(count);
  for (double& v : values) v = rng.real(-1, 1);
  return values;
}
// ---- RoPE-free ----------------------------------------------------------------------------------

// Rotates [heads, tokens, dim] forward, straight from the definition.
template <class T>
void rotate(std::vector<T>& x, std::size_t heads, std::size_t tokens, std::size_t dim, const Rope& rope) {
  const std::size_t pairs = rope.frequencies.size();
  for (std::size_t h = 0; h < heads; ++h)
    for (std::size_t t = 0; t < tokens; ++t)
      for (std::size_t p = 0; p < pairs; ++p) {
        const std::size_t axis = rope.axis.empty() ? 0 : rope.axis[p];
        const double angle =
            static_cast<double>(static_cast<float>(rope.positions[axis * tokens + t]) * rope.frequencies[p]);
        const std::size_t i = rope.layout == RopeLayout::half ? p : 2 * p,
                          j = rope.layout == RopeLayout::half ? p + pairs : 2 * p + 1;
        T &a = x[(h * tokens + t) * dim + i], &b = x[(h * tokens + t) * dim + j];
        const double low = static_cast<double>(a), high = static_cast<double>(b);
        a = static_cast<T>(low * std::cos(angle) - high * std::sin(angle));
        b = static_cast<T>(high * std::cos(angle) + low * std::sin(angle));
      }
}

std::vector<float> frequencies(std::size_t pairs) {
  std::vector<float> f(pairs);
  for (std::size_t i = 0; i < pairs; ++i)
    f[i] = static_cast<float>(std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(pairs)));
  return f;
}

// Pairs: all of a vector, or fewer (partial rotary, GLM and Phi), in an even or odd dimension.
TEST(Unrotate, UndoesOneAxisAndThreeInBothLayoutsWholeAndPartial) {
  Rng rng(1);
  const std::size_t heads = 3, tokens = 70;
  for (const auto& [dim, pairs] : {std::pair<std::size_t, std::size_t>{32, 16}, {32, 8}, {33, 16}, {33, 5}, {2, 1}}) {
    const std::vector<float> plain = random_floats(rng, heads * tokens * dim), f = frequencies(pairs);
    std::vector<Index> positions(3 * tokens);
    for (Index& p : positions) p = static_cast<Index>(rng.below(40000));
    std::vector<unsigned char> sections(pairs);
    for (std::size_t i = 0; i < pairs; ++i) sections[i] = static_cast<unsigned char>(3 * i / pairs);
    for (const auto layout : {RopeLayout::half, RopeLayout::interleaved})
      for (const bool m_rope : {false, true}) {
        Rope rope{f, positions, {}, layout};
        if (m_rope) rope.axis = sections;
        std::vector<float> rotated = plain, back(plain.size());
        rotate(rotated, heads, tokens, dim, rope);
        const Status status =
            unrotate(fastv::heads(rotated.data(), HeadMajor{heads, tokens, dim}), rope, Span<float>(back));
        ASSERT_TRUE(status) << status.message().c_str();
        for (std::size_t i = 0; i < plain.size(); ++i)
          ASSERT_NEAR(back[i], plain[i], 1e-6f) << "element " << i % dim << " of " << dim << ", " << pairs << " pairs";
        if (2 * pairs < dim) {
          EXPECT_EQ(back[2 * pairs], rotated[2 * pairs]) << "behind the pairs nothing turns";
        }
      }
  }
}

TEST(Unrotate, ReadsEveryPlaceAndType) {
  Rng rng(2);
  const std::size_t heads = 2, tokens = 2100, dim = 12;  // tokens in more than one piece
  const std::vector<float> f = frequencies(4);
  std::vector<Index> positions(tokens);
  std::iota(positions.begin(), positions.end(), Index{100});
  const Rope rope{f, positions};
  for (const Place place : oracle::places) {
    std::vector<double> rotated = random_values(rng, heads * tokens * dim);
    const Stored<half> cache(rng, place, heads, tokens, dim, rotated, 16, oracle::in_chunks(place) ? 4 : 0);
    std::vector<float> back(rotated.size(), oracle::nan_float());
    ASSERT_TRUE(unrotate(cache.view(), rope, Span<float>(back)));
    std::vector<double> again(back.begin(), back.end());
    rotate(again, heads, tokens, dim, rope);
    for (std::size_t i = 0; i < again.size(); ++i) ASSERT_NEAR(again[i], rotated[i], 1e-6);

    std::vector<float> loaded(rotated.size());
    const auto load = [&](std::size_t head, std::size_t token, float* out) {
      for (std::size_t d = 0; d < dim; ++d) out[d] = static_cast<float>(rotated[(head * tokens + token) * dim + d]);
    };
    ASSERT_TRUE(unrotate(loaded_keys(heads, tokens, dim, load), rope, Span<float>(loaded)));
    EXPECT_EQ(loaded, back);
  }
}

TEST(Unrotate, ScoresWithoutRopeDoNotSeeWhereATokenStands) {
  // All tokens have the same key before RoPE: rotated, their scores differ; un-rotated, they are equal.
  Rng rng(3);
  const std::size_t tokens = 40, dim = 16;
  const std::vector<float> key = random_floats(rng, dim), f = frequencies(dim / 2);
  std::vector<Index> positions(tokens);
  std::iota(positions.begin(), positions.end(), Index{0});
  const Rope rope{f, positions};
  std::vector<float> keys;
  for (std::size_t t = 0; t < tokens; ++t) keys.insert(keys.end(), key.begin(), key.end());
  rotate(keys, 1, tokens, dim, rope);
  std::vector<float> back(keys.size());
  const HeadMajor shape{1, tokens, dim};
  ASSERT_TRUE(unrotate(heads(keys.data(), shape), rope, Span<float>(back)));
  const TokenSpan visual[] = {{2, 30}};
  Pruner<> pruner;
  const auto spread = [&] {
    const auto s = pruner.scores();
    return *std::max_element(s.begin(), s.end()) - *std::min_element(s.begin(), s.end());
  };
  const auto query = heads(key.data(), TokenMajor{1, 1, dim});
  ASSERT_TRUE(pruner.prune(query_key(query, heads(keys.data(), shape), 1.0f), visual));
  EXPECT_GT(spread(), 1e-3f);
  ASSERT_TRUE(pruner.prune(query_key(query, heads(back.data(), shape), 1.0f), visual));
  EXPECT_LT(spread(), 1e-6f);
}

TEST(Unrotate, AnglesThatAreNoNumbersGiveNaN) {
  const std::vector<float> f = {oracle::infinity(), 0.5f}, x = {1, 2, 3, 4};
  const std::vector<Index> positions = {3};
  std::vector<float> out(4);
  ASSERT_TRUE(unrotate(heads(x.data(), HeadMajor{1, 1, 4}), Rope{f, positions}, Span<float>(out)));
  EXPECT_TRUE(oracle::is_nan(out[0]) && oracle::is_nan(out[2]));
  EXPECT_FALSE(oracle::is_nan(out[1]) || oracle::is_nan(out[3]));
}

TEST(Unrotate, BadTablesAreNamed) {
  std::vector<float> x(64), out(64), f(4);
  std::vector<Index> positions(8);
  const std::vector<unsigned char> axis = {0, 1, 2, 0};
  const auto with = [&](std::size_t dim, Rope rope, std::size_t room = 64) {
    return unrotate(heads(x.data(), HeadMajor{1, 8, dim}), rope, Span<float>(out.data(), room));
  };
  EXPECT_TRUE(with(8, {f, positions}));
  EXPECT_TRUE(refused(with(6, {f, positions}), Errc::bad_setting, "4 entries but the head dimension is 6"));
  EXPECT_TRUE(refused(with(7, {f, positions}), Errc::bad_setting, "at most 3"));
  EXPECT_TRUE(refused(with(8, {{}, positions}), Errc::bad_setting, "0 entries"));
  EXPECT_TRUE(refused(with(8, {f, {positions.data(), 7}}), Errc::bad_setting, "7 entries for 1 axes of 8"));
  EXPECT_TRUE(refused(with(8, {f, positions, axis}), Errc::bad_setting, "8 entries for 3 axes of 8"));
  EXPECT_TRUE(refused(with(8, {f, positions, {axis.data(), 3}}), Errc::bad_setting, "3 entries for 4 pairs"));
  EXPECT_TRUE(refused(with(8, {{nullptr, 4}, positions}), Errc::null_data, "frequencies"));
  EXPECT_TRUE(refused(with(8, {f, {nullptr, 8}}), Errc::null_data, "positions"));
  EXPECT_TRUE(refused(with(8, {f, positions, {nullptr, 4}}), Errc::null_data, "axis"));
  EXPECT_TRUE(refused(with(8, {f, positions}, 63), Errc::too_small, "63 entries"));
  EXPECT_TRUE(refused(with(0, {f, positions}), Errc::bad_shape, "dimension 0"));
  // Loaded vectors have no memory that would bound their number: heads * tokens * dim wraps around to 0 here.
  const std::size_t many = std::size_t{1} << 22;
  const auto nothing = [](std::size_t, std::size_t, float*) {};
  EXPECT_TRUE(refused(unrotate(loaded_keys(many, many, many, nothing), {f, positions}, Span<float>(out)),
                      Errc::bad_shape, "more than any memory"));
}

// Sines and cosines of any angle that positions and frequencies make.
TEST(SinCos, AreADoublesUpToAMillionAndAFloatsUpToABillion) {
  Rng rng(4);
  for (int draw = 0; draw < 20000; ++draw) {
    const double angle = rng.real(-1, 1) * std::pow(10.0, rng.real(-3, 9));
    double sine = 0, cosine = 0;
    detail::sin_cos(angle, sine, cosine);
    const double tolerance = std::fabs(angle) < 1e6 ? 4e-16 : 1e-7;
    ASSERT_NEAR(sine, std::sin(angle), tolerance) << angle;
    ASSERT_NEAR(cosine, std::cos(angle), tolerance) << angle;
  }
}

// ---- value-weighted, query-free -----------------------------------------------------------------

double length(const double* x, std::size_t dim) {
  double sum = 0;
  for (std::size_t d = 0; d < dim; ++d) sum += x[d] * x[d];
  return std::sqrt(sum);
}

TEST(ValueNorms, WeightEachHeadsProbabilityByItsValuesLength) {
  Rng rng(4);
  const std::size_t heads = 4, kv_heads = 2, tokens = 30, dim = 12;
  oracle::Layer a = oracle::random_layer(rng, heads, kv_heads, 1, tokens, dim);
  const std::vector<float> v = random_floats(rng, kv_heads * tokens * dim);
  const std::vector<double> exact(v.begin(), v.end());
  const std::vector<TokenSpan> visual = {{3, 8}, {12, 10}};
  std::vector<float> norms(kv_heads * 18);
  ASSERT_TRUE(value_norms(fastv::heads(v.data(), HeadMajor{kv_heads, tokens, dim}), visual, Span<float>(norms)));
  for (std::size_t h = 0; h < kv_heads; ++h)
    for (const TokenSpan& span : visual)
      for (std::size_t i = 0; i < span.count; ++i)
        a.value_norms.push_back(length(&exact[(h * tokens + span.first + i) * dim], dim));
  for (std::size_t i = 0; i < norms.size(); ++i)
    ASSERT_NEAR(static_cast<double>(norms[i]), a.value_norms[i], 1e-6 * a.value_norms[i]);

  const oracle::Tensors<float> tensors(rng, a);
  const std::vector<double> expected = oracle::scores_by(a, {29}, visual);
  auto evidence = tensors.view;
  evidence.value_norms = norms;
  Pruner<> pruner;
  ASSERT_TRUE(pruner.prune(evidence, visual));
  for (std::size_t i = 0; i < 18; ++i) EXPECT_NEAR(static_cast<double>(pruner.scores()[i]), expected[i], 1e-6);

  std::vector<double> p;
  for (std::size_t h = 0; h < heads; ++h)
    for (const double x : oracle::log_row(a, h, 0)) p.push_back(std::exp(x));
  auto map = probabilities(p.data(), heads, 1, tokens);
  map.value_norms = norms;
  ASSERT_TRUE(pruner.prune(map, visual));
  for (std::size_t i = 0; i < 18; ++i) EXPECT_NEAR(static_cast<double>(pruner.scores()[i]), expected[i], 1e-6);

  evidence.value_norms = {norms.data(), 35};
  EXPECT_TRUE(refused(pruner.prune(evidence, visual).status, Errc::bad_shape, "35 value norms"));
  map.value_norms = {norms.data(), 3 * 18};  // three do not divide four heads
  EXPECT_TRUE(refused(pruner.prune(map, visual).status, Errc::bad_shape, "54 value norms"));
}

TEST(ValueNorms, AreThoseOfEveryPlaceBehindEarlierTurnsAsWell) {
  Rng rng(5);
  const std::size_t heads = 2, tokens = 33;
  const std::vector<TokenSpan> visual = {{3, 5}, {9, 10}};
  for (const std::size_t dim : {1u, 7u, 24u, 1024u})
    for (const std::size_t past : {0u, 11u})
      for (const Place place : oracle::places) {
        std::vector<double> values = random_values(rng, heads * tokens * dim);
        const Stored<bfloat16> cache(rng, place, heads, tokens, dim, values, 4,
                                     oracle::in_chunks(place) && dim % 8 == 0 ? 8 : 0);
        std::vector<float> norms(heads * 15), loaded(heads * 15);
        ASSERT_TRUE(value_norms(cache.view(), visual, Span<float>(norms), past));
        const auto load = [&](std::size_t head, std::size_t token, float* out) {
          for (std::size_t d = 0; d < dim; ++d) out[d] = static_cast<float>(values[(head * tokens + token) * dim + d]);
        };
        ASSERT_TRUE(value_norms(loaded_keys(heads, tokens, dim, load), visual, Span<float>(loaded), past));
        EXPECT_EQ(loaded, norms);
        for (std::size_t h = 0; h < heads; ++h)
          for (std::size_t i = 0; i < 15; ++i) {
            const std::size_t token = past + (i < 5 ? 3 + i : 4 + i);
            const double expected = length(&values[(h * tokens + token) * dim], dim);
            ASSERT_NEAR(static_cast<double>(norms[h * 15 + i]), expected, 1e-6 * expected) << "dim " << dim;
          }
      }
}

TEST(ValueNorms, WhatDoesNotFitIsNamed) {
  const std::vector<float> v(3000);
  std::vector<float> norms(40);
  const std::vector<TokenSpan> visual = {{2, 10}};
  const auto with = [&](const Heads<float>& values, std::size_t room = 20, std::size_t past = 0) {
    return value_norms(values, visual, Span<float>(norms.data(), room), past);
  };
  EXPECT_TRUE(with(heads(v.data(), HeadMajor{2, 20, 4})));
  EXPECT_TRUE(refused(with(heads(v.data(), HeadMajor{2, 20, 4}), 19), Errc::too_small, "value_norms"));
  EXPECT_TRUE(refused(with(heads(v.data(), HeadMajor{2, 20, 4}), 20, 9), Errc::bad_prompt, "11 tokens"));
  EXPECT_TRUE(refused(with(heads(v.data(), HeadMajor{2, 20, 4}), 20, 20), Errc::bad_shape, "past is 20"));
  EXPECT_TRUE(refused(with(heads(v.data(), HeadMajor{1, 20, 1025})), Errc::not_supported, "1025"));
  EXPECT_TRUE(refused(with(heads(static_cast<const float*>(nullptr), HeadMajor{2, 20, 4})), Errc::null_data, "value"));
}

TEST(KeysOnlyRule, RanksShortKeysFirstInEveryPlace) {
  Rng rng(5);
  const std::size_t kv_heads = 3, tokens = 20, dim = 10, past = 5;
  const TokenSpan visual[] = {{4, 2}, {7, 8}};  // up to the last token: no question is asked
  for (const Place place : oracle::places) {
    std::vector<double> k = random_values(rng, kv_heads * tokens * dim);
    const Stored<half> cache(rng, place, kv_heads, tokens, dim, k, 3, oracle::in_chunks(place) ? 2 : 0);
    Pruner<> pruner;
    ASSERT_TRUE(pruner.prune(KeysOnly{cache.view(), past}, visual));
    const auto load = [&](std::size_t head, std::size_t token, float* out) {
      for (std::size_t d = 0; d < dim; ++d) out[d] = static_cast<float>(k[(head * tokens + token) * dim + d]);
    };
    Pruner<> by_loader;
    ASSERT_TRUE(by_loader.prune(KeysOnly{loaded_keys(kv_heads, tokens, dim, load), past}, visual));
    for (std::size_t i = 0; i < 10; ++i) {
      double mean = 0;
      for (std::size_t h = 0; h < kv_heads; ++h)
        mean += length(&k[(h * tokens + past + (i < 2 ? 4 + i : 5 + i)) * dim], dim) / 3;
      ASSERT_NEAR(static_cast<double>(pruner.scores()[i]), -mean, 1e-6);
      ASSERT_EQ(by_loader.scores()[i], pruner.scores()[i]);
    }
  }
}

TEST(KeysOnlyRule, WhatDoesNotFitIsNamed) {
  const std::vector<float> k(100);
  const TokenSpan visual[] = {{1, 5}};
  Pruner<> pruner;
  const Heads<float> keys = heads(k.data(), HeadMajor{2, 10, 5});
  EXPECT_TRUE(refused(pruner.prune(KeysOnly{keys, 10}, visual).status, Errc::bad_shape, "past is 10"));
  EXPECT_TRUE(refused(pruner.prune(KeysOnly{keys, 5}, visual).status, Errc::bad_prompt, "5 tokens"));
  EXPECT_TRUE(
      refused(pruner.prune(KeysOnly{heads(static_cast<const float*>(nullptr), HeadMajor{2, 10, 5})}, visual).status,
              Errc::null_data, "key"));
  EXPECT_TRUE(
      refused(pruner.prune(KeysOnly{heads(k.data(), HeadMajor{0, 10, 5})}, visual).status, Errc::bad_shape, "0 heads"));
}

// ---- prior-corrected, text raters ---------------------------------------------------------------

TEST(CorrectByPrior, EqualsTheFormula) {
  Rng rng(6);
  std::vector<float> p(200), q(200);
  for (float& x : p) x = static_cast<float>(std::exp(rng.real(-14, 0)));
  for (float& x : q) x = static_cast<float>(std::exp(rng.real(-14, 0)));
  const double p_sum = std::accumulate(p.begin(), p.end(), 0.0), q_sum = std::accumulate(q.begin(), q.end(), 0.0);
  std::vector<float> s = p;
  std::vector<double> d(p.begin(), p.end()), prior(q.begin(), q.end());
  ASSERT_TRUE(correct_by_prior(Span<float>(s), Span<const float>(q)));
  ASSERT_TRUE(correct_by_prior(Span<double>(d), Span<const double>(prior)));
  for (std::size_t i = 0; i < p.size(); ++i) {
    const double a = static_cast<double>(p[i]) / p_sum, b = static_cast<double>(q[i]) / q_sum;
    EXPECT_NEAR(static_cast<double>(s[i]), a * std::log((a + 1e-6) / (b + 1e-6)), 1e-6);
    EXPECT_NEAR(d[i], a * std::log((a + 1e-6) / (b + 1e-6)), 1e-6);
  }
}

TEST(CorrectByPrior, ANaNStaysWithItsToken) {
  std::vector<float> p = {0.5f, oracle::nan_float(), 0.25f, 0.25f}, expected = {0.5f, 0.25f, 0.25f};
  const std::vector<float> q = {0.25f, 0.25f, 0.5f, oracle::nan_float()}, numbers = {0.25f, 0.5f};
  ASSERT_TRUE(correct_by_prior(Span<float>(p), Span<const float>(q)));
  EXPECT_TRUE(oracle::is_nan(p[1]) && oracle::is_nan(p[3]));
  EXPECT_NEAR(static_cast<double>(p[0]), 0.5 * std::log(0.5 / 0.25), 1e-5);
  EXPECT_NEAR(static_cast<double>(p[2]), 0.25 * std::log(0.25 / 0.5), 1e-5);
  std::vector<float> none(4, oracle::nan_float());
  ASSERT_TRUE(correct_by_prior(Span<float>(none), Span<const float>(q)));
  for (const float x : none) EXPECT_TRUE(oracle::is_nan(x));
}

TEST(CorrectByPrior, SumsOfNothingAndOtherSizesAreRefused) {
  std::vector<float> p = {0.5f, 0.25f}, zero = {0, 0}, more(3);
  const Span<float> scores(p);
  EXPECT_TRUE(refused(correct_by_prior(Span<float>(zero), Span<const float>(p)), Errc::bad_value, "of the question"));
  EXPECT_TRUE(refused(correct_by_prior(scores, Span<const float>(zero)), Errc::bad_value, "of the prior rows"));
  EXPECT_TRUE(refused(correct_by_prior(scores, Span<const float>(more)), Errc::bad_shape, "3 scores"));
  EXPECT_TRUE(refused(correct_by_prior(scores, Span<const float>(nullptr, 2)), Errc::null_data, "prior"));
  EXPECT_EQ(p, (std::vector<float>{0.5f, 0.25f}));
  EXPECT_TRUE(correct_by_prior(Span<float>(), Span<const float>()));
}

TEST(CorrectByPrior, ConfigAsksForTheSeparatorsRow) {
  Rng rng(7);
  const std::size_t heads = 2, rows = 8, keys = 30, first = 2, count = 18;
  std::vector<float> map = random_floats(rng, heads * rows * keys);
  for (float& x : map) x = std::fabs(x);
  Config config;
  const std::vector<Index> question = {26, 27, 29}, separator = {22};
  config.score_rows = ScoreRows::listed;
  config.listed_rows = question;
  const TokenSpan visual[] = {{first, count}};
  const auto evidence = probabilities(map.data(), heads, rows, keys);
  Pruner<> p_only(config);
  ASSERT_TRUE(p_only.prune(evidence, visual));
  std::vector<float> expected(p_only.scores().begin(), p_only.scores().end());
  config.listed_rows = separator;
  Pruner<> q_only(config);
  ASSERT_TRUE(q_only.prune(evidence, visual));
  ASSERT_TRUE(correct_by_prior(Span<float>(expected), q_only.scores()));
  config.listed_rows = question;
  config.prior_rows = separator;
  Pruner<> both(config);
  ASSERT_TRUE(both.prune(evidence, visual));
  for (std::size_t i = 0; i < count; ++i) EXPECT_EQ(both.scores()[i], expected[i]);

  const std::vector<Index> unseen = {5}, beyond = {30};
  config.prior_rows = unseen;  // the evidence starts at row 22
  EXPECT_TRUE(refused(Pruner<>(config).prune(evidence, visual).status, Errc::missing_evidence, "position 5"));
  config.prior_rows = beyond;
  EXPECT_TRUE(refused(Pruner<>(config).prune(evidence, visual).status, Errc::bad_setting, "30"));
}

// Where a sink takes nearly all, scores are brought into range by the greatest that counts: not by that of a token whose
// value is 0.
TEST(ValueNorms, OfZeroDoNotHideWhatIsTiny) {
  const float query[] = {1}, keys[] = {-400, -100, -300, -310, -400}, sinks[] = {0}, norms[] = {0, 1, 2};
  const TokenSpan visual[] = {{1, 3}};
  QueryKey<float> evidence = query_key(heads(static_cast<const float*>(query), TokenMajor{1, 1, 1}),
                                       heads(static_cast<const float*>(keys), TokenMajor{5, 1, 1}), 1.0f);
  evidence.sinks = sinks;
  evidence.value_norms = norms;
  Pruner<> pruner;
  const Kept kept = pruner.prune(evidence, visual);
  ASSERT_TRUE(kept) << kept.message().c_str();
  EXPECT_EQ(std::vector<Index>(kept.begin(), kept.end()), (std::vector<Index>{0, 2, 3, 4}));
  const Span<const float> scores = pruner.scores();
  EXPECT_EQ(scores[0], 0.0f);
  EXPECT_GT(scores[1], 0.0f);
  EXPECT_NEAR(scores[2] / scores[1], 2 * std::exp(-10.0f), 1e-9f);
}

// A range around images is of its text alone.
TEST(TextRaters, PassOverVisualTokens) {
  Rng rng(9);
  const std::size_t tokens = 30, width = 8;
  const std::vector<float> hidden = random_floats(rng, tokens * width);
  const std::vector<TokenSpan> visual = {{3, 9}, {16, 8}};
  std::vector<Index> rows(tokens);
  std::vector<float> scratch(2 * tokens);
  for (const TokenSpan text : {TokenSpan{0, 30}, {2, 20}, {11, 6}, {10, 2 + 4}}) {
    std::vector<std::size_t> words;
    for (std::size_t t = text.first; t < text.first + text.count; ++t)
      if (t < 3 || (t >= 12 && t < 16) || t >= 24) words.push_back(t);
    std::vector<double> relevance(words.size(), 0.0);
    for (const TokenSpan& span : visual)
      for (std::size_t i = span.first; i < span.first + span.count; ++i) {
        std::vector<double> e;
        for (const std::size_t word : words) {
          double sum = 0;
          for (std::size_t d = 0; d < width; ++d)
            sum += static_cast<double>(hidden[i * width + d]) * static_cast<double>(hidden[word * width + d]);
          e.push_back(std::exp(sum));
        }
        const double total = std::accumulate(e.begin(), e.end(), 0.0);
        for (std::size_t j = 0; j < words.size(); ++j) relevance[j] += e[j] / total / 17;
      }
    std::vector<Index> expected;
    for (std::size_t j = 0; j < words.size(); ++j)
      if (relevance[j] >= 1.0 / static_cast<double>(words.size())) expected.push_back(static_cast<Index>(words[j]));
    const auto found = text_raters(hidden.data(), tokens, width, width, visual, text, rows, scratch);
    ASSERT_TRUE(found) << found.message().c_str();
    EXPECT_EQ(std::vector<Index>(rows.begin(), rows.begin() + static_cast<std::ptrdiff_t>(*found)), expected);
  }
  EXPECT_TRUE(refused(text_raters(hidden.data(), tokens, width, width, visual, {4, 8}, rows, scratch).status,
                      Errc::bad_prompt, "all 8 tokens from position 4 on are visual"));
}

// Their mean may come out a little above them all: then the last one, never none and never a visual token.
TEST(TextRaters, OfEqualRelevanceAreAllOrTheLast) {
  const std::size_t tokens = 130, width = 8;
  const std::vector<float> equal(tokens * width, 0.1f);
  const std::vector<TokenSpan> visual = {{3, 9}, {tokens - 2, 1}};
  std::vector<Index> rows(tokens);
  std::vector<float> scratch(2 * tokens);
  std::size_t all = 0, last = 0;
  for (std::size_t count = 3; count < tokens - 11; ++count) {  // the span's last token is the image's, now and then
    const auto found = text_raters(equal.data(), tokens, width, width, visual, {11, count}, rows, scratch);
    ASSERT_TRUE(found);
    const std::size_t words = count - 1 - (11 + count > tokens - 2 ? 1 : 0);
    if (*found == words) {
      EXPECT_EQ(rows[0], 12u);
      ++all;
    } else {
      ASSERT_EQ(*found, 1u) << count;
      EXPECT_EQ(rows[0], 11 + words);
      ++last;
    }
  }
  EXPECT_GT(all, 0u);
  EXPECT_GT(last, 0u);
}

TEST(TextRaters, AreTheTextTokensAboveMeanRelevance) {
  Rng rng(8);
  const std::size_t tokens = 40, width = 16, stride = 20;
  const std::vector<float> hidden = random_floats(rng, tokens * stride);
  const std::vector<TokenSpan> visual = {{3, 12}, {16, 9}};
  const TokenSpan text{26, 13};
  std::vector<double> relevance(text.count, 0.0);
  for (const TokenSpan& span : visual)
    for (std::size_t i = span.first; i < span.first + span.count; ++i) {
      std::vector<double> e(text.count);
      for (std::size_t j = 0; j < text.count; ++j) {
        double sum = 0;
        for (std::size_t d = 0; d < width; ++d)
          sum +=
              static_cast<double>(hidden[i * stride + d]) * static_cast<double>(hidden[(text.first + j) * stride + d]);
        e[j] = std::exp(sum);
      }
      const double total = std::accumulate(e.begin(), e.end(), 0.0);
      for (std::size_t j = 0; j < text.count; ++j) relevance[j] += e[j] / total / 21;
    }
  std::vector<Index> expected;
  for (std::size_t j = 0; j < text.count; ++j)
    if (relevance[j] >= 1.0 / static_cast<double>(text.count)) expected.push_back(static_cast<Index>(text.first + j));
  std::vector<Index> rows(text.count);
  std::vector<float> scratch(2 * text.count);
  const auto found = text_raters(hidden.data(), tokens, width, stride, visual, text, rows, scratch);
  ASSERT_TRUE(found) << found.message().c_str();
  rows.resize(*found);
  EXPECT_EQ(rows, expected);

  std::vector<Index> room(text.count);
  const auto with = [&](TokenSpan t, std::size_t apart = 20, std::size_t entries = 13) {
    return text_raters(hidden.data(), tokens, width, apart, visual, t, Span<Index>(room.data(), entries), scratch)
        .status;
  };
  EXPECT_TRUE(refused(with({26, 0}), Errc::bad_prompt, "0 tokens"));
  EXPECT_TRUE(refused(with({30, 13}), Errc::bad_prompt, "position 30 over 13"));
  EXPECT_TRUE(refused(with(text, 15), Errc::bad_stride, "15"));
  EXPECT_TRUE(refused(with(text, 20, 12), Errc::too_small, "raters"));
  EXPECT_TRUE(refused(text_raters(hidden.data(), tokens, width, stride, {}, text, room, scratch).status,
                      Errc::bad_prompt, "no visual tokens"));
  std::vector<float> broken = hidden;
  broken[4 * stride] = oracle::nan_float();
  EXPECT_TRUE(refused(text_raters(broken.data(), tokens, width, stride, visual, text, room, scratch).status,
                      Errc::bad_value, "position 4"));
}

}  // namespace
}  // namespace remedies_test

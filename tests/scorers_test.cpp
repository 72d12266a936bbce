// The rules beside FastV's own, each against a plain loop in double.
#include "fastv/scorers.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "fastv/fastv.hpp"
#include "oracle.hpp"

namespace {

using namespace fastv;
using oracle::Rng;

std::vector<float> random_floats(Rng& rng, std::size_t count) {
  std::vector<float> values(count);
  for (float& v : values) v = static_cast<float>(rng.real(-1, 1));
  return values;
}

// ---- RoPE-free ----------------------------------------------------------------------------------

// Rotates [heads, tokens, dim] forward, straight from the definition.
void rotate(std::vector<float>& x, std::size_t heads, std::size_t tokens, std::size_t dim, const Rope& rope) {
  for (std::size_t h = 0; h < heads; ++h)
    for (std::size_t t = 0; t < tokens; ++t)
      for (std::size_t p = 0; p < dim / 2; ++p) {
        const std::size_t axis = rope.axis.empty() ? 0 : rope.axis[p];
        const double angle =
            static_cast<double>(static_cast<float>(rope.positions[axis * tokens + t]) * rope.frequencies[p]);
        const std::size_t i = rope.layout == RopeLayout::half ? p : 2 * p,
                          j = rope.layout == RopeLayout::half ? p + dim / 2 : 2 * p + 1;
        float &a = x[(h * tokens + t) * dim + i], &b = x[(h * tokens + t) * dim + j];
        const double low = static_cast<double>(a), high = static_cast<double>(b);
        a = static_cast<float>(low * std::cos(angle) - high * std::sin(angle));
        b = static_cast<float>(high * std::cos(angle) + low * std::sin(angle));
      }
}

std::vector<float> frequencies(std::size_t pairs) {
  std::vector<float> f(pairs);
  for (std::size_t i = 0; i < pairs; ++i)
    f[i] = static_cast<float>(std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(pairs)));
  return f;
}

TEST(Unrotate, UndoesOneAxisAndThreeInBothLayouts) {
  Rng rng(1);
  const std::size_t heads = 3, tokens = 70, dim = 32;
  const std::vector<float> plain = random_floats(rng, heads * tokens * dim), f = frequencies(dim / 2);
  std::vector<Index> positions(3 * tokens);
  for (Index& p : positions) p = static_cast<Index>(rng.below(40000));
  std::vector<unsigned char> sections(dim / 2);
  for (std::size_t i = 0; i < sections.size(); ++i)
    sections[i] = static_cast<unsigned char>(i < 4 ? 0 : i < 10 ? 1 : 2);
  for (const auto layout : {RopeLayout::half, RopeLayout::interleaved})
    for (const bool m_rope : {false, true}) {
      Rope rope{f, positions, {}, layout};
      if (m_rope) rope.axis = sections;
      std::vector<float> rotated = plain, back(plain.size());
      rotate(rotated, heads, tokens, dim, rope);
      ASSERT_TRUE(
          unrotate(head_vectors(rotated.data(), heads, tokens, dim, KvLayout::head_major), rope, Span<float>(back)));
      for (std::size_t i = 0; i < plain.size(); ++i) ASSERT_NEAR(back[i], plain[i], 1e-6f) << i;
    }
}

TEST(Unrotate, ReadsTokenMajorAndHalfPrecisionCaches) {
  Rng rng(2);
  const std::size_t heads = 2, tokens = 9, dim = 8;
  const std::vector<float> f = frequencies(dim / 2);
  std::vector<Index> positions(tokens);
  std::iota(positions.begin(), positions.end(), Index{100});
  const Rope rope{f, positions};
  std::vector<float> rotated = random_floats(rng, heads * tokens * dim), plain(rotated.size()), back(rotated.size());
  std::vector<half> cache(rotated.size());  // [tokens, heads, dim]
  for (std::size_t h = 0; h < heads; ++h)
    for (std::size_t t = 0; t < tokens; ++t)
      for (std::size_t e = 0; e < dim; ++e) {
        const half value = oracle::make<half>(static_cast<double>(rotated[(h * tokens + t) * dim + e]));
        cache[(t * heads + h) * dim + e] = value;
        rotated[(h * tokens + t) * dim + e] = to_float(value);
      }
  ASSERT_TRUE(unrotate(head_vectors(cache.data(), heads, tokens, dim, KvLayout::token_major), rope, Span<float>(back)));
  rotate(back, heads, tokens, dim, rope);
  for (std::size_t i = 0; i < back.size(); ++i) ASSERT_NEAR(back[i], rotated[i], 1e-6f);
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
  const auto rotated = head_vectors(keys.data(), 1, tokens, dim, KvLayout::head_major);
  ASSERT_TRUE(unrotate(rotated, rope, Span<float>(back)));
  const TokenSpan visual[] = {{2, 30}};
  Pruner<> pruner;
  const auto spread = [&] {
    const auto s = pruner.scores();
    return *std::max_element(s.begin(), s.end()) - *std::min_element(s.begin(), s.end());
  };
  ASSERT_TRUE(pruner.prune(query_key(key.data(), 1, 1, rotated, 1.0f), visual));
  EXPECT_GT(spread(), 1e-3f);
  ASSERT_TRUE(pruner.prune(
      query_key(key.data(), 1, 1, head_vectors(back.data(), 1, tokens, dim, KvLayout::head_major), 1.0f), visual));
  EXPECT_LT(spread(), 1e-6f);
}

TEST(Unrotate, BadTablesAreNamed) {
  std::vector<float> x(64), out(64), f(4);
  std::vector<Index> positions(8);
  const std::vector<unsigned char> axis = {0, 1, 2, 0};
  const auto code = [&](std::size_t dim, Rope rope, std::size_t room = 64) {
    return unrotate(head_vectors(x.data(), 1, 8, dim, KvLayout::head_major), rope, Span<float>(out.data(), room)).code;
  };
  EXPECT_EQ(code(8, {f, positions}), Errc::ok);
  EXPECT_EQ(code(7, {f, positions}), Errc::odd_dim);
  EXPECT_EQ(code(6, {f, positions}), Errc::rope_size);
  EXPECT_EQ(code(8, {f, Span<const Index>(positions.data(), 7)}), Errc::rope_size);
  EXPECT_EQ(code(8, {f, positions, axis}), Errc::rope_size);  // three axes need 24 positions
  EXPECT_EQ(code(8, {f, positions, Span<const unsigned char>(axis.data(), 3)}), Errc::rope_size);
  EXPECT_EQ(code(8, {f, positions}, 63), Errc::room_too_small);
}

// ---- value-weighted, query-free -----------------------------------------------------------------

TEST(ValueNorms, WeightEachHeadsProbabilityByItsValuesLength) {
  Rng rng(4);
  const std::size_t heads = 4, kv_heads = 2, tokens = 30, dim = 12;
  oracle::Attention attention;
  attention.heads = heads;
  attention.kv_heads = kv_heads;
  attention.keys = tokens;
  attention.dim = dim;
  const std::vector<float> q = random_floats(rng, heads * dim), k = random_floats(rng, kv_heads * tokens * dim),
                           v = random_floats(rng, kv_heads * tokens * dim);
  attention.query.assign(q.begin(), q.end());
  attention.key.assign(k.begin(), k.end());
  attention.scale = 0.5;
  const std::vector<double> p = oracle::probabilities(attention);
  const std::vector<TokenSpan> visual = {{3, 8}, {12, 10}};
  std::vector<float> norms(kv_heads * 18);
  ASSERT_TRUE(
      value_norms(head_vectors(v.data(), kv_heads, tokens, dim, KvLayout::head_major), visual, Span<float>(norms)));

  std::vector<double> expected;
  for (const TokenSpan& span : visual)
    for (std::size_t t = span.first; t < span.first + span.count; ++t) {
      double sum = 0;
      for (std::size_t h = 0; h < heads; ++h) {
        double square = 0;
        for (std::size_t e = 0; e < dim; ++e) {
          const double x = static_cast<double>(v[(h / 2 * tokens + t) * dim + e]);
          square += x * x;
        }
        sum += p[h * tokens + t] * std::sqrt(square);
      }
      expected.push_back(sum / heads);
    }
  Pruner<> pruner;
  auto evidence = query_key(q.data(), heads, 1, k.data(), kv_heads, tokens, dim, 0.5f, KvLayout::head_major);
  evidence.value_norms = norms;
  ASSERT_TRUE(pruner.prune(evidence, visual));
  for (std::size_t i = 0; i < 18; ++i) EXPECT_NEAR(static_cast<double>(pruner.scores()[i]), expected[i], 1e-6);

  auto map = probabilities(p.data(), heads, 1, tokens);
  map.value_norms = norms;
  ASSERT_TRUE(pruner.prune(map, visual));
  for (std::size_t i = 0; i < 18; ++i) EXPECT_NEAR(static_cast<double>(pruner.scores()[i]), expected[i], 1e-6);

  evidence.value_norms = {norms.data(), 35};
  EXPECT_EQ(pruner.prune(evidence, visual).code(), Errc::norms_size);
}

TEST(KeysOnlyRule, RanksShortKeysFirst) {
  Rng rng(5);
  const std::size_t kv_heads = 3, tokens = 20, dim = 10;
  const std::vector<float> k = random_floats(rng, kv_heads * tokens * dim);
  const TokenSpan visual[] = {{4, 12}};
  Pruner<> pruner;
  ASSERT_TRUE(
      pruner.prune(KeysOnly<float>{head_vectors(k.data(), kv_heads, tokens, dim, KvLayout::token_major)}, visual));
  for (std::size_t i = 0; i < 12; ++i) {
    double mean = 0;
    for (std::size_t h = 0; h < kv_heads; ++h) {
      double square = 0;
      for (std::size_t e = 0; e < dim; ++e) {
        const double x = static_cast<double>(k[((4 + i) * kv_heads + h) * dim + e]);
        square += x * x;
      }
      mean += std::sqrt(square) / static_cast<double>(kv_heads);
    }
    EXPECT_NEAR(static_cast<double>(pruner.scores()[i]), -mean, 1e-6);
  }
}

// ---- prior-corrected, text raters ---------------------------------------------------------------

TEST(PriorCorrected, EqualsTheFormula) {
  Rng rng(6);
  std::vector<float> p(200), q(200);
  for (float& x : p) x = static_cast<float>(std::exp(rng.real(-14, 0)));
  for (float& x : q) x = static_cast<float>(std::exp(rng.real(-14, 0)));
  const double p_sum = std::accumulate(p.begin(), p.end(), 0.0), q_sum = std::accumulate(q.begin(), q.end(), 0.0);
  std::vector<float> s = p;
  ASSERT_TRUE(prior_corrected(Span<float>(s), Span<const float>(q)));
  for (std::size_t i = 0; i < p.size(); ++i) {
    const double a = static_cast<double>(p[i]) / p_sum, b = static_cast<double>(q[i]) / q_sum;
    EXPECT_NEAR(static_cast<double>(s[i]), a * std::log((a + 1e-6) / (b + 1e-6)), 1e-6);
  }
}

TEST(PriorCorrected, ConfigAsksForTheSeparatorsRow) {
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
  ASSERT_TRUE(prior_corrected(Span<float>(expected), q_only.scores()));
  config.listed_rows = question;
  config.prior_rows = separator;
  Pruner<> both(config);
  ASSERT_TRUE(both.prune(evidence, visual));
  for (std::size_t i = 0; i < count; ++i) EXPECT_EQ(both.scores()[i], expected[i]);

  const std::vector<Index> unseen = {5};
  config.prior_rows = unseen;  // the evidence starts at row 22
  Pruner<> beyond(config);
  EXPECT_EQ(beyond.prune(evidence, visual).code(), Errc::row_not_in_evidence);
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
  const auto code = [&](TokenSpan t) {
    return text_raters(hidden.data(), tokens, width, stride, visual, t, room, scratch).code();
  };
  EXPECT_EQ(code({26, 0}), Errc::listed_rows_empty);
  EXPECT_EQ(code({30, 13}), Errc::listed_row_past_end);
  EXPECT_EQ(text_raters(hidden.data(), tokens, width, 15, visual, text, room, scratch).code(),
            Errc::overlapping_stride);
}

// ---- shards -------------------------------------------------------------------------------------

struct Sharded {
  std::size_t heads = 8, kv_heads = 4, tokens = 90, dim = 16;
  std::vector<float> q, k;
  std::vector<TokenSpan> visual = {{5, 30}, {40, 44}};
  explicit Sharded(std::uint64_t seed) {
    Rng rng(seed);
    q = random_floats(rng, heads * dim);
    k = random_floats(rng, kv_heads * tokens * dim);
    for (float& x : q) x *= 4;
  }
  QueryKey<float> whole() const {
    return query_key(q.data(), heads, 1, k.data(), kv_heads, tokens, dim, 0.5f, KvLayout::head_major);
  }
};

TEST(HeadShards, PartialSumsAddUpToTheWholeOnEveryNumberOfRanks) {
  const Sharded s(9);
  Pruner<> pruner;
  const Kept kept = pruner.prune(s.whole(), s.visual);
  ASSERT_TRUE(kept);
  const std::vector<float> whole(pruner.scores().begin(), pruner.scores().end());
  const std::vector<Index> whole_kept(kept.begin(), kept.end());
  for (const std::size_t ranks : {1u, 2u, 4u}) {
    std::vector<float> sum(74, 0.0f), part(74), scratch(100000);
    for (std::size_t r = 0; r < ranks; ++r) {
      QueryKey<float> own = s.whole();
      own.heads = s.heads / ranks;
      own.kv_heads = s.kv_heads / ranks;
      own.query += r * own.heads * s.dim;
      own.key += r * own.kv_heads * s.tokens * s.dim;
      own.heads_total = s.heads;
      ASSERT_TRUE(score<float>(Config{}, own, s.visual, Span<float>(part), Span<float>(scratch)));
      for (std::size_t i = 0; i < 74; ++i) sum[i] += part[i];  // the caller's all-reduce
    }
    for (std::size_t i = 0; i < 74; ++i) ASSERT_NEAR(sum[i], whole[i], 1e-7f);
    Pruner<> on_sum;
    const Kept same = on_sum.prune(Scores<float>{sum, s.tokens}, s.visual);
    ASSERT_TRUE(same);
    EXPECT_EQ(std::vector<Index>(same.begin(), same.end()), whole_kept);
  }
  QueryKey<float> wrong = s.whole();
  wrong.heads_total = 7;
  EXPECT_EQ(pruner.prune(wrong, s.visual).code(), Errc::heads_above_total);
}

TEST(KeyShards, MergeToOneSoftmaxOverAllKeysHoweverTheyAreCut) {
  const Sharded s(10);
  Pruner<> pruner;
  ASSERT_TRUE(pruner.prune(s.whole(), s.visual));
  const std::vector<float> whole(pruner.scores().begin(), pruner.scores().end());
  std::vector<float> bias(s.tokens, 0.0f);
  for (const std::vector<std::size_t>& cuts :
       {std::vector<std::size_t>{0, 90}, {0, 45, 90}, {0, 3, 37, 60, 90}, {0, 1, 2, 88, 90}}) {
    const std::size_t ranks = cuts.size() - 1;
    std::vector<SoftmaxPart> parts(ranks * s.heads);
    std::vector<std::vector<float>> numerators(ranks);
    for (std::size_t r = 0; r < ranks; ++r) {
      QueryKey<float> own = s.whole();
      own.key += cuts[r] * s.dim;
      own.keys = cuts[r + 1] - cuts[r];
      std::vector<TokenSpan> visual;  // in this rank's keys
      std::size_t count = 0;
      for (const TokenSpan& span : s.visual) {
        const std::size_t from = (std::max)(span.first, cuts[r]), to = (std::min)(span.first + span.count, cuts[r + 1]);
        if (from < to) visual.push_back({from - cuts[r], to - from});
        count += from < to ? to - from : 0;
      }
      numerators[r].resize(s.heads * count);
      std::vector<float> scratch(score_scratch(own));
      ASSERT_TRUE(score_shard(own, visual, Span<SoftmaxPart>(parts.data() + r * s.heads, s.heads),
                              Span<float>(numerators[r]), Span<float>(scratch)));
    }
    std::vector<float> merged;
    for (std::size_t r = 0; r < ranks; ++r) {
      std::vector<float> scores(numerators[r].size() / s.heads);
      ASSERT_TRUE(merge_shards(Span<const SoftmaxPart>(parts), ranks, r, Span<const float>(numerators[r]),
                               Span<float>(scores)));
      merged.insert(merged.end(), scores.begin(), scores.end());
    }
    ASSERT_EQ(merged.size(), whole.size());
    for (std::size_t i = 0; i < merged.size(); ++i) ASSERT_NEAR(merged[i], whole[i], 1e-7f) << ranks << " ranks";
  }
}

TEST(KeyShards, ARankWhoseKeysAreAllHiddenAddsNothingAndNanSpreads) {
  const Sharded s(11);
  QueryKey<float> own = s.whole();
  own.keys = 10;
  std::vector<float> bias(10, -oracle::infinity()), numerators(s.heads * 4), scratch(score_scratch(own));
  own.bias = bias;
  std::vector<SoftmaxPart> parts(2 * s.heads);
  const std::vector<TokenSpan> visual = {{5, 4}};
  ASSERT_TRUE(score_shard(own, visual, Span<SoftmaxPart>(parts.data(), s.heads), Span<float>(numerators),
                          Span<float>(scratch)));
  for (std::size_t h = 0; h < s.heads; ++h) {
    EXPECT_EQ(parts[h].sum, 0.0f);
    parts[s.heads + h] = {1.0f, 2.0f};
  }
  std::vector<float> scores(4);
  ASSERT_TRUE(merge_shards(Span<const SoftmaxPart>(parts), 2, 0, Span<const float>(numerators), Span<float>(scores)));
  for (const float score : scores) EXPECT_EQ(score, 0.0f);
  parts[s.heads] = {oracle::nan_float(), oracle::nan_float()};
  ASSERT_TRUE(merge_shards(Span<const SoftmaxPart>(parts), 2, 0, Span<const float>(numerators), Span<float>(scores)));
  for (const float score : scores) EXPECT_TRUE(oracle::is_nan(score));
  EXPECT_EQ(merge_shards(Span<const SoftmaxPart>(parts), 3, 0, Span<const float>(numerators), Span<float>(scores)).code,
            Errc::shard_ranks);
}

}  // namespace

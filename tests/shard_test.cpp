// Heads or keys spread over ranks: what the ranks put together must be what one alone computes.
#include "fastv/shard.hpp"

#include <gtest/gtest.h>

#include "attention.hpp"
#include "fastv/fastv.hpp"
#include "refused.hpp"

namespace shard_test {
namespace {

using namespace fastv;
using oracle::Rng;

const std::vector<TokenSpan> visual = {{5, 30}, {40, 44}};
constexpr std::size_t heads = 8, kv_heads = 4, tokens = 90, dim = 16;

struct Whole {
  Rng rng;
  oracle::Layer layer;
  oracle::Tensors<float> tensors;
  explicit Whole(std::uint64_t seed, bool everything = false)
      : rng(seed), layer(made(rng, everything)), tensors(rng, layer, oracle::Place::head_major) {}

  // The keys [from, to) as one rank holds them. Sinks stay on rank 0.
  QueryKey<float> keys(std::size_t from, std::size_t to) const {
    QueryKey<float> own = tensors.view;
    own.key.data += from * dim;
    own.key.tokens = to - from;
    if (!own.bias.empty()) own.bias = {own.bias.data() + from, to - from};
    if (from > 0) own.sinks = {};
    if (own.key_scales.data != nullptr) {
      own.key_scales.data += from;
      own.key_scales.tokens = to - from;
    }
    own.value_norms = {};
    return own;
  }

 private:
  static oracle::Layer made(Rng& rng, bool everything) {
    oracle::Layer a = oracle::random_layer(rng, heads, kv_heads, 1, tokens, dim, 3);
    if (!everything) return a;
    a.soft_cap = 9;
    for (std::size_t h = 0; h < heads; ++h) a.sinks.push_back(rng.real(-3, 5));
    for (std::size_t j = 0; j < tokens; ++j) a.bias.push_back(rng.chance(0.2) ? -HUGE_VAL : rng.real(-1, 1));
    for (std::size_t i = 0; i < kv_heads * tokens; ++i) a.key_scales.push_back(rng.real(0.5, 1.5));
    for (std::size_t i = 0; i < kv_heads * 74; ++i) a.value_norms.push_back(rng.real(0.2, 3));
    return a;
  }
};

TEST(HeadShards, PartialSumsAddUpToTheWholeOnEveryNumberOfRanks) {
  const Whole whole(9);
  Pruner<> pruner;
  const Kept kept = pruner.prune(whole.tensors.view, visual);
  ASSERT_TRUE(kept);
  const std::vector<float> expected(pruner.scores().begin(), pruner.scores().end());
  const std::vector<Index> expected_kept(kept.begin(), kept.end());
  for (const std::size_t ranks : {1u, 2u, 4u}) {
    std::vector<float> sum(74, 0.0f), part(74);
    for (std::size_t r = 0; r < ranks; ++r) {
      QueryKey<float> own = whole.tensors.view;
      own.query.heads = heads / ranks;
      own.key.heads = kv_heads / ranks;
      own.query.data += r * own.query.heads * dim;
      own.key.data += r * own.key.heads * tokens * dim;
      own.heads_total = heads;
      std::vector<float> scratch(score_scratch(own));
      ASSERT_TRUE(score<float>(Config{}, own, visual, Span<float>(part), Span<float>(scratch)));
      for (std::size_t i = 0; i < 74; ++i) sum[i] += part[i];  // the caller's all-reduce
    }
    for (std::size_t i = 0; i < 74; ++i) ASSERT_NEAR(sum[i], expected[i], 1e-7f);
    Pruner<> on_sum;
    const Kept same = on_sum.prune(Scores<float>{sum, tokens}, visual);
    ASSERT_TRUE(same);
    EXPECT_EQ(std::vector<Index>(same.begin(), same.end()), expected_kept);
  }
  // By its own heads each rank would keep other tokens.
  QueryKey<float> some = whole.tensors.view;
  some.heads_total = 2 * heads;
  EXPECT_TRUE(refused(pruner.prune(some, visual).status, Errc::missing_evidence, "8 of 16 heads"));
  EXPECT_TRUE(pruner.scores().empty());
  const std::vector<float> map(heads * tokens, 0.01f);
  Probabilities<float> some_rows = probabilities(map.data(), heads, 1, tokens);
  some_rows.heads_total = heads + 1;
  EXPECT_TRUE(refused(pruner.prune(some_rows, visual).status, Errc::missing_evidence, "8 of 9 heads"));
  BatchPruner<> batch;
  const Request requests[] = {{{}, visual, 0, tokens}};
  const KeptBatch none = batch.prune(requests, [&](std::size_t) { return some; });
  ASSERT_EQ(none.failed, 1u);
  EXPECT_TRUE(refused(none.sequences[0].status, Errc::missing_evidence, "8 of 16 heads"));
  Config random;
  random.selection = Selection::random;
  EXPECT_TRUE(Pruner<>(random).prune(some, visual));  // looks at no score
  QueryKey<float> wrong = whole.tensors.view;
  wrong.heads_total = 7;
  EXPECT_TRUE(refused(pruner.prune(wrong, visual).status, Errc::bad_shape, "heads_total is 7"));
}

// Every cut, with every field that shards take.
TEST(KeyShards, MergeToOneSoftmaxOverAllKeysHoweverTheyAreCut) {
  for (const bool everything : {false, true}) {
    const Whole whole(10, everything);
    const std::vector<double> exact = oracle::scores_by(whole.layer, {89}, visual);
    for (const std::vector<std::size_t>& cuts :
         {std::vector<std::size_t>{0, 90}, {0, 45, 90}, {0, 3, 37, 60, 90}, {0, 1, 2, 88, 90}}) {
      const std::size_t ranks = cuts.size() - 1;
      std::vector<SoftmaxPart> parts(ranks * heads);
      std::vector<std::vector<float>> numerators(ranks);
      std::size_t before = 0;  // visual tokens of the ranks so far
      for (std::size_t r = 0; r < ranks; ++r) {
        QueryKey<float> own = whole.keys(cuts[r], cuts[r + 1]);
        std::vector<TokenSpan> spans;  // in this rank's keys
        std::size_t count = 0;
        for (const TokenSpan& span : visual) {
          const std::size_t from = std::max(span.first, cuts[r]), to = std::min(span.first + span.count, cuts[r + 1]);
          if (from < to) spans.push_back({from - cuts[r], to - from});
          count += from < to ? to - from : 0;
        }
        std::vector<float> norms;
        for (std::size_t h = 0; h < kv_heads && everything; ++h)
          for (std::size_t i = 0; i < count; ++i)
            norms.push_back(static_cast<float>(whole.layer.value_norms[h * 74 + before + i]));
        own.value_norms = norms;
        before += count;
        numerators[r].resize(heads * count);
        std::vector<float> scratch(score_scratch(own), oracle::nan_float());
        const Status status = score_shard(own, spans, Span<SoftmaxPart>(parts.data() + r * heads, heads),
                                          Span<float>(numerators[r]), Span<float>(scratch));
        ASSERT_TRUE(status) << status.message().c_str();
      }
      for (const std::size_t heads_total : {0u, 16u}) {
        std::vector<double> merged;
        for (std::size_t r = 0; r < ranks; ++r) {
          std::vector<float> scores(numerators[r].size() / heads);
          ASSERT_TRUE(merge_shards(Span<const SoftmaxPart>(parts), ranks, r, Span<const float>(numerators[r]),
                                   Span<float>(scores), heads_total));
          merged.insert(merged.end(), scores.begin(), scores.end());
        }
        ASSERT_EQ(merged.size(), exact.size());
        for (std::size_t i = 0; i < merged.size(); ++i)
          ASSERT_NEAR(merged[i] * (heads_total == 0 ? 1 : 2), exact[i], 2e-5 * exact[i] + 1e-12) << ranks << " ranks";
      }
    }
  }
}

TEST(KeyShards, ARankWhoseKeysAreAllHiddenAddsNothingAndNanSpreads) {
  const Whole whole(11);
  QueryKey<float> own = whole.keys(0, 10);
  std::vector<float> bias(10, -oracle::infinity()), numerators(heads * 4), scratch(score_scratch(own));
  own.bias = bias;
  std::vector<SoftmaxPart> parts(2 * heads);
  const std::vector<TokenSpan> spans = {{5, 4}};
  ASSERT_TRUE(
      score_shard(own, spans, Span<SoftmaxPart>(parts.data(), heads), Span<float>(numerators), Span<float>(scratch)));
  for (std::size_t h = 0; h < heads; ++h) {
    EXPECT_EQ(parts[h].sum, 0.0f);
    parts[heads + h] = {1.0f, 2.0f};
  }
  std::vector<float> scores(4);
  const auto merged = [&](std::size_t ranks) {
    return merge_shards(Span<const SoftmaxPart>(parts), ranks, 0, Span<const float>(numerators), Span<float>(scores));
  };
  ASSERT_TRUE(merged(2));
  for (const float score : scores) EXPECT_EQ(score, 0.0f);
  parts[heads] = {oracle::nan_float(), oracle::nan_float()};
  ASSERT_TRUE(merged(2));
  for (const float score : scores) EXPECT_TRUE(oracle::is_nan(score));
  EXPECT_TRUE(refused(merged(3), Errc::bad_shape, "rank 0 of 3"));
}

TEST(KeyShards, RefuseWhatAShardCannotKnow) {
  const Whole whole(12);
  const std::vector<TokenSpan> spans = {{5, 4}};
  std::vector<SoftmaxPart> parts(heads);
  std::vector<float> numerators(heads * 4), scratch(score_scratch(whole.tensors.view)), slopes(heads);
  const Index seen[] = {90};
  const auto with = [&](auto change) {
    QueryKey<float> own = whole.tensors.view;
    change(own);
    return score_shard(own, spans, Span<SoftmaxPart>(parts), Span<float>(numerators), Span<float>(scratch));
  };
  EXPECT_TRUE(with([](auto&) {}));
  EXPECT_TRUE(with([](auto& e) { e.past = 70; }));
  EXPECT_TRUE(refused(with([](auto& e) { e.heads_total = 16; }), Errc::bad_setting, "merge_shards()"));
  EXPECT_TRUE(refused(with([](auto& e) { e.heads_total = heads; }), Errc::bad_setting, "merge_shards()"));
  EXPECT_TRUE(refused(with([](auto& e) { e.window = 20; }), Errc::not_supported, "windows"));
  EXPECT_TRUE(refused(with([](auto& e) { e.first_key = 20; }), Errc::not_supported, "where in the sequence"));
  EXPECT_TRUE(refused(with([&](auto& e) { e.visible = seen; }), Errc::not_supported, "visible"));
  EXPECT_TRUE(refused(with([&](auto& e) { e.alibi = slopes; }), Errc::not_supported, "ALiBi"));
  EXPECT_TRUE(refused(with([&](auto& e) { e.value_norms = slopes; }), Errc::bad_shape, "8 value norms"));
  EXPECT_TRUE(refused(with([](auto& e) { e.past = 82; }), Errc::bad_prompt, "span 0"));
  EXPECT_TRUE(refused(with([](auto& e) { e.key.dim = 15; }), Errc::bad_shape, "dimension"));
  EXPECT_TRUE(refused(with([](auto& e) {
                        e.query = fastv::heads(e.query.data, TokenMajor{2, 4, dim});
                      }),
                      Errc::bad_shape, "2 rows"));
  EXPECT_TRUE(refused(score_shard(whole.tensors.view, spans, Span<SoftmaxPart>(parts.data(), 7),
                                  Span<float>(numerators), Span<float>(scratch)),
                      Errc::too_small, "parts"));
  EXPECT_TRUE(refused(score_shard(whole.tensors.view, spans, Span<SoftmaxPart>(parts),
                                  Span<float>(numerators.data(), 31), Span<float>(scratch)),
                      Errc::too_small, "numerators"));
  EXPECT_TRUE(refused(score_shard(whole.tensors.view, spans, Span<SoftmaxPart>(parts), Span<float>(numerators),
                                  Span<float>(scratch.data(), scratch.size() - 1)),
                      Errc::too_small, "scratch"));
  std::vector<float> scores(4);
  const auto merged = [&](std::size_t ranks, std::size_t rank, std::size_t total, std::size_t given) {
    return merge_shards(Span<const SoftmaxPart>(parts), ranks, rank, Span<const float>(numerators.data(), given),
                        Span<float>(scores), total);
  };
  EXPECT_TRUE(merged(1, 0, 0, 32));
  EXPECT_TRUE(refused(merged(1, 0, 7, 32), Errc::bad_shape, "heads_total is 7"));
  EXPECT_TRUE(refused(merged(1, 1, 0, 32), Errc::bad_shape, "rank 1 of 1"));
  EXPECT_TRUE(refused(merged(0, 0, 0, 32), Errc::bad_shape, "of 0"));
  EXPECT_TRUE(refused(merged(1, 0, 0, 31), Errc::bad_shape, "31 numerators"));
}

}  // namespace
}  // namespace shard_test

// Many sequences at once: each must come out as if it were alone.
#include "fastv/batch.hpp"

#include <gtest/gtest.h>

#include <thread>

#include "counted_new.hpp"
#include "oracle.hpp"

namespace batch_test {
namespace {

using namespace fastv;
using oracle::Rng;

constexpr std::size_t heads = 4, kv_heads = 2, dim = 20;

// A batch of random sequences, packed one behind the other or padded to the longest.
struct Packed {
  enum class Padding { none, right, left };

  std::vector<oracle::Layout> layouts;
  std::vector<Request> requests;
  std::size_t rows = 0;  // of the packed tensors
  std::vector<float> query, key;

  Packed(std::uint64_t seed, std::size_t sequences, Padding padding) {
    Rng rng(seed);
    std::size_t longest = 0;
    for (std::size_t i = 0; i < sequences; ++i) {
      layouts.push_back(oracle::random_layout(rng, i % 3 == 2 ? 0 : 3, 30));
      longest = (std::max)(longest, layouts.back().tokens);
    }
    for (std::size_t i = 0; i < sequences; ++i) {
      const oracle::Layout& layout = layouts[i];
      Request request{Config{}, layout.visual, rows, layout.tokens};
      if (padding == Padding::right) request.first = i * longest;
      if (padding == Padding::left) request.first = (i + 1) * longest - layout.tokens;
      rows = padding == Padding::none ? rows + layout.tokens : (i + 1) * longest;
      request.config.filtering_ratio = rng.real();
      request.config.seed = rng.next();
      request.config.selection = static_cast<Selection>(rng.below(3));
      request.config.quota = rng.chance(0.5) ? Quota::pooled : Quota::per_image;
      requests.push_back(request);
    }
    for (std::size_t i = 0; i < rows * heads * dim; ++i) query.push_back(static_cast<float>(rng.real(-1, 1)));
    for (std::size_t i = 0; i < rows * kv_heads * dim; ++i) key.push_back(static_cast<float>(rng.real(-1, 1)));
  }

  // The sequence's own view: the query of its last token, its keys.
  QueryKey<float> evidence(std::size_t i) const {
    const Request& r = requests[i];
    return query_key(fastv::heads(query.data() + (r.first + r.tokens - 1) * heads * dim, TokenMajor{1, heads, dim}),
                     fastv::heads(key.data() + r.first * kv_heads * dim, TokenMajor{r.tokens, kv_heads, dim}), 0.3f);
  }
};

void expect_each_as_alone(const Packed& packed, const BatchPruner<>& pruner, const KeptBatch& batch) {
  ASSERT_TRUE(batch) << batch.message().c_str();
  ASSERT_EQ(batch.cumulative.size(), packed.requests.size() + 1);
  EXPECT_EQ(batch.failed, 0u);
  std::size_t total = 0;
  for (std::size_t i = 0; i < packed.requests.size(); ++i) {
    const Request& request = packed.requests[i];
    Pruner<> alone(request.config);
    const Kept kept = alone.prune(packed.evidence(i), request.visual);
    ASSERT_TRUE(kept) << kept.message().c_str();
    const std::vector<Index> own(kept.begin(), kept.end());
    std::vector<Index> shifted = own;
    for (Index& index : shifted) index += static_cast<Index>(request.first);
    EXPECT_EQ(std::vector<Index>(batch.indices.begin() + batch.cumulative[i],
                                 batch.indices.begin() + batch.cumulative[i + 1]),
              shifted)
        << "sequence " << i;
    const Kept& ours = batch.sequences[i];
    EXPECT_TRUE(ours);
    EXPECT_EQ(std::vector<Index>(ours.begin(), ours.end()), own) << "sequence " << i;
    EXPECT_EQ(ours.prompt_tokens, request.tokens);
    EXPECT_EQ(ours.nan_scores, kept.nan_scores);
    EXPECT_EQ(ours.zero_scores, kept.zero_scores);
    const KeptRows rows = batch.sequence(i);
    EXPECT_EQ(std::vector<Index>(rows.indices.begin(), rows.indices.end()), own);
    EXPECT_EQ(rows.prompt_tokens, request.tokens);
    ASSERT_EQ(pruner.scores(i).size(), alone.scores().size());  // none after a rule that looks at none
    for (std::size_t t = 0; t < alone.scores().size(); ++t) ASSERT_EQ(pruner.scores(i)[t], alone.scores()[t]);
    total += kept.size();
    // The plan of each sequence gives the new lengths without looking at a value.
    const auto plan = make_plan(request, 32);
    EXPECT_EQ(ours.size(), plan->kept());
  }
  EXPECT_EQ(batch.indices.size(), total);
  EXPECT_EQ(batch.size(), total);
  EXPECT_EQ(batch.cumulative[packed.requests.size()], total);
  EXPECT_TRUE(std::is_sorted(batch.indices.begin(), batch.indices.end()));
}

TEST(Batch, RaggedAndPaddedSequencesComeOutAsIfAlone) {
  for (std::uint64_t seed = 0; seed < 40; ++seed)
    for (const auto padding : {Packed::Padding::none, Packed::Padding::right, Packed::Padding::left}) {
      const Packed packed(seed, 1 + seed % 9, padding);
      BatchPruner<> pruner;
      expect_each_as_alone(packed, pruner,
                           pruner.prune(packed.requests, [&](std::size_t i) { return packed.evidence(i); }));
    }
}

TEST(Batch, OnePrunerServesBatchesOfEverySize) {
  BatchPruner<> pruner;
  for (const std::size_t sequences : {3u, 17u, 1u, 8u}) {
    const Packed packed(sequences, sequences, Packed::Padding::none);
    expect_each_as_alone(packed, pruner,
                         pruner.prune(packed.requests, [&](std::size_t i) { return packed.evidence(i); }));
  }
}

// A parallel_for on threads, in reverse order.
struct Threads {
  template <class Body>
  void operator()(std::size_t count, const Body& body) const {
    std::vector<std::thread> threads;
    for (std::size_t t = 0; t < 3; ++t)
      threads.emplace_back([&, t] {
        for (std::size_t i = count; i-- > 0;)
          if (i % 3 == t) body(i);
      });
    for (std::thread& thread : threads) thread.join();
  }
};

TEST(Batch, ThreadsChangeNothing) {
  const Packed packed(5, 12, Packed::Padding::none);
  BatchPruner<> serial, threaded;
  const auto evidence = [&](std::size_t i) { return packed.evidence(i); };
  const KeptBatch a = serial.prune(packed.requests, evidence), b = threaded.prune(packed.requests, evidence, Threads{});
  expect_each_as_alone(packed, threaded, b);
  EXPECT_EQ(std::vector<Index>(a.indices.begin(), a.indices.end()),
            std::vector<Index>(b.indices.begin(), b.indices.end()));
}

TEST(Batch, ThreadsInsideOneSequenceChangeNoBitOfItsScores) {
  Rng rng(6);
  const std::size_t tokens = 3000;
  std::vector<float> query, key;
  for (std::size_t i = 0; i < heads * dim; ++i) query.push_back(static_cast<float>(rng.real(-1, 1)));
  for (std::size_t i = 0; i < tokens * kv_heads * dim; ++i) key.push_back(static_cast<float>(rng.real(-1, 1)));
  const auto evidence = query_key(fastv::heads(query.data(), TokenMajor{1, heads, dim}),
                                  fastv::heads(key.data(), TokenMajor{tokens, kv_heads, dim}), 0.3f);
  const TokenSpan visual[] = {{7, 1100}, {1200, 1500}};
  Pruner<> serial, threaded;
  ASSERT_TRUE(serial.prune(evidence, visual));
  ASSERT_TRUE(threaded.prune(evidence, visual, Threads{}));
  ASSERT_EQ(serial.scores().size(), 2600u);
  for (std::size_t i = 0; i < 2600; ++i) ASSERT_EQ(serial.scores()[i], threaded.scores()[i]) << i;
}

TEST(Batch, OneFailureLeavesTheOthersAlone) {
  Packed packed(3, 7, Packed::Padding::none);
  packed.requests[0].config.filtering_ratio = 7;  // a wrong setting
  packed.requests[3].visual = {};                 // no image
  for (Request& request : packed.requests) request.config.selection = Selection::top_k;
  const Request& poisoned = packed.requests[4];
  ASSERT_FALSE(poisoned.visual.empty());
  packed.query[(poisoned.first + poisoned.tokens - 1) * heads * dim] = oracle::nan_float();
  BatchPruner<> pruner;
  const KeptBatch batch = pruner.prune(packed.requests, [&](std::size_t i) { return packed.evidence(i); });
  ASSERT_TRUE(batch);
  EXPECT_EQ(batch.failed, 2u);
  EXPECT_EQ(batch.sequences[0].code(), Errc::bad_setting);
  EXPECT_NE(std::string(batch.sequences[0].message().c_str()).find("is 7"), std::string::npos);
  EXPECT_EQ(batch.sequences[0].size(), packed.requests[0].tokens);  // a sequence that failed keeps every token
  EXPECT_EQ(batch.sequences[3].size(), packed.requests[3].tokens);
  for (const std::size_t i : {1u, 2u, 3u, 5u, 6u}) {
    EXPECT_TRUE(batch.sequences[i]) << i;
    Pruner<> alone(packed.requests[i].config);
    const Kept kept = alone.prune(packed.evidence(i), packed.requests[i].visual);
    EXPECT_EQ(std::vector<Index>(batch.sequences[i].begin(), batch.sequences[i].end()),
              std::vector<Index>(kept.begin(), kept.end()));
  }
  // One poisoned head poisons the mean over heads of every visual token.
  EXPECT_EQ(batch.sequences[4].code(), Errc::bad_value);
  EXPECT_EQ(batch.sequences[4].size(), poisoned.tokens);
  EXPECT_TRUE(pruner.scores(0).empty());
  EXPECT_TRUE(pruner.scores(4).empty());
  // Its own tensors keep every row; the verbs pass its failure on where they are handed its Kept.
  std::vector<Index> rows(poisoned.tokens);
  EXPECT_TRUE(compact(batch.sequence(4), rows));
  EXPECT_EQ(compact(batch.sequences[4], rows).code, Errc::bad_value);
}

// Images that the layer does not see, beside others that it does.
TEST(Batch, UnseenImagesFailBySequence) {
  Packed packed(3, 7, Packed::Padding::none);
  for (Request& request : packed.requests) {
    request.config = Config{};
    request.config.keep_count = request.visual.empty() ? by_ratio : 1;
    request.config.quota = Quota::pooled;
  }
  ASSERT_GE(visual_tokens(packed.requests[1].visual), 2u);
  const std::vector<float> hidden(packed.requests[1].tokens, -oracle::infinity());
  BatchPruner<> pruner;
  const KeptBatch batch = pruner.prune(packed.requests, [&](std::size_t i) {
    auto evidence = packed.evidence(i);
    if (i == 1) evidence.bias = hidden;
    return evidence;
  });
  ASSERT_TRUE(batch);
  EXPECT_EQ(batch.failed, 1u);
  EXPECT_EQ(batch.sequences[1].code(), Errc::bad_value);
  EXPECT_EQ(batch.sequences[1].zero_scores, 0u) << "a failed sequence counts nothing";
}

TEST(Batch, SequencesMustBeSortedAndDisjoint) {
  Packed packed(3, 4, Packed::Padding::none);
  const auto evidence = [&](std::size_t i) { return packed.evidence(i); };
  BatchPruner<> pruner;
  packed.requests[2].first -= 1;
  const KeptBatch batch = pruner.prune(packed.requests, evidence);
  ASSERT_FALSE(batch);
  EXPECT_EQ(batch.code(), Errc::bad_prompt);
  EXPECT_NE(std::string(batch.message().c_str()).find("sequence 2"), std::string::npos);
  packed.requests[2].first = max_tokens;
  EXPECT_EQ(pruner.prune(packed.requests, evidence).code(), Errc::bad_prompt);
  EXPECT_EQ(pruner.prune(Span<const Request>(nullptr, 2), evidence).code(), Errc::null_data);
}

TEST(Batch, SequencesWithoutTokensFailAlone) {
  Packed packed(3, 4, Packed::Padding::none);
  std::vector<Request> requests = packed.requests;
  requests[2] = {{}, {}, requests[3].first, 0};
  BatchPruner<> pruner;
  const KeptBatch batch = pruner.prune(requests, [&](std::size_t i) { return packed.evidence(i); });
  ASSERT_TRUE(batch);
  EXPECT_EQ(batch.failed, 1u);
  EXPECT_EQ(batch.sequences[2].code(), Errc::bad_prompt);
  EXPECT_EQ(batch.sequences[2].size(), 0u);
}

TEST(Batch, EvidenceOfAnotherLengthIsSaidNotRead) {
  Packed packed(8, 2, Packed::Padding::none);
  ASSERT_FALSE(packed.requests[0].visual.empty());
  for (const Selection selection : {Selection::top_k, Selection::uniform}) {
    packed.requests[0].config.selection = selection;
    BatchPruner<> pruner;
    const KeptBatch batch = pruner.prune(packed.requests, [&](std::size_t i) {
      auto evidence = packed.evidence(i);
      if (i == 0) evidence.key.tokens -= 1;
      return evidence;
    });
    ASSERT_TRUE(batch);
    EXPECT_EQ(batch.sequences[0].code(), Errc::bad_shape);
    EXPECT_TRUE(batch.sequences[1]);
  }
}

// One sequence whose shape asks for an absurd room must not move the others' memory.
TEST(Batch, AWrongShapeFailsBeforeItsSizeIsBelieved) {
  Packed packed(3, 7, Packed::Padding::none);
  for (Request& request : packed.requests) request.config = Config{};
  BatchPruner<> pruner;
  const KeptBatch batch = pruner.prune(packed.requests, [&](std::size_t i) {
    auto evidence = packed.evidence(i);
    if (i == 1) evidence.query.heads = ~std::size_t{0};
    return evidence;
  });
  ASSERT_TRUE(batch) << batch.message().c_str();
  EXPECT_EQ(batch.failed, 1u);
  EXPECT_EQ(batch.sequences[1].code(), Errc::bad_shape);
}

TEST(Batch, HasScoresBehindASuccessfulPruneAlone) {
  const Packed packed(8, 3, Packed::Padding::none);
  std::vector<Request> requests = packed.requests;
  for (Request& request : requests) request.config = Config{};
  const auto evidence = [&](std::size_t i) { return packed.evidence(i); };
  BatchPruner<> pruner;
  for (std::size_t i = 0; i < 5; ++i) EXPECT_TRUE(pruner.scores(i).empty()) << "before the first";
  ASSERT_TRUE(pruner.prune(requests, evidence));
  EXPECT_EQ(pruner.scores(0).size(), visual_tokens(requests[0].visual));
  EXPECT_GT(pruner.scores(0).size(), 0u);
  EXPECT_TRUE(pruner.scores(2).empty()) << "no image";
  EXPECT_TRUE(pruner.scores(3).empty()) << "no sequence";
  EXPECT_TRUE(pruner.scores(~std::size_t{0}).empty());
  std::vector<Request> wrong = requests;
  wrong[1].first -= 1;
  ASSERT_FALSE(pruner.prune(wrong, evidence));
  for (std::size_t i = 0; i < 3; ++i) EXPECT_TRUE(pruner.scores(i).empty()) << "after one that failed";
  counted_new::fail_nothrow(true);
  BatchPruner<> starved;
  const KeptBatch batch = starved.prune(requests, evidence);
  counted_new::fail_nothrow(false);
  EXPECT_EQ(batch.code(), Errc::out_of_memory);
  EXPECT_TRUE(starved.scores(0).empty());
  ASSERT_TRUE(pruner.prune(Span<const Request>(requests.data(), 1), evidence));
  EXPECT_FALSE(pruner.scores(0).empty());
  EXPECT_TRUE(pruner.scores(1).empty()) << "of an earlier batch";
}

TEST(Batch, RefusesRowsForEvidenceThatHasNone) {
  const std::vector<TokenSpan> visual = {{1, 6}};  // up to the end: a chunk
  const std::vector<float> own = {1, 2, 3, 4, 5, 6};
  const Index rows[] = {6};
  std::vector<Request> requests(4, Request{{}, visual, 0, 7});
  for (std::size_t i = 0; i < 4; ++i) requests[i].first = 7 * i;
  requests[1].config.score_rows = ScoreRows::all;
  requests[2].config.score_rows = ScoreRows::listed;
  requests[2].config.listed_rows = rows;
  requests[3].config.prior_rows = rows;
  BatchPruner<> pruner;
  const KeptBatch batch = pruner.prune(requests, [&](std::size_t) { return Scores<float>{own, 7}; });
  ASSERT_TRUE(batch);
  EXPECT_EQ(batch.failed, 3u);
  EXPECT_TRUE(batch.sequences[0]);
  for (const std::size_t i : {1u, 2u, 3u}) EXPECT_EQ(batch.sequences[i].code(), Errc::missing_evidence) << i;
  const KeptBatch none = pruner.prune(requests, [&](std::size_t) { return NoEvidence{7}; });
  EXPECT_EQ(none.failed, 4u);
}

// Corrected for a prior, averaged over listed rows, behind earlier turns, in double: as Pruner does.
TEST(Batch, TakesEverySettingThatAPrunerTakes) {
  Rng rng(12);
  const std::size_t tokens = 60, past = 20, queries = 30;
  std::vector<float> query(queries * heads * dim), key((past + tokens) * kv_heads * dim);
  for (float& x : query) x = static_cast<float>(rng.real(-1, 1));
  for (float& x : key) x = static_cast<float>(rng.real(-1, 1));
  const std::vector<TokenSpan> visual = {{2, 12, 4}, {14, 20, 5}};
  const std::vector<Index> listed = {59, 40, 59}, prior = {35};
  auto evidence = query_key(fastv::heads(query.data(), TokenMajor{queries, heads, dim}),
                            fastv::heads(key.data(), TokenMajor{past + tokens, kv_heads, dim}), 0.3f);
  evidence.past = past;
  std::vector<Request> requests(4, Request{{}, visual, 0, tokens});
  for (std::size_t i = 0; i < 4; ++i) {
    requests[i].first = 100 * i + 7;
    Config& config = requests[i].config;
    config.score_rows = i % 2 == 0 ? ScoreRows::last : ScoreRows::listed;
    config.listed_rows = listed;
    if (i >= 2) config.prior_rows = prior;
    config.window_rows = config.window_columns = i == 1 ? 2 : 0;
    config.uniform_share = i == 3 ? 0.2 : 0;
  }
  BatchPruner<double> pruner;
  const KeptBatch batch = pruner.prune(requests, [&](std::size_t) { return evidence; });
  ASSERT_TRUE(batch);
  EXPECT_EQ(batch.failed, 0u);
  for (std::size_t i = 0; i < 4; ++i) {
    Pruner<double> alone(requests[i].config);
    const Kept kept = alone.prune(evidence, visual);
    ASSERT_TRUE(kept) << kept.message().c_str();
    EXPECT_EQ(std::vector<Index>(batch.sequences[i].begin(), batch.sequences[i].end()),
              std::vector<Index>(kept.begin(), kept.end()));
    for (std::size_t t = 0; t < 32; ++t) EXPECT_EQ(pruner.scores(i)[t], alone.scores()[t]);
  }
}

TEST(Batch, AllocatesNothingOnceItHasSeenABatchOfThatSize) {
  const Packed packed(7, 9, Packed::Padding::none);
  const auto evidence = [&](std::size_t i) { return packed.evidence(i); };
  BatchPruner<> pruner;
  ASSERT_TRUE(pruner.prune(packed.requests, evidence));
  const std::size_t before = counted_new::allocations;
  const bool pruned = static_cast<bool>(pruner.prune(packed.requests, evidence));
  EXPECT_EQ(counted_new::allocations, before);
  EXPECT_TRUE(pruned);
}

TEST(Batch, AnEmptyBatchIsEmpty) {
  BatchPruner<> pruner;
  const KeptBatch batch = pruner.prune({}, [](std::size_t) { return NoEvidence{0}; });
  ASSERT_TRUE(batch);
  EXPECT_EQ(batch.indices.size(), 0u);
  EXPECT_EQ(batch.cumulative[0], 0u);
  EXPECT_TRUE(pruner.scores(0).empty());
}

}  // namespace
}  // namespace batch_test

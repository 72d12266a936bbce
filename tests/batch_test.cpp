// Many sequences at once: each must come out as if it were alone.
#include "fastv/batch.hpp"

#include <gtest/gtest.h>

#include <thread>

#include "counted_new.hpp"
#include "oracle.hpp"

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
      request.config.quota = rng.chance(0.5) ? Quota::pooled : Quota::per_picture;
      requests.push_back(request);
    }
    for (std::size_t i = 0; i < rows * heads * dim; ++i) query.push_back(static_cast<float>(rng.real(-1, 1)));
    for (std::size_t i = 0; i < rows * kv_heads * dim; ++i) key.push_back(static_cast<float>(rng.real(-1, 1)));
  }

  // The sequence's own view: the query of its last token, its keys.
  QueryKey<float> evidence(std::size_t i) const {
    const Request& r = requests[i];
    return query_key(query.data() + (r.first + r.tokens - 1) * heads * dim, heads, 1,
                     key.data() + r.first * kv_heads * dim, kv_heads, r.tokens, dim, 0.3f, KvLayout::token_major);
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
    std::vector<Index> shifted(kept.begin(), kept.end());
    for (Index& index : shifted) index += static_cast<Index>(request.first);
    const auto ours = batch.sequence(i);
    EXPECT_EQ(std::vector<Index>(ours.begin(), ours.end()), shifted) << "sequence " << i;
    ASSERT_EQ(pruner.scores(i).size(), alone.scores().size());  // none after a rule that looks at none
    for (std::size_t t = 0; t < alone.scores().size(); ++t) ASSERT_EQ(pruner.scores(i)[t], alone.scores()[t]);
    total += kept.size();
    // The plan of each sequence gives the new lengths without looking at a value.
    const auto plan = make_plan(request, 32);
    EXPECT_EQ(ours.size(), plan->kept());
  }
  EXPECT_EQ(batch.indices.size(), total);
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
  const auto evidence =
      query_key(query.data(), heads, 1, key.data(), kv_heads, tokens, dim, 0.3f, KvLayout::token_major);
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
  packed.requests[3].visual = {};                 // no picture
  for (Request& request : packed.requests) request.config.selection = Selection::top_k;
  const Request& poisoned = packed.requests[4];
  ASSERT_FALSE(poisoned.visual.empty());
  packed.query[(poisoned.first + poisoned.tokens - 1) * heads * dim] = oracle::nan_float();
  BatchPruner<> pruner;
  const KeptBatch batch = pruner.prune(packed.requests, [&](std::size_t i) { return packed.evidence(i); });
  ASSERT_TRUE(batch);
  EXPECT_EQ(batch.failed, 2u);
  EXPECT_EQ(batch.statuses[0].code, Errc::ratio_out_of_range);
  EXPECT_EQ(batch.sequence(0).size(), packed.requests[0].tokens);  // a sequence that failed keeps every token
  EXPECT_EQ(batch.sequence(3).size(), packed.requests[3].tokens);
  EXPECT_LT(batch.nan_scores[1], 1u);
  for (const std::size_t i : {1u, 2u, 3u, 5u, 6u}) {
    EXPECT_TRUE(batch.statuses[i]) << i;
    Pruner<> alone(packed.requests[i].config);
    const Kept kept = alone.prune(packed.evidence(i), packed.requests[i].visual);
    EXPECT_EQ(batch.sequence(i).size(), kept.size());
  }
  // One poisoned head poisons the mean over heads of every visual token.
  EXPECT_EQ(batch.statuses[4].code, Errc::all_scores_nan);
  EXPECT_EQ(batch.sequence(4).size(), poisoned.tokens);
}

TEST(Batch, SequencesMustBeSortedAndDisjoint) {
  Packed packed(3, 4, Packed::Padding::none);
  const auto evidence = [&](std::size_t i) { return packed.evidence(i); };
  BatchPruner<> pruner;
  packed.requests[2].first -= 1;
  const KeptBatch batch = pruner.prune(packed.requests, evidence);
  ASSERT_FALSE(batch);
  EXPECT_EQ(batch.code(), Errc::sequences_overlap);
  EXPECT_NE(std::string(batch.message().c_str()).find("sequence 2"), std::string::npos);
}

TEST(Batch, EvidenceOfAnotherLengthIsSaidNotRead) {
  Packed packed(8, 2, Packed::Padding::none);
  ASSERT_FALSE(packed.requests[0].visual.empty());
  BatchPruner<> pruner;
  const KeptBatch batch = pruner.prune(packed.requests, [&](std::size_t i) {
    auto evidence = packed.evidence(i);
    if (i == 0) evidence.keys -= 1;
    return evidence;
  });
  ASSERT_TRUE(batch);
  EXPECT_EQ(batch.statuses[0].code, Errc::tokens_differ);
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
}

}  // namespace

// plan_batch() against the lengths of every layer and sequence, added up one by one.
#include "fastv/batch_plan.hpp"

#include <gtest/gtest.h>

#include "counted_new.hpp"
#include "oracle.hpp"

namespace batch_plan_test {
namespace {

using namespace fastv;
using oracle::Rng;

constexpr std::size_t layers = 10;

// What every layer of a sequence holds before the step, and how many tokens it runs on.
struct Sequence {
  std::vector<std::size_t> past = std::vector<std::size_t>(layers), queries = std::vector<std::size_t>(layers);
};

void expect_lengths(const BatchPlan& plan, const std::vector<Sequence>& sequences, std::size_t block) {
  std::size_t next_layer = 0, total = 0, added = 0;
  for (const BatchGroup& group : plan.groups) {
    ASSERT_EQ(group.first_layer, next_layer);
    ASSERT_GT(group.layers, 0u);
    next_layer += group.layers;
    ASSERT_LE(next_layer, layers);
    ASSERT_EQ(group.cumulative_queries.size(), sequences.size() + 1);
    ASSERT_EQ(group.cumulative_keys.size(), sequences.size() + 1);
    ASSERT_EQ(group.blocks.size(), sequences.size());
    for (std::size_t layer = group.first_layer; layer < next_layer; ++layer) {
      ASSERT_EQ(&plan.group_of(layer), &group);
      std::size_t queries = 0, keys = 0, longest_query = 0, longest_key = 0, blocks = 0, fresh = 0;
      for (std::size_t i = 0; i < sequences.size(); ++i) {
        ASSERT_EQ(group.cumulative_queries[i], static_cast<std::int32_t>(queries));
        ASSERT_EQ(group.cumulative_keys[i], static_cast<std::int32_t>(keys));
        const std::size_t query = sequences[i].queries[layer], before = sequences[i].past[layer], key = before + query;
        queries += query;
        keys += key;
        longest_query = (std::max)(longest_query, query);
        longest_key = (std::max)(longest_key, key);
        std::size_t need = 0, had = 0;
        while (block > 0 && need * block < key) ++need;
        while (block > 0 && had * block < before) ++had;
        ASSERT_EQ(group.blocks[i], static_cast<std::int32_t>(need));
        blocks += need;
        fresh += need - had;
      }
      ASSERT_EQ(group.cumulative_queries[sequences.size()], static_cast<std::int32_t>(queries));
      ASSERT_EQ(group.cumulative_keys[sequences.size()], static_cast<std::int32_t>(keys));
      ASSERT_EQ(group.longest_query, longest_query);
      ASSERT_EQ(group.longest_key, longest_key);
      ASSERT_EQ(group.total_blocks, blocks);
      ASSERT_EQ(group.added_blocks, fresh);
      total += blocks;
      added += fresh;
    }
  }
  ASSERT_EQ(next_layer, layers);
  ASSERT_EQ(plan.total_blocks, total);
  ASSERT_EQ(plan.added_blocks, added);
}

// The fewest ranges of layers in which no sequence's boundaries lie.
std::size_t count_groups(const std::vector<std::vector<std::size_t>>& boundaries) {
  std::size_t count = 1;
  for (std::size_t layer = 1; layer < layers; ++layer) {
    bool begins = false;
    for (const auto& own : boundaries) begins = begins || std::count(own.begin(), own.end(), layer) > 0;
    count += begins ? 1 : 0;
  }
  return count;
}

TEST(PlanBatch, AgreesWithEveryLayerOfEverySequence) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Rng rng(seed);
    const std::size_t n = rng.below(7), block = rng.below(3) == 0 ? rng.below(2) : rng.between(2, 20);
    std::vector<Plan> plans(n);
    std::vector<Slots> slots(n);
    std::vector<SequenceStep> steps(n);
    std::vector<Sequence> sequences(n);
    std::vector<std::vector<std::size_t>> boundaries(n);
    for (std::size_t i = 0; i < n; ++i) {
      // An earlier turn, pruned somewhere.
      if (rng.chance(0.6)) {
        const std::size_t tokens = rng.between(1, 40), kept_tokens = rng.between(0, tokens);
        const std::size_t k = rng.below(layers);
        std::vector<Index> kept(kept_tokens);
        for (std::size_t t = 0; t < kept_tokens; ++t) kept[t] = static_cast<Index>(t);
        ASSERT_TRUE(slots[i].append(tokens));
        for (std::size_t& past : sequences[i].past) past = tokens;
        if (rng.chance(0.7)) {
          ASSERT_TRUE(slots[i].keep(k, KeptRows(kept, tokens)));
          for (std::size_t layer = k; layer < layers; ++layer) sequences[i].past[layer] = kept_tokens;
          boundaries[i].push_back(k);
        }
      }
      steps[i].slots = &slots[i];
      if (rng.chance(0.5)) {  // a prompt with an image, in up to three stages
        const std::size_t text = rng.between(1, 10), visual = rng.between(1, 50);
        const TokenSpan span[] = {{0, visual}};
        std::vector<Config> schedule;
        for (std::size_t k = 1; k < layers && schedule.size() < 3; ++k) {
          if (!rng.chance(0.2)) continue;
          schedule.push_back({k, rng.real()});
          boundaries[i].push_back(k);
        }
        const Result<Plan> plan = make_plan(schedule, Prompt{text + visual, layers, span});
        ASSERT_TRUE(plan) << plan.message().c_str();
        plans[i] = *plan;
        steps[i].plan = &plans[i];
        steps[i].tokens = 12345;  // not read
        for (std::size_t layer = 0; layer < layers; ++layer) sequences[i].queries[layer] = plan->tokens_in_layer(layer);
      } else {
        steps[i].tokens = rng.below(4);
        for (std::size_t& queries : sequences[i].queries) queries = steps[i].tokens;
        if (slots[i].tokens() == 0) steps[i].slots = nullptr;
      }
    }
    const std::size_t count = count_groups(boundaries);
    // The memory is exactly as large as it must be, so that the sanitizer sees what is written past it.
    std::vector<BatchGroup> groups(count);
    std::vector<std::int32_t> lengths(batch_plan_entries(n, count));
    const std::size_t before = counted_new::allocations;
    const Result<BatchPlan> plan = plan_batch(steps, layers, block, groups, lengths);
    ASSERT_EQ(counted_new::allocations, before);
    ASSERT_TRUE(plan) << plan.message().c_str();
    ASSERT_EQ(plan->groups.size(), count);
    expect_lengths(*plan, sequences, block);
    if (HasFatalFailure()) return;
    if (count > 1) {
      EXPECT_EQ(plan_batch(steps, layers, block, Span<BatchGroup>(groups).first(count - 1), lengths).code(),
                Errc::too_small);
    }
    const Span<std::int32_t> all(lengths);
    EXPECT_EQ(plan_batch(steps, layers, block, groups, all.first(all.size() - 1)).code(), Errc::too_small);
  }
}

TEST(PlanBatch, ThePastOfAPlanCountsWithoutSlots) {
  const TokenSpan visual[] = {{1, 20}};
  std::size_t past[layers];
  for (std::size_t layer = 0; layer < layers; ++layer) past[layer] = layer < 4 ? 30 : layer < 7 ? 11 : 17;
  const Result<Plan> plan = make_plan(Config{4, 0.75}, Prompt{25, layers, visual, past});
  ASSERT_TRUE(plan);
  const SequenceStep steps[] = {{&*plan}, {nullptr, nullptr, 3}};
  BatchGroup groups[layers];
  std::int32_t lengths[batch_plan_entries(2, 3)];
  const Result<BatchPlan> batch = plan_batch(steps, layers, 8, groups, lengths);
  ASSERT_TRUE(batch) << batch.message().c_str();
  std::vector<Sequence> sequences(2);
  for (std::size_t layer = 0; layer < layers; ++layer) {
    sequences[0].past[layer] = past[layer];
    sequences[0].queries[layer] = layer < 4 ? 25 : 10;
    sequences[1].queries[layer] = 3;
  }
  expect_lengths(*batch, sequences, 8);
  // In one piece, group by group: one copy hands all of it over.
  EXPECT_EQ(batch->groups[0].cumulative_queries.data(), static_cast<std::int32_t*>(lengths));
  EXPECT_EQ(batch->groups[1].cumulative_queries.data(), static_cast<std::int32_t*>(lengths) + 8);
}

TEST(PlanBatch, WrongInputsAreNamed) {
  const TokenSpan visual[] = {{1, 20}};
  const Result<Plan> plan = make_plan(Config{4, 0.75}, Prompt{25, layers, visual});
  ASSERT_TRUE(plan);
  BatchGroup groups[4];
  std::int32_t lengths[64];
  const auto code = [&](const SequenceStep& step, std::size_t of_layers = layers) {
    return plan_batch(Span<const SequenceStep>(&step, 1), of_layers, 16, groups, lengths).code();
  };
  EXPECT_EQ(code({&*plan}), Errc::ok);
  EXPECT_EQ(code({&*plan}, 0), Errc::bad_setting);
  // Counts of blocks would wrap around.
  EXPECT_EQ(code({nullptr, nullptr, 5}, static_cast<std::size_t>(-1)), Errc::bad_setting);
  EXPECT_EQ(code({nullptr, nullptr, 5}, max_tokens), Errc::ok);
  EXPECT_EQ(code({&*plan}, layers + 1), Errc::bad_shape);
  EXPECT_EQ(code({nullptr, nullptr, max_tokens}), Errc::ok);
  EXPECT_EQ(code({nullptr, nullptr, max_tokens + 1}), Errc::bad_shape);
  EXPECT_EQ(code({nullptr, nullptr, static_cast<std::size_t>(-1)}), Errc::bad_shape);

  Slots deep;
  ASSERT_TRUE(deep.append(3));
  const Index kept[] = {2};
  ASSERT_TRUE(deep.keep(9, KeptRows(kept, 3)));
  EXPECT_EQ(code({nullptr, &deep}, 9), Errc::bad_shape);
  EXPECT_EQ(code({nullptr, &deep}, 10), Errc::ok);
  EXPECT_EQ(code({nullptr, &deep, max_tokens - 2}), Errc::bad_shape);

  const auto broken = [&](auto change) {
    Plan bad = *plan;
    change(bad);
    return code({&bad});
  };
  EXPECT_EQ(broken([](Plan& p) { p.stages = max_stages + 1; }), Errc::bad_setting);
  EXPECT_EQ(broken([](Plan& p) { p.stages = static_cast<std::size_t>(-1); }), Errc::bad_setting);
  EXPECT_EQ(broken([](Plan& p) { p.visual = p.tokens + 1; }), Errc::bad_setting);
  EXPECT_EQ(broken([](Plan& p) { p.stage[0].kept_visual = 21; }), Errc::bad_setting);
  EXPECT_EQ(broken([](Plan& p) { p.stage[0].filtering_layer = layers; }), Errc::bad_setting);
  EXPECT_EQ(broken([](Plan& p) { p.stages = 2; }), Errc::bad_setting);  // the second at layer 0
  EXPECT_EQ(broken([](Plan& p) { p.past[0].keys = max_tokens; }), Errc::bad_shape);
  EXPECT_EQ(broken([](Plan& p) { p.past[0].keys = static_cast<std::size_t>(-1); }), Errc::bad_shape);
  EXPECT_EQ(broken([](Plan& p) { p.pasts = 0; }), Errc::bad_setting);
  EXPECT_EQ(broken([](Plan& p) { p.pasts = max_stages + 2; }), Errc::bad_setting);
  EXPECT_EQ(broken([](Plan& p) { p.past[0].first_layer = 1; }), Errc::bad_setting);
  EXPECT_EQ(broken([](Plan& p) { p.pasts = 2; }), Errc::bad_setting);  // the second at layer 0
  EXPECT_EQ(broken([](Plan& p) { p.pasts = 2, p.past[1] = {layers, 5}; }), Errc::bad_setting);
  EXPECT_EQ(broken([](Plan& p) { p.pasts = 2, p.past[1] = {layers - 1, 5}; }), Errc::ok);
  EXPECT_EQ(broken([](Plan& p) { p.tokens = max_tokens + 1; }), Errc::bad_shape);

  const SequenceStep halves[] = {{nullptr, nullptr, max_tokens / 2 + 1}, {nullptr, nullptr, max_tokens / 2 + 1}};
  const Result<BatchPlan> both = plan_batch(halves, layers, 16, groups, lengths);
  EXPECT_EQ(both.code(), Errc::bad_shape);  // each alone would do
  EXPECT_NE(std::string(both.message().c_str()).find("sequence 1"), std::string::npos);

  const SequenceStep steps[] = {{&*plan}};
  EXPECT_EQ(plan_batch(steps, layers, 16, Span<BatchGroup>(), lengths).code(), Errc::too_small);
  EXPECT_EQ(plan_batch(steps, layers, 16, Span<BatchGroup>(nullptr, 4), lengths).code(), Errc::null_data);
  EXPECT_EQ(plan_batch(steps, layers, 16, groups, Span<std::int32_t>(nullptr, 64)).code(), Errc::null_data);
  EXPECT_EQ(plan_batch(Span<const SequenceStep>(nullptr, 1), layers, 16, groups, lengths).code(), Errc::null_data);
  const Result<BatchPlan> none = plan_batch(Span<const SequenceStep>(), layers, 16, groups, lengths);
  ASSERT_TRUE(none);
  EXPECT_EQ(none->groups.size(), 1u);
  EXPECT_EQ(none->groups[0].layers, layers);
}

}  // namespace
}  // namespace batch_plan_test

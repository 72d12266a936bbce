// Numbers and pointers that nobody should hand over: each is told, and nothing is read or written on their account.
// What the fuzz targets of tests/fuzz found, or were made to find, as plain tests.
#include <gtest/gtest.h>

#include "fastv/fastv.hpp"
#include "oracle.hpp"

namespace {

using namespace fastv;

constexpr std::size_t huge = static_cast<std::size_t>(-1);
const TokenSpan picture[] = {{1, 4}};
float floats[4096];
Index indices[64];

template <class T>
Span<T> nowhere(std::size_t size) {
  return {nullptr, size};
}

QueryKey<float> sound() { return query_key(floats, 2, 1, floats, 1, 8, 4, 0.5f, KvLayout::token_major); }

TEST(NextPosition, TakesUnsignedIds) {
  const Index ids[] = {0, 1, 2, 9, 3};
  EXPECT_EQ(next_position(Span<const Index>(ids)), 10u);
  EXPECT_EQ(next_position(Span<const Index>()), 0u);
  const std::int64_t signed_ids[] = {4, -1, 2};
  EXPECT_EQ(next_position(Span<const std::int64_t>(signed_ids)), 5);
}

TEST(Hostile, RoomsThatAreNotThere) {
  const float scores[] = {1, 2, 3, 4};
  std::uint32_t marks[4];
  const auto chosen = [&](Span<Index> kept, Span<Index> quotas, Span<std::uint32_t> work) {
    return select<float>({}, scores, picture, 8, kept, quotas, work).code();
  };
  EXPECT_EQ(chosen(indices, indices, marks), Errc::ok);
  EXPECT_EQ(chosen(nowhere<Index>(8), indices, marks), Errc::null_data);
  EXPECT_EQ(chosen(indices, nowhere<Index>(8), marks), Errc::null_data);
  EXPECT_EQ(chosen(indices, indices, nowhere<std::uint32_t>(8)), Errc::null_data);

  Config stages[2];
  stages[1].filtering_layer = 3;
  TokenSpan spans[1];
  const Prompt prompt{8, 6, picture};
  EXPECT_EQ(make_plan(Span<const Config>(stages), prompt, spans, indices).code(), Errc::ok);
  EXPECT_EQ(make_plan(nowhere<const Config>(2), prompt, spans, indices).code(), Errc::null_data);
  EXPECT_EQ(make_plan(Span<const Config>(stages), prompt, nowhere<TokenSpan>(1), indices).code(), Errc::null_data);
  EXPECT_EQ(make_plan(Span<const Config>(stages), prompt, spans, nowhere<Index>(1)).code(), Errc::null_data);
  EXPECT_EQ(kept_visual({}, nowhere<const TokenSpan>(1)).code(), Errc::null_data);

  const Index kept[] = {0, 2};
  EXPECT_EQ(remaining(nowhere<const Index>(2), picture, spans).code(), Errc::null_data);
  EXPECT_EQ(remaining(kept, nowhere<const TokenSpan>(1), spans).code(), Errc::null_data);
  EXPECT_EQ(remaining(kept, picture, nowhere<TokenSpan>(1)).code(), Errc::null_data);
  EXPECT_EQ(keep_bias(kept, 4, nowhere<float>(4), 0).code, Errc::null_data);
  EXPECT_EQ(keep_bitmap(kept, 4, nowhere<std::uint32_t>(1)).code, Errc::null_data);
  EXPECT_EQ(compact(Span<const Index>(kept), nowhere<const PagedRows>(1)).code(), Errc::null_data);

  float scratch[256], out[64];
  const Span<float> room(scratch), to(out);
  EXPECT_EQ(score<float>({}, sound(), picture, to, room).code, Errc::ok);
  EXPECT_EQ(score<float>({}, sound(), picture, nowhere<float>(64), room).code, Errc::null_data);
  EXPECT_EQ(score<float>({}, sound(), picture, to, nowhere<float>(256)).code, Errc::null_data);
  EXPECT_EQ(score<float>({}, sound(), nowhere<const TokenSpan>(1), to, room).code, Errc::null_data);
  SoftmaxPart parts[2];
  EXPECT_EQ(score_shard(sound(), picture, Span<SoftmaxPart>(parts), to, room).code, Errc::ok);
  EXPECT_EQ(score_shard(sound(), picture, nowhere<SoftmaxPart>(2), to, room).code, Errc::null_data);
  EXPECT_EQ(score_shard(sound(), picture, Span<SoftmaxPart>(parts), nowhere<float>(64), room).code, Errc::null_data);
  EXPECT_EQ(score_shard(sound(), picture, Span<SoftmaxPart>(parts), to, nowhere<float>(256)).code, Errc::null_data);
  const Span<const float> numerators(out, 8);
  const Span<float> merged(scratch, 4);
  EXPECT_EQ(merge_shards(Span<const SoftmaxPart>(parts), 1, 0, numerators, merged).code, Errc::ok);
  EXPECT_EQ(merge_shards(nowhere<const SoftmaxPart>(2), 1, 0, numerators, merged).code, Errc::null_data);
  EXPECT_EQ(merge_shards(Span<const SoftmaxPart>(parts), 1, 0, nowhere<const float>(8), merged).code, Errc::null_data);
  EXPECT_EQ(merge_shards(Span<const SoftmaxPart>(parts), 1, 0, numerators, nowhere<float>(4)).code, Errc::null_data);
  EXPECT_EQ(prior_corrected(merged, nowhere<const float>(4)).code, Errc::null_data);
  EXPECT_EQ(prior_corrected(nowhere<float>(4), numerators).code, Errc::scores_size);

  EXPECT_EQ(value_norms(keys_of(sound()), picture, nowhere<float>(64)).code, Errc::null_data);
  EXPECT_EQ(text_raters(floats, 8, 4, 4, picture, {5, 3}, nowhere<Index>(3), room).code(), Errc::null_data);
  EXPECT_EQ(text_raters(floats, 8, 4, 4, picture, {5, 3}, indices, nowhere<float>(6)).code(), Errc::null_data);
  const HeadVectors<float> keys = keys_of(sound());
  const unsigned char axis[] = {0, 0};
  const Rope rope{{floats, 2}, {indices, 8}, axis};
  EXPECT_EQ(unrotate(keys, rope, to).code, Errc::ok);
  Rope broken = rope;
  broken.frequencies = nowhere<const float>(2);
  EXPECT_EQ(unrotate(keys, broken, to).code, Errc::null_data);
  broken = rope;
  broken.positions = nowhere<const Index>(8);
  EXPECT_EQ(unrotate(keys, broken, to).code, Errc::null_data);
  broken = rope;
  broken.axis = nowhere<const unsigned char>(2);
  EXPECT_EQ(unrotate(keys, broken, to).code, Errc::null_data);
  EXPECT_EQ(unrotate(keys, rope, nowhere<float>(64)).code, Errc::null_data);

  const ModelShape shape{6, 8, 2, 1, 4, 16};
  EXPECT_EQ(settings_under({Budget::Of::seconds, 1, 2, 0, nowhere<const LayerTime>(2)}, shape, prompt).code(),
            Errc::null_data);
  const auto no_evidence = [](std::size_t) { return NoEvidence{8}; };
  EXPECT_EQ(BatchPruner<>().prune(nowhere<const Request>(1), no_evidence).code(), Errc::null_data);
}

TEST(Hostile, SettingsAndSpansGivenStraightToTheQuotas) {
  Config config;
  config.filtering_ratio = 2;  // would round a negative number to a count
  EXPECT_EQ(kept_visual(config, picture).code(), Errc::ratio_out_of_range);
  EXPECT_EQ(picture_quotas(config, picture, indices).code, Errc::ratio_out_of_range);
  const TokenSpan endless[] = {{0, huge}}, once_endless[] = {{1, 4, 0, false, huge}};
  EXPECT_EQ(kept_visual({}, endless).code(), Errc::too_many_tokens);
  EXPECT_EQ(kept_visual({}, once_endless).code(), Errc::too_many_tokens);
  EXPECT_EQ(check(once_endless, 8).code, Errc::too_many_tokens);
}

TEST(Hostile, SpansPastTheEvidenceAreNotScored) {
  float scratch[256], out[64];
  const TokenSpan past[] = {{6, 3}}, to_the_end[] = {{5, 3}};
  const Span<float> room(scratch), to(out);
  SoftmaxPart parts[2];
  EXPECT_EQ(score<float>({}, sound(), past, to, room).code, Errc::span_past_end);
  EXPECT_EQ(score<float>({}, probabilities(floats, 2, 1, 8), past, to).code, Errc::span_past_end);
  EXPECT_EQ(score<float>({}, KeysOnly<float>{keys_of(sound())}, past, to).code, Errc::span_past_end);
  EXPECT_EQ(score<float>({}, Scores<float>{{out, 3}, 8}, past, to).code, Errc::span_past_end);
  EXPECT_EQ(score_shard(sound(), past, Span<SoftmaxPart>(parts), to, room).code, Errc::span_past_end);
  EXPECT_EQ(score_shard(sound(), to_the_end, Span<SoftmaxPart>(parts), to, room).code, Errc::ok);
  KeysOnly<float> old{keys_of(sound()), 9};  // more earlier keys than there are
  EXPECT_EQ(score<float>({}, old, picture, to).code, Errc::no_tokens);
}

TEST(Hostile, SizesWhoseProductsOverflow) {
  Index table[4] = {0, 1, 2, 3};
  PagedRows pages{floats, table, huge, 64, 5, 8, 8};
  const Index kept[] = {0, 3};
  EXPECT_EQ(compact(Span<const Index>(kept), Span<const PagedRows>(&pages, 1)).code(), Errc::beyond_memory);
  pages.block_table = {};  // 5 tokens need a block, however large it claims to be
  EXPECT_EQ(compact(Span<const Index>(kept), Span<const PagedRows>(&pages, 1)).code(), Errc::block_table_short);

  volatile std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(huge / 2 - 7);  // g++ would warn of what it sees ahead
  const Rows wide{floats, 8, 4, 4, 8, stride};
  EXPECT_EQ(compact(Span<const Index>(kept), wide).code, Errc::beyond_memory);
  EXPECT_EQ(compact(Span<const Index>(kept), Rows{floats, 1, huge, 4}).code, Errc::beyond_memory);
  EXPECT_EQ(compact_mask(kept, floats, 4, huge / 4 + 2, 8).code, Errc::beyond_memory);

  auto evidence = sound();
  evidence.heads = huge / 2 + 1;
  EXPECT_EQ(check(evidence).code, Errc::beyond_memory);
  KeysOnly<float> endless{keys_of(sound())};
  endless.keys.tokens = huge;
  EXPECT_EQ(check(endless).code, Errc::too_many_tokens);
  EXPECT_EQ(unrotate(endless.keys, Rope{{floats, 2}, {indices, 8}}, Span<float>(floats, 64)).code,
            Errc::too_many_tokens);
  EXPECT_EQ(text_raters(floats, 8, 4, huge / 4, picture, {5, 3}, indices, Span<float>(floats, 64)).code(),
            Errc::beyond_memory);
}

// The strides of a contiguous tensor without rows are 0; nothing in it overlaps.
TEST(Hostile, TensorsWithoutRowsAreFine) {
  const Rows empty = position_axes(floats, 3, 0);
  EXPECT_EQ(compact(Span<const Index>(), empty).code, Errc::ok);
  EXPECT_EQ(gather(Span<const Index>(), position_axes(floats, 3, 8), empty).code, Errc::ok);
  const auto no_values = head_vectors(floats, 2, 0, 4, KvLayout::head_major);
  EXPECT_EQ(check(no_values, "key", "head stride", "token stride").code, Errc::ok);
}

TEST(Hostile, RowsOfNoBytesAreFine) {
  unsigned char byte = 7;
  const std::vector<Index> kept{0, 2};
  EXPECT_TRUE(compact(kept, Rows{&byte, 3, 0, 0}));
  EXPECT_EQ(byte, 7);
}

TEST(Hostile, WrongShapesAskForNoMemory) {
  auto evidence = sound();
  evidence.dim = std::size_t{1} << 40;  // its logits alone would fit, its query would not
  EXPECT_EQ(Pruner<>().prune(evidence, picture).code(), Errc::overlapping_stride);
}

// Sizes are summed up over the batch: one wrong shape must neither take the memory of all nor move their parts of it.
TEST(Hostile, OneSequencesShapeDoesNotHarmTheBatch) {
  Config config;
  const Request requests[] = {{config, picture, 0, 8}, {config, picture, 8, 8}};
  for (const std::size_t heads : {huge - 100, huge / 9, std::size_t{1} << 40, std::size_t{0}}) {
    BatchPruner<> pruner;
    const auto batch = pruner.prune(requests, [&](std::size_t i) {
      auto evidence = sound();
      if (i == 0) evidence.heads = heads;
      return evidence;
    });
    ASSERT_TRUE(batch) << batch.message().c_str();
    EXPECT_EQ(batch.failed, 1u);
    EXPECT_FALSE(batch.statuses[0]);
    EXPECT_TRUE(batch.statuses[1]);
    EXPECT_EQ(batch.sequence(0).size(), 8u);
    EXPECT_EQ(batch.sequence(1).size(), 6u);
  }
}

TEST(Hostile, ABatchLongerThanAnIndexCounts) {
  const Request requests[] = {{{}, picture, max_tokens - 4, 8}};
  const auto batch = BatchPruner<>().prune(requests, [](std::size_t) { return sound(); });
  EXPECT_EQ(batch.code(), Errc::too_many_tokens);
}

TEST(Hostile, NumbersThatDoNotDivideOrMatch) {
  float out[16];
  auto map = probabilities(floats, 3, 1, 8);
  map.value_norms = {floats, 2 * 4};  // of 2 KV heads, for 3 query heads
  EXPECT_EQ(score<float>({}, map, picture, Span<float>(out)).code, Errc::heads_not_divisible);
  const SoftmaxPart parts[2] = {};
  EXPECT_EQ(merge_shards(Span<const SoftmaxPart>(parts), 1, 0, {floats, 7}, Span<float>(out, 4)).code,
            Errc::scores_size);
}

TEST(Hostile, HiddenStatesThatOverflowRateNothing) {
  std::vector<float> hidden(8 * 4, 3e38f);
  EXPECT_EQ(text_raters(hidden.data(), 8, 4, 4, picture, {5, 3}, indices, Span<float>(floats, 64)).code(),
            Errc::all_scores_nan);
}

TEST(Hostile, FrequenciesThatAreNoneMakeNaN) {
  const float values[] = {oracle::infinity(), oracle::nan_float(), 1e30f};
  for (const float frequency : values) {
    const float frequencies[] = {frequency, 1}, key[] = {1, 1, 1, 1};
    const Index positions[] = {3};
    float out[4];
    ASSERT_TRUE(
        unrotate(head_vectors(key, 1, 1, 4, KvLayout::token_major), Rope{frequencies, positions}, Span<float>(out)));
    EXPECT_TRUE(oracle::is_nan(out[0]) && oracle::is_nan(out[2]));
    EXPECT_FALSE(oracle::is_nan(out[1]) || oracle::is_nan(out[3]));
  }
}

TEST(Hostile, ABudgetIsForTheModelOfThePrompt) {
  const ModelShape shape{huge, 8, 2, 1, 4, 16};
  EXPECT_EQ(settings_under({Budget::Of::flops, 1e9}, shape, {8, 6, picture}).code(), Errc::layers_differ);
}

}  // namespace

// Numbers and pointers that nobody should hand over: each is told, and nothing is read or written on their account.
// What the fuzz targets of tests/fuzz found, or were made to find, as plain tests.
#include <gtest/gtest.h>

#include "fastv/fastv.hpp"
#include "oracle.hpp"

namespace hostile_test {
namespace {

using namespace fastv;

constexpr std::size_t huge = static_cast<std::size_t>(-1);
const TokenSpan image[] = {{1, 4}};
float floats[4096];
Index indices[64];

template <class T>
Span<T> nowhere(std::size_t size) {
  return {nullptr, size};
}

Heads<float> keys() { return heads(floats, TokenMajor{8, 1, 4}); }
QueryKey<float> sound() { return query_key(heads(floats, TokenMajor{1, 2, 4}), keys(), 0.5f); }

// ---- rooms that are not there -------------------------------------------------------------------

TEST(Hostile, SelectionIntoNowhere) {
  const float scores[] = {1, 2, 3, 4};
  std::uint32_t scratch[16];
  const auto chosen = [&](Span<const float> given, Span<Index> kept, Span<std::uint32_t> work) {
    return select<float>({}, given, image, 8, kept, work).code();
  };
  EXPECT_EQ(chosen(scores, indices, scratch), Errc::ok);
  EXPECT_EQ(chosen(nowhere<const float>(4), indices, scratch), Errc::null_data);
  EXPECT_EQ(chosen(scores, nowhere<Index>(8), scratch), Errc::null_data);
  EXPECT_EQ(chosen(scores, indices, nowhere<std::uint32_t>(16)), Errc::null_data);
  EXPECT_EQ(image_quotas({}, image, nowhere<Index>(2)).code(), Errc::null_data);
  EXPECT_EQ(kept_visual({}, nowhere<const TokenSpan>(1)).code(), Errc::null_data);
}

TEST(Hostile, PlansOfNowhere) {
  Config stages[2];
  stages[1].filtering_layer = 3;
  Prompt prompt{8, 6, image};
  EXPECT_EQ(make_plan(Span<const Config>(stages), prompt).code(), Errc::ok);
  EXPECT_EQ(make_plan(nowhere<const Config>(2), prompt).code(), Errc::null_data);
  prompt.past = nowhere<const std::size_t>(1);
  EXPECT_EQ(make_plan(Span<const Config>(stages), prompt).code(), Errc::null_data);
  prompt.past = nowhere<const std::size_t>(6);
  EXPECT_EQ(make_plan(Span<const Config>(stages), prompt).code(), Errc::null_data);
  prompt = {8, 6, image};
  prompt.full_attention = nowhere<const bool>(6);
  EXPECT_EQ(make_plan(Span<const Config>(stages), prompt).code(), Errc::null_data);
  EXPECT_EQ(make_plan(Span<const Config>(stages), {8, 6, nowhere<const TokenSpan>(1)}).code(), Errc::null_data);
  const ModelShape shape{6, 8, 2, 1, 4, 16};
  EXPECT_EQ(settings_under({Budget::Of::seconds, 1, 2, 0, nowhere<const LayerTime>(2)}, shape, {8, 6, image}).code(),
            Errc::null_data);
}

TEST(Hostile, VerbsOnNowhere) {
  const Index kept[] = {0, 2};
  TokenSpan spans[1];
  const KeptRows rows(kept, 4);
  EXPECT_EQ(next_spans(nowhere<const Index>(2), image, spans).code(), Errc::null_data);
  EXPECT_EQ(next_spans(kept, nowhere<const TokenSpan>(1), spans).code(), Errc::null_data);
  EXPECT_EQ(next_spans(kept, image, nowhere<TokenSpan>(1)).code(), Errc::null_data);
  EXPECT_EQ(keep_bias(rows, nowhere<float>(4), 0).code, Errc::null_data);
  EXPECT_EQ(keep_bitmap(rows, nowhere<std::uint32_t>(1)).code, Errc::null_data);
  EXPECT_EQ(keep_bias(KeptRows({}, 0), nowhere<float>(4), 0).code, Errc::null_data)
      << "what follows the prompt is seen";
  EXPECT_EQ(keep_bitmap(KeptRows({}, 0), nowhere<std::uint32_t>(1)).code, Errc::null_data);
  EXPECT_EQ(keep_bias(KeptRows(nowhere<const Index>(2), 4), Span<float>(floats), 0).code, Errc::null_data);
  EXPECT_EQ(write_indices(kept, nowhere<std::int64_t>(2)).code, Errc::null_data);
  EXPECT_EQ(write_indices(nowhere<const Index>(2), Span<Index>(indices)).code, Errc::null_data);
  EXPECT_EQ(kept_visual_numbers(kept, image, nowhere<Index>(2)).code(), Errc::null_data);
  EXPECT_EQ(kept_visual_numbers(kept, nowhere<const TokenSpan>(1), indices).code(), Errc::null_data);
  EXPECT_EQ(for_each_run(nowhere<const Index>(2), [](std::size_t, std::size_t, std::size_t) {}).code, Errc::null_data);
  EXPECT_EQ(compact(kept, nowhere<Index>(4)).code, Errc::null_data);
  EXPECT_EQ(compact_pages(kept, nowhere<const KvPages>(1)).code(), Errc::null_data);
  EXPECT_EQ(repack_pages(kept, nowhere<const KvPages>(1)).code(), Errc::null_data);
}

TEST(Hostile, ScoresOfAndIntoNowhere) {
  float scratch[1024], out[64];
  const Span<float> room(scratch), to(out);
  EXPECT_EQ(score<float>({}, sound(), image, to, room).code, Errc::ok);
  EXPECT_EQ(score<float>({}, sound(), image, nowhere<float>(64), room).code, Errc::null_data);
  EXPECT_EQ(score<float>({}, sound(), image, to, nowhere<float>(1024)).code, Errc::null_data);
  EXPECT_EQ(score<float>({}, sound(), nowhere<const TokenSpan>(1), to, room).code, Errc::null_data);
  EXPECT_EQ(visible_tokens(image, 8, nowhere<Index>(2)).code, Errc::null_data);
  SoftmaxPart parts[2];
  EXPECT_EQ(score_shard(sound(), image, Span<SoftmaxPart>(parts), to, room).code, Errc::ok);
  EXPECT_EQ(score_shard(sound(), image, nowhere<SoftmaxPart>(2), to, room).code, Errc::null_data);
  EXPECT_EQ(score_shard(sound(), image, Span<SoftmaxPart>(parts), nowhere<float>(64), room).code, Errc::null_data);
  EXPECT_EQ(score_shard(sound(), image, Span<SoftmaxPart>(parts), to, nowhere<float>(1024)).code, Errc::null_data);
  const Span<const float> numerators(out, 8);
  const Span<float> merged(scratch, 4);
  EXPECT_EQ(merge_shards(Span<const SoftmaxPart>(parts), 1, 0, numerators, merged).code, Errc::ok);
  EXPECT_EQ(merge_shards(nowhere<const SoftmaxPart>(2), 1, 0, numerators, merged).code, Errc::null_data);
  EXPECT_EQ(merge_shards(Span<const SoftmaxPart>(parts), 1, 0, nowhere<const float>(8), merged).code, Errc::null_data);
  EXPECT_EQ(merge_shards(Span<const SoftmaxPart>(parts), 1, 0, numerators, nowhere<float>(4)).code, Errc::null_data);
  EXPECT_EQ(correct_by_prior(merged, nowhere<const float>(4)).code, Errc::null_data);
  EXPECT_EQ(correct_by_prior(nowhere<float>(4), {out, 4}).code, Errc::null_data);

  EXPECT_EQ(value_norms(keys(), image, nowhere<float>(64)).code, Errc::null_data);
  EXPECT_EQ(text_raters(floats, 8, 4, 4, image, {5, 3}, nowhere<Index>(3), room).code(), Errc::null_data);
  EXPECT_EQ(text_raters(floats, 8, 4, 4, image, {5, 3}, indices, nowhere<float>(6)).code(), Errc::null_data);
  const unsigned char axis[] = {0, 0};
  const Rope rope{{floats, 2}, {indices, 8}, axis};
  EXPECT_EQ(unrotate(keys(), rope, to).code, Errc::ok);
  EXPECT_EQ(unrotate(keys(), rope, nowhere<float>(64)).code, Errc::null_data);
  const auto no_evidence = [](std::size_t) { return NoEvidence{8}; };
  EXPECT_EQ(BatchPruner<>().prune(nowhere<const Request>(1), no_evidence).code(), Errc::null_data);
}

// ---- numbers that fit nothing -------------------------------------------------------------------

TEST(Hostile, SettingsAndSpansGivenStraightToTheQuotas) {
  Config config;
  config.filtering_ratio = 2;  // would round a negative number to a count
  EXPECT_EQ(kept_visual(config, image).code(), Errc::bad_setting);
  EXPECT_EQ(image_quotas(config, image, indices).code(), Errc::bad_setting);
  const TokenSpan endless[] = {{0, huge}}, once_endless[] = {{1, 4, 0, false, huge}};
  EXPECT_EQ(kept_visual({}, endless).code(), Errc::bad_prompt);
  EXPECT_EQ(kept_visual({}, once_endless).code(), Errc::bad_prompt);
  EXPECT_EQ(validate(once_endless, 8).code, Errc::bad_prompt);
  config = {};
  config.min_per_image = huge;
  EXPECT_EQ(*kept_visual(config, image), 4u);
  config.keep_count = huge - 1;
  EXPECT_EQ(kept_visual(config, image).code(), Errc::bad_setting);
}

TEST(Hostile, SpansPastTheEvidenceAreNotScored) {
  float scratch[1024], out[64];
  const TokenSpan past[] = {{6, 3}}, to_the_end[] = {{5, 3}};
  const Span<float> room(scratch), to(out);
  SoftmaxPart parts[2];
  EXPECT_EQ(score<float>({}, sound(), past, to, room).code, Errc::bad_prompt);
  EXPECT_EQ(score<float>({}, probabilities(floats, 2, 1, 8), past, to).code, Errc::bad_prompt);
  EXPECT_EQ(score<float>({}, KeysOnly{keys()}, past, to, room).code, Errc::bad_prompt);
  EXPECT_EQ(score<float>({}, Scores<float>{{out, 3}, 8}, past, to).code, Errc::bad_prompt);
  EXPECT_EQ(score_shard(sound(), past, Span<SoftmaxPart>(parts), to, room).code, Errc::bad_prompt);
  EXPECT_EQ(score_shard(sound(), to_the_end, Span<SoftmaxPart>(parts), to, room).code, Errc::ok);
  EXPECT_EQ(score<float>({}, KeysOnly{keys(), 9}, image, to, room).code, Errc::bad_shape)
      << "more earlier keys than keys";
}

// The product of the sides wraps around to 0, which looks like windows of few tokens.
TEST(Hostile, WindowsWhoseAreaOverflows) {
  const TokenSpan grid[] = {{0, 1024, 32}};
  std::vector<float> scores(1024);
  for (std::size_t i = 0; i < scores.size(); ++i) scores[i] = static_cast<float>(i * 7 % 1024) + 1;
  Config config;
  const auto kept_by = [&] {
    std::vector<Index> kept(1025);
    std::vector<std::uint32_t> scratch(select_scratch(config, grid));
    const auto selected = select<float>(config, scores, grid, 1025, Span<Index>(kept), Span<std::uint32_t>(scratch));
    EXPECT_TRUE(selected) << selected.message().c_str();
    kept.resize(selected->count);
    return kept;
  };
  const std::vector<Index> whole = kept_by();
  for (const std::size_t side : {std::size_t{1} << 32, huge, huge / 2 + 1}) {
    config.window_rows = config.window_columns = side;
    EXPECT_EQ(kept_by(), whole) << side;
  }
}

// The grid of an image is asked for by all its tokens, not by those of its first span.
TEST(Hostile, WindowsOverAnImageWhoseFirstSpanIsEmpty) {
  const TokenSpan spans[] = {{0, 0, 0, false, 3}, {0, 4, 0, true}};
  const float scores[] = {1, 2, 3, 4};
  Config config;
  config.window_rows = config.window_columns = 2;
  EXPECT_EQ(Pruner<>(config).prune(Scores<float>{scores, 8}, spans).code(), Errc::bad_prompt);
}

TEST(Hostile, SizesWhoseProductsOverflow) {
  Index table[4] = {0, 1, 2, 3};
  const Index kept[] = {0, 3};
  KvPages cache{floats, table, huge, 64, 5, 8, 8};
  EXPECT_EQ(compact_pages(kept, cache).code(), Errc::bad_stride);
  cache.block_table = {};  // 5 tokens need a block, however large it claims to be
  EXPECT_EQ(compact_pages(kept, cache).code(), Errc::bad_pages);

  volatile std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(huge / 2 - 7);  // g++ would warn of what it sees ahead
  const Rows wide{floats, 8, 4, 4, 8, stride};
  EXPECT_EQ(compact(kept, wide).code, Errc::bad_stride);
  EXPECT_EQ(compact(kept, Rows{floats, 4, huge, 4}).code, Errc::bad_stride);
  EXPECT_EQ(compact_mask(kept, rows(floats, 4, huge / 4 + 2)).code, Errc::bad_shape);
  EXPECT_EQ(compact(kept, rows(floats, 4, huge / 4 + 2)).code, Errc::bad_stride);
  EXPECT_EQ(compact(kept, rows(floats, TokenMajor{4, huge / 2, 9})).code, Errc::bad_stride);
  EXPECT_EQ(compact(kept, rows(floats, HeadMajor{2, 4, 9, huge / 2})).code, Errc::bad_stride);
  EXPECT_EQ(compact(kept, position_axes(floats, huge, 4)).code, Errc::bad_stride);
  EXPECT_EQ(compact_pages(kept, pages(floats, ChunkedHeadMajor{huge / 2, huge / 2, 4, huge / 2}, table, 5)).code(),
            Errc::bad_stride);

  const auto of_keys = [](const Heads<float>& key) {
    auto evidence = sound();
    evidence.key = key;
    return evidence.check().code;
  };
  EXPECT_EQ(of_keys(heads(floats, TokenMajor{8, huge / 2 + 1, 4})), Errc::bad_shape);
  EXPECT_EQ(of_keys(heads(floats, TokenMajor{8, 1, huge / 2 + 1})), Errc::bad_stride);
  EXPECT_EQ(of_keys(heads(floats, HeadMajor{2, 8, 4, huge / 2})), Errc::bad_stride);
  EXPECT_EQ(of_keys(heads(floats, TokenMajor{huge, 1, 4})), Errc::bad_shape);
  EXPECT_EQ(of_keys(heads(floats, HeadMajor{1, huge, 4})), Errc::bad_shape);
  EXPECT_EQ(of_keys(heads(floats, TokenMajor{huge / 2, 2, huge / 2}, table, 8)), Errc::bad_stride);
  const Heads<float> endless = heads(floats, TokenMajor{huge, 1, 4});
  EXPECT_EQ(KeysOnly{endless}.check().code, Errc::bad_shape);
  EXPECT_EQ(unrotate(endless, Rope{{floats, 2}, {indices, 8}}, Span<float>(floats, 64)).code, Errc::bad_shape);
  EXPECT_EQ(text_raters(floats, 8, 4, huge / 4, image, {5, 3}, indices, Span<float>(floats, 64)).code(),
            Errc::bad_stride);
}

// ---- nothing, very often ------------------------------------------------------------------------

// The strides of a contiguous tensor without rows are 0; nothing in it overlaps.
TEST(Hostile, TensorsWithoutRowsAreFine) {
  const std::vector<Index> none;
  const Rows empty = position_axes(floats, 3, 0);
  EXPECT_EQ(compact(none, empty).code, Errc::ok);
  EXPECT_EQ(gather(none, position_axes(floats, 3, 8), empty).code, Errc::ok);
  EXPECT_EQ(compact(none, Rows{nullptr, 0, 4, 4}).code, Errc::ok);
  EXPECT_EQ(detail::check_heads(heads(static_cast<const float*>(nullptr), HeadMajor{2, 0, 4}), "key").code, Errc::ok);
}

TEST(Hostile, RowsOfNoBytesAreFine) {
  unsigned char byte = 7;
  const std::vector<Index> kept{0, 2};
  EXPECT_TRUE(compact(kept, Rows{&byte, 3, 0, 0}));
  EXPECT_TRUE(gather(kept, Rows{&byte, 3, 0, 0}, Rows{&byte, 3, 0, 0}));
  EXPECT_EQ(byte, 7);
}

// Plane by plane, each of these would take centuries.
TEST(Hostile, NoRowsInVeryManyPlanesTakeNoTime) {
  const std::vector<Index> none, kept{0, 2};
  unsigned char byte = 7;
  EXPECT_TRUE(compact(none, position_axes(&byte, huge, 0)));
  EXPECT_TRUE(compact(none, Rows{&byte, 0, 4, 4, huge, 4}));
  EXPECT_TRUE(gather(none, Rows{&byte, 0, 4, 4, huge, 4}, Rows{&byte, 0, 4, 4, huge, 4}));
  EXPECT_TRUE(compact(kept, Rows{&byte, 3, 0, 0, huge, 0}));
  EXPECT_TRUE(compact(kept, Rows{&byte, 3, 0, 0, huge, 0, true}));
  EXPECT_TRUE(compact(none, Rows{&byte, 3, 1, 1, std::size_t{1} << 57, 3, true})) << "none of three";
  Index table[] = {0, 1};
  const KvPages cache{&byte, table, 2, 0, 4, 0, 0, huge, 0};
  EXPECT_TRUE(compact_pages(kept, cache));
  EXPECT_TRUE(repack_pages(kept, Span<const KvPages>(&cache, 1)));
  EXPECT_EQ(byte, 7);
}

TEST(Hostile, WrongShapesAskForNoMemory) {
  auto evidence = sound();
  evidence.query.dim = evidence.key.dim = std::size_t{1} << 40;  // its logits alone would fit, its query would not
  EXPECT_EQ(Pruner<>().prune(evidence, image).code(), Errc::bad_stride);
}

// ---- batches ------------------------------------------------------------------------------------

// Sizes are summed up over the batch: one wrong shape must neither take the memory of all nor move their parts of it.
TEST(Hostile, OneSequencesShapeDoesNotHarmTheBatch) {
  Config config;
  const Request requests[] = {{config, image, 0, 8}, {config, image, 8, 8}};
  for (const std::size_t wrong : {huge - 100, huge / 9, std::size_t{1} << 40, std::size_t{0}}) {
    BatchPruner<> pruner;
    const auto batch = pruner.prune(requests, [&](std::size_t i) {
      auto evidence = sound();
      if (i == 0) evidence.query.heads = wrong;
      return evidence;
    });
    ASSERT_TRUE(batch) << batch.message().c_str();
    EXPECT_EQ(batch.failed, 1u);
    EXPECT_FALSE(batch.sequences[0]);
    EXPECT_TRUE(batch.sequences[1]);
    EXPECT_EQ(batch.sequence(0).indices.size(), 8u);
    EXPECT_EQ(batch.sequence(1).indices.size(), 6u);
  }
}

TEST(Hostile, ABatchLongerThanAnIndexCounts) {
  const Request requests[] = {{{}, image, max_tokens - 4, 8}};
  const auto batch = BatchPruner<>().prune(requests, [](std::size_t) { return sound(); });
  EXPECT_EQ(batch.code(), Errc::bad_prompt);
}

// ---- values -------------------------------------------------------------------------------------

// Typed data is read where it lies: an address between two elements is told, and nothing is read there.
TEST(Hostile, MisalignedDataIsRefused) {
  alignas(16) static unsigned char bytes[4096] = {};
  const auto* crooked = reinterpret_cast<const float*>(bytes + 2);
  const auto* crooked_half = reinterpret_cast<const half*>(bytes + 1);
  const auto* crooked_double = reinterpret_cast<const double*>(bytes + 4);
  float scratch[1024], out[64];
  const Span<float> room(scratch), to(out);
  const auto told = [](const Status& status, const char* what, const char* alignment) {
    EXPECT_EQ(status.code, Errc::bad_stride);
    const std::string sentence = status.message().c_str();
    EXPECT_NE(sentence.find(what), std::string::npos) << sentence;
    EXPECT_NE(sentence.find(std::string("multiple of ") + alignment), std::string::npos) << sentence;
  };
  auto evidence = sound();
  evidence.query.data = crooked;
  told(score<float>({}, evidence, image, to, room), "query", "4");
  evidence = sound();
  evidence.key.data = crooked;
  told(score<float>({}, evidence, image, to, room), "key", "4");
  told(score<float>({}, query_key(heads(floats, TokenMajor{1, 2, 4}), heads(crooked_half, TokenMajor{8, 1, 4}), 0.5f),
                    image, to, room),
       "key", "2");
  told(score<float>({}, probabilities(crooked, 2, 1, 8), image, to), "probabilities", "4");
  told(score<float>({}, probabilities(crooked_double, 2, 1, 8), image, to), "probabilities", "8");
  told(score<float>({}, Scores<float>{{crooked, 4}, 8}, image, to), "scores", "4");
  told(score<float>({}, KeysOnly{heads(crooked, TokenMajor{8, 1, 4})}, image, to, room), "key", "4");
  told(value_norms(heads(crooked, TokenMajor{8, 1, 4}), image, to), "value", "4");
  told(unrotate(heads(crooked, TokenMajor{8, 1, 4}), Rope{{floats, 2}, {indices, 8}}, to), "key", "4");
  told(text_raters(crooked, 8, 4, 4, image, {5, 3}, indices, room).status, "hidden states", "4");
  std::uint32_t marks[16];
  told(select<float>({}, {crooked, 4}, image, 8, indices, marks).status, "scores", "4");
  told(Pruner<>().prune(probabilities(crooked, 2, 1, 8), image).status, "probabilities", "4");
  // Bytes lie anywhere.
  const std::vector<Index> kept{0, 2};
  EXPECT_TRUE(compact(kept, rows(reinterpret_cast<float*>(bytes + 1), 4, 4)));
}

TEST(Hostile, NumbersThatDoNotDivideOrMatch) {
  float out[16];
  auto map = probabilities(floats, 3, 1, 8);
  map.value_norms = {floats, 2 * 4};  // of 2 KV heads, for 3 query heads
  EXPECT_EQ(score<float>({}, map, image, Span<float>(out)).code, Errc::bad_shape);
  const SoftmaxPart parts[2] = {};
  EXPECT_EQ(merge_shards(Span<const SoftmaxPart>(parts), 1, 0, {floats, 7}, Span<float>(out, 4)).code, Errc::bad_shape);
}

TEST(Hostile, HiddenStatesThatOverflowRateNothing) {
  std::vector<float> hidden(8 * 4, 3e38f);
  EXPECT_EQ(text_raters(hidden.data(), 8, 4, 4, image, {5, 3}, indices, Span<float>(floats, 64)).code(),
            Errc::bad_value);
}

TEST(Hostile, FrequenciesThatAreNoneMakeNaN) {
  const float values[] = {oracle::infinity(), oracle::nan_float(), 1e30f};
  for (const float frequency : values) {
    const float frequencies[] = {frequency, 1}, key[] = {1, 1, 1, 1};
    const Index positions[] = {3};
    float out[4];
    ASSERT_TRUE(unrotate(heads(key, TokenMajor{1, 1, 4}), Rope{frequencies, positions}, Span<float>(out)));
    EXPECT_TRUE(oracle::is_nan(out[0]) && oracle::is_nan(out[2]));
    EXPECT_FALSE(oracle::is_nan(out[1]) || oracle::is_nan(out[3]));
  }
}

TEST(Hostile, ABudgetIsForTheModelOfThePrompt) {
  const ModelShape shape{huge, 8, 2, 1, 4, 16};
  EXPECT_EQ(settings_under({Budget::Of::flops, 1e9}, shape, {8, 6, image}).code(), Errc::bad_setting);
}

}  // namespace
}  // namespace hostile_test

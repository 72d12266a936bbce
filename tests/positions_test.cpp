// What the engine does itself with kept indices: position ids, masks over a full cache, lists in its own integer type,
// runs, and rows of tensors that hold visual tokens alone.
#include <gtest/gtest.h>

#include "fastv/apply.hpp"
#include "oracle.hpp"

namespace positions_test {
namespace {

using namespace fastv;
using oracle::Rng;

std::vector<Index> random_kept(Rng& rng, std::size_t tokens) {
  const double share = rng.chance(0.2) ? static_cast<double>(rng.below(2)) : rng.real();
  std::vector<Index> kept;
  for (std::size_t t = 0; t < tokens; ++t)
    if (rng.chance(share)) kept.push_back(static_cast<Index>(t));
  return kept;
}
Kept failed() {
  Kept kept;
  kept.status = fail(Errc::out_of_memory, "of some other call");
  return kept;
}

// ---- position ids -------------------------------------------------------------------------------

TEST(Positions, NextIsTheGreatestOfAllAxesPlusOne) {
  // Qwen2-VL: two text tokens, an image of 2 x 3 at t = 2, then text from the greatest position on.
  const std::vector<std::int32_t> axes = {0, 1, 2, 2, 2, 2, 2, 2, 5, 6,   // t
                                          0, 1, 2, 2, 2, 3, 3, 3, 5, 6,   // y
                                          0, 1, 2, 3, 4, 2, 3, 4, 5, 6};  // x
  EXPECT_EQ(next_position(Span<const std::int32_t>(axes)), 7);
  EXPECT_EQ(next_position(Span<const std::int64_t>()), 0);
  const Index ids[] = {0, 1, 2, 9, 3};
  EXPECT_EQ(next_position(Span<const Index>(ids)), 10u);
  EXPECT_EQ(next_position(Span<const Index>()), 0u);
  const std::int64_t signed_ids[] = {4, -1, 2};
  EXPECT_EQ(next_position(Span<const std::int64_t>(signed_ids)), 5);
}

TEST(Positions, OfSeveralAxesEndSideBySide) {
  Rng rng(7);
  for (int draw = 0; draw < 500; ++draw) {
    const std::size_t axes = rng.between(1, 4), tokens = rng.between(1, 40);
    std::vector<std::int32_t> ids(axes * tokens);
    for (std::int32_t& id : ids) id = static_cast<std::int32_t>(rng.below(1000));
    const std::vector<Index> kept = random_kept(rng, tokens);
    std::vector<std::int32_t> expected;
    for (std::size_t axis = 0; axis < axes; ++axis)
      for (const Index index : kept) expected.push_back(ids[axis * tokens + index]);
    ASSERT_TRUE(compact(kept, position_axes(ids.data(), axes, tokens)));
    ids.resize(expected.size());
    ASSERT_EQ(ids, expected) << axes << " axes of " << tokens;
  }
}

TEST(Positions, NeedOnePerPromptToken) {
  const std::vector<Index> indices = {0, 2};
  Kept kept;
  kept.indices = indices;
  kept.prompt_tokens = 5;
  std::int32_t ids[12] = {};
  EXPECT_TRUE(compact(kept, position_axes(ids, 2, 5)));
  EXPECT_EQ(compact(kept, position_axes(ids, 2, 6)).code, Errc::bad_shape);
  EXPECT_EQ(compact(failed(), position_axes(ids, 2, 5)).code, Errc::out_of_memory);
}

// ---- masks over a full cache --------------------------------------------------------------------

TEST(KeepMasks, BiasAndBitmapHideJustTheDropped) {
  Rng rng(6);
  for (int round = 0; round < 500; ++round) {
    const std::size_t tokens = rng.between(1, 100), decoded = rng.between(0, 40);
    const std::vector<Index> kept = random_kept(rng, tokens);
    std::vector<float> bias(tokens + decoded, 7.0f);
    std::vector<std::uint32_t> bitmap((tokens + decoded + 31) / 32, 0x12345678u);
    ASSERT_TRUE(keep_bias(KeptRows(kept, tokens), Span<float>(bias), -oracle::infinity()));
    ASSERT_TRUE(keep_bitmap(KeptRows(kept, tokens), Span<std::uint32_t>(bitmap)));
    for (std::size_t t = 0; t < bitmap.size() * 32; ++t) {
      const bool seen = t >= tokens || std::count(kept.begin(), kept.end(), static_cast<Index>(t)) > 0;
      ASSERT_EQ((bitmap[t / 32] >> (t % 32)) & 1u, seen ? 1u : 0u);
      if (t < bias.size()) {
        ASSERT_EQ(bias[t], seen ? 0.0f : -oracle::infinity());
      }
    }
  }
}

TEST(KeepMasks, TakeWhatPruneReturned) {
  const std::vector<Index> indices = {0, 2};
  Kept kept;
  kept.indices = indices;
  kept.prompt_tokens = 3;
  float bias[4];
  ASSERT_TRUE(keep_bias(kept, bias, -1.0f));
  EXPECT_EQ(std::vector<float>(bias, bias + 4), (std::vector<float>{0, -1, 0, 0}));
  std::uint32_t bitmap[1];
  ASSERT_TRUE(keep_bitmap(kept, bitmap));
  EXPECT_EQ(bitmap[0], ~2u);
  EXPECT_EQ(keep_bias(failed(), bias, -1.0f).code, Errc::out_of_memory);
  EXPECT_EQ(keep_bitmap(failed(), bitmap).code, Errc::out_of_memory);
}

TEST(KeepMasks, AreRefusedWhereTheyWouldBeWrong) {
  const std::vector<Index> kept = {2, 5};
  std::vector<float> bias(4, 7.0f);
  std::vector<std::uint32_t> none;
  EXPECT_EQ(keep_bias(kept, bias, -1).code, Errc::bad_shape) << "a list of indices is of an unknown prompt";
  EXPECT_EQ(keep_bitmap(kept, none).code, Errc::bad_shape);
  EXPECT_EQ(keep_bias(KeptRows(kept, 5), bias, -1).code, Errc::bad_index);
  EXPECT_EQ(keep_bias(KeptRows(kept, 6), bias, -1).code, Errc::too_small);
  EXPECT_EQ(keep_bitmap(KeptRows(kept, 6), none).code, Errc::too_small);
  EXPECT_EQ(bias, std::vector<float>(4, 7.0f)) << "nothing was written";
}

// ---- lists of indices ---------------------------------------------------------------------------

template <class Integer>
void expect_written() {
  Rng rng(8);
  for (int draw = 0; draw < 100; ++draw) {
    const std::vector<Index> kept = random_kept(rng, 60);
    const auto offset = static_cast<Integer>(rng.below(60));
    std::vector<Integer> out(kept.size() + 2, Integer{77});
    ASSERT_TRUE(write_indices(kept, Span<Integer>(out), offset));
    for (std::size_t i = 0; i < kept.size(); ++i) ASSERT_EQ(out[i], static_cast<Integer>(kept[i]) + offset);
    ASSERT_EQ(out[kept.size()], Integer{77});
    ASSERT_EQ(out[kept.size() + 1], Integer{77});
    std::fill(out.begin(), out.end(), Integer{77});
    ASSERT_TRUE(write_indices(kept, Span<Integer>(out)));
    for (std::size_t i = 0; i < kept.size(); ++i) ASSERT_EQ(out[i], static_cast<Integer>(kept[i]));
  }
}

TEST(WriteIndices, InTheEnginesIntegerType) {
  expect_written<std::int32_t>();
  expect_written<std::int64_t>();
  expect_written<std::uint32_t>();
  expect_written<long>();
}

TEST(WriteIndices, RefuseTooLittleRoomAndIndicesOutOfOrder) {
  std::int64_t out[2];
  EXPECT_EQ(write_indices(std::vector<Index>{0, 1, 2}, Span<std::int64_t>(out)).code, Errc::too_small);
  EXPECT_EQ(write_indices(std::vector<Index>{1, 1}, Span<std::int64_t>(out)).code, Errc::bad_index);
  EXPECT_EQ(write_indices(failed(), Span<std::int64_t>(out)).code, Errc::out_of_memory);
}

TEST(ForEachRun, CoversTheKeptRowsInAsFewRunsAsCanBe) {
  Rng rng(9);
  for (int draw = 0; draw < 500; ++draw) {
    const std::vector<Index> kept = random_kept(rng, rng.between(1, 60));
    std::vector<Index> covered;
    std::size_t previous_end = 0, runs = 0;
    ASSERT_TRUE(for_each_run(kept, [&](std::size_t target, std::size_t source, std::size_t rows) {
      EXPECT_EQ(target, covered.size());
      EXPECT_GE(rows, 1u);
      if (runs > 0) {
        EXPECT_GT(source, previous_end) << "two neighbouring runs would be one";
      }
      for (std::size_t i = 0; i < rows; ++i) covered.push_back(static_cast<Index>(source + i));
      previous_end = source + rows;
      ++runs;
    }));
    ASSERT_EQ(covered, kept);
  }
}

TEST(ForEachRun, CallsNothingWhereSomethingIsWrong) {
  int calls = 0;
  const auto count = [&](std::size_t, std::size_t, std::size_t) { ++calls; };
  EXPECT_EQ(for_each_run(std::vector<Index>{3, 2}, count).code, Errc::bad_index);
  EXPECT_EQ(for_each_run(failed(), count).code, Errc::out_of_memory);
  EXPECT_TRUE(for_each_run(std::vector<Index>(), count));
  EXPECT_EQ(calls, 0);
}

// ---- visual tokens alone ------------------------------------------------------------------------

TEST(KeptVisualNumbers, AreTheRowsOfTensorsThatHoldVisualTokensAlone) {
  Rng rng(10);
  for (int draw = 0; draw < 1000; ++draw) {
    const oracle::Layout layout = oracle::random_layout(rng, 5, 12);
    const std::vector<Index> kept = random_kept(rng, layout.tokens);
    std::vector<Index> expected;
    std::size_t number = 0;
    for (const TokenSpan& span : layout.visual)
      for (std::size_t i = 0; i < span.count; ++i, ++number)
        if (std::count(kept.begin(), kept.end(), static_cast<Index>(span.first + i)) > 0)
          expected.push_back(static_cast<Index>(number));
    std::vector<Index> numbers(expected.size() + 1, Index{99999});
    const auto written = kept_visual_numbers(kept, layout.visual, numbers);
    ASSERT_TRUE(written) << written.message().c_str();
    ASSERT_EQ(*written, expected.size());
    ASSERT_EQ(numbers.back(), 99999u);
    numbers.pop_back();
    ASSERT_EQ(numbers, expected);
    if (expected.empty()) continue;
    numbers.pop_back();
    ASSERT_EQ(kept_visual_numbers(kept, layout.visual, numbers).code(), Errc::too_small);
  }
}

TEST(KeptVisualNumbers, RefuseWhatIsWrong) {
  const std::vector<TokenSpan> visual = {{1, 3}, {6, 2}}, unsorted = {{6, 2}, {1, 3}};
  Index numbers[5];
  EXPECT_EQ(kept_visual_numbers(std::vector<Index>{2, 1}, visual, numbers).code(), Errc::bad_index);
  EXPECT_EQ(kept_visual_numbers(std::vector<Index>{1, 2}, unsorted, numbers).code(), Errc::bad_prompt);
  EXPECT_EQ(kept_visual_numbers(failed(), visual, numbers).code(), Errc::out_of_memory);
}

}  // namespace
}  // namespace positions_test

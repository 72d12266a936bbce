// Moving rows against a loop over bytes.
#include "fastv/apply.hpp"

#include <gtest/gtest.h>

#include <array>

#include "fastv/eigen.hpp"
#include "fastv/fastv.hpp"
#include "oracle.hpp"
#include "refused.hpp"

namespace apply_test {
namespace {

using namespace fastv;
using Bytes = std::vector<unsigned char>;

Bytes random_bytes(oracle::Rng& rng, std::size_t size) {
  Bytes bytes(size);
  for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(rng.next());
  return bytes;
}
std::vector<Index> random_kept(oracle::Rng& rng, std::size_t count) {
  const double share = rng.chance(0.2) ? static_cast<double>(rng.below(2)) : rng.real();
  std::vector<Index> kept;
  for (std::size_t i = 0; i < count; ++i)
    if (rng.chance(share)) kept.push_back(static_cast<Index>(i));
  return kept;
}

std::size_t start_of(const Rows& rows, std::size_t plane, std::size_t row) {
  return plane * static_cast<std::size_t>(rows.plane_stride) + row * static_cast<std::size_t>(rows.row_stride);
}
// `to` after the kept rows of `from` were copied to its front: byte by byte, out of place.
Bytes gathered(const std::vector<Index>& kept, const Bytes& from, const Rows& from_rows, Bytes to,
               const Rows& to_rows) {
  for (std::size_t plane = 0; plane < from_rows.planes; ++plane)
    for (std::size_t row = 0; row < kept.size(); ++row)
      for (std::size_t byte = 0; byte < from_rows.row_bytes; ++byte)
        to[start_of(to_rows, plane, row) + byte] = from[start_of(from_rows, plane, kept[row]) + byte];
  return to;
}

// Rows of `row_bytes` in `planes` planes with random gaps, the planes outside or inside the rows.
struct Tensor {
  Bytes bytes;
  Rows rows;
  Tensor(oracle::Rng& rng, std::size_t planes, std::size_t count, std::size_t row_bytes) {
    const std::size_t gap = rng.chance(0.4) ? 0 : rng.between(1, 9);
    const bool inside = rng.chance(0.3);
    const std::size_t inner = row_bytes + gap, outer = inner * (inside ? planes : count) + (rng.chance(0.5) ? 0 : 5);
    bytes = random_bytes(rng, outer * (inside ? count : planes) + 3);
    rows = {bytes.data(), count,
            row_bytes,    static_cast<std::ptrdiff_t>(inside ? outer : inner),
            planes,       static_cast<std::ptrdiff_t>(inside ? inner : outer)};
  }
  Tensor(const Tensor&) = delete;
};

TEST(Compact, EqualsAByteLoopForRowsOf1To77BytesAnyStrideAndPlanes) {
  oracle::Rng rng(40);
  for (std::size_t row_bytes = 1; row_bytes <= 77; ++row_bytes)
    for (int draw = 0; draw < 20; ++draw) {
      const std::size_t count = rng.between(1, 30);
      Tensor tensor(rng, rng.between(1, 20), count, row_bytes);
      const auto kept = random_kept(rng, count);
      const Bytes expected = gathered(kept, tensor.bytes, tensor.rows, tensor.bytes, tensor.rows);
      ASSERT_TRUE(compact(kept, tensor.rows));
      ASSERT_EQ(tensor.bytes, expected) << row_bytes << " bytes, draw " << draw;  // gaps and rows behind included
    }
}

TEST(Gather, EqualsAByteLoopBetweenTensorsOfDifferentStrides) {
  oracle::Rng rng(41);
  for (std::size_t row_bytes = 1; row_bytes <= 77; ++row_bytes)
    for (int draw = 0; draw < 20; ++draw) {
      const std::size_t count = rng.between(1, 30), planes = rng.between(1, 20);
      const auto kept = random_kept(rng, count);
      const Tensor from(rng, planes, count, row_bytes);
      Tensor to(rng, planes, std::max<std::size_t>(1, kept.size() + rng.below(3)), row_bytes);
      const Bytes source = from.bytes, expected = gathered(kept, from.bytes, from.rows, to.bytes, to.rows);
      ASSERT_TRUE(gather(kept, from.rows, to.rows));
      ASSERT_EQ(to.bytes, expected) << row_bytes << " bytes, draw " << draw;
      ASSERT_EQ(from.bytes, source) << "the source is only read";
    }
}

// Rows long enough for every path of move_rows(): short runs by blocks of 32 bytes, long ones by memmove.
TEST(Compact, EqualsAByteLoopForLongRows) {
  oracle::Rng rng(45);
  for (const std::size_t row_bytes :
       {31u, 32u, 33u, 63u, 64u, 65u, 96u, 127u, 128u, 200u, 256u, 1023u, 1024u, 1025u, 4096u})
    for (int draw = 0; draw < 12; ++draw) {
      const std::size_t count = rng.between(1, 90);
      Tensor tensor(rng, rng.between(1, 6), count, row_bytes);
      const auto kept = random_kept(rng, count);
      const Bytes expected = gathered(kept, tensor.bytes, tensor.rows, tensor.bytes, tensor.rows);
      ASSERT_TRUE(compact(kept, tensor.rows));
      ASSERT_EQ(tensor.bytes, expected) << row_bytes << " bytes, draw " << draw;
    }
}

TEST(Compact, KeepingEverythingOrNothingLeavesEveryByte) {
  oracle::Rng rng(42);
  Tensor tensor(rng, 3, 10, 7);
  const Bytes before = tensor.bytes;
  std::vector<Index> all(10);
  std::iota(all.begin(), all.end(), Index{0});
  EXPECT_TRUE(compact(all, tensor.rows));
  EXPECT_TRUE(compact(std::vector<Index>{}, tensor.rows));
  EXPECT_EQ(tensor.bytes, before);
  EXPECT_TRUE(compact(std::vector<Index>{}, Rows{nullptr, 0, 4, 4})) << "an empty tensor needs no memory";
}

// ---- what engines hold --------------------------------------------------------------------------

const std::vector<Index> kept_of_10 = {0, 1, 4, 5, 6, 9};

// What prune() returns for kept_of_10, as if ten tokens had been pruned.
Kept pruned_10() {
  Kept kept;
  kept.indices = kept_of_10;
  kept.prompt_tokens = 10;
  return kept;
}

TEST(Compact, PositionsOnOneAxis) {
  std::vector<std::int64_t> positions = {100, 101, 102, 103, 104, 105, 106, 107, 108, 109};
  ASSERT_TRUE(compact(kept_of_10, positions));
  EXPECT_EQ(positions.size(), 10u) << "the size is the caller's";
  positions.resize(6);
  EXPECT_EQ(positions, (std::vector<std::int64_t>{100, 101, 104, 105, 106, 109}));
}

// [axes, n] ends as [axes, m], without gaps: what a model takes next.
template <class Id>
void expect_packed_axes(std::size_t axes, std::size_t count, const std::vector<Index>& kept) {
  std::vector<Id> ids(axes * count), expected;
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<Id>(3 * i + 1);
  for (std::size_t axis = 0; axis < axes; ++axis)
    for (const Index index : kept) expected.push_back(ids[axis * count + index]);
  ASSERT_TRUE(compact(kept, position_axes(ids.data(), axes, count)));
  ids.resize(expected.size());
  ASSERT_EQ(ids, expected) << axes << " axes of " << count << ", " << kept.size() << " kept";
}

TEST(PositionAxes, EndSideBySide) {
  oracle::Rng rng(46);
  for (const std::size_t axes : {1u, 2u, 3u, 4u})
    for (int draw = 0; draw < 60; ++draw) {
      const std::size_t count = rng.between(1, 700);
      std::vector<Index> all(count);
      std::iota(all.begin(), all.end(), Index{0});
      for (const std::vector<Index>& kept :
           {random_kept(rng, count), std::vector<Index>{static_cast<Index>(rng.below(count))}, all,
            std::vector<Index>{}}) {
        expect_packed_axes<std::int64_t>(axes, count, kept);
        expect_packed_axes<std::int32_t>(axes, count, kept);
        expect_packed_axes<std::uint16_t>(axes, count, kept);
        if (HasFatalFailure()) return;
      }
    }
}

TEST(PositionAxes, WithAGapBetweenRowsCannotBePacked) {
  std::vector<std::int32_t> ids(60);
  Rows axes = position_axes(ids.data(), 3, 10);
  axes.row_stride = 8;
  axes.plane_stride = 80;
  EXPECT_TRUE(refused(compact(kept_of_10, axes), Errc::bad_stride, "8 for rows of 4"));
}

TEST(Compact, KvCachesOfBothLayoutsWithSpareCapacity) {
  const std::size_t count = 10, heads = 3, dim = 4, capacity = 16;
  const auto value = [](std::size_t token, std::size_t head, std::size_t d) {
    return static_cast<std::uint16_t>(token * 100 + head * 10 + d);
  };
  for (const bool by_tokens : {true, false}) {
    const auto at = [&](std::size_t token, std::size_t head, std::size_t d) {
      return by_tokens ? (token * heads + head) * dim + d : (head * capacity + token) * dim + d;
    };
    std::vector<std::uint16_t> cache(heads * capacity * dim, 9999);
    for (std::size_t t = 0; t < count; ++t)
      for (std::size_t h = 0; h < heads; ++h)
        for (std::size_t d = 0; d < dim; ++d) cache[at(t, h, d)] = value(t, h, d);
    ASSERT_TRUE(compact(pruned_10(), by_tokens ? rows(cache.data(), TokenMajor{count, heads, dim})
                                               : rows(cache.data(), HeadMajor{heads, count, dim, capacity})));
    for (std::size_t i = 0; i < kept_of_10.size(); ++i)
      for (std::size_t h = 0; h < heads; ++h)
        for (std::size_t d = 0; d < dim; ++d) ASSERT_EQ(cache[at(i, h, d)], value(kept_of_10[i], h, d));
    for (std::size_t t = count; t < capacity; ++t)
      for (std::size_t h = 0; h < heads; ++h) ASSERT_EQ(cache[at(t, h, 0)], 9999) << "behind the tokens";
  }
}

// Keys in one row with queries and values: only the keys move.
TEST(Compact, RowsWithinWiderRowsLeaveTheRest) {
  std::vector<std::uint16_t> packed(10 * 30);
  std::iota(packed.begin(), packed.end(), std::uint16_t{0});
  const auto before = packed;
  ASSERT_TRUE(compact(pruned_10(), rows(packed.data() + 8, TokenMajor{10, 2, 5, 30})));
  for (std::size_t t = 0; t < 10; ++t)
    for (std::size_t i = 0; i < 30; ++i) {
      const bool moved = i >= 8 && i < 18 && t < 6;
      ASSERT_EQ(packed[t * 30 + i], before[(moved ? kept_of_10[t] : t) * 30 + i]);
    }
}

TEST(CompactMask, KeepsTheKeptRowsAndColumns) {
  oracle::Rng rng(43);
  for (const std::size_t element : {1u, 2u, 4u})
    for (const std::size_t gap : {0u, 3u})
      for (int draw = 0; draw < 40; ++draw) {
        const std::size_t n = rng.between(1, 20), stride = n * element + gap;
        const auto kept = random_kept(rng, n);
        Bytes mask = random_bytes(rng, n * stride);
        const Bytes before = mask;
        ASSERT_TRUE(compact_mask(
            kept, rows(static_cast<void*>(mask.data()), n, n * element, static_cast<std::ptrdiff_t>(stride))));
        for (std::size_t i = 0; i < kept.size(); ++i)
          for (std::size_t j = 0; j < kept.size(); ++j)
            for (std::size_t byte = 0; byte < element; ++byte)
              ASSERT_EQ(mask[i * stride + j * element + byte], before[kept[i] * stride + kept[j] * element + byte]);
      }
}

TEST(CompactMask, ACausalMaskStaysCausal) {
  std::vector<float> mask(100);
  for (std::size_t i = 0; i < 10; ++i)
    for (std::size_t j = 0; j < 10; ++j) mask[i * 10 + j] = j <= i ? 0.0f : -1e30f;
  ASSERT_TRUE(compact_mask(pruned_10(), rows(mask.data(), 10, 10)));
  for (std::size_t i = 0; i < 6; ++i)
    for (std::size_t j = 0; j < 6; ++j) EXPECT_EQ(mask[i * 10 + j], j <= i ? 0.0f : -1e30f);
}

// ---- indices and masks for the engine -----------------------------------------------------------

TEST(WriteIndices, InTheEnginesTypeAndPlace) {
  std::vector<std::int64_t> wide(6);
  ASSERT_TRUE(write_indices(pruned_10(), Span<std::int64_t>(wide)));
  EXPECT_EQ(wide, (std::vector<std::int64_t>{0, 1, 4, 5, 6, 9}));
  std::vector<std::int32_t> shifted(6);
  ASSERT_TRUE(write_indices(pruned_10(), Span<std::int32_t>(shifted), 100));
  EXPECT_EQ(shifted, (std::vector<std::int32_t>{100, 101, 104, 105, 106, 109}));
  EXPECT_TRUE(refused(write_indices(pruned_10(), Span<std::int32_t>(shifted.data(), 5)), Errc::too_small, "5 entries"));
}

// Lists as they are, with no Span around them, and a sum that an int32 does not hold.
TEST(WriteIndices, TakesAListAndRefusesSumsThatDoNotFit) {
  const std::vector<Index> kept = {0, 3, max_tokens - 1};
  std::vector<std::int32_t> narrow(3);
  ASSERT_TRUE(write_indices(kept, narrow));
  EXPECT_EQ(narrow, (std::vector<std::int32_t>{0, 3, 2147483646}));
  EXPECT_TRUE(refused(write_indices(kept, narrow, 2), Errc::bad_index, "index 2147483646 and the offset 2"));
  EXPECT_EQ(narrow[1], 3);  // untouched
  ASSERT_TRUE(write_indices(kept, narrow, 1));
  EXPECT_EQ(narrow, (std::vector<std::int32_t>{1, 4, 2147483647}));
  ASSERT_TRUE(write_indices(kept, narrow, -5));
  EXPECT_EQ(narrow, (std::vector<std::int32_t>{-5, -2, 2147483641}));
  std::vector<Index> ids(4);
  ASSERT_TRUE(write_indices(kept, ids, 0x80000001u));
  EXPECT_EQ(ids[2], 0xffffffffu);
  EXPECT_EQ(write_indices(kept, ids, 0x80000002u).code, Errc::bad_index);
  std::array<std::int64_t, 3> wide{};
  ASSERT_TRUE(write_indices(kept, wide, std::int64_t{1} << 40));
  EXPECT_EQ(wide[2], (std::int64_t{1} << 40) + 2147483646);
  EXPECT_EQ(write_indices(kept, wide, 0x7fffffffffffffff).code, Errc::bad_index);
  EXPECT_TRUE(write_indices(std::vector<Index>{}, narrow, 2147483647));
}

TEST(Runs, AreAsLongAsTheyCanBe) {
  std::vector<std::array<std::size_t, 3>> runs;
  const auto note = [&](std::size_t to, std::size_t from, std::size_t count) { runs.push_back({to, from, count}); };
  ASSERT_TRUE(for_each_run(pruned_10(), note));
  EXPECT_EQ(runs, (std::vector<std::array<std::size_t, 3>>{{0, 0, 2}, {2, 4, 3}, {5, 9, 1}}));
  runs.clear();
  ASSERT_TRUE(for_each_run(std::vector<Index>{}, note));
  EXPECT_TRUE(runs.empty());
}

TEST(KeptVisualNumbers, CountAcrossTheSpans) {
  const std::vector<TokenSpan> visual = {{1, 4}, {6, 3}};  // numbers 0 .. 3 and 4 .. 6
  std::vector<Index> numbers(7, 77);
  const auto written = kept_visual_numbers(pruned_10(), visual, Span<Index>(numbers));
  ASSERT_TRUE(written) << written.message().c_str();
  numbers.resize(*written);
  EXPECT_EQ(numbers, (std::vector<Index>{0, 3, 4}));  // positions 1, 4 and 6
  EXPECT_TRUE(refused(kept_visual_numbers(pruned_10(), visual, Span<Index>(numbers.data(), 2)).status, Errc::too_small,
                      "2 entries"));
}

TEST(KeepBias, HidesWhatIsNotKeptAndShowsWhatWasDecoded) {
  std::vector<float> bias(12, 7.0f);
  ASSERT_TRUE(keep_bias(pruned_10(), Span<float>(bias), -1e30f));
  for (std::size_t i = 0; i < 12; ++i) {
    const bool kept = i >= 10 || std::count(kept_of_10.begin(), kept_of_10.end(), i) > 0;
    EXPECT_EQ(bias[i], kept ? 0.0f : -1e30f) << i;
  }
  EXPECT_TRUE(refused(keep_bias(pruned_10(), Span<float>(bias.data(), 9), 0), Errc::too_small, "9 entries"));
}

TEST(KeepBitmap, HidesWhatIsNotKept) {
  oracle::Rng rng(47);
  for (std::size_t tokens = 1; tokens < 140; ++tokens) {
    const auto kept = random_kept(rng, tokens);
    std::vector<std::uint32_t> bitmap((tokens + 31) / 32 + 1, 0);
    ASSERT_TRUE(keep_bitmap(KeptRows(kept, tokens), Span<std::uint32_t>(bitmap)));
    for (std::size_t i = 0; i < bitmap.size() * 32; ++i) {
      const bool seen = i >= tokens || std::binary_search(kept.begin(), kept.end(), static_cast<Index>(i));
      ASSERT_EQ((bitmap[i / 32] >> (i % 32) & 1u) != 0, seen) << "bit " << i << " of " << tokens;
    }
  }
  std::uint32_t word = 0;
  EXPECT_TRUE(
      refused(keep_bitmap(KeptRows(kept_of_10, 33), Span<std::uint32_t>(&word, 1)), Errc::too_small, "needs 2"));
}

TEST(NextPosition, IsOnePastTheGreatestOfAllAxes) {
  const std::int32_t axes[] = {0, 1, 2, 3, 3, 3, 0, 1, 7, 1, 2, 5};
  EXPECT_EQ(next_position(Span<const std::int32_t>(axes)), 8);
  const std::vector<std::int64_t> list = {4, 11, 2};
  EXPECT_EQ(next_position(list), 12);
}

// ---- what every verb takes ----------------------------------------------------------------------

// Every verb on ten tokens: what it returns, and all it leaves behind. known: whether the verbs that must know of how
// many tokens the indices are can tell.
struct Left {
  std::vector<Errc> codes;
  Bytes bytes;
};
template <class KeptLike>
Left every_verb(const KeptLike& kept) {
  Left left;
  std::vector<std::int64_t> numbers(10), more(30), gathered(10), mask(100), cache(10), repacked(10), copied(12);
  std::vector<Index> table = {4, 0, 2, 1, 3}, other = {1, 3, 5, 0}, ids(10);
  std::vector<TokenSpan> spans(2);
  std::vector<float> bias(11, 0.5f);
  std::uint32_t bitmap = 0;
  for (std::vector<std::int64_t>* v : {&numbers, &more, &mask, &cache, &repacked})
    std::iota(v->begin(), v->end(), std::int64_t{1});
  const std::vector<TokenSpan> visual = {{1, 4}, {6, 3}};
  const TokenMajor block{2, 1, 1}, wide_block{3, 1, 1};
  const auto note = [&](const Status& status) { left.codes.push_back(status.code); };
  std::size_t moved = 0;

  note(compact(kept, numbers));
  note(compact(kept, position_axes(more.data(), 3, 10)));
  note(gather(kept, rows(mask.data(), 10), rows(gathered.data(), 10)));
  note(compact_mask(kept, rows(mask.data(), 10, 10)));
  note(write_indices(kept, Span<Index>(ids), Index{5}));
  note(for_each_run(kept, [&](std::size_t, std::size_t, std::size_t count) { moved += count; }));
  note(kept_visual_numbers(kept, visual, Span<Index>(ids.data() + 6, 4)).status);
  note(next_spans(kept, visual, Span<TokenSpan>(spans)).status);
  note(compact_pages(kept, pages(cache.data(), block, Span<Index>(table), 10)).status);
  note(gather_pages(kept, pages(cache.data(), block, Span<Index>(table), 10),
                    pages(copied.data(), wide_block, Span<Index>(other), 6)));
  const KvPages shared = pages(repacked.data(), block, Span<Index>(table), 10);
  note(repack_pages(kept, Span<const KvPages>(&shared, 1)).status);
  note(keep_bias(kept, Span<float>(bias), -9.0f));
  note(keep_bitmap(kept, Span<std::uint32_t>(&bitmap, 1)));

  const auto keep = [&](const auto& values) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    left.bytes.insert(left.bytes.end(), bytes, bytes + values.size() * sizeof(values[0]));
  };
  for (const std::vector<std::int64_t>* v : {&numbers, &more, &gathered, &mask, &cache, &repacked, &copied}) keep(*v);
  keep(table);
  keep(ids);
  keep(std::vector<std::size_t>{moved, spans[0].first, spans[0].count, spans[1].first, spans[1].count, bitmap});
  keep(bias);
  return left;
}

TEST(EveryVerb, TakesKeptBatchesTheirSequencesAndLists) {
  const std::vector<Errc> fine(13, Errc::ok);
  std::vector<Errc> unknown = fine;
  unknown[11] = unknown[12] = Errc::bad_shape;  // keep_bias() and keep_bitmap() must know where the prompt ends

  // Scores by which a Pruner and a BatchPruner keep kept_of_10.
  const std::vector<float> scores = {9, 1, 1, 8, 7, 1, 1};
  const std::vector<TokenSpan> visual = {{1, 4}, {6, 3}};
  Config config;
  config.keep_count = 3;
  config.quota = Quota::pooled;
  Pruner<> pruner(config);
  const Kept kept = pruner.prune(Scores<float>{scores, 10}, visual);
  ASSERT_EQ(std::vector<Index>(kept.begin(), kept.end()), kept_of_10);
  const Left by_kept = every_verb(kept);
  EXPECT_EQ(by_kept.codes, fine);

  std::vector<Request> requests = {{config, visual, 0, 10}};
  const auto evidence = [&](std::size_t) { return Scores<float>{scores, 10}; };
  BatchPruner<> batch_pruner;
  {
    const KeptBatch batch = batch_pruner.prune(requests, evidence);
    const Left by_batch = every_verb(batch), by_sequence = every_verb(batch.sequence(0));
    EXPECT_EQ(by_batch.codes, unknown);
    EXPECT_EQ(by_sequence.codes, fine);
    EXPECT_EQ(by_sequence.bytes, by_kept.bytes);
    EXPECT_EQ(every_verb(batch.sequences[0]).bytes, by_kept.bytes);
  }
  // Within a batch, a sequence's rows are still numbered from its own start.
  requests = {{config, visual, 3, 10}, {config, visual, 13, 10}};
  const KeptBatch batch = batch_pruner.prune(requests, evidence);
  EXPECT_EQ(every_verb(batch.sequence(1)).bytes, by_kept.bytes);
  std::vector<Index> packed(23);
  std::iota(packed.begin(), packed.end(), Index{0});
  ASSERT_TRUE(compact(batch, packed));
  packed.resize(12);
  EXPECT_EQ(packed, (std::vector<Index>{3, 4, 7, 8, 9, 12, 13, 14, 17, 18, 19, 22}));

  const Index array[] = {0, 1, 4, 5, 6, 9};
  const std::array<Index, 6> std_array = {0, 1, 4, 5, 6, 9};
  const Left by_list = every_verb(kept_of_10);
  EXPECT_EQ(by_list.codes, unknown);
  for (const Left& left : {every_verb(array), every_verb(std_array), every_verb(Span<const Index>(kept_of_10)),
                           every_verb(KeptRows(kept_of_10))}) {
    EXPECT_EQ(left.codes, unknown);
    EXPECT_EQ(left.bytes, by_list.bytes);
  }
  EXPECT_EQ(every_verb(KeptRows(kept_of_10, 10)).bytes, by_kept.bytes);
  EXPECT_EQ(every_verb(pruned_10()).bytes, by_kept.bytes);
}

TEST(EveryVerb, PassesAFailureOnAndMovesNothing) {
  Kept failed = pruned_10();
  failed.status = fail(Errc::bad_value, "all scores are NaN");
  KeptBatch batch;
  batch.status = failed.status;
  batch.indices = kept_of_10;
  const Left nothing = every_verb(KeptRows({}, KeptRows::unknown, failed.status));
  for (const Left& left : {every_verb(failed), every_verb(batch)}) {
    EXPECT_EQ(left.codes, std::vector<Errc>(13, Errc::bad_value));
    EXPECT_EQ(left.bytes, nothing.bytes);
  }
}

// With a Kept, a tensor has one row per prompt token; one that is shorter or longer is another tensor.
TEST(EveryVerb, RefusesTensorsOfAnotherLengthThanThePrompt) {
  std::vector<std::int64_t> values(200), room(200);
  std::vector<Index> table = {0, 1, 2, 3, 4, 5}, other = {6, 7, 8, 9, 10, 11};
  const TokenMajor block{2, 1, 1};
  for (const std::size_t length : {9u, 11u}) {
    const std::string words = std::to_string(length) + " rows but the prompt has 10";
    const auto is_refused = [&](const Status& status) { return refused(status, Errc::bad_shape, words.c_str()); };
    const KvPages cache = pages(values.data(), block, Span<Index>(table), length);
    EXPECT_TRUE(is_refused(compact(pruned_10(), rows(values.data(), length))));
    EXPECT_TRUE(is_refused(compact(pruned_10(), Span<std::int64_t>(values.data(), length))));
    EXPECT_TRUE(is_refused(compact(pruned_10(), position_axes(values.data(), 3, length))));
    EXPECT_TRUE(
        refused(compact(pruned_10(), rows(values.data(), 30)), Errc::bad_shape, "of several axes by position_a"));
    EXPECT_TRUE(is_refused(gather(pruned_10(), rows(values.data(), length), rows(room.data(), 10))));
    EXPECT_TRUE(is_refused(compact_mask(pruned_10(), rows(values.data(), length, length))));
    EXPECT_TRUE(is_refused(compact_pages(pruned_10(), cache).status));
    EXPECT_TRUE(is_refused(repack_pages(pruned_10(), Span<const KvPages>(&cache, 1)).status));
    EXPECT_TRUE(is_refused(gather_pages(pruned_10(), cache, pages(room.data(), block, Span<Index>(other), 10))));
  }
  EXPECT_TRUE(compact(kept_of_10, rows(values.data(), 11))) << "a plain list does not say of how many rows it is";
  EXPECT_TRUE(refused(compact(kept_of_10, rows(values.data(), 9)), Errc::bad_index, "9 rows"));
}

// ---- errors -------------------------------------------------------------------------------------

TEST(Compact, NothingIsTouchedOnAnError) {
  oracle::Rng rng(44);
  Bytes bytes = random_bytes(rng, 400);
  const Bytes before = bytes;
  const Rows good{bytes.data(), 10, 4, 4, 3, 40};
  const auto expect = [&](Errc code, const std::vector<Index>& kept, Rows rows) {
    EXPECT_EQ(compact(kept, rows).code, code);
    EXPECT_EQ(gather(kept, rows, {bytes.data() + 200, 10, 4, 4, 3, 40}).code, code);
    EXPECT_EQ(gather(std::vector<Index>{1, 2}, {bytes.data() + 200, 10, rows.row_bytes, 40, 3, 4}, rows).code,
              kept.size() == 2 ? code : Errc::ok)
        << "the destination is checked too";
    EXPECT_EQ(bytes, before);
    bytes = before;
  };
  const auto changed = [&](auto change) {
    Rows rows = good;
    change(rows);
    return rows;
  };
  EXPECT_EQ(compact(std::vector<Index>{1, 5, 10}, good).code, Errc::bad_index) << "found before row 1 has moved";
  EXPECT_EQ(compact(std::vector<Index>{1, 5, 5}, good).code, Errc::bad_index);
  EXPECT_EQ(compact(std::vector<Index>{1, 5, 2}, good).code, Errc::bad_index);
  EXPECT_EQ(compact(Span<const Index>(nullptr, 2), good).code, Errc::null_data);
  EXPECT_EQ(bytes, before);
  expect(Errc::bad_stride, {1, 2}, changed([](Rows& r) { r.row_stride = -4; }));
  expect(Errc::bad_stride, {1, 2}, changed([](Rows& r) { r.plane_stride = -40; }));
  expect(Errc::bad_stride, {1, 2}, changed([](Rows& r) { r.row_stride = 3; }));
  expect(Errc::bad_stride, {1, 2}, changed([](Rows& r) { r.row_stride = 0; }));
  expect(Errc::bad_stride, {1, 2}, changed([](Rows& r) { r.plane_stride = 39; }));
  expect(Errc::bad_stride, {1, 2}, changed([](Rows& r) { r.plane_stride = 0; }));
  expect(Errc::null_data, {1, 2}, changed([](Rows& r) { r.data = nullptr; }));
  EXPECT_EQ(compact_mask(std::vector<Index>{0, 9}, {bytes.data(), 10, 40, 39}).code, Errc::bad_stride);
  EXPECT_EQ(compact_mask(std::vector<Index>{0, 10}, {bytes.data(), 10, 40, 40}).code, Errc::bad_index);
  EXPECT_TRUE(refused(compact_mask(kept_of_10, {bytes.data(), 10, 39, 39}), Errc::bad_shape, "10 rows of 39 bytes"));
  EXPECT_TRUE(refused(compact_mask(kept_of_10, {bytes.data(), 10, 10, 10, 2, 100}), Errc::bad_shape, "2 planes"));
  EXPECT_EQ(bytes, before);
}

TEST(Gather, RefusesTensorsThatDoNotFit) {
  Bytes bytes(200), room(200);
  const Rows from{bytes.data(), 10, 4, 4};
  const std::vector<Index> kept = {0, 3, 9};
  EXPECT_TRUE(refused(gather(kept, from, {room.data(), 2, 4, 4}), Errc::too_small, "2 rows but needs 3"));
  EXPECT_TRUE(gather(kept, from, {room.data(), 3, 4, 4}));
  EXPECT_TRUE(refused(gather(kept, from, {room.data(), 3, 5, 5}), Errc::bad_shape, "4 bytes at the source but 5"));
  EXPECT_TRUE(refused(gather(kept, from, {room.data(), 3, 4, 4, 2, 40}), Errc::bad_shape, "1 planes"));
}

// ---- Eigen --------------------------------------------------------------------------------------

template <class Matrix>
class EigenMatrices : public testing::Test {};
using Matrices =
    testing::Types<Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>, Eigen::MatrixXf,
                   Eigen::MatrixXd, Eigen::Matrix<Eigen::half, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>,
                   Eigen::Matrix<std::int8_t, Eigen::Dynamic, 3>>;
TYPED_TEST_SUITE(EigenMatrices, Matrices, );  // the comma is for clang -Wpedantic

TYPED_TEST(EigenMatrices, CompactKeepsTheKeptRowsAndShrinks) {
  using Scalar = typename TypeParam::Scalar;
  TypeParam matrix(10, 3);
  for (Eigen::Index i = 0; i < 10; ++i)
    for (Eigen::Index j = 0; j < 3; ++j) matrix(i, j) = static_cast<Scalar>(static_cast<float>(10 * i + j));
  const TypeParam before = matrix;
  ASSERT_TRUE(compact(pruned_10(), matrix));
  ASSERT_EQ(matrix.rows(), 6);
  ASSERT_EQ(matrix.cols(), 3);
  for (std::size_t i = 0; i < 6; ++i)
    for (Eigen::Index j = 0; j < 3; ++j)
      ASSERT_EQ(static_cast<float>(matrix(static_cast<Eigen::Index>(i), j)),
                static_cast<float>(before(static_cast<Eigen::Index>(kept_of_10[i]), j)));
}

TEST(EigenAdaptor, CompactLeavesTheMatrixAloneOnAnError) {
  Eigen::MatrixXf matrix = Eigen::MatrixXf::Random(5, 3);
  const Eigen::MatrixXf before = matrix;
  EXPECT_EQ(compact(kept_of_10, matrix).code, Errc::bad_index);
  EXPECT_EQ(compact(pruned_10(), matrix).code, Errc::bad_shape);
  Kept failed;
  failed.status = fail(Errc::bad_value, "all scores are NaN");
  EXPECT_EQ(compact(failed, matrix).code, Errc::bad_value);
  EXPECT_EQ(matrix, before);
}

TEST(EigenAdaptor, CompactWorksOnVectorsOfPositions) {
  Eigen::VectorXi positions = Eigen::VectorXi::LinSpaced(10, 0, 9);
  ASSERT_TRUE(compact(pruned_10(), positions));
  EXPECT_EQ(std::vector<Index>(positions.begin(), positions.end()), kept_of_10);
}

TEST(EigenAdaptor, HeadsViewTheMatricesInPlace) {
  using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const RowMajor query = RowMajor::Random(2, 8 * 5), key = RowMajor::Random(20, 2 * 5);
  const auto view = query_key(heads(query, 8), heads(key, 2, 17), 0.5f);
  EXPECT_TRUE(view.check());
  EXPECT_EQ(view.query.data, query.data());
  EXPECT_EQ(view.key.data, key.data());
  EXPECT_EQ(view.query.tokens, 2u);
  EXPECT_EQ(view.key.tokens, 17u);
  EXPECT_EQ(view.key.dim, 5u);
  EXPECT_EQ(view.query.token_stride, 40);
  EXPECT_EQ(view.key.token_stride, 10);
  EXPECT_EQ(query_key(heads(query, 0), heads(key, 2), 0.5f).check().code, Errc::bad_shape);
  EXPECT_EQ(query_key(heads(query, 8), heads(key, 4), 0.5f).check().code, Errc::bad_shape)
      << "the key matrix is too narrow for four heads";
  EXPECT_EQ(query_key(heads(query, 8), heads(key, 2, 21), 0.5f).check().code, Errc::null_data) << "it has 20 rows";
}

}  // namespace
}  // namespace apply_test

// Slots against books kept the slow way: for every layer the list of its tokens' positions.
#include "fastv/slots.hpp"

#include <gtest/gtest.h>

#include <utility>

#include "counted_new.hpp"
#include "fastv/pruner.hpp"
#include "oracle.hpp"

namespace slots_test {
namespace {

using namespace fastv;
using oracle::Rng;

constexpr std::size_t layers = 12;

// positions[layer]: of the tokens in that layer's cache, by slot.
struct Books {
  std::vector<std::size_t> positions[layers];
  std::size_t tokens = 0;

  void append(std::size_t count) {
    for (auto& own : positions)
      for (std::size_t i = 0; i < count; ++i) own.push_back(tokens + i);
    tokens += count;
  }
  // Of the last n tokens that layer k - 1 holds, or of the sequence, the kept ones.
  void keep(std::size_t k, const std::vector<Index>& kept, std::size_t n) {
    std::vector<std::size_t> below;
    if (k > 0) below = positions[k - 1];
    for (std::size_t i = 0; k == 0 && i < tokens; ++i) below.push_back(i);
    const std::vector<std::size_t> last(below.end() - static_cast<std::ptrdiff_t>(n), below.end());
    for (std::size_t layer = k; layer < layers; ++layer) {
      auto& own = positions[layer];
      while (!own.empty() && own.back() >= last[0]) own.pop_back();
      for (const Index i : kept) own.push_back(last[i]);
    }
  }
  void rollback(std::size_t count) {
    for (auto& own : positions)
      while (!own.empty() && own.back() >= count) own.pop_back();
    tokens = count;
  }
};

void expect_same(const Slots& slots, const Books& books) {
  ASSERT_EQ(slots.tokens(), books.tokens);
  for (std::size_t layer = 0; layer < layers; ++layer) {
    SCOPED_TRACE("layer " + std::to_string(layer));
    const std::vector<std::size_t>& own = books.positions[layer];
    ASSERT_EQ(slots.length(layer), own.size());
    for (std::size_t slot = 0; slot < own.size(); ++slot) ASSERT_EQ(slots.position_of(layer, slot), own[slot]);
    ASSERT_EQ(slots.position_of(layer, own.size()), Slots::none);
    for (std::size_t position = 0, slot = 0; position <= books.tokens + 1; ++position) {
      const bool there = slot < own.size() && own[slot] == position;
      ASSERT_EQ(slots.slots_before(layer, position), slot) << position;
      ASSERT_EQ(slots.slot_of(layer, position), there ? slot : std::size_t{Slots::none}) << position;
      for (const std::size_t window : {1u, 3u, 40u}) {
        std::size_t first = 0;
        while (first < own.size() && own[first] + window <= position) ++first;
        ASSERT_EQ(slots.first_in_window(layer, position, window), first) << position << ", window " << window;
      }
      ASSERT_EQ(slots.first_in_window(layer, position, 0), 0u);
      slot += there ? 1 : 0;
    }
    std::vector<std::int64_t> written(own.size(), -1);
    ASSERT_TRUE(slots.write_positions(layer, 0, Span<std::int64_t>(written)));
    ASSERT_TRUE(std::equal(own.begin(), own.end(), written.begin(), written.end(),
                           [](std::size_t a, std::int64_t b) { return a == static_cast<std::size_t>(b); }));
    // Runs are as long as they can be.
    std::size_t slot = 0, after = books.tokens + 1;
    for (const SlotRun& run : slots.runs(layer)) {
      ASSERT_EQ(run.slot, slot);
      ASSERT_GT(run.count, 0u);
      ASSERT_NE(run.position, after);
      for (std::size_t i = 0; i < run.count; ++i) ASSERT_EQ(own[slot++], run.position + i);
      after = std::size_t{run.position} + run.count;
    }
    ASSERT_EQ(slot, own.size());
    const std::size_t group = slots.group_of(layer);
    ASSERT_LE(slots.first_layer(group), layer);
    ASSERT_TRUE(group + 1 == slots.groups() || slots.first_layer(group + 1) > layer);
  }
}

std::vector<Index> random_kept(Rng& rng, std::size_t n) {
  const double share = rng.real();
  std::vector<Index> kept;
  for (std::size_t i = 0; i < n; ++i)
    if (rng.chance(share)) kept.push_back(static_cast<Index>(i));
  return kept;
}

// A prompt pruned at some of the layers that `at` lists.
void random_turn(Rng& rng, Slots& slots, Books& books, const std::vector<std::size_t>& at) {
  std::size_t n = rng.between(1, 60);
  const std::size_t first = rng.below(n + 1);  // in two chunks
  ASSERT_TRUE(slots.append(first));
  ASSERT_TRUE(slots.append_chunk(n - first));
  books.append(n);
  for (const std::size_t k : at) {
    if (rng.chance(0.3) || n == 0) continue;
    const std::vector<Index> kept = random_kept(rng, n);
    const Status status = slots.keep(k, KeptRows(kept, n));
    ASSERT_TRUE(status) << status.message().c_str();
    books.keep(k, kept, n);
    n = kept.size();
  }
}

TEST(Slots, AgreeWithListsOfPositionsOverRandomOperations) {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Rng rng(seed);
    Slots slots, fork;
    Books books, forked;
    std::vector<std::size_t> at;  // layers that may prune: at most 8, so that groups always suffice
    for (std::size_t layer = seed % 4 == 0 ? 0 : 1; layer < layers; ++layer)
      if (at.size() < 6 && rng.chance(0.4)) at.push_back(layer);
    for (int step = 0; step < 12; ++step) {
      switch (rng.below(6)) {
        case 0:
        case 1: random_turn(rng, slots, books, at); break;
        case 2:
        case 3: {
          const std::size_t count = rng.below(4);
          ASSERT_TRUE(slots.append(count));
          books.append(count);
          break;
        }
        case 4: {
          const std::size_t back = rng.below((std::min)(books.tokens, std::size_t{25}) + 1);
          ASSERT_TRUE(slots.rollback(books.tokens - back));
          books.rollback(books.tokens - back);
          break;
        }
        default:  // the other beam goes on from here, and this one from where that was
          ASSERT_TRUE(fork.copy_from(slots));
          forked = books;
          if (rng.chance(0.5)) {
            ASSERT_TRUE(fork.append(3));
            forked.append(3);
            std::swap(fork, slots);
            std::swap(forked, books);
          }
      }
      if (HasFatalFailure()) return;
      expect_same(slots, books);
      expect_same(fork, forked);
      if (HasFatalFailure()) return;
    }
    slots.clear();
    books = {};
    expect_same(slots, books);
    random_turn(rng, slots, books, at);
    expect_same(slots, books);
    if (HasFatalFailure()) return;
  }
}

// Turns with images, pruned by Pruners, in two stages, the third at other layers; lengths as the Plan foretold them.
TEST(Slots, FollowPrunersAndPlans) {
  std::vector<float> values(40);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>((i * 17 + 5) % 41 + 1);
  Config stages[2];
  Slots slots;
  Books books;
  for (const std::size_t n : {50u, 47u, 55u, 46u}) {
    stages[0].filtering_layer = n < 55 ? 2 : 1;
    stages[1].filtering_layer = n < 55 ? 6 : 9;
    const TokenSpan visual[] = {{4, 40}};
    std::size_t past[layers];
    for (std::size_t layer = 0; layer < layers; ++layer) past[layer] = slots.length(layer);
    const Result<Plan> plan = make_plan(stages, Prompt{n, layers, visual, past});
    ASSERT_TRUE(plan) << plan.message().c_str();
    ASSERT_TRUE(slots.append(n));
    books.append(n);
    Pruner<> first(stages[0]), second(stages[1]);
    const Kept kept = first.prune(Scores<float>{values, n}, visual);
    ASSERT_TRUE(kept);
    ASSERT_TRUE(slots.keep(stages[0].filtering_layer, kept));
    books.keep(stages[0].filtering_layer, {kept.begin(), kept.end()}, n);
    TokenSpan left[1];
    ASSERT_TRUE(next_spans(kept, visual, left));
    const Kept again = second.prune(Scores<float>{Span<const float>(values).first(20), kept.size()}, left);
    ASSERT_TRUE(again) << again.message().c_str();
    ASSERT_TRUE(slots.keep(stages[1].filtering_layer, again));
    books.keep(stages[1].filtering_layer, {again.begin(), again.end()}, kept.size());
    for (std::size_t generated = 0; generated < 3; ++generated) {
      for (std::size_t layer = 0; layer < layers; ++layer)
        EXPECT_EQ(slots.length(layer), plan->kv_length(layer, generated));
      ASSERT_TRUE(slots.append());
      books.append(1);
    }
    if (n == 50 || n == 47) {
      EXPECT_EQ(slots.groups(), plan->groups());
      for (std::size_t layer = 0; layer < layers; ++layer) EXPECT_EQ(slots.group_of(layer), plan->group_of(layer));
    }
    expect_same(slots, books);
  }
}

TEST(Slots, ATurnMayPruneElsewhere) {
  Slots slots;
  Books books;
  const std::vector<Index> even = {0, 2, 4, 6, 8}, few = {1, 2, 9};
  for (const std::size_t k : {4u, 2u, 8u, 0u}) {  // each makes a group of its own
    ASSERT_TRUE(slots.append(10));
    books.append(10);
    ASSERT_TRUE(slots.keep(k, KeptRows(k == 2 ? few : even, 10)));
    books.keep(k, k == 2 ? few : even, 10);
    expect_same(slots, books);
  }
  EXPECT_EQ(slots.groups(), 4u);
  EXPECT_EQ(slots.first_layer(1), 2u);
  EXPECT_EQ(slots.first_layer(3), 8u);
  EXPECT_EQ(slots.length(0), 35u);
  EXPECT_EQ(slots.length(11), 5u + 3 + 5 + 5);
}

TEST(Slots, NothingIsAllocatedWhileDecoding) {
  Slots slots;
  const std::vector<Index> kept = {0, 1, 3, 5, 8};  // the last prompt token goes: decoding opens a run
  ASSERT_TRUE(slots.append(10));
  ASSERT_TRUE(slots.keep(2, KeptRows(kept, 10)));
  ASSERT_TRUE(slots.append());
  const std::size_t before = counted_new::allocations;
  for (int i = 0; i < 1000; ++i) {
    ASSERT_TRUE(slots.append(2));
    ASSERT_TRUE(slots.rollback(slots.tokens() - 1));
  }
  EXPECT_EQ(counted_new::allocations, before);
  EXPECT_EQ(slots.length(2), 1006u);
  EXPECT_EQ(slots.runs(2).size(), 5u);

  Slots roomy;
  ASSERT_TRUE(roomy.reserve(2, 8));
  const std::size_t reserved = counted_new::allocations;
  ASSERT_TRUE(roomy.append(10));
  ASSERT_TRUE(roomy.keep(2, KeptRows(kept, 10)));
  roomy.clear();
  ASSERT_TRUE(roomy.append(10));
  ASSERT_TRUE(roomy.keep(3, KeptRows(kept, 10)));
  EXPECT_EQ(counted_new::allocations, reserved);
}

TEST(Slots, AFailedAllocationChangesNothing) {
  Slots slots;
  Books books;
  std::vector<Index> odd;
  for (Index i = 1; i < 100; i += 2) odd.push_back(i);
  ASSERT_TRUE(slots.append(100));
  books.append(100);
  counted_new::fail_nothrow(true);
  EXPECT_EQ(slots.keep(3, KeptRows(odd, 100)).code, Errc::out_of_memory);
  Slots fresh;
  EXPECT_EQ(fresh.append(1).code, Errc::out_of_memory);
  EXPECT_EQ(fresh.copy_from(slots).code, Errc::out_of_memory);
  EXPECT_EQ(fresh.reserve(1, 5).code, Errc::out_of_memory);
  counted_new::fail_nothrow(false);
  EXPECT_EQ(fresh.tokens(), 0u);
  EXPECT_EQ(slots.groups(), 1u);
  expect_same(slots, books);
  ASSERT_TRUE(slots.keep(3, KeptRows(odd, 100)));
  books.keep(3, odd, 100);
  ASSERT_TRUE(slots.append(50));
  books.append(50);
  counted_new::fail_nothrow(true);
  const std::vector<Index> again(odd.begin(), odd.begin() + 20);
  EXPECT_EQ(slots.keep(5, KeptRows(again, 50)).code, Errc::out_of_memory);
  counted_new::fail_nothrow(false);
  expect_same(slots, books);
}

TEST(Slots, WrongCallsSaySoAndChangeNothing) {
  Slots slots;
  Books books;
  const std::vector<Index> kept = {0, 3, 4};
  EXPECT_EQ(slots.keep(2, KeptRows(kept, 5)).code, Errc::bad_shape);  // nothing was appended
  ASSERT_TRUE(slots.append(5));
  books.append(5);
  EXPECT_EQ(slots.keep(2, kept).code, Errc::bad_shape);  // of how many tokens?
  EXPECT_EQ(slots.keep(2, KeptRows(kept, 6)).code, Errc::bad_shape);
  EXPECT_EQ(slots.keep(2, KeptRows(kept, 4)).code, Errc::bad_index);
  EXPECT_EQ(slots.keep(2, KeptRows(Span<const Index>(nullptr, 2), 5)).code, Errc::null_data);
  EXPECT_EQ(slots.keep(2, KeptRows({}, 5, fail(Errc::bad_value, "passed on"))).code, Errc::bad_value);
  const Index twice[] = {1, 1};
  EXPECT_EQ(slots.keep(2, KeptRows(twice, 5)).code, Errc::bad_index);
  EXPECT_EQ(slots.keep(static_cast<std::size_t>(-1), KeptRows(kept, 5)).code, Errc::bad_setting);
  EXPECT_EQ(slots.rollback(6).code, Errc::bad_prompt);
  EXPECT_EQ(slots.append(max_tokens - 4).code, Errc::bad_prompt);
  EXPECT_EQ(slots.append(static_cast<std::size_t>(-1)).code, Errc::bad_prompt);
  EXPECT_EQ(slots.reserve(Slots::max_groups + 1, 1).code, Errc::not_supported);
  EXPECT_EQ(slots.groups(), 1u);
  expect_same(slots, books);

  ASSERT_TRUE(slots.keep(4, KeptRows(kept, 5)));
  books.keep(4, kept, 5);
  const Status again = slots.keep(4, KeptRows(kept, 5));
  EXPECT_EQ(again.code, Errc::bad_shape);
  EXPECT_NE(std::string(again.message().c_str()).find("hold 3 of the last 5 tokens"), std::string::npos);
  EXPECT_EQ(slots.keep(2, KeptRows(kept, 5)).code, Errc::bad_shape);  // stages out of order
  EXPECT_EQ(slots.keep(6, KeptRows(kept, 5)).code, Errc::bad_shape);  // of the prompt, not of what was left
  expect_same(slots, books);

  Index few[2];
  EXPECT_EQ(slots.write_positions(4, 2, Span<Index>(few)).code, Errc::bad_index);
  EXPECT_EQ(slots.write_positions(4, static_cast<std::size_t>(-1), Span<Index>(few)).code, Errc::bad_index);
  EXPECT_EQ(slots.write_positions(4, 0, Span<Index>(nullptr, 2)).code, Errc::null_data);
  std::vector<std::int64_t> list(2);
  EXPECT_TRUE(slots.write_positions(4, 1, list));
  EXPECT_EQ(list, (std::vector<std::int64_t>{3, 4}));
  EXPECT_TRUE(slots.write_positions(4, 1, Span<Index>(few)));
  EXPECT_EQ(few[0], 3u);
  EXPECT_EQ(few[1], 4u);
  EXPECT_TRUE(slots.write_positions(4, 3, Span<Index>()));

  const std::size_t far = static_cast<std::size_t>(-1);
  EXPECT_EQ(slots.slot_of(4, far), Slots::none);
  EXPECT_EQ(slots.position_of(4, far), Slots::none);
  EXPECT_EQ(slots.slots_before(far, far), 3u);
  EXPECT_EQ(slots.first_in_window(far, far, 1), 3u);
  EXPECT_EQ(slots.first_in_window(4, 4, far), 0u);
}

// The indices number the prompt's own tokens: behind a decoded token, the last n tokens are others.
TEST(Slots, KeepIsRefusedOnceAnotherTokenHasCome) {
  const std::vector<Index> kept = {0, 3, 4};
  const auto refuses = [&](Slots& slots, std::size_t k, std::size_t n, const char* words) {
    const Status status = slots.keep(k, KeptRows(kept, n));
    EXPECT_EQ(status.code, Errc::bad_shape);
    EXPECT_NE(std::string(status.message().c_str()).find(words), std::string::npos) << status.message().c_str();
  };
  for (const std::size_t k : {0u, 2u}) {
    Slots slots;
    Books books;
    ASSERT_TRUE(slots.append(7));  // an earlier turn
    books.append(7);
    ASSERT_TRUE(slots.append(5));
    ASSERT_TRUE(slots.append(1));
    books.append(6);
    refuses(slots, k, 5, "of 5 tokens but the layers below");
    refuses(slots, k, 5, "hold 1 of what was appended last");
    refuses(slots, k, 6, "hold 1 of what was appended last");
    refuses(slots, k, 13, "hold 1 of what was appended last");
    expect_same(slots, books);
    ASSERT_TRUE(slots.rollback(12));  // where the prompt began is forgotten
    books.rollback(12);
    refuses(slots, k, 5, "hold 0 of what was appended last");
    ASSERT_TRUE(slots.rollback(7));
    books.rollback(7);
    // As often as it has chunks, one of which is as long as what was decoded.
    ASSERT_TRUE(slots.append(1));
    ASSERT_TRUE(slots.append_chunk(3));
    ASSERT_TRUE(slots.append_chunk(1));
    books.append(5);
    refuses(slots, k, 6, "hold 5 of what was appended last");
    Slots fork;
    ASSERT_TRUE(fork.copy_from(slots));
    ASSERT_TRUE(fork.append(1));
    refuses(fork, k, 5, "hold 1 of what was appended last");
    ASSERT_TRUE(slots.keep(k, KeptRows(kept, 5)));
    books.keep(k, kept, 5);
    expect_same(slots, books);
    ASSERT_TRUE(slots.rollback(10));  // into the prompt, in a layer below another
    books.rollback(10);
    if (k > 0) {
      const std::vector<Index> two = {0, 1};
      EXPECT_EQ(slots.keep(k, KeptRows(two, 3)).code, Errc::bad_shape) << "it was pruned already";
    }
    expect_same(slots, books);
  }
}

TEST(Slots, LayersFormAtMostNineGroups) {
  Slots slots;
  Books books;
  const std::vector<Index> kept = {0};
  for (std::size_t k = 1; k < Slots::max_groups; ++k) {
    ASSERT_TRUE(slots.append(2));
    books.append(2);
    ASSERT_TRUE(slots.keep(k, KeptRows(kept, 2)));
    books.keep(k, kept, 2);
  }
  ASSERT_TRUE(slots.append(2));
  books.append(2);
  EXPECT_EQ(slots.keep(10, KeptRows(kept, 2)).code, Errc::not_supported);
  expect_same(slots, books);
  ASSERT_TRUE(slots.keep(4, KeptRows(kept, 2)));  // a layer that prunes already
  books.keep(4, kept, 2);
  expect_same(slots, books);
}

TEST(Slots, MovesLeaveAnObjectToClear) {
  Slots slots;
  const std::vector<Index> kept = {1};
  ASSERT_TRUE(slots.append(2));
  ASSERT_TRUE(slots.keep(1, KeptRows(kept, 2)));
  Slots other(std::move(slots));
  EXPECT_EQ(other.length(0), 2u);
  EXPECT_EQ(other.length(1), 1u);
  slots.clear();
  EXPECT_EQ(slots.length(1), 0u);
  ASSERT_TRUE(slots.append(7));
  EXPECT_EQ(slots.length(1), 7u);
  slots = std::move(other);
  EXPECT_EQ(slots.position_of(1, 0), 1u);
}

}  // namespace
}  // namespace slots_test

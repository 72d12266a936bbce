// The tests' GPU finds what it is there to find.
#include "emulation.hpp"

#include <gtest/gtest.h>

namespace emulation_test {
namespace {

using fastv::detail::gpu::Values;

// What a block says of its threads' words, by what is planted.
enum class Fault { nothing, race, unwritten, outside, foreign, global_race };

struct Reverse {
  static constexpr int threads = 64;
  template <class Block>
  struct Shared {
    typename Block::template Array<std::uint32_t, 64> words;
  };
  Fault planted;
  std::uint32_t* out;
  std::uint32_t* scratch;

  template <class Block>
  void operator()(Block& block, Shared<Block>& shared) const {
    auto device = block.words(scratch, 64);
    typename Block::template PerThread<int> own;
    block.each([&](int thread) {
      own[planted == Fault::foreign ? 63 - thread : thread] = thread;
      if (planted == Fault::unwritten && thread == 5) return;
      shared.words[thread] = static_cast<std::uint32_t>(thread);
      device[thread] = static_cast<std::uint32_t>(thread);
    });
    if (planted != Fault::race && planted != Fault::global_race) block.sync();
    block.each([&](int thread) {
      const int other = 63 - thread;
      if (planted != Fault::race && planted != Fault::unwritten)
        static_cast<void>(static_cast<std::uint32_t>(device[other]));
      if (planted == Fault::global_race) return;
      out[thread] = shared.words[planted == Fault::outside && thread == 0 ? 64 : other];
    });
  }
};

std::set<std::string> faults_of(Fault planted) {
  oracle::Rng rng(1);
  emulation::Queue queue(rng);
  std::vector<std::uint32_t> out(64), scratch(64);
  emulation::faults().clear();
  EXPECT_TRUE(queue.launch({1, 1, 1}, Reverse{planted, out.data(), scratch.data()}));
  std::set<std::string> found;
  found.swap(emulation::faults());
  for (std::uint32_t i = 0; planted == Fault::nothing && i < 64; ++i) EXPECT_EQ(out[i], 63 - i);
  return found;
}

TEST(Emulation, FindsWhatIsPlanted) {
  using Faults = std::set<std::string>;
  EXPECT_EQ(faults_of(Fault::nothing), Faults{});
  EXPECT_EQ(faults_of(Fault::race), Faults{"a word of shared memory is read while another thread writes it"});
  EXPECT_EQ(faults_of(Fault::global_race), Faults{"a word of device memory is read while another thread writes it"});
  EXPECT_EQ(faults_of(Fault::unwritten), Faults{"a word of shared memory is read that nobody has written"});
  EXPECT_EQ(faults_of(Fault::outside), Faults{"index 64 of an array of 64 in shared memory"});
  EXPECT_EQ(faults_of(Fault::foreign), Faults{"a thread touches what another one keeps"});
}

// Collective operations, against plain loops.
struct Collect {
  static constexpr int threads = 96;
  template <class Block>
  struct Shared {
    typename Block::template Array<std::uint32_t, 4> bins;
  };
  std::uint32_t *before, *all, *arrivals;
  float* sums;

  template <class Block>
  void operator()(Block& block, Shared<Block>& shared) const {
    typename Block::template PerThread<std::uint32_t> word;
    typename Block::template PerThread<Values<float, 2>> pair;
    block.each([&](int thread) {
      if (thread < 4) shared.bins[thread] = 0;
      word[thread] = static_cast<std::uint32_t>(thread % 5);
      pair[thread] = {{static_cast<float>(thread), 1.0f}};
    });
    block.sync();
    block.each([&](int thread) { block.add(shared.bins, static_cast<std::uint32_t>(thread) % 4, 2); });
    block.sync();
    block.template sum<8>(pair);
    const std::uint32_t total = block.exclusive_sum(word);
    const bool last = block.last_to_arrive(arrivals, 3);
    block.each([&](int thread) {
      before[thread] = word[thread];
      sums[thread] = pair[thread].value[0] + 1000 * pair[thread].value[1];
      if (thread == 0) all[0] = total + 1000 * shared.bins[3];
      if (thread == 0 && last) all[1] += 1;
    });
  }
};

TEST(Emulation, CollectiveOperations) {
  oracle::Rng rng(2);
  emulation::Queue queue(rng);
  std::vector<std::uint32_t> before(96), all(2), arrivals(1);
  std::vector<float> sums(96);
  emulation::faults().clear();
  ASSERT_TRUE(queue.launch({3, 1, 1}, Collect{before.data(), all.data(), arrivals.data(), sums.data()}));
  EXPECT_EQ(emulation::faults(), std::set<std::string>{});
  std::uint32_t sum = 0;
  for (std::uint32_t t = 0; t < 96; ++t) {
    EXPECT_EQ(before[t], sum);
    sum += t % 5;
    const std::uint32_t first = t / 8 * 8;
    EXPECT_EQ(sums[t], static_cast<float>(8 * first + 28 + 8000));
  }
  EXPECT_EQ(all[0], sum + 48000);
  EXPECT_EQ(all[1], 1u) << "one block is the last";
  EXPECT_EQ(arrivals[0], 0u) << "the counter is ready for the next launch";
}

}  // namespace
}  // namespace emulation_test

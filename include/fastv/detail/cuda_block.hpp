// fastv: what the source of a kernel is written in, so that it runs on a GPU and, block by block, in a test on the host.
//
// A kernel is a functor: its arguments are members, it states how many `threads` a block has, and
//
//   template <class Block> struct Shared;                        // the block's shared memory
//   template <class Block> FASTV_KERNEL void operator()(Block& block, Shared<Block>& shared) const;
//
// is what one block does. Block is CUDA's (cuda.cuh) or the tests' (tests/cuda/emulation.hpp), and has
//
//   block.x(), y(), z()                the block's place in the grid
//   block.each([&](int thread) {...})  a phase: all threads, in no order
//   block.sync()                       the barrier between two phases
//   typename Block::template PerThread<T> x;   x[thread]: what a thread keeps from phase to phase
//   typename Block::template Array<T, N>       an array in shared memory
//   block.words(array), block.words(pointer, count)
//                                      a view of words that the threads exchange, in shared or in device memory
//
// and, called by all threads outside of each(), with results in a fixed order of additions,
//
//   block.template sum<Lanes>(values)         PerThread<Values<N>>: each thread gets the sum of its group of lanes
//   block.template greatest<Lanes>(word)      PerThread<T>, unsigned: the greatest of its group
//   block.exclusive_sum(word)                 PerThread<uint32>: each thread gets the sum of those before it; returns all
//   block.total(number), block.greatest(word) PerThread<T>: of the block; returned
//   block.add(array, i, n)                    inside each(): adds to a word in shared memory, atomically
//   block.raise(pointer, word)                inside each(): the greater of both, in device memory, atomically
//   block.last_to_arrive(pointer, expected)   true in the last of the `expected` blocks that call it, which then sees all
//                                             that the others have written; the counter is 0 before and after
//
// Between two barriers no word may be touched by two threads of which one writes: the tests' Block watches over it.
#pragma once

#include "math.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
namespace gpu {
inline namespace FASTV_KIND {

// What a thread sums up.
template <class T, std::size_t N>
struct Values {
  T value[N];
};
// Four floats that shared memory moves at once.
struct alignas(16) Four {
  float value[4];
};

// order_key() of a logit, so that maxima are of integers: above all others where the logit makes a softmax NaN.
inline constexpr std::uint32_t no_key = 0, nan_key = 0xffffffffu;
FASTV_DEVICE inline std::uint32_t softmax_key(const float& logit) noexcept {
  const std::uint32_t bits = bits_of(logit), infinity = FloatBits<float>::infinity;
  const bool unusable = (bits & ~FloatBits<float>::sign) > infinity || bits == infinity;
  return unusable ? nan_key : order_key(logit);
}
// The float of a key that is neither.
FASTV_DEVICE inline float float_of_key(std::uint32_t key) noexcept {
  constexpr std::uint32_t sign = FloatBits<float>::sign;
  return bit_cast<float>(key >= sign ? key - sign : sign | (sign - key));
}

// a * b, rounded before anything is added to it, so that a GPU's values are the host's.
FASTV_KERNEL inline float rounded_product(float a, float b) noexcept {
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

FASTV_DEVICE inline std::uint32_t least(std::uint32_t a, std::uint32_t b) noexcept { return a < b ? a : b; }
FASTV_DEVICE inline std::uint32_t most(std::uint32_t a, std::uint32_t b) noexcept { return a > b ? a : b; }
FASTV_DEVICE inline std::uint32_t parts_of(std::uint32_t count, std::uint32_t size) noexcept {
  return (count + size - 1) / size;
}

}  // namespace FASTV_KIND
}  // namespace gpu
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

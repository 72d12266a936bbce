// fastv: the kernel that moves the kept rows of any number of tensors.
#pragma once

#include "cuda_sequence.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
namespace gpu {
inline namespace FASTV_KIND {

// One tensor: bytes of rows and strides. unit: bytes moved at once, which divide all of these and both addresses.
struct Moved {
  const char* from;
  char* to;
  const std::int32_t* numbers;  // rows of `from`, in order
  std::ptrdiff_t from_row, to_row, from_plane, to_plane;
  std::uint32_t units, unit, planes, count;  // units of a row, rows that are kept
  std::uint32_t tile;                        // rows of a block
};

// Grid: tiles of kept rows, planes of the tensor that has most, tensors.
struct Gather {
  static constexpr int threads = 256;
  template <class Block>
  struct Shared {};

  Moved tensors[cuda::max_moves];

  template <class Block, class Memory>
  FASTV_KERNEL void operator()(Block& block, Memory&) const {
    const Moved& moved = tensors[block.z()];
    if (block.y() >= moved.planes) return;
    switch (moved.unit) {
      case 16: return move<Four>(block, moved);
      case 8: return move<std::uint64_t>(block, moved);
      case 4: return move<std::uint32_t>(block, moved);
      case 2: return move<std::uint16_t>(block, moved);
      default: return move<std::uint8_t>(block, moved);
    }
  }

 private:
  // Short rows side by side, so that fewer threads are idle; long ones one after the other, all threads on each.
  template <class Unit, class Block>
  FASTV_KERNEL void move(Block& block, const Moved& moved) const {
    const std::uint32_t wide = static_cast<std::uint32_t>(threads) / most(moved.units, 1);
    const std::uint32_t step = most(wide, 1), first = block.x() * moved.tile;
    const std::ptrdiff_t plane = static_cast<std::ptrdiff_t>(block.y());
    block.each([&](int thread) {
      const auto t = static_cast<std::uint32_t>(thread);
      const std::uint32_t units = moved.units, lanes = wide > 0 ? units : static_cast<std::uint32_t>(threads);
      if (t / lanes >= step) return;
      for (std::uint32_t r = t / lanes; r < moved.tile; r += step) {
        const std::uint32_t row = first + r;
        if (row >= moved.count) return;
        const char* from =
            moved.from + plane * moved.from_plane + static_cast<std::ptrdiff_t>(moved.numbers[row]) * moved.from_row;
        char* to = moved.to + plane * moved.to_plane + static_cast<std::ptrdiff_t>(row) * moved.to_row;
        for (std::uint32_t i = t % lanes; i < units; i += lanes)
          reinterpret_cast<Unit*>(to)[i] = reinterpret_cast<const Unit*>(from)[i];
      }
    });
  }
};

}  // namespace FASTV_KIND
}  // namespace gpu
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

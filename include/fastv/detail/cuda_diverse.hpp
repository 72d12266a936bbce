// fastv: the first two kernels of Selection::diverse: features at unit length, and the products, which are cosines, of
// every two tokens that compete. The third, in cuda_greedy.hpp, takes tokens one by one and reads a row of products for
// each.
#pragma once

#include "cuda_logits.hpp"
#include "cuda_select.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
namespace gpu {
inline namespace FASTV_KIND {

// Grid: tiles of visual tokens, sequences. A warp makes the features of one token, every lane its own elements.
template <class T>
struct LoadFeatures {
  static constexpr int threads = 256;
  static constexpr std::uint32_t lanes = 32, tokens = threads / lanes;  // of a block
  template <class Block>
  struct Shared {};

  StageTables tables;
  Vectors<T> vectors;
  Vectors<float> scales;  // data and pointers null: none
  cuda::FeaturesAt at;
  bool mean_of_heads;
  std::uint32_t heads, dim, width, room;  // room: floats from token to token, zeros behind the width
  float* rows;                            // [visual tokens, room]
  std::uint32_t* kinds;                   // [visual tokens]

  template <class Block, class Memory>
  FASTV_KERNEL void operator()(Block& block, Memory&) const {
    const Sequence s = tables.sequences[block.y()];
    const std::uint32_t begin = block.x() * tokens;
    if (s.contests == 0 || begin >= s.visual) return;
    const auto token_of = [&](int thread) { return begin + static_cast<std::uint32_t>(thread) / lanes; };
    const auto row_of = [&](int thread) {
      return rows + static_cast<std::size_t>(s.visual_first + token_of(thread)) * room;
    };
    const auto lane_of = [](int thread) { return static_cast<std::uint32_t>(thread) % lanes; };
    typename Block::template PerThread<std::uint32_t> greatest;
    typename Block::template PerThread<Values<float, 1>> sum;
    block.each([&](int thread) {
      std::uint32_t magnitude = 0;
      if (token_of(thread) < s.visual) {
        const Sequence own = placed(s);
        const std::uint32_t number = number_of(s, token_of(thread));
        for (std::uint32_t i = lane_of(thread); i < room; i += lanes) {
          const float x = i < width ? element(own, number, i) : 0.0f;
          row_of(thread)[i] = x;
          magnitude = most(magnitude, bits_of(x) & ~FloatBits<float>::sign);
        }
      }
      greatest[thread] = magnitude;
    });
    block.template greatest<static_cast<int>(lanes)>(greatest);
    // Near 1 first, by a power of two, as Greedy::load_piece().
    block.each([&](int thread) {
      float total = 0;
      if (token_of(thread) < s.visual && kind_of(greatest[thread]) == unit_length) {
        const std::uint32_t exponent = greatest[thread] >> 23;
        const float near_one = bit_cast<float>((exponent > 253 ? 1u : 254u - exponent) << 23);
        for (std::uint32_t i = lane_of(thread); i < room; i += lanes) {
          const float x = row_of(thread)[i] * near_one;
          row_of(thread)[i] = x;
          total += x * x;
        }
      }
      sum[thread].value[0] = total;
    });
    block.template sum<static_cast<int>(lanes)>(sum);
    block.each([&](int thread) {
      if (token_of(thread) >= s.visual) return;
      const std::uint32_t kind = kind_of(greatest[thread]);
      const float inverse = kind == unit_length ? 1.0f / sqrt_of(sum[thread].value[0]) : 0.0f;
      for (std::uint32_t i = lane_of(thread); i < room; i += lanes)
        row_of(thread)[i] = kind == unit_length ? row_of(thread)[i] * inverse : 0.0f;
      if (lane_of(thread) == 0) kinds[s.visual_first + token_of(thread)] = kind;
    });
  }

 private:
  // Denormal features point nowhere either.
  FASTV_KERNEL static std::uint32_t kind_of(std::uint32_t greatest) {
    return greatest >= FloatBits<float>::infinity ? no_numbers : greatest < 0x00800000u ? zeros : unit_length;
  }
  // The sequence as vectors are numbered in it, and the number of a visual token's.
  FASTV_KERNEL Sequence placed(Sequence s) const {
    if (at == cuda::FeaturesAt::rows) s.key_row = s.first;
    if (at == cuda::FeaturesAt::visual) s.key_row = s.visual_first;
    return s;
  }
  FASTV_KERNEL std::uint32_t number_of(const Sequence& s, std::uint32_t token) const {
    if (at == cuda::FeaturesAt::visual) return token;
    const auto row = static_cast<std::uint32_t>(tables.candidates[s.visual_first + token]);
    return at == cuda::FeaturesAt::rows ? row : s.past + row - s.first_key;
  }

  FASTV_KERNEL float load(const Sequence& s, std::uint32_t number, std::uint32_t head, std::uint32_t d) const {
    const float x = widened(vectors.vector(s, number, head)[vectors.offset(d)]);
    const bool scaled = scales.data != nullptr || scales.pages != 0;
    return scaled ? x * *scales.vector(s, number, head) : x;
  }
  // Element i of what load_features_of() makes, by the same sum.
  FASTV_KERNEL float element(const Sequence& s, std::uint32_t number, std::uint32_t i) const {
    if (width == heads * dim) return load(s, number, i / dim, i % dim);
    float sum = 0;
    if (!mean_of_heads) {
      for (std::uint32_t e = i; e < heads * dim; e += width) sum += sign_of(e) * load(s, number, e / dim, e % dim);
      return sum;
    }
    for (std::uint32_t head = 0; head < heads; ++head)
      for (std::uint32_t d = i; d < dim; d += width) {
        const float x = load(s, number, head, d);
        sum += width == dim ? x : sign_of(d) * x;
      }
    return sum;
  }
};

FASTV_KERNEL inline const Contest* contests_of(const StageTables& tables, const Sequence& s) {
  return reinterpret_cast<const Contest*>(tables.words + s.words_contests);
}

// Grid: tiles of products, of product_tile tokens by as many. Both halves of a contest's matrix are written, of which one
// is computed. Every product is summed up in the same order, so that equal features have equal cosines.
struct FeatureProducts {
  static constexpr int threads = 256;
  static constexpr std::uint32_t slab = 32, fours = slab / 4;  // elements at once
  static constexpr std::uint32_t side = 16, each = 4;          // threads along a side of the tile, rows of a thread
  static constexpr std::uint32_t stride = fours + 1;           // of rows in shared memory, so that banks differ
  static constexpr std::uint32_t loads = product_tile * fours / threads;
  template <class Block>
  struct Shared {
    typename Block::template Array<Four, static_cast<std::size_t>(product_tile) * stride> a, b;
  };

  StageTables tables;
  const float* rows;   // [visual tokens, room]
  std::uint32_t room;  // a multiple of slab
  float* products;

  template <class Block>
  FASTV_KERNEL void operator()(Block& block, Shared<Block>& shared) const {
    const Sequence& s = tables.sequences[sequence_of<&Sequence::first_tile>(tables, block.x())];
    const Contest contest = contests_of(tables, s)[contest_of(s, block.x())];
    // Tile p of the lower triangle, row by row.
    const std::uint32_t p = block.x() - contest.first_tile;
    std::uint32_t down = 0;
    while ((down + 1) * (down + 2) / 2 <= p) ++down;
    const std::uint32_t row = down * product_tile, column = (p - down * (down + 1) / 2) * product_tile;

    typename Block::template PerThread<Values<float, static_cast<std::size_t>(each) * each>> sums;
    typename Block::template PerThread<Values<const float*, 2 * loads>> from;
    block.each([&](int thread) {
      FASTV_KERNEL_UNROLL
      for (float& sum : sums[thread].value) sum = 0;
      FASTV_KERNEL_UNROLL
      for (std::uint32_t i = 0; i < loads; ++i) {
        const std::uint32_t place = place_of(thread, i) / fours, in_row = place_of(thread, i) % fours * 4;
        from[thread].value[i] = row_of(s, contest, row + place, in_row);
        from[thread].value[loads + i] = row_of(s, contest, column + place, in_row);
      }
    });
    for (std::uint32_t begin = 0; begin < room; begin += slab) {
      block.each([&](int thread) {
        FASTV_KERNEL_UNROLL
        for (std::uint32_t i = 0; i < loads; ++i) {
          const std::uint32_t to = place_of(thread, i) / fours * stride + place_of(thread, i) % fours;
          shared.a[to] = load(from[thread].value[i], begin);
          shared.b[to] = load(from[thread].value[loads + i], begin);
        }
      });
      block.sync();
      block.each([&](int thread) { multiply(shared, thread, sums[thread]); });
      block.sync();
    }
    const std::uint32_t size = contest.group.size, wide = product_room(size);
    float* out = products + static_cast<std::size_t>(contest.products) * 8;
    block.each([&](int thread) {
      FASTV_KERNEL_UNROLL
      for (std::uint32_t i = 0; i < each * each; ++i) {
        const std::uint32_t r = row + y_of(thread) + i / each * side, c = column + x_of(thread) + i % each * side;
        if (r >= size || c >= size) continue;
        out[static_cast<std::size_t>(r) * wide + c] = sums[thread].value[i];
        if (row != column) out[static_cast<std::size_t>(c) * wide + r] = sums[thread].value[i];
      }
    });
  }

 private:
  FASTV_KERNEL static std::uint32_t x_of(int thread) { return static_cast<std::uint32_t>(thread) % side; }
  FASTV_KERNEL static std::uint32_t y_of(int thread) { return static_cast<std::uint32_t>(thread) / side; }
  // The four that a thread loads.
  FASTV_KERNEL static std::uint32_t place_of(int thread, std::uint32_t i) {
    return static_cast<std::uint32_t>(thread) + i * threads;
  }
  FASTV_KERNEL std::uint32_t contest_of(const Sequence& s, std::uint32_t tile) const {
    std::uint32_t low = 0, high = s.contests;
    while (high - low > 1) {
      const std::uint32_t middle = (low + high) / 2;
      if (contests_of(tables, s)[middle].first_tile <= tile)
        low = middle;
      else
        high = middle;
    }
    return low;
  }
  FASTV_KERNEL const float* row_of(const Sequence& s, const Contest& contest, std::uint32_t e, std::uint32_t i) const {
    if (e >= contest.group.size) return nullptr;
    return rows + static_cast<std::size_t>(s.visual_first + member_of(contest.group, e)) * room + i;
  }
  FASTV_KERNEL static Four load(const float* from, std::uint32_t begin) {
    if (from == nullptr) return {};
    return *reinterpret_cast<const Four*>(from + begin);
  }
  // A slab's sums are made apart from those before, so that rounding does not grow with the width.
  template <class Block>
  FASTV_KERNEL static void multiply(Shared<Block>& shared, int thread,
                                    Values<float, static_cast<std::size_t>(each) * each>& sums) {
    Values<float, static_cast<std::size_t>(each) * each> own{};
    FASTV_KERNEL_UNROLL
    for (std::uint32_t k = 0; k < fours; ++k) {
      Four a[each], b[each];
      FASTV_KERNEL_UNROLL
      for (std::uint32_t i = 0; i < each; ++i) {
        a[i] = shared.a[(y_of(thread) + i * side) * stride + k];
        b[i] = shared.b[(x_of(thread) + i * side) * stride + k];
      }
      FASTV_KERNEL_UNROLL
      for (std::uint32_t i = 0; i < each * each; ++i) {
        FASTV_KERNEL_UNROLL
        for (std::uint32_t j = 0; j < 4; ++j) own.value[i] += a[i / each].value[j] * b[i % each].value[j];
      }
    }
    FASTV_KERNEL_UNROLL
    for (std::uint32_t i = 0; i < each * each; ++i) sums.value[i] += own.value[i];
  }
};

}  // namespace FASTV_KIND
}  // namespace gpu
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

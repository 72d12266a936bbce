// fastv: the kernel that multiplies a few query rows with all keys: logits, and of each chunk of keys the parts of a
// softmax.
#pragma once

#include "cuda_sequence.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
namespace gpu {
inline namespace FASTV_KIND {

inline constexpr std::uint32_t chunk_keys = 64;  // keys of a block
inline constexpr std::uint32_t most_dim = 576;   // elements of a head: MLA's

// Element types, where a kernel tells them apart as it runs.
enum class Element : std::uint32_t { real, half, bfloat16, e4m3, e5m2, integer };
template <class T>
struct ElementOf;
template <>
struct ElementOf<float> {
  static constexpr Element value = Element::real;
};
template <>
struct ElementOf<fastv::half> {
  static constexpr Element value = Element::half;
};
template <>
struct ElementOf<fastv::bfloat16> {
  static constexpr Element value = Element::bfloat16;
};
template <>
struct ElementOf<fp8_e4m3> {
  static constexpr Element value = Element::e4m3;
};
template <>
struct ElementOf<fp8_e5m2> {
  static constexpr Element value = Element::e5m2;
};
template <>
struct ElementOf<std::int8_t> {
  static constexpr Element value = Element::integer;
};

// A sequence's key (or scale) j of a head is at vector(...); its element i is offset(i) further on.
template <class T>
struct Vectors {
  const T* data;
  const std::int32_t* tables;
  const T* const* pointers;
  std::ptrdiff_t head_stride, token_stride, block_stride, chunk_stride, offset_in_block;
  std::uint32_t pages, block_tokens, chunk;  // 0 pages: one piece; chunk 0: vectors are in one piece

  FASTV_KERNEL const T* vector(const Sequence& s, std::uint32_t key, std::uint32_t head) const noexcept {
    const std::ptrdiff_t in_head = static_cast<std::ptrdiff_t>(head) * head_stride;
    if (pages == 0) return data + (static_cast<std::ptrdiff_t>(s.key_row) + key) * token_stride + in_head;
    const std::uint32_t page = key / block_tokens, row = key - page * block_tokens;
    const std::size_t entry = static_cast<std::size_t>(s.table_row) * pages + page;
    const T* block = pointers != nullptr ? pointers[entry] + offset_in_block
                                         : data + static_cast<std::ptrdiff_t>(tables[entry]) * block_stride;
    return block + static_cast<std::ptrdiff_t>(row) * token_stride + in_head;
  }
  FASTV_KERNEL std::ptrdiff_t offset(std::uint32_t i) const noexcept {
    if (chunk == 0) return static_cast<std::ptrdiff_t>(i);
    const std::uint32_t c = i / chunk;
    return static_cast<std::ptrdiff_t>(c) * chunk_stride + static_cast<std::ptrdiff_t>(i - c * chunk);
  }
};

// 16 bytes of a key, loaded at once where all strides keep to 16 bytes, or a few elements one by one.
template <class K, bool Wide>
struct alignas(Wide ? 16 : alignof(K)) Piece {
  static constexpr std::uint32_t size = Wide ? 16 / sizeof(K) : 4;
  K element[size];
};

// What is done to a query before it meets the keys. Pointers: device memory; the query's elements are `type`.
struct Queries {
  const void *data, *bias;
  std::ptrdiff_t head_stride, token_stride;
  Element type;
  std::uint32_t heads, dim;
  float scale;
  cuda::Rope rope;
};
// What is done to a product before the softmax; see fastv::QueryKey.
struct Terms {
  float soft_cap;
  const float *bias, *alibi;
  const std::int32_t* visible;
  std::size_t window;
  bool causal;
};
// Of one chunk: softmax_key() of the greatest logit, and the sum of exp(logit - greatest).
struct ChunkPart {
  std::uint32_t most;
  float sum;
};

FASTV_KERNEL inline float element_at(const void* data, std::ptrdiff_t i, Element type) noexcept {
  switch (type) {
    case Element::real: return static_cast<const float*>(data)[i];
    case Element::half: return to_float(static_cast<const fastv::half*>(data)[i]);
    case Element::bfloat16: return to_float(static_cast<const fastv::bfloat16*>(data)[i]);
    case Element::e4m3: return to_float(static_cast<const fp8_e4m3*>(data)[i]);
    case Element::e5m2: return to_float(static_cast<const fp8_e5m2*>(data)[i]);
    case Element::integer: return to_float(static_cast<const std::int8_t*>(data)[i]);
  }
  return 0;
}

// to_float() by the GPU's own conversion, of which both are exact.
template <class T>
FASTV_KERNEL inline float widened(T value) noexcept {
  return to_float(value);
}
FASTV_KERNEL inline float widened(fastv::half value) noexcept {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
  return out;
#else
  return to_float(value);
#endif
}

// Element d of a query: its bias added, rotated, scaled.
FASTV_KERNEL inline float query_at(const Queries& q, std::uint32_t row, std::uint32_t head, std::uint32_t d) noexcept {
  const auto raw = [&](std::uint32_t i) {
    float value = element_at(q.data,
                             static_cast<std::ptrdiff_t>(row) * q.token_stride +
                                 static_cast<std::ptrdiff_t>(head) * q.head_stride + static_cast<std::ptrdiff_t>(i),
                             q.type);
    if (q.bias != nullptr) value += element_at(q.bias, static_cast<std::ptrdiff_t>(head * q.dim + i), q.type);
    return value;
  };
  const auto pairs = static_cast<std::uint32_t>(q.rope.pairs);
  const float own = raw(d);
  if (d >= 2 * pairs) return own * q.scale;
  const bool halves = q.rope.layout == RopeLayout::half;
  const std::uint32_t pair = halves ? d % pairs : d / 2;
  const bool second = halves ? d >= pairs : d % 2 != 0;
  const float other = raw(halves ? (second ? d - pairs : d + pairs) : d ^ 1u);
  const std::size_t axis = q.rope.axis == nullptr ? 0 : q.rope.axis[pair];
  const float position = static_cast<float>(q.rope.positions[axis * q.rope.axis_stride + row]);
  double sine = 0, cosine = 1;
  sin_cos(static_cast<double>(position * q.rope.frequencies[pair]), sine, cosine);  // rounded first, as models do
  const double a = static_cast<double>(own), b = static_cast<double>(other);
  return static_cast<float>(a * cosine + (second ? b : -b) * sine) * q.scale;
}

// The keys at hand that a row of the sequence sees.
FASTV_KERNEL inline Range seen_of(const Sequence& s, const Terms& terms, std::uint32_t row) noexcept {
  const std::size_t own = std::size_t{s.past} + row + 1, all = std::size_t{s.first_key} + s.keys;
  std::size_t end = terms.causal ? own : all;
  if (terms.visible != nullptr) {
    const std::int32_t seen = terms.visible[s.query_row + (row - (s.tokens - s.queries))];
    end = seen < 0 ? 0 : static_cast<std::size_t>(seen) < all ? static_cast<std::size_t>(seen) : all;
  }
  return seen_range(own, end, terms.window, s.first_key);
}

// Grid: chunks of keys, tiles of up to Heads query heads that share a KV head, query rows. 16 lanes multiply one key
// with all heads of the tile, so that keys are read once a tile; a block has four keys under way in each group of lanes.
template <class K, bool Wide, int Heads>
struct Logits {
  static constexpr int threads = 256;
  static constexpr std::uint32_t lanes = 16, at_once = 4;  // lanes a key, keys of a group of lanes
  static constexpr std::size_t products = static_cast<std::size_t>(Heads) * at_once;
  template <class Block>
  struct Shared {
    typename Block::template Array<Four, static_cast<std::size_t>(Heads) * most_dim / 4> query;
    typename Block::template Array<float, static_cast<std::size_t>(Heads) * chunk_keys> logits;
  };

  StageTables tables;
  Queries query;
  Vectors<K> keys;
  Vectors<float> scales;  // data and pointers null: none
  Terms terms;
  std::uint32_t group, tiles;       // query heads of a KV head, and tiles of them
  std::uint32_t first_job;          // of the launch
  std::uint32_t keys_room, chunks;  // logits of a head, parts of a head
  const std::uint32_t* again;       // [sequences]: 0 where there is nothing to do; null: all have
  float* logits;                    // [jobs of the launch, heads, keys_room]
  ChunkPart* parts;                 // [jobs of the launch, heads, chunks]

  template <class Block>
  FASTV_KERNEL void operator()(Block& block, Shared<Block>& shared) const {
    const std::uint32_t chunk = block.x(), slot = block.z(), job = first_job + slot;
    const std::uint32_t number = sequence_of<&Sequence::first_job>(tables, job);
    const Sequence s = tables.sequences[number];  // a copy: its words are loaded at once
    const std::uint32_t begin = chunk * chunk_keys;
    if (begin >= s.keys || (again != nullptr && again[number] == 0)) return;
    const std::uint32_t kv_head = block.y() / tiles, tile = block.y() % tiles;
    const std::uint32_t first_head = kv_head * group + tile * Heads;
    const std::uint32_t heads = least(Heads, group - tile * Heads);
    const std::uint32_t row = row_of_job(s, tables.words, job - s.first_job);
    const Range seen = seen_of(s, terms, row);
    const std::uint32_t low = most(begin, static_cast<std::uint32_t>(seen.first));
    const std::uint32_t high = least(begin + chunk_keys, static_cast<std::uint32_t>(seen.end));
    const std::size_t out = static_cast<std::size_t>(slot) * query.heads + first_head;  // of the tile's first head
    if (low >= high) {
      block.each([&](int thread) {
        const auto h = static_cast<std::uint32_t>(thread);
        if (h < heads) parts[(out + h) * chunks + chunk] = {no_key, 0};
      });
      return;
    }
    // Keys are on their way while the queries are prepared.
    typename Block::template PerThread<UnderWay> keys_of;
    block.each([&](int thread) {
      const auto lane = static_cast<std::uint32_t>(thread) % lanes, place = static_cast<std::uint32_t>(thread) / lanes;
      UnderWay& own = keys_of[thread];
      FASTV_KERNEL_UNROLL
      for (std::uint32_t k = 0; k < at_once; ++k) {
        const std::uint32_t key = begin + place + k * (threads / lanes);
        own.vector[k] = key >= low && key < high ? keys.vector(s, key, kv_head) : nullptr;
      }
      load(own, lane * Piece<K, Wide>::size);
    });
    const std::uint32_t fours = (query.dim + 3) / 4;
    load_query(block, shared, s.query_row + (row - (s.tokens - s.queries)), first_head, heads, fours);
    block.sync();

    typename Block::template PerThread<Values<float, products>> sums;
    block.each([&](int thread) {
      multiply(shared, keys_of[thread], static_cast<std::uint32_t>(thread) % lanes, heads, fours, sums[thread]);
    });
    block.template sum<lanes>(sums);
    block.each([&](int thread) {
      const auto lane = static_cast<std::uint32_t>(thread) % lanes, place = static_cast<std::uint32_t>(thread) / lanes;
      FASTV_KERNEL_UNROLL
      for (std::uint32_t part = 0; part < products; part += lanes) {
        float mine = 0;  // one of the sums by the number of the lane, without an index into registers
        FASTV_KERNEL_UNROLL
        for (std::uint32_t i = 0; i < lanes && part + i < products; ++i)
          mine = lane == i ? sums[thread].value[part + i] : mine;
        const std::uint32_t i = part + lane, h = i / at_once;
        const std::uint32_t in_chunk = place + i % at_once * (threads / lanes), key = begin + in_chunk;
        if (h >= heads || key < low || key >= high) continue;
        const float logit = finished(mine, s, key, kv_head, first_head + h, row);
        shared.logits[h * chunk_keys + in_chunk] = logit;
        logits[(out + h) * keys_room + key] = logit;
      }
    });
    block.sync();
    sum_up(block, shared, out, heads, chunk, low - begin, high - begin);
  }

 private:
  // The tile's queries, [heads, 4 * fours], zeros behind their ends.
  template <class Block>
  FASTV_KERNEL void load_query(Block& block, Shared<Block>& shared, std::uint32_t row, std::uint32_t first_head,
                               std::uint32_t heads, std::uint32_t fours) const {
    block.each([&](int thread) {
      for (auto i = static_cast<std::uint32_t>(thread); i < heads * fours; i += threads) {
        const std::uint32_t head = first_head + i / fours, d = i % fours * 4;
        Four four;
        FASTV_KERNEL_UNROLL
        for (std::uint32_t j = 0; j < 4; ++j)
          four.value[j] = d + j < query.dim ? query_at(query, row, head, d + j) : 0.0f;
        shared.query[i] = four;
      }
    });
  }

  // What a thread has loaded of its keys, null for those that the row does not see.
  struct UnderWay {
    const K* vector[at_once];
    Piece<K, Wide> piece[at_once];
  };
  // Elements i .. of each key; zeros behind their end.
  FASTV_KERNEL void load(UnderWay& own, std::uint32_t i) const {
    FASTV_KERNEL_UNROLL
    for (std::uint32_t k = 0; k < at_once; ++k) own.piece[k] = load(own.vector[k], i);
  }
  FASTV_KERNEL Piece<K, Wide> load(const K* vector, std::uint32_t i) const {
    Piece<K, Wide> piece{};
    if (vector == nullptr || i >= query.dim) return piece;
    if constexpr (Wide) {
      const K* from = vector + keys.offset(i);
      // Strides and `data` are multiples of 16 bytes; of a table's pointers nobody on the host knows.
      if (keys.pointers == nullptr || reinterpret_cast<std::uintptr_t>(from) % 16 == 0) {
        piece = *reinterpret_cast<const Piece<K, Wide>*>(from);
      } else {
        FASTV_KERNEL_UNROLL
        for (std::uint32_t j = 0; j < Piece<K, Wide>::size; ++j) piece.element[j] = from[j];
      }
    } else {
      FASTV_KERNEL_UNROLL
      for (std::uint32_t j = 0; j < Piece<K, Wide>::size; ++j)
        if (i + j < query.dim) piece.element[j] = vector[keys.offset(i + j)];
    }
    return piece;
  }

  // sums[h, k] = this lane's part of q_h . k.
  template <class Memory>
  FASTV_KERNEL void multiply(Memory& shared, UnderWay& own, std::uint32_t lane, std::uint32_t heads,
                             std::uint32_t fours, Values<float, products>& sums) const {
    constexpr std::uint32_t size = Piece<K, Wide>::size;
    FASTV_KERNEL_UNROLL
    for (std::size_t i = 0; i < products; ++i) sums.value[i] = 0;
    for (std::uint32_t i = lane * size; i < query.dim;) {
      FASTV_KERNEL_UNROLL
      for (std::uint32_t h = 0; h < Heads; ++h) {
        if (h >= heads) continue;
        FASTV_KERNEL_UNROLL
        for (std::uint32_t part = 0; part < size; part += 4) {
          const Four q = shared.query[h * fours + (i + part) / 4];
          FASTV_KERNEL_UNROLL
          for (std::uint32_t k = 0; k < at_once; ++k) {
            FASTV_KERNEL_UNROLL
            for (std::uint32_t j = 0; j < 4; ++j)
              sums.value[h * at_once + k] += q.value[j] * widened(own.piece[k].element[part + j]);
          }
        }
      }
      i += lanes * size;
      load(own, i);
    }
  }

  // Everything between q.k and the softmax, as finish_logits() of the core.
  FASTV_KERNEL float finished(float logit, const Sequence& s, std::uint32_t key, std::uint32_t kv_head,
                              std::uint32_t head, std::uint32_t row) const {
    if (scales.data != nullptr || scales.pages != 0) logit *= *scales.vector(s, key, kv_head);
    if (terms.soft_cap > 0 && !is_nan(logit)) logit = terms.soft_cap * tanh_of(logit * (1.0f / terms.soft_cap));
    if (terms.alibi != nullptr)
      logit -= terms.alibi[head] * (static_cast<float>(s.past + row) - static_cast<float>(s.first_key + key));
    if (terms.bias != nullptr) {
      const float bias = terms.bias[static_cast<std::size_t>(s.key_row) + key];
      logit = hides(bias) ? minus_infinity<float>() : logit + bias;
    }
    return logit;
  }

  // 32 lanes a head, two keys a lane.
  template <class Block>
  FASTV_KERNEL void sum_up(Block& block, Shared<Block>& shared, std::size_t out, std::uint32_t heads,
                           std::uint32_t chunk, std::uint32_t low, std::uint32_t high) const {
    typename Block::template PerThread<std::uint32_t> top;
    typename Block::template PerThread<Values<float, 1>> sum;
    block.each([&](int thread) {
      const auto lane = static_cast<std::uint32_t>(thread) % 32, h = static_cast<std::uint32_t>(thread) / 32;
      std::uint32_t key = no_key;
      for (std::uint32_t i = lane; i < chunk_keys; i += 32)
        if (h < heads && i >= low && i < high) key = most(key, softmax_key(shared.logits[h * chunk_keys + i]));
      top[thread] = key;
    });
    block.template greatest<32>(top);
    block.each([&](int thread) {
      const auto lane = static_cast<std::uint32_t>(thread) % 32, h = static_cast<std::uint32_t>(thread) / 32;
      const float highest = top[thread] == nan_key || top[thread] == no_key ? 0.0f : float_of_key(top[thread]);
      float total = 0;
      if (top[thread] != nan_key && !is_infinite(highest))
        for (std::uint32_t i = lane; i < chunk_keys; i += 32)
          if (h < heads && i >= low && i < high) total += exp_of_negative(shared.logits[h * chunk_keys + i] - highest);
      sum[thread].value[0] = total;
    });
    block.template sum<32>(sum);
    block.each([&](int thread) {
      const auto h = static_cast<std::uint32_t>(thread) / 32;
      if (thread % 32 == 0 && h < heads) parts[(out + h) * chunks + chunk] = {top[thread], sum[thread].value[0]};
    });
  }
};

}  // namespace FASTV_KIND
}  // namespace gpu
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

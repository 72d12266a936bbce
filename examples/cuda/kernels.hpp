// The kernels of a small LLaMA decoder, as plain as they can be while a tile of rows shares what it reads. They are written in
// the form of fastv/detail/cuda_block.hpp, so that tests run the same source on the host; T is float or fastv::half.
//
// Shapes: a batch of sequences has its rows packed, sequence s being rows cumulative[s] .. cumulative[s + 1] - 1; q is
// [rows, H, c], k and v [rows, G, c]. A cache is [blocks, block_tokens, G, c]; slot j of sequence s lies in its block
// tables[s, j / block_tokens].
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <fastv/cuda_views.hpp>

#if defined(__CUDACC__)
#define DECODER_KERNEL __device__
#define DECODER_BOTH __host__ __device__
#else
#define DECODER_KERNEL
#define DECODER_BOTH
#endif

namespace decoder {

using fastv::half;
using Number = std::uint32_t;
inline constexpr Number block_tokens = 16;

// The nearest half, of equals the even one.
template <class T>
DECODER_BOTH inline T narrow(float value) {
  return value;
}
template <>
DECODER_BOTH inline half narrow<half>(float value) {
  Number bits = 0;
  memcpy(&bits, &value, sizeof(bits));
  const Number sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x7f800000u)
    return {static_cast<std::uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u))};
  if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {  // denormal: the float's own addition rounds
    float positive = 0;
    memcpy(&positive, &magnitude, sizeof(positive));
    positive += 0.5f;
    memcpy(&bits, &positive, sizeof(bits));
    return {static_cast<std::uint16_t>(sign | (bits - 0x3f000000u))};
  }
  return {static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13))};
}

// Where the rows of a step lie, all of it in device memory.
struct Packed {
  const std::int32_t *cumulative, *positions, *slots;  // [sequences + 1], [rows], [rows]
};

// One layer's keys and values.
template <class T>
struct Cache {
  T *keys, *values;
  const std::int32_t* tables;  // [sequences, pages]
  Number pages;

  DECODER_KERNEL std::size_t row(Number sequence, Number slot) const {
    const auto block = static_cast<std::size_t>(tables[sequence * pages + slot / block_tokens]);
    return block * block_tokens + slot % block_tokens;
  }
};

// hidden += more, and out = hidden / sqrt(mean(hidden^2) + eps) * weight. Grid: rows.
template <class T>
struct AddNorm {
  static constexpr int threads = 256;
  template <class Block>
  struct Shared {};
  T* hidden;                 // [rows, width]
  const T* more;             // the same, or null
  const T* weight;           // [width]
  T* out;                    // [grid, width]
  const std::int32_t* ends;  // null, or cumulative: of each sequence only its last row, which is not changed
  Number width;
  float eps;

  template <class Block, class Memory>
  DECODER_KERNEL void operator()(Block& block, Memory&) const {
    const Number row = ends == nullptr ? block.x() : static_cast<Number>(ends[block.x() + 1] - 1);
    T* x = hidden + std::size_t{row} * width;
    T* y = out + std::size_t{block.x()} * width;
    typename Block::template PerThread<float> squares;
    block.each([&](int thread) {
      float sum = 0;
      for (auto i = static_cast<Number>(thread); i < width; i += threads) {
        float value = fastv::to_float(x[i]);
        if (more != nullptr) value += fastv::to_float(more[std::size_t{row} * width + i]);
        const T rounded = narrow<T>(value);
        if (ends == nullptr) x[i] = rounded;
        value = fastv::to_float(rounded);
        sum += value * value;
        y[i] = rounded;
      }
      squares[thread] = sum;
    });
    const float scale = 1.0f / sqrtf(block.total(squares) / static_cast<float>(width) + eps);
    block.each([&](int thread) {
      for (auto i = static_cast<Number>(thread); i < width; i += threads)
        y[i] = narrow<T>(fastv::to_float(y[i]) * scale * fastv::to_float(weight[i]));
    });
  }
};

// Rotates queries in place, and keys on their way into the cache, beside which values go. Grid: rows of the longest
// sequence, sequences.
template <class T>
struct RotateAndStore {
  static constexpr int threads = 256;
  template <class Block>
  struct Shared {};
  T* query;
  const T *key, *value;
  Cache<T> cache;
  Packed packed;
  Number heads, kv_heads, dim;
  float theta;

  template <class Block, class Memory>
  DECODER_KERNEL void operator()(Block& block, Memory&) const {
    const Number row = static_cast<Number>(packed.cumulative[block.y()]) + block.x(), half_dim = dim / 2;
    if (row >= static_cast<Number>(packed.cumulative[block.y() + 1])) return;
    const std::size_t to = cache.row(block.y(), static_cast<Number>(packed.slots[row])) * kv_heads * dim;
    const auto position = static_cast<float>(packed.positions[row]);
    block.each([&](int thread) {
      for (auto i = static_cast<Number>(thread); i < (heads + kv_heads) * half_dim; i += threads) {
        const bool is_query = i < heads * half_dim;
        const Number pair = i % half_dim, head = (is_query ? i : i - heads * half_dim) / half_dim;
        const std::size_t own = std::size_t{head} * dim + pair;
        const T* from =
            is_query ? query + std::size_t{row} * heads * dim + own : key + std::size_t{row} * kv_heads * dim + own;
        T* into = is_query ? query + std::size_t{row} * heads * dim + own : cache.keys + to + own;
        const float angle = position * (1.0f / powf(theta, static_cast<float>(2 * pair) / static_cast<float>(dim)));
        const float c = cosf(angle), s = sinf(angle), a = fastv::to_float(from[0]), b = fastv::to_float(from[half_dim]);
        into[0] = narrow<T>(a * c - b * s);
        into[half_dim] = narrow<T>(b * c + a * s);
      }
      for (auto i = static_cast<Number>(thread); i < kv_heads * dim; i += threads)
        cache.values[to + i] = value[std::size_t{row} * kv_heads * dim + i];
    });
  }
};

// out = softmax(q k^T / sqrt(c)) v, where a row sees the slots up to its own. Grid: tiles of rows, query heads, sequences.
// Thread t has rows t / 16 and t / 16 + 16 of the tile, and of what they share every 16th from t % 16 on.
template <class T>
struct Attention {
  static constexpr int threads = 256;
  static constexpr Number tile = 32, chunk = 32, most_dim = 128, lanes = 16, mine = most_dim / lanes;
  template <class Block>
  struct Shared {
    typename Block::template Array<float, tile * most_dim> query;
    typename Block::template Array<float, chunk*(most_dim + 1)>
        vectors;  // keys, then values; one more against conflicts
    typename Block::template Array<float, tile * chunk> weights;
    typename Block::template Array<float, tile> highest, sum, rescale;
  };
  struct Sums {
    float value[2][mine];
  };
  const T* query;
  T* out;
  Cache<T> cache;
  Packed packed;
  const unsigned char* hidden;  // [sequences, hidden_stride], 1: no row sees this slot; or null
  Number hidden_stride, heads, kv_heads, dim;

  template <class Block>
  DECODER_KERNEL void operator()(Block& block, Shared<Block>& shared) const {
    const Number sequence = block.z(), head = block.y(), kv_head = head / (heads / kv_heads);
    const Number first = static_cast<Number>(packed.cumulative[sequence]) + block.x() * tile;
    const auto end = static_cast<Number>(packed.cumulative[sequence + 1]);
    if (first >= end) return;
    const Number rows = end - first < tile ? end - first : tile;
    const Number keys = static_cast<Number>(packed.slots[first + rows - 1]) + 1;
    typename Block::template PerThread<Sums> sums;
    block.each([&](int thread) {
      const auto t = static_cast<Number>(thread);
      for (Number i = t; i < rows * dim; i += threads)
        shared.query[i] = fastv::to_float(query[(std::size_t{first + i / dim} * heads + head) * dim + i % dim]) /
                          sqrtf(static_cast<float>(dim));
      if (t < tile) {
        shared.highest[t] = -INFINITY;
        shared.sum[t] = 0.0f;
      }
      sums[thread] = {};
    });
    for (Number begin = 0; begin < keys; begin += chunk) {
      const Number count = keys - begin < chunk ? keys - begin : chunk;
      block.sync();
      load(block, shared, cache.keys, sequence, kv_head, begin, count);
      block.sync();
      block.each([&](int thread) {
        const Number lane = static_cast<Number>(thread) % lanes;
        for (Number r = static_cast<Number>(thread) / lanes; r < rows; r += lanes)
          for (Number j = lane; j < count; j += lanes) {
            float product = 0;
            for (Number d = 0; d < dim; ++d) product += shared.query[r * dim + d] * shared.vectors[j * (dim + 1) + d];
            const bool seen = begin + j <= static_cast<Number>(packed.slots[first + r]) &&
                              (hidden == nullptr || hidden[sequence * hidden_stride + begin + j] == 0);
            shared.weights[r * chunk + j] = seen ? product : -INFINITY;
          }
      });
      block.sync();
      load(block, shared, cache.values, sequence, kv_head, begin, count);
      block.each([&](int thread) {
        if (static_cast<Number>(thread) < rows) rescale_row(shared, static_cast<Number>(thread), count);
      });
      block.sync();
      block.each([&](int thread) {
        const Number lane = static_cast<Number>(thread) % lanes, r0 = static_cast<Number>(thread) / lanes;
        for (Number half_tile = 0; half_tile < 2; ++half_tile) {
          const Number r = r0 + half_tile * lanes;
          if (r >= rows) continue;
          float* own = sums[thread].value[half_tile];
          const float factor = shared.rescale[r];
          for (Number i = 0; i < mine; ++i) own[i] *= factor;
          for (Number j = 0; j < count; ++j) {
            const float weight = shared.weights[r * chunk + j];
            for (Number i = 0; i < mine; ++i)
              if (lane + i * lanes < dim) own[i] += weight * shared.vectors[j * (dim + 1) + lane + i * lanes];
          }
        }
      });
    }
    block.each([&](int thread) {
      const Number lane = static_cast<Number>(thread) % lanes, r0 = static_cast<Number>(thread) / lanes;
      for (Number half_tile = 0; half_tile < 2; ++half_tile) {
        const Number r = r0 + half_tile * lanes;
        for (Number i = 0; r < rows && i < mine; ++i)
          if (lane + i * lanes < dim)
            out[(std::size_t{first + r} * heads + head) * dim + lane + i * lanes] =
                narrow<T>(sums[thread].value[half_tile][i] / shared.sum[r]);
      }
    });
  }

 private:
  template <class Block>
  DECODER_KERNEL void load(Block& block, Shared<Block>& shared, const T* from, Number sequence, Number kv_head,
                           Number begin, Number count) const {
    block.each([&](int thread) {
      for (auto i = static_cast<Number>(thread); i < count * dim; i += threads)
        shared.vectors[i / dim * (dim + 1) + i % dim] =
            fastv::to_float(from[(cache.row(sequence, begin + i / dim) * kv_heads + kv_head) * dim + i % dim]);
    });
  }
  // Logits to weights, on the scale of the greatest logit so far.
  template <class Memory>
  DECODER_KERNEL void rescale_row(Memory& shared, Number r, Number count) const {
    const float before = shared.highest[r];
    float highest = before, sum = 0;
    for (Number j = 0; j < count; ++j) highest = fmaxf(highest, shared.weights[r * chunk + j]);
    const bool nothing = highest == -INFINITY;  // seen so far
    for (Number j = 0; j < count; ++j) {
      const float weight = nothing ? 0.0f : expf(shared.weights[r * chunk + j] - highest);
      shared.weights[r * chunk + j] = weight;
      sum += weight;
    }
    const float factor = nothing ? 1.0f : expf(before - highest);
    shared.highest[r] = highest;
    shared.rescale[r] = factor;
    shared.sum[r] = shared.sum[r] * factor + sum;
  }
};

// gate = silu(gate) * up. Grid: parts of `threads` elements.
template <class T>
struct Gate {
  static constexpr int threads = 256;
  template <class Block>
  struct Shared {};
  T* gate;
  const T* up;
  std::size_t count;

  template <class Block, class Memory>
  DECODER_KERNEL void operator()(Block& block, Memory&) const {
    block.each([&](int thread) {
      const std::size_t i = std::size_t{block.x()} * threads + static_cast<std::size_t>(thread);
      if (i >= count) return;
      const float x = fastv::to_float(gate[i]);
      gate[i] = narrow<T>(x / (1.0f + expf(-x)) * fastv::to_float(up[i]));
    });
  }
};

// The greatest logit's number, of equals the first, or what is forced becomes the sequence's next token, and its embedding
// the next hidden state; its place is one further on. Grid: sequences.
template <class T>
struct NextToken {
  static constexpr int threads = 256;
  template <class Block>
  struct Shared {};
  struct Best {
    Number key, token;
  };
  const T *logits, *embeddings;                 // [sequences, vocabulary], [vocabulary, width]
  const std::int32_t* forced;                   // [sequences], or null
  T* hidden;                                    // [sequences, width]
  std::int32_t *tokens, *positions, *slots[2];  // [sequences] each; slots of both groups of layers
  Number vocabulary, width;

  template <class Block, class Memory>
  DECODER_KERNEL void operator()(Block& block, Memory&) const {
    const Number s = block.x();
    typename Block::template PerThread<Best> own;
    typename Block::template PerThread<Number> key, token;
    block.each([&](int thread) {
      Best best{0, vocabulary};
      for (auto i = static_cast<Number>(thread); i < vocabulary; i += threads) {
        const float logit = fastv::to_float(logits[std::size_t{s} * vocabulary + i]);
        Number bits = 0;  // in the order of the floats
        memcpy(&bits, &logit, sizeof(bits));
        bits = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
        if (bits > best.key) best = {bits, i};
      }
      own[thread] = best;
      key[thread] = best.key;
    });
    const Number greatest = block.greatest(key);
    block.each([&](int thread) { token[thread] = own[thread].key == greatest ? ~own[thread].token : 0; });
    Number best = ~block.greatest(token);
    if (forced != nullptr) best = static_cast<Number>(forced[s]);
    block.each([&](int thread) {
      for (auto i = static_cast<Number>(thread); i < width; i += threads)
        hidden[std::size_t{s} * width + i] = embeddings[std::size_t{best} * width + i];
      if (thread != 0) return;
      tokens[s] = static_cast<std::int32_t>(best);
      ++positions[s];
      for (std::int32_t* slot : slots) ++slot[s];
    });
  }
};

}  // namespace decoder

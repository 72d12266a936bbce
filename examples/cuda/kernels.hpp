// The kernels of a small LLaMA decoder, as plain as they can be while a tile of rows shares what it reads. They are written in
// the form of fastv/detail/cuda_block.hpp, so that tests run the same source on the host; T is float or fastv::half.
//
// Shapes: a batch of sequences has its rows packed, sequence s being rows cumulative[s] .. cumulative[s + 1] - 1; q is
// [rows, H, c], k and v [rows, G, c]. A cache is [blocks, block_tokens, G, c]; slot j of sequence s lies in its block
// tables[s, j / block_tokens].
#pragma once

#include "../common/narrow.hpp"

namespace decoder {

using fastv::half;
using Number = std::uint32_t;
inline constexpr Number block_tokens = 16;

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

  EXAMPLE_KERNEL std::size_t row(Number sequence, Number slot) const {
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
  EXAMPLE_KERNEL void operator()(Block& block, Memory&) const {
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
  EXAMPLE_KERNEL void operator()(Block& block, Memory&) const {
    const Number row = static_cast<Number>(packed.cumulative[block.y()]) + block.x(), half_dim = dim / 2;
    if (row >= static_cast<Number>(packed.cumulative[block.y() + 1])) return;
    const std::size_t queries = std::size_t{row} * heads * dim, keys = std::size_t{row} * kv_heads * dim;
    const std::size_t slot = cache.row(block.y(), static_cast<Number>(packed.slots[row])) * kv_heads * dim;
    const auto position = static_cast<float>(packed.positions[row]);
    block.each([&](int thread) {
      for (auto i = static_cast<Number>(thread); i < (heads + kv_heads) * half_dim; i += threads) {
        const Number pair = i % half_dim, head = i / half_dim;
        const bool is_query = head < heads;
        const std::size_t own = (is_query ? head : head - heads) * dim + pair;
        const T* from = is_query ? query + queries + own : key + keys + own;
        T* into = is_query ? query + queries + own : cache.keys + slot + own;
        const float angle = position * (1.0f / powf(theta, static_cast<float>(2 * pair) / static_cast<float>(dim)));
        const float c = cosf(angle), s = sinf(angle), a = fastv::to_float(from[0]), b = fastv::to_float(from[half_dim]);
        into[0] = narrow<T>(a * c - b * s);
        into[half_dim] = narrow<T>(b * c + a * s);
      }
      for (auto i = static_cast<Number>(thread); i < kv_heads * dim; i += threads)
        cache.values[slot + i] = value[keys + i];
    });
  }
};

// out = softmax(q k^T / sqrt(c)) v, where a row sees the slots up to its own, of at most most_slots. Grid: tiles of rows,
// query heads, sequences.
template <class T>
struct Attention {
  static constexpr int threads = 256;
  static constexpr Number tile = 8, most_dim = 128, most_slots = 1024, stride = most_slots + 1;
  template <class Block>
  struct Shared {
    typename Block::template Array<float, tile * most_dim> query;
    typename Block::template Array<float, tile * stride> weights;
    typename Block::template Array<float, tile> sum;
  };
  const T* query;
  T* out;
  Cache<T> cache;
  Packed packed;
  const unsigned char* hidden;  // [sequences, hidden_stride], 1: no row sees this slot; or null
  Number hidden_stride, heads, kv_heads, dim;

  template <class Block>
  EXAMPLE_KERNEL void operator()(Block& block, Shared<Block>& shared) const {
    const Number sequence = block.z(), head = block.y(), kv_head = head / (heads / kv_heads);
    const Number first = static_cast<Number>(packed.cumulative[sequence]) + block.x() * tile;
    const auto end = static_cast<Number>(packed.cumulative[sequence + 1]);
    if (first >= end) return;
    const Number rows = end - first < tile ? end - first : tile;
    const Number keys = static_cast<Number>(packed.slots[first + rows - 1]) + 1;
    const std::size_t own = (std::size_t{first} * heads + head) * dim;  // of the tile's first row
    const T* queries = query + own;
    const float scale = 1 / sqrtf(static_cast<float>(dim));
    const auto vector = [&](const T* from, Number slot) {
      return from + (cache.row(sequence, slot) * kv_heads + kv_head) * dim;
    };
    block.each([&](int thread) {
      for (auto i = static_cast<Number>(thread); i < tile * dim; i += threads)
        shared.query[i] = i < rows * dim ? fastv::to_float(queries[i / dim * heads * dim + i % dim]) : 0.0f;
    });
    block.sync();
    block.each([&](int thread) {  // a key with all rows of the tile
      for (auto j = static_cast<Number>(thread); j < keys; j += threads) {
        const T* key = vector(cache.keys, j);
        float products[tile] = {};
        for (Number d = 0; d < dim; ++d)
          for (Number r = 0; r < tile; ++r) products[r] += shared.query[r * dim + d] * fastv::to_float(key[d]);
        for (Number r = 0; r < rows; ++r) {
          const bool seen = j <= static_cast<Number>(packed.slots[first + r]) &&
                            (hidden == nullptr || hidden[sequence * hidden_stride + j] == 0);
          shared.weights[r * stride + j] = seen ? products[r] * scale : -INFINITY;
        }
      }
    });
    block.sync();
    block.each([&](int thread) {  // a row's logits to weights
      const auto r = static_cast<Number>(thread);
      float highest = -INFINITY, sum = 0;
      for (Number j = 0; r < rows && j < keys; ++j) highest = fmaxf(highest, shared.weights[r * stride + j]);
      for (Number j = 0; r < rows && j < keys; ++j) {
        const float logit = shared.weights[r * stride + j];
        const float weight = logit == -INFINITY ? 0.0f : expf(logit - highest);
        shared.weights[r * stride + j] = weight;
        sum += weight;
      }
      if (r < rows) shared.sum[r] = sum;
    });
    block.sync();
    block.each([&](int thread) {  // one element of every second row
      const Number d = static_cast<Number>(thread) % most_dim, second = static_cast<Number>(thread) / most_dim;
      if (d >= dim) return;
      float sums[tile / 2] = {};
      for (Number j = 0; j < keys; ++j) {
        const float value = fastv::to_float(vector(cache.values, j)[d]);
        for (Number i = 0; i < tile / 2; ++i)
          if (2 * i + second < rows) sums[i] += shared.weights[(2 * i + second) * stride + j] * value;
      }
      for (Number i = 0; i < tile / 2; ++i) {
        const Number r = 2 * i + second;
        if (r < rows) out[own + r * heads * dim + d] = narrow<T>(shared.sum[r] > 0 ? sums[i] / shared.sum[r] : 0.0f);
      }
    });
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
  EXAMPLE_KERNEL void operator()(Block& block, Memory&) const {
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
  const T *logits, *embeddings;              // [sequences, vocabulary], [vocabulary, width]
  const std::int32_t* forced;                // [sequences], or null
  T* hidden;                                 // [sequences, width]
  std::int32_t *tokens, *positions, *slots;  // [sequences] each; slots in the layers behind the stage
  Number vocabulary, width;

  template <class Block, class Memory>
  EXAMPLE_KERNEL void operator()(Block& block, Memory&) const {
    const Number s = block.x();
    typename Block::template PerThread<std::uint64_t> best;  // the logit's bits, in the order of floats; ~token
    block.each([&](int thread) {
      best[thread] = 0;
      for (auto i = static_cast<Number>(thread); i < vocabulary; i += threads) {
        const float logit = fastv::to_float(logits[std::size_t{s} * vocabulary + i]);
        Number bits = 0;
        memcpy(&bits, &logit, sizeof(bits));
        bits = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
        const std::uint64_t own = std::uint64_t{bits} << 32 | ~i;
        best[thread] = own > best[thread] ? own : best[thread];
      }
    });
    Number token = ~static_cast<Number>(block.greatest(best));
    if (forced != nullptr) token = static_cast<Number>(forced[s]);
    block.each([&](int thread) {
      for (auto i = static_cast<Number>(thread); i < width; i += threads)
        hidden[std::size_t{s} * width + i] = embeddings[std::size_t{token} * width + i];
      if (thread != 0) return;
      tokens[s] = static_cast<std::int32_t>(token);
      ++positions[s];
      ++slots[s];
    });
  }
};

}  // namespace decoder

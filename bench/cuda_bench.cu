// What fastv/cuda.cuh costs on a GPU at the shapes of models in use, each task beside the time that the same GPU needs in
// the same run for what must be done at least, and beside a rival:
//
//   of_limit  time of reading the keys (score and select), of copying the kept rows (gather) or of both / our time; 1 is
//             perfect
//   vs_rival  the rival's time / our time; above 1 we are faster. Rival: CUB's radix sort of all scores, and another one
//             that puts what stays into its old order
//
// Times are medians of CUDA event times on a stream that is never idle meanwhile; tensors rotate over more than three times
// the L2 cache. Before anything is timed, kept rows are compared with the core's on the host, and gathered rows with the
// rows they were.
//
//   nvcc -std=c++17 -O3 -arch=native -Iinclude bench/cuda_bench.cu -lcublas -o cuda_bench
//   ./cuda_bench [rounds]        exit status: 0; 1 where a result is wrong; 2 on bad use; 77 without a GPU
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_segmented_radix_sort.cuh>
#include <fastv/cuda.cuh>
#include <fastv/fastv.hpp>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "../examples/common/cuda_program.hpp"

const char* const cuda_program::name = "cuda_bench";

namespace {

using fastv::half;

constexpr std::size_t dim = 128, text_before = 35, text_after = 20, block_tokens = 16;
constexpr std::size_t at_once = 8;  // runs between two events
constexpr double ratio = 0.5;

// ---- the runtime --------------------------------------------------------------------------------

using cuda_program::download;
using cuda_program::Graph;
using cuda_program::random_halves;
using cuda_program::require;
using cuda_program::stop;

// An array in device memory.
template <class T>
class Device {
 public:
  Device() = default;
  explicit Device(std::size_t size) : size_(size) {
    void* memory = nullptr;
    require(cudaMalloc(&memory, (std::max)(size, std::size_t{1}) * sizeof(T)));
    data_ = static_cast<T*>(memory);
  }
  explicit Device(const std::vector<T>& host) : Device(host.size()) {
    require(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  Device(const Device& other) : Device(other.size_) {
    require(cudaMemcpy(data_, other.data_, size_ * sizeof(T), cudaMemcpyDeviceToDevice));
  }
  Device(Device&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Device& operator=(Device&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Device() { cudaFree(data_); }

  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::size_t bytes() const { return size_ * sizeof(T); }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

// ---- shapes and data ----------------------------------------------------------------------------

struct Shape {
  const char* name;
  std::size_t sequences, visual, heads, kv_heads;
  std::size_t hidden, intermediate, layers;  // of the model
  bool paged;
  double target;  // microseconds of all in a graph; 0: twice the reading of the keys
};
constexpr Shape shapes[] = {
    {"LLaVA-1.5-7B, 631 tokens", 1, 576, 32, 32, 4096, 11008, 32, false, 10},
    {"8 KV heads, 631 tokens", 1, 576, 32, 8, 4096, 11008, 32, false, 9},
    {"Qwen2-7B's heads, 2,935 tokens", 1, 2880, 28, 4, 3584, 18944, 28, false, 15},
    {"Qwen2-7B's heads, 16,384 tokens", 1, 16329, 28, 4, 3584, 18944, 28, false, 40},
    {"LLaVA-1.5-7B, 64 x about 631", 64, 576, 32, 32, 4096, 11008, 32, false, 0},
    {"the same, pages of 16", 64, 576, 32, 32, 4096, 11008, 32, true, 0},
};

// A batch of a shape, on the host. Keys and hidden states are packed; the last query row of each sequence is at hand.
struct Batch {
  Shape shape;
  std::vector<std::size_t> tokens, first;
  std::size_t rows = 0, longest = 0, pages = 0;
  fastv::TokenSpan image;
  std::vector<half> query, key, hidden;
  std::vector<half> cache;           // the same keys in shuffled blocks [block_tokens, kv heads, dim]
  std::vector<std::int32_t> tables;  // [sequences, pages]
  fastv::Config config;

  explicit Batch(const Shape& s) : shape(s), image{text_before, s.visual} {
    for (std::size_t i = 0; i < s.sequences; ++i) {
      first.push_back(rows);
      tokens.push_back(text_before + s.visual + (s.sequences == 1 ? text_after : i * 7 % 41));  // 20 in the mean
      rows += tokens.back();
      longest = (std::max)(longest, tokens.back());
    }
    query = random_halves(s.sequences * s.heads * dim, 1);
    key = random_halves(rows * s.kv_heads * dim, 2);
    hidden = random_halves(rows * s.hidden, 3);
    config.filtering_ratio = ratio;
    if (s.paged) make_pages();
  }
  std::vector<fastv::cuda::Request> requests() const {
    std::vector<fastv::cuda::Request> all;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      fastv::cuda::Request request{config, {&image, 1}, first[i], tokens[i]};
      request.queries = 1;
      all.push_back(request);
    }
    return all;
  }
  std::size_t key_bytes() const { return key.size() * sizeof(half); }

 private:
  void make_pages() {
    pages = (longest + block_tokens - 1) / block_tokens;
    tables.resize(tokens.size() * pages);
    std::iota(tables.begin(), tables.end(), 0);
    std::uint32_t state = 5;
    for (std::size_t i = tables.size(); i > 1; --i) {
      state = state * 1664525u + 1013904223u;
      std::swap(tables[i - 1], tables[(state >> 8) % i]);
    }
    const std::size_t row = shape.kv_heads * dim;
    cache.resize(tables.size() * block_tokens * row);
    for (std::size_t i = 0; i < tokens.size(); ++i)
      for (std::size_t t = 0; t < tokens[i]; ++t) {
        const auto block = static_cast<std::size_t>(tables[i * pages + t / block_tokens]);
        std::memcpy(cache.data() + (block * block_tokens + t % block_tokens) * row, key.data() + (first[i] + t) * row,
                    row * sizeof(half));
      }
  }
};

// What one run reads and writes on the device. Runs take turns with several of them.
struct Copy {
  Device<half> query, key, hidden, shorter;
  Device<std::int32_t> tables, positions, shorter_positions;
  Device<float> scores;
  Device<float> sorted;                            // of the rival
  Device<std::int32_t> numbers, ranked, in_order;  // the same
};

fastv::cuda::QueryKey<half> evidence(const Batch& batch, const Copy& copy) {
  using fastv::TokenMajor;
  const Shape& s = batch.shape;
  const auto key = s.paged ? fastv::cuda::heads(copy.key.data(), TokenMajor{block_tokens, s.kv_heads, dim},
                                                copy.tables.data(), batch.pages)
                           : fastv::cuda::heads(copy.key.data(), TokenMajor{batch.rows, s.kv_heads, dim});
  return fastv::cuda::query_key(fastv::cuda::heads(copy.query.data(), TokenMajor{s.sequences, s.heads, dim}), key,
                                1 / std::sqrt(static_cast<float>(dim)));
}

void gather(fastv::cuda::Pruner& pruner, const Batch& batch, const Copy& copy, cudaStream_t stream) {
  const std::size_t kept = pruner.kept(0).total;
  require(pruner.gather(
      0,
      {{fastv::rows(copy.hidden.data(), batch.rows, batch.shape.hidden),
        fastv::rows(copy.shorter.data(), kept, batch.shape.hidden)},
       {fastv::rows(copy.positions.data(), batch.rows), fastv::rows(copy.shorter_positions.data(), kept)}},
      stream));
}

// ---- right? -------------------------------------------------------------------------------------

// Empty, or what is wrong with what prune() and gather() have left.
std::string wrong(const fastv::cuda::Pruner& pruner, const Batch& batch, const Copy& copy) {
  const fastv::cuda::Kept kept = pruner.kept(0);
  const std::size_t visual = batch.shape.visual, row = batch.shape.kv_heads * dim, width = batch.shape.hidden;
  const auto rows = download(kept.rows, kept.total), slots = download(kept.slots, kept.total),
             positions = download(kept.positions, kept.total);
  const auto scores = download(kept.scores, batch.tokens.size() * visual);
  const auto shorter = download(copy.shorter.data(), kept.total * width);
  const auto shorter_positions = download(copy.shorter_positions.data(), kept.total);
  std::size_t at = 0;
  fastv::Pruner<> core(batch.config), by_scores(batch.config);
  const fastv::Span<const fastv::TokenSpan> images(&batch.image, 1);
  for (std::size_t i = 0; i < batch.tokens.size(); ++i) {
    const std::string where = " of sequence " + std::to_string(i);
    const fastv::TokenMajor one{1, batch.shape.heads, dim}, keys{batch.tokens[i], batch.shape.kv_heads, dim};
    const fastv::Kept expected =
        core.prune(fastv::query_key(fastv::heads(batch.query.data() + i * batch.shape.heads * dim, one),
                                    fastv::heads(batch.key.data() + batch.first[i] * row, keys),
                                    1 / std::sqrt(static_cast<float>(dim))),
                   images);
    require(expected.status);
    const fastv::Span<const float> own(scores.data() + i * visual, visual);
    const float most = *std::max_element(core.scores().begin(), core.scores().end());
    float lowest = most;  // of those that stay
    for (std::size_t v = 0; v < visual; ++v)
      if (!(std::fabs(own[v] - core.scores()[v]) <= 1e-6f * most)) return "score " + std::to_string(v) + where;
    const fastv::Kept exact = by_scores.prune(fastv::Scores<float>{own, batch.tokens[i]}, images);
    require(exact.status);
    if (at + exact.size() > kept.total) return "the number of kept rows";
    for (const fastv::Index p : expected)
      if (p >= text_before && p < text_before + visual) lowest = (std::min)(lowest, core.scores()[p - text_before]);
    for (std::size_t j = 0; j < exact.size(); ++j, ++at) {
      const auto p = static_cast<std::size_t>(exact.begin()[j]);
      if (rows[at] != static_cast<std::int32_t>(batch.first[i] + p)) return "a kept row" + where;
      if (positions[at] != static_cast<std::int32_t>(p) || shorter_positions[at] != positions[at])
        return "a position" + where;
      if (slots[at] != static_cast<std::int32_t>(j)) return "a slot" + where;
      if (std::memcmp(shorter.data() + at * width, batch.hidden.data() + (batch.first[i] + p) * width,
                      width * sizeof(half)) != 0)
        return "a gathered row" + where;
      // By the core's own scores another token may stay only where two scores at the cut are as near as rounding.
      const bool text = p < text_before || p >= text_before + visual;
      if (!text && !std::binary_search(expected.begin(), expected.end(), exact.begin()[j]) &&
          std::fabs(core.scores()[p - text_before] - lowest) > 1e-6f * most)
        return "a row that the core drops" + where;
    }
  }
  return at == kept.total ? "" : "the number of kept rows";
}

// ---- limits and rivals --------------------------------------------------------------------------

// Reads `count` times 16 bytes.
__global__ void __launch_bounds__(256) read_all(const uint4* data, std::size_t count, unsigned int* never) {
  unsigned int sum = 0;
  const std::size_t stride = std::size_t{gridDim.x} * blockDim.x;
  std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    const uint4 a = data[i], b = data[i + stride], c = data[i + 2 * stride], d = data[i + 3 * stride];
    sum += (a.x ^ a.y ^ a.z ^ a.w) + (b.x ^ b.y ^ b.z ^ b.w) + (c.x ^ c.y ^ c.z ^ c.w) + (d.x ^ d.y ^ d.z ^ d.w);
  }
  for (; i < count; i += stride) {
    const uint4 a = data[i];
    sum += a.x ^ a.y ^ a.z ^ a.w;
  }
  if (sum == 0x9E3779B9u) *never = sum;  // so that nothing is optimised away
}
void read(const void* data, std::size_t bytes, unsigned int* never, int multiprocessors, cudaStream_t stream) {
  const std::size_t count = bytes / 16, whole = (count + 1023) / 1024;
  const auto blocks = static_cast<unsigned int>((std::min)(whole, static_cast<std::size_t>(multiprocessors) * 16));
  read_all<<<blocks, 256, 0, stream>>>(static_cast<const uint4*>(data), count, never);
  require(cudaGetLastError());
}

// Keeps the stream busy, so that what is queued behind runs without gaps however slowly the host queues it.
__global__ void hold(unsigned long long nanoseconds) {
  unsigned long long begin, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - begin < nanoseconds);
}

// The numbers of the `kept` best of each sequence's scores, ascending: two sorts, stable, so that of equals the earlier
// stays. Works on copy.scores.
class SortingSelect {
 public:
  SortingSelect(std::size_t sequences, std::size_t visual, std::size_t kept)
      : sequences_(static_cast<int>(sequences)), visual_(static_cast<int>(visual)), kept_(static_cast<int>(kept)) {
    std::vector<int> begin(sequences), end(sequences), cut(sequences);
    for (int i = 0; i < sequences_; ++i) {
      const auto at = static_cast<std::size_t>(i);
      begin[at] = i * visual_;
      end[at] = begin[at] + visual_;
      cut[at] = begin[at] + kept_;
    }
    begin_ = Device<int>(begin);
    end_ = Device<int>(end);
    cut_ = Device<int>(cut);
  }
  void run(const Copy& copy, cudaStream_t stream) {
    std::size_t first = 0, second = 0;
    require(by_score(nullptr, first, copy, stream));
    require(by_number(nullptr, second, copy, stream));
    if (room_.size() < (std::max)(first, second)) room_ = Device<char>((std::max)(first, second));
    require(by_score(room_.data(), first, copy, stream));
    require(by_number(room_.data(), second, copy, stream));
  }

 private:
  cudaError_t by_score(void* room, std::size_t& bytes, const Copy& copy, cudaStream_t stream) const {
    if (sequences_ == 1)
      return cub::DeviceRadixSort::SortPairsDescending(room, bytes, copy.scores.data(), copy.sorted.data(),
                                                       copy.numbers.data(), copy.ranked.data(), visual_, 0, 32, stream);
    return cub::DeviceSegmentedRadixSort::SortPairsDescending(
        room, bytes, copy.scores.data(), copy.sorted.data(), copy.numbers.data(), copy.ranked.data(),
        sequences_ * visual_, sequences_, begin_.data(), end_.data(), 0, 32, stream);
  }
  // Numbers have 16 bits at most.
  cudaError_t by_number(void* room, std::size_t& bytes, const Copy& copy, cudaStream_t stream) const {
    if (sequences_ == 1)
      return cub::DeviceRadixSort::SortKeys(room, bytes, copy.ranked.data(), copy.in_order.data(), kept_, 0, 16,
                                            stream);
    return cub::DeviceSegmentedRadixSort::SortKeys(room, bytes, copy.ranked.data(), copy.in_order.data(),
                                                   sequences_ * visual_, sequences_, begin_.data(), cut_.data(), 0, 16,
                                                   stream);
  }

  int sequences_, visual_, kept_;
  Device<int> begin_, end_, cut_;
  Device<char> room_;
};

// The products of one decoder layer with weights [out, in] on `rows` tokens: q, k, v, o, gate, up, down.
class LayerProducts {
 public:
  LayerProducts(const Shape& s, std::size_t most_rows, const cuda_program::Machine& machine)
      : shape_(s),
        machine_(machine),
        weights_(random_halves(2 * s.hidden * (s.heads + s.kv_heads) * dim + 3 * s.hidden * s.intermediate, 4)),
        in_(random_halves(most_rows * s.intermediate, 5)),
        out_(most_rows * s.intermediate) {}

  void run(std::size_t rows) const {
    const std::size_t d = shape_.hidden, q = shape_.heads * dim, kv = shape_.kv_heads * dim, m = shape_.intermediate;
    const half* weights = weights_.data();
    for (const auto& [in, out] : {std::pair{d, q}, {d, kv}, {d, kv}, {q, d}, {d, m}, {d, m}, {m, d}}) {
      machine_.multiply(in_.data(), weights, out_.data(), rows, in, out);
      weights += in * out;
    }
  }

 private:
  Shape shape_;
  const cuda_program::Machine& machine_;
  Device<half> weights_, in_, out_;
};

// ---- measuring ----------------------------------------------------------------------------------

// Median times of one run of each, in microseconds. They take turns, forwards and backwards; no copy comes by again before
// all the others.
using Run = std::function<void(std::size_t copy)>;
std::vector<double> medians(const std::vector<Run>& runs, std::size_t rounds, std::size_t copies, cudaStream_t stream) {
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin));
  require(cudaEventCreate(&end));
  std::vector<std::vector<double>> times(runs.size());
  std::size_t turn = 0;
  for (std::size_t round = 0; round < rounds + 2; ++round)
    for (std::size_t i = 0; i < runs.size(); ++i) {
      const std::size_t which = round % 2 == 0 ? i : runs.size() - 1 - i;
      hold<<<1, 1, 0, stream>>>(300000);
      require(cudaEventRecord(begin, stream));
      for (std::size_t j = 0; j < at_once; ++j) runs[which](turn++ % copies);
      require(cudaEventRecord(end, stream));
      require(cudaEventSynchronize(end));
      float milliseconds = 0;
      require(cudaEventElapsedTime(&milliseconds, begin, end));
      if (round >= 2) times[which].push_back(static_cast<double>(milliseconds) * 1000 / at_once);
    }
  require(cudaEventDestroy(begin));
  require(cudaEventDestroy(end));
  std::vector<double> medians;
  for (std::vector<double>& own : times) {
    std::nth_element(own.begin(), own.begin() + static_cast<std::ptrdiff_t>(own.size() / 2), own.end());
    medians.push_back(own[own.size() / 2]);
  }
  return medians;
}

// One line of the table; times of 0 are left out.
void print(const char* shape, const char* task, double us, const std::string& target, double limit, double rival) {
  const auto number = [](double value, const char* format) {
    char text[32] = "";
    if (value > 0) std::snprintf(text, sizeof(text), format, value);
    return std::string(text);
  };
  std::printf("%-32s %-26s %9.2f %8s %9s %8s %9s %8s\n", shape, task, us, target.c_str(), number(limit, "%.2f").c_str(),
              number(limit / us, "%.2f").c_str(), number(rival, "%.2f").c_str(), number(rival / us, "%.2f").c_str());
  std::fflush(stdout);
}

fastv::cuda::Limits limits_of(const Shape& shape, const Batch& batch) {
  fastv::cuda::Limits limits;
  limits.sequences = shape.sequences;
  limits.tokens = batch.rows;
  limits.visual = shape.sequences * shape.visual;
  limits.keys = batch.longest;
  limits.heads = shape.heads;
  return limits;
}

// Selection::diverse by the keys, a tenth kept: nearest, coverage and volume. Before, of the first sequence, tokens are
// compared with the core's, which keeps others only where two values are as near as rounding: a token in fifty at most.
bool measure_diverse(const Shape& shape, Batch batch, const Copy& copy, std::size_t rounds, cudaStream_t stream) {
  constexpr fastv::Diversity rules[] = {{fastv::Novelty::nearest, fastv::Blend::sum, 0.5},
                                        {fastv::Novelty::coverage, fastv::Blend::product, 1},
                                        {fastv::Novelty::volume, fastv::Blend::product, 2}};
  const char* const names[] = {"the same, diverse: nearest", "diverse: coverage", "diverse: volume"};
  fastv::cuda::Limits limits = limits_of(shape, batch);
  limits.features = shape.kv_heads * dim;
  limits.competing = shape.visual;
  fastv::cuda::Pruner pruner;
  require(pruner.reserve(limits));
  batch.config.selection = fastv::Selection::diverse;
  batch.config.filtering_ratio = 0.9;
  for (std::size_t rule = 0; rule < 3; ++rule) {
    batch.config.diversity = rules[rule];
    require(pruner.plan(batch.requests(), shape.layers, stream));
    const auto qk = evidence(batch, copy);
    const auto work = [&](std::size_t) { require(pruner.prune(0, fastv::cuda::with_features(qk, qk.key), stream)); };
    work(0);
    require(cudaStreamSynchronize(stream));
    const std::size_t kept = pruner.kept_tokens(0, 0);
    const auto rows = download(pruner.kept(0).rows, kept);
    fastv::Pruner<> core(batch.config);
    const auto keys = fastv::heads(batch.key.data(), fastv::TokenMajor{batch.tokens[0], shape.kv_heads, dim});
    const auto attention =
        fastv::query_key(fastv::heads(batch.query.data(), fastv::TokenMajor{1, shape.heads, dim}), keys, qk.scale);
    const fastv::Kept expected = core.prune(fastv::with_features(attention, keys), {&batch.image, 1});
    require(expected.status);
    std::size_t others = expected.size() == kept ? 0 : kept;
    for (const std::int32_t row : rows)
      others += std::binary_search(expected.begin(), expected.end(), static_cast<fastv::Index>(row)) ? 0 : 1;
    if (50 * others > kept) {
      std::printf("%-32s WRONG: %zu of %zu rows are others than the core's, %s\n", shape.name, others, kept,
                  names[rule]);
      return false;
    }
    print("", names[rule], medians({work}, rounds, 1, stream)[0], "", 0, 0);
  }
  return true;
}

bool measure(const Shape& shape, std::size_t rounds, const cudaDeviceProp& gpu, const cuda_program::Machine& machine) {
  const cudaStream_t stream = machine.stream;
  const Batch batch(shape);
  fastv::cuda::Pruner pruner;
  const fastv::cuda::Limits limits = limits_of(shape, batch);
  require(pruner.reserve(limits));
  require(pruner.plan(batch.requests(), shape.layers, stream));
  const std::size_t kept = pruner.kept(0).total, kept_visual = pruner.kept(0).total_visual / shape.sequences;

  // Copies: more than three L2 caches of keys alone, at most 128.
  const std::size_t count =
      (std::min)(std::size_t{128}, 3 * static_cast<std::size_t>(gpu.l2CacheSize) / batch.key_bytes() + 2);
  std::vector<Copy> copies;
  copies.reserve(count);
  std::vector<std::int32_t> positions(batch.rows), numbers(limits.visual);
  for (std::size_t i = 0; i < shape.sequences; ++i) {
    std::iota(positions.begin() + static_cast<std::ptrdiff_t>(batch.first[i]),
              positions.begin() + static_cast<std::ptrdiff_t>(batch.first[i] + batch.tokens[i]), 0);
    std::iota(numbers.begin() + static_cast<std::ptrdiff_t>(i * shape.visual),
              numbers.begin() + static_cast<std::ptrdiff_t>((i + 1) * shape.visual), 0);
  }
  for (std::size_t i = 0; i < count; ++i) {
    if (i > 0) {
      copies.push_back(copies[0]);
      continue;
    }
    copies.push_back({Device<half>(batch.query), Device<half>(shape.paged ? batch.cache : batch.key),
                      Device<half>(batch.hidden), Device<half>(kept * shape.hidden), Device<std::int32_t>(batch.tables),
                      Device<std::int32_t>(positions), Device<std::int32_t>(kept), Device<float>(limits.visual),
                      Device<float>(limits.visual), Device<std::int32_t>(numbers), Device<std::int32_t>(limits.visual),
                      Device<std::int32_t>(limits.visual)});
  }
  const Device<unsigned int> never(1);

  SortingSelect rival(shape.sequences, shape.visual, kept_visual);
  std::vector<Graph> graphs, limit_graphs;
  const auto read_keys = [&](const Copy& copy) {
    read(copy.key.data(), batch.key_bytes(), never.data(), gpu.multiProcessorCount, stream);
  };
  const auto copy_rows = [&](const Copy& copy) {
    require(cudaMemcpyAsync(copy.shorter.data(), copy.hidden.data(), copy.shorter.bytes(), cudaMemcpyDeviceToDevice,
                            stream));
  };
  for (const Copy& copy : copies) {
    const auto work = [&] {
      require(pruner.prune(0, evidence(batch, copy), stream));
      gather(pruner, batch, copy, stream);
    };
    graphs.emplace_back(stream, work);
    limit_graphs.emplace_back(stream, [&] {
      read_keys(copy);
      copy_rows(copy);
    });
    for (const bool captured : {false, true}) {
      if (&copy - copies.data() >= 3) break;  // the data are the same in all of them
      require(cudaMemsetAsync(copy.shorter.data(), 0xff, copy.shorter.bytes(), stream));
      captured ? graphs.back().launch(stream) : work();
      require(cudaStreamSynchronize(stream));
      const std::string what = wrong(pruner, batch, copy);
      if (what.empty()) continue;
      std::printf("%-32s WRONG%s: %s\n", shape.name, captured ? " in a graph" : "", what.c_str());
      return false;
    }
    require(cudaMemcpyAsync(copy.scores.data(), pruner.kept(0).scores, copy.scores.bytes(), cudaMemcpyDeviceToDevice,
                            stream));
  }
  rival.run(copies[0], stream);
  require(pruner.prune(0, fastv::cuda::Scores{copies[0].scores.data()}, stream));
  require(cudaStreamSynchronize(stream));
  const auto ours = download(pruner.kept(0).visual_numbers, pruner.kept(0).total_visual);
  const auto theirs = download(copies[0].in_order.data(), limits.visual);
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const std::size_t sequence = i / kept_visual, base = sequence * shape.visual;
    if (ours[i] - static_cast<std::int32_t>(base) != theirs[base + i % kept_visual]) {
      std::printf("%-32s WRONG: CUB's sorts keep other tokens of sequence %zu\n", shape.name, sequence);
      return false;
    }
  }

  const std::size_t few = (std::max)(rounds / 10, std::size_t{5});  // of what takes milliseconds
  const std::vector<Run> runs = {
      [&](std::size_t i) { require(pruner.prune(0, evidence(batch, copies[i]), stream)); },
      [&](std::size_t i) { read_keys(copies[i]); },
      [&](std::size_t i) { require(pruner.prune(0, fastv::cuda::Scores{copies[i].scores.data()}, stream)); },
      [&](std::size_t i) { rival.run(copies[i], stream); },
      [&](std::size_t i) { gather(pruner, batch, copies[i], stream); },
      [&](std::size_t i) { copy_rows(copies[i]); },
      [&](std::size_t i) { graphs[i].launch(stream); },
      [&](std::size_t i) { limit_graphs[i].launch(stream); },
  };
  const std::vector<double> us = medians(runs, shape.sequences > 1 ? few : rounds, count, stream);
  const LayerProducts products(shape, batch.rows, machine);
  const std::vector<Run> layer = {[&](std::size_t) { products.run(batch.rows); },
                                  [&](std::size_t) { products.run(kept); }};
  const std::vector<double> layer_us = medians(layer, few, count, stream);
  const auto target = [](double value) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.4g", value);
    return std::string(text);
  };
  print(shape.name, "score and select", us[0], shape.target > 0 ? "" : target(2 * us[1]), us[1], 0);
  print("", "select, by given scores", us[2], "", 0, us[3]);
  print("", "gather", us[4], "", us[5], 0);
  print("", "all in a graph", us[6], shape.target > 0 ? target(shape.target) : "", us[7], 0);
  if (!measure_diverse(shape, batch, copies[0], few, stream)) return false;
  print("", "a layer's products", layer_us[0], "", 0, 0);
  print("", "the same on what stays", layer_us[1], "", 0, 0);
  const double layers = static_cast<double>(shape.layers);
  std::printf(
      "%-32s pruning takes %.2f%% of what the products of %zu layers take, 2 of them on %zu tokens, the rest on %zu\n",
      "", 100 * us[6] / (2 * layer_us[0] + (layers - 2) * layer_us[1]), shape.layers, batch.rows, kept);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const long rounds = argc > 1 ? std::strtol(argv[1], nullptr, 10) : 200;
  if (argc > 2 || rounds < 5 || rounds > 100000) {
    std::fprintf(stderr, "usage: cuda_bench [rounds, 5 to 100000; 200 where none are said]\n");
    return 2;
  }
  const cudaDeviceProp gpu = cuda_program::gpu();
  const cuda_program::Machine machine;
  int runtime = 0;
  require(cudaRuntimeGetVersion(&runtime));
  std::printf("%s, sm_%d%d, %d multiprocessors, L2 of %d MiB; CUDA %d.%d; medians of %ld times, microseconds\n",
              gpu.name, gpu.major, gpu.minor, gpu.multiProcessorCount, gpu.l2CacheSize >> 20, runtime / 1000,
              runtime % 1000 / 10, rounds);
  std::printf("%-32s %-26s %9s %8s %9s %8s %9s %8s\n", "shape", "task", "us", "target", "limit", "of_limit", "rival",
              "vs_rival");
  bool right = true;
  for (const Shape& shape : shapes) right = measure(shape, static_cast<std::size_t>(rounds), gpu, machine) && right;
  return right ? 0 : 1;
}

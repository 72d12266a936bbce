// The tests' GPU: runs kernels on the host, block by block, from the same source that nvcc compiles.
//
// It is stricter than a real one. Threads of a phase and blocks of a grid run in a random order; shared and device memory
// begin as poison. A test fails where two threads of a block touch one word between two barriers and one of them writes,
// where a word of shared memory is read that nobody has written, and where an index is out of bounds: see faults().
#pragma once

#include <cstdlib>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "../oracle.hpp"
#include "counted.hpp"
#include "fastv/cuda_pruner.hpp"

namespace emulation {

// What went wrong in any kernel since the last look, each once.
inline std::set<std::string>& faults() {
  static std::set<std::string> all;
  return all;
}
inline void fault(const std::string& what) { faults().insert(what); }

inline constexpr int everyone = -1, nobody = -2;

// Who runs now: a thread, or everyone between two phases.
struct Now {
  int threads = 0, thread = everyone;
  std::uint32_t epoch = 1;  // phases between two barriers
};
inline Now& now() {
  static thread_local Now value;
  return value;
}

// What has happened to one word.
struct Touched {
  std::uint32_t read_epoch = 0, write_epoch = 0;
  int reader = nobody, writer = nobody;
  bool written = false, added = false;  // added: the writes of this epoch are atomic additions

  void read(const char* what) {
    const Now& n = now();
    if (!written) fault(std::string("a word of ") + what + " is read that nobody has written");
    if (write_epoch == n.epoch && writer != n.thread)
      fault(std::string("a word of ") + what + " is read while another thread writes it");
    if (read_epoch == n.epoch && reader != n.thread)
      reader = everyone;
    else
      reader = n.thread;
    read_epoch = n.epoch;
  }
  void write(const char* what, bool adds = false) {
    const Now& n = now();
    if (write_epoch == n.epoch && writer != n.thread && !(adds && added))
      fault(std::string("a word of ") + what + " is written by two threads");
    if (read_epoch == n.epoch && reader != n.thread)
      fault(std::string("a word of ") + what + " is written while another thread reads it");
    added = adds && (write_epoch != n.epoch || added);
    write_epoch = n.epoch;
    writer = n.thread;
    written = true;
  }
};

// A word whose reads and writes are watched.
template <class T>
class Watched {
 public:
  Watched(T& value, Touched& touched, const char* what) : value_(value), touched_(touched), what_(what) {}
  operator T() const {
    touched_.read(what_);
    return value_;
  }
  Watched& operator=(const T& value) {
    touched_.write(what_);
    value_ = value;
    return *this;
  }
  Watched& operator=(const Watched& other) { return *this = static_cast<T>(other); }
  Watched(const Watched&) = default;
  void add(const T& value) {
    touched_.write(what_, true);
    value_ += value;
  }

 private:
  T& value_;
  Touched& touched_;
  const char* what_;
};

template <class T, std::size_t N>
class Array {
 public:
  Array() : values_(N), touched_(N) { std::memset(static_cast<void*>(values_.data()), 0xA5, N * sizeof(T)); }
  template <class Index>
  Watched<T> operator[](Index index) {
    auto i = static_cast<std::size_t>(index);
    if (i >= N) {
      fault("index " + std::to_string(i) + " of an array of " + std::to_string(N) + " in shared memory");
      i = 0;
    }
    return {values_[i], touched_[i], "shared memory"};
  }
  T* values() { return values_.data(); }
  Touched* touched() { return touched_.data(); }

 private:
  std::vector<T> values_;
  std::vector<Touched> touched_;
};

template <class T>
class PerThread {
 public:
  PerThread() : values_(static_cast<std::size_t>(now().threads)) {}
  T& operator[](int thread) {
    if (now().thread != everyone && now().thread != thread) fault("a thread touches what another one keeps");
    return values_[static_cast<std::size_t>(thread)];
  }

 private:
  std::vector<T> values_;
};

// Words of shared or device memory.
class Words {
 public:
  Words(std::uint32_t* data, Touched* touched, std::size_t size, const char* what)
      : data_(data), touched_(touched), size_(size), what_(what) {}
  template <class Index>
  Watched<std::uint32_t> operator[](Index index) const {
    auto i = static_cast<std::size_t>(index);
    if (i >= size_) {
      fault("index " + std::to_string(i) + " of " + std::to_string(size_) + " words of " + what_);
      i = 0;
    }
    return {data_[i], touched_[i], what_};
  }

 private:
  std::uint32_t* data_;
  Touched* touched_;
  std::size_t size_;
  const char* what_;
};

class Block {
 public:
  template <class T, std::size_t N>
  using Array = emulation::Array<T, N>;
  template <class T>
  using PerThread = emulation::PerThread<T>;
  using Words = emulation::Words;

  Block(int threads, std::uint32_t x, std::uint32_t y, std::uint32_t z, oracle::Rng& rng)
      : x_(x), y_(y), z_(z), rng_(rng), order_(static_cast<std::size_t>(threads)) {
    now() = {threads, everyone, 1};
    std::iota(order_.begin(), order_.end(), 0);
  }
  std::uint32_t x() const { return x_; }
  std::uint32_t y() const { return y_; }
  std::uint32_t z() const { return z_; }

  template <class Body>
  void each(const Body& body) {
    // A random rotation, forwards or backwards: every pair of threads comes in both orders, and shuffling is dear.
    const std::size_t count = order_.size(), first = rng_.below(count);
    const bool back = rng_.chance(0.5);
    for (std::size_t i = 0; i < count; ++i) {
      now().thread = order_[(back ? first + count - i : first + i) % count];
      body(now().thread);
    }
    now().thread = everyone;
  }
  void sync() { ++now().epoch; }

  Words words(Array<std::uint32_t, fastv::detail::gpu::keys_in_shared>& array) {
    return {array.values(), array.touched(), fastv::detail::gpu::keys_in_shared, "shared memory"};
  }
  Words words(std::uint32_t* data, std::size_t size) {
    std::vector<Touched>& touched = device_[data];
    touched.assign(size, {});
    return {data, touched.data(), size, "device memory"};
  }

  // Butterflies, as a warp does them.
  template <int Lanes, std::size_t N>
  void sum(PerThread<fastv::detail::gpu::Values<float, N>>& values) {
    butterfly<Lanes>(values, [](auto& a, const auto& b) {
      for (std::size_t i = 0; i < N; ++i) a.value[i] += b.value[i];
    });
  }
  template <int Lanes, class T>
  void greatest(PerThread<T>& words) {
    butterfly<Lanes>(words, [](T& a, T b) { a = a > b ? a : b; });
  }
  std::uint32_t exclusive_sum(PerThread<std::uint32_t>& words) {
    std::uint32_t sum = 0;
    for (int t = 0; t < now().threads; ++t) {
      const std::uint32_t own = words[t];
      words[t] = sum;
      sum += own;
    }
    sync();  // CUDA's has barriers in it
    return sum;
  }
  template <class T>
  T total(PerThread<T>& numbers) {
    butterfly<32>(numbers, [](T& a, T b) { a += b; });
    T sum = 0;
    for (int t = 0; t < now().threads; t += 32) sum += numbers[t];
    sync();
    return sum;
  }
  template <class T>
  T greatest(PerThread<T>& words) {
    T most = 0;
    for (int t = 0; t < now().threads; ++t) most = words[t] > most ? words[t] : most;
    sync();
    return most;
  }
  template <std::size_t N>
  void add(Array<std::uint32_t, N>& array, std::uint32_t i, std::uint32_t n) {
    array[i].add(n);
  }
  void raise(std::uint32_t* word, std::uint32_t value) { *word = value > *word ? value : *word; }
  bool last_to_arrive(std::uint32_t* counter, std::uint32_t expected) {
    sync();
    if (++*counter > expected) fault("more blocks arrive than are expected");
    if (*counter != expected) return false;
    *counter = 0;
    return true;
  }

 private:
  template <int Lanes, class T, class Merge>
  void butterfly(PerThread<T>& values, const Merge& merge) {
    for (int offset = Lanes / 2; offset > 0; offset /= 2) {
      std::vector<T> before;
      for (int t = 0; t < now().threads; ++t) before.push_back(values[t]);
      for (int t = 0; t < now().threads; ++t) merge(values[t], before[static_cast<std::size_t>(t ^ offset)]);
    }
  }

  std::uint32_t x_, y_, z_;
  oracle::Rng& rng_;
  std::vector<int> order_;
  std::unordered_map<const void*, std::vector<Touched>> device_;
};

struct Grid {
  std::uint32_t x, y, z;
};

// Launches that were recorded, to be run again: what a CUDA graph is.
struct Recording {
  std::vector<std::function<void()>> launches;
  void replay() const {
    for (const std::function<void()>& launch : launches) launch();
  }
};

// A stream of the tests' GPU: each launch runs at once, its blocks in a random order.
class Queue : public CountedQueue {
 public:
  explicit Queue(oracle::Rng& rng) : rng_(&rng) {}

  template <class Kernel>
  fastv::Status launch(Grid grid, const Kernel& kernel) {
    static_assert(sizeof(Kernel) <= 4096, "a launch has at most 4 KB of arguments");
    static_assert(__is_trivially_copyable(Kernel), "arguments travel as bytes");
    ++launches();
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) fault("a grid CUDA refuses");
    if (recording() != nullptr)
      recording()->launches.push_back([grid, kernel, rng = rng_] { run(grid, kernel, *rng); });
    else
      run(grid, kernel, *rng_);
    return {};
  }
  // The launches of `work`, which are not run.
  template <class Work>
  Recording record(const Work& work) {
    Recording recorded;
    recording() = &recorded;
    work();
    recording() = nullptr;
    return recorded;
  }
  static fastv::Result<void*> allocate(std::size_t bytes) {
    void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(memory, 0xA5, bytes);
    ++allocations();
    return {memory, {}};
  }
  static void release(void* memory) { std::free(memory); }
  static void copy(void* to, const void* from, std::size_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }

 private:
  template <class Kernel>
  static void run(Grid grid, const Kernel& kernel, oracle::Rng& rng) {
    const std::size_t blocks = std::size_t{grid.x} * grid.y * grid.z;
    std::vector<std::uint32_t> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    for (std::size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[rng.below(i)]);
    for (const std::uint32_t b : order) {
      Block block(Kernel::threads, b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y, rng);
      typename Kernel::template Shared<Block> shared;
      kernel(block, shared);
    }
  }
  static Recording*& recording() {
    static Recording* now = nullptr;
    return now;
  }
  oracle::Rng* rng_;
};

using Pruner = fastv::cuda::BasicPruner<Queue>;

}  // namespace emulation

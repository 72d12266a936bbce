// Timing for the benches: a kernel, its physical limit and its rivals run in turn, so that whatever else
// the machine is doing hits all of them alike, and their medians are compared.
#pragma once

#include <algorithm>
#include <array>
#include <cctype>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <vector>

#if defined(__unix__)
#include <unistd.h>
#endif

#include <benchmark/benchmark.h>

#include "fastv/detail/qk.hpp"

namespace bench {

// ---- memory outside the cache -------------------------------------------------------------------

// Bytes of last-level cache that one core can use. Linux's own listing comes first: inside a virtual
// machine sysconf() may add up the caches of the whole socket.
inline std::size_t cache_bytes() {
  std::ifstream listing("/sys/devices/system/cpu/cpu0/cache/index3/size");
  std::size_t kibibytes = 0;
  char unit = 0;
  if (listing >> kibibytes >> unit && unit == 'K' && kibibytes > 0) return kibibytes * 1024;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  const long size = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (size > 0) return static_cast<std::size_t>(size);
#endif
  return std::size_t{64} << 20;
}

// Copies of one tensor, more than two last-level caches of them. Every call of next() hands out the copy
// that was used longest ago, so its reader finds nothing of it in the cache.
class Ring {
 public:
  Ring(const void* tensor, std::size_t bytes) : bytes_(bytes), stride_((bytes + 63) / 64 * 64) {
    const std::size_t room = std::min(2 * cache_bytes() + cache_bytes() / 4, std::size_t{1} << 30);
    count_ = room / stride_ + 2;
    unsigned char* memory = arena(count_ * stride_);
    for (std::size_t i = 0; i < count_; ++i) std::memcpy(memory + i * stride_, tensor, bytes);
    memory_ = memory;
  }
  template <class T>
  explicit Ring(const std::vector<T>& tensor) : Ring(tensor.data(), tensor.size() * sizeof(T)) {}

  std::size_t bytes() const { return bytes_; }
  unsigned char* next() { return memory_ + (turn_++ % count_) * stride_; }

 private:
  // One stretch of memory for all rings, since only one lives at a time; page faults are paid once.
  static unsigned char* arena(std::size_t bytes) {
    struct Free {
      void operator()(unsigned char* memory) const { ::operator delete (memory, std::align_val_t{64}); }
    };
    static std::unique_ptr<unsigned char, Free> memory;
    static std::size_t size = 0;
    if (bytes > size) {
      memory.reset();
      memory.reset(static_cast<unsigned char*>(::operator new (bytes, std::align_val_t{64})));
      size = bytes;
    }
    return memory.get();
  }

  std::size_t bytes_, stride_, count_ = 0, turn_ = 0;
  unsigned char* memory_ = nullptr;
};

// ---- limits -------------------------------------------------------------------------------------

// Reads `bytes` bytes in order, as a sum over them does. The vectors are the library's, as wide as the build allows;
// loops over arrays came out three times slower with g++.
inline std::uint32_t read_in_order(const unsigned char* data, std::size_t bytes) {
  using fastv::detail::load;
  using Words = fastv::detail::Words;
  constexpr std::size_t vector = sizeof(Words);
  Words a{}, b{}, c{}, d{};
  std::size_t i = 0;
  for (; i + 4 * vector <= bytes; i += 4 * vector) {
    a += load<Words>(data + i);
    b += load<Words>(data + i + vector);
    c += load<Words>(data + i + 2 * vector);
    d += load<Words>(data + i + 3 * vector);
  }
  for (; i + vector <= bytes; i += vector) a += load<Words>(data + i);
  std::uint32_t sum = 0;
  for (; i < bytes; ++i) sum += data[i];
  a += b + c + d;
  for (std::size_t lane = 0; lane < fastv::detail::width; ++lane) sum += a[lane];
  return sum;
}

// The same from `streams` places at once, far apart, `block` bytes of each in turn, asked for `ahead` bytes ahead.
template <std::size_t streams, std::size_t block, std::size_t ahead>
std::uint32_t read_from_places(const unsigned char* data, std::size_t bytes) {
  using fastv::detail::load;
  using Words = fastv::detail::Words;
  constexpr std::size_t vector = sizeof(Words);
  Words a{}, b{};
  const std::size_t part = bytes / (streams * block) * block;
  for (std::size_t i = 0; i < part; i += block)
    for (std::size_t stream = 0; stream < streams; ++stream) {
      const unsigned char* from = data + stream * part + i;
      // Past the end of the last stream nothing lies; then it asks for what it has.
      const unsigned char* later = stream * part + i + ahead + block <= bytes ? from + ahead : from;
      if (ahead > 0) fastv::detail::prefetch(later, later + block);
      for (std::size_t at = 0; at < block; at += 2 * vector) {
        a += load<Words>(from + at);
        b += load<Words>(from + at + vector);
      }
    }
  a += b;
  std::uint32_t sum = read_in_order(data + streams * part, bytes - streams * part);
  for (std::size_t lane = 0; lane < fastv::detail::width; ++lane) sum += a[lane];
  return sum;
}

// The speed at which one core reads is that of the fastest of these, which differs from machine to machine. Of some
// forty ways (1 to 16 places, 64 bytes to a page of each in turn, asked for up to 8 KiB ahead) the third was the
// fastest on an AMD Zen 3, of 25 the fourth on a Zen 4.
using Reader = std::uint32_t (*)(const unsigned char* data, std::size_t bytes);
inline constexpr Reader ways_of_reading[] = {read_in_order, read_from_places<4, 256, 0>, read_from_places<8, 64, 0>,
                                             read_from_places<8, 256, 1024>};

// `count` multiply-adds of floats with nothing to load: what the arithmetic of as many products takes at least.
inline float multiply_adds(std::size_t count) {
  using fastv::detail::Floats;
  constexpr std::size_t sums_at_once = 12, width = fastv::detail::width;  // more than latency times units
  Floats sums[sums_at_once] = {}, half{}, one{};
  benchmark::DoNotOptimize(half);
  half += 0.5f;
  one += 1.0f;
  for (std::size_t done = 0; done < count; done += sums_at_once * width)
    for (std::size_t i = 0; i < sums_at_once; ++i) sums[i] = sums[i] * half + one;
  float sum = 0;
  for (const Floats& each : sums) sum += each[0];
  return sum;
}

// Reads rows that lie `stride` bytes apart, in order.
inline std::uint32_t read_rows(const unsigned char* data, std::size_t rows, std::size_t row_bytes, std::size_t stride) {
  constexpr std::size_t lanes = 64, block = lanes * sizeof(std::uint32_t);
  std::uint32_t sums[lanes] = {}, words[lanes];
  for (std::size_t row = 0; row < rows; ++row)
    for (std::size_t i = 0; i + block <= row_bytes; i += block) {
      std::memcpy(words, data + row * stride + i, block);
      for (std::size_t lane = 0; lane < lanes; ++lane) sums[lane] += words[lane];
    }
  std::uint32_t sum = 0;
  for (const std::uint32_t lane : sums) sum += lane;
  return sum;
}

// ---- progress -----------------------------------------------------------------------------------

// A line on stderr after two seconds of silence, wiped when the run is over.
class Progress {
 public:
  static Progress& get() {
    static Progress progress;
    return progress;
  }
  // quiet_between: Google Benchmark prints nothing until the end (random interleaving).
  void begin(bool quiet_between) { quiet_between_ = quiet_between; }
  void started(const char* task) {
    task_ = task;
    ++runs_;
    if (!quiet_between_) last_ = Clock::now();
  }
  void tick() {
    const auto now = Clock::now();
    if (now - last_ < std::chrono::seconds(2)) return;
    last_ = now;
    const double seconds = std::chrono::duration<double>(now - start_).count();
    std::fprintf(stderr, "\r%-100s\r%.0f s, run %zu: %s", "", seconds, runs_, task_);
    std::fflush(stderr);
    shown_ = true;
  }
  void wipe() {
    if (shown_) std::fprintf(stderr, "\r%-100s\r", "");
    shown_ = false;
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_ = Clock::now(), last_ = start_;
  const char* task_ = "";
  std::size_t runs_ = 0;
  bool quiet_between_ = false, shown_ = false;
};

// ---- measuring ----------------------------------------------------------------------------------

// Runs the candidates in turn, forwards and backwards, as many rounds as the benchmark has iterations.
// Reports the median time of the first as the benchmark's time, and for each other candidate a counter: (its time) /
// (the first one's), or the inverse where its name begins with "times_"; lower quartiles both, since a neighbour on the
// machine slows some rounds of either and never speeds one up. Of candidates for one counter the fastest counts. The
// benchmark needs UseManualTime() and Iterations(rounds).
struct Candidate {
  const char* counter;        // "of_limit", "vs_rival"; of the first candidate unused
  std::function<void()> run;  // one run
};

inline void compare(benchmark::State& state, const char* name, const std::vector<Candidate>& candidates) {
  using Clock = std::chrono::steady_clock;
  Progress::get().started(name);
  std::vector<std::vector<double>> seconds(candidates.size());
  const auto rounds = static_cast<std::size_t>(state.max_iterations);
  while (state.KeepRunningBatch(state.max_iterations)) {
    state.PauseTiming();  // so that the CPU column, too, is the first candidate's
    for (std::size_t round = 0; round < rounds; ++round) {
      for (std::size_t i = 0; i < candidates.size(); ++i) {
        const std::size_t which = round % 2 == 0 ? i : candidates.size() - 1 - i;
        if (which == 0) state.ResumeTiming();
        const auto begin = Clock::now();
        candidates[which].run();
        const auto end = Clock::now();
        if (which == 0) state.PauseTiming();
        seconds[which].push_back(std::chrono::duration<double>(end - begin).count());
      }
      Progress::get().tick();
    }
    state.ResumeTiming();
    const auto quantile = [](std::vector<double> values, double q) {
      const auto at = values.begin() + static_cast<std::ptrdiff_t>(static_cast<double>(values.size()) * q);
      std::nth_element(values.begin(), at, values.end());
      return *at;
    };
    state.SetIterationTime(quantile(seconds[0], 0.5) * static_cast<double>(rounds));
    for (std::size_t i = 1; i < candidates.size(); ++i) {
      const double ratio = quantile(seconds[i], 0.25) / quantile(seconds[0], 0.25);
      const bool times = std::strncmp(candidates[i].counter, "times_", 6) == 0;
      const auto counter = state.counters.find(candidates[i].counter);
      if (counter == state.counters.end() ||
          (times ? 1 / ratio > counter->second.value : ratio < counter->second.value))
        state.counters[candidates[i].counter] = times ? 1 / ratio : ratio;
    }
  }
}

// ---- context ------------------------------------------------------------------------------------

inline std::string processor() {
  std::ifstream listing("/proc/cpuinfo");
  for (std::string line; std::getline(listing, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown";
}

inline std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("g++ ") + __VERSION__;
#else
  return "unknown";
#endif
}

// The instruction sets that the compiler was allowed to use.
inline std::string instruction_sets() {
  std::string sets;
#if defined(__AVX512F__)
  sets += " AVX-512";
#endif
#if defined(__AVX2__)
  sets += " AVX2";
#endif
#if defined(__FMA__)
  sets += " FMA";
#endif
#if defined(__F16C__)
  sets += " F16C";
#endif
#if defined(__FAST_MATH__)
  sets += " (fast-math)";
#endif
  return sets.empty() ? "baseline" : sets.substr(1);
}

}  // namespace bench

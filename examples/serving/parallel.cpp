// The caller's threads: fastv owns none, but spreads a batch's sequences, or one long sequence's keys and heads, over
// whatever it is handed. Here OpenMP and a small pool of std::thread; results are the same bit for bit.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <fastv/fastv.hpp>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct OpenMp {
  template <class Body>
  void operator()(std::size_t count, const Body& body) const {
#pragma omp parallel for schedule(dynamic)
    for (std::ptrdiff_t i = 0; i < static_cast<std::ptrdiff_t>(count); ++i) body(static_cast<std::size_t>(i));
  }
};

// Threads that wait for work; the caller works too.
class Pool {
 public:
  explicit Pool(std::size_t threads) {
    for (std::size_t t = 1; t < threads; ++t) threads_.emplace_back([this] { wait_for_work(); });
  }
  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    start_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  template <class Body>
  void operator()(std::size_t count, const Body& body) const {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = std::cref(body);
      count_ = count;
      next_ = 0;
      busy_ = threads_.size();
      ++round_;
    }
    start_.notify_all();
    drain();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void drain() const {
    for (std::size_t i; (i = next_++) < count_;) work_(i);
  }
  void wait_for_work() {
    for (std::size_t seen = 0;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return stop_ || round_ != seen; });
        if (stop_) return;
        seen = round_;
      }
      drain();
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> threads_;
  mutable std::mutex mutex_;
  mutable std::condition_variable start_, done_;
  mutable std::function<void(std::size_t)> work_;
  mutable std::atomic<std::size_t> next_{0};
  mutable std::size_t count_ = 0, busy_ = 0, round_ = 0;
  bool stop_ = false;
};

constexpr std::size_t heads = 32, dim = 128, tokens = 631, sequences = 16;

template <class Run>
double milliseconds(Run run) {
  std::vector<double> times;
  for (int i = 0; i < 9; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run();
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace

int main() {
  // A batch of LLaVA-1.5-7B prompts: the last token's queries, and the keys of layer K-1, packed.
  std::vector<float> query(sequences * heads * dim), key(sequences * tokens * heads * dim);
  std::uint32_t state = 1;
  for (auto* tensor : {&query, &key})
    for (float& x : *tensor) {
      state = state * 1664525u + 1013904223u;
      x = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    }
  const fastv::TokenSpan visual[] = {{35, 576, 24}};
  std::vector<fastv::Request> requests;
  for (std::size_t i = 0; i < sequences; ++i) requests.push_back({fastv::Config{}, visual, i * tokens, tokens});
  const auto evidence_of = [&](std::size_t i) {
    return fastv::query_key(fastv::heads(query.data() + i * heads * dim, fastv::TokenMajor{1, heads, dim}),
                            fastv::heads(key.data() + i * tokens * heads * dim, fastv::TokenMajor{tokens, heads, dim}),
                            0.0884f);
  };

  fastv::BatchPruner<> pruner;
  const Pool pool(std::thread::hardware_concurrency());
  std::vector<fastv::Index> expected;
  double serial = 0;
  int wrong = 0;
  const auto report = [&](const char* name, const auto& parallel_for) {
    std::vector<fastv::Index> indices;
    const double time = milliseconds([&] {
      const fastv::KeptBatch kept = pruner.prune(requests, evidence_of, parallel_for);
      if (!kept) std::puts(kept.message().c_str());
      indices.assign(kept.indices.begin(), kept.indices.end());
    });
    if (expected.empty()) {
      expected = indices;
      serial = time;
    }
    wrong += indices == expected ? 0 : 1;
    std::printf("%-12s %7.2f ms for %zu sequences, %.2fx, %s\n", name, time, sequences, serial / time,
                indices == expected ? "same indices" : "DIFFERENT INDICES");
  };
  report("one thread", fastv::Serial{});
  report("OpenMP", OpenMp{});
  report("thread pool", std::cref(pool).get());
  return wrong == 0 ? 0 : 1;
}

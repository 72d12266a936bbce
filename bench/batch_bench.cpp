// How pruning grows: 576 to 65,536 visual tokens, 1 to 64 sequences, one and two threads, scored from half-precision
// keys outside the cache at LLaVA-1.5-7B's heads. Linear growth shows as a constant time per key.
#include <benchmark/benchmark.h>

#include <fastv/fastv.hpp>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t heads = 32, dim = 128, text = 55;

// count bodies on a fixed number of threads; the caller is one of them.
struct Threads {
  std::size_t threads;
  template <class Body>
  void operator()(std::size_t count, const Body& body) const {
    const auto share = [&](std::size_t t) {
      for (std::size_t i = t; i < count; i += threads) body(i);
    };
    std::vector<std::thread> others;
    for (std::size_t t = 1; t < threads; ++t) others.emplace_back(share, t);
    share(0);
    for (std::thread& thread : others) thread.join();
  }
};

void BM_Batch(benchmark::State& state) {
  const auto visual_tokens = static_cast<std::size_t>(state.range(0)),
             sequences = static_cast<std::size_t>(state.range(1)), threads = static_cast<std::size_t>(state.range(2)),
             tokens = visual_tokens + text;
  std::vector<float> query(heads * dim);
  std::uint32_t noise = 1;
  const auto next = [&noise] { return noise = noise * 1664525u + 1013904223u; };
  for (float& q : query) q = static_cast<float>(next() >> 8) / 8388608.0f - 1.0f;
  // Keys of all sequences, [tokens, heads, dim] each: halves of either sign below 2.
  std::vector<fastv::half> keys(sequences * tokens * heads * dim);
  for (fastv::half& key : keys) key.bits = static_cast<std::uint16_t>((next() >> 16) & 0xbfffu);

  const fastv::TokenSpan span{35, visual_tokens};
  std::vector<fastv::Request> requests;
  for (std::size_t i = 0; i < sequences; ++i) requests.push_back({fastv::Config{}, {&span, 1}, i * tokens, tokens});
  const auto evidence_of = [&](std::size_t i) {
    return fastv::query_key(fastv::heads(query.data(), fastv::TokenMajor{1, heads, dim}),
                            fastv::heads(keys.data() + i * tokens * heads * dim, fastv::TokenMajor{tokens, heads, dim}),
                            0.0884f);
  };

  // Correctness first: the batch against each sequence alone.
  fastv::BatchPruner<> pruner;
  fastv::Pruner<> alone;
  const fastv::KeptBatch batch = pruner.prune(requests, evidence_of);
  for (std::size_t i = 0; i < sequences; ++i) {
    const fastv::Kept kept = alone.prune(evidence_of(i), {&span, 1});
    bool same = batch && kept && batch.sequences[i].size() == kept.size();
    for (std::size_t t = 0; same && t < kept.size(); ++t)
      same = batch.sequences[i].indices[t] == kept.indices[t] &&
             batch.indices[batch.cumulative[i] + t] == kept.indices[t] + i * tokens;
    if (!same) {
      state.SkipWithError("a sequence of the batch differs from the sequence alone");
      return;
    }
  }
  for (auto _ : state) {
    if (sequences == 1)
      benchmark::DoNotOptimize(alone.prune(evidence_of(0), {&span, 1}, Threads{threads}));
    else
      benchmark::DoNotOptimize(pruner.prune(requests, evidence_of, Threads{threads}));
  }
  const double all_keys = static_cast<double>(sequences * tokens * heads);
  state.counters["ns_per_key_and_head"] =
      benchmark::Counter(all_keys * 1e-9, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
  state.counters["GB_per_s"] =
      benchmark::Counter(all_keys * dim * sizeof(fastv::half) * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

void shapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"visual", "sequences", "threads"})->UseRealTime()->Unit(benchmark::kMillisecond);
  for (const int threads : {1, 2}) {
    for (const int visual : {576, 2880, 16384, 65536}) bench->Args({visual, 1, threads});
    for (const int sequences : {4, 16, 64}) bench->Args({576, sequences, threads});
  }
}
BENCHMARK(BM_Batch)->Apply(shapes);

}  // namespace

BENCHMARK_MAIN();

// Prefill of the whole reference decoder with FastV (K = 2) beside the same prefill without it, in one run.
//
// time_ratio:  pruned time / unpruned time, the median of pairs run one behind the other
// flops_ratio: what the cost model says it should be
// of_theory:   flops_ratio / time_ratio; 1 means that every saved multiply-add is saved time
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "../tests/masked_decoder.hpp"
#include "random_weights.hpp"

namespace {

using namespace reference;

// 35 system and instruction tokens, one LLaVA-1.5 image, 20 tokens of question.
constexpr std::size_t tokens = 631;
const std::vector<fastv::TokenSpan> visual = {{35, 576, 24}};
constexpr fastv::ModelShape shape{12, 1024, 16, 16, 64, 2816, 3, 1000};
constexpr int repetitions = 5;

// pruning: null where nothing is pruned.
double seconds_of_prefill(const Decoder& decoder, const Matrix& prompt, Pruning* pruning, Matrix& logits) {
  Sequence sequence;
  const auto start = std::chrono::steady_clock::now();
  const Matrix hidden =
      pruning == nullptr ? decoder.prefill(prompt, sequence) : decoder.prefill(prompt, sequence, *pruning);
  logits = decoder.logits(hidden.bottomRows(1), sequence);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void BM_Prefill(benchmark::State& state) {
  static const Decoder decoder({shape, 1e-5f, 10000}, RandomWeights(1));
  static const Matrix prompt = RandomWeights(2).matrix("prompt", tokens, static_cast<Eigen::Index>(shape.hidden));

  fastv::Config config;
  config.filtering_ratio = static_cast<double>(state.range(0)) / 100;
  Pruning pruning{fastv::Pruner<>(config), visual};
  const auto plan = pruning.pruner.plan({tokens, shape.layers, visual});
  const auto whole = fastv::make_plan(fastv::Span<const fastv::Config>(), {tokens, shape.layers, visual});

  // Correctness first: the same logits as hiding the dropped tokens' keys.
  Matrix logits, unpruned;
  (void)seconds_of_prefill(decoder, prompt, &pruning, logits);
  Sequence sequence;
  const Matrix hidden = masked::prefill(decoder, prompt, sequence, {{config}, visual});
  if ((logits - decoder.logits(hidden.bottomRows(1), sequence)).cwiseAbs().maxCoeff() > 1e-3f) {
    state.SkipWithError("the pruned prefill's logits differ from the masked one's");
    return;
  }

  std::vector<double> pruned_times, whole_times, ratios;
  for (auto _ : state) {
    whole_times.push_back(seconds_of_prefill(decoder, prompt, nullptr, unpruned));
    pruned_times.push_back(seconds_of_prefill(decoder, prompt, &pruning, logits));
    ratios.push_back(pruned_times.back() / whole_times.back());
    state.SetIterationTime(pruned_times.back());
    std::fprintf(stderr, "\rR = %d%%: run %zu of %d ", static_cast<int>(state.range(0)), pruned_times.size(),
                 repetitions);
  }
  std::fprintf(stderr, "\r                          \r");
  const double flops_ratio = fastv::prefill_flops(shape, *plan) / fastv::prefill_flops(shape, *whole);
  const double time_ratio = median(ratios);  // pair by pair, so that a busy machine slows both
  state.counters["tokens_kept"] = static_cast<double>(plan->kept());
  state.counters["unpruned_ms"] = 1e3 * median(whole_times);
  state.counters["pruned_ms"] = 1e3 * median(pruned_times);
  state.counters["gflops_per_s"] = fastv::prefill_flops(shape, *whole) / median(whole_times) / 1e9;
  state.counters["flops_ratio"] = flops_ratio;
  state.counters["time_ratio"] = time_ratio;
  state.counters["kv_ratio"] =
      static_cast<double>(fastv::kv_bytes(shape, *plan, 4)) / static_cast<double>(fastv::kv_bytes(shape, *whole, 4));
  state.counters["of_theory"] = flops_ratio / time_ratio;
}

// What pruning itself costs, beside one decoder layer of LLaVA-1.5-7B on the same 631 tokens: scores from the queries
// and keys of that layer, selection, and the hidden states and positions compacted.
void BM_ShareOfALayer(benchmark::State& state) {
  Eigen::setNbThreads(1);
  constexpr fastv::ModelShape layer{1, 4096, 32, 32, 128, 11008, 3, 8};
  const Decoder decoder({layer, 1e-5f, 10000}, RandomWeights(3));
  const Matrix prompt = RandomWeights(4).matrix("prompt", tokens, 4096);

  std::vector<fastv::half> query(32 * 128), key(tokens * 32 * 128);
  std::uint32_t noise = 1;
  for (auto* tensor : {&query, &key})
    for (fastv::half& x : *tensor) {
      noise = noise * 1664525u + 1013904223u;
      x.bits = static_cast<std::uint16_t>((noise >> 16) & 0xbfffu);
    }
  std::vector<std::uint16_t> hidden(tokens * 4096);
  std::vector<std::int32_t> positions(tokens);
  fastv::Pruner<> pruner;
  std::vector<double> layer_times, pruning_times;
  for (auto _ : state) {
    Matrix logits;
    layer_times.push_back(seconds_of_prefill(decoder, prompt, nullptr, logits));
    const auto start = std::chrono::steady_clock::now();  // the layer has just swept the caches
    const auto kept =
        pruner.prune(fastv::query_key(fastv::heads(query.data(), fastv::TokenMajor{1, 32, 128}),
                                      fastv::heads(key.data(), fastv::TokenMajor{tokens, 32, 128}), 0.0884f),
                     visual);
    const bool moved =
        kept && fastv::compact(kept, fastv::rows(hidden.data(), tokens, 4096)) && fastv::compact(kept, positions);
    pruning_times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    if (!moved) {
      state.SkipWithError("pruning failed");
      return;
    }
    state.SetIterationTime(pruning_times.back());
  }
  state.counters["layer_ms"] = 1e3 * median(layer_times);
  state.counters["pruning_ms"] = 1e3 * median(pruning_times);
  state.counters["percent_of_layer"] = 100 * median(pruning_times) / median(layer_times);
}
BENCHMARK(BM_ShareOfALayer)->Iterations(repetitions)->UseManualTime()->Unit(benchmark::kMillisecond);

BENCHMARK(BM_Prefill)
    ->ArgName("R")
    ->Arg(50)
    ->Arg(75)
    ->Arg(90)
    ->Iterations(repetitions)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();

// FastV in a real engine: the prefill of a random-weight LLaMA on ggml, beside llama.cpp's own llama_decode on the same
// file, in one process; medians of rounds in which all of them run in turn.
//
//   flops_ratio  of the pruned prefill to the whole one, by the cost model
//   time_ratio   the same of the times measured, both by the engine of examples/llava
//   of_theory    flops_ratio / time_ratio
//   vs_rival     llama_decode's time on the whole prompt / this time
//
// Options besides Google Benchmark's: --7b adds LLaVA-1.5-7B's geometry in Q4_0, whose file of 4 GB is written first;
// it takes minutes. --folder DIR: where the files are written, and removed behind the run (the system's folder for
// temporary files).
#include <unistd.h>

#include <array>
#include <filesystem>
#include <map>
#include <memory>

#include "../tests/llava/llama_oracle.hpp"
#include "../tests/llava/tiny_gguf.hpp"
#include "timing.hpp"

namespace {

using fastv::Config;
using llava::Engine;
using llava::Prompt;

std::filesystem::path folder = std::filesystem::temp_directory_path();

// 35 system and instruction tokens, one LLaVA-1.5 picture, 20 tokens of question.
constexpr std::size_t tokens = 631;
constexpr fastv::TokenSpan picture{35, 576, 24};
constexpr std::array<int, 3> ratios = {50, 75, 90};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

template <class Run>
double seconds_of(const Run& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

Config config_of(int percent) {
  Config config;
  config.filtering_ratio = percent / 100.0;
  return config;
}

Prompt prompt_of(std::int64_t hidden) {
  Prompt prompt;
  prompt.tokens = tokens;
  prompt.next_position = static_cast<std::int32_t>(tokens);
  prompt.visual = {picture};
  std::uint32_t noise = 1;
  for (std::size_t i = 0; i < tokens; ++i) prompt.positions.push_back(static_cast<std::int32_t>(i));
  prompt.embeddings.resize(tokens * static_cast<std::size_t>(hidden));
  for (float& x : prompt.embeddings) {
    noise = noise * 1664525u + 1013904223u;
    x = static_cast<float>(noise >> 8) / 8388608.0f - 1;
  }
  return prompt;
}

// One model file, loaded by both engines, and the times of a round of all prefills.
class Fixture {
 public:
  Fixture(const tiny_gguf::LanguageModel& spec, const std::string& name, int threads, int rounds)
      : backends_(threads),
        path_((folder / ("fastv_bench_" + std::to_string(getpid()) + "_" + name + ".gguf")).string()) {
    std::fprintf(stderr, "writing %s\n", path_.c_str());
    tiny_gguf::write(spec, path_);
    model_ = std::make_unique<llava::Model>(path_, backends_);
    engine_ = std::make_unique<Engine>(*model_, backends_);
    llama_ = std::make_unique<oracle::Llama>(path_, threads, 768, 512, false);
    prompt_ = prompt_of(model_->shape().hidden);

    // Correctness first.
    llava::Cache cache = engine_->cache(engine_->plan(prompt_, {}), 0);
    const std::vector<float> ours = engine_->prefill(prompt_, {}, cache).logits, theirs = llama_->prefill(prompt_);
    for (std::size_t i = 0; i < ours.size(); ++i)
      if (!(std::abs(ours[i] - theirs[i]) <= 1e-3f * (1 + std::abs(theirs[i])))) right_ = false;

    for (int round = 0; right_ && round < rounds; ++round) {
      std::fprintf(stderr, "%s, %d threads: round %d of %d\n", name.c_str(), threads, round + 1, rounds);
      llama_times_.push_back(seconds_of([&] { llama_->prefill(prompt_); }));
      times_[0].push_back(prefill_seconds({}));
      for (const int percent : ratios) times_[percent].push_back(prefill_seconds({config_of(percent)}));
    }
  }
  ~Fixture() { std::filesystem::remove(path_); }

  bool right() const { return right_; }
  double llama_seconds() const { return median(llama_times_); }
  double seconds(int percent) const { return median(times_.at(percent)); }
  const llava::Model& model() const { return *model_; }
  const llava::Backends& backends() const { return backends_; }
  const Engine& engine() const { return *engine_; }
  const Prompt& prompt() const { return prompt_; }
  oracle::Llama& llama() { return *llama_; }

  // A step of decoding behind the prompt, the median of several.
  double decode_seconds(const std::vector<Config>& schedule) const {
    constexpr std::size_t steps = 16;
    llava::Cache cache = engine_->cache(engine_->plan(prompt_, schedule), steps);
    engine_->prefill(prompt_, schedule, cache);
    std::vector<double> times;
    for (std::size_t i = 0; i < steps; ++i) times.push_back(seconds_of([&] { engine_->decode(1, cache); }));
    return median(times);
  }

 private:
  double prefill_seconds(const std::vector<Config>& schedule) const {
    llava::Cache cache = engine_->cache(engine_->plan(prompt_, schedule), 0);
    return engine_->prefill(prompt_, schedule, cache).seconds;
  }

  llava::Backends backends_;
  std::string path_;
  std::unique_ptr<llava::Model> model_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<oracle::Llama> llama_;
  Prompt prompt_;
  bool right_ = true;
  std::vector<double> llama_times_;
  std::map<int, std::vector<double>> times_;
};

// The benchmarks of one file follow each other: it is loaded for the first and dropped for the next file.
Fixture& fixture(const tiny_gguf::LanguageModel& spec, const std::string& name, int threads, int rounds) {
  static std::string current;
  static std::unique_ptr<Fixture> loaded;
  const std::string wanted = name + std::to_string(threads);
  if (wanted != current) {
    loaded.reset();
    loaded = std::make_unique<Fixture>(spec, name, threads, rounds);
    current = wanted;
  }
  return *loaded;
}

// percent: 0 for no pruning, -1 for llama_decode.
void prefill(benchmark::State& state, const tiny_gguf::LanguageModel& spec, const std::string& name, int threads,
             int rounds, int percent, bool decode) {
  Fixture& f = fixture(spec, name, threads, rounds);
  if (!f.right()) return state.SkipWithError("the engine's logits are not llama_decode's");
  const double seconds = percent < 0 ? f.llama_seconds() : f.seconds(percent);
  for (auto _ : state) state.SetIterationTime(seconds);
  if (percent < 0) return;
  const fastv::ModelShape shape = f.model().shape().cost_shape();
  const fastv::Plan whole = f.engine().plan(f.prompt(), {});
  const std::vector<Config> schedule = percent == 0 ? std::vector<Config>{} : std::vector<Config>{config_of(percent)};
  const fastv::Plan plan = f.engine().plan(f.prompt(), schedule);
  const double flops = fastv::prefill_flops(shape, plan) / fastv::prefill_flops(shape, whole);
  const double time = seconds / f.seconds(0);
  state.counters["kept"] = static_cast<double>(plan.kept());
  state.counters["flops_ratio"] = flops;
  state.counters["time_ratio"] = time;
  state.counters["of_theory"] = flops / time;
  state.counters["vs_rival"] = f.llama_seconds() / seconds;
  state.counters["kv_MiB"] = static_cast<double>(fastv::kv_bytes(shape, plan, 2)) / (1 << 20);
  if (decode) state.counters["decode_tokens_per_s"] = 1 / f.decode_seconds(schedule);
}

// Pruning alone at this model's shapes, as the graph does it and as the core does it on the host: scores from the last
// query and the keys in the cache, selection, the kept hidden rows and positions.
void pruning_cost(benchmark::State& state, const tiny_gguf::LanguageModel& spec, const std::string& name, int threads,
                  int rounds, bool in_graph) {
  Fixture& f = fixture(spec, name, threads, rounds);
  const llava::Shape& s = f.model().shape();
  const Config config = config_of(50);
  fastv::graph::Pruner graph_pruner(config);
  fastv::Pruner<float> host_pruner(config);
  const auto plan = graph_pruner.begin({tokens, static_cast<std::size_t>(s.layers), f.prompt().visual});
  if (!plan) return state.SkipWithError(plan.message().c_str());

  const std::size_t nodes = 256;
  ggml_context_ptr context(
      ggml_init({nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(nodes, false), nullptr, true}));
  ggml_context* ctx = context.get();
  const auto n = static_cast<std::int64_t>(tokens);
  ggml_tensor* q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.head_dim, s.heads, 1);
  ggml_tensor* k = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, s.head_dim, s.kv_heads, n);
  ggml_tensor* hidden = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, s.hidden, n);
  ggml_tensor* positions = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
  for (ggml_tensor* input : {q, k, hidden, positions}) {
    ggml_set_input(input);
    ggml_set_output(input);  // so that its memory is not used again behind its last reader
  }
  const float scale = s.attention_scale;
  const auto selected = graph_pruner.select(ctx, fastv::graph::scores(ctx, q, ggml_cast(ctx, k, GGML_TYPE_F32), scale));
  if (!selected) return state.SkipWithError(selected.message().c_str());
  ggml_tensor* kept = *selected;
  ggml_cgraph* graph = ggml_new_graph_custom(ctx, nodes, false);
  for (ggml_tensor* output :
       {ggml_get_rows(ctx, hidden, kept), *fastv::graph::gather_positions(ctx, positions, 1, kept), kept}) {
    ggml_set_output(output);
    ggml_build_forward_expand(graph, output);
  }
  ggml_backend_sched_t scheduler = f.backends().scheduler();
  ggml_backend_sched_reset(scheduler);
  if (!ggml_backend_sched_alloc_graph(scheduler, graph)) return state.SkipWithError("no memory");
  std::vector<float> values(f.prompt().embeddings);
  values.resize(static_cast<std::size_t>(std::max(s.head_dim * s.kv_heads, s.hidden)) * tokens, 0.25f);
  std::vector<ggml_fp16_t> halves(static_cast<std::size_t>(ggml_nelements(k)));
  ggml_fp32_to_fp16_row(values.data(), halves.data(), ggml_nelements(k));
  ggml_backend_tensor_set(q, values.data(), 0, ggml_nbytes(q));
  ggml_backend_tensor_set(k, halves.data(), 0, ggml_nbytes(k));
  ggml_backend_tensor_set(hidden, values.data(), 0, ggml_nbytes(hidden));
  ggml_backend_tensor_set(positions, f.prompt().positions.data(), 0, ggml_nbytes(positions));
  const auto set_lists = [&] {
    const fastv::Status set = graph_pruner.set_inputs([](ggml_tensor* tensor, const void* data, std::size_t bytes) {
      ggml_backend_tensor_set(tensor, data, 0, bytes);
    });
    if (!set) state.SkipWithError(set.message().c_str());
  };
  std::vector<std::int32_t> found(plan->kept());
  std::vector<double> times;
  for (auto _ : state) {
    set_lists();
    times.push_back(seconds_of([&] {
      if (in_graph) {
        ggml_backend_sched_graph_compute(scheduler, graph);
      } else {
        const fastv::Kept by_core = host_pruner.prune(fastv::query_key(q, k, scale), f.prompt().visual);
        benchmark::DoNotOptimize(fastv::compact(by_core, hidden, 1).code);
        benchmark::DoNotOptimize(fastv::compact(by_core, positions, 0).code);
      }
    }));
    state.SetIterationTime(times.back());
    ggml_backend_tensor_set(hidden, values.data(), 0, ggml_nbytes(hidden));
    ggml_backend_tensor_set(positions, f.prompt().positions.data(), 0, ggml_nbytes(positions));
  }
  // Checked behind the timing, since the graph leaves its answer in place.
  set_lists();
  ggml_backend_sched_graph_compute(scheduler, graph);
  ggml_backend_tensor_get(kept, found.data(), 0, found.size() * sizeof(std::int32_t));
  const fastv::Kept by_core = host_pruner.prune(fastv::query_key(q, k, scale), f.prompt().visual);
  if (by_core.size() != found.size() || !std::equal(by_core.begin(), by_core.end(), found.begin(),
                                                    [](auto a, auto b) { return static_cast<std::int32_t>(a) == b; }))
    return state.SkipWithError("the graph and the core keep different tokens");
  state.counters["us"] = 1e6 * median(times);
  state.counters["percent_of_prefill"] = 100 * median(times) / f.seconds(0);
}

void register_all(const tiny_gguf::LanguageModel& spec, const std::string& name, const std::vector<int>& threads,
                  int rounds, bool decode) {
  for (const int t : threads) {
    const std::string suffix = "/" + name + "/threads:" + std::to_string(t);
    const auto add = [&](const std::string& row, int percent) {
      benchmark::RegisterBenchmark(
          (row + suffix).c_str(),
          [=](benchmark::State& state) { prefill(state, spec, name, t, rounds, percent, decode); })
          ->Iterations(1)
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond);
    };
    add("llama_decode", -1);
    add("whole", 0);
    for (const int percent : ratios) add("fastv_R" + std::to_string(percent), percent);
    for (const bool in_graph : {true, false})
      benchmark::RegisterBenchmark(
          ((in_graph ? "pruning_in_graph" : "pruning_on_host") + suffix).c_str(),
          [=](benchmark::State& state) { pruning_cost(state, spec, name, t, rounds, in_graph); })
          ->Iterations(50)
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond);
  }
}

}  // namespace

int main(int count, char** arguments) {
  bool large = false;
  std::vector<char*> rest{arguments[0]};
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--7b")
      large = true;
    else if (argument == "--folder" && i + 1 < count)
      folder = arguments[++i];
    else
      rest.push_back(arguments[i]);
  }
  if (large) {
    tiny_gguf::LanguageModel spec;
    spec.type = GGML_TYPE_Q4_0;
    spec.layers = 32;
    spec.hidden = 4096;
    spec.heads = spec.kv_heads = 32;
    spec.ffn = 11008;
    register_all(spec, "LLaVA-1.5-7B_q4_0", {2}, 1, true);
  } else {
    tiny_gguf::LanguageModel spec;  // the shape of a 1B LLaMA
    spec.layers = 16;
    spec.hidden = 2048;
    spec.heads = 32;
    spec.kv_heads = 8;
    spec.ffn = 8192;
    for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
      spec.type = type;
      register_all(spec, std::string("1B_") + ggml_type_name(type), {1, 2}, 3, false);
    }
  }
  int rest_count = static_cast<int>(rest.size());
  benchmark::AddCustomContext("processor", bench::processor());
  benchmark::AddCustomContext("compiler", bench::compiler());
  benchmark::Initialize(&rest_count, rest.data());
  if (benchmark::ReportUnrecognizedArguments(rest_count, rest.data())) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

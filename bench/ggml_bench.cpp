// FastV in a real engine: a random-weight LLaMA on unmodified libllama in two halves, as examples/llava runs it, beside
// llama_decode on the same file, in one process; medians of rounds in which all of them run in turn. Where in memory a model
// comes to lie, and so in which order they are loaded, moves a model's times: half of the rounds are of the whole model
// loaded first, half of the halves first.
//
//   flops_ratio  of the pruned prefill to the whole one, by the cost model
//   of_rival     time / llama_decode's time on the whole prompt, or on a step of decoding
//   over_flops   of_rival / flops_ratio
//   of_decoding  a step of decoding behind the prompt / llama_decode's
//   call_us      what two calls of libllama cost a step, and rows that go between them: a step less llama_decode's, in
//                microseconds, unpruned
//
// Options besides Google Benchmark's: --7b adds LLaVA-1.5-7B's geometry in Q4_0, whose file of 4 GB is written first;
// it takes minutes. --folder DIR: where the files are written, and removed behind the run (the system's folder for
// temporary files). --filter NAME: files whose name has it.
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

constexpr std::array<int, 3> ratios = {50, 75, 90};

// Of as many values of one order of loading as of the other: the mean of the two in the middle, so that neither decides.
double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
}

template <class Run>
double seconds_of(const Run& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

Config config_of(int percent, std::size_t k) {
  Config config;
  config.filtering_layer = k;
  config.filtering_ratio = percent / 100.0;
  return config;
}

// 35 system and instruction tokens, the pictures, 20 tokens of question.
Prompt prompt_of(const llava::Halves& halves, std::size_t visual) {
  Prompt prompt;
  prompt.add_text(std::vector<llama_token>(35, 7), halves.position_axes());
  llava::Piece picture;
  picture.count = visual;
  std::uint32_t noise = 1;
  picture.rows.resize(visual * halves.input());
  for (float& x : picture.rows) {
    noise = noise * 1664525u + 1013904223u;
    x = static_cast<float>(noise >> 8) / 8388608.0f - 1;
  }
  for (std::size_t i = 0; i < visual; ++i) picture.positions.push_back(prompt.next_position++);
  prompt.pieces.push_back(std::move(picture));
  prompt.add_text(std::vector<llama_token>(20, 9), halves.position_axes());
  return prompt;
}

struct Case {
  tiny_gguf::LanguageModel spec;
  std::string name;
  std::size_t visual;
  int threads, rounds;  // rounds: in either order
};

// One model file, loaded whole and in halves, in both orders, and the times of rounds of all prefills.
class Fixture {
 public:
  explicit Fixture(const Case& c)
      : path_((folder / ("fastv_bench_" + std::to_string(getpid()) + "_" + c.name + ".gguf")).string()) {
    std::fprintf(stderr, "writing %s\n", path_.c_str());
    tiny_gguf::write(c.spec, path_);
    for (const bool whole_first : {true, false}) {
      load(c, whole_first);
      // Correctness first.
      engine_->prefill(0, prompt_, nullptr);
      const std::vector<float> theirs = llama_->prefill(prompt_);
      for (std::size_t i = 0; i < theirs.size(); ++i)
        if (!(std::abs(engine_->logits(0)[i] - theirs[i]) <= 1e-3f * (1 + std::abs(theirs[i])))) right_ = false;
      if (right_) run(c, whole_first ? "whole first" : "halves first");
    }
  }
  ~Fixture() { std::filesystem::remove(path_); }

  bool right() const { return right_; }
  double llama_seconds() const { return median(llama_times_); }
  double llama_step() const { return median(llama_steps_); }
  double seconds(int percent) const { return median(times_.at(percent)); }
  double step(int percent) const { return median(steps_.at(percent)); }
  const Engine& engine() const { return *engine_; }
  const Prompt& prompt() const { return prompt_; }

 private:
  static constexpr std::size_t steps = 8;

  void load(const Case& c, bool whole_first) {
    engine_.reset();
    halves_.reset();
    llama_.reset();
    const std::size_t context = (35 + c.visual + 20 + steps + 255) / 256 * 256;
    const auto load_whole = [&] { llama_ = std::make_unique<oracle::Llama>(path_, c.threads, context, 512, false); };
    if (whole_first) load_whole();
    halves_ = std::make_unique<llava::Halves>(path_);
    llava::EngineOptions options;
    options.context = context;
    options.threads = c.threads;
    engine_ = std::make_unique<Engine>(*halves_, options);
    if (!whole_first) load_whole();
    prompt_ = prompt_of(*halves_, c.visual);
  }

  void run(const Case& c, const char* order) {
    for (int round = 0; round < c.rounds; ++round) {
      std::fprintf(stderr, "%s, %d threads, %s: round %d of %d\n", c.name.c_str(), c.threads, order, round + 1,
                   c.rounds);
      llama_times_.push_back(seconds_of([&] { llama_->prefill(prompt_); }));
      for (std::size_t i = 0; i < steps; ++i) llama_steps_.push_back(seconds_of([&] { llama_->decode(1); }));
      for (const int percent : {0, 50, 75, 90}) {
        const Config config = config_of(percent, halves_->filtering_layer());
        engine_->forget(0);
        times_[percent].push_back(engine_->prefill(0, prompt_, percent == 0 ? nullptr : &config).seconds);
        for (std::size_t i = 0; i < steps; ++i)
          steps_[percent].push_back(seconds_of([&] { engine_->decode({{0, 1}}); }));
      }
    }
  }

  std::string path_;
  std::unique_ptr<llava::Halves> halves_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<oracle::Llama> llama_;
  Prompt prompt_;
  bool right_ = true;
  std::vector<double> llama_times_, llama_steps_;
  std::map<int, std::vector<double>> times_, steps_;
};

// The benchmarks of one file follow each other: it is loaded for the first and dropped for the next file.
Fixture& fixture(const Case& c) {
  static std::string current;
  static std::unique_ptr<Fixture> loaded;
  const std::string wanted = c.name + " " + std::to_string(c.threads) + " " + std::to_string(c.visual);
  if (wanted != current) {
    loaded.reset();
    loaded = std::make_unique<Fixture>(c);
    current = wanted;
  }
  return *loaded;
}

// percent: 0 for no pruning, -1 for llama_decode.
void prefill(benchmark::State& state, const Case& c, int percent) {
  Fixture& f = fixture(c);
  if (!f.right()) return state.SkipWithError("the engine's logits are not llama_decode's");
  const double seconds = percent < 0 ? f.llama_seconds() : f.seconds(percent);
  for (auto _ : state) state.SetIterationTime(seconds);
  const fastv::ModelShape shape = f.engine().halves().cost_shape();
  const Config config = config_of(percent, f.engine().halves().filtering_layer());
  const fastv::Plan whole = f.engine().plan(f.prompt(), nullptr),
                    plan = f.engine().plan(f.prompt(), percent > 0 ? &config : nullptr);
  const double flops = fastv::prefill_flops(shape, plan) / fastv::prefill_flops(shape, whole);
  state.counters["kept"] = static_cast<double>(plan.kept());
  state.counters["flops_ratio"] = flops;
  state.counters["of_rival"] = seconds / f.llama_seconds();
  state.counters["over_flops"] = seconds / f.llama_seconds() / flops;
  state.counters["kv_MiB"] = static_cast<double>(fastv::kv_bytes(shape, plan, 2)) / (1 << 20);
  const double step = percent < 0 ? f.llama_step() : f.step(percent);
  state.counters["of_decoding"] = step / f.llama_step();
  state.counters["decode_tokens_per_s"] = 1 / step;
  if (percent == 0) state.counters["call_us"] = 1e6 * (step - f.llama_step());
}

void register_all(const Case& c) {
  const auto add = [&](const std::string& row, int percent) {
    benchmark::RegisterBenchmark(
        (row + "/" + c.name + "/visual:" + std::to_string(c.visual) + "/threads:" + std::to_string(c.threads)).c_str(),
        [=](benchmark::State& state) { prefill(state, c, percent); })
        ->Iterations(1)
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond);
  };
  add("llama_decode", -1);
  add("whole", 0);
  for (const int percent : ratios) add("fastv_R" + std::to_string(percent), percent);
}

}  // namespace

int main(int count, char** arguments) {
  bool large = false;
  std::string filter;
  std::vector<char*> rest{arguments[0]};
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--7b")
      large = true;
    else if (argument == "--folder" && i + 1 < count)
      folder = arguments[++i];
    else if (argument == "--filter" && i + 1 < count)
      filter = arguments[++i];
    else
      rest.push_back(arguments[i]);
  }
  std::vector<Case> cases;
  tiny_gguf::LanguageModel spec;
  if (large) {
    spec.type = GGML_TYPE_Q4_0;
    spec.layers = 32;
    spec.hidden = 4096;
    spec.heads = spec.kv_heads = 32;
    spec.ffn = 11008;
    cases.push_back({spec, "LLaVA-1.5-7B_q4_0", 576, 2, 1});
  } else {
    spec.layers = 16;  // the shape of a 1B LLaMA
    spec.hidden = 2048;
    spec.heads = 32;
    spec.kv_heads = 8;
    spec.ffn = 8192;
    for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
      spec.type = type;
      for (const int threads : {1, 2})
        cases.push_back({spec, std::string("1B_") + ggml_type_name(type), 576, threads, 2});
    }
    cases.push_back({spec, "1B_q4_0", 2880, 2, 1});  // ten frames of a video
  }
  for (const Case& c : cases)
    if (c.name.find(filter) != std::string::npos) register_all(c);
  int rest_count = static_cast<int>(rest.size());
  benchmark::AddCustomContext("processor", bench::processor());
  benchmark::AddCustomContext("compiler", bench::compiler());
  benchmark::Initialize(&rest_count, rest.data());
  if (benchmark::ReportUnrecognizedArguments(rest_count, rest.data())) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

// fastv-llava: answers a prompt about pictures with a GGUF model, with FastV. See --help.
#include <chrono>
#include <cstdio>

#include "../common/progress.hpp"
#include "report.hpp"

namespace {

using namespace llava;

struct SamplerDeleter {
  void operator()(llama_sampler* sampler) const { llama_sampler_free(sampler); }
};

// Picks the next token: the likeliest, or by temperature.
class Sampler {
 public:
  Sampler(double temperature, std::uint32_t seed)
      : chain_(llama_sampler_chain_init(llama_sampler_chain_default_params())) {
    if (temperature > 0) {
      llama_sampler_chain_add(chain_.get(), llama_sampler_init_temp(static_cast<float>(temperature)));
      llama_sampler_chain_add(chain_.get(), llama_sampler_init_dist(seed));
    } else {
      llama_sampler_chain_add(chain_.get(), llama_sampler_init_greedy());
    }
  }
  std::int32_t operator()(const std::vector<float>& logits) {
    candidates_.clear();
    for (std::size_t i = 0; i < logits.size(); ++i) candidates_.push_back({static_cast<llama_token>(i), logits[i], 0});
    llama_token_data_array all{candidates_.data(), candidates_.size(), -1, false};
    llama_sampler_apply(chain_.get(), &all);
    return all.data[all.selected].id;
  }

 private:
  std::unique_ptr<llama_sampler, SamplerDeleter> chain_;
  std::vector<llama_token_data> candidates_;
};

template <class Work>
auto with_progress(const char* label, const Work& work) {
  common::Progress bar(label, 100);
  return work([&](double share) { bar.reach(share); });
}

// Prefill and decoding. on_text: called with each piece of the answer as it comes.
template <class OnText>
Run generate(const std::string& name, const Engine& engine, const Words& words, const Shape& shape,
             const Prompt& prompt, const std::vector<fastv::Config>& schedule, const Options& options,
             const OnText& on_text) {
  Run run;
  run.name = name;
  run.plan = engine.plan(prompt, schedule);
  Cache cache = engine.cache(run.plan, options.generate);
  run.prefill = with_progress("Reading the prompt (%)", [&](const Progress& progress) {
    return engine.prefill(prompt, schedule, cache, progress);
  });
  Sampler sample(options.temperature, options.seed);
  std::vector<float> logits = run.prefill.logits;
  const auto start = std::chrono::steady_clock::now();
  while (true) {
    const std::int32_t token = sample(logits);
    run.tokens.push_back(token);
    if (words.ends(token)) break;
    const std::string piece = words.text(token);
    run.text += piece;
    on_text(piece);
    if (run.tokens.size() == options.generate) break;
    logits = engine.decode(token, cache);
  }
  run.decode_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const std::size_t row = 2 * ggml_row_size(options.engine.cache_type, shape.kv_heads * shape.head_dim);
  for (std::size_t i = 0; i < run.plan.layers; ++i) run.cache_bytes += row * cache.length(i);
  return run;
}

// Their logs are many lines; what goes wrong is said by the exceptions.
void quiet(ggml_log_level, const char*, void*) {}

// So that the first of two runs is not the one that reads the weights from the disk.
void warm_up(const Engine& engine, const Prompt& prompt) {
  Cache cache = engine.cache(engine.plan(prompt, {}), 1);
  engine.decode(0, cache);
}

void answer(const Options& options) {
  llama_log_set(quiet, nullptr);
  mtmd_log_set(quiet, nullptr);
  const Backends backends(options.threads);
  const auto model = with_progress("Loading the model (%)", [&](const Progress& progress) {
    return std::make_unique<Model>(options.model, backends, progress);
  });
  const Shape& shape = model->shape();
  const Engine engine(*model, backends, options.engine);
  const Words words(options.model);

  std::vector<PictureSpan> spans;
  Prompt prompt;
  bool padded = false;
  if (options.embeddings.empty()) {
    const Eyes eyes(options.vision, words, shape, backends.threads());
    padded = eyes.pads_to_square();
    std::vector<Eyes::Picture> pictures;
    for (const std::string& path : options.pictures) pictures.push_back(eyes.open(path));
    const std::string dressed = words.dress(with_markers(options.prompt, pictures.size()), options.chat_template);
    prompt = with_progress("Looking at the pictures (%)", [&](const Progress& progress) {
      return eyes.prompt(engine, shape, dressed, pictures, spans, progress);
    });
  } else {
    const std::vector<std::vector<float>> pictures = visual_embeddings(options.embeddings, shape);
    const std::string dressed = words.dress(with_markers(options.prompt, pictures.size()), options.chat_template);
    prompt = prompt_from_embeddings(engine, words, shape, dressed, pictures, spans);
  }
  const auto context = options.context > 0 ? options.context : static_cast<std::size_t>(shape.context);
  if (prompt.tokens + options.generate > context)
    throw std::invalid_argument("the prompt has " + std::to_string(prompt.tokens) + " tokens and -n asks for " +
                                std::to_string(options.generate) + " more, but the context holds " +
                                std::to_string(context) + ": raise -c, lower -n, or use fewer pictures");

  const auto run = [&](const char* name, const std::vector<fastv::Config>& schedule, const auto& on_text) {
    return generate(name, engine, words, shape, prompt, schedule, options, on_text);
  };
  const auto stream = [](const std::string& piece) {
    std::fputs(piece.c_str(), stdout);
    std::fflush(stdout);
  };
  std::vector<Run> runs;
  if (options.compare) {
    const auto silent = [](const std::string&) {};
    warm_up(engine, prompt);
    runs.push_back(run("all tokens", {}, silent));
    runs.push_back(run("FastV", options.schedule, silent));
    std::fputs(comparison(shape, runs[0], runs[1]).c_str(), stdout);
  } else {
    runs.push_back(run(options.schedule.empty() ? "all tokens" : "FastV", options.schedule, stream));
    std::puts("");
    std::fputs(summary(runs[0]).c_str(), stderr);
  }
  if (!options.overlay.empty())
    write_overlay(options.overlay, options.pictures, spans, runs.back().prefill.kept, padded);
  if (!options.json.empty()) write_json(options.json, options, shape, prompt, runs);
}

}  // namespace

int main(int count, char** arguments) {
  try {
    const llava::Options options = llava::read_options(count, arguments);
    if (options.help)
      std::fputs(llava::usage(), stdout);
    else
      answer(options);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fastv-llava: %s\n", error.what());
    return 2;
  }
}

// fastv-llava: answers a prompt about pictures with a GGUF model, with FastV. See --help.
#include <chrono>
#include <cstdio>
#include <iostream>

#include "../common/canvas.hpp"
#include "../common/progress.hpp"
#include "chat.hpp"
#include "prompt.hpp"
#include "report.hpp"
#include "sweep.hpp"

namespace {

using namespace llava;

struct SamplerDeleter {
  void operator()(llama_sampler* sampler) const { llama_sampler_free(sampler); }
};
using Sampler = std::unique_ptr<llama_sampler, SamplerDeleter>;

// Picks the next token: the likeliest, or by temperature.
Sampler sampler_of(const Options& options) {
  Sampler chain(llama_sampler_chain_init(llama_sampler_chain_default_params()));
  const auto add = [&](llama_sampler* sampler) { llama_sampler_chain_add(chain.get(), sampler); };
  if (options.temperature > 0) {
    if (options.top_k > 0) add(llama_sampler_init_top_k(options.top_k));
    add(llama_sampler_init_top_p(options.top_p, 1));
    add(llama_sampler_init_min_p(options.min_p, 1));
    add(llama_sampler_init_temp(static_cast<float>(options.temperature)));
    add(llama_sampler_init_dist(options.seed));
  } else {
    add(llama_sampler_init_greedy());
  }
  return chain;
}

template <class Work>
auto with_progress(const char* label, const Work& work) {
  common::Progress bar(label, 100);
  return work([&](double share) { bar.reach(share); });
}

// Prefill and decoding, behind what the engine holds. on_text: called with each piece of the answer as it comes.
template <class OnText>
Run generate(const std::string& name, Engine& engine, const Prompt& prompt, const fastv::Config* config,
             const Options& options, const OnText& on_text) {
  const llama_vocab* vocabulary = engine.halves().vocabulary();
  Run run;
  run.name = name;
  run.plan = engine.plan(prompt, config);
  run.prefill = with_progress("Reading the prompt (%)",
                              [&](const Progress& progress) { return engine.prefill(0, prompt, config, progress); });
  const Sampler sampler = sampler_of(options);
  const auto start = std::chrono::steady_clock::now();
  while (true) {
    const llama_token token = llama_sampler_sample(sampler.get(), engine.tail(), -1);
    run.tokens.push_back(token);
    if (llama_vocab_is_eog(vocabulary, token)) break;
    const std::string piece = text_of(vocabulary, token);
    run.text += piece;
    on_text(piece);
    if (run.tokens.size() == options.generate) break;
    engine.decode({{0, token}});
  }
  run.decode_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  run.cache_bytes = engine.cache_bytes(0);
  return run;
}

void stream(const std::string& piece) {
  std::fputs(piece.c_str(), stdout);
  std::fflush(stdout);
}

void expect_room(const Engine& engine, const Prompt& prompt, const Options& options) {
  const std::size_t tokens = engine.length(0, 0) + prompt.tokens();
  if (tokens + options.generate > engine.context())
    throw std::invalid_argument("the prompt has " + std::to_string(tokens) + " tokens and -n asks for " +
                                std::to_string(options.generate) + " more, but the context holds " +
                                std::to_string(engine.context()) + ": raise -c, lower -n, or use fewer pictures");
}

// Turn by turn: pictures that are shown belong to the next question, and each is pruned in its own turn.
void talk(Engine& engine, const Vision& vision, const fastv::Config* config, const Options& options) {
  Chat chat(engine.halves().head(), options.chat_template, options.jinja);
  std::vector<std::string> pictures;
  std::string line;
  std::fputs("/image FILE shows a picture, /bye ends.\n> ", stderr);
  while (std::getline(std::cin, line) && line != "/bye") {
    if (line.rfind("/image ", 0) == 0) {
      try {  // so that what is wrong with a picture is said when it is named, and the conversation goes on
        static_cast<void>(common::load_picture(line.substr(7)));
        pictures.push_back(line.substr(7));
      } catch (const std::runtime_error& error) {
        std::fprintf(stderr, "fastv-llava: %s\n", error.what());
      }
    } else if (!line.empty()) {
      const bool begins = chat.begins();
      const std::string words = chat.asks(with_markers(line, pictures.size()));
      const Prompt prompt = with_progress("Looking at the pictures (%)", [&](const Progress& progress) {
        return vision.prompt(words, pictures, engine.next_position(0), begins, progress);
      });
      expect_room(engine, prompt, options);
      const Run run = generate("", engine, prompt, pictures.empty() ? nullptr : config, options, stream);
      std::puts("");
      std::fputs(summary(run).c_str(), stderr);
      // The last token that -n allowed has been said, and not yet read.
      if (!llama_vocab_is_eog(engine.halves().vocabulary(), run.tokens.back())) engine.decode({{0, run.tokens.back()}});
      chat.answers(run.text);
      pictures.clear();
    }
    std::fputs("> ", stderr);
  }
}

// Sweeps, and says which setting to use.
void measure(const Options& options) {
  const std::vector<Question> questions = read_questions(options.sweep.questions);
  std::string task;
  std::optional<common::Progress> bar;
  const Sweep swept = sweep(options, questions, [&](const std::string& what, double share) {
    if (task != what) bar.emplace((task = what), 100);
    bar->reach(share);
  });
  bar.reset();
  std::fputs((table(swept) + weights(swept)).c_str(), stdout);
  for (const std::string& path : write_sweep(options.sweep.stem, swept)) std::printf("wrote %s\n", path.c_str());
  const bool known = swept.measured[0].accuracy >= 0;
  const Measured* best = cheapest(swept, options.sweep.max_kl, options.sweep.max_drop);
  if (best == nullptr) {
    std::printf("No setting stays within a mean KL of %g%s: keep more, prune later, or raise the limits.\n",
                options.sweep.max_kl,
                known ? (" and a drop of " + common::format("%g", options.sweep.max_drop)).c_str() : "");
    return;
  }
  std::printf("Cheapest within a mean KL of %g%s: --fastv-k %zu --fastv-r %g --fastv-score %s, %.1f%% of the FLOPs.\n",
              options.sweep.max_kl,
              known ? (" and a drop of " + common::format("%g", options.sweep.max_drop)).c_str() : "",
              best->config.filtering_layer, best->config.filtering_ratio, best->rule.c_str(), 100 * best->flops);
  if (!options.sweep.config.empty()) write_config(options.sweep.config, *best, swept);
}

void answer(const Options& options) {
  if (!options.sweep.questions.empty()) return measure(options);
  mtmd_log_set([](ggml_log_level, const char*, void*) {},
               nullptr);  // many lines; what goes wrong is said by exceptions
  const auto halves = with_progress("Loading the model (%)", [&](const Progress& progress) {
    return std::make_unique<Halves>(options.model, options.load, progress);
  });
  Engine engine(*halves, options.engine);
  fastv::Config fastv = options.fastv;
  fastv.filtering_layer = halves->filtering_layer();
  const fastv::Config* config = options.prune ? &fastv : nullptr;
  std::optional<Vision> vision;
  if (options.embeddings.empty())
    vision.emplace(options.vision, *halves, options.engine.threads, options.load.gpu_layers != 0);
  if (options.chat()) return talk(engine, *vision, config, options);

  Chat chat(halves->head(), options.chat_template, options.jinja);
  Prompt prompt;
  if (vision) {
    const std::string words = chat.asks(with_markers(options.prompt, options.pictures.size()));
    prompt = with_progress("Looking at the pictures (%)", [&](const Progress& progress) {
      return vision->prompt(words, options.pictures, 0, true, progress);
    });
  } else {
    const std::vector<std::vector<float>> pictures = visual_embeddings(options.embeddings, *halves);
    prompt =
        prompt_from_embeddings(*halves, chat.asks(with_markers(options.prompt, pictures.size())), pictures, 0, true);
  }
  expect_room(engine, prompt, options);

  std::vector<Run> runs;
  if (options.compare) {
    const auto silent = [](const std::string&) {};
    // So that the first of two runs is not the one that meets cold caches.
    Prompt warm;
    warm.add_text({llama_vocab_bos(halves->vocabulary()) < 0 ? 0 : llama_vocab_bos(halves->vocabulary())},
                  halves->position_axes());
    engine.prefill(0, warm, nullptr);
    for (const fastv::Config* how : {static_cast<const fastv::Config*>(nullptr), config}) {
      engine.forget(0);
      runs.push_back(generate(how == nullptr ? "all tokens" : "FastV", engine, prompt, how, options, silent));
    }
    std::fputs(comparison(*halves, runs[0], runs[1]).c_str(), stdout);
  } else {
    runs.push_back(generate(config == nullptr ? "all tokens" : "FastV", engine, prompt, config, options, stream));
    std::puts("");
    std::fputs(summary(runs[0]).c_str(), stderr);
  }
  if (!options.overlay.empty())
    write_overlay(options.overlay, options.pictures, prompt.visual(), runs.back().prefill.kept,
                  vision->pads_to_square(), vision->first_patch());
  if (!options.json.empty()) write_json(options.json, options, *halves, prompt, runs);
}

}  // namespace

int main(int count, char** arguments) {
  try {
    mtmd_log_set([](ggml_log_level, const char*, void*) {}, nullptr);  // many lines; exceptions say what goes wrong
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

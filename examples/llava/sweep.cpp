#include "sweep.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "chat.hpp"
#include "prompt.hpp"

namespace llava {

namespace {

constexpr std::size_t told = 32;  // tokens of the unpruned answer that both are told

llama_token likeliest(const float* logits, std::size_t count) {
  return static_cast<llama_token>(std::max_element(logits, logits + count) - logits);
}

std::string words(std::string text) {
  for (char& c : text)
    c = std::isspace(static_cast<unsigned char>(c)) ? ' '
                                                    : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  const auto first = text.find_first_not_of(' '), last = text.find_last_not_of(" .");
  return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

// The unpruned run of one question: its answer, the distribution of each of its first tokens, and the head's rows of
// them, which no pruning changes.
struct Whole {
  std::vector<llama_token> tokens;
  std::vector<std::vector<double>> logs;
  Steps steps;  // tokens fed
  std::string text;
  double seconds = 0;
};

class Runner {
 public:
  Runner(const Halves& halves, const Options& options)
      : halves_(halves), options_(options), engine_(halves, engine_options(halves, options)) {}

  Engine& engine() { return engine_; }

  Whole whole(const Reading& reading) {
    Whole whole;
    whole.seconds = reading.seconds + finish(reading, nullptr);
    while (true) {
      const float* logits = engine_.logits(0);
      if (whole.tokens.size() < told) whole.logs.push_back(log_softmax(logits, vocabulary()));
      const llama_token token = likeliest(logits, vocabulary());
      whole.tokens.push_back(token);
      if (ends(token) || whole.tokens.size() == options_.generate) break;
      whole.text += text_of(halves_.vocabulary(), token);
      const Steps& step = engine_.advance({{0, token}});
      if (whole.tokens.size() < told) whole.steps.append(step);
      engine_.conclude(0, step, 0, 1, engine_.next_position(0) - 1);
    }
    return whole;
  }

  // The tail alone, on what is kept: all of it where config is null.
  double finish(const Reading& reading, const fastv::Config* config) {
    const auto start = std::chrono::steady_clock::now();
    engine_.finish(0, reading, engine_.select(reading, config));
    llama_synchronize(engine_.tail());
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  // Decodes on from the logits at hand.
  std::string answer(llama_token token) {
    std::string text;
    for (std::size_t i = 0; !ends(token) && i < options_.generate; ++i) {
      text += text_of(halves_.vocabulary(), token);
      engine_.decode({{0, token}});
      token = likeliest(engine_.logits(0), vocabulary());
    }
    return text;
  }

  std::size_t vocabulary() const { return static_cast<std::size_t>(llama_vocab_n_tokens(halves_.vocabulary())); }
  bool ends(llama_token token) const { return llama_vocab_is_eog(halves_.vocabulary(), token); }

 private:
  // What the rules look at.
  static EngineOptions engine_options(const Halves& halves, const Options& options) {
    EngineOptions engine = options.engine;
    for (const std::string& rule : options.sweep.rules)
      engine.features |= rule_of(rule).config.selection == fastv::Selection::diverse;
    engine.by_head = options.sweep.calibrate != 0 && halves.has_head();
    return engine;
  }

  const Halves& halves_;
  const Options& options_;
  Engine engine_;
};

// Of one setting, before it is averaged.
struct Sums {
  std::vector<double> kl;
  double kl_first = 0, same_tokens = 0, tokens = 0, same_answers = 0, right = 0, known = 0;
  double flops = 0, seconds = 0, whole_seconds = 0, kv_bytes = 0, questions = 0;
};

Measured mean_of(const Sums& s, const fastv::Config& config, const std::string& rule) {
  Measured m;
  m.config = config;
  m.rule = rule;
  const double n = std::max(s.questions, 1.0);
  std::vector<double> kl = s.kl;
  std::sort(kl.begin(), kl.end());
  m.kl_first = s.kl_first / n;
  if (!kl.empty()) {
    m.kl_mean = std::accumulate(kl.begin(), kl.end(), 0.0) / static_cast<double>(kl.size());
    m.kl_99 =
        kl[std::min(kl.size() - 1, static_cast<std::size_t>(std::ceil(0.99 * static_cast<double>(kl.size()))) - 1)];
  }
  m.same_tokens = s.tokens > 0 ? s.same_tokens / s.tokens : 1;
  m.same_answers = s.same_answers / n;
  if (s.known > 0) m.accuracy = s.right / s.known;
  m.flops = s.flops / n;
  m.time = s.whole_seconds > 0 ? s.seconds / s.whole_seconds : 1;
  m.prefill_ms = 1e3 * s.seconds / n;
  m.kv_mib = s.kv_bytes / n / (1 << 20);
  return m;
}

}  // namespace

std::vector<Question> read_questions(const std::string& path) {
  std::ifstream in(path);
  if (!in) throw std::invalid_argument("cannot open the questions " + path);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  const std::size_t slash = path.find_last_of('/');
  const std::string folder = slash == std::string::npos ? "" : path.substr(0, slash + 1);
  std::vector<Question> questions;
  const auto add = [&](const nlohmann::json& json, const std::string& where) {
    const auto is_text = [&](const char* key) { return json.contains(key) && json[key].is_string(); };
    if (!json.is_object() || !is_text("picture") || !is_text("question"))
      throw std::invalid_argument(path + ", " + where +
                                  R"(: give {"picture": FILE, "question": TEXT} and, if it is known, "answer": TEXT)");
    const std::string picture = json["picture"];
    questions.push_back({picture.rfind('/', 0) == 0 ? picture : folder + picture, json["question"],
                         is_text("answer") ? json["answer"].get<std::string>() : ""});
  };
  if (const auto all = nlohmann::json::parse(text, nullptr, false); all.is_array()) {
    for (const auto& one : all) add(one, "question " + std::to_string(questions.size() + 1));
  } else {
    std::istringstream lines(text);
    std::size_t number = 0;
    for (std::string line; std::getline(lines, line);) {
      ++number;
      if (line.find_first_not_of(" \t\r") != std::string::npos)
        add(nlohmann::json::parse(line, nullptr, false), "line " + std::to_string(number));
    }
  }
  if (questions.empty()) throw std::invalid_argument(path + " has no questions: give one a line");
  return questions;
}

namespace {

// The prompts of all questions, without the rows of their pictures, which are in the album. The vision encoder goes when it
// has seen them all.
std::vector<Prompt> look(const Halves& halves, const Options& options, const std::vector<Question>& questions,
                         Album& album, const Progress& progress) {
  const Vision vision(options.vision, halves, options.engine.threads, options.load.gpu_layers != 0);
  const std::size_t context = options.engine.context != 0
                                  ? options.engine.context
                                  : static_cast<std::size_t>(llama_model_n_ctx_train(halves.head()));
  std::vector<Prompt> prompts;
  for (const Question& question : questions) {
    Chat chat(halves.head(), options.chat_template, options.jinja);
    prompts.push_back(
        vision.prompt(chat.asks(with_markers(question.text, 1)), {question.picture}, 0, true, {}, &album));
    if (const std::size_t tokens = prompts.back().tokens(); tokens + options.generate > context)
      throw std::invalid_argument(question.picture + " and its question are " + std::to_string(tokens) +
                                  " tokens, and -n asks for " + std::to_string(options.generate) +
                                  " more, but the context holds " + std::to_string(context) + ": raise -c");
    if (progress) progress(static_cast<double>(prompts.size()) / static_cast<double>(questions.size()));
  }
  return prompts;
}

// By the head of the highest K, which has all layers but the last; a few questions will do.
std::vector<double> attention_by_layer(const Options& options, const std::vector<Prompt>& prompts, const Album& album) {
  LoadOptions load = options.load;
  const Layers layers = layers_of(ModelFile(options.model));
  if (layers.filtering_layers.empty()) return {};
  load.filtering_layer = layers.filtering_layers.back();
  const Halves halves(options.model, load);
  EngineOptions with_every_layer = options.engine;
  with_every_layer.every_layer = true;
  Engine engine(halves, with_every_layer);
  std::vector<double> mean;
  const std::size_t count = std::min<std::size_t>(prompts.size(), 8);
  for (std::size_t q = 0; q < count; ++q) {
    engine.forget(0);
    const Reading reading = engine.read(0, album.complete(prompts[q]));
    mean.resize(reading.attention.size());
    for (std::size_t i = 0; i < mean.size(); ++i) mean[i] += reading.attention[i] / static_cast<double>(count);
  }
  return mean;
}

// The Ks to try, all of which can be.
std::vector<std::uint32_t> filtering_layers_of(const Options& options) {
  const Layers layers = layers_of(ModelFile(options.model));
  std::vector<std::uint32_t> ks = options.sweep.filtering_layers;
  for (const std::uint32_t k : ks) static_cast<void>(filtering_layer(layers, k));
  if (ks.empty() && layers.filtering_layers.empty()) ks.push_back(0);
  if (ks.empty())  // the smallest, and those a quarter and half of the way up
    for (const double share : {0.0, 0.25, 0.5}) {
      const auto wanted = std::max(2u, static_cast<std::uint32_t>(share * static_cast<double>(layers.all.size())));
      const auto& can = layers.filtering_layers;
      const auto found = std::lower_bound(can.begin(), can.end(), wanted);
      const std::uint32_t k = found == can.end() ? can.back() : *found;
      if (ks.empty() || ks.back() != k) ks.push_back(k);
    }
  const std::vector<std::string>& rules = options.sweep.rules;
  if (std::find(ks.begin(), ks.end(), 0u) != ks.end() && std::all_of(rules.begin(), rules.end(), [](const auto& rule) {
        return fastv::uses_scores(rule_of(rule).config);
      }))
    throw std::invalid_argument("at K = 0 no layer has run whose attention could rank tokens: add one of " +
                                rules_ahead() + " to --sweep-score, or leave K = 0 out");
  if (options.sweep.calibrate != 0 && std::all_of(ks.begin(), ks.end(), [](std::uint32_t k) { return k == 0; }))
    throw std::invalid_argument("--calibrate weighs the heads of layer K-1, but K = 0 alone is swept: add another");
  return ks;
}

}  // namespace

Sweep sweep(const Options& options, const std::vector<Question>& questions, const TaskProgress& progress) {
  const std::size_t weighing = options.sweep.calibrate;  // questions
  if (weighing >= questions.size())
    throw std::invalid_argument("--calibrate is " + std::to_string(weighing) + " but " + options.sweep.questions +
                                " has " + std::to_string(questions.size()) +
                                " questions, of which some must be left to judge by: use fewer");
  const auto tell = [&](const std::string& task) {
    return [&progress, task](double share) {
      if (progress) progress(task, share);
    };
  };
  const std::vector<std::uint32_t> ks = filtering_layers_of(options);
  struct Setting {
    fastv::Config config;
    const Rule* rule;
    Sums sums;
  };
  Sweep result;
  Sums unpruned;
  std::vector<Setting> all;
  Album album;
  std::vector<Prompt> prompts;  // of the questions
  std::size_t done = 0;
  const std::size_t total = ks.size() * (questions.size() - weighing);
  for (const std::uint32_t k : ks) {
    LoadOptions load = options.load;
    load.filtering_layer = k;
    const Halves halves(options.model, load);
    if (prompts.empty()) prompts = look(halves, options, questions, album, tell("Looking at the pictures (%)"));
    Runner runner(halves, options);
    Engine& engine = runner.engine();
    const std::size_t first = all.size();
    for (const double ratio : options.sweep.filtering_ratios)
      for (const std::string& name : options.sweep.rules) {
        const Rule& rule = rule_of(name);
        if (!halves.has_head() && fastv::uses_scores(rule.config)) continue;
        fastv::Config config = options.fastv;
        config.filtering_layer = halves.filtering_layer();
        config.filtering_ratio = ratio;
        config.keep_count = fastv::by_ratio;
        set_rule(config, rule);
        all.push_back({config, &rule, {}});
      }
    const bool last = k == ks.back();
    // So that the first question's unpruned run is not the one that meets cold caches.
    runner.finish(engine.read(0, album.complete(prompts.front())), nullptr);
    std::vector<float> weights;
    if (weighing != 0 && halves.has_head()) {
      fastv::Config config = options.fastv;
      config.filtering_layer = halves.filtering_layer();
      const std::vector<double>& ratios = options.sweep.filtering_ratios;
      config.filtering_ratio = *std::max_element(ratios.begin(), ratios.end());
      config.keep_count = fastv::by_ratio;
      set_rule(config, rule_of("last"));
      const Calibration calibration = calibrate(
          engine, config, weighing, [&](std::size_t q) { return album.complete(prompts[q]); },
          tell("Weighing the heads of layer " + std::to_string(halves.filtering_layer() - 1) + " (%)"));
      weights = calibration.weights;
      result.calibrations[halves.filtering_layer()] = calibration;
    }
    for (std::size_t q = weighing; q < questions.size(); ++q) {
      const Question& question = questions[q];
      const Prompt prompt = album.complete(prompts[q]);
      engine.forget(0);
      Reading reading = engine.read(0, prompt);
      const std::vector<float> alike = reading.scores;
      const Whole whole = runner.whole(reading);
      const fastv::ModelShape shape = halves.cost_shape();
      const double whole_flops = fastv::prefill_flops(shape, engine.plan(prompt, nullptr));
      const auto count = [&](Sums& s, const fastv::Plan& plan, double seconds) {
        ++s.questions;
        s.flops += fastv::prefill_flops(shape, plan) / whole_flops;
        s.whole_seconds += whole.seconds;
        s.seconds += seconds;
        s.kv_bytes += static_cast<double>(engine.cache_bytes(plan));
        s.known += question.answer.empty() ? 0 : 1;
      };
      if (last) {
        count(unpruned, engine.plan(prompt, nullptr), whole.seconds);
        unpruned.same_answers += 1;
        unpruned.right += !question.answer.empty() && words(whole.text) == words(question.answer) ? 1 : 0;
      }
      std::size_t fed = whole.tokens.size() - 1;  // tokens that the head has seen behind the prompt
      for (std::size_t i = first; i < all.size(); ++i) {
        Setting& setting = all[i];
        reading.scores = setting.rule->weighs_heads ? weighted_scores(reading, weights) : alike;
        engine.forget_tail(0);
        const double seconds = reading.seconds + runner.finish(reading, &setting.config);
        count(setting.sums, engine.plan(prompt, &setting.config), seconds);
        // The first token's logits, then those of the answer's tokens as the unpruned run gave them.
        bool same = true;
        const auto compare = [&](std::size_t at, const float* logits) {
          const double kl = divergence(whole.logs[at], logits);
          setting.sums.kl.push_back(kl);
          if (at == 0) setting.sums.kl_first += kl;
          const bool equal = likeliest(logits, runner.vocabulary()) == whole.tokens[at];
          setting.sums.same_tokens += equal ? 1 : 0;
          setting.sums.tokens += 1;
          same = same && equal;
        };
        compare(0, engine.logits(0));
        const llama_token first_token = likeliest(engine.logits(0), runner.vocabulary());
        for (std::size_t t = 1; t < whole.logs.size();) {
          const std::size_t some = std::min(engine.batch(), whole.logs.size() - t);
          engine.conclude(0, whole.steps, t - 1, some, reading.next_position + static_cast<llama_pos>(t) - 1);
          for (std::size_t row = 0; row < some; ++row) compare(t + row, engine.logits(row));
          t += some;
        }
        // What it answers on its own: the same, as far as both were told the same; else it is to be decoded.
        std::string text = whole.text;
        const bool longer = whole.tokens.size() > told;
        if ((!same && !question.answer.empty()) || (same && longer)) {
          engine.forget_tail(0);
          if (!engine.take_back(0, fed)) {  // a state cannot go back: the prompt is read again
            engine.forget(0);
            static_cast<void>(engine.read(0, prompt));
          }
          runner.finish(reading, &setting.config);
          const llama_pos before = engine.next_position(0);
          text = runner.answer(first_token);
          fed = static_cast<std::size_t>(engine.next_position(0) - before);
        }
        setting.sums.same_answers += same && text == whole.text ? 1 : 0;
        if (question.answer.empty()) continue;
        setting.sums.right += words(text) == words(question.answer) ? 1 : 0;
      }
      ++done;
      tell("Sweeping (%)")(static_cast<double>(done) / static_cast<double>(total));
    }
  }
  result.attention = attention_by_layer(options, prompts, album);
  Measured whole = mean_of(unpruned, fastv::Config{}, "all tokens");
  whole.config.filtering_ratio = 0;
  result.measured.push_back(whole);
  for (const Setting& setting : all)
    result.measured.push_back(mean_of(setting.sums, setting.config, setting.rule->name));
  return result;
}

}  // namespace llava

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

// A pruned run of it, held to the unpruned one.
struct Held {
  std::vector<double> kl;       // of the first token, and of those of the unpruned answer
  std::size_t same_tokens = 0;  // of them
  bool same_answer = false;
  std::string text;  // its own answer, where that was asked for
  double seconds = 0;
};

// One K.
class Runner {
 public:
  Runner(const Halves& halves, const Options& options)
      : halves_(halves), options_(options), engine_(halves, engine_options(halves, options)) {}

  Engine& engine() { return engine_; }
  const Halves& halves() const { return halves_; }

  // Begins a question.
  Reading read(const Prompt& prompt) {
    fed_ = 0;
    engine_.forget(0);
    return engine_.read(0, prompt);
  }

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
      ++fed_;
    }
    return whole;
  }

  // Behind whole(). with_text: its own answer is wanted too; the prompt is that of the reading.
  Held held(const Prompt& prompt, const Reading& reading, const Whole& whole, const fastv::Config& config,
            bool with_text) {
    Held held;
    engine_.forget_tail(0);
    held.seconds = reading.seconds + finish(reading, &config);
    const llama_token first = likeliest(engine_.logits(0), vocabulary());
    const auto compare = [&](const float* logits) {
      const std::size_t at = held.kl.size();
      held.kl.push_back(divergence(whole.logs[at], logits));
      if (likeliest(logits, vocabulary()) == whole.tokens[at]) ++held.same_tokens;
    };
    // The first token's logits, then those of the answer's tokens as the unpruned run gave them.
    compare(engine_.logits(0));
    for (std::size_t t = 1; t < whole.logs.size();) {
      const std::size_t some = std::min(engine_.batch(), whole.logs.size() - t);
      engine_.conclude(0, whole.steps, t - 1, some, reading.next_position + static_cast<llama_pos>(t) - 1);
      for (std::size_t row = 0; row < some; ++row) compare(engine_.logits(row));
      t += some;
    }
    // What it answers on its own: the same, as far as both were told the same; else it is to be decoded.
    const bool same = held.same_tokens == held.kl.size(), longer = whole.tokens.size() > told;
    held.text = whole.text;
    if ((!same && with_text) || (same && longer)) {
      engine_.forget_tail(0);
      if (!engine_.take_back(0, fed_)) static_cast<void>(read(prompt));  // a state cannot go back
      finish(reading, &config);
      held.text = answer(first);
    }
    held.same_answer = same && held.text == whole.text;
    return held;
  }

  // The tail alone, on what is kept: all of it where config is null. Returns the seconds.
  double finish(const Reading& reading, const fastv::Config* config) {
    const auto start = std::chrono::steady_clock::now();
    engine_.finish(0, reading, engine_.select(reading, config));
    llama_synchronize(engine_.tail());
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

 private:
  // Decodes on from a first token.
  std::string answer(llama_token token) {
    std::string text;
    fed_ = 0;
    for (std::size_t i = 0; !ends(token) && i < options_.generate; ++i) {
      text += text_of(halves_.vocabulary(), token);
      engine_.decode({{0, token}});
      ++fed_;
      token = likeliest(engine_.logits(0), vocabulary());
    }
    return text;
  }

  std::size_t vocabulary() const { return static_cast<std::size_t>(llama_vocab_n_tokens(halves_.vocabulary())); }
  bool ends(llama_token token) const { return llama_vocab_is_eog(halves_.vocabulary(), token); }

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
  std::size_t fed_ = 0;  // tokens that the head has seen behind the prompt
};

// One setting, and its sums over questions.
struct Setting {
  fastv::Config config;
  std::string name;
  bool weighs_heads = false;
  std::vector<double> kl = {};
  double kl_first = 0, same_tokens = 0, same_answers = 0, right = 0, known = 0;
  double flops = 0, seconds = 0, whole_seconds = 0, kv_bytes = 0, questions = 0;

  void add(const Held& held, const Whole& whole, const std::string& answer) {
    ++questions;
    if (!held.kl.empty()) kl_first += held.kl[0];
    kl.insert(kl.end(), held.kl.begin(), held.kl.end());
    same_tokens += static_cast<double>(held.same_tokens);
    same_answers += held.same_answer ? 1 : 0;
    seconds += held.seconds;
    whole_seconds += whole.seconds;
    if (answer.empty()) return;
    ++known;
    right += words(held.text) == words(answer) ? 1 : 0;
  }

  Measured mean() const {
    Measured m;
    m.config = config;
    m.rule = name;
    const double n = std::max(questions, 1.0);
    std::vector<double> sorted = kl;
    std::sort(sorted.begin(), sorted.end());
    m.kl_first = kl_first / n;
    if (const double tokens = static_cast<double>(sorted.size()); tokens > 0) {
      m.kl_mean = std::accumulate(sorted.begin(), sorted.end(), 0.0) / tokens;
      m.kl_99 = sorted[static_cast<std::size_t>(std::ceil(0.99 * tokens)) - 1];
      m.same_tokens = same_tokens / tokens;
    } else {
      m.same_tokens = 1;
    }
    m.same_answers = same_answers / n;
    if (known > 0) m.accuracy = right / known;
    m.flops = flops / n;
    m.time = whole_seconds > 0 ? seconds / whole_seconds : 1;
    m.prefill_ms = 1e3 * seconds / n;
    m.kv_mib = kv_bytes / n / (1 << 20);
    return m;
  }
};

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

class Sweeper {
 public:
  Sweeper(const Options& options, const std::vector<Question>& questions, const TaskProgress& progress)
      : options_(options),
        questions_(questions),
        progress_(progress),
        ks_(filtering_layers_of(options)),
        weighing_(options.sweep.calibrate) {
    unpruned_.name = "all tokens";
    unpruned_.config.filtering_ratio = 0;
  }

  Sweep run() {
    for (const std::uint32_t k : ks_) run(k);
    result_.attention = attention_by_layer(options_, prompts_, album_);
    result_.measured.push_back(unpruned_.mean());
    for (const Setting& setting : settings_) result_.measured.push_back(setting.mean());
    return std::move(result_);
  }

 private:
  Progress tell(const std::string& task) const {
    return [this, task](double share) {
      if (progress_) progress_(task, share);
    };
  }
  Prompt prompt(std::size_t question) const { return album_.complete(prompts_[question]); }

  fastv::Config config_of(const Halves& halves, double ratio, const Rule& rule) const {
    fastv::Config config = options_.fastv;
    config.filtering_layer = halves.filtering_layer();
    config.filtering_ratio = ratio;
    config.keep_count = fastv::by_ratio;
    set_rule(config, rule);
    return config;
  }

  void run(std::uint32_t k) {
    LoadOptions load = options_.load;
    load.filtering_layer = k;
    const Halves halves(options_.model, load);
    if (prompts_.empty()) prompts_ = look(halves, options_, questions_, album_, tell("Looking at the pictures (%)"));
    Runner runner(halves, options_);
    const std::size_t first = settings_.size();
    for (const double ratio : options_.sweep.filtering_ratios)
      for (const std::string& name : options_.sweep.rules) {
        const Rule& rule = rule_of(name);
        if (halves.has_head() || !fastv::uses_scores(rule.config))
          settings_.push_back({config_of(halves, ratio, rule), name, rule.weighs_heads});
      }
    // So that the first question's unpruned run is not the one that meets cold caches.
    runner.finish(runner.read(prompt(0)), nullptr);
    const std::vector<float> weights = weights_of(runner);
    for (std::size_t q = weighing_; q < questions_.size(); ++q) {
      ask(runner, q, first, weights);
      tell("Sweeping (%)")(static_cast<double>(++done_) /
                           static_cast<double>(ks_.size() * (questions_.size() - weighing_)));
    }
  }

  // Of the heads of layer K-1; empty where they are not weighed.
  std::vector<float> weights_of(Runner& runner) {
    const Halves& halves = runner.halves();
    if (weighing_ == 0 || !halves.has_head()) return {};
    const std::vector<double>& ratios = options_.sweep.filtering_ratios;
    Calibration& found = result_.calibrations[halves.filtering_layer()];
    found = calibrate(
        runner.engine(), config_of(halves, *std::max_element(ratios.begin(), ratios.end()), rule_of("last")), weighing_,
        [&](std::size_t q) { return prompt(q); },
        tell("Weighing the heads of layer " + std::to_string(halves.filtering_layer() - 1) + " (%)"));
    return found.weights;
  }

  // One question, by the settings from `first` on.
  void ask(Runner& runner, std::size_t q, std::size_t first, const std::vector<float>& weights) {
    const Engine& engine = runner.engine();
    const Prompt asked = prompt(q);
    const std::string& answer = questions_[q].answer;
    Reading reading = runner.read(asked);
    const std::vector<float> alike = reading.scores;
    const Whole whole = runner.whole(reading);
    const fastv::ModelShape shape = runner.halves().cost_shape();
    const double whole_flops = fastv::prefill_flops(shape, engine.plan(asked, nullptr));
    const auto cost = [&](Setting& setting, const fastv::Config* config) {
      const fastv::Plan plan = engine.plan(asked, config);
      setting.flops += fastv::prefill_flops(shape, plan) / whole_flops;
      setting.kv_bytes += static_cast<double>(engine.cache_bytes(plan));
    };
    if (done_ < questions_.size() - weighing_) {  // the first K
      unpruned_.add({{}, 0, true, whole.text, whole.seconds}, whole, answer);
      cost(unpruned_, nullptr);
    }
    for (std::size_t i = first; i < settings_.size(); ++i) {
      Setting& setting = settings_[i];
      reading.scores = setting.weighs_heads ? weighted_scores(reading, weights) : alike;
      setting.add(runner.held(asked, reading, whole, setting.config, !answer.empty()), whole, answer);
      cost(setting, &setting.config);
    }
  }

  const Options& options_;
  const std::vector<Question>& questions_;
  const TaskProgress& progress_;
  const std::vector<std::uint32_t> ks_;
  const std::size_t weighing_;  // questions, the first
  Album album_;
  std::vector<Prompt> prompts_;  // of the questions
  Setting unpruned_;
  std::vector<Setting> settings_;  // K by K
  std::size_t done_ = 0;           // questions, of all Ks
  Sweep result_;
};

}  // namespace

Sweep sweep(const Options& options, const std::vector<Question>& questions, const TaskProgress& progress) {
  if (options.sweep.calibrate >= questions.size())
    throw std::invalid_argument("--calibrate is " + std::to_string(options.sweep.calibrate) + " but " +
                                options.sweep.questions + " has " + std::to_string(questions.size()) +
                                " questions, of which some must be left to judge by: use fewer");
  return Sweeper(options, questions, progress).run();
}

}  // namespace llava

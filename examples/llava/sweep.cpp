#include "sweep.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "../common/line_chart.hpp"
#include "chat.hpp"
#include "report.hpp"

namespace llava {

namespace {

constexpr std::size_t told = 32;  // tokens of the unpruned answer that both are told

std::vector<double> log_softmax(const float* logits, std::size_t count) {
  const double most = static_cast<double>(*std::max_element(logits, logits + count));
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) sum += std::exp(static_cast<double>(logits[i]) - most);
  std::vector<double> logs(count);
  for (std::size_t i = 0; i < count; ++i) logs[i] = static_cast<double>(logits[i]) - most - std::log(sum);
  return logs;
}

// KL(p || q) in nats.
double divergence(const std::vector<double>& p, const float* logits) {
  const std::vector<double> q = log_softmax(logits, p.size());
  double sum = 0;
  for (std::size_t i = 0; i < p.size(); ++i)
    if (p[i] > -700) sum += std::exp(p[i]) * (p[i] - q[i]);
  return std::isfinite(sum) ? std::max(sum, 0.0) : std::numeric_limits<double>::infinity();
}

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
  Rows rows;  // [tokens fed, d]
  std::string text;
  double seconds = 0;
};

class Runner {
 public:
  Runner(const Halves& halves, const Options& options)
      : halves_(halves), options_(options), engine_(halves, options.engine) {}

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
      const Rows& rows = engine_.advance({{0, token}});
      if (whole.tokens.size() < told) whole.rows.append(rows);
      engine_.conclude(0, rows, 0, 1, engine_.next_position(0) - 1);
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

std::string percent(double share) { return common::format("%.1f%%", 100 * share); }

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
  load.filtering_layer = layers_of(ModelFile(options.model)).filtering_layers.back();
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

}  // namespace

Sweep sweep(const Options& options, const std::vector<Question>& questions, const TaskProgress& progress) {
  std::vector<std::optional<std::uint32_t>> ks;
  for (const std::uint32_t k : options.sweep.filtering_layers) ks.emplace_back(k);
  if (ks.empty()) {  // the smallest, and those a quarter and half of the way up
    const ModelFile file(options.model);
    const Layers layers = layers_of(file);
    for (const double share : {0.0, 0.25, 0.5}) {
      const auto wanted = std::max(2u, static_cast<std::uint32_t>(share * static_cast<double>(layers.all.size())));
      const auto& can = layers.filtering_layers;
      const auto found = std::lower_bound(can.begin(), can.end(), wanted);
      const std::uint32_t k = found == can.end() ? can.back() : *found;
      if (ks.empty() || *ks.back() != k) ks.emplace_back(k);
    }
  }
  struct Setting {
    fastv::Config config;
    std::string rule;
    Sums sums;
  };
  Sweep result;
  Sums unpruned;
  std::vector<Setting> all;
  Album album;
  std::vector<Prompt> prompts;  // of the questions
  std::size_t done = 0;
  const std::size_t total = ks.size() * questions.size();
  for (const auto& k : ks) {
    LoadOptions load = options.load;
    load.filtering_layer = k;
    const Halves halves(options.model, load);
    if (prompts.empty())
      prompts = look(halves, options, questions, album, [&](double share) {
        if (progress) progress("Looking at the pictures (%)", share);
      });
    Runner runner(halves, options);
    Engine& engine = runner.engine();
    const std::size_t first = all.size();
    for (const double ratio : options.sweep.filtering_ratios)
      for (const std::string& rule : options.sweep.rules) {
        fastv::Config config = options.fastv;
        config.filtering_layer = halves.filtering_layer();
        config.filtering_ratio = ratio;
        config.keep_count = fastv::by_ratio;
        set_rule(config, rule);
        all.push_back({config, rule, {}});
      }
    const bool last = k == ks.back();
    // So that the first question's unpruned run is not the one that meets cold caches.
    runner.finish(engine.read(0, album.complete(prompts.front())), nullptr);
    for (std::size_t q = 0; q < questions.size(); ++q) {
      const Question& question = questions[q];
      const Prompt prompt = album.complete(prompts[q]);
      engine.forget(0);
      const Reading reading = engine.read(0, prompt);
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
          engine.conclude(0, whole.rows, t - 1, some, reading.next_position + static_cast<llama_pos>(t) - 1);
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
      if (progress) progress("Sweeping (%)", static_cast<double>(done) / static_cast<double>(total));
    }
  }
  result.attention = attention_by_layer(options, prompts, album);
  Measured whole = mean_of(unpruned, fastv::Config{}, "all tokens");
  whole.config.filtering_ratio = 0;
  result.measured.push_back(whole);
  for (const Setting& setting : all) result.measured.push_back(mean_of(setting.sums, setting.config, setting.rule));
  return result;
}

const Measured* cheapest(const Sweep& sweep, double max_kl, double max_drop) {
  const Measured* best = nullptr;
  for (std::size_t i = 1; i < sweep.measured.size(); ++i) {
    const Measured& m = sweep.measured[i];
    const bool known = m.accuracy >= 0;
    if (!(m.kl_mean <= max_kl) || (known && sweep.measured[0].accuracy - m.accuracy > max_drop)) continue;
    if (best == nullptr || m.flops < best->flops || (m.flops == best->flops && m.kl_mean < best->kl_mean)) best = &m;
  }
  return best;
}

std::string table(const Sweep& sweep) {
  const bool known = sweep.measured[0].accuracy >= 0;
  char line[256];
  std::string text;
  std::snprintf(line, sizeof(line), "%3s %5s %-10s %9s %9s %9s %7s %8s %s%7s %7s %9s %9s\n", "K", "R", "rule",
                "KL first", "KL mean", "KL 99%", "tokens", "answers", known ? "  right " : "", "FLOPs", "time",
                "prefill", "KV MiB");
  text += line;
  for (std::size_t i = 0; i < sweep.measured.size(); ++i) {
    const Measured& m = sweep.measured[i];
    const std::string k = i == 0 ? "-" : std::to_string(m.config.filtering_layer);
    std::snprintf(line, sizeof(line), "%3s %4.0f%% %-10s %9.4f %9.4f %9.4f %7s %8s %s%7s %7s %6.1f ms %9.2f\n",
                  k.c_str(), 100 * m.config.filtering_ratio, m.rule.c_str(), m.kl_first, m.kl_mean, m.kl_99,
                  percent(m.same_tokens).c_str(), percent(m.same_answers).c_str(),
                  known ? common::format("%6.1f%% ", 100 * m.accuracy).c_str() : "", percent(m.flops).c_str(),
                  percent(m.time).c_str(), m.prefill_ms, m.kv_mib);
    text += line;
  }
  return text;
}

std::vector<std::string> write_sweep(const std::string& stem, const Sweep& sweep) {
  std::vector<std::string> written;
  const auto open = [&](const std::string& ending) {
    written.push_back(stem + ending);
    std::ofstream out(written.back());
    if (!out) throw std::runtime_error("cannot write " + written.back());
    return out;
  };
  std::ofstream csv = open(".csv");
  csv << "k,r,rule,kl_first,kl_mean,kl_99,same_tokens,same_answers,accuracy,flops,time,prefill_ms,kv_mib\n";
  nlohmann::json json;
  for (const Measured& m : sweep.measured) {
    csv << m.config.filtering_layer << ',' << m.config.filtering_ratio << ',' << m.rule << ',' << m.kl_first << ','
        << m.kl_mean << ',' << m.kl_99 << ',' << m.same_tokens << ',' << m.same_answers << ','
        << (m.accuracy < 0 ? "" : std::to_string(m.accuracy)) << ',' << m.flops << ',' << m.time << ',' << m.prefill_ms
        << ',' << m.kv_mib << '\n';
    json["settings"].push_back({{"k", m.config.filtering_layer},
                                {"r", m.config.filtering_ratio},
                                {"rule", m.rule},
                                {"kl_first", m.kl_first},
                                {"kl_mean", m.kl_mean},
                                {"kl_99", m.kl_99},
                                {"same_tokens", m.same_tokens},
                                {"same_answers", m.same_answers},
                                {"accuracy", m.accuracy < 0 ? nlohmann::json() : nlohmann::json(m.accuracy)},
                                {"flops", m.flops},
                                {"time", m.time},
                                {"prefill_ms", m.prefill_ms},
                                {"kv_mib", m.kv_mib}});
  }
  json["attention_on_the_picture"] = sweep.attention;
  open(".json") << json.dump(2) << '\n';

  // A panel for each K, over FLOPs above and over time below.
  common::LineChart chart;
  chart.title = "What pruning costs";
  chart.caption = "A line for each rule; its marks are the filtering ratios R.";
  chart.x = {"share of the unpruned prefill (%)"};
  std::vector<std::size_t> ks;
  double least = 1;
  for (std::size_t i = 1; i < sweep.measured.size(); ++i) {
    const std::size_t k = sweep.measured[i].config.filtering_layer;
    if (std::find(ks.begin(), ks.end(), k) == ks.end()) ks.push_back(k);
    least = std::min(least, sweep.measured[i].same_tokens);
  }
  chart.y = {"tokens as unpruned (%)", std::floor(10 * least) * 10, 100, least < 0.6 ? 20.0 : least < 0.9 ? 10.0 : 5.0};
  if (chart.y.low >= 100) chart.y.low = 90;
  chart.columns = ks.size();
  for (const bool by_time : {false, true})
    for (const std::size_t k : ks) {
      common::Panel panel{"K = " + std::to_string(k) + (by_time ? ", over time" : ", over FLOPs"), {}, {}};
      for (std::size_t i = 1; i < sweep.measured.size(); ++i) {
        const Measured& m = sweep.measured[i];
        if (m.config.filtering_layer != k) continue;
        auto series =
            std::find_if(panel.series.begin(), panel.series.end(), [&](const auto& s) { return s.name == m.rule; });
        if (series == panel.series.end()) series = panel.series.insert(series, {m.rule, {}, true});
        series->points.push_back({100 * (by_time ? m.time : m.flops), 100 * m.same_tokens});
      }
      chart.panels.push_back(std::move(panel));
    }
  written.push_back(stem + ".png");
  chart.write(written.back());

  if (!sweep.attention.empty()) {
    common::LineChart by_layer;
    by_layer.title = "Attention on the picture";
    by_layer.caption = "What the last prompt token pays, by layer. Prune where it has become low.";
    by_layer.x = {"layer", 0, static_cast<double>(std::max<std::size_t>(sweep.attention.size(), 2) - 1),
                  static_cast<double>((sweep.attention.size() + 7) / 8)};
    by_layer.y = {"of all attention (%)"};
    common::Series series{"of the last token", {}, true};
    for (std::size_t i = 0; i < sweep.attention.size(); ++i)
      if (!std::isnan(sweep.attention[i])) series.points.push_back({static_cast<double>(i), 100 * sweep.attention[i]});
    by_layer.panels.push_back({"", {series}, {}});
    written.push_back(stem + "-attention.png");
    by_layer.write(written.back());
  }
  return written;
}

void write_config(const std::string& path, const Measured& setting) {
  std::ofstream out(path);
  out << nlohmann::json{{"fastv-k", setting.config.filtering_layer},
                        {"fastv-r", setting.config.filtering_ratio},
                        {"fastv-score", setting.rule}}
             .dump(2)
      << '\n';
  if (!out) throw std::runtime_error("cannot write " + path);
}

void read_config(const std::string& path, Options& options) {
  std::ifstream in(path);
  if (!in) throw std::invalid_argument("cannot open the settings " + path);
  const auto json = nlohmann::json::parse(in, nullptr, false);
  const auto wrong = [&](const std::string& what) {
    return std::invalid_argument(path + ": " + what +
                                 ": as --sweep writes it, it has fastv-k, fastv-r and fastv-score");
  };
  if (!json.is_object()) throw wrong("it is no JSON object");
  for (const auto& [key, value] : json.items()) {
    if (key == "fastv-k" && value.is_number_unsigned())
      options.load.filtering_layer = value.get<std::uint32_t>();
    else if (key == "fastv-r" && value.is_number())
      options.fastv.filtering_ratio = value.get<double>();
    else if (key == "fastv-score" && value.is_string())
      set_rule(options.fastv, value.get<std::string>());
    else
      throw wrong("there is no setting \"" + key + "\" of that kind");
  }
}

}  // namespace llava

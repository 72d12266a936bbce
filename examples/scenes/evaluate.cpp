// evaluate MNIST_FOLDER [--scenes N] [--seed S] [--model FOLDER] [--chart FILE] : what pruning costs the scenes model.
//
// Draws N scenes that training never saw (digits from MNIST's test files), asks one question of each kind, and prints
// the accuracy (the whole answer right) without pruning and for every rule, K and R, with what each saves.
#include <cstdio>
#include <cstring>

#include "../common/line_chart.hpp"
#include "../common/progress.hpp"
#include "assistant.hpp"
#include "scene.hpp"

namespace {

using namespace scenes;

constexpr std::size_t kinds = kind_names.size();

struct Rule {
  const char* name;
  fastv::Selection selection = fastv::Selection::top_k;
  fastv::ScoreRows rows = fastv::ScoreRows::last;
  reference::EvidenceKind evidence = reference::EvidenceKind::query_key;
  bool prior_corrected = false;
  double uniform_share = 0;
  std::size_t window = 0;  // rows and columns
  bool plotted = false;
};

std::vector<Rule> all_rules() {
  using fastv::Selection;
  using reference::EvidenceKind;
  std::vector<Rule> rules(11);
  rules[0].name = "FastV (last row)";
  rules[1].name = "all rows";
  rules[1].rows = fastv::ScoreRows::all;
  rules[2].name = "random";
  rules[2].selection = Selection::random;
  rules[3].name = "uniform grid";
  rules[3].selection = Selection::uniform;
  for (std::size_t i = 0; i < 4; ++i) rules[i].plotted = true;
  rules[4].name = "RoPE-free";
  rules[4].evidence = EvidenceKind::rope_free;
  rules[5].name = "window top-k";
  rules[5].window = 4;
  rules[6].name = "score + grid";
  rules[6].uniform_share = 1.0 / 3;
  rules[7].name = "P log P/Q";
  rules[7].rows = fastv::ScoreRows::listed;
  rules[7].prior_corrected = true;
  rules[8].name = "text raters";
  rules[8].evidence = EvidenceKind::text_raters;
  rules[9].name = "value-weighted";
  rules[9].evidence = EvidenceKind::value_weighted;
  rules[10].name = "key length";
  rules[10].evidence = EvidenceKind::keys_only;
  return rules;
}
const std::vector<Rule> rules = all_rules();

struct Setting {
  std::size_t rule, layer;
  double ratio;

  // question, separator: prompt positions of the question's tokens and of the first of them, which has seen the picture
  // but next to nothing of the question. (This model has no separator behind the picture.)
  Pruning pruning(std::uint64_t seed, fastv::Span<const fastv::Index> question = {}) const {
    const Rule& r = rules[rule];
    fastv::Config config;
    config.filtering_layer = layer;
    config.filtering_ratio = ratio;
    config.selection = r.selection;
    config.score_rows = r.rows;
    config.seed = seed;
    config.uniform_share = r.uniform_share;
    config.window_rows = config.window_columns = r.window;
    if (r.rows == fastv::ScoreRows::listed) config.listed_rows = question;
    if (r.prior_corrected) config.prior_rows = {question.data(), 1};
    return {config, r.evidence};
  }
};

std::vector<fastv::Index> question_rows(const Prompt& prompt) {
  std::vector<fastv::Index> rows;
  for (std::size_t i = prompt.visual.first + prompt.visual.count; i < prompt.tokens(); ++i)
    rows.push_back(static_cast<fastv::Index>(i));
  return rows;
}

struct Tally {
  std::array<std::size_t, kinds> right{};
  std::array<std::size_t, 4> bands{};  // kept patches in each quarter of the picture, top to bottom
  double depth = 0;                    // sum of the kept patches' places, 0 at the top, 1 at the bottom

  void count_kept(const Answer& answer, std::size_t patches) {
    for (const fastv::Index patch : answer.kept) {
      ++bands[4 * patch / patches];
      depth += static_cast<double>(patch) / static_cast<double>(patches - 1);
    }
  }
  void add(const Tally& other) {
    for (std::size_t kind = 0; kind < kinds; ++kind) right[kind] += other.right[kind];
    for (std::size_t band = 0; band < bands.size(); ++band) bands[band] += other.bands[band];
    depth += other.depth;
  }
  double share(std::size_t kind, std::size_t asked) const {
    return 100.0 * static_cast<double>(right[kind]) / static_cast<double>(asked);
  }
  double mean(std::size_t asked) const {
    double sum = 0;
    for (std::size_t kind = 0; kind < kinds; ++kind) sum += share(kind, asked);
    return sum / static_cast<double>(kinds);
  }
};

struct Savings {
  double flops, kv, speed_up;  // shares of the unpruned prefill's; unpruned time over pruned time
};

struct Options {
  std::string mnist, model = FASTV_SCENES_FOLDER "/model", chart = "accuracy.svg";
  std::size_t scenes = 300;
  std::uint64_t seed = 20240706;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) throw std::invalid_argument(argument + " needs a value");
      return argv[++i];
    };
    if (argument == "--scenes")
      options.scenes = std::stoul(value());
    else if (argument == "--seed")
      options.seed = std::stoull(value());
    else if (argument == "--model")
      options.model = value();
    else if (argument == "--chart")
      options.chart = value();
    else if (argument.rfind("--", 0) == 0 || !options.mnist.empty())
      throw std::invalid_argument("unknown argument " + argument);
    else
      options.mnist = argument;
  }
  if (options.mnist.empty() || options.scenes == 0)
    throw std::invalid_argument("usage: evaluate MNIST_FOLDER [--scenes N] [--seed S] [--model FOLDER] [--chart FILE]");
  return options;
}

constexpr std::array<double, 3> ratios = {0.5, 0.75, 0.9};

std::vector<std::size_t> depths(std::size_t layers) {
  std::vector<std::size_t> k = {1, 2, 3, 4, layers / 2};
  k.erase(std::unique(k.begin(), k.end()), k.end());
  return k;
}

// By rule, then K, then R. The rules that are not plotted are compared at K = 2.
std::vector<Setting> all_settings(std::size_t layers) {
  std::vector<Setting> settings;
  for (std::size_t rule = 0; rule < rules.size(); ++rule)
    for (const std::size_t layer : rules[rule].plotted ? depths(layers) : std::vector<std::size_t>{2})
      for (const double ratio : ratios) settings.push_back({rule, layer, ratio});
  return settings;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Alternating runs on one prompt, so that the machine's moods hit both alike.
Savings measure(const Assistant& assistant, const Prompt& prompt, const Setting& setting) {
  const std::vector<fastv::Index> question = question_rows(prompt);
  const Pruning pruning = setting.pruning(0, question);
  const auto plan = assistant.plan(prompt, pruning.config);
  if (!plan) throw std::invalid_argument(plan.message().c_str());
  const fastv::Plan whole = assistant.whole_plan(prompt);
  const fastv::ModelShape& shape = assistant.shape();
  std::vector<double> speed_ups;
  for (int i = 0; i < 15; ++i) {
    const double unpruned = assistant.prefill_seconds(prompt);
    speed_ups.push_back(unpruned / assistant.prefill_seconds(prompt, pruning));
  }
  return {fastv::prefill_flops(shape, *plan) / fastv::prefill_flops(shape, whole),
          static_cast<double>(fastv::kv_bytes(shape, *plan, 4)) / static_cast<double>(fastv::kv_bytes(shape, whole, 4)),
          median(speed_ups)};
}

void print_row(const char* name, const std::string& k, const std::string& r, const Tally& tally, std::size_t asked,
               const Savings& savings) {
  std::printf("| %-16s | %2s | %3s |", name, k.c_str(), r.c_str());
  for (std::size_t kind = 0; kind < kinds; ++kind) std::printf(" %6.1f |", tally.share(kind, asked));
  std::printf(" %5.1f | %5.1f%% | %5.2fx | %5.1f%% |\n", tally.mean(asked), 100 * savings.flops, savings.speed_up,
              100 * savings.kv);
}

// Where in the picture the kept patches are: FastV's bias, if it has one here, shows as a mean below the middle.
void print_depths(const std::vector<Setting>& settings, const std::vector<Tally>& tallies) {
  std::printf(
      "\nKept patches by quarter of the picture, top to bottom, and their mean place (0%% top, 100%% bottom); K = 2, R "
      "= 75%%\n\n");
  std::printf("| rule             |  first | second |  third | fourth |  mean |\n|---|--:|--:|--:|--:|--:|\n");
  for (std::size_t i = 0; i < settings.size(); ++i) {
    if (settings[i].layer != 2 || settings[i].ratio != 0.75) continue;
    const Tally& tally = tallies[i];
    double total = 0;
    for (const std::size_t band : tally.bands) total += static_cast<double>(band);
    std::printf("| %-16s |", rules[settings[i].rule].name);
    for (const std::size_t band : tally.bands) std::printf(" %5.1f%% |", 100 * static_cast<double>(band) / total);
    std::printf(" %4.1f%% |\n", 100 * tally.depth / total);
  }
}

// One panel a K, one line a rule through its three R and the unpruned model at 100%.
void draw_chart(const Options& options, const std::vector<Setting>& settings, const std::vector<Tally>& tallies,
                const std::vector<Savings>& savings, std::size_t layers) {
  const double unpruned = tallies.back().mean(options.scenes);
  LineChart chart;
  chart.title = "What pruning costs, and what it saves";
  chart.caption = "Mean accuracy over the five kinds of question on " + std::to_string(options.scenes) +
                  " unseen scenes; on every line R = 90, 75, 50 and 0% from left to right.";
  chart.x = {"prefill FLOPs, % of unpruned", 0, 100, 20, "%g"};
  chart.y = {"mean accuracy, %", 0, 100, 20, "%g"};
  chart.level_name = "unpruned";
  chart.columns = 2;
  const std::size_t panels = depths(layers).size();
  for (std::size_t k = 0; k < panels; ++k) {
    Panel panel{"K = " + std::to_string(settings[k * ratios.size()].layer), {}, unpruned};
    for (std::size_t rule = 0; rule < rules.size(); ++rule) {
      if (!rules[rule].plotted) continue;
      Series series{rules[rule].name, {{100, unpruned}}};
      for (std::size_t r = 0; r < ratios.size(); ++r) {
        const std::size_t i = (rule * panels + k) * ratios.size() + r;
        series.points.push_back({100 * savings[i].flops, tallies[i].mean(options.scenes)});
      }
      panel.series.push_back(std::move(series));
    }
    chart.panels.push_back(std::move(panel));
  }
  chart.write(options.chart);
}

int run(const Options& options) {
  const Mnist mnist = read_mnist(options.mnist, "t10k");
  const DigitBox box(mnist);
  const Assistant assistant(options.model);
  const std::vector<Setting> settings = all_settings(assistant.shape().layers);
  Eigen::setNbThreads(1);  // the scenes are spread over the threads; one small prompt is fastest on one

  Random example_random(options.seed);
  const Scene example = draw_scene(max_digits, box, example_random);
  const Prompt example_prompt = assistant.prompt(assistant.look({picture_side, picture_side, example.pixels}),
                                                 ask(Kind::list, example, example_random).text);
  std::vector<Savings> savings;
  {
    Progress progress("Timing", settings.size());
    for (const Setting& setting : settings) {
      savings.push_back(measure(assistant, example_prompt, setting));
      progress.step();
    }
  }

  // The last tally is that of no pruning.
  std::vector<Tally> tallies(settings.size() + 1);
  {
    Progress progress("Asking", options.scenes);
    const auto scenes = static_cast<std::ptrdiff_t>(options.scenes);
#pragma omp parallel for schedule(dynamic)
    for (std::ptrdiff_t scene_number = 0; scene_number < scenes; ++scene_number) {
      const std::uint64_t scene_seed = Random(options.seed + static_cast<std::uint64_t>(scene_number)).next();
      Random random(scene_seed);
      const Scene scene = draw_scene(random.between(2, max_digits), box, random);
      const Matrix visual = assistant.look({picture_side, picture_side, scene.pixels});
      std::vector<Tally> right(tallies.size());
      for (std::size_t kind = 0; kind < kinds; ++kind) {
        const Question question = ask(static_cast<Kind>(kind), scene, random);
        const Prompt prompt = assistant.prompt(visual, question.text);
        const std::vector<fastv::Index> rows = question_rows(prompt);
        for (std::size_t i = 0; i < settings.size(); ++i) {
          const Answer answer = assistant.answer(prompt, settings[i].pruning(scene_seed, rows));
          right[i].right[kind] += answer.text == question.answer;
          right[i].count_kept(answer, assistant.visual_tokens());
        }
        right.back().right[kind] += assistant.answer(prompt).text == question.answer;
      }
#pragma omp critical
      for (std::size_t i = 0; i < tallies.size(); ++i) tallies[i].add(right[i]);
      progress.step();
    }
  }

  std::printf(
      "%zu scenes of 2 to %d digits, one question of each kind on each; %zu visual tokens, %zu layers; seed %llu\n\n",
      options.scenes, max_digits, assistant.visual_tokens(), assistant.shape().layers,
      static_cast<unsigned long long>(options.seed));
  std::printf(
      "| rule             |  K |   R | colour |  digit |  place |  count |   list |  mean |  FLOPs | prefill |    KV "
      "|\n");
  std::printf("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n");
  print_row("unpruned", "-", "-", tallies.back(), options.scenes, {1, 1, 1});
  for (std::size_t i = 0; i < settings.size(); ++i)
    print_row(rules[settings[i].rule].name, std::to_string(settings[i].layer),
              std::to_string(static_cast<int>(100 * settings[i].ratio + 0.5)) + "%", tallies[i], options.scenes,
              savings[i]);
  print_depths(settings, tallies);
  draw_chart(options, settings, tallies, savings, assistant.shape().layers);
  std::printf("\nThe chart is %s\n", options.chart.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "evaluate: %s\n", error.what());
    return 2;
  }
}

// evaluate MNIST_FOLDER [SCENES] [--sweep] [--seed S] [--model FOLDER] [--chart FILE] : what pruning costs the scenes
// model.
//
// Draws SCENES pictures that training never saw (digits from MNIST's test files), asks one question of each kind about
// each, and prints the accuracy without pruning and for every rule at K = 2; with --sweep five rules at other K too. An
// answer counts if every word of the right one is the likeliest behind those before it, which is when greedy decoding says
// just that. Ctrl-C ends it early, with the tables of the scenes that were asked about.
#include <atomic>
#include <csignal>
#include <cstdio>

#include "../common/command_line.hpp"
#include "../common/line_chart.hpp"
#include "../common/progress.hpp"
#include "reading.hpp"

namespace {

using namespace scenes;

constexpr std::size_t kinds = kind_names.size();
const std::vector<std::size_t> depths = {1, 2, 3, 4, 6};  // K
constexpr std::array<double, 4> ratios = {0.5, 0.75, 0.9, 0.95};
constexpr std::array<double, 2> compared_ratios = {0.75, 0.9};  // at which all rules are compared
constexpr std::size_t compared_depth = 2;                       // and K

// ---- all of them --------------------------------------------------------------------------------

// Right answers of one setting, [scenes, kinds], and where its kept patches lie.
struct Tally {
  std::vector<std::array<std::uint8_t, kinds>> right;
  std::array<double, 4> bands{};  // kept patches in each quarter of the picture, top to bottom
  double on_digits = 0;           // in cells that have a digit

  void count_kept(const std::vector<fastv::Index>& kept, const Scene& scene, std::size_t columns) {
    const std::size_t per_cell = columns / static_cast<std::size_t>(cell_columns);
    for (const fastv::Index patch : kept) {
      bands[4 * patch / (columns * columns)] += 1;
      const std::size_t cell =
          patch / columns / per_cell * static_cast<std::size_t>(cell_columns) + patch % columns / per_cell;
      if (scene.at(static_cast<int>(cell)) != nullptr) on_digits += 1;
    }
  }
};

// A value with half the width of its 95% interval.
struct Estimate {
  double value, spread;
};

// Percentile bootstrap over scenes of any function of them: statistic(scene numbers) -> value.
template <class Statistic>
Estimate estimate(std::size_t scenes, const Statistic& statistic) {
  constexpr std::size_t draws = 1000;
  std::vector<std::size_t> drawn(scenes);
  for (std::size_t i = 0; i < scenes; ++i) drawn[i] = i;
  const double value = statistic(drawn);
  Random random(1);
  std::vector<double> values;
  for (std::size_t draw = 0; draw < draws; ++draw) {
    for (std::size_t& scene : drawn) scene = random.next() % scenes;
    values.push_back(statistic(drawn));
  }
  std::sort(values.begin(), values.end());
  return {value, (values[draws * 39 / 40] - values[draws / 40]) / 2};
}

double percent_right(const Tally& tally, std::size_t kind, const std::vector<std::size_t>& scenes) {
  double right = 0;
  for (const std::size_t scene : scenes) right += tally.right[scene][kind];
  return 100 * right / static_cast<double>(scenes.size());
}
double percent_right(const Tally& tally, const std::vector<std::size_t>& scenes) {
  double sum = 0;
  for (std::size_t kind = 0; kind < kinds; ++kind) sum += percent_right(tally, kind, scenes);
  return sum / static_cast<double>(kinds);
}
std::vector<std::size_t> every_scene(const Tally& tally) {
  std::vector<std::size_t> all(tally.right.size());
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = i;
  return all;
}

struct Options {
  std::string mnist, model = FASTV_SCENES_FOLDER "/model", chart = "accuracy.svg";
  std::size_t scenes = 100;
  bool sweep = false;
  std::size_t seed = 20260705;
};

Options parse(int argc, char** argv) {
  using command_line::refuse;
  Options options;
  std::vector<std::string> places;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) refuse("a value is missing after " + argument);
      return argv[++i];
    };
    if (argument == "--seed")
      options.seed = command_line::whole_number(argument, value());
    else if (argument == "--model")
      options.model = value();
    else if (argument == "--sweep")
      options.sweep = true;
    else if (argument == "--chart")
      options.chart = value();
    else if (argument.rfind("--", 0) == 0)
      refuse("there is no option " + argument + "; there are --sweep, --seed, --model and --chart");
    else
      places.push_back(argument);
  }
  if (places.empty() || places.size() > 2)
    refuse("usage: evaluate MNIST_FOLDER [SCENES] [--sweep] [--seed S] [--model FOLDER] [--chart FILE]");
  options.mnist = places[0];
  if (places.size() == 2) options.scenes = command_line::whole_number("SCENES", places[1]);
  if (options.scenes == 0) refuse("SCENES is 0 but must be at least 1");
  return options;
}

// Settings and what they cost on one prompt.
class Settings {
 public:
  Settings(const Assistant& assistant, const Prompt& example, bool sweep)
      : assistant_(assistant), example_(example), depths_(sweep ? depths : std::vector<std::size_t>{compared_depth}) {
    for (const Rule& rule : swept_rules)
      for (const std::size_t k : depths_)
        for (const double ratio : ratios) add(rule, k, ratio);
    for (const Rule& rule : compared_rules)
      for (const double ratio : compared_ratios) add(rule, compared_depth, ratio);
    for (const double ratio : compared_ratios) {
      for (const Rule& rule : early_rules) add_at_equal_flops(rule, 0, ratio);
      for (const Rule& rule : {window_rule, max_min_rule, mmr_tenth_rule})
        for (const std::size_t k : {std::size_t{1}, std::size_t{3}}) add_at_equal_flops(rule, k, ratio);
    }
  }

  const std::vector<Setting>& all() const { return all_; }
  const std::vector<std::size_t>& depths_run() const { return depths_; }  // K
  double flops_share(const fastv::Plan& plan) const {
    return fastv::prefill_flops(assistant_.shape(), plan) /
           fastv::prefill_flops(assistant_.shape(), assistant_.whole_plan(example_));
  }
  double kv_share(const fastv::Plan& plan) const {
    return static_cast<double>(fastv::kv_bytes(assistant_.shape(), plan, 2)) /
           static_cast<double>(fastv::kv_bytes(assistant_.shape(), assistant_.whole_plan(example_), 2));
  }
  // The settings of one table line after the other.
  template <class Wanted>
  std::vector<std::size_t> where(const Wanted& wanted) const {
    std::vector<std::size_t> found;
    for (std::size_t i = 0; i < all_.size(); ++i)
      if (wanted(all_[i])) found.push_back(i);
    return found;
  }
  std::size_t find(const Rule& rule, std::size_t k, double ratio) const {
    return where([&](const Setting& s) {
             return s.rule.name == rule.name && s.layer == k && !(s.ratio < ratio) && !(s.ratio > ratio) &&
                    !s.equal_flops;
           })
        .at(0);
  }

 private:
  fastv::Plan plan(const fastv::Config& config) const {
    const auto plan = assistant_.plan(example_, config);
    if (!plan) throw std::invalid_argument(plan.message().c_str());
    return *plan;
  }
  fastv::Plan plan(const Rule& rule, std::size_t k, std::size_t keep) const {
    fastv::Config config = rule.config;
    config.filtering_layer = k;
    config.keep_count = keep;
    return plan(config);
  }
  void add(const Rule& rule, std::size_t k, double ratio) {
    fastv::Config config = rule.config;
    config.filtering_layer = k;
    config.filtering_ratio = ratio;
    const fastv::Plan lengths = plan(config);
    all_.push_back({rule, k, ratio, false, lengths.kept_visual(), lengths});
  }
  // As many tokens as cost no more than K = 2 and that R.
  void add_at_equal_flops(const Rule& rule, std::size_t k, double ratio) {
    fastv::Config reference;
    reference.filtering_layer = compared_depth;
    reference.filtering_ratio = ratio;
    const double limit = flops_share(plan(reference));
    std::size_t keep = assistant_.visual_tokens();
    while (keep > 0 && flops_share(plan(rule, k, keep)) > limit) --keep;
    if (keep > 0) all_.push_back({rule, k, ratio, true, keep, plan(rule, k, keep)});
  }

  const Assistant& assistant_;
  const Prompt& example_;
  std::vector<std::size_t> depths_;
  std::vector<Setting> all_;
};

// ---- the output ---------------------------------------------------------------------------------

std::string text_of(const Estimate& e, int digits = 1) {
  char text[48];
  std::snprintf(text, sizeof(text), "%.*f \xC2\xB1%.*f", digits, e.value, digits, e.spread);
  return text;
}
std::string text_of_ratio(double ratio) { return std::to_string(static_cast<int>(100 * ratio + 0.5)) + "%"; }

void print_accuracies(const Tally& tally) {
  const std::size_t scenes = tally.right.size();
  for (std::size_t kind = 0; kind < kinds; ++kind) {
    const auto of_kind = [&](const std::vector<std::size_t>& drawn) { return percent_right(tally, kind, drawn); };
    std::printf(" %s |", text_of(estimate(scenes, of_kind), 0).c_str());
  }
  const auto mean = [&](const std::vector<std::size_t>& drawn) { return percent_right(tally, drawn); };
  std::printf(" %s |", text_of(estimate(scenes, mean)).c_str());
}

// Every rule at one R of K = 2: at equal count, then at equal FLOPs. The last column is how much of what FastV loses it
// loses too, on the kind where that is most; the claim was that the best rule stays below one half.
void print_comparison(const Settings& settings, const std::vector<Tally>& tallies, double ratio) {
  const Tally& unpruned = tallies.back();
  const Tally& fastv_tally = tallies[settings.find(fastv_rule, compared_depth, ratio)];
  const std::vector<std::size_t> all = every_scene(unpruned);
  std::printf("\nEvery rule, K = %zu and R = %s, and what costs as much at another K:\n\n", compared_depth,
              text_of_ratio(ratio).c_str());
  std::printf("| rule | K | kept |");
  for (const char* kind : kind_names) std::printf(" %s |", kind);
  std::printf(" mean | over FastV | most of its loss |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n");
  std::printf("| unpruned | - | %zu |", settings.all()[0].plan.visual);
  print_accuracies(unpruned);
  std::printf(" | |\n");
  for (const bool equal_flops : {false, true}) {
    for (const std::size_t i : settings.where([&](const Setting& s) {
           return s.equal_flops == equal_flops && (equal_flops || s.layer == compared_depth) && !(s.ratio < ratio) &&
                  !(s.ratio > ratio);
         })) {
      const Setting& s = settings.all()[i];
      std::printf("| %s | %zu | %zu |", s.rule.name, s.layer, s.keep);
      print_accuracies(tallies[i]);
      const Estimate over = estimate(all.size(), [&](const std::vector<std::size_t>& drawn) {
        return percent_right(tallies[i], drawn) - percent_right(fastv_tally, drawn);
      });
      double most = 0;
      std::size_t where = 0;
      for (std::size_t kind = 0; kind < kinds; ++kind) {
        const double base = percent_right(unpruned, kind, all), lost = base - percent_right(tallies[i], kind, all),
                     lost_by_fastv = base - percent_right(fastv_tally, kind, all);
        const double share = lost <= 0 ? 0 : lost_by_fastv <= 0 ? 99 : lost / lost_by_fastv;
        if (share > most) most = share, where = kind;
      }
      std::printf(" %+.1f \xC2\xB1%.1f | %.2f (%s) |\n", over.value, over.spread, most, kind_names[where]);
    }
  }
}

void print_means(const Settings& settings, const std::vector<Tally>& tallies) {
  std::printf("\nMean over the kinds:\n\n| K | R | FLOPs | KV |");
  for (const Rule& rule : swept_rules) std::printf(" %s |", rule.name);
  std::printf("\n|--:|--:|--:|--:|");
  for (std::size_t i = 0; i < swept_rules.size(); ++i) std::printf("--:|");
  std::printf("\n");
  for (const std::size_t k : settings.depths_run())
    for (const double ratio : ratios) {
      const fastv::Plan& plan = settings.all()[settings.find(fastv_rule, k, ratio)].plan;
      std::printf("| %zu | %s | %.1f%% | %.1f%% |", k, text_of_ratio(ratio).c_str(), 100 * settings.flops_share(plan),
                  100 * settings.kv_share(plan));
      for (const Rule& rule : swept_rules) {
        const Tally& tally = tallies[settings.find(rule, k, ratio)];
        std::printf(" %s |", text_of(estimate(tally.right.size(), [&](const std::vector<std::size_t>& drawn) {
                               return percent_right(tally, drawn);
                             })).c_str());
      }
      std::printf("\n");
    }
}

void print_places(const Settings& settings, const std::vector<Tally>& tallies) {
  std::printf(
      "\nKept patches by quarter of the picture, top to bottom, and those in cells with a digit; K = 2, R = 90%%\n\n");
  std::printf("| rule | first | second | third | fourth | in cells with a digit |\n|---|--:|--:|--:|--:|--:|\n");
  for (const std::size_t i : settings.where([](const Setting& s) {
         return !s.equal_flops && s.layer == compared_depth && s.ratio > 0.89 && s.ratio < 0.91;
       })) {
    double total = 0;
    for (const double band : tallies[i].bands) total += band;
    std::printf("| %s |", settings.all()[i].rule.name);
    for (const double band : tallies[i].bands) std::printf(" %.0f%% |", 100 * band / total);
    std::printf(" %.0f%% |\n", 100 * tallies[i].on_digits / total);
  }
}

// Lines through R = 95, 90, 75, 50 and 0% at K = 2: the mean, and each kind.
void draw_chart(const Options& options, const Settings& settings, const std::vector<Tally>& tallies) {
  const Tally& unpruned = tallies.back();
  LineChart chart;
  chart.title = "What pruning costs, and what it saves";
  chart.caption = std::to_string(unpruned.right.size()) +
                  " unseen scenes; on every line R = 95, 90, 75, 50 and 0% from left to right.";
  chart.x = {"prefill FLOPs, % of unpruned", 0, 100, 20, "%g"};
  chart.y = {"whole answers right, %", 0, 100, 20, "%g"};
  chart.level_name = "unpruned";
  const auto panel = [&](const std::string& title, std::size_t k, const auto& accuracy) {
    Panel out{title, {}, accuracy(unpruned)};
    for (const Rule& rule : swept_rules) {
      Series series{rule.name, {{100, accuracy(unpruned)}}};
      for (const double ratio : ratios) {
        const std::size_t i = settings.find(rule, k, ratio);
        series.points.push_back({100 * settings.flops_share(settings.all()[i].plan), accuracy(tallies[i])});
      }
      out.series.push_back(std::move(series));
    }
    chart.panels.push_back(std::move(out));
  };
  panel("mean, K = 2", compared_depth, [&](const Tally& tally) { return percent_right(tally, every_scene(tally)); });
  for (std::size_t kind = 0; kind < kinds; ++kind)
    panel(kind_names[kind] + std::string(", K = 2"), compared_depth,
          [&](const Tally& tally) { return percent_right(tally, kind, every_scene(tally)); });
  chart.write(options.chart);
}

std::atomic<bool> interrupted = false;
static_assert(std::atomic<bool>::is_always_lock_free, "a signal handler may set it");

int run(const Options& options) {
  const Mnist mnist = read_mnist(options.mnist, "t10k");
  const DigitBox box(mnist);
  const Assistant assistant(options.model);
  Eigen::setNbThreads(1);  // the scenes are spread over the threads
  const Prompt example = assistant.prompt(Matrix::Zero(static_cast<Eigen::Index>(assistant.visual_tokens()),
                                                       static_cast<Eigen::Index>(assistant.shape().hidden)),
                                          "what is at row 1 column 1 ?");
  const Settings settings(assistant, example, options.sweep);

  // The last tally is that of no pruning.
  std::vector<Tally> tallies(settings.all().size() + 1);
  for (Tally& tally : tallies) tally.right.resize(options.scenes);
  std::vector<double> share(assistant.shape().layers);
  std::size_t asked = 0;  // scenes
  std::signal(SIGINT, [](int) { interrupted = true; });
  {
    Progress progress("Asking", options.scenes * kinds);
    const auto scenes = static_cast<std::ptrdiff_t>(options.scenes);
#pragma omp parallel for schedule(dynamic)
    for (std::ptrdiff_t number = 0; number < scenes; ++number) {
      if (interrupted) continue;  // scenes are begun in order, so that those asked about are the first ones
      const auto scene_number = static_cast<std::size_t>(number);
      const std::uint64_t scene_seed = Random(options.seed + scene_number).next();
      Random random(scene_seed);
      const Scene scene = draw_scene(random.between(1, max_digits), box, random);
      const Matrix visual = assistant.look({picture_side, picture_side, scene.pixels});
      for (std::size_t kind = 0; kind < kinds; ++kind) {
        Reading reading(assistant, visual, ask(static_cast<Kind>(kind), scene, random));
        std::vector<std::pair<std::vector<fastv::Index>, bool>> results;
        for (const Setting& setting : settings.all()) results.push_back(reading.pruned(setting, scene_seed));
#pragma omp critical
        {
          for (std::size_t i = 0; i < results.size(); ++i) {
            tallies[i].right[scene_number][kind] = results[i].second;
            tallies[i].count_kept(results[i].first, scene, assistant.columns());
          }
          tallies.back().right[scene_number][kind] = reading.right();
          for (std::size_t layer = 0; layer < share.size(); ++layer) share[layer] += reading.share()[layer] / kinds;
        }
        progress.step();
      }
#pragma omp critical
      ++asked;
    }
  }
  if (asked == 0) throw std::runtime_error("interrupted before the first scene was through: nothing was measured");
  for (Tally& tally : tallies) tally.right.resize(asked);

  std::printf(
      "%zu scenes of 1 to %d digits, one question of each kind on each; %zu visual tokens, %zu layers; seed %zu.\n",
      asked, max_digits, assistant.visual_tokens(), assistant.shape().layers, options.seed);
  std::printf("Whole answers right, in percent, with 95%% intervals by resampling scenes.\n\n");
  std::printf("The last prompt token's attention on the picture, layer by layer:");
  for (const double s : share) std::printf(" %.0f%%", 100 * s / static_cast<double>(asked));
  std::printf("\n");
  print_means(settings, tallies);
  for (const double ratio : compared_ratios) print_comparison(settings, tallies, ratio);
  print_places(settings, tallies);
  draw_chart(options, settings, tallies);
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

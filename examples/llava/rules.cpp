#include "rules.hpp"

#include <vector>

#include "../common/command_line.hpp"

namespace llava {

namespace {

using fastv::Blend;
using fastv::Novelty;

fastv::Config by_selection(fastv::Selection selection) {
  fastv::Config config;
  config.selection = selection;
  return config;
}
fastv::Config in_windows() {
  fastv::Config config;
  config.window_rows = config.window_columns = 6;
  return config;
}
fastv::Config on_a_grid() {
  fastv::Config config;
  config.uniform_share = 0.5;
  return config;
}
fastv::Config diverse(const fastv::Diversity& diversity) {
  fastv::Config config = by_selection(fastv::Selection::diverse);
  config.diversity = diversity;
  return config;
}

const std::vector<Rule>& rules() {
  static const std::vector<Rule> all = {
      {"last", false, {}},
      {"window", false, in_windows()},
      {"grid", false, on_a_grid()},
      {"mmr", false, diverse({Novelty::nearest, Blend::sum, 0.5})},
      {"scope", false, diverse({Novelty::coverage, Blend::product, 1})},
      {"random", false, by_selection(fastv::Selection::random)},
      {"uniform", false, by_selection(fastv::Selection::uniform)},
      {"max-min", false, diverse({Novelty::nearest, Blend::sum, 0})},
      {"coverage", false, diverse({Novelty::coverage, Blend::sum, 0})},
      {"heads", true, {}},
      {"heads-window", true, in_windows()},
  };
  return all;
}

}  // namespace

const Rule& rule_of(const std::string& name) {
  std::vector<std::pair<std::string, const Rule*>> choices;
  for (const Rule& rule : rules()) choices.emplace_back(rule.name, &rule);
  return *command_line::one_of<const Rule*>("--fastv-score", name, choices);
}

void set_rule(fastv::Config& config, const Rule& rule) {
  config.window_rows = rule.config.window_rows;
  config.window_columns = rule.config.window_columns;
  config.uniform_share = rule.config.uniform_share;
  config.selection = rule.config.selection;
  config.diversity = rule.config.diversity;
}

std::string rules_ahead() {
  std::string names;
  for (const Rule& rule : rules())
    if (!fastv::uses_scores(rule.config)) names += (names.empty() ? "" : ", ") + std::string(rule.name);
  return names;
}

}  // namespace llava

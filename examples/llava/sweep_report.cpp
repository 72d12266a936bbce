#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>

#include "../common/line_chart.hpp"
#include "sweep.hpp"

namespace llava {

namespace {

std::string percent(double share) { return common::format("%.1f%%", 100 * share); }

}  // namespace

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
  std::snprintf(line, sizeof(line), "%3s %5s %-12s %9s %9s %9s %7s %8s %s%7s %7s %9s %9s\n", "K", "R", "rule",
                "KL first", "KL mean", "KL 99%", "tokens", "answers", known ? "  right " : "", "FLOPs", "time",
                "prefill", "KV MiB");
  text += line;
  for (std::size_t i = 0; i < sweep.measured.size(); ++i) {
    const Measured& m = sweep.measured[i];
    const std::string k = i == 0 ? "-" : std::to_string(m.config.filtering_layer);
    std::snprintf(line, sizeof(line), "%3s %4.0f%% %-12s %9.4f %9.4f %9.4f %7s %8s %s%7s %7s %6.1f ms %9.2f\n",
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
  for (const auto& [k, found] : sweep.calibrations)
    json["head_weights"].push_back({{"k", k},
                                    {"weights", found.weights},
                                    {"kl_first", found.divergence},
                                    {"kl_first_without", found.without},
                                    {"questions", found.prompts},
                                    {"prefills", found.prefills}});
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

std::string weights(const Sweep& sweep) {
  std::string text;
  for (const auto& [k, found] : sweep.calibrations) {
    if (text.empty())
      text =
          "The first " + std::to_string(found.prompts) + " questions weighed the heads, the others are the table's.\n";
    std::vector<std::size_t> order(found.weights.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return found.weights[a] > found.weights[b]; });
    text += "K = " + std::to_string(k) + common::format(", KL first %.4f:", found.divergence);
    for (std::size_t i = 0; i < std::min<std::size_t>(order.size(), 3); ++i)
      text += (i == 0 ? " head " : ", head ") + std::to_string(order[i]) +
              common::format(" weighs %.3f", static_cast<double>(found.weights[order[i]])) +
              common::format(" (%.4f without it)", found.without[order[i]]);
    text += order.size() > 3 ? ", ...\n" : "\n";
  }
  return text;
}

void write_config(const std::string& path, const Measured& setting, const Sweep& sweep) {
  nlohmann::json json{{"fastv-k", setting.config.filtering_layer},
                      {"fastv-r", setting.config.filtering_ratio},
                      {"fastv-score", setting.rule}};
  const auto found = sweep.calibrations.find(setting.config.filtering_layer);
  if (found != sweep.calibrations.end()) json["head-weights"] = found->second.weights;
  std::ofstream out(path);
  out << json.dump(2) << '\n';
  if (!out) throw std::runtime_error("cannot write " + path);
}

void read_config(const std::string& path, Options& options) {
  std::ifstream in(path);
  if (!in) throw std::invalid_argument("cannot open the settings " + path);
  const auto json = nlohmann::json::parse(in, nullptr, false);
  const auto wrong = [&](const std::string& what) {
    return std::invalid_argument(path + ": " + what +
                                 ": as --sweep writes it, it has fastv-k, fastv-r, fastv-score and head-weights");
  };
  if (!json.is_object()) throw wrong("it is no JSON object");
  for (const auto& [key, value] : json.items()) {
    if (key == "fastv-k" && value.is_number_unsigned())
      options.load.filtering_layer = value.get<std::uint32_t>();
    else if (key == "fastv-r" && value.is_number())
      options.fastv.filtering_ratio = value.get<double>();
    else if (key == "fastv-score" && value.is_string())
      options.rule = value.get<std::string>();
    else if (key == "head-weights" && value.is_array() && !value.empty())
      for (const auto& weight : value) {
        if (!weight.is_number() || !(weight.get<double>() >= 0 && weight.get<double>() <= 1))
          throw wrong("a weight of a head is " + weight.dump() + ", but must be a number from 0 to 1");
        options.head_weights.push_back(weight.get<float>());
      }
    else
      throw wrong("there is no setting \"" + key + "\" of that kind");
  }
  if (!options.head_weights.empty() && !json.contains("fastv-k"))
    throw wrong("it has weights of heads, but no fastv-k that they are of");
  options.calibrated_at = options.load.filtering_layer.value_or(0);
}

}  // namespace llava

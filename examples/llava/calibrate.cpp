#include "calibrate.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

namespace llava {

std::vector<double> log_softmax(const float* logits, std::size_t count) {
  const double most = static_cast<double>(*std::max_element(logits, logits + count));
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) sum += std::exp(static_cast<double>(logits[i]) - most);
  std::vector<double> logs(count);
  for (std::size_t i = 0; i < count; ++i) logs[i] = static_cast<double>(logits[i]) - most - std::log(sum);
  return logs;
}

double divergence(const std::vector<double>& p, const float* logits) {
  const std::vector<double> q = log_softmax(logits, p.size());
  double sum = 0;
  for (std::size_t i = 0; i < p.size(); ++i)
    if (p[i] > -700) sum += std::exp(p[i]) * (p[i] - q[i]);
  return std::isfinite(sum) ? std::max(sum, 0.0) : std::numeric_limits<double>::infinity();
}

Calibration calibrate(Engine& engine, const fastv::Config& config, std::size_t prompts,
                      const std::function<Prompt(std::size_t)>& prompt, const Progress& progress) {
  const std::size_t heads = engine.halves().cost_shape().heads;
  const auto vocabulary = static_cast<std::size_t>(llama_vocab_n_tokens(engine.halves().vocabulary()));
  Calibration result;
  result.prompts = prompts;
  result.without.assign(heads, 0);
  for (std::size_t p = 0; p < prompts; ++p) {
    engine.forget(0);
    Reading reading = engine.read(0, prompt(p));
    engine.finish(0, reading, engine.select(reading, nullptr));
    const std::vector<double> unpruned = log_softmax(engine.logits(0), vocabulary);
    std::map<std::vector<fastv::Index>, double> known;  // by what is kept
    const auto divergence_by = [&](const std::vector<float>& weights) {
      reading.scores = weighted_scores(reading, weights);
      const auto [entry, fresh] = known.emplace(engine.select(reading, &config), 0);
      if (fresh) {
        engine.forget_tail(0);
        engine.finish(0, reading, entry->first);
        entry->second = divergence(unpruned, engine.logits(0));
        ++result.prefills;
      }
      return entry->second / static_cast<double>(prompts);
    };
    std::vector<float> weights(heads, 1.0f / static_cast<float>(heads));
    result.divergence += divergence_by(weights);
    for (std::size_t h = 0; h < heads; ++h) {
      const float alike = std::exchange(weights[h], 0.0f);
      result.without[h] += divergence_by(weights);
      weights[h] = alike;
    }
    if (progress) progress(static_cast<double>(p + 1) / static_cast<double>(prompts));
  }
  std::vector<double> missed;
  for (const double without : result.without) missed.push_back(std::max(0.0, without - result.divergence));
  const double sum = std::accumulate(missed.begin(), missed.end(), 0.0);
  const bool any = sum > 0 && std::isfinite(sum);
  for (const double m : missed)
    result.weights.push_back(any ? static_cast<float>(m / sum) : 1.0f / static_cast<float>(heads));
  return result;
}

}  // namespace llava

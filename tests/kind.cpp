// Scores by the instructions that this file is compiled for. kinds_test.cpp links it several times, as KIND.
#include "kind.hpp"

#include "fastv/score.hpp"

namespace KIND {

template <class K>
static std::vector<float> scores(const Problem& problem, const std::vector<K>& key) {
  const auto evidence = fastv::query_key(problem.query.data(), problem.heads, 1, key.data(), problem.kv_heads,
                                         problem.keys, problem.dim, problem.scale, problem.layout);
  const fastv::TokenSpan visual{1, problem.keys - 2};
  std::vector<float> scores(visual.count), scratch(fastv::score_scratch(evidence));
  if (!fastv::score(fastv::Config(), evidence, fastv::Span<const fastv::TokenSpan>(&visual, 1),
                    fastv::Span<float>(scores), fastv::Span<float>(scratch)))
    scores.clear();
  return scores;
}

std::vector<float> of_floats(const Problem& problem, const std::vector<float>& key) { return scores(problem, key); }
std::vector<float> of_halves(const Problem& problem, const std::vector<fastv::half>& key) {
  return scores(problem, key);
}
std::vector<float> of_bfloats(const Problem& problem, const std::vector<fastv::bfloat16>& key) {
  return scores(problem, key);
}

}  // namespace KIND

// Scores by the instructions that this file is compiled for. kinds_test.cpp links it several times, as KIND.
#include "kind.hpp"

#include "fastv/fastv.hpp"

namespace KIND {

template <class K>
static auto evidence_of(const Problem& problem, const std::vector<K>& key) {
  using namespace fastv;
  return query_key(heads(problem.query.data(), TokenMajor{1, problem.heads, problem.dim}),
                   problem.token_major ? heads(key.data(), TokenMajor{problem.keys, problem.kv_heads, problem.dim})
                                       : heads(key.data(), HeadMajor{problem.kv_heads, problem.keys, problem.dim}),
                   problem.scale);
}

template <class K>
static std::vector<float> scores(const Problem& problem, const std::vector<K>& key) {
  const auto evidence = evidence_of(problem, key);
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

std::vector<std::uint32_t> all_halves() {
  std::vector<std::uint32_t> bits;
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const float value = fastv::to_float(fastv::half{static_cast<std::uint16_t>(i)});
    std::uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    bits.push_back(word);
  }
  return bits;
}

// What a Pruner keeps, then what a BatchPruner does.
std::vector<std::uint32_t> kept_by_pruners(const Problem& problem, const std::vector<float>& key) {
  const auto evidence = evidence_of(problem, key);
  const fastv::TokenSpan visual[] = {{1, problem.keys - 2}};
  fastv::Pruner<> pruner;
  const fastv::Kept kept = pruner.prune(evidence, visual);
  std::vector<std::uint32_t> all(kept.begin(), kept.end());
  fastv::BatchPruner<> batch_pruner;
  const fastv::Request requests[] = {{{}, visual, 0, problem.keys}};
  const fastv::KeptBatch batch = batch_pruner.prune(requests, [&](std::size_t) { return evidence; });
  all.insert(all.end(), batch.indices.begin(), batch.indices.end());
  return all;
}

}  // namespace KIND

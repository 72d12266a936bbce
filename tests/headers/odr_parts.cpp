// Two callers of the same kernels, in two objects built for different machines (check.sh odr): each must get the
// kernels of its own build whole. Half-precision queries lie in an order that depends on the vector width, so a
// loader taken from one object and a product from the other give wrong scores, silently. What they hand each other is
// plain data: settings, spans, what is kept.
#include <fastv/fastv.hpp>

// A pruner of the other object: what it keeps, and the scores it ranked by.
fastv::Kept part_prune(const fastv::Config& config, const float* query, const fastv::half* keys,
                       fastv::Span<const fastv::TokenSpan> visual, fastv::Span<float> scores);

constexpr std::size_t dim = 64, n = 21;
constexpr fastv::TokenSpan visual[1] = {{0, n - 1}};

inline auto evidence_of(const float* query, const fastv::half* keys) {
  return fastv::query_key(fastv::heads(query, fastv::TokenMajor{1, 1, dim}),
                          fastv::heads(keys, fastv::TokenMajor{n, 1, dim}), 0.1f);
}

#if FASTV_PART == 1
fastv::Kept part_prune(const fastv::Config& config, const float* query, const fastv::half* keys,
                       fastv::Span<const fastv::TokenSpan> spans, fastv::Span<float> scores) {
  static fastv::Pruner<float> pruner;
  pruner.set_config(config);
  const fastv::Kept kept = pruner.prune(evidence_of(query, keys), spans);
  for (std::size_t i = 0; i < pruner.scores().size(); ++i) scores[i] = pruner.scores()[i];
  return kept;
}
#else
#include <cmath>
#include <cstdio>

int main() {
  static float query[dim], scratch[4096];
  static fastv::half keys[n * dim];
  for (std::size_t i = 0; i < dim; ++i) query[i] = static_cast<float>(i % 7) - 3;
  for (std::size_t i = 0; i < n * dim; ++i) keys[i].bits = static_cast<std::uint16_t>(0x3800 + i * 37 % 1024);
  double e[n], sum = 0;
  for (std::size_t j = 0; j < n; ++j) {
    double logit = 0;
    for (std::size_t d = 0; d < dim; ++d)
      logit += static_cast<double>(query[d]) * static_cast<double>(fastv::to_float(keys[j * dim + d])) * 0.1;
    sum += e[j] = std::exp(logit);
  }
  fastv::Config config;
  config.filtering_ratio = 0.75;
  fastv::Pruner<float> pruner(config);
  const fastv::Kept here = pruner.prune(evidence_of(query, keys), visual);
  float scores[n - 1], numerators[n - 1];
  const fastv::Kept there = part_prune(config, query, keys, visual, scores);
  if (!here || !there || here.size() != 6 || there.size() != 6) return std::puts("pruning failed"), 1;
  fastv::SoftmaxPart part[1];
  if (!fastv::score_shard(evidence_of(query, keys), visual, part, numerators, scratch)) return 1;
  for (std::size_t i = 0; i + 1 < n; ++i) {
    const double shard = static_cast<double>(numerators[i] / part[0].sum);
    for (const double score : {static_cast<double>(scores[i]), static_cast<double>(pruner.scores()[i]), shard}) {
      if (std::fabs(score - e[i] / sum) < 1e-5) continue;
      std::printf("token %zu scores %g, %g and %g, not %g\n", i, static_cast<double>(scores[i]),
                  static_cast<double>(pruner.scores()[i]), shard, e[i] / sum);
      return 1;
    }
  }
  // The same tokens, also as the rows of a tensor that this object moves.
  int ids[n];
  for (std::size_t i = 0; i < n; ++i) ids[i] = static_cast<int>(i);
  if (!fastv::compact(there, ids)) return 1;
  for (std::size_t i = 0; i < here.size(); ++i)
    if (there.indices[i] != here.indices[i] || ids[i] != static_cast<int>(here.indices[i]))
      return std::puts("the objects keep different tokens"), 1;
}
#endif

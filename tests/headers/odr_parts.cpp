// Two callers of the same kernels, in two objects built for different machines (check.sh odr): each must get the
// kernels of its own build whole. Half-precision queries lie in an order that depends on the vector width, so a
// loader taken from one object and a product from the other give wrong scores, silently.
#include <fastv/fastv.hpp>

bool part_score(const float* query, const fastv::half* keys, fastv::Span<float> scratch, fastv::Span<float> scores);

constexpr std::size_t dim = 64, n = 21;
constexpr fastv::TokenSpan visual[1] = {{0, n - 1}};

#if FASTV_PART == 1
bool part_score(const float* query, const fastv::half* keys, fastv::Span<float> scratch, fastv::Span<float> scores) {
  const auto evidence = fastv::query_key(query, 1, 1, keys, 1, n, dim, 0.1f, fastv::KvLayout::token_major);
  return static_cast<bool>(fastv::score<float>(fastv::Config{}, evidence, visual, scores, scratch));
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
  float scores[n - 1], numerators[n - 1];
  fastv::SoftmaxPart part[1];
  const auto evidence = fastv::query_key(static_cast<const float*>(query), 1, 1, static_cast<const fastv::half*>(keys),
                                         1, n, dim, 0.1f, fastv::KvLayout::token_major);
  if (!part_score(query, keys, scratch, scores) || !fastv::score_shard(evidence, visual, part, numerators, scratch))
    return 1;
  for (std::size_t i = 0; i + 1 < n; ++i) {
    const double there = static_cast<double>(scores[i]), here = static_cast<double>(numerators[i] / part[0].sum);
    if (std::fabs(there - e[i] / sum) < 1e-5 && std::fabs(here - e[i] / sum) < 1e-5) continue;
    std::printf("token %zu scores %g in the other object and %g in this one, not %g\n", i, there, here, e[i] / sum);
    return 1;
  }
}
#endif

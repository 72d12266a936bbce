// One program of translation units built for different machines: each must score as dense attention in double does,
// whichever of its inline functions the linker has kept.
#include <gtest/gtest.h>

#include "kind.hpp"
#include "oracle.hpp"

namespace {

using namespace fastv;

template <class K, class Scores>
void expect_dense_attention(const char* what, std::size_t heads, std::size_t kv_heads, std::size_t keys,
                            std::size_t dim, KvLayout layout, Scores scores) {
  oracle::Rng rng(heads * 1000 + keys + dim);
  oracle::Attention a{heads, kv_heads, 1, keys, dim, {}, {}, 0, 0, {}, true};
  a.scale = static_cast<double>(1 / std::sqrt(static_cast<float>(dim)));
  Problem problem{heads, kv_heads, keys, dim, layout, static_cast<float>(a.scale), {}};
  for (std::size_t i = 0; i < heads * dim; ++i) {
    problem.query.push_back(static_cast<float>(rng.real(-2, 2)));
    a.query.push_back(static_cast<double>(problem.query.back()));
  }
  std::vector<K> key(kv_heads * keys * dim);
  a.key.resize(key.size());  // [kv heads, keys, dim]
  for (std::size_t h = 0; h < kv_heads; ++h)
    for (std::size_t j = 0; j < keys; ++j)
      for (std::size_t d = 0; d < dim; ++d) {
        K& element = key[(layout == KvLayout::token_major ? j * kv_heads + h : h * keys + j) * dim + d];
        element = oracle::make<K>(rng.real(-2, 2));
        a.key[(h * keys + j) * dim + d] = oracle::value_of(element);
      }
  const auto expected =
      oracle::mean_scores(oracle::probabilities(a), heads, 1, keys, {static_cast<Index>(keys - 1)}, {{1, keys - 2}});
  const std::vector<float> got = scores(problem, key);
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i)
    ASSERT_NEAR(static_cast<double>(got[i]), expected[i], 1e-6)
        << what << ", " << heads << "/" << kv_heads << " heads of " << dim << ", layout " << static_cast<int>(layout)
        << ", visual token " << i;
}

// 61 keys: too few for whole blocks of tiles; 150: two such blocks and a rest.
#define EXPECT_DENSE_ATTENTION(kind)                                                                                \
  for (const auto& [heads, kv_heads] : {std::pair<std::size_t, std::size_t>{4, 4}, {3, 3}, {1, 1}, {6, 2}, {8, 1}}) \
    for (const std::size_t keys : {61u, 150u})                                                                      \
      for (const std::size_t dim : {40u, 64u, 128u})                                                                \
        for (const KvLayout layout : {KvLayout::token_major, KvLayout::head_major}) {                               \
          expect_dense_attention<float>(#kind, heads, kv_heads, keys, dim, layout, kind::of_floats);                \
          expect_dense_attention<half>(#kind, heads, kv_heads, keys, dim, layout, kind::of_halves);                 \
          expect_dense_attention<bfloat16>(#kind, heads, kv_heads, keys, dim, layout, kind::of_bfloats);            \
          if (HasFatalFailure()) return;                                                                            \
        }

TEST(Kinds, TheBaselineScoresAsDenseAttention){EXPECT_DENSE_ATTENTION(baseline)}
#if defined(FASTV_V3)
TEST(Kinds, AVX2ScoresAsDenseAttention){EXPECT_DENSE_ATTENTION(v3)}
#endif
#if defined(FASTV_NATIVE)
TEST(Kinds, ThisMachineScoresAsDenseAttention) {
  EXPECT_DENSE_ATTENTION(native)
}
#endif

}  // namespace

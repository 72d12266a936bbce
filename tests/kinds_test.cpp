// One program of translation units built for different machines: each must score as dense attention in double does,
// whichever of its inline functions the linker has kept.
#include <gtest/gtest.h>

#include "attention.hpp"
#include "flush.hpp"
#include "kind.hpp"

namespace {

using namespace fastv;
using oracle::Layer;
using oracle::Place;
using oracle::Rng;
using oracle::Stored;

struct Kind {
  const char* name;
  decltype(&baseline::of_floats) of_floats;
  decltype(&baseline::of_halves) of_halves;
  decltype(&baseline::of_bfloats) of_bfloats;
  decltype(&baseline::all_halves) all_halves;
  decltype(&baseline::kept_by_pruners) kept_by_pruners;
};
#define FASTV_KIND_OF(kind) \
  Kind { #kind, kind::of_floats, kind::of_halves, kind::of_bfloats, kind::all_halves, kind::kept_by_pruners }
const Kind kinds[] = {
    FASTV_KIND_OF(baseline),
#if defined(FASTV_AVX2)
    FASTV_KIND_OF(avx2),
#endif
#if defined(FASTV_V3)
    FASTV_KIND_OF(v3),
#endif
#if defined(FASTV_NATIVE)
    FASTV_KIND_OF(native),
#endif
};

class Kinds : public testing::TestWithParam<Kind> {};
INSTANTIATE_TEST_SUITE_P(Each, Kinds, testing::ValuesIn(kinds), [](const auto& each) { return each.param.name; });

template <class K>
std::vector<K> stored(Rng& rng, Layer& a, bool token_major) {
  Stored<K> key(rng, token_major ? Place::token_major : Place::head_major, a.kv_heads, a.keys, a.dim, a.key);
  return {key.data(), key.data() + a.key.size()};
}
Problem problem_of(Rng& rng, Layer& a, bool token_major) {
  Stored<float> query(rng, Place::token_major, a.heads, 1, a.dim, a.query);
  return {a.heads,
          a.kv_heads,
          a.keys,
          a.dim,
          token_major,
          static_cast<float>(a.scale),
          {query.data(), query.data() + a.query.size()}};
}
void expect_near(const std::vector<float>& got, const Layer& a) {
  const std::vector<double> expected = oracle::scores_by(a, {a.last_row()}, {{1, a.keys - 2}});
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i)
    ASSERT_NEAR(static_cast<double>(got[i]), expected[i], 2e-5 * expected[i]) << "visual token " << i;
}

// 61 keys: too few for whole blocks of tiles; 150: two such blocks and a rest.
TEST_P(Kinds, ScoreAsDenseAttention) {
  const Kind& kind = GetParam();
  Rng rng(1);
  for (const auto& [heads, kv_heads] : {std::pair<std::size_t, std::size_t>{4, 4}, {3, 3}, {1, 1}, {6, 2}, {8, 1}})
    for (const std::size_t keys : {61u, 150u})
      for (const std::size_t dim : {40u, 64u, 128u})
        for (const bool token_major : {true, false}) {
          SCOPED_TRACE(testing::Message() << heads << "/" << kv_heads << " heads of " << dim);
          Layer a = oracle::random_layer(rng, heads, kv_heads, 1, keys, dim);
          const Problem problem = problem_of(rng, a, token_major);
          const auto floats = stored<float>(rng, a, token_major);
          expect_near(kind.of_floats(problem, floats), a);
          const auto bfloats = stored<bfloat16>(rng, a, token_major);
          expect_near(kind.of_bfloats(problem, bfloats), a);
          const auto halves = stored<half>(rng, a, token_major);
          expect_near(kind.of_halves(problem, halves), a);
          if (HasFatalFailure()) return;
        }
}

TEST_P(Kinds, PruneAsTheOthersDo) {
  Rng rng(2);
  Layer a = oracle::random_layer(rng, 4, 2, 1, 150, 32);
  const Problem problem = problem_of(rng, a, true);
  const auto key = stored<float>(rng, a, true);
  const auto chosen = oracle::top(oracle::scores_by(a, {149}, {{1, 148}}), 74);
  std::vector<Index> expected = oracle::whole_prompt(150, {{1, 148}}, chosen);
  const std::vector<Index> once = expected;
  expected.insert(expected.end(), once.begin(), once.end());
  EXPECT_EQ(GetParam().kept_by_pruners(problem, key), expected);
}

#if FASTV_TEST_FLUSHES
// Threads that take denormals for zero: half precision is widened by other means there, unless the machine has one.
TEST_P(Kinds, WidenHalvesOnThreadsThatFlushDenormals) {
  const Kind& kind = GetParam();
  const std::vector<std::uint32_t> expected = kind.all_halves();
  std::vector<std::uint32_t> flushed;
  ASSERT_TRUE(on_a_flushing_thread([&] { flushed = kind.all_halves(); }));
  EXPECT_EQ(flushed, expected);
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const double exact = oracle::value_of(half{static_cast<std::uint16_t>(i)});
    if (exact == exact)
      ASSERT_EQ(expected[i], oracle::bits_of_float(static_cast<float>(exact))) << i;
    else
      ASSERT_GT(expected[i] & 0x7fffffffu, 0x7f800000u) << i;
  }
}

TEST_P(Kinds, ScoreDenormalHalvesOnThreadsThatFlushThem) {
  const Kind& kind = GetParam();
  Rng rng(3);
  for (const bool token_major : {true, false})
    for (const std::size_t dim : {7u, 40u, 64u}) {
      Layer a = oracle::random_layer(rng, 6, 2, 1, 150, dim);
      a.scale = 100;
      for (double& q : a.query) q *= 100;
      const Problem problem = problem_of(rng, a, token_major);
      auto key = stored<half>(rng, a, token_major);
      for (std::size_t h = 0; h < 2; ++h)
        for (std::size_t j = 0; j < 150; ++j)
          for (std::size_t d = 0; d < dim; ++d) {
            const half small{static_cast<std::uint16_t>(rng.next() & 0x81ff)};  // below 3.1e-5
            key[((token_major ? j * 2 + h : h * 150 + j)) * dim + d] = small;
            a.key[(h * 150 + j) * dim + d] = oracle::value_of(small);
          }
      std::vector<float> flushed;
      ASSERT_TRUE(on_a_flushing_thread([&] { flushed = kind.of_halves(problem, key); }));
      expect_near(flushed, a);
      expect_near(kind.of_halves(problem, key), a);
      if (HasFatalFailure()) FAIL() << "dim " << dim;
    }
}
#endif

}  // namespace

// Scores from keys alone on the device: the core's.
#include "batches.hpp"

namespace cuda_keys_test {
namespace {

using namespace batches;

constexpr std::size_t layers = 8;

template <class K>
void check_lengths(std::uint64_t seed, oracle::Place place) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  Rng rng(seed);
  Sequence s;
  random_prompt(rng, 3, 60, false, s);
  s.tokens = s.visual.back().first + s.visual.back().count;  // no text behind the images
  const std::size_t past = rng.below(9), kv_heads = 1 + seed % 3, dim = 8 * rng.between(1, 9);
  oracle::Layer layer = oracle::random_layer(rng, kv_heads, kv_heads, 1, past + s.tokens, dim);
  layer.past = past;
  const oracle::Tensors<half, K> tensors(rng, layer, place, 16, oracle::in_chunks(place) ? 16 / sizeof(K) : 0);
  Pruner<> core;
  const Kept expected = core.prune(fastv::KeysOnly{tensors.view.key, past}, s.visual);
  ASSERT_TRUE(expected) << expected.message().c_str();
  s.past = {past};
  cuda::Request request{Config{}, s.visual, 0, s.tokens};
  request.past = s.past;
  request.key_row = 0;
  cuda::Limits limits;
  limits.tokens = s.tokens;
  machine::Queue queue(rng);
  machine::Pruner pruner;
  ASSERT_TRUE(pruner.reserve(limits));
  ASSERT_TRUE(pruner.plan(Span<const cuda::Request>(&request, 1), layers, queue));
  const Status done = pruner.prune(0, cuda::KeysOnly<K>{on_device(tensors.view.key)}, queue);
  ASSERT_TRUE(done) << message(done);
  ASSERT_EQ(machine::faults(), std::set<std::string>{});
  const cuda::Kept kept = pruner.kept(0);
  ASSERT_EQ(kept.total, expected.size());
  std::vector<float> ours(kept.scores, kept.scores + core.scores().size());
  for (float& score : ours) score = -score;
  std::vector<float> lengths;
  for (const float score : core.scores()) lengths.push_back(-score);
  ASSERT_NO_FATAL_FAILURE(expect_near(ours.data(), lengths, false));
  // By the device's own scores.
  Pruner<> by_scores;
  const Kept exact =
      by_scores.prune(fastv::Scores<float>{Span<const float>(kept.scores, lengths.size()), s.tokens}, s.visual);
  EXPECT_EQ(numbers(kept.rows, kept.total, 0), std::vector<Index>(exact.begin(), exact.end()));
}
TEST(CudaKeysOnly, LengthsOfEveryLayout) {
  std::uint64_t seed = 200;
  for (const oracle::Place place : oracle::places) {
    check_lengths<half>(++seed, place);
    check_lengths<float>(++seed, place);
    check_lengths<fp8_e4m3>(++seed, place);
    check_lengths<std::int8_t>(++seed, place);
  }
}

TEST(CudaKeysOnly, AnInt8CacheHasItsScales) {
  Rng rng(78);
  const std::size_t n = 30, kv_heads = 2, dim = 7;
  std::vector<std::int8_t> keys(n * kv_heads * dim);
  std::vector<float> scales(n * kv_heads);
  for (std::int8_t& k : keys) k = static_cast<std::int8_t>(static_cast<int>(rng.below(200)) - 100);
  for (float& x : scales) x = static_cast<float>(rng.real(-2, 2));
  const std::vector<TokenSpan> visual{{1, n - 1}};
  cuda::Limits limits;
  limits.tokens = n;
  const cuda::Request request{Config{}, visual, 0, n};
  machine::Queue queue(rng);
  machine::Pruner pruner;
  ASSERT_TRUE(pruner.reserve(limits));
  ASSERT_TRUE(pruner.plan(Span<const cuda::Request>(&request, 1), layers, queue));
  cuda::KeysOnly<std::int8_t> evidence{cuda::heads(keys.data(), TokenMajor{n, kv_heads, dim})};
  evidence.key_scales = cuda::heads(scales.data(), TokenMajor{n, kv_heads, 1});
  ASSERT_TRUE(pruner.prune(0, evidence, queue));
  const cuda::Kept kept = pruner.kept(0);
  for (std::size_t t = 1; t < n; ++t) {
    double sum = 0;
    for (std::size_t h = 0; h < kv_heads; ++h) {
      double squares = 0;
      for (std::size_t d = 0; d < dim; ++d) {
        const double x =
            static_cast<double>(keys[(t * kv_heads + h) * dim + d]) * static_cast<double>(scales[t * kv_heads + h]);
        squares += x * x;
      }
      sum += std::sqrt(squares);
    }
    EXPECT_NEAR(kept.scores[t - 1], -sum / static_cast<double>(kv_heads), 1e-5 * sum);
  }
}

}  // namespace
}  // namespace cuda_keys_test

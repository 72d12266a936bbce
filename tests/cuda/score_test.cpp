// Scores on the device: from queries and keys of every layout and element type, with every term; from probabilities.
#include "batches.hpp"

namespace score_test {
namespace {

using namespace batches;
using oracle::Layer;
using oracle::Place;

// What a random layer has.
struct Shape {
  std::size_t heads, kv_heads, dim, keys, queries = 1;
  bool terms = true;  // soft-cap, bias, ...
};

Layer random_layer(Rng& rng, const Shape& shape, const std::vector<TokenSpan>& visual, std::size_t past) {
  Layer a = oracle::random_layer(rng, shape.heads, shape.kv_heads, shape.queries, shape.keys, shape.dim);
  a.past = past;
  const std::size_t kv = shape.kv_heads, heads = shape.heads;
  if (!shape.terms) return a;
  if (rng.chance(0.3)) a.soft_cap = rng.real(1, 30);
  if (rng.chance(0.3))
    for (std::size_t j = 0; j < a.keys; ++j) a.bias.push_back(rng.chance(0.2) ? -HUGE_VAL : rng.real(-2, 2));
  if (rng.chance(0.3))
    for (std::size_t h = 0; h < heads; ++h) a.sinks.push_back(rng.chance(0.2) ? -HUGE_VAL : rng.real(-3, 3));
  if (rng.chance(0.3))
    for (std::size_t h = 0; h < heads; ++h) a.alibi.push_back(rng.real(0, 0.1));
  if (rng.chance(0.3))
    for (std::size_t j = 0; j < kv * a.keys; ++j) a.key_scales.push_back(rng.real(0.5, 2));
  if (rng.chance(0.3))
    for (std::size_t j = 0; j < kv * visual_tokens(visual); ++j) a.value_norms.push_back(rng.real(0.5, 2));
  if (rng.chance(0.2)) a.causal = false;
  if (rng.chance(0.2)) a.window = rng.between(1, a.keys + 3);
  if (rng.chance(0.2))
    for (std::size_t r = 0; r < a.queries; ++r) a.visible.push_back(static_cast<Index>(rng.below(a.keys + 1)));
  if (rng.chance(0.1)) a.heads_total = heads;
  return a;
}

cuda::Limits limits_of(const Sequence& s, const Shape& shape) {
  cuda::Limits limits;
  limits.tokens = s.tokens;
  limits.keys = shape.keys;
  limits.heads = shape.heads;
  limits.spans = limits.groups = s.visual.size() + 1;
  limits.listed = 64;
  return limits;
}

// One sequence, beside the core's Pruner. Hostile: some values are NaN or infinite.
template <class Q, class K>
void check_layer(std::uint64_t seed, Shape shape, Place place, const Config& config, std::size_t rows_at_once = 1,
                 bool hostile = false) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  Rng rng(seed);
  Sequence s;
  random_prompt(rng, 3, shape.keys / 4 + 1, false, s);
  const std::size_t past = rng.chance(0.3) ? rng.between(1, 9) : 0;
  const std::size_t let_go = rng.chance(0.2) ? rng.below(past + s.tokens / 2) : 0;  // by a sliding window
  shape.keys = s.tokens + past - let_go;
  if (config.score_rows != ScoreRows::last || !config.prior_rows.empty()) shape.queries = s.tokens;
  Layer layer = random_layer(rng, shape, s.visual, past);
  layer.first_key = let_go;
  const std::size_t chunk = oracle::in_chunks(place) ? 16 / sizeof(K) : 0;
  oracle::Tensors<Q, K> tensors(rng, layer, place, 16, chunk);
  // What a hidden key holds must not matter.
  for (std::size_t j = 0; j < layer.bias.size(); ++j)
    for (std::size_t h = 0; h < shape.kv_heads && layer.bias[j] == -HUGE_VAL; ++h)
      if constexpr (sizeof(K) > 1) std::memset(static_cast<void*>(&tensors.key.at(h, j, 0)), 0xff, sizeof(K));
  if (hostile) {
    const std::size_t token = rng.below(shape.keys), head = rng.below(shape.kv_heads), d = rng.below(shape.dim);
    tensors.key.at(head, token, d) = oracle::make<K>(rng.chance(0.5) ? 1e30 : 0);
    if constexpr (sizeof(K) == 4)
      tensors.key.at(head, token, d) = rng.chance(0.5) ? oracle::nan_float() : oracle::infinity();
  }

  Pruner<> core(config);
  const Kept expected = core.prune(tensors.view, s.visual);

  machine::Queue queue(rng);
  machine::Pruner pruner;
  cuda::Limits limits = limits_of(s, shape);
  limits.rows = rows_at_once;
  ASSERT_TRUE(pruner.reserve(limits));
  s.past = {past};
  cuda::Request request{config, s.visual, 0, s.tokens};
  request.queries = shape.queries;
  request.past = s.past;
  request.key_row = 0;
  request.first_key = let_go;
  const Status planned = pruner.plan(Span<const cuda::Request>(&request, 1), 32, queue);
  ASSERT_TRUE(planned) << message(planned);
  for (int time = 0; time < 2; ++time) {  // a graph is replayed
    const Status done = pruner.prune(0, on_device(tensors.view), queue);
    ASSERT_TRUE(done) << message(done);
    ASSERT_EQ(machine::faults(), std::set<std::string>{});
    const cuda::Kept kept = pruner.kept(0);
    const std::size_t visual = visual_tokens(s.visual);
    if (!expected) {
      ASSERT_EQ(expected.code(), Errc::bad_value) << expected.message().c_str();
      // The core names an image whose scores are all 0; the device counts the zeros of all.
      EXPECT_TRUE(kept.counters[0].nan_scores == visual || kept.counters[0].zero_scores > 0 ||
                  kept.counters[0].uncorrected == 1)
          << expected.message().c_str();
      return;
    }
    ASSERT_NO_FATAL_FAILURE(expect_near(kept.scores, core.scores(), !config.prior_rows.empty()));
    EXPECT_EQ(kept.counters[0].nan_scores, expected.nan_scores);
    EXPECT_EQ(kept.counters[0].zero_scores, expected.zero_scores);
    // The same tokens as the core's, by the core's scores.
    EXPECT_EQ(std::vector<Index>(kept.rows, kept.rows + kept.total),
              std::vector<Index>(expected.begin(), expected.end()));
  }
}

TEST(CudaScore, LayoutsAndTypes) {
  std::uint64_t seed = 0;
  for (const Place place : oracle::places) {
    check_layer<half, half>(++seed, {4, 2, 64, 80}, place, {});
    check_layer<float, float>(++seed, {6, 1, 40, 150}, place, {});
    check_layer<bfloat16, bfloat16>(++seed, {3, 3, 128, 70}, place, {});
    check_layer<half, fp8_e4m3>(++seed, {4, 2, 32, 90}, place, {});
    check_layer<half, fp8_e5m2>(++seed, {4, 4, 64, 90}, place, {});
    check_layer<bfloat16, std::int8_t>(++seed, {8, 2, 48, 90}, place, {});
  }
  check_layer<fp8_e4m3, fp8_e4m3>(++seed, {4, 2, 32, 90}, Place::token_major, {});
  check_layer<fp8_e5m2, half>(++seed, {4, 2, 32, 90}, Place::token_major, {});
  check_layer<std::int8_t, half>(++seed, {4, 2, 32, 90}, Place::token_major, {});
}
// Strides are multiples of 16 bytes, the addresses in a table are not: the same scores, bit by bit.
TEST(CudaScore, BlocksAtAnyAddress) {
  constexpr std::size_t tokens = 40, block = 8, dim = 8;
  Rng rng(7);
  std::vector<float> query(dim), keys(tokens * dim), apart(5 * (block * dim + 1));
  for (float& value : query) value = static_cast<float>(rng.real(-1, 1));
  for (float& value : keys) value = static_cast<float>(rng.real(-1, 1));
  std::vector<const float*> blocks(tokens / block);
  for (std::size_t b = 0; b < tokens / block; ++b) {
    blocks[b] = apart.data() + b * (block * dim + 1);
    std::copy_n(keys.data() + b * block * dim, block * dim, apart.data() + b * (block * dim + 1));
  }
  const std::vector<TokenSpan> visual{{2, 30}};
  cuda::Request request{Config{}, visual, 0, tokens};
  request.queries = 1;
  cuda::Limits limits;
  limits.tokens = tokens;
  limits.heads = 1;
  machine::Queue queue(rng);
  const auto scores_of = [&](const cuda::Heads<float>& key) {
    machine::Pruner pruner;
    EXPECT_TRUE(pruner.reserve(limits));
    EXPECT_TRUE(pruner.plan(Span<const cuda::Request>(&request, 1), 32, queue));
    EXPECT_TRUE(pruner.prune(0, cuda::query_key(cuda::heads(query.data(), TokenMajor{1, 1, dim}), key, 0.5f), queue));
    return std::vector<float>(pruner.kept(0).scores, pruner.kept(0).scores + 30);
  };
  EXPECT_EQ(scores_of(cuda::heads(static_cast<const float* const*>(blocks.data()), TokenMajor{block, 1, dim},
                                  tokens / block)),
            scores_of(cuda::heads(keys.data(), TokenMajor{tokens, 1, dim})));
  EXPECT_EQ(machine::faults(), std::set<std::string>{});
}
TEST(CudaScore, ShapesOfHeads) {
  std::uint64_t seed = 100;
  for (const std::size_t dim : {1u, 2u, 7u, 8u, 20u, 96u, 129u, 256u, 576u})
    check_layer<half, half>(++seed, {2, 1, dim, 70}, Place::token_major, {});
  for (const std::size_t group : {1u, 2u, 7u, 8u, 9u, 12u, 33u})
    check_layer<half, half>(++seed, {2 * group, 2, 16, 130}, Place::head_major, {});
  check_layer<bfloat16, bfloat16>(++seed, {128, 1, 576, 70, 1, false}, Place::token_pages, {});  // MLA
}
TEST(CudaScore, Terms) {
  for (std::uint64_t seed = 200; seed < 260; ++seed)
    check_layer<float, float>(seed, {4, 2, 8, 200}, Place::token_major, {});
}
TEST(CudaScore, ListedAndPriorRows) {
  for (std::uint64_t seed = 300; seed < 330; ++seed) {
    Config config;
    const std::vector<Index> prior{1, 3}, listed{2, 5, 2, 4};
    if (seed % 3 != 0) config.prior_rows = prior;
    if (seed % 3 != 1) {
      config.score_rows = ScoreRows::listed;
      config.listed_rows = listed;
    }
    Shape shape{4, 2, 8, 60};
    shape.terms = seed % 2 == 0;
    check_layer<float, float>(seed, shape, Place::token_major, config, 1 + seed % 6);
  }
}
TEST(CudaScore, AllRows) {
  for (std::uint64_t seed = 400; seed < 412; ++seed) {
    Config config;
    config.score_rows = ScoreRows::all;
    check_layer<float, float>(seed, {4, 2, 8, 60}, Place::token_major, config, 1 + seed % 3 * 20);
  }
}
TEST(CudaScore, HostileValues) {
  for (std::uint64_t seed = 500; seed < 540; ++seed)
    check_layer<float, float>(seed, {4, 2, 8, 100}, Place::token_major, {}, 1, true);
}

// Where a sink takes nearly everything, scores are brought into range by one factor; by one launch and by several.
TEST(CudaScore, TinyScoresKeepTheirOrder) {
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    Rng rng(seed);
    Sequence s;
    random_prompt(rng, 2, 90, false, s);
    Config config;
    const std::vector<Index> listed{static_cast<Index>(s.tokens - 1), static_cast<Index>(s.tokens - 2), 0};
    if (seed % 2 != 0) {
      config.score_rows = ScoreRows::listed;
      config.listed_rows = listed;
    }
    Layer layer = oracle::random_layer(rng, 4, 2, s.tokens, s.tokens, 8);
    for (std::size_t h = 0; h < 4; ++h) layer.sinks.push_back(rng.real(60, seed % 3 == 0 ? 70 : 300));
    oracle::Tensors<float> tensors(rng, layer);
    QueryKey<float> plain = tensors.view;  // other data for the same plan: nothing of it may be left
    plain.sinks = {};
    Pruner<> core(config);
    const Kept expected = core.prune(tensors.view, s.visual);
    ASSERT_TRUE(expected) << expected.message().c_str();
    machine::Queue queue(rng);
    machine::Pruner pruner;
    cuda::Limits limits = limits_of(s, {4, 2, 8, s.tokens});
    limits.rows = 1 + seed % 4;
    ASSERT_TRUE(pruner.reserve(limits));
    const cuda::Request request{config, s.visual, 0, s.tokens};
    ASSERT_TRUE(pruner.plan(Span<const cuda::Request>(&request, 1), 32, queue));
    for (int time = 0; time < 2; ++time) {
      ASSERT_TRUE(pruner.prune(0, on_device(plain), queue));
      ASSERT_TRUE(pruner.prune(0, on_device(tensors.view), queue));
      ASSERT_EQ(machine::faults(), std::set<std::string>{});
      const cuda::Kept kept = pruner.kept(0);
      // The factor is the core's to the last bits of a logit, which an exponential multiplies.
      float ours = 0, theirs = 0;
      for (std::size_t i = 0; i < core.scores().size(); ++i) {
        ours = (std::max)(ours, kept.scores[i]);
        theirs = (std::max)(theirs, core.scores()[i]);
      }
      EXPECT_NEAR(ours, theirs, 1e-4f * theirs);
      for (std::size_t i = 0; i < core.scores().size(); ++i)
        ASSERT_NEAR(kept.scores[i] / ours, core.scores()[i] / theirs, 2e-5f) << "seed " << seed << ", score " << i;
      EXPECT_EQ(std::vector<Index>(kept.rows, kept.rows + kept.total),
                std::vector<Index>(expected.begin(), expected.end()));
    }
  }
}

}  // namespace
}  // namespace score_test

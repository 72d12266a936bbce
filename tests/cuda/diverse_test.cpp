// Selection::diverse on the device: the tokens of the core and of the slow rule, for every setting, from features of every
// layout.
#include "../slow_greedy.hpp"
#include "batches.hpp"

namespace diverse_test {
namespace {

using namespace batches;
using slow_greedy::Problem;

constexpr std::size_t layers = 8;

// A batch of problems of one width, as it lies in device memory.
struct DeviceBatch {
  std::vector<const Problem*> problems;
  std::vector<Config> configs;
  std::vector<std::vector<std::size_t>> past;
  std::vector<std::size_t> first;
  std::size_t rows = 0, visual = 0, width = 0;
  std::vector<float> scores, hidden, keys, of_visual;  // the same features, as FeaturesAt has them

  void add(Rng& rng, const Problem& problem, const Config& config, std::size_t earlier) {
    problems.push_back(&problem);
    configs.push_back(config);
    past.push_back({earlier});
    const std::size_t padding = rng.chance(0.3) ? rng.below(4) : 0;
    width = problem.width;
    hidden.resize(hidden.size() + padding * width, oracle::nan_float());
    first.push_back(rows + padding);
    rows += padding + problem.layout.tokens;
    keys.resize(keys.size() + earlier * width, oracle::nan_float());
    scores.insert(scores.end(), problem.floats.begin(), problem.floats.end());
    hidden.insert(hidden.end(), problem.features.begin(), problem.features.end());
    keys.insert(keys.end(), problem.features.begin(), problem.features.end());
    for_each_visual(problem.layout.visual, [&](std::size_t, std::size_t at) {
      const float* row = problem.features.data() + at * width;
      of_visual.insert(of_visual.end(), row, row + width);
    });
    visual += problem.layout.visual_tokens();
  }
  std::vector<cuda::Request> requests() const {
    std::vector<cuda::Request> all;
    std::size_t key_row = 0;
    for (std::size_t i = 0; i < problems.size(); ++i) {
      const oracle::Layout& layout = problems[i]->layout;
      all.push_back({configs[i], layout.visual, first[i], layout.tokens});
      all.back().past = past[i];
      all.back().key_row = key_row;
      key_row += past[i][0] + layout.tokens;
    }
    return all;
  }
  cuda::Limits limits() const {
    cuda::Limits limits;
    limits.sequences = problems.size();
    limits.tokens = rows;
    limits.features = width;
    limits.groups = 64 * problems.size();
    return limits;
  }
  cuda::Features<float> features(cuda::FeaturesAt at) const {
    const std::vector<float>& from = at == cuda::FeaturesAt::keys   ? keys
                                     : at == cuda::FeaturesAt::rows ? hidden
                                                                    : of_visual;
    return {cuda::heads(from.data(), TokenMajor{from.size() / width, 1, width}), at};
  }
};

// What a batch keeps, sequence by sequence, as positions in each prompt.
struct Outcome {
  Status status;
  std::vector<std::vector<Index>> kept;
  std::vector<std::size_t> nan_scores;
};
Outcome run(Rng& rng, const DeviceBatch& batch, cuda::FeaturesAt at) {
  machine::Queue queue(rng);
  machine::Pruner pruner;
  Outcome out;
  out.status = pruner.reserve(batch.limits());
  if (out.status) out.status = pruner.plan(batch.requests(), layers, queue);
  const std::size_t launches = machine::Queue::launches(), allocations = machine::Queue::allocations();
  if (out.status)
    out.status = pruner.prune(0, cuda::with_features(cuda::Scores{batch.scores.data()}, batch.features(at)), queue);
  if (!out.status) return out;
  EXPECT_LE(machine::Queue::launches() - launches, 4u) << "whatever is kept";
  EXPECT_EQ(machine::Queue::allocations(), allocations);
  EXPECT_EQ(machine::faults(), std::set<std::string>{});
  const cuda::Kept kept = pruner.kept(0);
  std::size_t total = 0;
  for (std::size_t i = 0; i < batch.problems.size(); ++i) {
    out.kept.push_back(numbers(kept.rows + total, pruner.kept_tokens(0, i), batch.first[i]));
    out.nan_scores.push_back(kept.counters[i].nan_scores);
    total += out.kept.back().size();
  }
  EXPECT_EQ(kept.total, total);
  return out;
}

TEST(CudaDiverse, EveryCompositionEqualsTheSlowRule) {
  Rng rng(71);
  std::size_t compared = 0, damaged = 0;
  for (int draw = 0; draw < 80; ++draw) {
    SCOPED_TRACE("draw " + std::to_string(draw));
    const std::size_t count = rng.between(1, 4), width = rng.between(20, 40);
    const bool grids = rng.chance(0.5);
    std::vector<Problem> problems;
    for (std::size_t i = 0; i < count; ++i) {
      const double damaged_share = rng.chance(0.3) ? (rng.chance(0.5) ? 0.15 : 0.5) : 0;
      problems.emplace_back(rng, grids, damaged_share, width);
    }
    DeviceBatch batch;
    for (const Problem& problem : problems) {
      Config config = slow_greedy::random_config(rng, problem, grids);
      if (rng.chance(0.2)) config.selection = rng.chance(0.5) ? Selection::top_k : Selection::uniform;
      batch.add(rng, problem, config, rng.below(4));
    }
    const Outcome out = run(rng, batch, static_cast<cuda::FeaturesAt>(draw % 3));
    ASSERT_TRUE(out.status) << message(out.status);
    for (std::size_t i = 0; i < count; ++i) {
      const Problem& problem = problems[i];
      const Config& config = batch.configs[i];
      Pruner<> core(config);
      const Kept expected = core.prune(problem.evidence(), problem.layout.visual);
      ASSERT_EQ(out.kept[i].size(), make_plan(config, {problem.layout.tokens, layers, problem.layout.visual})->kept());
      if (expected) {
        EXPECT_EQ(out.nan_scores[i], expected.nan_scores);
      }
      if (config.selection != Selection::diverse || !expected) continue;
      slow_greedy::SlowRule rule(config.diversity, problem.x, problem.scores, problem.broken);
      const std::vector<Index> slow = slow_greedy::slowly(config, problem.layout, rule);
      if (rule.margin < 1e-5) continue;
      ASSERT_EQ(out.kept[i], slow) << "sequence " << i;
      ++compared;
      damaged += expected.nan_scores > 0 ? 1u : 0u;
    }
  }
  EXPECT_LE(80u, compared);
  EXPECT_LE(15u, damaged);
}

// Features of elements 0, 1 and -1, of which 4, 16 or 64 are not 0, have cosines without rounding: many are equal, and the
// core's choice is the device's to the last tie.
TEST(CudaDiverse, WhereNothingRoundsTheCoresTokensStay) {
  Rng rng(72);
  for (int draw = 0; draw < 60; ++draw) {
    SCOPED_TRACE("draw " + std::to_string(draw));
    const std::size_t width = rng.between(64, 90);
    std::vector<Problem> problems;
    DeviceBatch batch;
    for (std::size_t i = 0; i < 2; ++i) problems.emplace_back(rng, false, 0, width);
    for (Problem& problem : problems) {
      for (std::size_t t = 0; t < problem.layout.tokens; ++t) {
        const std::size_t set = rng.chance(0.1) ? 0 : rng.chance(0.5) ? 4 : rng.chance(0.5) ? 16 : 64;
        for (std::size_t d = 0; d < width; ++d)
          problem.features[t * width + d] = d < set ? (rng.chance(0.5) ? 1.0f : -1.0f) : 0.0f;
      }
      for (float& score : problem.floats) score = static_cast<float>(rng.below(5)) / 4;
      problem.floats[0] = 0;  // so that scaling does not round either
      problem.floats[1] = 1;
      Config config = slow_greedy::random_config(rng, problem, false);
      config.diversity.weight = rng.chance(0.3) ? 0 : config.diversity.blend == Blend::product ? 1 : 0.5;
      if (config.diversity.novelty == Novelty::volume) config.diversity.novelty = Novelty::nearest;
      batch.add(rng, problem, config, 0);
    }
    const Outcome out = run(rng, batch, cuda::FeaturesAt::rows);
    ASSERT_TRUE(out.status) << message(out.status);
    for (std::size_t i = 0; i < problems.size(); ++i) {
      Pruner<> core(batch.configs[i]);
      const Kept expected = core.prune(problems[i].evidence(), problems[i].layout.visual);
      ASSERT_TRUE(expected) << expected.message().c_str();
      ASSERT_EQ(out.kept[i], std::vector<Index>(expected.begin(), expected.end())) << "sequence " << i;
    }
  }
}

// n visual tokens behind two of text, as the device and the core prune them: one image, or those of `images`.
struct Alone {
  std::vector<Index> device, core;
};
Alone prune_alone(Rng& rng, const Config& config, const slow_greedy::Matrix& x, const std::vector<double>& scores,
                  const std::vector<TokenSpan>& images = {}) {
  const std::size_t n = x.size(), width = x[0].size();
  const std::vector<float> features = slow_greedy::flat(x), s(scores.begin(), scores.end());
  const std::vector<TokenSpan> visual = images.empty() ? std::vector<TokenSpan>{{2, n}} : images;
  cuda::Limits limits;
  limits.tokens = n + 3;
  limits.features = width;
  const cuda::Request request{config, visual, 0, n + 3};
  machine::Queue queue(rng);
  machine::Pruner pruner;
  Status status = pruner.reserve(limits);
  if (status) status = pruner.plan(Span<const cuda::Request>(&request, 1), layers, queue);
  const cuda::Features<float> device{cuda::heads(features.data(), TokenMajor{n, 1, width}), cuda::FeaturesAt::visual};
  if (status) status = pruner.prune(0, cuda::with_features(cuda::Scores{s.data()}, device), queue);
  EXPECT_TRUE(status) << message(status);
  EXPECT_EQ(machine::faults(), std::set<std::string>{});
  const cuda::Kept kept = pruner.kept(0);
  Alone out{numbers(kept.visual_numbers, kept.total_visual, 0), {}};
  std::vector<float> all((n + 3) * width);
  std::copy(features.begin(), features.end(), all.begin() + static_cast<std::ptrdiff_t>(2 * width));
  Pruner<> core(config);
  const auto view = fastv::heads(all.data(), TokenMajor{n + 3, 1, width});
  for (const Index i : core.prune(with_features(fastv::Scores<float>{s, n + 3}, view), visual))
    if (i >= 2 && i < n + 2) out.core.push_back(i - 2);
  return out;
}

const Diversity published[] = {{Novelty::nearest, Blend::sum, 0.5},
                               {Novelty::nearest, Blend::sum, 0},
                               {Novelty::nearest, Blend::product, 1, 0.5},
                               {Novelty::coverage, Blend::product, 1},
                               {Novelty::volume, Blend::product, 2}};

TEST(CudaDiverse, EqualTokensAreTakenByScoreThenInOrder) {
  Rng rng(73);
  for (const std::size_t n : {3u, 64u, 65u, 131u, 600u})
    for (const Diversity& diversity : published) {
      const slow_greedy::Matrix x(n, slow_greedy::clustered(rng, 1, 37, 1)[0]);
      const Config config = slow_greedy::diverse(diversity, n > 200 ? 20 : n / 2);
      const Alone equal = prune_alone(rng, config, x, std::vector<double>(n, 0.25));
      EXPECT_EQ(equal.device, numbers_up_to(config.keep_count));
      std::vector<double> rising(n);
      std::iota(rising.begin(), rising.end(), 1.0);
      const Alone last = prune_alone(rng, config, x, rising);
      EXPECT_EQ(last.device, last.core) << n;
    }
}

// A token without a score that stays for its image's minimum.
TEST(CudaDiverse, WhatFillsAMinimumCountsAsKept) {
  Rng rng(81);
  Config config = slow_greedy::diverse({Novelty::nearest, Blend::sum, 0.1}, 2);
  config.quota = Quota::pooled;
  config.min_per_image = 1;
  const slow_greedy::Matrix x = {{1, 0}, {1, 0}, {0, 1}};
  const std::vector<double> scores = {static_cast<double>(oracle::nan_float()), 0.6, 0.5};
  const Alone out = prune_alone(rng, config, x, scores, {{2, 1}, {3, 2}});
  EXPECT_EQ(out.core, (std::vector<Index>{0, 2}));
  EXPECT_EQ(out.device, out.core);
}

// Enough for several tiles of products and several candidates of a thread; of the last ones, more than shared memory has.
TEST(CudaDiverse, ManyTokens) {
  Rng rng(74);
  std::size_t equal = 0, all = 0;
  for (const std::size_t n : {300u, 700u, 3100u})
    for (const Diversity& diversity : published) {
      if (n > 3000 && diversity.weight > 0 && diversity.novelty == Novelty::nearest) continue;
      const slow_greedy::Matrix x = slow_greedy::clustered(rng, n, n > 3000 ? 30 : 33, 40);
      const Alone out =
          prune_alone(rng, slow_greedy::diverse(diversity, n > 3000 ? 6 : 40), x, slow_greedy::random_scores(rng, n));
      EXPECT_EQ(out.device.size(), out.core.size());
      equal += out.device == out.core ? 1u : 0u;
      ++all;
    }
  EXPECT_LE(all, equal + 1) << "one near tie at most";
}

TEST(CudaDiverse, MoreTokensThanDimensionsAreFilledUpByScore) {
  Rng rng(75);
  for (int draw = 0; draw < 5; ++draw) {
    const slow_greedy::Matrix x = slow_greedy::clustered(rng, 40, 4, 9);
    const Alone out = prune_alone(rng, slow_greedy::diverse(published[4], 20), x, slow_greedy::random_scores(rng, 40));
    EXPECT_EQ(out.device, out.core);
  }
}

TEST(CudaDiverse, FeaturesOfAnyMagnitudePointTheSameWay) {
  Rng rng(76);
  const slow_greedy::Matrix x = slow_greedy::clustered(rng, 30, 40, 6);
  const std::vector<double> scores = slow_greedy::random_scores(rng, 30);
  slow_greedy::Matrix scaled = x;
  for (std::size_t i = 0; i < x.size(); ++i)
    for (double& v : scaled[i]) v *= std::ldexp(1, i % 3 == 0 ? 115 : i % 3 == 1 ? -110 : 0);
  for (const Diversity& diversity : published) {
    const Config config = slow_greedy::diverse(diversity, 12);
    EXPECT_EQ(prune_alone(rng, config, scaled, scores).device, prune_alone(rng, config, x, scores).device);
  }
}

// Keys of every layout and type serve beside their attention, behind earlier turns, side by side, averaged or projected.
template <class K>
void check_keys(std::uint64_t seed, oracle::Place place, bool mean, std::size_t projected) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  Rng rng(seed);
  Sequence s;
  random_prompt(rng, 2, 40, false, s);
  const std::size_t past = rng.below(9), kv_heads = 2, dim = 16;
  oracle::Layer layer = oracle::random_layer(rng, 4, kv_heads, 1, past + s.tokens, dim);
  layer.past = past;
  const oracle::Tensors<half, K> tensors(rng, layer, place, 16, oracle::in_chunks(place) ? 16 / sizeof(K) : 0);
  Config config = slow_greedy::diverse(published[seed % 5], by_ratio);
  config.filtering_ratio = 0.6;
  Features<Heads<K>> features{tensors.view.key, past, mean, projected};
  Pruner<> core(config);
  const Kept expected = core.prune(with_features(tensors.view, features), s.visual);
  ASSERT_TRUE(expected) << expected.message().c_str();

  cuda::Features<K> device{on_device(tensors.view.key)};
  device.mean_of_heads = mean;
  device.projected = projected;
  ASSERT_EQ(device.width(), features.width());
  cuda::Limits limits;
  limits.tokens = s.tokens;
  limits.keys = past + s.tokens;
  limits.heads = 4;
  limits.features = device.width();
  s.past = {past};
  cuda::Request request{config, s.visual, 0, s.tokens};
  request.queries = 1;
  request.past = s.past;
  request.key_row = 0;
  machine::Queue queue(rng);
  machine::Pruner pruner;
  ASSERT_TRUE(pruner.reserve(limits));
  ASSERT_TRUE(pruner.plan(Span<const cuda::Request>(&request, 1), layers, queue));
  const Status done = pruner.prune(0, cuda::with_features(on_device(tensors.view), device), queue);
  ASSERT_TRUE(done) << message(done);
  ASSERT_EQ(machine::faults(), std::set<std::string>{});
  const cuda::Kept kept = pruner.kept(0);
  EXPECT_EQ(numbers(kept.rows, kept.total, 0), std::vector<Index>(expected.begin(), expected.end()));
}
TEST(CudaDiverse, KeysOfEveryLayout) {
  std::uint64_t seed = 100;
  for (const oracle::Place place : oracle::places) {
    check_keys<half>(++seed, place, false, 0);
    check_keys<float>(++seed, place, true, 0);
    check_keys<bfloat16>(++seed, place, false, 10);
    check_keys<fp8_e4m3>(++seed, place, true, 5);
    check_keys<fp8_e5m2>(++seed, place, false, 32);
    check_keys<std::int8_t>(++seed, place, false, 0);
  }
}

// An int8 cache with a scale for each token and head: as the floats that it stands for.
TEST(CudaDiverse, FeaturesOfAnInt8CacheHaveTheirScales) {
  Rng rng(77);
  const std::size_t n = 40, kv_heads = 2, dim = 8, width = kv_heads * dim;
  std::vector<std::int8_t> keys(n * width);
  std::vector<float> scales(n * kv_heads), floats(n * width), scores(n - 4);
  for (std::int8_t& k : keys) k = static_cast<std::int8_t>(static_cast<int>(rng.below(200)) - 100);
  for (float& x : scales) x = static_cast<float>(rng.real(0.1, 2));
  for (std::size_t i = 0; i < floats.size(); ++i) floats[i] = static_cast<float>(keys[i]) * scales[i / dim];
  for (float& x : scores) x = static_cast<float>(rng.real());
  const std::vector<TokenSpan> visual{{2, n - 4}};
  const Config config = slow_greedy::diverse(published[0], 12);
  Pruner<> core(config);
  const auto view = fastv::heads(floats.data(), TokenMajor{n, kv_heads, dim});
  const Kept expected = core.prune(with_features(fastv::Scores<float>{scores, n}, view), visual);
  ASSERT_TRUE(expected) << expected.message().c_str();
  cuda::Limits limits;
  limits.tokens = n;
  limits.features = width;
  const cuda::Request request{config, visual, 0, n};
  machine::Queue queue(rng);
  machine::Pruner pruner;
  ASSERT_TRUE(pruner.reserve(limits));
  ASSERT_TRUE(pruner.plan(Span<const cuda::Request>(&request, 1), layers, queue));
  cuda::Features<std::int8_t> features{cuda::heads(keys.data(), TokenMajor{n, kv_heads, dim})};
  features.scales = cuda::heads(scales.data(), TokenMajor{n, kv_heads, 1});
  ASSERT_TRUE(pruner.prune(0, cuda::with_features(cuda::Scores{scores.data()}, features), queue));
  const cuda::Kept kept = pruner.kept(0);
  EXPECT_EQ(numbers(kept.rows, kept.total, 0), std::vector<Index>(expected.begin(), expected.end()));
}

// Two stages of which each may have the rule; what is recorded once gives the same bits again.
TEST(CudaDiverse, StagesFollowEachOtherAndAGraphRepeatsThem) {
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Rng rng(seed);
    const std::size_t width = 24, count = 1 + seed % 3;
    std::vector<Sequence> batch(count);
    std::vector<cuda::Request> requests;
    cuda::Limits limits;
    limits.sequences = count;
    limits.stages = 2;
    limits.features = width;
    std::vector<std::size_t> tokens;
    std::vector<std::vector<TokenSpan>> visual;
    for (Sequence& s : batch) {
      random_prompt(rng, 3, 40, false, s);
      for (std::size_t stage = 0; stage < 2; ++stage) {
        Config config = slow_greedy::diverse(slow_greedy::random_diversity(rng), by_ratio);
        config.filtering_layer = 2 + stage;
        config.filtering_ratio = 0.5;
        if (rng.chance(0.3)) config.selection = Selection::top_k;
        s.stages.push_back(config);
      }
      requests.push_back(request_of(s, limits.tokens));
      limits.tokens += s.tokens;
      tokens.push_back(s.tokens);
      visual.push_back(s.visual);
    }
    machine::Queue queue(rng);
    machine::Pruner pruner;
    ASSERT_TRUE(pruner.reserve(limits));
    const Status planned = pruner.plan(requests, layers, queue);
    ASSERT_TRUE(planned) << message(planned);
    std::size_t differ = 0;
    for (std::size_t stage = 0; stage < 2; ++stage) {
      std::size_t rows = 0, all = 0;
      for (std::size_t i = 0; i < count; ++i) {
        rows += tokens[i];
        all += visual_tokens(visual[i]);
      }
      std::vector<float> hidden(rows * width), scores(all);
      const auto work = [&] {
        const cuda::Features<float> features{cuda::heads(hidden.data(), TokenMajor{rows, 1, width}),
                                             cuda::FeaturesAt::rows};
        const Status done = pruner.prune(stage, cuda::with_features(cuda::Scores{scores.data()}, features), queue);
        EXPECT_TRUE(done) << message(done);
      };
      const machine::Recording recording = queue.record(work);
      for (float& x : hidden) x = static_cast<float>(rng.real(-1, 1));
      for (float& x : scores) x = static_cast<float>(rng.real());
      recording.replay();
      ASSERT_EQ(machine::faults(), std::set<std::string>{});
      cuda::Kept kept = pruner.kept(stage);
      const std::vector<Index> once = numbers(kept.rows, kept.total, 0);
      work();
      kept = pruner.kept(stage);
      ASSERT_EQ(numbers(kept.rows, kept.total, 0), once) << "the same from run to run";
      std::size_t row = 0, number = 0, at = 0;
      for (std::size_t i = 0; i < count; ++i) {
        const std::size_t own = visual_tokens(visual[i]), size = pruner.kept_tokens(stage, i);
        const std::vector<float> part(scores.begin() + static_cast<std::ptrdiff_t>(number),
                                      scores.begin() + static_cast<std::ptrdiff_t>(number + own));
        Pruner<> core(batch[i].stages[stage]);
        const auto view = fastv::heads(hidden.data() + row * width, TokenMajor{tokens[i], 1, width});
        const Kept expected = core.prune(with_features(fastv::Scores<float>{part, tokens[i]}, view), visual[i]);
        ASSERT_TRUE(expected) << expected.message().c_str();
        ASSERT_EQ(size, expected.size());
        const std::vector<Index> ours = numbers(kept.rows + at, size, row);
        differ += ours == std::vector<Index>(expected.begin(), expected.end()) ? 0u : 1u;
        const KeptRows rows_kept{Span<const Index>(ours), {}};
        std::vector<TokenSpan> left(visual[i].size());
        left.resize(*next_spans(rows_kept, visual[i], left));
        visual[i] = left;
        row += tokens[i];
        number += own;
        at += size;
        tokens[i] = size;
      }
    }
    EXPECT_EQ(differ, 0u) << "no two values are as near as rounding here";
  }
}

}  // namespace
}  // namespace diverse_test

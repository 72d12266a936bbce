// Selection on the device: the same tokens as the core's, for every rule, from scores that are given.
#include <gtest/gtest.h>

#include "batches.hpp"

namespace select_test {
namespace {

using namespace batches;

// Scores with ties, NaN and zeros, or so low in one half that only its minimum keeps an image of it.
std::vector<float> random_scores(Rng& rng, std::size_t count) {
  const std::size_t values = rng.chance(0.5) ? 4 : 100000;
  const bool hostile = rng.chance(0.3), poor = rng.chance(0.3), close = rng.chance(0.3);
  std::vector<float> scores(count);
  for (float& score : scores) {
    score = static_cast<float>(rng.below(values)) / static_cast<float>(values);
    if (close) score = 0.5f + static_cast<float>(rng.below(values)) * 0x1p-24f;  // next to each other
    if (poor && &score - scores.data() < static_cast<std::ptrdiff_t>(count / 2)) score /= 1e6f;
    if (hostile && rng.chance(0.2)) score = oracle::nan_float();
    if (hostile && rng.chance(0.1)) score = -score;
  }
  return scores;
}

std::vector<std::int32_t> list(const std::int32_t* data, std::size_t count) { return {data, data + count}; }

// A batch through one or two stages, beside the core. Positions and rows are followed from stage to stage.
void check_batch(std::uint64_t seed, std::size_t sequences, std::size_t stages, std::size_t most_in_span) {
  Rng rng(seed);
  std::vector<Sequence> batch(sequences);
  std::vector<cuda::Request> requests;
  cuda::Limits limits;
  limits.sequences = sequences;
  limits.stages = stages;
  limits.spans = limits.groups = 0;
  constexpr std::size_t layers = 8;
  for (Sequence& s : batch) {
    const bool grids = stages == 1 && rng.chance(0.4), images = rng.chance(0.9);
    for (bool fits = false; !fits;) {
      s = {};
      random_prompt(rng, 4, most_in_span, grids, s);
      if (!images) s.visual.clear();
      bool pooled = false;
      for (std::size_t stage = 0; images && stage < stages; ++stage) {
        s.stages.push_back(random_config(rng, grids, false));
        s.stages.back().filtering_layer = 2 + stage;
        if (pooled) s.stages.back().quota = Quota::pooled;
        if (pooled) s.stages.back().min_per_image = 0;
        pooled = pooled || s.stages.back().quota == Quota::pooled;
      }
      fits = static_cast<bool>(make_plan(s.stages, Prompt{s.tokens, layers, s.visual}));
    }
    s.past = {rng.below(9)};
    const std::size_t padding = rng.chance(0.3) ? rng.below(5) : 0;
    const std::size_t first = requests.empty() ? 0 : requests.back().first + requests.back().tokens + padding;
    requests.push_back(request_of(s, first));
    limits.tokens += s.tokens;
    limits.spans += s.visual.size();
    limits.groups += s.visual.size() + 1 + visual_tokens(s.visual);
  }
  machine::Queue queue(rng);
  machine::Pruner pruner;
  ASSERT_TRUE(pruner.reserve(limits));
  Status planned = pruner.plan(requests, layers, queue);
  ASSERT_TRUE(planned) << message(planned);

  std::vector<std::vector<TokenSpan>> visual;
  std::vector<std::size_t> tokens, first;
  std::vector<std::vector<Index>> position;  // in the prompt, of each row
  for (std::size_t i = 0; i < sequences; ++i) {
    visual.push_back(batch[i].visual);
    tokens.push_back(batch[i].tokens);
    first.push_back(requests[i].first);
    position.push_back(numbers_up_to(tokens[i]));
  }
  for (std::size_t stage = 0; stage < pruner.stages(); ++stage) {
    std::size_t count = 0;
    for (const auto& spans : visual) count += visual_tokens(spans);
    const std::vector<float> scores = random_scores(rng, count);
    const std::size_t before = machine::Queue::launches();
    const Status done = pruner.prune(stage, cuda::Scores{scores.data()}, queue);
    ASSERT_TRUE(done) << message(done);
    EXPECT_EQ(machine::Queue::launches(), before + 1);
    const cuda::Kept kept = pruner.kept(stage);
    std::size_t total = 0, total_visual = 0, keys = 0, longest = 0, numbered = 0;
    bool known = true;  // what the core refuses, whose spans nobody knows then
    for (std::size_t i = 0; i < sequences; ++i) {
      SCOPED_TRACE("seed " + std::to_string(seed) + ", stage " + std::to_string(stage) + ", sequence " +
                   std::to_string(i));
      const std::size_t own = visual_tokens(visual[i]);
      const std::vector<float> part(scores.begin() + static_cast<std::ptrdiff_t>(numbered),
                                    scores.begin() + static_cast<std::ptrdiff_t>(numbered + own));
      Config config = batch[i].stages.empty() ? Config{} : batch[i].stages[stage];
      Pruner<> core(config);
      Kept expected = core.prune(fastv::Scores<float>{part, tokens[i]}, visual[i]);
      const std::size_t size = pruner.kept_tokens(stage, i);
      if (expected) {
        ASSERT_EQ(size, expected.size());
        std::vector<std::int32_t> rows, places, slots, numbers;
        std::vector<Index> of_visual(tokens[i], Index(-1));
        for_each_visual(visual[i], [&](std::size_t number, std::size_t at) {
          of_visual[at] = static_cast<Index>(numbered + number);
        });
        for (const Index row : expected) {
          rows.push_back(static_cast<std::int32_t>(first[i] + row));
          places.push_back(static_cast<std::int32_t>(position[i][row]));
          slots.push_back(static_cast<std::int32_t>(batch[i].past[0] + slots.size()));
          if (of_visual[row] != Index(-1)) numbers.push_back(static_cast<std::int32_t>(of_visual[row]));
        }
        EXPECT_EQ(list(kept.rows + total, size), rows);
        EXPECT_EQ(list(kept.positions + total, size), places);
        EXPECT_EQ(list(kept.slots + total, size), slots);
        EXPECT_EQ(list(kept.visual_numbers + total_visual, numbers.size()), numbers);
        EXPECT_EQ(kept.counters[i].nan_scores, expected.nan_scores);
        EXPECT_EQ(kept.counters[i].zero_scores, expected.zero_scores);
        EXPECT_EQ(kept.counters[i].infinite, 0u);
        total_visual += numbers.size();
        std::vector<TokenSpan> left(visual[i].size());
        std::vector<Index> still;
        for (const Index row : expected) still.push_back(position[i][row]);
        left.resize(*next_spans(expected, visual[i], left));
        visual[i] = left;
        position[i] = still;
      } else {
        ASSERT_EQ(expected.code(), Errc::bad_value);  // all NaN, or all 0 in an image: as many as planned stay
        EXPECT_TRUE(kept.counters[i].nan_scores == own || kept.counters[i].zero_scores > 0);
        known = false;
      }
      EXPECT_EQ(kept.cumulative[i], static_cast<std::int32_t>(total));
      EXPECT_EQ(kept.cumulative_keys[i], static_cast<std::int32_t>(keys));
      total += size;
      keys += batch[i].past[0] + size;
      longest = (std::max)(longest, size);
      numbered += own;
    }
    EXPECT_EQ(kept.total, total);
    EXPECT_EQ(kept.longest, longest);
    if (known) {
      EXPECT_EQ(kept.total_visual, total_visual);
    }
    EXPECT_EQ(kept.cumulative[sequences], static_cast<std::int32_t>(total));
    EXPECT_EQ(kept.cumulative_keys[sequences], static_cast<std::int32_t>(keys));
    if (!known) break;
    for (std::size_t i = 0, at = 0; i < sequences; ++i) {
      first[i] = at;
      tokens[i] = pruner.kept_tokens(stage, i);
      at += tokens[i];
    }
  }
  EXPECT_EQ(machine::faults(), std::set<std::string>{});
}

TEST(CudaSelect, RandomBatchesKeepWhatTheCoreKeeps) {
  for (std::uint64_t seed = 0; seed < 60; ++seed) check_batch(seed, 1 + seed % 4, 1, 40);
}
TEST(CudaSelect, TwoStages) {
  for (std::uint64_t seed = 100; seed < 130; ++seed) check_batch(seed, 1 + seed % 3, 2, 40);
}
TEST(CudaSelect, LargeGroups) {
  for (std::uint64_t seed = 200; seed < 220; ++seed) check_batch(seed, 1, 1, 700);
}
// More than shared memory holds, up to the most that is supported.
TEST(CudaSelect, ManyTokens) {
  for (std::uint64_t seed = 300; seed < 304; ++seed) check_batch(seed, 1, 1, 5000);
  for (const std::size_t tokens : {3072u, 3073u, 65536u}) {
    Rng rng(tokens);
    const std::vector<TokenSpan> visual{{5, tokens}};
    std::vector<float> scores(tokens);
    for (float& score : scores) score = static_cast<float>(rng.below(1000));
    cuda::Limits limits;
    limits.tokens = tokens + 7;
    Config config;
    config.filtering_ratio = 0.7;
    const cuda::Request request{config, visual, 0, tokens + 7};
    machine::Queue queue(rng);
    machine::Pruner pruner;
    ASSERT_TRUE(pruner.reserve(limits));
    ASSERT_TRUE(pruner.plan(Span<const cuda::Request>(&request, 1), 32, queue));
    ASSERT_TRUE(pruner.prune(0, cuda::Scores{scores.data()}, queue));
    ASSERT_EQ(machine::faults(), std::set<std::string>{});
    Pruner<> core(config);
    const Kept expected = core.prune(fastv::Scores<float>{scores, tokens + 7}, visual);
    const cuda::Kept kept = pruner.kept(0);
    EXPECT_EQ(std::vector<Index>(kept.rows, kept.rows + kept.total),
              std::vector<Index>(expected.begin(), expected.end()));
  }
  const std::vector<TokenSpan> visual{{0, 65537}};
  cuda::Limits limits;
  limits.tokens = 65540;
  Rng rng(1);
  machine::Queue queue(rng);
  machine::Pruner pruner;
  ASSERT_TRUE(pruner.reserve(limits));
  const cuda::Request request{Config{}, visual, 0, 65540};
  EXPECT_EQ(pruner.plan(Span<const cuda::Request>(&request, 1), 32, queue).code, Errc::not_supported);
}

}  // namespace
}  // namespace select_test

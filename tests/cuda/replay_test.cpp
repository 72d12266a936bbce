// What is recorded once, as in a CUDA graph, and run again with other data for the same plan; and results that have the same
// bits from run to run.
#include "batches.hpp"

namespace replay_test {
namespace {

using namespace batches;

constexpr std::size_t layers = 8, width = 24;

void check_replay(std::uint64_t seed) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  Rng rng(seed);
  const std::size_t count = 1 + seed % 4;
  std::vector<Sequence> batch(count);
  std::vector<cuda::Request> requests;
  std::vector<std::size_t> tokens, past;
  cuda::Limits limits;
  limits.sequences = count;
  limits.heads = Packed::heads;
  limits.keys = 400;
  limits.rows = rng.between(1, 2 * count);
  std::size_t visual = 0;
  for (Sequence& s : batch) {
    random_prompt(rng, 3, 50, false, s);
    Config config;
    config.filtering_ratio = rng.real(0.2, 0.8);
    if (seed % 5 == 1) config.score_rows = ScoreRows::all;
    if (seed % 5 == 2) {
      s.prior = {static_cast<Index>(s.tokens - 2)};
      config.prior_rows = s.prior;
    }
    s.stages = {config};
    s.past = {rng.below(20)};
    tokens.push_back(s.tokens);
    past.push_back(s.past[0]);
    visual += visual_tokens(s.visual);
    requests.push_back(request_of(s, limits.tokens));
    limits.tokens += s.tokens;
  }
  Packed layer(rng, tokens, past);
  machine::Queue queue(rng);
  machine::Pruner pruner;
  ASSERT_TRUE(pruner.reserve(limits));
  const Status planned = pruner.plan(requests, layers, queue);
  ASSERT_TRUE(planned) << message(planned);
  const std::size_t total = pruner.kept(0).total;
  const std::vector<float> nothing(total * width, -1.0f);
  std::vector<float> hidden(limits.tokens * width), shorter = nothing;

  const auto work = [&] {
    Status done = pruner.prune(0, layer.all(), queue);
    if (done)
      done = pruner.gather(
          0, {{fastv::rows(hidden.data(), limits.tokens, width), fastv::rows(shorter.data(), total, width)}}, queue);
    EXPECT_TRUE(done) << message(done);
  };
  const machine::Recording recording = queue.record(work);
  EXPECT_EQ(shorter, nothing) << "what is recorded is not run";
  for (int time = 0; time < 3; ++time) {
    SCOPED_TRACE("time " + std::to_string(time));
    layer.fill(rng);
    for (float& x : hidden) x = static_cast<float>(rng.real());
    shorter = nothing;
    recording.replay();
    ASSERT_EQ(machine::faults(), std::set<std::string>{});
    cuda::Kept kept = pruner.kept(0);
    const std::vector<float> scores(kept.scores, kept.scores + visual);
    const std::vector<Index> rows = numbers(kept.rows, kept.total, 0);
    std::size_t at = 0;
    for (std::size_t i = 0; i < count; ++i) {
      Pruner<> core(batch[i].stages[0]);
      const Kept expected = core.prune(layer.of(i), batch[i].visual);
      ASSERT_TRUE(expected) << expected.message().c_str();
      for (const Index row : expected) {
        const std::size_t from = layer.first[i] + row;
        ASSERT_EQ(rows[at], from) << "sequence " << i;
        ASSERT_EQ(std::memcmp(shorter.data() + at * width, hidden.data() + from * width, width * sizeof(float)), 0);
        ++at;
      }
    }
    ASSERT_EQ(at, total);
    work();
    kept = pruner.kept(0);
    EXPECT_EQ(std::memcmp(kept.scores, scores.data(), visual * sizeof(float)), 0) << "other bits by launches";
    EXPECT_EQ(numbers(kept.rows, kept.total, 0), rows);
  }
}

TEST(CudaReplay, NewDataForTheSamePlan) {
  for (std::uint64_t seed = 0; seed < 15; ++seed) check_replay(seed);
}

}  // namespace
}  // namespace replay_test

// The decoder of examples/cuda, its kernels run on the host: against the reference decoder in float, and against itself with
// masks in place of pruning, in half precision.
#include "decoder.hpp"

#include <gtest/gtest.h>

#include "plain_machine.hpp"
#include "random_weights.hpp"

namespace {

using fastv::half;
using fastv::Span;
using oracle::Rng;

const fastv::ModelShape shape{4, 32, 4, 2, 8, 48, 3, 40};

// A ragged batch: prompts as hidden states, packed, and what is asked of them.
struct Batch {
  std::vector<std::vector<fastv::TokenSpan>> visual;
  std::vector<fastv::cuda::Request> requests;
  std::vector<reference::Matrix> prompts;  // [tokens, hidden] each
  std::size_t rows = 0;

  Batch(Rng& rng, std::size_t count) : visual(count) {
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t before = rng.between(1, 5), image = rng.between(20, 70), after = rng.between(1, 6);
      visual[i] = {{before, image}};
      fastv::Config config;
      config.filtering_layer = 2;
      config.filtering_ratio = rng.real(0.3, 0.8);
      requests.push_back({config, visual[i], rows, before + image + after});
      rows += requests[i].tokens;
      prompts.push_back(reference::Matrix::NullaryExpr(static_cast<Eigen::Index>(requests[i].tokens),
                                                       static_cast<Eigen::Index>(shape.hidden),
                                                       [&] { return static_cast<float>(rng.real(-1.7, 1.7)); }));
    }
  }
  template <class T>
  std::vector<T> packed() const {
    std::vector<T> all;
    for (const reference::Matrix& prompt : prompts)
      for (Eigen::Index i = 0; i < prompt.size(); ++i) all.push_back(narrow<T>(prompt.data()[i]));
    return all;
  }
};

template <class T>
struct OnHost {
  PlainMachine machine;
  decoder::Decoder<PlainMachine, T> model;
  OnHost(Rng& rng, const Batch& batch, const reference::RandomWeights& weights)
      : machine(rng),
        model(machine, shape, {batch.requests.size(), batch.rows, 96},
              [&](const std::string& name, T* to, std::size_t rows, std::size_t columns) {
                const reference::Matrix own =
                    weights.matrix(name, static_cast<Eigen::Index>(rows), static_cast<Eigen::Index>(columns));
                for (Eigen::Index i = 0; i < own.size(); ++i) to[i] = narrow<T>(own.data()[i]);
              }) {}
};

TEST(CudaDecoder, PruningIsTheReferenceDecoders) {
  const reference::RandomWeights weights(7);
  const reference::Decoder slow({shape}, weights);
  for (std::uint64_t seed = 0; seed < 3; ++seed) {
    Rng rng(seed);
    const Batch batch(rng, 1 + seed);
    OnHost<float> fast(rng, batch, weights);
    auto status = fast.model.plan(batch.requests, batch.packed<float>(), decoder::Mode::pruned);
    if (status) status = fast.model.prefill();
    ASSERT_TRUE(status) << status.message().c_str();
    ASSERT_EQ(emulation::faults(), std::set<std::string>{});
    const fastv::cuda::Kept kept = fast.model.kept();
    std::vector<reference::Sequence> sequences(batch.requests.size());
    std::vector<reference::RowVector> logits;
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      reference::Pruning pruning{fastv::Pruner<float>(batch.requests[i].config), batch.visual[i]};
      const reference::Matrix hidden = slow.prefill(batch.prompts[i], sequences[i], pruning);
      logits.push_back(slow.logits(hidden.bottomRows(1), sequences[i]));
      const std::int32_t* first = kept.positions + kept.cumulative[i];
      EXPECT_EQ(std::vector<fastv::Index>(first, first + fast.model.kept_tokens(i)),
                std::vector<fastv::Index>(pruning.kept.begin(), pruning.kept.end()));
    }
    const emulation::Recording step = [&] {
      emulation::Queue queue = fast.machine.queue();
      return queue.record([&] { status = fast.model.decode(); });
    }();
    for (int time = 0; time < 5; ++time) {
      for (std::size_t i = 0; i < sequences.size(); ++i) {
        const float* own = fast.model.logits() + i * shape.vocabulary;
        for (std::size_t v = 0; v < shape.vocabulary; ++v)
          ASSERT_NEAR(own[v], logits[i][static_cast<Eigen::Index>(v)], 1e-4f)
              << "seed " << seed << ", step " << time << ", sequence " << i << ", logit " << v;
      }
      step.replay();
      ASSERT_TRUE(status) << status.message().c_str();
      ASSERT_EQ(emulation::faults(), std::set<std::string>{});
      for (std::size_t i = 0; i < sequences.size(); ++i) {
        ASSERT_EQ(fast.model.tokens()[i], reference::argmax(logits[i]));
        logits[i] = slow.decode(fast.model.tokens()[i], sequences[i]);
      }
    }
  }
}

TEST(CudaDecoder, PrunedIsMaskedInHalfPrecision) {
  Rng rng(11);
  const Batch batch(rng, 3);
  const reference::RandomWeights weights(8);
  OnHost<half> fast(rng, batch, weights), slow(rng, batch, weights), whole(rng, batch, weights);
  const std::vector<half> prompt = batch.packed<half>();
  ASSERT_TRUE(fast.model.plan(batch.requests, prompt, decoder::Mode::pruned));
  ASSERT_TRUE(slow.model.plan(batch.requests, prompt, decoder::Mode::masked));
  ASSERT_TRUE(whole.model.plan(batch.requests, prompt, decoder::Mode::whole));
  for (OnHost<half>* each : {&fast, &slow, &whole}) ASSERT_TRUE(each->model.prefill());
  float most_apart = 0;  // of what nothing is pruned from
  for (int time = 0; time < 3; ++time) {
    for (std::size_t i = 0; i < 3 * shape.vocabulary; ++i) {
      const float ours = fastv::to_float(fast.model.logits()[i]);
      ASSERT_NEAR(ours, fastv::to_float(slow.model.logits()[i]), 0.02f) << "step " << time;
      most_apart = (std::max)(most_apart, std::fabs(ours - fastv::to_float(whole.model.logits()[i])));
    }
    ASSERT_TRUE(fast.model.decode());
    ASSERT_TRUE(slow.model.decode(fast.model.tokens()));
    ASSERT_TRUE(whole.model.decode(fast.model.tokens()));
  }
  EXPECT_GT(most_apart, 0.1f) << "pruning changes so little that nothing is tested";
  EXPECT_EQ(emulation::faults(), std::set<std::string>{});
}

TEST(CudaDecoder, NarrowsToTheNearestHalf) {
  for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const half value{static_cast<std::uint16_t>(bits)};
    if (oracle::is_nan(fastv::to_float(value))) continue;
    ASSERT_EQ(narrow<half>(fastv::to_float(value)).bits, bits);
    const half next{static_cast<std::uint16_t>(bits + 1)};  // away from zero
    if ((bits & 0x7fffu) >= 0x7bffu) continue;
    const float middle = 0.5f * (fastv::to_float(value) + fastv::to_float(next));
    ASSERT_EQ(narrow<half>(middle).bits, bits % 2 == 0 ? bits : bits + 1);
    ASSERT_EQ(narrow<half>(std::nextafter(middle, fastv::to_float(next))).bits, bits + 1);
  }
  EXPECT_EQ(narrow<half>(65519.9f).bits, 0x7bffu);
  EXPECT_EQ(narrow<half>(65520.0f).bits, 0x7c00u);
  EXPECT_EQ(narrow<half>(-1e30f).bits, 0xfc00u);
}

}  // namespace

// The reference decoder: the pruned run against the slow way (every token runs, dropped keys are hidden), the cost
// model against counted multiply-adds, and the weights' reader against malformed files.
#include <gtest/gtest.h>

#include <cstdio>

#include "masked_decoder.hpp"
#include "random_weights.hpp"

namespace decoder_test {
namespace {

using namespace reference;
using masked::Mode;

constexpr float tolerance = 2e-4f;

DecoderConfig small_model(std::size_t layers, std::size_t heads, std::size_t kv_heads) {
  return {{layers, 48, heads, kv_heads, 12, 80, 3, 40}, 1e-5f, 10000};
}

// A prompt of `tokens` random embeddings [n, 48].
Matrix random_prompt(Eigen::Index tokens, std::uint64_t seed) {
  return 7 * RandomWeights(seed).matrix("prompt", tokens, 48);
}

struct Outcome {
  std::vector<fastv::Index> kept;
  Matrix hidden;       // the last layer's output
  Matrix step_logits;  // [steps, vocabulary]
  std::vector<int> tokens;
  Sequence sequence;
};

// config: null where nothing is pruned.
Outcome run(const Decoder& decoder, const Matrix& prompt, const fastv::Config* config,
            const std::vector<fastv::TokenSpan>& visual, Mode mode, std::size_t steps = 6) {
  Outcome result;
  masked::Run how{{}, visual, mode};
  if (config != nullptr) how.schedule = {*config};
  how.on_kept = [&](const fastv::Kept& kept, fastv::Span<const float>) {
    result.kept.assign(kept.begin(), kept.end());
  };
  result.hidden = masked::prefill(decoder, prompt, result.sequence, how);
  result.sequence = Sequence{};
  result.step_logits.resize(static_cast<Eigen::Index>(steps), static_cast<Eigen::Index>(decoder.shape().vocabulary));
  Eigen::Index row = 0;
  result.tokens = masked::generate(decoder, prompt, steps, how, result.sequence,
                                   [&](const masked::Step& step) { result.step_logits.row(row++) = step.logits; });
  return result;
}

fastv::Config config_of(std::size_t layer, double ratio) {
  fastv::Config config;
  config.filtering_layer = layer;
  config.filtering_ratio = ratio;
  return config;
}

float difference(const Matrix& a, const Matrix& b) { return (a - b).cwiseAbs().maxCoeff<Eigen::PropagateNaN>(); }

// Dropping tokens must equal hiding them: prefill at the kept rows, and every decoding step.
void expect_pruned_equals_masked(const Decoder& decoder, const Matrix& prompt, const fastv::Config& config,
                                 const std::vector<fastv::TokenSpan>& visual) {
  const Outcome pruned = run(decoder, prompt, &config, visual, Mode::once);
  const Outcome masked = run(decoder, prompt, &config, visual, Mode::mask);
  ASSERT_EQ(pruned.kept, masked.kept);
  ASSERT_EQ(static_cast<std::size_t>(pruned.hidden.rows()), pruned.kept.size());
  for (std::size_t i = 0; i < pruned.kept.size(); ++i)
    EXPECT_LT(difference(pruned.hidden.row(static_cast<Eigen::Index>(i)), masked.hidden.row(pruned.kept[i])), tolerance)
        << "row " << i;
  EXPECT_EQ(pruned.tokens, masked.tokens);
  EXPECT_LT(difference(pruned.step_logits, masked.step_logits), tolerance);
}

TEST(Decoder, PrunedRunEqualsFullRunWithHiddenKeys) {
  for (const std::size_t kv_heads : {1u, 2u, 4u})
    for (const bool bias : {false, true}) {
      const Decoder decoder(small_model(5, 4, kv_heads), RandomWeights(kv_heads, bias));
      for (const std::size_t layer : {1u, 2u, 4u})
        for (const double ratio : {0.0, 0.3, 0.75, 1.0}) {
          SCOPED_TRACE(testing::Message() << kv_heads << " KV heads, K " << layer << ", R " << ratio);
          expect_pruned_equals_masked(decoder, random_prompt(40, layer), config_of(layer, ratio), {{6, 24}});
        }
    }
}

TEST(Decoder, SeveralSpansAndEveryRuleEqualTheMaskedRun) {
  const Decoder decoder(small_model(4, 4, 2), RandomWeights(9));
  const std::vector<fastv::TokenSpan> visual = {{0, 8}, {11, 9, 3}, {20, 12, 4}};
  for (const auto selection : {fastv::Selection::top_k, fastv::Selection::random, fastv::Selection::uniform})
    for (const auto quota : {fastv::Quota::per_image, fastv::Quota::pooled})
      for (const auto rows : {fastv::ScoreRows::last, fastv::ScoreRows::all}) {
        fastv::Config config = config_of(2, 0.6);
        config.selection = selection;
        config.quota = quota;
        config.score_rows = rows;
        expect_pruned_equals_masked(decoder, random_prompt(37, 3), config, visual);
      }
}

TEST(Decoder, ScoreFreeRulesPruneBeforeTheFirstLayer) {
  const Decoder decoder(small_model(3, 4, 4), RandomWeights(4));
  fastv::Config config = config_of(0, 0.5);
  config.selection = fastv::Selection::random;
  expect_pruned_equals_masked(decoder, random_prompt(30, 1), config, {{5, 20}});
}

TEST(Decoder, DroppingNothingIsTheUnprunedRunBitForBit) {
  const Decoder decoder(small_model(4, 4, 2), RandomWeights(5, true, true));
  const Matrix prompt = random_prompt(33, 8);
  const fastv::Config config = config_of(2, 0);
  const Outcome plain = run(decoder, prompt, nullptr, {}, Mode::once);
  const Outcome pruned = run(decoder, prompt, &config, {{3, 22}}, Mode::once);
  EXPECT_EQ(plain.hidden, pruned.hidden);
  EXPECT_EQ(plain.step_logits, pruned.step_logits);
}

TEST(Decoder, PromptWithoutImagesPassesUntouched) {
  const Decoder decoder(small_model(4, 4, 2), RandomWeights(5));
  const Matrix prompt = random_prompt(12, 2);
  const fastv::Config config = config_of(2, 0.9);
  EXPECT_EQ(run(decoder, prompt, nullptr, {}, Mode::once).step_logits,
            run(decoder, prompt, &config, {}, Mode::once).step_logits);
}

TEST(Decoder, PositionsGoOnFromTheWholePromptInEveryLayer) {
  const Decoder decoder(small_model(4, 4, 2), RandomWeights(6));
  const fastv::Config config = config_of(1, 0.5);
  const Outcome pruned = run(decoder, random_prompt(30, 2), &config, {{2, 20}}, Mode::once, 5);
  EXPECT_EQ(pruned.sequence.next_position, 30 + 4);  // the fifth token has not been fed
  EXPECT_EQ(pruned.sequence.layers[0].length, 30 + 4);
  for (std::size_t layer = 1; layer < 4; ++layer) EXPECT_EQ(pruned.sequence.layers[layer].length, 20 + 4);
}

TEST(Decoder, ReRankingWithoutACacheAgreesWithOnePrefillPerStep) {
  const Decoder decoder(small_model(4, 4, 2), RandomWeights(7));
  const Matrix prompt = random_prompt(30, 5);
  const fastv::Config config = config_of(2, 0.7);
  const std::vector<fastv::TokenSpan> visual = {{2, 22}};
  const Outcome run_all = run(decoder, prompt, &config, visual, Mode::prefill_anew);
  for (std::size_t step = 0; step < run_all.tokens.size(); ++step) {
    Matrix longer(prompt.rows() + static_cast<Eigen::Index>(step), prompt.cols());
    longer.topRows(prompt.rows()) = prompt;
    longer.bottomRows(static_cast<Eigen::Index>(step)) =
        decoder.embed({run_all.tokens.begin(), run_all.tokens.begin() + static_cast<std::ptrdiff_t>(step)});
    const Outcome one = run(decoder, longer, &config, visual, Mode::mask, 1);
    EXPECT_LT(difference(one.step_logits, run_all.step_logits.row(static_cast<Eigen::Index>(step))), tolerance);
  }
}

TEST(Decoder, SettingsThatDoNotFitTheModelAreRefused) {
  const Decoder decoder(small_model(4, 4, 2), RandomWeights(7));
  const fastv::Config config = config_of(4, 0.5);
  try {
    run(decoder, random_prompt(20, 1), &config, {{2, 10}}, Mode::once);
    FAIL() << "K = 4 of 4 layers was accepted";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("filtering_layer is 4 but the model has 4 layers"), std::string::npos)
        << error.what();
  }
}

TEST(Cost, MultiplyAddsOfTheDecoderAreCountedExactly) {
  for (const std::size_t kv_heads : {1u, 2u, 4u}) {
    const Decoder decoder(small_model(5, 4, kv_heads), RandomWeights(1));
    const fastv::Config config = config_of(2, 0.6);
    const std::vector<fastv::TokenSpan> visual = {{3, 21}};
    for (const bool prune : {false, true}) {
      fastv::Config keep_all = config;
      keep_all.filtering_ratio = 0;
      const auto plan = fastv::make_plan(prune ? config : keep_all, {31, 5, visual});
      ASSERT_TRUE(plan);
      Pruning pruning{fastv::Pruner<>(config), visual};
      Sequence sequence;
      const Matrix prompt = random_prompt(31, 1);
      const Matrix hidden = prune ? decoder.prefill(prompt, sequence, pruning) : decoder.prefill(prompt, sequence);
      (void)decoder.logits(hidden.bottomRows(1), sequence);
      EXPECT_EQ(sequence.macs, fastv::prefill_macs(decoder.shape(), *plan));
      for (std::size_t step = 0; step < 3; ++step) {
        const std::uint64_t before = sequence.macs;
        (void)decoder.decode(1, sequence);
        EXPECT_EQ(sequence.macs - before, fastv::decode_macs(decoder.shape(), *plan, step));
      }
      std::uint64_t elements = 0;
      for (const auto& layer : sequence.layers)
        elements += 2 * static_cast<std::uint64_t>(layer.length * layer.keys.cols());
      EXPECT_EQ(elements * sizeof(float), fastv::kv_bytes(decoder.shape(), *plan, sizeof(float), 3));
    }
  }
}

// ---- the reader of weights ----------------------------------------------------------------------

std::string file_with(const std::string& header, const std::string& data, std::uint64_t length_offset = 0) {
  const std::string path = testing::TempDir() + "fastv_tensors_test.safetensors";
  std::ofstream out(path, std::ios::binary);
  const std::uint64_t length = header.size() + length_offset;
  for (int i = 0; i < 8; ++i) out.put(static_cast<char>(length >> (8 * i) & 255));
  out << header << data;
  return path;
}

TEST(Tensors, ReadsEveryFloatType) {
  const std::string header =
      R"({"__metadata__":{"k":"v"},"f":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
      R"("h":{"dtype":"F16","shape":[2],"data_offsets":[4,8]},"b":{"dtype":"BF16","shape":[1,1,2],"data_offsets":[8,12]}})";
  const std::string data("\x00\x00\x80\x3f\x00\x3c\x00\xc0\x80\x3f\x00\xc0", 12);  // 1 | 1 -2 | 1 -2
  const Tensors tensors(file_with(header, data));
  EXPECT_EQ(tensors.matrix("f"), (Matrix(1, 1) << 1).finished());
  EXPECT_EQ(tensors.matrix("h"), (Matrix(1, 2) << 1, -2).finished());
  EXPECT_EQ(tensors.matrix("b"), (Matrix(1, 2) << 1, -2).finished());
  EXPECT_EQ(tensors.metadata("k"), "v");
  EXPECT_THROW((void)tensors.matrix("f", 2, 2), std::runtime_error);
  EXPECT_THROW((void)tensors.matrix("missing"), std::runtime_error);
  EXPECT_THROW((void)tensors.integers("f"), std::runtime_error);
}

TEST(Tensors, ReadsBlocksOfEightBitNumbers) {
  const auto file = [](const std::string& scales) {
    return file_with(R"({"q":{"dtype":"I8","shape":[2,2],"data_offsets":[0,4]},)"
                     R"("q_scale":{"dtype":"F16","shape":)" +
                         scales + R"(,"data_offsets":[4,8]}})",
                     std::string("\x01\xfe\x03\x7f\x00\x3c\x00\xc0", 8));  // 1 -2 3 127 | 1 -2
  };
  EXPECT_EQ(Tensors(file("[2,1]")).matrix("q"), (Matrix(2, 2) << 1, -2, -6, -254).finished());
  EXPECT_THROW((void)Tensors(file("[1,2]")).matrix("q"), std::runtime_error);  // a row is without scales
  EXPECT_THROW((void)Tensors(file("[2]")).matrix("q"), std::runtime_error);
  const std::string alone = file_with(R"({"q":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}})", "1234");
  EXPECT_THROW((void)Tensors(alone).matrix("q"), std::runtime_error);
}

TEST(Tensors, RefusesMalformedFiles) {
  const auto refused = [](const std::string& path, const std::string& part) {
    try {
      const Tensors tensors(path);
      ADD_FAILURE() << "accepted: " << part;
    } catch (const std::runtime_error& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  };
  refused("/nonexistent/file", "cannot open");
  refused(file_with("{}", "", 1000), "header would be longer than the file");
  refused(file_with("no json", ""), "not JSON");
  const auto entry = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return file_with(R"({"t":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}",
                     "12345678");
  };
  refused(entry("F32", "[2]", "[0,4]"), "tensor t is malformed");
  refused(entry("F32", "[3]", "[0,12]"), "tensor t is malformed");
  refused(entry("F32", "[2]", "[8,0]"), "tensor t is malformed");
  refused(entry("F99", "[2]", "[0,8]"), "tensor t is malformed");
  refused(entry("F32", "[4294967296,4294967296]", "[0,8]"), "tensor t is malformed");
  refused(entry("F32", "[-1]", "[0,8]"), "tensor t is malformed");
  refused(entry("F32", "\"x\"", "[0,8]"), "tensor t is malformed");
  refused(entry("F32", "[2.0]", "[0,8]"), "2.0 is no size");
  refused(entry("F32", "[2]", "[0,9e105]"), "9e+105 is no size");
}

TEST(DecoderConfig, SizesAreWholeNumbers) {
  for (const char* size : {"9e105", "8.5", "\"8\"", "18446744073709551615"}) try {
      (void)decoder_config(nlohmann::json::parse("{\"num_hidden_layers\": " + std::string(size) + "}"));
      ADD_FAILURE() << "accepted: " << size;
    } catch (const std::runtime_error& error) {
      EXPECT_NE(std::string(error.what()).find("num_hidden_layers is "), std::string::npos) << error.what();
    }
}

}  // namespace
}  // namespace decoder_test

// The engine on two halves of a model against llama.cpp itself: see proof.hpp for every architecture; here is the rest of
// what a user may do with one.
#include "engine.hpp"

#include <gtest/gtest.h>

#include <functional>
#include <numeric>

#include "llama_oracle.hpp"
#include "prompts.hpp"
#include "proof.hpp"

namespace {

using fastv::Config;
using fastv::Index;
using llava::Engine;
using llava::EngineOptions;
using llava::Halves;
using llava::Prefill;
using llava::Prompt;
using prompts::Builder;
using prompts::largest_difference;
using prompts::likeliest;
using prompts::llama_file;
using prompts::llama_of;
using prompts::one_thread;

constexpr std::size_t steps = 16;

class Architectures : public testing::TestWithParam<std::string> {};

TEST_P(Architectures, AreLlamaDecodesUnprunedAndAMaskedOnePruned) {
  const proof::Proof proof = proof::prove(GetParam());
  EXPECT_EQ(proof.verdict(), "");
}

std::string name_of(const testing::TestParamInfo<std::string>& test) {
  std::string name = test.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}
INSTANTIATE_TEST_SUITE_P(All, Architectures, testing::ValuesIn(llava::architectures()), name_of);
INSTANTIATE_TEST_SUITE_P(AllAtK0Alone, Architectures, testing::ValuesIn(llava::architectures(true)), name_of);

// Every architecture that cannot be cut says so, by name and reason, and so does what nobody has tried.
TEST(Architectures, ThatCannotBeCutSayWhy) {
  const std::vector<std::string> known = llava::architectures();
  EXPECT_TRUE(std::is_sorted(known.begin(), known.end()));
  EXPECT_GE(known.size(), 100u);
  std::size_t refused = 0;
  for (const std::string& name : tiny_gguf::architectures()) {
    if (std::binary_search(known.begin(), known.end(), name)) continue;
    ++refused;
    try {
      const Halves halves(prompts::model_file(tiny_gguf::tiny_model(name), name));
      ADD_FAILURE() << name << " was loaded";
    } catch (const std::runtime_error& error) {
      EXPECT_NE(std::string(error.what()).find("the architecture " + name + " cannot be pruned by FastV here: "),
                std::string::npos)
          << error.what();
      EXPECT_EQ(std::string(error.what()).find("has not been tried"), std::string::npos) << error.what();
      EXPECT_EQ(std::string(error.what()).find("it can, by --fastv-k 0") == std::string::npos, name == "chameleon");
    }
  }
  EXPECT_EQ(refused, tiny_gguf::architectures().size() - known.size());
}

// Both decode the tokens that llama.cpp finds likeliest.
double decode_difference(Engine& engine, oracle::Llama& llama, std::vector<float> expected) {
  double most = 0;
  for (std::size_t step = 0; step < steps; ++step) {
    const llama_token token = likeliest(expected);
    expected = llama.decode(token);
    engine.decode({{0, token}});
    most = std::max(most, largest_difference(engine.logits(0), expected));
  }
  return most;
}

TEST(Unpruned, TheTypesOfTheWeightsDoNotMatter) {
  for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_K}) {
    const std::string& path = prompts::model_file(llama_of(type), std::string("llama_") + ggml_type_name(type));
    const Halves halves(path);
    const Prompt prompt = Builder(halves, 3).text(20).picture(6).text(20).prompt;
    Engine engine(halves, one_thread());
    engine.prefill(0, prompt, nullptr);
    oracle::Llama llama(path, 1, 512, 512, false);
    const std::vector<float> expected = llama.prefill(prompt);
    EXPECT_EQ(largest_difference(engine.logits(0), expected), 0) << ggml_type_name(type);
    EXPECT_EQ(decode_difference(engine, llama, expected), 0) << ggml_type_name(type);
  }
}

TEST(Unpruned, WithWhatLlamaFilesMayHaveBesides) {
  tiny_gguf::LanguageModel spec = llama_of();
  spec.biases = spec.tied = spec.rope_factors = true;
  const std::string& path = prompts::model_file(spec, "llama_biases");
  const Halves halves(path);
  const Prompt prompt = Builder(halves, 1).text(20).picture(6).text(20).prompt;
  Engine engine(halves, one_thread());
  engine.prefill(0, prompt, nullptr);
  oracle::Llama llama(path, 1, 512, 512, false);
  const std::vector<float> expected = llama.prefill(prompt);
  EXPECT_EQ(largest_difference(engine.logits(0), expected), 0);
  EXPECT_EQ(decode_difference(engine, llama, expected), 0);
}

// Every K that can be, every count, every rule; the kept tokens are the core's on the same scores.
TEST(Pruned, AtEveryFilteringLayer) {
  for (const char* architecture : {"llama", "qwen2vl", "cohere2", "exaone-moe", "lfm2", "nemotron_h"}) {
    tiny_gguf::LanguageModel spec = tiny_gguf::tiny_model(architecture);
    spec.window = 40;
    const std::string& path = prompts::model_file(spec, architecture + std::string("_small"));
    const std::vector<std::uint32_t> all = Halves(path).facts().filtering_layers;
    ASSERT_FALSE(all.empty());
    for (const std::uint32_t k : all) {
      llava::LoadOptions load;
      load.filtering_layer = k;
      const Halves halves(path, load);
      const Prompt prompt = Builder(halves, k).text(70).picture(8).text(70).prompt;
      Config config;
      config.filtering_layer = k;
      Engine engine(halves, one_thread());
      const Prefill prefill = engine.prefill(0, prompt, &config);
      const fastv::Plan plan = engine.plan(prompt, &config);
      EXPECT_EQ(prefill.kept.size(), plan.kept());
      for (std::size_t layer = 0; layer < plan.layers; ++layer)
        EXPECT_EQ(engine.length(0, layer), plan.kv_length(layer)) << "layer " << layer;
      if (halves.recurrent()) {  // a state cannot be masked: with every token kept it is llama_decode's
        engine.forget(0);
        engine.prefill(0, prompt, nullptr);
        oracle::Llama whole(path, 1, 512, 512, false);
        EXPECT_EQ(largest_difference(engine.logits(0), whole.prefill(prompt)), 0) << architecture << ", K = " << k;
        continue;
      }
      oracle::Llama llama(path, 1, 512, 512);
      llama.hide_all_but(k, prefill.kept, prompt.tokens());
      const std::vector<float> expected = llama.prefill(prompt);
      const double size = prompts::largest(expected);
      EXPECT_LE(largest_difference(engine.logits(0), expected), 5e-4 * size) << architecture << ", K = " << k;
      EXPECT_LE(decode_difference(engine, llama, expected), 1e-3 * size) << architecture << ", K = " << k;
      for (std::size_t layer = 0; layer < plan.layers; ++layer)
        EXPECT_EQ(engine.length(0, layer), plan.kv_length(layer, steps)) << "layer " << layer;
    }
  }
}

TEST(Pruned, EveryCountFromNoneToAll) {
  const Halves halves(llama_file());
  const Prompt prompt = Builder(halves, 3).text(70).picture(5).text(70).prompt;
  Engine engine(halves, one_thread());
  const llava::Reading reading = engine.read(0, prompt);
  for (std::size_t keep = 0; keep <= 25; ++keep) {
    Config config;
    config.filtering_layer = halves.filtering_layer();
    config.keep_count = keep;
    // A reading is finished as often as one likes.
    engine.forget_tail(0);
    const std::vector<Index> kept = engine.select(reading, &config);
    ASSERT_EQ(kept.size(), 140 + keep);
    engine.finish(0, reading, kept);
    oracle::Llama llama(llama_file(), 1, 512, 512);
    llama.hide_all_but(2, kept, prompt.tokens());
    EXPECT_LE(largest_difference(engine.logits(0), llama.prefill(prompt)), 1e-3) << keep;
  }
}

TEST(Pruned, ByEveryRuleTheKeptTokensAreTheCores) {
  const Halves halves(llama_file());
  const Prompt prompt = Builder(halves, 4).text(9).picture(6).text(9).picture(5).text(9).prompt;
  Engine engine(halves, one_thread());
  const llava::Reading reading = engine.read(0, prompt);
  const std::vector<fastv::TokenSpan> visual = prompt.visual();
  std::vector<float> scores;
  for (const fastv::TokenSpan& span : visual)
    scores.insert(scores.end(), reading.scores.begin() + static_cast<std::ptrdiff_t>(span.first),
                  reading.scores.begin() + static_cast<std::ptrdiff_t>(span.first + span.count));
  EXPECT_GT(*std::max_element(scores.begin(), scores.end()), 0);
  std::vector<Config> rules(5);
  rules[1].window_rows = rules[1].window_columns = 3;
  rules[2].uniform_share = 0.5;
  rules[3].selection = fastv::Selection::random;
  rules[4].quota = fastv::Quota::pooled;
  for (const Config& rule : rules) {
    fastv::Pruner<float> pruner(rule);
    const fastv::Kept kept = pruner.prune(fastv::Scores<float>{scores, prompt.tokens()}, visual);
    ASSERT_TRUE(kept) << kept.message().c_str();
    EXPECT_EQ(engine.select(reading, &rule), std::vector<Index>(kept.begin(), kept.end()));
  }
}

// The last token's row of layer K-1's attention map, as llama.cpp computes it without flash attention: with soft-caps,
// sinks, ALiBi, latent keys, and in a second turn, whose keys lie behind those of the first.
TEST(Pruned, ScoresAreTheLastRowOfTheMap) {
  for (const char* architecture :
       {"llama", "qwen2vl", "gemma2", "gemma3", "gpt-oss", "bloom", "jais", "deepseek2", "olmo2", "qwen35"}) {
    tiny_gguf::LanguageModel spec = tiny_gguf::tiny_model(architecture);
    spec.window = 40;
    const std::string& path = prompts::model_file(spec, architecture + std::string("_small"));
    const Halves halves(path);
    Engine engine(halves, one_thread());
    oracle::Llama llama(path, 1, 512, 512, true, GGML_TYPE_F16, false);
    llama.watch(halves.filtering_layer() - 1);
    std::size_t past = 0;
    for (const std::uint64_t turn : {1u, 2u}) {
      const Prompt prompt = Builder(halves, turn, turn == 1 ? 0 : engine.next_position(0))
                                .text(30)
                                .picture(7)
                                .text(20)
                                .picture(5)
                                .text(21)
                                .prompt;
      const llava::Reading reading = engine.read(0, prompt);
      if (turn == 1)
        static_cast<void>(llama.prefill(prompt));
      else
        static_cast<void>(llama.append(prompt));
      double most = 0, largest = 0;
      for (const fastv::TokenSpan& span : prompt.visual())
        for (std::size_t i = span.first; i < span.first + span.count; ++i) {
          const double expected = llama.last_row().at(past + i);
          largest = std::max(largest, expected);
          most = std::max(most, std::abs(static_cast<double>(reading.scores[i]) - expected));
        }
      EXPECT_GT(largest, 0.005) << architecture;
      EXPECT_LE(most, 0.03 * largest) << architecture << ", turn " << turn;  // queries are rounded to F16 there
      past += prompt.tokens();
    }
  }
}

TEST(Pruned, ScoresAddUpToWhatThePicturesGet) {
  const Halves halves(llama_file());
  const Prompt prompt = Builder(halves, 5).text(30).picture(6).text(30).prompt;
  Engine engine(halves, one_thread());
  const llava::Reading reading = engine.read(0, prompt);
  double sum = 0;
  for (std::size_t i = 0; i < reading.scores.size(); ++i) {
    EXPECT_GE(reading.scores[i], 0);
    if (i < 30 || i >= 66) {
      EXPECT_EQ(reading.scores[i], 0);
    }
    sum += static_cast<double>(reading.scores[i]);
  }
  EXPECT_GT(sum, 0);
  EXPECT_LT(sum, 1);
}

// Qwen3-VL adds further rows of a picture in its first layers.
TEST(Pruned, BehindTheLayersThatAPictureReaches) {
  tiny_gguf::LanguageModel spec = tiny_gguf::tiny_model("qwen3vl");
  spec.deepstack = 3;
  const std::string& path = prompts::model_file(spec, "qwen3vl_deepstack");
  const Halves halves(path);
  const Prompt prompt = Builder(halves, 6).text(70).picture(9).text(70).prompt;
  Config config;
  config.filtering_layer = halves.filtering_layer();
  Engine engine(halves, one_thread());
  for (const Config* how : {static_cast<const Config*>(nullptr), static_cast<const Config*>(&config)}) {
    engine.forget(0);
    const Prefill prefill = engine.prefill(0, prompt, how);
    oracle::Llama llama(path, 1, 512, 512, how != nullptr);
    if (how != nullptr) llama.hide_all_but(halves.filtering_layer(), prefill.kept, prompt.tokens());
    const std::vector<float> expected = llama.prefill(prompt);
    EXPECT_LE(largest_difference(engine.logits(0), expected), how == nullptr ? 0 : 1e-3);
    EXPECT_LE(decode_difference(engine, llama, expected), how == nullptr ? 0 : 2e-3);
  }
}

// Gemma 3 lets the tokens of a picture see each other.
TEST(Pruned, PicturesThatAttendInBothDirections) {
  tiny_gguf::LanguageModel spec = tiny_gguf::tiny_model("gemma3");
  spec.window = 40;
  const std::string& path = prompts::model_file(spec, "gemma3");
  const Halves halves(path);
  const Prompt prompt = Builder(halves, 6).text(70).picture(9, false).text(70).picture(9, false).text(70).prompt;
  Engine engine(halves, one_thread());
  engine.prefill(0, prompt, nullptr);
  oracle::Llama whole(path, 1, 512, 512, false);
  std::vector<float> expected = whole.prefill(prompt);
  EXPECT_EQ(largest_difference(engine.logits(0), expected), 0);
  EXPECT_EQ(decode_difference(engine, whole, expected), 0);

  Config config;
  config.filtering_layer = halves.filtering_layer();
  config.filtering_ratio = 0.2;  // 65 of 81 stay: below 64 rows attention is summed in F16
  engine.forget(0);
  const Prefill prefill = engine.prefill(0, prompt, &config);
  oracle::Llama llama(path, 1, 512, 512);
  llama.hide_all_but(halves.filtering_layer(), prefill.kept, prompt.tokens());
  expected = llama.prefill(prompt);
  EXPECT_LE(largest_difference(engine.logits(0), expected), 1e-3);
  EXPECT_LE(decode_difference(engine, llama, expected), 3e-3);

  EngineOptions small = one_thread();
  small.micro_batch = 64;
  Engine refuses(halves, small);
  EXPECT_THROW(refuses.prefill(0, prompt, nullptr), std::invalid_argument);
}

TEST(Sequences, SeveralAreReadAndDecodedTogether) {
  for (const char* architecture : {"llama", "qwen3vl", "gemma3", "qwen35"}) {
    tiny_gguf::LanguageModel spec = tiny_gguf::tiny_model(architecture);
    spec.window = 40;
    const Halves halves(prompts::model_file(spec, architecture));
    EngineOptions options = one_thread(1024);
    options.sequences = 3;
    Engine together(halves, options);
    Config config;
    config.filtering_layer = halves.filtering_layer();
    struct Request {
      Prompt prompt;
      const Config* config;
    };
    const std::vector<Request> requests = {{Builder(halves, 1).text(70).picture(8).text(70).prompt, &config},
                                           {Builder(halves, 2).text(75).picture(9).text(66).prompt, nullptr},
                                           {Builder(halves, 3).text(64).picture(10).text(80).prompt, &config}};
    // The third is read while the others decode.
    std::vector<std::vector<float>> alone_logits(3);
    std::vector<std::unique_ptr<Engine>> alone;
    std::vector<llama_token> next(3);
    const auto vocabulary = static_cast<std::size_t>(llama_vocab_n_tokens(halves.vocabulary()));
    const auto begin = [&](std::size_t i) {
      alone.push_back(std::make_unique<Engine>(halves, one_thread(1024)));
      const Prefill here = together.prefill(i, requests[i].prompt, requests[i].config),
                    there = alone[i]->prefill(0, requests[i].prompt, requests[i].config);
      EXPECT_EQ(here.kept, there.kept);
      const std::vector<float> expected(alone[i]->logits(0), alone[i]->logits(0) + vocabulary);
      EXPECT_LE(largest_difference(together.logits(0), expected), 1e-3) << architecture << " " << i;
      next[i] = likeliest(expected);
    };
    const auto step = [&](std::vector<std::size_t> which) {
      std::vector<Engine::Next> batch;
      for (const std::size_t i : which) batch.push_back({i, next[i]});
      together.decode(batch);
      for (std::size_t row = 0; row < which.size(); ++row) {
        const std::size_t i = which[row];
        alone[i]->decode({{0, next[i]}});
        const std::vector<float> expected(alone[i]->logits(0), alone[i]->logits(0) + vocabulary);
        EXPECT_LE(largest_difference(together.logits(row), expected), 5e-3) << architecture << " " << i;
        next[i] = likeliest(expected);
      }
    };
    begin(0);
    begin(1);
    for (int i = 0; i < 4; ++i) step({0, 1});
    begin(2);
    for (int i = 0; i < 4; ++i) step({1, 2, 0});
    together.forget(1);
    for (int i = 0; i < 4; ++i) step({2, 0});
    EXPECT_EQ(together.length(1, 0), 0u);
    EXPECT_THROW(together.decode({{3, 0}}), std::out_of_range);
  }
}

// A later turn brings a picture of its own, which is pruned while the keys of the turn before stay.
TEST(Conversation, ALaterPictureIsPrunedOnItsOwn) {
  for (const char* architecture : {"llama", "qwen2vl", "gemma3"}) {
    tiny_gguf::LanguageModel spec = tiny_gguf::tiny_model(architecture);
    spec.window = 40;
    const std::string& path = prompts::model_file(spec, architecture);
    const Halves halves(path);
    Config config;
    config.filtering_layer = halves.filtering_layer();
    Engine engine(halves, one_thread());
    oracle::Llama llama(path, 1, 512, 512);
    const Prompt first = Builder(halves, 1).text(70).picture(8).text(70).prompt;
    std::vector<Index> kept = engine.prefill(0, first, &config).kept;
    llama.hide_all_but(halves.filtering_layer(), kept, first.tokens());
    std::vector<float> expected = llama.prefill(first);
    EXPECT_LE(largest_difference(engine.logits(0), expected), 1e-3) << architecture;
    EXPECT_LE(decode_difference(engine, llama, expected), 2e-3) << architecture;

    const std::size_t past = first.tokens() + steps;
    const Prompt second = Builder(halves, 2, engine.next_position(0)).text(70).picture(8).text(70).prompt;
    const Prefill later = engine.prefill(0, second, &config);
    ASSERT_EQ(later.kept.size(), 172u);
    kept.resize(kept.size() + steps);
    std::iota(kept.end() - steps, kept.end(), static_cast<Index>(first.tokens()));
    for (const Index index : later.kept) kept.push_back(static_cast<Index>(past) + index);
    llama.hide_all_but(halves.filtering_layer(), kept, past + second.tokens());
    expected = llama.append(second);
    EXPECT_LE(largest_difference(engine.logits(0), expected), 2e-3) << architecture;
    EXPECT_LE(decode_difference(engine, llama, expected), 3e-3) << architecture;
  }
}

TEST(Cache, AQuantisedOneStaysClose) {
  const Halves halves(llama_file());
  const Prompt prompt = Builder(halves, 8).text(20).picture(12).text(20).prompt;
  EngineOptions options = one_thread();
  Engine exact(halves, options);
  options.key_type = options.value_type = GGML_TYPE_Q8_0;
  Engine engine(halves, options);
  Config config;
  config.filtering_layer = halves.filtering_layer();
  exact.prefill(0, prompt, &config);
  engine.prefill(0, prompt, &config);
  EXPECT_LT(engine.cache_bytes(0) * 10, exact.cache_bytes(0) * 6);  // 34 bytes for 32 elements, not 64
  const auto vocabulary = static_cast<std::size_t>(llama_vocab_n_tokens(halves.vocabulary()));
  const std::vector<float> expected(exact.logits(0), exact.logits(0) + vocabulary);
  EXPECT_LE(largest_difference(engine.logits(0), expected), 0.3);  // the largest logit is about 3
  EXPECT_GT(largest_difference(engine.logits(0), expected), 0);
}

}  // namespace

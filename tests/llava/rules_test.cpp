// What tokens are chosen by besides the mean over heads: nothing at K = 0, what makes them different from each other, and
// heads that have weights.
#include "rules.hpp"

#include <ggml-cpp.h>
#include <gguf.h>
#include <gtest/gtest.h>

#include <fstream>
#include <numeric>

#include "calibrate.hpp"
#include "llama_oracle.hpp"
#include "prompts.hpp"

namespace {

using fastv::Config;
using fastv::Index;
using llava::Engine;
using llava::EngineOptions;
using llava::Halves;
using llava::Prompt;
using llava::Reading;
using prompts::Builder;
using prompts::largest_difference;
using prompts::likeliest;
using prompts::one_thread;

llava::LoadOptions ahead() {
  llava::LoadOptions load;
  load.filtering_layer = 0;
  return load;
}

Config rule_at(const char* name, std::size_t k, double ratio) {
  Config config;
  llava::set_rule(config, llava::rule_of(name));
  config.filtering_layer = k;
  config.filtering_ratio = ratio;
  return config;
}

const std::string& file_of(const char* architecture, std::uint32_t deepstack = 0) {
  tiny_gguf::LanguageModel spec = tiny_gguf::tiny_model(architecture);
  spec.window = 40;
  spec.deepstack = deepstack;
  spec.per_layer = architecture == std::string("gemma4");  // no K suits it then
  return prompts::model_file(spec, std::string("rules_") + architecture + std::to_string(deepstack));
}

// Logits behind the prompt and of 8 steps.
double difference(Engine& engine, oracle::Llama& llama, std::vector<float> expected) {
  double most = largest_difference(engine.logits(0), expected);
  for (int step = 0; step < 8; ++step) {
    const llama_token token = likeliest(expected);
    expected = llama.decode(token);
    engine.decode({{0, token}});
    most = std::max(most, largest_difference(engine.logits(0), expected));
  }
  return most;
}

// ---- K = 0 ------------------------------------------------------------------------------------------

// The prompt without what was dropped. Where axes are told by the model (M-RoPE) positions stay as they are.
Prompt shortened(const Prompt& prompt, const std::vector<Index>& kept, std::size_t axes, std::size_t width) {
  Prompt shorter;
  std::size_t first = 0;
  for (const llava::Piece& piece : prompt.pieces) {
    llava::Piece rest = piece;
    rest.tokens.clear();
    rest.rows.clear();
    rest.positions.clear();
    std::vector<std::size_t> which;
    for (const Index index : kept)
      if (index >= first && index < first + piece.count) which.push_back(index - first);
    rest.count = which.size();
    for (const std::size_t i : which) {
      if (!piece.tokens.empty()) rest.tokens.push_back(piece.tokens[i]);
      if (piece.rows.empty()) continue;
      const auto row = piece.rows.begin() + static_cast<std::ptrdiff_t>(i * width);
      rest.rows.insert(rest.rows.end(), row, row + static_cast<std::ptrdiff_t>(width));
    }
    for (std::size_t axis = 0; axis < axes; ++axis)
      for (const std::size_t i : which)
        rest.positions.push_back(axes == 1 ? shorter.next_position++ : piece.positions[axis * piece.count + i]);
    if (axes != 1) shorter.next_position = prompt.next_position;
    shorter.pieces.push_back(std::move(rest));
    first += piece.count;
  }
  return shorter;
}

// Where positions are told as they are, or there are none, what is left is llama_decode's own prompt: the same bits, rows of
// further layers (DeepStack) and states of recurrent layers among them.
TEST(Ahead, IsLlamaDecodeOfTheShorterPrompt) {
  for (const auto& [architecture, deepstack] :
       {std::pair<const char*, std::uint32_t>{"qwen2vl", 0}, {"qwen3vl", 3}, {"qwen35", 0}, {"jamba", 0}}) {
    const std::string& path = file_of(architecture, deepstack);
    const Halves whole(path, ahead());
    EXPECT_EQ(whole.filtering_layer(), 0u);
    const Prompt prompt = Builder(whole, 3).text(20).picture(9).text(30).picture(8).text(9).prompt;
    EngineOptions options = one_thread();
    options.features = true;
    Engine engine(whole, options);
    for (const char* rule : {"random", "uniform", "max-min", "coverage"}) {
      engine.forget(0);
      const Config config = rule_at(rule, 0, 0.6);
      const llava::Prefill prefill = engine.prefill(0, prompt, &config);
      EXPECT_EQ(prefill.kept.size(), 59u + 32 + 26);
      const fastv::Plan plan = engine.plan(prompt, &config);
      for (std::size_t layer = 0; layer < plan.layers; ++layer)
        EXPECT_EQ(engine.length(0, layer), plan.kv_length(layer));
      oracle::Llama llama(path, 1, 512, 512, false);
      const std::vector<float> expected =
          llama.prefill(shortened(prompt, prefill.kept, whole.position_axes(), whole.input()));
      EXPECT_EQ(difference(engine, llama, expected), 0) << architecture << ", " << rule;
    }
  }
}

// Learned positions, ALiBi, windows, and pictures that attend in both directions are those of the masked model: they count
// from the true positions. So are a later turn's.
TEST(Ahead, IsAMaskedLlamaDecode) {
  for (const char* architecture : {"llama", "gpt2", "bloom", "gemma3", "gemma3n", "gemma4"}) {
    const std::string& path = file_of(architecture);
    const bool causal = architecture != std::string("gemma3");
    const Halves whole(path, ahead());
    EXPECT_EQ(whole.facts().filtering_layers.empty(),
              architecture == std::string("gemma3n") || architecture == std::string("gemma4"));
    Engine engine(whole, one_thread());
    const Config config = rule_at("random", 0, 0.2);
    const Prompt first = Builder(whole, 5).text(70).picture(10, causal).text(70).prompt;
    std::vector<Index> kept = engine.prefill(0, first, &config).kept;
    oracle::Llama llama(path, 1, 512, 512);
    llama.hide_all_but(0, kept, first.tokens());
    std::vector<float> expected = llama.prefill(first);
    // Of one row or few, attention is summed in F16, which gemma3n takes to heart.
    const double most = (architecture == std::string("gemma3n") ? 4e-3 : 1e-3) * prompts::largest(expected);
    EXPECT_LE(difference(engine, llama, expected), most) << architecture;

    const std::size_t past = first.tokens() + 8;
    const Prompt second = Builder(whole, 6, engine.next_position(0)).text(70).picture(9, causal).text(70).prompt;
    const std::vector<Index> later = engine.prefill(0, second, &config).kept;
    kept.resize(kept.size() + 8);
    std::iota(kept.end() - 8, kept.end(), static_cast<Index>(first.tokens()));
    for (const Index index : later) kept.push_back(static_cast<Index>(past) + index);
    llama.hide_all_but(0, kept, past + second.tokens());
    EXPECT_LE(difference(engine, llama, llama.append(second)), most) << architecture;
  }
}

TEST(Ahead, SeveralSequencesAndPieces) {
  const Halves whole(file_of("llama"), ahead());
  EngineOptions options = one_thread();
  options.context = 1024;
  options.sequences = 2;
  options.batch = options.micro_batch = 48;
  Engine together(whole, options), alone(whole, options);
  const Config config = rule_at("random", 0, 0.5);
  const Prompt prompts[] = {Builder(whole, 1).text(70).picture(12).text(70).prompt,
                            Builder(whole, 2).text(60).picture(11).text(80).prompt};
  const auto vocabulary = static_cast<std::size_t>(llama_vocab_n_tokens(whole.vocabulary()));
  for (std::size_t i = 0; i < 2; ++i) together.prefill(i, prompts[i], &config);
  together.decode({{1, 7}, {0, 9}});
  for (std::size_t i = 0; i < 2; ++i) {
    alone.forget(0);
    alone.prefill(0, prompts[i], &config);
    alone.decode({{0, i == 0 ? 9 : 7}});
    EXPECT_LE(largest_difference(together.logits(1 - i), {alone.logits(0), alone.logits(0) + vocabulary}), 5e-3) << i;
  }
}

TEST(Ahead, NoRuleThatLooksAtAttention) {
  const Halves whole(file_of("llama"), ahead());
  Engine engine(whole, one_thread());
  const Prompt prompt = Builder(whole, 1).text(9).picture(6).text(9).prompt;
  for (const char* rule : {"last", "window", "grid", "mmr", "scope"}) {
    const Config config = rule_at(rule, 0, 0.5);
    try {
      engine.prefill(0, prompt, &config);
      ADD_FAILURE() << rule;
    } catch (const std::invalid_argument& error) {
      EXPECT_NE(std::string(error.what()).find("use a rule that looks at none (random, uniform, max-min, coverage)"),
                std::string::npos)
          << error.what();
    }
  }
}

// ---- what tokens are compared by ----------------------------------------------------------------------

// Keys of layer K-1 as llama_decode computes them, and the core's choice on them; at K = 0 the rows of the pictures.
TEST(Features, AreKeysAndTheKeptTokensTheCores) {
  for (const char* architecture : {"llama", "qwen2vl", "gemma3", "qwen35"}) {
    const std::string& path = file_of(architecture);
    for (const bool at_0 : {false, true}) {
      const Halves halves(path, at_0 ? ahead() : llava::LoadOptions());
      EngineOptions options = one_thread();
      options.features = true;
      Engine engine(halves, options);
      const Prompt prompt = Builder(halves, 4).text(9).picture(7).text(9).picture(5).text(9).prompt;
      const Reading reading = engine.read(0, prompt);
      const std::vector<fastv::TokenSpan> visual = prompt.visual();
      std::vector<float> all;  // [n, w]
      std::size_t width = 0;
      if (at_0) {
        width = halves.input();
        for (const llava::Piece& piece : prompt.pieces) {
          all.insert(all.end(), piece.rows.begin(), piece.rows.end());
          if (piece.rows.empty()) all.resize(all.size() + piece.count * width);
        }
      } else {
        oracle::Llama llama(path, 1, 512, 512, true, GGML_TYPE_F16, false);
        llama.watch(halves.filtering_layer() - 1);
        static_cast<void>(llama.prefill(prompt));
        all = llama.keys();
        width = all.size() / prompt.tokens();
      }
      ASSERT_EQ(reading.features.size(), 74 * width) << architecture;
      double most = 0;
      const double rounding = at_0 ? 0 : 1e-2 * prompts::largest(all);  // in the cache, and by flash attention
      fastv::for_each_visual(visual, [&](std::size_t number, std::size_t token) {
        for (std::size_t i = 0; i < width; ++i) {
          float& expected = all[token * width + i];
          most = std::max(most, std::abs(static_cast<double>(reading.features[number * width + i] - expected)));
          expected = reading.features[number * width + i];
        }
      });
      EXPECT_LE(most, rounding) << architecture;
      std::vector<float> scores;
      if (!at_0)
        fastv::for_each_visual(visual,
                               [&](std::size_t, std::size_t token) { scores.push_back(reading.scores[token]); });
      for (const char* rule : {"max-min", "coverage", "mmr", "scope"}) {
        const Config config = rule_at(rule, halves.filtering_layer(), 0.7);
        if (at_0 && fastv::uses_scores(config)) continue;
        fastv::Pruner<float> pruner(config);
        const auto rows = fastv::heads(all.data(), fastv::TokenMajor{prompt.tokens(), 1, width});
        const fastv::Kept kept =
            at_0 ? pruner.prune(fastv::with_features(fastv::NoEvidence{prompt.tokens()}, rows), visual)
                 : pruner.prune(fastv::with_features(fastv::Scores<float>{scores, prompt.tokens()}, rows), visual);
        ASSERT_TRUE(kept) << kept.message().c_str();
        EXPECT_EQ(engine.select(reading, &config), std::vector<Index>(kept.begin(), kept.end())) << rule;
      }
    }
  }
}

// ---- weights of heads ---------------------------------------------------------------------------------

// Head by head the rows of the map that llama.cpp computes without flash attention: keys shared by heads (GQA, latent ones),
// sinks, ALiBi; in a second turn too. Their mean is the score, and a weighted sum is what the engine ranks by.
TEST(Heads, AreTheRowsOfTheMap) {
  for (const char* architecture : {"llama", "qwen2vl", "gpt-oss", "bloom", "deepseek2", "gemma2"}) {
    const std::string& path = file_of(architecture);
    const Halves halves(path);
    EngineOptions options = one_thread();
    options.by_head = true;
    Engine engine(halves, options);
    const std::size_t heads = halves.cost_shape().heads;
    oracle::Llama llama(path, 1, 512, 512, true, GGML_TYPE_F16, false);
    llama.watch(halves.filtering_layer() - 1);
    std::size_t past = 0;
    for (const std::uint64_t turn : {1u, 2u}) {
      const llama_pos at = turn == 1 ? 0 : engine.next_position(0);
      const Prompt prompt = Builder(halves, turn, at).text(30).picture(7).text(20).picture(5).text(21).prompt;
      const Reading reading = engine.read(0, prompt);
      static_cast<void>(turn == 1 ? llama.prefill(prompt) : llama.append(prompt));
      ASSERT_EQ(llama.head_rows().size(), heads);
      ASSERT_EQ(reading.by_head.size(), heads * 74);
      double most = 0, largest = 0, of_mean = 0;
      std::vector<float> weights(heads);
      for (std::size_t h = 0; h < heads; ++h) weights[h] = 1.0f / static_cast<float>(heads);
      const std::vector<float> mean = llava::weighted_scores(reading, weights);
      fastv::for_each_visual(prompt.visual(), [&](std::size_t number, std::size_t token) {
        for (std::size_t h = 0; h < heads; ++h) {
          const auto expected = static_cast<double>(llama.head_rows()[h][past + token]);
          largest = std::max(largest, expected);
          most = std::max(most, std::abs(static_cast<double>(reading.by_head[h * 74 + number]) - expected));
        }
        of_mean = std::max(of_mean, std::abs(static_cast<double>(mean[token] - reading.scores[token])));
      });
      EXPECT_LE(most, 0.03 * largest) << architecture << ", turn " << turn;
      EXPECT_LE(of_mean, 1e-6) << architecture;
      past += prompt.tokens();
    }
    options.by_head = false;
    for (std::size_t h = 0; h < heads; ++h) options.head_weights.push_back(h == 1 ? 1.0f : 0.0f);
    Engine weighted(halves, options);
    const Prompt prompt = Builder(halves, 1).text(30).picture(7).text(20).prompt;
    const Reading reading = weighted.read(0, prompt);
    fastv::for_each_visual(prompt.visual(), [&](std::size_t number, std::size_t token) {
      EXPECT_EQ(reading.scores[token], reading.by_head[49 + number]);
    });
  }
}

// A model whose heads in layer 1 all attend evenly, but one.
const std::string& one_head_that_looks(std::size_t decisive) {
  tiny_gguf::LanguageModel spec = tiny_gguf::tiny_model("llama");
  spec.heads = 8;
  spec.kv_heads = 2;
  const std::string& path = prompts::model_file(spec, "one_head_" + std::to_string(decisive));
  ggml_context* all = nullptr;
  const gguf_context_ptr file(gguf_init_from_file(path.c_str(), {true, &all}));
  const ggml_context_ptr names(all);
  const ggml_tensor* query = ggml_get_tensor(all, "blk.1.attn_q.weight");
  const std::size_t at = gguf_get_data_offset(file.get()) +
                         gguf_get_tensor_offset(file.get(), gguf_find_tensor(file.get(), query->name)),
                    head = ggml_nbytes(query) / spec.heads;
  std::fstream bytes(path, std::ios::in | std::ios::out | std::ios::binary);
  for (std::size_t h = 0; h < spec.heads; ++h) {
    if (h == decisive) continue;
    bytes.seekp(static_cast<std::streamoff>(at + h * head));
    bytes.write(std::string(head, '\0').data(), static_cast<std::streamsize>(head));
  }
  return path;
}

// Without the others the order is the same, so nothing is lost; without the one, the first tokens stay. And each weight is
// that of the formula, on divergences measured one by one by engines that leave the head out.
TEST(Heads, TheOneThatLooksIsFound) {
  for (const std::size_t decisive : {0u, 5u}) {
    const Halves halves(one_head_that_looks(decisive));
    const Config config = rule_at("last", 2, 0.7);
    EngineOptions options = one_thread();
    options.by_head = true;
    Engine engine(halves, options);
    // A random model need not go by what it looks at: of random prompts, those on which the head is of use.
    std::vector<Prompt> useful;
    for (std::uint64_t seed = 30; useful.size() < 3 && seed < 60; ++seed) {
      const Prompt prompt = Builder(halves, seed).text(12).picture(8).text(9).picture(6).text(11).prompt;
      const llava::Calibration alone = llava::calibrate(engine, config, 1, [&](std::size_t) { return prompt; });
      if (alone.without[decisive] > alone.divergence) useful.push_back(prompt);
    }
    ASSERT_EQ(useful.size(), 3u);
    const auto prompt = [&](std::size_t p) { return useful[p]; };
    const llava::Calibration found = llava::calibrate(engine, config, useful.size(), prompt);
    ASSERT_EQ(found.weights.size(), 8u);
    for (std::size_t h = 0; h < 8; ++h) EXPECT_EQ(found.weights[h], h == decisive ? 1 : 0) << h;
    EXPECT_EQ(found.prefills, 6u);  // of 27: without one of the other seven the same tokens stay

    const auto vocabulary = static_cast<std::size_t>(llama_vocab_n_tokens(halves.vocabulary()));
    for (const std::size_t left_out : {decisive, std::size_t{2}}) {
      EngineOptions without = one_thread();
      without.head_weights.assign(8, 1);
      without.head_weights[left_out] = 0;
      double mean = 0;
      for (std::size_t p = 0; p < useful.size(); ++p) {
        Engine unpruned(halves, one_thread()), pruned(halves, without);
        unpruned.prefill(0, prompt(p), nullptr);
        pruned.prefill(0, prompt(p), &config);
        const auto probability = [&](const Engine& e) {
          std::vector<double> all;
          double sum = 0;
          for (std::size_t i = 0; i < vocabulary; ++i) all.push_back(std::exp(static_cast<double>(e.logits(0)[i])));
          for (const double x : all) sum += x;
          for (double& x : all) x /= sum;
          return all;
        };
        const std::vector<double> a = probability(unpruned), b = probability(pruned);
        for (std::size_t i = 0; i < vocabulary; ++i) mean += a[i] * std::log(a[i] / b[i]) / 3;
      }
      EXPECT_NEAR(found.without[left_out], mean, 1e-6) << left_out;
    }
  }
}

// Where nothing is dropped no head is missed: all weigh the same.
TEST(Heads, NoneIsMissed) {
  const Halves halves(file_of("llama"));
  EngineOptions options = one_thread();
  options.by_head = true;
  Engine engine(halves, options);
  const llava::Calibration found = llava::calibrate(engine, rule_at("last", 2, 0), 2, [&](std::size_t p) {
    return Builder(halves, p).text(12).picture(6).text(9).prompt;
  });
  for (const float weight : found.weights) EXPECT_EQ(weight, 0.25f);
}

TEST(Heads, AsManyWeightsAsTheLayerHas) {
  EngineOptions options = one_thread();
  options.head_weights = {1, 0, 0};
  for (const bool at_0 : {false, true}) {
    const Halves halves(file_of("llama"), at_0 ? ahead() : llava::LoadOptions());
    try {
      const Engine engine(halves, options);
      ADD_FAILURE();
    } catch (const std::invalid_argument& error) {
      EXPECT_NE(
          std::string(error.what())
              .find(at_0 ? "at K = 0 no heads have ranked" : "3 head weights were given, but layer 1 has 4 heads"),
          std::string::npos)
          << error.what();
    }
  }
}

}  // namespace

// The engine on ggml against llama.cpp itself: without pruning its logits are llama_decode's; with pruning they are
// those of an unmodified llama_decode whose attention mask hides the dropped keys from layer K on.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <numeric>

#include "../oracle.hpp"
#include "llama_oracle.hpp"
#include "tiny_gguf.hpp"

namespace {

using fastv::Config;
using fastv::Index;
using fastv::TokenSpan;
using llava::Engine;
using llava::EngineOptions;
using llava::Prefill;
using llava::Prompt;
using llava::PruneBy;

// One thread: with more, llama.cpp cuts the keys of a step among them by their number, and sums in another order.
constexpr int threads = 1;
constexpr std::size_t steps = 16;

// Written once per run and removed at its end.
const std::string& model_file(const tiny_gguf::LanguageModel& spec, const std::string& name) {
  struct Files {
    std::map<std::string, std::string> by_name;
    ~Files() {
      for (const auto& [key, path] : by_name) std::remove(path.c_str());
    }
  };
  static Files files;
  const auto [entry, fresh] =
      files.by_name.emplace(name, testing::TempDir() + "fastv_" + std::to_string(getpid()) + "_" + name + ".gguf");
  if (fresh) tiny_gguf::write(spec, entry->second);
  return entry->second;
}

tiny_gguf::LanguageModel spec_of(const std::string& architecture, ggml_type type = GGML_TYPE_F32) {
  tiny_gguf::LanguageModel spec;
  spec.architecture = architecture;
  spec.type = type;
  spec.layers = 5;
  spec.hidden = spec.ffn = 256;  // whole blocks of Q4_K
  spec.heads = 8;
  spec.kv_heads = architecture == "qwen" ? 8 : 2;   // qwen has no grouped queries
  if (architecture == "qwen2vl") spec.rms_eps = 0;  // this release of llama.cpp never reads it
  return spec;
}

// A prompt of random embeddings: `text` tokens ahead of each picture and behind the last. M-RoPE: square pictures.
Prompt prompt_of(const llava::Shape& shape, const std::vector<std::size_t>& pictures, std::size_t text,
                 std::uint64_t seed) {
  oracle::Rng random(seed);
  Prompt prompt;
  std::vector<std::array<std::int32_t, 4>> positions;
  const auto words = [&](std::size_t n) {
    for (; n > 0; --n) {
      const std::int32_t p = prompt.next_position++;
      positions.push_back({p, p, p, 0});
    }
  };
  words(text);
  for (const std::size_t count : pictures) {
    const auto side = static_cast<std::size_t>(std::lround(std::sqrt(static_cast<double>(count))));
    const std::size_t columns = side * side == count ? side : 0;
    prompt.visual.push_back({positions.size(), count, columns});
    if (!shape.m_rope()) {
      words(count);
    } else {
      const std::int32_t first = prompt.next_position;
      for (std::size_t i = 0; i < count; ++i)
        positions.push_back(
            {first, first + static_cast<std::int32_t>(i / columns), first + static_cast<std::int32_t>(i % columns), 0});
      prompt.next_position += static_cast<std::int32_t>(columns);
    }
    words(text);
  }
  prompt.tokens = positions.size();
  for (int axis = 0; axis < shape.position_axes(); ++axis)
    for (const auto& position : positions) prompt.positions.push_back(position[static_cast<std::size_t>(axis)]);
  prompt.embeddings.resize(prompt.tokens * static_cast<std::size_t>(shape.hidden));
  for (float& x : prompt.embeddings) x = static_cast<float>(random.real(-1, 1));
  return prompt;
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double most = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double difference = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    if (!(difference <= most)) most = difference;  // NaN too
  }
  return most;
}

std::int32_t likeliest(const std::vector<float>& logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// Both decode the tokens that llama.cpp finds likeliest.
double decode_difference(const Engine& engine, llava::Cache& cache, oracle::Llama& llama, std::int32_t token) {
  double most = 0;
  for (std::size_t step = 0; step < steps; ++step) {
    const std::vector<float> expected = llama.decode(token);
    most = std::max(most, largest_difference(engine.decode(token, cache), expected));
    token = likeliest(expected);
  }
  return most;
}

struct Loaded {
  Loaded(const tiny_gguf::LanguageModel& spec, const std::string& name)
      : path(model_file(spec, name)), model(path, backends()) {}
  static const llava::Backends& backends() {
    static const llava::Backends all(threads);
    return all;
  }
  std::string path;
  llava::Model model;
};

std::size_t room(const Prompt& prompt) { return (prompt.tokens + steps + 255) / 256 * 256; }

// ---- without pruning ----------------------------------------------------------------------------

struct Kind {
  const char* architecture;
  ggml_type type;
  double tolerance;
};
void PrintTo(const Kind& kind, std::ostream* out) { *out << kind.architecture << " " << ggml_type_name(kind.type); }

class Unpruned : public testing::TestWithParam<Kind> {};

TEST_P(Unpruned, LogitsAreLlamaDecodes) {
  const Kind kind = GetParam();
  const Loaded loaded(spec_of(kind.architecture, kind.type),
                      std::string(kind.architecture) + "_" + ggml_type_name(kind.type));
  // The second is longer than a piece, so that it goes through the layers in two.
  for (const std::size_t picture : {36u, 576u}) {
    const Prompt prompt = prompt_of(loaded.model.shape(), {picture}, 20, picture);
    const Engine engine(loaded.model, Loaded::backends());
    llava::Cache cache = engine.cache(engine.plan(prompt, {}), steps);
    const Prefill prefill = engine.prefill(prompt, {}, cache);
    oracle::Llama llama(loaded.path, threads, room(prompt), 512);
    const std::vector<float> expected = llama.prefill(prompt);
    const double at_prefill = largest_difference(prefill.logits, expected);
    const double decoding = decode_difference(engine, cache, llama, likeliest(expected));
    std::printf("%s %s, %zu tokens: logits differ by %.2g at the prefill and %.2g in %zu steps\n", kind.architecture,
                ggml_type_name(kind.type), prompt.tokens, at_prefill, decoding, steps);
    EXPECT_LE(at_prefill, kind.tolerance);
    EXPECT_LE(decoding, kind.tolerance);
    EXPECT_GT(largest_difference(expected, std::vector<float>(expected.size(), expected[0])), 0.1) << "flat logits";
  }
}

INSTANTIATE_TEST_SUITE_P(Models, Unpruned,
                         testing::Values(Kind{"llama", GGML_TYPE_F32, 1e-5}, Kind{"llama", GGML_TYPE_F16, 1e-5},
                                         Kind{"llama", GGML_TYPE_Q8_0, 1e-5}, Kind{"llama", GGML_TYPE_Q4_0, 1e-5},
                                         Kind{"llama", GGML_TYPE_Q4_K, 1e-5}, Kind{"qwen", GGML_TYPE_F32, 1e-5},
                                         Kind{"qwen2", GGML_TYPE_F32, 1e-5}, Kind{"qwen2vl", GGML_TYPE_F32, 1e-5}));

TEST(Unpruned, WithWhatLlamaFilesMayHaveBesides) {
  tiny_gguf::LanguageModel spec = spec_of("llama");
  spec.biases = spec.tied = spec.rope_factors = true;
  const Loaded loaded(spec, "llama_biases");
  const Prompt prompt = prompt_of(loaded.model.shape(), {36}, 20, 1);
  const Engine engine(loaded.model, Loaded::backends());
  llava::Cache cache = engine.cache(engine.plan(prompt, {}), steps);
  oracle::Llama llama(loaded.path, threads, room(prompt), 512);
  const std::vector<float> expected = llama.prefill(prompt);
  EXPECT_LE(largest_difference(engine.prefill(prompt, {}, cache).logits, expected), 1e-5);
  EXPECT_LE(decode_difference(engine, cache, llama, likeliest(expected)), 1e-5);
}

// ---- with pruning -------------------------------------------------------------------------------

struct Scene {
  const char* name;
  const char* architecture;
  std::vector<std::size_t> pictures;
  std::size_t filtering_layer;
  std::size_t keep;  // of all pictures; by_ratio: half
};
void PrintTo(const Scene& scene, std::ostream* out) { *out << scene.name; }

class Pruned : public testing::TestWithParam<Scene> {};

TEST_P(Pruned, LogitsAreThoseOfAMaskedLlamaDecode) {
  const Scene scene = GetParam();
  const Loaded loaded(spec_of(scene.architecture), std::string(scene.architecture) + "_f32");
  // Enough text that what is left has 64 tokens: ggml's flash attention sums in F32 from there on, and in F16, to about
  // 1e-3, below.
  const Prompt prompt = prompt_of(loaded.model.shape(), scene.pictures, 40, 7);
  Config config;
  config.filtering_layer = scene.filtering_layer;
  config.keep_count = scene.keep;

  EngineOptions options;
  options.piece = 512;
  std::vector<Prefill> ways;
  double decoding = 0;
  for (const PruneBy way : {PruneBy::graph, PruneBy::between_graphs}) {
    options.prune_by = way;
    const Engine engine(loaded.model, Loaded::backends(), options);
    const fastv::Plan plan = engine.plan(prompt, {config});
    llava::Cache cache = engine.cache(plan, steps);
    ways.push_back(engine.prefill(prompt, {config}, cache));
    EXPECT_EQ(ways.back().kept.size(), plan.kept());
    for (std::size_t layer = 0; layer < plan.layers; ++layer)
      EXPECT_EQ(cache.length(layer), plan.kv_length(layer)) << "layer " << layer;

    // The mask of the oracle covers the whole prompt at once.
    oracle::Llama llama(loaded.path, threads, room(prompt), room(prompt));
    llama.hide_all_but(scene.filtering_layer, ways.back().kept, prompt.tokens);
    const std::vector<float> expected = llama.prefill(prompt);
    EXPECT_LE(largest_difference(ways.back().logits, expected), 1e-3);
    decoding = std::max(decoding, decode_difference(engine, cache, llama, likeliest(expected)));
    EXPECT_LE(decoding, 2e-3);  // the steps attend in F16, and a bit of the F16 cache may have rounded the other way
    for (std::size_t layer = 0; layer < plan.layers; ++layer)
      EXPECT_EQ(cache.length(layer), plan.kv_length(layer, steps)) << "layer " << layer;
  }

  // The kept tokens are the core's on the same scores, and the same every way.
  for (const Prefill& way : ways) {
    std::vector<float> scores;
    for (const TokenSpan& span : prompt.visual)
      scores.insert(scores.end(), way.scores.at(0).begin() + static_cast<std::ptrdiff_t>(span.first),
                    way.scores.at(0).begin() + static_cast<std::ptrdiff_t>(span.first + span.count));
    fastv::Pruner<float> pruner(config);
    const fastv::Kept kept = pruner.prune(fastv::Scores<float>{scores, prompt.tokens}, prompt.visual);
    ASSERT_TRUE(kept) << kept.message().c_str();
    EXPECT_TRUE(std::equal(kept.begin(), kept.end(), way.kept.begin(), way.kept.end()));
    EXPECT_EQ(way.kept, ways.front().kept);
    for (const TokenSpan& span : prompt.visual)
      for (std::size_t i = span.first; i < span.first + span.count; ++i)
        EXPECT_NEAR(way.scores[0][i], ways.front().scores[0][i], 1e-6f);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Scenes, Pruned,
    testing::Values(Scene{"llama, one picture", "llama", {36}, 2, fastv::by_ratio},
                    Scene{"llama, K = 1", "llama", {36}, 1, fastv::by_ratio},
                    Scene{"llama, prune in the last layer only", "llama", {36}, 4, fastv::by_ratio},
                    Scene{"llama, two pictures", "llama", {36, 25}, 2, fastv::by_ratio},
                    Scene{"llama, keep one", "llama", {36}, 2, 1},
                    Scene{"llama, keep all but one", "llama", {36}, 2, 35},
                    Scene{"llama, keep all", "llama", {36}, 2, 36}, Scene{"llama, keep none", "llama", {36}, 2, 0},
                    Scene{"llama, LLaVA-1.5's geometry", "llama", {576}, 2, 144},
                    Scene{"llama, eight frames of 256", "llama", std::vector<std::size_t>(8, 256), 2, fastv::by_ratio},
                    Scene{"qwen, one picture", "qwen", {256}, 2, 64},
                    Scene{"qwen2, two pictures", "qwen2", {36, 25}, 3, 20},
                    Scene{"qwen2vl, one picture", "qwen2vl", {144}, 2, 36},
                    Scene{"qwen2vl, two pictures", "qwen2vl", {36, 64}, 2, fastv::by_ratio},
                    Scene{"qwen2vl, longer than a piece", "qwen2vl", {625}, 2, 100}));

TEST(Engine, EveryCountFromOneToAll) {
  const Loaded loaded(spec_of("llama"), "llama_f32");
  const Prompt prompt = prompt_of(loaded.model.shape(), {25}, 6, 3);
  for (std::size_t keep = 1; keep <= 25; ++keep) {
    Config config;
    config.keep_count = keep;
    const Engine engine(loaded.model, Loaded::backends());
    llava::Cache cache = engine.cache(engine.plan(prompt, {config}), 0);
    const Prefill prefill = engine.prefill(prompt, {config}, cache);
    oracle::Llama llama(loaded.path, threads, room(prompt), room(prompt));
    llama.hide_all_but(2, prefill.kept, prompt.tokens);
    EXPECT_LE(largest_difference(prefill.logits, llama.prefill(prompt)), 1e-3) << keep;
  }
}

TEST(Engine, ThePieceDoesNotMatter) {
  const Loaded loaded(spec_of("qwen2vl"), "qwen2vl_f32");
  const Prompt prompt = prompt_of(loaded.model.shape(), {144, 100}, 9, 5);
  std::vector<Prefill> runs;
  for (const std::size_t piece : {1000u, 64u, 33u}) {
    EngineOptions options;
    options.piece = piece;
    for (const PruneBy way : {PruneBy::graph, PruneBy::between_graphs}) {
      options.prune_by = way;
      const Engine engine(loaded.model, Loaded::backends(), options);
      llava::Cache cache = engine.cache(engine.plan(prompt, {Config{}}), 0);
      runs.push_back(engine.prefill(prompt, {Config{}}, cache));
      EXPECT_EQ(runs.back().kept, runs.front().kept) << piece;
      // Pieces of fewer than 64 tokens are summed in F16; the largest logit is about 3.
      EXPECT_LE(largest_difference(runs.back().logits, runs.front().logits), 0.03) << piece;
    }
  }
}

TEST(Engine, StagesInOneGraphAndBetweenGraphsAgree) {
  const Loaded loaded(spec_of("llama"), "llama_f32");
  const Prompt prompt = prompt_of(loaded.model.shape(), {100, 36}, 9, 6);
  std::vector<Config> schedule(2);
  schedule[0].filtering_layer = 1;
  schedule[1].filtering_layer = 3;
  std::vector<Prefill> runs;
  for (const PruneBy way : {PruneBy::graph, PruneBy::between_graphs}) {
    EngineOptions options;
    options.prune_by = way;
    const Engine engine(loaded.model, Loaded::backends(), options);
    const fastv::Plan plan = engine.plan(prompt, schedule);
    llava::Cache cache = engine.cache(plan, 2);
    runs.push_back(engine.prefill(prompt, schedule, cache));
    EXPECT_EQ(runs.back().kept.size(), plan.kept());
    for (std::size_t layer = 0; layer < plan.layers; ++layer) EXPECT_EQ(cache.length(layer), plan.kv_length(layer));
    EXPECT_EQ(engine.decode(1, cache).size(), runs.back().logits.size());
  }
  EXPECT_EQ(runs[0].kept, runs[1].kept);
  EXPECT_LE(largest_difference(runs[0].logits, runs[1].logits), 1e-4);
}

TEST(Engine, AQuantisedCacheStaysClose) {
  const Loaded loaded(spec_of("llama"), "llama_f32");
  const Prompt prompt = prompt_of(loaded.model.shape(), {144}, 20, 8);
  EngineOptions options;
  options.cache_type = GGML_TYPE_Q8_0;
  const Engine engine(loaded.model, Loaded::backends(), options), exact(loaded.model, Loaded::backends());
  llava::Cache cache = engine.cache(engine.plan(prompt, {}), steps);
  llava::Cache exact_cache = exact.cache(exact.plan(prompt, {}), steps);
  EXPECT_LT(cache.bytes() * 10, exact_cache.bytes() * 6);  // 34 bytes for 32 elements, not 64
  const std::vector<float> a = engine.prefill(prompt, {}, cache).logits,
                           b = exact.prefill(prompt, {}, exact_cache).logits;
  EXPECT_LE(largest_difference(a, b), 0.2);  // the largest logit is about 3
  EXPECT_GT(largest_difference(a, b), 0);
}

TEST(Engine, SaysWhatIsWrong) {
  const Loaded loaded(spec_of("llama"), "llama_f32");
  const Engine engine(loaded.model, Loaded::backends());
  const Prompt prompt = prompt_of(loaded.model.shape(), {36}, 5, 1);
  Config late;
  late.filtering_layer = 5;
  EXPECT_THROW(engine.plan(prompt, {late}), std::invalid_argument);
  EXPECT_THROW(engine.embed({-1}), std::out_of_range);
  EXPECT_THROW(engine.embed({1 << 20}), std::out_of_range);
  llava::Cache cache = engine.cache(engine.plan(prompt, {}), 0);
  engine.prefill(prompt, {}, cache);
  std::size_t decoded = 0;
  EXPECT_THROW(for (; decoded < 1000; ++decoded) engine.decode(1, cache), std::length_error);
  EXPECT_EQ(decoded, 256 - prompt.tokens);  // the cache is rounded up to whole steps of keys
}

TEST(Model, SaysWhatIsWrongWithAFile) {
  const llava::Backends& backends = Loaded::backends();
  const auto message = [&](const std::string& path) -> std::string {
    try {
      llava::Model model(path, backends);
      return "nothing";
    } catch (const std::runtime_error& error) {
      return error.what();
    }
  };
  const std::string text = testing::TempDir() + "fastv_" + std::to_string(getpid()) + "_text.gguf",
                    cut = testing::TempDir() + "fastv_" + std::to_string(getpid()) + "_cut.gguf";
  std::FILE* file = std::fopen(text.c_str(), "w");
  std::fputs("no model", file);
  std::fclose(file);
  EXPECT_NE(message(text).find("is not a GGUF file"), std::string::npos) << message(text);
  EXPECT_NE(message(testing::TempDir() + "fastv_none.gguf").find("cannot open"), std::string::npos);

  // The last tensor's bytes are missing.
  file = std::fopen(model_file(spec_of("llama"), "llama_f32").c_str(), "rb");
  std::vector<char> bytes(1 << 26);
  bytes.resize(std::fread(bytes.data(), 1, bytes.size(), file));
  std::fclose(file);
  file = std::fopen(cut.c_str(), "wb");
  std::fwrite(bytes.data(), 1, bytes.size() - 4096, file);
  std::fclose(file);
  EXPECT_NE(message(cut).find("cut short"), std::string::npos) << message(cut);
  std::remove(text.c_str());
  std::remove(cut.c_str());
}

}  // namespace

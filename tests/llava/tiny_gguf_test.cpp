// The random models of tiny_gguf.hpp, as llama.cpp sees them.
#include "tiny_gguf.hpp"

#include <gguf.h>
#include <gtest/gtest.h>
#include <llama.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <memory>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "command.hpp"

namespace {

std::string path(const std::string& name) {
  return testing::TempDir() + "tiny_" + std::to_string(getpid()) + "_" + name + ".gguf";
}

// A model's file, gone at the end.
template <class Model>
struct File {
  File(const Model& model, const std::string& label) : name(path(label)) { tiny_gguf::write(model, name); }
  ~File() { std::remove(name.c_str()); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  std::string bytes() const {
    std::ifstream in(name, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  std::string name;
};

struct Free {
  void operator()(llama_model* p) const { llama_model_free(p); }
  void operator()(llama_context* p) const { llama_free(p); }
};
using LoadedModel = std::unique_ptr<llama_model, Free>;

LoadedModel load(const std::string& file, bool vocabulary_only = false) {
  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
      },
      nullptr);
  ggml_backend_load_all();
  llama_model_params params = llama_model_default_params();
  params.vocab_only = vocabulary_only;
  return LoadedModel(llama_model_load_from_file(file.c_str(), params));
}

std::vector<llama_token> tokens(const llama_vocab* vocabulary, const std::string& text) {
  std::vector<llama_token> out(text.size() + 2);
  const int count = llama_tokenize(vocabulary, text.data(), static_cast<int>(text.size()), out.data(),
                                   static_cast<int>(out.size()), true, true);
  out.resize(static_cast<std::size_t>((std::max)(count, 0)));
  return out;
}

std::vector<float> logits(llama_model* model, const std::string& text) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = 256;
  params.n_threads = params.n_threads_batch = 1;
  const std::unique_ptr<llama_context, Free> context(llama_init_from_model(model, params));
  const llama_vocab* vocabulary = llama_model_get_vocab(model);
  std::vector<llama_token> ids = tokens(vocabulary, text);
  if (llama_decode(context.get(), llama_batch_get_one(ids.data(), static_cast<int>(ids.size()))) != 0) return {};
  const float* row = llama_get_logits_ith(context.get(), -1);
  return {row, row + llama_vocab_n_tokens(vocabulary)};
}

void expect_healthy(const tiny_gguf::LanguageModel& spec, const std::string& what) {
  SCOPED_TRACE(what);
  const File file(spec, "model");
  const LoadedModel model = load(file.name);
  ASSERT_TRUE(model);
  EXPECT_EQ(llama_model_n_layer(model.get()), static_cast<int>(spec.layers));
  EXPECT_EQ(llama_model_n_embd(model.get()), static_cast<int>(spec.hidden));
  EXPECT_EQ(llama_model_n_head_kv(model.get()), static_cast<int>(spec.kv_heads));
  const std::vector<float> one = logits(model.get(), "what is in this picture?");
  const std::vector<float> other = logits(model.get(), "how many digits are there?");
  ASSERT_FALSE(one.empty());
  EXPECT_TRUE(std::all_of(one.begin(), one.end(), [](float x) { return std::isfinite(x); }));
  const auto [low, high] = std::minmax_element(one.begin(), one.end());
  EXPECT_GT(*high - *low, 1.f);    // some tokens are likelier than others
  EXPECT_LT(*high - *low, 200.f);  // and the states did not grow out of bounds
  EXPECT_NE(one, other);           // and it depends on the words
}

TEST(TinyGguf, EveryArchitectureAndTypeRunsInLlama) {
  for (const char* architecture : {"llama", "qwen", "qwen2", "qwen2vl"}) {
    for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
      tiny_gguf::LanguageModel spec;
      spec.architecture = architecture;
      spec.type = type;
      expect_healthy(spec, std::string(architecture) + " " + ggml_type_name(type));
    }
    tiny_gguf::LanguageModel wide;
    wide.architecture = architecture;
    wide.hidden = 256;
    wide.ffn = 512;
    wide.layers = 2;
    wide.type = GGML_TYPE_Q4_K;
    expect_healthy(wide, std::string(architecture) + " q4_K");
  }
}

TEST(TinyGguf, EveryOptionRunsInLlama) {
  tiny_gguf::LanguageModel spec;
  spec.kv_heads = 2;
  expect_healthy(spec, "grouped queries");
  spec.biases = true;
  expect_healthy(spec, "biases");
  spec.rope_factors = true;
  spec.rope_base = 500000;
  expect_healthy(spec, "rope factors");
  spec.tied = true;
  expect_healthy(spec, "tied");
  spec.architecture = "qwen2vl";
  spec.rope_factors = spec.biases = false;
  expect_healthy(spec, "qwen2vl, grouped and tied");
}

TEST(TinyGguf, OneSpecificationIsOneFile) {
  tiny_gguf::LanguageModel spec;
  EXPECT_EQ(File(spec, "a").bytes(), File(spec, "b").bytes());
  tiny_gguf::LanguageModel other = spec;
  other.seed = 9;
  EXPECT_NE(File(spec, "a").bytes(), File(other, "b").bytes());
  tiny_gguf::VisionModel vision;
  EXPECT_EQ(File(vision, "a").bytes(), File(vision, "b").bytes());
  // The same on every machine: FNV-1a of the file written where this test was.
  std::uint64_t hash = 0xCBF29CE484222325u;
  for (const char c : File(spec, "a").bytes()) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
  EXPECT_EQ(hash, 15987508330549571300u);
}

// llama.cpp runs with any sections, but only those of half a head rotate all of it.
TEST(TinyGguf, SectionsOfMRopeCoverHalfAHead) {
  for (const std::uint32_t hidden : {64u, 128u, 512u}) {
    tiny_gguf::LanguageModel spec;
    spec.architecture = "qwen2vl";
    spec.hidden = hidden;
    const File file(spec, "sections");
    gguf_context* gguf = gguf_init_from_file(file.name.c_str(), {true, nullptr});
    ASSERT_NE(gguf, nullptr);
    const std::int64_t key = gguf_find_key(gguf, "qwen2vl.rope.dimension_sections");
    ASSERT_GE(key, 0);
    ASSERT_EQ(gguf_get_arr_n(gguf, key), 4u);
    const auto* sections = static_cast<const std::int32_t*>(gguf_get_arr_data(gguf, key));
    EXPECT_EQ(sections[0] + sections[1] + sections[2] + sections[3], static_cast<int>(hidden / spec.heads / 2));
    EXPECT_GT(std::min({sections[0], sections[1], sections[2]}), 0);
    gguf_free(gguf);
  }
}

// More weights than are made afresh: rows still differ, and the file is whole.
TEST(TinyGguf, LongTensorsRepeatWithoutEqualRows) {
  tiny_gguf::LanguageModel spec;
  spec.layers = 1;
  spec.hidden = 256;
  spec.ffn = 32768;  // 8 million weights a matrix, four times the pool
  const File file(spec, "long");
  ggml_context* tensors = nullptr;
  gguf_context* gguf = gguf_init_from_file(file.name.c_str(), {false, &tensors});
  ASSERT_NE(gguf, nullptr);
  const ggml_tensor* up = ggml_get_tensor(tensors, "blk.0.ffn_up.weight");
  const auto* values = static_cast<const float*>(up->data);
  std::set<std::vector<float>> rows;
  for (std::size_t row = 0; row < 32768; ++row) rows.insert({values + row * 256, values + row * 256 + 8});
  EXPECT_EQ(rows.size(), 32768u);
  gguf_free(gguf);
  ggml_free(tensors);
}

TEST(TinyGguf, TheSmallVocabulariesSplitEnglish) {
  for (const char* architecture : {"llama", "qwen2"}) {
    SCOPED_TRACE(architecture);
    tiny_gguf::LanguageModel spec;
    spec.architecture = architecture;
    spec.vocabulary = 1000;
    const File file(spec, "words");
    const LoadedModel model = load(file.name, true);
    ASSERT_TRUE(model);
    const llama_vocab* vocabulary = llama_model_get_vocab(model.get());
    EXPECT_EQ(llama_vocab_n_tokens(vocabulary), 1000);
    const std::string text = "what is in the picture? Zürich, 42!";
    const std::vector<llama_token> ids = tokens(vocabulary, text);
    EXPECT_LT(ids.size(), 30u);  // the five words are tokens; a byte each would be 36
    std::string again(100, '\0');
    const int count =
        llama_detokenize(vocabulary, ids.data(), static_cast<int>(ids.size()), again.data(), 100, true, true);
    again.resize(static_cast<std::size_t>((std::max)(count, 0)));
    EXPECT_EQ(stripped(again), text);
    EXPECT_NE(llama_vocab_eos(vocabulary), LLAMA_TOKEN_NULL);
  }
  tiny_gguf::LanguageModel spec;
  spec.architecture = "qwen2vl";
  const File file(spec, "words");
  const LoadedModel model = load(file.name, true);
  ASSERT_TRUE(model);
  for (const char* control : {"<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"})
    EXPECT_EQ(tokens(llama_model_get_vocab(model.get()), control).size(), 1u) << control;
}

TEST(TinyGguf, AVocabularyCanBeTakenOver) {
  tiny_gguf::LanguageModel spec;
  spec.vocabulary = 777;
  const File from(spec, "from");
  tiny_gguf::LanguageModel taker;
  taker.vocabulary_from = from.name;
  const File file(taker, "taker");
  const LoadedModel model = load(file.name);
  ASSERT_TRUE(model);
  EXPECT_EQ(llama_vocab_n_tokens(llama_model_get_vocab(model.get())), 777);
}

std::string complaint(const std::function<void()>& act) {
  try {
    act();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

TEST(TinyGguf, WrongSpecificationsAreRefused) {
  const auto says = [](void (*change)(tiny_gguf::LanguageModel&)) {
    tiny_gguf::LanguageModel spec;
    change(spec);
    return complaint([&] { tiny_gguf::write(spec, path("wrong")); });
  };
  using M = tiny_gguf::LanguageModel;
  EXPECT_NE(says([](M& m) { m.architecture = "gpt"; }).find("gpt"), std::string::npos);
  EXPECT_NE(says([](M& m) { m.heads = 5; }).find("heads 5"), std::string::npos);
  EXPECT_NE(says([](M& m) { m.kv_heads = 3; }).find("kv_heads is 3"), std::string::npos);
  EXPECT_NE(says([](M& m) { m.type = GGML_TYPE_Q4_K; }).find("blocks of 256"), std::string::npos);
  EXPECT_NE(says([](M& m) { m.vocabulary_from = "/no/such"; }).find("/no/such"), std::string::npos);
  EXPECT_FALSE(std::ifstream(path("wrong")));
  EXPECT_NE(complaint([] { tiny_gguf::write(tiny_gguf::LanguageModel(), "/no/such/x.gguf"); }).find("/no/such/x.gguf"),
            std::string::npos);
  const auto says_of_vision = [](const char* projector, void (*change)(tiny_gguf::VisionModel&)) {
    tiny_gguf::VisionModel spec;
    spec.projector = projector;
    change(spec);
    return complaint([&] { tiny_gguf::write(spec, path("wrong")); });
  };
  using V = tiny_gguf::VisionModel;
  EXPECT_NE(says_of_vision("ldp", [](V&) {}).find("\"ldp\" but must be one of mlp, "), std::string::npos);
  EXPECT_NE(says_of_vision("qwen2vl_merger", [](V& m) { m.merge = 3; }).find("merge is 3"), std::string::npos);
  EXPECT_NE(says_of_vision("internvl", [](V& m) { m.merge = 4; }).find("patches of a side, 6"), std::string::npos);
  EXPECT_NE(says_of_vision("kimivl", [](V& m) { m.merge = 1; }).find("at least 2"), std::string::npos);
  EXPECT_NE(says_of_vision("resampler", [](V&) {}).find("projection is 64"), std::string::npos);
  EXPECT_NE(says_of_vision("qwen3vl_merger", [](V& m) { m.deepstack = 3; }).find("deepstack is 3"), std::string::npos);
  EXPECT_NE(says_of_vision("pixtral", [](V& m) { m.heads = 24; }).find("multiple of 4"), std::string::npos);
}

class Projectors : public testing::TestWithParam<tiny_gguf::Projector> {};

TEST_P(Projectors, RunInMtmdCli) {
  NEEDS_MTMD_CLI();
  const tiny_gguf::Projector& projector = GetParam();
  tiny_gguf::VisionModel vision;
  vision.projector = projector.name;
  if (projector.name == "resampler") vision.projection = 128;
  const File tokenizer(tiny_gguf::Tokenizer{projector.architecture, projector.markers, 0}, "tokenizer");
  tiny_gguf::LanguageModel spec;
  spec.architecture = projector.architecture;
  spec.hidden = vision.projection;
  if (!projector.markers.empty()) spec.vocabulary_from = tokenizer.name;
  const File model(spec, "model");
  const File mmproj(vision, "mmproj");
  std::vector<std::string> arguments = {"-m",       model.name,
                                        "--mmproj", mmproj.name,
                                        "--image",  FASTV_TEST_PICTURE,
                                        "-p",       "what is in this picture?",
                                        "-n",       "16",
                                        "--temp",   "0",
                                        "-c",       "1024",
                                        "-t",       "1"};
  // lfm2 cuts a picture with more tokens than that into tiles of 1,024 each.
  if (projector.name != "lfm2")
    arguments.insert(arguments.end(), {"--image-min-tokens", "9", "--image-max-tokens", "64"});
  const CommandResult result = run_mtmd_cli(arguments);
  EXPECT_EQ(result.status, 0);
  EXPECT_FALSE(stripped(result.output).empty());
}

INSTANTIATE_TEST_SUITE_P(TinyGguf, Projectors, testing::ValuesIn(tiny_gguf::projectors()), [](const auto& one) {
  std::string name = one.param.name;
  for (char& c : name)
    if (c == '.' || c == '-') c = '_';  // GoogleTest wants letters and digits
  return name;
});

TEST(TinyGguf, DeepStackIsSpreadOverTheLayers) {
  tiny_gguf::VisionModel spec;
  spec.projector = "qwen3vl_merger";
  spec.layers = 4;
  for (const auto& [count, expected] : std::vector<std::pair<std::uint32_t, std::vector<int>>>{
           {0, {}}, {1, {2}}, {2, {1, 2}}, {3, {1, 2, 3}}, {4, {0, 1, 2, 3}}}) {
    spec.deepstack = count;
    const File file(spec, "deepstack");
    gguf_context* gguf = gguf_init_from_file(file.name.c_str(), {true, nullptr});
    ASSERT_NE(gguf, nullptr);
    std::vector<int> layers;
    for (int layer = 0; layer < 4; ++layer)
      if (gguf_find_tensor(gguf, ("v.deepstack." + std::to_string(layer) + ".fc1.weight").c_str()) >= 0)
        layers.push_back(layer);
    EXPECT_EQ(layers, expected);
    gguf_free(gguf);
  }
}

TEST(TinyGguf, MarkersAreSingleTokens) {
  for (const tiny_gguf::Projector& projector : tiny_gguf::projectors()) {
    const File tokenizer(tiny_gguf::Tokenizer{projector.architecture, projector.markers, 0}, "tokenizer");
    const LoadedModel model = load(tokenizer.name, true);
    ASSERT_TRUE(model) << projector.name;
    const llama_vocab* vocabulary = llama_model_get_vocab(model.get());
    for (const std::string& marker : projector.markers) {
      const std::size_t alone = llama_vocab_get_add_bos(vocabulary) ? 2 : 1;
      EXPECT_EQ(tokens(vocabulary, marker).size(), alone) << projector.name << ": " << marker;
    }
  }
}

}  // namespace

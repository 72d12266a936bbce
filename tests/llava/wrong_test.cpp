// What can be wrong with files, settings and sizes, and files of every kind.
#include <ggml-cpp.h>
#include <gguf.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <functional>

#include "album.hpp"
#include "engine.hpp"
#include "prompts.hpp"

namespace {

using fastv::Config;
using llava::Engine;
using llava::EngineOptions;
using llava::Halves;
using llava::Prompt;
using prompts::Builder;
using prompts::largest_difference;
using prompts::llama_file;
using prompts::one_thread;

std::string message_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "nothing";
}
void expect_says(const std::function<void()>& work, const std::string& part) {
  const std::string message = message_of(work);
  EXPECT_NE(message.find(part), std::string::npos) << message;
}

TEST(Wrong, FilteringLayersThatCannotBe) {
  const auto load = [](const char* architecture, std::uint32_t k) {
    llava::LoadOptions options;
    options.filtering_layer = k;
    const Halves halves(prompts::model_file(tiny_gguf::tiny_model(architecture), architecture), options);
  };
  expect_says([&] { load("gemma3", 2); },
              "K is 2, but this model of 12 layers can be pruned behind K = 6 alone, or ahead of the first at K = 0");
  expect_says([&] { load("llama", 8); }, "K = 1-7 alone");
  expect_says([&] { load("chameleon", 0); }, "aborts where a call asks for no logits");
  expect_says([&] { load("llama4", 2); }, "K = 4 alone");
  tiny_gguf::LanguageModel spec = tiny_gguf::tiny_model("qwen3vl");
  spec.deepstack = 3;
  const Halves deep(prompts::model_file(spec, "qwen3vl_deepstack"));  // rows of pictures reach its first three layers
  EXPECT_EQ(deep.filtering_layer(), 3u);
  EXPECT_EQ(deep.input(), 4 * deep.hidden());
  expect_says([&] { load("qwen35", 3); }, "K = 4 alone");
}

// Models that libllama tells apart by their number of layers.
TEST(Wrong, LayersThatAreCounted) {
  tiny_gguf::LanguageModel spec = tiny_gguf::tiny_model("gemma3");
  spec.layers = 62;
  expect_says([&] { Halves{prompts::model_file(spec, "gemma3_62")}; }, "by the number of layers, 62");
  const Halves scout(prompts::model_file(tiny_gguf::tiny_model("llama4"), "llama4"));
  Engine engine(scout, one_thread());
  const Prompt late = Builder(scout, 1, 8190).text(5).prompt;
  expect_says([&] { engine.read(0, late); }, "8195 positions, but behind 8191");
}

TEST(Wrong, SettingsAndRoom) {
  const Halves halves(llama_file());
  Engine engine(halves, one_thread(256));
  const Prompt prompt = Builder(halves, 1).text(5).picture(6).text(5).prompt;
  Config other;
  other.filtering_layer = 3;
  expect_says([&] { engine.prefill(0, prompt, &other); }, "the model was cut at 2");
  Config many;
  many.keep_count = 37;
  expect_says([&] { engine.prefill(0, prompt, &many); }, "37");
  expect_says([&] { engine.prefill(1, prompt, nullptr); }, "there is no sequence 1");
  expect_says([&] { engine.read(0, Prompt{}); }, "the prompt is empty");
  const Prompt ends_in_picture = Builder(halves, 1).text(5).picture(6).prompt;
  Config half;
  expect_says([&] { engine.prefill(0, ends_in_picture, &half); }, "last");
  engine.forget(0);
  engine.prefill(0, prompt, nullptr);
  expect_says(
      [&] {
        for (int i = 0; i < 1000; ++i) engine.decode({{0, 1}});
      },
      "the context is full");
  Engine wide(halves, one_thread(1024));
  EngineOptions narrow = one_thread(1024);
  narrow.batch = 16;
  Engine thin(halves, narrow);
  const llava::Reading reading = thin.read(0, prompt);
  thin.finish(0, reading, thin.select(reading, nullptr));
  wide.prefill(0, prompt, nullptr);
  EXPECT_LE(largest_difference(thin.logits(0), {wide.logits(0), wide.logits(0) + 64}), 0.03);
  llava::Steps all;
  all.rows.append(reading.rows);
  expect_says([&] { thin.conclude(0, all, 0, reading.tokens, 100); }, "46 tokens go into one call, but -b");
  Engine small(halves, one_thread(256));
  expect_says([&] { small.prefill(0, Builder(halves, 1).text(600).prompt, nullptr); }, "the context is full");
  expect_says([&] { engine.logits(7); }, "there are no logits of row 7");
}

TEST(Wrong, Files) {
  const std::string text = testing::TempDir() + "fastv_" + std::to_string(getpid()) + "_text.gguf",
                    cut = testing::TempDir() + "fastv_" + std::to_string(getpid()) + "_cut.gguf";
  std::ofstream(text) << "no model";
  expect_says([&] { Halves{text}; }, "is not a GGUF file");
  expect_says([&] { Halves{testing::TempDir() + "fastv_none.gguf"}; }, "cannot open");
  tiny_gguf::write(tiny_gguf::VisionModel{}, text);
  expect_says([&] { Halves{text}; }, "vision encoder");

  // The last tensor's bytes are missing.
  std::ifstream whole(llama_file(), std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(whole), {}};
  std::ofstream(cut, std::ios::binary) << bytes.substr(0, bytes.size() - 4096);
  expect_says([&] { Halves{cut}; }, "cut short");
  std::remove(text.c_str());
  std::remove(cut.c_str());
}

// As llama-gguf-split makes them: keys in the first, tensors in all.
TEST(Files, AModelInSeveral) {
  const std::string stem = testing::TempDir() + "fastv_" + std::to_string(getpid()) + "_split";
  const std::string names[] = {stem + "-00001-of-00002.gguf", stem + "-00002-of-00002.gguf"};
  ggml_context* all = nullptr;
  const gguf_context_ptr whole(gguf_init_from_file(llama_file().c_str(), {false, &all}));
  const ggml_context_ptr weights(all);
  const std::int64_t n = gguf_get_n_tensors(whole.get());
  for (int i = 0; i < 2; ++i) {
    const gguf_context_ptr part(gguf_init_empty());
    if (i == 0) gguf_set_kv(part.get(), whole.get());
    gguf_set_val_u16(part.get(), "split.no", static_cast<std::uint16_t>(i));
    gguf_set_val_u16(part.get(), "split.count", 2);
    gguf_set_val_i32(part.get(), "split.tensors.count", static_cast<std::int32_t>(n));
    for (std::int64_t t = i * n / 2; t < (i + 1) * n / 2; ++t)
      gguf_add_tensor(part.get(), ggml_get_tensor(all, gguf_get_tensor_name(whole.get(), t)));
    ASSERT_TRUE(gguf_write_to_file(part.get(), names[i].c_str(), false));
  }
  {
    const Halves one(llama_file()), several(names[0]);
    const Prompt prompt = Builder(one, 1).text(20).picture(6).text(20).prompt;
    Engine expected(one, one_thread()), engine(several, one_thread());
    expected.prefill(0, prompt, nullptr);
    engine.prefill(0, prompt, nullptr);
    const auto vocabulary = static_cast<std::size_t>(llama_vocab_n_tokens(one.vocabulary()));
    EXPECT_EQ(largest_difference(engine.logits(0), {expected.logits(0), expected.logits(0) + vocabulary}), 0);
  }
  expect_says([&] { Halves{names[1]}; }, "names no architecture");
  std::remove(names[1].c_str());
  expect_says([&] { Halves{names[0]}; }, "cannot open the model");
  std::remove(names[0].c_str());
}

// ---- pictures that have been looked at ------------------------------------------------------------

TEST(Album, GivesBackTheSameBits) {
  const Halves halves(llama_file());
  const Prompt prompt = Builder(halves, 3).text(5).picture(6).text(4).picture(30).text(3).prompt;
  llava::Album album;
  Prompt left = prompt;
  for (llava::Piece& piece : left.pieces) {
    if (piece.rows.empty()) continue;
    piece.picture = "picture of " + std::to_string(piece.count);
    EXPECT_FALSE(album.has(piece.picture));
    album.keep(piece.picture, std::exchange(piece.rows, {}));
    EXPECT_TRUE(album.has(piece.picture));
  }
  const Prompt whole = album.complete(left);
  ASSERT_EQ(whole.pieces.size(), prompt.pieces.size());
  for (std::size_t i = 0; i < whole.pieces.size(); ++i) EXPECT_EQ(whole.pieces[i].rows, prompt.pieces[i].rows);

  const char* folder = std::getenv("TMPDIR");
  const std::string before = folder == nullptr ? "" : folder;
  setenv("TMPDIR", "/none", 1);
  expect_says([] { llava::Album{}; }, "cannot make a temporary file in /none");
  if (folder == nullptr)
    unsetenv("TMPDIR");
  else
    setenv("TMPDIR", before.c_str(), 1);
}

}  // namespace

// The engine where its layers lie on a device: hidden rows stay there, tokens are ranked there, and all of it is as on the
// host. The device is a CPU behind llama.cpp's RPC backend, whose memory this process cannot read.
#include <ggml-backend.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <thread>

#include "engine.hpp"
#include "prompts.hpp"

// llama.cpp keeps what it knows of a server for good.
extern "C" const char* __lsan_default_suppressions();
extern "C" const char* __lsan_default_suppressions() { return "leak:libggml-rpc\nleak:ggml_backend_rpc_\n"; }

namespace {

using fastv::Config;
using llava::Engine;
using llava::EngineOptions;
using llava::Halves;
using prompts::Builder;

// HOST:PORT of a server that ends with this process.
std::string server() {
  static const std::string address = [] {
    std::string at = "127.0.0.1:" + std::to_string(20000 + getpid() % 20000);
    ggml_backend_load_all();
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    if (rpc == nullptr) throw std::runtime_error("this test needs a ggml that was built with GGML_RPC=ON");
    using Start = void (*)(const char*, const char*, std::size_t, std::size_t, ggml_backend_dev_t*);
    const auto start = reinterpret_cast<Start>(ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_start_server"));
    std::thread([start, at] {
      ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
      start(at.c_str(), nullptr, 1, 1, &cpu);
    }).detach();
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    return at;
  }();
  return address;
}

llava::LoadOptions on_server() {
  llava::LoadOptions load;
  load.servers = {server()};
  return load;
}

using Case = std::pair<const char*, ggml_type>;  // architecture, type of the cache
class Devices : public testing::TestWithParam<Case> {};

// Two turns with pictures and some tokens between them, of two sequences in one cache.
TEST_P(Devices, AreAsTheHost) {
  const auto [architecture, type] = GetParam();
  tiny_gguf::LanguageModel spec = tiny_gguf::tiny_model(architecture);
  spec.window = 40;
  if (ggml_is_quantized(type)) spec.hidden = 128;  // heads of 32, a block each
  const std::string file = prompts::model_file(spec, std::string("device_") + architecture + ggml_type_name(type));
  llava::LoadOptions on_host;
  on_host.gpu_layers = 0;
  const Halves here(file, on_host), there(file, on_server());
  EngineOptions options;
  options.context = 1024;
  options.micro_batch = 64;
  options.sequences = 2;
  options.threads = 1;
  options.key_type = options.value_type = type;
  Engine host(here, options), device(there, options);
  Config config;
  config.filtering_layer = here.filtering_layer();
  config.filtering_ratio = 0.6;
  const auto vocabulary = static_cast<std::size_t>(llama_vocab_n_tokens(here.vocabulary()));
  const auto expect_equal_logits = [&](const char* when) {
    const std::vector<float> expected(host.logits(0), host.logits(0) + vocabulary);
    EXPECT_LE(prompts::largest_difference(device.logits(0), expected), 1e-4) << when;
    return prompts::likeliest(expected);
  };
  for (const std::size_t sequence : {std::size_t{0}, std::size_t{1}, std::size_t{0}}) {
    const llama_pos first = host.next_position(sequence);
    const auto prompt = Builder(here, 7 + sequence, first).text(20).picture(8).text(10).picture(7).text(9).prompt;
    const llava::Reading reading = host.read(sequence, prompt), copy = device.read(sequence, prompt);
    EXPECT_TRUE(reading.rows.on_host());
    EXPECT_FALSE(copy.rows.on_host());
    ASSERT_EQ(reading.scores.size(), copy.scores.size());
    for (std::size_t i = 0; i < reading.scores.size(); ++i) ASSERT_NEAR(copy.scores[i], reading.scores[i], 1e-6) << i;
    const auto kept = host.select(reading, &config);
    host.finish(sequence, reading, kept);
    device.finish(sequence, copy, kept);
    llama_token token = expect_equal_logits("behind the prompt");
    for (int step = 0; step < 4; ++step) {
      host.decode({{sequence, token}});
      device.decode({{sequence, token}});
      token = expect_equal_logits("decoding");
    }
  }
}

// Ranks of every kind: plain, with a soft cap, sinks, latent keys, M-RoPE, and ALiBi.
INSTANTIATE_TEST_SUITE_P(All, Devices,
                         testing::Values(Case{"llama", GGML_TYPE_F16}, Case{"llama", GGML_TYPE_F32},
                                         Case{"llama", GGML_TYPE_Q8_0}, Case{"gemma2", GGML_TYPE_F16},
                                         Case{"gpt-oss", GGML_TYPE_F16}, Case{"deepseek2", GGML_TYPE_F16},
                                         Case{"qwen2vl", GGML_TYPE_BF16}, Case{"gemma3", GGML_TYPE_F16},
                                         Case{"bloom", GGML_TYPE_F16}, Case{"mimo2", GGML_TYPE_F16},
                                         Case{"qwen35", GGML_TYPE_F16}),
                         [](const auto& test) {
                           std::string name = test.param.first + std::string("_") + ggml_type_name(test.param.second);
                           for (char& c : name)
                             if (c == '-') c = '_';
                           return name;
                         });

// Each head's attention, where heads share keys, have sinks or slopes of their own; and keys, which come to the host for it.
// At K = 0 all layers lie on the device.
TEST(Rules, AreAsOnTheHost) {
  const std::pair<const char*, std::uint32_t> cases[] = {{"llama", 2},   {"qwen2", 3}, {"gemma2", 2},
                                                         {"gpt-oss", 2}, {"bloom", 1}, {"llama", 0}};
  for (const auto& [architecture, k] : cases) {
    SCOPED_TRACE(std::string(architecture) + ", K = " + std::to_string(k));
    const std::string file = prompts::model_file(tiny_gguf::tiny_model(architecture), std::string(architecture));
    llava::LoadOptions on_host, on_device = on_server();
    on_host.gpu_layers = 0;
    on_host.filtering_layer = on_device.filtering_layer = k;
    const Halves here(file, on_host), there(file, on_device);
    EngineOptions options;
    options.context = 512;
    options.threads = 1;
    options.features = options.by_head = true;
    Engine host(here, options), device(there, options);
    llama_pos first = 0;
    for (int turn = 0; turn < 2; ++turn) {
      const llava::Prompt prompt = Builder(here, 4, first).text(20).picture(8).text(10).picture(7).text(9).prompt;
      const llava::Reading reading = host.read(0, prompt), copy = device.read(0, prompt);
      ASSERT_EQ(reading.features.size(), copy.features.size());
      ASSERT_EQ(reading.by_head.size(), copy.by_head.size());
      EXPECT_EQ(reading.by_head.size(), k == 0 ? 0u : here.cost_shape().heads * 113);
      for (std::size_t i = 0; i < reading.features.size(); ++i)
        ASSERT_NEAR(copy.features[i], reading.features[i], 1e-5);
      for (std::size_t i = 0; i < reading.by_head.size(); ++i) ASSERT_NEAR(copy.by_head[i], reading.by_head[i], 1e-6);
      for (std::size_t i = 0; i < reading.scores.size(); ++i) ASSERT_NEAR(copy.scores[i], reading.scores[i], 1e-6);
      Config config;
      config.filtering_layer = k;
      config.selection = fastv::Selection::random;
      const auto kept = host.select(reading, &config);
      host.finish(0, reading, kept);
      device.finish(0, copy, kept);
      host.decode({{0, 5}});
      device.decode({{0, 5}});
      const auto vocabulary = static_cast<std::size_t>(llama_vocab_n_tokens(here.vocabulary()));
      EXPECT_LE(prompts::largest_difference(device.logits(0), {host.logits(0), host.logits(0) + vocabulary}), 1e-4);
      first = host.next_position(0);
    }
  }
}

// Rows, on both sides: what is picked, appended beyond the room that was asked for, and written.
TEST(Rows, OnBothSides) {
  const Halves there(prompts::model_file(tiny_gguf::tiny_model("llama"), "llama"), on_server());
  EngineOptions options;
  options.context = 256;
  options.threads = 1;
  Engine device(there, options);
  const llava::Reading reading = device.read(0, Builder(there, 3).text(30).prompt);
  ggml_backend_ptr cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
  ggml_context_ptr context(ggml_init({16 * ggml_tensor_overhead(), nullptr, true}));
  const auto width = static_cast<std::int64_t>(there.hidden());
  ggml_tensor* all = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, width, 30);
  ggml_tensor* some = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, width, 3);
  ggml_backend_buffer_ptr memory(ggml_backend_alloc_ctx_tensors(context.get(), cpu.get()));
  reading.rows.write(0, all);
  llava::Devices devices;
  llava::Rows on_host;
  on_host.append(all);
  const std::vector<fastv::Index> which = {0, 4, 5, 6, 29};
  const auto* values = static_cast<const float*>(all->data);
  for (const llava::Rows* rows : {&reading.rows, static_cast<const llava::Rows*>(&on_host)}) {
    llava::Rows picked = rows->pick(which, devices);
    ASSERT_EQ(picked.count(), which.size());
    EXPECT_EQ(picked.on_host(), rows->on_host());
    picked.append(*rows);
    picked.append(picked.pick({34, 1}, devices));
    ASSERT_EQ(picked.count(), 37u);
    for (const auto& [first, expected] : std::vector<std::pair<std::size_t, std::vector<std::size_t>>>{
             {2, {5, 6, 29}}, {5, {0, 1, 2}}, {34, {29, 29, 4}}}) {
      picked.write(first, some);
      for (std::size_t i = 0; i < expected.size(); ++i)
        EXPECT_TRUE(std::equal(values + expected[i] * there.hidden(), values + (expected[i] + 1) * there.hidden(),
                               static_cast<const float*>(some->data) + i * there.hidden()))
            << first << " " << i;
    }
  }
}

}  // namespace

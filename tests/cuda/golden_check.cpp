// golden_check FILE... : the decoder of examples/cuda in float, which prunes by the kernels of fastv/cuda.cuh, against
// tensors exported from the authors' own PyTorch code (tests/golden/README.md): kept indices, scores, and the logits and
// tokens of a prefill and of greedy decoding. Over the emulation or, compiled by nvcc, on a GPU. One line a case; exit
// status 1 if any case fails, 77 without a GPU where nvcc compiled it.
#include <cstdio>

#include "golden_file.hpp"
#include "plain_machine.hpp"

namespace {

// The largest difference; not a number where the lengths differ.
float apart(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return NAN;
  float most = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    if (!(std::fabs(a[i] - b[i]) <= most)) most = std::fabs(a[i] - b[i]);
  return most;
}

bool check_file(const std::string& path) {
  const golden::File file(path);
  const golden::Json json = golden::Json::parse(file.metadata("config"));
  const auto size = [&](const char* name) { return json[name].number(); };
  fastv::ModelShape shape{size("num_hidden_layers"),
                          size("hidden_size"),
                          size("num_attention_heads"),
                          size("num_key_value_heads"),
                          0,
                          size("intermediate_size"),
                          3,
                          size("vocab_size")};
  shape.head_dim = shape.hidden / shape.heads;
  fastv::Config config;
  config.filtering_layer = std::stoul(file.metadata("K"));
  config.filtering_ratio = std::stod(file.metadata("R"));
  const std::vector<fastv::TokenSpan> visual = {
      {std::stoul(file.metadata("image_start")), std::stoul(file.metadata("image_len"))}};
  const std::vector<float> prompt = file.floats("inputs_embeds"), steps = file.floats("B.cached.step_logits");
  const std::vector<std::int64_t> kept_indices = file.integers("keep_indices"),
                                  tokens = file.integers("B.cached.tokens");
  const std::size_t n = prompt.size() / shape.hidden;

  oracle::Rng rng(n);
  PlainMachine machine(rng);
  decoder::Decoder<PlainMachine, float> model(
      machine, shape, {1, n, n + tokens.size(), std::stof(json["rms_norm_eps"].text)},
      [&](const std::string& name, float* to, std::size_t rows, std::size_t columns) {
        const std::vector<float> weights = file.floats(name);
        if (weights.size() != rows * columns) throw std::runtime_error(name + " has another shape");
        machine.upload(to, weights);
      });
  const fastv::cuda::Request request{config, visual, 0, n};
  fastv::Status status =
      model.plan(fastv::Span<const fastv::cuda::Request>(&request, 1), prompt, decoder::Mode::pruned);
  if (status) status = model.prefill();
  if (!status) throw std::runtime_error(status.message().c_str());

  std::string wrong;
  const fastv::cuda::Kept kept = model.kept();
  const std::vector<std::int32_t> rows = machine.download(kept.rows, kept.total),
                                  positions = machine.download(kept.positions, kept.total);
  if (std::vector<std::int64_t>(rows.begin(), rows.end()) != kept_indices || positions != rows)
    wrong += " kept differ;";
  const float scores = apart(machine.download(kept.scores, visual[0].count), file.floats("score"));
  if (!(scores <= 1e-6f)) wrong += " scores differ;";
  float logits = 0;
  for (std::size_t step = 0; step < tokens.size(); ++step) {
    const auto row = steps.begin() + static_cast<std::ptrdiff_t>(step * shape.vocabulary);
    const float difference = apart(machine.download(model.logits(), shape.vocabulary),
                                   {row, row + static_cast<std::ptrdiff_t>(shape.vocabulary)});
    if (!(difference <= logits)) logits = difference;
    if (status = model.decode(); !status) throw std::runtime_error(status.message().c_str());
    if (machine.download(model.tokens(), 1)[0] != tokens[step]) wrong += " token " + std::to_string(step) + " differs;";
  }
  if (!(logits <= 1e-4f)) wrong += " logits differ;";
  for (const std::string& fault : machine::faults()) wrong += " " + fault + ";";
  std::printf("%s  %s  max difference: score %.1e logits %.1e; equal: kept, %zu tokens%s\n",
              wrong.empty() ? "pass" : "FAIL", path.c_str(), static_cast<double>(scores), static_cast<double>(logits),
              tokens.size(), wrong.c_str());
  return wrong.empty();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: golden_check FILE.safetensors...\n");
    return 2;
  }
#if defined(__CUDACC__)
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "golden_check: this machine has no GPU that the CUDA driver knows; nothing was tested\n");
    return 77;
  }
#endif
  int failed = 0;
  for (int i = 1; i < argc; ++i) try {
      failed += check_file(argv[i]) ? 0 : 1;
    } catch (const std::exception& error) {
      std::printf("FAIL  %s  %s\n", argv[i], error.what());
      ++failed;
    }
  std::printf("%d of %d cases pass\n", argc - 1 - failed, argc - 1);
  return failed == 0 ? 0 : 1;
}

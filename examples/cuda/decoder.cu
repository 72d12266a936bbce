// A small LLaMA decoder with random weights that prunes with fastv/cuda.cuh, on a GPU, with cuBLAS for its products. See
// README.md.
//
//   decoder [tiny | 7b]    checks that pruning is what masks say, in small or in LLaVA-1.5-7B's shape
//
// Exit status: 0; 1 where the numbers differ or the GPU fails; 2 on bad use; 77 without a GPU.
#include "random_model.hpp"

const char* const cuda_program::name = "decoder";

namespace {

using cuda_program::Machine;
using cuda_program::require;
using decoder::Batch;
using decoder::Model;
using fastv::half;

// The logits of a prefill and of some steps behind it. forced: the tokens of each step, or none where they are to be found;
// steps are one graph, run again and again.
std::vector<std::vector<half>> run(Machine& machine, Model& model, const fastv::ModelShape& shape, const Batch& batch,
                                   decoder::Mode mode, std::vector<std::vector<std::int32_t>>& tokens, bool forced) {
  constexpr std::size_t steps = 8;
  const std::size_t n = batch.requests.size();
  std::int32_t* const given = machine.allocate<std::int32_t>(n);
  require(model.plan(batch.requests, batch.prompt, mode));
  require(model.prefill());
  std::vector<std::vector<half>> logits{machine.download(model.logits(), n * shape.vocabulary)};
  const cuda_program::Graph step(machine.stream, [&] { require(model.decode(forced ? given : nullptr)); });
  tokens.resize(steps);
  for (std::size_t i = 0; i < steps; ++i) {
    if (forced) machine.upload(given, tokens[i]);
    step.launch(machine.stream);
    logits.push_back(machine.download(model.logits(), n * shape.vocabulary));
    if (!forced) tokens[i] = machine.download(model.tokens(), n);
  }
  return logits;
}

bool check(Machine& machine, Model& model, const fastv::ModelShape& shape, const Batch& batch) {
  std::vector<std::vector<std::int32_t>> tokens;
  const auto fast = run(machine, model, shape, batch, decoder::Mode::pruned, tokens, false);
  const auto slow = run(machine, model, shape, batch, decoder::Mode::masked, tokens, true);
  float most = 0, apart = 0;
  bool numbers = true;
  for (std::size_t i = 0; i < fast.size(); ++i)
    for (std::size_t j = 0; j < fast[i].size(); ++j) {
      const float a = fastv::to_float(fast[i][j]), b = fastv::to_float(slow[i][j]);
      most = (std::max)(most, std::fabs(b));
      apart = (std::max)(apart, std::fabs(a - b));
      numbers = numbers && std::isfinite(a) && std::isfinite(b);
    }
  const bool same = numbers && most > 0 && apart <= 0.03f * most;
  std::printf("%zu sequences, prefill and %zu steps: pruned and masked logits of up to %.3g differ by up to %.2g: %s\n",
              batch.requests.size(), fast.size() - 1, static_cast<double>(most), static_cast<double>(apart),
              same ? "equal but for rounding" : "NOT EQUAL");
  return same;
}

}  // namespace

int main(int argc, char** argv) {
  const bool large = argc == 2 && std::strcmp(argv[1], "7b") == 0;
  if (argc > 2 || (argc == 2 && !large && std::strcmp(argv[1], "tiny") != 0)) {
    std::fprintf(stderr, "usage: decoder [tiny | 7b]\n");
    return 2;
  }
  const cudaDeviceProp gpu = cuda_program::gpu();
  const fastv::ModelShape shape = large ? fastv::ModelShape{32, 4096, 32, 32, 128, 11008, 3, 32000}
                                        : fastv::ModelShape{6, 256, 8, 4, 32, 704, 3, 1000};
  std::printf("%s; %zu layers of width %zu, %zu heads, %zu KV heads, random weights in half precision\n", gpu.name,
              shape.layers, shape.hidden, shape.heads, shape.kv_heads);
  const Batch batch(large ? 2 : 4, 576, shape.hidden, 61);
  Machine machine;
  Model model = decoder::random_model(machine, shape, {batch.requests.size(), batch.rows, 640});
  return check(machine, model, shape, batch) ? 0 : 1;
}

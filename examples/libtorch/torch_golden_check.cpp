// torch_golden_check [--device cpu|cuda] FILE... : holds the LibTorch example and the adaptor to tensors exported from
// the authors' own PyTorch code (tests/golden/README.md describes the format), on every path a tensor can take through
// the adaptor: on a GPU those of fastv::device. One line a case; exit status 1 if any case fails.
#include <ATen/Parallel.h>
#include <torch/cuda.h>
#include <torch/version.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <set>

#include "llama.hpp"
#include "tensors.hpp"

namespace {

using namespace libtorch;

constexpr double tolerance = 1e-4;

torch::Tensor tensor_of(const reference::Matrix& matrix) {
  return torch::from_blob(const_cast<float*>(matrix.data()), {matrix.rows(), matrix.cols()}).clone();
}

// A model with the weights of a golden file.
Llama load_llama(const reference::DecoderConfig& config, const reference::Tensors& tensors, torch::Device device) {
  Llama llama(config);
  for (auto& parameter : llama->named_parameters())
    parameter.value().copy_(tensor_of(tensors.matrix(parameter.key())).view_as(parameter.value()));
  llama->to(device);
  llama->eval();
  return llama;
}

struct Verdict {
  std::map<std::string, double> largest;  // difference of each kind
  std::set<std::string> exact, faults;

  void near(const std::string& kind, const torch::Tensor& ours, const torch::Tensor& golden) {
    if (ours.sizes() != golden.sizes()) {
      faults.insert(kind + " has another shape");
      return;
    }
    const double difference = ours.numel() == 0 ? 0 : (ours.cpu() - golden).abs().max().item<double>();
    double& most = largest[kind];
    if (!(difference <= most)) most = difference;
    if (!(difference <= tolerance)) faults.insert(kind + " differ by more than 1e-4");
  }
  void same(const std::string& kind, const std::vector<std::int64_t>& ours, const std::vector<std::int64_t>& golden) {
    exact.insert(kind);
    if (ours != golden) faults.insert(kind + " differ");
  }
  bool print(const std::string& name) const {
    std::printf("%s  %s  max difference:", faults.empty() ? "pass" : "FAIL", name.c_str());
    for (const auto& [kind, difference] : largest) std::printf(" %s %.1e", kind.c_str(), difference);
    std::printf("; equal:");
    for (const std::string& kind : exact) std::printf(" %s", kind.c_str());
    for (const std::string& sentence : faults) std::printf("; FAULT: %s", sentence.c_str());
    std::printf("\n");
    return faults.empty();
  }
};

std::vector<std::int64_t> values_of(const torch::Tensor& integers) {
  const torch::Tensor c = integers.cpu().contiguous();
  return {c.data_ptr<std::int64_t>(), c.data_ptr<std::int64_t>() + c.numel()};
}

// The prompt's embeddings [1, n, d], where the model is.
torch::Tensor prompt_of(const reference::Tensors& golden, Llama& llama) {
  return tensor_of(golden.matrix("inputs_embeds")).unsqueeze(0).to(llama->lm_head->weight.device());
}

// Prefill, pruned on one path, then greedy decoding: everything the authors' code left behind.
void check_path(const reference::Tensors& golden, Llama& llama, Path path, Verdict& verdict) {
  PruneOptions prune;
  prune.config.filtering_layer = std::stoul(golden.metadata("K"));
  prune.config.filtering_ratio = std::stod(golden.metadata("R"));
  prune.visual = {{std::stoul(golden.metadata("image_start")), std::stoul(golden.metadata("image_len"))}};
  prune.path = path;
  prune.on_kept = [&](const torch::Tensor& kept) {
    verdict.same("kept", values_of(kept), golden.integers("keep_indices"));
  };
  prune.on_hidden = [&](std::size_t layer, const torch::Tensor& hidden) {
    verdict.near("hidden", hidden[0], tensor_of(golden.matrix("B.hidden." + std::to_string(layer))));
  };
  Sequence sequence;
  const torch::Tensor hidden = llama->prefill(prompt_of(golden, llama), sequence, &prune);
  const torch::Tensor all = llama->logits(hidden)[0];
  verdict.near("logits", all, tensor_of(golden.matrix("B.logits")));

  const torch::Tensor step_logits = tensor_of(golden.matrix("B.cached.step_logits"));
  std::vector<std::int64_t> tokens, positions, lengths;
  torch::Tensor logits = all[-1];
  for (std::int64_t step = 0; step < step_logits.size(0); ++step) {
    if (step > 0) logits = llama->decode(tokens.back(), sequence);
    verdict.near("logits", logits, step_logits[step]);
    tokens.push_back(logits.argmax().item<std::int64_t>());
    positions.push_back(sequence.next_position - 1);
    for (const Cache& cache : sequence.layers) lengths.push_back(cache.length());
  }
  verdict.same("tokens", tokens, golden.integers("B.cached.tokens"));
  verdict.same("positions", positions, golden.integers("B.cached.position_ids"));
  verdict.same("kv_lengths", lengths, golden.integers("B.cached.kv_len"));
}

// Without pruning, so that a fault of the model itself is told apart.
void check_base(const reference::Tensors& golden, Llama& llama, Verdict& verdict) {
  Sequence sequence;
  const torch::Tensor hidden = llama->prefill(prompt_of(golden, llama), sequence);
  verdict.near("base", llama->logits(hidden)[0][-1], tensor_of(golden.matrix("base.step_logits"))[0]);
}

bool check_file(const std::string& path, torch::Device device) {
  Verdict verdict;
  try {
    const torch::NoGradGuard no_grad;
    const reference::Tensors golden(path);
    Llama llama =
        load_llama(reference::decoder_config(nlohmann::json::parse(golden.metadata("config"))), golden, device);
    check_base(golden, llama, verdict);
    for (const Path each : {Path::device_query_key, Path::device_probabilities})
      check_path(golden, llama, each, verdict);
    if (device.is_cpu())
      for (const Path each : {Path::query_key, Path::probabilities}) check_path(golden, llama, each, verdict);
  } catch (const std::exception& error) {
    verdict.faults.insert(error.what());
  }
  return verdict.print(path);
}

}  // namespace

int main(int argc, char** argv) {
  const bool chosen = argc > 2 && std::strcmp(argv[1], "--device") == 0;
  const int first = chosen ? 3 : 1;
  if (argc <= first || (!chosen && argv[1][0] == '-')) {
    std::fprintf(stderr, "usage: torch_golden_check [--device cpu|cuda] FILE.safetensors...\n");
    return 2;
  }
  const std::string name = chosen ? argv[2] : "cpu";
  if (name != "cpu" && name != "cuda") {
    std::fprintf(stderr, "torch_golden_check: --device is %s: use cpu or cuda\n", name.c_str());
    return 2;
  }
  if (name == "cuda" && !torch::cuda::is_available()) {
    std::fprintf(
        stderr,
        "torch_golden_check: --device is cuda but LibTorch %s finds no CUDA device: use a build of it with CUDA, "
        "on a machine with an NVIDIA GPU and its driver\n",
        TORCH_VERSION);
    return 2;
  }
  at::set_num_threads(1);  // these models are small
  int failed = 0;
  for (int i = first; i < argc; ++i) failed += check_file(argv[i], torch::Device(name)) ? 0 : 1;
  std::printf("%d of %d cases pass\n", argc - first - failed, argc - first);
  return failed == 0 ? 0 : 1;
}

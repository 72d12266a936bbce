// A small LLaMA decoder with random weights that prunes with fastv/cuda.cuh, on a GPU, with cuBLAS for its products. See
// README.md.
//
//   decoder [tiny | 7b]    checks that pruning is what masks say; 7b, LLaVA-1.5-7B's shape, times it as well
//
// Exit status: 0; 1 where the numbers differ or the GPU fails; 2 on bad use; 77 without a GPU.
#include <cublas_v2.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fastv/cuda.cuh>
#include <fastv/fastv.hpp>
#include <functional>

#include "decoder.hpp"
#include "require.hpp"

const char* const cuda_program::name = "decoder";

namespace {

using fastv::half;

using cuda_program::require;
using cuda_program::stop;

// One stream of one GPU.
class Machine {
 public:
  using Pruner = fastv::cuda::Pruner;
  Machine() {
    require(cudaStreamCreate(&stream));
    require(cublasCreate(&cublas_));
    require(cublasSetStream(cublas_, stream));
  }
  Machine(const Machine&) = delete;
  ~Machine() {
    for (void* memory : memory_) cudaFree(memory);
    cublasDestroy(cublas_);
    cudaStreamDestroy(stream);
  }
  fastv::cuda::Stream queue() const { return stream; }
  template <class T>
  T* allocate(std::size_t count) {
    void* memory = nullptr;
    require(cudaMalloc(&memory, count * sizeof(T)));
    memory_.push_back(memory);
    return static_cast<T*>(memory);
  }
  template <class T>
  void upload(T* to, const std::vector<T>& from) {
    require(cudaMemcpyAsync(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice, stream));
  }
  template <class T>
  std::vector<T> download(const T* from, std::size_t count) {
    std::vector<T> host(count);
    require(cudaMemcpyAsync(host.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost, stream));
    require(cudaStreamSynchronize(stream));
    return host;
  }
  void multiply(const half* x, const half* w, half* y, std::size_t rows, std::size_t in, std::size_t out) {
    const auto n = [](std::size_t value) { return static_cast<int>(value); };
    const float one = 1, zero = 0;
    require(cublasGemmEx(cublas_, CUBLAS_OP_T, CUBLAS_OP_N, n(out), n(rows), n(in), &one, w, CUDA_R_16F, n(in), x,
                         CUDA_R_16F, n(in), &zero, y, CUDA_R_16F, n(out), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  }
  // `work` as a graph.
  cudaGraphExec_t record(const std::function<void()>& work) const {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    work();
    require(cudaStreamEndCapture(stream, &graph));
    require(cudaGraphInstantiateWithFlags(&executable, graph, 0));
    require(cudaGraphDestroy(graph));
    return executable;
  }

  cudaStream_t stream = nullptr;

 private:
  cublasHandle_t cublas_ = nullptr;
  std::vector<void*> memory_;
};

using Model = decoder::Decoder<Machine, half>;

// Uniform, scaled so that activations keep their size; norms are 1. Grid: parts of `threads` elements.
struct RandomWeights {
  static constexpr int threads = 256;
  template <class Block>
  struct Shared {};
  half* to;
  std::size_t count;
  float spread;
  std::uint64_t seed;

  template <class Block, class Memory>
  __device__ void operator()(Block& block, Memory&) const {
    block.each([&](int thread) {
      const std::size_t i = std::size_t{block.x()} * threads + static_cast<std::size_t>(thread);
      if (i >= count) return;
      std::uint64_t z = (seed + i) * 0x9E3779B97F4A7C15u;  // SplitMix64
      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
      z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
      const float unit = static_cast<float>(static_cast<std::int32_t>(z >> 32)) / 2147483648.0f;  // [-1, 1)
      to[i] = decoder::narrow<half>(spread == 0 ? 1.0f : spread * unit);
    });
  }
};

// Sequences of one image each, and their prompts.
struct Batch {
  std::vector<fastv::TokenSpan> images;
  std::vector<fastv::cuda::Request> requests;
  std::vector<half> prompt;
  std::size_t rows = 0;

  // Lengths differ by `ragged` from one sequence to the next.
  Batch(std::size_t count, std::size_t visual, std::size_t width, std::size_t ragged) : images(count) {
    fastv::Config config;  // K = 2, R = 50%
    for (std::size_t i = 0; i < count; ++i) {
      images[i] = {35, visual - i * ragged};
      requests.push_back({config, {&images[i], 1}, rows, 35 + images[i].count + 20});
      rows += requests[i].tokens;
    }
    std::uint32_t state = 1;
    for (std::size_t i = 0; i < rows * width; ++i) {
      state = state * 1664525u + 1013904223u;
      prompt.push_back(decoder::narrow<half>((static_cast<float>(state >> 8) / 8388608.0f - 1.0f) * 1.7320508f));
    }
  }
};

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
  cudaGraphExec_t step = machine.record([&] { require(model.decode(forced ? given : nullptr)); });
  tokens.resize(steps);
  for (std::size_t i = 0; i < steps; ++i) {
    if (forced) machine.upload(given, tokens[i]);
    require(cudaGraphLaunch(step, machine.stream));
    logits.push_back(machine.download(model.logits(), n * shape.vocabulary));
    if (!forced) tokens[i] = machine.download(model.tokens(), n);
  }
  require(cudaGraphExecDestroy(step));
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

// Median milliseconds of a prefill.
double milliseconds(Machine& machine, Model& model, const Batch& batch, decoder::Mode mode) {
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin));
  require(cudaEventCreate(&end));
  std::vector<float> times;
  for (int round = 0; round < 7; ++round) {
    require(model.plan(batch.requests, batch.prompt, mode));
    require(cudaEventRecord(begin, machine.stream));
    require(model.prefill());
    require(cudaEventRecord(end, machine.stream));
    require(cudaEventSynchronize(end));
    float time = 0;
    require(cudaEventElapsedTime(&time, begin, end));
    if (round >= 2) times.push_back(time);
  }
  require(cudaEventDestroy(begin));
  require(cudaEventDestroy(end));
  std::nth_element(times.begin(), times.begin() + 2, times.end());
  return static_cast<double>(times[2]);
}

void time(Machine& machine, Model& model, const fastv::ModelShape& shape, std::size_t sequences) {
  const Batch batch(sequences, 576, shape.hidden, 0);
  const double whole = milliseconds(machine, model, batch, decoder::Mode::whole);
  const double pruned = milliseconds(machine, model, batch, decoder::Mode::pruned);
  const fastv::cuda::Request& one = batch.requests[0];
  const auto plan = fastv::make_plan(one.config, {one.tokens, shape.layers, one.visual});
  const auto without = fastv::make_plan(one.config, {one.tokens, shape.layers, {}});
  require(plan.status);
  require(without.status);
  std::printf("%9zu %6zu %6zu %10.2f %10.2f %11.3f %12.3f\n", sequences, batch.rows, sequences * plan->kept(), whole,
              pruned, pruned / whole, fastv::prefill_flops(shape, *plan) / fastv::prefill_flops(shape, *without));
}

}  // namespace

int main(int argc, char** argv) {
  const bool large = argc == 2 && std::strcmp(argv[1], "7b") == 0;
  if (argc > 2 || (argc == 2 && !large && std::strcmp(argv[1], "tiny") != 0)) {
    std::fprintf(stderr, "usage: decoder [tiny | 7b]\n");
    return 2;
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "decoder: this machine has no GPU that the CUDA driver knows; nothing was run\n");
    return 77;
  }
  cudaDeviceProp gpu;
  require(cudaGetDeviceProperties(&gpu, 0));
  const fastv::ModelShape shape = large ? fastv::ModelShape{32, 4096, 32, 32, 128, 11008, 3, 32000}
                                        : fastv::ModelShape{6, 256, 8, 4, 32, 704, 3, 1000};
  std::printf("%s; %zu layers of width %zu, %zu heads, %zu KV heads, random weights in half precision\n", gpu.name,
              shape.layers, shape.hidden, shape.heads, shape.kv_heads);
  const std::size_t most = large ? 16 : 4;
  Machine machine;
  std::uint64_t seed = 0;
  Model model(
      machine, shape, {most, most * 631, 640},
      [&](const std::string& name, fastv::half* to, std::size_t rows, std::size_t columns) {
        const bool norm = name.find("norm") != std::string::npos;
        require(machine.queue().launch(
            {static_cast<std::uint32_t>((rows * columns + 255) / 256), 1, 1},
            RandomWeights{to, rows * columns, norm ? 0.0f : std::sqrt(3.0f / static_cast<float>(columns)), seed}));
        seed += rows * columns;
      });
  const bool same = check(machine, model, shape, Batch(large ? 2 : 4, 576, shape.hidden, 61));
  if (large) {
    std::printf("sequences   rows   kept   whole ms  pruned ms  time ratio  FLOPs ratio\n");
    for (const std::size_t sequences : {std::size_t{1}, std::size_t{16}}) time(machine, model, shape, sequences);
  }
  return same ? 0 : 1;
}

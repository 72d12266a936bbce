// What pruning saves of a prefill on a GPU: the decoder of examples/cuda in LLaVA-1.5-7B's shape, random weights, 1 and 16
// sequences of 631 tokens (K = 2, R = 50%): milliseconds without and with pruning, their ratio, and beside it the ratio of
// FLOPs that fastv/cost.hpp counts. Medians of five.
//
//   nvcc -std=c++17 -O3 -arch=native -Iinclude bench/cuda_prefill_bench.cu -lcublas -o cuda_prefill_bench
//   ./cuda_prefill_bench        exit status: 0; 1 where the GPU fails; 77 without one
#include <fastv/fastv.hpp>

#include "../examples/cuda/random_model.hpp"

const char* const cuda_program::name = "cuda_prefill_bench";

namespace {

using cuda_program::Machine;
using cuda_program::require;
using decoder::Batch;
using decoder::Model;

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

int main() {
  const cudaDeviceProp gpu = cuda_program::gpu();
  const fastv::ModelShape shape{32, 4096, 32, 32, 128, 11008, 3, 32000};
  std::printf("%s; %zu layers of width %zu, random weights in half precision\n", gpu.name, shape.layers, shape.hidden);
  Machine machine;
  Model model = decoder::random_model(machine, shape, {16, 16 * 631, 640});
  std::printf("sequences   rows   kept   whole ms  pruned ms  time ratio  FLOPs ratio\n");
  for (const std::size_t sequences : {std::size_t{1}, std::size_t{16}}) time(machine, model, shape, sequences);
  return 0;
}

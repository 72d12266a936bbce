// fastv::cuda brings the CUDA runtime along. Where there is a GPU, every other of 32 visual tokens stays.
#include <cstdio>
#include <fastv/cuda.cuh>

int main() {
  using namespace fastv;
  cuda::Limits limits;
  limits.tokens = 40;
  cuda::Pruner pruner;
  const Status reserved = pruner.reserve(limits);
  if (!reserved) {
    std::printf("%zu bytes, and no GPU here: %s\n", *cuda::Pruner::bytes(limits), reserved.message().c_str());
    return reserved.code == Errc::device_error ? 0 : 1;
  }
  const TokenSpan visual[] = {{4, 32}};
  Config config;
  config.selection = Selection::uniform;
  const cuda::Request request{config, visual, 0, 40};
  Status status = pruner.plan(Span<const cuda::Request>(&request, 1), 4, cudaStreamLegacy);
  if (status) status = pruner.prune(0, cuda::NoEvidence{}, cudaStreamLegacy);
  std::int32_t rows[24] = {};
  const auto copied = cudaMemcpy(rows, pruner.kept(0).rows, sizeof(rows), cudaMemcpyDeviceToHost);
  std::printf("%zu of 40 tokens stay, %d the first of the image\n", pruner.kept(0).total, rows[4]);
  return status && copied == cudaSuccess && pruner.kept(0).total == 24 && rows[4] == 5 ? 0 : 1;
}

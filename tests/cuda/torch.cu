// fastv/torch_device.hpp as nvcc sees it, for compile.sh: by the kernels. Nothing here runs.
#include <fastv/torch_device.hpp>

static_assert(fastv::device::has_kernels, "a LibTorch with CUDA, compiled by nvcc");

fastv::Result<at::Tensor> by_vectors(const at::Tensor& q, const at::Tensor& k,
                                     fastv::Span<const fastv::TokenSpan> visual) {
  return fastv::device::prune({}, q, k, 0.1, visual);
}
fastv::Result<at::Tensor> by_map(const at::Tensor& attention, fastv::Span<const fastv::TokenSpan> visual) {
  return fastv::device::prune({}, attention, visual);
}
fastv::Result<at::Tensor> by_steps(const at::Tensor& attention, fastv::Span<const fastv::TokenSpan> visual) {
  const auto scores = fastv::device::scores({}, attention, visual);
  return scores ? fastv::device::select({}, *scores, visual, 40) : scores;
}

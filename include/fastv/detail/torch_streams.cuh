// fastv: PyTorch's current CUDA streams, for torch_device.hpp where nvcc compiles it.
#pragma once

#include <c10/cuda/CUDAStream.h>

#include "../cuda.cuh"
#include "cuda_torch.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
inline namespace FASTV_KIND {

// See TorchKernels.
struct TorchStreams {
  using Queue = cuda::Stream;
  static bool reads(const at::Tensor& tensor) { return tensor.is_cuda(); }
  static Queue of(const at::Tensor& tensor) {
    return c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
  }
};

}  // namespace FASTV_KIND
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

// fastv for CUDA: score, select and gather on the device, on one stream, without the host. Needs nvcc 11.8 or newer (or
// hipcc) and the runtime, nothing else.
//
//   fastv::cuda::Pruner pruner;
//   pruner.reserve({.sequences = 64, .tokens = 8192, .heads = 32});    // once
//   pruner.plan(requests, layers, stream);                             // a batch's lengths, from shapes alone
//   auto qk = fastv::cuda::query_key(fastv::cuda::heads(q, fastv::TokenMajor{rows, 32, 128}),
//                                    fastv::cuda::heads(k, fastv::TokenMajor{rows, 32, 128}), 1 / std::sqrt(128.0f));
//   pruner.prune(0, qk, stream);                                       // behind layer K - 1
//   pruner.gather(0, {{fastv::rows(hidden, rows, 4096), fastv::rows(other, pruner.kept(0).total, 4096)}}, stream);
//   pruner.kept(0).cumulative ...                                      // on the device, for layers K ..
//
// Every call returns a Status. cuda_views.hpp has the tensors and requests, cuda_pruner.hpp the Pruner: both are plain
// C++, so that a scheduler may include them.
//
// Two kernels score and select. The first multiplies the query rows with all keys, 64 keys a block, so that one sequence
// fills the GPU; it leaves logits and, of every 64, the parts of a softmax. The second turns them into scores, 64 visual
// tokens a block; the block that finishes last selects, by radix. A third moves the rows. Formulas: score.hpp; rules:
// select.hpp; remedies.hpp where evidence is corrected. Selection::diverse has three more kernels between scores and rows: see
// cuda_diverse.hpp and cuda_greedy.hpp.
#pragma once

#if defined(__HIPCC__) && !defined(__CUDACC__)
#include <hip/hip_runtime.h>
#else
#include <cuda_runtime.h>
#endif

#include "cuda_pruner.hpp"

#include "detail/begin.hpp"

namespace fastv {

namespace detail {
namespace gpu {
inline namespace FASTV_KIND {

// What differs between the two runtimes.
#if defined(__HIPCC__) && !defined(__CUDACC__)
using RuntimeStream = hipStream_t;
using RuntimeError = hipError_t;
inline constexpr RuntimeError runtime_success = hipSuccess, runtime_no_memory = hipErrorOutOfMemory;
inline RuntimeError runtime_allocate(void** memory, std::size_t bytes) noexcept { return hipMalloc(memory, bytes); }
inline void runtime_free(void* memory) noexcept { static_cast<void>(hipFree(memory)); }
inline RuntimeError runtime_last_error() noexcept { return hipGetLastError(); }
inline const char* runtime_name(RuntimeError error) noexcept { return hipGetErrorName(error); }
#else
using RuntimeStream = cudaStream_t;
using RuntimeError = cudaError_t;
inline constexpr RuntimeError runtime_success = cudaSuccess, runtime_no_memory = cudaErrorMemoryAllocation;
inline RuntimeError runtime_allocate(void** memory, std::size_t bytes) noexcept { return cudaMalloc(memory, bytes); }
inline void runtime_free(void* memory) noexcept { static_cast<void>(cudaFree(memory)); }
inline RuntimeError runtime_last_error() noexcept { return cudaGetLastError(); }
inline const char* runtime_name(RuntimeError error) noexcept { return cudaGetErrorName(error); }
#endif

inline Status runtime_status(RuntimeError error, const char* what) noexcept {
  if (error == runtime_success) return {};
  return fail(error == runtime_no_memory ? Errc::out_of_memory : Errc::device_error, "{} of the GPU's runtime: {}",
              what, runtime_name(error));
}

#if defined(__CUDACC__) || defined(__HIPCC__)

// Of groups of `Lanes` neighbours, on machines whose warps have 32 threads or 64.
template <int Lanes, class T>
__device__ inline T shuffle_xor(T value, int offset) {
#if defined(__HIPCC__) && !defined(__CUDACC__)
  return __shfl_xor(value, offset, Lanes);
#else
  return __shfl_xor_sync(0xffffffffu, value, offset, Lanes);
#endif
}
template <class T>
__device__ inline T shuffle_up(T value, unsigned int offset) {
#if defined(__HIPCC__) && !defined(__CUDACC__)
  return __shfl_up(value, offset, 32);
#else
  return __shfl_up_sync(0xffffffffu, value, offset, 32);
#endif
}

// A block on a GPU; see cuda_block.hpp.
class DeviceBlock {
 public:
  template <class T, std::size_t N>
  struct Array {
    T values[N];
    __device__ T& operator[](std::size_t i) { return values[i]; }
  };
  template <class T>
  struct PerThread {
    T value;
    __device__ T& operator[](int) { return value; }
  };
  struct Words {
    std::uint32_t* data;
    __device__ std::uint32_t& operator[](std::size_t i) const { return data[i]; }
  };

  __device__ std::uint32_t x() const { return blockIdx.x; }
  __device__ std::uint32_t y() const { return blockIdx.y; }
  __device__ std::uint32_t z() const { return blockIdx.z; }
  template <class Body>
  __device__ void each(const Body& body) {
    body(static_cast<int>(threadIdx.x));
  }
  __device__ void sync() { __syncthreads(); }

  template <std::size_t N>
  __device__ Words words(Array<std::uint32_t, N>& array) {
    return {array.values};
  }
  __device__ Words words(std::uint32_t* data, std::size_t) { return {data}; }

  template <int Lanes, std::size_t N>
  __device__ void sum(PerThread<Values<float, N>>& values) {
    FASTV_KERNEL_UNROLL
    for (std::size_t i = 0; i < N; ++i) {
      FASTV_KERNEL_UNROLL
      for (int offset = Lanes / 2; offset > 0; offset /= 2)
        values.value.value[i] += shuffle_xor<Lanes>(values.value.value[i], offset);
    }
  }
  template <int Lanes, class T>
  __device__ void greatest(PerThread<T>& word) {
    FASTV_KERNEL_UNROLL
    for (int offset = Lanes / 2; offset > 0; offset /= 2) {
      const T other = shuffle_xor<Lanes>(word.value, offset);
      word.value = other > word.value ? other : word.value;
    }
  }

  __device__ std::uint32_t exclusive_sum(PerThread<std::uint32_t>& word) {
    __shared__ std::uint32_t warps[32];
    const unsigned int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    std::uint32_t sum = word.value;
    FASTV_KERNEL_UNROLL
    for (unsigned int offset = 1; offset < 32; offset *= 2) {
      const std::uint32_t before = shuffle_up(sum, offset);
      sum += lane >= offset ? before : 0;
    }
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    std::uint32_t before = 0, all = 0;
    for (unsigned int w = 0; w < blockDim.x / 32; ++w) {
      before += w < warp ? warps[w] : 0;
      all += warps[w];
    }
    word.value = before + sum - word.value;
    __syncthreads();
    return all;
  }
  template <class T>
  __device__ T total(PerThread<T>& number) {
    __shared__ T warps[32];
    T sum = number.value;
    FASTV_KERNEL_UNROLL
    for (int offset = 16; offset > 0; offset /= 2) sum += shuffle_xor<32>(sum, offset);
    number.value = sum;
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    T all = 0;
    for (unsigned int w = 0; w < blockDim.x / 32; ++w) all += warps[w];
    __syncthreads();
    return all;
  }
  template <class T>
  __device__ T greatest(PerThread<T>& word) {
    __shared__ T warps[32];
    greatest<32>(word);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = word.value;
    __syncthreads();
    T all = 0;
    for (unsigned int w = 0; w < blockDim.x / 32; ++w) all = warps[w] > all ? warps[w] : all;
    __syncthreads();
    return all;
  }

  template <std::size_t N>
  __device__ void add(Array<std::uint32_t, N>& array, std::uint32_t i, std::uint32_t n) {
    atomicAdd(array.values + i, n);
  }
  __device__ void raise(std::uint32_t* word, std::uint32_t value) { atomicMax(word, value); }
  // The block's writes are fenced by the thread that counts it, and the last block's reads by the same one.
  __device__ bool last_to_arrive(std::uint32_t* counter, std::uint32_t expected) {
    __shared__ bool last;
    __syncthreads();
    if (expected == 1) return true;
    if (threadIdx.x == 0) {
      __threadfence();
      last = atomicAdd(counter, 1u) + 1 == expected;
      if (last) *counter = 0;
      __threadfence();
    }
    __syncthreads();
    return last;
  }
};

// Blocks that a multiprocessor must have room for. Without a number nvcc spills registers of small kernels to make room
// for many; 8-bit keys, widened, need all registers of one.
template <class Kernel>
inline constexpr int resident_blocks = 2;
template <class K, bool Wide, int Heads>
inline constexpr int resident_blocks<Logits<K, Wide, Heads>> = sizeof(K) == 1 ? 1 : 2;
template <>
inline constexpr int resident_blocks<Greedy> = 1;  // few blocks, which keep much from token to token

#if !defined(__CUDACC__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 700)  // HIP, or nvcc 11 for a GPU before Volta
template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, resident_blocks<Kernel>) run_kernel(const Kernel kernel) {
#else
template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, resident_blocks<Kernel>)
    run_kernel(const __grid_constant__ Kernel kernel) {
#endif
  __shared__ typename Kernel::template Shared<DeviceBlock> shared;
  DeviceBlock block;
  kernel(block, shared);
}

#endif

}  // namespace FASTV_KIND
}  // namespace gpu
}  // namespace detail

#if defined(__CUDACC__) || defined(__HIPCC__)

namespace cuda {
inline namespace FASTV_KIND {

// A stream to queue on; made of a cudaStream_t.
class Stream {
 public:
  Stream(detail::gpu::RuntimeStream stream) noexcept : stream_(stream) {}

  // Blocks of a launch.
  struct Grid {
    std::uint32_t x, y, z;
  };
  // Queues a kernel.
  template <class Kernel>
  Status launch(Grid grid, const Kernel& kernel) const noexcept {
    static_assert(sizeof(Kernel) <= 4096, "a launch has at most 4 KB of arguments");
    detail::gpu::run_kernel<Kernel><<<dim3(grid.x, grid.y, grid.z), Kernel::threads, 0, stream_>>>(kernel);
    return detail::gpu::runtime_status(detail::gpu::runtime_last_error(), "a launch");
  }
  // Memory of the current device.
  static Result<void*> allocate(std::size_t bytes) noexcept {
    void* memory = nullptr;
    const auto error = detail::gpu::runtime_allocate(&memory, bytes);
    if (error != detail::gpu::runtime_success) static_cast<void>(detail::gpu::runtime_last_error());
    return {memory, detail::gpu::runtime_status(error, "an allocation")};
  }
  // Gives it back.
  static void release(void* memory) noexcept { detail::gpu::runtime_free(memory); }

 private:
  detail::gpu::RuntimeStream stream_;
};

// See BasicPruner in cuda_pruner.hpp.
using Pruner = BasicPruner<Stream>;

}  // namespace FASTV_KIND
}  // namespace cuda

#endif

}  // namespace fastv

#include "detail/end.hpp"

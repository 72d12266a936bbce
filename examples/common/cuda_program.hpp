// A program of ours on a GPU: one stream, its memory, cuBLAS and graphs, random numbers; and what stops it, a call that
// failed, in one sentence.
#pragma once

#include <cublas_v2.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fastv/cuda.cuh>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "narrow.hpp"

namespace cuda_program {

extern const char* const name;  // which the program defines

[[noreturn]] inline void stop(const std::string& sentence) {
  std::fprintf(stderr, "%s: %s\n", name, sentence.c_str());
  std::exit(1);
}
inline void require(cudaError_t error) {
  if (error != cudaSuccess) stop(std::string("the CUDA runtime says ") + cudaGetErrorString(error));
}
inline void require(cublasStatus_t status) {
  if (status != CUBLAS_STATUS_SUCCESS) stop(std::string("cuBLAS says ") + cublasGetStatusString(status));
}
inline void require(const fastv::Status& status) {
  if (!status) stop(status.message().c_str());
}

// The first GPU. Without one the program ends with 77: skipped.
inline cudaDeviceProp gpu() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "%s: this machine has no GPU that the CUDA driver knows; nothing was run\n", name);
    std::exit(77);
  }
  cudaDeviceProp properties;
  require(cudaGetDeviceProperties(&properties, 0));
  return properties;
}

template <class T>
std::vector<T> download(const T* data, std::size_t size) {
  std::vector<T> host(size);
  require(cudaMemcpy(host.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost));
  return host;
}

// A piece of work as a CUDA graph.
class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void()>& work) {
    cudaGraph_t graph = nullptr;
    require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    work();
    require(cudaStreamEndCapture(stream, &graph));
    require(cudaGraphInstantiateWithFlags(&executable_, graph, 0));
    require(cudaGraphDestroy(graph));
  }
  Graph(Graph&& other) noexcept : executable_(std::exchange(other.executable_, nullptr)) {}
  ~Graph() {
    if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
  }
  void launch(cudaStream_t stream) const { require(cudaGraphLaunch(executable_, stream)); }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

// One stream, and what is allocated and multiplied on it. What examples/cuda/decoder.hpp runs on.
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
    require(cudaStreamSynchronize(stream));
    return cuda_program::download(from, count);
  }
  // y [rows, out] = x [rows, in] w^T, w [out, in].
  void multiply(const fastv::half* x, const fastv::half* w, fastv::half* y, std::size_t rows, std::size_t in,
                std::size_t out) const {
    const auto n = [](std::size_t value) { return static_cast<int>(value); };
    const float one = 1, zero = 0;
    require(cublasGemmEx(cublas_, CUBLAS_OP_T, CUBLAS_OP_N, n(out), n(rows), n(in), &one, w, CUDA_R_16F, n(in), x,
                         CUDA_R_16F, n(in), &zero, y, CUDA_R_16F, n(out), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  }

  cudaStream_t stream = nullptr;

 private:
  cublasHandle_t cublas_ = nullptr;
  std::vector<void*> memory_;
};

// Half precision, uniform, of this deviation about 0; repeats after a prime, which no stride divides.
inline std::vector<fastv::half> random_halves(std::size_t count, std::uint32_t seed, float deviation = 1) {
  static std::map<float, std::vector<fastv::half>> tables;
  std::vector<fastv::half>& all = tables[deviation];
  if (all.empty()) {
    all.resize(4194301);
    std::uint32_t state = 1;
    for (fastv::half& value : all) {
      state = state * 1664525u + 1013904223u;
      const float unit = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;  // [-1, 1)
      value = narrow<fastv::half>(unit * 1.7320508f * deviation);
    }
  }
  std::vector<fastv::half> values(count);
  for (std::size_t i = 0; i < count;) {
    const std::size_t from = i == 0 ? seed * 7919u % all.size() : 0, run = (std::min)(count - i, all.size() - from);
    std::memcpy(values.data() + i, all.data() + from, run * sizeof(fastv::half));
    i += run;
  }
  return values;
}

}  // namespace cuda_program

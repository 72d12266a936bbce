// What stops a program of ours on a GPU: a call that failed, in one sentence.
#pragma once

#include <cublas_v2.h>

#include <cstdio>
#include <cstdlib>
#include <fastv/cuda.cuh>
#include <string>

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

}  // namespace cuda_program

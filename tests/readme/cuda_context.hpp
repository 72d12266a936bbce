// What the fragment of README.md on CUDA may name.
#pragma once

#include <cstdio>
#include <fastv/cuda.cuh>
#include <vector>

extern const std::size_t rows, layers, width;
extern const float scale;
extern const fastv::half *q, *k;  // on the device, as all tensors
extern float *x, *y;
extern cudaStream_t stream;
extern std::vector<fastv::cuda::Request> requests;
extern fastv::cuda::Pruner pruner;

// In place of the file that builds of LibTorch with CUDA have and Debian's has not: with it, nvcc compiles the headers
// that both have. Nothing links.
#pragma once

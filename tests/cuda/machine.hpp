// What the tests' kernels run on: a GPU where nvcc compiles them, the host's emulation of one elsewhere.
#pragma once

#if defined(__CUDACC__)
#include "card.hpp"
namespace machine = card;
#else
#include "emulation.hpp"
namespace machine = emulation;
#endif

// main() of the tests of fastv/cuda.cuh on a GPU: those of score_test.cpp, select_test.cpp, diverse_test.cpp,
// batch_test.cpp and replay_test.cpp, which the host runs over an emulation, compiled by nvcc instead. run.sh builds it.
//
//   device_test [--apart] [NAME...]    tests whose names begin with one of these; all where none is said
//
// Tests fill in vectors and hand them over as they are: see card/memory.hpp, which --apart is for.
#include <cstdio>
#include <cstring>

#include "card.hpp"
#include "card/memory.hpp"
#include "gtest/gtest.h"

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "device_test: this machine has no GPU that the CUDA driver knows; nothing was tested\n");
    return 77;
  }
  const bool apart = argc > 1 && std::strcmp(argv[1], "--apart") == 0;
  if (!card::share_heap(apart)) {
    std::fprintf(stderr, "device_test: the CUDA runtime gives out no page-locked memory\n");
    return 1;
  }
  std::size_t run = 0, failed = 0;
  for (const testing::Test& test : testing::tests()) {
    bool chosen = argc <= (apart ? 2 : 1);
    for (int i = apart ? 2 : 1; i < argc; ++i)
      chosen = chosen || test.name.compare(0, std::strlen(argv[i]), argv[i]) == 0;
    if (!chosen) continue;
    const std::size_t before = testing::failures();
    test.run();
    for (const std::string& fault : card::faults()) std::printf("  the device: %s\n", fault.c_str());
    const bool passed = testing::failures() == before && card::faults().empty();
    std::printf("%-6s %s\n", passed ? "pass" : "FAIL", test.name.c_str());
    std::fflush(stdout);
    failed += passed ? 0 : 1;
    ++run;
    if (!card::faults().empty() && cudaDeviceSynchronize() != cudaSuccess) break;  // nothing runs on it any more
  }
  std::printf("%zu of %zu tests pass on the device\n", run - failed, run);
  if (run == 0) std::fprintf(stderr, "device_test: no test has a name that begins so\n");
  card::keep_heap();
  return run > 0 && failed == 0 ? 0 : 1;
}

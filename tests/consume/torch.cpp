// fastv::torch brings LibTorch along.
#include <cstdio>
#include <fastv/torch.hpp>

int main() {
  std::printf("a tensor is %d bytes\n", static_cast<int>(sizeof(at::Tensor)));
  return fastv::rows(at::Tensor(), 0) ? 1 : 0;
}

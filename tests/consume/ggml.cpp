// fastv::ggml brings ggml along.
#include <cstdio>
#include <fastv/ggml.hpp>

int main() {
  std::printf("ggml has %d types\n", static_cast<int>(GGML_TYPE_COUNT));
  return fastv::rows(static_cast<ggml_tensor*>(nullptr), 1) ? 1 : 0;
}

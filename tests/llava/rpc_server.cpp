// rpc_server HOST:PORT : a CPU behind llama.cpp's RPC backend, for the tests; ends when it is killed.
#include <ggml-backend.h>

#include <cstdio>

int main(int count, char** arguments) {
  ggml_backend_load_all();
  ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
  if (count != 2 || rpc == nullptr) {
    std::fputs("rpc_server: needs HOST:PORT, and a ggml that was built with GGML_RPC=ON\n", stderr);
    return 2;
  }
  using Start = void (*)(const char*, const char*, std::size_t, std::size_t, ggml_backend_dev_t*);
  const auto start = reinterpret_cast<Start>(ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_start_server"));
  ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  start(arguments[1], nullptr, 1, 1, &cpu);
}

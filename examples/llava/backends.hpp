// Every device that this build of ggml has, as one scheduler: GPUs first, the CPU last.
#pragma once

#include <ggml-cpp.h>

#include <vector>

namespace llava {

class Backends {
 public:
  // threads: of the CPU; 0: one per core. nodes: of the largest graph.
  explicit Backends(int threads = 0, std::size_t nodes = 65536);

  ggml_backend_sched_t scheduler() const { return scheduler_.get(); }
  int threads() const { return threads_; }
  // Where weights of the layers go, best first: the first device's memory, then the CPU's repacked and plain buffers.
  const std::vector<ggml_backend_buffer_type_t>& weight_buffers() const { return weight_buffers_; }
  // Where the KV cache goes.
  ggml_backend_buffer_type_t cache_buffer() const;
  // Whether `op`, one of whose sources is a weight, runs on a weight in that buffer.
  bool supports(ggml_backend_buffer_type_t buffer, const ggml_tensor* op) const;

 private:
  std::vector<ggml_backend_ptr> backends_;  // the CPU is the last
  std::vector<ggml_backend_buffer_type_t> weight_buffers_;
  ggml_backend_sched_ptr scheduler_;
  int threads_;
};

}  // namespace llava

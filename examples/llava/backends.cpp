#include "backends.hpp"

#include <stdexcept>
#include <thread>

namespace llava {

Backends::Backends(int threads, std::size_t nodes)
    : threads_(threads > 0 ? threads : static_cast<int>(std::thread::hardware_concurrency())) {
  if (ggml_backend_dev_count() == 0) ggml_backend_load_all();  // ggml built with its devices as plug-ins
  for (const auto type : {GGML_BACKEND_DEVICE_TYPE_GPU, GGML_BACKEND_DEVICE_TYPE_IGPU, GGML_BACKEND_DEVICE_TYPE_ACCEL,
                          GGML_BACKEND_DEVICE_TYPE_CPU})
    for (std::size_t i = 0; i < ggml_backend_dev_count(); ++i) {
      ggml_backend_dev_t device = ggml_backend_dev_get(i);
      if (ggml_backend_dev_type(device) != type) continue;
      if (ggml_backend_t backend = ggml_backend_dev_init(device, nullptr)) backends_.emplace_back(backend);
    }
  if (backends_.empty() ||
      ggml_backend_dev_type(ggml_backend_get_device(backends_.back().get())) != GGML_BACKEND_DEVICE_TYPE_CPU)
    throw std::runtime_error("this build of ggml has no CPU device: build one with GGML_CPU=ON");

  std::vector<ggml_backend_t> all;
  for (const ggml_backend_ptr& backend : backends_) {
    all.push_back(backend.get());
    ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get()));
    if (auto set_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
            ggml_backend_reg_get_proc_address(registry, "ggml_backend_set_n_threads")))
      set_threads(backend.get(), threads_);
  }
  scheduler_.reset(ggml_backend_sched_new(all.data(), nullptr, static_cast<int>(all.size()), nodes, false, true));

  ggml_backend_dev_t first = ggml_backend_get_device(all.front()), cpu = ggml_backend_get_device(all.back());
  if (first != cpu) weight_buffers_.push_back(ggml_backend_dev_buffer_type(first));
  // Q4_0 and others are multiplied at the CPU's full speed in an order of their own, which these buffers have.
  if (auto extra_buffers = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
          ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts")))
    for (ggml_backend_buffer_type_t* buffer = extra_buffers(cpu); buffer != nullptr && *buffer != nullptr; ++buffer)
      weight_buffers_.push_back(*buffer);
  weight_buffers_.push_back(ggml_backend_cpu_buffer_type());
}

ggml_backend_buffer_type_t Backends::cache_buffer() const {
  return ggml_backend_get_default_buffer_type(backends_.front().get());
}

bool Backends::supports(ggml_backend_buffer_type_t buffer, const ggml_tensor* op) const {
  ggml_backend_dev_t device = ggml_backend_buft_get_device(buffer);
  if (device == nullptr) device = ggml_backend_get_device(backends_.back().get());
  return ggml_backend_dev_supports_op(device, op);
}

}  // namespace llava

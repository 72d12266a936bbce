// Hidden rows where llama.cpp's layers left them, in host memory or on a device, and graphs of ours that run there.
#pragma once

#include <ggml-backend.h>
#include <ggml-cpp.h>

#include <fastv/fastv.hpp>
#include <functional>
#include <map>
#include <vector>

namespace llava {

inline std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

inline const ggml_tensor* root(const ggml_tensor* tensor) {
  while (tensor->view_src != nullptr) tensor = tensor->view_src;
  return tensor;
}
inline bool is_on_host(const ggml_tensor* tensor) { return ggml_backend_buffer_is_host(root(tensor)->buffer); }

// Queues of devices for graphs of ours, one a device, made when it is first asked for.
class Devices {
 public:
  // Of the device whose memory the tensor lies in. Throws std::runtime_error.
  ggml_backend_t of(const ggml_tensor* tensor);

 private:
  std::map<ggml_backend_dev_t, ggml_backend_ptr> queues_;
};

// A few nodes on a device, over tensors that are there.
class DeviceGraph {
 public:
  DeviceGraph(ggml_backend_t queue, std::size_t tensors);  // it has so many at most

  ggml_context* context() const { return context_.get(); }
  // The tensor as it lies there, without what has computed it.
  ggml_tensor* borrow(const ggml_tensor* tensor);
  // fill: called once tensors have memory, before the nodes run. False where the device has no such operation. Throws
  // std::runtime_error where it fails.
  bool compute(ggml_tensor* result, const std::function<void()>& fill = {});

 private:
  ggml_backend_t queue_;
  std::size_t tensors_;
  ggml_context_ptr context_;
  ggml_gallocr_ptr memory_;  // of the nodes, until the next compute()
};

// [count, d] in F32.
class Rows {
 public:
  std::size_t count() const { return count_; }
  bool on_host() const { return buffer_ == nullptr || ggml_backend_buffer_is_host(buffer_.get()); }
  void clear() { count_ = 0; }
  void reserve(std::size_t rows) { room_ = rows; }  // so that append() need not move them
  void append(const ggml_tensor* rows);             // [d, ...], in one piece; they go where those are
  void append(const Rows& rows);
  void write(std::size_t first, ggml_tensor* to) const;  // rows from `first` on fill `to`, wherever it is
  Rows pick(const std::vector<fastv::Index>& which, Devices& devices) const;

 private:
  ggml_tensor part(std::size_t first, std::size_t count) const;

  ggml_backend_buffer_ptr buffer_;
  std::int64_t width_ = 0;
  std::size_t count_ = 0, room_ = 0, held_ = 0;  // rows in it, asked for, and that fit in
};

}  // namespace llava

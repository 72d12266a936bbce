// What the decoder of examples/cuda runs on in the tests, on a GPU or over the emulation of one: a plain loop in place of
// cuBLAS.
#pragma once

#include <vector>

#include "../../examples/cuda/decoder.hpp"
#include "machine.hpp"

// y [rows, out] = x [rows, in] w^T. Grid: rows.
template <class T>
struct PlainProduct {
  static constexpr int threads = 32;
  template <class Block>
  struct Shared {};
  const T *x, *w;
  T* y;
  std::size_t in, out;

  template <class Block, class Memory>
  EXAMPLE_KERNEL void operator()(Block& block, Memory&) const {
    block.each([&](int thread) {
      for (auto o = static_cast<std::size_t>(thread); o < out; o += threads) {
        float sum = 0;
        for (std::size_t i = 0; i < in; ++i)
          sum += fastv::to_float(x[block.x() * in + i]) * fastv::to_float(w[o * in + i]);
        y[block.x() * out + o] = narrow<T>(sum);
      }
    });
  }
};

class PlainMachine {
 public:
  using Pruner = fastv::cuda::BasicPruner<machine::Queue>;
  explicit PlainMachine(oracle::Rng& rng) : queue_(rng) {}
  PlainMachine(const PlainMachine&) = delete;
  ~PlainMachine() {
    for (void* memory : memory_) machine::Queue::release(memory);
  }
  machine::Queue queue() const { return queue_; }
  template <class T>
  T* allocate(std::size_t count) {
    memory_.push_back(*machine::Queue::allocate(count * sizeof(T)));
    return static_cast<T*>(memory_.back());
  }
  template <class T>
  void upload(T* to, const std::vector<T>& from) {
    machine::Queue::copy(to, from.data(), from.size() * sizeof(T));
  }
  template <class T>
  std::vector<T> download(const T* from, std::size_t count) {
    std::vector<T> host(count);
    machine::Queue::copy(host.data(), from, count * sizeof(T));
    return host;
  }
  template <class T>
  void multiply(const T* x, const T* w, T* y, std::size_t rows, std::size_t in, std::size_t out) {
    const fastv::Status status =
        queue_.launch({static_cast<std::uint32_t>(rows), 1, 1}, PlainProduct<T>{x, w, y, in, out});
    if (!status) machine::faults().insert(status.message().c_str());
  }

 private:
  machine::Queue queue_;
  std::vector<void*> memory_;
};

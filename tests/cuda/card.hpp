// A GPU in the place of the emulation: what emulation.hpp has for the tests, over a CUDA stream. The tests are the same
// sources, compiled by nvcc; see device_test.cu.
//
// Tensors that tests make lie on the heap, which device_test.cu keeps in memory that the device reaches as well, at the
// same addresses. A Pruner's own memory is the device's: kept() copies its results to the host.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "../oracle.hpp"
#include "counted.hpp"
#include "fastv/cuda.cuh"

namespace card {

// What went wrong on the device since the last look, each once.
inline std::set<std::string>& faults() {
  static std::set<std::string> all;
  return all;
}
inline void note(const fastv::Status& status) {
  if (!status) faults().insert(status.message().c_str());
}
inline void note(cudaError_t error, const char* what) { note(fastv::detail::gpu::runtime_status(error, what)); }

// Launches that were captured, to be run again.
class Recording {
 public:
  explicit Recording(cudaGraph_t graph) {
    note(cudaGraphInstantiateWithFlags(&executable_, graph, 0), "the making of a graph");
    note(cudaGraphDestroy(graph), "the making of a graph");
  }
  Recording(const Recording&) = delete;
  ~Recording() { cudaGraphExecDestroy(executable_); }
  void replay() const {
    note(cudaGraphLaunch(executable_, nullptr), "a graph");
    note(cudaDeviceSynchronize(), "a graph");
  }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

// A stream; the host waits for every kernel, so that tests may look at what it has done.
class Queue : public CountedQueue {
 public:
  explicit Queue(oracle::Rng&) {}

  template <class Kernel>
  fastv::Status launch(fastv::cuda::Stream::Grid grid, const Kernel& kernel) {
    ++launches();
    fastv::Status status = fastv::cuda::Stream(stream()).launch(grid, kernel);
    if (status && !recording())
      status = fastv::detail::gpu::runtime_status(cudaStreamSynchronize(stream()), "a kernel");
    note(status);
    return status;
  }
  // The launches of `work`, which are not run.
  template <class Work>
  Recording record(const Work& work) {
    cudaGraph_t graph = nullptr;
    recording() = true;
    note(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeGlobal), "a capture");
    work();
    note(cudaStreamEndCapture(stream(), &graph), "a capture");
    recording() = false;
    return Recording(graph);
  }
  static fastv::Result<void*> allocate(std::size_t bytes) {
    ++allocations();
    const fastv::Result<void*> memory = fastv::cuda::Stream::allocate(bytes);
    if (memory) note(cudaMemset(*memory, 0xA5, bytes), "memset");
    return memory;
  }
  static void release(void* memory) { fastv::cuda::Stream::release(memory); }
  // Either way, behind all that the stream has to do.
  static void copy(void* to, const void* from, std::size_t bytes) {
    note(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream()), "a copy");
    note(cudaStreamSynchronize(stream()), "a copy");
  }

 private:
  static cudaStream_t stream() {
    static cudaStream_t made = [] {
      cudaStream_t stream = nullptr;
      note(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
      return stream;
    }();
    return made;
  }
  static bool& recording() {
    static bool now = false;
    return now;
  }
};

// Its results are the host's, until the next kept().
class Pruner : public fastv::cuda::BasicPruner<Queue> {
  using Base = fastv::cuda::BasicPruner<Queue>;

 public:
  fastv::Status reserve(const fastv::cuda::Limits& limits) {
    visual_ = limits.visual == 0 ? limits.tokens : limits.visual;
    return Base::reserve(limits);
  }
  fastv::Status plan(fastv::Span<const fastv::cuda::Request> requests, std::size_t layers, Queue queue) {
    sequences_ = requests.size();
    return Base::plan(requests, layers, queue);
  }
  fastv::cuda::Kept kept(std::size_t stage) {
    fastv::cuda::Kept results = Base::kept(stage);
    bring(results.rows, results.total, rows_);
    bring(results.positions, results.total, positions_);
    bring(results.slots, results.total, slots_);
    bring(results.cumulative, sequences_ + 1, cumulative_);
    bring(results.cumulative_keys, sequences_ + 1, cumulative_keys_);
    bring(results.visual_numbers, results.total_visual, numbers_);
    bring(results.counters, sequences_, counters_);
    bring(results.scores, visual_, scores_);
    return results;
  }

 private:
  template <class T>
  static void bring(const T*& data, std::size_t count, std::vector<T>& host) {
    host.resize(count);
    if (count > 0) note(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost), "a copy");
    data = host.data();
  }
  std::size_t visual_ = 0, sequences_ = 0;
  std::vector<std::int32_t> rows_, positions_, slots_, cumulative_, cumulative_keys_, numbers_;
  std::vector<fastv::cuda::Counters> counters_;
  std::vector<float> scores_;
};

}  // namespace card

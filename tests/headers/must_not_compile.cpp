// Pairs: what a user meant, and the slip that must not compile. check.sh builds the good branch of each case, sees the
// bad one fail, and looks for the sentence behind `says:` in its errors.
#include <fastv/fastv.hpp>
#include <vector>

namespace at {
struct Tensor {  // stands for LibTorch's: an object that holds its sizes itself
  std::vector<float> data_;
  const float* data() const { return data_.data(); }
};
}  // namespace at
struct ggml_tensor {  // stands for ggml's: sizes and strides beside a pointer
  long long ne[4];
  std::size_t nb[4];
  void* data;
};

int main() {
  [[maybe_unused]] std::vector<fastv::TokenSpan> visual = {{1, 2}};
  [[maybe_unused]] std::vector<fastv::Index> indices = {0, 1, 3};
  [[maybe_unused]] at::Tensor tensor{std::vector<float>(64)};
  [[maybe_unused]] ggml_tensor node = {{8, 4, 1, 1}, {4, 32, 128, 128}, nullptr};
  [[maybe_unused]] fastv::Pruner<float> pruner;
  [[maybe_unused]] const float* p = tensor.data();
#if FASTV_CASE == 0
#elif FASTV_CASE == 1  // says: prune() takes fastv::Probabilities, QueryKey, KeysOnly, Scores or NoEvidence
#ifdef FASTV_BAD
  (void)pruner.prune(tensor, visual);
#else
  (void)pruner.prune(fastv::probabilities(p, 1, 1, 4), visual);
#endif
#elif FASTV_CASE == 2  // says: include <fastv/eigen.hpp>, <fastv/ggml.hpp> or <fastv/torch.hpp>
#ifdef FASTV_BAD
  (void)fastv::query_key(tensor, tensor, 4, 2, 2, 1.0f);
#else
  (void)fastv::query_key(p, 2, 1, p, 2, 4, 8, 1.0f, fastv::KvLayout::token_major);
#endif
#elif FASTV_CASE == 3  // says: fastv::rows(data, count, width)
#ifdef FASTV_BAD
  (void)fastv::compact(indices, tensor);
#else
  (void)fastv::compact(indices, fastv::rows(tensor.data_.data(), 4, 16));
#endif
#elif FASTV_CASE == 4  // says: fastv::token_rows(tensor, axis) of <fastv/ggml.hpp>
#ifdef FASTV_BAD
  (void)fastv::rows(&node, 1);
#else
  (void)fastv::rows(static_cast<float*>(node.data), 4, 8);
#endif
#elif FASTV_CASE == 5  // says: include <fastv/eigen.hpp>, <fastv/ggml.hpp> or <fastv/torch.hpp>
#ifdef FASTV_BAD
  (void)fastv::rows(tensor, 1);
#else
  (void)fastv::rows(tensor.data_.data(), 4);
#endif
#elif FASTV_CASE == 6  // says: rows are moved as bytes
#ifdef FASTV_BAD
  std::vector<std::vector<float> > owners(4);
  (void)fastv::rows(owners.data(), 4);
#else
  (void)fastv::rows(indices.data(), 3);
#endif
#elif FASTV_CASE == 7  // says: include <fastv/eigen.hpp>, <fastv/ggml.hpp> or <fastv/torch.hpp>
#ifdef FASTV_BAD
  (void)fastv::probabilities(tensor, 1, 1, 4);
#else
  (void)fastv::probabilities(p, 1, 1, 4);
#endif
#elif FASTV_CASE == 8  // says: evidence_of(i) must return fastv::Probabilities, QueryKey
#ifdef FASTV_BAD
  fastv::BatchPruner<float> batch;
  (void)batch.prune({}, [&](std::size_t) { return tensor; });
#else
  fastv::BatchPruner<float> batch;
  (void)batch.prune({}, [&](std::size_t) { return fastv::probabilities(p, 1, 1, 4); });
#endif
#elif FASTV_CASE == 9  // says: error:
  // A failure that nobody looks at is no error of C++; with warnings as errors it is one, by [[nodiscard]].
#pragma GCC diagnostic error "-Wunused-result"
#ifdef FASTV_BAD
  fastv::compact(indices, fastv::rows(indices.data(), 3));
#else
  if (!fastv::compact(indices, fastv::rows(indices.data(), 3))) return 1;
#endif
#else
#error "must_not_compile.cpp has no such case"
#endif
}

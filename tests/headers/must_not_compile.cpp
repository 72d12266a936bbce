// Pairs: what a user meant, and the slip that must not compile. check.sh builds the good branch of each case, sees the
// bad one fail with one error, and looks for the sentence behind `says:` in it.
#include <fastv/fastv.hpp>
#include <vector>
#if FASTV_CASE == 42
#include <fastv/cuda_views.hpp>
#endif

#if FASTV_CASE >= 100  // of an engine, and skipped where it is not installed: 100 on of LibTorch, 200 on of ggml

#if FASTV_CASE < 200
#include <fastv/torch.hpp>
using Tensor = at::Tensor;
#else
#include <fastv/ggml.hpp>
using Tensor = ggml_tensor*;
#endif

int main() {
  const std::vector<fastv::Index> indices = {0, 1};
  Tensor tensor{};
#if FASTV_CASE == 0
#elif FASTV_CASE == 100  // says: the dimension along which the tokens of this tensor lie is missing
#ifdef FASTV_BAD
  (void)fastv::compact(indices, tensor);
#else
  (void)fastv::compact(indices, tensor, 1);
#endif
#elif FASTV_CASE == 101  // says: the dimension along which the tokens of this tensor lie is missing
#ifdef FASTV_BAD
  (void)fastv::gather(indices, tensor);
#else
  (void)fastv::gather(indices, tensor, 1);
#endif
#elif FASTV_CASE == 102  // says: the dimension along which the tokens of this tensor lie is missing
#ifdef FASTV_BAD
  (void)fastv::rows(tensor);
#else
  (void)fastv::rows(tensor, 1);
#endif
#elif FASTV_CASE == 200  // says: the dimension along which the tokens of this tensor lie is missing
#ifdef FASTV_BAD
  (void)fastv::compact(indices, tensor);
#else
  (void)fastv::compact(indices, tensor, 1);
#endif
#elif FASTV_CASE == 201  // says: the dimension along which the tokens of this tensor lie is missing
#ifdef FASTV_BAD
  (void)fastv::gather(indices, tensor, tensor);
#else
  (void)fastv::gather(indices, tensor, tensor, 1);
#endif
#else
#error "must_not_compile.cpp has no such case"
#endif
}

#else

namespace at {
struct Tensor {  // stands for LibTorch's: an object that holds its sizes itself
  std::vector<float> data_;
  const float* data() const { return data_.data(); }
};
}  // namespace at
namespace Eigen {
struct Matrix {  // stands for Eigen's: what looks like a container, but is more
  std::vector<float> data_;
  float* data() { return data_.data(); }
  const float* data() const { return data_.data(); }
  long rows() const { return 4; }
  long cols() const { return 2; }
  long size() const { return 8; }
};
}  // namespace Eigen
struct ggml_tensor {  // stands for ggml's: sizes and strides beside a pointer
  long long ne[4];
  std::size_t nb[4];
  void* data;
};
struct Lengths {  // evidence of a user's own, half written
  std::size_t prompt_tokens() const noexcept { return 4; }
};
struct Whole : Lengths {
  template <class Score>
  fastv::Status score(fastv::Span<const fastv::TokenSpan>, fastv::Span<Score> scores) const noexcept {
    for (Score& score : scores) score = 1;
    return {};
  }
};
// The same with one member that is not as the contract has it.
struct CountsUnlessConst : Whole {
  std::size_t prompt_tokens() noexcept { return 4; }
};
struct CountsNothing : Whole {
  void prompt_tokens() const noexcept {}
};
struct ScoresUnlessConst : Lengths {
  template <class Score>
  fastv::Status score(fastv::Span<const fastv::TokenSpan>, fastv::Span<Score>) noexcept {
    return {};
  }
};
struct ScoresIntoAVector : Lengths {
  fastv::Status score(fastv::Span<const fastv::TokenSpan>, std::vector<float>&) const noexcept { return {}; }
};
struct ScoresForTheOldContract : Lengths {  // rows, spans and scores apart
  template <class Score, class ParallelFor>
  fastv::Status score(const fastv::QueryRows&, fastv::Span<const fastv::TokenSpan>, fastv::Span<Score>,
                      const ParallelFor&) const noexcept {
    return {};
  }
};
struct ScoresWithoutAStatus : Lengths {
  template <class Score>
  void score(fastv::Span<const fastv::TokenSpan>, fastv::Span<Score>) const noexcept {}
};
struct ScoresInFloat : Lengths {
  fastv::Status score(fastv::Span<const fastv::TokenSpan>, fastv::Span<float>) const noexcept { return {}; }
};
struct ChecksUnlessConst : Whole {
  fastv::Status check() noexcept { return {}; }
};
struct ChecksASize : Whole {
  fastv::Status check(std::size_t) const noexcept { return {}; }
};
struct ChecksWithoutAStatus : Whole {
  bool check() const noexcept { return true; }
};
struct ScratchUnlessConst : Whole {
  std::size_t scratch_floats() noexcept { return 8; }
};
struct Sound : Whole {
  bool check = true;  // no function
  std::size_t scratch_floats() const noexcept { return 8; }
};
struct Own {};
struct Other {};
namespace fastv {
template <>
struct KeysOnly<Own> : Lengths {};
template <>
struct KeysOnly<Other> : Whole {};
}  // namespace fastv

int main() {
  [[maybe_unused]] std::vector<fastv::TokenSpan> visual = {{1, 2}};
  [[maybe_unused]] std::vector<fastv::Index> indices = {0, 1, 3}, table = {0};
  [[maybe_unused]] at::Tensor tensor{std::vector<float>(64)};
  [[maybe_unused]] Eigen::Matrix matrix{std::vector<float>(8)};
  [[maybe_unused]] ggml_tensor node = {{8, 4, 1, 1}, {4, 32, 128, 128}, nullptr};
  [[maybe_unused]] fastv::Pruner<float> pruner;
  [[maybe_unused]] const float* p = tensor.data();
  [[maybe_unused]] std::vector<float> ids(4);
  [[maybe_unused]] std::vector<std::vector<float> > owners(4);
  [[maybe_unused]] std::vector<std::uint16_t> fp16(64);
  [[maybe_unused]] const fastv::TokenMajor shape{4, 2, 8};
  [[maybe_unused]] const fastv::KvPages page = fastv::pages(ids.data(), fastv::TokenMajor{4, 1, 1}, table, 4);
#if FASTV_CASE == 0
#elif FASTV_CASE == 1  // says: evidence is fastv::Probabilities, QueryKey, KeysOnly, Scores
#ifdef FASTV_BAD
  (void)pruner.prune(tensor, visual);
#else
  (void)pruner.prune(fastv::probabilities(p, 1, 1, 4), visual);
#endif
#elif FASTV_CASE == 2  // says: include the adaptor of its engine
#ifdef FASTV_BAD
  (void)fastv::query_key(tensor, tensor, 1.0f);
#else
  (void)fastv::query_key(fastv::heads(p, fastv::TokenMajor{1, 4, 8}), fastv::heads(p, shape), 1.0f);
#endif
#elif FASTV_CASE == 3  // says: fastv::rows(data, count, width)
#ifdef FASTV_BAD
  (void)fastv::compact(indices, tensor);
#else
  (void)fastv::compact(indices, fastv::rows(tensor.data_.data(), 4, 16));
#endif
#elif FASTV_CASE == 4  // says: an engine's tensor by the rows(tensor, axis) of its adaptor
#ifdef FASTV_BAD
  (void)fastv::rows(&node, 1);
#else
  (void)fastv::rows(static_cast<float*>(node.data), 4, 8);
#endif
#elif FASTV_CASE == 5  // says: include the adaptor of its engine
#ifdef FASTV_BAD
  (void)fastv::rows(tensor, 1);
#else
  (void)fastv::rows(tensor.data_.data(), 4);
#endif
#elif FASTV_CASE == 6  // says: rows are moved as bytes
#ifdef FASTV_BAD
  (void)fastv::rows(owners.data(), 4);
#else
  (void)fastv::rows(indices.data(), 3);
#endif
#elif FASTV_CASE == 7  // says: include the adaptor of its engine
#ifdef FASTV_BAD
  (void)fastv::probabilities(tensor, 1, 1, 4);
#else
  (void)fastv::probabilities(p, 1, 1, 4);
#endif
#elif FASTV_CASE == 8  // says: evidence is fastv::Probabilities, QueryKey, KeysOnly, Scores
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
#elif FASTV_CASE == 10  // says: pages are moved by fastv::compact_pages()
#ifdef FASTV_BAD
  (void)fastv::compact(indices, page);
#else
  (void)fastv::compact_pages(indices, page);
#endif
#elif FASTV_CASE == 11  // says: hand over one fastv::Rows at a time, and pages to fastv::compact_pages()
  // The views of the pages must not be taken for numbers, and moved themselves.
#ifdef FASTV_BAD
  (void)fastv::compact(indices, fastv::Span<const fastv::KvPages>(&page, 1));
#else
  (void)fastv::compact_pages(indices, fastv::Span<const fastv::KvPages>(&page, 1));
#endif
#elif FASTV_CASE == 12  // says: hand over one fastv::Rows at a time
  [[maybe_unused]] std::vector<fastv::Rows> caches(2, fastv::rows(ids.data(), 4));
#ifdef FASTV_BAD
  (void)fastv::compact(indices, caches);
#else
  for (const fastv::Rows& cache : caches) (void)fastv::compact(indices, cache);
#endif
#elif FASTV_CASE == 13  // says: hand over one fastv::Rows at a time
#ifdef FASTV_BAD
  (void)fastv::compact(indices, owners);
#else
  (void)fastv::compact(indices, ids);
#endif
#elif FASTV_CASE == 14  // says: fastv::heads(fastv::as_half(data), shape)
#ifdef FASTV_BAD
  (void)fastv::heads(fp16.data(), shape);
#else
  (void)fastv::heads(fastv::as_half(fp16.data()), shape);
#endif
#elif FASTV_CASE == 15  // says: fastv::heads(fastv::as_half(data), shape)
#ifdef FASTV_BAD
  (void)fastv::heads(fp16.data(), fastv::HeadMajor{2, 4, 8}, table, 4);
#else
  (void)fastv::heads(fastv::as_bfloat16(fp16.data()), fastv::HeadMajor{2, 4, 8}, table, 4);
#endif
#elif FASTV_CASE == 16  // says: fastv::probabilities(fastv::as_half(data), ...)
#ifdef FASTV_BAD
  (void)fastv::probabilities(fp16.data(), 1, 1, 4);
#else
  (void)fastv::probabilities(fastv::as_half(fp16.data()), 1, 1, 4);
#endif
#elif FASTV_CASE == 17  // says: a matrix is compacted by the adaptor of its library: include <fastv/eigen.hpp>
#ifdef FASTV_BAD
  (void)fastv::compact(indices, matrix);
#else
  (void)fastv::compact(indices, fastv::rows(matrix.data(), 4, 2));
#endif
#elif FASTV_CASE == 18  // says: this evidence has prompt_tokens() but no score() const that can be called as
#ifdef FASTV_BAD
  (void)pruner.prune(Lengths{}, visual);
#else
  (void)pruner.prune(Whole{}, visual);
#endif
#elif FASTV_CASE == 19  // says: KeysOnly holds the keys as a view: fastv::heads(k, shape)
#ifdef FASTV_BAD
  (void)pruner.prune(fastv::KeysOnly{tensor}, visual);
#else
  (void)pruner.prune(fastv::KeysOnly{fastv::heads(p, shape)}, visual);
#endif
#elif FASTV_CASE == 20  // says: query_key() takes two views and the scale of the logits
#ifdef FASTV_BAD
  (void)fastv::query_key(fastv::heads(p, fastv::TokenMajor{1, 4, 8}), fastv::heads(p, shape));
#else
  (void)fastv::query_key(fastv::heads(p, fastv::TokenMajor{1, 4, 8}), fastv::heads(p, shape), 1.0f);
#endif
#elif FASTV_CASE == 21  // says: heads are views to read: what is moved is fastv::rows(data, shape)
#ifdef FASTV_BAD
  (void)fastv::compact(indices, fastv::heads(p, shape));
#else
  (void)fastv::compact(indices, fastv::rows(tensor.data_.data(), shape));
#endif
#elif FASTV_CASE == 22  // says: a pointer to memory that may be written
#ifdef FASTV_BAD
  (void)fastv::rows(p, 4, 8);
#else
  (void)fastv::rows(tensor.data_.data(), 4, 8);
#endif
#elif FASTV_CASE == 23  // says: or a list of fastv::Index (32 bits, unsigned), ascending
#ifdef FASTV_BAD
  (void)fastv::compact(std::vector<long long>{0, 1}, fastv::rows(ids.data(), 4));
#else
  (void)fastv::compact(std::vector<fastv::Index>{0, 1}, fastv::rows(ids.data(), 4));
#endif
#elif FASTV_CASE == 24  // says: a pointer to the elements and their shape, as in fastv::heads(data, fastv::TokenMajor{
#ifdef FASTV_BAD
  (void)fastv::heads(p, 4, 2, 8);
#else
  (void)fastv::heads(p, fastv::TokenMajor{4, 2, 8});
#endif
#elif FASTV_CASE == 25  // says: void(std::size_t kv_head, std::size_t token, float* out)
#ifdef FASTV_BAD
  (void)fastv::loaded_keys(2, 4, 8, [](std::size_t token) { return token; });
#else
  (void)fastv::loaded_keys(2, 4, 8, [](std::size_t, std::size_t, float* out) { *out = 0; });
#endif
#elif FASTV_CASE == 26  // says: prompt_tokens() of this evidence cannot be called as std::size_t prompt_tokens() const
#ifdef FASTV_BAD
  (void)pruner.prune(CountsUnlessConst{}, visual);
#else
  (void)pruner.prune(Whole{}, visual);
#endif
#elif FASTV_CASE == 27  // says: prompt_tokens() of this evidence cannot be called as std::size_t prompt_tokens() const
#ifdef FASTV_BAD
  (void)pruner.prune(CountsNothing{}, visual);
#else
  (void)pruner.prune(Whole{}, visual);
#endif
#elif FASTV_CASE == 28  // says: no score() const that can be called as
#ifdef FASTV_BAD
  (void)pruner.prune(ScoresUnlessConst{}, visual);
#else
  (void)pruner.prune(Whole{}, visual);
#endif
#elif FASTV_CASE == 29  // says: no score() const that can be called as
#ifdef FASTV_BAD
  (void)pruner.prune(ScoresIntoAVector{}, visual);
#else
  (void)pruner.prune(ScoresInFloat{}, visual);
#endif
#elif FASTV_CASE == 30  // says: no score() const that can be called as
#ifdef FASTV_BAD
  (void)pruner.prune(ScoresForTheOldContract{}, visual);
#else
  (void)pruner.prune(Whole{}, visual);
#endif
#elif FASTV_CASE == 31  // says: and returns a Status
#ifdef FASTV_BAD
  (void)pruner.prune(ScoresWithoutAStatus{}, visual);
#else
  (void)pruner.prune(Whole{}, visual);
#endif
#elif FASTV_CASE == 32  // says: Score being float or, of a Pruner<double>, double
#ifdef FASTV_BAD
  (void)fastv::Pruner<double>().prune(ScoresInFloat{}, visual);
#else
  (void)fastv::Pruner<float>().prune(ScoresInFloat{}, visual);
#endif
#elif FASTV_CASE == 33  // says: check() of this evidence cannot be called as Status check() const
#ifdef FASTV_BAD
  (void)pruner.prune(ChecksUnlessConst{}, visual);
#else
  (void)pruner.prune(Sound{}, visual);
#endif
#elif FASTV_CASE == 34  // says: check() of this evidence cannot be called as Status check() const
#ifdef FASTV_BAD
  (void)pruner.prune(ChecksASize{}, visual);
#else
  (void)pruner.prune(Sound{}, visual);
#endif
#elif FASTV_CASE == 35  // says: check() of this evidence cannot be called as Status check() const
#ifdef FASTV_BAD
  (void)pruner.prune(ChecksWithoutAStatus{}, visual);
#else
  (void)pruner.prune(Sound{}, visual);
#endif
#elif FASTV_CASE == 36  // says: scratch_floats() of this evidence cannot be called as std::size_t
#ifdef FASTV_BAD
  (void)pruner.prune(ScratchUnlessConst{}, visual);
#else
  (void)pruner.prune(Sound{}, visual);
#endif
#elif FASTV_CASE == 37  // says: no score() const that can be called as
#ifdef FASTV_BAD
  (void)pruner.prune(fastv::KeysOnly<Own>{}, visual);
#else
  (void)pruner.prune(fastv::KeysOnly<Other>{}, visual);
#endif
#elif FASTV_CASE == 38  // says: no score() const that can be called as
#ifdef FASTV_BAD
  (void)fastv::score({}, Lengths{}, visual, fastv::Span<float>(ids));
#else
  (void)fastv::score({}, Whole{}, visual, fastv::Span<float>(ids));
#endif
#elif FASTV_CASE == 39  // says: check() of this evidence cannot be called as Status check() const
#ifdef FASTV_BAD
  (void)fastv::BatchPruner<float>().prune({}, [](std::size_t) { return ChecksUnlessConst{}; });
#else
  (void)fastv::BatchPruner<float>().prune({}, [](std::size_t) { return Sound{}; });
#endif
#elif FASTV_CASE == 40  // says: its table as a list of fastv::Index (fastv::as_index() of one of int32)
  [[maybe_unused]] const std::vector<std::int32_t> signed_table = {0};
#ifdef FASTV_BAD
  (void)fastv::heads(p, fastv::HeadMajor{2, 4, 8}, signed_table, 4);
#else
  (void)fastv::heads(p, fastv::HeadMajor{2, 4, 8}, fastv::as_index(signed_table), 4);
#endif
#elif FASTV_CASE == 41  // says: integers of at least 32 bits
#ifdef FASTV_BAD
  (void)fastv::write_indices(indices, fp16);
#else
  (void)fastv::write_indices(indices, indices);
#endif
#elif FASTV_CASE == 42  // says: a view made by fastv::heads() is one of host memory
#ifdef FASTV_BAD
  (void)fastv::cuda::query_key(fastv::heads(p, shape), fastv::heads(p, shape), 1.0f);
#else
  (void)fastv::cuda::query_key(fastv::cuda::heads(p, shape), fastv::cuda::heads(p, shape), 1.0f);
#endif
#else
#error "must_not_compile.cpp has no such case"
#endif
}
#endif

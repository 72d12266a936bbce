// Every kernel that fastv/cuda.cuh can make, for compile.sh. Nothing here runs.
#include <fastv/cuda.cuh>

using namespace fastv;

template <class Q, class K>
Status by_keys(cuda::Pruner& pruner, const Q* q, const K* k, cuda::Stream stream) {
  return pruner.prune(
      0, cuda::query_key(cuda::heads(q, TokenMajor{8, 8, 128}), cuda::heads(k, TokenMajor{8, 2, 128}), 1), stream);
}
template <class T>
Status by_features(cuda::Pruner& pruner, const T* k, cuda::Stream stream) {
  const cuda::KeysOnly<T> alone{cuda::heads(k, TokenMajor{8, 2, 128})};
  const Status status = pruner.prune(0, alone, stream);
  return status ? pruner.prune(0, cuda::with_features(alone, alone.key), stream) : status;
}
template <class T>
Status by_probabilities(cuda::Pruner& pruner, const T* p, cuda::Stream stream) {
  return pruner.prune(0, cuda::probabilities(p, 8, 1, 8), stream);
}

Status everything(Span<const cuda::Request> requests, void* p, cuda::Stream stream) {
  cuda::Pruner pruner;
  const auto* h = static_cast<const half*>(p);
  const auto* b = static_cast<const bfloat16*>(p);
  const auto* f = static_cast<const float*>(p);
  Status status = pruner.reserve(cuda::Limits{});
  if (status) status = pruner.plan(requests, 32, stream);
  if (status) status = by_keys(pruner, h, h, stream);
  if (status) status = by_keys(pruner, b, b, stream);
  if (status) status = by_keys(pruner, f, f, stream);
  if (status) status = by_keys(pruner, h, static_cast<const fp8_e4m3*>(p), stream);
  if (status) status = by_keys(pruner, h, static_cast<const fp8_e5m2*>(p), stream);
  if (status) status = by_keys(pruner, h, static_cast<const std::int8_t*>(p), stream);
  if (status) status = by_features(pruner, h, stream);
  if (status) status = by_features(pruner, b, stream);
  if (status) status = by_features(pruner, f, stream);
  if (status) status = by_features(pruner, static_cast<const fp8_e4m3*>(p), stream);
  if (status) status = by_features(pruner, static_cast<const fp8_e5m2*>(p), stream);
  if (status) status = by_features(pruner, static_cast<const std::int8_t*>(p), stream);
  if (status) status = by_probabilities(pruner, h, stream);
  if (status) status = by_probabilities(pruner, b, stream);
  if (status) status = by_probabilities(pruner, f, stream);
  if (status) status = pruner.prune(0, cuda::Scores{f}, stream);
  if (status) status = pruner.prune(0, cuda::NoEvidence{}, stream);
  if (status)
    status = pruner.gather(0, {{rows(static_cast<float*>(p), 8, 128), rows(static_cast<float*>(p), 8, 128)}}, stream);
  return status;
}

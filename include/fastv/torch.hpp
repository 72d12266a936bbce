// fastv: views of LibTorch tensors on the CPU, without a copy, and kept indices as a tensor. LibTorch 1.13 or newer.
//
// Include it beside fastv.hpp. It costs hardly more than at::Tensor itself: of ATen it includes the tensor class alone,
// of fastv the views and the settings. Tensors on any device, with no round trip to the host: torch_device.hpp.
//
//   auto kept = pruner.prune(fastv::probabilities(attention), visual);         // [1, heads, rows, keys]
//   auto kept = pruner.prune(fastv::query_key(query, key, scale), visual);     // [1, heads, rows, dim]
//   fastv::Status done = fastv::compact_rows(kept, hidden, 1);                 // [1, n, width] -> [1, m, width]
//
// Nothing here throws but what ATen itself throws. A view is valid as long as the tensor it was made of.
#pragma once

#include <ATen/core/Tensor.h>

#include "config.hpp"

namespace fastv {

// A view whose element type is known only at run time, as a tensor's is: one of View<float>, <double>, <half> and
// <bfloat16>. A Pruner takes it like any other evidence. visit(use) calls use(view) with that one; so its fields are
// set too:  evidence.value.visit([&](auto& view) { view.past = past; });
template <template <class> class View>
class TensorView {
 public:
  // An empty view of floats.
  TensorView() noexcept : floats_{} {}
  // A view of floats.
  TensorView(const View<float>& view) noexcept : type_(at::kFloat), floats_(view) {}
  // A view of doubles.
  TensorView(const View<double>& view) noexcept : type_(at::kDouble), doubles_(view) {}
  // A view of halves.
  TensorView(const View<half>& view) noexcept : type_(at::kHalf), halves_(view) {}
  // A view of bfloat16s.
  TensorView(const View<bfloat16>& view) noexcept : type_(at::kBFloat16), bfloats_(view) {}

  // Of the tensor's elements.
  at::ScalarType type() const noexcept { return type_; }
  // Calls use(view) with the view of the tensor's own element type, and returns what it returns.
  template <class Use>
  auto visit(Use use) {
    switch (type_) {
      case at::kDouble: return use(doubles_);
      case at::kHalf: return use(halves_);
      case at::kBFloat16: return use(bfloats_);
      default: return use(floats_);
    }
  }
  // The same on a view that is not to be changed.
  template <class Use>
  auto visit(Use use) const {
    return const_cast<TensorView*>(this)->visit([&](const auto& view) { return use(view); });
  }

 private:
  at::ScalarType type_ = at::kFloat;
  union {  // of pointers and numbers
    View<float> floats_;
    View<double> doubles_;
    View<half> halves_;
    View<bfloat16> bfloats_;
  };
};

namespace detail {
template <class T>
using QueryKeyOf = QueryKey<T>;
}
// What probabilities(tensor) makes.
using TensorProbabilities = TensorView<Probabilities>;
// What query_key(tensor, tensor, scale) makes.
using TensorQueryKey = TensorView<detail::QueryKeyOf>;
// What scores(tensor, tokens) makes.
using TensorScores = TensorView<Scores>;

namespace detail {

class RowSet;

inline Status check_tensor(const at::Tensor& tensor, const char* what) noexcept {
  if (!tensor.defined()) return fail(Errc::tensor_undefined, what);
  if (tensor.layout() != at::kStrided || tensor.is_neg()) return fail(Errc::tensor_not_dense, what);
  return {};
}

// The element types that tensors and fastv have in common: calls use(data) with a pointer of the right type.
template <class Use>
Status with_elements(const at::Tensor& tensor, const char* what, Use use) {
  if (!tensor.is_cpu()) return fail(Errc::tensor_device, what);
  const void* data = tensor.data_ptr();
  switch (tensor.scalar_type()) {
    case at::kFloat: use(static_cast<const float*>(data)); return {};
    case at::kDouble: use(static_cast<const double*>(data)); return {};
    case at::kHalf: use(static_cast<const half*>(data)); return {};
    case at::kBFloat16: use(static_cast<const bfloat16*>(data)); return {};
    default: return fail(Errc::tensor_type, c10::toString(tensor.scalar_type()));
  }
}

// Shape and strides of [a, b, c], or of [1, a, b, c].
struct Axes {
  std::size_t size[3];
  std::ptrdiff_t stride[3];
};
inline Result<Axes> three_axes(const at::Tensor& tensor, const char* what) {
  if (Status status = check_tensor(tensor, what); !status) return {{}, status};
  const std::int64_t dims = tensor.dim();
  if (dims != 3 && dims != 4) return {{}, fail(Errc::tensor_dims, what, dims, 3)};
  if (dims == 4 && tensor.size(0) != 1) return {{}, fail(Errc::tensor_batch, what, tensor.size(0))};
  Axes axes{};
  for (std::int64_t i = 0; i < 3; ++i) {
    axes.size[i] = static_cast<std::size_t>(tensor.size(dims - 3 + i));
    axes.stride[i] = static_cast<std::ptrdiff_t>(tensor.stride(dims - 3 + i));
  }
  return {axes, {}};
}

// A dimension counted from 0.
inline Result<std::int64_t> token_dim(const at::Tensor& tensor, std::int64_t dim) {
  if (Status status = check_tensor(tensor, "the tensor"); !status) return {0, status};
  const std::int64_t dims = tensor.dim(), along = dim < 0 ? dim + dims : dim;
  if (along < 0 || along >= dims) return {0, fail(Errc::tensor_no_dim, "", dim, dims)};
  return {along, {}};
}
// The same, and it must have an entry for every token that was ranked: a wrong dimension may be long enough.
template <class Kept>
Result<std::int64_t> token_dim_of(const Kept& kept, const at::Tensor& tensor, std::int64_t dim) {
  if (!kept) return {0, kept.status};
  const Result<std::int64_t> along = token_dim(tensor, dim);
  if (!along) return along;
  const std::int64_t size = tensor.size(*along);
  if (static_cast<std::size_t>(size) != kept.tokens)
    return {0, fail(Errc::tensor_tokens, "", size, number(kept.tokens), *along)};
  return along;
}

// A head's vector is read as one piece.
inline Status check_adjacent(const Axes& axes, const char* what) noexcept {
  if (axes.size[2] > 1 && axes.stride[2] != 1) return fail(Errc::tensor_stride, what, axes.stride[2]);
  return {};
}

}  // namespace detail

// ---- evidence -----------------------------------------------------------------------------------

// Attention probabilities [heads, rows, keys] or [1, heads, rows, keys], in any strides.
inline Result<TensorProbabilities> probabilities(const at::Tensor& attention) {
  const auto axes = detail::three_axes(attention, "attention");
  if (!axes) return {{}, axes.status};
  Result<TensorProbabilities> evidence;
  evidence.status = detail::with_elements(attention, "attention", [&](const auto* data) {
    auto view = probabilities(data, axes->size[0], axes->size[1], axes->size[2]);
    view.head_stride = axes->stride[0];
    view.row_stride = axes->stride[1];
    view.key_stride = axes->stride[2];
    evidence.value = view;
  });
  return evidence;
}

// Queries [heads, rows, dim] and keys [kv heads, keys, dim] of one element type, both after RoPE, or [1, ...] of
// either; strides are free but for the last, so that a transposed [rows, heads, dim] and a part of a larger cache are
// read where they lie. scale: 1 / sqrt(dim) in most models.
inline Result<TensorQueryKey> query_key(const at::Tensor& query, const at::Tensor& key, float scale) {
  const auto q = detail::three_axes(query, "query"), k = detail::three_axes(key, "key");
  if (!q) return {{}, q.status};
  if (!k) return {{}, k.status};
  if (q->size[2] != k->size[2])
    return {{}, detail::fail(Errc::head_dims_differ, "", detail::number(q->size[2]), detail::number(k->size[2]))};
  if (Status status = detail::check_adjacent(*q, "query"); !status) return {{}, status};
  if (Status status = detail::check_adjacent(*k, "key"); !status) return {{}, status};
  if (!key.is_cpu()) return {{}, detail::fail(Errc::tensor_device, "key")};
  if (key.scalar_type() != query.scalar_type())
    return {{}, detail::fail(Errc::tensor_types_differ, c10::toString(key.scalar_type()))};
  Result<TensorQueryKey> evidence;
  evidence.status = detail::with_elements(query, "query", [&](const auto* data) {
    auto view = query_key(data, q->size[0], q->size[1], static_cast<decltype(data)>(key.data_ptr()), k->size[0],
                          k->size[1], k->size[2], scale, KvLayout::head_major);
    view.query_head_stride = q->stride[0];
    view.query_row_stride = q->stride[1];
    view.key_head_stride = k->stride[0];
    view.key_token_stride = k->stride[1];
    evidence.value = view;
  });
  return evidence;
}

// Scores of your own, or from device_scores(): contiguous [visual tokens]. tokens: length of the prompt.
inline Result<TensorScores> scores(const at::Tensor& values, std::size_t tokens) {
  if (Status status = detail::check_tensor(values, "scores"); !status) return {{}, status};
  if (values.dim() != 1) return {{}, detail::fail(Errc::tensor_dims, "scores", values.dim(), 1)};
  if (values.size(0) > 1 && values.stride(0) != 1)
    return {{}, detail::fail(Errc::tensor_stride, "scores", values.stride(0))};
  Result<TensorScores> evidence;
  evidence.status = detail::with_elements(values, "scores", [&](const auto* data) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    evidence.value = Scores<T>{{data, static_cast<std::size_t>(values.size(0))}, tokens};
  });
  return evidence;
}

// What a Pruner asks of evidence.
template <template <class> class View>
std::size_t prompt_tokens(const TensorView<View>& evidence) noexcept {
  return evidence.visit([](const auto& view) { return prompt_tokens(view); });
}
template <template <class> class View>
std::size_t score_scratch(const TensorView<View>& evidence) noexcept {
  return evidence.visit([](const auto& view) { return score_scratch(view); });
}
template <template <class> class View>
Status check(const TensorView<View>& evidence) noexcept {
  return evidence.visit([](const auto& view) { return check(view); });
}
template <template <class> class View>
bool has_rows(const TensorView<View>& evidence) noexcept {
  return evidence.visit([](const auto& view) { return has_rows(view); });
}
template <class Score, class ParallelFor, template <class> class View>
Status score(const detail::RowSet& rows, const TensorView<View>& evidence, Span<const TokenSpan> visual,
             Span<Score> scores, Span<float> scratch, const ParallelFor& parallel_for) noexcept {
  return evidence.visit(
      [&](const auto& view) { return score<Score>(rows, view, visual, scores, scratch, parallel_for); });
}

// ---- what moves ---------------------------------------------------------------------------------

// The rows of a CPU tensor along its dimension `dim` (negative: counted from the last), of any element type: hidden
// states [1, n, width] along 1, caches [1, kv heads, n, dim] along 2, position ids [n] or [3, n] along the last. The
// other dimensions must lie in memory as one piece a row, or as one set of planes of such; contiguous ones and most
// transposed ones do.
inline Result<Rows> rows(const at::Tensor& tensor, std::int64_t dim) {
  const Result<std::int64_t> along = detail::token_dim(tensor, dim);
  if (!along) return {{}, along.status};
  if (!tensor.is_cpu()) return {{}, detail::fail(Errc::tensor_device, "the tensor")};
  if (tensor.requires_grad()) return {{}, detail::fail(Errc::tensor_requires_grad, "the tensor")};
  const std::int64_t dims = tensor.dim(), token_dim = *along;
  const auto bytes = static_cast<std::ptrdiff_t>(tensor.element_size());
  std::ptrdiff_t row = 1, planes = tensor.numel() == 0 ? 0 : 1, plane_stride = 0;  // in elements
  std::int64_t left = dims - 1;
  for (std::int64_t last = -1; left > 0 && planes > 0; --left) {  // the other dimensions, by ascending stride
    const auto after = [&](std::int64_t a, std::int64_t b) {
      return tensor.stride(a) > tensor.stride(b) || (tensor.stride(a) == tensor.stride(b) && a > b);
    };
    std::int64_t next = -1;
    for (std::int64_t d = 0; d < dims; ++d)
      if (d != token_dim && (last < 0 || after(d, last)) && (next < 0 || after(next, d))) next = d;
    last = next;
    const std::ptrdiff_t size = tensor.size(next), stride = tensor.stride(next);
    if (size == 1) continue;
    if (planes == 1 && stride == row) {
      row *= size;
    } else if (planes == 1 || stride == plane_stride * planes) {
      if (planes == 1) plane_stride = stride;
      planes *= size;
    } else {
      return {{}, detail::fail(Errc::tensor_rows, "", stride, 0, next)};
    }
  }
  return {{tensor.data_ptr(), static_cast<std::size_t>(tensor.size(token_dim)), static_cast<std::size_t>(row * bytes),
           tensor.stride(token_dim) * bytes, static_cast<std::size_t>(planes), plane_stride * bytes},
          {}};
}

// Moves the kept rows of a CPU tensor to its front, in place, and narrows it to them: no copy, and every tensor that
// shares the memory sees it. Kept: what prune() returned; one that failed passes its status on. O(bytes kept).
template <class Kept>
Status compact_rows(const Kept& kept, at::Tensor& tensor, std::int64_t dim) {
  const Result<std::int64_t> along = detail::token_dim_of(kept, tensor, dim);
  if (!along) return along.status;
  const Result<Rows> view = rows(tensor, *along);
  if (!view) return view.status;
  Status status = compact(kept, *view);
  if (status && !tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();  // as ATen's own in-place calls
  if (status) tensor = tensor.narrow(*along, 0, static_cast<std::int64_t>(kept.size()));
  return status;
}

// The kept indices as an int64 tensor [m] on the device of `like`, for index_select().
template <class Kept>
Result<at::Tensor> kept_tensor(const Kept& kept, const at::Tensor& like) {
  if (!kept) return {{}, kept.status};
  if (!like.defined()) return {{}, detail::fail(Errc::tensor_undefined, "the tensor")};
  const at::Tensor indices = like.new_empty({static_cast<std::int64_t>(kept.size())},
                                            at::TensorOptions(at::kCPU).dtype(at::kLong).layout(at::kStrided));
  auto* out = static_cast<std::int64_t*>(indices.data_ptr());
  for (const Index index : kept) *out++ = index;
  // CUDA copies pageable memory before it returns, so the host need not wait there.
  return {indices.to(like.device(), at::kLong, /*non_blocking=*/like.is_cuda()), {}};
}

// A copy of the kept rows along `dim`, on the tensor's own device and known to autograd: index_select().
template <class Kept>
Result<at::Tensor> gather_rows(const Kept& kept, const at::Tensor& tensor, std::int64_t dim) {
  const Result<std::int64_t> along = detail::token_dim_of(kept, tensor, dim);
  if (!along) return {{}, along.status};
  const Result<at::Tensor> indices = kept_tensor(kept, tensor);
  return {tensor.index_select(*along, *indices), {}};
}

}  // namespace fastv

// fastv for LibTorch: tensors in the CPU's memory as views, without a copy, what moves, and kept indices as a tensor.
// LibTorch 1.13 or newer, of which it includes the tensor class alone. Tensors on any device, with no round trip to the
// host: torch_device.hpp.
//
//   fastv::Kept kept = pruner.prune(fastv::query_key(q, k, scale), visual);  // [1, heads, queries, dim] and
//                                                                            // [1, kv heads, n, dim]
//   fastv::Status done = fastv::compact(kept, hidden, 1);                    // [1, n, width] becomes [1, m, width]
//
// What a tensor cannot say is a field of the view, as in the core:
//
//   auto evidence = fastv::query_key(q, k, scale);
//   evidence.value.past = past;
//   fastv::Kept kept = pruner.prune(evidence, visual);
//
// Nothing here throws but what ATen itself throws. A view is valid as long as the memory of the tensor it was made of.
#pragma once

#include <ATen/core/Tensor.h>

#include "fastv.hpp"

#include "detail/begin.hpp"

namespace fastv {

// An element whose type is known at run time only. Never defined: views of it hold addresses, and are read as views of
// the type that they name.
struct TensorElement;

namespace detail {
template <>
inline constexpr bool needs_dimension<at::Tensor> = true;
inline namespace FASTV_KIND {

template <class T>
struct ElementType {
  using type = T;
};
// Calls use(ElementType<T>()) for the element type of a tensor that was taken for a view.
template <class Use>
auto with_element(at::ScalarType type, Use use) {
  switch (type) {
    case at::kDouble: return use(ElementType<double>());
    case at::kHalf: return use(ElementType<half>());
    case at::kBFloat16: return use(ElementType<bfloat16>());
    default: return use(ElementType<float>());
  }
}

// A view of elements whose type was not known, as one of elements whose type is: pointers to all types look alike.
template <class To, class From>
To retyped(const From& view) noexcept {
  static_assert(sizeof(To) == sizeof(From) && __is_trivially_copyable(To), "views are pointers and numbers");
  To to;
  std::memcpy(static_cast<void*>(&to), &view, sizeof(To));
  return to;
}

// The contract of evidence, on what visit() hands out.
template <class Evidence>
Status check_visited(const Evidence& evidence) noexcept {
  return evidence.visit([](const auto& view) { return check_evidence(view); });
}
template <class Evidence>
std::size_t scratch_of_visited(const Evidence& evidence) noexcept {
  return evidence.visit([](const auto& view) { return scratch_of(view); });
}
template <class Score, class Evidence, class ParallelFor>
Status score_visited(const Evidence& evidence, const Scoring& scoring, Span<Score> scores,
                     const ParallelFor& parallel_for) noexcept {
  return evidence.visit([&](const auto& view) { return score_by(view, scoring, scores, parallel_for); });
}

}  // namespace FASTV_KIND
}  // namespace detail

// A tensor as Heads, Probabilities or Scores: with the fields of the core's view, and `type` says of what elements.
template <template <class> class View>
struct TensorView : View<TensorElement> {
  at::ScalarType type = at::kFloat;  // kFloat, kDouble, kHalf or kBFloat16

  // Calls use(view) with a View<float>, View<double>, View<half> or View<bfloat16>, and returns what it returns.
  template <class Use>
  FASTV_INLINE auto visit(const Use& use) const {
    const View<TensorElement>& view = *this;
    return detail::with_element(
        type, [&](auto element) { return use(detail::retyped<View<typename decltype(element)::type>>(view)); });
  }
  // What is wrong with the shape, before anything is read.
  FASTV_INLINE Status check() const noexcept { return detail::check_visited(*this); }
  // Floats of scratch memory that score() wants.
  FASTV_INLINE std::size_t scratch_floats() const noexcept { return detail::scratch_of_visited(*this); }
  // One score per visual token.
  template <class Score, class ParallelFor>
  FASTV_INLINE Status score(const Scoring& scoring, Span<Score> scores,
                            const ParallelFor& parallel_for) const noexcept {
    return detail::score_visited(*this, scoring, scores, parallel_for);
  }
};

// What heads(tensor) makes.
using TensorHeads = TensorView<Heads>;
// What probabilities(tensor) makes.
using TensorProbabilities = TensorView<Probabilities>;
// What scores(tensor, tokens) makes.
using TensorScores = TensorView<Scores>;

// What query_key() makes of two tensors: a QueryKey, fields and all. Their element types may differ.
struct TensorQueryKey : QueryKey<TensorElement> {
  at::ScalarType query_type = at::kFloat, key_type = at::kFloat;  // kFloat, kDouble, kHalf or kBFloat16

  // Calls use(view) with a QueryKey<Q, Heads<K>>, and returns what it returns.
  template <class Use>
  FASTV_INLINE auto visit(const Use& use) const {
    const QueryKey<TensorElement>& view = *this;
    return detail::with_element(query_type, [&](auto q) {
      return detail::with_element(key_type, [&](auto k) {
        return use(detail::retyped<QueryKey<typename decltype(q)::type, Heads<typename decltype(k)::type>>>(view));
      });
    });
  }
  // What is wrong with the shape, before anything is read.
  FASTV_INLINE Status check() const noexcept { return detail::check_visited(*this); }
  // Floats of scratch memory that score() wants.
  FASTV_INLINE std::size_t scratch_floats() const noexcept { return detail::scratch_of_visited(*this); }
  // One score per visual token.
  template <class Score, class ParallelFor>
  FASTV_INLINE Status score(const Scoring& scoring, Span<Score> scores,
                            const ParallelFor& parallel_for) const noexcept {
    return detail::score_visited(*this, scoring, scores, parallel_for);
  }
};

namespace detail {
template <>
inline constexpr bool is_keys<TensorHeads> = true;
inline namespace FASTV_KIND {
// nvcc takes KeysOnly{view, past}, inside of the specialization below, for that specialization.
template <class Keys>
KeysOnly<Keys> keys_only(const Keys& keys, std::size_t past) noexcept {
  return {keys, past};
}
}  // namespace FASTV_KIND
}  // namespace detail
// Keys alone: KeysOnly{*heads(k), past}.
template <>
struct KeysOnly<TensorHeads> {
  TensorHeads keys;      // of layer K-1, [kv heads, keys, dim]
  std::size_t past = 0;  // keys of earlier turns

  // Calls use(view) with a KeysOnly<Heads<T>>, and returns what it returns.
  template <class Use>
  FASTV_INLINE auto visit(const Use& use) const {
    return keys.visit([&](const auto& view) { return use(detail::keys_only(view, past)); });
  }
  FASTV_INLINE std::size_t prompt_tokens() const noexcept {  // n
    return keys.tokens > past ? keys.tokens - past : 0;
  }
  // What is wrong with the shape, before anything is read.
  FASTV_INLINE Status check() const noexcept { return detail::check_visited(*this); }
  // Floats of scratch memory that score() wants.
  FASTV_INLINE std::size_t scratch_floats() const noexcept { return detail::scratch_of_visited(*this); }
  // One score per visual token.
  template <class Score, class ParallelFor>
  FASTV_INLINE Status score(const Scoring& scoring, Span<Score> scores,
                            const ParallelFor& parallel_for) const noexcept {
    return detail::score_visited(*this, scoring, scores, parallel_for);
  }
};

namespace detail {
inline namespace FASTV_KIND {

inline Status expect_dense(const at::Tensor& tensor, const char* what) {
  if (!tensor.defined())
    return fail(Errc::null_data, "{} is an undefined tensor: hand over one that has been computed", what);
  if (tensor.layout() != at::kStrided)
    return fail(Errc::not_supported, "{} is stored as {}, not by strides: hand over its to_dense()", what,
                c10::toString(tensor.options().computeDispatchKey()));
  if (tensor.is_neg() || tensor.is_conj())
    return fail(Errc::not_supported, "{} is {} only when it is read: hand over its {}", what,
                tensor.is_neg() ? "negated" : "conjugated", tensor.is_neg() ? "resolve_neg()" : "resolve_conj()");
  return {};
}
inline Status expect_dims(const at::Tensor& tensor, std::int64_t dims, const char* what, const char* shape) {
  if (tensor.dim() == dims) return {};
  return fail(Errc::bad_shape, "{} has {} dimensions but needs {}: {}", what, tensor.dim(), dims, shape);
}
inline Status expect_floats(const at::Tensor& tensor, const char* what) {
  const at::ScalarType type = tensor.scalar_type();
  if (type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16) return {};
  return fail(Errc::not_supported,
              "{} has elements of type {}, which are not read one by one: hand over Float, Double, Half or BFloat16",
              what, c10::toString(type));
}
inline Status expect_on_cpu(const at::Tensor& tensor, const char* what) {
  if (tensor.is_cpu()) return {};
  return fail(Errc::not_supported,
              "{} is on {}, whose memory the CPU does not read: use fastv::device in torch_device.hpp and "
              "fastv::gather(), or hand over its cpu()",
              what, c10::toString(tensor.options().computeDispatchKey()));
}

// Extents and strides of [a, b, c], or of [1, a, b, c].
struct Axes {
  std::size_t size[3];
  std::ptrdiff_t stride[3];
};
inline Result<Axes> three_axes(const at::Tensor& tensor, const char* what, const char* shape) {
  if (Status status = expect_dense(tensor, what); !status) return {{}, status};
  const std::int64_t ahead = tensor.dim() == 4 ? 1 : 0;
  if (Status status = expect_dims(tensor, 3 + ahead, what, shape); !status) return {{}, status};
  if (ahead == 1 && tensor.size(0) != 1)
    return {{},
            fail(Errc::bad_shape, "{} has a batch of {} but a view is of 1 sequence: hand over narrow(0, i, 1)", what,
                 tensor.size(0))};
  if (Status status = expect_floats(tensor, what); !status) return {{}, status};
  Axes axes{};
  for (std::int64_t i = 0; i < 3; ++i) {
    axes.size[i] = static_cast<std::size_t>(tensor.size(ahead + i));
    axes.stride[i] = static_cast<std::ptrdiff_t>(tensor.stride(ahead + i));
  }
  return {axes, {}};
}
inline constexpr const char* heads_shape = "[heads, tokens, dim], or a batch of 1 of them";
inline constexpr const char* map_shape = "[heads, queries, keys], or a batch of 1 of them";

inline const TensorElement* elements_of(const at::Tensor& tensor) {
  return static_cast<const TensorElement*>(static_cast<const void*>(tensor.data_ptr()));
}

inline TensorHeads strided_heads(const at::Tensor& tensor, const Axes& axes) {
  TensorHeads view{{elements_of(tensor), axes.size[0], axes.size[1], axes.size[2], axes.stride[0], axes.stride[1]},
                   tensor.scalar_type()};
  if (view.dim > 1 && axes.stride[2] != 1) {  // vectors whose elements lie apart: chunks of one element
    view.pages.chunk = 1;
    view.pages.chunk_stride = axes.stride[2];
  }
  return view;
}
inline Result<TensorHeads> heads_of(const at::Tensor& tensor, const char* what) {
  const Result<Axes> axes = three_axes(tensor, what, heads_shape);
  if (!axes) return {{}, axes.status};
  if (Status status = expect_on_cpu(tensor, what); !status) return {{}, status};
  return {strided_heads(tensor, *axes), {}};
}

// A dimension counted from 0, which must have an entry for every token: a wrong one may be long enough.
inline Result<std::int64_t> token_dim(const at::Tensor& tensor, std::int64_t dim) {
  if (Status status = expect_dense(tensor, "the tensor"); !status) return {0, status};
  const std::int64_t dims = tensor.dim(), along = dim < 0 ? dim + dims : dim;
  if (along < 0 || along >= dims)
    return {0, fail(Errc::bad_shape, "dim is {} but the tensor has {} dimensions: count from 0, or from -1 backwards",
                    dim, dims)};
  return {along, {}};
}
inline Result<std::int64_t> token_dim(const KeptRows& kept, const at::Tensor& tensor, std::int64_t dim) {
  if (!kept.status) return {0, kept.status};
  const Result<std::int64_t> along = token_dim(tensor, dim);
  if (!along) return along;
  const auto size = static_cast<std::size_t>(tensor.size(*along));
  if (kept.prompt_tokens != KeptRows::unknown && kept.prompt_tokens != size)
    return {0, fail(Errc::bad_shape,
                    "dimension {} of the tensor has {} entries but the prompt has {} tokens: name the dimension of "
                    "tokens, and hand over the tensor of the whole prompt",
                    *along, size, kept.prompt_tokens)};
  return {*along, check_indices(kept.indices, size)};
}

}  // namespace FASTV_KIND
}  // namespace detail

inline namespace FASTV_KIND {

// ---- evidence -----------------------------------------------------------------------------------

// Queries, keys or values of one layer: [heads, tokens, dim] or [1, heads, tokens, dim] in any strides, so that a
// transposed [tokens, heads, dim] and a part of a larger cache are read where they lie. Fastest where the elements of a
// vector are adjacent. O(1), as all makers of views.
inline Result<TensorHeads> heads(const at::Tensor& tensor) { return detail::heads_of(tensor, "the tensor"); }

// Attention probabilities [heads, queries, keys] or [1, heads, queries, keys], in any strides.
inline Result<TensorProbabilities> probabilities(const at::Tensor& attention) {
  const Result<detail::Axes> axes = detail::three_axes(attention, "attention", detail::map_shape);
  if (!axes) return {{}, axes.status};
  if (Status status = detail::expect_on_cpu(attention, "attention"); !status) return {{}, status};
  return {{{detail::elements_of(attention), axes->size[0], axes->size[1], axes->size[2], axes->stride[0],
            axes->stride[1], axes->stride[2]},
           attention.scalar_type()},
          {}};
}

// Queries and keys of layer K-1, both after RoPE. scale: 1 / sqrt(dim) in most models.
inline TensorQueryKey query_key(const TensorHeads& query, const TensorHeads& key, float scale) noexcept {
  return {{query, key, scale}, query.type, key.type};
}
// The same of what heads(tensor) returned.
inline Result<TensorQueryKey> query_key(const Result<TensorHeads>& query, const Result<TensorHeads>& key,
                                        float scale) noexcept {
  if (!query) return {{}, query.status};
  if (!key) return {{}, key.status};
  return {query_key(*query, *key, scale), {}};
}
// The same of the tensors themselves.
inline Result<TensorQueryKey> query_key(const at::Tensor& query, const at::Tensor& key, float scale) {
  return query_key(detail::heads_of(query, "query"), detail::heads_of(key, "key"), scale);
}

// Scores of your own, or from device::scores(): contiguous [visual tokens]. tokens: length of the prompt.
inline Result<TensorScores> scores(const at::Tensor& values, std::size_t tokens) {
  if (Status status = detail::expect_dense(values, "scores"); !status) return {{}, status};
  if (Status status = detail::expect_dims(values, 1, "scores", "[visual tokens]"); !status) return {{}, status};
  if (Status status = detail::expect_floats(values, "scores"); !status) return {{}, status};
  if (Status status = detail::expect_on_cpu(values, "scores"); !status) return {{}, status};
  if (values.size(0) > 1 && values.stride(0) != 1)
    return {{},
            fail(Errc::bad_stride, "scores have stride {} but are read as one piece: hand over contiguous()",
                 values.stride(0))};
  return {{{{detail::elements_of(values), static_cast<std::size_t>(values.size(0))}, tokens}, values.scalar_type()},
          {}};
}

// unrotate() of remedies.hpp.
template <class ParallelFor = Serial>
Status unrotate(const TensorHeads& vectors, const Rope& rope, Span<float> out,
                const ParallelFor& parallel_for = {}) noexcept {
  return vectors.visit([&](const auto& view) { return unrotate(view, rope, out, parallel_for); });
}
// value_norms() of remedies.hpp.
inline Status value_norms(const TensorHeads& values, Span<const TokenSpan> visual, Span<float> norms,
                          std::size_t past = 0) noexcept {
  return values.visit([&](const auto& view) { return value_norms(view, visual, norms, past); });
}

// ---- what moves ---------------------------------------------------------------------------------

// The rows of a CPU tensor along its dimension `dim` (negative: counted from the last), of any element type: hidden
// states [1, n, width] along 1, caches [1, kv heads, n, dim] along 2, position ids [n] or [3, n] along the last. The
// other dimensions must lie in memory as one piece a row, or as one set of planes of such; contiguous ones and most
// transposed ones do.
inline Result<Rows> rows(const at::Tensor& tensor, std::int64_t dim) {
  const Result<std::int64_t> along = detail::token_dim(tensor, dim);
  if (!along) return {{}, along.status};
  if (Status status = detail::expect_on_cpu(tensor, "the tensor"); !status) return {{}, status};
  if (tensor.is_quantized() && tensor.qscheme() != at::kPerTensorAffine)
    return {{},
            fail(Errc::not_supported,
                 "the tensor has a scale for each of its channels, which would not move with its rows: hand over its "
                 "int_repr(), or one with a single scale")};
  if (tensor.requires_grad())
    return {{},
            fail(Errc::not_supported,
                 "the tensor requires a gradient, which moving its rows in place would spoil: use fastv::gather(), "
                 "which autograd knows, or detach()")};
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
      return {{},
              fail(Errc::bad_stride,
                   "dimension {} of the tensor has stride {}, which fits neither its rows nor its planes, {} apart: "
                   "use fastv::gather(), or hand over contiguous()",
                   next, stride, plane_stride)};
    }
  }
  return {{tensor.data_ptr(), static_cast<std::size_t>(tensor.size(token_dim)), static_cast<std::size_t>(row * bytes),
           tensor.stride(token_dim) * bytes, static_cast<std::size_t>(planes), plane_stride * bytes},
          {}};
}

// Moves the kept rows of a CPU tensor to its front, in place, and narrows it to them: no copy, and every tensor that
// shares the memory sees it. What is left of [3, n] or a head-major cache has the strides of the whole. O(bytes kept).
inline Status compact(const KeptRows& kept, at::Tensor& tensor, std::int64_t dim) {
  const Result<std::int64_t> along = detail::token_dim(kept, tensor, dim);
  if (!along) return along.status;
  const Result<Rows> view = rows(tensor, *along);
  if (!view) return view.status;
  if (Status status = compact(kept, *view); !status) return status;
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();  // as ATen's own in-place calls do
  tensor = tensor.narrow(*along, 0, static_cast<std::int64_t>(kept.indices.size()));
  return {};
}

// The kept indices as an int64 tensor [m] on the device of `like`, for index_select() and what else the engine indexes.
inline Result<at::Tensor> kept_tensor(const KeptRows& kept, const at::Tensor& like) {
  if (!kept.status) return {{}, kept.status};
  if (!like.defined())
    return {{}, fail(Errc::null_data, "the tensor whose device is wanted is undefined: hand over one on that device")};
  const at::Tensor indices = like.new_empty({static_cast<std::int64_t>(kept.indices.size())},
                                            at::TensorOptions(at::kCPU).dtype(at::kLong).layout(at::kStrided));
  const Span<std::int64_t> out{static_cast<std::int64_t*>(indices.data_ptr()), kept.indices.size()};
  if (Status status = write_indices(kept, out); !status) return {{}, status};
  // CUDA copies pageable memory before it returns, so the host need not wait there.
  return {indices.to(like.device(), at::kLong, /*non_blocking=*/like.is_cuda()), {}};
}

// The kept indices into the first m entries of a tensor of Int or Long that is there already, on any device: captured
// CUDA graphs read them at a constant address.
inline Status write_indices(const KeptRows& kept, const at::Tensor& out) {
  if (Status status = detail::expect_dense(out, "the list of indices"); !status) return status;
  if (Status status = detail::expect_dims(out, 1, "the list of indices", "[at least m]"); !status) return status;
  if (out.scalar_type() != at::kInt && out.scalar_type() != at::kLong)
    return fail(Errc::not_supported, "the list of indices has elements of type {}: hand over Int or Long",
                c10::toString(out.scalar_type()));
  const Result<at::Tensor> indices = kept_tensor(kept, out);
  if (!indices) return indices.status;
  if (out.size(0) < indices->size(0))
    return fail(Errc::too_small, "the list of indices has room for {} entries but needs {}", out.size(0),
                indices->size(0));
  out.narrow(0, 0, indices->size(0)).copy_(*indices);
  return {};
}

// A copy of the kept rows along `dim`, on the tensor's own device and known to autograd: index_select(). O(bytes kept).
inline Result<at::Tensor> gather(const KeptRows& kept, const at::Tensor& tensor, std::int64_t dim) {
  const Result<std::int64_t> along = detail::token_dim(kept, tensor, dim);
  if (!along) return {{}, along.status};
  return {tensor.index_select(*along, *kept_tensor(kept, tensor)), {}};
}

}  // namespace FASTV_KIND
}  // namespace fastv

#include "detail/end.hpp"

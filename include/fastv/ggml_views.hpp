// fastv for ggml: tensors in host memory as views.
//
// A host that runs one graph up to layer K and another behind it prunes between the two, on its own tensors:
//
//   auto evidence = fastv::query_key(q, k, scale);          // of layer K-1; any element type, quantised ones included
//   fastv::Kept kept = pruner.prune(evidence, visual);
//   fastv::Status done = fastv::compact(kept, hidden, 1);   // [width, n]
//
// A host that builds one graph for the whole prompt puts the pruning into it: see graph::Pruner in ggml_graph.hpp.
//
// Either way layers K.. run on m tokens, and their caches are m long: allocate them by Plan::kv_length(layer), and give
// attention their length instead of the prompt's.
//
// Shapes are written as ggml has them, ne[0] first: q [dim, heads, rows] is what the models call Qcur. Nothing here
// copies or owns a tensor, and nothing throws.
#pragma once

#include <ggml-backend.h>
#include <ggml.h>

#include "fastv.hpp"

#include "detail/begin.hpp"

namespace fastv {

// ---- between two graphs: tensors in host memory as views ----------------------------------------

namespace detail {
template <>
inline constexpr bool needs_dimension<ggml_tensor*> = true;
inline namespace FASTV_KIND {

// Extents of tensors are signed.
inline std::size_t from_ne(std::int64_t size) noexcept { return static_cast<std::size_t>(size); }
inline std::int64_t to_ne(std::size_t size) noexcept { return static_cast<std::int64_t>(size); }

// A tensor of one sequence, wherever it lies.
inline Status check_sequence(const ggml_tensor* tensor, const char* what) noexcept {
  if (tensor == nullptr) return fail_null(what);
  if (tensor->ne[3] != 1)
    return fail(Errc::bad_shape, "ne[3] of {} is {} but one sequence is pruned at a time: hand over a view of it", what,
                tensor->ne[3]);
  return {};
}
// A tensor that is to be read or moved on the host.
inline Status check_tensor(const ggml_tensor* tensor, const char* what) noexcept {
  if (Status status = check_sequence(tensor, what); !status) return status;
  const ggml_backend_buffer_t buffer = tensor->view_src != nullptr ? tensor->view_src->buffer : tensor->buffer;
  if (buffer != nullptr && !ggml_backend_buffer_is_host(buffer))
    return fail(Errc::not_supported,
                "{} is not in host memory: copy it there by ggml_backend_tensor_get(), or prune inside the graph by "
                "fastv::graph::Pruner",
                what);
  if (tensor->data == nullptr) return fail_null(what);
  return {};
}

// The functions that widen are ggml's own, one row at a time; floats need none.
inline bool is_readable(ggml_type type) noexcept {
  return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float != nullptr;
}
// Heads of vectors [dim, heads, tokens].
inline Status check_vectors(const ggml_tensor* tensor, const char* what) noexcept {
  if (!is_readable(tensor->type))
    return fail(Errc::not_supported, "{} is of type {}, which ggml does not turn into floats", what,
                ggml_type_name(tensor->type));
  const std::size_t size = ggml_type_size(tensor->type);
  if (tensor->nb[0] != size)
    return fail(Errc::bad_stride, "the elements of a vector of {} are {} bytes apart but must be side by side, {}",
                what, tensor->nb[0], size);
  for (int i = 1; i < 3; ++i)
    if (tensor->nb[i] % size != 0)
      return fail(Errc::bad_stride, "nb[{}] of {} is {}, which is no multiple of the {} bytes of its type", i, what,
                  tensor->nb[i], size);
  return {};
}

// Rows along an axis.
inline Status check_axis(const ggml_tensor* tensor, int axis) noexcept {
  if (Status status = check_tensor(tensor, "the tensor"); !status) return status;
  if (axis < 0 || axis > 2)
    return fail(Errc::bad_shape, "axis {} of a tensor was named: its tokens lie along 0, 1 or 2", axis);
  const std::size_t size = ggml_type_size(tensor->type);
  if (axis > 0 && tensor->nb[0] != size)
    return fail(Errc::bad_stride, "the elements of a row are {} bytes apart but must be side by side, {}",
                tensor->nb[0], size);
  if (axis == 0 && ggml_blck_size(tensor->type) != 1)
    return fail(Errc::not_supported, "tokens lie along axis 0 of a tensor of type {}, whose blocks cannot be parted",
                ggml_type_name(tensor->type));
  if (axis == 0 && tensor->ne[2] != 1)
    return fail(Errc::bad_shape, "tokens lie along axis 0 of a tensor with ne[2] = {}: hand over one plane at a time",
                tensor->ne[2]);
  return {};
}

// One vector of a tensor of any type, as floats.
struct LoadTensor {
  const unsigned char* data = nullptr;
  std::size_t dim = 0, head_stride = 0, token_stride = 0;  // bytes
  ggml_to_float_t to_float = nullptr;                      // null: they are floats

  void operator()(std::size_t head, std::size_t token, float* out) const noexcept {
    const unsigned char* from = data + head * head_stride + token * token_stride;
    if (to_float == nullptr)
      std::memcpy(out, from, dim * sizeof(float));
    else
      to_float(from, out, to_ne(dim));
  }
};

inline Result<LoadedKeys<LoadTensor>> loaded_heads(const ggml_tensor* tensor, const char* what) noexcept {
  if (Status status = check_tensor(tensor, what); !status) return {{}, status};
  if (Status status = check_vectors(tensor, what); !status) return {{}, status};
  const auto bytes = [&](int i) { return static_cast<std::ptrdiff_t>(tensor->nb[i]); };
  if (Status status = check_strides(
          {{what, "nb[1]", bytes(1), from_ne(tensor->ne[1])}, {what, "nb[2]", bytes(2), from_ne(tensor->ne[2])}},
          ggml_row_size(tensor->type, tensor->ne[0]));
      !status)
    return {{}, status};
  const std::size_t dim = from_ne(tensor->ne[0]);
  const ggml_to_float_t to_float =
      tensor->type == GGML_TYPE_F32 ? nullptr : ggml_get_type_traits(tensor->type)->to_float;
  return {loaded_keys(
              from_ne(tensor->ne[1]), from_ne(tensor->ne[2]), dim,
              LoadTensor{static_cast<const unsigned char*>(tensor->data), dim, tensor->nb[1], tensor->nb[2], to_float}),
          {}};
}

// Calls use(view) with Heads<T> where the core reads the tensor's type by itself, with LoadedKeys where ggml must.
template <class Use>
Status with_vectors(const ggml_tensor* tensor, const char* what, Use use) noexcept {
  const auto loaded = loaded_heads(tensor, what);
  if (!loaded) return loaded.status;
  const auto view = [&](auto data) {
    const std::size_t size = sizeof(*data);
    return Heads<typename Pointee<decltype(data)>::type>{data,
                                                         loaded->heads,
                                                         loaded->tokens,
                                                         loaded->dim,
                                                         as_stride(tensor->nb[1] / size),
                                                         as_stride(tensor->nb[2] / size)};
  };
  switch (tensor->type) {
    case GGML_TYPE_F32: return use(view(static_cast<float*>(tensor->data)));
    case GGML_TYPE_F16: return use(view(static_cast<half*>(tensor->data)));
    case GGML_TYPE_BF16: return use(view(static_cast<bfloat16*>(tensor->data)));
    default: return use(*loaded);
  }
}

}  // namespace FASTV_KIND
}  // namespace detail

inline namespace FASTV_KIND {

// Keys or values [dim, kv heads, tokens] of any type that ggml turns into floats, quantised ones included, by their own
// strides; permute a tensor that has them otherwise. For KeysOnly, unrotate() and value_norms(). O(1).
inline Result<LoadedKeys<detail::LoadTensor>> heads(const ggml_tensor* tensor) noexcept {
  return detail::loaded_heads(tensor, "the tensor");
}

// QueryKey of tensors, whose element types are known only at run time. query_key() makes it; see QueryKey for what the
// fields mean.
struct GgmlQueryKey {
  const ggml_tensor* query = nullptr;  // [dim, heads, rows] of the last prompt rows, after RoPE: F32, F16 or BF16
  const ggml_tensor* key = nullptr;    // [dim, kv heads, keys], of any type that ggml turns into floats
  float scale = 0;                     // 1 / sqrt(dim) in most models
  float soft_cap = 0;                  // 0: none
  Span<const float> bias = {};         // [keys] or empty
  Span<const float> sinks = {};        // [heads] or empty
  Span<const float> alibi = {};        // [heads] or empty
  bool causal = true;                  // a row sees the keys up to its own position; false: all keys
  Span<const Index> visible = {};      // [rows] or empty: tokens that each row sees, in place of causal
  std::size_t window = 0;              // sliding window; 0: all
  std::size_t past = 0;                // keys of earlier turns
  std::size_t first_key = 0;           // tokens before the first key at hand
  std::size_t heads_total = 0;         // of all ranks, where heads are sharded
  Span<const float> value_norms = {};  // see value_norms() in remedies.hpp; empty: unweighted

  std::size_t prompt_tokens() const noexcept {  // n
    const std::size_t end = key == nullptr ? 0 : first_key + detail::from_ne(key->ne[2]);
    return end > past ? end - past : 0;
  }
  Status check() const noexcept {  // tensors, extents, strides, scale, soft-cap
    return visit([](const auto& evidence) { return evidence.check(); });
  }
  std::size_t scratch_floats() const noexcept {  // as QueryKey's
    std::size_t floats = 0;
    const Status status = visit([&](const auto& evidence) {
      floats = evidence.scratch_floats();
      return Status{};
    });
    return status ? floats : 0;
  }
  // As QueryKey's.
  template <class Score, class ParallelFor>
  Status score(const Scoring& scoring, Span<Score> scores, const ParallelFor& parallel_for) const noexcept {
    return visit([&](const auto& evidence) { return evidence.score(scoring, scores, parallel_for); });
  }
  // Calls use(evidence) with the QueryKey of the tensors' own types, and returns the Status that use returns.
  template <class Use>
  Status visit(Use use) const noexcept {
    return detail::with_vectors(query, "query", [&](const auto& q) { return visit_key(q, use); });
  }

 private:
  template <class Q, class Use>
  Status visit_key(const Heads<Q>& q, Use use) const noexcept {
    return detail::with_vectors(key, "key", [&](const auto& keys) {
      auto evidence = fastv::query_key(q, keys, scale);
      // All fields, so that one more in QueryKey does not go unnoticed. (A quantised tensor has its scales in itself.)
      auto& [of_query, of_key, of_scale, of_soft_cap, of_bias, of_sinks, of_alibi, of_key_scales, of_causal, of_visible,
             of_window, of_past, of_first_key, of_heads_total, of_value_norms] = evidence;
      of_soft_cap = soft_cap;
      of_bias = bias;
      of_sinks = sinks;
      of_alibi = alibi;
      of_causal = causal;
      of_visible = visible;
      of_window = window;
      of_past = past;
      of_first_key = first_key;
      of_heads_total = heads_total;
      of_value_norms = value_norms;
      return use(evidence);
    });
  }
  template <class Use>
  Status visit_key(const LoadedKeys<detail::LoadTensor>&, Use) const noexcept {
    return fail(Errc::not_supported, "query is of type {}: cast it to F32", ggml_type_name(query->type));
  }
};

// Evidence of tensors in host memory: pruner.prune(query_key(q, k, scale), visual). What is wrong with them is found
// when it is used. O(1).
inline GgmlQueryKey query_key(const ggml_tensor* query, const ggml_tensor* key, float scale) noexcept {
  GgmlQueryKey evidence;
  evidence.query = query;
  evidence.key = key;
  evidence.scale = scale;
  return evidence;
}

// Tokens along dimension `axis` (0, 1 or 2) of a tensor in host memory, of any type:
//   hidden states [width, n]               axis 1
//   keys or values [dim, kv heads, n]      axis 2   (a view of the cache that ends at the n-th token)
//   keys or values [dim, n, kv heads]      axis 1
//   positions [n]                          axis 0   (M-RoPE's [4 n]: position_axes(data, 4, n))
// Elements of ne[0] must be side by side, unless the axis is 0. Quantised types move as whole rows. O(1).
inline Result<Rows> rows(ggml_tensor* tensor, int axis) noexcept {
  using detail::from_ne;
  if (Status status = detail::check_axis(tensor, axis); !status) return {{}, status};
  const auto bytes = [&](int i) { return static_cast<std::ptrdiff_t>(tensor->nb[i]); };
  const int other = axis == 0 ? 1 : 3 - axis;
  const std::size_t row = axis == 0 ? ggml_type_size(tensor->type) : ggml_row_size(tensor->type, tensor->ne[0]);
  return {{tensor->data, from_ne(tensor->ne[axis]), row, bytes(axis), from_ne(tensor->ne[other]), bytes(other)}, {}};
}

// Moves the kept tokens along `axis` to the front: see rows() and compact(). The tensor's own extents stay: take a view
// of the first m. O(bytes kept).
inline Status compact(const KeptRows& kept, ggml_tensor* tensor, int axis) noexcept {
  const Result<Rows> view = fastv::rows(tensor, axis);
  return view ? fastv::compact(kept, *view) : view.status;
}
// Copies the kept tokens along `axis` of one tensor to the front of another. O(bytes kept).
inline Status gather(const KeptRows& kept, ggml_tensor* from, ggml_tensor* to, int axis) noexcept {
  const Result<Rows> source = fastv::rows(from, axis), target = fastv::rows(to, axis);
  if (!source) return source.status;
  return target ? fastv::gather(kept, *source, *target) : target.status;
}

// Kept indices as the I32 [m] that ggml_get_rows() reads, in host memory. O(m).
inline Status write_indices(const KeptRows& kept, ggml_tensor* indices) noexcept {
  if (!kept.status) return kept.status;
  if (Status status = detail::check_tensor(indices, "the tensor of indices"); !status) return status;
  if (indices->type != GGML_TYPE_I32 || !ggml_is_contiguous(indices))
    return fail(Errc::not_supported, "the tensor of indices is of type {} or has gaps: make a contiguous I32 tensor",
                ggml_type_name(indices->type));
  const std::size_t room = detail::from_ne(ggml_nelements(indices));
  if (room != kept.indices.size())
    return fail(Errc::bad_shape, "the tensor of indices has {} entries but {} tokens stay", room, kept.indices.size());
  return fastv::write_indices(kept, Span<std::int32_t>(static_cast<std::int32_t*>(indices->data), room));
}

}  // namespace FASTV_KIND

}  // namespace fastv

#include "detail/end.hpp"

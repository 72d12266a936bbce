// fastv: what torch_device.hpp does by the kernels of cuda.cuh: PyTorch's tensors and memory, a stream of any kind.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <type_traits>

#include "../cuda_pruner.hpp"
#include "../torch.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
inline namespace FASTV_KIND {

// Of Streams:
//
//   using Queue                  what BasicPruner launches on
//   static bool reads(tensor)    whether kernels read the memory of tensors like it
//   static Queue of(tensor)      the stream that operations on it are queued on now
//
// All memory is PyTorch's, so that its caching allocator hands it out and takes it back in the order of the stream.
// Nothing waits for the device. A result without a tensor means that the kernels do not take these settings, shapes or
// element types: then ATen decides what is right and what is wrong.
//
// Of many query rows as many are scored at once as have logits of LogitBytes.
template <class Streams, std::size_t LogitBytes = std::size_t{1} << 28>
class TorchKernels {
 public:
  // Whether a setting that only the kernels have may be asked for. with_keys: there are keys to compare tokens by.
  static bool take(const Config& config, const at::Tensor& like, bool with_keys) {
    return (config.selection != Selection::diverse || with_keys) && Streams::reads(like);
  }

  // Kept indices, int64 [m], by the evidence of torch_device.hpp.
  template <class Evidence>
  static at::Tensor kept(const Config& config, const Evidence& evidence, Span<const TokenSpan> visual) {
    if (!take(config, like(evidence), evidence.key.defined())) return {};
    Run run(config, visual, evidence.tokens, evidence.queries, evidence.past, like(evidence), heads_of(evidence),
            config.selection == Selection::diverse
                ? static_cast<std::size_t>(evidence.key.size(0) * evidence.key.size(2))
                : 0);
    return run.prune(evidence) ? run.rows() : at::Tensor();
  }
  // Scores of the visual tokens, float [visual tokens].
  template <class Evidence>
  static at::Tensor scores(const Config& config, const Evidence& evidence, Span<const TokenSpan> visual) {
    if (!Streams::reads(like(evidence))) return {};
    Config rows;  // what is kept does not matter
    rows.score_rows = config.score_rows;
    rows.listed_rows = config.listed_rows;
    rows.prior_rows = config.prior_rows;
    Run run(rows, visual, evidence.tokens, evidence.queries, evidence.past, like(evidence), heads_of(evidence));
    return run.prune(evidence) ? run.scores() : at::Tensor();
  }
  // Kept indices, int64 [m], by scores [visual tokens].
  static at::Tensor kept(const Config& config, const at::Tensor& scores, Span<const TokenSpan> visual,
                         std::size_t tokens) {
    if (!take(config, scores, false) || scores.scalar_type() != at::kFloat || scores.stride(0) != 1) return {};
    Config own = config;  // rows have been scored by already
    own.score_rows = ScoreRows::last;
    own.listed_rows = own.prior_rows = {};
    Run run(own, visual, tokens, 1, 0, scores, 0);
    return run.prune_by(cuda::Scores{static_cast<const float*>(scores.data_ptr())}) ? run.rows() : at::Tensor();
  }

 private:
  template <class Evidence>
  static const at::Tensor& like(const Evidence& evidence) {
    return evidence.attention.defined() ? evidence.attention : evidence.key;
  }
  template <class Evidence>
  static std::size_t heads_of(const Evidence& evidence) {
    return evidence.attention.defined() ? 0 : static_cast<std::size_t>(evidence.query.size(0));
  }

  // One plan and what is queued for it.
  class Run {
   public:
    Run(const Config& config, Span<const TokenSpan> visual, std::size_t tokens, std::size_t queries, std::size_t past,
        const at::Tensor& like, std::size_t heads, std::size_t features = 0)
        : guard_(like.device()), queue_(Streams::of(like)), config_(config), past_(past) {
      config_.filtering_layer = 1;  // which one has run does not matter here
      request_ = {config_, visual, 0, tokens};
      request_.queries = queries;
      request_.query_row = request_.key_row = request_.table_row = 0;
      request_.past = Span<const std::size_t>(&past_, 1);
      cuda::Limits limits = limits_of(heads);
      limits.features = features;
      const Result<std::size_t> bytes = Pruner::bytes(limits);
      if (!bytes) return;
      constexpr std::size_t unit = 256;         // of which the Pruner's memory is to begin at a multiple
      if (*bytes >= greatest_size / 4) return;  // more than a tensor has
      memory_ = like.new_empty({static_cast<std::int64_t>(*bytes + unit)}, like.options().dtype(at::kByte));
      auto* memory = static_cast<char*>(memory_.data_ptr());
      memory += (unit - reinterpret_cast<std::uintptr_t>(memory) % unit) % unit;
      planned_ = pruner_.reserve(limits, memory, *bytes) &&
                 pruner_.plan(Span<const cuda::Request>(&request_, 1), /*layers=*/2, queue_);
    }
    Run(const Run&) = delete;
    Run& operator=(const Run&) = delete;

    // False where the kernels do not take it.
    template <class Evidence>
    bool prune(const Evidence& evidence) {
      if (config_.selection == Selection::random || config_.selection == Selection::uniform)
        return prune_by(cuda::NoEvidence{});
      if (evidence.attention.defined()) return prune_by_map(evidence.attention);
      return prune_by_vectors(evidence.query, evidence.key, static_cast<float>(evidence.scale));
    }
    template <class View>
    bool prune_by(const View& view) {
      return planned_ && pruner_.stages() == 1 && pruner_.prune(0, view, queue_);
    }
    // What has been found.
    at::Tensor rows() const { return results(pruner_.kept(0).rows, pruner_.kept(0).total, at::kInt).to(at::kLong); }
    at::Tensor scores() const {
      return results(pruner_.kept(0).scores, visual_tokens(request_.visual), at::kFloat).clone();
    }

   private:
    using Pruner = cuda::BasicPruner<typename Streams::Queue>;

    // Room for this one sequence.
    cuda::Limits limits_of(std::size_t heads) const noexcept {
      const QueryRows rows{config_.score_rows, config_.listed_rows, request_.tokens};
      cuda::Limits limits;
      limits.tokens = request_.tokens;
      limits.visual = visual_tokens(request_.visual);
      limits.keys = past_ + request_.tokens;
      limits.heads = heads;
      const std::size_t row_bytes = 4 * heads * limits.keys, fit = row_bytes == 0 ? 1 : LogitBytes / row_bytes;
      const std::size_t wanted = rows.size() + config_.prior_rows.size();
      limits.rows = wanted < fit ? wanted : fit;
      if (limits.rows > 65535) limits.rows = 65535;  // blocks of a launch
      if (limits.rows == 0) limits.rows = 1;
      limits.spans = request_.visual.size();
      limits.groups = config_.window_rows > 0 ? limits.visual : limits.spans;
      limits.listed = config_.listed_rows.size() + config_.prior_rows.size();
      return limits;
    }

    bool prune_by_map(const at::Tensor& attention) {
      return with_element(attention.scalar_type(), [&](auto element) {
        using T = typename decltype(element)::type;
        if constexpr (std::is_same<T, double>::value) {
          return false;
        } else {
          const auto extent = [&](std::int64_t dim) { return static_cast<std::size_t>(attention.size(dim)); };
          auto view = cuda::probabilities(static_cast<const T*>(attention.data_ptr()), extent(0), extent(1), extent(2));
          view.head_stride = static_cast<std::ptrdiff_t>(attention.stride(0));
          view.query_stride = static_cast<std::ptrdiff_t>(attention.stride(1));
          view.key_stride = static_cast<std::ptrdiff_t>(attention.stride(2));
          return prune_by(view);
        }
      });
    }
    bool prune_by_vectors(const at::Tensor& query, const at::Tensor& key, float scale) {
      return with_element(query.scalar_type(), [&](auto q) {
        using Q = typename decltype(q)::type;
        return with_element(key.scalar_type(),
                            [&](auto k) { return prune_by_vectors<Q, typename decltype(k)::type>(query, key, scale); });
      });
    }
    template <class Q, class K>
    bool prune_by_vectors(const at::Tensor& query, const at::Tensor& key, float scale) {
      if constexpr (std::is_same<Q, double>::value || std::is_same<K, double>::value) {
        return false;
      } else {
        const cuda::Heads<Q> queries{vectors_of<Q>(query)};
        const cuda::Heads<K> keys{vectors_of<K>(key)};
        if (config_.selection == Selection::diverse && !uses_scores(config_))
          return prune_by(cuda::with_features(cuda::NoEvidence{}, keys));
        if (queries.layout.pages.chunk != 0) return false;
        const auto evidence = cuda::query_key(queries, keys, scale);
        return config_.selection == Selection::diverse ? prune_by(cuda::with_features(evidence, keys))
                                                       : prune_by(evidence);
      }
    }
    template <class T>
    static Heads<T> vectors_of(const at::Tensor& tensor) {
      Axes axes{};
      for (std::int64_t i = 0; i < 3; ++i) {
        axes.size[i] = static_cast<std::size_t>(tensor.size(i));
        axes.stride[i] = static_cast<std::ptrdiff_t>(tensor.stride(i));
      }
      return retyped<Heads<T>>(static_cast<const Heads<TensorElement>&>(strided_heads(tensor, axes)));
    }

    // A part of the Pruner's memory, which lives as long as the tensor.
    template <class T>
    at::Tensor results(const T* data, std::size_t count, at::ScalarType type) const {
      const std::int64_t begin = reinterpret_cast<const char*>(data) - static_cast<const char*>(memory_.data_ptr());
      return memory_.slice(0, begin, begin + static_cast<std::int64_t>(count * sizeof(T))).view(type);
    }

    const c10::DeviceGuard guard_;
    typename Streams::Queue queue_;
    Config config_;
    std::size_t past_;
    cuda::Request request_;
    at::Tensor memory_;
    Pruner pruner_;
    bool planned_ = false;
  };
};

}  // namespace FASTV_KIND
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

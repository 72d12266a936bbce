// The layers below K.
#pragma once

#include <cmath>
#include <fastv/ggml.hpp>
#include <map>
#include <optional>

#include "half.hpp"

namespace llava {

// Layers below K: leaves hidden rows, and the evidence of layer K-1.
class Head : public Half {
 public:
  Head(const Halves& halves, const EngineOptions& options, Devices& devices)
      : Half(halves.head(), options, "layers below K"),
        devices_(devices),
        layers_(halves.facts()),
        layer_(static_cast<std::int32_t>(halves.filtering_layer()) - 1),
        last_node_(layers_.rows_of(halves.filtering_layer() - 1)),
        every_layer_(options.every_layer),
        by_head_(options.by_head) {}

  // Tokens or rows of one call. last: their last token is the one that ranks.
  void run(const std::vector<llama_token>& tokens, const float* rows, std::vector<llama_pos> positions,
           std::vector<llama_seq_id> sequences, bool last) {
    done_ = 0;
    ranks_at_ = last ? sequences.size() : 0;
    const std::size_t count = sequences.size(), before = hidden.count();
    Half::run(tokens, rows, std::move(positions), std::move(sequences), std::vector<std::int8_t>(count, 0));
    if (hidden.count() == before || cells.size() < count)
      throw std::runtime_error("libllama ran the layers below K without " + last_node_ +
                               ": this architecture is built otherwise than those that were tried");
  }

  Rows hidden;                      // of all calls since it was cleared
  std::vector<std::int64_t> cells;  // of layer K-1's cache, the same

  // Where the keys of a sequence lie in a layer's cache; the first `past` are earlier turns'.
  struct Keys {
    const std::vector<std::int64_t>& cells;
    std::size_t past;
    std::size_t prompt_tokens() const { return cells.size() - past; }
  };

  // [n]: the attention that the last token pays to `visual` in a layer, mean over heads; 0 for text.
  std::vector<float> scores(std::int32_t layer, fastv::Span<const fastv::TokenSpan> visual, const Keys& keys) const {
    const Evidence& e = evidence(layer);
    const std::vector<float> of_visual = attention_of(e, keys_to_rank(e), 0, e.heads, visual, keys);
    std::vector<float> all(keys.prompt_tokens());
    fastv::for_each_visual(visual, [&](std::size_t number, std::size_t token) { all[token] = of_visual[number]; });
    return all;
  }
  // [H, visual tokens]: the same in layer K-1, head by head.
  std::vector<float> scores_by_head(fastv::Span<const fastv::TokenSpan> visual, const Keys& keys) const {
    const Evidence& e = evidence(layer_);
    const std::optional<KeysOnHost> on_host = keys_to_rank(e);
    std::vector<float> all;
    for (std::size_t head = 0; head < e.heads; ++head) {
      const std::vector<float> one = attention_of(e, on_host, head, 1, visual, keys);
      all.insert(all.end(), one.begin(), one.end());
    }
    return all;
  }
  // [visual tokens, G * c]: keys of layer K-1.
  std::vector<float> keys_of(fastv::Span<const fastv::TokenSpan> visual, const Keys& keys) const {
    const KeysOnHost on_host(evidence(layer_).keys);
    const std::size_t width = on_host.kv_heads() * on_host.head_dim();
    std::vector<float> all(fastv::visual_tokens(visual) * width);
    fastv::for_each_visual(visual, [&](std::size_t number, std::size_t token) {
      for (std::size_t g = 0; g < on_host.kv_heads(); ++g)
        on_host.load(g, keys.cells[keys.past + token], all.data() + number * width + g * on_host.head_dim());
    });
    return all;
  }
  bool saw(std::int32_t layer) const { return evidence_.count(layer) != 0; }

 private:
  void begin() override {}

  bool look(ggml_tensor* node, bool ask) override {
    if (node->op == GGML_OP_SET_ROWS && ask && layer_of_keys(node) == layer_) {
      const auto ids = read_all<std::int64_t>(node->src[1]);
      cells.insert(cells.end(), ids.begin(), ids.end());
      return false;
    }
    if (node->op == GGML_OP_FLASH_ATTN_EXT) {
      const std::int32_t layer = layer_of_keys(in_cache(node->src[1]));
      // Of layers with windows, keys lie in other cells, and are not all there.
      if (layer != layer_ && !(every_layer_ && layer >= 0 && layer < layer_ && !layers_.all[size(layer)].windowed))
        return false;
      if (ask) return ranks_at_ != 0 && done_ + size(node->src[0]->ne[1]) == ranks_at_;
      take_evidence(evidence_[layer], node);
      return true;
    }
    if (last_node_ != node->name) return false;
    if (ask) return true;
    hidden.append(node);
    done_ += size(ggml_nrows(node));
    return false;  // nothing behind it runs
  }

  struct Evidence {
    std::vector<float> by_cell;  // where a device ranked: [cells], or head by head, [H, cells]; else empty, and
    std::vector<float> query, sinks, alibi;  // [H, c]; [H] or empty
    ggml_tensor keys;                        // [c, cells, G], in the cache
    std::size_t heads;
    float scale, soft_cap;
  };
  const Evidence& evidence(std::int32_t layer) const {
    const auto found = evidence_.find(layer);
    if (found == evidence_.end()) throw std::runtime_error("layer K-1 has no flash attention to be looked at");
    return found->second;
  }

  // Keys of a layer in its cache; those of a device come to the host, as many bytes as the cells in use.
  class KeysOnHost {
   public:
    explicit KeysOnHost(const ggml_tensor& keys)
        : keys_(keys),
          data_(static_cast<const char*>(keys.data)),
          to_float_(ggml_get_type_traits(keys.type)->to_float) {
      if (is_on_host(&keys)) return;
      copy_.resize(size(keys.ne[1]) * keys.nb[1]);
      ggml_backend_tensor_get(root(&keys), copy_.data(), keys.view_offs,
                              std::min(copy_.size(), ggml_nbytes(root(&keys)) - keys.view_offs));
      data_ = copy_.data();
    }
    std::size_t kv_heads() const { return size(keys_.ne[2]); }
    std::size_t head_dim() const { return size(keys_.ne[0]); }
    void load(std::size_t kv_head, std::int64_t cell, float* out) const noexcept {
      const char* key = data_ + size(cell) * keys_.nb[1] + kv_head * keys_.nb[2];
      if (keys_.type == GGML_TYPE_F32)
        std::memcpy(out, key, head_dim() * sizeof(float));
      else
        to_float_(key, out, keys_.ne[0]);
    }

   private:
    const ggml_tensor& keys_;
    std::vector<char> copy_;
    const char* data_;
    ggml_to_float_t to_float_;
  };

  // What heads are ranked by here, where no device has done it.
  static std::optional<KeysOnHost> keys_to_rank(const Evidence& e) {
    return e.by_cell.empty() ? std::optional<KeysOnHost>(e.keys) : std::nullopt;
  }
  // [visual tokens]: the mean over `heads` heads from one on; of all of them alone, where a device ranked them together.
  static std::vector<float> attention_of(const Evidence& e, const std::optional<KeysOnHost>& on_host, std::size_t first,
                                         std::size_t heads, fastv::Span<const fastv::TokenSpan> visual,
                                         const Keys& keys) {
    if (on_host) return rank(e, *on_host, first, heads, visual, keys);
    const std::size_t cells = size(e.keys.ne[1]), rows = std::min(heads, e.by_cell.size() / cells);
    std::vector<float> scores(fastv::visual_tokens(visual));
    fastv::for_each_visual(visual, [&](std::size_t number, std::size_t token) {
      const std::size_t cell = size(keys.cells[keys.past + token]);
      for (std::size_t row = first; row < first + rows; ++row)
        scores[number] += e.by_cell[row * cells + cell] / static_cast<float>(rows);
    });
    return scores;
  }
  // The same on the host. Heads: whole KV heads' of them, or a part of one's.
  static std::vector<float> rank(const Evidence& e, const KeysOnHost& on_host, std::size_t first, std::size_t heads,
                                 fastv::Span<const fastv::TokenSpan> visual, const Keys& keys) {
    const std::size_t head_dim = on_host.head_dim(), group = e.heads / on_host.kv_heads();
    const auto load = [&](std::size_t kv_head, std::size_t token, float* out) noexcept {
      on_host.load(first / group + kv_head, keys.cells[token], out);
    };
    const auto some = [&](const std::vector<float>& all) {
      return all.empty() ? fastv::Span<const float>() : fastv::Span<const float>(all.data() + first, heads);
    };
    auto evidence = fastv::query_key(
        fastv::heads(e.query.data() + first * head_dim, fastv::TokenMajor{1, heads, head_dim}),
        fastv::loaded_keys(std::max<std::size_t>(heads / group, 1), keys.cells.size(), head_dim, load), e.scale);
    evidence.soft_cap = e.soft_cap;
    evidence.sinks = some(e.sinks);
    evidence.alibi = some(e.alibi);
    evidence.past = keys.past;
    require(evidence.check());
    std::vector<float> scratch(evidence.scratch_floats()), scores(fastv::visual_tokens(visual));
    fastv::Scoring scoring{visual, {}, scratch};
    scoring.queries.tokens = evidence.prompt_tokens();
    require(evidence.score(scoring, fastv::Span<float>(scores), fastv::Serial{}));
    return scores;
  }

  void take_evidence(Evidence& e, const ggml_tensor* attention) {
    const ggml_tensor* q = attention->src[0];  // [c, tokens, H]
    e.keys = *in_cache(attention->src[1]);
    e.by_cell.clear();
    e.heads = size(q->ne[2]);
    const std::size_t head_dim = size(q->ne[0]);
    float max_bias = 0;
    std::memcpy(&e.scale, attention->op_params, sizeof(float));
    std::memcpy(&max_bias, attention->op_params + 1, sizeof(float));
    std::memcpy(&e.soft_cap, attention->op_params + 2, sizeof(float));
    const std::vector<float> slopes = slopes_of(e.heads, max_bias);
    if (!is_on_host(&e.keys) && rank_on_device(e, attention, slopes)) return;
    e.query.resize(e.heads * head_dim);
    for (std::size_t h = 0; h < e.heads; ++h)
      ggml_backend_tensor_get(q, e.query.data() + h * head_dim, h * q->nb[2] + size(q->ne[1] - 1) * q->nb[1],
                              head_dim * sizeof(float));
    e.sinks = attention->src[4] == nullptr ? std::vector<float>{} : read_all<float>(attention->src[4]);
    e.alibi = slopes;
  }

  // ALiBi's, [H]: as ggml spreads them (Press et al. 2022, and their rule where the heads are no power of 2); empty without.
  static std::vector<float> slopes_of(std::size_t heads, float max_bias) {
    std::vector<float> slopes;
    if (max_bias <= 0) return slopes;
    const auto whole = static_cast<std::size_t>(std::exp2(std::floor(std::log2(static_cast<double>(heads)))));
    for (std::size_t h = 0; h < heads; ++h) {
      const double step = h < whole ? static_cast<double>(h + 1) : static_cast<double>(2 * (h - whole) + 1) / 2;
      slopes.push_back(
          static_cast<float>(std::exp2(-static_cast<double>(max_bias) / static_cast<double>(whole) * step)));
    }
    return slopes;
  }

  // So that nothing but a score a cell comes to the host; of every head where they are asked for, or where each has its
  // slope. Cells of other sequences, and empty ones, are hidden by the layer's own mask.
  bool rank_on_device(Evidence& e, const ggml_tensor* attention, const std::vector<float>& slopes) {
    const bool apart = by_head_ || !slopes.empty();
    DeviceGraph graph(devices_.of(&e.keys), 64 + (apart ? 32 * e.heads : 0));
    ggml_context* ctx = graph.context();
    const auto in_f32 = [&](ggml_tensor* t) { return t->type == GGML_TYPE_F32 ? t : ggml_cast(ctx, t, GGML_TYPE_F32); };
    const auto there = [&](const ggml_tensor* t) { return t == nullptr ? nullptr : graph.borrow(t); };
    const auto by_token = [&](ggml_tensor* t) { return ggml_permute(ctx, t, 0, 2, 1, 3); };
    ggml_tensor* q = by_token(there(attention->src[0]));  // [c, H, rows]
    ggml_tensor* k = by_token(in_f32(there(&e.keys)));    // [c, G, cells]; in F16, queries are rounded
    ggml_tensor* mask = there(attention->src[3]);
    ggml_tensor* sinks = there(attention->src[4]);
    const auto ranked = [&](ggml_tensor* of_q, ggml_tensor* of_k, ggml_tensor* of_sinks, ggml_tensor* by) {
      const auto scores = fastv::graph::scores(ctx, of_q, of_k, e.scale, e.soft_cap, of_sinks, by);
      require(scores.status);
      return *scores;
    };
    ggml_tensor* result = nullptr;
    if (!apart) {
      result = ranked(q, k, sinks, mask);
    } else {
      const auto head_of = [&](ggml_tensor* t, std::size_t head) {
        return ggml_view_3d(ctx, t, t->ne[0], 1, t->ne[2], t->nb[1], t->nb[2], head * t->nb[1]);
      };
      ggml_tensor* distances = slopes.empty() || mask == nullptr ? nullptr : in_f32(mask);
      for (std::size_t h = 0; h < e.heads; ++h) {
        ggml_tensor* one = ranked(head_of(q, h), head_of(k, h / (e.heads / size(k->ne[1]))),
                                  sinks == nullptr ? nullptr : ggml_view_1d(ctx, sinks, 1, h * sinks->nb[0]),
                                  distances == nullptr ? mask : ggml_scale(ctx, distances, slopes[h]));
        result = result == nullptr ? one : ggml_concat(ctx, result, one, 1);
      }
    }
    if (!graph.compute(result)) return false;
    e.by_cell = read_all<float>(result);
    return true;
  }

  Devices& devices_;
  const Layers& layers_;
  std::int32_t layer_;
  std::string last_node_;
  bool every_layer_, by_head_;
  std::size_t done_ = 0, ranks_at_ = 0;
  std::map<std::int32_t, Evidence> evidence_;  // by layer
};

}  // namespace llava

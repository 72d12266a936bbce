#include "engine.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace llava {

namespace {

using Clock = std::chrono::steady_clock;

std::int64_t whole(std::size_t n) { return static_cast<std::int64_t>(n); }
std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

// Keys are attended to in steps of this many, the last ones masked: llama.cpp's step, so that sums are taken in the
// same order.
constexpr std::size_t key_step = 256;
std::size_t rounded_up(std::size_t keys) { return (keys + key_step - 1) / key_step * key_step; }

void require(const fastv::Status& status) {
  if (!status) throw std::invalid_argument(status.message().c_str());
}
ggml_tensor* required(const fastv::Result<ggml_tensor*>& tensor) {
  require(tensor.status);
  return *tensor;
}

}  // namespace

Cache::Cache(const Model& model, const Backends& backends, const fastv::Plan& plan, std::size_t generated,
             ggml_type type) {
  const Shape& shape = model.shape();
  const std::int64_t width = shape.kv_heads * shape.head_dim;
  if (width % ggml_blck_size(type) != 0 || shape.head_dim % ggml_blck_size(type) != 0)
    throw std::invalid_argument("a KV cache of type " + std::string(ggml_type_name(type)) + " needs a head dimension " +
                                "that is a multiple of " + std::to_string(ggml_blck_size(type)) + ", not " +
                                std::to_string(shape.head_dim));
  context_.reset(ggml_init({size(shape.layers) * 2 * ggml_tensor_overhead(), nullptr, true}));
  for (std::size_t i = 0; i < size(shape.layers); ++i) {
    Layer layer{};
    layer.capacity = rounded_up(plan.kv_length(i, generated));
    layer.keys = ggml_new_tensor_2d(context_.get(), type, width, whole(layer.capacity));
    layer.values = ggml_new_tensor_2d(context_.get(), type, width, whole(layer.capacity));
    layers_.push_back(layer);
  }
  buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(context_.get(), backends.cache_buffer()));
  if (!buffer_) throw std::runtime_error("there is no memory for the KV cache: use a shorter context");
  ggml_backend_buffer_clear(buffer_.get(), 0);  // masked keys are multiplied by 0, and 0 times NaN is NaN
}

std::size_t Cache::bytes() const { return ggml_backend_buffer_get_size(buffer_.get()); }

// One graph under construction: nodes, and the inputs to be filled once it has been allocated.
class Engine::Graph {
 public:
  // cache: of the layers; null for a graph without any.
  Graph(const Engine& engine, Cache* cache, std::size_t nodes)
      : engine_(engine),
        cache_(cache),
        context_(ggml_init({ggml_tensor_overhead() * nodes + ggml_graph_overhead_custom(nodes, false), nullptr, true})),
        graph_(ggml_new_graph_custom(context_.get(), nodes, false)) {}

  ggml_context* context() const { return context_.get(); }

  template <class T>
  ggml_tensor* input(ggml_type type, std::vector<std::int64_t> shape, std::vector<T> data) {
    ggml_tensor* tensor = ggml_new_tensor(context(), type, static_cast<int>(shape.size()), shape.data());
    ggml_set_input(tensor);
    const auto* bytes = reinterpret_cast<const unsigned char*>(data.data());
    inputs_.push_back({tensor, {bytes, bytes + data.size() * sizeof(T)}});
    return tensor;
  }
  ggml_tensor* output(ggml_tensor* tensor) {
    ggml_set_output(tensor);
    ggml_build_forward_expand(graph_, tensor);
    return tensor;
  }

  // The causal mask of t rows that come behind `past` keys: F16 [keys, t], keys rounded up.
  ggml_tensor* mask(std::size_t past, std::size_t t) {
    for (const Mask& known : masks_)
      if (known.past == past && known.rows == t) return known.tensor;
    const std::size_t keys = rounded_up(past + t);
    const ggml_fp16_t seen = ggml_fp32_to_fp16(0.0f), hidden = ggml_fp32_to_fp16(-INFINITY);
    std::vector<ggml_fp16_t> values(keys * t, hidden);
    for (std::size_t row = 0; row < t; ++row) std::fill_n(values.begin() + whole(row * keys), past + row + 1, seen);
    masks_.push_back({past, t, input(GGML_TYPE_F16, {whole(keys), whole(t)}, std::move(values))});
    return masks_.back().tensor;
  }

  // What a stage of pruning scores by, of the layer that ran last.
  struct Evidence {
    ggml_tensor *query, *keys;  // [c, H, t] after RoPE; [c, G, keys in use]
  };

  enum class Rows { all, last, none };

  // Layer `index` on hidden [d, t]; positions I32 [axes t]. rows: whose output is wanted; none: only the cache is
  // filled.
  ggml_tensor* layer(std::size_t index, ggml_tensor* hidden, ggml_tensor* positions, Rows rows) {
    ggml_context* ctx = context();
    const Shape& s = engine_.model_.shape();
    const Layer& w = engine_.model_.layers()[index];
    Cache::Layer& cache = cache_->layers_[index];
    const std::int64_t c = s.head_dim, t = hidden->ne[1];

    ggml_tensor* x = norm(hidden, w.attention_norm);  // [d, t]
    ggml_tensor *q = nullptr, *k = nullptr, *v = nullptr;
    if (w.qkv != nullptr) {
      ggml_tensor* qkv = linear(x, w.qkv, w.qkv_bias);  // [(H + 2 G) c, t]
      const std::size_t head = ggml_row_size(qkv->type, c);
      const auto heads_at = [&](std::int64_t heads, std::int64_t first) {
        return ggml_view_3d(ctx, qkv, c, heads, t, head, qkv->nb[1], head * size(first));
      };
      q = heads_at(s.heads, 0);
      k = heads_at(s.kv_heads, s.heads);
      v = heads_at(s.kv_heads, s.heads + s.kv_heads);
    } else {
      q = ggml_reshape_3d(ctx, linear(x, w.query, w.query_bias), c, s.heads, t);
      k = ggml_reshape_3d(ctx, linear(x, w.key, w.key_bias), c, s.kv_heads, t);
      v = ggml_reshape_3d(ctx, linear(x, w.value, w.value_bias), c, s.kv_heads, t);
    }
    q = rope(q, positions, w.rope_factors);
    k = rope(k, positions, w.rope_factors);
    const std::size_t past = cache.length;
    store(k, cache.keys, past);
    store(v, cache.values, past);
    cache.length += size(t);
    if (rows == Rows::none) return hidden;

    ggml_tensor* out = ggml_flash_attn_ext(
        ctx, ggml_permute(ctx, q, 0, 2, 1, 3), seen(cache.keys, rounded_up(cache.length)),
        seen(cache.values, rounded_up(cache.length)), mask(past, size(t)), s.attention_scale, 0, 0);  // [c, H, t]
    ggml_prec_set_acc(out, GGML_PREC_F32);
    out = linear(ggml_reshape_2d(ctx, out, c * s.heads, t), w.output, w.output_bias);  // [d, t]
    if (rows == Rows::last) {
      out = ggml_view_2d(ctx, out, out->ne[0], 1, out->nb[1], size(t - 1) * out->nb[1]);
      hidden = ggml_view_2d(ctx, hidden, hidden->ne[0], 1, hidden->nb[1], size(t - 1) * hidden->nb[1]);
    }
    hidden = ggml_add(ctx, out, hidden);
    x = norm(hidden, w.ffn_norm);
    x = ggml_swiglu_split(ctx, linear(x, w.gate, nullptr), linear(x, w.up, nullptr));  // [f, t]
    hidden = ggml_add(ctx, linear(x, w.down, nullptr), hidden);
    ggml_set_name(hidden, layer_done);
    ggml_build_forward_expand(graph_, hidden);

    evidence_ = {q, ggml_view_3d(ctx, cache.keys, c, s.kv_heads, whole(cache.length),
                                 ggml_row_size(cache.keys->type, c), cache.keys->nb[1], 0)};
    return hidden;
  }
  const Evidence& evidence() const { return evidence_; }

  // Layers begin .. end - 1 on hidden [d, n], a piece of it after the other. Returns [d, n], or [d, 1] behind the last.
  ggml_tensor* layers(std::size_t begin, std::size_t end, ggml_tensor* hidden, ggml_tensor* positions) {
    const Shape& s = engine_.model_.shape();
    const auto n = size(hidden->ne[1]);
    const std::size_t piece = engine_.options_.piece;
    const bool last_layers = end == size(s.layers);
    ggml_tensor* all = nullptr;
    for (std::size_t first = 0; first < n; first += piece) {
      const std::size_t t = std::min(piece, n - first);
      const bool last_piece = first + t == n;
      ggml_tensor* part =
          t == n ? hidden
                 : ggml_view_2d(context(), hidden, hidden->ne[0], whole(t), hidden->nb[1], first * hidden->nb[1]);
      ggml_tensor* part_positions = positions_of(positions, n, first, t);
      for (std::size_t i = begin; i < end; ++i)
        part = layer(i, part, part_positions,
                     i + 1 < size(s.layers) ? Rows::all
                     : last_piece           ? Rows::last
                                            : Rows::none);
      if (last_layers || all == nullptr)
        all = part;
      else
        all = ggml_concat(context(), all, part, 1);
    }
    return all;
  }

  // hidden [d, 1] -> [v]
  ggml_tensor* logits(ggml_tensor* hidden) {
    const Model& model = engine_.model_;
    return output(linear(norm(hidden, model.output_norm()), model.output(), model.output_bias()));
  }

  // What a stage of pruning leaves in the graph: which tokens stayed, and where they were ranked by scores, those and
  // how many of them rank nothing.
  struct Stage {
    ggml_tensor *kept, *scores = nullptr, *counts = nullptr;
  };
  // hidden and positions become those of the tokens that the next stage keeps.
  Stage prune(fastv::graph::Pruner& pruner, ggml_tensor*& hidden, ggml_tensor*& positions) {
    ggml_context* ctx = context();
    const Shape& s = engine_.model_.shape();
    Stage stage{};
    if (pruner.config(pruner.stage()).selection == fastv::Selection::top_k) {
      ggml_tensor* keys = evidence_.keys;
      if (keys == nullptr) throw std::invalid_argument("no layer has attended yet that could rank the visual tokens");
      // In F32, so that the ranking does not depend on how a backend multiplies its cache's type.
      if (keys->type != GGML_TYPE_F32) keys = ggml_cast(ctx, keys, GGML_TYPE_F32);
      stage.scores = output(required(fastv::graph::scores(ctx, evidence_.query, keys, s.attention_scale)));
    }
    stage.kept = output(required(pruner.select(ctx, stage.scores)));
    if (const auto counts = pruner.counts(ctx)) stage.counts = output(*counts);
    pruner_ = &pruner;
    hidden = ggml_get_rows(ctx, hidden, stage.kept);
    positions = required(fastv::graph::gather_positions(ctx, positions, s.position_axes(), stage.kept));
    return stage;
  }

  void run(const Progress& progress = {}) {
    ggml_backend_sched_t scheduler = engine_.backends_.scheduler();
    ggml_backend_sched_reset(scheduler);
    ggml_backend_sched_set_eval_callback(scheduler, progress ? &Graph::on_node : nullptr, this);
    if (!ggml_backend_sched_alloc_graph(scheduler, graph_))
      throw std::runtime_error("there is no memory to run the prompt: use a shorter one, or smaller pieces");
    for (const Input& in : inputs_) ggml_backend_tensor_set(in.tensor, in.bytes.data(), 0, in.bytes.size());
    if (pruner_ != nullptr)
      require(pruner_->set_inputs([](ggml_tensor* tensor, const void* data, std::size_t bytes) {
        ggml_backend_tensor_set(tensor, data, 0, bytes);
      }));
    progress_ = progress;
    layers_total_ = 0;
    for (int i = 0; progress && i < ggml_graph_n_nodes(graph_); ++i)
      layers_total_ += is_layer(ggml_graph_node(graph_, i)) ? 1 : 0;
    const ggml_status status = ggml_backend_sched_graph_compute(scheduler, graph_);
    ggml_backend_sched_set_eval_callback(scheduler, nullptr, nullptr);
    if (status != GGML_STATUS_SUCCESS)
      throw std::runtime_error(std::string("ggml could not run the model: ") + ggml_status_to_string(status));
  }

  template <class T>
  std::vector<T> read(const ggml_tensor* tensor) const {
    std::vector<T> values(ggml_nbytes(tensor) / sizeof(T));
    ggml_backend_tensor_get(tensor, values.data(), 0, values.size() * sizeof(T));
    return values;
  }

 private:
  static constexpr const char* layer_done = "layer";
  struct Input {
    ggml_tensor* tensor;
    std::vector<unsigned char> bytes;
  };
  struct Mask {
    std::size_t past, rows;
    ggml_tensor* tensor;
  };

  ggml_tensor* norm(ggml_tensor* x, ggml_tensor* weight) {
    return ggml_mul(context(), ggml_rms_norm(context(), x, engine_.model_.shape().rms_eps), weight);
  }
  ggml_tensor* linear(ggml_tensor* x, ggml_tensor* weight, ggml_tensor* bias) {
    x = ggml_mul_mat(context(), weight, x);
    return bias == nullptr ? x : ggml_add(context(), x, bias);
  }
  ggml_tensor* rope(ggml_tensor* x, ggml_tensor* positions, ggml_tensor* factors) {
    const Shape& s = engine_.model_.shape();
    if (!s.m_rope())
      return ggml_rope_ext(context(), x, positions, factors, s.rope_dims, s.rope_mode, s.rope_context, s.rope_base,
                           s.rope_frequency_scale, 0, 1, 32, 1);
    int sections[4];
    std::copy(s.rope_sections, s.rope_sections + 4, sections);
    return ggml_rope_multi(context(), x, positions, factors, s.rope_dims, sections, s.rope_mode, s.rope_context,
                           s.rope_base, s.rope_frequency_scale, 0, 1, 32, 1);
  }
  // Heads [c, G, t] behind the `past` tokens of a cache.
  void store(ggml_tensor* heads, ggml_tensor* cache, std::size_t past) {
    ggml_tensor* rows = ggml_view_2d(context(), heads, cache->ne[0], heads->ne[2], heads->nb[2], 0);
    ggml_tensor* place = ggml_view_2d(context(), cache, cache->ne[0], heads->ne[2], cache->nb[1], past * cache->nb[1]);
    ggml_build_forward_expand(graph_, ggml_cpy(context(), rows, place));
  }
  // The first `keys` tokens of a cache, as attention reads them: [c, keys, G].
  ggml_tensor* seen(ggml_tensor* cache, std::size_t keys) {
    const Shape& s = engine_.model_.shape();
    return ggml_permute(context(),
                        ggml_view_3d(context(), cache, s.head_dim, s.kv_heads, whole(keys),
                                     ggml_row_size(cache->type, s.head_dim), cache->nb[1], 0),
                        0, 2, 1, 3);
  }
  // Those of tokens first .. first + t - 1 out of [axes n].
  ggml_tensor* positions_of(ggml_tensor* positions, std::size_t n, std::size_t first, std::size_t t) {
    if (t == n) return positions;
    ggml_tensor* all = nullptr;
    for (int axis = 0; axis < engine_.model_.shape().position_axes(); ++axis) {
      ggml_tensor* one = ggml_view_1d(context(), positions, whole(t),
                                      (static_cast<std::size_t>(axis) * n + first) * sizeof(std::int32_t));
      all = all == nullptr ? one : ggml_concat(context(), all, one, 0);
    }
    return all;
  }

  static bool is_layer(const ggml_tensor* node) { return std::string(node->name) == layer_done; }
  static bool on_node(ggml_tensor* node, bool ask, void* self) {
    if (ask) return is_layer(node);
    auto* graph = static_cast<Graph*>(self);
    graph->progress_(static_cast<double>(++graph->layers_done_) / static_cast<double>(graph->layers_total_));
    return true;
  }

  const Engine& engine_;
  Cache* cache_;
  ggml_context_ptr context_;
  ggml_cgraph* graph_;
  Evidence evidence_{};
  std::vector<Input> inputs_;
  std::vector<Mask> masks_;
  const fastv::graph::Pruner* pruner_ = nullptr;
  Progress progress_;
  int layers_done_ = 0, layers_total_ = 0;
};

namespace {

// Nodes of a prefill, without those of pruning: about 40 a layer and piece.
std::size_t prefill_nodes(const Model& model, std::size_t tokens, std::size_t piece) {
  return size(model.shape().layers) * 48 * ((tokens + piece - 1) / piece) + 256;
}

}  // namespace

std::vector<float> Engine::embed(const std::vector<std::int32_t>& tokens) const {
  for (const std::int32_t token : tokens)
    if (token < 0 || token >= model_.shape().vocabulary)
      throw std::out_of_range("token " + std::to_string(token) + " is not among the " +
                              std::to_string(model_.shape().vocabulary) + " of the vocabulary");
  if (tokens.empty()) return {};
  Graph graph(*this, nullptr, 16);
  ggml_tensor* ids = graph.input(GGML_TYPE_I32, {whole(tokens.size())}, tokens);
  ggml_tensor* rows = graph.output(ggml_get_rows(graph.context(), model_.token_embeddings(), ids));
  graph.run();
  return graph.read<float>(rows);
}

fastv::Plan Engine::plan(const Prompt& prompt, const std::vector<fastv::Config>& schedule) const {
  const auto plan = fastv::make_plan(schedule, {prompt.tokens, size(model_.shape().layers), prompt.visual});
  require(plan.status);
  return *plan;
}

Prefill Engine::prefill(const Prompt& prompt, const std::vector<fastv::Config>& schedule, Cache& cache,
                        const Progress& progress) const {
  if (options_.prune_by == PruneBy::between_graphs && !schedule.empty())
    return prefill_between_graphs(prompt, schedule, cache, progress);
  const auto start = Clock::now();
  const Shape& s = model_.shape();
  fastv::graph::Pruner pruner{fastv::Span<const fastv::Config>(schedule)};
  require(pruner.begin({prompt.tokens, size(s.layers), prompt.visual}).status);
  Graph graph(*this, &cache,
              prefill_nodes(model_, prompt.tokens, options_.piece) + pruner.nodes() + 64 * schedule.size());
  ggml_tensor* hidden = graph.input(GGML_TYPE_F32, {s.hidden, whole(prompt.tokens)}, prompt.embeddings);
  ggml_tensor* positions = graph.input(GGML_TYPE_I32, {whole(prompt.positions.size())}, prompt.positions);
  std::vector<Graph::Stage> stages;
  std::size_t begin = 0;
  for (const fastv::Config& config : schedule) {
    hidden = graph.layers(begin, config.filtering_layer, hidden, positions);
    begin = config.filtering_layer;
    stages.push_back(graph.prune(pruner, hidden, positions));
  }
  hidden = graph.layers(begin, size(s.layers), hidden, positions);
  ggml_tensor* logits = graph.logits(hidden);
  graph.run(progress);

  Prefill result;
  result.logits = graph.read<float>(logits);
  result.kept.resize(prompt.tokens);
  std::iota(result.kept.begin(), result.kept.end(), fastv::Index{0});
  for (std::size_t i = 0; i < stages.size(); ++i) {
    const Graph::Stage& stage = stages[i];
    if (stage.counts != nullptr) require(pruner.selected(graph.read<float>(stage.counts), i).status);
    std::vector<fastv::Index> left;
    for (const std::int32_t index : graph.read<std::int32_t>(stage.kept))
      left.push_back(result.kept[static_cast<std::size_t>(index)]);
    result.kept = std::move(left);
    result.scores.push_back(stage.scores == nullptr ? std::vector<float>{} : graph.read<float>(stage.scores));
  }
  cache.next_position_ = prompt.next_position;
  result.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  return result;
}

Prefill Engine::prefill_between_graphs(const Prompt& prompt, const std::vector<fastv::Config>& schedule, Cache& cache,
                                       const Progress& progress) const {
  const auto start = Clock::now();
  const Shape& s = model_.shape();
  const auto axes = static_cast<std::size_t>(s.position_axes());
  std::vector<float> hidden = prompt.embeddings;           // [tokens, d]
  std::vector<std::int32_t> positions = prompt.positions;  // [axes, tokens]
  std::vector<fastv::TokenSpan> visual = prompt.visual;
  std::vector<fastv::Index> prompt_positions(prompt.tokens);  // of the tokens that are left
  std::iota(prompt_positions.begin(), prompt_positions.end(), fastv::Index{0});

  Prefill result;
  std::size_t begin = 0;
  for (std::size_t stage = 0; stage <= schedule.size(); ++stage) {
    const std::size_t tokens = prompt_positions.size();
    const std::size_t end = stage < schedule.size() ? schedule[stage].filtering_layer : size(s.layers);
    Graph graph(*this, &cache, prefill_nodes(model_, tokens, options_.piece));
    ggml_tensor* x = graph.input(GGML_TYPE_F32, {s.hidden, whole(tokens)}, hidden);
    ggml_tensor* ids = graph.input(GGML_TYPE_I32, {whole(positions.size())}, positions);
    ggml_tensor* out = graph.layers(begin, end, x, ids);
    const auto share = [&](double of_graph) {
      const auto layers = static_cast<double>(s.layers);
      progress((static_cast<double>(begin) + of_graph * static_cast<double>(end - begin)) / layers);
    };
    const Progress part = progress ? Progress(share) : Progress();
    if (stage == schedule.size()) {
      ggml_tensor* logits = graph.logits(out);
      graph.run(part);
      result.logits = graph.read<float>(logits);
      break;
    }

    // Layers up to K - 1 run, and what they leave comes to the host.
    fastv::Pruner<float> pruner(schedule[stage]);
    fastv::Kept kept;
    if (begin == end) {  // K = 0: nothing has run
      kept = pruner.prune(fastv::NoEvidence{tokens}, visual);
      require(kept.status);
    } else {
      const Graph::Evidence evidence = graph.evidence();
      graph.output(out);
      ggml_tensor* query = graph.output(ggml_cont(graph.context(), evidence.query));
      ggml_tensor* keys = graph.output(ggml_cast(graph.context(), evidence.keys, GGML_TYPE_F32));
      graph.run(part);
      hidden = graph.read<float>(out);
      std::vector<float> query_data = graph.read<float>(query), key_data = graph.read<float>(keys);
      ggml_tensor host_query = *query, host_keys = *keys;  // the same shapes, in host memory
      host_query.data = query_data.data();
      host_keys.data = key_data.data();
      host_query.buffer = host_keys.buffer = nullptr;
      kept = pruner.prune(fastv::query_key(&host_query, &host_keys, s.attention_scale), visual);
      require(kept.status);
    }
    std::vector<float> scores(pruner.scores().empty() ? 0 : tokens);
    std::size_t next = 0;
    for (const fastv::TokenSpan& span : visual)
      for (std::size_t i = 0; i < span.count && !scores.empty(); ++i) scores[span.first + i] = pruner.scores()[next++];
    result.scores.push_back(std::move(scores));
    require(fastv::compact(kept, fastv::rows(hidden.data(), tokens, size(s.hidden))));
    require(fastv::compact(kept, fastv::position_axes(positions.data(), axes, tokens)));
    require(fastv::compact(kept, prompt_positions));
    const auto left = fastv::next_spans(kept, visual, visual);
    require(left.status);
    visual.resize(*left);
    hidden.resize(kept.size() * size(s.hidden));
    positions.resize(axes * kept.size());
    prompt_positions.resize(kept.size());
    begin = end;
  }
  result.kept = prompt_positions;
  cache.next_position_ = prompt.next_position;
  result.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  return result;
}

std::vector<float> Engine::decode(std::int32_t token, Cache& cache) const {
  const Shape& s = model_.shape();
  for (const Cache::Layer& layer : cache.layers_)
    if (layer.length == layer.capacity)
      throw std::length_error("the KV cache is full after " + std::to_string(layer.length) + " tokens: plan for more");
  Graph graph(*this, &cache, size(s.layers) * 48 + 64);
  ggml_tensor* id = graph.input(GGML_TYPE_I32, {1}, std::vector<std::int32_t>{token});
  ggml_tensor* hidden = ggml_get_rows(graph.context(), model_.token_embeddings(), id);
  std::vector<std::int32_t> position(static_cast<std::size_t>(s.position_axes()), cache.next_position_++);
  if (s.m_rope()) position[3] = 0;  // the unused axis
  ggml_tensor* positions = graph.input(GGML_TYPE_I32, {whole(position.size())}, position);
  ggml_tensor* logits = graph.logits(graph.layers(0, size(s.layers), hidden, positions));
  graph.run();
  return graph.read<float>(logits);
}

}  // namespace llava

#include "engine.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <map>
#include <numeric>
#include <stdexcept>
#include <thread>

namespace llava {

namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

void require(const fastv::Status& status) {
  if (!status) throw std::invalid_argument(status.message().c_str());
}

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

const ggml_tensor* root(const ggml_tensor* tensor) {
  while (tensor->view_src != nullptr) tensor = tensor->view_src;
  return tensor;
}

// The view of the cache that attention's keys are: themselves, or, of an F32 cache, what they were rounded from.
const ggml_tensor* in_cache(const ggml_tensor* keys) {
  while (root(keys)->op != GGML_OP_NONE && keys->src[0] != nullptr) keys = keys->src[0];
  return keys;
}

// The layer whose keys a tensor of the cache holds, as libllama names it; -1 for other tensors.
std::int32_t layer_of_keys(const ggml_tensor* tensor) {
  constexpr const char* name = "cache_k_l";
  const char* full = root(tensor)->name;
  if (std::strncmp(full, name, std::strlen(name)) != 0) return -1;
  return static_cast<std::int32_t>(std::strtol(full + std::strlen(name), nullptr, 10));
}

template <class T>
std::vector<T> read_all(const ggml_tensor* tensor) {
  std::vector<T> values(ggml_nbytes(tensor) / sizeof(T));
  ggml_backend_tensor_get(tensor, values.data(), 0, values.size() * sizeof(T));
  return values;
}

// Rows first .. first + count - 1 of [axes, all].
std::vector<llama_pos> axes_slice(const std::vector<llama_pos>& positions, std::size_t axes, std::size_t first,
                                  std::size_t count) {
  const std::size_t all = positions.size() / axes;
  std::vector<llama_pos> slice;
  slice.reserve(axes * count);
  for (std::size_t axis = 0; axis < axes; ++axis)
    slice.insert(slice.end(), positions.begin() + static_cast<std::ptrdiff_t>(axis * all + first),
                 positions.begin() + static_cast<std::ptrdiff_t>(axis * all + first + count));
  return slice;
}

}  // namespace

std::size_t Prompt::tokens() const {
  std::size_t n = 0;
  for (const Piece& piece : pieces) n += piece.count;
  return n;
}

std::vector<fastv::TokenSpan> Prompt::visual() const {
  std::vector<fastv::TokenSpan> spans;
  std::size_t first = 0;
  for (const Piece& piece : pieces) {
    if (!piece.rows.empty()) {
      spans.push_back({first, piece.count, piece.columns});
      spans.back().continues = piece.continues;
    }
    first += piece.count;
  }
  return spans;
}

void Prompt::add_text(std::vector<llama_token> tokens, std::size_t axes) {
  if (tokens.empty()) return;
  Piece piece;
  piece.count = tokens.size();
  piece.tokens = std::move(tokens);
  piece.positions.resize(axes * piece.count);  // the fourth axis stays 0
  for (std::size_t axis = 0; axis < std::min<std::size_t>(axes, 3); ++axis)
    std::iota(piece.positions.begin() + static_cast<std::ptrdiff_t>(axis * piece.count),
              piece.positions.begin() + static_cast<std::ptrdiff_t>((axis + 1) * piece.count), next_position);
  next_position += static_cast<llama_pos>(piece.count);
  pieces.push_back(std::move(piece));
}

// ---- a context, and what is looked at while it runs ---------------------------------------------

class Engine::Half {
 public:
  Half(llama_model* model, const EngineOptions& options, const char* name) : batch_(options.batch) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<std::uint32_t>(options.context);
    params.n_batch = static_cast<std::uint32_t>(options.batch);
    params.n_ubatch = static_cast<std::uint32_t>(std::min(options.micro_batch, options.batch));
    params.n_seq_max = static_cast<std::uint32_t>(options.sequences);
    params.n_threads = params.n_threads_batch =
        options.threads > 0 ? options.threads : static_cast<std::int32_t>(std::thread::hardware_concurrency());
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;  // the node that is looked at
    params.type_k = options.key_type;
    params.type_v = options.value_type;
    params.kv_unified = true;  // tokens go through the layers in the order of the batch
    params.swa_full = false;
    params.no_perf = true;
    params.cb_eval = [](ggml_tensor* node, bool ask, void* self) {
      return static_cast<Half*>(self)->on_node(node, ask);
    };
    params.cb_eval_user_data = this;
    context_.reset(llama_init_from_model(model, params));
    if (!context_)
      throw std::runtime_error("libllama makes no context of " + std::to_string(options.context) + " tokens for the " +
                               name + ": use a smaller -c, or F16 for the types of the cache");
  }
  virtual ~Half() = default;

  llama_context* context() const { return context_.get(); }
  llama_memory_t memory() const { return llama_get_memory(context_.get()); }
  std::size_t batch() const { return batch_; }

 protected:
  // tokens or rows; positions [axes, count]; sequences [count]; wanted [count]: whose logits. Throws.
  void run(const std::vector<llama_token>& tokens, const float* rows, std::vector<llama_pos> positions,
           std::vector<llama_seq_id> sequences, std::vector<std::int8_t> wanted) {
    const std::size_t count = sequences.size();
    std::vector<std::int32_t> ones(count, 1);
    std::vector<llama_seq_id*> ids(count);
    for (std::size_t i = 0; i < count; ++i) ids[i] = &sequences[i];
    // libllama reads them only.
    const llama_batch batch{static_cast<std::int32_t>(count),
                            rows == nullptr ? const_cast<llama_token*>(tokens.data()) : nullptr,
                            const_cast<float*>(rows),
                            positions.data(),
                            ones.data(),
                            ids.data(),
                            wanted.data()};
    error_ = nullptr;
    first_node_.clear();
    const std::int32_t status = llama_decode(context_.get(), batch);
    if (error_) std::rethrow_exception(error_);
    if (status == 1) throw std::length_error("the context is full: raise -c, or use shorter prompts");
    if (status != 0) throw std::runtime_error("llama_decode returns " + std::to_string(status));
  }

  // A micro-batch begins: its first node is about to be looked at.
  virtual void begin() = 0;
  // As ggml_backend_sched_eval_callback. Asked for every node ahead of a run of them; then told of those it wanted.
  virtual bool look(ggml_tensor* node, bool ask) = 0;

 private:
  bool on_node(ggml_tensor* node, bool ask) {
    if (error_) return !ask;
    try {
      if (ask && (first_node_.empty() || first_node_ == node->name)) {
        first_node_ = node->name;
        begin();
      }
      return look(node, ask);
    } catch (...) {  // not through libllama's frames
      error_ = std::current_exception();
      return !ask;
    }
  }

  struct ContextDeleter {
    void operator()(llama_context* context) const { llama_free(context); }
  };
  std::unique_ptr<llama_context, ContextDeleter> context_;
  std::size_t batch_;
  std::exception_ptr error_;
  std::string first_node_;
};

// Layers below K: leaves hidden rows, and the evidence of layer K-1.
class Engine::Head : public Half {
 public:
  Head(const Halves& halves, const EngineOptions& options)
      : Half(halves.head(), options, "layers below K"),
        layers_(halves.facts()),
        layer_(static_cast<std::int32_t>(halves.filtering_layer()) - 1),
        last_node_(layers_.rows_of(halves.filtering_layer() - 1)),
        every_layer_(options.every_layer) {}

  // Tokens or rows of one call. last: their last token is the one that ranks.
  void run(const std::vector<llama_token>& tokens, const float* rows, std::vector<llama_pos> positions,
           std::vector<llama_seq_id> sequences, bool last) {
    done_ = 0;
    ranks_at_ = last ? sequences.size() : 0;
    const std::size_t count = sequences.size(), before = hidden.size();
    Half::run(tokens, rows, std::move(positions), std::move(sequences), std::vector<std::int8_t>(count, 0));
    if (hidden.size() == before || cells.size() < count)
      throw std::runtime_error("libllama ran the layers below K without " + last_node_ +
                               ": this architecture is built otherwise than those that were tried");
  }

  std::vector<float> hidden;        // of all calls since it was cleared
  std::vector<std::int64_t> cells;  // of layer K-1's cache, the same

  // The attention that the last token pays to `visual` in a layer; its keys lie in cells_of_sequence, of which the first
  // `past` are earlier turns'.
  std::vector<float> scores(std::int32_t layer, fastv::Span<const fastv::TokenSpan> visual,
                            const std::vector<std::int64_t>& cells_of_sequence, std::size_t past) const {
    const auto found = evidence_.find(layer);
    if (found == evidence_.end()) throw std::runtime_error("layer K-1 has no flash attention to be looked at");
    const Evidence& e = found->second;
    const std::size_t head_dim = size(e.keys.ne[0]), kv_heads = size(e.keys.ne[2]);
    // On a device, keys come to the host once; it has as many bytes as the cells in use.
    std::vector<char> copy;
    const auto* data = static_cast<const char*>(e.keys.data);
    if (!ggml_backend_buffer_is_host(root(&e.keys)->buffer)) {
      copy.resize(size(e.keys.ne[1]) * e.keys.nb[1]);
      const std::size_t offset = e.keys.view_offs;
      ggml_backend_tensor_get(root(&e.keys), copy.data(), offset,
                              std::min(copy.size(), ggml_nbytes(root(&e.keys)) - offset));
      data = copy.data();
    }
    const auto to_float = ggml_get_type_traits(e.keys.type)->to_float;
    const auto load = [&](std::size_t kv_head, std::size_t token, float* out) noexcept {
      const char* key = data + size(cells_of_sequence[token]) * e.keys.nb[1] + kv_head * e.keys.nb[2];
      if (e.keys.type == GGML_TYPE_F32)
        std::memcpy(out, key, head_dim * sizeof(float));
      else
        to_float(key, out, e.keys.ne[0]);
    };
    auto evidence = fastv::query_key(fastv::heads(e.query.data(), fastv::TokenMajor{1, e.heads, head_dim}),
                                     fastv::loaded_keys(kv_heads, cells_of_sequence.size(), head_dim, load), e.scale);
    evidence.soft_cap = e.soft_cap;
    evidence.sinks = e.sinks;
    evidence.alibi = e.alibi;
    evidence.past = past;
    require(evidence.check());
    std::vector<float> scratch(evidence.scratch_floats());
    fastv::Scoring scoring{visual, {}, scratch};
    scoring.queries.tokens = evidence.prompt_tokens();
    std::vector<float> of_visual(fastv::visual_tokens(visual)), all(evidence.prompt_tokens());
    require(evidence.score(scoring, fastv::Span<float>(of_visual), fastv::Serial{}));
    fastv::for_each_visual(visual, [&](std::size_t number, std::size_t token) { all[token] = of_visual[number]; });
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
    const std::size_t rows = size(node->ne[1] * node->ne[2]), before = hidden.size();
    hidden.resize(before + size(ggml_nelements(node)));
    ggml_backend_tensor_get(node, hidden.data() + before, 0, ggml_nbytes(node));
    done_ += rows;
    return false;  // nothing behind it runs
  }

  struct Evidence {
    std::vector<float> query, sinks, alibi;  // [H, c]; [H] or empty
    ggml_tensor keys;                        // [c, cells, G], in the cache
    std::size_t heads;
    float scale, soft_cap;
  };
  static void take_evidence(Evidence& e, const ggml_tensor* attention) {
    const ggml_tensor* q = attention->src[0];  // [c, tokens, H]
    e.keys = *in_cache(attention->src[1]);
    e.heads = size(q->ne[2]);
    const std::size_t head_dim = size(q->ne[0]);
    e.query.resize(e.heads * head_dim);
    for (std::size_t h = 0; h < e.heads; ++h)
      ggml_backend_tensor_get(q, e.query.data() + h * head_dim, h * q->nb[2] + size(q->ne[1] - 1) * q->nb[1],
                              head_dim * sizeof(float));
    float max_bias = 0;
    std::memcpy(&e.scale, attention->op_params, sizeof(float));
    std::memcpy(&max_bias, attention->op_params + 1, sizeof(float));
    std::memcpy(&e.soft_cap, attention->op_params + 2, sizeof(float));
    e.sinks = attention->src[4] == nullptr ? std::vector<float>{} : read_all<float>(attention->src[4]);
    e.alibi.clear();
    if (max_bias <= 0) return;
    // As ggml spreads slopes over heads (Press et al. 2022, and their rule where the heads are no power of 2).
    const auto whole = static_cast<std::size_t>(std::exp2(std::floor(std::log2(static_cast<double>(e.heads)))));
    for (std::size_t h = 0; h < e.heads; ++h) {
      const double step = h < whole ? static_cast<double>(h + 1) : static_cast<double>(2 * (h - whole) + 1) / 2;
      e.alibi.push_back(
          static_cast<float>(std::exp2(-static_cast<double>(max_bias) / static_cast<double>(whole) * step)));
    }
  }

  const Layers& layers_;
  std::int32_t layer_;
  std::string last_node_;
  bool every_layer_;
  std::size_t done_ = 0, ranks_at_ = 0;
  std::map<std::int32_t, Evidence> evidence_;  // by layer
};

// Layers from K on, on the tokens that are kept. libllama refuses gaps between positions, so it is told 0, 1, 2, ...
// and what it makes of them is written over before anything runs: RoPE turns by the true positions, and windows and
// ALiBi count from them.
class Engine::Tail : public Half {
 public:
  Tail(const Halves& halves, const EngineOptions& options)
      : Half(halves.tail(), options, "layers from K on"), halves_(halves), window_(llama_model_n_swa(halves.tail())) {}

  // positions: true ones, of the first axis; told: as libllama is told them.
  void run(const float* rows, const std::vector<llama_pos>& positions, std::vector<llama_pos> told,
           std::vector<llama_seq_id> sequences, std::vector<std::int8_t> wanted, const Progress& progress, double from,
           double to) {
    positions_ = &positions;
    rows_ = rows;
    done_ = count_ = 0;
    progress_ = progress ? Progress([&](double share) { progress(from + (to - from) * share); }) : Progress();
    Half::run({}, rows, std::move(told), std::move(sequences), std::move(wanted));
    progress_ = {};
  }

 private:
  void begin() override {
    done_ += count_;
    count_ = 0;
    written_.clear();
    layers_done_ = 0;
  }

  bool look(ggml_tensor* node, bool ask) override {
    if (is_input(node->name)) {
      // In place of what was made of the rows: scaled, normed or given positions a second time.
      if (!ask) ggml_backend_tensor_set(node, rows_ + done_ * halves_.hidden(), 0, ggml_nbytes(node));
      return true;
    }
    if (!ask) {
      const double rows = static_cast<double>(positions_->size());
      progress_((static_cast<double>(done_) + static_cast<double>(count_) * static_cast<double>(++layers_done_) /
                                                  static_cast<double>(halves_.layers() - halves_.filtering_layer())) /
                rows);
      return true;
    }
    if (node->op == GGML_OP_SET_ROWS) {
      const std::int32_t layer = layer_of_keys(node);
      if (layer < 0) return false;
      count_ = size(node->src[1]->ne[0]);
      if (const bool windowed = is_windowed(layer); first_time(node->src[1])) {
        const auto cells = read_all<std::int64_t>(node->src[1]);
        std::vector<llama_pos>& known = in_cell_[windowed ? 1 : 0];
        for (std::size_t i = 0; i < cells.size(); ++i) {
          if (known.size() <= size(cells[i])) known.resize(size(cells[i]) + 1, 0);
          known[size(cells[i])] = positions_->at(done_ + i);
        }
      }
    } else if (node->op == GGML_OP_ROPE && halves_.position_axes() == 1) {
      ggml_tensor* ids = node->src[1];
      if (ids->type != GGML_TYPE_I32 || root(ids)->op != GGML_OP_NONE) return false;  // no positions of tokens
      count_ = size(ids->ne[0]);
      if (first_time(ids)) ggml_backend_tensor_set(ids, positions_->data() + done_, 0, count_ * sizeof(llama_pos));
    } else if (node->op == GGML_OP_FLASH_ATTN_EXT) {
      correct_mask(node);
    } else if (progress_ && is_rows(node->name)) {
      return true;
    }
    return false;
  }

  bool is_input(const char* name) const { return !halves_.facts().input.empty() && halves_.facts().input == name; }
  bool is_rows(const char* name) const {
    const std::string& rows = halves_.facts().rows;
    return std::strncmp(name, rows.c_str(), rows.size()) == 0 && name[rows.size()] == '-';
  }
  bool is_windowed(std::int32_t layer) const {
    const std::size_t i = halves_.filtering_layer() + size(layer);
    return i < halves_.layers() && halves_.facts().all[i].windowed;
  }
  // Layers share what they read: each of it is written once in a micro-batch.
  bool first_time(const ggml_tensor* input) {
    if (std::find(written_.begin(), written_.end(), input) != written_.end()) return false;
    written_.push_back(input);
    return true;
  }

  template <class T, class Seen, class Hidden>
  void correct(ggml_tensor* mask, bool windowed, bool slopes, const Seen& to_seen, const Hidden& is_hidden) {
    std::vector<T> values = read_all<T>(mask);
    const std::vector<llama_pos>& known = in_cell_[windowed ? 1 : 0];
    const std::size_t cells = size(mask->ne[0]);
    const T hidden = to_seen(-INFINITY);
    for (std::size_t row = 0; row < count_; ++row)
      for (std::size_t cell = 0; cell < std::min(cells, known.size()); ++cell) {
        T& value = values[row * cells + cell];
        if (is_hidden(value)) continue;
        const llama_pos at = positions_->at(done_ + row), key = known[cell];
        if (windowed && out_of_window(key, at))
          value = hidden;
        else if (slopes)
          value = to_seen(-std::abs(static_cast<float>(at - key)));
      }
    ggml_backend_tensor_set(mask, values.data(), 0, values.size() * sizeof(T));
  }
  void correct_mask(const ggml_tensor* attention) {
    const std::int32_t layer = layer_of_keys(in_cache(attention->src[1]));
    float max_bias = 0;
    std::memcpy(&max_bias, attention->op_params + 1, sizeof(float));
    const bool windowed = layer >= 0 && is_windowed(layer), slopes = max_bias > 0;
    ggml_tensor* mask = attention->src[3];
    if (mask == nullptr || !(windowed || slopes) || !first_time(mask)) return;
    count_ = size(attention->src[0]->ne[1]);
    if (mask->type == GGML_TYPE_F16)
      correct<ggml_fp16_t>(mask, windowed, slopes, ggml_fp32_to_fp16,
                           [](ggml_fp16_t value) { return std::isinf(ggml_fp16_to_fp32(value)); });
    else
      correct<float>(
          mask, windowed, slopes, [](float value) { return value; }, [](float value) { return std::isinf(value); });
  }
  bool out_of_window(llama_pos key, llama_pos at) const {
    return halves_.facts().chunked ? key < at / window_ * window_ : at - key >= window_;
  }

  const Halves& halves_;
  std::int32_t window_;
  const float* rows_ = nullptr;                        // of the tokens of this call
  const std::vector<llama_pos>* positions_ = nullptr;  // of them
  std::size_t done_ = 0, count_ = 0;                   // tokens of micro-batches before, and of this one
  std::vector<const ggml_tensor*> written_;
  std::vector<llama_pos> in_cell_[2];  // true positions, by the cell of the cache; [1]: of layers with windows
  Progress progress_;
  std::size_t layers_done_ = 0;
};

// ---- the engine ---------------------------------------------------------------------------------

Engine::Engine(const Halves& halves, const EngineOptions& options)
    : halves_(halves),
      options_(options),
      sequences_(options.sequences),
      head_(std::make_unique<Head>(halves, options)),
      tail_(std::make_unique<Tail>(halves, options)) {}
Engine::~Engine() = default;

Engine::Sequence& Engine::at(std::size_t sequence) {
  if (sequence >= sequences_.size())
    throw std::out_of_range("there is no sequence " + std::to_string(sequence) + " among " +
                            std::to_string(sequences_.size()) + ": ask for more in EngineOptions");
  return sequences_[sequence];
}

fastv::Plan Engine::plan(const Prompt& prompt, const fastv::Config* config) const {
  const std::vector<fastv::TokenSpan> visual = prompt.visual();
  const fastv::Span<const fastv::Config> schedule(config, config == nullptr ? 0 : 1);
  const auto plan = fastv::make_plan(schedule, {prompt.tokens(), halves_.layers(), visual});
  require(plan.status);
  if (config != nullptr && config->filtering_layer != halves_.filtering_layer())
    throw std::invalid_argument("the filtering layer is " + std::to_string(config->filtering_layer) +
                                " but the model was cut at " + std::to_string(halves_.filtering_layer()) +
                                ": load it anew for another");
  return *plan;
}

Reading Engine::read(std::size_t sequence, const Prompt& prompt, const Progress& progress) {
  const auto start = Clock::now();
  Sequence& state = at(sequence);
  const std::size_t axes = halves_.position_axes(), total = prompt.tokens();
  Reading reading;
  reading.visual = prompt.visual();
  reading.tokens = total;
  reading.next_position = prompt.next_position;
  if (total == 0) throw std::invalid_argument("the prompt is empty: hand over at least one token");
  head_->hidden.clear();
  head_->cells.clear();
  std::size_t done = 0;
  for (const Piece& piece : prompt.pieces) {
    if (!piece.causal && piece.count > std::min(options_.micro_batch, options_.batch))
      throw std::invalid_argument("a picture has " + std::to_string(piece.count) +
                                  " tokens that see each other, which must go through the layers at once: use -ub " +
                                  std::to_string(piece.count) + " and -b not below it");
    llama_set_causal_attn(head_->context(), piece.causal);
    for (std::size_t first = 0; first < piece.count; first += head_->batch()) {
      const std::size_t count = std::min(head_->batch(), piece.count - first);
      const bool text = piece.rows.empty();
      // Tokens of text have one position each: libllama makes M-RoPE's of it.
      std::vector<llama_pos> positions = axes_slice(piece.positions, axes, first, count);
      if (text) positions.resize(count);
      std::vector<llama_token> tokens;
      if (text)
        tokens.assign(piece.tokens.begin() + static_cast<std::ptrdiff_t>(first),
                      piece.tokens.begin() + static_cast<std::ptrdiff_t>(first + count));
      head_->run(tokens, text ? nullptr : piece.rows.data() + first * halves_.input(), std::move(positions),
                 std::vector<llama_seq_id>(count, static_cast<llama_seq_id>(sequence)), done + count == total);
      done += count;
      if (progress) progress(static_cast<double>(done) / static_cast<double>(total));
    }
    Piece outline;
    outline.count = piece.count;
    outline.columns = piece.columns;
    outline.causal = piece.causal;
    reading.pieces.push_back(std::move(outline));
  }
  llama_set_causal_attn(head_->context(), true);
  for (std::size_t axis = 0; axis < axes; ++axis)
    for (const Piece& piece : prompt.pieces)
      reading.positions.insert(reading.positions.end(),
                               piece.positions.begin() + static_cast<std::ptrdiff_t>(axis * piece.count),
                               piece.positions.begin() + static_cast<std::ptrdiff_t>((axis + 1) * piece.count));
  reading.rows = std::move(head_->hidden);
  head_->hidden = {};
  state.cells.insert(state.cells.end(), head_->cells.begin(), head_->cells.end());
  const auto k = static_cast<std::int32_t>(halves_.filtering_layer());
  if (!reading.visual.empty()) reading.scores = head_->scores(k - 1, reading.visual, state.cells, state.head);
  for (std::int32_t layer = 0; options_.every_layer && !reading.visual.empty() && layer < k; ++layer) {
    const std::vector<float> scores =
        head_->saw(layer) ? head_->scores(layer, reading.visual, state.cells, state.head) : std::vector<float>{NAN};
    reading.attention.push_back(std::accumulate(scores.begin(), scores.end(), 0.0));
  }
  state.head += total;
  state.next_position = prompt.next_position;
  reading.seconds = seconds_since(start);
  return reading;
}

std::vector<fastv::Index> Engine::select(const Reading& reading, const fastv::Config* config) const {
  std::vector<fastv::Index> kept(reading.tokens);
  std::iota(kept.begin(), kept.end(), fastv::Index{0});
  if (config == nullptr || reading.visual.empty()) return kept;
  std::vector<float> scores;
  for (const fastv::TokenSpan& span : reading.visual)
    scores.insert(scores.end(), reading.scores.begin() + static_cast<std::ptrdiff_t>(span.first),
                  reading.scores.begin() + static_cast<std::ptrdiff_t>(span.first + span.count));
  fastv::Pruner<float> pruner(*config);
  const fastv::Kept chosen = pruner.prune(fastv::Scores<float>{scores, reading.tokens}, reading.visual);
  require(chosen.status);
  kept.assign(chosen.begin(), chosen.end());
  return kept;
}

void Engine::finish(std::size_t sequence, const Reading& reading, const std::vector<fastv::Index>& kept,
                    const Progress& progress) {
  Sequence& state = at(sequence);
  const std::size_t axes = halves_.position_axes(), d = halves_.hidden(), n = reading.tokens;
  const bool whole = kept.size() == n;
  std::size_t done = 0, end = 0;
  for (std::size_t p = 0; p < reading.pieces.size(); ++p) {
    // What is kept of this piece; where something was dropped, of those that follow too, if all of them are causal.
    const bool causal = reading.pieces[p].causal;
    end += reading.pieces[p].count;
    while (!whole && causal && p + 1 < reading.pieces.size() && reading.pieces[p + 1].causal)
      end += reading.pieces[++p].count;
    const std::size_t last = static_cast<std::size_t>(
        std::lower_bound(kept.begin() + static_cast<std::ptrdiff_t>(done), kept.end(), end) - kept.begin());
    llama_set_causal_attn(tail_->context(), causal);
    while (done < last) {
      const std::size_t count = std::min(tail_->batch(), last - done);
      std::vector<float> rows(count * d);
      std::vector<llama_pos> positions(count), told(axes * count);
      for (std::size_t i = 0; i < count; ++i) {
        const std::size_t token = kept[done + i];
        std::copy_n(reading.rows.begin() + static_cast<std::ptrdiff_t>(token * d), d,
                    rows.begin() + static_cast<std::ptrdiff_t>(i * d));
        positions[i] = reading.positions[token];
        for (std::size_t axis = 0; axis < axes; ++axis)
          told[axis * count + i] =
              axes == 1 ? static_cast<llama_pos>(state.tail + i) : reading.positions[axis * n + token];
      }
      std::vector<std::int8_t> wanted(count, 0);
      wanted.back() = done + count == kept.size() ? 1 : 0;
      const double all = static_cast<double>(kept.size());
      tail_->run(rows.data(), positions, std::move(told),
                 std::vector<llama_seq_id>(count, static_cast<llama_seq_id>(sequence)), std::move(wanted), progress,
                 static_cast<double>(done) / all, static_cast<double>(done + count) / all);
      first_row_ = count - 1;
      state.tail += count;
      done += count;
    }
  }
  llama_set_causal_attn(tail_->context(), true);
}

Prefill Engine::prefill(std::size_t sequence, const Prompt& prompt, const fastv::Config* config,
                        const Progress& progress) {
  const auto start = Clock::now();
  static_cast<void>(plan(prompt, config));
  const double cut = static_cast<double>(halves_.filtering_layer()) / static_cast<double>(halves_.layers());
  const Reading reading =
      read(sequence, prompt, progress ? Progress([&](double share) { progress(cut * share); }) : Progress());
  Prefill prefill;
  prefill.kept = select(reading, config);
  finish(sequence, reading, prefill.kept,
         progress ? Progress([&](double share) { progress(cut + (1 - cut) * share); }) : Progress());
  llama_synchronize(tail_->context());
  prefill.scores = reading.scores;
  prefill.seconds = seconds_since(start);
  return prefill;
}

std::vector<float> Engine::advance(const std::vector<Next>& tokens) {
  std::vector<llama_token> ids;
  std::vector<llama_pos> positions;
  std::vector<llama_seq_id> sequences;
  for (const Next& next : tokens) {
    ids.push_back(next.token);
    positions.push_back(at(next.sequence).next_position);
    sequences.push_back(static_cast<llama_seq_id>(next.sequence));
  }
  head_->hidden.clear();
  head_->cells.clear();
  head_->run(ids, nullptr, positions, sequences, false);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    Sequence& state = at(tokens[i].sequence);
    state.cells.push_back(head_->cells[i]);
    ++state.head;
    ++state.next_position;
  }
  return std::move(head_->hidden);
}

void Engine::run_tail(const std::vector<float>& rows, const std::vector<std::size_t>& sequences,
                      const std::vector<llama_pos>& positions) {
  const std::size_t axes = halves_.position_axes(), count = positions.size();
  std::vector<llama_pos> told(axes * count);  // rows, unlike tokens, have all their axes told; the fourth is 0
  std::vector<llama_seq_id> ids;
  for (std::size_t i = 0; i < count; ++i) {
    Sequence& state = at(sequences[i]);
    for (std::size_t axis = 0; axis < std::min<std::size_t>(axes, 3); ++axis)
      told[axis * count + i] = axes == 1 ? static_cast<llama_pos>(state.tail) : positions[i];
    ids.push_back(static_cast<llama_seq_id>(sequences[i]));
    ++state.tail;
  }
  tail_->run(rows.data(), positions, std::move(told), std::move(ids), std::vector<std::int8_t>(count, 1), {}, 0, 1);
  first_row_ = 0;
}

void Engine::conclude(std::size_t sequence, const std::vector<float>& rows, llama_pos first) {
  std::vector<llama_pos> positions(rows.size() / halves_.hidden());
  std::iota(positions.begin(), positions.end(), first);
  run_tail(rows, std::vector<std::size_t>(positions.size(), sequence), positions);
}

void Engine::decode(const std::vector<Next>& tokens) {
  if (tokens.empty()) return;
  std::vector<std::size_t> sequences;
  std::vector<llama_pos> positions;
  for (const Next& next : tokens) {
    sequences.push_back(next.sequence);
    positions.push_back(at(next.sequence).next_position);
  }
  run_tail(advance(tokens), sequences, positions);
}

bool Engine::take_back(std::size_t sequence, std::size_t tokens) {
  Sequence& state = at(sequence);
  if (tokens == 0) return true;
  const auto back = static_cast<llama_pos>(tokens);
  if (halves_.recurrent() ||
      !llama_memory_seq_rm(head_->memory(), static_cast<llama_seq_id>(sequence), state.next_position - back, -1))
    return false;
  state.next_position -= back;
  state.head -= tokens;
  state.cells.resize(state.cells.size() - tokens);
  return true;
}

const float* Engine::logits(std::size_t row) const {
  const float* logits = llama_get_logits_ith(tail_->context(), static_cast<std::int32_t>(first_row_ + row));
  if (logits == nullptr) throw std::out_of_range("there are no logits of row " + std::to_string(row));
  return logits;
}
llama_context* Engine::tail() const { return tail_->context(); }

std::size_t Engine::length(std::size_t sequence, std::size_t layer) const {
  const Sequence& state = sequences_.at(sequence);
  return layer < halves_.filtering_layer() ? state.head : state.tail;
}

std::size_t Engine::cache_bytes(std::size_t sequence) const {
  const fastv::ModelShape shape = halves_.cost_shape();
  const auto width = static_cast<std::int64_t>(shape.kv_heads * shape.head_dim);
  const std::size_t row = ggml_row_size(options_.key_type, width) + ggml_row_size(options_.value_type, width);
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < halves_.layers(); ++i)
    if (halves_.facts().all[i].attends) bytes += row * length(sequence, i);
  return bytes;
}

void Engine::forget(std::size_t sequence) {
  forget_tail(sequence);
  llama_memory_seq_rm(head_->memory(), static_cast<llama_seq_id>(sequence), -1, -1);
  at(sequence) = {};
}
void Engine::forget_tail(std::size_t sequence) {
  llama_memory_seq_rm(tail_->memory(), static_cast<llama_seq_id>(sequence), -1, -1);
  at(sequence).tail = 0;
}

}  // namespace llava

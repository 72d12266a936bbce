#include "engine.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "head.hpp"
#include "rules.hpp"
#include "tail.hpp"

namespace llava {

namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

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

std::vector<float> weighted_scores(const Reading& reading, const std::vector<float>& weights) {
  const std::size_t count = fastv::visual_tokens(reading.visual);
  std::vector<float> scores(reading.tokens);
  fastv::for_each_visual(reading.visual, [&](std::size_t number, std::size_t token) {
    for (std::size_t h = 0; h < weights.size(); ++h) scores[token] += weights[h] * reading.by_head[h * count + number];
  });
  return scores;
}

Engine::Engine(const Halves& halves, const EngineOptions& options)
    : halves_(halves), options_(options), sequences_(options.sequences) {
  if (options_.context == 0) options_.context = static_cast<std::size_t>(llama_model_n_ctx_train(halves.head()));
  const std::size_t heads = halves.cost_shape().heads, weights = options_.head_weights.size();
  if (weights != 0 && (weights != heads || !halves.has_head()))
    throw std::invalid_argument(std::to_string(weights) + " head weights were given, but " +
                                (halves.has_head() ? "layer " + std::to_string(halves.filtering_layer() - 1) + " has " +
                                                         std::to_string(heads) + " heads"
                                                   : "at K = 0 no heads have ranked anything") +
                                ": calibrate them for this model and K");
  options_.by_head |= weights != 0;
  if (halves.has_head()) head_ = std::make_unique<Head>(halves, options_, devices_);
  tail_ = std::make_unique<Tail>(halves, options_);
  options_.batch = tail_->batch();
}
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
  if (!head_ && config != nullptr && !visual.empty() && fastv::uses_scores(*config))
    throw std::invalid_argument(
        "at K = 0 no layer has run whose attention could rank tokens: use a rule that looks at none (" + rules_ahead() +
        ")");
  return *plan;
}

void Engine::expect_together(std::size_t tokens) const {
  if (tokens > std::min(options_.micro_batch, options_.batch))
    throw std::invalid_argument("a picture has " + std::to_string(tokens) +
                                " tokens that see each other, which must go through the layers at once: use -ub " +
                                std::to_string(tokens) + " and -b not below it");
}

void Engine::run_head(Sequence& state, llama_seq_id sequence, const Prompt& prompt, Reading& reading,
                      const Progress& progress) {
  const std::size_t axes = halves_.position_axes(), total = reading.tokens;
  head_->hidden.clear();
  head_->hidden.reserve(total);
  head_->cells.clear();
  std::size_t done = 0;
  for (const Piece& piece : prompt.pieces) {
    if (!piece.causal) expect_together(piece.count);
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
                 std::vector<llama_seq_id>(count, sequence), done + count == total);
      done += count;
      if (progress) progress(static_cast<double>(done) / static_cast<double>(total));
    }
  }
  llama_set_causal_attn(head_->context(), true);
  reading.rows = std::move(head_->hidden);
  head_->hidden = {};
  state.cells.insert(state.cells.end(), head_->cells.begin(), head_->cells.end());
  if (!reading.visual.empty()) {
    const auto k = static_cast<std::int32_t>(halves_.filtering_layer());
    const Head::Keys keys{state.cells, state.head};
    reading.scores = head_->scores(k - 1, reading.visual, keys);
    if (options_.by_head) reading.by_head = head_->scores_by_head(reading.visual, keys);
    if (!options_.head_weights.empty()) reading.scores = weighted_scores(reading, options_.head_weights);
    if (options_.features) reading.features = head_->keys_of(reading.visual, keys);
    for (std::int32_t layer = 0; options_.every_layer && layer < k; ++layer) {
      const std::vector<float> scores =
          head_->saw(layer) ? head_->scores(layer, reading.visual, keys) : std::vector<float>{NAN};
      reading.attention.push_back(std::accumulate(scores.begin(), scores.end(), 0.0));
    }
  }
  state.head += total;
}

Reading Engine::read(std::size_t sequence, const Prompt& prompt, const Progress& progress) {
  const auto start = Clock::now();
  Sequence& state = at(sequence);
  Reading reading;
  reading.visual = prompt.visual();
  reading.tokens = prompt.tokens();
  reading.next_position = prompt.next_position;
  if (reading.tokens == 0) throw std::invalid_argument("the prompt is empty: hand over at least one token");
  expect_position(prompt.next_position);
  for (std::size_t axis = 0; axis < halves_.position_axes(); ++axis)
    for (const Piece& piece : prompt.pieces)
      reading.positions.insert(reading.positions.end(),
                               piece.positions.begin() + static_cast<std::ptrdiff_t>(axis * piece.count),
                               piece.positions.begin() + static_cast<std::ptrdiff_t>((axis + 1) * piece.count));
  if (head_) {
    for (const Piece& piece : prompt.pieces) {
      Piece outline;
      outline.count = piece.count;
      outline.columns = piece.columns;
      outline.causal = piece.causal;
      reading.pieces.push_back(std::move(outline));
    }
    run_head(state, static_cast<llama_seq_id>(sequence), prompt, reading, progress);
  } else {
    reading.pieces = prompt.pieces;
    // Behind the first d of a token's floats lie those that further layers add (DeepStack).
    for (const Piece& piece : prompt.pieces)
      for (std::size_t i = 0; options_.features && !piece.rows.empty() && i < piece.count; ++i) {
        const float* row = piece.rows.data() + i * halves_.input();
        reading.features.insert(reading.features.end(), row, row + halves_.hidden());
      }
  }
  state.next_position = prompt.next_position;
  reading.seconds = seconds_since(start);
  return reading;
}

std::vector<fastv::Index> Engine::select(const Reading& reading, const fastv::Config* config) const {
  std::vector<fastv::Index> kept(reading.tokens);
  std::iota(kept.begin(), kept.end(), fastv::Index{0});
  if (config == nullptr || reading.visual.empty()) return kept;
  fastv::Pruner<float> pruner(*config);
  const auto prune_by = [&](const auto& evidence) {
    if (config->selection != fastv::Selection::diverse) return pruner.prune(evidence, reading.visual);
    if (reading.features.empty())
      throw std::invalid_argument("Selection::diverse compares features: ask for them in EngineOptions");
    const std::size_t width = reading.features.size() / fastv::visual_tokens(reading.visual);
    std::vector<const float*> of_token(reading.tokens);
    fastv::for_each_visual(reading.visual, [&](std::size_t number, std::size_t token) {
      of_token[token] = reading.features.data() + number * width;
    });
    const auto load = [&](std::size_t, std::size_t token, float* out) noexcept {
      std::copy_n(of_token[token], width, out);
    };
    return pruner.prune(fastv::with_features(evidence, fastv::loaded_keys(1, reading.tokens, width, load)),
                        reading.visual);
  };
  fastv::Kept chosen;
  if (fastv::uses_scores(*config)) {
    std::vector<float> scores;
    fastv::for_each_visual(reading.visual,
                           [&](std::size_t, std::size_t token) { scores.push_back(reading.scores[token]); });
    chosen = prune_by(fastv::Scores<float>{scores, reading.tokens});
  } else {
    chosen = prune_by(fastv::NoEvidence{reading.tokens});
  }
  require(chosen.status);
  kept.assign(chosen.begin(), chosen.end());
  return kept;
}

void Engine::finish(std::size_t sequence, const Reading& reading, const std::vector<fastv::Index>& kept,
                    const Progress& progress) {
  Sequence& state = at(sequence);
  const std::size_t axes = halves_.position_axes(), n = reading.tokens;
  const bool whole = kept.size() == n;
  const Rows picked = whole || !head_ ? Rows() : reading.rows.pick(kept, devices_);
  std::size_t done = 0, begin = 0, end = 0;
  for (std::size_t p = 0; p < reading.pieces.size(); ++p) {
    // What is kept of this piece; where something was dropped, of those that follow too, if all of them are causal rows.
    const Piece& piece = reading.pieces[p];
    begin = end;
    end += piece.count;
    while (head_ && !whole && piece.causal && p + 1 < reading.pieces.size() && reading.pieces[p + 1].causal)
      end += reading.pieces[++p].count;
    const std::size_t last = static_cast<std::size_t>(
        std::lower_bound(kept.begin() + static_cast<std::ptrdiff_t>(done), kept.end(), end) - kept.begin());
    if (!head_ && !piece.causal) expect_together(last - done);
    llama_set_causal_attn(tail_->context(), piece.causal);
    while (done < last) {
      const std::size_t count = std::min(tail_->batch(), last - done);
      Tail::Input input;
      std::vector<float> embeddings;
      if (head_) {
        input.rows = whole ? &reading.rows : &picked;
        input.first = done;
      } else if (piece.rows.empty()) {
        for (std::size_t i = 0; i < count; ++i) input.tokens.push_back(piece.tokens[kept[done + i] - begin]);
      } else {
        for (std::size_t i = 0; i < count; ++i) {
          const float* row = piece.rows.data() + (kept[done + i] - begin) * halves_.input();
          embeddings.insert(embeddings.end(), row, row + halves_.input());
        }
        input.embeddings = embeddings.data();
      }
      const std::size_t told_axes = input.tokens.empty() ? axes : 1;  // of text, libllama makes M-RoPE's of the one
      std::vector<llama_pos> positions(count), told(told_axes * count);
      for (std::size_t i = 0; i < count; ++i) {
        const std::size_t token = kept[done + i];
        positions[i] = reading.positions[token];
        for (std::size_t axis = 0; axis < told_axes; ++axis)
          told[axis * count + i] =
              axes == 1 ? static_cast<llama_pos>(state.tail + i) : reading.positions[axis * n + token];
      }
      std::vector<std::int8_t> wanted(count, 0);
      wanted.back() = done + count == kept.size() ? 1 : 0;
      const double all = static_cast<double>(kept.size());
      tail_->run(input, positions, std::move(told),
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

void Engine::expect_position(llama_pos next) const {
  const std::uint32_t most = halves_.facts().positions;
  if (most != 0 && next > static_cast<llama_pos>(most))
    throw std::length_error("the sequence has " + std::to_string(next) + " positions, but behind " +
                            std::to_string(most) +
                            " this model scales its attention by them, which two halves cannot: use fewer");
}

const Steps& Engine::advance(const std::vector<Next>& tokens) {
  for (const Next& next : tokens) expect_position(at(next.sequence).next_position + 1);
  std::vector<llama_token> ids;
  std::vector<llama_pos> positions;
  std::vector<llama_seq_id> sequences;
  for (const Next& next : tokens) {
    ids.push_back(next.token);
    positions.push_back(at(next.sequence).next_position);
    sequences.push_back(static_cast<llama_seq_id>(next.sequence));
  }
  if (head_) {
    head_->hidden = std::move(steps_.rows);  // for its memory
    head_->hidden.clear();
    head_->cells.clear();
    head_->run(ids, nullptr, positions, sequences, false);
    steps_.rows = std::move(head_->hidden);
  } else {
    steps_.tokens = ids;
  }
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    Sequence& state = at(tokens[i].sequence);
    ++state.next_position;
    if (!head_) continue;
    state.cells.push_back(head_->cells[i]);
    ++state.head;
  }
  return steps_;
}

void Engine::run_tail(const Steps& steps, std::size_t first, const std::vector<std::size_t>& sequences,
                      const std::vector<llama_pos>& positions) {
  const std::size_t count = positions.size(), axes = halves_.position_axes(), told_axes = head_ ? axes : 1;
  std::vector<llama_pos> told(told_axes * count);  // rows, unlike tokens, have all their axes told; the fourth is 0
  std::vector<llama_seq_id> ids;
  for (std::size_t i = 0; i < count; ++i) {
    Sequence& state = at(sequences[i]);
    for (std::size_t axis = 0; axis < std::min<std::size_t>(told_axes, 3); ++axis)
      told[axis * count + i] = axes == 1 ? static_cast<llama_pos>(state.tail) : positions[i];
    ids.push_back(static_cast<llama_seq_id>(sequences[i]));
    ++state.tail;
  }
  Tail::Input input;
  if (head_) {
    input.rows = &steps.rows;
    input.first = first;
  } else {
    const auto from = steps.tokens.begin() + static_cast<std::ptrdiff_t>(first);
    input.tokens = std::vector<llama_token>(from, from + static_cast<std::ptrdiff_t>(count));
  }
  tail_->run(input, positions, std::move(told), std::move(ids), std::vector<std::int8_t>(count, 1), {}, 0, 1);
  first_row_ = 0;
}

void Engine::conclude(std::size_t sequence, const Steps& steps, std::size_t first, std::size_t count,
                      llama_pos position) {
  std::vector<llama_pos> positions(count);
  std::iota(positions.begin(), positions.end(), position);
  run_tail(steps, first, std::vector<std::size_t>(count, sequence), positions);
}

void Engine::decode(const std::vector<Next>& tokens) {
  if (tokens.empty()) return;
  std::vector<std::size_t> sequences;
  std::vector<llama_pos> positions;
  for (const Next& next : tokens) {
    sequences.push_back(next.sequence);
    positions.push_back(at(next.sequence).next_position);
  }
  run_tail(advance(tokens), 0, sequences, positions);
}

bool Engine::take_back(std::size_t sequence, std::size_t tokens) {
  Sequence& state = at(sequence);
  if (tokens == 0) return true;
  const auto back = static_cast<llama_pos>(tokens);
  if (!head_) {
    state.next_position -= back;
    return true;
  }
  const std::vector<Layer>& layers = halves_.facts().all;
  const bool windows =
      std::any_of(layers.begin(), layers.begin() + static_cast<std::ptrdiff_t>(halves_.filtering_layer()),
                  [](const Layer& layer) { return layer.windowed; });
  if (halves_.recurrent() || (windows && tokens > options_.micro_batch) ||
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

template <class Length>
std::size_t Engine::bytes_of(const Length& length) const {
  const std::int32_t window = llama_model_n_swa(halves_.tail());
  const auto head_dim = static_cast<std::int64_t>(halves_.cost_shape().head_dim);
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < halves_.layers(); ++i) {
    const Layer& layer = halves_.facts().all[i];
    if (!layer.attends) continue;
    const std::int64_t width = head_dim * static_cast<std::int64_t>(layer.kv_heads);
    const std::size_t row = ggml_row_size(options_.key_type, width) + ggml_row_size(options_.value_type, width);
    bytes += row * (layer.windowed && window > 0 ? std::min<std::size_t>(length(i), size(window)) : length(i));
  }
  return bytes;
}
std::size_t Engine::cache_bytes(std::size_t sequence) const {
  return bytes_of([&](std::size_t layer) { return length(sequence, layer); });
}
std::size_t Engine::cache_bytes(const fastv::Plan& plan) const {
  return bytes_of([&](std::size_t layer) { return plan.kv_length(layer); });
}

void Engine::forget(std::size_t sequence) {
  llama_set_causal_attn(tail_->context(), true);  // a picture may have been left half way
  forget_tail(sequence);
  if (head_) {
    llama_set_causal_attn(head_->context(), true);
    llama_memory_seq_rm(head_->memory(), static_cast<llama_seq_id>(sequence), -1, -1);
  }
  at(sequence) = {};
}
void Engine::forget_tail(std::size_t sequence) {
  llama_memory_seq_rm(tail_->memory(), static_cast<llama_seq_id>(sequence), -1, -1);
  at(sequence).tail = 0;
}

}  // namespace llava

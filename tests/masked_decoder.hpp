// The reference decoder the slow way: no token is dropped, but the keys of those that pruning drops are hidden from layer
// K on. And decoding that ranks the visual tokens anew at every step.
#pragma once

#include <functional>

#include "decoder.hpp"

namespace masked {

using reference::Decoder;
using reference::Matrix;
using reference::RowVector;
using reference::Sequence;

enum class Mode {
  once,         // not the slow way: Decoder's own, which drops tokens after layer K of the prefill
  mask,         // run every token through every layer, but hide the dropped ones' keys from layer K on
  mask_anew,    // mask, and every decoding step hides what its own ranking drops: re-ranking over a full cache
  prefill_anew  // no cache: every decoding step runs the whole sequence again and prunes it by the newest token's row
};

struct Run {
  std::vector<fastv::Config> schedule = {};   // filtering layers ascending; empty: nothing is pruned
  std::vector<fastv::TokenSpan> visual = {};  // positions within this prompt
  Mode mode = Mode::mask;
  reference::EvidenceKind evidence = reference::EvidenceKind::query_key;
  // Called after each stage with what it keeps, and by which scores.
  std::function<void(const fastv::Kept&, fastv::Span<const float> scores)> on_kept = {};
};

inline constexpr float hidden_key = -std::numeric_limits<float>::infinity();

// Layers from `layer` on do not see the dropped ones of this prompt's `rows` keys.
inline void hide_dropped(const fastv::Kept& kept, Eigen::Index rows, std::size_t layer, Sequence& sequence) {
  for (; layer < sequence.layers.size(); ++layer) {
    Sequence::LayerCache& cache = sequence.layers[layer];
    // A stage behind the first finds this prompt's mask in place; the layer itself has not run yet.
    const Eigen::Index past = cache.length;
    RowVector mask = RowVector::Zero(past + rows);
    mask.head((std::min)(past, cache.mask.cols())) = cache.mask.head((std::min)(past, cache.mask.cols()));
    mask.tail(rows).setConstant(hidden_key);
    for (const fastv::Index index : kept) mask[past + index] = 0;
    cache.mask = mask;
  }
}

// Runs a prompt [n, d] behind what the sequence already holds. Mode::once: [m, d], and one stage at most. Else [n, d],
// of which the rows of dropped tokens mean nothing.
inline Matrix prefill(const Decoder& decoder, Matrix hidden, Sequence& sequence, const Run& how) {
  if (how.schedule.empty()) return decoder.prefill(std::move(hidden), sequence);
  if (how.mode == Mode::once || how.mode == Mode::prefill_anew) {
    reference::Pruning pruning{fastv::Pruner<float>(how.schedule.at(0)), how.visual, how.evidence};
    hidden = decoder.prefill(std::move(hidden), sequence, pruning);
    if (how.on_kept) how.on_kept(pruning.kept, pruning.pruner.scores());
    return hidden;
  }
  const std::vector<std::int64_t> positions = decoder.next_positions(hidden.rows(), sequence);
  reference::LayerRun run;
  run.keep_map = how.evidence == reference::EvidenceKind::probabilities;
  for (std::size_t layer = 0; layer < decoder.shape().layers; ++layer) {
    for (const fastv::Config& stage : how.schedule) {
      if (stage.filtering_layer != layer) continue;  // `layer` layers have run
      fastv::Pruner<float> pruner(stage);
      const fastv::Kept kept =
          reference::require(layer == 0 ? pruner.prune(fastv::NoEvidence{positions.size()}, how.visual)
                                        : reference::prune_by(how.evidence, pruner, how.visual, decoder.config(), run,
                                                              hidden, sequence.layers[layer - 1]));
      if (how.on_kept) how.on_kept(kept, pruner.scores());
      hide_dropped(kept, hidden.rows(), layer, sequence);
    }
    decoder.run_layer(layer, hidden, positions, sequence, run);
  }
  return hidden;
}

// Feeds one token; returns the logits [1, vocabulary] of the next. Mode::mask_anew, for sequences of one prompt: the
// newest token's row in layer K - 1 ranks the visual tokens, and the dropped ones are hidden from it from layer K on.
inline RowVector decode(const Decoder& decoder, int token, Sequence& sequence, const Run& how) {
  if (how.mode != Mode::mask_anew) return decoder.decode(token, sequence);
  Matrix hidden = decoder.embed({token});
  const std::vector<std::int64_t> positions = decoder.next_positions(1, sequence);
  const fastv::ModelShape& shape = decoder.shape();
  reference::LayerRun run;
  for (std::size_t layer = 0; layer < shape.layers; ++layer) {
    for (const fastv::Config& stage : how.schedule) {
      if (stage.filtering_layer != layer) continue;
      const auto keys = static_cast<std::size_t>(sequence.layers[layer - 1].length);
      fastv::Pruner<float> pruner(stage);
      const fastv::Kept kept = reference::require(
          pruner.prune(fastv::query_key(fastv::heads(run.query, shape.heads),
                                        fastv::heads(sequence.layers[layer - 1].keys, shape.kv_heads, keys),
                                        reference::scale_of(decoder.config())),
                       how.visual));
      if (how.on_kept) how.on_kept(kept, pruner.scores());
      RowVector mask(static_cast<Eigen::Index>(keys));
      reference::require(fastv::keep_bias(kept, mask, hidden_key));
      for (std::size_t hiding = layer; hiding < shape.layers; ++hiding) sequence.layers[hiding].mask = mask;
    }
    decoder.run_layer(layer, hidden, positions, sequence, run);
  }
  return decoder.logits(hidden, sequence);
}

// One step of greedy decoding: the logits [1, vocabulary] behind the token, and the sequence before it is fed.
struct Step {
  int token;
  const RowVector& logits;
  const Sequence& sequence;
};

// Greedy decoding of a prompt [n, d]: `steps` tokens.
inline std::vector<int> generate(const Decoder& decoder, Matrix prompt, std::size_t steps, const Run& how,
                                 Sequence& sequence, const std::function<void(const Step&)>& on_step = {}) {
  std::vector<int> tokens;
  RowVector logits = decoder.logits(prefill(decoder, prompt, sequence, how).bottomRows(1), sequence);
  while (tokens.size() < steps) {
    tokens.push_back(reference::argmax(logits));
    if (on_step) on_step({tokens.back(), logits, sequence});
    if (tokens.size() == steps) break;
    if (how.mode == Mode::prefill_anew) {
      sequence = Sequence{};
      prompt.conservativeResize(prompt.rows() + 1, prompt.cols());
      prompt.bottomRows(1) = decoder.embed({tokens.back()});
      logits = decoder.logits(prefill(decoder, prompt, sequence, how).bottomRows(1), sequence);
    } else {
      logits = decode(decoder, tokens.back(), sequence, how);
    }
  }
  return tokens;
}

}  // namespace masked

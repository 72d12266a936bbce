// Prefill as a server runs it, on the reference decoder: a schedule of several stages, and chunks of rows between which
// other sequences may decode.
#pragma once

#include "../reference/decoder.hpp"

namespace serving {

using reference::Matrix;

// What is decided about a prompt before it runs.
struct Prefill {
  std::vector<fastv::Config> schedule;   // filtering layers ascending; empty: nothing is pruned
  std::vector<fastv::TokenSpan> visual;  // positions within this prompt
  reference::EvidenceKind evidence = reference::EvidenceKind::query_key;
  Eigen::Index chunk = 0;  // rows run at a time; 0: all
};

struct Prefilled {
  Matrix hidden;                                // the last layer's output [m, d]
  std::vector<std::vector<fastv::Index>> kept;  // of every stage, positions in what the stage before it left
};

// Layers begin .. end - 1 on rows [t, d] behind the sequence, a chunk of rows after the other. A layer reads the keys of
// all chunks before it from the cache; run is left with the rows of the last.
inline void run_layers(const reference::Decoder& decoder, std::size_t begin, std::size_t end, Eigen::Index chunk,
                       Matrix& hidden, const std::vector<std::int64_t>& positions, reference::Sequence& sequence,
                       reference::LayerRun& run) {
  if (chunk == 0) chunk = hidden.rows();
  for (Eigen::Index first = 0; first < hidden.rows(); first += chunk) {
    const Eigen::Index rows = (std::min)(chunk, hidden.rows() - first);
    Matrix part = hidden.middleRows(first, rows);
    const std::vector<std::int64_t> places(positions.begin() + first, positions.begin() + first + rows);
    for (std::size_t layer = begin; layer < end; ++layer) decoder.run_layer(layer, part, places, sequence, run);
    hidden.middleRows(first, rows) = part;
  }
}

// Runs a prompt [n, d] behind what the sequence already holds. A stage needs all rows of the prompt, so the layers below
// it run for every chunk first. Scores are of the rows that the last chunk has; a mean over more is refused.
inline Prefilled prefill(const reference::Decoder& decoder, Matrix hidden, reference::Sequence& sequence,
                         const Prefill& how) {
  std::vector<std::int64_t> positions = decoder.next_positions(hidden.rows(), sequence);
  reference::require(fastv::make_plan(how.schedule, {positions.size(), decoder.shape().layers, how.visual}).status);

  Prefilled out;
  std::vector<fastv::TokenSpan> visual = how.visual;
  reference::LayerRun run;
  run.keep_map = how.evidence == reference::EvidenceKind::probabilities;
  std::size_t done = 0;  // layers
  for (const fastv::Config& stage : how.schedule) {
    run_layers(decoder, done, stage.filtering_layer, how.chunk, hidden, positions, sequence, run);
    done = stage.filtering_layer;

    fastv::Pruner<float> pruner(stage);
    const fastv::Kept kept = done == 0 ? pruner.prune(fastv::NoEvidence{positions.size()}, visual)
                                       : reference::prune_by(how.evidence, pruner, visual, decoder.config(), run,
                                                             hidden, sequence.layers[done - 1]);
    reference::require(fastv::compact(kept, hidden));
    reference::require(fastv::compact(kept, positions));
    positions.resize(kept.size());
    const auto spans = fastv::next_spans(kept, visual, visual);
    reference::require(spans.status);
    visual.resize(*spans);
    out.kept.emplace_back(kept.begin(), kept.end());
  }
  run_layers(decoder, done, decoder.shape().layers, how.chunk, hidden, positions, sequence, run);
  out.hidden = std::move(hidden);
  return out;
}

}  // namespace serving

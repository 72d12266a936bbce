// Several questions about one image, each with the tokens that it asks for. Layers below K know nothing of pruning: they
// run on the image once, and what is kept of it is their caches and layer K - 1's output. A question runs through those
// layers alone, ranks the image's tokens, and layers K .. run on what it keeps: the same as a prefill of everything.
#pragma once

#include "prefill.hpp"

namespace serving {

class CachedImage {
 public:
  // beginning: the prompt up to the question [b, d], image included; filtering_layer: K, at least 1.
  CachedImage(const reference::Decoder& decoder, Matrix beginning, std::size_t filtering_layer)
      : decoder_(decoder), layers_(filtering_layer), hidden_(std::move(beginning)) {
    const std::vector<std::int64_t> positions = decoder.next_positions(hidden_.rows(), sequence_);
    reference::LayerRun run;
    run_layers(decoder, 0, layers_, 0, hidden_, positions, sequence_, run);
  }

  // Prefill of a question [q, d] behind it; the pruner's filtering layer is K. Returns the last layer's output [m, d] on
  // all that is kept. sequence: receives the caches, those below K as copies. (An engine with pages shares the blocks.)
  Matrix ask(Matrix question, reference::Sequence& sequence, reference::Pruning& pruning) const {
    sequence = sequence_;
    const std::vector<std::int64_t> behind = decoder_.next_positions(question.rows(), sequence);
    reference::LayerRun run;
    run.keep_map = pruning.evidence == reference::EvidenceKind::probabilities;
    run_layers(decoder_, 0, layers_, 0, question, behind, sequence, run);

    Matrix hidden(hidden_.rows() + question.rows(), hidden_.cols());
    hidden << hidden_, question;
    std::vector<std::int64_t> positions(static_cast<std::size_t>(hidden.rows()));
    std::iota(positions.begin(), positions.end(), std::int64_t{0});
    pruning.kept = reference::prune_by(pruning.evidence, pruning.pruner, pruning.visual, decoder_.config(), run, hidden,
                                       sequence.layers[layers_ - 1]);
    reference::require(fastv::compact(pruning.kept, hidden));
    reference::require(fastv::compact(pruning.kept, positions));
    positions.resize(pruning.kept.size());
    run_layers(decoder_, layers_, decoder_.shape().layers, 0, hidden, positions, sequence, run);
    return hidden;
  }

 private:
  const reference::Decoder& decoder_;
  std::size_t layers_;            // K
  Matrix hidden_;                 // layer K - 1's output [b, d]
  reference::Sequence sequence_;  // caches of layers 0 .. K - 1, every token in them
};

}  // namespace serving

// What a model's keys say about its layers, and so where it can be cut: which filtering layers K there can be, and what
// the two halves' files are.
#pragma once

#include "model_file.hpp"

namespace llava {

struct Layer {
  bool attends = true;    // recurrent and convolution layers keep a state, and no keys
  bool windowed = false;  // sees a window of the tokens before it
  std::uint32_t kv_heads = 1;
};

struct Layers {
  std::vector<Layer> all;                       // those that decode; heads that predict further tokens are no layers
  std::vector<std::uint32_t> filtering_layers;  // the Ks from 1 on that can be, ascending
  std::string uncut;                            // why there is none; K = 0 can be
  bool chunked = false;                         // windows are chunks of the sequence (Llama 4)
  std::string rows;                             // libllama's name for what a layer hands to the next
  std::uint32_t positions = 0;                  // that a sequence may have; 0: any number
  std::uint32_t deepstack = 0;                  // layers behind which further rows of a picture are added
  std::string input;  // its name for what layer 0 reads, where that is not the embeddings as they were handed over
  // Of the rows that layer `layer` hands to the next.
  std::string rows_of(std::uint32_t layer) const;
};

// Throws std::runtime_error, with the reason, where the architecture cannot be pruned at all or has not been tried.
Layers layers_of(const ModelFile& file);

// Architectures that have been held to llama_decode (tests/llava), sorted; uncut: those that can be pruned at K = 0 alone.
std::vector<std::string> architectures(bool uncut = false);

// The K of `layers` to use: the one asked for, or the smallest from 2 on. Throws std::invalid_argument, with the list of
// those that can be, where the one asked for cannot.
std::uint32_t filtering_layer(const Layers& layers, std::optional<std::uint32_t> asked);

// "1-7, 9" of 1, 2, ... 7, 9.
std::string ranges(const std::vector<std::uint32_t>& values);

// Layers below K, and layer K behind them, which is never run: llama.cpp drops all rows but the outputs' in the last
// layer, and each token's row is needed.
Part head_of(const ModelFile& file, const Layers& layers, std::uint32_t k);
// The layers from K on.
Part tail_of(const ModelFile& file, const Layers& layers, std::uint32_t k);

}  // namespace llava

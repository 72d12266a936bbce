// One architecture held to llama_decode: with every token kept the logits are the same, bit for bit; pruned they are those
// of the whole model whose masks hide the dropped keys from layer K on. The same at K = 0, from the first layer on.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace proof {

struct Proof {
  std::string architecture, kinds;  // kinds: of its layers, see tiny_gguf.hpp
  std::vector<std::uint32_t> filtering_layers;
  std::uint32_t filtering_layer = 0;
  std::size_t tokens = 0, kept = 0;
  // Largest difference of a logit, over prefill and 16 steps of decoding: prompt in one micro-batch and in several; with a
  // Q8_0 cache, where it has whole blocks in a head.
  double whole = 0, whole_in_pieces = 0;
  std::optional<double> whole_q8;
  // The same, pruned, as a share of the largest logit; nothing for recurrent layers, whose state cannot be masked.
  std::optional<double> pruned_prefill, pruned_decoding, pruned_in_pieces;
  std::size_t same_tokens = 0;  // of the 16 that llama_decode finds likeliest, pruned
  // At K = 0: the largest difference of a logit with every token kept; pruned as a share of the largest logit, of all but
  // recurrent models.
  double ahead = 0;
  std::optional<double> ahead_prefill, ahead_decoding;

  // What is wrong with it; empty: nothing.
  std::string verdict() const;
};

// Of an architecture that can be pruned at K = 0 alone, what is said of other K is empty. Throws what the engine throws.
Proof prove(const std::string& architecture);

}  // namespace proof

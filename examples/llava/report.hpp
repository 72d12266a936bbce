// What a run came to: the table that compares two runs, the JSON of everything measured, the overlay.
#pragma once

#include "options.hpp"
#include "prompt.hpp"

namespace llava {

struct Run {
  std::string name;
  fastv::Plan plan;
  Prefill prefill;
  std::vector<llama_token> tokens;
  std::string text;
  double decode_seconds = 0;    // of all tokens behind the first
  std::size_t cache_bytes = 0;  // of keys and values in use behind the last token

  double tokens_per_second() const {
    return tokens.size() > 1 ? static_cast<double>(tokens.size() - 1) / decode_seconds : 0;
  }
};

// "layers 0-1: 631, layers 2-31: 343"
std::string tokens_per_layer(const fastv::Plan& plan);

// One line: tokens, prefill, decoding, KV cache.
std::string summary(const Run& run);

// Both runs side by side: answers, tokens, prefill, decoding, KV cache, FLOPs, agreement of the first 32 tokens.
std::string comparison(const Halves& halves, const Run& whole, const Run& pruned);

void write_json(const std::string& path, const Options& options, const Halves& halves, const Prompt& prompt,
                const std::vector<Run>& runs);

// Every picture with its dropped tokens dimmed and the kept ones outlined. padded: the model saw them centred on a
// square (LLaVA), not stretched; first_patch: see Vision.
void write_overlay(const std::string& path, const std::vector<std::string>& pictures,
                   const std::vector<fastv::TokenSpan>& visual, const std::vector<fastv::Index>& kept, bool padded,
                   std::size_t first_patch);

}  // namespace llava

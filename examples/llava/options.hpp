// The command line of fastv-llava.
#pragma once

#include <string>

#include "engine.hpp"

namespace llava {

struct Options {
  std::string model, vision, embeddings;  // -m, --mmproj, --visual-embeddings
  std::vector<std::string> pictures;      // --image, any number of times
  std::string prompt;                     // -p
  std::string chat_template;
  std::size_t generate = 128;  // -n
  double temperature = 0;      // --temp
  std::int32_t top_k = 40;     // --top-k; 0: all
  float top_p = 0.95f, min_p = 0.05f;
  std::uint32_t seed = 0;
  LoadOptions load;
  EngineOptions engine;
  fastv::Config fastv;  // its filtering layer is that of `load`, or the smallest that can be
  bool prune = true;    // false: --no-fastv
  bool compare = false, help = false;
  std::string overlay, json;

  // No prompt and no picture: a conversation, line by line.
  bool chat() const { return prompt.empty() && pictures.empty() && embeddings.empty(); }
};

// Throws std::invalid_argument with one sentence.
Options read_options(int count, char** arguments);

const char* usage();

}  // namespace llava

// The command line of fastv-llava.
#pragma once

#include <string>

#include "engine.hpp"

namespace llava {

struct Options {
  std::string model, vision, embeddings;  // -m, --mmproj, --visual-embeddings
  std::vector<std::string> pictures;      // --image, any number of times
  std::string prompt = "Describe the picture.";
  std::string chat_template;
  std::size_t generate = 128;  // -n
  std::size_t context = 0;     // -c; 0: the model's
  int threads = 0;             // -t; 0: one per core
  double temperature = 0;
  std::uint32_t seed = 0;
  std::vector<fastv::Config> schedule{fastv::Config{}};  // empty: --no-fastv
  EngineOptions engine;
  bool compare = false, help = false;
  std::string overlay, json;
};

// Throws std::invalid_argument with one sentence.
Options read_options(int count, char** arguments);

const char* usage();

}  // namespace llava

// The command line of fastv-llava.
#pragma once

#include <string>

#include "engine.hpp"
#include "rules.hpp"

namespace llava {

// --sweep: what is tried.
struct SweepOptions {
  std::string questions;                        // a file of JSON lines
  std::vector<std::uint32_t> filtering_layers;  // empty: the smallest, and those a quarter and half of the way up
  std::vector<double> filtering_ratios = {0.5, 0.75, 0.9};
  std::vector<std::string> rules = {"last", "window", "random"};
  std::size_t calibrate = 0;   // the first so many questions weigh the heads, and are not judged by
  std::string stem = "sweep";  // of the files that are written
  double max_kl = 0.1;         // of the setting that is recommended: mean divergence, in nats
  double max_drop = 0.02;      // and of accuracy, where answers are known
  std::string config;          // file that it is written to
};

struct Options {
  std::string model, vision, embeddings;  // -m, --mmproj, --visual-embeddings
  std::vector<std::string> pictures;      // --image, any number of times
  std::string prompt;                     // -p
  std::string chat_template;
  bool jinja = false;
  std::size_t generate = 128;  // -n
  double temperature = 0;      // --temp
  std::int32_t top_k = 40;     // --top-k; 0: all
  float top_p = 0.95f, min_p = 0.05f;
  std::uint32_t seed = 0;
  LoadOptions load;
  EngineOptions engine;
  fastv::Config fastv;              // its filtering layer is that of `load`, or the smallest that can be
  std::string rule = "last";        // in `fastv` too
  std::vector<float> head_weights;  // of --fastv-config; used by the rules that weigh heads
  std::uint32_t calibrated_at = 0;  // the K that they are of
  bool prune = true;                // false: --no-fastv
  bool compare = false, help = false;
  std::string overlay, json;
  SweepOptions sweep;

  // No prompt and no picture: a conversation, line by line.
  bool chat() const { return sweep.questions.empty() && prompt.empty() && pictures.empty() && embeddings.empty(); }
};

// Throws std::invalid_argument with one sentence.
Options read_options(int count, char** arguments);

const char* usage();

}  // namespace llava

// What pruning costs on the user's own model, pictures and questions: every K, R and rule against the unpruned run of the
// same prompts.
#pragma once

#include <map>

#include "calibrate.hpp"
#include "options.hpp"

namespace llava {

struct Question {
  std::string picture, text, answer;  // answer: empty where none is known
};

// A file of JSON lines, {"picture": FILE, "question": TEXT, "answer": TEXT}, or an array of the same, whose pictures lie
// beside it. Throws std::invalid_argument, with the line.
std::vector<Question> read_questions(const std::string& path);

// One setting over all questions. Divergences are of the unpruned model's next-token distribution from the pruned one's,
// in nats, where both are told the unpruned answer.
struct Measured {
  fastv::Config config;
  std::string rule;
  double kl_first = 0, kl_mean = 0, kl_99 = 0;  // of the first token; of the first 32; their 99th percentile
  double same_tokens = 0, same_answers = 0;     // shares
  double accuracy = -1;                         // of the questions whose answer is known; negative: of none
  double flops = 1, time = 1;                   // of the prefill, as a share of the unpruned one's
  double prefill_ms = 0, kv_mib = 0;            // means
};

struct Sweep {
  std::vector<Measured> measured;  // the first is the unpruned run
  std::vector<double>
      attention;  // on the picture, by layer, mean over questions; NaN where a layer sees a window alone
  std::map<std::size_t, Calibration> calibrations;  // by K
};

// Called with what is being done, and the share of it that is done.
using TaskProgress = std::function<void(const std::string& task, double share)>;

// The vision encoder looks at every picture once, for all K; see Album for where that is kept. The questions that weigh heads
// are not judged by.
Sweep sweep(const Options& options, const std::vector<Question>& questions, const TaskProgress& progress = {});

// The cheapest setting by FLOPs that keeps to the limits; null: none does.
const Measured* cheapest(const Sweep& sweep, double max_kl, double max_drop);

std::string table(const Sweep& sweep);
// STEM.csv, STEM.json, STEM.png (equal tokens over FLOPs and over time), STEM-attention.png. Returns what was written.
std::vector<std::string> write_sweep(const std::string& stem, const Sweep& sweep);

// What the calibrations found: a line for each K, with the heads that weigh most.
std::string weights(const Sweep& sweep);

// A setting as --fastv-config reads it, with the weights of its K if there are some.
void write_config(const std::string& path, const Measured& setting, const Sweep& sweep);
void read_config(const std::string& path, Options& options);

}  // namespace llava

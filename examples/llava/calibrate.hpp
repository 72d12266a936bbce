// How much each head of layer K-1 has to say about which visual tokens matter, measured on the user's own prompts.
#pragma once

#include "engine.hpp"

namespace llava {

// KL(p || q) in nats of two next-token distributions over the vocabulary: p by its logarithms, q by its logits.
std::vector<double> log_softmax(const float* logits, std::size_t count);
double divergence(const std::vector<double>& p, const float* logits);

struct Calibration {
  std::vector<float> weights;             // [H], sum 1
  double divergence = 0;                  // D, nats
  std::vector<double> without;            // [H]: D_h
  std::size_t prompts = 0, prefills = 0;  // prefills of the tail that it took
};

// Leaves one head out after the other:
//
//   w_h = max(0, D_h - D) / sum_g max(0, D_g - D)
//
// D is the mean over prompts of KL(unpruned || pruned) of the first answer token where tokens are ranked by all heads alike,
// D_h the same without head h. HAWK (arXiv 2604.07812) weighs heads by what a benchmark loses without them; this is what the
// unpruned model's own answer loses. Where no head is missed, all weigh 1 / H.
//
// engine: made with by_head, at K >= 1; config: its K, R and rule, which ranks. O(prompts * (H + 1)) prefills of the tail, less
// those that would keep the same tokens as one before; the head runs once a prompt. progress: share of the prompts.
Calibration calibrate(Engine& engine, const fastv::Config& config, std::size_t prompts,
                      const std::function<Prompt(std::size_t)>& prompt, const Progress& progress = {});

}  // namespace llava

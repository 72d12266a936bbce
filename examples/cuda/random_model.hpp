// The decoder on a GPU with random weights in half precision, and prompts for it.
#pragma once

#include "../common/cuda_program.hpp"
#include "decoder.hpp"

namespace decoder {

using Model = Decoder<cuda_program::Machine, half>;

// Norms are 1; the rest is scaled so that activations keep their size.
inline Model random_model(cuda_program::Machine& machine, const fastv::ModelShape& shape, const Room& room) {
  std::uint32_t seed = 0;
  return Model(machine, shape, room, [&](const std::string& name, half* to, std::size_t rows, std::size_t columns) {
    const bool norm = name.find("norm") != std::string::npos;
    const float deviation = 1 / std::sqrt(static_cast<float>(columns));
    machine.upload(to, norm ? std::vector<half>(columns, narrow<half>(1))
                            : cuda_program::random_halves(rows * columns, ++seed, deviation));
  });
}

// Sequences of one image each, and their prompts.
struct Batch {
  std::vector<fastv::TokenSpan> images;
  std::vector<fastv::cuda::Request> requests;
  std::vector<half> prompt;
  std::size_t rows = 0;

  // Lengths differ by `ragged` from one sequence to the next.
  Batch(std::size_t count, std::size_t visual, std::size_t width, std::size_t ragged) : images(count) {
    fastv::Config config;  // K = 2, R = 50%
    for (std::size_t i = 0; i < count; ++i) {
      images[i] = {35, visual - i * ragged};
      requests.push_back({config, {&images[i], 1}, rows, 35 + images[i].count + 20});
      rows += requests[i].tokens;
    }
    prompt = cuda_program::random_halves(rows * width, 1);
  }
};

}  // namespace decoder

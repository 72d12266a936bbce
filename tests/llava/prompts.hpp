// Prompts that mean nothing, for models that have learnt nothing, and how two rows of logits differ.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "../oracle.hpp"
#include "engine.hpp"
#include "tiny_gguf.hpp"

namespace prompts {

// Random tokens of text and pictures of random rows, one after the other.
class Builder {
 public:
  Builder(const llava::Halves& halves, std::uint64_t seed, llama_pos first = 0) : halves_(halves), random_(seed) {
    prompt.next_position = first;
  }
  Builder& text(std::size_t count) {
    std::vector<llama_token> tokens(count);
    const double most = llama_vocab_n_tokens(halves_.vocabulary()) - 1;
    for (llama_token& token : tokens) token = static_cast<llama_token>(random_.real(0, most));
    prompt.add_text(std::move(tokens), halves_.position_axes());
    return *this;
  }
  // side x side tokens. M-RoPE: on a grid of positions.
  Builder& picture(std::size_t side, bool causal = true) {
    llava::Piece piece;
    const std::size_t count = side * side, axes = halves_.position_axes();
    piece.count = count;
    piece.columns = side;
    piece.causal = causal;
    piece.rows.resize(count * halves_.input());
    for (float& x : piece.rows) x = static_cast<float>(random_.real(-1, 1));
    piece.positions.resize(axes * count);
    const llama_pos first = prompt.next_position;
    for (std::size_t i = 0; i < count; ++i) {
      piece.positions[i] = axes == 1 ? first + static_cast<llama_pos>(i) : first;
      if (axes == 1) continue;
      piece.positions[count + i] = first + static_cast<llama_pos>(i / side);
      piece.positions[2 * count + i] = first + static_cast<llama_pos>(i % side);
    }
    prompt.next_position += static_cast<llama_pos>(axes == 1 ? count : side);
    prompt.pieces.push_back(std::move(piece));
    return *this;
  }

  llava::Prompt prompt;

 private:
  const llava::Halves& halves_;
  oracle::Rng random_;
};

inline double largest(const std::vector<float>& values) {
  double most = 0;
  for (const float value : values) most = std::max(most, std::abs(static_cast<double>(value)));
  return most;
}

// NaN where either has one.
inline double largest_difference(const float* a, const std::vector<float>& b) {
  double most = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    const double difference = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    if (!(difference <= most)) most = difference;
  }
  return most;
}

inline llama_token likeliest(const std::vector<float>& logits) {
  return static_cast<llama_token>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// Files of this process, written once and removed at its end.
inline const std::string& model_file(const tiny_gguf::LanguageModel& spec, const std::string& name) {
  struct Files {
    std::map<std::string, std::string> by_name;
    ~Files() {
      for (const auto& [key, path] : by_name) std::remove(path.c_str());
    }
  };
  static Files files;
  const char* folder = std::getenv("TMPDIR");
  const auto [entry, fresh] = files.by_name.emplace(name, std::string(folder == nullptr ? "/tmp" : folder) + "/fastv_" +
                                                              std::to_string(getpid()) + "_" + name + ".gguf");
  if (fresh) tiny_gguf::write(spec, entry->second);
  return entry->second;
}

// Options and a model that many tests use.
inline llava::EngineOptions one_thread(std::size_t context = 512) {
  llava::EngineOptions options;
  options.context = context;
  options.threads = 1;
  return options;
}

inline tiny_gguf::LanguageModel llama_of(ggml_type type = GGML_TYPE_F32) {
  tiny_gguf::LanguageModel spec;
  spec.type = type;
  spec.layers = 5;
  spec.hidden = spec.ffn = 256;  // whole blocks of Q4_K
  spec.heads = 8;
  spec.kv_heads = 2;
  return spec;
}
inline const std::string& llama_file() { return model_file(llama_of(), "llama_256"); }

}  // namespace prompts

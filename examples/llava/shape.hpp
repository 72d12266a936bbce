// What a GGUF file's keys say of its decoder. Architectures: llama (LLaVA-1.5, Video-LLaVA's Vicuna, SmolVLM), qwen
// (QwenVL-Chat), qwen2, qwen2vl.
#pragma once

#include <fastv/cost.hpp>
#include <string>

#include "gguf_file.hpp"

namespace llava {

struct Shape {
  std::string architecture;
  std::int64_t layers, hidden, heads, kv_heads, head_dim, ffn, vocabulary, context;
  float rms_eps, attention_scale;
  int rope_mode, rope_dims, rope_context;
  int rope_sections[4];  // M-RoPE: pairs per axis; all 0 otherwise
  float rope_base, rope_frequency_scale;

  bool m_rope() const { return rope_mode == GGML_ROPE_TYPE_MROPE; }
  int position_axes() const { return m_rope() ? 4 : 1; }  // ggml's M-RoPE has a fourth, unused here
  fastv::ModelShape cost_shape() const;
};

// Throws std::runtime_error with one sentence where a key is missing, of another kind or out of range. vocabulary is 0:
// the tensors say it.
Shape shape_of(const GgufFile& file);

}  // namespace llava

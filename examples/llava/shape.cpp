#include "shape.hpp"

#include <cmath>
#include <stdexcept>
#include <tuple>

namespace llava {

fastv::ModelShape Shape::cost_shape() const {
  const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
  return {size(layers), size(hidden), size(heads), size(kv_heads), size(head_dim), size(ffn), 3, size(vocabulary)};
}

Shape shape_of(const GgufFile& file) {
  Shape shape{};
  shape.architecture = file.text("general.architecture");
  const std::string& name = shape.architecture;
  const std::string prefix = name + ".";
  const auto wrong = [&](const std::string& what) { return std::runtime_error(file.path() + ": " + what); };
  if (name == "llama")
    shape.rope_mode = GGML_ROPE_TYPE_NORMAL;
  else if (name == "qwen" || name == "qwen2")
    shape.rope_mode = GGML_ROPE_TYPE_NEOX;
  else if (name == "qwen2vl")
    shape.rope_mode = GGML_ROPE_TYPE_MROPE;
  else
    throw wrong("the architecture is \"" + name + "\", but only llama, qwen, qwen2 and qwen2vl are known");

  const auto size = [&](const std::string& key, std::int64_t otherwise = 0) {
    const std::int64_t value = otherwise == 0 ? file.whole(prefix + key) : file.whole(prefix + key, otherwise);
    if (value < 1 || value > (std::int64_t{1} << 31) - 1)
      throw wrong(prefix + key + " is " + std::to_string(value) + ", which is no size of a decoder");
    return value;
  };
  shape.layers = size("block_count");
  shape.hidden = size("embedding_length");
  shape.heads = size("attention.head_count");
  shape.kv_heads = size("attention.head_count_kv", shape.heads);
  shape.head_dim = size("attention.key_length", shape.hidden / shape.heads);
  // qwen counts the gate and the up matrix as one.
  shape.ffn = size("feed_forward_length") / (name == "qwen" ? 2 : 1);
  shape.context = size("context_length");
  if (shape.heads % shape.kv_heads != 0 || shape.head_dim % 2 != 0)
    throw wrong(std::to_string(shape.heads) + " heads of dimension " + std::to_string(shape.head_dim) + " with " +
                std::to_string(shape.kv_heads) +
                " KV heads: heads must be a multiple of KV heads, and the dimension even");
  if (file.whole(prefix + "expert_count", 0) != 0) throw wrong("mixtures of experts are not supported");
  shape.rms_eps = static_cast<float>(file.real(prefix + "attention.layer_norm_rms_epsilon", 0));
  shape.attention_scale = static_cast<float>(file.real(prefix + "attention.scale", 0));
  if (shape.attention_scale == 0) shape.attention_scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));

  const std::int64_t turned = size("rope.dimension_count", shape.head_dim);
  if (turned > shape.head_dim || turned % 2 != 0)
    throw wrong(prefix + "rope.dimension_count is " + std::to_string(turned) +
                ", but RoPE turns pairs of at most the head dimension, " + std::to_string(shape.head_dim));
  shape.rope_dims = static_cast<int>(turned);
  shape.rope_context = static_cast<int>(shape.context);
  shape.rope_base = static_cast<float>(file.real(prefix + "rope.freq_base", 10000));
  const std::string scaling =
      file.has(prefix + "rope.scaling.type") ? file.text(prefix + "rope.scaling.type") : "linear";
  double factor = file.real(prefix + "rope.scaling.factor", file.real(prefix + "rope.scale_linear", 1));
  if (scaling == "none" || factor == 0) factor = 1;
  if (scaling != "none" && scaling != "linear")
    throw wrong("RoPE scaling \"" + scaling + "\" is not supported: only none and linear are");
  shape.rope_frequency_scale = static_cast<float>(1 / factor);
  if (shape.m_rope()) {
    const std::vector<std::int64_t> sections = file.wholes(prefix + "rope.dimension_sections");
    std::int64_t sum = 0;
    for (std::size_t i = 0; i < sections.size() && i < 4; ++i) {
      if (sections[i] < 0 || sections[i] > shape.head_dim)
        throw wrong(prefix + "rope.dimension_sections has " + std::to_string(sections[i]) +
                    ", which is no number of pairs");
      shape.rope_sections[i] = static_cast<int>(sections[i]);
      sum += sections[i];
    }
    if (sum < 1 || sum > shape.head_dim / 2)
      throw wrong(prefix + "rope.dimension_sections add up to " + std::to_string(sum) + " but must lie between 1 and " +
                  std::to_string(shape.head_dim / 2) + ", half the head dimension");
  }
  for (const auto& [key, value, least] : {std::tuple{"attention.layer_norm_rms_epsilon", shape.rms_eps, 0.0f},
                                          {"attention.scale", shape.attention_scale, 1e-12f},
                                          {"rope.freq_base", shape.rope_base, 1e-12f},
                                          {"rope.scaling.factor", shape.rope_frequency_scale, 1e-12f}})
    if (!(value >= least && value <= 1e12f))
      throw wrong(prefix + key + " makes a model of " + std::to_string(value) + ", which is out of range");
  return shape;
}

}  // namespace llava

#include "tiny_gguf.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <vector>

#include "tiny_vocabulary.hpp"

namespace tiny_gguf {
namespace {

using gguf::Sink;
using gguf::Writer;

// splitmix64 (Steele, Lea, Flood 2014).
class Random {
 public:
  // Each tensor has a stream of its own: one more tensor changes no other.
  Random(std::uint64_t seed, const std::string& tensor) : state_(seed) {
    for (const char c : tensor) state_ = (state_ ^ static_cast<unsigned char>(c)) * 0x100000001B3u;  // FNV-1a
  }
  std::uint64_t bits() {
    std::uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  // Nearly normal, deviation 1: four uniform numbers of 16 bits, added. Exact until the one multiplication.
  float normal() {
    const std::uint64_t b = bits();
    const auto sum = static_cast<std::int32_t>((b & 0xFFFF) + (b >> 16 & 0xFFFF) + (b >> 32 & 0xFFFF) + (b >> 48));
    return static_cast<float>(sum - 131070) * 2.6429e-5f;  // sqrt(3) / 2^16
  }

 private:
  std::uint64_t state_;
};

std::int64_t product(const std::vector<std::int64_t>& extents) {
  std::int64_t count = 1;
  for (const std::int64_t extent : extents) count *= extent;
  return count;
}

// Adds tensors of random weights to a file.
class Tensors {
 public:
  Tensors(Writer& file, std::uint64_t seed, ggml_type type) : file_(file), seed_(seed), type_(type) {}

  // Extents innermost first; entries have the given deviation.
  void matrix(const std::string& name, const std::vector<std::int64_t>& extents, float deviation) {
    add(name, type_, extents, 0, deviation);
  }
  // [columns, rows] with deviation gain / sqrt(columns), which keeps the size of what goes through it.
  void linear(const std::string& name, std::int64_t columns, std::int64_t rows, float gain = 1) {
    matrix(name, {columns, rows}, gain / std::sqrt(static_cast<float>(columns)));
  }
  void vector(const std::string& name, std::int64_t size, float mean, float deviation) {
    add(name, GGML_TYPE_F32, {size}, mean, deviation);
  }
  void norm(const std::string& name, std::int64_t size) { vector(name, size, 1, 0.2f); }
  void bias(const std::string& name, std::int64_t size) { vector(name, size, 0, 0.2f); }
  // A layer norm's scale and shift; a linear layer with a bias.
  void layer_norm(const std::string& name, std::int64_t size) {
    norm(name + ".weight", size);
    bias(name + ".bias", size);
  }
  void affine(const std::string& name, std::int64_t columns, std::int64_t rows, float gain = 1) {
    linear(name + ".weight", columns, rows, gain);
    bias(name + ".bias", rows);
  }

 private:
  // Large tensors repeat a pool of whole blocks. Its size in blocks is a prime, so that rows begin at other blocks of
  // it each time around.
  void add(const std::string& name, ggml_type type, const std::vector<std::int64_t>& extents, float mean,
           float deviation) {
    const std::int64_t unit = std::max<std::int64_t>(32, ggml_blck_size(type));
    const std::int64_t count = product(extents), pool = std::min(count, unit * (unit > 32 ? 8191 : 65537));
    file_.add(name, type, extents, [=, seed = seed_](const Sink& sink) {
      Random random(seed, name);
      std::vector<float> values(static_cast<std::size_t>(pool));
      // In double, where the product is exact, so that a fused multiply-add gives the same.
      for (float& value : values)
        value = static_cast<float>(double{mean} + double{deviation} * double{random.normal()});
      const std::int64_t block = ggml_blck_size(type);
      std::vector<char> bytes(ggml_row_size(type, pool));
      ggml_quantize_chunk(type, values.data(), bytes.data(), 0, pool / block, block, nullptr);
      for (std::size_t left = ggml_row_size(type, count); left != 0;) {
        const std::size_t some = std::min(left, bytes.size());
        sink(bytes.data(), some);
        left -= some;
      }
    });
  }

  Writer& file_;
  std::uint64_t seed_;
  ggml_type type_;
};

void require(bool holds, const std::string& message) {
  if (!holds) throw std::runtime_error("tiny_gguf: " + message);
}

void check(const LanguageModel& m) {
  const std::string a = m.architecture;
  require(a == "llama" || a == "qwen" || a == "qwen2" || a == "qwen2vl",
          "the architecture is \"" + a + "\" but must be llama, qwen, qwen2 or qwen2vl");
  require(m.layers > 0 && m.hidden > 0 && m.heads > 0 && m.kv_heads > 0 && m.ffn > 0 && m.context > 0,
          "layers, hidden, heads, kv_heads, ffn and context must be at least 1");
  require(m.hidden % m.heads == 0 && m.hidden / m.heads % 2 == 0,
          "hidden is " + std::to_string(m.hidden) + " and heads " + std::to_string(m.heads) +
              ": a head's width must be a whole and even number");
  require(m.heads % m.kv_heads == 0,
          "kv_heads is " + std::to_string(m.kv_heads) + " and must divide heads, " + std::to_string(m.heads));
  require(a != "qwen" || m.heads == m.kv_heads, "qwen has as many kv_heads as heads");
  require(a != "qwen" || !m.tied, "qwen has an output head of its own: tied must be false");
  require(a == "llama" || !m.rope_factors, "only llama has rope_factors");
  require(!ggml_quantize_requires_imatrix(m.type),
          std::string(ggml_type_name(m.type)) + " needs an importance matrix: choose another type");
}

std::uint32_t set_keys(const LanguageModel& m, Writer& file) {
  const auto set = [&](const char* key, auto value) { file.set(m.architecture + "." + key, value); };
  const std::uint32_t head_dim = m.hidden / m.heads;
  file.set("general.architecture", m.architecture);
  file.set("general.name", "random " + m.architecture);
  set("block_count", m.layers);
  set("context_length", m.context);
  set("embedding_length", m.hidden);
  set("feed_forward_length", m.architecture == "qwen" ? 2 * m.ffn : m.ffn);  // qwen's key counts gate and up
  set("attention.head_count", m.heads);
  set("attention.head_count_kv", m.kv_heads);
  set("attention.layer_norm_rms_epsilon", m.rms_eps);
  set("rope.dimension_count", head_dim);
  set("rope.freq_base", m.rope_base);
  if (m.architecture == "qwen2vl") {  // time, row, column; 16, 24, 24 of 64 as Qwen2-VL has it
    const auto half = static_cast<std::int32_t>(head_dim / 2), side = half * 3 / 8;
    set("rope.dimension_sections", std::vector<std::int32_t>{half - 2 * side, side, side, 0});
  }
  if (m.vocabulary_from.empty())
    return m.architecture == "llama" ? set_sentencepiece(file, m.vocabulary) : set_byte_pairs(file, m.vocabulary);
  file.copy_keys(m.vocabulary_from, "tokenizer.");
  return static_cast<std::uint32_t>(file.array_size("tokenizer.ggml.tokens"));
}

}  // namespace

void write(const LanguageModel& m, const std::string& path, const Progress& progress) {
  check(m);
  Writer file;
  const std::uint32_t vocabulary = set_keys(m, file);
  Tensors tensors(file, m.seed, m.type);
  const std::int64_t d = m.hidden, head_dim = m.hidden / m.heads, kv = head_dim * m.kv_heads;
  const float peaked = 1.5f * m.scale;
  const bool biases = m.biases || m.architecture != "llama";

  tensors.matrix("token_embd.weight", {d, vocabulary}, m.scale);
  tensors.norm("output_norm.weight", d);
  if (!m.tied) tensors.linear("output.weight", d, vocabulary, m.scale);
  // Llama 3 divides slow frequencies more than fast ones.
  if (m.rope_factors) tensors.vector("rope_freqs.weight", head_dim / 2, 2, 0.5f);
  for (std::uint32_t layer = 0; layer < m.layers; ++layer) {
    const std::string block = "blk." + std::to_string(layer) + ".";
    tensors.norm(block + "attn_norm.weight", d);
    if (m.architecture == "qwen") {
      tensors.linear(block + "attn_qkv.weight", d, 3 * d, peaked);
      tensors.bias(block + "attn_qkv.bias", 3 * d);
    } else {
      tensors.linear(block + "attn_q.weight", d, d, peaked);
      tensors.linear(block + "attn_k.weight", d, kv, peaked);
      tensors.linear(block + "attn_v.weight", d, kv, m.scale);
      if (biases) {
        tensors.bias(block + "attn_q.bias", d);
        tensors.bias(block + "attn_k.bias", kv);
        tensors.bias(block + "attn_v.bias", kv);
      }
    }
    tensors.linear(block + "attn_output.weight", d, d, m.scale);
    if (m.biases && m.architecture == "llama") tensors.bias(block + "attn_output.bias", d);
    tensors.norm(block + "ffn_norm.weight", d);
    tensors.linear(block + "ffn_gate.weight", d, m.ffn, m.scale);
    tensors.linear(block + "ffn_up.weight", d, m.ffn, m.scale);
    tensors.linear(block + "ffn_down.weight", m.ffn, d, m.scale);
  }
  file.write(path, progress);
}

void write(const VisionModel& m, const std::string& path, const Progress& progress) {
  const bool clip = m.projector == "mlp";
  require(clip || m.projector == "qwen2vl_merger",
          "the projector is \"" + m.projector + "\" but must be mlp or qwen2vl_merger");
  require(m.layers > 0 && m.hidden > 0 && m.heads > 0 && m.ffn > 0 && m.image_size > 0 && m.patch_size > 0 &&
              m.projection > 0,
          "every size must be at least 1");
  require(m.hidden % m.heads == 0, "heads must divide hidden");
  require(clip || m.hidden / m.heads % 4 == 0, "a head of qwen2vl_merger must have a multiple of 4 columns");
  require(m.image_size % m.patch_size == 0, "patch_size must divide image_size");
  // llama.cpp takes a square ffn_down for one with up and down exchanged, as old files have it.
  require(m.ffn != m.hidden, "ffn must differ from hidden");
  Writer file;
  file.set("general.architecture", "clip");
  file.set("general.name", "random " + m.projector);
  file.set("clip.has_vision_encoder", true);
  file.set("clip.projector_type", m.projector);
  const auto set = [&](const char* key, auto value) { file.set(std::string("clip.vision.") + key, value); };
  set("image_size", m.image_size);
  set("patch_size", m.patch_size);
  set("embedding_length", m.hidden);
  set("feed_forward_length", m.ffn);
  set("block_count", m.layers);
  set("projection_dim", m.projection);
  set("attention.head_count", m.heads);
  set("attention.layer_norm_epsilon", 1e-5f);
  set("image_mean", std::vector<float>{0.48145466f, 0.4578275f, 0.40821073f});  // CLIP's
  set("image_std", std::vector<float>{0.26862954f, 0.26130258f, 0.27577711f});

  Tensors tensors(file, m.seed, GGML_TYPE_F32);
  const std::int64_t d = m.hidden, p = m.patch_size, columns = m.image_size / m.patch_size;
  const float patch_deviation = 1 / std::sqrt(static_cast<float>(3 * p * p));
  tensors.matrix("v.patch_embd.weight", {p, p, 3, d}, patch_deviation);
  if (clip) {
    tensors.vector("v.class_embd", d, 0, 1);
    tensors.matrix("v.position_embd.weight", {d, columns * columns + 1}, 1);
    tensors.layer_norm("v.pre_ln", d);
  } else {  // the second frame of two; a picture is both
    tensors.matrix("v.patch_embd.weight.1", {p, p, 3, d}, patch_deviation);
    tensors.layer_norm("v.post_ln", d);
  }
  for (std::uint32_t layer = 0; layer < m.layers; ++layer) {
    const std::string block = "v.blk." + std::to_string(layer) + ".";
    tensors.layer_norm(block + "ln1", d);
    tensors.affine(block + "attn_q", d, d);
    tensors.affine(block + "attn_k", d, d);
    tensors.affine(block + "attn_v", d, d);
    tensors.affine(block + "attn_out", d, d);
    tensors.layer_norm(block + "ln2", d);
    tensors.affine(block + "ffn_up", d, m.ffn);
    tensors.affine(block + "ffn_down", m.ffn, d);
  }
  const std::int64_t merged = clip ? d : 4 * d;
  tensors.affine("mm.0", merged, clip ? m.projection : merged);
  tensors.affine("mm.2", clip ? m.projection : merged, m.projection, 2);
  file.write(path, progress);
}

}  // namespace tiny_gguf

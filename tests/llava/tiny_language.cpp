#include "tiny_tensors.hpp"
#include "tiny_vocabulary.hpp"

namespace tiny_gguf {
namespace {

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

}  // namespace tiny_gguf

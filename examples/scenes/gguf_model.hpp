// The scenes model as llama.cpp's files: a language model and an mmproj file, for llama-mtmd-cli and everything else
// that reads GGUF.
#pragma once

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "../gguf/gguf_writer.hpp"
#include "../reference/tensors.hpp"
#include "words.hpp"

namespace scenes {
namespace detail {

using Shape = std::vector<std::int64_t>;

inline nlohmann::json read_json(const std::string& path) {
  std::ifstream in(path);
  if (!in) throw std::runtime_error("cannot open " + path);
  return nlohmann::json::parse(in);
}

inline std::vector<float> values(const reference::Matrix& m) { return {m.data(), m.data() + m.size()}; }

// A text normaliser of SentencePiece, in its compiled form: which bytes become which string, the longest match first. What
// is not named stays. (A double array whose entries are XORed with the byte read. Here every node has 256 entries of its
// own for its children, from `base` on; entry 0 of them says where the string begins, if the bytes up to it are named.)
inline std::vector<std::uint8_t> normaliser(const std::map<std::string, std::string>& replacements) {
  constexpr std::uint32_t leaf = 1u << 8, value = 1u << 31, block = 256;
  std::vector<std::uint32_t> nodes(2 * block);  // the root, and its children from entry 256 on
  nodes[0] = block << 10;
  std::map<std::string, std::uint32_t> bases = {{"", block}};  // of the bytes read so far
  std::string strings;
  for (const auto& [bytes, replacement] : replacements) {
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      const std::string read = bytes.substr(0, i + 1);
      if (bases.count(read) != 0) continue;
      const auto c = static_cast<unsigned char>(bytes[i]);
      const std::uint32_t node = bases.at(bytes.substr(0, i)) ^ c, base = static_cast<std::uint32_t>(nodes.size());
      nodes.resize(nodes.size() + block);
      nodes[node] = (node ^ base) << 10 | c;
      bases[read] = base;
    }
    const std::uint32_t base = bases.at(bytes);
    const std::uint32_t parent = bases.at(bytes.substr(0, bytes.size() - 1));
    nodes[parent ^ static_cast<unsigned char>(bytes.back())] |= leaf;
    nodes[base] = value | static_cast<std::uint32_t>(strings.size());
    strings += replacement + '\0';
  }
  std::vector<std::uint8_t> out;
  const auto put = [&](std::uint32_t word) {
    for (int shift = 0; shift < 32; shift += 8) out.push_back(static_cast<std::uint8_t>(word >> shift));
  };
  put(static_cast<std::uint32_t>(nodes.size() * 4));
  for (const std::uint32_t node : nodes) put(node);
  out.insert(out.end(), strings.begin(), strings.end());
  return out;
}

// Whole words, split as Vocabulary::encode splits them. SentencePiece's unigram model has words begin with U+2581; the
// normaliser makes letters small, sets blanks around punctuation, and puts the system prompt in the place of the chat
// template's "USER:".
inline void set_vocabulary(gguf::Writer& file, const Vocabulary& vocabulary) {
  std::vector<std::string> tokens;
  std::vector<std::int32_t> types;
  for (int id = 0; id < vocabulary.size(); ++id) {
    const std::string& word = vocabulary.word(id);
    const bool control = word.front() == '<' && word.rfind("<sys", 0) != 0;
    tokens.push_back(control ? word : "\xE2\x96\x81" + word);
    types.push_back(word == "<unk>" ? 2 : control ? 3 : 1);  // unknown, control, normal
  }
  std::map<std::string, std::string> replacements = {{"?", " ? "}, {".", " . "}, {":", " : "},
                                                     {"\n", " "},  {"\t", " "},  {"\r", " "}};
  for (char c = 'A'; c <= 'Z'; ++c) replacements[std::string(1, c)] = std::string(1, static_cast<char>(c - 'A' + 'a'));
  for (const int id : vocabulary.before())
    if (id != vocabulary.begin()) replacements["USER:"] += " " + vocabulary.word(id);
  const auto id = [&](const char* word) { return static_cast<std::uint32_t>(vocabulary.id(word)); };
  file.set("tokenizer.ggml.model", "t5");  // llama.cpp's name of the unigram model
  file.set("tokenizer.ggml.pre", "default");
  file.set("tokenizer.ggml.tokens", tokens);
  file.set("tokenizer.ggml.scores", std::vector<float>(tokens.size(), -1.f));
  file.set("tokenizer.ggml.token_type", types);
  file.set("tokenizer.ggml.precompiled_charsmap", normaliser(replacements));
  file.set("tokenizer.ggml.add_space_prefix", true);
  file.set("tokenizer.ggml.remove_extra_whitespaces", true);
  file.set("tokenizer.ggml.unknown_token_id", id("<unk>"));
  file.set("tokenizer.ggml.bos_token_id", id("<s>"));
  file.set("tokenizer.ggml.eos_token_id", id("</s>"));
  file.set("tokenizer.ggml.padding_token_id", id("<pad>"));
  file.set("tokenizer.ggml.add_bos_token", true);
  file.set("tokenizer.ggml.add_eos_token", false);
  file.set("tokenizer.chat_template", gguf::vicuna_template);  // "USER: ... ASSISTANT:", in small letters to the model
}

// Hugging Face rotates dimension i of a head with i + c / 2, ggml's `llama` 2 i with 2 i + 1: the rows change places.
inline reference::Matrix interleaved(const reference::Matrix& m, Eigen::Index heads) {
  const Eigen::Index c = m.rows() / heads;
  reference::Matrix out(m.rows(), m.cols());
  for (Eigen::Index head = 0; head < heads; ++head)
    for (Eigen::Index i = 0; i < c / 2; ++i)
      for (Eigen::Index half = 0; half < 2; ++half)
        out.row(head * c + 2 * i + half) = m.row(head * c + half * c / 2 + i);
  return out;
}

}  // namespace detail

// folder: config.json, model.safetensors, vocab.txt. type: of the matrices, GGML_TYPE_F16 or, exactly as they were
// published, GGML_TYPE_F32.
inline void write_language_model(const std::string& folder, const std::string& path, ggml_type type) {
  const nlohmann::json config = detail::read_json(folder + "/config.json").at("text_config");
  const reference::Tensors tensors(folder + "/model.safetensors");
  const auto size = [&](const char* field) { return config.at(field).get<std::uint32_t>(); };
  gguf::Writer file;
  file.set("general.architecture", "llama");
  file.set("general.name", "fastv scenes");
  const auto set = [&](const char* key, auto value) { file.set(std::string("llama.") + key, value); };
  const std::uint32_t hidden = size("hidden_size"), heads = size("num_attention_heads");
  const std::uint32_t layers = size("num_hidden_layers"), kv_heads = size("num_key_value_heads");
  set("block_count", layers);
  set("context_length", size("max_position_embeddings"));
  set("embedding_length", hidden);
  set("feed_forward_length", size("intermediate_size"));
  set("vocab_size", size("vocab_size"));
  set("attention.head_count", heads);
  set("attention.head_count_kv", kv_heads);
  set("attention.layer_norm_rms_epsilon", config.at("rms_norm_eps").get<float>());
  set("rope.dimension_count", hidden / heads);
  set("rope.freq_base", config.at("rope_theta").get<float>());
  detail::set_vocabulary(file, Vocabulary(folder + "/vocab.txt"));

  const auto add = [&](const std::string& name, const reference::Matrix& m) {
    file.add(name, type, {m.cols(), m.rows()}, detail::values(m));
  };
  const auto add_norm = [&](const std::string& name, const reference::Matrix& m) {
    file.add(name, GGML_TYPE_F32, {m.size()}, detail::values(m));
  };
  add("token_embd.weight", tensors.matrix("language_model.model.embed_tokens.weight"));
  add_norm("output_norm.weight", tensors.matrix("language_model.model.norm.weight"));
  add("output.weight", tensors.matrix("language_model.lm_head.weight"));
  for (std::uint32_t i = 0; i < layers; ++i) {
    const std::string from = "language_model.model.layers." + std::to_string(i) + ".",
                      to = "blk." + std::to_string(i) + ".";
    const auto weight = [&](const std::string& name) { return tensors.matrix(from + name + ".weight"); };
    add_norm(to + "attn_norm.weight", weight("input_layernorm"));
    add(to + "attn_q.weight", detail::interleaved(weight("self_attn.q_proj"), heads));
    add(to + "attn_k.weight", detail::interleaved(weight("self_attn.k_proj"), kv_heads));
    add(to + "attn_v.weight", weight("self_attn.v_proj"));
    add(to + "attn_output.weight", weight("self_attn.o_proj"));
    add_norm(to + "ffn_norm.weight", weight("post_attention_layernorm"));
    add(to + "ffn_gate.weight", weight("mlp.gate_proj"));
    add(to + "ffn_up.weight", weight("mlp.up_proj"));
    add(to + "ffn_down.weight", weight("mlp.down_proj"));
  }
  file.write(path);
}

// Where a reader of the file sets the class token among the patches, and so which position it gives it.
//
// llama.cpp sets it behind them since its graphs were rewritten in 2025 (ggml-org/llama.cpp#25814; v0.5.0 does), but
// goes on to take tokens 1 and up for the patches: the decoder never gets patch 0, visual token i is patch i + 1, and
// the last one is the class token. Everything else in the tower is exact if the positions in the file follow that
// order. A reader without that defect wants them as they were taught.
enum class ClassToken { first, last };

// The vision tower and the projector.
inline void write_vision(const std::string& folder, const std::string& path, ggml_type type,
                         ClassToken class_token = ClassToken::last) {
  const nlohmann::json config = detail::read_json(folder + "/config.json"), vision = config.at("vision_config");
  const nlohmann::json preprocessor = detail::read_json(folder + "/preprocessor_config.json");
  const reference::Tensors tensors(folder + "/model.safetensors");
  const auto size = [&](const char* field) { return vision.at(field).get<std::uint32_t>(); };
  gguf::Writer file;
  file.set("general.architecture", "clip");
  file.set("general.name", "fastv scenes");
  file.set("clip.has_vision_encoder", true);
  file.set("clip.projector_type", "mlp");
  const auto set = [&](const char* key, auto value) { file.set(std::string("clip.vision.") + key, value); };
  const std::uint32_t layers = size("num_hidden_layers"), hidden = size("hidden_size"), patch = size("patch_size");
  set("image_size", size("image_size"));
  set("patch_size", patch);
  set("embedding_length", hidden);
  set("feed_forward_length", size("intermediate_size"));
  set("block_count", layers);
  set("projection_dim", config.at("text_config").at("hidden_size").get<std::uint32_t>());
  set("feature_layer", std::vector<std::int32_t>{static_cast<std::int32_t>(layers)});  // what the projector reads
  set("attention.head_count", size("num_attention_heads"));
  set("attention.layer_norm_epsilon", vision.at("layer_norm_eps").get<float>());
  set("image_mean", preprocessor.at("image_mean").get<std::vector<float>>());
  set("image_std", preprocessor.at("image_std").get<std::vector<float>>());

  const std::string tower = "vision_tower.vision_model.";
  const auto add_vector = [&](const std::string& name, const std::string& from) {
    const reference::Matrix m = tensors.matrix(from);
    file.add(name, GGML_TYPE_F32, {m.size()}, detail::values(m));
  };
  const auto add_norm = [&](const std::string& name, const std::string& from) {
    add_vector(name + ".weight", from + ".weight");
    add_vector(name + ".bias", from + ".bias");
  };
  const auto add_affine = [&](const std::string& name, const std::string& from) {
    const reference::Matrix m = tensors.matrix(from + ".weight");
    file.add(name + ".weight", type, {m.cols(), m.rows()}, detail::values(m));
    add_vector(name + ".bias", from + ".bias");
  };
  const std::int64_t p = patch, d = hidden;
  file.add("v.patch_embd.weight", GGML_TYPE_F32, {p, p, 3, d},
           detail::values(tensors.matrix(tower + "embeddings.patch_embedding.weight")));
  add_vector("v.class_embd", tower + "embeddings.class_embedding");
  const reference::Matrix taught = tensors.matrix(tower + "embeddings.position_embedding.weight");  // class token first
  reference::Matrix positions = taught;
  if (class_token == ClassToken::last) {
    const Eigen::Index patches = taught.rows() - 1;
    positions.topRows(patches) = taught.bottomRows(patches);
    positions.row(patches) = taught.row(0);
  }
  file.add("v.position_embd.weight", GGML_TYPE_F32, {positions.cols(), positions.rows()}, detail::values(positions));
  add_norm("v.pre_ln", tower + "pre_layrnorm");  // sic
  for (std::uint32_t i = 0; i < layers; ++i) {
    const std::string from = tower + "encoder.layers." + std::to_string(i) + ".",
                      to = "v.blk." + std::to_string(i) + ".";
    add_norm(to + "ln1", from + "layer_norm1");
    add_affine(to + "attn_q", from + "self_attn.q_proj");
    add_affine(to + "attn_k", from + "self_attn.k_proj");
    add_affine(to + "attn_v", from + "self_attn.v_proj");
    add_affine(to + "attn_out", from + "self_attn.out_proj");
    add_norm(to + "ln2", from + "layer_norm2");
    add_affine(to + "ffn_up", from + "mlp.fc1");
    add_affine(to + "ffn_down", from + "mlp.fc2");
  }
  add_affine("mm.0", "multi_modal_projector.linear_1");
  add_affine("mm.2", "multi_modal_projector.linear_2");
  file.write(path);
}

}  // namespace scenes

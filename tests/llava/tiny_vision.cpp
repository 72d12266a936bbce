#include "tiny_tensors.hpp"

namespace tiny_gguf {

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

#include "tiny_tensors.hpp"

namespace tiny_gguf {
namespace {

// What a tower has beyond patches, attention and an FFN. Where nothing is said: layer norms, quick GELU.
enum Trait : unsigned {
  rms_norms = 1,           // in the tower
  gelu = 1 << 1,           // in the FFN of a layer
  silu_gate = 1 << 2,      // the FFN has a gate, through SiLU
  second_frame = 1 << 3,   // patches of two frames; a picture is both
  flat_patches = 1 << 4,   // the patches' matrix has two extents, not four
  patch_bias = 1 << 5,     //
  patch_norm = 1 << 6,     // an RMS norm of what the patches give
  class_token = 1 << 7,    // one more state, which no token is made of
  positions = 1 << 8,      // learnt, one for each patch of image_size pixels (and the class token)
  position_grid = 1 << 9,  // learnt for 70 x 70 places, whatever the size
  pre_norm = 1 << 10,      // before the layers
  post_norm = 1 << 11,     // behind them
  fused_qkv = 1 << 12,     //
  layer_scales = 1 << 13,  //
  windows = 1 << 14,       // attention in windows of 112 pixels in every other layer
  rotates = 1 << 15,       // rows and columns rotate a quarter of a head each
  one_size = 1 << 16,      // pictures and tiles have image_size pixels a side: patches beyond whole tokens were lost
  merges_two = 1 << 17,    // llama.cpp knows no other merge
  tiled = 1 << 18,         // the number of tiles is in the file
  preproc_side = 1 << 19,  // the longer side of a picture that is cut into tiles is in the file
  pixel_limits = 1 << 20,  // the file says how many pixels a picture has: 8 to 64 tokens of them
  heads_of_128 = 1 << 21,  // the projector has attention with heads as wide as that
};

enum class Kind {
  affine,       // columns -> rows with a bias
  linear,       // without one
  transposed,   // stored the other way round
  layer_norm,   // of `columns`
  norm,         // its scale only
  rows,         // embeddings; the name stands as it is
  convolution,  // of side x side x columns, with a bias
};

struct Part {
  Kind kind;
  const char* name;
  std::int64_t columns, rows = 1;
  float gain = 1;
  std::int64_t side = 1;
};

struct Description {
  Projector projector;
  unsigned traits;
  const char* merge_key;  // nullptr: llama.cpp does not ask
  std::vector<Part> parts;
};

// All that distinguishes the projectors, for one model's sizes. The last part of each has gain 2: about the size that
// embeddings of words have.
std::vector<Description> descriptions(const VisionModel& m) {
  const std::int64_t d = m.hidden, out = m.projection, merged = d * m.merge * m.merge, f = m.ffn;
  const std::int64_t patches = m.patch_size == 0 ? 0 : m.image_size / m.patch_size * (m.image_size / m.patch_size);
  const char *const scale = "projector.scale_factor", *const spatial = "spatial_merge_size";
  const unsigned siglip = gelu | patch_bias | positions | post_norm;
  using K = Kind;
  const std::vector<Part> qwen = {{K::affine, "mm.0", merged, merged}, {K::affine, "mm.2", merged, out, 2}};
  return {
      // LLaVA-1.5: CLIP and two linear layers.
      {{"mlp", "llama", {}},
       class_token | positions | pre_norm,
       nullptr,
       {{K::affine, "mm.0", d, out}, {K::affine, "mm.2", out, out, 2}}},
      {{"qwen2vl_merger", "qwen2vl", {}}, second_frame | post_norm | rotates | merges_two, nullptr, qwen},
      {{"qwen2.5vl_merger", "qwen2vl", {}},
       rms_norms | silu_gate | second_frame | post_norm | windows | rotates | merges_two,
       nullptr,
       qwen},
      {{"qwen3vl_merger", "qwen2vl", {}},
       gelu | second_frame | patch_bias | positions | post_norm | fused_qkv | rotates | merges_two,
       spatial,
       qwen},
      {{"gemma3", "llama", {"<start_of_image>", "<end_of_image>"}},
       siglip | one_size,
       scale,
       {{K::norm, "mm.soft_emb_norm", d}, {K::transposed, "mm.input_projection", d, out, 2}}},
      {{"internvl", "qwen2", {"<img>", "</img>"}},
       gelu | patch_bias | class_token | positions | layer_scales | one_size | tiled,
       scale,
       {{K::layer_norm, "mm.model.mlp.0", merged},
        {K::affine, "mm.model.mlp.1", merged, out},
        {K::affine, "mm.model.mlp.3", out, out, 2}}},
      // SmolVLM. Its markers are looked up, not split, so a vocabulary without them does not do.
      {{"idefics3", "llama", {"\n\n", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>"}},
       siglip | one_size | preproc_side,
       scale,
       {{K::linear, "mm.model.fc", merged, out, 2}}},
      // With the patch merger that Mistral Small 3.1 has.
      {{"pixtral", "llama", {"[IMG_END]"}},
       rms_norms | silu_gate | pre_norm | rotates,
       spatial,
       {{K::rows, "v.token_embd.img_break", out},
        {K::norm, "mm.input_norm", d},
        {K::linear, "mm.patch_merger", merged, d},
        {K::affine, "mm.1", d, out},
        {K::affine, "mm.2", out, out, 2}}},
      // MiniCPM-V. The positions of keys are asked for and not used.
      {{"resampler", "qwen2", {"<image>", "</image>", "<slice>", "</slice>"}},
       gelu | patch_bias | position_grid | post_norm | heads_of_128,
       nullptr,
       {{K::rows, "resampler.pos_embed_k", out, patches},
        {K::rows, "resampler.query", out, m.queries},
        {K::linear, "resampler.kv", d, out},
        {K::affine, "resampler.attn.q", out, out},
        {K::affine, "resampler.attn.k", out, out},
        {K::affine, "resampler.attn.v", out, out},
        {K::affine, "resampler.attn.out", out, out},
        {K::layer_norm, "resampler.ln_q", out},
        {K::layer_norm, "resampler.ln_kv", out},
        {K::layer_norm, "resampler.ln_post", out},
        {K::linear, "resampler.proj", out, out, 2}}},
      {{"glm4v", "qwen2vl", {"<|begin_of_image|>", "<|end_of_image|>"}},
       rms_norms | silu_gate | second_frame | patch_bias | patch_norm | positions | post_norm | rotates | merges_two,
       spatial,
       {{K::convolution, "mm.patch_merger", d, out, 1, 2},
        {K::linear, "mm.model.fc", out, out},
        {K::layer_norm, "mm.post_norm", out},
        {K::linear, "mm.up", out, f},
        {K::linear, "mm.gate", out, f},
        {K::linear, "mm.down", f, out, 2}}},
      {{"lfm2", "llama", {"<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"}},
       siglip,
       scale,
       {{K::layer_norm, "mm.input_norm", merged}, {K::affine, "mm.1", merged, out}, {K::affine, "mm.2", out, out, 2}}},
      {{"kimivl", "llama", {"<|media_start|>", "<|media_end|>"}},
       siglip | rotates,
       scale,
       {{K::layer_norm, "mm.input_norm", d}, {K::affine, "mm.1", merged, merged}, {K::affine, "mm.2", merged, out, 2}}},
      {{"llama4", "llama", {"<|image_start|>", "<|image_end|>"}},
       gelu | flat_patches | class_token | positions | pre_norm | post_norm | rotates | one_size,
       scale,
       {{K::linear, "mm.model.mlp.1", merged, out},
        {K::linear, "mm.model.mlp.2", out, out},
        {K::linear, "mm.model.fc", out, out, 2}}},
      {{"janus_pro", "llama", {}}, siglip, nullptr, {{K::affine, "mm.0", d, out}, {K::affine, "mm.1", out, out, 2}}},
      {{"hunyuanvl", "qwen2vl", {"<｜hy_place▁holder▁no▁100｜>", "<｜hy_place▁holder▁no▁101｜>"}},
       gelu | patch_bias | positions | post_norm | merges_two | pixel_limits,
       spatial,
       {{K::norm, "mm.pre_norm", d},
        {K::convolution, "mm.0", d, 2 * d, 1, 2},
        {K::convolution, "mm.2", 2 * d, 4 * d},
        {K::rows, "v.image_newline", 4 * d},
        {K::affine, "mm.model.fc", 4 * d, out},
        {K::rows, "mm.image_begin", out},
        {K::rows, "mm.image_end", out},
        {K::norm, "mm.post_norm", out}}},
      {{"phi4", "llama", {}},
       siglip | pixel_limits,
       nullptr,
       {{K::affine, "mm.0", d, out}, {K::affine, "mm.2", out, out, 2}}},
  };
}

Description described(const VisionModel& m) {
  std::string names;
  for (const Description& one : descriptions(m)) {
    if (one.projector.name == m.projector) return one;
    names += (names.empty() ? "" : ", ") + one.projector.name;
  }
  throw std::runtime_error("tiny_gguf: the projector is \"" + m.projector + "\" but must be one of " + names);
}

void check(const VisionModel& m, const Description& of) {
  const auto has = [&](unsigned traits) { return (of.traits & traits) != 0; };
  require(m.layers > 0 && m.hidden > 0 && m.heads > 0 && m.ffn > 0 && m.image_size > 0 && m.patch_size > 0 &&
              m.projection > 0 && m.merge > 0 && m.queries > 0 && m.tiles > 0,
          "every size must be at least 1");
  require(m.hidden % m.heads == 0, "heads must divide hidden");
  require(!has(rotates) || m.hidden / m.heads % 4 == 0,
          "a head of " + m.projector + " must have a multiple of 4 columns");
  require(m.image_size % m.patch_size == 0, "patch_size must divide image_size");
  // llama.cpp takes a square ffn_down for one with up and down exchanged, as old files have it.
  require(m.ffn != m.hidden, "ffn must differ from hidden");
  require(!has(merges_two) || m.merge == 2,
          "merge is " + std::to_string(m.merge) + " but " + m.projector + " merges 2 x 2 patches: leave it 2");
  require(!has(one_size) || m.image_size / m.patch_size % m.merge == 0,
          "merge is " + std::to_string(m.merge) + " and must divide the patches of a side, " +
              std::to_string(m.image_size / m.patch_size));
  require((m.projector != "lfm2" && m.projector != "kimivl" && m.projector != "idefics3") || m.merge > 1,
          "merge is 1 but llama.cpp runs " + m.projector + " with at least 2");
  require(!has(heads_of_128) || m.projection % 128 == 0, "projection is " + std::to_string(m.projection) +
                                                             " but the heads of " + m.projector +
                                                             " are 128 wide: choose a multiple of it");
  require(
      m.projector != "qwen3vl_merger" || m.deepstack <= m.layers,
      "deepstack is " + std::to_string(m.deepstack) + " but there are only " + std::to_string(m.layers) + " layers");
}

void set_keys(const VisionModel& m, const Description& of, Writer& file) {
  const auto has = [&](unsigned traits) { return (of.traits & traits) != 0; };
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
  if (has(gelu)) file.set("clip.use_gelu", true);
  if (has(silu_gate)) file.set("clip.use_silu", true);
  if (of.merge_key != nullptr) set(of.merge_key, m.merge);
  if (has(windows)) set("n_wa_pattern", std::uint32_t{2});
  if (has(preproc_side)) set("preproc_image_size", m.tiles * m.image_size);
  if (has(tiled)) {
    set("preproc_min_tiles", std::uint32_t{1});
    set("preproc_max_tiles", m.tiles);
  }
  if (has(pixel_limits)) {
    const std::uint32_t side = m.patch_size * (of.merge_key == nullptr ? 1 : m.merge);
    set("image_min_pixels", 8 * side * side);
    set("image_max_pixels", 64 * side * side);
  }
  if (has(heads_of_128)) file.set("clip.minicpmv_query_num", m.queries);
}

void add(Tensors& tensors, const Part& part) {
  const std::string name = part.name;
  const std::int64_t columns = part.columns, rows = part.rows;
  const float deviation = part.gain / std::sqrt(static_cast<float>(columns * part.side * part.side));
  switch (part.kind) {
    case Kind::affine: return tensors.affine(name, columns, rows, part.gain);
    case Kind::linear: return tensors.linear(name + ".weight", columns, rows, part.gain);
    case Kind::transposed: return tensors.matrix(name + ".weight", {rows, columns}, deviation);
    case Kind::layer_norm: return tensors.layer_norm(name, columns);
    case Kind::norm: return tensors.norm(name + ".weight", columns);
    case Kind::rows: return tensors.matrix(name, {columns, rows}, 1);
    case Kind::convolution:
      tensors.matrix(name + ".weight", {part.side, part.side, columns, rows}, deviation);
      return tensors.bias(name + ".bias", rows);
  }
}

// Patches, positions and what else comes before the layers.
void add_input(const VisionModel& m, const Description& of, Tensors& tensors) {
  const auto has = [&](unsigned traits) { return (of.traits & traits) != 0; };
  const std::int64_t d = m.hidden, p = m.patch_size, columns = m.image_size / m.patch_size;
  const float deviation = 1 / std::sqrt(static_cast<float>(3 * p * p));
  if (has(flat_patches))
    tensors.matrix("v.patch_embd.weight", {3 * p * p, d}, deviation);
  else
    tensors.matrix("v.patch_embd.weight", {p, p, 3, d}, deviation);
  if (has(second_frame)) tensors.matrix("v.patch_embd.weight.1", {p, p, 3, d}, deviation);
  if (has(patch_bias)) tensors.bias("v.patch_embd.bias", d);
  if (has(patch_norm)) tensors.norm("v.norm_embd.weight", d);
  if (has(class_token)) tensors.vector("v.class_embd", d, 0, 1);
  const std::int64_t places = columns * columns + (has(class_token) ? 1 : 0);
  if (has(positions | position_grid))
    tensors.matrix("v.position_embd.weight", {d, has(position_grid) ? 70 * 70 : places}, 1);
}

}  // namespace

std::vector<Projector> projectors() {
  std::vector<Projector> out;
  for (Description& one : descriptions({})) out.push_back(std::move(one.projector));
  return out;
}

void write(const VisionModel& m, const std::string& path, const Progress& progress) {
  const Description of = described(m);
  check(m, of);
  const auto has = [&](unsigned traits) { return (of.traits & traits) != 0; };
  Writer file;
  set_keys(m, of, file);

  Tensors tensors(file, m.seed, GGML_TYPE_F32);
  const std::int64_t d = m.hidden;
  const auto norm = [&](const std::string& name) {
    has(rms_norms) ? tensors.norm(name + ".weight", d) : tensors.layer_norm(name, d);
  };
  add_input(m, of, tensors);
  if (has(pre_norm)) norm("v.pre_ln");
  if (has(post_norm)) norm("v.post_ln");
  for (std::uint32_t layer = 0; layer < m.layers; ++layer) {
    const std::string block = "v.blk." + std::to_string(layer) + ".";
    norm(block + "ln1");
    if (has(fused_qkv)) {
      tensors.affine(block + "attn_qkv", d, 3 * d);
    } else {
      tensors.affine(block + "attn_q", d, d);
      tensors.affine(block + "attn_k", d, d);
      tensors.affine(block + "attn_v", d, d);
    }
    tensors.affine(block + "attn_out", d, d);
    norm(block + "ln2");
    tensors.affine(block + "ffn_up", d, m.ffn);
    if (has(silu_gate)) tensors.affine(block + "ffn_gate", d, m.ffn);
    tensors.affine(block + "ffn_down", m.ffn, d);
    if (has(layer_scales)) {
      tensors.norm(block + "ls1.weight", d);
      tensors.norm(block + "ls2.weight", d);
    }
  }
  for (const Part& part : of.parts) add(tensors, part);
  if (m.projector == "qwen3vl_merger") {
    for (std::uint32_t i = 0; i < m.deepstack; ++i) {  // at even distances, as 8, 16 and 24 of 27 layers are
      const std::string block = "v.deepstack." + std::to_string((i + 1) * m.layers / (m.deepstack + 1)) + ".";
      tensors.layer_norm(block + "norm", 4 * d);
      tensors.affine(block + "fc1", 4 * d, 4 * d);
      tensors.affine(block + "fc2", 4 * d, m.projection, 2);
    }
  }
  file.write(path, progress);
}

}  // namespace tiny_gguf

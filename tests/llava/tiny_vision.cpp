#include "tiny_tensors.hpp"

namespace tiny_gguf {
namespace {

// What a tower has beyond patches, attention and an FFN, and what llama.cpp reads from its file or assumes. Where nothing
// is said: layer norms and quick GELU.
enum Trait : unsigned {
  rms_norms = 1,          // in the tower
  gelu = 1 << 1,          // in the FFN of a layer
  silu = 1 << 2,          // the same
  gate = 1 << 3,          // the FFN has one
  no_patches = 1 << 4,    // states come from elsewhere
  flat_patches = 1 << 5,  // the patches' matrix has two extents, not four
  second_frame = 1 << 6,  // patches of two frames; a picture is both
  patch_bias = 1 << 7,
  class_token = 1 << 8,  // one more state, which no token is made of
  positions = 1 << 9,    // learnt, one for each patch of image_size pixels and for the class token
  pre_norm = 1 << 10,    // before the layers
  post_norm = 1 << 11,   // behind them
  fused_qkv = 1 << 12,
  layer_scales = 1 << 13,
  windows = 1 << 14,        // attention in windows of 112 pixels in every other layer
  rotates = 1 << 15,        // rows and columns rotate half a head each
  one_size = 1 << 16,       // pictures or tiles have image_size pixels a side: a token must have all its patches there
  merges_two = 1 << 17,     // llama.cpp knows no other merge
  merges_some = 1 << 18,    // llama.cpp knows no merge of 1
  key_tiles = 1 << 19,      // the file says how many tiles a picture may have
  key_longest = 1 << 20,    // the file says how long the longer side of a picture is, cut into tiles or not
  key_pixels = 1 << 21,     // the file says how many pixels a picture has: 8 to 64 tokens of them
  key_kv_heads = 1 << 22,   // the file says how many heads keys have
  key_pinpoints = 1 << 23,  // the file may list sizes that a picture is cut into tiles of
  sinks = 1 << 24           // each head has a logit that takes part in the softmax and has no value
};

enum class Kind {
  affine,       // columns -> rows with a bias
  linear,       // without one
  transposed,   // stored the other way round
  layer_norm,   // of `columns`
  norm,         // its scale only
  rows,         // embeddings; here and in planes the name stands as it is
  planes,       // columns x side x rows of them
  filters,      // side x side x columns -> rows
  convolution,  // with a bias
};

struct Part {
  Kind kind;
  std::string name;
  std::int64_t columns, rows = 1;
  float gain = 1;
  std::int64_t side = 1;
};
using Parts = std::vector<Part>;

Parts operator+(Parts first, const Parts& then) {
  first.insert(first.end(), then.begin(), then.end());
  return first;
}

struct Description {
  Projector projector;
  unsigned traits;
  const char* merge_key;  // nullptr: the file does not say
  Parts parts;
};

// The first tower of DeepSeek-OCR and its successor: attention between 64 x 64 patches, in windows of 14 x 14 except in the third layer, then
// convolutions to 16 x 16 states of the second. llama.cpp makes every picture 1024 x 1024, and wants that third layer.
constexpr std::int64_t sam_width = 16, sam_layers = 3, sam_window = 14, sam_side = 64;

Parts sam(std::int64_t d) {
  using K = Kind;
  const std::int64_t s = sam_width;
  Parts parts = {{K::convolution, "v.sam.patch_embd", 3, s, 1, 16},
                 {K::planes, "v.sam.pos_embd.weight", s, sam_side, 1, sam_side}};
  for (std::int64_t layer = 0; layer < sam_layers; ++layer) {
    const std::string block = "v.sam.blk." + std::to_string(layer) + ".";
    const std::int64_t distances = 2 * (layer == 2 ? sam_side : sam_window) - 1;
    parts = parts + Parts{{K::layer_norm, block + "pre_ln", s},
                          {K::affine, block + "attn.qkv", s, 3 * s},
                          {K::rows, block + "attn.pos_h.weight", s, distances},
                          {K::rows, block + "attn.pos_w.weight", s, distances},
                          {K::affine, block + "attn.out", s, s},
                          {K::layer_norm, block + "post_ln", s},
                          {K::affine, block + "mlp.lin1", s, 4 * s},
                          {K::affine, block + "mlp.lin2", 4 * s, s}};
  }
  return parts + Parts{{K::filters, "v.sam.neck.0", s, s},          {K::layer_norm, "v.sam.neck.1", s},
                       {K::filters, "v.sam.neck.2", s, s, 1, 3},    {K::layer_norm, "v.sam.neck.3", s},
                       {K::filters, "v.sam.net_2", s, 2 * s, 1, 3}, {K::filters, "v.sam.net_3", 2 * s, d, 1, 3}};
}

// All that distinguishes the projectors, for one model's sizes. The last matrix of each has gain 2: about the size that
// embeddings of words have.
std::vector<Description> descriptions(const VisionModel& m) {
  const std::int64_t d = m.hidden, out = m.projection, merged = d * m.merge * m.merge, f = m.ffn;
  const std::int64_t side = m.patch_size == 0 ? 0 : m.image_size / m.patch_size;
  const std::int64_t p = m.patch_size * m.merge;  // of merged patches
  const char *const scale = "projector.scale_factor", *const spatial = "spatial_merge_size", *const none = nullptr;
  const unsigned siglip = gelu | patch_bias | positions | post_norm;
  using K = Kind;
  const Parts qwen = {{K::affine, "mm.0", merged, merged}, {K::affine, "mm.2", merged, out, 2}};
  const Parts pixtral = {{K::norm, "mm.input_norm", d},
                         {K::linear, "mm.patch_merger", merged, d},
                         {K::affine, "mm.1", d, out},
                         {K::affine, "mm.2", out, out, 2}};
  // The norm comes before patches are merged.
  const Parts kimi = {
      {K::layer_norm, "mm.input_norm", d}, {K::affine, "mm.1", merged, merged}, {K::affine, "mm.2", merged, out, 2}};
  const Parts places_70 = {{K::rows, "v.position_embd.weight", d, 70 * 70}};      // whatever the size
  const Part places_1024 = {K::planes, "v.position_embd.weight", d, 2, 1, 1024};  // in a row, and in a column
  // Two merges, of which a file may have but the second.
  const Parts minicpm = {{K::layer_norm, "mm.input_norm", 4 * d},
                         {K::affine, "mm.up", 4 * d, 4 * d},
                         {K::affine, "mm.down", 4 * d, out, 2}};
  const Parts minicpm_first = {{K::layer_norm, "v.vit_merger.ln1", d},
                               {K::affine, "v.vit_merger.attn_q", d, d},
                               {K::affine, "v.vit_merger.attn_k", d, d},
                               {K::affine, "v.vit_merger.attn_v", d, d},
                               {K::affine, "v.vit_merger.attn_out", d, d},
                               {K::layer_norm, "v.vit_merger.ds_ln", 4 * d},
                               {K::affine, "v.vit_merger.ds_ffn_up", 4 * d, 4 * d},
                               {K::affine, "v.vit_merger.ds_ffn_down", 4 * d, d}};
  return {
      // LLaVA-1.5 (and 1.6, with tiles): CLIP and two linear layers.
      {{"mlp", "llama", {}},
       class_token | positions | pre_norm | key_pinpoints,
       none,
       {{K::affine, "mm.0", d, out}, {K::affine, "mm.2", out, out, 2}}},
      {{"qwen2vl_merger", "qwen2vl", {}}, second_frame | post_norm | rotates | merges_two, none, qwen},
      {{"qwen2.5vl_merger", "qwen2vl", {}},
       rms_norms | silu | gate | second_frame | post_norm | windows | rotates | merges_two,
       none,
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
       gelu | patch_bias | class_token | positions | layer_scales | one_size | key_tiles,
       scale,
       {{K::layer_norm, "mm.model.mlp.0", merged},
        {K::affine, "mm.model.mlp.1", merged, out},
        {K::affine, "mm.model.mlp.3", out, out, 2}}},
      // SmolVLM. Its markers are looked up, not split, so a vocabulary without them does not do.
      {{"idefics3", "llama", {"\n\n", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>"}},
       siglip | one_size | merges_some | key_longest,
       scale,
       {{K::linear, "mm.model.fc", merged, out, 2}}},
      // With the patch merger that Mistral Small 3.1 has.
      {{"pixtral", "llama", {"[IMG_END]"}},
       rms_norms | silu | gate | pre_norm | rotates,
       spatial,
       Parts{{K::rows, "v.token_embd.img_break", out}} + pixtral},
      // MiniCPM-V to 4.5. The positions of keys are asked for and not used.
      {{"resampler", "qwen2", {"<image>", "</image>", "<slice>", "</slice>"}},
       gelu | patch_bias | post_norm,
       none,
       places_70 + Parts{{K::rows, "resampler.pos_embed_k", out, side * side},
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
      {{"minicpmv4_6", "qwen2", {"<image>", "</image>", "<slice>", "</slice>"}},
       gelu | patch_bias | post_norm | one_size | merges_some,
       scale,
       places_70 + (m.merge == 4 ? minicpm_first : Parts{}) + minicpm},
      {{"glm4v", "qwen2vl", {"<|begin_of_image|>", "<|end_of_image|>"}},
       rms_norms | silu | gate | second_frame | patch_bias | positions | post_norm | rotates | merges_two,
       spatial,
       {{K::norm, "v.norm_embd", d},
        {K::convolution, "mm.patch_merger", d, out, 1, 2},
        {K::linear, "mm.model.fc", out, out},
        {K::layer_norm, "mm.post_norm", out},
        {K::linear, "mm.up", out, f},
        {K::linear, "mm.gate", out, f},
        {K::linear, "mm.down", f, out, 2}}},
      {{"lfm2", "llama", {"<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"}},
       siglip | merges_some,
       scale,
       {{K::layer_norm, "mm.input_norm", merged}, {K::affine, "mm.1", merged, out}, {K::affine, "mm.2", out, out, 2}}},
      {{"kimivl", "llama", {"<|media_start|>", "<|media_end|>"}}, siglip | rotates | merges_some, scale, kimi},
      {{"kimik25", "llama", {"<|media_begin|>", "<|media_end|>"}},
       gelu | patch_bias | post_norm | rotates | merges_some,
       scale,
       Parts{{K::planes, "v.position_embd.weight", d, side, 1, side}} + kimi},
      {{"llama4", "llama", {"<|image_start|>", "<|image_end|>"}},
       gelu | flat_patches | class_token | positions | pre_norm | post_norm | rotates | one_size,
       scale,
       {{K::linear, "mm.model.mlp.1", merged, out},
        {K::linear, "mm.model.mlp.2", out, out},
        {K::linear, "mm.model.fc", out, out, 2}}},
      {{"gemma4v", "llama", {"<|image>", "<image|>"}},
       rms_norms | gelu | gate | rotates,
       scale,
       {places_1024, {K::linear, "mm.input_projection", d, out, 2}}},
      // No tower: what stands in the layers is not used.
      {{"gemma4uv", "llama", {"<|image>", "<image|>"}},
       no_patches,
       scale,
       {{K::affine, "v.patch_embd", 3 * p * p, d},
        {K::layer_norm, "v.patch_norm.1", 3 * p * p},
        {K::layer_norm, "v.patch_norm.2", d},
        {K::layer_norm, "v.patch_norm.3", d},
        places_1024,
        {K::linear, "mm.input_projection", d, out, 2}}},
      {{"deepseekocr", "llama", {}},
       no_patches | class_token,
       none,
       sam(d) + Parts{{K::rows, "v.position_embd.weight", d, 16 * 16 + 1},
                      {K::rows, "v.image_newline", out},
                      {K::rows, "v.view_seperator", out},
                      {K::affine, "mm.model.fc", 2 * d, out, 2}}},
      // Behind the states of pictures stand queries, which see them and the queries before.
      {{"deepseekocr2", "llama", {}},
       no_patches | rms_norms | gate | post_norm | key_kv_heads,
       none,
       sam(d) + Parts{{K::rows, "v.resample_query_1024.weight", d, 16 * 16},
                      {K::rows, "v.resample_query_768.weight", d, 12 * 12},
                      {K::rows, "v.view_seperator", out},
                      {K::affine, "mm.model.fc", d, out, 2}}},
      // A block of tokens, pairs of rows interleaved, with more embeddings at its ends and between.
      {{"deepseek4v", "llama", {}},
       rms_norms | silu | gate | post_norm | rotates | key_pixels,
       scale,
       {{K::affine, "mm.1", merged, out},
        {K::affine, "mm.2", out, out, 2},
        {K::rows, "v.image_newline", out},
        {K::rows, "v.token_embd.img_start", out},
        {K::rows, "v.token_embd.img_end", out},
        {K::rows, "v.token_embd.img_pad", out}}},
      {{"janus_pro", "llama", {}}, siglip, none, {{K::affine, "mm.0", d, out}, {K::affine, "mm.1", out, out, 2}}},
      {{"hunyuanvl", "qwen2vl", {"<｜hy_place▁holder▁no▁100｜>", "<｜hy_place▁holder▁no▁101｜>"}},
       siglip | merges_two | key_pixels,
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
       siglip | key_pixels,
       none,
       {{K::affine, "mm.0", d, out}, {K::affine, "mm.2", out, out, 2}}},
      {{"paddleocr", "qwen2vl", {"<|IMAGE_START|>", "<|IMAGE_END|>"}},
       siglip | rotates | merges_two | key_pixels,
       none,
       kimi},
      {{"lightonocr", "qwen2", {}}, rms_norms | silu | gate | pre_norm | rotates | key_longest, spatial, pixtral},
      {{"dots_ocr", "qwen2", {"<|img|>", "<|endofimg|>"}},
       rms_norms | silu | gate | patch_bias | pre_norm | rotates | merges_some | key_pixels,
       scale,
       Parts{{K::norm, "mm.post_norm", d}, {K::layer_norm, "mm.input_norm", d}} + qwen},
      {{"exaone4_5", "qwen2vl", {"<vision>", "</vision>"}},
       rms_norms | silu | gate | second_frame | post_norm | fused_qkv | windows | rotates | merges_two | key_pixels |
           key_kv_heads,
       spatial,
       qwen},
      {{"mimovl", "qwen2vl", {}},
       rms_norms | silu | gate | second_frame | post_norm | fused_qkv | sinks | rotates | merges_two | key_pixels |
           key_kv_heads,
       spatial,
       {{K::linear, "mm.0", merged, merged}, {K::linear, "mm.2", merged, out, 2}}},
      {{"youtuvl", "qwen2vl", {}},
       gelu | flat_patches | patch_bias | post_norm | rotates | merges_two,
       spatial,
       Parts{{K::norm, "mm.input_norm", d}} + qwen},
      {{"muse-glimmer", "llama", {"<|image_start|>", "<|image_end|>"}},
       gelu | patch_bias | positions | pre_norm | post_norm | rotates | merges_two,
       spatial,
       {{K::linear, "mm.0", merged, out}, {K::linear, "mm.1", out, out}, {K::linear, "mm.2", out, out, 2}}},
      {{"minimax_m3", "llama", {"]<]start of image[>[", "]<]end of image[>["}},
       gelu | second_frame | pre_norm | rotates | merges_two,
       spatial,
       {{K::affine, "mm.1", d, out},
        {K::affine, "mm.2", out, out},
        {K::affine, "mm.merger.fc1", 4 * out, out},
        {K::affine, "mm.merger.fc2", out, out, 2}}},
      {{"cogvlm", "llama", {}},
       gelu | patch_bias | class_token | positions | fused_qkv,
       none,
       {{K::linear, "mm.model.fc", d, out},
        {K::layer_norm, "mm.post_fc_norm", out},
        {K::linear, "mm.up", out, f},
        {K::linear, "mm.gate", out, f},
        {K::linear, "mm.down", f, out, 2},
        {K::rows, "v.boi", out},
        {K::rows, "v.eoi", out}}},
      // Four states that no token is made of, without positions.
      {{"nemotron_v2_vl", "llama", {}},
       gelu | patch_bias | positions | fused_qkv | one_size | merges_some,
       scale,
       {{K::rows, "v.class_embd", d, 4},
        {K::norm, "mm.model.mlp.0", merged},
        {K::linear, "mm.model.mlp.1", merged, out},
        {K::linear, "mm.model.mlp.3", out, out, 2}}},
      // GLM-Edge.
      {{"adapter", "llama", {}},
       siglip | one_size | merges_two,
       none,
       {{K::convolution, "adapter.conv", d, out, 1, 2},
        {K::linear, "adapter.linear.linear", out, out},
        {K::layer_norm, "adapter.linear.norm1", out},
        {K::linear, "adapter.linear.dense_h_to_4h", out, f},
        {K::linear, "adapter.linear.gate", out, f},
        {K::linear, "adapter.linear.dense_4h_to_h", f, out, 2},
        {K::rows, "adapter.boi", out},
        {K::rows, "adapter.eoi", out}}},
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
  const std::string merge = "merge is " + std::to_string(m.merge);
  require(m.layers > 0 && m.hidden > 0 && m.heads > 0 && m.ffn > 0 && m.image_size > 0 && m.patch_size > 0 &&
              m.projection > 0 && m.merge > 0 && m.queries > 0 && m.tiles > 0,
          "every size must be at least 1");
  require(m.hidden % m.heads == 0, "heads must divide hidden");
  require(!has(rotates) || m.hidden / m.heads % 4 == 0,
          "a head of " + m.projector + " must have a multiple of 4 columns");
  require(m.image_size % m.patch_size == 0, "patch_size must divide image_size");
  // llama.cpp takes a square ffn_down for one with up and down exchanged, as old files have it.
  require(m.ffn != m.hidden, "ffn must differ from hidden");
  require(!has(merges_two) || m.merge == 2, merge + " but " + m.projector + " merges 2 x 2 patches: leave it 2");
  require(!has(merges_some) || m.merge > 1, merge + " but llama.cpp runs " + m.projector + " with at least 2");
  require(m.projector != "minicpmv4_6" || m.merge == 2 || m.merge == 4,
          merge + " but minicpmv4_6 merges 2 x 2 patches once or twice: choose 2 or 4");
  const std::uint32_t side = m.image_size / m.patch_size;
  require(!has(one_size) || side % m.merge == 0,
          merge + " and must divide the patches of a side, " + std::to_string(side));
  require(m.projector != "resampler" || m.projection % 128 == 0,
          "projection is " + std::to_string(m.projection) +
              " but the heads of resampler are 128 wide: choose a multiple of it");
  require(m.projector != "minimax_m3" || m.hidden / m.heads >= 12,
          "a head of minimax_m3 has " + std::to_string(m.hidden / m.heads) + " columns and must have at least 12");
  require(m.projector == "qwen3vl_merger" ? m.deepstack <= m.layers : m.deepstack == 0,
          "deepstack is " + std::to_string(m.deepstack) + " but must be 0, or of qwen3vl_merger at most layers, " +
              std::to_string(m.layers));
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
  if (has(silu)) file.set("clip.use_silu", true);
  if (of.merge_key != nullptr) set(of.merge_key, m.merge);
  if (has(windows)) set("n_wa_pattern", std::uint32_t{2});
  if (has(key_longest)) set("preproc_image_size", m.tiles * m.image_size);
  if (has(key_tiles)) {
    set("preproc_min_tiles", std::uint32_t{1});
    set("preproc_max_tiles", m.tiles);
  }
  if (has(key_pinpoints) && m.tiles > 1) {
    std::vector<std::int32_t> sizes;
    const auto length = [&](std::uint32_t tiles) { return static_cast<std::int32_t>(tiles * m.image_size); };
    for (std::uint32_t x = 1; x <= m.tiles; ++x)
      for (std::uint32_t y = 1; x * y <= m.tiles; ++y)
        if (x * y > 1) sizes.insert(sizes.end(), {length(x), length(y)});
    set("image_grid_pinpoints", sizes);
  }
  if (has(key_pixels)) {
    const std::uint32_t side = m.patch_size * (has(merges_two) || of.merge_key != nullptr ? m.merge : 1);
    set("image_min_pixels", 8 * side * side);
    set("image_max_pixels", 64 * side * side);
  }
  if (has(key_kv_heads)) set("attention.head_count_kv", m.heads);
  if (m.projector == "resampler") file.set("clip.minicpmv_query_num", m.queries);
  if (m.projector == "minicpmv4_6" && m.merge == 4)  // the layer behind which the first merge is
    set("wa_layer_indexes", std::vector<std::int32_t>{0});
  if (m.projector == "youtuvl") {  // windows of 2 x 2 tokens, but not in the last layer
    set("window_size", 4 * m.patch_size);
    set("wa_layer_indexes", std::vector<std::int32_t>{static_cast<std::int32_t>(m.layers) - 1});
  }
  if (m.projector == "mimovl") {  // near patches of rows, near patches of columns, all
    set("window_size", std::uint32_t{6});
    std::vector<std::int32_t> modes;
    for (std::uint32_t layer = 0; layer < m.layers; ++layer)
      modes.push_back(layer % 3 == 2 ? -1 : static_cast<std::int32_t>(layer % 3));
    set("wa_pattern_mode", modes);
  }
  if (m.projector.rfind("deepseekocr", 0) == 0) {
    set("sam.block_count", static_cast<std::uint32_t>(sam_layers));
    set("sam.head_count", std::uint32_t{1});
    set("sam.embedding_length", static_cast<std::uint32_t>(sam_width));
    set("window_size", static_cast<std::uint32_t>(sam_window));
  }
}

void add(Tensors& tensors, const Part& part) {
  const std::string& name = part.name;
  const std::int64_t columns = part.columns, rows = part.rows, side = part.side;
  const float deviation = part.gain / std::sqrt(static_cast<float>(columns * side * side));
  switch (part.kind) {
    case Kind::affine: return tensors.affine(name, columns, rows, part.gain);
    case Kind::linear: return tensors.linear(name + ".weight", columns, rows, part.gain);
    case Kind::transposed: return tensors.matrix(name + ".weight", {rows, columns}, deviation);
    case Kind::layer_norm: return tensors.layer_norm(name, columns);
    case Kind::norm: return tensors.norm(name + ".weight", columns);
    case Kind::rows: return tensors.matrix(name, {columns, rows}, 1);
    case Kind::planes: return tensors.matrix(name, {columns, side, rows}, 1);
    case Kind::filters: return tensors.matrix(name + ".weight", {side, side, columns, rows}, deviation);
    case Kind::convolution:
      tensors.matrix(name + ".weight", {side, side, columns, rows}, deviation);
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
  else if (!has(no_patches))
    tensors.matrix("v.patch_embd.weight", {p, p, 3, d}, deviation);
  if (has(second_frame)) tensors.matrix("v.patch_embd.weight.1", {p, p, 3, d}, deviation);
  if (has(patch_bias)) tensors.bias("v.patch_embd.bias", d);
  if (has(class_token)) tensors.vector("v.class_embd", d, 0, 1);
  const std::int64_t places = columns * columns + (has(class_token) ? 1 : 0);
  if (has(positions)) tensors.matrix("v.position_embd.weight", {d, places}, 1);
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
    if (has(gate)) tensors.affine(block + "ffn_gate", d, m.ffn);
    tensors.affine(block + "ffn_down", m.ffn, d);
    if (has(sinks)) tensors.vector(block + "attn_sinks", m.heads, 0, 1);
    if (has(layer_scales)) {
      tensors.norm(block + "ls1.weight", d);
      tensors.norm(block + "ls2.weight", d);
    }
  }
  for (const Part& part : of.parts) add(tensors, part);
  for (std::uint32_t i = 0; i < m.deepstack; ++i) {  // at even distances, nearly as Qwen3-VL has them
    const std::string block = "v.deepstack." + std::to_string((i + 1) * m.layers / (m.deepstack + 1)) + ".";
    tensors.layer_norm(block + "norm", 4 * d);
    tensors.affine(block + "fc1", 4 * d, 4 * d);
    tensors.affine(block + "fc2", 4 * d, m.projection, 2);
  }
  file.write(path, progress);
}

}  // namespace tiny_gguf

// Models for llama.cpp that have learnt nothing: language models and vision towers with random weights, written as GGUF
// files. The same specification gives the same file: the random generator is its own and uses integers only. (Types
// that round in blocks, Q4_0 and the like, are rounded by ggml.)
#pragma once

#include <ggml.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace tiny_gguf {

// A decoder. The defaults are a tiny one.
struct LanguageModel {
  std::string architecture = "llama";  // one of architectures()
  std::uint32_t layers = 4, hidden = 64, heads = 4, kv_heads = 4, ffn = 160, context = 4096;
  std::uint32_t window = 16;    // tokens that a layer with a sliding window sees; some architectures fix it
  std::uint32_t deepstack = 0;  // layers behind which a picture's further rows are added; qwen3vl and qwen3vlmoe only
  ggml_type type = GGML_TYPE_F32;  // of the matrices; norms and biases are F32. Rows must be whole blocks of it
  bool biases = false;             // attention biases in `llama`; others have them always or never
  bool tied = false;               // the embeddings are the output head too; in some architectures they always are
  bool rope_factors = false;       // rope_freqs.weight, as Llama 3 has it; `llama` only
  bool per_layer = false;          // embeddings of every layer, as the smallest of Gemma 4 have them; `gemma4` only
  float rms_eps = 1e-5f;           // llama.cpp v0.5.0 runs qwen2vl with 0 whatever stands here
  float rope_base = 10000;
  std::uint64_t seed = 1;
  // Of the matrices: entries have deviation scale / sqrt(columns), those of queries and keys 1.5 times that, so that
  // attention has peaks; embeddings have deviation scale.
  float scale = 1;
  // A GGUF file whose tokenizer is taken over, llama.cpp's models/ggml-vocab-llama-spm.gguf for one. Without it the
  // model has a small vocabulary that splits English text: control tokens, the bytes, letters and some words.
  std::string vocabulary_from;
  std::uint32_t vocabulary = 0;  // the small vocabulary is filled up to this many tokens
};

// What a test has to know of an architecture.
struct ArchitectureFacts {
  std::string name;
  // The kinds of its layers, one letter each; they repeat. f: attention to all that is before, n: the same without
  // positions, w: attention in a sliding window, r: a recurrent layer or a convolution, h: attention and recurrence,
  // x: no more than a feed-forward network.
  std::string kinds;
  std::uint32_t period;         // layers after which they repeat
  std::uint32_t layers;         // enough that layers stand on both sides of a cut behind the second or behind a period
  std::uint32_t position_axes;  // 4 where rows of embeddings have positions of time, row and column (M-RoPE), else 1
};

// The names that LanguageModel::architecture may have: decoders of llama.cpp v0.5.0, all of which have attention.
std::vector<std::string> architectures();
ArchitectureFacts facts(const std::string& architecture);
// A small model of it, with fewer heads of keys than of queries where it can have that.
LanguageModel tiny_model(const std::string& architecture);

// A tokenizer alone, for LanguageModel::vocabulary_from: a small vocabulary with more control tokens, such as the markers
// that a projector puts around its pictures.
struct Tokenizer {
  std::string architecture = "llama";  // llama's kind, or that of qwen2 and its like
  std::vector<std::string> markers;
  std::uint32_t vocabulary = 0;  // filled up to this many tokens
};

// What a projector asks of the language model behind it.
struct Projector {
  std::string name;
  std::string architecture;          // one that fits
  std::vector<std::string> markers;  // tokens around a picture, where the small vocabularies lack them
};

// Those that VisionModel::projector may name.
std::vector<Projector> projectors();

// A vision tower and the projector behind it (an "mmproj" file). Sizes mean the same for every projector, but what becomes
// of a picture is for llama.cpp to say:
// mlp, gemma3, janus_pro, cogvlm, nemotron_v2_vl and adapter make it a square of image_size pixels;
// internvl, llama4, resampler and minicpmv4_6 do so if no side is longer, and else cut it into tiles of image_size too;
// idefics3 always cuts it, beside the whole; lightonocr gives its longer side image_size pixels;
// deepseekocr and deepseekocr2 make it 1024 x 1024, and 273 and 257 tokens;
// the others take any size, rounded to whole tokens, of which most want at least 8 (lfm2: 64, gemma4v and gemma4uv: 70).
struct VisionModel {
  std::string projector = "mlp";  // see projectors()
  std::uint32_t layers = 2, hidden = 48, heads = 4, ffn = 112, image_size = 48, patch_size = 8;
  std::uint32_t projection = 64;  // width of the decoder; a multiple of 128 for resampler
  std::uint64_t seed = 2;
  std::uint32_t merge = 2;      // merge x merge patches make a token, where the projector merges any
  std::uint32_t deepstack = 0;  // layers of qwen3vl_merger that reach the decoder too, if that is qwen3vl (DeepStack)
  std::uint32_t queries = 16;   // tokens a picture of resampler
  // internvl and mlp: into how many tiles a picture may be cut; idefics3 and lightonocr: image_sizes of its longer side.
  std::uint32_t tiles = 1;
};

// Called while a file is being written, with the part that is done: 0 to 1.
using Progress = std::function<void(double)>;

// Write the file. What is wrong with the specification, or with the disk, is a std::runtime_error; no half file stays
// behind. Weights are made in pieces of a few megabytes, which repeat with a period of some two million weights.
void write(const LanguageModel& model, const std::string& path, const Progress& progress = {});
void write(const VisionModel& model, const std::string& path, const Progress& progress = {});
void write(const Tokenizer& tokenizer, const std::string& path);

}  // namespace tiny_gguf

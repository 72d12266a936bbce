// From what a user types and shows to what the decoder reads: tokens by libllama, pictures by libmtmd.
#pragma once

#include <mtmd.h>

#include "album.hpp"

namespace llava {

struct MtmdDeleter {
  void operator()(mtmd_context* context) const { mtmd_free(context); }
  void operator()(mtmd_bitmap* bitmap) const { mtmd_bitmap_free(bitmap); }
  void operator()(mtmd_input_chunks* chunks) const { mtmd_input_chunks_free(chunks); }
};

// Tokens of text, and the text of a token; that of a control token too, such as those that name a box.
std::vector<llama_token> tokens_of(const llama_vocab* vocabulary, const std::string& text, bool begin);
std::string text_of(const llama_vocab* vocabulary, llama_token token);

// The vision tower and projector of an mmproj file.
class Vision {
 public:
  Vision(const std::string& path, const Halves& halves, int threads, bool on_gpu = true);

  // Pictures are centred on a square (LLaVA-1.5), not stretched.
  bool pads_to_square() const { return pads_to_square_; }
  // Patch of a picture's token 0. llama.cpp up to v0.5.0 sets CLIP's class token behind the patches but reads the visual
  // tokens as if it stood in front (github.com/ggml-org/llama.cpp/issues/25814): token i is patch i + 1, and the last is
  // no patch.
  std::size_t first_patch() const { return has_class_token_ ? 1 : 0; }

  // Words with a marker for each picture -> a prompt from position `first` on, with the pictures looked at. begin: of the
  // conversation. progress: share of the pieces. album: keeps the rows, which the prompt then lacks; pictures that are in it
  // are not looked at again.
  Prompt prompt(const std::string& dressed, const std::vector<std::string>& pictures, llama_pos first, bool begin,
                const Progress& progress = {}, Album* album = nullptr) const;

 private:
  std::string path_;
  const Halves& halves_;
  bool pads_to_square_ = false, has_class_token_ = false;
  std::unique_ptr<mtmd_context, MtmdDeleter> context_;
};

// The words with a marker ahead for every picture that they name none for; throws where they name too many.
std::string with_markers(const std::string& words, std::size_t pictures);

// Embeddings that were computed elsewhere, [tokens, width] a picture or frame: the tensors of a safetensors file, in
// the order of their names.
std::vector<std::vector<float>> visual_embeddings(const std::string& path, const Halves& halves);

// Words with a marker for each of the embeddings -> a prompt.
Prompt prompt_from_embeddings(const Halves& halves, const std::string& dressed,
                              const std::vector<std::vector<float>>& pictures, llama_pos first, bool begin);

}  // namespace llava

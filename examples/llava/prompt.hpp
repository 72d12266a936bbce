// From what a user types and shows to what the decoder reads: chat template and tokens by libllama, pictures by
// libmtmd, all put together as one list of embeddings.
#pragma once

#include <llama.h>
#include <mtmd.h>

#include <array>
#include <memory>
#include <string>

#include "engine.hpp"

namespace llava {

struct LlamaModelDeleter {
  void operator()(llama_model* model) const { llama_model_free(model); }
};
struct MtmdDeleter {
  void operator()(mtmd_context* context) const { mtmd_free(context); }
  void operator()(mtmd_bitmap* bitmap) const { mtmd_bitmap_free(bitmap); }
  void operator()(mtmd_input_chunks* chunks) const { mtmd_input_chunks_free(chunks); }
};

// Where a picture stands in the prompt, and how its tokens lie on it.
struct PictureSpan {
  std::size_t first, count;
  std::size_t columns;  // tokens in a row; 0 where they are no grid
  // Patch of token 0. llama.cpp up to v0.5.0 sets CLIP's class token behind the patches but reads the visual tokens as
  // if it stood in front (github.com/ggml-org/llama.cpp/issues/25814): token i is patch i + 1, and the last is no
  // patch.
  std::size_t first_patch = 0;
};

// The vocabulary and the chat template of a model, without its weights.
class Words {
 public:
  explicit Words(const std::string& path);

  const llama_model* model() const { return model_.get(); }
  std::vector<std::int32_t> tokens(const std::string& text, bool begin) const;
  std::string text(std::int32_t token) const;
  bool ends(std::int32_t token) const;  // of generation

  // The user's words as the model was taught to read them. template_name: one that libllama knows ("vicuna", "chatml",
  // ...), "none" for the words as they are, or empty for the model's own.
  std::string dress(const std::string& words, const std::string& template_name) const;

 private:
  std::unique_ptr<llama_model, LlamaModelDeleter> model_;
};

// The vision tower and projector of an mmproj file.
class Eyes {
 public:
  Eyes(const std::string& path, const Words& words, const Shape& shape, int threads);

  struct Picture {
    std::string path;
    std::unique_ptr<mtmd_bitmap, MtmdDeleter> bitmap;
  };
  Picture open(const std::string& path) const;

  // Pictures are centred on a square (LLaVA-1.5), not stretched.
  bool pads_to_square() const { return pads_to_square_; }

  // Words with a marker for each picture -> a prompt, with the pictures looked at. progress: share of the pictures.
  Prompt prompt(const Engine& engine, const Shape& shape, const std::string& dressed,
                const std::vector<Picture>& pictures, std::vector<PictureSpan>& spans,
                const Progress& progress = {}) const;

 private:
  std::string path_;
  bool pads_to_square_ = false, has_class_token_ = false;
  std::unique_ptr<mtmd_context, MtmdDeleter> context_;
};

// What stands for a picture in the words.
const char* picture_marker();

// The words with a marker ahead for every picture that they name none for; throws where they name too many.
std::string with_markers(const std::string& words, std::size_t pictures);

// Embeddings that were computed elsewhere, [tokens, width] a picture or frame: the tensors of a safetensors file, in
// the order of their names.
std::vector<std::vector<float>> visual_embeddings(const std::string& path, const Shape& shape);

// Words with a marker for each of the embeddings -> a prompt.
Prompt prompt_from_embeddings(const Engine& engine, const Words& words, const Shape& shape, const std::string& dressed,
                              const std::vector<std::vector<float>>& pictures, std::vector<PictureSpan>& spans);

}  // namespace llava

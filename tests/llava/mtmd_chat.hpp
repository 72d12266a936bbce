// llama.cpp itself, unmodified, in this process: libmtmd and libllama answer a question about a picture as
// llama-mtmd-cli does with --temp 0. One thread: ggml's threads wait for each other by spinning, which takes seconds on
// a busy machine.
#pragma once

#include <llama.h>
#include <mtmd-helper.h>
#include <mtmd.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

class MtmdChat {
 public:
  MtmdChat(const std::string& model, const std::string& mmproj, int threads = 1) {
    llama_log_set(only_errors, nullptr);
    mtmd_log_set(only_errors, nullptr);
    mtmd_helper_log_set(only_errors, nullptr);
    ggml_backend_load_all();
    model_.reset(llama_model_load_from_file(model.c_str(), llama_model_default_params()));
    if (!model_) throw std::runtime_error("libllama cannot load " + model);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = 1024;
    params.n_threads = params.n_threads_batch = threads;
    context_.reset(llama_init_from_model(model_.get(), params));
    mtmd_context_params vision = mtmd_context_params_default();
    vision.use_gpu = false;
    vision.print_timings = false;
    vision.warmup = false;
    vision.n_threads = threads;
    mtmd_.reset(mtmd_init_from_file(mmproj.c_str(), model_.get(), vision));
    if (!context_ || !mtmd_) throw std::runtime_error("no context for " + model + " and " + mmproj);
  }

  const llama_vocab* vocabulary() const { return llama_model_get_vocab(model_.get()); }

  std::vector<llama_token> tokens(const std::string& text, bool add_special) const {
    std::vector<llama_token> out(text.size() + 8);
    const int count = llama_tokenize(vocabulary(), text.data(), static_cast<int>(text.size()), out.data(),
                                     static_cast<int>(out.size()), add_special, true);
    if (count < 0) throw std::runtime_error("llama_tokenize wants more room");
    out.resize(static_cast<std::size_t>(count));
    return out;
  }

  std::string text(const std::vector<llama_token>& tokens) const {
    std::string out(tokens.size() * 32 + 1, '\0');
    const int count = llama_detokenize(vocabulary(), tokens.data(), static_cast<int>(tokens.size()), out.data(),
                                       static_cast<int>(out.size()), false, false);
    if (count < 0) throw std::runtime_error("llama_detokenize wants more room");
    out.resize(static_cast<std::size_t>(count));
    return out;
  }

  // The words of one turn in the model's own chat template, with the picture ahead of them.
  std::string dressed(const std::string& question) const {
    const std::string words = mtmd_default_marker() + question;
    const llama_chat_message message = {"user", words.c_str()};
    std::string out(words.size() + 256, '\0');
    const int count = llama_chat_apply_template(llama_model_chat_template(model_.get(), nullptr), &message, 1, true,
                                                out.data(), static_cast<int>(out.size()));
    if (count < 0) throw std::runtime_error("llama.cpp does not know the model's chat template");
    out.resize(static_cast<std::size_t>(count));
    return out;
  }

  // What the decoder reads in place of text and picture: token ids, and -1 for each token of the picture.
  std::vector<llama_token> prompt(const std::string& picture, const std::string& question) const {
    std::vector<llama_token> out;
    const Chunks chunks = split(picture, question);
    for (std::size_t i = 0; i < mtmd_input_chunks_size(chunks.get()); ++i) {
      const mtmd_input_chunk* chunk = mtmd_input_chunks_get(chunks.get(), i);
      std::size_t count = 0;
      if (const llama_token* ids = mtmd_input_chunk_get_tokens_text(chunk, &count))
        out.insert(out.end(), ids, ids + count);
      else
        out.insert(out.end(), mtmd_input_chunk_get_n_tokens(chunk), -1);
    }
    return out;
  }

  // The picture's tokens, [tokens, width of the decoder].
  std::vector<float> look(const std::string& picture) const {
    const Chunks chunks = split(picture, "");
    for (std::size_t i = 0; i < mtmd_input_chunks_size(chunks.get()); ++i) {
      const mtmd_input_chunk* chunk = mtmd_input_chunks_get(chunks.get(), i);
      if (mtmd_input_chunk_get_type(chunk) != MTMD_INPUT_CHUNK_TYPE_IMAGE) continue;
      if (mtmd_encode_chunk(mtmd_.get(), chunk) != 0) throw std::runtime_error("libmtmd cannot encode " + picture);
      const float* rows = mtmd_get_output_embd(mtmd_.get());
      return {rows, rows + mtmd_input_chunk_get_n_tokens(chunk) *
                               static_cast<std::size_t>(llama_model_n_embd_inp(model_.get()))};
    }
    throw std::runtime_error("libmtmd makes no picture of " + picture);
  }

  std::string answer(const std::string& picture, const std::string& question, int max_tokens = 16) {
    llama_memory_clear(llama_get_memory(context_.get()), true);
    const Chunks chunks = split(picture, question);
    llama_pos position = 0;
    if (mtmd_helper_eval_chunks(mtmd_.get(), context_.get(), chunks.get(), 0, 0, 512, true, &position) != 0)
      throw std::runtime_error("libmtmd cannot run the prompt");
    std::vector<llama_token> out;
    while (static_cast<int>(out.size()) < max_tokens) {
      const float* logits = llama_get_logits_ith(context_.get(), -1);
      auto token =
          static_cast<llama_token>(std::max_element(logits, logits + llama_vocab_n_tokens(vocabulary())) - logits);
      if (llama_vocab_is_eog(vocabulary(), token)) break;
      out.push_back(token);
      if (llama_decode(context_.get(), llama_batch_get_one(&token, 1)) != 0)
        throw std::runtime_error("llama_decode fails");
    }
    return text(out);
  }

 private:
  struct Free {
    void operator()(llama_model* p) const { llama_model_free(p); }
    void operator()(llama_context* p) const { llama_free(p); }
    void operator()(mtmd_context* p) const { mtmd_free(p); }
    void operator()(mtmd_input_chunks* p) const { mtmd_input_chunks_free(p); }
    void operator()(mtmd_bitmap* p) const { mtmd_bitmap_free(p); }
  };
  using Chunks = std::unique_ptr<mtmd_input_chunks, Free>;

  static void only_errors(ggml_log_level level, const char* text, void*) {
    if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
  }

  Chunks split(const std::string& picture, const std::string& question) const {
    const mtmd_helper_bitmap_wrapper loaded =
        mtmd_helper_bitmap_init_from_file(mtmd_.get(), picture.c_str(), false, mtmd_helper_init_opt_default());
    const std::unique_ptr<mtmd_bitmap, Free> bitmap(loaded.bitmap);
    if (!bitmap) throw std::runtime_error("libmtmd cannot open " + picture);
    const std::string words = dressed(question);
    const mtmd_input_text text = {words.data(), words.size(), true, true};
    Chunks chunks(mtmd_input_chunks_init());
    const mtmd_bitmap* bitmaps[] = {bitmap.get()};
    if (mtmd_tokenize(mtmd_.get(), chunks.get(), &text, bitmaps, 1) != 0)
      throw std::runtime_error("libmtmd cannot split the prompt");
    return chunks;
  }

  std::unique_ptr<llama_model, Free> model_;
  std::unique_ptr<llama_context, Free> context_;
  std::unique_ptr<mtmd_context, Free> mtmd_;
};

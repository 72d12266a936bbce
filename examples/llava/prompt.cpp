#include "prompt.hpp"

#include <gguf.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>

#include "../common/picture.hpp"
#include "../reference/tensors.hpp"

namespace llava {

std::vector<llama_token> tokens_of(const llama_vocab* vocabulary, const std::string& text, bool begin) {
  std::vector<llama_token> tokens(text.size() + 8);
  const auto length = static_cast<std::int32_t>(text.size());
  std::int32_t n = llama_tokenize(vocabulary, text.data(), length, tokens.data(),
                                  static_cast<std::int32_t>(tokens.size()), begin, true);
  if (n < 0) {
    tokens.resize(static_cast<std::size_t>(-n));
    n = llama_tokenize(vocabulary, text.data(), length, tokens.data(), -n, begin, true);
  }
  if (n < 0) throw std::runtime_error("libllama cannot split the prompt into tokens");
  tokens.resize(static_cast<std::size_t>(n));
  return tokens;
}

std::string text_of(const llama_vocab* vocabulary, llama_token token) {
  char piece[256];
  const std::int32_t n = llama_token_to_piece(vocabulary, token, piece, sizeof(piece), 0, true);
  return n > 0 ? std::string(piece, static_cast<std::size_t>(n)) : std::string();
}

std::string with_markers(const std::string& words, std::size_t pictures) {
  const std::string marker = mtmd_default_marker();
  std::size_t named = 0;
  for (std::size_t at = words.find(marker); at != std::string::npos; at = words.find(marker, at + marker.size()))
    ++named;
  if (named > pictures)
    throw std::invalid_argument("the prompt has " + std::to_string(named) + " picture markers but " +
                                std::to_string(pictures) +
                                (pictures == 1 ? " picture was given" : " pictures were given"));
  std::string ahead;
  for (; named < pictures; ++named) ahead += marker;  // as llama-mtmd-cli does
  return ahead + words;
}

namespace {

// positions_of(i): t, y, x and the fourth axis of token i; span: positions that the picture takes up.
template <class PositionsOf>
void add_picture(Prompt& prompt, std::vector<float> rows, std::size_t count, std::size_t columns, std::size_t axes,
                 llama_pos span, PositionsOf positions_of) {
  Piece piece;
  piece.rows = std::move(rows);
  piece.count = count;
  piece.columns = columns;
  piece.positions.resize(axes * count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::array<llama_pos, 4> position = positions_of(i);
    for (std::size_t axis = 0; axis < axes; ++axis) piece.positions[axis * count + i] = position[axis];
  }
  prompt.next_position += span;
  prompt.pieces.push_back(std::move(piece));
}

}  // namespace

Vision::Vision(const std::string& path, const Halves& halves, int threads, bool on_gpu) : path_(path), halves_(halves) {
  {
    const gguf_context_ptr file(gguf_init_from_file(path.c_str(), {true, nullptr}));
    if (!file) throw std::runtime_error(path + ": it is missing or no GGUF file: name the mmproj file of the model");
    const std::int64_t kind = gguf_find_key(file.get(), "clip.projector_type");
    pads_to_square_ = kind >= 0 && gguf_get_kv_type(file.get(), kind) == GGUF_TYPE_STRING &&
                      std::string(gguf_get_val_str(file.get(), kind)) == "mlp";
    has_class_token_ = pads_to_square_ && gguf_find_tensor(file.get(), "v.class_embd") >= 0;
  }
  mtmd_context_params params = mtmd_context_params_default();
  params.use_gpu = on_gpu;
  params.print_timings = false;
  params.warmup = false;
  if (threads > 0) params.n_threads = threads;
  context_.reset(mtmd_init_from_file(path.c_str(), halves.head(), params));
  if (!context_)
    throw std::runtime_error(path + ": libmtmd cannot load it as the mmproj file of " + halves.path() +
                             ": it belongs to another model, or has a projector that this llama.cpp does not know");
  if (!mtmd_support_vision(context_.get())) throw std::runtime_error(path + ": it has no vision encoder");
  if (mtmd_decode_use_mrope(context_.get()) != (halves.position_axes() == 4))
    throw std::runtime_error(path + ": its positions are not the model's: it belongs to another model");
}

Prompt Vision::prompt(const std::string& dressed, const std::vector<std::string>& pictures, llama_pos first, bool begin,
                      const Progress& progress, Album* album) const {
  std::vector<std::unique_ptr<mtmd_bitmap, MtmdDeleter>> bitmaps;
  std::vector<const mtmd_bitmap*> pointers;
  for (std::size_t i = 0; i < pictures.size(); ++i) {
    const common::Picture picture = common::load_picture(pictures[i]);
    bitmaps.emplace_back(mtmd_bitmap_init(static_cast<std::uint32_t>(picture.width),
                                          static_cast<std::uint32_t>(picture.height), picture.pixels.data()));
    mtmd_bitmap_set_id(bitmaps.back().get(), std::to_string(i).c_str());
    pointers.push_back(bitmaps.back().get());
  }
  std::unique_ptr<mtmd_input_chunks, MtmdDeleter> chunks(mtmd_input_chunks_init());
  const mtmd_input_text text{dressed.c_str(), dressed.size(), begin, true};
  if (const std::int32_t status = mtmd_tokenize(context_.get(), chunks.get(), &text, pointers.data(), pointers.size()))
    throw std::runtime_error(status == 1 ? "the chat template dropped a picture: name another with --chat-template"
                                         : "libmtmd cannot prepare the pictures for " + path_);

  Prompt prompt;
  prompt.next_position = first;
  const std::size_t n = mtmd_input_chunks_size(chunks.get()), axes = halves_.position_axes();
  std::string last_picture;
  std::size_t tile = 0;
  for (std::size_t c = 0; c < n; ++c) {
    const mtmd_input_chunk* chunk = mtmd_input_chunks_get(chunks.get(), c);
    if (mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_TEXT) {
      std::size_t count = 0;
      const llama_token* tokens = mtmd_input_chunk_get_tokens_text(chunk, &count);
      prompt.add_text({tokens, tokens + count}, axes);
      continue;
    }
    const char* id = mtmd_input_chunk_get_id(chunk);
    const std::string picture = id == nullptr ? "" : id;
    const bool continues = id != nullptr && last_picture == picture;
    last_picture = picture;
    tile = continues ? tile + 1 : 0;
    const std::size_t count = mtmd_input_chunk_get_n_tokens(chunk);
    const std::string kept_as =
        album == nullptr || picture.empty() ? "" : pictures.at(std::stoul(picture)) + "#" + std::to_string(tile);
    std::vector<float> rows;
    if (kept_as.empty() || !album->has(kept_as)) {
      if (mtmd_encode_chunk(context_.get(), chunk) != 0) throw std::runtime_error("libmtmd cannot look at a picture");
      const float* made = mtmd_get_output_embd(context_.get());
      rows.assign(made, made + count * halves_.input());
      if (!kept_as.empty()) album->keep(kept_as, std::exchange(rows, {}));
    }
    const mtmd_image_tokens* tokens = mtmd_input_chunk_get_tokens_image(chunk);
    const llama_pos at = prompt.next_position;
    const auto position = [&](std::size_t i) { return mtmd_image_tokens_get_decoder_pos(tokens, at, i); };
    // The grid: where M-RoPE says so, by its own columns; else a square, if the count is one.
    std::size_t columns = 0;
    if (axes == 4) {
      for (std::size_t i = 0; i < count; ++i)
        columns = std::max<std::size_t>(columns, position(i).x + 1 - position(0).x);
    } else {
      columns = static_cast<std::size_t>(std::lround(std::sqrt(static_cast<double>(count))));
      if (columns * columns != count) columns = 0;
    }
    if (columns != 0 && count % columns != 0) columns = 0;
    add_picture(prompt, std::move(rows), count, columns, axes, mtmd_input_chunk_get_n_pos(chunk), [&](std::size_t i) {
      if (axes == 1) return std::array<llama_pos, 4>{at + static_cast<llama_pos>(i), 0, 0, 0};
      const mtmd_decoder_pos p = position(i);
      return std::array<llama_pos, 4>{static_cast<llama_pos>(p.t), static_cast<llama_pos>(p.y),
                                      static_cast<llama_pos>(p.x), static_cast<llama_pos>(p.z)};
    });
    prompt.pieces.back().picture = kept_as;
    prompt.pieces.back().continues = continues;
    prompt.pieces.back().causal = !mtmd_decode_use_non_causal(context_.get(), chunk);
    if (progress) progress(static_cast<double>(c + 1) / static_cast<double>(n));
  }
  return prompt;
}

std::vector<std::vector<float>> visual_embeddings(const std::string& path, const Halves& halves) {
  const reference::Tensors tensors(path);
  std::vector<std::vector<float>> pictures;
  for (const std::string& name : tensors.names()) {
    const reference::Matrix rows = tensors.matrix(name);
    if (rows.cols() != static_cast<Eigen::Index>(halves.input()) || rows.rows() == 0)
      throw std::invalid_argument(path + ": the tensor " + name + " is " + std::to_string(rows.rows()) + " x " +
                                  std::to_string(rows.cols()) + " but the model reads tokens that are " +
                                  std::to_string(halves.input()) + " wide: give [tokens, width]");
    pictures.emplace_back(rows.data(), rows.data() + rows.size());
  }
  if (pictures.empty()) throw std::invalid_argument(path + " has no tensors: give one [tokens, width] a picture");
  return pictures;
}

Prompt prompt_from_embeddings(const Halves& halves, const std::string& dressed,
                              const std::vector<std::vector<float>>& pictures, llama_pos first, bool begin) {
  const std::size_t axes = halves.position_axes();
  Prompt prompt;
  prompt.next_position = first;
  const std::string marker = mtmd_default_marker();
  std::size_t at = 0;
  for (std::size_t i = 0; i <= pictures.size(); ++i) {
    const std::size_t end = i < pictures.size() ? dressed.find(marker, at) : dressed.size();
    if (end == std::string::npos)
      throw std::runtime_error("the chat template dropped a picture: name another with --chat-template");
    if (end > at || i == 0)
      prompt.add_text(tokens_of(halves.vocabulary(), dressed.substr(at, end - at), begin && i == 0), axes);
    at = end + marker.size();
    if (i == pictures.size()) break;
    const std::size_t count = pictures[i].size() / halves.input();
    const auto side = static_cast<std::size_t>(std::lround(std::sqrt(static_cast<double>(count))));
    const std::size_t columns = side * side == count ? side : 0;
    if (axes == 4 && columns == 0)
      throw std::invalid_argument("picture " + std::to_string(i) + " has " + std::to_string(count) +
                                  " tokens, which are no square grid: this model's positions need one");
    const llama_pos from = prompt.next_position;
    add_picture(prompt, pictures[i], count, columns, axes, static_cast<llama_pos>(axes == 4 ? columns : count),
                [&](std::size_t token) {
                  if (axes == 1) return std::array<llama_pos, 4>{from + static_cast<llama_pos>(token), 0, 0, 0};
                  return std::array<llama_pos, 4>{from, from + static_cast<llama_pos>(token / columns),
                                                  from + static_cast<llama_pos>(token % columns), 0};
                });
  }
  return prompt;
}

}  // namespace llava

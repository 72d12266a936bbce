#include "prompt.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "../common/picture.hpp"
#include "../reference/tensors.hpp"

namespace llava {

namespace {

// Puts pieces of a prompt one behind the other.
class Assembly {
 public:
  Assembly(const Engine& engine, const Shape& shape) : engine_(engine), shape_(shape) {}

  void text(const std::vector<std::int32_t>& tokens) {
    const std::vector<float> rows = engine_.embed(tokens);
    prompt_.embeddings.insert(prompt_.embeddings.end(), rows.begin(), rows.end());
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const std::int32_t p = prompt_.next_position++;
      place({p, p, p, 0});
    }
  }

  // positions_of(i): t, y, x and the fourth axis of token i; span: positions that the picture takes up.
  template <class PositionsOf>
  void picture(const float* rows, std::size_t count, std::size_t columns, std::int32_t span, PositionsOf positions_of) {
    const auto width = static_cast<std::size_t>(shape_.hidden);
    spans.push_back({prompt_.tokens, count, columns, 0});
    prompt_.visual.push_back({prompt_.tokens, count, columns});
    prompt_.embeddings.insert(prompt_.embeddings.end(), rows, rows + count * width);
    for (std::size_t i = 0; i < count; ++i) place(positions_of(i));
    prompt_.next_position += span;
  }

  std::int32_t next_position() const { return prompt_.next_position; }

  Prompt finish() {
    const auto axes = static_cast<std::size_t>(shape_.position_axes());
    for (std::size_t axis = 0; axis < axes; ++axis)
      prompt_.positions.insert(prompt_.positions.end(), positions_[axis].begin(), positions_[axis].end());
    return std::move(prompt_);
  }

  std::vector<PictureSpan> spans;

 private:
  void place(const std::array<std::int32_t, 4>& position) {
    for (std::size_t axis = 0; axis < 4; ++axis) positions_[axis].push_back(position[axis]);
    ++prompt_.tokens;
  }

  const Engine& engine_;
  const Shape& shape_;
  Prompt prompt_;
  std::array<std::vector<std::int32_t>, 4> positions_;
};

}  // namespace

Words::Words(const std::string& path) {
  llama_model_params params = llama_model_default_params();
  params.vocab_only = true;
  model_.reset(llama_model_load_from_file(path.c_str(), params));
  if (!model_) throw std::runtime_error(path + ": libllama cannot read its vocabulary");
}

std::vector<std::int32_t> Words::tokens(const std::string& text, bool begin) const {
  const llama_vocab* vocabulary = llama_model_get_vocab(model_.get());
  std::vector<std::int32_t> tokens(text.size() + 8);
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

std::string Words::text(std::int32_t token) const {
  char piece[256];
  const std::int32_t n =
      llama_token_to_piece(llama_model_get_vocab(model_.get()), token, piece, sizeof(piece), 0, false);
  return n > 0 ? std::string(piece, static_cast<std::size_t>(n)) : std::string();
}

bool Words::ends(std::int32_t token) const { return llama_vocab_is_eog(llama_model_get_vocab(model_.get()), token); }

std::string Words::dress(const std::string& words, const std::string& template_name) const {
  if (template_name == "none") return words;
  const char* own = llama_model_chat_template(model_.get(), nullptr);
  const std::string name = template_name.empty() ? (own != nullptr ? own : "vicuna") : template_name;
  const llama_chat_message message{"user", words.c_str()};
  std::vector<char> out(words.size() * 2 + 1024);
  std::int32_t n =
      llama_chat_apply_template(name.c_str(), &message, 1, true, out.data(), static_cast<std::int32_t>(out.size()));
  if (n < 0)
    throw std::invalid_argument(template_name.empty()
                                    ? "the model's own chat template is not one that libllama knows: name one with "
                                      "--chat-template (vicuna, chatml, ...; none for the prompt as it is)"
                                    : "libllama knows no chat template \"" + template_name + "\"");
  if (static_cast<std::size_t>(n) > out.size()) {
    out.resize(static_cast<std::size_t>(n));
    n = llama_chat_apply_template(name.c_str(), &message, 1, true, out.data(), n);
  }
  return {out.data(), static_cast<std::size_t>(n)};
}

const char* picture_marker() { return mtmd_default_marker(); }

std::string with_markers(const std::string& words, std::size_t pictures) {
  const std::string marker = picture_marker();
  std::size_t named = 0;
  for (std::size_t at = words.find(marker); at != std::string::npos; at = words.find(marker, at + marker.size()))
    ++named;
  if (named > pictures)
    throw std::invalid_argument("the prompt has " + std::to_string(named) + " picture markers but " +
                                std::to_string(pictures) + " pictures were given");
  std::string ahead;
  for (; named < pictures; ++named) ahead += marker + "\n";
  return ahead + words;
}

Eyes::Eyes(const std::string& path, const Words& words, const Shape& shape, int threads) : path_(path) {
  const GgufFile file(path);
  // libmtmd does not compare it with a model that was loaded without weights.
  for (const char* name : {"mm.2.bias", "mm.model.fc.weight"})
    if (file.has_tensor(name)) {
      const std::int64_t width = file.tensor(name).shape.back();
      if (width != shape.hidden)
        throw std::runtime_error(path + ": its visual tokens are " + std::to_string(width) +
                                 " wide but the model's are " + std::to_string(shape.hidden) +
                                 ": it belongs to another model");
      break;
    }
  pads_to_square_ = file.has("clip.projector_type") && file.text("clip.projector_type") == "mlp";
  has_class_token_ = pads_to_square_ && file.has_tensor("v.class_embd");
  mtmd_context_params params = mtmd_context_params_default();
  params.print_timings = false;
  params.warmup = false;
  params.n_threads = threads;
  context_.reset(mtmd_init_from_file(path.c_str(), words.model(), params));
  if (!context_) throw std::runtime_error(path + ": libmtmd cannot load it as an mmproj file");
  if (!mtmd_support_vision(context_.get())) throw std::runtime_error(path + ": it has no vision encoder");
  if (mtmd_decode_use_non_causal(context_.get(), nullptr))
    throw std::runtime_error(path + ": models whose pictures attend in both directions are not supported");
  if (mtmd_decode_use_mrope(context_.get()) != shape.m_rope())
    throw std::runtime_error(path + ": its positions are not the model's: it belongs to another model");
}

Eyes::Picture Eyes::open(const std::string& path) const {
  const common::Picture picture = common::load_picture(path);
  return {path, std::unique_ptr<mtmd_bitmap, MtmdDeleter>(mtmd_bitmap_init(static_cast<std::uint32_t>(picture.width),
                                                                           static_cast<std::uint32_t>(picture.height),
                                                                           picture.pixels.data()))};
}

Prompt Eyes::prompt(const Engine& engine, const Shape& shape, const std::string& dressed,
                    const std::vector<Picture>& pictures, std::vector<PictureSpan>& spans,
                    const Progress& progress) const {
  std::unique_ptr<mtmd_input_chunks, MtmdDeleter> chunks(mtmd_input_chunks_init());
  const mtmd_input_text text{dressed.c_str(), dressed.size(), true, true};
  std::vector<const mtmd_bitmap*> bitmaps;
  for (const Picture& picture : pictures) bitmaps.push_back(picture.bitmap.get());
  if (const std::int32_t status = mtmd_tokenize(context_.get(), chunks.get(), &text, bitmaps.data(), bitmaps.size()))
    throw std::runtime_error(status == 1 ? "the chat template dropped a picture: name another with --chat-template"
                                         : "libmtmd cannot prepare the pictures for " + path_);

  Assembly assembly(engine, shape);
  const std::size_t n = mtmd_input_chunks_size(chunks.get());
  for (std::size_t c = 0; c < n; ++c) {
    const mtmd_input_chunk* chunk = mtmd_input_chunks_get(chunks.get(), c);
    if (mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_TEXT) {
      std::size_t count = 0;
      const llama_token* tokens = mtmd_input_chunk_get_tokens_text(chunk, &count);
      assembly.text({tokens, tokens + count});
      continue;
    }
    if (mtmd_encode_chunk(context_.get(), chunk) != 0) throw std::runtime_error("libmtmd cannot look at a picture");
    const std::size_t count = mtmd_input_chunk_get_n_tokens(chunk);
    const mtmd_image_tokens* tokens = mtmd_input_chunk_get_tokens_image(chunk);
    const std::int32_t first = assembly.next_position();
    const auto position = [&](std::size_t i) { return mtmd_image_tokens_get_decoder_pos(tokens, first, i); };
    // The grid: where M-RoPE says so, by its own columns; else a square.
    std::size_t columns = static_cast<std::size_t>(std::lround(std::sqrt(static_cast<double>(count))));
    if (shape.m_rope()) {
      columns = 0;
      for (std::size_t i = 0; i < count; ++i)
        columns = std::max<std::size_t>(columns, position(i).x + 1 - position(0).x);
    }
    if (columns == 0 || count % columns != 0 || (!shape.m_rope() && columns * columns != count)) columns = 0;
    assembly.picture(
        mtmd_get_output_embd(context_.get()), count, columns, mtmd_input_chunk_get_n_pos(chunk), [&](std::size_t i) {
          const mtmd_decoder_pos p = position(i);
          return std::array<std::int32_t, 4>{static_cast<std::int32_t>(p.t), static_cast<std::int32_t>(p.y),
                                             static_cast<std::int32_t>(p.x), static_cast<std::int32_t>(p.z)};
        });
    if (progress) progress(static_cast<double>(c + 1) / static_cast<double>(n));
  }
  spans = assembly.spans;
  for (PictureSpan& span : spans) span.first_patch = has_class_token_ ? 1 : 0;
  return assembly.finish();
}

std::vector<std::vector<float>> visual_embeddings(const std::string& path, const Shape& shape) {
  const reference::Tensors tensors(path);
  std::vector<std::vector<float>> pictures;
  for (const std::string& name : tensors.names()) {
    const reference::Matrix rows = tensors.matrix(name);
    if (rows.cols() != shape.hidden || rows.rows() == 0)
      throw std::invalid_argument(path + ": the tensor " + name + " is " + std::to_string(rows.rows()) + " x " +
                                  std::to_string(rows.cols()) + " but the model reads tokens that are " +
                                  std::to_string(shape.hidden) + " wide: give [tokens, width]");
    pictures.emplace_back(rows.data(), rows.data() + rows.size());
  }
  if (pictures.empty()) throw std::invalid_argument(path + " has no tensors: give one [tokens, width] a picture");
  return pictures;
}

Prompt prompt_from_embeddings(const Engine& engine, const Words& words, const Shape& shape, const std::string& dressed,
                              const std::vector<std::vector<float>>& pictures, std::vector<PictureSpan>& spans) {
  Assembly assembly(engine, shape);
  const std::string marker = picture_marker();
  std::size_t at = 0;
  for (std::size_t i = 0; i <= pictures.size(); ++i) {
    const std::size_t end = i < pictures.size() ? dressed.find(marker, at) : dressed.size();
    if (end == std::string::npos)
      throw std::runtime_error("the chat template dropped a picture: name another with --chat-template");
    if (end > at || i == 0) assembly.text(words.tokens(dressed.substr(at, end - at), i == 0));
    at = end + marker.size();
    if (i == pictures.size()) break;
    const std::size_t count = pictures[i].size() / static_cast<std::size_t>(shape.hidden);
    const auto side = static_cast<std::size_t>(std::lround(std::sqrt(static_cast<double>(count))));
    const std::size_t columns = side * side == count ? side : 0;
    if (shape.m_rope() && columns == 0)
      throw std::invalid_argument("picture " + std::to_string(i) + " has " + std::to_string(count) +
                                  " tokens, which are no square grid: this model's positions need one");
    const std::int32_t first = assembly.next_position();
    assembly.picture(pictures[i].data(), count, columns,
                     shape.m_rope() ? static_cast<std::int32_t>(columns) : static_cast<std::int32_t>(count),
                     [&](std::size_t token) {
                       const auto p = first + static_cast<std::int32_t>(token);
                       if (!shape.m_rope()) return std::array<std::int32_t, 4>{p, p, p, 0};
                       return std::array<std::int32_t, 4>{first, first + static_cast<std::int32_t>(token / columns),
                                                          first + static_cast<std::int32_t>(token % columns), 0};
                     });
  }
  spans = assembly.spans;
  return assembly.finish();
}

}  // namespace llava

#include "tiny_vocabulary.hpp"

#include <unordered_set>

#include "tiny_gguf.hpp"

namespace tiny_gguf {
namespace {

// What a question about a picture is made of.
const std::vector<std::string> words = {
    "the", "a",   "is",       "in",    "of", "and",  "this", "picture", "what",      "how",       "many",   "there",
    "are", "you", "describe", "image", "to", "with", "USER", "user",    "ASSISTANT", "assistant", "system", "see"};

enum TokenType : std::int32_t { normal = 1, unknown = 2, control = 3, unused = 5, byte = 6 };

// Code point -> UTF-8, for those below 0x10000.
std::string utf8(unsigned code) {
  std::string out;
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | code >> 6);
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else {
    out += static_cast<char>(0xE0 | code >> 12);
    out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  }
  return out;
}

struct Vocabulary {
  std::vector<std::string> tokens;
  std::vector<std::int32_t> types;
  std::unordered_set<std::string> known;

  bool add(const std::string& token, TokenType type) {
    if (!known.insert(token).second) return false;
    tokens.push_back(token);
    types.push_back(type);
    return true;
  }
  void fill_up(std::uint32_t least) {
    for (std::size_t i = 0; tokens.size() < least; ++i) add("<unused" + std::to_string(i) + ">", unused);
  }
  std::uint32_t id(const std::string& token) const {
    for (std::size_t i = 0; i < tokens.size(); ++i)
      if (tokens[i] == token) return static_cast<std::uint32_t>(i);
    throw std::logic_error("no token " + token);
  }
  std::uint32_t write(gguf::Writer& file, const char* model, const char* splitting) const {
    file.set("tokenizer.ggml.model", model);
    file.set("tokenizer.ggml.pre", splitting);
    file.set("tokenizer.ggml.tokens", tokens);
    file.set("tokenizer.ggml.token_type", types);
    return static_cast<std::uint32_t>(tokens.size());
  }
};

}  // namespace

std::uint32_t set_sentencepiece(gguf::Writer& file, std::uint32_t least, const std::vector<std::string>& markers) {
  const std::string blank = utf8(0x2581);
  Vocabulary vocabulary;
  vocabulary.add("<unk>", unknown);
  vocabulary.add("<s>", control);
  vocabulary.add("</s>", control);
  for (int value = 0; value < 256; ++value) {
    char name[8];
    std::snprintf(name, sizeof(name), "<0x%02X>", static_cast<unsigned>(value));
    vocabulary.add(name, byte);
  }
  // A word grows from its first letter: every beginning of it is a token, the shorter ones first.
  for (const std::string& word : words)
    for (std::size_t length = 0; length <= word.size(); ++length)
      vocabulary.add(blank + word.substr(0, length), normal);
  for (char c = '!'; c <= '~'; ++c) vocabulary.add(std::string(1, c), normal);
  for (const std::string& marker : markers) vocabulary.add(marker, control);
  vocabulary.fill_up(least);

  std::vector<float> scores;
  for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i)
    scores.push_back(vocabulary.types[i] == normal ? -static_cast<float>(i) : 0.f);
  file.set("tokenizer.ggml.scores", scores);
  file.set("tokenizer.ggml.bos_token_id", std::uint32_t{1});
  file.set("tokenizer.ggml.eos_token_id", std::uint32_t{2});
  file.set("tokenizer.ggml.unknown_token_id", std::uint32_t{0});
  file.set("tokenizer.ggml.add_bos_token", true);
  file.set("tokenizer.chat_template", gguf::vicuna_template);
  return vocabulary.write(file, "llama", "default");
}

std::uint32_t set_byte_pairs(gguf::Writer& file, std::uint32_t least, const std::vector<std::string>& markers) {
  // Radford et al. 2019: every byte is a printable character; those that are none are shifted beyond 255.
  std::array<std::string, 256> characters;
  unsigned shifted = 256;
  for (unsigned value = 0; value < 256; ++value) {
    const bool printable = (value >= 0x21 && value <= 0x7E) || (value >= 0xA1 && value != 0xAD);
    characters[value] = utf8(printable ? value : shifted++);
  }
  Vocabulary vocabulary;
  for (const std::string& character : characters) vocabulary.add(character, normal);
  std::vector<std::string> merges;
  for (const std::string& word : words) {
    for (const std::string& start : {characters[' '], std::string()}) {  // behind a blank, and not
      std::string left = start;
      for (const char c : word) {
        const std::string right = characters[static_cast<unsigned char>(c)];
        if (!left.empty() && vocabulary.add(left + right, normal)) merges.push_back(left + " " + right);
        left += right;
      }
    }
  }
  std::vector<std::string> controls = {"<|endoftext|>",  "<|im_start|>",   "<|im_end|>",    "<|vision_start|>",
                                       "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"};
  controls.insert(controls.end(), markers.begin(), markers.end());
  vocabulary.fill_up(least > controls.size() ? least - static_cast<std::uint32_t>(controls.size()) : 0);
  for (const std::string& token : controls) vocabulary.add(token, control);

  file.set("tokenizer.ggml.merges", merges);
  file.set("tokenizer.ggml.bos_token_id", vocabulary.id("<|endoftext|>"));
  file.set("tokenizer.ggml.eos_token_id", vocabulary.id("<|im_end|>"));
  file.set("tokenizer.ggml.padding_token_id", vocabulary.id("<|endoftext|>"));
  file.set("tokenizer.ggml.add_bos_token", false);
  file.set("tokenizer.chat_template",
           "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
           "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}");
  return vocabulary.write(file, "gpt2", "qwen2");
}

void write(const Tokenizer& tokenizer, const std::string& path) {
  gguf::Writer file;
  file.set("general.architecture", tokenizer.architecture);
  (tokenizer.architecture == "llama" ? set_sentencepiece : set_byte_pairs)(file, tokenizer.vocabulary,
                                                                           tokenizer.markers);
  file.write(path);
}

}  // namespace tiny_gguf

// Small vocabularies for the models of tiny_gguf.hpp, as the keys tokenizer.* of a GGUF file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gguf_writer.hpp"

namespace tiny_gguf {

// SentencePiece, for llama: <unk> <s> </s>, 256 bytes, printable characters, words. `markers` are further
// control tokens. At least `least` tokens; returns how many.
std::uint32_t set_sentencepiece(gguf::Writer& file, std::uint32_t least, const std::vector<std::string>& markers = {});

// Byte-pair encoding with Qwen's control tokens and its way of splitting text. The control tokens come last.
std::uint32_t set_byte_pairs(gguf::Writer& file, std::uint32_t least, const std::vector<std::string>& markers = {});

}  // namespace tiny_gguf

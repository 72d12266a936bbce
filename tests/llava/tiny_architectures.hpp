// What the decoders of llama.cpp are made of, as data: one row an architecture. tiny_language.cpp turns rows into files.
//
// Texts are words with blanks between them. "@name" stands for the words of a group. "xy?word" counts only in layers
// that have the letter x or y. Extents and values are formulas of + - * / and the names that tiny_language.cpp lists:
// d for the width of the decoder, q and kv for the widths of all queries and of all keys, and so on.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace tiny_gguf {

struct Architecture {
  std::string name;
  // The kinds of layers, which repeat: f full attention, w attention in a window, n full attention without positions,
  // r a recurrent layer or a convolution, h attention beside a recurrence, x a feed-forward network alone.
  std::string layers;
  // Their feed-forward networks: d dense, e experts. Those before a bar do not repeat: "d|e" is one dense layer and
  // then experts.
  std::string feed;
  // name=value, without the architecture's name in front ("/name" has none in the file either). Values are whole
  // numbers; with a point floats; true or false; [a,b] lists; {w*a} lists with a in the layers of the letter w and 0
  // elsewhere. What every decoder has (see tiny_language.cpp) is replaced in its place.
  std::string keys;
  // kind:name/extent,extent... outside the layers, and in each layer: see add() in tiny_language.cpp for the kinds.
  std::string ends = "@ends", block;
  // What fields of the specification must be: name=value or name>=value.
  std::string limits = "";
};

const std::vector<Architecture>& table();
const std::map<std::string, std::string>& groups();

}  // namespace tiny_gguf

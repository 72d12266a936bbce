// A conversation, in the words that a model was taught to read it in.
#pragma once

#include <llama.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace llava {

class Chat {
 public:
  // chat_template: one that libllama knows by name ("vicuna", "chatml", ...), the text of a Jinja template, "none" for
  // words as they are, or empty for the model's own. jinja: the model's own, or a text, is rendered by llama.cpp's Jinja
  // engine even where libllama recognises it, as llama.cpp's --jinja does. Throws std::invalid_argument.
  Chat(const llama_model* model, const std::string& chat_template, bool jinja);

  // What the model reads next for the user's words, up to where its answer begins.
  std::string asks(const std::string& words);
  void answers(const std::string& words);
  bool begins() const { return turns_.empty(); }

 private:
  using Turns = std::vector<std::pair<std::string, std::string>>;  // role, words

  std::function<std::string(const Turns&, bool answer_begins)> render_;  // empty: words as they are
  Turns turns_;
  std::size_t read_ = 0;  // characters of the conversation that the model has seen
};

}  // namespace llava

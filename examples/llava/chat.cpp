#include "chat.hpp"

#ifdef FASTV_HAS_LLAMA_COMMON
#include <chat.h>
#include <log.h>
#endif

#include <algorithm>
#include <memory>
#include <stdexcept>

namespace llava {

namespace {

using Turns = std::vector<std::pair<std::string, std::string>>;

bool is_known(const std::string& chat_template) {
  const llama_chat_message message{"user", ""};
  return llama_chat_apply_template(chat_template.c_str(), &message, 1, true, nullptr, 0) >= 0;
}

// By what libllama makes of the templates that it recognises.
std::string render_known(const std::string& chat_template, const Turns& turns, bool answer_begins) {
  std::vector<llama_chat_message> messages;
  std::size_t room = 1024;
  for (const auto& [role, words] : turns) {
    messages.push_back({role.c_str(), words.c_str()});
    room += 2 * words.size() + 256;
  }
  std::vector<char> out(room);
  const std::int32_t n = llama_chat_apply_template(chat_template.c_str(), messages.data(), messages.size(),
                                                   answer_begins, out.data(), static_cast<std::int32_t>(room));
  return {out.data(), static_cast<std::size_t>(std::clamp<std::int32_t>(n, 0, static_cast<std::int32_t>(room)))};
}

// By llama.cpp's Jinja engine, which is in libllama-common. Throws std::runtime_error where the template is damaged.
std::function<std::string(const Turns&, bool)> jinja_renderer(const llama_model* model, const std::string& text) {
#ifdef FASTV_HAS_LLAMA_COMMON
  common_log_set_verbosity_thold(-1);  // what goes wrong is said by exceptions
  const std::shared_ptr<common_chat_templates> templates = common_chat_templates_init(model, text);
  return [model, templates](const Turns& turns, bool answer_begins) {
    common_chat_templates_inputs inputs;
    inputs.add_generation_prompt = answer_begins;
    inputs.force_pure_content = true;  // else a parser of tool calls must be found for the template too
    inputs.add_bos = llama_vocab_get_add_bos(llama_model_get_vocab(model));
    for (const auto& [role, words] : turns) {
      inputs.messages.emplace_back();
      inputs.messages.back().role = role;
      inputs.messages.back().content = words;
    }
    return common_chat_templates_apply(templates.get(), inputs).prompt;
  };
#else
  static_cast<void>(model), static_cast<void>(text);
  throw std::runtime_error("this program was built without libllama-common, which has llama.cpp's Jinja engine");
#endif
}

}  // namespace

Chat::Chat(const llama_model* model, const std::string& chat_template, bool jinja) {
  if (chat_template == "none") return;
  const char* own = llama_model_chat_template(model, nullptr);
  const std::string text = !chat_template.empty() ? chat_template : own != nullptr ? own : "vicuna";
  const bool is_jinja = text.find("{{") != std::string::npos || text.find("{%") != std::string::npos;
  if (is_known(text) && !(jinja && is_jinja)) {
    render_ = [text](const Turns& turns, bool answer_begins) { return render_known(text, turns, answer_begins); };
    return;
  }
  if (!is_jinja)
    throw std::invalid_argument(
        "libllama knows no chat template \"" + text +
        "\": name one that it does (vicuna, chatml, ...), give the text of a Jinja template, or "
        "none for the prompt as it is");
  try {
    render_ = jinja_renderer(model, text);
    if (render_({{"user", "words"}}, true).find("words") == std::string::npos)
      throw std::runtime_error("it leaves out what the user says");
  } catch (const std::exception& error) {
    // llama.cpp says where it was first and what went wrong last; of what is no template at all, nothing.
    std::string why = error.what();
    why.erase(why.find_last_not_of('\n') + 1);
    why = why.substr(why.rfind('\n') + 1);
    throw std::invalid_argument((chat_template.empty() ? "the model's own" : "this") +
                                std::string(" chat template cannot be rendered") +
                                (why == "std::exception" ? "" : " (" + why + ")") +
                                ": name one with --chat-template (vicuna, chatml, ...; none for the prompt as it is)");
  }
}

std::string Chat::asks(const std::string& words) {
  turns_.emplace_back("user", words);
  if (!render_) return words;
  const std::string all = render_(turns_, true), next = all.substr(std::min(read_, all.size()));
  read_ = all.size();
  return next;
}

void Chat::answers(const std::string& words) {
  turns_.emplace_back("assistant", words);
  if (!render_) return;
  // Up to where the answer ends, wherever the template has put spaces; what it sets behind comes with the next question.
  // Templates that leave thoughts out of what was said keep what is behind them.
  constexpr const char* thought_ends = "</think>";
  const std::size_t thought = words.rfind(thought_ends);
  const std::string said =
      thought == std::string::npos ? words : words.substr(thought + std::string(thought_ends).size());
  const auto first = said.find_first_not_of(" \n"), last = said.find_last_not_of(" \n");
  const std::string trimmed = first == std::string::npos ? "" : said.substr(first, last - first + 1),
                    all = render_(turns_, false);
  const std::size_t before = std::min(read_, all.size()), at = all.find(trimmed, before);
  if (at != std::string::npos) read_ = at + trimmed.size();
}

}  // namespace llava

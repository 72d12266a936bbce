// Chat templates: what libllama renders without a Jinja engine, and what its Jinja engine makes of the same.
#include "chat.hpp"

#include <gtest/gtest.h>

#include "halves.hpp"
#include "prompts.hpp"

namespace {

using llava::Chat;

class ChatTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    halves_ = std::make_unique<llava::Halves>(prompts::model_file(tiny_gguf::tiny_model("qwen3"), "chat"));
  }
  static void TearDownTestSuite() { halves_.reset(); }
  static const llama_model* model() { return halves_->head(); }
  static std::string complaint(const std::string& chat_template) {
    try {
      const Chat chat(model(), chat_template, true);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  }

 private:
  static std::unique_ptr<llava::Halves> halves_;
};
std::unique_ptr<llava::Halves> ChatTest::halves_;

TEST_F(ChatTest, ModelsOwnTemplateIsTheSameByJinja) {
  Chat known(model(), "", false), jinja(model(), "", true);
  std::string all;
  for (const char* question : {"one", "two\n", "three"}) {
    const std::string asked = known.asks(question);
    EXPECT_EQ(jinja.asks(question), asked);
    all += asked + " an answer ";
    known.answers(" an answer ");
    jinja.answers(" an answer ");
  }
  // What the model has read and said is the conversation, with the template's words around every turn.
  EXPECT_NE(all.find("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n an answer "), std::string::npos) << all;
  EXPECT_NE(all.find("an answer  <|im_end|>\n<|im_start|>user\ntwo"), std::string::npos) << all;
}

TEST_F(ChatTest, TemplatesThatLibllamaDoesNotKnowAreRenderedByJinja) {
  const std::string chat_template =
      "{% for m in messages %}[{{ m.role | upper }}]{{ m.content.split('</think>')[-1] | trim }}[END]{% endfor %}"
      "{% if add_generation_prompt %}[ASSISTANT]{% endif %}";
  for (const bool jinja : {false, true}) {
    Chat chat(model(), chat_template, jinja);
    EXPECT_EQ(chat.asks("one"), "[USER]one[END][ASSISTANT]");
    chat.answers("a thought </think> an answer ");  // which the template leaves out of what was said
    EXPECT_EQ(chat.asks("two"), "[END][USER]two[END][ASSISTANT]");
  }
}

TEST_F(ChatTest, NoTemplateAtAll) {
  Chat chat(model(), "none", true);
  EXPECT_EQ(chat.asks("words"), "words");
  chat.answers("more");
  EXPECT_EQ(chat.asks("words"), "words");
}

TEST_F(ChatTest, DamagedTemplatesAreNamed) {
  EXPECT_EQ(complaint("{% for m in %}"),
            "this chat template cannot be rendered: name one with --chat-template (vicuna, chatml, ...; none for the "
            "prompt as it is)");
  EXPECT_NE(complaint("{{ raise_exception('no pictures') }}").find("no pictures"), std::string::npos);
  EXPECT_NE(complaint("{{ 'hello' }}").find("leaves out what the user says"), std::string::npos);
  EXPECT_NE(complaint("nonsense").find("libllama knows no chat template \"nonsense\": name one"), std::string::npos);
}

}  // namespace

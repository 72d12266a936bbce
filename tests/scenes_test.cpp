// The shipped scenes model on committed pictures, which training never saw. Two of them: a prompt takes half a second.
#include <gtest/gtest.h>

#include "assistant.hpp"

namespace {

using namespace scenes;

constexpr const char* folder = FASTV_SCENES_FOLDER;

struct Asked {
  std::string kind, question, answer;
  Matrix visual;
};

const Assistant& assistant() {
  static const Assistant one(std::string(folder) + "/model");
  return one;
}

// Every question about the two pictures, or those of some kinds.
std::vector<Asked> asked(const std::vector<std::string>& kinds = {}) {
  Eigen::setNbThreads(1);  // beside other tests one thread is fastest
  const std::string pictures = std::string(folder) + "/pictures/";
  std::map<std::string, Matrix> seen;
  std::vector<Asked> questions;
  for (const auto& entry : nlohmann::json::parse(std::ifstream(pictures + "questions.json"))) {
    const std::string picture = entry.at("picture"), kind = entry.at("kind");
    if (picture != "scene_02.png" && picture != "scene_05.png") continue;
    if (!kinds.empty() && std::find(kinds.begin(), kinds.end(), kind) == kinds.end()) continue;
    if (seen.count(picture) == 0) seen[picture] = assistant().look(load_picture(pictures + picture));
    questions.push_back({kind, entry.at("question"), entry.at("answer"), seen[picture]});
  }
  return questions;
}

std::string answer(const Asked& a, const std::optional<Pruning>& pruning = {}) {
  return assistant().answer(assistant().prompt(a.visual, a.question), pruning).text;
}

TEST(Scenes, UnprunedModelAnswersEveryKindOfQuestion) {
  const std::vector<Asked> questions = asked();
  ASSERT_EQ(questions.size(), 10u);
  for (const Asked& a : questions) EXPECT_EQ(answer(a), a.answer) << a.question;
}

TEST(Scenes, RankingByAttentionFindsTheOneDigitThatIsAskedFor) {
  fastv::Config attention;
  attention.filtering_ratio = 0.9;
  fastv::Config random = attention;
  random.selection = fastv::Selection::random;
  int right = 0;
  for (const Asked& a : asked({"at", "where"})) {
    EXPECT_EQ(answer(a, Pruning(attention)), a.answer) << a.question;
    right += answer(a, Pruning(random)) == a.answer ? 1 : 0;
  }
  EXPECT_LT(right, 4);
}

TEST(Scenes, DroppingNothingChangesNoAnswer) {
  fastv::Config none;
  none.filtering_ratio = 0;
  for (const Asked& a : asked({"row"})) EXPECT_EQ(answer(a, Pruning(none)), answer(a)) << a.question;
}

}  // namespace

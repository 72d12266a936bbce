// Holds the shipped scenes model to its accuracy, on the committed pictures, which training never saw.
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

const std::vector<Asked>& asked() {
  static const std::vector<Asked> all = [] {
    const std::string pictures = std::string(folder) + "/pictures/";
    std::map<std::string, Matrix> seen;
    std::vector<Asked> questions;
    for (const auto& entry : nlohmann::json::parse(std::ifstream(pictures + "questions.json"))) {
      const std::string picture = entry.at("picture");
      if (seen.count(picture) == 0) seen[picture] = assistant().look(load_picture(pictures + picture));
      questions.push_back({entry.at("kind"), entry.at("question"), entry.at("answer"), seen[picture]});
    }
    return questions;
  }();
  return all;
}

// Share of right answers by kind, in percent.
using Accuracy = std::map<std::string, double>;
Accuracy accuracy(const std::optional<Pruning>& pruning) {
  Eigen::setNbThreads(1);  // one small prompt is fastest on one thread
  Accuracy right, total;
  for (const Asked& a : asked()) {
    total[a.kind] += 1;
    right[a.kind] += assistant().answer(assistant().prompt(a.visual, a.question), pruning).text == a.answer ? 1 : 0;
  }
  for (auto& [kind, value] : right) value *= 100 / total[kind];
  return right;
}
const Accuracy& unpruned_accuracy() {
  static const Accuracy one = accuracy({});
  return one;
}
double mean(const Accuracy& shares) {
  double sum = 0;
  for (const auto& [kind, share] : shares) sum += share / static_cast<double>(shares.size());
  return sum;
}

// Accuracies on these 60 pictures when the weights were shipped, less two questions of 60 for other machines' rounding.
constexpr double slack = 2 * 100.0 / 60;
const std::map<std::string, double> unpruned = {
    {"colour", 95}, {"digit", 95}, {"place", 95}, {"count", 90}, {"list", 90}};

TEST(Scenes, UnprunedModelAnswersAsWellAsItsCardSays) {
  for (const auto& [kind, share] : unpruned_accuracy()) EXPECT_GE(share, unpruned.at(kind) - slack) << kind;
}

TEST(Scenes, RankingByAttentionBeatsDroppingAtRandom) {
  fastv::Config attention;
  attention.filtering_layer = 1;  // where evaluate's table shows the widest gap
  attention.filtering_ratio = 0.9;
  fastv::Config random = attention;
  random.selection = fastv::Selection::random;
  EXPECT_GT(mean(accuracy(Pruning(attention))), mean(accuracy(Pruning(random))));
}

TEST(Scenes, DroppingNothingChangesNoAnswer) {
  fastv::Config none;
  none.filtering_ratio = 0;
  EXPECT_EQ(unpruned_accuracy(), accuracy(Pruning(none)));
}

}  // namespace

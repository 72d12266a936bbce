// A LLaVA in one piece: eyes, words and decoder. It looks at a picture once and answers any number of questions
// about it, with or without pruning. Every member is const: one Assistant may serve several threads.
//
// Shapes: L visual tokens, n prompt tokens, D width of the decoder.
#pragma once

#include <algorithm>
#include <chrono>
#include <optional>

#include "../common/picture.hpp"
#include "../reference/decoder.hpp"
#include "vision.hpp"
#include "words.hpp"

namespace scenes {

using namespace common;  // pictures

// What the decoder reads: text, image, text.
struct Prompt {
  Matrix embeddings;        // [n, D]
  fastv::TokenSpan visual;  // where the image's tokens stand

  std::size_t tokens() const { return static_cast<std::size_t>(embeddings.rows()); }
};

// How to prune: the stage's settings, and what it scores by.
struct Pruning {
  Pruning(const fastv::Config& settings, reference::EvidenceKind scored_by = reference::EvidenceKind::query_key)
      : config(settings), evidence(scored_by) {}
  fastv::Config config;
  reference::EvidenceKind evidence;
};

struct Answer {
  std::string text;
  fastv::Plan plan;                // tokens and KV length of every layer
  std::vector<fastv::Index> kept;  // patches in reading order that stayed; all of them without pruning
  std::vector<float> scores;       // one a patch; empty without pruning and after a rule that looks at none
};

class Assistant {
 public:
  // folder: config.json, preprocessor_config.json, model.safetensors, vocab.txt
  explicit Assistant(const std::string& folder)
      : Assistant(read_json(folder + "/config.json"), reference::Tensors(folder + "/model.safetensors"), folder) {}

  const fastv::ModelShape& shape() const { return decoder_.shape(); }
  std::size_t visual_tokens() const { return static_cast<std::size_t>(vision_.config().patches()); }
  std::size_t columns() const { return static_cast<std::size_t>(vision_.config().columns()); }
  const Vocabulary& vocabulary() const { return vocabulary_; }
  const reference::Decoder& decoder() const { return decoder_; }

  // The picture as the model gets it: padded and resized.
  Picture see(const Picture& picture) const { return fit(picture, preprocessor_); }

  // Picture of any size -> visual tokens [L, D].
  Matrix look(const Picture& picture) const {
    return vision_.project(vision_.features(normalise(see(picture), preprocessor_)));
  }

  Prompt prompt(const Matrix& visual, const std::string& question) const {
    const std::vector<int> before = vocabulary_.before(), after = vocabulary_.after(question);
    const auto first = static_cast<Eigen::Index>(before.size()), rest = static_cast<Eigen::Index>(after.size());
    if (static_cast<std::size_t>(first + visual.rows() + rest) > max_tokens_)
      throw std::invalid_argument("the question is too long: picture and question together may have " +
                                  std::to_string(max_tokens_) + " tokens");
    Matrix embeddings(first + visual.rows() + rest, visual.cols());
    embeddings << decoder_.embed(before), visual, decoder_.embed(after);
    return {std::move(embeddings), {before.size(), static_cast<std::size_t>(visual.rows()), columns()}};
  }

  // Every length of a prompt, before anything runs. What is wrong with the settings is in its status.
  fastv::Result<fastv::Plan> plan(const Prompt& prompt, const fastv::Config& pruning) const {
    return fastv::make_plan(pruning, {prompt.tokens(), shape().layers, {&prompt.visual, 1}});
  }
  // The same without pruning: every layer runs on every token.
  fastv::Plan whole_plan(const Prompt& prompt) const {
    return *fastv::make_plan(fastv::Span<const fastv::Config>(),
                             {prompt.tokens(), shape().layers, {&prompt.visual, 1}});
  }

  // Greedy decoding until the model says it is done, or for max_words.
  Answer answer(const Prompt& prompt, const std::optional<Pruning>& pruning = {}, std::size_t max_words = 16) const {
    Answer answer;
    answer.plan = pruning ? require(plan(prompt, pruning->config)) : whole_plan(prompt);
    std::optional<reference::Pruning> pruned = pruned_by(pruning, prompt);
    reference::Sequence sequence;
    const reference::RowVector logits = first_logits(prompt, pruned, sequence);
    if (pruned) {
      answer.kept = patches(pruned->kept, prompt.visual);
      const auto scores = pruned->pruner.scores();
      answer.scores.assign(scores.begin(), scores.end());
    } else {
      for (std::size_t i = 0; i < prompt.visual.count; ++i) answer.kept.push_back(static_cast<fastv::Index>(i));
    }
    std::vector<int> words = reference::generate(decoder_, logits, max_words, sequence, vocabulary_.end());
    if (!words.empty() && words.back() == vocabulary_.end()) words.pop_back();
    answer.text = vocabulary_.decode(words);
    return answer;
  }

  // Attention of the last prompt token, mean over heads, without pruning: [layers, n]. Each row sums to 1.
  Matrix attention(const Prompt& prompt) const {
    Matrix rows = Matrix::Zero(static_cast<Eigen::Index>(shape().layers), prompt.embeddings.rows());
    Matrix hidden = prompt.embeddings;
    reference::Sequence sequence;
    const std::vector<std::int64_t> positions = decoder_.next_positions(hidden.rows(), sequence);
    reference::LayerRun run;
    run.keep_map = true;
    const auto heads = static_cast<Eigen::Index>(shape().heads);
    for (Eigen::Index layer = 0; layer < rows.rows(); ++layer) {
      decoder_.run_layer(static_cast<std::size_t>(layer), hidden, positions, sequence, run);
      for (Eigen::Index head = 1; head <= heads; ++head)  // the last row of each
        rows.row(layer) += run.map.row(head * hidden.rows() - 1) / static_cast<float>(heads);
    }
    return rows;
  }

  // From the prompt's embeddings to the first word, once: seconds.
  double prefill_seconds(const Prompt& prompt, const std::optional<Pruning>& pruning = {}) const {
    std::optional<reference::Pruning> pruned = pruned_by(pruning, prompt);
    reference::Sequence sequence;
    const auto start = std::chrono::steady_clock::now();
    const Matrix logits = first_logits(prompt, pruned, sequence);
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    if (!logits.allFinite()) throw std::runtime_error("the model's logits are not finite");
    return time.count();
  }

 private:
  Assistant(const nlohmann::json& config, const reference::Tensors& tensors, const std::string& folder)
      : decoder_(reference::decoder_config(config.at("text_config")), tensors, "language_model."),
        vision_(vision_config(config), tensors, decoder_.shape().hidden),
        preprocessor_(load_preprocessor(folder + "/preprocessor_config.json")),
        vocabulary_(folder + "/vocab.txt"),
        max_tokens_(context_of(config.at("text_config"))) {
    if (static_cast<std::size_t>(vocabulary_.size()) != shape().vocabulary)
      throw std::runtime_error(folder + "/vocab.txt has " + std::to_string(vocabulary_.size()) +
                               " words but config.json " + "says " + std::to_string(shape().vocabulary));
    if (preprocessor_.side != vision_.config().side)
      throw std::runtime_error(folder + ": preprocessor_config.json and config.json differ in the picture's size");
  }

  static std::size_t context_of(const nlohmann::json& text) {
    if (!text.contains("max_position_embeddings")) return 2048;
    const std::int64_t tokens = reference::whole_number(text, "max_position_embeddings");
    if (tokens < 1) throw std::runtime_error("max_position_embeddings is " + std::to_string(tokens) + ", no context");
    return static_cast<std::size_t>(tokens);
  }

  static nlohmann::json read_json(const std::string& path) {
    std::ifstream in(path);
    if (!in) throw std::runtime_error("cannot open the model's " + path);
    nlohmann::json json = nlohmann::json::parse(in, nullptr, false);
    if (!json.is_object()) throw std::runtime_error(path + " is not a JSON object");
    return json;
  }

  static fastv::Plan require(const fastv::Result<fastv::Plan>& plan) {
    if (!plan) throw std::invalid_argument(plan.message().c_str());
    return *plan;
  }

  static std::optional<reference::Pruning> pruned_by(const std::optional<Pruning>& pruning, const Prompt& prompt) {
    if (!pruning) return {};
    return reference::Pruning{fastv::Pruner<float>(pruning->config), {prompt.visual}, pruning->evidence};
  }

  // Prefill: the logits [1, vocabulary] of the first word.
  Matrix first_logits(const Prompt& prompt, std::optional<reference::Pruning>& pruned,
                      reference::Sequence& sequence) const {
    const Matrix hidden =
        pruned ? decoder_.prefill(prompt.embeddings, sequence, *pruned) : decoder_.prefill(prompt.embeddings, sequence);
    return decoder_.logits(hidden.bottomRows(1), sequence);
  }

  // Positions in the prompt -> patches of the picture.
  static std::vector<fastv::Index> patches(const fastv::Kept& kept, const fastv::TokenSpan& visual) {
    std::vector<fastv::Index> out;
    for (const fastv::Index index : kept)
      if (index >= visual.first && index < visual.first + visual.count)
        out.push_back(static_cast<fastv::Index>(index - visual.first));
    return out;
  }

  reference::Decoder decoder_;
  Vision vision_;
  Preprocessor preprocessor_;
  Vocabulary vocabulary_;
  std::size_t max_tokens_;  // the decoder's context
};

}  // namespace scenes

// The rules that evaluate compares, and a question that each of them prunes in turn.
#pragma once

#include <map>

#include "assistant.hpp"
#include "scene.hpp"

namespace scenes {

// ---- the rules ----------------------------------------------------------------------------------

// What tokens are ranked by.
enum class By {
  nothing,
  last_row,        // attention of the last prompt token: FastV
  all_rows,        // of every row
  rope_free,       // of the last row, without RoPE
  corrected,       // of the question's rows, over that of its first row
  text_raters,     // of the rows that are relevant to the image
  value_weighted,  // of the last row, times the value's length
  key_length,      // no query at all
  change,          // of the hidden row in layer K-1
  logits,          // of the question's rows and layer 0's projections, without RoPE: ahead of the first layer
  hindsight        // of the last row and the right answer's, in layers K and up of the run without pruning
};

// What Selection::diverse compares. At K = 0 there is but one of them.
enum class Features {
  keys,    // of layer K-1, rotated as they are: near tokens are alike
  patches  // what the projector made of the picture
};

struct Rule {
  const char* name;
  By by = By::last_row;
  fastv::Config config = {};  // selection, windows, shares
  Features features = Features::keys;
};

inline Rule ranked(const char* name, By by = By::last_row) { return {name, by}; }
inline Rule blind(const char* name, fastv::Selection selection) {
  Rule rule{name, By::nothing};
  rule.config.selection = selection;
  return rule;
}
// In windows of 6 x 6 patches, an equal share of the tokens each.
inline Rule windowed(Rule rule, const char* name) {
  rule.name = name;
  rule.config.window_rows = rule.config.window_columns = 6;
  return rule;
}
inline Rule with_grid(Rule rule, const char* name) {
  rule.name = name;
  rule.config.uniform_share = 1.0 / 3;
  return rule;
}
inline Rule diverse(const char* name, By by, const fastv::Diversity& diversity, Features features = Features::keys) {
  Rule rule{name, by, {}, features};
  rule.config.selection = fastv::Selection::diverse;
  rule.config.diversity = diversity;
  return rule;
}

using fastv::Blend;
using fastv::Novelty;
inline constexpr fastv::Diversity mmr{Novelty::nearest, Blend::sum, 0.5}, mmr_tenth{Novelty::nearest, Blend::sum, 0.1},
    max_min{Novelty::nearest, Blend::sum, 0}, anchored{Novelty::nearest, Blend::product, 1, 0.5},
    coverage{Novelty::coverage, Blend::product, 1}, volume{Novelty::volume, Blend::product, 2};

inline const Rule fastv_rule = ranked("FastV (last row)");
inline const Rule random_rule = blind("random", fastv::Selection::random);
inline const Rule grid_rule = blind("even grid", fastv::Selection::uniform);
inline const Rule window_rule = windowed(fastv_rule, "windows");

inline const Rule max_min_rule = diverse("max-min", By::nothing, max_min);
inline const Rule mmr_tenth_rule = diverse("MMR, a tenth", By::last_row, mmr_tenth);

// At every R, and every K of a sweep.
inline const std::vector<Rule> swept_rules = {fastv_rule, random_rule, grid_rule, window_rule, max_min_rule};
// At one K.
inline const std::vector<Rule> compared_rules = {
    ranked("all rows", By::all_rows),
    ranked("RoPE-free", By::rope_free),
    ranked("P log P/Q", By::corrected),
    ranked("text raters", By::text_raters),
    ranked("value-weighted", By::value_weighted),
    ranked("key length", By::key_length),
    ranked("change", By::change),
    with_grid(fastv_rule, "score + grid"),
    windowed(ranked("", By::rope_free), "RoPE-free, windows"),
    diverse("max-min of patches", By::nothing, max_min, Features::patches),
    diverse("MMR", By::last_row, mmr),
    mmr_tenth_rule,
    diverse("anchors", By::last_row, anchored),
    diverse("coverage", By::last_row, coverage),
    diverse("volume", By::last_row, volume),
    diverse("RoPE-free, cover.", By::rope_free, coverage),
    ranked("hindsight", By::hindsight),
    windowed(ranked("", By::hindsight), "hindsight, windows"),
};
// Ahead of the first layer.
inline const std::vector<Rule> early_rules = {random_rule, grid_rule, ranked("logits", By::logits), max_min_rule,
                                              diverse("coverage", By::logits, coverage)};

struct Setting {
  Rule rule;
  std::size_t layer;  // K
  double ratio;       // R; at equal FLOPs that of the setting with K = 2 which costs as much
  bool equal_flops;
  std::size_t keep;  // visual tokens
  fastv::Plan plan;  // of the example prompt
};

// ---- one question -------------------------------------------------------------------------------

inline std::vector<fastv::Index> question_rows(const Prompt& prompt) {
  std::vector<fastv::Index> rows;
  for (std::size_t i = prompt.visual.first + prompt.visual.count; i < prompt.tokens(); ++i)
    rows.push_back(static_cast<fastv::Index>(i));
  return rows;
}

// A prompt and the right answer behind it, run through every layer once: what each K can be pruned by and goes on from.
class Reading {
 public:
  Reading(const Assistant& assistant, const Matrix& visual, const Question& question)
      : decoder_(assistant.decoder()),
        prompt_(assistant.prompt(visual, question.text)),
        visual_{prompt_.visual},
        question_(question_rows(prompt_)),
        answer_(assistant.vocabulary().encode(question.answer)) {
    const auto n = prompt_.embeddings.rows(), spoken = static_cast<Eigen::Index>(answer_.size());
    Matrix hidden(n + spoken, visual.cols());
    hidden << prompt_.embeddings, decoder_.embed(answer_);
    answer_.push_back(assistant.vocabulary().end());
    positions_ = decoder_.next_positions(hidden.rows(), sequence_);
    reference::LayerRun run;
    for (std::size_t layer = 0; layer < decoder_.shape().layers; ++layer) {
      before_.push_back(hidden);
      decoder_.run_layer(layer, hidden, positions_, sequence_, run);
      query_.emplace_back(run.query.topRows(n));
      hindsight_.push_back(attention_on_picture(layer, run.query, n - 1));
      share_.push_back(static_cast<double>(hindsight_.back().sum()));
      for (Eigen::Index row = n; row < n + spoken; ++row)
        hindsight_.back() += attention_on_picture(layer, run.query, row);
    }
    right_ = is_right(hidden, n);
    for (auto& cache : sequence_.layers) cache.length = n;  // what is pruned by is the prompt alone
  }

  bool right() const { return right_; }                        // without pruning
  const std::vector<double>& share() const { return share_; }  // of the last prompt token's attention, by layer

  // Kept patches, and whether the answer is still right.
  std::pair<std::vector<fastv::Index>, bool> pruned(const Setting& setting, std::uint64_t seed) {
    fastv::Config config = setting.rule.config;
    config.filtering_layer = setting.layer;
    config.keep_count = setting.keep;
    config.seed = seed;
    fastv::Pruner<float> pruner(config);
    const fastv::Kept kept = reference::require(select(pruner, setting));
    return {patches(kept), goes_on(kept, setting.layer)};
  }

 private:
  static Matrix top_rows(const Matrix& matrix, Eigen::Index rows) { return matrix.topRows(rows); }
  Eigen::Index tokens() const { return prompt_.embeddings.rows(); }

  fastv::Kept select(fastv::Pruner<float>& pruner, const Setting& setting) {
    const std::size_t n = prompt_.tokens();
    if (setting.rule.config.selection != fastv::Selection::diverse) {
      if (setting.rule.by == By::nothing) return pruner.prune(fastv::NoEvidence{n}, visual_);
      return pruner.prune(fastv::Scores<float>{scores(setting.rule.by, setting.layer), n}, visual_);
    }
    const bool patches = setting.layer == 0 || setting.rule.features == Features::patches;
    const fastv::ModelShape& s = decoder_.shape();
    const auto features = patches ? fastv::heads(prompt_.embeddings, 1)
                                  : fastv::heads(sequence_.layers[setting.layer - 1].keys, s.kv_heads, n);
    if (setting.rule.by == By::nothing)
      return pruner.prune(fastv::with_features(fastv::NoEvidence{n}, features), visual_);
    return pruner.prune(fastv::with_features(fastv::Scores<float>{scores(setting.rule.by, setting.layer), n}, features),
                        visual_);
  }

  // The scores of a kind at filtering layer k, computed once.
  const std::vector<float>& scores(By by, std::size_t k) {
    std::vector<float>& known = scores_[{by, k}];
    if (known.empty()) known = computed_scores(by, k);
    return known;
  }

  std::vector<float> computed_scores(By by, std::size_t k) const {
    using reference::EvidenceKind;
    fastv::Config config;
    config.filtering_layer = k;
    EvidenceKind kind = EvidenceKind::query_key;
    switch (by) {
      case By::nothing:
      case By::last_row: break;
      case By::all_rows: config.score_rows = fastv::ScoreRows::all; break;
      case By::rope_free: kind = EvidenceKind::rope_free; break;
      case By::corrected:
        config.score_rows = fastv::ScoreRows::listed;
        config.listed_rows = question_;
        config.prior_rows = {question_.data(), 1};
        break;
      case By::text_raters: kind = EvidenceKind::text_raters; break;
      case By::value_weighted: kind = EvidenceKind::value_weighted; break;
      case By::key_length: kind = EvidenceKind::keys_only; break;
      case By::change:
      case By::logits: break;
      case By::hindsight: {
        reference::RowVector sum = hindsight_[k];
        for (std::size_t layer = k + 1; layer < hindsight_.size(); ++layer) sum += hindsight_[layer];
        return {sum.begin(), sum.end()};
      }
    }
    fastv::Pruner<float> pruner(config);
    if (by == By::change) {
      const Matrix &before = before_[k - 1], &after = before_[k];
      reference::require(pruner
                             .prune(fastv::changes(before.data(), after.data(), prompt_.tokens(),
                                                   static_cast<std::size_t>(before.cols())),
                                    visual_)
                             .status);
    } else if (by == By::logits) {
      config.score_rows = fastv::ScoreRows::listed;
      config.listed_rows = question_;
      pruner.set_config(config);
      const fastv::ModelShape& s = decoder_.shape();
      const std::vector<float> query =
                                   reference::rotation_undone(fastv::heads(query_[0], s.heads), 0, decoder_.config()),
                               key = reference::rotation_undone(
                                   fastv::heads(sequence_.layers[0].keys, s.kv_heads, prompt_.tokens()), 0,
                                   decoder_.config());
      reference::require(
          pruner
              .prune(
                  fastv::logits(fastv::heads(query.data(), fastv::HeadMajor{s.heads, prompt_.tokens(), s.head_dim}),
                                fastv::heads(key.data(), fastv::HeadMajor{s.kv_heads, prompt_.tokens(), s.head_dim})),
                  visual_)
              .status);
    } else {
      reference::LayerRun run;
      run.query = query_[k - 1];
      reference::require(reference::prune_by(kind, pruner, visual_, decoder_.config(), run,
                                             top_rows(before_[k], tokens()), sequence_.layers[k - 1])
                             .status);
    }
    return {pruner.scores().begin(), pruner.scores().end()};
  }

  // Runs layers k and up on what was kept and the answer. What stands ahead of the picture sees nothing of it, so its keys
  // and values are those of the unpruned run.
  bool goes_on(const fastv::Kept& kept, std::size_t k) const {
    const Eigen::Index n = tokens(), ahead = static_cast<Eigen::Index>(prompt_.visual.first),
                       m = static_cast<Eigen::Index>(kept.size()) - ahead;
    const Matrix& all = before_[k];
    Matrix hidden(m + all.rows() - n, all.cols());
    std::vector<std::int64_t> positions;
    for (const fastv::Index index : kept) {
      if (index < prompt_.visual.first) continue;
      hidden.row(static_cast<Eigen::Index>(positions.size())) = all.row(index);
      positions.push_back(positions_[index]);
    }
    hidden.bottomRows(all.rows() - n) = all.bottomRows(all.rows() - n);
    positions.insert(positions.end(), positions_.begin() + n, positions_.end());
    reference::Sequence sequence;
    sequence.layers.resize(decoder_.shape().layers);
    reference::LayerRun run;
    for (std::size_t layer = k; layer < decoder_.shape().layers; ++layer) {
      sequence.layers[layer].keys = top_rows(sequence_.layers[layer].keys, ahead);
      sequence.layers[layer].values = top_rows(sequence_.layers[layer].values, ahead);
      sequence.layers[layer].length = ahead;
      decoder_.run_layer(layer, hidden, positions, sequence, run);
    }
    return is_right(hidden, m);
  }

  // Last layer's output on a prompt of n tokens and the answer behind it.
  bool is_right(const Matrix& hidden, Eigen::Index n) const {
    reference::Sequence unused;
    const Matrix logits = decoder_.logits(hidden.bottomRows(hidden.rows() - n + 1), unused);
    for (std::size_t i = 0; i < answer_.size(); ++i)
      if (reference::argmax(logits.row(static_cast<Eigen::Index>(i))) != answer_[i]) return false;
    return true;
  }

  std::vector<fastv::Index> patches(const fastv::Kept& kept) const {
    std::vector<fastv::Index> out;
    for (const fastv::Index index : kept)
      if (index >= prompt_.visual.first && index < prompt_.visual.first + prompt_.visual.count)
        out.push_back(static_cast<fastv::Index>(index - prompt_.visual.first));
    return out;
  }

  // Attention of one row on the picture, mean over heads: [L].
  reference::RowVector attention_on_picture(std::size_t layer, const Matrix& query, Eigen::Index row) const {
    const fastv::ModelShape& s = decoder_.shape();
    const auto c = static_cast<Eigen::Index>(s.head_dim), first = static_cast<Eigen::Index>(prompt_.visual.first),
               count = static_cast<Eigen::Index>(prompt_.visual.count);
    const Eigen::Index group = static_cast<Eigen::Index>(s.heads / s.kv_heads);
    reference::RowVector sum = reference::RowVector::Zero(count);
    for (Eigen::Index head = 0; head < static_cast<Eigen::Index>(s.heads); ++head) {
      Matrix p = query.block(row, head * c, 1, c) *
                 sequence_.layers[layer].keys.block(0, head / group * c, row + 1, c).transpose() *
                 reference::scale_of(decoder_.config());
      reference::softmax_rows(p);
      sum += p.row(0).segment(first, count);
    }
    return sum / static_cast<float>(s.heads);
  }

  const reference::Decoder& decoder_;
  Prompt prompt_;
  std::vector<fastv::TokenSpan> visual_;
  std::vector<fastv::Index> question_;
  std::vector<int> answer_;  // with </s>
  std::vector<std::int64_t> positions_;
  reference::Sequence sequence_;
  std::vector<Matrix> before_, query_;  // of each layer: its input [n + a, D], its queries [n, D]
  std::vector<double> share_;
  std::vector<reference::RowVector> hindsight_;  // of each layer, [L]
  std::map<std::pair<By, std::size_t>, std::vector<float>> scores_;
  bool right_ = false;
};

}  // namespace scenes

// fastv: published schedules, ready for make_plan() and a Pruner per stage, and where to look for what to use:
//
//   captions, general questions      the default: K = 2 or 3, R = 50%, attention of the last row
//   OCR, charts, documents           K = 8 to 16 of 32 layers; or keep more
//   grounding                        K = 8 to 16 of 32 layers, keys without RoPE, a share on an even grid
//   nine tenths dropped              Selection::diverse by keys, a tenth of the value from attention; priortr_stages(),
//                                    clse_stages()
//   ahead of the first layer         logits() with head weights of your model
//   video, several turns             text raters, or v2drop_stages(), which look at no question
//   no queries and keys at hand      changes(), outputs(), KeysOnly
//
// examples/recipes.md gives the numbers behind each line and where they are from; few of them were measured here.
#pragma once

#include "changes.hpp"
#include "pruner.hpp"

#include "detail/begin.hpp"

namespace fastv {

// Stages of pruning, by layer. Converts to what make_plan() takes.
struct Schedule {
  Config stage[max_stages] = {};  // in order
  std::size_t stages = 0;         // in use

  FASTV_INLINE const Config* data() const noexcept { return stage; }          // the first stage
  FASTV_INLINE std::size_t size() const noexcept { return stages; }           // stages
  FASTV_INLINE const Config* begin() const noexcept { return stage; }         // the first stage
  FASTV_INLINE const Config* end() const noexcept { return stage + stages; }  // one past the last
};

inline namespace FASTV_KIND {

// CLSE's stages on LLaVA-1.5 (576 visual tokens, 32 layers): K = 1, 11 and 21. tokens: what a layer keeps on average from
// the first stage on, as the authors count; 192, 128 and 64 are their presets, others are rounded down as theirs are.
// Their first stage multiplies attention by a spectral factor, which fastv does not compute: hand over Scores for it, or
// rank by attention as their later stages do.
inline Schedule clse_stages(std::size_t tokens) noexcept {
  constexpr std::size_t layer[] = {1, 11, 21};
  constexpr std::size_t preset[][4] = {{192, 330, 210, 62}, {128, 220, 140, 41}, {64, 110, 70, 20}};
  constexpr std::size_t hundredths[] = {172, 109, 32};
  Schedule schedule;
  for (std::size_t s = 0; s < 3; ++s) {
    Config& config = schedule.stage[schedule.stages++];
    config.filtering_layer = layer[s];
    config.keep_count = tokens / 100 * hundredths[s] + tokens % 100 * hundredths[s] / 100;
    for (const auto& row : preset)
      if (row[0] == tokens) config.keep_count = row[s + 1];
  }
  return schedule;
}

// PriorTR's one stage: K = 3, `tokens` kept in the whole prompt (192, 128 or 64 of 576 in the paper), by the mean of the
// question's rows corrected by the row of the separator right behind the image. Both lists are read at each prune().
// LLaVA-1.6 keeps 320 and scores by the last row alone: clear score_rows for it.
inline Schedule priortr_stages(std::size_t tokens, Span<const Index> question, Span<const Index> separator) noexcept {
  Schedule schedule;
  Config& config = schedule.stage[schedule.stages++];
  config.filtering_layer = 3;
  config.keep_count = tokens;
  config.score_rows = ScoreRows::listed;
  config.listed_rows = question;
  config.prior_rows = separator;
  return schedule;
}

// V2Drop's stages on a model of 32 layers: half at K = 3, half of the rest at 17, all but one of each image at 22, each by
// changes() of the layer before it.
inline Schedule v2drop_stages() noexcept {
  constexpr std::size_t layer[] = {3, 17, 22};
  Schedule schedule;
  for (std::size_t s = 0; s < 3; ++s) {
    Config& config = schedule.stage[schedule.stages++];
    config.filtering_layer = layer[s];
    config.filtering_ratio = s == 2 ? 1 : 0.5;
    config.min_per_image = s == 2 ? 1 : 0;
  }
  return schedule;
}

}  // namespace FASTV_KIND

}  // namespace fastv

#include "detail/end.hpp"

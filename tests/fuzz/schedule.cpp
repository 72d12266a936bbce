// Plans of several stages against the stages carried out one by one: select, compact, next_spans. What make_plan()
// promises before any value exists must come true whatever the scores are, and what cannot be promised must be refused.
#include "fuzz.hpp"

namespace {

using namespace fuzz;

std::vector<float> draw_scores(oracle::Rng& rng, std::size_t n) {
  std::vector<float> scores(n);
  for (float& score : scores) score = rng.chance(0.1) ? oracle::nan_float() : static_cast<float>(rng.real(0.1, 1));
  if (n > 0) scores[rng.below(n)] = 0.5f;  // not all NaN
  return scores;
}

// Where the visual tokens stand that an image, given by where its tokens stood at first, still has.
std::vector<std::size_t> left_of(const std::vector<Index>& origin, const std::vector<TokenSpan>& visual) {
  std::vector<std::size_t> left;
  for (const TokenSpan& span : visual) {
    if (!span.continues) left.push_back(0);
    for (const Index token : origin) left.back() += token >= span.first && token < span.first + span.count ? 1u : 0u;
  }
  return left;
}

}  // namespace

FASTV_FUZZ_TARGET(schedule) {
  oracle::Layout prompt = layout(in, 4, in.one_in(6) ? 90 : 20, false);
  const std::size_t layers = in.between(1, 12);
  std::vector<fastv::Config> schedule(in.one_in(20) ? in.between(0, 9) : in.between(1, 4));
  std::size_t layer = 0, left = prompt.visual_tokens();
  for (fastv::Config& stage : schedule) {
    stage = config(in, in.one_in(4) ? prompt.visual_tokens() : left);
    stage.filtering_layer = layer += in.between(1, 3);
    stage.selection = static_cast<fastv::Selection>(in.one_in(4) ? in.between(1, 2) : 0);
    stage.seed = in.byte();
    if (in.one_in(4)) stage.uniform_share = in.share();
    if (in.one_in(8)) stage.window_rows = in.between(1, 5), stage.window_columns = in.between(1, 5);
    if (stage.keep_count != fastv::by_ratio) left = stage.keep_count;
  }
  if (!schedule.empty()) own_ratios(in, schedule[0], prompt.visual);
  const Block<TokenSpan> visual(prompt.visual);
  const Block<fastv::Config> stages(schedule);
  const auto plan = fastv::make_plan(stages.view(), {prompt.tokens, layers, visual.view()});
  check_message(plan.status);

  oracle::Rng rng = in.random();
  Block<TokenSpan> now(prompt.visual);
  std::size_t spans = now.size(), tokens = prompt.tokens;
  Block<Index> origin(tokens);
  for (std::size_t i = 0; i < tokens; ++i) origin[i] = static_cast<Index>(i);
  bool can_plan = schedule.size() <= fastv::max_stages, pooled = false;
  for (std::size_t s = 0; s < schedule.size() && can_plan; ++s) {
    const fastv::Config& config = schedule[s];
    const Span<const TokenSpan> here(now.data(), spans);
    const std::vector<Image> before = images({now.data(), now.data() + spans});
    // What depends on scores cannot be planned.
    can_plan = config.filtering_layer < layers &&
               !(pooled && (config.quota == fastv::Quota::per_image ||
                            (config.min_per_image > 0 && config.keep_count == fastv::by_ratio)));
    if (!can_plan) break;
    fastv::Pruner<float> pruner(config);
    const Block<float> scores(draw_scores(rng, fastv::visual_tokens(here)));
    const Block<Index> quotas(2 * before.size());
    const auto shared = fastv::image_quotas(config, here, quotas.span());
    const fastv::Kept kept = pruner.prune(fastv::Scores<float>{scores.view(), tokens}, here);
    check_message(kept.status);
    can_plan = static_cast<bool>(kept);
    if (!kept) break;
    const std::size_t text = prompt.tokens - prompt.visual_tokens(), kept_visual = kept.size() - text;
    if (plan) {  // else a later stage is wrong
      FUZZ_CHECK(plan->stage[s].filtering_layer == config.filtering_layer);
      FUZZ_CHECK(plan->stage[s].kept_visual == kept_visual);
      FUZZ_CHECK(plan->tokens_in_group(s) == tokens && plan->tokens_in_group(s + 1) == kept.size());
    }

    FUZZ_CHECK(fastv::compact(kept, fastv::rows(origin.data(), tokens)));
    const auto written = fastv::next_spans(kept, here, now.span());
    FUZZ_CHECK(written);
    spans = *written;
    tokens = kept.size();
    const std::vector<Index> there(origin.begin(), origin.begin() + static_cast<std::ptrdiff_t>(tokens));
    const std::vector<std::size_t> still = left_of(there, prompt.visual);
    const std::vector<Image> after = images({now.data(), now.data() + spans});
    FUZZ_CHECK(after.size() == before.size() && after.size() == still.size());
    std::size_t minima = 0;
    for (const Image& image : before) minima += (std::min)(config.min_per_image, image.tokens);
    for (std::size_t i = 0; i < after.size(); ++i) {
      FUZZ_CHECK(after[i].tokens == still[i]);
      if (config.quota == fastv::Quota::per_image) FUZZ_CHECK(shared && still[i] == quotas[i]);
      if (minima <= kept_visual) FUZZ_CHECK(still[i] >= (std::min)(config.min_per_image, before[i].tokens));
    }
    std::size_t texts = 0;
    for (const Index token : there) {
      bool text_token = true;
      for (const TokenSpan& span : prompt.visual)
        text_token = text_token && !(token >= span.first && token < span.first + span.count);
      texts += text_token ? 1u : 0u;
    }
    FUZZ_CHECK(texts == text);
    pooled = pooled || (config.quota == fastv::Quota::pooled && before.size() > 1);
    if (tokens == 0) break;  // no text, and nothing that stays
  }
  if (tokens > 0) FUZZ_CHECK(static_cast<bool>(plan) == can_plan);
  if (plan && tokens > 0) FUZZ_CHECK(plan->kept() == tokens);
}

// make_plan, quotas, schedules, the planner: every length against plain loops; bad numbers must be told, not used.
#include "fuzz.hpp"

namespace {

using namespace fuzz;

// A schedule's plan by the rules of plan.hpp: kept visual tokens of each stage. False: it cannot be planned.
bool plan_by_hand(const std::vector<fastv::Config>& schedule, const std::vector<TokenSpan>& visual, std::size_t layers,
                  std::vector<std::size_t>& kept) {
  std::vector<Picture> now = pictures(visual);
  bool pooled = false;
  for (std::size_t s = 0; s < schedule.size(); ++s) {
    const fastv::Config& config = schedule[s];
    if (config.filtering_layer >= layers) return false;
    if (s > 0 && config.filtering_layer <= schedule[s - 1].filtering_layer) return false;
    if (pooled && config.quota == fastv::Quota::per_picture) return false;
    bool fits = true;
    const std::vector<std::size_t> quota = quotas(config, now, fits);
    if (!fits) return false;
    kept.push_back(std::accumulate(quota.begin(), quota.end(), std::size_t{0}));
    if (now.empty()) continue;
    if (config.quota == fastv::Quota::pooled) {
      pooled = pooled || now.size() > 1;
      Picture all;
      for (const Picture& picture : now) all.original += picture.original;
      all.tokens = kept.back();
      now = {all};
    } else {
      for (std::size_t i = 0; i < now.size(); ++i) now[i].tokens = quota[i];
    }
  }
  return true;
}

void right_numbers(Input& in) {
  const oracle::Layout prompt = layout(in, 5, in.one_in(8) ? 5000 : 40);
  const std::size_t layers = in.between(1, 9);
  std::vector<fastv::Config> schedule(in.below(4));
  std::size_t layer = 0, left = prompt.visual_tokens();
  for (fastv::Config& stage : schedule) {
    stage = config(in, left);
    stage.filtering_layer = layer += in.between(in.one_in(9) ? 0 : 1, 3);
    if (stage.filtering_layer == 0) stage.selection = fastv::Selection::uniform;
    if (stage.keep_count != fastv::by_ratio) left = stage.keep_count;
  }
  const Block<TokenSpan> visual(prompt.visual), scratch(prompt.visual.size());
  const Block<Index> room(prompt.visual.size());
  const Block<fastv::Config> stages(schedule);
  const auto plan =
      fastv::make_plan(stages.view(), {prompt.tokens, layers, visual.view()}, scratch.span(), room.span());
  std::vector<std::size_t> kept;
  const bool planned = plan_by_hand(schedule, prompt.visual, layers, kept);
  check_message(plan.status);
  FUZZ_CHECK(static_cast<bool>(plan) == planned);
  if (!planned) return;
  FUZZ_CHECK(plan->stages == schedule.size());
  for (std::size_t l = 0; l < layers; ++l) {
    std::size_t visual_tokens = prompt.visual_tokens();
    for (std::size_t s = 0; s < schedule.size(); ++s)
      if (schedule[s].filtering_layer <= l) visual_tokens = kept[s];
    FUZZ_CHECK(plan->visual_in_layer(l) == visual_tokens);
    FUZZ_CHECK(plan->tokens_in_layer(l) == prompt.tokens - prompt.visual_tokens() + visual_tokens);
    FUZZ_CHECK(plan->kv_length(l, 3) == plan->tokens_in_layer(l) + 3);
  }
  FUZZ_CHECK(plan->kept() == plan->tokens_in_layer(layers - 1) && plan->next_position(2) == prompt.tokens + 2);

  // What every picture keeps in the first stage.
  if (schedule.empty() || schedule[0].quota == fastv::Quota::pooled) return;
  bool fits = true;
  const std::vector<Picture> all = pictures(prompt.visual);
  const std::vector<std::size_t> quota = quotas(schedule[0], all, fits);
  const Block<Index> exact(all.size());
  FUZZ_CHECK(fastv::picture_quotas(schedule[0], visual.view(), exact.span()));
  for (std::size_t i = 0; i < all.size(); ++i) FUZZ_CHECK(exact[i] == quota[i]);
  if (all.empty()) return;
  FUZZ_CHECK(fastv::picture_quotas(schedule[0], visual.view(), {exact.data(), all.size() - 1}).code ==
             Errc::room_too_small);
}

// Any spans, any settings: the answer is a plan or an error, and an error exactly where a plain look finds a fault.
void any_numbers(Input& in) {
  oracle::Layout prompt = layout(in, 4, 30);
  fastv::Config settings = config(in, prompt.visual_tokens());
  std::size_t layers = in.between(1, 9);
  settings.selection = static_cast<fastv::Selection>(in.below(3));
  for (std::size_t faults = in.between(1, 2); faults > 0; --faults) {
    TokenSpan nowhere{0, 1};
    TokenSpan& span = prompt.visual.empty() ? nowhere : prompt.visual[in.below(prompt.visual.size())];
    switch (in.below(13)) {
      case 0: span.first = in.hostile(); break;
      case 1: span.count = in.hostile(); break;
      case 2: span.columns = in.hostile(); break;
      case 3: span.continues = !span.continues; break;
      case 4: span.original = in.hostile(); break;
      case 5: prompt.tokens = in.hostile(); break;
      case 6: settings.filtering_ratio = in.hostile_real(); break;
      case 7: settings.filtering_layer = in.hostile(); break;
      case 8: settings.keep_count = in.hostile(); break;
      case 9: settings.uniform_share = in.hostile_real(); break;
      case 10: (in.chance() ? settings.window_rows : settings.window_columns) = in.hostile(); break;
      case 11: settings.min_per_picture = in.hostile(); break;
      default: layers = in.hostile(); break;
    }
  }
  bool right = prompt.tokens > 0 && prompt.tokens <= fastv::max_tokens && layers > settings.filtering_layer;
  right = right && settings.filtering_ratio >= 0 && settings.filtering_ratio <= 1;
  right = right && settings.uniform_share >= 0 && settings.uniform_share <= 1;
  right = right && (settings.window_rows == 0) == (settings.window_columns == 0);
  right = right && (settings.filtering_layer > 0 || settings.selection != fastv::Selection::top_k);
  std::size_t reach = 0;
  for (std::size_t i = 0; right && i < prompt.visual.size(); ++i) {
    const TokenSpan& span = prompt.visual[i];
    right = span.count > 0 && span.first >= reach && span.first < prompt.tokens &&
            span.count < prompt.tokens - span.first && (span.original == 0 || span.original >= span.count) &&
            span.original <= fastv::max_tokens && !(i == 0 && span.continues);
    reach = span.first + span.count;
  }
  for (const Picture& picture : right ? pictures(prompt.visual) : std::vector<Picture>())
    right = right && (picture.columns == 0 || picture.tokens % picture.columns == 0);
  if (right) {
    bool fits = true;
    quotas(settings, pictures(prompt.visual), fits);
    right = fits;
  }
  const Block<TokenSpan> visual(prompt.visual);
  const auto plan = fastv::make_plan(settings, {prompt.tokens, layers, visual.view()});
  check_message(plan.status);
  FUZZ_CHECK(static_cast<bool>(plan) == right);

  // The free functions on the same numbers: an error, or a count that fits.
  const auto kept = fastv::kept_visual(settings, visual.view());
  check_message(kept.status);
  if (right) FUZZ_CHECK(*kept == plan->kept_visual() && *kept <= plan->visual);
  const Block<Index> room(prompt.visual.size());
  check_message(fastv::picture_quotas(settings, visual.view(), room.span()));
}

// settings_under(): its answer fits, and no larger one does; by trying them all.
void a_budget(Input& in) {
  const fastv::ModelShape shape{in.between(1, 6),  in.between(1, 64), in.between(1, 8), in.between(1, 8),
                                in.between(1, 32), in.between(1, 99), in.between(2, 3), in.below(200)};
  const oracle::Layout prompt = layout(in, 3, 25);
  const Block<TokenSpan> visual(prompt.visual);
  std::vector<fastv::LayerTime> table(in.below(4));
  std::size_t tokens = 0;
  double seconds = 0;
  for (fastv::LayerTime& time : table) time = {tokens += in.between(1, 60), seconds += in.share()};
  if (!table.empty() && in.one_in(6)) table[in.below(table.size())].seconds = in.hostile_real();
  if (!table.empty() && in.one_in(6)) table[in.below(table.size())].tokens = in.hostile();
  const Block<fastv::LayerTime> times(table);
  const auto kind = static_cast<fastv::Budget::Of>(in.below(4));
  const bool by_time = kind == fastv::Budget::Of::seconds;
  fastv::Budget budget{kind, 0, 2, in.below(5), times.view()};
  const std::size_t first = in.below(7), layers = in.one_in(8) ? in.hostile() : shape.layers;
  const fastv::Prompt whole{prompt.tokens, layers, visual.view()};
  // A limit among the costs that can come out.
  fastv::Config some;
  some.filtering_layer = first == 0 ? 1 : first;
  some.keep_count = in.below(prompt.visual_tokens() + 1);
  const auto at = fastv::make_plan(some, whole);
  const bool good_times = !by_time || times.size() >= 2;
  budget.limit = at && good_times && layers == shape.layers ? fastv::detail::cost_under(shape, *at, budget) : 1;
  if (in.one_in(4)) budget.limit = in.hostile_real();
  fastv::Config base;
  if (first == 0) base.selection = fastv::Selection::random;
  const auto found = fastv::settings_under(budget, shape, whole, first, base);
  check_message(found.status);
  if (!found) return;
  std::size_t best = 0, latest = 0;
  for (std::size_t keep = prompt.visual_tokens() + 1; keep-- > 0 && latest == 0;)
    for (std::size_t k = first; k < layers; ++k) {
      fastv::Config one = base;
      one.filtering_layer = k;
      one.keep_count = keep;
      if (fastv::detail::cost_under(shape, *fastv::make_plan(one, whole), budget) <= budget.limit)
        best = keep, latest = k + 1;
    }
  FUZZ_CHECK(latest > 0 && found->keep_count == best && found->filtering_layer + 1 == latest);
}

}  // namespace

FASTV_FUZZ_TARGET(plan) {
  switch (in.below(4)) {
    case 0: return any_numbers(in);
    case 1: return a_budget(in);
    default: return right_numbers(in);
  }
}

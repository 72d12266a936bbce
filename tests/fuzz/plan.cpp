// make_plan, quotas, the planner: every length against plain loops; bad numbers must be told, not used. (Schedules whose
// stages are carried out: schedule.cpp.)
#include "fuzz.hpp"

namespace {

using namespace fuzz;

// A schedule's plan by the rules of plan.hpp: kept visual tokens of each stage. False: it cannot be planned.
bool plan_by_hand(const std::vector<fastv::Config>& schedule, const std::vector<TokenSpan>& visual, std::size_t layers,
                  std::vector<std::size_t>& kept) {
  std::vector<Image> now = images(visual);
  bool pooled = false;
  for (std::size_t s = 0; s < schedule.size(); ++s) {
    const fastv::Config& config = schedule[s];
    if (config.filtering_layer >= layers) return false;
    if (s > 0 && config.filtering_layer <= schedule[s - 1].filtering_layer) return false;
    if (pooled && config.quota == fastv::Quota::per_image) return false;
    if (pooled && config.min_per_image > 0 && config.keep_count == fastv::by_ratio) return false;
    for (const Image& image : now)
      if (image.filtering_ratio >= 0 && (config.quota == fastv::Quota::pooled || config.keep_count != fastv::by_ratio))
        return false;
    const Shares share = shares(config, now);
    if (!share.count_fits) return false;
    kept.push_back(share.kept);
    if (now.empty()) continue;
    if (config.quota == fastv::Quota::pooled) {
      pooled = pooled || now.size() > 1;
      Image all;
      for (const Image& image : now) all.original += image.original;
      all.tokens = kept.back();
      now = {all};
    } else {
      for (std::size_t i = 0; i < now.size(); ++i) now[i].tokens = share.quota[i];
    }
  }
  return true;
}

void right_numbers(Input& in) {
  oracle::Layout prompt = layout(in, 5, in.one_in(8) ? 5000 : 40, false);
  const std::size_t layers = in.between(1, 9);
  std::vector<fastv::Config> schedule(in.below(4));
  std::size_t layer = 0, left = prompt.visual_tokens();
  for (fastv::Config& stage : schedule) {
    stage = config(in, left);
    stage.filtering_layer = layer += in.between(in.one_in(9) ? 0 : 1, 3);
    if (stage.keep_count != fastv::by_ratio) left = stage.keep_count;
  }
  if (!schedule.empty()) own_ratios(in, schedule[0], prompt.visual);
  const Block<TokenSpan> visual(prompt.visual);
  const Block<fastv::Config> stages(schedule);
  std::vector<std::size_t> before(in.one_in(3) ? in.chance() ? 1 : layers : 0);
  for (std::size_t& keys : before) keys = in.below(50);
  std::size_t changes = 0;
  for (std::size_t l = 1; l < before.size(); ++l) changes += before[l] != before[l - 1] ? 1u : 0u;
  const Block<std::size_t> past(before);
  const auto plan = fastv::make_plan(stages.view(), {prompt.tokens, layers, visual.view(), past.view()});
  std::vector<std::size_t> kept;
  const bool planned = plan_by_hand(schedule, prompt.visual, layers, kept) && changes <= fastv::max_stages;
  check_message(plan.status);
  FUZZ_CHECK(static_cast<bool>(plan) == planned);
  if (!planned) return;
  FUZZ_CHECK(plan->stages == schedule.size() && plan->groups() == schedule.size() + 1);
  for (std::size_t l = 0; l < layers; ++l) {
    std::size_t visual_tokens = prompt.visual_tokens(), group = 0;
    for (std::size_t s = 0; s < schedule.size(); ++s)
      if (schedule[s].filtering_layer <= l) visual_tokens = kept[s], group = s + 1;
    const std::size_t keys = before.empty() ? 0 : before[before.size() == 1 ? 0 : l];
    FUZZ_CHECK(plan->group_of(l) == group);
    FUZZ_CHECK(plan->visual_in_layer(l) == visual_tokens);
    FUZZ_CHECK(plan->tokens_in_layer(l) == prompt.tokens - prompt.visual_tokens() + visual_tokens);
    FUZZ_CHECK(plan->tokens_in_group(group) == plan->tokens_in_layer(l));
    FUZZ_CHECK(plan->kv_length(l, 3) == keys + plan->tokens_in_layer(l) + 3);
  }
  FUZZ_CHECK(plan->kept() == plan->tokens_in_layer(layers - 1) && plan->next_position(2) == prompt.tokens + 2);

  // What every image keeps in the first stage.
  if (schedule.empty() || schedule[0].quota == fastv::Quota::pooled) return;
  const std::vector<Image> all = images(prompt.visual);
  const Shares share = shares(schedule[0], all);
  const Block<Index> exact(2 * all.size());
  const auto found = fastv::image_quotas(schedule[0], visual.view(), exact.span());
  FUZZ_CHECK(found && *found == all.size());
  for (std::size_t i = 0; i < all.size(); ++i) FUZZ_CHECK(exact[i] == share.quota[i]);
  if (all.empty()) return;
  FUZZ_CHECK(fastv::image_quotas(schedule[0], visual.view(), {exact.data(), 2 * all.size() - 1}).code() ==
             Errc::too_small);
}

// Any spans, any settings: the answer is a plan or an error, and an error exactly where a plain look finds a fault.
void any_numbers(Input& in) {
  oracle::Layout prompt = layout(in, 4, 30, false);
  fastv::Config settings = config(in, prompt.visual_tokens());
  std::size_t layers = in.between(1, 9);
  settings.selection = static_cast<fastv::Selection>(in.below(3));
  own_ratios(in, settings, prompt.visual);
  std::vector<char> full(in.one_in(3) ? layers : 0);  // not vector<bool>, which has no data()
  for (char& layer : full) layer = in.chance() ? 1 : 0;
  std::vector<std::size_t> past(in.one_in(4) ? in.between(1, 3) : 0);
  for (std::size_t& keys : past) keys = in.one_in(3) ? in.hostile() : in.below(50);
  for (std::size_t faults = in.between(1, 2); faults > 0; --faults) {
    TokenSpan nowhere{0, 1};
    TokenSpan& span = prompt.visual.empty() ? nowhere : prompt.visual[in.below(prompt.visual.size())];
    switch (in.below(15)) {
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
      case 11: settings.min_per_image = in.hostile(); break;
      case 12: span.filtering_ratio = in.hostile_real(); break;
      case 13: settings.window_rows = in.between(1, 4), settings.window_columns = in.between(1, 4); break;
      default: layers = in.hostile(); break;
    }
  }
  const bool top_k = settings.selection == fastv::Selection::top_k;
  bool right = prompt.tokens > 0 && prompt.tokens <= fastv::max_tokens && layers > settings.filtering_layer;
  right = right && settings.filtering_ratio >= 0 && settings.filtering_ratio <= 1;
  right = right && settings.uniform_share >= 0 && settings.uniform_share <= 1;
  right = right && (!top_k || (settings.window_rows == 0) == (settings.window_columns == 0));
  std::size_t reach = 0;
  for (std::size_t i = 0; right && i < prompt.visual.size(); ++i) {
    const TokenSpan& span = prompt.visual[i];
    right = (span.count > 0 || span.original > 0) && span.first >= reach && span.first <= prompt.tokens &&
            span.count <= prompt.tokens - span.first && (span.original == 0 || span.original >= span.count) &&
            span.original <= fastv::max_tokens && !(i == 0 && span.continues) &&
            (span.filtering_ratio == fastv::by_config ||
             (span.filtering_ratio >= 0 && span.filtering_ratio <= 1 && !span.continues));
    reach = span.first + span.count;
  }
  const bool windows = top_k && settings.window_rows != 0, pooled = settings.quota == fastv::Quota::pooled;
  for (const Image& image : right ? images(prompt.visual) : std::vector<Image>()) {
    right = right && (image.columns == 0 || image.tokens % image.columns == 0);
    right = right && !(windows && image.columns == 0 && image.tokens > 0);
    right = right && (image.filtering_ratio == fastv::by_config || (settings.keep_count == fastv::by_ratio && !pooled));
  }
  right = right && !(windows && pooled);
  if (right) right = shares(settings, images(prompt.visual)).count_fits;
  const bool settings_right = right || layers <= settings.filtering_layer;
  if (top_k && !full.empty() && settings.filtering_layer > 0)
    right = right && full.size() == layers && full[settings.filtering_layer - 1] != 0;
  right = right && (past.size() < 2 || past.size() == layers);
  for (const std::size_t keys : past) right = right && keys <= fastv::max_tokens - prompt.tokens;
  const Block<TokenSpan> visual(prompt.visual);
  const Block<bool> attention(full);
  const Block<std::size_t> keys(past);
  const auto plan = fastv::make_plan(settings, {prompt.tokens, layers, visual.view(), keys.view(), attention.view()});
  check_message(plan.status);
  FUZZ_CHECK(static_cast<bool>(plan) == right);

  // The free functions on the same numbers: an error, or a count that fits.
  const auto kept = fastv::kept_visual(settings, visual.view());
  check_message(kept.status);
  if (right) FUZZ_CHECK(kept && *kept == plan->kept_visual() && *kept <= plan->visual && settings_right);
  const Block<Index> room(2 * prompt.visual.size());
  check_message(fastv::image_quotas(settings, visual.view(), room.span()).status);
}

// Both roundings at any size, against 64 bits of fraction.
void a_count(Input& in) {
  const std::size_t tokens = in.chance() ? in.below(5000) : in.below(fastv::max_tokens + 1);
  const double ratio = in.chance() ? in.share() : static_cast<double>(in.below(101)) / 100;
  FUZZ_CHECK(fastv::kept_count(tokens, ratio) == oracle::kept_of(tokens, ratio));
  const std::size_t up = fastv::kept_count(tokens, ratio, fastv::Rounding::up);
  const auto n = static_cast<long double>(tokens), exact = n - n * static_cast<long double>(ratio);
  const long double error = n * 7e-16L;
  FUZZ_CHECK(static_cast<long double>(up) >= exact - error && static_cast<long double>(up) < exact + 1);
}

// The tokens that each row sees where images are read in both directions.
void seen_both_ways(Input& in) {
  const oracle::Layout prompt = layout(in, 4, 20, false);
  const std::size_t rows = in.below(prompt.tokens + 1), prefix = in.one_in(3) ? in.below(prompt.tokens + 1) : 0;
  const std::size_t past = in.chance() ? in.below(20) : 0;
  const Block<TokenSpan> visual(prompt.visual);
  const Block<Index> visible(rows);
  FUZZ_CHECK(fastv::visible_tokens(visual.view(), prompt.tokens, visible.span(), prefix, past));
  for (std::size_t r = 0; r < rows; ++r) {
    const std::size_t row = prompt.tokens - rows + r;
    std::size_t end = row + 1;
    for (std::size_t s = 0; s < prompt.visual.size(); ++s) {  // an image reaches from its first span to its last
      if (prompt.visual[s].continues) continue;
      std::size_t last = s;
      while (last + 1 < prompt.visual.size() && prompt.visual[last + 1].continues) ++last;
      const std::size_t image_end = prompt.visual[last].first + prompt.visual[last].count;
      if (row >= prompt.visual[s].first && row < image_end) end = image_end;
    }
    FUZZ_CHECK(visible[r] == past + (std::max)(end, prefix));
  }
  const std::size_t odd_prefix = in.hostile(), odd_past = in.hostile();
  const Status told = fastv::visible_tokens(visual.view(), prompt.tokens, visible.span(), odd_prefix, odd_past);
  check_message(told);
  FUZZ_CHECK(static_cast<bool>(told) == (odd_prefix <= prompt.tokens && odd_past <= fastv::max_tokens - prompt.tokens));
  FUZZ_CHECK(!fastv::visible_tokens(visual.view(), prompt.tokens, {visible.data(), prompt.tokens + 1}));
  FUZZ_CHECK(!fastv::visible_tokens(visual.view(), prompt.tokens, {nullptr, 1}));
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
  switch (in.below(8)) {
    case 0:
    case 1: return any_numbers(in);
    case 2:
    case 3: return a_budget(in);
    case 4: return a_count(in);
    case 5: return seen_both_ways(in);
    default: return right_numbers(in);
  }
}

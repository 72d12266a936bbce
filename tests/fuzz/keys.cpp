// score() and prune() from queries and keys, of every element type, in every layout, with everything that evidence.hpp
// allows between q.k and the softmax, against dense attention in double.
#include "views.hpp"

namespace {

using namespace fuzz;

// One case: the shapes, and what is done to the logits.
struct Case {
  oracle::Layout prompt;
  std::size_t total, tokens, kv_heads, group, heads, dim, past, first_key, keys, rows;
  float scale, soft_cap = 0;
  bool causal = true;
  std::size_t window = 0, heads_total = 0;
  Block<float> bias{0}, sinks{0}, alibi{0}, norms{0};
  Block<Index> visible{0};
  std::vector<float> key_scales;  // [kv heads, keys] or empty

  explicit Case(Input& in) : prompt(layout(in, 3, in.one_in(4) ? 30 : 8)) {
    total = prompt.visual_tokens(), tokens = prompt.tokens;
    kv_heads = in.between(1, 3), group = in.between(1, in.one_in(4) ? 6 : 3), heads = kv_heads * group;
    dim = in.between(1, in.one_in(4) ? 140 : 20);
    past = in.chance() ? in.below(9) : 0;
    first_key = in.one_in(3) ? in.below(past + tokens) : 0;
    keys = past + tokens - first_key;
    rows = in.one_in(4) ? tokens : in.between(1, (std::min)(tokens, std::size_t{4}));
    scale = in.one_in(4) ? 1.0f : 0.25f;
    oracle::Rng rng = in.random();
    causal = !in.one_in(4);
    if (in.one_in(4)) window = in.between(1, in.chance() ? 8 : past + tokens + 3);
    if (in.one_in(4)) {
      visible = Block<Index>(rows);
      for (Index& end : visible) end = static_cast<Index>(rng.below(past + tokens + 1));
    }
    if (in.one_in(4)) soft_cap = in.chance() ? 30.0f : 0.5f;
    if (in.one_in(4)) heads_total = heads + in.below(3);
    if (in.one_in(3)) bias = Block<float>(keys);
    if (in.one_in(4)) norms = Block<float>(kv_heads * total);
    if (in.one_in(3)) sinks = Block<float>(heads);
    if (in.one_in(4)) alibi = Block<float>(heads);
    if (in.one_in(4)) key_scales.resize(kv_heads * keys);
    const double hidden = in.share(), deep = in.chance() ? 3 : 250;  // of a sink that takes nearly all
    for (float& b : bias) b = rng.chance(hidden) ? -oracle::infinity() : static_cast<float>(rng.real(-3, 3));
    for (float& n : norms) n = static_cast<float>(rng.chance(0.1) ? 0 : rng.real(0, 3));
    for (float& s : sinks) s = static_cast<float>(rng.real(-3, deep));
    for (float& a : alibi) a = static_cast<float>(rng.real(-0.1, 1));
    for (float& s : key_scales) s = static_cast<float>(rng.real(0.1, 2));
    if (sinks.size() > 0 && in.one_in(6)) {
      static const float odd[] = {-oracle::infinity(), oracle::infinity(), oracle::nan_float()};
      sinks[in.below(heads)] = odd[in.below(3)];
    }
    if (bias.size() > 0 && in.one_in(12)) bias[in.below(keys)] = in.chance() ? oracle::nan_float() : oracle::infinity();
    // What is hidden is never read, whatever it is worth.
    std::size_t number = 0;
    for (const TokenSpan& span : prompt.visual)
      for (std::size_t t = 0; t < span.count; ++t, ++number) {
        const std::size_t token = past + span.first + t;
        const bool unseen = token < first_key || (bias.size() > 0 && bias[token - first_key] == -oracle::infinity());
        for (std::size_t h = 0; h < kv_heads && norms.size() > 0; ++h)
          if (unseen && rng.chance(0.2)) norms[h * total + number] = oracle::nan_float();
      }
  }
  bool sees(std::size_t r, std::size_t token) const {
    const std::size_t own = past + (tokens - rows) + r + 1;
    std::size_t end = causal ? own : past + tokens;
    if (visible.size() > 0) end = visible[r];
    return token >= first_key && token < end && (window == 0 || token + window >= own);
  }
};

// The scores, exactly: of each, the sum of its terms, of their magnitudes, and how wrong a logit may be in float.
struct Exact {
  std::vector<double> scores, sizes;
  std::vector<bool> seen;  // receives something, if less than a double holds
  double error = 0;

  template <class Q, class K>
  Exact(const Case& c, const Numbers<Q>& q, const Numbers<K>& k, const std::vector<Index>& positions)
      : scores(c.total, 0.0), sizes(c.total, 0.0), seen(c.total, false) {
    const auto all = static_cast<double>((c.heads_total == 0 ? c.heads : c.heads_total) * positions.size());
    for (std::size_t h = 0; h < c.heads; ++h)
      for (const Index position : positions) {
        const std::size_t r = position - (c.tokens - c.rows), kv_head = h / c.group;
        std::vector<double> p(c.keys, -HUGE_VAL);
        const double sink = c.sinks.size() == 0 ? -HUGE_VAL : static_cast<double>(c.sinks[h]);
        bool bad = std::isnan(sink);
        double most = -HUGE_VAL;
        for (std::size_t j = 0; j < c.keys; ++j) {
          if (!c.sees(r, c.first_key + j)) continue;
          p[j] = logit(c, q, k, h, kv_head, r, j);
          bad = bad || std::isnan(p[j]) || p[j] == HUGE_VAL;
          most = (std::max)(most, p[j]);
        }
        most = (std::max)(most, sink);
        const bool none = !bad && std::isinf(most);  // nothing is seen, or the sink takes it all
        double sum = std::isinf(sink) ? 0 : std::exp(sink - most);
        const std::vector<double> logits = p;
        for (std::size_t j = 0; j < c.keys; ++j) sum += p[j] = none || p[j] == -HUGE_VAL ? 0 : std::exp(p[j] - most);
        std::size_t number = 0;
        for (const TokenSpan& span : c.prompt.visual)
          for (std::size_t t = 0; t < span.count; ++t, ++number) {
            const std::size_t token = c.past + span.first + t;
            if (!c.sees(r, token)) continue;
            const double share = bad ? std::nan("") : none ? 0 : p[token - c.first_key] / sum;
            if (!bad && !none && logits[token - c.first_key] != -HUGE_VAL) seen[number] = true;
            if (share == 0) continue;
            const double norm = c.norms.size() == 0 ? 1 : static_cast<double>(c.norms[kv_head * c.total + number]);
            scores[number] += share * norm / all;
            sizes[number] += std::fabs(share * norm / all);
          }
      }
  }

 private:
  template <class Q, class K>
  double logit(const Case& c, const Numbers<Q>& q, const Numbers<K>& k, std::size_t h, std::size_t kv_head,
               std::size_t r, std::size_t j) {
    if (c.bias.size() > 0 && c.bias[j] == -oracle::infinity()) return -HUGE_VAL;
    double logit = 0, magnitude = 0;
    for (std::size_t d = 0; d < c.dim; ++d) {
      const double product = q.values[(h * c.rows + r) * c.dim + d] * static_cast<double>(c.scale) *
                             k.values[(kv_head * c.keys + j) * c.dim + d];
      logit += product;
      magnitude += std::fabs(product);
    }
    if (!c.key_scales.empty()) {
      const auto scale = static_cast<double>(c.key_scales[kv_head * c.keys + j]);
      logit *= scale;
      magnitude *= scale;
    }
    if (c.soft_cap > 0) {
      const auto cap = static_cast<double>(c.soft_cap);
      logit = cap * std::tanh(logit / cap);
      magnitude += cap;
    }
    if (c.alibi.size() > 0) {
      const double distance =
          static_cast<double>(c.past + (c.tokens - c.rows) + r) - static_cast<double>(c.first_key + j);
      logit -= static_cast<double>(c.alibi[h]) * distance;
      magnitude += std::fabs(static_cast<double>(c.alibi[h]) * distance);
    }
    if (c.bias.size() > 0) logit += static_cast<double>(c.bias[j]);
    if (std::isfinite(magnitude)) error = (std::max)(error, 1e-6 * (magnitude + 3));
    return logit;
  }
};

// Ours are the exact ones or, where all of those are tiny and heads are not sharded, the exact ones times one factor.
template <class Score>
void expect_scores(const Case& c, const Exact& exact, const Block<Score>& ours) {
  const double relative = 1e-5 + 3 * std::expm1(2 * exact.error);
  double most = 0, our_most = 0;
  bool nans = false;
  for (std::size_t i = 0; i < c.total; ++i) {
    FUZZ_CHECK(std::isnan(exact.scores[i]) == oracle::is_nan(ours[i]));
    nans = nans || std::isnan(exact.scores[i]);
    most = (std::max)(most, exact.scores[i]);
    our_most = (std::max)(our_most, static_cast<double>(ours[i]));
  }
  if (!nans && most == 0 && our_most > 0 && c.heads_total <= c.heads) {
    // Below every double, and by us brought into range: which ones is all that can be said.
    for (std::size_t i = 0; i < c.total; ++i) FUZZ_CHECK(exact.seen[i] || !(std::fabs(ours[i]) > 0));
    return;
  }
  double factor = 1;
  if (!nans && most < 1e-12 * (1 + relative) && most > 0 && c.heads_total <= c.heads) {
    FUZZ_CHECK(our_most > 0);
    if (most < 1e-12 * (1 - relative) || our_most > 2e-12) factor = our_most / most;
    FUZZ_CHECK(factor > 1 - relative);
  }
  const double slack = relative * (factor == 1 ? 1 : 2);
  for (std::size_t i = 0; i < c.total; ++i) {
    if (!std::isnan(exact.scores[i]))
      FUZZ_CHECK(std::fabs(static_cast<double>(ours[i]) - factor * exact.scores[i]) <=
                 slack * factor * exact.sizes[i] + 1e-36);
  }
}

// select() on scores that have been checked: what prune() must come to.
template <class Score, class Evidence>
void expect_pruned(const Case& c, const fastv::Config& config, const Evidence& evidence, Span<const TokenSpan> visual,
                   const Block<Score>& scores) {
  const Block<Index> kept(c.tokens);
  const Block<fastv::Mark<Score>> marks(fastv::select_scratch(config, visual));
  fastv::Result<fastv::Selected> selected{};
  Block<Score> ranked(scores);
  if (!config.prior_rows.empty() && c.total > 0) {
    fastv::Config prior = config;
    prior.score_rows = fastv::ScoreRows::listed;
    prior.listed_rows = config.prior_rows;
    const Block<Score> prior_scores(c.total);
    const Block<float> scratch(fastv::score_scratch(evidence));
    FUZZ_CHECK(fastv::score<Score>(prior, evidence, visual, prior_scores.span(), scratch.span()));
    selected.status = fastv::correct_by_prior(ranked.span(), prior_scores.view());
  }
  if (selected) selected = fastv::select<Score>(config, ranked.view(), visual, c.tokens, kept.span(), marks.span());
  fastv::Pruner<Score> pruner(config);
  if (c.heads_total > c.heads && config.selection == fastv::Selection::top_k && !visual.empty()) {  // partial sums
    FUZZ_CHECK(pruner.prune(evidence, visual).code() == fastv::Errc::missing_evidence);
    return;
  }
  for (int again = 0; again < 2; ++again) {  // the second finds memory that has been used
    const fastv::Kept pruned = pruner.prune(evidence, visual);
    check_message(pruned.status);
    FUZZ_CHECK(pruned.code() == selected.code());
    if (!pruned) continue;
    FUZZ_CHECK(pruned.size() == selected->count && std::equal(pruned.begin(), pruned.end(), kept.begin()));
    FUZZ_CHECK(pruned.nan_scores == selected->nan_scores && pruned.zero_scores == selected->zero_scores);
    FUZZ_CHECK(pruner.scores().size() == c.total);
    if (c.total > 0) FUZZ_CHECK(std::memcmp(pruner.scores().data(), ranked.data(), c.total * sizeof(Score)) == 0);
  }
}

// One number wrong. False: it may be right as it is.
template <class Evidence>
bool spoil(Input& in, const Case& c, Evidence& bad) {
  const auto paged = [](const auto& view) { return view.pages.paged(); };
  switch (in.below(20)) {
    case 0: bad.query.heads = in.hostile(); return bad.query.heads % c.kv_heads != 0 || bad.query.heads == 0;
    case 1: bad.key.heads = in.hostile(); return bad.key.heads == 0 || c.heads % bad.key.heads != 0;
    case 2: bad.query.tokens = in.hostile(); return bad.query.tokens == 0 || bad.query.tokens > c.tokens;
    case 3:
      bad.key.tokens = in.hostile();
      return bad.key.tokens == 0 || bad.key.tokens > fastv::max_tokens || c.first_key + bad.key.tokens <= c.past;
    case 4: bad.past = in.hostile(); return bad.past >= c.past + c.tokens;
    case 5: bad.query.dim = in.chance() ? 0 : static_cast<std::size_t>(-1) - in.below(99); return true;
    case 6: bad.key.dim = in.chance() ? 0 : static_cast<std::size_t>(-1) - in.below(99); return true;
    case 7: bad.query.data = nullptr; return bad.query.pages.blocks.empty();
    case 8: bad.query.head_stride = -1 - static_cast<std::ptrdiff_t>(in.below(99)); return true;
    case 9: bad.query.head_stride = 0; return c.heads > 1;
    case 10:
      bad.query.token_stride = in.chance() ? 0 : static_cast<std::ptrdiff_t>((static_cast<std::size_t>(-1) >> 1) - 9);
      return (paged(bad.query) ? bad.query.pages.block_tokens : c.rows) > 1;
    case 11: bad.scale = static_cast<float>(in.hostile_real()); return !(bad.scale > 0) || std::isinf(bad.scale);
    case 12:
      bad.soft_cap = static_cast<float>(in.hostile_real());
      return !(bad.soft_cap >= 0) || std::isinf(bad.soft_cap);
    case 13:
      bad.bias = {in.chance() ? c.bias.data() : nullptr, in.hostile() | 1};
      return bad.bias.size() != c.keys || bad.bias.data() == nullptr;
    case 14: bad.value_norms = {nullptr, in.hostile() | 1}; return c.total > 0;
    case 15: bad.heads_total = in.below(c.heads); return bad.heads_total != 0;
    case 16: {
      const bool which = in.chance();
      (which ? bad.sinks : bad.alibi) = Span<const float>(nullptr, in.hostile() | 1);
      return true;
    }
    case 17:
      bad.visible = {c.visible.data(), c.rows + 1};
      if (c.visible.size() > 0 && in.chance()) {
        bad.visible = c.visible.view();
        c.visible[in.below(c.rows)] = static_cast<Index>(c.past + c.tokens + 1 + in.below(9));
      }
      return true;
    case 18:
      bad.first_key = in.hostile();
      return bad.first_key > fastv::max_tokens - c.keys || c.past >= bad.first_key + c.keys;
    default: {
      static const float one = 1;
      bad.key_scales = fastv::heads(in.chance() ? &one : nullptr, fastv::HeadMajor{c.kv_heads + 1, c.keys, 1});
      return bad.key_scales.data != nullptr;
    }
  }
}
template <class Q, class K>
bool spoil_keys(Input& in, const Case& c, fastv::QueryKey<Q, fastv::Heads<K>>& bad) {
  fastv::Heads<K>& key = bad.key;
  const bool paged = key.pages.paged(), by_pointers = !key.pages.blocks.empty();
  switch (in.below(8)) {
    case 0: key.data = nullptr; return !by_pointers;
    case 1: key.head_stride = -1 - static_cast<std::ptrdiff_t>(in.below(99)); return true;
    case 2: key.token_stride = static_cast<std::ptrdiff_t>(in.hostile() | std::size_t{1} << 63); return true;
    case 3: key.pages.chunk = in.hostile(); return key.pages.chunk != 0 && c.dim % key.pages.chunk != 0;
    case 4: key.pages.block_tokens = 0; return paged;
    case 5:
      if (by_pointers)
        key.pages.blocks = {nullptr, key.pages.blocks.size()};
      else
        key.pages.block_table = {nullptr, in.hostile() | 1};
      return true;
    case 6:
      if (!paged) return false;
      if (by_pointers)
        key.pages.blocks = {key.pages.blocks.data(), (c.keys - 1) / key.pages.block_tokens};
      else
        key.pages.block_table = {key.pages.block_table.data(), (c.keys - 1) / key.pages.block_tokens};
      return key.pages.paged();
    default:
      key.token_stride = in.chance() ? 0 : static_cast<std::ptrdiff_t>((static_cast<std::size_t>(-1) >> 1) - 9);
      return (paged ? key.pages.block_tokens : c.keys) > 1;
  }
}
template <class Q, class Load>
bool spoil_keys(Input& in, const Case&, fastv::QueryKey<Q, fastv::LoadedKeys<Load>>& bad) {
  (in.chance() ? bad.key.dim : bad.key.heads) = in.chance() ? 0 : fastv::max_tokens + 1;
  return true;
}

template <class Score, class Q, class K, class Evidence>
void check(Input& in, Case& c, Evidence evidence, const fastv::Heads<float>& key_scales, const Numbers<Q>& q,
           const Numbers<K>& k) {
  evidence.past = c.past;
  evidence.first_key = c.first_key;
  evidence.causal = c.causal;
  evidence.window = c.window;
  evidence.soft_cap = c.soft_cap;
  evidence.heads_total = c.heads_total;
  evidence.bias = c.bias.view();
  evidence.sinks = c.sinks.view();
  evidence.alibi = c.alibi.view();
  evidence.value_norms = c.norms.view();
  evidence.visible = c.visible.view();
  if (!c.key_scales.empty()) evidence.key_scales = key_scales;
  FUZZ_CHECK(evidence.prompt_tokens() == c.tokens);

  fastv::Config config = fuzz::config(in, c.total);
  if (in.one_in(4)) config.uniform_share = in.share();
  const RowChoice chosen(in, c.tokens, c.rows, config), prior(in, c.tokens, c.rows);
  const Exact exact(c, q, k, chosen.positions);
  const Block<TokenSpan> visual(c.prompt.visual);
  const Block<Score> scores(c.total), again(c.total);
  const Block<float> scratch(fastv::score_scratch(evidence), oracle::nan_float());
  const Status status = fastv::score<Score>(config, evidence, visual.view(), scores.span(), scratch.span());
  if (!status) std::fputs(status.message().c_str(), stderr);
  FUZZ_CHECK(status);
  expect_scores(c, exact, scores);
  FUZZ_CHECK(fastv::score<Score>(config, evidence, visual.view(), again.span(), scratch.span(), Backwards{}));
  FUZZ_CHECK(same_bits(scores, again));
  if (in.one_in(4)) config.prior_rows = prior.listed.view();
  expect_pruned(c, config, evidence, visual.view(), scores);

  // One number wrong: told, by score() and by prune().
  auto bad = evidence;
  Span<const TokenSpan> spans = visual.view();
  TokenSpan past_the_end{c.tokens - 1, 2};
  fastv::Config plain;
  const Index before_all = static_cast<Index>(c.tokens - c.rows - (c.rows < c.tokens ? 1 : 0));
  bool wrong = true;
  switch (in.below(8)) {
    case 0: spans = {&past_the_end, 1}; break;
    case 1:
      plain.score_rows = fastv::ScoreRows::listed;
      plain.listed_rows = {&before_all, 1};
      wrong = c.rows < c.tokens;
      break;
    case 2:
    case 3: wrong = spoil_keys(in, c, bad); break;
    default: wrong = spoil(in, c, bad); break;
  }
  if (!wrong) return;
  const Block<float> large(4096);
  const Status told = fastv::score<Score>(plain, bad, spans, again.span(), large.span());
  check_message(told);
  FUZZ_CHECK(!told);
  check_message(fastv::score<Score>(plain, evidence, visual.view(), {nullptr, c.total}, {nullptr, scratch.size()}));
  if (c.total == 0) return;
  const fastv::Kept refused = fastv::Pruner<Score>(plain).prune(bad, spans);
  check_message(refused.status);
  FUZZ_CHECK(!refused && refused.code() != Errc::out_of_memory);
  evidence.visible = {};
  FUZZ_CHECK(fastv::score<Score>({}, evidence, visual.view(), {again.data(), c.total - 1}, scratch.span()).code ==
             Errc::too_small);
  FUZZ_CHECK(
      fastv::score<Score>({}, evidence, visual.view(), again.span(), {scratch.data(), scratch.size() - 1}).code ==
      Errc::too_small);
}

template <class Q, class K, class Score>
void score_once(Input& in) {
  Case c(in);
  const Numbers<Q> q(in, c.heads * c.rows * c.dim);
  const Numbers<K> k(in, c.kv_heads * c.keys * c.dim);
  const Stored<Q> queries(in, q.elements, c.heads, c.rows, c.dim);
  const Stored<float> scales(in, c.key_scales.empty() ? std::vector<float>(c.kv_heads * c.keys) : c.key_scales,
                             c.kv_heads, c.keys, 1);
  if (in.one_in(4)) {
    check<Score>(in, c, fastv::query_key(queries.view(), loaded(k.elements, c.kv_heads, c.keys, c.dim), c.scale),
                 scales.view(), q, k);
  } else {
    const Stored<K> stored(in, k.elements, c.kv_heads, c.keys, c.dim);
    check<Score>(in, c, fastv::query_key(queries.view(), stored.view(), c.scale), scales.view(), q, k);
  }
}

}  // namespace

FASTV_FUZZ_TARGET(keys) {
  using fastv::bfloat16;
  using fastv::half;
  switch (in.below(10)) {
    case 0: return score_once<float, float, float>(in);
    case 1: return score_once<half, half, float>(in);
    case 2: return score_once<bfloat16, bfloat16, float>(in);
    case 3: return score_once<double, double, double>(in);
    case 4: return score_once<float, half, float>(in);
    case 5: return score_once<float, bfloat16, double>(in);
    case 6: return score_once<half, float, double>(in);
    case 7: return score_once<bfloat16, fastv::fp8_e4m3, float>(in);
    case 8: return score_once<half, fastv::fp8_e5m2, double>(in);
    default: return score_once<float, std::int8_t, float>(in);
  }
}

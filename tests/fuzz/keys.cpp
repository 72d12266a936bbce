// score() from queries and keys, of every element type, in every layout, against dense attention in double.
#include "views.hpp"

namespace {

using namespace fuzz;

// One head's row of logits and what they are off by at most.
struct Logits {
  std::vector<double> values;
  double error = 0;
};

template <class Q, class K, class Score>
void score_once(Input& in) {
  const oracle::Layout prompt = layout(in, 3, 20);
  const std::size_t total = prompt.visual_tokens(), tokens = prompt.tokens;
  const std::size_t kv_heads = in.between(1, 3), group = in.between(1, 3), heads = kv_heads * group;
  const std::size_t dim = in.between(1, in.one_in(3) ? 140 : 36), past = in.one_in(2) ? in.below(9) : 0;
  const std::size_t keys = past + tokens,
                    rows = in.one_in(3) ? tokens : in.between(1, (std::min)(tokens, std::size_t{4}));

  const Numbers<Q> q(in, heads * rows * dim);
  const Numbers<K> k(in, kv_heads * keys * dim);
  const Stored<K> stored(in, k.elements, kv_heads, keys, dim);
  // Queries: [rows, heads] or [heads, rows], with gaps.
  const std::size_t inner = dim + in.below(4);
  const bool rows_outside = in.chance();
  const std::size_t outer = inner * (rows_outside ? heads : rows) + in.below(4);
  const std::size_t head_stride = rows_outside ? inner : outer, row_stride = rows_outside ? outer : inner;
  const Block<Q> queries((heads - 1) * head_stride + (rows - 1) * row_stride + dim, nan_of<Q>());
  for (std::size_t h = 0; h < heads; ++h)
    for (std::size_t r = 0; r < rows; ++r)
      for (std::size_t d = 0; d < dim; ++d)
        queries[h * head_stride + r * row_stride + d] = q.elements[(h * rows + r) * dim + d];

  const float scale = in.one_in(4) ? 1.0f : 0.25f;
  auto evidence = fastv::query_key(queries.data(), heads, rows, stored.view(), scale);
  evidence.query_head_stride = static_cast<std::ptrdiff_t>(head_stride);
  evidence.query_row_stride = static_cast<std::ptrdiff_t>(row_stride);
  evidence.past = past;
  evidence.causal = !in.one_in(4);
  if (in.one_in(4)) evidence.soft_cap = in.chance() ? 30.0f : 0.5f;
  if (in.one_in(4)) evidence.heads_total = heads + in.below(3);
  oracle::Rng rng = in.random();
  Block<float> bias(in.one_in(3) ? keys : 0), norms(in.one_in(4) ? kv_heads * total : 0);
  const double hidden = in.share();
  for (float& b : bias) b = rng.chance(hidden) ? -oracle::infinity() : static_cast<float>(rng.real(-3, 3));
  for (float& n : norms) n = static_cast<float>(rng.real(0, 3));
  evidence.bias = bias.view();
  evidence.value_norms = norms.view();

  fastv::Config config;
  const RowChoice chosen(in, tokens, rows, config);
  std::vector<double> expected(total, 0.0);
  double tolerance = 1e-6;
  for (std::size_t h = 0; h < heads; ++h)
    for (const Index position : chosen.positions) {
      const std::size_t r = position - (tokens - rows), seen = evidence.causal ? past + position + 1 : keys;
      std::vector<double> p(keys, 0.0);
      bool bad = false;
      double most = -HUGE_VAL, sum = 0, error = 0;
      for (std::size_t j = 0; j < seen; ++j) {
        double logit = 0, magnitude = 0;
        for (std::size_t d = 0; d < dim; ++d) {
          const double product = q.values[(h * rows + r) * dim + d] * static_cast<double>(scale) *
                                 k.values[(h / group * keys + j) * dim + d];
          logit += product;
          magnitude += std::fabs(product);
        }
        if (evidence.soft_cap > 0) {
          const auto cap = static_cast<double>(evidence.soft_cap);
          logit = cap * std::tanh(logit / cap);
          magnitude += cap;
        }
        if (bias.size() > 0) logit += static_cast<double>(bias[j]);
        bad = bad || std::isnan(logit) || logit == HUGE_VAL;
        most = (std::max)(most, logit);
        if (std::isfinite(magnitude)) error = (std::max)(error, 1e-6 * (magnitude + 3));
        p[j] = logit;
      }
      const bool none = !bad && most == -HUGE_VAL;
      for (std::size_t j = 0; j < seen; ++j) sum += p[j] = none ? 0 : std::exp(p[j] - most);
      std::size_t number = 0;
      const auto all =
          static_cast<double>((evidence.heads_total == 0 ? heads : evidence.heads_total) * chosen.positions.size());
      for (const TokenSpan& span : prompt.visual)
        for (std::size_t t = 0; t < span.count; ++t, ++number) {
          const std::size_t key = past + span.first + t;
          double share = key >= seen ? 0 : p[key] / sum;
          if (key < seen && (bad || none)) share = bad || chosen.positions.size() == 1 ? std::nan("") : 0;
          const double norm = norms.size() == 0 ? 1 : static_cast<double>(norms[h / group * total + number]);
          expected[number] += share * norm / all;
          if (!std::isnan(share)) tolerance = (std::max)(tolerance, 1e-6 + std::expm1(2 * error) * 3);
        }
    }

  const Block<TokenSpan> visual(prompt.visual);
  const Block<Score> scores(total), again(total);
  const Block<float> scratch(fastv::score_scratch(evidence), oracle::nan_float());
  const Status status = fastv::score<Score>(config, evidence, visual.view(), scores.span(), scratch.span());
  if (!status) std::fputs(status.message().c_str(), stderr);
  FUZZ_CHECK(status);
  for (std::size_t i = 0; i < total; ++i) FUZZ_CHECK(close(scores[i], expected[i], tolerance));
  FUZZ_CHECK(fastv::score<Score>(config, evidence, visual.view(), again.span(), scratch.span(), Backwards{}));
  FUZZ_CHECK(same_bits(scores, again));
  fastv::Pruner<Score> pruner(config);
  const fastv::Kept kept = pruner.prune(evidence, visual.view());
  if (kept && total > 0) FUZZ_CHECK(std::memcmp(pruner.scores().data(), scores.data(), total * sizeof(Score)) == 0);

  // One number wrong: told, by score() and by prune().
  auto bad = evidence;
  Span<const TokenSpan> spans = visual.view();
  TokenSpan past_the_end{tokens - 1, 2};
  const fastv::Config plain;
  bool wrong = true;
  switch (in.below(22)) {
    case 0:
      bad.heads = in.hostile();
      wrong = bad.heads == 0 || bad.heads % kv_heads != 0 || bad.heads > fastv::max_tokens;
      break;
    case 1:
      bad.kv_heads = in.hostile();
      wrong = bad.kv_heads == 0 || heads % bad.kv_heads != 0;
      break;
    case 2:
      bad.rows = in.hostile();
      wrong = bad.rows == 0 || bad.rows > tokens;
      break;
    case 3:
      bad.keys = in.hostile();
      wrong = bad.keys <= past || bad.keys > fastv::max_tokens;
      break;
    case 4:
      bad.past = in.hostile();
      wrong = bad.past >= keys;
      break;
    case 5: bad.dim = in.one_in(2) ? 0 : static_cast<std::size_t>(-1) - in.below(99); break;
    case 6: bad.query = nullptr; break;
    case 7: bad.key = nullptr; break;
    case 8: bad.key_head_stride = -1 - static_cast<std::ptrdiff_t>(in.below(99)); break;
    case 9: bad.key_token_stride = static_cast<std::ptrdiff_t>(in.hostile() | std::size_t{1} << 63); break;
    case 10:
      bad.query_head_stride = static_cast<std::ptrdiff_t>(in.below(dim));
      wrong = heads > 1;
      break;
    case 11:
      bad.query_row_stride = static_cast<std::ptrdiff_t>(in.below(dim));
      wrong = rows > 1;
      break;
    case 12:
      bad.scale = static_cast<float>(in.hostile_real());
      wrong = !(bad.scale > 0) || std::isinf(bad.scale);
      break;
    case 13:
      bad.soft_cap = static_cast<float>(in.hostile_real());
      wrong = !(bad.soft_cap >= 0) || std::isinf(bad.soft_cap);
      break;
    case 14:
      bad.bias = {in.chance() ? bias.data() : nullptr, in.hostile() | 1};
      wrong = bad.bias.size() != keys || bad.bias.data() == nullptr;
      break;
    case 15: bad.value_norms = {nullptr, in.hostile() | 1}; break;
    case 16:
      bad.heads_total = in.below(heads);
      wrong = bad.heads_total != 0;
      break;
    case 17:
      bad.pages.chunk = in.hostile();
      wrong = bad.pages.chunk != 0 && dim % bad.pages.chunk != 0;
      break;
    case 18:
      bad.pages.block_tokens = 0;
      wrong = !bad.pages.block_table.empty();
      break;
    case 19: bad.pages.block_table = {nullptr, in.hostile() | 1}; break;
    case 20:
      bad.key_token_stride =
          in.chance() ? 0 : static_cast<std::ptrdiff_t>((static_cast<std::size_t>(-1) >> 1) - in.below(99));
      wrong = evidence.pages.block_table.empty() && keys > 1;
      break;
    default: spans = {&past_the_end, 1}; break;
  }
  if (!wrong) return;
  const Block<float> large(4096);
  const Status told = fastv::score<Score>(plain, bad, spans, again.span(), large.span());
  check_message(told);
  FUZZ_CHECK(!told);
  check_message(fastv::score<Score>(plain, evidence, visual.view(), {nullptr, total}, {nullptr, scratch.size()}));
  if (total == 0) return;
  const fastv::Kept refused = fastv::Pruner<Score>(plain).prune(bad, spans);
  check_message(refused.status);
  FUZZ_CHECK(!refused && refused.code() != Errc::out_of_memory);
  FUZZ_CHECK(fastv::score<Score>(plain, evidence, visual.view(), {again.data(), total - 1}, scratch.span()).code ==
             Errc::room_too_small);
  FUZZ_CHECK(
      fastv::score<Score>(plain, evidence, visual.view(), again.span(), {scratch.data(), scratch.size() - 1}).code ==
      Errc::room_too_small);
}

}  // namespace

FASTV_FUZZ_TARGET(keys) {
  using fastv::bfloat16;
  using fastv::half;
  switch (in.below(7)) {
    case 0: return score_once<float, float, float>(in);
    case 1: return score_once<half, half, float>(in);
    case 2: return score_once<bfloat16, bfloat16, float>(in);
    case 3: return score_once<double, double, double>(in);
    case 4: return score_once<float, half, float>(in);
    case 5: return score_once<float, bfloat16, double>(in);
    default: return score_once<half, float, double>(in);
  }
}

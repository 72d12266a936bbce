// The rules of remedies.hpp and shard.hpp against plain loops in double: unrotate, value_norms, KeysOnly, text_raters,
// correct_by_prior, and key shards against one softmax.
#include "views.hpp"

namespace {

using namespace fuzz;

// Calls use(vectors): as they are stored or, now and then, behind a function of the engine's.
template <class T, class Use>
void stored_or_loaded(Input& in, const Numbers<T>& x, std::size_t heads, std::size_t tokens, std::size_t dim,
                      const Use& use) {
  if (in.one_in(4)) return use(loaded(x.elements, heads, tokens, dim));
  const Stored<T> stored(in, x.elements, heads, tokens, dim);
  use(stored.view());
}

template <class T>
void turned_back(Input& in) {
  const std::size_t heads = in.between(1, 3), tokens = in.between(0, 12), dim = in.between(2, 20);
  const Numbers<T> x(in, heads * tokens * dim);
  const std::size_t pairs = in.chance() ? dim / 2 : in.between(1, dim / 2), axes = in.one_in(3) ? 3 : 1;
  oracle::Rng rng = in.random();
  const Block<float> frequencies(pairs);
  const Block<Index> positions(axes * tokens);
  const Block<unsigned char> axis(axes == 1 ? 0 : pairs);
  for (float& f : frequencies) f = static_cast<float>(rng.chance(0.5) ? rng.real(0, 1) : rng.real(0, 1e-4));
  for (Index& p : positions) p = static_cast<Index>(rng.below(rng.chance(0.1) ? 0xffffffff : 5000));
  for (unsigned char& a : axis) a = static_cast<unsigned char>(rng.below(axes));
  fastv::Rope rope{frequencies.view(), positions.view(), axis.view(),
                   in.chance() ? fastv::RopeLayout::half : fastv::RopeLayout::interleaved};
  const Block<float> out(heads * tokens * dim, 7.0f);
  stored_or_loaded(in, x, heads, tokens, dim, [&](const auto& vectors) {
    FUZZ_CHECK(fastv::unrotate(vectors, rope, out.span(), Backwards{}));
    for (std::size_t h = 0; h < heads; ++h)
      for (std::size_t t = 0; t < tokens; ++t) {
        const std::size_t at = (h * tokens + t) * dim;
        for (std::size_t p = 0; p < pairs; ++p) {
          const bool half = rope.layout == fastv::RopeLayout::half;
          const std::size_t i = at + (half ? p : 2 * p), j = at + (half ? p + pairs : 2 * p + 1);
          const float angle =
              static_cast<float>(positions[(axis.size() == 0 ? 0 : axis[p]) * tokens + t]) * frequencies[p];
          const double c = std::cos(static_cast<double>(angle)), s = std::sin(static_cast<double>(angle));
          const double a = x.values[i], b = x.values[j], size = std::fabs(a) + std::fabs(b);
          if (!std::isfinite(size)) continue;
          FUZZ_CHECK(close(out[i], a * c + b * s, size * 1e-6 + 1e-30));
          FUZZ_CHECK(close(out[j], b * c - a * s, size * 1e-6 + 1e-30));
        }
        for (std::size_t i = at + 2 * pairs; i < at + dim; ++i)  // partial rotary: as they were
          FUZZ_CHECK(oracle::is_nan(out[i]) ? std::isnan(x.values[i]) : out[i] == static_cast<float>(x.values[i]));
      }
    // Tables that are wrong.
    auto bad = rope;
    auto view = vectors;
    Span<float> room = out.span();
    bool wrong = true;
    switch (in.below(10)) {
      case 0:
        bad.frequencies = {frequencies.data(), in.hostile()};
        wrong = bad.frequencies.size() == 0 || bad.frequencies.size() > dim / 2 ||
                (axis.size() > 0 && bad.frequencies.size() != pairs);
        break;
      case 1: bad.frequencies = {nullptr, pairs}; break;
      case 2:
        bad.positions = {nullptr, axes * tokens};
        wrong = tokens > 0;
        break;
      case 3:
        bad.positions = {positions.data(),
                         (axis.size() == 0 ? 1 : *std::max_element(axis.begin(), axis.end()) + 1u) * tokens - 1};
        wrong = tokens > 0;
        break;
      case 4: bad.axis = {nullptr, in.hostile() | 1}; break;
      case 5:
        room = {out.data(), out.size() - 1};
        wrong = out.size() > 0;
        break;
      case 6:
        room = {nullptr, out.size()};
        wrong = out.size() > 0;
        break;
      case 7: view.dim = 2 * pairs - 1; break;
      case 8:
        view.tokens = in.hostile();
        wrong = view.tokens > fastv::max_tokens;
        break;
      default:
        frequencies[0] = static_cast<float>(in.hostile_real());
        wrong = false;
        break;
    }
    const Status told = wrong ? fastv::unrotate(view, bad, room) : fastv::unrotate(vectors, rope, out.span());
    check_message(told);
    FUZZ_CHECK(static_cast<bool>(told) == !wrong);
  });
}

template <class T>
void lengths(Input& in) {
  const oracle::Layout prompt = layout(in, 3, 15, false);
  const std::size_t heads = in.between(1, 3), past = in.below(6), tokens = past + prompt.tokens,
                    dim = in.between(1, 40);
  const std::size_t total = prompt.visual_tokens();
  const Numbers<T> x(in, heads * tokens * dim);
  const Block<TokenSpan> visual(prompt.visual);
  const Block<float> norms(heads * total), scores(total), again(total);
  stored_or_loaded(in, x, heads, tokens, dim, [&](const auto& vectors) {
    FUZZ_CHECK(fastv::value_norms(vectors, visual.view(), norms.span(), past));
    const fastv::KeysOnly keys{vectors, past};
    const Block<float> scratch(fastv::score_scratch(keys), oracle::nan_float());
    FUZZ_CHECK(fastv::score<float>(fastv::Config{}, keys, visual.view(), scores.span(), scratch.span()));
    FUZZ_CHECK(fastv::score<float>(fastv::Config{}, keys, visual.view(), again.span(), scratch.span(), Backwards{}));
    FUZZ_CHECK(same_bits(scores, again));
    std::size_t number = 0;
    for (const TokenSpan& span : prompt.visual)
      for (std::size_t t = 0; t < span.count; ++t, ++number) {
        double sum = 0;
        for (std::size_t h = 0; h < heads; ++h) {
          double square = 0;
          for (std::size_t d = 0; d < dim; ++d) {
            const double v = x.values[(h * tokens + past + span.first + t) * dim + d];
            square += v * v;
          }
          if (square < 1e-35) square = 0;  // floats flush such squares
          FUZZ_CHECK(close(norms[h * total + number], std::sqrt(square), 1e-5 * std::sqrt(square) + 1e-15));
          sum += std::sqrt(square) / static_cast<double>(heads);
        }
        FUZZ_CHECK(close(scores[number], -sum, 1e-5 * sum + 1e-15));
      }
    auto bad = vectors;
    std::size_t before = past;
    bool wrong = true;
    Span<float> room = norms.span();
    switch (in.below(7)) {
      case 0: bad.heads = 0; break;
      case 1: bad.dim = in.chance() ? 0 : static_cast<std::size_t>(-1) - in.below(99); break;
      case 2:
        bad.tokens = in.hostile();
        wrong = bad.tokens <= past || bad.tokens > fastv::max_tokens;
        break;
      case 3:
        before = past + in.hostile();
        wrong = before >= tokens;
        break;
      case 4:
        room = {nullptr, norms.size()};
        wrong = norms.size() > 0;
        break;
      case 5:
        room = {norms.data(), norms.size() - 1};
        wrong = norms.size() > 0;
        break;
      default:
        if constexpr (std::is_same<std::decay_t<decltype(bad)>, fastv::Heads<T>>::value) {
          if (in.chance())
            bad.head_stride = -1;
          else
            bad.data = nullptr;
          wrong = bad.head_stride < 0 || bad.pages.blocks.empty();
        } else {
          bad.heads = fastv::max_tokens + 1;
        }
        break;
    }
    if (!wrong) return;
    const Status told = fastv::value_norms(bad, visual.view(), room, before);
    check_message(told);
    FUZZ_CHECK(!told);
    if (room.size() != norms.size() || room.data() == nullptr || total == 0) return;
    const fastv::Kept kept = fastv::Pruner<float>().prune(fastv::KeysOnly{bad, before}, visual.view());
    check_message(kept.status);
    FUZZ_CHECK(!kept && kept.code() != Errc::out_of_memory);
    fastv::Config rows;
    rows.score_rows = fastv::ScoreRows::all;
    FUZZ_CHECK(fastv::score<float>(rows, keys, visual.view(), again.span(), scratch.span()).code ==
               Errc::missing_evidence);
  });
}

// Keys cut among ranks, each scored on its own, merged: as one softmax over all.
template <class K>
void shards(Input& in) {
  const std::size_t ranks = in.between(1, 4), kv_heads = in.between(1, 2), heads = kv_heads * in.between(1, 2);
  const std::size_t dim = in.between(1, 20);
  std::vector<std::size_t> lengths_of;
  std::vector<oracle::Layout> prompts;
  std::size_t keys = 0;
  for (std::size_t r = 0; r < ranks; ++r) {
    const oracle::Layout own = layout(in, 2, 8, false);
    prompts.push_back(own);
    lengths_of.push_back(own.tokens);
    keys += own.tokens;
  }
  const Block<float> query(heads * dim);
  oracle::Rng rng = in.random();
  for (float& q : query) q = static_cast<float>(rng.real(-1, 1));
  const Numbers<K> k(in, kv_heads * keys * dim);
  Block<float> bias(in.chance() ? keys : 0), sinks(in.one_in(3) ? heads : 0);
  const double hidden = in.share();
  for (float& b : bias) b = rng.chance(hidden) ? -oracle::infinity() : 0.5f;
  for (float& s : sinks) s = static_cast<float>(rng.real(-3, 20));
  const float soft_cap = in.one_in(3) ? 2.0f : 0.0f;
  std::vector<float> key_scales(in.one_in(3) ? kv_heads * keys : 0);
  for (float& s : key_scales) s = static_cast<float>(rng.real(0.1, 2));
  const bool weighted = in.one_in(3);
  const std::size_t heads_total = in.one_in(3) ? heads + in.below(3) : 0, sink_rank = in.below(ranks);

  std::vector<double> logits(heads * keys);
  bool sound = true;
  for (std::size_t h = 0; h < heads; ++h)
    for (std::size_t j = 0; j < keys; ++j) {
      double& logit = logits[h * keys + j];
      for (std::size_t d = 0; d < dim; ++d)
        logit +=
            static_cast<double>(query[h * dim + d]) * 0.5 * k.values[(h / (heads / kv_heads) * keys + j) * dim + d];
      if (!key_scales.empty()) logit *= static_cast<double>(key_scales[h / (heads / kv_heads) * keys + j]);
      if (soft_cap > 0) logit = static_cast<double>(soft_cap) * std::tanh(logit / static_cast<double>(soft_cap));
      if (bias.size() > 0) logit += static_cast<double>(bias[j]);
      sound = sound && !std::isnan(logit) && logit < 1e3 && (logit > -1e3 || logit == -HUGE_VAL);
    }

  const Block<fastv::SoftmaxPart> parts(ranks * heads);
  std::vector<Block<float>> numerators, weights;
  for (std::size_t r = 0, first = 0; r < ranks; first += lengths_of[r++]) {
    std::vector<K> dense;
    for (std::size_t h = 0; h < kv_heads; ++h)
      for (std::size_t j = 0; j < lengths_of[r] * dim; ++j) dense.push_back(k.elements[(h * keys + first) * dim + j]);
    const Stored<K> stored(in, dense, kv_heads, lengths_of[r], dim);
    auto evidence = fastv::query_key(fastv::heads(query.data(), fastv::TokenMajor{1, heads, dim}), stored.view(), 0.5f);
    if (bias.size() > 0) evidence.bias = {bias.data() + first, lengths_of[r]};
    if (r == sink_rank) evidence.sinks = sinks.view();
    evidence.soft_cap = soft_cap;
    std::vector<float> own_scales(kv_heads * lengths_of[r]);
    for (std::size_t h = 0; h < kv_heads && !key_scales.empty(); ++h)
      for (std::size_t j = 0; j < lengths_of[r]; ++j)
        own_scales[h * lengths_of[r] + j] = key_scales[h * keys + first + j];
    const Stored<float> scales(in, own_scales, kv_heads, lengths_of[r], 1);
    if (!key_scales.empty()) evidence.key_scales = scales.view();
    const Block<TokenSpan> visual(prompts[r].visual);
    numerators.emplace_back(heads * prompts[r].visual_tokens());
    weights.emplace_back(weighted ? kv_heads * prompts[r].visual_tokens() : 0);
    for (float& w : weights[r]) w = static_cast<float>(rng.real(0, 2));
    evidence.value_norms = weights[r].view();
    const Block<float> scratch(fastv::score_scratch(evidence), oracle::nan_float());
    FUZZ_CHECK(fastv::score_shard(evidence, visual.view(), {parts.data() + r * heads, heads}, numerators[r].span(),
                                  scratch.span()));
    TokenSpan past_the_end{lengths_of[r] - 1, 2};
    FUZZ_CHECK(!fastv::score_shard(evidence, {&past_the_end, 1}, {parts.data() + r * heads, heads},
                                   numerators[r].span(), scratch.span()));
  }
  for (std::size_t r = 0, first = 0; r < ranks; first += lengths_of[r++]) {
    const Block<double> scores(prompts[r].visual_tokens());
    FUZZ_CHECK(fastv::merge_shards(parts.view(), ranks, r, numerators[r].view(), scores.span(), heads_total));
    std::size_t number = 0;
    for (const TokenSpan& span : prompts[r].visual)
      for (std::size_t t = 0; t < span.count; ++t, ++number) {
        double exact = 0;
        for (std::size_t h = 0; h < heads; ++h) {
          const double sink = sinks.size() == 0 ? -HUGE_VAL : static_cast<double>(sinks[h]);
          double most = sink;
          for (std::size_t j = 0; j < keys; ++j) most = (std::max)(most, logits[h * keys + j]);
          if (std::isinf(most)) continue;  // every key is hidden
          double sum = std::exp(sink - most);
          for (std::size_t j = 0; j < keys; ++j) sum += std::exp(logits[h * keys + j] - most);
          const double norm =
              weighted ? static_cast<double>(weights[r][h / (heads / kv_heads) * prompts[r].visual_tokens() + number])
                       : 1;
          exact += norm * std::exp(logits[h * keys + first + span.first + t] - most) / sum /
                   static_cast<double>(heads_total == 0 ? heads : heads_total);
        }
        if (sound) FUZZ_CHECK(close(scores[number], exact, 1e-3));
      }
    const std::size_t odd_ranks = in.hostile(), odd_rank = in.hostile();
    const bool fine = odd_ranks != 0 && odd_rank < odd_ranks && parts.size() % odd_ranks == 0 &&
                      numerators[r].size() == parts.size() / odd_ranks * scores.size();
    const Status told = fastv::merge_shards(parts.view(), odd_ranks, odd_rank, numerators[r].view(), scores.span());
    check_message(told);
    FUZZ_CHECK(static_cast<bool>(told) == fine);
  }
}

void priors(Input& in) {
  const std::size_t n = in.below(60);
  const Block<float> p(n), q(n);
  oracle::Rng rng = in.random();
  const double zeros = in.one_in(4) ? 1 : 0.2, nans = in.one_in(4) ? in.share() : 0;
  double p_sum = 0, q_sum = 0;
  bool p_known = false, q_known = false;
  for (std::size_t i = 0; i < n; ++i) {
    p[i] = static_cast<float>(rng.chance(zeros) ? 0 : rng.real(0, 1));
    q[i] = static_cast<float>(rng.chance(0.2) ? 0 : rng.real(0, 0.01));
    if (rng.chance(nans)) p[i] = oracle::nan_float();
    if (rng.chance(nans)) q[i] = oracle::nan_float();
    p_known = p_known || !oracle::is_nan(p[i]);
    q_known = q_known || !oracle::is_nan(q[i]);
    p_sum += oracle::is_nan(p[i]) ? 0 : static_cast<double>(p[i]);
    q_sum += oracle::is_nan(q[i]) ? 0 : static_cast<double>(q[i]);
  }
  const Block<float> s(p);
  const Status status = fastv::correct_by_prior(s.span(), q.view());
  check_message(status);
  const bool something = (!p_known || p_sum > 0) && (!q_known || q_sum > 0);
  FUZZ_CHECK(static_cast<bool>(status) == something);
  for (std::size_t i = 0; i < n && something; ++i) {
    const double share = static_cast<double>(p[i]) / p_sum, prior = static_cast<double>(q[i]) / q_sum;
    FUZZ_CHECK(close(s[i], share * std::log((share + 1e-6) / (prior + 1e-6)), 2e-5));
  }
  for (float& x : p) x = static_cast<float>(in.hostile_real());
  check_message(fastv::correct_by_prior(p.span(), q.view()));
  FUZZ_CHECK(!fastv::correct_by_prior(p.span(), Span<const float>(q.data(), n + 1)));
}

void raters(Input& in) {
  const oracle::Layout prompt = layout(in, 3, 8, false);
  const std::size_t width = in.between(1, 20), stride = width + in.below(3), tokens = prompt.tokens;
  const std::size_t first = in.below(tokens), count = in.between(1, tokens - first);
  const Block<float> hidden((tokens - 1) * stride + width, oracle::nan_float());
  oracle::Rng rng = in.random();
  for (std::size_t t = 0; t < tokens; ++t)
    for (std::size_t d = 0; d < width; ++d) hidden[t * stride + d] = static_cast<float>(rng.real(-1, 1));
  const Block<TokenSpan> visual(prompt.visual);
  const Block<Index> rows(count);
  const Block<float> scratch(2 * count);
  const auto found = fastv::text_raters(hidden.data(), tokens, width, stride, visual.view(), {first, count},
                                        rows.span(), scratch.span());
  check_message(found.status);
  std::vector<bool> is_text(tokens, true);
  for (const TokenSpan& span : prompt.visual)
    std::fill_n(is_text.begin() + static_cast<std::ptrdiff_t>(span.first), span.count, false);
  const auto words_of = [&](std::size_t from, std::size_t some) {
    const auto begin = is_text.begin() + static_cast<std::ptrdiff_t>(from);
    return std::count(begin, begin + static_cast<std::ptrdiff_t>(some), true);
  };
  FUZZ_CHECK(static_cast<bool>(found) == (prompt.visual_tokens() > 0 && words_of(first, count) > 0));
  if (!found) return;
  std::vector<double> relevance(count, 0.0);
  for (const TokenSpan& span : prompt.visual)
    for (std::size_t i = span.first; i < span.first + span.count; ++i) {
      std::vector<double> e(count, 0.0);
      double sum = 0;
      for (std::size_t j = 0; j < count; ++j) {
        if (!is_text[first + j]) continue;
        for (std::size_t d = 0; d < width; ++d)
          e[j] += static_cast<double>(hidden[i * stride + d]) * static_cast<double>(hidden[(first + j) * stride + d]);
        sum += e[j] = std::exp(e[j]);
      }
      for (std::size_t j = 0; j < count; ++j) relevance[j] += e[j] / sum;
    }
  const double mean =
      std::accumulate(relevance.begin(), relevance.end(), 0.0) / static_cast<double>(words_of(first, count));
  std::size_t k = 0;
  bool near = false;  // rounding may decide
  for (std::size_t j = 0; j < count; ++j) {
    const bool listed = k < *found && rows[k] == first + j;
    if (listed) ++k;
    near = near || std::fabs(relevance[j] - mean) < 1e-4 * mean;
    if (!near) FUZZ_CHECK(listed == (relevance[j] >= mean));
    FUZZ_CHECK(!listed || is_text[first + j]);
  }
  FUZZ_CHECK(k == *found && *found > 0);
  TokenSpan text{in.hostile(), in.hostile()};
  const bool fine = text.count > 0 && text.first < tokens && text.count <= tokens - text.first && text.count <= count &&
                    words_of(text.first, text.count) > 0;
  const auto told =
      fastv::text_raters(hidden.data(), tokens, width, stride, visual.view(), text, rows.span(), scratch.span());
  check_message(told.status);
  FUZZ_CHECK(static_cast<bool>(told) == fine);
  FUZZ_CHECK(!fastv::text_raters(hidden.data(), tokens, width, width - 1, visual.view(), {first, count}, rows.span(),
                                 scratch.span()));
}

}  // namespace

FASTV_FUZZ_TARGET(remedies) {
  switch (in.below(10)) {
    case 0: return turned_back<float>(in);
    case 1: return turned_back<fastv::half>(in);
    case 2: return lengths<float>(in);
    case 3: return lengths<fastv::bfloat16>(in);
    case 4: return lengths<fastv::half>(in);
    case 5: return shards<float>(in);
    case 6: return shards<fastv::half>(in);
    case 7: return priors(in);
    case 8: return lengths<fastv::fp8_e4m3>(in);
    default: return raters(in);
  }
}

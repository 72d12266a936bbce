// Every public function of the core once, against plain loops, in one translation unit that needs no test framework:
// for builds where GoogleTest cannot be (no exceptions, 32 bits, another byte order), and linked with itself, built
// otherwise, for the one-definition rule.
//
// -DFASTV_CHECK=name names the entry point, so that two objects of this file meet in one program.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fastv/fastv.hpp>

namespace {

using fastv::Index;
using fastv::Span;
using fastv::TokenSpan;
using std::size_t;

int failures = 0, checks = 0;
void expect(bool holds, const char* what) {
  ++checks;
  if (holds) return;
  ++failures;
  std::printf("  wrong: %s\n", what);
}
bool near(double a, double b, double tolerance = 2e-5) { return std::fabs(a - b) <= tolerance * (1 + std::fabs(b)); }

// The same numbers on every platform.
std::uint32_t state = 1;
double uniform() {
  state = state * 1664525u + 1013904223u;
  return static_cast<double>(state >> 8) / 16777216.0;
}

// Storage types by their bits, so that this holds where floats are big-endian or NaN is assumed away.
fastv::half to_half(double x) {  // of few bits, exactly
  std::uint32_t sign = x < 0 ? 0x8000u : 0u, exponent = 15;
  double m = x < 0 ? -x : x;
  if (m == 0) return {static_cast<std::uint16_t>(sign)};
  while (m >= 2) m /= 2, ++exponent;
  while (m < 1) m *= 2, --exponent;
  return {static_cast<std::uint16_t>(sign | (exponent << 10) | static_cast<std::uint32_t>((m - 1) * 1024))};
}
fastv::bfloat16 to_bfloat16(double x) {
  const auto narrow = static_cast<float>(x);
  std::uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  return {static_cast<std::uint16_t>(bits >> 16)};
}
// Written into memory, never returned: under -ffast-math clang takes a NaN or an infinity that a function returns or is
// handed by value to be anything.
void set_bits(float& value, std::uint32_t bits) { std::memcpy(&value, &bits, 4); }

constexpr size_t n = 45, heads = 4, kv_heads = 2, dim = 72;  // dim: no whole number of vectors
const TokenSpan visual[] = {{3, 12, 4}, {20, 18, 6}};
constexpr size_t n_visual = 30;
const Span<const TokenSpan> spans = visual;
size_t position_of(size_t i) { return i < 12 ? 3 + i : 20 + i - 12; }

// The attention of the last row on each visual token, the slow way.
template <class Q, class K>
void slow_scores(const Q* q, const K* k, double scale, double soft_cap, double* scores) {
  for (size_t i = 0; i < n_visual; ++i) scores[i] = 0;
  for (size_t h = 0; h < heads; ++h) {
    double e[n], sum = 0;
    for (size_t j = 0; j < n; ++j) {
      double logit = 0;
      for (size_t d = 0; d < dim; ++d)
        logit += static_cast<double>(fastv::to_float(q[h * dim + d])) *
                 static_cast<double>(fastv::to_float(k[(j * kv_heads + h / (heads / kv_heads)) * dim + d]));
      logit *= scale;
      if (soft_cap > 0) logit = soft_cap * std::tanh(logit / soft_cap);
      sum += e[j] = std::exp(logit);
    }
    for (size_t i = 0; i < n_visual; ++i) scores[i] += e[position_of(i)] / sum / heads;
  }
}

template <class K>
void fill_keys(K* keys, K (*convert)(double)) {
  for (size_t i = 0; i < n * kv_heads * dim; ++i) keys[i] = convert(std::floor(uniform() * 64 - 32) / 32);
}

void elements() {
  expect(near(static_cast<double>(fastv::to_float(to_half(-1.5))), -1.5) && fastv::to_float(to_half(0.25)) == 0.25f,
         "half");
#ifndef __FAST_MATH__  // which flushes denormals to zero
  expect(fastv::to_float(fastv::half{0x0001}) == 5.9604644775390625e-8f, "the least denormal half");
#endif
  expect(fastv::to_float(to_bfloat16(3)) == 3.0f, "bfloat16");
  expect(fastv::to_float(fastv::fp8_e4m3{0x7e}) == 448.0f && fastv::to_float(fastv::fp8_e4m3{0x81}) == -0.001953125f,
         "fp8_e4m3");
  expect(fastv::to_float(fastv::fp8_e5m2{0x7b}) == 57344.0f, "fp8_e5m2");
  expect(fastv::to_float(std::int8_t{-3}) == -3.0f, "int8");
  expect(fastv::to_float(2.5f) == 2.5f && fastv::to_float(2.5) == 2.5, "float and double");
  const std::uint16_t stored[1] = {0x3c00};
  expect(fastv::to_float(*fastv::as_half(stored)) == 1.0f && fastv::to_float(*fastv::as_bfloat16(stored)) < 0.01f,
         "as_half, as_bfloat16");
}

void statuses() {
  const fastv::Status status = fastv::fail(fastv::Errc::bad_shape, "{} has {} heads, not {}", "q", 3, 1.5);
  expect(!status && std::strcmp(status.message().c_str(), "q has 3 heads, not 1.5") == 0, "a sentence");
  expect(fastv::Status{} && std::strcmp(fastv::Status{}.message().c_str(), "no error") == 0, "no error");
  const fastv::Result<int> bad{0, status}, good{7, {}};
  expect(!bad && bad.code() == fastv::Errc::bad_shape && bad.message().c_str()[0] == 'q' && good && *good == 7,
         "Result");
}

void plans() {
  expect(fastv::kept_count(35, 0.9) == 3 && fastv::kept_count(5, 0.5) == 2 && fastv::kept_count(7, 0.5) == 4,
         "half to even");
  expect(fastv::kept_count(5, 0.5, fastv::Rounding::up) == 3, "rounding up");
  expect(fastv::visual_tokens(spans) == n_visual, "visual_tokens");
  bool walked = true;
  fastv::for_each_visual(spans, [&](size_t number, size_t at) { walked = walked && at == position_of(number); });
  expect(walked, "for_each_visual");
  fastv::Config config;
  config.filtering_ratio = 0.75;
  expect(fastv::validate(config) && fastv::validate(spans, n) && fastv::validate(config, spans, n), "validate");
  Index quotas[4];
  expect(*fastv::kept_visual(config, spans) == 3 + 4, "kept_visual");  // 4.5 to even
  expect(*fastv::image_quotas(config, spans, quotas) == 2 && quotas[0] == 3 && quotas[1] == 4, "image_quotas");
  const size_t earlier[1] = {5};
  const auto plan = fastv::make_plan(config, {n, 8, spans, earlier});
  expect(plan && plan->kept() == 22 && plan->kv_length(0) == n + 5 && plan->kv_length(7, 3) == 30, "lengths of a plan");
  expect(plan->next_position(2) == n + 2 && plan->visual_in_layer(2) == 7 && plan->tokens_in_layer(1) == n &&
             plan->groups() == 2 && plan->group_of(2) == 1 && plan->tokens_in_group(1) == 22,
         "plan");
  fastv::Config stages[2] = {config, config};
  stages[1].filtering_layer = 4;
  stages[1].filtering_ratio = 0.5;
  const auto two = fastv::make_plan(Span<const fastv::Config>(stages), {n, 8, spans});
  expect(two && two->kept_visual() == 2 + 2, "a plan of two stages");

  config.filtering_ratio = 1.5;
  const fastv::Status status = fastv::validate(config);
  expect(status.code == fastv::Errc::bad_setting, "a ratio out of range");
  expect(std::strstr(status.message().c_str(), "1.5") != nullptr, "a message names the number");
  const std::uint64_t nan = 0x7ff8000000000000u;
  std::memcpy(&config.filtering_ratio, &nan, 8);
  expect(std::strstr(fastv::validate(config).message().c_str(), "not a number") != nullptr, "a ratio that is NaN");
}

// Evidence of a user: the contract with the least it may have.
struct ByPosition {
  size_t tokens;
  size_t prompt_tokens() const noexcept { return tokens; }
  template <class Score>
  fastv::Status score(Span<const TokenSpan> asked, Span<Score> out) const noexcept {
    fastv::for_each_visual(asked, [&](size_t number, size_t at) { out[number] = static_cast<Score>(at); });
    return {};
  }
};

float probabilities_[heads * n];
void scores_of_probabilities() {
  for (float& p : probabilities_) p = static_cast<float>(uniform());
  double slow[n_visual] = {};
  for (size_t i = 0; i < n_visual; ++i)
    for (size_t h = 0; h < heads; ++h) slow[i] += static_cast<double>(probabilities_[h * n + position_of(i)]) / heads;
  const auto evidence = fastv::probabilities(probabilities_, heads, 1, n);
  float scores[n_visual];
  expect(evidence.prompt_tokens() == n && fastv::score_scratch(evidence) == 0 && evidence.check(),
         "shape of probabilities");
  expect(static_cast<bool>(fastv::score<float>(fastv::Config{}, evidence, spans, Span<float>(scores))), "score");
  bool same = true;
  for (size_t i = 0; i < n_visual; ++i) same = same && near(static_cast<double>(scores[i]), slow[i]);
  expect(same, "scores of probabilities");

  // The best of each image by a plain search, and the pruner's choice.
  fastv::Pruner<float> pruner;
  expect(pruner.due(2) && !pruner.due(1) && static_cast<bool>(pruner.reserve(n, 2)), "due, reserve");
  const auto kept = pruner.prune(evidence, spans, fastv::Serial{});
  bool stays[n];
  for (size_t t = 0; t < n; ++t) stays[t] = !((t >= 3 && t < 15) || (t >= 20 && t < 38));
  for (const TokenSpan& span : visual)
    for (size_t k = 0; k < span.count / 2 + (span.count / 2 % 2 != 0 && span.count % 2 != 0); ++k) {
      size_t best = n;
      const size_t first = span.first == 3 ? 0 : 12;
      for (size_t i = first; i < first + span.count; ++i)
        if (!stays[position_of(i)] && (best == n || scores[i] > scores[best])) best = i;
      stays[position_of(best)] = true;
    }
  size_t count = 0;
  bool right = true;
  for (size_t t = 0; t < n; ++t)
    if (stays[t]) right = right && count < kept.size() && kept.indices[count++] == t;
  expect(kept && right && count == kept.size() && kept.prompt_tokens == n && kept.dropped() == 15,
         "the best of each image stay");
  expect(pruner.scores().size() == n_visual && pruner.plan({n, 8, spans})->kept() == kept.size(), "plan and result");

  // next_spans(): the kept tokens of each span stand together.
  TokenSpan left[2];
  const auto written = fastv::next_spans(kept, spans, left);
  expect(*written == 2 && left[0].first == 3 && left[0].count == 6 && left[1].count == 9 && left[1].original == 18,
         "next_spans");

  const auto late = pruner.prune(ByPosition{n}, spans);
  expect(late && late.size() == 30 && late.indices[3] == 9 && late.indices[14] == 29, "evidence of a user's own");
}

// Does this evidence give the same scores as the slow way?
template <class Evidence>
void expect_scores(const Evidence& evidence, const double* slow, const char* what) {
  static float scratch[16384], fast[n_visual];
  expect(evidence.prompt_tokens() == n && evidence.check(), what);
  expect(fastv::score_scratch(evidence) <= sizeof(scratch) / sizeof(float), "room for scratch");
  expect(
      static_cast<bool>(fastv::score<float>(fastv::Config{}, evidence, spans, Span<float>(fast), Span<float>(scratch))),
      what);
  bool same = true;
  for (size_t i = 0; i < n_visual; ++i) same = same && near(static_cast<double>(fast[i]), slow[i], 1e-4);
  expect(same, what);
}

// Layouts: all of them; false: the plainest, for types that differ by their conversion alone.
template <bool Layouts, class K>
void scores_of_keys(K (*convert)(double), const char* name) {
  constexpr size_t block = 8, blocks = 6, chunk = 8, entries = kv_heads * dim;
  static K keys[n * entries], head_major[kv_heads * (n + 2) * dim], paged[blocks * block * entries];
  static K chunked[blocks * block * entries];
  static float query[heads * dim], scratch[16384];
  for (float& q : query) q = static_cast<float>(std::floor(uniform() * 64 - 32) / 16);
  fill_keys(keys, convert);
  // The same keys head by head, with room for two more; in pages of 8 tokens, last page first; and there in chunks.
  Index table[blocks];
  const K* pointers[blocks];
  for (size_t b = 0; b < blocks; ++b) {
    table[b] = static_cast<Index>(blocks - 1 - b);
    pointers[b] = paged + table[b] * block * entries;
  }
  for (size_t t = 0; t < n; ++t)
    for (size_t h = 0; h < kv_heads; ++h)
      for (size_t d = 0; d < dim; ++d) {
        const K key = keys[(t * kv_heads + h) * dim + d];
        head_major[(h * (n + 2) + t) * dim + d] = key;
        paged[((table[t / block] * block + t % block) * kv_heads + h) * dim + d] = key;
        chunked[(((table[t / block] * kv_heads + h) * (dim / chunk) + d / chunk) * block + t % block) * chunk +
                d % chunk] = key;
      }
  const auto load = [](size_t head, size_t token, float* out) {
    for (size_t d = 0; d < dim; ++d)
      out[d] = static_cast<float>(fastv::to_float(keys[(token * kv_heads + head) * dim + d]));
  };
  const auto q = fastv::heads(static_cast<const float*>(query), fastv::TokenMajor{1, heads, dim});
  const auto k = fastv::heads(static_cast<const K*>(keys), fastv::TokenMajor{n, kv_heads, dim});
  const auto score = [&](auto view, float soft_cap, const double* slow) {
    auto evidence = fastv::query_key(q, view, 0.125f);
    evidence.soft_cap = soft_cap;
    expect_scores(evidence, slow, name);
  };
  for (const float soft_cap : {0.0f, 3.0f}) {
    double slow[n_visual];
    slow_scores(query, keys, 0.125, static_cast<double>(soft_cap), slow);
    score(k, soft_cap, slow);
    if constexpr (Layouts) {
      score(fastv::heads(static_cast<const K*>(head_major), fastv::HeadMajor{kv_heads, n, dim, n + 2}), soft_cap, slow);
      score(fastv::heads(static_cast<const K*>(paged), fastv::TokenMajor{block, kv_heads, dim}, table, n), soft_cap,
            slow);
      score(fastv::heads(Span<const K* const>(pointers), fastv::TokenMajor{block, kv_heads, dim}, n), soft_cap, slow);
      score(fastv::heads(static_cast<const K*>(chunked), fastv::ChunkedHeadMajor{kv_heads, dim / chunk, block, chunk},
                         table, n),
            soft_cap, slow);
      score(fastv::loaded_keys(kv_heads, n, dim, load), soft_cap, slow);
    }

    // Sharded over two ranks at token 17.
    fastv::SoftmaxPart parts[2 * heads];
    float numerators[heads * n_visual], merged[n_visual];
    bool agree = true;
    for (size_t rank = 0; rank < 2; ++rank) {
      const size_t begin = rank == 0 ? 0 : 17, end = rank == 0 ? 17 : n;
      const K* own_keys = keys + begin * entries;
      auto shard = fastv::query_key(q, fastv::heads(own_keys, fastv::TokenMajor{end - begin, kv_heads, dim}), 0.125f);
      shard.soft_cap = soft_cap;
      const TokenSpan own[1] = {{visual[rank].first - begin, visual[rank].count}};
      agree = agree && fastv::score_shard(shard, Span<const TokenSpan>(own),
                                          Span<fastv::SoftmaxPart>(parts + rank * heads, heads),
                                          Span<float>(numerators), Span<float>(scratch));
      if (rank == 1) {
        const Span<float> out(merged, visual[1].count);
        agree = agree && fastv::merge_shards<float>(Span<const fastv::SoftmaxPart>(parts), 2, 1,
                                                    Span<const float>(numerators, heads * visual[1].count), out);
        for (size_t i = 0; i < visual[1].count; ++i)
          agree = agree && near(static_cast<double>(merged[i]), slow[12 + i], 1e-4);
      }
    }
    expect(agree, "scores of sharded keys");
  }

  // Minus the mean length of the keys.
  const fastv::KeysOnly alone{k};
  float lengths[n_visual], norms[kv_heads * n_visual];
  expect(alone.prompt_tokens() == n && alone.check() &&
             fastv::score<float>(fastv::Config{}, alone, spans, Span<float>(lengths), Span<float>(scratch)) &&
             fastv::value_norms(k, spans, Span<float>(norms)),
         "KeysOnly, value_norms");
  bool right = true;
  for (size_t i = 0; i < n_visual; ++i) {
    double mean = 0;
    for (size_t h = 0; h < kv_heads; ++h) {
      double sum = 0;
      for (size_t d = 0; d < dim; ++d) {
        const auto x = static_cast<double>(fastv::to_float(keys[(position_of(i) * kv_heads + h) * dim + d]));
        sum += x * x;
      }
      right = right && near(static_cast<double>(norms[h * n_visual + i]), std::sqrt(sum));
      mean += std::sqrt(sum) / kv_heads;
    }
    right = right && near(static_cast<double>(lengths[i]), -mean);
  }
  expect(right, "lengths of keys");
}

// Everything else that a logit may have in it: a scale of each key, a bias that hides keys, sinks, ALiBi, a window, and
// rows that see what they are told.
void logits() {
  static std::int8_t keys[n * kv_heads * dim];
  static float query[heads * dim], scales[kv_heads * n], bias[n], sinks[heads], slopes[heads];
  for (float& q : query) q = static_cast<float>(uniform() * 2 - 1);
  for (std::int8_t& k : keys) k = static_cast<std::int8_t>(uniform() * 255 - 127);
  for (float& s : scales) s = static_cast<float>(uniform() / 64);
  for (float& b : bias) b = static_cast<float>(uniform());
  set_bits(bias[5], 0xff800000u);  // -infinity
  for (size_t h = 0; h < heads; ++h) {
    sinks[h] = static_cast<float>(uniform());
    slopes[h] = static_cast<float>(uniform() / 8);
  }
  const Index seen[1] = {static_cast<Index>(n - 2)};
  constexpr size_t window = 30;
  double slow[n_visual] = {};
  for (size_t h = 0; h < heads; ++h) {
    double e[n] = {}, sum = std::exp(static_cast<double>(sinks[h]));
    for (size_t j = n - window; j < n - 2; ++j) {
      double logit = 0;
      for (size_t d = 0; d < dim; ++d)
        logit += static_cast<double>(query[h * dim + d]) * keys[(j * kv_heads + h / 2) * dim + d];
      logit *= 0.25 * static_cast<double>(scales[h / 2 * n + j]);
      logit -= static_cast<double>(slopes[h]) * static_cast<double>(n - 1 - j);
      if (j != 5) sum += e[j] = std::exp(logit + static_cast<double>(bias[j]));
    }
    for (size_t i = 0; i < n_visual; ++i) slow[i] += e[position_of(i)] / sum / heads;
  }
  auto evidence =
      fastv::query_key(fastv::heads(static_cast<const float*>(query), fastv::TokenMajor{1, heads, dim}),
                       fastv::heads(static_cast<const std::int8_t*>(keys), fastv::TokenMajor{n, kv_heads, dim}), 0.25f);
  evidence.key_scales = fastv::heads(static_cast<const float*>(scales), fastv::HeadMajor{kv_heads, n, 1});
  evidence.bias = bias;
  evidence.sinks = sinks;
  evidence.alibi = slopes;
  evidence.visible = seen;
  evidence.window = window;
  expect_scores(evidence, slow, "int8 keys with everything a logit may have");

  Index visible[n];
  expect(fastv::visible_tokens(spans, n, visible, 2) && visible[0] == 2 && visible[3] == 15 && visible[15] == 16 &&
             visible[21] == 38,
         "visible_tokens");
}

void remedies() {
  // unrotate() undoes RoPE.
  static float plain[n * 8], turned[n * 8], back[n * 8];
  float frequencies[4];
  Index positions[n];
  for (size_t i = 0; i < 4; ++i)
    frequencies[i] = static_cast<float>(std::pow(10000.0, -2.0 * static_cast<double>(i) / 8));
  for (size_t t = 0; t < n; ++t) {
    positions[t] = static_cast<Index>(t + 100);
    for (size_t i = 0; i < 4; ++i) {
      const auto angle = static_cast<double>(static_cast<float>(positions[t]) * frequencies[i]);
      const double a = uniform(), b = uniform(), c = std::cos(angle), s = std::sin(angle);
      plain[t * 8 + i] = static_cast<float>(a);
      plain[t * 8 + i + 4] = static_cast<float>(b);
      turned[t * 8 + i] = static_cast<float>(a * c - b * s);
      turned[t * 8 + i + 4] = static_cast<float>(b * c + a * s);
    }
  }
  fastv::Rope rope;
  rope.frequencies = frequencies;
  rope.positions = positions;
  expect(static_cast<bool>(
             fastv::unrotate(fastv::heads(static_cast<const float*>(turned), fastv::HeadMajor{1, n, 8}), rope, back)),
         "unrotate");
  bool same = true;
  for (size_t i = 0; i < n * 8; ++i) same = same && near(static_cast<double>(back[i]), static_cast<double>(plain[i]));
  expect(same, "unrotate undoes RoPE");

  // Text raters: of 4 text tokens those with at least the mean relevance.
  float scratch[8];
  Index rows[4];
  const auto raters = fastv::text_raters(static_cast<const float*>(plain), n, 8, 8, spans, {40, 4}, rows, scratch);
  double relevance[4] = {}, mean = 0;
  for (size_t i = 0; i < n_visual; ++i) {
    double e[4], sum = 0;
    for (size_t j = 0; j < 4; ++j) {
      double logit = 0;
      for (size_t d = 0; d < 8; ++d)
        logit += static_cast<double>(plain[position_of(i) * 8 + d]) * static_cast<double>(plain[(40 + j) * 8 + d]);
      sum += e[j] = std::exp(logit);
    }
    for (size_t j = 0; j < 4; ++j) relevance[j] += e[j] / sum;
  }
  for (const double r : relevance) mean += r / 4;
  size_t found = 0;
  bool right = true;
  for (size_t j = 0; j < 4; ++j)
    if (relevance[j] >= mean) right = right && rows[found++] == 40 + j;
  expect(raters && right && *raters == found, "text_raters");

  // P log((P + e) / (Q + e)), and scores from the engine.
  float p[3] = {1, 2, 1}, q[3] = {1, 1, 2};
  const bool corrected = static_cast<bool>(fastv::correct_by_prior(Span<float>(p), Span<const float>(q)));
  expect(corrected && near(static_cast<double>(p[1]), 0.5 * std::log(0.500001 / 0.250001)), "correct_by_prior");
  double own[n_visual];
  float copied[n_visual];
  for (double& x : own) x = uniform();
  const fastv::Scores<double> scores{own, n};
  expect(scores.prompt_tokens() == n && scores.check() &&
             fastv::score<float>(fastv::Config{}, scores, spans, Span<float>(copied)) &&
             copied[7] == static_cast<float>(own[7]),
         "Scores");
}

void rules() {
  // Ties go to the earlier token, NaN is lowest: also where the compiler assumes that there is none.
  float scores[n_visual];
  for (size_t i = 0; i < n_visual; ++i) scores[i] = 1;
  set_bits(scores[0], 0x7fc00000u);
  set_bits(scores[1], 0xffc00001u);
  scores[11] = 2;
  scores[29] = 0;
  fastv::Config config;
  fastv::Pruner<float> pruner(config);
  const auto kept = pruner.prune(fastv::Scores<float>{Span<const float>(scores), n}, spans);
  expect(kept && kept.nan_scores == 2 && kept.zero_scores == 1, "NaN and zeros are counted");
  const Index first[] = {0, 1, 2, 5, 6, 7, 8, 9, 14, 15};
  expect(kept.size() == 30 && std::memcmp(kept.begin(), first, sizeof(first)) == 0, "ties and NaN");
  set_bits(scores[4], 0x7f800000u);
  expect(pruner.prune(fastv::Scores<float>{Span<const float>(scores), n}, spans).code() == fastv::Errc::bad_value,
         "infinity is refused");

  for (const auto selection : {fastv::Selection::random, fastv::Selection::uniform}) {
    config.selection = selection;
    config.seed = 7;
    fastv::Pruner<double> other(config);
    const auto some = other.prune(fastv::NoEvidence{n}, spans);
    expect(some && some.size() == 30, "rules without scores keep the planned count");
    size_t k = 0, sum = 0;  // as g++ 12 computes it on x86-64; unit tests hold the rules themselves to an oracle
    for (const Index index : some) sum += ++k * index;
    expect(selection == fastv::Selection::uniform ? sum == 14210 : sum == 14227, "the same on every platform");
  }
  config.selection = fastv::Selection::top_k;
  expect(pruner.prune(fastv::NoEvidence{n}, spans).code() == fastv::Errc::missing_evidence, "top_k needs scores");
  config.window_rows = 2;
  config.window_columns = 3;
  Index room[n];
  fastv::Mark<float> scratch[3 * n_visual + 4];
  scores[4] = 0;
  const auto selected = fastv::select<float>(config, Span<const float>(scores), spans, n, room, scratch);
  expect(fastv::select_scratch(config, spans) <= sizeof(scratch) / sizeof(scratch[0]) && selected &&
             selected->count == 30 && selected->nan_scores == 2 && selected->zero_scores == 2,
         "select");
}

void applying() {
  const Index kept[] = {1, 2, 5};
  int values[6] = {0, 1, 2, 3, 4, 5}, ids[6] = {0, 1, 2, 3, 4, 5}, target[3] = {};
  expect(fastv::next_position(Span<const int>(values)) == 6, "next_position");
  expect(fastv::compact(kept, fastv::rows(values, 6)) && values[0] == 1 && values[2] == 5, "compact(Rows)");
  expect(fastv::compact(kept, ids) && ids[1] == 2 && ids[2] == 5, "compact(a list)");
  int source[12];
  for (int i = 0; i < 12; ++i) source[i] = i;
  expect(fastv::gather(kept, fastv::rows(source, 6), fastv::rows(target, 3)) && target[2] == 5, "gather");
  expect(
      fastv::compact(kept, fastv::position_axes(source, 2, 6)) && source[2] == 5 && source[3] == 7 && source[5] == 11,
      "position_axes");
  std::uint16_t cache[24], packed[24];  // [2 heads, 6 tokens, 2], [6 tokens, 2 heads, 2]
  for (std::uint16_t i = 0; i < 24; ++i) cache[i] = packed[i] = i;
  expect(fastv::compact(kept, fastv::rows(cache, fastv::HeadMajor{2, 6, 2})) && cache[0] == 2 && cache[12 + 5] == 23,
         "a cache, head by head");
  expect(fastv::compact(kept, fastv::rows(packed, fastv::TokenMajor{6, 2, 2})) && packed[3] == 7 && packed[11] == 23,
         "a cache, token by token");
  unsigned char mask[36];
  for (unsigned char i = 0; i < 36; ++i) mask[i] = i;
  expect(fastv::compact_mask(kept, fastv::rows(mask, 6, 6)) && mask[0] == 7 && mask[1 * 6 + 2] == 17 &&
             mask[2 * 6 + 2] == 35,
         "compact_mask");
  float bias[7];
  std::uint32_t bitmap[1];
  const fastv::KeptRows of_six(kept, 6);
  expect(fastv::keep_bias(of_six, bias, -9.0f) && bias[0] == -9.0f && bias[1] == 0 && bias[6] == 0, "keep_bias");
  expect(fastv::keep_bitmap(of_six, bitmap) && bitmap[0] == (0xffffffc0u | (1u << 1) | (1u << 2) | (1u << 5)),
         "keep_bitmap");
  std::int64_t indices[3];
  expect(fastv::write_indices(kept, Span<std::int64_t>(indices), std::int64_t{100}) && indices[2] == 105,
         "write_indices");
  size_t runs = 0, last = 0;
  expect(fastv::for_each_run(kept,
                             [&](size_t to, size_t from, size_t count) {
                               ++runs;
                               last = to * 100 + from * 10 + count;
                             }) &&
             runs == 2 && last == 251,
         "for_each_run");
  const TokenSpan images[] = {{1, 2}, {4, 2}};
  Index numbers[3];
  const auto stay = fastv::kept_visual_numbers(kept, Span<const TokenSpan>(images), numbers);
  expect(stay && *stay == 3 && numbers[0] == 0 && numbers[1] == 1 && numbers[2] == 3, "kept_visual_numbers");

  const Index unsorted[] = {2, 1};
  expect(fastv::compact(unsorted, ids).code == fastv::Errc::bad_index, "unsorted");
}

void paged() {
  const Index kept[] = {1, 2, 5};
  const auto fill = [](int* cache, Index* table) {  // blocks of 2 tokens: 1, 2, 0
    const int values[8] = {4, 5, 0, 1, 2, 3, 9, 9};
    const Index blocks[3] = {1, 2, 0};
    std::memcpy(cache, values, sizeof(values));
    std::memcpy(table, blocks, sizeof(blocks));
  };
  int cache[8], other[8];
  Index table[3];
  const fastv::HeadMajor block{1, 2, 1};
  fill(cache, table);
  fastv::KvPages pages = fastv::pages(cache, block, table, 6);
  const auto blocks = fastv::repack_pages(kept, Span<const fastv::KvPages>(&pages, 1));
  const auto at = [&](size_t t) { return cache[blocks->used[t / 2] * 2 + t % 2]; };
  expect(blocks && blocks->used.size() == 2 && blocks->freed.size() == 1 && at(0) == 1 && at(1) == 2 && at(2) == 5,
         "repack_pages");
  fill(cache, table);
  const auto used = fastv::compact_pages(kept, pages);
  expect(used && *used == 2 && table[0] == 1 && cache[2] == 1 && cache[3] == 2 && cache[4] == 5, "compact_pages");
  fill(cache, table);
  void* const pointers[2] = {other, other + 4};
  const fastv::KvPages to = fastv::pages<int>(Span<void* const>(pointers), fastv::TokenMajor{2, 1, 1}, 3);
  expect(fastv::gather_pages(kept, pages, to) && other[0] == 1 && other[1] == 2 && other[4] == 5, "gather_pages");
}

void batches() {
  fastv::Request requests[2] = {};
  requests[0].visual = requests[1].visual = spans;
  requests[0].tokens = requests[1].tokens = n;
  requests[1].first = n;
  requests[1].config.filtering_ratio = 0.75;
  fastv::BatchPruner<float> batch;
  const auto evidence = fastv::probabilities(probabilities_, heads, 1, n);
  const auto kept = batch.prune(requests, [&](size_t) { return evidence; });
  fastv::Pruner<float> first(requests[0].config), second(requests[1].config);
  const auto alone = first.prune(evidence, spans), other = second.prune(evidence, spans);
  expect(kept && kept.failed == 0 && kept.sequences[0].size() == alone.size() && batch.scores(1).size() == n_visual &&
             fastv::make_plan(requests[1], 8)->kept() == other.size(),
         "a batch");
  bool same = kept.indices.size() == alone.size() + other.size();
  for (size_t i = 0; same && i < alone.size(); ++i) same = kept.sequences[0].indices[i] == alone.indices[i];
  for (size_t i = 0; same && i < other.size(); ++i)
    same = kept.sequence(1).indices[i] == other.indices[i] && kept.indices[alone.size() + i] == other.indices[i] + n;
  expect(same, "a batch keeps what each sequence keeps alone");
}

void costs() {
  expect(fastv::paper_layer_cost(10, 4, 8) == 4.0 * 10 * 16 + 2.0 * 100 * 4 + 2.0 * 10 * 4 * 8, "paper_layer_cost");
  const fastv::ModelShape shape{4, 8, 2, 1, 4, 16, 3, 10};
  const double full = fastv::paper_layer_cost(n, 8, 16), cut = fastv::paper_layer_cost(n - 15, 8, 16);
  expect(near(fastv::paper_cost(shape, n, n_visual, 2, 0.5), (full + cut) / 2, 1e-12), "paper_cost");
  expect(near(fastv::paper_cost_ratio(shape, n, n_visual, 2, 0.5), (1 + cut / full) / 2, 1e-12), "paper_cost_ratio");
  const std::uint64_t token = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16;
  expect(fastv::layer_macs(shape, 5, 7) == 5 * (token + 2 * 7 * 8), "layer_macs");
  const auto plan = fastv::make_plan(fastv::Config{}, {n, 4, spans});
  const std::uint64_t prefill = 80 + 2 * (n * (token + 16 * n)) + 2 * (30 * (token + 16 * 30));
  expect(fastv::prefill_macs(shape, *plan) == prefill, "prefill_macs");
  expect(fastv::prefill_flops(shape, *plan) == 2.0 * static_cast<double>(prefill), "prefill_flops");
  const std::uint64_t decode = 80 + 4 * token + 16 * 2 * ((n + 1) + (30 + 1));
  expect(fastv::decode_macs(shape, *plan, 0) == decode, "decode_macs");
  expect(fastv::decode_flops(shape, *plan, 0) == 2.0 * static_cast<double>(decode), "decode_flops");
  expect(fastv::kv_bytes(shape, *plan, 2) == 2 * 2 * 4 * 2 * (n + 30), "kv_bytes");
  fastv::Budget budget{fastv::Budget::Of::kv_bytes, static_cast<double>(fastv::kv_bytes(shape, *plan, 2))};
  const auto settings = fastv::settings_under(budget, shape, {n, 4, spans});
  expect(settings && settings->filtering_layer == 2 && settings->keep_count == 15, "settings_under");
}

fastv::half half_of(double x) { return to_half(x); }
float float_of(double x) { return static_cast<float>(x); }
double double_of(double x) { return x; }

}  // namespace

#ifndef FASTV_CHECK
#define FASTV_CHECK fastv_check
#endif
int FASTV_CHECK();
int FASTV_CHECK() {
  elements();
  statuses();
  plans();
  scores_of_probabilities();
  scores_of_keys<true, float>(float_of, "scores of float keys");
  scores_of_keys<false, double>(double_of, "scores of double keys");
  scores_of_keys<true, fastv::half>(half_of, "scores of half keys");
  scores_of_keys<false, fastv::bfloat16>(to_bfloat16, "scores of bfloat16 keys");
  logits();
  remedies();
  rules();
  applying();
  paged();
  batches();
  costs();
  std::printf("%d checks, %d wrong\n", checks, failures);
  return checks == 0 || failures != 0 ? 1 : 0;
}

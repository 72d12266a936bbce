// What fastv's kernels cost at the shapes of LLaVA-1.5-7B, on one thread, with the data outside the
// cache, each beside the time that physics or a rival needs for the same in the same run:
//
//   of_limit     time one core needs to read (score) or memmove (compact) the same bytes / our time; 1 is perfect.
//                The fastest of bench::ways_of_reading counts
//   of_in_order  the same of reading them in order
//   of_fma       time of as many multiply-adds as the scores take, with nothing to load / our time
//   vs_rival     the rival's time / our time; above 1 we are faster. Rivals: Eigen doing the same product
//                and softmax (score), std::nth_element and std::sort on a copy (select), all similarities by Eigen and a
//                loop over them (diversity)
//   times_whole  our time / that of the simpler case: the same keys in one piece (score), the same scores without
//                windows (select)
//
// Times are medians, ratios are of lower quartiles. Results are compared with a slow oracle in double before anything
// is timed.
#include <benchmark/benchmark.h>

#include <Eigen/Core>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fastv/fastv.hpp"
#include "timing.hpp"

namespace {

using bench::Ring;

constexpr std::size_t heads = 32, dim = 128, hidden = 4096;
constexpr std::size_t text_before = 35, visual = 576, text_after = 20, tokens = text_before + visual + text_after;
constexpr fastv::TokenSpan image{text_before, visual};
constexpr double ratio = 0.5;

const fastv::Span<const fastv::TokenSpan> images{&image, 1};

// ---- data ---------------------------------------------------------------------------------------

// Uniform in [-sqrt(3), sqrt(3)]: variance 1, the same on every platform.
class Noise {
 public:
  explicit Noise(std::uint32_t seed) : state_(seed) {}
  float operator()() {
    state_ = state_ * 1664525u + 1013904223u;
    return (static_cast<float>(state_ >> 8) / 8388608.0f - 1.0f) * 1.7320508f;
  }

 private:
  std::uint32_t state_;
};

template <class T>
T narrow(float value) {
  return value;
}
template <>
fastv::half narrow(float value) {
  return {Eigen::numext::bit_cast<std::uint16_t>(Eigen::half(value))};
}
template <>
fastv::bfloat16 narrow(float value) {
  return {Eigen::numext::bit_cast<std::uint16_t>(Eigen::bfloat16(value))};
}

// Cut off, not rounded.
template <>
fastv::fp8_e5m2 narrow(float value) {
  return {static_cast<std::uint8_t>(narrow<fastv::half>(value).bits >> 8)};
}
template <>
fastv::fp8_e4m3 narrow(float value) {
  const auto bits = Eigen::numext::bit_cast<std::uint32_t>(value);
  const std::uint32_t exponent = (bits >> 23 & 255u) + 7 - 127, fraction = bits >> 20 & 7u, sign = bits >> 31 << 7;
  const bool normal = exponent - 1 < 14;  // what is smaller becomes 0
  return {static_cast<std::uint8_t>(sign | (normal ? exponent << 3 | fraction : 0))};
}

template <class T>
std::vector<T> random_tensor(std::size_t size, std::uint32_t seed) {
  Noise noise(seed);
  std::vector<T> tensor(size);
  for (T& value : tensor) value = narrow<T>(noise());
  return tensor;
}

// Eigen's name of a storage type.
template <class T>
struct InEigen {
  using Type = T;
};
template <>
struct InEigen<fastv::half> {
  using Type = Eigen::half;
};
template <>
struct InEigen<fastv::bfloat16> {
  using Type = Eigen::bfloat16;
};

bool agree(const std::vector<float>& scores, const std::vector<double>& oracle) {
  for (std::size_t i = 0; i < scores.size(); ++i)
    if (!(std::abs(static_cast<double>(scores[i]) - oracle[i]) < 1e-6)) return false;
  return true;
}

fastv::Config settings() {
  fastv::Config config;
  config.filtering_ratio = ratio;
  return config;
}

// Half of the visual tokens, at random places, and all text.
std::vector<fastv::Index> random_kept() {
  fastv::Config config = settings();
  config.selection = fastv::Selection::random;
  std::vector<fastv::Index> kept(tokens);
  std::vector<std::uint32_t> scratch(fastv::select_scratch(config, images));
  const auto selected = fastv::select<float>(config, {}, images, tokens, kept, scratch);
  kept.resize(selected->count);
  return kept;
}

// ---- score from probabilities -------------------------------------------------------------------

// Attention of `rows` rows, [heads, rows, tokens], as a causal softmax leaves it.
std::vector<float> attention(std::size_t rows) {
  std::vector<float> map(heads * rows * tokens);
  Noise noise(1);
  for (std::size_t row = 0; row < heads * rows; ++row) {
    float* p = map.data() + row * tokens;
    const std::size_t seen = tokens - rows + row % rows + 1;
    float sum = 0;
    for (std::size_t key = 0; key < seen; ++key) sum += p[key] = noise() + 2.0f;
    for (std::size_t key = 0; key < seen; ++key) p[key] /= sum;
  }
  return map;
}

void BM_ScoreProbabilities(benchmark::State& state, const std::string& name, std::size_t rows) {
  const std::vector<float> map = attention(rows);
  std::vector<double> oracle(visual);
  for (std::size_t row = 0; row < heads * rows; ++row)
    for (std::size_t i = 0; i < visual; ++i) oracle[i] += static_cast<double>(map[row * tokens + text_before + i]);
  for (double& score : oracle) score /= static_cast<double>(heads * rows);

  fastv::Config config = settings();
  config.score_rows = rows == 1 ? fastv::ScoreRows::last : fastv::ScoreRows::all;
  std::vector<float> scores(visual);
  Ring ring(map);
  const auto score = [&] {
    const auto* data = reinterpret_cast<const float*>(ring.next());
    return fastv::score<float>(config, fastv::probabilities(data, heads, rows, tokens), images, scores);
  };
  if (!score() || !agree(scores, oracle)) return state.SkipWithError("scores differ from the oracle");
  bench::compare(state, name.c_str(),
                 {{"", [&] { benchmark::DoNotOptimize(score()); }},
                  {"of_limit", [&] {
                     const unsigned char* data = ring.next() + text_before * sizeof(float);
                     benchmark::DoNotOptimize(
                         bench::read_rows(data, heads * rows, visual * sizeof(float), tokens * sizeof(float)));
                   }}});
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(heads * rows * visual * sizeof(float)));
}

// ---- score from queries and keys ----------------------------------------------------------------

// Where the keys lie: in one piece, or in blocks of `block_tokens` that the block table names in no order.
enum class Layout { token_major, head_major, chunked };
struct Cache {
  Layout layout;
  std::size_t kv_heads = heads;
  std::size_t block_tokens = 0;  // 0: one piece
};

// q: [heads, dim]; keys of K as the cache wants them.
template <class Q, class K = Q>
struct Attention {
  // vLLM's chunks are of 16 bytes.
  static constexpr std::size_t chunk = 16 / sizeof(K);

  Cache cache;
  std::size_t block, blocks;  // tokens of a block, blocks
  std::vector<Q> query = random_tensor<Q>(heads * dim, 2);
  std::vector<K> key;
  std::vector<fastv::Index> table;

  explicit Attention(const Cache& where)
      : cache(where),
        block(where.block_tokens == 0 ? tokens : where.block_tokens),
        blocks((tokens - 1) / block + 1),
        key(random_tensor<K>(blocks * block * where.kv_heads * dim, 3)),
        table(blocks) {
    for (std::size_t i = 0; i < blocks; ++i) table[i] = static_cast<fastv::Index>(i * 7 % blocks);  // 7 divides none
  }

  fastv::Heads<K> heads_at(const void* cached_key) const {
    const K* data = static_cast<const K*>(cached_key);
    const fastv::TokenMajor by_token{block, cache.kv_heads, dim};
    const fastv::HeadMajor by_head{cache.kv_heads, block, dim};
    if (cache.block_tokens == 0)
      return cache.layout == Layout::token_major ? fastv::heads(data, by_token) : fastv::heads(data, by_head);
    const fastv::Span<const fastv::Index> list(table);
    switch (cache.layout) {
      case Layout::token_major: return fastv::heads(data, by_token, list, tokens);
      case Layout::head_major: return fastv::heads(data, by_head, list, tokens);
      case Layout::chunked: break;
    }
    return fastv::heads(data, fastv::ChunkedHeadMajor{cache.kv_heads, dim / chunk, block, chunk}, list, tokens);
  }
  auto evidence(const void* cached_key) const {
    return fastv::query_key(fastv::heads(query.data(), fastv::TokenMajor{1, heads, dim}), heads_at(cached_key),
                            scale());
  }
  static float scale() { return 1.0f / std::sqrt(static_cast<float>(dim)); }

  // Of element i of a token's vector.
  std::size_t key_at(std::size_t token, std::size_t kv_head, std::size_t i = 0) const {
    const std::size_t b = cache.block_tokens == 0 ? 0 : table[token / block], row = token % block, h = cache.kv_heads;
    switch (cache.layout) {
      case Layout::token_major: return ((b * block + row) * h + kv_head) * dim + i;
      case Layout::head_major: return ((b * h + kv_head) * block + row) * dim + i;
      case Layout::chunked: break;
    }
    return (((b * h + kv_head) * (dim / chunk) + i / chunk) * block + row) * chunk + i % chunk;
  }

  std::vector<double> oracle() const {
    std::vector<double> scores(visual), row(tokens);
    for (std::size_t head = 0; head < heads; ++head) {
      double most = -std::numeric_limits<double>::infinity(), sum = 0;
      for (std::size_t token = 0; token < tokens; ++token) {
        double product = 0;
        for (std::size_t i = 0; i < dim; ++i)
          product += static_cast<double>(fastv::to_float(query[head * dim + i])) *
                     static_cast<double>(fastv::to_float(key[key_at(token, head * cache.kv_heads / heads, i)]));
        row[token] = product * static_cast<double>(scale());
        most = std::max(most, row[token]);
      }
      for (double& logit : row) sum += logit = std::exp(logit - most);
      for (std::size_t i = 0; i < visual; ++i) scores[i] += row[text_before + i] / sum / static_cast<double>(heads);
    }
    return scores;
  }

  // The same by Eigen, of keys in one piece: product, softmax, mean. Half precision is widened head by head into `wide`,
  // which is several times faster here than Eigen's product of a cast expression.
  using Wide = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  Eigen::VectorXf by_eigen(const void* cached_key, Wide& wide) const {
    using Scalar = typename InEigen<K>::Type;
    using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    constexpr auto columns = static_cast<Eigen::Index>(dim);
    const auto rows = static_cast<Eigen::Index>(key.size() / (cache.kv_heads * dim));
    const auto stride = static_cast<Eigen::Index>(key_at(1, 0));
    Eigen::VectorXf scores = Eigen::VectorXf::Zero(static_cast<Eigen::Index>(visual));
    Eigen::VectorXf logits(rows), q(columns);
    for (std::size_t head = 0; head < heads; ++head) {
      const auto* key_of_head = static_cast<const Scalar*>(cached_key) + key_at(0, head * cache.kv_heads / heads);
      const Eigen::Map<const Matrix, 0, Eigen::OuterStride<>> k(key_of_head, rows, columns,
                                                                Eigen::OuterStride<>(stride));
      const auto* q_of_head = reinterpret_cast<const typename InEigen<Q>::Type*>(query.data()) + head * dim;
      q = Eigen::Map<const Eigen::Matrix<typename InEigen<Q>::Type, Eigen::Dynamic, 1>>(q_of_head, columns)
              .template cast<float>();
      q *= scale();
      if constexpr (std::is_same<Scalar, float>::value) {
        logits.noalias() = k * q;
      } else {
        wide = k.template cast<float>();
        logits.noalias() = wide * q;
      }
      logits = (logits.array() - logits.maxCoeff()).exp();
      scores += logits.segment(static_cast<Eigen::Index>(text_before), static_cast<Eigen::Index>(visual)) /
                (logits.sum() * static_cast<float>(heads));
    }
    return scores;
  }
};

// Something else to do with the keys of a cache.
struct Rival {
  const char* counter;
  std::function<void(const void* key)> run;
};

// Scores from a cache, compared with the oracle, then timed beside its limits and rivals.
template <class Q, class K, class EvidenceOf>
void compare_scores(benchmark::State& state, const std::string& name, const Attention<Q, K>& attention,
                    const EvidenceOf& evidence_of, const std::vector<Rival>& rivals) {
  const fastv::Config config = settings();
  std::vector<float> scores(visual), scratch(fastv::score_scratch(evidence_of(attention.key.data())));
  Ring ring(attention.key);
  const auto score = [&] { return fastv::score<float>(config, evidence_of(ring.next()), images, scores, scratch); };
  if (!score() || !agree(scores, attention.oracle())) return state.SkipWithError("scores differ from the oracle");

  std::vector<bench::Candidate> candidates = {
      {"", [&] { benchmark::DoNotOptimize(score()); }},
      {"of_in_order", [&] { benchmark::DoNotOptimize(bench::read_in_order(ring.next(), ring.bytes())); }},
      {"of_fma", [&] { benchmark::DoNotOptimize(bench::multiply_adds(heads * tokens * dim)); }}};
  for (const Rival& rival : rivals) candidates.push_back({rival.counter, [&] { rival.run(ring.next()); }});
  for (const bench::Reader read : bench::ways_of_reading)
    candidates.push_back({"of_limit", [&, read] { benchmark::DoNotOptimize(read(ring.next(), ring.bytes())); }});
  bench::compare(state, name.c_str(), candidates);
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(ring.bytes()));
}

// Keys in one piece, beside Eigen.
template <class T>
void BM_ScoreQueryKey(benchmark::State& state, const std::string& name, const Cache& cache) {
  const Attention<T> attention(cache);
  typename Attention<T>::Wide wide;
  const Eigen::VectorXf rival = attention.by_eigen(attention.key.data(), wide);
  if (!agree({rival.data(), rival.data() + rival.size()}, attention.oracle()))
    return state.SkipWithError("Eigen's scores differ from the oracle");
  compare_scores(state, name, attention, [&](const void* key) { return attention.evidence(key); },
                 {{"vs_rival", [&](const void* key) { benchmark::DoNotOptimize(attention.by_eigen(key, wide)); }}});
}

// 8-bit floats, of which Eigen knows nothing.
template <class K>
void BM_ScoreFp8(benchmark::State& state, const std::string& name, const Cache& cache) {
  const Attention<fastv::half, K> attention(cache);
  compare_scores(state, name, attention, [&](const void* key) { return attention.evidence(key); }, {});
}

// The same memory, read as if it were keys in one piece.
template <class K>
Rival in_one_piece(const Attention<fastv::half, K>& attention) {
  const bool by_token = attention.cache.layout == Layout::token_major;
  const auto whole = std::make_shared<const Attention<fastv::half, K>>(
      Cache{by_token ? Layout::token_major : Layout::head_major, attention.cache.kv_heads});
  const auto scores = std::make_shared<std::vector<float>>(visual);
  const auto scratch = std::make_shared<std::vector<float>>(fastv::score_scratch(whole->evidence(whole->key.data())));
  return {"times_whole", [=](const void* key) {
            benchmark::DoNotOptimize(fastv::score<float>(settings(), whole->evidence(key), images, *scores, *scratch));
          }};
}

// Keys in pages.
void BM_ScorePages(benchmark::State& state, const std::string& name, const Cache& cache) {
  const Attention<fastv::half> attention(cache);
  compare_scores(state, name, attention, [&](const void* key) { return attention.evidence(key); },
                 {in_one_piece(attention)});
}

// Keys that only a function can read; here it widens halves in one piece.
void BM_ScoreLoadedKeys(benchmark::State& state, const std::string& name, const Cache& cache) {
  const Attention<fastv::half> attention(cache);
  const auto evidence_of = [&](const void* key) {
    const auto load = [&attention, data = static_cast<const fastv::half*>(key)](std::size_t kv_head, std::size_t token,
                                                                                float* out) {
      const fastv::half* vector = data + attention.key_at(token, kv_head);
      for (std::size_t i = 0; i < dim; ++i) out[i] = fastv::to_float(vector[i]);
    };
    return fastv::query_key(fastv::heads(attention.query.data(), fastv::TokenMajor{1, heads, dim}),
                            fastv::loaded_keys(attention.cache.kv_heads, tokens, dim, load), attention.scale());
  };
  compare_scores(state, name, attention, evidence_of, {in_one_piece(attention)});
}

// ---- select -------------------------------------------------------------------------------------

// The rival: indices by std::nth_element on a copy of the scores, then std::sort back into prompt order.
class SortingSelect {
 public:
  const std::vector<fastv::Index>& operator()(const std::vector<float>& scores, std::size_t count) {
    copy_.resize(scores.size());
    for (std::size_t i = 0; i < scores.size(); ++i) copy_[i] = {scores[i], static_cast<fastv::Index>(i)};
    std::nth_element(
        copy_.begin(), copy_.begin() + static_cast<std::ptrdiff_t>(count), copy_.end(),
        [](const Entry& a, const Entry& b) { return a.score > b.score || (a.score == b.score && a.index < b.index); });
    kept_.resize(count);
    for (std::size_t i = 0; i < count; ++i) kept_[i] = copy_[i].index;
    std::sort(kept_.begin(), kept_.end());
    return kept_;
  }

 private:
  struct Entry {
    float score;
    fastv::Index index;
  };
  std::vector<Entry> copy_;
  std::vector<fastv::Index> kept_;
};

// Different scores in every round, or the processor learns their order by heart. They are spread like attention is:
// exponentials of a normal variable.
std::vector<std::vector<float>> sets_of_scores(std::size_t n) {
  std::vector<std::vector<float>> sets(256);
  Noise noise(4);
  for (std::vector<float>& scores : sets) {
    scores.resize(n);
    for (float& score : scores) score = std::exp(noise() + noise() + noise()) / static_cast<float>(n);
  }
  return sets;
}

void BM_Select(benchmark::State& state, const std::string& name, std::size_t n) {
  const std::vector<std::vector<float>> sets = sets_of_scores(n);
  std::size_t turn = 0;
  const auto next = [&]() -> const std::vector<float>& { return sets[turn++ % sets.size()]; };

  const fastv::Config config = settings();
  const fastv::TokenSpan span{0, n};
  std::vector<fastv::Index> kept(n + 1);
  std::vector<std::uint32_t> scratch(fastv::select_scratch(config, {&span, 1}));
  const auto select = [&](const std::vector<float>& scores) {  // the last token asks the question
    return fastv::select<float>(config, scores, {&span, 1}, n + 1, kept, scratch);
  };
  SortingSelect rival;
  for (const std::vector<float>& scores : sets) {
    const auto selected = select(scores);
    const std::vector<fastv::Index>& expected = rival(scores, n / 2);
    if (!selected || selected->count != n / 2 + 1 || !std::equal(expected.begin(), expected.end(), kept.begin()))
      return state.SkipWithError("kept indices differ from nth_element and sort");
  }
  bench::compare(state, name.c_str(),
                 {{"", [&] { benchmark::DoNotOptimize(select(next())); }},
                  {"vs_rival", [&] { benchmark::DoNotOptimize(rival(next(), n / 2).data()); }}});
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(n));
}

// Windows of side x side tokens on a square grid of as many columns, which they divide.
void BM_SelectWindows(benchmark::State& state, const std::string& name, std::size_t columns, std::size_t side) {
  const std::size_t n = columns * columns, across = columns / side, windows = across * across;
  const std::vector<std::vector<float>> sets = sets_of_scores(n);
  std::size_t turn = 0;
  const auto next = [&]() -> const std::vector<float>& { return sets[turn++ % sets.size()]; };
  fastv::Config config = settings();
  config.window_rows = config.window_columns = side;
  const fastv::TokenSpan span{0, n, columns};
  std::vector<fastv::Index> kept(n + 1);
  std::vector<std::uint32_t> scratch(fastv::select_scratch(config, {&span, 1}));
  const auto select = [&](const fastv::Config& settings_now) {
    return fastv::select<float>(settings_now, next(), {&span, 1}, n + 1, kept, scratch);
  };

  // Of equal windows each keeps the same share, and the first ones one more where it does not come out even.
  SortingSelect best;
  for (const std::vector<float>& scores : sets) {
    std::vector<fastv::Index> expected;
    for (std::size_t w = 0; w < windows; ++w) {
      const auto place = [&](std::size_t i) {
        return (w / across * side + i / side) * columns + w % across * side + i % side;
      };
      std::vector<float> own(side * side);
      for (std::size_t i = 0; i < own.size(); ++i) own[i] = scores[place(i)];
      const std::size_t share = n / 2 / windows + (w < n / 2 % windows ? 1 : 0);
      for (const fastv::Index i : best(own, share)) expected.push_back(static_cast<fastv::Index>(place(i)));
    }
    std::sort(expected.begin(), expected.end());
    const auto selected = select(config);
    if (!selected || selected->count != n / 2 + 1 || !std::equal(expected.begin(), expected.end(), kept.begin()))
      return state.SkipWithError("kept indices differ from the best of each window");
  }
  bench::compare(state, name.c_str(),
                 {{"", [&] { benchmark::DoNotOptimize(select(config)); }},
                  {"times_whole", [&] { benchmark::DoNotOptimize(select(settings())); }}});
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(n));
}

// ---- select by diversity ------------------------------------------------------------------------

// The rival: as published code does it, all similarities by one product of matrices, then a loop over that matrix. In
// double it is the oracle.
template <class Real>
std::vector<fastv::Index> greedy_by_matrix(const std::vector<fastv::half>& features, std::size_t width,
                                           const std::vector<float>& scores, std::size_t count,
                                           const fastv::Diversity& diversity) {
  using Matrix = Eigen::Matrix<Real, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Vector = Eigen::Array<Real, Eigen::Dynamic, 1>;
  const auto n = static_cast<Eigen::Index>(scores.size()), columns = static_cast<Eigen::Index>(width);
  Matrix x(n, columns);
  for (Eigen::Index i = 0; i < x.size(); ++i)
    x.data()[i] = static_cast<Real>(fastv::to_float(features[static_cast<std::size_t>(i)]));
  x.rowwise().normalize();
  Matrix similar(n, n);
  similar.noalias() = x * x.transpose();
  Vector s = Eigen::Map<const Eigen::ArrayXf>(scores.data(), n).template cast<Real>();
  const bool product = diversity.blend == fastv::Blend::product;
  const auto weight = static_cast<Real>(diversity.weight);
  s = product ? Vector((s / s.maxCoeff()).pow(weight)) : Vector((s - s.minCoeff()) / (s.maxCoeff() - s.minCoeff()));
  Vector novelty = Vector::Constant(n, diversity.novelty == fastv::Novelty::volume ? 1 : 2), covered = Vector::Zero(n);
  Matrix basis(static_cast<Eigen::Index>(count), n);  // of a DPP's fast greedy algorithm (Chen et al., 2018)
  std::vector<bool> taken(scores.size());
  std::vector<fastv::Index> kept;
  for (Eigen::Index step = 0; step < static_cast<Eigen::Index>(count); ++step) {
    if (diversity.novelty == fastv::Novelty::coverage)
      for (Eigen::Index i = 0; i < n; ++i)
        novelty[i] = (similar.row(i).array().transpose() - covered).max(Real(0)).sum() / static_cast<Real>(n);
    const Vector values = product ? Vector(s * novelty) : Vector(weight * s + (1 - weight) * novelty);
    Eigen::Index best = -1;
    for (Eigen::Index i = 0; i < n; ++i)
      if (!taken[static_cast<std::size_t>(i)] && (best < 0 || values[i] > values[best])) best = i;
    taken[static_cast<std::size_t>(best)] = true;
    kept.push_back(static_cast<fastv::Index>(best));
    const Vector to_best = similar.row(best).array().transpose();
    switch (diversity.novelty) {
      case fastv::Novelty::nearest: novelty = novelty.min(1 - to_best); break;
      case fastv::Novelty::coverage: covered = covered.max(to_best); break;
      case fastv::Novelty::volume:
        basis.row(step) =
            (to_best.matrix().transpose() - basis.col(best).head(step).transpose() * basis.topRows(step)) /
            std::sqrt(novelty[best]);
        novelty -= basis.row(step).array().square().transpose();
        break;
    }
  }
  std::sort(kept.begin(), kept.end());
  return kept;
}

// A tenth of n tokens stays, by scores and by keys of 8 KV heads, in half precision, that gather about some centres.
void BM_SelectDiverse(benchmark::State& state, const std::string& name, std::size_t n, fastv::Diversity diversity) {
  constexpr std::size_t kv_heads = 8, width = kv_heads * dim, centres = 24;
  const std::vector<float> centre = random_tensor<float>(centres * width, 6),
                           noise = random_tensor<float>(n * width, 7);
  std::vector<fastv::half> keys(n * width);
  for (std::size_t i = 0; i < keys.size(); ++i)
    keys[i] = narrow<fastv::half>(centre[i / width * 7 % centres * width + i % width] + noise[i]);
  const std::vector<float> scores = sets_of_scores(n)[0];
  fastv::Config config;
  config.filtering_ratio = 0.9;
  config.selection = fastv::Selection::diverse;
  config.diversity = diversity;
  const std::size_t count = fastv::kept_count(n, 0.9);
  const fastv::TokenSpan span{0, n};
  fastv::Pruner<> pruner(config);
  std::vector<fastv::half> of_prompt = keys;
  of_prompt.resize((n + 1) * width);
  const auto evidence = fastv::with_features(fastv::Scores<float>{scores, n + 1},
                                             fastv::heads(of_prompt.data(), fastv::TokenMajor{n + 1, kv_heads, dim}));
  const auto prune = [&] { return pruner.prune(evidence, {&span, 1}); };
  const std::vector<fastv::Index> expected = greedy_by_matrix<double>(keys, width, scores, count, diversity);
  const auto kept = prune();
  if (!kept || kept.size() != count + 1 || !std::equal(expected.begin(), expected.end(), kept.begin()))
    return state.SkipWithError("kept indices differ from the oracle's");
  bench::compare(state, name.c_str(),
                 {{"", [&] { benchmark::DoNotOptimize(prune()); }},
                  {"vs_rival", [&] {
                     benchmark::DoNotOptimize(greedy_by_matrix<float>(keys, width, scores, count, diversity).data());
                   }}});
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(n));
}

// ---- compact ------------------------------------------------------------------------------------

// The bytes that compaction moves, in one piece: rows that stay where they are do not count.
std::size_t moved_bytes(const std::vector<fastv::Index>& kept, const fastv::Rows& rows) {
  std::size_t moved = 0;
  for (std::size_t i = 0; i < kept.size(); ++i) moved += kept[i] != i;
  return moved * rows.planes * rows.row_bytes;
}
void move_in_one_piece(unsigned char* data, std::size_t size, std::size_t moved) {
  std::memmove(data, data + size - moved, moved);
}

bool compacted(const unsigned char* before, const unsigned char* after, const std::vector<fastv::Index>& kept,
               const fastv::Rows& rows) {
  for (std::size_t plane = 0; plane < rows.planes; ++plane)
    for (std::size_t i = 0; i < kept.size(); ++i) {
      const auto at = [&](std::size_t row) {
        return static_cast<std::ptrdiff_t>(plane) * rows.plane_stride +
               static_cast<std::ptrdiff_t>(row) * rows.row_stride;
      };
      if (std::memcmp(before + at(kept[i]), after + at(i), rows.row_bytes) != 0) return false;
    }
  return true;
}

void BM_Compact(benchmark::State& state, const std::string& name, fastv::Rows shape) {
  const std::vector<fastv::Index> kept = random_kept();
  const std::vector<std::uint32_t> tensor = [&] {
    std::vector<std::uint32_t> words(shape.planes * shape.count * shape.row_bytes / sizeof(std::uint32_t));
    for (std::size_t i = 0; i < words.size(); ++i) words[i] = static_cast<std::uint32_t>(i) * 2654435761u;
    return words;
  }();
  Ring ring(tensor);
  const std::size_t moved = moved_bytes(kept, shape);
  const auto compact = [&](unsigned char* data) {
    fastv::Rows rows = shape;
    rows.data = data;
    return fastv::compact(kept, rows);
  };
  unsigned char* first = ring.next();
  if (!compact(first) || !compacted(reinterpret_cast<const unsigned char*>(tensor.data()), first, kept, shape))
    return state.SkipWithError("compacted rows differ from the kept rows");
  bench::compare(state, name.c_str(),
                 {{"", [&] { benchmark::DoNotOptimize(compact(ring.next())); }},
                  {"of_limit", [&] { move_in_one_piece(ring.next(), ring.bytes(), moved); }}});
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(moved));
}

fastv::Rows hidden_states(std::size_t element_bytes) {
  const std::size_t row = hidden * element_bytes;
  return {nullptr, tokens, row, static_cast<std::ptrdiff_t>(row)};
}
fastv::Rows kv_cache(Layout layout) {
  auto* const data = static_cast<fastv::half*>(nullptr);
  return layout == Layout::token_major ? fastv::rows(data, fastv::TokenMajor{tokens, heads, dim})
                                       : fastv::rows(data, fastv::HeadMajor{heads, tokens, dim});
}

// ---- the whole step -----------------------------------------------------------------------------

// prune() from half-precision queries and keys, then hidden states and position ids compacted. The limit
// reads the keys and moves the hidden states in one piece.
void BM_PruneAndApply(benchmark::State& state, const std::string& name) {
  const Attention<fastv::half> attention({Layout::token_major});
  const std::vector<fastv::half> states = random_tensor<fastv::half>(tokens * hidden, 5);
  const std::size_t key_bytes = attention.key.size() * sizeof(fastv::half);
  const std::size_t state_bytes = states.size() * sizeof(fastv::half);
  std::vector<unsigned char> both(key_bytes + state_bytes);
  std::memcpy(both.data(), attention.key.data(), key_bytes);
  std::memcpy(both.data() + key_bytes, states.data(), state_bytes);
  Ring ring(both);

  fastv::Pruner<float> pruner(settings());
  std::vector<std::int32_t> positions(tokens);
  std::vector<fastv::Index> kept_indices;
  const auto prune_and_apply = [&](unsigned char* data) {
    for (std::size_t i = 0; i < tokens; ++i) positions[i] = static_cast<std::int32_t>(i);
    const fastv::Kept kept = pruner.prune(attention.evidence(data), images);
    kept_indices.assign(kept.begin(), kept.end());
    fastv::Rows rows = hidden_states(sizeof(fastv::half));
    rows.data = data + key_bytes;
    return kept && fastv::compact(kept, rows) && fastv::compact(kept, positions);
  };
  unsigned char* first = ring.next();
  if (!prune_and_apply(first)) return state.SkipWithError("prune or compact failed");
  const std::vector<double> oracle = attention.oracle();
  SortingSelect rival;
  std::vector<fastv::Index> expected;
  for (std::size_t i = 0; i < text_before; ++i) expected.push_back(static_cast<fastv::Index>(i));
  for (const fastv::Index i : rival({oracle.begin(), oracle.end()}, visual / 2))
    expected.push_back(static_cast<fastv::Index>(i + text_before));
  for (std::size_t i = text_before + visual; i < tokens; ++i) expected.push_back(static_cast<fastv::Index>(i));
  if (kept_indices != expected) return state.SkipWithError("kept indices differ from the oracle's");
  if (!compacted(reinterpret_cast<const unsigned char*>(states.data()), first + key_bytes, expected,
                 hidden_states(sizeof(fastv::half))))
    return state.SkipWithError("compacted rows differ from the kept rows");

  const std::size_t moved = moved_bytes(expected, hidden_states(sizeof(fastv::half)));
  std::vector<bench::Candidate> candidates = {{"", [&] { benchmark::DoNotOptimize(prune_and_apply(ring.next())); }}};
  for (const bench::Reader read : bench::ways_of_reading)
    candidates.push_back({"of_limit", [&, read] {
                            unsigned char* data = ring.next();
                            benchmark::DoNotOptimize(read(data, key_bytes));
                            move_in_one_piece(data + key_bytes, state_bytes, moved);
                          }});
  bench::compare(state, name.c_str(), candidates);
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(key_bytes + moved));
}

// ---- the table ----------------------------------------------------------------------------------

template <class Function, class... Arguments>
void add(const std::string& name, int rounds, Function function, Arguments... arguments) {
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) { function(state, name, arguments...); })
      ->Iterations(rounds)
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond);
}

void add_all() {
  using fastv::bfloat16;
  using fastv::half;
  const Cache by_token{Layout::token_major}, by_head{Layout::head_major};
  add("BM_ScoreProbabilities/float/last_row", 4000, BM_ScoreProbabilities, std::size_t{1});
  add("BM_ScoreProbabilities/float/all_rows", 40, BM_ScoreProbabilities, tokens);
  add("BM_ScoreQueryKey/float/token_major", 200, BM_ScoreQueryKey<float>, by_token);
  add("BM_ScoreQueryKey/float/head_major", 200, BM_ScoreQueryKey<float>, by_head);
  add("BM_ScoreQueryKey/half/token_major", 200, BM_ScoreQueryKey<half>, by_token);
  add("BM_ScoreQueryKey/half/head_major", 200, BM_ScoreQueryKey<half>, by_head);
  add("BM_ScoreQueryKey/half/token_major/8_kv_heads", 200, BM_ScoreQueryKey<half>,
      Cache{Layout::token_major, heads / 4});
  add("BM_ScoreQueryKey/bfloat16/token_major", 200, BM_ScoreQueryKey<bfloat16>, by_token);
  add("BM_ScoreQueryKey/bfloat16/head_major", 200, BM_ScoreQueryKey<bfloat16>, by_head);
  add("BM_ScoreFp8/e4m3/token_major", 100, BM_ScoreFp8<fastv::fp8_e4m3>, by_token);
  add("BM_ScoreFp8/e5m2/token_major", 100, BM_ScoreFp8<fastv::fp8_e5m2>, by_token);
  add("BM_ScorePages/half/token_major/blocks_of_16", 200, BM_ScorePages, Cache{Layout::token_major, heads, 16});
  add("BM_ScorePages/half/token_major/blocks_of_4", 200, BM_ScorePages, Cache{Layout::token_major, heads, 4});
  add("BM_ScorePages/half/head_major/blocks_of_16", 200, BM_ScorePages, Cache{Layout::head_major, heads, 16});
  add("BM_ScorePages/half/chunked/blocks_of_16", 200, BM_ScorePages, Cache{Layout::chunked, heads, 16});
  add("BM_ScoreLoadedKeys/half/token_major", 100, BM_ScoreLoadedKeys, by_token);
  add("BM_Select/576", 4000, BM_Select, std::size_t{576});
  add("BM_Select/2880", 1000, BM_Select, std::size_t{2880});
  add("BM_Select/16384", 300, BM_Select, std::size_t{16384});
  for (const std::size_t side : {1u, 2u, 4u})
    add("BM_SelectWindows/16384/" + std::to_string(side) + "x" + std::to_string(side), 300, BM_SelectWindows,
        std::size_t{128}, side);
  const fastv::Diversity mmr{fastv::Novelty::nearest, fastv::Blend::sum, 0.5},
      scope{fastv::Novelty::coverage, fastv::Blend::product, 1}, dpp{fastv::Novelty::volume, fastv::Blend::product, 2};
  add("BM_SelectDiverse/nearest/576", 30, BM_SelectDiverse, std::size_t{576}, mmr);
  add("BM_SelectDiverse/coverage/576", 10, BM_SelectDiverse, std::size_t{576}, scope);
  add("BM_SelectDiverse/volume/576", 30, BM_SelectDiverse, std::size_t{576}, dpp);
  add("BM_SelectDiverse/nearest/2880", 10, BM_SelectDiverse, std::size_t{2880}, mmr);
  add("BM_Compact/hidden/float", 200, BM_Compact, hidden_states(sizeof(float)));
  add("BM_Compact/hidden/half", 400, BM_Compact, hidden_states(sizeof(fastv::half)));
  add("BM_Compact/kv/half/token_major", 400, BM_Compact, kv_cache(Layout::token_major));
  add("BM_Compact/kv/half/head_major", 400, BM_Compact, kv_cache(Layout::head_major));
  add("BM_PruneAndApply/half", 300, BM_PruneAndApply);
}

// Google Benchmark holds all results back until the end.
bool interleaved(int argc, char** argv) {
  for (int i = 1; i < argc; ++i)
    if (std::string(argv[i]).rfind("--benchmark_enable_random_interleaving", 0) == 0) return true;
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  bench::Progress::get().begin(interleaved(argc, argv));
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::AddCustomContext("processor", bench::processor());
  benchmark::AddCustomContext("compiler", bench::compiler());
  benchmark::AddCustomContext("instruction sets", bench::instruction_sets());
  benchmark::AddCustomContext("threads", "1");
  benchmark::AddCustomContext("last-level cache",
                              std::to_string(bench::cache_bytes() >> 20) + " MiB; tensors rotate over twice that");
  benchmark::AddCustomContext("shape",
                              "32 heads, head dim 128, hidden 4096, 631 tokens = 35 + 576 visual + 20, R = 0.5");
  add_all();
  benchmark::RunSpecifiedBenchmarks();
  bench::Progress::get().wipe();
  benchmark::Shutdown();
  return 0;
}

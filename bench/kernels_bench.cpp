// What fastv's kernels cost at the shapes of LLaVA-1.5-7B, on one thread, with the data outside the
// cache, each beside the time that physics or a rival needs for the same in the same run:
//
//   of_limit     time one core needs to read (score) or memmove (compact) the same bytes / our time; 1 is perfect.
//                The fastest of bench::ways_of_reading counts
//   of_in_order  the same of reading them in order
//   of_fma       time of as many multiply-adds as the scores take, with nothing to load / our time
//   vs_rival     the rival's time / our time; above 1 we are faster. Rivals: Eigen doing the same product
//                and softmax (score), std::nth_element and std::sort on a copy (select)
//
// Times are medians, ratios are of lower quartiles. Results are compared with a slow oracle in double before anything
// is timed.
#include <benchmark/benchmark.h>

#include <Eigen/Core>
#include <cmath>
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
  std::vector<fastv::Index> kept(tokens), quotas(1);
  std::vector<std::uint32_t> marks(fastv::visual_tokens(images));
  const auto selected = fastv::select<float>(config, {}, images, tokens, kept, quotas, marks);
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

template <class T>
struct Attention {
  std::vector<T> query = random_tensor<T>(heads * dim, 2);
  std::vector<T> key;
  std::size_t kv_heads;
  fastv::KvLayout layout;

  Attention(std::size_t shared_heads, fastv::KvLayout key_layout)
      : key(random_tensor<T>(tokens * shared_heads * dim, 3)), kv_heads(shared_heads), layout(key_layout) {}

  fastv::QueryKey<T> evidence(const void* cached_key) const {
    return fastv::query_key(query.data(), heads, 1, static_cast<const T*>(cached_key), kv_heads, tokens, dim, scale(),
                            layout);
  }
  static float scale() { return 1.0f / std::sqrt(static_cast<float>(dim)); }
  std::size_t key_at(std::size_t token, std::size_t kv_head) const {
    return (layout == fastv::KvLayout::token_major ? token * kv_heads + kv_head : kv_head * tokens + token) * dim;
  }

  std::vector<double> oracle() const {
    std::vector<double> scores(visual), row(tokens);
    for (std::size_t head = 0; head < heads; ++head) {
      double most = -std::numeric_limits<double>::infinity(), sum = 0;
      for (std::size_t token = 0; token < tokens; ++token) {
        double product = 0;
        const T* k = key.data() + key_at(token, head * kv_heads / heads);
        for (std::size_t i = 0; i < dim; ++i)
          product +=
              static_cast<double>(fastv::to_float(query[head * dim + i])) * static_cast<double>(fastv::to_float(k[i]));
        row[token] = product * static_cast<double>(scale());
        most = std::max(most, row[token]);
      }
      for (double& logit : row) sum += logit = std::exp(logit - most);
      for (std::size_t i = 0; i < visual; ++i) scores[i] += row[text_before + i] / sum / static_cast<double>(heads);
    }
    return scores;
  }

  // The same by Eigen: product, softmax, mean. Half precision is widened head by head into `wide`, which is
  // several times faster here than Eigen's product of a cast expression.
  using Wide = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  Eigen::VectorXf by_eigen(const void* cached_key, Wide& wide) const {
    using Scalar = typename InEigen<T>::Type;
    using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    constexpr auto columns = static_cast<Eigen::Index>(dim);
    const auto rows = static_cast<Eigen::Index>(key.size() / (kv_heads * dim));
    const auto stride = static_cast<Eigen::Index>(key_at(1, 0));
    Eigen::VectorXf scores = Eigen::VectorXf::Zero(static_cast<Eigen::Index>(visual));
    Eigen::VectorXf logits(rows), q(columns);
    for (std::size_t head = 0; head < heads; ++head) {
      const auto* key_of_head = static_cast<const Scalar*>(cached_key) + key_at(0, head * kv_heads / heads);
      const Eigen::Map<const Matrix, 0, Eigen::OuterStride<>> k(key_of_head, rows, columns,
                                                                Eigen::OuterStride<>(stride));
      const auto* q_of_head = reinterpret_cast<const Scalar*>(query.data()) + head * dim;
      q = Eigen::Map<const Eigen::Matrix<Scalar, Eigen::Dynamic, 1>>(q_of_head, columns).template cast<float>();
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

template <class T>
void BM_ScoreQueryKey(benchmark::State& state, const std::string& name, std::size_t kv_heads, fastv::KvLayout layout) {
  const Attention<T> attention(kv_heads, layout);
  const std::vector<double> oracle = attention.oracle();
  const fastv::Config config = settings();
  std::vector<float> scores(visual), scratch(fastv::score_scratch(attention.evidence(attention.key.data())));
  Ring ring(attention.key);

  const auto score = [&] {
    return fastv::score<float>(config, attention.evidence(ring.next()), images, scores, scratch);
  };
  if (!score() || !agree(scores, oracle)) return state.SkipWithError("scores differ from the oracle");
  typename Attention<T>::Wide wide;
  const Eigen::VectorXf rival = attention.by_eigen(ring.next(), wide);
  if (!agree({rival.data(), rival.data() + rival.size()}, oracle))
    return state.SkipWithError("Eigen's scores differ from the oracle");

  std::vector<bench::Candidate> candidates = {
      {"", [&] { benchmark::DoNotOptimize(score()); }},
      {"of_in_order", [&] { benchmark::DoNotOptimize(bench::read_in_order(ring.next(), ring.bytes())); }},
      {"of_fma", [&] { benchmark::DoNotOptimize(bench::multiply_adds(heads * tokens * dim)); }},
      {"vs_rival", [&] { benchmark::DoNotOptimize(attention.by_eigen(ring.next(), wide)); }}};
  for (const bench::Reader read : bench::ways_of_reading)
    candidates.push_back({"of_limit", [&, read] { benchmark::DoNotOptimize(read(ring.next(), ring.bytes())); }});
  bench::compare(state, name.c_str(), candidates);
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(ring.bytes()));
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

void BM_Select(benchmark::State& state, const std::string& name, std::size_t n) {
  // Different scores in every round, or the processor learns their order by heart. They are spread like
  // attention is: exponentials of a normal variable.
  std::vector<std::vector<float>> sets(256);
  Noise noise(4);
  for (std::vector<float>& scores : sets) {
    scores.resize(n);
    for (float& score : scores) score = std::exp(noise() + noise() + noise()) / static_cast<float>(n);
  }
  std::size_t turn = 0;
  const auto next = [&]() -> const std::vector<float>& { return sets[turn++ % sets.size()]; };

  const fastv::Config config = settings();
  const fastv::TokenSpan span{0, n};
  std::vector<fastv::Index> kept(n + 1), quotas(1);
  std::vector<std::uint32_t> marks(n);
  const auto select = [&](const std::vector<float>& scores) {  // the last token asks the question
    return fastv::select<float>(config, {scores.data(), n}, {&span, 1}, n + 1, kept, quotas, marks);
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
fastv::Rows kv_cache(fastv::KvLayout layout) {
  return fastv::kv_rows(nullptr, tokens, heads, dim * sizeof(fastv::half), layout);
}

// ---- the whole step -----------------------------------------------------------------------------

// prune() from half-precision queries and keys, then hidden states and position ids compacted. The limit
// reads the keys and moves the hidden states in one piece.
void BM_PruneAndApply(benchmark::State& state, const std::string& name) {
  const Attention<fastv::half> attention(heads, fastv::KvLayout::token_major);
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
    return kept && fastv::compact(kept, rows) && fastv::compact(kept, fastv::Span<std::int32_t>(positions));
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
  using fastv::KvLayout;
  add("BM_ScoreProbabilities/float/last_row", 4000, BM_ScoreProbabilities, std::size_t{1});
  add("BM_ScoreProbabilities/float/all_rows", 40, BM_ScoreProbabilities, tokens);
  add("BM_ScoreQueryKey/float/token_major", 200, BM_ScoreQueryKey<float>, heads, KvLayout::token_major);
  add("BM_ScoreQueryKey/float/head_major", 200, BM_ScoreQueryKey<float>, heads, KvLayout::head_major);
  add("BM_ScoreQueryKey/half/token_major", 200, BM_ScoreQueryKey<fastv::half>, heads, KvLayout::token_major);
  add("BM_ScoreQueryKey/half/head_major", 200, BM_ScoreQueryKey<fastv::half>, heads, KvLayout::head_major);
  add("BM_ScoreQueryKey/half/token_major/8_kv_heads", 200, BM_ScoreQueryKey<fastv::half>, heads / 4,
      KvLayout::token_major);
  add("BM_ScoreQueryKey/bfloat16/token_major", 200, BM_ScoreQueryKey<fastv::bfloat16>, heads, KvLayout::token_major);
  add("BM_ScoreQueryKey/bfloat16/head_major", 200, BM_ScoreQueryKey<fastv::bfloat16>, heads, KvLayout::head_major);
  add("BM_Select/576", 4000, BM_Select, std::size_t{576});
  add("BM_Select/2880", 1000, BM_Select, std::size_t{2880});
  add("BM_Select/16384", 300, BM_Select, std::size_t{16384});
  add("BM_Compact/hidden/float", 200, BM_Compact, hidden_states(sizeof(float)));
  add("BM_Compact/hidden/half", 400, BM_Compact, hidden_states(sizeof(fastv::half)));
  add("BM_Compact/kv/half/token_major", 400, BM_Compact, kv_cache(KvLayout::token_major));
  add("BM_Compact/kv/half/head_major", 400, BM_Compact, kv_cache(KvLayout::head_major));
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

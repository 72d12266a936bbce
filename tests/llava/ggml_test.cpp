// fastv/ggml.hpp against the core: views of tensors, and pruning as nodes of a graph.
#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fastv/ggml.hpp>
#include <limits>
#include <numeric>
#include <vector>

#include "../oracle.hpp"

namespace {

using fastv::Config;
using fastv::Errc;
using fastv::Index;
using fastv::TokenSpan;

// A graph on the CPU: inputs are filled before it runs, any node can be read behind it.
class TestGraph {
 public:
  TestGraph()
      : context_(ggml_init({ggml_tensor_overhead() * 8192 + ggml_graph_overhead_custom(8192, false), nullptr, true})),
        graph_(ggml_new_graph_custom(context_.get(), 8192, false)),
        backend_(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr)) {}

  ggml_context* context() { return context_.get(); }

  template <class T>
  ggml_tensor* input(ggml_type type, const std::vector<std::int64_t>& shape, const std::vector<T>& data) {
    ggml_tensor* tensor = ggml_new_tensor(context(), type, static_cast<int>(shape.size()), shape.data());
    ggml_set_input(tensor);
    const auto* bytes = reinterpret_cast<const unsigned char*>(data.data());
    inputs_.push_back({tensor, {bytes, bytes + data.size() * sizeof(T)}});
    return tensor;
  }
  void run(std::vector<ggml_tensor*> outputs, const fastv::GraphPruner* pruner = nullptr) {
    for (ggml_tensor* output : outputs) {
      ggml_set_output(output);
      ggml_build_forward_expand(graph_, output);
    }
    allocator_.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend_.get())));
    ASSERT_TRUE(ggml_gallocr_alloc_graph(allocator_.get(), graph_));
    const auto set = [](ggml_tensor* tensor, const void* data, std::size_t bytes) {
      ASSERT_EQ(bytes, ggml_nbytes(tensor));
      if (tensor->buffer != nullptr) ggml_backend_tensor_set(tensor, data, 0, bytes);
    };
    for (const Input& in : inputs_) set(in.tensor, in.bytes.data(), in.bytes.size());
    if (pruner != nullptr) pruner->set_inputs(set);
    ASSERT_EQ(ggml_backend_graph_compute(backend_.get(), graph_), GGML_STATUS_SUCCESS);
  }
  template <class T>
  std::vector<T> read(const ggml_tensor* tensor) {
    std::vector<T> values(ggml_nbytes(tensor) / sizeof(T));
    ggml_backend_tensor_get(tensor, values.data(), 0, values.size() * sizeof(T));
    return values;
  }

 private:
  struct Input {
    ggml_tensor* tensor;
    std::vector<unsigned char> bytes;
  };
  ggml_context_ptr context_;
  ggml_cgraph* graph_;
  ggml_backend_ptr backend_;
  ggml_gallocr_ptr allocator_;
  std::vector<Input> inputs_;
};

// A tensor in host memory, for the views.
class HostTensors {
 public:
  HostTensors() : context_(ggml_init({1 << 22, nullptr, false})) {}
  ggml_tensor* make(ggml_type type, std::vector<std::int64_t> shape) {
    return ggml_new_tensor(context_.get(), type, static_cast<int>(shape.size()), shape.data());
  }
  ggml_tensor* make(ggml_type type, std::vector<std::int64_t> shape, const std::vector<float>& values) {
    ggml_tensor* tensor = make(type, std::move(shape));
    if (type == GGML_TYPE_F32)
      std::copy(values.begin(), values.end(), static_cast<float*>(tensor->data));
    else
      ggml_quantize_chunk(type, values.data(), tensor->data, 0, ggml_nrows(tensor), tensor->ne[0], nullptr);
    return tensor;
  }
  ggml_context* context() { return context_.get(); }

 private:
  ggml_context_ptr context_;
};

std::vector<float> uniform(std::size_t n, std::uint64_t seed) {
  oracle::Rng random(seed);
  std::vector<float> values(n);
  for (float& value : values) value = static_cast<float>(random.real(-1.7, 1.7));
  return values;
}

// Distinct scores, in a random order.
std::vector<float> distinct_scores(std::size_t n, std::uint64_t seed) {
  std::vector<float> scores(n);
  for (std::size_t i = 0; i < n; ++i) scores[i] = static_cast<float>(i + 1) / static_cast<float>(n);
  oracle::Rng random(seed);
  for (std::size_t i = n; i-- > 1;) std::swap(scores[i], scores[random.below(i + 1)]);
  return scores;
}

std::vector<Index> by_core(const Config& config, const std::vector<float>& all_scores,
                           const std::vector<TokenSpan>& visual, std::size_t tokens) {
  std::vector<float> scores;
  for (const TokenSpan& span : visual)
    scores.insert(scores.end(), all_scores.begin() + static_cast<std::ptrdiff_t>(span.first),
                  all_scores.begin() + static_cast<std::ptrdiff_t>(span.first + span.count));
  fastv::Pruner<float> pruner(config);
  const fastv::Kept kept = pruner.prune(fastv::Scores<float>{scores, tokens}, visual);
  EXPECT_TRUE(kept) << kept.message().c_str();
  return {kept.begin(), kept.end()};
}

std::vector<Index> by_graph(const Config& config, const std::vector<float>& scores,
                            const std::vector<TokenSpan>& visual, std::size_t tokens, bool exactly = false) {
  fastv::GraphPruner pruner(config);
  const auto plan = pruner.plan({tokens, 32, visual});
  EXPECT_TRUE(plan) << plan.message().c_str();
  if (!plan) return {};
  TestGraph graph;
  ggml_tensor* all = graph.input(GGML_TYPE_F32, {static_cast<std::int64_t>(tokens)}, scores);
  ggml_tensor* kept = exactly ? pruner.select_exactly(graph.context(), all) : pruner.select(graph.context(), all);
  EXPECT_EQ(kept->type, GGML_TYPE_I32);
  EXPECT_EQ(static_cast<std::size_t>(kept->ne[0]), plan->kept());
  graph.run({all, kept}, &pruner);
  EXPECT_TRUE(pruner.status()) << pruner.status().message().c_str();
  const std::vector<std::int32_t> indices = graph.read<std::int32_t>(kept);
  return {indices.begin(), indices.end()};
}

// ---- views --------------------------------------------------------------------------------------

TEST(GgmlRows, MoveTokensAlongEveryAxisAndOfEveryType) {
  const std::vector<Index> kept{0, 2, 3, 6};
  for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0}) {
    HostTensors host;
    // [dim, heads, tokens] and [dim, tokens, heads]; every element tells where it came from.
    for (const int axis : {1, 2}) {
      const std::int64_t dim = 64, heads = 3, tokens = 7;
      const std::int64_t middle = axis == 1 ? tokens : heads, outer = axis == 1 ? heads : tokens;
      ggml_tensor* tensor = host.make(type, {dim, middle, outer}, uniform(static_cast<std::size_t>(dim * 21), 5));
      std::vector<unsigned char> before(ggml_nbytes(tensor));
      std::memcpy(before.data(), tensor->data, before.size());
      const auto rows = fastv::token_rows(tensor, axis);
      ASSERT_TRUE(rows) << rows.message().c_str();
      ASSERT_TRUE(fastv::compact(kept, *rows));
      const std::size_t bytes = ggml_row_size(type, dim);
      for (std::size_t k = 0; k < kept.size(); ++k)
        for (std::size_t h = 0; h < 3; ++h) {
          const auto at = [&](std::size_t token) {
            return axis == 1 ? h * tensor->nb[2] + token * tensor->nb[1] : h * tensor->nb[1] + token * tensor->nb[2];
          };
          EXPECT_EQ(std::memcmp(static_cast<unsigned char*>(tensor->data) + at(k), before.data() + at(kept[k]), bytes),
                    0)
              << ggml_type_name(type) << " axis " << axis << " token " << k << " head " << h;
        }
    }
  }
  HostTensors host;
  ggml_tensor* positions = host.make(GGML_TYPE_I32, {7});
  for (int i = 0; i < 7; ++i) static_cast<std::int32_t*>(positions->data)[i] = 100 + i;
  ASSERT_TRUE(fastv::compact(kept, *fastv::token_rows(positions, 0)));
  for (std::size_t k = 0; k < kept.size(); ++k)
    EXPECT_EQ(static_cast<std::int32_t*>(positions->data)[k], 100 + static_cast<std::int32_t>(kept[k]));
}

TEST(GgmlRows, RefuseWhatCannotBeMoved) {
  HostTensors host;
  EXPECT_EQ(fastv::token_rows(nullptr, 1).code(), Errc::null_data);
  EXPECT_EQ(fastv::token_rows(host.make(GGML_TYPE_F32, {8, 8}), 3).code(), Errc::tensor_no_dim);
  EXPECT_EQ(fastv::token_rows(host.make(GGML_TYPE_F32, {8, 8}), -1).code(), Errc::tensor_no_dim);
  EXPECT_EQ(fastv::token_rows(host.make(GGML_TYPE_F32, {8, 2, 2, 2}), 1).code(), Errc::tensor_batch);
  EXPECT_EQ(fastv::token_rows(host.make(GGML_TYPE_Q8_0, {32, 4}), 0).code(), Errc::tensor_type);
  ggml_tensor* columns = ggml_transpose(host.context(), host.make(GGML_TYPE_F32, {8, 4}));
  EXPECT_EQ(fastv::token_rows(columns, 1).code(), Errc::overlapping_stride);
}

TEST(GgmlIndices, AreWrittenAsI32) {
  HostTensors host;
  fastv::Pruner<float> pruner;
  const std::vector<TokenSpan> visual{{4, 24}};
  const std::vector<float> scores = distinct_scores(24, 2);
  const fastv::Kept kept = pruner.prune(fastv::Scores<float>{scores, 40}, visual);
  ASSERT_TRUE(kept);
  ggml_tensor* indices = host.make(GGML_TYPE_I32, {static_cast<std::int64_t>(kept.size())});
  ASSERT_TRUE(fastv::write_indices(kept, indices));
  for (std::size_t i = 0; i < kept.size(); ++i)
    EXPECT_EQ(static_cast<std::int32_t*>(indices->data)[i], static_cast<std::int32_t>(kept.indices[i]));
  EXPECT_EQ(fastv::write_indices(kept, host.make(GGML_TYPE_I32, {5})).code, Errc::room_too_small);
  EXPECT_EQ(fastv::write_indices(kept, host.make(GGML_TYPE_F32, {28})).code, Errc::tensor_index_type);
  EXPECT_EQ(fastv::write_indices(kept, nullptr).code, Errc::null_data);
  EXPECT_EQ(fastv::write_indices(fastv::Kept{{}, 0, 0, {Errc::no_tokens}}, indices).code, Errc::no_tokens);
}

class GgmlEvidence : public testing::TestWithParam<ggml_type> {};

TEST_P(GgmlEvidence, QueryAndKeyAreReadByTheirStrides) {
  constexpr std::int64_t dim = 32, heads = 8, kv_heads = 2, keys = 40;
  const std::vector<TokenSpan> visual{{4, 24}};
  HostTensors host;
  ggml_tensor* q = host.make(GGML_TYPE_F32, {dim, heads, 1}, uniform(dim * heads, 1));
  const std::vector<float> key_values = uniform(dim * kv_heads * keys, 2);
  // As the cache has them, and as attention reads them.
  ggml_tensor* cache = host.make(GetParam(), {dim, kv_heads, keys}, key_values);
  std::vector<float> by_head;
  for (std::size_t h = 0; h < kv_heads; ++h)
    for (std::size_t t = 0; t < keys; ++t)
      for (std::size_t i = 0; i < dim; ++i) by_head.push_back(key_values[(t * kv_heads + h) * dim + i]);
  ggml_tensor* planes = ggml_permute(host.context(), host.make(GetParam(), {dim, keys, kv_heads}, by_head), 0, 2, 1, 3);

  Config config;
  config.filtering_ratio = 0.5;
  fastv::Pruner<float> a(config), b(config);
  const fastv::Kept first = fastv::prune(a, q, cache, 0.2f, visual);
  ASSERT_TRUE(first) << first.message().c_str();
  const fastv::Kept second = fastv::prune(b, q, planes, 0.2f, visual);
  ASSERT_TRUE(second) << second.message().c_str();
  EXPECT_TRUE(std::equal(first.begin(), first.end(), second.begin(), second.end()));

  // Against a plain softmax over the same values.
  std::vector<float> widened(key_values.size());
  if (GetParam() == GGML_TYPE_F32)
    widened = key_values;
  else
    ggml_get_type_traits(GetParam())->to_float(cache->data, widened.data(), static_cast<std::int64_t>(widened.size()));
  std::vector<double> scores(keys, 0);
  for (std::size_t h = 0; h < heads; ++h) {
    std::vector<double> p(keys);
    double sum = 0;
    for (std::size_t t = 0; t < keys; ++t) {
      double logit = 0;
      for (std::size_t i = 0; i < dim; ++i)
        logit += static_cast<double>(static_cast<float*>(q->data)[h * dim + i]) *
                 static_cast<double>(widened[(t * kv_heads + h / 4) * dim + i]);
      sum += p[t] = std::exp(0.2 * logit);
    }
    for (std::size_t t = 0; t < keys; ++t) scores[t] += p[t] / sum / heads;
  }
  for (std::size_t i = 0; i < 24; ++i) EXPECT_NEAR(static_cast<double>(a.scores()[i]), scores[4 + i], 1e-6);
}

INSTANTIATE_TEST_SUITE_P(Types, GgmlEvidence, testing::Values(GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16));

TEST(GgmlEvidence, RefusesWhatIsNotReadElementByElement) {
  HostTensors host;
  const std::vector<TokenSpan> visual{{4, 24}};
  fastv::Pruner<float> pruner;
  ggml_tensor* q = host.make(GGML_TYPE_F32, {32, 8, 1}, uniform(256, 1));
  const auto code = [&](ggml_tensor* query, ggml_tensor* key) {
    return fastv::prune(pruner, query, key, 0.2f, visual).code();
  };
  EXPECT_EQ(code(q, host.make(GGML_TYPE_Q8_0, {32, 2, 40})), Errc::tensor_type);
  EXPECT_EQ(code(q, nullptr), Errc::null_data);
  EXPECT_EQ(code(q, host.make(GGML_TYPE_F32, {16, 2, 40})), Errc::head_dims_differ);
  EXPECT_EQ(code(q, host.make(GGML_TYPE_F32, {32, 2, 40, 2})), Errc::tensor_batch);
  EXPECT_EQ(code(q, host.make(GGML_TYPE_F32, {32, 3, 40})), Errc::heads_not_divisible);
  ggml_tensor* odd = host.make(GGML_TYPE_F32, {32, 2, 40});
  odd->nb[2] += 2;
  EXPECT_EQ(code(q, odd), Errc::negative_stride);
}

// ---- scores in the graph ------------------------------------------------------------------------

TEST(GraphScores, AreTheCoresOnTheSameQueriesAndKeys) {
  for (const auto& [heads, kv_heads, rows, cap] :
       {std::tuple{4, 4, 1, 0.0f}, {8, 2, 3, 0.0f}, {6, 1, 1, 0.0f}, {8, 4, 2, 5.0f}}) {
    constexpr std::int64_t dim = 16, keys = 70;
    const std::vector<TokenSpan> visual{{3, 50}};
    const auto q_values = uniform(static_cast<std::size_t>(dim * heads * rows), 11);
    const auto k_values = uniform(static_cast<std::size_t>(dim * kv_heads * keys), 12);
    TestGraph graph;
    ggml_tensor* q = graph.input(GGML_TYPE_F32, {dim, heads, rows}, q_values);
    ggml_tensor* k = graph.input(GGML_TYPE_F32, {dim, kv_heads, keys}, k_values);
    ggml_tensor* scores = fastv::graph_scores(graph.context(), q, k, 0.25f, cap);
    graph.run({scores});
    const std::vector<float> found = graph.read<float>(scores);
    EXPECT_NEAR(std::accumulate(found.begin(), found.end(), 0.0), 1.0, 1e-5);

    auto evidence = fastv::query_key(q_values.data(), static_cast<std::size_t>(heads), static_cast<std::size_t>(rows),
                                     k_values.data(), static_cast<std::size_t>(kv_heads), keys, dim, 0.25f,
                                     fastv::KvLayout::token_major);
    evidence.soft_cap = cap;
    fastv::Pruner<float> pruner;
    ASSERT_TRUE(pruner.prune(evidence, visual));
    for (std::size_t i = 0; i < 50; ++i) EXPECT_NEAR(found[3 + i], pruner.scores()[i], 1e-6f) << heads << " " << i;
  }
}

// ---- selection in the graph ---------------------------------------------------------------------

TEST(GraphSelect, KeepsWhatTheCoreKeeps) {
  struct Case {
    const char* name;
    std::vector<TokenSpan> visual;
    std::size_t tokens;
    Config config;
  };
  std::vector<Case> cases;
  const auto add = [&](const char* name, std::vector<TokenSpan> visual, std::size_t tokens, auto change) {
    Config config;
    change(config);
    cases.push_back({name, std::move(visual), tokens, config});
  };
  for (const double r : {0.0, 0.25, 0.5, 0.9, 1.0}) {
    const auto ratio = [&](Config& c) { c.filtering_ratio = r; };
    add("one picture", {{5, 36, 6}}, 52, ratio);
    add("picture first", {{0, 24}}, 33, ratio);
    add("two pictures", {{5, 36, 6}, {44, 12, 4}}, 63, ratio);
    add("eight frames", {{4, 16}, {20, 16}, {36, 16}, {52, 16}, {68, 16}, {84, 16}, {100, 16}, {116, 16}}, 140, ratio);
    add("frames with text between", {{4, 16}, {22, 16}, {40, 16}}, 60, ratio);
    add("AnyRes rows", {{2, 6, 6}, {9, 6, 0, true}, {16, 6, 0, true}, {30, 10}}, 45, ratio);
  }
  for (std::size_t keep = 0; keep <= 36; ++keep)
    add("every count", {{5, 36, 6}}, 52, [&](Config& c) { c.keep_count = keep; });
  const std::vector<TokenSpan> two{{5, 36, 6}, {44, 20, 5}};
  add("pooled", two, 70, [](Config& c) { c.quota = fastv::Quota::pooled; });
  add("a count over two", two, 70, [](Config& c) { c.keep_count = 17; });
  add("a minimum each", two, 70, [](Config& c) { c.keep_count = 5, c.min_per_picture = 2; });
  for (const std::size_t window : {1u, 2u, 3u, 4u, 7u})
    add("windows", two, 70, [&](Config& c) { c.window_rows = c.window_columns = window, c.filtering_ratio = 0.7; });
  for (const double share : {0.1, 0.5, 1.0}) {
    add("a share on the grid", two, 70, [&](Config& c) { c.uniform_share = share; });
    add("grid and windows", two, 70,
        [&](Config& c) { c.uniform_share = share, c.window_rows = 3, c.window_columns = 2; });
  }
  add("random", two, 70, [](Config& c) { c.selection = fastv::Selection::random, c.seed = 9; });
  add("uniform", two, 70, [](Config& c) { c.selection = fastv::Selection::uniform; });
  add("random before the first layer", two, 70,
      [](Config& c) { c.selection = fastv::Selection::random, c.filtering_layer = 0; });
  add("no pictures", {}, 20, [](Config&) {});

  std::uint64_t seed = 1;
  for (const Case& c : cases) {
    const std::vector<float> scores = distinct_scores(c.tokens, seed++);
    const std::vector<Index> expected = by_core(c.config, scores, c.visual, c.tokens);
    EXPECT_EQ(by_graph(c.config, scores, c.visual, c.tokens), expected) << c.name;
    EXPECT_EQ(by_graph(c.config, scores, c.visual, c.tokens, true), expected) << c.name << ", exactly";
  }
}

TEST(GraphSelect, RandomShapes) {
  oracle::Rng random(77);
  for (int round = 0; round < 60; ++round) {
    std::vector<TokenSpan> visual;
    std::size_t position = random.below(4);
    for (std::size_t s = 1 + random.below(5); s-- > 0;) {
      const std::size_t columns = 1 + random.below(6), rows = 1 + random.below(6);
      visual.push_back({position, rows * columns, columns});
      position += rows * columns + random.below(3);
    }
    const std::size_t tokens = position + 1 + random.below(5);
    Config config;
    config.filtering_ratio = static_cast<double>(random.below(101)) / 100;
    config.uniform_share = random.below(2) == 0 ? 0 : 0.3;
    if (random.below(2) == 0) config.window_rows = config.window_columns = 1 + random.below(4);
    config.min_per_picture = random.below(3);
    const std::vector<float> scores = distinct_scores(tokens, static_cast<std::uint64_t>(round) + 500);
    EXPECT_EQ(by_graph(config, scores, visual, tokens), by_core(config, scores, visual, tokens)) << round;
  }
}

TEST(GraphSelect, ExactlyHasTheCoresRuleForTiesAndNaN) {
  const std::vector<TokenSpan> visual{{2, 12}};
  std::vector<float> scores(20, 0.5f);
  scores[4] = 0.75f;
  scores[6] = scores[2] = std::numeric_limits<float>::quiet_NaN();
  Config config;
  config.keep_count = 5;
  EXPECT_EQ(by_graph(config, scores, visual, 20, true), by_core(config, scores, visual, 20));
}

TEST(GraphSelect, ReportsScoresThatCannotBeRanked) {
  const std::vector<TokenSpan> visual{{2, 12}};
  fastv::GraphPruner pruner;
  ASSERT_TRUE(pruner.plan({20, 32, visual}));
  TestGraph graph;
  ggml_tensor* scores =
      graph.input(GGML_TYPE_F32, {20}, std::vector<float>(20, std::numeric_limits<float>::quiet_NaN()));
  ggml_tensor* kept = pruner.select_exactly(graph.context(), scores);
  graph.run({kept}, &pruner);
  EXPECT_EQ(pruner.status().code, Errc::all_scores_nan);
  const std::vector<std::int32_t> indices = graph.read<std::int32_t>(kept);
  for (std::size_t i = 0; i < indices.size(); ++i) EXPECT_EQ(indices[i], static_cast<std::int32_t>(i));
}

TEST(GraphSelect, RefusesSettingsThatHaveNoFormInAGraph) {
  const std::vector<TokenSpan> visual{{2, 12}};
  const auto code = [&](auto change, std::size_t layers = 32) {
    Config config;
    change(config);
    return fastv::GraphPruner(config).plan({20, layers, visual}).code();
  };
  const std::vector<Index> prior{14};
  EXPECT_EQ(code([](Config& c) { c.score_rows = fastv::ScoreRows::all; }), Errc::not_in_graph);
  EXPECT_EQ(code([&](Config& c) { c.prior_rows = prior; }), Errc::not_in_graph);
  EXPECT_EQ(code([](Config& c) { c.window_rows = c.window_columns = 2; }), Errc::window_needs_columns);
  EXPECT_EQ(code([](Config& c) { c.filtering_ratio = 1.5; }), Errc::ratio_out_of_range);
  EXPECT_EQ(code([](Config&) {}, 2), Errc::filtering_layer_past_end);
  EXPECT_EQ(fastv::GraphPruner().plan({(std::size_t{1} << 24) + 1, 32, visual}).code(), Errc::too_many_tokens);
}

TEST(GraphGather, HiddenRowsAndEveryAxisOfThePositions) {
  constexpr std::int64_t width = 6, n = 9, axes = 4;
  const std::vector<float> hidden_values = uniform(width * n, 3);
  std::vector<std::int32_t> position_values(axes * n);
  std::iota(position_values.begin(), position_values.end(), 1000);
  const std::vector<std::int32_t> kept_values{0, 3, 4, 8};
  TestGraph graph;
  ggml_tensor* hidden = graph.input(GGML_TYPE_F32, {width, n}, hidden_values);
  ggml_tensor* positions = graph.input(GGML_TYPE_I32, {axes * n}, position_values);
  ggml_tensor* kept = graph.input(GGML_TYPE_I32, {4}, kept_values);
  ggml_tensor* rows = fastv::graph_gather(graph.context(), hidden, kept);
  ggml_tensor* ids = fastv::graph_gather_positions(graph.context(), positions, axes, kept);
  graph.run({rows, ids});
  const std::vector<float> found = graph.read<float>(rows);
  const std::vector<std::int32_t> found_ids = graph.read<std::int32_t>(ids);
  for (std::size_t k = 0; k < 4; ++k) {
    const auto row = static_cast<std::size_t>(kept_values[k]);
    for (std::size_t i = 0; i < width; ++i) EXPECT_EQ(found[k * width + i], hidden_values[row * width + i]);
    for (std::size_t axis = 0; axis < axes; ++axis) EXPECT_EQ(found_ids[axis * 4 + k], position_values[axis * n + row]);
  }
}

}  // namespace

// fastv/ggml.hpp against the core: views of tensors, and pruning as nodes of a graph.
#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fastv/ggml.hpp>
#include <filesystem>
#include <functional>
#include <limits>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "../oracle.hpp"
#include "../sentences.hpp"

namespace {

using fastv::Config;
using fastv::Errc;
using fastv::Index;
using fastv::Quota;
using fastv::RatioOf;
using fastv::Selection;
using fastv::Span;
using fastv::Status;
using fastv::TokenSpan;

// A graph on the CPU: inputs are filled before it runs, any node can be read behind it.
class TestGraph {
 public:
  TestGraph()
      : context_(ggml_init({ggml_tensor_overhead() * size + ggml_graph_overhead_custom(size, false), nullptr, true})),
        graph_(ggml_new_graph_custom(context_.get(), size, false)) {}

  ggml_context* context() { return context_.get(); }

  template <class T>
  ggml_tensor* input(ggml_type type, const std::vector<std::int64_t>& shape, const std::vector<T>& data) {
    ggml_tensor* tensor = ggml_new_tensor(context(), type, static_cast<int>(shape.size()), shape.data());
    ggml_set_input(tensor);
    const auto* bytes = reinterpret_cast<const unsigned char*>(data.data());
    inputs_.push_back({tensor, {bytes, bytes + data.size() * sizeof(T)}});
    return tensor;
  }
  ggml_tensor* list(const std::vector<float>& values) {
    return input(GGML_TYPE_F32, {static_cast<std::int64_t>(values.size())}, values);
  }
  void run(const std::vector<ggml_tensor*>& outputs, const fastv::graph::Pruner* pruner = nullptr) {
    for (ggml_tensor* output : outputs) {
      ggml_set_output(output);
      ggml_build_forward_expand(graph_, output);
    }
    allocator_.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend())));
    ASSERT_TRUE(ggml_gallocr_alloc_graph(allocator_.get(), graph_));
    again(pruner);
  }
  // The same graph once more: its inputs may have been overwritten.
  void again(const fastv::graph::Pruner* pruner = nullptr) {
    const auto set = [](ggml_tensor* tensor, const void* data, std::size_t bytes) {
      ASSERT_EQ(bytes, ggml_nbytes(tensor));
      if (tensor->buffer != nullptr) ggml_backend_tensor_set(tensor, data, 0, bytes);
    };
    for (const Input& in : inputs_) set(in.tensor, in.bytes.data(), in.bytes.size());
    if (pruner != nullptr) {
      const Status status = pruner->set_inputs(set);
      ASSERT_TRUE(status) << status.message().c_str();
    }
    ASSERT_EQ(ggml_backend_graph_compute(backend(), graph_), GGML_STATUS_SUCCESS);
  }
  template <class T>
  std::vector<T> read(const ggml_tensor* tensor) {
    std::vector<T> values(ggml_nbytes(tensor) / sizeof(T));
    ggml_backend_tensor_get(tensor, values.data(), 0, values.size() * sizeof(T));
    return values;
  }
  std::vector<Index> read_indices(const ggml_tensor* tensor) {
    const std::vector<std::int32_t> values = read<std::int32_t>(tensor);
    return {values.begin(), values.end()};
  }
  // Memory of the tensors made so far, in tensors.
  std::size_t tensors() const { return ggml_used_mem(context_.get()) / ggml_tensor_overhead(); }

 private:
  static constexpr std::size_t size = 4096;
  static ggml_backend_t backend() {
    static const ggml_backend_ptr cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, "threads=1"));
    return cpu.get();
  }
  struct Input {
    ggml_tensor* tensor;
    std::vector<unsigned char> bytes;
  };
  ggml_context_ptr context_;
  ggml_cgraph* graph_;
  ggml_gallocr_ptr allocator_;
  std::vector<Input> inputs_;
};

// A tensor in host memory, for the views.
class HostTensors {
 public:
  HostTensors() : context_(ggml_init({1 << 24, nullptr, false})) {}
  ggml_tensor* make(ggml_type type, std::vector<std::int64_t> shape) {
    ggml_tensor* tensor = ggml_new_tensor(context_.get(), type, static_cast<int>(shape.size()), shape.data());
    std::memset(tensor->data, 0, ggml_nbytes(tensor));
    return tensor;
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

// What a contiguous tensor holds, by ggml's own conversion.
std::vector<float> widened(const ggml_tensor* tensor) {
  std::vector<float> values(static_cast<std::size_t>(ggml_nelements(tensor)));
  if (tensor->type == GGML_TYPE_F32)
    std::memcpy(values.data(), tensor->data, values.size() * sizeof(float));
  else
    ggml_get_type_traits(tensor->type)->to_float(tensor->data, values.data(), ggml_nelements(tensor));
  return values;
}

std::vector<float> uniform(std::size_t n, std::uint64_t seed) {
  oracle::Rng random(seed);
  std::vector<float> values(n);
  for (float& value : values) value = static_cast<float>(random.real(-1.7, 1.7));
  return values;
}

// [tokens, heads, dim] -> [heads, tokens, dim]
std::vector<float> by_head(const std::vector<float>& values, std::size_t heads, std::size_t dim) {
  std::vector<float> out;
  const std::size_t tokens = values.size() / heads / dim;
  for (std::size_t h = 0; h < heads; ++h)
    for (std::size_t t = 0; t < tokens; ++t)
      for (std::size_t i = 0; i < dim; ++i) out.push_back(values[(t * heads + h) * dim + i]);
  return out;
}

// The sentences that tests have raised so far.
std::set<std::string>& raised() {
  static std::set<std::string> all;
  return all;
}
bool says(const Status& status, Errc code, const char* words) {
  if (status.sentence != nullptr) raised().insert(status.sentence);
  const bool right = status.code == code && std::strstr(status.message().c_str(), words) != nullptr;
  if (!right) ADD_FAILURE() << "'" << status.message().c_str() << "' has another code, or not the words: " << words;
  return right;
}

// ---- views --------------------------------------------------------------------------------------

const ggml_type all_types[] = {GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0,
                               GGML_TYPE_Q4_0, GGML_TYPE_Q5_1, GGML_TYPE_Q4_K, GGML_TYPE_IQ4_NL};

TEST(GgmlRows, MoveTokensAlongEveryAxisAndOfEveryType) {
  const std::vector<Index> kept{0, 2, 3, 6};
  for (const ggml_type type : all_types) {
    HostTensors host;
    // [dim, heads, tokens] and [dim, tokens, heads]; every element tells where it came from.
    for (const int axis : {1, 2}) {
      const std::int64_t dim = 256, heads = 3, tokens = 7;
      const std::int64_t middle = axis == 1 ? tokens : heads, outer = axis == 1 ? heads : tokens;
      const std::vector<float> values = uniform(static_cast<std::size_t>(dim * 21), 5);
      ggml_tensor* tensor = host.make(type, {dim, middle, outer}, values);
      ggml_tensor* source = host.make(type, {dim, middle, outer}, values);
      ggml_tensor* copy = host.make(type, {dim, axis == 1 ? 4 : heads, axis == 1 ? heads : 4});
      ASSERT_TRUE(fastv::compact(kept, tensor, axis));
      ASSERT_TRUE(fastv::gather(kept, source, copy, axis));
      const std::size_t bytes = ggml_row_size(type, dim);
      const auto row = [&](const ggml_tensor* t, std::size_t head, std::size_t token) {
        const std::size_t at = axis == 1 ? head * t->nb[2] + token * t->nb[1] : head * t->nb[1] + token * t->nb[2];
        return static_cast<const unsigned char*>(t->data) + at;
      };
      for (std::size_t k = 0; k < kept.size(); ++k)
        for (std::size_t h = 0; h < 3; ++h) {
          EXPECT_EQ(std::memcmp(row(tensor, h, k), row(source, h, kept[k]), bytes), 0) << ggml_type_name(type) << axis;
          EXPECT_EQ(std::memcmp(row(copy, h, k), row(source, h, kept[k]), bytes), 0) << ggml_type_name(type) << axis;
        }
    }
  }
  HostTensors host;
  ggml_tensor* positions = host.make(GGML_TYPE_I32, {7, 2});  // two planes
  auto* ids = static_cast<std::int32_t*>(positions->data);
  std::iota(ids, ids + 14, 100);
  ASSERT_TRUE(fastv::compact(kept, positions, 0));
  for (std::size_t k = 0; k < kept.size(); ++k)
    for (const std::size_t plane : {0u, 7u})
      EXPECT_EQ(ids[plane + k], 100 + static_cast<std::int32_t>(plane + kept[k])) << plane;
}

void rows_that_cannot_be_moved() {
  HostTensors host;
  const auto refuses = [&](ggml_tensor* tensor, int axis, Errc code, const char* words) {
    says(fastv::rows(tensor, axis).status, code, words);
    says(fastv::compact(std::vector<Index>{0}, tensor, axis), code, words);
  };
  refuses(nullptr, 1, Errc::null_data, "the tensor is null");
  refuses(host.make(GGML_TYPE_F32, {8, 8}), 3, Errc::bad_shape, "axis 3");
  refuses(host.make(GGML_TYPE_F32, {8, 8}), -1, Errc::bad_shape, "axis -1");
  refuses(host.make(GGML_TYPE_F32, {8, 2, 2, 2}), 1, Errc::bad_shape, "ne[3] of the tensor is 2");
  refuses(host.make(GGML_TYPE_F32, {8, 2, 2}), 0, Errc::bad_shape, "ne[2] = 2");
  refuses(host.make(GGML_TYPE_Q8_0, {32, 4}), 0, Errc::not_supported, "of type q8_0, whose blocks");
  refuses(ggml_transpose(host.context(), host.make(GGML_TYPE_F32, {8, 4})), 1, Errc::bad_stride,
          "32 bytes apart but must be side by side, 4");
  ggml_tensor* empty = host.make(GGML_TYPE_F32, {8, 4});
  empty->data = nullptr;
  refuses(empty, 1, Errc::null_data, "the tensor is null");
  ggml_tensor* whole = host.make(GGML_TYPE_F32, {8, 4});
  says(fastv::gather(std::vector<Index>{0}, nullptr, whole, 1), Errc::null_data, "null");
  says(fastv::gather(std::vector<Index>{0}, whole, nullptr, 1), Errc::null_data, "null");
  // What prune() returned knows how many rows there must be.
  says(fastv::compact(fastv::KeptRows(Span<const Index>(), 5), whole, 1), Errc::bad_shape, "5");
}
TEST(GgmlRows, RefuseWhatCannotBeMoved) { rows_that_cannot_be_moved(); }

void memory_that_is_not_the_hosts() {
  // The buffers of repacked weights are not, though they are on the CPU.
  ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  const auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
      ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts"));
  ggml_backend_buffer_type_t* types = extra == nullptr ? nullptr : extra(cpu);
  while (types != nullptr && *types != nullptr && ggml_backend_buft_is_host(*types)) ++types;
  if (types == nullptr || *types == nullptr) GTEST_SKIP() << "this ggml has host memory alone";
  ggml_context_ptr context(ggml_init({8 * ggml_tensor_overhead(), nullptr, true}));
  ggml_tensor* there = ggml_new_tensor_3d(context.get(), GGML_TYPE_F32, 32, 2, 40);
  ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), *types));
  ggml_tensor* view = ggml_view_3d(context.get(), there, 32, 2, 20, there->nb[1], there->nb[2], 0);
  ASSERT_EQ(view->buffer, nullptr);  // it is its source's
  for (ggml_tensor* tensor : {there, view}) {
    says(fastv::rows(tensor, 2).status, Errc::not_supported, "the tensor is not in host memory");
    says(fastv::heads(tensor).status, Errc::not_supported, "the tensor is not in host memory");
    HostTensors host;
    ggml_tensor* q = host.make(GGML_TYPE_F32, {32, 8, 1}, uniform(256, 1));
    says(fastv::query_key(q, tensor, 0.2f).check(), Errc::not_supported, "key is not in host memory");
    says(fastv::write_indices(std::vector<Index>{0}, tensor), Errc::not_supported, "indices is not in host memory");
  }
}
TEST(GgmlRows, RefuseMemoryThatIsNotTheHosts) { memory_that_is_not_the_hosts(); }

void indices_as_i32() {
  HostTensors host;
  fastv::Pruner<float> pruner;
  const std::vector<TokenSpan> visual{{4, 24}};
  const std::vector<float> scores = uniform(24, 2);
  const fastv::Kept kept = pruner.prune(fastv::Scores<float>{scores, 40}, visual);
  ASSERT_TRUE(kept);
  ggml_tensor* indices = host.make(GGML_TYPE_I32, {static_cast<std::int64_t>(kept.size())});
  ASSERT_TRUE(fastv::write_indices(kept, indices));
  for (std::size_t i = 0; i < kept.size(); ++i)
    EXPECT_EQ(static_cast<std::int32_t*>(indices->data)[i], static_cast<std::int32_t>(kept.indices[i]));
  says(fastv::write_indices(kept, host.make(GGML_TYPE_I32, {5})), Errc::bad_shape, "5 entries but 28 tokens stay");
  says(fastv::write_indices(kept, host.make(GGML_TYPE_F32, {28})), Errc::not_supported, "of type f32");
  ggml_tensor* gaps = ggml_view_2d(host.context(), host.make(GGML_TYPE_I32, {2, 28}), 1, 28, 8, 0);
  says(fastv::write_indices(kept, gaps), Errc::not_supported, "has gaps");
  says(fastv::write_indices(kept, nullptr), Errc::null_data, "indices is null");
  says(fastv::write_indices(std::vector<Index>{2, 1}, host.make(GGML_TYPE_I32, {2})), Errc::bad_index, "ascending");
  const fastv::Kept failed = pruner.prune(fastv::Scores<float>{scores, 3}, visual);
  says(fastv::write_indices(failed, indices), failed.code(), "");
}
TEST(GgmlIndices, AreWrittenAsI32) { indices_as_i32(); }

TEST(GgmlHeads, AreReadAsGgmlWidensThem) {
  constexpr std::size_t dim = 256, heads = 2, tokens = 9;
  for (const ggml_type type : all_types) {
    HostTensors host;
    ggml_tensor* cache = host.make(type, {dim, heads, tokens}, uniform(dim * heads * tokens, 7));
    // [dim, heads, 5] out of the middle of the cache: its strides are not those of its shape.
    ggml_tensor* view =
        ggml_view_3d(host.context(), cache, dim, heads, 5, cache->nb[1], cache->nb[2], 3 * cache->nb[2]);
    const std::vector<float> expected = widened(cache);
    const auto vectors = fastv::heads(view);
    ASSERT_TRUE(vectors) << vectors.message().c_str();
    ASSERT_EQ(vectors->heads, heads);
    ASSERT_EQ(vectors->tokens, 5u);
    ASSERT_EQ(vectors->dim, dim);
    std::vector<float> found(dim);
    for (std::size_t t = 0; t < 5; ++t)
      for (std::size_t h = 0; h < heads; ++h) {
        vectors->load(h, t, found.data());
        EXPECT_EQ(std::memcmp(found.data(), &expected[((3 + t) * heads + h) * dim], dim * sizeof(float)), 0)
            << ggml_type_name(type) << " " << t << " " << h;
      }
    // For what takes vectors of any kind.
    const std::vector<TokenSpan> visual{{1, 6}};
    std::vector<float> norms(heads * 6);
    ASSERT_TRUE(fastv::value_norms(*fastv::heads(cache), visual, norms));
    double sum = 0;
    for (std::size_t i = 0; i < dim; ++i) sum += std::pow(static_cast<double>(expected[(2 * heads + 1) * dim + i]), 2);
    EXPECT_NEAR(norms[6 + 1], std::sqrt(sum), 1e-4);  // head 1, token 2
    fastv::Pruner<float> pruner;
    EXPECT_TRUE(pruner.prune(fastv::KeysOnly{*fastv::heads(cache)}, visual));
  }
}

// Evidence of tensors, on a cache of every kind.
class GgmlEvidence : public testing::TestWithParam<ggml_type> {};

constexpr std::int64_t e_dim = 32, e_heads = 8, e_kv = 2, e_keys = 40, e_rows = 3;

TEST_P(GgmlEvidence, IsThatOfTheSameValues) {
  const std::vector<TokenSpan> visual{{4, 24}};
  HostTensors host;
  ggml_tensor* q = host.make(GGML_TYPE_F32, {e_dim, e_heads, e_rows}, uniform(e_dim * e_heads * e_rows, 1));
  const std::vector<float> key_values = uniform(e_dim * e_kv * e_keys, 2);
  // As the cache has them, and as attention reads them.
  ggml_tensor* cache = host.make(GetParam(), {e_dim, e_kv, e_keys}, key_values);
  ggml_tensor* planes = ggml_permute(
      host.context(), host.make(GetParam(), {e_dim, e_keys, e_kv}, by_head(key_values, e_kv, e_dim)), 0, 2, 1, 3);
  const std::vector<float> wide = widened(cache), queries = widened(q);

  // By a plain softmax, of the last row.
  oracle::Attention plain;
  plain.heads = e_heads, plain.kv_heads = e_kv, plain.keys = e_keys, plain.dim = e_dim, plain.scale = 0.2f;
  for (std::size_t i = (e_rows - 1) * e_heads * e_dim; i < queries.size(); ++i)
    plain.query.push_back(static_cast<double>(queries[i]));
  for (const float x : by_head(wide, e_kv, e_dim)) plain.key.push_back(static_cast<double>(x));
  const auto expected = oracle::mean_scores(oracle::probabilities(plain), e_heads, 1, e_keys, {e_keys - 1}, visual);
  for (ggml_tensor* k : {cache, planes}) {
    fastv::Pruner<float> pruner;
    const fastv::Kept kept = pruner.prune(fastv::query_key(q, k, 0.2f), visual);
    ASSERT_TRUE(kept) << kept.message().c_str();
    EXPECT_EQ(kept.prompt_tokens, static_cast<std::size_t>(e_keys));
    for (std::size_t i = 0; i < 24; ++i) EXPECT_NEAR(static_cast<double>(pruner.scores()[i]), expected[i], 1e-6);
  }

  // With every setting, against the core on the widened values. Each changes the scores.
  auto tensors = fastv::query_key(q, cache, 0.2f);
  auto values = fastv::query_key(fastv::heads(queries.data(), fastv::TokenMajor{e_rows, e_heads, e_dim}),
                                 fastv::heads(wide.data(), fastv::TokenMajor{e_keys, e_kv, e_dim}), 0.2f);
  const auto agree = [&](const char* what, const auto& change) {
    auto a = tensors;
    auto b = values;
    change(a);
    change(b);
    const std::vector<TokenSpan> few{{2, 20}};
    std::vector<float> first(20), second(20), before(20);
    std::vector<float> scratch(
        std::max({fastv::score_scratch(a), fastv::score_scratch(b), fastv::score_scratch(tensors)}));
    // By the last two rows, of which one does not see every key.
    const auto score = [&](const auto& evidence, std::vector<float>& out) {
      const auto last = static_cast<Index>(evidence.prompt_tokens() - 1);
      const std::vector<Index> rows{last, last - 1};
      Config config;
      config.score_rows = fastv::ScoreRows::listed;
      config.listed_rows = rows;
      const Status status = fastv::score<float>(config, evidence, few, out, scratch);
      EXPECT_TRUE(status) << what << ": " << status.message().c_str();
    };
    score(a, first);
    score(b, second);
    score(tensors, before);
    double moved = 0;
    for (std::size_t i = 0; i < 20; ++i) {
      EXPECT_NEAR(first[i], second[i], 1e-6f) << what << " " << i;
      moved += std::abs(static_cast<double>(first[i] - before[i]));
    }
    EXPECT_GT(moved, 1e-5) << what << " changes nothing";
  };
  const std::vector<float> bias = uniform(e_keys, 5), sinks(e_heads, 1.0f), slopes(e_heads, 0.1f),
                           norms(e_kv * 20, 2.0f);
  const std::vector<Index> visible(e_rows, 15);
  agree("scale", [](auto& e) { e.scale = 0.4f; });
  agree("soft_cap", [](auto& e) { e.soft_cap = 0.5f; });
  agree("bias", [&](auto& e) { e.bias = bias; });
  agree("sinks", [&](auto& e) { e.sinks = sinks; });
  agree("alibi", [&](auto& e) { e.alibi = slopes; });
  agree("visible", [&](auto& e) { e.visible = visible; });
  agree("window", [&](auto& e) { e.window = 30; });
  agree("past", [&](auto& e) { e.past = 10; });
  agree("first_key", [&](auto& e) { e.first_key = 8; });
  agree("heads_total", [&](auto& e) { e.heads_total = 16; });
  agree("value_norms", [&](auto& e) { e.value_norms = norms; });
  agree("causal", [&](auto& e) { e.causal = false; });
  tensors.heads_total = 16;  // scores are partial sums
  EXPECT_EQ(fastv::Pruner<>().prune(tensors, visual).code(), Errc::missing_evidence);
}

INSTANTIATE_TEST_SUITE_P(Types, GgmlEvidence,
                         testing::Values(GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,
                                         GGML_TYPE_IQ4_NL),
                         [](const auto& type) { return std::string(ggml_type_name(type.param)); });

TEST(GgmlEvidence, QueriesMayBeHalves) {
  const std::vector<TokenSpan> visual{{4, 24}};
  HostTensors host;
  ggml_tensor* k = host.make(GGML_TYPE_F16, {32, 2, 40}, uniform(32 * 2 * 40, 2));
  for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_BF16}) {
    ggml_tensor* q = host.make(type, {32, 8, 1}, uniform(256, 1));
    ggml_tensor* wide = host.make(GGML_TYPE_F32, {32, 8, 1}, widened(q));
    fastv::Pruner<float> a, b;
    ASSERT_TRUE(a.prune(fastv::query_key(q, k, 0.2f), visual));
    ASSERT_TRUE(b.prune(fastv::query_key(wide, k, 0.2f), visual));
    for (std::size_t i = 0; i < 24; ++i) EXPECT_EQ(a.scores()[i], b.scores()[i]);
  }
}

void wrong_evidence() {
  HostTensors host;
  const std::vector<TokenSpan> visual{{4, 24}};
  fastv::Pruner<float> pruner;
  ggml_tensor* q = host.make(GGML_TYPE_F32, {32, 8, 1}, uniform(256, 1));
  ggml_tensor* k = host.make(GGML_TYPE_F32, {32, 2, 40});
  const auto refuses = [&](ggml_tensor* query, ggml_tensor* key, Errc code, const char* words) {
    says(pruner.prune(fastv::query_key(query, key, 0.2f), visual).status, code, words);
  };
  refuses(nullptr, k, Errc::null_data, "query is null");
  refuses(q, nullptr, Errc::null_data, "key is null");
  refuses(q, host.make(GGML_TYPE_I32, {32, 2, 40}), Errc::not_supported, "key is of type i32");
  refuses(host.make(GGML_TYPE_Q8_0, {32, 8, 1}), k, Errc::not_supported, "query is of type q8_0: cast it to F32");
  refuses(q, host.make(GGML_TYPE_F32, {16, 2, 40}), Errc::bad_shape, "query is 32 but that of key is 16");
  refuses(q, host.make(GGML_TYPE_F32, {32, 2, 40, 2}), Errc::bad_shape, "ne[3] of key is 2");
  refuses(q, host.make(GGML_TYPE_F32, {32, 3, 40}), Errc::bad_shape, "3 KV heads");
  refuses(q, host.make(GGML_TYPE_Q8_0, {32, 3, 40}), Errc::bad_shape, "3 KV heads");
  ggml_tensor* odd = host.make(GGML_TYPE_F32, {32, 2, 40});
  odd->nb[2] += 2;
  refuses(q, odd, Errc::bad_stride, "nb[2] of key is 258, which is no multiple of the 4 bytes");
  ggml_tensor* apart = ggml_permute(host.context(), host.make(GGML_TYPE_F32, {2, 32, 40}), 1, 0, 2, 3);
  refuses(q, apart, Errc::bad_stride, "of key are 8 bytes apart but must be side by side, 4");
  ggml_tensor* folded = host.make(GGML_TYPE_Q8_0, {32, 2, 40});
  folded->nb[2] = folded->nb[1];
  refuses(q, folded, Errc::bad_stride, "they would overlap");
  says(pruner.prune(fastv::query_key(q, k, -1), visual).status, Errc::bad_setting, "scale is -1");
  says(fastv::heads(nullptr).status, Errc::null_data, "the tensor is null");
  says(fastv::heads(host.make(GGML_TYPE_I32, {32, 2, 40})).status, Errc::not_supported, "of type i32");
  EXPECT_EQ(fastv::query_key(nullptr, nullptr, 1).prompt_tokens(), 0u);
  EXPECT_EQ(fastv::query_key(nullptr, nullptr, 1).scratch_floats(), 0u);
  auto behind = fastv::query_key(q, k, 0.2f);
  behind.past = 50;
  EXPECT_EQ(behind.prompt_tokens(), 0u);
}
TEST(GgmlEvidence, SaysWhatIsWrong) { wrong_evidence(); }

// ---- scores in the graph ------------------------------------------------------------------------

TEST(GraphScores, AreTheCoresOnTheSameQueriesAndKeys) {
  struct Case {
    int heads, kv_heads, rows;
    float cap;
    ggml_type type;
    bool sinks;
    double tolerance;
  };
  for (const Case& c : {Case{4, 4, 1, 0, GGML_TYPE_F32, false, 1e-6}, Case{8, 2, 3, 0, GGML_TYPE_F32, false, 1e-6},
                        Case{6, 1, 1, 0, GGML_TYPE_F32, false, 1e-6}, Case{8, 4, 2, 5, GGML_TYPE_F32, false, 1e-6},
                        Case{8, 4, 2, 0, GGML_TYPE_F32, true, 1e-6},
                        // The CPU rounds the query to F16, or quantises it.
                        Case{8, 2, 3, 0, GGML_TYPE_F16, false, 1e-4}, Case{8, 2, 1, 0, GGML_TYPE_Q8_0, false, 1e-3}}) {
    constexpr std::int64_t dim = 32, keys = 70;
    const std::vector<TokenSpan> visual{{3, 50}};
    const auto q_values = uniform(static_cast<std::size_t>(dim * c.heads * c.rows), 11);
    HostTensors host;
    ggml_tensor* host_q = host.make(GGML_TYPE_F32, {dim, c.heads, c.rows}, q_values);
    ggml_tensor* host_k =
        host.make(c.type, {dim, c.kv_heads, keys}, uniform(static_cast<std::size_t>(dim * c.kv_heads * keys), 12));
    const auto* bytes = static_cast<const unsigned char*>(host_k->data);
    const std::vector<float> sink_values(static_cast<std::size_t>(c.heads), 2.0f);

    TestGraph graph;
    ggml_tensor* q = graph.input(GGML_TYPE_F32, {dim, c.heads, c.rows}, q_values);
    ggml_tensor* k =
        graph.input(c.type, {dim, c.kv_heads, keys}, std::vector<unsigned char>(bytes, bytes + ggml_nbytes(host_k)));
    ggml_tensor* sinks = c.sinks ? graph.list(sink_values) : nullptr;
    const auto scores = fastv::graph::scores(graph.context(), q, k, 0.25f, c.cap, sinks);
    ASSERT_TRUE(scores) << scores.message().c_str();
    const ggml_tensor* node = *scores;
    while (node->op != GGML_OP_MUL_MAT) node = node->src[0];
    EXPECT_EQ(node->op_params[0], GGML_PREC_F32);  // the CPU sums so in any case
    graph.run({*scores});
    const std::vector<float> found = graph.read<float>(*scores);
    const double sum = std::accumulate(found.begin(), found.end(), 0.0);
    EXPECT_NEAR(sum, 1.0, c.sinks ? 0.99 : 1e-5);

    auto evidence = fastv::query_key(host_q, host_k, 0.25f);
    evidence.soft_cap = c.cap;
    if (c.sinks) evidence.sinks = sink_values;
    fastv::Pruner<float> pruner;
    ASSERT_TRUE(pruner.prune(evidence, visual));
    for (std::size_t i = 0; i < 50; ++i)
      EXPECT_NEAR(found[3 + i], pruner.scores()[i], c.tolerance) << ggml_type_name(c.type) << " " << i;
  }
}

TEST(GraphScores, KeysOfEarlierTurnsAreAttendedToButAreNoCandidates) {
  constexpr std::int64_t dim = 16, past = 13, n = 40, room = 64;  // a cache with cells that nobody has written
  const std::vector<TokenSpan> visual{{3, 30}};
  const auto q_values = uniform(dim * 4, 1);
  auto k_values = uniform(dim * 2 * room, 2);
  std::fill(k_values.begin() + dim * 2 * (past + n), k_values.end(), std::numeric_limits<float>::quiet_NaN());
  const std::size_t turns[] = {past};
  HostTensors host;
  ggml_tensor* cache = host.make(GGML_TYPE_F32, {dim, 2, room}, k_values);
  auto evidence =
      fastv::query_key(host.make(GGML_TYPE_F32, {dim, 4, 1}, q_values),
                       ggml_view_3d(host.context(), cache, dim, 2, past + n, cache->nb[1], cache->nb[2], 0), 0.25f);
  evidence.past = past;
  fastv::Pruner<float> host_pruner;
  const fastv::Kept expected = host_pruner.prune(evidence, visual);
  ASSERT_TRUE(expected) << expected.message().c_str();
  ASSERT_EQ(expected.prompt_tokens, static_cast<std::size_t>(n));

  // On the keys in use; and on the whole cache with zeros in the cells that are free, as a mask hides them.
  for (const bool masked : {false, true}) {
    TestGraph graph;
    ggml_tensor* q = graph.input(GGML_TYPE_F32, {dim, 4, 1}, q_values);
    std::vector<float> cells = k_values;
    for (float& x : cells) x = std::isnan(x) ? 0 : x;
    ggml_tensor* k = graph.input(GGML_TYPE_F32, {dim, 2, room}, cells);
    ggml_tensor* mask = nullptr;
    if (masked) {
      std::vector<ggml_fp16_t> hidden(room * 2, ggml_fp32_to_fp16(-INFINITY));  // a second row that is not asked for
      std::fill_n(hidden.begin(), past + n, ggml_fp32_to_fp16(0));
      mask = graph.input(GGML_TYPE_F16, {room, 2}, hidden);
    } else {
      k = ggml_view_3d(graph.context(), k, dim, 2, past + n, k->nb[1], k->nb[2], 0);
    }
    fastv::graph::Pruner pruner;
    const auto plan = pruner.begin({n, 32, visual, turns});
    ASSERT_TRUE(plan) << plan.message().c_str();
    EXPECT_EQ(plan->kv_length(0), static_cast<std::size_t>(past + n));
    const auto scores = fastv::graph::scores(graph.context(), q, k, 0.25f, 0, nullptr, mask);
    const auto kept = pruner.select(graph.context(), scores);
    ASSERT_TRUE(kept) << kept.message().c_str();
    graph.run({*kept, *scores}, &pruner);
    const std::vector<Index> found = graph.read_indices(*kept);
    EXPECT_EQ(found, std::vector<Index>(expected.begin(), expected.end())) << masked;
    const std::vector<float> all = graph.read<float>(*scores);
    for (std::size_t i = 0; i < 30; ++i) EXPECT_NEAR(all[past + 3 + i], host_pruner.scores()[i], 1e-6f);
  }
}

void wrong_attention() {
  TestGraph graph;
  ggml_context* ctx = graph.context();
  const auto make = [&](ggml_type type, std::vector<std::int64_t> shape) {
    return ggml_new_tensor(ctx, type, static_cast<int>(shape.size()), shape.data());
  };
  ggml_tensor* q = make(GGML_TYPE_F32, {32, 8, 2});
  ggml_tensor* k = make(GGML_TYPE_F16, {32, 2, 40});
  const auto refuses = [&](ggml_tensor* query, ggml_tensor* key, Errc code, const char* words) {
    const auto scores = fastv::graph::scores(ctx, query, key, 0.2f);
    EXPECT_EQ(*scores, nullptr);
    says(scores.status, code, words);
  };
  refuses(nullptr, k, Errc::null_data, "query is null");
  refuses(q, nullptr, Errc::null_data, "key is null");
  refuses(make(GGML_TYPE_F16, {32, 8, 2}), k, Errc::not_supported, "query is of type f16: cast it to F32");
  refuses(q, make(GGML_TYPE_I32, {32, 2, 40}), Errc::not_supported, "key is of type i32");
  refuses(q, make(GGML_TYPE_F16, {16, 2, 40}), Errc::bad_shape, "query is 32 but that of key is 16");
  refuses(q, make(GGML_TYPE_F16, {32, 3, 40}), Errc::bad_shape, "query has 8 heads, which key's 3 KV heads");
  refuses(q, make(GGML_TYPE_F16, {32, 2, 0}), Errc::bad_shape, "the attention has 0 keys");
  refuses(q, make(GGML_TYPE_F16, {32, 2, 40, 2}), Errc::bad_shape, "ne[3] of key is 2");
  refuses(q, ggml_permute(ctx, make(GGML_TYPE_F16, {2, 32, 40}), 1, 0, 2, 3), Errc::bad_stride, "of key are 4 bytes");
  says(fastv::graph::scores(nullptr, q, k, 0.2f).status, Errc::null_data, "context");
  says(fastv::graph::scores(ctx, q, k, 0).status, Errc::bad_setting, "scale is 0");
  says(fastv::graph::scores(ctx, q, k, 0.2f, -1).status, Errc::bad_setting, "soft_cap is -1");
  says(fastv::graph::scores(ctx, q, k, 0.2f, 0, make(GGML_TYPE_F32, {7})).status, Errc::bad_shape,
       "7 entries of type f32");
  says(fastv::graph::scores(ctx, q, k, 0.2f, 0, make(GGML_TYPE_F16, {8})).status, Errc::bad_shape,
       "8 entries of type f16");
  says(fastv::graph::scores(ctx, q, k, 0.2f, 0, nullptr, make(GGML_TYPE_I32, {40, 2})).status, Errc::not_supported,
       "mask is of type i32");
  says(fastv::graph::scores(ctx, q, k, 0.2f, 0, nullptr, make(GGML_TYPE_F32, {40, 1})).status, Errc::bad_shape,
       "[40, 1] but the query has 2 rows over 40 keys");
  // A failure goes through select().
  fastv::graph::Pruner pruner;
  ASSERT_TRUE(pruner.begin({40, 32, std::vector<TokenSpan>{{2, 12}}}));
  says(pruner.select(ctx, fastv::graph::scores(ctx, nullptr, k, 1)).status, Errc::null_data, "query is null");
  EXPECT_EQ(pruner.stage(), 0u);
}
TEST(GraphScores, SayWhatIsWrong) { wrong_attention(); }

// ---- selection in the graph ---------------------------------------------------------------------

// Scores of each kind, one per token of the prompt.
using Maker = std::function<std::vector<float>(std::size_t n, oracle::Rng& random)>;
struct ScoreKind {
  const char* name;
  Maker make;
};
Maker each(const std::function<float(std::size_t i, std::size_t n, oracle::Rng& random)>& score) {
  return [score](std::size_t n, oracle::Rng& random) {
    std::vector<float> scores(n);
    for (std::size_t i = 0; i < n; ++i) scores[i] = score(i, n, random);
    for (std::size_t i = n; i-- > 1;) std::swap(scores[i], scores[random.below(i + 1)]);
    return scores;
  };
}
const float nan = oracle::nan_float(), least = std::numeric_limits<float>::denorm_min(),
            most = std::numeric_limits<float>::max();
const std::vector<ScoreKind> kinds = {
    {"distinct",
     each([](std::size_t i, std::size_t n, auto&) { return static_cast<float>(i + 1) / static_cast<float>(n); })},
    {"seven values", each([](std::size_t, std::size_t, auto& r) { return static_cast<float>(r.below(7)) / 7; })},
    {"all equal", each([](std::size_t, std::size_t, auto&) { return 0.25f; })},
    {"5% NaN",
     each([](std::size_t, std::size_t, auto& r) { return r.chance(0.05) ? nan : static_cast<float>(r.below(40)); })},
    {"mostly NaN", each([](std::size_t i, std::size_t, auto&) {
       return i % 9 == 0 ? static_cast<float>(i % 2) : i % 2 == 0 ? nan : -nan;
     })},
    {"zeros of both signs", each([](std::size_t i, std::size_t, auto& r) {
       return i % 10 == 0 ? static_cast<float>(r.real()) : i % 2 == 0 ? 0.0f : -0.0f;
     })},
    {"denormals", each([](std::size_t i, std::size_t, auto& r) {
       return static_cast<float>(i % 3 == 0 ? 0 : r.below(50)) * least;
     })},
    {"neighbours", each([](std::size_t, std::size_t, auto& r) {
       return oracle::float_of_bits(0x3f800000u + static_cast<std::uint32_t>(r.below(30)));
     })},
    {"negative", each([](std::size_t, std::size_t, auto& r) { return -1 - static_cast<float>(r.below(60)); })},
    {"every magnitude", each([](std::size_t i, std::size_t, auto& r) {
       const float ends[] = {most, -most, 0, least, -least, 1e-30f, -1e30f, nan};
       return i % 2 == 0 ? ends[r.below(8)]
                         : static_cast<float>(std::ldexp(r.real(-1, 1), static_cast<int>(r.below(250)) - 125));
     })},
};

std::vector<float> at_visual(const std::vector<float>& scores, const std::vector<TokenSpan>& visual) {
  std::vector<float> out;
  for (const TokenSpan& span : visual)
    out.insert(out.end(), scores.begin() + static_cast<std::ptrdiff_t>(span.first),
               scores.begin() + static_cast<std::ptrdiff_t>(span.first + span.count));
  return out;
}

struct Outcome {
  std::vector<Index> kept;  // positions in the prompt, behind the last stage
  Status status;            // of the first stage that failed
  std::vector<std::size_t> nan_scores, zero_scores;
};

// By a Pruner per stage. scores: of every stage, one per token of the prompt.
Outcome by_core(const std::vector<Config>& schedule, const std::vector<std::vector<float>>& scores,
                std::vector<TokenSpan> visual, std::size_t tokens) {
  Outcome out;
  out.kept.resize(tokens);
  std::iota(out.kept.begin(), out.kept.end(), Index{0});
  for (std::size_t s = 0; s < schedule.size(); ++s) {
    std::vector<float> now;
    for (const Index token : out.kept) now.push_back(scores[s][token]);
    fastv::Pruner<float> pruner(schedule[s]);
    const fastv::Kept kept = pruner.prune(fastv::Scores<float>{at_visual(now, visual), out.kept.size()}, visual);
    out.status = kept.status;
    if (!kept) return out;
    out.nan_scores.push_back(kept.nan_scores);
    out.zero_scores.push_back(kept.zero_scores);
    const auto left = fastv::next_spans(kept, std::vector<TokenSpan>(visual), visual);
    EXPECT_TRUE(left) << left.message().c_str();
    visual.resize(*left);
    std::vector<Index> shorter;
    for (const Index index : kept) shorter.push_back(out.kept[index]);
    out.kept = shorter;
  }
  return out;
}

// By one graph.
Outcome by_graph(const std::vector<Config>& schedule, const std::vector<std::vector<float>>& scores,
                 const std::vector<TokenSpan>& visual, std::size_t tokens) {
  Outcome out;
  fastv::graph::Pruner pruner{Span<const Config>(schedule)};
  const auto plan = pruner.begin({tokens, 32, visual});
  out.status = plan.status;
  if (!plan) return out;
  TestGraph graph;
  ggml_context* ctx = graph.context();
  std::vector<std::int32_t> all(tokens);
  std::iota(all.begin(), all.end(), 0);
  ggml_tensor* alive = graph.input(GGML_TYPE_I32, {1, static_cast<std::int64_t>(tokens)}, all);
  std::vector<ggml_tensor*> outputs, counts;
  for (std::size_t s = 0; s < schedule.size(); ++s) {
    ggml_tensor* whole = graph.input(GGML_TYPE_F32, {1, static_cast<std::int64_t>(tokens)}, scores[s]);
    outputs.push_back(whole);
    const std::int64_t n = alive->ne[1];
    EXPECT_EQ(static_cast<std::size_t>(n), plan->tokens_in_group(s));
    ggml_tensor* own = ggml_reshape_1d(ctx, ggml_get_rows(ctx, whole, ggml_reshape_1d(ctx, alive, n)), n);
    const std::size_t before = graph.tensors();
    EXPECT_TRUE(pruner.due(schedule[s].filtering_layer));
    const auto kept = pruner.select(ctx, own);
    EXPECT_TRUE(kept) << kept.message().c_str();
    if (!kept) return out;
    EXPECT_EQ((*kept)->type, GGML_TYPE_I32);
    EXPECT_EQ(static_cast<std::size_t>(ggml_nelements(*kept)), plan->tokens_in_group(s + 1));
    counts.push_back(nullptr);
    if (const auto of_scores = pruner.counts(ctx)) outputs.push_back(counts.back() = *of_scores);
    EXPECT_LE(graph.tensors() - before, pruner.nodes());
    alive = ggml_get_rows(ctx, alive, *kept);
  }
  EXPECT_FALSE(pruner.due(schedule.back().filtering_layer));
  outputs.push_back(alive);
  graph.run(outputs, &pruner);
  out.kept = graph.read_indices(alive);
  graph.again(&pruner);
  EXPECT_EQ(graph.read_indices(alive), out.kept) << "in the second run of the graph";
  for (std::size_t s = 0; s < schedule.size(); ++s) {
    if (counts[s] == nullptr) {
      out.nan_scores.push_back(0);
      out.zero_scores.push_back(0);
      continue;
    }
    const auto selected = pruner.selected(graph.read<float>(counts[s]), s);
    if (!selected && out.status) out.status = selected.status;
    out.nan_scores.push_back(selected->nan_scores);
    out.zero_scores.push_back(selected->zero_scores);
    EXPECT_EQ(selected->count, selected ? plan->tokens_in_group(s + 1) : 0);
  }
  return out;
}

void expect_same(const std::vector<Config>& schedule, const std::vector<std::vector<float>>& scores,
                 const std::vector<TokenSpan>& visual, std::size_t tokens, const std::string& what) {
  const Outcome core = by_core(schedule, scores, visual, tokens), graph = by_graph(schedule, scores, visual, tokens);
  EXPECT_EQ(graph.status.code, core.status.code)
      << what << ": " << graph.status.message().c_str() << " | " << core.status.message().c_str();
  if (!core.status) return;  // the graph goes on, and says the same when it is asked
  EXPECT_EQ(graph.kept, core.kept) << what;
  EXPECT_EQ(graph.nan_scores, core.nan_scores) << what;
  EXPECT_EQ(graph.zero_scores, core.zero_scores) << what;
}

TEST(GraphSelect, KeepsWhatTheCoreKeepsWhateverTheScores) {
  for (const std::size_t n : {144u, 576u, 2880u})
    for (const ScoreKind& kind : kinds)
      for (const int percent : {25, 50, 75, 90, 99}) {
        oracle::Rng random(n + static_cast<std::size_t>(percent));
        Config config;
        config.filtering_ratio = percent / 100.0;
        expect_same({config}, {kind.make(n + 55, random)}, {{35, n, 12}}, n + 55,
                    std::string(kind.name) + ", n = " + std::to_string(n) + ", R = " + std::to_string(percent));
      }
}

struct Layout {
  const char* name;
  std::vector<TokenSpan> visual;
  std::size_t tokens;
};
const std::vector<Layout> layouts = {
    {"one image", {{5, 36, 6}}, 52},
    {"image first", {{0, 24, 6}}, 33},
    {"two images of different sizes", {{5, 36, 6}, {44, 20, 5}}, 70},
    {"sizes from 1 to 200", {{3, 200, 20}, {204, 1, 1}, {205, 64, 8}, {270, 9, 3}, {280, 33, 11}, {320, 2, 2}}, 330},
    {"eight frames",
     {{4, 16, 4}, {20, 16, 4}, {36, 16, 4}, {52, 16, 4}, {68, 16, 4}, {84, 16, 4}, {100, 16, 4}, {116, 16, 4}},
     140},
    {"frames with text between", {{4, 16, 4}, {22, 16, 4}, {40, 16, 4}}, 60},
    {"AnyRes rows", {{2, 6, 6}, {9, 6, 0, true}, {16, 6, 0, true}, {30, 10, 5}}, 45},
    {"nothing but the last token is text", {{0, 49, 7}}, 50},
};
struct Setting {
  const char* name;
  std::function<void(Config&)> change;
};
const std::vector<Setting> settings = {
    {"plain", [](Config&) {}},
    {"keep none", [](Config& c) { c.filtering_ratio = 1; }},
    {"keep all", [](Config& c) { c.filtering_ratio = 0; }},
    {"a count", [](Config& c) { c.keep_count = 17; }},
    {"a count of one", [](Config& c) { c.keep_count = 1; }},
    {"rounded up", [](Config& c) { c.rounding = fastv::Rounding::up, c.filtering_ratio = 0.83; }},
    {"a minimum each", [](Config& c) { c.min_per_image = 5, c.filtering_ratio = 0.9; }},
    {"pooled", [](Config& c) { c.quota = Quota::pooled; }},
    {"pooled with a minimum", [](Config& c) { c.quota = Quota::pooled, c.min_per_image = 4, c.filtering_ratio = 0.8; }},
    {"pooled with a large minimum", [](Config& c) { c.quota = Quota::pooled, c.min_per_image = 12; }},
    {"pooled, a minimum that the count cannot meet",
     [](Config& c) { c.quota = Quota::pooled, c.min_per_image = 30, c.keep_count = 7; }},
    {"pooled with a grid", [](Config& c) { c.quota = Quota::pooled, c.uniform_share = 0.4; }},
    {"pooled with a grid and a minimum",
     [](Config& c) { c.quota = Quota::pooled, c.uniform_share = 0.4, c.min_per_image = 3; }},
    {"pooled, the grid takes all the minima leave",
     [](Config& c) { c.quota = Quota::pooled, c.uniform_share = 1, c.min_per_image = 1; }},
    {"a tenth on a grid", [](Config& c) { c.uniform_share = 0.1; }},
    {"all on a grid", [](Config& c) { c.uniform_share = 1; }},
    {"windows of 1", [](Config& c) { c.window_rows = c.window_columns = 1; }},
    {"windows of 2 x 3", [](Config& c) { c.window_rows = 2, c.window_columns = 3, c.filtering_ratio = 0.7; }},
    {"windows of 4", [](Config& c) { c.window_rows = c.window_columns = 4, c.filtering_ratio = 0.6; }},
    {"windows larger than the image", [](Config& c) { c.window_rows = c.window_columns = 50; }},
    {"windows and a grid", [](Config& c) { c.window_rows = 3, c.window_columns = 2, c.uniform_share = 0.5; }},
    {"random", [](Config& c) { c.selection = Selection::random, c.seed = 9; }},
    {"random before the first layer", [](Config& c) { c.selection = Selection::random, c.filtering_layer = 0; }},
    {"uniform", [](Config& c) { c.selection = Selection::uniform; }},
    {"uniform, pooled with a minimum",
     [](Config& c) { c.selection = Selection::uniform, c.quota = Quota::pooled, c.min_per_image = 2; }},
};

TEST(GraphSelect, EveryRuleOnEveryLayout) {
  oracle::Rng random(3);
  for (const Layout& layout : layouts)
    for (const Setting& setting : settings)
      for (const std::size_t kind : {0u, 1u, 4u}) {
        Config config;
        setting.change(config);
        std::size_t total = 0;
        for (const TokenSpan& span : layout.visual) total += span.count;
        if (config.keep_count != fastv::by_ratio) config.keep_count = std::min(config.keep_count, total);
        expect_same({config}, {kinds[kind].make(layout.tokens, random)}, layout.visual, layout.tokens,
                    std::string(layout.name) + ", " + setting.name + ", " + kinds[kind].name);
      }
}

TEST(GraphSelect, EveryCount) {
  oracle::Rng random(8);
  for (std::size_t keep = 0; keep <= 36; ++keep) {
    Config config;
    config.keep_count = keep;
    for (const ScoreKind& kind : kinds)
      expect_same({config}, {kind.make(52, random)}, {{5, 36, 6}}, 52, kind.name + std::to_string(keep));
  }
}

TEST(GraphSelect, RatiosOfTheirOwnAndImagesThatAreEmpty) {
  oracle::Rng random(4);
  std::vector<TokenSpan> visual{{2, 40, 8}, {45, 0, 0, false, 30}, {50, 20, 5}, {75, 9, 0, false, 36}};
  visual[0].filtering_ratio = 0.9;
  visual[2].filtering_ratio = 0.1;
  for (const RatioOf of : {RatioOf::remaining, RatioOf::original}) {
    Config config;
    config.ratio_of = of;
    expect_same({config}, {kinds[1].make(90, random)}, visual, 90, "ratios of their own");
  }
  expect_same({Config{}}, {kinds[1].make(20, random)}, {}, 20, "no images");
  // A pool of one image leaves one image, which may have a minimum.
  std::vector<Config> pools(2);
  for (Config& config : pools) config.quota = Quota::pooled, config.min_per_image = 3, config.keep_count = 9;
  pools[0].filtering_layer = 1, pools[1].keep_count = 4;
  expect_same(pools, {kinds[1].make(40, random), kinds[1].make(40, random)}, {{5, 30}}, 40, "pools of one image");
  expect_same({Config{}}, {kinds[1].make(20, random)}, {{3, 0, 0, false, 12}}, 20, "an image of which nothing is left");
}

TEST(GraphSelect, StagesInOneGraphFindTheirTokensInTheShorterSequence) {
  oracle::Rng random(5);
  const auto stage = [](std::size_t layer, const std::function<void(Config&)>& change) {
    Config config;
    config.filtering_layer = layer;
    change(config);
    return config;
  };
  const auto pooled = [](Config& c) { c.quota = Quota::pooled; };
  const std::vector<std::pair<const char*, std::vector<Config>>> schedules = {
      {"two of half", {stage(2, [](Config&) {}), stage(4, [](Config&) {})}},
      {"three",
       {stage(1, [](Config& c) { c.filtering_ratio = 0.3; }), stage(2, [](Config&) {}),
        stage(5, [](Config& c) { c.filtering_ratio = 0.6; })}},
      {"of the original",
       {stage(2, [](Config& c) { c.filtering_ratio = 0.3; }),
        stage(3, [](Config& c) { c.ratio_of = RatioOf::original, c.filtering_ratio = 0.8; })}},
      {"windows first",
       {stage(2, [](Config& c) { c.window_rows = c.window_columns = 2; }),
        stage(4, [](Config& c) { c.uniform_share = 0.3; })}},
      {"all of it, then half", {stage(2, [](Config& c) { c.filtering_ratio = 0; }), stage(4, [](Config&) {})}},
      {"half, then none of it", {stage(2, [](Config&) {}), stage(4, [](Config& c) { c.filtering_ratio = 1; })}},
      {"none of it, then none", {stage(2, [](Config& c) { c.filtering_ratio = 1; }), stage(4, [](Config&) {})}},
      {"pooled twice", {stage(2, pooled), stage(4, pooled)}},
      {"pooled thrice, with grids",
       {stage(2, pooled), stage(4, [&](Config& c) { pooled(c), c.uniform_share = 0.5; }),
        stage(5, [&](Config& c) { pooled(c), c.keep_count = 4; })}},
      {"pooled with a minimum, then pooled",
       {stage(2, [&](Config& c) { pooled(c), c.min_per_image = 3; }), stage(4, pooled)}},
      {"per image, then pooled",
       {stage(2, [](Config&) {}), stage(4, [&](Config& c) { pooled(c), c.min_per_image = 2; })}},
      {"uniform, then by scores",
       {stage(0, [](Config& c) { c.selection = Selection::uniform; }), stage(4, [](Config&) {})}},
      {"by scores, then random",
       {stage(2, [](Config&) {}), stage(4, [](Config& c) { c.selection = Selection::random, c.seed = 4; })}},
      {"by scores, then uniform, then by scores",
       {stage(2, [](Config&) {}), stage(4, [](Config& c) { c.selection = Selection::uniform; }),
        stage(6, [](Config&) {})}},
  };
  for (const Layout& layout : layouts)
    for (const auto& [name, schedule] : schedules)
      for (const std::size_t kind : {0u, 1u, 3u}) {
        std::vector<std::vector<float>> scores;
        for (std::size_t s = 0; s < schedule.size(); ++s) scores.push_back(kinds[kind].make(layout.tokens, random));
        const std::string what = std::string(layout.name) + ", " + name + ", " + kinds[kind].name;
        expect_same(schedule, scores, layout.visual, layout.tokens, what);
      }
}

TEST(GraphSelect, RandomSettings) {
  oracle::Rng random(77);
  std::size_t compared = 0;
  for (int round = 0; round < 500; ++round) {
    std::vector<TokenSpan> visual;
    std::size_t position = random.below(4), total = 0;
    for (std::size_t s = 1 + random.below(6); s-- > 0;) {
      const std::size_t columns = 1 + random.below(9), rows = 1 + random.below(9);
      visual.push_back({position, rows * columns, columns});
      if (random.chance(0.1)) visual.back().original = rows * columns + random.below(20);
      if (random.chance(0.1)) visual.back().filtering_ratio = random.real();
      total += rows * columns;
      position += rows * columns + random.below(3);
    }
    const std::size_t tokens = position + 1 + random.below(5);
    std::vector<Config> schedule(1 + random.below(3));
    for (std::size_t s = 0; s < schedule.size(); ++s) {
      Config& config = schedule[s];
      config.filtering_layer = 1 + 2 * s + random.below(2);
      config.filtering_ratio = static_cast<double>(random.below(101)) / 100;
      if (random.chance(0.3)) config.uniform_share = random.real();
      if (s == 0 && random.chance(0.3))
        config.window_rows = 1 + random.below(5), config.window_columns = 1 + random.below(5);
      if (random.chance(0.3)) config.quota = Quota::pooled;
      if (random.chance(0.3)) config.min_per_image = random.below(9);
      if (random.chance(0.2)) config.keep_count = random.below(total + 1);
      if (random.chance(0.2)) config.ratio_of = RatioOf::original;
      if (random.chance(0.1)) config.selection = Selection::random;
      config.seed = random.next();
    }
    std::vector<std::vector<float>> scores;
    for (std::size_t s = 0; s < schedule.size(); ++s)
      scores.push_back(kinds[random.below(kinds.size())].make(tokens, random));
    if (!fastv::make_plan(schedule, {tokens, 32, visual})) continue;
    if (const auto plan = fastv::graph::Pruner(Span<const Config>(schedule)).begin({tokens, 32, visual}); !plan) {
      says(plan.status, Errc::not_supported, "behind a stage that pools the images");
      continue;
    }
    expect_same(schedule, scores, visual, tokens, "round " + std::to_string(round));
    ++compared;
  }
  EXPECT_GT(compared, 200u);
}

TEST(GraphSelect, InfinitiesCountAsTheGreatestNumbers) {
  const float inf = oracle::infinity();
  std::vector<float> scores(20, 0.5f), finite = scores;
  scores[3] = scores[9] = inf, finite[3] = finite[9] = most;
  scores[5] = finite[5] = most;  // equal to both
  scores[6] = -inf, finite[6] = -most;
  scores[7] = finite[7] = nan;  // below even that
  for (std::size_t keep = 0; keep <= 12; ++keep)
    for (const std::size_t minimum : {0u, 1u}) {
      Config config;
      config.keep_count = keep;
      config.quota = Quota::pooled;
      config.min_per_image = minimum;
      const std::vector<TokenSpan> visual{{2, 4}, {6, 8}};
      const Outcome graph = by_graph({config}, {scores}, visual, 20);
      EXPECT_EQ(graph.kept, by_core({config}, {finite}, visual, 20).kept) << keep;
      says(graph.status, Errc::bad_value, "3 of 12 visual scores are infinite");
      EXPECT_EQ(by_core({config}, {scores}, visual, 20).status.code, Errc::bad_value);
    }
}

TEST(GraphSelect, GoesOnWhereTheCoreFailsAndTells) {
  const std::vector<TokenSpan> visual{{2, 12}, {15, 4}};
  for (const float score : {nan, 0.0f}) {
    const Outcome graph = by_graph({Config{}}, {std::vector<float>(20, score)}, visual, 20);
    says(graph.status, Errc::bad_value,
         std::isnan(score) ? "all 16 visual scores are NaN" : "all 16 visual scores are 0");
    says(by_core({Config{}}, {std::vector<float>(20, score)}, visual, 20).status, Errc::bad_value,
         graph.status.message().c_str());
    EXPECT_EQ(graph.kept, (std::vector<Index>{0, 1, 2, 3, 4, 5, 6, 7, 14, 15, 16, 19}));
  }
}

// Zeros in some of the groups that compete, of every rule on every layout and in every stage of a schedule.
TEST(GraphSelect, TellsWhereAGroupIsRankedByZerosAlone) {
  oracle::Rng random(12);
  std::size_t refused = 0, ranked = 0;
  for (const Layout& layout : layouts)
    for (const Setting& setting : settings)
      for (int draw = 0; draw < 4; ++draw) {
        Config config;
        setting.change(config);
        std::size_t total = 0;
        for (const TokenSpan& span : layout.visual) total += span.count;
        if (config.keep_count != fastv::by_ratio) config.keep_count = std::min(config.keep_count, total);
        std::vector<Config> schedule{config};
        if (config.window_rows == 0 && config.quota == Quota::per_image && draw % 2 == 1) {
          schedule.push_back(Config{});
          schedule[1].filtering_layer = 5;
        }
        std::vector<std::vector<float>> scores;
        for (std::size_t s = 0; s < schedule.size(); ++s) {
          scores.emplace_back(layout.tokens);
          const double share = draw == 0 ? 0.02 : draw == 1 ? 0.6 : 0.2;
          for (const TokenSpan& span : layout.visual) {
            const bool seen = random.chance(0.5);
            for (std::size_t t = span.first; t < span.first + span.count; ++t)
              scores[s][t] = seen && random.chance(share)
                                 ? random.chance(0.1) ? nan : static_cast<float>(1 + random.below(3))
                                 : -0.0f;
          }
        }
        const bool fails = !by_core(schedule, scores, layout.visual, layout.tokens).status;
        (fails ? refused : ranked) += 1;
        expect_same(schedule, scores, layout.visual, layout.tokens,
                    std::string(layout.name) + ", " + setting.name + ", draw " + std::to_string(draw));
      }
  EXPECT_GT(refused, 100u);
  EXPECT_GT(ranked, 100u);
  // What it says, where one image of two has no score but 0.
  std::vector<float> scores(20);
  for (std::size_t t = 2; t < 14; ++t) scores[t] = static_cast<float>(t);
  says(by_graph({Config{}}, {scores}, {{2, 12}, {15, 4}}, 20).status, Errc::bad_value,
       "all scores are 0 in 1 groups of visual tokens (images, windows or pools), so that nothing ranks these: does "
       "layer 1 see them");
  says(by_core({Config{}}, {scores}, {{2, 12}, {15, 4}}, 20).status, Errc::bad_value, "2 of 4 tokens in image 1");
}

TEST(GraphSelect, TakesScoresOfKeysOrOfTokens) {
  // Keys of two earlier turns, and cells behind the prompt's that are not written yet.
  oracle::Rng random(6);
  const std::vector<float> own = kinds[0].make(20, random);
  std::vector<float> longer(27, nan);
  std::copy(own.begin(), own.end(), longer.begin() + 5);
  const std::vector<TokenSpan> visual{{2, 12}};
  const std::size_t past[] = {5};
  const std::vector<Index> expected = by_core({Config{}}, {own}, visual, 20).kept;
  for (const std::vector<float>& scores : {own, longer, std::vector<float>(longer.begin(), longer.begin() + 25)}) {
    fastv::graph::Pruner pruner;
    ASSERT_TRUE(pruner.begin({20, 32, visual, past}));
    TestGraph graph;
    const auto kept = pruner.select(graph.context(), graph.list(scores));
    ASSERT_TRUE(kept) << kept.message().c_str();
    const auto counts = pruner.counts(graph.context());
    ASSERT_TRUE(counts);
    graph.run({*kept, *counts}, &pruner);
    EXPECT_EQ(graph.read_indices(*kept), expected);
    EXPECT_EQ(graph.read<float>(*counts), (std::vector<float>{0, 0, 0, 0}));
  }
}

TEST(GraphSelect, OnePrunerServesManyPrompts) {
  oracle::Rng random(9);
  Config config;
  config.keep_count = 5;
  fastv::graph::Pruner first(config);
  for (const std::size_t n : {40u, 9u, 100u}) {
    const std::vector<TokenSpan> visual{{2, n}};
    ASSERT_TRUE(first.begin({n + 8, 32, visual}));
    fastv::graph::Pruner pruner(std::move(first));  // as in a std::vector that grows
    const std::vector<float> scores = kinds[1].make(n + 8, random);
    TestGraph graph;
    const auto kept = pruner.select(graph.context(), graph.list(scores));
    ASSERT_TRUE(kept);
    graph.run({*kept}, &pruner);
    EXPECT_EQ(graph.read_indices(*kept), by_core({config}, {scores}, visual, n + 8).kept);
    first = std::move(pruner);
  }
}

void what_has_no_form_in_a_graph() {
  const std::vector<TokenSpan> visual{{2, 6, 3}, {9, 4, 2}};
  const auto refuses = [&](const std::vector<Config>& schedule, Errc code, const char* words, std::size_t layers = 32) {
    fastv::graph::Pruner pruner{Span<const Config>(schedule)};
    says(pruner.begin({20, layers, visual}).status, code, words);
    // And goes on saying so.
    TestGraph graph;
    says(pruner.select(graph.context(), graph.list(std::vector<float>(20))).status, Errc::bad_prompt,
         "call begin() first");
  };
  const std::vector<Index> rows{14};
  std::vector<Config> two(2);
  two[1].filtering_layer = 4;
  const auto with = [](const auto& change) {
    Config config;
    change(config);
    return std::vector<Config>{config};
  };
  refuses(with([](Config& c) { c.score_rows = fastv::ScoreRows::all; }), Errc::not_supported,
          "stage 0 ranks by other rows");
  refuses(with([&](Config& c) { c.prior_rows = rows; }), Errc::not_supported, "stage 0 ranks by other rows");
  two[1].score_rows = fastv::ScoreRows::listed, two[1].listed_rows = rows;
  refuses(two, Errc::not_supported, "stage 1 ranks by other rows");
  two[1] = two[0], two[1].filtering_layer = 4;
  for (Config& config : two) config.quota = Quota::pooled, config.min_per_image = 1, config.keep_count = 5;
  refuses(two, Errc::not_supported, "stage 1 has min_per_image 1 behind a stage that pools");
  // What make_plan() refuses.
  refuses(with([](Config& c) { c.filtering_ratio = 1.5; }), Errc::bad_setting, "1.5");
  refuses(with([](Config&) {}), Errc::bad_setting, "filtering_layer is 2", 2);
  refuses(std::vector<Config>(9), Errc::bad_setting, "9 stages");

  fastv::graph::Pruner pruner;
  const std::size_t many = (std::size_t{1} << 23) + 1;
  says(pruner.begin({many, 32, visual}).status, Errc::not_supported,
       "8388609 tokens but a graph sorts at most 8388608");
  says(pruner.begin({13, 32, visual}).status, Errc::bad_prompt, "last prompt token (position 12) is in visual span 1");
  Config none;
  none.selection = Selection::uniform;
  none.filtering_ratio = 1;
  says(fastv::graph::Pruner(none).begin({4, 32, std::vector<TokenSpan>{{0, 4}}}).status, Errc::bad_setting,
       "stage 0 keeps none of 4 tokens");
  says(fastv::graph::Pruner(Span<const Config>(nullptr, 2)).begin({20, 32, visual}).status, Errc::null_data,
       "schedule");
  // No stages: nothing is pruned.
  fastv::graph::Pruner idle{Span<const Config>()};
  ASSERT_TRUE(idle.begin({20, 32, visual}));
  EXPECT_FALSE(idle.due(2));
  EXPECT_TRUE(idle.set_inputs([](ggml_tensor*, const void*, std::size_t) { FAIL(); }));
}
TEST(GraphSelect, SaysWhatHasNoFormInAGraph) { what_has_no_form_in_a_graph(); }

void calls_too_early_or_too_often() {
  const std::vector<TokenSpan> visual{{2, 12}};
  const auto no_input = [](ggml_tensor*, const void*, std::size_t) { FAIL(); };
  TestGraph graph;
  ggml_context* ctx = graph.context();
  ggml_tensor* scores = graph.list(std::vector<float>(20));
  fastv::graph::Pruner pruner;
  EXPECT_FALSE(pruner.due(2));
  says(pruner.select(ctx, scores).status, Errc::bad_prompt, "select() has no prompt: call begin() first");
  says(pruner.counts(ctx).status, Errc::missing_evidence, "counts() has no scores");
  says(pruner.set_inputs(no_input), Errc::bad_prompt, "0 of 1 stages");
  says(pruner.selected(std::vector<float>(4)).status, Errc::bad_prompt, "stage 0 is asked for but there are 0");

  ASSERT_TRUE(pruner.begin({20, 32, visual}));
  EXPECT_TRUE(pruner.due(2));
  EXPECT_FALSE(pruner.due(1));
  EXPECT_FALSE(pruner.due(3));
  says(pruner.set_inputs(no_input), Errc::bad_prompt, "0 of 1 stages are in the graph");
  says(pruner.select(nullptr, scores).status, Errc::null_data, "context");
  says(pruner.select(ctx).status, Errc::missing_evidence, "stage 0 ranks 12 tokens by scores");
  says(pruner.select(ctx, graph.input(GGML_TYPE_F16, {20}, std::vector<ggml_fp16_t>(20))).status, Errc::not_supported,
       "scores are of type f16");
  says(pruner.select(ctx, graph.list(std::vector<float>(19))).status, Errc::bad_shape,
       "19 scores for 20 tokens behind 0 keys");
  says(pruner.select(ctx, graph.input(GGML_TYPE_F32, {20, 2}, std::vector<float>(40))).status, Errc::bad_shape,
       "40 scores");
  EXPECT_EQ(pruner.stage(), 0u);
  const auto kept = pruner.select(ctx, scores);
  ASSERT_TRUE(kept) << kept.message().c_str();
  EXPECT_FALSE(pruner.due(2));
  says(pruner.select(ctx, scores).status, Errc::bad_prompt, "for stage 1 but there are 1");
  says(pruner.counts(nullptr).status, Errc::null_data, "context");
  says(pruner.set_inputs(no_input), Errc::null_data, "an input of stage 0 has no memory");
  graph.run({*kept}, &pruner);

  says(pruner.selected(std::vector<float>(3)).status, Errc::too_small, "the counts has room for 3 entries");
  says(pruner.selected(std::vector<float>(4), 1).status, Errc::bad_prompt, "stage 1 is asked for but there are 1");
  says(pruner.selected(std::vector<float>{13, 0, 0, 0}).status, Errc::bad_value, "13 is no count of 12");
  says(pruner.selected(std::vector<float>{nan, 0, 0, 0}).status, Errc::bad_value, "is no count of 12");
  says(pruner.selected(std::vector<float>{0, 0, 3, 0}).status, Errc::bad_value, "3 of 12 visual scores are infinite");
  const auto selected = pruner.selected(std::vector<float>{2, 3, 0, 0});
  ASSERT_TRUE(selected);
  EXPECT_EQ(selected->count, 14u);
  EXPECT_EQ(selected->nan_scores, 2u);
  EXPECT_EQ(selected->zero_scores, 3u);

  // Another graph, whose stage looks at no score.
  Config config;
  config.selection = Selection::random;
  fastv::graph::Pruner blind(config);
  ASSERT_TRUE(blind.begin({20, 32, visual}));
  ASSERT_TRUE(blind.select(ctx));
  says(blind.counts(ctx).status, Errc::missing_evidence, "counts() has no scores");
  // A prompt that is refused takes the one before it away.
  EXPECT_FALSE(pruner.begin({0, 32, visual}));
  says(pruner.select(ctx, scores).status, Errc::bad_prompt, "call begin() first");
}
TEST(GraphSelect, SaysWhatIsCalledTooEarlyOrTooOften) { calls_too_early_or_too_often(); }

void every_axis_of_the_positions() {
  constexpr std::int64_t n = 9, axes = 4;
  std::vector<std::int32_t> position_values(axes * n);
  std::iota(position_values.begin(), position_values.end(), 1000);
  const std::vector<std::int32_t> kept_values{0, 3, 4, 8};
  TestGraph graph;
  ggml_context* ctx = graph.context();
  ggml_tensor* positions = graph.input(GGML_TYPE_I32, {axes * n}, position_values);
  ggml_tensor* kept = graph.input(GGML_TYPE_I32, {4}, kept_values);
  const auto ids = fastv::graph::gather_positions(ctx, positions, axes, kept);
  ASSERT_TRUE(ids) << ids.message().c_str();
  graph.run({*ids});
  const std::vector<std::int32_t> found = graph.read<std::int32_t>(*ids);
  ASSERT_EQ(found.size(), 4u * axes);
  for (std::size_t k = 0; k < 4; ++k)
    for (std::size_t axis = 0; axis < axes; ++axis)
      EXPECT_EQ(found[axis * 4 + k], position_values[axis * n + static_cast<std::size_t>(kept_values[k])]);
  const auto refuses = [&](ggml_tensor* of, int count, ggml_tensor* by, Errc code, const char* words) {
    says(fastv::graph::gather_positions(ctx, of, count, by).status, code, words);
  };
  refuses(nullptr, 1, kept, Errc::null_data, "positions is null");
  refuses(positions, 1, nullptr, Errc::null_data, "kept indices is null");
  refuses(positions, 0, kept, Errc::bad_shape, "36 positions are not 0 axes");
  refuses(positions, 5, kept, Errc::bad_shape, "36 positions are not 5 axes");
  says(fastv::graph::gather_positions(nullptr, positions, 1, kept).status, Errc::null_data, "context");
}
TEST(GraphGather, EveryAxisOfThePositions) { every_axis_of_the_positions(); }

TEST(Sentences, OfTheAdaptorAreAllRaised) {
  rows_that_cannot_be_moved();
  memory_that_is_not_the_hosts();
  indices_as_i32();
  wrong_evidence();
  wrong_attention();
  what_has_no_form_in_a_graph();
  calls_too_early_or_too_often();
  every_axis_of_the_positions();
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(sentences::folder()))
    if (entry.path().filename().string().compare(0, 4, "ggml") == 0) names.push_back(entry.path().filename().string());
  std::set<std::string> written = sentences::of_headers(names);
  for (auto it = written.begin(); IsSkipped() && it != written.end();)  // see memory_that_is_not_the_hosts()
    it = it->find("is not in host memory") == std::string::npos ? std::next(it) : written.erase(it);
  EXPECT_GT(written.size(), 20u);
  sentences::expect_raised(written, raised());
}

}  // namespace

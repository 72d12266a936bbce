// The LibTorch adaptor: views without copies, what moves, errors, and the path on the device held to the core.
#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <gtest/gtest.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <fastv/detail/cuda_torch.hpp>
#include <fastv/fastv.hpp>
#include <fastv/torch_device.hpp>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <string>

#include "cuda/batches.hpp"
#include "sentences.hpp"

// LibTorch 1.13 has no nan_to_num() without values.
TORCH_LIBRARY_IMPL(aten, Meta, library) {
  library.impl("nan_to_num.out",
               [](const at::Tensor&, c10::optional<double>, c10::optional<double>, c10::optional<double>,
                  at::Tensor& out) -> at::Tensor& { return out; });
}

namespace {

using namespace fastv;

const at::ScalarType element_types[] = {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16};
const std::vector<TokenSpan> one_image = {{4, 30}};
constexpr std::int64_t n = 40;

// ---- helpers ------------------------------------------------------------------------------------

Config settings(double ratio, ScoreRows rows = ScoreRows::last) {
  Config config;
  config.filtering_ratio = ratio;
  config.score_rows = rows;
  return config;
}

std::vector<std::int64_t> values_of(const at::Tensor& indices) {
  const at::Tensor c = indices.contiguous();
  return {c.data_ptr<std::int64_t>(), c.data_ptr<std::int64_t>() + c.numel()};
}
std::vector<std::int64_t> values_of(const Kept& kept) { return {kept.begin(), kept.end()}; }
template <class Score>
std::vector<double> values_of(Span<const Score> scores) {
  return {scores.begin(), scores.end()};
}
std::vector<float> floats_of(const at::Tensor& tensor) {
  const at::Tensor c = tensor.to(at::kFloat).contiguous();
  return {c.data_ptr<float>(), c.data_ptr<float>() + c.numel()};
}

// Multiples of 1/16 below 1: every mean over 2, 4 or 8 heads is exact in any order of summing, and many are equal.
at::Tensor with_ties(at::IntArrayRef shape) { return at::randint(0, 16, shape, at::kFloat).div(16); }

// Attention of the last rows, q [heads, rows, dim] over k [kv heads, keys, dim], written out plainly.
at::Tensor attention_of(const at::Tensor& q, const at::Tensor& k, double scale) {
  const std::int64_t heads = q.size(0), rows = q.size(1), keys = k.size(1), group = heads / k.size(0);
  const at::Tensor map = at::zeros({heads, rows, keys}, at::kDouble);
  for (std::int64_t h = 0; h < heads; ++h)
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t seen = keys - rows + r + 1;
      const at::Tensor logits = k[h / group].to(at::kDouble).mv(q[h][r].to(at::kDouble)).mul(scale);
      map[h][r].narrow(0, 0, seen).copy_(logits.narrow(0, 0, seen).softmax(0));
    }
  return map;
}

// FastV's selection, the slow way: a stable sort of the scores, NaN last.
std::vector<std::int64_t> kept_by_sorting(const at::Tensor& scores, std::size_t count, const TokenSpan& span,
                                          std::int64_t tokens) {
  const at::Tensor s = scores.to(at::kDouble).contiguous();
  const double* score = s.data_ptr<double>();
  std::vector<std::size_t> order(span.count);
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return !std::isnan(score[a]) && (std::isnan(score[b]) || score[a] > score[b]);
  });
  std::set<std::size_t> stay(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count));
  std::vector<std::int64_t> kept;
  for (std::int64_t i = 0; i < tokens; ++i) {
    const auto p = static_cast<std::size_t>(i);
    if (p < span.first || p >= span.first + span.count || stay.count(p - span.first) != 0) kept.push_back(i);
  }
  return kept;
}

class Torch : public ::testing::Test {
 protected:
  void SetUp() override { at::manual_seed(17); }
};

// ---- views --------------------------------------------------------------------------------------

TEST_F(Torch, ProbabilitiesAreReadWhereTheyLieInEveryElementTypeAndStride) {
  for (const at::ScalarType type : element_types) {
    const at::Tensor contiguous = at::rand({2, 3, n}, at::kFloat).to(type);
    const at::Tensor batch = contiguous.unsqueeze(0),
                     keys_first = at::rand({n, 3, 2}, at::kFloat).to(type).permute({2, 1, 0});
    const at::Tensor part = at::rand({4, 8, n + 9}, at::kFloat).to(type).slice(0, 1, 3).slice(1, 2, 5).narrow(2, 4, n);
    for (const at::Tensor& tensor : {contiguous, batch, keys_first, part}) {
      const Result<TensorProbabilities> evidence = probabilities(tensor);
      ASSERT_TRUE(evidence) << evidence.message().c_str();
      EXPECT_EQ(evidence->type, type);
      EXPECT_EQ(static_cast<const void*>(evidence->data), tensor.data_ptr());
      EXPECT_EQ(evidence->heads, 2u);
      EXPECT_EQ(evidence->queries, 3u);
      EXPECT_EQ(evidence->keys, static_cast<std::size_t>(n));
      const at::Tensor expected = tensor.reshape({2, 3, n}).select(1, 2).to(at::kDouble).mean(0).narrow(0, 4, 30);
      Pruner<double> pruner(settings(0.6));
      const Kept kept = pruner.prune(probabilities(tensor), one_image);
      ASSERT_TRUE(kept) << kept.message().c_str();
      EXPECT_EQ(values_of(kept), kept_by_sorting(expected, 12, one_image[0], n));
      for (std::size_t i = 0; i < 30; ++i)
        EXPECT_NEAR(pruner.scores()[i], expected[static_cast<std::int64_t>(i)].item<double>(), 1e-12);
    }
  }
}

TEST_F(Torch, QueriesAndKeysAreReadWhereTheyLieInEveryElementTypeAndStride) {
  for (const at::ScalarType query_type : element_types)
    for (const at::ScalarType key_type : element_types) {
      const at::Tensor q = at::randn({4, 2, 8}).to(query_type), k = at::randn({2, n, 8}).to(key_type);
      // [rows, heads, dim] transposed, and every other element; keys of a larger cache, head-major, token-major and
      // with the elements of a vector a cache apart.
      const at::Tensor q_view = q.transpose(0, 1).contiguous().transpose(0, 1);
      const at::Tensor q_sparse = at::stack({q, q}, 3).select(3, 0);
      const at::Tensor cache = at::zeros({2, n + 24, 8}, key_type), token_major = at::zeros({n + 24, 2, 8}, key_type),
                       transposed = at::zeros({2, 8, n + 24}, key_type);
      cache.narrow(1, 5, n).copy_(k);
      token_major.narrow(0, 7, n).copy_(k.transpose(0, 1));
      transposed.narrow(2, 3, n).copy_(k.transpose(1, 2));
      const at::Tensor expected = attention_of(q, k, 0.35).select(1, 1).mean(0).narrow(0, 4, 30);
      for (const at::Tensor& query : {q, q_view, q_sparse, q.unsqueeze(0)})
        for (const at::Tensor& key : {k, cache.narrow(1, 5, n), token_major.narrow(0, 7, n).transpose(0, 1),
                                      transposed.narrow(2, 3, n).transpose(1, 2), k.unsqueeze(0)}) {
          const Result<TensorQueryKey> evidence = query_key(query, key, 0.35f);
          ASSERT_TRUE(evidence) << evidence.message().c_str();
          EXPECT_EQ(static_cast<const void*>(evidence->query.data), query.data_ptr());
          EXPECT_EQ(static_cast<const void*>(evidence->key.data), key.data_ptr());
          Pruner<> pruner(settings(0.6));
          const Kept kept = pruner.prune(evidence, one_image);
          ASSERT_TRUE(kept) << kept.message().c_str();
          for (std::size_t i = 0; i < 30; ++i)
            EXPECT_NEAR(pruner.scores()[i], expected[static_cast<std::int64_t>(i)].item<double>(), 1e-6)
                << query.strides() << key.strides();
          const std::vector<double> scores = values_of(pruner.scores());
          EXPECT_EQ(values_of(kept), kept_by_sorting(at::tensor(scores, at::kDouble), 12, one_image[0], n));
          Pruner<> same(settings(0.6));
          EXPECT_EQ(values_of(same.prune(query_key(heads(query), heads(key), 0.35f), one_image)), values_of(kept));
          EXPECT_EQ(values_of(same.scores()), scores);
        }
    }
}

// Every field of the core's view, on the tensor's: the same scores, bit by bit.
TEST_F(Torch, TheFieldsAreThoseOfTheCoresViews) {
  const at::Tensor q = at::randn({4, 3, 8}), k = at::randn({2, n + 6, 8}).to(at::kHalf);
  const std::vector<float> bias = floats_of(at::randn({n + 6})), sinks = floats_of(at::randn({4})),
                           alibi = floats_of(at::rand({4})), scales = floats_of(at::rand({2 * (n + 6)}) + 0.5),
                           norms = floats_of(at::rand({2 * 30}) + 0.5);
  const std::vector<Index> visible = {44, 41, 46};
  const std::function<void(QueryKey<TensorElement>&, QueryKey<float, Heads<half>>&)> changes[] = {
      [](auto&, auto&) {},
      [](auto& a, auto& b) { a.scale = b.scale = 0.2f; },
      [](auto& a, auto& b) { a.soft_cap = b.soft_cap = 1.5f; },
      [&](auto& a, auto& b) { a.bias = b.bias = bias; },
      [&](auto& a, auto& b) { a.sinks = b.sinks = sinks; },
      [&](auto& a, auto& b) { a.alibi = b.alibi = alibi; },
      [&](auto& a, auto& b) {
        a.key_scales = b.key_scales = heads(scales.data(), HeadMajor{2, n + 6, 1});
      },
      [](auto& a, auto& b) { a.causal = b.causal = false; },
      [&](auto& a, auto& b) { a.visible = b.visible = visible; },
      [](auto& a, auto& b) { a.window = b.window = 20; },
      [](auto& a, auto& b) { a.past = b.past = 6; },
      [](auto& a, auto& b) { a.first_key = b.first_key = 3, a.past = b.past = 6; },
      [&](auto& a, auto& b) { a.value_norms = b.value_norms = norms; },
  };
  std::set<std::vector<double>> different;
  for (const auto& change : changes) {
    Result<TensorQueryKey> evidence = query_key(q, k, 0.35f);
    QueryKey<float, Heads<half>> core =
        query_key(heads(q.data_ptr<float>(), HeadMajor{4, 3, 8}),
                  heads(as_half(k.data_ptr<at::Half>()), HeadMajor{2, n + 6, 8}), 0.35f);
    change(evidence.value, core);
    Config config = settings(0.5, ScoreRows::listed);
    const Index last = static_cast<Index>(core.prompt_tokens() - 1), listed[] = {last - 1, last};
    config.listed_rows = listed;
    Pruner<> ours(config), cores(config);
    const Kept kept = ours.prune(evidence, one_image);
    ASSERT_TRUE(kept) << kept.message().c_str();
    EXPECT_EQ(values_of(kept), values_of(cores.prune(core, one_image)));
    EXPECT_EQ(values_of(ours.scores()), values_of(cores.scores()));
    different.insert(values_of(ours.scores()));
  }
  EXPECT_EQ(different.size(), std::size(changes));  // each field does something

  const at::Tensor map = at::rand({4, 2, n + 6}).to(at::kBFloat16);
  Result<TensorProbabilities> evidence = probabilities(map);
  Probabilities<bfloat16> core = probabilities(as_bfloat16(map.data_ptr<at::BFloat16>()), 4, 2, n + 6);
  evidence.value.first_key = core.first_key = 2;
  evidence.value.past = core.past = 8;
  evidence.value.value_norms = core.value_norms = norms;
  Pruner<> ours, cores;
  EXPECT_EQ(values_of(ours.prune(evidence, one_image)), values_of(cores.prune(core, one_image)));
  EXPECT_EQ(values_of(ours.scores()), values_of(cores.scores()));

  // Of some heads: partial sums, which prune() does not take.
  evidence.value.heads_total = core.heads_total = 16;
  std::vector<float> part(30), same(30);
  EXPECT_TRUE(score(Config{}, *evidence, one_image, Span<float>(part)));
  EXPECT_TRUE(score(Config{}, core, one_image, Span<float>(same)));
  EXPECT_EQ(part, same);
  EXPECT_EQ(ours.prune(evidence, one_image).code(), Errc::missing_evidence);
  Result<TensorQueryKey> some = query_key(q, k, 0.35f);
  some.value.heads_total = 8;
  EXPECT_EQ(ours.prune(some, one_image).code(), Errc::missing_evidence);
}

// Keys alone, values' lengths and keys without RoPE, as the core has them from a copy in floats.
TEST_F(Torch, RemediesReadTensors) {
  const std::vector<float> frequencies = {1, 0.1f, 0.01f};
  std::vector<Index> positions;
  for (Index i = 0; i < n + 6; ++i) positions.push_back(i);
  for (const at::ScalarType type : element_types) {
    const at::Tensor k = at::randn({1, 2, n + 6, 8}).to(type), v = at::randn({1, n + 6, 2, 8}).to(type).transpose(1, 2);
    const std::vector<float> wide_k = floats_of(k), wide_v = floats_of(v);
    const Heads<float> keys = heads(wide_k.data(), HeadMajor{2, n + 6, 8});
    const Heads<float> values = heads(wide_v.data(), HeadMajor{2, n + 6, 8});

    Pruner<> ours(settings(0.5)), cores(settings(0.5));
    const Kept kept = ours.prune(KeysOnly{*heads(k), 6}, one_image);
    ASSERT_TRUE(kept) << kept.message().c_str();
    EXPECT_EQ(values_of(kept), values_of(cores.prune(KeysOnly{keys, 6}, one_image)));
    EXPECT_EQ(values_of(ours.scores()), values_of(cores.scores()));

    std::vector<float> norms(2 * 30), expected(2 * 30);
    ASSERT_TRUE(value_norms(*heads(v), one_image, norms, 6));
    ASSERT_TRUE(value_norms(values, one_image, expected, 6));
    EXPECT_EQ(norms, expected);

    std::vector<float> plain(wide_k.size()), expected_plain(wide_k.size());
    ASSERT_TRUE(unrotate(*heads(k), Rope{frequencies, positions}, plain));
    ASSERT_TRUE(unrotate(keys, Rope{frequencies, positions}, expected_plain));
    EXPECT_EQ(plain, expected_plain);
    EXPECT_NE(plain, wide_k);
  }
}

TEST_F(Torch, ScoresOfYourOwn) {
  for (const at::ScalarType type : element_types) {
    const at::Tensor own = with_ties({30}).to(type);
    Pruner<> pruner(settings(0.5));
    const Kept kept = pruner.prune(scores(own, n), one_image);
    ASSERT_TRUE(kept) << kept.message().c_str();
    EXPECT_EQ(values_of(kept), kept_by_sorting(own, 15, one_image[0], n));
  }
}

// A padded batch [sequences, heads, queries, keys], each sequence a part of it.
TEST_F(Torch, BatchesAreSequencesByNarrow) {
  const std::int64_t longest = 50, lengths[] = {40, 50, 44};
  const at::Tensor attention = at::rand({3, 2, 1, longest}), hidden = at::randn({3, longest, 4});
  const std::vector<TokenSpan> visual[] = {{{4, 30}}, {{0, 9}, {12, 30}}, {}};
  std::vector<Request> requests;
  for (std::size_t i = 0; i < 3; ++i)
    requests.push_back(
        {settings(0.25 * static_cast<double>(i + 1)), visual[i], i * longest, static_cast<std::size_t>(lengths[i])});
  const auto sequence = [&](std::size_t i) {
    return attention.narrow(0, static_cast<std::int64_t>(i), 1).narrow(3, 0, lengths[i]);
  };
  BatchPruner<> batch;
  const KeptBatch kept = batch.prune(requests, [&](std::size_t i) { return *probabilities(sequence(i)); });
  ASSERT_TRUE(kept) << kept.message().c_str();
  EXPECT_EQ(kept.failed, 0u);
  at::Tensor packed = hidden.clone().view({3 * longest, 4});
  ASSERT_TRUE(compact(kept, packed, 0));
  EXPECT_TRUE(packed.equal(*gather(kept, hidden.view({3 * longest, 4}), 0)));
  for (std::size_t i = 0; i < 3; ++i) {
    const auto row = static_cast<std::int64_t>(i), begin = static_cast<std::int64_t>(kept.cumulative[i]);
    const at::Tensor of_batch = packed.narrow(0, begin, static_cast<std::int64_t>(kept.cumulative[i + 1]) - begin);
    Pruner<> pruner(requests[i].config);
    at::Tensor alone = hidden[row].narrow(0, 0, lengths[i]).clone();
    ASSERT_TRUE(compact(pruner.prune(probabilities(sequence(i)), visual[i]), alone, 0));
    EXPECT_TRUE(of_batch.equal(alone)) << i;
    alone = hidden[row].narrow(0, 0, lengths[i]).clone();
    ASSERT_TRUE(compact(kept.sequence(i), alone, 0));
    EXPECT_TRUE(of_batch.equal(alone)) << i;
  }
}

// ---- what moves ---------------------------------------------------------------------------------

Kept some_kept(Pruner<>& pruner) { return pruner.prune(probabilities(at::rand({2, 1, n})), one_image); }

TEST_F(Torch, CompactIsIndexSelectInPlace) {
  Pruner<> pruner(settings(0.7));
  const Kept kept = some_kept(pruner);
  ASSERT_TRUE(kept);
  const at::Tensor indices = *kept_tensor(kept, at::zeros({1}));
  struct Layout {
    at::Tensor tensor;
    std::int64_t dim;
  };
  const Layout layouts[] = {
      {at::randn({n, 6}), 0},                                      // hidden states
      {at::randn({1, n, 6}), 1},                                   //
      {at::randn({1, n, 6}), -2},                                  //
      {at::randn({3, n, 6}), 1},                                   // a batch that shares its indices
      {at::randn({6, n}).t(), 0},                                  // column-major
      {at::randn({n + 8, 9}).narrow(0, 3, n).narrow(1, 2, 6), 0},  // a part
      {at::arange(n), 0},                                          // position ids
      {at::randint(0, 99, {3, n}, at::kLong), 1},                  // of M-RoPE, on three axes
      {at::randint(0, 99, {3, 1, n}, at::kLong), -1},              //
      {at::randn({1, 2, n, 8}).to(at::kHalf), 2},                  // a head-major cache
      {at::randn({1, n, 2, 8}).to(at::kBFloat16).transpose(1, 2), 2},
      {at::randn({2, n + 5, 8}).narrow(1, 0, n), 1},  // of larger capacity
      {at::randn({1, 2, n, 8}).transpose(2, 3), 3},   // keys stored transposed
      {at::randint(0, 2, {n}, at::kBool), 0},         // a padding mask
      {at::randint(0, 99, {n, 1, 3}, at::kInt), 0},
      {at::randn({n, 2}, at::kComplexFloat), 0},
      {at::quantize_per_tensor(at::rand({n, 6}), 0.01, 3, at::kQInt8), 0},
      {at::randn({n, 0}), 0},
  };
  for (const Layout& layout : layouts) {
    at::Tensor tensor = layout.tensor;
    const void* data = tensor.data_ptr();
    const at::Tensor expected = tensor.index_select(layout.dim, indices);
    const Status status = compact(kept, tensor, layout.dim);
    ASSERT_TRUE(status) << status.message().c_str();
    EXPECT_EQ(tensor.data_ptr(), data);
    EXPECT_TRUE(tensor.equal(expected)) << tensor.sizes() << " along " << layout.dim;
  }
}

TEST_F(Torch, CompactIsIndexSelectInAnyLayoutOrSaysWhyNot) {
  Pruner<> pruner(settings(0.7));
  const Kept kept = some_kept(pruner);
  const at::Tensor indices = *kept_tensor(kept, at::zeros({1}));
  int moved = 0, refused = 0;
  const auto below = [](std::int64_t bound) { return at::randint(bound, {1}).item<std::int64_t>(); };
  for (int round = 0; round < 2000; ++round) {
    // A part of a larger tensor whose dimensions lie in memory in any order.
    const std::int64_t dims = 1 + below(4), dim = below(dims);
    std::vector<std::int64_t> size, room, order(static_cast<std::size_t>(dims));
    for (std::int64_t d = 0; d < dims; ++d) {
      size.push_back(d == dim ? n : 1 + below(4));
      room.push_back(size.back() + (below(3) == 0 ? 2 : 0));
      order[static_cast<std::size_t>(d)] = d;
    }
    for (std::size_t i = order.size(); i > 1; --i)
      std::swap(order[i - 1], order[static_cast<std::size_t>(below(static_cast<std::int64_t>(i)))]);
    std::vector<std::int64_t> stored(order.size());
    for (std::size_t i = 0; i < order.size(); ++i) stored[static_cast<std::size_t>(order[i])] = room[i];
    const at::Tensor whole = at::randint(0, 1 << 20, stored, at::kInt);
    at::Tensor tensor = whole.permute(order);
    for (std::int64_t d = 0; d < dims; ++d) tensor = tensor.narrow(d, 0, size[static_cast<std::size_t>(d)]);
    const at::Tensor expected = tensor.index_select(dim, indices), before = whole.clone();
    const Status status = compact(kept, tensor, dim);
    if (status) {
      ASSERT_TRUE(tensor.equal(expected)) << whole.sizes() << tensor.strides() << " along " << dim;
      ++moved;
    } else {
      ASSERT_EQ(status.code, Errc::bad_stride) << status.message().c_str();
      ASSERT_TRUE(whole.equal(before));
      ++refused;
    }
  }
  EXPECT_GT(moved, 1000);
  EXPECT_GT(refused, 50);
}

TEST_F(Torch, IndicesAndGatheredRows) {
  Pruner<> pruner(settings(0.7));
  const Kept kept = some_kept(pruner);
  const at::Tensor hidden = at::randn({1, n, 6}).requires_grad_(true);
  const auto indices = kept_tensor(kept, hidden);
  ASSERT_TRUE(indices);
  EXPECT_EQ(indices->scalar_type(), at::kLong);
  EXPECT_EQ(values_of(*indices), values_of(kept));
  const auto gathered = gather(kept, hidden, -2);
  ASSERT_TRUE(gathered);
  EXPECT_TRUE(gathered->equal(hidden.index_select(1, *indices)));
  gathered->sum().backward();  // autograd knows it
  EXPECT_TRUE(hidden.grad().equal(at::zeros({1, n, 6}).index_fill(1, *indices, 1)));
  EXPECT_TRUE(kept_tensor(kept, hidden.to(at::kMeta))->is_meta());

  for (const at::ScalarType type : {at::kInt, at::kLong})
    for (const at::Tensor& room : {at::full({n}, -1, type), at::full({n, 2}, -1, type).select(1, 0)}) {
      const void* data = room.data_ptr();
      ASSERT_TRUE(write_indices(kept, room));
      EXPECT_EQ(room.data_ptr(), data);
      const auto m = static_cast<std::int64_t>(kept.size());
      EXPECT_EQ(values_of(room.narrow(0, 0, m).to(at::kLong)), values_of(kept));
      EXPECT_TRUE(room.narrow(0, m, n - m).eq(-1).all().item<bool>());
    }
}

TEST_F(Torch, AnyListOfIndicesIsTaken) {
  const std::vector<Index> list = {0, 3, 4, 39};
  at::Tensor hidden = at::randn({1, n, 6});
  const at::Tensor expected = hidden.index_select(1, at::tensor({0, 3, 4, 39}, at::kLong));
  EXPECT_TRUE(gather(list, hidden, 1)->equal(expected));
  ASSERT_TRUE(compact(list, hidden, 1));
  EXPECT_TRUE(hidden.equal(expected));
}

// Two stages over two turns: evidence behind `past` keys, then hidden states, M-RoPE positions and mask shrink twice.
TEST_F(Torch, StagesAndTurns) {
  const std::int64_t past = 7;
  const std::vector<TokenSpan> visual = {{2, 12}, {16, 18}};
  Config first = settings(0.5), second = settings(0.75);
  second.filtering_layer = 8;
  second.ratio_of = RatioOf::original;
  at::Tensor hidden = at::randn({1, n, 6}), positions = at::randint(0, 99, {3, n}, at::kLong);
  const at::Tensor whole = hidden.clone(), ids = positions.clone();
  at::Tensor numbers = at::arange(n);
  const Config schedule[] = {first, second};
  const auto plan = make_plan(schedule, Prompt{static_cast<std::size_t>(n), 16, visual});
  std::vector<TokenSpan> spans = visual;
  for (const Config& config : schedule) {
    const std::int64_t tokens = hidden.size(1);
    const at::Tensor q = at::randn({1, 4, 1, 8}).to(at::kHalf), k = at::randn({1, 2, past + tokens, 8}).to(at::kHalf);
    auto evidence = query_key(q, k, 0.35f);
    evidence.value.past = static_cast<std::size_t>(past);
    Pruner<> pruner(config);
    const Kept kept = pruner.prune(evidence, spans);
    ASSERT_TRUE(kept) << kept.message().c_str();
    EXPECT_EQ(kept.size(), plan->tokens_in_layer(config.filtering_layer));
    const auto on_device = device::prune(config, q, k, 0.35, spans, static_cast<std::size_t>(past));
    ASSERT_TRUE(on_device) << on_device.message().c_str();
    EXPECT_EQ(values_of(*on_device), values_of(kept));
    ASSERT_TRUE(compact(kept, hidden, 1));
    ASSERT_TRUE(compact(kept, positions, -1));
    ASSERT_TRUE(compact(kept, numbers, 0));
    const auto left = next_spans(kept, spans, spans);
    ASSERT_TRUE(left);
    spans.resize(*left);
  }
  EXPECT_TRUE(hidden.equal(whole.index_select(1, numbers)));
  EXPECT_TRUE(positions.equal(ids.index_select(1, numbers)));
}

// ---- errors -------------------------------------------------------------------------------------

struct Wrong {
  Errc code;
  std::vector<const char*> names;
  Status status;
};
std::vector<Wrong> all_wrong() {
  static Pruner<> pruner;
  const Kept kept = some_kept(pruner);
  const at::Tensor a = at::rand({2, 1, n}), q = at::rand({2, 1, 8}), k = at::rand({2, n, 8}), undefined;
  const auto compacted = [&](at::Tensor tensor, std::int64_t dim) { return compact(kept, tensor, dim); };
  const auto pruned = [&](const auto& evidence) {
    static Pruner<> other;
    return other.prune(evidence, one_image).status;
  };
  const auto on_device = [&](Config config) { return device::prune(config, a, one_image).status; };
  Config uniform, random, diverse, share, windows, prior;
  uniform.selection = Selection::uniform;
  random.selection = Selection::random;
  diverse.selection = Selection::diverse;
  share.uniform_share = 0.5;
  windows.window_rows = windows.window_columns = 2;
  static const Index early[] = {3};
  prior.prior_rows = early;
  const std::vector<TokenSpan> grid = {{4, 30, 6}}, to_the_end = {{4, 36}},
                               ratio_of_its_own = {{4, 30, 0, false, 0, 2}};
  const std::vector<Index> too_far = {3, 40};
  return {
      {Errc::null_data, {"attention", "undefined"}, probabilities(undefined).status},
      {Errc::null_data, {"key", "undefined"}, query_key(q, undefined, 1).status},
      {Errc::null_data, {"the tensor", "undefined"}, heads(undefined).status},
      {Errc::null_data, {"the tensor", "undefined"}, query_key(heads(undefined), heads(k), 1).status},
      {Errc::null_data, {"the tensor", "undefined"}, query_key(heads(q), heads(undefined), 1).status},
      {Errc::null_data, {"the tensor", "undefined"}, compacted(undefined, 0)},
      {Errc::null_data, {"device is wanted"}, kept_tensor(kept, undefined).status},
      {Errc::null_data, {"list of indices", "undefined"}, write_indices(kept, undefined)},
      {Errc::null_data, {"scores", "undefined"}, scores(undefined, n).status},
      {Errc::null_data, {"query", "undefined"}, device::scores({}, undefined, k, 1, one_image).status},
      {Errc::null_data, {"key", "undefined"}, device::scores({}, q, undefined, 1, one_image).status},
      {Errc::null_data, {"scores", "undefined"}, device::select({}, undefined, one_image, n).status},
      {Errc::bad_shape, {"attention", "2 dimensions", "needs 3", "[heads, queries, keys]"}, probabilities(a[0]).status},
      {Errc::bad_shape,
       {"key", "5 dimensions", "needs 3", "[heads, tokens, dim]"},
       query_key(q, k.unsqueeze(0).unsqueeze(0), 1).status},
      {Errc::bad_shape, {"scores", "3 dimensions", "needs 1"}, scores(a, n).status},
      {Errc::bad_shape, {"scores", "3 dimensions", "needs 1"}, device::select({}, a, one_image, n).status},
      {Errc::bad_shape,
       {"list of indices", "2 dimensions", "needs 1"},
       write_indices(kept, at::zeros({n, 1}, at::kInt))},
      {Errc::bad_shape, {"is 3 ", "has 3 "}, compacted(a.clone(), 3)},
      {Errc::bad_shape, {"is -4 ", "has 3 "}, compacted(a.clone(), -4)},
      {Errc::bad_shape, {"is 3 ", "has 3 "}, gather(kept, a, 3).status},
      {Errc::bad_shape, {"is 0 ", "has 0 "}, rows(at::zeros({}), 0).status},
      {Errc::bad_shape, {"attention", "of 2 ", "narrow"}, probabilities(at::rand({2, 2, 1, n})).status},
      {Errc::bad_shape, {"query", "of 3 ", "narrow"}, query_key(at::rand({3, 2, 1, 8}), k, 1).status},
      {Errc::not_supported, {"attention", "Int", "Half"}, probabilities(a.to(at::kInt)).status},
      {Errc::not_supported, {"query", "ComplexFloat"}, query_key(q.to(at::kComplexFloat), k, 1).status},
      {Errc::not_supported, {"scores", "Char"}, scores(at::ones({30}, at::kChar), n).status},
      {Errc::not_supported, {"attention", "Long"}, device::scores({}, a.to(at::kLong), one_image).status},
      {Errc::not_supported, {"scores", "Bool"}, device::select({}, at::ones({30}, at::kBool), one_image, n).status},
      {Errc::not_supported,
       {"list of indices", "Short", "Int or Long"},
       write_indices(kept, at::ones({n}, at::kShort))},
      {Errc::not_supported, {"attention", "Meta", "torch_device.hpp"}, probabilities(a.to(at::kMeta)).status},
      {Errc::not_supported, {"key", "Meta"}, query_key(q, k.to(at::kMeta), 1).status},
      {Errc::not_supported, {"query", "Meta"}, query_key(q.to(at::kMeta), k, 1).status},
      {Errc::not_supported, {"scores", "Meta"}, scores(at::rand({30}).to(at::kMeta), n).status},
      {Errc::not_supported, {"the tensor", "Meta", "gather()"}, compacted(a.to(at::kMeta), 2)},
      {Errc::not_supported,
       {"query", "Meta", "key on CPU"},
       device::scores({}, q.to(at::kMeta), k, 1, one_image).status},
      {Errc::not_supported, {"attention", "Sparse", "to_dense()"}, probabilities(a.to_sparse()).status},
      {Errc::not_supported, {"attention", "negated", "resolve_neg()"}, probabilities(a._neg_view()).status},
      {Errc::not_supported,
       {"the tensor", "conjugated", "resolve_conj()"},
       compacted(at::rand({n}, at::kComplexFloat).conj(), 0)},
      {Errc::not_supported,
       {"each of its channels", "int_repr()"},
       compacted(at::quantize_per_channel(at::rand({4, n}), at::rand({4}), at::zeros({4}), 0, at::kQInt8), 1)},
      {Errc::not_supported, {"gradient", "gather()"}, compacted(at::rand({n}).requires_grad_(true), 0)},
      {Errc::bad_stride, {"scores", "stride 2 "}, scores(at::rand({60}).slice(0, 0, 60, 2), n).status},
      {Errc::bad_stride,
       {"dimension 0 ", "stride 1440,", "480 apart"},
       compacted(at::rand({2, 3, n, 12}).narrow(3, 0, 6).narrow(1, 0, 2), 2)},
      {Errc::bad_shape, {"dimension 0 ", "20 entries", "40 tokens"}, compacted(at::rand({20}), 0)},
      {Errc::bad_shape, {"dimension 2 ", "64 entries", "40 tokens"}, compacted(at::rand({1, n, 64}), -1)},
      {Errc::bad_shape, {"dimension 0 ", "20 entries"}, gather(kept, at::rand({20}), 0).status},
      {Errc::too_small, {"12 entries", "needs 25"}, write_indices(kept, at::zeros({12}, at::kInt))},
      {Errc::bad_index, {"40", "40 rows"}, gather(too_far, k, 1).status},
      {Errc::bad_index, {"40", "40 rows"}, [&](at::Tensor keys) { return compact(too_far, keys, 1); }(k)},
      {Errc::bad_index, {"1 ", "3"}, kept_tensor(std::vector<Index>{3, 3}, k).status},
      {Errc::not_supported, {"uniform", "NoEvidence"}, on_device(uniform)},
      {Errc::not_supported, {"selection is diverse", "with features"}, on_device(diverse)},
      {Errc::not_supported, {"random", "NoEvidence"}, on_device(random)},
      {Errc::not_supported, {"uniform_share is 0.5"}, on_device(share)},
      {Errc::not_supported, {"2 x 2"}, device::prune(windows, a, grid).status},
      {Errc::not_supported, {"2 x 2"}, device::select(windows, at::rand({30}), grid, n).status},
      // of the core, met here
      {Errc::bad_stride, {"row stride"}, compacted(at::rand({1, 6}).expand({n, 6}), 0)},
      {Errc::bad_shape, {"query is 8", "key is 4"}, pruned(query_key(q, k.narrow(2, 0, 4), 1))},
      {Errc::bad_shape, {"query is 8", "key is 4"}, device::scores({}, q, k.narrow(2, 0, 4), 1, one_image).status},
      {Errc::bad_shape, {"past is 40", "40 keys"}, pruned(KeysOnly{*heads(k), n})},
      {Errc::bad_stride, {"token stride", "key"}, pruned(query_key(q, at::rand({2, 1, 8}).expand({2, n, 8}), 1))},
      {Errc::bad_prompt, {"34", "30 tokens"}, device::prune({}, a.narrow(2, 0, 30), one_image).status},
      {Errc::bad_prompt, {"34", "30 tokens"}, device::scores({}, a.narrow(2, 0, 30), one_image).status},
      {Errc::bad_prompt, {"34", "30 tokens"}, device::select({}, a[0][0].narrow(0, 0, 30), one_image, 30).status},
      {Errc::bad_prompt, {"last prompt token", "39"}, device::prune({}, a, to_the_end).status},
      {Errc::bad_prompt, {"filtering_ratio 2"}, device::prune({}, a, ratio_of_its_own).status},
      {Errc::bad_shape, {"29 scores", "30 visual"}, device::select({}, at::rand({29}), one_image, n).status},
      {Errc::bad_shape, {"3 heads", "2 KV"}, device::scores({}, at::rand({3, 1, 8}), k, 1, one_image).status},
      {Errc::bad_setting, {"scale", "nan"}, device::scores({}, q, k, std::nan(""), one_image).status},
      {Errc::missing_evidence, {"position 39", "40 query rows"}, on_device(settings(0.5, ScoreRows::all))},
      {Errc::missing_evidence, {"position 39", "40 query rows"}, on_device(settings(0, ScoreRows::all))},
      {Errc::missing_evidence, {"position 3 "}, on_device(prior)},
      {Errc::missing_evidence, {"position 3 "}, device::scores(prior, a, one_image).status},
      {Errc::bad_setting, {"1.5"}, on_device(settings(1.5))},
      {Errc::bad_setting, {"1.5"}, device::scores(settings(1.5), a, one_image).status},
      {Errc::bad_setting, {"1.5"}, device::select(settings(1.5), at::rand({30}), one_image, n).status},
      {Errc::bad_setting, {"keep_count is 31", "30"}, on_device([] {
         Config config;
         config.keep_count = 31;
         return config;
       }())},
      {Errc::bad_setting,
       {"keep_count is 31", "30"},
       [] {
         Config config;
         config.keep_count = 31;
         return device::select(config, at::rand({30}), one_image, n).status;
       }()},
      {Errc::bad_shape, {"41 query rows", "40 tokens"}, device::scores({}, at::rand({2, 41, n}), one_image).status},
      {Errc::bad_shape, {"past is 40", "40 tokens"}, device::scores({}, a, one_image, 40).status},
      {Errc::bad_shape, {"key", "0 heads"}, device::scores({}, q, at::rand({0, n, 8}), 1, one_image).status},
      {Errc::bad_shape,
       {"dimension 0"},
       device::scores({}, at::rand({2, 1, 0}), at::rand({2, n, 0}), 1, one_image).status},
  };
}

TEST_F(Torch, EachErrorNamesTheValueAndTheFix) {
  for (const Wrong& wrong : all_wrong()) {
    const std::string sentence = wrong.status.message().c_str();
    EXPECT_EQ(wrong.status.code, wrong.code) << sentence;
    for (const char* name : wrong.names)
      EXPECT_NE(sentence.find(name), std::string::npos) << '"' << name << "\" is not in: " << sentence;
  }
}

TEST_F(Torch, EverySentenceOfTheHeadersIsRaised) {
  std::set<std::string> raised;
  for (const Wrong& wrong : all_wrong())
    if (wrong.status.sentence != nullptr) raised.insert(wrong.status.sentence);
  const std::set<std::string> written = sentences::of_headers({"torch.hpp", "torch_device.hpp"});
  EXPECT_GT(written.size(), 18u);
  sentences::expect_raised(written, raised);
}

TEST_F(Torch, AFailurePassesItsStatusOnAndTouchesNothing) {
  Pruner<> pruner;
  const Kept kept = pruner.prune(probabilities(at::Tensor()), one_image);
  EXPECT_EQ(kept.code(), Errc::null_data);
  EXPECT_TRUE(pruner.scores().empty());
  at::Tensor hidden = at::rand({1, n, 4});
  const at::Tensor before = hidden.clone(), room = at::zeros({n}, at::kInt);
  EXPECT_EQ(compact(kept, hidden, 1).code, Errc::null_data);
  EXPECT_EQ(kept_tensor(kept, hidden).code(), Errc::null_data);
  EXPECT_EQ(write_indices(kept, room).code, Errc::null_data);
  EXPECT_EQ(gather(kept, hidden, 1).code(), Errc::null_data);
  EXPECT_TRUE(hidden.equal(before));
  EXPECT_EQ(hidden.size(1), n);
  EXPECT_TRUE(room.equal(at::zeros({n}, at::kInt)));
}

TEST_F(Torch, AutogradNoticesWhatIsMovedInPlace) {
  Pruner<> pruner(settings(0.7));
  const Kept kept = some_kept(pruner);
  const at::Tensor weight = at::rand({4, 4}).requires_grad_(true);
  at::Tensor hidden = at::rand({n, 4});
  const at::Tensor loss = hidden.matmul(weight).sum();  // saves hidden for its gradient
  ASSERT_TRUE(compact(kept, hidden, 0));
  EXPECT_ANY_THROW(loss.backward());
  const c10::InferenceMode inference;
  at::Tensor positions = at::arange(n);
  EXPECT_TRUE(compact(kept, positions, 0));
}

// ---- on the device ------------------------------------------------------------------------------

// By ATen operations, as in every file that nvcc does not compile.
static_assert(!device::has_kernels, "g++ compiles no kernels");
struct Operations {
  static constexpr const char* name = "Operations";
  using Kernels = fastv::detail::NoKernels;
  static constexpr int effort = 10;
};
// By the kernels of cuda.cuh, which the tests' GPU runs where CPU tensors are.
struct HostStreams {
  using Queue = emulation::Queue;
  static bool reads(const at::Tensor& tensor) { return tensor.is_cpu(); }
  static Queue of(const at::Tensor&) {
    static oracle::Rng rng(3);
    return emulation::Queue(rng);
  }
};
struct OnKernels {
  static constexpr const char* name = "Kernels";
  using Kernels = fastv::detail::TorchKernels<HostStreams>;
  static constexpr int effort = 1;  // they take their time
};

// The functions of fastv::device on either.
template <class Path>
class OnTheDevice : public Torch {
 protected:
  using Kernels = typename Path::Kernels;
  void TearDown() override { EXPECT_EQ(emulation::faults(), std::set<std::string>{}); }

  static Result<at::Tensor> prune(const Config& config, const at::Tensor& attention, Span<const TokenSpan> visual,
                                  std::size_t past = 0) {
    return fastv::detail::device_prune<Kernels>(config, fastv::detail::device_evidence(attention, past), visual);
  }
  static Result<at::Tensor> prune(const Config& config, const at::Tensor& q, const at::Tensor& k, double scale,
                                  Span<const TokenSpan> visual, std::size_t past = 0) {
    return fastv::detail::device_prune<Kernels>(config, fastv::detail::device_evidence(q, k, scale, past), visual);
  }
  static Result<at::Tensor> scores(const Config& config, const at::Tensor& attention, Span<const TokenSpan> visual,
                                   std::size_t past = 0) {
    return fastv::detail::device_scores<Kernels>(config, fastv::detail::device_evidence(attention, past), visual);
  }
  static Result<at::Tensor> scores(const Config& config, const at::Tensor& q, const at::Tensor& k, double scale,
                                   Span<const TokenSpan> visual, std::size_t past = 0) {
    return fastv::detail::device_scores<Kernels>(config, fastv::detail::device_evidence(q, k, scale, past), visual);
  }
  static Result<at::Tensor> select(const Config& config, const at::Tensor& scores, Span<const TokenSpan> visual,
                                   std::size_t tokens) {
    return fastv::detail::device_select<Kernels>(config, scores, visual, tokens);
  }
};
struct PathName {
  template <class Path>
  static std::string GetName(int) {
    return Path::name;
  }
};
using Paths = ::testing::Types<Operations, OnKernels>;
TYPED_TEST_SUITE(OnTheDevice, Paths, PathName);

// Settings and spans that exercise every count the device path shares with the core.
struct Ask {
  Config config;
  std::vector<TokenSpan> visual;
};
std::vector<Ask> asks() {
  static const Index listed[] = {35, 39, 37}, prior[] = {34, 36};
  std::vector<Ask> all;
  for (const double ratio : {0.0, 0.25, 0.5, 0.9, 1.0}) all.push_back({settings(ratio), one_image});
  const std::vector<TokenSpan> images = {{0, 5}, {7, 12}, {20, 6, 0, true}, {30, 4}};
  for (const Quota quota : {Quota::per_image, Quota::pooled})
    for (const std::size_t count : {by_ratio, std::size_t{11}, std::size_t{3}})
      for (const std::size_t least : {0u, 2u}) {
        all.push_back({settings(0.6), images});
        all.back().config.quota = quota;
        all.back().config.keep_count = count;
        all.back().config.min_per_image = least;
      }
  all.push_back(
      {settings(0.5), {{0, 5, 0, false, 0, 0.2}, {7, 12}, {30, 4, 0, false, 0, 1.0}}});  // ratios of their own
  all.push_back({settings(0.5), {{0, 10}, {10, 12}, {22, 3, 0, true}}});                 // side by side
  all.push_back(
      {settings(0.5), {{2, 0, 0, false, 9}, {4, 10, 0, false, 20}, {14, 0, 0, false, 3}, {30, 6}}});  // emptied
  all.back().config.ratio_of = RatioOf::original;
  all.push_back({settings(0.5), {{2, 0, 0, false, 9}}});
  all.push_back({settings(0.5, ScoreRows::all), one_image});
  all.push_back({settings(0.5, ScoreRows::all), {{4, 36}}});  // the last token is visual
  all.push_back({settings(0.5, ScoreRows::listed), one_image});
  all.back().config.listed_rows = listed;
  all.push_back({settings(0.5), one_image});
  all.back().config.prior_rows = prior;
  all.push_back({settings(0.5), {}});
  return all;
}

TYPED_TEST(OnTheDevice, TheSameStayAsInTheCoreTiesIncluded) {
  for (int round = 0; round < TypeParam::effort; ++round)
    for (const at::ScalarType type : element_types)
      for (const Ask& ask : asks()) {
        if (!ask.config.prior_rows.empty()) continue;  // logarithms round
        const std::int64_t past = round % 3;
        at::Tensor attention = with_ties({1, 4, n, past + n}).tril(past).to(type);
        if (round % 2 == 1) attention = attention.transpose(1, 2).contiguous().transpose(1, 2);
        // The rows at hand are the prompt's last ones.
        if (round % 3 == 0 && ask.config.score_rows != ScoreRows::all) attention = attention.narrow(2, n - 6, 6);
        auto evidence = probabilities(attention);
        evidence.value.past = static_cast<std::size_t>(past);
        Pruner<> pruner(ask.config);
        const Kept kept = pruner.prune(evidence, ask.visual);
        ASSERT_TRUE(kept) << kept.message().c_str();
        const auto on_device = this->prune(ask.config, attention, ask.visual, static_cast<std::size_t>(past));
        ASSERT_TRUE(on_device) << on_device.message().c_str();
        EXPECT_EQ(on_device->scalar_type(), at::kLong);
        ASSERT_EQ(values_of(*on_device), values_of(kept));
        if (visual_tokens(ask.visual) == 0) continue;
        const auto scores = this->scores(ask.config, attention, ask.visual, static_cast<std::size_t>(past));
        ASSERT_TRUE(scores) << scores.message().c_str();
        EXPECT_EQ(scores->scalar_type(), type == at::kDouble ? at::kDouble : at::kFloat);
        EXPECT_EQ(values_of(*this->select(ask.config, *scores, ask.visual, n)), values_of(kept));
      }
}

// Random spans and settings, right and wrong, on scores with ties and NaN: the core's indices, or the core's refusal.
TYPED_TEST(OnTheDevice, SelectionIsTheCoresWhateverTheSettings) {
  std::mt19937 random(5);
  const auto below = [&](std::size_t bound) {
    return std::uniform_int_distribution<std::size_t>(0, bound - 1)(random);
  };
  std::map<Errc, int> seen;
  for (int round = 0; round < 400 * TypeParam::effort; ++round) {
    std::vector<TokenSpan> visual;
    std::size_t tokens = below(3), images = below(6);
    for (std::size_t i = 0; i < images; ++i) {
      TokenSpan span{tokens, below(5) == 0 ? 0 : 1 + below(9)};
      span.continues = i > 0 && below(4) == 0;
      if (span.count == 0 || below(3) == 0) span.original = span.count + 1 + below(4);
      if (!span.continues && below(4) == 0) span.filtering_ratio = 0.25 * static_cast<double>(below(5));
      visual.push_back(span);
      tokens += span.count + (below(3) == 0 ? 0 : below(4));
    }
    tokens += 1 + below(3);
    Config config = settings(0.1 * static_cast<double>(below(11)));
    const std::size_t total = visual_tokens(visual);
    config.quota = below(2) == 0 ? Quota::pooled : Quota::per_image;
    if (below(3) == 0) config.keep_count = below(total + 2);
    config.min_per_image = below(2) * below(4);
    config.ratio_of = below(2) == 0 ? RatioOf::original : RatioOf::remaining;
    config.rounding = below(2) == 0 ? Rounding::up : Rounding::half_even;
    const at::Tensor own = with_ties({static_cast<std::int64_t>(total)}).sub(0.5).add(0.01);  // of either sign, none 0
    if (total > 2 && below(2) == 0) own[static_cast<std::int64_t>(below(total))] = std::nan("");
    Pruner<> pruner(config);
    const Kept kept = pruner.prune(fastv::scores(own, tokens), visual);
    const auto on_device = this->select(config, own, visual, tokens);
    ++seen[kept.code()];
    ASSERT_EQ(on_device.code(), kept.code()) << kept.message().c_str() << " / " << on_device.message().c_str();
    if (kept) {
      ASSERT_EQ(values_of(*on_device), values_of(kept)) << round;
    } else {
      EXPECT_STREQ(on_device.message().c_str(), kept.message().c_str());
    }
  }
  EXPECT_GT(seen[Errc::ok], 150 * TypeParam::effort);
  EXPECT_GT(seen[Errc::bad_prompt], 10 * TypeParam::effort);
  EXPECT_GT(seen[Errc::bad_setting], 0);
}

TYPED_TEST(OnTheDevice, NaNRanksLowest) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const double ratio : {0.1, 0.5, 0.9}) {
    at::Tensor attention = with_ties({4, 1, n});
    for (const std::int64_t column : {5, 6, 11, 20, 33}) attention[column % 4][0][column] = nan;
    Pruner<> pruner(settings(ratio));
    const Kept kept = pruner.prune(probabilities(attention), one_image);
    ASSERT_TRUE(kept);
    EXPECT_EQ(kept.nan_scores, 5u);
    EXPECT_EQ(values_of(*this->prune(settings(ratio), attention, one_image)), values_of(kept));
  }
  // Corrected by a prior, a NaN stays with its token.
  const Index separator[] = {35};
  Config corrected = settings(0.5);
  corrected.prior_rows = separator;
  const at::Tensor map = with_ties({4, n, n}).add(0.01);
  map[2][n - 1][11] = nan;
  Pruner<> by_core(corrected);
  ASSERT_TRUE(by_core.prune(probabilities(map), one_image));
  const at::Tensor on_device = *this->scores(corrected, map, one_image);
  for (std::int64_t i = 0; i < 30; ++i) {
    EXPECT_EQ(std::isnan(on_device[i].item<double>()), i == 11 - 4);
    if (i == 11 - 4) continue;
    EXPECT_NEAR(on_device[i].item<double>(), by_core.scores()[static_cast<std::size_t>(i)], 2e-6);
  }
  // What the core reports the device cannot know: it keeps the planned count, the earliest.
  for (const float value : {nan, 0.0f, -0.0f}) {
    const at::Tensor attention = at::full({4, 1, n}, value);
    Pruner<> pruner(settings(0.5));
    EXPECT_EQ(pruner.prune(probabilities(attention), one_image).code(), Errc::bad_value);
    EXPECT_EQ(values_of(*this->prune(settings(0.5), attention, one_image)),
              kept_by_sorting(at::zeros({30}), 15, one_image[0], n));
  }
}

TYPED_TEST(OnTheDevice, ScoresFromQueriesAndKeysAreTheCores) {
  for (const at::ScalarType query_type : element_types)
    for (const at::ScalarType key_type : element_types)
      for (const std::int64_t kv_heads : {4, 2, 1})
        for (const Ask& ask : asks()) {
          const std::int64_t past = kv_heads % 3;
          const std::int64_t queries = kv_heads == 2 && ask.config.score_rows != ScoreRows::all ? 6 : n;
          const at::Tensor q = at::randn({1, queries, 4, 8}).to(query_type).transpose(1, 2),
                           k = at::randn({1, kv_heads, past + n, 8}).to(key_type);
          auto evidence = query_key(q, k, 0.35f);
          evidence.value.past = static_cast<std::size_t>(past);
          Pruner<> pruner(ask.config);
          const Kept kept = pruner.prune(evidence, ask.visual);
          ASSERT_TRUE(kept) << kept.message().c_str();
          const auto on_device = this->scores(ask.config, q, k, 0.35f, ask.visual, static_cast<std::size_t>(past));
          ASSERT_TRUE(on_device) << on_device.message().c_str();
          EXPECT_EQ(on_device->scalar_type(), key_type == at::kDouble ? at::kDouble : at::kFloat);
          ASSERT_EQ(on_device->size(0), static_cast<std::int64_t>(pruner.scores().size()));
          for (std::size_t i = 0; i < pruner.scores().size(); ++i)
            EXPECT_NEAR(pruner.scores()[i], (*on_device)[static_cast<std::int64_t>(i)].template item<double>(), 2e-6);
          // The same scores select the same tokens; those of two ways of summing may differ in their last bit.
          Config own = ask.config;
          own.prior_rows = {};
          own.score_rows = ScoreRows::last;
          Pruner<double> chooser(own);
          const at::Tensor wide = on_device->to(at::kDouble);
          EXPECT_EQ(values_of(*this->prune(ask.config, q, k, 0.35f, ask.visual, static_cast<std::size_t>(past))),
                    values_of(chooser.prune(fastv::scores(wide, n), ask.visual)));
        }
}

TEST_F(Torch, OnTheDeviceNoValueIsRead) {
  // Meta tensors have no values: an operation that waited for one would throw.
  for (const at::ScalarType type : element_types)
    for (const Ask& ask : asks()) {
      // Rows other than the last or all are picked by index_select(), which LibTorch 1.13 has no meta kernel of.
      if (ask.config.score_rows == ScoreRows::listed || !ask.config.prior_rows.empty()) continue;
      const auto meta = at::TensorOptions(at::kMeta).dtype(type);
      const at::Tensor attention = at::empty({1, 4, n, n}, meta);
      const at::Tensor q = at::empty({1, 4, n, 8}, meta), k = at::empty({1, 2, n, 8}, meta);
      const auto plan = make_plan(ask.config, {static_cast<std::size_t>(n), 4, ask.visual});
      for (const auto& kept :
           {device::prune(ask.config, attention, ask.visual), device::prune(ask.config, q, k, 0.35, ask.visual)}) {
        ASSERT_TRUE(kept) << kept.message().c_str();
        EXPECT_TRUE(kept->is_meta());
        EXPECT_EQ(kept->size(0), static_cast<std::int64_t>(plan->kept()));
      }
    }
}

// Names of the operations that run kernels, in order, while `body` runs; and how often the dispatcher is asked, by those
// and by what they call.
struct Counted {
  std::vector<std::string> names;
  int calls = 0;
};
Counted counted(const std::function<void()>& body) {
  static Counted all;
  all = {};
  static const std::set<std::string> views = {
      "aten::narrow",         "aten::slice",       "aten::as_strided", "aten::detach", "aten::squeeze",
      "aten::unsqueeze",      "aten::transpose",   "aten::reshape",    "aten::view",   "aten::expand",
      "aten::empty",          "aten::new_empty",   "detach",           "aten::to",     "aten::resize_",
      "aten::_reshape_alias", "aten::result_type", "aten::select"};
  static int depth = 0;
  const auto handle =
      at::addThreadLocalCallback(at::RecordFunctionCallback(
                                     [](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
                                       const std::string name = function.name();
                                       if (depth++ == 0 && views.count(name) == 0) all.names.push_back(name);
                                       ++all.calls;
                                       return nullptr;
                                     },
                                     [](const at::RecordFunction&, at::ObserverContext*) { --depth; })
                                     .scopes({at::RecordScope::FUNCTION}));
  body();
  at::removeCallback(handle);
  return all;
}
std::vector<std::string> operations(const std::function<void()>& body) { return counted(body).names; }

TEST_F(Torch, OnTheDeviceFewOperationsHoweverManyImages) {
  const at::Tensor q = at::randn({1, 4, 1, 8}), k = at::randn({1, 2, n, 8}), map = at::rand({1, 4, 1, n});
  using Names = std::vector<std::string>;
  const Names of_map = {"aten::mean", "aten::new_full", "aten::nan_to_num", "aten::sort", "aten::sort"};
  EXPECT_EQ(operations([&] { EXPECT_TRUE(device::prune({}, map, one_image)); }), of_map);
  Names of_query_key = {"aten::new_zeros", "aten::baddbmm_", "aten::softmax"};  // no zeros on a GPU
  of_query_key.insert(of_query_key.end(), of_map.begin(), of_map.end());
  EXPECT_EQ(operations([&] { EXPECT_TRUE(device::prune({}, q, k, 0.35, one_image)); }), of_query_key);
  // Spans side by side are one piece, and an emptied image is none.
  Config pooled;
  pooled.quota = Quota::pooled;
  const std::vector<TokenSpan> one_piece = {{2, 0, 0, false, 9}, {4, 10}, {14, 20}};
  EXPECT_EQ(operations([&] { EXPECT_TRUE(device::prune(pooled, map, one_piece)); }), of_map);
  // Nothing to drop, nothing to rank.
  EXPECT_EQ(operations([&] { EXPECT_TRUE(device::prune(settings(0), map, one_image)); }), Names{"aten::arange"});
  EXPECT_EQ(operations([&] { EXPECT_TRUE(device::prune({}, map, {})); }), Names{"aten::arange"});
  std::set<Names> of_many;
  for (const std::size_t images : {2u, 3u, 12u}) {
    std::vector<TokenSpan> visual;
    for (std::size_t i = 0; i < images; ++i) visual.push_back({3 * i, 2});
    of_many.insert(operations([&] { EXPECT_TRUE(device::prune({}, map, visual)); }));
  }
  EXPECT_EQ(of_many.size(), 1u);
}

// What the authors' code does to the map (examples/libtorch/torch_compare.cpp), and to a row of its own.
TEST_F(Torch, OnTheDeviceFewerOperationsThanTheAuthors) {
  constexpr std::int64_t first = 35, image = 576, tokens = 631;
  const std::vector<TokenSpan> visual = {{first, image}};
  const at::Tensor q = at::randn({1, 4, 1, 8}), k = at::randn({1, 4, tokens, 8}), map = at::rand({1, 4, 1, tokens});
  at::Tensor theirs;
  const auto authors = [&](const at::Tensor& attention) {
    const at::Tensor row = attention.mean(1)[0][-1].slice(0, first, first + image);
    const at::Tensor best = std::get<1>(row.topk(image / 2)) + first;
    theirs = std::get<0>(at::cat({at::arange(first), best, at::arange(first + image, tokens)}).sort());
  };
  const at::NoGradGuard no_grad;
  const auto expect_fewer = [&](const Counted& ours, const Counted& of_authors, const at::Tensor& kept) {
    EXPECT_LT(ours.names.size(), of_authors.names.size());
    EXPECT_LT(ours.calls, of_authors.calls);
    EXPECT_EQ(values_of(kept), values_of(theirs));
  };
  at::Tensor kept;
  const Counted by_map = counted([&] { kept = *device::prune({}, map, visual); });
  expect_fewer(by_map, counted([&] { authors(map); }), kept);
  const Counted by_vectors = counted([&] { kept = *device::prune({}, q, k, 0.35, visual); });
  expect_fewer(by_vectors, counted([&] { authors(q.matmul(k.transpose(2, 3)).mul(0.35).softmax(-1)); }), kept);
}

// ---- by kernels ---------------------------------------------------------------------------------

// A tensor of the same values that lies otherwise.
at::Tensor laid_out(oracle::Rng& rng, const at::Tensor& t) {
  switch (rng.below(4)) {
    case 0: return t.transpose(0, 1).contiguous().transpose(0, 1);  // token by token
    case 1: {                                                       // a part of a larger cache
      const at::Tensor cache = at::full({t.size(0), t.size(1) + 7, t.size(2)}, 7, t.options());
      cache.narrow(1, 3, t.size(1)).copy_(t);
      return cache.narrow(1, 3, t.size(1));
    }
    case 2: return t.unsqueeze(0);
    default: return t;
  }
}

// Text tokens behind the last visual one.
std::size_t tokens_behind(const std::vector<TokenSpan>& visual, std::size_t tokens) {
  return tokens - (visual.back().first + visual.back().count);
}

// Every rule, quota, window, grid and prior; every choice of rows; queries and keys, or a map, in three types and any
// strides: what the core keeps, to the token, and what ATen operations keep where they can.
template <class Kernels>
void kernels_keep_what_the_core_keeps(std::uint64_t seed) {
  oracle::Rng rng(seed);
  const at::ScalarType types[] = {at::kFloat, at::kHalf, at::kBFloat16};
  batches::Sequence s;
  const bool with_grids = rng.chance(0.4);
  batches::random_prompt(rng, 4, 40, with_grids, s);
  const auto tokens = static_cast<std::int64_t>(s.tokens);
  Config config = batches::random_config(rng, with_grids, false);
  std::vector<Index> listed, prior;
  const std::size_t spare = tokens_behind(s.visual, s.tokens);
  if (rng.chance(0.5)) {
    config.score_rows = rng.chance(0.5) ? ScoreRows::all : ScoreRows::listed;
    for (std::size_t i = rng.between(1, 3); i > 0; --i)
      listed.push_back(static_cast<Index>(s.tokens - 1 - rng.below(spare)));
    if (config.score_rows == ScoreRows::listed) config.listed_rows = listed;
  }
  if (rng.chance(0.3)) {
    prior = {static_cast<Index>(s.tokens - 1 - rng.below(spare))};
    config.prior_rows = prior;
  }
  const std::int64_t past = static_cast<std::int64_t>(rng.below(3)),
                     kv_heads = static_cast<std::int64_t>(rng.between(1, 3)),
                     group = static_cast<std::int64_t>(rng.between(1, 9)),
                     dim = 4 * static_cast<std::int64_t>(rng.between(1, 20));
  const std::int64_t queries =
      config.score_rows == ScoreRows::all ? tokens : static_cast<std::int64_t>(rng.between(spare, s.tokens));
  const at::Tensor q = laid_out(rng, at::randn({kv_heads * group, queries, dim}).to(types[rng.below(3)]));
  const at::Tensor k = laid_out(rng, at::randn({kv_heads, past + tokens, dim}).to(types[rng.below(3)]));
  const at::Tensor map = laid_out(rng, at::rand({kv_heads * group, queries, past + tokens}).to(types[rng.below(3)]));
  const double scale = 1 / std::sqrt(static_cast<double>(dim));
  const auto p = static_cast<std::size_t>(past);

  const auto check = [&](const Result<at::Tensor>& on_kernels, const Result<at::Tensor>& by_operations, auto evidence) {
    evidence.value.past = p;
    Pruner<> core(config);
    const Kept kept = core.prune(evidence, s.visual);
    if (kept.code() == Errc::bad_value) return;  // a prior row that ranks as well: all scores are 0, which values tell
    ASSERT_EQ(on_kernels.code(), kept.code()) << on_kernels.message().c_str() << " / " << kept.message().c_str();
    if (!kept) return;
    ASSERT_EQ(values_of(*on_kernels), values_of(kept)) << seed;
    if (by_operations.code() == Errc::not_supported) return;
    ASSERT_EQ(values_of(*by_operations), values_of(kept)) << seed << by_operations.message().c_str();
  };
  const std::size_t launches = emulation::Queue::launches();
  const auto by_map = fastv::detail::device_prune<Kernels>(config, fastv::detail::device_evidence(map, p), s.visual);
  check(by_map, device::prune(config, map, s.visual, p), probabilities(map));
  const auto by_vectors =
      fastv::detail::device_prune<Kernels>(config, fastv::detail::device_evidence(q, k, scale, p), s.visual);
  check(by_vectors, device::prune(config, q, k, scale, s.visual, p), query_key(q, k, static_cast<float>(scale)));
  if (by_map && by_map->size(0) < tokens) {
    EXPECT_GE(emulation::Queue::launches(), launches + 8) << "the kernels have not been used";
  }
}

TEST(TorchKernels, KeepWhatTheCoreKeeps) {
  at::manual_seed(17);
  for (std::uint64_t seed = 0; seed < 150 && !testing::Test::HasFatalFailure(); ++seed)
    kernels_keep_what_the_core_keeps<OnKernels::Kernels>(seed);
  // Of many rows some at a time.
  for (std::uint64_t seed = 0; seed < 50 && !testing::Test::HasFatalFailure(); ++seed)
    kernels_keep_what_the_core_keeps<fastv::detail::TorchKernels<HostStreams, 10000>>(seed);
  EXPECT_EQ(emulation::faults(), std::set<std::string>{});
}

// Selection::diverse compares tokens by the keys that are handed over.
TEST(TorchKernels, CompareTokensByTheirKeys) {
  at::manual_seed(18);
  const Diversity rules[] = {{Novelty::nearest, Blend::sum, 0},
                             {Novelty::nearest, Blend::product, 1, 0.5},
                             {Novelty::coverage, Blend::sum, 0.5},
                             {Novelty::volume, Blend::product, 2}};
  for (const Diversity& diversity : rules) {
    Config config;
    config.selection = Selection::diverse;
    config.filtering_ratio = 0.7;
    config.diversity = diversity;
    const at::Tensor q = at::randn({4, 1, 8}), k = at::randn({2, 3 + n, 8});
    const auto ours = fastv::detail::device_prune<OnKernels::Kernels>(
        config, fastv::detail::device_evidence(q, k, 0.35, 3), one_image);
    ASSERT_TRUE(ours) << ours.message().c_str();
    const auto keys = fastv::heads(static_cast<const float*>(k.data_ptr()), HeadMajor{2, 3 + n, 8});
    auto attention =
        fastv::query_key(fastv::heads(static_cast<const float*>(q.data_ptr()), HeadMajor{4, 1, 8}), keys, 0.35f);
    attention.past = 3;
    Pruner<> core(config);
    const Kept kept = core.prune(with_features(attention, Features{keys, 3}), one_image);
    ASSERT_TRUE(kept) << kept.message().c_str();
    EXPECT_EQ(values_of(*ours), values_of(kept));
  }
  EXPECT_EQ(emulation::faults(), std::set<std::string>{});
}

// What they do not take is ATen's.
TEST(TorchKernels, LeaveTheRestToATen) {
  at::manual_seed(17);
  using Kernels = OnKernels::Kernels;
  const at::Tensor q = at::randn({4, 1, 8}), k = at::randn({2, n, 8}), map = at::rand({4, 1, n});
  const auto by_vectors = [&](const at::Tensor& query, const at::Tensor& key) {
    const auto kept =
        fastv::detail::device_prune<Kernels>({}, fastv::detail::device_evidence(query, key, 0.35, 0), one_image);
    ASSERT_TRUE(kept) << kept.message().c_str();
    EXPECT_EQ(values_of(*kept), values_of(*device::prune({}, query, key, 0.35, one_image)));
  };
  by_vectors(q.to(at::kDouble), k);
  by_vectors(q, k.to(at::kDouble));
  by_vectors(at::stack({q, q}, 3).select(3, 0), k);            // elements of a query lie apart
  by_vectors(q, k.narrow(0, 0, 1).expand({2, n, 8}));          // two heads in one place
  by_vectors(at::randn({4, 1, 640}), at::randn({2, n, 640}));  // more than a block has room for
  const auto by_map = [&](const at::Tensor& attention) {
    const auto kept = fastv::detail::device_prune<Kernels>({}, fastv::detail::device_evidence(attention, 0), one_image);
    ASSERT_TRUE(kept) << kept.message().c_str();
    EXPECT_EQ(values_of(*kept), values_of(*device::prune({}, attention, one_image)));
  };
  by_map(map.to(at::kDouble));
  by_map(map.narrow(0, 0, 1).expand({4, 1, n}));
  const at::Tensor scores = at::rand({60});
  for (const at::Tensor& each :
       {scores.slice(0, 0, 60, 2), scores.to(at::kDouble).narrow(0, 0, 30), scores.narrow(0, 0, 30).to(at::kHalf)})
    EXPECT_EQ(values_of(*fastv::detail::device_select<Kernels>({}, each, one_image, n)),
              values_of(*device::select({}, each, one_image, n)));
  // A setting that neither has: ATen's sentence.
  Config windows;
  windows.window_rows = windows.window_columns = 2;
  const std::vector<TokenSpan> grid = {{4, 30, 6}};
  EXPECT_EQ(fastv::detail::device_prune<Kernels>(windows, fastv::detail::device_evidence(map.to(at::kDouble), 0), grid)
                .code(),
            Errc::not_supported);
  Config diverse;
  diverse.selection = Selection::diverse;
  EXPECT_EQ(fastv::detail::device_prune<Kernels>(diverse, fastv::detail::device_evidence(map, 0), one_image).code(),
            Errc::not_supported);
  EXPECT_EQ(emulation::faults(), std::set<std::string>{});
}

}  // namespace

// The LibTorch adaptor: views without copies, what moves, errors, and the on-device path held to the core.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fastv/fastv.hpp>
#include <fastv/torch_device.hpp>
#include <functional>
#include <limits>
#include <set>

namespace {

using namespace fastv;

const at::ScalarType element_types[] = {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16};
const std::vector<TokenSpan> one_picture = {{4, 30}};
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

// Multiples of 1/16 below 1: every mean over 2, 4 or 8 heads is exact in any order of summing, and many are equal.
at::Tensor with_ties(at::IntArrayRef shape) { return at::randint(0, 16, shape, at::kFloat).div(16); }

// Attention of the last `rows` rows of q [heads, rows, dim] and k [kv heads, keys, dim], written out plainly.
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
      Result<TensorProbabilities> evidence = probabilities(tensor);
      ASSERT_TRUE(evidence) << evidence.message().c_str();
      EXPECT_EQ(evidence->type(), type);
      evidence->visit([&](const auto& view) {
        EXPECT_EQ(static_cast<const void*>(view.data), tensor.data_ptr());
        EXPECT_EQ(view.heads, 2u);
        EXPECT_EQ(view.rows, 3u);
        EXPECT_EQ(view.keys, static_cast<std::size_t>(n));
      });
      const at::Tensor expected = tensor.reshape({2, 3, n}).select(1, 2).to(at::kDouble).mean(0).narrow(0, 4, 30);
      Pruner<double> pruner(settings(0.6));
      const Kept kept = pruner.prune(probabilities(tensor), one_picture);
      ASSERT_TRUE(kept) << kept.message().c_str();
      EXPECT_EQ(values_of(kept), kept_by_sorting(expected, 12, one_picture[0], n));
      for (std::size_t i = 0; i < 30; ++i)
        EXPECT_NEAR(pruner.scores()[i], expected[static_cast<std::int64_t>(i)].item<double>(), 1e-12);
    }
  }
}

TEST_F(Torch, QueriesAndKeysAreReadWhereTheyLieInEveryElementTypeAndStride) {
  for (const at::ScalarType type : element_types) {
    const at::Tensor q = at::randn({4, 2, 8}).to(type), k = at::randn({2, n, 8}).to(type);
    // [rows, heads, dim] transposed; keys of a larger cache, head-major and token-major.
    const at::Tensor q_view = q.transpose(0, 1).contiguous().transpose(0, 1);
    const at::Tensor cache = at::zeros({2, n + 24, 8}, type), token_major = at::zeros({n + 24, 2, 8}, type);
    cache.narrow(1, 5, n).copy_(k);
    token_major.narrow(0, 7, n).copy_(k.transpose(0, 1));
    const at::Tensor expected = attention_of(q, k, 0.35).select(1, 1).mean(0).narrow(0, 4, 30);
    for (const at::Tensor& query : {q, q_view, q.unsqueeze(0)})
      for (const at::Tensor& key :
           {k, cache.narrow(1, 5, n), token_major.narrow(0, 7, n).transpose(0, 1), k.unsqueeze(0)}) {
        const auto evidence = query_key(query, key, 0.35f);
        ASSERT_TRUE(evidence) << evidence.message().c_str();
        evidence->visit([&](const auto& view) {
          EXPECT_EQ(static_cast<const void*>(view.query), query.data_ptr());
          EXPECT_EQ(static_cast<const void*>(view.key), key.data_ptr());
        });
        Pruner<> pruner(settings(0.6));
        const Kept kept = pruner.prune(evidence, one_picture);
        ASSERT_TRUE(kept) << kept.message().c_str();
        for (std::size_t i = 0; i < 30; ++i)
          EXPECT_NEAR(pruner.scores()[i], expected[static_cast<std::int64_t>(i)].item<double>(), 1e-6);
        const at::Tensor scores = at::empty({30}, at::kFloat);
        std::copy(pruner.scores().begin(), pruner.scores().end(), scores.data_ptr<float>());
        EXPECT_EQ(values_of(kept), kept_by_sorting(scores, 12, one_picture[0], n));
      }
  }
}

TEST_F(Torch, FieldsOfAViewAreSetInPlace) {
  const at::Tensor q = at::randn({2, 1, 8}), k = at::randn({2, n + 6, 8});
  auto evidence = query_key(q, k, 0.35f);
  evidence.value.visit([](auto& view) { view.past = 6; });
  Pruner<> pruner(settings(0.5));
  ASSERT_TRUE(pruner.prune(evidence, one_picture));
  const at::Tensor expected = attention_of(q, k, 0.35).select(1, 0).mean(0).narrow(0, 4 + 6, 30);
  for (std::size_t i = 0; i < 30; ++i)
    EXPECT_NEAR(pruner.scores()[i], expected[static_cast<std::int64_t>(i)].item<double>(), 1e-6);
}

TEST_F(Torch, ScoresOfYourOwn) {
  for (const at::ScalarType type : element_types) {
    const at::Tensor own = with_ties({30}).to(type);
    Pruner<> pruner(settings(0.5));
    const Kept kept = pruner.prune(scores(own, n), one_picture);
    ASSERT_TRUE(kept) << kept.message().c_str();
    EXPECT_EQ(values_of(kept), kept_by_sorting(own, 15, one_picture[0], n));
  }
}

// ---- what moves ---------------------------------------------------------------------------------

Kept some_kept(Pruner<>& pruner) { return pruner.prune(probabilities(at::rand({2, 1, n})), one_picture); }

TEST_F(Torch, CompactRowsIsIndexSelectInPlace) {
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
      {at::randint(0, 99, {3, n}, at::kLong), 1},                  // on three axes
      {at::randn({1, 2, n, 8}).to(at::kHalf), 2},                  // a head-major cache
      {at::randn({1, n, 2, 8}).to(at::kBFloat16).transpose(1, 2), 2},
      {at::randn({2, n + 5, 8}).narrow(1, 0, n), 1},  // of larger capacity
      {at::randn({1, 2, n, 8}).transpose(2, 3), 3},   // keys stored transposed
      {at::randint(0, 2, {n}, at::kBool), 0},         // a padding mask
      {at::randint(0, 99, {n, 1, 3}, at::kInt), 0},
      {at::randn({n, 0}), 0},
  };
  for (const Layout& layout : layouts) {
    at::Tensor tensor = layout.tensor;
    const void* data = tensor.data_ptr();
    const at::Tensor expected = tensor.index_select(layout.dim, indices);
    const Status status = compact_rows(kept, tensor, layout.dim);
    ASSERT_TRUE(status) << status.message().c_str();
    EXPECT_EQ(tensor.data_ptr(), data);
    EXPECT_TRUE(tensor.equal(expected)) << tensor.sizes() << " along " << layout.dim;
  }
}

TEST_F(Torch, CompactRowsIsIndexSelectInAnyLayoutOrSaysWhyNot) {
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
    const Status status = compact_rows(kept, tensor, dim);
    if (status) {
      ASSERT_TRUE(tensor.equal(expected)) << whole.sizes() << tensor.strides() << " along " << dim;
      ++moved;
    } else {
      ASSERT_EQ(status.code, Errc::tensor_rows) << status.message().c_str();
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
  const auto gathered = gather_rows(kept, hidden, -2);
  ASSERT_TRUE(gathered);
  EXPECT_TRUE(gathered->equal(hidden.index_select(1, *indices)));
  EXPECT_TRUE(gathered->requires_grad());  // autograd sees it
  EXPECT_TRUE(kept_tensor(kept, hidden.to(at::kMeta))->is_meta());
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
  const auto compacted = [&](at::Tensor tensor, std::int64_t dim) { return compact_rows(kept, tensor, dim); };
  const auto on_device = [&](Config config) { return prune_on_device(config, a, one_picture).status; };
  Config uniform, share, windows;
  uniform.selection = Selection::uniform;
  share.uniform_share = 0.5;
  windows.window_rows = windows.window_columns = 2;
  return {
      {Errc::tensor_undefined, {"attention"}, probabilities(undefined).status},
      {Errc::tensor_undefined, {"key"}, query_key(q, undefined, 1).status},
      {Errc::tensor_undefined, {"the tensor"}, compacted(undefined, 0)},
      {Errc::tensor_undefined, {"the tensor"}, kept_tensor(kept, undefined).status},
      {Errc::tensor_undefined, {"scores"}, scores(undefined, n).status},
      {Errc::tensor_undefined, {"query"}, device_scores({}, undefined, k, 1, one_picture).status},
      {Errc::tensor_dims, {"attention", "2 dimensions", "needs 3"}, probabilities(a[0]).status},
      {Errc::tensor_dims, {"key", "5 dimensions"}, query_key(q, k.unsqueeze(0).unsqueeze(0), 1).status},
      {Errc::tensor_dims, {"scores", "3 dimensions", "needs 1"}, scores(a, n).status},
      {Errc::tensor_dims, {"scores", "3 dimensions", "needs 1"}, select_on_device({}, a, one_picture, n).status},
      {Errc::tensor_no_dim, {"is 3 ", "has 3 "}, compacted(a.clone(), 3)},
      {Errc::tensor_no_dim, {"is -4 ", "has 3 "}, compacted(a.clone(), -4)},
      {Errc::tensor_no_dim, {"is 3 ", "has 3 "}, gather_rows(kept, a, 3).status},
      {Errc::tensor_batch, {"attention", "of 2,"}, probabilities(at::rand({2, 2, 1, n})).status},
      {Errc::tensor_batch, {"query", "of 3,"}, query_key(at::rand({3, 2, 1, 8}), k, 1).status},
      {Errc::tensor_type, {"Int "}, probabilities(a.to(at::kInt)).status},
      {Errc::tensor_type, {"ComplexFloat "}, query_key(q.to(at::kComplexFloat), k.to(at::kComplexFloat), 1).status},
      {Errc::tensor_type, {"Long "}, device_scores({}, a.to(at::kLong), one_picture).status},
      {Errc::tensor_types_differ, {"Half"}, query_key(q, k.to(at::kHalf), 1).status},
      {Errc::tensor_device, {"attention"}, probabilities(a.to(at::kMeta)).status},
      {Errc::tensor_device, {"key"}, query_key(q, k.to(at::kMeta), 1).status},
      {Errc::tensor_device, {"query"}, query_key(q.to(at::kMeta), k, 1).status},
      {Errc::tensor_device, {"the tensor"}, compacted(a.to(at::kMeta), 2)},
      {Errc::tensor_not_dense, {"attention"}, probabilities(a.to_sparse()).status},
      {Errc::tensor_not_dense, {"the tensor"}, compacted(a._neg_view(), 2)},
      {Errc::tensor_stride, {"query", " is 2 "}, query_key(at::rand({2, 1, 16}).slice(2, 0, 16, 2), k, 1).status},
      {Errc::tensor_stride, {"key", " is 40 "}, query_key(q, at::rand({2, 8, n}).transpose(1, 2), 1).status},
      {Errc::tensor_stride, {"scores", " is 2 "}, scores(at::rand({60}).slice(0, 0, 60, 2), n).status},
      {Errc::tensor_rows,
       {"dimension 0 ", "stride 1440,"},
       compacted(at::rand({2, 3, n, 12}).narrow(3, 0, 6).narrow(1, 0, 2), 2)},
      {Errc::tensor_tokens, {"dimension 0 ", "20 entries", "40 tokens"}, compacted(at::rand({20}), 0)},
      {Errc::tensor_tokens, {"dimension 2 ", "64 entries"}, compacted(at::rand({1, n, 64}), -1)},
      {Errc::tensor_tokens, {"dimension 0 ", "20 entries"}, gather_rows(kept, at::rand({20}), 0).status},
      {Errc::tensor_requires_grad, {"the tensor"}, compacted(at::rand({n}).requires_grad_(true), 0)},
      {Errc::head_dims_differ, {"query is 8", "key is 4"}, query_key(q, k.narrow(2, 0, 4), 1).status},
      {Errc::head_dims_differ,
       {"query is 8", "key is 4"},
       device_scores({}, q, k.narrow(2, 0, 4), 1, one_picture).status},
      {Errc::device_rule, {"Config::selection"}, on_device(uniform)},
      {Errc::device_rule, {"Config::uniform_share"}, on_device(share)},
      {Errc::device_rule, {"Config::window_rows"}, on_device(windows)},
      // of the core, met here
      {Errc::overlapping_stride, {"row stride"}, compacted(at::rand({1, 6}).expand({n, 6}), 0)},
      {Errc::span_past_end, {"34", "30 tokens"}, prune_on_device({}, a.narrow(2, 0, 30), one_picture).status},
      {Errc::scores_size, {"29 scores", "30 visual"}, select_on_device({}, at::rand({29}), one_picture, n).status},
      {Errc::heads_not_divisible,
       {"3 query", "2 KV"},
       device_scores({}, at::rand({3, 1, 8}), k, 1, one_picture).status},
      {Errc::bad_scale, {"nan"}, device_scores({}, q, k, std::nan(""), one_picture).status},
      {Errc::row_not_in_evidence, {"position 0 "}, on_device(settings(0.5, ScoreRows::all))},
      {Errc::ratio_out_of_range, {"1.5"}, on_device(settings(1.5))},
      {Errc::rows_above_keys, {"41 rows", "40 keys"}, device_scores({}, at::rand({2, 41, n}), one_picture).status},
      {Errc::no_heads, {"key"}, device_scores({}, q, at::rand({0, n, 8}), 1, one_picture).status},
      {Errc::no_dim, {"key"}, device_scores({}, at::rand({2, 1, 0}), at::rand({2, n, 0}), 1, one_picture).status},
  };
}

TEST_F(Torch, EachErrorNamesTheValueAndTheFix) {
  std::set<int> raised;
  for (const Wrong& wrong : all_wrong()) {
    const std::string sentence = wrong.status.message().c_str();
    EXPECT_EQ(wrong.status.code, wrong.code) << sentence;
    for (const char* name : wrong.names)
      EXPECT_NE(sentence.find(name), std::string::npos) << '"' << name << "\" is not in: " << sentence;
    raised.insert(static_cast<int>(wrong.status.code));
  }
  for (int code = static_cast<int>(Errc::tensor_undefined); code <= static_cast<int>(Errc::device_rule); ++code)
    EXPECT_EQ(raised.count(code), 1u) << "no test raises Errc " << code;
}

TEST_F(Torch, AFailurePassesItsStatusOnAndTouchesNothing) {
  Pruner<> pruner;
  const Kept kept = pruner.prune(probabilities(at::Tensor()), one_picture);
  EXPECT_EQ(kept.code(), Errc::tensor_undefined);
  EXPECT_TRUE(pruner.scores().empty());
  at::Tensor hidden = at::rand({1, n, 4});
  const at::Tensor before = hidden.clone();
  EXPECT_EQ(compact_rows(kept, hidden, 1).code, Errc::tensor_undefined);
  EXPECT_EQ(kept_tensor(kept, hidden).code(), Errc::tensor_undefined);
  EXPECT_EQ(gather_rows(kept, hidden, 1).code(), Errc::tensor_undefined);
  EXPECT_TRUE(hidden.equal(before));
}

TEST_F(Torch, AutogradNoticesWhatIsMovedInPlace) {
  Pruner<> pruner(settings(0.7));
  const Kept kept = some_kept(pruner);
  const at::Tensor weight = at::rand({4, 4}).requires_grad_(true);
  at::Tensor hidden = at::rand({n, 4});
  const at::Tensor loss = hidden.matmul(weight).sum();  // saves hidden for its gradient
  ASSERT_TRUE(compact_rows(kept, hidden, 0));
  EXPECT_ANY_THROW(loss.backward());
  const c10::InferenceMode inference;
  at::Tensor positions = at::arange(n);
  EXPECT_TRUE(compact_rows(kept, positions, 0));
}

// ---- on the device ------------------------------------------------------------------------------

// Settings and spans that exercise every count the device path shares with the core.
struct Ask {
  Config config;
  std::vector<TokenSpan> visual;
};
std::vector<Ask> asks() {
  static const Index listed[] = {35, 39, 37}, prior[] = {34, 36};
  std::vector<Ask> all;
  for (const double ratio : {0.0, 0.25, 0.5, 0.9, 1.0}) all.push_back({settings(ratio), one_picture});
  const std::vector<TokenSpan> pictures = {{0, 5}, {7, 12}, {20, 6, 0, true}, {30, 4}};
  for (const Quota quota : {Quota::per_picture, Quota::pooled})
    for (const std::size_t count : {by_ratio, std::size_t{11}}) {
      all.push_back({settings(0.6), pictures});
      all.back().config.quota = quota;
      all.back().config.keep_count = count;
      all.back().config.min_per_picture = 2;
    }
  all.push_back({settings(0.5, ScoreRows::all), one_picture});
  all.push_back({settings(0.5, ScoreRows::listed), one_picture});
  all.back().config.listed_rows = listed;
  all.push_back({settings(0.5), one_picture});
  all.back().config.prior_rows = prior;
  all.push_back({settings(0.5), {}});
  return all;
}

TEST_F(Torch, OnTheDeviceTheSameStayAsInTheCoreTiesIncluded) {
  for (int round = 0; round < 20; ++round)
    for (const at::ScalarType type : element_types)
      for (const Ask& ask : asks()) {
        if (!ask.config.prior_rows.empty()) continue;  // logarithms round
        at::Tensor attention = with_ties({1, 4, n, n}).tril().to(type);
        if (round % 2 == 1) attention = attention.transpose(1, 2).contiguous().transpose(1, 2);
        Pruner<> pruner(ask.config);
        const Kept kept = pruner.prune(probabilities(attention), ask.visual);
        ASSERT_TRUE(kept) << kept.message().c_str();
        const auto on_device = prune_on_device(ask.config, attention, ask.visual);
        ASSERT_TRUE(on_device) << on_device.message().c_str();
        EXPECT_EQ(on_device->scalar_type(), at::kLong);
        ASSERT_EQ(values_of(*on_device), values_of(kept));
      }
}

TEST_F(Torch, OnTheDeviceNaNRanksLowest) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const double ratio : {0.1, 0.5, 0.9}) {
    at::Tensor attention = with_ties({4, 1, n});
    for (const std::int64_t column : {5, 6, 11, 20, 33}) attention[column % 4][0][column] = nan;
    Pruner<> pruner(settings(ratio));
    const Kept kept = pruner.prune(probabilities(attention), one_picture);
    ASSERT_TRUE(kept);
    EXPECT_EQ(kept.nan_scores, 5u);
    EXPECT_EQ(values_of(*prune_on_device(settings(ratio), attention, one_picture)), values_of(kept));
  }
  // With all of them NaN the core reports; the device cannot know, and keeps the planned count, the earliest.
  const auto all = prune_on_device(settings(0.5), at::full({4, 1, n}, nan), one_picture);
  EXPECT_EQ(values_of(*all), kept_by_sorting(at::zeros({30}), 15, one_picture[0], n));
}

TEST_F(Torch, OnTheDeviceScoresFromQueriesAndKeysAreTheCores) {
  for (const at::ScalarType type : element_types)
    for (const std::int64_t kv_heads : {4, 2, 1})
      for (const Ask& ask : asks()) {
        const at::Tensor q = at::randn({1, 4, n, 8}).to(type), k = at::randn({1, kv_heads, n, 8}).to(type);
        Pruner<> pruner(ask.config);
        const Kept kept = pruner.prune(query_key(q, k, 0.35f), ask.visual);
        ASSERT_TRUE(kept) << kept.message().c_str();
        const auto on_device = device_scores(ask.config, q, k, 0.35f, ask.visual);
        ASSERT_TRUE(on_device) << on_device.message().c_str();
        ASSERT_EQ(on_device->size(0), static_cast<std::int64_t>(pruner.scores().size()));
        for (std::size_t i = 0; i < pruner.scores().size(); ++i)
          EXPECT_NEAR(pruner.scores()[i], (*on_device)[static_cast<std::int64_t>(i)].item<double>(), 2e-6);
        // The same scores select the same tokens; those of two ways of summing may differ in their last bit.
        Config own = ask.config;
        own.prior_rows = {};
        Pruner<double> chooser(own);
        const at::Tensor wide = on_device->to(at::kDouble);
        EXPECT_EQ(values_of(*prune_on_device(ask.config, q, k, 0.35f, ask.visual)),
                  values_of(chooser.prune(scores(wide, n), ask.visual)));
      }
}

TEST_F(Torch, OnTheDeviceNoValueIsRead) {
  // Meta tensors have no values: an operation that waited for one would throw.
  for (const Ask& ask : asks()) {
    // Rows other than the last or all are picked by index_select(), which LibTorch 1.13 has no meta kernel of.
    if (ask.config.score_rows == ScoreRows::listed || !ask.config.prior_rows.empty()) continue;
    const at::Tensor attention = at::empty({1, 4, n, n}, at::TensorOptions(at::kMeta).dtype(at::kHalf));
    const at::Tensor q = at::empty({1, 4, n, 8}, at::kMeta), k = at::empty({1, 2, n, 8}, at::kMeta);
    const auto plan = make_plan(ask.config, {static_cast<std::size_t>(n), 4, ask.visual});
    for (const auto& kept :
         {prune_on_device(ask.config, attention, ask.visual), prune_on_device(ask.config, q, k, 0.35, ask.visual)}) {
      ASSERT_TRUE(kept) << kept.message().c_str();
      EXPECT_TRUE(kept->is_meta());
      EXPECT_EQ(kept->size(0), static_cast<std::int64_t>(plan->kept()));
    }
  }
}

}  // namespace

// Keys of every element type in every place where engines keep them, against dense products and attention in double.
#include <gtest/gtest.h>

#include <array>

#include "attention.hpp"
#include "fastv/score.hpp"
#include "flush.hpp"

// An engine's own type: 16-bit fixed point. Four lines, of which the last makes it one that fastv takes.
namespace engine {
struct Fixed {
  std::int16_t raw;
};
inline float to_float(Fixed value) { return static_cast<float>(value.raw) / 4096; }
inline double value_of(Fixed value) { return static_cast<double>(value.raw) / 4096; }
}  // namespace engine
namespace oracle {
template <>
inline engine::Fixed make(double x) {
  return {static_cast<std::int16_t>(std::lround(x * 4096))};
}
}  // namespace oracle

namespace keys_test {
namespace {

using namespace fastv;
using oracle::Layer;
using oracle::Place;
using oracle::Rng;
using oracle::Stored;
using oracle::Tensors;

template <class Score = float, class Evidence>
std::vector<Score> scores_of(const Evidence& evidence, const std::vector<TokenSpan>& visual,
                             const Config& config = {}) {
  std::vector<Score> scores(visual_tokens(visual), Score(-7));
  std::vector<float> scratch(score_scratch(evidence), oracle::nan_float());
  const Status status =
      score(config, evidence, Span<const TokenSpan>(visual), Span<Score>(scores), Span<float>(scratch));
  EXPECT_TRUE(status) << status.message().c_str();
  return scores;
}

template <class Score>
void expect_near(const std::vector<Score>& got, const std::vector<double>& expected, double relative = 2e-5) {
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i)
    ASSERT_NEAR(static_cast<double>(got[i]), expected[i], relative * expected[i] + 1e-9) << "visual token " << i;
}

// The values of 8-bit types are integers here and there: a smaller scale keeps the softmax from being one key's.
template <class K>
constexpr double reach_of = 2;
template <>
constexpr double reach_of<std::int8_t> = 120;

// ---- products -----------------------------------------------------------------------------------

template <class K>
class KeyTypes : public testing::Test {};
using Elements = testing::Types<float, half, bfloat16, double, fp8_e4m3, fp8_e5m2, std::int8_t, engine::Fixed>;
TYPED_TEST_SUITE(KeyTypes, Elements, );  // the comma is for clang -Wpedantic

// Every count of keys around the tiles of 8, wherever the stretch begins; dims around the vectors; groups that tiles of 1,
// 2 and 4 heads do and do not divide.
TYPED_TEST(KeyTypes, ProductsEqualDenseOnesForEveryCountGroupAndDim) {
  using K = TypeParam;
  Rng rng(1);
  const std::size_t dims[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 72, 80, 96, 100, 127, 128, 160};
  std::vector<std::size_t> counts(41);
  std::iota(counts.begin(), counts.end(), std::size_t{1});
  counts.insert(counts.end(), {64, 72, 79, 100, 129});
  for (const std::size_t count : counts)
    for (const std::size_t group : {1u, 2u, 3u, 4u, 5u, 6u, 8u, 12u})
      for (int draw = 0; draw < 2; ++draw) {
        const Place place = oracle::places[rng.below(10)];
        const std::size_t dim = dims[rng.below(std::size(dims))], kv_heads = rng.between(1, 3);
        const std::size_t begin = rng.below(20), keys = begin + count + rng.below(4), heads = kv_heads * group;
        std::size_t chunk = 0;
        if (oracle::in_chunks(place))
          for (const std::size_t c : {16u / static_cast<unsigned>(sizeof(K)), 3u, 1u})
            if (chunk == 0 && dim % c == 0) chunk = c;
        Layer a = oracle::random_layer(rng, heads, kv_heads, 1, keys, dim, reach_of<K>);
        const Stored<float> query(rng, Place::token_major, heads, 1, dim, a.query);
        const std::size_t block_tokens = rng.chance(0.5) ? rng.between(1, 9) : 8 * rng.between(1, 5);  // whole tiles
        const Stored<K> key(rng, place, kv_heads, keys, dim, a.key, block_tokens, chunk);

        const std::size_t stride = count + rng.below(3);
        std::vector<float> wide(detail::query_floats<Heads<K>>(heads, dim), oracle::nan_float()),
            tile(detail::tile_floats(dim), oracle::nan_float()), logits((heads - 1) * stride + count, -777.0f);
        detail::load_query<Heads<K>>(query.view(), 0, 0.5f, wide.data());
        detail::product_with_keys(key.view(), heads, begin, begin + count, wide.data(), logits.data(), stride,
                                  tile.data());
        for (std::size_t h = 0; h < heads; ++h)
          for (std::size_t j = 0; j < stride && h * stride + j < logits.size(); ++j) {
            const double got = static_cast<double>(logits[h * stride + j]);
            double expected = j < count ? 0 : -777, size = 0;
            for (std::size_t d = 0; d < dim && j < count; ++d) {
              const double term = 0.5 * a.query[h * dim + d] * a.key[(h / group * keys + begin + j) * dim + d];
              expected += term;
              size += std::fabs(term);
            }
            ASSERT_NEAR(got, expected, 1e-6 * size)
                << count << " keys from " << begin << ", " << heads << "/" << kv_heads << " heads of " << dim
                << ", place " << static_cast<int>(place) << ", blocks of " << block_tokens << ", chunk " << chunk
                << ", head " << h << ", key " << j;
          }
      }
}

// More heads than wait for delivery at once, and heads that do not fit at all.
TEST(Products, EqualDenseOnesForManyHeads) {
  Rng rng(2);
  const std::size_t shapes[][2] = {{128, 8}, {64, 64}, {512, 1}, {513, 1}, {520, 520}, {1000, 2}};
  for (const auto& [heads, kv_heads] : shapes)
    for (const Place place : {Place::token_major, Place::head_major, Place::head_pages}) {
      Layer a = oracle::random_layer(rng, heads, kv_heads, 1, 77, 5);
      const Tensors<float, half> tensors(rng, a, place, 4);
      const std::vector<TokenSpan> visual = {{3, 70}};
      expect_near(scores_of(tensors.view, visual), oracle::scores_by(a, {76}, visual));
      if (testing::Test::HasFatalFailure()) FAIL() << heads << "/" << kv_heads;
    }
}

// Pieces of 2,048 keys, for threads, and the few keys that may be left behind them.
TEST(Products, EqualDenseOnesInPiecesOfAnyLength) {
  Rng rng(3);
  for (const std::size_t keys : {2047u, 2048u, 2049u, 2055u, 2056u, 2057u, 4103u})
    for (const Place place : {Place::token_major, Place::head_major, Place::token_pages, Place::chunked_pages}) {
      Layer a = oracle::random_layer(rng, 2, 1, 2, keys, 8);
      const Tensors<float, half> tensors(rng, a, place, 16, 8);
      const std::vector<TokenSpan> visual = {{0, 30}, {1000, keys - 1001}};
      const Index rows[] = {static_cast<Index>(keys - 2), static_cast<Index>(keys - 1)};
      Config config;
      config.score_rows = ScoreRows::listed;
      config.listed_rows = rows;
      expect_near(scores_of(tensors.view, visual, config), oracle::scores_by(a, {rows[0], rows[1]}, visual));
      if (testing::Test::HasFatalFailure()) FAIL() << keys << " keys in place " << static_cast<int>(place);
    }
}

// ---- pages and chunks ---------------------------------------------------------------------------

TYPED_TEST(KeyTypes, ScoresDoNotDependOnWhereTheKeysLie) {
  using K = TypeParam;
  Rng rng(4);
  const std::vector<TokenSpan> visual = {{3, 20}, {25, 30}};
  for (const std::size_t block_tokens : {1u, 3u, 4u, 16u, 61u, 64u})
    for (const Place place : oracle::places) {
      Layer a = oracle::random_layer(rng, 6, 2, 1, 61, 48, reach_of<K>);
      if (reach_of < K >> 10) a.scale *= 0.01;
      const Tensors<float, K> tensors(rng, a, place, block_tokens, oracle::in_chunks(place) ? 16 / sizeof(K) : 0);
      expect_near(scores_of(tensors.view, visual), oracle::scores_by(a, {60}, visual));
      if (testing::Test::HasFatalFailure())
        FAIL() << block_tokens << " tokens a block, place " << static_cast<int>(place);
    }
}

// vLLM's caches hold 16 bytes of a key side by side: 8 halves, 4 floats, 16 fp8. Other widths are taken as well.
TYPED_TEST(KeyTypes, ChunksOfAnyWidth) {
  using K = TypeParam;
  Rng rng(5);
  const std::vector<TokenSpan> visual = {{3, 30}};
  for (const std::size_t chunk : {1u, 2u, 4u, 8u, 16u, 48u})
    for (const Place place : {Place::chunked_pages, Place::chunked_blocks}) {
      Layer a = oracle::random_layer(rng, 4, 2, 1, 37, 48, reach_of<K>);
      if (reach_of < K >> 10) a.scale *= 0.01;
      const Tensors<float, K> tensors(rng, a, place, 4, chunk);
      expect_near(scores_of(tensors.view, visual), oracle::scores_by(a, {36}, visual));
      if (testing::Test::HasFatalFailure()) FAIL() << chunk << " elements a chunk";
    }
}

TYPED_TEST(KeyTypes, ChunksInOnePiece) {
  using K = TypeParam;
  Rng rng(55);
  const std::vector<TokenSpan> visual = {{3, 30}};
  Layer a = oracle::random_layer(rng, 4, 2, 1, 37, 48, reach_of<K>);
  if (reach_of < K >> 10) a.scale *= 0.01;
  const Tensors<float, K> tensors(rng, a, Place::chunked_pages, 37, 16 / sizeof(K));  // one block holds them all
  auto view = tensors.view;
  view.key.data += static_cast<std::ptrdiff_t>(view.key.pages.block_table[0]) * view.key.pages.block_stride;
  view.key.pages.block_table = {};
  view.key.pages.block_tokens = 0;
  expect_near(scores_of(view, visual), oracle::scores_by(a, {36}, visual));
}

TEST(PagedQueries, AreReadAsKeysAre) {
  Rng rng(6);
  const std::vector<TokenSpan> visual = {{3, 20}, {25, 30}};
  for (const Place place : oracle::places) {
    Layer a = oracle::random_layer(rng, 4, 2, 61, 61, 16);
    const Tensors<half, half> tensors(rng, a, Place::head_pages, 7, oracle::in_chunks(place) ? 4 : 0, place);
    Config config;
    config.score_rows = ScoreRows::all;
    expect_near(scores_of(tensors.view, visual, config), oracle::scores_by(a, oracle::all_rows(61), visual));
    if (testing::Test::HasFatalFailure()) FAIL() << "place " << static_cast<int>(place);
  }
}

TEST(PagedKeys, WrongTablesAndShapesAreNamed) {
  Rng rng(7);
  std::vector<double> values(2 * 20 * 8);
  const Stored<float> cache(rng, Place::head_pages, 2, 20, 8, values, 4);
  const Stored<float> blocks(rng, Place::head_blocks, 2, 20, 8, values, 4);
  const std::vector<float> query(16);
  const std::vector<TokenSpan> visual = {{2, 10}};
  const auto refused = [&](const Stored<float>& stored, auto change, Errc code, const char* word) {
    Heads<float> view = stored.view();
    change(view);
    const Status status = query_key(heads(query.data(), TokenMajor{1, 2, 8}), view, 1.0f).check();
    EXPECT_EQ(status.code, code) << status.message().c_str();
    EXPECT_NE(std::string(status.message().c_str()).find(word), std::string::npos) << status.message().c_str();
  };
  refused(
      cache, [](auto&) {}, Errc::ok, "");
  refused(
      blocks, [](auto&) {}, Errc::ok, "");
  refused(
      cache, [](auto& v) { v.pages.block_tokens = 0; }, Errc::bad_pages, "0 tokens");
  refused(
      cache,
      [](auto& v) {
        v.pages.block_table = {v.pages.block_table.data(), 4};
      },
      Errc::bad_pages, "4 blocks");
  refused(
      cache, [](auto& v) { v.pages.block_table = {}; }, Errc::bad_pages, "0 blocks");
  refused(
      cache,
      [](auto& v) {
        v.pages.block_table = {nullptr, 5};
      },
      Errc::null_data, "block table");
  // No blocks of no tokens are no cache in one piece.
  const float row[32] = {};
  const Heads<float> none = heads(static_cast<const float*>(row), HeadMajor{1, 0, 4}, Span<const Index>(), 8);
  const Status status = KeysOnly{none}.check();
  EXPECT_EQ(status.code, Errc::bad_pages) << status.message().c_str();
  EXPECT_EQ(KeysOnly{heads(Span<const float* const>(), HeadMajor{1, 0, 4}, 8)}.check().code, Errc::bad_pages);
  // int32 tables are read as Index, and -1 where no block was given.
  const std::vector<std::int32_t> with_hole = {0, 1, -1, 3, 4}, padded = {4, 3, 2, 1, 0, -1, -1};
  refused(
      cache, [&](auto& v) { v.pages.block_table = as_index(with_hole); }, Errc::bad_pages,
      "block 2 of key is 4294967295");
  refused(
      cache, [&](auto& v) { v.pages.block_table = as_index(padded); }, Errc::ok, "");
  refused(
      cache, [](auto& v) { v.pages.block_stride = 3; }, Errc::bad_stride, "block stride");
  refused(
      cache, [](auto& v) { v.pages.block_stride = -64; }, Errc::bad_stride, "-64");
  refused(
      cache, [](auto& v) { v.pages.chunk = 3; }, Errc::bad_shape, "chunks of 3");
  refused(
      cache, [](auto& v) { v.data = nullptr; }, Errc::null_data, "key");
  refused(
      blocks,
      [](auto& v) {
        v.pages.blocks = {v.pages.blocks.data(), 4};
      },
      Errc::bad_pages, "4 blocks");
  refused(
      blocks, [](auto& v) { v.pages.blocks = {}; }, Errc::bad_pages, "0 blocks");
  refused(
      blocks,
      [](auto& v) {
        v.pages.blocks = {nullptr, 5};
      },
      Errc::null_data, "blocks");
  std::vector<const float*> pointers(blocks.view().pages.blocks.begin(), blocks.view().pages.blocks.end());
  pointers[3] = nullptr;
  refused(
      blocks, [&](auto& v) { v.pages.blocks = pointers; }, Errc::null_data, "block 3");
  pointers[3] = reinterpret_cast<const float*>(reinterpret_cast<std::uintptr_t>(pointers[2]) + 2);
  refused(
      blocks, [&](auto& v) { v.pages.blocks = pointers; }, Errc::bad_stride, "multiple of 4");
}

// ---- loaded keys --------------------------------------------------------------------------------

// 4-bit keys in groups of 32 with a scale and a minimum each, as ggml's Q4_1.
struct Quantised {
  struct Group {
    float scale, minimum;
    std::array<std::uint8_t, 16> nibbles;
  };
  std::size_t tokens, dim;
  std::vector<Group> groups;  // [heads, tokens, dim / 32]

  Quantised(std::size_t heads, std::size_t n, std::size_t width, std::vector<double>& values)
      : tokens(n), dim(width), groups(heads * n * width / 32) {
    for (std::size_t g = 0; g < groups.size(); ++g) {
      double* x = values.data() + g * 32;
      const double low = *std::min_element(x, x + 32), high = *std::max_element(x, x + 32);
      groups[g] = {static_cast<float>((high - low) / 15), static_cast<float>(low), {}};
      for (std::size_t i = 0; i < 32; ++i) {
        const long level = std::lround((x[i] - low) / (high - low) * 15);
        groups[g].nibbles[i / 2] |= static_cast<std::uint8_t>(level << (i % 2 * 4));
        x[i] = static_cast<double>(static_cast<float>(level) * groups[g].scale + groups[g].minimum);
      }
    }
  }
  void load(std::size_t head, std::size_t token, float* out) const {
    for (std::size_t d = 0; d < dim; ++d) {
      const Group& g = groups[((head * tokens + token) * dim + d) / 32];
      out[d] = static_cast<float>(g.nibbles[d % 32 / 2] >> (d % 2 * 4) & 15) * g.scale + g.minimum;
    }
  }
};

TEST(LoadedKeys, OfFourBitsEqualDenseAttention) {
  Rng rng(8);
  for (const std::size_t keys : {5u, 8u, 61u, 2060u}) {
    Layer a = oracle::random_layer(rng, 6, 2, 1, keys, 64);
    const Quantised cache(2, keys, 64, a.key);
    const Stored<half> query(rng, Place::token_major, 6, 1, 64, a.query);
    const auto evidence =
        query_key(query.view(),
                  loaded_keys(2, keys, 64,
                              [&](std::size_t head, std::size_t token, float* out) { cache.load(head, token, out); }),
                  static_cast<float>(a.scale));
    const std::vector<TokenSpan> visual = {{1, keys - 2}};
    expect_near(scores_of(evidence, visual), oracle::scores_by(a, {a.last_row()}, visual));
    expect_near(scores_of<double>(evidence, visual), oracle::scores_by(a, {a.last_row()}, visual));
  }
}

// A ring that holds the last `slots` tokens: token t in slot t % slots. The window has let go of what came before.
TEST(LoadedKeys, OfARingThatHoldsTheLastTokens) {
  Rng rng(9);
  for (const std::size_t slots : {9u, 16u, 50u})
    for (const std::size_t past : {0u, 30u, 70u}) {
      Layer a = oracle::random_layer(rng, 4, 2, 3, slots, 24);
      a.first_key = 100 - slots;
      a.past = past;
      a.window = 12;
      std::vector<float> ring(2 * slots * 24);  // [slots, heads, dim]
      for (std::size_t h = 0; h < 2; ++h)
        for (std::size_t j = 0; j < slots; ++j)
          for (std::size_t d = 0; d < 24; ++d) {
            float& x = ring[((a.first_key + j) % slots * 2 + h) * 24 + d];
            x = static_cast<float>(a.key[(h * slots + j) * 24 + d]);
            a.key[(h * slots + j) * 24 + d] = static_cast<double>(x);
          }
      const Stored<float> query(rng, Place::token_major, 4, 3, 24, a.query);
      const oracle::Parts parts(a);
      const auto evidence = parts.of(a, query_key(query.view(),
                                                  loaded_keys(2, slots, 24,
                                                              [&](std::size_t head, std::size_t key, float* out) {
                                                                const std::size_t slot = (a.first_key + key) % slots;
                                                                std::copy_n(&ring[(slot * 2 + head) * 24], 24, out);
                                                              }),
                                                  static_cast<float>(a.scale)));
      ASSERT_EQ(evidence.prompt_tokens(), 100 - past);
      const std::vector<TokenSpan> visual = {{0, 10}, {12, 86 - past}};
      const Index rows[] = {a.first_row(), a.last_row()};
      Config config;
      config.score_rows = ScoreRows::listed;
      config.listed_rows = rows;
      expect_near(scores_of(evidence, visual, config), oracle::scores_by(a, {rows[0], rows[1]}, visual));
      expect_near(scores_of(evidence, visual), oracle::scores_by(a, {rows[1]}, visual));
      if (testing::Test::HasFatalFailure()) FAIL() << slots << " slots behind " << past;
    }
}

// ---- scaled keys --------------------------------------------------------------------------------

// An int8 cache with one scale per head and token, in one piece and in the pages of its keys.
TEST(KeyScales, BelongToEachHeadAndKey) {
  Rng rng(10);
  const std::vector<TokenSpan> visual = {{3, 20}, {25, 30}};
  for (const Place place : oracle::places) {
    Layer a = oracle::random_layer(rng, 6, 3, 2, 61, 32, 127);
    for (double& q : a.query) q /= 100;
    for (std::size_t i = 0; i < 3 * 61; ++i) a.key_scales.push_back(rng.real(0.001, 0.03));
    std::vector<double> scales = a.key_scales;
    const Tensors<float, std::int8_t> tensors(rng, a, place, 5, oracle::in_chunks(place) ? 16 : 0);
    const std::vector<double> expected = oracle::scores_by(a, {60}, visual);
    expect_near(scores_of(tensors.view, visual), expected);
    const Stored<float> paged(rng, oracle::in_chunks(place) ? Place::head_blocks : place, 3, 61, 1, scales, 7);
    auto evidence = tensors.view;
    evidence.key_scales = paged.view();
    expect_near(scores_of(evidence, visual), expected);
    if (testing::Test::HasFatalFailure()) FAIL() << "place " << static_cast<int>(place);
  }
}

TEST(KeyScales, OfAnotherShapeAreRefused) {
  Rng rng(11);
  Layer a = oracle::random_layer(rng, 4, 2, 1, 20, 8, 100);
  const Tensors<float, std::int8_t> tensors(rng, a);
  const std::vector<float> scales(3 * 21 * 2, 1.0f);
  auto evidence = tensors.view;
  const auto code = [&](const Heads<float>& view) {
    evidence.key_scales = view;
    return evidence.check().code;
  };
  EXPECT_EQ(code(heads(scales.data(), TokenMajor{20, 2, 1})), Errc::ok);
  EXPECT_EQ(code(heads(scales.data(), TokenMajor{21, 2, 1})), Errc::bad_shape);
  EXPECT_EQ(code(heads(scales.data(), TokenMajor{20, 3, 1})), Errc::bad_shape);
  EXPECT_EQ(code(heads(scales.data(), TokenMajor{20, 2, 2})), Errc::bad_shape);
  Heads<float> overlapping = heads(scales.data(), TokenMajor{20, 2, 1});
  overlapping.token_stride = 1;
  EXPECT_EQ(code(overlapping), Errc::bad_stride);
}

// ---- hidden keys --------------------------------------------------------------------------------

// What an engine hides may never have been written: NaN and infinities there must not show, in the key, its scale or its
// value's length.
template <class K>
K all_ones() {
  K element;
  std::memset(static_cast<void*>(&element), 0xff, sizeof(element));
  return element;
}
template <class K>
std::vector<K> unusable() {
  return {all_ones<K>()};
}
template <>
std::vector<float> unusable() {
  return {oracle::nan_float(), -oracle::nan_float(), oracle::infinity(), -oracle::infinity()};
}
template <>
std::vector<double> unusable() {
  return {HUGE_VAL, -HUGE_VAL, static_cast<double>(oracle::nan_float())};
}
template <>
std::vector<half> unusable() {
  return {half{0x7c00}, half{0xfc00}, half{0x7e00}, half{0xffff}};
}
template <>
std::vector<bfloat16> unusable() {
  return {bfloat16{0x7f80}, bfloat16{0xff80}, bfloat16{0x7fc0}, bfloat16{0xffff}};
}
template <>
std::vector<fp8_e5m2> unusable() {
  return {fp8_e5m2{0x7c}, fp8_e5m2{0xfc}, fp8_e5m2{0x7f}};
}

TYPED_TEST(KeyTypes, HiddenByTheBiasMayHoldAnything) {
  using K = TypeParam;
  Rng rng(12);
  const std::vector<TokenSpan> visual = {{3, 20}, {25, 30}};
  const std::size_t hidden[] = {0, 4, 22, 26, 27, 59};
  for (const K bad : unusable<K>())
    for (const Place place : oracle::places)
      for (const bool everything_else : {false, true}) {
        Layer a = oracle::random_layer(rng, 4, 2, 1, 61, 32, reach_of<K>);
        if (reach_of < K >> 10) a.scale *= 0.01;
        a.bias.assign(61, 0.0);
        for (const std::size_t j : hidden) a.bias[j] = -HUGE_VAL;
        if (everything_else) {
          a.soft_cap = 20;
          a.alibi = {0.1, 0.2, 0.3, 0.4};
          a.key_scales.assign(2 * 61, 1.5);
          for (std::size_t i = 0; i < 2 * 50; ++i) a.value_norms.push_back(rng.real(0.5, 2));
        }
        Tensors<float, K> tensors(rng, a, place, 4, oracle::in_chunks(place) ? 16 / sizeof(K) : 0);
        const std::vector<double> expected = oracle::scores_by(a, {60}, visual);
        for (const std::size_t j : hidden)
          for (std::size_t h = 0; h < 2; ++h)
            for (const std::size_t d : {0u, 9u, 31u}) tensors.key.at(h, j, d) = bad;
        std::vector<float> scales(2 * 61, 1.5f), norms(a.value_norms.begin(), a.value_norms.end());
        auto evidence = tensors.view;
        if (everything_else) {
          for (const std::size_t j : hidden) scales[j] = scales[61 + j] = oracle::nan_float();
          for (const std::size_t i : {1u, 19u, 21u, 22u}) norms[i] = norms[50 + i] = oracle::infinity();
          evidence.key_scales = heads(scales.data(), HeadMajor{2, 61, 1});
          evidence.value_norms = norms;
        }
        expect_near(scores_of(evidence, visual), expected);
        if (testing::Test::HasFatalFailure()) FAIL() << "place " << static_cast<int>(place);
      }
}

TEST(HiddenKeys, OfALoaderMayHoldAnything) {
  Rng rng(20);
  const std::vector<TokenSpan> visual = {{3, 50}};
  for (const float bad : unusable<float>()) {
    Layer a = oracle::random_layer(rng, 4, 2, 1, 61, 32);
    a.bias.assign(61, 0.0);
    a.bias[7] = a.bias[59] = -HUGE_VAL;
    Tensors<float> tensors(rng, a);
    const std::vector<double> expected = oracle::scores_by(a, {60}, visual);
    auto evidence = query_key(tensors.query.view(),
                              loaded_keys(2, 61, 32,
                                          [&](std::size_t head, std::size_t token, float* out) {
                                            for (std::size_t d = 0; d < 32; ++d)
                                              out[d] = tensors.key.at(head, token, d);
                                            if (token == 7 || token == 59) out[3] = bad;
                                          }),
                              tensors.view.scale);
    evidence.bias = tensors.view.bias;
    expect_near(scores_of(evidence, visual), expected);
    expect_near(scores_of<double>(evidence, visual), expected);
  }
}

// A window, a causal row and first_key leave keys unread altogether.
TEST(HiddenKeys, OutsideTheWindowAreNotRead) {
  Rng rng(13);
  Layer a = oracle::random_layer(rng, 4, 2, 1, 61, 32);
  a.window = 20;
  Tensors<half, half> tensors(rng, a, Place::head_pages, 4);
  const std::vector<TokenSpan> visual = {{3, 20}, {25, 30}};
  const std::vector<double> expected = oracle::scores_by(a, {60}, visual);
  for (std::size_t j = 0; j < 41; ++j)
    for (std::size_t h = 0; h < 2; ++h) tensors.key.at(h, j, 5) = half{0x7e00};
  expect_near(scores_of(tensors.view, visual), expected);
}

// ---- denormals ----------------------------------------------------------------------------------

TEST(Elements, OfEightAndSixteenBitsAreExact) {
  const auto check = [](auto type, std::uint32_t all) {
    using T = decltype(type);
    for (std::uint32_t bits = 0; bits < all; ++bits) {
      const T element{static_cast<decltype(type.bits)>(bits)};
      const double exact = oracle::value_of(element);
      const float got = to_float(element);
      if (exact != exact)
        ASSERT_TRUE(oracle::is_nan(got)) << bits;
      else
        ASSERT_EQ(oracle::bits_of_float(got), oracle::bits_of_float(static_cast<float>(exact))) << bits;
    }
  };
  check(half{}, 65536);
  check(bfloat16{}, 65536);
  check(fp8_e4m3{}, 256);
  check(fp8_e5m2{}, 256);
  for (int i = -128; i < 128; ++i) ASSERT_EQ(to_float(static_cast<std::int8_t>(i)), static_cast<float>(i));
}

#if FASTV_TEST_FLUSHES
TEST(FlushingThreads, ConvertEveryElementExactly) {
  std::vector<std::uint32_t> halves(65536), e4m3(256), e5m2(256);
  ASSERT_TRUE(on_a_flushing_thread([&] {
    for (std::uint32_t bits = 0; bits < 65536; ++bits)
      halves[bits] = detail::bits_of(to_float(half{static_cast<std::uint16_t>(bits)}));
    for (std::uint32_t bits = 0; bits < 256; ++bits) {
      e4m3[bits] = detail::bits_of(to_float(fp8_e4m3{static_cast<std::uint8_t>(bits)}));
      e5m2[bits] = detail::bits_of(to_float(fp8_e5m2{static_cast<std::uint8_t>(bits)}));
    }
  }));
  const auto expect_exact = [](std::uint32_t got, double exact) {
    if (exact != exact) return (got & 0x7fffffffu) > 0x7f800000u;
    return got == oracle::bits_of_float(static_cast<float>(exact));
  };
  for (std::uint32_t bits = 0; bits < 65536; ++bits)
    ASSERT_TRUE(expect_exact(halves[bits], oracle::value_of(half{static_cast<std::uint16_t>(bits)}))) << bits;
  for (std::uint32_t bits = 0; bits < 256; ++bits) {
    ASSERT_TRUE(expect_exact(e4m3[bits], oracle::value_of(fp8_e4m3{static_cast<std::uint8_t>(bits)}))) << bits;
    ASSERT_TRUE(expect_exact(e5m2[bits], oracle::value_of(fp8_e5m2{static_cast<std::uint8_t>(bits)}))) << bits;
  }
}

// Keys below 6.1e-5 are denormal as halves, and what is below 1.2e-38 as floats: a conversion that moves the bits and
// multiplies would lose them on such threads.
TEST(FlushingThreads, KeepKeysThatAreDenormalHalves) {
  Rng rng(14);
  const std::vector<TokenSpan> visual = {{3, 30}, {40, 17}};
  for (const Place place : oracle::places) {
    Layer a = oracle::random_layer(rng, 4, 2, 1, 61, 40);
    a.scale = 100;
    for (double& q : a.query) q *= 100;
    Tensors<float, half> tensors(rng, a, place, 4, oracle::in_chunks(place) ? 8 : 0);
    for (std::size_t h = 0; h < 2; ++h)
      for (std::size_t j = 0; j < 61; ++j)
        for (std::size_t d = 0; d < 40; ++d) {
          const half small{static_cast<std::uint16_t>(rng.next() & 0x81ff)};  // up to 3e-5, of either sign
          tensors.key.at(h, j, d) = small;
          a.key[(h * 61 + j) * 40 + d] = oracle::value_of(small);
        }
    const std::vector<double> expected = oracle::scores_by(a, {60}, visual);
    const double most = *std::max_element(expected.begin(), expected.end());
    ASSERT_GT(most, 2 * *std::min_element(expected.begin(), expected.end())) << "without the keys all would be equal";
    expect_near(scores_of(tensors.view, visual), expected);
    std::vector<float> flushed;
    ASSERT_TRUE(on_a_flushing_thread([&] { flushed = scores_of(tensors.view, visual); }));
    expect_near(flushed, expected);
    const auto lengths = [&] { return scores_of(KeysOnly{tensors.key.view(), 0}, visual); };
    std::vector<float> short_keys;
    ASSERT_TRUE(on_a_flushing_thread([&] { short_keys = lengths(); }));
    EXPECT_EQ(short_keys, lengths());
    EXPECT_LT(short_keys[0], 0.0f);
    if (testing::Test::HasFatalFailure()) FAIL() << "place " << static_cast<int>(place);
  }
}

TEST(FlushingThreads, KeepQueriesThatAreDenormalHalves) {
  Rng rng(15);
  const std::vector<TokenSpan> visual = {{3, 50}};
  Layer a = oracle::random_layer(rng, 4, 2, 1, 61, 40);
  for (double& q : a.query) q = 0;
  for (double& k : a.key) k *= 500;
  a.scale = 100;
  Tensors<half, half> tensors(rng, a);
  for (std::size_t i = 0; i < 160; ++i) {
    const half small{static_cast<std::uint16_t>(rng.next() & 0x81ff)};
    tensors.query.data()[i] = small;
    a.query[i] = oracle::value_of(small);
  }
  const std::vector<double> expected = oracle::scores_by(a, {60}, visual);
  std::vector<float> flushed;
  ASSERT_TRUE(on_a_flushing_thread([&] { flushed = scores_of(tensors.view, visual); }));
  expect_near(flushed, expected, 1e-4);
  expect_near(scores_of(tensors.view, visual), expected, 1e-4);
}
#endif

}  // namespace
}  // namespace keys_test

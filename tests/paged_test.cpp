// Paged caches: scoring through a block table and compacting within a sequence's own blocks, against one-piece caches.
#include <gtest/gtest.h>

#include <set>

#include "fastv/fastv.hpp"
#include "oracle.hpp"

namespace {

using namespace fastv;
using oracle::Rng;

enum class PageLayout { token_major, head_major, split };  // split: vLLM's [block, head, dim / x, token, x]

// A cache [heads, tokens, dim] of floats laid out in shuffled pages.
struct Paged {
  static constexpr std::size_t chunk = 4;
  PageLayout layout;
  std::size_t heads, tokens, dim, block_tokens;
  std::vector<Index> table;
  std::vector<float> memory;

  Paged(Rng& rng, PageLayout which, std::size_t h, std::size_t t, std::size_t d, std::size_t b)
      : layout(which), heads(h), tokens(t), dim(d), block_tokens(b) {
    const std::size_t used = (t + b - 1) / b, all = used + 3;
    std::vector<Index> blocks(all);
    std::iota(blocks.begin(), blocks.end(), Index{0});
    for (std::size_t i = all - 1; i > 0; --i) std::swap(blocks[i], blocks[rng.below(i + 1)]);
    table.assign(blocks.begin(), blocks.begin() + static_cast<std::ptrdiff_t>(used));
    memory.assign(all * b * h * d, -777.0f);
  }
  std::size_t block_floats() const { return block_tokens * heads * dim; }
  std::size_t offset(std::size_t head, std::size_t row, std::size_t e) const {  // within a block
    switch (layout) {
      case PageLayout::token_major: return (row * heads + head) * dim + e;
      case PageLayout::head_major: return (head * block_tokens + row) * dim + e;
      case PageLayout::split: break;
    }
    return ((head * (dim / chunk) + e / chunk) * block_tokens + row) * chunk + e % chunk;
  }
  float& at(std::size_t head, std::size_t token, std::size_t e) {
    return memory[table[token / block_tokens] * block_floats() + offset(head, token % block_tokens, e)];
  }
  HeadVectors<float> vectors() const {
    const auto s = [](std::size_t n) { return static_cast<std::ptrdiff_t>(n); };
    HeadVectors<float> v{memory.data(), heads, tokens, dim, 0, 0};
    v.head_stride = s(offset(1, 0, 0) - offset(0, 0, 0));
    v.token_stride = s(offset(0, 1, 0) - offset(0, 0, 0));
    v.pages = {table, block_tokens, s(block_floats())};
    if (layout == PageLayout::split) {
      v.pages.chunk = chunk;
      v.pages.chunk_stride = s(block_tokens * chunk);
    }
    return v;
  }
  PagedRows rows() {
    const auto bytes = [](std::size_t floats) { return static_cast<std::ptrdiff_t>(floats * sizeof(float)); };
    PagedRows r{memory.data(), table, block_tokens, bytes(block_floats()), tokens, 0, 0};
    switch (layout) {
      case PageLayout::token_major:
        r.row_bytes = heads * dim * sizeof(float);
        r.row_stride = bytes(heads * dim);
        break;
      case PageLayout::head_major:
        r.row_bytes = dim * sizeof(float);
        r.row_stride = bytes(dim);
        r.planes = heads;
        r.plane_stride = bytes(block_tokens * dim);
        break;
      case PageLayout::split:
        r.row_bytes = chunk * sizeof(float);
        r.row_stride = bytes(chunk);
        r.planes = heads * dim / chunk;
        r.plane_stride = bytes(block_tokens * chunk);
        break;
    }
    return r;
  }
};

constexpr PageLayout layouts[] = {PageLayout::token_major, PageLayout::head_major, PageLayout::split};

TEST(PagedKeys, ScoresDoNotDependOnPagesOrTheirSize) {
  Rng rng(1);
  const std::size_t kv_heads = 2, heads = 6, dim = 24, tokens = 61;
  std::vector<float> query(heads * dim), key(kv_heads * tokens * dim);
  for (float& x : query) x = static_cast<float>(rng.real(-1, 1));
  for (float& x : key) x = static_cast<float>(rng.real(-1, 1));
  const TokenSpan visual[] = {{3, 20}, {25, 30}};
  Pruner<> one_piece, paged;
  ASSERT_TRUE(one_piece.prune(
      query_key(query.data(), heads, 1, key.data(), kv_heads, tokens, dim, 0.2f, KvLayout::head_major), visual));
  for (const PageLayout layout : layouts)
    for (const std::size_t block_tokens : {1u, 2u, 7u, 16u, 61u, 64u}) {
      Paged cache(rng, layout, kv_heads, tokens, dim, block_tokens);
      for (std::size_t h = 0; h < kv_heads; ++h)
        for (std::size_t t = 0; t < tokens; ++t)
          for (std::size_t e = 0; e < dim; ++e) cache.at(h, t, e) = key[(h * tokens + t) * dim + e];
      const Kept kept = paged.prune(query_key(query.data(), heads, 1, cache.vectors(), 0.2f), visual);
      ASSERT_TRUE(kept) << kept.message().c_str();
      for (std::size_t i = 0; i < 50; ++i)
        ASSERT_NEAR(paged.scores()[i], one_piece.scores()[i], 1e-7f) << block_tokens << " tokens a block, token " << i;
    }
}

TEST(PagedKeys, LengthsDoNotDependOnPagesOrChunks) {
  Rng rng(2);
  const std::size_t heads = 2, dim = 24, tokens = 21;
  std::vector<float> values(heads * tokens * dim);
  for (float& x : values) x = static_cast<float>(rng.real(-1, 1));
  const TokenSpan visual[] = {{3, 5}, {9, 10}};
  std::vector<float> expected(heads * 15), norms(heads * 15);
  ASSERT_TRUE(value_norms(head_vectors(values.data(), heads, tokens, dim, KvLayout::head_major), visual,
                          Span<float>(expected)));
  for (const PageLayout layout : layouts) {
    Paged cache(rng, layout, heads, tokens, dim, 4);
    for (std::size_t h = 0; h < heads; ++h)
      for (std::size_t t = 0; t < tokens; ++t)
        for (std::size_t e = 0; e < dim; ++e) cache.at(h, t, e) = values[(h * tokens + t) * dim + e];
    ASSERT_TRUE(value_norms(cache.vectors(), visual, Span<float>(norms)));
    EXPECT_EQ(norms, expected);
  }
}

// Compacts K and V of two layers that share a table, and compares with the plain way.
void check_compact(Rng& rng, PageLayout layout, std::size_t tokens, std::size_t block_tokens,
                   const std::vector<Index>& kept) {
  const std::size_t heads = 2, dim = 8;
  Paged first(rng, layout, heads, tokens, dim, block_tokens);
  Paged second = first;
  for (std::size_t h = 0; h < heads; ++h)
    for (std::size_t t = 0; t < tokens; ++t)
      for (std::size_t e = 0; e < dim; ++e) {
        first.at(h, t, e) = static_cast<float>(1000 * t + 100 * h + e);
        second.at(h, t, e) = -static_cast<float>(1000 * t + 100 * h + e);
      }
  const std::vector<Index> table = first.table;
  const std::vector<float> before = first.memory;
  std::vector<PagedRows> caches = {first.rows(), second.rows()};
  caches[1].block_table = first.table;  // one table for both
  const auto blocks = compact(kept, caches);
  ASSERT_TRUE(blocks) << blocks.message().c_str();
  second.table = first.table;

  const std::size_t used = (kept.size() + block_tokens - 1) / block_tokens;
  ASSERT_EQ(blocks->used.size(), used);
  ASSERT_EQ(blocks->used.size() + blocks->freed.size(), table.size());
  std::vector<Index> all(first.table);
  std::sort(all.begin(), all.end());
  std::vector<Index> sorted(table);
  std::sort(sorted.begin(), sorted.end());
  EXPECT_EQ(all, sorted) << "a block was lost or won";
  for (std::size_t i = 0; i < kept.size(); ++i)
    for (std::size_t h = 0; h < heads; ++h)
      for (std::size_t e = 0; e < dim; ++e) {
        ASSERT_EQ(first.at(h, i, e), static_cast<float>(1000 * kept[i] + 100 * h + e)) << "token " << i;
        ASSERT_EQ(second.at(h, i, e), -static_cast<float>(1000 * kept[i] + 100 * h + e)) << "token " << i;
      }
  // Blocks of other sequences are untouched.
  const std::set<Index> own(table.begin(), table.end());
  for (std::size_t i = 0; i < before.size(); ++i)
    if (own.count(static_cast<Index>(i / first.block_floats())) == 0) {
      ASSERT_EQ(first.memory[i], before[i]);
    }
}

TEST(PagedCompact, EqualsTheOnePieceWay) {
  Rng rng(2);
  for (int round = 0; round < 300; ++round) {
    const std::size_t tokens = rng.between(1, 50), block_tokens = rng.between(1, 12);
    const double share = rng.real();
    std::vector<Index> kept;
    for (std::size_t t = 0; t < tokens; ++t)
      if (rng.chance(share)) kept.push_back(static_cast<Index>(t));
    check_compact(rng, layouts[round % 3], tokens, block_tokens, kept);
  }
}

TEST(PagedCompact, TokensAtTheirPlaceAndWholeBlocksDoNotMove) {
  Rng rng(3);
  // Blocks of 4: the first is untouched, the second is dropped whole, the third only moves up in the table.
  Paged cache(rng, PageLayout::token_major, 1, 12, 4, 4);
  for (std::size_t t = 0; t < 12; ++t)
    for (std::size_t e = 0; e < 4; ++e) cache.at(0, t, e) = static_cast<float>(10 * t + e);
  const std::vector<float> before = cache.memory;
  const std::vector<Index> table = cache.table, kept = {0, 1, 2, 3, 8, 9, 10, 11};
  const PagedRows rows[] = {cache.rows()};
  const auto blocks = compact(Span<const Index>(kept), Span<const PagedRows>(rows));
  ASSERT_TRUE(blocks);
  EXPECT_EQ(cache.memory, before);
  EXPECT_EQ(blocks->used[0], table[0]);
  EXPECT_EQ(blocks->used[1], table[2]);
  ASSERT_EQ(blocks->freed.size(), 1u);
  EXPECT_EQ(blocks->freed[0], table[1]);
}

TEST(PagedCompact, KeepingEverythingOrNothing) {
  Rng rng(4);
  std::vector<Index> all(23);
  std::iota(all.begin(), all.end(), Index{0});
  for (const PageLayout layout : layouts) {
    check_compact(rng, layout, 23, 5, all);
    check_compact(rng, layout, 23, 5, {});
  }
}

TEST(PagedCompact, BadInputIsNamedAndNothingIsTouched) {
  Rng rng(5);
  Paged cache(rng, PageLayout::head_major, 2, 20, 8, 4);
  const std::vector<Index> kept = {0, 5, 19};
  const auto refused = [&](auto change, Errc code) {
    Paged copy = cache;
    PagedRows rows[] = {copy.rows()};
    change(rows[0]);
    const auto blocks = compact(Span<const Index>(kept), Span<const PagedRows>(rows));
    EXPECT_EQ(blocks.code(), code) << blocks.message().c_str();
    EXPECT_EQ(copy.memory, cache.memory);
    EXPECT_EQ(copy.table, cache.table);
  };
  refused([](PagedRows& r) { r.block_tokens = 0; }, Errc::no_block_tokens);
  refused([](PagedRows& r) { r.block_table = {r.block_table.data(), 4}; }, Errc::block_table_short);
  refused([](PagedRows& r) { r.block_table = {nullptr, 5}; }, Errc::null_data);
  refused([](PagedRows& r) { r.data = nullptr; }, Errc::null_data);
  refused([](PagedRows& r) { r.row_stride = -32; }, Errc::negative_stride);
  refused([](PagedRows& r) { r.block_stride = 8; }, Errc::overlapping_stride);
  refused([](PagedRows& r) { r.count = 19; }, Errc::index_past_end);
  Paged other = cache;
  PagedRows both[] = {cache.rows(), other.rows()};
  EXPECT_EQ(compact(Span<const Index>(kept), Span<const PagedRows>(both)).code(), Errc::rows_differ);

  std::vector<float> query(16);
  Pruner<> pruner;
  const TokenSpan visual[] = {{2, 10}};
  const auto scored = [&](auto change) {
    HeadVectors<float> v = cache.vectors();
    change(v);
    return pruner.prune(query_key(query.data(), 2, 1, v, 1.0f), visual).code();
  };
  EXPECT_EQ(scored([](auto& v) { v.pages.block_tokens = 0; }), Errc::no_block_tokens);
  EXPECT_EQ(scored([](auto& v) { v.pages.block_table = {v.pages.block_table.data(), 2}; }), Errc::block_table_short);
  EXPECT_EQ(scored([](auto& v) { v.pages.block_stride = 3; }), Errc::overlapping_stride);
  EXPECT_EQ(scored([](auto& v) { v.pages.chunk = 3; }), Errc::chunk_not_divisor);
}

}  // namespace

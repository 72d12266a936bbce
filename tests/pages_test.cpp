// Moving kept tokens of paged caches, by block table and by pointers, against a cache in one piece.
#include "fastv/pages.hpp"

#include <gtest/gtest.h>

#include "fastv/fastv.hpp"
#include "oracle.hpp"
#include "refused.hpp"

namespace pages_test {
namespace {

using namespace fastv;
using oracle::Rng;

enum class Layout { token_major, head_major, chunked };  // chunked: vLLM's [block, head, dim / x, token, x]
constexpr Layout layouts[] = {Layout::token_major, Layout::head_major, Layout::chunked};

std::vector<Index> shuffled(Rng& rng, std::size_t count) {
  std::vector<Index> order(count);
  std::iota(order.begin(), order.end(), Index{0});
  for (std::size_t i = count; i > 1; --i) std::swap(order[i - 1], order[rng.below(i)]);
  return order;
}
std::vector<Index> random_kept(Rng& rng, std::size_t tokens) {
  const double share = rng.chance(0.2) ? static_cast<double>(rng.below(2)) : rng.real();
  std::vector<Index> kept;
  for (std::size_t t = 0; t < tokens; ++t)
    if (rng.chance(share)) kept.push_back(static_cast<Index>(t));
  return kept;
}

// A cache of elements T in shuffled pages, some of which belong to other sequences. Token t's element is a number of its
// own; what is no element of the sequence holds `other`.
template <class T>
struct Paged {
  static constexpr std::size_t chunk = 4;
  Layout layout;
  std::size_t heads, tokens, dim, size;  // size: tokens of a block
  std::vector<Index> table;
  std::vector<T> memory;
  std::vector<void*> blocks;  // where they are handed over by pointers

  // spare: blocks behind those in use, for tokens to come.
  Paged(Rng& rng, Layout which, std::size_t h, std::size_t n, std::size_t d, std::size_t b, std::size_t spare = 0)
      : layout(which), heads(h), tokens(n), dim(d), size(b), table(shuffled(rng, (n + b - 1) / b + spare + 3)) {
    memory.assign(table.size() * block(), T(7));
    table.resize(table.size() - 3);
    for (const Index b_of : table) blocks.push_back(memory.data() + b_of * block());
  }
  Paged(const Paged& other)
      : layout(other.layout),
        heads(other.heads),
        tokens(other.tokens),
        dim(other.dim),
        size(other.size),
        table(other.table),
        memory(other.memory) {
    for (const Index b : table) blocks.push_back(memory.data() + b * block());
  }

  std::size_t block() const { return size * heads * dim; }  // elements
  T& at(std::size_t head, std::size_t token, std::size_t d) {
    const std::size_t row = token % size;
    T* base = memory.data() + table[token / size] * block();
    switch (layout) {
      case Layout::token_major: return base[(row * heads + head) * dim + d];
      case Layout::head_major: return base[(head * size + row) * dim + d];
      case Layout::chunked: break;
    }
    return base[((head * (dim / chunk) + d / chunk) * size + row) * chunk + d % chunk];
  }
  static T number(std::size_t seed, std::size_t head, std::size_t token, std::size_t d) {
    return static_cast<T>(seed * 31 + token * 1009 + head * 101 + d * 3);
  }
  void fill(std::size_t seed) {
    for (std::size_t h = 0; h < heads; ++h)
      for (std::size_t t = 0; t < tokens; ++t)
        for (std::size_t d = 0; d < dim; ++d) at(h, t, d) = number(seed, h, t, d);
  }
  KvPages pages(Span<Index> of_table) {
    switch (layout) {
      case Layout::token_major: return fastv::pages(memory.data(), TokenMajor{size, heads, dim}, of_table, tokens);
      case Layout::head_major: return fastv::pages(memory.data(), HeadMajor{heads, size, dim}, of_table, tokens);
      case Layout::chunked: break;
    }
    return fastv::pages(memory.data(), ChunkedHeadMajor{heads, dim / chunk, size, chunk}, of_table, tokens);
  }
  KvPages pages() { return pages(table); }
  KvPages by_pointers() {
    switch (layout) {
      case Layout::token_major: return fastv::pages<T>(blocks, TokenMajor{size, heads, dim}, tokens);
      case Layout::head_major: return fastv::pages<T>(blocks, HeadMajor{heads, size, dim}, tokens);
      case Layout::chunked: break;
    }
    return fastv::pages<T>(blocks, ChunkedHeadMajor{heads, dim / chunk, size, chunk}, tokens);
  }
  void expect_kept(const std::vector<Index>& kept, std::size_t seed) {
    for (std::size_t i = 0; i < kept.size(); ++i)
      for (std::size_t h = 0; h < heads; ++h)
        for (std::size_t d = 0; d < dim; ++d)
          ASSERT_EQ(at(h, i, d), number(seed, h, kept[i], d)) << "token " << i << " of " << kept.size() << ", head "
                                                              << h << ", element " << d << ", blocks of " << size;
  }
  // The blocks of other sequences.
  void expect_others_untouched() {
    std::vector<bool> own(memory.size() / block());
    for (const Index b : table) own[b] = true;
    for (std::size_t i = 0; i < memory.size(); ++i)
      if (!own[i / block()]) {
        ASSERT_EQ(memory[i], T(7));
      }
  }
};

// ---- compact_pages ------------------------------------------------------------------------------

template <class T>
void check_compact(Rng& rng, Layout layout, std::size_t tokens, std::size_t size, const std::vector<Index>& kept) {
  // K and V of two layers: two share a table, one has its own, one is handed over by pointers.
  const std::size_t heads = rng.between(1, 3), dim = layout == Layout::chunked ? 8 : rng.between(1, 9);
  Paged<T> k(rng, layout, heads, tokens, dim, size, rng.below(3)), v = k;
  Paged<T> other(rng, layouts[rng.below(3)], 2, tokens, 4, size), pointed(rng, layout, heads, tokens, dim, size);
  Paged<T>* all[] = {&k, &v, &other, &pointed};
  for (std::size_t i = 0; i < 4; ++i) all[i]->fill(i);
  const std::vector<Index> table = k.table, other_table = other.table;
  const KvPages caches[] = {k.pages(), v.pages(k.table), other.pages(), pointed.by_pointers()};
  const auto used = compact_pages(kept, caches);
  ASSERT_TRUE(used) << used.message().c_str();
  EXPECT_EQ(*used, (kept.size() + size - 1) / size);
  EXPECT_EQ(k.table, table) << "layers below share it";
  EXPECT_EQ(other.table, other_table);
  for (std::size_t i = 0; i < 4; ++i) {
    all[i]->expect_kept(kept, i);
    all[i]->expect_others_untouched();
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(CompactPages, EqualsTheOnePieceWay) {
  Rng rng(1);
  for (int round = 0; round < 400; ++round) {
    const std::size_t tokens = rng.between(1, 60), size = rng.between(1, 17);
    const auto kept = random_kept(rng, tokens);
    if (round % 2 == 0)
      check_compact<float>(rng, layouts[round % 3], tokens, size, kept);
    else
      check_compact<std::uint8_t>(rng, layouts[round % 3], tokens, size, kept);
    if (HasFatalFailure()) FAIL() << "round " << round;
  }
}

TEST(CompactPages, OfOneCacheAndOfNone) {
  Rng rng(2);
  Paged<float> cache(rng, Layout::token_major, 2, 20, 3, 4);
  cache.fill(5);
  const std::vector<Index> kept = {1, 2, 9, 19};
  EXPECT_EQ(*compact_pages(kept, cache.pages()), 1u);
  cache.expect_kept(kept, 5);
  EXPECT_EQ(*compact_pages(kept, Span<const KvPages>()), 0u);
  EXPECT_EQ(*compact_pages(std::vector<Index>{}, cache.pages()), 0u);
}

// The last block may have room for tokens that are still to come, and a table padding behind it.
TEST(CompactPages, LooksAtTheBlocksInUseAlone) {
  Rng rng(3);
  Paged<float> cache(rng, Layout::head_major, 2, 9, 4, 4);
  cache.fill(6);
  std::vector<Index> padded = cache.table;
  padded.insert(padded.end(), 5, cache.table[0]);
  const std::vector<Index> kept = {3, 4, 8};
  EXPECT_EQ(*compact_pages(kept, cache.pages(padded)), 1u);
  cache.expect_kept(kept, 6);
}

// ---- repack_pages -------------------------------------------------------------------------------

void check_repack(Rng& rng, Layout layout, std::size_t tokens, std::size_t size, const std::vector<Index>& kept) {
  const std::size_t heads = rng.between(1, 3), dim = layout == Layout::chunked ? 8 : rng.between(1, 9);
  Paged<float> k(rng, layout, heads, tokens, dim, size, rng.below(3)), v = k;
  k.fill(1);
  v.fill(2);
  const std::vector<Index> table = k.table;
  const KvPages caches[] = {k.pages(), v.pages(k.table)};
  const auto blocks = repack_pages(kept, caches);
  ASSERT_TRUE(blocks) << blocks.message().c_str();
  v.table = k.table;
  ASSERT_EQ(blocks->used.size(), (kept.size() + size - 1) / size);
  ASSERT_EQ(blocks->used.data(), k.table.data());
  ASSERT_EQ(blocks->freed.data(), k.table.data() + blocks->used.size());
  ASSERT_EQ(blocks->used.size() + blocks->freed.size(), table.size());
  EXPECT_TRUE(std::is_permutation(table.begin(), table.end(), k.table.begin())) << "a block was lost or won";
  k.expect_kept(kept, 1);
  v.expect_kept(kept, 2);
  k.expect_others_untouched();
  v.expect_others_untouched();
}

TEST(RepackPages, EqualsTheOnePieceWay) {
  Rng rng(4);
  for (int round = 0; round < 400; ++round) {
    const std::size_t tokens = rng.between(1, 60);
    check_repack(rng, layouts[round % 3], tokens, rng.between(1, 17), random_kept(rng, tokens));
    if (HasFatalFailure()) FAIL() << "round " << round;
  }
}

TEST(RepackPages, TokensAtTheirPlaceAndWholeBlocksDoNotMove) {
  Rng rng(5);
  // Blocks of 4: the first is untouched, the second is dropped whole, the third only moves up in the table.
  Paged<float> cache(rng, Layout::token_major, 1, 12, 4, 4);
  cache.fill(3);
  const std::vector<float> before = cache.memory;
  const std::vector<Index> table = cache.table, kept = {0, 1, 2, 3, 8, 9, 10, 11};
  const KvPages caches[] = {cache.pages()};
  const auto blocks = repack_pages(kept, caches);
  ASSERT_TRUE(blocks);
  EXPECT_EQ(cache.memory, before);
  EXPECT_EQ(blocks->used[0], table[0]);
  EXPECT_EQ(blocks->used[1], table[2]);
  ASSERT_EQ(blocks->freed.size(), 1u);
  EXPECT_EQ(blocks->freed[0], table[1]);
}

TEST(RepackPages, OfNoCachesMovesNothing) {
  const auto blocks = repack_pages(std::vector<Index>{1}, {});
  ASSERT_TRUE(blocks);
  EXPECT_EQ(blocks->used.size() + blocks->freed.size(), 0u);
}

// ---- gather_pages -------------------------------------------------------------------------------

TEST(GatherPages, CopiesIntoBlocksOfAnySizeAndLeavesTheSource) {
  Rng rng(6);
  for (int round = 0; round < 400; ++round) {
    const Layout layout = layouts[round % 3];
    const std::size_t tokens = rng.between(1, 60), heads = rng.between(1, 3);
    const std::size_t dim = layout == Layout::chunked ? 8 : rng.between(1, 9);
    const auto kept = random_kept(rng, tokens);
    Paged<float> from(rng, layout, heads, tokens, dim, rng.between(1, 17));
    Paged<float> to(rng, layout, heads, std::max<std::size_t>(1, kept.size() + rng.below(5)), dim, rng.between(1, 17));
    from.fill(8);
    const std::vector<float> source = from.memory;
    const Status status = gather_pages(kept, rng.chance(0.5) ? from.pages() : from.by_pointers(),
                                       rng.chance(0.5) ? to.pages() : to.by_pointers());
    ASSERT_TRUE(status) << status.message().c_str();
    EXPECT_EQ(from.memory, source) << "other sequences share it";
    to.expect_kept(kept, 8);
    to.expect_others_untouched();
    if (HasFatalFailure()) FAIL() << "round " << round;
  }
}

// Copy on write within one cache: the shared prefix stays, the sequence goes on in blocks of its own.
TEST(GatherPages, WithinOneCache) {
  Rng rng(7);
  Paged<float> cache(rng, Layout::head_major, 2, 12, 4, 4, 2);  // two spare blocks
  cache.fill(9);
  const std::vector<float> before = cache.memory;
  std::vector<Index> own(cache.table.end() - 2, cache.table.end()), shared(cache.table.begin(), cache.table.end() - 2);
  const std::vector<Index> kept = {0, 2, 5, 6, 7, 11};
  KvPages to = cache.pages(own);
  to.count = 8;
  ASSERT_TRUE(gather_pages(kept, cache.pages(shared), to));
  cache.table = own;
  cache.expect_kept(kept, 9);
  cache.table = shared;
  for (std::size_t h = 0; h < 2; ++h)
    for (std::size_t t = 0; t < 12; ++t)
      for (std::size_t d = 0; d < 4; ++d) ASSERT_EQ(cache.at(h, t, d), (Paged<float>::number(9, h, t, d)));
}

// A source is only read: a prefix of padding may be one block many times.
TEST(GatherPages, TheSourceMayNameABlockTwice) {
  Rng rng(8);
  Paged<float> from(rng, Layout::token_major, 1, 8, 2, 4), to(rng, Layout::token_major, 1, 8, 2, 4);
  from.fill(1);
  std::vector<Index> twice = {from.table[1], from.table[1]};
  ASSERT_TRUE(gather_pages(std::vector<Index>{0, 4, 5}, from.pages(twice), to.pages()));
  for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(to.at(0, i, 1), from.at(0, i == 0 ? 4 : i + 3, 1));
}

// ---- blocks named twice -------------------------------------------------------------------------

// Written to, a block that is named twice would hold two lots of tokens: whichever comes last.
TEST(RepeatedBlocks, AreRefusedByTableAndByPointers) {
  Rng rng(9);
  for (int round = 0; round < 60; ++round) {
    const std::size_t tokens = rng.between(5, 60);
    Paged<float> cache(rng, layouts[round % 3], 2, tokens, 8, 2), source = cache;
    cache.fill(1);
    const std::vector<float> before = cache.memory;
    const std::size_t later = rng.between(1, cache.table.size() - 1), earlier = rng.below(later);
    cache.table[later] = cache.table[earlier];
    cache.blocks[later] = cache.blocks[earlier];
    const std::vector<Index> table = cache.table, kept = random_kept(rng, tokens);
    const std::string words = "block " + std::to_string(later) + " of the sequence";
    const auto is_refused = [&](const Status& status) { return refused(status, Errc::bad_pages, words.c_str()); };
    const KvPages pages[] = {cache.pages()};
    EXPECT_TRUE(is_refused(compact_pages(kept, cache.pages()).status));
    EXPECT_TRUE(is_refused(compact_pages(kept, cache.by_pointers()).status));
    EXPECT_TRUE(is_refused(repack_pages(kept, pages).status));
    EXPECT_TRUE(is_refused(gather_pages(kept, source.pages(), cache.pages())));
    EXPECT_TRUE(is_refused(gather_pages(kept, source.pages(), cache.by_pointers())));
    EXPECT_EQ(cache.memory, before);
    EXPECT_EQ(cache.table, table);
    const KvPages both[] = {source.pages(), cache.pages()};
    EXPECT_TRUE(is_refused(compact_pages(kept, both).status)) << "the second cache is checked before the first moves";
  }
}

// Far more blocks than the filter knows at a time.
TEST(RepeatedBlocks, AreFoundInTablesOfAnySize) {
  Rng rng(10);
  const std::size_t size = 40000;
  std::vector<float> memory(size);
  std::vector<Index> table = shuffled(rng, size);
  std::vector<void*> blocks;
  for (const Index b : table) blocks.push_back(&memory[b]);
  const std::vector<Index> kept = {0, 7, 39999};
  const TokenMajor shape{1, 1, 1};
  EXPECT_TRUE(compact_pages(kept, pages(memory.data(), shape, Span<Index>(table), size)));
  EXPECT_TRUE(compact_pages(kept, pages<float>(blocks, shape, size)));
  for (int round = 0; round < 20; ++round) {
    const std::size_t later = rng.between(1, size - 1), earlier = rng.below(later);
    const std::string words = "block " + std::to_string(later) + " of the sequence";
    const Index own = table[later];
    table[later] = table[earlier];
    blocks[later] = blocks[earlier];
    EXPECT_TRUE(refused(compact_pages(kept, pages(memory.data(), shape, Span<Index>(table), size)).status,
                        Errc::bad_pages, words.c_str()));
    EXPECT_TRUE(refused(compact_pages(kept, pages<float>(blocks, shape, size)).status, Errc::bad_pages, words.c_str()));
    table[later] = own;
    blocks[later] = &memory[own];
  }
}

// Numbers and addresses that differ in a few bits only, where a hash might take one for another.
TEST(RepeatedBlocks, AreFoundAmongNumbersFarApart) {
  for (const std::size_t count : {100u, 2047u, 2048u, 5000u})
    for (const unsigned shift : {0u, 6u, 12u, 20u, 33u, 48u}) {
      std::vector<std::uint64_t> names(count);
      for (std::size_t i = 0; i < count; ++i) names[i] = (0x7f0000000000u ^ i) << shift;
      const auto repeated = [&] { return detail::find_repeated(count, [&](std::size_t i) { return names[i]; }); };
      ASSERT_EQ(repeated(), count) << "none";
      names[count - 1] = names[3];
      ASSERT_EQ(repeated(), count - 1);
      names[71] = names[20];
      ASSERT_EQ(repeated(), 71u) << "the first of two";
    }
}

// ---- errors -------------------------------------------------------------------------------------

TEST(WrongPages, AreNamedAndNothingIsTouched) {
  Rng rng(11);
  const std::vector<Index> kept = {0, 5, 19};
  const auto check = [&](auto change, Errc code, const char* words, bool pointers = false) {
    Paged<float> cache(rng, Layout::head_major, 2, 20, 8, 4), room(rng, Layout::head_major, 2, 20, 8, 4);
    cache.fill(1);
    const std::vector<float> before = cache.memory, room_before = room.memory;
    const std::vector<Index> table = cache.table;
    KvPages pages = pointers ? cache.by_pointers() : cache.pages();
    change(pages);
    const KvPages good_first[] = {room.pages(), pages};
    EXPECT_TRUE(refused(compact_pages(kept, pages).status, code, words));
    EXPECT_TRUE(refused(compact_pages(kept, good_first).status, code, words));
    if (!pointers) {
      EXPECT_TRUE(refused(repack_pages(kept, Span<const KvPages>(&pages, 1)).status, code, words));
    }
    EXPECT_TRUE(refused(gather_pages(kept, pages, room.pages()), code, words));
    EXPECT_EQ(cache.memory, before);
    EXPECT_EQ(room.memory, room_before);
    EXPECT_EQ(cache.table, table);
  };
  check([](KvPages& p) { p.block_tokens = 0; }, Errc::bad_pages, "0 tokens");
  check([](KvPages& p) { p.block_table = {p.block_table.data(), 4}; }, Errc::bad_pages, "4 blocks but 5");
  check([](KvPages& p) { p.block_table = {}; }, Errc::bad_pages, "0 blocks but 5");
  check([](KvPages& p) { p.block_table = {nullptr, 5}; }, Errc::null_data, "block table");
  std::vector<std::int32_t> with_hole = {0, 1, 2, 3, -1};
  check([&](KvPages& p) { p.block_table = as_index(with_hole); }, Errc::bad_pages,
        "block 4 of the cache is 4294967295");
  check([](KvPages& p) { p.data = nullptr; }, Errc::null_data, "the cache");
  check([](KvPages& p) { p.row_stride = -32; }, Errc::bad_stride, "-32");
  check([](KvPages& p) { p.row_stride = 31; }, Errc::bad_stride, "row stride");
  check([](KvPages& p) { p.plane_stride = 64; }, Errc::bad_stride, "plane stride");
  check([](KvPages& p) { p.block_stride = 8; }, Errc::bad_stride, "overlap");
  check([](KvPages& p) { p.count = 19; }, Errc::bad_index, "19 rows");
  check([](KvPages& p) { p.blocks = {p.blocks.data(), 4}; }, Errc::bad_pages, "4 blocks but 5", true);
  check([](KvPages& p) { p.blocks = {}; }, Errc::bad_pages, "0 blocks but 5", true);
  check([](KvPages& p) { p.blocks = {nullptr, 5}; }, Errc::null_data, "blocks", true);
  std::vector<void*> with_a_hole;
  check(
      [&](KvPages& p) {
        with_a_hole.assign(p.blocks.begin(), p.blocks.end());
        with_a_hole[3] = nullptr;
        p.blocks = with_a_hole;
      },
      Errc::null_data, "block 3", true);
}

TEST(WrongPages, ThatDoNotBelongTogetherAreRefused) {
  Rng rng(12);
  Paged<float> cache(rng, Layout::head_major, 2, 20, 8, 4), copy = cache, other(rng, Layout::head_major, 2, 20, 8, 5);
  const std::vector<Index> kept = {0, 5, 19};
  const auto repack = [&](const KvPages& first, const KvPages& second) {
    const KvPages both[] = {first, second};
    return repack_pages(kept, both).status;
  };
  EXPECT_TRUE(repack(cache.pages(), copy.pages(cache.table)));
  EXPECT_TRUE(refused(repack(cache.pages(), copy.pages()), Errc::bad_pages, "cache 1 has another block table"));
  KvPages shorter = copy.pages(cache.table);
  shorter.count = 19;
  EXPECT_TRUE(refused(repack(cache.pages(), shorter), Errc::bad_pages, "cache 1 has 19 tokens"));
  EXPECT_TRUE(
      refused(repack(cache.pages(), cache.by_pointers()), Errc::not_supported, "cache 1 gives its blocks by pointers"));
  const KvPages sizes[] = {cache.pages(), other.pages()};
  EXPECT_TRUE(refused(compact_pages(kept, sizes).status, Errc::bad_pages, "blocks of 4 and of 5"));
  EXPECT_TRUE(refused(compact_pages(kept, Span<const KvPages>(nullptr, 2)).status, Errc::null_data, "caches"));
  EXPECT_TRUE(refused(repack_pages(kept, Span<const KvPages>(nullptr, 2)).status, Errc::null_data, "caches"));

  Paged<float> narrow(rng, Layout::head_major, 2, 20, 4, 4), one_head(rng, Layout::head_major, 1, 20, 8, 4);
  EXPECT_TRUE(refused(gather_pages(kept, cache.pages(), narrow.pages()), Errc::bad_shape,
                      "of 32 bytes at the source but 2 of 16"));
  EXPECT_TRUE(refused(gather_pages(kept, cache.pages(), one_head.pages()), Errc::bad_shape, "2 planes"));
  KvPages small = other.pages();
  small.count = 2;
  EXPECT_TRUE(refused(gather_pages(kept, cache.pages(), small), Errc::too_small, "2 tokens but needs 3"));
}

// Blocks may be further apart than their tokens need: those of one head as well.
TEST(Pages, OfBlocksWithRoomToSpareAreAsFarApartAsTheKeysAreRead) {
  for (const std::size_t heads : {1u, 2u}) {
    const HeadMajor shape{heads, 4, 3, 6};
    std::vector<float> memory(5 * heads * 6 * 3);
    std::vector<Index> table = {4, 0, 2};
    const KvPages moved = pages(memory.data(), shape, Span<Index>(table), 11);
    const Heads<float> read = fastv::heads(memory.data(), shape, Span<const Index>(table), 11);
    EXPECT_EQ(moved.block_stride, read.pages.block_stride * 4);
    EXPECT_EQ(moved.row_stride, read.token_stride * 4);
    EXPECT_EQ(moved.plane_stride, read.head_stride * 4);
    EXPECT_EQ(moved.block_stride, static_cast<std::ptrdiff_t>(heads * 6 * 3 * 4));
  }
}

}  // namespace
}  // namespace pages_test

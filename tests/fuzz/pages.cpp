// compact_pages, repack_pages and gather_pages against byte loops: blocks by table and by pointers, several caches,
// planes in either order; nothing but the rows of the kept tokens is ever touched.
#include <memory>

#include "rows.hpp"

namespace {

using namespace fuzz;

// One tensor of a paged cache, in an arena of blocks or in blocks that lie anywhere.
struct Cache {
  fastv::KvPages pages{};
  std::vector<Block<unsigned char>> memory, before;  // the arena, or one for each block of the sequence
  std::vector<std::size_t> block_of;                 // of the sequence's blocks, in the arena
  Block<void*> pointers{0};
  // Which memory and which byte of it holds byte b of a token's plane.
  std::pair<std::size_t, std::size_t> at(std::size_t token, std::size_t plane, std::size_t b) const {
    const std::size_t row = plane * static_cast<std::size_t>(pages.plane_stride) +
                            token % pages.block_tokens * static_cast<std::size_t>(pages.row_stride) + b;
    const std::size_t block = block_of[token / pages.block_tokens];
    if (pointers.size() > 0) return {block, row};
    return {0, block * static_cast<std::size_t>(pages.block_stride) + row};
  }
};

struct Shape {
  std::size_t row_bytes, planes;
};

// pages() of the shapes of view.hpp, or strides of its own. table: this sequence's, in an arena of `arena` blocks; empty:
// pointers to `needed` blocks.
Cache draw_cache(Input& in, const Block<Index>& table, std::size_t arena, std::size_t needed, std::size_t tokens,
                 std::size_t size, const Shape& shape) {
  Cache cache;
  std::size_t bytes = 0;  // of a block
  fastv::Rows in_block = draw_rows(in, size, shape.row_bytes, shape.planes, bytes);
  std::size_t stride = bytes + in.below(9);
  const std::size_t kind = in.below(3);
  const auto given = [&](const auto& block) {
    std::vector<Index> none(1);  // of the arena: its strides alone are of interest
    const fastv::KvPages view = fastv::pages(static_cast<unsigned char*>(nullptr), block, none, 1);
    in_block = {nullptr, size, view.row_bytes, view.row_stride, view.planes, view.plane_stride};
    stride = static_cast<std::size_t>(view.block_stride);
    bytes = stride;
  };
  const std::size_t room = size + (in.chance() ? 0 : in.below(3));
  if (kind == 1) {
    if (shape.planes == 1)
      given(fastv::TokenMajor{size, 1, shape.row_bytes});
    else
      given(fastv::HeadMajor{shape.planes, size, shape.row_bytes, room});
  } else if (kind == 2) {
    if (shape.planes % 2 == 0)
      given(fastv::ChunkedHeadMajor{shape.planes / 2, 2, size, shape.row_bytes});
    else
      given(fastv::HeadMajor{shape.planes, size, shape.row_bytes, room});
  }
  if (kind > 0) {
    FUZZ_CHECK(in_block.row_bytes == shape.row_bytes && in_block.planes == shape.planes);
    // Whatever the shape: blocks hold all of its rows, and follow each other.
    const std::size_t reach = (size - 1) * static_cast<std::size_t>(in_block.row_stride) +
                              (shape.planes - 1) * static_cast<std::size_t>(in_block.plane_stride) + shape.row_bytes;
    FUZZ_CHECK(stride >= reach);
    const bool roomy = kind == 2 ? shape.planes % 2 != 0 : shape.planes != 1;
    FUZZ_CHECK(stride == shape.planes * shape.row_bytes * (roomy ? room : size));
  }
  cache.pages = {nullptr,
                 table.span(),
                 size,
                 static_cast<std::ptrdiff_t>(stride),
                 tokens,
                 in_block.row_bytes,
                 in_block.row_stride,
                 in_block.planes,
                 in_block.plane_stride};
  if (arena > 0 || needed == 0) {
    cache.memory.push_back(noise(in, arena == 0 ? 0 : (arena - 1) * stride + bytes));
    cache.pages.data = cache.memory[0].data();
    for (const Index block : table) cache.block_of.push_back(block);
  } else {
    cache.pointers = Block<void*>(needed);
    for (std::size_t i = 0; i < needed; ++i) {
      cache.memory.push_back(noise(in, bytes));
      cache.block_of.push_back(i);
      cache.pointers[i] = cache.memory[i].data();
    }
    cache.pages.block_table = {};
    cache.pages.blocks = {cache.pointers.data(), needed};
    cache.pages.block_stride = 0;
  }
  for (const Block<unsigned char>& block : cache.memory) cache.before.emplace_back(block);
  return cache;
}

Block<Index> draw_table(Input& in, std::size_t blocks, std::size_t& arena) {
  arena = blocks + in.below(3);
  std::vector<Index> order(arena);
  std::iota(order.begin(), order.end(), Index{0});
  oracle::Rng rng = in.random();
  for (std::size_t i = order.size(); i-- > 1;) std::swap(order[i], order[rng.below(i + 1)]);
  order.resize(blocks);
  return Block<Index>(order);
}

bool untouched(const Cache& cache) {
  bool same = true;
  for (std::size_t m = 0; m < cache.memory.size(); ++m) same = same && same_bits(cache.memory[m], cache.before[m]);
  return same;
}

// Token i of `to` is what token kept[i] of `from` was, and all else is as before.
void expect_moved(const Cache& to, const Cache& from, const std::vector<Index>& kept) {
  std::vector<std::vector<bool>> written;
  for (const Block<unsigned char>& memory : to.memory) written.emplace_back(memory.size(), false);
  for (std::size_t i = 0; i < kept.size(); ++i)
    for (std::size_t p = 0; p < to.pages.planes; ++p)
      for (std::size_t b = 0; b < to.pages.row_bytes; ++b) {
        const auto [target, there] = to.at(i, p, b);
        const auto [source, here] = from.at(kept[i], p, b);
        FUZZ_CHECK(to.memory[target][there] == from.before[source][here]);
        written[target][there] = true;
      }
  for (std::size_t m = 0; m < to.memory.size(); ++m)
    for (std::size_t b = 0; b < to.memory[m].size(); ++b)
      FUZZ_CHECK(written[m][b] || to.memory[m][b] == to.before[m][b]);
}

// One number of a cache that nobody should hand over. False: it may be right as it is.
bool spoil_cache(Input& in, fastv::KvPages& one, std::size_t needed, bool written) {
  const std::size_t size = one.block_tokens, count = one.count;
  switch (in.below(10)) {
    case 0: one.block_tokens = 0; return true;
    case 1:
      one.count = in.hostile();
      return (one.count + size - 1) / size > (std::max)(one.block_table.size(), one.blocks.size());
    case 2:
      if (one.blocks.empty())
        one.block_table = {nullptr, one.block_table.size()};
      else
        one.blocks = {nullptr, one.blocks.size()};
      return needed > 0;
    case 3:
      if (needed == 0) return false;
      one.block_table = {one.block_table.data(), one.blocks.empty() ? needed - 1 : 0};
      one.blocks = {one.blocks.data(), one.blocks.empty() ? 0 : needed - 1};
      return !(one.blocks.empty() && one.block_table.empty() && count == 0);
    case 4: one.data = nullptr; return needed > 0 && one.blocks.empty();
    case 5: one.row_stride = -1; return true;
    case 6: one.row_stride = static_cast<std::ptrdiff_t>(one.row_bytes) - 1; return size > 1 && needed > 0;
    case 7: one.block_stride = static_cast<std::ptrdiff_t>(in.hostile() | (std::size_t{1} << 63)); return true;
    case 8: one.plane_stride = -1; return true;
    default:
      if (!written || needed < 2 || !one.blocks.empty()) return false;
      one.block_table[needed - 1] = one.block_table[in.below(needed - 1)];  // of the sequence: put back by the caller
      return true;
  }
}

void within(Input& in) {
  const std::size_t count = in.between(0, 50), size = in.between(1, 9), needed = (count + size - 1) / size;
  const bool repack = in.chance(), by_table = repack || in.chance();
  std::vector<Index> kept = draw_kept(in, count);
  const bool ascending = !spoil(in, kept, count);
  const Block<Index> indices(kept);
  const KeptOf given(in, indices, count);
  std::vector<Cache> caches;
  std::size_t arena = 0;
  const Block<Index> table = draw_table(in, by_table ? needed + in.below(3) : 0, arena);
  if (!by_table) arena = 0;
  std::vector<Block<Index>> own;  // tables of their own
  own.reserve(3);
  for (std::size_t c = in.between(1, 3); c > 0; --c) {
    const Shape shape{in.between(1, 9), in.between(1, 4)};
    if (!repack && by_table && in.one_in(3)) {
      std::size_t other = 0;
      own.push_back(draw_table(in, needed, other));
      caches.push_back(draw_cache(in, own.back(), other, needed, count, size, shape));
    } else {
      caches.push_back(draw_cache(in, table, arena, needed, count, size, shape));
    }
  }
  std::vector<fastv::KvPages> views;
  for (const Cache& cache : caches) views.push_back(cache.pages);
  const std::vector<Index> order(table.begin(), table.end());
  const auto run = [&](const std::vector<fastv::KvPages>& all) {
    if (repack) return fastv::repack_pages(given.rows, Span<const fastv::KvPages>(all)).status;
    return fastv::compact_pages(given.rows, Span<const fastv::KvPages>(all)).status;
  };
  const auto nothing_moved = [&] {
    for (const Cache& cache : caches) FUZZ_CHECK(untouched(cache));
    FUZZ_CHECK(std::equal(order.begin(), order.end(), table.begin()));
  };

  // First what must be told: then nothing may have moved.
  std::vector<fastv::KvPages> bad = views;
  fastv::KvPages& one = bad[in.below(bad.size())];
  std::vector<Block<Index>> tables_before;
  for (const Cache& cache : caches)
    tables_before.emplace_back(Span<const Index>(cache.pages.block_table.data(), cache.pages.block_table.size()));
  if (spoil_cache(in, one, needed, true)) {
    const Status told = run(bad);
    check_message(told);
    FUZZ_CHECK(!told);
    for (std::size_t c = 0; c < caches.size(); ++c)
      std::copy(tables_before[c].begin(), tables_before[c].end(), caches[c].pages.block_table.begin());
    nothing_moved();
  }
  FUZZ_CHECK(!run({views[0], fastv::KvPages{}}) || count == 0);
  for (std::size_t c = 0; c < caches.size(); ++c)
    std::copy(tables_before[c].begin(), tables_before[c].end(), caches[c].pages.block_table.begin());
  nothing_moved();
  if (!ascending || !given.fits) {
    const Status told = run(views);
    check_message(told);
    FUZZ_CHECK(!told);
    return nothing_moved();
  }
  const std::size_t used = (kept.size() + size - 1) / size;
  if (!repack) {
    const auto in_use = views.size() == 1 && in.chance()
                            ? fastv::compact_pages(given.rows, views[0])
                            : fastv::compact_pages(given.rows, Span<const fastv::KvPages>(views));
    FUZZ_CHECK(in_use && *in_use == used);
    FUZZ_CHECK(std::equal(order.begin(), order.end(), table.begin()));
    for (const Cache& cache : caches) expect_moved(cache, cache, kept);
    return;
  }
  const auto result = fastv::repack_pages(given.rows, Span<const fastv::KvPages>(views));
  FUZZ_CHECK(result && result->used.size() == used && result->used.size() + result->freed.size() == table.size());
  FUZZ_CHECK(table.size() == 0 || (result->used.data() == table.data() && result->freed.data() == table.data() + used));
  std::vector<Index> now(table.begin(), table.end()), sorted = order;
  std::sort(now.begin(), now.end());
  std::sort(sorted.begin(), sorted.end());
  FUZZ_CHECK(now == sorted);  // no block lost, none twice
  for (const Cache& cache : caches) {
    Cache after;
    after.pages = cache.pages;
    for (const Block<unsigned char>& memory : cache.memory) after.memory.emplace_back(memory);
    for (const Block<unsigned char>& memory : cache.before) after.before.emplace_back(memory);
    for (const Index block : table) after.block_of.push_back(block);
    expect_moved(after, cache, kept);
  }
  // As little as can be: a token whose row and block are where they should be has not been written.
  for (std::size_t b = 0; b < used; ++b) FUZZ_CHECK(result->used[b] == order[kept[b * size] / size]);
}

// Copies into other blocks, of another size, by table or pointers; both in one cache or in two.
void into_others(Input& in) {
  const std::size_t count = in.between(0, 50), size = in.between(1, 9), to_size = in.between(1, 9);
  std::vector<Index> kept = draw_kept(in, count);
  const bool ascending = !spoil(in, kept, count);
  const Block<Index> indices(kept);
  const KeptOf given(in, indices, count);
  const std::size_t needed = (count + size - 1) / size, room = kept.size() + in.below(4),
                    to_needed = (room + to_size - 1) / to_size;
  const bool by_table = in.chance(), to_by_table = in.chance();
  std::size_t arena = 0, to_arena = 0;
  const Block<Index> table = draw_table(in, by_table ? needed : 0, arena);
  const Block<Index> to_table = draw_table(in, to_by_table ? to_needed : 0, to_arena);
  if (!by_table) arena = 0;
  if (!to_by_table) to_arena = 0;
  const Shape shape{in.between(1, 9), in.between(1, 4)};
  Cache from = draw_cache(in, table, arena, needed, count, size, shape);
  Cache to = draw_cache(in, to_table, to_arena, to_needed, room, to_size, shape);
  // The sequence may share blocks with others, or with itself: it is read alone.
  if (by_table && needed > 1 && in.one_in(4)) {
    table[needed - 1] = table[0];
    from.block_of[needed - 1] = from.block_of[0];
  }
  const auto nothing_moved = [&] { FUZZ_CHECK(untouched(from) && untouched(to)); };
  fastv::KvPages bad = to.pages, other = from.pages;
  bool wrong = true;
  Index last = to_table.size() > 0 ? to_table[to_needed - 1] : 0;
  switch (in.below(6)) {
    case 0: wrong = spoil_cache(in, bad, to_needed, true); break;
    case 1: wrong = spoil_cache(in, other, needed, false); break;
    case 2: bad.row_bytes += 1; break;
    case 3: bad.planes += 1; break;
    case 4:
      bad.count = kept.empty() ? 0 : kept.size() - 1;
      wrong = !kept.empty();
      break;
    default: wrong = false; break;
  }
  if (wrong) {
    const Status told = fastv::gather_pages(given.rows, other, bad);
    check_message(told);
    FUZZ_CHECK(!told);
    if (to_table.size() > 0) to_table[to_needed - 1] = last;
    nothing_moved();
  }
  const Status status = fastv::gather_pages(given.rows, from.pages, to.pages);
  check_message(status);
  FUZZ_CHECK(static_cast<bool>(status) == (ascending && given.fits));
  if (!status) return nothing_moved();
  expect_moved(to, from, kept);
  FUZZ_CHECK(untouched(from));
}

}  // namespace

FASTV_FUZZ_TARGET(pages) { in.one_in(3) ? into_others(in) : within(in); }

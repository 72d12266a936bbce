// compact, gather, masks and pages against byte loops; nothing outside a view's own rows is ever touched.
#include "fuzz.hpp"

namespace {

using namespace fuzz;

std::vector<Index> draw_kept(Input& in, std::size_t count) {
  oracle::Rng rng = in.random();
  const double share = in.share();
  std::vector<Index> kept;
  for (std::size_t i = 0; i < count; ++i)
    if (rng.chance(share)) kept.push_back(static_cast<Index>(i));
  return kept;
}

// Ascending and below count, or else: what must be told.
bool spoil(Input& in, std::vector<Index>& kept, std::size_t count) {
  if (kept.empty() || !in.one_in(5)) return false;
  Index& one = kept[in.below(kept.size())];
  one = static_cast<Index>(in.hostile());
  bool right = true;
  for (std::size_t i = 0; i < kept.size(); ++i) right = right && kept[i] < count && (i == 0 || kept[i] > kept[i - 1]);
  return !right;
}

Block<unsigned char> noise(Input& in, std::size_t bytes) {
  oracle::Rng rng = in.random();
  Block<unsigned char> block(bytes);
  for (unsigned char& b : block) b = static_cast<unsigned char>(rng.next());
  return block;
}

// Strides for rows of so many bytes and planes, in either order, with gaps; `bytes`: exactly what they reach.
fastv::Rows draw_rows(Input& in, std::size_t count, std::size_t row_bytes, std::size_t planes, std::size_t& bytes) {
  fastv::Rows rows{nullptr, count, row_bytes, 0, planes, 0};
  const std::size_t gap = in.below(5), plane_gap = in.below(7);
  if (in.chance()) {  // plane after plane
    rows.row_stride = static_cast<std::ptrdiff_t>(row_bytes + gap);
    rows.plane_stride = static_cast<std::ptrdiff_t>(count * (row_bytes + gap) + plane_gap);
  } else {  // the planes of a row side by side
    rows.plane_stride = static_cast<std::ptrdiff_t>(row_bytes + gap);
    rows.row_stride = static_cast<std::ptrdiff_t>(planes * (row_bytes + gap) + plane_gap);
  }
  bytes = count == 0 || planes == 0 ? 0
                                    : (count - 1) * static_cast<std::size_t>(rows.row_stride) +
                                          (planes - 1) * static_cast<std::size_t>(rows.plane_stride) + row_bytes;
  return rows;
}

std::size_t byte_at(const fastv::Rows& rows, std::size_t plane, std::size_t row) {
  return plane * static_cast<std::size_t>(rows.plane_stride) + row * static_cast<std::size_t>(rows.row_stride);
}

void contiguous(Input& in) {
  const std::size_t count = in.between(1, 60), width = in.between(1, in.one_in(4) ? 200 : 20),
                    planes = in.between(1, 4);
  std::size_t bytes = 0, other_bytes = 0;
  fastv::Rows rows = draw_rows(in, count, width, planes, bytes);
  std::vector<Index> kept = draw_kept(in, count);
  const bool wrong = spoil(in, kept, count);
  fastv::Rows other = draw_rows(in, kept.size() + in.below(3), width, planes, other_bytes);
  const Block<unsigned char> data = noise(in, bytes), before(data), target = noise(in, other_bytes),
                             target_before(target);
  rows.data = data.data();
  other.data = target.data();
  const Block<Index> indices(kept);
  const bool copy = in.chance();
  const Status status = copy ? fastv::gather(indices.view(), rows, other) : fastv::compact(indices.view(), rows);
  check_message(status);
  FUZZ_CHECK(static_cast<bool>(status) == !wrong);
  const fastv::Rows& to = copy ? other : rows;
  std::vector<unsigned char> expected(copy ? target_before.begin() : before.begin(),
                                      copy ? target_before.end() : before.end());
  for (std::size_t p = 0; p < planes && !wrong; ++p)
    for (std::size_t i = 0; i < kept.size(); ++i)
      for (std::size_t b = 0; b < width; ++b) expected[byte_at(to, p, i) + b] = before[byte_at(rows, p, kept[i]) + b];
  FUZZ_CHECK(std::equal(expected.begin(), expected.end(), copy ? target.begin() : data.begin()));

  // Numbers nobody should hand over: told, and nothing touched.
  const Block<unsigned char> now(data);
  fastv::Rows bad = rows;
  switch (in.below(6)) {
    case 0: bad.row_stride = -1 - static_cast<std::ptrdiff_t>(in.below(9)); break;
    case 1: bad.plane_stride = static_cast<std::ptrdiff_t>(in.hostile() | (std::size_t{1} << 63)); break;
    case 2: bad.data = nullptr; break;
    case 3:
      bad.row_stride = static_cast<std::ptrdiff_t>(in.below(width)), bad.count = (std::max)(count, std::size_t{2});
      break;
    case 4: bad.row_bytes = static_cast<std::size_t>(-1) - in.below(9); break;
    default:
      bad.planes = static_cast<std::size_t>(-1) - in.below(9);
      bad.plane_stride += 1;
      break;
  }
  const Status told = fastv::compact(indices.view(), bad);
  check_message(told);
  FUZZ_CHECK(!told || (bad.count <= 1 && bad.planes <= 1));
  FUZZ_CHECK(std::equal(now.begin(), now.end(), data.begin()));
  FUZZ_CHECK(!fastv::compact({nullptr, 1}, rows));
}

void mask(Input& in) {
  const std::size_t tokens = in.between(1, 30), element = in.between(1, 8), gap = in.below(9);
  const std::size_t stride = tokens * element + gap;
  const std::vector<Index> kept = draw_kept(in, tokens);
  const Block<Index> indices(kept);
  const Block<unsigned char> data = noise(in, (tokens - 1) * stride + tokens * element), before(data);
  FUZZ_CHECK(fastv::compact_mask(indices.view(), data.data(), tokens, element, static_cast<std::ptrdiff_t>(stride)));
  for (std::size_t r = 0; r < kept.size(); ++r)
    for (std::size_t c = 0; c < kept.size(); ++c)
      for (std::size_t b = 0; b < element; ++b)
        FUZZ_CHECK(data[r * stride + c * element + b] == before[kept[r] * stride + kept[c] * element + b]);
  const std::size_t bad = in.hostile();
  if (bad >= tokens * element || tokens == 1) return;
  check_message(fastv::compact_mask(indices.view(), data.data(), tokens, element, static_cast<std::ptrdiff_t>(bad)));
}

void bias(Input& in) {
  const std::size_t tokens = in.between(0, 90), more = in.below(40);
  std::vector<Index> kept = draw_kept(in, tokens);
  const bool wrong = spoil(in, kept, tokens);
  const Block<Index> indices(kept);
  const Block<float> row(tokens + more, 7.0f);
  const Block<std::uint32_t> bits((tokens + more + 31) / 32, 5u);
  const Status status = fastv::keep_bias(indices.view(), tokens, row.span(), -9.0f);
  FUZZ_CHECK(static_cast<bool>(status) == !wrong);
  FUZZ_CHECK(static_cast<bool>(fastv::keep_bitmap(indices.view(), tokens, bits.span())) == !wrong);
  check_message(status);
  for (std::size_t i = 0; i < tokens + more && !wrong; ++i) {
    const bool seen = i >= tokens || std::count(kept.begin(), kept.end(), static_cast<Index>(i)) > 0;
    FUZZ_CHECK(row[i] == (seen ? 0.0f : -9.0f));
    FUZZ_CHECK((bits[i / 32] >> (i % 32) & 1u) == (seen ? 1u : 0u));
  }
  if (tokens > 0 && !wrong) {
    FUZZ_CHECK(!fastv::keep_bias(indices.view(), tokens, {row.data(), tokens - 1}, 0));
    FUZZ_CHECK(!fastv::keep_bias(indices.view(), tokens, {nullptr, tokens}, 0));
    FUZZ_CHECK(!fastv::keep_bitmap(indices.view(), tokens, {nullptr, bits.size()}));
  }
  std::vector<std::int64_t> ids(tokens);
  std::vector<Index> unsigned_ids(tokens);
  oracle::Rng rng = in.random();
  std::int64_t most = -1;
  for (std::size_t i = 0; i < tokens; ++i) {
    ids[i] = static_cast<std::int64_t>(rng.below(1000));
    unsigned_ids[i] = static_cast<Index>(ids[i]);
    most = (std::max)(most, ids[i]);
  }
  FUZZ_CHECK(fastv::next_position(Span<const std::int64_t>(ids)) == most + 1);
  FUZZ_CHECK(fastv::next_position(Span<const Index>(unsigned_ids)) == static_cast<Index>(most + 1));
}

// A paged cache: blocks anywhere in one arena, several caches over one table, planes in either order.
void paged(Input& in) {
  const std::size_t count = in.between(0, 50), size = in.between(1, 9), spare = in.below(3);
  const std::size_t needed = (count + size - 1) / size, blocks = needed + spare;
  std::vector<Index> order(blocks + in.below(3));
  std::iota(order.begin(), order.end(), Index{0});
  oracle::Rng rng = in.random();
  for (std::size_t i = order.size(); i-- > 1;) std::swap(order[i], order[rng.below(i + 1)]);
  const std::size_t arena_blocks = order.size();
  order.resize(blocks);
  const Block<Index> table(order);
  std::vector<Index> kept = draw_kept(in, count);
  const bool wrong = spoil(in, kept, count);
  const Block<Index> indices(kept);

  std::vector<fastv::PagedRows> caches;
  std::vector<Block<unsigned char>> arenas, before;
  for (std::size_t c = in.between(1, 2); c > 0; --c) {
    std::size_t bytes = 0;
    const fastv::Rows in_block = draw_rows(in, size, in.between(1, 9), in.between(1, 3), bytes);
    const std::size_t stride = bytes + in.below(9);
    arenas.push_back(noise(in, arena_blocks == 0 ? 0 : (arena_blocks - 1) * stride + bytes));
    before.emplace_back(arenas.back());
    caches.push_back({arenas.back().data(), table.span(), size, static_cast<std::ptrdiff_t>(stride), count,
                      in_block.row_bytes, in_block.row_stride, in_block.planes, in_block.plane_stride});
  }
  const auto row_of = [](const fastv::PagedRows& cache, std::size_t block, std::size_t plane, std::size_t row) {
    return block * static_cast<std::size_t>(cache.block_stride) + plane * static_cast<std::size_t>(cache.plane_stride) +
           row * static_cast<std::size_t>(cache.row_stride);
  };
  // First what must be told: then nothing may have moved.
  std::vector<fastv::PagedRows> bad = caches;
  fastv::PagedRows& one = bad[in.below(bad.size())];
  switch (in.below(8)) {
    case 0: one.block_tokens = 0; break;
    case 1: one.block_tokens = in.hostile(); break;
    case 2: one.count = in.hostile(); break;
    case 3: one.block_table = {nullptr, blocks}; break;
    case 4: one.block_table = {table.data(), needed > 0 ? needed - 1 : 0}; break;
    case 5: one.data = nullptr; break;
    case 6: one.row_stride = -1; break;
    default: one.block_stride = static_cast<std::ptrdiff_t>(in.hostile() | (std::size_t{1} << 63)); break;
  }
  // Not wrong: nothing to look at, or a sequence of other length or smaller blocks in the same memory. And a single
  // block that claims to be larger than it is cannot be told from one that is.
  const bool sane =
      needed == 0 || (bad.size() == 1 && one.count <= blocks * size && one.count != count) ||
      (bad.size() == 1 && one.block_tokens > 0 && one.block_tokens < size) ||
      (bad.size() == 1 && one.block_tokens > size) ||
      (one.count == count && one.block_tokens == size && one.block_table.data() != nullptr &&
       one.block_table.size() >= needed && one.data != nullptr && one.row_stride >= 0 && one.block_stride >= 0);
  if (!sane) {
    const auto told = fastv::compact(indices.view(), Span<const fastv::PagedRows>(bad));
    check_message(told.status);
    FUZZ_CHECK(!told);
    FUZZ_CHECK(std::equal(order.begin(), order.end(), table.begin()));
  }
  FUZZ_CHECK(!fastv::compact(indices.view(), Span<const fastv::PagedRows>(nullptr, 1)));

  const auto result = fastv::compact(indices.view(), Span<const fastv::PagedRows>(caches));
  check_message(result.status);
  FUZZ_CHECK(static_cast<bool>(result) == !wrong);
  if (wrong) {
    for (std::size_t c = 0; c < caches.size(); ++c)
      FUZZ_CHECK(std::equal(arenas[c].begin(), arenas[c].end(), before[c].begin()));
    return;
  }
  FUZZ_CHECK(result->used.size() == (kept.size() + size - 1) / size);
  FUZZ_CHECK(result->used.size() + result->freed.size() == blocks);
  std::vector<Index> now(table.begin(), table.end()), sorted = order;
  std::sort(now.begin(), now.end());
  std::sort(sorted.begin(), sorted.end());
  FUZZ_CHECK(now == sorted);  // no block lost, none twice
  for (std::size_t c = 0; c < caches.size(); ++c) {
    const fastv::PagedRows& cache = caches[c];
    std::vector<bool> written(arenas[c].size(), false);
    for (std::size_t i = 0; i < kept.size(); ++i)
      for (std::size_t p = 0; p < cache.planes; ++p)
        for (std::size_t b = 0; b < cache.row_bytes; ++b) {
          const std::size_t to = row_of(cache, result->used[i / size], p, i % size) + b;
          const std::size_t from = row_of(cache, order[kept[i] / size], p, kept[i] % size) + b;
          FUZZ_CHECK(arenas[c][to] == before[c][from]);
          written[to] = true;
        }
    for (std::size_t i = 0; i < arenas[c].size(); ++i) FUZZ_CHECK(written[i] || arenas[c][i] == before[c][i]);
  }
}

}  // namespace

FASTV_FUZZ_TARGET(compact) {
  switch (in.below(4)) {
    case 0: return contiguous(in);
    case 1: return mask(in);
    case 2: return bias(in);
    default: return paged(in);
  }
}

// compact, gather, masks, biases and lists of indices against byte loops; nothing outside a view's own rows is ever
// touched. (Pages: pages.cpp.)
#include "rows.hpp"

namespace {

using namespace fuzz;

// Packed planes end side by side, [planes, kept]; what lies behind them may be anything that was there.
std::vector<unsigned char> compacted(const fastv::Rows& rows, const Block<unsigned char>& before,
                                     const std::vector<Index>& kept) {
  std::vector<unsigned char> expected(before.begin(), before.end());
  for (std::size_t p = 0; p < rows.planes; ++p)
    for (std::size_t i = 0; i < kept.size(); ++i) {
      const bool packed = rows.packed && rows.planes > 1;
      const std::size_t to = packed ? (p * kept.size() + i) * rows.row_bytes : byte_at(rows, p, i);
      for (std::size_t b = 0; b < rows.row_bytes; ++b) expected[to + b] = before[byte_at(rows, p, kept[i]) + b];
    }
  return expected;
}

void contiguous(Input& in) {
  const std::size_t count = in.between(in.one_in(9) ? 0 : 1, 60), planes = in.between(1, in.one_in(5) ? 9 : 4);
  const std::size_t width = in.between(1, in.one_in(4) ? 200 : 20);
  std::size_t bytes = 0, other_bytes = 0;
  fastv::Rows rows = draw_rows(in, count, width, planes, bytes);
  std::vector<Index> kept = draw_kept(in, count);
  const bool ascending = !spoil(in, kept, count);
  fastv::Rows other = draw_rows(in, kept.size() + in.below(3), width, planes, other_bytes);
  const Block<unsigned char> data = noise(in, bytes), before(data), target = noise(in, other_bytes),
                             target_before(target);
  rows.data = data.data();
  other.data = target.data();
  const bool copy = in.chance();
  rows.packed = !copy && in.chance();
  const bool side_by_side = rows.row_stride == static_cast<std::ptrdiff_t>(width) || count <= 1 || planes <= 1;
  const Block<Index> indices(kept);
  const KeptOf given(in, indices, count);
  const bool right = ascending && given.fits && (!rows.packed || side_by_side);
  const Status status = copy ? fastv::gather(given.rows, rows, other) : fastv::compact(given.rows, rows);
  check_message(status);
  FUZZ_CHECK(static_cast<bool>(status) == right);
  if (copy) {
    std::vector<unsigned char> expected(target_before.begin(), target_before.end());
    for (std::size_t p = 0; p < planes && right; ++p)
      for (std::size_t i = 0; i < kept.size(); ++i)
        for (std::size_t b = 0; b < width; ++b)
          expected[byte_at(other, p, i) + b] = before[byte_at(rows, p, kept[i]) + b];
    FUZZ_CHECK(std::equal(expected.begin(), expected.end(), target.begin()));
    FUZZ_CHECK(same_bits(data, before));
    if (right && !kept.empty()) {
      fastv::Rows short_by_one = other;
      short_by_one.count = kept.size() - 1;
      FUZZ_CHECK(fastv::gather(given.rows, rows, short_by_one).code == Errc::too_small);
    }
  } else if (right) {
    const std::vector<unsigned char> expected = compacted(rows, before, kept);
    if (rows.packed && planes > 1) {  // what the moved rows do not cover is what some row or gap held
      FUZZ_CHECK(std::equal(expected.begin(),
                            expected.begin() + static_cast<std::ptrdiff_t>(planes * kept.size() * width),
                            data.begin()));
    } else {
      FUZZ_CHECK(std::equal(expected.begin(), expected.end(), data.begin()));
    }
  } else {
    FUZZ_CHECK(same_bits(data, before));
  }

  // Numbers nobody should hand over: told, and nothing touched.
  const Block<unsigned char> now(data);
  fastv::Rows bad = rows;
  bad.packed = false;
  bool wrong = count > 0;
  switch (in.below(6)) {
    case 0: bad.row_stride = -1 - static_cast<std::ptrdiff_t>(in.below(9)); break;
    case 1: bad.plane_stride = static_cast<std::ptrdiff_t>(in.hostile() | (std::size_t{1} << 63)); break;
    case 2: bad.data = nullptr; break;
    case 3:
      bad.row_stride = static_cast<std::ptrdiff_t>(in.below(width));
      bad.count = (std::max)(count, std::size_t{2});
      wrong = true;
      break;
    case 4: bad.row_bytes = static_cast<std::size_t>(-1) - in.below(9); break;
    default:
      bad.planes = static_cast<std::size_t>(-1) - in.below(9);
      bad.plane_stride += 1;
      break;
  }
  if (wrong) {
    const Status told = fastv::compact(indices.view(), bad);
    check_message(told);
    FUZZ_CHECK(!told || (bad.count <= 1 && bad.planes <= 1));
  }
  FUZZ_CHECK(same_bits(data, now));
  FUZZ_CHECK(!fastv::compact(fastv::KeptRows(Span<const Index>(nullptr, 1), count), rows));
}

// Typed tensors in the shapes of view.hpp, the values of which tell where they came from.
void shapes(Input& in) {
  const std::size_t tokens = in.between(1, 30), heads = in.between(1, 3), dim = in.between(1, 5);
  const std::vector<Index> kept = draw_kept(in, tokens);
  const Block<Index> indices(kept);
  const KeptOf given(in, indices, tokens);
  const std::size_t kind = in.below(4), gap = in.below(4);
  std::size_t axes = 1, head_step = 0, token_step = 0, size = 0;
  const auto value_of = [](std::size_t token, std::size_t head, std::size_t d) {
    return static_cast<std::uint64_t>(token * 10000 + head * 100 + d);
  };
  switch (kind) {
    case 0: token_step = heads * dim + gap, head_step = dim, size = (tokens - 1) * token_step + heads * dim; break;
    case 1: head_step = (tokens + gap) * dim, token_step = dim, size = (heads - 1) * head_step + tokens * dim; break;
    case 2: axes = heads, size = heads * tokens; break;
    default: size = tokens; break;
  }
  const Block<std::uint64_t> data(size, 7);
  const auto at = [&](std::size_t token, std::size_t head, std::size_t d) -> std::uint64_t& {
    return kind == 2   ? data[head * tokens + token]
           : kind == 3 ? data[token]
                       : data[token * token_step + head * head_step + d];
  };
  const std::size_t all_heads = kind == 3 ? 1 : heads, all_dims = kind < 2 ? dim : 1;
  for (std::size_t t = 0; t < tokens; ++t)
    for (std::size_t h = 0; h < all_heads; ++h)
      for (std::size_t d = 0; d < all_dims; ++d) at(t, h, d) = value_of(t, h, d);
  Status status;
  switch (kind) {
    case 0:
      status = fastv::compact(
          given.rows,
          fastv::rows(data.data(), fastv::TokenMajor{tokens, heads, dim, static_cast<std::ptrdiff_t>(token_step)}));
      break;
    case 1:
      status = fastv::compact(given.rows, fastv::rows(data.data(), fastv::HeadMajor{heads, tokens, dim, tokens + gap}));
      break;
    case 2: status = fastv::compact(given.rows, fastv::position_axes(data.data(), axes, tokens)); break;
    default: status = fastv::compact(given.rows, data); break;
  }
  FUZZ_CHECK(static_cast<bool>(status) == given.fits);
  if (!given.fits) return;
  for (std::size_t i = 0; i < kept.size(); ++i)
    for (std::size_t h = 0; h < all_heads; ++h)
      for (std::size_t d = 0; d < all_dims; ++d) {
        const std::uint64_t moved = kind == 2 ? data[h * kept.size() + i] : at(i, h, d);
        FUZZ_CHECK(moved == value_of(kept[i], h, d));
      }
}

void mask(Input& in) {
  const std::size_t tokens = in.between(1, 30), element = in.between(1, 8), gap = in.below(9);
  const std::size_t stride = tokens * element + gap;
  const std::vector<Index> kept = draw_kept(in, tokens);
  const Block<Index> indices(kept);
  const Block<unsigned char> data = noise(in, (tokens - 1) * stride + tokens * element), before(data);
  const KeptOf given(in, indices, tokens);
  const fastv::Rows view = fastv::rows(data.data(), tokens, tokens * element, static_cast<std::ptrdiff_t>(stride));
  FUZZ_CHECK(static_cast<bool>(fastv::compact_mask(given.rows, view)) == given.fits);
  for (std::size_t r = 0; r < kept.size() && given.fits; ++r)
    for (std::size_t c = 0; c < kept.size(); ++c)
      for (std::size_t b = 0; b < element; ++b)
        FUZZ_CHECK(data[r * stride + c * element + b] == before[kept[r] * stride + kept[c] * element + b]);
  if (!given.fits) FUZZ_CHECK(same_bits(data, before));
  fastv::Rows bad = view;
  switch (in.below(3)) {
    case 0: bad.row_stride = static_cast<std::ptrdiff_t>(in.below(tokens * element)); break;
    case 1: bad.row_bytes += in.between(1, tokens - 1 + (tokens == 1 ? 1 : 0)); break;  // not as many a column
    default: bad.planes = 2; break;
  }
  const Status told = fastv::compact_mask(indices.view(), bad);
  check_message(told);
  if (tokens > 1) FUZZ_CHECK(!told);
}

void bias(Input& in) {
  const std::size_t tokens = in.between(0, 90), more = in.below(40);
  std::vector<Index> kept = draw_kept(in, tokens);
  const bool wrong = spoil(in, kept, tokens);
  const Block<Index> indices(kept);
  const Block<float> row(tokens + more, 7.0f);
  const Block<std::uint32_t> bits((tokens + more + 31) / 32, 5u);
  const fastv::KeptRows rows(indices.view(), tokens);
  const Status status = fastv::keep_bias(rows, row.span(), -9.0f);
  FUZZ_CHECK(static_cast<bool>(status) == !wrong);
  FUZZ_CHECK(static_cast<bool>(fastv::keep_bitmap(rows, bits.span())) == !wrong);
  check_message(status);
  for (std::size_t i = 0; i < tokens + more && !wrong; ++i) {
    const bool seen = i >= tokens || std::count(kept.begin(), kept.end(), static_cast<Index>(i)) > 0;
    FUZZ_CHECK(row[i] == (seen ? 0.0f : -9.0f));
    FUZZ_CHECK((bits[i / 32] >> (i % 32) & 1u) == (seen ? 1u : 0u));
  }
  FUZZ_CHECK(!fastv::keep_bias(indices.view(), row.span(), -9.0f));  // of how many tokens is unknown
  FUZZ_CHECK(!fastv::keep_bitmap(indices.view(), bits.span()));
  if (tokens > 0 && !wrong) {
    FUZZ_CHECK(!fastv::keep_bias(rows, {row.data(), tokens - 1}, 0));
    FUZZ_CHECK(!fastv::keep_bias(rows, {nullptr, tokens}, 0));
    FUZZ_CHECK(!fastv::keep_bitmap(rows, {nullptr, bits.size()}));
    FUZZ_CHECK(!fastv::keep_bitmap(rows, {bits.data(), (tokens + 31) / 32 - 1}));
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

// What the engine moves itself: lists, runs, numbers of visual tokens.
void lists(Input& in) {
  const oracle::Layout prompt = layout(in, 4, 20, false);
  std::vector<Index> kept = draw_kept(in, prompt.tokens);
  const bool wrong = spoil(in, kept, fastv::max_tokens);
  const Block<Index> indices(kept);
  const Block<std::int64_t> wide(kept.size());
  const auto offset = static_cast<std::int64_t>(in.word() >> 20);
  const Status status = fastv::write_indices(indices.view(), wide.span(), offset);
  check_message(status);
  FUZZ_CHECK(static_cast<bool>(status) == !wrong);
  std::vector<Index> sources;
  std::size_t runs = 0, steps = 0;
  const Status walked = fastv::for_each_run(indices.view(), [&](std::size_t to, std::size_t from, std::size_t count) {
    FUZZ_CHECK(to == sources.size() && count > 0);
    ++runs;
    for (std::size_t i = 0; i < count; ++i) sources.push_back(static_cast<Index>(from + i));
  });
  FUZZ_CHECK(static_cast<bool>(walked) == !wrong);
  const Block<TokenSpan> visual(prompt.visual);
  const Block<Index> numbers(kept.size());
  const auto counted = fastv::kept_visual_numbers(indices.view(), visual.view(), numbers.span());
  check_message(counted.status);
  FUZZ_CHECK(static_cast<bool>(counted) == !wrong);
  if (wrong) return;
  FUZZ_CHECK(sources == kept);
  for (std::size_t i = 0; i < kept.size(); ++i) {
    FUZZ_CHECK(wide[i] == static_cast<std::int64_t>(kept[i]) + offset);
    steps += i == 0 || kept[i] != kept[i - 1] + 1 ? 1u : 0u;
  }
  FUZZ_CHECK(runs == steps);
  std::vector<Index> expected;
  Index number = 0;
  for (const TokenSpan& span : prompt.visual)
    for (std::size_t i = 0; i < span.count; ++i, ++number)
      if (std::count(kept.begin(), kept.end(), static_cast<Index>(span.first + i)) > 0) expected.push_back(number);
  FUZZ_CHECK(*counted == expected.size() && std::equal(expected.begin(), expected.end(), numbers.begin()));
  if (!expected.empty()) {
    FUZZ_CHECK(!fastv::kept_visual_numbers(indices.view(), visual.view(), {numbers.data(), expected.size() - 1}));
    FUZZ_CHECK(!fastv::kept_visual_numbers(indices.view(), visual.view(), {nullptr, expected.size()}));
  }
  if (kept.empty()) return;
  FUZZ_CHECK(!fastv::write_indices(indices.view(), Span<std::int64_t>(wide.data(), kept.size() - 1)));
  FUZZ_CHECK(!fastv::write_indices(indices.view(), Span<std::int64_t>(nullptr, kept.size())));
}

}  // namespace

FASTV_FUZZ_TARGET(compact) {
  switch (in.below(6)) {
    case 0:
    case 1: return contiguous(in);
    case 2: return shapes(in);
    case 3: return mask(in);
    case 4: return bias(in);
    default: return lists(in);
  }
}

// Moving rows against a loop over bytes.
#include "fastv/apply.hpp"

#include <gtest/gtest.h>

#include "fastv/eigen.hpp"
#include "oracle.hpp"

namespace {

using namespace fastv;
using Bytes = std::vector<unsigned char>;

Bytes random_bytes(oracle::Rng& rng, std::size_t size) {
  Bytes bytes(size);
  for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(rng.next());
  return bytes;
}
std::vector<Index> random_kept(oracle::Rng& rng, std::size_t count) {
  const double share = rng.chance(0.2) ? static_cast<double>(rng.below(2)) : rng.real();
  std::vector<Index> kept;
  for (std::size_t i = 0; i < count; ++i)
    if (rng.chance(share)) kept.push_back(static_cast<Index>(i));
  return kept;
}

std::size_t start_of(const Rows& rows, std::size_t plane, std::size_t row) {
  return plane * static_cast<std::size_t>(rows.plane_stride) + row * static_cast<std::size_t>(rows.row_stride);
}
// `to` after the kept rows of `from` were copied to its front: byte by byte, out of place.
Bytes gathered(const std::vector<Index>& kept, const Bytes& from, const Rows& from_rows, Bytes to,
               const Rows& to_rows) {
  for (std::size_t plane = 0; plane < from_rows.planes; ++plane)
    for (std::size_t row = 0; row < kept.size(); ++row)
      for (std::size_t byte = 0; byte < from_rows.row_bytes; ++byte)
        to[start_of(to_rows, plane, row) + byte] = from[start_of(from_rows, plane, kept[row]) + byte];
  return to;
}

// Rows of `row_bytes` in `planes` planes with random gaps, the planes outside or inside the rows.
struct Tensor {
  Bytes bytes;
  Rows rows;
  Tensor(oracle::Rng& rng, std::size_t planes, std::size_t count, std::size_t row_bytes) {
    const std::size_t gap = rng.chance(0.4) ? 0 : rng.between(1, 9);
    const bool inside = rng.chance(0.3);
    const std::size_t inner = row_bytes + gap, outer = inner * (inside ? planes : count) + (rng.chance(0.5) ? 0 : 5);
    bytes = random_bytes(rng, outer * (inside ? count : planes) + 3);
    rows = {bytes.data(), count,
            row_bytes,    static_cast<std::ptrdiff_t>(inside ? outer : inner),
            planes,       static_cast<std::ptrdiff_t>(inside ? inner : outer)};
  }
  Tensor(const Tensor&) = delete;
};

TEST(Compact, EqualsAByteLoopForRowsOf1To77BytesAnyStrideAndPlanes) {
  oracle::Rng rng(40);
  for (std::size_t row_bytes = 1; row_bytes <= 77; ++row_bytes)
    for (int draw = 0; draw < 20; ++draw) {
      const std::size_t count = rng.between(1, 30);
      Tensor tensor(rng, rng.between(1, 20), count, row_bytes);
      const auto kept = random_kept(rng, count);
      const Bytes expected = gathered(kept, tensor.bytes, tensor.rows, tensor.bytes, tensor.rows);
      ASSERT_TRUE(compact(kept, tensor.rows));
      ASSERT_EQ(tensor.bytes, expected) << row_bytes << " bytes, draw " << draw;  // gaps and rows behind included
    }
}

TEST(Gather, EqualsAByteLoopBetweenTensorsOfDifferentStrides) {
  oracle::Rng rng(41);
  for (std::size_t row_bytes = 1; row_bytes <= 77; ++row_bytes)
    for (int draw = 0; draw < 20; ++draw) {
      const std::size_t count = rng.between(1, 30), planes = rng.between(1, 20);
      const auto kept = random_kept(rng, count);
      const Tensor from(rng, planes, count, row_bytes);
      Tensor to(rng, planes, std::max<std::size_t>(1, kept.size() + rng.below(3)), row_bytes);
      const Bytes source = from.bytes, expected = gathered(kept, from.bytes, from.rows, to.bytes, to.rows);
      ASSERT_TRUE(gather(kept, from.rows, to.rows));
      ASSERT_EQ(to.bytes, expected) << row_bytes << " bytes, draw " << draw;
      ASSERT_EQ(from.bytes, source) << "the source is only read";
    }
}

TEST(Compact, KeepingEverythingOrNothingLeavesEveryByte) {
  oracle::Rng rng(42);
  Tensor tensor(rng, 3, 10, 7);
  const Bytes before = tensor.bytes;
  std::vector<Index> all(10);
  std::iota(all.begin(), all.end(), Index{0});
  EXPECT_TRUE(compact(all, tensor.rows));
  EXPECT_TRUE(compact(std::vector<Index>{}, tensor.rows));
  EXPECT_EQ(tensor.bytes, before);
  EXPECT_TRUE(compact(std::vector<Index>{}, Rows{nullptr, 0, 4, 4})) << "an empty tensor needs no memory";
}

// ---- what engines hold --------------------------------------------------------------------------

const std::vector<Index> kept_of_10 = {0, 1, 4, 5, 6, 9};

TEST(Compact, PositionsOnOneAxis) {
  std::vector<std::int64_t> positions = {100, 101, 102, 103, 104, 105, 106, 107, 108, 109};
  ASSERT_TRUE(compact(kept_of_10, Span<std::int64_t>(positions)));
  positions.resize(6);
  EXPECT_EQ(positions, (std::vector<std::int64_t>{100, 101, 104, 105, 106, 109}));
}

TEST(Compact, PositionsOfMRopeKeepTheirThreeAxes) {
  std::vector<std::int32_t> positions(30);
  for (std::size_t axis = 0; axis < 3; ++axis)
    for (std::size_t i = 0; i < 10; ++i) positions[axis * 10 + i] = static_cast<std::int32_t>(1000 * axis + i);
  ASSERT_TRUE(compact(kept_of_10, position_axes(positions.data(), 3, 10)));
  for (std::size_t axis = 0; axis < 3; ++axis)
    for (std::size_t i = 0; i < 6; ++i)
      EXPECT_EQ(positions[axis * 10 + i], static_cast<std::int32_t>(1000 * axis + kept_of_10[i]));
}

TEST(Compact, KvCachesOfBothLayoutsWithSpareCapacity) {
  const std::size_t count = 10, heads = 3, dim = 4, capacity = 16;
  const auto value = [](std::size_t token, std::size_t head, std::size_t d) {
    return static_cast<std::uint16_t>(token * 100 + head * 10 + d);
  };
  for (const KvLayout layout : {KvLayout::token_major, KvLayout::head_major}) {
    const auto at = [&](std::size_t token, std::size_t head, std::size_t d) {
      return layout == KvLayout::token_major ? (token * heads + head) * dim + d : (head * capacity + token) * dim + d;
    };
    std::vector<std::uint16_t> cache(heads * capacity * dim, 9999);
    for (std::size_t t = 0; t < count; ++t)
      for (std::size_t h = 0; h < heads; ++h)
        for (std::size_t d = 0; d < dim; ++d) cache[at(t, h, d)] = value(t, h, d);
    ASSERT_TRUE(compact(kept_of_10, kv_rows(cache.data(), count, heads, dim * 2, layout, capacity)));
    for (std::size_t i = 0; i < kept_of_10.size(); ++i)
      for (std::size_t h = 0; h < heads; ++h)
        for (std::size_t d = 0; d < dim; ++d) ASSERT_EQ(cache[at(i, h, d)], value(kept_of_10[i], h, d));
    for (std::size_t t = count; t < capacity; ++t)
      for (std::size_t h = 0; h < heads; ++h) ASSERT_EQ(cache[at(t, h, 0)], 9999) << "behind the tokens";
  }
}

TEST(CompactMask, KeepsTheKeptRowsAndColumns) {
  oracle::Rng rng(43);
  for (const std::size_t element : {1u, 2u, 4u})
    for (const std::size_t gap : {0u, 3u})
      for (int draw = 0; draw < 40; ++draw) {
        const std::size_t n = rng.between(1, 20), stride = n * element + gap;
        const auto kept = random_kept(rng, n);
        Bytes mask = random_bytes(rng, n * stride);
        const Bytes before = mask;
        ASSERT_TRUE(compact_mask(kept, mask.data(), n, element, static_cast<std::ptrdiff_t>(stride)));
        for (std::size_t i = 0; i < kept.size(); ++i)
          for (std::size_t j = 0; j < kept.size(); ++j)
            for (std::size_t byte = 0; byte < element; ++byte)
              ASSERT_EQ(mask[i * stride + j * element + byte], before[kept[i] * stride + kept[j] * element + byte]);
      }
}

TEST(CompactMask, ACausalMaskStaysCausal) {
  std::vector<float> mask(100);
  for (std::size_t i = 0; i < 10; ++i)
    for (std::size_t j = 0; j < 10; ++j) mask[i * 10 + j] = j <= i ? 0.0f : -1e30f;
  ASSERT_TRUE(compact_mask(kept_of_10, mask.data(), 10, sizeof(float), 10 * sizeof(float)));
  for (std::size_t i = 0; i < 6; ++i)
    for (std::size_t j = 0; j < 6; ++j) EXPECT_EQ(mask[i * 10 + j], j <= i ? 0.0f : -1e30f);
}

// ---- errors -------------------------------------------------------------------------------------

TEST(Compact, NothingIsTouchedOnAnError) {
  oracle::Rng rng(44);
  Bytes bytes = random_bytes(rng, 400);
  const Bytes before = bytes;
  const Rows good{bytes.data(), 10, 4, 4, 3, 40};
  const auto expect = [&](Errc code, const std::vector<Index>& kept, Rows rows) {
    EXPECT_EQ(compact(kept, rows).code, code);
    EXPECT_EQ(gather(kept, rows, {bytes.data() + 200, 10, 4, 4, 3, 40}).code, code);
    EXPECT_EQ(gather({std::vector<Index>{1, 2}}, {bytes.data() + 200, 10, rows.row_bytes, 40, 3, 4}, rows).code,
              kept.size() == 2 ? code : Errc::ok)
        << "the destination is checked too";
    bytes = before;
  };
  const auto changed = [&](auto change) {
    Rows rows = good;
    change(rows);
    return rows;
  };
  EXPECT_EQ(compact(std::vector<Index>{1, 5, 10}, good).code, Errc::index_past_end) << "found before row 1 has moved";
  EXPECT_EQ(compact(std::vector<Index>{1, 5, 5}, good).code, Errc::indices_unsorted);
  EXPECT_EQ(compact(std::vector<Index>{1, 5, 2}, good).code, Errc::indices_unsorted);
  EXPECT_EQ(bytes, before);
  expect(Errc::negative_stride, {1, 2}, changed([](Rows& r) { r.row_stride = -4; }));
  expect(Errc::negative_stride, {1, 2}, changed([](Rows& r) { r.plane_stride = -40; }));
  expect(Errc::overlapping_stride, {1, 2}, changed([](Rows& r) { r.row_stride = 3; }));
  expect(Errc::overlapping_stride, {1, 2}, changed([](Rows& r) { r.row_stride = 0; }));
  expect(Errc::overlapping_stride, {1, 2}, changed([](Rows& r) { r.plane_stride = 39; }));
  expect(Errc::overlapping_stride, {1, 2}, changed([](Rows& r) { r.plane_stride = 0; }));
  expect(Errc::null_data, {1, 2}, changed([](Rows& r) { r.data = nullptr; }));
  EXPECT_EQ(compact_mask({std::vector<Index>{0, 9}}, bytes.data(), 10, 4, 39).code, Errc::overlapping_stride);
  EXPECT_EQ(compact_mask({std::vector<Index>{0, 10}}, bytes.data(), 10, 4, 40).code, Errc::index_past_end);
  EXPECT_EQ(bytes, before);
}

TEST(Gather, RefusesTensorsThatDoNotFit) {
  Bytes bytes(200), room(200);
  const Rows from{bytes.data(), 10, 4, 4};
  const std::vector<Index> kept = {0, 3, 9};
  EXPECT_EQ(gather(kept, from, {room.data(), 2, 4, 4}).code, Errc::room_too_small);
  EXPECT_TRUE(gather(kept, from, {room.data(), 3, 4, 4}));
  EXPECT_EQ(gather(kept, from, {room.data(), 3, 5, 5}).code, Errc::rows_differ);
  EXPECT_EQ(gather(kept, from, {room.data(), 3, 4, 4, 2, 40}).code, Errc::rows_differ);
}

// ---- Eigen --------------------------------------------------------------------------------------

template <class Matrix>
class EigenMatrices : public testing::Test {};
using Matrices =
    testing::Types<Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>, Eigen::MatrixXf,
                   Eigen::MatrixXd, Eigen::Matrix<Eigen::half, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>,
                   Eigen::Matrix<std::int8_t, Eigen::Dynamic, 3>>;
TYPED_TEST_SUITE(EigenMatrices, Matrices, );  // the comma is for clang -Wpedantic

TYPED_TEST(EigenMatrices, CompactRowsKeepsTheKeptRowsAndShrinks) {
  using Scalar = typename TypeParam::Scalar;
  TypeParam matrix(10, 3);
  for (Eigen::Index i = 0; i < 10; ++i)
    for (Eigen::Index j = 0; j < 3; ++j) matrix(i, j) = static_cast<Scalar>(static_cast<float>(10 * i + j));
  const TypeParam before = matrix;
  Kept kept;
  kept.indices = kept_of_10;
  ASSERT_TRUE(compact_rows(kept, matrix));
  ASSERT_EQ(matrix.rows(), 6);
  ASSERT_EQ(matrix.cols(), 3);
  for (std::size_t i = 0; i < 6; ++i)
    for (Eigen::Index j = 0; j < 3; ++j)
      ASSERT_EQ(static_cast<float>(matrix(static_cast<Eigen::Index>(i), j)),
                static_cast<float>(before(static_cast<Eigen::Index>(kept_of_10[i]), j)));
}

TEST(EigenAdaptor, CompactRowsLeavesTheMatrixAloneOnAnError) {
  Eigen::MatrixXf matrix = Eigen::MatrixXf::Random(5, 3);
  const Eigen::MatrixXf before = matrix;
  Kept kept;
  kept.indices = kept_of_10;
  EXPECT_EQ(compact_rows(kept, matrix).code, Errc::index_past_end);
  Kept failed;
  failed.status.code = Errc::all_scores_nan;
  EXPECT_EQ(compact_rows(failed, matrix).code, Errc::all_scores_nan);
  EXPECT_EQ(matrix, before);
}

TEST(EigenAdaptor, CompactRowsWorksOnVectorsOfPositions) {
  Eigen::VectorXi positions = Eigen::VectorXi::LinSpaced(10, 0, 9);
  Kept kept;
  kept.indices = kept_of_10;
  ASSERT_TRUE(compact_rows(kept, positions));
  EXPECT_EQ(std::vector<Index>(positions.begin(), positions.end()), kept_of_10);
}

TEST(EigenAdaptor, QueryKeyViewsTheMatricesInPlace) {
  using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const RowMajor query = RowMajor::Random(2, 8 * 5), key = RowMajor::Random(20, 2 * 5);
  const auto view = query_key(query, key, 17, 8, 2, 0.5f);
  EXPECT_TRUE(check(view));
  EXPECT_EQ(view.query, query.data());
  EXPECT_EQ(view.key, key.data());
  EXPECT_EQ(view.rows, 2u);
  EXPECT_EQ(view.keys, 17u);
  EXPECT_EQ(view.dim, 5u);
  EXPECT_EQ(view.query_row_stride, 40);
  EXPECT_EQ(view.key_token_stride, 10);
  EXPECT_EQ(check(query_key(query, key, 17, 0, 2, 0.5f)).code, Errc::no_heads);
  EXPECT_EQ(check(query_key(query, key, 17, 8, 4, 0.5f)).code, Errc::overlapping_stride)
      << "the key matrix is too narrow for four heads";
}

}  // namespace

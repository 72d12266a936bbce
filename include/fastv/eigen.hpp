// fastv: views of Eigen matrices. Needs Eigen 3.4 or newer; no Eigen object is stored anywhere. Of the core it includes
// no more than views and errors; whoever prunes includes fastv.hpp too.
#pragma once

#include <Eigen/Core>

#include "config.hpp"

namespace fastv {

// A matrix whose rows are tokens, in either storage order: row-major rows are moved whole, column-major ones element
// by element (every column is a plane).
template <class Derived>
Rows rows(Eigen::PlainObjectBase<Derived>& matrix) noexcept {
  using Scalar = typename Derived::Scalar;
  const auto count = static_cast<std::size_t>(matrix.rows()), width = static_cast<std::size_t>(matrix.cols());
  if (Derived::IsRowMajor) return rows(matrix.data(), count, width);
  return {matrix.data(),  count, sizeof(Scalar),
          sizeof(Scalar), width, static_cast<std::ptrdiff_t>(count * sizeof(Scalar))};
}

// Keeps the kept rows of a matrix and shrinks it to them, which allocates anew. kept: Kept, or a Span of indices. A
// Kept that failed, or a wrong index, leaves the matrix as it is. O(elements kept).
template <class Kept, class Derived>
Status compact_rows(const Kept& kept, Eigen::PlainObjectBase<Derived>& matrix) {
  const Status status = compact(kept, rows(matrix));
  if (status) matrix.conservativeResize(static_cast<Eigen::Index>(kept.size()), matrix.cols());
  return status;
}

// query: row-major [rows, heads * dim]; key: row-major [at least keys, kv_heads * dim].
template <class Q, class K>
auto query_key(const Eigen::PlainObjectBase<Q>& query, const Eigen::PlainObjectBase<K>& key, std::size_t keys,
               std::size_t heads, std::size_t kv_heads, float scale) noexcept {
  static_assert(Q::IsRowMajor && K::IsRowMajor, "fastv::query_key needs row-major matrices");
  const std::size_t dim = heads == 0 ? 0 : static_cast<std::size_t>(query.cols()) / heads;  // 0 heads: check() tells
  auto view = query_key(query.data(), heads, static_cast<std::size_t>(query.rows()), key.data(), kv_heads, keys, dim,
                        scale, KvLayout::token_major);
  // The matrices' own widths: a kv_heads too large for the key matrix is then an overlapping stride.
  view.query_row_stride = static_cast<std::ptrdiff_t>(query.cols());
  view.key_token_stride = static_cast<std::ptrdiff_t>(key.cols());
  return view;
}

}  // namespace fastv

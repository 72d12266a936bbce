// fastv: views of Eigen matrices. Needs Eigen 3.4 or newer; no Eigen object is stored anywhere. Include it beside
// fastv.hpp; of the core it includes no more than views.
#pragma once

#include <Eigen/Core>

#include "apply.hpp"

#include "detail/begin.hpp"

namespace fastv {
inline namespace FASTV_KIND {

// A matrix whose rows are tokens, in either storage order: row-major rows are moved whole, column-major ones element by
// element (every column is a plane). A Map or block of a larger matrix is read with its strides. O(1).
template <class Derived>
Rows rows(Eigen::PlainObjectBase<Derived>& matrix) noexcept {
  const auto count = static_cast<std::size_t>(matrix.rows()), width = static_cast<std::size_t>(matrix.cols());
  if (Derived::IsRowMajor) return fastv::rows(matrix.data(), count, width);
  return fastv::rows(matrix.data(), HeadMajor{width, count, 1});
}

// Keeps the kept rows of a matrix and shrinks it to them, which allocates anew. kept that failed, or a wrong index, leaves
// the matrix as it is. O(elements kept).
template <class Derived>
Status compact(const KeptRows& kept, Eigen::PlainObjectBase<Derived>& matrix) {
  const Status status = fastv::compact(kept, fastv::rows(matrix));
  if (status) matrix.conservativeResize(static_cast<Eigen::Index>(kept.indices.size()), matrix.cols());
  return status;
}
// The matrix types themselves, which would otherwise match compact() of containers.
template <class Scalar, int Rows, int Columns, int Options, int MaxRows, int MaxColumns>
Status compact(const KeptRows& kept, Eigen::Matrix<Scalar, Rows, Columns, Options, MaxRows, MaxColumns>& matrix) {
  return compact(
      kept,
      static_cast<Eigen::PlainObjectBase<Eigen::Matrix<Scalar, Rows, Columns, Options, MaxRows, MaxColumns>>&>(matrix));
}
template <class Scalar, int Rows, int Columns, int Options, int MaxRows, int MaxColumns>
Status compact(const KeptRows& kept, Eigen::Array<Scalar, Rows, Columns, Options, MaxRows, MaxColumns>& array) {
  return compact(
      kept,
      static_cast<Eigen::PlainObjectBase<Eigen::Array<Scalar, Rows, Columns, Options, MaxRows, MaxColumns>>&>(array));
}

// Queries, keys or values of one layer: a row-major matrix [at least tokens, heads * dim], the first `tokens` rows of it
// (0: all). heads that do not divide the columns are refused when the view is used. O(1).
template <class Derived>
auto heads(const Eigen::PlainObjectBase<Derived>& matrix, std::size_t heads, std::size_t tokens = 0) noexcept {
  static_assert(Derived::IsRowMajor, "fastv::heads() needs a row-major matrix, one token per row");
  const auto columns = static_cast<std::size_t>(matrix.cols()), count = static_cast<std::size_t>(matrix.rows());
  const std::size_t dim = heads == 0 || columns % heads != 0 ? 0 : columns / heads;  // 0 is refused
  const std::size_t used = tokens == 0 ? count : tokens;
  return fastv::heads(used <= count ? matrix.data() : nullptr,
                      TokenMajor{used, heads, dim, static_cast<std::ptrdiff_t>(columns)});
}

}  // namespace FASTV_KIND
}  // namespace fastv

#include "detail/end.hpp"

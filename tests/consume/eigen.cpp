// fastv::eigen brings Eigen along: keeps two of three rows of a matrix.
#include <cstdio>
#include <fastv/eigen.hpp>
#include <fastv/fastv.hpp>

int main() {
  Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> hidden(3, 2);
  hidden << 0, 1, 2, 3, 4, 5;
  const fastv::Index kept[] = {0, 2};
  if (!fastv::compact(kept, hidden)) return 1;
  std::printf("%d rows\n", static_cast<int>(hidden.rows()));
  return hidden.rows() == 2 && hidden(1, 1) == 5 ? 0 : 1;
}

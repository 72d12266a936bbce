// What fragments of README.md on Eigen may name.
#pragma once

#include <fastv/eigen.hpp>

#include "prompt.hpp"

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
extern Matrix q, k, hidden;  // [1, heads * dim], [at least n, kv heads * dim], [n, width]

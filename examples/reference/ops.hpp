// The few operations a transformer is made of, on row-major Eigen matrices [tokens, width].
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "tensors.hpp"

namespace reference {

// x w^T: x [t, in], w [out, in] as Hugging Face stores it -> [t, out].
// Written column by column first: that way round Eigen keeps its speed on short inputs, such as pruned ones.
template <class X, class W>
Matrix linear(const X& x, const W& w) {
  const Eigen::MatrixXf columns = x * w.transpose();
  return columns;
}

// x / sqrt(mean(x^2) + eps) * weight, row by row.
inline Matrix rms_norm(const Matrix& x, const Matrix& weight, float eps) {
  const auto scale = (x.array().square().rowwise().mean() + eps).rsqrt();
  return (x.array().colwise() * scale).rowwise() * weight.row(0).array();
}

// (x - mean) / sqrt(variance + eps) * weight + bias, row by row.
inline Matrix layer_norm(const Matrix& x, const Matrix& weight, const Matrix& bias, float eps) {
  const Matrix centred = x.colwise() - x.rowwise().mean();
  return rms_norm(centred, weight, eps).rowwise() + bias.row(0);
}

inline Matrix silu(const Matrix& x) { return x.array() / (1 + (-x.array()).exp()); }
inline Matrix quick_gelu(const Matrix& x) { return x.array() / (1 + (-1.702f * x.array()).exp()); }
inline Matrix gelu(const Matrix& x) {
  return x.unaryExpr([](float v) { return 0.5f * v * (1 + std::erf(v * 0.70710678f)); });
}

// Softmax of every row, in place. A row that sees nothing (all -infinity) becomes zero, not NaN.
inline void softmax_rows(Eigen::Ref<Matrix> x) {
  for (Eigen::Index i = 0; i < x.rows(); ++i) {
    auto row = x.row(i).array();
    const float highest = row.maxCoeff();
    if (std::isinf(highest)) {
      row = 0;
      continue;
    }
    row = (row - highest).exp();
    row /= row.sum();
  }
}

// Rotary position embedding, rotate-half layout (LLaMA in Hugging Face): in every head of dimension d the pair
// (x_i, x_{i + d/2}) is turned by the angle position * theta^(-2i/d). x: [t, heads * d], in place.
inline void rope(Matrix& x, const std::vector<std::int64_t>& positions, Eigen::Index d, float theta) {
  const Eigen::Index half = d / 2;
  RowVector frequency(half);
  for (Eigen::Index i = 0; i < half; ++i)
    frequency[i] = 1.0f / std::pow(theta, static_cast<float>(2 * i) / static_cast<float>(d));
  for (Eigen::Index t = 0; t < x.rows(); ++t) {
    const Eigen::ArrayXXf angle = frequency.array() * static_cast<float>(positions[static_cast<std::size_t>(t)]);
    const Eigen::ArrayXXf cosine = angle.cos(), sine = angle.sin();
    for (Eigen::Index head = 0; head < x.cols(); head += d) {
      auto low = x.row(t).segment(head, half).array(), high = x.row(t).segment(head + half, half).array();
      const Eigen::ArrayXXf turned = low * cosine - high * sine;
      high = high * cosine + low * sine;
      low = turned;
    }
  }
}

}  // namespace reference

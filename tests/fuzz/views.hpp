// Tensors stored in every way a view can describe, each in a block of exactly the size it reaches. What lies between
// the elements is NaN, so that a stride that is forgotten shows.
#pragma once

#include "fuzz.hpp"

namespace fuzz {

template <class T>
T nan_of() {
  if constexpr (std::is_same<T, fastv::half>::value) {
    return {0x7e00};
  } else if constexpr (std::is_same<T, fastv::bfloat16>::value) {
    return {0x7fc0};
  } else {
    return static_cast<T>(oracle::nan_float());
  }
}

// Elements as they are and as numbers: mostly small, now and then of any bits. `wild`: how many of 64 are so.
template <class T>
struct Numbers {
  std::vector<T> elements;
  std::vector<double> values;

  Numbers(Input& in, std::size_t count) {
    oracle::Rng rng = in.random();
    const std::size_t wild = in.one_in(4) ? in.below(4) : 0;
    const double size = in.one_in(4) ? 8 : 1;
    for (std::size_t i = 0; i < count; ++i) {
      T element = oracle::make<T>(rng.real(-size, size));
      if (rng.below(512) < wild) {
        if constexpr (sizeof(T) == 2) {  // any bits that are not huge: sums must stay within a float
          const std::uint16_t bits = static_cast<std::uint16_t>(rng.next());
          element = {static_cast<std::uint16_t>(
              std::is_same<T, fastv::bfloat16>::value && rng.chance(0.7) ? bits & 0x87ff : bits)};
          const double value = oracle::value_of(element);
          if (std::isfinite(value) && std::fabs(value) > 1e5) element = T{};
        } else {
          static const double kinds[] = {HUGE_VAL, -HUGE_VAL, 0x1p-140, -0.0, 1000};
          element = static_cast<T>(rng.chance(0.2) ? static_cast<double>(oracle::nan_float()) : kinds[rng.below(5)]);
        }
      }
      elements.push_back(element);
      values.push_back(oracle::value_of(element));
    }
  }
};

// [heads, tokens, dim] in one piece or in pages, whole or in chunks, axes in any order that does not overlap.
template <class T>
class Stored {
 public:
  Stored(Input& in, const std::vector<T>& dense, std::size_t heads, std::size_t tokens, std::size_t dim)
      : block_(0), table_(0) {
    const bool paged = in.one_in(3);
    fastv::Pages pages;
    std::size_t run = tokens, blocks = 1;  // tokens and blocks that lie apart
    std::vector<Index> order{0};
    if (paged) {
      run = pages.block_tokens = in.between(1, 9);
      const std::size_t needed = (tokens + run - 1) / run;
      order.resize(needed + in.below(2));
      blocks = order.size() + in.below(3);
      std::vector<Index> all(blocks);
      std::iota(all.begin(), all.end(), Index{0});
      oracle::Rng rng = in.random();
      for (std::size_t i = blocks; i-- > 1;) std::swap(all[i], all[rng.below(i + 1)]);
      std::copy(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(order.size()), order.begin());
    }
    std::size_t chunk = dim;
    if (in.one_in(4)) {
      const std::size_t wanted = in.between(1, dim);
      chunk = 1;
      for (std::size_t c = 1; c <= wanted; ++c)
        if (dim % c == 0) chunk = c;
      pages.chunk = chunk;
    }
    // Strides from the inside out; axis 0 heads, 1 tokens, 2 chunks; blocks are outermost or, rarely, not.
    std::size_t axes[] = {0, 1, 2, 3};
    const std::size_t extents[] = {heads, run, dim / chunk, blocks};
    for (std::size_t i = in.one_in(4) ? 4 : 3; i-- > 1;) std::swap(axes[i], axes[in.below(i + 1)]);
    std::size_t reach = chunk, strides[4] = {};
    for (const std::size_t axis : axes) {
      strides[axis] = reach + in.below(4);
      reach += strides[axis] * ((std::max)(extents[axis], std::size_t{1}) - 1);
    }
    block_ = Block<T>(reach, nan_of<T>());
    table_ = Block<Index>(order);
    const auto stride = [&](std::size_t axis) { return static_cast<std::ptrdiff_t>(strides[axis]); };
    for (std::size_t h = 0; h < heads; ++h)
      for (std::size_t t = 0; t < tokens; ++t)
        for (std::size_t d = 0; d < dim; ++d)
          block_[h * strides[0] + t % run * strides[1] + d / chunk * strides[2] + order[t / run] * strides[3] +
                 d % chunk] = dense[(h * tokens + t) * dim + d];
    if (pages.chunk != 0) pages.chunk_stride = stride(2);
    if (paged) {
      pages.block_table = table_.view();
      pages.block_stride = stride(3);
    }
    view_ = {block_.data(), heads, tokens, dim, stride(0), stride(1), pages};
  }
  const fastv::HeadVectors<T>& view() const { return view_; }

 private:
  Block<T> block_;
  Block<Index> table_;
  fastv::HeadVectors<T> view_{};
};

// Rows to score by: the last, all, or some, in any order and repeated. all_rows: the evidence has every row.
struct RowChoice {
  Block<Index> listed{0};
  std::vector<Index> positions;  // what it comes to

  RowChoice(Input& in, std::size_t tokens, std::size_t rows, fastv::Config& config) {
    const std::size_t kind = in.below(4);
    if (kind == 1 && rows == tokens) {
      config.score_rows = fastv::ScoreRows::all;
      for (std::size_t i = 0; i < tokens; ++i) positions.push_back(static_cast<Index>(i));
    } else if (kind >= 2) {
      config.score_rows = fastv::ScoreRows::listed;
      for (std::size_t i = in.between(1, 4); i > 0; --i)
        positions.push_back(static_cast<Index>(tokens - 1 - in.below(rows)));
      listed = Block<Index>(positions);
      config.listed_rows = listed.view();
    } else {
      positions.push_back(static_cast<Index>(tokens - 1));
    }
  }
};

// A parallel_for that takes the pieces from behind: results must not depend on the order.
struct Backwards {
  template <class Body>
  void operator()(std::size_t count, const Body& body) const {
    while (count > 0) body(--count);
  }
};

// |ours - exact| within the tolerance; not finite where the exact value is not.
template <class Score>
bool close(Score ours, double exact, double tolerance) {
  const auto value = static_cast<double>(ours);
  if (!std::isfinite(exact)) return !std::isfinite(value);
  return std::fabs(value - exact) <= tolerance;
}

}  // namespace fuzz

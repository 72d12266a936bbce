// Tensors stored in every way a view can describe, each in a block of exactly the size it reaches. What lies between
// the elements is NaN, so that a stride that is forgotten shows.
#pragma once

#include "fuzz.hpp"

namespace fuzz {

template <class T>
inline constexpr bool is_fp8 = std::is_same<T, fastv::fp8_e4m3>::value || std::is_same<T, fastv::fp8_e5m2>::value;

template <class T>
T nan_of() {
  if constexpr (std::is_same<T, fastv::half>::value) {
    return {0x7e00};
  } else if constexpr (std::is_same<T, fastv::bfloat16>::value) {
    return {0x7fc0};
  } else if constexpr (is_fp8<T>) {
    return {0x7f};
  } else if constexpr (std::is_same<T, std::int8_t>::value) {
    return -128;
  } else {
    return static_cast<T>(oracle::nan_float());
  }
}

// The value of an element, read out of the definition of its type.
template <class T>
double number_of(T element) {
  if constexpr (std::is_same<T, fastv::fp8_e4m3>::value) {
    const int exponent = (element.bits >> 3) & 15, mantissa = element.bits & 7;
    if (exponent == 15 && mantissa == 7) return std::nan("");
    const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    return (element.bits & 0x80) != 0 ? -magnitude : magnitude;
  } else if constexpr (std::is_same<T, fastv::fp8_e5m2>::value) {
    const int exponent = (element.bits >> 2) & 31, mantissa = element.bits & 3;
    const double sign = (element.bits & 0x80) != 0 ? -1 : 1;
    if (exponent == 31) return mantissa != 0 ? std::nan("") : sign * HUGE_VAL;
    return sign * (exponent == 0 ? std::ldexp(mantissa, -16) : std::ldexp(4 + mantissa, exponent - 17));
  } else if constexpr (std::is_same<T, std::int8_t>::value) {
    return element;
  } else {
    return oracle::value_of(element);
  }
}

// Elements as they are and as numbers: mostly small, now and then of any bits. `wild`: how many of 512 are so.
template <class T>
struct Numbers {
  std::vector<T> elements;
  std::vector<double> values;

  Numbers(Input& in, std::size_t count) {
    oracle::Rng rng = in.random();
    const std::size_t wild = in.one_in(4) ? in.below(4) : 0;
    const double size = in.one_in(4) ? 8 : 1;
    for (std::size_t i = 0; i < count; ++i) {
      T element = draw(rng, size);
      if (rng.below(512) < wild) {
        if constexpr (sizeof(T) == 1) {
          element = bits<T>(rng.next());
        } else if constexpr (sizeof(T) == 2) {  // any bits that are not huge: sums must stay within a float
          const std::uint16_t word = static_cast<std::uint16_t>(rng.next());
          element = {static_cast<std::uint16_t>(
              std::is_same<T, fastv::bfloat16>::value && rng.chance(0.7) ? word & 0x87ff : word)};
          const double value = oracle::value_of(element);
          if (std::isfinite(value) && std::fabs(value) > 1e5) element = T{};
        } else {
          static const double kinds[] = {HUGE_VAL, -HUGE_VAL, 0x1p-140, -0.0, 1000};
          element = static_cast<T>(rng.chance(0.2) ? static_cast<double>(oracle::nan_float()) : kinds[rng.below(5)]);
        }
      }
      elements.push_back(element);
      values.push_back(number_of(element));
    }
  }

 private:
  template <class Byte>
  static Byte bits(std::uint64_t word) {
    if constexpr (std::is_same<Byte, std::int8_t>::value)
      return static_cast<std::int8_t>(static_cast<int>(word & 255) - 128);
    else
      return {static_cast<std::uint8_t>(word)};
  }
  static T draw(oracle::Rng& rng, double size) {
    if constexpr (sizeof(T) == 1) {  // of any bits, but small
      T element = bits<T>(rng.next());
      for (int tries = 0; tries < 8 && !(std::fabs(number_of(element)) <= size * (is_fp8<T> ? 1 : 4)); ++tries)
        element = bits<T>(rng.next());
      return std::fabs(number_of(element)) <= 16 * size ? element : T{};
    } else {
      return oracle::make<T>(rng.real(-size, size));
    }
  }
};

// [heads, tokens, dim] in one piece or in pages (by table or by pointers), whole or in chunks, axes in any order that
// does not overlap, or in the shapes of view.hpp.
template <class T>
class Stored {
 public:
  Stored(Input& in, const std::vector<T>& dense, std::size_t heads, std::size_t tokens, std::size_t dim) {
    const auto value = [&](std::size_t h, std::size_t t, std::size_t d) { return dense[(h * tokens + t) * dim + d]; };
    if (in.one_in(3))
      in_a_shape(in, value, heads, tokens, dim);
    else
      anywhere(in, value, heads, tokens, dim);
  }
  Stored(const Stored&) = delete;
  Stored& operator=(const Stored&) = delete;
  const fastv::Heads<T>& view() const { return view_; }

 private:
  void draw_blocks(Input& in, std::size_t tokens, std::size_t block) {
    const std::size_t needed = (tokens + block - 1) / block;
    std::vector<Index> order(needed + in.below(2));
    arena_ = order.size() + in.below(3);
    std::vector<Index> all(arena_);
    std::iota(all.begin(), all.end(), Index{0});
    oracle::Rng rng = in.random();
    for (std::size_t i = arena_; i-- > 1;) std::swap(all[i], all[rng.below(i + 1)]);
    std::copy(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(order.size()), order.begin());
    table_ = Block<Index>(order);
  }
  // Where the blocks of the table are, for a view that gives them by pointers.
  void point(std::size_t stride) {
    pointers_ = Block<const T*>(table_.size());
    for (std::size_t i = 0; i < table_.size(); ++i) pointers_[i] = block_.data() + table_[i] * stride;
  }

  // By the makers of view.hpp, and filled by what they say of the order of memory.
  template <class Value>
  void in_a_shape(Input& in, const Value& value, std::size_t heads, std::size_t tokens, std::size_t dim) {
    const bool paged = in.chance(), by_pointers = in.chance();
    std::size_t run = tokens;
    arena_ = 1;
    if (paged) {
      run = in.between(1, 9);
      draw_blocks(in, tokens, run);
    }
    std::size_t chunks = 1;
    for (std::size_t c = in.between(1, dim); c > 1 && chunks == 1; --c)
      if (dim % c == 0) chunks = c;
    const std::size_t kind = in.below(paged ? 3 : 2), gap = in.below(4), chunk = dim / chunks;
    const std::size_t room = run + gap, token = heads * dim + gap;
    const std::size_t size = kind == 0 ? run * token : kind == 1 ? heads * room * dim : heads * run * dim;
    // Of the last block no more than what its vectors reach.
    const std::size_t tail = run == 0 ? 0 : kind == 0 ? gap : kind == 1 ? gap * dim : 0;
    block_ = Block<T>(arena_ == 0 ? 0 : arena_ * size - (size == 0 ? 0 : tail), nan_of<T>());
    for (std::size_t h = 0; h < heads; ++h)
      for (std::size_t t = 0; t < tokens; ++t)
        for (std::size_t d = 0; d < dim; ++d) {
          const std::size_t row = paged ? t % run : t;
          const std::size_t at = kind == 0   ? row * token + h * dim + d
                                 : kind == 1 ? (h * room + row) * dim + d
                                             : ((h * chunks + d / chunk) * run + row) * chunk + d % chunk;
          block_[(paged ? table_[t / run] * size : 0) + at] = value(h, t, d);
        }
    if (paged) point(size);
    const auto make = [&](const auto& shape) {
      if (!paged) {
        if constexpr (!std::is_same<std::decay_t<decltype(shape)>, fastv::ChunkedHeadMajor>::value)
          view_ = fastv::heads(block_.data(), shape);
      } else if (by_pointers) {
        view_ = fastv::heads(pointers_.view(), shape, tokens);
      } else {
        view_ = fastv::heads(block_.data(), shape, table_.view(), tokens);
      }
    };
    if (kind == 0)
      make(fastv::TokenMajor{run, heads, dim, static_cast<std::ptrdiff_t>(token)});
    else if (kind == 1)
      make(fastv::HeadMajor{heads, run, dim, room});
    else
      make(fastv::ChunkedHeadMajor{heads, chunks, run, chunk});
    FUZZ_CHECK(view_.heads == heads && view_.tokens == tokens && view_.dim == dim);
  }

  template <class Value>
  void anywhere(Input& in, const Value& value, std::size_t heads, std::size_t tokens, std::size_t dim) {
    const bool paged = in.one_in(3), by_pointers = in.chance();
    fastv::KeyPages<T> pages;
    std::size_t run = tokens;
    arena_ = 1;
    if (paged) {
      run = pages.block_tokens = in.between(1, 9);
      draw_blocks(in, tokens, run);
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
    const std::size_t extents[] = {heads, run, dim / chunk, arena_};
    for (std::size_t i = in.one_in(4) ? 4 : 3; i-- > 1;) std::swap(axes[i], axes[in.below(i + 1)]);
    std::size_t reach = chunk, strides[4] = {};
    for (const std::size_t axis : axes) {
      strides[axis] = reach + in.below(4);
      reach += strides[axis] * ((std::max)(extents[axis], std::size_t{1}) - 1);
    }
    block_ = Block<T>(reach, nan_of<T>());
    const auto stride = [&](std::size_t axis) { return static_cast<std::ptrdiff_t>(strides[axis]); };
    for (std::size_t h = 0; h < heads; ++h)
      for (std::size_t t = 0; t < tokens; ++t)
        for (std::size_t d = 0; d < dim; ++d)
          block_[h * strides[0] + t % run * strides[1] + d / chunk * strides[2] +
                 (paged ? table_[t / run] : 0) * strides[3] + d % chunk] = value(h, t, d);
    if (pages.chunk != 0) pages.chunk_stride = stride(2);
    if (paged && by_pointers && table_.size() > 0) {
      point(strides[3]);
      pages.blocks = pointers_.view();
    } else if (paged) {
      pages.block_table = table_.view();
      pages.block_stride = stride(3);
    }
    view_ = {block_.data(), heads, tokens, dim, stride(0), stride(1), pages};
  }

  std::size_t arena_ = 0;
  Block<T> block_{0};
  Block<Index> table_{0};
  Block<const T*> pointers_{0};
  fastv::Heads<T> view_{};
};

// Keys that only the engine can read: the same numbers behind a function, which must be asked for what there is.
template <class T>
auto loaded(const std::vector<T>& dense, std::size_t heads, std::size_t tokens, std::size_t dim) {
  const std::vector<T>* from = &dense;
  return fastv::loaded_keys(heads, tokens, dim,
                            [from, heads, tokens, dim](std::size_t head, std::size_t token, float* out) noexcept {
                              FUZZ_CHECK(head < heads && token < tokens);
                              for (std::size_t d = 0; d < dim; ++d)
                                out[d] = static_cast<float>(number_of((*from)[(head * tokens + token) * dim + d]));
                            });
}

// Rows to score by: the last, all, or some, in any order and repeated, of those that the evidence has.
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
      list(in, tokens, rows);
      config.listed_rows = listed.view();
    } else {
      positions.push_back(static_cast<Index>(tokens - 1));
    }
  }
  // Listed ones.
  RowChoice(Input& in, std::size_t tokens, std::size_t rows) { list(in, tokens, rows); }

 private:
  void list(Input& in, std::size_t tokens, std::size_t rows) {
    for (std::size_t i = in.between(1, 4); i > 0; --i)
      positions.push_back(static_cast<Index>(tokens - 1 - in.below(rows)));
    listed = Block<Index>(positions);
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

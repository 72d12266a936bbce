// Rows of bytes at any stride, and kept indices in every form in which a verb takes them.
#pragma once

#include "fuzz.hpp"

namespace fuzz {

inline std::vector<Index> draw_kept(Input& in, std::size_t count) {
  oracle::Rng rng = in.random();
  const double share = in.share();
  std::vector<Index> kept;
  for (std::size_t i = 0; i < count; ++i)
    if (rng.chance(share)) kept.push_back(static_cast<Index>(i));
  return kept;
}

// True: now they are not ascending, or not below count, and that must be told.
inline bool spoil(Input& in, std::vector<Index>& kept, std::size_t count) {
  if (kept.empty() || !in.one_in(5)) return false;
  Index& one = kept[in.below(kept.size())];
  one = static_cast<Index>(in.hostile());
  bool right = true;
  for (std::size_t i = 0; i < kept.size(); ++i) right = right && kept[i] < count && (i == 0 || kept[i] > kept[i - 1]);
  return !right;
}

// Indices alone, with the count of tokens, or as what prune() returns; now and then of another prompt, or failed.
struct KeptOf {
  fastv::KeptRows rows;
  bool fits = true;

  KeptOf(Input& in, const Block<Index>& indices, std::size_t tokens) : rows(indices.view()) {
    fastv::Kept kept;
    kept.indices = indices.view();
    kept.prompt_tokens = tokens;
    switch (in.below(8)) {
      case 0: rows = fastv::KeptRows(indices.view(), tokens); break;
      case 1: rows = kept; break;
      case 2:
        kept.prompt_tokens = tokens + 1;
        rows = kept;
        fits = false;
        break;
      case 3:
        kept.status = fastv::fail(Errc::bad_value, "a failure to be passed on");
        rows = kept;
        fits = false;
        break;
      default: break;
    }
  }
};

inline Block<unsigned char> noise(Input& in, std::size_t bytes) {
  oracle::Rng rng = in.random();
  Block<unsigned char> block(bytes);
  for (unsigned char& b : block) b = static_cast<unsigned char>(rng.next());
  return block;
}

// Strides for rows of so many bytes and planes, in either order, with gaps; `bytes`: exactly what they reach.
inline fastv::Rows draw_rows(Input& in, std::size_t count, std::size_t row_bytes, std::size_t planes,
                             std::size_t& bytes) {
  fastv::Rows rows{nullptr, count, row_bytes, 0, planes, 0};
  const std::size_t gap = in.chance() ? 0 : in.below(5), plane_gap = in.below(7);
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

inline std::size_t byte_at(const fastv::Rows& rows, std::size_t plane, std::size_t row) {
  return plane * static_cast<std::size_t>(rows.plane_stride) + row * static_cast<std::size_t>(rows.row_stride);
}

}  // namespace fuzz

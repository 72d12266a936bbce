// fastv: walks over visual tokens and over the vectors of a cache, paged or not.
#pragma once

#include "../evidence.hpp"
#include "math.hpp"
#include "strides.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
inline namespace FASTV_KIND {

// Splits [0, count) into pieces that the caller's threads may take: calls body(begin, end) for each.
inline constexpr std::size_t keys_per_piece = 2048;
inline std::size_t pieces(std::size_t count) noexcept { return (count + keys_per_piece - 1) / keys_per_piece; }
template <class ParallelFor, class Body>
void in_pieces(std::size_t count, const ParallelFor& parallel_for, const Body& body) noexcept {
  parallel_for(pieces(count), [&](std::size_t piece) {
    const std::size_t begin = piece * keys_per_piece;
    body(begin, count - begin < keys_per_piece ? count : begin + keys_per_piece);
  });
}

// Walks visual tokens begin .. end - 1, numbered across the spans: calls run(number, position, count) for each stretch
// of neighbours.
template <class Run>
void for_each_stretch(Span<const TokenSpan> visual, std::size_t begin, std::size_t end, Run run) noexcept {
  std::size_t numbered = 0;
  for (const TokenSpan& span : visual) {
    const std::size_t from = begin > numbered ? begin : numbered;
    const std::size_t to = end < numbered + span.count ? end : numbered + span.count;
    if (from < to) run(from, span.first + (from - numbered), to - from);
    numbered += span.count;
  }
}

template <class T>
Status check_heads(const Heads<T>& view, const char* what) noexcept {
  if (view.heads == 0) return fail(Errc::bad_shape, "{} has 0 heads: state at least 1", what);
  if (view.dim == 0) return fail(Errc::bad_shape, "{} has head dimension 0: state at least 1", what);
  if (view.heads > max_tokens) return fail(Errc::bad_shape, "{} has {} heads, more than any model", what, view.heads);
  if (view.tokens > max_tokens)
    return fail(Errc::bad_shape, "{} has {} tokens but at most {} are supported", what, view.tokens, max_tokens);
  const KeyPages<T>& pages = view.pages;
  if (pages.chunk != 0 && view.dim % pages.chunk != 0)
    return fail(Errc::bad_shape, "chunks of {} elements do not divide the head dimension of {}, {}", pages.chunk, what,
                view.dim);
  if (pages.paged() || pages.block_tokens != 0) {  // an empty table is one that is too short
    if (Status status = check_block_table(pages.block_table, pages.blocks, pages.block_tokens, view.tokens, what);
        !status)
      return status;
    const std::size_t used = pages.blocks.empty() ? 0 : blocks_for(view.tokens, pages.block_tokens);
    for (std::size_t i = 0; i < used; ++i)
      if (Status status = check_data(pages.blocks[i], what); !status) return status;
  }
  if (pages.blocks.empty() && view.tokens > 0) {
    if (Status status = check_data(view.data, what); !status) return status;
  }
  const std::size_t entry = pages.chunk == 0 ? view.dim : pages.chunk;
  const bool table = !pages.block_table.empty() && pages.blocks.empty();
  return check_strides({{what, "token stride", view.token_stride, pages.paged() ? pages.block_tokens : view.tokens},
                        {what, "head stride", view.head_stride, view.heads},
                        {what, "chunk stride", pages.chunk_stride, view.dim / entry},
                        {what, "block stride", pages.block_stride, table ? pages.block_table.size() : 1}},
                       entry);
}
template <class Load>
Status check_heads(const LoadedKeys<Load>& keys, const char* what) noexcept {
  if (keys.heads == 0) return fail(Errc::bad_shape, "{} has 0 heads: state at least 1", what);
  if (keys.dim == 0) return fail(Errc::bad_shape, "{} has head dimension 0: state at least 1", what);
  if (keys.heads > max_tokens) return fail(Errc::bad_shape, "{} has {} heads, more than any model", what, keys.heads);
  if (keys.dim > max_tokens)
    return fail(Errc::bad_shape, "{} has head dimension {}, more than any model", what, keys.dim);
  if (keys.tokens > max_tokens)
    return fail(Errc::bad_shape, "{} has {} tokens but at most {} are supported", what, keys.tokens, max_tokens);
  if (keys.tokens * keys.heads > most_entries / keys.dim)
    return fail(Errc::bad_shape, "{} has {} heads of {} tokens of dimension {}, more than any memory holds", what,
                keys.heads, keys.tokens, keys.dim);
  return {};
}

// Address of a token's vector in head 0.
template <class T>
const T* token_at(const Heads<T>& view, std::size_t token) noexcept {
  const KeyPages<T>& pages = view.pages;
  if (!pages.paged()) return view.data + static_cast<std::ptrdiff_t>(token) * view.token_stride;
  // 32-bit division, several times faster than 64-bit on many machines; tokens and their blocks fit.
  const auto size = static_cast<std::uint32_t>(pages.block_tokens < max_tokens ? pages.block_tokens : max_tokens);
  const std::uint32_t block = static_cast<std::uint32_t>(token) / size, row = static_cast<std::uint32_t>(token) % size;
  const T* base = pages.blocks.empty()
                      ? view.data + static_cast<std::ptrdiff_t>(pages.block_table[block]) * pages.block_stride
                      : pages.blocks[block];
  return base + static_cast<std::ptrdiff_t>(row) * view.token_stride;
}

// A vector of any type and any chunking -> dim floats.
template <class T>
void widen(const Heads<T>& view, const T* data, float* wide) noexcept {
  const std::size_t chunk = view.pages.chunk == 0 ? view.dim : view.pages.chunk;
  for (std::size_t c = 0; c * chunk < view.dim; ++c) {
    const T* part = data + static_cast<std::ptrdiff_t>(c) * view.pages.chunk_stride;
    for (std::size_t i = 0; i < chunk; ++i) wide[c * chunk + i] = static_cast<float>(to_float(part[i]));
  }
}
// One vector -> dim floats.
template <class T>
void load_vector(const Heads<T>& view, std::size_t head, std::size_t token, float* out) noexcept {
  widen(view, token_at(view, token) + static_cast<std::ptrdiff_t>(head) * view.head_stride, out);
}
template <class Load>
void load_vector(const LoadedKeys<Load>& keys, std::size_t head, std::size_t token, float* out) noexcept {
  keys.load(head, token, out);
}

// Calls each(head, token) for tokens begin .. end - 1 in the order in which they lie in memory.
template <class T, class Each>
void for_each_vector(const Heads<T>& view, std::size_t begin, std::size_t end, Each each) noexcept {
  if (view.head_stride <= view.token_stride || view.pages.paged()) {
    for (std::size_t token = begin; token < end; ++token)
      for (std::size_t head = 0; head < view.heads; ++head) each(head, token);
  } else {
    for (std::size_t head = 0; head < view.heads; ++head)
      for (std::size_t token = begin; token < end; ++token) each(head, token);
  }
}
template <class Load, class Each>
void for_each_vector(const LoadedKeys<Load>& keys, std::size_t begin, std::size_t end, Each each) noexcept {
  for (std::size_t token = begin; token < end; ++token)
    for (std::size_t head = 0; head < keys.heads; ++head) each(head, token);
}

// Euclidean length of dim floats. The rest has a loop of its own over the lanes: g++ 12 warns of a plain one that it
// overflows where dim is a constant.
inline float length_of(const float* x, std::size_t dim) noexcept {
  float sums[8] = {};
  const std::size_t whole = dim / 8 * 8;
  for (std::size_t i = 0; i < whole; i += 8)
    for (std::size_t lane = 0; lane < 8; ++lane) sums[lane] += x[i + lane] * x[i + lane];
  for (std::size_t lane = 0; lane < dim - whole; ++lane) sums[lane] += x[whole + lane] * x[whole + lane];
  return sqrt_of(((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])));
}

}  // namespace FASTV_KIND
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

// fastv: what prune() returns, and what every verb takes.
#pragma once

#include "status.hpp"

#include "detail/begin.hpp"

namespace fastv {

// What every verb takes: ascending rows to keep. Made of what prune() returned, of a batch, or of any list of indices.
struct KeptRows {
  static constexpr std::size_t unknown = static_cast<std::size_t>(-1);  // see prompt_tokens

  Span<const Index> indices;            // rows, ascending
  std::size_t prompt_tokens = unknown;  // rows that the tensors must have; unknown: at least those that are kept
  Status status = {};                   // a failure is passed on, and nothing moves

  // Of indices, and of how many rows they are.
  FASTV_INLINE KeptRows(Span<const Index> rows, std::size_t tokens, const Status& why = {}) noexcept
      : indices(rows), prompt_tokens(tokens), status(why) {}
  // Of a std::vector, an array or another list of indices.
  template <class List, class = decltype(Span<const Index>(detail::made<const List&>()))>
  FASTV_INLINE KeptRows(const List& list) noexcept : indices(list) {}
};

// What prune() returns. The indices stay valid until the next prune() or reserve() of the same Pruner.
struct [[nodiscard]] Kept {
  Span<const Index> indices;      // ascending positions in the whole prompt; every text token is among them
  std::size_t prompt_tokens = 0;  // n, and so the position id of the first decoded token
  std::size_t nan_scores = 0;     // visual scores that were NaN, ranked below all others
  std::size_t zero_scores = 0;    // visual scores that were 0: tokens that received no attention at all
  Status status;                  // why nothing is kept, where something is wrong

  // True where pruning succeeded.
  FASTV_INLINE explicit operator bool() const noexcept { return static_cast<bool>(status); }
  FASTV_INLINE operator KeptRows() const noexcept { return {indices, prompt_tokens, status}; }  // for the verbs
  FASTV_INLINE Errc code() const noexcept { return status.code; }                               // of status
  FASTV_INLINE Message message() const noexcept { return status.message(); }                    // of status
  FASTV_INLINE std::size_t size() const noexcept { return indices.size(); }                     // m, tokens that stay
  FASTV_INLINE std::size_t dropped() const noexcept { return prompt_tokens - indices.size(); }  // n - m
  FASTV_INLINE const Index* begin() const noexcept { return indices.begin(); }  // the indices as a range
  FASTV_INLINE const Index* end() const noexcept { return indices.end(); }      // the indices as a range
};

namespace detail {

// In place of what is kept.
struct UnknownKept {
  template <class T>
  FASTV_INLINE constexpr UnknownKept(const T&) noexcept {
    static_assert(!is_same<T, T>,
                  "what is kept is what prune() returned, or a list of fastv::Index (32 bits, unsigned), ascending");
  }
};

inline namespace FASTV_KIND {

inline Status check_indices(Span<const Index> kept, std::size_t count) noexcept {
  if (!kept.empty() && kept.data() == nullptr) return fail_null("kept indices");
  for (std::size_t i = 0; i < kept.size(); ++i) {
    if (i > 0 && kept[i] <= kept[i - 1])
      return fail(Errc::bad_index, "kept index {} is {}, not above the previous one, {}: keep them ascending", i,
                  kept[i], kept[i - 1]);
    if (kept[i] >= count)
      return fail(Errc::bad_index,
                  "kept index {} is {} but there are {} rows: use the tensor that the indices were made for", i,
                  kept[i], count);
  }
  return {};
}
inline Status check_kept(const KeptRows& kept, std::size_t count) noexcept {
  if (!kept.status) return kept.status;
  if (kept.prompt_tokens != KeptRows::unknown && kept.prompt_tokens != count)
    return fail(Errc::bad_shape,
                "the tensor has {} rows but the prompt has {} tokens: hand over one row per prompt token, "
                "by fastv::rows(data, {}, width), pages() of as many, and ids of several axes by position_axes()",
                count, kept.prompt_tokens, kept.prompt_tokens);
  return check_indices(kept.indices, count);
}

// A plain list of indices does not say of how many tokens it is.
inline Status expect_known(const KeptRows& kept) noexcept {
  if (!kept.status) return kept.status;
  if (kept.prompt_tokens == KeptRows::unknown)
    return fail(Errc::bad_shape,
                "it is unknown of how many tokens the kept indices are: hand over what prune() returned, "
                "or fastv::KeptRows(indices, tokens)");
  return check_indices(kept.indices, kept.prompt_tokens);
}

}  // namespace FASTV_KIND
}  // namespace detail

}  // namespace fastv

#include "detail/end.hpp"

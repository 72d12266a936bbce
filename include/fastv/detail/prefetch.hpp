// fastv: asking for memory ahead of its use.
#pragma once

#include "begin.hpp"

namespace fastv {
namespace detail {
inline namespace FASTV_KIND {

// Prefetches one cache line into L2. Always inlined, like all that does nothing else: GCC takes such functions for ones
// without effect, and drops their calls.
FASTV_INLINE void prefetch(const void* from) noexcept {
#if defined(__GNUC__)
  __builtin_prefetch(from, 0, 2);
#else
  static_cast<void>(from);
#endif
}
// Prefetches every cache line in [from, to).
FASTV_INLINE void prefetch(const unsigned char* from, const unsigned char* to) noexcept {
  for (; from < to; from += 64) prefetch(from);
}

}  // namespace FASTV_KIND
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

// The operators new of this program, replaced (counted_new.cpp) so that tests can count allocations and
// make them fail. In a file of its own: g++ warns about a delete that it sees calling free().
#pragma once

#include <atomic>
#include <cstddef>

namespace counted_new {

extern std::atomic<std::size_t> allocations;  // of all threads, so far
void fail_nothrow(bool fail) noexcept;        // makes this thread's nothrow allocations return null

}  // namespace counted_new

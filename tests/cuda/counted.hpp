// What every queue of the tests counts, of the whole program.
#pragma once

#include <cstddef>

struct CountedQueue {
  static std::size_t& launches() {
    static std::size_t count = 0;
    return count;
  }
  static std::size_t& allocations() {
    static std::size_t count = 0;
    return count;
  }
};

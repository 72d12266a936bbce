// A parallel_for whose pieces of work come in another order, on two threads.
#pragma once

#include <cstddef>
#include <thread>

struct Backwards {
  template <class Body>
  void operator()(std::size_t count, const Body& body) const {
    std::thread other([&] {
      for (std::size_t i = count; i-- > 0;)
        if (i % 2 == 0) body(i);
    });
    for (std::size_t i = count; i-- > 0;)
      if (i % 2 == 1) body(i);
    other.join();
  }
};

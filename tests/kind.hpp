// What kinds_test.cpp asks of each kind of machine.
#pragma once

#include <vector>

#include "fastv/element.hpp"
#include "fastv/view.hpp"

struct Problem {
  std::size_t heads, kv_heads, keys, dim;
  fastv::KvLayout layout;
  float scale;
  std::vector<float> query;  // [heads, dim]
};

#define FASTV_DECLARE_KIND(kind)                                                      \
  namespace kind {                                                                    \
  std::vector<float> of_floats(const Problem&, const std::vector<float>&);            \
  std::vector<float> of_halves(const Problem&, const std::vector<fastv::half>&);      \
  std::vector<float> of_bfloats(const Problem&, const std::vector<fastv::bfloat16>&); \
  }
FASTV_DECLARE_KIND(baseline)
FASTV_DECLARE_KIND(v3)
FASTV_DECLARE_KIND(native)
#undef FASTV_DECLARE_KIND

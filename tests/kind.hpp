// What kinds_test.cpp asks of each kind of machine.
#pragma once

#include <cstdint>
#include <vector>

#include "fastv/element.hpp"

struct Problem {
  std::size_t heads, kv_heads, keys, dim;
  bool token_major;
  float scale;
  std::vector<float> query;  // [heads, dim]
};

#define FASTV_DECLARE_KIND(kind)                                                         \
  namespace kind {                                                                       \
  std::vector<float> of_floats(const Problem&, const std::vector<float>&);               \
  std::vector<float> of_halves(const Problem&, const std::vector<fastv::half>&);         \
  std::vector<float> of_bfloats(const Problem&, const std::vector<fastv::bfloat16>&);    \
  std::vector<std::uint32_t> all_halves(); /* the bits of each as a float */             \
  std::vector<std::uint32_t> kept_by_pruners(const Problem&, const std::vector<float>&); \
  }
FASTV_DECLARE_KIND(baseline)
FASTV_DECLARE_KIND(avx2)
FASTV_DECLARE_KIND(v3)
FASTV_DECLARE_KIND(native)
#undef FASTV_DECLARE_KIND

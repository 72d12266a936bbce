// The prompt and the settings that fragments of README.md are about. Never linked.
#pragma once

#include <cmath>
#include <cstdio>
#include <fastv/fastv.hpp>
#include <vector>

extern const std::size_t n, layers, heads, kv_heads, dim, width;
extern const float scale;
extern std::vector<fastv::TokenSpan> visual;
extern fastv::Config config;
extern fastv::Pruner<float> pruner;
extern fastv::Kept kept;
extern fastv::Slots slots;

// What fragments of README.md may name: the engine around them. Never linked.
#pragma once

#include <cmath>
#include <cstdio>
#include <fastv/fastv.hpp>
#include <vector>

extern const std::size_t n, layers, heads, hidden_width;
extern std::vector<fastv::TokenSpan> visual;
extern std::vector<float> hidden, last_row;
extern std::vector<int> positions;
extern fastv::Config config;
extern fastv::Pruner<float> pruner;
extern const fastv::half *query, *key_cache;

// What fragments of README.md may name: an engine with plain pointers.
#pragma once

#include "prompt.hpp"

extern float* hidden;                // [n, width], of a batch [packed_tokens, width]
extern std::vector<int> positions;   // [n]
extern std::vector<float> last_row;  // [heads, n], attention of the last token
extern const fastv::half *query, *key_cache;

// A batch with paged caches.
extern const std::size_t packed_tokens;
extern fastv::Plan plan;
extern fastv::Slots other_slots;
extern std::vector<const fastv::half*> queries;
extern std::vector<std::vector<fastv::Index>> block_tables;
extern const fastv::half* key_blocks;

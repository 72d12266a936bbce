// fastv: what the kernels of a stage know of a sequence: the plan, as the host has uploaded it.
#pragma once

#include "../cuda_views.hpp"
#include "attention.hpp"
#include "cuda_block.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
namespace gpu {
inline namespace FASTV_KIND {

// Tokens that compete for a quota: candidate e of the group is number first + e / width * stride + e % width of the
// sequence's visual tokens. A whole image is one row of the width of its size; a window of a grid has several.
struct Group {
  std::uint32_t first, width, stride, size;
  std::uint32_t quota;  // with those that were chosen before
  std::uint32_t start;  // candidates in the groups before it
};
// The number of candidate e among the sequence's visual tokens.
FASTV_DEVICE inline std::uint32_t member_of(const Group& group, std::uint32_t e) noexcept {
  if (group.width == group.size) return group.first + e;
  const std::uint32_t row = e / group.width;
  return group.first + row * group.stride + (e - row * group.width);
}

// Of a group's candidates first .. end - 1, those that Selection::diverse takes one by one.
struct Take {
  std::uint32_t first, end;
  std::uint32_t by_score, by_value;  // how many for their scores alone, how many after those
};
// A group that Selection::diverse chooses from: for each image its minimum, then of all.
struct Contest {
  Group group;
  Take all;
  std::uint32_t words_images, images;  // takes before
  std::uint32_t products;    // where the products of its features begin, in eights of floats; none: not needed
  std::uint32_t first_tile;  // of the products, among those of the stage
};
inline constexpr std::uint32_t product_tile = 64;  // tokens of a tile
// Floats from one row of products to the next.
FASTV_DEVICE inline std::uint32_t product_room(std::uint32_t tokens) noexcept { return (tokens + 7) / 8 * 8; }

// A span as stage 0 finds it.
struct SpanWords {
  std::uint32_t first, count, number;  // number: of its first token among the visual ones
};

inline constexpr std::uint32_t none = 0xffffffffu;

// One sequence of one stage. Offsets named words_* count words of the plan.
struct Sequence {
  std::uint32_t tokens, first;          // rows found; the first of them in the packed tensors
  std::uint32_t row_first;              // the first of them in arrays without padding
  std::uint32_t visual, visual_first;   // visual tokens; the first in arrays of the batch's
  std::uint32_t past, first_key, keys;  // keys of earlier turns, tokens before the first at hand, keys at hand
  std::uint32_t key_row, table_row, query_row, queries;
  std::uint32_t first_job, main_jobs, prior_jobs;  // query rows to score by, numbered through the batch
  std::uint32_t which, words_listed;               // ScoreRows; listed rows, then prior ones
  std::uint32_t kept_first, kept_visual_first;     // where its results begin
  std::uint32_t past_behind;                       // keys of earlier turns in the layers behind
  std::uint32_t words_chosen;                      // a bit per visual token that stays anyway, or none
  std::uint32_t words_round[2], groups[2];         // groups of each round; 0 groups: no such round
  std::uint32_t words_spans, spans;                // of stage 0

  // Of Selection::diverse; 0 contests: another rule.
  std::uint32_t words_contests, contests;
  std::uint32_t first_contest, first_tile;  // among those of the stage
  std::uint32_t scored, novelty, blend;     // whether it looks at scores; Novelty, Blend
  float weight, rest;                       // of the score, and what Blend::sum leaves for novelty
};

// The plan of a stage.
struct StageTables {
  const Sequence* sequences;
  const std::uint32_t* words;
  std::uint32_t count;             // sequences
  const std::int32_t* codes;       // [rows found]: 2 * (visual tokens before the row) + (whether it is one)
  const std::int32_t* candidates;  // [visual tokens found]: row within the sequence
  const std::int32_t* origins;     // [rows found]: position in the prompt
};

// The sequence that has number `number` of what the stage counts from First on (jobs, contests, tiles): the last that
// begins at or before it.
template <std::uint32_t Sequence::*First>
FASTV_DEVICE inline std::uint32_t sequence_of(const StageTables& tables, std::uint32_t number) noexcept {
  std::uint32_t low = 0, high = tables.count;
  while (high - low > 1) {
    const std::uint32_t middle = (low + high) / 2;
    if (tables.sequences[middle].*First <= number)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The row within the sequence of its job j.
FASTV_DEVICE inline std::uint32_t row_of_job(const Sequence& s, const std::uint32_t* words, std::uint32_t j) noexcept {
  const bool listed = s.which == static_cast<std::uint32_t>(ScoreRows::listed);
  if (j >= s.main_jobs) return words[s.words_listed + (listed ? j : j - s.main_jobs)];
  if (listed) return words[s.words_listed + j];
  return s.which == static_cast<std::uint32_t>(ScoreRows::last) ? s.tokens - 1 : j;
}

// Stage 0's codes and candidates, from its spans.
struct Prepare {
  static constexpr int threads = 256;
  template <class Block>
  struct Shared {};

  const Sequence* sequences;
  const std::uint32_t* words;
  std::int32_t *codes, *candidates, *origins;

  template <class Block, class Memory>
  FASTV_KERNEL void operator()(Block& block, Memory&) const {
    const Sequence& s = sequences[block.y()];
    block.each([&](int thread) {
      const std::uint32_t row = block.x() * threads + static_cast<std::uint32_t>(thread);
      if (row >= s.tokens) return;
      // The spans that begin at or before the row.
      std::uint32_t low = 0, high = s.spans;
      while (low < high) {
        const std::uint32_t middle = (low + high) / 2;
        if (words[s.words_spans + 3 * middle] <= row)
          low = middle + 1;
        else
          high = middle;
      }
      std::uint32_t before = 0, visual = 0;
      if (low > 0) {
        const std::uint32_t* span = words + s.words_spans + 3 * (low - 1);
        const std::uint32_t into = row - span[0];
        visual = into < span[1] ? 1 : 0;
        before = span[2] + (visual != 0 ? into : span[1]);
      }
      codes[s.row_first + row] = static_cast<std::int32_t>(2 * before + visual);
      origins[s.row_first + row] = static_cast<std::int32_t>(row);
      if (visual != 0) candidates[s.visual_first + before] = static_cast<std::int32_t>(row);
    });
  }
};

// Words of the plan, on their way to the device as the argument of a launch: no memory of the host's must live on.
struct Upload {
  static constexpr int threads = 256;
  static constexpr std::uint32_t capacity = 896;
  template <class Block>
  struct Shared {};

  std::uint32_t* to;
  std::uint32_t count;
  std::uint32_t words[capacity];

  template <class Block, class Memory>
  FASTV_KERNEL void operator()(Block& block, Memory&) const {
    block.each([&](int thread) {
      for (auto i = static_cast<std::uint32_t>(thread); i < count; i += threads) to[i] = words[i];
    });
  }
};

// Zeros for the words that count arrivals.
struct Clear {
  static constexpr int threads = 256;
  template <class Block>
  struct Shared {};

  std::uint32_t* words;
  std::uint32_t count;

  template <class Block, class Memory>
  FASTV_KERNEL void operator()(Block& block, Memory&) const {
    block.each([&](int thread) {
      const std::uint32_t i = block.x() * threads + static_cast<std::uint32_t>(thread);
      if (i < count) words[i] = 0;
    });
  }
};

}  // namespace FASTV_KIND
}  // namespace gpu
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

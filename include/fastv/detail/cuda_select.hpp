// fastv: exact selection by one block: order keys in, kept rows out. The rules are those of select.hpp; what of them looks
// at no score (quotas, grids, windows) the host has turned into groups and marks.
#pragma once

#include "cuda_sequence.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
namespace gpu {
inline namespace FASTV_KIND {

inline constexpr int select_threads = 512;
inline constexpr std::uint32_t few = 64;               // a group of so many is ranked by counting
inline constexpr std::uint32_t keys_in_shared = 3072;  // of a sequence; more of them lie in device memory
inline constexpr std::uint32_t chosen_key = 0xffffffffu;

// What a stage leaves, in device memory.
struct StageResults {
  std::int32_t *rows, *positions, *slots, *visual_numbers;
  std::int32_t *codes, *candidates;  // what the next stage finds
};
// What Selection::diverse has left of the tokens of a sequence.
struct Marked {
  const std::uint32_t* marks;  // chosen_key where a token stays, or 0
  const std::uint32_t* kinds;  // of its features
};
inline constexpr std::uint32_t no_numbers = 0, zeros = 1, unit_length = 2;  // kinds of features

template <class Block>
struct SelectMemory {
  static constexpr std::uint32_t buckets = 2048, per_thread = buckets / select_threads;
  typename Block::template Array<std::uint32_t, keys_in_shared> before, after;
  typename Block::template Array<std::uint32_t, buckets> histogram;
  typename Block::template Array<std::uint32_t, 2> cut;
};

// One sequence's selection. Called by a whole block of select_threads threads.
template <class Block>
class Selector {
 public:
  using Words = typename Block::Words;

  FASTV_KERNEL Selector(Block& block, SelectMemory<Block>& memory, const StageTables& tables, const Sequence& sequence,
                        std::uint32_t* spill) noexcept
      : block_(block),
        memory_(memory),
        tables_(tables),
        s_(sequence),
        from_(sequence.visual <= keys_in_shared ? block.words(memory.before) : block.words(spill, sequence.visual)),
        to_(sequence.visual <= keys_in_shared ? block.words(memory.after)
                                              : block.words(spill + sequence.visual, sequence.visual)) {}

  // scores: [visual tokens of the sequence], or null where no rule looks at them. marked: null, or who stays.
  FASTV_KERNEL void run(const float* scores, const Marked& marked, const StageResults& out, cuda::Counters* counters,
                        std::uint32_t uncorrected) {
    load(scores, marked, counters, uncorrected);
    block_.sync();
    rank_round(s_.words_round[0], s_.groups[0]);
    rank_round(s_.words_round[1], s_.groups[1]);
    write(out);
  }

 private:
  FASTV_KERNEL bool chosen(std::uint32_t i) const {
    return s_.words_chosen != none && (tables_.words[s_.words_chosen + i / 32] >> (i % 32) & 1u) != 0;
  }

  FASTV_KERNEL void load(const float* scores, const Marked& marked, cuda::Counters* counters,
                         std::uint32_t uncorrected) {
    // 21 bits each: NaN, zero, infinite.
    typename Block::template PerThread<std::uint64_t> counts;
    block_.each([&](int thread) {
      std::uint64_t count = 0;
      for (auto i = static_cast<std::uint32_t>(thread); i < s_.visual; i += select_threads) {
        std::uint32_t key = 0;
        bool nan = false;
        if (scores != nullptr) {
          const float score = scores[i];
          key = order_key(score);
          nan = key == 0;
          count += key == FloatBits<float>::sign ? std::uint64_t{1} << 21 : 0u;
          count += is_infinite(score) ? std::uint64_t{1} << 42 : 0u;
        }
        if (marked.marks != nullptr) {
          key = marked.marks[i];
          nan = nan || marked.kinds[i] == no_numbers;
        }
        count += nan ? 1u : 0u;
        from_[i] = chosen(i) ? chosen_key : key;
      }
      counts[thread] = count;
    });
    const std::uint64_t count = block_.total(counts);
    block_.each([&](int thread) {
      if (thread != 0) return;
      const std::uint64_t mask = (std::uint64_t{1} << 21) - 1;
      *counters = {static_cast<std::uint32_t>(count & mask), static_cast<std::uint32_t>(count >> 21 & mask),
                   static_cast<std::uint32_t>(count >> 42), uncorrected};
    });
  }

  FASTV_KERNEL void rank_round(std::uint32_t words, std::uint32_t count) {
    if (count == 0) return;
    rank(reinterpret_cast<const Group*>(tables_.words + words), count);
    const Words swap = from_;
    from_ = to_;
    to_ = swap;
  }

  // One round: of each group as many as its quota says become chosen_key, the others keep their keys. From from_ to to_.
  FASTV_KERNEL void rank(const Group* groups, std::uint32_t count) {
    if (count > 1 || !by_cut(groups[0])) rank_few(groups, count);
    for (std::uint32_t g = 0; g < count; ++g)
      if (by_cut(groups[g])) rank_many(groups[g]);
    block_.sync();
  }
  FASTV_KERNEL static bool by_cut(const Group& group) {
    return group.size > few && group.quota > 0 && group.quota < group.size;
  }

  // All small groups at once, and those that keep all or nothing: for each token, how many go before it.
  FASTV_KERNEL void rank_few(const Group* groups, std::uint32_t count) {
    block_.each([&](int thread) {
      for (auto e = static_cast<std::uint32_t>(thread); e < s_.visual; e += select_threads) {
        std::uint32_t low = 0, high = count;  // the last group that begins at or before e, and is not empty
        while (high - low > 1) {
          const std::uint32_t middle = (low + high) / 2;
          if (groups[middle].start <= e)
            low = middle;
          else
            high = middle;
        }
        const Group& group = groups[low];
        if (by_cut(group)) continue;
        const std::uint32_t own = e - group.start, i = member_of(group, own), key = from_[i];
        bool stays = group.quota >= group.size;
        if (!stays && group.quota > 0) {
          std::uint32_t before = 0;
          for (std::uint32_t j = 0; j < group.size; ++j) {
            const std::uint32_t other = from_[member_of(group, j)];
            before += other > key || (other == key && j < own) ? 1u : 0u;
          }
          stays = before < group.quota;
        }
        to_[i] = stays ? chosen_key : key;
      }
    });
  }

  // A large one: the key of the last that stays by radix, 11, 11 and 10 bits at a time; of those that equal it, the
  // earlier by a scan.
  FASTV_KERNEL void rank_many(const Group& group) {
    constexpr std::uint32_t buckets = SelectMemory<Block>::buckets, per_thread = SelectMemory<Block>::per_thread;
    std::uint32_t shift = 32, prefix = 0, rank = group.quota;
    while (shift > 0) {
      const std::uint32_t width = shift == 10 ? 10 : 11, next = shift - width;
      block_.each([&](int thread) {
        for (auto b = static_cast<std::uint32_t>(thread); b < buckets; b += select_threads) memory_.histogram[b] = 0;
      });
      block_.sync();
      block_.each([&](int thread) {
        for (auto e = static_cast<std::uint32_t>(thread); e < group.size; e += select_threads) {
          const std::uint32_t key = from_[member_of(group, e)];
          if (shift == 32 || key >> shift == prefix)
            block_.add(memory_.histogram, key >> next & ((1u << width) - 1), 1);
        }
      });
      block_.sync();
      // Each thread has a few buckets, the highest first, and learns how many keys lie above them.
      typename Block::template PerThread<std::uint32_t> above;
      block_.each([&](int thread) {
        std::uint32_t own = 0;
        for (std::uint32_t b = 0; b < per_thread; ++b) own += memory_.histogram[bucket_of(thread, b)];
        above[thread] = own;
      });
      block_.exclusive_sum(above);
      block_.each([&](int thread) {
        std::uint32_t before = above[thread];
        for (std::uint32_t b = 0; b < per_thread; ++b) {
          const std::uint32_t bucket = bucket_of(thread, b), own = memory_.histogram[bucket];
          if (before < rank && rank <= before + own) {
            memory_.cut[0] = bucket;
            memory_.cut[1] = before;
          }
          before += own;
        }
      });
      block_.sync();
      const std::uint32_t bucket = memory_.cut[0];
      const std::uint32_t in_bucket = memory_.histogram[bucket];
      prefix = shift == 32 ? bucket : prefix << width | bucket;
      rank -= memory_.cut[1];
      shift = next;
      block_.sync();
      if (in_bucket == rank) break;  // all of it stays
    }
    // Each thread takes neighbours, so that one scan puts the ties in order.
    const std::uint32_t each = parts_of(group.size, select_threads);
    typename Block::template PerThread<std::uint32_t> ties;
    block_.each([&](int thread) {
      const std::uint32_t begin = static_cast<std::uint32_t>(thread) * each, end = least(begin + each, group.size);
      std::uint32_t count = 0;
      for (std::uint32_t e = begin; e < end; ++e) count += from_[member_of(group, e)] >> shift == prefix ? 1u : 0u;
      ties[thread] = count;
    });
    block_.exclusive_sum(ties);
    block_.each([&](int thread) {
      const std::uint32_t begin = static_cast<std::uint32_t>(thread) * each, end = least(begin + each, group.size);
      std::uint32_t tie = ties[thread];
      for (std::uint32_t e = begin; e < end; ++e) {
        const std::uint32_t i = member_of(group, e), key = from_[i], top = key >> shift;
        const bool stays = top > prefix || (top == prefix && tie < rank);
        tie += top == prefix ? 1u : 0u;
        to_[i] = stays ? chosen_key : key;
      }
    });
  }
  FASTV_KERNEL static std::uint32_t bucket_of(int thread, std::uint32_t b) {
    constexpr std::uint32_t buckets = SelectMemory<Block>::buckets, per_thread = SelectMemory<Block>::per_thread;
    return buckets - 1 - (static_cast<std::uint32_t>(thread) * per_thread + b);
  }

  // Every row of text, and those visual ones whose key is chosen_key, in order; and what the next stage finds.
  FASTV_KERNEL void write(const StageResults& out) {
    const std::uint32_t each = parts_of(s_.tokens, select_threads);
    const std::int32_t* codes = tables_.codes + s_.row_first;
    const auto stays = [&](std::uint32_t code) { return code % 2 == 0 || from_[code / 2] == chosen_key; };
    typename Block::template PerThread<std::uint32_t> places;
    block_.each([&](int thread) {
      const std::uint32_t begin = static_cast<std::uint32_t>(thread) * each, end = least(begin + each, s_.tokens);
      std::uint32_t count = 0;
      for (std::uint32_t row = begin; row < end; ++row)
        count += stays(static_cast<std::uint32_t>(codes[row])) ? 1u : 0u;
      places[thread] = count;
    });
    block_.exclusive_sum(places);
    block_.each([&](int thread) {
      const std::uint32_t begin = static_cast<std::uint32_t>(thread) * each, end = least(begin + each, s_.tokens);
      std::uint32_t place = places[thread];
      for (std::uint32_t row = begin; row < end; ++row) {
        const auto code = static_cast<std::uint32_t>(codes[row]);
        if (!stays(code)) continue;
        const std::uint32_t before = code / 2, visual = place - (row - before);  // kept visual tokens before it
        const std::size_t at = s_.kept_first + place;
        out.rows[at] = static_cast<std::int32_t>(s_.first + row);
        out.positions[at] = tables_.origins[s_.row_first + row];
        out.slots[at] = static_cast<std::int32_t>(s_.past_behind + place);
        out.codes[at] = static_cast<std::int32_t>(2 * visual + code % 2);
        if (code % 2 != 0) {
          out.visual_numbers[s_.kept_visual_first + visual] = static_cast<std::int32_t>(s_.visual_first + before);
          out.candidates[s_.kept_visual_first + visual] = static_cast<std::int32_t>(place);
        }
        ++place;
      }
    });
  }

  Block& block_;
  SelectMemory<Block>& memory_;
  const StageTables& tables_;
  const Sequence& s_;
  Words from_, to_;
};

}  // namespace FASTV_KIND
}  // namespace gpu
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

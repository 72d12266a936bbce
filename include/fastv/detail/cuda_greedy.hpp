// fastv: the kernel that takes tokens one by one for their scores and for what they add: greedy.hpp's rule, by a matrix of
// products.
#pragma once

#include "cuda_diverse.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
namespace gpu {
inline namespace FASTV_KIND {

// What it works in, in device memory: one entry for each visual token of the batch.
struct GreedyRoom {
  const float* scores;         // where rules look at them
  const std::uint32_t* kinds;  // of features
  float* products;
  std::uint32_t* marks;     // what is left: chosen_key or 0
  std::uint32_t* covered;   // of many tokens; few of them have it in shared memory
  float* strengths;         // the part of a value that scores decide
  std::uint32_t* spill;     // [2, visual tokens of the batch]
  std::uint32_t* arrivals;  // [sequences]; 0 before and after
  std::uint32_t width;      // elements of features
};

template <class Block>
struct GreedyMemory {
  typename Block::template Array<std::uint32_t, keys_in_shared> covered;
  SelectMemory<Block> select;  // before: marks, after: novelty
};

// One contest. Called by a whole block of select_threads threads, of which each keeps every select_threads-th candidate:
// only it writes that one's mark, novelty and cover.
template <class Block>
class Chooser {
 public:
  using Words = typename Block::Words;

  FASTV_KERNEL Chooser(Block& block, GreedyMemory<Block>& memory, const StageTables& tables, const Sequence& sequence,
                       const Contest& contest, const GreedyRoom& room) noexcept
      : block_(block),
        tables_(tables),
        s_(sequence),
        contest_(contest),
        room_(room),
        n_(contest.group.size),
        first_(sequence.visual_first + contest.group.start),
        marks_(in_shared() ? block.words(memory.select.before) : block.words(room.spill + 2 * first_, n_)),
        novelty_(in_shared() ? block.words(memory.select.after) : block.words(room.spill + 2 * first_ + n_, n_)),
        covered_(in_shared() ? block.words(memory.covered) : block.words(room.covered + first_, n_)),
        strengths_(room.strengths + first_),
        products_(contest.products == none ? nullptr : room.products + static_cast<std::size_t>(contest.products) * 8),
        wide_(product_room(n_)) {}

  FASTV_KERNEL void run() {
    start();
    if (products_ != nullptr) {
      measure_strength();
      block_.sync();
      if (novelty_is(Novelty::coverage)) measure_gains();
      for (std::uint32_t e = 0; e < n_; ++e)
        if (chosen_before(e)) learn(e);
      const Take* images = reinterpret_cast<const Take*>(tables_.words + contest_.words_images);
      for (std::uint32_t i = 0; i < contest_.images; ++i) take(images[i]);
      take(contest_.all);
    }
    each_own([&](int, std::uint32_t e) { room_.marks[token_of(e)] = marks_[e] == chosen_key ? chosen_key : 0; });
  }

 private:
  static constexpr std::uint32_t threads = select_threads, lanes = 32;

  FASTV_KERNEL bool in_shared() const { return n_ <= keys_in_shared; }
  FASTV_KERNEL bool novelty_is(Novelty novelty) const { return s_.novelty == static_cast<std::uint32_t>(novelty); }
  FASTV_KERNEL bool is_product() const { return s_.blend == static_cast<std::uint32_t>(Blend::product); }
  FASTV_KERNEL std::size_t token_of(std::uint32_t e) const { return s_.visual_first + member_of(contest_.group, e); }
  FASTV_KERNEL bool chosen_before(std::uint32_t e) const {
    const std::uint32_t i = member_of(contest_.group, e);
    return s_.words_chosen != none && (tables_.words[s_.words_chosen + i / 32] >> (i % 32) & 1u) != 0;
  }
  FASTV_KERNEL const float* products_of(std::uint32_t e) const {
    return products_ + static_cast<std::size_t>(e) * wide_;
  }
  FASTV_KERNEL float number(const Words& words, std::uint32_t e) const {
    const std::uint32_t word = words[e];
    return bit_cast<float>(word);
  }
  // A phase: every candidate by the thread that keeps it.
  template <class Body>
  FASTV_KERNEL void each_own(const Body& body) {
    block_.each([&](int thread) {
      for (auto e = static_cast<std::uint32_t>(thread); e < n_; e += threads) body(thread, e);
    });
  }
  FASTV_KERNEL bool competes(std::uint32_t mark) const { return mark != 0 && mark != chosen_key; }

  FASTV_KERNEL void start() {
    each_own([&](int, std::uint32_t e) {
      const std::size_t token = token_of(e);
      const std::uint32_t kind = room_.kinds[token];
      std::uint32_t mark = s_.scored != 0 ? order_key(room_.scores[token]) : 1;
      if (kind == no_numbers) mark = 0;
      marks_[e] = chosen_before(e) ? chosen_key : mark;
      const float novelty = novelty_is(Novelty::nearest) ? 2.0f : kind == unit_length ? 1.0f : 0.0f;
      novelty_[e] = bits_of(novelty);
      covered_[e] = 0;
      strengths_[e] = is_product() ? 1.0f : 0.0f;
    });
  }

  // As Greedy::measure_strength().
  FASTV_KERNEL void measure_strength() {
    if (!(s_.weight > 0)) return;
    typename Block::template PerThread<std::uint32_t> high, low;
    block_.each([&](int thread) { high[thread] = low[thread] = no_key; });
    each_own([&](int thread, std::uint32_t e) {
      const std::uint32_t key = order_key(room_.scores[token_of(e)]);
      if (key == 0) return;
      high[thread] = most(high[thread], key);
      low[thread] = most(low[thread], ~key);
    });
    const std::uint32_t top = block_.greatest(high), bottom = block_.greatest(low);
    if (top == no_key) return;  // all are NaN
    const double greatest = static_cast<double>(float_of_key(top));
    double smallest = static_cast<double>(float_of_key(~bottom));
    if (is_product() && smallest > 0) smallest = 0;
    const double spread = greatest - smallest;
    each_own([&](int, std::uint32_t e) {
      const float score = room_.scores[token_of(e)];
      if (is_nan(score)) return;
      const float scaled = spread > 0 ? static_cast<float>((static_cast<double>(score) - smallest) / spread) : 1.0f;
      strengths_[e] = is_product() ? power_of(scaled, s_.weight) : s_.weight * scaled;
    });
  }

  FASTV_KERNEL float value(std::uint32_t e) const {
    const float novelty = number(novelty_, e);
    return is_product() ? strengths_[e] * novelty : strengths_[e] + rounded_product(s_.rest, novelty);
  }

  // ---- who goes first -----------------------------------------------------------------------------

  // What a candidate ranks by, 0 where it does not compete, and the complement of its number: of equals the earlier.
  struct Ranks {
    std::uint64_t key;
    std::uint32_t candidate;
  };
  using BestOf = typename Block::template PerThread<Ranks>;
  // Each thread's best of first .. end - 1, by key_of(e, mark).
  template <class KeyOf>
  FASTV_KERNEL void rank_own(BestOf& best, std::uint32_t first, std::uint32_t end, const KeyOf& key_of) {
    block_.each([&](int thread) { best[thread] = {0, 0}; });
    each_own([&](int thread, std::uint32_t e) {
      if (e < first || e >= end) return;
      const std::uint64_t key = key_of(e, marks_[e]);
      if (key > best[thread].key) best[thread] = {key, ~e};
    });
  }
  // The best of all; none where nobody competes.
  FASTV_KERNEL std::uint32_t best_of(BestOf& best) {
    typename Block::template PerThread<std::uint64_t> key;
    block_.each([&](int thread) { key[thread] = best[thread].key; });
    const std::uint64_t top = block_.greatest(key);
    if (top == 0) return none;
    typename Block::template PerThread<std::uint32_t> candidate;
    block_.each([&](int thread) { candidate[thread] = best[thread].key == top ? best[thread].candidate : 0; });
    return ~block_.greatest(candidate);
  }
  // By value; of equal values by score.
  FASTV_KERNEL std::uint64_t by_value(std::uint32_t e, std::uint32_t mark) const {
    return competes(mark) ? std::uint64_t{order_key(value(e))} << 32 | mark : 0;
  }
  FASTV_KERNEL std::uint32_t best_value(std::uint32_t first, std::uint32_t end) {
    BestOf best;
    rank_own(best, first, end, [&](std::uint32_t e, std::uint32_t mark) { return by_value(e, mark); });
    return best_of(best);
  }
  FASTV_KERNEL std::uint32_t best_score(std::uint32_t first, std::uint32_t end) {
    BestOf best;
    rank_own(best, first, end,
             [&](std::uint32_t, std::uint32_t mark) -> std::uint64_t { return competes(mark) ? mark : 0; });
    return best_of(best);
  }
  // The first that has not been taken.
  FASTV_KERNEL std::uint32_t first_left(std::uint32_t first, std::uint32_t end) {
    BestOf best;
    rank_own(best, first, end,
             [&](std::uint32_t, std::uint32_t mark) -> std::uint64_t { return mark != chosen_key ? 1 : 0; });
    return best_of(best);
  }

  // ---- one by one ---------------------------------------------------------------------------------

  FASTV_KERNEL void take(const Take& take) {
    bool left = true;  // somebody competes
    for (std::uint32_t i = 0; i < take.by_score + take.by_value; ++i) {
      std::uint32_t next = none;
      if (left) {
        if (i < take.by_score)
          next = best_score(take.first, take.end);
        else if (novelty_is(Novelty::coverage))
          next = most_covering(take.first, take.end);
        else
          next = s_.scored == 0 && !kept_any_ && novelty_is(Novelty::nearest) ? farthest(take.first, take.end)
                                                                              : best_value(take.first, take.end);
        left = next != none;
      }
      if (!left) next = first_left(take.first, take.end);
      keep(next);
      learn(next);
    }
  }
  FASTV_KERNEL void keep(std::uint32_t kept) {
    block_.each([&](int thread) {
      if (kept % threads == static_cast<std::uint32_t>(thread)) marks_[kept] = chosen_key;
    });
  }

  // What the others add beside token `kept`.
  FASTV_KERNEL void learn(std::uint32_t kept) {
    kept_any_ = true;
    if (novelty_is(Novelty::volume)) return learn_direction(kept);
    const float* row = products_of(kept);
    const bool covers = novelty_is(Novelty::coverage);
    each_own([&](int, std::uint32_t e) {
      const float cosine = row[e];
      if (covers) {
        if (cosine > number(covered_, e)) covered_[e] = bits_of(cosine);
      } else {
        lower(e, 1.0f - cosine, 1e-6f);
      }
    });
  }
  // Differences that rounding alone may make are none.
  FASTV_KERNEL void lower(std::uint32_t e, float left, float rounding) {
    const float rounded = left < rounding ? 0.0f : left;
    if (rounded < number(novelty_, e)) novelty_[e] = bits_of(rounded);
  }

  // Novelty::volume: row `kept` becomes the products of all tokens with the part of the token that the basis lacks, at
  // unit length; nothing where that is but rounding. Who has gone into the basis is listed in covered_.
  FASTV_KERNEL void learn_direction(std::uint32_t kept) {
    if (basis_ == room_.width) return;
    float* row = products_ + static_cast<std::size_t>(kept) * wide_;
    float length = row[kept];
    for (std::uint32_t b = 0; b < basis_; ++b) {
      const float along = products_of(covered_[b])[kept];
      length -= along * along;
    }
    if (!(length > 1e-6f)) return;
    const float inverse = 1.0f / sqrt_of(length);
    each_own([&](int, std::uint32_t e) {
      if (e == kept) return;  // others may still read its length
      float product = row[e];
      for (std::uint32_t b = 0; b < basis_; ++b) {
        const float* direction = products_of(covered_[b]);
        product -= direction[kept] * direction[e];
      }
      const float cosine = product * inverse;
      row[e] = cosine;
      lower(e, number(novelty_, e) - rounded_product(cosine, cosine), 1e-5f);
    });
    block_.each([&](int thread) {
      if (thread == 0) covered_[basis_] = kept;
    });
    block_.sync();
    ++basis_;
  }

  // Novelty::nearest without scores starts with the token farthest from its nearest neighbour.
  FASTV_KERNEL std::uint32_t farthest(std::uint32_t first, std::uint32_t end) {
    each_own([&](int, std::uint32_t e) {
      float nearest = -2;
      for (std::uint32_t j = 0; j < n_; ++j) {  // the matrix is symmetric: neighbours read neighbours
        const float cosine = products_of(j)[e];
        nearest = j != e && cosine > nearest ? cosine : nearest;
      }
      novelty_[e] = bits_of(1.0f - nearest);
    });
    const std::uint32_t best = best_value(first, end);
    each_own([&](int, std::uint32_t e) { novelty_[e] = bits_of(2.0f); });
    return best;
  }

  // ---- Novelty::coverage --------------------------------------------------------------------------
  // Gains only shrink as more is covered, so one that is still the greatest when computed anew is the greatest of all
  // (Minoux 1978). A warp computes the gain of a candidate that one of its threads keeps.

  // The gains of one candidate for each warp, none where it has none.
  FASTV_KERNEL void gains_of(typename Block::template PerThread<std::uint32_t>& candidate) {
    typename Block::template PerThread<Values<float, 1>> sum;
    block_.each([&](int thread) {
      float own = 0;
      if (candidate[thread] != none) {
        const float* row = products_of(candidate[thread]);
        for (std::uint32_t j = static_cast<std::uint32_t>(thread) % lanes; j < n_; j += lanes) {
          const float more = row[j] - number(covered_, j);
          own += more > 0 ? more : 0.0f;
        }
      }
      sum[thread].value[0] = own;
    });
    block_.template sum<static_cast<int>(lanes)>(sum);
    block_.each([&](int thread) {
      const std::uint32_t e = candidate[thread];
      if (e != none && e % threads == static_cast<std::uint32_t>(thread))
        novelty_[e] = bits_of(sum[thread].value[0] / static_cast<float>(n_));
    });
  }
  FASTV_KERNEL void measure_gains() {
    typename Block::template PerThread<std::uint32_t> candidate;
    for (std::uint32_t begin = 0; begin < n_; begin += threads)
      for (std::uint32_t lane = 0; lane < lanes && begin + lane < n_; ++lane) {
        block_.each([&](int thread) {
          const std::uint32_t e = begin + static_cast<std::uint32_t>(thread) / lanes * lanes + lane;
          candidate[thread] = e < n_ ? e : none;
        });
        gains_of(candidate);
      }
    block_.sync();  // what all have read is written from here on
  }
  // The warps' best are computed anew at once, until the best of all is one of them.
  FASTV_KERNEL std::uint32_t most_covering(std::uint32_t first, std::uint32_t end) {
    typename Block::template PerThread<std::uint32_t> fresh, candidate;
    typename Block::template PerThread<std::uint64_t> key;
    block_.each([&](int thread) { fresh[thread] = none; });
    for (;;) {
      BestOf best;
      rank_own(best, first, end, [&](std::uint32_t e, std::uint32_t mark) { return by_value(e, mark); });
      const std::uint32_t next = best_of(best);
      if (next == none) return none;
      block_.each([&](int thread) {
        candidate[thread] = fresh[thread] == next ? 1 : 0;
        key[thread] = best[thread].key;
      });
      if (block_.greatest(candidate) != 0) return next;
      block_.template greatest<static_cast<int>(lanes)>(key);
      block_.each([&](int thread) {
        candidate[thread] = best[thread].key != 0 && best[thread].key == key[thread] ? best[thread].candidate : 0;
      });
      block_.template greatest<static_cast<int>(lanes)>(candidate);
      block_.each([&](int thread) { fresh[thread] = candidate[thread] == 0 ? none : ~candidate[thread]; });
      gains_of(fresh);
    }
  }

  Block& block_;
  const StageTables& tables_;
  const Sequence& s_;
  const Contest& contest_;
  const GreedyRoom& room_;
  const std::uint32_t n_;
  const std::size_t first_;
  Words marks_, novelty_, covered_;
  float* strengths_;
  float* products_;
  const std::uint32_t wide_;
  std::uint32_t basis_ = 0;
  bool kept_any_ = false;
};

// Grid: contests. The last block of a sequence writes what stays of it.
struct Greedy {
  static constexpr int threads = select_threads;
  template <class Block>
  struct Shared {
    GreedyMemory<Block> memory;
  };

  StageTables tables;
  GreedyRoom room;
  StageResults results;
  cuda::Counters* counters;

  template <class Block>
  FASTV_KERNEL void operator()(Block& block, Shared<Block>& shared) const {
    const std::uint32_t number = sequence_of<&Sequence::first_contest>(tables, block.x());
    const Sequence s = tables.sequences[number];
    const Contest contest = contests_of(tables, s)[block.x() - s.first_contest];
    Chooser<Block>(block, shared.memory, tables, s, contest, room).run();
    if (!block.last_to_arrive(room.arrivals + number, s.contests)) return;
    const Marked marked{room.marks + s.visual_first, room.kinds + s.visual_first};
    Selector<Block>(block, shared.memory.select, tables, s, room.spill + 2 * static_cast<std::size_t>(s.visual_first))
        .run(s.scored != 0 ? room.scores + s.visual_first : nullptr, marked, results, counters + number,
             counters[number].uncorrected);
  }
};

}  // namespace FASTV_KIND
}  // namespace gpu
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

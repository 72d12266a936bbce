// fastv: the kernel that turns logits, probabilities or given scores into one score per visual token; the block of a
// sequence that finishes last selects.
#pragma once

#include "cuda_logits.hpp"
#include "cuda_select.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
namespace gpu {
inline namespace FASTV_KIND {

inline constexpr std::uint32_t tile_tokens = 64;                           // visual tokens of a block
inline constexpr std::uint32_t tile_parts = select_threads / tile_tokens;  // threads of a token
inline constexpr float tiny_score = 1e-12f;                                // see QueryKeyScorer::run()

// The rows of the question, and those of a prior.
inline constexpr std::uint32_t row_sets = 2;

// Query rows a .. b - 1 of the launch, in slots of its memory.
struct JobSlots {
  std::uint32_t begin, end;  // jobs of the sequence
  std::uint32_t first_slot;  // of job `begin`
};

// What a thread gathers of a token.
struct Gathered {
  double sum;
  std::uint32_t peak;  // order_key() of the greatest log p, but for the sum of the softmax; no_key: none
};

// A norm's address for head `head` of `heads`, or null.
struct Norms {
  const float* data;  // [kv heads, total]
  std::uint32_t kv_heads, total;
  FASTV_KERNEL const float* of(std::uint32_t head, std::uint32_t heads, std::uint32_t token) const noexcept {
    return data == nullptr ? nullptr : data + static_cast<std::size_t>(head / (heads / kv_heads)) * total + token;
  }
};

// ---- where scores come from ---------------------------------------------------------------------
// A source adds up what each of tile_tokens tokens receives: thread t gathers for token first + t % tile_tokens, of the
// terms (row, head) every tile_parts-th from t / tile_tokens on, so that additions have one order whatever the machine.

// Logits, and the parts of their softmax.
struct FromLogits {
  static constexpr bool by_rows = true, in_range = true;
  static constexpr std::uint32_t batch = 64;  // terms whose factors are made at once
  template <class Block>
  struct Memory {
    typename Block::template Array<float, batch> factor, most;  // factor 0: nothing; NaN: all that the row sees is NaN
  };

  const float* logits;     // [jobs of the launch, heads, keys_room]
  const ChunkPart* parts;  // [jobs of the launch, heads, chunks]
  const float* sinks;      // [heads] or null
  Terms terms;
  Norms norms;
  std::uint32_t heads, keys_room, chunks;

  // shift 0: p. Below 0: p times exp(-shift).
  template <class Block, class Threads>
  FASTV_KERNEL void gather(Block& block, Memory<Block>& memory, const StageTables& tables, const Sequence& s,
                           const JobSlots& slots, std::uint32_t first, float shift, Threads& out) const {
    block.each([&](int thread) { out[thread] = {0, no_key}; });
    const std::uint32_t terms_all = (slots.end - slots.begin) * heads;
    for (std::uint32_t begin = 0; begin < terms_all; begin += batch) {
      const std::uint32_t count = least(batch, terms_all - begin);
      make_factors(block, memory, s, slots, begin, count);
      block.sync();
      block.each([&](int thread) {
        const std::uint32_t token = first + static_cast<std::uint32_t>(thread) % tile_tokens;
        if (token >= s.visual) return;
        const std::uint32_t at = s.past + static_cast<std::uint32_t>(tables.candidates[s.visual_first + token]);
        if (at < s.first_key) return;  // its key is no longer at hand
        const std::uint32_t key = at - s.first_key;
        Gathered gathered = out[thread];
        for (std::uint32_t i = static_cast<std::uint32_t>(thread) / tile_tokens; i < count; i += tile_parts)
          add(memory, tables, s, slots, begin + i, i, key, token, shift, gathered);
        out[thread] = gathered;
      });
      block.sync();
    }
  }

 private:
  // Every term's factor 1 / sum and greatest logit, from the parts of its chunks: 8 lanes a term.
  template <class Block>
  FASTV_KERNEL void make_factors(Block& block, Memory<Block>& memory, const Sequence& s, const JobSlots& slots,
                                 std::uint32_t begin, std::uint32_t count) const {
    constexpr std::uint32_t lanes = select_threads / batch;
    const std::uint32_t used = parts_of(s.keys, chunk_keys);
    typename Block::template PerThread<std::uint32_t> top;
    typename Block::template PerThread<Values<float, 1>> sum;
    const auto parts_at = [&](std::uint32_t term) {
      const std::uint32_t slot = slots.first_slot + term / heads;
      return parts + (static_cast<std::size_t>(slot) * heads + term % heads) * chunks;
    };
    block.each([&](int thread) {
      const auto lane = static_cast<std::uint32_t>(thread) % lanes, i = static_cast<std::uint32_t>(thread) / lanes;
      std::uint32_t key = no_key;
      if (i < count)
        for (std::uint32_t c = lane; c < used; c += lanes) key = most(key, parts_at(begin + i)[c].most);
      top[thread] = key;
    });
    block.template greatest<static_cast<int>(lanes)>(top);
    block.each([&](int thread) {
      const auto lane = static_cast<std::uint32_t>(thread) % lanes, i = static_cast<std::uint32_t>(thread) / lanes;
      float total = 0;
      if (i < count && top[thread] != nan_key) {
        const float highest = greatest_with_sink(top[thread], (begin + i) % heads);
        if (!is_infinite(highest) && !is_nan(highest))
          for (std::uint32_t c = lane; c < used; c += lanes) {
            const ChunkPart part = parts_at(begin + i)[c];
            if (part.sum > 0) total += part.sum * exp_of_negative(float_of_key(part.most) - highest);
          }
      }
      sum[thread].value[0] = total;
    });
    block.template sum<static_cast<int>(lanes)>(sum);
    block.each([&](int thread) {
      const auto lane = static_cast<std::uint32_t>(thread) % lanes, i = static_cast<std::uint32_t>(thread) / lanes;
      if (lane != 0 || i >= count) return;
      const std::uint32_t head = (begin + i) % heads;
      const float highest = top[thread] == nan_key ? nan_value<float>() : greatest_with_sink(top[thread], head);
      float total = sum[thread].value[0];
      if (is_nan(highest)) {
        memory.factor[i] = highest;
      } else {
        if (sinks != nullptr && !hides(sinks[head]) && !is_infinite(highest))
          total += exp_of_negative(sinks[head] - highest);
        memory.factor[i] = total > 0 ? 1.0f / total : 0.0f;
      }
      memory.most[i] = highest;
    });
  }
  // As softmax_parts() of the core: NaN if the sink is, -infinity where no key is seen.
  FASTV_KERNEL float greatest_with_sink(std::uint32_t key, std::uint32_t head) const {
    const float highest = key == no_key ? minus_infinity<float>() : float_of_key(key);
    if (sinks == nullptr || hides(sinks[head])) return highest;
    if (is_nan(sinks[head])) return sinks[head];
    return hides(highest) || sinks[head] > highest ? sinks[head] : highest;
  }

  template <class Memory>
  FASTV_KERNEL void add(Memory& memory, const StageTables& tables, const Sequence& s, const JobSlots& slots,
                        std::uint32_t term, std::uint32_t i, std::uint32_t key, std::uint32_t token, float shift,
                        Gathered& gathered) const {
    const float factor = memory.factor[i];
    if (is_zero(factor)) return;
    const std::uint32_t head = term % heads, job = slots.begin + term / heads;
    const Range seen = seen_of(s, terms, row_of_job(s, tables.words, job));
    if (key < seen.first || key >= seen.end) return;
    if (is_nan(factor)) {
      gathered.sum += static_cast<double>(factor);
      return;
    }
    const float logit =
        logits[(static_cast<std::size_t>(slots.first_slot + term / heads) * heads + head) * keys_room + key];
    if (hides(logit)) return;
    const float exponent = logit - memory.most[i];
    gathered.peak = most(gathered.peak, order_key(exponent));
    const float left = exponent - shift;
    const float e = left < 0 ? exp_of_negative(left) : 1.0f;
    if (is_zero(e)) return;
    const float* norm = norms.of(head, heads, s.visual_first + token);
    const double weighted = static_cast<double>(factor) * static_cast<double>(e);
    gathered.sum += norm == nullptr ? weighted : weighted * static_cast<double>(*norm);
  }
};

// Attention probabilities.
template <class T>
struct FromProbabilities {
  static constexpr bool by_rows = true, in_range = false;
  template <class Block>
  struct Memory {};

  cuda::Probabilities<T> view;
  Norms norms;

  template <class Block, class Threads>
  FASTV_KERNEL void gather(Block& block, Memory<Block>&, const StageTables& tables, const Sequence& s,
                           const JobSlots& slots, std::uint32_t first, float, Threads& out) const {
    block.each([&](int thread) {
      Gathered gathered{0, no_key};
      const std::uint32_t token = first + static_cast<std::uint32_t>(thread) % tile_tokens;
      const std::uint32_t at =
          token < s.visual ? s.past + static_cast<std::uint32_t>(tables.candidates[s.visual_first + token]) : 0;
      if (token < s.visual && at >= s.first_key) {
        const auto heads = static_cast<std::uint32_t>(view.heads);
        const std::uint32_t count = (slots.end - slots.begin) * heads;
        for (std::uint32_t i = static_cast<std::uint32_t>(thread) / tile_tokens; i < count; i += tile_parts) {
          const std::uint32_t head = i % heads, row = row_of_job(s, tables.words, slots.begin + i / heads);
          const float p = static_cast<float>(
              to_float(view.data[static_cast<std::ptrdiff_t>(s.table_row) * view.sequence_stride +
                                 static_cast<std::ptrdiff_t>(head) * view.head_stride +
                                 static_cast<std::ptrdiff_t>(row - (s.tokens - s.queries)) * view.query_stride +
                                 static_cast<std::ptrdiff_t>(at - s.first_key) * view.key_stride]));
          const float* norm = norms.of(head, heads, s.visual_first + token);
          if (norm == nullptr)
            gathered.sum += static_cast<double>(p);
          else if (!is_zero(p))
            gathered.sum += static_cast<double>(p) * static_cast<double>(*norm);
        }
      }
      out[thread] = gathered;
    });
  }
};

// Keys alone: minus the mean of their lengths.
template <class K>
struct FromKeys {
  static constexpr bool by_rows = false, in_range = false;
  template <class Block>
  struct Memory {};

  Vectors<K> keys;
  Vectors<float> scales;  // data and pointers null: none
  std::uint32_t heads, dim;

  template <class Block, class Threads>
  FASTV_KERNEL void gather(Block& block, Memory<Block>&, const StageTables& tables, const Sequence& s, const JobSlots&,
                           std::uint32_t first, float, Threads& out) const {
    block.each([&](int thread) {
      Gathered gathered{0, no_key};
      const std::uint32_t token = first + static_cast<std::uint32_t>(thread) % tile_tokens;
      const std::uint32_t at =
          token < s.visual ? s.past + static_cast<std::uint32_t>(tables.candidates[s.visual_first + token]) : 0;
      if (token < s.visual && at >= s.first_key)
        for (std::uint32_t head = static_cast<std::uint32_t>(thread) / tile_tokens; head < heads; head += tile_parts)
          gathered.sum -= static_cast<double>(length(s, at - s.first_key, head)) / static_cast<double>(heads);
      out[thread] = gathered;
    });
  }

 private:
  FASTV_KERNEL float length(const Sequence& s, std::uint32_t key, std::uint32_t head) const {
    const K* vector = keys.vector(s, key, head);
    const auto square = [&](std::uint32_t d) {
      const float x = widened(vector[keys.offset(d)]);
      return x * x;
    };
    float even = 0, odd = 0;
    for (std::uint32_t d = 0; d + 1 < dim; d += 2) {
      even += square(d);
      odd += square(d + 1);
    }
    if (dim % 2 != 0) even += square(dim - 1);
    const float own = sqrt_of(even + odd);
    const bool scaled = scales.data != nullptr || scales.pages != 0;
    return scaled ? own * magnitude_of(*scales.vector(s, key, head)) : own;
  }
  FASTV_KERNEL static float magnitude_of(float x) { return x < 0 ? -x : x; }
};

// Scores of the engine's own.
struct FromScores {
  static constexpr bool by_rows = false, in_range = false;
  template <class Block>
  struct Memory {};

  const float* values;  // [visual tokens of the batch]

  template <class Block, class Threads>
  FASTV_KERNEL void gather(Block& block, Memory<Block>&, const StageTables&, const Sequence& s, const JobSlots&,
                           std::uint32_t first, float, Threads& out) const {
    block.each([&](int thread) {
      const std::uint32_t token = first + static_cast<std::uint32_t>(thread) % tile_tokens;
      const bool own = static_cast<std::uint32_t>(thread) < tile_tokens && token < s.visual;
      out[thread] = {own ? static_cast<double>(values[s.visual_first + token]) : 0.0, no_key};
    });
  }
};

// ---- the kernel ---------------------------------------------------------------------------------

// What it works in, in device memory. Arrays of row_sets parts have one part behind the other.
struct CombineRoom {
  float* scores;              // [row_sets, visual tokens of the batch]
  double* sums;               // the same, where a sequence's rows take several launches
  std::uint32_t* peaks;       // [sequences, row_sets]; 0 before a stage and after
  std::uint32_t* arrivals;    // [sequences]; the same
  std::uint32_t* again;       // [sequences]: the rows are to be gone through once more; the same
  std::uint32_t* shift_keys;  // [sequences, row_sets]: order_key() of the shift of the second time
  std::uint32_t* spill;       // [2, visual tokens of the batch]
  std::uint32_t visual;       // visual tokens of the batch
};

// Grid: tiles of visual tokens, sequences.
template <class Source>
struct Combine {
  static constexpr int threads = select_threads;
  template <class Block>
  struct Shared {
    typename Source::template Memory<Block> source;
    typename Block::template Array<double, select_threads> sums;
    SelectMemory<Block> select;
  };

  StageTables tables;
  Source source;
  CombineRoom room;
  StageResults results;
  cuda::Counters* counters;
  double heads;                      // the average divides by them
  std::uint32_t first_job, end_job;  // of the launch
  bool first, second_time;           // the first launch of all; the rows that `again` names come by again

  template <class Block>
  FASTV_KERNEL void operator()(Block& block, Shared<Block>& shared) const {
    const std::uint32_t number = block.y();
    const Sequence s = tables.sequences[number];  // a copy: its words are loaded at once
    const std::uint32_t tiles = most(parts_of(s.visual, tile_tokens), 1), tile = block.x();
    if (tile >= tiles || (second_time && room.again[number] == 0)) return;
    const std::uint32_t jobs = s.main_jobs + s.prior_jobs, begin = most(s.first_job, first_job);
    const std::uint32_t end = least(s.first_job + jobs, end_job);
    if (jobs == 0 ? !first || second_time : begin >= end) return;
    const bool last = jobs == 0 || end == s.first_job + jobs;
    const bool whole = last && (jobs == 0 || begin == s.first_job);  // all of its rows are at hand

    if (jobs > 0)
      for (std::uint32_t set = 0; set < row_sets; ++set)
        sum_tile(block, shared, s, number, set, tile, whole ? 0.0f : shift_of(number, set), whole, begin);
    if (!last) return;
    if (!block.last_to_arrive(room.arrivals + number, tiles)) return;
    finish(block, shared, s, number, whole, begin);
  }

 private:
  FASTV_KERNEL float shift_of(std::uint32_t number, std::uint32_t set) const {
    if (!second_time) return 0;
    const std::uint32_t key = room.shift_keys[number * row_sets + set];
    return key == no_key ? 0.0f : float_of_key(key);
  }

  // The jobs of a set that are at hand, from job `begin` of the batch on.
  FASTV_KERNEL JobSlots slots_of(const Sequence& s, std::uint32_t set, std::uint32_t begin) const {
    const std::uint32_t from = set == 0 ? 0 : s.main_jobs, to = set == 0 ? s.main_jobs : s.main_jobs + s.prior_jobs;
    const std::uint32_t low = most(s.first_job + from, begin), high = least(s.first_job + to, end_job);
    return low < high ? JobSlots{low - s.first_job, high - s.first_job, low - first_job} : JobSlots{0, 0, 0};
  }

  // What the tokens of one tile receive from the rows at hand -> scores, or added to the sums of earlier launches.
  template <class Block>
  FASTV_KERNEL void sum_tile(Block& block, Shared<Block>& shared, const Sequence& s, std::uint32_t number,
                             std::uint32_t set, std::uint32_t tile, float shift, bool whole,
                             std::uint32_t begin) const {
    const JobSlots slots = slots_of(s, set, begin);
    const std::uint32_t set_jobs = set == 0 ? s.main_jobs : s.prior_jobs;
    if (slots.begin == slots.end) return;
    typename Block::template PerThread<Gathered> gathered;
    source.gather(block, shared.source, tables, s, slots, tile * tile_tokens, shift, gathered);
    typename Block::template PerThread<std::uint32_t> peak;
    block.each([&](int thread) {
      shared.sums[thread] = gathered[thread].sum;
      peak[thread] = gathered[thread].peak;
    });
    block.sync();
    if constexpr (Source::in_range) {
      const std::uint32_t highest = block.greatest(peak);
      block.each([&](int thread) {
        if (thread == 0 && highest != no_key) block.raise(room.peaks + number * row_sets + set, highest);
      });
    }
    const bool first_of_set = slots.begin == (set == 0 ? 0 : s.main_jobs);
    const bool last_of_set = slots.end == (set == 0 ? s.main_jobs : s.main_jobs + s.prior_jobs);
    const double share = Source::by_rows ? 1.0 / (heads * static_cast<double>(set_jobs)) : 1.0;
    block.each([&](int thread) {
      const std::uint32_t token = tile * tile_tokens + static_cast<std::uint32_t>(thread);
      if (static_cast<std::uint32_t>(thread) >= tile_tokens || token >= s.visual) return;
      double sum = 0;
      for (std::uint32_t part = 0; part < tile_parts; ++part)
        sum += shared.sums[static_cast<std::size_t>(thread) + part * tile_tokens];
      const std::size_t at = static_cast<std::size_t>(set) * room.visual + s.visual_first + token;
      if (!whole && !first_of_set) sum = room.sums[at] + sum;
      if (!whole) room.sums[at] = sum;
      if (last_of_set) room.scores[at] = static_cast<float>(sum * share);
    });
    block.sync();
  }

  // The sequence's last block: everything that needs all of its scores.
  template <class Block>
  FASTV_KERNEL void finish(Block& block, Shared<Block>& shared, const Sequence& s, std::uint32_t number, bool whole,
                           std::uint32_t begin) const {
    float* scores = room.scores + s.visual_first;
    const bool ranked = s.main_jobs > 0 && s.visual > 0;
    if constexpr (Source::in_range) {
      std::uint32_t shifts[row_sets] = {no_key, no_key};
      bool shifted = false;
      FASTV_KERNEL_UNROLL
      for (std::uint32_t set = 0; set < row_sets; ++set) {
        if (!ranked || second_time || (set == 1 && s.prior_jobs == 0)) continue;
        shifts[set] = needed_shift(block, s, number, set);
        if (shifts[set] == no_key) continue;
        shifted = true;
        if (whole)
          for (std::uint32_t tile = 0; tile < parts_of(s.visual, tile_tokens); ++tile)
            sum_tile(block, shared, s, number, set, tile, float_of_key(shifts[set]), whole, begin);
      }
      block.each([&](int thread) {
        if (thread != 0) return;
        FASTV_KERNEL_UNROLL
        for (std::uint32_t set = 0; set < row_sets; ++set) {
          room.peaks[number * row_sets + set] = no_key;
          room.shift_keys[number * row_sets + set] = shifts[set];
        }
        room.again[number] = shifted && !whole ? 1 : 0;
      });
      if (shifted && !whole) return;  // the second time selects
    }
    std::uint32_t uncorrected = 0;
    if (ranked && s.prior_jobs > 0) uncorrected = correct(block, scores, scores + room.visual, s.visual) ? 0 : 1;
    if (s.contests > 0) {  // Greedy selects
      block.each([&](int thread) {
        if (thread == 0) counters[number].uncorrected = uncorrected;
      });
      return;
    }
    Selector<Block>(block, shared.select, tables, s, room.spill + 2 * static_cast<std::size_t>(s.visual_first))
        .run(ranked ? scores : nullptr, {}, results, counters + number, uncorrected);
  }

  // order_key() of the shift by which a set's scores come into range, or no_key where they are.
  template <class Block>
  FASTV_KERNEL std::uint32_t needed_shift(Block& block, const Sequence& s, std::uint32_t number,
                                          std::uint32_t set) const {
    const float* scores = room.scores + static_cast<std::size_t>(set) * room.visual + s.visual_first;
    typename Block::template PerThread<std::uint32_t> highest;
    block.each([&](int thread) {
      std::uint32_t key = no_key;
      for (auto i = static_cast<std::uint32_t>(thread); i < s.visual; i += select_threads)
        key = most(key, is_nan(scores[i]) ? nan_key : order_key(scores[i]));
      highest[thread] = key;
    });
    const std::uint32_t top = block.greatest(highest), peak = room.peaks[number * row_sets + set];
    if (top == nan_key || float_of_key(top) >= tiny_score || peak == no_key) return no_key;
    const float shift = float_of_key(peak);
    return shift < 0 ? peak : no_key;
  }

  // As correct_by_prior(): false, and nothing changes, where either attends to no visual token.
  template <class Block>
  FASTV_KERNEL bool correct(Block& block, float* scores, const float* prior, std::uint32_t count) const {
    typename Block::template PerThread<double> question, before;
    block.each([&](int thread) {
      double p = 0, q = 0;
      for (auto i = static_cast<std::uint32_t>(thread); i < count; i += select_threads) {
        if (!is_nan(scores[i])) p += static_cast<double>(scores[i]);
        if (!is_nan(prior[i])) q += static_cast<double>(prior[i]);
      }
      question[thread] = p;
      before[thread] = q;
    });
    const double p_sum = block.total(question), q_sum = block.total(before);
    if (!(p_sum > 0) || !(q_sum > 0)) return false;
    block.each([&](int thread) {
      for (auto i = static_cast<std::uint32_t>(thread); i < count; i += select_threads) {
        const float p = scores[i] / static_cast<float>(p_sum), q = prior[i] / static_cast<float>(q_sum);
        const float ratio = (p + 1e-6f) / (q + 1e-6f);
        scores[i] = is_nan(ratio) ? nan_value<float>() : p * log_of(ratio);
      }
    });
    block.sync();
    return true;
  }
};

}  // namespace FASTV_KIND
}  // namespace gpu
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

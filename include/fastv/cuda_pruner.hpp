// fastv: the host's side of fastv/cuda.cuh: memory, plan and launches. Plain C++ over a queue of kernels, which is a CUDA
// stream there, and in the tests a machine that runs them on the host.
#pragma once

#include "detail/cuda_check.hpp"

#include "detail/begin.hpp"

namespace fastv {
namespace cuda {
inline namespace FASTV_KIND {

// Scores, selects and moves the tokens of a batch on the device, on one stream, without a word to the host: how many
// tokens stay follows from shapes, so that everything behind the pruned layer can be queued at once.
//
//   pruner.reserve(limits);                         // once: allocates
//   pruner.plan(requests, layers, stream);          // per batch: lengths on the host, a few KB to the device
//   ... layers 0 .. K - 1 ...
//   pruner.prune(0, evidence, stream);              // scores and selects
//   pruner.gather(0, {{hidden, other}}, stream);    // moves
//   pruner.kept(0)                                  // rows, positions, slots, cumulative lengths, on the device
//
// After reserve() nothing is allocated on the device, nothing waits for it and nothing is read back. prune() and gather()
// may be captured in a CUDA graph, and replayed with new data for the same plan. Results have the same bits from run to
// run on one GPU. One Pruner serves one stream at a time.
//
// The stages of a batch are the different filtering layers among its requests, ascending; a request without a stage
// there passes it untouched. What is wrong with settings or shapes is found before anything is queued; what only values
// show is counted, see Counters: where nothing ranks the tokens, the earliest stay.
template <class Queue>
class BasicPruner {
 public:
  BasicPruner() noexcept = default;
  BasicPruner(const BasicPruner&) = delete;
  BasicPruner& operator=(const BasicPruner&) = delete;
  ~BasicPruner() { release(); }

  // Device memory that these limits take. O(1).
  static Result<std::size_t> bytes(const Limits& limits) noexcept {
    const Limits settled = detail::gpu::settled(limits);
    if (Status status = detail::gpu::check_limits(settled); !status) return {0, status};
    return {detail::gpu::Places(settled).bytes, {}};
  }
  // Allocates it. What an earlier plan() has made is lost.
  Status reserve(const Limits& limits) noexcept { return reserve(limits, nullptr, 0); }
  // The same in memory of the caller's, at least bytes(limits) of it, at a multiple of 256 bytes, which outlives the
  // Pruner.
  Status reserve(const Limits& limits, void* memory, std::size_t size) noexcept {
    const Result<std::size_t> needed = bytes(limits);
    if (!needed) return needed.status;
    if (memory != nullptr && size < *needed)
      return fail(Errc::too_small, "the memory handed over has {} bytes but these limits need {}", size, *needed);
    if (reinterpret_cast<std::uintptr_t>(memory) % 256 != 0)
      return fail(Errc::bad_stride, "the memory handed over does not begin at a multiple of 256 bytes");
    const Limits settled = detail::gpu::settled(limits);
    if (Status status = planner_.reserve(settled); !status) return status;
    if (memory == nullptr) {
      Result<void*> own = Queue::allocate(*needed);
      if (!own) return own.status;
      release();
      own_ = memory_ = static_cast<char*>(own.value);
    } else {
      release();
      memory_ = static_cast<char*>(memory);
    }
    limits_ = settled;
    planned_ = false;
    return {};
  }

  // Lengths, quotas and groups of a batch, for all its stages; O(visual tokens) on the host, one small launch for each
  // 3.5 KB of plan. Requests may go once it returns. layers: decoder layers of the model.
  //
  // Rows that a Request leaves by_order: query_row is `first` where all query rows are at hand, or else follows those of
  // the sequences before; key_row is `first` where no sequence has keys of earlier turns, or else follows those of the
  // sequences before. Of a later stage all of them are by order, of the tensors packed as the stage before left them.
  //
  // Errors: everything that can be wrong with settings and spans, as make_plan() has it, and what passes the limits.
  Status plan(Span<const Request> requests, std::size_t layers, Queue queue) noexcept {
    if (memory_ == nullptr) return fail(Errc::too_small, "the Pruner has no memory yet: reserve() first");
    planned_ = false;
    if (Status status = planner_.plan(requests, layers); !status) return status;
    const detail::gpu::Places places(limits_);
    const Span<const std::uint32_t> words = planner_.words();
    for (std::size_t at = 0; at < words.size(); at += detail::gpu::Upload::capacity) {
      detail::gpu::Upload upload;
      const std::size_t left = words.size() - at;
      upload.count =
          static_cast<std::uint32_t>(left < detail::gpu::Upload::capacity ? left : detail::gpu::Upload::capacity);
      upload.to = address<std::uint32_t>(places.words) + at;
      std::memcpy(upload.words, words.data() + at, upload.count * sizeof(std::uint32_t));
      if (Status status = queue.launch({1, 1, 1}, upload); !status) return status;
    }
    const auto counts = static_cast<std::uint32_t>(detail::gpu::Places::count_words(limits_));
    const detail::gpu::Clear clear{address<std::uint32_t>(places.counts), counts};
    if (Status status = queue.launch({grid(counts, clear.threads), 1, 1}, clear); !status) return status;
    planned_ = true;
    if (planner_.stages() == 0) return {};
    std::size_t longest = 0;
    for (std::size_t i = 0; i < planner_.sequences(); ++i)
      longest = planner_.sequence(0, i).tokens > longest ? planner_.sequence(0, i).tokens : longest;
    const detail::gpu::Prepare prepare{sequences(places, 0), address<std::uint32_t>(places.words),
                                       address<std::int32_t>(places.codes), address<std::int32_t>(places.candidates),
                                       address<std::int32_t>(places.origins)};
    return queue.launch({grid(longest, prepare.threads), grid(planner_.sequences(), 1), 1}, prepare);
  }

  // ---- what plan() has found, on the host ---------------------------------------------------------

  // Stages of the batch.
  std::size_t stages() const noexcept { return planned_ ? planner_.stages() : 0; }
  // Layers that run before a stage.
  std::size_t filtering_layer(std::size_t stage) const noexcept { return planner_.stage(stage).filtering_layer; }
  // Tokens of sequence i that a stage keeps, text included.
  std::size_t kept_tokens(std::size_t stage, std::size_t i) const noexcept {
    return planner_.words()[planner_.stage(stage).words_cumulative + i + 1] -
           planner_.words()[planner_.stage(stage).words_cumulative + i];
  }
  // A stage's results, whose device memory is filled by prune() as the stream gets there.
  Kept kept(std::size_t stage) const noexcept {
    const detail::gpu::Places places(limits_);
    const detail::gpu::Places::Stage& own = places.stage[stage];
    const detail::gpu::StagePlan& plan = planner_.stage(stage);
    const auto* words = address<std::int32_t>(places.words);
    Kept kept{address<std::int32_t>(own.rows),    address<std::int32_t>(own.positions),
              address<std::int32_t>(own.slots),   words + plan.words_cumulative,
              words + plan.words_cumulative_keys, address<std::int32_t>(own.visual_numbers),
              address<Counters>(own.counters),    address<float>(places.scores)};
    kept.total = plan.kept;
    kept.total_visual = plan.kept_visual;
    kept.longest = plan.longest;
    kept.longest_keys = plan.longest_keys;
    return kept;
  }

  // ---- what is queued -----------------------------------------------------------------------------

  // Scores and selects, by evidence of the layer below the stage: QueryKey, Probabilities, KeysOnly, Scores or NoEvidence.
  // Stages come in order. Two launches where the rows of all sequences fit Limits::rows, as their last rows do; for more
  // rows, two for each Limits::rows of them, and as many again, which end at once but where every score is tiny.
  template <class Evidence>
  Status prune(std::size_t stage, const Evidence& evidence, Queue queue) noexcept {
    if (Status status = check_stage(stage); !status) return status;
    if (Status status = detail::gpu::expect_no_contests(planner_.stage(stage)); !status) return status;
    if (Status status = detail::gpu::check_evidence(evidence, planner_.stage(stage)); !status) return status;
    return prune_by(stage, evidence, queue);
  }

  // The same where some requests ask for Selection::diverse: three launches more, whatever the counts. Every two tokens
  // that compete are compared once, O(visual * competing * width); then each token that is kept takes a few microseconds,
  // of all sequences at once. Results may differ from the core's where two tokens are as near as rounding.
  template <class Evidence, class T>
  Status prune(std::size_t stage, const WithFeatures<Evidence, T>& evidence, Queue queue) noexcept {
    if (Status status = check_stage(stage); !status) return status;
    if (Status status = detail::gpu::check_evidence(evidence.evidence, planner_.stage(stage)); !status) return status;
    if (Status status = detail::gpu::check_device_features(evidence.features, planner_.stage(stage), rows_found(stage),
                                                           limits_.features);
        !status)
      return status;
    if (Status status = prune_by(stage, evidence.evidence, queue); !status) return status;
    return planner_.stage(stage).contests == 0 ? Status{} : choose(stage, evidence.features, queue);
  }

  // Moves the kept rows of any number of tensors; one launch for each max_moves of them.
  Status gather(std::size_t stage, Span<const Move> moves, Queue queue) noexcept {
    if (Status status = check_stage(stage); !status) return status;
    if (Status status = detail::expect_room(moves, moves.size(), "the tensors to gather"); !status) return status;
    const detail::gpu::StagePlan& plan = planner_.stage(stage);
    const Kept results = kept(stage);
    // All are looked at before any is moved.
    for (std::size_t begin = 0; begin < moves.size(); ++begin) {
      detail::gpu::Moved moved;
      const bool rows = moves[begin].by == By::rows;
      if (Status status = detail::gpu::check_move(moves[begin], begin, rows ? rows_found(stage) : plan.visual,
                                                  rows ? plan.kept : plan.kept_visual, moved);
          !status)
        return status;
    }
    for (std::size_t begin = 0; begin < moves.size();) {
      detail::gpu::Gather gather{};
      std::uint32_t count = 0, tiles = 0, planes = 0;
      for (; begin < moves.size() && count < max_moves; ++begin) {
        const bool rows = moves[begin].by == By::rows;
        detail::gpu::Moved& moved = gather.tensors[count];
        if (Status status = detail::gpu::check_move(moves[begin], begin, 0, rows ? plan.kept : plan.kept_visual, moved);
            !status)
          return status;
        if (moved.tile == 0) continue;
        moved.numbers = rows ? results.rows : results.visual_numbers;
        tiles = detail::gpu::most(tiles, detail::gpu::parts_of(moved.count, moved.tile));
        planes = detail::gpu::most(planes, moved.planes);
        ++count;
      }
      if (count == 0) continue;
      if (Status status = queue.launch({tiles, planes, count}, gather); !status) return status;
    }
    return {};
  }
  // The same of a list in braces.
  template <std::size_t N>
  Status gather(std::size_t stage, const Move (&moves)[N], Queue queue) noexcept {
    return gather(stage, Span<const Move>(moves), queue);
  }

 private:
  template <class T>
  T* address(std::size_t at) const noexcept {
    return reinterpret_cast<T*>(memory_ + at);
  }
  static std::uint32_t grid(std::size_t count, std::size_t size) noexcept {
    const std::size_t blocks = (count + size - 1) / size;
    return blocks == 0 ? 1 : static_cast<std::uint32_t>(blocks);
  }
  void release() noexcept {
    if (own_ != nullptr) Queue::release(own_);
    own_ = memory_ = nullptr;
  }
  const detail::gpu::Sequence* sequences(const detail::gpu::Places& places, std::size_t stage) const noexcept {
    return reinterpret_cast<const detail::gpu::Sequence*>(address<std::uint32_t>(places.words) +
                                                          planner_.stage(stage).words_sequences);
  }
  // Rows that the packed tensors of a stage must have; padding counts where there is any.
  std::size_t rows_found(std::size_t stage) const noexcept {
    const detail::gpu::Sequence& last = planner_.sequence(stage, planner_.sequences() - 1);
    return std::size_t{last.first} + last.tokens;
  }
  Status check_stage(std::size_t stage) const noexcept {
    if (!planned_) return fail(Errc::bad_setting, "there is no plan yet: plan() the batch first");
    if (stage < planner_.stages()) return {};
    return fail(Errc::bad_setting, "stage {} was asked for but the batch has {}", stage, planner_.stages());
  }

  detail::gpu::StageTables tables(const detail::gpu::Places& places, std::size_t stage) const noexcept {
    const bool first = stage == 0;
    const detail::gpu::Places::Stage& before = places.stage[first ? 0 : stage - 1];
    return {sequences(places, stage),
            address<std::uint32_t>(places.words),
            static_cast<std::uint32_t>(planner_.sequences()),
            address<std::int32_t>(first ? places.codes : before.codes),
            address<std::int32_t>(first ? places.candidates : before.candidates),
            address<std::int32_t>(first ? places.origins : before.positions)};
  }

  detail::gpu::StageResults results_of(const detail::gpu::Places::Stage& own) const noexcept {
    return {address<std::int32_t>(own.rows),  address<std::int32_t>(own.positions),
            address<std::int32_t>(own.slots), address<std::int32_t>(own.visual_numbers),
            address<std::int32_t>(own.codes), address<std::int32_t>(own.candidates)};
  }

  // Selection::diverse, behind the scores.
  template <class T>
  Status choose(std::size_t stage, const Features<T>& features, Queue& queue) noexcept {
    const detail::gpu::Places places(limits_);
    const detail::gpu::StagePlan& plan = planner_.stage(stage);
    const auto word = [](std::size_t value) { return static_cast<std::uint32_t>(value); };
    const std::size_t room = detail::gpu::feature_room(features.width());
    detail::gpu::LoadFeatures<T> load{};
    load.tables = tables(places, stage);
    load.vectors = detail::gpu::vectors_of(features.vectors);
    load.scales = detail::gpu::vectors_of(features.scales);
    load.at = features.at;
    load.mean_of_heads = features.mean_of_heads;
    load.heads = word(features.vectors.layout.heads);
    load.dim = word(features.vectors.layout.dim);
    load.width = word(features.width());
    load.room = word(room);
    load.rows = address<float>(places.features);
    load.kinds = address<std::uint32_t>(places.kinds);
    if (Status status = queue.launch({grid(plan.most_visual, load.tokens), grid(planner_.sequences(), 1), 1}, load);
        !status)
      return status;
    if (plan.tiles > 0) {
      const detail::gpu::FeatureProducts products{load.tables, load.rows, load.room, address<float>(places.products)};
      if (Status status = queue.launch({word(plan.tiles), 1, 1}, products); !status) return status;
    }
    auto* counts = address<std::uint32_t>(places.counts);
    const detail::gpu::GreedyRoom greedy_room{address<float>(places.scores),
                                              load.kinds,
                                              address<float>(places.products),
                                              address<std::uint32_t>(places.marks),
                                              address<std::uint32_t>(places.covered),
                                              address<float>(places.strengths),
                                              address<std::uint32_t>(places.spill),
                                              counts + detail::gpu::row_sets * limits_.sequences,
                                              load.width};
    const detail::gpu::Greedy greedy{load.tables, greedy_room, results_of(places.stage[stage]),
                                     address<Counters>(places.stage[stage].counters)};
    return queue.launch({word(plan.contests), 1, 1}, greedy);
  }

  // The second kernel but for what differs by launch.
  template <class Source>
  detail::gpu::Combine<Source> combine_of(std::size_t stage, const Source& source) const noexcept {
    const detail::gpu::Places places(limits_);
    const detail::gpu::Places::Stage& own = places.stage[stage];
    detail::gpu::Combine<Source> combine{};
    combine.tables = tables(places, stage);
    combine.source = source;
    auto* counts = address<std::uint32_t>(places.counts);
    const std::size_t n = limits_.sequences, sets = detail::gpu::row_sets;
    combine.room = {address<float>(places.scores),
                    address<double>(places.sums),
                    counts,
                    counts + sets * n,
                    counts + (sets + 1) * n,
                    counts + (sets + 2) * n,
                    address<std::uint32_t>(places.spill),
                    static_cast<std::uint32_t>(planner_.stage(stage).visual)};
    combine.results = results_of(own);
    combine.counters = address<Counters>(own.counters);
    combine.heads = 1;
    combine.first_job = 0;
    combine.end_job = static_cast<std::uint32_t>(planner_.stage(stage).jobs);
    combine.first = true;
    return combine;
  }
  template <class Source>
  Status launch_combine(std::size_t stage, const detail::gpu::Combine<Source>& combine, Queue& queue) const noexcept {
    return queue.launch(
        {grid(planner_.stage(stage).most_visual, detail::gpu::tile_tokens), grid(planner_.sequences(), 1), 1}, combine);
  }

  Status prune_by(std::size_t stage, const NoEvidence&, Queue queue) noexcept {
    return launch_combine(stage, combine_of(stage, detail::gpu::FromScores{nullptr}), queue);
  }
  Status prune_by(std::size_t stage, const Scores& evidence, Queue queue) noexcept {
    return launch_combine(stage, combine_of(stage, detail::gpu::FromScores{evidence.values}), queue);
  }
  template <class K>
  Status prune_by(std::size_t stage, const KeysOnly<K>& evidence, Queue queue) noexcept {
    const fastv::Heads<K>& k = evidence.key.layout;
    const detail::gpu::FromKeys<K> source{detail::gpu::vectors_of(evidence.key),
                                          detail::gpu::vectors_of(evidence.key_scales),
                                          static_cast<std::uint32_t>(k.heads), static_cast<std::uint32_t>(k.dim)};
    return launch_combine(stage, combine_of(stage, source), queue);
  }
  template <class T>
  Status prune_by(std::size_t stage, const Probabilities<T>& evidence, Queue queue) noexcept {
    const std::size_t norm_heads = evidence.norm_heads == 0 ? evidence.heads : evidence.norm_heads;
    auto combine = combine_of(stage, detail::gpu::FromProbabilities<T>{evidence, norms(evidence, norm_heads, stage)});
    combine.heads = static_cast<double>(evidence.heads);
    return launch_combine(stage, combine, queue);
  }
  template <class Evidence>
  detail::gpu::Norms norms(const Evidence& evidence, std::size_t kv_heads, std::size_t stage) const noexcept {
    return {evidence.value_norms, static_cast<std::uint32_t>(kv_heads),
            static_cast<std::uint32_t>(planner_.stage(stage).visual)};
  }

  template <class Q, class K>
  Status prune_by(std::size_t stage, const QueryKey<Q, K>& evidence, Queue queue) noexcept {
    const detail::gpu::StagePlan& plan = planner_.stage(stage);
    const fastv::Heads<Q>& q = evidence.query.layout;
    if (plan.jobs > 0 && (q.heads > limits_.heads || plan.keys > limits_.keys))
      return fail(Errc::too_small,
                  "there are {} query heads and {} keys in the longest sequence but there is room for {} and {}: raise "
                  "Limits and reserve() again",
                  q.heads, plan.keys, limits_.heads, limits_.keys);
    // 8 heads at once, or one where each has its own keys.
    const bool wide = detail::gpu::moves_wide(detail::gpu::vectors_of(evidence.key), q.dim);
    if (q.heads == evidence.key.layout.heads)
      return wide ? prune_in_tiles<true, 1>(stage, evidence, queue) : prune_in_tiles<false, 1>(stage, evidence, queue);
    return wide ? prune_in_tiles<true, 8>(stage, evidence, queue) : prune_in_tiles<false, 8>(stage, evidence, queue);
  }

  template <bool Wide, int Heads, class Q, class K>
  Status prune_in_tiles(std::size_t stage, const QueryKey<Q, K>& evidence, Queue& queue) noexcept {
    const detail::gpu::Places places(limits_);
    const detail::gpu::StagePlan& plan = planner_.stage(stage);
    const auto& q = evidence.query.layout;
    const auto& k = evidence.key.layout;
    detail::gpu::Logits<K, Wide, Heads> logits{};
    logits.tables = tables(places, stage);
    const auto heads = static_cast<std::uint32_t>(q.heads);
    logits.query = {q.data,
                    evidence.query_bias,
                    q.head_stride,
                    q.token_stride,
                    detail::gpu::ElementOf<Q>::value,
                    heads,
                    static_cast<std::uint32_t>(q.dim),
                    evidence.scale,
                    evidence.rope};
    logits.keys = detail::gpu::vectors_of(evidence.key);
    logits.scales = detail::gpu::vectors_of(evidence.key_scales);
    logits.terms = {evidence.soft_cap, evidence.bias,   evidence.alibi,
                    evidence.visible,  evidence.window, evidence.causal};
    logits.group = static_cast<std::uint32_t>(q.heads / k.heads);
    logits.tiles = detail::gpu::parts_of(logits.group, Heads);
    logits.keys_room = static_cast<std::uint32_t>(plan.keys);
    logits.chunks = detail::gpu::parts_of(logits.keys_room, detail::gpu::chunk_keys);
    logits.logits = address<float>(places.logits);
    logits.parts = address<detail::gpu::ChunkPart>(places.parts);
    const std::size_t columns = k.heads * logits.tiles;  // at most the query heads, of which a launch has room for all

    auto combine = combine_of(
        stage, detail::gpu::FromLogits{logits.logits, logits.parts, evidence.sinks, logits.terms,
                                       norms(evidence, k.heads, stage), heads, logits.keys_room, logits.chunks});
    combine.heads = static_cast<double>(q.heads);
    const bool again = plan.jobs > limits_.rows;
    for (int time = 0; time < (again ? 2 : 1); ++time) {
      combine.second_time = time == 1;
      logits.again = time == 1 ? combine.room.again : nullptr;
      std::size_t job = 0;
      do {
        const std::size_t left = plan.jobs - job, count = left < limits_.rows ? left : limits_.rows;
        logits.first_job = combine.first_job = static_cast<std::uint32_t>(job);
        combine.end_job = static_cast<std::uint32_t>(job + count);
        combine.first = job == 0;
        if (count > 0) {
          const std::uint32_t jobs = static_cast<std::uint32_t>(count);
          if (Status status = queue.launch({logits.chunks, static_cast<std::uint32_t>(columns), jobs}, logits); !status)
            return status;
        }
        if (Status status = launch_combine(stage, combine, queue); !status) return status;
        job += count;
      } while (job < plan.jobs);
    }
    return {};
  }

  detail::gpu::Planner planner_;
  Limits limits_;
  char *memory_ = nullptr, *own_ = nullptr;
  bool planned_ = false;
};

}  // namespace FASTV_KIND
}  // namespace cuda
}  // namespace fastv

#include "detail/end.hpp"

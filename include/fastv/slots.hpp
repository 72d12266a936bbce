// fastv: which cache slot holds which token, in every layer, over all turns and decoded tokens of a sequence.
//
// Without pruning, a token's position, its row in every layer's cache, the number of keys and where a sliding window
// starts are one number. With it they are four, and differ between the layers below a filtering layer and those from it
// on. Slots keeps these books for one sequence:
//
//   fastv::Slots slots;
//   slots.append(n);                     // a prompt: n tokens, for every layer
//   slots.keep(K, kept);                 // layers K.. hold only what prune() kept of it
//   slots.append(1);                     // a decoded token
//   slots.rollback(slots.tokens() - 3);  // three rejected drafts
//   slots.append(m);                     // the next turn, which may be pruned as well, at the same or another layer
//
//   slots.tokens()                       the next token's position
//   slots.length(layer)                  its slot in that layer's cache, and the keys that are there already
//   slots.first_in_window(layer, position, window)
//                                        the first slot that a layer with a sliding window reads
//
// A slot is a row of the layer's cache. In a paged cache, slot s is row s % block_tokens of block block_table[s /
// block_tokens]; in a cyclic one, row s % capacity. Layers that hold the same tokens form a group, for which one block
// table will do. Every member takes a layer and finds its group itself.
//
// Positions count tokens from the start of the sequence, dropped ones included. Plain RoPE, causal masks and windows go
// by them. A model with other position ids (M-RoPE has three to a token) keeps its ids by position as before, [axes,
// tokens()]: the token in slot s has those of position_of(layer, s). Whatever was dropped, tokens decoded after a
// prompt have next_position(ids) + 0, 1, 2, ... on every axis (apply.hpp).
//
// Slots also remember the kept set: a request that is preempted and recomputed must keep the same tokens again, which
// write_positions() lists.
#pragma once

#include "apply.hpp"
#include "detail/buffer.hpp"
#include "plan.hpp"

#include "detail/begin.hpp"

namespace fastv {

// Neighbouring tokens in neighbouring slots: position + i is in slot + i, for i < count.
struct SlotRun {
  Index position;  // of the first token
  Index slot;      // of the first token
  Index count;     // tokens; at least 1
};

namespace detail {
inline namespace FASTV_KIND {

// Runs that start at or before `value`, by position or by slot.
template <Index SlotRun::*Start>
std::size_t runs_up_to(Span<const SlotRun> runs, std::size_t value) noexcept {
  std::size_t low = 0, high = runs.size();
  while (low < high) {
    const std::size_t middle = low + (high - low) / 2;
    if (runs[middle].*Start <= value)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

inline std::size_t length_of(Span<const SlotRun> runs) noexcept {
  if (runs.empty()) return 0;
  const SlotRun& last = runs[runs.size() - 1];
  return std::size_t{last.slot} + last.count;
}

// Slots whose tokens are before `position`.
inline std::size_t slots_before(Span<const SlotRun> runs, std::size_t position) noexcept {
  const std::size_t r = runs_up_to<&SlotRun::position>(runs, position);
  if (r == 0) return 0;
  const SlotRun& run = runs[r - 1];
  const std::size_t into = position - run.position;
  return run.slot + (into < run.count ? into : run.count);
}

// Calls visit(position, count) for each stretch of neighbours among the kept ones of the tokens from slot `first` on.
template <class Visit>
void for_each_kept_stretch(Span<const SlotRun> runs, std::size_t first, Span<const Index> kept, Visit visit) noexcept {
  std::size_t r = 0;
  each_run(kept, [&](std::size_t, std::size_t source, std::size_t count) {
    std::size_t slot = first + source;
    while (count > 0) {
      while (std::size_t{runs[r].slot} + runs[r].count <= slot) ++r;
      const std::size_t into = slot - runs[r].slot, left = runs[r].count - into, part = count < left ? count : left;
      visit(runs[r].position + into, part);
      slot += part;
      count -= part;
    }
  });
}

}  // namespace FASTV_KIND
}  // namespace detail

inline namespace FASTV_KIND {

// The books of one sequence. Stored as runs: text and decoded tokens are one run, and a prune adds at most one run for
// each token that it drops. Memory only grows, and decoding allocates none. Nothing changes where an error is returned.
// Reading from several threads is safe while none writes.
class Slots {
 public:
  // Where there is no such slot or token.
  static constexpr Index none = 0xffffffffu;
  // The most groups that layers may form: as many as one schedule makes. Turns may prune at different layers.
  static constexpr std::size_t max_groups = max_stages + 1;

  Slots() noexcept = default;
  // Moves leave an object that is to be cleared or destroyed. A copy may fail: see copy_from().
  Slots(Slots&& other) noexcept { swap(other); }
  Slots& operator=(Slots&& other) noexcept {
    swap(other);
    return *this;
  }

  // An empty sequence. Memory is kept for the next one. O(1).
  void clear() noexcept {
    groups_ = 1;
    tokens_ = prompt_ = 0;
    group_[0].runs.use(0);
  }

  // Room for so many groups of so many runs each, for hosts that must not allocate later. O(runs) where it grows.
  Status reserve(std::size_t groups, std::size_t runs) noexcept {
    if (groups > max_groups) return too_many(groups);
    for (std::size_t g = 0; g < groups; ++g)
      if (Status status = group_[g].runs.grow(runs); !status) return status;
    return {};
  }

  // ---- what happens to the sequence ---------------------------------------------------------------

  // More tokens at the end, for every layer: a prompt or the first chunk of one, a decoded token, drafts. Amortised
  // O(groups).
  Status append(std::size_t tokens = 1) noexcept {
    const std::size_t first = tokens_;
    if (Status status = append_chunk(tokens); !status) return status;
    prompt_ = first;
    return {};
  }
  // A further chunk of the prompt that the last append() began, so that keep() takes them as one.
  Status append_chunk(std::size_t tokens) noexcept {
    if (tokens > max_tokens - tokens_)
      return fail(Errc::bad_prompt, "the sequence has {} tokens and {} more but at most {} are supported", tokens_,
                  tokens, max_tokens);
    if (tokens == 0) return {};
    for (std::size_t g = 0; g < groups_; ++g)
      if (Status status = make_room(group_[g], continues(group_[g].runs, tokens_) ? 0 : 1); !status) return status;
    for (std::size_t g = 0; g < groups_; ++g) push(group_[g].runs, tokens_, tokens);
    tokens_ += tokens;
    return {};
  }

  // Of the prompt that was appended last, layers from `filtering_layer` on hold only the kept tokens: call it with what
  // prune() returned, once the prompt has been appended and before anything else is. The stages of a schedule come in
  // order, each with indices of what the stage before it left, as the Pruner returns them. A prompt that was not pruned
  // needs no call. O(groups * (kept + runs)).
  Status keep(std::size_t filtering_layer, const KeptRows& kept) noexcept {
    if (Status status = detail::expect_known(kept); !status) return status;
    const std::size_t n = kept.prompt_tokens;
    if (filtering_layer > max_tokens)
      return fail(Errc::bad_setting, "filtering_layer is {}, more layers than any model has", filtering_layer);
    // What the indices number: what the layer below has run on.
    const SlotRun whole{0, 0, static_cast<Index>(tokens_)};
    const Span<const SlotRun> below =
        filtering_layer == 0 ? Span<const SlotRun>(&whole, tokens_ == 0 ? 0 : 1) : runs(filtering_layer - 1);
    const std::size_t first = detail::slots_before(below, prompt_), last = detail::length_of(below) - first;
    if (n != last)
      return fail(Errc::bad_shape,
                  "the kept indices are of {} tokens but the layers below {} hold {} of what was appended last: call "
                  "keep() between append() of the prompt (append_chunk() of more of it) and that of the next token",
                  n, filtering_layer, last);
    const std::size_t own = group_of(filtering_layer);
    for (std::size_t g = own; g < groups_; ++g) {
      const Span<const SlotRun> held = used(group_[g]);
      const std::size_t there = detail::length_of(held) - detail::slots_before(held, prompt_);
      if (there != n)
        return fail(Errc::bad_shape,
                    "layers from {} on hold {} of the last {} tokens, so they were pruned already: call keep() once a "
                    "stage, in the order of the layers",
                    group_[g].first_layer, there, n);
    }
    std::size_t stretches = 0;
    detail::for_each_kept_stretch(below, first, kept.indices, [&](std::size_t, std::size_t) { ++stretches; });

    const bool split = group_[own].first_layer != filtering_layer;
    if (split && groups_ == max_groups) return too_many(groups_ + 1);
    for (std::size_t g = own + (split ? 1 : 0); g < groups_; ++g)
      if (Status status = make_room(group_[g], stretches); !status) return status;
    if (split) {
      Group& fresh = group_[groups_];
      const Span<const SlotRun> held = used(group_[own]);
      if (Status status = fresh.runs.grow(held.size() + stretches); !status) return status;
      fresh.first_layer = filtering_layer;
      copy(held, fresh.runs);
      for (std::size_t g = groups_; g > own + 1; --g) std::swap(group_[g], group_[g - 1]);
      ++groups_;
    }
    // `below` is another group than those that are written, or `whole`.
    for (std::size_t g = own + (split ? 1 : 0); g < groups_; ++g) {
      truncate(group_[g].runs, prompt_);
      detail::for_each_kept_stretch(below, first, kept.indices,
                                    [&](std::size_t at, std::size_t count) { push(group_[g].runs, at, count); });
    }
    return {};
  }

  // Forgets all tokens from position `tokens` on: drafts that were rejected, or a turn that is taken back. Slots from
  // length(layer) on are then free. O(groups * log runs).
  Status rollback(std::size_t tokens) noexcept {
    if (tokens > tokens_)
      return fail(Errc::bad_prompt, "the sequence has {} tokens and cannot be rolled back to {}: use at most that",
                  tokens_, tokens);
    for (std::size_t g = 0; g < groups_; ++g) truncate(group_[g].runs, tokens);
    tokens_ = tokens;
    prompt_ = tokens < prompt_ ? tokens : prompt_;
    return {};
  }

  // The same books for another sequence: a beam, a sample, a fork of the conversation. Its caches may share blocks with
  // the other's, all but the last, which both will write to. O(runs), a dozen bytes each.
  Status copy_from(const Slots& other) noexcept {
    if (&other == this) return {};
    for (std::size_t g = 0; g < other.groups_; ++g)
      if (Status status = group_[g].runs.grow(used(other.group_[g]).size()); !status) return status;
    for (std::size_t g = 0; g < other.groups_; ++g) {
      group_[g].first_layer = other.group_[g].first_layer;
      copy(used(other.group_[g]), group_[g].runs);
    }
    groups_ = other.groups_;
    tokens_ = other.tokens_;
    prompt_ = other.prompt_;
    return {};
  }

  // ---- what is where ------------------------------------------------------------------------------

  // Tokens of the sequence so far, dropped ones included: the position of the next.
  std::size_t tokens() const noexcept { return tokens_; }
  // Tokens in the cache of `layer`: its number of keys, and the next token's slot. O(groups), as all that take a layer.
  std::size_t length(std::size_t layer) const noexcept { return detail::length_of(runs(layer)); }
  // The slot of the token at `position`; none where it was dropped or has not come yet. O(log runs).
  Index slot_of(std::size_t layer, std::size_t position) const noexcept {
    const Span<const SlotRun> held = runs(layer);
    const std::size_t r = detail::runs_up_to<&SlotRun::position>(held, position);
    if (r == 0 || position - held[r - 1].position >= held[r - 1].count) return none;
    return static_cast<Index>(held[r - 1].slot + (position - held[r - 1].position));
  }
  // The position of the token in `slot`; none where the slot is free. O(log runs).
  Index position_of(std::size_t layer, std::size_t slot) const noexcept {
    const Span<const SlotRun> held = runs(layer);
    return slot < detail::length_of(held) ? static_cast<Index>(position_at(held, slot)) : none;
  }
  // How many slots hold tokens before `position`: the first slot at or after it. A query at position p sees, by the
  // causal mask, slots below slots_before(layer, p + 1). O(log runs).
  std::size_t slots_before(std::size_t layer, std::size_t position) const noexcept {
    return detail::slots_before(runs(layer), position);
  }
  // The first slot that a query at `position` sees through a sliding window of `window` positions up to its own; 0: no
  // window. Slots before it are not read again by this layer unless the sequence is rolled back to or before `position`,
  // so that whole blocks of them may be freed. O(log runs).
  std::size_t first_in_window(std::size_t layer, std::size_t position, std::size_t window) const noexcept {
    return window == 0 || position < window ? 0 : slots_before(layer, position - window + 1);
  }
  // The positions of the list.size() slots from first_slot on, as the engine's integers: see write_indices(). All
  // length(layer) of them are the kept set of the sequence, as KeptRows(list, tokens()). O(positions + log runs).
  template <class List, class = typename detail::IfContainer<List>::type>
  Status write_positions(std::size_t layer, std::size_t first_slot, List&& list) const noexcept {
    using Integer = detail::ValueOf<List>;
    detail::expect_integers<Integer>();
    const Span<Integer> positions(list.data(), static_cast<std::size_t>(list.size()));
    const Span<const SlotRun> held = runs(layer);
    const std::size_t length = detail::length_of(held), count = positions.size();
    if (first_slot > length || count > length - first_slot)
      return fail(Errc::bad_index, "{} slots from {} on were asked for but layer {} holds {}: see length()", count,
                  first_slot, layer, length);
    if (Status status = detail::expect_room(positions, count, "the positions"); !status) return status;
    std::size_t r = detail::runs_up_to<&SlotRun::slot>(held, first_slot);
    for (std::size_t i = 0; i < count; ++r) {
      const SlotRun& run = held[r - 1];
      for (std::size_t into = first_slot + i - run.slot; i < count && into < run.count; ++i, ++into)
        positions[i] = static_cast<Integer>(run.position + into);
    }
    return {};
  }
  // The runs of a layer, positions and slots ascending: for hosts that hand the map to a device. Valid until the next
  // change.
  Span<const SlotRun> runs(std::size_t layer) const noexcept { return used(group_[group_of(layer)]); }

  // ---- groups of layers ---------------------------------------------------------------------------

  // Groups of layers that hold the same tokens: 1 until keep() has been called.
  std::size_t groups() const noexcept { return groups_; }
  // The group of `layer`.
  std::size_t group_of(std::size_t layer) const noexcept {
    std::size_t group = 0;
    while (group + 1 < groups_ && group_[group + 1].first_layer <= layer) ++group;
    return group;
  }
  // The first layer of `group`, which is below groups().
  std::size_t first_layer(std::size_t group) const noexcept { return group_[group].first_layer; }

 private:
  struct Group {
    std::size_t first_layer = 0;
    detail::Buffer<SlotRun> runs;
  };

  static Span<const SlotRun> used(const Group& group) noexcept {
    const Span<SlotRun> runs = group.runs.used();
    return {runs.data(), runs.size()};
  }
  static std::size_t position_at(Span<const SlotRun> runs, std::size_t slot) noexcept {
    const SlotRun& run = runs[detail::runs_up_to<&SlotRun::slot>(runs, slot) - 1];
    return run.position + (slot - run.slot);
  }
  static Status too_many(std::size_t groups) noexcept {
    return fail(Errc::not_supported, "the layers would form {} groups of different tokens but at most {} are supported",
                groups, max_groups);
  }
  static Status make_room(Group& group, std::size_t more) noexcept {
    return group.runs.grow(used(group).size() + more);
  }
  static void copy(Span<const SlotRun> from, detail::Buffer<SlotRun>& to) noexcept {
    if (!from.empty()) std::memcpy(to.first(from.size()).data(), from.data(), from.size() * sizeof(SlotRun));
    to.use(from.size());
  }
  // Whether the token at `position` lengthens the last run.
  static bool continues(const detail::Buffer<SlotRun>& runs, std::size_t position) noexcept {
    const std::size_t size = runs.used().size();
    return size > 0 && std::size_t{runs[size - 1].position} + runs[size - 1].count == position;
  }
  // There is room.
  static void push(detail::Buffer<SlotRun>& runs, std::size_t position, std::size_t count) noexcept {
    const std::size_t size = runs.used().size();
    if (continues(runs, position)) {
      runs[size - 1].count += static_cast<Index>(count);
      return;
    }
    const std::size_t slot = size == 0 ? 0 : std::size_t{runs[size - 1].slot} + runs[size - 1].count;
    runs[size] = {static_cast<Index>(position), static_cast<Index>(slot), static_cast<Index>(count)};
    runs.use(size + 1);
  }
  // Drops the tokens from `position` on.
  static void truncate(detail::Buffer<SlotRun>& runs, std::size_t position) noexcept {
    const Span<const SlotRun> held{runs.used().data(), runs.used().size()};
    std::size_t r = detail::runs_up_to<&SlotRun::position>(held, position);
    if (r > 0 && held[r - 1].position == position) --r;
    runs.use(r);
    if (r == 0) return;
    const std::size_t into = position - runs[r - 1].position;
    if (into < runs[r - 1].count) runs[r - 1].count = static_cast<Index>(into);
  }
  void swap(Slots& other) noexcept {
    std::swap(groups_, other.groups_);
    std::swap(tokens_, other.tokens_);
    std::swap(prompt_, other.prompt_);
    for (std::size_t g = 0; g < max_groups; ++g) std::swap(group_[g], other.group_[g]);
  }

  std::size_t groups_ = 1;
  std::size_t tokens_ = 0;
  std::size_t prompt_ = 0;   // where the last append() began
  Group group_[max_groups];  // by first layer
};

}  // namespace FASTV_KIND

}  // namespace fastv

#include "detail/end.hpp"

// fastv: what a scheduler needs of a batch before it runs: cumulative lengths, longest lengths and cache blocks, for
// each group of layers.
//
// Requests that prune at different layers have layer groups of their own. The batch begins a group wherever one of them
// does: within a group no request changes its lengths, so that one set of cumulative lengths serves all its layers.
#pragma once

#include "slots.hpp"

#include "detail/begin.hpp"

namespace fastv {

// Layers of a batch that share all lengths. The spans are parts of the memory that was handed to plan_batch(), int32 as
// attention kernels take it.
struct BatchGroup {
  std::size_t first_layer = 0;            // its first layer
  std::size_t layers = 0;                 // how many layers it has
  Span<std::int32_t> cumulative_queries;  // [sequences + 1]: the packed rows of sequence i are [i] .. [i + 1] - 1
  Span<std::int32_t> cumulative_keys;     // [sequences + 1]: the same for keys, those of earlier steps included
  Span<std::int32_t> blocks;              // [sequences]: cache blocks that hold all its keys, in each of the layers
  std::size_t longest_query = 0;          // most rows of any sequence
  std::size_t longest_key = 0;            // most keys of any sequence
  std::size_t total_blocks = 0;           // of all sequences, in each of the layers
  std::size_t added_blocks = 0;           // how many of them this step adds
};

// The batch as a whole.
struct BatchPlan {
  Span<const BatchGroup> groups;  // by layer; together they cover every layer once
  std::size_t total_blocks = 0;   // summed over all layers
  std::size_t added_blocks = 0;   // how many of them this step adds

  // The group of `layer`, of a plan that was made. O(groups).
  FASTV_INLINE const BatchGroup& group_of(std::size_t layer) const noexcept {
    std::size_t group = 0;
    while (group + 1 < groups.size() && groups[group + 1].first_layer <= layer) ++group;
    return groups[group];
  }
};

inline namespace FASTV_KIND {

// Entries of `lengths` that plan_batch() needs.
inline constexpr std::size_t batch_plan_entries(std::size_t sequences, std::size_t groups) noexcept {
  return groups * (3 * sequences + 2);
}

// What one sequence does in a step. Prefills and decoding may share one.
//
//   {&plan, &slots}        the prompt that was planned, behind what the slots hold
//   {nullptr, &slots, n}   n tokens that pass every layer: 1 when decoding, more for drafts or a prompt of text
struct SequenceStep {
  const Plan* plan = nullptr;    // of the prompt; null: `tokens` pass every layer
  const Slots* slots = nullptr;  // of the sequence before append(); null: its caches hold Plan::past, or nothing
  std::size_t tokens = 1;        // fed in this step, where there is no plan
};

}  // namespace FASTV_KIND

namespace detail {
inline namespace FASTV_KIND {

inline Status check_step(const SequenceStep& step, std::size_t i, std::size_t layers) noexcept {
  if (step.slots != nullptr && step.slots->first_layer(step.slots->groups() - 1) >= layers)
    return fail(Errc::bad_shape, "the slots of sequence {} have a group from layer {} on but the model has {} layers",
                i, step.slots->first_layer(step.slots->groups() - 1), layers);
  if (step.plan == nullptr) return {};
  const Plan& plan = *step.plan;
  if (plan.layers != layers)
    return fail(Errc::bad_shape, "the plan of sequence {} is of {} layers but the model has {}: make it with these", i,
                plan.layers, layers);
  if (plan.stages > max_stages)
    return fail(Errc::bad_setting, "the plan of sequence {} has {} stages but at most {} are supported", i, plan.stages,
                max_stages);
  std::size_t left = plan.visual;
  bool sound = plan.visual <= plan.tokens && plan.pasts > 0 && plan.pasts <= max_stages + 1;
  for (std::size_t p = 0; sound && p < plan.pasts; ++p)
    sound = p == 0 ? plan.past[p].first_layer == 0
                   : plan.past[p].first_layer > plan.past[p - 1].first_layer && plan.past[p].first_layer < layers;
  for (std::size_t s = 0; s < plan.stages; ++s) {
    const Plan::Stage& stage = plan.stage[s];
    sound = sound && stage.filtering_layer < layers && stage.kept_visual <= left &&
            (s == 0 || stage.filtering_layer > plan.stage[s - 1].filtering_layer);
    left = stage.kept_visual;
  }
  return sound
             ? Status{}
             : fail(Errc::bad_setting,
                    "the plan of sequence {} is not one that make_plan() makes: its lengths do not fit each other", i);
}

// Makes a group begin at `layer`, among the first `count`, which are sorted. Returns how many there are then; more than
// there is room for where it does not fit.
inline std::size_t begin_group(Span<BatchGroup> groups, std::size_t count, std::size_t layer) noexcept {
  std::size_t at = count;
  while (at > 0 && groups[at - 1].first_layer > layer) --at;
  if (at > 0 && groups[at - 1].first_layer == layer) return count;
  if (count == groups.size()) return count + 1;
  for (std::size_t g = count; g > at; --g) groups[g].first_layer = groups[g - 1].first_layer;
  groups[at].first_layer = layer;
  return count + 1;
}

// The lengths of one group, whose first layer is known, into memory for all of them. O(sequences).
inline Status fill_group(Span<const SequenceStep> steps, std::size_t block_tokens, std::int32_t* memory,
                         BatchGroup& group) noexcept {
  const std::size_t n = steps.size(), layer = group.first_layer;
  group = {layer, group.layers, {memory, n + 1}, {memory + n + 1, n + 1}, {memory + 2 * n + 2, n}};
  std::size_t queries = 0, keys = 0;
  group.cumulative_queries[0] = group.cumulative_keys[0] = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const SequenceStep& step = steps[i];
    const std::size_t query = step.plan != nullptr ? step.plan->tokens_in_layer(layer) : step.tokens;
    const std::size_t past = step.slots != nullptr  ? step.slots->length(layer)
                             : step.plan != nullptr ? step.plan->past_in_layer(layer)
                                                    : 0;
    if (query > max_tokens || past > max_tokens - query || past + query > max_tokens - keys)
      return fail(
          Errc::bad_shape,
          "sequence {} has {} keys and {} more tokens in layer {}, with which the batch has more than int32 counts", i,
          past, query, layer);
    const std::size_t key = past + query;
    queries += query;
    keys += key;
    group.cumulative_queries[i + 1] = static_cast<std::int32_t>(queries);
    group.cumulative_keys[i + 1] = static_cast<std::int32_t>(keys);
    const std::size_t blocks = block_tokens == 0 ? 0 : blocks_for(key, block_tokens);
    group.blocks[i] = static_cast<std::int32_t>(blocks);
    group.total_blocks += blocks;
    group.added_blocks += block_tokens == 0 ? 0 : blocks - blocks_for(past, block_tokens);
    group.longest_query = query > group.longest_query ? query : group.longest_query;
    group.longest_key = key > group.longest_key ? key : group.longest_key;
  }
  return {};
}

}  // namespace FASTV_KIND
}  // namespace detail

inline namespace FASTV_KIND {

// The lengths of one step of a batch, from plans and slots alone.
//
//   steps         one for each sequence, in the order of the packed rows
//   layers        of the model
//   block_tokens  tokens of a cache block; 0: the caches are not paged
//   groups        room for the layer groups; as many as there are layers always suffice
//   lengths       room for batch_plan_entries(sequences, groups) numbers; filled from the front, group by group, so
//                 that one copy hands all of them to a device
//
// Nothing is allocated, and nothing is to be read where an error is returned. O(sequences * groups).
//
//   fastv::BatchGroup groups[4];
//   std::vector<std::int32_t> lengths(fastv::batch_plan_entries(steps.size(), 4));
//   const auto batch = fastv::plan_batch(steps, layers, 16, groups, lengths);
inline Result<BatchPlan> plan_batch(Span<const SequenceStep> steps, std::size_t layers, std::size_t block_tokens,
                                    Span<BatchGroup> groups, Span<std::int32_t> lengths) noexcept {
  if (layers == 0 || layers > max_tokens)
    return {{},
            layers == 0 ? fail(Errc::bad_setting, "the model has 0 layers: state at least 1")
                        : fail(Errc::bad_setting, "the model has {} layers, more than any: state its number", layers)};
  if (steps.size() > max_tokens)
    return {{},
            fail(Errc::bad_shape, "the batch has {} sequences but at most {} are supported", steps.size(), max_tokens)};
  if (Status status = detail::expect_room(steps, steps.size(), "the steps"); !status) return {{}, status};
  if (Status status = detail::expect_room(groups, groups.empty() ? 1 : groups.size(), "the list of layer groups");
      !status)
    return {{}, status};
  std::size_t count = detail::begin_group(groups, 0, 0);
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const SequenceStep& step = steps[i];
    if (Status status = detail::check_step(step, i, layers); !status) return {{}, status};
    const std::size_t stages = step.plan == nullptr ? 0 : step.plan->stages;
    const std::size_t held = step.slots == nullptr ? 0 : step.slots->groups();
    const std::size_t pasts = step.plan == nullptr || held > 0 ? 0 : step.plan->pasts;
    for (std::size_t s = 0; s < stages && count <= groups.size(); ++s)
      count = detail::begin_group(groups, count, step.plan->stage[s].filtering_layer);
    for (std::size_t g = 0; g < held && count <= groups.size(); ++g)
      count = detail::begin_group(groups, count, step.slots->first_layer(g));
    for (std::size_t p = 0; p < pasts && count <= groups.size(); ++p)
      count = detail::begin_group(groups, count, step.plan->past[p].first_layer);
    if (count > groups.size())
      return {{},
              fail(Errc::too_small,
                   "the batch has more layer groups than the {} that there is room for: one a layer always suffices",
                   groups.size())};
  }
  const std::size_t each = batch_plan_entries(steps.size(), 1);
  if (Status status = detail::expect_room(lengths, each * count, "lengths"); !status) return {{}, status};
  BatchPlan plan;
  for (std::size_t g = 0; g < count; ++g) {
    groups[g].layers = (g + 1 < count ? groups[g + 1].first_layer : layers) - groups[g].first_layer;
    if (Status status = detail::fill_group(steps, block_tokens, lengths.data() + g * each, groups[g]); !status)
      return {{}, status};
    plan.total_blocks += groups[g].total_blocks * groups[g].layers;
    plan.added_blocks += groups[g].added_blocks * groups[g].layers;
  }
  plan.groups = {groups.data(), count};
  return {plan, {}};
}

}  // namespace FASTV_KIND

}  // namespace fastv

#include "detail/end.hpp"

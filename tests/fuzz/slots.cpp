// Slots and plan_batch() against a list of positions for every layer, over any sequence of calls, right and wrong.
#include "rows.hpp"

namespace {

using namespace fuzz;

constexpr std::size_t layers = 7;

struct Model {
  std::size_t tokens = 0, prompt = 0;  // prompt: where the last append() began
  std::vector<std::vector<Index>> held = std::vector<std::vector<Index>>(layers);  // positions, by slot
};

void expect_same(Input& in, const fastv::Slots& slots, const Model& model) {
  FUZZ_CHECK(slots.tokens() == model.tokens);
  for (std::size_t l = 0; l < layers; ++l) {
    const std::vector<Index>& held = model.held[l];
    FUZZ_CHECK(slots.length(l) == held.size());
    FUZZ_CHECK(slots.first_layer(slots.group_of(l)) <= l);
    const std::size_t first = in.below(held.size() + 1);
    const Block<std::int32_t> positions(held.size() - first);
    FUZZ_CHECK(slots.write_positions(l, first, positions.span()));
    for (std::size_t i = 0; i < positions.size(); ++i)
      FUZZ_CHECK(positions[i] == static_cast<std::int32_t>(held[first + i]));
    const std::size_t asked = in.below(model.tokens + 2), window = in.below(12);
    const auto at = std::lower_bound(held.begin(), held.end(), static_cast<Index>(asked));
    const auto before = static_cast<std::size_t>(at - held.begin());
    FUZZ_CHECK(slots.slots_before(l, asked) == before);
    FUZZ_CHECK(slots.slot_of(l, asked) ==
               (at != held.end() && *at == asked ? static_cast<Index>(before) : fastv::Slots::none));
    const std::size_t slot = in.below(held.size() + 2);
    FUZZ_CHECK(slots.position_of(l, slot) == (slot < held.size() ? held[slot] : fastv::Slots::none));
    std::size_t start = 0;
    while (window > 0 && start < held.size() && held[start] + window <= asked) ++start;
    FUZZ_CHECK(slots.first_in_window(l, asked, window) == start);
    const Block<std::int32_t> more(held.size() + 1);
    FUZZ_CHECK(!slots.write_positions(l, 0, more.span()) &&
               !slots.write_positions(l, held.size() + 1, positions.span()));
  }
}

std::vector<Index> below_layer(const Model& model, std::size_t layer) {
  std::vector<Index> below(model.tokens);
  std::iota(below.begin(), below.end(), Index{0});
  return layer > 0 ? model.held[layer - 1] : below;
}
std::size_t of_prompt(const Model& model, const std::vector<Index>& held) {
  std::size_t count = 0;
  for (const Index token : held) count += token >= model.prompt ? 1u : 0u;
  return count;
}

// What the layers from K on hold of the n tokens of the prompt that the layer below them holds.
bool keep(Model& model, std::size_t layer, const std::vector<Index>& kept, std::size_t n) {
  const std::vector<Index> below = below_layer(model, layer);
  if (n != of_prompt(model, below)) return false;
  for (std::size_t l = layer; l < layers; ++l)
    if (of_prompt(model, model.held[l]) != n) return false;
  const std::size_t first = below.size() - n;
  for (std::size_t l = layer; l < layers; ++l) {
    std::vector<Index>& held = model.held[l];
    held.erase(std::lower_bound(held.begin(), held.end(), static_cast<Index>(model.prompt)), held.end());
    for (const Index i : kept) held.push_back(below[first + i]);
  }
  return true;
}

void expect_batch(Input& in, const std::vector<fastv::Slots>& all, const std::vector<Model>& models) {
  const std::size_t n = all.size(), block = in.below(6);
  std::vector<fastv::SequenceStep> steps(n);
  std::vector<fastv::Plan> plans(n);
  for (std::size_t i = 0; i < n; ++i) {
    steps[i] = {nullptr, &all[i], in.below(5)};
    if (in.one_in(3)) continue;
    fastv::Plan& plan = plans[i];
    plan.layers = layers;
    plan.visual = in.below(9);
    plan.tokens = plan.visual + in.below(4);
    std::size_t layer = 0, left = plan.visual;
    for (std::size_t s = in.below(3); s > 0 && layer + 1 < layers; --s)
      plan.stage[plan.stages++] = {layer += in.between(1, layers - 1 - layer), left = in.below(left + 1)};
    steps[i].plan = &plan;
  }
  const std::size_t room = in.between(1, layers);
  const Block<fastv::BatchGroup> groups(room);
  const Block<std::int32_t> lengths(fastv::batch_plan_entries(n, room), -1);
  const Block<fastv::SequenceStep> handed(steps);
  const auto batch = fastv::plan_batch(handed.view(), layers, block, groups.span(), lengths.span());
  check_message(batch.status);
  FUZZ_CHECK(batch || (room < layers && batch.code() == Errc::too_small));
  if (!batch) return;
  std::size_t total = 0, added = 0, covered = 0;
  for (const fastv::BatchGroup& group : batch->groups) {
    FUZZ_CHECK(group.first_layer == covered && group.layers > 0);
    covered += group.layers;
  }
  FUZZ_CHECK(covered == layers);
  for (std::size_t l = 0; l < layers; ++l) {
    const fastv::BatchGroup& group = batch->group_of(l);
    std::size_t queries = 0, keys = 0, blocks = 0, new_blocks = 0, longest = 0, longest_key = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const std::size_t query = steps[i].plan == nullptr ? steps[i].tokens : steps[i].plan->tokens_in_layer(l);
      const std::size_t past = models[i].held[l].size(), key = past + query;
      const std::size_t needed = block == 0 ? 0 : (key + block - 1) / block;
      queries += query;
      keys += key;
      FUZZ_CHECK(group.cumulative_queries[i + 1] == static_cast<std::int32_t>(queries));
      FUZZ_CHECK(group.cumulative_keys[i + 1] == static_cast<std::int32_t>(keys));
      FUZZ_CHECK(group.blocks[i] == static_cast<std::int32_t>(needed));
      blocks += needed;
      new_blocks += block == 0 ? 0 : needed - (past + block - 1) / block;
      longest = (std::max)(longest, query);
      longest_key = (std::max)(longest_key, key);
    }
    FUZZ_CHECK(group.cumulative_queries[0] == 0 && group.cumulative_keys[0] == 0);
    FUZZ_CHECK(group.longest_query == longest && group.longest_key == longest_key);
    FUZZ_CHECK(group.total_blocks == blocks && group.added_blocks == new_blocks);
    total += blocks;
    added += new_blocks;
  }
  FUZZ_CHECK(batch->total_blocks == total && batch->added_blocks == added);
}

}  // namespace

FASTV_FUZZ_TARGET(slots) {
  std::vector<fastv::Slots> all(in.between(1, 3));
  std::vector<Model> models(all.size());
  for (std::size_t calls = in.between(1, 25); calls > 0; --calls) {
    const std::size_t which = in.below(all.size());
    fastv::Slots& slots = all[which];
    Model& model = models[which];
    Status status;
    bool right = true;
    const std::size_t call = in.below(9);
    switch (call) {
      case 0:
      case 1: {
        const std::size_t count = in.one_in(9) ? in.hostile() : in.below(30);
        right = count < 300;  // more is beyond what a list can follow: told, or left out
        if (!right && count <= fastv::max_tokens - model.tokens) continue;
        status = call == 0 ? slots.append(count) : slots.append_chunk(count);
        if (right && call == 0) model.prompt = model.tokens;
        for (std::size_t l = 0; l < layers && right; ++l)
          for (std::size_t i = 0; i < count; ++i) model.held[l].push_back(static_cast<Index>(model.tokens + i));
        if (right) model.tokens += count;
        break;
      }
      case 2: {
        const std::size_t back = in.one_in(6) ? in.hostile() : in.below(model.tokens + 2);
        right = back <= model.tokens;
        status = slots.rollback(back);
        for (std::size_t l = 0; l < layers && right; ++l) {
          std::vector<Index>& held = model.held[l];
          held.erase(std::lower_bound(held.begin(), held.end(), static_cast<Index>(back)), held.end());
        }
        if (right) model.tokens = back;
        model.prompt = (std::min)(model.prompt, model.tokens);
        break;
      }
      case 3: {
        const std::size_t from = in.below(all.size());
        status = slots.copy_from(all[from]);
        model = models[from];
        break;
      }
      case 4:
        slots.clear();
        model = Model();
        break;
      case 5: status = slots.reserve(in.below(fastv::Slots::max_groups + 1), in.below(40)); break;
      default: {
        const std::size_t layer = in.below(layers);
        const std::vector<Index> below = below_layer(model, layer);
        const std::size_t n = in.one_in(9)   ? in.hostile()
                              : in.one_in(4) ? in.below(below.size() + 2)
                                             : of_prompt(model, below);
        std::vector<Index> kept = n < 400 ? draw_kept(in, n) : std::vector<Index>();
        const bool ascending = !spoil(in, kept, n);
        const Block<Index> indices(kept);
        status = slots.keep(layer, {indices.view(), n});
        right = ascending && n != fastv::KeptRows::unknown && keep(model, layer, kept, n);
        break;
      }
    }
    check_message(status);
    FUZZ_CHECK(static_cast<bool>(status) == right);
    expect_same(in, slots, model);
  }
  expect_batch(in, all, models);
}

// fastv: what cuda::Limits make room for: words of a plan, and where everything lies in device memory.
#pragma once

#include "cuda_combine.hpp"
#include "cuda_greedy.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
namespace gpu {
inline namespace FASTV_KIND {

inline constexpr std::uint32_t sequence_words = sizeof(Sequence) / 4, group_words = sizeof(Group) / 4;
inline constexpr std::uint32_t contest_words = sizeof(Contest) / 4, take_words = sizeof(Take) / 4;

// Limits with their zeros replaced.
inline cuda::Limits settled(cuda::Limits limits) noexcept {
  const auto or_else = [](std::size_t& value, std::size_t otherwise) {
    if (value == 0) value = otherwise;
  };
  or_else(limits.visual, limits.tokens);
  if (limits.competing == 0 || limits.competing > limits.visual) limits.competing = limits.visual;
  or_else(limits.keys, limits.tokens);
  or_else(limits.rows, limits.sequences);
  or_else(limits.spans, 8 * limits.sequences);
  or_else(limits.groups, 16 * limits.sequences);
  or_else(limits.listed, 32 * limits.sequences);
  return limits;
}
inline Status check_limits(const cuda::Limits& limits) noexcept {
  if (limits.sequences == 0) return fail(Errc::bad_setting, "Limits::sequences is 0: state at least 1");
  if (limits.tokens == 0) return fail(Errc::bad_setting, "Limits::tokens is 0: state the rows of the largest batch");
  if (limits.stages == 0 || limits.stages > max_stages)
    return fail(Errc::bad_setting, "Limits::stages is {}: use 1 to {}", limits.stages, max_stages);
  constexpr std::size_t largest = std::size_t{1} << 24;  // so that no product below wraps around
  if (limits.sequences > 65535 || limits.rows > 65535)
    return fail(Errc::bad_setting,
                "Limits has {} sequences and {} rows but a launch has at most 65535 of either: use fewer",
                limits.sequences, limits.rows);
  if (limits.tokens > largest || limits.visual > largest || limits.keys > largest || limits.heads > 65535 ||
      limits.spans > largest || limits.groups > largest || limits.listed > largest)
    return fail(Errc::bad_setting, "Limits asks for room beyond {} tokens, keys, spans, groups or rows", largest);
  if (limits.features > widest_features)
    return fail(Errc::bad_setting, "Limits::features is {} but at most {} elements are supported: project them",
                limits.features, widest_features);
  if (limits.features > 0 && limits.visual * (limits.competing / 8 + 1) >= none)
    return fail(Errc::bad_setting,
                "Limits has {} visual tokens of which {} compete, whose products take more than 128 GB: set "
                "Limits::competing to the most of one image, or of a pool",
                limits.visual, limits.competing);
  return {};
}
// Words of a plan, all stages together.
inline std::size_t plan_words(const cuda::Limits& l) noexcept {
  const std::size_t each =
      l.sequences * (sequence_words + 2 * group_words + 3) + 2 + l.groups * 2 * group_words + l.visual / 32 + l.listed;
  const std::size_t contests = l.features > 0 ? (l.sequences + l.groups) * (contest_words + take_words) : 0;
  return l.stages * (each + contests) + 3 * l.spans;
}

// Floats of one token's features: whole slabs.
inline std::size_t feature_room(std::size_t width) noexcept {
  return (width + FeatureProducts::slab - 1) / FeatureProducts::slab * FeatureProducts::slab;
}

// Where everything lies in one piece of device memory: bytes from its beginning.
struct Places {
  struct Stage {
    std::size_t rows, positions, slots, visual_numbers, codes, candidates, counters;
  };
  std::size_t words, codes, candidates, origins, counts, scores, sums, spill, logits, parts, bytes = 0;
  std::size_t features, kinds, products, marks, covered, strengths;  // of Selection::diverse
  Stage stage[max_stages];

  explicit Places(const cuda::Limits& l) noexcept {
    const std::size_t n = l.sequences, cells = l.rows * l.heads;
    words = take(4 * plan_words(l));
    codes = take(4 * l.tokens);
    candidates = take(4 * l.visual);
    origins = take(4 * l.tokens);
    counts = take(4 * count_words(l));
    scores = take(4 * row_sets * l.visual);
    sums = take(8 * row_sets * l.visual);
    spill = take(4 * 2 * l.visual);
    logits = take(4 * product(cells, l.keys));
    parts = take(sizeof(ChunkPart) * product(cells, blocks_for(l.keys, chunk_keys)));
    const std::size_t compared = l.features > 0 ? l.visual : 0;
    features = take(4 * product(compared, feature_room(l.features)));
    products = take(32 * product(compared, l.competing / 8 + 1));
    kinds = take(4 * compared);
    marks = take(4 * compared);
    covered = take(4 * compared);
    strengths = take(4 * compared);
    for (std::size_t s = 0; s < max_stages; ++s) {
      stage[s] = {};
      if (s >= l.stages) continue;
      stage[s].rows = take(4 * l.tokens);
      stage[s].positions = take(4 * l.tokens);
      stage[s].slots = take(4 * l.tokens);
      stage[s].codes = take(4 * l.tokens);
      stage[s].visual_numbers = take(4 * l.visual);
      stage[s].candidates = take(4 * l.visual);
      stage[s].counters = take(sizeof(cuda::Counters) * n);
    }
  }
  // Words that are zero between stages.
  static std::size_t count_words(const cuda::Limits& l) noexcept { return l.sequences * (2 * row_sets + 2); }

 private:
  std::size_t take(std::size_t size) noexcept {
    const std::size_t at = bytes;
    bytes = size < greatest_size - bytes - 256 ? bytes + (size + 255) / 256 * 256 : greatest_size;
    return at;
  }
};

}  // namespace FASTV_KIND
}  // namespace gpu
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

// fastv: exact ranks and exact shares, in linear time and without floating point.
#pragma once

#include "../view.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
inline namespace FASTV_KIND {

// The mark of a token that stays: above the order key of every float.
template <class Mark>
inline constexpr Mark chosen = static_cast<Mark>(~Mark{0});

// The count-th greatest of many unsigned keys, and how many of the count lie above it. visit(take) calls take(key)
// for each key. Radix select, one byte a pass from the top: linear, no copy, no bad case. count is at least 1.
template <class Key>
struct Cut {
  Key key;
  std::size_t above;
};
template <class Key, class Visit>
Cut<Key> find_cut(std::size_t count, Visit visit) noexcept {
  Key prefix = 0, mask = 0;
  std::size_t rank = count;  // of the cut among the keys that share the prefix
  for (int shift = 8 * static_cast<int>(sizeof(Key)) - 8; shift >= 0; shift -= 8) {
    std::uint32_t histogram[256] = {};
    visit([&](Key key) { histogram[(key >> shift) & 255u] += (key & mask) == prefix ? 1u : 0u; });
    Key byte = 255;
    while (histogram[byte] < rank) rank -= histogram[byte--];
    prefix |= byte << shift;
    mask |= Key{255} << shift;
  }
  return {prefix, count - rank};
}

// Shares `budget` out in proportion to weights, exactly (Hamilton's method): each gets its share rounded down, and
// what is left over goes one by one to the largest remainders, the earlier first. shares: weights in, shares out, at
// most their weights where the budget is at most their sum. remainders: scratch of the same size. O(entries).
template <class Word>
void apportion(std::size_t budget, Span<Word> shares, Span<Word> remainders) noexcept {
  std::uint64_t total = 0;
  Word differences = 0;
  for (const Word weight : shares) {
    total += weight;
    differences |= static_cast<Word>(weight ^ shares[0]);
  }
  if (total == 0) return;
  std::size_t left = budget;
  if (differences == 0) {  // equal weights, equal remainders
    const std::size_t share = budget / shares.size();
    left -= share * shares.size();
    for (std::size_t i = 0; i < shares.size(); ++i) shares[i] = static_cast<Word>(share + (i < left ? 1u : 0u));
    return;
  }
  for (std::size_t i = 0; i < shares.size(); ++i) {
    const std::uint64_t product = static_cast<std::uint64_t>(budget) * shares[i], share = product / total;
    shares[i] = static_cast<Word>(share);
    remainders[i] = static_cast<Word>(product - share * total);  // below total, which is at most max_tokens
    left -= static_cast<std::size_t>(share);
  }
  if (left == 0) return;
  const Cut<Word> cut = find_cut<Word>(left, [&](auto take) {
    for (const Word rest : remainders.first(shares.size())) take(rest);
  });
  std::size_t ties = left - cut.above;
  for (std::size_t i = 0; i < shares.size(); ++i) {
    const bool tie = remainders[i] == cut.key && ties > 0;
    ties -= tie ? 1u : 0u;
    shares[i] += remainders[i] > cut.key || tie ? 1u : 0u;
  }
}

}  // namespace FASTV_KIND
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

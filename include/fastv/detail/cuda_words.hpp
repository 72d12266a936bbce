// fastv: the words of a plan, as the host writes them and uploads them: groups of tokens that compete, and what
// Selection::diverse takes from them.
#pragma once

#include "cuda_limits.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
namespace gpu {
inline namespace FASTV_KIND {

// A growing list of words, of as many as the limits have room for.
class PlanWords {
 public:
  Status reserve(const cuda::Limits& limits) noexcept {
    limits_ = limits;
    return words_.reserve(plan_words(limits));
  }
  void clear() noexcept { used_ = 0; }
  Span<const std::uint32_t> all() const noexcept { return {words_.first(used_).data(), used_}; }
  std::uint32_t* at_word(std::size_t at) noexcept { return words_.first(used_).data() + at; }
  const std::uint32_t* at_word(std::size_t at) const noexcept { return words_.first(used_).data() + at; }

  // Room for `count` more, which begin at `at`.
  Status take(std::size_t count, std::size_t& at) noexcept {
    const std::size_t room = plan_words(limits_);
    if (count > room - used_)
      return fail(Errc::too_small,
                  "the plan needs more than the {} words that there is room for: raise Limits::groups (images and "
                  "windows, {} now) or Limits::listed (rows, {} now)",
                  room, limits_.groups, limits_.listed);
    at = used_;
    used_ += count;
    return {};
  }

  // A group from its tokens in order: rows of one width, at one distance.
  template <class Tokens>
  static Group group_of(std::size_t first, std::size_t quota, const Tokens& tokens) noexcept {
    std::size_t size = 0, begin = 0, previous = 0, width = 0, stride = 0;
    tokens([&](std::size_t t) {
      if (size == 0) begin = t;
      if (size > 0 && width == 0 && t != previous + 1) {
        width = size;
        stride = t - begin;
      }
      previous = t;
      ++size;
    });
    const auto word = [](std::size_t value) { return static_cast<std::uint32_t>(value); };
    return {word(first + begin), word(width == 0 ? size : width), word(stride), word(size), word(quota), 0};
  }

  Status open_round(Sequence& s, int round) noexcept {
    std::size_t at = 0;
    if (Status status = take(0, at); !status) return status;
    s.words_round[round] = static_cast<std::uint32_t>(at);
    s.groups[round] = 0;
    return {};
  }
  Status add_group(Sequence& s, int round, Group group) noexcept {
    if (group.size == 0) return {};
    std::size_t at = 0;
    if (Status status = take(group_words, at); !status) return status;
    std::uint32_t* words = at_word(at);
    if (s.groups[round] > 0) {
      Group before;
      std::memcpy(&before, words - group_words, sizeof(before));
      group.start = before.start + before.size;
    }
    std::memcpy(words, &group, sizeof(group));
    ++s.groups[round];
    return {};
  }

  // Of Selection::diverse: `count` tokens of a group's candidates first .. end - 1, of which `have` stay anyway.
  static Take take_of(const Config& config, std::size_t first, std::size_t end, std::size_t count,
                      std::size_t have) noexcept {
    const std::size_t left = count > have ? count - have : 0;
    const auto wanted = static_cast<std::size_t>(static_cast<double>(left) * config.diversity.protected_share + 0.5);
    const std::size_t by_score = wanted < left ? wanted : left;
    const auto word = [](std::size_t value) { return static_cast<std::uint32_t>(value); };
    return {word(first), word(end), word(by_score), word(left - by_score)};
  }
  // One more image that has its minimum first: all of them, then the contest.
  Status add_image(const Take& image, std::size_t& first_word) noexcept {
    std::size_t at = 0;
    if (Status status = take(take_words, at); !status) return status;
    if (first_word == none) first_word = at;
    std::memcpy(at_word(at), &image, sizeof(image));
    return {};
  }
  // products, tiles: of the stage so far, raised where there is anything to compare.
  Status add_contest(Sequence& s, Contest contest, std::size_t& products, std::size_t& tiles) noexcept {
    const std::size_t size = contest.group.size;
    if (size == 0) return {};
    if (size > limits_.competing)
      return fail(Errc::too_small,
                  "{} visual tokens compete with each other under Selection::diverse but there is room for {}: raise "
                  "Limits::competing and reserve() again",
                  size, limits_.competing);
    std::size_t at = 0;
    if (Status status = take(contest_words, at); !status) return status;
    if (s.contests > 0) {
      Contest before;
      std::memcpy(&before, at_word(at) - contest_words, sizeof(before));
      contest.group.start = before.group.start + before.group.size;
    } else {
      s.words_contests = static_cast<std::uint32_t>(at);
    }
    contest.products = none;
    contest.first_tile = static_cast<std::uint32_t>(tiles);
    if (contest.all.by_score + contest.all.by_value + contest.images > 0) {
      const std::size_t side = blocks_for(size, product_tile);
      contest.products = static_cast<std::uint32_t>(products);
      products += size * product_room(contest.group.size) / 8;
      tiles += side * (side + 1) / 2;
    }
    std::memcpy(at_word(at), &contest, sizeof(contest));
    ++s.contests;
    return {};
  }

 private:
  cuda::Limits limits_;
  Buffer<std::uint32_t> words_;
  std::size_t used_ = 0;
};

}  // namespace FASTV_KIND
}  // namespace gpu
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

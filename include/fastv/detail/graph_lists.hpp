// fastv: selection as lists, for graphs that are built before any value exists.
//
// Every rule becomes, for each stage: tokens that stay in any case, and groups of tokens of which a known number stays
// each. Random and uniform selection are lists alone.
#pragma once

#include "../evidence.hpp"
#include "../select.hpp"
#include "buffer.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
inline namespace FASTV_KIND {

// Positions are sorted as floats: they, and twice their number, must be exact.
inline constexpr std::size_t most_in_graph = std::size_t{1} << 23;

// The lists of one stage. Its tokens are named by their place in the list of all text tokens, then all visual ones.
// Behind the first stage the graph turns places into positions; in the first they are positions from the start.
struct StageLists {
  Images images;
  std::size_t fixed = 0, competing = 0;       // tokens that stay in any case; that compete
  std::size_t rows = 0, groups = 0;           // entries of the groups' rows, padding included; groups
  std::size_t classes = 0;                    // sizes of groups
  std::size_t size[32] = {}, count[32] = {};  // of each class: entries of a row, groups
  bool in_order = true;  // rows are the competing tokens in their order: nothing needs to be sorted into them
  bool padded = false;   // some rows are longer than their group
  bool pool = false;     // a second round over all competing tokens, in which those that stay in the first come first
  std::size_t counted = 0, masked = 0;  // entries of the lists of all visual tokens, and of the mask of them
  // [fixed + competing] tokens, [rows] which of those that compete, [competing] where they are in the rows, [groups + pool]
  // the entry of all rows in descending order that is the lowest to stay, [counted] visual tokens
  Buffer<std::int32_t> places;
  // [rows] -infinity where padded, [groups + pool] quota and a half, [groups + pool] 1 where some stay and some go, else 0,
  // [masked] 1 for visual tokens
  Buffer<float> floats;

  std::size_t rows_at() const noexcept { return fixed + competing; }
  std::size_t inverse_at() const noexcept { return rows_at() + (in_order ? 0 : rows); }
  std::size_t lowest_at() const noexcept { return inverse_at() + (in_order ? 0 : competing); }
  std::size_t counted_at() const noexcept { return lowest_at() + groups + (pool ? 1 : 0); }
  std::size_t lists_size() const noexcept { return counted_at() + counted; }
  std::size_t quota_at() const noexcept { return padded ? rows : 0; }
  std::size_t ranks_at() const noexcept { return quota_at() + groups + (pool ? 1 : 0); }
  std::size_t mask_at() const noexcept { return ranks_at() + groups + (pool ? 1 : 0); }
  std::size_t values_size() const noexcept { return mask_at() + masked; }
};

// The lists of every stage of a schedule, for one prompt at a time. graph::Pruner makes nodes of them.
class ScheduleLists {
 public:
  explicit ScheduleLists(Span<const Config> schedule) noexcept
      : given_(schedule.size()), null_(schedule.data() == nullptr) {
    const std::size_t stages = null_ ? 0 : given_ < max_stages ? given_ : max_stages;
    for (std::size_t s = 0; s < stages; ++s) configs_[s] = schedule[s];
  }

  // Settings of a stage, below max_stages.
  const Config& config(std::size_t stage) const noexcept {
    return configs_[stage < max_stages ? stage : max_stages - 1];
  }
  // Stages of the schedule, valid or not.
  std::size_t given() const noexcept { return given_; }
  // Of the prompt at hand.
  const Plan& plan() const noexcept { return plan_; }
  const StageLists& stage(std::size_t s) const noexcept { return stages_[s]; }

  // Errors: those of make_plan(), and what has no form in a graph. O(stages * tokens).
  Status begin(const Prompt& prompt) noexcept {
    const Result<Plan> plan = make_plan(Span<const Config>(null_ ? nullptr : configs_, given_), prompt);
    if (!plan) return plan.status;
    plan_ = *plan;
    return prepare(prompt);
  }

 private:
  // Tokens that compete, and how many of them stay.
  struct Group {
    std::size_t first, size, quota;  // first: of members_
  };
  using Mark = Word<float>;

  Status prepare(const Prompt& prompt) noexcept {
    const std::size_t n = plan_.tokens, visual = plan_.visual, spans = prompt.visual.size();
    if (n > most_in_graph)
      return fail(Errc::not_supported,
                  "the prompt has {} tokens but a graph sorts at most {}: prune between two graphs", n, most_in_graph);
    if (Status status = spans_.reserve(spans); !status) return status;
    if (Status status = quotas_.reserve(2 * spans); !status) return status;
    if (Status status = marks_.reserve(3 * visual + 2 * spans); !status) return status;
    if (Status status = members_.reserve(2 * visual); !status) return status;
    if (Status status = groups_.reserve(visual); !status) return status;
    if (Status status = table_.reserve(n); !status) return status;

    std::size_t text = 0, numbered = 0, position = 0;
    for (std::size_t s = 0; s < spans; ++s) {
      const TokenSpan& span = prompt.visual[s];
      spans_[s] = span;
      spans_[s].first = numbered;  // counted among the visual tokens alone
      while (position < span.first) table_[text++] = static_cast<Index>(position++);
      for (std::size_t i = 0; i < span.count; ++i) table_[n - visual + numbered++] = static_cast<Index>(position++);
    }
    while (position < n) table_[text++] = static_cast<Index>(position++);

    Span<const TokenSpan> now(spans_.first(spans).data(), spans);
    bool pooled = false;
    for (std::size_t s = 0; s < plan_.stages; ++s) {
      const Config& config = configs_[s];
      stages_[s].images = *count_images(config, now);
      if (plan_.tokens_in_group(s + 1) == 0)
        return fail(Errc::bad_setting, "stage {} keeps none of {} tokens, and no graph runs on none", s,
                    plan_.tokens_in_group(s));
      if (pooled && config.min_per_image > 0)
        return fail(
            Errc::not_supported,
            "stage {} has min_per_image {} behind a stage that pools the images, so that it depends on scores which "
            "tokens are an image's: use no minimum, or prune between two graphs",
            s, config.min_per_image);
      if (ranks(config, stages_[s].images)) {
        if (config.score_rows != ScoreRows::last || !config.prior_rows.empty())
          return fail(
              Errc::not_supported,
              "stage {} ranks by other rows than the last, which has no form in a graph: use ScoreRows::last without "
              "prior_rows, or prune between two graphs",
              s);
        if (Status status = QueryRows{ScoreRows::last, {}, n}.expect_covered(1, prompt.visual); !status) return status;
      }
      if (Status status = prepare_stage(s, now); !status) return status;
      if (s + 1 < plan_.stages) now = left_behind(config, now, pooled);
    }
    return {};
  }

  // What the next stage finds: each image as one span of its quota or, pooled, one span of them all.
  Span<const TokenSpan> left_behind(const Config& config, Span<const TokenSpan> visual, bool& pooled) noexcept {
    const Images images = *count_images(config, visual);
    const bool per_image = config.quota == Quota::per_image;
    if (per_image)
      quotas_of(config, visual, images, quotas_.first(images.count), quotas_.part(images.count, images.count));
    std::size_t spans = 0, first = 0, original = 0;
    for_each_image(visual, [&](const Image& image) {  // overwrites no span that is still to be read
      original += image.original;
      if (per_image) {
        const std::size_t count = quotas_[spans];
        spans_[spans++] = {first, count, 0, false, image.original, image.filtering_ratio};
        first += count;
      } else {
        pooled = pooled || image.first_span > 0;
      }
    });
    if (!per_image && images.count > 0) spans_[spans++] = {0, images.keep, 0, false, original};
    return {spans_.first(spans).data(), spans};
  }

  // The groups of a stage, and the lists that its nodes read. visual: spans among the visual tokens alone.
  Status prepare_stage(std::size_t s, Span<const TokenSpan> visual) noexcept {
    StageLists& stage = stages_[s];
    const Config& config = configs_[s];
    const Images& images = stage.images;
    const std::size_t n = plan_.tokens_in_group(s), total = images.tokens, text = n - total;
    Mark* marks = marks_.first(0).data();
    for (std::size_t i = 0; i < total; ++i) marks[i] = 0;
    members_count_ = groups_count_ = 0;
    std::size_t pool_quota = 0;
    stage.pool = false;
    if (!ranks(config, images)) {
      Index* numbers = members_.first(0).data();
      if (total > 0) {
        const Result<Selected> selected = select_validated<float>(config, {}, visual, total, images, numbers, marks);
        if (!selected) return selected.status;
        for (std::size_t i = 0; i < total; ++i) marks[i] = 0;
        for (std::size_t i = 0; i < selected->count; ++i) marks[numbers[i]] = chosen<Mark>;
      }
    } else if (config.quota == Quota::pooled) {
      if (minima_hold(config, images)) {
        stage.pool = true;
        pool_quota = images.keep - spread(config, images, marks);
        add_minima(config, visual, marks);
      } else {
        add_groups(config, marks, 0, total, 0, images.keep);
      }
    } else {
      quotas_of(config, visual, images, quotas_.first(images.count), quotas_.part(images.count, images.count));
      std::size_t image_number = 0, numbered = 0;
      for_each_image(visual, [&](const Image& image) {
        if (image.tokens > 0) add_groups(config, marks, numbered, image.tokens, image.columns, quotas_[image_number]);
        ++image_number;
        numbered += image.tokens;
      });
    }
    if (members_count_ == 0) stage.pool = false;
    return write_lists(s, text, pool_quota);
  }

  // The even grid of a pool, which leaves room for every minimum. Returns how many tokens it takes.
  static std::size_t spread(const Config& config, const Images& images, Mark* marks) noexcept {
    const std::size_t share = even_share(config, images.keep), room = images.keep - images.minima;
    const std::size_t even = share < room ? share : room;
    if (even > 0) mark_uniform(marks, images.tokens, 0, even);
    return even;
  }
  // One group per image: what it keeps at least, beside what the grid has taken.
  void add_minima(const Config& config, Span<const TokenSpan> visual, const Mark* marks) noexcept {
    std::size_t numbered = 0;
    for_each_image(visual, [&](const Image& image) {
      const std::size_t least = minimum_of(config, image), first = members_count_;
      for (std::size_t i = numbered; i < numbered + image.tokens; ++i)
        if (marks[i] == 0) members_[members_count_++] = static_cast<Index>(i);
      const std::size_t size = members_count_ - first, taken = image.tokens - size;
      if (size > 0) groups_[groups_count_++] = {first, size, least > taken ? least - taken : 0};
      numbered += image.tokens;
    });
  }
  // The groups of one image's n tokens, numbered from `first` on.
  void add_groups(const Config& config, Mark* marks, std::size_t first, std::size_t n, std::size_t columns,
                  std::size_t count) noexcept {
    Mark* own = marks + first;
    Mark* scratch = marks_.first(0).data() + plan_.visual;
    for_each_group(config, own, n, columns, count, scratch, [&](std::size_t quota, auto tokens) {
      std::size_t size = 0, taken = 0;
      tokens([&](std::size_t i) {
        ++size;
        taken += own[i] == chosen<Mark> ? 1u : 0u;
      });
      if (quota == taken) return;
      const std::size_t begin = members_count_;
      tokens([&](std::size_t i) {
        if (quota == size)
          own[i] = chosen<Mark>;
        else if (own[i] != chosen<Mark>)
          members_[members_count_++] = static_cast<Index>(first + i);
      });
      if (quota < size) groups_[groups_count_++] = {begin, size - taken, quota - taken};
    });
  }

  Status write_lists(std::size_t s, std::size_t text, std::size_t pool_quota) noexcept {
    StageLists& stage = stages_[s];
    const std::size_t total = stage.images.tokens;
    const Mark* marks = marks_.first(0).data();
    const Index* members = members_.first(0).data();
    Index* place_of = members_.first(0).data() + plan_.visual;  // of a visual token among those that compete
    const auto class_of = [](std::size_t size) {
      std::size_t bits = 0;
      while (size >> bits != 0) ++bits;
      return bits - 1;
    };

    // Groups of similar size share the rows of one tensor, as long as the longest of them.
    for (std::size_t c = 0; c < 32; ++c) stage.size[c] = stage.count[c] = 0;
    for (std::size_t g = 0; g < groups_count_; ++g) {
      const std::size_t size = groups_[g].size, c = class_of(size);
      stage.size[c] = stage.size[c] < size ? size : stage.size[c];
      ++stage.count[c];
    }
    stage.rows = stage.classes = 0;
    for (std::size_t c = 0; c < 32; ++c) {
      stage.rows += stage.size[c] * stage.count[c];
      stage.classes += stage.count[c] > 0 ? 1u : 0u;
    }
    stage.groups = groups_count_;
    stage.competing = members_count_;
    stage.padded = stage.rows > stage.competing;
    std::size_t fixed = text;
    for (std::size_t i = 0; i < total; ++i) fixed += marks[i] == chosen<Mark> ? 1u : 0u;
    stage.fixed = fixed;
    stage.counted = s == 0 && configs_[s].selection == Selection::top_k ? total : 0;
    stage.masked = s == 0 && plan_.stages > 1 ? plan_.tokens : 0;
    stage.in_order = false;  // room for all
    if (Status status = stage.places.reserve(stage.lists_size()); !status) return status;
    if (Status status = stage.floats.reserve(stage.values_size()); !status) return status;

    // Which places stay in any case, ascending by position in the first stage; then those that compete, in order.
    const auto token_at = [&](std::size_t place) { return s == 0 ? table_[place] : static_cast<Index>(place); };
    for (std::size_t i = 0; i < total; ++i) place_of[i] = 0;
    for (std::size_t i = 0; i < members_count_; ++i) place_of[members[i]] = 1;
    std::size_t t = 0, written = 0, competing = 0;
    for (std::size_t i = 0; i <= total; ++i) {
      while (t < text && (i == total || token_at(t) < token_at(text + i)))
        stage.places[written++] = static_cast<std::int32_t>(token_at(t++));
      if (i < total && marks[i] == chosen<Mark>)
        stage.places[written++] = static_cast<std::int32_t>(token_at(text + i));
    }
    for (std::size_t i = 0; i < total; ++i)
      if (place_of[i] == 1) {
        place_of[i] = static_cast<Index>(competing++);
        stage.places[written++] = static_cast<std::int32_t>(token_at(text + i));
      }

    // Whether the rows are the competing tokens in their order.
    bool in_order = !stage.padded && stage.classes <= 1;
    for (std::size_t i = 0; in_order && i < members_count_; ++i) in_order = place_of[members[i]] == i;
    stage.in_order = in_order;
    std::int32_t* rows = stage.places.first(0).data() + stage.rows_at();
    std::int32_t* inverse = stage.places.first(0).data() + stage.inverse_at();
    std::int32_t* lowest = stage.places.first(0).data() + stage.lowest_at();
    float* quotas = stage.floats.first(0).data() + stage.quota_at();
    float* ranks = stage.floats.first(0).data() + stage.ranks_at();
    const auto half_more = [](std::size_t quota) { return static_cast<float>(quota) + 0.5f; };
    const auto ranked = [](std::size_t quota, std::size_t size) { return quota > 0 && quota < size ? 1.0f : 0.0f; };
    std::size_t entry = 0, group = 0;
    for (std::size_t c = 0; c < 32; ++c) {
      std::size_t row = 0;
      for (std::size_t g = 0; g < groups_count_ && row < stage.count[c]; ++g) {
        const Group& from = groups_[g];
        if (class_of(from.size) != c) continue;
        for (std::size_t i = 0; i < stage.size[c]; ++i, ++entry) {
          const bool padding = i >= from.size;
          const Index place = place_of[members[from.first + (padding ? 0 : i)]];
          if (stage.padded) stage.floats[entry] = padding ? minus_infinity<float>() : 0.0f;
          if (in_order) continue;
          rows[entry] = static_cast<std::int32_t>(place);
          if (!padding) inverse[place] = static_cast<std::int32_t>(entry);
        }
        const std::size_t last = from.quota == 0 ? 0 : from.quota - 1;
        lowest[group] = static_cast<std::int32_t>(row * stage.size[c] + last);
        ranks[group] = ranked(from.quota, from.size);
        quotas[group++] = half_more(from.quota);
        ++row;
      }
    }
    if (stage.pool) {
      lowest[group] = static_cast<std::int32_t>(pool_quota == 0 ? 0 : pool_quota - 1);
      quotas[group] = half_more(pool_quota);
      ranks[group] = ranked(pool_quota, stage.competing);
    }
    for (std::size_t i = 0; i < stage.counted; ++i)
      stage.places[stage.counted_at() + i] = static_cast<std::int32_t>(token_at(text + i));
    if (stage.masked > 0) {
      float* mask = stage.floats.first(0).data() + stage.mask_at();
      for (std::size_t i = 0; i < plan_.tokens; ++i) mask[i] = 0;
      for (std::size_t i = 0; i < total; ++i) mask[token_at(text + i)] = 1;
    }
    return {};
  }

  std::size_t given_ = 0;
  bool null_ = false;
  Plan plan_;
  Config configs_[max_stages];
  StageLists stages_[max_stages];
  Buffer<TokenSpan> spans_;
  Buffer<Index> quotas_, members_, table_;  // table_: [n] positions of all text tokens, then of all visual ones
  Buffer<Mark> marks_;
  Buffer<Group> groups_;
  std::size_t members_count_ = 0, groups_count_ = 0;
};

}  // namespace FASTV_KIND
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

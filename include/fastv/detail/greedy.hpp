// fastv: Selection::diverse, tokens taken one by one for their scores and for what they add to those before.
#pragma once

#include "../features.hpp"
#include "qk.hpp"
#include "rank.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
inline namespace FASTV_KIND {

// ---- rows of features ----------------------------------------------------------------------------

// Eight rows side by side, each of room_of_row() floats: every product of two is computed by the same steps, so that equal
// features have equal cosines wherever they stand.
inline constexpr std::size_t rows_at_once = streams;
// Floats of a row. Rows 4 KiB apart would meet in the same few places of a first-level cache.
constexpr std::size_t room_of_row(std::size_t elements) noexcept {
  return padded(elements) + (padded(elements) % 1024 == 0 ? 32 : 0);
}
constexpr std::size_t whole_rows(std::size_t n) noexcept {
  return (n + rows_at_once - 1) / rows_at_once * rows_at_once;
}

// out[r] = x . rows[r] of eight rows. next: elements to what is read afterwards.
inline void products_with_rows(const float* x, const float* rows, std::size_t room, std::ptrdiff_t next,
                               float* out) noexcept {
#if FASTV_VECTORS
  static_cast<void>(products_of<float, 1, rows_at_once>(x, EvenTile<float>(rows, static_cast<std::ptrdiff_t>(room)),
                                                        next, 0, room, out));
#else
  static_cast<void>(next);
  for (std::size_t r = 0; r < rows_at_once; ++r) out[r] = dot(x, rows + r * room, room);
#endif
}

// The same for four rows x, side by side, and with the same sums: out[h * rows_at_once + r] = x_h . rows[r]. Each of the
// eight is then read once for four.
inline constexpr std::size_t candidates_at_once = 4;
inline void products_of_four(const float* x, const float* rows, std::size_t room, std::ptrdiff_t next,
                             float* out) noexcept {
#if FASTV_VECTORS
  const EvenTile<float> tile(rows, static_cast<std::ptrdiff_t>(room));
  for (std::size_t r = 0; r < rows_at_once; r += 2)
    static_cast<void>(products_of<float, candidates_at_once, 2>(x, tile, next, r, room, out));
#else
  for (std::size_t h = 0; h < candidates_at_once; ++h)
    products_with_rows(x + h * room, rows, room, next, out + h * rows_at_once);
#endif
}

// Whether every two tokens are compared.
inline bool compares_all(const Diversity& diversity) noexcept {
  return diversity.novelty == Novelty::coverage || (diversity.novelty == Novelty::nearest && !uses_scores(diversity));
}

// What the parts of the workspace are for n tokens that compete for at most `kept` places, and how many floats they take.
struct GreedyRoom {
  std::size_t room;                 // floats of a row
  std::size_t rows, piece, pieces;  // with those that fill up the last eight; rows in a piece of work; pieces
  std::size_t basis;    // rows of the basis that Novelty::volume builds, and one; of coverage, four candidates
  std::size_t cosines;  // rows and columns of the table of all cosines, where it takes no more than features do; else 0
  std::size_t floats;   // no fewer for more tokens

  GreedyRoom(const Diversity& diversity, std::size_t n, std::size_t kept, std::size_t elements,
             std::size_t load_scratch) noexcept
      : room(room_of_row(elements)), rows(whole_rows(n)) {
    const std::size_t wanted = room == 0 ? 0 : whole_rows(65536 / room);
    piece = wanted < 64 ? 64 : wanted;
    pieces = (n + piece - 1) / piece;
    basis = diversity.novelty == Novelty::volume     ? (kept < elements ? kept : elements) + 1
            : diversity.novelty == Novelty::coverage ? candidates_at_once
                                                     : 0;
    cosines = compares_all(diversity) && n <= elements ? rows : 0;
    const std::size_t table = !compares_all(diversity) ? 0 : whole_rows(n < elements ? n : elements);
    floats = (rows + basis) * room + 3 * rows + pieces * load_scratch + table * table;
  }
};
inline Status check_greedy(std::size_t n, std::size_t elements) noexcept {
  if (room_of_row(elements) <= most_entries / (2 * whole_rows(n) + 64)) return {};
  return fail(Errc::bad_shape, "features of {} tokens of {} elements are more than any memory holds: project them", n,
              elements);
}
// Entries of Mark that a Greedy takes beside the marks: the competing tokens, and the best of each piece.
constexpr std::size_t greedy_words(std::size_t n) noexcept { return n + n / 64 + 1; }

// Positions in the prompt of visual tokens, asked for by ascending number.
class Positions {
 public:
  explicit Positions(Span<const TokenSpan> visual) noexcept : visual_(visual) {}
  std::size_t operator()(std::size_t number) noexcept {
    while (number >= first_ + visual_[span_].count) first_ += visual_[span_++].count;
    return visual_[span_].first + (number - first_);
  }

 private:
  Span<const TokenSpan> visual_;
  std::size_t span_ = 0, first_ = 0;
};

// ---- the rule ------------------------------------------------------------------------------------

// Picks among tokens whose marks are the order keys of their scores, or 1 where no score is looked at: those that are
// chosen already count among the kept; a key of 0, or features that are no numbers, comes last, in order.
template <class Score, class Evidence, class ParallelFor>
class Greedy {
 public:
  using Mark = Word<Score>;

  // scores, marks: of all visual tokens. floats: GreedyRoom of the n that compete; words: greedy_words(n).
  Greedy(const Config& config, const Evidence& evidence, Span<const TokenSpan> visual, Span<const Score> scores,
         Mark* marks, float* floats, Mark* words, const ParallelFor& parallel_for) noexcept
      : diversity_(config.diversity),
        evidence_(evidence),
        visual_(visual),
        scores_(scores),
        marks_(marks),
        floats_(floats),
        members_(words),
        scored_(uses_scores(config)),
        parallel_for_(parallel_for) {}

  // The tokens that compete: visit(take) calls take(number) for each, ascending. kept: the most of them that will stay.
  // Returns how many have features that are no numbers.
  template <class Visit>
  std::size_t start(std::size_t kept, Visit visit) noexcept {
    n_ = 0;
    visit([&](std::size_t number) { members_[n_++] = static_cast<Mark>(number); });
    const GreedyRoom room(diversity_, n_, kept, evidence_.feature_width(), evidence_.feature_scratch());
    room_ = room.room;
    piece_ = room.piece;
    pieces_ = room.pieces;
    best_ = members_ + n_;
    rows_ = floats_;
    basis_ = rows_ + room.rows * room_;
    basis_rows_ = 0;
    basis_most_ = room.basis == 0 ? 0 : room.basis - 1;
    strength_ = basis_ + room.basis * room_;
    novelty_ = strength_ + room.rows;
    covered_ = novelty_ + room.rows;
    cosines_ = covered_ + room.rows;
    columns_ = room.cosines;
    load_ = cosines_ + columns_ * columns_;
    kept_any_ = compared_ = false;
    for (std::size_t m = n_; m < room.rows; ++m) {
      for (std::size_t i = 0; i < room_; ++i) row(m)[i] = 0;
      strength_[m] = novelty_[m] = covered_[m] = 0;
    }
    parallel_for_(pieces_, [&](std::size_t p) { load_piece(p); });
    std::size_t broken = 0;
    for (std::size_t m = 0; m < n_; ++m) {
      if (covered_[m] > 0) continue;  // load_piece() says there which rows are numbers
      const bool counted = scored_ && is_nan(scores_[static_cast<std::size_t>(members_[m])]);  // among the scores
      broken += counted ? 0u : 1u;
      if (mark(m) != chosen<Mark>) mark(m) = 0;
    }
    for (std::size_t m = 0; m < n_; ++m) covered_[m] = 0;
    measure_strength();
    if (diversity_.novelty == Novelty::coverage) {
      compare_all();
      parallel_for_(pieces_, [&](std::size_t p) {
        for (std::size_t m = p * piece_; m < end_of(p); m += candidates_at_once)
          gains_of(Four(m), row(m), novelty_ + m);
      });
    }
    for (std::size_t m = 0; m < n_; ++m)
      if (mark(m) == chosen<Mark>) learn(m);
    return broken;
  }

  // Keeps `count` in all of the competing tokens first .. end - 1, those already chosen included. The others stay as
  // they are: finish() drops them.
  void take(std::size_t count, std::size_t first, std::size_t end) noexcept {
    if (end > n_) end = n_;
    std::size_t have = 0;
    for (std::size_t m = first; m < end; ++m) have += mark(m) == chosen<Mark> ? 1u : 0u;
    if (have >= count) return;
    first_ = first;
    end_ = end;
    if (diversity_.protected_share > 0) {
      const double wanted = static_cast<double>(count - have) * diversity_.protected_share + 0.5;
      const auto share = static_cast<std::size_t>(wanted);
      for (std::size_t left = share < count - have ? share : count - have; left > 0; --left) {
        const std::size_t m = best_score();
        if (m == n_) break;
        keep(m);
        ++have;
      }
    }
    if (!scored_ && !kept_any_ && diversity_.novelty == Novelty::nearest) have += keep_farthest();
    if (have < count && diversity_.novelty != Novelty::coverage)
      parallel_for_(pieces_, [&](std::size_t p) { scan(p); });
    while (have < count) {
      const std::size_t m = diversity_.novelty == Novelty::coverage ? most_covering() : best_of_pieces();
      if (m == n_) break;
      keep(m);
      ++have;
    }
    for (std::size_t m = first; have < count; ++m)  // only those without numbers are left
      if (mark(m) != chosen<Mark>) {
        keep(m);
        ++have;
      }
  }

  // What was not kept is dropped.
  void finish() noexcept {
    for (std::size_t m = 0; m < n_; ++m)
      if (mark(m) != chosen<Mark>) mark(m) = 0;
  }

 private:
  Mark& mark(std::size_t m) const noexcept { return marks_[static_cast<std::size_t>(members_[m])]; }
  float* row(std::size_t m) const noexcept { return rows_ + m * room_; }
  // Elements from eight rows to those behind them, where there are any.
  std::ptrdiff_t next_after(std::size_t m) const noexcept {
    return m + 2 * rows_at_once <= n_ ? static_cast<std::ptrdiff_t>(rows_at_once * room_) : 0;
  }
  std::size_t end_of(std::size_t p) const noexcept { return (p + 1) * piece_ < n_ ? (p + 1) * piece_ : n_; }
  bool competes(std::size_t m) const noexcept { return mark(m) != 0 && mark(m) != chosen<Mark>; }

  // Features at unit length; covered_ is 1 where they are numbers.
  void load_piece(std::size_t p) noexcept {
    const std::size_t elements = evidence_.feature_width();
    Positions position(visual_);
    for (std::size_t m = p * piece_; m < end_of(p); ++m) {
      float* x = row(m);
      evidence_.load_features(position(static_cast<std::size_t>(members_[m])), load_ + p * evidence_.feature_scratch(),
                              x);
      for (std::size_t i = elements; i < room_; ++i) x[i] = 0;
      const std::uint32_t most = greatest_magnitude(x, room_);
      const bool numbers = most < FloatBits<float>::infinity;
      covered_[m] = numbers ? 1.0f : 0.0f;
      if (!numbers || most < 0x00800000u) {  // nor do denormal ones point anywhere
        for (std::size_t i = 0; i < room_; ++i) x[i] = 0;
        continue;
      }
      // Near 1 first, by a power of two, so that no square leaves the range of floats.
      const std::uint32_t exponent = most >> 23;  // 1 .. 254
      const float near_one = bit_cast<float>((exponent > 253 ? 1u : 254u - exponent) << 23);
      for (std::size_t i = 0; i < room_; ++i) x[i] *= near_one;
      const float inverse = 1.0f / length_of(x, room_);
      for (std::size_t i = 0; i < room_; ++i) x[i] *= inverse;
    }
  }

  // Four tokens: from m on, or any.
  struct Four {
    std::size_t tokens[candidates_at_once];
    explicit Four(std::size_t m) noexcept : tokens{m, m + 1, m + 2, m + 3} {}
  };
  // The cosines of every two, each computed once, where there is room for a table of them.
  void compare_all() noexcept {
    if (columns_ == 0 || compared_) return;
    parallel_for_(pieces_, [&](std::size_t p) {
      float cosines[candidates_at_once * rows_at_once];
      for (std::size_t m = p * piece_; m < end_of(p); m += candidates_at_once)
        for (std::size_t j = m / rows_at_once * rows_at_once; j < n_; j += rows_at_once) {
          products_of_four(row(m), row(j), room_, next_after(j), static_cast<float*>(cosines));
          for (std::size_t h = 0; h < candidates_at_once; ++h)
            for (std::size_t r = 0; r < rows_at_once; ++r)
              cosines_[(m + h) * columns_ + j + r] = cosines_[(j + r) * columns_ + m + h] =
                  cosines[h * rows_at_once + r];
        }
    });
    compared_ = true;
  }
  // Those of four tokens with eight from j on, [4, 8]. x: the four rows side by side, read where there is no table.
  void cosines_of(const Four& four, const float* x, std::size_t j, float* cosines) const noexcept {
    if (!compared_) return products_of_four(x, row(j), room_, next_after(j), cosines);
    for (std::size_t h = 0; h < candidates_at_once; ++h)
      std::memcpy(cosines + h * rows_at_once, cosines_ + four.tokens[h] * columns_ + j, rows_at_once * sizeof(float));
  }

  // The part of a value that scores decide, and novelty before any token is kept: the same for all.
  void measure_strength() noexcept {
    const bool product = diversity_.blend == Blend::product;
    for (std::size_t m = 0; m < n_; ++m) {
      strength_[m] = product ? 1.0f : 0.0f;
      if (diversity_.novelty == Novelty::nearest) novelty_[m] = 2;
      if (diversity_.novelty == Novelty::volume) novelty_[m] = length_of(row(m), room_) > 0 ? 1.0f : 0.0f;
    }
    if (!(diversity_.weight > 0)) return;
    double least = 0, most = 0;
    bool any = false;
    for (std::size_t m = 0; m < n_; ++m) {
      const Score& score = scores_[static_cast<std::size_t>(members_[m])];
      if (is_nan(score)) continue;
      const double s = static_cast<double>(score);
      least = any && least < s ? least : s;
      most = any && most > s ? most : s;
      any = true;
    }
    if (product && least > 0) least = 0;
    const double spread = most - least;
    for (std::size_t m = 0; m < n_; ++m) {
      const Score& score = scores_[static_cast<std::size_t>(members_[m])];
      if (is_nan(score)) continue;
      const auto scaled = spread > 0 ? static_cast<float>((static_cast<double>(score) - least) / spread) : 1.0f;
      if (product)
        strength_[m] = power_of(scaled, static_cast<float>(diversity_.weight));
      else
        strength_[m] = static_cast<float>(diversity_.weight) * scaled;
    }
  }

  float value(std::size_t m) const noexcept {
    if (diversity_.blend == Blend::product) return strength_[m] * novelty_[m];
    return strength_[m] + static_cast<float>(1 - diversity_.weight) * novelty_[m];
  }
  // Of a and b, b the later: which goes first. n_ is none.
  std::size_t better(std::size_t a, std::size_t b) const noexcept {
    if (a == n_ || b == n_) return a == n_ ? b : a;
    const float x = value(a), y = value(b);
    if (x != y) return x > y ? a : b;
    return mark(a) >= mark(b) ? a : b;
  }
  // The best competing token of a piece, from first_ to end_.
  void scan(std::size_t p) noexcept {
    std::size_t best = n_;
    const std::size_t from = p * piece_ > first_ ? p * piece_ : first_, to = end_of(p) < end_ ? end_of(p) : end_;
    for (std::size_t m = from; m < to; ++m)
      if (competes(m)) best = better(best, m);
    best_[p] = static_cast<Mark>(best);
  }
  std::size_t best_of_pieces() const noexcept {
    std::size_t best = n_;
    for (std::size_t p = 0; p < pieces_; ++p) best = better(best, static_cast<std::size_t>(best_[p]));
    return best;
  }
  std::size_t best_score() const noexcept {
    std::size_t best = n_;
    for (std::size_t m = first_; m < end_; ++m)
      if (competes(m) && (best == n_ || mark(m) > mark(best))) best = m;
    return best;
  }

  void keep(std::size_t m) noexcept {
    mark(m) = chosen<Mark>;
    learn(m);
  }

  // What the others add beside token m, and the best of them by piece.
  void learn(std::size_t kept) noexcept {
    kept_any_ = true;
    const float* x = row(kept);
    if (diversity_.novelty == Novelty::volume) {
      x = new_direction(kept);
      if (x == nullptr) {
        parallel_for_(pieces_, [&](std::size_t p) { scan(p); });
        return;
      }
    }
    parallel_for_(pieces_, [&](std::size_t p) {
      float cosines[rows_at_once];
      for (std::size_t m = p * piece_; m < end_of(p); m += rows_at_once) {
        if (compared_)
          std::memcpy(static_cast<float*>(cosines), cosines_ + kept * columns_ + m, sizeof(cosines));
        else
          products_with_rows(x, row(m), room_, next_after(m), static_cast<float*>(cosines));
        for (std::size_t r = 0; r < rows_at_once; ++r) learn_cosine(m + r, cosines[r]);
      }
      if (diversity_.novelty != Novelty::coverage) scan(p);
    });
  }
  // Differences that rounding alone may make are none.
  void learn_cosine(std::size_t m, float cosine) noexcept {
    if (diversity_.novelty == Novelty::coverage) {
      covered_[m] = cosine > covered_[m] ? cosine : covered_[m];
      return;
    }
    const bool nearest = diversity_.novelty == Novelty::nearest;
    const float left = nearest ? 1.0f - cosine : novelty_[m] - cosine * cosine;
    const float rounded = left < (nearest ? 1e-6f : 1e-5f) ? 0.0f : left;
    novelty_[m] = rounded < novelty_[m] ? rounded : novelty_[m];
  }

  // Novelty::coverage. Gains only shrink as more is covered, so one that is still the greatest when computed anew is the
  // greatest of all: the others need not be (Minoux 1978). In floats as well: every step of the sum is monotonic.
  // gains: of four tokens, whose rows are x where there is no table.
  void gains_of(const Four& four, const float* x, float* gains) const noexcept {
    float sums[candidates_at_once][rows_at_once] = {}, cosines[candidates_at_once * rows_at_once];
    for (std::size_t j = 0; j < n_; j += rows_at_once) {
      cosines_of(four, x, j, static_cast<float*>(cosines));
      for (std::size_t h = 0; h < candidates_at_once; ++h)
        for (std::size_t r = 0; r < rows_at_once; ++r) {
          const float more = cosines[h * rows_at_once + r] - covered_[j + r];
          sums[h][r] += more > 0 ? more : 0.0f;
        }
    }
    for (std::size_t h = 0; h < candidates_at_once; ++h) {
      float sum = 0;
      for (std::size_t r = 0; r < rows_at_once; ++r) sum += sums[h][r];
      gains[h] = sum / static_cast<float>(n_);
    }
  }
  // The four that go first are computed anew at once, until the first of all is one of them.
  std::size_t most_covering() noexcept {
    std::size_t first[candidates_at_once], count = 0;
    for (;;) {
      std::size_t best = n_;
      for (std::size_t m = first_; m < end_; ++m)
        if (competes(m)) best = better(best, m);
      for (std::size_t h = 0; h < count; ++h)
        if (first[h] == best) return best;
      if (best == n_) return best;
      first[0] = best;
      for (count = 1; count < candidates_at_once; ++count) {
        first[count] = n_;
        for (std::size_t m = first_; m < end_; ++m) {
          bool listed = !competes(m);
          for (std::size_t h = 0; h < count; ++h) listed = listed || first[h] == m;
          if (!listed) first[count] = better(first[count], m);
        }
        if (first[count] == n_) break;
      }
      Four four(0);
      for (std::size_t h = 0; h < candidates_at_once; ++h) {
        four.tokens[h] = first[h < count ? h : 0];
        if (!compared_) std::memcpy(basis_ + h * room_, row(four.tokens[h]), room_ * sizeof(float));
      }
      float gains[candidates_at_once];
      gains_of(four, basis_, static_cast<float*>(gains));
      for (std::size_t h = 0; h < count; ++h) novelty_[first[h]] = gains[h];
    }
  }

  // Novelty::nearest without scores starts as DivPrune does: with the token farthest from its nearest neighbour.
  std::size_t keep_farthest() noexcept {
    compare_all();
    parallel_for_(pieces_, [&](std::size_t p) {
      float cosines[candidates_at_once * rows_at_once];
      for (std::size_t m = p * piece_; m < end_of(p); m += candidates_at_once) {
        float most[candidates_at_once] = {-2, -2, -2, -2};
        for (std::size_t j = 0; j < n_; j += rows_at_once) {
          cosines_of(Four(m), row(m), j, static_cast<float*>(cosines));
          for (std::size_t h = 0; h < candidates_at_once; ++h)
            for (std::size_t r = 0; r < rows_at_once && j + r < n_; ++r) {
              const float cosine = cosines[h * rows_at_once + r];
              most[h] = j + r != m + h && cosine > most[h] ? cosine : most[h];
            }
        }
        for (std::size_t h = 0; h < candidates_at_once; ++h) novelty_[m + h] = 1.0f - most[h];
      }
      scan(p);
    });
    const std::size_t farthest = best_of_pieces();
    for (std::size_t m = 0; m < n_; ++m) novelty_[m] = 2;
    if (farthest == n_) return 0;
    keep(farthest);
    return 1;
  }

  // Novelty::volume: the part of a kept token's features that the basis lacks, at unit length, by Gram-Schmidt, twice
  // where little is left (Kahan and Parlett). Null: nothing but rounding.
  const float* new_direction(std::size_t kept) noexcept {
    if (basis_rows_ == basis_most_) return nullptr;
    float* x = basis_ + basis_rows_ * room_;
    for (std::size_t i = 0; i < room_; ++i) x[i] = row(kept)[i];
    float before = length_of(x, room_), left = before;
    for (int pass = 0; pass < 2; ++pass) {
      for (std::size_t b = 0; b < basis_rows_; ++b) {
        const float* q = basis_ + b * room_;
        const float along = dot(q, x, room_);
        for (std::size_t i = 0; i < room_; i += lanes)
          for (std::size_t lane = 0; lane < lanes; ++lane) x[i + lane] -= along * q[i + lane];
      }
      left = length_of(x, room_);
      if (left > 0.7f * before) break;
      before = left;
    }
    if (!(left > 1e-3f)) return nullptr;
    const float inverse = 1.0f / left;
    for (std::size_t i = 0; i < room_; ++i) x[i] *= inverse;
    ++basis_rows_;
    return x;
  }

  const Diversity diversity_;
  const Evidence& evidence_;
  Span<const TokenSpan> visual_;
  Span<const Score> scores_;
  Mark* marks_;
  float* floats_;
  Mark *members_, *best_ = nullptr;  // [n], [pieces]
  bool scored_, kept_any_ = false, compared_ = false;
  const ParallelFor& parallel_for_;
  std::size_t n_ = 0, room_ = 0, piece_ = 1, pieces_ = 0, basis_rows_ = 0, basis_most_ = 0, first_ = 0, end_ = 0,
              columns_ = 0;
  float *rows_ = nullptr, *basis_ = nullptr, *strength_ = nullptr, *novelty_ = nullptr, *covered_ = nullptr,
        *cosines_ = nullptr, *load_ = nullptr;
};

}  // namespace FASTV_KIND
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

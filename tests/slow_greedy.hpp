// Selection::diverse as slow as it is plain: one rule for all settings, in double and with whole matrices of similarities,
// and random problems to hold others to it. diverse_test.cpp checks it against the published rules.
#pragma once

#include "fastv/fastv.hpp"
#include "oracle.hpp"

namespace slow_greedy {

using namespace fastv;
using oracle::Rng;
using Matrix = std::vector<std::vector<double>>;

inline Matrix cosines(const Matrix& x) {
  Matrix s(x.size(), std::vector<double>(x.size()));
  const auto product = [](const std::vector<double>& a, const std::vector<double>& b) {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
  };
  for (std::size_t i = 0; i < x.size(); ++i)
    for (std::size_t j = 0; j < x.size(); ++j) {
      const double lengths = std::sqrt(product(x[i], x[i]) * product(x[j], x[j]));
      s[i][j] = lengths > 0 ? product(x[i], x[j]) / lengths : 0;
    }
  return s;
}
inline double determinant(Matrix m) {
  double det = 1;
  for (std::size_t c = 0; c < m.size(); ++c) {
    std::size_t pivot = c;
    for (std::size_t r = c; r < m.size(); ++r)
      if (std::fabs(m[r][c]) > std::fabs(m[pivot][c])) pivot = r;
    if (m[pivot][c] == 0) return 0;
    if (pivot != c) {
      std::swap(m[pivot], m[c]);
      det = -det;
    }
    det *= m[c][c];
    for (std::size_t r = c + 1; r < m.size(); ++r) {
      const double factor = m[r][c] / m[c][c];
      for (std::size_t k = c; k < m.size(); ++k) m[r][k] -= factor * m[c][k];
    }
  }
  return det;
}

// ---- data ---------------------------------------------------------------------------------------

inline double normal(Rng& rng) {
  double sum = 0;
  for (int i = 0; i < 12; ++i) sum += rng.real();
  return sum - 6;
}
// Tokens about a few centres, as patches of an image are.
inline Matrix clustered(Rng& rng, std::size_t n, std::size_t width, std::size_t centres) {
  Matrix centre(centres, std::vector<double>(width)), x(n, std::vector<double>(width));
  for (auto& c : centre)
    for (double& v : c) v = normal(rng);
  for (auto& row : x) {
    const auto& c = centre[rng.below(centres)];
    const double length = rng.real(0.2, 5);
    for (std::size_t d = 0; d < width; ++d)
      row[d] = static_cast<double>(static_cast<float>(length * (c[d] + 0.5 * normal(rng))));
  }
  return x;
}
inline std::vector<float> flat(const Matrix& x) {
  std::vector<float> all;
  for (const auto& row : x)
    for (const double v : row) all.push_back(static_cast<float>(v));
  return all;
}
inline std::vector<double> random_scores(Rng& rng, std::size_t n) {
  std::vector<double> scores(n);
  for (double& s : scores) s = static_cast<double>(static_cast<float>(rng.real(0.001, 1)));
  return scores;
}

inline Config diverse(Diversity diversity, std::size_t keep) {
  Config config;
  config.selection = Selection::diverse;
  config.keep_count = keep;
  config.diversity = diversity;
  return config;
}

// ---- the rule ----------------------------------------------------------------------------------

// One slow rule for all settings, on tokens of which some are kept already. Checked against the published ones below.
struct SlowRule {
  const Diversity diversity;
  const Matrix sim;
  const std::vector<double> scores;  // NaN: no number
  const std::vector<bool> broken;    // features are no numbers
  double margin = 1e9;

  SlowRule(const Diversity& settings, const Matrix& x, std::vector<double> s, std::vector<bool> no_numbers = {})
      : diversity(settings),
        sim(cosines(x)),
        scores(std::move(s)),
        broken(no_numbers.empty() ? std::vector<bool>(x.size()) : no_numbers) {}

  bool counts(std::size_t i) const { return !broken[i] && !(uses_scores() && oracle::is_nan(scores[i])); }
  bool uses_scores() const { return diversity.weight > 0 || diversity.protected_share > 0; }

  // The squared distance of token i from the span of others, by the ratio of two determinants.
  double volume(std::size_t i, const std::vector<Index>& kept) const {
    std::vector<Index> base;
    for (const Index k : kept) {  // those that span anything new
      if (determinant(kernel(base, k)) > 1e-5 * determinant(kernel(base))) base.push_back(k);
    }
    return determinant(kernel(base, static_cast<Index>(i))) / determinant(kernel(base));
  }
  Matrix kernel(std::vector<Index> set) const {
    Matrix k(set.size(), std::vector<double>(set.size()));
    for (std::size_t a = 0; a < set.size(); ++a)
      for (std::size_t b = 0; b < set.size(); ++b) k[a][b] = sim[set[a]][set[b]];
    return k;
  }
  Matrix kernel(std::vector<Index> set, Index more) const {
    set.push_back(more);
    return kernel(set);
  }

  // Keeps `count` in all of `range`, a part of the tokens `all` that compete with each other; kept: those that stay.
  void take(const std::vector<Index>& all, const std::vector<Index>& range, std::size_t count,
            std::vector<bool>& kept) {
    const auto kept_of = [&](const std::vector<Index>& set) {
      std::vector<Index> list;
      for (const Index i : set)
        if (kept[i]) list.push_back(i);
      return list;
    };
    double least = 1e300, most = -1e300;
    for (const Index i : all)
      if (!oracle::is_nan(scores[i])) {
        least = std::min(least, scores[i]);
        most = std::max(most, scores[i]);
      }
    const bool product = diversity.blend == Blend::product;
    if (product) least = std::min(least, 0.0);
    const auto strength = [&](std::size_t i) {
      if (diversity.weight == 0) return product ? 1.0 : 0.0;
      const double scaled = most > least ? (scores[i] - least) / (most - least) : 1;
      return product ? std::pow(scaled, diversity.weight) : diversity.weight * scaled;
    };
    std::size_t have = kept_of(range).size();
    std::size_t outright = 0;
    if (have < count)
      outright = have + static_cast<std::size_t>(static_cast<double>(count - have) * diversity.protected_share + 0.5);
    for (; have < count; ++have) {
      const std::vector<Index> before = kept_of(all);
      std::size_t best = sim.size();
      double best_value = 0;
      std::vector<std::pair<double, std::size_t>> values;
      for (const Index i : range) {
        if (kept[i] || !counts(i)) continue;
        double novelty = 0;
        if (have >= outright) {
          if (diversity.novelty == Novelty::nearest) {
            double near = -2;
            if (before.empty() && !uses_scores()) {
              for (const Index j : all)
                if (j != i) near = std::max(near, broken[j] ? 0.0 : sim[i][j]);
            } else {
              for (const Index j : before) near = std::max(near, broken[j] ? 0.0 : sim[i][j]);
            }
            novelty = before.empty() && uses_scores() ? 2 : 1 - near;
          }
          if (diversity.novelty == Novelty::coverage)
            for (const Index j : all) {
              double covered = 0;
              for (const Index k : before) covered = std::max(covered, sim[k][j]);
              novelty += std::max(0.0, sim[i][j] - covered) / static_cast<double>(all.size());
            }
          if (diversity.novelty == Novelty::volume) novelty = volume(i, before);
        }
        const double value = have < outright ? scores[i]
                             : product       ? strength(i) * novelty
                                             : strength(i) + (1 - diversity.weight) * novelty;
        values.emplace_back(value, i);
        if (best == sim.size() || value > best_value) {
          best = i;
          best_value = value;
        }
      }
      if (best == sim.size()) break;
      for (const auto& [value, i] : values)
        if (i != best) margin = std::min(margin, best_value - value);
      kept[best] = true;
    }
    for (const Index i : range)
      if (have < count && !kept[i]) {
        kept[i] = true;
        ++have;
      }
  }
};

inline std::vector<Index> numbers(std::size_t first, std::size_t count) {
  std::vector<Index> list(count);
  std::iota(list.begin(), list.end(), static_cast<Index>(first));
  return list;
}

inline Diversity random_diversity(Rng& rng) {
  Diversity d;
  d.novelty = static_cast<Novelty>(rng.below(3));
  d.blend = static_cast<Blend>(rng.below(2));
  d.weight = rng.chance(0.2) ? 0 : rng.real(0.1, d.blend == Blend::sum ? 1 : 2.5);
  d.protected_share = rng.chance(0.5) ? 0 : rng.real();
  return d;
}

// The tokens that stay of a layout, by the slow rule; margin: the least difference of values.
inline std::vector<Index> slowly(const Config& config, const oracle::Layout& layout, SlowRule& rule) {
  const std::size_t total = layout.visual_tokens();
  std::vector<bool> kept(total);
  const oracle::Counts counts = oracle::counts_of(config, layout.visual);
  const auto grid = [&](std::size_t first, std::size_t n, std::size_t columns, std::size_t count) {
    std::vector<std::uint32_t> marks(n);
    if (count > 0) detail::mark_uniform(marks.data(), n, columns, count);
    for (std::size_t i = 0; i < n; ++i)
      if (marks[i] != 0) kept[first + i] = true;
  };
  const auto even_of = [&](std::size_t count) {
    return std::min(count, static_cast<std::size_t>(static_cast<double>(count) * config.uniform_share + 0.5));
  };
  const auto alone = [&](std::size_t first, std::size_t n, std::size_t columns, std::size_t count) {
    const std::size_t even = even_of(count);
    grid(first, n, columns, even);
    if (config.window_rows == 0) {
      rule.take(numbers(first, n), numbers(first, n), count, kept);
      return;
    }
    std::vector<std::vector<Index>> windows;
    std::vector<std::size_t> free, taken;
    for (std::size_t top = 0; top < n / columns; top += config.window_rows)
      for (std::size_t left = 0; left < columns; left += config.window_columns) {
        windows.emplace_back();
        taken.push_back(0);
        for (std::size_t r = top; r < std::min(n / columns, top + config.window_rows); ++r)
          for (std::size_t c = left; c < std::min(columns, left + config.window_columns); ++c) {
            windows.back().push_back(static_cast<Index>(first + r * columns + c));
            taken.back() += kept[first + r * columns + c] ? 1u : 0u;
          }
        free.push_back(windows.back().size() - taken.back());
      }
    const bool any = std::accumulate(free.begin(), free.end(), std::size_t{0}) > 0;
    const std::vector<std::size_t> shares = any ? oracle::quotas(free, count - even) : free;
    for (std::size_t w = 0; w < windows.size(); ++w) rule.take(windows[w], windows[w], shares[w] + taken[w], kept);
  };
  std::size_t numbered = 0, image_number = 0;
  const std::vector<oracle::Image> images = oracle::images_of(layout.visual);
  if (config.quota == Quota::per_image) {
    for (const oracle::Image& image : images) {
      if (image.tokens() > 0) alone(numbered, image.tokens(), image.columns, counts.quota[image_number]);
      ++image_number;
      numbered += image.tokens();
    }
  } else if (config.min_per_image > 0 &&
             std::accumulate(counts.least.begin(), counts.least.end(), std::size_t{0}) > 0) {
    const std::size_t minima = std::accumulate(counts.least.begin(), counts.least.end(), std::size_t{0});
    grid(0, total, 0, std::min(even_of(counts.all), counts.all - minima));
    for (const oracle::Image& image : images) {
      rule.take(numbers(0, total), numbers(numbered, image.tokens()), counts.least[image_number++], kept);
      numbered += image.tokens();
    }
    rule.take(numbers(0, total), numbers(0, total), counts.all, kept);
  } else if (total > 0) {
    alone(0, total, 0, counts.all);
  }
  std::vector<Index> chosen;
  for (std::size_t i = 0; i < total; ++i)
    if (kept[i]) chosen.push_back(static_cast<Index>(i));
  return oracle::whole_prompt(layout.tokens, layout.visual, chosen);
}

// A prompt with images, scores and features of its own.
struct Problem {
  oracle::Layout layout;
  Matrix x;                    // of visual tokens
  std::vector<double> scores;  // of visual tokens
  std::vector<bool> broken;
  std::size_t width;
  std::vector<float> features, floats;  // of the prompt, of visual tokens

  // fixed_width 0: a random one.
  Problem(Rng& rng, bool grids, double damaged, std::size_t fixed_width = 0) {
    const std::size_t images = rng.between(1, 3);
    layout.tokens = rng.between(0, 3);
    for (std::size_t i = 0; i < images; ++i) {
      const std::size_t columns = rng.between(2, 4), rows = rng.between(1, 5);
      layout.visual.push_back({layout.tokens, rows * columns, grids ? columns : 0});
      layout.tokens += rows * columns + rng.below(3);
    }
    layout.tokens += rng.between(1, 4);
    const std::size_t n = layout.visual_tokens();
    width = fixed_width != 0 ? fixed_width : rng.between(20, 40);
    x = clustered(rng, n, width, rng.between(2, 8));
    scores = random_scores(rng, n);
    if (rng.chance(0.3))
      for (double& s : scores) s -= 0.5;
    broken.resize(n);
    std::vector<std::vector<float>> rows(layout.tokens, std::vector<float>(width, oracle::nan_float()));
    std::size_t number = 0;
    for (const TokenSpan& span : layout.visual)
      for (std::size_t i = 0; i < span.count; ++i, ++number) {
        for (std::size_t d = 0; d < width; ++d) rows[span.first + i][d] = static_cast<float>(x[number][d]);
        if (rng.chance(damaged)) scores[number] = static_cast<double>(oracle::nan_float());
        if (rng.chance(damaged)) {
          broken[number] = true;
          rows[span.first + i][rng.below(width)] = rng.chance(0.5) ? oracle::nan_float() : oracle::infinity();
        }
      }
    for (std::size_t i = 0; i < n; ++i)
      if (broken[i]) std::fill(x[i].begin(), x[i].end(), 0.0);
    for (const auto& row : rows) features.insert(features.end(), row.begin(), row.end());
    floats.assign(scores.begin(), scores.end());
  }
  auto evidence() const {
    return with_features(Scores<float>{floats, layout.tokens},
                         heads(features.data(), TokenMajor{layout.tokens, 1, width}));
  }
};
inline Config random_config(Rng& rng, const Problem& problem, bool grids) {
  Config config = diverse(random_diversity(rng), by_ratio);
  config.filtering_ratio = rng.real(0.2, 0.95);
  if (rng.chance(0.4)) config.keep_count = rng.below(problem.layout.visual_tokens() + 1);
  if (rng.chance(0.4)) config.min_per_image = rng.between(1, 4);
  if (rng.chance(0.3)) config.uniform_share = rng.real();
  if (grids && rng.chance(0.7)) {
    config.window_rows = rng.between(1, 3);
    config.window_columns = rng.between(1, 3);
  } else if (rng.chance(0.5)) {
    config.quota = Quota::pooled;
  }
  return config;
}

}  // namespace slow_greedy

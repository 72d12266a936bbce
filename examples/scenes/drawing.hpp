// The demo's figure: what was kept of the picture, what it was ranked by, and how much attention each layer pays to
// the picture at all (the paper's figures 1, 3 and 5 for one picture).
#pragma once

#include "../common/canvas.hpp"

namespace scenes {

using namespace common;  // pictures

// A line of the table below the panels.
struct FigureRow {
  std::string name;
  std::vector<std::string> cells;
};

struct Figure {
  std::string question;
  std::vector<std::array<std::string, 2>> answers;  // who says so, the answer
  Picture picture;                                  // square, as the model gets it
  std::size_t columns = 0;                          // patches in a row of the picture
  std::vector<bool> kept;                           // one a patch, in reading order
  std::string kept_caption;                         // under the picture
  std::vector<float> scores;                        // one a patch
  std::string score_caption;                        // under the heat map
  std::vector<double> share;        // of the last prompt token's attention, on visual tokens: [layers], each in [0, 1]
  std::size_t filtering_layer = 0;  // K
  std::string share_caption;        // under the chart
  std::vector<std::string> heads;   // of the table's columns
  std::vector<FigureRow> rows;
};

namespace detail {

constexpr double small = 14, medium = 16;

inline Box patch_box(const Box& box, std::size_t columns, std::size_t patch) {
  const double side = box.width / static_cast<double>(columns);
  return {box.x + side * static_cast<double>(patch % columns), box.y + side * static_cast<double>(patch / columns),
          side, side};
}

// Lines between the patches `inside` and the others, and around them at the picture's edge.
inline void draw_border(Canvas& canvas, const Box& box, std::size_t columns, const std::vector<bool>& inside,
                        const Ink& colour, double width) {
  const std::size_t rows = inside.size() / columns;
  for (std::size_t patch = 0; patch < inside.size(); ++patch) {
    if (!inside[patch]) continue;
    const Box b = patch_box(box, columns, patch);
    const std::size_t x = patch % columns, y = patch / columns;
    const double half = width / 2;  // so that the lines meet at the corners
    if (x == 0 || !inside[patch - 1]) canvas.line(b.x, b.y - half, b.x, b.bottom() + half, colour, width);
    if (x + 1 == columns || !inside[patch + 1])
      canvas.line(b.right(), b.y - half, b.right(), b.bottom() + half, colour, width);
    if (y == 0 || !inside[patch - columns]) canvas.line(b.x - half, b.y, b.right() + half, b.y, colour, width);
    if (y + 1 == rows || !inside[patch + columns])
      canvas.line(b.x - half, b.bottom(), b.right() + half, b.bottom(), colour, width);
  }
}

inline void draw_kept(Canvas& canvas, const Figure& figure, const Box& box) {
  canvas.picture(figure.picture, box);
  for (std::size_t patch = 0; patch < figure.kept.size(); ++patch) {
    const Box b = patch_box(box, figure.columns, patch);
    if (figure.kept[patch])
      canvas.outline(b, {1, 1, 1, 0.30});
    else
      canvas.fill(b, {1, 1, 1, 0.78});
  }
  draw_border(canvas, box, figure.columns, figure.kept, ink::vermilion, 2.5);
}

// The step of an axis with about `ticks` ticks: 1, 2 or 5 times a power of ten.
inline double nice_step(double extent, int ticks) {
  const double raw = extent / ticks, power = std::pow(10.0, std::floor(std::log10(raw)));
  const double lead = raw / power;
  return power * (lead <= 1 ? 1 : lead <= 2 ? 2 : lead <= 5 ? 5 : 10);
}

// Scores as colours, 0 to the largest, and a bar that says which colour is which score.
inline void draw_heat_map(Canvas& canvas, const Figure& figure, const Box& box) {
  double highest = 0;
  for (const float score : figure.scores) highest = (std::max)(highest, static_cast<double>(score));
  if (!(highest > 0)) highest = 1;
  for (std::size_t patch = 0; patch < figure.scores.size(); ++patch) {
    Box b = patch_box(box, figure.columns, patch);
    b.width += 0.5, b.height += 0.5;  // no seams where a patch is no whole number of pixels
    canvas.fill(b, viridis(static_cast<double>(figure.scores[patch]) / highest));
  }
  draw_border(canvas, box, figure.columns, figure.kept, ink::vermilion, 2);

  const Box bar{box.right() + 18, box.y, 16, box.height};
  for (int i = 0; i < 256; ++i)
    canvas.fill({bar.x, bar.bottom() - bar.height * (i + 1) / 256, bar.width, bar.height / 256 + 0.5},
                viridis(i / 255.0));
  const double step = nice_step(highest * 100, 5);
  for (double value = 0; value <= highest * 100 * 1.0001; value += step) {
    const double y = bar.bottom() - bar.height * value / (highest * 100);
    canvas.line(bar.right(), y, bar.right() + 4, y, ink::grey);
    canvas.text(format("%g %%", value), bar.right() + 8, y + 5, small, ink::grey);
  }
}

// Bars of the share, layer by layer; from the filtering layer on in another colour.
inline void draw_shares(Canvas& canvas, const Figure& figure, const Box& area) {
  const Box box{area.x, area.y + 40, area.width, area.height - 40};  // the filtering layer's label stands above
  double highest = 5;
  for (const double share : figure.share) highest = (std::max)(highest, share * 100);
  const double step = nice_step(highest, 5), top = std::ceil(highest / step - 1e-9) * step;
  const auto y_of = [&](double percent) { return box.bottom() - box.height * percent / top; };
  for (int i = 0; i * step < top + step / 2; ++i) {
    const double y = y_of(i * step);
    canvas.line(box.x, y, box.right(), y, i > 0 ? ink::line : ink::grey);
    canvas.text(format("%g %%", i * step), box.x - 8, y + 5, small, ink::grey, Align::right);
  }
  const std::size_t layers = figure.share.size();
  const double slot = box.width / static_cast<double>(layers);
  // Numbers only where there is room for them; ticks at every layer, or at every few in a deep model.
  const bool numbers = slot >= 34;
  const std::size_t every = slot >= 22 ? 1 : slot >= 11 ? 2 : 4;
  for (std::size_t layer = 0; layer < layers; ++layer) {
    const double x = box.x + slot * static_cast<double>(layer), percent = figure.share[layer] * 100;
    canvas.fill({x + slot * 0.14, y_of(percent), slot * 0.72, box.bottom() - y_of(percent)},
                layer < figure.filtering_layer ? ink::blue : ink::vermilion);
    if (numbers) {
      const std::string number = format(percent < 9.95 ? "%.1f" : "%.0f", percent);
      const double y = y_of(percent) - 6, width = canvas.text_width(number, small) + 6;
      canvas.fill({x + (slot - width) / 2, y - 13, width, 16}, ink::paper);  // no grid line through it
      canvas.text(number, x + slot / 2, y, small, ink::black, Align::centre);
    }
    if (layer % every == 0)
      canvas.text(std::to_string(layer), x + slot / 2, box.bottom() + 20, small, ink::grey, Align::centre);
  }
  canvas.text("decoder layer", box.x + box.width / 2, box.bottom() + 42, small, ink::grey, Align::centre);

  const double x = box.x + slot * static_cast<double>(figure.filtering_layer);
  canvas.line(x, area.y, x, box.bottom(), ink::black, 1.5, 5);
  const bool left = figure.filtering_layer * 2 > layers;  // the label on the roomier side
  canvas.text("K = " + std::to_string(figure.filtering_layer) + ": pruned from here", x + (left ? -10 : 10),
              area.y + 12, small, ink::black, left ? Align::right : Align::left);
}

// Every column is as wide as its longest cell; what is left over is shared out between them.
inline void draw_table(Canvas& canvas, const Figure& figure, const Box& box) {
  constexpr double row_height = 32;
  std::vector<double> x(figure.heads.size() + 1);  // where each column starts; the first one holds the names
  double used = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    double widest = i == 0 ? 0 : canvas.text_width(figure.heads[i - 1], small);
    for (const FigureRow& row : figure.rows)
      widest = (std::max)(widest, i == 0 ? canvas.text_width(row.name, medium, Weight::bold)
                                         : canvas.text_width(row.cells.at(i - 1), medium));
    x[i] = used;
    used += widest;
  }
  const double gap = (box.width - used) / static_cast<double>(figure.heads.size());
  for (std::size_t i = 0; i < x.size(); ++i) x[i] += box.x + gap * static_cast<double>(i);

  for (std::size_t i = 1; i < x.size(); ++i) canvas.text(figure.heads[i - 1], x[i], box.y, small, ink::grey);
  canvas.line(box.x, box.y + 11, box.right(), box.y + 11, ink::line);
  double y = box.y + 4;
  for (const FigureRow& row : figure.rows) {
    y += row_height;
    canvas.text(row.name, x[0], y, medium, ink::black, Align::left, Weight::bold);
    for (std::size_t i = 1; i < x.size(); ++i) canvas.text(row.cells[i - 1], x[i], y, medium);
  }
}

// The question and the answers, smaller where they would be too long.
inline void draw_title(Canvas& canvas, const Figure& figure, double x, double width) {
  constexpr double gap = 12, wide_gap = 40;
  const auto fitted = [&](double size, double used) { return size * (std::min)(1.0, width / used); };
  const double size = fitted(30, canvas.text_width(figure.question, 30, Weight::bold));
  canvas.text(figure.question, x, 66, size, ink::black, Align::left, Weight::bold);

  double used = 0;
  for (const auto& [who, answer] : figure.answers)
    used += canvas.text_width(who, 18) + gap + canvas.text_width(answer, 18, Weight::bold) + wide_gap;
  const double answer_size = fitted(18, used);
  for (const auto& [who, answer] : figure.answers) {
    x += canvas.text(who, x, 102, answer_size, ink::grey) + gap;
    x += canvas.text(answer, x, 102, answer_size, ink::black, Align::left, Weight::bold) + wide_gap;
  }
}

constexpr double sheet_width = 1500, sheet_height = 780;

inline void draw_figure(Canvas& canvas, const Figure& figure) {
  constexpr double margin = 48, panel_y = 170, side = 384;
  const Box picture{margin, panel_y, side, side};
  const Box heat{picture.right() + 56, panel_y, side, side};
  const double chart_x = heat.right() + 168;
  const Box chart{chart_x, panel_y, sheet_width - margin - chart_x, side - 42};  // two lines of axis below it

  draw_title(canvas, figure, margin, sheet_width - 2 * margin);
  const auto panel = [&](double left, double width, const std::string& title, const std::string& caption) {
    canvas.text(title, left, panel_y - 20, medium + 2, ink::black, Align::left, Weight::bold);
    canvas.paragraph(caption, left, panel_y + side + 30, width, small, ink::grey);
  };
  panel(picture.x, side, "Patches kept", figure.kept_caption);
  panel(heat.x, side + 60, "Attention score of each patch", figure.score_caption);
  panel(chart.x - 52, chart.width + 52, "Attention on the picture, layer by layer", figure.share_caption);
  draw_kept(canvas, figure, picture);
  draw_heat_map(canvas, figure, heat);
  draw_shares(canvas, figure, chart);
  draw_table(canvas, figure, {margin, sheet_height - 112, sheet_width - 2 * margin, 0});
}

}  // namespace detail

// 1500 x 780 pixels; PNG or SVG by the path's ending.
inline void write_figure(const std::string& path, const Figure& figure) {
  write_drawing(path, detail::sheet_width, detail::sheet_height,
                [&](Canvas& canvas) { detail::draw_figure(canvas, figure); });
}

}  // namespace scenes

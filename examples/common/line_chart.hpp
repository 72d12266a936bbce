// Panels of lines over common axes with one legend, such as accuracy over FLOPs. As SVG or PNG.
#pragma once

#include <optional>

#include "canvas.hpp"

namespace common {

struct Series {
  std::string name;                           // of equal names, one legend entry and one colour
  std::vector<std::array<double, 2>> points;  // x, y, in drawing order
  bool joined = true;                         // by a line
};

struct Panel {
  std::string title;
  std::vector<Series> series;
  std::optional<double> level;  // a dashed line across, to compare with
};

struct Axis {
  std::string label;
  double low = 0, high = 100;
  double step = 20;           // between ticks
  const char* format = "%g";  // of a tick's number
};

struct LineChart {
  std::string title, caption;  // above and below the panels; may be empty
  Axis x, y;
  std::vector<Panel> panels;
  std::string level_name;   // of the panels' dashed lines, in the legend
  std::size_t columns = 3;  // panels in a row; the legend takes the cell behind the last panel, or lines below

  void write(const std::string& path) const;  // ".svg" or PNG
};

namespace detail {

// Okabe and Ito's colours, which most colour-blind readers can tell apart.
inline const std::array<Ink, 7>& series_inks() {
  static const std::array<Ink, 7> inks = {{{0.00, 0.45, 0.70},
                                           {0.84, 0.37, 0.00},
                                           {0.00, 0.62, 0.45},
                                           {0.80, 0.47, 0.65},
                                           {0.90, 0.62, 0.00},
                                           {0.34, 0.71, 0.91},
                                           {0.35, 0.35, 0.37}}};
  return inks;
}

// Corners of the marks, so that lines can be told apart without colour: disc, square, triangle, pentagon.
inline int corners(std::size_t series) { return std::array<int, 4>{24, 4, 3, 5}[series % 4]; }

class ChartDrawing {
 public:
  explicit ChartDrawing(const LineChart& chart) : chart_(chart) {
    for (const Panel& panel : chart.panels)
      for (const Series& series : panel.series)
        if (std::find(names_.begin(), names_.end(), series.name) == names_.end()) names_.push_back(series.name);
    columns_ = (std::max<std::size_t>)(1, (std::min)(chart.columns, chart.panels.size()));
    // The legend stands in a free cell of the last row if there is one, else in lines of its own.
    legend_in_cell_ = chart.panels.size() % columns_ != 0;
    rows_ = (chart.panels.size() + columns_ - 1) / columns_;
    top_ = chart.title.empty() ? 24 : 76;
    bottom_ = (chart.caption.empty() ? 16 : 58) + (legend_in_cell_ ? 0 : 12 + 32 * legend_lines());
  }

  double width() const { return 2 * margin + static_cast<double>(columns_) * cell_width - gap; }
  double height() const { return top_ + static_cast<double>(rows_) * cell_height + bottom_; }

  void draw(Canvas& canvas) const {
    canvas.text(chart_.title, margin, 46, 22, ink::black, Align::left, Weight::bold);
    if (!chart_.caption.empty())
      canvas.paragraph(chart_.caption, margin, height() - 38, width() - 2 * margin, small, ink::grey);
    for (std::size_t i = 0; i < chart_.panels.size(); ++i)
      draw_panel(canvas, chart_.panels[i], cell(i), i % columns_ == 0);
    draw_legend(canvas);
  }

 private:
  static constexpr double margin = 40, cell_width = 430, cell_height = 350, gap = 40, small = 14, medium = 16;

  Box cell(std::size_t i) const {
    return {margin + cell_width * static_cast<double>(i % columns_),
            top_ + cell_height * static_cast<double>(i / columns_), cell_width - gap, cell_height};
  }
  // A point in the panel's plot area; what lies past an axis' end is drawn at its end.
  static double place(const Axis& axis, double value) {
    return ((std::clamp)(value, axis.low, axis.high) - axis.low) / (axis.high - axis.low);
  }
  std::size_t index(const std::string& name) const {
    return static_cast<std::size_t>(std::find(names_.begin(), names_.end(), name) - names_.begin());
  }
  static const Ink& colour(std::size_t series) { return series_inks()[series % series_inks().size()]; }

  void draw_panel(Canvas& canvas, const Panel& panel, const Box& area, bool first) const {
    const Box plot{area.x + 62, area.y + 34, area.width - 62, area.height - 34 - 84};
    canvas.text(panel.title, plot.x, area.y + 18, medium, ink::black, Align::left, Weight::bold);
    draw_axes(canvas, plot, first);
    if (panel.level) {
      const double y = plot.bottom() - plot.height * place(chart_.y, *panel.level);
      canvas.line(plot.x, y, plot.right(), y, ink::black, 1.5, 6);
    }
    for (const Series& series : panel.series) {
      const std::size_t number = index(series.name);
      std::vector<std::array<double, 2>> points;
      for (const auto& [x, y] : series.points)
        points.push_back({plot.x + plot.width * place(chart_.x, x), plot.bottom() - plot.height * place(chart_.y, y)});
      if (series.joined) canvas.polyline(points, colour(number), 2);
      for (const auto& [x, y] : points) canvas.mark(x, y, 5, corners(number), colour(number));
    }
  }

  void draw_axes(Canvas& canvas, const Box& plot, bool first) const {
    const auto ticks = [](const Axis& axis) { return static_cast<int>((axis.high - axis.low) / axis.step + 1e-6); };
    for (int i = 0; i <= ticks(chart_.y); ++i) {
      const double value = chart_.y.low + chart_.y.step * i, y = plot.bottom() - plot.height * place(chart_.y, value);
      canvas.line(plot.x, y, plot.right(), y, i == 0 ? ink::grey : ink::line);
      canvas.text(format(chart_.y.format, value), plot.x - 8, y + 5, small, ink::grey, Align::right);
    }
    for (int i = 0; i <= ticks(chart_.x); ++i) {
      const double value = chart_.x.low + chart_.x.step * i, x = plot.x + plot.width * place(chart_.x, value);
      canvas.line(x, plot.bottom(), x, plot.bottom() + 5, ink::grey);
      canvas.text(format(chart_.x.format, value), x, plot.bottom() + 22, small, ink::grey, Align::centre);
    }
    canvas.text(chart_.x.label, plot.x + plot.width / 2, plot.bottom() + 46, small, ink::grey, Align::centre);
    if (first) canvas.text_upwards(chart_.y.label, plot.x - 52, plot.y + plot.height / 2, small, ink::grey);
  }

  // Names that are short enough stand two to a panel's width.
  std::size_t legend_columns() const {
    std::size_t longest = chart_.level_name.size();
    for (const std::string& name : names_) longest = (std::max)(longest, name.size());
    return legend_in_cell_ ? 1 : longest <= 18 ? 2 * columns_ : columns_;
  }
  double legend_lines() const {
    const std::size_t entries = names_.size() + (chart_.level_name.empty() ? 0 : 1);
    return static_cast<double>((entries + legend_columns() - 1) / legend_columns());
  }

  void draw_legend(Canvas& canvas) const {
    const Box free = cell(chart_.panels.size());
    const double left = legend_in_cell_ ? free.x + 62 : margin;
    const double top = legend_in_cell_ ? free.y + 52 : top_ + cell_height * static_cast<double>(rows_) + 10;
    const double slot = (width() - 2 * margin + gap) / static_cast<double>(legend_columns());
    const auto entry = [&](std::size_t i, const std::string& name, const Ink& ink, double dash) {
      const double x = left + slot * static_cast<double>(i % legend_columns());
      const double y = top + 32 * static_cast<double>(i / legend_columns());
      canvas.line(x, y, x + 34, y, ink, dash > 0 ? 1.5 : 2, dash);
      if (dash <= 0) canvas.mark(x + 17, y, 5, corners(i), ink);
      canvas.text(name, x + 46, y + 5, medium);
    };
    for (std::size_t i = 0; i < names_.size(); ++i) entry(i, names_[i], colour(i), 0);
    if (!chart_.level_name.empty()) entry(names_.size(), chart_.level_name, ink::black, 6);
  }

  const LineChart& chart_;
  std::vector<std::string> names_;  // of all series, in order of appearance
  std::size_t columns_ = 1, rows_ = 1;
  bool legend_in_cell_ = false;
  double top_ = 0, bottom_ = 0;
};

}  // namespace detail

inline void LineChart::write(const std::string& path) const {
  if (panels.empty() || !(x.high > x.low && y.high > y.low && x.step > 0 && y.step > 0))
    throw std::invalid_argument("a chart needs a panel, and axes that go upwards");
  const detail::ChartDrawing drawing(*this);
  write_drawing(path, drawing.width(), drawing.height(), [&](Canvas& canvas) { drawing.draw(canvas); });
}

}  // namespace common

// A sheet to draw on, written as PNG or SVG: the little of cairo that the figures need.
#pragma once

#include <cairo-svg.h>
#include <cairo.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "picture.hpp"

namespace common {

struct Ink {
  double red, green, blue, alpha = 1;  // each in [0, 1]
};

namespace ink {
inline constexpr Ink paper{1, 1, 1}, black{0.10, 0.11, 0.13}, grey{0.42, 0.44, 0.47}, line{0.82, 0.83, 0.85};
inline constexpr Ink blue{0.00, 0.45, 0.70}, vermilion{0.86, 0.28, 0.10};
}  // namespace ink

// viridis (van der Walt and Smith, matplotlib 2015): even steps of value are even steps of lightness. As the
// degree-6 fit of Matt Zucker (public domain). t in [0, 1].
inline Ink viridis(double t) {
  constexpr double c[7][3] = {{0.2777273272234177, 0.005407344544966578, 0.3340998053353061},
                              {0.1050930431085774, 1.404613529898575, 1.384590162594685},
                              {-0.3308618287255563, 0.214847559468213, 0.09509516302823659},
                              {-4.634230498983486, -5.799100973351585, -19.33244095627987},
                              {6.228269936347081, 14.17993336680509, 56.69055260068105},
                              {4.776384997670288, -13.74514537774601, -65.35303263337234},
                              {-5.435455855934631, 4.645852612178535, 26.3124352495832}};
  t = (std::clamp)(t, 0.0, 1.0);
  double rgb[3] = {};
  for (int power = 6; power >= 0; --power)
    for (int channel = 0; channel < 3; ++channel) rgb[channel] = rgb[channel] * t + c[power][channel];
  return {(std::clamp)(rgb[0], 0.0, 1.0), (std::clamp)(rgb[1], 0.0, 1.0), (std::clamp)(rgb[2], 0.0, 1.0)};
}

// One number by printf's pattern, with at most a unit behind it.
inline std::string format(const char* pattern, double value) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), pattern, value);
  return text.data();
}

struct Box {
  double x, y, width, height;  // pixels from the top left corner
  double right() const { return x + width; }
  double bottom() const { return y + height; }
};

enum class Align { left, centre, right };
enum class Weight { normal, bold };

class Canvas {
 public:
  explicit Canvas(cairo_surface_t* surface) : cairo_(cairo_create(surface), cairo_destroy) {}

  void fill(const Box& box, const Ink& colour) {
    set(colour);
    cairo_rectangle(cairo(), box.x, box.y, box.width, box.height);
    cairo_fill(cairo());
  }
  void outline(const Box& box, const Ink& colour, double width = 1) {
    set(colour);
    cairo_set_line_width(cairo(), width);
    cairo_rectangle(cairo(), box.x, box.y, box.width, box.height);
    cairo_stroke(cairo());
  }
  void line(double x0, double y0, double x1, double y1, const Ink& colour, double width = 1, double dash = 0) {
    set(colour);
    cairo_set_line_width(cairo(), width);
    if (dash > 0) cairo_set_dash(cairo(), &dash, 1, 0);
    cairo_move_to(cairo(), x0, y0);
    cairo_line_to(cairo(), x1, y1);
    cairo_stroke(cairo());
    cairo_set_dash(cairo(), nullptr, 0, 0);
  }
  void polyline(const std::vector<std::array<double, 2>>& points, const Ink& colour, double width) {
    set(colour);
    cairo_new_path(cairo());  // text leaves a current point behind
    cairo_set_line_width(cairo(), width);
    cairo_set_line_join(cairo(), CAIRO_LINE_JOIN_ROUND);
    for (const auto& point : points) cairo_line_to(cairo(), point[0], point[1]);
    cairo_stroke(cairo());
  }
  // A regular polygon of the area of a disc of that radius; many corners make a disc.
  void mark(double x, double y, double radius, int corners, const Ink& colour) {
    constexpr double turn = 6.283185307179586;
    const double angle = turn / corners, reach = radius * std::sqrt(angle / std::sin(angle));
    const double start = corners == 4 ? turn / 8 : turn / 4;  // squares lie flat, the others point upwards
    cairo_new_path(cairo());
    for (int i = 0; i < corners; ++i)
      cairo_line_to(cairo(), x + reach * std::cos(start + angle * i), y - reach * std::sin(start + angle * i));
    cairo_close_path(cairo());
    set(colour);
    cairo_fill_preserve(cairo());
    set(ink::paper);
    cairo_set_line_width(cairo(), 1);
    cairo_stroke(cairo());
  }

  // `y` is the base line. Returns the width in pixels.
  double text(const std::string& words, double x, double y, double size, const Ink& colour = ink::black,
              Align align = Align::left, Weight weight = Weight::normal) {
    const double width = text_width(words, size, weight);
    set(colour);
    cairo_move_to(cairo(), x - (align == Align::left ? 0 : align == Align::right ? width : width / 2), y);
    cairo_show_text(cairo(), words.c_str());
    return width;
  }
  // Broken into lines of at most `width` pixels. Returns the base line of the last.
  double paragraph(const std::string& words, double x, double y, double width, double size, const Ink& colour) {
    std::istringstream in(words);
    std::string line;
    for (std::string word; in >> word;) {
      const std::string longer = line.empty() ? word : line + " " + word;
      if (!line.empty() && text_width(longer, size) > width) {
        text(line, x, y, size, colour);
        y += size * 1.45;
        line = word;
      } else {
        line = longer;
      }
    }
    text(line, x, y, size, colour);
    return y;
  }
  // Read from bottom to top, centred on (x, y).
  void text_upwards(const std::string& words, double x, double y, double size, const Ink& colour) {
    cairo_save(cairo());
    cairo_translate(cairo(), x, y);
    cairo_rotate(cairo(), -1.5707963267948966);
    text(words, 0, 0, size, colour, Align::centre);
    cairo_restore(cairo());
  }
  double text_width(const std::string& words, double size, Weight weight = Weight::normal) {
    cairo_select_font_face(cairo(), "DejaVu Sans", CAIRO_FONT_SLANT_NORMAL,
                           weight == Weight::bold ? CAIRO_FONT_WEIGHT_BOLD : CAIRO_FONT_WEIGHT_NORMAL);
    cairo_set_font_size(cairo(), size);
    cairo_text_extents_t extents{};
    cairo_text_extents(cairo(), words.c_str(), &extents);
    return extents.x_advance;
  }

  // Every pixel becomes a rectangle with sharp edges.
  void picture(const Picture& picture, const Box& box) {
    const int stride = cairo_format_stride_for_width(CAIRO_FORMAT_RGB24, picture.width);
    std::vector<std::uint8_t> rows(static_cast<std::size_t>(stride) * static_cast<std::size_t>(picture.height));
    for (int y = 0; y < picture.height; ++y)
      for (int x = 0; x < picture.width; ++x) {
        const std::size_t from = static_cast<std::size_t>(y * picture.width + x) * 3;
        const std::uint32_t rgb = std::uint32_t{picture.pixels[from]} << 16 |
                                  std::uint32_t{picture.pixels[from + 1]} << 8 | picture.pixels[from + 2];
        std::memcpy(rows.data() + y * stride + x * 4, &rgb, sizeof(rgb));
      }
    cairo_surface_t* surface =
        cairo_image_surface_create_for_data(rows.data(), CAIRO_FORMAT_RGB24, picture.width, picture.height, stride);
    cairo_save(cairo());
    cairo_translate(cairo(), box.x, box.y);
    cairo_scale(cairo(), box.width / picture.width, box.height / picture.height);
    cairo_set_source_surface(cairo(), surface, 0, 0);
    cairo_pattern_set_filter(cairo_get_source(cairo()), CAIRO_FILTER_NEAREST);
    cairo_rectangle(cairo(), 0, 0, picture.width, picture.height);
    cairo_fill(cairo());
    cairo_restore(cairo());
    cairo_surface_finish(surface);
    cairo_surface_destroy(surface);
  }

  cairo_status_t status() const { return cairo_status(cairo_.get()); }

 private:
  cairo_t* cairo() const { return cairo_.get(); }
  void set(const Ink& colour) { cairo_set_source_rgba(cairo(), colour.red, colour.green, colour.blue, colour.alpha); }

  std::unique_ptr<cairo_t, void (*)(cairo_t*)> cairo_;
};

// Calls draw(canvas) on a white sheet of width x height pixels and writes it: as SVG where the path ends in
// ".svg", else as PNG.
template <class Draw>
void write_drawing(const std::string& path, double width, double height, const Draw& draw) {
  const bool svg = path.size() >= 4 && path.compare(path.size() - 4, 4, ".svg") == 0;
  const std::unique_ptr<cairo_surface_t, void (*)(cairo_surface_t*)> surface(
      svg ? cairo_svg_surface_create(path.c_str(), width, height)
          : cairo_image_surface_create(CAIRO_FORMAT_RGB24, static_cast<int>(width), static_cast<int>(height)),
      cairo_surface_destroy);
  cairo_status_t status = cairo_surface_status(surface.get());
  if (status == CAIRO_STATUS_SUCCESS) {
    Canvas canvas(surface.get());
    canvas.fill({0, 0, width, height}, ink::paper);
    draw(canvas);
    status = canvas.status();
  }
  if (svg) cairo_surface_finish(surface.get());
  if (status == CAIRO_STATUS_SUCCESS)
    status = svg ? cairo_surface_status(surface.get()) : cairo_surface_write_to_png(surface.get(), path.c_str());
  if (status != CAIRO_STATUS_SUCCESS)
    throw std::runtime_error("cannot write the drawing " + path + ": " + cairo_status_to_string(status));
}

}  // namespace common

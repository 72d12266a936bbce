// Pictures of coloured handwritten digits on a noisy background, and questions about them.
//
// Everything but the training (train/train.py, by the same rules) draws with this one file. Only integer arithmetic is
// used, so a seed gives the same pictures on every machine.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "mnist.hpp"

namespace scenes {

// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  // Uniform in [low, high].
  int between(int low, int high) { return low + static_cast<int>(next() % static_cast<std::uint64_t>(high - low + 1)); }
  bool percent(int chance) { return between(0, 99) < chance; }

 private:
  std::uint64_t state_;
};

struct Colour {
  const char* name;
  std::array<int, 3> rgb;
};

inline constexpr std::array<Colour, 8> colours = {{{"red", {230, 40, 40}},
                                                   {"green", {40, 200, 60}},
                                                   {"blue", {60, 90, 240}},
                                                   {"yellow", {240, 220, 40}},
                                                   {"purple", {200, 60, 220}},
                                                   {"cyan", {40, 210, 220}},
                                                   {"white", {245, 245, 245}},
                                                   {"orange", {250, 140, 30}}}};

inline constexpr int picture_side = 192;                       // pixels
inline constexpr int cell_columns = 6;                         // cells in a row of the picture, and rows
inline constexpr int cell_side = picture_side / cell_columns;  // pixels
inline constexpr int cells = cell_columns * cell_columns;
inline constexpr int max_digits = 12;

struct Digit {
  int digit;   // 0..9
  int colour;  // index into colours; no two digits of a picture have both alike
  int cell;    // in reading order, no two alike

  int row() const { return cell / cell_columns; }
  int column() const { return cell % cell_columns; }
  std::string name() const { return colours[static_cast<std::size_t>(colour)].name + (" " + std::to_string(digit)); }
};

struct Scene {
  std::vector<Digit> digits;
  std::vector<std::uint8_t> pixels;  // [192, 192, 3] RGB

  const Digit* at(int cell) const {  // null where the cell is empty
    for (const Digit& d : digits)
      if (d.cell == cell) return &d;
    return nullptr;
  }
};

// MNIST images sorted by their digit.
class DigitBox {
 public:
  explicit DigitBox(const Mnist& mnist) : mnist_(mnist) {
    for (std::size_t i = 0; i < mnist.count(); ++i) by_digit_[mnist.labels[i]].push_back(i);
    for (const auto& images : by_digit_)
      if (images.empty()) throw std::runtime_error("the MNIST files hold no image of some digit");
  }
  const std::uint8_t* draw(int digit, Random& random) const {
    const auto& images = by_digit_[static_cast<std::size_t>(digit)];
    return mnist_.image(images[random.next() % images.size()]);
  }

 private:
  const Mnist& mnist_;
  std::array<std::vector<std::size_t>, 10> by_digit_;
};

// `count` different numbers below `limit`, in random order.
inline std::vector<int> draw_without_repetition(int count, int limit, Random& random) {
  std::vector<int> numbers(static_cast<std::size_t>(limit));
  for (int i = 0; i < limit; ++i) numbers[static_cast<std::size_t>(i)] = i;
  for (int i = 0; i < count; ++i)
    std::swap(numbers[static_cast<std::size_t>(i)], numbers[static_cast<std::size_t>(random.between(i, limit - 1))]);
  numbers.resize(static_cast<std::size_t>(count));
  return numbers;
}

// 0.12 times white noise plus 0.25 times a 7 x 7 noise enlarged bilinearly (half-pixel centres), every channel by itself.
// In 65,536ths of a byte's step: [192, 192, 3].
inline std::vector<std::int64_t> draw_background(Random& random) {
  constexpr int coarse_side = 7, unit = 2 * picture_side;  // places between two coarse pixels, in 384ths
  std::array<std::int64_t, coarse_side * coarse_side * 3> coarse{};
  const auto noise = [&] { return static_cast<std::int64_t>(random.next() >> 48); };  // [0, 65535]
  for (std::int64_t& value : coarse) value = noise();
  const auto place = [](int pixel) { return (std::max)((2 * pixel + 1) * coarse_side - picture_side, 0); };
  std::vector<std::int64_t> out;
  out.reserve(picture_side * picture_side * 3);
  for (int y = 0; y < picture_side; ++y) {
    const int top = place(y) / unit, down = place(y) % unit, bottom = (std::min)(top + 1, coarse_side - 1);
    for (int x = 0; x < picture_side; ++x) {
      const int left = place(x) / unit, along = place(x) % unit, right = (std::min)(left + 1, coarse_side - 1);
      for (int c = 0; c < 3; ++c) {
        const auto at = [&](int row, int column) {
          return coarse[static_cast<std::size_t>((row * coarse_side + column) * 3 + c)];
        };
        const std::int64_t smooth = ((at(top, left) * (unit - along) + at(top, right) * along) * (unit - down) +
                                     (at(bottom, left) * (unit - along) + at(bottom, right) * along) * down) /
                                    (unit * unit);
        out.push_back(255 * (12 * noise() + 25 * smooth) / 100);
      }
    }
  }
  return out;
}

// A scene of `count` digits, 1 to 12: in cells of their own, moved by up to 4 pixels right and down.
inline Scene draw_scene(int count, const DigitBox& box, Random& random) {
  Scene scene;
  const std::vector<int> places = draw_without_repetition(count, cells, random);
  const std::vector<int> names = draw_without_repetition(count, 10 * static_cast<int>(colours.size()), random);
  std::vector<std::int64_t> picture = draw_background(random);
  for (std::size_t i = 0; i < places.size(); ++i) {
    const Digit digit{names[i] / 8, names[i] % 8, places[i]};
    const std::uint8_t* ink = box.draw(digit.digit, random);
    const int top = digit.row() * cell_side + random.between(0, cell_side - Mnist::side);
    const int left = digit.column() * cell_side + random.between(0, cell_side - Mnist::side);
    const std::array<int, 3>& rgb = colours[static_cast<std::size_t>(digit.colour)].rgb;
    for (int row = 0; row < Mnist::side; ++row)
      for (int column = 0; column < Mnist::side; ++column)
        for (int c = 0; c < 3; ++c) {
          const std::int64_t alpha = ink[row * Mnist::side + column];
          std::int64_t& value = picture[static_cast<std::size_t>(((top + row) * picture_side + left + column) * 3 + c)];
          value = (value * (255 - alpha) + alpha * 65536 * rgb[static_cast<std::size_t>(c)]) / 255;
        }
    scene.digits.push_back(digit);
  }
  scene.pixels.reserve(picture.size());
  for (const std::int64_t value : picture) scene.pixels.push_back(static_cast<std::uint8_t>((value + 32768) / 65536));
  return scene;
}

enum class Kind { at, where, count, row, right };
inline constexpr std::array<const char*, 5> kind_names = {"at", "where", "count", "row", "right of"};

struct Question {
  Kind kind;
  std::string text;
  std::string answer;
};

// A question about one digit of the scene, and now and then about a place, colour or row that has none.
inline Question ask(Kind kind, const Scene& scene, Random& random) {
  const Digit& one = scene.digits[random.next() % scene.digits.size()];
  const auto number = [](int index) { return std::to_string(index + 1); };
  switch (kind) {
    case Kind::at: {
      const int cell = random.percent(75) ? one.cell : random.between(0, cells - 1);
      const Digit* there = scene.at(cell);
      return {kind, "what is at row " + number(cell / cell_columns) + " column " + number(cell % cell_columns) + " ?",
              there != nullptr ? there->name() : "nothing"};
    }
    case Kind::where:
      return {kind, "where is the " + one.name() + " ?",
              "row " + number(one.row()) + " column " + number(one.column())};
    case Kind::count: {
      const int colour = random.percent(70) ? one.colour : random.between(0, static_cast<int>(colours.size()) - 1);
      const auto count =
          std::count_if(scene.digits.begin(), scene.digits.end(), [&](const Digit& d) { return d.colour == colour; });
      return {kind, std::string("how many ") + colours[static_cast<std::size_t>(colour)].name + " digits are there ?",
              std::to_string(count)};
    }
    case Kind::row: {
      const int row = random.percent(85) ? one.row() : random.between(0, cell_columns - 1);
      std::string answer;
      for (int column = 0; column < cell_columns; ++column)
        if (const Digit* d = scene.at(row * cell_columns + column))
          answer += (answer.empty() ? "" : " ") + std::to_string(d->digit);
      return {kind, "list the digits in row " + number(row) + " .", answer.empty() ? "none" : answer};
    }
    case Kind::right: break;
  }
  const Digit* next = nullptr;
  for (int column = one.column() + 1; column < cell_columns && next == nullptr; ++column)
    next = scene.at(one.row() * cell_columns + column);
  return {Kind::right, "what is right of the " + one.name() + " ?", next != nullptr ? next->name() : "nothing"};
}

}  // namespace scenes

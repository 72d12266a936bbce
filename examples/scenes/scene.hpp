// Pictures of coloured handwritten digits on a noisy background, and questions about them.
//
// Training (draw_scenes | train.py) and evaluation (evaluate) draw with this one file. Only integer
// arithmetic is used, so a seed gives the same pictures on every machine.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
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
  template <class Range>
  void shuffle(Range& range) {
    for (int i = static_cast<int>(range.size()) - 1; i > 0; --i)
      std::swap(range[static_cast<std::size_t>(i)], range[static_cast<std::size_t>(between(0, i))]);
  }

 private:
  std::uint64_t state_;
};

struct Colour {
  const char* name;
  std::array<int, 3> rgb;
};

inline constexpr std::array<Colour, 8> colours = {{{"red", {220, 40, 40}},
                                                   {"green", {50, 180, 60}},
                                                   {"blue", {60, 90, 235}},
                                                   {"yellow", {235, 220, 50}},
                                                   {"orange", {240, 135, 25}},
                                                   {"purple", {160, 60, 200}},
                                                   {"cyan", {60, 210, 220}},
                                                   {"white", {240, 240, 240}}}};

inline constexpr int picture_side = 96;  // pixels
inline constexpr int max_digits = 6;

struct Digit {
  int digit;   // 0..9, no two alike in one picture
  int colour;  // index into colours, no two alike in one picture
  int x, y;    // centre, pixels from the top left corner
};

struct Scene {
  std::vector<Digit> digits;
  std::vector<std::uint8_t> pixels;  // [96, 96, 3] RGB
  std::vector<std::uint8_t> owner;   // [96, 96]: 0 = background, i + 1 = ink of digits[i]
};

// Centres that keep every question unambiguous: no two digits overlap by more than 2 of their 20
// pixels, no two are within 4 pixels of one column (left to right is clear), and none is within
// 3 pixels of a middle line (top or bottom, left or right is clear).
inline std::vector<Digit> place_digits(int count, Random& random) {
  constexpr int margin = 12, middle = picture_side / 2;
  std::array<int, 10> digit_order{0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  std::array<int, colours.size()> colour_order{0, 1, 2, 3, 4, 5, 6, 7};
  random.shuffle(digit_order);
  random.shuffle(colour_order);
  for (;;) {
    std::vector<Digit> placed;
    for (int attempt = 0; attempt < 50 && static_cast<int>(placed.size()) < count; ++attempt) {
      const int x = random.between(margin, picture_side - margin);
      const int y = random.between(margin, picture_side - margin);
      const bool clear = std::abs(x - middle) >= 3 && std::abs(y - middle) >= 3 &&
                         std::none_of(placed.begin(), placed.end(), [&](const Digit& other) {
                           const int dx = std::abs(x - other.x), dy = std::abs(y - other.y);
                           return dx < 4 || (std::max)(dx, dy) < 18;
                         });
      const std::size_t i = placed.size();
      if (clear) placed.push_back({digit_order[i], colour_order[i], x, y});
    }
    if (static_cast<int>(placed.size()) == count) return placed;
  }
}

inline std::uint8_t clamp_byte(int value) { return static_cast<std::uint8_t>((std::clamp)(value, 0, 255)); }

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

inline Scene draw_scene(int count, const DigitBox& box, Random& random) {
  Scene scene;
  scene.digits = place_digits(count, random);
  scene.pixels.resize(picture_side * picture_side * 3);
  scene.owner.assign(picture_side * picture_side, 0);

  // Background: one dark tint, and noise on every channel of every pixel (triangular, +-36).
  std::array<int, 3> tint{};
  const int grey = random.between(25, 75);
  for (int& channel : tint) channel = grey + random.between(-12, 12);
  for (std::size_t i = 0; i < scene.pixels.size(); ++i)
    scene.pixels[i] = clamp_byte(tint[i % 3] + random.between(-18, 18) + random.between(-18, 18));

  for (std::size_t d = 0; d < scene.digits.size(); ++d) {
    const Digit& digit = scene.digits[d];
    const std::uint8_t* ink = box.draw(digit.digit, random);
    std::array<int, 3> rgb = colours[static_cast<std::size_t>(digit.colour)].rgb;
    for (int& channel : rgb) channel += random.between(-14, 14);
    for (int row = 0; row < Mnist::side; ++row)
      for (int column = 0; column < Mnist::side; ++column) {
        const int x = digit.x + column - Mnist::side / 2, y = digit.y + row - Mnist::side / 2;
        const int alpha = ink[row * Mnist::side + column];
        if (alpha == 0 || x < 0 || y < 0 || x >= picture_side || y >= picture_side) continue;
        const std::size_t pixel = static_cast<std::size_t>(y * picture_side + x);
        for (std::size_t c = 0; c < 3; ++c) {
          std::uint8_t& value = scene.pixels[pixel * 3 + c];
          value = clamp_byte((value * (255 - alpha) + rgb[c] * alpha) / 255);
        }
        if (alpha >= 96) scene.owner[pixel] = static_cast<std::uint8_t>(d + 1);
      }
  }
  return scene;
}

enum class Kind { colour, digit, place, count, list };
inline constexpr std::array<const char*, 5> kind_names = {"colour", "digit", "place", "count", "list"};

struct Question {
  Kind kind;
  std::string text;
  std::string answer;
};

// A question about one digit of the scene, drawn at random where the kind needs one.
inline Question ask(Kind kind, const Scene& scene, Random& random) {
  static constexpr std::array<const char*, 7> numbers = {"none", "one", "two", "three", "four", "five", "six"};
  const Digit& one = scene.digits[random.next() % scene.digits.size()];
  const std::string digit = std::to_string(one.digit);
  const std::string colour = colours[static_cast<std::size_t>(one.colour)].name;
  switch (kind) {
    case Kind::colour: return {kind, "what colour is the " + digit + " ?", colour};
    case Kind::digit: return {kind, "which digit is " + colour + " ?", digit};
    case Kind::place: {
      const std::string row = one.y < picture_side / 2 ? "top" : "bottom";
      return {kind, "where is the " + digit + " ?", row + (one.x < picture_side / 2 ? " left" : " right")};
    }
    case Kind::count: return {kind, "how many digits are there ?", numbers[scene.digits.size()]};
    case Kind::list: break;
  }
  std::vector<Digit> in_order = scene.digits;
  std::sort(in_order.begin(), in_order.end(), [](const Digit& a, const Digit& b) { return a.x < b.x; });
  std::string answer;
  for (const Digit& d : in_order) answer += (answer.empty() ? "" : " ") + std::to_string(d.digit);
  return {Kind::list, "list the digits from left to right .", answer};
}

}  // namespace scenes

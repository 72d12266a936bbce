// Pictures: read from PNG or JPEG, fitted to the square the model was taught on, and turned into numbers.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace common {

struct Picture {
  int width = 0, height = 0;         // pixels
  std::vector<std::uint8_t> pixels;  // [height, width, 3] RGB
};

// A file that is no picture, or one that cannot be used. what() is one sentence that names the file.
class PictureError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Longer sides are refused: fitting pads to a square, so 10,000 pixels are 300 MB already.
inline constexpr int max_picture_side = 10000;

// Decodes the bytes of a PNG or JPEG file; `name` is what an error calls it. Transparency is dropped.
Picture decode_picture(const std::vector<std::uint8_t>& bytes, const std::string& name);
Picture load_picture(const std::string& path);
void save_png(const Picture& picture, const std::string& path);

// How a model wants its pictures: preprocessor_config.json.
struct Preprocessor {
  int side = 0;               // pixels of the square
  float rescale = 1 / 255.f;  // bytes -> [0, 1]
  std::array<float, 3> mean{}, deviation{};
};

Preprocessor load_preprocessor(const std::string& path);

// Centred on a square whose empty part has the mean colour, as LLaVA does it (expand2square), so that
// nothing is cut off or stretched.
Picture pad_to_square(const Picture& picture, const std::array<float, 3>& mean);

// Resized to side x side, antialiased, by the bicubic filter that CLIP's preprocessing uses.
Picture resize(const Picture& picture, int side);

// Padded and resized. A picture of the model's own size comes back unchanged, bit for bit.
Picture fit(const Picture& picture, const Preprocessor& preprocessor);

// (value * rescale - mean) / deviation, channel by channel: [height, width, 3] bytes -> [3, height, width].
std::vector<float> normalise(const Picture& picture, const Preprocessor& preprocessor);

}  // namespace common

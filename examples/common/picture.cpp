#include "picture.hpp"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>

// The one place where stb is compiled. Only the two formats people have; the others have loose signatures
// (any text may pass for a TGA) and thinner testing.
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_NO_STDIO
#define STB_IMAGE_STATIC
#include <stb/stb_image.h>
#define STB_IMAGE_RESIZE_IMPLEMENTATION
#define STB_IMAGE_RESIZE_STATIC
#include <stb/stb_image_resize.h>
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STB_IMAGE_WRITE_STATIC
#define STBI_WRITE_NO_STDIO
#include <stb/stb_image_write.h>

namespace common {

namespace {

constexpr std::size_t max_file_bytes = std::size_t{1} << 28;

std::size_t pixel_count(int width, int height) {
  return static_cast<std::size_t>(width) * static_cast<std::size_t>(height);
}

std::string size_of(int width, int height) { return std::to_string(width) + " x " + std::to_string(height); }

std::vector<std::uint8_t> read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw PictureError("cannot open the picture " + path + ": " + std::strerror(errno));
  std::vector<std::uint8_t> bytes;
  std::array<char, 1 << 16> block{};
  // Read in blocks up to a limit, since the path may be a device or a pipe that never ends.
  while (in.read(block.data(), block.size()), in.gcount() > 0) {
    bytes.insert(bytes.end(), block.begin(), block.begin() + in.gcount());
    if (bytes.size() > max_file_bytes)
      throw PictureError(path + " is too large for a picture: at most 256 MiB are read");
  }
  if (in.bad()) throw PictureError("cannot read the picture " + path + ": " + std::strerror(errno));
  return bytes;
}

// stb's reasons are two or three words, such as "bad IDAT"; one of them is no reason at all.
std::string reason() {
  const char* words = stbi_failure_reason();
  if (words == nullptr || std::strcmp(words, "unknown image type") == 0)
    return "is no picture: it is neither a PNG nor a JPEG file";
  return "is a damaged picture: " + std::string(words);
}

// Whether every Huffman table of a JPEG has at most 256 codes, as the standard says. The stb of Debian 12 does not
// ask and writes behind its tables. Walks over the segments as stb does.
bool huffman_tables_fit(const std::vector<std::uint8_t>& bytes) {
  const auto at = [&](std::size_t i) { return i < bytes.size() ? bytes[i] : std::uint8_t{0}; };
  for (std::size_t i = 0; i + 1 < bytes.size();) {
    const std::uint8_t marker = bytes[i + 1];
    if (bytes[i] != 0xFF || marker == 0xFF) {  // picture data or filling
      ++i;
      continue;
    }
    if (marker == 0xD9) return true;                                                // end of the picture
    if (marker == 0 || marker == 1 || (marker & 0xF8) == 0xD0 || marker == 0xD8) {  // no segment follows these
      i += 2;
      continue;
    }
    const std::size_t end = i + 2 + (std::size_t{at(i + 2)} << 8) + at(i + 3);
    for (std::size_t table = i + 4; marker == 0xC4 && table < end;) {
      std::size_t codes = 0;
      for (std::size_t length = 1; length <= 16; ++length) codes += at(table + length);
      if (codes > 256) return false;
      table += 17 + codes;
    }
    i = (std::max)(end, i + 2);
  }
  return true;
}

}  // namespace

Picture decode_picture(const std::vector<std::uint8_t>& bytes, const std::string& name) {
  if (bytes.empty()) throw PictureError(name + " is no picture: the file is empty");
  if (bytes.size() > max_file_bytes) throw PictureError(name + " is too large for a picture: at most 256 MiB are read");
  if (bytes[0] == 0xFF && !huffman_tables_fit(bytes))
    throw PictureError(name + " is a damaged picture: a Huffman table is too long");
  const int count = static_cast<int>(bytes.size());
  int width = 0, height = 0, channels = 0;
  // The header first: a file of a few bytes may claim any size, so look before memory is asked for.
  if (stbi_info_from_memory(bytes.data(), count, &width, &height, &channels) == 0)
    throw PictureError(name + " " + reason());
  if (width < 1 || height < 1) throw PictureError(name + " has no pixels: it is " + size_of(width, height));
  if (width > max_picture_side || height > max_picture_side)
    throw PictureError(name + " is " + size_of(width, height) + " pixels, but at most " +
                       size_of(max_picture_side, max_picture_side) + " can be used: make it smaller");
  const std::unique_ptr<stbi_uc, void (*)(void*)> data(
      stbi_load_from_memory(bytes.data(), count, &width, &height, &channels, 3), stbi_image_free);
  if (!data) throw PictureError(name + " " + reason());
  return {width, height, {data.get(), data.get() + pixel_count(width, height) * 3}};
}

Picture load_picture(const std::string& path) { return decode_picture(read_file(path), path); }

void save_png(const Picture& picture, const std::string& path) {
  std::ofstream out(path, std::ios::binary);
  const auto write = [](void* stream, void* data, int size) {
    static_cast<std::ofstream*>(stream)->write(static_cast<const char*>(data), size);
  };
  if (!out || stbi_write_png_to_func(write, &out, picture.width, picture.height, 3, picture.pixels.data(),
                                     picture.width * 3) == 0)
    throw PictureError("cannot write " + path + ": " + std::strerror(errno));
  out.close();
  if (!out) throw PictureError("cannot write " + path + ": " + std::strerror(errno));
}

Preprocessor load_preprocessor(const std::string& path) {
  std::ifstream in(path);
  if (!in) throw std::runtime_error("cannot open " + path);
  try {
    const nlohmann::json json = nlohmann::json::parse(in);
    Preprocessor preprocessor;
    const nlohmann::json& size = json.at("size");
    const nlohmann::json& side = size.contains("height") ? size["height"] : size.at("shortest_edge");
    if (!side.is_number_integer() || side < 1 || side > max_picture_side)
      throw std::runtime_error("its picture size is " + side.dump());
    preprocessor.side = side;
    preprocessor.rescale = json.value("rescale_factor", 1 / 255.f);
    preprocessor.mean = json.at("image_mean").get<std::array<float, 3>>();
    preprocessor.deviation = json.at("image_std").get<std::array<float, 3>>();
    return preprocessor;
  } catch (const std::exception& error) {
    throw std::runtime_error(path + " does not say how to prepare a picture: " + error.what());
  }
}

Picture pad_to_square(const Picture& picture, const std::array<float, 3>& mean) {
  if (picture.width == picture.height) return picture;
  const int side = (std::max)(picture.width, picture.height);
  Picture square{side, side, std::vector<std::uint8_t>(pixel_count(side, side) * 3)};
  for (std::size_t i = 0; i < square.pixels.size(); ++i)
    square.pixels[i] = static_cast<std::uint8_t>(mean[i % 3] * 255);  // cut off, not rounded, as LLaVA's code
  const int left = (side - picture.width) / 2, top = (side - picture.height) / 2;
  const std::size_t row_bytes = static_cast<std::size_t>(picture.width) * 3;
  for (int row = 0; row < picture.height; ++row)
    std::copy_n(picture.pixels.data() + static_cast<std::size_t>(row) * row_bytes, row_bytes,
                square.pixels.data() + (pixel_count(side, top + row) + static_cast<std::size_t>(left)) * 3);
  return square;
}

Picture resize(const Picture& picture, int side) {
  if (picture.width == side && picture.height == side) return picture;
  Picture resized{side, side, std::vector<std::uint8_t>(pixel_count(side, side) * 3)};
  // Catmull-Rom is the cubic with a = -0.5, PIL's BICUBIC; on the bytes as they are, as PIL works on them.
  const int done = stbir_resize_uint8_generic(
      picture.pixels.data(), picture.width, picture.height, 0, resized.pixels.data(), side, side, 0, 3,
      STBIR_ALPHA_CHANNEL_NONE, 0, STBIR_EDGE_CLAMP, STBIR_FILTER_CATMULLROM, STBIR_COLORSPACE_LINEAR, nullptr);
  if (done == 0)
    throw PictureError("not enough memory to resize a picture of " + size_of(picture.width, picture.height));
  return resized;
}

Picture fit(const Picture& picture, const Preprocessor& preprocessor) {
  return resize(pad_to_square(picture, preprocessor.mean), preprocessor.side);
}

std::vector<float> normalise(const Picture& picture, const Preprocessor& preprocessor) {
  const std::size_t plane = pixel_count(picture.width, picture.height);
  std::vector<float> values(plane * 3);
  for (std::size_t channel = 0; channel < 3; ++channel)
    for (std::size_t pixel = 0; pixel < plane; ++pixel) {
      const float unit = static_cast<float>(picture.pixels[pixel * 3 + channel]) * preprocessor.rescale;
      values[channel * plane + pixel] = (unit - preprocessor.mean[channel]) / preprocessor.deviation[channel];
    }
  return values;
}

}  // namespace common

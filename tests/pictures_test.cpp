// Pictures of the examples: read, fitted, normalised, cut into patches, drawn; and files that are none.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "common/canvas.hpp"
#include "common/line_chart.hpp"
#include "common/picture.hpp"
#include "drawing.hpp"
#include "vision.hpp"

// Writes the kinds of files that save_png() does not.
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STB_IMAGE_WRITE_STATIC
#include <stb/stb_image_write.h>

// Under the address sanitizer: fontconfig keeps its fonts until the process ends.
extern "C" const char* __lsan_default_suppressions();
extern "C" const char* __lsan_default_suppressions() { return "leak:libfontconfig"; }

namespace {

using namespace common;
using namespace scenes;
using Bytes = std::vector<std::uint8_t>;

// Every pixel differs from every other: red counts columns, green rows.
Picture ramp(int width, int height) {
  Picture picture{width, height, {}};
  for (int y = 0; y < height; ++y)
    for (int x = 0; x < width; ++x)
      for (const int value : {x * 200 / width, y * 200 / height, 77})
        picture.pixels.push_back(static_cast<std::uint8_t>(value));
  return picture;
}

Picture plain(int width, int height, std::uint8_t value) {
  return {width, height, Bytes(static_cast<std::size_t>(width) * static_cast<std::size_t>(height) * 3, value)};
}

std::array<int, 3> at(const Picture& picture, int x, int y) {
  const std::size_t i = static_cast<std::size_t>(y * picture.width + x) * 3;
  return {picture.pixels[i], picture.pixels[i + 1], picture.pixels[i + 2]};
}

Preprocessor preprocessor(int side) { return {side, 1 / 255.f, {0.5f, 0.25f, 0.f}, {0.5f, 0.5f, 0.25f}}; }

void append(void* bytes, void* data, int size) {
  const auto* begin = static_cast<const std::uint8_t*>(data);
  static_cast<Bytes*>(bytes)->insert(static_cast<Bytes*>(bytes)->end(), begin, begin + size);
}

// A grey picture of two 8 x 8 blocks, 192 and 64, made by hand: constant blocks, one Huffman code for "no more
// coefficients".
Bytes hand_made_jpeg() {
  Bytes bytes = {0xFF, 0xD8, 0xFF, 0xDB, 0, 67, 0};  // quantisation table: 64 times 8
  bytes.insert(bytes.end(), 64, 8);
  const Bytes rest = {
      0xFF, 0xC0, 0, 11, 8,    0, 8, 0, 16, 1, 1,    0x11, 0,                                // 16 x 8, one channel
      0xFF, 0xC4, 0, 21, 0,    0, 2, 0, 0,  0, 0,    0,    0,    0, 0, 0, 0, 0, 0, 0, 0,     // constants: 00, 01 are
      7,    8,                                                                               // of 7 and 8 bits
      0xFF, 0xC4, 0, 20, 0x10, 1, 0, 0, 0,  0, 0,    0,    0,    0, 0, 0, 0, 0, 0, 0, 0, 0,  // 0: end of block
      0xFF, 0xDA, 0, 8,  1,    1, 0, 0, 63, 0, 0x20, 0x17, 0xF7,                             // 00 +64 0, 01 -128 0, 111
      0xFF, 0xD9};
  bytes.insert(bytes.end(), rest.begin(), rest.end());
  return bytes;
}

// A folder that is gone after the test.
class Files : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "pictures_test_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  std::string file(const std::string& name, const Bytes& bytes) const {
    std::ofstream(path(name), std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    return path(name);
  }
  std::string text(const std::string& name, const std::string& words) const {
    return file(name, Bytes(words.begin(), words.end()));
  }
  Bytes png(const Picture& picture) const {
    save_png(picture, path("made.png"));
    std::ifstream in(path("made.png"), std::ios::binary);
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  }

  std::filesystem::path folder_;
};

// The message of the error that `action` ends with.
template <class Error, class Action>
std::string complaint(const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "(no error)";
}

#define EXPECT_SAYS(message, ...)                                                                \
  do {                                                                                           \
    const std::string said = message;                                                            \
    for (const std::string& part : std::vector<std::string>{__VA_ARGS__})                        \
      EXPECT_NE(said.find(part), std::string::npos) << "\"" << part << "\" is not in: " << said; \
  } while (false)

// ---- files --------------------------------------------------------------------------------------

TEST_F(Files, PngComesBackAsItWasSaved) {
  const Picture picture = ramp(13, 7);
  save_png(picture, path("a.png"));
  const Picture read = load_picture(path("a.png"));
  EXPECT_EQ(read.width, 13);
  EXPECT_EQ(read.height, 7);
  EXPECT_EQ(read.pixels, picture.pixels);
}

TEST_F(Files, GreyAndTransparentPngBecomeRgb) {
  const Bytes grey = {10, 20, 30, 40}, rgba = {1, 2, 3, 0, 4, 5, 6, 128, 7, 8, 9, 255, 10, 11, 12, 1};
  Bytes grey_file, rgba_file;
  ASSERT_TRUE(stbi_write_png_to_func(append, &grey_file, 2, 2, 1, grey.data(), 2));
  ASSERT_TRUE(stbi_write_png_to_func(append, &rgba_file, 2, 2, 4, rgba.data(), 8));
  EXPECT_EQ(decode_picture(grey_file, "grey").pixels, (Bytes{10, 10, 10, 20, 20, 20, 30, 30, 30, 40, 40, 40}));
  EXPECT_EQ(decode_picture(rgba_file, "rgba").pixels, (Bytes{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}));
}

TEST_F(Files, JpegIsRead) {
  const Picture read = load_picture(file("a.jpg", hand_made_jpeg()));
  ASSERT_EQ(read.width, 16);
  ASSERT_EQ(read.height, 8);
  for (int y = 0; y < 8; ++y)
    for (int x = 0; x < 16; ++x) {
      const int value = x < 8 ? 192 : 64;
      EXPECT_EQ(at(read, x, y), (std::array<int, 3>{value, value, value})) << x << " " << y;
    }
}

TEST_F(Files, WhatIsNoPictureIsNamedWithTheReason) {
  const auto load = [](const std::string& name) { return complaint<PictureError>([&] { load_picture(name); }); };
  EXPECT_SAYS(load(path("absent.png")), path("absent.png"), "No such file");
  EXPECT_SAYS(load(folder_.string()), folder_.string(), "directory");
  EXPECT_SAYS(load(file("empty.png", {})), path("empty.png"), "empty");
  EXPECT_SAYS(load(text("notes.png", "a shopping list: milk, eggs")), path("notes.png"), "neither a PNG nor a JPEG");

  Bytes bytes = png(ramp(20, 20));
  bytes.resize(bytes.size() / 2);
  EXPECT_SAYS(load(file("half.png", bytes)), path("half.png"), "damaged");
  bytes.resize(12);
  EXPECT_SAYS(load(file("stub.png", bytes)), path("stub.png"), "picture");
}

TEST_F(Files, ClaimedSizesAreCheckedBeforeMemoryIsAskedFor) {
  const auto claim = [&](std::uint32_t width, std::uint32_t height) {
    Bytes bytes = png(ramp(4, 4));
    for (std::size_t i = 0; i < 4; ++i) {  // PNG: 8 bytes signature, 8 bytes chunk head, then width and height
      bytes[16 + i] = static_cast<std::uint8_t>(width >> (24 - 8 * i));
      bytes[20 + i] = static_cast<std::uint8_t>(height >> (24 - 8 * i));
    }
    return complaint<PictureError>([&] { decode_picture(bytes, "claim.png"); });
  };
  EXPECT_SAYS(claim(10001, 1), "claim.png", "10001 x 1", "10000 x 10000");
  EXPECT_SAYS(claim(1, 1u << 20), "claim.png", "1 x 1048576");
  EXPECT_SAYS(claim(0x7fffffff, 0x7fffffff), "claim.png");
  EXPECT_SAYS(claim(0xffffffff, 5), "claim.png");
  EXPECT_SAYS(claim(0, 5), "claim.png");
  EXPECT_SAYS(claim(5, 0), "claim.png");
}

// 4,080 Huffman codes where at most 256 are allowed: the decoder must not be asked.
TEST_F(Files, HuffmanTablesThatAreTooLongAreRefused) {
  Bytes bytes = hand_made_jpeg();
  const Bytes head = {0xFF, 0xC4, 0, 20, 0x10};
  const auto table = std::search(bytes.begin(), bytes.end(), head.begin(), head.end());
  ASSERT_NE(table, bytes.end());
  std::fill_n(table + 5, 16, std::uint8_t{255});
  EXPECT_SAYS(complaint<PictureError>([&] { decode_picture(bytes, "long.jpg"); }), "long.jpg", "Huffman");
}

TEST_F(Files, SavingWhereNothingCanBeSavedSaysSo) {
  EXPECT_SAYS(complaint<PictureError>([&] { save_png(ramp(2, 2), path("no/such/folder.png")); }),
              path("no/such/folder.png"), "No such file");
}

// ---- fitting ------------------------------------------------------------------------------------

TEST(Fit, APictureOfTheModelsSizeStaysAsItIs) {
  const Picture picture = ramp(96, 96);
  EXPECT_EQ(fit(picture, preprocessor(96)).pixels, picture.pixels);
}

TEST(Fit, PaddingIsCentredAndOfTheMeanColour) {
  const std::array<int, 3> mean = {127, 63, 0};
  const Picture wide = pad_to_square(plain(5, 2, 200), preprocessor(5).mean);  // one row above, two below
  ASSERT_EQ(wide.height, 5);
  for (int x = 0; x < 5; ++x)
    for (int y = 0; y < 5; ++y)
      EXPECT_EQ(at(wide, x, y), (y == 1 || y == 2 ? std::array<int, 3>{200, 200, 200} : mean)) << x << " " << y;
  const Picture tall = pad_to_square(ramp(2, 4), preprocessor(4).mean);
  ASSERT_EQ(tall.width, 4);
  for (int y = 0; y < 4; ++y) {
    EXPECT_EQ(at(tall, 0, y), mean);
    EXPECT_EQ(at(tall, 1, y), at(ramp(2, 4), 0, y));
    EXPECT_EQ(at(tall, 2, y), at(ramp(2, 4), 1, y));
    EXPECT_EQ(at(tall, 3, y), mean);
  }
}

TEST(Fit, ResizingKeepsColourDirectionAndMean) {
  for (const int side : {7, 24, 96, 300}) {
    const Picture flat = resize(plain(50, 50, 123), side);
    EXPECT_EQ(flat.width, side);
    for (const std::uint8_t value : flat.pixels) ASSERT_EQ(value, 123);
    const Picture picture = resize(ramp(96, 96), side);
    EXPECT_GT(at(picture, side - 1, 0)[0], at(picture, 0, side - 1)[0] + 100);  // red still counts columns
    EXPECT_GT(at(picture, 0, side - 1)[1], at(picture, side - 1, 0)[1] + 100);
    EXPECT_NEAR(at(picture, side / 2, side / 2)[2], 77, 1);
  }
}

// Without antialiasing, every fourth column of single-pixel stripes would be all black or all white.
TEST(Fit, ShrinkingAverages) {
  Picture stripes = plain(96, 96, 0);
  for (std::size_t i = 0; i < stripes.pixels.size(); ++i) stripes.pixels[i] = i / 3 % 2 == 0 ? 0 : 255;
  const Picture small = resize(stripes, 24);
  for (int x = 2; x < 22; ++x) EXPECT_NEAR(at(small, x, 12)[0], 127, 12) << x;
}

TEST(Fit, ALineOfPixelsIsAPictureToo) {
  EXPECT_EQ(fit(ramp(3000, 1), preprocessor(96)).pixels.size(), 96u * 96 * 3);
  EXPECT_EQ(fit(ramp(1, 1), preprocessor(96)).pixels.size(), 96u * 96 * 3);
}

TEST(Normalise, ChannelsComeFirstEachWithItsOwnMeanAndDeviation) {
  const Picture picture{2, 1, {0, 51, 102, 255, 204, 153}};
  const std::vector<float> values = normalise(picture, preprocessor(2));
  const std::vector<float> expected = {-1, 1, -0.1f, 1.1f, 1.6f, 2.4f};  // red red, green green, blue blue
  ASSERT_EQ(values.size(), expected.size());
  for (std::size_t i = 0; i < values.size(); ++i) EXPECT_NEAR(values[i], expected[i], 1e-6f) << i;
}

TEST_F(Files, PreprocessorIsReadOrRefused) {
  const std::string sound = text("p.json", R"({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 4],
                                               "size": {"height": 24, "width": 24}, "rescale_factor": 0.5})");
  const Preprocessor p = load_preprocessor(sound);
  EXPECT_EQ(p.side, 24);
  EXPECT_FLOAT_EQ(p.rescale, 0.5f);
  EXPECT_FLOAT_EQ(p.mean[2], 0.3f);
  EXPECT_FLOAT_EQ(p.deviation[1], 2.f);
  for (const char* words : {"", "[]", "{", R"({"image_mean": [0, 0, 0]})",
                            R"({"image_mean": [0, 0], "image_std": [1, 1, 1], "size": {"height": 24}})",
                            R"({"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "size": {"height": 0}})"}) {
    const std::string bad = text("bad.json", words);
    EXPECT_SAYS(complaint<std::runtime_error>([&] { load_preprocessor(bad); }), bad);
  }
  EXPECT_SAYS(complaint<std::runtime_error>([&] { load_preprocessor(path("none.json")); }), path("none.json"));
}

// ---- patches ------------------------------------------------------------------------------------

TEST(Unfold, PatchesInReadingOrderChannelThenRowThenColumn) {
  constexpr Eigen::Index side = 6, patch = 2, columns = 3;
  std::vector<float> pixels(3 * side * side);
  for (std::size_t i = 0; i < pixels.size(); ++i) pixels[i] = static_cast<float>(i);
  const Matrix patches = unfold(pixels, side, patch);
  ASSERT_EQ(patches.rows(), columns * columns);
  ASSERT_EQ(patches.cols(), 3 * patch * patch);
  for (Eigen::Index token = 0; token < 9; ++token)
    for (Eigen::Index c = 0; c < 3; ++c)
      for (Eigen::Index y = 0; y < patch; ++y)
        for (Eigen::Index x = 0; x < patch; ++x) {
          const Eigen::Index row = token / columns * patch + y, column = token % columns * patch + x;
          EXPECT_EQ(patches(token, (c * patch + y) * patch + x), static_cast<float>((c * side + row) * side + column));
        }
  pixels.pop_back();
  EXPECT_THROW(unfold(pixels, side, patch), std::invalid_argument);
}

nlohmann::json llava_config() {
  return nlohmann::json::parse(R"({"vision_feature_layer": -2, "vision_config": {
    "image_size": 96, "patch_size": 8, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 384,
    "num_hidden_layers": 6, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}})");
}

TEST(VisionConfig, FeatureLayerSaysHowManyBlocksRun) {
  nlohmann::json json = llava_config();
  EXPECT_EQ(vision_config(json).blocks, 5u);
  EXPECT_EQ(vision_config(json).patches(), 144);
  for (const auto& [layer, blocks] :
       std::vector<std::pair<int, std::size_t>>{{-1, 6}, {-7, 0}, {0, 0}, {6, 6}, {3, 3}}) {
    json["vision_feature_layer"] = layer;
    EXPECT_EQ(vision_config(json).blocks, blocks) << layer;
  }
}

TEST(VisionConfig, SizesThatCannotBeAreRefused) {
  const auto with = [](const char* field, const nlohmann::json& value) {
    nlohmann::json json = llava_config();
    json["vision_config"][field] = value;
    return complaint<std::runtime_error>([&] { vision_config(json); });
  };
  EXPECT_SAYS(with("patch_size", 7), "patch_size");
  EXPECT_SAYS(with("num_attention_heads", 3), "num_attention_heads");
  EXPECT_SAYS(with("hidden_size", 0), "hidden_size", "0");
  EXPECT_SAYS(with("hidden_size", 9e105), "hidden_size", "9e+105", "whole number");
  EXPECT_SAYS(with("hidden_act", "relu"), "relu");
  nlohmann::json json = llava_config();
  json["vision_feature_layer"] = 7;
  EXPECT_SAYS(complaint<std::runtime_error>([&] { vision_config(json); }), "7");
}

// ---- drawing ------------------------------------------------------------------------------------

// CIE lightness of an sRGB colour, 0 to 100.
double lightness(const Ink& ink) {
  const auto linear = [](double v) { return v <= 0.04045 ? v / 12.92 : std::pow((v + 0.055) / 1.055, 2.4); };
  const double y = 0.2126 * linear(ink.red) + 0.7152 * linear(ink.green) + 0.0722 * linear(ink.blue);
  return y > 0.008856 ? 116 * std::cbrt(y) - 16 : 903.3 * y;
}

TEST(Viridis, EvenStepsOfValueAreEvenStepsOfLightness) {
  const double whole = lightness(viridis(1)) - lightness(viridis(0));
  EXPECT_GT(whole, 70);
  for (int i = 0; i < 20; ++i) {
    const double step = lightness(viridis((i + 1) / 20.0)) - lightness(viridis(i / 20.0));
    EXPECT_NEAR(step, whole / 20, whole / 40) << i;
  }
}

Figure small_figure(std::size_t columns) {
  Figure figure;
  figure.question = "how many digits are there ?";
  figure.picture = ramp(32, 32);
  figure.columns = columns;
  figure.kept.assign(columns * columns, true);
  figure.scores.assign(columns * columns, 0.f);  // all alike, and zero
  figure.share = {0.5, 0.0, 1.0};
  figure.filtering_layer = 1;
  figure.heads = {"tokens"};
  figure.rows = {{"all tokens", {"16"}}};
  return figure;
}

TEST_F(Files, DrawingsAreWrittenAsPngAndSvg) {
  write_figure(path("figure.png"), small_figure(4));
  EXPECT_EQ(load_picture(path("figure.png")).width, 1500);
  write_figure(path("figure.svg"), small_figure(1));
  std::ifstream in(path("figure.svg"));
  const std::string svg{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  EXPECT_NE(svg.find("<svg"), std::string::npos);
  EXPECT_NE(svg.find("</svg>"), std::string::npos);
  EXPECT_SAYS(complaint<std::runtime_error>([&] { write_figure(path("no/figure.png"), small_figure(4)); }),
              path("no/figure.png"));
  EXPECT_SAYS(complaint<std::runtime_error>([&] { write_figure(path("no/figure.svg"), small_figure(4)); }),
              path("no/figure.svg"));
}

TEST_F(Files, KeptPatchesAreVividAndDroppedOnesFaded) {
  Figure figure = small_figure(2);
  figure.picture = plain(32, 32, 0);
  figure.kept = {true, false, false, true};
  write_figure(path("figure.png"), figure);
  const Picture drawn = load_picture(path("figure.png"));
  const int left = 48 + 96, right = left + 192, top = 170 + 96, bottom = top + 192;  // the patches' centres
  EXPECT_LT(at(drawn, left, top)[0], 10);
  EXPECT_GT(at(drawn, right, top)[0], 150);
  EXPECT_GT(at(drawn, left, bottom)[0], 150);
  EXPECT_LT(at(drawn, right, bottom)[0], 10);
}

TEST_F(Files, ChartsNeedPanelsAndAxesThatGoUp) {
  LineChart chart;
  chart.x.label = "FLOPs";
  EXPECT_THROW(chart.write(path("chart.png")), std::invalid_argument);
  chart.panels = {{"colour", {{"FastV", {{20, 50}, {200, -5}}}}, 97.0}};
  chart.write(path("chart.png"));
  EXPECT_GT(load_picture(path("chart.png")).width, 300);
  chart.y.high = chart.y.low;
  EXPECT_THROW(chart.write(path("chart.png")), std::invalid_argument);
}

}  // namespace

// The picture decoder of examples/scenes (stb behind it), and what is done with a picture. Any bytes give a picture or
// a PictureError.
#include "picture.hpp"

#include "fuzz.hpp"

namespace {

// Pixels that the header claims, read the way the standards say; 0: not found. Large ones are left out here: they take
// seconds each and find nothing that small ones do not.
std::size_t claimed_pixels(const std::vector<std::uint8_t>& b) {
  const auto number = [&](std::size_t at, std::size_t bytes) {
    std::size_t value = 0;
    for (std::size_t i = 0; i < bytes; ++i) value = value << 8 | (at + i < b.size() ? b[at + i] : 0u);
    return value;
  };
  if (b.size() > 24 && b[0] == 0x89)
    return (std::max)(number(16, 4), number(20, 4)) > 10000 ? 0 : number(16, 4) * number(20, 4);
  std::size_t most = 0;
  for (std::size_t i = 0; i + 9 < b.size(); ++i)  // every start of frame there may be
    if (b[i] == 0xFF && b[i + 1] >= 0xC0 && b[i + 1] <= 0xC2)
      most = (std::max)(most, number(i + 5, 2) * number(i + 7, 2));
  return most;
}

}  // namespace

FASTV_FUZZ_TARGET(picture) {
  const std::vector<std::uint8_t> bytes(in.rest(), in.rest() + in.left());
  if (claimed_pixels(bytes) > 200 * 200) return;
  try {
    const common::Picture picture = common::decode_picture(bytes, "the picture");
    FUZZ_CHECK(picture.width > 0 && picture.height > 0);
    FUZZ_CHECK(picture.pixels.size() ==
               static_cast<std::size_t>(picture.width) * static_cast<std::size_t>(picture.height) * 3);
    common::Preprocessor preprocessor;
    preprocessor.side = 24;
    preprocessor.mean = {0.5f, 0.4f, 0.3f};
    preprocessor.deviation = {0.2f, 0.2f, 0.2f};
    const common::Picture small = common::fit(picture, preprocessor);
    FUZZ_CHECK(small.width == 24 && small.height == 24);
    FUZZ_CHECK(common::normalise(small, preprocessor).size() == 3u * 24 * 24);
  } catch (const common::PictureError& error) {
    FUZZ_CHECK(std::strstr(error.what(), "the picture") != nullptr);
  }
}

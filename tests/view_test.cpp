// Element types, order keys and views.
#include "fastv/view.hpp"

#include <gtest/gtest.h>

#include <array>
#include <type_traits>

#include "fastv/fastv.hpp"
#include "oracle.hpp"

namespace view_test {
namespace {

using fastv::detail::order_key;
using oracle::bits_of_float;
using oracle::float_of_bits;

// ---- element types ------------------------------------------------------------------------------

TEST(Half, EveryValueEqualsTheDefinitionOfBinary16) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const fastv::half h{static_cast<std::uint16_t>(bits)};
    const float decoded = fastv::to_float(h);
    const std::uint32_t sign = (bits & 0x8000u) << 16;
    if ((bits & 0x7c00u) != 0x7c00u) {
      const double expected = oracle::value_of(h);
      ASSERT_EQ(bits_of_float(decoded), bits_of_float(static_cast<float>(expected))) << "half " << bits;
    } else if ((bits & 0x3ffu) == 0) {
      ASSERT_EQ(bits_of_float(decoded), sign | 0x7f800000u) << "infinity " << bits;
    } else {
      ASSERT_TRUE(oracle::is_nan(decoded)) << "NaN " << bits;
      ASSERT_EQ(bits_of_float(decoded), sign | 0x7f800000u | ((bits & 0x3ffu) << 13)) << "NaN keeps its payload";
    }
  }
}

TEST(Half, TheOraclesOwnEncoderRoundTrips) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const std::uint32_t exponent = bits >> 10 & 31u;
    if (exponent == 0 || exponent == 31) continue;  // test data holds normal numbers only
    const fastv::half h{static_cast<std::uint16_t>(bits)};
    ASSERT_EQ(oracle::make<fastv::half>(oracle::value_of(h)).bits, bits);
  }
}

TEST(Bfloat16, EveryValueIsTheUpperHalfOfAFloat) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits)
    ASSERT_EQ(bits_of_float(fastv::to_float(fastv::bfloat16{static_cast<std::uint16_t>(bits)})), bits << 16);
  EXPECT_EQ(fastv::to_float(fastv::bfloat16{0x3f80}), 1.0f);
  EXPECT_EQ(fastv::to_float(fastv::bfloat16{0xc040}), -3.0f);
}

TEST(Elements, FloatAndDoublePassThrough) {
  EXPECT_EQ(fastv::to_float(0.1f), 0.1f);
  EXPECT_EQ(fastv::to_float(0.1), 0.1);
  static_assert(std::is_same<decltype(fastv::to_float(0.1)), double>::value, "a double is not narrowed");
}

TEST(Float8, EveryValueEqualsTheDefinition) {
  for (int bits = 0; bits < 256; ++bits) {
    const int sign = bits >> 7;
    const auto byte = static_cast<std::uint8_t>(bits);
    // E5M2: the upper half of a half.
    EXPECT_EQ(bits_of_float(fastv::to_float(fastv::fp8_e5m2{byte})),
              bits_of_float(fastv::to_float(fastv::half{static_cast<std::uint16_t>(bits << 8)})));
    // E4M3: 4 bits of exponent biased by 7, 3 of fraction; no infinity, and one NaN of each sign.
    const float e4m3 = fastv::to_float(fastv::fp8_e4m3{byte});
    if ((bits & 127) == 127) {
      EXPECT_TRUE(oracle::is_nan(e4m3)) << bits;
      continue;
    }
    const int exponent = (bits >> 3) & 15, fraction = bits & 7;
    const double magnitude = exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
    EXPECT_EQ(bits_of_float(e4m3), bits_of_float(static_cast<float>(sign != 0 ? -magnitude : magnitude))) << bits;
  }
  EXPECT_EQ(fastv::to_float(fastv::fp8_e4m3{0x7e}), 448.0f);
}

TEST(Elements, StorageTypesHaveTheSizeOfTheirBits) {
  static_assert(sizeof(fastv::half) == 2 && alignof(fastv::half) == 2, "maps onto Eigen::half, ggml_fp16_t, ...");
  static_assert(sizeof(fastv::bfloat16) == 2 && alignof(fastv::bfloat16) == 2, "maps onto Eigen::bfloat16, ...");
  static_assert(std::is_trivial<fastv::half>::value && std::is_trivial<fastv::bfloat16>::value, "plain storage");
}

// ---- order keys ---------------------------------------------------------------------------------

TEST(OrderKey, OrdersFloatsLikeTheirValues) {
  std::vector<float> ascending = {-oracle::infinity(), -3.4e38f, -1.0f, -1e-30f, float_of_bits(0x80000001u), 0.0f,
                                  float_of_bits(1u),   1e-38f,   0.5f,  1.0f,    std::nextafter(1.0f, 2.0f), 3.4e38f,
                                  oracle::infinity()};
  for (std::size_t i = 1; i < ascending.size(); ++i)
    EXPECT_LT(order_key(ascending[i - 1]), order_key(ascending[i])) << ascending[i - 1] << " and " << ascending[i];
  oracle::Rng rng(1);
  for (int i = 0; i < 200000; ++i) {
    const float a = float_of_bits(static_cast<std::uint32_t>(rng.next())),
                b = float_of_bits(static_cast<std::uint32_t>(rng.next()));
    if (oracle::is_nan(a) || oracle::is_nan(b)) continue;
    ASSERT_EQ(order_key(a) < order_key(b), a < b) << a << " and " << b;
    ASSERT_EQ(order_key(a) == order_key(b), a == b) << a << " and " << b;
  }
}

TEST(OrderKey, OrdersDoublesLikeTheirValues) {
  oracle::Rng rng(2);
  for (int i = 0; i < 200000; ++i) {
    const double a = oracle::double_of_bits(rng.next()), b = rng.chance(0.1) ? -a : oracle::double_of_bits(rng.next());
    if (oracle::is_nan(a) || oracle::is_nan(b)) continue;
    ASSERT_EQ(order_key(a) < order_key(b), a < b) << a << " and " << b;
    ASSERT_EQ(order_key(a) == order_key(b), a == b) << a << " and " << b;
  }
}

TEST(OrderKey, NaNOfEitherSignIsBelowMinusInfinity) {
  for (const std::uint32_t bits : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffc00000u, 0xffffffffu}) {
    EXPECT_EQ(order_key(float_of_bits(bits)), 0u);
    EXPECT_LT(order_key(float_of_bits(bits)), order_key(-oracle::infinity()));
  }
  for (const std::uint64_t bits : {0x7ff0000000000001u, 0xfff8000000000000u, 0xffffffffffffffffu})
    EXPECT_EQ(order_key(oracle::double_of_bits(bits)), 0u);
}

TEST(OrderKey, MinusZeroEqualsZero) {
  EXPECT_EQ(order_key(-0.0f), order_key(0.0f));
  EXPECT_EQ(order_key(-0.0), order_key(0.0));
}

TEST(Bits, NaNAndInfinityAreToldApart) {
  using fastv::detail::is_infinite;
  using fastv::detail::is_nan;
  for (const std::uint32_t sign : {0u, 0x80000000u}) {
    EXPECT_TRUE(is_infinite(float_of_bits(sign | 0x7f800000u)));
    EXPECT_FALSE(is_nan(float_of_bits(sign | 0x7f800000u)));
    EXPECT_TRUE(is_nan(float_of_bits(sign | 0x7f800001u)));
    EXPECT_FALSE(is_infinite(float_of_bits(sign | 0x7f800001u)));
    EXPECT_FALSE(is_infinite(float_of_bits(sign | 0x7f7fffffu)) || is_nan(float_of_bits(sign | 0x7f7fffffu)));
  }
  EXPECT_TRUE(oracle::is_nan(fastv::detail::nan_value<float>()));
  EXPECT_TRUE(oracle::is_nan(fastv::detail::nan_value<double>()));
}

// ---- Span ---------------------------------------------------------------------------------------

std::size_t size_of(fastv::Span<const float> values) { return values.size(); }

TEST(Span, ConvertsFromContainersArraysAndMutableSpans) {
  std::vector<float> vector(3);
  const std::vector<float> constant(4);
  std::array<float, 5> array{};
  float plain[6] = {};
  EXPECT_EQ(size_of(vector), 3u);
  EXPECT_EQ(size_of(constant), 4u);
  EXPECT_EQ(size_of(array), 5u);
  EXPECT_EQ(size_of(plain), 6u);
  const fastv::Span<float> span = vector;
  EXPECT_EQ(span.data(), vector.data()) << "a view, not a copy";
  EXPECT_EQ(size_of(span), 3u);
  EXPECT_EQ(size_of({}), 0u);
}

TEST(Span, NeverAddsMutabilityOrChangesTheElementType) {
  static_assert(!std::is_convertible<const std::vector<float>&, fastv::Span<float>>::value, "const stays const");
  static_assert(!std::is_convertible<std::vector<double>&, fastv::Span<const float>>::value, "no reinterpretation");
  static_assert(!std::is_convertible<fastv::Span<const float>, fastv::Span<float>>::value, "const stays const");
  struct Base {
    int a;
  };
  struct Derived : Base {
    int b;
  };
  static_assert(!std::is_convertible<std::vector<Derived>&, fastv::Span<const Base>>::value, "strides would differ");
}

TEST(AsIndex, IsTheSameMemory) {
  std::vector<std::int32_t> table = {3, 7, -1};
  const std::vector<std::int32_t>& constant = table;
  const fastv::Span<fastv::Index> moved = fastv::as_index(table);
  const fastv::Span<const fastv::Index> read = fastv::as_index(constant);
  EXPECT_EQ(static_cast<void*>(moved.data()), static_cast<void*>(table.data()));
  EXPECT_EQ(read.data(), moved.data());
  EXPECT_EQ(read.size(), 3u);
  EXPECT_EQ(read[2], 0xffffffffu);
  moved[0] = 5;
  EXPECT_EQ(table[0], 5);
  EXPECT_EQ(fastv::as_index(fastv::Span(table.data() + 1, 2))[0], 7u);
}

TEST(Span, WalksItsElementsInOrder) {
  int numbers[] = {3, 1, 2};
  const fastv::Span<int> span = numbers;
  std::vector<int> seen(span.begin(), span.end());
  EXPECT_EQ(seen, (std::vector<int>{3, 1, 2}));
  span[1] = 7;
  EXPECT_EQ(numbers[1], 7);
  EXPECT_FALSE(span.empty());
  EXPECT_TRUE(fastv::Span<int>().empty());
}

// ---- views with strides worked out --------------------------------------------------------------

TEST(Views, ContiguousProbabilitiesAreHeadsQueriesKeys) {
  const float data[24] = {};
  const auto view = fastv::probabilities(data, 2, 3, 4);
  EXPECT_EQ(view.data, data);
  EXPECT_EQ(view.heads, 2u);
  EXPECT_EQ(view.queries, 3u);
  EXPECT_EQ(view.keys, 4u);
  EXPECT_EQ(view.head_stride, 12);
  EXPECT_EQ(view.query_stride, 4);
  EXPECT_EQ(view.key_stride, 1);
  EXPECT_EQ(fastv::probabilities(data, 2, 3, 4, 20).head_stride, 20);
}

// What a view says, element by element: [heads, tokens, dim] of a buffer that was filled in the order of its shape.
template <class View>
const float* element(const View& view, std::size_t head, std::size_t token, std::size_t d) {
  const auto at = [](std::size_t i, std::ptrdiff_t stride) { return static_cast<std::ptrdiff_t>(i) * stride; };
  const auto& pages = view.pages;
  const float* base = view.data;
  if (pages.paged()) {
    const std::size_t block = token / pages.block_tokens;
    token %= pages.block_tokens;
    base = pages.blocks.empty() ? base + at(pages.block_table[block], pages.block_stride) : pages.blocks[block];
  }
  const std::size_t chunk = pages.chunk == 0 ? view.dim : pages.chunk;
  return base + at(head, view.head_stride) + at(token, view.token_stride) + at(d / chunk, pages.chunk_stride) +
         static_cast<std::ptrdiff_t>(d % chunk);
}

constexpr std::size_t n = 6, dim = 4, h = 3;

TEST(Views, HeadsReadEveryOrderOfMemory) {
  static const float data[4096] = {};
  const auto token_major = fastv::heads(data, fastv::TokenMajor{n, h, dim});
  const auto packed = fastv::heads(data, fastv::TokenMajor{n, h, dim, 40});  // q, k and v in one row
  const auto head_major = fastv::heads(data, fastv::HeadMajor{h, n, dim});
  const auto roomy = fastv::heads(data, fastv::HeadMajor{h, n, dim, 10});
  const auto shrunk =
      fastv::heads(data, fastv::HeadMajor{h, n, dim, 2});  // less room than tokens: as many as there are
  for (std::size_t head = 0; head < h; ++head)
    for (std::size_t token = 0; token < n; ++token)
      for (std::size_t d = 0; d < dim; ++d) {
        EXPECT_EQ(element(token_major, head, token, d) - data,
                  static_cast<std::ptrdiff_t>((token * h + head) * dim + d));
        EXPECT_EQ(element(packed, head, token, d) - data, static_cast<std::ptrdiff_t>(token * 40 + head * dim + d));
        EXPECT_EQ(element(head_major, head, token, d) - data,
                  static_cast<std::ptrdiff_t>((head * n + token) * dim + d));
        EXPECT_EQ(element(roomy, head, token, d) - data, static_cast<std::ptrdiff_t>((head * 10 + token) * dim + d));
        EXPECT_EQ(element(shrunk, head, token, d), element(head_major, head, token, d));
      }
  for (const auto& view : {token_major, packed, head_major, roomy}) {
    EXPECT_EQ(view.heads, h);
    EXPECT_EQ(view.tokens, n);
    EXPECT_EQ(view.dim, dim);
    EXPECT_FALSE(view.pages.paged());
  }
}

TEST(Views, PagesReadEveryOrderOfABlock) {
  static const float data[4096] = {};
  const fastv::Index table[] = {5, 0, 3};
  const std::size_t size = 2, block = size * h * dim;
  const float* const blocks[] = {data + 5 * block, data, data + 3 * block};
  const auto token_major = fastv::heads(data, fastv::TokenMajor{size, h, dim}, table, n);
  const auto head_major = fastv::heads(data, fastv::HeadMajor{h, size, dim}, table, n);
  const auto chunked = fastv::heads(data, fastv::ChunkedHeadMajor{h, 2, size, 2}, table, n);  // vLLM's keys
  const auto pointers = fastv::heads(fastv::Span<const float* const>(blocks), fastv::TokenMajor{size, h, dim}, n);
  for (const auto& view : {token_major, head_major, chunked, pointers}) {
    EXPECT_EQ(view.heads, h);
    EXPECT_EQ(view.tokens, n);
    EXPECT_EQ(view.dim, dim);
    EXPECT_TRUE(view.pages.paged());
  }
  for (std::size_t head = 0; head < h; ++head)
    for (std::size_t token = 0; token < n; ++token)
      for (std::size_t d = 0; d < dim; ++d) {
        const std::size_t base = table[token / size] * block, row = token % size;
        const auto offset = [&](std::size_t i) { return static_cast<std::ptrdiff_t>(base + i); };
        EXPECT_EQ(element(token_major, head, token, d) - data, offset((row * h + head) * dim + d));
        EXPECT_EQ(element(head_major, head, token, d) - data, offset((head * size + row) * dim + d));
        EXPECT_EQ(element(chunked, head, token, d) - data, offset(((head * 2 + d / 2) * size + row) * 2 + d % 2));
        EXPECT_EQ(element(pointers, head, token, d), element(token_major, head, token, d));
      }
}

TEST(Views, QueryKeyIsPlainCausalAttention) {
  const float q[8] = {}, k[8] = {};
  const auto evidence =
      fastv::query_key(fastv::heads(q, fastv::TokenMajor{1, 2, 4}), fastv::heads(k, fastv::TokenMajor{2, 1, 4}), 0.25f);
  EXPECT_EQ(evidence.query.data, q);
  EXPECT_EQ(evidence.key.data, k);
  EXPECT_EQ(evidence.scale, 0.25f);
  EXPECT_TRUE(evidence.causal);
  EXPECT_EQ(evidence.soft_cap, 0);
  EXPECT_EQ(evidence.prompt_tokens(), 2u);
  EXPECT_TRUE(evidence.check());
}

TEST(Views, RowHelpersCountBytes) {
  std::uint16_t data[1] = {};
  const fastv::Rows hidden = fastv::rows(data, 5, 7);
  EXPECT_EQ(hidden.data, data);
  EXPECT_EQ(hidden.count, 5u);
  EXPECT_EQ(hidden.row_bytes, 14u);
  EXPECT_EQ(hidden.row_stride, 14);
  EXPECT_EQ(hidden.planes, 1u);
  EXPECT_FALSE(hidden.packed);
  EXPECT_EQ(fastv::rows(data, 5, 7, 9).row_stride, 18) << "the stride counts elements";
  EXPECT_EQ(fastv::rows(data, 5).row_bytes, 2u);
  const fastv::Rows raw = fastv::rows(static_cast<void*>(data), 5, 7);
  EXPECT_EQ(raw.row_bytes, 7u);
  EXPECT_EQ(raw.row_stride, 7);
  const fastv::Rows axes = fastv::position_axes(data, 3, 9);
  EXPECT_EQ(axes.planes, 3u);
  EXPECT_EQ(axes.plane_stride, 18);
  EXPECT_EQ(axes.row_bytes, 2u);
  EXPECT_TRUE(axes.packed);
}

TEST(Views, CachesMoveWholeTokensOrOneHeadAPlane) {
  unsigned char data[1] = {};
  const fastv::Rows token = fastv::rows(data, fastv::TokenMajor{10, 4, 34});
  EXPECT_EQ(token.count, 10u);
  EXPECT_EQ(token.planes, 1u);
  EXPECT_EQ(token.row_bytes, 136u);
  EXPECT_EQ(token.row_stride, 136);
  EXPECT_EQ(fastv::rows(data, fastv::TokenMajor{10, 4, 34, 200}).row_stride, 200);
  const fastv::Rows head = fastv::rows(data, fastv::HeadMajor{4, 10, 34, 32});
  EXPECT_EQ(head.count, 10u);
  EXPECT_EQ(head.planes, 4u);
  EXPECT_EQ(head.row_bytes, 34u);
  EXPECT_EQ(head.row_stride, 34);
  EXPECT_EQ(head.plane_stride, 34 * 32);
}

TEST(Views, PagesOfACacheStepFromBlockToBlock) {
  std::uint16_t data[1] = {};
  fastv::Index table[] = {2, 0};
  const fastv::KvPages token = fastv::pages(data, fastv::TokenMajor{16, 8, 64}, table, 20);
  EXPECT_EQ(token.block_tokens, 16u);
  EXPECT_EQ(token.count, 20u);
  EXPECT_EQ(token.planes, 1u);
  EXPECT_EQ(token.row_bytes, 8u * 64 * 2);
  EXPECT_EQ(token.block_stride, 16 * 8 * 64 * 2);
  const fastv::KvPages head = fastv::pages(data, fastv::HeadMajor{8, 16, 64}, table, 20);
  EXPECT_EQ(head.planes, 8u);
  EXPECT_EQ(head.row_bytes, 128u);
  EXPECT_EQ(head.plane_stride, 16 * 128);
  EXPECT_EQ(head.block_stride, 16 * 8 * 64 * 2);
  const fastv::KvPages chunked = fastv::pages(data, fastv::ChunkedHeadMajor{8, 8, 16, 8}, table, 20);
  EXPECT_EQ(chunked.planes, 64u);
  EXPECT_EQ(chunked.row_bytes, 16u);
  EXPECT_EQ(chunked.plane_stride, 256);
  EXPECT_EQ(chunked.block_stride, 16 * 8 * 64 * 2);
  void* const blocks[] = {data, data};
  const fastv::KvPages pointers = fastv::pages<std::uint16_t>(blocks, fastv::HeadMajor{8, 16, 64}, 20);
  EXPECT_EQ(pointers.blocks.data(), blocks);
  EXPECT_EQ(pointers.plane_stride, 16 * 128);
  EXPECT_TRUE(pointers.block_table.empty());
}

// A size that no memory holds becomes a stride that is refused, not one that overflowed into a small number.
TEST(Views, ProductsOfSizesStayAtTheGreatest) {
  constexpr std::size_t huge = static_cast<std::size_t>(-1), half = std::size_t{1} << 63;
  using fastv::detail::product;
  using fastv::detail::scaled;
  constexpr std::size_t most = fastv::detail::greatest_size;
  EXPECT_EQ(product(6, 7), 42u);
  EXPECT_EQ(product(huge, 0), 0u);
  EXPECT_EQ(product(huge, huge), most);
  EXPECT_EQ(product(half, 2), most) << "0, if it wrapped around";
  EXPECT_EQ(product(most, 1), most);
  EXPECT_EQ(scaled(-6, 7), -42);
  EXPECT_EQ(scaled(6, huge), static_cast<std::ptrdiff_t>(most));
  EXPECT_EQ(scaled(-6, huge), -static_cast<std::ptrdiff_t>(most));
  std::uint32_t data[4] = {};
  EXPECT_EQ(fastv::rows(data, 4, huge / 4 + 2).row_bytes, most) << "4 bytes, if it wrapped around";
  EXPECT_EQ(fastv::rows(data, fastv::TokenMajor{1, half, 2}).row_bytes, most);
  const float floats[1] = {};
  EXPECT_EQ(fastv::heads(floats, fastv::TokenMajor{1, half, 4}).token_stride, static_cast<std::ptrdiff_t>(most));
  EXPECT_EQ(fastv::heads(floats, fastv::HeadMajor{1, half, 4}).head_stride, static_cast<std::ptrdiff_t>(most));
}

// ---- strides ------------------------------------------------------------------------------------

TEST(Strides, NegativeOrOverlappingOnesAreRefusedInEveryAxisOrder) {
  const float numbers[64] = {};
  const auto code = [&](std::ptrdiff_t head, std::ptrdiff_t query, std::ptrdiff_t key) {
    return fastv::Probabilities<float>{numbers, 3, 4, 5, head, query, key}.check().code;
  };
  using fastv::Errc;
  EXPECT_TRUE(fastv::probabilities(numbers, 3, 4, 5).check());  // strides 20, 5, 1
  EXPECT_EQ(code(1, 3, 12), Errc::ok) << "[5, 4, 3] in memory: heads innermost";
  EXPECT_EQ(code(20, 1, 4), Errc::ok) << "column-major maps: rows innermost";
  EXPECT_EQ(code(20, 1, 3), Errc::bad_stride) << "a key later is three rows on, but there are four";
  EXPECT_EQ(code(20, 5, 0), Errc::bad_stride);
  EXPECT_EQ(code(20, 5, -1), Errc::bad_stride);
  EXPECT_EQ(code(19, 5, 1), Errc::bad_stride);
  const fastv::Status status = fastv::Probabilities<float>{numbers, 3, 4, 5, 19, 5, 1}.check();
  EXPECT_NE(
      std::string(status.message().c_str()).find("head stride of probabilities is 19 but its entries reach over 20"),
      std::string::npos)
      << status.message().c_str();
  EXPECT_EQ((fastv::Probabilities<float>{numbers, 2, 4, 5, 19, 5, 1}.check().code), Errc::bad_stride)
      << "of two as well";
  EXPECT_TRUE((fastv::Probabilities<float>{numbers, 1, 1, 5, 0, 0, 1}.check()))
      << "the stride of an axis of one is never used";
}

TEST(Version, IsStatedByThreeNumbers) {
  static_assert(FASTV_VERSION_MAJOR >= 0 && FASTV_VERSION_MINOR >= 0 && FASTV_VERSION_PATCH >= 0, "all three exist");
}

}  // namespace
}  // namespace view_test

// Element types, order keys and views.
#include "fastv/view.hpp"

#include <gtest/gtest.h>

#include <array>
#include <type_traits>

#include "oracle.hpp"

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

TEST(Views, ContiguousProbabilitiesAreHeadsRowsKeys) {
  const float data[24] = {};
  const auto view = fastv::probabilities(data, 2, 3, 4);
  EXPECT_EQ(view.head_stride, 12);
  EXPECT_EQ(view.row_stride, 4);
  EXPECT_EQ(view.key_stride, 1);
}

TEST(Views, QueryKeyKnowsBothCacheLayouts) {
  const float q[1] = {}, k[1] = {};
  const auto token = fastv::query_key(q, 8, 3, k, 2, 10, 16, 0.25f, fastv::KvLayout::token_major);
  EXPECT_EQ(token.query_head_stride, 16);
  EXPECT_EQ(token.query_row_stride, 128);
  EXPECT_EQ(token.key_head_stride, 16);
  EXPECT_EQ(token.key_token_stride, 32);
  EXPECT_TRUE(token.causal);
  EXPECT_EQ(token.soft_cap, 0);
  const auto head = fastv::query_key(q, 8, 3, k, 2, 10, 16, 0.25f, fastv::KvLayout::head_major);
  EXPECT_EQ(head.key_head_stride, 160);
  EXPECT_EQ(head.key_token_stride, 16);
  const auto roomy = fastv::query_key(q, 8, 3, k, 2, 10, 16, 0.25f, fastv::KvLayout::head_major, 64);
  EXPECT_EQ(roomy.key_head_stride, 1024);
}

TEST(Views, RowHelpersCountBytes) {
  std::uint16_t data[1] = {};
  const fastv::Rows hidden = fastv::rows(data, 5, 7);
  EXPECT_EQ(hidden.data, data);
  EXPECT_EQ(hidden.count, 5u);
  EXPECT_EQ(hidden.row_bytes, 14u);
  EXPECT_EQ(hidden.row_stride, 14);
  EXPECT_EQ(hidden.planes, 1u);
  const fastv::Rows axes = fastv::position_axes(data, 3, 9);
  EXPECT_EQ(axes.planes, 3u);
  EXPECT_EQ(axes.plane_stride, 18);
  EXPECT_EQ(axes.row_bytes, 2u);
}

TEST(Views, KvRowsMovesWholeTokensOrOneHeadAPlane) {
  unsigned char data[1] = {};
  const fastv::Rows token = fastv::kv_rows(data, 10, 4, 34, fastv::KvLayout::token_major);
  EXPECT_EQ(token.planes, 1u);
  EXPECT_EQ(token.row_bytes, 136u);
  const fastv::Rows head = fastv::kv_rows(data, 10, 4, 34, fastv::KvLayout::head_major, 32);
  EXPECT_EQ(head.planes, 4u);
  EXPECT_EQ(head.row_bytes, 34u);
  EXPECT_EQ(head.row_stride, 34);
  EXPECT_EQ(head.plane_stride, 34 * 32);
}

TEST(Version, IsStatedByThreeNumbers) {
  static_assert(FASTV_VERSION_MAJOR >= 0 && FASTV_VERSION_MINOR >= 0 && FASTV_VERSION_PATCH >= 0, "all three exist");
}

}  // namespace

// The library beside macros of others: X11 has `#define Status int`, Apple's AssertMacros.h had check(). Both are kept
// out of the headers and given back behind them.
#include <gtest/gtest.h>

#define Status int
#define check(condition) static_assert(condition, "the host's own")

#include "fastv/fastv.hpp"

namespace {

check(sizeof(Status) == sizeof(int));  // both are the host's again

TEST(MacrosOfOthers, AreKeptOutAndGivenBack) {
  Status host = 7;
  const float scores[] = {1, 4, 2, 3};
  const fastv::TokenSpan visual[] = {{1, 4}};
  fastv::Pruner<> pruner;
  const fastv::Kept kept = pruner.prune(fastv::Scores<float>{scores, 6}, visual);
  ASSERT_TRUE(kept) << kept.message().c_str();
  ASSERT_EQ(kept.size(), 4u);
  EXPECT_EQ(kept.indices[1], 2u);
  EXPECT_EQ(kept.indices[2], 4u);
  const auto status = fastv::validate(fastv::Span<const fastv::TokenSpan>(visual), 3);
  EXPECT_EQ(status.code, fastv::Errc::bad_prompt);
  EXPECT_NE(status.message().c_str()[0], 0);
  // A member named like a macro with arguments is still called in brackets.
  EXPECT_TRUE((fastv::probabilities(scores, 1, 1, 4).check)());
  EXPECT_EQ(host, 7);
}

}  // namespace

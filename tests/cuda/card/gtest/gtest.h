// As much of GoogleTest as the tests of fastv/cuda.cuh use, for machines with a GPU and nvcc but no gtest: on the include
// path there in its place. device_test.cu has main().
#pragma once

#include <cmath>
#include <cstdio>
#include <functional>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace testing {

struct Test {
  std::string name;
  void (*run)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
struct Registered {
  Registered(const char* suite, const char* name, void (*run)()) {
    tests().push_back({std::string(suite) + "." + name, run});
  }
};

// Failures so far, fatal or not; and what SCOPED_TRACE has said around them.
inline std::size_t& failures() {
  static std::size_t count = 0;
  return count;
}
inline std::size_t& fatal_failures() {
  static std::size_t count = 0;
  return count;
}
inline std::vector<std::string>& traces() {
  static std::vector<std::string> all;
  return all;
}
struct Trace {
  explicit Trace(const std::string& what) { traces().push_back(what); }
  Trace(const Trace&) = delete;
  ~Trace() { traces().pop_back(); }
};

struct Message {
  std::ostringstream text;
  template <class T>
  Message& operator<<(const T& value) {
    text << value;
    return *this;
  }
};
struct Failure {
  const char* file;
  int line;
  std::string what;
  bool fatal;
  void operator=(const Message& message) const {
    if (++failures() <= 20) {
      std::cout << file << ":" << line << ": " << what << " " << message.text.str() << "\n";
      for (const std::string& trace : traces()) std::cout << "  in " << trace << "\n";
    }
    fatal_failures() += fatal ? 1 : 0;
  }
};

// Values as text, where they have any.
template <class T>
auto put(std::ostream& out, const T& value, int) -> decltype(static_cast<void>(out << value)) {
  out << value;
}
template <class T>
auto put(std::ostream& out, const T& list, long) -> decltype(static_cast<void>(list.begin())) {
  std::size_t count = 0;
  for (const auto& value : list) {
    if (++count > 16) continue;
    put(out << ' ', value, 0);
  }
  out << " (" << count << ")";
}
template <class T>
void put(std::ostream& out, const T&, ...) {
  out << "?";
}
template <class A, class B>
std::string beside(const char* text, const A& a, const B& b) {
  std::ostringstream out;
  out << text << ", which are ";
  put(out, a, 0);
  put(out << " and ", b, 0);
  out << ".";
  return out.str();
}
// Empty where it holds.
template <class A, class B, class Holds>
std::string check(const char* text, const A& a, const B& b, const Holds& holds) {
  return holds(a, b) ? "" : beside(text, a, b);
}

}  // namespace testing

#define TEST(suite, name)                                                                      \
  static void suite##_##name();                                                                \
  static const testing::Registered suite##_##name##_registered(#suite, #name, suite##_##name); \
  static void suite##_##name()

// Nothing where `what` is an empty string, or else a failure that takes more words by <<; `leave`: return, or nothing.
#define SMALL_TEST_(what, fatal, leave)                                      \
  switch (0)                                                                 \
  case 0:                                                                    \
  default:                                                                   \
    if (const std::string small_test_what = (what); small_test_what.empty()) \
      ;                                                                      \
    else                                                                     \
      leave testing::Failure{__FILE__, __LINE__, small_test_what, fatal} = testing::Message()
#define SMALL_COMPARE_(a, b, operation) \
  testing::check(#a " " #operation " " #b, a, b, [](const auto& x, const auto& y) { return x operation y; })
#define SMALL_NEAR_(a, b, most)                                                     \
  testing::check(#a " is near " #b, static_cast<double>(a), static_cast<double>(b), \
                 [&](double x, double y) { return std::fabs(x - y) <= static_cast<double>(most); })

#define EXPECT_TRUE(condition) SMALL_TEST_((condition) ? "" : #condition, false, )
#define ASSERT_TRUE(condition) SMALL_TEST_((condition) ? "" : #condition, true, return )
#define EXPECT_EQ(a, b) SMALL_TEST_(SMALL_COMPARE_(a, b, ==), false, )
#define ASSERT_EQ(a, b) SMALL_TEST_(SMALL_COMPARE_(a, b, ==), true, return )
#define EXPECT_NE(a, b) SMALL_TEST_(SMALL_COMPARE_(a, b, !=), false, )
#define EXPECT_LE(a, b) SMALL_TEST_(SMALL_COMPARE_(a, b, <=), false, )
#define EXPECT_NEAR(a, b, most) SMALL_TEST_(SMALL_NEAR_(a, b, most), false, )
#define ASSERT_NEAR(a, b, most) SMALL_TEST_(SMALL_NEAR_(a, b, most), true, return )
#define ASSERT_NO_FATAL_FAILURE(statement)                                                \
  SMALL_TEST_(                                                                            \
      [&] {                                                                               \
        const std::size_t before = testing::fatal_failures();                             \
        statement;                                                                        \
        return testing::fatal_failures() == before ? std::string() : #statement " fails"; \
      }(),                                                                                \
      true, return )
#define SMALL_JOIN_NOW_(a, b) a##b
#define SMALL_JOIN_(a, b) SMALL_JOIN_NOW_(a, b)
#define SCOPED_TRACE(what) const testing::Trace SMALL_JOIN_(small_trace_, __LINE__)(what)

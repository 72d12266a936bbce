// What the fuzz targets share: numbers read out of the fuzzer's bytes, buffers of exactly the size that is asked for
// (so that AddressSanitizer proves every bound), and a check that stops the program.
//
// A target is FASTV_FUZZ_TARGET(name) { ... }, in which `in` gives the numbers. Built for libFuzzer it is the
// fuzzer's entry; else it joins the list that replay.cpp runs over the corpus.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <type_traits>

#include "../oracle.hpp"

namespace fuzz {

using fastv::Errc;
using fastv::Index;
using fastv::Span;
using fastv::Status;
using fastv::TokenSpan;

class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size), more_(hash(data, size)) {}

  // Behind the end of the bytes come random ones, the same for the same bytes: were they all 0, a short input would
  // only ever choose the first of everything that is drawn late.
  std::uint8_t byte() { return at_ < size_ ? data_[at_++] : static_cast<std::uint8_t>(more_.next()); }
  std::uint64_t word() {
    std::uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value = value << 8 | byte();
    return value;
  }
  std::size_t below(std::size_t bound) {
    std::size_t value = byte();
    if (bound > 256) value = value << 8 | byte();
    return value % bound;
  }
  std::size_t between(std::size_t low, std::size_t high) { return low + below(high - low + 1); }  // both included
  bool one_in(std::size_t n) { return below(n) == n - 1; }
  bool chance() { return (byte() & 1) != 0; }
  double share() {  // 0, 1, quarters, and anything between
    const std::uint8_t kind = byte();
    return kind < 5 ? kind / 4.0 : static_cast<double>(word() >> 11) * 0x1p-53;
  }
  // A count that no one should have handed over: around 0, powers of two, the limits of the types.
  std::size_t hostile() {
    const std::size_t near = below(5);
    switch (below(6)) {
      case 0: return near;
      case 1: return fastv::max_tokens - 2 + near;
      case 2: return (std::size_t{1} << below(64)) - 2 + near;
      case 3: return static_cast<std::size_t>(-1) - near;
      case 4: return (static_cast<std::size_t>(-1) >> 1) - 2 + near;
      default: return static_cast<std::size_t>(word());
    }
  }
  double hostile_real() {
    static const double values[] = {0,    -0.0,   1,        -1,        1 + 0x1p-52, -0x1p-60,    2,
                                    1e30, -1e308, HUGE_VAL, -HUGE_VAL, 0x1p-1074,   std::nan("")};
    const std::size_t i = below(sizeof(values) / sizeof(values[0]) + 1);
    return i < sizeof(values) / sizeof(values[0]) ? values[i] : oracle::double_of_bits(word());
  }
  oracle::Rng random() { return oracle::Rng(word()); }
  const std::uint8_t* rest() const { return data_ + at_; }
  std::size_t left() const { return size_ - at_; }

 private:
  static std::uint64_t hash(const std::uint8_t* data, std::size_t size) {  // FNV-1a
    std::uint64_t value = 14695981039346656037u;
    for (std::size_t i = 0; i < size; ++i) value = (value ^ data[i]) * 1099511628211u;
    return value;
  }

  const std::uint8_t* data_;
  std::size_t size_, at_ = 0;
  oracle::Rng more_;
};

// A heap block of its own, exactly so many elements.
template <class T>
class Block {
 public:
  explicit Block(std::size_t size, T value = T{}) : data_(new T[size]), size_(size) {
    for (std::size_t i = 0; i < size; ++i) data_[i] = value;
  }
  Block(const Block& other) : Block(other.size_) { std::copy(other.begin(), other.end(), data_.get()); }
  Block(Block&&) noexcept = default;
  Block& operator=(Block&&) noexcept = default;
  template <class Container, class = decltype(std::declval<const Container&>().begin())>
  explicit Block(const Container& from) : Block(static_cast<std::size_t>(from.size())) {
    std::copy(from.begin(), from.end(), data_.get());
  }
  T* data() const { return data_.get(); }
  std::size_t size() const { return size_; }
  T& operator[](std::size_t i) const { return data_[i]; }
  T* begin() const { return data_.get(); }
  T* end() const { return data_.get() + size_; }
  Span<T> span() const { return {data_.get(), size_}; }
  Span<const T> view() const { return {data_.get(), size_}; }

 private:
  std::unique_ptr<T[]> data_;
  std::size_t size_;
};

template <class A>
bool same_bits(const Block<A>& a, const Block<A>& b) {
  return a.size() == b.size() && (a.size() == 0 || std::memcmp(a.data(), b.data(), a.size() * sizeof(A)) == 0);
}

[[noreturn]] inline void stop(const char* file, int line, const char* what) {
  std::fprintf(stderr, "%s:%d: FINDING: %s\n", file, line, what);
  std::abort();
}
#define FUZZ_CHECK(condition) \
  if (!(condition)) fuzz::stop(__FILE__, __LINE__, #condition)

// A status that says something readable, whatever numbers are in it.
inline void check_message(const Status& status) {
  const fastv::Message message = status.message();
  const std::size_t length = std::strlen(message.c_str());
  FUZZ_CHECK(length > 0 && length < sizeof(message.text) - 1);
  for (std::size_t i = 0; i < length; ++i) FUZZ_CHECK(message.text[i] >= ' ' && message.text[i] <= '~');
}

// A prompt whose spans are right: sorted, disjoint, grids that fit, some continued, some left empty by earlier stages.
// text_behind: the last token is text.
inline oracle::Layout layout(Input& in, std::size_t most_spans, std::size_t most_in_span, bool text_behind = true) {
  oracle::Layout prompt;
  const std::size_t spans = in.between(0, most_spans);
  for (std::size_t i = 0; i < spans; ++i) {
    prompt.tokens += in.between(0, 5);
    TokenSpan span{prompt.tokens, in.between(1, most_in_span)};
    span.continues = i > 0 && in.one_in(3);
    if (in.one_in(12)) span.count = 0;
    if (span.count == 0 || in.one_in(3)) span.original = span.count + in.below(20) + (span.count == 0 ? 1 : 0);
    prompt.tokens += span.count;
    prompt.visual.push_back(span);
  }
  prompt.tokens += in.between(text_behind || prompt.tokens == 0 ? 1 : 0, 6);
  for (std::size_t i = 0; i < spans; ++i) {
    if (prompt.visual[i].continues || in.one_in(3)) continue;
    std::size_t tokens = prompt.visual[i].count;
    for (std::size_t j = i + 1; j < spans && prompt.visual[j].continues; ++j) tokens += prompt.visual[j].count;
    const std::size_t wanted = in.between(1, 30);
    for (std::size_t columns = wanted; columns > 0; --columns)
      if (tokens % columns == 0) {
        prompt.visual[i].columns = columns;
        break;
      }
  }
  return prompt;
}

// The images of a layout: spans with those that continue them.
struct Image {
  std::size_t first_span = 0, tokens = 0, original = 0, columns = 0;
  double filtering_ratio = fastv::by_config;
};
inline std::vector<Image> images(const std::vector<TokenSpan>& visual) {
  std::vector<Image> all;
  for (std::size_t i = 0; i < visual.size(); ++i) {
    if (!visual[i].continues || i == 0) all.push_back({i, 0, 0, visual[i].columns, visual[i].filtering_ratio});
    all.back().tokens += visual[i].count;
    all.back().original += visual[i].original == 0 ? visual[i].count : visual[i].original;
  }
  return all;
}

// Some images get a ratio of their own; mostly where the settings allow it. False: they do not.
inline bool own_ratios(Input& in, const fastv::Config& config, std::vector<TokenSpan>& visual) {
  const bool allowed = config.quota == fastv::Quota::per_image && config.keep_count == fastv::by_ratio;
  if (!in.one_in(allowed ? 3 : 20)) return true;
  bool any = false;
  for (TokenSpan& span : visual)
    if (!span.continues && in.chance()) {
      span.filtering_ratio = in.share();
      any = true;
    }
  return allowed || !any;
}

// round(tokens * (1 - ratio)), by either rounding.
inline std::size_t kept_of(const fastv::Config& config, std::size_t tokens, std::size_t original, double own) {
  const std::size_t base = config.ratio_of == fastv::RatioOf::original ? original : tokens;
  const double ratio = own >= 0 ? own : config.filtering_ratio;
  std::size_t kept = oracle::kept_of(base, ratio);
  if (config.rounding == fastv::Rounding::up) {
    // What lies within the error of the double product of a whole number is that number.
    volatile const double share = 1 - ratio;
    volatile const double product = static_cast<double>(base) * share;
    const double whole = std::floor(product);
    kept = static_cast<std::size_t>(whole) + (product - whole > static_cast<double>(base) * 4.5e-16 ? 1u : 0u);
  }
  return (std::min)(kept, tokens);
}

// What every image keeps, or the one pool: the rules of plan.hpp, spelled out. count_fits: keep_count is possible.
struct Shares {
  std::vector<std::size_t> quota;  // of each image, or of the pool
  std::vector<std::size_t> least;  // of each image, as far as the count reaches
  std::size_t kept = 0;
  bool count_fits = true;
};
inline Shares shares(const fastv::Config& config, const std::vector<Image>& all) {
  Shares shares;
  std::size_t total = 0, original = 0, minima = 0;
  for (const Image& image : all) {
    total += image.tokens;
    original += image.original;
    shares.least.push_back((std::min)(config.min_per_image, image.tokens));
    minima += shares.least.back();
  }
  const bool by_ratio = config.keep_count == fastv::by_ratio;
  shares.count_fits = total == 0 || by_ratio || config.keep_count <= total;
  if (total == 0 || !shares.count_fits) {
    shares.quota.assign(all.size(), 0);
    return shares;
  }
  if (config.quota == fastv::Quota::pooled) {
    shares.kept = by_ratio ? (std::max)(kept_of(config, total, original, fastv::by_config), minima) : config.keep_count;
    shares.quota = {shares.kept};
    if (minima > shares.kept) shares.least.assign(all.size(), 0);
    return shares;
  }
  if (by_ratio) {
    for (std::size_t i = 0; i < all.size(); ++i)
      shares.quota.push_back(
          (std::max)(kept_of(config, all[i].tokens, all[i].original, all[i].filtering_ratio), shares.least[i]));
  } else {
    if (minima > config.keep_count) shares.least.assign(all.size(), 0), minima = 0;
    std::vector<std::size_t> rest;
    std::size_t weight = 0;
    for (std::size_t i = 0; i < all.size(); ++i) rest.push_back(all[i].tokens - shares.least[i]), weight += rest.back();
    shares.quota =
        weight == 0 ? std::vector<std::size_t>(all.size(), 0) : oracle::quotas(rest, config.keep_count - minima);
    for (std::size_t i = 0; i < all.size(); ++i) shares.quota[i] += shares.least[i];
  }
  shares.kept = std::accumulate(shares.quota.begin(), shares.quota.end(), std::size_t{0});
  return shares;
}

// Settings that are right for any prompt of so many visual tokens.
inline fastv::Config config(Input& in, std::size_t visual_tokens) {
  fastv::Config settings;
  settings.filtering_layer = in.between(1, 5);
  settings.filtering_ratio = in.share();
  settings.ratio_of = in.one_in(4) ? fastv::RatioOf::original : fastv::RatioOf::remaining;
  settings.rounding = in.one_in(4) ? fastv::Rounding::up : fastv::Rounding::half_even;
  if (in.one_in(3)) settings.keep_count = in.below(visual_tokens + 1);
  settings.quota = in.one_in(3) ? fastv::Quota::pooled : fastv::Quota::per_image;
  if (in.one_in(3)) settings.min_per_image = in.below(12);
  return settings;
}

struct Target {
  const char* name;
  void (*run)(Input& in);
  Target* next;
};
inline Target*& targets() {
  static Target* first = nullptr;
  return first;
}
struct Register {
  explicit Register(Target& target) {
    target.next = targets();
    targets() = &target;
  }
};

}  // namespace fuzz

#if defined(FASTV_LIBFUZZER)
#define FASTV_FUZZ_TARGET(name)                                                       \
  static void fuzz_##name(fuzz::Input& in);                                           \
  extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);  \
  extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) { \
    fuzz::Input in(data, size);                                                       \
    fuzz_##name(in);                                                                  \
    return 0;                                                                         \
  }                                                                                   \
  static void fuzz_##name(fuzz::Input& in)
#else
#define FASTV_FUZZ_TARGET(name)                                   \
  static void fuzz_##name(fuzz::Input& in);                       \
  static fuzz::Target target_##name{#name, fuzz_##name, nullptr}; \
  static const fuzz::Register register_##name(target_##name);     \
  static void fuzz_##name(fuzz::Input& in)
#endif

// fastv: what can go wrong, each with a category and one sentence that names the numbers at fault.
#pragma once

#include <cstdio>

#include "view.hpp"

#include "detail/begin.hpp"

namespace fastv {

// What kind of thing went wrong. Status::message() says what exactly.
enum class Errc : unsigned char {
  ok,
  bad_setting,       // a Config, schedule, budget or Rope that is wrong in itself, or does not fit the model
  bad_prompt,        // token count or spans of visual tokens
  bad_shape,         // extents that are 0, too large, or do not fit each other
  bad_stride,        // negative or overlapping strides, misaligned data, sizes that no memory could hold
  null_data,         // a null pointer where there must be data
  too_small,         // an output with less room than is needed
  bad_index,         // kept indices or positions that do not ascend, or lie past the end
  bad_pages,         // a block table that is too short or names a block twice
  bad_value,         // scores that are NaN or infinite, or visual tokens that receive no attention at all
  missing_evidence,  // a rule that ranks by scores without any, or rows that the evidence does not have
  not_supported,     // a setting or tensor that is right in itself but not offered here
  over_budget,       // even the smallest plan costs more than the budget
  out_of_memory,     // scratch memory could not be allocated
  device_error       // what the GPU's runtime reports of a launch or an allocation (cuda.cuh)
};

// One sentence, ready to print.
struct Message {
  char text[320];                                                   // the sentence, ended by a zero
  FASTV_INLINE const char* c_str() const noexcept { return text; }  // the sentence
};

namespace detail {

// One number or word of a sentence. Words are kept as pointers: use literals, or what lives as long.
struct Part {
  enum class Kind : unsigned char { none, whole, real, word };
  Kind kind = Kind::none;
  union {
    long long whole = 0;
    double real;
    const char* word;
  };
  FASTV_INLINE constexpr Part() noexcept {}
  FASTV_INLINE constexpr Part(double value) noexcept : kind(Kind::real), real(value) {}
  FASTV_INLINE constexpr Part(const char* value) noexcept : kind(Kind::word), word(value) {}
  template <class Whole, class = decltype(Whole{} % 2)>
  FASTV_INLINE constexpr Part(Whole value) noexcept : kind(Kind::whole), whole(capped(value)) {}

 private:
  template <class Whole>
  FASTV_INLINE static constexpr long long capped(Whole value) noexcept {
    constexpr auto most = static_cast<unsigned long long>(0x7fffffffffffffffull);
    if constexpr (static_cast<Whole>(-1) > Whole{0} && sizeof(Whole) >= sizeof(long long))
      return static_cast<long long>(value > most ? most : value);
    else
      return static_cast<long long>(value);
  }
};

}  // namespace detail

// Whether something went wrong, and what. True where nothing did.
struct [[nodiscard]] Status {
  Errc code = Errc::ok;            // the category
  const char* sentence = nullptr;  // with {} for each of `parts`; a literal
  detail::Part parts[4] = {};      // the numbers and words at fault

  FASTV_INLINE explicit operator bool() const noexcept { return code == Errc::ok; }  // true where nothing went wrong
  // The sentence, with its numbers in place.
  FASTV_INLINE Message message() const noexcept;
};

// A value, or the Status that says why there is none. Read the value only where the result is true.
template <class T>
struct [[nodiscard]] Result {
  T value{};        // the value
  Status status{};  // why there is none

  // True where there is a value.
  FASTV_INLINE explicit operator bool() const noexcept { return static_cast<bool>(status); }
  FASTV_INLINE const T& operator*() const noexcept { return value; }          // the value, unchecked
  FASTV_INLINE const T* operator->() const noexcept { return &value; }        // the value, unchecked
  FASTV_INLINE Errc code() const noexcept { return status.code; }             // of status
  FASTV_INLINE Message message() const noexcept { return status.message(); }  // of status
};

// A failure, for evidence and adaptors of your own: fail(Errc::bad_shape, "q has {} heads but k has {}", 32, 5). The
// sentence and words among the parts are kept as pointers.
template <class... Parts>
FASTV_INLINE Status fail(Errc code, const char* sentence, Parts... parts) noexcept {
  static_assert(sizeof...(Parts) <= 4, "a sentence has at most four parts");
  return Status{code, sentence, {detail::Part(parts)...}};
}

namespace detail {
inline namespace FASTV_KIND {

inline Message message_of(const Status& status) noexcept {
  Message message;
  char* out = message.text;
  const char* const end = message.text + sizeof(message.text) - 1;
  const char* from = status.code == Errc::ok ? "no error" : status.sentence == nullptr ? "" : status.sentence;
  for (std::size_t part = 0; *from != 0 && out < end;) {
    if (from[0] != '{' || from[1] != '}' || part == 4) {
      *out++ = *from++;
      continue;
    }
    const Part& p = status.parts[part++];
    const auto room = static_cast<std::size_t>(end - out) + 1;
    int written = 0;
    switch (p.kind) {
      case Part::Kind::whole: written = std::snprintf(out, room, "%lld", p.whole); break;
      case Part::Kind::real: written = std::snprintf(out, room, "%g", p.real); break;
      case Part::Kind::word: written = std::snprintf(out, room, "%s", p.word); break;
      case Part::Kind::none: break;
    }
    const auto length = written > 0 ? static_cast<std::size_t>(written) : 0;
    out += length < room ? length : room - 1;
    from += 2;
  }
  *out = 0;
  return message;
}

// Whether a caller's span has the entries that are about to be read or written.
template <class T>
Status expect_room(Span<T> room, std::size_t needed, const char* what) noexcept {
  if (room.size() < needed)
    return fail(Errc::too_small, "{} has room for {} entries but needs {}", what, room.size(), needed);
  if (needed > 0 && room.data() == nullptr)
    return fail(Errc::null_data, "the pointer to {} is null: hand over {} entries", what, needed);
  return {};
}

inline Status fail_null(const char* what) noexcept {
  return fail(Errc::null_data, "the pointer to {} is null: hand over its data", what);
}

}  // namespace FASTV_KIND
}  // namespace detail

inline Message Status::message() const noexcept { return detail::message_of(*this); }

}  // namespace fastv

#include "detail/end.hpp"

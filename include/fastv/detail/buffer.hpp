// fastv: memory that only grows, without exceptions.
#pragma once

#include <new>
#include <utility>

#include "../status.hpp"

#include "begin.hpp"

namespace fastv {
namespace detail {
inline namespace FASTV_KIND {

template <class T>
class Buffer {
 public:
  Buffer() noexcept = default;
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() { delete[] data_; }

  // Room for at least `size` entries. What was in it is lost where it grows.
  Status reserve(std::size_t size) noexcept {
    if (size <= size_) return {};
    // A size whose bytes do not fit makes g++'s new T[size] throw, nothrow or not.
    const bool sane = size <= static_cast<std::size_t>(-1) / 2 / sizeof(T);
    T* data = sane ? new (std::nothrow) T[size] : nullptr;
    if (data == nullptr)
      return fail(Errc::out_of_memory, "{} bytes of scratch memory could not be allocated",
                  sane ? size * sizeof(T) : static_cast<std::size_t>(-1));
    delete[] data_;
    data_ = data;
    size_ = size;
    used_ = 0;
    return {};
  }
  // The same, but the entries in use stay; grows by half again at least, so that entries may be added one by one.
  Status grow(std::size_t size) noexcept {
    if (size <= size_) return {};
    Buffer larger;
    if (Status status = larger.reserve(size > size_ + size_ / 2 ? size : size_ + size_ / 2); !status) return status;
    for (std::size_t i = 0; i < used_; ++i) larger.data_[i] = data_[i];
    larger.used_ = used_;
    swap(larger);
    return {};
  }
  Span<T> first(std::size_t size) const noexcept { return {data_, size}; }
  Span<T> part(std::size_t begin, std::size_t size) const noexcept { return {data_ + begin, size}; }
  T& operator[](std::size_t i) const noexcept { return data_[i]; }
  // The entries that hold a result.
  void use(std::size_t size) noexcept { used_ = size; }
  Span<T> used() const noexcept { return {data_, used_}; }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(used_, other.used_);
  }

  T* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t used_ = 0;
};

}  // namespace FASTV_KIND
}  // namespace detail
}  // namespace fastv

#include "end.hpp"

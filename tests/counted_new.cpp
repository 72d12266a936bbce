#include "counted_new.hpp"

#include <cstdlib>
#include <new>

namespace counted_new {

std::atomic<std::size_t> allocations{0};

namespace {
thread_local bool failing = false;

void* allocate(std::size_t size) noexcept {
  if (size > std::size_t{1} << 40) return nullptr;  // a sanitizer's malloc would abort instead
  ++allocations;
  return std::malloc(size == 0 ? 1 : size);
}
void* allocate_or_throw(std::size_t size) {
  if (void* memory = allocate(size)) return memory;
  throw std::bad_alloc();
}
void* allocate_unless_told_not_to(std::size_t size) noexcept { return failing ? nullptr : allocate(size); }
}  // namespace

void fail_nothrow(bool fail) noexcept { failing = fail; }

}  // namespace counted_new

void* operator new(std::size_t size) { return counted_new::allocate_or_throw(size); }
void* operator new[](std::size_t size) { return counted_new::allocate_or_throw(size); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return counted_new::allocate_unless_told_not_to(size);
}
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept {
  return counted_new::allocate_unless_told_not_to(size);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }

#include "memory.hpp"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

namespace {

// In front of each allocation stands where it came from.
class Memory {
 public:
  static bool begin(bool apart) {
    apart_ = apart;
    if (!apart) {
      void* memory = nullptr;
      if (cudaHostAlloc(&memory, size, cudaHostAllocMapped) != cudaSuccess) return false;
      next_ = static_cast<char*>(memory);
      limit_ = next_ + size;
    }
    on_ = true;
    return true;
  }
  static void end() { ended_ = true; }
  static void* take(std::size_t bytes) noexcept {
    const std::lock_guard<std::recursive_mutex> lock(mutex());
    std::uint32_t power = 7;  // 128 bytes and more, with 64 in front
    while (bytes > (std::size_t{1} << power) - front) ++power;
    Head head{From::plain, power};
    void* memory = nullptr;
    if (on_ && apart_ && !asking_) {
      head.from = From::apart;
      asking_ = true;  // what the runtime itself needs meanwhile is plain memory
      const bool got = cudaHostAlloc(&memory, bytes + front, cudaHostAllocMapped) == cudaSuccess;
      asking_ = false;
      if (!got) return nullptr;
    } else if (on_ && !apart_) {
      head.from = From::stretch;
      if (free_[power] != nullptr) {
        memory = free_[power];
        std::memcpy(&free_[power], memory, sizeof(void*));
      } else {
        if (static_cast<std::size_t>(limit_ - next_) < std::size_t{1} << power) return nullptr;
        memory = next_;
        next_ += std::size_t{1} << power;
      }
    } else if ((memory = std::malloc(bytes + front)) == nullptr) {
      return nullptr;
    }
    std::memcpy(memory, &head, sizeof(head));
    return static_cast<char*>(memory) + front;
  }
  static void give_back(void* allocation) noexcept {
    if (allocation == nullptr || ended_) return;
    const std::lock_guard<std::recursive_mutex> lock(mutex());
    void* memory = static_cast<char*>(allocation) - front;
    Head head;
    std::memcpy(&head, memory, sizeof(head));
    switch (head.from) {
      case From::plain: return std::free(memory);
      case From::apart: return static_cast<void>(cudaFreeHost(memory));
      case From::stretch: std::memcpy(memory, &free_[head.power], sizeof(void*)); free_[head.power] = memory;
    }
  }

 private:
  static constexpr std::size_t front = 64, size = std::size_t{1} << 28;
  enum class From : std::uint32_t { plain, stretch, apart };
  struct Head {
    From from;
    std::uint32_t power;
  };
  static std::recursive_mutex& mutex() {
    static std::recursive_mutex only;
    return only;
  }
  static inline bool on_ = false, apart_ = false, asking_ = false, ended_ = false;
  static inline char *next_ = nullptr, *limit_ = nullptr;
  static inline void* free_[64] = {};
};

}  // namespace

bool card::share_heap(bool apart) { return Memory::begin(apart); }
void card::keep_heap() { Memory::end(); }

void* operator new(std::size_t bytes) {
  if (void* memory = Memory::take(bytes)) return memory;
  std::fputs("device_test: there is no more page-locked memory\n", stderr);
  std::abort();
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return Memory::take(bytes); }
void operator delete(void* memory) noexcept { Memory::give_back(memory); }
void operator delete(void* memory, std::size_t) noexcept { Memory::give_back(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { Memory::give_back(memory); }

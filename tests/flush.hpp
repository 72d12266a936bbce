// Threads that flush denormal floats to zero, as those of many engines and of every program linked with -ffast-math do.
#pragma once

#include <functional>
#include <thread>

#if defined(__SSE2__) || defined(_M_X64)
#include <xmmintrin.h>
#define FASTV_TEST_FLUSHES 1
#elif defined(__aarch64__) && defined(__GNUC__)
#include <cstdint>
#define FASTV_TEST_FLUSHES 1
#else
#define FASTV_TEST_FLUSHES 0
#endif

#if FASTV_TEST_FLUSHES
// Runs `work` on a thread of its own that reads and writes denormals as zero. Returns whether it truly did.
inline bool on_a_flushing_thread(const std::function<void()>& work) {
  bool flushed = false;
  std::thread([&] {
#if defined(__aarch64__)
    std::uint64_t control;
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    __asm__ volatile("msr fpcr, %0" : : "r"(control | (std::uint64_t{1} << 24)));
#else
    _mm_setcsr(_mm_getcsr() | 0x8040);
#endif
    volatile float small = 1.17549435e-38f;
    const volatile float half_of_it = small * 0.5f;
    flushed = half_of_it * 16777216.0f == 0;
    work();
  }).join();
  return flushed;
}
#endif

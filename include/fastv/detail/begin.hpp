// fastv: no #pragma once. Stands in every header behind its includes; end.hpp is its counterpart at the end. Between them
// are the macros that the headers share, and none of those of others that would change a name of ours. So a user of
// fastv.hpp sees FASTV_VERSION_* alone, and other macros as they were.
#if defined(FASTV_KIND)
#error "include detail/begin.hpp behind the other headers"
#endif

// ---- macros of others ---------------------------------------------------------------------------

#pragma push_macro("Status")   // X11: int
#pragma push_macro("check")    // Apple's AssertMacros, Unreal Engine: check(condition)
#pragma push_macro("columns")  // <term.h>
#pragma push_macro("slots")    // Qt: nothing
#undef Status
#undef check
#undef columns
#undef slots

// ---- FASTV_KIND: what this translation unit is compiled for --------------------------------------
//
// Every function of the library lives in an inline namespace named after the instruction sets that the compiler may
// use, so that objects built for different machines can meet in one program: each calls its own copy, and the linker
// never hands AVX2 code to an object built for less. Plain data types (Config, Plan, Status, Kept, the views) are
// shared by all of them; Pruner and BatchPruner belong to the machine they are built for.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define FASTV_SIMD kind_avx512
#elif defined(__AVX512F__)
#define FASTV_SIMD kind_avx512f
#elif defined(__AVX2__)
#define FASTV_SIMD kind_avx2
#elif defined(__AVX__)
#define FASTV_SIMD kind_avx
#elif defined(__SSE4_2__)
#define FASTV_SIMD kind_sse4_2
#elif defined(__SSE4_1__)
#define FASTV_SIMD kind_sse4_1
#elif defined(__SSSE3__)
#define FASTV_SIMD kind_ssse3
#elif defined(__SSE3__)
#define FASTV_SIMD kind_sse3
#elif defined(__ARM_FEATURE_SVE)
#define FASTV_SIMD kind_sve
#else
#define FASTV_SIMD kind_baseline
#endif
#if defined(__FMA__)
#define FASTV_FMA _fma
#else
#define FASTV_FMA
#endif
#if defined(__F16C__)
#define FASTV_F16C _f16c
#else
#define FASTV_F16C
#endif
#if defined(__BMI2__)
#define FASTV_BMI _bmi2
#elif defined(__BMI__)
#define FASTV_BMI _bmi
#else
#define FASTV_BMI
#endif
#if defined(__FAST_MATH__)
#define FASTV_MATH _fast_math
#else
#define FASTV_MATH
#endif
#define FASTV_JOIN_NOW(a, b, c, d, e) a##b##c##d##e
#define FASTV_JOIN(a, b, c, d, e) FASTV_JOIN_NOW(a, b, c, d, e)
#define FASTV_KIND FASTV_JOIN(FASTV_SIMD, FASTV_FMA, FASTV_F16C, FASTV_BMI, FASTV_MATH)

// ---- what else the headers share -----------------------------------------------------------------

// The widest vectors of float, by the vector types of GCC and clang, which need no header and compile to the same code
// at -O2 and -O3. Not 16 floats: memory is the limit, and a Zen 4 widens half precision faster by eights. None on
// 32-bit x86 without SSE2, where vectors have no registers.
#if !defined(__GNUC__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || (defined(__i386__) && !defined(__SSE2__))
#define FASTV_VECTORS 0
#elif defined(__AVX2__)
#define FASTV_VECTORS 8
#else
#define FASTV_VECTORS 4
#endif

// Loops over registers must be fully unrolled, or they spill. nvcc warns of every such pragma in code for the host, its
// own or the host compiler's.
#if defined(__CUDACC__)
#define FASTV_UNROLL
#elif defined(__clang__)
#define FASTV_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FASTV_UNROLL _Pragma("GCC unroll 16")
#endif

// For members of the shared types, which have no namespace of their own to keep the linker from mixing them.
#if defined(__GNUC__)
#define FASTV_INLINE inline __attribute__((always_inline))
#else
#define FASTV_INLINE inline
#endif

// Lets nvcc call small functions from device code as well.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define FASTV_DEVICE __host__ __device__
#else
#define FASTV_DEVICE
#endif
// For code of a kernel: on the device there, a plain function where tests run a kernel's source on the host.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define FASTV_KERNEL __device__
#define FASTV_KERNEL_UNROLL _Pragma("unroll")
#else
#define FASTV_KERNEL
#define FASTV_KERNEL_UNROLL
#endif

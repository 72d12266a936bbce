// fastv: no #pragma once. The last line of every header: takes back what begin.hpp did.
#undef FASTV_SIMD
#undef FASTV_FMA
#undef FASTV_F16C
#undef FASTV_BMI
#undef FASTV_MATH
#undef FASTV_JOIN_NOW
#undef FASTV_JOIN
#undef FASTV_KIND
#undef FASTV_VECTORS
#undef FASTV_UNROLL
#undef FASTV_INLINE
#undef FASTV_DEVICE
#pragma pop_macro("slots")
#pragma pop_macro("columns")
#pragma pop_macro("check")
#pragma pop_macro("Status")

// What fragments of README.md in C99 may name.
#include <fastv/fastv_c.h>
#include <stdio.h>

extern const uint16_t *q, *k;  // [32, 128], [n, 8, 128], half precision
extern float* x;               // [n, 4096]
extern const size_t n;

// The kernels for AVX2.
#include "parallel.h"

#define SIMD_NAME avx2
#define SIMD_BYTES 32
#define SIMD_KERNELS kAvx2Kernels
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "all_kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

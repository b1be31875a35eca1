// The kernels for AVX-512. With EMULATE_AVX512, which `make wide` sets, they are the same vectors of 16 in
// instructions of AVX2, by GCC and slowly, so that their code can be tested on a machine that lacks AVX-512.
#include "parallel.h"

#define SIMD_NAME avx512
#define SIMD_BYTES 64
#define SIMD_KERNELS kAvx512Kernels
#ifdef EMULATE_AVX512
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#else
#define SIMD_AVX512
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,prefer-vector-width=512")
#endif
#endif
#include "all_kernels.h"
#if defined(__clang__) && defined(SIMD_AVX512)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

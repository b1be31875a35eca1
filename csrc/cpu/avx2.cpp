// The kernels for AVX2.
#include "parallel.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define SIMD_NAME avx2
#define SIMD_BYTES 32
#include "ssd.h"
#include "conv.h"
#include "norm.h"
#include "selective.h"
#include "update.h"

namespace vision_scan {
const Kernels kAvx2Kernels = {
    "avx2", avx2::kWidth,
    avx2::ssd, avx2::ssd_backward,
    avx2::conv, avx2::conv_backward,
    avx2::ssd_update, avx2::conv_update,
    avx2::selective, avx2::selective_backward,
    avx2::norm, avx2::norm_backward,
};
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// The kernels for AVX-512.
#include "parallel.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#endif
#define SIMD_NAME avx512
#define SIMD_BYTES 64
#include "ssd.h"
#include "conv.h"
#include "norm.h"
#include "selective.h"
#include "update.h"

namespace vision_scan {
const Kernels kAvx512Kernels = {
    "avx512", avx512::kWidth,
    avx512::ssd, avx512::ssd_backward,
    avx512::conv, avx512::conv_backward,
    avx512::ssd_update, avx512::conv_update,
    avx512::selective, avx512::selective_backward,
    avx512::norm, avx512::norm_backward,
};
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

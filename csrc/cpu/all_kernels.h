// All kernels for the instruction set of the file that includes this, and the table of them.
#include "conv.h"
#include "decode.h"
#include "selective_backward.h"
#include "ssd_backward.h"

#define SIMD_STRING_OF(name) #name
#define SIMD_STRING(name) SIMD_STRING_OF(name)

namespace vision_scan {

const Kernels SIMD_KERNELS = {
    SIMD_STRING(SIMD_NAME),
    SIMD_NAME::ssd,
    SIMD_NAME::ssd_backward,
    SIMD_NAME::ssd_update,
    SIMD_NAME::selective,
    SIMD_NAME::selective_backward,
    SIMD_NAME::selective_update,
    SIMD_NAME::conv,
    SIMD_NAME::conv_backward,
    SIMD_NAME::conv_update,
    SIMD_NAME::norm,
    SIMD_NAME::norm_backward,
    SIMD_NAME::decode,
};

}  // namespace vision_scan

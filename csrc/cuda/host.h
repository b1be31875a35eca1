// What nvcc knows by itself, declared for the C++ compiler that reads the kernels' headers with the operators
// (*_ops.cpp): it sees arguments, sizes and templates, and never makes code of a kernel.
#pragma once

#include <cuda_runtime.h>

extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;
constexpr int warpSize = 32;
#define __launch_bounds__(...)

void __syncthreads();
void __syncwarp(unsigned = 0xffffffffu);
void __threadfence();
size_t __cvta_generic_to_shared(const void*);
unsigned __ballot_sync(unsigned, int);
unsigned __activemask();
int __any_sync(unsigned, int);
int __all_sync(unsigned, int);
template <class T> T __shfl_sync(unsigned, T, int, int = 32);
template <class T> T __shfl_xor_sync(unsigned, T, int, int = 32);
template <class T> T __shfl_up_sync(unsigned, T, unsigned, int = 32);
template <class T> T __shfl_down_sync(unsigned, T, unsigned, int = 32);
template <class T> T atomicAdd(T*, T);
template <class T> T __ldg(const T*);
int __popc(unsigned);
int __ffs(int);
int __clz(int);
float __frcp_rn(float);
float __fdividef(float, float);
float __expf(float);
float __logf(float);
unsigned __float_as_uint(float);
float __uint_as_float(unsigned);
int __float_as_int(float);
float __int_as_float(int);

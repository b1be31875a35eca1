// The words in which the kernels are written: numbers of three formats, vectors, warps, tensor cores, copies.
//
// Compiled by nvcc they are the GPU's own instructions; with EMULATE_CUDA a C++ compiler makes them run on a CPU
// (emulate.h). Kernels use nothing of CUDA beside these, threadIdx and its like, __syncthreads, shuffles and atomicAdd.
#pragma once

#ifdef EMULATE_CUDA
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#ifndef __CUDACC__
#include "host.h"
#endif
#endif
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace vision_scan {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;

// ---- numbers --------------------------------------------------------------------------------------------------

#ifdef EMULATE_CUDA
using bf16 = c10::BFloat16;
using f16 = c10::Half;
inline float to_float(bf16 x) { return x; }
inline float to_float(f16 x) { return x; }
#else
using bf16 = __nv_bfloat16;
using f16 = __half;
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
#endif
__device__ __forceinline__ float to_float(float x) { return x; }

template <class T>
__device__ __forceinline__ T from_float(float x) {
#ifdef EMULATE_CUDA
  return static_cast<T>(x);
#else
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
  else return __float2half_rn(x);
#endif
}

// `n` numbers that are read or written in one access of at most 16 bytes.
template <class T, int n>
struct alignas(sizeof(T) * n) Vec {
  T at[n];
};

template <int n, class T>
__device__ __forceinline__ Vec<T, n> load(const T* from) {
  return *reinterpret_cast<const Vec<T, n>*>(from);
}
template <int n, class T>
__device__ __forceinline__ void store(T* to, const Vec<T, n>& value) {
  *reinterpret_cast<Vec<T, n>*>(to) = value;
}

// `n` numbers as they lie in memory, for kernels that hold many: two of 16 bits stay in one register, and each is
// converted where it is used.
template <class T, int n>
struct alignas(sizeof(T) * n) Packed {
  using Word = std::conditional_t<sizeof(T) * n % 4 == 0, uint32_t, uint16_t>;
  static constexpr int kPerWord = sizeof(Word) / sizeof(T), kWords = n / kPerWord;
  Word words[kWords];

  __device__ __forceinline__ float operator[](int i) const {
    const Word word = words[i / kPerWord] >> (i % kPerWord * 16);
#ifdef EMULATE_CUDA
    T number;
    memcpy(&number, &word, sizeof(T));
    return to_float(number);
#else
    if constexpr (sizeof(T) == 4) return __uint_as_float(word);
    else if constexpr (std::is_same_v<T, f16>) return __half2float(__ushort_as_half(static_cast<uint16_t>(word)));
    else return __uint_as_float(i % kPerWord ? words[i / kPerWord] & 0xffff0000u : static_cast<uint32_t>(word) << 16);
#endif
  }

  // Makes the compiler convert the numbers again from here on, instead of keeping results in registers.
  __device__ __forceinline__ void forget() {
#ifndef EMULATE_CUDA
    if constexpr (sizeof(Word) == 4)
#pragma unroll
      for (Word& word : words) asm volatile("" : "+r"(word));
#endif
  }
};

template <int n, class T>
__device__ __forceinline__ Packed<T, n> load_packed(const T* from) {
  return *reinterpret_cast<const Packed<T, n>*>(from);
}

// Two numbers of 16 bits in a register, the first in the lower half, as the tensor cores take them.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const Vec<T, 2> both{from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, &both, 4);
  return bits;
}
template <class T>
__device__ __forceinline__ void unpack(uint32_t bits, float& low, float& high) {
  Vec<T, 2> both;
  memcpy(&both, &bits, 4);
  low = to_float(both.at[0]);
  high = to_float(both.at[1]);
}

// ---- functions ------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_fast(float x) {
#ifdef EMULATE_CUDA
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ float reciprocal(float x) {
#ifdef EMULATE_CUDA
  return 1 / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // to one unit of the last place
  return y;
#endif
}

// log(1 + exp(x)), to 3e-7 of itself, however small it is. The logarithm is a polynomial in exp(-|x|) of the ordinary
// units, because those of special functions are what the scans wait for.
__device__ __forceinline__ float softplus(float x) {
  const float e = exp2_fast(-fabsf(x) * kLog2e);
  float p = 0.00512610214f;
  p = p * e - 0.0290740647f;
  p = p * e + 0.0775160867f;
  p = p * e - 0.136022476f;
  p = p * e + 0.190768807f;
  p = p * e - 0.24835399f;
  p = p * e + 0.333181217f;
  p = p * e - 0.49999445f;
  p = p * e + 0.999999966f;
  return fmaxf(x, 0.0f) + e * p;
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1 + exp2_fast(-x * kLog2e)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

// ---- sums in memory -------------------------------------------------------------------------------------------

// In one access where the GPU has it (sm_90 on).
__device__ __forceinline__ void atomic_add(float* at, const Vec<float, 4>& x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float4*>(at), make_float4(x.at[0], x.at[1], x.at[2], x.at[3]));
#else
  for (int i = 0; i < 4; ++i) atomicAdd(at + i, x.at[i]);
#endif
}

// ---- warps ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_id() { return threadIdx.x >> 5; }

__device__ __forceinline__ float sum_over_warp(float x) {
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

// ---- shared memory --------------------------------------------------------------------------------------------

// The block's dynamic shared memory, from its first byte.
__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef EMULATE_CUDA
  return emulate::machine().shared_base;
#else
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  return shared_bytes;
#endif
}

// Copies 16 bytes into shared memory while the thread goes on; without `real`, zeros.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool real) {
#ifdef EMULATE_CUDA
  emulate::current().groups.back().push_back({to, from, 16, real ? 16 : 0});
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(real ? 16 : 0));
#endif
}
__device__ __forceinline__ void close_copies() {
#ifdef EMULATE_CUDA
  emulate::current().groups.emplace_back();
#else
  asm volatile("cp.async.commit_group;");
#endif
}
// Waits until at most `left` closed groups of this thread's copies are under way; a barrier shows them to the others.
template <int left>
__device__ __forceinline__ void wait_for_copies() {
#ifdef EMULATE_CUDA
  emulate::finish_copies(left);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(left));
#endif
}

// ---- tensor cores ---------------------------------------------------------------------------------------------
// One warp, 16 x 8 results, 16 products each. With g = lane / 4 and t = lane % 4:
//   a[0]: row g,     columns 2t, 2t + 1;  a[1]: row g + 8;  a[2], a[3]: the same rows, columns + 8
//   b[0]: rows 2t, 2t + 1 of column g;    b[1]: rows + 8
//   d[0], d[1]: row g, columns 2t, 2t + 1;  d[2], d[3]: row g + 8

template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef EMULATE_CUDA
  struct Operands {
    uint32_t a[4], b[2];
  } own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto side = emulate::show(own);
  const int g = emulate::current().lane / 4, t = emulate::current().lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + (i & 1);
    for (int k = 0; k < 16; ++k) {
      const Operands left = emulate::shown<Operands>(side, g * 4 + k % 8 / 2);
      const Operands right = emulate::shown<Operands>(side, column * 4 + k % 8 / 2);
      float x[2], y[2];
      unpack<T>(left.a[(i >= 2) + 2 * (k >= 8)], x[0], x[1]);
      unpack<T>(right.b[k >= 8], y[0], y[1]);
      d[i] += x[k & 1] * y[k & 1];
    }
  }
#else
  if constexpr (std::is_same_v<T, bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory; lane l gives the address of row l % 8 of matrix l / 8.
// Lane l gets of each the numbers at row l / 4, columns 2 (l % 4) and the next; `transposed`: at column l / 4 those rows.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
#ifdef EMULATE_CUDA
  const auto side = emulate::show(row);
  const int g = emulate::current().lane / 4, t = emulate::current().lane % 4;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int half = 0; half < 2; ++half) {
      const int from = transposed ? 2 * t + half : g, at = transposed ? g : 2 * t + half;
      pair[half] = static_cast<const uint16_t*>(emulate::shown<const void*>(side, 8 * i + from))[at];
    }
    memcpy(&r[i], pair, 4);
  }
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
#endif
}

// ---- the card -------------------------------------------------------------------------------------------------

struct Card {
  int processors;       // how many blocks can be at work at once, of blocks that fill one
  size_t most_shared;   // bytes of shared memory that a block may have
};

inline Card card(int device) {
#ifdef EMULATE_CUDA
  return {4, 227 << 10};
#else
  int processors = 0, shared = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return {processors, static_cast<size_t>(shared)};
#endif
}

// ---- launches -------------------------------------------------------------------------------------------------

// Throws std::runtime_error if the GPU refuses.
template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef EMULATE_CUDA
  emulate::launch(kernel, grid, block, shared_bytes, args...);
#elif defined(__CUDACC__)
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 << 10)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    kernel<<<grid, block, shared_bytes, stream>>>(args...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
#endif
}

}  // namespace vision_scan

// Kernels of a chain, each of which begins while the one before it still ends: what does not depend on that one
// (weights, a state of long ago) is asked for first. From Hopper on; before it they follow one another.
//
// A kernel lets the next one begin only behind its own wait. So what a kernel reads ahead of its wait must have been
// written by the last kernel but one or earlier, and the first of a chain is launched as any other.
#pragma once

#include "device.h"

namespace vision_scan {

// Behind this the results of the kernels before are there, and the next kernel may begin.
__device__ __forceinline__ void wait_for_previous() {
#if !defined(EMULATE_CUDA) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// 16 bytes that nobody else needs and that no kernel of the chain writes: they leave no trace in the nearest cache.
template <class T>
__device__ __forceinline__ Vec<T, 16 / sizeof(T)> load_once(const T* from) {
#ifdef EMULATE_CUDA
  return load<16 / sizeof(T)>(from);
#else
  uint32_t bits[4];
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3]) : "l"(from));
  Vec<T, 16 / sizeof(T)> value;
  memcpy(&value, bits, 16);
  return value;
#endif
}

// As `launch`; `chained`: the kernel may begin before the one ahead of it has ended, and waits for it itself.
template <class... Params, class... Args>
void launch_chained(bool chained, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                    cudaStream_t stream, const Args&... args) {
#ifndef EMULATE_CUDA
  static const bool can_chain = [] {
    int device = 0, major = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return major >= 9;
  }();
  if (chained && can_chain && grid.x && grid.y && grid.z) {
    cudaError_t error = cudaSuccess;
    if (shared_bytes > 48 << 10)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = 1;
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, Params(args)...);
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
    return;
  }
#endif
  launch(kernel, grid, block, shared_bytes, stream, args...);
}

}  // namespace vision_scan

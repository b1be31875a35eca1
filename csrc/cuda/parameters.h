// Parameters of a layer: float32, whatever the type of its tokens, or of that type.
#pragma once

#include "device.h"

namespace vision_scan {

template <class T>
struct Parameter {
  const void* at;  // null: none
  bool is_float;

  // n parameters from number `first` on, in one access where n is a power of 2; then they must be aligned to it.
  template <int n>
  __device__ __forceinline__ void read(int64_t first, float (&to)[n]) const {
    if (is_float)
      read_as(static_cast<const float*>(at) + first, to);
    else
      read_as(static_cast<const T*>(at) + first, to);
  }

 private:
  template <class Own, int n>
  static __device__ __forceinline__ void read_as(const Own* from, float (&to)[n]) {
    constexpr int most = 16 / sizeof(Own), together = n & (n - 1) ? 1 : n < most ? n : most;
#pragma unroll
    for (int i = 0; i < n; i += together) {
      const Vec<Own, together> some = load<together>(from + i);
#pragma unroll
      for (int j = 0; j < together; ++j) to[i + j] = to_float(some.at[j]);
    }
  }
};

// Whether vectors of n numbers can be read at an address, and at whole multiples of n behind it.
template <class T>
bool is_aligned(const T* at, int n) {
  return reinterpret_cast<uintptr_t>(at) % (n * sizeof(T)) == 0;
}
template <class T>
bool is_aligned(const Parameter<T>& parameter) {
  return reinterpret_cast<uintptr_t>(parameter.at) % 16 == 0;
}

}  // namespace vision_scan

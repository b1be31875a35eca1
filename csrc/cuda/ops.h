// What the operators of the library `vision_scan_cuda` share: checks before any pointer is touched, and where to run.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#ifndef EMULATE_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "parameters.h"
#include "../cells.h"
#include "tokens.h"

namespace vision_scan {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

#ifdef EMULATE_CUDA
constexpr at::DeviceType kDevice = at::kCPU;
struct Here {
  explicit Here(const Tensor&) {}
  cudaStream_t stream = nullptr;
};
#else
constexpr at::DeviceType kDevice = at::kCUDA;
// Makes the tensor's GPU the current one for as long as it lives; its current stream is where kernels go.
struct Here {
  explicit Here(const Tensor& t) : guard(t.device()), stream(c10::cuda::getCurrentCUDAStream().stream()) {}
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
};
#endif

inline void check_shape(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.device().type() == kDevice, name, " must be on ", kDevice, ", got ", tensor.device());
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
}

inline void check(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype) {
  check_shape(name, tensor, shape, dtype);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous");
}

// The same for a tensor that may be a piece of a wider one: its first `leading` axes, counted as one, may have any
// stride, which is returned; what is behind them is contiguous.
inline int64_t check_cells(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype,
                           int64_t leading) {
  check_shape(name, tensor, shape, dtype);
  return cell_stride(name, tensor, leading);
}

inline void check(const char* name, const OptionalTensor& tensor, at::IntArrayRef shape, at::ScalarType dtype) {
  if (tensor) check(name, *tensor, shape, dtype);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
const T* data(const OptionalTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A parameter of a layer: float32, or of the dtype that its tokens have.
template <class T>
Parameter<T> parameter(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype) {
  const bool is_float = tensor.scalar_type() == at::kFloat;
  check(name, tensor, shape, is_float ? at::kFloat : dtype);
  return {tensor.const_data_ptr(), is_float};
}
template <class T>
Parameter<T> parameter(const char* name, const OptionalTensor& tensor, at::IntArrayRef shape, at::ScalarType dtype) {
  return tensor ? parameter<T>(name, *tensor, shape, dtype) : Parameter<T>{};
}

// Calls `run` with a value of the kernels' type for a dtype.
template <class Run>
void with_type(at::ScalarType dtype, const Run& run) {
  switch (dtype) {
    case at::kFloat: return run(float{});
    case at::kBFloat16: return run(bf16{});
    case at::kHalf: return run(f16{});
    default: TORCH_CHECK_VALUE(false, "dtype must be float32, bfloat16 or float16, got ", dtype);
  }
}

// index (lists, seqlen) int32, marks (batch, seqlen) uint8, bounds (segments + 1) int32. Their values are not looked
// at: that would make the CPU wait for the GPU. The public operators take indices from checked orders only.
inline Tokens make_tokens(int64_t batch, int64_t lists, int64_t cells, const OptionalTensor& index,
                          const OptionalTensor& marks, const OptionalTensor& bounds) {
  const int64_t seqlen = index ? index->size(-1) : cells;
  check("index", index, {lists, seqlen}, at::kInt);
  check("marks", marks, {batch, seqlen}, at::kByte);
  TORCH_CHECK_VALUE(index || lists == 1, "without an index there is one list, got ", lists);
  int64_t segments = 0;
  if (bounds) {
    TORCH_CHECK_VALUE(batch == 1 && !index, "bounds need a batch of 1 and no index, got batch ", batch);
    check("bounds", *bounds, {bounds->numel()}, at::kInt);
    segments = bounds->numel() - 1;
  }
  const auto as_int = [](int64_t n) { return static_cast<int>(n); };
  return {as_int(batch),   as_int(lists),        as_int(seqlen),    as_int(cells), data<int>(index),
          data<uint8_t>(marks), data<int>(bounds), as_int(segments)};
}

}  // namespace vision_scan

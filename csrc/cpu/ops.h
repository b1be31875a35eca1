// What the operators share: the kernels of this machine, and checks that come before any pointer is touched.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include "../cells.h"
#include "kernels.h"

namespace vision_scan {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The kernels for this machine, or null if it has not even AVX2.
inline const Kernels* kernels() {
  static const Kernels* found = [] {
#ifdef EMULATE_AVX512
    return &kAvx512Kernels;
#else
    const std::string capability = at::get_cpu_capability();  // honours ATEN_CPU_CAPABILITY
    const bool wide = capability.find("AVX512") == 0;
    if (wide && __builtin_cpu_supports("avx512vnni")) return &kAvx512Kernels;
    if (wide || capability.find("AVX2") == 0) return &kAvx2Kernels;
    return static_cast<const Kernels*>(nullptr);
#endif
  }();
  return found;
}

inline void check_shape(const char* name, const Tensor& tensor, at::IntArrayRef shape,
                        at::ScalarType dtype = at::kFloat) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU, got ", tensor.device());
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
}

inline void check(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype = at::kFloat) {
  check_shape(name, tensor, shape, dtype);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous");
}

// The same for a tensor that may be a piece of a wider one: its first `leading` axes, counted as one, may have any
// stride, which is returned; what is behind them is contiguous.
inline int64_t check_cells(const char* name, const Tensor& tensor, at::IntArrayRef shape, int64_t leading) {
  check_shape(name, tensor, shape);
  return cell_stride(name, tensor, leading);
}

inline const float* data(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

inline const int64_t* integers(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<int64_t>() : nullptr;
}

inline Tokens make_tokens(int64_t batch, int64_t lists, int64_t cells, const OptionalTensor& seq_idx,
                          const OptionalTensor& cu_seqlens, const OptionalTensor& index) {
  int64_t seqlen = cells;
  if (index) {
    TORCH_CHECK_VALUE(index->dim() == 2, "index must have 2 axes, got ", index->dim());
    seqlen = index->size(1);
    check("index", *index, {lists, seqlen}, at::kLong);
    TORCH_CHECK_VALUE(index->numel() == 0 || index->max().item<int64_t>() < cells, "index must be below ", cells,
                      ", got ", index->max());
  } else {
    TORCH_CHECK_VALUE(lists == 1, "without an index there is one list, got ", lists);
  }
  if (seq_idx) check("seq_idx", *seq_idx, {batch, seqlen}, at::kLong);
  int64_t segments = 0;
  if (cu_seqlens) {
    TORCH_CHECK_VALUE(batch == 1 && lists == 1, "cu_seqlens needs batch 1 and one list, got ", batch, " and ", lists);
    check("cu_seqlens", *cu_seqlens, {cu_seqlens->numel()}, at::kLong);
    segments = cu_seqlens->numel() - 1;
    const int64_t* bounds = cu_seqlens->const_data_ptr<int64_t>();
    bool rises = segments >= 0 && bounds[0] == 0 && bounds[segments] == seqlen;
    for (int64_t i = 0; i < segments; ++i) rises = rises && bounds[i] <= bounds[i + 1];
    TORCH_CHECK_VALUE(rises, "cu_seqlens must rise from 0 to seqlen ", seqlen, ", got ", *cu_seqlens);
  }
  return {batch, lists, seqlen, cells, integers(index), integers(seq_idx), integers(cu_seqlens), segments};
}

// Sums over the rows of each list, which share its parameters: (rows, ...) to (lists, ...).
inline Tensor over_rows(const Tensor& sums, const Tokens& tokens) {
  return sums.unflatten(0, {tokens.rows() / tokens.lists, tokens.lists}).sum(0);
}

inline Update make_update(int64_t num_slots, int64_t rows, int64_t seqlen, const OptionalTensor& slots,
                          const OptionalTensor& seq_idx) {
  if (seq_idx) check("seq_idx", *seq_idx, {rows, seqlen}, at::kLong);
  if (slots) {
    check("slots", *slots, {rows}, at::kLong);
    TORCH_CHECK_VALUE(rows == 0 || slots->max().item<int64_t>() < num_slots, "slots must be below ", num_slots,
                      ", got ", slots->max());
  } else {
    TORCH_CHECK_VALUE(rows == num_slots, "without slots there is a row for each of ", num_slots, " states, got ", rows);
  }
  return {rows, seqlen, integers(slots), integers(seq_idx)};
}

}  // namespace vision_scan

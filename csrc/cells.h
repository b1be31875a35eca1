// Tensors that the operators of CPU and GPU read where they lie.
#pragma once

#include <ATen/ATen.h>

namespace vision_scan {

// The stride from cell to cell of a tensor that may be a piece of a wider one: its first `leading` axes, counted as
// one, may have any stride; what is behind them must be contiguous, else a ValueError says so.
inline int64_t cell_stride(const char* name, const at::Tensor& tensor, int64_t leading) {
  int64_t inner = 1, cells = 1, stride = -1;
  bool fits = true;
  for (int64_t axis = tensor.dim() - 1; axis >= 0; --axis) {
    const int64_t size = tensor.size(axis), own = tensor.stride(axis);
    if (axis >= leading) {
      fits = fits && (size == 1 || own == inner);
      inner *= size;
    } else {
      if (stride < 0 && size > 1) stride = own;  // the innermost that says something
      fits = fits && (size == 1 || own == stride * cells);
      cells *= size;
    }
  }
  TORCH_CHECK_VALUE(fits || tensor.numel() == 0, name, " must be contiguous behind its first ", leading,
                    " axes, which have one stride, got strides ", tensor.strides());
  return stride < 0 ? inner : stride;
}

}  // namespace vision_scan

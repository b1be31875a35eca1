// The kernels for a machine without a GPU: see emulate.h.
#include <torch/library.h>

#include "selective.cu"
#include "ssd.cu"
#include "ssd_backward.cu"

namespace vision_scan {

TORCH_LIBRARY_FRAGMENT(vision_scan_cuda, m) {
  m.def("descending(bool value) -> ()", [](bool value) { emulate::machine().descending = value; });
}

}  // namespace vision_scan

// The kernels for a machine without a GPU: see emulate.h.
#include <torch/library.h>

#include "deferred.cu"
#include "project.cu"
#include "selective.cu"
#include "selective_backward.cu"
#include "update.cu"

namespace vision_scan {

TORCH_LIBRARY_FRAGMENT(vision_scan_cuda, m) {
  m.def("descending(bool value) -> ()", [](bool value) { emulate::machine().descending = value; });
}

}  // namespace vision_scan

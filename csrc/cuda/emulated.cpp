// Settings of the emulator (emulate.h) for tests.
#include <torch/library.h>

#include "emulate.h"

TORCH_LIBRARY_FRAGMENT(vision_scan_cuda, m) {
  m.def("descending(bool value) -> ()", [](bool value) { emulate::machine().descending = value; });
}

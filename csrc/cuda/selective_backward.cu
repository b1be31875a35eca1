#include "selective_backward.h"

namespace vision_scan {

template <class T>
void selective_backward(const Selective<T>& a, const SelectiveGradients<T>& g, cudaStream_t stream) {
  const int units = a.shared_input ? a.tokens.batch : a.tokens.rows();
  const dim3 grid(static_cast<unsigned>(units) * selective::Block::how_many(a.channels, a.ngroups));
  const size_t shared = selective::SharedBackward::bytes(a.d_state, a.shared_input && !a.scratch ? a.tokens.cells : 0);
  launch(selective::backward<T>, grid, dim3(selective::kThreads), shared, stream, a, g);
}

template void selective_backward(const Selective<float>&, const SelectiveGradients<float>&, cudaStream_t);
template void selective_backward(const Selective<bf16>&, const SelectiveGradients<bf16>&, cudaStream_t);
template void selective_backward(const Selective<f16>&, const SelectiveGradients<f16>&, cudaStream_t);

}  // namespace vision_scan

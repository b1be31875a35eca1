#include "selective.h"

namespace vision_scan {

template <class T>
void selective_forward(const Selective<T>& a, cudaStream_t stream) {
  const bool merge = a.merged_output && !a.states_only;
  const int units = merge ? a.tokens.batch : a.tokens.rows();
  const dim3 grid(static_cast<unsigned>(units) * selective::Block::how_many(a.channels, a.ngroups));
  const size_t shared = selective::Shared::bytes(a.d_state, merge && !a.scratch ? a.tokens.cells : 0);
  launch(selective::forward<T>, grid, dim3(selective::kThreads), shared, stream, a);
}

template void selective_forward(const Selective<float>&, cudaStream_t);
template void selective_forward(const Selective<bf16>&, cudaStream_t);
template void selective_forward(const Selective<f16>&, cudaStream_t);

}  // namespace vision_scan

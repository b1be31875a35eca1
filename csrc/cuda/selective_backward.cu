#include "selective_backward.h"

namespace vision_scan {
namespace {

template <selective::Output output, class T>
void run_backward(const Selective<T>& a, const SelectiveGradients<T>& g, cudaStream_t stream) {
  const int units = output == selective::kApart ? a.tokens.rows() : a.tokens.batch;
  const dim3 grid(static_cast<unsigned>(units) * selective::Block::how_many(a.channels, a.ngroups));
  const size_t shared = selective::SharedBackward::bytes(a.d_state, output == selective::kOnChip ? a.tokens.cells : 0);
  if (selective::Block::all_whole(a.channels, a.ngroups))
    launch(selective::backward<T, true, output>, grid, dim3(selective::kThreads), shared, stream, a, g);
  else
    launch(selective::backward<T, false, output>, grid, dim3(selective::kThreads), shared, stream, a, g);
}

}  // namespace

template <class T>
void selective_backward(const Selective<T>& a, const SelectiveGradients<T>& g, cudaStream_t stream) {
  if (!a.shared_input)
    run_backward<selective::kApart>(a, g, stream);
  else if (a.scratch)
    run_backward<selective::kInScratch>(a, g, stream);
  else
    run_backward<selective::kOnChip>(a, g, stream);
}

template void selective_backward(const Selective<float>&, const SelectiveGradients<float>&, cudaStream_t);
template void selective_backward(const Selective<bf16>&, const SelectiveGradients<bf16>&, cudaStream_t);
template void selective_backward(const Selective<f16>&, const SelectiveGradients<f16>&, cudaStream_t);

}  // namespace vision_scan

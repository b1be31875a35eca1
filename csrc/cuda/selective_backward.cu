#include "selective_backward.h"

namespace vision_scan {
namespace {

using namespace selective;

template <Output output, class T>
void run_backward(const Selective<T>& a, const SelectiveGradients<T>& g, cudaStream_t stream) {
  const int units = output == kApart ? a.tokens.rows() : a.tokens.batch;
  const dim3 grid(static_cast<unsigned>(units) * Block::how_many(a.channels, a.ngroups));
  const size_t shared = SharedBackward::bytes(a.d_state, output == kOnChip ? a.tokens.cells : 0);
  if (Block::all_whole(a.channels, a.ngroups))
    launch(backward<T, true, output>, grid, dim3(kThreads), shared, stream, a, g);
  else
    launch(backward<T, false, output>, grid, dim3(kThreads), shared, stream, a, g);
}

}  // namespace

template <class T>
void selective_backward(const Selective<T>& a, const SelectiveGradients<T>& g, cudaStream_t stream) {
  if (!a.shared_input)
    run_backward<kApart>(a, g, stream);
  else if (a.scratch)
    run_backward<kInScratch>(a, g, stream);
  else
    run_backward<kOnChip>(a, g, stream);
}

template void selective_backward(const Selective<float>&, const SelectiveGradients<float>&, cudaStream_t);
template void selective_backward(const Selective<bf16>&, const SelectiveGradients<bf16>&, cudaStream_t);
template void selective_backward(const Selective<f16>&, const SelectiveGradients<f16>&, cudaStream_t);

}  // namespace vision_scan

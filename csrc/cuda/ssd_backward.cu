#include "ssd_backward.h"

namespace vision_scan {

size_t ssd_backward_shared_bytes(size_t number_bytes, int headdim, int d_state) {
  return ssd::with_block(number_bytes, headdim, d_state, [](auto number, auto block) {
    return ssd::BackwardShared<decltype(number), block.P, block.N>::kBytes;
  });
}

template <class T>
void ssd_backward(const Ssd<T>& a, const SsdGradients<T>& g, cudaStream_t stream) {
  ssd::with_block<T>(a.headdim, a.d_state, [&](auto block) {
    const unsigned blocks = a.tokens.rows() * a.chunks() * a.ngroups * g.head_blocks;
    launch(ssd::backward<T, block.P, block.N>, dim3(blocks), dim3(ssd::kBackwardThreads),
           ssd::BackwardShared<T, block.P, block.N>::kBytes, stream, a, g);
  });
}

template void ssd_backward(const Ssd<float>&, const SsdGradients<float>&, cudaStream_t);
template void ssd_backward(const Ssd<bf16>&, const SsdGradients<bf16>&, cudaStream_t);
template void ssd_backward(const Ssd<f16>&, const SsdGradients<f16>&, cudaStream_t);

}  // namespace vision_scan

#include "ssd.h"

#include <algorithm>

namespace vision_scan {
namespace {

template <ssd::Pass pass, class T>
void launch_pass(const Ssd<T>& a, cudaStream_t stream) {
  ssd::with_block<T>(a.headdim, a.d_state, [&](auto block) {
    constexpr int P = block.P, N = block.N;
    const unsigned units = a.tokens.rows() * a.nheads * ((a.headdim + P - 1) / P);
    launch(ssd::forward<T, P, N, pass>, dim3(units, a.segments), dim3(ssd::kThreads),
           ssd::Shared<T, P, N>::kBytes, stream, a);
  });
}

}  // namespace

int ssd_blocks(size_t number_bytes, int headdim, int d_state) {
  return ssd::with_block(number_bytes, headdim, d_state, [&](auto, auto block) { return (headdim + block.P - 1) / block.P; });
}

size_t ssd_shared_bytes(size_t number_bytes, int headdim, int d_state) {
  return ssd::with_block(number_bytes, headdim, d_state, [](auto number, auto block) {
    return ssd::Shared<decltype(number), block.P, block.N>::kBytes;
  });
}

template <class T>
void ssd_forward(const Ssd<T>& a, ssd::Pass pass, cudaStream_t stream) {
  switch (pass) {
    case ssd::kOutputs: return launch_pass<ssd::kOutputs>(a, stream);
    case ssd::kStates: return launch_pass<ssd::kStates>(a, stream);
    case ssd::kStateGradients: return launch_pass<ssd::kStateGradients>(a, stream);
  }
}

template <class T>
void ssd_compose(const Ssd<T>& a, const float* initial_state, ssd::Pass pass, cudaStream_t stream) {
  const unsigned pieces = (a.headdim * a.d_state + 255) / 256;
  launch(ssd::compose<T>, dim3(a.tokens.rows() * a.nheads * pieces), dim3(256), 0, stream, a, initial_state,
         pass == ssd::kStateGradients);
}

template void ssd_forward(const Ssd<float>&, ssd::Pass, cudaStream_t);
template void ssd_forward(const Ssd<bf16>&, ssd::Pass, cudaStream_t);
template void ssd_forward(const Ssd<f16>&, ssd::Pass, cudaStream_t);
template void ssd_compose(const Ssd<float>&, const float*, ssd::Pass, cudaStream_t);
template void ssd_compose(const Ssd<bf16>&, const float*, ssd::Pass, cudaStream_t);
template void ssd_compose(const Ssd<f16>&, const float*, ssd::Pass, cudaStream_t);

}  // namespace vision_scan

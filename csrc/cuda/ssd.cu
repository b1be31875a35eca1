#include "ssd.h"

#include <algorithm>

namespace vision_scan {
namespace {

template <int channels, int states>
struct Block {
  static constexpr int P = channels, N = states;
};

// Calls `run` with the sizes of a block: the next above the scan's own.
template <class T, class Run>
auto with_block(int headdim, int d_state, const Run& run) {
  if (d_state > 128) return run(Block<32, 256>{});
  if constexpr (sizeof(T) == 2) {
    if (headdim <= 32 && d_state > 64) return run(Block<32, 128>{});
    if (headdim <= 32) return d_state > 32 ? run(Block<32, 64>{}) : run(Block<32, 32>{});
  }
  if (d_state > 64) return run(Block<64, 128>{});
  return d_state > 32 ? run(Block<64, 64>{}) : run(Block<64, 32>{});
}
// The same where only the size of the numbers is known.
template <class Run>
auto with_block(size_t number_bytes, int headdim, int d_state, const Run& run) {
  return number_bytes == 4 ? with_block<float>(headdim, d_state, [&](auto block) { return run(float{}, block); })
                           : with_block<bf16>(headdim, d_state, [&](auto block) { return run(bf16{}, block); });
}

template <bool outputs_wanted, class T>
void launch_forward(const Ssd<T>& a, cudaStream_t stream) {
  with_block<T>(a.headdim, a.d_state, [&](auto block) {
    constexpr int P = block.P, N = block.N;
    const unsigned units = a.tokens.rows() * a.nheads * ((a.headdim + P - 1) / P);
    launch(ssd::forward<T, P, N, outputs_wanted>, dim3(units, a.segments), dim3(ssd::kThreads),
           ssd::Shared<T, P, N>::kBytes, stream, a);
  });
}

}  // namespace

int ssd_blocks(size_t number_bytes, int headdim, int d_state) {
  return with_block(number_bytes, headdim, d_state, [&](auto, auto block) { return (headdim + block.P - 1) / block.P; });
}

size_t ssd_shared_bytes(size_t number_bytes, int headdim, int d_state) {
  return with_block(number_bytes, headdim, d_state, [](auto number, auto block) {
    return ssd::Shared<decltype(number), block.P, block.N>::kBytes;
  });
}

template <class T>
void ssd_forward(const Ssd<T>& a, cudaStream_t stream) {
  launch_forward<true>(a, stream);
}

template <class T>
void ssd_states(const Ssd<T>& a, cudaStream_t stream) {
  launch_forward<false>(a, stream);
}

template <class T>
void ssd_compose(const Ssd<T>& a, const float* initial_state, cudaStream_t stream) {
  const unsigned pieces = (a.headdim * a.d_state + 255) / 256;
  launch(ssd::compose<T>, dim3(a.tokens.rows() * a.nheads * pieces), dim3(256), 0, stream, a, initial_state);
}

template void ssd_forward(const Ssd<float>&, cudaStream_t);
template void ssd_forward(const Ssd<bf16>&, cudaStream_t);
template void ssd_forward(const Ssd<f16>&, cudaStream_t);
template void ssd_states(const Ssd<float>&, cudaStream_t);
template void ssd_states(const Ssd<bf16>&, cudaStream_t);
template void ssd_states(const Ssd<f16>&, cudaStream_t);
template void ssd_compose(const Ssd<float>&, const float*, cudaStream_t);
template void ssd_compose(const Ssd<bf16>&, const float*, cudaStream_t);
template void ssd_compose(const Ssd<f16>&, const float*, cudaStream_t);

}  // namespace vision_scan

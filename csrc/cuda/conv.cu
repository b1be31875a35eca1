#include "conv_backward.h"

namespace vision_scan {

using conv::kThreads;

template <class T>
int conv_forward_run(const Conv<T>& a, int processors) {
  const int vectors = (a.channels * static_cast<int>(sizeof(T)) + 15) / 16;
  return conv::run_of(conv::lines_of(a.tokens), a.tokens.seqlen, vectors, processors, 128);
}

template <class T>
void conv_forward(const Conv<T>& a, cudaStream_t stream) {
  constexpr int whole = 16 / sizeof(T);
  conv::with_kernel<whole>(a, is_aligned(a.y, whole), [&](auto taps, auto n, auto general) {
    const int vectors = a.channels / n, runs = (a.tokens.seqlen + a.run - 1) / a.run;
    const dim3 grid(conv::lines_of(a.tokens) * ((vectors * runs + kThreads - 1) / kThreads));
    launch(conv::forward<T, taps, n, general>, grid, dim3(kThreads), 0, stream, a);
  });
}

template <class T>
int conv_backward_run(const Conv<T>& a, int processors) {
  return conv::run_of(conv::lines_of(a.tokens), a.tokens.seqlen, (a.channels + 3) / 4, processors, 256);
}

template <class T>
void conv_backward(const Conv<T>& a, const ConvGradients<T>& g, cudaStream_t stream) {
  constexpr int some = 4;  // channels of a thread: weights, window and their gradients fit into its registers
  const bool aligned = is_aligned(g.dy, some) && is_aligned(g.dx, some);
  conv::with_kernel<some>(a, aligned, [&](auto taps, auto n, auto general) {
    const int columns = (a.channels + 32 * n - 1) / (32 * n), parts = conv::parts_of(a.tokens.seqlen, a.run);
    const size_t shared = sizeof(float) * conv::kRuns * (taps + 1) * 32 * n;
    launch(conv::backward<T, taps, n, general>, dim3(conv::lines_of(a.tokens) * parts * columns), dim3(kThreads),
           shared, stream, a, g);
  });
}

#define INSTANTIATE(T)                                        \
  template int conv_forward_run(const Conv<T>&, int);         \
  template void conv_forward(const Conv<T>&, cudaStream_t);   \
  template int conv_backward_run(const Conv<T>&, int);        \
  template void conv_backward(const Conv<T>&, const ConvGradients<T>&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(f16)
#undef INSTANTIATE

}  // namespace vision_scan

#include "norm.h"

#include <algorithm>

namespace vision_scan {
namespace {

// Calls f(n, vectors) with constants.
template <class T, class F>
void with_shape(const norm::Shape& shape, const F& f) {
  constexpr std::integral_constant<int, 16 / sizeof(T)> whole;
  constexpr std::integral_constant<int, 1> one;
  const auto with = [&](auto n, auto vectors) {
    if (shape.n == n && shape.vectors == vectors) f(n, vectors);
  };
  with(whole, std::integral_constant<int, 1>());
  with(whole, std::integral_constant<int, 2>());
  with(whole, std::integral_constant<int, 4>());
  with(whole, std::integral_constant<int, 0>());
  with(one, std::integral_constant<int, 4>());
  with(one, std::integral_constant<int, 0>());
}

// For sums over a block, twice; and for those of the weight where registers do not hold them.
size_t shared_bytes(const norm::Shape& shape, int group_size) {
  return sizeof(float) * (2 * 2 * (norm::kMostThreads / 32) + (shape.vectors ? 0 : group_size));
}

// Blocks for as many teams as there are groups in all.
dim3 grid_of(const norm::Shape& shape, int groups) {
  return dim3((groups + shape.teams() - 1) / shape.teams());
}

}  // namespace

template <class T>
void norm_forward(const Norm<T>& a, cudaStream_t stream) {
  const norm::Shape shape = norm::shape_of(a);
  with_shape<T>(shape, [&](auto n, auto vectors) {
    launch(norm::forward<T, n, vectors>, grid_of(shape, a.rows * (a.channels / a.group_size)), dim3(shape.threads()),
           shared_bytes(shape, 0), stream, a, shape.lanes);
  });
}

template <class T>
int norm_slices(const Norm<T>& a, int processors) {
  const norm::Shape shape = norm::shape_of(a, true);
  const int teams = processors * std::max(1, norm::kMostThreads / shape.threads()) * shape.teams();
  return std::max(1, std::min(a.rows, teams / (a.channels / a.group_size)));
}

template <class T>
void norm_backward(const Norm<T>& a, const NormGradients<T>& g, cudaStream_t stream) {
  const norm::Shape shape = norm::shape_of(a, g);
  with_shape<T>(shape, [&](auto n, auto vectors) {
    launch(norm::backward<T, n, vectors>, grid_of(shape, g.slices * (a.channels / a.group_size)),
           dim3(shape.threads()), shared_bytes(shape, a.group_size), stream, a, g, shape.lanes);
  });
}

#define INSTANTIATE(T)                                   \
  template void norm_forward(const Norm<T>&, cudaStream_t); \
  template int norm_slices(const Norm<T>&, int);            \
  template void norm_backward(const Norm<T>&, const NormGradients<T>&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(f16)
#undef INSTANTIATE

}  // namespace vision_scan

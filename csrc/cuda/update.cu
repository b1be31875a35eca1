#include "update.h"

namespace vision_scan {
namespace {

// Calls launch(kernel for whole accesses of 16 bytes or single numbers, its lanes).
template <class A, class Narrow, class Wide, class Single, class Launch>
void with_width(const A& a, bool whole, Narrow narrow, Wide wide, Single single, const Launch& launch) {
  if (!whole)
    launch(single, update::lanes_for(a.d_state, 1));
  else if (a.d_state <= 128)
    launch(narrow, update::lanes_for(a.d_state, 4));
  else
    launch(wide, 32);
}

bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <class T>
bool is_aligned(const Piece<T>& piece) {
  return is_aligned(piece.data, 4 * sizeof(T)) && piece.row % 4 == 0 && piece.token % 4 == 0;
}

}  // namespace

template <class T>
void ssd_update(const SsdUpdate<T>& a, bool chained, cudaStream_t stream) {
  const auto run = [&](auto kernel, int lanes) {
    const int rows = update::kThreads / lanes * update::kRows;
    const dim3 grid((a.headdim + rows - 1) / rows, a.nheads, a.rows.rows);
    launch_chained(chained, kernel, grid, dim3(update::kThreads), 0, stream, a, lanes);
  };
  if (a.codes) return run(update::ssd<T, update::kCodes, 1>, update::lanes_for(a.d_state, update::kCodes));
  const bool whole = a.d_state % 4 == 0 && is_aligned(a.state, 16) && is_aligned(a.B) && is_aligned(a.C);
  with_width(a, whole, update::ssd<T, 4, 1>, update::ssd<T, 4, 2>, update::ssd<T, 1, 8>, run);
}

template <class T>
void selective_update(const SelectiveUpdate<T>& a, cudaStream_t stream) {
  const bool whole = a.d_state % 4 == 0 && is_aligned(a.state, 16) && is_aligned(a.A, 16);
  with_width(a, whole, update::selective<T, 4, 1>, update::selective<T, 4, 2>, update::selective<T, 1, 8>,
             [&](auto kernel, int lanes) {
               const int channels = update::kThreads / lanes;
               const dim3 grid((a.channels + channels - 1) / channels, a.rows.rows);
               launch(kernel, grid, dim3(update::kThreads), 0, stream, a, lanes);
             });
}

template <class T>
void conv_update(const ConvUpdate<T>& a, cudaStream_t stream) {
  const dim3 grid((a.channels + update::kThreads - 1) / update::kThreads, a.rows.rows);
  launch(update::conv<T>, grid, dim3(update::kThreads), 0, stream, a);
}

#define FOR_TYPE(T)                                                     \
  template void ssd_update(const SsdUpdate<T>&, bool, cudaStream_t);    \
  template void selective_update(const SelectiveUpdate<T>&, cudaStream_t); \
  template void conv_update(const ConvUpdate<T>&, cudaStream_t);
FOR_TYPE(float)
FOR_TYPE(bf16)
FOR_TYPE(f16)
#undef FOR_TYPE

}  // namespace vision_scan

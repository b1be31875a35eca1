#include "selective.h"

namespace vision_scan {
namespace {

template <selective::Output output, class T>
void run_forward(const Selective<T>& a, cudaStream_t stream) {
  const int units = output == selective::kOnChip || output == selective::kInScratch ? a.tokens.batch : a.tokens.rows();
  const dim3 grid(static_cast<unsigned>(units) * selective::Block::how_many(a.channels, a.ngroups));
  const size_t shared = selective::Shared::bytes(a.d_state, output == selective::kOnChip ? a.tokens.cells : 0);
  if (selective::Block::all_whole(a.channels, a.ngroups))
    launch(selective::forward<T, true, output>, grid, dim3(selective::kThreads), shared, stream, a);
  else
    launch(selective::forward<T, false, output>, grid, dim3(selective::kThreads), shared, stream, a);
}

}  // namespace

template <class T>
void selective_forward(const Selective<T>& a, cudaStream_t stream) {
  if (!a.merged_output)
    run_forward<selective::kApart>(a, stream);
  else if (a.scratch)
    run_forward<selective::kInScratch>(a, stream);
  else
    run_forward<selective::kOnChip>(a, stream);
}

template <class T>
void selective_entries(const Selective<T>& a, cudaStream_t stream) {
  run_forward<selective::kEntries>(a, stream);
}

template void selective_forward(const Selective<float>&, cudaStream_t);
template void selective_forward(const Selective<bf16>&, cudaStream_t);
template void selective_forward(const Selective<f16>&, cudaStream_t);
template void selective_entries(const Selective<float>&, cudaStream_t);
template void selective_entries(const Selective<bf16>&, cudaStream_t);
template void selective_entries(const Selective<f16>&, cudaStream_t);

}  // namespace vision_scan

#include "deferred.h"

namespace vision_scan {

template <class T>
void deferred_update(const Deferred<T>& d, cudaStream_t stream) {
  const int lanes = update::lanes_for(d.update.d_state, 4), rows = update::kThreads / lanes * update::kRows;
  const dim3 grid((d.update.headdim + rows - 1) / rows, d.update.nheads, d.update.rows.rows);
  launch(deferred::step<T>, grid, dim3(update::kThreads), 0, stream, d, lanes);
}

template void deferred_update(const Deferred<float>&, cudaStream_t);
template void deferred_update(const Deferred<bf16>&, cudaStream_t);
template void deferred_update(const Deferred<f16>&, cudaStream_t);

}  // namespace vision_scan

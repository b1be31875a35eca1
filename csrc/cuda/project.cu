#include "project.h"

namespace vision_scan {

template <class T>
void project_tokens(const Project<T>& a, int processors, bool chained, cudaStream_t stream) {
  const int units = (a.outputs + project::kOutputs - 1) / project::kOutputs;
  const int blocks = processors * 2;  // all at work at once
  launch_chained(chained, project::project<T>, dim3(units < blocks ? units : blocks), dim3(project::kThreads),
                 project_shared(a), stream, a);
}

template <class X, class T>
void normalize_tokens(const Normalize<X, T>& a, cudaStream_t stream) {
  launch(project::normalize<X, T>, dim3(a.rows), dim3(project::kThreads), 2 * project::kWarps * sizeof(float), stream, a);
}

template void project_tokens(const Project<float>&, int, bool, cudaStream_t);
template void project_tokens(const Project<bf16>&, int, bool, cudaStream_t);
template void project_tokens(const Project<f16>&, int, bool, cudaStream_t);

template void normalize_tokens(const Normalize<float, float>&, cudaStream_t);
template void normalize_tokens(const Normalize<float, bf16>&, cudaStream_t);
template void normalize_tokens(const Normalize<float, f16>&, cudaStream_t);
template void normalize_tokens(const Normalize<bf16, bf16>&, cudaStream_t);
template void normalize_tokens(const Normalize<f16, f16>&, cudaStream_t);

}  // namespace vision_scan

// Mamba-2's scan as operators of the library `vision_scan_cuda`.
#include "ops.h"
#include "ssd.h"

namespace vision_scan {
namespace {

// Whether rows of `columns` numbers, `stride` apart, can be copied 16 bytes at a time.
bool copies_at_once(const Tensor& tensor, int64_t stride, int64_t columns) {
  const int64_t bytes = tensor.element_size();
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 && stride * bytes % 16 == 0 &&
         columns * bytes % 16 == 0;
}

template <class T>
Ssd<T> make_ssd(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias, bool dt_softplus,
                double dt_min, double dt_max, const OptionalTensor& initial_state, const OptionalTensor& index,
                const OptionalTensor& marks, const OptionalTensor& bounds) {
  TORCH_CHECK_VALUE(x.dim() == 5, "x must have 5 axes, got ", x.dim());
  TORCH_CHECK_VALUE(A.dim() == 2, "A must have 2 axes, got ", A.dim());
  TORCH_CHECK_VALUE(B.dim() == 5, "B must have 5 axes, got ", B.dim());
  const int64_t batch = x.size(0), lists = A.size(0), cells = x.size(2), nheads = x.size(3), headdim = x.size(4);
  const int64_t ngroups = B.size(3), d_state = B.size(4);
  const auto dtype = x.scalar_type();
  TORCH_CHECK_VALUE(ngroups > 0 && nheads % ngroups == 0, "nheads ", nheads, " must be a multiple of ngroups ", ngroups);
  TORCH_CHECK_VALUE(0 < d_state && d_state <= kMostSsdStates, "d_state must be from 1 to ", kMostSsdStates, ", got ",
                    d_state);
  Ssd<T> a{};
  a.tokens = make_tokens(batch, lists, cells, index, marks, bounds);
  a.shared_input = x.size(1) == 1 && lists > 1;
  a.x_stride = check_cells("x", x, {batch, a.shared_input ? 1 : lists, cells, nheads, headdim}, dtype, 3);
  a.dt_stride = check_cells("dt", dt, {batch, lists, cells, nheads}, dt.scalar_type() == at::kFloat ? at::kFloat : dtype, 3);
  a.B_stride = check_cells("B", B, {batch, lists, cells, ngroups, d_state}, dtype, 3);
  a.C_stride = check_cells("C", C, {batch, lists, cells, ngroups, d_state}, dtype, 3);
  if (z) a.z_stride = check_cells("z", *z, {batch, lists, cells, nheads, headdim}, dtype, 3);
  check("A", A, {lists, nheads}, at::kFloat);
  if (D && D->dim() == 2) check("D", *D, {lists, nheads}, at::kFloat);
  if (D && D->dim() != 2) check("D", *D, {lists, nheads, headdim}, at::kFloat);
  check("dt_bias", dt_bias, {lists, nheads}, at::kFloat);
  check("initial_state", initial_state, {a.tokens.rows(), nheads, headdim, d_state}, at::kFloat);
  a.nheads = static_cast<int>(nheads);
  a.headdim = static_cast<int>(headdim);
  a.ngroups = static_cast<int>(ngroups);
  a.d_state = static_cast<int>(d_state);
  a.skip_dims = D ? static_cast<int>(D->dim()) - 1 : 0;
  a.dt_softplus = dt_softplus;
  a.dt_min = static_cast<float>(dt_min);
  a.dt_max = static_cast<float>(dt_max);
  a.x = data<T>(x);
  a.z = data<T>(z);
  a.B = data<T>(B);
  a.C = data<T>(C);
  if (dt.scalar_type() == at::kFloat)
    a.dt32 = data<float>(dt);
  else
    a.dt = data<T>(dt);
  a.copy_x = copies_at_once(x, a.x_stride, headdim);
  a.copy_B = copies_at_once(B, a.B_stride, d_state);
  a.copy_C = copies_at_once(C, a.C_stride, d_state);
  a.A = data<float>(A);
  a.D = data<float>(D);
  a.dt_bias = data<float>(dt_bias);
  a.initial_state = data<float>(initial_state);
  a.segments = 1;
  return a;
}

// The states that enter the segments, which `a` is made to start from.
template <class T>
std::pair<Tensor, Tensor> cut(Ssd<T>& a, int64_t segments, const at::TensorOptions& numbers, cudaStream_t stream) {
  Tensor states = at::empty({a.tokens.rows(), a.nheads, segments, a.headdim, a.d_state}, numbers);
  Tensor decays = at::empty({a.tokens.rows(), a.nheads, segments}, numbers);
  Ssd<T> pieces = a;
  pieces.segments = static_cast<int>(segments);
  pieces.initial_state = nullptr;
  pieces.leaving = mutable_data<float>(states);
  pieces.decays = mutable_data<float>(decays);
  ssd_states(pieces, stream);
  ssd_compose(pieces, a.initial_state, stream);
  a.segments = pieces.segments;
  a.initial_state = pieces.leaving;
  return {states, decays};
}

// `segments`: into how many the rows are cut; 0: as many as are best on this GPU. It does not change the result.
std::tuple<Tensor, Tensor> scan(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                                const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                               bool dt_softplus, double dt_min, double dt_max, const OptionalTensor& initial_state,
                               const OptionalTensor& index, const OptionalTensor& marks, const OptionalTensor& bounds,
                               int64_t segments) {
  const Here here(x);
  const auto numbers = x.options().dtype(at::kFloat);
  Tensor y, final_state;
  with_type(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    Ssd<T> a = make_ssd<T>(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state, index, marks, bounds);
    TORCH_CHECK_VALUE(segments >= 0, "segments must not be negative, got ", segments);
    const std::array<int64_t, 5> shape{x.size(0), A.size(0), x.size(2), x.size(3), x.size(4)};
    // Padding and cells that no list visits stay zero.
    y = index || marks ? at::zeros(shape, x.options()) : at::empty(shape, x.options());
    final_state = at::empty({a.tokens.rows(), a.nheads, a.headdim, a.d_state}, numbers);
    a.y = mutable_data<T>(y);
    a.copy_y = copies_at_once(y, a.headdim, a.headdim);
    a.final_state = mutable_data<float>(final_state);
    const int64_t blocks = ssd_blocks(sizeof(T), a.headdim, a.d_state);
    const int64_t best = ssd_segments(int64_t{a.tokens.rows()} * a.nheads * blocks, a.chunks(),
                                      card(x.get_device()).processors);
    std::pair<Tensor, Tensor> kept;
    if ((segments ? segments : best) > 1) kept = cut(a, segments ? segments : best, numbers, here.stream);
    ssd_forward(a, here.stream);
  });
  return {y, final_state};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vision_scan_cuda, m) {
  m.def(
      "ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
      "float dt_min, float dt_max, Tensor? initial_state, Tensor? index, Tensor? marks, Tensor? bounds, int segments=0) "
      "-> (Tensor, Tensor)",
      &scan);
  m.def("ssd_segments(int units, int chunks, int processors) -> int", [](int64_t units, int64_t chunks, int64_t processors) {
    return int64_t{ssd_segments(units, static_cast<int>(chunks), static_cast<int>(processors))};
  });
  m.def("ssd_shared_bytes(int number_bytes, int headdim, int d_state) -> int",
        [](int64_t number_bytes, int64_t headdim, int64_t d_state) {
          return static_cast<int64_t>(ssd_shared_bytes(number_bytes, static_cast<int>(headdim), static_cast<int>(d_state)));
        });
}

}  // namespace vision_scan

// Mamba-2's scan as operators of the library `vision_scan_cuda`.
#include "ops.h"
#include "ssd_backward.h"

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

// Cuts the rows into segments: a pass is made to start from the states that enter these, which are returned.
template <class T>
std::pair<Tensor, Tensor> cut(Ssd<T>& a, ssd::Pass pass, int64_t segments, const at::TensorOptions& numbers,
                              cudaStream_t stream) {
  const int64_t units = int64_t{a.tokens.rows()} * a.nheads * ssd_blocks(sizeof(T), a.headdim, a.d_state);
  if (segments == 0) segments = ssd_segments(units, a.chunks(), card(numbers.device().index()).processors);
  if (segments == 1) return {};
  Tensor states = at::empty({a.tokens.rows(), a.nheads, segments, a.headdim, a.d_state}, numbers);
  Tensor decays = at::empty({a.tokens.rows(), a.nheads, segments}, numbers);
  Ssd<T> pieces = a;
  pieces.segments = static_cast<int>(segments);
  pieces.initial_state = nullptr;
  pieces.entries = pieces.final_state = nullptr;
  pieces.leaving = mutable_data<float>(states);
  pieces.decays = mutable_data<float>(decays);
  ssd_forward(pieces, pass == ssd::kOutputs ? ssd::kStates : pass, stream);
  ssd_compose(pieces, a.initial_state, pass, stream);
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
    const auto kept = cut(a, ssd::kOutputs, segments, numbers, here.stream);
    ssd_forward(a, ssd::kOutputs, here.stream);
  });
  return {y, final_state};
}

// Sums over the rows of each list and their chunks: (rows, chunks, ...) to (lists, ...).
Tensor over_rows(const Tensor& sums, const Tokens& tokens) {
  return sums.sum(1).unflatten(0, {tokens.rows() / tokens.lists, tokens.lists}).sum(0);
}

// Gradients of x, dt, A, B, C, D, dt_bias and initial_state, in the shapes of these, of x for each list; those of
// arguments that are not given are empty. That of x has its dtype, the others are float32. `head_blocks`: how many
// blocks share the heads of a group; 0: as many as fill this GPU.
std::vector<Tensor> scan_backward(const Tensor& dy, const OptionalTensor& dfinal_state, const Tensor& x, const Tensor& dt,
                                  const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                  const OptionalTensor& dt_bias, bool dt_softplus, double dt_min, double dt_max,
                                  const OptionalTensor& initial_state, const OptionalTensor& index,
                                  const OptionalTensor& marks, const OptionalTensor& bounds, int64_t segments,
                                  int64_t head_blocks) {
  const Here here(x);
  const auto numbers = x.options().dtype(at::kFloat);
  // Padding and cells that no list visits stay zero, and so do chunks behind the end of a packed segment.
  const auto make = [&](at::IntArrayRef shape, const at::TensorOptions& options, bool whole) {
    return whole ? at::empty(shape, options) : at::zeros(shape, options);
  };
  const bool whole = !index && !marks;
  Tensor dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial;
  with_type(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    const Ssd<T> a = make_ssd<T>(x, dt, A, B, C, D, {}, dt_bias, dt_softplus, dt_min, dt_max, initial_state, index, marks,
                                 bounds);
    const int64_t rows = a.tokens.rows(), chunks = a.chunks(), of_group = a.nheads / a.ngroups;
    const std::array<int64_t, 5> shape{x.size(0), A.size(0), x.size(2), x.size(3), x.size(4)};
    check("dy", dy, shape, x.scalar_type());
    check("dfinal_state", dfinal_state, {rows, a.nheads, a.headdim, a.d_state}, at::kFloat);
    TORCH_CHECK_VALUE(segments >= 0 && head_blocks >= 0, "segments and head_blocks must not be negative, got ", segments,
                      " and ", head_blocks);
    Tensor states = at::empty({rows, a.nheads, chunks, a.headdim, a.d_state}, numbers), dstates = at::empty_like(states);
    dinitial = at::empty({initial_state ? rows : 0, a.nheads, a.headdim, a.d_state}, numbers);

    Ssd<T> forwards = a;
    forwards.entries = mutable_data<float>(states);
    const auto kept = cut(forwards, ssd::kStates, segments, numbers, here.stream);
    ssd_forward(forwards, ssd::kStates, here.stream);

    Ssd<T> back = a;
    back.x = data<T>(dy);
    back.x_stride = x.size(3) * x.size(4);
    back.copy_x = copies_at_once(dy, back.x_stride, a.headdim);
    back.shared_input = false;
    back.B = a.C;
    back.B_stride = a.C_stride;
    back.copy_B = a.copy_C;
    back.initial_state = data<float>(dfinal_state);
    back.final_state = initial_state ? mutable_data<float>(dinitial) : nullptr;
    back.entries = mutable_data<float>(dstates);
    const auto kept_too = cut(back, ssd::kStateGradients, segments, numbers, here.stream);
    ssd_forward(back, ssd::kStateGradients, here.stream);

    const int64_t units = rows * chunks * a.ngroups, processors = card(x.get_device()).processors;
    if (head_blocks == 0) head_blocks = (2 * processors + units - 1) / std::max<int64_t>(units, 1);
    const int64_t share = (of_group + std::min(head_blocks, of_group) - 1) / std::min(head_blocks, of_group);
    head_blocks = (of_group + share - 1) / share;  // none is empty
    dx = make(shape, x.options(), whole);
    ddt = make({x.size(0), A.size(0), x.size(2), x.size(3)}, numbers, whole);
    dB = make({head_blocks, x.size(0), A.size(0), x.size(2), a.ngroups, a.d_state}, numbers, whole);
    dC = make(dB.sizes(), numbers, whole);
    dA = make({rows, chunks, a.nheads}, numbers, !bounds);
    ddt_bias = make(dA.sizes(), numbers, !bounds);
    dD = make({rows, chunks, D ? a.nheads : 0, a.headdim}, numbers, !bounds);
    SsdGradients<T> g{};
    g.dy = back.x;
    g.copy_dy = back.copy_x;
    g.copy_states = copies_at_once(states, a.d_state, a.d_state);
    g.states = data<float>(states);
    g.dstates = data<float>(dstates);
    g.dx = mutable_data<T>(dx);
    g.ddt = mutable_data<float>(ddt);
    g.head_blocks = static_cast<int>(head_blocks);
    g.dB = mutable_data<float>(dB);
    g.dC = mutable_data<float>(dC);
    g.dA = mutable_data<float>(dA);
    g.ddt_bias = mutable_data<float>(ddt_bias);
    g.dD = D ? mutable_data<float>(dD) : nullptr;
    ssd_backward(a, g, here.stream);
    dA = over_rows(dA, a.tokens);
    ddt_bias = dt_bias ? over_rows(ddt_bias, a.tokens) : at::empty({0}, numbers);
    dB = head_blocks == 1 ? dB[0] : dB.sum(0);
    dC = head_blocks == 1 ? dC[0] : dC.sum(0);
    dD = D ? over_rows(a.skip_dims == 1 ? dD.sum(-1) : dD, a.tokens) : at::empty({0}, numbers);
  });
  return {dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vision_scan_cuda, m) {
  m.def(
      "ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
      "float dt_min, float dt_max, Tensor? initial_state, Tensor? index, Tensor? marks, Tensor? bounds, int segments=0) "
      "-> (Tensor, Tensor)",
      &scan);
  m.def(
      "ssd_backward(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? dt_bias, bool dt_softplus, float dt_min, float dt_max, Tensor? initial_state, Tensor? index, "
      "Tensor? marks, Tensor? bounds, int segments=0, int head_blocks=0) -> Tensor[]",
      &scan_backward);
  m.def("ssd_segments(int units, int chunks, int processors) -> int", [](int64_t units, int64_t chunks, int64_t processors) {
    return int64_t{ssd_segments(units, static_cast<int>(chunks), static_cast<int>(processors))};
  });
  m.def("ssd_shared_bytes(int number_bytes, int headdim, int d_state, bool backward) -> int",
        [](int64_t number_bytes, int64_t headdim, int64_t d_state, bool backward) {
          const auto bytes = backward ? ssd_backward_shared_bytes : ssd_shared_bytes;
          return static_cast<int64_t>(bytes(number_bytes, static_cast<int>(headdim), static_cast<int>(d_state)));
        });
}

}  // namespace vision_scan

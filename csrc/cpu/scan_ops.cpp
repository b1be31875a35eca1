// The scans as operators of the library `vision_scan_cpu`; see ops.cpp.
#include "ops.h"

namespace vision_scan {
namespace {

Ssd make_ssd(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
             const OptionalTensor& D, const OptionalTensor& dt_bias, bool dt_softplus, double dt_min, double dt_max,
             const OptionalTensor& initial_state, const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens,
             const OptionalTensor& index) {
  TORCH_CHECK_VALUE(x.dim() == 5, "x must have 5 axes, got ", x.dim());
  TORCH_CHECK_VALUE(B.dim() == 5, "B must have 5 axes, got ", B.dim());
  const int64_t batch = x.size(0), lists = x.size(1), cells = x.size(2), nheads = x.size(3), headdim = x.size(4);
  const int64_t ngroups = B.size(3), d_state = B.size(4);
  Ssd a{};
  a.tokens = make_tokens(batch, lists, cells, seq_idx, cu_seqlens, index);
  TORCH_CHECK_VALUE(ngroups > 0 && nheads % ngroups == 0, "nheads ", nheads, " must be a multiple of ngroups ", ngroups);
  a.x_stride = check_cells("x", x, {batch, lists, cells, nheads, headdim}, 3);
  a.dt_stride = check_cells("dt", dt, {batch, lists, cells, nheads}, 3);
  a.B_stride = check_cells("B", B, {batch, lists, cells, ngroups, d_state}, 3);
  a.C_stride = check_cells("C", C, {batch, lists, cells, ngroups, d_state}, 3);
  check("A", A, {lists, nheads});
  if (D && D->dim() == 2) check("D", *D, {lists, nheads});
  if (D && D->dim() != 2) check("D", *D, {lists, nheads, headdim});
  if (dt_bias) check("dt_bias", *dt_bias, {lists, nheads});
  if (initial_state) check("initial_state", *initial_state, {a.tokens.rows(), nheads, headdim, d_state});
  a.nheads = nheads;
  a.headdim = headdim;
  a.ngroups = ngroups;
  a.d_state = d_state;
  a.skip_dims = D ? D->dim() - 1 : 0;
  a.dt_softplus = dt_softplus;
  a.dt_min = static_cast<float>(dt_min);
  a.dt_max = static_cast<float>(dt_max);
  a.x = x.const_data_ptr<float>();
  a.dt = dt.const_data_ptr<float>();
  a.A = A.const_data_ptr<float>();
  a.B = B.const_data_ptr<float>();
  a.C = C.const_data_ptr<float>();
  a.D = data(D);
  a.dt_bias = data(dt_bias);
  a.initial_state = data(initial_state);
  return a;
}

std::tuple<Tensor, Tensor> ssd(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                               const OptionalTensor& D, const OptionalTensor& dt_bias, bool dt_softplus,
                               double dt_min, double dt_max, const OptionalTensor& initial_state,
                               const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens,
                               const OptionalTensor& index) {
  Ssd a = make_ssd(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, cu_seqlens, index);
  // Padding and cells that no list visits stay zero.
  Tensor y = seq_idx || index ? at::zeros(x.sizes(), x.options()) : at::empty(x.sizes(), x.options());
  Tensor final_state = at::empty({a.tokens.rows(), a.nheads, a.headdim, a.d_state}, x.options());
  a.y = y.data_ptr<float>();
  a.final_state = final_state.data_ptr<float>();
  kernels()->ssd(a);
  return {y, final_state};
}

// Gradients of x, dt, A, B, C, D, dt_bias and initial_state, in the shapes of these; those of parameters that
// are not given are empty.
std::vector<Tensor> ssd_backward(const Tensor& dy, const OptionalTensor& dfinal_state, const Tensor& x, const Tensor& dt,
                                 const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                 const OptionalTensor& dt_bias, bool dt_softplus, double dt_min, double dt_max,
                                 const OptionalTensor& initial_state, const OptionalTensor& seq_idx,
                                 const OptionalTensor& cu_seqlens, const OptionalTensor& index) {
  const Ssd a =
      make_ssd(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, cu_seqlens, index);
  check("dy", dy, x.sizes());
  const int64_t rows = a.tokens.rows();
  if (dfinal_state) check("dfinal_state", *dfinal_state, {rows, a.nheads, a.headdim, a.d_state});
  const int64_t blocks = (a.nheads / a.ngroups + kHeadBlock - 1) / kHeadBlock;
  // Padding and cells that no list visits stay zero; where there are none, everything is written.
  const auto make = [&](at::IntArrayRef shape) {
    return seq_idx || index ? at::zeros(shape, x.options()) : at::empty(shape, x.options());
  };
  Tensor dx = make(x.sizes()), ddt = make(dt.sizes());
  const std::array<int64_t, 6> parts{blocks, B.size(0), B.size(1), B.size(2), B.size(3), B.size(4)};
  Tensor dB = make(parts), dC = make(parts);
  Tensor dA = at::empty({rows, a.nheads}, x.options()), ddt_bias = at::empty_like(dA);
  Tensor dD = a.skip_dims == 2 ? at::empty({rows, a.nheads, a.headdim}, x.options()) : at::empty_like(dA);
  Tensor dinitial = initial_state ? at::empty_like(*initial_state) : at::empty({0}, x.options());
  SsdGradients g{};
  g.dy = dy.const_data_ptr<float>();
  g.dfinal_state = data(dfinal_state);
  g.dx = dx.data_ptr<float>();
  g.ddt = ddt.data_ptr<float>();
  g.dB = dB.data_ptr<float>();
  g.dC = dC.data_ptr<float>();
  g.dinitial_state = initial_state ? dinitial.data_ptr<float>() : nullptr;
  g.dA = dA.data_ptr<float>();
  g.dD = dD.data_ptr<float>();
  g.ddt_bias = ddt_bias.data_ptr<float>();
  kernels()->ssd_backward(a, g);
  return {dx,
          ddt,
          over_rows(dA, a.tokens),
          blocks == 1 ? dB[0] : dB.sum(0),
          blocks == 1 ? dC[0] : dC.sum(0),
          D ? over_rows(dD, a.tokens) : at::empty({0}, x.options()),
          dt_bias ? over_rows(ddt_bias, a.tokens) : at::empty({0}, x.options()),
          dinitial};
}

Tensor ssd_update(Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                  const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias, bool dt_softplus,
                  double dt_min, double dt_max, const OptionalTensor& seq_idx, const OptionalTensor& slots) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x must have 4 axes, got ", x.dim());
  TORCH_CHECK_VALUE(B.dim() == 4, "B must have 4 axes, got ", B.dim());
  TORCH_CHECK_VALUE(state.dim() == 4, "state must have 4 axes, got ", state.dim());
  const int64_t rows = x.size(0), seqlen = x.size(1), nheads = x.size(2), headdim = x.size(3);
  const int64_t ngroups = B.size(2), d_state = B.size(3);
  TORCH_CHECK_VALUE(ngroups > 0 && nheads % ngroups == 0, "nheads ", nheads, " must be a multiple of ngroups ", ngroups);
  check("state", state, {state.size(0), nheads, headdim, d_state});
  check("x", x, {rows, seqlen, nheads, headdim});
  check("dt", dt, {rows, seqlen, nheads});
  check("A", A, {nheads});
  check("B", B, {rows, seqlen, ngroups, d_state});
  check("C", C, {rows, seqlen, ngroups, d_state});
  if (D && D->dim() == 1) check("D", *D, {nheads});
  if (D && D->dim() != 1) check("D", *D, {nheads, headdim});
  if (z) check("z", *z, {rows, seqlen, nheads, headdim});
  if (dt_bias) check("dt_bias", *dt_bias, {nheads});
  SsdUpdate a{};
  a.update = make_update(state.size(0), rows, seqlen, slots, seq_idx);
  a.nheads = nheads;
  a.headdim = headdim;
  a.ngroups = ngroups;
  a.d_state = d_state;
  a.skip_dims = D ? D->dim() : 0;
  a.dt_softplus = dt_softplus;
  a.dt_min = static_cast<float>(dt_min);
  a.dt_max = static_cast<float>(dt_max);
  a.x = x.const_data_ptr<float>();
  a.dt = dt.const_data_ptr<float>();
  a.A = A.const_data_ptr<float>();
  a.B = B.const_data_ptr<float>();
  a.C = C.const_data_ptr<float>();
  a.D = data(D);
  a.z = data(z);
  a.dt_bias = data(dt_bias);
  Tensor y = at::zeros_like(x);
  a.state = state.data_ptr<float>();
  a.y = y.data_ptr<float>();
  kernels()->ssd_update(a);
  return y;
}

Selective make_selective(const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                         const OptionalTensor& D, const OptionalTensor& dt_bias, bool dt_softplus, bool merge,
                         const OptionalTensor& initial_state, const OptionalTensor& seq_idx,
                         const OptionalTensor& cu_seqlens, const OptionalTensor& index) {
  TORCH_CHECK_VALUE(u.dim() == 3 || u.dim() == 4, "u must have 3 or 4 axes, got ", u.dim());
  TORCH_CHECK_VALUE(A.dim() == 3, "A must have 3 axes, got ", A.dim());
  TORCH_CHECK_VALUE(B.dim() == 5, "B must have 5 axes, got ", B.dim());
  const int64_t batch = u.size(0), lists = A.size(0), cells = u.size(-2), channels = A.size(1), d_state = A.size(2);
  const int64_t ngroups = B.size(3);
  TORCH_CHECK_VALUE(ngroups > 0 && channels % ngroups == 0, "channels ", channels, " must be a multiple of ngroups ",
                    ngroups);
  Selective a{};
  a.tokens = make_tokens(batch, lists, cells, seq_idx, cu_seqlens, index);
  a.channels = channels;
  a.ngroups = ngroups;
  a.d_state = d_state;
  a.dt_softplus = dt_softplus;
  a.shared_input = u.dim() == 3;
  a.merged_output = merge;
  if (a.shared_input)
    check("u", u, {batch, cells, channels});
  else
    check("u", u, {batch, lists, cells, channels});
  check("dt", dt, {batch, lists, cells, channels});
  check("A", A, {lists, channels, d_state});
  check("B", B, {batch, lists, cells, ngroups, d_state});
  check("C", C, {batch, lists, cells, ngroups, d_state});
  if (D) check("D", *D, {lists, channels});
  if (dt_bias) check("dt_bias", *dt_bias, {lists, channels});
  if (initial_state) check("initial_state", *initial_state, {a.tokens.rows(), channels, d_state});
  a.u = u.const_data_ptr<float>();
  a.dt = dt.const_data_ptr<float>();
  a.A = A.const_data_ptr<float>();
  a.B = B.const_data_ptr<float>();
  a.C = C.const_data_ptr<float>();
  a.D = data(D);
  a.dt_bias = data(dt_bias);
  a.initial_state = data(initial_state);
  return a;
}

std::vector<int64_t> selective_output(const Selective& a) {
  if (a.merged_output) return {a.tokens.batch, a.tokens.cells, a.channels};
  return {a.tokens.batch, a.tokens.lists, a.tokens.cells, a.channels};
}

std::tuple<Tensor, Tensor> selective(const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B,
                                     const Tensor& C, const OptionalTensor& D, const OptionalTensor& dt_bias,
                                     bool dt_softplus, bool merge, const OptionalTensor& initial_state,
                                     const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens,
                                     const OptionalTensor& index) {
  Selective a = make_selective(u, dt, A, B, C, D, dt_bias, dt_softplus, merge, initial_state, seq_idx, cu_seqlens,
                               index);
  Tensor y = at::zeros(selective_output(a), u.options());
  Tensor final_state = at::empty({a.tokens.rows(), a.channels, a.d_state}, u.options());
  a.y = y.data_ptr<float>();
  a.final_state = final_state.data_ptr<float>();
  kernels()->selective(a);
  return {y, final_state};
}

// Gradients of u, dt, A, B, C, D, dt_bias and initial_state, in the shapes of these; empty where none is given.
std::vector<Tensor> selective_backward(const Tensor& dy, const OptionalTensor& dfinal_state, const Tensor& u,
                                       const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                                       const OptionalTensor& D, const OptionalTensor& dt_bias, bool dt_softplus,
                                       bool merge, const OptionalTensor& initial_state, const OptionalTensor& seq_idx,
                                       const OptionalTensor& cu_seqlens, const OptionalTensor& index) {
  const Selective a = make_selective(u, dt, A, B, C, D, dt_bias, dt_softplus, merge, initial_state, seq_idx,
                                     cu_seqlens, index);
  check("dy", dy, selective_output(a));
  const int64_t rows = a.tokens.rows();
  if (dfinal_state) check("dfinal_state", *dfinal_state, {rows, a.channels, a.d_state});
  const int64_t blocks = (a.channels / a.ngroups + kSelectiveBlock - 1) / kSelectiveBlock;
  Tensor du = at::zeros_like(u), ddt = at::zeros_like(dt);
  Tensor dB = at::zeros({blocks, B.size(0), B.size(1), B.size(2), B.size(3), B.size(4)}, B.options());
  Tensor dC = at::zeros_like(dB);
  Tensor dA = at::empty({rows, a.channels, a.d_state}, u.options());
  Tensor dD = at::empty({rows, a.channels}, u.options()), ddt_bias = at::empty_like(dD);
  Tensor dinitial = initial_state ? at::empty_like(*initial_state) : at::empty({0}, u.options());
  SelectiveGradients g{};
  g.dy = dy.const_data_ptr<float>();
  g.dfinal_state = data(dfinal_state);
  g.du = du.data_ptr<float>();
  g.ddt = ddt.data_ptr<float>();
  g.dB = dB.data_ptr<float>();
  g.dC = dC.data_ptr<float>();
  g.dinitial_state = initial_state ? dinitial.data_ptr<float>() : nullptr;
  g.dA = dA.data_ptr<float>();
  g.dD = dD.data_ptr<float>();
  g.ddt_bias = ddt_bias.data_ptr<float>();
  kernels()->selective_backward(a, g);
  const auto optional = [&](const OptionalTensor& given, const Tensor& sums) {
    return given ? over_rows(sums, a.tokens) : at::empty({0}, u.options());
  };
  return {du,
          ddt,
          over_rows(dA, a.tokens),
          blocks == 1 ? dB[0] : dB.sum(0),
          blocks == 1 ? dC[0] : dC.sum(0),
          optional(D, dD),
          optional(dt_bias, ddt_bias),
          dinitial};
}

Tensor selective_update(Tensor& state, const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B,
                        const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                        const OptionalTensor& dt_bias, bool dt_softplus, const OptionalTensor& seq_idx,
                        const OptionalTensor& slots) {
  TORCH_CHECK_VALUE(u.dim() == 3, "u must have 3 axes, got ", u.dim());
  TORCH_CHECK_VALUE(B.dim() == 4, "B must have 4 axes, got ", B.dim());
  TORCH_CHECK_VALUE(state.dim() == 3, "state must have 3 axes, got ", state.dim());
  const int64_t rows = u.size(0), channels = u.size(1), seqlen = u.size(2), d_state = state.size(2);
  const int64_t ngroups = B.size(1);
  TORCH_CHECK_VALUE(ngroups > 0 && channels % ngroups == 0, "channels ", channels, " must be a multiple of ngroups ",
                    ngroups);
  check("state", state, {state.size(0), channels, d_state});
  check("u", u, {rows, channels, seqlen});
  check("dt", dt, {rows, channels, seqlen});
  check("A", A, {channels, d_state});
  check("B", B, {rows, ngroups, d_state, seqlen});
  check("C", C, {rows, ngroups, d_state, seqlen});
  if (D) check("D", *D, {channels});
  if (z) check("z", *z, {rows, channels, seqlen});
  if (dt_bias) check("dt_bias", *dt_bias, {channels});
  Tensor y = at::zeros_like(u);
  kernels()->selective_update({make_update(state.size(0), rows, seqlen, slots, seq_idx), channels, ngroups, d_state,
                               dt_softplus, u.const_data_ptr<float>(), dt.const_data_ptr<float>(),
                               A.const_data_ptr<float>(), B.const_data_ptr<float>(), C.const_data_ptr<float>(),
                               data(D), data(z), data(dt_bias), state.data_ptr<float>(), y.data_ptr<float>()});
  return y;
}

}  // namespace

#define SSD_INPUTS                                                                                          \
  "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus, "      \
  "float dt_min, float dt_max, Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, Tensor? index"
#define SELECTIVE_INPUTS                                                                                  \
  "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus, "     \
  "bool merge, Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, Tensor? index"

TORCH_LIBRARY_FRAGMENT(vision_scan_cpu, m) {
  m.def("ssd(" SSD_INPUTS ") -> (Tensor, Tensor)", &ssd);
  m.def("ssd_backward(Tensor dy, Tensor? dfinal_state, " SSD_INPUTS ") -> Tensor[]", &ssd_backward);
  m.def(
      "ssd_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? dt_bias, bool dt_softplus, float dt_min, float dt_max, Tensor? seq_idx, Tensor? slots) -> Tensor",
      &ssd_update);
  m.def(
      "selective_update(Tensor(a!) state, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? dt_bias, bool dt_softplus, Tensor? seq_idx, Tensor? slots) -> Tensor",
      &selective_update);
  m.def("selective(" SELECTIVE_INPUTS ") -> (Tensor, Tensor)", &selective);
  m.def("selective_backward(Tensor dy, Tensor? dfinal_state, " SELECTIVE_INPUTS ") -> Tensor[]", &selective_backward);
}

}  // namespace vision_scan

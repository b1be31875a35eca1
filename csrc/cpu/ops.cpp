// The kernels as operators of the library `vision_scan_cpu`, for contiguous float32 tensors. What PyTorch calls
// is in vision_scan/ops/compiled.py, which brings other dtypes and layouts into this form.
#include <Python.h>

#include <ATen/ATen.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include "kernels.h"

namespace vision_scan {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The kernels for this machine, or null if it has not even AVX2.
const Kernels* kernels() {
  static const Kernels* found = [] {
    const std::string capability = at::get_cpu_capability();  // honours ATEN_CPU_CAPABILITY
    if (capability.find("AVX512") == 0) return &kAvx512Kernels;
    if (capability.find("AVX2") == 0) return &kAvx2Kernels;
    return static_cast<const Kernels*>(nullptr);
  }();
  return found;
}

void check(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype = at::kFloat) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU, got ", tensor.device());
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous");
}

const float* data(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

const int64_t* integers(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<int64_t>() : nullptr;
}

Tokens make_tokens(int64_t batch, int64_t lists, int64_t cells, const OptionalTensor& seq_idx,
                   const OptionalTensor& cu_seqlens, const OptionalTensor& index) {
  int64_t seqlen = cells;
  if (index) {
    TORCH_CHECK_VALUE(index->dim() == 2, "index must have 2 axes, got ", index->dim());
    seqlen = index->size(1);
    check("index", *index, {lists, seqlen}, at::kLong);
    TORCH_CHECK_VALUE(index->numel() == 0 || index->max().item<int64_t>() < cells, "index must be below ", cells,
                      ", got ", index->max());
  } else {
    TORCH_CHECK_VALUE(lists == 1, "without an index there is one list, got ", lists);
  }
  if (seq_idx) check("seq_idx", *seq_idx, {batch, seqlen}, at::kLong);
  int64_t segments = 0;
  if (cu_seqlens) {
    TORCH_CHECK_VALUE(batch == 1 && lists == 1, "cu_seqlens needs batch 1 and one list, got ", batch, " and ", lists);
    check("cu_seqlens", *cu_seqlens, {cu_seqlens->numel()}, at::kLong);
    segments = cu_seqlens->numel() - 1;
    const int64_t* bounds = cu_seqlens->const_data_ptr<int64_t>();
    bool rises = segments >= 0 && bounds[0] == 0 && bounds[segments] == seqlen;
    for (int64_t i = 0; i < segments; ++i) rises = rises && bounds[i] <= bounds[i + 1];
    TORCH_CHECK_VALUE(rises, "cu_seqlens must rise from 0 to seqlen ", seqlen, ", got ", *cu_seqlens);
  }
  return {batch, lists, seqlen, cells, integers(index), integers(seq_idx), integers(cu_seqlens), segments};
}

// Sums over the rows of each list, which share its parameters: (rows, ...) to (lists, ...).
Tensor over_rows(const Tensor& sums, const Tokens& tokens) {
  return sums.unflatten(0, {tokens.rows() / tokens.lists, tokens.lists}).sum(0);
}

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
  check("x", x, {batch, lists, cells, nheads, headdim});
  check("dt", dt, {batch, lists, cells, nheads});
  check("A", A, {lists, nheads});
  check("B", B, {batch, lists, cells, ngroups, d_state});
  check("C", C, {batch, lists, cells, ngroups, d_state});
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
  Tensor y = seq_idx || index ? at::zeros_like(x) : at::empty_like(x);
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
  Tensor dx = at::zeros_like(x), ddt = at::zeros_like(dt);
  Tensor dB = at::zeros({blocks, B.size(0), B.size(1), B.size(2), B.size(3), B.size(4)}, B.options());
  Tensor dC = at::zeros_like(dB);
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

Conv make_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool silu,
               const OptionalTensor& initial_state, const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens,
               const OptionalTensor& index) {
  TORCH_CHECK_VALUE(x.dim() == 3 || x.dim() == 4, "x must have 3 or 4 axes, got ", x.dim());
  TORCH_CHECK_VALUE(weight.dim() == 3, "weight must have 3 axes, got ", weight.dim());
  const int64_t batch = x.size(0), lists = weight.size(0), channels = weight.size(2), cells = x.size(-2);
  Conv a{};
  a.tokens = make_tokens(batch, lists, cells, seq_idx, cu_seqlens, index);
  a.channels = channels;
  a.width = weight.size(1);
  a.silu = silu;
  a.shared_input = x.dim() == 3;
  if (a.shared_input)
    check("x", x, {batch, cells, channels});
  else
    check("x", x, {batch, lists, cells, channels});
  check("weight", weight, {lists, a.width, channels});
  if (bias) check("bias", *bias, {lists, channels});
  if (initial_state) check("initial_state", *initial_state, {a.tokens.rows(), a.width - 1, channels});
  a.x = x.const_data_ptr<float>();
  a.weight = weight.const_data_ptr<float>();
  a.bias = data(bias);
  a.initial_state = data(initial_state);
  return a;
}

std::tuple<Tensor, Tensor> conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool silu,
                                const OptionalTensor& initial_state, const OptionalTensor& seq_idx,
                                const OptionalTensor& cu_seqlens, const OptionalTensor& index) {
  Conv a = make_conv(x, weight, bias, silu, initial_state, seq_idx, cu_seqlens, index);
  const Tokens& t = a.tokens;
  const std::array<int64_t, 4> shape{t.batch, t.lists, t.cells, a.channels};
  Tensor y = seq_idx || index ? at::zeros(shape, x.options()) : at::empty(shape, x.options());
  Tensor final_state = at::empty({t.rows(), a.width - 1, a.channels}, x.options());
  a.y = y.data_ptr<float>();
  a.final_state = final_state.data_ptr<float>();
  kernels()->conv(a);
  return {y, final_state};
}

// Gradients of x, weight, bias and initial_state, in the shapes of these; empty where none is given.
std::vector<Tensor> conv_backward(const Tensor& dy, const OptionalTensor& dfinal_state, const Tensor& x,
                                  const Tensor& weight, const OptionalTensor& bias, bool silu,
                                  const OptionalTensor& initial_state, const OptionalTensor& seq_idx,
                                  const OptionalTensor& cu_seqlens, const OptionalTensor& index) {
  const Conv a = make_conv(x, weight, bias, silu, initial_state, seq_idx, cu_seqlens, index);
  const Tokens& t = a.tokens;
  check("dy", dy, {t.batch, t.lists, t.cells, a.channels});
  if (dfinal_state) check("dfinal_state", *dfinal_state, {t.rows(), a.width - 1, a.channels});
  Tensor dx = at::zeros({t.batch, t.lists, t.cells, a.channels}, x.options());
  Tensor dweight = at::zeros({t.rows(), a.width, a.channels}, x.options());
  Tensor dbias = at::zeros({t.rows(), a.channels}, x.options());
  Tensor dinitial = initial_state ? at::zeros_like(*initial_state) : at::empty({0}, x.options());
  ConvGradients g{};
  g.dy = dy.const_data_ptr<float>();
  g.dfinal_state = data(dfinal_state);
  g.dx = dx.data_ptr<float>();
  g.dinitial_state = initial_state ? dinitial.data_ptr<float>() : nullptr;
  g.dweight = dweight.data_ptr<float>();
  g.dbias = dbias.data_ptr<float>();
  kernels()->conv_backward(a, g);
  return {a.shared_input ? dx.sum(1) : dx, over_rows(dweight, t),
          bias ? over_rows(dbias, t) : at::empty({0}, x.options()), dinitial};
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

Norm make_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& z, double eps, int64_t group_size,
               bool norm_before_gate) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x must have 2 axes, got ", x.dim());
  const int64_t rows = x.size(0), channels = x.size(1);
  TORCH_CHECK_VALUE(group_size > 0 && channels % group_size == 0, "channels ", channels,
                    " must be a multiple of group_size ", group_size);
  check("x", x, {rows, channels});
  check("weight", weight, {channels});
  if (z) check("z", *z, {rows, channels});
  return {rows, channels, group_size, static_cast<float>(eps), norm_before_gate,
          x.const_data_ptr<float>(), data(z), weight.const_data_ptr<float>(), nullptr};
}

Tensor norm(const Tensor& x, const Tensor& weight, const OptionalTensor& z, double eps, int64_t group_size,
            bool norm_before_gate) {
  Norm a = make_norm(x, weight, z, eps, group_size, norm_before_gate);
  Tensor y = at::empty_like(x);
  a.y = y.data_ptr<float>();
  kernels()->norm(a);
  return y;
}

// Gradients of x, weight and z; that of z is empty if there is none.
std::vector<Tensor> norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const OptionalTensor& z,
                                  double eps, int64_t group_size, bool norm_before_gate) {
  const Norm a = make_norm(x, weight, z, eps, group_size, norm_before_gate);
  check("dy", dy, x.sizes());
  Tensor dx = at::empty_like(x), dz = z ? at::empty_like(x) : at::empty({0}, x.options());
  Tensor dweight = at::zeros({(a.rows + kNormRows - 1) / kNormRows, a.channels}, x.options());
  kernels()->norm_backward(a, {dy.const_data_ptr<float>(), dx.data_ptr<float>(), z ? dz.data_ptr<float>() : nullptr,
                               dweight.data_ptr<float>()});
  return {dx, dweight.sum(0), dz};
}

Update make_update(int64_t num_slots, int64_t rows, int64_t seqlen, const OptionalTensor& slots,
                   const OptionalTensor& seq_idx) {
  if (seq_idx) check("seq_idx", *seq_idx, {rows, seqlen}, at::kLong);
  if (slots) {
    check("slots", *slots, {rows}, at::kLong);
    TORCH_CHECK_VALUE(rows == 0 || slots->max().item<int64_t>() < num_slots, "slots must be below ", num_slots,
                      ", got ", slots->max());
  } else {
    TORCH_CHECK_VALUE(rows == num_slots, "without slots there is a row for each of ", num_slots, " states, got ", rows);
  }
  return {rows, seqlen, integers(slots), integers(seq_idx)};
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

Tensor conv_update(Tensor& state, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool silu,
                   const OptionalTensor& seq_idx, const OptionalTensor& slots) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x must have 3 axes, got ", x.dim());
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must have 2 axes, got ", weight.dim());
  TORCH_CHECK_VALUE(state.dim() == 3, "state must have 3 axes, got ", state.dim());
  const int64_t rows = x.size(0), channels = x.size(1), seqlen = x.size(2), width = weight.size(1);
  check("state", state, {state.size(0), channels, width - 1});
  check("x", x, {rows, channels, seqlen});
  check("weight", weight, {channels, width});
  if (bias) check("bias", *bias, {channels});
  Tensor y = at::zeros_like(x);
  kernels()->conv_update({make_update(state.size(0), rows, seqlen, slots, seq_idx), channels, width, silu,
                          x.const_data_ptr<float>(), weight.const_data_ptr<float>(), data(bias),
                          state.data_ptr<float>(), y.data_ptr<float>()});
  return y;
}

// "avx512", "avx2", or "" if this machine has neither.
std::string instruction_set() {
  return kernels() ? kernels()->name : "";
}

}  // namespace

#define SSD_INPUTS                                                                                          \
  "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus, "      \
  "float dt_min, float dt_max, Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, Tensor? index"
#define CONV_INPUTS                                                                              \
  "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? seq_idx, " \
  "Tensor? cu_seqlens, Tensor? index"
#define SELECTIVE_INPUTS                                                                                  \
  "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus, "     \
  "bool merge, Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, Tensor? index"
#define NORM_INPUTS "Tensor x, Tensor weight, Tensor? z, float eps, int group_size, bool norm_before_gate"

TORCH_LIBRARY(vision_scan_cpu, m) {
  m.def("ssd(" SSD_INPUTS ") -> (Tensor, Tensor)", &ssd);
  m.def("ssd_backward(Tensor dy, Tensor? dfinal_state, " SSD_INPUTS ") -> Tensor[]", &ssd_backward);
  m.def("conv(" CONV_INPUTS ") -> (Tensor, Tensor)", &conv);
  m.def("conv_backward(Tensor dy, Tensor? dfinal_state, " CONV_INPUTS ") -> Tensor[]", &conv_backward);
  m.def(
      "ssd_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? dt_bias, bool dt_softplus, float dt_min, float dt_max, Tensor? seq_idx, Tensor? slots) -> Tensor",
      &ssd_update);
  m.def(
      "conv_update(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? seq_idx, "
      "Tensor? slots) -> Tensor",
      &conv_update);
  m.def("selective(" SELECTIVE_INPUTS ") -> (Tensor, Tensor)", &selective);
  m.def("selective_backward(Tensor dy, Tensor? dfinal_state, " SELECTIVE_INPUTS ") -> Tensor[]", &selective_backward);
  m.def("norm(" NORM_INPUTS ") -> Tensor", &norm);
  m.def("norm_backward(Tensor dy, " NORM_INPUTS ") -> Tensor[]", &norm_backward);
  m.def("instruction_set() -> str", &instruction_set);
}

}  // namespace vision_scan

// Importing vision_scan._C registers the operators; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

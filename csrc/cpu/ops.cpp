// The kernels as operators of the library `vision_scan_cpu`, for float32 tensors: here convolution and norm, the
// scans in scan_ops.cpp. What PyTorch calls is in vision_scan/ops/compiled.py, which brings other dtypes
// and layouts into this form.
#include <Python.h>

#include "ops.h"

namespace vision_scan {
namespace {

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
  TORCH_CHECK_VALUE(a.width <= kMostTaps, "weight must have at most ", kMostTaps, " taps, got ", a.width);
  a.silu = silu;
  a.shared_input = x.dim() == 3;
  if (a.shared_input)
    a.x_stride = check_cells("x", x, {batch, cells, channels}, 2);
  else
    a.x_stride = check_cells("x", x, {batch, lists, cells, channels}, 3);
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

Norm make_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& z, double eps, int64_t group_size,
               bool norm_before_gate) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x must have 2 axes, got ", x.dim());
  const int64_t rows = x.size(0), channels = x.size(1);
  TORCH_CHECK_VALUE(group_size > 0 && channels % group_size == 0, "channels ", channels,
                    " must be a multiple of group_size ", group_size);
  const int64_t x_stride = check_cells("x", x, {rows, channels}, 1);
  const int64_t z_stride = z ? check_cells("z", *z, {rows, channels}, 1) : 0;
  check("weight", weight, {channels});
  return {rows, channels, group_size, x_stride, z_stride, static_cast<float>(eps), norm_before_gate,
          x.const_data_ptr<float>(), data(z), weight.const_data_ptr<float>(), nullptr};
}

Tensor norm(const Tensor& x, const Tensor& weight, const OptionalTensor& z, double eps, int64_t group_size,
            bool norm_before_gate) {
  Norm a = make_norm(x, weight, z, eps, group_size, norm_before_gate);
  Tensor y = at::empty(x.sizes(), x.options());
  a.y = y.data_ptr<float>();
  kernels()->norm(a);
  return y;
}

// Gradients of x, weight and z; that of z is empty if there is none.
std::vector<Tensor> norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const OptionalTensor& z,
                                  double eps, int64_t group_size, bool norm_before_gate) {
  const Norm a = make_norm(x, weight, z, eps, group_size, norm_before_gate);
  check("dy", dy, x.sizes());
  Tensor dx = at::empty(x.sizes(), x.options()), dz = z ? at::empty_like(dx) : at::empty({0}, x.options());
  Tensor dweight = at::zeros({(a.rows + kNormRows - 1) / kNormRows, a.channels}, x.options());
  kernels()->norm_backward(a, {dy.const_data_ptr<float>(), dx.data_ptr<float>(), z ? dz.data_ptr<float>() : nullptr,
                               dweight.data_ptr<float>()});
  return {dx, dweight.sum(0), dz};
}

// "avx512", "avx2", or "" if this machine has neither.
std::string instruction_set() {
  return kernels() ? kernels()->name : "";
}

}  // namespace

#define CONV_INPUTS                                                                              \
  "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? seq_idx, " \
  "Tensor? cu_seqlens, Tensor? index"
#define NORM_INPUTS "Tensor x, Tensor weight, Tensor? z, float eps, int group_size, bool norm_before_gate"

TORCH_LIBRARY(vision_scan_cpu, m) {
  m.def("conv(" CONV_INPUTS ") -> (Tensor, Tensor)", &conv);
  m.def("conv_backward(Tensor dy, Tensor? dfinal_state, " CONV_INPUTS ") -> Tensor[]", &conv_backward);
  m.def(
      "conv_update(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? seq_idx, "
      "Tensor? slots) -> Tensor",
      &conv_update);
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

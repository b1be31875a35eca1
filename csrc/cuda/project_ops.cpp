// Decoding's projections and norms as operators of the library `vision_scan_cuda`; outputs are the caller's tensors.
#include <torch/custom_class.h>

#include "ops.h"
#include "project.h"

namespace vision_scan {
namespace {

// What both kernels say of their tokens: x (rows of the batch, seqlen, columns), of which the last `keep` count.
template <class A>
void set_tokens(A& a, const Tensor& x, int64_t keep, const Tensor& norm, double eps, int64_t group_size) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x must have 3 axes, got ", x.dim());
  const int64_t columns = x.size(2);
  TORCH_CHECK_VALUE(1 <= keep && keep <= x.size(1), "keep must be from 1 to seqlen ", x.size(1), ", got ", keep);
  TORCH_CHECK_VALUE(0 < group_size && columns % group_size == 0, "columns ", columns,
                    " must be a multiple of group_size ", group_size);
  check("norm", norm, {columns}, at::kFloat);
  a.rows = static_cast<int>(x.size(0) * keep);
  a.columns = static_cast<int>(columns);
  a.group_size = static_cast<int>(group_size);
  a.seqlen = static_cast<int>(x.size(1));
  a.keep = static_cast<int>(keep);
  a.eps = static_cast<float>(eps);
  a.norm = data<float>(norm);
}

// gate (batch, seqlen, columns), a piece of a wider tensor; there is none where only some tokens count.
template <class A, class X>
void set_gate(A& a, const X*& to, const OptionalTensor& gate, const Tensor& x) {
  if (!gate) return;
  TORCH_CHECK_VALUE(a.keep == a.seqlen, "a gate needs all tokens: keep must be ", a.seqlen, ", got ", a.keep);
  check_shape("gate", *gate, x.sizes(), x.scalar_type());
  TORCH_CHECK_VALUE((a.columns == 1 || gate->stride(2) == 1) && gate->stride(0) == gate->stride(1) * gate->size(1),
                    "gate must be contiguous for each token, one after another, got strides ", gate->strides());
  to = data<X>(*gate);
  a.gate_stride = gate->stride(1);
}

bool fits(at::ScalarType dtype, int64_t rows, int64_t columns, int64_t group_size, int64_t device) {
  bool answer = false;
  with_type(dtype, [&](auto kind) {
    using T = decltype(kind);
    Project<T> a{};
    a.rows = static_cast<int>(rows);
    a.columns = static_cast<int>(columns);
    a.group_size = static_cast<int>(group_size);
    answer = rows <= project::kMostRows && columns % project::kWide<T> == 0 && group_size % 4 == 0 &&
             project_shared(a) <= card(static_cast<int>(device)).most_shared;
  });
  return answer;
}

void project_op(const Tensor& x, int64_t keep, const Tensor& norm, double eps, int64_t group_size,
                const OptionalTensor& gate, const Tensor& weight, const Tensor& y, bool add,
                const OptionalTensor& conv_state, const OptionalTensor& conv_weight, const OptionalTensor& conv_bias,
                int64_t conv_first, const OptionalTensor& marks, bool chained) {
  const auto dtype = weight.scalar_type();
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must have 2 axes, got ", weight.dim());
  const int64_t batch = x.size(0), outputs = weight.size(0);
  check("x", x, x.sizes(), at::kFloat);
  with_type(dtype, [&](auto kind) {
    using T = decltype(kind);
    Project<T> a{};
    set_tokens(a, x, keep, norm, eps, group_size);
    set_gate(a, a.gate, gate, x);
    check("weight", weight, {outputs, a.columns}, dtype);
    check("y", y, {batch, keep, outputs}, at::kFloat);
    TORCH_CHECK_VALUE(fits(dtype, a.rows, a.columns, group_size, x.get_device()), "project does not serve ", a.rows,
                      " tokens of ", a.columns, " ", dtype, " columns in groups of ", group_size);
    for (const Tensor& t : {x, norm, weight})
      TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0,
                        "x, norm and weight must begin at a multiple of 16 bytes");
    a.outputs = static_cast<int>(outputs);
    a.x = data<float>(x);
    a.weight = data<T>(weight);
    a.y = mutable_data<float>(y);
    a.add = add;
    if (conv_state) {
      TORCH_CHECK_VALUE(conv_weight && conv_bias && conv_state->dim() == 3, "a convolution needs weight and bias");
      const int64_t channels = conv_state->size(1), taps = conv_state->size(2) + 1;
      TORCH_CHECK_VALUE(keep == x.size(1) && taps <= update::kMostTaps, "a convolution needs all tokens and at most ",
                        update::kMostTaps, " taps, got ", taps);
      TORCH_CHECK_VALUE(conv_first >= 0 && conv_first + channels <= outputs, "channels ", conv_first, " to ",
                        conv_first + channels, " must be among the ", outputs, " outputs");
      check("conv_state", conv_state, {batch, channels, taps - 1}, dtype);
      check("conv_weight", conv_weight, {channels, taps}, dtype);
      check("conv_bias", conv_bias, {channels}, dtype);
      check("marks", marks, {batch, keep}, at::kByte);
      a.conv.rows = {static_cast<int>(batch), static_cast<int>(keep), static_cast<int>(batch), nullptr,
                     data<uint8_t>(marks)};
      a.conv.channels = static_cast<int>(channels);
      a.conv.taps = static_cast<int>(taps);
      a.conv.weight = data<T>(conv_weight);
      a.conv.bias = data<T>(conv_bias);
      a.conv.state = mutable_data<T>(*conv_state);
      a.conv_first = static_cast<int>(conv_first);
    }
    project_tokens(a, card(x.get_device()).processors, chained, Here(x).stream);
  });
}

template <class X, class T>
void normalize_as(const Tensor& x, int64_t keep, const OptionalTensor& delta, const Tensor& norm, double eps,
                  int64_t group_size, const OptionalTensor& gate, const Tensor& y) {
  Normalize<X, T> a{};
  set_tokens(a, x, keep, norm, eps, group_size);
  set_gate(a, a.gate, gate, x);
  check("delta", delta, x.sizes(), y.scalar_type());
  check("y", y, {x.size(0), keep, a.columns}, y.scalar_type());
  a.x = mutable_data<X>(x);
  a.delta = data<T>(delta);
  a.y = mutable_data<T>(y);
  normalize_tokens(a, Here(x).stream);
}

void normalize_op(const Tensor& x, int64_t keep, const OptionalTensor& delta, const Tensor& norm, double eps,
                  int64_t group_size, const OptionalTensor& gate, const Tensor& y) {
  check("x", x, x.sizes(), x.scalar_type());
  with_type(y.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    if (x.scalar_type() == at::kFloat) return normalize_as<float, T>(x, keep, delta, norm, eps, group_size, gate, y);
    TORCH_CHECK_VALUE(x.scalar_type() == y.scalar_type(), "x must be Float or ", y.scalar_type(), ", got ",
                      x.scalar_type());
    normalize_as<T, T>(x, keep, delta, norm, eps, group_size, gate, y);
  });
}

// Tells whether tensors are where and what they were: a graph of kernels holds for them alone.
class Places : public torch::CustomClassHolder {
 public:
  explicit Places(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {}

  // A number of the places, dtypes and layouts of these tensors and some others.
  int64_t with(const std::vector<Tensor>& others) const {
    uint64_t all = 0;
    const auto mix = [&](uint64_t value) { all = (all ^ value) * 0x9e3779b97f4a7c15u, all ^= all >> 29; };
    for (const auto* tensors : {&tensors_, &others})
      for (const Tensor& t : *tensors) {
        mix(reinterpret_cast<uintptr_t>(t.const_data_ptr()));
        mix(static_cast<uint64_t>(t.scalar_type()));
        for (int64_t axis = 0; axis < t.dim(); ++axis) mix(t.size(axis)), mix(t.stride(axis));
      }
    return static_cast<int64_t>(all);
  }

 private:
  std::vector<Tensor> tensors_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(vision_scan_cuda, m) {
  m.class_<Places>("Places").def(torch::init<std::vector<Tensor>>()).def("with_others", &Places::with);
  m.def("project_fits(ScalarType dtype, int rows, int columns, int group_size, int device) -> bool", &fits);
  m.def(
      "project(Tensor x, int keep, Tensor norm, float eps, int group_size, Tensor? gate, Tensor weight, "
      "Tensor(a!) y, bool add, Tensor(b!)? conv_state, Tensor? conv_weight, Tensor? conv_bias, int conv_first, "
      "Tensor? marks, bool chained) -> ()",
      &project_op);
  m.def(
      "normalize(Tensor(a!) x, int keep, Tensor? delta, Tensor norm, float eps, int group_size, Tensor? gate, "
      "Tensor(b!) y) -> ()",
      &normalize_op);
}

}  // namespace vision_scan

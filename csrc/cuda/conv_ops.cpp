// The short causal convolution as operators of the library `vision_scan_cuda`.
#include "ops.h"
#include "conv_backward.h"

namespace vision_scan {
namespace {

template <class T>
Conv<T> make_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool silu,
                  const OptionalTensor& initial_state, const OptionalTensor& index, const OptionalTensor& marks,
                  const OptionalTensor& bounds) {
  TORCH_CHECK_VALUE(x.dim() == 3 || x.dim() == 4, "x must have 3 or 4 axes, got ", x.dim());
  TORCH_CHECK_VALUE(weight.dim() == 3, "weight must have 3 axes, got ", weight.dim());
  TORCH_CHECK_VALUE(!bias || bias->dim() == 2, "bias must have 2 axes, got ", bias->dim());
  const int64_t batch = x.size(0), cells = x.size(-2), channels = x.size(-1), taps = weight.size(2);
  const int64_t lists = index ? index->size(0) : 1;
  const auto dtype = x.scalar_type();
  TORCH_CHECK_VALUE(0 < taps && taps <= conv::kMostTaps, "weight must have 1 to ", conv::kMostTaps, " taps, got ", taps);
  Conv<T> a{};
  a.tokens = make_tokens(batch, lists, cells, index, marks, bounds);
  a.channels = static_cast<int>(channels);
  a.taps = static_cast<int>(taps);
  a.silu = silu;
  a.shared_input = x.dim() == 3;
  a.shared_weight = weight.size(0) == 1;
  a.shared_bias = bias && bias->size(0) == 1;
  if (a.shared_input)
    a.x_stride = check_cells("x", x, {batch, cells, channels}, dtype, 2);
  else
    a.x_stride = check_cells("x", x, {batch, lists, cells, channels}, dtype, 3);
  a.x = data<T>(x);
  a.weight = parameter<T>("weight", weight, {a.shared_weight ? 1 : lists, channels, taps}, dtype);
  a.bias = parameter<T>("bias", bias, {a.shared_bias ? 1 : lists, channels}, dtype);
  check("initial_state", initial_state, {a.tokens.rows(), channels, taps - 1}, dtype);
  a.initial_state = data<T>(initial_state);
  return a;
}

// Memory for what the kernels write at each token: also at padding, unless lists lead past some cells.
Tensor make_tokens_of(const Tensor& x, const Tokens& t, bool everywhere) {
  const std::array<int64_t, 4> shape{t.batch, t.lists, t.cells, x.size(-1)};
  return everywhere || !t.index ? at::empty(shape, x.options()) : at::zeros(shape, x.options());
}

// y (batch, lists, cells, channels) and the final state. `everywhere`: the lists visit every cell.
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool silu,
                                   const OptionalTensor& initial_state, const OptionalTensor& index,
                                   const OptionalTensor& marks, const OptionalTensor& bounds, bool everywhere) {
  Tensor y, final_state;
  with_type(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    Conv<T> a = make_conv<T>(x, weight, bias, silu, initial_state, index, marks, bounds);
    const Here here(x);
    a.run = conv_forward_run(a, card(x.get_device()).processors);
    y = make_tokens_of(x, a.tokens, everywhere);
    final_state = at::empty({a.tokens.rows(), a.channels, a.taps - 1}, x.options());
    a.y = mutable_data<T>(y);
    a.final_state = mutable_data<T>(final_state);
    conv_forward(a, here.stream);
  });
  return {y, final_state};
}

// Gradients of x, weight, bias and initial_state in the shapes of these, the parameters' in float32; empty where there
// is none.
std::vector<Tensor> backward(const Tensor& dy, const OptionalTensor& dfinal_state, const Tensor& x,
                             const Tensor& weight, const OptionalTensor& bias, bool silu,
                             const OptionalTensor& initial_state, const OptionalTensor& index,
                             const OptionalTensor& marks, const OptionalTensor& bounds, bool everywhere) {
  std::vector<Tensor> found;
  with_type(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    Conv<T> a = make_conv<T>(x, weight, bias, silu, initial_state, index, marks, bounds);
    const Tokens& t = a.tokens;
    check("dy", dy, {t.batch, t.lists, t.cells, a.channels}, x.scalar_type());
    check("dfinal_state", dfinal_state, {t.rows(), a.channels, a.taps - 1}, x.scalar_type());
    const Here here(x);
    a.run = conv_backward_run(a, card(x.get_device()).processors);
    Tensor dx = make_tokens_of(x, t, everywhere), none = at::empty({0}, x.options());
    Tensor dinitial = initial_state ? at::empty_like(*initial_state) : none;
    Tensor sums = at::empty({t.batch, t.lists, conv::parts_of(t.seqlen, a.run), a.taps + 1, a.channels},
                            x.options().dtype(at::kFloat));
    ConvGradients<T> g{};
    g.dy = data<T>(dy);
    g.dfinal_state = data<T>(dfinal_state);
    g.dx = mutable_data<T>(dx);
    g.dinitial_state = initial_state ? mutable_data<T>(dinitial) : nullptr;
    g.dparameters = mutable_data<float>(sums);
    conv_backward(a, g, here.stream);
    sums = sums.sum({0, 2});  // (lists, taps + 1, channels)
    const auto of = [](const Tensor& part, bool shared) { return shared ? part.sum(0, true) : part; };
    found = {a.shared_input ? (t.lists > 1 ? dx.sum(1) : dx.squeeze(1)) : dx,
             of(sums.narrow(1, 0, a.taps).transpose(1, 2), a.shared_weight),
             bias ? of(sums.select(1, a.taps), a.shared_bias) : none, dinitial};
  });
  return found;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vision_scan_cuda, m) {
  const std::string inputs =
      "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? index, Tensor? marks, "
      "Tensor? bounds, bool everywhere";
  m.def(("conv(" + inputs + ") -> (Tensor, Tensor)").c_str(), &forward);
  m.def(("conv_backward(Tensor dy, Tensor? dfinal_state, " + inputs + ") -> Tensor[]").c_str(), &backward);
}

}  // namespace vision_scan

// The gated RMS norm as operators of the library `vision_scan_cuda`.
#include "ops.h"
#include "norm.h"

namespace vision_scan {
namespace {

template <class T>
Norm<T> make_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& z, double eps, int64_t group_size,
                  bool norm_before_gate) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x must have 2 axes, got ", x.dim());
  const int64_t rows = x.size(0), channels = x.size(1);
  const auto dtype = x.scalar_type();
  TORCH_CHECK_VALUE(0 < group_size && group_size <= norm::kMostGroup && channels % group_size == 0,
                    "group_size must divide channels ", channels, " and be at most ", norm::kMostGroup, ", got ",
                    group_size);
  TORCH_CHECK_VALUE(rows * (channels / group_size) < 1LL << 31, "x must have fewer than 2^31 groups, got ",
                    rows * (channels / group_size));
  Norm<T> a{};
  a.rows = static_cast<int>(rows);
  a.channels = static_cast<int>(channels);
  a.group_size = static_cast<int>(group_size);
  a.x_stride = check_cells("x", x, {rows, channels}, dtype, 1);
  a.z_stride = z ? check_cells("z", *z, {rows, channels}, dtype, 1) : 0;
  a.eps = static_cast<float>(eps);
  a.norm_before_gate = norm_before_gate;
  a.x = data<T>(x);
  a.z = data<T>(z);
  a.weight = parameter<T>("weight", weight, {channels}, dtype);
  return a;
}

Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& z, double eps, int64_t group_size,
               bool norm_before_gate) {
  Tensor y;
  with_type(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    Norm<T> a = make_norm<T>(x, weight, z, eps, group_size, norm_before_gate);
    const Here here(x);
    y = at::empty(x.sizes(), x.options());
    a.y = mutable_data<T>(y);
    norm_forward(a, here.stream);
  });
  return y;
}

// Gradients of x, weight (float32) and z; that of z is empty if there is none.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                            const OptionalTensor& z, double eps, int64_t group_size,
                                            bool norm_before_gate) {
  Tensor dx, dweight, dz;
  with_type(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    const Norm<T> a = make_norm<T>(x, weight, z, eps, group_size, norm_before_gate);
    check("dy", dy, x.sizes(), x.scalar_type());
    const Here here(x);
    NormGradients<T> g{};
    g.slices = norm_slices(a, card(x.get_device()).processors);
    dx = at::empty(x.sizes(), x.options());
    dz = at::empty(z ? x.sizes() : at::IntArrayRef{0}, x.options());
    dweight = at::empty({g.slices, a.channels}, x.options().dtype(at::kFloat));
    g.dy = data<T>(dy);
    g.dx = mutable_data<T>(dx);
    g.dz = z ? mutable_data<T>(dz) : nullptr;
    g.dweight = mutable_data<float>(dweight);
    norm_backward(a, g, here.stream);
    dweight = dweight.sum(0);
  });
  return {dx, dweight, dz};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vision_scan_cuda, m) {
  const std::string inputs = "Tensor x, Tensor weight, Tensor? z, float eps, int group_size, bool norm_before_gate";
  m.def(("norm(" + inputs + ") -> Tensor").c_str(), &forward);
  m.def(("norm_backward(Tensor dy, " + inputs + ") -> (Tensor, Tensor, Tensor)").c_str(), &backward);
}

}  // namespace vision_scan

// The selective scan as operators of the library `vision_scan_cuda`.
#include "ops.h"
#include "selective_backward.h"

namespace vision_scan {
namespace {

template <class T>
Selective<T> make_selective(const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                            const OptionalTensor& D, const OptionalTensor& dt_bias, bool dt_softplus, bool merge,
                            double scale, const OptionalTensor& initial_state, const OptionalTensor& index,
                            const OptionalTensor& marks, const OptionalTensor& bounds) {
  const int64_t batch = u.size(0), lists = A.size(0), cells = u.size(-2), channels = A.size(1), d_state = A.size(2);
  const int64_t ngroups = B.size(3);
  Selective<T> a{};
  a.tokens = make_tokens(batch, lists, cells, index, marks, bounds);
  a.channels = static_cast<int>(channels);
  a.ngroups = static_cast<int>(ngroups);
  a.d_state = static_cast<int>(d_state);
  a.dt_softplus = dt_softplus;
  a.shared_input = u.dim() == 3;
  a.merged_output = merge;
  a.output_scale = static_cast<float>(scale);
  a.u = data<T>(u);
  a.dt = data<T>(dt);
  a.B = data<T>(B);
  a.C = data<T>(C);
  a.A = data<float>(A);
  a.D = data<float>(D);
  a.dt_bias = data<float>(dt_bias);
  a.initial_state = data<float>(initial_state);
  return a;
}

void check_selective(const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                     const OptionalTensor& D, const OptionalTensor& dt_bias, const OptionalTensor& initial_state,
                     const OptionalTensor& bounds) {
  TORCH_CHECK_VALUE(u.dim() == 3 || u.dim() == 4, "u must have 3 or 4 axes, got ", u.dim());
  TORCH_CHECK_VALUE(A.dim() == 3, "A must have 3 axes, got ", A.dim());
  TORCH_CHECK_VALUE(B.dim() == 5, "B must have 5 axes, got ", B.dim());
  const int64_t batch = u.size(0), lists = A.size(0), cells = u.size(-2), channels = A.size(1), d_state = A.size(2);
  const int64_t ngroups = B.size(3), rows = bounds ? bounds->numel() - 1 : batch * lists;
  const auto dtype = u.scalar_type();
  TORCH_CHECK_VALUE(ngroups > 0 && channels % ngroups == 0, "channels ", channels, " must be a multiple of ngroups ",
                    ngroups);
  TORCH_CHECK_VALUE(0 < d_state && d_state <= selective::kMostStates, "d_state must be from 1 to ",
                    selective::kMostStates, ", got ", d_state);
  if (u.dim() == 3)
    check("u", u, {batch, cells, channels}, dtype);
  else
    check("u", u, {batch, lists, cells, channels}, dtype);
  check("dt", dt, {batch, lists, cells, channels}, dtype);
  check("A", A, {lists, channels, d_state}, at::kFloat);
  check("B", B, {batch, lists, cells, ngroups, d_state}, dtype);
  check("C", C, {batch, lists, cells, ngroups, d_state}, dtype);
  check("D", D, {lists, channels}, at::kFloat);
  check("dt_bias", dt_bias, {lists, channels}, at::kFloat);
  check("initial_state", initial_state, {rows, channels, d_state}, at::kFloat);
  TORCH_CHECK_VALUE(cells * channels < std::numeric_limits<int>::max() && cells < int64_t{selective::kResetBit},
                    "a grid of ", cells, " cells and ", channels, " channels is too large");
}

// `everywhere`: the lists visit every cell and there is no padding; else what is not visited becomes zero.
std::tuple<Tensor, Tensor> scan(const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B,
                                const Tensor& C, const OptionalTensor& D, const OptionalTensor& dt_bias,
                                     bool dt_softplus, bool merge, double scale, const OptionalTensor& initial_state,
                                const OptionalTensor& index, const OptionalTensor& marks,
                                const OptionalTensor& bounds, bool everywhere) {
  check_selective(u, dt, A, B, C, D, dt_bias, initial_state, bounds);
  const Here here(u);
  const auto numbers = u.options().dtype(at::kFloat);
  std::vector<int64_t> shape = merge ? std::vector<int64_t>{u.size(0), u.size(-2), u.size(-1)} : dt.sizes().vec();
  Tensor y = merge || everywhere ? at::empty(shape, u.options()) : at::zeros(shape, u.options());
  Tensor final_state, scratch;
  with_type(u.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    Selective<T> a = make_selective<T>(u, dt, A, B, C, D, dt_bias, dt_softplus, merge, scale, initial_state, index,
                                       marks, bounds);
    final_state = at::empty({merge ? 0 : a.tokens.rows(), A.size(1), A.size(2)}, numbers);
    a.final_state = merge ? nullptr : mutable_data<float>(final_state);
    a.y = mutable_data<T>(y);
    if (merge && selective::Shared::bytes(a.d_state, a.tokens.cells) > card(u.get_device()).most_shared) {
      scratch = at::empty(shape, numbers);
      a.scratch = mutable_data<float>(scratch);
    }
    selective_forward(a, here.stream);
  });
  return {y, final_state};
}

// Gradients of u, dt, A, B, C, D, dt_bias and initial_state; those of A, D, dt_bias by row, (rows, ...).
std::vector<Tensor> scan_backward(const Tensor& dy, const OptionalTensor& dfinal_state, const Tensor& u,
                                  const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                                  const OptionalTensor& D, const OptionalTensor& dt_bias, bool dt_softplus, bool merge,
                                  double scale, const OptionalTensor& initial_state, const OptionalTensor& index,
                                  const OptionalTensor& marks, const OptionalTensor& bounds, bool everywhere) {
  check_selective(u, dt, A, B, C, D, dt_bias, initial_state, bounds);
  const bool narrow = dy.scalar_type() == u.scalar_type();  // else it is float32, as it comes from behind a gate
  const std::vector<int64_t> like_y =
      merge ? std::vector<int64_t>{u.size(0), u.size(-2), u.size(-1)} : dt.sizes().vec();
  check("dy", dy, like_y, narrow ? u.scalar_type() : at::kFloat);
  const Here here(u);
  const auto numbers = u.options().dtype(at::kFloat);
  const auto make = [&](at::IntArrayRef shape, const at::TensorOptions& options) {
    return everywhere ? at::empty(shape, options) : at::zeros(shape, options);
  };
  std::vector<Tensor> found;
  with_type(u.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    Selective<T> a = make_selective<T>(u, dt, A, B, C, D, dt_bias, dt_softplus, merge, scale, initial_state, index,
                                       marks, bounds);
    const int64_t rows = a.tokens.rows(), channels = a.channels, d_state = a.d_state;
    check("dfinal_state", dfinal_state, {rows, channels, d_state}, at::kFloat);
    const int64_t tiles = (a.tokens.seqlen + selective::kTile - 1) / selective::kTile;
    const Tensor entries = at::empty({rows, tiles, d_state, channels}, numbers);
    a.entries = mutable_data<float>(entries);
    selective_entries(a, here.stream);

    // One block of channels: its sums are the gradient. Several: they add, or in deterministic mode leave parts.
    const int64_t parts = selective::Block::how_many(a.channels, a.ngroups) / a.ngroups;
    const bool apart = parts == 1 || at::globalContext().deterministicAlgorithms();
    std::vector<int64_t> shape = B.sizes().vec();
    if (apart) shape.insert(shape.begin(), parts);
    Tensor dB = apart ? make(shape, numbers) : at::zeros(shape, numbers);
    Tensor dC = apart ? make(shape, numbers) : at::zeros(shape, numbers);
    Tensor du = a.shared_input ? at::empty(u.sizes(), u.options()) : make(u.sizes(), u.options());
    Tensor ddt = make(dt.sizes(), dt.options());
    Tensor dA = at::empty({rows, channels, d_state}, numbers), dD = at::empty({rows, channels}, numbers);
    Tensor ddt_bias = at::empty_like(dD), dinitial = initial_state ? at::empty_like(*initial_state) : Tensor();
    Tensor scratch;
    if (a.shared_input &&
        selective::SharedBackward::bytes(a.d_state, a.tokens.cells) > card(u.get_device()).most_shared) {
      scratch = at::empty(u.sizes(), numbers);
      a.scratch = mutable_data<float>(scratch);
    }
    SelectiveGradients<T> g{};
    g.dy = narrow ? data<T>(dy) : nullptr;
    g.dy32 = narrow ? nullptr : data<float>(dy);
    g.dfinal_state = data<float>(dfinal_state);
    g.du = mutable_data<T>(du);
    g.ddt = mutable_data<T>(ddt);
    g.dB = mutable_data<float>(dB);
    g.dC = mutable_data<float>(dC);
    g.apart = apart;
    g.part = apart ? B.numel() : 0;
    g.dA = mutable_data<float>(dA);
    g.dD = mutable_data<float>(dD);
    g.ddt_bias = mutable_data<float>(ddt_bias);
    g.dinitial_state = initial_state ? mutable_data<float>(dinitial) : nullptr;
    selective_backward(a, g, here.stream);
    if (apart) dB = parts == 1 ? dB[0] : dB.sum(0), dC = parts == 1 ? dC[0] : dC.sum(0);
    found = {du, ddt, dA, dB, dC, dD, ddt_bias, initial_state ? dinitial : at::empty({0}, numbers)};
  });
  return found;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vision_scan_cuda, m) {
  const std::string inputs =
      "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus, bool merge, "
      "float scale, Tensor? initial_state, Tensor? index, Tensor? marks, Tensor? bounds, bool everywhere";
  m.def(("selective(" + inputs + ") -> (Tensor, Tensor)").c_str(), &scan);
  m.def(("selective_backward(Tensor dy, Tensor? dfinal_state, " + inputs + ") -> Tensor[]").c_str(), &scan_backward);
}

}  // namespace vision_scan

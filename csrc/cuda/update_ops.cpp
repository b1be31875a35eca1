// Updates of a few tokens as operators of the library `vision_scan_cuda`. States and outputs are the caller's tensors.
#include "ops.h"

#include "deferred.h"

namespace vision_scan {
namespace {

Rows make_rows(int64_t rows, int64_t seqlen, int64_t num_slots, const OptionalTensor& marks, const OptionalTensor& slots) {
  TORCH_CHECK_VALUE(rows <= 65535, "an update takes at most 65535 rows, got ", rows);
  TORCH_CHECK_VALUE(slots || rows == num_slots, "without slots there is a row for each state, got ", rows, " for ",
                    num_slots);
  check("marks", marks, {rows, seqlen}, at::kByte);
  check("slots", slots, {rows}, at::kInt);
  return {static_cast<int>(rows), static_cast<int>(seqlen), static_cast<int>(num_slots), data<int>(slots),
          data<uint8_t>(marks)};
}

// A tensor (rows, seqlen, ...) that is contiguous for each token.
template <class T>
Piece<T> piece(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype) {
  check_shape(name, tensor, shape, dtype);
  int64_t expected = 1;
  for (int64_t axis = tensor.dim() - 1; axis > 1; expected *= tensor.size(axis--))
    TORCH_CHECK_VALUE(tensor.size(axis) == 1 || tensor.stride(axis) == expected, name,
                      " must be contiguous for each token, got strides ", tensor.strides());
  return {data<T>(tensor), tensor.stride(0), tensor.stride(1)};
}

// Whether four neighbours of each token's can be read at once.
bool is_aligned(const Tensor& piece) {
  return reinterpret_cast<uintptr_t>(piece.const_data_ptr()) % (4 * piece.element_size()) == 0 &&
         piece.stride(0) % 4 == 0 && piece.stride(1) % 4 == 0;
}

// The state: float32, or int8 with scales.
template <class T>
SsdUpdate<T> make_ssd(const Tensor& state, const OptionalTensor& scales, const Tensor& x, const Tensor& dt,
                      const Tensor& A, bool A_is_log, const Tensor& B, const Tensor& C, const OptionalTensor& D,
                      const OptionalTensor& z, const OptionalTensor& dt_bias, bool dt_softplus, double dt_min,
                      double dt_max, const OptionalTensor& marks, const OptionalTensor& slots, const Tensor& y) {
  TORCH_CHECK_VALUE(state.dim() == 4, "state must have 4 axes, got ", state.dim());
  TORCH_CHECK_VALUE(x.dim() == 4, "x must have 4 axes, got ", x.dim());
  TORCH_CHECK_VALUE(B.dim() == 4, "B must have 4 axes, got ", B.dim());
  const int64_t rows = x.size(0), seqlen = x.size(1), nheads = state.size(1), headdim = state.size(2);
  const int64_t d_state = state.size(3), ngroups = B.size(2);
  const auto dtype = x.scalar_type();
  TORCH_CHECK_VALUE(0 < ngroups && nheads % ngroups == 0 && nheads <= 65535, "nheads ", nheads,
                    " must be a multiple of ngroups ", ngroups, ", at most 65535");
  TORCH_CHECK_VALUE(0 < d_state && d_state <= update::kMostStates, "d_state must be from 1 to ", update::kMostStates,
                    ", got ", d_state);
  check("state", state, state.sizes(), scales ? at::kChar : at::kFloat);
  check("scales", scales, {state.size(0), nheads, headdim}, at::kFloat);
  check("A", A, {nheads}, at::kFloat);
  check("dt_bias", dt_bias, {nheads}, at::kFloat);
  const bool of_channels = D && D->dim() == 2;
  if (of_channels)
    check("D", D, {nheads, headdim}, at::kFloat);
  else
    check("D", D, {nheads}, at::kFloat);
  check("y", y, {rows, seqlen, nheads, headdim}, dtype);
  SsdUpdate<T> a{};
  a.rows = make_rows(rows, seqlen, state.size(0), marks, slots);
  a.nheads = static_cast<int>(nheads);
  a.headdim = static_cast<int>(headdim);
  a.ngroups = static_cast<int>(ngroups);
  a.d_state = static_cast<int>(d_state);
  a.dt_softplus = dt_softplus;
  a.A_is_log = A_is_log;
  a.dt_min = static_cast<float>(dt_min);
  a.dt_max = static_cast<float>(dt_max);
  a.x = piece<T>("x", x, {rows, seqlen, nheads, headdim}, dtype);
  if (z) a.z = piece<T>("z", *z, {rows, seqlen, nheads, headdim}, dtype);
  a.dt = piece<T>("dt", dt, {rows, seqlen, nheads}, dtype);
  a.B = piece<T>("B", B, {rows, seqlen, ngroups, d_state}, dtype);
  a.C = piece<T>("C", C, {rows, seqlen, ngroups, d_state}, dtype);
  a.A = data<float>(A);
  a.dt_bias = data<float>(dt_bias);
  a.D = data<float>(D);
  a.D_of_channels = of_channels;
  if (scales) {
    TORCH_CHECK_VALUE(d_state % update::kCodes == 0 && is_aligned(B) && is_aligned(C) &&
                          reinterpret_cast<uintptr_t>(state.const_data_ptr()) % 16 == 0,
                      "codes need a d_state of a multiple of ", update::kCodes, ", got ", d_state,
                      ", and aligned state, B and C");
    a.codes = mutable_data<int8_t>(state);
    a.scales = mutable_data<float>(*scales);
  } else {
    a.state = mutable_data<float>(state);
  }
  a.y = mutable_data<T>(y);
  return a;
}

void ssd(const Tensor& state, const OptionalTensor& scales, const Tensor& x, const Tensor& dt, const Tensor& A,
         bool A_is_log, const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
         const OptionalTensor& dt_bias, bool dt_softplus, double dt_min, double dt_max, const OptionalTensor& marks,
         const OptionalTensor& slots, const Tensor& y, bool chained) {
  with_type(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    ssd_update(make_ssd<T>(state, scales, x, dt, A, A_is_log, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, marks,
                           slots, y),
               chained, Here(x).stream);
  });
}

// kept_x (num_slots, room, nheads, headdim), kept_B (num_slots, room, ngroups, d_state), kept_dt (num_slots, room,
// nheads); waiting (rows) from 0 to room - 1, which the caller counts on.
void deferred_ssd(const Tensor& state, const Tensor& kept_x, const Tensor& kept_B, const Tensor& kept_dt,
                  const Tensor& waiting, const Tensor& x, const Tensor& dt, const Tensor& A, bool A_is_log,
              const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
              const OptionalTensor& dt_bias, bool dt_softplus, double dt_min, double dt_max,
              const OptionalTensor& marks, const OptionalTensor& slots, const Tensor& y) {
  with_type(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    Deferred<T> d{};
    d.update = make_ssd<T>(state, std::nullopt, x, dt, A, A_is_log, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max,
                           marks, slots, y);
    const SsdUpdate<T>& a = d.update;
    TORCH_CHECK_VALUE(a.rows.seqlen == 1, "a deferred update takes one token at a time, got ", a.rows.seqlen);
    TORCH_CHECK_VALUE(a.d_state % 4 == 0 && a.d_state <= 128 && is_aligned(B) && is_aligned(C) &&
                          reinterpret_cast<uintptr_t>(state.const_data_ptr()) % 16 == 0,
                      "a deferred update needs a d_state of a multiple of 4, at most 128, got ", a.d_state,
                      ", and aligned state, B and C");
    TORCH_CHECK_VALUE(kept_dt.dim() == 3 && kept_dt.size(1) > 0, "kept_dt must have room for a token, got ",
                      kept_dt.sizes());
    const int64_t slots_and_room[] = {state.size(0), kept_dt.size(1)};
    check("kept_x", kept_x, {slots_and_room[0], slots_and_room[1], a.nheads, a.headdim}, x.scalar_type());
    check("kept_B", kept_B, {slots_and_room[0], slots_and_room[1], a.ngroups, a.d_state}, x.scalar_type());
    check("kept_dt", kept_dt, {slots_and_room[0], slots_and_room[1], a.nheads}, at::kFloat);
    check("waiting", waiting, {a.rows.rows}, at::kInt);
    d.room = static_cast<int>(slots_and_room[1]);
    d.waiting = data<int>(waiting);
    d.x = mutable_data<T>(kept_x);
    d.B = mutable_data<T>(kept_B);
    d.dt = mutable_data<float>(kept_dt);
    deferred_update(d, Here(x).stream);
  });
}

void selective(const Tensor& state, const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B,
               const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
               bool dt_softplus, const OptionalTensor& marks, const OptionalTensor& slots, const Tensor& y) {
  TORCH_CHECK_VALUE(state.dim() == 3, "state must have 3 axes, got ", state.dim());
  TORCH_CHECK_VALUE(u.dim() == 3, "u must have 3 axes, got ", u.dim());
  TORCH_CHECK_VALUE(B.dim() == 4, "B must have 4 axes, got ", B.dim());
  const int64_t rows = u.size(0), channels = state.size(1), d_state = state.size(2), seqlen = u.size(2);
  const int64_t ngroups = B.size(1);
  const auto dtype = u.scalar_type();
  TORCH_CHECK_VALUE(0 < ngroups && channels % ngroups == 0, "channels ", channels, " must be a multiple of ngroups ",
                    ngroups);
  TORCH_CHECK_VALUE(0 < d_state && d_state <= update::kMostStates, "d_state must be from 1 to ", update::kMostStates,
                    ", got ", d_state);
  check("state", state, {state.size(0), channels, d_state}, at::kFloat);
  check("u", u, {rows, channels, seqlen}, dtype);
  check("dt", dt, {rows, channels, seqlen}, dtype);
  check("z", z, {rows, channels, seqlen}, dtype);
  check("A", A, {channels, d_state}, at::kFloat);
  check("B", B, {rows, ngroups, d_state, seqlen}, dtype);
  check("C", C, {rows, ngroups, d_state, seqlen}, dtype);
  check("D", D, {channels}, at::kFloat);
  check("dt_bias", dt_bias, {channels}, at::kFloat);
  check("y", y, {rows, channels, seqlen}, dtype);
  with_type(dtype, [&](auto kind) {
    using T = decltype(kind);
    SelectiveUpdate<T> a{};
    a.rows = make_rows(rows, seqlen, state.size(0), marks, slots);
    a.channels = static_cast<int>(channels);
    a.ngroups = static_cast<int>(ngroups);
    a.d_state = static_cast<int>(d_state);
    a.dt_softplus = dt_softplus;
    a.u = data<T>(u);
    a.dt = data<T>(dt);
    a.z = data<T>(z);
    a.B = data<T>(B);
    a.C = data<T>(C);
    a.A = data<float>(A);
    a.D = data<float>(D);
    a.dt_bias = data<float>(dt_bias);
    a.state = mutable_data<float>(state);
    a.y = mutable_data<T>(y);
    selective_update(a, Here(u).stream);
  });
}

// x and y (rows, channels, seqlen) may have any strides and be the same tensor.
void conv(const Tensor& state, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool silu,
          const OptionalTensor& marks, const OptionalTensor& slots, const Tensor& y) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x must have 3 axes, got ", x.dim());
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must have 2 axes, got ", weight.dim());
  const int64_t rows = x.size(0), channels = x.size(1), seqlen = x.size(2), taps = weight.size(1);
  const auto dtype = x.scalar_type();
  TORCH_CHECK_VALUE(0 < taps && taps <= update::kMostTaps, "the convolution must have 1 to ", update::kMostTaps,
                    " taps, got ", taps);
  TORCH_CHECK_VALUE(state.dim() == 3, "state must have 3 axes, got ", state.dim());
  check_shape("x", x, {rows, channels, seqlen}, dtype);
  check_shape("y", y, {rows, channels, seqlen}, dtype);
  check("weight", weight, {channels, taps}, dtype);
  check("bias", bias, {channels}, dtype);
  check("state", state, {state.size(0), channels, taps - 1}, dtype);
  with_type(dtype, [&](auto kind) {
    using T = decltype(kind);
    ConvUpdate<T> a{};
    a.rows = make_rows(rows, seqlen, state.size(0), marks, slots);
    a.channels = static_cast<int>(channels);
    a.taps = static_cast<int>(taps);
    a.silu = silu;
    a.x = data<T>(x);
    a.y = mutable_data<T>(y);
    a.x_strides = {x.stride(0), x.stride(1), x.stride(2)};
    a.y_strides = {y.stride(0), y.stride(1), y.stride(2)};
    a.weight = data<T>(weight);
    a.bias = data<T>(bias);
    a.state = mutable_data<T>(state);
    conv_update(a, Here(x).stream);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vision_scan_cuda, m) {
  m.def(
      "ssd_update(Tensor(a!) state, Tensor(c!)? scales, Tensor x, Tensor dt, Tensor A, bool A_is_log, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, Tensor? dt_bias, bool dt_softplus, float dt_min, float dt_max, Tensor? marks, Tensor? slots, "
      "Tensor(b!) y, bool chained) -> ()",
      &ssd);
  m.def(
      "deferred_ssd_update(Tensor(a!) state, Tensor(b!) kept_x, Tensor(c!) kept_B, Tensor(d!) kept_dt, Tensor waiting, "
      "Tensor x, Tensor dt, Tensor A, bool A_is_log, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
      "bool dt_softplus, float dt_min, float dt_max, Tensor? marks, Tensor? slots, Tensor(e!) y) -> ()",
      &deferred_ssd);
  m.def(
      "selective_update(Tensor(a!) state, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? dt_bias, bool dt_softplus, Tensor? marks, Tensor? slots, Tensor(b!) y) -> ()",
      &selective);
  m.def(
      "conv_update(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? marks, Tensor? slots, "
      "Tensor(b!) y) -> ()",
      &conv);
}

}  // namespace vision_scan

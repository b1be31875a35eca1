// Decoding that writes its states every few tokens only: in between, the inputs since then are kept.
//
// A state S that was written before token 1 gives, with a_j = exp(dt_j A),
//
//     y_t = (a_1 ... a_t) S C_t + sum_{j <= t} (a_{j+1} ... a_t) (C_t . B_j) dt_j x_j,
//
// so that a step reads S, and of each token since then x, B and dt, which are a few percent of it. When `room` tokens
// have come they are put into the state, which is then written. All numbers are those of the ordinary update, in
// another order; a group's B is kept once.
// It is the chunked form of Dao & Gu 2024 (arXiv:2405.21060), section 6, with a chunk that grows token by token.
#pragma once

#include "update.h"

namespace vision_scan {

// One token for each row; `update` is as for ssd_update, `update.codes` is not used.
template <class T>
struct Deferred {
  SsdUpdate<T> update;
  int room;
  const int* waiting;  // (rows): tokens that the row's state lacks, 0 to room - 1; the caller counts them
  T* x;                // (num_slots, room, nheads, headdim)
  T* B;                // (num_slots, room, ngroups, d_state)
  float* dt;           // (num_slots, room, nheads), after softplus and limits
};

namespace deferred {

using update::kRows;
using update::kThreads;

template <class T>
__global__ void __launch_bounds__(kThreads) step(Deferred<T> d, int lanes) {
  constexpr int kMine = 4;
  const SsdUpdate<T>& a = d.update;
  const int head = blockIdx.y, row = blockIdx.z, lane = threadIdx.x % lanes, apart = kThreads / lanes;
  const int first = blockIdx.x * apart * kRows + threadIdx.x / lanes, n = lane * kMine;
  const int slot = a.rows.slot(row), per_group = a.nheads / a.ngroups, group = head / per_group;
  T* y = a.y + (static_cast<int64_t>(row) * a.nheads + head) * a.headdim;
  const int waiting = d.waiting[row];
  if (slot < 0 || a.rows.mark(row, 0) & kPadding || waiting < 0 || waiting >= d.room) {
    for (int i = 0; i < kRows; ++i)
      if (lane == 0 && first + i * apart < a.headdim) y[first + i * apart] = from_float<T>(0.0f);
    return;
  }
  const bool has = n < a.d_state;
  float* state = a.state + (static_cast<int64_t>(slot) * a.nheads + head) * a.headdim * a.d_state + n;
  float S[kRows][kMine] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    if (has && first + i * apart < a.headdim) update::read_floats<kMine>(state + (first + i * apart) * a.d_state, S[i]);

  const bool is_full = waiting == d.room - 1;
  T* xs = d.x + (static_cast<int64_t>(slot) * d.room * a.nheads + head) * a.headdim;
  T* Bs = d.B + (static_cast<int64_t>(slot) * d.room * a.ngroups + group) * a.d_state + n;
  float* dts = d.dt + static_cast<int64_t>(slot) * d.room * a.nheads + head;
  const T* x = a.x.at(row, 0) + head * a.headdim;
  const T* B = a.B.at(row, 0) + group * a.d_state + n;
  float C[kMine] = {};
  if (has) update::read_floats<kMine>(a.C.at(row, 0) + group * a.d_state + n, C);
  const float A = a.A_is_log ? -exp2_fast(a.A[head] * kLog2e) : a.A[head];
  float dt = to_float(a.dt.at(row, 0)[head]) + (a.dt_bias ? a.dt_bias[head] : 0.0f);
  if (a.dt_softplus) dt = softplus(dt);
  dt = fminf(fmaxf(dt, a.dt_min), a.dt_max);

  // From the newest token to the oldest; `since` is the sum of dt behind token j.
  float from_inputs[kRows] = {}, added[kRows][kMine] = {}, since = 0.0f;
  for (int j = waiting; j >= 0; --j) {
    const bool is_new = j == waiting;
    const float dt_j = is_new ? dt : dts[static_cast<int64_t>(j) * a.nheads];
    const T* x_j = is_new ? x : xs + static_cast<int64_t>(j) * a.nheads * a.headdim;
    float B_j[kMine] = {}, dot = 0.0f;
    if (has) update::read_floats<kMine>(is_new ? B : Bs + static_cast<int64_t>(j) * a.ngroups * a.d_state, B_j);
    const float weight = dt_j * exp2_fast(since * A * kLog2e);
#pragma unroll
    for (int k = 0; k < kMine; ++k) dot += B_j[k] * C[k];
    dot = update::sum_over_lanes(dot, lanes);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int p = first + i * apart;
      const float inflow = p < a.headdim ? weight * to_float(x_j[p]) : 0.0f;
      from_inputs[i] += inflow * dot;
      if (is_full)
        for (int k = 0; k < kMine; ++k) added[i][k] += inflow * B_j[k];
    }
    since += dt_j;
  }
  const float decay = exp2_fast(since * A * kLog2e);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int p = first + i * apart;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kMine; ++k) sum += S[i][k] * C[k];
    sum = decay * update::sum_over_lanes(sum, lanes) + from_inputs[i];
    if (p >= a.headdim) continue;
    if (lane == 0) {
      if (a.D) sum += to_float(x[p]) * a.D[a.D_of_channels ? head * a.headdim + p : head];
      y[p] = from_float<T>(a.z.data ? sum * silu(to_float(a.z.at(row, 0)[head * a.headdim + p])) : sum);
      if (!is_full) xs[static_cast<int64_t>(waiting) * a.nheads * a.headdim + p] = x[p];
    }
    if (is_full && has)
      store<kMine>(state + p * a.d_state, Vec<float, 4>{decay * S[i][0] + added[i][0], decay * S[i][1] + added[i][1],
                                                        decay * S[i][2] + added[i][2], decay * S[i][3] + added[i][3]});
  }
  // The new token's place is read in the next step only; one block writes what several share.
  if (is_full || blockIdx.x || threadIdx.x >= lanes) return;
  if (lane == 0) dts[static_cast<int64_t>(waiting) * a.nheads] = dt;
  if (has && head % per_group == 0)
    for (int k = 0; k < kMine; ++k) Bs[static_cast<int64_t>(waiting) * a.ngroups * a.d_state + k] = B[k];
}

}  // namespace deferred

template <class T>
void deferred_update(const Deferred<T>& d, cudaStream_t stream);

}  // namespace vision_scan

// The gradients of the selective scan.
//
// Tiles are taken from the last to the first; blocks, runs and the composition over threads are those of selective.h.
// In a tile the states are computed again from the state that entered it (`entries`, written by a forward pass without
// outputs), then the recurrence of the gradients runs backwards: with m_t = decay_t g_t the gradient of h_{t-1},
//     g_t = C_t dy_t + m_{t+1},
// which is affine in m as the forward one is in h. Where all lists read one u, its gradient is added up like the
// merged output of the forward pass. Those of B and C are sums over the channels: over the block's 16 by exchanges
// between lanes, over blocks by atomic additions or, if the caller wants the same bits on every run, in parts.
#pragma once

#include "selective.h"

namespace vision_scan {

template <class T>
struct SelectiveGradients {
  const T* dy;                // like y
  const float* dfinal_state;  // (rows, channels, d_state) or null
  T *du, *ddt;                // like u and dt
  float *dB, *dC;             // (batch, lists, cells, ngroups, d_state), zero where blocks add into them
  int64_t part;               // 0: blocks of a group add; else how far the sums of one block lie behind those of another
  float* dA;                  // (rows, channels, d_state)
  float *dD, *ddt_bias;       // (rows, channels)
  float* dinitial_state;      // (rows, channels, d_state) or null
};

namespace selective {

struct SharedBackward : Shared {
  float* dA;  // [d_state][kWarps][kChannels]

  __device__ __forceinline__ SharedBackward(unsigned char* from, int d_state) : Shared(from, d_state) {
    dA = merged;
    merged = dA + d_state * kWarps * kChannels;
  }
  __host__ static size_t bytes(int d_state, int cells) {
    return Shared::bytes(d_state, cells) + sizeof(float) * d_state * kWarps * kChannels;
  }
};

// Sums over the lanes that share a token's channels: lane l gets the sum of token l of the run.
__device__ __forceinline__ float sum_over_channels(float (&of_token)[kRun], int lane) {
  static_assert(kRun == kLanes, "each lane takes one token of the run");
#pragma unroll
  for (int half = kLanes / 2; half; half /= 2)
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const bool upper = lane & half;
      const float kept = upper ? of_token[j + half] : of_token[j], given = upper ? of_token[j] : of_token[j + half];
      of_token[j] = kept + __shfl_xor_sync(kAllLanes, given, half);
    }
  return of_token[0];
}

// Sum over the runs of a warp, for every lane.
__device__ __forceinline__ float sum_over_parts(float x) {
#pragma unroll
  for (int mask = kLanes; mask < 32; mask *= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

// Gives the gradients of B and C away that lie in shared memory in their place.
template <class T>
__device__ __forceinline__ void write_states(const Selective<T>& a, const SelectiveGradients<T>& g, const Row& row,
                                             int group, int block, int tile, int state, const Shared& shared) {
  for (int i = threadIdx.x; i < kTile * kStates; i += kThreads) {
    const int t = tile + i / kStates, n = state + i % kStates;
    const int cell = t < row.length && !(row.mark(t) & kPadding) ? row.cell(t) : -1;
    if (cell < 0 || n >= a.d_state) continue;
    const int64_t at = ((row.base + cell) * a.ngroups + group) * a.d_state + n;
    if (g.part) {
      g.dB[block * g.part + at] = shared.B[i];
      g.dC[block * g.part + at] = shared.C[i];
    } else {
      atomicAdd(g.dB + at, shared.B[i]);
      atomicAdd(g.dC + at, shared.C[i]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward(Selective<T> a, SelectiveGradients<T> g) {
  const int blocks = Block::how_many(a.channels, a.ngroups);
  const Block block(blockIdx.x % blocks, a.channels, a.ngroups);
  const int of_group = blockIdx.x % blocks % (blocks / a.ngroups);
  const int unit = blockIdx.x / blocks;  // a row, or, where lists share u, all the rows of an image
  const Place p(block);
  const SharedBackward shared(shared_memory(), a.d_state);
  const bool even = a.channels % 2 == 0 && block.first % 2 == 0;
  const bool merge = a.shared_input;
  const int cells = a.tokens.cells;
  const int first_row = merge ? unit * a.tokens.lists : unit;
  const int rows = merge ? a.tokens.lists : 1;
  const int most_tiles = (a.tokens.seqlen + kTile - 1) / kTile;

  float* merged = a.scratch ? a.scratch + static_cast<int64_t>(unit) * cells * a.channels + block.first : shared.merged;
  const int merged_stride = a.scratch ? a.channels : kChannels;
  if (merge)
    for (int i = threadIdx.x; i < cells * kChannels; i += kThreads)
      if (i % kChannels < block.count) merged[static_cast<int64_t>(i / kChannels) * merged_stride + i % kChannels] = 0.0f;

  for (int r = first_row; r < first_row + rows; ++r) {
    const Row row = a.tokens.row(r);
    const int64_t of_row = (static_cast<int64_t>(r) * a.channels + block.first) * a.d_state;
    __syncthreads();  // the row before is done with shared memory
    for (int i = threadIdx.x; i < a.d_state * kChannels; i += kThreads) {
      const int n = i / kChannels, c = i % kChannels;
      shared.carry[i] = g.dfinal_state && c < block.count ? g.dfinal_state[of_row + c * a.d_state + n] : 0.0f;
    }
    for (int i = threadIdx.x; i < a.d_state * kWarps * kChannels; i += kThreads) shared.dA[i] = 0.0f;
    float skip[2] = {0, 0}, dskip[2] = {0, 0}, dbias[2] = {0, 0};
    if (a.D) read_pair(a.D + row.list * a.channels + p.channel, p, even, skip);
    const float* bias = a.dt_bias ? a.dt_bias + row.list * a.channels + p.channel : nullptr;
    const int64_t dy_base = a.merged_output ? static_cast<int64_t>(row.batch) * cells : row.base;
    const int tiles = (row.length + kTile - 1) / kTile;

    for (int tile = tiles - 1; tile >= 0; --tile) {
      Run run;
      read_run(a, row, p, tile * kTile, even, run);
      float dy[kRun][2], du[kRun][2], ddelta[kRun][2];
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        dy[j][0] = dy[j][1] = 0.0f;
        if (run.cell[j] >= 0) read_pair(g.dy + (dy_base + run.cell[j]) * a.channels + p.channel, p, even, dy[j]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          dy[j][i] *= a.output_scale;
          du[j][i] = skip[i] * dy[j][i];
          dskip[i] += run.u[j][i] * dy[j][i];
          ddelta[j][i] = 0.0f;
        }
      }
      const int parity = (tiles - 1 - tile) & 1;
      const float* from_later = shared.carry + parity * a.d_state * kChannels;
      float* to_earlier = shared.carry + (1 - parity) * a.d_state * kChannels;

      for (int n = 0; n < a.d_state; ++n) {
        if (n % kStates == 0) {
          __syncthreads();  // the carry is written; the gradients of the states before lie in shared memory
          if (n) write_states(a, g, row, block.group, of_group, tile * kTile, n - kStates, shared);
          read_states(a, row, block.group, tile * kTile, n, shared.B, shared.C);
          __syncthreads();
        }
        const float* rates = a.A + (static_cast<int64_t>(row.list) * a.channels + p.channel) * a.d_state + n;
        const float A[2] = {p.has[0] ? rates[0] : 0.0f, p.has[1] ? rates[a.d_state] : 0.0f};
        float* B_at = shared.B + p.run * kStates + n % kStates;
        float* C_at = shared.C + p.run * kStates + n % kStates;

        float decay[kRun][2], h[kRun][2];
        Effect forward = Effect::none();
#pragma unroll
        for (int j = 0; j < kRun; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            decay[j][i] = run.reset[j] ? 0.0f : exp2_fast(run.delta[j][i] * (A[i] * kLog2e));
            forward.state[i] = forward.state[i] * decay[j][i] + run.delta[j][i] * run.u[j][i] * B_at[j * kStates];
            h[j][i] = forward.state[i];
            forward.decay[i] *= decay[j][i];
          }
        const float* entry = a.entries + ((static_cast<int64_t>(r) * most_tiles + tile) * a.d_state + n) * a.channels + p.channel;
        const float enters[2] = {p.has[0] ? entry[0] : 0.0f, p.has[1] ? entry[1] : 0.0f};
        float before[2], unused[2];
        compose<false>(forward, shared.totals, p, enters, before, unused);

        Effect later{{forward.decay[0], forward.decay[1]}, {0, 0}};
#pragma unroll
        for (int j = kRun - 1; j >= 0; --j)
#pragma unroll
          for (int i = 0; i < 2; ++i) later.state[i] = decay[j][i] * (C_at[j * kStates] * dy[j][i] + later.state[i]);
        const float comes[2] = {from_later[n * kChannels + 2 * p.lane], from_later[n * kChannels + 2 * p.lane + 1]};
        float m[2], leaves[2];
        compose<true>(later, shared.totals + kWarps * kLanes * 4, p, comes, m, leaves);
        if (p.warp == 0 && p.part == 0)
          for (int i = 0; i < 2; ++i) to_earlier[n * kChannels + 2 * p.lane + i] = leaves[i];

        float left[2] = {before[0], before[1]};  // of the state before the run
#pragma unroll
        for (int j = 0; j < kRun; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            left[i] *= decay[j][i];
            h[j][i] += left[i];
          }
        float dB[kRun], dC[kRun], dA[2] = {0, 0};
#pragma unroll
        for (int j = kRun - 1; j >= 0; --j) {
          const float B = B_at[j * kStates], C = C_at[j * kStates];
          dB[j] = dC[j] = 0.0f;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float of_h = C * dy[j][i] + m[i], inflow = of_h * B;
            dB[j] += of_h * run.delta[j][i] * run.u[j][i];
            dC[j] += dy[j][i] * h[j][i];
            du[j][i] += inflow * run.delta[j][i];
            m[i] = decay[j][i] * of_h;
            const float rate = m[i] * (j ? h[j - 1][i] : before[i]);
            ddelta[j][i] += inflow * run.u[j][i] + rate * A[i];
            dA[i] += rate * run.delta[j][i];
          }
        }
        // The lanes that read B and C of these tokens are those of the sums: they are done with them.
        const float dB_token = sum_over_channels(dB, p.lane), dC_token = sum_over_channels(dC, p.lane);
        B_at[p.lane * kStates] = dB_token;
        C_at[p.lane * kStates] = dC_token;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float sum = sum_over_parts(dA[i]);
          if (p.part == 0) shared.dA[(n * kWarps + p.warp) * kChannels + 2 * p.lane + i] += sum;
        }
      }
      __syncthreads();
      write_states(a, g, row, block.group, of_group, tile * kTile, (a.d_state - 1) / kStates * kStates, shared);

#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (run.cell[j] < 0) continue;
        const int64_t at = (row.base + run.cell[j]) * a.channels + p.channel;
        if (a.dt_softplus) {
          float raw[2];
          read_pair(a.dt + at, p, even, raw);
#pragma unroll
          for (int i = 0; i < 2; ++i) ddelta[j][i] *= sigmoid(raw[i] + (bias && p.has[i] ? bias[i] : 0.0f));
        }
        write_pair(g.ddt + at, p, even, ddelta[j]);
#pragma unroll
        for (int i = 0; i < 2; ++i) dbias[i] += ddelta[j][i];
        if (!merge) {
          write_pair(g.du + at, p, even, du[j]);
          continue;
        }
        float* sums = merged + static_cast<int64_t>(run.cell[j]) * merged_stride + 2 * p.lane;
        for (int i = 0; i < 2; ++i)
          if (p.has[i]) sums[i] += du[j][i];
      }
    }

    __syncthreads();
    for (int i = threadIdx.x; i < a.d_state * kChannels; i += kThreads) {
      const int n = i / kChannels, c = i % kChannels;
      if (c >= block.count) continue;
      float sum = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) sum += shared.dA[(n * kWarps + warp) * kChannels + c];
      g.dA[of_row + c * a.d_state + n] = sum;
      if (g.dinitial_state) g.dinitial_state[of_row + c * a.d_state + n] = shared.carry[(tiles & 1) * a.d_state * kChannels + i];
    }
    // Sums over the threads of a channel, through shared memory that is free by now.
    float* sums = shared.totals;  // [kWarps][kLanes][4]
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      dskip[i] = sum_over_parts(dskip[i]);
      dbias[i] = sum_over_parts(dbias[i]);
    }
    if (p.part == 0)
      store<4>(sums + (p.warp * kLanes + p.lane) * 4, Vec<float, 4>{dskip[0], dskip[1], dbias[0], dbias[1]});
    __syncthreads();
    if (threadIdx.x < block.count) {
      const int c = threadIdx.x;
      float skip_sum = 0.0f, bias_sum = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) {
        skip_sum += sums[(warp * kLanes + c / 2) * 4 + c % 2];
        bias_sum += sums[(warp * kLanes + c / 2) * 4 + 2 + c % 2];
      }
      g.dD[static_cast<int64_t>(r) * a.channels + block.first + c] = skip_sum;
      g.ddt_bias[static_cast<int64_t>(r) * a.channels + block.first + c] = bias_sum;
    }
  }
  if (!merge) return;
  __syncthreads();
  T* du = g.du + static_cast<int64_t>(unit) * cells * a.channels + block.first;
  for (int i = threadIdx.x; i < cells * kLanes; i += kThreads) {
    const int cell = i / kLanes;
    const float* at = merged + static_cast<int64_t>(cell) * merged_stride + 2 * p.lane;
    const float sums[2] = {p.has[0] ? at[0] : 0.0f, p.has[1] ? at[1] : 0.0f};
    write_pair(du + static_cast<int64_t>(cell) * a.channels + 2 * p.lane, p, even, sums);
  }
}

}  // namespace selective

template <class T>
void selective_backward(const Selective<T>& a, const SelectiveGradients<T>& g, cudaStream_t stream);

}  // namespace vision_scan

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
  const T* dy;                // like y, or null where it is float32 and stands in `dy32`
  const float* dy32;
  const float* dfinal_state;  // (rows, channels, d_state) or null
  T *du, *ddt;                // like u and dt
  float *dB, *dC;             // (batch, lists, cells, ngroups, d_state), zero where blocks add into them
  bool apart;                 // the blocks of a group leave sums of their own, `part` numbers one behind the other;
  int64_t part;               // else they add, and it is 0
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

// Sums over the channels, of each token of a run, into the row of shared memory that B or C came from: nobody but the
// lanes that give the sums has read it, and they are done with it.
__device__ __forceinline__ void replace_by_sums(float (&of_token)[kRun], int lane, float* row) {
  const float sum = sum_over_channels(of_token, lane);
  __syncwarp();
  row[lane] = sum;
}

// Gives away the gradients of B or C that lie in shared memory in the place of up to kStates states from `n` on.
template <class T>
__device__ __forceinline__ void write_states(const Selective<T>& a, const float* from, const unsigned* cells, int n,
                                             bool add, float* to) {
  const int states = a.d_state - n;
  for (int i = threadIdx.x; i < kTile; i += kThreads) {
    if (cells[i] & kPaddingBit) continue;
    float* at = to + static_cast<int64_t>(cells[i] & ~kMarkBits) * (a.ngroups * a.d_state) + n;
    Vec<float, kStates> x;
#pragma unroll
    for (int k = 0; k < kStates; ++k) x.at[k] = from[k * kRow + i];
    if (a.d_state % kStates == 0) {
      if (add)
        atomic_add(at, x);
      else
        store<kStates>(at, x);
      continue;
    }
#pragma unroll
    for (int k = 0; k < kStates; ++k)
      if (k < states) {
        if (add)
          atomicAdd(at + k, x.at[k]);
        else
          at[k] = x.at[k];
      }
  }
}

// `output`: of the gradient of u.
template <class T, bool whole, Output output>
__global__ void __launch_bounds__(kThreads) backward(Selective<T> a, SelectiveGradients<T> g) {
  const int blocks = Block::how_many(a.channels, a.ngroups);
  const Block block(blockIdx.x % blocks, a.channels, a.ngroups);
  const int unit = blockIdx.x / blocks;  // a row, or, where lists share u, all the rows of an image
  const Place<whole> p(block);
  const SharedBackward shared(shared_memory(), a.d_state);
  constexpr bool merge = output != kApart;
  const Sums<output> sums(a, unit, block, shared.merged);
  if (merge) sums.clear(a.tokens.cells, block.count);
  const int rows = merge ? a.tokens.lists : 1;
  const int most_tiles = (a.tokens.seqlen + kTile - 1) / kTile;

  for (int r = unit * rows; r < (unit + 1) * rows; ++r) {
    const Row row = a.tokens.row(r);
    const int64_t first_state = (static_cast<int64_t>(r) * a.channels + block.first) * a.d_state;
    const int tiles = (row.length + kTile - 1) / kTile;
    __syncthreads();  // the row before is done with shared memory
    if (tiles) find_cells(row, tiles - 1, shared.cells);
    for (int i = threadIdx.x; i < a.d_state * kChannels; i += kThreads) {
      const int n = i / kChannels, c = i % kChannels;
      shared.carry[i] = g.dfinal_state && c < block.count ? g.dfinal_state[first_state + c * a.d_state + n] : 0.0f;
    }
    for (int i = threadIdx.x; i < a.d_state * kWarps * kChannels; i += kThreads) shared.dA[i] = 0.0f;
    __syncthreads();
    float skip[2] = {0, 0}, bias[2] = {0, 0}, dskip[2] = {0, 0}, dbias[2] = {0, 0};
    if (a.D) p.read(a.D + row.list * a.channels + p.channel, skip);
    if (a.dt_bias) p.read(a.dt_bias + row.list * a.channels + p.channel, bias);
    const float* rates = a.A + (static_cast<int64_t>(row.list) * a.channels + p.channel) * a.d_state;
    const int64_t states = (row.base * a.ngroups + block.group) * a.d_state;
    const int64_t part = block.of_group * g.part;
    const int64_t dy_row =
        (a.merged_output ? static_cast<int64_t>(row.batch) * a.tokens.cells : row.base) * a.channels + p.channel;
    const int64_t of_row = row.base * a.channels + p.channel;

    for (int step = 0; step < tiles; ++step) {
      const int tile = tiles - 1 - step;
      const unsigned* cells = shared.cells + (step & 1) * kTile;
      Run run;
      read_run(a, row, p, cells, run);
      float dy[kRun][2], of_inflow[kRun][2], of_rate[kRun][2];
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        const int64_t at = dy_row + run.cell[j] * a.channels;
        if (g.dy)
          p.read(g.dy + at, dy[j]);
        else
          p.read(g.dy32 + at, dy[j]);
      }
#pragma unroll
      for (int j = 0; j < kRun; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          dy[j][i] = run.padding >> j & 1 ? 0.0f : dy[j][i] * a.output_scale;
          dskip[i] += run.u[j][i] * dy[j][i];
          of_inflow[j][i] = of_rate[j][i] = 0.0f;
        }
      const float* from_later = shared.carry + (step & 1) * a.d_state * kChannels;
      float* to_earlier = shared.carry + (~step & 1) * a.d_state * kChannels;

      for (int n = 0; n < a.d_state; ++n) {
        const int at = n % kStates;
        if (at == 0) {
          __syncthreads();  // the carry is written; the gradients of the states before lie in shared memory
          if (n) {
            write_states(a, shared.B, cells, n - kStates, !g.apart, g.dB + part + states);
            write_states(a, shared.C, cells, n - kStates, !g.apart, g.dC + part + states);
          } else if (tile) {
            find_cells(row, tile - 1, shared.cells + (~step & 1) * kTile);
          }
          read_states(a, a.B + states, cells, n, shared.B);
          read_states(a, a.C + states, cells, n, shared.C);
          __syncthreads();
        }
        const float A[2] = {p.has_first ? rates[n] : 0.0f, p.has_second ? rates[a.d_state + n] : 0.0f};
        float B[kRun], C[kRun];
        read_tokens(shared.B + at * kRow + p.run, B);
        read_tokens(shared.C + at * kRow + p.run, C);

        float decay[kRun][2], h[kRun][2];
        Effect earlier{{0, 0}, {0, 0}}, later{{0, 0}, {0, 0}};
#pragma unroll
        for (int j = 0; j < kRun; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            decay[j][i] = exp2_fast(run.delta[j][i] * (A[i] * kLog2e) + run.cut[j]);
            h[j][i] = run.delta[j][i] * run.u[j][i] * B[j];
            earlier.state[i] = earlier.state[i] * decay[j][i] + h[j][i];
          }
#pragma unroll
        for (int j = kRun - 1; j >= 0; --j)
#pragma unroll
          for (int i = 0; i < 2; ++i) later.state[i] = decay[j][i] * (C[j] * dy[j][i] + later.state[i]);
#pragma unroll
        for (int i = 0; i < 2; ++i)
          earlier.decay[i] = later.decay[i] = exp2_fast(run.sum[i] * (A[i] * kLog2e) + run.cuts);

        float enters[2], before[2];
        p.read(a.entries + ((static_cast<int64_t>(r) * most_tiles + tile) * a.d_state + n) * a.channels + p.channel, enters);
        compose<false>(earlier, shared.totals, p, enters, before);
        float comes[2] = {from_later[n * kChannels + 2 * p.lane], from_later[n * kChannels + 2 * p.lane + 1]}, m[2];
        if (compose<true>(later, shared.totals + kWarps * kLanes * 4, p, comes, m)) {
          to_earlier[n * kChannels + 2 * p.lane] = comes[0];
          to_earlier[n * kChannels + 2 * p.lane + 1] = comes[1];
        }

#pragma unroll
        for (int j = 0; j < kRun; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) h[j][i] += decay[j][i] * (j ? h[j - 1][i] : before[i]);
        float dB[kRun], dC[kRun], dA[2] = {0, 0};
#pragma unroll
        for (int j = kRun - 1; j >= 0; --j) {
          dB[j] = dC[j] = 0.0f;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float of_h = C[j] * dy[j][i] + m[i];
            dB[j] += of_h * (run.delta[j][i] * run.u[j][i]);
            dC[j] += dy[j][i] * h[j][i];
            of_inflow[j][i] += of_h * B[j];
            m[i] = decay[j][i] * of_h;
            const float of_exponent = m[i] * (j ? h[j - 1][i] : before[i]);
            of_rate[j][i] += of_exponent * A[i];
            dA[i] += of_exponent * run.delta[j][i];
          }
        }
        replace_by_sums(dB, p.lane, shared.B + at * kRow + p.run);
        replace_by_sums(dC, p.lane, shared.C + at * kRow + p.run);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float sum = sum_over_parts(dA[i]);
          if (p.part == 0) shared.dA[(n * kWarps + p.warp) * kChannels + 2 * p.lane + i] += sum;
        }
      }
      __syncthreads();
      const int last = (a.d_state - 1) / kStates * kStates;
      write_states(a, shared.B, cells, last, !g.apart, g.dB + part + states);
      write_states(a, shared.C, cells, last, !g.apart, g.dC + part + states);

#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (run.padding >> j & 1) continue;
        const int64_t cell = of_row + run.cell[j] * a.channels;
        float du[2], ddt[2], raw[2];
        p.read(a.dt + cell, raw);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          du[i] = skip[i] * dy[j][i] + run.delta[j][i] * of_inflow[j][i];
          ddt[i] = of_rate[j][i] + run.u[j][i] * of_inflow[j][i];
          if (a.dt_softplus) ddt[i] *= sigmoid(raw[i] + bias[i]);
          dbias[i] += ddt[i];
        }
        p.write(g.ddt + cell, ddt);
        if (merge)
          sums.add(run.cell[j], p, du);
        else
          p.write(g.du + cell, du);
      }
    }

    __syncthreads();
    const float* first = shared.carry + (tiles & 1) * a.d_state * kChannels;
    for (int i = threadIdx.x; i < a.d_state * kChannels; i += kThreads) {
      const int n = i / kChannels, c = i % kChannels;
      if (c >= block.count) continue;
      float sum = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) sum += shared.dA[(n * kWarps + warp) * kChannels + c];
      g.dA[first_state + c * a.d_state + n] = sum;
      if (g.dinitial_state) g.dinitial_state[first_state + c * a.d_state + n] = first[i];
    }
    // Sums over the threads of a channel, in shared memory that is free by now.
    float* of_channels = shared.totals;  // [kWarps][kLanes][4]
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      dskip[i] = sum_over_parts(dskip[i]);
      dbias[i] = sum_over_parts(dbias[i]);
    }
    if (p.part == 0)
      store<4>(of_channels + (p.warp * kLanes + p.lane) * 4, Vec<float, 4>{dskip[0], dskip[1], dbias[0], dbias[1]});
    __syncthreads();
    if (threadIdx.x < block.count) {
      const int c = threadIdx.x;
      float skip_sum = 0.0f, bias_sum = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) {
        skip_sum += of_channels[(warp * kLanes + c / 2) * 4 + c % 2];
        bias_sum += of_channels[(warp * kLanes + c / 2) * 4 + 2 + c % 2];
      }
      g.dD[static_cast<int64_t>(r) * a.channels + block.first + c] = skip_sum;
      g.ddt_bias[static_cast<int64_t>(r) * a.channels + block.first + c] = bias_sum;
    }
  }
  if (!merge) return;
  __syncthreads();
  const int64_t image = static_cast<int64_t>(unit) * a.tokens.cells;
  sums.write(a.tokens.cells, p, 1.0f, g.du + image * a.channels + block.first, a.channels);
}

}  // namespace selective

template <class T>
void selective_backward(const Selective<T>& a, const SelectiveGradients<T>& g, cudaStream_t stream);

}  // namespace vision_scan

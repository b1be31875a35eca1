// The gradients of Mamba-2's scan.
//
// Two passes of ssd.h write the state S that enters each chunk and the gradient dS of the state that leaves it, in
// float32. Then all chunks are worked on at once: a block of threads takes a chunk and some heads of a group, one after
// another. With G = C B^T, W = G exp(cum_i - cum_j) below the diagonal and M = W dt_j,
//   dM = dY X^T,  dX = M^T dY + leave B dS^T + D dY,  dG = sum over heads of dM M / G,
//   dC = dG B + sum of e dY S,  dB = dG^T C + sum of leave X dS.
// The gradient of dt comes from what each token gives and takes: rows and columns of dM M, C and B with their shares of
// dC and dB. There S and dS count as exactly as float32, so that A, dt_bias and the states get their gradients in
// float32 whatever the dtype of x. What blocks of heads have in common is written apart and added up afterwards: no
// atomics.
//
// Source: Dao & Gu 2024, "Transformers are SSMs" (arXiv:2405.21060), appendix C.
#pragma once

#include "ssd.h"

namespace vision_scan {

template <class T>
struct SsdGradients {
  const T* dy;  // (batch, lists, cells, nheads, headdim)
  bool copy_dy, copy_states;
  const float *states, *dstates;  // (rows, nheads, chunks, headdim, d_state)
  T* dx;                 // (batch, lists, cells, nheads, headdim); padding is not written, here and below
  float* ddt;            // (batch, lists, cells, nheads)
  int head_blocks;       // of a group
  float *dB, *dC;        // (head_blocks, batch, lists, cells, ngroups, d_state)
  float *dA, *ddt_bias;  // (rows, chunks, nheads)
  float* dD;             // (rows, chunks, nheads, headdim) or null
};

namespace ssd {

constexpr int kBackwardThreads = 256;
constexpr int kBackwardWarps = kBackwardThreads / 32;

// Sums over pieces of a chunk, each written by one warp and added up by the one that needs them.
struct Sums {
  // Of dM M below the diagonal, by halves of rows and quarters of columns. What a pair of tokens gives to one sum it
  // takes from another: they are double, so that it cancels.
  double given[2][kChunk], taken[4][kChunk];
  float direct[4][kChunk];   // of dM W with the diagonal, by quarters of columns
  float read[2][kChunk];     // C with its share of dC that comes from the state
  float left[2][kChunk];     // B with that of dB, without leave
  float kept[kBackwardWarps];  // S with dS
  float skip[kBackwardThreads];
};

template <class T, int P, int N>
struct BackwardShared {
  Tile<T, P> X, dY;
  Tile<T, N> B, C;
  Tile<float, N> S, dS;  // P rows
  Tile<T, kChunk> M;     // where S was; dG at the end
  Times* times;
  Sums* sums;

  __device__ __forceinline__ BackwardShared(unsigned char* from) {
    S = {reinterpret_cast<float*>(from)};
    dS = {S.at + kStates};
    X = {reinterpret_cast<T*>(dS.at + kStates)};
    dY = {X.at + Tile<T, P>::size(kChunk)};
    B = {dY.at + Tile<T, P>::size(kChunk)};
    C = {B.at + Tile<T, N>::size(kChunk)};
    M = {reinterpret_cast<T*>(S.at)};
    times = reinterpret_cast<Times*>(C.at + Tile<T, N>::size(kChunk));
    sums = reinterpret_cast<Sums*>(times + 1);
  }
  // M may need more than S.
  static constexpr int kMBytes = Tile<T, kChunk>::size(kChunk) * sizeof(T);
  static constexpr int kSBytes = Tile<float, N>::size(P) * sizeof(float);
  static constexpr int kStates = (kMBytes > kSBytes ? kMBytes : kSBytes) / sizeof(float);
  static constexpr size_t kBytes = 2 * kStates * sizeof(float) + sizeof(T) * 2 *
      (Tile<T, P>::size(kChunk) + Tile<T, N>::size(kChunk)) + sizeof(Times) + sizeof(Sums);
};

// A state from memory, from channel `first` on; zeros where there is none.
template <int P, int N>
__device__ __forceinline__ void copy_state(const Tile<float, N>& tile, const float* from, int first, int headdim,
                                           int d_state, bool at_once) {
  for (int i = threadIdx.x; i < P * N / 4; i += kBackwardThreads) {
    const int p = i / (N / 4), n = i % (N / 4) * 4;
    const bool real = first + p < headdim && n < d_state;
    const float* at = from + (real ? static_cast<int64_t>(first + p) * d_state + n : 0);
    if (at_once) {
      copy_async(tile.place(p, n), at, real);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) *tile.place(p, n + j) = real && n + j < d_state ? at[j] : 0.0f;
    }
  }
}

// Sums over the lanes that share a row of results, or a column.
template <class Number>
__device__ __forceinline__ Number sum_over_row(Number x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
template <class Number>
__device__ __forceinline__ Number sum_over_column(Number x) {
  x += __shfl_xor_sync(kAllLanes, x, 4);
  x += __shfl_xor_sync(kAllLanes, x, 8);
  return x + __shfl_xor_sync(kAllLanes, x, 16);
}
__device__ __forceinline__ double sum_over_warp(double x) {
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

// From the sums to the gradients of dt, A and dt_bias, by one warp, two tokens a lane.
template <class T>
__device__ __forceinline__ void finish_head(const Ssd<T>& a, const SsdGradients<T>& g, const Row& row, const Head& head,
                                            int chunk, int64_t partial, const Times& times, const Sums& sums) {
  const int lane = lane_id();
  const float A = a.A[head.parameter], bias = a.dt_bias ? a.dt_bias[head.parameter] : 0.0f;
  double total[2], to_end = 0, direct[2];
  int start[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int j = 2 * lane + i;
    double taken = 0, weighed = 0;
    for (int part = 0; part < 4; ++part) {
      taken += sums.taken[part][j];
      weighed += sums.direct[part][j];
    }
    const double left = double{sums.left[0][j]} + sums.left[1][j];
    const double read = double{sums.read[0][j]} + sums.read[1][j];
    total[i] = sums.given[0][j] + sums.given[1][j] - taken + read - left * times.leave[j];
    to_end += left * times.leave[j];
    direct[i] = weighed + left * times.after[j];
    start[i] = times.start[j];
  }
  to_end = sum_over_warp(to_end);
  if (lane == 31) {
    double kept = 0;
    for (int i = 0; i < kBackwardWarps; ++i) kept += sums.kept[i];
    total[1] += to_end + times.through * kept;
  }
  // A token's decay counts in the sums of all tokens behind it, up to the next reset.
  double after = total[0] + (start[1] == start[0] ? total[1] : 0);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const double behind = __shfl_down_sync(kAllLanes, after, distance);
    const int their_start = __shfl_down_sync(kAllLanes, start[0], distance);
    if (lane + distance < 32 && their_start == start[0]) after += behind;
  }
  const double behind = __shfl_down_sync(kAllLanes, after, 1);
  const int their_start = __shfl_down_sync(kAllLanes, start[0], 1);
  const double both[2] = {after, total[1] + (lane < 31 && their_start == start[1] ? behind : 0)};
  double dA = 0, dbias = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int j = 2 * lane + i, cell = times.cell[j];
    if (cell < 0) continue;
    dA += both[i] * times.pair[j].at[1];
    double draw = both[i] * A + direct[i];
    const int64_t at = (head.base + cell) * a.dt_stride + head.head;
    const float raw = (a.dt ? to_float(a.dt[at]) : a.dt32[at]) + bias, step = a.dt_softplus ? softplus(raw) : raw;
    if (step < a.dt_min || step > a.dt_max) draw = 0;
    if (a.dt_softplus) draw *= sigmoid(raw);
    g.ddt[(head.base + cell) * a.nheads + head.head] = static_cast<float>(draw);
    dbias += draw;
  }
  dA = sum_over_warp(dA);
  dbias = sum_over_warp(dbias);
  if (lane == 0) {
    g.dA[partial + head.head] = static_cast<float>(dA);
    g.ddt_bias[partial + head.head] = static_cast<float>(dbias);
  }
}

// A warp takes 16 tokens and half of what stands across them.
template <class T, int P, int N>
__global__ void __launch_bounds__(kBackwardThreads, 1) backward(Ssd<T> a, SsdGradients<T> g) {
  constexpr int kHalf = kChunk / 2, kColumns = N / 2, kChannels = P / 2;
  constexpr int kParts = kBackwardThreads / P, kPartTokens = kChunk / kParts;
  const int most = a.chunks(), of_group = a.nheads / a.ngroups;
  const int block = blockIdx.x % g.head_blocks, group = blockIdx.x / g.head_blocks % a.ngroups;
  const int chunk = blockIdx.x / g.head_blocks / a.ngroups % most, r = blockIdx.x / g.head_blocks / a.ngroups / most;
  const Row row = a.tokens.row(r);
  if (chunk * kChunk >= row.length) return;
  const int share = (of_group + g.head_blocks - 1) / g.head_blocks;
  const int first_head = group * of_group + block * share;
  const int end_head = first_head + share < (group + 1) * of_group ? first_head + share : (group + 1) * of_group;
  const BackwardShared<T, P, N> shared(shared_memory());
  Times& times = *shared.times;
  Sums& sums = *shared.sums;
  const int tokens = warp_id() % 4 * 16, half = warp_id() / 4;
  const int lane_row = lane_id() / 4, lane_column = lane_id() % 4 * 2;
  const int64_t size = static_cast<int64_t>(a.headdim) * a.d_state;
  const int64_t partial = (static_cast<int64_t>(r) * most + chunk) * a.nheads;

  float G[kHalf / 8][4] = {}, dG[kHalf / 8][4] = {}, dB[kColumns / 8][4] = {}, dC[kColumns / 8][4] = {};
  for (int h = first_head; h < end_head; ++h) {
    const Head head(a, row, h);
    __syncthreads();
    if (warp_id() == 0)
      write_times(a, read_times(a, row, head, chunk), a.dt_bias ? a.dt_bias[head.parameter] : 0.0f,
                  a.A[head.parameter] * 1.4426950408889634, times);
    __syncthreads();
    if (h == first_head) {
      copy_rows(shared.B, times.cell, 0, kChunk, a.B + head.base * a.B_stride + static_cast<int64_t>(group) * a.d_state,
                a.B_stride, a.d_state, a.copy_B, threadIdx.x, kBackwardThreads);
      copy_rows(shared.C, times.cell, 0, kChunk, a.C + head.base * a.C_stride + static_cast<int64_t>(group) * a.d_state,
                a.C_stride, a.d_state, a.copy_C, threadIdx.x, kBackwardThreads);
    }
    for (int first = 0; first < a.headdim; first += P) {
      const int64_t channel = static_cast<int64_t>(h) * a.headdim + first, stride = static_cast<int64_t>(a.nheads) * a.headdim;
      const int channels = a.headdim - first < P ? a.headdim - first : P;
      const int64_t state = ((static_cast<int64_t>(r) * a.nheads + h) * most + chunk) * size;
      if (first) __syncthreads();
      copy_rows(shared.X, times.cell, 0, kChunk, a.x + head.input * a.x_stride + channel, a.x_stride, channels, a.copy_x,
                threadIdx.x, kBackwardThreads);
      copy_rows(shared.dY, times.cell, 0, kChunk, g.dy + head.base * stride + channel, stride, channels, g.copy_dy,
                threadIdx.x, kBackwardThreads);
      copy_state<P>(shared.S, g.states + state, first, a.headdim, a.d_state, g.copy_states);
      copy_state<P>(shared.dS, g.dstates + state, first, a.headdim, a.d_state, g.copy_states);
      close_copies();
      wait_for_copies<0>();
      __syncthreads();
      // A head's sums grow over its blocks of channels, each by the thread that began it.
      const auto add = [&](auto& sum, auto value) { sum = first ? sum + value : value; };

      if (h == first_head && first == 0) {
#pragma unroll
        for (int k = 0; k < N; k += 16) {
          const Left<T> c = load_left<false>(shared.C, tokens, k);
#pragma unroll
          for (int j = 0; j < kHalf / 8; j += 2)
            if (half * kHalf + 8 * j <= tokens)
              multiply(G[j], G[j + 1], c, load_right<true>(shared.B, k, half * kHalf + 8 * j));
        }
      }

      // What the states give to dC and dB, and with C and B to dt.
      const auto from_state = [&](const Tile<T, P>& factor, const Tile<float, N>& state, const Tile<T, N>& other,
                                  const float* weights, float (&sum)[kColumns / 8][4], bool weigh, float* products) {
        Left<T> left[P / 16];
#pragma unroll
        for (int p = 0; p < P / 16; ++p) left[p] = load_left<false>(factor, tokens, 16 * p);
        const float weight[2] = {weights[tokens + lane_row], weights[tokens + lane_row + 8]};
        float product[2] = {};
#pragma unroll
        for (int n = 0; n < kColumns / 8; n += 2) {
          float now[2][4] = {};
#pragma unroll
          for (int p = 0; p < P / 16; ++p)
            multiply(now[0], now[1], left[p],
                     split_right<false, T, kStatePlanes<T>>(state, 16 * p, half * kColumns + 8 * n));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int k = i / 2, side = i % 2 * 2;
            float low, high;
            other.read_pair(tokens + lane_row + 8 * (side / 2), half * kColumns + 8 * (n + k) + lane_column, low, high);
            product[side / 2] += now[k][side] * low + now[k][side + 1] * high;
            sum[n + k][side] += now[k][side] * weight[side / 2];
            sum[n + k][side + 1] += now[k][side + 1] * weight[side / 2];
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float all = sum_over_row(weigh ? product[i] * weight[i] : product[i]);
          if (lane_id() % 4 == 0) add(products[tokens + lane_row + 8 * i], all);
        }
      };
      from_state(shared.dY, shared.S, shared.C, times.entry, dC, true, sums.read[half]);
      from_state(shared.X, shared.dS, shared.B, times.leave, dB, false, sums.left[half]);
      float kept = 0;
      for (int i = threadIdx.x; i < P * N; i += kBackwardThreads)
        kept += *shared.S.place(i / N, i % N) * *shared.dS.place(i / N, i % N);
      kept = sum_over_warp(kept);
      if (lane_id() == 0) add(sums.kept[warp_id()], kept);
      if (g.dD) {
        const int p = threadIdx.x % P, part = threadIdx.x / P;
        float skip = 0;
        for (int i = part * kPartTokens; i < (part + 1) * kPartTokens; ++i)
          skip += to_float(*shared.dY.place(i, p)) * to_float(*shared.X.place(i, p));
        sums.skip[threadIdx.x] = skip;
      }

      // The products inside the chunk.
      float M[kHalf / 8][4] = {};
#pragma unroll
      for (int p = 0; p < P; p += 16) {
        const Left<T> dy = load_left<false>(shared.dY, tokens, p);
#pragma unroll
        for (int j = 0; j < kHalf / 8; j += 2)
          if (half * kHalf + 8 * j <= tokens)
            multiply(M[j], M[j + 1], dy, load_right<true>(shared.X, p, half * kHalf + 8 * j));
      }
      double given[2] = {};
#pragma unroll
      for (int j = 0; j < kHalf / 8; ++j) {
        const int column = half * kHalf + 8 * j + lane_column;
        const Vec<float, 4> pairs = load<4>(times.pair[column].at);
        double taken[2] = {};
        float direct[2] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = tokens + lane_row + i / 2 * 8, from = column + i % 2;
          const bool seen = from <= token && from >= times.start[token];
          const float exponent = times.pair[token].at[0] - pairs.at[i % 2 * 2] + (times.low[token] - times.low[from]);
          const float L = seen ? exp2_fast(exponent) : 0.0f, dt = pairs.at[i % 2 * 2 + 1], dM = M[j][i];
          const float product = dM * (G[j][i] * L);
          direct[i % 2] += product;
          if (from < token) {
            const float pair = product * dt;
            given[i / 2] += pair;
            taken[i % 2] += pair;
          }
          dG[j][i] += dM * (L * dt);
          M[j][i] = G[j][i] * L * dt;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const double all = sum_over_column(taken[i]);
          const float all_direct = sum_over_column(direct[i]);
          if (lane_id() >= 4) continue;
          add(sums.taken[warp_id() % 4][column + i], all);
          add(sums.direct[warp_id() % 4][column + i], all_direct);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const double all = sum_over_row(given[i]);
        if (lane_id() % 4 == 0) add(sums.given[half][tokens + lane_row + 8 * i], all);
      }
      __syncthreads();  // nobody reads S any more, and the sums are there
      const auto write_square = [&](const float (&from)[kHalf / 8][4]) {
#pragma unroll
        for (int j = 0; j < kHalf / 8; ++j)
#pragma unroll
          for (int i = 0; i < 4; i += 2)
            shared.M.write_pair(tokens + lane_row + i / 2 * 8, half * kHalf + 8 * j + lane_column, from[j][i], from[j][i + 1]);
      };
      write_square(M);
      if (g.dD && static_cast<int>(threadIdx.x) < channels) {
        float skip = 0;
        for (int part = 0; part < kParts; ++part) skip += sums.skip[part * P + threadIdx.x];
        g.dD[partial * a.headdim + channel + threadIdx.x] = skip;
      }
      if (warp_id() == 0 && first + P >= a.headdim) finish_head(a, g, row, head, chunk, partial, times, sums);
      __syncthreads();

      float dX[kChannels / 8][4] = {};
#pragma unroll
      for (int n = 0; n < N; n += 16) {
        const Left<T> b = load_left<false>(shared.B, tokens, n);
#pragma unroll
        for (int p = 0; p < kChannels / 8; p += 2)
          multiply(dX[p], dX[p + 1], b, split_right<true, T, kPlanes<T>>(shared.dS, n, half * kChannels + 8 * p));
      }
#pragma unroll
      for (int p = 0; p < kChannels / 8; ++p)
#pragma unroll
        for (int i = 0; i < 4; ++i) dX[p][i] *= times.leave[tokens + lane_row + i / 2 * 8];
#pragma unroll
      for (int i = 0; i < kChunk; i += 16) {
        if (i < tokens) continue;
        const Left<T> m = load_left<true>(shared.M, tokens, i);
#pragma unroll
        for (int p = 0; p < kChannels / 8; p += 2)
          multiply(dX[p], dX[p + 1], m, load_right<false>(shared.dY, i, half * kChannels + 8 * p));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = tokens + lane_row + 8 * i, cell = times.cell[token];
        T* to = g.dx + (head.base + cell) * stride + channel;
        if (cell < 0) continue;
#pragma unroll
        for (int j = 0; j < kChannels / 8; ++j) {
          const int p = half * kChannels + 8 * j + lane_column;
          float dy[2];
          shared.dY.read_pair(token, p, dy[0], dy[1]);
#pragma unroll
          for (int k = 0; k < 2; ++k)
            if (first + p + k < a.headdim)
              to[p + k] = from_float<T>(dX[j][2 * i + k] + skip_weight(a, head, first + p + k) * dy[k]);
        }
      }
    }
  }

  // What all heads have in common.
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kHalf / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; i += 2)
      shared.M.write_pair(tokens + lane_row + i / 2 * 8, half * kHalf + 8 * j + lane_column, dG[j][i], dG[j][i + 1]);
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kChunk; k += 16) {
    if (k <= tokens) {
      const Left<T> left = load_left<false>(shared.M, tokens, k);
#pragma unroll
      for (int n = 0; n < kColumns / 8; n += 2)
        multiply(dC[n], dC[n + 1], left, load_right<false>(shared.B, k, half * kColumns + 8 * n));
    }
    if (k >= tokens) {
      const Left<T> left = load_left<true>(shared.M, tokens, k);
#pragma unroll
      for (int n = 0; n < kColumns / 8; n += 2)
        multiply(dB[n], dB[n + 1], left, load_right<false>(shared.C, k, half * kColumns + 8 * n));
    }
  }
  const int64_t cells = static_cast<int64_t>(a.tokens.batch) * a.tokens.lists * a.tokens.cells;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int cell = times.cell[tokens + lane_row + i / 2 * 8], column = half * kColumns + 8 * n + lane_column + i % 2;
      if (cell < 0 || column >= a.d_state) continue;
      const int64_t at = ((block * cells + row.base + cell) * a.ngroups + group) * a.d_state + column;
      g.dB[at] = dB[n][i];
      g.dC[at] = dC[n][i];
    }
}

}  // namespace ssd

// Bytes of shared memory that a block of the gradients needs.
size_t ssd_backward_shared_bytes(size_t number_bytes, int headdim, int d_state);

template <class T>
void ssd_backward(const Ssd<T>& a, const SsdGradients<T>& g, cudaStream_t stream);

}  // namespace vision_scan

// The gradients of the short causal convolution.
//
// As forwards a thread takes some channels and a run of tokens. It goes through them once: from the window it computes
// the sum before the activation again, and it keeps the gradients of the window's inputs, each of which is whole when
// the window has passed it. So it goes on behind its run, until the last of its own inputs has passed. The sums for
// weight and bias are added up over the runs of a block, and over blocks by the caller: the same bits on every run.
#pragma once

#include "conv.h"

namespace vision_scan {

template <class T>
struct ConvGradients {
  const T* dy;            // (batch, lists, cells, channels)
  const T* dfinal_state;  // (rows, channels, taps - 1) or null
  T* dx;                  // (batch, lists, cells, channels); what no list visits is left alone
  T* dinitial_state;      // (rows, channels, taps - 1) or null
  float* dparameters;     // (lines, parts, taps + 1, channels): of the weight, then of the bias
};

namespace conv {

constexpr int kRuns = kThreads / 32;  // of a block: each warp takes one

// How many blocks share out the runs of a line.
inline __host__ __device__ int parts_of(int seqlen, int run) {
  const int runs = (seqlen + run - 1) / run;
  return (runs + kRuns - 1) / kRuns;
}

template <int kTaps, int n>
struct Sums {
  float weight[kTaps][n], bias[n];
};

template <class T, int kTaps, int n, bool kGeneral>
__device__ __forceinline__ void go_back(const Conv<T>& a, const ConvGradients<T>& g, int line, int channel, int first,
                                        Sums<kTaps, n>& sums) {
  constexpr int kTail = kTaps - 1, kAhead = 4;
  constexpr int kNowhere = -1;
  const int seqlen = a.tokens.seqlen, last = std::min(first + a.run, seqlen);
  Walk<T, kTaps, n, kGeneral> walk(a, line, channel, first);
  float weight[kTaps][n], bias[n], window[kTail][n], dx[kTail][n];
  int place[kTail];  // where each of dx goes: a cell, -2 - a slot of the initial state, or nowhere: it is another run's
  walk.read_parameters(weight, bias);
  walk.open_window(first, window);
  clear(dx);

  const auto give = [&](const float (&value)[n], int place) {
    if (place >= 0) {
      Vec<T, n> out;
#pragma unroll
      for (int i = 0; i < n; ++i) out.at[i] = from_float<T>(value[i]);
      store(g.dx + walk.at(place), out);
    } else if (place < kNowhere) {
#pragma unroll
      for (int i = 0; i < n; ++i) g.dinitial_state[walk.state_at(i, -2 - place)] = from_float<T>(value[i]);
    }
  };
  const auto give_all = [&] {
#pragma unroll
    for (int j = 0; j < kTail; ++j) {
      give(dx[j], place[j]);
      place[j] = kNowhere;
    }
    clear(dx);
  };
  const auto own_initial_state = [&](bool own) {
#pragma unroll
    for (int j = 0; j < kTail; ++j) place[j] = own && g.dinitial_state && j >= walk.skip ? -2 - (j - walk.skip) : kNowhere;
  };
  // Segments that end before token t; the initial state of the next one belongs to the run that ends there.
  const auto close = [&](int t, bool own) {
    while (walk.end == t) {
      if (g.dfinal_state)
#pragma unroll
        for (int j = 0; j < kTail; ++j)
          if (j >= walk.skip)
            for (int i = 0; i < n; ++i) dx[j][i] += to_float(g.dfinal_state[walk.state_at(i, j - walk.skip)]);
      give_all();
      if (!own || !walk.next_segment()) return;
      walk.open_window(t, window);
      own_initial_state(true);
    }
  };
  const auto pending = [&] {
    bool any = false;
#pragma unroll
    for (int j = 0; j < kTail; ++j) any |= place[j] != kNowhere;
    return any;
  };

  own_initial_state(first == 0);
  if (kGeneral && first == 0) close(0, true);
  for (int ahead = first; ahead < last || (ahead < seqlen && pending()); ahead += kAhead) {
    int cells[kAhead];
    Packed<T, n> x[kAhead], dy[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      cells[k] = ahead + k < seqlen ? walk.cell(ahead + k) : -1;
      if (cells[k] < 0) continue;
      x[k] = walk.read(cells[k]);
      dy[k] = load_packed<n>(g.dy + walk.at(cells[k]));
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int t = ahead + k;
      if (t >= seqlen) break;
      const bool own = t < last;
      if (cells[k] >= 0) {
        if (walk.mark(t) & kReset) {
          give_all();
          clear(window);
        }
        float newest[n], own_dx[n];
#pragma unroll
        for (int i = 0; i < n; ++i) {
          newest[i] = x[k][i];
          float d = dy[k][i];
          if (a.silu) {
            const float sum = walk.sum(i, weight, bias, window, newest[i]), gate = sigmoid(sum);
            d *= gate * (1 + sum * (1 - gate));
          }
#pragma unroll
          for (int j = 0; j < kTail; ++j) dx[j][i] += weight[j][i] * d;
          own_dx[i] = weight[kTail][i] * d;
          if (!own) continue;
          sums.bias[i] += d;
#pragma unroll
          for (int j = 0; j < kTail; ++j) sums.weight[j][i] += window[j][i] * d;
          sums.weight[kTail][i] += newest[i] * d;
        }
        const int here = own ? cells[k] : kNowhere;
        if (walk.skip == kTail) give(own_dx, here);  // a window of no inputs
#pragma unroll
        for (int j = 0; j < kTail; ++j) {
          if (j == walk.skip) give(dx[j], place[j]);
          place[j] = j < walk.skip ? kNowhere : j + 1 < kTail ? place[j + 1] : here;
        }
        shift(dx, own_dx);
        shift(window, newest);
      } else if (kGeneral && own && !walk.row.index) {
        const float none[n] = {};
        give(none, t);
      }
      if (kGeneral) close(t + 1, own);
    }
  }
  if (!kGeneral && pending()) close(seqlen, false);
}

template <class T, int kTaps, int n, bool kGeneral>
__global__ void __launch_bounds__(kThreads, 3) backward(Conv<T> a, ConvGradients<T> g) {
  constexpr int kColumn = 32 * n;  // channels of a block
  const int columns = (a.channels + kColumn - 1) / kColumn, parts = parts_of(a.tokens.seqlen, a.run);
  const int column = blockIdx.x % columns * kColumn, part = blockIdx.x / columns % parts;
  const int line = blockIdx.x / columns / parts;
  const int channel = column + lane_id() * n, first = (part * kRuns + warp_id()) * a.run;
  Sums<kTaps, n> sums{};
  if (channel < a.channels && first < a.tokens.seqlen)
    go_back<T, kTaps, n, kGeneral>(a, g, line, channel, first, sums);

  float* shared = reinterpret_cast<float*>(shared_memory());  // [kRuns][kTaps + 1][kColumn]
#pragma unroll
  for (int j = 0; j <= kTaps; ++j)
#pragma unroll
    for (int i = 0; i < n; ++i)
      shared[(warp_id() * (kTaps + 1) + j) * kColumn + lane_id() * n + i] = j < kTaps ? sums.weight[j][i] : sums.bias[i];
  __syncthreads();
  const int skip = kTaps - a.taps;
  float* to = g.dparameters + (static_cast<int64_t>(line) * parts + part) * (a.taps + 1) * a.channels;
  for (int at = threadIdx.x; at < (a.taps + 1) * kColumn; at += kThreads) {
    const int j = at / kColumn, c = at % kColumn;
    if (column + c >= a.channels) continue;
    float sum = 0;
    for (int run = 0; run < kRuns; ++run) sum += shared[(run * (kTaps + 1) + j + skip) * kColumn + c];
    to[static_cast<int64_t>(j) * a.channels + column + c] = sum;
  }
}

}  // namespace conv

// How many tokens a thread takes at best on a GPU with as many processors.
template <class T>
int conv_backward_run(const Conv<T>& a, int processors);
template <class T>
void conv_backward(const Conv<T>& a, const ConvGradients<T>& g, cudaStream_t stream);

}  // namespace vision_scan

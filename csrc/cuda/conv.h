// The short causal depthwise convolution, forward: see vision_scan/ops/reference/causal_conv1d.py.
//
// Channels run fastest over the threads. A thread takes 16 bytes of them and a run of tokens of one line; the window
// of inputs stays in its registers, so that of the line only the few tokens before a run are read twice. A line is a
// sequence, a visiting list of a grid, or all segments that are packed into one row.
#pragma once

#include <algorithm>

#include "parameters.h"
#include "tokens.h"

namespace vision_scan {

template <class T>
struct Conv {
  Tokens tokens;
  int channels, taps;
  bool silu;
  bool shared_input;               // all lists read one x, (batch, cells, channels); else (batch, lists, cells, channels)
  bool shared_weight, shared_bias; // one for all lists
  int64_t x_stride;                // from cell to cell; the channels of a cell are contiguous
  const T* x;
  Parameter<T> weight;             // (lists, channels, taps), the last tap weighs the current token
  Parameter<T> bias;               // (lists, channels) or null
  const T* initial_state;          // (rows, channels, taps - 1), oldest first, or null
  T* y;                            // (batch, lists, cells, channels); what no list visits is left alone
  T* final_state;                  // (rows, channels, taps - 1)
  int run;                         // tokens of a thread
};

namespace conv {

constexpr int kMostTaps = 16;
constexpr int kThreads = 128;

// How many lines there are: packed segments lie in one.
inline __host__ __device__ int lines_of(const Tokens& tokens) { return tokens.bounds ? 1 : tokens.rows(); }

// A thread's way along a line. Convolutions of other than 2, 3 or 4 taps run as one of 16, of which they use the last;
// `skip` says how many they leave out. kGeneral: there may be padding, resets, visiting lists or packed segments.
template <class T, int kTaps, int n, bool kGeneral>
struct Walk {
  static constexpr int kTail = kTaps - 1;

  const Conv<T>& a;
  Row row;
  int64_t input;   // the cell of x before the line's first
  int channel, skip;
  int state;       // of the segment: its row of the initial and final states
  int begin, end;  // its tokens

  __device__ __forceinline__ Walk(const Conv<T>& a, int line, int channel, int t)
      : a(a), channel(channel), skip(kTaps == kMostTaps ? kMostTaps - a.taps : 0), state(line), begin(0) {
    Tokens whole = a.tokens;
    whole.bounds = nullptr;
    row = whole.row(line);
    input = a.shared_input ? static_cast<int64_t>(row.batch) * a.tokens.cells : row.base;
    end = a.tokens.seqlen;
    if (kGeneral && a.tokens.bounds) {
      int low = 0, high = a.tokens.segments;  // the last segment that begins at t or before; the first one for t = 0
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (t > 0 && a.tokens.bounds[middle] <= t ? low : high) = middle;
      }
      enter(low);
    }
  }

  __device__ __forceinline__ void enter(int segment) {
    const int* bounds = a.tokens.bounds + segment;
    state = segment;
    begin = bounds[0] > 0 ? bounds[0] : 0;  // also where the bounds are wrong, nothing is read outside of the line
    end = bounds[1] < a.tokens.seqlen ? bounds[1] : a.tokens.seqlen;
  }
  // Goes on to the segment behind this one, if there is one.
  __device__ __forceinline__ bool next_segment() {
    if (!kGeneral || state + 1 >= a.tokens.segments) return false;
    enter(state + 1);
    return true;
  }

  __device__ __forceinline__ int mark(int t) const { return kGeneral ? row.mark(t) : 0; }
  __device__ __forceinline__ int cell(int t) const {
    return !kGeneral ? t : row.mark(t) & kPadding ? -1 : row.cell(t);
  }
  __device__ __forceinline__ Packed<T, n> read(int cell) const {
    return load_packed<n>(a.x + (input + cell) * a.x_stride + channel);
  }
  // Of the output and what is shaped like it.
  __device__ __forceinline__ int64_t at(int cell) const { return (row.base + cell) * a.channels + channel; }
  // Of an initial or final state.
  __device__ __forceinline__ int64_t state_at(int i, int slot) const {
    return (static_cast<int64_t>(state) * a.channels + channel + i) * (a.taps - 1) + slot;
  }

  __device__ __forceinline__ void read_parameters(float (&weight)[kTaps][n], float (&bias)[n]) const {
    const int64_t first = a.shared_weight ? channel : row.list * a.channels + channel;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if constexpr (n > 1) {
        float taps[kTaps];
        a.weight.read((first + i) * kTaps, taps);
#pragma unroll
        for (int j = 0; j < kTaps; ++j) weight[j][i] = taps[j];
      } else {
#pragma unroll
        for (int j = 0; j < kTaps; ++j) {
          float tap[1] = {0};
          if (j >= skip) a.weight.read(first * a.taps + j - skip, tap);
          weight[j][i] = tap[0];
        }
      }
      bias[i] = 0;
    }
    if (a.bias.at) a.bias.read(a.shared_bias ? channel : row.list * a.channels + channel, bias);
  }

  // The inputs that token t sees: the last real ones of its segment, before them the initial state.
  __device__ __forceinline__ void open_window(int t, float (&window)[kTail][n]) const {
    int found = 0;
    bool open = true;
#pragma unroll
    for (int j = kTail - 1; j >= 0; --j) {
#pragma unroll
      for (int i = 0; i < n; ++i) window[j][i] = 0;
      if (j < skip || !open) continue;
      do --t;
      while (kGeneral && t >= begin && cell(t) < 0);
      if (t >= begin) {
        const Packed<T, n> x = read(cell(t));
#pragma unroll
        for (int i = 0; i < n; ++i) window[j][i] = x[i];
        ++found;
        open = !(mark(t) & kReset);
      } else if (a.initial_state) {
#pragma unroll
        for (int i = 0; i < n; ++i) window[j][i] = to_float(a.initial_state[state_at(i, j - skip + found)]);
      }
    }
  }

  // The sum before the activation.
  __device__ __forceinline__ float sum(int i, const float (&weight)[kTaps][n], const float (&bias)[n],
                                       const float (&window)[kTail][n], float x) const {
    float sum = bias[i];
#pragma unroll
    for (int j = 0; j < kTail; ++j)
      if (j >= skip) sum += weight[j][i] * window[j][i];
    return sum + weight[kTail][i] * x;
  }
};

// Threads that keep a GPU busy, each with at least 16 tokens and at most `most`.
inline int run_of(int64_t lines, int seqlen, int vectors, int processors, int most) {
  const int64_t run = lines * seqlen * vectors / (static_cast<int64_t>(processors) * 1024) / 16 * 16;
  return static_cast<int>(std::clamp<int64_t>(run, 16, most));
}

// Calls f(taps, n, general) with constants: n channels at a time if everything lies so that they can be read at once.
template <int n, class T, class F>
void with_kernel(const Conv<T>& a, bool aligned, const F& f) {
  const Tokens& t = a.tokens;
  const bool general = t.index || t.marks || t.bounds;
  const bool wide = aligned && a.channels % n == 0 && a.x_stride % n == 0 && is_aligned(a.x, n) &&
                    is_aligned(a.weight) && is_aligned(a.bias);
  const auto with = [&](auto taps) {
    constexpr std::integral_constant<int, n> whole;
    constexpr std::integral_constant<int, 1> one;
    if (wide && !general)
      f(taps, whole, std::false_type());
    else if (wide)
      f(taps, whole, std::true_type());
    else
      f(taps, one, std::true_type());
  };
  if (a.taps == 2) with(std::integral_constant<int, 2>());
  else if (a.taps == 3) with(std::integral_constant<int, 3>());
  else if (a.taps == 4) with(std::integral_constant<int, 4>());
  else f(std::integral_constant<int, kMostTaps>(), std::integral_constant<int, 1>(), std::true_type());
}

// Moves each of the window one place on.
template <int kTail, int n>
__device__ __forceinline__ void shift(float (&window)[kTail][n], const float (&newest)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j + 1 < kTail; ++j) window[j][i] = window[j + 1][i];
    window[kTail - 1][i] = newest[i];
  }
}
template <int kTail, int n>
__device__ __forceinline__ void clear(float (&window)[kTail][n]) {
#pragma unroll
  for (int j = 0; j < kTail; ++j)
#pragma unroll
    for (int i = 0; i < n; ++i) window[j][i] = 0;
}

template <class T, int kTaps, int n, bool kGeneral>
__global__ void __launch_bounds__(kThreads, 3) forward(Conv<T> a) {
  constexpr int kTail = kTaps - 1, kAhead = 4;  // tokens that are read together
  const int vectors = a.channels / n, runs = (a.tokens.seqlen + a.run - 1) / a.run;
  const int blocks = (vectors * runs + kThreads - 1) / kThreads;  // of a line
  const int unit = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (unit >= vectors * runs) return;
  const int first = unit / vectors * a.run, last = std::min(first + a.run, a.tokens.seqlen);
  Walk<T, kTaps, n, kGeneral> walk(a, blockIdx.x / blocks, unit % vectors * n, first);
  float weight[kTaps][n], bias[n], window[kTail][n];
  walk.read_parameters(weight, bias);
  walk.open_window(first, window);

  // Segments that end before token t leave their final states.
  const auto close = [&](int t) {
    while (walk.end == t) {
#pragma unroll
      for (int j = 0; j < kTail; ++j)
        if (j >= walk.skip)
          for (int i = 0; i < n; ++i) a.final_state[walk.state_at(i, j - walk.skip)] = from_float<T>(window[j][i]);
      if (!walk.next_segment()) return;
      walk.open_window(t, window);
    }
  };
  if (kGeneral && first == 0) close(0);
  for (int ahead = first; ahead < last; ahead += kAhead) {
    int cells[kAhead];
    Packed<T, n> x[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      cells[k] = ahead + k < last ? walk.cell(ahead + k) : -1;
      if (cells[k] >= 0) x[k] = walk.read(cells[k]);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int t = ahead + k;
      if (t >= last) break;
      if (cells[k] >= 0) {
        if (walk.mark(t) & kReset) clear(window);
        Vec<T, n> y;
        float newest[n];
#pragma unroll
        for (int i = 0; i < n; ++i) {
          newest[i] = x[k][i];
          const float sum = walk.sum(i, weight, bias, window, newest[i]);
          y.at[i] = from_float<T>(a.silu ? silu(sum) : sum);
        }
        store(a.y + walk.at(cells[k]), y);
        shift(window, newest);
      } else if (kGeneral && !walk.row.index) {
        Vec<T, n> none;
        for (int i = 0; i < n; ++i) none.at[i] = from_float<T>(0.0f);
        store(a.y + walk.at(t), none);
      }
      if (kGeneral) close(t + 1);
    }
  }
  if (!kGeneral) close(last);
}

}  // namespace conv

// How many tokens a thread takes at best on a GPU with as many processors.
template <class T>
int conv_forward_run(const Conv<T>& a, int processors);
template <class T>
void conv_forward(const Conv<T>& a, cudaStream_t stream);

}  // namespace vision_scan

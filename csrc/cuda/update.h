// Decoding: 1 to 16 tokens onto states that are updated in place, each state read once and written once.
//
// The functions of these names in vision_scan/ops/reference say what is computed. A thread asks for all it needs of a
// state, in accesses of 16 bytes, before it uses any of it; while the tokens go by the state stays in registers.
#pragma once

#include "chain.h"
#include "tokens.h"

namespace vision_scan {

// The rows of a call: which state each has, and which of its tokens count.
struct Rows {
  int rows, seqlen, num_slots;
  const int* slots;      // (rows) or null: row i has state i; below 0: the row is skipped
  const uint8_t* marks;  // (rows, seqlen) as in tokens.h, or null

  // The state of a row, or -1. A slot that does not exist is skipped too: nothing beside the states is touched.
  __device__ __forceinline__ int slot(int row) const {
    const int at = slots ? slots[row] : row;
    return at < num_slots ? at : -1;
  }
  __device__ __forceinline__ int mark(int row, int t) const { return marks ? marks[row * seqlen + t] : 0; }
};

// What tokens bring, (rows, seqlen, ...): contiguous for a token, which may be a piece of a wider one.
template <class T>
struct Piece {
  const T* data;
  int64_t row, token;  // strides
  __device__ __forceinline__ const T* at(int r, int t) const { return data + r * row + t * token; }
};

template <class T>
struct SsdUpdate {
  Rows rows;
  int nheads, headdim, ngroups, d_state;
  bool dt_softplus, A_is_log;
  float dt_min, dt_max;
  Piece<T> x, z;             // (nheads, headdim); z.data may be null
  Piece<T> dt;               // (nheads)
  Piece<T> B, C;             // (ngroups, d_state)
  const float *A, *dt_bias;  // (nheads); A_is_log: log(-A). dt_bias may be null
  const float* D;            // (nheads) or (nheads, headdim), or null
  bool D_of_channels;
  float* state;              // (num_slots, nheads, headdim, d_state)
  int8_t* codes;             // instead of `state`: codes, each times the scale of its row of the state
  float* scales;             // (num_slots, nheads, headdim)
  T* y;                      // (rows, seqlen, nheads, headdim)
};

template <class T>
struct SelectiveUpdate {
  Rows rows;
  int channels, ngroups, d_state;
  bool dt_softplus;
  const T *u, *dt, *z;               // (rows, channels, seqlen); z may be null
  const T *B, *C;                    // (rows, ngroups, d_state, seqlen)
  const float *A, *D, *dt_bias;      // (channels, d_state), (channels) or null
  float* state;                      // (num_slots, channels, d_state)
  T* y;
};

// Strides of (rows, channels, seqlen).
struct Strides {
  int64_t row, channel, token;
};

template <class T>
struct ConvUpdate {
  Rows rows;
  int channels, taps;
  bool silu;
  const T* x;
  T* y;  // may be x itself
  Strides x_strides, y_strides;
  const T *weight, *bias;  // (channels, taps), (channels) or null
  T* state;                // (num_slots, channels, taps - 1)
};

namespace update {

constexpr int kThreads = 128;
constexpr int kMostTaps = 16;
constexpr int kMostStates = 256;
constexpr int kRows = 4;  // of a state, of a thread

// A convolution's window over one channel, and its weights.
template <class S, int kTaps>
struct Window {
  float inputs[kTaps], weight[kTaps], bias;  // the last `taps` of either; those before are 0
  S* state;
  int taps;

  __device__ __forceinline__ Window(S* state, const S* weights, const S* some_bias, int channel, int taps)
      : state(state), taps(taps) {
    bias = some_bias ? to_float(some_bias[channel]) : 0.0f;
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
      const int tap = i - (kTaps - taps);
      weight[i] = tap >= 0 ? to_float(weights[channel * taps + tap]) : 0.0f;
      inputs[i] = i && tap > 0 ? to_float(state[tap - 1]) : 0.0f;
    }
  }
  // The output for the next input.
  __device__ __forceinline__ float slide(float x, bool reset) {
    float y = bias;
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
      inputs[i] = i + 1 < kTaps ? (reset ? 0.0f : inputs[i + 1]) : x;
      y += weight[i] * inputs[i];
    }
    return y;
  }
  __device__ __forceinline__ void keep() const {
#pragma unroll
    for (int i = 1; i < kTaps; ++i) {
      const int tap = i - (kTaps - taps);
      if (tap > 0) state[tap - 1] = from_float<S>(inputs[i]);
    }
  }
};

// Runs a row's tokens through the window of a channel; read(t) and write(t, y).
template <class S, class Read, class Write>
__device__ __forceinline__ void convolve(const Rows& rows, int row, int channel, int channels, int taps, bool act,
                                         S* state, const S* weight, const S* bias, const Read& read,
                                         const Write& write) {
  const int slot = rows.slot(row);
  const auto run = [&](auto window) {
    for (int t = 0; t < rows.seqlen; ++t) {
      const int mark = rows.mark(row, t);
      if (mark & kPadding) {
        write(t, 0.0f);
        continue;
      }
      const float y = window.slide(read(t), mark & kReset);
      write(t, act ? silu(y) : y);
    }
    window.keep();
  };
  if (slot < 0) {
    for (int t = 0; t < rows.seqlen; ++t) write(t, 0.0f);
    return;
  }
  S* own = state + (static_cast<int64_t>(slot) * channels + channel) * (taps - 1);
  if (taps <= 4)
    run(Window<S, 4>(own, weight, bias, channel, taps));
  else
    run(Window<S, kMostTaps>(own, weight, bias, channel, taps));
}

template <class T>
__global__ void __launch_bounds__(kThreads) conv(ConvUpdate<T> a) {
  const int channel = blockIdx.x * kThreads + threadIdx.x, row = blockIdx.y;
  if (channel >= a.channels) return;
  const auto at = [&](const Strides& s, int t) { return row * s.row + channel * s.channel + t * s.token; };
  convolve(
      a.rows, row, channel, a.channels, a.taps, a.silu, a.state, a.weight, a.bias,
      [&](int t) { return to_float(a.x[at(a.x_strides, t)]); },
      [&](int t, float y) { a.y[at(a.y_strides, t)] = from_float<T>(y); });
}

// How many lanes share a row of a state, a power of two, if each takes `width` numbers at a time.
inline int lanes_for(int d_state, int width) {
  int lanes = 1;
  while (lanes < 32 && lanes * width < d_state) lanes *= 2;
  return lanes;
}

template <int width, class T>
__device__ __forceinline__ void read_floats(const T* from, float* to) {
  constexpr int kSome = width * sizeof(T) > 16 ? 4 : width;
#pragma unroll
  for (int first = 0; first < width; first += kSome) {
    const Vec<T, kSome> values = load<kSome>(from + first);
#pragma unroll
    for (int i = 0; i < kSome; ++i) to[first + i] = to_float(values.at[i]);
  }
}

__device__ __forceinline__ float sum_over_lanes(float x, int lanes) {
  for (int mask = lanes / 2; mask; mask >>= 1) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}
__device__ __forceinline__ float max_over_lanes(float x, int lanes) {
  for (int mask = lanes / 2; mask; mask >>= 1) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, mask));
  return x;
}

// A state in 8 bits. Each row, the d_state numbers of a channel, has a scale of its own: all of it decays alike, which
// the scale takes up without loss, and it lies in lanes that meet for the output anyway. Rounded to nearest.
constexpr int kCodes = 16;  // of an access of 16 bytes
__device__ __forceinline__ void read_codes(const int8_t* from, float scale, float* to) {
  const Vec<int8_t, kCodes> codes = load<kCodes>(from);
#pragma unroll
  for (int i = 0; i < kCodes; ++i) to[i] = codes.at[i] * scale;
}
// Returns the scale. All lanes of the warp come here; without `there` nothing is written.
__device__ __forceinline__ float write_codes(int8_t* to, const float* values, int lanes, bool there) {
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < kCodes; ++i) most = fmaxf(most, fabsf(values[i]));
  most = max_over_lanes(most, lanes);
  const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
  Vec<int8_t, kCodes> codes;
#pragma unroll
  for (int i = 0; i < kCodes; ++i) codes.at[i] = static_cast<int8_t>(rintf(values[i] * inverse));
  if (there) store<kCodes>(to, codes);
  return most / 127.0f;
}

// A block takes kThreads / lanes * kRows rows of the state of one head; a lane takes `chunks` times `width` numbers of
// each, and every lane of a warp goes through all of it, with zeros where nothing is left.
// Accesses of kCodes numbers are of codes.
template <class T, int width, int chunks>
__global__ void __launch_bounds__(kThreads, width == 4 ? 8 - 2 * chunks : 3) ssd(SsdUpdate<T> a, int lanes) {
  constexpr int kMine = width * chunks;
  const int head = blockIdx.y, row = blockIdx.z, lane = threadIdx.x % lanes, apart = kThreads / lanes;
  const int first = blockIdx.x * apart * kRows + threadIdx.x / lanes;
  const int slot = a.rows.slot(row), group = head / (a.nheads / a.ngroups);
  const int64_t channel = (static_cast<int64_t>(slot < 0 ? 0 : slot) * a.nheads + head) * a.headdim;
  float* state = a.state + channel * a.d_state;
  int8_t* codes = a.codes + channel * a.d_state;
  float S[kRows][kMine];
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      const int p = first + i * apart, n = (c * lanes + lane) * width;
      if (slot < 0 || p >= a.headdim || n >= a.d_state)
        for (int j = 0; j < width; ++j) S[i][c * width + j] = 0.0f;
      else if constexpr (width == kCodes)
        read_codes(codes + p * a.d_state + n, a.scales[channel + p], S[i]);
      else
        read_floats<width>(state + p * a.d_state + n, S[i] + c * width);
    }
  const float A = a.A_is_log ? -exp2_fast(a.A[head] * kLog2e) : a.A[head];
  const float bias = a.dt_bias ? a.dt_bias[head] : 0.0f;
  wait_for_previous();

  for (int t = 0; t < a.rows.seqlen; ++t) {
    const int mark = slot < 0 ? kPadding : a.rows.mark(row, t);
    T* y = a.y + ((static_cast<int64_t>(row) * a.rows.seqlen + t) * a.nheads + head) * a.headdim;
    if (mark & kPadding) {
      for (int i = 0; i < kRows; ++i)
        if (lane == 0 && first + i * apart < a.headdim) y[first + i * apart] = from_float<T>(0.0f);
      continue;
    }
    float B[kMine], C[kMine], x[kRows], z[kRows];
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      const int n = (c * lanes + lane) * width;
      if (n < a.d_state) {
        read_floats<width>(a.B.at(row, t) + group * a.d_state + n, B + c * width);
        read_floats<width>(a.C.at(row, t) + group * a.d_state + n, C + c * width);
      } else {
        for (int j = 0; j < width; ++j) B[c * width + j] = C[c * width + j] = 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int p = first + i * apart;
      x[i] = p < a.headdim ? to_float(a.x.at(row, t)[head * a.headdim + p]) : 0.0f;
      z[i] = p < a.headdim && a.z.data ? to_float(a.z.at(row, t)[head * a.headdim + p]) : 0.0f;
    }
    float dt = to_float(a.dt.at(row, t)[head]) + bias;
    if (a.dt_softplus) dt = softplus(dt);
    dt = fminf(fmaxf(dt, a.dt_min), a.dt_max);
    const float decay = mark & kReset ? 0.0f : exp2_fast(dt * A * kLog2e);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int p = first + i * apart;
      const float inflow = dt * x[i];
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        S[i][j] = decay * S[i][j] + inflow * B[j];
        sum += S[i][j] * C[j];
      }
      sum = sum_over_lanes(sum, lanes);
      if (lane || p >= a.headdim) continue;
      if (a.D) sum += x[i] * a.D[a.D_of_channels ? head * a.headdim + p : head];
      y[p] = from_float<T>(a.z.data ? sum * silu(z[i]) : sum);
    }
  }
  if (slot < 0) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      const int p = first + i * apart, n = (c * lanes + lane) * width;
      if constexpr (width == kCodes) {
        const bool there = p < a.headdim && n < a.d_state;
        const float scale = write_codes(codes + p * a.d_state + n, S[i], lanes, there);
        if (there && lane == 0) a.scales[channel + p] = scale;
        continue;
      }
      if (p >= a.headdim || n >= a.d_state) continue;
      Vec<float, width> values;
#pragma unroll
      for (int j = 0; j < width; ++j) values.at[j] = S[i][c * width + j];
      store<width>(state + p * a.d_state + n, values);
    }
}

// A block takes kThreads / lanes channels of a row.
template <class T, int width, int chunks>
__global__ void __launch_bounds__(kThreads) selective(SelectiveUpdate<T> a, int lanes) {
  constexpr int kMine = width * chunks;
  const int row = blockIdx.y, lane = threadIdx.x % lanes;
  const int channel = blockIdx.x * (kThreads / lanes) + threadIdx.x / lanes;
  const int slot = a.rows.slot(row), seqlen = a.rows.seqlen;
  const bool there = channel < a.channels;
  const int group = there ? channel / (a.channels / a.ngroups) : 0;
  float* state = a.state + (static_cast<int64_t>(slot < 0 ? 0 : slot) * a.channels + channel) * a.d_state;
  float h[kMine], rate[kMine];
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const int n = (c * lanes + lane) * width;
    if (slot >= 0 && there && n < a.d_state) {
      read_floats<width>(state + n, h + c * width);
      read_floats<width>(a.A + static_cast<int64_t>(channel) * a.d_state + n, rate + c * width);
    } else {
      for (int j = 0; j < width; ++j) h[c * width + j] = rate[c * width + j] = 0.0f;
    }
  }
  const float skip = there && a.D ? a.D[channel] : 0.0f, bias = there && a.dt_bias ? a.dt_bias[channel] : 0.0f;
  for (int t = 0; t < seqlen; ++t) {
    const int mark = slot < 0 ? kPadding : a.rows.mark(row, t);
    const int64_t at = (static_cast<int64_t>(row) * a.channels + channel) * seqlen + t;
    if (mark & kPadding) {
      if (lane == 0 && there) a.y[at] = from_float<T>(0.0f);
      continue;
    }
    const float u = there ? to_float(a.u[at]) : 0.0f;
    float dt = (there ? to_float(a.dt[at]) : 0.0f) + bias;
    if (a.dt_softplus) dt = softplus(dt);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      const int n = (j / width * lanes + lane) * width + j % width;
      const int64_t shared = ((static_cast<int64_t>(row) * a.ngroups + group) * a.d_state + n) * seqlen + t;
      const bool real = n < a.d_state;
      const float decay = mark & kReset ? 0.0f : exp2_fast(dt * rate[j] * kLog2e);
      h[j] = decay * h[j] + dt * u * (real ? to_float(a.B[shared]) : 0.0f);
      sum += h[j] * (real ? to_float(a.C[shared]) : 0.0f);
    }
    sum = sum_over_lanes(sum, lanes);
    if (lane || !there) continue;
    sum += skip * u;
    a.y[at] = from_float<T>(a.z ? sum * silu(to_float(a.z[at])) : sum);
  }
  if (slot < 0 || !there) return;
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const int n = (c * lanes + lane) * width;
    if (n >= a.d_state) continue;
    Vec<float, width> values;
#pragma unroll
    for (int j = 0; j < width; ++j) values.at[j] = h[c * width + j];
    store<width>(state + n, values);
  }
}

}  // namespace update

template <class T>
void ssd_update(const SsdUpdate<T>& a, bool chained, cudaStream_t stream);
template <class T>
void selective_update(const SelectiveUpdate<T>& a, cudaStream_t stream);
template <class T>
void conv_update(const ConvUpdate<T>& a, cudaStream_t stream);

}  // namespace vision_scan

// Decoding's projections: up to 8 tokens times a matrix that is read once, at the speed of memory.
//
//     y[r] (+)= W a[r],      a[r] = x[r] / rms(x[r]) * norm (* SiLU(gate[r])),  rounded to the dtype of W
//
// A block takes 16 outputs at a time; its warps share the columns of W among each other. Every block works out the
// normed tokens for itself and keeps them in shared memory: that costs nothing beside the matrix, the first part of
// which is asked for before. Where outputs are the inputs of a convolution, that is done on the way out, by the one
// thread that has all tokens of a channel, whose window it moves on.
//
// More tokens are normed by a kernel of its own, `Normalize`, and left to cuBLAS.
#pragma once

#include "update.h"

namespace vision_scan {

template <class T>
struct Project {
  int rows, columns, outputs;  // rows: tokens, 1 to 8; columns: of W
  const float* x;              // token r at x + token(r) * columns
  int seqlen, keep;            // the tokens are the last `keep` of each run of `seqlen`
  const float* norm;           // (columns)
  int group_size;              // columns that are normed together
  float eps;
  const float* gate;           // (rows, ...) or null
  int64_t gate_stride;
  const T* weight;             // (outputs, columns)
  float* y;                    // (rows, outputs)
  bool add;
  ConvUpdate<T> conv;          // of outputs conv_first ...; only weights, window and rows; no channels: there is none
  int conv_first;

  __device__ __forceinline__ int token(int r) const { return (r / keep + 1) * seqlen - keep + r % keep; }
};

// y[r] = a[r] as above, of any number of tokens, after x[r] += delta[r].
template <class X, class T>
struct Normalize {
  int rows, columns, group_size, seqlen, keep;  // token r is chosen as in Project
  float eps;
  X* x;               // changed where there is a delta
  const T* delta;     // of the same tokens as x, or null
  const float* norm;
  const X* gate;      // (rows, ...) or null
  int64_t gate_stride;
  T* y;               // (rows, columns)
};

namespace project {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kOutputs = 16;  // of a block at a time
constexpr int kMostRows = 8;
constexpr int kSteps = 4;     // of a warp, asked for at a time

// A step is 16 bytes of W for each lane, of two outputs: g = lane / 4 and g + 8, columns from kWide * (lane % 4).
template <class T>
constexpr int kWide = 16 / sizeof(T);
template <class T>
constexpr int kStep = 4 * kWide<T>;

// Tokens in shared memory lie half a line of banks apart, so that lanes of two tokens do not meet.
template <class T>
__host__ __device__ constexpr int row_stride(int columns) {
  return (columns * static_cast<int>(sizeof(T)) + 127) / 128 * 128 / static_cast<int>(sizeof(T)) + 64 / sizeof(T);
}

template <class T>
struct Shared {
  float* sums;      // [kMostRows][groups][kWarps]
  float* partials;  // [2][kWarps][kMostRows][kOutputs]
  T* tokens;        // [rows][row_stride]

  __device__ __forceinline__ Shared(unsigned char* from, int groups) {
    partials = reinterpret_cast<float*>(from);
    sums = partials + 2 * kWarps * kMostRows * kOutputs;
    tokens = reinterpret_cast<T*>(sums + kMostRows * groups * kWarps);
  }
  __host__ static size_t bytes(int rows, int columns, int groups) {
    return sizeof(float) * kWarps * kMostRows * (2 * kOutputs + groups) + sizeof(T) * rows * row_stride<T>(columns);
  }
};

// Sums of products of 16 outputs with 8 tokens: d[0], d[1] are output g of tokens 2t, 2t + 1, d[2], d[3] output g + 8.
template <class T>
struct Products {
  float d[4] = {0, 0, 0, 0};
  // Both sides of the tensor cores' product name the columns in the same wrong order, which a sum does not notice.
  __device__ __forceinline__ void add(const Vec<T, 8>& low, const Vec<T, 8>& high, const T* tokens, int stride,
                                      int rows) {
    uint32_t w[4], v[4], c[4] = {0, 0, 0, 0};
    memcpy(w, &low, 16);
    memcpy(v, &high, 16);
    if (lane_id() / 4 < rows) {
      const Vec<T, 8> token = load<8>(tokens + lane_id() / 4 * stride);
      memcpy(c, &token, 16);
    }
    multiply_add<T>(d, {w[0], v[0], w[1], v[1]}, {c[0], c[1]});
    multiply_add<T>(d, {w[2], v[2], w[3], v[3]}, {c[2], c[3]});
  }
  __device__ __forceinline__ void finish() {}
};

template <>
struct Products<float> {
  float d[4], sums[2][kMostRows] = {};
  __device__ __forceinline__ void add(const Vec<float, 4>& low, const Vec<float, 4>& high, const float* tokens,
                                      int stride, int rows) {
#pragma unroll
    for (int r = 0; r < kMostRows; ++r) {
      if (r >= rows) break;
      const Vec<float, 4> token = load<4>(tokens + r * stride);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[0][r] += low.at[i] * token.at[i];
        sums[1][r] += high.at[i] * token.at[i];
      }
    }
  }
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int r = 0; r < kMostRows; ++r) {
        const float sum = update::sum_over_lanes(sums[half][r], 4);
        if (r / 2 == lane_id() % 4) d[2 * half + r % 2] = sum;
      }
  }
};

// Some steps of W as they come from memory; beyond the matrix there are zeros.
template <class T>
struct Tile {
  Vec<T, kWide<T>> low[kSteps], high[kSteps];
  __device__ __forceinline__ void ask(const Project<T>& a, int output, int column, int last) {
    output += lane_id() / 4;
    column += lane_id() % 4 * kWide<T>;
    const T* at = a.weight + static_cast<int64_t>(output) * a.columns + column;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const bool there = column + i * kStep<T> < last;
      low[i] = high[i] = {};
      if (there && output < a.outputs) low[i] = load_once(at + i * kStep<T>);
      if (there && output + 8 < a.outputs) high[i] = load_once(at + static_cast<int64_t>(8) * a.columns + i * kStep<T>);
    }
  }
};

// Norms the tokens into shared memory.
template <class T>
__device__ __forceinline__ void norm(const Project<T>& a, const Shared<T>& shared, int stride) {
  const int groups = a.columns / a.group_size;
  for (int group = 0; group < groups; ++group) {
    float sums[kMostRows];
#pragma unroll
    for (int r = 0; r < kMostRows; ++r) {
      sums[r] = 0.0f;
      if (r >= a.rows) break;
      const float* x = a.x + static_cast<int64_t>(a.token(r)) * a.columns + group * a.group_size;
      for (int k = threadIdx.x * 4; k < a.group_size; k += kThreads * 4) {
        const Vec<float, 4> value = load<4>(x + k);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[r] += value.at[i] * value.at[i];
      }
    }
#pragma unroll
    for (int r = 0; r < kMostRows; ++r) {
      if (r >= a.rows) break;
      const float sum = sum_over_warp(sums[r]);
      if (lane_id() == 0) shared.sums[(r * groups + group) * kWarps + warp_id()] = sum;
    }
  }
  __syncthreads();
  const int filled = (a.columns + kStep<T> - 1) / kStep<T> * kStep<T>;
  for (int r = 0; r < a.rows; ++r) {
    const float* x = a.x + static_cast<int64_t>(a.token(r)) * a.columns;
    for (int k = threadIdx.x * 4; k < filled; k += kThreads * 4) {
      if (k >= a.columns) {
        store<4>(shared.tokens + r * stride + k, Vec<T, 4>{});
        continue;
      }
      const float* sums = shared.sums + (r * groups + k / a.group_size) * kWarps;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += sums[i];
      const float factor = reciprocal(sqrtf(sum / a.group_size + a.eps));
      const Vec<float, 4> value = load<4>(x + k), weight = load<4>(a.norm + k);
      Vec<T, 4> normed;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float y = value.at[i] * factor * weight.at[i];
        if (a.gate) y *= silu(a.gate[r * a.gate_stride + k + i]);
        normed.at[i] = from_float<T>(y);
      }
      store<4>(shared.tokens + r * stride + k, normed);
    }
  }
}

// Gives 16 outputs away: a thread has one output of one row of the batch, all its tokens.
template <class T>
__device__ __forceinline__ void finish(const Project<T>& a, const float* partials, int first) {
  const int seqlen = a.conv.channels ? a.conv.rows.seqlen : 1;
  const int output = first + threadIdx.x % kOutputs, row = threadIdx.x / kOutputs;
  if (output >= a.outputs || row >= a.rows / seqlen) return;
  const auto sum = [&](int t) {
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp)
      total += partials[(warp * kMostRows + row * seqlen + t) * kOutputs + threadIdx.x % kOutputs];
    return total;
  };
  const auto write = [&](int t, float value) {
    float* at = a.y + static_cast<int64_t>(row * seqlen + t) * a.outputs + output;
    *at = a.add ? *at + value : value;
  };
  const int channel = output - a.conv_first;
  if (channel >= 0 && channel < a.conv.channels)
    update::convolve(a.conv.rows, row, channel, a.conv.channels, a.conv.taps, true, a.conv.state, a.conv.weight,
                     a.conv.bias, sum, write);
  else
    for (int t = 0; t < seqlen; ++t) write(t, sum(t));
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 2 : 1) project(Project<T> a) {
  const Shared<T> shared(shared_memory(), a.columns / a.group_size);
  const int stride = row_stride<T>(a.columns), units = (a.outputs + kOutputs - 1) / kOutputs;
  // Each warp has a run of columns, in whole steps.
  const int steps = (a.columns + kStep<T> - 1) / kStep<T>, share = (steps + kWarps - 1) / kWarps * kStep<T>;
  const int begin = warp_id() * share, end = begin + share < a.columns ? begin + share : a.columns;
  int unit = blockIdx.x;
  Tile<T> next;
  next.ask(a, unit * kOutputs, begin, end);
  wait_for_previous();
  norm(a, shared, stride);
  __syncthreads();

  for (int side = 0; unit < units; side ^= 1) {
    const int first = unit * kOutputs;
    unit += gridDim.x;
    Products<T> products;
    int column = begin;
    do {
      const Tile<T> tile = next;
      const bool more = column + kSteps * kStep<T> < begin + share;
      const T* tokens = shared.tokens + column + lane_id() % 4 * kWide<T>;
      // While these are multiplied, those behind them are under way.
      if (more)
        next.ask(a, first, column + kSteps * kStep<T>, end);
      else if (unit < units)
        next.ask(a, unit * kOutputs, begin, end);
#pragma unroll
      for (int i = 0; i < kSteps; ++i)
        if (column + i * kStep<T> < end) products.add(tile.low[i], tile.high[i], tokens + i * kStep<T>, stride, a.rows);
      column += kSteps * kStep<T>;
    } while (column < begin + share);
    products.finish();
    float* partials = shared.partials + side * kWarps * kMostRows * kOutputs;
    float* own = partials + (warp_id() * kMostRows + lane_id() % 4 * 2) * kOutputs + lane_id() / 4;
    own[0] = products.d[0];
    own[kOutputs] = products.d[1];
    own[8] = products.d[2];
    own[kOutputs + 8] = products.d[3];
    __syncthreads();
    if (threadIdx.x < kOutputs * kMostRows) finish(a, partials, first);
  }
}

template <class X, class T>
__global__ void __launch_bounds__(kThreads) normalize(Normalize<X, T> a) {
  float* sums = reinterpret_cast<float*>(shared_memory());  // [2][kWarps]
  const int r = blockIdx.x;
  const int64_t token = (r / a.keep + 1) * a.seqlen - a.keep + r % a.keep;
  for (int first = 0, side = 0; first < a.columns; first += a.group_size, side ^= kWarps) {
    X* x = a.x + token * a.columns + first;
    float sum = 0.0f;
    for (int k = threadIdx.x; k < a.group_size; k += kThreads) {
      float value = to_float(x[k]);
      if (a.delta) {
        value += to_float(a.delta[token * a.columns + first + k]);
        x[k] = from_float<X>(value);
      }
      sum += value * value;
    }
    sum = sum_over_warp(sum);
    if (lane_id() == 0) sums[side + warp_id()] = sum;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) total += sums[side + i];
    const float factor = reciprocal(sqrtf(total / a.group_size + a.eps));
    for (int k = threadIdx.x; k < a.group_size; k += kThreads) {
      float y = to_float(x[k]) * factor * a.norm[first + k];
      if (a.gate) y *= silu(to_float(a.gate[r * a.gate_stride + first + k]));
      a.y[static_cast<int64_t>(r) * a.columns + first + k] = from_float<T>(y);
    }
  }
}

}  // namespace project

// How much shared memory a block needs; the kernel serves what fits.
template <class T>
size_t project_shared(const Project<T>& a) {
  return project::Shared<T>::bytes(a.rows, a.columns, a.columns / a.group_size);
}

template <class T>
void project_tokens(const Project<T>& a, int processors, bool chained, cudaStream_t stream);
template <class X, class T>
void normalize_tokens(const Normalize<X, T>& a, cudaStream_t stream);

}  // namespace vision_scan

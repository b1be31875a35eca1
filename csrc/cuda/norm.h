// RMS norm with a gate, forward and backward: see vision_scan/ops/reference/gated_rmsnorm.py.
//
// A team of threads takes a group of channels of a row: some lanes of a warp, a warp, or a block. It reads the group
// once, 16 bytes at a time, and holds it in registers while it adds up the squares. Backwards a team takes the same
// group of many rows, so that the sums for the weight stay in registers too; they are written once for each slice of
// the rows, and added up by the caller: the same bits on every run.
#pragma once

#include "parameters.h"

namespace vision_scan {

template <class T>
struct Norm {
  int rows, channels, group_size;
  int64_t x_stride, z_stride;  // from row to row; the channels of a row are contiguous
  float eps;
  bool norm_before_gate;
  const T *x, *z;  // z: or null
  Parameter<T> weight;
  T* y;  // (rows, channels)
};

template <class T>
struct NormGradients {
  const T* dy;     // (rows, channels)
  T *dx, *dz;      // (rows, channels); dz: null without z
  float* dweight;  // (slices, channels)
  int slices;
};

namespace norm {

constexpr int kMostGroup = 16384;  // channels of a group
constexpr int kMostThreads = 512;  // of a block
constexpr int kThreads = 128;      // of a block that holds several teams

// How a group is shared out: vectors of n numbers, `vectors` of them a thread (0: more than registers hold, so that
// they are read twice), `lanes` threads.
struct Shape {
  int n, vectors, lanes;
  __host__ int threads() const { return lanes > 32 ? lanes : kThreads; }
  __host__ int teams() const { return threads() / lanes; }  // of a block
};

template <class T>
Shape shape_of(const Norm<T>& a, bool aligned) {
  constexpr int whole = 16 / sizeof(T);
  const bool wide = aligned && a.group_size % whole == 0 && a.x_stride % whole == 0 && a.z_stride % whole == 0;
  const int n = wide ? whole : 1, count = a.group_size / n;
  if (count > 4 * kMostThreads) return {n, 0, kMostThreads};
  const int vectors = wide && count <= 32 ? 1 : wide && count <= 64 ? 2 : 4, needed = (count + vectors - 1) / vectors;
  int lanes = 1;
  while (lanes < needed && lanes < 32) lanes *= 2;
  return {n, vectors, needed > 32 ? (needed + 31) / 32 * 32 : lanes};
}

template <class T>
Shape shape_of(const Norm<T>& a) {
  constexpr int n = 16 / sizeof(T);
  return shape_of(a, is_aligned(a.x, n) && is_aligned(a.z, n) && is_aligned(a.y, n) && is_aligned(a.weight));
}
template <class T>
Shape shape_of(const Norm<T>& a, const NormGradients<T>& g) {
  constexpr int n = 16 / sizeof(T);
  return shape_of(a, is_aligned(a.x, n) && is_aligned(a.z, n) && is_aligned(a.weight) && is_aligned(g.dy, n) &&
                         is_aligned(g.dx, n) && is_aligned(g.dz, n));
}

// Sums over a team, for each of its threads. `shared` [warps][count] is not that of the sum before.
template <int count>
__device__ __forceinline__ void sum_over_team(float (&x)[count], int lanes, float* shared) {
#pragma unroll
  for (int mask = 16; mask; mask >>= 1)
    if (mask < lanes)
#pragma unroll
      for (int i = 0; i < count; ++i) x[i] += __shfl_xor_sync(kAllLanes, x[i], mask);
  if (lanes <= 32) return;
  if (lane_id() == 0)
    for (int i = 0; i < count; ++i) shared[warp_id() * count + i] = x[i];
  __syncthreads();
  for (int i = 0; i < count; ++i) x[i] = 0;
  for (int warp = 0; warp < lanes / 32; ++warp)
#pragma unroll
    for (int i = 0; i < count; ++i) x[i] += shared[warp * count + i];
}

// A thread's place in a team, and its vectors of the group.
template <int n, int vectors>
struct Place {
  static constexpr int kHeld = vectors ? vectors : 1;
  int team, lane, lanes, group_size;
  __device__ __forceinline__ Place(int lanes, int group_size)
      : team(blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes),
        lane(threadIdx.x % lanes),
        lanes(lanes),
        group_size(group_size) {}

  // Calls f(which register array holds it, its first channel) for each vector.
  template <class F>
  __device__ __forceinline__ void for_each(const F& f) const {
    if constexpr (vectors > 0) {
#pragma unroll
      for (int i = 0; i < vectors; ++i) {
        const int channel = (i * lanes + lane) * n;
        if (channel < group_size) f(i, channel);
      }
    } else {
      for (int channel = lane * n; channel < group_size; channel += lanes * n) f(0, channel);
    }
  }
};

template <class T, int n, int vectors>
__global__ void __launch_bounds__(kMostThreads) forward(Norm<T> a, int lanes) {
  const Place<n, vectors> p(lanes, a.group_size);
  const int groups = a.channels / a.group_size, first = p.team % groups * a.group_size;
  const bool there = p.team < a.rows * groups;
  const int64_t row = p.team / groups;
  const bool gate_first = a.z && !a.norm_before_gate;
  const T *x = a.x + row * a.x_stride + first, *z = a.z + row * a.z_stride + first;
  float v[p.kHeld][n];
  Packed<T, n> gate[p.kHeld];
  const auto read = [&](int i, int channel) {
    const Packed<T, n> numbers = load_packed<n>(x + channel);
    if (a.z) gate[i] = load_packed<n>(z + channel);
#pragma unroll
    for (int j = 0; j < n; ++j) v[i][j] = gate_first ? numbers[j] * silu(gate[i][j]) : numbers[j];
  };
  float squares[1] = {0};
  if (there)
    p.for_each([&](int i, int channel) {
      read(i, channel);
#pragma unroll
      for (int j = 0; j < n; ++j) squares[0] += v[i][j] * v[i][j];
    });
  sum_over_team(squares, lanes, reinterpret_cast<float*>(shared_memory()));
  if (!there) return;
  const float scale = 1 / sqrtf(squares[0] / a.group_size + a.eps);
  T* y = a.y + row * a.channels + first;
  p.for_each([&](int i, int channel) {
    if (!vectors) read(i, channel);
    float weight[n];
    a.weight.read(first + channel, weight);
    Vec<T, n> out;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float value = v[i][j] * scale * weight[j];
      out.at[j] = from_float<T>(a.z && !gate_first ? value * silu(gate[i][j]) : value);
    }
    store(y + channel, out);
  });
}

// With v = x silu(z) (or x), r = 1 / rms(v), y = v r w (silu(z)): dv = r (q - v r^2 mean(q v)), where q = dy w
// (silu(z)).
template <class T, int n, int vectors>
__global__ void __launch_bounds__(kMostThreads) backward(Norm<T> a, NormGradients<T> g, int lanes) {
  const Place<n, vectors> p(lanes, a.group_size);
  const int groups = a.channels / a.group_size, first = p.team % groups * a.group_size;
  const int slice = p.team / groups;
  const bool gate_first = a.z && !a.norm_before_gate, gate_last = a.z && a.norm_before_gate;
  float* shared = reinterpret_cast<float*>(shared_memory());
  float* sums_for_weight = shared + 2 * 2 * (kMostThreads / 32);  // [group_size] where registers do not hold them
  float dweight[p.kHeld][n] = {};
  if (!vectors)
    p.for_each([&](int, int channel) {
      for (int j = 0; j < n; ++j) sums_for_weight[channel + j] = 0;
    });
  // Each team of a warp comes to every sum, also one that has no row left.
  for (int pass = 0; pass * g.slices < a.rows; ++pass) {
    const int64_t row = static_cast<int64_t>(pass) * g.slices + slice;
    const bool there = slice < g.slices && row < a.rows;
    const T *x_row = a.x + row * a.x_stride + first, *z_row = a.z + row * a.z_stride + first;
    const T* dy_row = g.dy + row * a.channels + first;
    Packed<T, n> x[p.kHeld], z[p.kHeld], dy[p.kHeld];
    const auto read = [&](int i, int channel) {
      x[i] = load_packed<n>(x_row + channel);
      dy[i] = load_packed<n>(dy_row + channel);
      if (a.z) z[i] = load_packed<n>(z_row + channel);
    };
    float sums[2] = {0, 0};  // of v^2 and of q v
    if (there) {
      if (vectors) p.for_each(read);
      p.for_each([&](int i, int channel) {
        if (!vectors) read(i, channel);
        float weight[n];
        a.weight.read(first + channel, weight);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const float gate = a.z ? silu(z[i][j]) : 1.0f, v = gate_first ? x[i][j] * gate : x[i][j];
          sums[0] += v * v;
          sums[1] += dy[i][j] * weight[j] * (gate_last ? gate : 1.0f) * v;
        }
      });
    }
    sum_over_team(sums, lanes, shared + (pass & 1) * 2 * (kMostThreads / 32));
    if (!there) continue;
    const float r = 1 / sqrtf(sums[0] / a.group_size + a.eps), mean = sums[1] / a.group_size * r * r;
    p.for_each([&](int i, int channel) {
      if (!vectors) read(i, channel);
      x[i].forget();
      dy[i].forget();
      if (a.z) z[i].forget();
      float weight[n];
      a.weight.read(first + channel, weight);
      Vec<T, n> dx, dz;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const float u = a.z ? z[i][j] : 0.0f, half = sigmoid(u), gate = u * half;
        const float v = gate_first ? x[i][j] * gate : x[i][j], q = dy[i][j] * weight[j];
        const float dv = r * ((gate_last ? q * gate : q) - v * mean);
        dx.at[j] = from_float<T>(gate_first ? dv * gate : dv);
        dz.at[j] = from_float<T>((gate_first ? dv : q * r) * x[i][j] * half * (1 + u * (1 - half)));
        const float dw = dy[i][j] * v * r * (gate_last ? gate : 1.0f);
        if (vectors) dweight[i][j] += dw;
        else sums_for_weight[channel + j] += dw;
      }
      const int64_t at = row * a.channels + first + channel;
      store(g.dx + at, dx);
      if (a.z) store(g.dz + at, dz);
    });
  }
  if (slice >= g.slices) return;
  p.for_each([&](int i, int channel) {
    float* to = g.dweight + static_cast<int64_t>(slice) * a.channels + first + channel;
    for (int j = 0; j < n; ++j) to[j] = vectors ? dweight[i][j] : sums_for_weight[channel + j];
  });
}

}  // namespace norm

template <class T>
void norm_forward(const Norm<T>& a, cudaStream_t stream);
// Into how many slices the rows are best cut on a GPU with as many processors.
template <class T>
int norm_slices(const Norm<T>& a, int processors);
template <class T>
void norm_backward(const Norm<T>& a, const NormGradients<T>& g, cudaStream_t stream);

}  // namespace vision_scan

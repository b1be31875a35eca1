// Gated RMS norm, forward and backward: see vision_scan/ops/reference/gated_rmsnorm.py. A unit of work is a
// block of kNormRows rows.
#include "parallel.h"
#include "simd.h"

namespace vision_scan {
namespace SIMD_NAME {

// Calls f(row block, first row, end) on all threads.
template <typename F>
void for_each_row_block(const Norm& a, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / (kNormRows * a.channels));
  at::parallel_for(0, (a.rows + kNormRows - 1) / kNormRows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      f(block, block * kNormRows, std::min(a.rows, (block + 1) * kNormRows));
  });
}

inline Vec silu(Vec x) {
  return x * sigmoid(x);
}

// Runs f(offset of a vector, how many floats of it count) over a group of channels.
template <typename F>
void for_each_vector(int64_t size, const F& f) {
  for (int64_t c = 0; c < size; c += kWidth) f(c, size - c);
}

// What the norm divides by, as its inverse.
inline float inverse_root(const Norm& a, const float* x, const float* z) {
  Vec squares{};
  for_each_vector(a.group_size, [&](int64_t c, int64_t some) {
    Vec value = load_some(x + c, some);
    if (z && !a.norm_before_gate) value = value * silu(load_some(z + c, some));
    squares += value * value;
  });
  return 1.f / std::sqrt(sum(squares) / static_cast<float>(a.group_size) + a.eps);
}

// One row: x, z (or null) and y point to its channel 0.
inline void normalize_row(const Norm& a, const float* x, const float* z, float* y) {
  for (int64_t group = 0; group < a.channels; group += a.group_size) {
    const float* gate = z ? z + group : nullptr;
    const Vec scale = splat(inverse_root(a, x + group, gate));
    for_each_vector(a.group_size, [&](int64_t c, int64_t some) {
      Vec value = load_some(x + group + c, some) * scale * load_some(a.weight + group + c, some);
      if (gate) value = value * silu(load_some(gate + c, some));
      store_some(y + group + c, value, some);
    });
  }
}

void norm(const Norm& a) {
  for_each_row_block(a, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      normalize_row(a, a.x + row * a.x_stride, a.z ? a.z + row * a.z_stride : nullptr, a.y + row * a.channels);
    }
  });
}

// With v = x silu(z) (or x), r = 1 / rms(v), y = v r w (silu(z)): dv = r (q - v r^2 mean(q v)), where q = dy w
// (silu(z)).
void norm_backward(const Norm& a, const NormGradients& g) {
  for_each_row_block(a, [&](int64_t block, int64_t first, int64_t end) {
    float* dweight = g.dweight + block * a.channels;
    for (int64_t row = first; row < end; ++row) {
      for (int64_t group = 0; group < a.channels; group += a.group_size) {
        const int64_t at = row * a.channels + group;
        const float *x = a.x + row * a.x_stride + group, *z = a.z ? a.z + row * a.z_stride + group : nullptr;
        const float *dy = g.dy + at, *weight = a.weight + group;
        const float r = inverse_root(a, x, z);
        const bool gate_first = z && !a.norm_before_gate, gate_last = z && a.norm_before_gate;
        Vec product{};
        for_each_vector(a.group_size, [&](int64_t c, int64_t some) {
          const Vec gate = z ? silu(load_some(z + c, some)) : splat(1.f);
          product += load_some(dy + c, some) * load_some(weight + c, some) * load_some(x + c, some) * gate;
        });
        const Vec scale = splat(r), mean = splat(sum(product) / static_cast<float>(a.group_size) * r * r);
        for_each_vector(a.group_size, [&](int64_t c, int64_t some) {
          const Vec xs = load_some(x + c, some), d = load_some(dy + c, some), w = load_some(weight + c, some);
          const Vec zs = z ? load_some(z + c, some) : Vec{};
          const Vec half = sigmoid(zs), gate = z ? zs * half : splat(1.f);
          const Vec slope = half * (splat(1.f) + zs * (splat(1.f) - half));
          const Vec v = gate_first ? xs * gate : xs;
          const Vec outer = gate_last ? gate : splat(1.f);
          const Vec dv = scale * (d * w * outer - v * mean);
          store_some(g.dx + at + c, gate_first ? dv * gate : dv, some);
          if (z) store_some(g.dz + at + c, (gate_first ? dv * xs : d * w * xs * scale) * slope, some);
          float* dw = dweight + group + c;
          store_some(dw, load_some(dw, some) + d * v * scale * outer, some);
        });
      }
    }
  });
}

}  // namespace SIMD_NAME
}  // namespace vision_scan

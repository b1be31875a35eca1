// Decoding: a few tokens onto states that are updated in place. See the functions of these names in
// vision_scan/ops/reference.
#include "parallel.h"
#include "simd.h"

namespace vision_scan {
namespace SIMD_NAME {

// Calls f(t, resets) for the real tokens of a row; `resets` says that a new segment begins.
template <typename F>
void for_each_real(const Update& a, int64_t row, const F& f) {
  int64_t last = -1;
  for (int64_t t = 0; t < a.seqlen; ++t) {
    const int64_t segment = a.seq_idx ? a.seq_idx[row * a.seqlen + t] : 0;
    if (segment < 0) continue;
    f(t, last >= 0 && segment != last);
    last = segment;
  }
}

inline int64_t slot_of(const Update& a, int64_t row) {
  return a.slots ? a.slots[row] : row;
}

// S = decay S + B u over one row of the state; returns C . S.
inline float advance_row(float* S, float decay, float u, const float* B, const float* C, int64_t d_state) {
  Vec total{};
  int64_t n = 0;
  for (; n + kWidth <= d_state; n += kWidth) {
    const Vec s = splat(decay) * load(S + n) + splat(u) * load(B + n);
    store(S + n, s);
    total += s * load(C + n);
  }
  float y = sum(total);
  for (; n < d_state; ++n) {
    S[n] = decay * S[n] + u * B[n];
    y += S[n] * C[n];
  }
  return y;
}

void ssd_update(const SsdUpdate& a) {
  const int64_t size = a.headdim * a.d_state, per_group = a.nheads / a.ngroups;
  const int64_t grain = std::max<int64_t>(1, 16384 / (size * a.update.seqlen));
  at::parallel_for(0, a.update.rows * a.nheads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / a.nheads, head = unit % a.nheads, slot = slot_of(a.update, row);
      if (slot < 0) continue;
      float* S = a.state + (slot * a.nheads + head) * size;
      for_each_real(a.update, row, [&](int64_t t, bool resets) {
        if (resets) std::memset(S, 0, sizeof(float) * size);
        const int64_t token = row * a.update.seqlen + t, at = token * a.nheads + head;
        const int64_t shared = (token * a.ngroups + head / per_group) * a.d_state;
        float step = a.dt[at] + (a.dt_bias ? a.dt_bias[head] : 0.f);
        if (a.dt_softplus && step <= 20.f) step = std::log1p(std::exp(step));
        step = std::min(std::max(step, a.dt_min), a.dt_max);
        const float decay = std::exp(step * a.A[head]);
        for (int64_t p = 0; p < a.headdim; ++p) {
          const float x = a.x[at * a.headdim + p];
          float y = advance_row(S + p * a.d_state, decay, step * x, a.B + shared, a.C + shared, a.d_state);
          if (a.skip_dims) y += x * a.D[a.skip_dims == 1 ? head : head * a.headdim + p];
          if (a.z) {
            const float z = a.z[at * a.headdim + p];
            y *= z / (1.f + std::exp(-z));
          }
          a.y[at * a.headdim + p] = y;
        }
      });
    }
  });
}

void selective_update(const SelectiveUpdate& a) {
  const int64_t seqlen = a.update.seqlen, per_group = a.channels / a.ngroups;
  const int64_t grain = std::max<int64_t>(1, 4096 / (a.d_state * seqlen));
  at::parallel_for(0, a.update.rows * a.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / a.channels, channel = unit % a.channels, slot = slot_of(a.update, row);
      if (slot < 0) continue;
      float* h = a.state + (slot * a.channels + channel) * a.d_state;
      const float* A = a.A + channel * a.d_state;
      const int64_t shared = (row * a.ngroups + channel / per_group) * a.d_state * seqlen;
      for_each_real(a.update, row, [&](int64_t t, bool resets) {
        if (resets) std::memset(h, 0, sizeof(float) * a.d_state);
        const int64_t at = unit * seqlen + t;
        float dt = a.dt[at] + (a.dt_bias ? a.dt_bias[channel] : 0.f);
        if (a.dt_softplus && dt <= 20.f) dt = std::log1p(std::exp(dt));
        float y = a.D ? a.D[channel] * a.u[at] : 0.f;
        for (int64_t n = 0; n < a.d_state; ++n) {
          h[n] = std::exp(dt * A[n]) * h[n] + dt * a.u[at] * a.B[shared + n * seqlen + t];
          y += h[n] * a.C[shared + n * seqlen + t];
        }
        if (a.z) y *= a.z[at] / (1.f + std::exp(-a.z[at]));
        a.y[at] = y;
      });
    }
  });
}

void conv_update(const ConvUpdate& a) {
  const int64_t tail = a.width - 1;
  const int64_t grain = std::max<int64_t>(1, 16384 / (a.width * a.update.seqlen));
  at::parallel_for(0, a.update.rows * a.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / a.channels, channel = unit % a.channels, slot = slot_of(a.update, row);
      if (slot < 0) continue;
      float* window = a.state + (slot * a.channels + channel) * tail;
      const float* weight = a.weight + channel * a.width;
      for_each_real(a.update, row, [&](int64_t t, bool resets) {
        if (resets) std::memset(window, 0, sizeof(float) * tail);
        const float x = a.x[unit * a.update.seqlen + t];
        float y = a.bias ? a.bias[channel] : 0.f;
        for (int64_t tap = 0; tap < tail; ++tap) y += weight[tap] * window[tap];
        y += weight[tail] * x;
        if (a.silu) y = y / (1.f + std::exp(-y));
        for (int64_t tap = 0; tap + 1 < tail; ++tap) window[tap] = window[tap + 1];
        if (tail > 0) window[tail - 1] = x;
        a.y[unit * a.update.seqlen + t] = y;
      });
    }
  });
}

}  // namespace SIMD_NAME
}  // namespace vision_scan

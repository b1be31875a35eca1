// A decoding step: a few tokens through all layers in one call. The threads share the work of each stage and meet
// behind it; what is small, as norms, each does for itself. See steps.h for the arguments and cobra/lm for the
// layers, whose modules say the same more slowly.
#include "norm.h"
#include "update.h"
#include "weights.h"

namespace vision_scan {
namespace SIMD_NAME {

inline float get(const Numbers& numbers, int64_t i) {
  if (numbers.half) return to_float(static_cast<const uint16_t*>(numbers.data)[i]);
  return static_cast<const float*>(numbers.data)[i];
}

inline void set(const Numbers& numbers, int64_t i, float value) {
  if (numbers.half)
    static_cast<uint16_t*>(numbers.data)[i] = to_half(value);
  else
    static_cast<float*>(numbers.data)[i] = value;
}

inline bool is_real(const Decode& s, int64_t row) {
  return s.real == nullptr || s.real[row];
}

inline float softplus(float x) {
  return x > 20.f ? x : std::log1p(std::exp(x));
}

// out (rows, d) = x / rms(x) * weight
inline void normalize(const float* x, const float* weight, float eps, int64_t rows, int64_t d, float* out) {
  Norm a{};
  a.group_size = a.channels = d;
  a.eps = eps;
  a.weight = weight;
  for (int64_t row = 0; row < rows; ++row) normalize_row(a, x + row * d, nullptr, out + row * d);
}

template <typename F>
void for_each_vector_of(float* x, int64_t count, const F& f) {
  for (int64_t c = 0; c < count; c += kWidth) store_some(x + c, f(load_some(x + c, count - c)), count - c);
}

// The convolution of the channels in `range` of all rows, in place; x (batch, seqlen, x_stride) begins at channel 0.
template <typename Stored, int kTaps>
void convolve_window(const Decode& s, const Numbers& weight, const Numbers& bias, const Numbers& state,
                     int64_t channels, int64_t taps, Range range, float* x, int64_t x_stride) {
  const auto read = [](Stored value) {
    if constexpr (std::is_same_v<Stored, float>)
      return value;
    else
      return to_float(value);
  };
  const int64_t tail = (kTaps ? kTaps : taps) - 1;
  const Stored* weights = static_cast<const Stored*>(weight.data);
  const Stored* biases = static_cast<const Stored*>(bias.data);
  for (int64_t row = 0; row < s.batch; ++row) {
    if (!is_real(s, row)) continue;
    Stored* windows = static_cast<Stored*>(state.data) + row * channels * tail;
    for (int64_t t = 0; t < s.seqlen; ++t) {
      float* values = x + (row * s.seqlen + t) * x_stride;
      for (int64_t c = range.begin; c < range.end; ++c) {
        Stored* window = windows + c * tail;
        const Stored* w = weights + c * (tail + 1);
        float y = read(biases[c]);
        for (int64_t tap = 0; tap < tail; ++tap) y += read(w[tap]) * read(window[tap]);
        y += read(w[tail]) * values[c];
        for (int64_t tap = 0; tap + 1 < tail; ++tap) window[tap] = window[tap + 1];
        if (tail > 0) {
          if constexpr (std::is_same_v<Stored, float>)
            window[tail - 1] = values[c];
          else
            window[tail - 1] = to_half(values[c]);
        }
        values[c] = y;
      }
      for_each_vector_of(values + range.begin, range.end - range.begin, [](Vec v) { return silu(v); });
    }
  }
}

inline void convolve(const Decode& s, const Numbers& weight, const Numbers& bias, const Numbers& state,
                     int64_t channels, int64_t taps, Range range, float* x, int64_t x_stride) {
  if (range.begin >= range.end) return;
  if (taps == 4 && state.half)
    convolve_window<uint16_t, 4>(s, weight, bias, state, channels, taps, range, x, x_stride);
  else if (taps == 4)
    convolve_window<float, 4>(s, weight, bias, state, channels, taps, range, x, x_stride);
  else if (state.half)
    convolve_window<uint16_t, 0>(s, weight, bias, state, channels, taps, range, x, x_stride);
  else
    convolve_window<float, 0>(s, weight, bias, state, channels, taps, range, x, x_stride);
}

inline Range overlap(Range range, int64_t begin, int64_t end) {
  return {std::max(range.begin, begin) - begin, std::min(range.end, end) - begin};
}

// projected: (rows, z | x | B | C | dt), y (rows, d_inner)
inline void advance_heads(const Mamba2Layer& l, const Decode& s, Member& me, const float* projected, float* y) {
  const int64_t d_inner = l.nheads * l.headdim, groups = l.ngroups * l.d_state, width = l.in_proj.out;
  const Range units = me.share(s.batch * l.nheads);
  for (int64_t unit = units.begin; unit < units.end; ++unit) {
    const int64_t row = unit / l.nheads, head = unit % l.nheads;
    if (!is_real(s, row)) continue;
    const int64_t group = head / (l.nheads / l.ngroups) * l.d_state;
    const float A = -std::exp(l.A_log[head]);
    float* S = l.ssm + unit * l.headdim * l.d_state;
    for (int64_t t = 0; t < s.seqlen; ++t) {
      const int64_t token = row * s.seqlen + t;
      const float* in = projected + token * width;
      const float* x = in + d_inner + head * l.headdim;
      const float* B = in + 2 * d_inner + group;
      const float* C = B + groups;
      const float raw = softplus(in[2 * d_inner + 2 * groups + head] + l.dt_bias[head]);
      const float dt = std::min(std::max(raw, l.dt_min), l.dt_max), decay = std::exp(dt * A);
      float* out = y + token * d_inner + head * l.headdim;
      for (int64_t p = 0; p < l.headdim; ++p)
        out[p] = advance_row(S + p * l.d_state, decay, dt * x[p], B, C, l.d_state) + l.D[head] * x[p];
    }
  }
}

inline void step(const Mamba2Layer& l, const Decode& s, Member& me, const float* x) {
  const int64_t rows = s.rows(), d_inner = l.nheads * l.headdim, width = l.in_proj.out;
  const int64_t channels = d_inner + 2 * l.ngroups * l.d_state;
  float* projected = s.shared;
  float* y = projected + rows * width;
  const Range share = me.share(width, kPackedRows);
  multiply(l.in_proj, share, x, rows, projected, width, me);
  convolve(s, l.conv_weight, l.conv_bias, l.conv, channels, l.d_conv, overlap(share, d_inner, d_inner + channels),
           projected + d_inner, width);
  me.meet();
  advance_heads(l, s, me, projected, y);
  me.meet();
  Norm norm{};
  norm.channels = d_inner;
  norm.group_size = d_inner / l.ngroups;
  norm.eps = l.eps;
  norm.norm_before_gate = l.norm_before_gate;
  norm.weight = l.norm;
  float* gated = me.scratch(1, rows * d_inner);
  for (int64_t row = 0; row < rows; ++row)
    normalize_row(norm, y + row * d_inner, projected + row * width, gated + row * d_inner);
  multiply<true>(l.out_proj, me.share(s.d_model, kPackedRows), gated, rows, s.hidden, s.d_model, me);
}

// h = exp(dt A) h + dt B u for the channels in `range`, y = (C . h + D u) silu(z); projected: (rows, u | z), dbc
// (rows, dt_rank | B | C), y (rows, d_inner) holds dt before the bias.
inline void advance_channels(const Mamba1Layer& l, const Decode& s, Range range, const float* projected,
                             const float* dbc, float* y) {
  const int64_t width = 2 * l.d_inner, dbc_width = l.x_proj.out;
  for (int64_t row = 0; row < s.batch; ++row) {
    if (!is_real(s, row)) continue;
    for (int64_t t = 0; t < s.seqlen; ++t) {
      const int64_t token = row * s.seqlen + t;
      const float* B = dbc + token * dbc_width + l.dt_rank;
      const float* C = B + l.d_state;
      float* out = y + token * l.d_inner;
      const float* u = projected + token * width;
      for (int64_t c = range.begin; c < range.end; ++c) {
        const float dt = softplus(out[c] + l.dt_bias[c]);
        float* h = l.ssm + (row * l.d_inner + c) * l.d_state;
        Vec total{};
        for (int64_t n = 0; n < l.d_state; n += kWidth) {
          const int64_t some = l.d_state - n;
          const Vec decay = exp(splat(-dt) * exp(load_some(l.A_log + c * l.d_state + n, some)));
          const Vec value = decay * load_some(h + n, some) + splat(dt * u[c]) * load_some(B + n, some);
          store_some(h + n, value, some);
          total += value * load_some(C + n, some);
        }
        out[c] = sum(total) + l.D[c] * u[c];
      }
      for (int64_t c = range.begin; c < range.end; c += kWidth) {
        const int64_t some = range.end - c;
        store_some(out + c, load_some(out + c, some) * silu(load_some(u + l.d_inner + c, some)), some);
      }
    }
  }
}

inline void step(const Mamba1Layer& l, const Decode& s, Member& me, const float* x) {
  const int64_t rows = s.rows(), width = 2 * l.d_inner, dbc_width = l.x_proj.out;
  float* projected = s.shared;
  float* dbc = projected + rows * width;
  float* y = dbc + rows * dbc_width;
  const Range share = me.share(width, kPackedRows);
  multiply(l.in_proj, share, x, rows, projected, width, me);
  convolve(s, l.conv_weight, l.conv_bias, l.conv, l.d_inner, l.d_conv, overlap(share, 0, l.d_inner), projected,
           width);
  me.meet();
  float* u = me.scratch(1, rows * l.d_inner);
  for (int64_t row = 0; row < rows; ++row)
    std::memcpy(u + row * l.d_inner, projected + row * width, sizeof(float) * l.d_inner);
  multiply(l.x_proj, me.share(dbc_width, kPackedRows), u, rows, dbc, dbc_width, me);
  me.meet();
  float* low_rank = me.scratch(2, rows * l.dt_rank);
  for (int64_t row = 0; row < rows; ++row)
    std::memcpy(low_rank + row * l.dt_rank, dbc + row * dbc_width, sizeof(float) * l.dt_rank);
  const Range channels = me.share(l.d_inner, kPackedRows);
  multiply(l.dt_proj, channels, low_rank, rows, y, l.d_inner, me);
  advance_channels(l, s, channels, projected, dbc, y);
  me.meet();
  multiply<true>(l.out_proj, me.share(s.d_model, kPackedRows), y, rows, s.hidden, s.d_model, me);
}

// Rotates the halves of a head to `position`, as `rotate` in cobra/lm/attention.py.
inline void rotate(float* head, int64_t headdim, float theta, int64_t position) {
  if (theta == 0.f) return;
  const int64_t half = headdim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float frequency = std::pow(theta, -static_cast<float>(i) / static_cast<float>(half));
    const float angle = static_cast<float>(position) * frequency;
    const float cosine = std::cos(angle), sine = std::sin(angle), first = head[i], second = head[i + half];
    head[i] = first * cosine - second * sine;
    head[i + half] = second * cosine + first * sine;
  }
}

// The query heads of one row that share a key head attend to the cache and to the new key and value, which are
// written into it. q (heads, headdim) rotated, k and v (headdim); y (heads, headdim).
template <typename Stored>
void attend(const AttentionLayer& l, int64_t cache, int64_t filled, int64_t slot, const float* q, const float* k,
            const float* v, int64_t heads, float* y, Member& me) {
  const int64_t d = l.headdim;
  Stored* keys = static_cast<Stored*>(l.k.data) + cache * l.slots * d;
  Stored* values = static_cast<Stored*>(l.v.data) + cache * l.slots * d;
  for (int64_t i = 0; i < d; ++i) {
    set({keys, l.k.half}, slot * d + i, k[i]);
    set({values, l.v.half}, slot * d + i, v[i]);
  }
  float* scores = me.scratch(4, heads * filled);
  const float scale = 1.f / std::sqrt(static_cast<float>(d));
  std::vector<float> largest(heads, -std::numeric_limits<float>::infinity()), totals(heads, 0.f);
  for (int64_t j = 0; j < filled; ++j)
    for (int64_t h = 0; h < heads; ++h) {
      Vec total{};
      for (int64_t i = 0; i < d; i += kWidth)
        total += load_some(keys + j * d + i, d - i) * load_some(q + h * d + i, d - i);
      const float score = sum(total) * scale;
      scores[h * filled + j] = score;
      largest[h] = std::max(largest[h], score);
    }
  for (int64_t h = 0; h < heads; ++h) {
    float* row = scores + h * filled;
    const Vec shift = splat(largest[h]);
    for_each_vector_of(row, filled, [&](Vec v) { return exp(v - shift); });
    for (int64_t j = 0; j < filled; ++j) totals[h] += row[j];
  }
  std::memset(y, 0, sizeof(float) * heads * d);
  for (int64_t j = 0; j < filled; ++j)
    for (int64_t h = 0; h < heads; ++h) {
      const Vec weight = splat(scores[h * filled + j] / totals[h]);
      for (int64_t i = 0; i < d; i += kWidth) {
        float* out = y + h * d + i;
        store_some(out, load_some(out, d - i) + weight * load_some(values + j * d + i, d - i), d - i);
      }
    }
}

inline void step(const AttentionLayer& l, const Decode& s, Member& me, const float* x) {
  const int64_t d = l.headdim, per_key = l.num_heads / l.num_kv_heads;
  const int64_t queries = l.num_heads * d, keys = l.num_kv_heads * d;
  float* q = s.shared;
  float* k = q + s.batch * queries;
  float* v = k + s.batch * keys;
  float* y = v + s.batch * keys;
  multiply(l.q_proj, me.share(queries, kPackedRows), x, s.batch, q, queries, me);
  multiply(l.k_proj, me.share(keys, kPackedRows), x, s.batch, k, keys, me);
  multiply(l.v_proj, me.share(keys, kPackedRows), x, s.batch, v, keys, me);
  me.meet();
  const Range units = me.share(s.batch * l.num_kv_heads);
  for (int64_t unit = units.begin; unit < units.end; ++unit) {
    const int64_t row = unit / l.num_kv_heads, first = unit % l.num_kv_heads * per_key;
    float* out = y + row * queries + first * d;
    if (!is_real(s, row)) {
      std::memset(out, 0, sizeof(float) * per_key * d);
      continue;
    }
    const int64_t position = s.starts[row], slot = position % l.slots, filled = std::min(position + 1, l.slots);
    float* query = q + row * queries + first * d;
    float* key = k + unit * d;
    rotate(key, d, l.rope_theta, position);
    for (int64_t h = 0; h < per_key; ++h) rotate(query + h * d, d, l.rope_theta, position);
    if (l.k.half)
      attend<uint16_t>(l, unit, filled, slot, query, key, v + unit * d, per_key, out, me);
    else
      attend<float>(l, unit, filled, slot, query, key, v + unit * d, per_key, out, me);
    if (first == 0) l.position[row * l.slots + slot] = position;
  }
  me.meet();
  multiply<true>(l.o_proj, me.share(s.d_model, kPackedRows), y, s.batch, s.hidden, s.d_model, me);
}

inline void step(const MlpLayer& l, const Decode& s, Member& me, const float* x) {
  const int64_t rows = s.rows(), d_ff = l.gate_proj.out;
  float* gated = s.shared;
  float* up = me.scratch(1, rows * d_ff);
  const Range share = me.share(d_ff, kPackedRows);
  multiply(l.gate_proj, share, x, rows, gated, d_ff, me);
  multiply(l.up_proj, share, x, rows, up, d_ff, me);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = share.begin; c < share.end; c += kWidth) {
      float* gate = gated + row * d_ff + c;
      const int64_t some = share.end - c;
      store_some(gate, silu(load_some(gate, some)) * load_some(up + row * d_ff + c, some), some);
    }
  me.meet();
  multiply<true>(l.down_proj, me.share(s.d_model, kPackedRows), gated, rows, s.hidden, s.d_model, me);
}

inline void step_all(const Decode& s, Member& me) {
  const int64_t rows = s.rows();
  float* x = me.scratch(0, rows * s.d_model);
  for (int64_t i = 0; i < s.num_layers; ++i) {
    const Layer& layer = s.layers[i];
    normalize(s.hidden, layer.norm, layer.eps, rows, s.d_model, x);
    switch (layer.kind) {
      case Layer::mamba2:
        step(layer.as_mamba2, s, me, x);
        break;
      case Layer::mamba1:
        step(layer.as_mamba1, s, me, x);
        break;
      case Layer::attention:
        step(layer.as_attention, s, me, x);
        break;
      case Layer::mlp:
        step(layer.as_mlp, s, me, x);
        break;
    }
    me.meet();
  }
  for (int64_t row = 0; row < s.batch; ++row)
    normalize(s.hidden + ((row + 1) * s.seqlen - s.keep) * s.d_model, s.norm, s.eps, s.keep, s.d_model,
              x + row * s.keep * s.d_model);
  multiply(s.head, me.share(s.head.out, kPackedRows), x, s.batch * s.keep, s.logits, s.head.out, me);
}

void decode(const Decode& s) {
  // Members run side by side only in a region of their own, and only OpenMP promises that they do.
#if AT_PARALLEL_OPENMP
  const int64_t parts = at::in_parallel_region() ? 1 : at::get_num_threads();
#else
  const int64_t parts = 1;
#endif
  Barrier barrier(parts);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    Member me(begin, end, parts, &barrier);
    step_all(s, me);
  });
}

}  // namespace SIMD_NAME
}  // namespace vision_scan

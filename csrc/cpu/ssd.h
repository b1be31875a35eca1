// Mamba-2's scan, forward and backward: see vision_scan/ops/reference/ssd.py for the formulas.
//
// A unit of work is a row and a block of heads of one group, which share B and C; it goes through its tokens in
// chunks of kChunk. Letters: e[i] = decay from the chunk's entry to token i, f[j] = decay from token j to the
// chunk's end, S = state as (d_state, headdim), G = C B^T, W = G * L, L[i][j] = decay from j to i, Xd = dt x.
#include "rows.h"
#include "simd.h"

namespace vision_scan {
namespace SIMD_NAME {

constexpr int kChunk = 64;
constexpr int kTriangle = 8;  // rows of W that are multiplied with the same number of columns

struct Sizes {
  int headdim, d_state, p, n;  // p, n: padded to whole vectors

  explicit Sizes(const Ssd& a)
      : headdim(static_cast<int>(a.headdim)),
        d_state(static_cast<int>(a.d_state)),
        p(padded(headdim)),
        n(padded(d_state)) {}
};

// Scratch memory of one thread.
class Buffer {
 public:
  float* take(int64_t count) {
    pieces_.emplace_back(count);
    return pieces_.back().data();
  }

 private:
  std::vector<Floats> pieces_;
};

// What the heads of a block share in a chunk.
struct SharedChunk {
  float *B, *C, *Bt, *G;  // (kChunk, n) twice, (n, kChunk), (kChunk, kChunk)

  SharedChunk(Buffer& buffer, const Sizes& s)
      : B(buffer.take(kChunk * s.n)),
        C(buffer.take(kChunk * s.n)),
        Bt(buffer.take(s.n * kChunk)),
        G(buffer.take(kChunk * kChunk)) {}

  void read(const Ssd& a, const Sizes& s, const Row& row, int64_t begin, int len, int64_t group) {
    for (int i = 0; i < len; ++i) {
      const float* from_B = a.B + row.offset(a.tokens, begin + i, a.B_stride) + group * a.d_state;
      const float* from_C = a.C + row.offset(a.tokens, begin + i, a.C_stride) + group * a.d_state;
      std::memcpy(B + i * s.n, from_B, sizeof(float) * s.d_state);
      std::memcpy(C + i * s.n, from_C, sizeof(float) * s.d_state);
    }
  }

  void multiply(const Sizes& s, int len) {
    std::memset(Bt, 0, sizeof(float) * s.n * kChunk);
    transpose(len, s.d_state, B, s.n, Bt, kChunk);
    std::memset(G, 0, sizeof(float) * kChunk * kChunk);
    for (int i = 0; i < len; i += kTriangle) {
      const int rows = std::min(kTriangle, len - i);
      multiply_add(rows, padded(i + rows), s.d_state, C + i * s.n, s.n, 1, Bt, kChunk, G + i * kChunk, kChunk);
    }
  }
};

// What a head knows of a chunk.
struct HeadChunk {
  float *X, *Xd, *L, *W, *Bs, *Cs;  // (kChunk, p) twice, (kChunk, kChunk) twice, f B and e C (kChunk, n)
  float raw[kChunk], step[kChunk], dt[kChunk], e[kChunk], f[kChunk];  // raw -> softplus -> clamped
  double total[kChunk];
  float through;  // decay of the whole chunk

  HeadChunk(Buffer& buffer, const Sizes& s)
      : X(buffer.take(kChunk * s.p)),
        Xd(buffer.take(kChunk * s.p)),
        L(buffer.take(kChunk * kChunk)),
        W(buffer.take(kChunk * kChunk)),
        Bs(buffer.take(kChunk * s.n)),
        Cs(buffer.take(kChunk * s.n)) {}

  void read(const Ssd& a, const Sizes& s, const Row& row, int64_t begin, int len, int64_t head) {
    const int64_t parameter = row.list * a.nheads + head;
    const float bias = a.dt_bias ? a.dt_bias[parameter] : 0.f, A = a.A[parameter];
    const float* channels = a.x + head * a.headdim;
    double sum = 0;
    std::memset(raw, 0, sizeof raw);
    for (int i = 0; i < len; ++i)
      raw[i] = a.dt[row.offset(a.tokens, begin + i, a.dt_stride) + head] + bias;
    for (int i = 0; i < kChunk; i += kWidth) store(step + i, a.dt_softplus ? softplus(load(raw + i)) : load(raw + i));
    for (int i = 0; i < len; ++i) {
      dt[i] = std::min(std::max(step[i], a.dt_min), a.dt_max);
      sum += dt[i] * A;
      total[i] = sum;
      const int64_t ahead = begin + std::min<int64_t>(i + kAhead, len - 1);
      prefetch(channels + row.offset(a.tokens, ahead, a.x_stride), sizeof(float) * a.headdim);
      const float* x = channels + row.offset(a.tokens, begin + i, a.x_stride);
      const Vec by = splat(dt[i]);
      for (int p = 0; p < s.p; p += kWidth) {
        const Vec value = load_some(x + p, s.headdim - p);
        store(X + i * s.p + p, value);
        store(Xd + i * s.p + p, value * by);
      }
    }
    float differences[kChunk];
    const auto exponentials = [&](float* out) {
      for (int i = 0; i < len; i += kWidth) store(out + i, exp(load(differences + i)));
    };
    std::memset(differences, 0, sizeof differences);
    for (int i = 0; i < len; ++i) differences[i] = static_cast<float>(total[i]);
    exponentials(e);
    for (int i = 0; i < len; ++i) differences[i] = static_cast<float>(total[len - 1] - total[i]);
    exponentials(f);
    through = e[len - 1];
  }

  // L and W = G * L, zero above the diagonal.
  void weigh(const float* G, int len) {
    alignas(64) float differences[kChunk];
    for (int i = 0; i < len; ++i) {
      const int end = padded(i + 1);
      for (int j = 0; j <= i; ++j) differences[j] = static_cast<float>(total[i] - total[j]);
      for (int j = i + 1; j < end; ++j) differences[j] = -std::numeric_limits<float>::infinity();
      float* l = L + i * kChunk;
      float* w = W + i * kChunk;
      for (int j = 0; j < end; j += kWidth) {
        const Vec decay = exp(load(differences + j));
        store(l + j, decay);
        store(w + j, decay * load(G + i * kChunk + j));
      }
      for (int j = end; j < kChunk; j += kWidth) {
        store(l + j, Vec{});
        store(w + j, Vec{});
      }
    }
  }

  void scale(const SharedChunk& shared, const Sizes& s, int len) {
    for (int i = 0; i < len; ++i) {
      const Vec to_end = splat(f[i]), from_entry = splat(e[i]);
      for (int n = 0; n < s.n; n += kWidth) {
        store(Bs + i * s.n + n, to_end * load(shared.B + i * s.n + n));
        store(Cs + i * s.n + n, from_entry * load(shared.C + i * s.n + n));
      }
    }
  }

  // S = through S + (f B)^T Xd
  void advance(const Sizes& s, int len, float* S) const {
    scale_by(S, through, int64_t{s.d_state} * s.p);
    multiply_add(s.d_state, s.p, len, Bs, 1, s.n, Xd, s.p, S, s.p);
  }

  static void scale_by(float* values, float factor, int64_t count) {
    const Vec by = splat(factor);
    for (int64_t i = 0; i < count; i += kWidth)
      store(values + i, by * load(values + i));
  }
};

// D of a head from its dimension p on.
inline Vec skip_weight(const Ssd& a, int64_t parameter, int p) {
  if (a.skip_dims == 0) return Vec{};
  if (a.skip_dims == 1) return splat(a.D[parameter]);
  return load_some(a.D + parameter * a.headdim + p, a.headdim - p);
}

inline void load_state(const float* from, const Sizes& s, float* S) {
  std::memset(S, 0, sizeof(float) * s.d_state * s.p);
  if (from) transpose(s.headdim, s.d_state, from, s.d_state, S, s.p);
}

inline void store_state(const float* S, const Sizes& s, float* to) {
  transpose(s.d_state, s.headdim, S, s.p, to, s.d_state);
}

// Calls f(row number, group, first head, number of heads) for every unit of work, on all threads.
template <typename F>
void for_each_unit(const Ssd& a, const F& f) {
  const int64_t per_group = a.nheads / a.ngroups;
  const int64_t blocks = (per_group + kHeadBlock - 1) / kHeadBlock;
  at::parallel_for(0, a.tokens.rows() * a.ngroups * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit % blocks, group = unit / blocks % a.ngroups;
      const int64_t first = block * kHeadBlock;
      f(unit / blocks / a.ngroups, group, group * per_group + first, std::min(kHeadBlock, per_group - first));
    }
  });
}

inline int64_t state_offset(const Ssd& a, int64_t row, int64_t head) {
  return (row * a.nheads + head) * a.headdim * a.d_state;
}

void ssd(const Ssd& a) {
  const Sizes s(a);
  for_each_unit(a, [&](int64_t number, int64_t group, int64_t first, int64_t heads) {
    const Row row(a.tokens, number);
    Buffer buffer;
    SharedChunk shared(buffer, s);
    HeadChunk head(buffer, s);
    float* Y = buffer.take(kChunk * s.p);
    const int64_t state_size = int64_t{s.d_state} * s.p;
    float* states = buffer.take(heads * state_size);
    for (int64_t h = 0; h < heads; ++h)
      load_state(a.initial_state ? a.initial_state + state_offset(a, number, first + h) : nullptr, s,
                 states + h * state_size);
    for (const Segment& segment : row.segments) {
      if (segment.begin > 0) std::memset(states, 0, sizeof(float) * heads * state_size);
      for (int64_t begin = segment.begin; begin < segment.end; begin += kChunk) {
        const int len = static_cast<int>(std::min<int64_t>(kChunk, segment.end - begin));
        shared.read(a, s, row, begin, len, group);
        shared.multiply(s, len);
        for (int64_t h = 0; h < heads; ++h) {
          float* S = states + h * state_size;
          head.read(a, s, row, begin, len, first + h);
          head.weigh(shared.G, len);
          head.scale(shared, s, len);
          std::memset(Y, 0, sizeof(float) * len * s.p);
          multiply_add(len, s.p, s.d_state, head.Cs, s.n, 1, S, s.p, Y, s.p);
          for (int i = 0; i < len; i += kTriangle) {
            const int rows = std::min(kTriangle, len - i);
            multiply_add(rows, s.p, i + rows, head.W + i * kChunk, kChunk, 1, head.Xd, s.p, Y + i * s.p, s.p);
          }
          head.advance(s, len, S);
          const int64_t parameter = row.list * a.nheads + first + h;
          for (int i = 0; i < len; ++i) {
            float* y = a.y + row.offset(a.tokens, begin + i, a.nheads * a.headdim) + (first + h) * a.headdim;
            for (int p = 0; p < s.p; p += kWidth) {
              const Vec value = load(Y + i * s.p + p) + skip_weight(a, parameter, p) * load(head.X + i * s.p + p);
              store_some(y + p, value, s.headdim - p);
            }
          }
        }
      }
    }
    for (int64_t h = 0; h < heads; ++h)
      store_state(states + h * state_size, s, a.final_state + state_offset(a, number, first + h));
  });
}

}  // namespace SIMD_NAME
}  // namespace vision_scan

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
    pieces_.emplace_back(count, 0.f);
    return pieces_.back().data();
  }

 private:
  std::vector<std::vector<float>> pieces_;
};

// What the heads of a block share in a chunk.
struct SharedChunk {
  float *B, *C, *Bt, *G;  // (kChunk, n) twice, (n, kChunk), (kChunk, kChunk)

  SharedChunk(Buffer& buffer, const Sizes& s)
      : B(buffer.take(kChunk * s.n)),
        C(buffer.take(kChunk * s.n)),
        Bt(buffer.take(s.n * kChunk)),
        G(buffer.take(kChunk * kChunk)) {}

  void load(const Ssd& a, const Sizes& s, const Row& row, int64_t begin, int len, int64_t group) {
    for (int i = 0; i < len; ++i) {
      const int64_t at = row.offset(a.tokens, begin + i, a.ngroups * a.d_state) + group * a.d_state;
      std::memcpy(B + i * s.n, a.B + at, sizeof(float) * s.d_state);
      std::memcpy(C + i * s.n, a.C + at, sizeof(float) * s.d_state);
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
  float raw[kChunk], dt[kChunk], e[kChunk], f[kChunk];
  double total[kChunk];
  float through;  // decay of the whole chunk

  HeadChunk(Buffer& buffer, const Sizes& s)
      : X(buffer.take(kChunk * s.p)),
        Xd(buffer.take(kChunk * s.p)),
        L(buffer.take(kChunk * kChunk)),
        W(buffer.take(kChunk * kChunk)),
        Bs(buffer.take(kChunk * s.n)),
        Cs(buffer.take(kChunk * s.n)) {}

  void load(const Ssd& a, const Sizes& s, const Row& row, int64_t begin, int len, int64_t head) {
    const int64_t parameter = row.list * a.nheads + head;
    const float bias = a.dt_bias ? a.dt_bias[parameter] : 0.f, A = a.A[parameter];
    double sum = 0;
    for (int i = 0; i < len; ++i) {
      const int64_t at = row.offset(a.tokens, begin + i, a.nheads) + head;
      raw[i] = a.dt[at] + bias;
      float step = raw[i];
      if (a.dt_softplus && step <= 20.f) step = std::log1p(std::exp(step));
      dt[i] = std::min(std::max(step, a.dt_min), a.dt_max);
      sum += dt[i] * A;
      total[i] = sum;
      const float* x = a.x + at * a.headdim;
      for (int p = 0; p < s.headdim; ++p) {
        X[i * s.p + p] = x[p];
        Xd[i * s.p + p] = x[p] * dt[i];
      }
    }
    float differences[kChunk];
    const auto exponentials = [&](float* out) {
      for (int i = 0; i < len; i += kWidth) store(out + i, exp(vision_scan::SIMD_NAME::load(differences + i)));
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
        const Vec decay = exp(vision_scan::SIMD_NAME::load(differences + j));
        store(l + j, decay);
        store(w + j, decay * vision_scan::SIMD_NAME::load(G + i * kChunk + j));
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
        store(Bs + i * s.n + n, to_end * vision_scan::SIMD_NAME::load(shared.B + i * s.n + n));
        store(Cs + i * s.n + n, from_entry * vision_scan::SIMD_NAME::load(shared.C + i * s.n + n));
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
      store(values + i, by * vision_scan::SIMD_NAME::load(values + i));
  }
};

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
        shared.load(a, s, row, begin, len, group);
        shared.multiply(s, len);
        for (int64_t h = 0; h < heads; ++h) {
          float* S = states + h * state_size;
          head.load(a, s, row, begin, len, first + h);
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
            for (int p = 0; p < s.headdim; ++p) {
              const float skip = a.skip_dims == 0   ? 0.f
                                 : a.skip_dims == 1 ? a.D[parameter]
                                                    : a.D[parameter * a.headdim + p];
              y[p] = Y[i * s.p + p] + skip * head.X[i * s.p + p];
            }
          }
        }
      }
    }
    for (int64_t h = 0; h < heads; ++h)
      store_state(states + h * state_size, s, a.final_state + state_offset(a, number, first + h));
  });
}

// The backward pass of one unit: forward through the states, which are kept at every chunk's entry, then back
// through the chunks.
class SsdBackward {
 public:
  SsdBackward(const Ssd& a, const SsdGradients& g, int64_t number, int64_t group, int64_t first, int64_t heads)
      : a(a), g(g), s(a), row(a.tokens, number), number(number), group(group), first(first), heads(heads),
        shared(buffer, s), head(buffer, s), state_size(int64_t{s.d_state} * s.p),
        dY(buffer.take(kChunk * s.p)), dYe(buffer.take(kChunk * s.p)), dXd(buffer.take(kChunk * s.p)),
        dXi(buffer.take(kChunk * s.p)), Yi(buffer.take(kChunk * s.p)), Xdt(buffer.take(s.p * kChunk)),
        dW(buffer.take(kChunk * kChunk)), Sp(buffer.take(s.p * s.n)), dSp(buffer.take(s.p * s.n)),
        dB(buffer.take(kChunk * s.n)), dC(buffer.take(kChunk * s.n)), dS(buffer.take(heads * state_size)),
        dD(buffer.take(heads * s.p)), dA(heads, 0.0), ddt_bias(heads, 0.0) {}

  void run() {
    for (int64_t h = 0; h < heads; ++h)
      load_state(g.dfinal_state ? g.dfinal_state + state_offset(a, number, first + h) : nullptr, s,
                 dS + h * state_size);
    for (auto segment = row.segments.rbegin(); segment != row.segments.rend(); ++segment) {
      const bool is_first = segment->begin == 0;
      keep_entries(*segment, is_first);
      const int64_t chunks = (segment->end - segment->begin + kChunk - 1) / kChunk;
      for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t begin = segment->begin + chunk * kChunk;
        back(begin, static_cast<int>(std::min<int64_t>(kChunk, segment->end - begin)),
             entries.data() + chunk * heads * state_size);
      }
      if (!is_first) std::memset(dS, 0, sizeof(float) * heads * state_size);
    }
    finish();
  }

 private:
  void keep_entries(const Segment& segment, bool is_first) {
    const int64_t chunks = (segment.end - segment.begin + kChunk - 1) / kChunk;
    entries.assign((chunks + 1) * heads * state_size, 0.f);
    if (is_first && a.initial_state)
      for (int64_t h = 0; h < heads; ++h)
        load_state(a.initial_state + state_offset(a, number, first + h), s, entries.data() + h * state_size);
    for (int64_t chunk = 0; chunk + 1 < chunks; ++chunk) {  // the last chunk's end is not needed
      const int64_t begin = segment.begin + chunk * kChunk;
      shared.load(a, s, row, begin, kChunk, group);
      for (int64_t h = 0; h < heads; ++h) {
        const float* entry = entries.data() + (chunk * heads + h) * state_size;
        float* next = entries.data() + ((chunk + 1) * heads + h) * state_size;
        std::memcpy(next, entry, sizeof(float) * state_size);
        head.load(a, s, row, begin, kChunk, first + h);
        head.scale(shared, s, kChunk);
        head.advance(s, kChunk, next);
      }
    }
  }

  void back(int64_t begin, int len, const float* entry) {
    shared.load(a, s, row, begin, len, group);
    shared.multiply(s, len);
    std::memset(dB, 0, sizeof(float) * kChunk * s.n);
    std::memset(dC, 0, sizeof(float) * kChunk * s.n);
    for (int64_t h = 0; h < heads; ++h) back_head(begin, len, h, entry + h * state_size, dS + h * state_size);
    const int64_t block = (first - group * (a.nheads / a.ngroups)) / kHeadBlock;
    const int64_t size = a.tokens.batch * a.tokens.lists * a.tokens.cells * a.ngroups * a.d_state;
    for (int i = 0; i < len; ++i) {
      const int64_t at =
          block * size + row.offset(a.tokens, begin + i, a.ngroups * a.d_state) + group * a.d_state;
      std::memcpy(g.dB + at, dB + i * s.n, sizeof(float) * s.d_state);
      std::memcpy(g.dC + at, dC + i * s.n, sizeof(float) * s.d_state);
    }
  }

  void back_head(int64_t begin, int len, int64_t h, const float* S, float* dS) {
    head.load(a, s, row, begin, len, first + h);
    head.weigh(shared.G, len);
    head.scale(shared, s, len);
    const int64_t stride = a.nheads * a.headdim, at = (first + h) * a.headdim;
    for (int i = 0; i < len; ++i) {
      const float* dy = g.dy + row.offset(a.tokens, begin + i, stride) + at;
      for (int p = 0; p < s.headdim; ++p) {
        dY[i * s.p + p] = dy[p];
        dYe[i * s.p + p] = dy[p] * head.e[i];
      }
    }
    double dtotal[kChunk];
    weights(len, dtotal);
    states(len, S, dS, dtotal);
    tokens(begin, len, h, dtotal);
  }

  // Through Y = W Xd: dXd, dC, dB, and the gradient of the running sums of the log decays.
  void weights(int len, double* dtotal) {
    std::memset(Xdt, 0, sizeof(float) * s.p * kChunk);
    transpose(len, s.headdim, head.Xd, s.p, Xdt, kChunk);
    std::memset(dW, 0, sizeof(float) * len * kChunk);
    for (int i = 0; i < len; i += kTriangle) {
      const int rows = std::min(kTriangle, len - i);
      multiply_add(rows, padded(i + rows), s.headdim, dY + i * s.p, s.p, 1, Xdt, kChunk, dW + i * kChunk, kChunk);
    }
    // What a pair (i, j) gives to dtotal[i] it takes from dtotal[j]: sums in double, so that it cancels.
    double columns[kChunk] = {};
    alignas(64) float pairs[kChunk];
    for (int i = 0; i < len; ++i) {
      float* m = dW + i * kChunk;
      for (int j = 0; j < padded(i + 1); j += kWidth) {
        const Vec dw = vision_scan::SIMD_NAME::load(m + j);
        store(pairs + j, dw * vision_scan::SIMD_NAME::load(head.W + i * kChunk + j));
        store(m + j, dw * vision_scan::SIMD_NAME::load(head.L + i * kChunk + j));
      }
      double across[4] = {};
      for (int j = 0; j < i; ++j) columns[j] += pairs[j];
      for (int j = 0; j < i; ++j) across[j % 4] += pairs[j];
      dtotal[i] = across[0] + across[1] + across[2] + across[3];
    }
    for (int i = 0; i < len; ++i) dtotal[i] -= columns[i];
    std::memset(dXd, 0, sizeof(float) * len * s.p);
    for (int j = 0; j < len; j += kTriangle)  // row j of W^T starts at column j
      multiply_add(std::min(kTriangle, len - j), s.p, len - j, head.W + j * kChunk + j, 1, kChunk, dY + j * s.p, s.p,
                   dXd + j * s.p, s.p);
    for (int i = 0; i < len; i += kTriangle) {
      const int rows = std::min(kTriangle, len - i);
      multiply_add(rows, s.n, i + rows, dW + i * kChunk, kChunk, 1, shared.B, s.n, dC + i * s.n, s.n);
      multiply_add(rows, s.n, len - i, dW + i * kChunk + i, 1, kChunk, shared.C + i * s.n, s.n, dB + i * s.n, s.n);
    }
  }

  // Through the entering state S and the leaving one, whose gradient dS becomes that of the entering one.
  void states(int len, const float* S, float* dS, double* dtotal) {
    std::memset(dXi, 0, sizeof(float) * len * s.p);
    multiply_add(len, s.p, s.d_state, head.Bs, s.n, 1, dS, s.p, dXi, s.p);
    std::memset(Yi, 0, sizeof(float) * len * s.p);
    multiply_add(len, s.p, s.d_state, head.Cs, s.n, 1, S, s.p, Yi, s.p);
    double to_end = 0;
    for (int i = 0; i < len; ++i) {
      const double left = dot(dXi + i * s.p, head.Xd + i * s.p), read = dot(dY + i * s.p, Yi + i * s.p);
      dtotal[i] += read - left;
      to_end += left;
      for (int p = 0; p < s.p; p += kWidth)
        store(dXd + i * s.p + p, vision_scan::SIMD_NAME::load(dXd + i * s.p + p) +
                                     vision_scan::SIMD_NAME::load(dXi + i * s.p + p));
    }
    double kept = 0;
    for (int n = 0; n < s.d_state; ++n) kept += dot(S + n * s.p, dS + n * s.p);
    dtotal[len - 1] += to_end + head.through * kept;

    transpose(s.d_state, s.headdim, S, s.p, Sp, s.n);
    multiply_add(len, s.n, s.headdim, dYe, s.p, 1, Sp, s.n, dC, s.n);
    transpose(s.d_state, s.headdim, dS, s.p, dSp, s.n);
    for (int i = 0; i < len; ++i)  // Yi is free again: f Xd
      for (int p = 0; p < s.p; p += kWidth)
        store(Yi + i * s.p + p, splat(head.f[i]) * vision_scan::SIMD_NAME::load(head.Xd + i * s.p + p));
    multiply_add(len, s.n, s.headdim, Yi, s.p, 1, dSp, s.n, dB, s.n);

    HeadChunk::scale_by(dS, head.through, state_size);
    multiply_add(s.d_state, s.p, len, head.Cs, 1, s.n, dY, s.p, dS, s.p);
  }

  // From dXd and the running sums to x, dt and the parameters.
  void tokens(int64_t begin, int len, int64_t h, const double* dtotal) {
    const int64_t parameter = row.list * a.nheads + first + h;
    const float A = a.A[parameter];
    double after = 0;
    for (int i = len - 1; i >= 0; --i) {
      after += dtotal[i];
      const float* X = head.X + i * s.p;
      const double dstep = after * A + dot(dXd + i * s.p, X);
      dA[h] += after * head.dt[i];
      const int64_t token = row.offset(a.tokens, begin + i, a.nheads) + first + h;
      float draw = static_cast<float>(dstep);
      const float step = a.dt_softplus && head.raw[i] <= 20.f ? std::log1p(std::exp(head.raw[i])) : head.raw[i];
      if (step < a.dt_min || step > a.dt_max) draw = 0;
      if (a.dt_softplus && head.raw[i] <= 20.f) draw *= 1.f / (1.f + std::exp(-head.raw[i]));
      g.ddt[token] = draw;
      ddt_bias[h] += draw;
      float* dx = g.dx + token * a.headdim;
      float* skip = dD + h * s.p;
      for (int p = 0; p < s.headdim; ++p) {
        const float D = a.skip_dims == 0 ? 0.f : a.skip_dims == 1 ? a.D[parameter] : a.D[parameter * a.headdim + p];
        dx[p] = dXd[i * s.p + p] * head.dt[i] + D * dY[i * s.p + p];
        skip[p] += dY[i * s.p + p] * X[p];
      }
    }
  }

  void finish() {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = number * a.nheads + first + h;
      if (g.dinitial_state) store_state(dS + h * state_size, s, g.dinitial_state + at * a.headdim * a.d_state);
      g.dA[at] = static_cast<float>(dA[h]);
      g.ddt_bias[at] = static_cast<float>(ddt_bias[h]);
      const float* skip = dD + h * s.p;
      if (a.skip_dims == 2) std::memcpy(g.dD + at * a.headdim, skip, sizeof(float) * s.headdim);
      if (a.skip_dims == 1) {
        double sum = 0;
        for (int p = 0; p < s.headdim; ++p) sum += skip[p];
        g.dD[at] = static_cast<float>(sum);
      }
    }
  }

  // Over the headdim of two rows; their padding is zero.
  double dot(const float* left, const float* right) const {
    Vec total{};
    for (int p = 0; p < s.p; p += kWidth)
      total += vision_scan::SIMD_NAME::load(left + p) * vision_scan::SIMD_NAME::load(right + p);
    return sum(total);
  }

  const Ssd& a;
  const SsdGradients& g;
  const Sizes s;
  const Row row;
  const int64_t number, group, first, heads;
  Buffer buffer;
  SharedChunk shared;
  HeadChunk head;
  const int64_t state_size;
  float *dY, *dYe, *dXd, *dXi, *Yi, *Xdt, *dW, *Sp, *dSp, *dB, *dC, *dS, *dD;
  std::vector<double> dA, ddt_bias;
  std::vector<float> entries;  // (chunks + 1, heads, d_state, p)
};

void ssd_backward(const Ssd& a, const SsdGradients& g) {
  for_each_unit(a, [&](int64_t number, int64_t group, int64_t first, int64_t heads) {
    SsdBackward(a, g, number, group, first, heads).run();
  });
}

}  // namespace SIMD_NAME
}  // namespace vision_scan

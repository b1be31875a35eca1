// The backward pass of Mamba-2's scan; letters as in ssd.h, and d in front of what is a gradient.
#include "ssd.h"

namespace vision_scan {
namespace SIMD_NAME {

// The backward pass of one unit: forward through the states, which are kept at every chunk's entry, then back
// through the chunks.
class SsdBackward {
 public:
  SsdBackward(const Ssd& a, const SsdGradients& g, int64_t number, int64_t group, int64_t first, int64_t heads)
      : a(a), g(g), s(a), row(a.tokens, number), number(number), group(group), first(first), heads(heads),
        shared(buffer, s), head(buffer, s), state_size(int64_t{s.d_state} * s.p),
        dY(buffer.take(kChunk * s.p)), dYe(buffer.take(kChunk * s.p)), dXd(buffer.take(kChunk * s.p)),
        dXi(buffer.take(kChunk * s.p)), dCi(buffer.take(kChunk * s.n)), Xdt(buffer.take(s.p * kChunk)),
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
    entries.reserve(std::max<int64_t>(1, chunks) * heads * state_size);
    for (int64_t h = 0; h < heads; ++h)
      load_state(is_first && a.initial_state ? a.initial_state + state_offset(a, number, first + h) : nullptr, s,
                 entries.data() + h * state_size);
    for (int64_t chunk = 0; chunk + 1 < chunks; ++chunk) {  // the last chunk's end is not needed
      const int64_t begin = segment.begin + chunk * kChunk;
      shared.read(a, s, row, begin, kChunk, group);
      for (int64_t h = 0; h < heads; ++h) {
        const float* entry = entries.data() + (chunk * heads + h) * state_size;
        float* next = entries.data() + ((chunk + 1) * heads + h) * state_size;
        std::memcpy(next, entry, sizeof(float) * state_size);
        head.read(a, s, row, begin, kChunk, first + h);
        head.scale(shared, s, kChunk);
        head.advance(s, kChunk, next);
      }
    }
  }

  void back(int64_t begin, int len, const float* entry) {
    shared.read(a, s, row, begin, len, group);
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
    head.read(a, s, row, begin, len, first + h);
    head.weigh(shared.G, len);
    head.scale(shared, s, len);
    const int64_t stride = a.nheads * a.headdim, at = (first + h) * a.headdim;
    for (int i = 0; i < len; ++i) {
      const float* dy = g.dy + row.offset(a.tokens, begin + i, stride) + at;
      const Vec by = splat(head.e[i]);
      for (int p = 0; p < s.p; p += kWidth) {
        const Vec value = load_some(dy + p, s.headdim - p);
        store(dY + i * s.p + p, value);
        store(dYe + i * s.p + p, value * by);
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
        const Vec dw = load(m + j);
        store(pairs + j, dw * load(head.W + i * kChunk + j));
        store(m + j, dw * load(head.L + i * kChunk + j));
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
    transpose(s.d_state, s.headdim, S, s.p, Sp, s.n);
    std::memset(dCi, 0, sizeof(float) * len * s.n);
    multiply_add(len, s.n, s.headdim, dYe, s.p, 1, Sp, s.n, dCi, s.n);
    std::memset(dXi, 0, sizeof(float) * len * s.p);
    multiply_add(len, s.p, s.d_state, head.Bs, s.n, 1, dS, s.p, dXi, s.p);
    double to_end = 0;
    for (int i = 0; i < len; ++i) {
      // What the entering state gave to y[i], times dy[i], is also C[i] times its gradient.
      const double left = dot(dXi + i * s.p, head.Xd + i * s.p, s.p), read = dot(dCi + i * s.n, shared.C + i * s.n, s.n);
      dtotal[i] += read - left;
      to_end += left;
      add(dXd + i * s.p, dXi + i * s.p, s.p);
      add(dC + i * s.n, dCi + i * s.n, s.n);
    }
    double kept = 0;
    for (int n = 0; n < s.d_state; ++n) kept += dot(S + n * s.p, dS + n * s.p, s.p);
    dtotal[len - 1] += to_end + head.through * kept;

    transpose(s.d_state, s.headdim, dS, s.p, dSp, s.n);
    float* Xf = dXi;  // free again: f Xd
    for (int i = 0; i < len; ++i)
      for (int p = 0; p < s.p; p += kWidth)
        store(Xf + i * s.p + p, splat(head.f[i]) * load(head.Xd + i * s.p + p));
    multiply_add(len, s.n, s.headdim, Xf, s.p, 1, dSp, s.n, dB, s.n);

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
      const double dstep = after * A + dot(dXd + i * s.p, X, s.p);
      dA[h] += after * head.dt[i];
      const int64_t token = row.offset(a.tokens, begin + i, a.nheads) + first + h;
      double draw = dstep;
      if (head.step[i] < a.dt_min || head.step[i] > a.dt_max) draw = 0;
      if (a.dt_softplus && head.raw[i] <= 20.f) draw *= 1.f / (1.f + std::exp(-head.raw[i]));
      g.ddt[token] = static_cast<float>(draw);
      ddt_bias[h] += draw;
      float* dx = g.dx + token * a.headdim;
      float* skip = dD + h * s.p;
      const Vec dt = splat(head.dt[i]);
      for (int p = 0; p < s.p; p += kWidth) {
        const Vec dy = load(dY + i * s.p + p);
        store_some(dx + p, load(dXd + i * s.p + p) * dt + skip_weight(a, parameter, p) * dy, s.headdim - p);
        store(skip + p, load(skip + p) + dy * load(X + p));
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

  // Of two rows whose padding is zero.
  static double dot(const float* left, const float* right, int size) {
    Vec total{};
    for (int i = 0; i < size; i += kWidth) total += load(left + i) * load(right + i);
    double sum = 0;
    for (int i = 0; i < kWidth; ++i) sum += total[i];
    return sum;
  }

  static void add(float* to, const float* from, int size) {
    for (int i = 0; i < size; i += kWidth) store(to + i, load(to + i) + load(from + i));
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
  float *dY, *dYe, *dXd, *dXi, *dCi, *Xdt, *dW, *Sp, *dSp, *dB, *dC, *dS, *dD;
  std::vector<double> dA, ddt_bias;
  Floats entries;  // (chunks, heads, d_state, p)
};

void ssd_backward(const Ssd& a, const SsdGradients& g) {
  for_each_unit(a, [&](int64_t number, int64_t group, int64_t first, int64_t heads) {
    SsdBackward(a, g, number, group, first, heads).run();
  });
}

}  // namespace SIMD_NAME
}  // namespace vision_scan

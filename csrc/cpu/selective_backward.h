// The backward pass of Mamba-1's scan; units and lanes as in selective.h, and d in front of what is a gradient.
#include "selective.h"

namespace vision_scan {
namespace SIMD_NAME {

constexpr int kSteps = 32;  // tokens whose states are held at a time

// Backward through one list: forward over the row to keep the state at the entry of every chunk, then back through
// the chunks, each run forward once more with all its states kept.
template <int N>
class SelectiveBackward {
 public:
  SelectiveBackward(const SelectiveList& list, const SelectiveGradients& g, const SelectiveUnit& unit)
      : list(list), a(list.a), g(g), unit(unit), n(N ? N : static_cast<int>(a.d_state)),
        lanes(make_lanes<N>(list, unit)), vectors(static_cast<int>(lanes.size())), states((kSteps + 1) * n), decays(kSteps * n),
        dB(kSteps * n), dC(kSteps * n), dh(vectors * n), dA(vectors * n), dD(vectors), ddt_bias(vectors) {}

  void run() {
    for (int v = 0; v < vectors; ++v)
      if (g.dfinal_state) lanes[v].gather(g.dfinal_state + list.state(lanes[v].channel), dh.at(v * n));
    const auto& segments = list.row.segments;
    for (auto segment = segments.rbegin(); segment != segments.rend(); ++segment) {
      const bool is_first = segment->begin == 0;
      keep_entries(*segment, is_first);
      const int64_t chunks = (segment->end - segment->begin + kSteps - 1) / kSteps;
      for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t begin = segment->begin + chunk * kSteps;
        back(begin, static_cast<int>(std::min<int64_t>(kSteps, segment->end - begin)), chunk);
      }
      if (!is_first) dh.clear();
    }
    finish();
  }

 private:
  void advance(const SelectiveLanes<N>& lane, int64_t place, const Vec* from, Vec* to, Vec* decay) const {
    const Vec step = lane.step(lane.raw_step(place)), inflow = step * lane.input(place);
    const float* B = lane.B(place);
    for (int i = 0; i < (N ? N : n); ++i) {
      decay[i] = exp(step * lane.A[i]);
      to[i] = decay[i] * from[i] + inflow * splat(B[i]);
    }
  }

  void keep_entries(const Segment& segment, bool is_first) {
    const int64_t chunks = (segment.end - segment.begin + kSteps - 1) / kSteps;
    entries.assign(chunks * vectors * n);
    if (chunks == 0) return;
    VecArray h(n), scratch(n);
    for (int v = 0; v < vectors; ++v) {
      h.clear();
      if (is_first && a.initial_state) lanes[v].gather(a.initial_state + list.state(lanes[v].channel), h.at(0));
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        std::memcpy(entries.at((chunk * vectors + v) * n), h.at(0), sizeof(Vec) * n);
        if (chunk + 1 == chunks) break;
        for (int step = 0; step < kSteps; ++step)
          advance(lanes[v], segment.begin + chunk * kSteps + step, h.at(0), h.at(0), scratch.at(0));
      }
    }
  }

  void back(int64_t begin, int len, int64_t chunk) {
    dB.clear();
    dC.clear();
    for (int v = 0; v < vectors; ++v) {
      std::memcpy(states.at(0), entries.at((chunk * vectors + v) * n), sizeof(Vec) * n);
      for (int t = 0; t < len; ++t)
        advance(lanes[v], begin + t, states.at(t * n), states.at((t + 1) * n), decays.at(t * n));
      for (int t = len - 1; t >= 0; --t) back_token(v, begin + t, t);
    }
    const int64_t size = a.tokens.batch * a.tokens.lists * a.tokens.cells * a.ngroups * a.d_state;
    for (int t = 0; t < len; ++t) {
      const int64_t at = unit.block * size + list.group_offset(begin + t, unit.group);
      for (int i = 0; i < n; ++i) {
        g.dB[at + i] = sum(dB[t * n + i]);
        g.dC[at + i] = sum(dC[t * n + i]);
      }
    }
  }

  void back_token(int v, int64_t place, int t) {
    const SelectiveLanes<N>& lane = lanes[v];
    const Vec dy = lane.load_lanes(g.dy + list.output(place) + lane.channel);
    const Vec u = lane.input(place), raw = lane.raw_step(place), step = lane.step(raw), inflow = step * u;
    const float *B = lane.B(place), *C = lane.C(place);
    Vec dinflow{}, dstep{};
    for (int i = 0; i < (N ? N : n); ++i) {
      const Vec decay = decays[t * n + i], before = states[t * n + i];
      Vec& d = dh[v * n + i];
      d += dy * splat(C[i]);
      dC[t * n + i] += dy * states[(t + 1) * n + i];
      dB[t * n + i] += d * inflow;
      dinflow += d * splat(B[i]);
      const Vec dlog = d * decay * before;
      dstep += dlog * lane.A[i];
      dA[v * n + i] += dlog * step;
      d = d * decay;
    }
    dD[v] += dy * u;
    dstep += dinflow * u;
    if (a.dt_softplus) dstep = dstep * sigmoid(raw);
    ddt_bias[v] += dstep;
    lane.store_lanes(g.ddt + list.own(place) + lane.channel, dstep);
    float* du = g.du + list.input(place) + lane.channel;
    const Vec own = dinflow * step + lane.skip * dy;
    lane.store_lanes(du, a.shared_input ? lane.load_lanes(du) + own : own);
  }

  void finish() {
    for (int v = 0; v < vectors; ++v) {
      const SelectiveLanes<N>& lane = lanes[v];
      const int64_t at = list.number * a.channels + lane.channel;
      if (g.dinitial_state) lane.scatter(dh.at(v * n), g.dinitial_state + at * a.d_state);
      lane.scatter(dA.at(v * n), g.dA + at * a.d_state);
      lane.store_lanes(g.dD + at, dD[v]);
      lane.store_lanes(g.ddt_bias + at, ddt_bias[v]);
    }
  }

  const SelectiveList& list;
  const Selective& a;
  const SelectiveGradients& g;
  const SelectiveUnit& unit;
  const int n;
  const std::vector<SelectiveLanes<N>> lanes;
  const int vectors;
  VecArray states, decays, dB, dC, dh, dA, dD, ddt_bias, entries;
};

void selective_backward(const Selective& a, const SelectiveGradients& g) {
  with_d_state(a.d_state, [&](auto n) {
    for_each_selective_unit(a, 1, [&](const SelectiveUnit& unit) {
      for (int64_t k = 0; k < a.tokens.lists; ++k) {
        const SelectiveList list(a, unit.image, k);
        SelectiveBackward<decltype(n)::value>(list, g, unit).run();
      }
    });
  });
}

}  // namespace SIMD_NAME
}  // namespace vision_scan

// The backward pass of Mamba-1's scan; units and lanes as in selective.h, and d in front of what is a gradient.
#include "selective.h"

namespace vision_scan {
namespace SIMD_NAME {

constexpr int kSteps = 32;  // tokens whose states are held at a time

// Backward through one list: forward over a segment to keep all steps, and the state at the entry of every chunk;
// then back through the chunks, each run forward once more with all its states kept.
template <int N>
class SelectiveBackward {
 public:
  SelectiveBackward(const SelectiveList& list, const SelectiveGradients& g, const SelectiveUnit& unit)
      : list(list), a(list.a), g(g), unit(unit), n(N ? N : static_cast<int>(a.d_state)),
        lanes(make_lanes<N>(list, unit)), vectors(static_cast<int>(lanes.size())), states((kSteps + 1) * n),
        decays(kSteps * n), dB(kSteps * n), dC(kSteps * n), dh(vectors * n), dA(vectors * n), dD(vectors),
        ddt_bias(vectors) {}

  void run() {
    for (int v = 0; v < vectors; ++v)
      if (g.dfinal_state) lanes[v].gather(g.dfinal_state + list.state(lanes[v].channel), dh.at(v * n));
    const auto& segments = list.row.segments;
    for (auto segment = segments.rbegin(); segment != segments.rend(); ++segment) {
      const bool is_first = segment->begin == 0;
      keep_entries(*segment, is_first);
      for (int64_t chunk = chunks_of(*segment) - 1; chunk >= 0; --chunk) back(*segment, chunk);
      if (!is_first) dh.clear();
    }
    finish();
  }

 private:
  static int64_t chunks_of(const Segment& segment) {
    return (segment.end - segment.begin + kSteps - 1) / kSteps;
  }

  void keep_entries(const Segment& segment, bool is_first) {
    entries.assign(chunks_of(segment) * vectors * n);
    steps.assign((segment.end - segment.begin) * vectors);
    VecArray h(vectors * n);
    if (is_first && a.initial_state)
      for (int v = 0; v < vectors; ++v)
        lanes[v].gather(a.initial_state + list.state(lanes[v].channel), h.at(v * n));
    for (int64_t place = segment.begin; place < segment.end; ++place) {
      const int64_t t = place - segment.begin;
      if (t % kSteps == 0) std::memcpy(entries.at(t / kSteps * vectors * n), h.at(0), sizeof(Vec) * vectors * n);
      const SelectiveToken token = list.token(place, unit);
      const SelectiveToken ahead = list.token(std::min(place + kAhead, segment.end - 1), unit);
      for (const float* p : {a.dt + ahead.own, a.u + ahead.input}) ask_for(p);
      for (int v = 0; v < vectors; ++v) {
        const Vec step = lanes[v].step(lanes[v].raw_step(token));
        steps[t * vectors + v] = step;
        advance(lanes[v], token, step, h.at(v * n), h.at(v * n), [](int, Vec) {});
      }
    }
  }

  // Asks for the memory of the unit's channels.
  void ask_for(const float* channels) const {
    prefetch(channels, sizeof(float) * unit.count);
  }

  // From the state before a token to the one behind it; `keep` gets the decays.
  template <typename F>
  ALWAYS_INLINE void advance(const SelectiveLanes<N>& lane, const SelectiveToken& token, Vec step, const Vec* from,
                             Vec* to, F keep) const {
    const Vec inflow = step * lane.input(token);
    const float* B = a.B + token.group;
    for (int i = 0; i < (N ? N : n); ++i) {
      const Vec decay = exp2(step * lane.rates[i]);
      keep(i, decay);
      to[i] = decay * from[i] + inflow * splat(B[i]);
    }
  }

  void back(const Segment& segment, int64_t chunk) {
    const int64_t first = chunk * kSteps, begin = segment.begin + first;
    const int len = static_cast<int>(std::min<int64_t>(kSteps, segment.end - begin));
    dB.clear();
    dC.clear();
    SelectiveToken tokens[kSteps];
    for (int t = 0; t < len; ++t) {
      tokens[t] = list.token(begin + t, unit);
      if (chunk > 0) ask_for_gradients(list.token(begin + t - kSteps, unit));
    }
    for (int v = 0; v < vectors; ++v) {
      std::memcpy(states.at(0), entries.at((chunk * vectors + v) * n), sizeof(Vec) * n);
      for (int t = 0; t < len; ++t) {
        Vec* decay = decays.at(t * n);
        advance(lanes[v], tokens[t], steps[(first + t) * vectors + v], states.at(t * n), states.at((t + 1) * n),
                [decay](int i, Vec value) { decay[i] = value; });
      }
      for (int t = len - 1; t >= 0; --t) back_token(v, tokens[t], t, steps[(first + t) * vectors + v]);
    }
    const int64_t size = a.tokens.batch * a.tokens.lists * a.tokens.cells * a.ngroups * a.d_state;
    for (int t = 0; t < len; ++t) {
      const int64_t at = unit.block * size + tokens[t].group;
      for (int i = 0; i < n; ++i) {
        g.dB[at + i] = sum(dB[t * n + i]);
        g.dC[at + i] = sum(dC[t * n + i]);
      }
    }
  }

  // What going back over a token reads and writes.
  void ask_for_gradients(const SelectiveToken& token) const {
    for (const float* p : std::initializer_list<const float*>{
             a.dt + token.own, a.u + token.input, g.dy + token.output, g.ddt + token.own, g.du + token.input})
      ask_for(p);
  }

  ALWAYS_INLINE void back_token(int v, const SelectiveToken& token, int t, Vec step) {
    const SelectiveLanes<N>& lane = lanes[v];
    const Vec dy = lane.load_lanes(g.dy + token.output + lane.offset);
    const Vec u = lane.input(token), inflow = step * u;
    const float *B = a.B + token.group, *C = a.C + token.group;
    const Vec *decay = decays.at(t * n), *before = states.at(t * n), *after = before + n;
    Vec *d = dh.at(v * n), *to_A = dA.at(v * n), *to_B = dB.at(t * n), *to_C = dC.at(t * n);
    Vec dinflow{}, dpower{};
    for (int i = 0; i < (N ? N : n); ++i) {
      const Vec dstate = d[i] + dy * splat(C[i]), passed = dstate * decay[i], dlog = passed * before[i];
      to_C[i] += dy * after[i];
      to_B[i] += dstate * inflow;
      dinflow += dstate * splat(B[i]);
      dpower += dlog * lane.rates[i];
      to_A[i] += dlog * step;
      d[i] = passed;
    }
    dD[v] += dy * u;
    Vec dstep = dinflow * u + dpower * splat(0.69314718f);
    if (a.dt_softplus) dstep = dstep * sigmoid(lane.raw_step(token));
    ddt_bias[v] += dstep;
    lane.store_lanes(g.ddt + token.own + lane.offset, dstep);
    float* du = g.du + token.input + lane.offset;
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
  VecArray states, decays, dB, dC, dh, dA, dD, ddt_bias, entries, steps;
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

// The short causal depthwise convolution, forward and backward: see
// vision_scan/ops/reference/causal_conv1d.py. A unit of work is a row and a block of channels.
#include "rows.h"
#include "simd.h"

namespace vision_scan {
namespace SIMD_NAME {

constexpr int64_t kChannelBlock = 64;

// Where tap `back` of a token reads: a cell of x, a row of the initial state, or nothing (zero).
struct Tap {
  const float* from;
  int64_t at;  // of the gradient that belongs to it; below 0: none
  bool is_state;
};

// The row's inputs as a line: in front of the first segment stands the initial state.
class Line {
 public:
  Line(const Conv& a, const Row& row, int64_t number) : a(a), row(row), number(number) {}

  int64_t input(int64_t place) const {
    const Tokens& t = a.tokens;
    return a.shared_input ? (row.batch * t.cells + row.cells[place]) * a.channels : row.offset(t, place, a.channels);
  }

  // Input `place` (may lie before the segment) of the segment that begins at `begin`.
  Tap at(int64_t place, int64_t begin) const {
    if (place >= begin) return {a.x + input(place), row.offset(a.tokens, place, a.channels), false};
    const int64_t state_row = a.width - 1 + place;
    if (begin > 0 || state_row < 0 || !a.initial_state) return {nullptr, begin > 0 || state_row < 0 ? -1 : state(state_row), true};
    return {a.initial_state + state(state_row), state(state_row), true};
  }

  int64_t state(int64_t state_row) const {
    return (number * (a.width - 1) + state_row) * a.channels;
  }

 private:
  const Conv& a;
  const Row& row;
  const int64_t number;
};

template <typename F>
void for_each_channel_block(const Conv& a, const F& f) {
  const int64_t blocks = (a.channels + kChannelBlock - 1) / kChannelBlock;
  const int64_t grain = std::max<int64_t>(1, 16384 / (kChannelBlock * std::max<int64_t>(1, a.tokens.seqlen)));
  at::parallel_for(0, a.tokens.rows() * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % blocks * kChannelBlock;
      f(unit / blocks, first, std::min(kChannelBlock, a.channels - first));
    }
  });
}

void conv(const Conv& a) {
  for_each_channel_block(a, [&](int64_t number, int64_t first, int64_t count) {
    const Row row(a.tokens, number);
    const Line line(a, row, number);
    const float* weight = a.weight + row.list * a.width * a.channels;
    const float* bias = a.bias ? a.bias + row.list * a.channels : nullptr;
    std::vector<Tap> taps(a.width);
    for (const Segment& segment : row.segments) {
      for (int64_t place = segment.begin; place < segment.end; ++place) {
        for (int64_t tap = 0; tap < a.width; ++tap) taps[tap] = line.at(place - (a.width - 1) + tap, segment.begin);
        float* y = a.y + row.offset(a.tokens, place, a.channels);
        for (int64_t c = first; c < first + count; c += kWidth) {
          const int64_t some = first + count - c;
          Vec total = bias ? load_some(bias + c, some) : Vec{};
          for (int64_t tap = 0; tap < a.width; ++tap)
            if (taps[tap].from)
              total += load_some(weight + tap * a.channels + c, some) * load_some(taps[tap].from + c, some);
          store_some(y + c, a.silu ? total * sigmoid(total) : total, some);
        }
      }
    }
    const Segment last = row.segments.back();
    for (int64_t tail = 0; tail < a.width - 1; ++tail) {
      const Tap tap = line.at(last.end - (a.width - 1) + tail, last.begin);
      float* out = a.final_state + line.state(tail) + first;
      if (tap.from)
        std::memcpy(out, tap.from + first, sizeof(float) * count);
      else
        std::memset(out, 0, sizeof(float) * count);
    }
  });
}

void conv_backward(const Conv& a, const ConvGradients& g) {
  for_each_channel_block(a, [&](int64_t number, int64_t first, int64_t count) {
    const Row row(a.tokens, number);
    const Line line(a, row, number);
    const float* weight = a.weight + row.list * a.width * a.channels;
    const float* bias = a.bias ? a.bias + row.list * a.channels : nullptr;
    float* dweight = g.dweight + number * a.width * a.channels;
    float* dbias = g.dbias + number * a.channels;
    std::vector<Tap> taps(a.width);
    const auto target = [&](const Tap& tap) -> float* {
      if (tap.at < 0) return nullptr;
      if (!tap.is_state) return g.dx + tap.at;
      return g.dinitial_state ? g.dinitial_state + tap.at : nullptr;
    };
    if (g.dfinal_state) {
      const Segment last = row.segments.back();
      for (int64_t tail = 0; tail < a.width - 1; ++tail) {
        float* to = target(line.at(last.end - (a.width - 1) + tail, last.begin));
        const float* from = g.dfinal_state + line.state(tail);
        if (to)
          for (int64_t c = first; c < first + count; ++c) to[c] += from[c];
      }
    }
    for (const Segment& segment : row.segments) {
      for (int64_t place = segment.begin; place < segment.end; ++place) {
        for (int64_t tap = 0; tap < a.width; ++tap) taps[tap] = line.at(place - (a.width - 1) + tap, segment.begin);
        const float* dy = g.dy + row.offset(a.tokens, place, a.channels);
        for (int64_t c = first; c < first + count; c += kWidth) {
          const int64_t some = first + count - c;
          Vec d = load_some(dy + c, some);
          if (a.silu) {
            Vec total = bias ? load_some(bias + c, some) : Vec{};
            for (int64_t tap = 0; tap < a.width; ++tap)
              if (taps[tap].from)
                total += load_some(weight + tap * a.channels + c, some) * load_some(taps[tap].from + c, some);
            const Vec gate = sigmoid(total);
            d = d * gate * (splat(1.f) + total * (splat(1.f) - gate));
          }
          store_some(dbias + c, load_some(dbias + c, some) + d, some);
          for (int64_t tap = 0; tap < a.width; ++tap) {
            if (float* to = target(taps[tap]))
              store_some(to + c, load_some(to + c, some) + load_some(weight + tap * a.channels + c, some) * d, some);
            if (taps[tap].from) {
              float* dw = dweight + tap * a.channels + c;
              store_some(dw, load_some(dw, some) + load_some(taps[tap].from + c, some) * d, some);
            }
          }
        }
      }
    }
  });
}

}  // namespace SIMD_NAME
}  // namespace vision_scan

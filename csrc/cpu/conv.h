// The short causal depthwise convolution, forward and backward: see
// vision_scan/ops/reference/causal_conv1d.py. A unit of work is a row and a block of channels.
#include "rows.h"
#include "simd.h"

namespace vision_scan {
namespace SIMD_NAME {

constexpr int64_t kChannelBlock = 128;
constexpr int64_t kTile = 16;  // tokens whose inputs stay in the nearest cache while the channels of a block pass

// Where a tap of a token reads: a cell of x, a row of the initial state, or nothing (zero).
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
    return a.shared_input ? (row.batch * t.cells + row.cells[place]) * a.x_stride : row.offset(t, place, a.x_stride);
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

// The taps of some tokens of a segment, for the channels of a block. A tap that reads nothing reads zeros, and what
// would be its gradient goes to memory that nobody reads.
class TapTile {
 public:
  explicit TapTile(int64_t width) : width_(width), from_(kTile * width), to_(kTile * width) {}

  template <typename F>
  void place(const Line& line, const Segment& segment, int64_t begin, int64_t tokens, int64_t first, const F& target) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t tap = 0; tap < width_; ++tap) {
        const Tap found = line.at(begin + t - (width_ - 1) + tap, segment.begin);
        float* to = target(found);
        from_[t * width_ + tap] = found.from ? found.from + first : zeros_;
        to_[t * width_ + tap] = to ? to + first : unread_;
      }
  }

  const float* from(int64_t t, int64_t tap) const {
    return from_[t * width_ + tap];
  }

  float* to(int64_t t, int64_t tap) const {
    return to_[t * width_ + tap];
  }

 private:
  const int64_t width_;
  std::vector<const float*> from_;
  std::vector<float*> to_;
  float zeros_[kChannelBlock] = {}, unread_[kChannelBlock] = {};
};

// Calls f(number of taps as a constant, or 0 if it is none that is common).
template <typename F>
void with_taps(int64_t width, const F& f) {
  if (width == 4)
    f(std::integral_constant<int, 4>());
  else
    f(std::integral_constant<int, 0>());
}

// The weights of a vector of channels, in registers if their number is a constant.
template <int kTaps>
struct TapWeights {
  Vec at[kTaps ? kTaps : kMostTaps];
  const int64_t count;

  TapWeights(const Conv& a, const float* weight, int64_t c, int64_t some) : count(kTaps ? kTaps : a.width) {
    for (int64_t tap = 0; tap < count; ++tap) at[tap] = load_some(weight + tap * a.channels + c, some);
  }

  Vec apply(const TapTile& taps, int64_t t, int64_t c, int64_t some, Vec total) const {
    for (int64_t tap = 0; tap < count; ++tap) total += at[tap] * load_some(taps.from(t, tap) + c, some);
    return total;
  }
};

void conv(const Conv& a) {
  for_each_channel_block(a, [&](int64_t number, int64_t first, int64_t count) {
    const Row row(a.tokens, number);
    const Line line(a, row, number);
    const float* weight = a.weight + row.list * a.width * a.channels + first;
    const float* bias = a.bias ? a.bias + row.list * a.channels + first : nullptr;
    TapTile taps(a.width);
    for (const Segment& segment : row.segments)
      for (int64_t begin = segment.begin; begin < segment.end; begin += kTile) {
        const int64_t tokens = std::min(kTile, segment.end - begin);
        taps.place(line, segment, begin, tokens, first, [](const Tap&) -> float* { return nullptr; });
        with_taps(a.width, [&](auto constant) {
          for (int64_t c = 0; c < count; c += kWidth) {
            const int64_t some = count - c;
            const TapWeights<decltype(constant)::value> weights(a, weight, c, some);
            const Vec start = bias ? load_some(bias + c, some) : Vec{};
            for (int64_t t = 0; t < tokens; ++t) {
              const Vec total = weights.apply(taps, t, c, some, start);
              float* y = a.y + row.offset(a.tokens, begin + t, a.channels) + first;
              store_some(y + c, a.silu ? total * sigmoid(total) : total, some);
            }
          }
        });
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
    const float* weight = a.weight + row.list * a.width * a.channels + first;
    const float* bias = a.bias ? a.bias + row.list * a.channels + first : nullptr;
    float* dweight = g.dweight + number * a.width * a.channels + first;
    float* dbias = g.dbias + number * a.channels + first;
    TapTile taps(a.width);
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
    for (const Segment& segment : row.segments)
      for (int64_t begin = segment.begin; begin < segment.end; begin += kTile) {
        const int64_t tokens = std::min(kTile, segment.end - begin);
        taps.place(line, segment, begin, tokens, first, target);
        with_taps(a.width, [&](auto constant) {
          for (int64_t c = 0; c < count; c += kWidth) {
            const int64_t some = count - c;
            const TapWeights<decltype(constant)::value> weights(a, weight, c, some);
            const Vec start = bias ? load_some(bias + c, some) : Vec{};
            auto dw = weights;  // of the same shape
            for (int64_t tap = 0; tap < dw.count; ++tap) dw.at[tap] = load_some(dweight + tap * a.channels + c, some);
            Vec db = load_some(dbias + c, some);
            for (int64_t t = 0; t < tokens; ++t) {
              Vec d = load_some(g.dy + row.offset(a.tokens, begin + t, a.channels) + first + c, some);
              if (a.silu) {
                const Vec total = weights.apply(taps, t, c, some, start), gate = sigmoid(total);
                d = d * gate * (splat(1.f) + total * (splat(1.f) - gate));
              }
              db += d;
              for (int64_t tap = 0; tap < dw.count; ++tap) {
                float* to = taps.to(t, tap) + c;
                store_some(to, load_some(to, some) + weights.at[tap] * d, some);
                dw.at[tap] += load_some(taps.from(t, tap) + c, some) * d;
              }
            }
            store_some(dbias + c, db, some);
            for (int64_t tap = 0; tap < dw.count; ++tap) store_some(dweight + tap * a.channels + c, dw.at[tap], some);
          }
        });
      }
  });
}

}  // namespace SIMD_NAME
}  // namespace vision_scan

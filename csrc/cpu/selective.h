// Mamba-1's selective scan: see vision_scan/ops/reference/selective_scan.py.
//
// A unit of work is an image (or a packed segment) and a block, forward several, of channels of one group; it goes
// through the lists of the image one after the other, so that their results are added up in place. The lanes of a
// vector are channels; N is d_state where it is known at compile time, else 0.
#include "rows.h"
#include "simd.h"

namespace vision_scan {
namespace SIMD_NAME {

constexpr int64_t kAhead = 8;  // tokens between asking for memory and using it

struct SelectiveUnit {
  int64_t image, group, first, count, block;
};

inline int64_t selective_blocks(const Selective& a) {
  return (a.channels / a.ngroups + kSelectiveBlock - 1) / kSelectiveBlock;
}

inline int64_t selective_images(const Selective& a) {
  return a.tokens.cu_seqlens ? a.tokens.segments : a.tokens.batch;
}

// Units of `blocks_each` blocks.
template <typename F>
void for_each_selective_unit(const Selective& a, int64_t blocks_each, const F& f) {
  const int64_t per_group = a.channels / a.ngroups, size = blocks_each * kSelectiveBlock;
  const int64_t units = (per_group + size - 1) / size;
  at::parallel_for(0, selective_images(a) * a.ngroups * units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t number = unit % units, group = unit / units % a.ngroups, first = number * size;
      f(SelectiveUnit{unit / units / a.ngroups, group, group * per_group + first,
                      std::min(size, per_group - first), number});
    }
  });
}

// One list of an image, and the addresses of its tokens.
struct SelectiveList {
  const Selective& a;
  const int64_t number;
  const Row row;

  SelectiveList(const Selective& a, int64_t image, int64_t list)
      : a(a), number(a.tokens.cu_seqlens ? image : image * a.tokens.lists + list), row(a.tokens, number) {}

  int64_t input(int64_t place) const {
    return a.shared_input ? (row.batch * a.tokens.cells + row.cells[place]) * a.channels : own(place);
  }

  int64_t output(int64_t place) const {
    return a.merged_output ? (row.batch * a.tokens.cells + row.cells[place]) * a.channels : own(place);
  }

  int64_t own(int64_t place) const {
    return row.offset(a.tokens, place, a.channels);
  }

  int64_t group_offset(int64_t place, int64_t group) const {
    return row.offset(a.tokens, place, a.ngroups * a.d_state) + group * a.d_state;
  }

  // Of a parameter (lists, channels).
  int64_t parameter(int64_t channel) const {
    return row.list * a.channels + channel;
  }

  int64_t state(int64_t channel) const {
    return (number * a.channels + channel) * a.d_state;
  }
};

// log(1 + e^x), the logarithm as a polynomial that is fitted to it between 0 and 1.
ALWAYS_INLINE Vec softplus(Vec x) {
  const Vec e = exp(-max(x, -x)), e2 = e * e, e4 = e2 * e2;
  const Vec low = (splat(-0.24844369f) * e + splat(0.33319271f)) * e2 + (splat(-0.49999502f) * e + splat(1.f));
  const Vec high = (splat(-0.02958851f) * e + splat(0.07836167f)) * e2 + (splat(-0.13674770f) * e + splat(0.19111431f));
  return max(splat(0.f), x) + e * ((splat(0.00525346f) * e4 + high) * e4 + low);
}

// A vector of channels of one list: its parameters and its state, (d_state) vectors. The rates are A / ln2, so that a
// step's decay is 2^(step * rate).
template <int N>
struct SelectiveLanes {
  const SelectiveList& list;
  const Selective& a;
  const int64_t channel, count, group;
  const int n;
  Vec bias, skip;
  VecArray rates;

  SelectiveLanes(const SelectiveList& list, int64_t channel, int64_t count, int64_t group)
      : list(list), a(list.a), channel(channel), count(std::min<int64_t>(count, kWidth)), group(group),
        n(N ? N : static_cast<int>(a.d_state)), bias{}, skip{}, rates(n) {
    if (a.dt_bias) bias = load_lanes(a.dt_bias + list.parameter(channel));
    if (a.D) skip = load_lanes(a.D + list.parameter(channel));
    gather(a.A + list.parameter(channel) * a.d_state, rates.at(0));
    for (int i = 0; i < n; ++i) rates[i] = splat(1.44269504f) * rates[i];
  }

  Vec load_lanes(const float* p) const {
    return load_some(p, count);
  }

  void store_lanes(float* p, Vec v) const {
    store_some(p, v, count);
  }

  // (channels, d_state) in memory to (d_state) vectors of channels, and back.
  void gather(const float* from, Vec* to) const {
    for (int i = 0; i < n; ++i) {
      to[i] = Vec{};
      for (int64_t lane = 0; lane < count; ++lane) to[i][lane] = from[lane * a.d_state + i];
    }
  }

  void scatter(const Vec* from, float* to) const {
    for (int i = 0; i < n; ++i)
      for (int64_t lane = 0; lane < count; ++lane) to[lane * a.d_state + i] = from[i][lane];
  }

  Vec raw_step(int64_t place) const {
    return load_lanes(a.dt + list.own(place) + channel) + bias;
  }

  Vec step(Vec raw) const {
    return a.dt_softplus ? softplus(raw) : raw;
  }

  Vec input(int64_t place) const {
    return load_lanes(a.u + list.input(place) + channel);
  }

  const float* B(int64_t place) const {
    return a.B + list.group_offset(place, group);
  }

  const float* C(int64_t place) const {
    return a.C + list.group_offset(place, group);
  }
};

template <int N>
std::vector<SelectiveLanes<N>> make_lanes(const SelectiveList& list, const SelectiveUnit& unit) {
  std::vector<SelectiveLanes<N>> lanes;
  for (int64_t c = 0; c < unit.count; c += kWidth)
    lanes.emplace_back(list, unit.first + c, unit.count - c, unit.group);
  return lanes;
}

// Forward through one list: a unit's channels token by token, because a token's numbers stand together in memory, and a
// block of them at a time, because a processor works on several vectors at once. What a channel gets does not depend on
// the other channels of its unit.
template <int N>
class SelectiveForward {
 public:
  SelectiveForward(const SelectiveList& list, const SelectiveUnit& unit)
      : list(list), a(list.a), unit(unit), lanes(make_lanes<N>(list, unit)), n(N ? N : static_cast<int>(a.d_state)),
        vectors(static_cast<int>(lanes.size())), bias(vectors), skip(vectors), rates(vectors * n), states(vectors * n) {
    for (int v = 0; v < vectors; ++v) {
      std::memcpy(rates.at(v * n), lanes[v].rates.at(0), sizeof(Vec) * n);
      bias[v] = lanes[v].bias;
      skip[v] = lanes[v].skip;
      if (a.initial_state) lanes[v].gather(a.initial_state + list.state(lanes[v].channel), states.at(v * n));
    }
  }

  void run() {
    const int whole = static_cast<int>(unit.count / kWidth);
    for (const Segment& segment : list.row.segments) {
      if (segment.begin > 0) states.clear();
      for (int64_t place = segment.begin; place < segment.end; ++place) {
        const Token token = token_at(place), ahead = token_at(std::min(place + kAhead, segment.end - 1));
        int first = 0;
        for (; first + kBatch <= whole; first += kBatch) advance<true>(token, ahead, first);
        if (first < vectors) advance<false>(token, ahead, first);
      }
    }
    for (int v = 0; v < vectors; ++v)
      lanes[v].scatter(states.at(v * n), a.final_state + list.state(lanes[v].channel));
  }

 private:
  static constexpr int kBatch = kSelectiveBlock / kWidth;

  // Where a token's numbers begin, dt, u and y at the unit's first channel.
  struct Token {
    const float *dt, *u, *B, *C;
    float* y;
  };

  Token token_at(int64_t place) const {
    return {a.dt + list.own(place) + unit.first, a.u + list.input(place) + unit.first, lanes[0].B(place),
            lanes[0].C(place), a.y + list.output(place) + unit.first};
  }

  // A token's step of the block of channels that begins at vector `first`; kWhole: the block is full. It asks for
  // the memory of the token `ahead`, because an order jumps through memory as no processor foresees.
  template <bool kWhole>
  void advance(const Token& token, const Token& ahead, int first) {
    const int64_t count = unit.count - first * kWidth;
    const int size = kWhole ? kBatch : vectors - first;
    const auto read = [count](const float* p, int v) {
      return kWhole ? load(p + v * kWidth) : load_some(p + v * kWidth, count - v * kWidth);
    };
    const bool is_merged = a.merged_output;
    const float *dt = token.dt + first * kWidth, *input = token.u + first * kWidth, *B = token.B, *C = token.C;
    float* output = token.y + first * kWidth;
    for (const float* p : {ahead.dt, ahead.u, static_cast<const float*>(ahead.y)})
      prefetch(p + first * kWidth, sizeof(float) * (kWhole ? kSelectiveBlock : count));
    const Vec *offsets = bias.at(first), *skips = skip.at(first), *rate = rates.at(first * n);
    Vec* h = states.at(first * n);
    Vec steps[kBatch];
    for (int v = 0; v < size; ++v) steps[v] = read(dt, v) + offsets[v];
    if (a.dt_softplus)
      for (int v = 0; v < size; ++v) steps[v] = softplus(steps[v]);
    for (int v = 0; v < size; ++v, rate += N ? N : n, h += N ? N : n) {
      const Vec u = read(input, v), step = steps[v], inflow = step * u;
      Vec y = skips[v] * u;
      for (int i = 0; i < (N ? N : n); ++i) {
        const Vec next = exp2(step * rate[i]) * h[i] + inflow * splat(B[i]);
        y += next * splat(C[i]);
        h[i] = next;
      }
      if (is_merged) y += read(output, v);
      if constexpr (kWhole)
        store(output + v * kWidth, y);
      else
        store_some(output + v * kWidth, y, count - v * kWidth);
    }
  }

  const SelectiveList& list;
  const Selective& a;
  const SelectiveUnit& unit;
  const std::vector<SelectiveLanes<N>> lanes;
  const int n, vectors;
  VecArray bias, skip, rates, states;
};

// Calls f.template run<N>() with the d_state that is compiled for, or 0.
template <typename F>
void with_d_state(int64_t d_state, const F& f) {
  switch (d_state) {
    case 1: return f(std::integral_constant<int, 1>());
    case 4: return f(std::integral_constant<int, 4>());
    case 8: return f(std::integral_constant<int, 8>());
    case 16: return f(std::integral_constant<int, 16>());
    default: return f(std::integral_constant<int, 0>());
  }
}

void selective(const Selective& a) {
  with_d_state(a.d_state, [&](auto n) {
    // As few units as give all threads the same; no sum goes over channels, so that their number changes nothing.
    const int64_t rows = selective_images(a) * a.ngroups, blocks = selective_blocks(a);
    int64_t units = 1;
    while (units < blocks && rows * units % at::get_num_threads()) ++units;
    for_each_selective_unit(a, (blocks + units - 1) / units, [&](const SelectiveUnit& unit) {
      for (int64_t k = 0; k < a.tokens.lists; ++k) {
        const SelectiveList list(a, unit.image, k);
        SelectiveForward<decltype(n)::value>(list, unit).run();
      }
    });
  });
}

}  // namespace SIMD_NAME
}  // namespace vision_scan

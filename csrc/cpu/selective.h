// Mamba-1's selective scan: see vision_scan/ops/reference/selective_scan.py.
//
// A unit of work is an image (or a packed segment) and a block, forward several, of channels of one group; it goes
// through the lists of the image one after the other, so that their results are added up in place. The lanes of a
// vector are channels; N is d_state where it is known at compile time, else 0.
#include "rows.h"
#include "simd.h"

namespace vision_scan {
namespace SIMD_NAME {

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

// Where a token's numbers begin: in dt (and all that has an axis of lists), in u, in y, in B and C.
struct SelectiveToken {
  int64_t own, input, output, group;
};

// One list of an image, and the addresses of its tokens.
struct SelectiveList {
  const Selective& a;
  const int64_t number;
  const Row row;

  SelectiveList(const Selective& a, int64_t image, int64_t list)
      : a(a), number(a.tokens.cu_seqlens ? image : image * a.tokens.lists + list), row(a.tokens, number) {}

  SelectiveToken token(int64_t place, const SelectiveUnit& unit) const {
    const int64_t cell = row.batch * a.tokens.cells + row.cells[place];
    const int64_t listed = (row.batch * a.tokens.lists + row.list) * a.tokens.cells + row.cells[place];
    return {listed * a.channels + unit.first, (a.shared_input ? cell : listed) * a.channels + unit.first,
            (a.merged_output ? cell : listed) * a.channels + unit.first,
            (listed * a.ngroups + unit.group) * a.d_state};
  }

  // Of a parameter (lists, channels).
  int64_t parameter(int64_t channel) const {
    return row.list * a.channels + channel;
  }

  int64_t state(int64_t channel) const {
    return (number * a.channels + channel) * a.d_state;
  }
};

// A vector of channels of one list: its parameters and its state, (d_state) vectors. The rates are A / ln2, so that a
// step's decay is 2^(step * rate).
template <int N>
struct SelectiveLanes {
  const Selective& a;
  const int64_t channel, offset, count;
  const int n;
  Vec bias, skip;
  VecArray rates;

  // The vector that begins `offset` channels behind the unit's first.
  SelectiveLanes(const SelectiveList& list, const SelectiveUnit& unit, int64_t offset)
      : a(list.a), channel(unit.first + offset), offset(offset), count(std::min<int64_t>(unit.count - offset, kWidth)),
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

  Vec raw_step(const SelectiveToken& token) const {
    return load_lanes(a.dt + token.own + offset) + bias;
  }

  Vec step(Vec raw) const {
    return a.dt_softplus ? softplus(raw) : raw;
  }

  Vec input(const SelectiveToken& token) const {
    return load_lanes(a.u + token.input + offset);
  }
};

template <int N>
std::vector<SelectiveLanes<N>> make_lanes(const SelectiveList& list, const SelectiveUnit& unit) {
  std::vector<SelectiveLanes<N>> lanes;
  for (int64_t c = 0; c < unit.count; c += kWidth)
    lanes.emplace_back(list, unit, c);
  return lanes;
}

// Forward through one list, token by token, because a token's numbers stand together in memory, and in loops over all
// channels of a unit, because a processor works on several vectors at once. What a channel gets does not depend on the
// other channels of its unit.
template <int N>
class SelectiveForward {
 public:
  SelectiveForward(const SelectiveList& list, const SelectiveUnit& unit)
      : list(list), a(list.a), unit(unit), lanes(make_lanes<N>(list, unit)), n(N ? N : static_cast<int>(a.d_state)),
        vectors(static_cast<int>(lanes.size())), bias(vectors), skip(vectors), steps(vectors), rates(vectors * n),
        states(vectors * n) {
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
        ask_for(std::min(place + kAhead, segment.end - 1));
        const SelectiveToken token = list.token(place, unit);
        advance<true>(token, 0, whole);
        if (whole < vectors) advance<false>(token, whole, vectors);
      }
    }
    for (int v = 0; v < vectors; ++v)
      lanes[v].scatter(states.at(v * n), a.final_state + list.state(lanes[v].channel));
  }

 private:
  // Asks for the memory of a token, because an order jumps through memory as no processor foresees.
  void ask_for(int64_t place) const {
    const SelectiveToken token = list.token(place, unit);
    for (const float* p : std::initializer_list<const float*>{a.dt + token.own, a.u + token.input, a.y + token.output})
      prefetch(p, sizeof(float) * unit.count);
  }

  // A token's step for the vectors from `first` to before `last`; kWhole: they are full.
  template <bool kWhole>
  void advance(const SelectiveToken& token, int first, int last) {
    const auto read = [this](const float* p, int v) {
      return kWhole ? load(p + v * kWidth) : load_some(p + v * kWidth, unit.count - v * kWidth);
    };
    const float *dt = a.dt + token.own, *input = a.u + token.input, *B = a.B + token.group, *C = a.C + token.group;
    float* output = a.y + token.output;
    const bool is_merged = a.merged_output;
    const Vec* offsets = bias.at(0);
    Vec* step = steps.at(0);
    if (a.dt_softplus)
      for (int v = first; v < last; ++v) step[v] = softplus(read(dt, v) + offsets[v]);
    else
      for (int v = first; v < last; ++v) step[v] = read(dt, v) + offsets[v];
    const Vec *skips = skip.at(0), *rate = rates.at(first * n);
    Vec* h = states.at(first * n);
    for (int v = first; v < last; ++v, rate += N ? N : n, h += N ? N : n) {
      const Vec u = read(input, v), inflow = step[v] * u;
      Vec y = skips[v] * u;
      for (int i = 0; i < (N ? N : n); ++i) {
        const Vec next = exp2(step[v] * rate[i]) * h[i] + inflow * splat(B[i]);
        y += next * splat(C[i]);
        h[i] = next;
      }
      if (is_merged) y += read(output, v);
      if constexpr (kWhole)
        store(output + v * kWidth, y);
      else
        store_some(output + v * kWidth, y, unit.count - v * kWidth);
    }
  }

  const SelectiveList& list;
  const Selective& a;
  const SelectiveUnit& unit;
  const std::vector<SelectiveLanes<N>> lanes;
  const int n, vectors;
  VecArray bias, skip, steps, rates, states;
};

// Calls f(d_state as a constant, or 0 if it is none that is compiled for).
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

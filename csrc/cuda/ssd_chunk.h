// What Mamba-2's kernels have in common: their arguments, the decays of a chunk of tokens, and its way into shared
// memory. Formulas: vision_scan/ops/reference/ssd.py.
#pragma once

#include "fragments.h"
#include "tokens.h"

namespace vision_scan {

template <class T>
struct Ssd {
  Tokens tokens;
  int nheads, headdim, ngroups, d_state;
  int skip_dims;      // D: 0: none, 1: a number per head, 2: one per channel
  bool dt_softplus;
  bool shared_input;  // all lists read one x, (batch, cells, nheads, headdim)
  float dt_min, dt_max;
  const T *x, *z, *B, *C;  // (batch, lists, cells, nheads, headdim), z or null; (batch, lists, cells, ngroups, d_state)
  const T* dt;             // (batch, lists, cells, nheads), null where it is float32 and stands in `dt32`
  const float* dt32;
  int64_t x_stride, z_stride, B_stride, C_stride, dt_stride;  // from cell to cell; behind it all is contiguous
  bool copy_x, copy_B, copy_C, copy_y;  // whether 16 bytes can be copied at once
  const float *A, *D, *dt_bias;         // (lists, nheads), D also (lists, nheads, headdim); D, dt_bias or null
  const float* initial_state;           // (rows, nheads, segments, headdim, d_state) or null: zeros
  T* y;                                 // (batch, lists, cells, nheads, headdim); padding is not written
  float* final_state;                   // (rows, nheads, headdim, d_state); null: not wanted

  // A row may be cut into `segments` runs of chunks that are worked on at once.
  int segments;
  float* leaving;   // (rows, nheads, segments, headdim, d_state): the states that leave the segments; null: not wanted
  float* decays;    // (rows, nheads, segments): what is left of the states that enter them
  float* entries;   // (rows, nheads, chunks, headdim, d_state): the states that enter the chunks; null: not wanted

  __host__ __device__ __forceinline__ int chunks() const;  // of the longest row
};

namespace ssd {

constexpr int kChunk = 64;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

// The decays of one head in one chunk, in powers of two. A sum of log decays starts anew at a reset: what stands in
// one segment of a row does not touch the bits of another.
struct Times {
  Vec<float, 2> pair[kChunk];  // of a token: sum of the log decays up to it, and dt
  float low[kChunk];           // what the sum's float32 leaves over
  float entry[kChunk];         // decay from the chunk's entry to the token, 0 behind a reset
  float after[kChunk];         // decay from the token to the chunk's end, 0 before a reset
  float leave[kChunk];         // that times dt
  int cell[kChunk];            // -1: padding
  int start[kChunk];           // where the token's segment starts, -1: before the chunk
  float through;               // decay of the whole chunk
  float padding[3];
};

// A row's head: which tensors' cells its tokens read.
struct Head {
  int head, group, parameter;
  int64_t input, base;  // the first cell of x, and of all else
  template <class T>
  __device__ __forceinline__ Head(const Ssd<T>& a, const Row& row, int head)
      : head(head),
        group(head / (a.nheads / a.ngroups)),
        parameter(row.list * a.nheads + head),
        input(a.shared_input ? static_cast<int64_t>(row.batch) * a.tokens.cells : row.base),
        base(row.base) {}
};

// What a lane reads of its two tokens of a chunk before it can compute their decays.
struct RawTimes {
  float dt[2];
  int cell[2];
  bool reset[2];
};

template <class T>
__device__ __forceinline__ RawTimes read_times(const Ssd<T>& a, const Row& row, const Head& head, int chunk) {
  RawTimes raw;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = chunk * kChunk + 2 * lane_id() + i;
    const int mark = t < row.length ? row.mark(t) : kPadding;
    raw.cell[i] = mark & kPadding ? -1 : row.cell(t);
    raw.reset[i] = mark & kReset;
    raw.dt[i] = 0;
    if (raw.cell[i] < 0) continue;
    const int64_t at = (head.base + raw.cell[i]) * a.dt_stride + head.head;
    raw.dt[i] = a.dt ? to_float(a.dt[at]) : a.dt32[at];
  }
  return raw;
}

// dt after bias, softplus and limits. Comparisons let a NaN through.
template <class T>
__device__ __forceinline__ float step_size(const Ssd<T>& a, float dt, float bias) {
  dt += bias;
  if (a.dt_softplus) dt = softplus(dt);
  return dt < a.dt_min ? a.dt_min : dt > a.dt_max ? a.dt_max : dt;
}

// A sum of log decays since the last reset, and where that was.
struct Sum {
  double value;
  int start;
  // This one first, then `next`.
  __device__ __forceinline__ Sum then(const Sum& next) const {
    return {next.start < 0 ? value + next.value : next.value, next.start < 0 ? start : next.start};
  }
};

// By one whole warp, two tokens a lane. `rate`: A in powers of two.
template <class T>
__device__ __forceinline__ void write_times(const Ssd<T>& a, const RawTimes& raw, float bias, double rate, Times& to) {
  const int lane = lane_id();
  float dt[2];
  Sum sum[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    dt[i] = raw.cell[i] < 0 ? 0.0f : step_size(a, raw.dt[i], bias);
    sum[i] = {dt[i] * rate, raw.reset[i] ? 2 * lane + i : -1};
  }
  Sum until = sum[0].then(sum[1]);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Sum before{__shfl_up_sync(kAllLanes, until.value, distance), __shfl_up_sync(kAllLanes, until.start, distance)};
    if (lane >= distance) until = before.then(until);
  }
  const Sum last{__shfl_sync(kAllLanes, until.value, 31), __shfl_sync(kAllLanes, until.start, 31)};
  const Sum before{__shfl_up_sync(kAllLanes, until.value, 1), __shfl_up_sync(kAllLanes, until.start, 1)};
  if (lane) sum[0] = before.then(sum[0]);
  sum[1] = sum[0].then(sum[1]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int j = 2 * lane + i;
    const float high = static_cast<float>(sum[i].value);
    to.pair[j] = {high, dt[i]};
    to.low[j] = static_cast<float>(sum[i].value - high);
    to.entry[j] = sum[i].start < 0 ? exp2_fast(high) : 0.0f;
    to.after[j] = j >= last.start ? exp2_fast(static_cast<float>(last.value - sum[i].value)) : 0.0f;
    to.leave[j] = to.after[j] * dt[i];
    to.cell[j] = raw.cell[i];
    to.start[j] = sum[i].start;
  }
  if (lane == 0) to.through = last.start < 0 ? exp2_fast(static_cast<float>(last.value)) : 0.0f;
}

// Rows first .. first + count - 1 of a tile from the cells of a chunk, by `threads` threads of which this is number
// `thread`. A cell's numbers start at from + cell * stride; of them there are `columns`, and zeros behind them.
template <class T, int width>
__device__ __forceinline__ void copy_rows(const Tile<T, width>& tile, const int* cells, int first, int count, const T* from,
                                          int64_t stride, int columns, bool at_once, int thread, int threads) {
  constexpr int kPiece = Tile<T, width>::kPiece, kPieces = width / kPiece;
  for (int i = thread; i < count * kPieces; i += threads) {
    const int row = first + i / kPieces, column = i % kPieces * kPiece, cell = cells[row];
    const bool real = cell >= 0 && column < columns;
    const T* at = from + (real ? cell * stride + column : 0);
    if (at_once) {
      copy_async(tile.place(row, column), at, real);
    } else {
#pragma unroll
      for (int j = 0; j < kPiece; ++j)
        *tile.place(row, column + j) = real && column + j < columns ? at[j] : from_float<T>(0.0f);
    }
  }
}

// D of a channel.
template <class T>
__device__ __forceinline__ float skip_weight(const Ssd<T>& a, const Head& head, int p) {
  if (a.skip_dims == 2) return p < a.headdim ? a.D[static_cast<int64_t>(head.parameter) * a.headdim + p] : 0.0f;
  return a.skip_dims == 1 ? a.D[head.parameter] : 0.0f;
}

template <int channels, int states>
struct Block {
  static constexpr int P = channels, N = states;
};

// Calls `run` with the sizes that a block of threads is made for: the next above the scan's own.
template <class T, class Run>
auto with_block(int headdim, int d_state, const Run& run) {
  if (d_state > 128) return run(Block<32, 256>{});
  if constexpr (sizeof(T) == 2) {
    if (headdim <= 32 && d_state > 64) return run(Block<32, 128>{});
    if (headdim <= 32) return d_state > 32 ? run(Block<32, 64>{}) : run(Block<32, 32>{});
  }
  if (d_state > 64) return run(Block<64, 128>{});
  return d_state > 32 ? run(Block<64, 64>{}) : run(Block<64, 32>{});
}
// The same where only the size of the numbers is known.
template <class Run>
auto with_block(size_t number_bytes, int headdim, int d_state, const Run& run) {
  return number_bytes == 4 ? with_block<float>(headdim, d_state, [&](auto block) { return run(float{}, block); })
                           : with_block<bf16>(headdim, d_state, [&](auto block) { return run(bf16{}, block); });
}

}  // namespace ssd

template <class T>
__host__ __device__ __forceinline__ int Ssd<T>::chunks() const {
  return (tokens.seqlen + ssd::kChunk - 1) / ssd::kChunk;
}

}  // namespace vision_scan

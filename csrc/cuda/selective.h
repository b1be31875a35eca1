// The 2-D multi-order selective scan, forward.
//
// A block of threads takes one row of the batch and 16 channels of one group. Channels run fastest over the lanes, so
// that a token's 16 channels are one access of 32 bytes (16-bit numbers), wherever the visiting order goes; the K
// permuted copies are never made. Time is cut into tiles of 256 tokens; in a tile a thread scans 8 tokens of two
// channels from a zero state, the (decay, state) of segments are composed over the threads (h -> decay h + state is
// affine), and the state that enters adds what it contributes. Where the lists are merged, the block goes through them
// one after another and adds into the 16 channels of the whole grid in shared memory, or in float32 scratch if the
// grid is larger: no atomics, and the same bits on every run.
//
// Source: Gu & Dao 2023, "Mamba" (arXiv:2312.00752), section 3.3; Liu et al. 2024, "VMamba" (arXiv:2401.10166).
#pragma once

#include "tokens.h"

namespace vision_scan {

template <class T>
struct Selective {
  Tokens tokens;
  int channels, ngroups, d_state;
  bool dt_softplus;
  bool shared_input;   // all lists read one u, (batch, cells, channels); else (batch, lists, cells, channels)
  bool merged_output;  // the lists are added up into (batch, cells, channels); else kept apart
  const T *u, *dt;     // dt: (batch, lists, cells, channels)
  const T *B, *C;      // (batch, lists, cells, ngroups, d_state)
  const float* A;              // (lists, channels, d_state)
  const float *D, *dt_bias;    // (lists, channels) or null
  const float* initial_state;  // (rows, channels, d_state) or null
  float output_scale;
  T* y;                // of the output's cells; what no list visits becomes zero
  float* final_state;  // (rows, channels, d_state)
  float* scratch;      // (batch, cells, channels) if a grid does not fit into shared memory, else null
  float* entries;      // (rows, tiles, d_state, channels): the state that enters each tile; null: not wanted
  bool states_only;    // no y: the pass that comes before the gradients
};

namespace selective {

constexpr int kChannels = 16;                     // of a block
constexpr int kLanes = kChannels / 2;             // that share a token's channels
constexpr int kParts = 32 / kLanes;               // of a warp: runs of tokens
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kRun = 8;                           // tokens of a thread
constexpr int kTile = kWarps * kParts * kRun;     // 256
constexpr int kStates = 4;                        // whose B and C lie in shared memory at a time
constexpr int kMostStates = 64;

// Shared memory of a block, in floats from the start; `cells` is 0 where nothing is merged in it.
struct Shared {
  float* B;          // [kTile][kStates]
  float* C;          // [kTile][kStates]
  float* totals;     // [2][kWarps][kLanes][4]: decay and state of two channels, of a warp's tokens
  float* carry;      // [2][d_state][kChannels]: the state that enters a tile, and that which leaves it
  float* merged;     // [cells][kChannels]

  __device__ __forceinline__ Shared(unsigned char* from, int d_state) {
    B = reinterpret_cast<float*>(from);
    C = B + kTile * kStates;
    totals = C + kTile * kStates;
    carry = totals + 2 * kWarps * kLanes * 4;
    merged = carry + 2 * d_state * kChannels;
  }
  __host__ static size_t bytes(int d_state, int cells) {
    return sizeof(float) * (2 * kTile * kStates + 2 * kWarps * kLanes * 4 + 2 * d_state * kChannels + cells * kChannels);
  }
};

// Which channels a block takes: 16 of one group; the last block of a group may have fewer.
struct Block {
  int first, count, group;
  __host__ __device__ __forceinline__ Block(int block, int channels, int ngroups) {
    const int of_group = channels / ngroups, blocks = (of_group + kChannels - 1) / kChannels;
    group = block / blocks;
    const int at = block % blocks * kChannels;
    first = group * of_group + at;
    count = of_group - at < kChannels ? of_group - at : kChannels;
  }
  __host__ __device__ __forceinline__ static int how_many(int channels, int ngroups) {
    return ngroups * ((channels / ngroups + kChannels - 1) / kChannels);
  }
};

// Where a thread stands: its two channels and its run of tokens in a tile.
struct Place {
  int lane, part, warp, run, channel;  // channel: the first of the pair, of the whole scan
  bool has[2];
  __device__ __forceinline__ explicit Place(const Block& block) {
    lane = lane_id() % kLanes;
    part = lane_id() / kLanes;
    warp = warp_id();
    run = (warp * kParts + part) * kRun;
    channel = block.first + 2 * lane;
    has[0] = 2 * lane < block.count;
    has[1] = 2 * lane + 1 < block.count;
  }
};

// Two neighbouring channels; whole accesses where `channels` is even, which keeps pairs aligned.
template <class T>
__device__ __forceinline__ void read_pair(const T* from, const Place& p, bool even, float (&x)[2]) {
  if (even && p.has[1]) {
    const Vec<T, 2> both = load<2>(from);
    x[0] = to_float(both.at[0]);
    x[1] = to_float(both.at[1]);
  } else {
    x[0] = p.has[0] ? to_float(from[0]) : 0.0f;
    x[1] = p.has[1] ? to_float(from[1]) : 0.0f;
  }
}
template <class T>
__device__ __forceinline__ void write_pair(T* to, const Place& p, bool even, const float (&x)[2]) {
  if (even && p.has[1]) {
    store<2>(to, Vec<T, 2>{from_float<T>(x[0]), from_float<T>(x[1])});
  } else {
    if (p.has[0]) to[0] = from_float<T>(x[0]);
    if (p.has[1]) to[1] = from_float<T>(x[1]);
  }
}

// A segment's effect on the state, h -> decay h + state, of two channels.
struct Effect {
  float decay[2], state[2];
  // This one first, then `next`.
  __device__ __forceinline__ Effect then(const Effect& next) const {
    Effect both;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      both.decay[i] = decay[i] * next.decay[i];
      both.state[i] = state[i] * next.decay[i] + next.state[i];
    }
    return both;
  }
  __device__ __forceinline__ Effect from_lane(int lane) const {
    Effect other;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      other.decay[i] = __shfl_sync(kAllLanes, decay[i], lane);
      other.state[i] = __shfl_sync(kAllLanes, state[i], lane);
    }
    return other;
  }
  static __device__ __forceinline__ Effect none() { return {{1, 1}, {0, 0}}; }
};

// The effect of all runs of the tile that come before this thread's, in the order of time (or behind it, for a scan
// that goes backwards), with `entering` (the state that enters the tile, 2 channels) put in; and the state that
// leaves. Every thread of the block must come here; `totals` is one half of Shared::totals.
template <bool backwards>
__device__ __forceinline__ void compose(const Effect& own, float* totals, const Place& p, const float (&entering)[2],
                                        float (&before)[2], float (&leaving)[2]) {
  const int rank = backwards ? kParts - 1 - p.part : p.part;  // of this thread's run in its warp
  const auto lane_of = [&](int rank) { return (backwards ? kParts - 1 - rank : rank) * kLanes + p.lane; };
  // Within the warp: the effect of the parts that come before.
  Effect earlier = Effect::none(), all = Effect::none();
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const Effect part = own.from_lane(lane_of(i));
    if (i == rank) earlier = all;
    all = all.then(part);
  }
  if (p.part == 0) {
    float* at = totals + (p.warp * kLanes + p.lane) * 4;
    store<4>(at, Vec<float, 4>{all.decay[0], all.decay[1], all.state[0], all.state[1]});
  }
  __syncthreads();
  // Over the warps: each part of the warp composes some of them, then the parts are put together.
  const int mine = backwards ? kWarps - 1 - p.warp : p.warp;
  Effect some = Effect::none(), some_before = Effect::none();
#pragma unroll
  for (int i = 0; i < kWarps / kParts; ++i) {
    const int order = p.part * (kWarps / kParts) + i;
    const Vec<float, 4> at = load<4>(totals + ((backwards ? kWarps - 1 - order : order) * kLanes + p.lane) * 4);
    const Effect warp{{at.at[0], at.at[1]}, {at.at[2], at.at[3]}};
    if (order < mine) some_before = some_before.then(warp);
    some = some.then(warp);
  }
  Effect warps_before = Effect::none(), tile = Effect::none();
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    warps_before = warps_before.then(some_before.from_lane(i * kLanes + p.lane));
    tile = tile.then(some.from_lane(i * kLanes + p.lane));
  }
  const Effect until = warps_before.then(earlier);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    before[i] = until.decay[i] * entering[i] + until.state[i];
    leaving[i] = tile.decay[i] * entering[i] + tile.state[i];
  }
}

// What a thread knows of its run before it comes to the states: 0 for tokens that are padding.
struct Run {
  int cell[kRun];       // -1: padding
  bool reset[kRun];
  float u[kRun][2], delta[kRun][2];
};

template <class T>
__device__ __forceinline__ void read_run(const Selective<T>& a, const Row& row, const Place& p, int first, bool even,
                                         Run& run, float (*raw_dt)[2] = nullptr) {
  const float* bias = a.dt_bias ? a.dt_bias + row.list * a.channels + p.channel : nullptr;
  const float added[2] = {bias && p.has[0] ? bias[0] : 0.0f, bias && p.has[1] ? bias[1] : 0.0f};
  const int64_t input_base = a.shared_input ? static_cast<int64_t>(row.batch) * a.tokens.cells : row.base;
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    const int t = first + p.run + j;
    const int mark = t < row.length ? row.mark(t) : kPadding;
    const int cell = mark & kPadding ? -1 : row.cell(t);
    run.cell[j] = cell;
    run.reset[j] = mark & kReset;
    run.u[j][0] = run.u[j][1] = run.delta[j][0] = run.delta[j][1] = 0.0f;
    if (cell < 0) continue;
    read_pair(a.u + (input_base + cell) * a.channels + p.channel, p, even, run.u[j]);
    read_pair(a.dt + (row.base + cell) * a.channels + p.channel, p, even, run.delta[j]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      run.delta[j][i] += added[i];
      if (raw_dt) raw_dt[j][i] = run.delta[j][i];
      if (a.dt_softplus) run.delta[j][i] = softplus(run.delta[j][i]);
    }
  }
}

// B, C (or only B) of up to kStates states of a tile, into shared memory; zeros where there is nothing.
template <class T>
__device__ __forceinline__ void read_states(const Selective<T>& a, const Row& row, int group, int tile, int state,
                                            float* B, float* C) {
  for (int i = threadIdx.x; i < kTile * kStates; i += kThreads) {
    const int t = tile + i / kStates, n = state + i % kStates;
    const int cell = t < row.length && !(row.mark(t) & kPadding) ? row.cell(t) : -1;
    const bool there = cell >= 0 && n < a.d_state;
    const int64_t at = ((row.base + cell) * a.ngroups + group) * a.d_state + n;
    B[i] = there ? to_float(a.B[at]) : 0.0f;
    if (C) C[i] = there ? to_float(a.C[at]) : 0.0f;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward(Selective<T> a) {
  const int blocks = Block::how_many(a.channels, a.ngroups);
  const Block block(blockIdx.x % blocks, a.channels, a.ngroups);
  const int unit = blockIdx.x / blocks;  // a row, or with a merge all the rows of an image
  const Place p(block);
  const Shared shared(shared_memory(), a.d_state);
  const bool even = a.channels % 2 == 0 && block.first % 2 == 0;
  const bool merge = a.merged_output && !a.states_only;
  const int cells = a.tokens.cells;
  // Without a merge every list is a block of its own.
  const int first_row = merge ? unit * a.tokens.lists : unit;
  const int rows = merge ? a.tokens.lists : 1;

  float* merged = a.scratch ? a.scratch + static_cast<int64_t>(unit) * cells * a.channels + block.first : shared.merged;
  const int merged_stride = a.scratch ? a.channels : kChannels;
  if (merge)
    for (int i = threadIdx.x; i < cells * kChannels; i += kThreads)
      if (i % kChannels < block.count) merged[static_cast<int64_t>(i / kChannels) * merged_stride + i % kChannels] = 0.0f;

  for (int r = first_row; r < first_row + rows; ++r) {
    const Row row = a.tokens.row(r);
    __syncthreads();  // the row before is merged, its carry no longer read
    for (int i = threadIdx.x; i < a.d_state * kChannels; i += kThreads) {
      const int n = i / kChannels, c = i % kChannels;
      const int64_t at = (static_cast<int64_t>(r) * a.channels + block.first + c) * a.d_state + n;
      shared.carry[i] = a.initial_state && c < block.count ? a.initial_state[at] : 0.0f;
    }
    float skip[2] = {0, 0};
    if (a.D) read_pair(a.D + row.list * a.channels + p.channel, p, even, skip);
    const int tiles = (row.length + kTile - 1) / kTile;
    for (int tile = 0; tile < tiles; ++tile) {
      Run run;
      read_run(a, row, p, tile * kTile, even, run);
      float y[kRun][2];
#pragma unroll
      for (int j = 0; j < kRun; ++j)
        for (int i = 0; i < 2; ++i) {
          y[j][i] = skip[i] * run.u[j][i];
          run.u[j][i] *= run.delta[j][i];
        }
      const float* entering = shared.carry + (tile & 1) * a.d_state * kChannels;
      float* leaving = shared.carry + (~tile & 1) * a.d_state * kChannels;

      for (int n = 0; n < a.d_state; ++n) {
        if (n % kStates == 0) {
          __syncthreads();  // the states before are used up, and the carry of the tile before is written
          read_states(a, row, block.group, tile * kTile, n, shared.B, a.states_only ? nullptr : shared.C);
          __syncthreads();
        }
        const float* A = a.A + (static_cast<int64_t>(row.list) * a.channels + p.channel) * a.d_state + n;
        const float rate[2] = {p.has[0] ? A[0] * kLog2e : 0.0f, p.has[1] ? A[a.d_state] * kLog2e : 0.0f};
        float decay[kRun][2], h[kRun][2];
        Effect own = Effect::none();
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
          const float B = shared.B[(p.run + j) * kStates + n % kStates];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            decay[j][i] = run.reset[j] ? 0.0f : exp2_fast(run.delta[j][i] * rate[i]);
            own.state[i] = h[j][i] = own.state[i] * decay[j][i] + run.u[j][i] * B;
            own.decay[i] *= decay[j][i];
          }
        }
        const float enters[2] = {entering[n * kChannels + 2 * p.lane], entering[n * kChannels + 2 * p.lane + 1]};
        float before[2], leaves[2];
        compose<false>(own, shared.totals + (n & 1) * kWarps * kLanes * 4, p, enters, before, leaves);
        if (p.warp == 0 && p.part == 0)
          for (int i = 0; i < 2; ++i) leaving[n * kChannels + 2 * p.lane + i] = leaves[i];
        if (a.entries && p.warp == 0 && p.part == 0)
          for (int i = 0; i < 2; ++i)
            if (p.has[i]) {
              const int64_t most = (a.tokens.seqlen + kTile - 1) / kTile;
              a.entries[((static_cast<int64_t>(r) * most + tile) * a.d_state + n) * a.channels + p.channel + i] = enters[i];
            }
        if (a.states_only) continue;
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
          const float C = shared.C[(p.run + j) * kStates + n % kStates];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            before[i] *= decay[j][i];  // what is left of the state before the run
            y[j][i] += C * (h[j][i] + before[i]);
          }
        }
      }
      if (a.states_only) continue;
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (run.cell[j] < 0) continue;
        if (!merge) {
          write_pair(a.y + (row.base + run.cell[j]) * a.channels + p.channel, p, even, y[j]);
          continue;
        }
        float* at = merged + static_cast<int64_t>(run.cell[j]) * merged_stride + 2 * p.lane;
        for (int i = 0; i < 2; ++i)
          if (p.has[i]) at[i] += y[j][i];
      }
    }
    __syncthreads();
    if (a.final_state) {
      const float* last = shared.carry + (tiles & 1) * a.d_state * kChannels;
      for (int i = threadIdx.x; i < a.d_state * kChannels; i += kThreads) {
        const int n = i / kChannels, c = i % kChannels;
        if (c < block.count) a.final_state[(static_cast<int64_t>(r) * a.channels + block.first + c) * a.d_state + n] = last[i];
      }
    }
  }
  if (!merge) return;
  __syncthreads();
  T* y = a.y + static_cast<int64_t>(unit) * cells * a.channels + block.first;
  for (int i = threadIdx.x; i < cells * kLanes; i += kThreads) {
    const int cell = i / kLanes;
    const float* at = merged + static_cast<int64_t>(cell) * merged_stride + 2 * p.lane;
    const float sums[2] = {p.has[0] ? at[0] * a.output_scale : 0.0f, p.has[1] ? at[1] * a.output_scale : 0.0f};
    write_pair(y + static_cast<int64_t>(cell) * a.channels + 2 * p.lane, p, even, sums);
  }
}

}  // namespace selective

template <class T>
void selective_forward(const Selective<T>& a, cudaStream_t stream);

}  // namespace vision_scan

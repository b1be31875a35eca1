// What the forward and the backward pass of the selective scan have in common: their arguments, how a block of threads
// shares channels and tokens, and how the effects of runs of tokens on the state are put together.
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
  float* entries;      // (rows, tiles, d_state, channels): the state that enters each tile, for the gradients
};

namespace selective {

constexpr int kChannels = 16;                  // of a block
constexpr int kLanes = kChannels / 2;          // that share a token's channels
constexpr int kParts = 32 / kLanes;            // of a warp: runs of tokens
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kRun = 8;                        // tokens of a thread
constexpr int kTile = kWarps * kParts * kRun;
constexpr int kStates = 4;                     // whose B and C lie in shared memory at a time
constexpr int kRow = kTile + 8;                // of one state there: the rows of all states begin in different banks
constexpr int kMostStates = 64;
constexpr unsigned kPaddingBit = 1u << 31, kResetBit = 1u << 30;  // of a cell's number
constexpr unsigned kMarkBits = kPaddingBit | kResetBit;

struct Shared {
  unsigned* cells;  // [2][kTile]: of this tile and of the next, with their marks
  float* B;       // [kStates][kRow]
  float* C;       // [kStates][kRow]
  float* totals;  // [2][kWarps][kLanes][4]: decay and state of two channels, of a warp's tokens
  float* carry;   // [2][d_state][kChannels]: the state that enters a tile, and that which leaves it
  float* merged;  // [cells][kChannels], where results are added up here

  __device__ __forceinline__ Shared(unsigned char* from, int d_state) {
    cells = reinterpret_cast<unsigned*>(from);
    B = reinterpret_cast<float*>(cells + 2 * kTile);
    C = B + kStates * kRow;
    totals = C + kStates * kRow;
    carry = totals + 2 * kWarps * kLanes * 4;
    merged = carry + 2 * d_state * kChannels;
  }
  __host__ static size_t bytes(int d_state, int cells) {
    return sizeof(float) * (2 * kTile + 2 * kStates * kRow + 2 * kWarps * kLanes * 4 + 2 * d_state * kChannels) +
           sizeof(float) * kChannels * static_cast<size_t>(cells);
  }
};

// Which channels a block takes: 16 of one group; the last block of a group may have fewer.
struct Block {
  int first, count, group, of_group;
  __host__ __device__ __forceinline__ Block(int block, int channels, int ngroups) {
    const int size = channels / ngroups, blocks = (size + kChannels - 1) / kChannels;
    group = block / blocks;
    of_group = block % blocks;
    first = group * size + of_group * kChannels;
    count = size - of_group * kChannels < kChannels ? size - of_group * kChannels : kChannels;
  }
  __host__ __device__ __forceinline__ static int how_many(int channels, int ngroups) {
    return ngroups * ((channels / ngroups + kChannels - 1) / kChannels);
  }
  // Whether every block has 16 channels, which then are aligned to whole accesses.
  __host__ static bool all_whole(int channels, int ngroups) { return channels / ngroups % kChannels == 0; }
};

// Where a thread stands: its two channels and its run of tokens in a tile.
template <bool whole>
struct Place {
  int lane, part, warp, run, channel;  // channel: the first of the pair, of the whole scan
  bool has_first, has_second;
  __device__ __forceinline__ explicit Place(const Block& block)
      : lane(lane_id() % kLanes), part(lane_id() / kLanes), warp(warp_id()), run((warp * kParts + part) * kRun),
        channel(block.first + 2 * lane), has_first(whole || 2 * lane < block.count),
        has_second(whole || 2 * lane + 1 < block.count) {}

  template <class T>
  __device__ __forceinline__ void read(const T* from, float (&x)[2]) const {
    if constexpr (whole) {
      const Vec<T, 2> both = load<2>(from);
      x[0] = to_float(both.at[0]);
      x[1] = to_float(both.at[1]);
    } else {
      x[0] = has_first ? to_float(from[0]) : 0.0f;
      x[1] = has_second ? to_float(from[1]) : 0.0f;
    }
  }
  template <class T>
  __device__ __forceinline__ void write(T* to, const float (&x)[2]) const {
    if constexpr (whole) {
      store<2>(to, Vec<T, 2>{from_float<T>(x[0]), from_float<T>(x[1])});
    } else {
      if (has_first) to[0] = from_float<T>(x[0]);
      if (has_second) to[1] = from_float<T>(x[1]);
    }
  }
  __device__ __forceinline__ void add(float* to, const float (&x)[2]) const {
    float sum[2];
    read(to, sum);
    sum[0] += x[0];
    sum[1] += x[1];
    write(to, sum);
  }
};

// A segment's effect on the state, h -> decay h + state, of two channels.
struct Effect {
  float decay[2], state[2];

  // That of the part `distance` parts earlier in time (backwards: later); of no part, nothing changes.
  template <bool backwards>
  __device__ __forceinline__ Effect of_part_before(int distance, bool there) const {
    Effect other;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float d = backwards ? __shfl_down_sync(kAllLanes, decay[i], distance * kLanes)
                                : __shfl_up_sync(kAllLanes, decay[i], distance * kLanes);
      const float s = backwards ? __shfl_down_sync(kAllLanes, state[i], distance * kLanes)
                                : __shfl_up_sync(kAllLanes, state[i], distance * kLanes);
      other.decay[i] = there ? d : 1.0f;
      other.state[i] = there ? s : 0.0f;
    }
    return other;
  }
  __device__ __forceinline__ void apply(float (&h)[2]) const {
    h[0] = decay[0] * h[0] + state[0];
    h[1] = decay[1] * h[1] + state[1];
  }
};

// The state before a thread's run (backwards: behind it), given the effect of each run and `h`, the state that enters
// the tile. True for the threads of the last run, which then have in `h` what leaves the tile; the others have nothing
// of use in it. Every thread of the block must come here.
template <bool backwards, bool whole>
__device__ __forceinline__ bool compose(const Effect& own, float* totals, const Place<whole>& p, float (&h)[2],
                                        float (&before)[2]) {
  const int rank = backwards ? kParts - 1 - p.part : p.part;
  const int order = backwards ? kWarps - 1 - p.warp : p.warp;
  Effect until = own;  // of the runs of the warp up to this one
#pragma unroll
  for (int distance = 1; distance < kParts; distance *= 2) {
    const Effect other = until.template of_part_before<backwards>(distance, rank >= distance);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      until.state[i] = until.decay[i] * other.state[i] + until.state[i];
      until.decay[i] *= other.decay[i];
    }
  }
  const Effect earlier = until.template of_part_before<backwards>(1, rank >= 1);
  if (rank == kParts - 1)
    store<4>(totals + (p.warp * kLanes + p.lane) * 4,
             Vec<float, 4>{until.decay[0], until.decay[1], until.state[0], until.state[1]});
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps - 1; ++i)
    if (i < order) {
      const Vec<float, 4> at = load<4>(totals + ((backwards ? kWarps - 1 - i : i) * kLanes + p.lane) * 4);
      Effect{{at.at[0], at.at[1]}, {at.at[2], at.at[3]}}.apply(h);
    }
  before[0] = h[0];
  before[1] = h[1];
  earlier.apply(before);
  until.apply(h);
  return rank == kParts - 1 && order == kWarps - 1;
}

// What a thread knows of its run before it comes to the states.
struct Run {
  int cell[kRun];
  unsigned padding;  // a bit for each token that is none: its numbers are 0, its cell is not its own
  float cut[kRun];   // added to the logarithm of a decay: 0, or so little at a reset that nothing is left
  float u[kRun][2], delta[kRun][2];
  float cuts, sum[2];  // of the whole run: of cut, of delta
};

// Cells of the tile's tokens for Shared::cells.
__device__ __forceinline__ void find_cells(const Row& row, int tile, unsigned* cells) {
  for (int i = threadIdx.x; i < kTile; i += kThreads) {
    const int t = tile * kTile + i, mark = t < row.length ? row.mark(t) : kPadding;
    const int cell = mark & kPadding ? -1 : row.cell(t);
    cells[i] = cell < 0 ? kPaddingBit : cell | (mark & kReset ? kResetBit : 0);
  }
}

template <class T, bool whole>
__device__ __forceinline__ void read_run(const Selective<T>& a, const Row& row, const Place<whole>& p,
                                         const unsigned* cells, Run& run) {
  unsigned found[kRun], any = 0;
#pragma unroll
  for (int j = 0; j < kRun; j += 4) {
    const Vec<unsigned, 4> four = load<4>(cells + p.run + j);
#pragma unroll
    for (int i = 0; i < 4; ++i) any |= found[j + i] = four.at[i];
  }
  run.padding = 0;
  run.cuts = 0.0f;
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    run.cut[j] = 0.0f;
    run.cell[j] = static_cast<int>(found[j]);
  }
  if (any & kMarkBits) {  // seldom: most runs have no marks
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      run.padding |= (found[j] >> 31) << j;
      if (found[j] & kResetBit) run.cut[j] = run.cuts = -1e30f;
      run.cell[j] = static_cast<int>(found[j] & ~kMarkBits);
    }
  }
  const T* u = a.u + (a.shared_input ? static_cast<int64_t>(row.batch) * a.tokens.cells : row.base) * a.channels + p.channel;
  const T* dt = a.dt + row.base * a.channels + p.channel;
#pragma unroll
  for (int j = 0; j < kRun; ++j) {  // without a branch, so that all accesses are under way at once
    p.read(u + run.cell[j] * a.channels, run.u[j]);
    p.read(dt + run.cell[j] * a.channels, run.delta[j]);
  }
  if (a.dt_bias) {
    float bias[2];
    p.read(a.dt_bias + row.list * a.channels + p.channel, bias);
#pragma unroll
    for (int j = 0; j < kRun; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) run.delta[j][i] += bias[i];
  }
  if (a.dt_softplus) {
#pragma unroll
    for (int j = 0; j < kRun; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) run.delta[j][i] = softplus(run.delta[j][i]);
  }
  if (run.padding) {
#pragma unroll
    for (int j = 0; j < kRun; ++j)
      if (run.padding >> j & 1) run.u[j][0] = run.u[j][1] = run.delta[j][0] = run.delta[j][1] = 0.0f;
  }
  run.sum[0] = run.sum[1] = 0.0f;
#pragma unroll
  for (int j = 0; j < kRun; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) run.sum[i] += run.delta[j][i];
}

// Up to kStates states (of B or C, from the row's first cell and state `n` on) of a tile into shared memory.
template <class T>
__device__ __forceinline__ void read_states(const Selective<T>& a, const T* from, const unsigned* cells, int n, float* to) {
  const int states = a.d_state - n;
  const bool aligned = a.d_state % kStates == 0;
  for (int i = threadIdx.x; i < kTile; i += kThreads) {
    float x[kStates] = {};
    if (!(cells[i] & kPaddingBit)) {
      const T* at = from + static_cast<int64_t>(cells[i] & ~kMarkBits) * (a.ngroups * a.d_state) + n;
      if (aligned) {
        const Vec<T, kStates> all = load<kStates>(at);
#pragma unroll
        for (int k = 0; k < kStates; ++k) x[k] = to_float(all.at[k]);
      } else {
#pragma unroll
        for (int k = 0; k < kStates; ++k)
          if (k < states) x[k] = to_float(at[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kStates; ++k) to[k * kRow + i] = x[k];
  }
}

// The numbers of a run, one a token, of a state in shared memory.
__device__ __forceinline__ void read_tokens(const float* from, float (&x)[kRun]) {
#pragma unroll
  for (int j = 0; j < kRun; j += 4) {
    const Vec<float, 4> four = load<4>(from + j);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[j + i] = four.at[i];
  }
}

}  // namespace selective
}  // namespace vision_scan

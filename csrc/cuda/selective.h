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
      for (int i = 0; i < 2; ++i) run.delta[j][i] = softplus<T>(run.delta[j][i]);
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

// Where results go. kEntries: nothing is wanted but the states that enter the tiles.
enum Output { kEntries, kApart, kOnChip, kInScratch };

// Where the results of all lists are added up, and how far one cell is from the next.
template <Output output>
struct Sums {
  float* at;
  int stride;

  template <class T>
  __device__ __forceinline__ Sums(const Selective<T>& a, int image, const Block& block, float* shared)
      : at(output == kInScratch ? a.scratch + static_cast<int64_t>(image) * a.tokens.cells * a.channels + block.first : shared),
        stride(output == kInScratch ? a.channels : kChannels) {}

  template <bool whole>
  __device__ __forceinline__ void add(int cell, const Place<whole>& p, const float (&x)[2]) const {
    p.add(at + cell * stride + 2 * p.lane, x);
  }
  __device__ __forceinline__ void clear(int cells, int count) const {
    for (int i = threadIdx.x; i < cells * kChannels; i += kThreads)
      if (i % kChannels < count) at[i / kChannels * stride + i % kChannels] = 0.0f;
  }
  // `to`: the block's first channel of the first cell.
  template <class T, bool whole>
  __device__ __forceinline__ void write(int cells, const Place<whole>& p, float scale, T* to, int channels) const {
    for (int i = threadIdx.x; i < cells * kLanes; i += kThreads) {
      const int cell = i / kLanes;
      float sum[2];
      p.read(at + cell * stride + 2 * p.lane, sum);
      sum[0] *= scale;
      sum[1] *= scale;
      p.write(to + cell * channels + 2 * p.lane, sum);
    }
  }
};

template <class T, bool whole, Output output>
__global__ void __launch_bounds__(kThreads) forward(Selective<T> a) {
  const int blocks = Block::how_many(a.channels, a.ngroups);
  const Block block(blockIdx.x % blocks, a.channels, a.ngroups);
  const int unit = blockIdx.x / blocks;  // a row, or with a merge all the rows of an image
  const Place<whole> p(block);
  const Shared shared(shared_memory(), a.d_state);
  constexpr bool outputs = output != kEntries, merge = output == kOnChip || output == kInScratch;
  const Sums<output> sums(a, unit, block, shared.merged);
  if (merge) sums.clear(a.tokens.cells, block.count);
  const int rows = merge ? a.tokens.lists : 1;
  const int most_tiles = (a.tokens.seqlen + kTile - 1) / kTile;

  for (int r = unit * rows; r < (unit + 1) * rows; ++r) {
    const Row row = a.tokens.row(r);
    const int64_t first_state = (static_cast<int64_t>(r) * a.channels + block.first) * a.d_state;
    __syncthreads();  // the row before is merged, and done with shared memory
    find_cells(row, 0, shared.cells);
    for (int i = threadIdx.x; i < a.d_state * kChannels; i += kThreads) {
      const int n = i / kChannels, c = i % kChannels;
      shared.carry[i] = a.initial_state && c < block.count ? a.initial_state[first_state + c * a.d_state + n] : 0.0f;
    }
    __syncthreads();
    float skip[2] = {0, 0};
    if (a.D) p.read(a.D + row.list * a.channels + p.channel, skip);
    const float* A = a.A + (static_cast<int64_t>(row.list) * a.channels + p.channel) * a.d_state;
    const int64_t states = (row.base * a.ngroups + block.group) * a.d_state;
    T* y_row = a.y + row.base * a.channels + p.channel;
    const int tiles = (row.length + kTile - 1) / kTile;
    for (int tile = 0; tile < tiles; ++tile) {
      const unsigned* cells = shared.cells + (tile & 1) * kTile;
      Run run;
      read_run(a, row, p, cells, run);
      float y[kRun][2];
#pragma unroll
      for (int j = 0; j < kRun; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          y[j][i] = skip[i] * run.u[j][i];
          run.u[j][i] *= run.delta[j][i];
        }
      const float* entering = shared.carry + (tile & 1) * a.d_state * kChannels;
      float* leaving = shared.carry + (~tile & 1) * a.d_state * kChannels;

      for (int n = 0; n < a.d_state; ++n) {
        const int at = n % kStates;
        if (at == 0) {
          __syncthreads();  // the states before are used up, and the carry of the tile before is written
          read_states(a, a.B + states, cells, n, shared.B);
          if (outputs) read_states(a, a.C + states, cells, n, shared.C);
          if (n == 0) find_cells(row, tile + 1, shared.cells + (~tile & 1) * kTile);
          __syncthreads();
        }
        const float rate[2] = {p.has_first ? A[n] * kLog2e : 0.0f, p.has_second ? A[a.d_state + n] * kLog2e : 0.0f};
        float B[kRun];
        read_tokens(shared.B + at * kRow + p.run, B);
        float decay[kRun][2], inflow[kRun][2];
        Effect own{{0, 0}, {0, 0}};
#pragma unroll
        for (int j = 0; j < kRun; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            decay[j][i] = exp2_fast(run.delta[j][i] * rate[i] + run.cut[j]);
            inflow[j][i] = run.u[j][i] * B[j];
            own.state[i] = own.state[i] * decay[j][i] + inflow[j][i];
          }
#pragma unroll
        for (int i = 0; i < 2; ++i) own.decay[i] = exp2_fast(run.sum[i] * rate[i] + run.cuts);
        float last[2] = {entering[n * kChannels + 2 * p.lane], entering[n * kChannels + 2 * p.lane + 1]}, h[2];
        if (!outputs && p.run == 0)
          p.write(a.entries + ((static_cast<int64_t>(r) * most_tiles + tile) * a.d_state + n) * a.channels + p.channel, last);
        if (compose<false>(own, shared.totals + (n & 1) * kWarps * kLanes * 4, p, last, h)) {
          leaving[n * kChannels + 2 * p.lane] = last[0];
          leaving[n * kChannels + 2 * p.lane + 1] = last[1];
        }
        if (!outputs) continue;
        float C[kRun];
        read_tokens(shared.C + at * kRow + p.run, C);
#pragma unroll
        for (int j = 0; j < kRun; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            h[i] = h[i] * decay[j][i] + inflow[j][i];
            y[j][i] += C[j] * h[i];
          }
      }
      if (!outputs) continue;
#pragma unroll
      for (int j = 0; j < kRun; ++j)
        if (!(run.padding >> j & 1)) {
          if (merge)
            sums.add(run.cell[j], p, y[j]);
          else
            p.write(y_row + run.cell[j] * a.channels, y[j]);
        }
    }
    __syncthreads();
    if (outputs && a.final_state) {
      const float* last = shared.carry + (tiles & 1) * a.d_state * kChannels;
      for (int i = threadIdx.x; i < a.d_state * kChannels; i += kThreads) {
        const int n = i / kChannels, c = i % kChannels;
        if (c < block.count) a.final_state[first_state + c * a.d_state + n] = last[i];
      }
    }
  }
  if (!merge) return;
  __syncthreads();
  const int64_t image = static_cast<int64_t>(unit) * a.tokens.cells;
  sums.write(a.tokens.cells, p, a.output_scale, a.y + image * a.channels + block.first, a.channels);
}

}  // namespace selective

// y and the final states.
template <class T>
void selective_forward(const Selective<T>& a, cudaStream_t stream);

// Only the states that enter the tiles.
template <class T>
void selective_entries(const Selective<T>& a, cudaStream_t stream);

}  // namespace vision_scan

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

#include "selective_tile.h"

namespace vision_scan {
namespace selective {

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

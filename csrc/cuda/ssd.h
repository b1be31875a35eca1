// Mamba-2's scan on tensor cores, forward.
//
// A block of threads takes one head of one row, and of it up to 64 channels (headdim), through all tokens in chunks of
// 64. The state stays in registers in float32 from the first chunk to the last, so x is read once, y written once and
// nothing else touches memory; B and C come from the second-level cache, where all heads of a group find them. In a chunk
//   Y = e C S^T + M X,   M = (C B^T) exp(cum_i - cum_j) dt_j below the diagonal;   S = through S + X^T (leave B),
// each warp for 16 tokens in the first, for a part of the state in the second. Two or three blocks share a processor:
// while one waits for its copies, the others multiply. A row that is too long for its number of heads is cut into
// segments: their effects on the state, S -> decay S + own, come first, then all of them run at once.
//
// Source: Dao & Gu 2024, "Transformers are SSMs" (arXiv:2405.21060), section 6.
#pragma once

#include "ssd_chunk.h"

namespace vision_scan {
namespace ssd {

// As the sum of how many numbers what is added to the state is taken: so many that the state is exact in float32,
// whatever the dtype of x. With 1 it would have the digits of x, and a third of the products would go.
template <class T>
constexpr int kStatePlanes = std::is_same_v<T, f16> ? 2 : 3;

// Which part of the state, P channels x N, a warp has: `kDown` blocks of 16 channels and `kColumns` of N.
template <int P, int N>
struct Part {
  static constexpr int kDown = P * N / 128 >= 16 ? 2 : 1;
  static constexpr int kWarpsDown = P / (16 * kDown), kWarpsAcross = kWarps / kWarpsDown;
  static constexpr int kColumns = N / kWarpsAcross;
  static_assert(kColumns % 16 == 0, "a warp takes whole blocks of 16 columns");
  int p, n;  // the first
  __device__ __forceinline__ Part() : p(warp_id() / kWarpsAcross * kDown * 16), n(warp_id() % kWarpsAcross * kColumns) {}
};

template <int P, int N>
struct State : Part<P, N> {
  using Part<P, N>::kDown, Part<P, N>::kColumns;
  float at[kDown][kColumns / 8][4];

  // Calls f(number, p, n) for every number of this thread and the place where it belongs.
  template <class F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          f(at[i][j][k], this->p + 16 * i + lane_id() / 4 + k / 2 * 8, this->n + 8 * j + lane_id() % 4 * 2 + k % 2);
  }
  // From and to (headdim, d_state) in memory, from channel `first` on; null: zeros.
  __device__ __forceinline__ void read(const float* from, int first, int headdim, int d_state) {
    each([&](float& number, int p, int n) {
      const bool real = from && first + p < headdim && n < d_state;
      number = real ? from[static_cast<int64_t>(first + p) * d_state + n] : 0.0f;
    });
  }
  template <class U>
  __device__ __forceinline__ void write(U* to, int first, int headdim, int d_state) {
    each([&](float& number, int p, int n) {
      if (first + p < headdim && n < d_state) to[static_cast<int64_t>(first + p) * d_state + n] = from_float<U>(number);
    });
  }
  template <class T>
  __device__ __forceinline__ void write(const Tile<T, N>& tile) {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int k = 0; k < 4; k += 2)
          tile.write_pair(this->p + 16 * i + lane_id() / 4 + k / 2 * 8, this->n + 8 * j + lane_id() % 4 * 2,
                          at[i][j][k], at[i][j][k + 1]);
  }

  // S = through S + X^T (leave B) over a chunk.
  template <class T>
  __device__ __forceinline__ void advance(const Tile<T, P>& X, const Tile<T, N>& B, const Times& times) {
    each([&](float& number, int, int) { number *= times.through; });
#pragma unroll
    for (int j = 0; j < kChunk; j += 16) {
      const Vec<float, 2> early = load<2>(times.leave + j + lane_id() % 4 * 2);
      const Vec<float, 2> late = load<2>(times.leave + j + 8 + lane_id() % 4 * 2);
      const float weights[4] = {early.at[0], early.at[1], late.at[0], late.at[1]};
      Left<T, kStatePlanes<T>> x[kDown];
#pragma unroll
      for (int i = 0; i < kDown; ++i)
        x[i] = weigh_columns<T, kStatePlanes<T>>(load_left<true>(X, this->p + 16 * i, j), weights);
#pragma unroll
      for (int n = 0; n < kColumns / 8; n += 2) {
        const Right<T> b = load_right<false>(B, j, this->n + 8 * n);
#pragma unroll
        for (int i = 0; i < kDown; ++i) multiply(at[i][n], at[i][n + 1], x[i], b);
      }
    }
  }
};

// Where a block's tokens lie, from the row's first cell and the head's first number on. It stands in shared memory,
// for registers are scarce.
template <class T>
struct Places {
  Row row;
  double rate;  // A in powers of two
  float bias;   // of dt
  const T *x, *z, *B, *C;
  T* y;
};

template <class T, int P, int N>
struct Shared {
  static constexpr int kWide = N > P ? N : P;
  static constexpr int kSlots = 3;
  Tile<T, P> X;
  Tile<T, N> B;
  Tile<T, kWide> C;  // a warp's own rows; its results stand in them on their way out
  Tile<T, N> S;      // P rows: the state that enters the chunk
  Times* times;      // of a chunk: number chunk % kSlots
  Places<T>* places;

  __device__ __forceinline__ Shared(unsigned char* from) {
    X = {reinterpret_cast<T*>(from)};
    B = {X.at + Tile<T, P>::size(kChunk)};
    C = {B.at + Tile<T, N>::size(kChunk)};
    S = {C.at + Tile<T, kWide>::size(kChunk)};
    times = reinterpret_cast<Times*>(S.at + Tile<T, N>::size(P));
    places = reinterpret_cast<Places<T>*>(times + kSlots);
  }
  static constexpr size_t kBytes =
      sizeof(T) * (Tile<T, P>::size(kChunk) + Tile<T, N>::size(kChunk) + Tile<T, kWide>::size(kChunk) +
                   Tile<T, N>::size(P)) +
      sizeof(Times) * kSlots + sizeof(Places<T>);
};

// A warp's 16 tokens of a chunk: y, without D and the gate.
template <class T, int P, int N>
__device__ __forceinline__ void outputs(const Shared<T, P, N>& shared, const Times& times, float (&y)[P / 8][4]) {
  const int row = warp_id() * 16, lane_row = row + lane_id() / 4, lane_column = lane_id() % 4 * 2;
  float m[kChunk / 8][4] = {};
#pragma unroll
  for (int k = 0; k < N; k += 16) {
    const Left<T> c = load_left<false>(shared.C, row, k);
#pragma unroll
    for (int p = 0; p < P / 8; p += 2) multiply(y[p], y[p + 1], c, load_right<true>(shared.S, k, 8 * p));
#pragma unroll
    for (int j = 0; j < kChunk / 8; j += 2)
      if (8 * j <= row) multiply(m[j], m[j + 1], c, load_right<true>(shared.B, k, 8 * j));
  }
  float sum[2], low[2];
  int start[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] = times.pair[lane_row + 8 * i].at[0];
    low[i] = times.low[lane_row + 8 * i];
    start[i] = times.start[lane_row + 8 * i];
    const float entry = times.entry[lane_row + 8 * i];
#pragma unroll
    for (int p = 0; p < P / 8; ++p) {
      y[p][2 * i] *= entry;
      y[p][2 * i + 1] *= entry;
    }
  }
#pragma unroll
  for (int j = 0; j < kChunk / 8; j += 2) {
    if (8 * j > row) continue;
#pragma unroll
    for (int half = j; half < j + 2; ++half) {
      const int column = 8 * half + lane_column;
      const Vec<float, 4> pairs = load<4>(times.pair[column].at);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = lane_row + i / 2 * 8, from = column + i % 2;
        float exponent = sum[i / 2] - pairs.at[i % 2 * 2];
        if constexpr (sizeof(T) == 4) exponent += low[i / 2] - times.low[from];
        const float weight = exp2_fast(exponent) * pairs.at[i % 2 * 2 + 1];
        m[half][i] = from <= token && from >= start[i / 2] ? m[half][i] * weight : 0.0f;
      }
    }
    const Left<T> left = as_left<T>(m[j], m[j + 1]);
#pragma unroll
    for (int p = 0; p < P / 8; p += 2) multiply(y[p], y[p + 1], left, load_right<false>(shared.X, 8 * j, 8 * p));
  }
}

// Adds D x, gates, and writes a warp's 16 tokens, from channel `first` on.
template <class T, int P, int N>
__device__ __forceinline__ void write_outputs(const Ssd<T>& a, const Head& head, const Shared<T, P, N>& shared,
                                              const Times& times, int first, float (&y)[P / 8][4]) {
  const int row = warp_id() * 16, lane_row = lane_id() / 4, lane_column = lane_id() % 4 * 2;
  const Tile<T, P> stage{shared.C.from_row(row).at};
  const int64_t channels = static_cast<int64_t>(a.nheads) * a.headdim;
  __syncwarp();  // all lanes have read this warp's rows of C
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = row + lane_row + 8 * i, cell = times.cell[token];
    T* to = shared.places->y + cell * channels;
    const T* z = a.z && cell >= 0 ? shared.places->z + cell * a.z_stride : nullptr;
#pragma unroll
    for (int j = 0; j < P / 8; ++j) {
      const int p = 8 * j + lane_column;
      float pair[2] = {y[j][2 * i], y[j][2 * i + 1]}, x[2];
      if (a.skip_dims) {
        shared.X.read_pair(token, p, x[0], x[1]);
        pair[0] += skip_weight(a, head, first + p) * x[0];
        pair[1] += skip_weight(a, head, first + p + 1) * x[1];
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (first + p + k >= a.headdim) continue;
        if (z) pair[k] *= silu(to_float(z[p + k]));
        if (!a.copy_y && cell >= 0) to[p + k] = from_float<T>(pair[k]);
      }
      if (a.copy_y) stage.write_pair(lane_row + 8 * i, p, pair[0], pair[1]);
    }
  }
  if (!a.copy_y) return;
  __syncwarp();
  constexpr int kPiece = Tile<T, P>::kPiece, kPieces = P / kPiece;
#pragma unroll
  for (int i = lane_id(); i < 16 * kPieces; i += 32) {
    const int token = i / kPieces, p = i % kPieces * kPiece, cell = times.cell[row + token];
    if (cell >= 0 && first + p < a.headdim)
      store<kPiece>(shared.places->y + cell * channels + p, load<kPiece>(stage.place(token, p)));
  }
  __syncwarp();
}

// With `outputs_wanted` everything; without, only the states. Float32 is allowed all registers, and its speed is not
// the aim.
template <class T, int P, int N, bool outputs_wanted>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 1 : 3) forward(Ssd<T> a) {
  const int blocks = (a.headdim + P - 1) / P, unit = blockIdx.x / blocks, first = blockIdx.x % blocks * P;
  const int segment = blockIdx.y;
  const Shared<T, P, N> shared(shared_memory());
  const Row row = a.tokens.row(unit / a.nheads);
  const Head head(a, row, unit % a.nheads);
  if (threadIdx.x == 0) {
    const int64_t channel = static_cast<int64_t>(head.head) * a.headdim + first, state = static_cast<int64_t>(head.group) * a.d_state;
    *shared.places = {row,
                      a.A[head.parameter] * 1.4426950408889634,
                      a.dt_bias ? a.dt_bias[head.parameter] : 0.0f,
                      a.x + head.input * a.x_stride + channel,
                      a.z ? a.z + head.base * a.z_stride + channel : nullptr,
                      a.B + head.base * a.B_stride + state,
                      a.C + head.base * a.C_stride + state,
                      a.y + head.base * a.nheads * a.headdim + channel};
  }
  const int chunks = (row.length + kChunk - 1) / kChunk, most = (chunks + a.segments - 1) / a.segments;
  const int begin = segment * most < chunks ? segment * most : chunks;
  const int end = begin + most < chunks ? begin + most : chunks;
  const int64_t size = static_cast<int64_t>(a.headdim) * a.d_state, place = static_cast<int64_t>(unit) * a.segments + segment;

  const auto times_of = [&](int chunk) -> Times& { return shared.times[chunk % shared.kSlots]; };
  const auto copy_in = [&](int chunk) {
    const int* cells = times_of(chunk).cell;
    const int columns = a.headdim - first < P ? a.headdim - first : P;
    copy_rows(shared.X, cells, 0, kChunk, shared.places->x, a.x_stride, columns, a.copy_x, threadIdx.x, kThreads);
    copy_rows(shared.B, cells, 0, kChunk, shared.places->B, a.B_stride, a.d_state, a.copy_B, threadIdx.x, kThreads);
    close_copies();
  };
  const auto copy_in_C = [&](int chunk) {
    if constexpr (outputs_wanted) {
      copy_rows(shared.C, times_of(chunk).cell, warp_id() * 16, 16, shared.places->C, a.C_stride, a.d_state, a.copy_C,
                lane_id(), 32);
      close_copies();
    }
  };

  __syncthreads();
  if (warp_id() < 2 && begin + warp_id() < end)
    write_times(a, read_times(a, row, head, begin + warp_id()), shared.places->bias, shared.places->rate,
                times_of(begin + warp_id()));
  State<P, N> state;
  state.read(a.initial_state ? a.initial_state + place * size : nullptr, first, a.headdim, a.d_state);
  float decay = 1;
  __syncthreads();
  if (begin < end) {
    copy_in(begin);
    copy_in_C(begin);
    if constexpr (outputs_wanted) state.write(shared.S);
  }
  for (int chunk = begin; chunk < end; ++chunk) {
    const Times& times = times_of(chunk);
    if (a.entries)
      state.write(a.entries + (static_cast<int64_t>(unit) * a.chunks() + chunk) * size, first, a.headdim, a.d_state);
    wait_for_copies<0>();
    __syncthreads();
    if constexpr (outputs_wanted) {
      float y[P / 8][4] = {};
      outputs(shared, times, y);
      write_outputs(a, head, shared, times, first, y);
      if (chunk + 1 < end) copy_in_C(chunk + 1);
    }
    // The first warp has the fewest products below the diagonal; it computes the decays of the chunk after the next.
    const bool has_times = warp_id() == 0 && chunk + 2 < end;
    RawTimes raw;
    if (has_times) raw = read_times(a, shared.places->row, head, chunk + 2);
    state.advance(shared.X, shared.B, times);
    decay *= times.through;
    if (has_times) write_times(a, raw, shared.places->bias, shared.places->rate, times_of(chunk + 2));
    __syncthreads();
    if (chunk + 1 < end) {
      copy_in(chunk + 1);
      if constexpr (outputs_wanted) state.write(shared.S);
    }
  }
  if (a.final_state && segment + 1 == a.segments) state.write(a.final_state + unit * size, first, a.headdim, a.d_state);
  if (a.leaving) {
    state.write(a.leaving + place * size, first, a.headdim, a.d_state);
    if (threadIdx.x == 0 && first == 0) a.decays[place] = decay;
  }
}

// From the effects of the segments to the states that enter them, in place; a thread for a number of a state.
template <class T>
__global__ void __launch_bounds__(256) compose(Ssd<T> a, const float* initial_state) {
  const int size = a.headdim * a.d_state, pieces = (size + 255) / 256;
  const int at = blockIdx.x % pieces * 256 + threadIdx.x;
  const int64_t unit = blockIdx.x / pieces;
  if (at >= size) return;
  float state = initial_state ? initial_state[unit * size + at] : 0.0f;
  for (int segment = 0; segment < a.segments; ++segment) {
    const int64_t place = unit * a.segments + segment;
    const float own = a.leaving[place * size + at];
    a.leaving[place * size + at] = state;
    state = a.decays[place] * state + own;
  }
}

}  // namespace ssd

// Into how many segments rows are best cut, of which there are `units` blocks' worth, of `chunks` chunks each. Two
// blocks keep a processor busy; a segment's states have to be computed twice, so it is not for less than that.
inline int ssd_segments(int64_t units, int chunks, int processors) {
  if (units >= 2ll * processors || chunks < 4) return 1;
  const int64_t wanted = (6ll * processors + units - 1) / units;
  return static_cast<int>(wanted < chunks / 2 ? wanted : chunks / 2);
}

constexpr int kMostSsdStates = 256;

// How many blocks share a head's channels, and the bytes of shared memory that each needs.
int ssd_blocks(size_t number_bytes, int headdim, int d_state);
size_t ssd_shared_bytes(size_t number_bytes, int headdim, int d_state);

template <class T>
void ssd_forward(const Ssd<T>& a, cudaStream_t stream);
// Only the states: entries, leaving and final_state.
template <class T>
void ssd_states(const Ssd<T>& a, cudaStream_t stream);
template <class T>
void ssd_compose(const Ssd<T>& a, const float* initial_state, cudaStream_t stream);

}  // namespace vision_scan

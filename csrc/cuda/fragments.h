// Matrices in shared memory, and the pieces of them that the tensor cores multiply.
//
// Numbers of 16 bits are taken as they are. A float32 number is taken as the sum of three bf16 numbers, and a product
// as the six products of them that count, which gives about the accuracy of float32.
#pragma once

#include "device.h"

namespace vision_scan {

// Rows of `width` numbers, each row 16 bytes longer than that: eight rows in a column lie in different banks.
template <class T, int width>
struct Tile {
  static constexpr int kPiece = 16 / sizeof(T);  // numbers that are copied at once
  static constexpr int kStride = width + kPiece;
  T* at;

  __host__ __device__ static constexpr int size(int rows) { return rows * kStride; }
  __device__ __forceinline__ T* place(int row, int column) const { return at + row * kStride + column; }
  __device__ __forceinline__ Tile from_row(int row) const { return {at + row * kStride}; }

  __device__ __forceinline__ void read_pair(int row, int column, float& first, float& second) const {
    const Vec<T, 2> both = load<2>(place(row, column));
    first = to_float(both.at[0]);
    second = to_float(both.at[1]);
  }
  __device__ __forceinline__ void write_pair(int row, int column, float first, float second) const {
    store<2>(place(row, column), Vec<T, 2>{from_float<T>(first), from_float<T>(second)});
  }
};

template <class T>
using Operand = std::conditional_t<sizeof(T) == 4, bf16, T>;
template <class T>
constexpr int kPlanes = sizeof(T) == 4 ? 3 : 1;

// A left factor, 16 x 16: the four registers of device.h, for each plane.
template <class T, int planes = kPlanes<T>>
struct Left {
  uint32_t at[planes][4];
};
// A right factor, 16 x 16: two blocks of 8 columns.
template <class T, int planes = kPlanes<T>>
struct Right {
  uint32_t at[planes][2][2];
};

// Two neighbouring numbers of a factor; `put(plane, bits)` takes them.
template <class T, int planes, class Put>
__device__ __forceinline__ void split(float low, float high, const Put& put) {
#pragma unroll
  for (int plane = 0; plane < planes; ++plane) {
    const uint32_t bits = pack<Operand<T>>(low, high);
    put(plane, bits);
    if (plane + 1 == planes) break;
    float taken_low, taken_high;
    unpack<Operand<T>>(bits, taken_low, taken_high);
    low -= taken_low;
    high -= taken_high;
  }
}

// Rows row .. row + 15, columns k .. k + 15 of a tile; `transposed`: of what the tile is the transpose of.
template <bool transposed, class T, int width>
__device__ __forceinline__ Left<T> load_left(const Tile<T, width>& tile, int row, int k) {
  Left<T> left;
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    const int part = lane >> 3, first = (part & 1) * 8, second = (part >> 1) * 8, step = lane & 7;
    load_matrices<transposed>(left.at[0], transposed ? tile.place(k + second + step, row + first)
                                                     : tile.place(row + first + step, k + second));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row + lane / 4 + (i & 1) * 8, c = k + lane % 4 * 2 + (i >> 1) * 8;
      const float low = *(transposed ? tile.place(c, r) : tile.place(r, c));
      const float high = *(transposed ? tile.place(c + 1, r) : tile.place(r, c + 1));
      split<T, kPlanes<T>>(low, high, [&](int plane, uint32_t bits) { left.at[plane][i] = bits; });
    }
  }
  return left;
}

// Rows k .. k + 15, columns column .. column + 15 of a tile; `transposed`: of what the tile is the transpose of.
template <bool transposed, class T, int width>
__device__ __forceinline__ Right<T> load_right(const Tile<T, width>& tile, int k, int column) {
  Right<T> right;
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    const int part = lane >> 3, rows = (part & 1) * 8, columns = (part >> 1) * 8, step = lane & 7;
    uint32_t four[4];
    load_matrices<!transposed>(four, transposed ? tile.place(column + columns + step, k + rows)
                                                : tile.place(k + rows + step, column + columns));
#pragma unroll
    for (int i = 0; i < 4; ++i) right.at[0][i / 2][i % 2] = four[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = k + lane % 4 * 2 + (i & 1) * 8, c = column + lane / 4 + (i >> 1) * 8;
      const float low = *(transposed ? tile.place(c, r) : tile.place(r, c));
      const float high = *(transposed ? tile.place(c, r + 1) : tile.place(r + 1, c));
      split<T, kPlanes<T>>(low, high, [&](int plane, uint32_t bits) { right.at[plane][i / 2][i % 2] = bits; });
    }
  }
  return right;
}

// Two neighbouring blocks of 8 columns of results as a left factor.
template <class T, int planes = kPlanes<T>>
__device__ __forceinline__ Left<T, planes> as_left(const float (&first)[4], const float (&second)[4]) {
  Left<T, planes> left;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float(&from)[4] = i < 2 ? first : second;
    split<T, planes>(from[i % 2 * 2], from[i % 2 * 2 + 1],
                     [&](int plane, uint32_t bits) { left.at[plane][i] = bits; });
  }
  return left;
}

// The left factor with its 16 columns weighed; a lane's columns are `weights` of (first two, last two).
template <class T, int planes>
__device__ __forceinline__ Left<T, planes> weigh_columns(const Left<T>& from, const float (&weights)[4]) {
  Left<T, planes> left;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float low = 0, high = 0;
#pragma unroll
    for (int plane = kPlanes<T> - 1; plane >= 0; --plane) {
      float part_low, part_high;
      unpack<Operand<T>>(from.at[plane][i], part_low, part_high);
      low += part_low;
      high += part_high;
    }
    split<T, planes>(low * weights[i / 2 * 2], high * weights[i / 2 * 2 + 1],
                     [&](int plane, uint32_t bits) { left.at[plane][i] = bits; });
  }
  return left;
}

// first, second += left right, where these are the results' two blocks of 8 columns.
template <class T, int left_planes, int right_planes>
__device__ __forceinline__ void multiply(float (&first)[4], float (&second)[4], const Left<T, left_planes>& left,
                                         const Right<T, right_planes>& right) {
  constexpr int kMost = left_planes > right_planes ? left_planes : right_planes;
#pragma unroll
  for (int i = left_planes - 1; i >= 0; --i)  // the small products first
#pragma unroll
    for (int j = right_planes - 1; j >= 0; --j)
      if (i + j < kMost) {
        multiply_add<Operand<T>>(first, left.at[i], right.at[j][0]);
        multiply_add<Operand<T>>(second, left.at[i], right.at[j][1]);
      }
}

}  // namespace vision_scan

// Where a row's tokens lie: rows of a batch, lists through a grid, or segments packed into one row.
#pragma once

#include "device.h"

namespace vision_scan {

enum Mark : uint8_t { kPadding = 1, kReset = 2 };  // a reset: the token starts a new segment from a zero state

// One sequence. `base` counts cells: token t lies at cell base + cell(t) of a tensor (batch, lists, cells, ...).
struct Row {
  int64_t base;
  int batch, list, length;
  const int* index;
  const uint8_t* marks;

  // The cell that token t reads, or -1: it is padding of the visiting list.
  __host__ __device__ __forceinline__ int cell(int t) const { return index ? index[t] : t; }
  __host__ __device__ __forceinline__ int mark(int t) const { return marks ? marks[t] : 0; }
};

struct Tokens {
  int batch, lists, seqlen, cells;
  const int* index;      // (lists, seqlen) visiting lists, -1: padding; null: one list, in order
  const uint8_t* marks;  // (batch, seqlen) or null
  const int* bounds;     // (segments + 1) boundaries in the one row of a batch of 1, or null
  int segments;

  __host__ __device__ __forceinline__ int rows() const { return bounds ? segments : batch * lists; }

  // Rows are counted with the list running fastest.
  __host__ __device__ __forceinline__ Row row(int r) const {
    if (bounds) return {bounds[r], 0, 0, bounds[r + 1] - bounds[r], nullptr, marks ? marks + bounds[r] : nullptr};
    const int b = r / lists, list = r % lists;
    return {static_cast<int64_t>(r) * cells, b,     list, seqlen, index ? index + static_cast<int64_t>(list) * seqlen : nullptr,
            marks ? marks + static_cast<int64_t>(b) * seqlen : nullptr};
  }
};

}  // namespace vision_scan

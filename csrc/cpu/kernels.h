// What the kernels of each instruction set offer, and their arguments.
//
// Every kernel works on float32 in rows of tokens. Token t of a row is cell t, or, on a grid, the cell that the
// row's visiting list names: index[k * seqlen + t], below 0 a pad.
#pragma once

#include <cstdint>

#include "steps.h"

namespace vision_scan {

// The rows of a call: batch * lists of them, the lists of one image one after another; or one for each segment
// of a packed row (batch 1, one list).
struct Tokens {
  int64_t batch, lists, seqlen, cells;
  const int64_t* index;       // (lists, seqlen) cells, or null: token t is cell t
  const int64_t* seq_idx;     // (batch, seqlen), or null: one segment, no padding
  const int64_t* cu_seqlens;  // (segments + 1), or null
  int64_t segments;

  int64_t rows() const {
    return cu_seqlens ? segments : batch * lists;
  }
};

struct Ssd {
  Tokens tokens;
  int64_t nheads, headdim, ngroups, d_state;
  int64_t skip_dims;  // of D behind the lists: 0 none, 1 (nheads), 2 (nheads, headdim)
  bool dt_softplus;
  float dt_min, dt_max;
  int64_t x_stride, dt_stride, B_stride, C_stride;  // between cells, so that these may be pieces of wider tensors
  // (batch, lists, cells, ...); A, D, dt_bias (lists, ...); states (rows, nheads, headdim, d_state).
  const float *x, *dt, *A, *B, *C, *D, *dt_bias, *initial_state;
  float *y, *final_state;
};

struct SsdGradients {
  const float *dy, *dfinal_state;  // dfinal_state may be null
  float *dx, *ddt, *dB, *dC, *dinitial_state;
  // dB and dC have a leading axis, one entry for each block of heads of a group: (head_blocks, ...).
  // Sums over tokens, one for each row: (rows, nheads[, headdim]).
  float *dA, *dD, *ddt_bias;
};

// Heads of one group that are worked on together, because they share B and C. A constant, so that sums over
// blocks of heads do not depend on the number of threads.
constexpr int64_t kHeadBlock = 4;

constexpr int64_t kMostTaps = 16;  // width of a convolution at most

struct Conv {
  Tokens tokens;
  int64_t channels, width;
  bool silu, shared_input;  // shared_input: x has no axis of lists
  int64_t x_stride;         // between cells
  // x, y (batch, lists, cells, channels); weight (lists, width, channels), the last row weighs the current
  // token; bias (lists, channels) or null; states (rows, width - 1, channels), the oldest first.
  const float *x, *weight, *bias, *initial_state;
  float *y, *final_state;
};

struct ConvGradients {
  const float *dy, *dfinal_state;
  float *dx, *dinitial_state;  // dx always has the axis of lists
  // One for each row: (rows, width, channels) and (rows, channels).
  float *dweight, *dbias;
};

struct Norm {
  int64_t rows, channels, group_size, x_stride, z_stride;  // strides: between rows
  float eps;
  bool norm_before_gate;
  const float *x, *z, *weight;  // z may be null
  float* y;
};

constexpr int64_t kNormRows = 64;  // rows that one partial sum of the weight's gradient covers

struct NormGradients {
  const float* dy;
  float *dx, *dz;
  float* dweight;  // (ceil(rows / kNormRows), channels)
};

constexpr int64_t kSelectiveBlock = 32;  // channels of a unit of work, for the same reason as kHeadBlock

struct Selective {
  Tokens tokens;
  int64_t channels, ngroups, d_state;
  bool dt_softplus;
  bool shared_input;   // u has no axis of lists
  bool merged_output;  // y has no axis of lists: the lists are added up; y starts as zeros
  // u, dt, y (batch, lists, cells, channels); B, C (batch, lists, cells, ngroups, d_state); A (lists, channels,
  // d_state); D, dt_bias (lists, channels) or null; states (rows, channels, d_state).
  const float *u, *dt, *A, *B, *C, *D, *dt_bias, *initial_state;
  float *y, *final_state;
};

struct SelectiveGradients {
  const float *dy, *dfinal_state;  // dy has the shape of y; dfinal_state may be null
  // du has the shape of u, zeros if it is shared. dB and dC have a leading axis, one entry for each block of
  // channels of a group. dA, dD and ddt_bias have a row for each row: (rows, channels[, d_state]).
  float *du, *ddt, *dB, *dC, *dinitial_state, *dA, *dD, *ddt_bias;
};

// A few tokens for some of the slots of a state that is kept.
struct Update {
  int64_t rows, seqlen;
  const int64_t* slots;    // (rows), below 0: the row is skipped; or null: row i has slot i
  const int64_t* seq_idx;  // (rows, seqlen), or null
};

struct SsdUpdate {
  Update update;
  int64_t nheads, headdim, ngroups, d_state, skip_dims;
  bool dt_softplus;
  float dt_min, dt_max;
  // x, z (rows, seqlen, nheads, headdim), dt (rows, seqlen, nheads), B, C (rows, seqlen, ngroups, d_state).
  const float *x, *dt, *A, *B, *C, *D, *z, *dt_bias;
  float *state, *y;  // state (slots, nheads, headdim, d_state); y starts as zeros
};

struct SelectiveUpdate {
  Update update;
  int64_t channels, ngroups, d_state;
  bool dt_softplus;
  // u, dt, z (rows, channels, seqlen), B, C (rows, ngroups, d_state, seqlen), A (channels, d_state).
  const float *u, *dt, *A, *B, *C, *D, *z, *dt_bias;
  float *state, *y;  // state (slots, channels, d_state); y starts as zeros
};

struct ConvUpdate {
  Update update;
  int64_t channels, width;
  bool silu;
  const float *x, *weight, *bias;  // x (rows, channels, seqlen), weight (channels, width)
  float *state, *y;                // state (slots, channels, width - 1); y starts as zeros
};

struct Kernels {
  const char* name;
  void (*ssd)(const Ssd&);
  void (*ssd_backward)(const Ssd&, const SsdGradients&);
  void (*ssd_update)(const SsdUpdate&);
  void (*selective)(const Selective&);
  void (*selective_backward)(const Selective&, const SelectiveGradients&);
  void (*selective_update)(const SelectiveUpdate&);
  void (*conv)(const Conv&);
  void (*conv_backward)(const Conv&, const ConvGradients&);
  void (*conv_update)(const ConvUpdate&);
  void (*norm)(const Norm&);
  void (*norm_backward)(const Norm&, const NormGradients&);
  void (*decode)(const Decode&);
};

extern const Kernels kAvx2Kernels, kAvx512Kernels;

}  // namespace vision_scan

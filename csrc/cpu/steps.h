// A decoding step of a whole language model, as its layers and the threads that work on it together.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "floats.h"

namespace vision_scan {

// How a matrix of weights is stored. float32 and bfloat16: (out, in), row after row. int8 and int4: packed by
// cobra/quantize.py, which says how, with a bfloat16 scale for each row and group of `group` columns.
enum class Format { float32, bfloat16, int8, int4 };

constexpr int64_t kPackedRows = 8;  // rows of a block of packed weights

struct Weights {
  Format format;
  int64_t out, in, group;
  const void* data;
  const uint16_t* scale;
};

// Values in the model's dtype, float32 or bfloat16.
struct Numbers {
  void* data;
  bool half;
};

// Shapes and meaning as in the module of the same name in cobra/lm.
struct Mamba2Layer {
  Weights in_proj, out_proj;
  Numbers conv_weight, conv_bias;
  const float *dt_bias, *A_log, *D, *norm;
  int64_t nheads, headdim, ngroups, d_state, d_conv;
  float eps, dt_min, dt_max;
  bool norm_before_gate;
  Numbers conv;  // state
  float* ssm;
};

struct Mamba1Layer {
  Weights in_proj, x_proj, dt_proj, out_proj;
  Numbers conv_weight, conv_bias;
  const float *dt_bias, *A_log, *D;
  int64_t d_inner, d_state, dt_rank, d_conv;
  Numbers conv;  // state
  float* ssm;
};

struct AttentionLayer {
  Weights q_proj, k_proj, v_proj, o_proj;
  int64_t num_heads, num_kv_heads, headdim;
  float rope_theta;  // 0: no positions
  Numbers k, v;      // state, (batch, num_kv_heads, slots, headdim)
  int64_t* position;
  int64_t slots;
};

struct MlpLayer {
  Weights gate_proj, up_proj, down_proj;
};

// One of them, the norm in front of it and the residual connection around it.
struct Layer {
  enum Kind { mamba2, mamba1, attention, mlp } kind;
  const float* norm;
  float eps;
  Mamba2Layer as_mamba2;
  Mamba1Layer as_mamba1;
  AttentionLayer as_attention;
  MlpLayer as_mlp;
};

struct Decode {
  int64_t batch, seqlen, d_model;
  const int64_t* starts;  // (batch), tokens read before
  const bool* real;       // (batch), false: the row is padding; or null
  const Layer* layers;
  int64_t num_layers;
  const float* norm;  // behind the last layer
  float eps;
  Weights head;
  int64_t keep;   // logits of so many last tokens
  float* hidden;  // (batch, seqlen, d_model), the residual stream, overwritten
  float* shared;  // scratch of shared_floats()
  float* logits;  // (batch, keep, vocab)

  int64_t rows() const {
    return batch * seqlen;
  }

  // Floats that the members exchange within a layer.
  int64_t shared_floats() const {
    int64_t most = 0;
    for (int64_t i = 0; i < num_layers; ++i) {
      const Layer& l = layers[i];
      int64_t width = l.as_mlp.gate_proj.out;
      if (l.kind == Layer::mamba2) width = l.as_mamba2.in_proj.out + l.as_mamba2.nheads * l.as_mamba2.headdim;
      if (l.kind == Layer::mamba1) width = l.as_mamba1.in_proj.out + l.as_mamba1.x_proj.out + l.as_mamba1.d_inner;
      if (l.kind == Layer::attention)
        width = 2 * (l.as_attention.num_heads + l.as_attention.num_kv_heads) * l.as_attention.headdim;
      most = width > most ? width : most;
    }
    return most * rows();
  }
};

// Where the threads of a step wait for each other. They all run at the same time, so waiting is spinning; a
// thread that waits long gives way, in case there are more threads than cores.
class Barrier {
 public:
  explicit Barrier(int64_t parts) : parts_(parts) {}

  void meet(int64_t parts) {
    if (parts == parts_) return;
    const int64_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(parts, std::memory_order_acq_rel) + parts == parts_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins)
      if (spins < 2000)
        __builtin_ia32_pause();
      else
        std::this_thread::yield();
  }

 private:
  const int64_t parts_;
  std::atomic<int64_t> arrived_{0}, phase_{0};
};

struct Range {
  int64_t begin, end;
};

// A thread that does the parts [begin, end) of all of a step's work.
class Member {
 public:
  Member(int64_t begin, int64_t end, int64_t parts, Barrier* barrier)
      : begin_(begin), end_(end), parts_(parts), barrier_(barrier) {}

  // Its share of `count` things, handed out in multiples.
  Range share(int64_t count, int64_t multiple = 1) const {
    const int64_t blocks = (count + multiple - 1) / multiple;
    const auto cut = [&](int64_t part) {
      const int64_t at = blocks * part / parts_ * multiple;
      return at < count ? at : count;
    };
    return {cut(begin_), cut(end_)};
  }

  void meet() {
    barrier_->meet(end_ - begin_);
  }

  // Scratch memory of its own; what was taken under another number stays valid.
  float* scratch(int number, int64_t floats) {
    scratch_[number].reserve(floats);
    return scratch_[number].data();
  }

 private:
  const int64_t begin_, end_, parts_;
  Barrier* const barrier_;
  Floats scratch_[5];
};

}  // namespace vision_scan

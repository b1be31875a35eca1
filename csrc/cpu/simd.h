// Vectors of the instruction set that a file is compiled for. The kernels are written once, in the
// compiler's vector types, and compiled once for each instruction set (see kernels.h).
#pragma once

#include "parallel.h"

namespace vision_scan {
namespace SIMD_NAME {

constexpr int kWidth = SIMD_BYTES / 4;

// For what is called inside of the innermost loops: a call would save all vectors before it.
#define ALWAYS_INLINE __attribute__((always_inline)) inline

typedef float Vec __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

// Asks for memory, a line at a time. In assembler, because GCC takes a function that does nothing but call
// _mm_prefetch for one without effect, and leaves out its calls.
inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) asm volatile("prefetcht0 %0" : : "m"(static_cast<const char*>(p)[i]));
}

inline Vec load(const float* p) {
  return *reinterpret_cast<const Vec*>(p);
}

inline void store(float* p, Vec v) {
  *reinterpret_cast<Vec*>(p) = v;
}

// The first `count` floats, or a whole vector if there are as many; the other lanes are zero.
inline Vec load_some(const float* p, int64_t count) {
  if (count >= kWidth) return load(p);
  Vec v{};
  std::memcpy(&v, p, sizeof(float) * count);
  return v;
}

inline void store_some(float* p, Vec v, int64_t count) {
  if (count >= kWidth)
    store(p, v);
  else
    std::memcpy(p, &v, sizeof(float) * count);
}

inline Vec splat(float x) {
  return x - Vec{};
}

// The larger and the smaller; b where one of them is not a number, so that a NaN in b stays. As intrinsics, because
// the compiler turns a comparison with a constant round and then needs two instructions.
inline Vec max(Vec a, Vec b) {
#ifdef SIMD_AVX512
  return _mm512_max_ps(a, b);
#elif SIMD_BYTES == 32
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Vec min(Vec a, Vec b) {
#ifdef SIMD_AVX512
  return _mm512_min_ps(a, b);
#elif SIMD_BYTES == 32
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

inline float sum(Vec v) {
  typedef float Quarter __attribute__((vector_size(16), aligned(4), may_alias));
  Quarter total = *reinterpret_cast<const Quarter*>(&v);
  for (int i = 4; i < kWidth; i += 4) total += *reinterpret_cast<const Quarter*>(reinterpret_cast<const float*>(&v) + i);
  return (total[0] + total[2]) + (total[1] + total[3]);
}

constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: a number added to it is rounded, and is its low bits then

// (1 + c1 r + ... + c6 r^6) 2^n, with `shifted` = n + kRounder; 0 for n = -127, infinity for n = 128. The powers in
// pairs, so that few steps wait for each other.
ALWAYS_INLINE Vec times_power(Vec r, float c1, float c2, float c3, float c4, float c5, float c6, Vec shifted) {
  const Vec low = splat(c1) * r + splat(1.f), middle = splat(c3) * r + splat(c2), high = splat(c5) * r + splat(c4);
  const Vec q = r * r, p = ((splat(c6) * q + high) * q + middle) * q + low;
  IntVec bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// 2^x to within 2 units in the last place; 0 below -126.5, infinity above 127.5. NaN stays NaN. The polynomial has the
// least relative error for |r| <= 1/2.
ALWAYS_INLINE Vec exp2(Vec x) {
  const Vec clamped = min(splat(128.f), max(splat(-127.f), x)), shifted = clamped + splat(kRounder);
  const Vec r = clamped - (shifted - splat(kRounder));
  return times_power(r, 6.9314718246e-01f, 2.4022647738e-01f, 5.5503323674e-02f, 9.6184369177e-03f,
                     1.3398873853e-03f, 1.5353361960e-04f, shifted);
}

// e^x to within 2 units in the last place; 0 below -87.7, so that a decay underflows to nothing, infinity above 88.3.
// NaN stays NaN.
ALWAYS_INLINE Vec exp(Vec x) {
  const Vec clamped = min(splat(89.f), max(splat(-88.f), x));
  const Vec shifted = clamped * splat(1.44269504f) + splat(kRounder), n = shifted - splat(kRounder);
  const Vec r = (clamped - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);  // of ln2's two parts
  return times_power(r, 1.f, 4.9999994040e-01f, 1.6666431725e-01f, 4.1668001562e-02f, 8.3741610870e-03f,
                     1.3843646739e-03f, shifted);
}

ALWAYS_INLINE Vec sigmoid(Vec x) {
  return splat(1.f) / (splat(1.f) + exp(-x));
}

// log(1 + e^x), the logarithm as a polynomial that is fitted to it between 0 and 1.
ALWAYS_INLINE Vec softplus(Vec x) {
  const Vec e = exp(min(x, -x)), e2 = e * e, e4 = e2 * e2;
  const Vec low = (splat(-0.24844369f) * e + splat(0.33319271f)) * e2 + (splat(-0.49999502f) * e + splat(1.f));
  const Vec high = (splat(-0.02958851f) * e + splat(0.07836167f)) * e2 + (splat(-0.13674770f) * e + splat(0.19111431f));
  return max(splat(0.f), x) + e * ((splat(0.00525346f) * e4 + high) * e4 + low);
}

// C (rows, cols) += A (rows, depth) B (depth, cols). A has any strides, B and C have contiguous rows, and
// `cols` is a multiple of kWidth.
template <int kRows, int kCols>
inline void multiply_tile(
    int depth, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, float* c, int64_t c_row) {
  Vec acc[kRows][kCols];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kCols; ++j) acc[i][j] = load(c + i * c_row + j * kWidth);
  for (int k = 0; k < depth; ++k) {
    Vec right[kCols];
    for (int j = 0; j < kCols; ++j) right[j] = load(b + k * b_row + j * kWidth);
    for (int i = 0; i < kRows; ++i) {
      const Vec left = splat(a[i * a_row + k * a_col]);
      for (int j = 0; j < kCols; ++j) acc[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kCols; ++j) store(c + i * c_row + j * kWidth, acc[i][j]);
}

template <int kCols>
inline void multiply_columns(
    int rows, int depth, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, float* c,
    int64_t c_row) {
  const auto tile = [&](auto count) {
    multiply_tile<decltype(count)::value, kCols>(depth, a, a_row, a_col, b, b_row, c, c_row);
    a += count * a_row;
    c += count * c_row;
    rows -= count;
  };
  if constexpr (kCols < 4)
    while (rows >= 6 && rows != 8) tile(std::integral_constant<int, 6>());
  while (rows >= 4) tile(std::integral_constant<int, 4>());
  if (rows >= 2) tile(std::integral_constant<int, 2>());
  if (rows) tile(std::integral_constant<int, 1>());
}

inline void multiply_add(
    int rows, int cols, int depth, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
    float* c, int64_t c_row) {
  int j = 0;
#if SIMD_BYTES == 64  // there are registers for it
  for (; j + 4 * kWidth <= cols; j += 4 * kWidth)
    multiply_columns<4>(rows, depth, a, a_row, a_col, b + j, b_row, c + j, c_row);
#endif
  for (; j + 2 * kWidth <= cols; j += 2 * kWidth)
    multiply_columns<2>(rows, depth, a, a_row, a_col, b + j, b_row, c + j, c_row);
  for (; j < cols; j += kWidth) multiply_columns<1>(rows, depth, a, a_row, a_col, b + j, b_row, c + j, c_row);
}

// out (8, 8) = in (8, 8) transposed: pairs, then fours, then halves change places.
inline void transpose_eight(const float* in, int64_t in_row, float* out, int64_t out_row) {
  __m256 row[8], mixed[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(in + i * in_row);
  for (int i = 0; i < 8; i += 2) {
    mixed[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    mixed[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    row[i] = _mm256_shuffle_ps(mixed[i], mixed[i + 2], 0x44);
    row[i + 1] = _mm256_shuffle_ps(mixed[i], mixed[i + 2], 0xEE);
    row[i + 2] = _mm256_shuffle_ps(mixed[i + 1], mixed[i + 3], 0x44);
    row[i + 3] = _mm256_shuffle_ps(mixed[i + 1], mixed[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * out_row, _mm256_permute2f128_ps(row[i], row[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * out_row, _mm256_permute2f128_ps(row[i], row[i + 4], 0x31));
  }
}

// out (cols, rows) = in (rows, cols) transposed.
inline void transpose(int rows, int cols, const float* in, int64_t in_row, float* out, int64_t out_row) {
  const int whole_rows = rows / 8 * 8, whole_cols = cols / 8 * 8;
  for (int i = 0; i < whole_rows; i += 8)
    for (int j = 0; j < whole_cols; j += 8) transpose_eight(in + i * in_row + j, in_row, out + j * out_row + i, out_row);
  for (int i = 0; i < rows; ++i)
    for (int j = i < whole_rows ? whole_cols : 0; j < cols; ++j) out[j * out_row + i] = in[i * in_row + j];
}

// Vectors on the heap. Not std::vector<Vec>: a template argument loses the attributes of its type, and with them
// the permission to stand at any address.
class VecArray {
 public:
  explicit VecArray(int64_t count = 0) : count_(count), floats_(count * kWidth) {}

  Vec* at(int64_t i) {
    return reinterpret_cast<Vec*>(floats_.data()) + i;
  }

  const Vec* at(int64_t i) const {
    return reinterpret_cast<const Vec*>(floats_.data()) + i;
  }

  Vec& operator[](int64_t i) {
    return *at(i);
  }

  const Vec& operator[](int64_t i) const {
    return *at(i);
  }

  void clear() {
    floats_.assign(count_ * kWidth);
  }

  void assign(int64_t count) {
    count_ = count;
    floats_.assign(count * kWidth);
  }

 private:
  int64_t count_;
  Floats floats_;
};

inline int padded(int n) {
  return (n + kWidth - 1) / kWidth * kWidth;
}

}  // namespace SIMD_NAME
}  // namespace vision_scan

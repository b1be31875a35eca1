// Products of few rows with a matrix of weights, which is read once: decoding goes at the speed of memory. An output
// is added up in the same order whatever the number of threads.
#include "parallel.h"
#include "simd.h"

namespace vision_scan {
namespace SIMD_NAME {

typedef int8_t ByteVec __attribute__((vector_size(kWidth), aligned(1), may_alias));

inline float to_float(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays one
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to the nearest, ties to even
}

inline Vec load(const uint16_t* p) {
#if SIMD_BYTES == 64
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(wide, 16));
#else
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Vec>(_mm256_slli_epi32(wide, 16));
#endif
}

inline Vec load_some(const uint16_t* p, int64_t count) {
  uint16_t values[kWidth] = {};
  std::memcpy(values, p, sizeof(uint16_t) * std::min<int64_t>(count, kWidth));
  return load(values);
}

// One row of weights times kInputs rows of x, in kSums sums each. Row by row, because memory is fastest when it is
// read in one stream.
template <typename Stored, int kInputs, int kSums, bool kAdd>
inline void multiply_row(const Stored* weights, int64_t in, const float* x, float* y, int64_t y_stride) {
  Vec sums[kInputs][kSums];
  for (int m = 0; m < kInputs; ++m)
    for (int u = 0; u < kSums; ++u) sums[m][u] = Vec{};
  int64_t k = 0;
  for (; k + kSums * kWidth <= in; k += kSums * kWidth)
    for (int u = 0; u < kSums; ++u) {
      const Vec row = load(weights + k + u * kWidth);
      for (int m = 0; m < kInputs; ++m) sums[m][u] += row * load(x + m * in + k + u * kWidth);
    }
  for (; k < in; k += kWidth) {
    const Vec row = load_some(weights + k, in - k);
    for (int m = 0; m < kInputs; ++m) sums[m][0] += row * load_some(x + m * in + k, in - k);
  }
  for (int m = 0; m < kInputs; ++m) {
    for (int u = 1; u < kSums; ++u) sums[m][0] += sums[m][u];
    const float total = sum(sums[m][0]);
    float& out = y[m * y_stride];
    out = kAdd ? out + total : total;
  }
}

template <typename Stored, bool kAdd>
void multiply_plain(const Weights& w, Range range, const float* x, int64_t rows, float* y, int64_t y_stride) {
  for (int64_t r = range.begin; r < range.end; ++r) {
    const Stored* weights = static_cast<const Stored*>(w.data) + r * w.in;
    const auto at = [&](int64_t m) { return y + m * y_stride + r; };
    int64_t m = 0;
    for (; m + 8 <= rows; m += 8) multiply_row<Stored, 8, 1, kAdd>(weights, w.in, x + m * w.in, at(m), y_stride);
    for (; m + 4 <= rows; m += 4) multiply_row<Stored, 4, 2, kAdd>(weights, w.in, x + m * w.in, at(m), y_stride);
    for (; m + 2 <= rows; m += 2) multiply_row<Stored, 2, 4, kAdd>(weights, w.in, x + m * w.in, at(m), y_stride);
    for (; m < rows; ++m) multiply_row<Stored, 1, 4, kAdd>(weights, w.in, x + m * w.in, at(m), y_stride);
  }
}

// Inputs rounded to 8 bits, with a scale for each group, as the weights that they are multiplied with.
struct Rounded {
  int64_t padded_in, groups;
  int8_t* values;  // (rows, padded_in)
  float* scales;   // (rows, groups)
  int32_t* sums;   // (rows, groups) of the values

  Rounded(const Weights& w, const float* x, int64_t rows, Member& me)
      : padded_in((w.in + w.group - 1) / w.group * w.group), groups(padded_in / w.group) {
    scales = me.scratch(3, rows * (2 * groups + padded_in / 4));
    sums = reinterpret_cast<int32_t*>(scales + rows * groups);
    values = reinterpret_cast<int8_t*>(sums + rows * groups);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t g = 0; g < groups; ++g)
        round(x + m * w.in + g * w.group, std::min(w.group, w.in - g * w.group), w.group, m * groups + g);
  }

 private:
  void round(const float* x, int64_t count, int64_t group, int64_t at) {
    Vec largest{};
    for (int64_t k = 0; k < count; k += kWidth) {
      const Vec v = load_some(x + k, count - k);
      largest = max(largest, max(v, -v));
    }
    float most = 0;
    for (int i = 0; i < kWidth; ++i) most = std::max(most, largest[i]);
    scales[at] = most / 127.f;
    const Vec inverse = splat(most > 0 ? 127.f / most : 0.f), magic = splat(12582912.f);
    IntVec total{};
    for (int64_t k = 0; k < group; k += kWidth) {
      const Vec v = k < count ? load_some(x + k, count - k) : Vec{};
      const IntVec rounded = __builtin_convertvector((v * inverse + magic) - magic, IntVec);
      total += rounded;
      *reinterpret_cast<ByteVec*>(values + at * group + k) = __builtin_convertvector(rounded, ByteVec);
    }
    sums[at] = 0;
    for (int i = 0; i < kWidth; ++i) sums[at] += total[i];
  }
};

// Four products of bytes in each of 8 lanes, added to `sums`; a is not negative.
inline __m256i add_products(__m256i sums, __m256i a, __m256i b) {
#if SIMD_BYTES == 64
  return _mm256_dpbusd_epi32(sums, a, b);
#else
  return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
#endif
}

inline __m256i spread(const int8_t* four) {
  int32_t bits;
  std::memcpy(&bits, four, sizeof bits);
  return _mm256_set1_epi32(bits);
}

// A block of kPackedRows rows of packed weights, a lane for each row, times kInputs rounded rows.
template <Format kFormat, int kInputs, bool kAdd>
inline void multiply_block(const Weights& w, int64_t block, const Rounded& x, int64_t first, float* y, int64_t y_stride) {
  constexpr int64_t kStep = 32;  // columns in an inner loop
  constexpr int64_t kBytes = kFormat == Format::int8 ? kPackedRows * kStep : kPackedRows * kStep / 2;
  const uint8_t* weights = static_cast<const uint8_t*>(w.data) + block * (x.padded_in / kStep) * kBytes;
  const uint16_t* scale = w.scale + block * x.groups * kPackedRows;
  __m256 totals[kInputs];
  for (int m = 0; m < kInputs; ++m) totals[m] = _mm256_setzero_ps();
  for (int64_t g = 0; g < x.groups; ++g) {
    __m256i sums[kInputs];
    // int4 codes are stored plus 8: what that adds is taken off first.
    for (int m = 0; m < kInputs; ++m)
      sums[m] = _mm256_set1_epi32(kFormat == Format::int4 ? -8 * x.sums[(first + m) * x.groups + g] : 0);
    for (int64_t k = g * w.group; k < (g + 1) * w.group; k += kStep, weights += kBytes) {
      const int8_t* values = x.values + first * x.padded_in + k;
      if constexpr (kFormat == Format::int8) {
        for (int s = 0; s < 8; ++s) {
          const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights) + s);
          const __m256i size = _mm256_abs_epi8(row);
          for (int m = 0; m < kInputs; ++m)
            sums[m] = add_products(sums[m], size, _mm256_sign_epi8(spread(values + m * x.padded_in + 4 * s), row));
        }
      } else {
        const __m256i low = _mm256_set1_epi8(15);
#if SIMD_BYTES == 32
        __m256i narrow[kInputs];  // 16 bits hold eight products of a code and a byte
        for (int m = 0; m < kInputs; ++m) narrow[m] = _mm256_setzero_si256();
#endif
        for (int s = 0; s < 4; ++s) {
          const __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights) + s);
          const __m256i codes[2] = {_mm256_and_si256(pair, low), _mm256_and_si256(_mm256_srli_epi16(pair, 4), low)};
          for (int half = 0; half < 2; ++half)
            for (int m = 0; m < kInputs; ++m) {
              const __m256i input = spread(values + m * x.padded_in + 4 * (s + 4 * half));
#if SIMD_BYTES == 32
              narrow[m] = _mm256_add_epi16(narrow[m], _mm256_maddubs_epi16(codes[half], input));
#else
              sums[m] = add_products(sums[m], codes[half], input);
#endif
            }
        }
#if SIMD_BYTES == 32
        for (int m = 0; m < kInputs; ++m)
          sums[m] = _mm256_add_epi32(sums[m], _mm256_madd_epi16(narrow[m], _mm256_set1_epi16(1)));
#endif
      }
    }
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scale + g * kPackedRows));
    const __m256 scales = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    for (int m = 0; m < kInputs; ++m) {
      const __m256 both = _mm256_mul_ps(scales, _mm256_set1_ps(x.scales[(first + m) * x.groups + g]));
      totals[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m]), both, totals[m]);
    }
  }
  const int64_t r = block * kPackedRows, count = std::min(kPackedRows, w.out - r);
  for (int m = 0; m < kInputs; ++m) {
    float values[kPackedRows];
    _mm256_storeu_ps(values, totals[m]);
    float* out = y + (first + m) * y_stride + r;
    for (int64_t i = 0; i < count; ++i) out[i] = kAdd ? out[i] + values[i] : values[i];
  }
}

template <Format kFormat, bool kAdd>
void multiply_packed(const Weights& w, Range range, const float* x, int64_t rows, float* y, int64_t y_stride, Member& me) {
  const Rounded inputs(w, x, rows, me);
  for (int64_t block = range.begin / kPackedRows; block * kPackedRows < range.end; ++block) {
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4) multiply_block<kFormat, 4, kAdd>(w, block, inputs, m, y, y_stride);
    for (; m + 2 <= rows; m += 2) multiply_block<kFormat, 2, kAdd>(w, block, inputs, m, y, y_stride);
    for (; m < rows; ++m) multiply_block<kFormat, 1, kAdd>(w, block, inputs, m, y, y_stride);
  }
}

// y[m * y_stride + r] = sum over k of x[m][k] W[r][k], or that added to y, for the rows m of x (rows, w.in) and
// for r in `range`, whose begin is a multiple of kPackedRows.
template <bool kAdd = false>
void multiply(const Weights& w, Range range, const float* x, int64_t rows, float* y, int64_t y_stride, Member& me) {
  if (range.begin >= range.end) return;
  switch (w.format) {
    case Format::float32:
      return multiply_plain<float, kAdd>(w, range, x, rows, y, y_stride);
    case Format::bfloat16:
      return multiply_plain<uint16_t, kAdd>(w, range, x, rows, y, y_stride);
    case Format::int8:
      return multiply_packed<Format::int8, kAdd>(w, range, x, rows, y, y_stride, me);
    case Format::int4:
      return multiply_packed<Format::int4, kAdd>(w, range, x, rows, y, y_stride, me);
  }
}

}  // namespace SIMD_NAME
}  // namespace vision_scan

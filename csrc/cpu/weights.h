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
#ifdef SIMD_AVX512
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(wide, 16));
#elif SIMD_BYTES == 64
  typedef uint16_t HalfVec __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));
  return reinterpret_cast<Vec>(__builtin_convertvector(*reinterpret_cast<const HalfVec*>(p), IntVec) << 16);
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

// Memory is fastest when it is read in one stream; a product that works on several rows of weights at once, or on
// one for long, has to ask for what comes next itself, a line at a time.
inline void prefetch(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(p + i, _MM_HINT_T0);
}

template <bool kAdd>
inline void put(float* out, float value) {
  *out = kAdd ? *out + value : value;
}

// One row of weights times one row of x.
template <typename Stored, bool kAdd>
inline void multiply_row(const Stored* weights, int64_t in, const float* x, float* y) {
  constexpr int kSums = 4;
  Vec sums[kSums];
  for (int u = 0; u < kSums; ++u) sums[u] = Vec{};
  int64_t k = 0;
  for (; k + kSums * kWidth <= in; k += kSums * kWidth)
    for (int u = 0; u < kSums; ++u) sums[u] += load(weights + k + u * kWidth) * load(x + k + u * kWidth);
  for (; k < in; k += kWidth) sums[0] += load_some(weights + k, in - k) * load_some(x + k, in - k);
  put<kAdd>(y, sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

// kRows rows of weights times kInputs rows of x, y (kInputs, y_stride). `ahead` is what to have ready next, of which
// each 2 kWidth columns ask for `ahead_bytes`.
template <typename Stored, int kRows, int kInputs, bool kAdd>
inline void multiply_rows(const Stored* weights, int64_t in, const float* x, float* y, int64_t y_stride,
                          const char* ahead, int64_t ahead_bytes) {
  Vec sums[kRows][kInputs];
  for (int i = 0; i < kRows; ++i)
    for (int m = 0; m < kInputs; ++m) sums[i][m] = Vec{};
  const auto add = [&](auto&& load_at) {
    Vec inputs[kInputs];
    for (int m = 0; m < kInputs; ++m) inputs[m] = load_at(x + m * in);
    for (int i = 0; i < kRows; ++i) {
      const Vec row = load_at(weights + i * in);
      for (int m = 0; m < kInputs; ++m) sums[i][m] += row * inputs[m];
    }
  };
  int64_t k = 0;
  for (; k + 2 * kWidth <= in; k += 2 * kWidth, ahead += ahead_bytes) {
    prefetch(ahead, ahead_bytes);
    add([k](const auto* p) { return load(p + k); });
    add([k](const auto* p) { return load(p + k + kWidth); });
  }
  for (; k < in; k += kWidth) add([k, in](const auto* p) { return load_some(p + k, in - k); });
  for (int i = 0; i < kRows; ++i)
    for (int m = 0; m < kInputs; ++m) put<kAdd>(y + m * y_stride + i, sum(sums[i][m]));
}

// The same for all rows of x; while these pass, the weights stay in the nearest cache.
template <typename Stored, int kRows, bool kAdd>
inline void multiply_inputs(const Stored* weights, int64_t in, const float* x, int64_t rows, float* y,
                            int64_t y_stride) {
  const char* ahead = reinterpret_cast<const char*>(weights + kRows * in);
  const int64_t passes = rows / 4 + rows % 4 / 2 + rows % 2;
  const int64_t bytes = kRows * 2 * kWidth * static_cast<int64_t>(sizeof(Stored)) / passes;
  const auto next = [&](int inputs) {
    x += inputs * in;
    y += inputs * y_stride;
    rows -= inputs;
    ahead += in / (2 * kWidth) * bytes;
  };
  for (; rows >= 4; next(4)) multiply_rows<Stored, kRows, 4, kAdd>(weights, in, x, y, y_stride, ahead, bytes);
  if (rows >= 2) {
    multiply_rows<Stored, kRows, 2, kAdd>(weights, in, x, y, y_stride, ahead, bytes);
    next(2);
  }
  if (rows) multiply_rows<Stored, kRows, 1, kAdd>(weights, in, x, y, y_stride, ahead, bytes);
}

template <typename Stored, bool kAdd>
void multiply_plain(const Weights& w, Range range, const float* x, int64_t rows, float* y, int64_t y_stride) {
  const Stored* weights = static_cast<const Stored*>(w.data);
  int64_t r = range.begin;
  if (rows > 1)
    for (; r + 3 <= range.end; r += 3)
      multiply_inputs<Stored, 3, kAdd>(weights + r * w.in, w.in, x, rows, y + r, y_stride);
  for (; r < range.end; ++r)
    if (rows > 1)
      multiply_inputs<Stored, 1, kAdd>(weights + r * w.in, w.in, x, rows, y + r, y_stride);
    else
      multiply_row<Stored, kAdd>(weights + r * w.in, w.in, x, y + r);
}

// Inputs rounded to 8 bits, with a scale for each group, as the weights that they are multiplied with.
struct Rounded {
  int64_t padded_in, groups;
  int8_t* values;  // (rows, padded_in)
  float* scales;   // (rows, groups)
  float* offsets;  // (rows, groups): what the 8 that is added to every int4 code adds to a product

  Rounded(const Weights& w, const float* x, int64_t rows, Member& me)
      : padded_in((w.in + w.group - 1) / w.group * w.group), groups(padded_in / w.group) {
    scales = me.scratch(3, rows * (padded_in / 4 + 2 * groups));
    values = reinterpret_cast<int8_t*>(scales);
    scales += rows * padded_in / 4;
    offsets = scales + rows * groups;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t g = 0; g < groups; ++g)
        round(x + m * w.in + g * w.group, std::min(w.group, w.in - g * w.group), w.group, m * groups + g);
  }

 private:
  void round(const float* x, int64_t count, int64_t group, int64_t at) {
    Vec largest{}, nothing{};
    for (int64_t k = 0; k < count; k += kWidth) {
      const Vec v = load_some(x + k, count - k);
      largest = max(largest, max(v, -v));
      nothing += v * splat(0.f);
    }
    float most = 0;
    for (int i = 0; i < kWidth; ++i) most = std::max(most, largest[i]);
    scales[at] = most / 127.f + sum(nothing);  // NaN, which max() hides, and infinity make it NaN
    const Vec inverse = splat(most > 0 ? 127.f / most : 0.f), magic = splat(12582912.f);
    IntVec total{};
    for (int64_t k = 0; k < group; k += kWidth) {
      const Vec v = k < count ? load_some(x + k, count - k) : Vec{};
      const IntVec rounded = __builtin_convertvector((v * inverse + magic) - magic, IntVec);
      total += rounded;
      *reinterpret_cast<ByteVec*>(values + at * group + k) = __builtin_convertvector(rounded, ByteVec);
    }
    int32_t all = 0;
    for (int i = 0; i < kWidth; ++i) all += total[i];
    offsets[at] = -8.f * static_cast<float>(all) * scales[at];
  }
};

// Four products of bytes in each of 8 lanes, added to `sums`; a is not negative.
inline __m256i add_products(__m256i sums, __m256i a, __m256i b) {
#ifdef SIMD_AVX512
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
  const char* ahead = reinterpret_cast<const char*>(weights) + (x.padded_in / kStep) * kBytes;
  const uint16_t* scale = w.scale + block * x.groups * kPackedRows;
  __m256 totals[kInputs];
  for (int m = 0; m < kInputs; ++m) totals[m] = _mm256_setzero_ps();
  for (int64_t g = 0; g < x.groups; ++g) {
    __m256i sums[kInputs];
    for (int m = 0; m < kInputs; ++m) sums[m] = _mm256_setzero_si256();
    for (int64_t k = g * w.group; k < (g + 1) * w.group; k += kStep, weights += kBytes, ahead += kBytes) {
      if (first == 0) prefetch(ahead, kBytes);
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
      const int64_t at = (first + m) * x.groups + g;
      const __m256 offset = kFormat == Format::int4 ? _mm256_set1_ps(x.offsets[at]) : _mm256_setzero_ps();
      const __m256 product = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m]), _mm256_set1_ps(x.scales[at]), offset);
      totals[m] = _mm256_fmadd_ps(product, scales, totals[m]);
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

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

// Holds a vector in a register here, so that the compiler keeps the order of what is around: it would rather load
// early, and run out of registers. AVX-512 has twice as many.
ALWAYS_INLINE void hold([[maybe_unused]] Vec& v) {
#if SIMD_BYTES == 32
  asm volatile("" : "+x"(v));
#endif
}

// Before a loop over vectors that are meant to stay in registers: the compiler gives them some only if it has no loop.
#define UNROLL _Pragma("GCC unroll 8")

constexpr int64_t kAskEach = 64;  // columns between asking for memory

// Memory is fastest when it is read in one stream; a product that works on several rows of weights at once, or on
// one for long, has to ask for what comes next itself.
//
// kRows rows of weights times kInputs rows of x, y (kInputs, y_stride). `ahead` is what to have ready next, of which
// each kAskEach columns ask for `ahead_bytes`.
template <typename Stored, int kRows, int kInputs, bool kAdd>
inline void multiply_rows(const Stored* weights, int64_t in, const float* x, float* y, int64_t y_stride,
                          const char* ahead, int64_t ahead_bytes) {
  Vec sums[kRows][kInputs];
  UNROLL for (int i = 0; i < kRows; ++i)
    UNROLL for (int m = 0; m < kInputs; ++m) sums[i][m] = Vec{};
  const auto add = [&](auto&& load_at) __attribute__((always_inline)) {
    Vec rows[kRows];
    UNROLL for (int i = 0; i < kRows; ++i) {
      rows[i] = load_at(weights + i * in);
      hold(rows[i]);
    }
    UNROLL for (int m = 0; m < kInputs; ++m) {
      Vec input = load_at(x + m * in);
      hold(input);
      UNROLL for (int i = 0; i < kRows; ++i) sums[i][m] += rows[i] * input;
    }
  };
  const int64_t whole = in / kWidth * kWidth;
  for (int64_t k = 0; k < whole; ahead += ahead_bytes) {
    prefetch(ahead, ahead_bytes);
    for (const int64_t end = std::min(k + kAskEach, whole); k < end; k += kWidth)
      add([k](const auto* p) { return load(p + k); });
  }
  if (whole < in) add([whole, in](const auto* p) { return load_some(p + whole, in - whole); });
  UNROLL for (int i = 0; i < kRows; ++i)
    UNROLL for (int m = 0; m < kInputs; ++m) put<kAdd>(y + m * y_stride + i, sum(sums[i][m]));
}

// The same for all rows of x; while these pass, the weights stay in the nearest cache.
template <typename Stored, int kRows, bool kAdd>
inline void multiply_inputs(const Stored* weights, int64_t in, const float* x, int64_t rows, float* y,
                            int64_t y_stride) {
  const char* ahead = reinterpret_cast<const char*>(weights + kRows * in);
  const int64_t passes = rows / 4 + rows % 4 / 2 + rows % 2;
  const int64_t bytes = kRows * kAskEach * static_cast<int64_t>(sizeof(Stored)) / passes;
  const auto next = [&](int inputs) {
    x += inputs * in;
    y += inputs * y_stride;
    rows -= inputs;
    ahead += (in + kAskEach - 1) / kAskEach * bytes;
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

constexpr int64_t kStep = 32;  // columns of packed weights that are multiplied at a time

// Inputs rounded to 8 bits, with a scale for each group, as the weights that they are multiplied with; step by step,
// what all rows of x have there.
struct Rounded {
  int64_t rows, padded_in, groups;
  int32_t* words;  // (padded_in / kStep, rows, kStep / 4): four inputs each
  float* scales;   // (groups, rows)
  float* offsets;  // (padded_in / kStep, rows): what the 8 that is added to every int4 code adds to a product
  float* totals;   // (rows, kPackedRows), scratch of a product

  Rounded(const Weights& w, const float* x, int64_t rows, Member& me)
      : rows(rows), padded_in((w.in + w.group - 1) / w.group * w.group), groups(padded_in / w.group) {
    scales = me.scratch(3, rows * (padded_in / 4 + groups + padded_in / kStep + kPackedRows));
    offsets = scales + groups * rows;
    totals = offsets + padded_in / kStep * rows;
    words = reinterpret_cast<int32_t*>(totals + rows * kPackedRows);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t k = 0; k < padded_in; k += w.group) round(x + m * w.in, k, w.in, w.group, m);
  }

 private:
  // The inputs [begin, begin + group) of row m; behind `in` they are zero.
  void round(const float* x, int64_t begin, int64_t in, int64_t group, int64_t m) {
    const auto read = [&](int64_t k) { return k < in ? load_some(x + k, in - k) : Vec{}; };
    Vec largest{}, nothing{};
    for (int64_t k = begin; k < begin + group; k += kWidth) {
      const Vec v = read(k);
      largest = max(largest, max(v, -v));
      nothing += v * splat(0.f);
    }
    float most = 0;
    for (int i = 0; i < kWidth; ++i) most = std::max(most, largest[i]);
    const float scale = most / 127.f + sum(nothing);  // NaN, which max() hides, and infinity make it NaN
    scales[begin / group * rows + m] = scale;
    const Vec inverse = splat(most > 0 ? 127.f / most : 0.f), magic = splat(kRounder);
    for (int64_t step = begin; step < begin + group; step += kStep) {
      IntVec total{};
      for (int64_t k = step; k < step + kStep; k += kWidth) {
        const IntVec rounded = __builtin_convertvector((read(k) * inverse + magic) - magic, IntVec);
        total += rounded;
        int32_t* at = words + (step / kStep * rows + m) * (kStep / 4) + (k - step) / 4;
        *reinterpret_cast<ByteVec*>(at) = __builtin_convertvector(rounded, ByteVec);
      }
      int32_t all = 0;
      for (int i = 0; i < kWidth; ++i) all += total[i];
      offsets[step / kStep * rows + m] = -8.f * static_cast<float>(all) * scale;
    }
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

// Sums of products of a step's codes, 0 to 15, with its words.
inline __m256i multiply_codes(const __m256i* codes, const int32_t* words) {
#ifdef SIMD_AVX512
  __m256i even = _mm256_setzero_si256(), odd = even;
  for (int s = 0; s < 8; s += 2) {
    even = _mm256_dpbusd_epi32(even, codes[s], _mm256_set1_epi32(words[s]));
    odd = _mm256_dpbusd_epi32(odd, codes[s + 1], _mm256_set1_epi32(words[s + 1]));
  }
  return _mm256_add_epi32(even, odd);
#else
  __m256i narrow = _mm256_setzero_si256();  // 16 bits hold eight products of a code and a byte
  for (int s = 0; s < 8; ++s)
    narrow = _mm256_add_epi16(narrow, _mm256_maddubs_epi16(codes[s], _mm256_set1_epi32(words[s])));
  return _mm256_madd_epi16(narrow, _mm256_set1_epi16(1));
#endif
}

// totals[m] += scale * (x_scale[m] * sums + offset), a lane for each row of weights.
inline void add_scaled(float* total, __m256 scale, __m256i sums, float x_scale, float offset) {
  const __m256 product = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(x_scale), _mm256_set1_ps(offset));
  _mm256_storeu_ps(total, _mm256_fmadd_ps(product, scale, _mm256_loadu_ps(total)));
}

// One group of a block of int8 weights times kInputs rows of x, from row m on.
template <int kInputs>
inline void multiply_int8(const __m256i* weights, int64_t steps, __m256 scale, const Rounded& x, int64_t g, int64_t m) {
  const int32_t* words = x.words + (g * steps * x.rows + m) * 8;
  __m256i sums[kInputs];
  for (int i = 0; i < kInputs; ++i) sums[i] = _mm256_setzero_si256();
  for (int64_t step = 0; step < steps; ++step, weights += 8, words += x.rows * 8)
    for (int s = 0; s < 8; ++s) {
      const __m256i row = _mm256_loadu_si256(weights + s), size = _mm256_abs_epi8(row);
      for (int i = 0; i < kInputs; ++i)
        sums[i] = add_products(sums[i], size, _mm256_sign_epi8(_mm256_set1_epi32(words[i * 8 + s]), row));
    }
  for (int i = 0; i < kInputs; ++i)
    add_scaled(x.totals + (m + i) * kPackedRows, scale, sums[i], x.scales[g * x.rows + m + i], 0.f);
}

// The same of int4 weights, all rows of x.
inline void multiply_int4(const __m256i* weights, int64_t steps, __m256 scale, const Rounded& x, int64_t g) {
  const __m256i low = _mm256_set1_epi8(15);
  for (int64_t step = g * steps; step < (g + 1) * steps; ++step, weights += 4) {
    __m256i codes[8];
    for (int s = 0; s < 4; ++s) {
      const __m256i pair = _mm256_loadu_si256(weights + s);
      codes[s] = _mm256_and_si256(pair, low);
      codes[s + 4] = _mm256_and_si256(_mm256_srli_epi16(pair, 4), low);
    }
    for (int64_t m = 0; m < x.rows; ++m)
      add_scaled(x.totals + m * kPackedRows, scale, multiply_codes(codes, x.words + (step * x.rows + m) * 8),
                 x.scales[g * x.rows + m], x.offsets[step * x.rows + m]);
  }
}

// Packed weights, a block of kPackedRows rows after another, a lane for each row.
template <Format kFormat, bool kAdd>
void multiply_packed(const Weights& w, Range range, const float* x, int64_t rows, float* y, int64_t y_stride, Member& me) {
  constexpr int64_t kBytes = kFormat == Format::int8 ? kPackedRows * kStep : kPackedRows * kStep / 2;
  const Rounded inputs(w, x, rows, me);
  const int64_t steps = w.group / kStep, group_bytes = steps * kBytes, block_bytes = inputs.groups * group_bytes;
  for (int64_t block = range.begin / kPackedRows; block * kPackedRows < range.end; ++block) {
    const char* weights = static_cast<const char*>(w.data) + block * block_bytes;
    std::memset(inputs.totals, 0, sizeof(float) * rows * kPackedRows);
    for (int64_t g = 0; g < inputs.groups; ++g, weights += group_bytes) {
      prefetch(weights + block_bytes, group_bytes);
      const auto* half = reinterpret_cast<const __m128i*>(w.scale + (block * inputs.groups + g) * kPackedRows);
      const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(half)), 16);
      const __m256 scale = _mm256_castsi256_ps(wide);
      const auto* codes = reinterpret_cast<const __m256i*>(weights);
      if constexpr (kFormat == Format::int4) {
        multiply_int4(codes, steps, scale, inputs, g);
      } else {
        int64_t m = 0;
        for (; m + 4 <= rows; m += 4) multiply_int8<4>(codes, steps, scale, inputs, g, m);
        for (; m + 2 <= rows; m += 2) multiply_int8<2>(codes, steps, scale, inputs, g, m);
        for (; m < rows; ++m) multiply_int8<1>(codes, steps, scale, inputs, g, m);
      }
    }
    const int64_t r = block * kPackedRows, count = std::min(kPackedRows, w.out - r);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t i = 0; i < count; ++i)
        put<kAdd>(y + m * y_stride + r + i, inputs.totals[m * kPackedRows + i]);
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

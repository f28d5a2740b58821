// The passes over a row of logits, vectorised. Compiled once an instruction set by for_each_simd.h.
#include "vector_math_body.h"

// Largest logit; NaN when the row holds one; -inf when it is empty.
template <class T>
METAREWARD_INLINE float row_top_of(const T* z, int64_t n) {
  const float lowest = -__builtin_inff();
  f32x16 top[4] = {f32x16{} + lowest, f32x16{} + lowest, f32x16{} + lowest, f32x16{} + lowest};
  i32x16 nan = {};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    for (int v = 0; v < 4; ++v) {  // four chains hide the latency of the maximum
      const f32x16 x = load16(z + i + 16 * v);
      nan |= (x != x);
      top[v] = max16(top[v], x);
    }
  }
  for (; i < n; i += 16) {
    const f32x16 x = n - i >= 16 ? load16(z + i) : load_part(z + i, n - i, lowest);
    nan |= (x != x);
    top[0] = max16(top[0], x);
  }
  for (int lane = 0; lane < 16; ++lane) {
    if (nan[lane]) return __builtin_nanf("");
  }
  return horizontal_max(max16(max16(top[0], top[1]), max16(top[2], top[3])));
}

// sum of e^(z - top), in fp64 from fp32 terms: the log-prob it serves is reported in fp32.
template <class T>
METAREWARD_INLINE double sum_exp_of(const T* z, int64_t n, float top) {
  const float log2e = 1.44269504f;
  double total = 0.0;
  for (int64_t start = 0; start < n; start += 1024) {  // lanes add at most 64 terms in fp32
    const int64_t end = start + 1024 < n ? start + 1024 : n;
    f32x16 sum = {};
    int64_t i = start;
    for (; i + 16 <= end; i += 16) sum += exp2_16((load16(z + i) - top) * log2e);
    if (i < end) sum += exp2_16((load_part(z + i, end - i, -__builtin_inff()) - top) * log2e);
    total += horizontal_sum(sum);
  }
  return total;
}

METAREWARD_INLINE f64x8 widen_lower(f32x16 x) {
#ifdef METAREWARD_AVX512  // GCC converts element by element otherwise
  return (f64x8)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
#else
  return __builtin_convertvector(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), f64x8);
#endif
}

METAREWARD_INLINE f64x8 widen_upper(f32x16 x) {
#ifdef METAREWARD_AVX512
  return (f64x8)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
#else
  return __builtin_convertvector(__builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15), f64x8);
#endif
}

// block_sums[b] = the sum of the b-th `block` weights 2^(factor * (z - top)), a multiple of 64; returns the sum of all.
// The sums are fp64: beside a weight of 1, an fp32 sum loses the tokens below 2^-24. When `raw` is given, the sum of
// e^(z - top) comes with it.
template <class T, bool RAW>
METAREWARD_INLINE double sum_weights_of(
    const T* z, int64_t n, float top, ScaleOfTwo factor, int64_t block, double* block_sums, double* raw) {
  const float log2e = 1.44269504f, lowest = -__builtin_inff();
  double total = 0.0, raw_total = 0.0;
  for (int64_t start = 0; start < n; start += block) {
    const int64_t end = start + block < n ? start + block : n;
    f64x8 lower = {}, upper = {};
    f32x16 raw_sum = {};
    for (int64_t i = start; i < end; i += 16) {
      const f32x16 x = (end - i >= 16 ? load16(z + i) : load_part(z + i, end - i, lowest)) - top;
      const f32x16 w = exp2_scaled_16(x, factor);
      lower += widen_lower(w);
      upper += widen_upper(w);
      if (RAW) raw_sum += exp2_16(x * log2e);
    }
    lower += upper;
    double sum = 0.0;
    for (int lane = 0; lane < 8; ++lane) sum += lower[lane];
    block_sums[start / block] = sum;
    total += sum;
    if (RAW) raw_total += horizontal_sum(raw_sum);
  }
  if (RAW) *raw = raw_total;
  return total;
}

// weights[i] = 2^(factor * (z[i] - top)), to the bit those of `sum_weights`. Room for n rounded up to 16.
template <class T>
METAREWARD_INLINE void weights_of(const T* z, int64_t n, float top, ScaleOfTwo factor, float* weights) {
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 x = n - i >= 16 ? load16(z + i) : load_part(z + i, n - i, -__builtin_inff());
    store16(weights + i, exp2_scaled_16(x - top, factor));
  }
}

// Token ids (ascending) and logits of the tokens whose logit is at least `low`; returns their number. Room for n + 16.
template <class T>
METAREWARD_INLINE int64_t collect_of(const T* z, int64_t n, float low, int32_t* ids, float* logits) {
  int64_t count = 0;
  int64_t i = 0;
#ifdef METAREWARD_AVX512
  __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= n; i += 16) {
    const __m512 x = (__m512)load16(z + i);
    const __mmask16 reach = _mm512_cmp_ps_mask(x, _mm512_set1_ps(low), _CMP_GE_OQ);
    _mm512_storeu_si512(ids + count, _mm512_maskz_compress_epi32(reach, lanes));
    _mm512_storeu_ps(logits + count, _mm512_maskz_compress_ps(reach, x));
    count += __builtin_popcount(reach);
    lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(16));
  }
#endif
  for (; i < n; ++i) {  // no branch: each token is written, and kept by moving on
    const float x = load1(z + i);
    ids[count] = int32_t(i);
    logits[count] = x;
    count += x >= low;
  }
  return count;
}

// Maxima of the strided sets {j, j + sets, j + 2 sets, ...}. `sets` is n or a multiple of 16 below n.
template <class T>
METAREWARD_INLINE void strided_maxima_of(const T* z, int64_t n, int64_t sets, float* maxima) {
  for (int64_t j = 0; j < sets; ++j) maxima[j] = load1(z + j);
  int64_t i = sets;
  for (int64_t j = 0; i + 16 <= n; i += 16) {
    store16(maxima + j, max16(load16(maxima + j), load16(z + i)));
    j = j + 16 < sets ? j + 16 : 0;
  }
  for (; i < n; ++i) maxima[i % sets] = load1(z + i) > maxima[i % sets] ? load1(z + i) : maxima[i % sets];
}

// The same for logits of either type.

static float row_top(const void* z, bool bf16, int64_t n) {
  return bf16 ? row_top_of((const uint16_t*)z, n) : row_top_of((const float*)z, n);
}

static double sum_exp(const void* z, bool bf16, int64_t n, float top) {
  return bf16 ? sum_exp_of((const uint16_t*)z, n, top) : sum_exp_of((const float*)z, n, top);
}

// raw: where to put the sum of e^(z - top), or null when it is not wanted.
static double sum_weights(
    const void* z, bool bf16, int64_t n, float top, double factor, int64_t block, double* block_sums, double* raw) {
  const ScaleOfTwo scale = scale_of_two(factor);
  if (bf16) {
    return raw ? sum_weights_of<uint16_t, true>((const uint16_t*)z, n, top, scale, block, block_sums, raw)
               : sum_weights_of<uint16_t, false>((const uint16_t*)z, n, top, scale, block, block_sums, raw);
  }
  return raw ? sum_weights_of<float, true>((const float*)z, n, top, scale, block, block_sums, raw)
             : sum_weights_of<float, false>((const float*)z, n, top, scale, block, block_sums, raw);
}

static void weights(
    const void* z, bool bf16, int64_t first, int64_t n, float top, double factor, float* out) {
  const ScaleOfTwo scale = scale_of_two(factor);
  if (bf16) {
    weights_of((const uint16_t*)z + first, n, top, scale, out);
  } else {
    weights_of((const float*)z + first, n, top, scale, out);
  }
}

static int64_t collect(const void* z, bool bf16, int64_t n, float low, int32_t* ids, float* logits) {
  return bf16 ? collect_of((const uint16_t*)z, n, low, ids, logits) : collect_of((const float*)z, n, low, ids, logits);
}

static void strided_maxima(const void* z, bool bf16, int64_t n, int64_t sets, float* maxima) {
  if (bf16) {
    strided_maxima_of((const uint16_t*)z, n, sets, maxima);
  } else {
    strided_maxima_of((const float*)z, n, sets, maxima);
  }
}

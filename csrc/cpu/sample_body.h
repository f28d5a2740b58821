// The passes over a row of logits, vectorised. Compiled once an instruction set by for_each_simd.h.
#include "vector_math_body.h"

// Largest logit; NaN when the row holds one; -inf when it is empty.
static float row_top(const float* z, int64_t n) {
  f32x16 top = f32x16{} - __builtin_inff();
  i32x16 nan = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const f32x16 x = load16(z + i);
    nan |= (x != x);
    top = max16(top, x);
  }
  if (i < n) {
    const f32x16 x = load_part(z + i, n - i, -__builtin_inff());
    nan |= (x != x);
    top = max16(top, x);
  }
  for (int lane = 0; lane < 16; ++lane) {
    if (nan[lane]) return __builtin_nanf("");
  }
  return horizontal_max(top);
}

// sum of e^(z - top), in fp64 from fp32 terms: the log-prob it serves is reported in fp32.
static double sum_exp(const float* z, int64_t n, float top) {
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

// weights[i] = e^((z[i] - top) / temperature) in fp64; block_sums[b] the sum of the b-th `block` of them.
// `block` is a multiple of 8. Returns the sum of all.
static double exp_weights(
    const float* z, int64_t n, float top, double temperature, double* weights, int64_t block, double* block_sums) {
  const double inverse = 1.0 / temperature;
  double total = 0.0;
  for (int64_t start = 0; start < n; start += block) {
    const int64_t end = start + block < n ? start + block : n;
    f64x8 sum = {};
    int64_t i = start;
    for (; i + 8 <= end; i += 8) {
      f32x8 x;
      __builtin_memcpy(&x, z + i, sizeof x);
      const f64x8 w = exp_8((__builtin_convertvector(x, f64x8) - double(top)) * inverse);
      __builtin_memcpy(weights + i, &w, sizeof w);
      sum += w;
    }
    double block_sum = 0.0;
    for (int lane = 0; lane < 8; ++lane) block_sum += sum[lane];
    for (; i < end; ++i) {
      weights[i] = exp_8(f64x8{} + (double(z[i]) - double(top)) * inverse)[0];
      block_sum += weights[i];
    }
    block_sums[start / block] = block_sum;
    total += block_sum;
  }
  return total;
}

// Indices (ascending) of the logits that are at least `low`; returns their number. Has room for n + 16.
static int64_t collect_logits(const float* z, int64_t n, float low, int32_t* indices) {
  int64_t count = 0;
  int64_t i = 0;
#ifdef METAREWARD_AVX512
  __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= n; i += 16) {
    const __mmask16 reach = _mm512_cmp_ps_mask(_mm512_loadu_ps(z + i), _mm512_set1_ps(low), _CMP_GE_OQ);
    _mm512_storeu_si512(indices + count, _mm512_maskz_compress_epi32(reach, lanes));
    count += __builtin_popcount(reach);
    lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(16));
  }
#endif
  for (; i < n; ++i) {  // no branch: each index is written, and kept by moving on
    indices[count] = int32_t(i);
    count += z[i] >= low;
  }
  return count;
}

// Maxima of the strided sets {j, j + blocks, j + 2 blocks, ...}.
static void strided_maxima(const float* z, int64_t n, int64_t blocks, float* maxima) {
  for (int64_t j = 0; j < blocks; ++j) maxima[j] = z[j];
  for (int64_t start = blocks; start < n; start += blocks) {
    const int64_t width = n - start < blocks ? n - start : blocks;
    for (int64_t j = 0; j < width; ++j) maxima[j] = z[start + j] > maxima[j] ? z[start + j] : maxima[j];
  }
}

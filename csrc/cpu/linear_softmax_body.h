// What a bf16 head does with its logits on AVX-512 BF16: the exponentials of a row of them while they are in the cache.
// Compiled by linear_softmax.cpp for that instruction set alone; it may call nothing but itself and intrinsics.
//
// Exponentials lie in panels of 64 vocabulary entries, [V/64][C][64]: see panel_products_body.h.
#include "bf16_linear_body.h"

// 2^x, 0 below -150. Relative error about 1e-7 (minimax polynomial on [-1/2, 1/2]); exact at 0. A NaN passes.
static inline __attribute__((always_inline)) __m512 exp2_512(__m512 x) {
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
  const __m512 n = _mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(clamped, n);
  __m512 y = _mm512_fmadd_ps(r, _mm512_set1_ps(1.3264727335e-03f), _mm512_set1_ps(9.6715129297e-03f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.5507337452e-02f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(2.4022242081e-01f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(6.9314697760e-01f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, n);
}

static inline __attribute__((always_inline)) float total_of(__m512 x) {
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, x);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// x = (z + bias) * factor - reference of `columns` logits: the sum of 2^x, that of 2^x * x, and 2^x itself, rounded, to a
// row of each panel (columns up to a whole panel are zeros there). Streams past the cache: a chunk does not fit anyway.
template <bool STORE, bool WEIGHTED>
static inline __attribute__((always_inline)) void exponentials_of(
    const float* z, const float* bias, int64_t columns, float factor, float reference, uint16_t* out,
    int64_t panel_stride, float* sum_out, float* weighted_out) {
  const __m512 scale = _mm512_set1_ps(factor), shift = _mm512_set1_ps(reference);
  __m512 sum = _mm512_setzero_ps(), sum2 = _mm512_setzero_ps(), weighted = _mm512_setzero_ps();
  for (int64_t j = 0; j < columns; j += 32) {
    __m512 y[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const int64_t at = j + 16 * h, left = columns - at;
      const __mmask16 mask = left >= 16 ? 0xFFFF : left > 0 ? (1u << left) - 1u : 0;
      __m512 x = _mm512_loadu_ps(z + at);  // whole tiles are computed: past `columns` lies anything, masked below
      if (bias != nullptr) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, bias + at));
      x = _mm512_fmsub_ps(x, scale, shift);
      y[h] = _mm512_maskz_mov_ps(mask, exp2_512(x));
      // Where 2^x is 0 so is its term, an x of minus infinity included.
      if (WEIGHTED) weighted = _mm512_fmadd_ps(y[h], _mm512_maskz_max_ps(mask, _mm512_set1_ps(-200.0f), x), weighted);
    }
    sum = _mm512_add_ps(sum, y[0]);
    sum2 = _mm512_add_ps(sum2, y[1]);
    if (STORE) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]);
      _mm512_stream_si512((__m512i*)(out + j / 64 * panel_stride + j % 64), both);
    }
  }
  if (STORE && columns % 64 > 0 && columns % 64 <= 32) {
    _mm512_stream_si512((__m512i*)(out + columns / 64 * panel_stride + 32), _mm512_setzero_si512());
  }
  *sum_out = total_of(_mm512_add_ps(sum, sum2));
  if (WEIGHTED) *weighted_out = total_of(weighted);
}

// The term of one logit (bias included), as it is in the sums.
static float exponential(float z, float factor, float reference) {
  return _mm512_cvtss_f32(exp2_512(_mm512_fmsub_ps(_mm512_set1_ps(z), _mm512_set1_ps(factor), _mm512_set1_ps(reference))));
}

static void exponentials(
    const float* z, const float* bias, int64_t columns, float factor, float reference, uint16_t* out,
    int64_t panel_stride, float* sum, float* weighted) {
  if (out != nullptr && weighted != nullptr) {
    exponentials_of<true, true>(z, bias, columns, factor, reference, out, panel_stride, sum, weighted);
  } else if (out != nullptr) {
    exponentials_of<true, false>(z, bias, columns, factor, reference, out, panel_stride, sum, weighted);
  } else if (weighted != nullptr) {
    exponentials_of<false, true>(z, bias, columns, factor, reference, out, panel_stride, sum, weighted);
  } else {
    exponentials_of<false, false>(z, bias, columns, factor, reference, out, panel_stride, sum, weighted);
  }
}

static void finish_streaming() { _mm_sfence(); }

static void logit_rows(const Product& a, int64_t rows, const uint16_t* tiles, int64_t count) {
  product_block(a, 0, rows, tiles, count, 0);
}

// Dot product of two bf16 rows, for a first guess of a logit.
static float dot(const uint16_t* a, const uint16_t* b, int64_t n) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 mask = n - i >= 32 ? 0xFFFFFFFFu : (1u << (n - i)) - 1u;
    sum = _mm512_dpbf16_ps(
        sum, (__m512bh)_mm512_maskz_loadu_epi16(mask, a + i), (__m512bh)_mm512_maskz_loadu_epi16(mask, b + i));
  }
  return total_of(sum);
}

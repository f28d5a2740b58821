// What a bf16 head does around its products, on AVX-512 BF16: the exponentials of a row of logits while they are in the
// cache, and the two products whose left side is a matrix of such exponentials. Compiled by linear_softmax.cpp for that
// instruction set alone; it may call nothing but itself and intrinsics.
//
// Exponentials lie in panels of 64 vocabulary entries, [V/64][C][64]: the product with the weight reads 8 rows of a
// panel (1 KB, contiguous), the product with the hidden states a whole panel.
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

static inline __attribute__((always_inline)) __m512 widen(__m256i x) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
}

// Columns 0..columns-1 (at most 48) of `rows` rows, as pairs of neighbouring rows: tile[ceil(rows/2)][48][2], padded with
// zeros. `scale`, where given, has a factor a row: the product is rounded to bf16.
template <bool SCALED>
static void pack_row_pairs(
    const uint16_t* x, int64_t stride, int64_t rows, int64_t columns, const float* scale, uint16_t* tile) {
  for (int64_t p = 0; p < (rows + 1) / 2; ++p) {
    const uint16_t* even = x + 2 * p * stride;
    const bool last = 2 * p + 1 == rows;
    const uint16_t* odd = last ? even : even + stride;
    for (int64_t c = 0; c < TILE; c += 16) {
      const int64_t left = columns - c;
      const __mmask16 mask = left >= 16 ? 0xFFFF : left > 0 ? (1u << left) - 1u : 0;
      __m256i low = _mm256_maskz_loadu_epi16(mask, even + c);
      __m256i high = _mm256_maskz_loadu_epi16(last ? 0 : mask, odd + c);
      if (SCALED) {
        low = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(widen(low), _mm512_set1_ps(scale[2 * p])));
        if (!last) high = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(widen(high), _mm512_set1_ps(scale[2 * p + 1])));
      }
      const __m512i pairs =
          _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      _mm512_storeu_si512(tile + 2 * (p * TILE + c), pairs);
    }
  }
}

// `rows` rows of a panel as pairs of neighbouring rows, 8 columns together: out[8][ceil(rows/2)][8][2].
static void pack_panel(const uint16_t* panel, int64_t rows, uint16_t* out) {
  const int64_t pairs = (rows + 1) / 2;
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 32; ++i) {
    order[0][i] = i / 2 + i % 2 * 32;
    order[1][i] = 16 + i / 2 + i % 2 * 32;
  }
  const __m512i first = _mm512_load_si512(order[0]), second = _mm512_load_si512(order[1]);
  for (int64_t p = 0; p < pairs; ++p) {
    const bool last = 2 * p + 1 == rows;
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; ++half) {
      const uint16_t* at = panel + 128 * p + 32 * half;
      const __m512i even = _mm512_loadu_si512(at);
      const __m512i odd = last ? _mm512_setzero_si512() : _mm512_loadu_si512(at + 64);
      const __m512i low = _mm512_permutex2var_epi16(even, first, odd);
      const __m512i high = _mm512_permutex2var_epi16(even, second, odd);
      uint16_t* to = out + (4 * half * pairs + p) * 16;
      _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(low));
      _mm256_storeu_si256((__m256i*)(to + pairs * 16), _mm512_extracti64x4_epi64(low, 1));
      _mm256_storeu_si256((__m256i*)(to + 2 * pairs * 16), _mm512_castsi512_si256(high));
      _mm256_storeu_si256((__m256i*)(to + 3 * pairs * 16), _mm512_extracti64x4_epi64(high, 1));
    }
  }
}

// sums[64] = the rows of a panel times a coefficient each, added up.
static void weigh_panel(const uint16_t* panel, int64_t rows, const float* coefficient, float* sums) {
  __m512 total[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t t = 0; t < rows; ++t) {
    const __m512 factor = _mm512_set1_ps(coefficient[t]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m256i x = _mm256_loadu_si256((const __m256i*)(panel + 64 * t + 16 * j));
      total[j] = _mm512_fmadd_ps(widen(x), factor, total[j]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) _mm512_storeu_ps(sums + 16 * j, total[j]);
}

// A left side: pair p of row i of block b lies at b * block + i * row + p * pair elements.
struct Left {
  const uint16_t* data;
  int64_t blocks, block, pairs;
};

// M rows of `a` times one tile, to (or, with `add`, onto) `columns` columns of out.
template <int M, int ROW, int PAIR>
static void add_product(const Left& a, const uint16_t* tile, float* out, int64_t out_stride, int64_t columns, bool add) {
  __m512 sum[M][3];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    sum[i][0] = sum[i][1] = sum[i][2] = _mm512_setzero_ps();
    if (add) {
      for (int j = 0; j < 3; ++j) _mm_prefetch((const char*)(out + i * out_stride + 16 * j), _MM_HINT_T0);
    }
  }
  for (int64_t b = 0; b < a.blocks; ++b) {
    const uint16_t* x = a.data + b * a.block;
    for (int64_t p = 0; p < a.pairs; ++p) {
      const __m512bh w0 = (__m512bh)_mm512_loadu_si512(tile);
      const __m512bh w1 = (__m512bh)_mm512_loadu_si512(tile + 32);
      const __m512bh w2 = (__m512bh)_mm512_loadu_si512(tile + 64);
      tile += 2 * TILE;
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        int32_t pair;
        __builtin_memcpy(&pair, x + i * ROW + p * PAIR, sizeof pair);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], both, w0);
        sum[i][1] = _mm512_dpbf16_ps(sum[i][1], both, w1);
        sum[i][2] = _mm512_dpbf16_ps(sum[i][2], both, w2);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      const int64_t left = columns - 16 * j;
      const __mmask16 mask = left >= 16 ? 0xFFFF : left > 0 ? (1u << left) - 1u : 0;
      float* at = out + i * out_stride + 16 * j;
      const __m512 before = add ? _mm512_maskz_loadu_ps(mask, at) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(before, sum[i][j]));
    }
  }
}

template <int ROW, int PAIR>
static void add_rows(
    const Left& a, int64_t rows, const uint16_t* tile, float* out, int64_t out_stride, int64_t columns, bool add) {
  typedef void (*Rows)(const Left&, const uint16_t*, float*, int64_t, int64_t, bool);
  static const Rows of[ROWS + 1] = {
      nullptr, add_product<1, ROW, PAIR>, add_product<2, ROW, PAIR>, add_product<3, ROW, PAIR>,
      add_product<4, ROW, PAIR>, add_product<5, ROW, PAIR>, add_product<6, ROW, PAIR>, add_product<7, ROW, PAIR>,
      add_product<8, ROW, PAIR>};
  of[rows](a, tile, out, out_stride, columns, add);
}

// Up to 8 rows that lie beside one another in panels.
static void add_panel_rows(
    const Left& a, int64_t rows, const uint16_t* tile, float* out, int64_t out_stride, int64_t columns, bool add) {
  add_rows<64, 2>(a, rows, tile, out, out_stride, columns, add);
}

// Up to 8 columns of a packed panel.
static void add_panel_columns(
    const Left& a, int64_t rows, const uint16_t* tile, float* out, int64_t out_stride, int64_t columns, bool add) {
  add_rows<2, 16>(a, rows, tile, out, out_stride, columns, add);
}

// n numbers times a factor, rounded to bf16.
static void scale_to_bf16(const float* x, int64_t n, float factor, uint16_t* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = n - i >= 16 ? 0xFFFF : (1u << (n - i)) - 1u;
    const __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), _mm512_set1_ps(factor));
    _mm256_mask_storeu_epi16(out + i, mask, (__m256i)_mm512_cvtneps_pbh(y));
  }
}

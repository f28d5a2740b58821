// Product of bf16 rows with packed bf16 weights on AVX-512 BF16, fp32 sums. Compiled by bf16_linear.cpp for that
// instruction set alone; like the other bodies it may call nothing but itself and intrinsics.
//
// `vdpbf16ps` adds two products of neighbouring bf16 numbers to each of 16 fp32 sums. So a tile of 48 weight rows
// lies in memory as [ceil(K/2)][48] pairs, padded with zeros, and the inner loop reads it front to back: for a pair of
// inputs of each of up to 8 rows, 3 vectors of weights and 24 sums in registers. Each sum runs over K from the front,
// whatever the number of rows beside it, so a row's result depends on nothing but the row and the weights.

#define METAREWARD_AVX512
#include "vector_math_body.h"
#undef METAREWARD_AVX512

static const int64_t ROWS = 8;  // of x at a time: 24 sums, 3 weights and an input make 28 of the 32 registers

// Columns 0..15 of 16 rows of pairs: out[i] holds pair i of every row.
static inline __attribute__((always_inline)) void transpose_pairs(const __m512i* row, __m512i* out) {
  __m512i quad[4][4];  // quad[q][c]: lane L holds column 4L + c of rows 4q..4q+3
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m512i* r = row + 4 * q;
    const __m512i low01 = _mm512_unpacklo_epi32(r[0], r[1]), high01 = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(r[2], r[3]), high23 = _mm512_unpackhi_epi32(r[2], r[3]);
    quad[q][0] = _mm512_unpacklo_epi64(low01, low23);
    quad[q][1] = _mm512_unpackhi_epi64(low01, low23);
    quad[q][2] = _mm512_unpacklo_epi64(high01, high23);
    quad[q][3] = _mm512_unpackhi_epi64(high01, high23);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i top01 = _mm512_shuffle_i32x4(quad[0][c], quad[1][c], 0x44);
    const __m512i top23 = _mm512_shuffle_i32x4(quad[2][c], quad[3][c], 0x44);
    const __m512i end01 = _mm512_shuffle_i32x4(quad[0][c], quad[1][c], 0xEE);
    const __m512i end23 = _mm512_shuffle_i32x4(quad[2][c], quad[3][c], 0xEE);
    out[c] = _mm512_shuffle_i32x4(top01, top23, 0x88);
    out[4 + c] = _mm512_shuffle_i32x4(top01, top23, 0xDD);
    out[8 + c] = _mm512_shuffle_i32x4(end01, end23, 0x88);
    out[12 + c] = _mm512_shuffle_i32x4(end01, end23, 0xDD);
  }
}

// The first `columns` <= 48 rows of a weight of width k, as a tile of ceil(k/2) x 48 pairs.
static void pack_tile(const uint16_t* weight, int64_t stride, int64_t columns, int64_t k, uint16_t* tile) {
  const int64_t pairs = (k + 1) / 2;
  for (int64_t p = 0; p < pairs; p += 16) {
    const int64_t left = k - 2 * p;
    const __mmask32 mask = left >= 32 ? 0xFFFFFFFFu : (1u << left) - 1u;
    for (int64_t c = 0; c < TILE; c += 16) {
      __m512i row[16], out[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        row[i] = c + i < columns ? _mm512_maskz_loadu_epi16(mask, weight + (c + i) * stride + 2 * p)
                                 : _mm512_setzero_si512();
      }
      transpose_pairs(row, out);
      const int64_t count = pairs - p < 16 ? pairs - p : 16;
      for (int64_t i = 0; i < count; ++i) _mm512_storeu_si512(tile + 2 * ((p + i) * TILE + c), out[i]);
    }
  }
}

// sum[i][j] = rows t..t+M-1 of x times vector j of one tile.
template <int M>
METAREWARD_INLINE void multiply(const Product& a, int64_t t, const uint16_t* tile, __m512 (*sum)[3]) {
  const uint16_t* x = a.x + t * a.x_stride;
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) sum[i][0] = sum[i][1] = sum[i][2] = _mm512_setzero_ps();
  for (int64_t p = 0; p < a.pairs; ++p) {
    const __m512bh w0 = (__m512bh)_mm512_loadu_si512(tile + 2 * TILE * p);
    const __m512bh w1 = (__m512bh)_mm512_loadu_si512(tile + 2 * TILE * p + 32);
    const __m512bh w2 = (__m512bh)_mm512_loadu_si512(tile + 2 * TILE * p + 64);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      int32_t pair;
      __builtin_memcpy(&pair, x + i * a.x_stride + 2 * p, sizeof pair);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], both, w0);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], both, w1);
      sum[i][2] = _mm512_dpbf16_ps(sum[i][2], both, w2);
    }
  }
}

// Columns n + 16 j of row t, as many of the 16 as there are.
METAREWARD_INLINE void store_sum(const Product& a, int64_t t, int64_t n, int j, __m512 sum) {
  const int64_t at = t * a.out_stride + n + 16 * j, left = a.columns - n - 16 * j;
  const __mmask16 mask = left >= 16 ? 0xFFFF : left > 0 ? (1u << left) - 1u : 0;
  if (a.bf16_out) {
    _mm256_mask_storeu_epi16((uint16_t*)a.out + at, mask, (__m256i)_mm512_cvtneps_pbh(sum));
  } else {
    _mm512_mask_storeu_ps((float*)a.out + at, mask, sum);
  }
}

// Rows t..t+M-1 of x times one tile, to the columns from n on.
template <int M>
static void product_rows(const Product& a, int64_t t, const uint16_t* tile, int64_t n) {
  __m512 sum[M][3];
  multiply<M>(a, t, tile, sum);
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) store_sum(a, t + i, n, j, sum[i][j]);
  }
}

// The same with a pair of tiles, gate and up: gate / (1 + e^-gate) * up, in fp32 until it is stored.
template <int M>
static void gated_rows(const Product& a, int64_t t, const uint16_t* tile, int64_t n) {
  alignas(64) float gates[M][48];
  __m512 sum[M][3];
  multiply<M>(a, t, tile, sum);
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) _mm512_store_ps(gates[i] + 16 * j, sum[i][j]);
  }
  multiply<M>(a, t, tile + 2 * TILE * a.pairs, sum);
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      const f32x16 gate = load16(gates[i] + 16 * j);
      const f32x16 e = exp2_16(((gate < 0.0f) ? gate : -gate) * 1.44269504f);  // of -|gate|, which cannot overflow
      const f32x16 sigmoid = ((gate < 0.0f) ? e : f32x16{} + 1.0f) / (1.0f + e);
      store_sum(a, t + i, n, j, (__m512)(gate * sigmoid * (f32x16)sum[i][j]));
    }
  }
}

// Rows begin..end-1 times `tiles` tiles, to the columns from n on.
static void product_block(const Product& a, int64_t begin, int64_t end, const uint16_t* tile, int64_t tiles, int64_t n) {
  typedef void (*Rows)(const Product&, int64_t, const uint16_t*, int64_t);
  static const Rows plain[ROWS] = {product_rows<1>, product_rows<2>, product_rows<3>, product_rows<4>,
                                   product_rows<5>, product_rows<6>, product_rows<7>, product_rows<8>};
  static const Rows gated[ROWS] = {gated_rows<1>, gated_rows<2>, gated_rows<3>, gated_rows<4>,
                                   gated_rows<5>, gated_rows<6>, gated_rows<7>, gated_rows<8>};
  const Rows* of = a.gated ? gated : plain;
  const int64_t blocks = (end - begin + ROWS - 1) / ROWS;
  for (int64_t b = 0; b < blocks; ++b) {  // of nearly equal height: 9 rows as 4 and 5
    const int64_t first = begin + (end - begin) * b / blocks, last = begin + (end - begin) * (b + 1) / blocks;
    for (int64_t i = 0; i < tiles; ++i) of[last - first - 1](a, first, tile + i * a.tile_size, n + i * TILE);
  }
}

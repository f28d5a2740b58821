// The two products of a bf16 head whose left side is a matrix in panels of 64 vocabulary entries, [V/64][C][64], on
// AVX-512 BF16: the product with the weight reads 8 rows of a panel (1 KB, contiguous), the product with the hidden states a
// whole panel. Compiled by panel_products.cpp for that instruction set alone; it may call nothing but itself and
// intrinsics.
static const int64_t ROWS = 8;  // of the left side at a time: 24 sums, 3 of the right side and an input make 28 registers

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

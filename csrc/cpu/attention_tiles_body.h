// Loads, small matrix products and a transpose for attention. Included by paged_attention_body.h and segment_tiles_body.h.

#if defined(METAREWARD_AVX512)
enum : int { MAX_VECTORS = 3, TILE = 8 };  // 24 accumulators of the 32 registers
#else
enum : int { MAX_VECTORS = 1, TILE = 4 };  // 8 accumulators of 16 on AVX2
#endif

// Cache lines of n elements at `row`, to be read soon: into the second level, which has far more misses in flight
// than the first, and room for them beside what is being worked on.
template <class T>
METAREWARD_INLINE void prefetch_row(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

template <class T>
METAREWARD_INLINE void prefetch_heads(const T* row, int64_t begin, int64_t end, int64_t stride, int64_t dim) {
  for (int64_t head = begin; head < end; ++head) prefetch_row(row + head * stride, dim);
}

METAREWARD_INLINE u32x16 load_pairs(const uint16_t* p) {
  u32x16 x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

// How a product is accumulated: one float of the cache an element, or (avx512bf16) two bf16 values.
struct Floats {
  typedef float Element;
  enum : bool { floats = true };
  METAREWARD_INLINE f32x16 add(f32x16 sum, f32x16 x, float y) { return sum + x * y; }
};

#if defined(METAREWARD_AVX512)
// 2^x for x <= 0 with two instructions that AVX-512 has for it; 2^-inf is 0. Minimax polynomials on [0, 1), exact
// at 0; relative error 1e-4 of the short one, enough for a weight that is rounded to bf16, 2e-7 of the long one.
template <bool SHORT>
METAREWARD_INLINE f32x16 exp2_weight(f32x16 x) {
  const f32x16 r = (f32x16)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
  f32x16 y;
  if constexpr (SHORT) {
    y = r * 0.0770670473575592f + 0.22764497995376587f;
    y = y * r + 0.6951168179512024f;
  } else {
    y = r * 0.0018671301659196615f + 0.009017029777169228f;
    y = y * r + 0.05579991266131401f;
    y = y * r + 0.24016444385051727f;
    y = y * r + 0.6931512951850891f;
  }
  y = y * r + 1.0f;
  return (f32x16)_mm512_maskz_scalef_ps(0xFFFF, (__m512)y, (__m512)x);  // the plain one makes GCC 12 warn
}
#else
template <bool SHORT>
METAREWARD_INLINE f32x16 exp2_weight(f32x16 x) {
  return exp2_16(x);
}
#endif

#if defined(METAREWARD_AVX512_BF16)
struct Pairs {
  typedef uint32_t Element;
  enum : bool { floats = false };
  METAREWARD_INLINE f32x16 add(f32x16 sum, f32x16 x, uint32_t y) {
    return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)_mm512_set1_epi32(int32_t(y)));
  }
};
#endif

#if defined(METAREWARD_AVX512_BF16)
// Takes (b, a) as _mm512_cvtne2ps_pbh makes them to the pairs (a[i], b[i]).
METAREWARD_INLINE __m512i interleaved_halves() {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
}

// Which of 32 elements exist when n are left.
METAREWARD_INLINE __mmask32 first_of_32(int64_t n) { return n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1; }

// The pairs (x[i], y[i]) of 32 bf16 elements, i < 16 and i >= 16.
METAREWARD_INLINE void interleave32(__m512i x, __m512i y, __m512i* low, __m512i* high) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i first = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(32)), 16));
  *low = _mm512_permutex2var_epi16(x, first, y);
  *high = _mm512_permutex2var_epi16(x, _mm512_add_epi16(first, _mm512_set1_epi16(16)), y);
}

// pairs[d] = (x[d], y[d]); writes a multiple of 32.
METAREWARD_INLINE void interleave_rows(const uint16_t* x, const uint16_t* y, int64_t dim, uint32_t* pairs) {
  for (int64_t d = 0; d < dim; d += 32) {
    const __mmask32 mask = first_of_32(dim - d);
    __m512i low, high;
    interleave32(_mm512_maskz_loadu_epi16(mask, x + d), _mm512_maskz_loadu_epi16(mask, y + d), &low, &high);
    _mm512_storeu_si512(pairs + d, low);
    _mm512_storeu_si512(pairs + d + 16, high);
  }
}
#endif

// Writes a row of the cache as floats, up to a multiple of 16, and returns where.
template <class T>
METAREWARD_INLINE const float* widen_row(const T* row, int64_t dim, float* wide) {
  int64_t d = 0;
  for (; d + 16 <= dim; d += 16) store16(wide + d, load16(row + d));
  if (d < dim) store16(wide + d, load_part(row + d, dim - d, 0.0f));
  return wide;
}

template <class Product>
METAREWARD_INLINE typename Product::Element element_at(const char* row, int64_t i) {
  typename Product::Element x;
  __builtin_memcpy(&x, row + i * int64_t(sizeof x), sizeof x);
  return x;
}

// out[r] = sum over i of left[i] * rows[r][i], lanes over queries: scores of TILE tokens.
template <class Product, int NV>
METAREWARD_INLINE void score_tile(const char* const* rows, int64_t steps, const f32x16* left, f32x16* out) {
  f32x16 sum[TILE][NV] = {};
  const char* row[TILE];
  for (int r = 0; r < TILE; ++r) row[r] = rows[r];
  for (int64_t i = 0; i < steps; ++i) {
    f32x16 x[NV];
    for (int n = 0; n < NV; ++n) x[n] = left[i * NV + n];
#pragma GCC unroll 8
    for (int r = 0; r < TILE; ++r) {
      const auto y = element_at<Product>(row[r], i);
#pragma GCC unroll 3
      for (int n = 0; n < NV; ++n) sum[r][n] = Product::add(sum[r][n], x[n], y);
    }
  }
  for (int r = 0; r < TILE; ++r)
    for (int n = 0; n < NV; ++n) out[r * NV + n] = sum[r][n];
}

// out[c] = decay * out[c] + sum over i of left[i] * rows[i][offset + c], lanes over queries: COLUMNS dimensions.
template <class Product, int NV, int COLUMNS>
METAREWARD_INLINE void value_tile(
    const char* const* rows, int64_t offset, int64_t steps, const f32x16* left, const f32x16* decay, f32x16* out) {
  f32x16 sum[COLUMNS][NV];
  for (int c = 0; c < COLUMNS; ++c)
    for (int n = 0; n < NV; ++n) sum[c][n] = out[c * NV + n] * decay[n];
  for (int64_t i = 0; i < steps; ++i) {
    f32x16 x[NV];
    for (int n = 0; n < NV; ++n) x[n] = left[i * NV + n];
    const char* row = rows[i] + offset * int64_t(sizeof(typename Product::Element));
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) {
      const auto y = element_at<Product>(row, c);
#pragma GCC unroll 3
      for (int n = 0; n < NV; ++n) sum[c][n] = Product::add(sum[c][n], x[n], y);
    }
  }
  for (int c = 0; c < COLUMNS; ++c)
    for (int n = 0; n < NV; ++n) out[c * NV + n] = sum[c][n];
}

#define METAREWARD_UPPER(i, step) ((i) & (step) ? 16 + (i) - (step) : (i))
#define METAREWARD_LOWER(i, step) ((i) & (step) ? 16 + (i) : (i) + (step))
#define METAREWARD_16(select, step)                                                                               \
  select(0, step), select(1, step), select(2, step), select(3, step), select(4, step), select(5, step),           \
      select(6, step), select(7, step), select(8, step), select(9, step), select(10, step), select(11, step),     \
      select(12, step), select(13, step), select(14, step), select(15, step)
#define METAREWARD_EXCHANGE(step)                                                                         \
  for (int i = 0; i < 16; ++i)                                                                            \
    if (!(i & step)) {                                                                                    \
      const f32x16 x = rows[i], y = rows[i + step];                                                       \
      rows[i] = __builtin_shufflevector(x, y, METAREWARD_16(METAREWARD_UPPER, step));                     \
      rows[i + step] = __builtin_shufflevector(x, y, METAREWARD_16(METAREWARD_LOWER, step));              \
    }

// Transposes 16 rows of 16 lanes, in place.
METAREWARD_INLINE void transpose16(f32x16* rows) {
  METAREWARD_EXCHANGE(8)
  METAREWARD_EXCHANGE(4)
  METAREWARD_EXCHANGE(2)
  METAREWARD_EXCHANGE(1)
}
#undef METAREWARD_UPPER
#undef METAREWARD_LOWER
#undef METAREWARD_16
#undef METAREWARD_EXCHANGE

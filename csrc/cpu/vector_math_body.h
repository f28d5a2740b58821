// Vectors of 16 floats or 8 doubles and what the kernels do with them. Included by *_body.h files (for_each_simd.h).
//
// The compiler's vector extensions are lowered to whatever the instruction set has: one 512-bit register, two of 256
// bits, or four of 128.

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));

#define METAREWARD_INLINE static inline __attribute__((always_inline))

METAREWARD_INLINE f32x16 load16(const float* p) {
  f32x16 x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

// bf16 is the upper half of a float.
METAREWARD_INLINE f32x16 load16(const uint16_t* p) {
#ifdef METAREWARD_AVX512  // GCC converts in two halves otherwise
  return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  u16x16 half;
  __builtin_memcpy(&half, p, sizeof half);
  return (f32x16)(__builtin_convertvector(half, u32x16) << 16);
#endif
}

METAREWARD_INLINE float load1(const float* p) { return *p; }

METAREWARD_INLINE float load1(const uint16_t* p) {
  const uint32_t bits = uint32_t(*p) << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// The first n < 16 elements, the rest `fill`.
template <class T>
METAREWARD_INLINE f32x16 load_part(const T* p, int64_t n, float fill) {
  f32x16 x = f32x16{} + fill;
  for (int64_t i = 0; i < n; ++i) x[i] = load1(p + i);
  return x;
}

METAREWARD_INLINE void store16(float* p, f32x16 x) { __builtin_memcpy(p, &x, sizeof x); }

// Round to nearest even; a NaN stays a NaN (quietened, so that rounding cannot carry it into infinity).
METAREWARD_INLINE void store16(uint16_t* p, f32x16 x) {
  const u32x16 bits = (u32x16)x;
  const u32x16 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const u32x16 quiet = (bits >> 16) | 0x40u;
  const u32x16 bits16 = (x == x) ? rounded : quiet;
#ifdef METAREWARD_AVX512
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)bits16));
#else
  const u16x16 half = __builtin_convertvector(bits16, u16x16);
  __builtin_memcpy(p, &half, sizeof half);
#endif
}

template <class T>
METAREWARD_INLINE void store_part(T* p, f32x16 x, int64_t n) {
  T whole[16];
  store16(whole, x);
  for (int64_t i = 0; i < n; ++i) p[i] = whole[i];
}

METAREWARD_INLINE f32x16 max16(f32x16 a, f32x16 b) { return (a > b) ? a : b; }

#define METAREWARD_HALVES(x, step) __builtin_shufflevector(                                                      \
    x, x, 0 ^ step, 1 ^ step, 2 ^ step, 3 ^ step, 4 ^ step, 5 ^ step, 6 ^ step, 7 ^ step, 8 ^ step, 9 ^ step, \
    10 ^ step, 11 ^ step, 12 ^ step, 13 ^ step, 14 ^ step, 15 ^ step)

METAREWARD_INLINE float horizontal_max(f32x16 x) {
  x = max16(x, METAREWARD_HALVES(x, 8));
  x = max16(x, METAREWARD_HALVES(x, 4));
  x = max16(x, METAREWARD_HALVES(x, 2));
  return max16(x, METAREWARD_HALVES(x, 1))[0];
}

METAREWARD_INLINE float horizontal_sum(f32x16 x) {
  x += METAREWARD_HALVES(x, 8);
  x += METAREWARD_HALVES(x, 4);
  x += METAREWARD_HALVES(x, 2);
  return (x + METAREWARD_HALVES(x, 1))[0];
}

// 2^x for x <= 0, 0 below -126; exact at 0. Relative error about 1e-7.
METAREWARD_INLINE f32x16 exp2_16(f32x16 x) {
  const f32x16 low = f32x16{} - 127.0f;
  const f32x16 clamped = (x < low) ? low : x;  // a NaN passes
  const f32x16 shifted = clamped + 12582912.0f;  // 1.5 * 2^23 leaves the nearest integer in the low bits
  const f32x16 n = shifted - 12582912.0f;
  const f32x16 r = clamped - n;  // in [-0.5, 0.5]
  f32x16 y = r * 1.5252733804059841e-05f + 1.5403530393381609e-04f;
  y = y * r + 1.3333558146428443e-03f;
  y = y * r + 9.6181291076284772e-03f;
  y = y * r + 5.5504108664821580e-02f;
  y = y * r + 2.4022650695910072e-01f;
  y = y * r + 6.9314718055994531e-01f;
  y = y * r + 1.0f;
  const i32x16 exponent = ((i32x16)shifted - 0x4B400000 + 127) << 23;  // 0 for n = -127: the result is 0
  return y * (f32x16)exponent;
}

// What `exp2_scaled_16` multiplies by: a factor in two floats, and the x below which the result is 0.
struct ScaleOfTwo {
  float high, low, lowest;
};

METAREWARD_INLINE ScaleOfTwo scale_of_two(double factor) {
  // Within these bounds neither factor * x nor 127 / factor can overflow, so infinity times 0 cannot arise.
  const double bounded = factor < 1e-36 ? 1e-36 : factor > 1e36 ? 1e36 : factor;
  const float high = float(bounded);
  return {high, float(bounded - double(high)), float(-127.0 / bounded)};
}

// 2^(factor * x) for x <= 0, 0 where that is below 2^-126; exact at 0. Relative error about 1e-7 for any x where there
// are fused multiply-adds: a product rounded to fp32 would cost a weight of 2^-100 all but 17 bits.
METAREWARD_INLINE f32x16 exp2_scaled_16(f32x16 x, ScaleOfTwo factor) {
  const f32x16 low = f32x16{} + factor.lowest;
  const f32x16 clamped = (x < low) ? low : x;  // a NaN passes
  const f32x16 shifted = clamped * factor.high + 12582912.0f;  // 1.5 * 2^23 leaves the nearest integer in the low bits
  const f32x16 n = shifted - 12582912.0f;
  const f32x16 r = (clamped * factor.high - n) + clamped * factor.low;  // in [-0.5, 0.5]
  f32x16 y = r * 1.5252733804059841e-05f + 1.5403530393381609e-04f;
  y = y * r + 1.3333558146428443e-03f;
  y = y * r + 9.6181291076284772e-03f;
  y = y * r + 5.5504108664821580e-02f;
  y = y * r + 2.4022650695910072e-01f;
  y = y * r + 6.9314718055994531e-01f;
  y = y * r + 1.0f;
  const i32x16 exponent = ((i32x16)shifted - 0x4B400000 + 127) << 23;  // 0 for n = -127: the result is 0
  return y * (f32x16)exponent;
}

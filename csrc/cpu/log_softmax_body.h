// Log-softmax of a row of logits and its gradient, vectorised. Compiled once an instruction set by for_each_simd.h.
#include "vector_math_body.h"

// Largest logit and sum of e^((z - top) / temperature). The sum is at least 1: the largest term is exactly 1.
template <class T>
METAREWARD_INLINE void top_and_sum_of(const T* z, int64_t n, float inverse_temperature, float* top_out, double* sum_out) {
  const float lowest = -__builtin_inff();
  f32x16 tops = f32x16{} + lowest;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) tops = max16(tops, load16(z + i));
  if (i < n) tops = max16(tops, load_part(z + i, n - i, lowest));
  const float top = horizontal_max(tops);
  const float factor = 1.44269504f * inverse_temperature;
  double total = 0.0;
  for (int64_t start = 0; start < n; start += 1024) {  // lanes add at most 64 terms in fp32
    const int64_t end = start + 1024 < n ? start + 1024 : n;
    f32x16 sum = {};
    for (i = start; i + 16 <= end; i += 16) sum += exp2_16((load16(z + i) - top) * factor);
    if (i < end) sum += exp2_16((load_part(z + i, end - i, lowest) - top) * factor);
    total += horizontal_sum(sum);
  }
  *top_out = top;
  *sum_out = total;
}

// out[i] = -scale * e^(z[i] / temperature - lse); `out` may be z.
template <class T, class U>
METAREWARD_INLINE void negative_softmax_of(const T* z, U* out, int64_t n, float inverse_temperature, float lse, float scale) {
  const float log2e = 1.44269504f;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store16(out + i, exp2_16((load16(z + i) * inverse_temperature - lse) * log2e) * -scale);
  if (i < n) {
    const f32x16 x = load_part(z + i, n - i, 0.0f);
    store_part(out + i, exp2_16((x * inverse_temperature - lse) * log2e) * -scale, n - i);
  }
}

static void top_and_sum(const void* z, bool bf16, int64_t n, float inverse_temperature, float* top, double* sum) {
  if (bf16) {
    top_and_sum_of((const uint16_t*)z, n, inverse_temperature, top, sum);
  } else {
    top_and_sum_of((const float*)z, n, inverse_temperature, top, sum);
  }
}

static void negative_softmax(
    const void* z, bool bf16, int64_t n, float inverse_temperature, float lse, float scale, void* out, bool bf16_out) {
  if (bf16) {
    negative_softmax_of((const uint16_t*)z, (uint16_t*)out, n, inverse_temperature, lse, scale);
  } else if (bf16_out) {
    negative_softmax_of((const float*)z, (uint16_t*)out, n, inverse_temperature, lse, scale);
  } else {
    negative_softmax_of((const float*)z, (float*)out, n, inverse_temperature, lse, scale);
  }
}

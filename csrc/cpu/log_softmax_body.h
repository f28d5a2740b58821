// Log-softmax of a row of logits and its gradient, vectorised. Compiled once an instruction set by for_each_simd.h.
#include "vector_math_body.h"

// Largest logit and sum of e^((z - top) / temperature). The sum is at least 1: the largest term is exactly 1. WEIGHTED:
// also the sum of each term times (z - top) / temperature. KEEP: the terms replace the logits.
template <bool KEEP, bool WEIGHTED, class T>
METAREWARD_INLINE void top_and_sum_of(
    T* z, int64_t n, float inverse_temperature, float* top_out, double* sum_out, double* weighted_out) {
  const float lowest = -__builtin_inff();
  f32x16 tops = f32x16{} + lowest;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) tops = max16(tops, load16(z + i));
  if (i < n) tops = max16(tops, load_part(z + i, n - i, lowest));
  const float top = horizontal_max(tops);
  const float factor = 1.44269504f * inverse_temperature;
  const f32x16 negligible = f32x16{} - 1e30f;  // times a term of 0 it is 0, where minus infinity would not be
  double total = 0.0, total_weighted = 0.0;
  for (int64_t start = 0; start < n; start += 1024) {  // lanes add at most 64 terms in fp32
    const int64_t end = start + 1024 < n ? start + 1024 : n;
    f32x16 sum = {}, weighted = {};
    for (i = start; i + 16 <= end; i += 16) {
      const f32x16 x = load16(z + i) - top;
      const f32x16 term = exp2_16(x * factor);
      sum += term;
      if (WEIGHTED) weighted += term * max16(negligible, x);
      if (KEEP) store16(z + i, term);
    }
    if (i < end) {
      const f32x16 x = load_part(z + i, end - i, lowest) - top;
      const f32x16 term = exp2_16(x * factor);
      sum += term;
      if (WEIGHTED) weighted += term * max16(negligible, x);
      if (KEEP) store_part(z + i, term, end - i);
    }
    total += horizontal_sum(sum);
    if (WEIGHTED) total_weighted += horizontal_sum(weighted);
  }
  *top_out = top;
  *sum_out = total;
  if (WEIGHTED) *weighted_out = total_weighted * inverse_temperature;
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

// weighted: nullptr where it is not wanted.
static void top_and_sum(
    const void* z, bool bf16, int64_t n, float inverse_temperature, float* top, double* sum, double* weighted) {
  if (bf16 && weighted == nullptr) {
    top_and_sum_of<false, false>((uint16_t*)z, n, inverse_temperature, top, sum, weighted);
  } else if (bf16) {
    top_and_sum_of<false, true>((uint16_t*)z, n, inverse_temperature, top, sum, weighted);
  } else if (weighted == nullptr) {
    top_and_sum_of<false, false>((float*)z, n, inverse_temperature, top, sum, weighted);
  } else {
    top_and_sum_of<false, true>((float*)z, n, inverse_temperature, top, sum, weighted);
  }
}

// The terms of the sum replace the logits.
static void exponentials(float* z, int64_t n, float inverse_temperature, float* top, double* sum, double* weighted) {
  if (weighted == nullptr) {
    top_and_sum_of<true, false>(z, n, inverse_temperature, top, sum, weighted);
  } else {
    top_and_sum_of<true, true>(z, n, inverse_temperature, top, sum, weighted);
  }
}

template <class U>
METAREWARD_INLINE void scaled_of(const float* z, int64_t n, float factor, U* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store16(out + i, load16(z + i) * factor);
  if (i < n) store_part(out + i, load_part(z + i, n - i, 0.0f) * factor, n - i);
}

// out[i] = z[i] * factor; `out` may be z.
static void scaled(const float* z, int64_t n, float factor, void* out, bool bf16_out) {
  if (bf16_out) {
    scaled_of(z, n, factor, (uint16_t*)out);
  } else {
    scaled_of(z, n, factor, (float*)out);
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

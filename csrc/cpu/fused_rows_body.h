// Norm, rotary embedding and gated activation of a row, vectorised. Compiled once an instruction set by
// for_each_simd.h. Arithmetic is fp32; each result is rounded once.
#include "vector_math_body.h"

template <class T>
METAREWARD_INLINE f32x16 load_to(const T* p, int64_t n) {
  return n >= 16 ? load16(p) : load_part(p, n, 0.0f);
}

template <class T>
METAREWARD_INLINE void store_to(T* p, f32x16 x, int64_t n) {
  if (n >= 16) {
    store16(p, x);
  } else {
    store_part(p, x, n);
  }
}

// 1 / sqrt(mean of squares + eps), in fp32 from the lanes' sums.
METAREWARD_INLINE float inverse_rms(f32x16 squares, int64_t n, float eps) {
  return 1.0f / __builtin_sqrtf(horizontal_sum(squares) / float(n) + eps);
}

// residual += delta (unless null), rounded; out = residual / rms(residual) * weight.
template <class R, class T>
METAREWARD_INLINE void add_rms_norm_of(R* residual, const T* delta, const T* weight, float eps, int64_t n, T* out) {
  f32x16 squares = {};
  for (int64_t i = 0; i < n; i += 16) {
    f32x16 x = load_to(residual + i, n - i);
    if (delta != nullptr) {
      store_to(residual + i, x + load_to(delta + i, n - i), n - i);
      x = load_to(residual + i, n - i);  // the norm is of what is kept, as if the two were done one after the other
    }
    squares += x * x;
  }
  const float inverse = inverse_rms(squares, n, eps);
  for (int64_t i = 0; i < n; i += 16)
    store_to(out + i, load_to(residual + i, n - i) * inverse * load_to(weight + i, n - i), n - i);
}

// One head of size dim: optional norm, then the pairs (i, i + dim / 2) turned by their angles. `sin` is signed.
template <class T, class C>
METAREWARD_INLINE void rotate_head(
    const T* x, const C* cos, const C* sin, const T* norm_weight, float eps, int64_t dim, T* out) {
  const int64_t half = dim / 2;
  float inverse = 1.0f;
  if (norm_weight != nullptr) {
    f32x16 squares = {};
    for (int64_t i = 0; i < dim; i += 16) {
      const f32x16 part = load_to(x + i, dim - i);
      squares += part * part;
    }
    inverse = inverse_rms(squares, dim, eps);
  }
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t left = half - i;
    f32x16 a = load_to(x + i, left), b = load_to(x + half + i, left);
    if (norm_weight != nullptr) {
      a = a * inverse * load_to(norm_weight + i, left);
      b = b * inverse * load_to(norm_weight + half + i, left);
    }
    store_to(out + i, a * load_to(cos + i, left) + b * load_to(sin + i, left), left);
    store_to(out + half + i, b * load_to(cos + half + i, left) + a * load_to(sin + half + i, left), left);
  }
}

// Token t: queries to `out`, keys and values to their slot.
template <class T, class C>
METAREWARD_INLINE void rotate_token_of(const RotateArguments& a, int64_t t) {
  const T* x = (const T*)a.qkv + t * a.qkv_stride;
  const C* cos = (const C*)a.cos + t * a.dim;
  const C* sin = (const C*)a.sin + t * a.dim;
  T* query = (T*)a.out + t * a.query_heads * a.dim;
  const int64_t page = a.slots[t] / a.page, offset = a.slots[t] % a.page;
  T* key = (T*)a.key_pages + page * a.key_strides[0] + offset * a.key_strides[1];
  T* value = (T*)a.value_pages + page * a.value_strides[0] + offset * a.value_strides[1];
  for (int64_t h = 0; h < a.query_heads; ++h, x += a.dim)
    rotate_head(x, cos, sin, (const T*)a.query_norm, a.eps, a.dim, query + h * a.dim);
  for (int64_t h = 0; h < a.kv_heads; ++h, x += a.dim)
    rotate_head(x, cos, sin, (const T*)a.key_norm, a.eps, a.dim, key + h * a.key_strides[2]);
  for (int64_t h = 0; h < a.kv_heads; ++h, x += a.dim)
    __builtin_memcpy(value + h * a.value_strides[2], x, a.dim * sizeof(T));
}

// out = gate / (1 + e^-gate) * up
template <class T>
METAREWARD_INLINE void silu_mul_of(const T* gate, const T* up, int64_t n, T* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 g = load_to(gate + i, n - i);
    const f32x16 e = exp2_16(((g < 0.0f) ? g : -g) * 1.44269504f);  // of -|g|, which cannot overflow
    const f32x16 sigmoid = ((g < 0.0f) ? e : f32x16{} + 1.0f) / (1.0f + e);
    store_to(out + i, g * sigmoid * load_to(up + i, n - i), n - i);
  }
}

static void add_rms_norm_row(
    void* residual, const void* delta, const void* weight, bool bf16_residual, bool bf16, float eps, int64_t n, void* out) {
  if (bf16 && !bf16_residual) {
    add_rms_norm_of((float*)residual, (const uint16_t*)delta, (const uint16_t*)weight, eps, n, (uint16_t*)out);
  } else if (bf16) {
    add_rms_norm_of((uint16_t*)residual, (const uint16_t*)delta, (const uint16_t*)weight, eps, n, (uint16_t*)out);
  } else {
    add_rms_norm_of((float*)residual, (const float*)delta, (const float*)weight, eps, n, (float*)out);
  }
}

static void rotate_token(const RotateArguments& a, int64_t t) {
  if (!a.bf16) {
    rotate_token_of<float, float>(a, t);
  } else if (a.bf16_angles) {
    rotate_token_of<uint16_t, uint16_t>(a, t);
  } else {
    rotate_token_of<uint16_t, float>(a, t);
  }
}

static void silu_mul_row(const void* gate_up, bool bf16, int64_t n, void* out) {
  if (bf16) {
    silu_mul_of((const uint16_t*)gate_up, (const uint16_t*)gate_up + n, n, (uint16_t*)out);
  } else {
    silu_mul_of((const float*)gate_up, (const float*)gate_up + n, n, (float*)out);
  }
}

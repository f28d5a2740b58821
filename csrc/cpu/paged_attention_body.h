// Decode attention of one sequence, vectorised. Compiled once an instruction set by for_each_simd.h.
#include "vector_math_body.h"

// Lane t of the result is the sum of the 16 lanes of rows[t]: a transpose and 16 sums in 15 shuffled additions.
METAREWARD_INLINE f32x16 sum_each(f32x16* rows) {
  for (int i = 0; i < 8; ++i)
    rows[i] = __builtin_shufflevector(rows[i], rows[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
              __builtin_shufflevector(rows[i], rows[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; ++i)
    rows[i] = __builtin_shufflevector(rows[i], rows[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
              __builtin_shufflevector(rows[i], rows[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; ++i)
    rows[i] = __builtin_shufflevector(rows[i], rows[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
              __builtin_shufflevector(rows[i], rows[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(rows[0], rows[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(rows[0], rows[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

// partial[g] += q[g] * key over NV vectors of 16 dimensions.
template <class T, int GT, int NV>
METAREWARD_INLINE void add_scores(const T* key, const float* q, int64_t dp, f32x16* partial) {
  for (int d = 0; d < NV; ++d) {
    const f32x16 k = load16(key + 16 * d);
    for (int g = 0; g < GT; ++g) partial[g] += load16(q + g * dp + 16 * d) * k;
  }
}

// acc[g] = acc[g] * decay[g] + sum over tokens of weights[g][t] * value over NV vectors of 16 dimensions.
template <class T, int GT, int NV>
METAREWARD_INLINE void add_values(
    const T* const* value_rows, int64_t tokens, int64_t offset, const float (*weights)[16], const float* decay,
    int64_t dp, float* acc) {
  f32x16 o[GT][NV];
  for (int g = 0; g < GT; ++g)
    for (int d = 0; d < NV; ++d) o[g][d] = load16(acc + g * dp + 16 * d) * decay[g];
  for (int64_t t = 0; t < tokens; ++t) {
    for (int d = 0; d < NV; ++d) {
      const f32x16 v = load16(value_rows[t] + offset + 16 * d);
      for (int g = 0; g < GT; ++g) o[g][d] += weights[g][t] * v;
    }
  }
  for (int g = 0; g < GT; ++g)
    for (int d = 0; d < NV; ++d) store16(acc + g * dp + 16 * d, o[g][d]);
}

// One block of up to 16 tokens for GT query heads that share a key head: scores, online softmax, weighted values.
// q, acc: [GT, dp] fp32, dp = D rounded up to 16; top, sum: the running maximum and the lanes of the running sum.
template <class T, int GT>
METAREWARD_INLINE void attend_block(
    const T* const* key_rows, const T* const* value_rows, int64_t tokens, int64_t offset_k, int64_t offset_v,
    int64_t dim, int64_t dp, const float* q, float* acc, float* top, f32x16* sum) {
  const int64_t whole64 = dim / 64 * 64, whole = dim / 16 * 16;
  f32x16 partial[GT][16];
  for (int64_t t = 0; t < tokens; ++t) {
    const T* key = key_rows[t] + offset_k;
    f32x16 s[GT] = {};
    int64_t d = 0;
    for (; d < whole64; d += 64) add_scores<T, GT, 4>(key + d, q + d, dp, s);
    for (; d < whole; d += 16) add_scores<T, GT, 1>(key + d, q + d, dp, s);
    if (d < dim) {
      const f32x16 k = load_part(key + d, dim - d, 0.0f);
      for (int g = 0; g < GT; ++g) s[g] += load16(q + g * dp + d) * k;
    }
    for (int g = 0; g < GT; ++g) partial[g][t] = s[g];
  }
  float weights[GT][16];
  float decay[GT];
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int g = 0; g < GT; ++g) {
    for (int64_t t = tokens; t < 16; ++t) partial[g][t] = f32x16{};
    f32x16 scores = sum_each(partial[g]);
    scores = (lane < int32_t(tokens)) ? scores : f32x16{} - __builtin_inff();
    const float block_top = horizontal_max(scores);
    decay[g] = 1.0f;
    if (block_top > top[g]) {  // rare after the first blocks; those come with top = -inf, and 2^-inf = 0
      decay[g] = exp2_16(f32x16{} + (top[g] - block_top))[0];
      top[g] = block_top;
    }
    const f32x16 p = exp2_16(scores - top[g]);
    sum[g] = sum[g] * decay[g] + p;
    store16(weights[g], p);
  }
  int64_t d = 0;
  for (; d < whole64; d += 64)
    add_values<T, GT, 4>(value_rows, tokens, offset_v + d, weights, decay, dp, acc + d);
  for (; d < whole; d += 16)
    add_values<T, GT, 1>(value_rows, tokens, offset_v + d, weights, decay, dp, acc + d);
  if (d < dim) {
    for (int g = 0; g < GT; ++g) {
      f32x16 o = load16(acc + g * dp + d) * decay[g];
      for (int64_t t = 0; t < tokens; ++t)
        o += weights[g][t] * load_part(value_rows[t] + offset_v + d, dim - d, 0.0f);
      store16(acc + g * dp + d, o);
    }
  }
}

// Key heads [head_begin, head_end) of sequence s. scratch: see `scratch_floats` in paged_attention.cpp.
template <class T>
METAREWARD_INLINE void attend_sequence_of(
    const AttentionArguments& a, int64_t s, int64_t head_begin, int64_t head_end, float* scratch) {
  const int64_t group = a.query_heads / a.kv_heads;
  const int64_t heads = (head_end - head_begin) * group;
  const int64_t dp = (a.dim + 15) / 16 * 16;
  float* q = scratch;
  float* acc = q + heads * dp;
  float* top = acc + heads * dp;
  f32x16* sum = (f32x16*)(scratch + a.scratch_sum_offset);
  const T* query = (const T*)a.query + (s * a.query_heads + head_begin * group) * a.dim;
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t d = 0; d < dp; ++d) {
      q[h * dp + d] = d < a.dim ? load1(query + h * a.dim + d) * a.scale_log2e : 0.0f;
      acc[h * dp + d] = 0.0f;
    }
    top[h] = -__builtin_inff();
    sum[h] = f32x16{};
  }
  const int64_t length = a.lengths[s];
  const int32_t* table = a.page_table + s * a.table_width;
  const T* key_rows[16];
  const T* value_rows[16];
  for (int64_t start = 0; start < length; start += 16) {
    const int64_t tokens = length - start < 16 ? length - start : 16;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t page = table[(start + t) / a.page], slot = (start + t) % a.page;
      key_rows[t] = (const T*)a.key_pages + page * a.key_strides[0] + slot * a.key_strides[1];
      value_rows[t] = (const T*)a.value_pages + page * a.value_strides[0] + slot * a.value_strides[1];
    }
    for (int64_t head = head_begin; head < head_end; ++head) {
      const int64_t k = head * a.key_strides[2], v = head * a.value_strides[2];
      for (int64_t g = 0; g < group;) {
        const int64_t h = (head - head_begin) * group + g;
        switch (group - g) {
          case 1:
            attend_block<T, 1>(key_rows, value_rows, tokens, k, v, a.dim, dp, q + h * dp, acc + h * dp, top + h, sum + h);
            g += 1;
            break;
          case 2:
            attend_block<T, 2>(key_rows, value_rows, tokens, k, v, a.dim, dp, q + h * dp, acc + h * dp, top + h, sum + h);
            g += 2;
            break;
          case 3:
            attend_block<T, 3>(key_rows, value_rows, tokens, k, v, a.dim, dp, q + h * dp, acc + h * dp, top + h, sum + h);
            g += 3;
            break;
          default:
            attend_block<T, 4>(key_rows, value_rows, tokens, k, v, a.dim, dp, q + h * dp, acc + h * dp, top + h, sum + h);
            g += 4;
        }
      }
    }
  }
  T* out = (T*)a.out + (s * a.query_heads + head_begin * group) * a.dim;
  for (int64_t h = 0; h < heads; ++h) {
    const float inverse = length == 0 ? 0.0f : 1.0f / horizontal_sum(sum[h]);
    for (int64_t d = 0; d < a.dim; d += 16) {
      const f32x16 x = load16(acc + h * dp + d) * inverse;
      if (a.dim - d >= 16) {
        store16(out + h * a.dim + d, x);
      } else {
        store_part(out + h * a.dim + d, x, a.dim - d);
      }
    }
  }
}

static void attend_sequence(
    const AttentionArguments& a, int64_t s, int64_t head_begin, int64_t head_end, float* scratch) {
  if (a.bf16) {
    attend_sequence_of<uint16_t>(a, s, head_begin, head_end, scratch);
  } else {
    attend_sequence_of<float>(a, s, head_begin, head_end, scratch);
  }
}

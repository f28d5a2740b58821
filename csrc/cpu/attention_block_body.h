// A block of tokens for the query heads of one row that share a key head: scores, online softmax, weighted values.
// Included by paged_attention_body.h.

// Running softmax of one (row, query head): the lanes of `sum` add up to the sum of weights relative to 2^top.
struct RowState {
  f32x16* sum;  // [heads]
  float* acc;   // [heads, padded]
  float* q;     // [heads, padded], floats; unused where pairs of bf16 are multiplied
  float* top;   // [heads]
};

METAREWARD_INLINE RowState row_state(const AttentionArguments& a, float* scratch) {
  RowState state;
  state.sum = (f32x16*)scratch;
  state.acc = scratch + 16 * a.query_heads;
  state.q = state.acc + a.query_heads * a.padded;
  state.top = state.q + a.query_heads * a.padded;
  return state;
}

// ROW_TOKENS tokens of the cache, the rows of their first head.
template <class T>
struct RowBlock {
  const T* keys[ROW_TOKENS];
  const T* values[ROW_TOKENS];
  int64_t tokens;
};

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
METAREWARD_INLINE void add_scores(const T* key, const float* q, int64_t padded, f32x16* partial) {
  for (int d = 0; d < NV; ++d) {
    const f32x16 k = load16(key + 16 * d);
    for (int g = 0; g < GT; ++g) partial[g] += load16(q + g * padded + 16 * d) * k;
  }
}

// acc[g] = acc[g] * decay[g] + sum over tokens of weights[g][t] * value over NV vectors of 16 dimensions.
template <class T, int GT, int NV>
METAREWARD_INLINE void add_values(
    const T* const* values, int64_t tokens, int64_t offset, const float (*weights)[ROW_TOKENS], const float* decay,
    int64_t padded, float* acc) {
  f32x16 o[GT][NV];
  for (int g = 0; g < GT; ++g)
    for (int d = 0; d < NV; ++d) o[g][d] = load16(acc + g * padded + 16 * d) * decay[g];
  for (int64_t t = 0; t < tokens; ++t) {
    for (int d = 0; d < NV; ++d) {
      const f32x16 v = load16(values[t] + offset + 16 * d);
      for (int g = 0; g < GT; ++g) o[g][d] += weights[g][t] * v;
    }
  }
  for (int g = 0; g < GT; ++g)
    for (int d = 0; d < NV; ++d) store16(acc + g * padded + 16 * d, o[g][d]);
}

// Scores [ROW_TOKENS] of a block of tokens for GT query heads that share a key head become weights, in place.
template <int GT>
METAREWARD_INLINE void weigh_row(
    float scale_log2e, int64_t tokens, float (*scores)[ROW_TOKENS], float* top, f32x16* sum, float* decay) {
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int g = 0; g < GT; ++g) {
    f32x16 s[ROW_TOKENS / 16];
    f32x16 highest = f32x16{} - __builtin_inff();
    for (int i = 0; i < ROW_TOKENS / 16; ++i) {
      s[i] = load16(scores[g] + 16 * i) * scale_log2e;
      s[i] = (lane < int32_t(tokens) - 16 * i) ? s[i] : f32x16{} - __builtin_inff();
      highest = max16(highest, s[i]);
    }
    const float block_top = horizontal_max(highest);
    decay[g] = 1.0f;
    if (block_top > top[g]) {  // rare after the first blocks; those come with top = -inf, and 2^-inf = 0
      decay[g] = exp2_16(f32x16{} + (top[g] - block_top))[0];
      top[g] = block_top;
    }
    sum[g] *= decay[g];
    for (int i = 0; i < ROW_TOKENS / 16; ++i) {
      const f32x16 p = exp2_weight<false>(s[i] - top[g]);
      sum[g] += p;
      store16(scores[g] + 16 * i, p);
    }
  }
}

// A block of tokens for GT query heads, the first of them `head` of the state, that share a key head.
template <class T, int GT>
METAREWARD_INLINE void attend_floats(
    const AttentionArguments& a, const RowBlock<T>& block, int64_t key_offset, int64_t value_offset,
    int64_t head, const RowState& state) {
  const int64_t whole64 = a.dim / 64 * 64, whole = a.dim / 16 * 16;
  const float* q = state.q + head * a.padded;
  float* acc = state.acc + head * a.padded;
  alignas(64) float scores[GT][ROW_TOKENS];
  for (int64_t first = 0; first < ROW_TOKENS; first += 16) {
    f32x16 partial[GT][16];
    for (int64_t t = 0; t < 16; ++t) {
      f32x16 s[GT] = {};
      if (first + t < block.tokens) {
        const T* key = block.keys[first + t] + key_offset;
        int64_t d = 0;
        for (; d < whole64; d += 64) add_scores<T, GT, 4>(key + d, q + d, a.padded, s);
        for (; d < whole; d += 16) add_scores<T, GT, 1>(key + d, q + d, a.padded, s);
        if (d < a.dim) {
          const f32x16 k = load_part(key + d, a.dim - d, 0.0f);
          for (int g = 0; g < GT; ++g) s[g] += load16(q + g * a.padded + d) * k;
        }
      }
      for (int g = 0; g < GT; ++g) partial[g][t] = s[g];
    }
    for (int g = 0; g < GT; ++g) store16(scores[g] + first, sum_each(partial[g]));
  }
  float decay[GT];
  weigh_row<GT>(a.scale_log2e, block.tokens, scores, state.top + head, state.sum + head, decay);
  int64_t d = 0;
  for (; d < whole64; d += 64)
    add_values<T, GT, 4>(block.values, block.tokens, value_offset + d, scores, decay, a.padded, acc + d);
  for (; d < whole; d += 16)
    add_values<T, GT, 1>(block.values, block.tokens, value_offset + d, scores, decay, a.padded, acc + d);
  if (d < a.dim) {
    for (int g = 0; g < GT; ++g) {
      f32x16 o = load16(acc + g * a.padded + d) * decay[g];
      for (int64_t t = 0; t < block.tokens; ++t)
        o += scores[g][t] * load_part(block.values[t] + value_offset + d, a.dim - d, 0.0f);
      store16(acc + g * a.padded + d, o);
    }
  }
}

#if defined(METAREWARD_AVX512_BF16)
// partial[g][t] = (first ? 0 : itself) + q[g] * key of token t over the next dimensions, at most 32 NV of `left`.
template <int GT, int NV>
METAREWARD_INLINE void add_pair_scores(
    const uint16_t* const* keys, int64_t tokens, int64_t offset, const uint16_t* q, int64_t dim, int64_t left,
    bool first, const uint16_t* const* ahead, f32x16 (*partial)[16]) {
  __m512i x[GT][NV];
  __mmask32 mask[NV];
  for (int d = 0; d < NV; ++d) mask[d] = first_of_32(left > 32 * d ? left - 32 * d : 0);
  for (int g = 0; g < GT; ++g)
    for (int d = 0; d < NV; ++d) x[g][d] = _mm512_maskz_loadu_epi16(mask[d], q + g * dim + 32 * d);
  for (int64_t t = 0; t < tokens; ++t) {
    prefetch_row(ahead[t] + offset, 32 * NV);
    __m512 s[GT];
    for (int g = 0; g < GT; ++g) s[g] = first ? _mm512_setzero_ps() : (__m512)partial[g][t];
    for (int d = 0; d < NV; ++d) {
      const __m512i k = _mm512_maskz_loadu_epi16(mask[d], keys[t] + offset + 32 * d);
      for (int g = 0; g < GT; ++g) s[g] = _mm512_dpbf16_ps(s[g], (__m512bh)x[g][d], (__m512bh)k);
    }
    for (int g = 0; g < GT; ++g) partial[g][t] = (f32x16)s[g];
  }
}

// As add_values, over NV vectors of 32 dimensions, the last of them masked; weights are pairs of neighbouring tokens.
template <int GT, int NV>
METAREWARD_INLINE void add_pair_values(
    const uint16_t* const* values, int64_t tokens, int64_t offset, const uint32_t (*weights)[ROW_TOKENS / 2],
    const float* decay, __mmask32 mask, int64_t padded, const uint16_t* const* ahead, float* acc) {
  f32x16 o[GT][2 * NV];
  for (int g = 0; g < GT; ++g)
    for (int d = 0; d < 2 * NV; ++d) o[g][d] = load16(acc + g * padded + 16 * d) * decay[g];
  for (int64_t t = 0; t < tokens; t += 2) {
    prefetch_row(ahead[t] + offset, 32 * NV);
    prefetch_row(ahead[t + 1] + offset, 32 * NV);
    const __mmask32 second = t + 1 < tokens ? ~__mmask32(0) : 0;  // a masked load reads nothing
    for (int d = 0; d < NV; ++d) {
      const __mmask32 exists = d + 1 < NV ? ~__mmask32(0) : mask;
      const uint16_t* x = values[t] + offset + 32 * d;
      const uint16_t* y = values[second ? t + 1 : t] + offset + 32 * d;
      __m512i low, high;
      interleave32(_mm512_maskz_loadu_epi16(exists, x), _mm512_maskz_loadu_epi16(exists & second, y), &low, &high);
      for (int g = 0; g < GT; ++g) {
        const __m512bh w = (__m512bh)_mm512_set1_epi32(int32_t(weights[g][t / 2]));
        o[g][2 * d] = (f32x16)_mm512_dpbf16_ps((__m512)o[g][2 * d], w, (__m512bh)low);
        o[g][2 * d + 1] = (f32x16)_mm512_dpbf16_ps((__m512)o[g][2 * d + 1], w, (__m512bh)high);
      }
    }
  }
  for (int g = 0; g < GT; ++g)
    for (int d = 0; d < 2 * NV; ++d) store16(acc + g * padded + 16 * d, o[g][d]);
}

// As attend_floats, two bf16 values at a time. q: the queries of the GT heads, [GT, dim].
template <int GT>
METAREWARD_INLINE void attend_pairs(
    const AttentionArguments& a, const RowBlock<uint16_t>& block, const RowBlock<uint16_t>& next, int64_t key_offset,
    int64_t value_offset, int64_t head, const uint16_t* q, const RowState& state) {
  const __mmask32 all = ~__mmask32(0), last = first_of_32((a.dim - 1) % 32 + 1);
  float* acc = state.acc + head * a.padded;
  alignas(64) float scores[GT][ROW_TOKENS];
  alignas(64) uint32_t weights[GT][ROW_TOKENS / 2];
  for (int64_t t = block.tokens; t < next.tokens; ++t) {  // what the loops over this block's tokens do not reach
    prefetch_row(next.keys[t] + key_offset, a.dim);
    prefetch_row(next.values[t] + value_offset, a.dim);
  }
  for (int64_t first = 0; first < ROW_TOKENS; first += 16) {
    f32x16 partial[GT][16];
    const int64_t tokens = block.tokens - first < 16 ? block.tokens - first : 16;
    if (tokens <= 0) {
      for (int g = 0; g < GT; ++g) store16(scores[g] + first, f32x16{});
      continue;
    }
    const uint16_t* const* keys = block.keys + first;
    if (a.dim <= 64) {
      add_pair_scores<GT, 2>(keys, tokens, key_offset, q, a.dim, a.dim, true, next.keys + first, partial);
    } else {
      for (int64_t d = 0; d < a.dim; d += 128)
        add_pair_scores<GT, 4>(keys, tokens, key_offset + d, q + d, a.dim, a.dim - d, d == 0, next.keys + first, partial);
    }
    for (int64_t t = tokens; t < 16; ++t)
      for (int g = 0; g < GT; ++g) partial[g][t] = f32x16{};
    for (int g = 0; g < GT; ++g) store16(scores[g] + first, sum_each(partial[g]));
  }
  float decay[GT];
  const float scale = a.negative ? -a.scale_log2e : a.scale_log2e;
  weigh_row<GT>(scale, block.tokens, scores, state.top + head, state.sum + head, decay);
  for (int g = 0; g < GT; ++g)
    for (int64_t t = 0; t < ROW_TOKENS; t += 16)
      _mm256_store_si256((__m256i*)(weights[g] + t / 2), (__m256i)_mm512_cvtneps_pbh((__m512)load16(scores[g] + t)));
  int64_t d = 0;
  for (; a.dim - d >= 64; d += 64)
    add_pair_values<GT, 2>(
        block.values, block.tokens, value_offset + d, weights, decay, all, a.padded, next.values, acc + d);
  for (; d < a.dim; d += 32)
    add_pair_values<GT, 1>(
        block.values, block.tokens, value_offset + d, weights, decay, a.dim - d >= 32 ? all : last, a.padded,
        next.values, acc + d);
}
#endif

// A block of tokens for GT query heads of `row`, the first of them query head `head`.
template <class T, int GT>
METAREWARD_INLINE void attend_block(
    const AttentionArguments& a, const RowBlock<T>& block, const RowBlock<T>& next, int64_t row, int64_t head,
    const RowState& state) {
  const int64_t key = head / a.group * a.key_strides[2], value = head / a.group * a.value_strides[2];
#if defined(METAREWARD_AVX512_BF16)
  if constexpr (sizeof(T) == 2) {
    const uint16_t* q = (const uint16_t*)a.query + (row * a.query_heads + head) * a.dim;
    return attend_pairs<GT>(a, block, next, key, value, head, q, state);
  }
#endif
  attend_floats<T, GT>(a, block, key, value, head, state);
}

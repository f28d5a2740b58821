// A block of queries over the pages of a segment they share: two small matrix products with an online softmax
// between them, lanes over the queries. Included by paged_attention_body.h.
//
// Per token and vector of 16 queries: 2 D multiply-add instructions for 2 D 16 products, D of them where pairs of
// bf16 are multiplied, against about 20 instructions of softmax. Keys and values stay in the cache from one block
// of queries to the next.

// Which (entry, query head) each lane stands for; entry -1 past the last query.
struct Lanes {
  int32_t entry[16 * MAX_VECTORS], head[16 * MAX_VECTORS];
};

METAREWARD_INLINE void take_lanes(const AttentionArguments& a, const AttentionUnit& u, int64_t lanes, Lanes& taken) {
  int64_t entry = u.entry + u.first / a.group, in_group = u.first % a.group;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    taken.entry[lane] = lane < u.stacked ? int32_t(entry) : -1;
    taken.head[lane] = int32_t(u.head * a.group + in_group);
    if (++in_group == a.group) {
      in_group = 0;
      ++entry;
    }
  }
}

// The queries of the lanes, D values or D/2 pairs a query, transposed to lanes.
template <class T, class Product, int NV>
METAREWARD_INLINE void stack_queries(const AttentionArguments& a, const Lanes& lanes, f32x16* stacked) {
  constexpr bool pairs = !Product::floats;
  const int64_t steps = pairs ? a.dim / 2 : a.dim;
  const uint32_t flip = a.negative ? (pairs ? 0x80008000u : 0x80000000u) : 0u;
  for (int n = 0; n < NV; ++n) {
    const T* source[16];
    for (int64_t lane = 0; lane < 16; ++lane) {
      const int32_t entry = lanes.entry[16 * n + lane];
      const int64_t place = entry < 0 ? 0 : a.rows[entry] * a.query_heads + lanes.head[16 * n + lane];
      source[lane] = entry < 0 ? nullptr : (const T*)a.query + place * a.dim;
    }
    for (int64_t i = 0; i < steps; i += 16) {
      f32x16 rows[16];
      for (int lane = 0; lane < 16; ++lane) {
        u32x16 x = {};
        if (source[lane] != nullptr) {
          if constexpr (pairs) {
            if (steps - i >= 16) {
              x = load_pairs((const uint16_t*)source[lane] + 2 * i);
            } else {
              for (int64_t j = 0; j < steps - i; ++j) {
                uint32_t pair;
                __builtin_memcpy(&pair, source[lane] + 2 * (i + j), sizeof pair);
                x[j] = pair;
              }
            }
          } else {
            const T* next = source[lane] + i;
            x = (u32x16)(steps - i >= 16 ? load16(next) : load_part(next, steps - i, 0.0f));
          }
        }
        rows[lane] = (f32x16)(x ^ flip);
      }
      transpose16(rows);
      for (int64_t j = 0; j < 16 && i + j < steps; ++j) stacked[(i + j) * NV + n] = rows[j];
    }
  }
}

// Scores of `tokens` tokens (from token `start` of the segment) become weights relative to the running maximum, in
// place: floats, or pairs of bf16 of neighbouring tokens. Returns by how much earlier sums decay.
template <class Product, int NV>
METAREWARD_INLINE void weigh_scores(
    const AttentionArguments& a, int64_t start, int64_t tokens, bool masked, const i32x16* limits, f32x16* scores,
    f32x16* top, f32x16* sum, f32x16* decay) {
  const f32x16 lowest = f32x16{} - __builtin_inff();
  for (int n = 0; n < NV; ++n) {
    f32x16 highest = lowest;
    if (masked) {
      for (int64_t t = 0; t < tokens; ++t) {
        const i32x16 token = i32x16{} + int32_t(start + t);
        const f32x16 s = (token < limits[n]) ? scores[t * NV + n] : lowest;
        scores[t * NV + n] = s;
        highest = max16(highest, s);
      }
    } else {
      for (int64_t t = 0; t < tokens; ++t) highest = max16(highest, scores[t * NV + n]);
    }
    const f32x16 new_top = max16(top[n], highest * a.scale_log2e);
    const f32x16 base = (new_top == lowest) ? f32x16{} : new_top;  // nothing visible yet: -inf - -inf is a NaN
    decay[n] = exp2_16(top[n] - base);
    top[n] = new_top;
    f32x16 total = sum[n] * decay[n];
    if constexpr (Product::floats) {
      for (int64_t t = 0; t < tokens; ++t) {
        const f32x16 p = exp2_weight<false>(scores[t * NV + n] * a.scale_log2e - base);
        total += p;
        scores[t * NV + n] = p;
      }
    } else {
#if defined(METAREWARD_AVX512_BF16)
      const __m512i interleave = interleaved_halves();
      for (int64_t t = 0; t < tokens; t += 2) {
        const f32x16 p0 = exp2_weight<true>(scores[t * NV + n] * a.scale_log2e - base);
        f32x16 p1 = exp2_weight<true>(scores[(t + 1) * NV + n] * a.scale_log2e - base);
        if (t + 1 == tokens) p1 = f32x16{};
        total += p0 + p1;
        const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)p1, (__m512)p0);
        scores[t / 2 * NV + n] = (f32x16)_mm512_permutexvar_epi16(interleave, halves);
      }
#endif
    }
    sum[n] = total;
  }
}

// Leaves the sums over tokens [u.token_begin, u.token_end) in the partials of the entries that see any of them.
template <int NV>
METAREWARD_INLINE void store_partials(
    const AttentionArguments& a, const AttentionUnit& u, const Lanes& lanes, const f32x16* acc, const f32x16* top,
    const f32x16* sum) {
  const int64_t chunk = u.token_begin / a.chunk;
  for (int n = 0; n < NV; ++n) {
    float* target[16];
    for (int64_t lane = 0; lane < 16; ++lane) {
      const int32_t entry = lanes.entry[16 * n + lane];
      target[lane] = nullptr;
      if (entry < 0 || a.limits[entry] <= u.token_begin) continue;
      const int64_t place = (a.slots[entry] + chunk) * a.query_heads + lanes.head[16 * n + lane];
      target[lane] = a.partials + place * a.padded;
      a.statistics[2 * place] = top[n][lane];
      a.statistics[2 * place + 1] = sum[n][lane];
    }
    for (int64_t d = 0; d < a.dim; d += 16) {
      f32x16 rows[16];
      for (int64_t j = 0; j < 16; ++j) rows[j] = d + j < a.dim ? acc[(d + j) * NV + n] : f32x16{};
      transpose16(rows);
      for (int lane = 0; lane < 16; ++lane)
        if (target[lane] != nullptr) store16(target[lane] + d, rows[lane]);
    }
  }
}

// Addresses of a unit's first block of tokens; returns how many.
template <class T>
METAREWARD_INLINE int64_t
first_rows(const AttentionArguments& a, const AttentionUnit& u, const T** key_rows, const T** value_rows) {
  const int64_t left = u.token_end - u.token_begin, tokens = left < STACKED_TOKENS ? left : STACKED_TOKENS;
  const int64_t key_offset = u.head * a.key_strides[2], value_offset = u.head * a.value_strides[2];
  token_rows(a, a.key_pages, a.key_strides, u.segment, u.token_begin, tokens, key_offset, key_rows);
  token_rows(a, a.value_pages, a.value_strides, u.segment, u.token_begin, tokens, value_offset, value_rows);
  return tokens;
}

// T: element of the cache; Product: how it is multiplied. scratch: see `stacked_floats` in paged_attention.cpp.
template <class T, class Product, int NV>
METAREWARD_INLINE void attend_stacked_by(
    const AttentionArguments& a, const AttentionUnit& u, const AttentionUnit* following, float* scratch) {
  constexpr bool pairs = !Product::floats, convert = Product::floats && sizeof(T) != sizeof(float);
  constexpr int64_t width = 16 * MAX_VECTORS;
  f32x16* q = (f32x16*)scratch;
  f32x16* acc = (f32x16*)(scratch + width * a.padded);
  f32x16* scores = (f32x16*)(scratch + 2 * width * a.padded);
  float* keys = scratch + 2 * width * a.padded + width * STACKED_TOKENS;
  float* values = keys + STACKED_TOKENS * a.padded;
  const T* zeros = (const T*)a.zeros;

  Lanes lanes;
  take_lanes(a, u, 16 * NV, lanes);
  i32x16 limits[NV];
  int64_t least = u.token_end, most = u.token_begin;
  for (int n = 0; n < NV; ++n) {
    for (int64_t lane = 0; lane < 16; ++lane) {
      const int32_t entry = lanes.entry[16 * n + lane];
      const int64_t limit = entry < 0 ? 0 : a.limits[entry];
      limits[n][lane] = int32_t(limit);
      if (entry < 0) continue;
      least = limit < least ? limit : least;
      most = limit > most ? limit : most;
    }
  }
  const int64_t end = most < u.token_end ? most : u.token_end;
  stack_queries<T, Product, NV>(a, lanes, q);
  f32x16 top[NV], sum[NV], decay[NV];
  for (int n = 0; n < NV; ++n) {
    top[n] = f32x16{} - __builtin_inff();
    sum[n] = f32x16{};
  }
  for (int64_t i = 0; i < a.dim * NV; ++i) acc[i] = f32x16{};

  const T *key_rows[2][STACKED_TOKENS], *value_rows[2][STACKED_TOKENS];
  const int64_t key_offset = u.head * a.key_strides[2], value_offset = u.head * a.value_strides[2];
  int64_t tokens = end - u.token_begin < STACKED_TOKENS ? end - u.token_begin : STACKED_TOKENS;
  if (tokens > 0) {
    token_rows(a, a.key_pages, a.key_strides, u.segment, u.token_begin, tokens, key_offset, key_rows[0]);
    token_rows(a, a.value_pages, a.value_strides, u.segment, u.token_begin, tokens, value_offset, value_rows[0]);
  }
  int64_t next_tokens = 0;
  int now = 0;
  for (int64_t start = u.token_begin; start < end; start += tokens, tokens = next_tokens, now ^= 1) {
    const int64_t next = start + tokens;
    next_tokens = end - next < STACKED_TOKENS ? end - next : STACKED_TOKENS;
    const T** k = key_rows[now];
    const T** v = value_rows[now];
    int64_t ahead = next_tokens;
    if (next_tokens > 0) {
      token_rows(a, a.key_pages, a.key_strides, u.segment, next, next_tokens, key_offset, key_rows[now ^ 1]);
      token_rows(a, a.value_pages, a.value_strides, u.segment, next, next_tokens, value_offset, value_rows[now ^ 1]);
    } else if (following != nullptr) {
      ahead = first_rows(a, *following, key_rows[now ^ 1], value_rows[now ^ 1]);
    }
    const int64_t whole = (tokens + TILE - 1) / TILE * TILE;  // the slots past the end may hold anything
    for (int64_t t = tokens; t < whole; ++t) k[t] = v[t] = zeros;

    const char* left[STACKED_TOKENS];
    if constexpr (convert) {
      for (int64_t t = 0; t < whole; ++t) left[t] = (const char*)widen_row(k[t], a.dim, keys + t * a.padded);
    } else {
      for (int64_t t = 0; t < whole; ++t) left[t] = (const char*)k[t];
    }
    for (int64_t t = 0; t < whole; t += TILE) {
      const int64_t fetched = t + TILE < whole ? t + TILE : ahead;
      for (int64_t i = t; i < fetched && i < ahead; ++i) {
        prefetch_row(key_rows[now ^ 1][i], a.dim);
        prefetch_row(value_rows[now ^ 1][i], a.dim);
      }
      score_tile<Product, NV>(left + t, pairs ? a.dim / 2 : a.dim, q, scores + t * NV);
    }
    weigh_scores<Product, NV>(a, start, tokens, next > least, limits, scores, top, sum, decay);

    int64_t steps = tokens;
    if constexpr (pairs) {
#if defined(METAREWARD_AVX512_BF16)
      steps = (tokens + 1) / 2;
      for (int64_t i = 0; i < steps; ++i) {
        const auto *x = (const uint16_t*)v[2 * i], *y = (const uint16_t*)v[2 * i + 1];
        interleave_rows(x, y, a.dim, (uint32_t*)values + i * a.padded);
        left[i] = (const char*)(values + i * a.padded);
      }
#endif
    } else if constexpr (convert) {
      for (int64_t t = 0; t < steps; ++t) left[t] = (const char*)widen_row(v[t], a.dim, values + t * a.padded);
    } else {
      for (int64_t t = 0; t < steps; ++t) left[t] = (const char*)v[t];
    }
    int64_t d = 0;
    for (; d + TILE <= a.dim; d += TILE) value_tile<Product, NV, TILE>(left, d, steps, scores, decay, acc + d * NV);
    for (; d < a.dim; ++d) value_tile<Product, NV, 1>(left, d, steps, scores, decay, acc + d * NV);
  }
  store_partials<NV>(a, u, lanes, acc, top, sum);
}

template <class T, class Product>
METAREWARD_INLINE void attend_stacked_with(
    const AttentionArguments& a, const AttentionUnit& u, const AttentionUnit* following, float* scratch) {
#if defined(METAREWARD_AVX512)
  if (u.stacked > 32) return attend_stacked_by<T, Product, 3>(a, u, following, scratch);
  if (u.stacked > 16) return attend_stacked_by<T, Product, 2>(a, u, following, scratch);
#endif
  attend_stacked_by<T, Product, 1>(a, u, following, scratch);
}

// following: the unit that this thread takes next, or null.
static void attend_stacked(
    const AttentionArguments& a, const AttentionUnit& u, const AttentionUnit* following, float* scratch) {
  if (!a.bf16) return attend_stacked_with<float, Floats>(a, u, following, scratch);
#if defined(METAREWARD_AVX512_BF16)
  if (a.dim % 2 == 0) return attend_stacked_with<uint16_t, Pairs>(a, u, following, scratch);
#endif
  attend_stacked_with<uint16_t, Floats>(a, u, following, scratch);
}

static int64_t stacked_queries() { return 16 * MAX_VECTORS; }

// Backward pass of segment attention: some keys against every query that sees them. Compiled once an instruction set by
// for_each_simd.h.
//
// With S = scale Q K', P = exp(S - lse), dP = dO V' and dS = P (dP - sum(dO O)):
//     dV = P' dO,  dK = scale dS' Q,  dQ = scale dS K.
// S, dP, P and dS are held key by key with the queries in lanes; P and dS are rounded to bf16 where pairs are multiplied.
#include "segment_tiles_body.h"

enum : int64_t { STRIP = 24 };  // keys whose scores are weighed while they are in the first cache level

template <class Product>
struct GradientScratch {
  typedef typename Product::Element Element;
  Element *keys, *values, *joined_keys;                // [BACKWARD_KEYS, D]; the last one joined by rows
  float *grad_keys, *grad_values;                      // [BACKWARD_KEYS, padded]
  f32x16 *query, *grad, *grad_query;                   // [D, LANE_VECTORS], queries in lanes
  Element *joined_query, *joined_grad;                 // [LANES, D] joined by rows
  f32x16 *scores, *grad_scores;                        // [STRIP, LANE_VECTORS]
  Element *weights, *grad_weights;                     // [WEIGHED_KEYS, LANES]: P and dS, a key after the other
  f32x16* joined_weights;                              // dS joined by keys
};

template <class Product>
METAREWARD_INLINE GradientScratch<Product> gradient_scratch(const SegmentArguments& a, float* next) {
  typedef typename Product::Element Element;
  const auto take = [&](int64_t floats) {
    float* const taken = next;
    next += floats;
    return taken;
  };
  GradientScratch<Product> s;
  s.keys = (Element*)take(BACKWARD_KEYS * a.padded);
  s.values = (Element*)take(BACKWARD_KEYS * a.padded);
  s.joined_keys = Product::floats ? s.keys : (Element*)take(BACKWARD_KEYS * a.padded);
  s.grad_keys = take(BACKWARD_KEYS * a.padded);
  s.grad_values = take(BACKWARD_KEYS * a.padded);
  s.query = (f32x16*)take(LANES * a.padded);
  s.grad = (f32x16*)take(LANES * a.padded);
  s.grad_query = (f32x16*)take(LANES * a.padded);
  s.joined_query = (Element*)take(LANES * a.padded);
  s.joined_grad = (Element*)take(LANES * a.padded);
  s.scores = (f32x16*)take(STRIP * LANES);
  s.grad_scores = (f32x16*)take(STRIP * LANES);
  s.weights = (Element*)take(WEIGHED_KEYS * LANES);
  s.grad_weights = (Element*)take(WEIGHED_KEYS * LANES);
  s.joined_weights = Product::floats ? (f32x16*)s.grad_weights : (f32x16*)take(WEIGHED_KEYS * LANES);
  return s;
}

// What a query brings beside its row. limit: how many of the keys at hand it sees.
struct QueryFigures {
  f32x16 lse[LANE_VECTORS], delta[LANE_VECTORS];
  i32x16 limit[LANE_VECTORS];
};

// P of one key and 16 queries, and dS.
template <class Product, bool MASKED>
METAREWARD_INLINE f32x16 weigh(
    const SegmentArguments& a, const QueryFigures& figures, int64_t n, int64_t key, f32x16 score, f32x16 grad, f32x16* ds) {
  // The difference first: a product with log2(e) of a large log-sum-exp would lose what the difference keeps.
  f32x16 p = exp2_weight<!Product::floats>((score * a.scale - figures.lse[n]) * 1.44269504f);
  f32x16 d = p * (grad - figures.delta[n]);
  if constexpr (MASKED) {  // a select: 0 times what is hidden may be a NaN
    const i32x16 seen = i32x16{} + int32_t(key) < figures.limit[n];
    p = seen ? p : f32x16{};
    d = seen ? d : f32x16{};
  }
  *ds = d;
  return p;
}

// Scores and dP of `rows` keys from `key` on become P and dS, at row `row` of the weights.
template <class Product, bool MASKED>
static void weigh_strip(
    const SegmentArguments& a, const QueryFigures& figures, int64_t vectors, int64_t key, int64_t row, int64_t rows,
    const GradientScratch<Product>& s) {
  for (int64_t t = 0; t < rows; t += 2) {
    for (int64_t n = 0; n < vectors; ++n) {
      const int64_t i = t * LANE_VECTORS + n, j = i + LANE_VECTORS;
      f32x16 d0, d1;
      const f32x16 p0 = weigh<Product, MASKED>(a, figures, n, key + t, s.scores[i], s.grad_scores[i], &d0);
      const f32x16 p1 = weigh<Product, MASKED>(a, figures, n, key + t + 1, s.scores[j], s.grad_scores[j], &d1);
      if constexpr (Product::floats) {
        const int64_t place = (row + t) * LANES + 16 * n;
        store16(s.weights + place, p0);
        store16(s.weights + place + LANES, p1);
        store16(s.grad_weights + place, d0);
        store16(s.grad_weights + place + LANES, d1);
      } else {
#if defined(METAREWARD_AVX512_BF16)
        const int64_t place = ((row + t) * LANES + 16 * n) / 2;
        const __m512i p = (__m512i)_mm512_cvtne2ps_pbh((__m512)p1, (__m512)p0);
        const __m512i d = (__m512i)_mm512_cvtne2ps_pbh((__m512)d1, (__m512)d0);
        _mm256_storeu_si256((__m256i*)(s.weights + place), _mm512_castsi512_si256(p));
        _mm256_storeu_si256((__m256i*)(s.weights + place + LANES / 2), _mm512_extracti64x4_epi64(p, 1));
        _mm256_storeu_si256((__m256i*)(s.grad_weights + place), _mm512_castsi512_si256(d));
        _mm256_storeu_si256((__m256i*)(s.grad_weights + place + LANES / 2), _mm512_extracti64x4_epi64(d, 1));
        s.joined_weights[(row + t) / 2 * LANE_VECTORS + n] = (f32x16)_mm512_permutexvar_epi16(interleaved_halves(), d);
#endif
      }
    }
  }
}

// `count` keys from `key` of the packed ones on, against a block of queries: adds to dK, dV and dQ.
template <class Product>
METAREWARD_INLINE void add_gradients(
    const SegmentArguments& a, const QueryFigures& figures, int64_t vectors, int64_t key, int64_t count, int64_t least,
    const GradientScratch<Product>& s) {
  typedef Factors<Product> F;
  constexpr int64_t width = Step<Product>::width;
  const int64_t rows = (count + 1) / 2 * 2, row_step = a.padded / width, dim_steps = Step<Product>::count(a.dim);
  for (int64_t t = 0; t < rows; t += STRIP) {
    const int64_t strip = rows - t < STRIP ? rows - t : STRIP, at = (key + t) * row_step;
    multiply<Product, FROM_ZERO, false>(
        F{s.keys + at, row_step, s.query, LANE_VECTORS, nullptr, s.scores, LANE_VECTORS}, strip, vectors, dim_steps);
    multiply<Product, FROM_ZERO, false>(
        F{s.values + at, row_step, s.grad, LANE_VECTORS, nullptr, s.grad_scores, LANE_VECTORS}, strip, vectors, dim_steps);
    if (key + t + strip > least) {
      weigh_strip<Product, true>(a, figures, vectors, key + t, t, strip, s);
    } else {
      weigh_strip<Product, false>(a, figures, vectors, key + t, t, strip, s);
    }
  }
  multiply<Product, ADD, true>(
      F{s.joined_keys + key * row_step, a.padded, s.joined_weights, LANE_VECTORS, nullptr, s.grad_query, LANE_VECTORS},
      (a.dim + 1) / 2 * 2, vectors, rows / width);
  const int64_t columns = (a.dim + 15) / 16, lane_steps = 16 * vectors / width, stride = a.padded / 16;
  multiply<Product, ADD, false>(
      F{s.weights, LANES / width, (const f32x16*)s.joined_grad, stride, nullptr,
        (f32x16*)(s.grad_values + key * a.padded), stride},
      rows, columns, lane_steps);
  multiply<Product, ADD, false>(
      F{s.grad_weights, LANES / width, (const f32x16*)s.joined_query, stride, nullptr,
        (f32x16*)(s.grad_keys + key * a.padded), stride},
      rows, columns, lane_steps);
}

// The lanes of grad_query to their rows of the partial sums: written, or added to what is there.
METAREWARD_INLINE void store_grad_query(
    const GradientArguments& g, const LaneBlock& lanes, const LaneRows& rows, int64_t slot, bool add, const f32x16* grad_query) {
  const SegmentArguments& a = g.shared;
  for (int64_t n = 0; n < lanes.vectors(); ++n) {
    const int64_t left = lanes.count - 16 * n, count = left < 16 ? left : 16;
    for (int64_t d = 0; d < a.dim; d += 16) {
      f32x16 x[16];
      for (int64_t j = 0; j < 16; ++j) x[j] = d + j < a.dim ? grad_query[(d + j) * LANE_VECTORS + n] : f32x16{};
      transpose16(x);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t lane = 16 * n + i, row = (slot + rows.token[lane]) * a.query_heads + rows.head[lane];
        float* to = g.partials + row * a.padded + d;
        store16(to, add ? load16(to) + x[i] : x[i]);
      }
    }
  }
}

// A block of queries against the packed keys [begin, begin + count).
template <class T, class Product>
METAREWARD_INLINE void take_block(
    const GradientArguments& g, const BackwardUnit& u, const Reader& reader, const LaneBlock& lanes, int64_t begin,
    int64_t count, const GradientScratch<Product>& s) {
  const SegmentArguments& a = g.shared;
  const int64_t vectors = lanes.vectors(), padded_lanes = 16 * vectors;
  LaneRows rows;
  const T* pointers[LANES];
  take_lanes(a, lanes, u.head, rows);
  lane_pointers(a, lanes, rows, a.query, pointers);
  turn_rows<T, Product>(pointers, vectors, a.dim, s.query);
  join_rows<T, Product>(pointers, padded_lanes, a.dim, a.padded, s.joined_query);
  lane_pointers(a, lanes, rows, g.grad, pointers);
  turn_rows<T, Product>(pointers, vectors, a.dim, s.grad);
  join_rows<T, Product>(pointers, padded_lanes, a.dim, a.padded, s.joined_grad);
  QueryFigures figures;
  for (int64_t lane = 0; lane < padded_lanes; ++lane) {
    const bool real = lane < lanes.count;
    const int64_t place = real ? rows.token[lane] * a.query_heads + rows.head[lane] : 0;
    const int64_t before = real && reader.causal ? rows.token[lane] - begin + 1 : count;
    figures.lse[lane / 16][lane % 16] = real ? g.lse[place] : __builtin_inff();  // past the last lane P = dS = 0
    figures.delta[lane / 16][lane % 16] = real ? g.delta[place] : 0.0f;
    figures.limit[lane / 16][lane % 16] = int32_t(before < count ? before : count);
  }
  const int64_t least = figures.limit[0][0], last = lanes.count - 1, most = figures.limit[last / 16][last % 16];
  for (int64_t i = 0; i < (a.dim + 1) / 2 * 2 * LANE_VECTORS; ++i) s.grad_query[i] = f32x16{};
  for (int64_t key = 0; key < most; key += WEIGHED_KEYS) {
    const int64_t keys = most - key < WEIGHED_KEYS ? most - key : WEIGHED_KEYS;
    add_gradients<Product>(a, figures, vectors, key, keys, least, s);
  }
  store_grad_query(g, lanes, rows, reader.slot - reader.begin, begin > u.begin, s.grad_query);
}

template <class T>
METAREWARD_INLINE void store_scaled(const float* row, int64_t dim, float scale, T* out) {
  int64_t d = 0;
  for (; d + 16 <= dim; d += 16) store16(out + d, load16(row + d) * scale);
  if (d < dim) store_part(out + d, load16(row + d) * scale, dim - d);
}

template <class T, class Product>
METAREWARD_INLINE void key_gradients_by(const GradientArguments& g, const BackwardUnit& u, float* scratch) {
  const SegmentArguments& a = g.shared;
  const GradientScratch<Product> s = gradient_scratch<Product>(a, scratch);
  const T* pointers[BACKWARD_KEYS + 1];
  for (int64_t begin = u.begin; begin < u.end; begin += BACKWARD_KEYS) {
    const int64_t count = u.end - begin < BACKWARD_KEYS ? u.end - begin : BACKWARD_KEYS;
    const int64_t rows = key_pointers(a, a.value, u.head, begin, count, pointers);
    copy_rows<T, Product>(pointers, rows, a.dim, a.padded, s.values);
    key_pointers(a, a.key, u.head, begin, count, pointers);
    copy_rows<T, Product>(pointers, rows, a.dim, a.padded, s.keys);
    if constexpr (!Product::floats) join_rows<T, Product>(pointers, rows, a.dim, a.padded, s.joined_keys);
    for (int64_t i = 0; i < rows * a.padded; i += 16) {
      store16(s.grad_keys + i, f32x16{});
      store16(s.grad_values + i, f32x16{});
    }
    for (int64_t r = 0; r < u.readers; ++r) {
      const Reader& reader = u.reader[r];
      const int64_t token = reader.causal ? begin : reader.begin, lanes = (reader.end - token) * a.group;
      for (int64_t i = 0; i < lane_blocks(lanes); ++i)
        take_block<T, Product>(g, u, reader, lane_block(token, lanes, i), begin, count, s);
    }
    for (int64_t t = 0; t < count; ++t) {
      const int64_t to = ((begin + t) * a.kv_heads + u.head) * a.dim;
      store_scaled(s.grad_keys + t * a.padded, a.dim, a.scale, (T*)g.grad_key + to);
      store_scaled(s.grad_values + t * a.padded, a.dim, 1.0f, (T*)g.grad_value + to);
    }
  }
}

static void key_gradients(const GradientArguments& g, const BackwardUnit& u, float* scratch) {
  if (!g.shared.bf16) return key_gradients_by<float, Floats>(g, u, scratch);
#if defined(METAREWARD_AVX512_BF16)
  key_gradients_by<uint16_t, Pairs>(g, u, scratch);
#else
  key_gradients_by<uint16_t, Floats>(g, u, scratch);
#endif
}

static int64_t block_lanes() { return LANES; }

#include "segment_rows_body.h"

// Forward pass of segment attention: blocks of queries over the keys of their ancestors and of their own segment, with
// an online softmax. Compiled once an instruction set by for_each_simd.h.
#include "segment_tiles_body.h"

enum : int64_t { UNIT_BLOCKS = 4 };  // blocks of queries that share a block of packed keys and values

struct QueryBlock {
  f32x16 top[LANE_VECTORS], sum[LANE_VECTORS];  // running maximum of the scores in powers of 2, sum of weights
  i32x16 limit[LANE_VECTORS];                   // how many keys of its own segment a lane sees
  int64_t vectors, least, most;                 // of the limits
  const f32x16* query;                          // [Step::count(D), LANE_VECTORS]
  f32x16* acc;                                  // [D, LANE_VECTORS], weighted values
};

METAREWARD_INLINE f32x16 higher(f32x16 a, f32x16 b) {
#if defined(METAREWARD_AVX512)
  return (f32x16)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);  // the plain one makes GCC 12 warn
#else
  return max16(a, b);
#endif
}

// Scores of `keys` keys, the first of them `first` of the segment, become weights relative to the running maximum, in
// place: floats, or pairs of bf16 of neighbouring keys. decay: what earlier sums are worth now.
template <class Product, int NV>
METAREWARD_INLINE void weigh_keys(
    float scale_log2e, int64_t first, int64_t keys, bool masked, QueryBlock& block, f32x16* scores, f32x16* decay) {
  const f32x16 lowest = f32x16{} - __builtin_inff();
  f32x16 highest[NV], base[NV], total[NV];
  for (int n = 0; n < NV; ++n) highest[n] = lowest;
  for (int64_t t = 0; t < keys; ++t) {
    const i32x16 key = i32x16{} + int32_t(first + t);
    for (int n = 0; n < NV; ++n) {
      f32x16 s = scores[t * LANE_VECTORS + n];
      if (masked) {
        s = (key < block.limit[n]) ? s : lowest;
        scores[t * LANE_VECTORS + n] = s;
      }
      highest[n] = higher(highest[n], s);
    }
  }
  for (int n = 0; n < NV; ++n) {
    const f32x16 top = higher(block.top[n], highest[n] * scale_log2e);
    base[n] = (top == lowest) ? f32x16{} : top;  // every score is -inf yet: -inf - -inf would be a NaN
    decay[n] = exp2_weight<false>(block.top[n] - base[n]);
    block.top[n] = top;
    total[n] = block.sum[n] * decay[n];
  }
  if constexpr (Product::floats) {
    for (int64_t t = 0; t < keys; ++t) {
      for (int n = 0; n < NV; ++n) {
        const f32x16 p = exp2_weight<false>(scores[t * LANE_VECTORS + n] * scale_log2e - base[n]);
        total[n] += p;
        scores[t * LANE_VECTORS + n] = p;
      }
    }
  } else {
#if defined(METAREWARD_AVX512_BF16)
    const __m512i interleave = interleaved_halves();
    for (int64_t t = 0; t < keys; t += 2) {
      for (int n = 0; n < NV; ++n) {
        const f32x16 p0 = exp2_weight<true>(scores[t * LANE_VECTORS + n] * scale_log2e - base[n]);
        f32x16 p1 = {};
        if (t + 1 < keys) p1 = exp2_weight<true>(scores[(t + 1) * LANE_VECTORS + n] * scale_log2e - base[n]);
        total[n] += p0 + p1;
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)p1, (__m512)p0);
        scores[t / 2 * LANE_VECTORS + n] = (f32x16)_mm512_permutexvar_epi16(interleave, both);
      }
    }
#endif
  }
  for (int n = 0; n < NV; ++n) block.sum[n] = total[n];
}

// One block of keys for one block of queries. `keys` [KEYS, padded], `values` joined by rows.
template <class Product, int NV>
static void attend_keys(
    const SegmentArguments& a, const typename Product::Element* keys, const typename Product::Element* values,
    int64_t first, int64_t count, bool masked, QueryBlock& block, f32x16* scores) {
  const int64_t rows = (count + 1) / 2 * 2;
  f32x16 decay[NV];
  multiply<Product, FROM_ZERO, false>(
      Factors<Product>{keys, Step<Product>::count(a.padded), block.query, LANE_VECTORS, nullptr, scores, LANE_VECTORS},
      rows, NV, Step<Product>::count(a.dim));
  weigh_keys<Product, NV>(a.scale_log2e, first, count, masked, block, scores, decay);
  multiply<Product, DECAY, true>(
      Factors<Product>{values, a.padded, scores, LANE_VECTORS, decay, block.acc, LANE_VECTORS},
      (a.dim + 1) / 2 * 2, NV, Step<Product>::count(count));
}

template <class T, class Product>
METAREWARD_INLINE void start_block(
    const SegmentArguments& a, const ForwardUnit& u, const LaneBlock& lanes, f32x16* query, f32x16* acc, QueryBlock& block) {
  LaneRows rows;
  const T* pointers[LANES];
  take_lanes(a, lanes, u.head, rows);
  lane_pointers(a, lanes, rows, a.query, pointers);
  block.vectors = lanes.vectors();
  turn_rows<T, Product>(pointers, block.vectors, a.dim, query);
  block.query = query;
  block.acc = acc;
  block.least = rows.token[0] - lanes.token + 1;
  block.most = rows.token[lanes.count - 1] - lanes.token + 1;
  for (int64_t n = 0; n < block.vectors; ++n) {
    block.top[n] = f32x16{} - __builtin_inff();
    block.sum[n] = f32x16{};
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t lane = 16 * n + i;
      block.limit[n][i] = int32_t(lane < lanes.count ? rows.token[lane] - lanes.token + 1 : block.most);
    }
  }
  for (int64_t i = 0; i < (a.dim + 1) / 2 * 2 * LANE_VECTORS; ++i) acc[i] = f32x16{};
}

template <class T>
METAREWARD_INLINE void finish_block(
    const SegmentArguments& a, const ForwardUnit& u, const LaneBlock& lanes, const QueryBlock& block, T* out,
    float* tops, float* sums) {
  LaneRows rows;
  take_lanes(a, lanes, u.head, rows);
  for (int64_t n = 0; n < block.vectors; ++n) {
    const int64_t left = lanes.count - 16 * n, count = left < 16 ? left : 16;
    for (int64_t d = 0; d < a.dim; d += 16) {
      f32x16 x[16];
      for (int64_t j = 0; j < 16; ++j)
        x[j] = d + j < a.dim ? block.acc[(d + j) * LANE_VECTORS + n] / block.sum[n] : f32x16{};
      transpose16(x);
      for (int64_t i = 0; i < count; ++i) {
        T* to = out + (rows.token[16 * n + i] * a.query_heads + rows.head[16 * n + i]) * a.dim + d;
        if (a.dim - d >= 16) {
          store16(to, x[i]);
        } else {
          store_part(to, x[i], a.dim - d);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = rows.token[16 * n + i] * a.query_heads + rows.head[16 * n + i];
      tops[place] = block.top[n][i];
      sums[place] = block.sum[n][i];
    }
  }
}

template <class T, class Product>
METAREWARD_INLINE void attend_unit_by(
    const SegmentArguments& a, const ForwardUnit& u, T* out, float* tops, float* sums, float* scratch) {
  typedef typename Product::Element Element;
  const int64_t block_floats = LANES * a.padded;
  float* queries = scratch;
  float* accs = queries + UNIT_BLOCKS * block_floats;
  f32x16* scores = (f32x16*)(accs + UNIT_BLOCKS * block_floats);
  Element* keys = (Element*)(scores + FORWARD_KEYS * LANE_VECTORS);
  Element* values = keys + FORWARD_KEYS * a.padded;
  const T* pointers[FORWARD_KEYS + 1];

  QueryBlock blocks[UNIT_BLOCKS];
  for (int64_t b = 0; b < u.blocks; ++b) {
    const LaneBlock lanes = lane_block(u.token, u.lanes, u.first_block + b);
    start_block<T, Product>(
        a, u, lanes, (f32x16*)(queries + b * block_floats), (f32x16*)(accs + b * block_floats), blocks[b]);
  }
  for (int64_t span = 0; span < u.spans; ++span) {
    const bool own = span == u.spans - 1;
    const int64_t begin = u.span[2 * span];
    const int64_t end = own ? begin + blocks[u.blocks - 1].most : u.span[2 * span + 1];
    for (int64_t key = begin; key < end; key += FORWARD_KEYS) {
      const int64_t count = end - key < FORWARD_KEYS ? end - key : FORWARD_KEYS;
      int64_t rows = key_pointers(a, a.key, u.head, key, count, pointers);
      copy_rows<T, Product>(pointers, rows, a.dim, a.padded, keys);
      rows = key_pointers(a, a.value, u.head, key, count, pointers);
      join_rows<T, Product>(pointers, rows, a.dim, a.padded, values);
      for (int64_t b = 0; b < u.blocks; ++b) {
        QueryBlock& block = blocks[b];
        const int64_t first = key - begin, left = own ? block.most - first : count;
        const int64_t seen = left < count ? left : count;
        if (seen <= 0) continue;
        const bool masked = own && first + seen > block.least;
        if constexpr (LANE_VECTORS == 4) {
          if (block.vectors == 4) attend_keys<Product, 4>(a, keys, values, first, seen, masked, block, scores);
          if (block.vectors == 3) attend_keys<Product, 3>(a, keys, values, first, seen, masked, block, scores);
          if (block.vectors == 2) attend_keys<Product, 2>(a, keys, values, first, seen, masked, block, scores);
        }
        if (block.vectors == 1) attend_keys<Product, 1>(a, keys, values, first, seen, masked, block, scores);
      }
    }
  }
  for (int64_t b = 0; b < u.blocks; ++b)
    finish_block(a, u, lane_block(u.token, u.lanes, u.first_block + b), blocks[b], out, tops, sums);
}

static void attend_unit(
    const SegmentArguments& a, const ForwardUnit& u, void* out, float* tops, float* sums, float* scratch) {
  if (!a.bf16) return attend_unit_by<float, Floats>(a, u, (float*)out, tops, sums, scratch);
#if defined(METAREWARD_AVX512_BF16)
  attend_unit_by<uint16_t, Pairs>(a, u, (uint16_t*)out, tops, sums, scratch);
#else
  attend_unit_by<uint16_t, Floats>(a, u, (uint16_t*)out, tops, sums, scratch);
#endif
}

static int64_t unit_lanes() { return UNIT_BLOCKS * LANES; }

// Rows packed for the products of segment attention, and the one product that all of them are. Included by
// segment_attention_body.h and segment_attention_backward_body.h.
//
// Lanes are queries (a token and a head of the group that shares a key head), or channels. Every product is
//     out[row][lane] = sum over steps of left(row, step) * right[step][lane]
// with `left` broadcast from memory and a tile of sums in registers. A step is one float or, where there are
// instructions for it, a pair of bf16 numbers.
#include "vector_math_body.h"

#include "attention_tiles_body.h"

#if defined(METAREWARD_AVX512)
enum : int64_t { LANE_VECTORS = 4 };
#else
enum : int64_t { LANE_VECTORS = 1 };
#endif
enum : int64_t { LANES = 16 * LANE_VECTORS };

// Rows of sums in registers: 24 sums with 4 or fewer vectors of `right` and a broadcast, of 32 registers; on AVX2 a
// vector takes two of 16.
template <int NV>
struct TileRows {
  enum : int { value = LANE_VECTORS == 1 ? 4 : NV == 4 ? 6 : NV == 3 ? 8 : 12 };
};

template <class Product>
struct Step {
  enum : int64_t { width = Product::floats ? 1 : 2 };  // numbers that a step multiplies
  static int64_t count(int64_t numbers) { return (numbers + width - 1) / width; }
};

enum Start { FROM_ZERO, ADD, DECAY };  // what a sum starts from: 0, what is there, or that times decay[lane]

template <class Product>
struct Factors {
  typedef typename Product::Element Element;
  const Element* left;
  int64_t left_stride;  // between rows, or between steps where the rows lie side by side
  const f32x16* right;
  int64_t right_stride;  // vectors between steps
  const f32x16* decay;
  f32x16* out;
  int64_t out_stride;  // vectors between rows
};

template <class Product, Start START, bool SIDE_BY_SIDE, int NV, int ROWS>
METAREWARD_INLINE void multiply_tile(const Factors<Product>& f, int64_t row, int64_t column, int64_t steps) {
  const auto* left = f.left + (SIDE_BY_SIDE ? row : row * f.left_stride);
  const f32x16* right = f.right + column;
  f32x16* out = f.out + row * f.out_stride + column;
  const int64_t left_stride = f.left_stride, right_stride = f.right_stride;
  f32x16 sum[ROWS][NV];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      if constexpr (START == FROM_ZERO) sum[r][n] = f32x16{};
      if constexpr (START == ADD) sum[r][n] = out[r * f.out_stride + n];
      if constexpr (START == DECAY) sum[r][n] = out[r * f.out_stride + n] * f.decay[column + n];
    }
  }
  for (int64_t i = 0; i < steps; ++i) {
    f32x16 x[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) x[n] = right[i * right_stride + n];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const auto y = SIDE_BY_SIDE ? left[i * left_stride + r] : left[r * left_stride + i];
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sum[r][n] = Product::add(sum[r][n], x[n], y);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) out[r * f.out_stride + n] = sum[r][n];
  }
}

// An even number of rows.
template <class Product, Start START, bool SIDE_BY_SIDE, int NV>
static void multiply_columns(const Factors<Product>& f, int64_t rows, int64_t column, int64_t steps) {
  constexpr int whole = TileRows<NV>::value;
  int64_t r = 0;
  for (; r + whole <= rows; r += whole) multiply_tile<Product, START, SIDE_BY_SIDE, NV, whole>(f, r, column, steps);
  if constexpr (whole > 4) {
    for (; r + 4 <= rows; r += 4) multiply_tile<Product, START, SIDE_BY_SIDE, NV, 4>(f, r, column, steps);
  }
  for (; r < rows; r += 2) multiply_tile<Product, START, SIDE_BY_SIDE, NV, 2>(f, r, column, steps);
}

template <class Product, Start START, bool SIDE_BY_SIDE>
METAREWARD_INLINE void multiply(const Factors<Product>& f, int64_t rows, int64_t vectors, int64_t steps) {
  const int64_t tiles = (vectors + LANE_VECTORS - 1) / LANE_VECTORS;
  for (int64_t tile = 0; tile < tiles; ++tile) {  // of nearly equal width: 6 vectors as 3 and 3
    const int64_t first = vectors * tile / tiles;
    const int64_t width = vectors * (tile + 1) / tiles - first;
    if constexpr (LANE_VECTORS == 4) {
      if (width == 4) multiply_columns<Product, START, SIDE_BY_SIDE, 4>(f, rows, first, steps);
      if (width == 3) multiply_columns<Product, START, SIDE_BY_SIDE, 3>(f, rows, first, steps);
      if (width == 2) multiply_columns<Product, START, SIDE_BY_SIDE, 2>(f, rows, first, steps);
    }
    if (width == 1) multiply_columns<Product, START, SIDE_BY_SIDE, 1>(f, rows, first, steps);
  }
}

// Rows one after the other, Step::count(padded) elements each; zeros past dim.
template <class T, class Product>
METAREWARD_INLINE void copy_rows(
    const T* const* rows, int64_t count, int64_t dim, int64_t padded, typename Product::Element* out) {
  for (int64_t t = 0; t < count; ++t) {
    if constexpr (Product::floats) {
      float* to = out + t * padded;
      int64_t d = 0;
      for (; d + 16 <= dim; d += 16) store16(to + d, load16(rows[t] + d));
      if (d < dim) store16(to + d, load_part(rows[t] + d, dim - d, 0.0f));
    } else {
#if defined(METAREWARD_AVX512_BF16)
      for (int64_t d = 0; d < dim; d += 32)
        _mm512_storeu_si512(out + (t * padded + d) / 2, _mm512_maskz_loadu_epi16(first_of_32(dim - d), rows[t] + d));
#endif
    }
  }
}

// The same for a sum over rows: [count / width][padded]; pairs are (row 2 i, row 2 i + 1). An even number of rows.
template <class T, class Product>
METAREWARD_INLINE void join_rows(
    const T* const* rows, int64_t count, int64_t dim, int64_t padded, typename Product::Element* out) {
  if constexpr (Product::floats) {
    copy_rows<T, Product>(rows, count, dim, padded, out);
  } else {
#if defined(METAREWARD_AVX512_BF16)
    for (int64_t t = 0; t < count; t += 2) interleave_rows(rows[t], rows[t + 1], dim, out + t / 2 * padded);
#endif
  }
}

// Rows as lanes: out[step * LANE_VECTORS + n] holds a step of the 16 rows from 16 n on.
template <class T, class Product>
METAREWARD_INLINE void turn_rows(const T* const* rows, int64_t vectors, int64_t dim, f32x16* out) {
  constexpr int64_t width = Step<Product>::width;
  const int64_t steps = Step<Product>::count(dim);
  for (int64_t n = 0; n < vectors; ++n) {
    for (int64_t i = 0; i < steps; i += 16) {
      f32x16 x[16];
      for (int lane = 0; lane < 16; ++lane) {
        const T* from = rows[16 * n + lane] + width * i;
        const int64_t left = dim - width * i;
        if constexpr (Product::floats) {
          x[lane] = left >= 16 ? load16(from) : load_part(from, left, 0.0f);
        } else {
#if defined(METAREWARD_AVX512_BF16)
          x[lane] = (f32x16)_mm512_maskz_loadu_epi16(first_of_32(left), from);
#endif
        }
      }
      transpose16(x);
      for (int64_t j = 0; j < 16 && i + j < steps; ++j) out[(i + j) * LANE_VECTORS + n] = x[j];
    }
  }
}

// A block of queries: `count` lanes from `first` on, of tokens that begin at `token`.
struct LaneBlock {
  int64_t token, first, count;
  int64_t vectors() const { return (count + 15) / 16; }
};

// Block i of `lanes` lanes cut into blocks of nearly equal numbers of vectors, as few as hold them.
METAREWARD_INLINE int64_t lane_blocks(int64_t lanes) { return (lanes + LANES - 1) / LANES; }

METAREWARD_INLINE LaneBlock lane_block(int64_t token, int64_t lanes, int64_t i) {
  const int64_t vectors = (lanes + 15) / 16, blocks = lane_blocks(lanes);
  const int64_t first = vectors * i / blocks * 16, end = vectors * (i + 1) / blocks * 16;
  return {token, first, (end < lanes ? end : lanes) - first};
}

// Which row each lane of a block stands for; those past the last lane read zeros.
struct LaneRows {
  int64_t token[LANES], head[LANES];
};

METAREWARD_INLINE void take_lanes(const SegmentArguments& a, const LaneBlock& block, int64_t kv_head, LaneRows& rows) {
  int64_t token = block.token + block.first / a.group, in_group = block.first % a.group;
  for (int64_t lane = 0; lane < block.count; ++lane) {
    rows.token[lane] = token;
    rows.head[lane] = kv_head * a.group + in_group;
    if (++in_group == a.group) {
      in_group = 0;
      ++token;
    }
  }
}

template <class T>
METAREWARD_INLINE void lane_pointers(
    const SegmentArguments& a, const LaneBlock& block, const LaneRows& rows, const HeadRows& x, const T** pointers) {
  for (int64_t lane = 0; lane < 16 * block.vectors(); ++lane)
    pointers[lane] = lane < block.count ? (const T*)x.data + rows.token[lane] * x.token + rows.head[lane] * x.head
                                        : (const T*)a.zeros;
}

// Tokens [begin, begin + count) of one key head, and zeros up to an even number; returns that number.
template <class T>
METAREWARD_INLINE int64_t key_pointers(
    const SegmentArguments& a, const HeadRows& x, int64_t head, int64_t begin, int64_t count, const T** pointers) {
  for (int64_t t = 0; t < count; ++t) pointers[t] = (const T*)x.data + (begin + t) * x.token + head * x.head;
  if (count % 2 != 0) pointers[count] = (const T*)a.zeros;
  return (count + 1) / 2 * 2;
}

// Attention of a packed tree of segments on the CPU, backward: fp32 and bf16, sums in fp32.
//
// A unit is a key head and some neighbouring keys of one segment: their dK and dV, of all queries that see them, are
// summed by one thread, segment after segment. What the unit adds to dQ goes to partial sums of its own, [queries that
// see it, D] fp32; at the end each query's partial sums are added in the order of the keys. So scores and weights are
// made once, not once for dQ and again for dK and dV: 10 D FLOP a query and key instead of 14. The keys of a unit are so
// many that a query has about PARTIALS partial sums at most, however long its context.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <tuple>

#include "segment_attention.h"

namespace metareward {
namespace {

enum : int64_t {
  BACKWARD_KEYS = 512,  // packed at once, with their gradients: 450 KB in bf16, within the second cache level
  WEIGHED_KEYS = 120,   // a multiple of STRIP: P and dS of so many keys are held
  PARTIALS = 8,
};

struct GradientArguments {
  SegmentArguments shared;
  HeadRows grad, out;   // [T,Hq,D]
  const float* lse;     // [T,Hq]
  float *delta, *partials;
  void *grad_query, *grad_key, *grad_value;  // contiguous
};

// Tokens [begin, end) that see keys; their partial sums begin at row `slot`. causal: each sees the keys up to itself.
struct Reader {
  int64_t begin, end, slot;
  bool causal;
};

struct BackwardUnit {
  int64_t head, begin, end, readers;
  const Reader* reader;
};

#define METAREWARD_SIMD_BODY "segment_attention_backward_body.h"
#define METAREWARD_SIMD_BF16
#include "for_each_simd.h"

// Keys of a unit: BACKWARD_KEYS, or a multiple where that would give a query more than PARTIALS partial sums.
int64_t unit_keys(const SegmentTree& tree) {
  int64_t longest = 0;
  for (int64_t s = 0; s < tree.segments(); ++s) {
    int64_t length = tree.offsets[s + 1] - tree.offsets[s];
    for (const int64_t ancestor : tree.ancestors[s]) length += tree.offsets[ancestor + 1] - tree.offsets[ancestor];
    longest = std::max(longest, length);
  }
  const int64_t blocks = (longest + BACKWARD_KEYS * PARTIALS - 1) / (BACKWARD_KEYS * PARTIALS);
  return std::max<int64_t>(1, blocks) * BACKWARD_KEYS;
}

// Pieces of keys with those who read them, in the order of the row.
struct Pieces {
  std::vector<int64_t> begins, ends;
  std::vector<std::vector<Reader>> readers;
  std::vector<std::vector<Reader>> of_segment;  // the same readers by the segment that reads
  int64_t slots = 0;
};

Pieces make_pieces(const SegmentTree& tree) {
  Pieces pieces;
  const int64_t most = unit_keys(tree);
  std::vector<std::vector<int64_t>> descendants(tree.segments());
  for (int64_t s = 0; s < tree.segments(); ++s) {
    for (const int64_t ancestor : tree.ancestors[s]) descendants[ancestor].push_back(s);
  }
  pieces.of_segment.resize(tree.segments());
  for (int64_t s = 0; s < tree.segments(); ++s) {
    const int64_t start = tree.offsets[s], stop = tree.offsets[s + 1], count = (stop - start + most - 1) / most;
    for (int64_t i = 0; i < count; ++i) {  // of nearly equal length
      const int64_t begin = start + (stop - start) * i / count, end = start + (stop - start) * (i + 1) / count;
      std::vector<Reader> readers{{begin, stop, pieces.slots, true}};
      pieces.slots += stop - begin;
      pieces.of_segment[s].push_back(readers[0]);
      for (const int64_t below : descendants[s]) {
        readers.push_back({tree.offsets[below], tree.offsets[below + 1], pieces.slots, false});
        pieces.slots += tree.offsets[below + 1] - tree.offsets[below];
        pieces.of_segment[below].push_back(readers.back());
      }
      pieces.begins.push_back(begin);
      pieces.ends.push_back(end);
      pieces.readers.push_back(std::move(readers));
    }
  }
  return pieces;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> segment_attention_backward(
    Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor offsets, Tensor parents,
    double scale) {
  GradientArguments g{};
  SegmentArguments& a = g.shared;
  a = segment_arguments(query, key, value, scale);
  g.grad = head_rows(grad, a, a.query_heads, "grad");
  g.out = head_rows(out, a, a.query_heads, "out");
  STD_TORCH_CHECK(
      lse.dim() == 2 && lse.is_contiguous() && lse.scalar_type() == ScalarType::Float && lse.size(0) == a.tokens &&
          lse.size(1) == a.query_heads,
      "segment_attention: lse must be contiguous [T,Hq] float32");
  const SegmentTree tree = segment_tree(offsets, parents, a.tokens);
  Tensor grad_query = torch::stable::new_empty(query, {a.tokens, a.query_heads, a.dim});
  Tensor grad_key = torch::stable::new_empty(key, {a.tokens, a.kv_heads, a.dim});
  Tensor grad_value = torch::stable::new_empty(value, {a.tokens, a.kv_heads, a.dim});
  if (a.tokens == 0) return {grad_query, grad_key, grad_value};

  const Pieces pieces = make_pieces(tree);
  const int64_t rows = a.tokens * a.query_heads;
  const Scratch zeros(a.padded), delta(rows), partials(pieces.slots * a.query_heads * a.padded);
  std::fill(zeros.get(), zeros.get() + a.padded, 0.0f);
  a.zeros = zeros.get();
  g.lse = static_cast<const float*>(lse.data_ptr());
  g.delta = delta.get();
  g.partials = partials.get();
  g.grad_query = grad_query.data_ptr();
  g.grad_key = grad_key.data_ptr();
  g.grad_value = grad_value.data_ptr();

  const auto products = METAREWARD_SIMD_PICK(row_products);
  torch::stable::parallel_for(0, rows, 1024, [&](int64_t begin, int64_t end) { products(g, begin, end); });

  std::vector<BackwardUnit> units;
  std::vector<int64_t> costs;
  for (int64_t i = 0; i < int64_t(pieces.begins.size()); ++i) {
    const auto& readers = pieces.readers[i];
    const int64_t begin = pieces.begins[i], end = pieces.ends[i];
    int64_t cost = -(end - begin) * (end - begin) / 2;  // the triangle that nobody sees
    for (const Reader& reader : readers) cost += (reader.end - reader.begin) * (end - begin);
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      units.push_back({head, begin, end, int64_t(readers.size()), readers.data()});
      costs.push_back(cost);
    }
  }
  const int64_t lanes = METAREWARD_SIMD_PICK(block_lanes)(), strip = generic::STRIP;
  const int64_t own = 5 * BACKWARD_KEYS * a.padded + 5 * lanes * a.padded + (2 * strip + 3 * WEIGHED_KEYS) * lanes;
  const auto gradients = METAREWARD_SIMD_PICK(key_gradients);
  run_units(costs, own, [&](int64_t unit, float* scratch) { gradients(g, units[unit], scratch); });

  const auto finish = METAREWARD_SIMD_PICK(sum_partials);
  torch::stable::parallel_for(0, a.tokens, 32, [&](int64_t begin, int64_t end) {
    const auto& starts = tree.offsets;
    int64_t segment = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (int64_t token = begin; token < end; ++token) {
      while (token >= starts[segment + 1]) ++segment;
      const auto& readers = pieces.of_segment[segment];
      finish(g, readers.data(), int64_t(readers.size()), token);
    }
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace metareward

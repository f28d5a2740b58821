// Attention of a packed tree of segments on the CPU, forward: fp32 and bf16, sums in fp32.
//
// A unit is a key head and up to 256 queries (a token and a head of the group) of one segment. A query and a key that
// it sees cost 4 D FLOP; keys and values are read once a unit, so that arithmetic is the limit.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <cmath>
#include <tuple>

#include "segment_attention.h"

namespace metareward {
namespace {

enum : int64_t { FORWARD_KEYS = 128 };  // keys between two updates of the maximum

// Blocks of queries [first_block, first_block + blocks) of a segment, whose first token is `token` and whose queries
// are `lanes` a key head; over the keys of the spans [start, stop), its own last.
struct ForwardUnit {
  int64_t head, token, lanes, first_block, blocks, spans;
  const int64_t* span;
};

#define METAREWARD_SIMD_BODY "segment_attention_body.h"
#define METAREWARD_SIMD_BF16
#include "for_each_simd.h"

}  // namespace

std::tuple<Tensor, Tensor> segment_attention(
    Tensor query, Tensor key, Tensor value, Tensor offsets, Tensor parents, double scale) {
  SegmentArguments a = segment_arguments(query, key, value, scale);
  const SegmentTree tree = segment_tree(offsets, parents, a.tokens);
  Tensor out = torch::stable::new_empty(query, {a.tokens, a.query_heads, a.dim});
  Tensor lse = torch::stable::new_empty(query, {a.tokens, a.query_heads}, ScalarType::Float);
  if (a.tokens == 0) return {out, lse};

  // A block holds unit_lanes / UNIT_BLOCKS lanes, and a unit UNIT_BLOCKS of them.
  const int64_t unit_lanes = METAREWARD_SIMD_PICK(unit_lanes)(), unit_blocks = generic::UNIT_BLOCKS;
  const int64_t block_lanes = unit_lanes / unit_blocks;
  std::vector<std::vector<int64_t>> spans(tree.segments());
  std::vector<ForwardUnit> units;
  std::vector<int64_t> costs;
  for (int64_t s = 0; s < tree.segments(); ++s) {
    const int64_t begin = tree.offsets[s], length = tree.offsets[s + 1] - begin, lanes = length * a.group;
    if (length == 0) continue;
    int64_t context = 0;
    for (const int64_t ancestor : tree.ancestors[s]) {
      spans[s].insert(spans[s].end(), {tree.offsets[ancestor], tree.offsets[ancestor + 1]});
      context += tree.offsets[ancestor + 1] - tree.offsets[ancestor];
    }
    spans[s].insert(spans[s].end(), {begin, begin + length});
    const int64_t blocks = (lanes + block_lanes - 1) / block_lanes, parts = (blocks + unit_blocks - 1) / unit_blocks;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = blocks * part / parts, last = blocks * (part + 1) / parts;
      const int64_t seen = context + std::min(length, last * block_lanes / a.group + 1);
      for (int64_t head = 0; head < a.kv_heads; ++head) {
        units.push_back({head, begin, lanes, first, last - first, int64_t(spans[s].size()) / 2, spans[s].data()});
        costs.push_back((last - first) * seen);
      }
    }
  }
  std::vector<float> zeros(a.padded, 0.0f), sums(a.tokens * a.query_heads);
  a.zeros = zeros.data();
  auto* tops = static_cast<float*>(lse.data_ptr());
  const auto attend = METAREWARD_SIMD_PICK(attend_unit);
  // Queries and their weighted values, scores, keys and values: see attend_unit_by.
  const int64_t own = 2 * unit_lanes * a.padded + FORWARD_KEYS * (block_lanes + 2 * a.padded);
  run_units(costs, own, [&](int64_t unit, float* scratch) {
    attend(a, units[unit], out.data_ptr(), tops, sums.data(), scratch);
  });
  torch::stable::parallel_for(0, a.tokens * a.query_heads, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      tops[i] = float((double(tops[i]) + std::log2(double(sums[i]))) * 0.69314718055994531);
    }
  });
  return {out, lse};
}

}  // namespace metareward

// What the forward and the backward pass of segment attention share: arguments, the tree, and who does which unit.
//
// Everything is cut into units whose borders depend on the shapes alone; one thread does a unit in one order, and no
// two units write to one place. Which thread takes which unit is left to chance: it changes no bit.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "../ops.h"

namespace metareward {
namespace {

// [T,heads,D] with a contiguous last dimension; strides of token and head in elements.
struct HeadRows {
  const void* data;
  int64_t token, head;
};

struct SegmentArguments {
  HeadRows query, key, value;
  int64_t tokens, query_heads, kv_heads, group, dim, padded;  // padded: dim up to a multiple of 32
  float scale, scale_log2e;
  bool bf16;
  const void* zeros;  // [padded] floats
};

struct SegmentTree {
  std::vector<int64_t> offsets;                  // [S+1]
  std::vector<std::vector<int64_t>> ancestors;   // of every segment, from the root down
  int64_t segments() const { return int64_t(ancestors.size()); }
};

inline HeadRows head_rows(const Tensor& x, const SegmentArguments& a, int64_t heads, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 3 && x.size(0) == a.tokens && x.size(1) == heads && x.size(2) == a.dim &&
          x.scalar_type() == (a.bf16 ? ScalarType::BFloat16 : ScalarType::Float) &&
          (a.tokens == 0 || a.dim <= 1 || x.stride(2) == 1),
      "segment_attention: ", name, " must be [", a.tokens, ",", heads, ",", a.dim,
      "] in the query's dtype with a contiguous last dimension");
  return {x.data_ptr(), x.stride(0), x.stride(1)};
}

inline SegmentArguments segment_arguments(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  const auto dtype = query.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
      "segment_attention: the compiled op takes float32 and bfloat16");
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3, "segment_attention needs query [T,Hq,D] and key [T,Hk,D]");
  SegmentArguments a{};
  a.tokens = query.size(0);
  a.query_heads = query.size(1);
  a.dim = query.size(2);
  a.kv_heads = key.size(1);
  STD_TORCH_CHECK(
      a.dim > 0 && a.kv_heads > 0 && a.query_heads > 0 && a.query_heads % a.kv_heads == 0,
      "segment_attention needs query heads that are a multiple of the key heads, got ", a.query_heads, " and ",
      a.kv_heads);
  STD_TORCH_CHECK(scale > 0, "segment_attention: scale must be positive, got ", scale);
  a.group = a.query_heads / a.kv_heads;
  a.padded = (a.dim + 31) / 32 * 32;
  a.scale = float(scale);
  a.scale_log2e = float(scale * 1.4426950408889634);
  a.bf16 = dtype == ScalarType::BFloat16;
  a.query = head_rows(query, a, a.query_heads, "query");
  a.key = head_rows(key, a, a.kv_heads, "key");
  a.value = head_rows(value, a, a.kv_heads, "value");
  return a;
}

// A wrong offset would read foreign memory, so all are checked.
inline SegmentTree segment_tree(const Tensor& offsets, const Tensor& parents, int64_t tokens) {
  for (const Tensor* x : {&offsets, &parents}) {
    STD_TORCH_CHECK(
        x->dim() == 1 && x->is_contiguous() && x->scalar_type() == ScalarType::Int,
        "segment_attention needs contiguous int32 vectors for the segments");
  }
  const int64_t count = parents.size(0);
  STD_TORCH_CHECK(offsets.size(0) == count + 1, "segment_attention needs offsets [S+1] for parents [S]");
  const auto* offset = static_cast<const int32_t*>(offsets.data_ptr());
  const auto* parent = static_cast<const int32_t*>(parents.data_ptr());
  SegmentTree tree;
  tree.offsets.assign(offset, offset + count + 1);
  tree.ancestors.resize(count);
  STD_TORCH_CHECK(
      offset[0] == 0 && offset[count] == tokens, "the segments cover the tokens ", offset[0], " to ", offset[count],
      ", the query has ", tokens);
  for (int64_t s = 0; s < count; ++s) {
    STD_TORCH_CHECK(offset[s] <= offset[s + 1], "segment ", s, " ends before it starts");
    STD_TORCH_CHECK(parent[s] >= -1 && parent[s] < s, "parent ", parent[s], " of segment ", s, " is not before it");
    if (parent[s] < 0) continue;
    tree.ancestors[s] = tree.ancestors[parent[s]];
    tree.ancestors[s].push_back(parent[s]);
  }
  return tree;
}

// Floats aligned for vectors, not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 127) / 64 * 64)), &std::free) {
    if (!data_) throw std::bad_alloc();
  }
  float* get() const { return data_.get(); }

 private:
  std::unique_ptr<float, decltype(&std::free)> data_;
};

// Calls run(unit, scratch) for every unit, the costly ones first; every thread has `own` floats of scratch.
template <class Run>
void run_units(const std::vector<int64_t>& costs, int64_t own, const Run& run) {
  const int64_t units = int64_t(costs.size());
  const int64_t parts = std::min<int64_t>(torch::stable::get_num_threads(), units);
  std::vector<int64_t> order(units);
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return costs[x] > costs[y]; });
  own = (own + 15) / 16 * 16;
  const Scratch scratch(parts * own);  // one block for all threads: nothing may throw inside parallel_for
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t) {
    for (int64_t i = next.fetch_add(1); i < units; i = next.fetch_add(1)) {
      run(order[i], scratch.get() + begin * own);
    }
  });
}

}  // namespace
}  // namespace metareward

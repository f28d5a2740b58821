// Decode attention over a paged KV cache on the CPU: fp32 and bf16 caches, fp32 arithmetic.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../ops.h"

namespace metareward {
namespace {

struct AttentionArguments {
  const void *query, *key_pages, *value_pages;
  void* out;
  const int32_t *page_table, *lengths;
  int64_t query_heads, kv_heads, dim, page, table_width;
  int64_t key_strides[3], value_strides[3];  // of page, slot and head, in elements
  int64_t scratch_sum_offset;                // in floats, a multiple of 16
  float scale_log2e;                         // powers of two are cheaper than of e
  bool bf16;
};

#define METAREWARD_SIMD_BODY "paged_attention_body.h"
#include "for_each_simd.h"

// A wrong page would read another sequence's cache or foreign memory, so every index used is checked: S*M compares.
void check_indices(const AttentionArguments& a, int64_t sequences, int64_t pages) {
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t length = a.lengths[s];
    STD_TORCH_CHECK(
        length >= 0 && length <= a.table_width * a.page, "length ", length, " of sequence ", s,
        " is outside the page table's [0, ", a.table_width * a.page, "]");
    for (int64_t m = 0; m * a.page < length; ++m) {
      const int64_t page = a.page_table[s * a.table_width + m];
      STD_TORCH_CHECK(
          page >= 0 && page < pages, "the page table of sequence ", s, " names page ", page, " of [0, ", pages - 1, "]");
    }
  }
}

// Cuts the units (sequence, key head) into runs of about equal numbers of tokens; returns the `parts + 1` borders.
std::vector<int64_t> balanced_borders(const AttentionArguments& a, int64_t sequences, int64_t parts) {
  constexpr int64_t overhead = 16;  // tokens that a unit's own start and end cost
  int64_t total = 0;
  for (int64_t s = 0; s < sequences; ++s) total += (a.lengths[s] + overhead) * a.kv_heads;
  std::vector<int64_t> borders{0};
  int64_t done = 0;
  for (int64_t unit = 0; unit < sequences * a.kv_heads; ++unit) {
    done += a.lengths[unit / a.kv_heads] + overhead;
    while (int64_t(borders.size()) < parts && done * parts >= total * int64_t(borders.size())) {
      borders.push_back(unit + 1);
    }
  }
  borders.resize(parts, sequences * a.kv_heads);
  borders.push_back(sequences * a.kv_heads);
  return borders;
}

}  // namespace

Tensor paged_attention_decode(
    Tensor query, Tensor key_pages, Tensor value_pages, Tensor page_table, Tensor lengths, double scale) {
  const auto dtype = query.scalar_type();
  STD_TORCH_CHECK(
      (dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && key_pages.scalar_type() == dtype &&
          value_pages.scalar_type() == dtype && page_table.scalar_type() == ScalarType::Int &&
          lengths.scalar_type() == ScalarType::Int,
      "paged_attention_decode_cpp needs query and pages all float32 or all bfloat16, page_table and lengths int32");
  STD_TORCH_CHECK(
      query.dim() == 3 && key_pages.dim() == 4 && value_pages.dim() == 4 && page_table.dim() == 2 &&
          lengths.dim() == 1 && query.is_contiguous() && page_table.is_contiguous() && lengths.is_contiguous(),
      "paged_attention_decode_cpp needs contiguous query [S,Hq,D], page_table [S,M], lengths [S] and 4-D pages");
  const int64_t sequences = query.size(0);
  AttentionArguments a{};
  a.query_heads = query.size(1);
  a.dim = query.size(2);
  a.page = key_pages.size(1);
  a.kv_heads = key_pages.size(2);
  a.table_width = page_table.size(1);
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(key_pages.size(i) == value_pages.size(i), "key_pages and value_pages differ in shape");
  }
  STD_TORCH_CHECK(
      key_pages.size(3) == a.dim && a.kv_heads > 0 && a.query_heads % a.kv_heads == 0 &&
          page_table.size(0) == sequences && lengths.size(0) == sequences,
      "paged_attention_decode_cpp: shapes do not fit together");
  STD_TORCH_CHECK(
      a.dim <= 1 || (key_pages.stride(3) == 1 && value_pages.stride(3) == 1),
      "the last dimension of the pages must be contiguous");

  Tensor out = torch::stable::empty_like(query);
  if (query.numel() == 0) return out;
  a.query = query.data_ptr();
  a.key_pages = key_pages.data_ptr();
  a.value_pages = value_pages.data_ptr();
  a.out = out.data_ptr();
  a.page_table = static_cast<const int32_t*>(page_table.data_ptr());
  a.lengths = static_cast<const int32_t*>(lengths.data_ptr());
  for (int i = 0; i < 3; ++i) {
    a.key_strides[i] = key_pages.stride(i);
    a.value_strides[i] = value_pages.stride(i);
  }
  a.scale_log2e = float(scale * 1.4426950408889634);
  a.bf16 = dtype == ScalarType::BFloat16;
  check_indices(a, sequences, key_pages.size(0));

  // Queries and accumulators [Hq, D rounded up], maxima [Hq], then sums [Hq, 16].
  const int64_t padded = (a.dim + 15) / 16 * 16;
  a.scratch_sum_offset = (2 * a.query_heads * padded + a.query_heads + 15) / 16 * 16;
  const int64_t scratch_floats = a.scratch_sum_offset + 16 * a.query_heads;

  // Waking a thread costs more than some ten thousand cached elements.
  int64_t elements = 0;
  for (int64_t s = 0; s < sequences; ++s) elements += 2 * a.lengths[s] * a.kv_heads * a.dim;
  const int64_t parts = std::min<int64_t>(
      {int64_t(torch::stable::get_num_threads()), sequences * a.kv_heads, 1 + elements / 32768});
  const auto borders = balanced_borders(a, sequences, parts);
  const auto attend = METAREWARD_SIMD_PICK(attend_sequence);
  // One block for all threads: nothing may throw inside parallel_for.
  const std::unique_ptr<float, decltype(&std::free)> scratch(
      static_cast<float*>(std::aligned_alloc(64, parts * scratch_floats * sizeof(float))), &std::free);
  if (!scratch) throw std::bad_alloc();
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    float* own = scratch.get() + begin * scratch_floats;
    for (int64_t unit = borders[begin]; unit < borders[end];) {
      const int64_t s = unit / a.kv_heads;
      const int64_t next = std::min((s + 1) * a.kv_heads, borders[end]);  // a sequence's heads go together
      attend(a, s, unit - s * a.kv_heads, next - s * a.kv_heads, own);
      unit = next;
    }
  });
  return out;
}

}  // namespace metareward

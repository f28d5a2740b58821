// Attention over a paged KV cache on the CPU, segment by segment: fp32 and bf16 caches, sums in fp32.
//
// Two passes. First every segment that several rows read: a block of queries over the segment's pages, which leaves
// sums, maxima and weighted values in `partials`. Then every row: the segments that it alone reads, merged with
// its partials in the order of its entries. A segment is cut along its tokens at multiples of CHUNK only, and a unit
// of work is done by one thread in one order: the number of threads changes no bit.
//
// Limits. A (row, query head, token) that is seen costs 4 D FLOP, a token read costs 4 Hk D bytes in bf16. A decode
// step of 264 rows with 9 query and 3 key heads of 64 dimensions, where 88 rows share 320 tokens, 11 share 96 and each
// has 64 of its own: 0.29 GFLOP and 15.5 MB a layer, 13 MB of them the rows' own tokens. At 229 GFLOP/s (pairs of bf16
// on one Zen 4 core) and 24 GB/s that is 1.3 and 0.65 ms; unshared, the reading alone would be 97 MB or 4.1 ms.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "paged_attention.h"

namespace metareward {
namespace {

enum : int64_t {
  CHUNK = 1024,         // tokens of a segment that are attended to in one go
  STACKED_TOKENS = 64,  // tokens between two updates of the maximum: scores and values of a block stay in cache
  ROW_TOKENS = 32,      // the same where one row reads
  FEW = 4,              // queries that are taken row by row, because a vector of them would be mostly empty
};

struct AttentionArguments {
  const void *query, *key_pages, *value_pages, *zeros;
  void* out;
  const int32_t *page_ids, *page_starts, *lengths, *rows, *row_starts, *limits;
  int64_t segments, query_heads, kv_heads, group, dim, padded, page, chunk;
  int64_t key_strides[3], value_strides[3];  // of page, slot and head, in elements
  float scale_log2e;                         // of |scale|; powers of two are cheaper than of e
  bool negative, bf16;                       // negative: the sign of scale, which goes into the queries
  // The plan.
  const int32_t *segment_of, *row_entries, *row_entry_starts;  // [E], [E] entries by row, [T+1]
  const int64_t* slots;                                        // [E] first partial of an entry, or -1: none needed
  float *partials, *statistics;                                // [slots, Hq, padded], [slots, Hq, (maximum, sum)]
};

// Work of the first pass: one key head, tokens [token_begin, token_end) of a segment, and its queries (entry, head of
// the group), counted from `entry` on: `stacked` of them from `first` on in the lanes of vectors, the next `few` row by
// row, while their keys and values are in the cache.
struct AttentionUnit {
  int64_t segment, entry, head, token_begin, token_end, first, stacked, few;
};

#define METAREWARD_SIMD_BODY "paged_attention_body.h"
#define METAREWARD_SIMD_BF16
#include "for_each_simd.h"

// A wrong index would read another sequence's cache or foreign memory, so all that are used are checked.
void check_indices(const AttentionArguments& a, int64_t pages, int64_t named, int64_t entries, int64_t query_rows) {
  int64_t seen = 0;
  for (int64_t g = 0; g < a.segments; ++g) {
    const int64_t length = a.lengths[g], start = a.page_starts[g];
    const int64_t count = (std::max<int64_t>(length, 0) + a.page - 1) / a.page;
    STD_TORCH_CHECK(
        length >= 0 && start >= 0 && start + count <= named, "segment ", g, " of length ", length,
        " names page_ids from ", start, " on, of which there are ", named);
    for (int64_t m = start; m < start + count; ++m) {
      STD_TORCH_CHECK(
          a.page_ids[m] >= 0 && a.page_ids[m] < pages, "segment ", g, " names page ", a.page_ids[m], " of [0, ",
          pages - 1, "]");
    }
    const int64_t begin = a.row_starts[g], end = a.row_starts[g + 1];
    STD_TORCH_CHECK(
        begin == seen && end >= begin && end <= entries, "row_starts must rise from 0 to ", entries, ", segment ", g,
        " has [", begin, ", ", end, ")");
    seen = end;
    for (int64_t e = begin; e < end; ++e) {
      STD_TORCH_CHECK(
          a.rows[e] >= 0 && a.rows[e] < query_rows, "entry ", e, " names row ", a.rows[e], " of [0, ",
          query_rows - 1, "]");
      STD_TORCH_CHECK(
          a.limits[e] >= 0 && a.limits[e] <= length, "limit ", a.limits[e], " of entry ", e, " is outside [0, ",
          length, "]");
    }
  }
  STD_TORCH_CHECK(seen == entries, "row_starts must rise from 0 to ", entries, ", it ends at ", seen);
}

struct Plan {
  std::vector<AttentionUnit> units;
  std::vector<int64_t> unit_costs, row_costs;  // in about the time of one token for 16 stacked queries
  std::vector<int32_t> segment_of, row_entries, row_entry_starts;
  std::vector<int64_t> slots;
  int64_t slot_count = 0;
};

// `block`: queries taken at once.
Plan make_plan(const AttentionArguments& a, int64_t entries, int64_t query_rows, int64_t block) {
  Plan plan;
  plan.segment_of.resize(entries);
  plan.slots.assign(entries, -1);
  plan.row_costs.assign(query_rows, 8);  // its own start and end
  plan.row_entry_starts.assign(query_rows + 1, 0);
  for (int64_t g = 0; g < a.segments; ++g) {
    const int64_t begin = a.row_starts[g], end = a.row_starts[g + 1];
    const bool shared = end - begin > 1;
    int64_t most = 0;
    for (int64_t e = begin; e < end; ++e) {
      const int64_t limit = a.limits[e];
      plan.segment_of[e] = int32_t(g);
      plan.row_entry_starts[a.rows[e] + 1] += 1;
      if (shared || limit > CHUNK) {
        const int64_t chunks = (limit + CHUNK - 1) / CHUNK;
        plan.slots[e] = plan.slot_count;
        plan.slot_count += chunks;
        plan.row_costs[a.rows[e]] += 2 * chunks;
      } else {
        plan.row_costs[a.rows[e]] += limit / 2 + 4;
      }
      most = std::max(most, limit);
    }
    if (end == begin || (!shared && most <= CHUNK)) continue;
    const int64_t queries = (end - begin) * a.group, few = !shared ? queries : queries % 16 <= FEW ? queries % 16 : 0;
    const int64_t stacked = queries - few, vectors = (stacked + 15) / 16;
    const int64_t blocks = std::max<int64_t>((stacked + block - 1) / block, 1);
    for (int64_t token = 0; token < most; token += CHUNK) {
      const int64_t token_end = std::min<int64_t>(token + CHUNK, a.lengths[g]);
      for (int64_t head = 0; head < a.kv_heads; ++head) {
        for (int64_t i = 0; i < blocks; ++i) {  // of about equal numbers of vectors
          const int64_t first = vectors * i / blocks * 16, last = std::min(vectors * (i + 1) / blocks * 16, stacked);
          const int64_t rest = i + 1 == blocks ? few : 0;
          int64_t seen = 0;
          for (int64_t e = begin + first / a.group; e <= begin + (last + rest - 1) / a.group; ++e) {
            seen = std::max<int64_t>(seen, std::min<int64_t>(a.limits[e], token_end) - token);
          }
          if (seen <= 0) continue;
          plan.units.push_back({g, begin, head, token, token_end, first, last - first, rest});
          plan.unit_costs.push_back((seen + 16) * ((last - first + 15) / 16) + (seen / 4 + 4) * (rest + 2) / 3);
        }
      }
    }
  }
  for (int64_t r = 0; r < query_rows; ++r) plan.row_entry_starts[r + 1] += plan.row_entry_starts[r];
  std::vector<int32_t> place(plan.row_entry_starts.begin(), plan.row_entry_starts.end() - 1);
  plan.row_entries.resize(entries);
  for (int64_t e = 0; e < entries; ++e) plan.row_entries[place[a.rows[e]]++] = int32_t(e);
  return plan;
}

// Waking a thread costs more than some thousand tokens of 16 queries.
int64_t parts_for(const std::vector<int64_t>& costs, int64_t repeat) {
  int64_t total = 0;
  for (const int64_t cost : costs) total += cost * repeat;
  return std::min<int64_t>(
      {int64_t(torch::stable::get_num_threads()), int64_t(costs.size()) * repeat, 1 + total / 1024});
}

}  // namespace

struct AttentionWork {
  AttentionArguments arguments{};
  Plan plan;
  std::vector<Tensor> indices;  // what the arguments point to
  std::vector<int64_t> shape;   // of the queries
  ScalarType dtype;
  int64_t first_parts = 0, second_parts = 0, own = 0;  // threads of each pass, and floats that each of them needs
  std::unique_ptr<float, decltype(&std::free)> scratch{nullptr, &std::free};
};

std::shared_ptr<AttentionWork> plan_attention(
    Tensor query, Tensor key_pages, Tensor value_pages, Tensor page_ids, Tensor page_starts, Tensor lengths,
    Tensor rows, Tensor row_starts, Tensor limits, double scale) {
  const auto dtype = query.scalar_type();
  STD_TORCH_CHECK(
      (dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && key_pages.scalar_type() == dtype &&
          value_pages.scalar_type() == dtype,
      "paged_attention_cpp needs query and pages all float32 or all bfloat16");
  for (const Tensor* indices : {&page_ids, &page_starts, &lengths, &rows, &row_starts, &limits}) {
    STD_TORCH_CHECK(
        indices->scalar_type() == ScalarType::Int && indices->dim() == 1 && indices->is_contiguous(),
        "paged_attention_cpp needs contiguous int32 vectors for the segments");
  }
  STD_TORCH_CHECK(
      query.dim() == 3 && key_pages.dim() == 4 && value_pages.dim() == 4 && query.is_contiguous(),
      "paged_attention_cpp needs contiguous query [T,Hq,D] and 4-D pages");
  auto work = std::make_shared<AttentionWork>();
  AttentionArguments& a = work->arguments;
  a.segments = lengths.size(0);
  a.query_heads = query.size(1);
  a.dim = query.size(2);
  a.page = key_pages.size(1);
  a.kv_heads = key_pages.size(2);
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(key_pages.size(i) == value_pages.size(i), "key_pages and value_pages differ in shape");
  }
  STD_TORCH_CHECK(
      key_pages.size(3) == a.dim && a.page > 0 && a.kv_heads > 0 && a.query_heads % a.kv_heads == 0 &&
          page_starts.size(0) == a.segments && row_starts.size(0) == a.segments + 1 && limits.size(0) == rows.size(0),
      "paged_attention_cpp: shapes do not fit together");
  STD_TORCH_CHECK(
      a.dim <= 1 || (key_pages.stride(3) == 1 && value_pages.stride(3) == 1),
      "the last dimension of the pages must be contiguous");
  const int64_t query_rows = query.size(0), entries = rows.size(0);
  work->dtype = dtype;
  work->shape = {query_rows, a.query_heads, a.dim};
  if (query.numel() == 0) return work;
  a.group = a.query_heads / a.kv_heads;
  a.padded = (a.dim + 31) / 32 * 32;
  a.chunk = CHUNK;
  work->indices = {page_ids, page_starts, lengths, rows, row_starts, limits};
  a.page_ids = static_cast<const int32_t*>(page_ids.data_ptr());
  a.page_starts = static_cast<const int32_t*>(page_starts.data_ptr());
  a.lengths = static_cast<const int32_t*>(lengths.data_ptr());
  a.rows = static_cast<const int32_t*>(rows.data_ptr());
  a.row_starts = static_cast<const int32_t*>(row_starts.data_ptr());
  a.limits = static_cast<const int32_t*>(limits.data_ptr());
  for (int i = 0; i < 3; ++i) {
    a.key_strides[i] = key_pages.stride(i);
    a.value_strides[i] = value_pages.stride(i);
  }
  // Masked scores are -inf, and -inf * 0 would be a NaN: a scale of 0 becomes one too small to be seen.
  a.scale_log2e = std::max(float(std::fabs(scale) * 1.4426950408889634), 1e-30f);
  a.negative = scale < 0;
  a.bf16 = dtype == ScalarType::BFloat16;
  check_indices(a, key_pages.size(0), page_ids.size(0), entries, query_rows);

  Plan& plan = work->plan;
  plan = make_plan(a, entries, query_rows, METAREWARD_SIMD_PICK(stacked_queries)());
  a.segment_of = plan.segment_of.data();
  a.row_entries = plan.row_entries.data();
  a.row_entry_starts = plan.row_entry_starts.data();
  a.slots = plan.slots.data();
  work->first_parts = parts_for(plan.unit_costs, 1);
  work->second_parts = parts_for(plan.row_costs, a.kv_heads);

  // A thread's own part, see attend_stacked_by (48 queries, their sums and scores, keys and values of a block) and
  // RowState (sums, queries, weighted values and maxima of a row); then a row of zeros, and the partials.
  const int64_t stacked_floats = 48 * (2 * a.padded + STACKED_TOKENS) + 2 * STACKED_TOKENS * a.padded;
  const int64_t row_floats = (a.query_heads * (2 * a.padded + 17) + 15) / 16 * 16;
  work->own = std::max(stacked_floats, row_floats);
  const int64_t parts = std::max(work->first_parts, work->second_parts);
  const int64_t statistics = (2 * plan.slot_count * a.query_heads + 15) / 16 * 16;
  const int64_t floats = parts * work->own + a.padded + statistics + plan.slot_count * a.query_heads * a.padded;
  // One block for all threads: nothing may throw inside parallel_for.
  work->scratch.reset(static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float))));
  if (!work->scratch) throw std::bad_alloc();
  float* zeros = work->scratch.get() + parts * work->own;
  std::fill(zeros, zeros + a.padded, 0.0f);
  a.zeros = zeros;
  a.statistics = zeros + a.padded;
  a.partials = a.statistics + statistics;
  return work;
}

Tensor attend(AttentionWork& work, Tensor query, Tensor key_pages, Tensor value_pages) {
  AttentionArguments& a = work.arguments;
  bool same = query.dim() == 3 && query.is_contiguous() && query.scalar_type() == work.dtype;
  for (int i = 0; same && i < 3; ++i) {
    same = query.size(i) == work.shape[i] && key_pages.stride(i) == a.key_strides[i] &&
           value_pages.stride(i) == a.value_strides[i];
  }
  Tensor out = torch::stable::empty_like(query);
  if (query.numel() == 0) return out;
  STD_TORCH_CHECK(same, "attention was planned for a query or pages of another shape, stride or dtype");
  a.query = query.data_ptr();
  a.key_pages = key_pages.data_ptr();
  a.value_pages = value_pages.data_ptr();
  a.out = out.data_ptr();
  const auto stacked = METAREWARD_SIMD_PICK(attend_stacked);
  const auto few = METAREWARD_SIMD_PICK(attend_few);
  const auto finish = METAREWARD_SIMD_PICK(attend_rows);
  float* scratch = work.scratch.get();
  const int64_t own = work.own, first_parts = work.first_parts, second_parts = work.second_parts;
  const std::vector<AttentionUnit>& units = work.plan.units;

  // Threads draw their next unit from one counter: costs are estimates, and cores of a shared machine are never
  // equally fast.
  std::atomic<int64_t> next_unit{0}, next_row{0};
  if (!units.empty()) {
    torch::stable::parallel_for(0, first_parts, 1, [&](int64_t begin, int64_t) {
      const int64_t count = int64_t(units.size());
      for (int64_t i = next_unit.fetch_add(1), next; i < count; i = next) {
        next = next_unit.fetch_add(1);  // now, so that its keys and values can be fetched meanwhile
        const AttentionUnit* following = next < count ? &units[next] : nullptr;
        if (units[i].stacked > 0) stacked(a, units[i], following, scratch + begin * own);
        if (units[i].few > 0) few(a, units[i], scratch + begin * own);
      }
    });
  }
  const int64_t row_units = work.shape[0] * a.kv_heads;
  const int64_t run = std::max<int64_t>(1, row_units / (8 * second_parts));
  torch::stable::parallel_for(0, second_parts, 1, [&](int64_t begin, int64_t) {
    for (int64_t i = next_row.fetch_add(run); i < row_units; i = next_row.fetch_add(run)) {
      finish(a, i, std::min(i + run, row_units), scratch + begin * own);
    }
  });
  return out;
}

Tensor paged_attention(
    Tensor query, Tensor key_pages, Tensor value_pages, Tensor page_ids, Tensor page_starts, Tensor lengths,
    Tensor rows, Tensor row_starts, Tensor limits, double scale) {
  const auto work = plan_attention(
      query, key_pages, value_pages, page_ids, page_starts, lengths, rows, row_starts, limits, scale);
  return attend(*work, query, key_pages, value_pages);
}

}  // namespace metareward

// The candidates of a draw: the tokens that top-k, top-p and min-p leave, found without sorting the vocabulary. A cheap bound
// on the logit throws most tokens out, and a selection on 64-bit keys (logit, then lower id) finds the cut among those
// that remain. Part of sample.cpp.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>

namespace metareward {
namespace {

#define METAREWARD_SIMD_BODY "sample_body.h"
#include "for_each_simd.h"

struct Passes {
  decltype(&generic::row_top) row_top = METAREWARD_SIMD_PICK(row_top);
  decltype(&generic::sum_exp) sum_exp = METAREWARD_SIMD_PICK(sum_exp);
  decltype(&generic::sum_weights) sum_weights = METAREWARD_SIMD_PICK(sum_weights);
  decltype(&generic::weights) weights = METAREWARD_SIMD_PICK(weights);
  decltype(&generic::collect) collect = METAREWARD_SIMD_PICK(collect);
  decltype(&generic::strided_maxima) strided_maxima = METAREWARD_SIMD_PICK(strided_maxima);
};

constexpr int64_t kBlock = 512;    // weights summed at a time
constexpr int64_t kBuckets = 512;  // of logits, in the search for the top-p cut

struct Row {
  const void* z;
  bool bf16;
  int64_t n;
  float top;  // the largest logit

  float logit(int64_t i) const {
    return bf16 ? generic::load1(static_cast<const uint16_t*>(z) + i) : static_cast<const float*>(z)[i];
  }
};

// A thread's working memory. What is not used is never touched, so it costs nothing.
struct Workspace {
  explicit Workspace(int64_t vocabulary)
      : block_sums(new double[vocabulary / kBlock + 1]),
        ids(new int32_t[vocabulary + 16]),
        logits(new float[vocabulary + 16]),
        weights(new float[std::max(vocabulary, kBlock) + 16]),
        keys(new uint64_t[vocabulary]),
        maxima(new float[vocabulary]) {}
  std::unique_ptr<double[]> block_sums;  // of the weights of the whole row
  std::unique_ptr<int32_t[]> ids;        // of the candidates, ascending
  std::unique_ptr<float[]> logits;       // of the candidates
  std::unique_ptr<float[]> weights;      // of the candidates, or of one block of the row
  std::unique_ptr<uint64_t[]> keys;      // of the candidates, to be permuted
  std::unique_ptr<float[]> maxima;
  double bucket_mass[kBuckets];
};

// Larger key = taken first by top-k and top-p: the larger logit, of equal ones (-0 equals 0) the lower id. Ranks among
// the candidates order as their ids do, so they serve as well.
uint64_t key_of(float logit, int32_t rank) {
  const float value = logit + 0.0f;  // -0 + 0 = 0
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
  return (uint64_t{bits} << 32) | uint32_t(~uint32_t(rank));
}

int32_t rank_of(uint64_t key) { return int32_t(~uint32_t(key)); }

// A logit that at least k logits reach: the k-th largest maximum of disjoint sets.
float top_k_bound(const Passes& passes, const Row& row, int64_t k, Workspace& work) {
  const int64_t sets = std::min(row.n, (std::max<int64_t>(4 * std::min(k, row.n), 256) + 15) / 16 * 16);
  float* maxima = work.maxima.get();
  passes.strided_maxima(row.z, row.bf16, row.n, sets, maxima);
  std::nth_element(maxima, maxima + (k - 1), maxima + sets, std::greater<float>());
  return maxima[k - 1];
}

// The smallest key of the top-p set among keys[0, count): of the largest keys, the fewest whose mass reaches `target`.
// A weighted quickselect: linear on average. `mass_of(key)` is the weight of a key.
template <class Mass>
uint64_t select_by_mass(uint64_t* keys, int64_t count, double target, const Mass& mass_of) {
  double above = 0.0;  // mass of the keys larger than everything in [begin, end)
  int64_t begin = 0, end = count;
  while (end - begin > 32) {
    uint64_t* const first = keys + begin;
    uint64_t* const last = keys + end;
    uint64_t a = first[0], b = first[(last - first) / 2], c = last[-1];
    const uint64_t pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    uint64_t* const split = std::partition(first, last, [&](uint64_t key) { return key > pivot; });
    double upper = 0.0;
    for (uint64_t* key = first; key < split; ++key) upper += mass_of(*key);
    if (above + upper >= target) {
      end = split - keys;  // not empty: its mass is positive
      continue;
    }
    // Move the pivot to the front, so that every turn makes the range smaller.
    std::iter_swap(split, std::find(split, last, pivot));
    above += upper + mass_of(pivot);
    if (above >= target) return pivot;
    begin = split - keys + 1;
  }
  std::sort(keys + begin, keys + end, std::greater<uint64_t>());
  for (int64_t i = begin; i < end; ++i) {
    above += mass_of(keys[i]);
    if (above >= target) return keys[i];
  }
  return keys[end - 1];  // rounding kept the mass below the target: everything stays
}

// The smallest key of the top-p set among the candidates, whose logits span [low, top]. Their mass by bucket of the
// logit says in which bucket the cut lies; only its tokens are searched.
uint64_t top_p_cut(int64_t count, float low, float top, double target, Workspace& work) {
  const float* logits = work.logits.get();
  const double scale = double(kBuckets) / (double(top) - double(low) + std::numeric_limits<float>::min());
  const auto bucket_of = [&](int64_t i) {
    return std::min(int64_t((double(top) - double(logits[i])) * scale), kBuckets - 1);
  };
  std::fill_n(work.bucket_mass, kBuckets, 0.0);
  for (int64_t i = 0; i < count; ++i) work.bucket_mass[bucket_of(i)] += double(work.weights[i]);
  int64_t bucket = 0;
  double above = 0.0;
  while (bucket < kBuckets && above + work.bucket_mass[bucket] < target) above += work.bucket_mass[bucket++];
  if (bucket == kBuckets) return 0;  // rounding kept the mass below the target: everything stays
  int64_t inside = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (bucket_of(i) == bucket) work.keys[inside++] = key_of(logits[i], int32_t(i));
  }
  return select_by_mass(
      work.keys.get(), inside, target - above, [&](uint64_t key) { return double(work.weights[rank_of(key)]); });
}

// Keeps the candidates for which `stays(rank)`, in order; returns their number.
template <class Stays>
int64_t keep(int64_t count, const Stays& stays, Workspace& work) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!stays(i)) continue;
    work.ids[kept] = work.ids[i];
    work.logits[kept] = work.logits[i];
    work.weights[kept] = work.weights[i];
    ++kept;
  }
  return kept;
}

// The tokens that top-k leaves become the candidates; returns their number. Those of logit -inf, which weigh nothing,
// are not among them.
int64_t collect_top_k(const Passes& passes, const Row& row, int64_t k, Workspace& work) {
  const float bound = std::max(top_k_bound(passes, row, k, work), std::numeric_limits<float>::lowest());
  const int64_t count = passes.collect(row.z, row.bf16, row.n, bound, work.ids.get(), work.logits.get());
  if (count <= k) return count;
  uint64_t* keys = work.keys.get();
  for (int64_t i = 0; i < count; ++i) keys[i] = key_of(work.logits[i], int32_t(i));
  std::nth_element(keys, keys + (k - 1), keys + count, std::greater<uint64_t>());
  const uint64_t cut = keys[k - 1];
  return keep(count, [&](int64_t i) { return key_of(work.logits[i], int32_t(i)) >= cut; }, work);
}

}  // namespace
}  // namespace metareward

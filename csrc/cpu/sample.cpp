// Sampling from logits: temperature, top-k, top-p, min-p, inverse CDF in vocabulary order.
//
// Nothing is sorted over the vocabulary. One pass sums the weights, a cheap bound on the logit throws most tokens out
// in another, and a selection on 64-bit keys (logit, then lower id) finds the cut among the candidates that remain.
// Weights are fp32, their sums fp64: a sum in fp32 would lose the tail beside a heavy token.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "../ops.h"

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

struct Settings {
  double temperature;
  int64_t top_k;
  double top_p, min_p;
};

struct Row {
  const void* z;
  bool bf16;
  int64_t n;
  float top;  // the largest logit

  float logit(int64_t i) const {
    return bf16 ? generic::load1(static_cast<const uint16_t*>(z) + i) : static_cast<const float*>(z)[i];
  }
};

struct Draw {
  int64_t token;
  double kept_mass;  // sum of e^((z - top) / temperature) over the tokens that might have been drawn
  double raw_mass;   // sum of e^(z - top) over all
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

// First token whose cumulative weight exceeds u * total; the last one of positive weight if rounding lets none. The
// sums of the blocks are there already; the weights are computed again where they are needed.
int64_t draw_from_row(const Passes& passes, const Row& row, double u, double total, double factor, Workspace& work) {
  const double threshold = u * total;
  const int64_t blocks = (row.n + kBlock - 1) / kBlock;
  const auto weigh = [&](int64_t block) {
    const int64_t size = std::min(kBlock, row.n - block * kBlock);
    passes.weights(row.z, row.bf16, block * kBlock, size, row.top, factor, work.weights.get());
    return size;
  };
  double cumulative = 0.0;
  int64_t block = 0, last = -1;
  while (block + 1 < blocks && cumulative + work.block_sums[block] <= threshold) cumulative += work.block_sums[block++];
  for (; block < blocks; ++block) {
    const int64_t size = weigh(block);
    for (int64_t i = 0; i < size; ++i) {
      cumulative += double(work.weights[i]);
      if (cumulative > threshold) return block * kBlock + i;
      if (work.weights[i] > 0.0f) last = block * kBlock + i;
    }
  }
  while (last < 0) {  // ends: the largest logit weighs 1
    const int64_t size = weigh(--block);
    for (int64_t i = 0; i < size; ++i) {
      if (work.weights[i] > 0.0f) last = block * kBlock + i;
    }
  }
  return last;
}

// The same among the candidates.
Draw draw_from_candidates(int64_t count, double u, double raw_mass, const Workspace& work) {
  double total = 0.0, cumulative = 0.0;
  for (int64_t i = 0; i < count; ++i) total += double(work.weights[i]);
  const double threshold = u * total;
  int64_t last = 0;
  for (int64_t i = 0; i < count; ++i) {
    cumulative += double(work.weights[i]);
    if (cumulative > threshold) return {work.ids[i], total, raw_mass};
    if (work.weights[i] > 0.0f) last = i;
  }
  return {work.ids[last], total, raw_mass};
}

float below(double x) {
  const double lowest = std::numeric_limits<float>::lowest();
  return x <= lowest ? float(lowest) : std::nextafter(float(x), float(lowest));
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

Draw sample_row(const Passes& passes, const Row& row, double u, const Settings& settings, Workspace& work) {
  const double temperature = settings.temperature, top = row.top;
  if (temperature == 0.0) {
    int64_t token = 0;
    while (row.logit(token) != row.top) ++token;
    return {token, 1.0, passes.sum_exp(row.z, row.bf16, row.n, row.top)};
  }
  const double factor = 1.4426950408889634 / temperature;
  // A logit below this one is too improbable for min-p.
  const double min_p_bound =
      settings.min_p > 0.0 ? top + temperature * std::log(settings.min_p) : -std::numeric_limits<double>::infinity();
  double total, raw_mass;
  float low;  // no candidate lies below it
  int64_t count;
  if (settings.top_k > 0 && settings.top_k < row.n) {
    raw_mass = passes.sum_exp(row.z, row.bf16, row.n, row.top);
    count = collect_top_k(passes, row, settings.top_k, work);
    passes.weights(work.logits.get(), false, 0, count, row.top, factor, work.weights.get());
    total = 0.0;
    low = row.top;
    for (int64_t i = 0; i < count; ++i) {
      total += double(work.weights[i]);
      low = std::min(low, work.logits[i]);
    }
  } else {
    double* raw = temperature == 1.0 ? nullptr : &raw_mass;  // at temperature 1 the weights are the exponentials
    total = passes.sum_weights(row.z, row.bf16, row.n, row.top, factor, kBlock, work.block_sums.get(), raw);
    if (raw == nullptr) raw_mass = total;
    if (settings.top_p >= 1.0 && settings.min_p == 0.0) {
      return {draw_from_row(passes, row, u, total, factor, work), total, raw_mass};
    }
    // Tokens lighter than (1 - p) * total / n weigh less than (1 - p) * total together: the top-p set does without.
    // The bound is put on the logit, a little lower than needed, so that equal logits stay together.
    double bound = min_p_bound;
    if (settings.top_p < 1.0) {
      const double light = (1.0 - settings.top_p) * total / double(row.n);
      bound = std::max(bound, std::min(top, top + temperature * std::log(light)) - 1e-3 * (1.0 + temperature));
    }
    low = below(bound);
    count = passes.collect(row.z, row.bf16, row.n, low, work.ids.get(), work.logits.get());
    passes.weights(work.logits.get(), false, 0, count, row.top, factor, work.weights.get());
  }
  if (settings.top_p < 1.0) {
    const uint64_t cut = top_p_cut(count, low, row.top, settings.top_p * total, work);
    count = keep(count, [&](int64_t i) { return key_of(work.logits[i], int32_t(i)) >= cut; }, work);
  }
  if (settings.min_p > 0.0) {
    count = keep(count, [&](int64_t i) { return double(work.logits[i]) >= min_p_bound; }, work);
  }
  return draw_from_candidates(count, u, raw_mass, work);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> sample_tokens(
    Tensor logits, Tensor uniforms, double temperature, int64_t top_k, double top_p, double min_p) {
  const auto dtype = logits.scalar_type();
  STD_TORCH_CHECK(
      logits.dim() == 2 && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && uniforms.dim() == 1 &&
          uniforms.scalar_type() == ScalarType::Double && uniforms.is_contiguous() &&
          uniforms.size(0) == logits.size(0),
      "sample_tokens_cpp needs logits [S,V] float32 or bfloat16 and contiguous uniforms [S] float64");
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  STD_TORCH_CHECK(vocabulary <= 1 || logits.stride(1) == 1, "the last dimension of the logits must be contiguous");
  STD_TORCH_CHECK(vocabulary < (int64_t{1} << 31) - 16, "a vocabulary of ", vocabulary, " does not fit 31 bits");
  STD_TORCH_CHECK(
      temperature >= 0.0 && top_k >= 0 && top_p > 0.0 && min_p >= 0.0 && min_p <= 1.0,
      "sample_tokens_cpp: a setting is out of range");
  Tensor tokens = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  Tensor logprobs = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  Tensor truncated = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  const bool bf16 = dtype == ScalarType::BFloat16;
  const int64_t row_bytes = logits.stride(0) * (bf16 ? 2 : 4);
  const auto* z = static_cast<const char*>(logits.data_ptr());
  const auto* u = static_cast<const double*>(uniforms.data_ptr());
  auto* token = static_cast<int64_t*>(tokens.data_ptr());
  auto* logprob = static_cast<float*>(logprobs.data_ptr());
  auto* truncated_logprob = static_cast<float*>(truncated.data_ptr());

  const Passes passes;
  const Settings settings{temperature, top_k, top_p, min_p};
  // Waking a thread costs more than some ten thousand logits.
  const int64_t parts =
      std::min<int64_t>({int64_t(torch::stable::get_num_threads()), rows, 1 + rows * vocabulary / 32768});
  std::vector<Workspace> workspaces;  // made here: nothing may throw inside parallel_for
  for (int64_t part = 0; part < parts; ++part) workspaces.emplace_back(vocabulary);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t s = rows * part / parts; s < rows * (part + 1) / parts; ++s) {
        Row row{z + s * row_bytes, bf16, vocabulary, 0.0f};
        row.top = passes.row_top(row.z, bf16, vocabulary);
        if (!std::isfinite(row.top)) {
          token[s] = -1;
          logprob[s] = truncated_logprob[s] = std::numeric_limits<float>::quiet_NaN();
          continue;
        }
        const Draw draw = sample_row(passes, row, u[s], settings, workspaces[part]);
        const double shifted = double(row.logit(draw.token)) - double(row.top);
        token[s] = draw.token;
        logprob[s] = float(shifted - std::log(draw.raw_mass));
        // The argmax alone may be drawn at temperature 0: log 1.
        truncated_logprob[s] = temperature == 0.0 ? 0.0f : float(shifted / temperature - std::log(draw.kept_mass));
      }
    }
  });
  return {tokens, logprobs, truncated};
}

}  // namespace metareward

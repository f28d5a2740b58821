// Sampling from logits: temperature, top-k, top-p, inverse CDF in vocabulary order.
//
// Nothing is sorted over the vocabulary. A cheap bound on the logit throws most tokens out in one pass, a selection
// on 64-bit keys (logit, then lower id) finds the cut among the rest, and the draw walks the kept tokens in order.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "../ops.h"

namespace metareward {
namespace {

#define METAREWARD_SIMD_BODY "sample_body.h"
#include "for_each_simd.h"

struct Passes {
  decltype(&generic::row_top) row_top = METAREWARD_SIMD_PICK(row_top);
  decltype(&generic::sum_exp) sum_exp = METAREWARD_SIMD_PICK(sum_exp);
  decltype(&generic::exp_weights) exp_weights = METAREWARD_SIMD_PICK(exp_weights);
  decltype(&generic::collect_logits) collect_logits = METAREWARD_SIMD_PICK(collect_logits);
  decltype(&generic::strided_maxima) strided_maxima = METAREWARD_SIMD_PICK(strided_maxima);
};

constexpr int64_t kBlock = 512;  // weights summed at a time

struct Settings {
  double temperature;
  int64_t top_k;
  double top_p;
};

// A thread's working memory, one vocabulary long each.
struct Workspace {
  explicit Workspace(int64_t vocabulary)
      : weights(vocabulary), block_sums(vocabulary / kBlock + 1), indices(vocabulary + 16), keys(vocabulary), selection(vocabulary), maxima(vocabulary) {}
  std::vector<double> weights;      // by token id, or by candidate when there is a top-k
  std::vector<double> block_sums;   // of the weights
  std::vector<int32_t> indices;     // candidates, ascending
  std::vector<uint64_t> keys;       // of the candidates, in the same order
  std::vector<uint64_t> selection;  // the keys again, to be permuted
  std::vector<float> maxima;
};

// Larger key = drawn first by top-k and top-p: the larger logit, of equal ones (-0 equals 0) the lower id.
uint64_t key_of(float logit, int32_t id) {
  const float value = logit + 0.0f;  // -0 + 0 = 0
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
  return (uint64_t{bits} << 32) | uint32_t(~uint32_t(id));
}

int32_t id_of(uint64_t key) { return int32_t(~uint32_t(key)); }

// A logit that at least k logits reach: the k-th largest maximum of disjoint sets.
float top_k_bound(const Passes& passes, const float* z, int64_t n, int64_t k, Workspace& work) {
  const int64_t blocks = std::min(n, std::max<int64_t>(4 * k, n / 16));
  float* maxima = work.maxima.data();
  passes.strided_maxima(z, n, blocks, maxima);
  std::nth_element(maxima, maxima + (k - 1), maxima + blocks, std::greater<float>());
  return maxima[k - 1];
}

// The smallest key of the top-p set among keys[0, count): of the largest keys, the fewest whose mass reaches `target`.
// A weighted quickselect: linear on average. `mass_of(key)` is the weight of a key.
template <class Mass>
uint64_t top_p_cut(uint64_t* keys, int64_t count, double target, const Mass& mass_of) {
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

// First i whose cumulative weight exceeds u * total; the last one of positive weight if rounding lets none.
template <class Weight>
int64_t draw(int64_t n, double u, const Weight& weight) {
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) total += weight(i);
  const double threshold = u * total;
  double cumulative = 0.0;
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double w = weight(i);
    cumulative += w;
    if (cumulative > threshold) return i;
    if (w > 0.0) last = i;
  }
  return last;
}

// The same over all the weights of a row, a block at a time: the sums are there already.
int64_t draw_from_blocks(int64_t n, double u, double total, const Workspace& work) {
  const double threshold = u * total;
  double cumulative = 0.0;
  int64_t start = 0;
  while (start + kBlock < n && cumulative + work.block_sums[start / kBlock] <= threshold) {
    cumulative += work.block_sums[start / kBlock];
    start += kBlock;
  }
  int64_t last = -1;
  for (int64_t i = start; i < n; ++i) {
    cumulative += work.weights[i];
    if (cumulative > threshold) return i;
    if (work.weights[i] > 0.0) last = i;
  }
  // Rounding let none exceed it: the last token of positive weight, be it in an earlier block.
  while (last < 0 || work.weights[last] == 0.0) last = last < 0 ? start - 1 : last - 1;
  return last;
}

int64_t sample_row(
    const Passes& passes, const float* z, int64_t n, float top, double u, const Settings& settings, Workspace& work) {
  if (settings.temperature == 0.0) {
    return std::find(z, z + n, top) - z;
  }
  const bool limited = settings.top_k > 0 && settings.top_k < n;
  double* weights = work.weights.data();
  if (!limited) {
    const double total =
        passes.exp_weights(z, n, top, settings.temperature, weights, kBlock, work.block_sums.data());
    if (settings.top_p >= 1.0) return draw_from_blocks(n, u, total, work);
    // Tokens lighter than (1 - p) * total / n weigh less than (1 - p) * total together: the top-p set does without.
    // The bound is put on the logit, a little lower than needed, so that equal logits stay together.
    const double light = (1.0 - settings.top_p) * total / double(n);
    const double low = std::min(double(top), double(top) + settings.temperature * std::log(light) - 1e-3);
    const float bound = std::nextafter(float(low), -std::numeric_limits<float>::infinity());
    const int64_t count = passes.collect_logits(z, n, bound, work.indices.data());
    for (int64_t i = 0; i < count; ++i) {
      const int32_t id = work.indices[i];
      work.keys[i] = work.selection[i] = key_of(z[id], id);
    }
    const uint64_t cut = top_p_cut(
        work.selection.data(), count, settings.top_p * total, [&](uint64_t key) { return weights[id_of(key)]; });
    const int64_t kept =
        std::remove_if(work.keys.begin(), work.keys.begin() + count, [&](uint64_t key) { return key < cut; }) -
        work.keys.begin();
    return id_of(work.keys[draw(kept, u, [&](int64_t i) { return weights[id_of(work.keys[i])]; })]);
  }

  const float bound = top_k_bound(passes, z, n, settings.top_k, work);
  int64_t count = passes.collect_logits(z, n, bound, work.indices.data());
  for (int64_t i = 0; i < count; ++i) {
    work.keys[i] = work.selection[i] = key_of(z[work.indices[i]], work.indices[i]);
  }
  const auto selected = work.selection.begin();
  std::nth_element(selected, selected + (settings.top_k - 1), selected + count, std::greater<uint64_t>());
  uint64_t cut = selected[settings.top_k - 1];
  const auto drop_below_cut = [&] {
    count = std::remove_if(work.keys.begin(), work.keys.begin() + count, [&](uint64_t key) { return key < cut; }) -
            work.keys.begin();
  };
  drop_below_cut();
  // weights[rank in vocabulary order] of the candidates; `maxima` is free again and holds their logits.
  for (int64_t i = 0; i < count; ++i) work.maxima[i] = z[id_of(work.keys[i])];
  const double total = passes.exp_weights(
      work.maxima.data(), count, top, settings.temperature, weights, kBlock, work.block_sums.data());
  if (settings.top_p < 1.0) {
    for (int64_t i = 0; i < count; ++i) {
      work.indices[i] = id_of(work.keys[i]);
      work.selection[i] = work.keys[i];
    }
    const auto mass_of = [&](uint64_t key) {
      const auto rank = std::lower_bound(work.indices.begin(), work.indices.begin() + count, id_of(key));
      return weights[rank - work.indices.begin()];
    };
    cut = top_p_cut(work.selection.data(), count, settings.top_p * total, mass_of);
    for (int64_t i = 0; i < count; ++i) {
      if (work.keys[i] < cut) weights[i] = 0.0;  // of no weight, so never drawn
    }
  }
  return id_of(work.keys[draw(count, u, [&](int64_t i) { return weights[i]; })]);
}

}  // namespace

std::tuple<Tensor, Tensor> sample_tokens(
    Tensor logits, Tensor uniforms, double temperature, int64_t top_k, double top_p) {
  STD_TORCH_CHECK(
      logits.dim() == 2 && logits.scalar_type() == ScalarType::Float && uniforms.dim() == 1 &&
          uniforms.scalar_type() == ScalarType::Double && uniforms.is_contiguous() &&
          uniforms.size(0) == logits.size(0),
      "sample_tokens_cpp needs logits [S,V] float32 and contiguous uniforms [S] float64");
  const int64_t rows = logits.size(0), vocabulary = logits.size(1), stride = logits.stride(0);
  STD_TORCH_CHECK(vocabulary <= 1 || logits.stride(1) == 1, "the last dimension of the logits must be contiguous");
  STD_TORCH_CHECK(vocabulary < (int64_t{1} << 31), "a vocabulary of ", vocabulary, " does not fit 31 bits");
  STD_TORCH_CHECK(temperature >= 0.0 && top_k >= 0 && top_p > 0.0, "sample_tokens_cpp: a setting is out of range");
  Tensor tokens = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  Tensor logprobs = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  const auto* z = static_cast<const float*>(logits.data_ptr());
  const auto* u = static_cast<const double*>(uniforms.data_ptr());
  auto* token = static_cast<int64_t*>(tokens.data_ptr());
  auto* logprob = static_cast<float*>(logprobs.data_ptr());

  const Passes passes;
  const Settings settings{temperature, top_k, top_p};
  // Waking a thread costs more than some ten thousand logits.
  const int64_t parts =
      std::min<int64_t>({int64_t(torch::stable::get_num_threads()), rows, 1 + rows * vocabulary / 32768});
  std::vector<Workspace> workspaces;  // made here: nothing may throw inside parallel_for
  for (int64_t part = 0; part < parts; ++part) workspaces.emplace_back(vocabulary);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t s = rows * part / parts; s < rows * (part + 1) / parts; ++s) {
        const float* row = z + s * stride;
        const float top = passes.row_top(row, vocabulary);
        if (!std::isfinite(top)) {
          token[s] = -1;
          logprob[s] = std::numeric_limits<float>::quiet_NaN();
          continue;
        }
        token[s] = sample_row(passes, row, vocabulary, top, u[s], settings, workspaces[part]);
        logprob[s] = float(double(row[token[s]]) - double(top) - std::log(passes.sum_exp(row, vocabulary, top)));
      }
    }
  });
  return {tokens, logprobs};
}

}  // namespace metareward

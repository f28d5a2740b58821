// Sampling from logits: temperature, top-k, top-p, min-p, inverse CDF in vocabulary order.
//
// Nothing is sorted over the vocabulary: sample_candidates.h. One pass sums the weights. Weights are fp32, their sums
// fp64: a sum in fp32 would lose the tail beside a heavy token.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../ops.h"
#include "sample_candidates.h"

namespace metareward {
namespace {

struct Settings {
  double temperature;
  int64_t top_k;
  double top_p, min_p;
};

struct Draw {
  int64_t token;
  double kept_mass;  // sum of e^((z - top) / temperature) over the tokens that might have been drawn
  double raw_mass;   // sum of e^(z - top) over all
};

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

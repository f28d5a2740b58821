// Row passes of the head ops: the matrix products stay PyTorch's, what lies between them is one or two reads here.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>

#include "../ops.h"

namespace metareward {
namespace {

#define METAREWARD_SIMD_BODY "log_softmax_body.h"
#include "for_each_simd.h"

using generic::load1;

float element(const void* z, bool bf16, int64_t i) {
  return bf16 ? load1(static_cast<const uint16_t*>(z) + i) : load1(static_cast<const float*>(z) + i);
}

void set_element(void* z, bool bf16, int64_t i, float value) {
  if (bf16) {
    generic::store_part(static_cast<uint16_t*>(z) + i, generic::f32x16{} + value, 1);
  } else {
    static_cast<float*>(z)[i] = value;
  }
}

struct Rows {
  char* data;
  int64_t count, vocabulary, row_bytes;
  bool bf16;

  // Rows a thread takes at least: waking one costs more than some ten thousand logits.
  int64_t grain() const { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, vocabulary)); }
};

Rows check_shapes(const Tensor& logits, const Tensor& targets) {
  const auto dtype = logits.scalar_type();
  STD_TORCH_CHECK(
      logits.dim() == 2 && logits.is_contiguous() && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
      "logits must be contiguous [C,V] of float32 or bfloat16");
  STD_TORCH_CHECK(
      targets.dim() == 1 && targets.is_contiguous() && targets.scalar_type() == ScalarType::Long &&
          targets.size(0) == logits.size(0),
      "targets must be contiguous [C] int64");
  const bool bf16 = dtype == ScalarType::BFloat16;
  const int64_t vocabulary = logits.size(1);
  return {static_cast<char*>(logits.data_ptr()), logits.size(0), vocabulary, vocabulary * (bf16 ? 2 : 4), bf16};
}

Rows check_rows(const Tensor& logits, const Tensor& targets) {
  const Rows rows = check_shapes(logits, targets);
  const auto* target = static_cast<const int64_t*>(targets.data_ptr());
  for (int64_t i = 0; i < rows.count; ++i) {
    STD_TORCH_CHECK(
        target[i] >= 0 && target[i] < rows.vocabulary, "target ", target[i], " is outside [0, ", rows.vocabulary - 1, "]");
  }
  return rows;
}

struct RowOutputs {
  Tensor logprobs, lse, entropy;

  RowOutputs(const Tensor& like, int64_t rows, bool with_entropy)
      : logprobs(torch::stable::new_empty(like, {rows}, ScalarType::Float)),
        lse(torch::stable::new_empty(logprobs, {rows})),
        entropy(torch::stable::new_empty(logprobs, {with_entropy ? rows : 0})),
        with_entropy_(with_entropy) {}

  void set(int64_t i, float logit, float top, double sum, double weighted, double temperature) {
    // Both terms are of this row: the first is at most 0, the sum at least 1, so log p <= 0 without a clamp.
    const double shifted = (double(logit) - double(top)) / temperature, log_sum = std::log(sum);
    static_cast<float*>(logprobs.data_ptr())[i] = float(shifted - log_sum);
    static_cast<float*>(lse.data_ptr())[i] = float(double(top) / temperature + log_sum);
    if (with_entropy_) static_cast<float*>(entropy.data_ptr())[i] = float(log_sum - weighted / sum);
  }

 private:
  bool with_entropy_;
};

RowOutputs logprobs_of(const Tensor& logits, const Tensor& targets, double temperature, bool entropy) {
  const Rows rows = check_rows(logits, targets);
  RowOutputs out(logits, rows.count, entropy);
  const auto* target = static_cast<const int64_t*>(targets.data_ptr());
  const auto pass = METAREWARD_SIMD_PICK(top_and_sum);
  torch::stable::parallel_for(0, rows.count, rows.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const void* row = rows.data + i * rows.row_bytes;
      float top;
      double sum, weighted = 0.0;
      pass(row, rows.bf16, rows.vocabulary, float(1.0 / temperature), &top, &sum, entropy ? &weighted : nullptr);
      out.set(i, element(row, rows.bf16, target[i]), top, sum, weighted, temperature);
    }
  });
  return out;
}

bool masked(const void* row, bool bf16, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (element(row, bf16, i) != -INFINITY) return false;
  }
  return true;
}

// What is known of a row after some of its vocabulary; total and weighted are relative to top.
struct RunningSums {
  double &top, &total, &weighted;

  void add(double new_top, double new_total, double new_weighted, double temperature) {
    if (total == 0.0) {  // nothing so far: a top of -inf cannot be subtracted
      top = new_top;
      total = new_total;
      weighted = new_weighted;
      return;
    }
    if (new_top > top) {
      std::swap(top, new_top);
      std::swap(total, new_total);
      std::swap(weighted, new_weighted);
    }
    const double moved = (new_top - top) / temperature, shrink = std::exp(moved);
    total += shrink * new_total;
    if (shrink != 0.0) weighted += shrink * (new_weighted + moved * new_total);
  }
};

void check_out(const Rows& rows, const std::optional<Tensor>& out) {
  STD_TORCH_CHECK(
      !out.has_value() || (!rows.bf16 && out->scalar_type() == ScalarType::BFloat16 && out->is_contiguous() &&
                           out->dim() == 2 && out->size(0) == rows.count && out->size(1) == rows.vocabulary),
      "out must be contiguous bfloat16 [C,V], for float32 logits");
}

}  // namespace

std::tuple<Tensor, Tensor> logprob_rows(Tensor logits, Tensor targets, double temperature) {
  const RowOutputs out = logprobs_of(logits, targets, temperature, false);
  return {out.logprobs, out.lse};
}

std::tuple<Tensor, Tensor, Tensor> logprob_entropy_rows(Tensor logits, Tensor targets, double temperature) {
  const RowOutputs out = logprobs_of(logits, targets, temperature, true);
  return {out.logprobs, out.lse, out.entropy};
}

void add_logit_sums(Tensor logits, Tensor targets, int64_t first, double temperature, bool entropy, Tensor sums) {
  const Rows rows = check_shapes(logits, targets);
  STD_TORCH_CHECK(
      sums.dim() == 2 && sums.is_contiguous() && sums.scalar_type() == ScalarType::Double && sums.size(0) == 4 &&
          sums.size(1) == rows.count,
      "sums must be contiguous [4,C] float64");
  if (rows.vocabulary == 0) return;
  auto* tops = static_cast<double*>(sums.data_ptr());
  const auto* target = static_cast<const int64_t*>(targets.data_ptr());
  const auto pass = METAREWARD_SIMD_PICK(top_and_sum);
  torch::stable::parallel_for(0, rows.count, rows.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const void* row = rows.data + i * rows.row_bytes;
      const int64_t at = target[i] - first;
      if (at >= 0 && at < rows.vocabulary) tops[3 * rows.count + i] = element(row, rows.bf16, at);
      float top;
      double sum, weighted = 0.0;
      pass(row, rows.bf16, rows.vocabulary, float(1.0 / temperature), &top, &sum, entropy ? &weighted : nullptr);
      if (top == -INFINITY && masked(row, rows.bf16, rows.vocabulary)) continue;
      RunningSums{tops[i], tops[rows.count + i], tops[2 * rows.count + i]}.add(top, sum, weighted, temperature);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> softmax_residual_rows(
    Tensor logits, Tensor targets, double temperature, bool entropy, std::optional<Tensor> out) {
  const Rows rows = check_rows(logits, targets);
  check_out(rows, out);
  RowOutputs result(logits, rows.count, entropy);
  const auto* target = static_cast<const int64_t*>(targets.data_ptr());
  const bool bf16_out = rows.bf16 || out.has_value();
  char* to = out.has_value() ? static_cast<char*>(out->data_ptr()) : rows.data;
  const int64_t to_bytes = rows.vocabulary * (bf16_out ? 2 : 4);
  const float inverse = float(1.0 / temperature);
  const auto sums = METAREWARD_SIMD_PICK(top_and_sum);
  const auto softmax = METAREWARD_SIMD_PICK(negative_softmax);
  const auto terms = METAREWARD_SIMD_PICK(exponentials);
  const auto scale = METAREWARD_SIMD_PICK(scaled);
  torch::stable::parallel_for(0, rows.count, rows.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {  // the later passes find the row in the level-2 cache
      void* row = rows.data + i * rows.row_bytes;
      void* residual = to + i * to_bytes;
      const float logit = element(row, rows.bf16, target[i]);
      float top;
      double sum, weighted = 0.0;
      if (rows.bf16) {  // terms rounded to bf16 would be rounded twice: they are computed again
        sums(row, true, rows.vocabulary, inverse, &top, &sum, entropy ? &weighted : nullptr);
        const float lse = float(double(top) / temperature + std::log(sum));
        softmax(row, true, rows.vocabulary, inverse, lse, 1.0f, residual, true);
      } else {
        terms(static_cast<float*>(row), rows.vocabulary, inverse, &top, &sum, entropy ? &weighted : nullptr);
        scale(static_cast<const float*>(row), rows.vocabulary, float(-1.0 / sum), residual, bf16_out);
      }
      result.set(i, logit, top, sum, weighted, temperature);
      // 1 - p at the target is formed before it is rounded.
      const double p = std::exp((double(logit) - double(top)) / temperature) / sum;
      set_element(residual, bf16_out, target[i], float(1.0 - p));
    }
  });
  return {result.logprobs, result.lse, result.entropy};
}

void logit_gradient_rows(
    Tensor logits, Tensor targets, Tensor lse, Tensor grad, double temperature, std::optional<Tensor> out) {
  const Rows rows = check_rows(logits, targets);
  for (const Tensor* x : {&lse, &grad}) {
    STD_TORCH_CHECK(
        x->dim() == 1 && x->is_contiguous() && x->scalar_type() == ScalarType::Float && x->size(0) == rows.count,
        "lse and grad must be contiguous [C] float32");
  }
  const auto* target = static_cast<const int64_t*>(targets.data_ptr());
  const auto* log_sum = static_cast<const float*>(lse.data_ptr());
  const auto* incoming = static_cast<const float*>(grad.data_ptr());
  check_out(rows, out);
  const bool bf16_out = rows.bf16 || out.has_value();
  char* to = out.has_value() ? static_cast<char*>(out->data_ptr()) : rows.data;
  const int64_t to_bytes = rows.vocabulary * (bf16_out ? 2 : 4);
  const auto pass = METAREWARD_SIMD_PICK(negative_softmax);
  const float inverse = float(1.0 / temperature);
  torch::stable::parallel_for(0, rows.count, rows.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const void* row = rows.data + i * rows.row_bytes;
      void* gradient = to + i * to_bytes;
      const float scale = float(incoming[i] / temperature);
      // 1 - p at the target is formed in fp32 before it is rounded.
      const float logit = element(row, rows.bf16, target[i]);
      const double p = std::exp(double(logit) / temperature - double(log_sum[i]));
      pass(row, rows.bf16, rows.vocabulary, inverse, log_sum[i], scale, gradient, bf16_out);
      set_element(gradient, bf16_out, target[i], float(scale * (1.0 - p)));
    }
  });
}

}  // namespace metareward

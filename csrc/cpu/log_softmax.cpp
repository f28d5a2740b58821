// Row passes of linear_logprob: the matrix products stay PyTorch's, what lies between them is one or two reads here.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

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

Rows check_rows(const Tensor& logits, const Tensor& targets) {
  const auto dtype = logits.scalar_type();
  STD_TORCH_CHECK(
      logits.dim() == 2 && logits.is_contiguous() && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
      "logits must be contiguous [C,V] of float32 or bfloat16");
  STD_TORCH_CHECK(
      targets.dim() == 1 && targets.is_contiguous() && targets.scalar_type() == ScalarType::Long &&
          targets.size(0) == logits.size(0),
      "targets must be contiguous [C] int64");
  const int64_t vocabulary = logits.size(1);
  const auto* target = static_cast<const int64_t*>(targets.data_ptr());
  for (int64_t i = 0; i < logits.size(0); ++i) {
    STD_TORCH_CHECK(
        target[i] >= 0 && target[i] < vocabulary, "target ", target[i], " is outside [0, ", vocabulary - 1, "]");
  }
  const bool bf16 = dtype == ScalarType::BFloat16;
  return {static_cast<char*>(logits.data_ptr()), logits.size(0), vocabulary, vocabulary * (bf16 ? 2 : 4), bf16};
}

}  // namespace

std::tuple<Tensor, Tensor> logprob_rows(Tensor logits, Tensor targets, double temperature) {
  const Rows rows = check_rows(logits, targets);
  Tensor logprobs = torch::stable::new_empty(logits, {rows.count}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(logits, {rows.count}, ScalarType::Float);
  const auto* target = static_cast<const int64_t*>(targets.data_ptr());
  auto* logprob_out = static_cast<float*>(logprobs.data_ptr());
  auto* lse_out = static_cast<float*>(lse.data_ptr());
  const auto pass = METAREWARD_SIMD_PICK(top_and_sum);
  torch::stable::parallel_for(0, rows.count, rows.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const void* row = rows.data + i * rows.row_bytes;
      float top;
      double sum;
      pass(row, rows.bf16, rows.vocabulary, float(1.0 / temperature), &top, &sum);
      // Both terms are of this row: the first is at most 0, the sum at least 1, so log p <= 0 without a clamp.
      const double shifted = (double(element(row, rows.bf16, target[i])) - double(top)) / temperature;
      logprob_out[i] = float(shifted - std::log(sum));
      lse_out[i] = float(double(top) / temperature + std::log(sum));
    }
  });
  return {logprobs, lse};
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
  STD_TORCH_CHECK(
      !out.has_value() || (!rows.bf16 && out->scalar_type() == ScalarType::BFloat16 && out->is_contiguous() &&
                           out->dim() == 2 && out->size(0) == rows.count && out->size(1) == rows.vocabulary),
      "out must be contiguous bfloat16 [C,V], for float32 logits");
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

// All layers of a decoder in one call, when it only infers: what the ops of this folder do one after the other.
//
// A step of sampling is some 8 ops a layer. Called from Python each costs some 20 to 40 us outside of its kernel, in
// which one thread works and the others wait: with 30 layers about a fifteenth of a step of 264 rows of a 135M model on
// two cores. Here they follow each other at once, and attention is cut up once a step, not once a layer.
#include <algorithm>
#include <cstring>
#include <vector>

#include "paged_attention.h"

namespace metareward {
namespace {

enum : size_t { INPUT_NORM, QKV, OUT, POST_NORM, GATE_UP, DOWN, WEIGHTS };

// Rows [R] int64 of x [T,N].
Tensor take_rows(const Tensor& x, const Tensor& rows) {
  const int64_t width = x.size(1), size = width * (x.scalar_type() == ScalarType::Float ? 4 : 2);
  Tensor taken = torch::stable::new_empty(x, {rows.size(0), width});
  const auto* index = static_cast<const int64_t*>(rows.data_ptr());
  for (int64_t i = 0; i < rows.size(0); ++i) {
    STD_TORCH_CHECK(
        index[i] >= 0 && index[i] < x.size(0), "logit row ", index[i], " is outside [0, ", x.size(0) - 1, "]");
    std::memcpy(
        static_cast<char*>(taken.data_ptr()) + i * size,
        static_cast<const char*>(x.data_ptr()) + index[i] * x.stride(0) * (size / std::max<int64_t>(1, width)), size);
  }
  return taken;
}

}  // namespace

Tensor decoder_layers(
    Tensor residual, Tensor cos, Tensor sin, Tensor slots, std::vector<Tensor> key_pages,
    std::vector<Tensor> value_pages, Tensor page_ids, Tensor page_starts, Tensor lengths, Tensor rows,
    Tensor row_starts, Tensor limits, std::vector<Tensor> weights, std::vector<Tensor> head_norms, Tensor norm,
    Tensor logit_rows, int64_t query_heads, int64_t intermediate, double eps, double scale) {
  const size_t layers = key_pages.size();
  STD_TORCH_CHECK(
      layers > 0 && value_pages.size() == layers && weights.size() == WEIGHTS * layers &&
          (head_norms.empty() || head_norms.size() == 2 * layers),
      "decoder_layers_cpp_ needs keys, values and six weights a layer, and two norms of heads or none");
  STD_TORCH_CHECK(
      residual.dim() == 2 && residual.is_contiguous() && key_pages[0].dim() == 4 && query_heads > 0 &&
          logit_rows.dim() == 1 && logit_rows.is_contiguous() && logit_rows.scalar_type() == ScalarType::Long,
      "decoder_layers_cpp_ needs a contiguous residual [T,H], pages [P,page,Hk,D] and logit_rows [R] int64");
  const int64_t tokens = residual.size(0), width = residual.size(1);
  const int64_t kv_heads = key_pages[0].size(2), dim = key_pages[0].size(3);
  Tensor qkv = torch::stable::new_empty(norm, {tokens, (query_heads + 2 * kv_heads) * dim});
  Tensor delta = torch::stable::new_empty(norm, {tokens, width});
  Tensor activated = torch::stable::new_empty(norm, {tokens, intermediate});
  const auto work = plan_attention(
      torch::stable::new_empty(norm, {tokens, query_heads, dim}), key_pages[0], value_pages[0], page_ids, page_starts,
      lengths, rows, row_starts, limits, scale);
  for (size_t layer = 0; layer < layers; ++layer) {
    const Tensor* w = &weights[WEIGHTS * layer];
    std::optional<Tensor> added, query_norm, key_norm;
    if (layer > 0) added = delta;
    if (!head_norms.empty()) {
      query_norm = head_norms[2 * layer];
      key_norm = head_norms[2 * layer + 1];
    }
    packed_linear(add_rms_norm(residual, added, w[INPUT_NORM], eps), w[QKV], qkv);
    const Tensor query = rotate_and_store(
        qkv, cos, sin, slots, key_pages[layer], value_pages[layer], query_norm, key_norm, eps);
    Tensor seen = torch::stable::flatten(attend(*work, query, key_pages[layer], value_pages[layer]), 1, 2);
    if (layer + 1 == layers) {  // its keys and values are stored; the rest serves the logits alone
      seen = take_rows(seen, logit_rows);
      residual = take_rows(residual, logit_rows);
      delta = torch::stable::new_empty(norm, {logit_rows.size(0), width});
      activated = torch::stable::new_empty(norm, {logit_rows.size(0), intermediate});
    }
    packed_linear(seen, w[OUT], delta);
    packed_gated_linear(add_rms_norm(residual, delta, w[POST_NORM], eps), w[GATE_UP], activated);
    packed_linear(activated, w[DOWN], delta);
  }
  return add_rms_norm(residual, delta, norm, eps);
}

}  // namespace metareward

// Schemas, checks and registration of the CUDA ops, on libtorch's stable ABI (2.11). Never run on a GPU: off by default.
//
// A library of its own, _CUDA.so, that is loaded only when METAREWARD_KERNELS=cuda asks for it. It builds against a
// PyTorch without CUDA too: libtorch_cuda's one function that it needs is a weak symbol, found through libtorch.so.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "launch.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace metareward {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t LARGEST_VOCABULARY = int64_t{1} << 30;

Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Element::FLOAT;
    case ScalarType::BFloat16: return Element::BFLOAT16;
    case ScalarType::Half: return Element::HALF;
    default: STD_TORCH_CHECK(false, "the CUDA kernels take float32, bfloat16 and float16 logits");
  }
}

void* current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this PyTorch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

void check_rows(const Tensor& logits, const Tensor& targets, double temperature) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be contiguous [C,V]");
  STD_TORCH_CHECK(
      logits.size(1) >= 1 && logits.size(1) <= LARGEST_VOCABULARY && logits.size(0) < (int64_t{1} << 31),
      "the CUDA kernels take 1 to 2^30 columns and fewer than 2^31 rows, got [", logits.size(0), ", ", logits.size(1), "]");
  STD_TORCH_CHECK(
      targets.dim() == 1 && targets.is_contiguous() && targets.scalar_type() == ScalarType::Long &&
          targets.size(0) == logits.size(0) && targets.is_cuda() &&
          targets.get_device_index() == logits.get_device_index(),
      "targets must be contiguous [C] int64 on the logits' device");
  STD_TORCH_CHECK(temperature > 0.0, "temperature must be positive, got ", temperature);
}

void check_vector(const Tensor& x, const Tensor& logits, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 1 && x.is_contiguous() && x.scalar_type() == ScalarType::Float && x.size(0) == logits.size(0) &&
          x.is_cuda() && x.get_device_index() == logits.get_device_index(),
      name, " must be contiguous [C] float32 on the logits' device");
}

// Where the gradient goes: `out`, bfloat16 or float16 of float32 logits, or the logits.
const Tensor& checked_out(const Tensor& logits, const std::optional<Tensor>& out) {
  if (!out.has_value()) return logits;
  STD_TORCH_CHECK(
      logits.scalar_type() == ScalarType::Float &&
          (out->scalar_type() == ScalarType::BFloat16 || out->scalar_type() == ScalarType::Half) && out->dim() == 2 &&
          out->size(0) == logits.size(0) && out->size(1) == logits.size(1) && out->is_contiguous() && out->is_cuda() &&
          out->get_device_index() == logits.get_device_index() && out->data_ptr() != logits.data_ptr(),
      "out must be contiguous bfloat16 or float16 [C,V] on the logits' device, for float32 logits");
  return *out;
}

void check_launch(const char* reason) {
  STD_TORCH_CHECK(reason == nullptr, "a CUDA kernel of metareward did not start: ", reason);
}

float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

// Log-probs and log-sum-exps, both [C] float32, and entropies, [C] or, when not asked for, [0].
std::tuple<Tensor, Tensor, Tensor> logprob_rows(
    Tensor logits /* [C,V] */, Tensor targets /* [C] int64 */, double temperature, bool entropy) {
  check_rows(logits, targets, temperature);
  const Element element = element_of(logits);
  const int64_t rows = logits.size(0);
  const int32_t device = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor logprobs = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  Tensor entropies = torch::stable::new_empty(logits, {entropy ? rows : 0}, ScalarType::Float);
  if (rows > 0) {
    check_launch(launch_logprob_rows(
        logits.data_ptr(), element, static_cast<const int64_t*>(targets.data_ptr()), rows, logits.size(1), temperature,
        floats(logprobs), floats(lse), entropy ? floats(entropies) : nullptr, device, current_stream(device)));
  }
  return {logprobs, lse, entropies};
}

// logprob_rows, and scale * (onehot - softmax(logits / temperature)) over the logits or into `out`.
std::tuple<Tensor, Tensor, Tensor> softmax_residual_rows(
    Tensor logits /* [C,V] */, Tensor targets /* [C] int64 */, double temperature, double scale, bool entropy,
    std::optional<Tensor> out) {
  check_rows(logits, targets, temperature);
  const Element element = element_of(logits);
  const Tensor& to = checked_out(logits, out);
  const int64_t rows = logits.size(0);
  const int32_t device = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor logprobs = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  Tensor entropies = torch::stable::new_empty(logits, {entropy ? rows : 0}, ScalarType::Float);
  if (rows > 0) {
    check_launch(launch_softmax_residual_rows(
        logits.data_ptr(), element, static_cast<const int64_t*>(targets.data_ptr()), rows, logits.size(1), temperature,
        scale, floats(logprobs), floats(lse), entropy ? floats(entropies) : nullptr, to.data_ptr(), element_of(to),
        device, current_stream(device)));
  }
  return {logprobs, lse, entropies};
}

// coefficient * (onehot - softmax) / temperature: over the logits, or into `out` [C,V], a half of float32 logits.
void logit_gradient_rows(
    Tensor logits /* [C,V] */, Tensor targets /* [C] int64 */, Tensor lse /* [C] */, Tensor coefficient /* [C] */,
    double temperature, std::optional<Tensor> out) {
  check_rows(logits, targets, temperature);
  check_vector(lse, logits, "lse");
  check_vector(coefficient, logits, "coefficient");
  const Element element = element_of(logits);
  const Tensor& to = checked_out(logits, out);
  if (logits.size(0) == 0) return;
  const int32_t device = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(launch_logit_gradient_rows(
      logits.data_ptr(), element, static_cast<const int64_t*>(targets.data_ptr()), floats(lse), floats(coefficient),
      logits.size(0), logits.size(1), temperature, to.data_ptr(), element_of(to), device, current_stream(device)));
}

}  // namespace
}  // namespace metareward

STABLE_TORCH_LIBRARY_FRAGMENT(metareward, library) {
  library.def("logprob_rows_cuda(Tensor logits, Tensor targets, float temperature, bool entropy) -> (Tensor, Tensor, Tensor)");
  library.def(
      "softmax_residual_rows_cuda_(Tensor(a!) logits, Tensor targets, float temperature, float scale, bool entropy, "
      "Tensor(b!)? out) -> (Tensor, Tensor, Tensor)");
  library.def(
      "logit_gradient_rows_cuda_(Tensor(a!) logits, Tensor targets, Tensor lse, Tensor coefficient, float temperature, "
      "Tensor(b!)? out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(metareward, CUDA, library) {
  library.impl("logprob_rows_cuda", TORCH_BOX(&metareward::logprob_rows));
  library.impl("softmax_residual_rows_cuda_", TORCH_BOX(&metareward::softmax_residual_rows));
  library.impl("logit_gradient_rows_cuda_", TORCH_BOX(&metareward::logit_gradient_rows));
}

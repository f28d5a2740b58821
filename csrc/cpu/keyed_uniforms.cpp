// Uniform numbers of (key, position) pairs.
#include "../ops.h"
#include "philox.h"

namespace metareward {

Tensor keyed_uniforms(Tensor keys, Tensor positions) {
  STD_TORCH_CHECK(
      keys.dim() == 1 && keys.is_contiguous() && positions.is_contiguous() && keys.numel() == positions.numel() &&
          keys.scalar_type() == ScalarType::Long && positions.scalar_type() == ScalarType::Long,
      "keyed_uniforms_cpp needs two contiguous int64 tensors of one length");
  Tensor out = torch::stable::new_empty(keys, {keys.numel()}, ScalarType::Double);
  const auto* key = static_cast<const int64_t*>(keys.data_ptr());
  const auto* position = static_cast<const int64_t*>(positions.data_ptr());
  auto* uniform = static_cast<double*>(out.data_ptr());
  for (int64_t i = 0, n = keys.numel(); i < n; ++i) {
    uniform[i] = keyed_uniform(uint64_t(key[i]), uint64_t(position[i]));
  }
  return out;
}

}  // namespace metareward

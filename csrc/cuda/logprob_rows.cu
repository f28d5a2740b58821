// Log-prob of the target, log-sum-exp and entropy of rows of logits, in one read. Never run on a GPU: off by default.
//
// A block takes a row, whatever the number of rows, so that a row's result does not depend on what else is in the call.
// Reads rows * vocabulary elements once; 5 to 8 fp32 instructions a logit, so bound by memory.
#include <cuda_runtime.h>

#include "launch.h"
#include "row_sums.h"

namespace metareward {
namespace {

constexpr int THREADS = 512;

template <bool ENTROPY, class T>
__global__ void __launch_bounds__(THREADS, 2) logprob_rows_kernel(
    const T* logits,         // [rows,vocabulary]
    const int64_t* targets,  // [rows]
    int vocabulary, float inverse_temperature, float factor /* log2(e) / temperature */,
    float* logprobs, float* lse, float* entropy) {  // [rows]
  const int64_t row = blockIdx.x;
  const T* of_row = logits + row * vocabulary;
  const float at_target = threadIdx.x == 0 ? logit_at(of_row, targets[row], vocabulary) : 0.0f;
  const Sums own = read_row<THREADS, ENTROPY>(of_row, vocabulary, factor);
  const Sums sums = merge_block<THREADS, ENTROPY>(own, factor);
  if (threadIdx.x != 0) return;
  write_row<ENTROPY>(
      sums, at_target, inverse_temperature, logprobs + row, lse + row, ENTROPY ? entropy + row : nullptr);
}

struct Arguments {
  const void* logits;
  const int64_t* targets;
  int rows, vocabulary;
  float inverse_temperature, factor;
  float *logprobs, *lse, *entropy;
  cudaStream_t stream;
};

template <class T>
cudaError_t launch(const Arguments& a) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(a.rows));
  config.blockDim = dim3(THREADS);
  config.stream = a.stream;
  return cudaLaunchKernelEx(
      &config, a.entropy != nullptr ? logprob_rows_kernel<true, T> : logprob_rows_kernel<false, T>,
      static_cast<const T*>(a.logits), a.targets, a.vocabulary, a.inverse_temperature, a.factor, a.logprobs, a.lse,
      a.entropy);
}

}  // namespace

const char* launch_logprob_rows(
    const void* logits, Element element, const int64_t* targets, int64_t rows, int64_t vocabulary, double temperature,
    float* logprobs, float* lse, float* entropy, int device, void* stream) {
  cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  const Arguments arguments = {
      logits, targets, static_cast<int>(rows), static_cast<int>(vocabulary), static_cast<float>(1.0 / temperature),
      static_cast<float>(1.4426950408889634 / temperature), logprobs, lse, entropy, static_cast<cudaStream_t>(stream)};
  switch (element) {
    case Element::FLOAT: status = launch<float>(arguments); break;
    case Element::BFLOAT16: status = launch<bf16>(arguments); break;
    case Element::HALF: status = launch<f16>(arguments); break;
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace metareward

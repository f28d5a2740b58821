// Log-probs of rows of logits, and scale (onehot - softmax) over the logits or into `out`, in one launch. Never run on a
// GPU: off by default.
//
// For callers that apply a row's coefficient later. One block of 1,024 threads is on a multiprocessor, with one row at a
// time, so the rows under way (34 MB on an H100 for 128,256 bf16 logits, 27 MB on an A100) should fit the second-level
// cache: what the second pass reads, last part first, should still be there. Device memory then sees every logit read
// once and written once, where the two separate passes read it twice. That this holds has not been measured.
#include <cuda_runtime.h>

#include <type_traits>

#include "launch.h"
#include "row_sums.h"

namespace metareward {
namespace {

constexpr int THREADS = 1024;
constexpr int UNROLL = 2;  // packs a thread has in flight when it writes

struct Softmax {
  float top, factor, inverse_sum, scale;
  int target;
};

// The maximum is subtracted first and the sum divided by, so that no rounding of a log-sum-exp is in p.
template <int N>
__device__ void residual(float (&values)[N], int column, const Softmax& row) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float p = exp2_fast((values[i] - row.top) * row.factor) * row.inverse_sum;
    values[i] = row.scale * ((column + i == row.target ? 1.0f : 0.0f) - p);
  }
}

// PACK: columns that are read and written at once, 16 bytes of `out`; 1 where rows of the two are aligned differently.
template <int PACK, class T, class U>
__device__ void write_residuals(const T* from, U* to, int vocabulary, const Softmax& row) {
  const int head = PACK == 1 ? 0 : unaligned_head(to, vocabulary);
  const int packs = (vocabulary - head) / PACK;
  const int tail = vocabulary - head - packs * PACK;
  const int thread = threadIdx.x;
  if (PACK > 1 && thread < head + tail) {
    const int column = thread < head ? thread : packs * PACK + thread;
    float value[1];
    load(from + column, value);
    residual(value, column, row);
    store(to + column, value);
  }
  constexpr int STEP = UNROLL * THREADS;
  for (int start = (packs - 1) / STEP * STEP; start >= 0; start -= STEP) {
    float values[UNROLL][PACK];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int at = start + u * THREADS + thread;
      if (at < packs) load(from + head + at * PACK, values[u]);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int at = start + u * THREADS + thread;
      if (at < packs) {
        residual(values[u], head + at * PACK, row);
        store(to + head + at * PACK, values[u]);
      }
    }
  }
}

template <int PACK, bool ENTROPY, class T, class U>
__global__ void __launch_bounds__(THREADS, 1) softmax_residual_rows_kernel(
    const T* logits,         // [rows,vocabulary]
    const int64_t* targets,  // [rows]
    int vocabulary, float inverse_temperature, float factor /* log2(e) / temperature */, float scale,
    float* logprobs, float* lse, float* entropy,  // [rows]
    U* out) {                // [rows,vocabulary], may be `logits`
  const int64_t row = blockIdx.x;
  const T* from = logits + row * vocabulary;
  const int64_t target = targets[row];
  const bool known = target >= 0 && target < vocabulary;
  const float at_target = logit_at(from, target, vocabulary);  // before it is written over
  const Sums own = read_row<THREADS, ENTROPY>(from, vocabulary, factor);
  const Sums sums = merge_block<THREADS, ENTROPY>(own, factor);
  __shared__ float top, inverse_sum;
  if (threadIdx.x == 0) {
    write_row<ENTROPY>(
        sums, at_target, inverse_temperature, logprobs + row, lse + row, ENTROPY ? entropy + row : nullptr);
    top = sums.top;
    inverse_sum = 1.0f / sums.sum;
  }
  __syncthreads();  // and every thread has read its share
  const Softmax softmax = {
      top, factor, inverse_sum, known ? scale : not_a_number(), known ? static_cast<int>(target) : -1};
  write_residuals<PACK>(from, out + row * vocabulary, vocabulary, softmax);
}

struct Arguments {
  const void* logits;
  const int64_t* targets;
  int rows, vocabulary;
  float inverse_temperature, factor, scale;
  float *logprobs, *lse, *entropy;
  void* out;
  cudaStream_t stream;
};

template <int PACK, class T, class U>
cudaError_t launch(const Arguments& a) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(a.rows));
  config.blockDim = dim3(THREADS);
  config.stream = a.stream;
  return cudaLaunchKernelEx(
      &config,
      a.entropy != nullptr ? softmax_residual_rows_kernel<PACK, true, T, U>
                           : softmax_residual_rows_kernel<PACK, false, T, U>,
      static_cast<const T*>(a.logits), a.targets, a.vocabulary, a.inverse_temperature, a.factor, a.scale, a.logprobs,
      a.lse, a.entropy, static_cast<U*>(a.out));
}

template <class T, class U>
cudaError_t launch_as_aligned(const Arguments& a) {
  constexpr int PACK = 16 / sizeof(U);
  if constexpr (std::is_same_v<T, U>) {
    return launch<PACK, T, U>(a);  // in place: the same alignment
  } else {
    return same_alignment<T, U>(a.logits, a.out, a.vocabulary) ? launch<PACK, T, U>(a) : launch<1, T, U>(a);
  }
}

}  // namespace

const char* launch_softmax_residual_rows(
    const void* logits, Element element, const int64_t* targets, int64_t rows, int64_t vocabulary, double temperature,
    double scale, float* logprobs, float* lse, float* entropy, void* out, Element out_element, int device,
    void* stream) {
  cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  if ((out == logits) != (out_element == element)) return "out must be the logits, or of another dtype";
  if (element != Element::FLOAT && out != logits) return "half-precision logits are written in place";
  const Arguments a = {
      logits, targets, static_cast<int>(rows), static_cast<int>(vocabulary), static_cast<float>(1.0 / temperature),
      static_cast<float>(1.4426950408889634 / temperature), static_cast<float>(scale), logprobs, lse, entropy, out,
      static_cast<cudaStream_t>(stream)};
  if (element == Element::BFLOAT16) {
    status = launch_as_aligned<bf16, bf16>(a);
  } else if (element == Element::HALF) {
    status = launch_as_aligned<f16, f16>(a);
  } else if (out_element == Element::FLOAT) {
    status = launch_as_aligned<float, float>(a);
  } else {
    status = out_element == Element::BFLOAT16 ? launch_as_aligned<float, bf16>(a) : launch_as_aligned<float, f16>(a);
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace metareward

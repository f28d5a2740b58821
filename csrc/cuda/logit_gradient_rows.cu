// Gradient of log-probs with respect to logits, over the logits or into `out`. Never run on a GPU: off by default.
//
// The log-sum-exp comes from the forward pass, so that every logit is read once and written once; what a coefficient of
// `linear_preference` is depends on all rows of a pair, so this pass cannot be merged with the one before it. A block
// takes part of a row. Elements do not depend on each other: no atomics, any order gives the same bits.
#include <cuda_runtime.h>

#include "launch.h"
#include "rows.h"

namespace metareward {
namespace {

constexpr int THREADS = 256;
constexpr int UNROLL = 4;  // packs a thread has in flight

struct RowScalars {
  float lse, scale;  // scale: coefficient / temperature
  int target;
};

// scale * (onehot - p) at N columns; the target's is formed in fp32, before it is rounded.
template <int N>
__device__ void gradient(float (&values)[N], int column, const RowScalars& row, float inverse_temperature) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float p = exp2_fast(fmaf(values[i], inverse_temperature, -row.lse) * LOG2E);
    values[i] = row.scale * ((column + i == row.target ? 1.0f : 0.0f) - p);
  }
}

// PACK: columns that are read and written at once, 16 bytes of `out`; 1 where rows of the two are aligned differently.
// No __restrict__: `out` may be `logits`; a thread reads a column before it writes it, and no other thread does either.
template <int PACK, class T, class U>
__global__ void __launch_bounds__(THREADS, 4) logit_gradient_rows_kernel(
    const T* logits,           // [rows,vocabulary]
    const int64_t* targets,    // [rows]
    const float* lse,          // [rows]
    const float* coefficient,  // [rows]
    int vocabulary, int blocks_a_row, float inverse_temperature,
    U* out) {                  // [rows,vocabulary]
  const int64_t row = blockIdx.x / blocks_a_row;
  const int part = static_cast<int>(blockIdx.x - row * blocks_a_row);
  const T* from = logits + row * vocabulary;
  U* to = out + row * vocabulary;
  const int64_t target = targets[row];
  const bool known = target >= 0 && target < vocabulary;
  // A target outside the vocabulary has no gradient: NaN, so that it is not missed.
  const RowScalars scalars = {
      lse[row], known ? coefficient[row] * inverse_temperature : not_a_number(), known ? static_cast<int>(target) : -1};

  const int head = PACK == 1 ? 0 : unaligned_head(to, vocabulary);
  const int packs = (vocabulary - head) / PACK;
  const int tail = vocabulary - head - packs * PACK;
  const int thread = threadIdx.x;
  if (PACK > 1 && part == 0 && thread < head + tail) {
    const int column = thread < head ? thread : packs * PACK + thread;
    float value[1];
    load(from + column, value);
    gradient(value, column, scalars, inverse_temperature);
    store(to + column, value);
  }
  const int first = part * (UNROLL * THREADS) + thread;
  float values[UNROLL][PACK];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int at = first + u * THREADS;
    if (at < packs) load(from + head + at * PACK, values[u]);
  }
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int at = first + u * THREADS;
    if (at >= packs) return;
    gradient(values[u], head + at * PACK, scalars, inverse_temperature);
    store(to + head + at * PACK, values[u]);
  }
}

struct Arguments {
  const void* logits;
  const int64_t* targets;
  const float *lse, *coefficient;
  int64_t rows;
  int vocabulary;
  float inverse_temperature;
  void* out;
  cudaStream_t stream;
};

template <int PACK, class T, class U>
const char* launch(const Arguments& a) {
  const int64_t block_columns = int64_t{PACK} * UNROLL * THREADS;
  const int64_t blocks_a_row = (a.vocabulary + block_columns - 1) / block_columns;
  if (a.rows * blocks_a_row > 0x7fffffff) return "too many rows for one launch: give them in parts";
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(a.rows * blocks_a_row));
  config.blockDim = dim3(THREADS);
  config.stream = a.stream;
  const cudaError_t status = cudaLaunchKernelEx(
      &config, logit_gradient_rows_kernel<PACK, T, U>, static_cast<const T*>(a.logits), a.targets, a.lse,
      a.coefficient, a.vocabulary, static_cast<int>(blocks_a_row), a.inverse_temperature, static_cast<U*>(a.out));
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template <class T, class U>
const char* launch_as_aligned(const Arguments& a) {
  constexpr int PACK = 16 / sizeof(U);
  const bool alike = a.out == a.logits || same_alignment<T, U>(a.logits, a.out, a.vocabulary);
  return alike ? launch<PACK, T, U>(a) : launch<1, T, U>(a);
}

}  // namespace

const char* launch_logit_gradient_rows(
    const void* logits, Element element, const int64_t* targets, const float* lse, const float* coefficient,
    int64_t rows, int64_t vocabulary, double temperature, void* out, Element out_element, int device, void* stream) {
  const cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  const Arguments a = {
      logits, targets, lse, coefficient, rows, static_cast<int>(vocabulary), static_cast<float>(1.0 / temperature), out,
      static_cast<cudaStream_t>(stream)};
  if (element == Element::FLOAT) {
    if (out_element == Element::BFLOAT16) return launch_as_aligned<float, bf16>(a);
    if (out_element == Element::HALF) return launch_as_aligned<float, f16>(a);
    return launch_as_aligned<float, float>(a);
  }
  if (element != out_element) return "out of half-precision logits must be of their dtype";
  return element == Element::BFLOAT16 ? launch_as_aligned<bf16, bf16>(a) : launch_as_aligned<f16, f16>(a);
}

}  // namespace metareward

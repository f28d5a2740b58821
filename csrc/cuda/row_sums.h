// Running maximum, sum and entropy sum of a row of logits, read once by a block. Never run on a GPU.
//
// Threads keep a running maximum and sum (Milakov and Gimelshein, arXiv 1805.02867); they are merged in a fixed order,
// without atomics.
#pragma once

#include "rows.h"

namespace metareward {

constexpr int LOADS = 4;  // of 16 bytes, that a thread has in flight

// e^-7000 is 0 in fp32 whatever the sum: exponents stop there, so that none is -inf and 0 * exponent is 0.
constexpr float LOWEST = -10000.0f;

// Of some of a row's logits z, with x = log2(e) (z - top) / temperature.
struct Sums {
  float top;       // the largest, -inf of none
  float sum;       // of 2^x; at least 1 where top is finite, as the largest adds exactly 1
  float weighted;  // of x 2^x, for the entropy
};

__device__ inline float finite_or_zero(float top) { return top == minus_infinity() ? 0.0f : top; }

// The sums of the same logits relative to a larger top. NaN and +inf in the logits stay in the sum as NaN.
template <bool ENTROPY>
__device__ inline void move_top(Sums& of, float top, float factor) {
  const float step = fmaxf((of.top - finite_or_zero(top)) * factor, LOWEST);
  const float decay = exp2_fast(step);
  if (ENTROPY) of.weighted = (of.weighted + of.sum * step) * decay;
  of.sum *= decay;
  of.top = top;
}

template <bool ENTROPY, int N>
__device__ inline void add(Sums& of, const float (&logits)[N], float factor) {
  float top = of.top;
#pragma unroll
  for (int i = 0; i < N; ++i) top = fmaxf(top, logits[i]);
  move_top<ENTROPY>(of, top, factor);
  const float base = finite_or_zero(top);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float x = (logits[i] - base) * factor;  // not one FMA: the largest must give exactly 0
    const float term = exp2_fast(x);
    of.sum += term;
    if (ENTROPY) of.weighted += term * fmaxf(x, LOWEST);
  }
}

template <bool ENTROPY>
__device__ inline Sums merge(Sums a, Sums b, float factor) {
  const float top = fmaxf(a.top, b.top);
  move_top<ENTROPY>(a, top, factor);
  move_top<ENTROPY>(b, top, factor);
  return {top, a.sum + b.sum, a.weighted + b.weighted};
}

// The warp's sums, in lane 0.
template <bool ENTROPY>
__device__ inline Sums merge_warp(Sums own, float factor) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    Sums other;
    other.top = __shfl_down_sync(0xffffffffu, own.top, distance);
    other.sum = __shfl_down_sync(0xffffffffu, own.sum, distance);
    other.weighted = ENTROPY ? __shfl_down_sync(0xffffffffu, own.weighted, distance) : 0.0f;
    own = merge<ENTROPY>(own, other, factor);
  }
  return own;
}

// The sums of a block of THREADS, in thread 0.
template <int THREADS, bool ENTROPY>
__device__ inline Sums merge_block(Sums own, float factor) {
  constexpr int WARPS = THREADS / WARP;
  __shared__ Sums of_warp[WARPS];
  const int lane = threadIdx.x % WARP;
  own = merge_warp<ENTROPY>(own, factor);
  if (lane == 0) of_warp[threadIdx.x / WARP] = own;
  __syncthreads();
  if (threadIdx.x >= WARP) return own;
  own = lane < WARPS ? of_warp[lane] : Sums{minus_infinity(), 0.0f, 0.0f};
  return merge_warp<ENTROPY>(own, factor);
}

// This thread's share of a row: 16 bytes at a time between an unaligned head and a tail.
template <int THREADS, bool ENTROPY, class T>
__device__ inline Sums read_row(const T* row, int vocabulary, float factor) {
  constexpr int PACK = 16 / sizeof(T);
  Sums own = {minus_infinity(), 0.0f, 0.0f};
  const int head = unaligned_head(row, vocabulary);
  const int packs = (vocabulary - head) / PACK;
  const int tail = vocabulary - head - packs * PACK;
  const int thread = threadIdx.x;
  const T* aligned = row + head;
  if (thread < head + tail) {  // fewer than 2 * PACK
    float value[1];
    load(thread < head ? row + thread : aligned + packs * PACK + (thread - head), value);
    add<ENTROPY>(own, value, factor);
  }
  const uint4* words = reinterpret_cast<const uint4*>(aligned);
  int at = thread;
  for (; at < packs - (LOADS - 1) * THREADS; at += LOADS * THREADS) {
    uint4 read[LOADS];
#pragma unroll
    for (int u = 0; u < LOADS; ++u) read[u] = words[at + u * THREADS];
#pragma unroll
    for (int u = 0; u < LOADS; ++u) {
      float values[PACK];
      unpack16<T>(read[u], values);
      add<ENTROPY>(own, values, factor);
    }
  }
  for (; at < packs; at += THREADS) {
    float values[PACK];
    unpack16<T>(words[at], values);
    add<ENTROPY>(own, values, factor);
  }
  return own;
}

// What a row's sums say, written by one thread.
template <bool ENTROPY>
__device__ inline void write_row(
    const Sums& sums, float at_target, float inverse_temperature, float* logprob, float* lse, float* entropy) {
  const float log_sum = sums.top == minus_infinity() ? not_a_number() : logf(sums.sum);
  // Both terms are of this row: the first is at most 0 and the sum at least 1, so log p <= 0 without a clamp.
  *logprob = (at_target - sums.top) * inverse_temperature - log_sum;
  *lse = sums.top * inverse_temperature + log_sum;
  if (ENTROPY) {
    const float nats = log_sum - LN2 * sums.weighted / sums.sum;
    *entropy = nats < 0.0f ? 0.0f : nats;  // NaN stays
  }
}

// The logit of the row's target; NaN for one outside the vocabulary, which is not read.
template <class T>
__device__ inline float logit_at(const T* row, int64_t target, int vocabulary) {
  return target >= 0 && target < vocabulary ? to_float(row[target]) : not_a_number();
}

}  // namespace metareward

// The PTX instructions that the row kernels use, all of sm_80 and later. Never run on a GPU.
//
// Conversions are one instruction each, so that no CUDA header for bfloat16 and float16 is needed. The tests put C++ in
// the place of this file (tests/cuda_on_cpu), hence a guard with a name.
#ifndef METAREWARD_PTX_H
#define METAREWARD_PTX_H

#include <cstdint>

namespace metareward {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// 2^x to 2 ulp; exactly 1 at 0, exactly 0 at -inf; results below 2^-126 are 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float f16_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// Two numbers rounded to nearest even, the first in the low half.
__device__ inline uint32_t round_pair(float low, float high, bf16) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ inline uint32_t round_pair(float low, float high, f16) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace metareward

#endif  // METAREWARD_PTX_H

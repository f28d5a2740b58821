// Enough of CUDA to compile the row kernels of csrc/cuda as C++ and to run them on a CPU, for tests of what they compute.
//
// Blocks run one after the other; the threads of a block are fibers that run in turn, each until it waits at a barrier
// or a shuffle. So arithmetic, masks, offsets and the order of merges are those of the GPU; races, memory coalescing and
// the rounding of ex2.approx are not tested. A barrier that not all threads reach ends the process with a message.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

struct dim3 {
  unsigned x;
  dim3(unsigned n = 1) : x(n) {}
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline float __uint_as_float(uint32_t x) { return same_bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return same_bits<uint32_t>(x); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace cuda_on_cpu {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 32 << 10;

// The first block that a launch runs: tests of offsets beyond 2^31 run the last ones only.
extern unsigned first_block;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
  bool running = false;
  unsigned block_barriers = 0, warp_barriers = 0;  // that it has reached
  float offered = 0.0f;                            // to a shuffle
};

struct Machine {
  std::vector<Fiber> fibers;
  std::function<void()> kernel;
  ucontext_t scheduler;
  unsigned threads = 0, current = 0;
  bool moved = false;
};
extern Machine machine;

inline void step_aside() { swapcontext(&machine.fibers[machine.current].context, &machine.scheduler); }

// Wait until all threads from `begin` to `end` have reached as many barriers as this one.
inline void barrier(unsigned Fiber::*count, unsigned begin, unsigned end) {
  const unsigned reached = ++(machine.fibers[machine.current].*count);
  machine.moved = true;
  for (unsigned i = begin; i < end; ++i) {
    while (machine.fibers[i].*count < reached) step_aside();
  }
}

inline void warp_barrier() {
  const unsigned begin = machine.current / WARP * WARP;
  barrier(&Fiber::warp_barriers, begin, begin + WARP);
}

inline void fiber_body() {
  machine.kernel();
  machine.fibers[machine.current].running = false;
  machine.moved = true;
}

void run_block(unsigned block);

}  // namespace cuda_on_cpu

struct BlockIndex {
  unsigned x;
};
struct ThreadIndex {  // that of the fiber that reads it
  struct {
    operator unsigned() const { return cuda_on_cpu::machine.current; }
  } x;
};
extern BlockIndex blockIdx;
extern ThreadIndex threadIdx;

inline void __syncthreads() {
  cuda_on_cpu::barrier(&cuda_on_cpu::Fiber::block_barriers, 0, cuda_on_cpu::machine.threads);
}

inline float __shfl_down_sync(unsigned mask, float value, int distance) {
  using namespace cuda_on_cpu;
  if (mask != 0xffffffffu) std::abort();
  const unsigned own = machine.current;
  machine.fibers[own].offered = value;
  warp_barrier();
  const unsigned from = own % WARP + distance < WARP ? own + distance : own;
  const float found = machine.fibers[from].offered;
  warp_barrier();
  return found;
}

template <class... Parameters, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Given&&... given) {
  using namespace cuda_on_cpu;
  machine.threads = config->blockDim.x;
  if (machine.fibers.size() < machine.threads) machine.fibers.resize(machine.threads);
  machine.kernel = [&] { kernel(given...); };
  for (unsigned block = first_block; block < config->gridDim.x; ++block) run_block(block);
  return cudaSuccess;
}

// In the place of csrc/cuda/ptx.h.
#define METAREWARD_PTX_H

namespace metareward {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // ftz; NaN stays
}

inline float f16_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float x = exponent == 0 ? std::ldexp(float(fraction), -24) : std::ldexp(float(1024 + fraction), exponent - 25);
  if (exponent == 31) x = fraction == 0 ? INFINITY : NAN;
  return bits >> 15 ? -x : x;
}

inline uint16_t f16_from_float(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (x != x) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  const int exponent = size < 6.103515625e-05f ? -14 : std::ilogb(size);  // the smallest normal number
  const int steps = int(std::nearbyint(std::ldexp(size, 10 - exponent)));  // to even; a carry raises the exponent
  return uint16_t(sign | (((exponent + 14) << 10) + steps));
}

inline uint32_t round_pair(float low, float high, bf16) {
  const auto rounded = [](float x) -> uint32_t {
    const uint32_t bits = same_bits<uint32_t>(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  };
  return rounded(high) << 16 | rounded(low);
}

inline uint32_t round_pair(float low, float high, f16) {
  return uint32_t{f16_from_float(high)} << 16 | f16_from_float(low);
}

}  // namespace metareward

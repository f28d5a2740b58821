// The scheduler of cuda_runtime.h beside this file, and the launchers of csrc/cuda with C names for ctypes.
#include <cuda_runtime.h>

#include "launch.h"

BlockIndex blockIdx;
ThreadIndex threadIdx;

namespace cuda_on_cpu {

unsigned first_block = 0;
Machine machine;

void run_block(unsigned block) {
  blockIdx.x = block;
  for (unsigned i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.running = true;
    fiber.block_barriers = fiber.warp_barriers = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &machine.scheduler;
    makecontext(&fiber.context, fiber_body, 0);
  }
  for (bool any = true; any;) {
    any = machine.moved = false;
    for (unsigned i = 0; i < machine.threads; ++i) {
      if (!machine.fibers[i].running) continue;
      any = true;
      machine.current = i;
      swapcontext(&machine.scheduler, &machine.fibers[i].context);
    }
    if (any && !machine.moved) {
      std::fprintf(stderr, "block %u: a barrier that not all threads reach\n", block);
      std::abort();
    }
  }
}

}  // namespace cuda_on_cpu

using metareward::Element;

extern "C" {

void set_first_block(unsigned block) { cuda_on_cpu::first_block = block; }

const char* logprob_rows(
    const void* logits, int element, const int64_t* targets, int64_t rows, int64_t vocabulary, double temperature,
    float* logprobs, float* lse, float* entropy) {
  return metareward::launch_logprob_rows(
      logits, Element(element), targets, rows, vocabulary, temperature, logprobs, lse, entropy, 0, nullptr);
}

const char* softmax_residual_rows(
    const void* logits, int element, const int64_t* targets, int64_t rows, int64_t vocabulary, double temperature,
    double scale, float* logprobs, float* lse, float* entropy, void* out, int out_element) {
  return metareward::launch_softmax_residual_rows(
      logits, Element(element), targets, rows, vocabulary, temperature, scale, logprobs, lse, entropy, out,
      Element(out_element), 0, nullptr);
}

const char* logit_gradient_rows(
    const void* logits, int element, const int64_t* targets, const float* lse, const float* coefficient, int64_t rows,
    int64_t vocabulary, double temperature, void* out, int out_element) {
  return metareward::launch_logit_gradient_rows(
      logits, Element(element), targets, lse, coefficient, rows, vocabulary, temperature, out, Element(out_element), 0,
      nullptr);
}
}

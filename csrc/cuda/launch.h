// Launchers of the CUDA kernels, in plain C++: the .cu files see no PyTorch, and ops.cpp sees no CUDA header.
//
// All pointers are on `device`, `stream` is a cudaStream_t of it. Returns nullptr, or why the launch failed.
#pragma once

#include <cstdint>

namespace metareward {

enum class Element { FLOAT, BFLOAT16, HALF };

// Log-prob of the target, log-sum-exp and, where `entropy` is not null, entropy of every row; float32 [rows].
const char* launch_logprob_rows(
    const void* logits,      // [rows,vocabulary], contiguous
    Element element,         // of the logits
    const int64_t* targets,  // [rows]
    int64_t rows, int64_t vocabulary, double temperature,
    float* logprobs, float* lse, float* entropy,  // [rows]
    int device, void* stream);

// What launch_logprob_rows gives, and scale * (onehot - softmax(logits / temperature)) in `out`, which is the logits or,
// for FLOAT logits, BFLOAT16 or HALF.
const char* launch_softmax_residual_rows(
    const void* logits,      // [rows,vocabulary], contiguous
    Element element,         // of the logits
    const int64_t* targets,  // [rows]
    int64_t rows, int64_t vocabulary, double temperature, double scale,
    float* logprobs, float* lse, float* entropy,  // [rows]
    void* out,               // [rows,vocabulary], contiguous
    Element out_element, int device, void* stream);

// coefficient * (onehot - softmax) / temperature of every row. `out` may be `logits`, then of the same element.
const char* launch_logit_gradient_rows(
    const void* logits,        // [rows,vocabulary], contiguous
    Element element,           // of the logits
    const int64_t* targets,    // [rows]
    const float* lse,          // [rows]
    const float* coefficient,  // [rows]
    int64_t rows, int64_t vocabulary, double temperature,
    void* out,                 // [rows,vocabulary], contiguous
    Element out_element,       // that of the logits, or BFLOAT16 or HALF of FLOAT
    int device, void* stream);

}  // namespace metareward

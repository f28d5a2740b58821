// Compiles METAREWARD_SIMD_BODY once for each instruction set, so that one binary is fast on every machine.
//
// A wheel is built on one machine and runs on another, so -march=native is out; GCC and Clang can compile a function
// for an instruction set the build does not assume, and the machine is asked when the library runs. The body lands
// in the namespaces `generic`, `avx2` and `avx512`, the last with METAREWARD_AVX512 defined. It may call nothing but
// itself and intrinsics: an inline std:: function compiled for AVX-512 could be picked by the linker for everybody.
// A file that defines METAREWARD_SIMD_BF16 first gets `avx512bf16` too, with METAREWARD_AVX512_BF16 defined.
// Use: #define METAREWARD_SIMD_BODY "x_body.h", include this file inside the file's own namespace, then
// METAREWARD_SIMD_PICK(function) is the best version of `function` here.

namespace generic {
#include METAREWARD_SIMD_BODY
}

#if defined(__x86_64__) && defined(__GNUC__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#include METAREWARD_SIMD_BODY
}
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define METAREWARD_AVX512
namespace avx512 {
#include METAREWARD_SIMD_BODY
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(METAREWARD_SIMD_BF16)
#if defined(__clang__)
#pragma clang attribute push(                                                                     \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
#define METAREWARD_AVX512_BF16
namespace avx512bf16 {
#include METAREWARD_SIMD_BODY
}
#undef METAREWARD_AVX512_BF16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#define METAREWARD_HAS_BF16 __builtin_cpu_supports("avx512bf16")
#else
namespace avx512bf16 = avx512;
#define METAREWARD_HAS_BF16 false
#endif
#undef METAREWARD_AVX512

#if defined(METAREWARD_SIMD_ONLY)  // -DMETAREWARD_SIMD_ONLY=avx2, to test and time the other versions
#define METAREWARD_SIMD_PICK(function) (METAREWARD_SIMD_ONLY::function)
#else
#define METAREWARD_SIMD_PICK(function)                                                    \
  (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&             \
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")       \
       ? (METAREWARD_HAS_BF16 ? avx512bf16::function : avx512::function)                  \
       : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2::function \
                                                                         : generic::function)
#endif
#else
#define METAREWARD_SIMD_PICK(function) (generic::function)
#endif

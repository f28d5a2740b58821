// Compiles METAREWARD_BF16_BODY for AVX-512 BF16 alone, in the namespace avx512bf16; see for_each_simd.h for the rules. To be
// included inside the file's own namespace, after <immintrin.h>.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
namespace avx512bf16 {
#include METAREWARD_BF16_BODY
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// What the row kernels share: elements read as floats and written back, 16 bytes at a time. Never run on a GPU.
#pragma once

#include <cstdint>

#include "ptx.h"

namespace metareward {

constexpr float LOG2E = 1.44269504f;
constexpr float LN2 = 0.693147181f;
constexpr int WARP = 32;

__device__ inline float minus_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }
__device__ inline float not_a_number() { return __int_as_float(0x7fc00000); }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float to_float(f16 x) { return f16_to_float(x.bits); }

__device__ inline void store_one(float* to, float x) { *to = x; }
template <class U>
__device__ inline void store_one(U* to, float x) {
  to->bits = static_cast<uint16_t>(round_pair(x, 0.0f, U{}) & 0xffffu);
}

__device__ inline void unpack(uint32_t word, float* values, float) { values[0] = __uint_as_float(word); }
__device__ inline void unpack(uint32_t word, float* values, bf16) {
  values[0] = __uint_as_float(word << 16);
  values[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ inline void unpack(uint32_t word, float* values, f16) {
  values[0] = f16_to_float(static_cast<uint16_t>(word & 0xffffu));
  values[1] = f16_to_float(static_cast<uint16_t>(word >> 16));
}

// The four words of 16 bytes as 16 / sizeof(T) numbers.
template <class T>
__device__ inline void unpack16(uint4 words, float* values) {
  constexpr int EACH = 4 / sizeof(T);
  unpack(words.x, values, T{});
  unpack(words.y, values + EACH, T{});
  unpack(words.z, values + 2 * EACH, T{});
  unpack(words.w, values + 3 * EACH, T{});
}

// N numbers from an address that is a multiple of 16 bytes, or one from any.
template <int N, class T>
__device__ inline void load(const T* from, float (&values)[N]) {
  if constexpr (N == 1) {
    values[0] = to_float(*from);
  } else {
    constexpr int EACH = 16 / sizeof(T);
    static_assert(N % EACH == 0, "whole 16 bytes");
#pragma unroll
    for (int i = 0; i < N / EACH; ++i) unpack16<T>(reinterpret_cast<const uint4*>(from)[i], values + i * EACH);
  }
}

__device__ inline uint32_t pack_word(const float* values, float) { return __float_as_uint(values[0]); }
template <class U>
__device__ inline uint32_t pack_word(const float* values, U) {
  return round_pair(values[0], values[1], U{});
}

// 16 bytes to an address that is a multiple of 16, or one number to any.
template <int N, class U>
__device__ inline void store(U* to, const float (&values)[N]) {
  if constexpr (N == 1) {
    store_one(to, values[0]);
  } else {
    constexpr int EACH = 4 / sizeof(U);
    static_assert(N == 4 * EACH, "16 bytes");
    *reinterpret_cast<uint4*>(to) = make_uint4(
        pack_word(values, U{}), pack_word(values + EACH, U{}), pack_word(values + 2 * EACH, U{}),
        pack_word(values + 3 * EACH, U{}));
  }
}

// How many of the row's first elements lie before a multiple of 16 bytes; 0 to 16 / sizeof(T) - 1, at most `n`.
template <class T>
__device__ inline int unaligned_head(const T* row, int n) {
  const int head = static_cast<int>((16 - (reinterpret_cast<uintptr_t>(row) & 15)) & 15) / static_cast<int>(sizeof(T));
  return head < n ? head : n;
}

inline bool multiple_of_16(const void* address, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && row_bytes % 16 == 0;
}

// Whether the same columns of every row lie at multiples of 16 bytes in both: the rows all begin at one.
template <class T, class U>
bool same_alignment(const void* logits, const void* out, int64_t vocabulary) {
  return multiple_of_16(logits, vocabulary * int64_t{sizeof(T)}) && multiple_of_16(out, vocabulary * int64_t{sizeof(U)});
}

}  // namespace metareward

// What the head's compiled ops share: panels of bf16 numbers, checks of the arguments, memory.
//
// METAREWARD_PANELS is defined where the ops can be compiled; the machine is asked when they run.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define METAREWARD_PANELS
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <memory>

#include "../ops.h"
#include "bf16_product.h"

namespace metareward {

constexpr int64_t PANEL = 64;  // vocabulary entries of a panel

inline const uint16_t* bf16_data(const Tensor& x) { return static_cast<const uint16_t*>(x.data_ptr()); }
inline uint16_t* mutable_bf16_data(const Tensor& x) { return static_cast<uint16_t*>(x.data_ptr()); }

// bf16 numbers that start on a cache line: a load that straddles two costs twice.
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(new uint16_t[size + 32]) {}
  uint16_t* get() const { return data_.get() + (64 - reinterpret_cast<uintptr_t>(data_.get()) % 64) % 64 / 2; }

 private:
  std::unique_ptr<uint16_t[]> data_;
};

inline void check_matrix(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16 && (x.size(1) <= 1 || x.stride(1) == 1), name,
      " must be a bfloat16 matrix with a contiguous last dimension");
}

inline const float* check_floats(const Tensor& x, int64_t size, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 1 && x.is_contiguous() && x.scalar_type() == ScalarType::Float && x.size(0) == size, name,
      " must be contiguous float32 of ", size, " elements");
  return static_cast<const float*>(x.data_ptr());
}

inline void check_panels(const Tensor& x, int64_t vocabulary, int64_t rows) {
  STD_TORCH_CHECK(
      x.dim() == 3 && x.scalar_type() == ScalarType::BFloat16 && x.is_contiguous() &&
          x.size(0) == (vocabulary + PANEL - 1) / PANEL && x.size(1) == rows && x.size(2) == PANEL &&
          reinterpret_cast<uintptr_t>(x.data_ptr()) % 64 == 0,
      "panels must be contiguous bfloat16 [ceil(V/64),C,64] on a 64-byte boundary");
}

// Fresh memory is cleared 4 KB at a time unless the system is told that it is worth 2 MB pages: a third of a product's
// time goes there. Advice alone: it may be refused.
inline void advise_huge_pages(const Tensor& x, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = uintptr_t(2) << 20, begin = (reinterpret_cast<uintptr_t>(x.data_ptr()) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(x.data_ptr()) + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline void check_avx512_bf16() {
  STD_TORCH_CHECK(bf16_linear_supported(), "this CPU has no AVX-512 BF16");
}

}  // namespace metareward

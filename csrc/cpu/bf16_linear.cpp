// x @ weight.T of bf16 numbers with the fp32 sums as they are, which PyTorch has for CUDA only (or rounded to bf16).
// Needs AVX-512 BF16; bf16_linear_supported() says whether it is here.
#if defined(__x86_64__) && defined(__GNUC__)
#define METAREWARD_BF16_LINEAR
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "../ops.h"
#include "bf16_product.h"

namespace metareward {
namespace {

#if defined(METAREWARD_BF16_LINEAR)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
namespace avx512bf16 {
#include "bf16_linear_body.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

constexpr int64_t CACHED_TILE_BYTES = 384 << 10;  // of weights at a time: they stay in a level-2 cache of 512 KB

void check_matrix(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16 && (x.size(1) <= 1 || x.stride(1) == 1), name,
      " must be a bfloat16 matrix with a contiguous last dimension");
}

const uint16_t* bf16_data(const Tensor& x) { return static_cast<const uint16_t*>(x.data_ptr()); }

#if defined(METAREWARD_BF16_LINEAR)
// The rows of x at a stride that suits the kernel: whole pairs, and 8 rows that do not fall on one set of the cache.
Tensor suitable_rows(const Tensor& x, int64_t pairs) {
  const int64_t k = x.size(1);
  if (k % 2 == 0 && (x.size(0) <= 1 || x.stride(0) % 1024 != 0)) return x;
  const int64_t stride = 2 * pairs + (2 * pairs % 1024 == 0 ? 32 : 0);
  Tensor copy = torch::stable::new_empty(x, {x.size(0), stride});
  auto* to = static_cast<uint16_t*>(copy.data_ptr());
  for (int64_t t = 0; t < x.size(0); ++t) {
    std::copy_n(bf16_data(x) + t * x.stride(0), k, to + t * stride);
    if (k % 2 != 0) to[t * stride + k] = 0;
  }
  return copy;
}

// packed == nullptr: each thread packs the tiles of `weight` as it comes to them.
void linear(const Tensor& x, const uint16_t* packed, const Tensor* weight, Tensor& out, bool gated = false) {
  const auto dtype = out.scalar_type();
  const int64_t rows = x.size(0), k = x.size(1), columns = out.size(1);
  STD_TORCH_CHECK(
      out.dim() == 2 && out.size(0) == rows && (columns <= 1 || out.stride(1) == 1) &&
          (rows <= 1 || out.stride(0) >= columns) && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
      "out must be [", rows, ",N] of float32 or bfloat16 with a contiguous last dimension");
  if (rows == 0 || columns == 0) return;
  Product a{};
  a.pairs = (k + 1) / 2;
  const Tensor read = suitable_rows(x, a.pairs);
  a.x = bf16_data(read);
  a.x_stride = read.stride(0);
  a.out = out.data_ptr();
  a.out_stride = out.stride(0);
  a.columns = columns;
  a.bf16_out = dtype == ScalarType::BFloat16;
  a.gated = gated;
  a.tile_size = 2 * TILE * a.pairs * (gated ? 2 : 1);

  // Work is cut into (part of the rows, tile): one part when the tiles alone occupy the threads.
  const int64_t tiles = (columns + TILE - 1) / TILE, tile_size = a.tile_size;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>((4 * threads + tiles - 1) / tiles, 1, (rows + 63) / 64);
  const int64_t cached = std::max<int64_t>(1, CACHED_TILE_BYTES / std::max<int64_t>(1, 2 * tile_size));
  const int64_t grain = 1 + (int64_t(1) << 20) / (TILE * std::max<int64_t>(1, k * rows / parts));
  const int64_t units = parts * tiles, busy = std::clamp<int64_t>(units / grain, 1, threads);
  // Threads draw their next tiles from one counter: cores of a shared machine are never equally fast.
  const int64_t step = std::clamp<int64_t>(units / (6 * busy), 1, cached);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, busy, 1, [&](int64_t, int64_t) {
    std::unique_ptr<uint16_t[]> scratch(packed == nullptr ? new uint16_t[step * tile_size + 32] : nullptr);
    // Tiles start on a cache line: a load that straddles two costs twice.
    uint16_t* aligned = scratch.get() + (64 - reinterpret_cast<uintptr_t>(scratch.get()) % 64) % 64 / 2;
    for (int64_t unit = next.fetch_add(step); unit < units; unit = next.fetch_add(step)) {
      for (int64_t end = std::min(unit + step, units); unit < end;) {
        const int64_t part = unit / tiles, tile = unit % tiles, count = std::min(tiles - tile, end - unit);
        const uint16_t* block = aligned;
        if (packed != nullptr) {
          block = packed + tile * tile_size;
        } else {
          for (int64_t i = 0; i < count; ++i) {
            const int64_t n = (tile + i) * TILE;
            avx512bf16::pack_tile(
                bf16_data(*weight) + n * weight->stride(0), weight->stride(0), std::min(TILE, columns - n), k,
                aligned + i * tile_size);
          }
        }
        avx512bf16::product_block(a, rows * part / parts, rows * (part + 1) / parts, block, count, tile * TILE);
        unit += count;
      }
    }
  });
}
#endif

void check_supported() {
  STD_TORCH_CHECK(bf16_linear_supported(), "this CPU has no AVX-512 BF16; use torch.nn.functional.linear");
}

}  // namespace

bool bf16_linear_supported() {
#if defined(METAREWARD_BF16_LINEAR)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

Tensor pack_bf16_weight(Tensor weight) {
  check_supported();
  check_matrix(weight, "weight");
  const int64_t columns = weight.size(0), k = weight.size(1), pairs = (k + 1) / 2, tiles = (columns + TILE - 1) / TILE;
  Tensor packed = torch::stable::new_empty(weight, {tiles, pairs, TILE, 2});
#if defined(METAREWARD_BF16_LINEAR)
  auto* to = static_cast<uint16_t*>(packed.data_ptr());
  torch::stable::parallel_for(0, tiles, 1 + 65536 / (TILE * std::max<int64_t>(1, k)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      avx512bf16::pack_tile(
          bf16_data(weight) + i * TILE * weight.stride(0), weight.stride(0), std::min(TILE, columns - i * TILE), k,
          to + i * 2 * TILE * pairs);
    }
  });
#endif
  return packed;
}

void packed_linear(Tensor x, Tensor packed, Tensor out) {
  check_supported();
  check_matrix(x, "x");
  STD_TORCH_CHECK(
      packed.dim() == 4 && packed.scalar_type() == ScalarType::BFloat16 && packed.is_contiguous() &&
          packed.size(2) == TILE && packed.size(3) == 2 && packed.size(1) == (x.size(1) + 1) / 2 && out.dim() == 2 &&
          packed.size(0) == (out.size(1) + TILE - 1) / TILE,
      "packed is not what pack_bf16_weight makes of a weight [N,K] for these x and out");
#if defined(METAREWARD_BF16_LINEAR)
  linear(x, bf16_data(packed), nullptr, out);
#endif
}

void packed_gated_linear(Tensor x, Tensor packed, Tensor out) {
  check_supported();
  check_matrix(x, "x");
  STD_TORCH_CHECK(
      packed.dim() == 5 && packed.scalar_type() == ScalarType::BFloat16 && packed.is_contiguous() &&
          packed.size(1) == 2 && packed.size(3) == TILE && packed.size(4) == 2 &&
          packed.size(2) == (x.size(1) + 1) / 2 && out.dim() == 2 &&
          packed.size(0) == (out.size(1) + TILE - 1) / TILE,
      "packed is not the stacked tiles of a gate [N,K] and an up [N,K] for these x and out");
#if defined(METAREWARD_BF16_LINEAR)
  linear(x, bf16_data(packed), nullptr, out, true);
#endif
}

void bf16_linear(Tensor x, Tensor weight, Tensor out) {
  check_supported();
  check_matrix(x, "x");
  check_matrix(weight, "weight");
  STD_TORCH_CHECK(
      out.dim() == 2 && weight.size(1) == x.size(1) && weight.size(0) == out.size(1),
      "x [T,K], weight [N,K] and out [T,N] do not fit together");
#if defined(METAREWARD_BF16_LINEAR)
  linear(x, nullptr, &weight, out);
#endif
}

}  // namespace metareward

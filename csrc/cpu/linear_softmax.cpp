// A head's softmax and its gradients from one set of logits, which are never stored: bf16 inputs, fp32 sums.
//
// The product's epilogue turns logits into 2^(z - r), r a power of two near the target's logit, while they are in the
// level-1 cache. bf16 keeps its relative precision at any magnitude, so r need not be the row's largest logit and the
// row's sum can be divided by at the end, as one factor a row: the logits are read once. Needs AVX-512 BF16.
#if defined(__x86_64__) && defined(__GNUC__)
#define METAREWARD_LINEAR_SOFTMAX
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "../ops.h"
#include "bf16_product.h"

namespace metareward {
namespace {

#if defined(METAREWARD_LINEAR_SOFTMAX)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
namespace avx512bf16 {
#include "linear_softmax_body.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

constexpr int64_t PANEL = 64;                 // vocabulary entries of a panel
constexpr int64_t SLAB = 384;                 // vocabulary entries whose exponentials are taken together: whole tiles, whole panels
constexpr int64_t PART = 2 * SLAB;            // vocabulary entries of a piece of work
constexpr int64_t ROW_BLOCK = 1024;           // rows of a piece of work
constexpr int64_t BLOCK_PAIRS = 256;          // pairs of a product's inner dimension at a time
constexpr int64_t BLOCK_TILES = 12;           // tiles at a time: with 256 pairs 590 KB of a level-2 cache of 1 MB
constexpr double LARGEST = 1099511627776.0;   // 2^40: a row whose exponentials add up to more gets another r

const uint16_t* bf16_data(const Tensor& x) { return static_cast<const uint16_t*>(x.data_ptr()); }
uint16_t* mutable_bf16_data(const Tensor& x) { return static_cast<uint16_t*>(x.data_ptr()); }

// bf16 numbers that start on a cache line: a load that straddles two costs twice.
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(new uint16_t[size + 32]) {}
  uint16_t* get() const { return data_.get() + (64 - reinterpret_cast<uintptr_t>(data_.get()) % 64) % 64 / 2; }

 private:
  std::unique_ptr<uint16_t[]> data_;
};

struct RowSums {  // of a row over a part of the vocabulary
  double sum, weighted;  // of 2^(z - reference), and of that times z - reference
  double reference;
};

struct Softmax {
  const uint16_t *hidden, *weight;
  const float* bias;  // or nullptr
  const int64_t* targets;
  uint16_t* out;  // or nullptr
  int64_t rows, vocabulary, width, hidden_stride, weight_stride, panel_stride;
  double factor;  // log2(e) / temperature
  bool entropy;
};

// Panels [first, last) of a row times 2^-shift.
void shrink_row(const Softmax& a, int64_t row, int64_t first, int64_t last, double factor) {
  for (int64_t panel = first; panel < last; ++panel) {
    uint16_t* at = a.out + panel * a.panel_stride + row * PANEL;
    for (int64_t i = 0; i < PANEL; ++i) {
      const uint32_t bits = uint32_t(at[i]) << 16;
      float x;
      std::memcpy(&x, &bits, sizeof x);
      x = float(x * factor);  // by a power of two: exact, or below bf16's normal numbers
      uint32_t scaled;
      std::memcpy(&scaled, &x, sizeof scaled);
      at[i] = uint16_t(scaled >> 16);
    }
  }
}

// Exponentials of one row's logits z of a slab that starts at n; a slab that would overflow moves the row's reference.
void row_of_slab(const Softmax& a, int64_t row, int64_t part_start, int64_t n, const float* z, RowSums& sums) {
  const int64_t columns = std::min(SLAB, a.vocabulary - n);
  const float* bias = a.bias == nullptr ? nullptr : a.bias + n;
  uint16_t* out = a.out == nullptr ? nullptr : a.out + n / PANEL * a.panel_stride + row * PANEL;
  float sum, weighted = 0.0f;
  float* wanted = a.entropy ? &weighted : nullptr;
  avx512bf16::exponentials(
      z, bias, columns, float(a.factor), float(sums.reference), out, a.panel_stride, &sum, wanted);
  if (sum > LARGEST) {
    double top = -INFINITY;
    for (int64_t i = 0; i < columns; ++i) top = std::max(top, (double(z[i]) + (bias ? bias[i] : 0.0f)) * a.factor);
    if (std::isfinite(top)) {
      const double moved = std::ceil(top), shrink = std::exp2(sums.reference - moved);
      sums.weighted = shrink * (sums.weighted - (moved - sums.reference) * sums.sum);
      sums.sum *= shrink;
      if (out != nullptr) {
        avx512bf16::finish_streaming();
        shrink_row(a, row, part_start / PANEL, n / PANEL, shrink);
      }
      sums.reference = moved;
      avx512bf16::exponentials(z, bias, columns, float(a.factor), float(moved), out, a.panel_stride, &sum, wanted);
    }
  }
  sums.sum += sum;
  sums.weighted += weighted;
}

// Rows [begin, end) of one part of the vocabulary. at_target gets the target's logit where it lies in the part.
void softmax_part(
    const Softmax& a, int64_t begin, int64_t end, int64_t part, const float* guess, RowSums* sums, float* at_target) {
  const int64_t pairs = a.width / 2, tile_size = 2 * TILE * pairs;
  const Scratch tiles(SLAB / TILE * tile_size), logits(2 * avx512bf16::ROWS * SLAB);
  float* z = reinterpret_cast<float*>(logits.get());
  for (int64_t row = begin; row < end; ++row) sums[row] = {0.0, 0.0, guess[row]};
  for (int64_t n = part * PART; n < std::min((part + 1) * PART, a.vocabulary); n += SLAB) {
    const int64_t columns = std::min(SLAB, a.vocabulary - n), count = (columns + TILE - 1) / TILE;
    for (int64_t i = 0; i < count; ++i) {
      avx512bf16::pack_tile(
          a.weight + (n + i * TILE) * a.weight_stride, a.weight_stride, std::min(TILE, columns - i * TILE), a.width,
          tiles.get() + i * tile_size);
    }
    for (int64_t row = begin; row < end; row += avx512bf16::ROWS) {
      const int64_t height = std::min(avx512bf16::ROWS, end - row);
      Product product{a.hidden + row * a.hidden_stride, z, a.hidden_stride, SLAB, pairs, count * TILE, tile_size, false, false};
      avx512bf16::logit_rows(product, height, tiles.get(), count);
      for (int64_t i = 0; i < height; ++i) {
        const int64_t target = a.targets[row + i] - n;
        if (target >= 0 && target < columns) at_target[row + i] = z[i * SLAB + target] + (a.bias ? a.bias[n + target] : 0.0f);
        row_of_slab(a, row + i, part * PART, n, z + i * SLAB, sums[row + i]);
      }
    }
  }
  avx512bf16::finish_streaming();
}

void check_matrix(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16 && (x.size(1) <= 1 || x.stride(1) == 1), name,
      " must be a bfloat16 matrix with a contiguous last dimension");
}

const float* check_floats(const Tensor& x, int64_t size, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 1 && x.is_contiguous() && x.scalar_type() == ScalarType::Float && x.size(0) == size, name,
      " must be contiguous float32 of ", size, " elements");
  return static_cast<const float*>(x.data_ptr());
}

void check_panels(const Tensor& x, int64_t vocabulary, int64_t rows) {
  STD_TORCH_CHECK(
      x.dim() == 3 && x.scalar_type() == ScalarType::BFloat16 && x.is_contiguous() &&
          x.size(0) == (vocabulary + PANEL - 1) / PANEL && x.size(1) == rows && x.size(2) == PANEL &&
          reinterpret_cast<uintptr_t>(x.data_ptr()) % 64 == 0,
      "panels must be contiguous bfloat16 [ceil(V/64),C,64] on a 64-byte boundary");
}

// Fresh memory is cleared 4 KB at a time unless the system is told that it is worth 2 MB pages: a third of a product's
// time goes there. Advice alone: it may be refused.
void advise_huge_pages(const Tensor& x, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = uintptr_t(2) << 20, begin = (reinterpret_cast<uintptr_t>(x.data_ptr()) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(x.data_ptr()) + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Rows of the product at a stride that does not put 8 of them on one set of the cache.
Tensor spread_rows(const Tensor& x) {
  if (x.size(0) <= 1 || x.stride(0) % 1024 != 0) return x;
  Tensor copy = torch::stable::new_empty(x, {x.size(0), x.size(1) + 32});
  for (int64_t t = 0; t < x.size(0); ++t) {
    std::copy_n(bf16_data(x) + t * x.stride(0), x.size(1), mutable_bf16_data(copy) + t * copy.stride(0));
  }
  return copy;
}
#endif

void check_here() {
  STD_TORCH_CHECK(bf16_linear_supported(), "this CPU has no AVX-512 BF16");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_softmax(
    Tensor hidden, Tensor weight, std::optional<Tensor> bias, Tensor targets, double temperature, bool entropy,
    std::optional<Tensor> out) {
  check_here();
  const int64_t rows = hidden.size(0), vocabulary = weight.size(0);
  Tensor logprobs = torch::stable::new_empty(hidden, {rows}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(logprobs, {rows}), scale = torch::stable::new_empty(logprobs, {rows});
  Tensor entropies = torch::stable::new_empty(logprobs, {entropy ? rows : 0});
#if defined(METAREWARD_LINEAR_SOFTMAX)
  check_matrix(hidden, "hidden");
  check_matrix(weight, "weight");
  STD_TORCH_CHECK(
      hidden.size(1) == weight.size(1) && hidden.size(1) % 2 == 0, "hidden [C,H] and weight [V,H] need one even H");
  STD_TORCH_CHECK(
      targets.dim() == 1 && targets.is_contiguous() && targets.scalar_type() == ScalarType::Long &&
          targets.size(0) == rows,
      "targets must be contiguous [C] int64");
  if (out.has_value()) {
    check_panels(*out, vocabulary, rows);
    advise_huge_pages(*out, out->numel() * 2);
  }
  const Tensor read = spread_rows(hidden);
  Softmax a{};
  a.hidden = bf16_data(read);
  a.weight = bf16_data(weight);
  a.bias = bias.has_value() ? check_floats(*bias, vocabulary, "bias") : nullptr;
  a.targets = static_cast<const int64_t*>(targets.data_ptr());
  a.out = out.has_value() ? mutable_bf16_data(*out) : nullptr;
  a.rows = rows;
  a.vocabulary = vocabulary;
  a.width = hidden.size(1);
  a.hidden_stride = read.stride(0);
  a.weight_stride = weight.stride(0);
  a.panel_stride = rows * PANEL;
  a.factor = 1.4426950408889634 / temperature;
  a.entropy = entropy;

  // A first guess of every row's reference: the target's logit, which is at most the largest.
  std::vector<float> guess(rows), at_target(rows);
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t target = a.targets[t];
    STD_TORCH_CHECK(target >= 0 && target < vocabulary, "target ", target, " is outside [0, ", vocabulary - 1, "]");
    const float z = avx512bf16::dot(a.hidden + t * a.hidden_stride, a.weight + target * a.weight_stride, a.width);
    const double x = std::round((double(z) + (a.bias ? a.bias[target] : 0.0f)) * a.factor);
    guess[t] = std::isfinite(x) ? float(x) : 0.0f;
  }
  const int64_t parts = (vocabulary + PART - 1) / PART, blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
  std::vector<RowSums> sums(parts * rows);
  torch::stable::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / parts, part = i % parts;
      softmax_part(
          a, rows * block / blocks, rows * (block + 1) / blocks, part, guess.data(), sums.data() + part * rows,
          at_target.data());
    }
  });
  auto* logprob_out = static_cast<float*>(logprobs.data_ptr());
  auto* lse_out = static_cast<float*>(lse.data_ptr());
  auto* scale_out = static_cast<float*>(scale.data_ptr());
  auto* entropy_out = static_cast<float*>(entropies.data_ptr());
  torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      double reference = -INFINITY, sum = 0.0, weighted = 0.0;
      for (int64_t part = 0; part < parts; ++part) reference = std::max(reference, sums[part * rows + t].reference);
      for (int64_t part = 0; part < parts; ++part) {
        const RowSums& of = sums[part * rows + t];
        const double moved = reference - of.reference, shrink = std::exp2(-moved);
        sum += shrink * of.sum;
        weighted += shrink * (of.weighted - moved * of.sum);
        if (moved != 0.0 && a.out != nullptr) {
          const int64_t last = std::min((part + 1) * PART, vocabulary);
          shrink_row(a, t, part * PART / PANEL, (last + PANEL - 1) / PANEL, shrink);
        }
      }
      const double ln2 = 0.6931471805599453, log_sum = std::log(sum);
      const RowSums& of = sums[a.targets[t] / PART * rows + t];
      const double term = avx512bf16::exponential(at_target[t], float(a.factor), float(of.reference)) *
                          std::exp2(of.reference - reference);
      // Of a likely target the term itself, an addend of the sum: a certain one has log-prob 0. The true value is at most
      // 0: above it is rounding alone.
      const double logprob = term > 0.5 * sum ? std::log(term / sum)
                                              : (double(at_target[t]) * a.factor - reference) * ln2 - log_sum;
      logprob_out[t] = float(logprob > 0.0 ? 0.0 : logprob);
      lse_out[t] = float(reference * ln2 + log_sum);
      scale_out[t] = float(-1.0 / sum);
      if (entropy) entropy_out[t] = float(log_sum - ln2 * weighted / sum);
      if (a.out != nullptr) {  // p - 1 at the target is formed before it is rounded
        const int64_t target = a.targets[t];
        const float residual = float(term - sum);
        uint32_t bits;
        std::memcpy(&bits, &residual, sizeof bits);
        bits = residual == residual ? (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16 : 0x7FC0u;
        a.out[target / PANEL * a.panel_stride + t * PANEL + target % PANEL] = uint16_t(bits);
      }
    }
  });
#endif
  return {logprobs, lse, entropies, scale};
}

void panels_times_weight(Tensor panels, Tensor weight, Tensor out) {
  check_here();
#if defined(METAREWARD_LINEAR_SOFTMAX)
  check_matrix(weight, "weight");
  const int64_t vocabulary = weight.size(0), width = weight.size(1), rows = out.size(0);
  check_panels(panels, vocabulary, rows);
  STD_TORCH_CHECK(
      out.dim() == 2 && out.is_contiguous() && out.scalar_type() == ScalarType::Float && out.size(1) == width,
      "out must be contiguous [C,H] float32");
  if (rows == 0 || width == 0) return;
  const uint16_t* left = bf16_data(panels);
  auto* result = static_cast<float*>(out.data_ptr());
  const int64_t tiles = (width + TILE - 1) / TILE, threads = torch::stable::get_num_threads();
  const int64_t row_parts = std::clamp<int64_t>((rows + 127) / 128, 1, threads);
  const int64_t tile_parts = std::clamp<int64_t>(threads / row_parts, (tiles + BLOCK_TILES - 1) / BLOCK_TILES, tiles);
  const int64_t step = 2 * BLOCK_PAIRS;
  torch::stable::parallel_for(0, row_parts * tile_parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch block(BLOCK_TILES * BLOCK_PAIRS * TILE * 2);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row_part = item / tile_parts, tile_part = item % tile_parts;
      const int64_t first_tile = tiles * tile_part / tile_parts, last_tile = tiles * (tile_part + 1) / tile_parts;
      const int64_t first_row = rows * row_part / row_parts, last_row = rows * (row_part + 1) / row_parts;
      for (int64_t v = 0; v < vocabulary; v += step) {
        // Panels are whole: the weights beside the vocabulary's end are zeros.
        const int64_t count = std::min(step, vocabulary - v), depth = (count + PANEL - 1) / PANEL;
        const int64_t tile_size = depth * PANEL * TILE;
        for (int64_t i = first_tile; i < last_tile; ++i) {
          uint16_t* tile = block.get() + (i - first_tile) * tile_size;
          avx512bf16::pack_row_pairs<false>(
              bf16_data(weight) + v * weight.stride(0) + i * TILE, weight.stride(0), count,
              std::min(TILE, width - i * TILE), nullptr, tile);
          std::fill(tile + (count + 1) / 2 * 2 * TILE, tile + tile_size, uint16_t(0));
        }
        for (int64_t row = first_row; row < last_row; row += avx512bf16::ROWS) {
          const avx512bf16::Left rows_of{left + (v / PANEL * rows + row) * PANEL, depth, rows * PANEL, PANEL / 2};
          for (int64_t i = first_tile; i < last_tile; ++i) {
            avx512bf16::add_panel_rows(
                rows_of, std::min(avx512bf16::ROWS, last_row - row), block.get() + (i - first_tile) * tile_size,
                result + row * width + i * TILE, width, width - i * TILE, v > 0);
          }
        }
      }
    }
  });
#endif
}

Tensor scaled_bf16(Tensor x, double factor) {
  check_here();
  Tensor out = torch::stable::new_empty(x, x.sizes(), ScalarType::BFloat16);
#if defined(METAREWARD_LINEAR_SOFTMAX)
  STD_TORCH_CHECK(x.is_contiguous() && x.scalar_type() == ScalarType::Float, "x must be contiguous float32");
  advise_huge_pages(out, x.numel() * 2);
  const auto* from = static_cast<const float*>(x.data_ptr());
  torch::stable::parallel_for(0, x.numel(), 65536, [&](int64_t begin, int64_t end) {
    avx512bf16::scale_to_bf16(from + begin, end - begin, float(factor), mutable_bf16_data(out) + begin);
  });
#endif
  return out;
}

void add_panels_times_hidden(
    Tensor panels, Tensor hidden, Tensor coefficient, bool accumulate, Tensor out, std::optional<Tensor> bias_out) {
  check_here();
#if defined(METAREWARD_LINEAR_SOFTMAX)
  check_matrix(hidden, "hidden");
  const int64_t rows = hidden.size(0), width = hidden.size(1), vocabulary = out.size(0);
  check_panels(panels, vocabulary, rows);
  const float* factor = check_floats(coefficient, rows, "coefficient");
  STD_TORCH_CHECK(
      out.dim() == 2 && out.is_contiguous() && out.scalar_type() == ScalarType::Float && out.size(1) == width,
      "out must be contiguous [V,H] float32");
  float* bias = bias_out.has_value() ? const_cast<float*>(check_floats(*bias_out, vocabulary, "bias_out")) : nullptr;
  if (!accumulate) advise_huge_pages(out, out.numel() * 4);
  auto* result = static_cast<float*>(out.data_ptr());
  const uint16_t* left = bf16_data(panels);
  const int64_t tiles = (width + TILE - 1) / TILE, pairs = (rows + 1) / 2, tile_size = pairs * TILE * 2;
  const Scratch packed(tiles * tile_size);
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      avx512bf16::pack_row_pairs<true>(
          bf16_data(hidden) + i * TILE, hidden.stride(0), rows, std::min(TILE, width - i * TILE), factor,
          packed.get() + i * tile_size);
    }
  });
  const int64_t step = 2 * BLOCK_PAIRS, panel_count = panels.size(0);
  torch::stable::parallel_for(0, panel_count, 1, [&](int64_t begin, int64_t end) {
    const Scratch columns(PANEL * step);
    for (int64_t first_tile = 0; first_tile < tiles; first_tile += BLOCK_TILES) {
      const int64_t last_tile = std::min(tiles, first_tile + BLOCK_TILES);
      for (int64_t panel = begin; panel < end; ++panel) {
        const uint16_t* of = left + panel * rows * PANEL;
        const int64_t v = panel * PANEL, height = std::min(PANEL, vocabulary - v);
        for (int64_t t = 0; t < rows; t += step) {
          const int64_t count = std::min(step, rows - t), depth = (count + 1) / 2;
          const bool add = accumulate || t > 0;
          avx512bf16::pack_panel(of + t * PANEL, count, columns.get());
          for (int64_t r = 0; r < height; r += avx512bf16::ROWS) {
            const avx512bf16::Left group{columns.get() + r * depth * 2, 1, 0, depth};
            for (int64_t i = first_tile; i < last_tile; ++i) {
              avx512bf16::add_panel_columns(
                  group, std::min(avx512bf16::ROWS, height - r), packed.get() + i * tile_size + t * TILE,
                  result + (v + r) * width + i * TILE, width, width - i * TILE, add);
            }
          }
          if (bias != nullptr && first_tile == 0) {
            float sums[PANEL];
            avx512bf16::weigh_panel(of + t * PANEL, count, factor + t, sums);
            for (int64_t i = 0; i < height; ++i) bias[v + i] = sums[i] + (add ? bias[v + i] : 0.0f);
          }
        }
      }
    }
  });
#endif
}

}  // namespace metareward

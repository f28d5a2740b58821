// A head's softmax and its gradients from one set of logits, which are never stored: bf16 inputs, fp32 sums.
//
// The product's epilogue turns logits into 2^(z - r), r a power of two near the target's logit, while they are in the
// level-1 cache. bf16 keeps its relative precision at any magnitude, so r need not be the row's largest logit and the
// row's sum can be divided by at the end, as one factor a row: the logits are read once. Needs AVX-512 BF16.
#include "bf16_panels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace metareward {

#if defined(METAREWARD_PANELS)
namespace {

#define METAREWARD_BF16_BODY "linear_softmax_body.h"
#include "for_avx512_bf16.h"

constexpr int64_t SLAB = 384;  // vocabulary entries whose exponentials are taken together: whole tiles, whole panels
constexpr int64_t PART = 2 * SLAB;  // vocabulary entries of a piece of work
constexpr int64_t ROW_BLOCK = 1024;  // rows of a piece of work
constexpr double LARGEST = 1099511627776.0;  // 2^40: a row whose exponentials add up to more gets another r

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

// Rows of the product at a stride that does not put 8 of them on one set of the cache.
Tensor spread_rows(const Tensor& x) {
  if (x.size(0) <= 1 || x.stride(0) % 1024 != 0) return x;
  Tensor copy = torch::stable::new_empty(x, {x.size(0), x.size(1) + 32});
  for (int64_t t = 0; t < x.size(0); ++t) {
    std::copy_n(bf16_data(x) + t * x.stride(0), x.size(1), mutable_bf16_data(copy) + t * copy.stride(0));
  }
  return copy;
}

}  // namespace
#endif

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_softmax(
    Tensor hidden, Tensor weight, std::optional<Tensor> bias, Tensor targets, double temperature, bool entropy,
    std::optional<Tensor> out) {
  check_avx512_bf16();
  const int64_t rows = hidden.size(0), vocabulary = weight.size(0);
  Tensor logprobs = torch::stable::new_empty(hidden, {rows}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(logprobs, {rows}), scale = torch::stable::new_empty(logprobs, {rows});
  Tensor entropies = torch::stable::new_empty(logprobs, {entropy ? rows : 0});
#if defined(METAREWARD_PANELS)
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

}  // namespace metareward

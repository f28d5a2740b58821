// A head's two gradient products from what linear_softmax.cpp leaves in panels: bf16 inputs, fp32 sums. Needs AVX-512 BF16.
#include "bf16_panels.h"

#include <algorithm>
#include <cstdint>
#include <optional>

namespace metareward {

#if defined(METAREWARD_PANELS)
namespace {

#define METAREWARD_BF16_BODY "panel_products_body.h"
#include "for_avx512_bf16.h"

constexpr int64_t BLOCK_PAIRS = 256;  // pairs of a product's inner dimension at a time
constexpr int64_t BLOCK_TILES = 12;  // tiles at a time: with 256 pairs 590 KB of a level-2 cache of 1 MB

}  // namespace
#endif

void panels_times_weight(Tensor panels, Tensor weight, Tensor out) {
  check_avx512_bf16();
#if defined(METAREWARD_PANELS)
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
  check_avx512_bf16();
  Tensor out = torch::stable::new_empty(x, x.sizes(), ScalarType::BFloat16);
#if defined(METAREWARD_PANELS)
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
  check_avx512_bf16();
#if defined(METAREWARD_PANELS)
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

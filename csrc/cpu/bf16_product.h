// What the products of bf16 matrices share: the width of a packed tile, and the arguments of the row kernels.
#pragma once

#include <cstdint>

namespace metareward {

constexpr int64_t TILE = 48;  // weight rows side by side in a packed tile

struct Product {
  const uint16_t* x;
  void* out;
  int64_t x_stride, out_stride, pairs, columns;  // strides in elements
  int64_t tile_size;                             // of what makes 48 columns of out
  bool bf16_out, gated;                          // gated: a tile of the gate and one of up
};

}  // namespace metareward

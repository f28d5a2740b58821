// What lies between the matrix products of a decoder layer when it only infers: residual and norm, rotary embedding
// and the write to the cache, gated activation. Each reads and writes its rows once, in place of several passes.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../ops.h"

namespace metareward {
namespace {

struct RotateArguments {
  const void *qkv, *cos, *sin, *query_norm, *key_norm;  // the norms' weights may be null
  void *out, *key_pages, *value_pages;
  const int64_t* slots;
  int64_t query_heads, kv_heads, dim, page, qkv_stride;
  int64_t key_strides[3], value_strides[3];  // of page, slot and head, in elements
  float eps;
  bool bf16, bf16_angles;
};

#define METAREWARD_SIMD_BODY "fused_rows_body.h"
#include "for_each_simd.h"

bool check_dtype(const Tensor& x, const char* name) {
  const auto dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name, " must be float32 or bfloat16");
  return dtype == ScalarType::BFloat16;
}

void check_rows(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1), name, " must be [T,*] with a contiguous last dimension");
}

void check_vector(const Tensor& x, const Tensor& like, int64_t size, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 1 && x.size(0) == size && x.is_contiguous() && x.scalar_type() == like.scalar_type(), name,
      " must be a contiguous vector of ", size, " in the dtype of the rows");
}

// Rows a thread takes at least: waking one costs more than some ten thousand elements.
int64_t grain(int64_t width) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width)); }

char* row(const Tensor& x, int64_t t, bool bf16) {
  return static_cast<char*>(x.data_ptr()) + t * x.stride(0) * (bf16 ? 2 : 4);
}

constexpr int64_t AHEAD = 6;  // tokens: their slots lie all over the cache, so every line of them is a miss

void prefetch_slot(const RotateArguments& a, int64_t t) {
  const int64_t size = a.bf16 ? 2 : 4, page = a.slots[t] / a.page, offset = a.slots[t] % a.page;
  for (int64_t h = 0; h < a.kv_heads; ++h) {
    const int64_t key = page * a.key_strides[0] + offset * a.key_strides[1] + h * a.key_strides[2];
    const int64_t value = page * a.value_strides[0] + offset * a.value_strides[1] + h * a.value_strides[2];
    for (int64_t i = 0; i < a.dim * size; i += 64) {
      __builtin_prefetch(static_cast<char*>(a.key_pages) + key * size + i, 1);
      __builtin_prefetch(static_cast<char*>(a.value_pages) + value * size + i, 1);
    }
  }
}

}  // namespace

Tensor add_rms_norm(Tensor residual, std::optional<Tensor> delta, Tensor weight, double eps) {
  const bool bf16_residual = check_dtype(residual, "residual"), bf16 = check_dtype(weight, "weight");
  STD_TORCH_CHECK(bf16 || !bf16_residual, "a bfloat16 residual needs a bfloat16 weight");
  check_rows(residual, "residual");
  const int64_t rows = residual.size(0), width = residual.size(1);
  STD_TORCH_CHECK(rows <= 1 || residual.stride(0) >= width, "the rows of the residual overlap: it is written in place");
  check_vector(weight, weight, width, "weight");
  if (delta.has_value()) {
    check_rows(*delta, "delta");
    STD_TORCH_CHECK(
        delta->size(0) == rows && delta->size(1) == width && delta->scalar_type() == weight.scalar_type(),
        "delta differs from the residual in shape or from the weight in dtype");
  }
  Tensor out = torch::stable::new_empty(weight, {rows, width});
  const auto pass = METAREWARD_SIMD_PICK(add_rms_norm_row);
  torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const char* added = delta.has_value() ? row(*delta, t, bf16) : nullptr;
      pass(
          row(residual, t, bf16_residual), added, weight.data_ptr(), bf16_residual, bf16, float(eps), width,
          row(out, t, bf16));
    }
  });
  return out;
}

Tensor rotate_and_store(
    Tensor qkv, Tensor cos, Tensor sin, Tensor slots, Tensor key_pages, Tensor value_pages,
    std::optional<Tensor> query_norm, std::optional<Tensor> key_norm, double eps) {
  RotateArguments a{};
  a.bf16 = check_dtype(qkv, "qkv");
  a.bf16_angles = check_dtype(cos, "cos");
  check_rows(qkv, "qkv");
  const int64_t tokens = qkv.size(0);
  STD_TORCH_CHECK(
      key_pages.dim() == 4 && value_pages.dim() == 4 && key_pages.scalar_type() == qkv.scalar_type() &&
          value_pages.scalar_type() == qkv.scalar_type(),
      "key_pages and value_pages must be [P,page,Hk,D] in the dtype of qkv");
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(key_pages.size(i) == value_pages.size(i), "key_pages and value_pages differ in shape");
  }
  a.page = key_pages.size(1);
  a.kv_heads = key_pages.size(2);
  a.dim = key_pages.size(3);
  STD_TORCH_CHECK(
      a.dim > 0 && a.dim % 2 == 0 && qkv.size(1) % a.dim == 0 && qkv.size(1) / a.dim > 2 * a.kv_heads,
      "qkv [T,(Hq+2Hk)*D] does not fit pages of ", a.kv_heads, " heads of size ", a.dim);
  a.query_heads = qkv.size(1) / a.dim - 2 * a.kv_heads;
  STD_TORCH_CHECK(
      key_pages.stride(3) == 1 && value_pages.stride(3) == 1, "the last dimension of the pages must be contiguous");
  STD_TORCH_CHECK(
      cos.is_contiguous() && sin.is_contiguous() && cos.numel() == tokens * a.dim && sin.numel() == cos.numel() &&
          sin.scalar_type() == cos.scalar_type() && (a.bf16 || !a.bf16_angles),
      "cos and sin must be contiguous [T,1,D] in float32 or the dtype of qkv");
  STD_TORCH_CHECK(
      slots.dim() == 1 && slots.is_contiguous() && slots.scalar_type() == ScalarType::Long && slots.size(0) == tokens,
      "slots must be contiguous [T] int64");
  if (query_norm.has_value()) check_vector(*query_norm, qkv, a.dim, "q_norm_weight");
  if (key_norm.has_value()) check_vector(*key_norm, qkv, a.dim, "k_norm_weight");

  Tensor out = torch::stable::new_empty(qkv, {tokens, a.query_heads, a.dim});
  if (tokens == 0) return out;
  a.slots = static_cast<const int64_t*>(slots.data_ptr());
  const int64_t capacity = key_pages.size(0) * a.page;
  for (int64_t t = 0; t < tokens; ++t) {  // a wrong slot would overwrite foreign memory
    STD_TORCH_CHECK(
        a.slots[t] >= 0 && a.slots[t] < capacity, "slot ", a.slots[t], " is outside the cache's [0, ", capacity - 1, "]");
  }
  a.qkv = qkv.data_ptr();
  a.cos = cos.data_ptr();
  a.sin = sin.data_ptr();
  a.query_norm = query_norm.has_value() ? query_norm->data_ptr() : nullptr;
  a.key_norm = key_norm.has_value() ? key_norm->data_ptr() : nullptr;
  a.out = out.data_ptr();
  a.key_pages = key_pages.data_ptr();
  a.value_pages = value_pages.data_ptr();
  a.qkv_stride = qkv.stride(0);
  for (int i = 0; i < 3; ++i) {
    a.key_strides[i] = key_pages.stride(i);
    a.value_strides[i] = value_pages.stride(i);
  }
  a.eps = float(eps);
  const auto pass = METAREWARD_SIMD_PICK(rotate_token);
  torch::stable::parallel_for(0, tokens, grain(qkv.size(1)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (t + AHEAD < end) prefetch_slot(a, t + AHEAD);
      pass(a, t);
    }
  });
  return out;
}

Tensor silu_mul(Tensor gate_up) {
  const bool bf16 = check_dtype(gate_up, "gate_up");
  check_rows(gate_up, "gate_up");
  STD_TORCH_CHECK(gate_up.size(1) % 2 == 0, "gate_up [T,2I] has an odd width of ", gate_up.size(1));
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  Tensor out = torch::stable::new_empty(gate_up, {rows, width});
  const auto pass = METAREWARD_SIMD_PICK(silu_mul_row);
  torch::stable::parallel_for(0, rows, grain(2 * width), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) pass(row(gate_up, t, bf16), bf16, width, row(out, t, bf16));
  });
  return out;
}

}  // namespace metareward

// The compiled ops: one declaration each, the shapes beside the arguments. Schemas and registration are in ops.cpp.
//
// Everything here is written against libtorch's stable ABI, so that one binary serves torch 2.11 and later.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace metareward {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor keyed_uniforms(Tensor keys /* [S] int64 */, Tensor positions /* [S] int64 */);

Tensor paged_attention(
    Tensor query,        // [T,Hq,D]
    Tensor key_pages,    // [P,page,Hk,D]
    Tensor value_pages,  // [P,page,Hk,D]
    Tensor page_ids,     // [N] int32, as all that follow
    Tensor page_starts,  // [G]
    Tensor lengths,      // [G]
    Tensor rows,         // [E]
    Tensor row_starts,   // [G+1]
    Tensor limits,       // [E]
    double scale);

// Tokens [S] int64, and [S] float32 each: their log-probs, and those under the distribution drawn from.
std::tuple<Tensor, Tensor, Tensor> sample_tokens(
    Tensor logits,    // [S,V]
    Tensor uniforms,  // [S] float64
    double temperature, int64_t top_k, double top_p, double min_p);

// Log-prob of the targets and log-sum-exp of every row, both [C] float32.
std::tuple<Tensor, Tensor> logprob_rows(Tensor logits /* [C,V] */, Tensor targets /* [C] int64 */, double temperature);

// The same, and every row's entropy in nats.
std::tuple<Tensor, Tensor, Tensor> logprob_entropy_rows(Tensor logits, Tensor targets, double temperature);

// Adds a part of the vocabulary, that begins at `first`, to what is known of every row: its largest logit, the sum of
// e^((z - largest) / temperature), the same weighted by (z - largest) / temperature (where `entropy`), and the target's
// logit, left alone where it lies elsewhere. Starts from -inf, 0, 0.
void add_logit_sums(
    Tensor logits /* [C,W] */, Tensor targets /* [C] int64 */, int64_t first, double temperature, bool entropy,
    Tensor sums /* [4,C] float64 */);

// logprob_entropy_rows in one pass that leaves onehot - softmax over the logits, or in `out` [C,V], bfloat16, of float32 logits.
// The third tensor is empty unless `entropy`.
std::tuple<Tensor, Tensor, Tensor> softmax_residual_rows(
    Tensor logits, Tensor targets, double temperature, bool entropy, std::optional<Tensor> out);

// grad * (onehot - softmax) / temperature: over the logits, or into `out` [C,V], bfloat16, of float32 logits.
void logit_gradient_rows(
    Tensor logits /* [C,V] */, Tensor targets /* [C] int64 */, Tensor lse /* [C] */, Tensor grad /* [C] */,
    double temperature, std::optional<Tensor> out);

// Adds delta to the residual in place; returns the residual's RMS norm [T,H] in the weight's dtype.
Tensor add_rms_norm(Tensor residual /* [T,H] */, std::optional<Tensor> delta /* [T,H] */, Tensor weight /* [H] */, double eps);

// Returns the rotated queries [T,Hq,D]; writes the rotated keys and the values to their slots.
Tensor rotate_and_store(
    Tensor qkv,                         // [T,(Hq+2Hk)*D]
    Tensor cos,                         // [T,1,D]
    Tensor sin,                         // [T,1,D], its first half negated
    Tensor slots,                       // [T] int64
    Tensor key_pages,                   // [P,page,Hk,D]
    Tensor value_pages,                 // [P,page,Hk,D]
    std::optional<Tensor> query_norm,   // [D]
    std::optional<Tensor> key_norm,     // [D]
    double eps);

Tensor silu_mul(Tensor gate_up /* [T,2I] */);

// Attention of a packed tree of segments: [T,Hq,D] and the log-sum-exp [T,Hq] float32.
std::tuple<Tensor, Tensor> segment_attention(
    Tensor query,    // [T,Hq,D]
    Tensor key,      // [T,Hk,D]
    Tensor value,    // [T,Hk,D]
    Tensor offsets,  // [S+1] int32
    Tensor parents,  // [S] int32, -1: none
    double scale);

// Gradients of query, key and value.
std::tuple<Tensor, Tensor, Tensor> segment_attention_backward(
    Tensor grad /* [T,Hq,D] */, Tensor query, Tensor key, Tensor value, Tensor out /* [T,Hq,D] */,
    Tensor lse /* [T,Hq] */, Tensor offsets, Tensor parents, double scale);

// Products of bf16 matrices, for CPUs with AVX-512 BF16. `out` is float32 or bfloat16; the sums are fp32.
bool bf16_linear_supported();
Tensor pack_bf16_weight(Tensor weight /* [N,K] */);  // [ceil(N/48),ceil(K/2),48,2], padded with zeros
void packed_linear(Tensor x /* [T,K] */, Tensor packed, Tensor out /* [T,N] */);
void packed_gated_linear(Tensor x /* [T,K] */, Tensor packed, Tensor out /* [T,N] */);
void bf16_linear(Tensor x /* [T,K] */, Tensor weight /* [N,K] */, Tensor out /* [T,N] */);

// All layers and the last norm, on the same CPUs: [R,H]. The residual is left in any state. weights: of each layer input
// norm, qkv, output, norm, gate with up, down, the matrices packed; head_norms: of each layer query and key, or none.
Tensor decoder_layers(
    Tensor residual,  // [T,H] float32
    Tensor cos, Tensor sin, Tensor slots, std::vector<Tensor> key_pages, std::vector<Tensor> value_pages,
    Tensor page_ids, Tensor page_starts, Tensor lengths, Tensor rows, Tensor row_starts, Tensor limits,
    std::vector<Tensor> weights, std::vector<Tensor> head_norms, Tensor norm /* [H] */, Tensor logit_rows /* [R] int64 */,
    int64_t query_heads, int64_t intermediate, double eps, double scale);

// A head's chunk of C rows on the same CPUs, without its logits. Returns log-probs of the targets, log-sum-exps, entropies
// (empty unless asked for) and scales, [C] float32 each; where `out` is given, scale times its rows is onehot - softmax.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_softmax(
    Tensor hidden,               // [C,H] bfloat16, H even
    Tensor weight,               // [V,H] bfloat16
    std::optional<Tensor> bias,  // [V] float32
    Tensor targets,              // [C] int64
    double temperature, bool entropy,
    std::optional<Tensor> out);  // [ceil(V/64),C,64] bfloat16: panels of 64 vocabulary entries
void panels_times_weight(Tensor panels, Tensor weight /* [V,H] */, Tensor out /* [C,H] float32 */);

// out (+)= panels.T @ (coefficient * hidden); bias_out (+)= panels.T @ coefficient.
void add_panels_times_hidden(
    Tensor panels, Tensor hidden /* [C,H] */, Tensor coefficient /* [C] */, bool accumulate,
    Tensor out /* [V,H] float32 */, std::optional<Tensor> bias_out /* [V] float32 */);
Tensor scaled_bf16(Tensor x /* float32 */, double factor);  // x * factor in bfloat16

}  // namespace metareward

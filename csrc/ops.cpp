// Schemas and registration of the compiled ops. The public ops, which choose between these and PyTorch, are Python.
#include "ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(metareward, library) {
  library.def("keyed_uniforms_cpp(Tensor keys, Tensor positions) -> Tensor");
  library.def(
      "paged_attention_cpp(Tensor query, Tensor key_pages, Tensor value_pages, Tensor page_ids, Tensor page_starts, "
      "Tensor lengths, Tensor rows, Tensor row_starts, Tensor limits, float scale) -> Tensor");
  library.def(
      "sample_tokens_cpp(Tensor logits, Tensor uniforms, float temperature, int top_k, float top_p, float min_p) "
      "-> (Tensor, Tensor, Tensor)");
  library.def("logprob_rows_cpp(Tensor logits, Tensor targets, float temperature) -> (Tensor, Tensor)");
  library.def(
      "logprob_entropy_rows_cpp(Tensor logits, Tensor targets, float temperature) -> (Tensor, Tensor, Tensor)");
  library.def(
      "add_logit_sums_cpp_(Tensor logits, Tensor targets, int first, float temperature, bool entropy, Tensor(a!) sums) "
      "-> ()");
  library.def(
      "softmax_residual_rows_cpp_(Tensor(a!) logits, Tensor targets, float temperature, bool entropy, Tensor(b!)? out) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "logit_gradient_rows_cpp_(Tensor(a!) logits, Tensor targets, Tensor lse, Tensor grad, float temperature, "
      "Tensor(b!)? out) -> ()");
  library.def("add_rms_norm_cpp_(Tensor(a!) residual, Tensor? delta, Tensor weight, float eps) -> Tensor");
  library.def(
      "rotate_and_store_cpp_(Tensor qkv, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) key_pages, "
      "Tensor(b!) value_pages, Tensor? q_norm_weight, Tensor? k_norm_weight, float eps) -> Tensor");
  library.def("silu_mul_cpp(Tensor gate_up) -> Tensor");
  library.def(
      "segment_attention_cpp(Tensor query, Tensor key, Tensor value, Tensor offsets, Tensor parents, float scale) "
      "-> (Tensor, Tensor)");
  library.def(
      "segment_attention_backward_cpp(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "Tensor offsets, Tensor parents, float scale) -> (Tensor, Tensor, Tensor)");
  library.def("bf16_linear_supported() -> bool");
  library.def("pack_bf16_weight_cpp(Tensor weight) -> Tensor");
  library.def("packed_linear_cpp_(Tensor x, Tensor packed, Tensor(a!) out) -> ()");
  library.def("packed_gated_linear_cpp_(Tensor x, Tensor packed, Tensor(a!) out) -> ()");
  library.def(
      "decoder_layers_cpp_(Tensor(a!) residual, Tensor cos, Tensor sin, Tensor slots, Tensor(b!)[] key_pages, "
      "Tensor(c!)[] value_pages, Tensor page_ids, Tensor page_starts, Tensor lengths, Tensor rows, Tensor row_starts, "
      "Tensor limits, Tensor[] weights, Tensor[] head_norms, Tensor norm, Tensor logit_rows, int query_heads, "
      "int intermediate, float eps, float scale) -> Tensor");
  library.def("bf16_linear_cpp_(Tensor x, Tensor weight, Tensor(a!) out) -> ()");
  library.def(
      "linear_softmax_cpp_(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float temperature, bool entropy, "
      "Tensor(a!)? out) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("panels_times_weight_cpp_(Tensor panels, Tensor weight, Tensor(a!) out) -> ()");
  library.def(
      "add_panels_times_hidden_cpp_(Tensor panels, Tensor hidden, Tensor coefficient, bool accumulate, Tensor(a!) out, "
      "Tensor(b!)? bias_out) -> ()");
  library.def("scaled_bf16_cpp(Tensor x, float factor) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(metareward, CPU, library) {
  library.impl("keyed_uniforms_cpp", TORCH_BOX(&metareward::keyed_uniforms));
  library.impl("paged_attention_cpp", TORCH_BOX(&metareward::paged_attention));
  library.impl("sample_tokens_cpp", TORCH_BOX(&metareward::sample_tokens));
  library.impl("logprob_rows_cpp", TORCH_BOX(&metareward::logprob_rows));
  library.impl("logprob_entropy_rows_cpp", TORCH_BOX(&metareward::logprob_entropy_rows));
  library.impl("add_logit_sums_cpp_", TORCH_BOX(&metareward::add_logit_sums));
  library.impl("softmax_residual_rows_cpp_", TORCH_BOX(&metareward::softmax_residual_rows));
  library.impl("logit_gradient_rows_cpp_", TORCH_BOX(&metareward::logit_gradient_rows));
  library.impl("add_rms_norm_cpp_", TORCH_BOX(&metareward::add_rms_norm));
  library.impl("rotate_and_store_cpp_", TORCH_BOX(&metareward::rotate_and_store));
  library.impl("silu_mul_cpp", TORCH_BOX(&metareward::silu_mul));
  library.impl("segment_attention_cpp", TORCH_BOX(&metareward::segment_attention));
  library.impl("segment_attention_backward_cpp", TORCH_BOX(&metareward::segment_attention_backward));
  library.impl("pack_bf16_weight_cpp", TORCH_BOX(&metareward::pack_bf16_weight));
  library.impl("packed_linear_cpp_", TORCH_BOX(&metareward::packed_linear));
  library.impl("packed_gated_linear_cpp_", TORCH_BOX(&metareward::packed_gated_linear));
  library.impl("decoder_layers_cpp_", TORCH_BOX(&metareward::decoder_layers));
  library.impl("bf16_linear_cpp_", TORCH_BOX(&metareward::bf16_linear));
  library.impl("linear_softmax_cpp_", TORCH_BOX(&metareward::linear_softmax));
  library.impl("panels_times_weight_cpp_", TORCH_BOX(&metareward::panels_times_weight));
  library.impl("add_panels_times_hidden_cpp_", TORCH_BOX(&metareward::add_panels_times_hidden));
  library.impl("scaled_bf16_cpp", TORCH_BOX(&metareward::scaled_bf16));
}

STABLE_TORCH_LIBRARY_IMPL(metareward, CompositeExplicitAutograd, library) {
  library.impl("bf16_linear_supported", TORCH_BOX(&metareward::bf16_linear_supported));
}

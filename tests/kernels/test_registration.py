"""Every op of the package under torch.library.opcheck, contiguous, strided and empty.

A new op fails `test_every_op_is_checked` until it has cases in op_cases.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from metareward_kernels import implementation

from tests.kernels.op_cases import (
    Arguments,
    attention_cases,
    draw_cases,
    gated_cases,
    gather_backward_cases,
    gather_cases,
    head_backward_cases,
    head_cases,
    key_cases,
    layer_cases,
    norm_cases,
    packed_cases,
    panel_hidden_cases,
    panels,
    product_cases,
    randn,
    residual_cases,
    rotary_cases,
    row_cases,
    row_gradient_cases,
    segment_backward_cases,
    segment_cases,
    softmax_cases,
    sum_cases,
    sums_cases,
    traced_backward_cases,
    traced_cases,
)

COMPILED = implementation("sample_tokens") == "cpp"

# What has no case here, and why.
ELSEWHERE = {
    "dpo_loss": "runs Triton: tests/interpreter/test_triton_dpo_loss.py",
    "dpo_loss_backward": "runs Triton: tests/interpreter/test_triton_dpo_loss.py",
    "bf16_linear_supported": "takes no tensor",
}


PYTHON_OPS: dict[str, Callable[[], list[Arguments]]] = {
    "linear_logprob": head_cases,
    "linear_logprob_backward": head_backward_cases,
    "gather_logprob": gather_cases,
    "gather_logprob_backward": gather_backward_cases,
    "gather_logprob_backward_": gather_backward_cases,
    "sequence_sums": sum_cases,
    "paged_attention": attention_cases,
    "sample_tokens": draw_cases,
    "keyed_uniforms": key_cases,
    "traced_segment_attention": traced_cases,
    "traced_segment_attention_backward": traced_backward_cases,
}
COMPILED_OPS: dict[str, Callable[[], list[Arguments]]] = {
    "keyed_uniforms_cpp": lambda: key_cases()[::2],
    "paged_attention_cpp": lambda: [(case[0].contiguous(), *case[1:]) for case in attention_cases()],
    "sample_tokens_cpp": lambda: [(case[0].contiguous(), *case[1:]) for case in draw_cases()],
    "logprob_rows_cpp": row_cases,
    "add_logit_sums_cpp_": sums_cases,
    "logit_gradient_rows_cpp_": row_gradient_cases,
    "logprob_entropy_rows_cpp": row_cases,
    "softmax_residual_rows_cpp_": residual_cases,
    "add_rms_norm_cpp_": norm_cases,
    "rotate_and_store_cpp_": rotary_cases,
    "segment_attention_cpp": segment_cases,
    "segment_attention_backward_cpp": segment_backward_cases,
    "silu_mul_cpp": lambda: [(randn(3, 48),), (randn(3, 60)[:, 6:54],), (randn(0, 48),)],
    "pack_bf16_weight_cpp": lambda: [(randn(50, 7).bfloat16(),), (randn(5, 16).bfloat16(),)],
    "packed_linear_cpp_": packed_cases,
    "packed_gated_linear_cpp_": gated_cases,
    "bf16_linear_cpp_": product_cases,
    "decoder_layers_cpp_": layer_cases,
    "linear_softmax_cpp_": softmax_cases,
    "panels_times_weight_cpp_": lambda: [
        (panels(rows), randn(70, 12).bfloat16(), torch.zeros(rows, 12)) for rows in (3, 0)
    ],
    "add_panels_times_hidden_cpp_": panel_hidden_cases,
    "scaled_bf16_cpp": lambda: [(randn(rows, 5), 0.3) for rows in (3, 0)],
}
BF16_UNIT = frozenset(
    (
        "decoder_layers_cpp_",
        "pack_bf16_weight_cpp",
        "packed_linear_cpp_",
        "packed_gated_linear_cpp_",
        "bf16_linear_cpp_",
        "linear_softmax_cpp_",
        "panels_times_weight_cpp_",
        "add_panels_times_hidden_cpp_",
    )
)


def registered() -> set[str]:
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("metareward::"))
    return {name.removeprefix("metareward::").split(".")[0] for name in names}


def test_every_op_is_checked() -> None:
    named = PYTHON_OPS.keys() | ELSEWHERE.keys() | (COMPILED_OPS.keys() if COMPILED else set())
    assert registered() == (named if COMPILED else named - {"bf16_linear_supported"})


@pytest.mark.parametrize("op", [*PYTHON_OPS, *COMPILED_OPS])
def test_opcheck(op: str) -> None:
    if op in COMPILED_OPS and not COMPILED:
        pytest.skip("the compiled library is not built")
    if op in BF16_UNIT and implementation("linear_fp32") != "cpp":
        pytest.skip("this CPU has no AVX-512 BF16")
    cases = (PYTHON_OPS | COMPILED_OPS)[op]()
    assert cases
    for arguments in cases:
        torch.library.opcheck(getattr(torch.ops.metareward, op).default, arguments)

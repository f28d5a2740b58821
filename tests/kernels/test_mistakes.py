"""Tests of the tests: with a deliberate defect in a kernel, the suite fails, by an assertion.

Each mistake replaces a piece of a source file of the package. A copy of the package with it runs the tests named, the Triton
kernels in the interpreter, the PyTorch paths as they are. One of the tests must fail, and not for want of compiling. The
undamaged copy passes all of them. The C++ sources are not damaged here: a build a mistake would take minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("mistake_runner.py")


class Mistake(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    kernels: str = "triton"


def interpreter(file: str, *nodes: str) -> tuple[str, ...]:
    return tuple(f"tests/interpreter/test_{file}.py::test_{node}" for node in nodes)


def room(file: str, *nodes: str) -> tuple[str, ...]:
    return tuple(f"tests/kernels/test_{file}.py::test_{node}" for node in nodes)


ROWS = interpreter("triton_head", "logprob_rows[1-1281-dtype0]")
SPLIT_ROWS = interpreter("triton_head", "logprob_rows[5-1281-dtype0]")
ROW_GRADIENTS = interpreter("triton_head", "logit_gradient_rows[False-dtype0]")
NASTY_TILES = interpreter("triton_head", "nasty_logits[dtype0]")
TILES = interpreter("triton_head", "small_tiles[True-81-20-97-dtype0]")
DPO = interpreter("triton_dpo_loss", "check[strides]")
DPO_SUMS = interpreter("triton_dpo_loss", "check[impossible_tokens]", "check[sums_are_rounded_once]")
DPO_FAR = interpreter("triton_dpo_loss", "check[margins_far_from_zero]")
DRAW = interpreter("triton_sample", "nasty_rows[chosen0-128-1]", "nasty_rows[chosen3-128-1]")
ATTENTION = interpreter(
    "triton_paged_attention",
    "large_scores[-100.0]",
    "large_scores[80.0]",
    "causal_prefill_mixed_with_decode[shape0]",
)
TORCH_ROWS = room("head_checks", "check[torch-gather_logprob-values_and_gradients]")
PARTS = room("logit_sums", "parts_give_what_the_whole_gives[torch-1.0-hundreds-257]")
TORCH_HEAD = room(
    "linear_logprob",
    "values_and_gradients_match_the_reference[torch-1.0-257]",
    "weight_gradient_is_summed_in_fp32[torch]",
    "values_and_gradients_match_the_reference[torch-0.7-257]",
)
IN_PLACE = room(
    "gather_logprob",
    "the_gradient_lies_where_the_logits_lay[torch]",
    "a_second_backward_is_refused[torch]",
    "any_strides_and_leading_dimensions_in_place[torch-100-columns]",
    "memory_beyond_the_logits[torch-dtype0]",
)
TORCH_TREE = room(
    "segment_attention",
    "float32_matches_the_reference[torch-depth three]",
    "strided_inputs_and_gradients[torch]",
)
TORCH_DPO = room("dpo_loss", "check[losses_rewards_and_gradients]", "check[sums_are_rounded_once]")

FROM_ZERO = "tl.zeros([], tl.float32)"
FROM_BELOW = 'tl.full([], -float("inf"), tl.float32)'

MISTAKES = [
    # The head's row passes in Triton.
    Mistake("rows: the running maximum starts at 0", "triton_head_rows.py", FROM_BELOW, FROM_ZERO, ROWS),
    Mistake(
        "rows: the vocabulary's tail is not masked",
        "triton_head_rows.py",
        'mask=there, other=-float("inf")',
        "mask=there, other=0.0",
        ROWS,
    ),
    Mistake(
        "rows: the gradient of token 0 for all",
        "triton_head_rows.py",
        "tl.load(coefficients + row)",
        "tl.load(coefficients)",
        ROW_GRADIENTS,
    ),
    Mistake(
        "rows: the log-sum-exp of token 0 for all",
        "triton_head_rows.py",
        "tl.load(lse + row)",
        "tl.load(lse)",
        ROW_GRADIENTS,
    ),
    Mistake(
        "rows: the target's column has the wrong sign",
        "triton_head_rows.py",
        "tl.load(targets + row), 1.0, 0.0) - share",
        "tl.load(targets + row), -1.0, 0.0) - share",
        ROW_GRADIENTS,
    ),
    Mistake(
        "rows: the temperature is forgotten in the gradient's scale",
        "triton_head_rows.py",
        "tl.load(coefficients + row) * inverse_temperature",
        "tl.load(coefficients + row)",
        ROW_GRADIENTS,
    ),
    Mistake(
        "rows: the temperature is forgotten in the gradient's softmax",
        "triton_head_rows.py",
        "tl.exp2((x * inverse_temperature -",
        "tl.exp2((x -",
        ROW_GRADIENTS,
    ),
    Mistake(
        "rows: sums are not rebased on a new maximum",
        "triton_head_rows.py",
        "return total * factor, weighted",
        "return total, weighted",
        SPLIT_ROWS,
    ),
    Mistake(
        "rows: one split is merged", "triton_head_rows.py", "in range(splits)", "in range(1)", SPLIT_ROWS
    ),
    Mistake(
        "rows: the entropy is not rebased",
        "triton_head_rows.py",
        "factor * (weighted + total * shift)",
        "factor * weighted",
        SPLIT_ROWS,
    ),
    # The head's products in Triton.
    Mistake(
        "head: the running maximum starts at 0",
        "triton_linear_logprob.py",
        "top = tl.max(logit, axis=1)",
        "top = tl.maximum(tl.max(logit, axis=1), 0.0)",
        NASTY_TILES,
    ),
    Mistake(
        "head: the vocabulary's tail is not masked",
        "triton_linear_logprob.py",
        'logit = tl.where((entry < vocabulary)[None, :], logit, -float("inf"))',
        "pass",
        TILES,
    ),
    Mistake(
        "head: the width's tail is not masked",
        "triton_head_tiles.py",
        "left = width - start",
        "left = BLOCK_K",
        TILES,
    ),
    Mistake(
        "head: the gradient of token 0 for all",
        "triton_linear_logprob.py",
        "tl.load(coefficients + row)",
        "tl.load(coefficients + row * 0)",
        TILES,
    ),
    Mistake(
        "head: the target's column has the wrong sign",
        "triton_linear_logprob.py",
        "tl.where(hit, 1.0, 0.0) - share",
        "tl.where(hit, -1.0, 0.0) - share",
        TILES,
    ),
    Mistake(
        "head: the temperature is forgotten in the gradient's scale",
        "triton_linear_logprob.py",
        "tl.load(coefficients + row) * inverse_temperature",
        "tl.load(coefficients + row)",
        TILES,
    ),
    Mistake(
        "head: the bias is forgotten in backward",
        "triton_linear_logprob.py",
        "if BIAS:\n        logit +=",
        "if not BIAS:\n        logit +=",
        TILES,
    ),
    Mistake(
        "head: a slab's weight gradient is dropped",
        "triton_linear_logprob.py",
        "if grad_weight is not None:",
        "if grad_weight is not None and start == 0:",
        TILES,
    ),
    Mistake(
        "head: the hidden states' gradient is of the last slab",
        "triton_linear_logprob.py",
        "first=start == 0",
        "first=True",
        TILES,
    ),
    # The preference loss in Triton.
    Mistake(
        "dpo: rejected tokens are pushed up",
        "triton_dpo_loss.py",
        "pull, 0.0) - tl.where(",
        "pull, 0.0) + tl.where(",
        DPO,
    ),
    Mistake(
        "dpo: a sequence's last pairs are all that count", "triton_dpo_loss.py", "pulls += ", "pulls = ", DPO
    ),
    Mistake(
        "dpo: the sums' rounding errors are dropped",
        "triton_dpo_loss.py",
        "total, total + rest)",
        "total, total)",
        DPO_SUMS,
    ),
    Mistake(
        "dpo: an impossible token makes NaN",
        "triton_dpo_loss.py",
        'tl.where(tl.abs(total) == float("inf"), total, total + rest)',
        "total + rest",
        DPO_SUMS,
    ),
    Mistake(
        "dpo: small losses lose their digits",
        "triton_dpo_loss.py",
        "tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))",
        "tl.log(u)",
        DPO_FAR,
    ),
    Mistake(
        "dpo: beta is forgotten in the slope",
        "triton_dpo_loss.py",
        "slope = beta * (",
        "slope = 1.0 * (",
        DPO,
    ),
    Mistake(
        "dpo: label smoothing is forgotten in the slope",
        "triton_dpo_loss.py",
        "smoothing * sigmoid(x) - (1.0 - smoothing) * sigmoid(-x)",
        "-sigmoid(-x)",
        DPO,
    ),
    Mistake(
        "dpo: the gradient of the sequences' sums is dropped",
        "triton_dpo_loss.py",
        "tl.load(grad_sums + sequence) + tl.sum(pulls)",
        "tl.sum(pulls)",
        DPO,
    ),
    Mistake(
        "dpo: bounds are not kept inside",
        "triton_dpo_loss.py",
        "tl.minimum(tl.maximum(end, 0), tokens)",
        "end",
        interpreter("triton_dpo_loss", "nothing_outside_is_read"),
    ),
    # The sampler's kernels in Triton.
    Mistake(
        "draw: the running maximum starts at 0",
        "triton_sample.py",
        'top = tl.full([], float("-inf"), tl.float32)',
        "top = tl.zeros([], tl.float32)",
        DRAW,
    ),
    Mistake(
        "draw: of logits equal to the cut too many are kept",
        "triton_sample.py",
        "cut, top_k - above, BLOCK)",
        "cut, top_k, BLOCK)",
        DRAW,
    ),
    Mistake(
        "draw: the temperature is forgotten in the masses",
        "triton_sample.py",
        "LOG2E / temperature, 1e-37",
        "LOG2E / 1.0, 1e-37",
        DRAW,
    ),
    Mistake(
        "attention: rows see past their limit",
        "triton_paged_attention.py",
        "token[None, :] < limit[:, None], scores",
        "token[None, :] < token_end, scores",
        ATTENTION,
    ),
    Mistake(
        "attention: values are not rebased on a new maximum",
        "triton_paged_attention.py",
        "acc = acc * shrink[:, None] + tl.dot(",
        "acc = acc + tl.dot(",
        ATTENTION,
    ),
    Mistake(
        "attention: the merge's maximum starts at 0",
        "triton_paged_attention.py",
        'top = tl.full([BLOCK_H], float("-inf"), tl.float32)',
        "top = tl.zeros([BLOCK_H], tl.float32)",
        ATTENTION,
    ),
    # The PyTorch paths.
    Mistake(
        "torch: the maximum is not subtracted",
        "head_rows.py",
        "top = scaled.amax(dim=1, keepdim=True)",
        "top = 0.0 * scaled.amax(dim=1, keepdim=True)",
        TORCH_ROWS,
        "torch",
    ),
    Mistake(
        "torch: the target's column has the wrong sign",
        "head_rows.py",
        "gradient.scatter_add_(1, targets[:, None], scale)",
        "gradient.scatter_add_(1, targets[:, None], -scale)",
        TORCH_ROWS,
        "torch",
    ),
    Mistake(
        "torch: the temperature is forgotten in the gradient's scale",
        "head_rows.py",
        "(coefficient / temperature)[:, None]",
        "coefficient[:, None]",
        TORCH_ROWS,
        "torch",
    ),
    Mistake(
        "torch: the sums of a part of the vocabulary are not moved to a larger logit",
        "head_rows.py",
        "total.mul_(moved.exp())",
        "total.mul_(1.0)",
        PARTS,
        "torch",
    ),
    Mistake(
        "torch: every part of the vocabulary gives the target's logit",
        "head_rows.py",
        "torch.where(inside, found.double(), at_target)",
        "found.double()",
        PARTS,
        "torch",
    ),
    Mistake(
        "torch: the gradient of token 0 for all",
        "chunked_logprob.py",
        "lse[piece], grad[piece]",
        "lse[piece], grad[:1].expand(len(here))",
        TORCH_HEAD,
        "torch",
    ),
    Mistake(
        "torch: a chunk's weight gradient is dropped",
        "chunked_logprob.py",
        "total.addmm_(gradient.T, rows)",
        "total.addmm_(gradient.T, rows, beta=0)",
        TORCH_HEAD,
        "torch",
    ),
    Mistake(
        "torch: the weight's gradient is summed in bf16",
        "chunked_logprob.py",
        "total = weight.new_zeros(weight.shape, dtype=dtype)",
        "total = weight.new_zeros(weight.shape)",
        TORCH_HEAD,
        "torch",
    ),
    Mistake(
        "gather: the gradient of strided logits is lost",
        "gather_logprob.py",
        "block.copy_(part)",
        "pass",
        IN_PLACE,
        "torch",
    ),
    Mistake(
        "gather: the gradient takes memory of its own",
        "gather_logprob.py",
        "gradient = logits.detach()  #",
        "gradient = logits.detach().clone()  #",
        IN_PLACE,
        "torch",
    ),
    Mistake(
        "gather: all rows are copied at once",
        "gather_logprob.py",
        "step = max(1, len(matrix) if whole else",
        "step = max(1, len(matrix) if True else",
        IN_PLACE,
        "torch",
    ),
    Mistake(
        "dpo, torch: chosen and rejected are swapped",
        "dpo_loss.py",
        "for side in (0, 1)",
        "for side in (1, 0)",
        TORCH_DPO,
        "torch",
    ),
    Mistake(
        "dpo, torch: a sequence's first token belongs to the one before",
        "dpo_loss.py",
        "tokens, right=True)",
        "tokens - 1, right=True)",
        TORCH_DPO,
        "torch",
    ),
    Mistake(
        "dpo, torch: sums are fp32",
        "dpo_loss.py",
        "logprobs.double()",
        "logprobs.clone()",
        TORCH_DPO,
        "torch",
    ),
    Mistake(
        "segments, torch: a token sees the next one",
        "segment_attention.py",
        ".tril()",
        ".tril(1)",
        TORCH_TREE,
        "torch",
    ),
    Mistake(
        "segments, torch: the parent's ancestors are forgotten",
        "segment_attention.py",
        "(*spans[parent][1], spans[parent][0])",
        "(spans[parent][0],)",
        TORCH_TREE,
        "torch",
    ),
    Mistake(
        "segments, torch: value heads in another order than key heads",
        "segment_attention.py",
        "value.repeat_interleave(repeats, 1)",
        "value.repeat(1, repeats, 1, 1)",
        TORCH_TREE,
        "torch",
    ),
    Mistake(
        "segments, torch: a first segment has a scale of its own",
        "segment_attention.py",
        "is_causal=True, scale=scale",
        "is_causal=True",
        TORCH_TREE,
        "torch",
    ),
]


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, str]]:
    """Outcome of every mistake, and of none ("triton" and "torch", the undamaged copies)."""
    pytest.importorskip("triton", reason="triton is not installed")
    plan = [
        {"name": m.name, "edits": [[m.file, m.old, m.new]], "tests": m.tests, "kernels": m.kernels}
        for m in MISTAKES
    ]
    for kernels in ("triton", "torch"):
        tests = sorted({test for m in MISTAKES if m.kernels == kernels for test in m.tests})
        plan.append({"name": kernels, "edits": [], "tests": tests, "kernels": kernels})
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        input=json.dumps(plan),
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_the_undamaged_package_passes(results: dict[str, dict[str, str]], kernels: str) -> None:
    found = results[kernels]
    assert found["outcome"] == "passed", f"{found['by']}: {found['error']}"


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=[m.name for m in MISTAKES])
def test_the_suite_tells(results: dict[str, dict[str, str]], mistake: Mistake) -> None:
    found = results[mistake.name]
    assert found["outcome"] == "failed", f"{found['outcome']} ({found['by']}): {found['error']}"


def test_names_are_unique() -> None:
    assert len({m.name for m in MISTAKES} | {"triton", "torch"}) == len(MISTAKES) + 2

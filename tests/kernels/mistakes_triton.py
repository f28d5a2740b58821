"""Defects of the Triton kernels, and the tests that must find them."""

from __future__ import annotations

from tests.kernels.mistakes import Mistake, interpreter

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
]

"""Defects of the PyTorch paths, and the tests that must find them."""

from __future__ import annotations

from tests.kernels.mistakes import Mistake, room

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
VARLEN = room("segment_varlen", "the_layout_is_the_tree[depth three]")
TORCH_DPO = room("dpo_loss", "check[losses_rewards_and_gradients]", "check[sums_are_rounded_once]")

MISTAKES = [
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
        "segment_tree.py",
        ".tril()",
        ".tril(1)",
        TORCH_TREE,
        "torch",
    ),
    Mistake(
        "segments, torch: the parent's ancestors are forgotten",
        "segment_tree.py",
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
    Mistake(
        "segments, variable length: ancestors are not gathered",
        "segment_tree.py",
        "(*above, own)",
        "(own,)",
        VARLEN,
        "torch",
    ),
    Mistake(
        "segments, variable length: the keys begin where the queries do",
        "segment_tree.py",
        "offsets(counts).to(device)",
        "offsets(queries).to(device)",
        VARLEN,
        "torch",
    ),
]

"""DPO written out plainly: transformers' model in fp32, padded and unshared, autograd, AdamW by hand.

The other side of every comparison of losses and gradient norms in `bench.dpo_step`. Nothing of it is metareward's:
no packing, no kernel, no optimizer. A pair is a padded batch of two sequences, with the logits of both completions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.dpo_job import Job
from metareward.training.examples import Example

EPSILON = 1e-8
Figures = dict[str, float]


def pair_logprobs(model: Any, example: Example) -> Tensor:
    """[2] float32: log-probs of the chosen and of the rejected completion, given the prompt."""
    rows = [torch.tensor(example.prompt + completion) for completion in example.completions]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    places = torch.arange(ids.shape[1])
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    # From the prompt's last position on: the logits before it predict the prompt.
    first = len(example.prompt)
    found = model(
        ids,
        attention_mask=(places < lengths).long(),
        use_cache=False,
        logits_to_keep=ids.shape[1] - first + 1,
    )
    logprobs = F.log_softmax(found.logits[:, :-1], dim=-1).gather(2, ids[:, first:, None]).squeeze(2)
    return (logprobs * (places < lengths)[:, first:]).sum(dim=1)


def adamw(
    weights: list[Tensor], moments: list[tuple[Tensor, Tensor]], job: Job, step: int, scale: float
) -> None:
    """Decoupled weight decay, on matrices only, and Adam (arXiv 1711.05101, algorithm 2); step counts from 1."""
    settings = job.settings
    beta1, beta2 = settings.adam_beta1, settings.adam_beta2
    for weight, (first, second) in zip(weights, moments, strict=True):
        assert weight.grad is not None
        gradient = weight.grad * scale
        first.copy_(beta1 * first + (1 - beta1) * gradient)
        second.copy_(beta2 * second + (1 - beta2) * gradient**2)
        direction = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + EPSILON)
        decay = settings.weight_decay if weight.ndim > 1 else 0.0
        weight -= settings.learning_rate * (direction + decay * weight)


def oracle_steps(job: Job, steps: int) -> list[Figures]:
    """Loss and gradient norm (before clipping) of the first `steps` optimizer steps.

    The learning rate is constant and the loss DPO's, whatever the job's settings say of warm-up and other losses.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.eval()
    batches = [job.batch(step) for step in range(steps)]
    with torch.no_grad():
        reference = {
            example.identity: pair_logprobs(model, example) for batch in batches for example in batch
        }
    weights = list(model.parameters())
    moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in weights]
    found: list[Figures] = []
    for step, batch in enumerate(batches, start=1):
        model.zero_grad()
        total = 0.0
        for example in batch:
            ratios = pair_logprobs(model, example) - reference[example.identity]
            loss = -F.logsigmoid(job.settings.beta * (ratios[0] - ratios[1])) / len(batch)
            loss.backward()
            total += loss.item()
        norm = sum(weight.grad.double().square().sum().item() for weight in weights) ** 0.5
        with torch.no_grad():
            adamw(weights, moments, job, step, min(1.0, job.settings.max_grad_norm / (norm + 1e-6)))
        found.append({"loss": total, "grad_norm": norm})
    return found


def deviations(found: list[Figures], oracle: list[Figures]) -> list[Figures]:
    """Relative deviation of the first steps' figures from the oracle's."""
    return [
        {name: abs(mine[name] - theirs[name]) / abs(theirs[name]) for name in ("loss", "grad_norm")}
        for mine, theirs in zip(found, oracle, strict=False)
    ]


def worst(found: list[Figures]) -> float:
    return max(value for step in found for value in step.values())

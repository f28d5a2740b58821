"""A training loop in plain transformers and PyTorch, to hold the trainer against."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metareward.config import TrainSettings
from metareward.training.examples import Example


def logprob(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Log-prob of a completion by transformers alone: one sequence, no packing."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0]
    logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return logprobs[torch.arange(len(completion)), torch.tensor(completion)].sum()


def plain_loop(
    model: Any, batches: Sequence[Sequence[Example]], settings: TrainSettings, steps: int, objective: str
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step of a training loop in plain transformers and PyTorch."""
    frozen = copy.deepcopy(model)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.weight_decay,
    )
    found = []
    for step, batch in enumerate(batches):
        # 20 steps with a tenth of warm-up: two steps at a third and two thirds of the peak, then the cosine.
        scale = (step + 1) / 3 if step < 2 else 0.5 + 0.5 * math.cos(math.pi * (step - 2) / (steps - 2))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * scale
        optimizer.zero_grad()
        if objective == "sft":
            total = sum(len(item.completions[0]) for item in batch)
            loss = -sum(logprob(model, item.prompt, item.completions[0]) for item in batch) / total
        else:
            terms = []
            for item in batch:
                with torch.no_grad():
                    fixed = [logprob(frozen, item.prompt, part) for part in item.completions]
                chosen, rejected = (logprob(model, item.prompt, part) for part in item.completions)
                terms.append(
                    torch.log1p(torch.exp(-settings.beta * (chosen - fixed[0] - rejected + fixed[1])))
                )
            loss = sum(terms) / len(terms)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return found

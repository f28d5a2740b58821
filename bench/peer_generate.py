"""The peer of the sampler's benchmark: `generate` of transformers, what a user would otherwise call.

It gets the same requests, sampling settings and number of new tokens. One batch of consecutive requests is one
measurement, because its cost is linear in the batches. Consecutive prompts have nearly equal lengths, so it
computes little padding. Its cache is its default, its attention PyTorch's fused one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from bench.workloads import Workload
from metareward.sampler import Request, SamplingParams

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCHES = (16, 32, 64)
Measurement = dict[str, Any]


class Peer:
    """The model in transformers, in both dtypes."""

    def __init__(self, model: Path, stop_ids: Iterable[int], device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.device = device
        self.stop_ids = sorted(stop_ids)
        self.models = {
            name: AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa")
            .to(device)
            .eval()
            for name, dtype in DTYPES.items()
        }

    def warm_up(self, workload: Workload) -> None:
        """A few tokens in each dtype, not measured."""
        params = SamplingParams(workload.params.temperature, workload.params.top_p, max_new_tokens=4)
        for dtype in self.models:
            self.generate(dtype, workload.requests[:4], params)

    def measure(
        self, workload: Workload, dtype: str, batch: int, *, turn: int, turns: int, seed: int
    ) -> Measurement:
        """One batch; each of the `turns` turns takes another place in the workload, spread over all of it."""
        batch = min(batch, len(workload.requests))
        first = (2 * turn + 1) * (len(workload.requests) - batch) // (2 * turns)
        requests = workload.requests[first : first + batch]
        torch.manual_seed(seed + turn)
        start = perf_counter()
        new_tokens = self.generate(dtype, requests, workload.params)
        seconds = perf_counter() - start
        return {
            "round": turn,
            "dtype": dtype,
            "batch": batch,
            "first_request": first,
            "prompt_tokens": sum(len(request.prompt) for request in requests),
            "new_tokens": new_tokens,
            "seconds": seconds,
            "tokens_per_s": new_tokens / seconds,
        }

    def generate(self, dtype: str, requests: Sequence[Request], params: SamplingParams) -> int:
        """Complete the requests as one batch; returns how many tokens that gave."""
        from transformers import GenerationConfig

        longest = max(len(request.prompt) for request in requests)
        pad = self.stop_ids[0] if self.stop_ids else 0
        ids = torch.full((len(requests), longest), pad)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, longest - len(request.prompt) :] = 1
        settings = GenerationConfig(
            do_sample=True,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_new_tokens=params.max_new_tokens,
            max_new_tokens=params.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=self.stop_ids or None,
        )
        out = self.models[dtype].generate(
            ids.to(self.device), attention_mask=mask.to(self.device), generation_config=settings
        )
        new_tokens = out[:, longest:].numel()
        if new_tokens != len(requests) * params.max_new_tokens:
            raise RuntimeError(f"generate made {new_tokens} tokens, not {params.max_new_tokens} a request")
        return new_tokens


def plan(earlier: Sequence[Measurement]) -> list[tuple[str, int]]:
    """(dtype, batch) to measure in the next round: everything first, from then on the best of bf16, which the ratio is
    to, and the best of fp32 where that was faster."""
    if not earlier:
        return [(dtype, batch) for dtype in DTYPES for batch in BATCHES]
    rates = {dtype: tokens_per_s([m for m in earlier if m["round"] == 0], dtype) for dtype in DTYPES}
    again = [dtype for dtype in DTYPES if dtype == "bf16" or rates[dtype] > rates["bf16"]]
    return [(dtype, best_batch(earlier, dtype)) for dtype in again]


def best_batch(measurements: Sequence[Measurement], dtype: str) -> int:
    """The batch size that was fastest in the first round."""
    first = [m for m in measurements if m["round"] == 0 and m["dtype"] == dtype]
    return int(max(first, key=lambda m: m["tokens_per_s"])["batch"])


def tokens_per_s(measurements: Sequence[Measurement], dtype: str) -> float:
    """Median over the rounds at the best batch size."""
    batch = best_batch(measurements, dtype)
    return statistics.median(
        m["tokens_per_s"] for m in measurements if (m["dtype"], m["batch"]) == (dtype, batch)
    )

"""What the marks of one sampling step cost: `pytest bench/test_spans_bench.py --benchmark-only`. Hold it against a step's time."""

from __future__ import annotations

from pathlib import Path

import torch

from metareward.run.spans import Spans


def test_marks_of_a_sampling_step(benchmark, tmp_path: Path) -> None:
    spans = Spans(tmp_path / "rank-0.jsonl", torch.device("cpu"))

    def step() -> None:
        spans.mark("host")
        spans.mark("host", requests=1, prompt_tokens=300)
        spans.mark("decode", passes=1, rows=64, prefill_rows=0, logit_rows=64, pairs=25_600, kv_tokens=12_800)
        spans.mark("sample", logit_rows=64)
        spans.mark("host")
        spans.mark("host", new_tokens=64, completions=1)
        spans.step()

    with spans.stage("judge", 1):
        benchmark(step)

"""Attention over shared prefixes equals attention of each sequence over all its own, at every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from metareward_kernels import Segments, paged_attention
from torch import Tensor

from metareward.model import inference
from metareward.model.chat import Chat
from metareward.model.hf_files import load_decoder
from metareward.sampler import Engine, Request, SamplingParams


def unshared(segments: Segments, rows: int, page_size: int) -> Segments:
    """The same reading with one segment a row: all pages of the row in the order of the segments."""
    pages: list[list[int]] = [[] for _ in range(rows)]
    seen = [0] * rows
    starts, lengths = segments.page_starts.tolist(), segments.lengths.tolist()
    for g, (first, last) in enumerate(zip(segments.row_starts, segments.row_starts[1:], strict=False)):
        used = segments.page_ids[starts[g] : starts[g] - (-lengths[g] // page_size)].tolist()
        for row, limit in zip(
            segments.rows[first:last].tolist(), segments.limits[first:last].tolist(), strict=True
        ):
            assert seen[row] % page_size == 0, "only the last segment of a row may end inside a page"
            pages[row] += used[: -(-limit // page_size)]
            seen[row] += limit
    counts = torch.tensor([len(row) for row in pages])
    limits = torch.tensor(seen, dtype=torch.int32)
    return Segments(
        page_ids=torch.tensor([page for row in pages for page in row], dtype=torch.int32),
        page_starts=(counts.cumsum(0) - counts).to(torch.int32),
        lengths=limits,
        rows=torch.arange(rows, dtype=torch.int32),
        row_starts=torch.arange(rows + 1, dtype=torch.int32),
        limits=limits,
    )


class Compared:
    """Stands in for the op: computes both ways and keeps the largest difference."""

    def __init__(self) -> None:
        self.worst = 0.0
        self.calls = 0
        self.most_readers = 0
        self.most_segments = 0

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, segments: Segments, scale: float, tiles: None
    ) -> Tensor:
        together = paged_attention(query, keys, values, segments, scale)
        alone = paged_attention(query, keys, values, unshared(segments, len(query), keys.shape[1]), scale)
        self.worst = max(self.worst, float((together - alone).abs().max()))
        self.calls += 1
        whole = segments.limits == segments.lengths.repeat_interleave(segments.row_starts.diff())
        self.most_readers = (
            max(self.most_readers, int(segments.row_starts.diff().max())) if whole.all() else 0
        )
        self.most_segments = max(self.most_segments, int(torch.bincount(segments.rows).max()))
        return together


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Compared:
    stand_in = Compared()
    monkeypatch.setattr(inference, "paged_attention", stand_in)
    return stand_in


def test_tiny_model_with_three_levels(tiny: Any, compared: Compared) -> None:
    base = tiny.prompt(40)
    requests = [
        Request(f"{a}/{b}/{m}", (*base, *tiny.prompt(20, salt=a), *tiny.prompt(18, salt=10 * a + b)))
        for a in range(3)
        for b in range(3)
        for m in range(2)
    ]
    params = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=10)
    tiny.run(tiny.engine(page_size=4), requests, params)
    assert compared.most_segments >= 4, "no sequence read three shared prefixes"
    assert compared.worst < 1e-5


def test_real_model(tiny: Any, smollm2: Path, compared: Compared) -> None:
    chat = Chat.load(smollm2)
    engine = Engine(load_decoder(smollm2, dtype=torch.float32), stop_ids=(), seed=0)
    requests = []
    for question in ("Name a colour and say where it is seen.", "Name a colour that is not red."):
        prompt = tuple(chat.render([{"role": "user", "content": question}]))
        requests += tiny.samples(prompt, 4, question)
    tiny.run(engine, requests, SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=20))
    assert compared.calls == 30 * engine.stats.steps
    assert compared.most_segments >= 2
    assert compared.worst < 1e-5

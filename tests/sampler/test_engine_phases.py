"""What the engine tells of its steps: every row, pair and cache position counted, against a count by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from metareward.sampler import Request, SamplingParams


@dataclass
class Heard:
    """Keeps what is said: (phase, counts) in order, and the number of steps."""

    marks: list[tuple[str, dict[str, float]]] = field(default_factory=list)
    steps: int = 0

    def mark(self, phase: str, **counts: float) -> None:
        self.marks.append((phase, counts))

    def step(self) -> None:
        self.steps += 1

    def total(self, name: str, *phases: str) -> float:
        return sum(counts.get(name, 0) for phase, counts in self.marks if not phases or phase in phases)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_every_row_is_counted_once(tiny, lookahead: int) -> None:
    heard = Heard()
    engine = tiny.engine(phases=heard, lookahead=lookahead, page_size=4, max_step_tokens=24, max_running=3)
    lengths = (9, 14, 30, 5)
    requests = [Request(f"r/{length}", tiny.prompt(length)) for length in lengths]
    tiny.run(engine, requests, SamplingParams(max_new_tokens=6))
    forward = ("prefill", "decode", "mixed")
    # Every prompt token, and every new token but the last, which nothing follows.
    assert heard.total("rows", *forward) == sum(lengths) + 4 * 5
    assert heard.total("prefill_rows", *forward) == engine.stats.prefill_tokens == sum(lengths)
    assert heard.total("logit_rows", *forward) == heard.total("logit_rows", "sample") == 4 * 6
    pairs = sum(
        length * (length + 1) / 2 + sum(length + place for place in range(1, 6)) for length in lengths
    )
    assert heard.total("pairs", *forward) == pairs
    assert heard.total("passes", *forward) == engine.stats.steps
    assert heard.total("requests") == 4
    assert heard.total("completions") == 4
    assert heard.total("prompt_tokens") == sum(lengths)
    assert heard.total("new_tokens") == 4 * 6
    assert heard.steps >= engine.stats.steps
    kinds = {phase for phase, _ in heard.marks}
    assert kinds == {"prefill", "decode", "mixed", "sample", "host"}


def test_a_shared_prefix_is_read_once_and_met_by_all(tiny) -> None:
    heard = Heard()
    engine = tiny.engine(phases=heard, page_size=4, max_running=8)
    tiny.run(engine, tiny.samples(tiny.prompt(16), 8), SamplingParams(max_new_tokens=3))
    # Two decode steps of 8 rows; 16 positions are read once, each row's own 1 and 2 by itself.
    assert heard.total("rows", "decode") == 16
    assert heard.total("pairs", "decode") == 8 * 17 + 8 * 18
    assert heard.total("kv_tokens", "decode") == (16 + 8) + (16 + 16)
    assert heard.total("prefill_rows", "prefill") == 16

"""reference_logprobs.jsonl: what is written comes back, and what does not belong is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from metareward.errors import UserError
from metareward.run.jsonl import read_jsonl
from metareward.stages.train import read_reference, write_lines
from metareward.training.examples import Example

PAIRS = [Example(name, "actor", (1, 2), ((3,), (4, 5))) for name in ("a", "b")]
FOUND = {"a": (-1.5, -2.25), "b": (-0.125, -7.0)}


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "reference.jsonl"
    write_lines(path, PAIRS, FOUND, "digest")
    assert read_reference(path, PAIRS, "digest") == FOUND


def test_a_loss_without_a_reference_has_rows_without_numbers(tmp_path: Path) -> None:
    """The rows still tie the run's checkpoints to pairs and weights."""
    path = tmp_path / "reference.jsonl"
    write_lines(path, PAIRS, {}, "digest")
    assert [line["chosen_logprob"] for line in read_jsonl(path)] == [None, None]
    assert read_reference(path, PAIRS, "digest", needed=False) == {}
    with pytest.raises(UserError, match="comes from other weights for the pair a"):
        read_reference(path, PAIRS, "another", needed=False)
    with pytest.raises(UserError, match=r"has no log-probs for the pair a: .*; delete it"):
        read_reference(path, PAIRS, "digest", needed=True)


@pytest.mark.parametrize("needed", [True, False])
def test_a_missing_pair_is_refused(tmp_path: Path, needed: bool) -> None:
    path = tmp_path / "reference.jsonl"
    write_lines(path, PAIRS[:1], FOUND, "digest")
    with pytest.raises(UserError, match="has no row for the pair b"):
        read_reference(path, PAIRS, "digest", needed)

"""Padding of decode steps to the fixed shapes of CUDA graphs, and the packing of a step, on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metareward.errors import UserError
from metareward.sampler import SamplingParams
from metareward.sampler.graphs import DecodeGraphs, bucket_of, pad_step
from metareward.sampler.inputs import Tiling, as_inputs, host_arrays, pack, to_device, unpack
from metareward.sampler.runner import Runner
from metareward.sampler.step import Step

PARAMS = SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=6)


def test_buckets_are_few_and_hold_every_step() -> None:
    for most in (1, 3, 33, 256, 1000):
        buckets = [bucket_of(rows, most) for rows in range(1, most + 1)]
        assert all(bucket >= rows for rows, bucket in enumerate(buckets, 1))
        assert buckets == sorted(buckets)
        assert buckets[-1] == most
        assert len(set(buckets)) <= 6 + most // 32
    assert [bucket_of(rows, 1000) for rows in (1, 2, 3, 9, 33, 256, 257, 513)] == [
        1,
        2,
        4,
        16,
        64,
        256,
        288,
        576,
    ]


def test_packed_arrays_come_back_as_they_were() -> None:
    arrays: list[Any] = [
        np.arange(3),
        np.zeros((0, 6), np.int32),
        np.arange(10, dtype=np.int32).reshape(5, 2),
    ]
    arrays += [np.arange(20, dtype=np.int32)[::3], np.array([2**62], dtype=np.int64)]
    buffer = pack(arrays, pinned=False)
    for array, tensor, direct in zip(
        arrays, unpack(buffer, arrays), to_device(arrays, buffer.device), strict=True
    ):
        assert tensor.data_ptr() % 16 == buffer.data_ptr() % 16 or tensor.numel() == 0
        assert torch.equal(tensor, torch.from_numpy(array.copy()))
        assert torch.equal(tensor, direct)


class PaddedToo:
    """Stands in for `Runner.forward`: computes decode steps padded as well, from the same cache, and compares."""

    def __init__(self, runner: Runner, rows: int) -> None:
        self.runner = runner
        self.rows = rows
        self.plain = runner.forward
        self.compared = 0

    @torch.inference_mode()
    def __call__(self, step: Step) -> Tensor:
        before = self.cache()
        logits = self.plain(step)
        if step.prefill_tokens:
            return logits
        runner, after = self.runner, self.cache()
        self.write(before)
        if len(step.copies):
            runner._copy_pages(step.copies)
        padded = pad_step(
            step, self.rows, slot=runner._max_running, page=runner.pages, page_size=runner.page_size
        )
        inputs = as_inputs(to_device(host_arrays(padded, None), runner.device), None)
        extra = self.rows - len(step.positions)
        assert not runner._newest[inputs.decode_slots[len(step.positions) :]].any()
        poison = runner.model.decoder.model.embed_tokens.register_forward_hook(
            self.poisoned(len(step.positions))
        )
        try:
            found = runner._compute(inputs)
        finally:
            poison.remove()
        assert found.shape == (self.rows, logits.shape[1])
        assert torch.equal(found[: len(logits)], logits)
        assert found[len(logits) :].isnan().all(), "the poison did not arrive"
        used = min(extra, runner.page_size)
        for was, wanted, now in zip(before, after, self.cache(), strict=True):
            assert same(now[: runner.pages], wanted[: runner.pages])
            assert same(now[runner.pages, used:], was[runner.pages, used:])
        self.compared += 1
        return logits

    def poisoned(self, real: int) -> Any:
        def hook(module: nn.Module, arguments: Any, embedded: Tensor) -> Tensor:
            return embedded.index_fill(0, torch.arange(real, len(embedded)), float("nan"))

        return hook

    def cache(self) -> list[Tensor]:
        return [pages.clone() for pages in (*self.runner.key_pages, *self.runner.value_pages)]

    def write(self, contents: list[Tensor]) -> None:
        for pages, content in zip((*self.runner.key_pages, *self.runner.value_pages), contents, strict=True):
            pages.copy_(content)


def same(one: Tensor, other: Tensor) -> bool:
    """Equal bits, those of NaN too."""
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


@pytest.mark.parametrize("implementation", ["", "torch"])
def test_padding_changes_no_logit_and_no_page(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    monkeypatch.setenv("METAREWARD_KERNELS", implementation)
    # A product of few rows may be summed in another order than one of many: here each row has its own.
    monkeypatch.setattr(
        nn.functional,
        "linear",
        lambda x, weight, bias=None: (
            torch.stack([torch.mv(weight, row) for row in x]) + (0 if bias is None else bias)
        ),
    )
    engine = tiny.engine(page_size=4)
    compared = PaddedToo(engine.runner, rows=16)
    monkeypatch.setattr(engine.runner, "forward", compared)
    requests = [*tiny.samples(tiny.prompt(21), 5, "a"), *tiny.samples(tiny.prompt(10), 3, "b")]
    assert len(tiny.run(engine, requests, PARAMS)) == 8
    assert compared.compared >= 4


def test_what_graphs_cannot_do_is_one_sentence(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cuda_graphs is True and the model is on cpu: leave it unset"):
        tiny.engine(cuda_graphs=True)
    engine = tiny.engine(max_running=2)
    assert engine.runner.graphs is None
    steps: list[Step] = []
    forward = engine.runner.forward
    monkeypatch.setattr(engine.runner, "forward", lambda step: (steps.append(step), forward(step))[1])
    tiny.run(engine, tiny.samples(tiny.prompt(5), 1), PARAMS)
    graphs = DecodeGraphs(
        lambda inputs: torch.zeros(2, 3), Tiling((4, 16), 2), torch.device("cpu"), max_running=2, page_size=16
    )

    def fails(inputs: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "_record", fails)
    sentence = r"batch size 1 could be captured \(operation not permitted.*\): make the engine with cuda_graphs=False"
    with pytest.raises(UserError, match=sentence):
        graphs.run(steps[-1], slot=2, page=0)

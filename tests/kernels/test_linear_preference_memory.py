"""linear_preference: peak memory, in every implementation."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

import pytest

pytestmark = pytest.mark.usefixtures("kernels")


MEMORY = """
import functools, sys, torch
from metareward_kernels import linear_preference
from metareward_kernels.pair_losses import dpo
torch.set_num_threads(1)
path, dtype, tokens, width, vocabulary = sys.argv[1], getattr(torch, sys.argv[2]), 4096, 16, 49152
hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
targets = torch.randint(0, vocabulary, (tokens,))
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
def call(tokens):
    sums = tokens // 8
    starts, pairs = torch.arange(0, tokens + 1, sums), torch.arange(8).view(4, 2)
    if path == "eager":
        logprobs = (hidden[:tokens] @ weight.T).float().log_softmax(1).gather(1, targets[:tokens, None])
        logprobs = logprobs.view(8, sums).sum(1)
        torch.nn.functional.softplus(0.1 * (logprobs[1::2] - logprobs[::2])).mean().backward()
    else:
        loss = functools.partial(dpo, beta=0.1)
        linear_preference(hidden[:tokens], weight, targets[:tokens], starts, pairs, torch.zeros(8), loss).loss.backward()
call(16)  # loads and allocates what any call does
before = peak()
call(tokens)
print(peak() - before)
"""


@cache
def extra_memory(path: str, dtype: str, kernels: str) -> int:
    """KiB that a call adds to the peak of a process of its own."""
    command = [sys.executable, "-c", MEMORY, path, dtype]
    environment = {**os.environ, "METAREWARD_KERNELS": "torch" if kernels == "torch" else ""}
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the kernel's record of the peak")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_a_fifth_of_eager(kernels: str, dtype: str) -> None:
    if kernels == "torch" and dtype == "bfloat16":
        pytest.skip("without the compiled kernel bf16 products are slow")

    ours, eager = extra_memory("ours", dtype, kernels), extra_memory("eager", dtype, "")
    assert eager > 4096 * 49152 * 4 * 2 // 1024  # the eager path did hold two such matrices, in KiB
    assert ours <= 0.2 * eager

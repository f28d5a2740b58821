"""The size of the key-value cache, from free memory and from what can be used at all."""

from __future__ import annotations

import pytest
import torch

from metareward.config import SamplerSettings
from metareward.errors import UserError
from metareward.stages.context import kv_tokens

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_share_of_the_free_memory_in_whole_pages() -> None:
    settings = SamplerSettings(max_running=1000, page_size=16)
    # 100 bytes a token: half of 1,000,000 bytes is 312 pages of 1,600 bytes, four fifths are 500.
    assert kv_tokens(1_000_000, 100, 4096, settings, CPU) == 312 * 16
    assert kv_tokens(1_000_000, 100, 4096, settings, GPU) == 500 * 16
    own = SamplerSettings(max_running=1000, page_size=16, kv_memory=0.25)
    assert kv_tokens(1_000_000, 100, 4096, own, GPU) == 156 * 16


def test_never_more_than_the_running_sequences_can_use() -> None:
    settings = SamplerSettings(max_running=3, page_size=16)
    assert kv_tokens(10**12, 100, 100, settings, CPU) == 3 * 7 * 16


def test_too_little_memory_is_said() -> None:
    with pytest.raises(UserError, match=r"3 MiB that are free .* raise sampler\.kv_memory"):
        kv_tokens(3 * 2**20, 2**20, 4096, SamplerSettings(), CPU)

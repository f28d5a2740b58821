"""Float32 master weights from a bf16 file, each at a place of its own in the cell of numbers that round to it.

A bf16 weight of 0.2 stands for all numbers within 0.0005 of it. Masters that start in the middle of their cells all stay there
for their first hundred updates at a learning rate of 5e-6: the bf16 copies that the passes compute with do not change, and
training sees none of it. Spread evenly over the cell, a share of the weights crosses its edge at every update, as large as the
update is: the copies follow the masters from the first step, on average exactly. Until then they are the file's, to the bit.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

# Of the 2^16 float32 numbers from one bf16 number to the next, all but the tie are this near to one of them or nearer.
NEAREST = 0x7FFF


def spread_in_cells_(weight: Tensor, name: str) -> Tensor:
    """Move every number of `weight`, float32 and equal to a bf16 number, within what rounds to it; in place.

    A pure function of `name`, the shape and the kind of device, on any rank. Zeros stay: every update of a zero shows.
    """
    assert weight.dtype == torch.float32, weight.dtype
    generator = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
    places = torch.randint(
        -NEAREST, NEAREST + 1, weight.shape, dtype=torch.int16, device=weight.device, generator=generator
    )
    places.masked_fill_(weight == 0, 0)
    # Floats of one sign are in the order of their bits, so this crosses powers of two as rounding does.
    weight.view(torch.int32).add_(places)
    return weight

"""Random numbers that belong to a request and not to a batch: key = (seed, identity), counter = position.

A counter-based generator has no state, so order, batch size, rank count and restarts change no number. Philox4x32-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is written three times, here in int64 arithmetic
of PyTorch, in csrc/cpu/philox.h and in triton_random_keys.py, with identical bits.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from metareward_kernels import dispatch

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def request_key(seed: int, identity: str) -> int:
    """Signed 64-bit key of a request: the first eight bytes of SHA-256 over the seed and the identity."""
    digest = hashlib.sha256(f"{seed}\n{identity}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def philox4x32_10(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32: four counter words and two key words, each an int64 tensor holding 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap in int64, but their bits are right; the mask makes the shift a logical one.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & _MASK32) ^ c1 ^ k0, ((p0 >> 32) & _MASK32) ^ c3 ^ k1
        c1, c3 = p1 & _MASK32, p0 & _MASK32
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK32, (k1 + _KEY_STEPS[1]) & _MASK32
    return c0, c1, c2, c3


def keyed_uniforms_torch(keys: Tensor, positions: Tensor) -> Tensor:
    """The PyTorch path of `keyed_uniforms`."""
    zero = torch.zeros_like(positions)
    counter = (positions & _MASK32, (positions >> 32) & _MASK32, zero, zero)
    words = philox4x32_10(counter, (keys & _MASK32, (keys >> 32) & _MASK32))
    bits = (words[0] << 21) | (words[1] >> 11)
    return bits.double().clamp_min_(0.5).mul_(2.0**-53)


@torch.library.custom_op("metareward::keyed_uniforms", mutates_args=())
def _keyed_uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    chosen = dispatch.implementation("keyed_uniforms", keys.device.type)
    if chosen == "cpp":
        return torch.ops.metareward.keyed_uniforms_cpp(keys.contiguous(), positions.contiguous())
    if chosen == "triton":
        from metareward_kernels.triton_random_keys import keyed_uniforms_triton

        return keyed_uniforms_triton(keys, positions)
    return keyed_uniforms_torch(keys, positions)


@_keyed_uniforms.register_fake
def _(keys: Tensor, positions: Tensor) -> Tensor:
    return torch.empty(keys.shape, dtype=torch.float64, device=keys.device)


def keyed_uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """One uniform number strictly inside (0,1) for every (key, position).

    keys [S] int64: any 64 bits (see `request_key`). positions [S] int64: the counter, the index of the token drawn.
    Returns [S] float64 of 53 random bits; the one value 0 is replaced by 2**-54. About 100 integer operations each.
    Raises TypeError or ValueError for other dtypes or shapes.
    """
    if keys.dtype != torch.int64 or positions.dtype != torch.int64:
        raise TypeError(f"keys and positions must be int64, got {keys.dtype} and {positions.dtype}")
    if keys.dim() != 1 or keys.shape != positions.shape:
        raise ValueError(
            f"keys and positions must be [S] and [S], got {list(keys.shape)} and {list(positions.shape)}"
        )
    return _keyed_uniforms(keys, positions)

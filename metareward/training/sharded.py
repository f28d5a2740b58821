"""The decoder under FSDP2: meta-device start, sharded, float32 master weights read straight from safetensors, and out again.

One path for one process and for many. Has run on CPU ranks (gloo) only; not on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from metareward.config import TrainSettings
from metareward.model.decoder import Decoder
from metareward.model.hf_files import iterate_tensors, read_config


def load_sharded(folder: Path, settings: TrainSettings, device: torch.device, world_size: int) -> Decoder:
    """The decoder of a Hugging Face directory, sharded over all ranks.

    Parameters are float32 DTensors; blocks compute in `settings.compute_dtype`, gradients are reduced in float32.
    """
    with torch.device("meta"):
        decoder = Decoder(read_config(folder)).float()
    decoder.activation_checkpointing = settings.activation_checkpointing
    mesh = init_device_mesh(device.type, (world_size,))
    # Inputs are ids, positions and float32 rotary tables: casting them would only lose precision.
    policy = (
        MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        if settings.compute_dtype == "bfloat16"
        else MixedPrecisionPolicy(cast_forward_inputs=False)
    )
    for block in decoder.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The rest, embedding, final norm and head, is the root's: unsharded once a forward, tied heads stay tied.
    fully_shard(decoder, mesh=mesh, mp_policy=policy)
    decoder.to_empty(device=device)
    fill(decoder, folder)
    return decoder


@torch.no_grad()
def fill(decoder: Decoder, folder: Path) -> None:
    """Copy every rank's slice of the weights in `folder`, one tensor at a time."""
    parameters = dict(decoder.named_parameters())
    for name, tensor in iterate_tensors(folder):
        parameter = parameters.pop(name)
        assert isinstance(parameter, DTensor)
        whole = tensor.to(device=parameter.device, dtype=parameter.dtype)
        # Every rank reads the file itself, so there is nothing to send (src_data_rank=None).
        mine = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(mine.to_local())
    assert not parameters, f"weights that {folder} did not fill: {sorted(parameters)}"


def reshard(decoder: Decoder) -> None:
    """Give up the gathered weights that a forward pass without a backward leaves behind.

    Without this the root's parameters would still be whole tensors, and an optimizer built now would update copies.
    """
    assert isinstance(decoder, FSDPModule)
    decoder.reshard()


def whole_tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor on the CPU) one by one. A collective: every rank must consume it to the end."""
    for name, parameter in decoder.named_parameters():
        value = parameter.detach()
        yield name, (value.full_tensor() if isinstance(value, DTensor) else value).cpu()

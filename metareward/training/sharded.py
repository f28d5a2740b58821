"""The decoder under FSDP2: meta-device start, sharded, float32 master weights read straight from safetensors, and out again.

One path for one process and for many. Every block, the embedding and the head are units of their own: gathered, computed with
and given up one by one; the root is left with the final norm. Has run on CPU ranks (gloo) only; not on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from metareward.config import TrainSettings
from metareward.errors import UserError
from metareward.model.decoder import Decoder
from metareward.model.hf_files import iterate_tensors, read_config
from metareward.training.compiled import check_compiler, compile_blocks
from metareward.training.lora import add_adapters, checkpoint_name, fill_adapters, is_adapter, merged
from metareward.training.spread import spread_in_cells_


def check_shard_within(shard_within: int, world_size: int) -> None:
    """Groups of `shard_within` ranks must take up all ranks.

    Raises:
        UserError: naming the values that do.
    """
    if shard_within and world_size % shard_within:
        choices = ", ".join(str(size) for size in range(1, world_size) if world_size % size == 0)
        raise UserError(
            f"train.shard_within = {shard_within} does not divide {world_size} "
            f"process{'es' if world_size > 1 else ''}: set it to 0 (all of them)"
            + (f" or one of {choices}" if choices else "")
            + ", or change the number of processes"
        )


def training_mesh(device_type: str, world_size: int, shard_within: int) -> DeviceMesh:
    """One dimension, `shard`; or two, `replicate` and `shard`, where less than all ranks share the weights.

    torchrun counts ranks node by node, so with `shard_within` ranks a node a row of the mesh is a node.
    """
    check_shard_within(shard_within, world_size)
    if shard_within in (0, world_size):
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    shape = (world_size // shard_within, shard_within)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def load_sharded(
    folder: Path,
    settings: TrainSettings,
    device: torch.device,
    world_size: int,
    adapter_seed: Sequence[int] = (),
) -> Decoder:
    """The decoder of a Hugging Face directory, sharded over all ranks or, by `train.shard_within`, over groups of them.

    Parameters are float32 DTensors; blocks compute in `settings.compute_dtype`, gradients are reduced in float32. With
    `settings.lora_rank` only adapters require gradients, and `adapter_seed` decides where they start.

    Raises:
        UserError: `train.shard_within` does not divide the number of ranks; or a setting needs what is not installed.
    """
    check_compiler(settings, device)
    mesh = training_mesh(device.type, world_size, settings.shard_within)
    with torch.device("meta"):
        decoder = Decoder(read_config(folder)).float()
        if settings.lora_rank:
            add_adapters(decoder, settings)
    decoder.activation_checkpointing = settings.activation_checkpointing
    # Inputs are ids, positions and float32 rotary tables: casting them would only lose precision.
    policy = (
        MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        if settings.compute_dtype == "bfloat16"
        else MixedPrecisionPolicy(cast_forward_inputs=False)
    )
    if settings.compile:
        compile_blocks(decoder)
    shard(decoder, mesh, policy)
    decoder.to_empty(device=device)
    fill(decoder, folder, spread=settings.compute_dtype == "bfloat16")
    if settings.lora_rank:
        fill_adapters(decoder, adapter_seed)
    return decoder


def shard(decoder: Decoder, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Make the units of FSDP2, from the inside out."""
    for block in decoder.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    tied = decoder.lm_head is None
    # Tied, the matrix is needed at both ends of the pass, so it stays gathered in between.
    fully_shard(decoder.model.embed_tokens, mesh=mesh, mp_policy=policy, reshard_after_forward=not tied)
    if decoder.lm_head is not None:
        # Its backward comes right after its forward: given up in between, it would be gathered twice.
        fully_shard(decoder.lm_head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        # The gradient of a row look-up needs no weights.
        embedding = decoder.model.embed_tokens
        assert isinstance(embedding, FSDPModule)
        embedding.set_unshard_in_backward(False)
    fully_shard(decoder, mesh=mesh, mp_policy=policy)


@torch.no_grad()
def fill(decoder: Decoder, folder: Path, spread: bool = False) -> None:
    """Copy every rank's slice of the weights in `folder`, one tensor at a time; with `spread`, those of bf16 files are spread
    over the numbers that round to them."""
    parameters = {
        checkpoint_name(name): parameter
        for name, parameter in decoder.named_parameters()
        if not is_adapter(name)
    }
    for name, tensor in iterate_tensors(folder):
        parameter = parameters.pop(name)
        assert isinstance(parameter, DTensor)
        whole = tensor.to(device=parameter.device, dtype=parameter.dtype)
        if spread and tensor.dtype == torch.bfloat16:
            whole = spread_in_cells_(whole, name)
        # Every rank reads the file itself, so there is nothing to send (src_data_rank=None).
        mine = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(mine.to_local())
    assert not parameters, f"weights that {folder} did not fill: {sorted(parameters)}"


def reshard(decoder: Decoder) -> None:
    """Give up the gathered weights that a forward pass without a backward leaves behind.

    Without this the root's parameters would still be whole tensors, and an optimizer built now would update copies.
    """
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor on the CPU) one by one, as a model's files have them: adapters are merged into their matrices.

    A collective: every rank must consume it to the end.
    """
    for name, parameter in decoder.named_parameters():
        if is_adapter(name):
            continue
        value = parameter.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        yield checkpoint_name(name), merged(decoder, name, whole).cpu()

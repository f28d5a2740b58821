"""The head's weight as a whole tensor, for a training step that computes the head itself.

Left alone its unit of FSDP2 is gathered for every micro-batch, and its gradient, [V,H] and the largest of all, is reduce-scattered
after each. `hold_head` keeps it gathered from the first micro-batch of a step to the last and adds its gradients up in the reduce
dtype, so that a step has one all-gather and one reduce-scatter of it. A tied weight is the embedding's: the two gradients meet in
one tensor. Has run on CPU ranks (gloo) only.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from metareward.model.decoder import Decoder


def head_unit(decoder: Decoder) -> FSDPModule | None:
    """The unit that holds the head's weight: its own, or the embedding's where they are tied; None where nothing is sharded."""
    unit = decoder.model.embed_tokens if decoder.lm_head is None else decoder.lm_head
    return unit if isinstance(unit, FSDPModule) else None


def head_weight(decoder: Decoder) -> Tensor:
    """[V,H] in the compute dtype, a leaf that takes part in autograd; gathered now where it is not yet. A collective.

    Valid until the weights are sharded again: at the end of a step, or by `sharded.reshard` after a forward pass alone.
    """
    unit = head_unit(decoder)
    if unit is not None:
        unit.unshard()
    weight = decoder.head_weight
    assert not isinstance(weight, DTensor), "a DTensor head that is in no unit of its own"
    return weight


def hold_head(decoder: Decoder, last: bool) -> None:
    """Before a micro-batch: whether it is the last of its step, after which the head is reduced and sharded again.

    A decoder that is not sharded has nothing to hold: autograd adds its gradients up in place.
    """
    unit = head_unit(decoder)
    if unit is not None:
        unit.set_requires_gradient_sync(last, recurse=False)
        unit.set_reshard_after_backward(last, recurse=False)

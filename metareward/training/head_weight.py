"""The head's weight as a whole tensor, for a training step that computes the head itself.

The root unit of FSDP2 holds embedding, final norm and head. Left alone it is gathered for every micro-batch, and its gradient,
[V,H] and the largest of all, is reduce-scattered after each. `hold_head` keeps it gathered from the first micro-batch of a step to
the last and adds its gradients up in the reduce dtype, so that a step has one all-gather and one reduce-scatter of it.
A tied weight is the embedding's: the two gradients meet in one tensor. Has run on CPU ranks (gloo) only.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from metareward.model.decoder import Decoder


def head_weight(decoder: Decoder) -> Tensor:
    """[V,H] in the compute dtype, a leaf that takes part in autograd; gathered now where it is not yet. A collective.

    Valid until the weights are sharded again: at the end of a step, or by `sharded.reshard` after a forward pass alone.
    """
    if isinstance(decoder.head_weight, DTensor):
        assert isinstance(decoder, FSDPModule), "a DTensor head of a decoder that FSDP does not know"
        decoder.unshard()
    weight = decoder.head_weight
    assert not isinstance(weight, DTensor), "the head is in a unit that the root's unshard does not gather"
    return weight


def hold_head(decoder: Decoder, last: bool) -> None:
    """Before a micro-batch: whether it is the last of its step, after which the head is reduced and sharded again.

    A decoder that is not sharded has nothing to hold: autograd adds its gradients up in place.
    """
    if isinstance(decoder, FSDPModule):
        decoder.set_requires_gradient_sync(last, recurse=False)
        decoder.set_reshard_after_backward(last, recurse=False)

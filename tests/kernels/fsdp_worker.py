"""One rank of test_head_under_fsdp.py: a tied model whose head is linear_logprob trains two steps under fully_shard.

With torchrun's environment variables; argument: the file for what this rank saw, written by torch.save.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from metareward_kernels import dpo_loss, linear_logprob
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

VOCABULARY, WIDTH = 67, 12  # rows that two ranks cannot share evenly
LENGTHS = (5, 3, 6, 4)  # of the sequences of a micro-batch: two pairs
STEPS, MICRO_BATCHES = 2, 2
Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]


class TiedModel(nn.Module):
    """Embedding, a block, the embedding again as head, and the loss of two pairs: forward() is a micro-batch's loss."""

    def __init__(self, head: Logprobs) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.5)
        self.block = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.block.weight.copy_(torch.randn(WIDTH, WIDTH, generator=generator) * 0.3)
            self.block.bias.zero_()
        self.head = head

    def forward(self, inputs: Tensor, targets: Tensor, reference: Tensor) -> Tensor:
        hidden = self.embedding[inputs]
        hidden = hidden + torch.tanh(self.block(hidden))
        logprobs = self.head(hidden, self.embedding, targets)
        cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
        pairs = torch.tensor([[0, 1], [2, 3]])
        return dpo_loss(logprobs, cu_seqlens, pairs, reference, beta=0.5).losses.mean()


def micro_batch(step: int, rank: int, index: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + index)
    tokens = torch.randint(0, VOCABULARY, (2, sum(LENGTHS)), generator=generator)
    return tokens[0], tokens[1], -torch.rand(len(LENGTHS), generator=generator) * 5


def plain_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)


def train_plain(ranks: int) -> dict[str, Any]:
    """What all ranks together must come to, by one process with nothing of ours or FSDP's in the head."""
    model = TiedModel(plain_head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    gradients = []
    for step in range(STEPS):
        batches = [micro_batch(step, rank, index) for rank in range(ranks) for index in range(MICRO_BATCHES)]
        (sum(model(*batch) for batch in batches) / ranks).backward()
        gradients.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": {name: x.detach() for name, x in model.named_parameters()}, "gradients": gradients}


def train_sharded(rank: int) -> dict[str, Any]:
    model = TiedModel(lambda hidden, weight, targets: linear_logprob(hidden, weight, targets, chunk_tokens=7))
    fully_shard(model.block)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    gradients = []
    for step in range(STEPS):
        for index in range(MICRO_BATCHES):
            model.set_requires_gradient_sync(index == MICRO_BATCHES - 1)
            model(*micro_batch(step, rank, index)).backward()
        gradients.append({name: x.grad.full_tensor() for name, x in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    return {
        "weights": {name: x.detach().full_tensor() for name, x in model.named_parameters()},
        "gradients": gradients,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(train_sharded(int(os.environ["RANK"])), sys.argv[1])
    dist.destroy_process_group()

"""The tensors of the sampler: the key-value pages, the newest token of every slot, and the model run over them.

Nothing here knows of requests: a step says by numbers what is computed, where it goes and what is drawn. All
tensors live on the decoder's device, the cache in the decoder's dtype. On a GPU nothing waits for the device but
`Drawn.to_host`, and that only for its own step. So far run on CPUs only, never on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from metareward_kernels import implementation, keyed_uniforms, sample_tokens
from metareward_kernels.paged_attention import chosen_for
from numpy.typing import NDArray
from torch import Tensor

from metareward.errors import UserError
from metareward.model.decoder import Decoder
from metareward.model.inference import InferenceDecoder
from metareward.sampler.graphs import DecodeGraphs
from metareward.sampler.inputs import Inputs, Tiling, as_inputs, host_arrays, tiling_of, to_device
from metareward.sampler.request import SamplingParams
from metareward.sampler.step import Step

MEMORY_PAGE = 4096  # bytes


@dataclass(frozen=True)
class Drawn:
    """What a step drew: tokens [S] int64, logprobs [S] float32, in host memory once the event has happened."""

    tokens: Tensor
    logprobs: Tensor
    copied: torch.cuda.Event | None

    def to_host(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Wait for this step, not for those started after it, and return both."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tokens.numpy(), self.logprobs.numpy()


class Runner:
    """A decoder with its key-value pages: per layer keys and values of [pages + 1, page_size, Hk, D].

    In memory a page's heads lie one after another, of each the keys, then the values, [pages + 1, Hk, 2, page_size, D]:
    attention reads a page head by head, and what it reads together should lie together. On a CPU nearly every page
    that is read or written costs a walk of the page table, here one for both (of a head of 64 in bf16 and 16 tokens).

    The last page is nobody's: rows that only fill a CUDA graph write there. cuda_graphs: replay decode steps as
    graphs; None: where the device is a GPU and attention is Triton's. A decoder of a tensor group brings its part of
    the heads; its steps are collectives of the group, and launched one by one.
    """

    def __init__(
        self, decoder: Decoder, page_size: int, max_running: int, cuda_graphs: bool | None = None
    ) -> None:
        weight = next(decoder.parameters())
        self.model = InferenceDecoder(decoder)
        self.page_size = page_size
        self.device = weight.device
        self.dtype = weight.dtype
        self.key_pages: list[Tensor] = []
        self.value_pages: list[Tensor] = []
        if cuda_graphs and self.device.type != "cuda":
            raise UserError(f"cuda_graphs is True and the model is on {self.device.type}: leave it unset")
        if decoder.tensor_group.size > 1:
            if cuda_graphs:
                raise UserError(
                    f"cuda_graphs is True and {decoder.tensor_group.size} ranks share the model: leave it unset"
                )
            cuda_graphs = False  # whether collectives can be captured has not been tried
        self._cuda_graphs = cuda_graphs
        self._max_running = max_running
        # Written by each draw and read by the next step, so that tokens need not come to the host in between. The
        # last stays 0: the input of rows that are nobody's.
        self._newest = torch.zeros(max_running + 1, dtype=torch.int64, device=self.device)
        self._forgotten = 0
        self._key: object = None
        self._tiling: Tiling | None = None
        self.graphs: DecodeGraphs | None = None
        self.grow(0, keep=False)

    @property
    def pages(self) -> int:
        """Pages that sequences may use."""
        return len(self.key_pages[0]) - 1

    def prepare(self) -> object:
        """Follow the weights as they are; the key under which what is cached for them is valid."""
        with torch.inference_mode(False):
            key = (self._forgotten, self.model.prepare())
        tiling = tiling_of(self.model.config, self.dtype, self.device)
        if key != self._key or tiling != self._tiling:
            self._key, self._tiling = key, tiling
            self.graphs = self._new_graphs()
        return key

    def _new_graphs(self) -> DecodeGraphs | None:
        if self.device.type != "cuda" or self._cuda_graphs is False:
            return None
        if self._tiling is None:
            if self._cuda_graphs:
                raise UserError(
                    "cuda_graphs is True and attention does not run as a Triton kernel: leave cuda_graphs unset, or "
                    "install Triton and unset METAREWARD_KERNELS"
                )
            return None
        return DecodeGraphs(
            self._compute,
            self._tiling,
            self.device,
            max_running=self._max_running,
            page_size=self.page_size,
        )

    def forget(self) -> None:
        """Make the next key differ from all before."""
        self._forgotten += 1
        self.model.forget()

    def implementations(self) -> dict[str, str]:
        """What else the report of the engine says of its operations."""
        found = {"paged_attention": chosen_for(self.device.type, self.dtype, self.model.config.head_dim)}
        if self.model.layers:
            layer = self.model.layers[0]
            found["linear"] = layer.qkv.implementation
            if layer.gate_up.fused:
                found["silu_mul"] = "in the product of gate and up"
            if self.model.at_once:
                found["layers"] = "all in one call"
        if self.dtype == torch.bfloat16 and self.device.type == "cpu":
            found["head"] = implementation("linear_fp32")
        if self.device.type == "cuda":
            graphs = self._cuda_graphs is not False and found["paged_attention"] == "triton"
            found["decode_steps"] = "CUDA graphs" if graphs else "launched one by one"
        return found

    def grow(self, pages: int, *, keep: bool) -> None:
        """Raise the number of pages; ``keep`` says whether the present ones hold anything still wanted."""
        if self.key_pages and pages == self.pages:
            return
        if self.graphs is not None:
            self.graphs.clear()  # they know the old tensors
        config = self.model.config
        shape = (pages + 1, config.num_kv_heads, 2, self.page_size, config.head_dim)
        if not self.key_pages:
            keys, values = self._empty((0, *shape[1:])).transpose(1, 3).unbind(2)
            self.key_pages, self.value_pages = [keys] * config.num_layers, [values] * config.num_layers
        for layer in range(config.num_layers):  # one by one, so that only one layer is ever held twice
            new = self._empty(shape).transpose(1, 3).unbind(2)
            for store, pages_of_layer in zip((self.key_pages, self.value_pages), new, strict=True):
                if keep:
                    pages_of_layer[: len(store[layer])] = store[layer]
                store[layer] = pages_of_layer

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor:
        """Compute a step's rows; returns the logits [R, V] of its ``logit_rows`` in the model's dtype."""
        if len(step.copies):
            self._copy_pages(step.copies)
        if self.graphs is not None and step.prefill_tokens == 0:
            return self.graphs.run(step, slot=self._max_running, page=self.pages)
        tiles = None if self._tiling is None else self._tiling.table(step.segments, len(step.positions))
        arrays = host_arrays(step, tiles)
        return self._compute(as_inputs(to_device(arrays, self.device), tiles.slots if tiles else None))

    def _compute(self, inputs: Inputs) -> Tensor:
        tokens = self._newest[inputs.decode_slots]
        if len(inputs.token_ids):
            tokens = torch.cat((tokens, inputs.token_ids))
        return self.model.forward(
            tokens,
            inputs.positions,
            inputs.places,
            inputs.segments,
            self.key_pages,
            self.value_pages,
            inputs.logit_rows,
            inputs.tiles,
        )

    @torch.inference_mode()
    def draw(self, logits: Tensor, step: Step, params: SamplingParams) -> Drawn:
        """Draw the step's tokens from its logits [R, V] and keep them as the next inputs of their slots."""
        arrays = [step.draws, step.draw_slots, step.draw_keys, step.draw_counts]
        draws, slots, keys, counts = to_device(arrays, self.device)
        if len(step.draws) != len(step.logit_rows):  # some rows serve several samples
            logits = logits[draws]
        uniforms = keyed_uniforms(keys, counts)
        tokens, logprobs = sample_tokens(
            logits,
            uniforms,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
        )
        # The ranks of a group must go on with the same tokens, or they would wait for each other in different steps. Their
        # logits should be equal to the bit; this makes sure, for one small message beside two a layer.
        self.model.group.copy_first_(tokens)
        # A row that cannot be drawn from gives -1; it must not be looked up before the host has seen it.
        self._newest[slots] = tokens.clamp(min=0)
        if self.device.type != "cuda":
            return Drawn(tokens.cpu(), logprobs.cpu(), None)
        # Sent back at once, so that taking them later waits for nothing but this step.
        host = [
            torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
            for part in (tokens, logprobs)
        ]
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))
        return Drawn(host[0], host[1], copied)

    def _copy_pages(self, copies: NDArray[np.int64]) -> None:
        """Copy whole pages (from, to) in every layer, reading all before writing any."""
        source, target = to_device([copies[:, 0].copy(), copies[:, 1].copy()], self.device)
        for store in (self.key_pages, self.value_pages):
            for pages in store:
                pages.index_copy_(0, target, pages.index_select(0, source))

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        """Uninitialised, from the start of a page of memory on."""
        size, slack = math.prod(shape), MEMORY_PAGE // self.dtype.itemsize
        flat = torch.empty(size + slack, dtype=self.dtype, device=self.device)
        start = -flat.data_ptr() % MEMORY_PAGE // self.dtype.itemsize
        return flat[start : start + size].view(shape)

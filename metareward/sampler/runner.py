"""The tensors of the sampler: the key-value pages, the newest token of every slot, and the model run over them.

Nothing here knows of requests: a step says by numbers what is computed, where it goes and what is drawn. All
tensors live on the decoder's device, the cache in the decoder's dtype. Written without regard to the kind of
device, but so far run on CPUs only, never on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from metareward_kernels import Segments, keyed_uniforms, sample_tokens
from numpy.typing import NDArray
from torch import Tensor

from metareward.model.decoder import Decoder
from metareward.model.inference import InferenceDecoder
from metareward.sampler.request import SamplingParams
from metareward.sampler.step import HostSegments, Step


@dataclass(frozen=True)
class Drawn:
    """What a step drew, still on the device: tokens [S] int64, logprobs [S] float32."""

    tokens: Tensor
    logprobs: Tensor

    def to_host(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Wait for the device and fetch both."""
        return self.tokens.cpu().numpy(), self.logprobs.cpu().numpy()


class Runner:
    """A decoder with its key-value pages: per layer keys and values of [pages, page_size, Hk, D].

    In memory a page's heads lie one after another, [pages, Hk, page_size, D]: attention reads a page head by head,
    and what it reads together should lie together (on a CPU a third less time for sequences' own pages).
    """

    def __init__(self, decoder: Decoder, page_size: int, max_running: int) -> None:
        weight = next(decoder.parameters())
        self.model = InferenceDecoder(decoder)
        self.page_size = page_size
        self.device = weight.device
        self.dtype = weight.dtype
        self.key_pages: list[Tensor] = []
        self.value_pages: list[Tensor] = []
        # Written by each draw and read by the next step, so that tokens need not come to the host in between.
        self._newest = torch.zeros(max_running, dtype=torch.int64, device=self.device)
        self._forgotten = 0
        self.grow(0, keep=False)

    def prepare(self) -> object:
        """Follow the weights as they are; the key under which what is cached for them is valid."""
        with torch.inference_mode(False):
            return self._forgotten, self.model.prepare()

    def forget(self) -> None:
        """Make the next key differ from all before."""
        self._forgotten += 1
        self.model.forget()

    def implementations(self) -> dict[str, str]:
        """What else the report of the engine says of its operations."""
        return {"linear": self.model.layers[0].qkv.implementation} if self.model.layers else {}

    def grow(self, pages: int, *, keep: bool) -> None:
        """Raise the number of pages; ``keep`` says whether the present ones hold anything still wanted."""
        if self.key_pages and pages == len(self.key_pages[0]):
            return
        config = self.model.config
        shape = (pages, config.num_kv_heads, self.page_size, config.head_dim)
        for store in (self.key_pages, self.value_pages):
            if not store:
                store.extend(self._empty((0, *shape[1:])).transpose(1, 2) for _ in range(config.num_layers))
            # Layer by layer, so that only one layer is ever held twice.
            for layer, old in enumerate(store):
                store[layer] = self._empty(shape).transpose(1, 2)
                if keep:
                    store[layer][: len(old)] = old

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor:
        """Compute a step's rows; returns the logits [R, V] of its ``logit_rows`` in the model's dtype."""
        if len(step.copies):
            self._copy_pages(step.copies)
        inputs = self._newest[self._put(step.decode_slots)]
        if len(step.token_ids):
            inputs = torch.cat((inputs, self._put(step.token_ids)))
        return self.model.forward(
            inputs,
            self._put(step.positions),
            self._put(step.places),
            self._segments(step.segments),
            self.key_pages,
            self.value_pages,
            self._put(step.logit_rows),
        )

    @torch.inference_mode()
    def draw(self, logits: Tensor, step: Step, params: SamplingParams) -> Drawn:
        """Draw the step's tokens from its logits [R, V] and keep them as the next inputs of their slots."""
        if len(step.draws) != len(step.logit_rows):  # some rows serve several samples
            logits = logits[self._put(step.draws)]
        uniforms = keyed_uniforms(self._put(step.draw_keys), self._put(step.draw_counts))
        tokens, logprobs = sample_tokens(
            logits,
            uniforms,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
        )
        # A row that cannot be drawn from gives -1; it must not be looked up before the host has seen it.
        self._newest[self._put(step.draw_slots)] = tokens.clamp(min=0)
        return Drawn(tokens, logprobs)

    def _segments(self, host: HostSegments) -> Segments:
        return Segments(
            page_ids=self._put(host.page_ids),
            page_starts=self._put(host.page_starts),
            lengths=self._put(host.lengths),
            rows=self._put(host.rows),
            row_starts=self._put(host.row_starts),
            limits=self._put(host.limits),
        )

    def _copy_pages(self, copies: NDArray[np.int64]) -> None:
        """Copy whole pages (from, to) in every layer, reading all before writing any."""
        source, target = self._put(copies.T.copy())
        for store in (self.key_pages, self.value_pages):
            for pages in store:
                pages.index_copy_(0, target, pages.index_select(0, source))

    def _put(self, array: NDArray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

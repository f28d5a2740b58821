"""The tensors of the sampler: the key-value pages, and the decoder run over them.

Nothing here knows of requests. A prompt or a running sequence is given by its tokens and by the places of
its keys and values. All tensors live on the decoder's device in the decoder's dtype. Written without regard
to the kind of device, but so far run on CPUs only, never on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from metareward_kernels import paged_attention_decode
from numpy.typing import NDArray
from torch import Tensor

from metareward.model.decoder import Decoder
from metareward.model.packed_attention import packed_attention


class Runner:
    """A decoder with its key-value pages: per layer keys and values of [pages, page_size, Hk, D]."""

    def __init__(self, decoder: Decoder, page_size: int) -> None:
        weight = next(decoder.parameters())
        self.decoder = decoder
        self.page_size = page_size
        self.device = weight.device
        self.dtype = weight.dtype
        self._scale = decoder.config.head_dim**-0.5
        self.key_pages: list[Tensor] = []
        self.value_pages: list[Tensor] = []
        self.grow(0, keep=False)

    def grow(self, pages: int, *, keep: bool) -> None:
        """Raise the number of pages; ``keep`` says whether the present ones hold anything still wanted."""
        if self.key_pages and pages == len(self.key_pages[0]):
            return
        config = self.decoder.config
        shape = (pages, self.page_size, config.num_kv_heads, config.head_dim)
        for store in (self.key_pages, self.value_pages):
            if not store:
                store.extend(self._empty((0, *shape[1:])) for _ in range(config.num_layers))
            # Layer by layer, so that only one layer is ever held twice.
            for layer, old in enumerate(store):
                store[layer] = self._empty(shape)
                if keep:
                    store[layer][: len(old)] = old

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
        """Compute prompts (token ids, pages), packed one after the other, and fill their pages.

        Returns logits [len(prompts), V] float32 of the last token of each.
        """
        lengths = np.array([len(tokens) for tokens, _ in prompts])
        boundaries = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.concatenate([np.arange(length) for length in lengths])
        offsets = np.arange(self.page_size)
        slots = np.concatenate(
            [
                (np.asarray(pages)[:, None] * self.page_size + offsets).reshape(-1)[: len(tokens)]
                for tokens, pages in prompts
            ]
        )
        where = self._put(slots)
        packed = packed_attention(boundaries.tolist())

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self._write(layer, where, key, value)
            return packed(layer, query, key, value)

        token_ids = np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens, _ in prompts])
        hidden = self.decoder(
            self._put(token_ids), self._put(positions), attend, rows=self._put(boundaries[1:] - 1)
        )
        return self.decoder.logits(hidden).float()

    @torch.inference_mode()
    def decode(
        self,
        token_ids: NDArray[np.int64],
        slots: NDArray[np.int64],
        page_table: NDArray[np.int32],
        lengths: NDArray[np.int32],
    ) -> Tensor:
        """One token of each of S sequences: token_ids [S], slots [S] (where its key and value go in the flat
        cache), page_table [S, M], lengths [S] (the new token counted).

        Returns logits [S, V] float32.
        """
        where, table, context = self._put(slots), self._put(page_table), self._put(lengths)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self._write(layer, where, key, value)
            keys, values = self.key_pages[layer], self.value_pages[layer]
            return paged_attention_decode(query, keys, values, table, context, self._scale)

        hidden = self.decoder(self._put(token_ids), context.long() - 1, attend)
        return self.decoder.logits(hidden).float()

    @torch.inference_mode()
    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (from, to) in every layer."""
        source, target = self._put(np.array(copies, dtype=np.int64).T.copy())
        for store in (self.key_pages, self.value_pages):
            for pages in store:
                pages.index_copy_(0, target, pages.index_select(0, source))

    def _write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        self.key_pages[layer].flatten(0, 1).index_copy_(0, slots, key)
        self.value_pages[layer].flatten(0, 1).index_copy_(0, slots, value)

    def _put(self, array: NDArray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

"""The sampler's front door: requests in, completions out, as they finish.

One step is: admit what fits, prefill the new prompts, copy partly filled pages to those that fork, draw the
first tokens of the newcomers, then decode one token for every running sequence. Everything a sample depends
on is its prompt, the weights, the parameters and the random numbers keyed by (seed, identity, index of the
token); what runs beside it changes floating-point rounding only.

Written without regard to the kind of device, but so far run on CPUs only, never on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter

import numpy as np
import torch
from metareward_kernels import keyed_uniforms, request_key, sample_tokens
from torch import Tensor

from metareward.errors import UserError
from metareward.model.decoder import Decoder
from metareward.sampler.batch import Batch
from metareward.sampler.pages import PagePool
from metareward.sampler.request import Completion, EngineStats, Request, SamplingParams
from metareward.sampler.runner import Runner
from metareward.sampler.schedule import Admission, Scheduler, reservation


class Engine:
    """Samples completions from a decoder with a paged key-value cache.

    Args:
        decoder: the weights; the cache takes their dtype and device.
        stop_ids: tokens that end a completion.
        seed: with a request's identity, the key of its random numbers.
        max_running: sequences decoded together.
        page_size: tokens a page of the cache.
        max_prefill_tokens: prompt tokens computed in one step (a longer prompt is computed alone).
        kv_tokens: size of the cache in tokens, rounded down to pages. None: as much as ``max_running`` of the
            longest request so far may need, grown when a longer one comes.

    The cache lives as long as the engine, but nothing in it is used by a later ``generate``: weights may be
    changed in place between two calls.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        stop_ids: Iterable[int],
        seed: int,
        max_running: int = 64,
        page_size: int = 16,
        max_prefill_tokens: int = 4096,
        kv_tokens: int | None = None,
    ) -> None:
        sizes = {"max_running": max_running, "page_size": page_size, "max_prefill_tokens": max_prefill_tokens}
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"{name} is {size}: set 1 or more")
        if kv_tokens is not None and kv_tokens < page_size:
            raise UserError(f"kv_tokens is {kv_tokens}: set at least one page, {page_size} tokens")
        self.decoder = decoder
        self.stop_ids = frozenset(stop_ids)
        self.seed = seed
        self.max_running = max_running
        self.page_size = page_size
        self.max_prefill_tokens = max_prefill_tokens
        self.kv_tokens = kv_tokens
        self.stats = EngineStats()
        self.pool = PagePool(0 if kv_tokens is None else kv_tokens // page_size)
        self.runner = Runner(decoder, page_size)
        self._generating = False

    def generate(self, requests: Iterable[Request], params: SamplingParams) -> Iterator[Completion]:
        """Complete each request; yields in the order of finishing.

        Requests are drawn lazily, at most two ahead of what is running. Consecutive ones with equal prompts
        compute the prompt once. Closing the iterator early frees all it holds.

        Raises:
            UserError: a prompt is empty, too long for the model or the cache, or has an id that the model's
                vocabulary lacks.
            ValueError: two requests have one identity.
            FloatingPointError: the logits of a request hold NaN or nothing but -inf.
            RuntimeError: another ``generate`` of this engine is still open.
        """
        if self._generating:
            raise RuntimeError("this engine is already generating: exhaust or close the earlier iterator")
        self._generating = True
        scheduler = Scheduler(
            self._checked(requests, params),
            self.pool,
            page_size=self.page_size,
            max_running=self.max_running,
            max_new_tokens=params.max_new_tokens,
            max_prefill_tokens=self.max_prefill_tokens,
        )
        batch = Batch(self.max_running, params.max_new_tokens, self.page_size, sorted(self.stop_ids))
        try:
            while True:
                with self._timed("host_seconds"):
                    held = self.pool.free < self.pool.capacity
                    admission = scheduler.admit()
                    # Drawing requests may have raised the number of pages, several times even; the tensors
                    # follow once, and have contents to keep only if pages were in use before.
                    self.runner.grow(self.pool.capacity, keep=held)
                if not scheduler.running:
                    break
                yield from self._start(admission, scheduler, batch, params)
                yield from self._decode(scheduler, batch, params)
        finally:
            scheduler.close()
            self._generating = False
            assert self.pool.free == self.pool.capacity, "pages were lost"

    def _start(
        self, admission: Admission, scheduler: Scheduler, batch: Batch, params: SamplingParams
    ) -> list[Completion]:
        """Prefill the new groups and draw the first token of every new sequence."""
        if not admission.sequences:
            return []
        stats, groups = self.stats, admission.prefill
        with self._timed("prefill_seconds"):
            if groups:
                rows = self.runner.prefill([(group.prompt, group.pages) for group in groups])
                for group, row in zip(groups, rows, strict=True):
                    group.logits = row
                stats.prefill_tokens += sum(len(group.prompt) for group in groups)
            if admission.copies:
                self.runner.copy_pages(admission.copies)
            logits = torch.stack([group.logits for _, group in admission.sequences])
        with self._timed("host_seconds"):
            first = batch.size
            for sequence, _ in admission.sequences:
                batch.add(sequence, request_key(self.seed, sequence.request.identity))
                stats.prompt_tokens += len(sequence.request.prompt)
            stats.requests += len(admission.sequences)
        return self._sample(logits, first, scheduler, batch, params)

    def _decode(self, scheduler: Scheduler, batch: Batch, params: SamplingParams) -> list[Completion]:
        """Compute one step of all running sequences and draw their next token."""
        size = batch.size
        if size == 0:
            return []
        with self._timed("host_seconds"):
            slots = batch.append_slots()
        with self._timed("decode_seconds"):
            logits = self.runner.decode(
                batch.last[:size], slots, batch.page_table[:size], batch.lengths[:size]
            )
        self.stats.decode_steps += 1
        return self._sample(logits, 0, scheduler, batch, params)

    def _sample(
        self, logits: Tensor, first: int, scheduler: Scheduler, batch: Batch, params: SamplingParams
    ) -> list[Completion]:
        """Draw the next token of the rows from ``first`` on; take out and return those now complete."""
        with self._timed("sampling_seconds"), torch.inference_mode():
            rows = slice(first, batch.size)
            device = logits.device
            uniforms = keyed_uniforms(
                torch.from_numpy(batch.keys[rows]).to(device), torch.from_numpy(batch.counts[rows]).to(device)
            )
            drawn, drawn_logprobs = sample_tokens(
                logits, uniforms, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p
            )
            tokens, logprobs = drawn.cpu().numpy(), drawn_logprobs.cpu().numpy()
        with self._timed("host_seconds"):
            bad = np.flatnonzero(tokens < 0)
            if len(bad):
                sequence = batch.sequences[first + int(bad[0])]
                raise FloatingPointError(
                    f"the model's logits for request {sequence.request.identity!r} are NaN or all -inf at "
                    f"new token {int(batch.counts[first + bad[0]])}: weights or activations are not finite"
                )
            self.stats.new_tokens += len(tokens)
            done = first + np.flatnonzero(batch.record(first, tokens, logprobs))
            completions = [batch.completion(row) for row in done.tolist()]
            # From the end, so that the row moved into a gap is never one still to be removed.
            for row in reversed(done.tolist()):
                scheduler.finish(batch.remove(row))
        return completions

    def _checked(self, requests: Iterable[Request], params: SamplingParams) -> Iterator[Request]:
        """The requests, each checked and with the cache large enough for it as it is drawn."""
        limit = self.decoder.config.max_context - params.max_new_tokens
        vocab_size = self.decoder.config.vocab_size
        seen: set[str] = set()
        for request in requests:
            identity, length = request.identity, len(request.prompt)
            if identity in seen:
                raise ValueError(f"two requests have the identity {identity!r}: their samples would be equal")
            seen.add(identity)
            if length == 0:
                raise UserError(f"request {identity!r} has an empty prompt: give at least one token")
            if length > limit:
                raise UserError(
                    f"the prompt of request {identity!r} has {length} tokens and the limit is {limit} "
                    f"(context of {self.decoder.config.max_context} less max_new_tokens of "
                    f"{params.max_new_tokens}): shorten the prompt or lower max_new_tokens"
                )
            if not 0 <= min(request.prompt) <= max(request.prompt) < vocab_size:
                raise UserError(
                    f"the prompt of request {identity!r} has a token id outside 0..{vocab_size - 1}: "
                    "use the tokenizer that belongs to the model"
                )
            if self.kv_tokens is None:
                # One page more than the reservations: a group's own copy of its partly filled page.
                need = self.max_running * reservation(length, params.max_new_tokens, self.page_size) + 1
                old = self.pool.capacity
                if need > old:
                    # By half at least: prompts that lengthen slowly would else copy the cache many times.
                    self.pool.grow(max(need, old + old // 2))
            yield request

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            setattr(self.stats, name, getattr(self.stats, name) + perf_counter() - start)

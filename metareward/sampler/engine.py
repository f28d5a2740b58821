"""The sampler's front door: requests in, completions out, as they finish.

A step computes the next token of every decoding sequence and some prompt tokens beside them. Everything a
sample depends on is its prompt, the weights, the parameters and the random numbers keyed by (seed, identity,
index of the token); what runs beside it changes floating-point rounding only.

On a GPU the host is a step ahead: it puts the next step together while the device computes, and takes the tokens
of a step when the one after it is on its way. A sequence that has ended then computes one token too many, which is
dropped. Written without regard to the kind of device, but so far run on CPUs only, never on a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter

from metareward_kernels import dispatch, request_key

from metareward.errors import UserError
from metareward.model.decoder import Decoder
from metareward.phases import UNRECORDED, Phases
from metareward.sampler.admission import most_pages
from metareward.sampler.pages import PagePool
from metareward.sampler.prefix_tree import PrefixTree
from metareward.sampler.request import Completion, EngineStats, Request, SamplingParams
from metareward.sampler.runner import Drawn, Runner
from metareward.sampler.schedule import Scheduler
from metareward.sampler.step import Step, kind_of, work_of

OPS = ("paged_attention", "sample_tokens", "keyed_uniforms", "add_rms_norm", "rotate_and_store", "silu_mul")


class Engine:
    """Samples completions from a decoder with a paged key-value cache and a prefix tree.

    Args:
        decoder: the weights; the cache takes their dtype and device. With a rank's part of a model, all ranks of the tensor
            group must be given equal settings, and the same requests in the same order: ``generate`` is then a collective.
        stop_ids: tokens that end a completion.
        seed: with a request's identity, the key of its random numbers.
        max_running: sequences decoded together.
        page_size: tokens a page of the cache.
        max_step_tokens: tokens computed in one step, those of prompts and the next ones of running sequences.
        kv_tokens: size of the cache in tokens, rounded down to pages. None: as much as ``max_running`` of the
            longest request so far may need without sharing, grown when a longer one comes.
        lookahead: steps the host is ahead of the device. None: 1 on a GPU, 0 on a CPU.
        cuda_graphs: replay steps that only decode as CUDA graphs. None: on a GPU where attention is Triton's.
        margin: pages are left for running sequences to grow to this many times the mean length of completions;
            less admits more at once and preempts more often.
        phases: is told what time goes to, and what was computed in it.

    Prefixes stay in the cache between two calls of ``generate`` as long as the weights are the same: a change in
    place is noticed by the tensors' version counters, and ``weights_changed()`` says it where they do not count
    (``.data``).
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        stop_ids: Iterable[int],
        seed: int,
        max_running: int = 256,
        page_size: int = 16,
        max_step_tokens: int = 2048,
        kv_tokens: int | None = None,
        lookahead: int | None = None,
        cuda_graphs: bool | None = None,
        margin: float = 1.25,
        phases: Phases = UNRECORDED,
    ) -> None:
        sizes = {"max_running": max_running, "page_size": page_size, "max_step_tokens": max_step_tokens}
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
        self.max_step_tokens = max_step_tokens
        self.kv_tokens = kv_tokens
        self.stats = EngineStats()
        self.pool = PagePool(0 if kv_tokens is None else kv_tokens // page_size)
        self.tree = PrefixTree(self.pool, page_size)
        self.runner = Runner(decoder, page_size, max_running, cuda_graphs)
        self.lookahead = (1 if self.runner.device.type == "cuda" else 0) if lookahead is None else lookahead
        self.margin = margin
        self.phases = phases
        self._generating = False

    def generate(self, requests: Iterable[Request], params: SamplingParams) -> Iterator[Completion]:
        """Complete each request; yields in the order of finishing.

        Requests are drawn lazily, at most one ahead of what is running; those that share a prefix should come
        together. Closing the iterator early frees all it holds.

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
        version = self.runner.prepare()
        scheduler = Scheduler(
            self._checked(requests, params),
            self.pool,
            self.tree,
            self.tree.root(version),
            key_of=lambda identity: request_key(self.seed, identity),
            stop_ids=self.stop_ids,
            max_running=self.max_running,
            max_new_tokens=params.max_new_tokens,
            max_step_tokens=self.max_step_tokens,
            margin=self.margin,
        )
        pending: deque[tuple[Step, Drawn]] = deque()
        clean = False
        try:
            while True:
                clean = False
                step = self._schedule(scheduler)
                if step is not None:
                    pending.append((step, self._compute(step, params)))
                elif not pending:
                    assert not scheduler.running, "sequences are waiting for each other"
                    break
                if step is None or len(pending) > self.lookahead:
                    completions = self._take(scheduler, *pending.popleft())
                    clean = True
                    yield from completions
                self.phases.step()
            clean = True
        finally:
            scheduler.close()
            if not clean:
                # What the tree calls computed may never have been.
                self.tree.clear()
            self._generating = False
            assert self.pool.free + self.tree.evictable == self.pool.capacity, "pages were lost"

    def implementations(self) -> dict[str, str]:
        """Which implementation of each op runs on the engine's device."""
        device = self.runner.device.type
        return {op: dispatch.implementation(op, device) for op in OPS} | self.runner.implementations()

    def weights_changed(self) -> None:
        """Say that weights were changed in a way that their version counters do not show."""
        self.runner.forget()

    def _schedule(self, scheduler: Scheduler) -> Step | None:
        """The next step; counts what was admitted for it."""
        stats = self.stats
        self.phases.mark("host")
        with self._timed("host_seconds"):
            held = self.pool.free < self.pool.capacity
            step = scheduler.next_step()
            # Drawing requests may have raised the number of pages, several times even; the tensors follow once,
            # and have contents to keep only if pages were in use before.
            self.runner.grow(self.pool.capacity, keep=held)
            counts = scheduler.counts
            stats.requests += counts.started
            stats.prompt_tokens += counts.prompt_tokens
            stats.preemptions += counts.preemptions
            self.phases.mark("host", requests=counts.started, prompt_tokens=counts.prompt_tokens)
            counts.started = counts.prompt_tokens = counts.preemptions = 0
            if counts.peak_pages > stats.peak_pages:
                stats.peak_pages, stats.unshared_pages = counts.peak_pages, counts.unshared_pages
        return step

    def _compute(self, step: Step, params: SamplingParams) -> Drawn:
        stats = self.stats
        self.phases.mark(kind_of(step), **work_of(step))
        start = perf_counter()
        logits = self.runner.forward(step)
        computed = perf_counter()
        self.phases.mark("sample", logit_rows=len(step.logit_rows))
        drawn = self.runner.draw(logits, step, params)
        self.phases.mark("host")
        stats.sampling_seconds += perf_counter() - computed
        # One forward pass serves both: its time is divided by rows.
        share = step.prefill_tokens / len(step.positions)
        stats.prefill_seconds += share * (computed - start)
        stats.decode_seconds += (1 - share) * (computed - start)
        stats.prefill_tokens += step.prefill_tokens
        stats.steps += 1
        return drawn

    def _take(self, scheduler: Scheduler, step: Step, drawn: Drawn) -> list[Completion]:
        with self._timed("sampling_seconds"):
            tokens, logprobs = drawn.to_host()
        with self._timed("host_seconds"):
            completions, count = scheduler.record(step, tokens, logprobs)
        self.stats.new_tokens += count
        self.phases.mark("host", new_tokens=count, completions=len(completions))
        return completions

    def _checked(self, requests: Iterable[Request], params: SamplingParams) -> Iterator[Request]:
        """The requests, each checked and with the cache large enough for it as it is drawn."""
        limit = self.decoder.config.max_context - params.max_new_tokens
        vocab_size = self.decoder.config.vocab_size
        seen: set[str] = set()
        checked: tuple[int, ...] | None = None
        for request in requests:
            identity, length = request.identity, len(request.prompt)
            if identity in seen:
                raise ValueError(f"two requests have the identity {identity!r}: their samples would be equal")
            seen.add(identity)
            if request.prompt is not checked:
                self._check(request, limit, vocab_size)
                checked = request.prompt
            if self.kv_tokens is None:
                need = self.max_running * most_pages(length, params.max_new_tokens, self.page_size)
                old = self.pool.capacity
                if need > old:
                    # By half at least: prompts that lengthen slowly would else copy the cache many times.
                    self.pool.grow(max(need, old + old // 2))
            yield request

    def _check(self, request: Request, limit: int, vocab_size: int) -> None:
        identity, length = request.identity, len(request.prompt)
        if length == 0:
            raise UserError(f"request {identity!r} has an empty prompt: give at least one token")
        if length > limit:
            raise UserError(
                f"the prompt of request {identity!r} has {length} tokens and the limit is {limit} "
                f"(context of {self.decoder.config.max_context} less max_new_tokens): shorten the prompt or "
                "lower max_new_tokens"
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < vocab_size:
            raise UserError(
                f"the prompt of request {identity!r} has a token id outside 0..{vocab_size - 1}: "
                "use the tokenizer that belongs to the model"
            )

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            setattr(self.stats, name, getattr(self.stats, name) + perf_counter() - start)

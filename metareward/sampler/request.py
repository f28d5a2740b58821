"""What goes into the sampler and what comes out: plain, validated dataclasses without torch."""

from __future__ import annotations

from dataclasses import dataclass, fields

from metareward.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Temperature 0 is greedy; ``top_p=1``, ``top_k=0`` and ``min_p=0`` switch limits off."""

    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        # Written as "not (good)" so that NaN is refused as well.
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}: set a finite number of 0 (greedy) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p is {self.top_p}: set a number above 0 and at most 1 (1 switches it off)")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: set 0 (off) or a positive number of tokens")
        if not 0.0 <= self.min_p <= 1.0:
            raise UserError(f"min_p is {self.min_p}: set a number from 0 (off) to 1")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: set 1 or more")


@dataclass(frozen=True)
class Request:
    """One sample to draw. The identity keys its random numbers and its result, so it must be unique."""

    identity: str
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """What one request became.

    ``token_ids`` holds every sampled token, the stop id included when one was sampled; ``finished`` is True
    only in that case. ``logprobs[i]`` is the log-probability of ``token_ids[i]`` under the raw distribution
    softmax(logits), before temperature, top-k and top-p. It is for diagnosis: training computes its own.
    """

    identity: str
    token_ids: list[int]
    finished: bool
    logprobs: list[float]


@dataclass
class EngineStats:
    """Running totals of one engine over all its ``generate`` calls.

    ``prompt_tokens`` counts every request's prompt as if nothing were shared, ``prefill_tokens`` the tokens of
    prompts really computed (and, after a preemption, of what had been drawn). ``peak_pages`` is the most pages of
    the cache that running sequences have read at one time, ``unshared_pages`` what the same sequences would
    have held if each had its own. One forward pass computes prompts and next tokens together, its time is divided
    between ``prefill_seconds`` and ``decode_seconds`` by rows. Seconds are wall time on the host; on an
    accelerator, whose work is asynchronous, most falls under ``sampling_seconds``, where the host waits for tokens.
    """

    requests: int = 0
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    peak_pages: int = 0
    unshared_pages: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    sampling_seconds: float = 0.0
    host_seconds: float = 0.0

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens that were in the cache already."""
        return max(0, self.prompt_tokens - self.prefill_tokens)

    @property
    def seconds(self) -> float:
        """All the time spent inside the engine, the drawing of requests included."""
        return self.prefill_seconds + self.decode_seconds + self.sampling_seconds + self.host_seconds

    def reset(self) -> None:
        """Set every total to zero."""
        for field in fields(self):
            setattr(self, field.name, field.default)

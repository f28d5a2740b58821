"""Batched sampling with a paged key-value cache that shares prompts."""

from __future__ import annotations

from metareward.sampler.engine import Engine
from metareward.sampler.request import Completion, EngineStats, Request, SamplingParams

__all__ = ["Completion", "Engine", "EngineStats", "Request", "SamplingParams"]

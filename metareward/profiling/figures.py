"""From spans and a machine's rates to figures: rates, shares of the limits, and what to improve first.

The limit of a phase is the time its FLOPs take at the measured matrix rate, or its least bytes at the measured bandwidth,
whichever is longer. Phases that compute nothing (host, load, write, wait ...) have the limit 0: all of them could go.
"""

from __future__ import annotations

from dataclasses import dataclass

from metareward.model.config import ModelConfig
from metareward.model.flops import (
    Work,
    forward_flops,
    head_flops,
    inference_bytes,
    inference_flops,
    optimizer_bytes,
    parameter_count,
    sampling_bytes,
    step_flops,
)
from metareward.profiling.machine import Machine
from metareward.profiling.read import RunTime, StageTime

ITEMSIZE = {"bfloat16": 2, "float32": 4}
SAMPLING = ("prefill", "decode", "mixed")
COMPUTING = (*SAMPLING, "sample", "forward", "backward", "optimizer")
STEP_PHASES = ("data", "forward", "backward", "communication", "optimizer")
"""What a training step is made of: MFU is over all of it."""


@dataclass(frozen=True)
class PhaseFigures:
    """A phase of a stage: seconds (mean over ranks), FLOPs and least bytes of one rank, seconds at the limit, or None where
    no machine was measured. recomputed: FLOPs on top, of what is computed again; no part of flops, limit or MFU."""

    phase: str
    seconds: float
    flops: float
    bytes: float
    limit: float | None
    recomputed: float = 0.0

    @property
    def limit_of_all(self) -> float:
        """Seconds at the limit with what is computed again; 0 where no machine was measured."""
        again = self.recomputed / self.flops if self.flops else 0.0
        return (self.limit or 0.0) * (1.0 + again)

    @property
    def over(self) -> float:
        """Seconds above the limit."""
        return self.seconds - min(self.seconds, self.limit or 0.0)


@dataclass(frozen=True)
class StageFigures:
    """A stage of an iteration; shares are None where nothing was computed or no machine was measured."""

    time: StageTime
    share: float
    requests: float
    prompt_tokens: float
    reused_tokens: float
    new_tokens: float
    tokens: float
    tokens_per_s: float
    prefill_mfu: float | None
    decode_bandwidth: float | None
    mixed_mfu: float | None
    mixed_bandwidth: float | None
    train_mfu: float | None
    phases: tuple[PhaseFigures, ...]

    @property
    def limit(self) -> float | None:
        """Seconds that the stage would take at the limits of all its phases."""
        limits = [phase.limit for phase in self.phases]
        return None if any(limit is None for limit in limits) else sum(limit or 0.0 for limit in limits)


def config_of(stage: StageTime) -> ModelConfig | None:
    """The model that a stage ran; None for stages without one, or killed before they said it."""
    return ModelConfig.from_hf(stage.notes["model"]) if "model" in stage.notes else None


def phase_cost(stage: StageTime, phase: str, config: ModelConfig, ranks: int) -> tuple[float, float]:
    """(FLOPs, least bytes) of a phase over all ranks."""
    counts = stage.counts.get(phase, {})
    itemsize = ITEMSIZE[stage.notes["dtype"]]
    adapters = int(stage.notes.get("adapter_parameters", 0))
    if phase in SAMPLING:
        work = Work.of(counts)
        return inference_flops(config, work), inference_bytes(config, work, itemsize)
    if phase == "sample":
        return 0.0, sampling_bytes(config, counts.get("logit_rows", 0))
    if phase in ("forward", "backward"):
        work = Work.of(stage.counts.get("forward", {}))
        forward = forward_flops(config, work).model
        # A fused head makes its gradients, twice the FLOPs of its logits, as soon as it has the logits.
        # With adapters the head is frozen: of its gradients that by the hidden states alone is made.
        forward += (1.0 if adapters else 2.0) * head_flops(config, work.fused_rows)
        forward += 2.0 * work.rows * adapters
        step = step_flops(config, work, adapter_weights=adapters // config.num_layers).model
        return (forward if phase == "forward" else step - forward), 0.0
    if phase == "optimizer":
        # Every rank updates its part of the parameters.
        trained = adapters or parameter_count(config)
        return 0.0, optimizer_bytes(trained) * counts.get("passes", 0) / ranks
    return 0.0, 0.0


def recomputed_flops(stage: StageTime, phase: str, config: ModelConfig) -> float:
    """FLOPs over all ranks that the backward pass computes again: blocks under full activation checkpointing, and the logits of a
    head that does not make its gradients in the forward pass. Stages of earlier versions do not say how they kept activations."""
    if phase != "backward":
        return 0.0
    work = Work.of(stage.counts.get("forward", {}))
    return step_flops(
        config,
        work,
        recompute_blocks=stage.notes.get("activation_checkpointing") == "full",
        recomputed_head_rows=work.logit_rows - work.fused_rows,
        adapter_weights=int(stage.notes.get("adapter_parameters", 0)) // config.num_layers,
    ).recomputed


def phase_figures(stage: StageTime, machine: Machine | None, ranks: int, sharing: int) -> list[PhaseFigures]:
    """All phases of a stage, the longest first. sharing: ranks that share the machine's rates (on a CPU)."""
    config = config_of(stage)
    found = []
    for phase, seconds in stage.mean_phases.items():
        flops, nbytes = (0.0, 0.0) if config is None else phase_cost(stage, phase, config, ranks)
        flops, nbytes = flops / ranks, nbytes / ranks
        again = 0.0 if config is None else recomputed_flops(stage, phase, config) / ranks
        limit = None
        if machine is not None and config is None and phase in COMPUTING:
            pass  # a stage of an earlier version, or killed before it knew its model
        elif machine is not None and (flops or nbytes):
            limit = sharing * max(flops / machine.rate(stage.notes["dtype"]), nbytes / machine.bandwidth)
        elif machine is not None:
            limit = 0.0
        found.append(PhaseFigures(phase, seconds, flops, nbytes, limit, again))
    return sorted(found, key=lambda item: -item.seconds)


def stage_figures(stage: StageTime, run: RunTime, machine: Machine | None) -> StageFigures:
    """The figures of one stage."""
    ranks = len(stage.phases)
    sharing = run.attempts[-1].local_ranks if run.attempts[-1].device == "cpu" else 1
    phases = phase_figures(stage, machine, ranks, sharing)
    by_name = {item.phase: item for item in phases}
    prompt, computed = stage.count("prompt_tokens"), stage.count("prefill_rows")
    new = stage.count("new_tokens")
    trained = stage.counts.get("forward", {}).get("rows", 0.0)
    tokens = new or trained
    sampled = prompt > 0

    def use(names: tuple[str, ...], of: str, peak: float) -> float | None:
        seconds = sum(by_name[name].seconds for name in names if name in by_name)
        amount = sum(getattr(by_name[name], of) for name in names if name in by_name)
        return amount / seconds / peak if seconds > 0 and amount > 0 else None

    prefill = decode = mixed = mixed_bytes = train = None
    if machine is not None and config_of(stage) is not None:
        flop_peak, byte_peak = peaks(machine, stage.notes["dtype"], sharing)
        if sampled:
            prefill = use(("prefill",), "flops", flop_peak)
            decode = use(("decode",), "bytes", byte_peak)
            mixed, mixed_bytes = use(("mixed",), "flops", flop_peak), use(("mixed",), "bytes", byte_peak)
        else:
            train = use(STEP_PHASES, "flops", flop_peak)
    return StageFigures(
        time=stage,
        share=stage.seconds / run.wall if run.wall > 0 else 0.0,
        requests=stage.count("requests") if sampled else stage.count("completions"),
        prompt_tokens=prompt,
        reused_tokens=max(0.0, prompt - computed),
        new_tokens=new,
        tokens=tokens,
        tokens_per_s=tokens / stage.seconds / ranks if stage.seconds > 0 else 0.0,
        prefill_mfu=prefill,
        decode_bandwidth=decode,
        mixed_mfu=mixed,
        mixed_bandwidth=mixed_bytes,
        train_mfu=train,
        phases=tuple(phases),
    )


def peaks(machine: Machine, dtype: str, sharing: int) -> tuple[float, float]:
    """(FLOP/s, bytes/s) that MFU and bandwidth use are shares of: the data sheet's for a bf16 GPU in the table, else measured."""
    sheet = machine.sheet
    if sheet is not None:
        return (sheet.bfloat16 if dtype == "bfloat16" else machine.rate(dtype)), sheet.bandwidth
    return machine.rate(dtype) / sharing, machine.bandwidth / sharing


def all_figures(run: RunTime, machine: Machine | None) -> list[StageFigures]:
    return [stage_figures(stage, run, machine) for stage in run.stages]


def advice(figures: list[StageFigures], wall: float, measured: bool) -> str:
    """Which stage and phase to improve first, and why: the one with most seconds above its limit, over all iterations."""
    totals: dict[tuple[str, str], list[float]] = {}
    unknown = {
        (item.time.stage, part.phase) for item in figures for part in item.phases if part.limit is None
    }
    for item in figures:
        for part in item.phases:
            entry = totals.setdefault((item.time.stage, part.phase), [0.0, 0.0])
            entry[0] += part.seconds
            entry[1] += part.over if measured else part.seconds
    if not totals or wall <= 0:
        return "Nothing has been recorded yet."
    (stage, phase), (seconds, over) = max(totals.items(), key=lambda item: item[1][1])
    head = f"Improve first: {phase} in {stage}, {seconds:.3g} s or {seconds / wall:.0%} of the wall time"
    if not measured:
        return f"{head}, the longest phase. `metareward profile --machine` measures how far from its limit it is."
    if (stage, phase) in unknown:
        return f"{head}. Its limit is not known, because its model is not."
    limit = seconds - over
    if limit == 0:
        return f"{head}: it computes nothing, so all of it could go."
    return f"{head}: at this machine's limit it would take {limit:.3g} s ({limit / seconds:.0%}), {over:.3g} s less."

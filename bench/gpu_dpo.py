"""DPO training on one GPU: tokens/s, TFLOP/s, MFU and memory of the trainer's own step, and TRL's where it is there.

    python bench/gpu_dpo.py

Random weights at the shapes of SmolLM2-1.7B, Llama-3.2-1B and Llama-3.2-3B; a step is 64 pairs of 950 prompt tokens, of which all
share 300, and two completions of 150. Every variant (torch.compile, activation checkpointing) is a process of its own: one
step warms up and compiles, the others count. Then TRL takes steps on the same pairs. MFU counts the model's FLOPs on the
tokens that were computed, shared ones once, against the GPU's data sheet. It ends within --minutes, in less than ten; what there
was no time for is in the file by name.

Needs a checkout, PyTorch, Triton, transformers, NumPy and pydantic; TRL, datasets and accelerate for the peer. Not yet run on a
GPU. `--device cpu --shapes small` runs all of it on a CPU, for its test only.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

if __name__ == "__main__":  # run from a checkout that is not installed
    for folder in (".", "kernels"):
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))

from bench.dpo_job import Job, make_job
from bench.dpo_ours import serve_ours
from bench.gpu_dpo_workload import SHAPES, Shapes, make_pairs, write_random_model
from bench.peer_dpo import NEEDED, PeerSetting, missing, serve_peer
from bench.record import ROOT, check_writable, environment, file_words, write_json
from bench.sides import Figures, Side
from metareward.config import TrainSettings
from metareward.errors import UserError

PUBLISHED = ("smollm2-1.7b", "llama3.2-1b", "llama3.2-3b")
# The most promising first: what comes last may find no time.
VARIANTS: tuple[dict[str, Any], ...] = (
    {"compile": True, "activation_checkpointing": "selective"},
    {"compile": False, "activation_checkpointing": "selective"},
    {"compile": True, "activation_checkpointing": "none"},
    {"compile": True, "activation_checkpointing": "full"},
)
PEER_SETTINGS = (PeerSetting(4, gradient_checkpointing=True), PeerSetting(2))
PEER_SHAPES = ("smollm2-1.7b", "small")


def benchmark(
    *,
    shapes: Sequence[str] = PUBLISHED,
    device: str = "cuda",
    steps: int = 3,
    minutes: float = 9.0,
    out: Path = ROOT / "bench" / "results",
    seed: int = 0,
) -> None:
    """Measure DPO steps and write DEVICE-dpo.json.

    Args:
        shapes: Models, of SHAPES.
        device: Where to run, "cuda" (in bf16) or "cpu" (in fp32).
        steps: Timed steps of every variant.
        minutes: No variant begins when these are over.
        out: The folder for the file.
        seed: Of weights, pairs and their order.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "there is no CUDA device: run this on a GPU machine, or give --device cpu --shapes small"
        )
    if steps < 1:
        raise UserError(f"--steps is {steps}: set 1 or more")
    suffix = "" if tuple(shapes) == PUBLISHED else f"-{'-'.join(shapes)}"
    path = out / f"{file_words(device)}{suffix}-dpo.json"
    check_writable(path)
    ends = perf_counter() + 60 * minutes
    rows: list[Figures] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in shapes:
            for row in rows_of(name, Path(folder), device, steps, seed, ends):
                rows.append(row)
                print(line(row), flush=True)
                # Kept at once: the time may end before the last.
                write_json(path, {"rows": rows, "steps": steps, **environment(*NEEDED)})
    print(f"wrote {path}\n" + "\n".join(map(line, rows)))


def rows_of(name: str, folder: Path, device: str, steps: int, seed: int, ends: float) -> Iterator[Figures]:
    """Every variant of one model, then the peer's."""
    shapes = SHAPES[name]
    model = folder / name
    write_random_model(model, shapes.model, device, seed)
    for variant in VARIANTS:
        about = {"shapes": name, "side": "ours", **variant}
        job = job_of(model, shapes, device, steps, seed, variant)
        yield {**about, **attempt(serve_ours, (job, device), steps, ends)}
    if name not in PEER_SHAPES:
        return
    for setting in PEER_SETTINGS:
        about = {
            "shapes": name,
            "side": "TRL",
            "batch": setting.batch,
            "gradient_checkpointing": setting.gradient_checkpointing,
        }
        job = job_of(model, shapes, device, steps, seed, {})
        reason = missing()
        yield {
            **about,
            **(
                {"reason": reason}
                if reason
                else attempt(serve_peer, (job, setting, steps + 1, device), steps, ends)
            ),
        }


def job_of(model: Path, shapes: Shapes, device: str, steps: int, seed: int, variant: dict[str, Any]) -> Job:
    settings = TrainSettings(
        batch_pairs=shapes.pairs,
        learning_rate=1e-6,
        warmup_share=0.0,
        min_learning_rate_share=1.0,
        micro_batch_tokens=shapes.micro_batch_tokens,
        compute_dtype="bfloat16" if device == "cuda" else "float32",
        checkpoint_steps=10**9,
    )
    return make_job(model, make_pairs(shapes, seed), replace(settings, **variant), steps + 1, seed)


def attempt(role: Any, arguments: tuple[Any, ...], steps: int, ends: float) -> Figures:
    """One side's steps as a row; a `reason` where it had no time, or failed, as with too little memory."""
    if perf_counter() > ends:
        return {"reason": "no time was left"}
    try:
        with Side("a side", role, *arguments) as side:
            found = [side.ask("step") for _ in range(1 + steps)]
    except (UserError, RuntimeError) as error:
        last = str(error).strip().splitlines()[-1]
        return {"reason": last[:300]}
    return row_of(found, arguments[0])


def row_of(found: Sequence[Figures], job: Job) -> Figures:
    """Figures of the steps after the first. Tokens are computed ones, `unshared` what separate sequences would have been."""
    pairs = job.settings.batch_pairs
    counted = found[1:]
    seconds = [step.get("whole_seconds", step["seconds"]) for step in counted]
    middle = statistics.median(seconds)
    unshared = sum(
        len(example.prompt) + len(part) for example in job.batch(0) for part in example.completions
    )
    row: Figures = {
        "pairs_per_s": pairs / middle,
        "tokens_per_s": statistics.median(step["tokens"] for step in counted) / middle,
        "unshared_tokens_per_s": unshared / middle,
        "seconds": seconds,
        "warm_up_seconds": found[0].get("whole_seconds", found[0]["seconds"]),
        "losses": [step["loss"] for step in found],
        # With the reference's own weights, ln 2.
        "first_loss_off": abs(found[0]["loss"] - math.log(2.0)),
        "peak_bytes": found[-1]["peak_whole_bytes"],
        "reason": None,
    }
    if "tflops" in counted[0]:
        # The trainer's rates are by its own clock, which on a GPU does not wait for the update.
        row["tflops"] = statistics.median(
            step["tflops"] * step["seconds"] / step["whole_seconds"] for step in counted
        )
        row["mfu"] = (
            statistics.median(step["mfu"] * step["seconds"] / step["whole_seconds"] for step in counted)
            if "mfu" in counted[0]
            else None
        )
    return row


def line(row: Figures) -> str:
    """A row for people."""
    known = ("compile", "activation_checkpointing", "batch", "gradient_checkpointing")
    options = ", ".join(f"{name} {row[name]}" for name in known if name in row)
    start = f"{row['shapes']:<14}{row['side']:<6}{options:<52}"
    if row["reason"]:
        return f"{start}{row['reason']}"
    mfu = "" if row.get("mfu") is None else f", MFU {row['mfu']:.1%}"
    rate = f", {row['tflops']:.2f} TFLOP/s{mfu}" if "tflops" in row else ""
    memory = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 1e9:.1f} GB"
    return f"{start}{row['pairs_per_s']:8.2f} pairs/s, {row['tokens_per_s']:9,.0f} tokens/s{rate}{memory}"


def main(arguments: Sequence[str] | None = None) -> None:
    # Not tyro, as elsewhere: a bare GPU machine may not have it.
    parser = argparse.ArgumentParser(description="Measure DPO steps on a GPU and write DEVICE-dpo.json.")
    parser.add_argument("--shapes", choices=list(SHAPES), nargs="+", default=list(PUBLISHED), help="models")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where to run")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of every variant")
    parser.add_argument("--minutes", type=float, default=9.0, help="no variant begins when these are over")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the file")
    parser.add_argument("--seed", type=int, default=0, help="of weights, pairs and their order")
    try:
        benchmark(**vars(parser.parse_args(arguments)))
    except UserError as error:
        print(f"gpu_dpo: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

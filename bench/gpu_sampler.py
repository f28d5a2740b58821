"""Decode speed of the sampler at Llama-3-8B shapes on a GPU, and what share of the memory bandwidth it reaches.

    python bench/gpu_sampler.py

256 sequences around a context of 1,500 tokens, of which groups of 11 share 1,000; random bf16 weights made on the
device, random prompts. Decoding is bound by memory: a step must read the weights once, each shared prefix once a
group and each sequence's own tokens once. The limit is those bytes at a copy bandwidth measured in the same run.

The engine runs as it is, through `generate`. The same requests are sampled twice, with few and with many new tokens;
what the further tokens cost is decoding alone, because prefill, start and tail are the same in both.

Needs nothing but a checkout, PyTorch, Triton and NumPy. Not yet run on a GPU. `--device cpu --shapes small` runs all of
it on a CPU, for its test only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

if __name__ == "__main__":  # run from a checkout that is not installed
    for folder in (".", "kernels"):
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))

from bench.gpu_sampler_workload import SHAPES, Shapes, make_requests, random_decoder
from bench.record import ROOT, check_writable, environment, file_words, write_json
from metareward.errors import UserError
from metareward.model.decoder import Decoder
from metareward.sampler import Engine, Request, SamplingParams

# As the recipe has them for judgments.
TEMPERATURE = 0.8
TOP_P = 0.95


def benchmark(
    *,
    shapes: str = "llama3-8b",
    device: str = "cuda",
    rounds: int = 3,
    out: Path = ROOT / "bench" / "results",
    seed: int = 0,
) -> None:
    """Measure decode tokens/s and write DEVICE-sampler.json.

    Args:
        shapes: The model and the batch, of SHAPES.
        device: Where to run, "cuda" (in bf16) or "cpu" (in fp32).
        rounds: How often few and many tokens are sampled; the median counts.
        out: The folder for the file.
        seed: Of weights, prompts and sampling.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "there is no CUDA device: run this on a GPU machine, or give --device cpu --shapes small"
        )
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}: set 1 or more")
    path = out / f"{file_name(device, shapes)}.json"
    check_writable(path)
    chosen = SHAPES[shapes]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    decoder = random_decoder(chosen.model, dtype=dtype, device=device, seed=seed)
    found = measure(decoder, chosen, rounds=rounds, seed=seed)
    write_json(path, {"shapes": shapes, "dtype": str(dtype).removeprefix("torch."), **found, **environment()})
    print(f"wrote {path}\n{table(found)}")


def table(found: dict[str, Any]) -> str:
    """The figures in a few lines."""
    sizes = found["step_bytes"]
    lines = [
        (
            "decode",
            f"{found['decode_tokens_per_s']:>10,.0f} tok/s",
            f"{found['step_seconds'] * 1e3:,.2f} ms a step",
        ),
        (
            "limit",
            f"{found['limit_tokens_per_s']:>10,.0f} tok/s",
            f"{(sizes['weights'] + sizes['shared_kv']) / 1e9:,.2f} GB a step, {found['copy_bytes_per_s'] / 1e9:,.0f} GB/s",
        ),
        ("share of the limit", f"{found['share_of_limit']:>10.1%}", ""),
        ("limit unshared", f"{found['unshared_limit_tokens_per_s']:>10,.0f} tok/s", ""),
        *((op, f"{chosen:>10}", "") for op, chosen in found["implementation"].items()),
    ]
    return "\n".join(f"{name:<20}{figure:<18}{remark}".rstrip() for name, figure, remark in lines)


def measure(decoder: Decoder, shapes: Shapes, *, rounds: int, seed: int) -> dict[str, Any]:
    """Sample few and many tokens in turn, and hold the difference against the limit."""
    # Prefill must end before the first sequence does, else few and many differ in more than full steps.
    assert shapes.unique_prompt_tokens / shapes.max_step_tokens + 1 < shapes.few
    requests = make_requests(shapes, seed)
    engine = Engine(
        decoder,
        stop_ids=(),
        seed=seed,
        max_running=shapes.batch,
        max_step_tokens=shapes.max_step_tokens,
        # What all hold at the end, and a quarter more for partly filled pages and copies.
        kv_tokens=5 * (shapes.unique_prompt_tokens + shapes.batch * shapes.many) // 4,
    )
    timed(engine, requests, shapes.few)
    timings = []
    for _ in range(rounds):
        engine.stats.reset()
        few = timed(engine, requests, shapes.few)
        engine.stats.reset()
        timings.append({"few": few, "many": timed(engine, requests, shapes.many)})
    step_seconds = statistics.median(turn["many"] - turn["few"] for turn in timings) / (
        shapes.many - shapes.few
    )
    if step_seconds <= 0:
        raise RuntimeError(f"more tokens took no longer ({timings}): the machine is too uneven to measure")
    bandwidth = copy_bandwidth(next(decoder.parameters()).device, shapes.copied_bytes)
    limits = limit_tokens_per_s(shapes, step_bytes(decoder, shapes), bandwidth)
    rate = shapes.batch / step_seconds
    return {
        "decode_tokens_per_s": rate,
        "step_seconds": step_seconds,
        **limits,
        "share_of_limit": rate / limits["limit_tokens_per_s"],
        "copy_bytes_per_s": bandwidth,
        "step_bytes": step_bytes(decoder, shapes),
        "implementation": engine.implementations(),
        "rounds": timings,
        "sizes": {name: value for name, value in asdict(shapes).items() if name != "model"},
        "stats_of_last": asdict(engine.stats),
    }


def timed(engine: Engine, requests: Sequence[Request], new_tokens: int) -> float:
    """Seconds to give every request so many tokens."""
    params = SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, max_new_tokens=new_tokens)
    start = perf_counter()
    made = sum(len(completion.token_ids) for completion in engine.generate(requests, params))
    seconds = perf_counter() - start
    if made != len(requests) * new_tokens:
        raise RuntimeError(f"the engine gave {made} tokens, not {len(requests) * new_tokens}")
    return seconds


def step_bytes(decoder: Decoder, shapes: Shapes) -> dict[str, int]:
    """Bytes a decode step must read: weights, and keys and values with and without sharing."""
    config = decoder.config
    weights = sum(parameter.nbytes for parameter in decoder.parameters())
    embedding = decoder.model.embed_tokens.weight
    if not config.tie_word_embeddings:
        # Only the batch's rows of it are read.
        weights -= embedding.nbytes
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * embedding.element_size()
    return {
        "weights": weights,
        "shared_kv": token
        * (shapes.groups * shapes.shared + shapes.batch * (shapes.context - shapes.shared)),
        "unshared_kv": token * shapes.batch * shapes.context,
    }


def limit_tokens_per_s(shapes: Shapes, sizes: dict[str, int], bandwidth: float) -> dict[str, float]:
    """Decode tokens/s if a step took no longer than its bytes at `bandwidth` bytes/s."""
    return {
        "limit_tokens_per_s": shapes.batch * bandwidth / (sizes["weights"] + sizes["shared_kv"]),
        "unshared_limit_tokens_per_s": shapes.batch * bandwidth / (sizes["weights"] + sizes["unshared_kv"]),
    }


def copy_bandwidth(device: torch.device, size: int, repeats: int = 10) -> float:
    """Bytes/s of copying `size` bytes, each read and written once; the best of three."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    best = float("inf")
    for _ in range(3):
        finish(device)
        start = perf_counter()
        for _ in range(repeats):
            target.copy_(source)
        finish(device)
        best = min(best, (perf_counter() - start) / repeats)
    return 2 * size / best


def finish(device: torch.device) -> None:
    """Wait for what was started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def file_name(device: str, shapes: str) -> str:
    """ "nvidia-h100-80gb-hbm3-sampler"; other shapes than the published ones are named too."""
    words = file_words(device)
    return f"{words}-sampler" if shapes == "llama3-8b" else f"{words}-{shapes}-sampler"


def main(arguments: Sequence[str] | None = None) -> None:
    # Not tyro, as elsewhere: a bare GPU machine may not have it.
    parser = argparse.ArgumentParser(description="Measure decode tokens/s and write DEVICE-sampler.json.")
    parser.add_argument("--shapes", choices=list(SHAPES), default="llama3-8b", help="the model and the batch")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where to run")
    parser.add_argument("--rounds", type=int, default=3, help="few and many tokens are sampled so often")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the file")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and sampling")
    try:
        benchmark(**vars(parser.parse_args(arguments)))
    except UserError as error:
        print(f"gpu_sampler: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

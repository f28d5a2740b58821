"""Hugging Face model directories, written: what this project trains loads in transformers and vLLM as it
is.

A directory under its final name is complete. It is written beside it under another name, flushed to the
disk and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from metareward.errors import UserError
from metareward.model.config import ModelConfig
from metareward.model.decoder import parameter_shapes

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template.*",
    "*.model",
    "*.tiktoken",
    "generation_config.json",
)


def save_model(
    directory: Path,
    state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    *,
    tokenizer_from: Path,
    dtype: torch.dtype,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write weights, config.json and the tokenizer of `tokenizer_from` (with its generation_config.json) as
    `directory`.

    `state` gives the Decoder's parameters by name; pairs are drawn one by one and at most one shard is held
    in memory, so that a sharded model can be gathered tensor by tensor. A tied lm_head.weight is left out.
    Raises UserError when `directory` exists already or a weight is not finite, ValueError when `state`
    lacks a tensor of the model or has others.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists already: remove it or give another name.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.parent / f".{directory.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        pairs = state.items() if isinstance(state, Mapping) else state
        _write_shards(partial, pairs, config, dtype, max_shard_bytes)
        _write_json(partial / "config.json", config.to_hf(str(dtype).removeprefix("torch.")))
        copy_tokenizer(tokenizer_from, partial)
        for path in partial.rglob("*"):
            # save_file makes its files readable by the owner alone; a model is for others to load too.
            path.chmod(0o755 if path.is_dir() else 0o644)
            _flush(path)
        _flush(partial)
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush(directory.parent)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer, chat template and generation settings; UserError when `source` has no tokenizer."""
    source = Path(source)
    copied = set()
    for pattern in TOKENIZER_FILES:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
                copied.add(path.name)
    if not copied - {"generation_config.json"}:
        raise UserError(f"{source} has no tokenizer files: give the directory of the model that was trained.")
    # Chat models may keep further named templates in a folder of their own.
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates")


def _write_shards(
    directory: Path,
    pairs: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    expected = parameter_shapes(config)
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = 0

    def write_held() -> None:
        nonlocal held_bytes
        shards.append(list(held))
        try:
            save_file(held, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
        except SafetensorError as error:
            # The library tells a full disk in words only.
            raise UserError(
                f"{directory} cannot be written ({error}): make room on that disk and run the same command again."
            ) from None
        held.clear()
        held_bytes = 0

    for name, tensor in pairs:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name not in expected or tuple(tensor.shape) != expected.pop(name):
            raise ValueError(f"{name} {tuple(tensor.shape)} is not a tensor of this model, or comes twice")
        weight = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        if not all(torch.isfinite(end) for end in torch.aminmax(weight)):
            raise UserError(
                f"{name} holds NaN or infinite values, so the model is not saved: lower the learning rate."
            )
        if held and held_bytes + weight.nbytes > max_shard_bytes:
            write_held()
        held[name] = weight
        held_bytes += weight.nbytes
        total_bytes += weight.nbytes
    if expected:
        raise ValueError(
            f"the state lacks {', '.join(sorted(expected)[:3])} ({len(expected)} missing in all)"
        )
    write_held()
    if len(shards) == 1:
        (directory / "shard-1").rename(directory / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{number}").rename(directory / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    _write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total_bytes}, "weight_map": weight_map},
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    """Force a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Hugging Face model directories, read: config.json and safetensors, checked before and while they are
loaded.

A half-copied shard, a missing tensor or a NaN in a weight shows up hours later as a strange sample; each is
found here and named instead. `model_writer.py` writes such directories.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from metareward.errors import UserError
from metareward.model.config import ModelConfig
from metareward.model.decoder import Decoder, parameter_shapes
from metareward.model.model_writer import save_model
from metareward.model.tensor_parallel import ALONE, TensorGroup, part_config, read_part, sum_outputs

__all__ = ["iterate_tensors", "load_decoder", "read_config", "save_model", "weights_digest"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): copy the file again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: copy the file again.")
    return value


def read_config(directory: Path) -> ModelConfig:
    """The ModelConfig of a model directory; UserError when it is missing, unreadable or of an unsupported
    model.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"There is no model directory {directory}: check the path.")
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} has no config.json: give a directory in the Hugging Face format.")
    try:
        return ModelConfig.from_hf(read_json(path))
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None


def iterate_tensors(directory: Path, group: TensorGroup = ALONE) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every weight, one at a time, on the CPU and in the file's dtype; for a rank of
    a group its part, and no more is read.

    The names are exactly the Decoder's parameter names: leftovers such as rotary buffers and the second
    copy of a tied head are skipped. Raises UserError before the first tensor for missing, unexpected or
    misshapen ones and for missing or half-written files, and at the tensor for NaN, infinity or a tied head
    that differs from the embedding. The tensor may be a view of the mapped file: copy what outlives the
    step.
    """
    config = read_config(directory)
    inventory = _inventory(Path(directory), config)
    for path, names in inventory.items():
        with _opened(path) as file:
            for name in names:
                tensor = (
                    file.get_tensor(name) if group.size == 1 else read_part(file.get_slice(name), name, group)
                )
                if not _finite(tensor):
                    raise UserError(
                        f"{path}: {name} holds NaN or infinite values: use an undamaged copy of the model."
                    )
                yield name, tensor


def load_decoder(
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    group: TensorGroup = ALONE,
) -> Decoder:
    """Build the Decoder of a model directory with its weights in `dtype` on `device`; for a rank of a group
    its part, which `check_tensor_parallel` must have let through.

    Starts on the meta device, so that memory holds one copy of the weights and one tensor in flight. Raises
    UserError as `iterate_tensors` does, and when a weight overflows in `dtype`.
    """
    config = part_config(read_config(directory), group.size)
    with torch.device("meta"):
        decoder = Decoder(config)
    for name, tensor in iterate_tensors(directory, group):
        weight = tensor.to(device=device, dtype=dtype, copy=True)
        if dtype == torch.float16 and not _finite(weight):
            raise UserError(
                f"{directory}: {name} overflows in float16: load the model in bfloat16 or float32."
            )
        module, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(module), leaf, nn.Parameter(weight))
    assert not any(parameter.is_meta for parameter in decoder.parameters())
    if group.size > 1:
        decoder.tensor_group = group
        sum_outputs(decoder, group)
    return decoder


def weights_digest(directory: Path) -> str:
    """SHA-256 over name, dtype, shape and bytes of every weight, in the order of names: equal however the
    files are sharded.
    """
    directory = Path(directory)
    inventory = _inventory(directory, read_config(directory))
    where = {name: path for path, names in inventory.items() for name in names}
    digest = hashlib.sha256()
    files = {path: _opened(path) for path in inventory}
    for name in sorted(where):
        tensor = files[where[name]].get_tensor(name).contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(memoryview(tensor.view(torch.uint8).numpy()).cast("B"))
    return digest.hexdigest()


def _finite(tensor: Tensor) -> bool:
    # One vectorised pass without a mask as large as the tensor; NaN carries through to both ends.
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged or half-written ({error}): copy or download the file again."
        ) from None


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """Each safetensors file with the names that the index puts into it (None without an index)."""
    if (directory / INDEX).is_file():
        index = directory / INDEX
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map: copy the file again.")
        files: dict[Path, set[str] | None] = {}
        for name, shard in weight_map.items():
            names = files.setdefault(directory / Path(str(shard)).name, set())
            assert names is not None
            names.add(name)
        missing = sorted(path.name for path in files if not path.is_file())
        if missing:
            raise UserError(
                f"{index} names {missing[0]}, which is not there:"
                f" copy the missing file ({len(missing)} in all)."
            )
        return files
    if (directory / WEIGHTS).is_file():
        return {directory / WEIGHTS: None}
    if any(directory.glob("pytorch_model*.bin")):
        raise UserError(
            f"{directory} holds its weights as pytorch_model.bin, and only safetensors are read:"
            " load and save the model once with transformers to convert it."
        )
    raise UserError(f"{directory} has no {WEIGHTS}: copy the model's weights there.")


def _inventory(directory: Path, config: ModelConfig) -> dict[Path, list[str]]:
    """The names to read from each file, after checking all names and shapes against the model, from the
    headers alone.
    """
    expected = parameter_shapes(config)
    inventory: dict[Path, list[str]] = {}
    found: dict[str, Path] = {}
    for path, indexed in _weight_files(directory).items():
        file = _opened(path)
        held = list(file.keys())
        absent = sorted((indexed or set()) - set(held))
        if absent:
            raise UserError(f"{path} lacks {absent[0]}, which the index puts there: copy the file again.")
        inventory[path] = []
        for name in held:
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name in found:
                raise UserError(
                    f"{name} is in both {found[name]} and {path}: remove the file that is too many."
                )
            found[name] = path
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            if name not in expected:
                raise UserError(
                    f"{path} holds {name}, which this model does not have:"
                    " check that config.json belongs to it."
                )
            shape = tuple(file.get_slice(name).get_shape())
            if shape != expected[name]:
                raise UserError(
                    f"{path}: {name} has the shape {list(shape)}, but config.json asks for"
                    f" {list(expected[name])}:"
                    " check that they belong together."
                )
            inventory[path].append(name)
    missing = [name for name in expected if name not in found]
    if missing:
        raise UserError(
            f"{directory} lacks {missing[0]} ({len(missing)} missing in all): copy the complete model."
        )
    if "lm_head.weight" in found and config.tie_word_embeddings:
        _check_tied(found)
    return inventory


def _check_tied(found: dict[str, Path]) -> None:
    head = _opened(found["lm_head.weight"]).get_tensor("lm_head.weight")
    embedding = _opened(found["model.embed_tokens.weight"]).get_tensor("model.embed_tokens.weight")
    if not torch.equal(head, embedding):
        raise UserError(
            f"{found['lm_head.weight']} holds an lm_head.weight that differs from the embedding, but"
            " config.json ties them:"
            " set tie_word_embeddings to false."
        )

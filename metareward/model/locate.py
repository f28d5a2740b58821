"""From what a user writes for a model to a directory: a path, or the id of a model on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from metareward.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights in other formats would double the download and are never read.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


def locate_model(spec: str) -> Path:
    """The local directory of a model given as a directory or as a hub id `owner/name`, downloaded if it is
    not cached.

    Raises UserError when neither exists, the hub cannot be reached, or access is refused.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(
            f"{spec} is a file: give the model's directory (a GGUF file is imported by `import_gguf` first)."
        )
    if not HUB_ID.fullmatch(spec):
        raise UserError(
            f"There is no model directory {spec}: give an existing directory or a hub id such as owner/name."
        )
    return _download(spec)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=WANTED))
    except GatedRepoError:
        raise UserError(
            f"Access to {hub_id} is restricted: accept its terms on the hub and run `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"There is neither a directory nor a public hub model {hub_id}: check the name."
        ) from None
    except (LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{hub_id} is no local directory and could not be downloaded ({reason}):"
            " check the network or give a directory."
        ) from None

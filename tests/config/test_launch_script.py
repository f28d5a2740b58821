"""The Slurm script with stand-ins for srun and scontrol: the command that every node would run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import metareward

SCRIPT = Path(metareward.__file__).parent / "recipes" / "launch" / "torchrun.slurm"
JOB = {
    "SLURM_JOB_NODELIST": "gpu[03-04]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_ID": "4711",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_CPUS_PER_TASK": "32",
    "RECIPE": "my recipe.toml",
    "RUN_DIR": "/shared/run 1",
}
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the script is for bash")


def submit(folder: Path, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
    stand_ins = {
        "scontrol": 'test "$*" = "show hostnames gpu[03-04]" && printf "gpu03\\ngpu04\\n"',
        "srun": 'printf "%s\\n" "threads $OMP_NUM_THREADS" "$@"',
    }
    for name, body in stand_ins.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", **JOB, **changes}
    given = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=given, text=True, capture_output=True)


def test_the_command_of_a_node(tmp_path: Path) -> None:
    done = submit(tmp_path, "--prompts.file", "a b.jsonl")
    assert done.returncode == 0, done.stderr
    threads, *words = done.stdout.splitlines()
    assert threads == "threads 8"
    command = words[words.index("torchrun") :]
    options = dict(zip(command[1:11:2], command[2:11:2], strict=True))
    assert options == {
        "--nnodes": "2",
        "--nproc-per-node": "4",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "gpu03:29500",
        "--rdzv-id": "4711",
    }
    assert command[11:] == [
        *("-m", "metareward", "run", "my recipe.toml", "--run-dir", "/shared/run 1"),
        *("--train.shard-within", "4", "--prompts.file", "a b.jsonl"),
    ]


def test_all_gpus_in_one_group(tmp_path: Path) -> None:
    words = submit(tmp_path, SHARD_WITHIN="0", RDZV_PORT="30000").stdout.splitlines()
    assert words[words.index("--train.shard-within") + 1] == "0"
    assert "gpu03:30000" in words


@pytest.mark.parametrize("name", ["RECIPE", "RUN_DIR"])
def test_what_must_be_set_is_said(tmp_path: Path, name: str) -> None:
    done = submit(tmp_path, **{name: None})
    assert done.returncode != 0
    assert f"set {name} to" in done.stderr
    assert not done.stdout

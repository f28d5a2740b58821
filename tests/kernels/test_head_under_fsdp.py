"""A model with linear_logprob for a head, sharded by FSDP2, takes the steps that the plain model takes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.fsdp_worker import STEPS, train_plain

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=[1, 2])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the ranks ended with."""
    folder, ranks = tmp_path_factory.mktemp("ranks"), request.param
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        }
        command = [
            sys.executable,
            str(Path(__file__).with_name("fsdp_worker.py")),
            str(folder / f"{rank}.pt"),
        ]
        with (folder / f"log-{rank}").open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT))
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"log-{rank}").read_text() for rank in range(ranks))
    assert codes == [0] * ranks, logs
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def test_steps_equal_the_plain_models(trained: list[dict[str, Any]]) -> None:
    """Tied embeddings, two micro-batches a step and one reduction: gradients and weights to 1e-5."""
    wanted = train_plain(len(trained))
    for found in trained:
        for ours, true in zip(
            [*found["gradients"], found["weights"]], [*wanted["gradients"], wanted["weights"]], strict=True
        ):
            assert ours.keys() == true.keys()
            for name, tensor in true.items():
                scale = float(tensor.abs().max())
                assert scale > 0
                torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5 * scale, msg=name)
    assert len(wanted["gradients"]) == STEPS


def test_ranks_end_with_the_same_bits(trained: list[dict[str, Any]]) -> None:
    for name, tensor in trained[0]["weights"].items():
        assert all(torch.equal(other["weights"][name], tensor) for other in trained[1:])

"""Free memory as the machine and its control groups tell it, on made-up /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metareward.run.memory import free_machine_memory, free_memory

GIB = 2**30


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with 10 GiB available and no control groups."""
    write(
        tmp_path, {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {10 * GIB // 1024} kB\nSwapFree: 0 kB\n"}
    )
    return tmp_path


def test_without_limits_it_is_what_the_machine_has(machine: Path) -> None:
    assert free_machine_memory(machine) == 10 * GIB
    write(
        machine,
        {
            "proc/self/cgroup": "0::/user/session\n",
            "sys/fs/cgroup/user/session/memory.max": "max\n",
            "sys/fs/cgroup/user/session/memory.current": "5\n",
            "sys/fs/cgroup/user/session/memory.stat": "anon 5\n",
        },
    )
    assert free_machine_memory(machine) == 10 * GIB


def test_a_limit_of_a_group_above_counts(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/job/memory.current": f"{3 * GIB}\n",
            # Half of what is used is a file cache that can go.
            "sys/fs/cgroup/job/memory.stat": f"anon 7\ninactive_file {3 * GIB // 2}\n",
        },
    )
    assert free_machine_memory(machine) == 5 * GIB // 2


@pytest.mark.parametrize("folder", ["docker/abc", ""])
def test_version_1_also_where_the_group_is_mounted_as_the_root(machine: Path, folder: str) -> None:
    group = Path("sys/fs/cgroup/memory") / folder
    write(
        machine,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
            str(group / "memory.limit_in_bytes"): f"{2 * GIB}\n",
            str(group / "memory.usage_in_bytes"): f"{GIB}\n",
            str(group / "memory.stat"): "inactive_file 1\ntotal_inactive_file 4096\n",
        },
    )
    assert free_machine_memory(machine) == GIB + 4096


def test_a_group_over_its_limit_leaves_nothing(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "100\n",
            "sys/fs/cgroup/memory.current": "300\n",
            "sys/fs/cgroup/memory.stat": "inactive_file 100\n",
        },
    )
    assert free_machine_memory(machine) == 0


def test_here_the_ranks_of_a_machine_divide_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = free_memory(torch.device("cpu"))
    assert whole > 2**20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert 0 < free_memory(torch.device("cpu")) < whole / 100

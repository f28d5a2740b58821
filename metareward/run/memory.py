"""How much memory is free for this rank, measured: of its GPU, or of the machine within the limits of its control groups.

Has not run on a GPU yet.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that this rank may still take on `device`; on a CPU an equal part for every rank of the machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What PyTorch's allocator holds without using it is free as well.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_machine_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_machine_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that processes here may still take: what the machine has, or the control groups leave.

    `root` is where /proc and /sys are looked for.
    """
    found = [
        room for limit, used, stat in control_groups(root) if (room := group_room(limit, used, stat)) >= 0
    ]
    machine = machine_memory(root)
    return min([machine, *found])


def machine_memory(root: Path) -> int:
    """Bytes that the machine could give without swapping."""
    info = root / "proc/meminfo"
    if info.is_file():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    # Not Linux: half of what is built in, since what is free cannot be read without a library.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def control_groups(root: Path) -> list[tuple[Path, Path, Path]]:
    """(limit, use, statistics) files of this process's memory control groups and of those above them, versions 1 and 2."""
    memberships = root / "proc/self/cgroup"
    if not memberships.is_file():
        return []
    found = []
    for line in memberships.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be that of the host while the container's group is mounted as the root.
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                found.append((folder / limit, folder / used, folder / "memory.stat"))
    return found


def group_room(limit: Path, used: Path, stat: Path) -> int:
    """Bytes left in a control group; -1 where it has no limit."""
    try:
        most, taken = limit.read_text().strip(), int(used.read_text())
        statistics = dict(line.split(" ", 1) for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return -1
    if most == "max":
        return -1
    # Cached files that nobody reads are given up before anything fails.
    reclaimable = int(statistics.get("total_inactive_file", statistics.get("inactive_file", "0")))
    return max(0, int(most) - max(0, taken - reclaimable))

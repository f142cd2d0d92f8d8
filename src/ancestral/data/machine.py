"""What this machine has to spend on one process: cores, and memory within the limits of its control groups."""

import os
from pathlib import Path

import psutil

CGROUP_1, CGROUP_2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")
"""Files of a control group, versions 1 and 2, that hold its limit and what it uses."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that this process may have, those it has included: of what the machine has free and its cgroup allows."""
    own = psutil.Process().memory_info().rss
    return own + min([psutil.virtual_memory().available, *cgroup_room()])


def cgroup_room(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left under each memory limit of the control groups this process is in, versions 1 and 2."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    room = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        names = CGROUP_1 if controllers else CGROUP_2
        group = base / path.strip("/")
        for folder in [group, *(parent for parent in group.parents if parent == base or base in parent.parents)]:
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None:
                room.append(max(0, limit - used))
    return room


def _number(path: Path) -> int | None:
    """A limit, or None where there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max"
        return None

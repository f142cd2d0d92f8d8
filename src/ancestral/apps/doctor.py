"""What this machine has, and what each preset costs on it."""

import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from ancestral.data import machine
from ancestral.data.dataset import Examples, divide
from ancestral.nets.precision import has_bfloat16
from ancestral.training import loop, recipes, resources

GIB = 2**30
Progress = Callable[[str, int, int], None]


def doctor(folder: Path = Path()) -> dict[str, Any]:
    """Versions, cores, threads, bfloat16, memory, disk, GPU, and the speed of a convolution, with what to mend."""
    usable, threads = machine.usable_cores(), torch.get_num_threads()
    found: dict[str, Any] = {
        "ancestral": version("ancestral"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cores": psutil.cpu_count(logical=False) or usable,
        "usable_cores": usable,
        "threads": threads,
        "bfloat16": has_bfloat16(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "available_memory_gib": round(machine.available_memory() / GIB, 1),
        "free_disk_gib": round(resources.free_disk(folder) / GIB, 1),
        "convolution_gflop_per_second": {
            str(dtype).removeprefix("torch."): round(convolution_speed(dtype) / 1e9)
            for dtype in (torch.float32, torch.bfloat16)
        },
    }
    found["warnings"] = warnings(found)
    return found


def warnings(found: dict[str, Any]) -> list[str]:
    """What about a machine slows training down or endangers a run, each with what to do."""
    said, wanted = [], min(found["usable_cores"], found["cores"])  # two threads on one core share its units
    if found["threads"] > found["usable_cores"]:
        said.append(
            f"{found['threads']} threads on {found['usable_cores']} usable cores wait for each other: "
            f"set OMP_NUM_THREADS={found['usable_cores']}"
        )
    if found["threads"] < wanted:
        said.append(f"{found['threads']} threads leave some of {wanted} cores idle: set OMP_NUM_THREADS={wanted}")
    if not found["bfloat16"]:
        said.append("no bfloat16 in hardware: training runs in float32, at about half the speed")
    if found["free_disk_gib"] < 1:
        said.append(f"{found['free_disk_gib']} GiB of disk are free here: give another place with --to")
    if found["available_memory_gib"] < 2:
        said.append(f"{found['available_memory_gib']} GiB of memory are to be had: take --preset tiny")
    return said


def lines(found: dict[str, Any]) -> list[str]:
    """The same as a person reads it."""
    speed = found["convolution_gflop_per_second"]
    return [
        f"ancestral {found['ancestral']}, torch {found['torch']}, Python {found['python']}, {found['platform']}",
        f"cores: {found['usable_cores']} usable of {found['cores']}, {found['threads']} threads, "
        f"bfloat16 {'in hardware' if found['bfloat16'] else 'missing'}, GPU {found['gpu'] or 'none'}",
        f"memory: {found['available_memory_gib']} GiB to be had of {found['memory_gib']}; "
        f"disk: {found['free_disk_gib']} GiB free here",
        f"3x3 convolution and its gradient: {speed['float32']} GFLOP/s in float32, {speed['bfloat16']} in bfloat16",
        *(f"warning: {warning}" for warning in found["warnings"]),
    ]


def convolution_speed(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of a 3x3 convolution of 64 channels, channels-last, forward and backward: the best of what fits."""
    layer = nn.Conv2d(64, 64, 3, padding=1, bias=False).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(16, 64, 32, 32, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    flops, best, began = 3 * 2 * x.numel() * 64 * 9, 0.0, time.perf_counter()
    while time.perf_counter() - began < seconds or best == 0:
        start = time.perf_counter()
        layer(x).backward(x.detach())
        best = max(best, flops / (time.perf_counter() - start))
    return best


def presets_table(channels: int, side: int, *, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Every preset for images of this shape: parameters, FLOPs, memory, and images/s in a few real training steps."""
    x = np.random.default_rng(0).integers(0, 256, (256, channels, side, side), dtype=np.uint8)
    data = divide(Examples(x, 256), name="noise", source="noise")
    table: list[dict[str, Any]] = []
    for done, preset in enumerate(recipes.PRESETS):
        if progress:
            progress("timing presets", done, len(recipes.PRESETS))
        setup = recipes.choose(data.facts, "images", preset)
        model = recipes.build(setup, data.facts)
        cost, batch = resources.cost(model, setup, data), setup.training.batch
        pace = loop.pace(model, data, setup.training, seed=0, seconds=3)
        table.append(
            {
                "preset": preset,
                "parameters": cost.parameters,
                "gflop_per_image": round(cost.flops / 1e9, 3),
                "batch": batch,
                "memory_mib": round(cost.memory(batch) / 2**20),
                "images_per_second": round(batch / pace, 1),
                "gflop_per_second": round(3 * cost.flops * batch / pace / 1e9),
            }
        )
    return table


def table_lines(table: list[dict[str, Any]]) -> list[str]:
    """The table as Markdown, which is what docs/presets.md holds."""
    return [
        "| preset | parameters | GFLOP forward an image | memory at the batch | images/s in training | GFLOP/s |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {row['preset']} | {row['parameters']:,} | {row['gflop_per_image']:.3f} "
            f"| {row['memory_mib']:,} MiB at {row['batch']} | {row['images_per_second']:,.0f} "
            f"| {row['gflop_per_second']:,} |"
            for row in table
        ),
    ]

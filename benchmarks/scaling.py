"""Time and memory of training against the side of the images, the batch, the size of the data set and the processes.

    make bench-scaling

Every point is a process of its own: a few steps of the loop of `ancestral train` with the recipe for images, after a
few to warm up. Writes results/scaling.json and docs/images/scaling.png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from ours import data_of, setup_of

from ancestral.training import recipes
from ancestral.training.loop import State, steps
from ancestral.training.processes import join

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
REPORT = HERE / "results" / "scaling.json"
PICTURE = HERE.parent / "docs" / "images" / "scaling.png"
WARM_UP = 3
USUAL = {"side": 32, "batch": 64, "examples": 4096, "processes": 1, "threads": 2}
SWEEPS: dict[str, list[dict[str, int]]] = {
    "side": [{"side": side} for side in (8, 16, 32, 64, 128)],
    "batch": [{"batch": batch} for batch in (4, 16, 64, 256)],
    "examples": [{"examples": 10**power} for power in (3, 4, 5, 6)],
    "processes": [
        {"processes": 1, "threads": 2},
        {"processes": 2, "threads": 1},
        {"processes": 1, "threads": 1, "batch": 32},
    ],
}
"""What differs from the usual point in each sweep; of the processes, the last is what one of the two does alone."""


def memory(kind: str, reset: bool = False) -> float:
    """MiB this process holds ("VmRSS") or has held at most ("VmHWM"), since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


def measure(point: dict[str, int], images: Path, rounds: int) -> dict[str, Any]:
    """Seconds a step and MiB of memory at a point, of this process where there are several."""
    torch.set_num_threads(point["threads"])
    data = data_of(torch.from_numpy(np.load(images, mmap_mode="c")))
    changes = [f"training.batch={point['batch']}"]
    with join() as group:
        setup = setup_of(data, changes)
        before = memory("VmRSS", reset=True)
        state = State(recipes.build(setup, data.facts), setup.training, group)
        ends = [record.seconds for record in steps(state, data, WARM_UP + rounds, seed=0)]
        times = np.diff(ends)[WARM_UP - 1 :].tolist()
        grown = memory("VmHWM") - before
    return {
        **point,
        "rank": group.rank,
        "seconds": statistics.median(times),
        "least": min(times),
        "greatest": max(times),
        "images_per_second": point["batch"] / statistics.median(times),
        "grown_mib": grown,
    }


def launch(point: dict[str, int], rounds: int, folder: Path) -> dict[str, Any]:
    """Measure a point in processes of its own."""
    images = folder / f"{point['examples']}-{point['side']}.npy"
    if not images.exists():
        shape = (point["examples"] + 256, 1, point["side"], point["side"])
        made = np.lib.format.open_memmap(images, mode="w+", dtype=np.uint8, shape=shape)
        random = np.random.default_rng(0)
        for first in range(0, len(made), 4096):
            part = made[first : first + 4096]
            part[:] = random.integers(0, 256, part.shape, dtype=np.uint8)
        made.flush()
    words = [sys.executable]
    if point["processes"] > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(point["processes"])]
    words += [__file__, "--point", json.dumps(point), "--images", str(images), "--rounds", str(rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(point["threads"])}
    out = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, cwd=HERE).stdout
    (answer,) = (json.loads(line) for line in out.splitlines() if line.startswith("{"))
    return dict(answer)


def draw(found: dict[str, list[dict[str, Any]]]) -> None:
    """Images a second, and memory, in each sweep."""
    figure, axes = plt.subplots(2, 4, figsize=(11, 4.6), sharex="col", layout="constrained")
    names = {"side": "side, pixels", "batch": "batch", "examples": "examples in the data set"}
    for column, (sweep, name) in enumerate(names.items()):
        x = [point[sweep] for point in found[sweep]]
        for row, key in enumerate(("images_per_second", "grown_mib")):
            axes[row, column].plot(x, [point[key] for point in found[sweep]], "o-", color="C0")
            axes[row, column].set(xscale="log", yscale="log" if sweep == "side" else "linear")
            if sweep != "side":
                axes[row, column].set_ylim(0, 1.1 * max(point[key] for point in found[sweep]))
        if sweep != "examples":
            axes[0, column].set_xticks(x, labels=map(str, x), minor=False)
            axes[0, column].set_xticks([], minor=True)
        axes[1, column].set_xlabel(name)
    labels = ["1 process,\n2 threads", "2 processes,\n1 thread", "1 process,\n1 thread,\nhalf the\nbatch"]
    for row, key in enumerate(("images_per_second", "grown_mib")):
        axes[row, 3].bar(labels, [point[key] for point in found["processes"]], color="C0", width=0.6)
        axes[row, 3].tick_params(axis="x", labelsize=7)
    axes[0, 0].set_ylabel("images a second")
    axes[1, 0].set_ylabel("MiB added by training")
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=150)
    plt.close(figure)


def main() -> None:
    """What the first lines of this file say."""
    parser = argparse.ArgumentParser(description="Time and memory of training, point by point.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--point", type=json.loads, help="measure this one, and print it")
    parser.add_argument("--images", type=Path)
    options = parser.parse_args()
    if options.point:
        line = measure(options.point, options.images, options.rounds)
        if line["rank"] == 0:
            print(json.dumps(line))
        return
    found: dict[str, list[dict[str, Any]]] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for sweep, points in SWEEPS.items():
            found[sweep] = []
            for point in points:
                line = launch(USUAL | point, options.rounds, Path(folder))
                found[sweep].append(line)
                print(f"{sweep:<10} {json.dumps(point):<50} {line['images_per_second']:8.1f} images/s", flush=True)
    whole, two, half = (point["images_per_second"] for point in found["processes"])
    report = {
        "usual": USUAL,
        **found,
        "two_processes_over_one_of_two_threads": two / whole,
        "two_processes_over_twice_one": two / (2 * half),
        "minutes": (time.perf_counter() - began) / 60,
    }
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    print(f"two processes / one of two threads: {two / whole:.3f}; / twice one of one thread: {two / (2 * half):.3f}")
    draw(found)


if __name__ == "__main__":
    main()

"""Reading JPEGs beside a bare loop of Pillow, and batches from the cache beside batches from memory, in one run.

    python benchmarks/decoding.py [--count 10000] [--sides 32,256] [--pairs 5] [--folder PATH]

The images are generated, smooth with some noise, or those below a folder. Both sides take as many processes as there
are cores and are timed in alternation; what is printed and written to results/decoding.json are medians over the pairs:

    pillow     images/s of `np.asarray(Image.open(path).convert("RGB"))`, for the paths as they are listed before
    reading    images/s of `load`, which lists, decodes and divides them
    building   the same, into a new cache, with names by content
    again      the same, from that cache
    ratio      of speeds, that of Pillow being 1: by the clock (wall), and by the work of all cores (cores)
    batches    images/s of all training examples in the model's units, mapped from the cache, and from memory
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from ancestral.data import Data, load
from ancestral.data.cores import spread
from ancestral.data.machine import usable_cores

REPORT = Path(__file__).parent / "results" / "decoding.json"
BATCH = 64


def make(folder: Path, count: int, side: int) -> None:
    """JPEGs of quality 90, in folders of a thousand."""
    rng = np.random.default_rng(0)
    for k in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((side, side))
        pixels = np.clip(np.asarray(coarse) + rng.normal(0, 4, (side, side, 1)), 0, 255).astype(np.uint8)
        path = folder / f"{k // 1000:04}" / f"{k:07}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)


def decoded(paths: list[str]) -> int:
    """A bare loop."""
    for path in paths:
        np.asarray(Image.open(path).convert("RGB"))
    return len(paths)


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds by the clock, seconds of all cores, and what came of it."""
    before, begun = os.times(), time.monotonic()
    result = work()
    seconds, after = time.monotonic() - begun, os.times()
    return seconds, sum(after[:4]) - sum(before[:4]), result


def pillow(paths: list[str]) -> int:
    """The loop in as many processes as there are cores."""
    n = usable_cores()
    return sum(spread(decoded, [paths[k::n] for k in range(n)]))


def reading(folder: Path, cache: Path | None) -> Data:
    """`load`, with or without a cache."""
    os.environ.pop("ANCESTRAL_CACHE", None)
    if cache:
        os.environ["ANCESTRAL_CACHE"] = str(cache)
    return load(folder)


def batches(data: Data, order: np.ndarray) -> None:
    """All training examples once, in the model's units."""
    for start in range(0, len(order), BATCH):
        data.batch(order[start : start + BATCH])


def compare(folder: Path, pairs: int) -> dict[str, Any]:
    """Every figure, over so many pairs."""
    paths = sorted(map(str, folder.rglob("*.jp*g")))
    clock: dict[str, list[float]] = {}
    work: dict[str, list[float]] = {}

    def measure(name: str, run: Callable[[], Any]) -> Any:
        seconds, cores, result = timed(run)
        clock.setdefault(name, []).append(seconds)
        work.setdefault(name, []).append(cores)
        return result

    with tempfile.TemporaryDirectory() as root:
        cache = Path(root) / "cache"
        pillow(paths), reading(folder, None)  # the files are in the system's memory from here on
        for _ in range(pairs):
            held = mapped = None  # their memory is used again, and not asked for anew
            shutil.rmtree(cache, ignore_errors=True)
            measure("pillow", partial(pillow, paths))
            held = measure("reading", partial(reading, folder, None))
            measure("building", partial(reading, folder, cache))
            mapped = measure("again", partial(reading, folder, cache))
            order = np.random.default_rng(0).permutation(mapped.facts.n_train)
            for name, data in (("mapped", mapped), ("held", held)):
                measure(name, partial(batches, data, order))
    count, n_train, shape = len(paths), len(order), held.facts.shape
    names = ("reading", "building", "again")
    return {
        "count": count,
        "shape": shape,
        "per_second": {name: round(count / median(clock[name])) for name in ("pillow", *names)},
        "ratio_wall": {name: _ratio(clock, "pillow", name) for name in names},
        "ratio_cores": {name: _ratio(work, "pillow", name) for name in names},
        "batches_per_second": {name: round(n_train / median(clock[name])) for name in ("mapped", "held")},
        "batches_ratio": _ratio(clock, "held", "mapped"),
    }


def _ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    return round(median(a / b for a, b in zip(times[one], times[other], strict=True)), 3)


def main() -> None:
    """Measure at every side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--sides", default="32,256")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="measure on the images below this instead")
    arguments = parser.parse_args()
    points = []
    for side in [None] if arguments.folder else map(int, arguments.sides.split(",")):
        with tempfile.TemporaryDirectory() as root:
            folder = arguments.folder or Path(root)
            if side:
                make(folder, arguments.count, side)
            points.append(compare(folder, arguments.pairs))
        print(json.dumps(points[-1]), flush=True)
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(json.dumps({"cores": usable_cores(), "points": points}, indent=2) + "\n")


if __name__ == "__main__":
    main()

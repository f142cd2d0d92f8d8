"""Examples per second and peak memory of reading data, against how many there are and how they are packed.

    python benchmarks/scaling_data.py [--counts 1000,10000,100000,1000000] [--kinds folder,zip,tar,tar.gz,npy,csv,jpeg]

The images are generated: noise of 32x32 RGB, as PNG where there are files; a table has 12 columns. Every point is read
in processes of its own:

    memory     without a cache, after one reading that warms the page cache
    building   into a new cache, images alone
    mapped     from that cache

Memory is anonymous, that of processes that decode not included: what is mapped from a file is the system's, which
takes it back when it needs it. Of `memory`, the examples themselves are taken off. JPEGs are read beside a bare loop of
Pillow (decoding.py). Writes results/scaling_data.json.
"""

import argparse
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import decoding
import numpy as np

HERE = Path(__file__).parent
REPORT = HERE / "results" / "scaling_data.json"
SIDE, COLUMNS = 32, 12
IMAGES = ("folder", "zip", "tar", "tar.gz")
KINDS = (*IMAGES, "npy", "csv", "jpeg")
LOOK = 0.02  # seconds between looks at the memory


def png(pixels: np.ndarray) -> bytes:
    """A PNG without filters, quickly made."""
    height, width = pixels.shape[:2]
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    parts = [b"\x89PNG\r\n\x1a\n"]
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, body in [(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b"")]:
        parts.append(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))
    return b"".join(parts)


def files(count: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents, in folders of a thousand."""
    rng = np.random.default_rng(0)
    for k in range(count):
        yield f"{k // 1000:04}/{k:07}.png", png(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def made(root: Path, kind: str, count: int) -> Path:
    """The data, written below a folder."""
    path = root / ("data" if kind == "folder" else f"data.{kind}")
    if kind == "folder":
        for name, content in files(count):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files(count):
                archive.writestr(name, content)
    elif kind in ("tar", "tar.gz"):
        with tarfile.open(
            path, "w:gz" if kind == "tar.gz" else "w", **({"compresslevel": 1} if "gz" in kind else {})
        ) as tar:
            for name, content in files(count):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    elif kind == "npy":
        x = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, 3, SIDE, SIDE))
        rng = np.random.default_rng(0)
        for start in range(0, count, 1000):
            x[start : start + 1000] = rng.integers(0, 256, x[start : start + 1000].shape, dtype=np.uint8)
        x.flush()
    else:
        np.savetxt(path, np.random.default_rng(0).normal(size=(count, COLUMNS)), fmt="%.5f", delimiter=",")
    return path


def measure(path: Path) -> dict[str, Any]:
    """Seconds and MiB of one reading, of this process."""
    from ancestral.data import load

    def held() -> float:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) / 1024

    def watch() -> None:
        while not done.wait(LOOK):
            peaks.append(held())

    load("digits")
    before, peaks, done = held(), [0.0], threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    begun, work = time.monotonic(), os.times()
    data = load(path)
    seconds, worked = time.monotonic() - begun, os.times()
    done.set()
    watcher.join()
    own = 0 if data.mapped else sum(x.numel() * x.element_size() for x in (data.train, data.held_out)) / 2**20
    return {
        "examples": data.facts.n_train + data.facts.n_held_out,
        "seconds": round(seconds, 2),
        "cores_seconds": round(sum(worked[:4]) - sum(work[:4]), 2),
        "peak_mib": round(max(peaks) - before - own),
        "data_mib": round(own),
    }


def readings(path: Path, kind: str) -> dict[str, Any]:
    """What `measure` says of each way of reading."""
    command = [sys.executable, __file__, "--measure", str(path)]
    plain = {name: value for name, value in os.environ.items() if name != "ANCESTRAL_CACHE"}
    with tempfile.TemporaryDirectory() as root:
        cached = {**plain, "ANCESTRAL_CACHE": root}
        ways = {"warm": plain, "memory": plain, **({"building": cached, "mapped": cached} if kind in IMAGES else {})}
        made = {
            way: json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)
            for way, env in ways.items()
        }
    del made["warm"]
    return made


def write(points: list[dict[str, Any]]) -> None:
    """What is known so far: the last points may take an hour."""
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps({"cores": len(os.sched_getaffinity(0)), "points": points}, indent=2) + "\n")


def main() -> None:
    """Make, read and report every point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", default="1000,10000,100000,1000000")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--pairs", type=int, default=5, help="of JPEGs and Pillow")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    points: list[dict[str, Any]] = []
    for count in map(int, arguments.counts.split(",")):
        for kind in arguments.kinds.split(","):
            with tempfile.TemporaryDirectory() as root:
                if kind == "jpeg":
                    decoding.make(Path(root), count, SIDE)
                    points.append({"kind": kind, **decoding.compare(Path(root), arguments.pairs)})
                    print(f"{kind:<8}{json.dumps(points[-1])}", flush=True)
                    write(points)
                    continue
                points.append({"kind": kind, "count": count, **readings(made(Path(root), kind, count), kind)})
            for way, point in list(points[-1].items())[2:]:
                print(
                    f"{kind:<8}{count:>9,}  {way:<9}{point['seconds']:8.2f} s {count / point['seconds']:9,.0f} /s  "
                    f"peak {point['peak_mib']:,} MiB beside {point['data_mib']:,} MiB of examples",
                    flush=True,
                )
            write(points)


if __name__ == "__main__":
    main()

"""ancestral beside diffusers and denoising-diffusion-pytorch, in one run: training, sampling, overhead and memory.

    make bench

One process per competitor answers requests; exactly one works at a time, and ours and a peer take turns, pair by pair.
A line of the table names its ratio: the median over the pairs, with the least and the greatest.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from networks import BATCH
from PIL import Image

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DATA = HERE.parent.parent / "shared" / "data"
PEERS = ("diffusers", "ddpm-pytorch")
STYLES = ("user", "tuned", "compiled")
WANTED = {"user": 3.5, "tuned": 1.75}
"""What ours is to be at least, as a multiple of each peer as a user gets it, and tuned."""


class Worker:
    """A competitor in a process of its own."""

    def __init__(self, python: str, name: str, images: list[Path]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, str(HERE / "worker.py"), name, *map(str, images)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(RESULTS / f"{name}.log").open("w"),
            text=True,
            cwd=HERE,
        )
        self._answer()

    def ask(self, style: str, channels: int, do: str, **options: Any) -> dict[str, Any]:
        """What the competitor answers: the result, how many seconds it took, and by how much the peak of memory grew.

        Raises:
            RuntimeError: with the competitor's own error.
        """
        assert self.process.stdin
        request = {"style": style, "channels": channels, "do": do, **options}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise RuntimeError(f"{self.name}, {style}: {answer['error']}")
        return answer

    def result(self, style: str, channels: int, do: str, **options: Any) -> Any:
        """What it returned."""
        return self.ask(style, channels, do, **options)["result"]

    def seconds(self, style: str, channels: int, do: str, **options: Any) -> float:
        """How long it took, in seconds."""
        return float(self.ask(style, channels, do, **options)["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has ended: see {RESULTS / f'{self.name}.log'}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def working(pythons: dict[str, str], images: list[Path]) -> Iterator[dict[str, Worker]]:
    """Every competitor, started; ended at the end."""
    workers = {name: Worker(python, name, images) for name, python in pythons.items()}
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()


def images_of(channels: int) -> Path:
    """uint8 images of 32x32 as an array on the disk: CIFAR-10 where it is, else smooth noise."""
    RESULTS.mkdir(exist_ok=True)
    path, archive = RESULTS / f"images-{channels}.npy", DATA / "cifar10.zip"
    if path.exists():
        return path
    if archive.exists():
        with zipfile.ZipFile(archive) as files:
            names = [name for name in files.namelist() if name.endswith((".jpg", ".jpeg", ".png"))][:4096]
            mode = "RGB" if channels == 3 else "L"
            pictures = [np.asarray(Image.open(BytesIO(files.read(name))).convert(mode)) for name in names]
        x = np.stack(pictures).reshape(len(pictures), 32, 32, channels).transpose(0, 3, 1, 2)
    else:
        coarse = np.random.default_rng(0).integers(0, 256, (4096, channels, 8, 8), dtype=np.uint8)
        x = coarse.repeat(4, 2).repeat(4, 3)
    np.save(path, np.ascontiguousarray(x))
    return path


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    """Median, least and greatest."""
    return {
        "median": round(statistics.median(values), digits),
        "least": round(min(values), digits),
        "greatest": round(max(values), digits),
    }


def pairs(ours: Worker, peer: Worker, style: str, channels: int, do: str, n: int, **options: Any) -> dict[str, Any]:
    """n alternating pairs of ours and a peer: seconds of each, and the ratio pair by pair.

    Ours is always as a user gets it: torch.compile makes it slower (docs/results/blocks.md).
    """
    mine, theirs = [], []
    for _ in range(n):
        mine.append(ours.seconds("user", channels, do, **options))
        theirs.append(peer.seconds(style, channels, do, **options))
    ratios = [other / own for own, other in zip(mine, theirs, strict=True)]
    return {"ours_seconds": spread(mine, 4), "peer_seconds": spread(theirs, 4), "ratio": spread(ratios), "pairs": n}


def compare(
    workers: dict[str, Worker], channels: int, styles: list[str], n: int, steps: int, evaluations: int
) -> Iterator[dict[str, Any]]:
    """Lines of the table for images of so many channels."""
    ours = workers["ours"]
    for name in PEERS:
        for style in styles:
            peer = workers[name]
            began = time.perf_counter()
            try:
                for worker, kind in ((ours, "user"), (peer, style)):
                    worker.ask(kind, channels, "train", steps=2)  # warms up, and compiles
                    worker.ask(kind, channels, "sample", evaluations=2)
                compiled = time.perf_counter() - began
                for do, options in (("train", {"steps": steps}), ("sample", {"evaluations": evaluations})):
                    line = pairs(ours, peer, style, channels, do, n, **options)
                    yield {
                        "line": f"{do} {channels}x32x32: ours / {name}, {style}",
                        "channels": channels,
                        "peer": name,
                        "style": style,
                        "do": do,
                        "wanted": WANTED.get(style),
                        "ours_images_per_second": round(
                            BATCH * options.get("steps", 1) / line["ours_seconds"]["median"], 1
                        ),
                        "warm_up_seconds": round(compiled, 1),
                        **line,
                    }
            except RuntimeError as error:
                yield {"line": f"{channels}x32x32: ours / {name}, {style}", "error": str(error)}


def alone(ours: Worker, channels: int, rounds: int) -> dict[str, Any]:
    """What is ours alone: utilisation against the ceiling of this moment, share of a step outside, overheads."""
    size = ours.result("user", channels, "size")
    before = ours.result("user", channels, "ceiling", dtype="bfloat16", rounds=rounds)
    trained = [ours.seconds("user", channels, "train", steps=4) / 4 for _ in range(rounds)]
    after = ours.result("user", channels, "ceiling", dtype="bfloat16", rounds=rounds)
    ceiling = max(before["gflops"], after["gflops"])
    rates = [3 * size["flops"] * BATCH / seconds / 1e9 for seconds in trained]
    return {
        "channels": channels,
        "ours": size,
        "images_per_second": spread([BATCH / seconds for seconds in trained], 1),
        "gflop_per_second": spread(rates, 1),
        "ceiling_gflop_per_second": round(ceiling, 1),
        "ceiling_shape": before["shape"],
        "utilisation": spread([rate / ceiling for rate in rates]),
        "outside_network": spread(ours.result("recipe", channels, "outside", rounds=rounds, steps=3), 4),
        "sampler_overhead": spread(ours.result("user", channels, "overhead", rounds=rounds, steps=20), 4),
        "microseconds_a_step": {
            name: spread(values, 1)
            for name, values in ours.result("user", channels, "empty", rounds=rounds, steps=200).items()
        },
    }


def memory(pythons: dict[str, str], images: list[Path], channels: int, styles: list[str]) -> dict[str, float]:
    """MiB that two steps of training add to the peak of a fresh process."""
    found = {}
    for name, python in pythons.items():
        for style in styles if name != "ours" else ["user"]:
            with working({name: python}, images) as workers:
                answer = workers[name].ask(style, channels, "train", steps=2)
                found[f"{name}, {style}"] = round(answer["grown"] / 2**20, 1)
    return found


def main() -> None:
    """Run the benchmark, print its table and write results/latest.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=str(HERE.parent / ".venv-peers" / "bin" / "python"), help="their Python")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="training steps in a turn")
    parser.add_argument("--evaluations", type=int, default=10, help="of the network, for a batch of samples")
    parser.add_argument("--styles", nargs="*", default=list(STYLES), choices=STYLES)
    parser.add_argument("--channels", nargs="*", type=int, default=[1, 3], choices=[1, 3])
    parser.add_argument("--quick", action="store_true", help="one pair of everything but torch.compile: a smoke test")
    options = parser.parse_args()
    if options.quick:
        options.pairs, options.steps, options.evaluations, options.styles = 1, 1, 2, ["user", "tuned"]
    began = time.perf_counter()
    images = [images_of(channels) for channels in options.channels]
    pythons = {"ours": sys.executable, **dict.fromkeys(PEERS, options.peers)}
    report: dict[str, Any] = {
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "threads": 2, "batch": BATCH},
        "alone": [],
        "sizes": {},
        "lines": [],
    }
    plain = [style for style in options.styles if style != "compiled"]
    with working(pythons, images) as workers:
        for channels in options.channels:
            sizes = {name: worker.result("user", channels, "size") for name, worker in workers.items()}
            report["sizes"][f"{channels}x32x32"] = sizes
            for name, size in sizes.items():
                print(
                    f"{name:<14} {channels}x32x32: {size['parameters']:,} parameters, {size['flops'] / 1e9:.3f} GFLOP"
                )
            report["alone"].append(alone(workers["ours"], channels, max(1, options.pairs)))
            print(json.dumps(report["alone"][-1], indent=2))
            for line in compare(workers, channels, options.styles, options.pairs, options.steps, options.evaluations):
                report["lines"].append(line)
                print(said(line), flush=True)
    report["memory_mib"] = {
        f"{channels}x32x32": memory(pythons, images, channels, plain) for channels in options.channels
    }
    print(json.dumps(report["memory_mib"], indent=2))
    report["seconds"] = round(time.perf_counter() - began, 1)
    (RESULTS / "latest.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{RESULTS / 'latest.json'}, {report['seconds'] / 60:.1f} minutes")


def said(line: dict[str, Any]) -> str:
    """A line of the table."""
    if "error" in line:
        return f"{line['line']:<58} {line['error']}"
    ratio, wanted = line["ratio"], line["wanted"]
    verdict = "" if wanted is None else f"   at least {wanted}: {'yes' if ratio['median'] >= wanted else 'NO'}"
    return (
        f"{line['line']:<58} {ratio['median']:6.2f}   ({ratio['least']:.2f} to {ratio['greatest']:.2f}, "
        f"{line['pairs']} pairs){verdict}"
    )


if __name__ == "__main__":
    main()

"""A cache changes how long reading takes, and nothing else; it is whole or not there, and damage is noticed."""

import json
import os
import signal
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from ancestral.data import Data, build, cache, cores, images, load
from ancestral.errors import DataError
from ancestral.training import recipes, resources


@pytest.fixture
def photos(tmp_path) -> Path:
    root = tmp_path / "photos"
    for seed in range(30):
        path = root / "ab"[seed % 2] / f"{seed:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ANCESTRAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Counts the images that are decoded, in this process."""
    monkeypatch.setattr(cores, "usable_cores", lambda: 1)
    counted, decode = [], images.decode

    def counting(*arguments, **options):
        counted.append(1)
        return decode(*arguments, **options)

    monkeypatch.setattr(images, "decode", counting)
    return counted


def same(a: Data, b: Data) -> bool:
    return (a.facts, a.description, a.train_files, a.held_out_files, a.bad) == (
        b.facts,
        b.description,
        b.train_files,
        b.held_out_files,
        b.bad,
    )


def test_without_being_asked_nothing_is_kept(photos, tmp_path, monkeypatch):
    monkeypatch.delenv("ANCESTRAL_CACHE", raising=False)
    before = sorted(tmp_path.rglob("*"))
    load(photos)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("split", [False, True], ids=["by content", "its own"])
def test_the_second_reading_decodes_nothing_and_equals_the_first(photos, kept, decoded, monkeypatch, split):
    if split:
        (photos / "a").rename(photos / "train")
        (photos / "b").rename(photos / "test")
    (photos / ("train" if split else "a") / "bad.png").write_bytes(b"no")
    with monkeypatch.context() as patch:
        patch.delenv("ANCESTRAL_CACHE")
        plain = load(photos)
    first = load(photos)
    decoded.clear()
    second = load(photos)
    assert decoded == []
    assert same(plain, first)
    assert same(first, second)
    assert second.facts.skipped == 1
    with pytest.raises(DataError, match=r"cannot read .*bad\.png"):
        load(photos, on_bad="fail")


@pytest.mark.parametrize("options", [{"size": 8}, {"size": 8, "fit": "pad"}])
def test_another_way_of_reading_is_another_entry(photos, kept, options):
    load(photos)
    assert load(photos, **options).facts.shape == (3, 8, 8)
    assert len(list(kept.iterdir())) == 2


def test_a_changed_file_is_noticed_even_if_its_size_and_time_are_not(photos, kept):
    path = photos / "a" / "00.png"
    Image.new("RGB", (12, 12)).save(path.with_suffix(".bmp"))
    first = load(photos)
    content, stamp = bytearray(path.with_suffix(".bmp").read_bytes()), path.with_suffix(".bmp").stat()
    content[-1] ^= 1
    path.with_suffix(".bmp").write_bytes(content)
    os.utime(path.with_suffix(".bmp"), ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert load(photos).facts.digest != first.facts.digest


@pytest.mark.parametrize("name", ["x.npy", "record.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_entry_is_made_again(photos, kept, decoded, name, damage):
    first = load(photos)
    (path,) = kept.glob(f"*/{name}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content if damage == "flipped" else content[:-7])
    if damage == "gone":
        path.unlink()
    decoded.clear()
    assert same(load(photos), first)
    assert len(decoded) == 30
    decoded.clear()
    assert same(load(photos), first)
    assert decoded == []


def test_an_interrupted_writing_leaves_nothing_and_a_full_disk_is_said(photos, kept, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "fsync", full)
        assert "the cache could not be written (No space left on device)" in load(photos).description
    assert list(kept.iterdir()) == []


def test_reading_in_place_leaves_the_entry_as_it_was(photos, kept):
    first = load(photos)
    again = load(photos)
    again.train.fill_(7)
    assert same(load(photos), first)


def test_too_few_are_refused_as_without_it(tmp_path, kept):
    (tmp_path / "two").mkdir()
    for seed in range(2):
        Image.new("L", (4, 4), seed).save(tmp_path / "two" / f"{seed}.png")
    with pytest.raises(DataError, match="two: holds 2 different examples"):
        load(tmp_path / "two")


def half_done(photos: Path, end: Callable[[], None]) -> None:
    """A reading that is brought to an end after its first dozen images."""

    def interrupt(stage, done, of):
        if stage == "decoding" and done >= 12:
            end()

    load(photos, progress=interrupt)


def ctrl_c() -> None:
    """What SIGINT does, where it is not ignored, as it is in a job that runs in the background."""
    raise KeyboardInterrupt


@pytest.fixture
def often(monkeypatch) -> None:
    """Four images at a time, each made durable as it comes, and progress told each time."""
    monkeypatch.setattr(images, "CHUNK", 4)
    monkeypatch.setattr(images, "PAUSE", 0.0)
    monkeypatch.setattr(build, "EVERY", 0.0)


@pytest.fixture(params=["colour", "grey", "grey and colour", "sizes"])
def various(photos, request) -> Path:
    for path in sorted(photos.rglob("*.png")):
        if request.param == "grey" or (request.param == "grey and colour" and int(path.stem) % 3):
            Image.open(path).convert("L").save(path)
    if request.param == "sizes":
        Image.new("RGB", (20, 30), "red").save(photos / "b" / "29.png")
    (photos / "a" / "04.png").write_bytes(b"no")
    return photos


@pytest.mark.parametrize("cut", ["", "line", "pixels", "more pixels"])
def test_what_was_decoded_before_an_interruption_is_not_decoded_again(various, kept, decoded, often, monkeypatch, cut):
    with monkeypatch.context() as patch:
        patch.delenv("ANCESTRAL_CACHE")
        plain = load(various)
        in_one_go = len(decoded)
    decoded.clear()
    with pytest.raises(KeyboardInterrupt):
        half_done(various, ctrl_c)
    before = len(decoded)
    decoded.clear()
    (lines,), (pixels,) = kept.glob("*.partial/files.jsonl"), kept.glob("*.partial/pixels")
    if cut == "line":
        lines.write_bytes(lines.read_bytes()[:-3])
    elif cut == "pixels":
        pixels.write_bytes(pixels.read_bytes()[:-1])
    elif cut == "more pixels":
        pixels.write_bytes(pixels.read_bytes() + b"half an image")
    again = load(various)
    assert same(again, plain)
    assert same(load(various), plain)
    lost = {"": 0, "line": 1, "pixels": before, "more pixels": 0}[cut]
    assert len(decoded) == in_one_go - before + lost
    assert [path.suffix for path in kept.iterdir()] == [""]


def test_a_process_that_is_killed_leaves_what_it_decoded(photos, kept, decoded, often):
    child = os.fork()
    if child == 0:
        half_done(photos, lambda: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (lines,) = kept.glob("*.partial/files.jsonl")
    there = [json.loads(line) for line in lines.read_bytes().splitlines()]
    assert len(there) == 1 + 12
    load(photos)
    assert len(decoded) == 30 - 12


def test_several_processes_decode_an_entry_once(photos, kept, decoded):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(load, [photos, photos])
    assert same(first, second)
    assert len(decoded) == 30


def test_what_is_decoded_need_not_fit_into_memory(tmp_path, kept, monkeypatch):
    monkeypatch.setattr(cores, "usable_cores", lambda: 1)

    def peak(side: int) -> int:
        root = tmp_path / str(side)
        root.mkdir(exist_ok=True)
        for k in range(24):
            Image.effect_noise((side, side), 50 + k).convert("RGB").save(root / f"{k}.bmp")
            Image.new("RGB", (side, side), (k, 0, 0)).save(root / f"{k}.png")
        tracemalloc.start()
        try:
            load(root)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(8)  # what is imported
    small, large, decoded = peak(16), peak(512), 48 * 3 * 512 * 512
    assert large - small < decoded / 4
    monkeypatch.delenv("ANCESTRAL_CACHE")
    assert peak(512) - small > decoded


def test_an_entry_larger_than_memory_is_mapped_and_written_to_in_memory_alone(tmp_path):
    size = 2 * (psutil.virtual_memory().total + psutil.swap_memory().total)
    path = tmp_path / "x.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (size // 2**20, 2**20)}
        )
        try:
            file.truncate(file.tell() + size // 2**20 * 2**20)
        except OSError:
            pytest.skip("the disk has no files with holes")
    x = cache._mapped(path)
    x[-1, -1] = 7
    assert (x.shape[0], x[-1, -1], cache._mapped(path)[-1, -1]) == (size // 2**20, 7, 0)


def test_mapped_examples_do_not_count_as_memory_that_training_takes(photos, kept, monkeypatch):
    def held() -> int:
        data = load(photos, size=16)
        setup = recipes.choose(data.facts, "images", "tiny")
        return resources.cost(recipes.build(setup, data.facts), setup, data).data_bytes

    assert held() == 0
    monkeypatch.delenv("ANCESTRAL_CACHE")
    assert held() == 30 * 3 * 16 * 16

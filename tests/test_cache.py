"""A cache changes how long reading takes, and nothing else; it is whole or not there, and damage is noticed."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ancestral.data import Data, cache, images, load
from ancestral.errors import DataError


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
    """Counts the images that are decoded."""
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

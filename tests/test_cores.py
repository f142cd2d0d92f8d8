"""Work is divided among processes: the results are those of one, in their order, and no process outlives its use."""

import os
import select
import signal
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from ancestral.data import cores, load
from ancestral.errors import DataError


@pytest.fixture(autouse=True)
def three(monkeypatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 3)


def sets(root):
    """The same images as a folder and as archives."""
    for seed in range(200):
        path = root / "set" / "ab"[seed % 2] / f"{seed:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        for path in (root / "set").rglob("*.png"):
            archive.write(path, path.relative_to(root / "set"))
    return root / "set", root / "set.zip"


def test_results_come_in_order_from_as_many_processes_as_cores():
    results = list(cores.spread(lambda part: (part * part, os.getpid()), range(20)))
    assert [square for square, _ in results] == [k * k for k in range(20)]
    assert len({process for _, process in results} - {os.getpid()}) == 3


def test_arrays_arrive_whole_whether_there_was_room_for_them_or_not():
    """Each has the number of its part in every place; the larger ones exceed what a process may put in memory."""
    sizes = [cores.ROOM // 3 * (1 + k % 7) // 2 for k in range(40)]
    pairs = cores.spread(lambda k: [np.full(sizes[k], value, np.uint8) for value in (k, 200 - k)], range(40))
    for k, pair in enumerate(pairs):
        for array, value in zip(pair, (k, 200 - k), strict=True):
            assert len(array) == sizes[k]
            assert (array == value).all()


def test_images_are_the_same_however_many_cores_read_them(tmp_path, monkeypatch):
    several = [load(source).facts.digest for source in sets(tmp_path)]
    monkeypatch.setattr(cores, "usable_cores", lambda: 1)
    assert several == [load(source).facts.digest for source in sets(tmp_path)]


def test_a_process_that_is_ended_from_outside_is_said_with_the_files_at_which(tmp_path, monkeypatch):
    folder, _ = sets(tmp_path)
    monkeypatch.setattr("ancestral.data.images.decode", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match=r"set: a process that was decoding a/000\.png and those that follow was ended"):
        load(folder)


def ended(pipe: int, seconds: float = 20.0) -> bool:
    """Whether all that could write to this pipe are gone."""
    return bool(select.select([pipe], [], [], seconds)[0]) and os.read(pipe, 1) == b""


def test_processes_end_with_the_one_that_reads_them():
    read, write = os.pipe()
    middle = os.fork()
    if middle == 0:
        results = cores.spread(lambda part: bytes(1000), range(10**6))
        next(results)
        os.write(write, b"!")
        time.sleep(600)
    os.close(write)
    assert os.read(read, 1) == b"!"
    assert not ended(read, 0.2)
    os.kill(middle, signal.SIGKILL)
    os.waitpid(middle, 0)
    assert ended(read)
    os.close(read)


def test_processes_end_when_no_more_is_asked_for():
    read, write = os.pipe()
    results = cores.spread(lambda part: bytes(1000), range(10**6))
    next(results)
    os.close(write)
    assert not ended(read, 0.2)
    results.close()
    assert ended(read)
    os.close(read)

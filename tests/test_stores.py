"""What the extras read: the same numbers, pixels, classes and splits as were written; without them, what to type."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ancestral.data import load
from ancestral.errors import DataError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 6, 5), dtype=np.uint8)
LABELS = np.arange(20) % 3
X = RNG.normal(size=(20, 3))


def rows(*parts: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for part in parts for row in part}


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "module", "line"),
    [
        ("x.h5", "h5py", "pip install 'ancestral[h5py]'"),
        ("x.parquet", "pyarrow", "pip install 'ancestral[pyarrow]'"),
        ("hf:someone/something", "datasets", "pip install 'ancestral[hub]'"),
    ],
)
def test_without_the_extra_one_sentence_says_what_to_type(tmp_path, monkeypatch, name, module, line):
    monkeypatch.setitem(sys.modules, module, None)
    source = name if name.startswith("hf:") else tmp_path / name
    if isinstance(source, Path):
        source.write_bytes(b"PAR1")
    with pytest.raises(DataError) as caught:
        load(source)
    assert str(caught.value).endswith(line)
    assert name in str(caught.value)


class TestHDF5:
    @pytest.fixture
    def h5py(self):
        return pytest.importorskip("h5py")

    def test_images_with_labels(self, tmp_path, h5py):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["images"] = PIXELS
            file["labels"] = [["b", "a", "c"][k] for k in LABELS]
        data = load(tmp_path / "x.h5")
        assert (data.facts.shape, data.facts.levels, data.facts.classes) == ((1, 6, 5), 256, ("a", "b", "c"))
        assert rows(data.train, data.held_out) == rows(torch.from_numpy(PIXELS))

    @pytest.mark.parametrize("form", ["train/x", "x_train"])
    def test_its_own_split(self, tmp_path, h5py, form):
        with h5py.File(tmp_path / "x.hdf5", "w") as file:
            file.create_dataset(form, data=X[:15], chunks=True, compression="gzip")
            file[form.replace("train", "test")] = X[15:]
        data = load(tmp_path / "x.hdf5")
        assert np.array_equal(data.held_out.numpy(), X[15:].astype(np.float32))

    def test_links_to_other_files_are_not_followed(self, tmp_path, h5py):
        with h5py.File(tmp_path / "secret.h5", "w") as file:
            file["x"] = X
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["x"] = h5py.ExternalLink("secret.h5", "x")
            layout = h5py.VirtualLayout(X.shape, X.dtype)
            layout[:] = h5py.VirtualSource(tmp_path / "secret.h5", "x", X.shape)
            file.create_virtual_dataset("data", layout)
            file.create_dataset("images", X.shape, X.dtype, external=[(str(tmp_path / "secret.h5"), 0, X.nbytes)])
        with pytest.raises(DataError, match="holds no array of examples"):
            load(tmp_path / "x.h5")

    def test_a_claim_of_terabytes_is_not_believed(self, tmp_path, h5py):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file.create_dataset("x", (2**40, 4), "f4", chunks=(1024, 4))
        with pytest.raises(DataError, match=r"x\.h5: cannot be read .*at most"):
            load(tmp_path / "x.h5")

    def test_damaged_ones_are_refused(self, tmp_path, h5py):
        with h5py.File(tmp_path / "whole.h5", "w") as file:
            file["x"] = X
        whole = (tmp_path / "whole.h5").read_bytes()
        for k, content in enumerate([b"", b"hello" * 99, whole[:600], whole[: len(whole) // 2]]):
            (tmp_path / f"{k}.h5").write_bytes(content)
            with pytest.raises(DataError, match=rf"{k}\.h5: cannot be read as an array of numbers"):
                load(tmp_path / f"{k}.h5")


class TestRows:
    @pytest.fixture
    def pa(self):
        return pytest.importorskip("pyarrow")

    @pytest.fixture(params=["parquet", "arrow", "feather"])
    def write(self, request, tmp_path, pa):
        from pyarrow import feather, parquet

        def written(table) -> Path:
            path = tmp_path / f"x.{request.param}"
            if request.param == "parquet":
                parquet.write_table(table, path, row_group_size=7)
            elif request.param == "feather":
                feather.write_feather(table, path)
            else:
                with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                    stream.write_table(table, max_chunksize=7)
            return path

        return written

    def test_numbers_are_vectors_and_the_rest_is_said(self, write, pa):
        a = [None, *X[1:, 0]]
        table = pa.table({"a": a, "name": ["x"] * 20, "b": list(range(20, 0, -1)), "label": list(LABELS)})
        data = load(write(table))
        assert data.facts.features == ("a", "b")
        assert data.facts.classes == ("0", "1", "2")
        assert data.facts.n_train + data.facts.n_held_out == 19
        for words in ("left out 1 rows", "without numbers: 'name'", "'label' gives the classes"):
            assert words in data.description
        expected = np.column_stack([X[:, 0], np.arange(20, 0, -1)])[1:].astype(np.float32)
        assert rows(data.train, data.held_out) == rows(torch.from_numpy(expected))

    def test_lists_are_vectors_on_levels(self, write, pa):
        flat = PIXELS.reshape(20, 30)
        table = pa.table({"x": pa.array(list(flat), pa.list_(pa.uint8())), "label": list(LABELS)})
        data = load(write(table))
        assert (data.facts.shape, data.facts.levels) == ((30,), 256)
        label = {row.tobytes(): int(y) for row, y in zip(flat, LABELS, strict=True)}
        assert [label[row.numpy().tobytes()] for row in data.train] == data.train_labels.tolist()

    def test_encoded_images_are_decoded_with_their_labels(self, write, pa):
        images = [{"bytes": png(image), "path": None} for image in PIXELS]
        features = {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}
        table = pa.table({"image": images, "label": LABELS}).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
        data = load(write(table))
        assert data.facts.classes == ("cat", "dog", "eel")
        label = {image.tobytes(): int(y) for image, y in zip(PIXELS, LABELS, strict=True)}
        assert [label[row.numpy().tobytes()] for row in data.train] == data.train_labels.tolist()
        assert load(write(table), size=4).facts.shape == (1, 4, 4)

    def test_a_bad_image_is_skipped_and_counted(self, write, pa):
        table = pa.table({"image": [b"hello", b"", *map(png, PIXELS[2:])]})
        data = load(write(table))
        assert data.facts.skipped == 2
        assert data.facts.n_train + data.facts.n_held_out == 18

    @pytest.mark.parametrize("columns", [{"name": ["a", "b", "c"]}, {"x": [[1.0, 2.0], [3.0], [4.0]]}, {"x": []}])
    def test_what_has_no_meaning_is_refused(self, write, pa, columns):
        with pytest.raises(DataError) as caught:
            load(write(pa.table(columns)))
        assert str(caught.value).isprintable()

    def test_damaged_ones_are_refused(self, write, pa):
        path = write(pa.table({"a": X[:, 0]}))
        whole = path.read_bytes()
        for content in [b"", b"hello" * 99, whole[: len(whole) // 2], whole[:8]]:
            path.write_bytes(content)
            with pytest.raises(DataError, match=r"x\.\w+: cannot be read as rows|holds no rows"):
                load(path)


class TestHuggingFace:
    @pytest.fixture
    def datasets(self):
        return pytest.importorskip("datasets")

    def made(self, datasets, part: slice):
        images = [Image.fromarray(image) for image in PIXELS[part]]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "eel"])}
        )
        return datasets.Dataset.from_dict({"image": images, "label": LABELS[part].tolist()}, features=features)

    def test_a_saved_one_is_read_with_its_split(self, tmp_path, datasets):
        splits = {"train": self.made(datasets, slice(0, 15)), "test": self.made(datasets, slice(15, 20))}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
        data = load(tmp_path / "set")
        assert rows(data.held_out) == rows(torch.from_numpy(PIXELS[15:]))
        assert data.held_out_labels.tolist() == LABELS[15:].tolist()
        assert data.facts.classes == ("cat", "dog", "eel")

    def test_one_without_splits_is_divided_by_content(self, tmp_path, datasets):
        self.made(datasets, slice(0, 20)).save_to_disk(tmp_path / "set")
        assert load(tmp_path / "set").facts.n_train < 20

    def test_by_name_it_says_that_it_downloads(self, datasets, monkeypatch):
        splits = {"train": self.made(datasets, slice(0, 15)), "validation": self.made(datasets, slice(15, 20))}
        monkeypatch.setattr(datasets, "load_dataset", lambda name: splits if name == "someone/pets" else None)
        told = []
        data = load("hf:someone/pets", progress=lambda *call: told.append(call[0]))
        assert told[0] == "downloading hf:someone/pets"
        assert "downloaded as someone/pets" in data.description
        assert (data.facts.name, data.facts.n_train, data.facts.n_held_out) == ("pets", 15, 5)
        with pytest.raises(DataError, match="hf:someone/nothing: cannot be downloaded or read"):
            load("hf:someone/nothing")

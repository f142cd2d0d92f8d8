"""A table in text becomes the vectors that its author meant, whatever wrote it; what is left out is said."""

import codecs
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ancestral.apps.cli import app
from ancestral.data import load, tables
from ancestral.errors import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data" / "tables"
X = np.random.default_rng(0).normal(size=(40, 3)).round(3)


def text(
    x: np.ndarray = X,
    header: str | None = "width,height,mass",
    delimiter: str = ",",
    end: str = "\n",
    decimal: str = ".",
) -> str:
    lines = [delimiter.join(map(repr, map(float, row))).replace(".", decimal) for row in x]
    return end.join([*([header.replace(",", delimiter)] if header else []), *lines, ""])


def everything(path: Path, **options) -> tuple[np.ndarray, np.ndarray | None]:
    """All rows and labels of a table, sorted by the first column."""
    data = load(path, **options)
    x = torch.cat([data.train, data.held_out]).numpy()
    order = np.argsort(x[:, 0], kind="stable")
    if data.train_labels is None:
        return x[order], None
    return x[order], torch.cat([data.train_labels, data.held_out_labels]).numpy()[order]


def by_first(x: np.ndarray) -> np.ndarray:
    return x[np.argsort(x[:, 0], kind="stable")].astype(np.float32)


@pytest.fixture
def table(tmp_path):
    def write(content: str | bytes, name: str = "table.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


FORMS = {
    "comma": text().encode(),
    "no header": text(header=None).encode(),
    "semicolon": text(delimiter=";").encode(),
    "semicolon and decimal comma": text(delimiter=";", decimal=",").encode(),
    "decimal comma without header": text(header=None, delimiter=";", decimal=",").encode(),
    "tab": text(delimiter="\t").encode(),
    "bar": text(delimiter="|").encode(),
    "CRLF": text(end="\r\n").encode(),
    "CR alone": text(end="\r").encode(),
    "blank lines": text(end="\n\n").encode(),
    "no end of line at the end": text().rstrip().encode(),
    "UTF-8 with its mark": codecs.BOM_UTF8 + text().encode(),
    "UTF-16": text().encode("utf-16"),
    "UTF-16 without its mark": text().encode("utf-16-le"),
    "UTF-16, the other order": text().encode("utf-16-be"),
    "latin-1": text(header="Länge,Höhe,Maß").encode("latin-1"),
    "quotes": text(header='"wid""th","heig,ht","ma\nss"').encode(),
    "blanks after the delimiter": text(delimiter=", ").encode(),
    "what numpy.savetxt writes": ("# width,height,mass\n" + text(header=None)).encode(),
    "numbered columns": text(header="0,1,2").encode(),
    "quoted numbers": "\n".join(["a,b,c", *(",".join(f'"{v}"' for v in row) for row in X)]).encode(),
    "an index without a name": "\n".join([",a,b,c", *(f"{k},{a},{b},{c}" for k, (a, b, c) in enumerate(X))]).encode(),
    "a first row of missing values": "\n".join(["a,b,c", "NA,,nan", *(",".join(map(str, r)) for r in X)]).encode(),
}


class TestForms:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
    def test_the_numbers_are_those_that_were_written(self, table, form, packed):
        content = gzip.compress(FORMS[form]) if packed else FORMS[form]
        assert np.array_equal(everything(table(content, "table.csv.gz" if packed else "table.csv"))[0], by_first(X))

    @pytest.mark.parametrize("form", ["comma", "semicolon", "UTF-16", "what numpy.savetxt writes"])
    def test_rows_are_vectors_of_real_values_with_names(self, table, form):
        facts = load(table(FORMS[form])).facts
        assert (facts.shape, facts.levels, facts.unit) == ((3,), None, "nats")
        names = ("1", "2", "3") if form.startswith("what") else ("width", "height", "mass")
        assert facts.features == names

    def test_a_column_alone_needs_no_delimiter(self, table):
        assert np.array_equal(everything(table(text(X[:, :1], header="mass")))[0], by_first(X[:, :1]))

    def test_a_semicolon_in_a_text_is_not_the_delimiter(self, table):
        lines = ["note,a,b", *(f'"x; y",{a},{b}' for a, b, _ in X)]
        assert np.array_equal(everything(table("\n".join(lines)))[0], by_first(X[:, :2]))

    def test_text_that_stops_being_utf_8_late_is_read_as_latin_1_and_said(self, table):
        lines = ["name,a,b", *(f"{'é' if k > 30_000 else 'e'},{k}.5,{k % 7}" for k in range(40_000))]
        data = load(table("\n".join(lines).encode("latin-1")))
        assert data.facts.n_train + data.facts.n_held_out == 40_000
        assert "read as latin-1" in data.description


class TestWhatIsLeftOut:
    def test_columns_without_numbers_are_named(self, table):
        lines = ["name,a,colour,b", *(f"n{k},{a},red,{b}" for k, (a, b, _) in enumerate(X))]
        path = table("\n".join(lines))
        assert np.array_equal(everything(path)[0], by_first(X[:, :2]))
        assert "left out columns without numbers: 'name', 'colour'" in load(path).description

    def test_one_word_late_in_a_column_makes_it_one_without_numbers(self, table):
        lines = ["a,b", *(f"{k}.5,{'oops' if k == 15_000 else k}" for k in range(20_000))]
        data = load(table("\n".join(lines)))
        assert data.facts.features == ("a",)

    @pytest.mark.parametrize("missing", ["", "NA", "NaN", "null", "None", "?", "-", " n/a ", "inf", "1e300"])
    def test_rows_with_missing_or_infinite_values_are_left_out_and_counted(self, table, missing):
        lines = text().splitlines()
        lines[4] = f"{missing},1.0,2.0"
        lines[9] = f"1.0,2.0,{missing}"
        data = load(table("\n".join(lines)))
        assert data.facts.n_train + data.facts.n_held_out == 38
        assert "left out 2 rows with missing or infinite values" in data.description
        others = [list(map(float, line.split(","))) for k, line in enumerate(lines[1:], 1) if k not in (4, 9)]
        kept = torch.cat([data.train, data.held_out]).tolist()
        assert sorted(kept) == sorted(torch.tensor(others).tolist())

    def test_rows_of_another_length_are_skipped_counted_and_named_by_line(self, table):
        lines = text().splitlines()
        lines.insert(4, "1.0,2.0")
        lines.insert(9, "1.0,2.0,3.0,4.0")
        path = table("\n".join(lines))
        data = load(path)
        assert np.array_equal(everything(path)[0], by_first(X))
        assert data.facts.skipped == 2
        assert "line 5: 2 fields where others have 3; line 10: 4 fields where others have 3" in data.description
        with pytest.raises(DataError, match=r"table\.csv: line 5: 2 fields where others have 3: repair or remove it"):
            load(path, on_bad="fail")

    @pytest.mark.parametrize(("name", "start"), [("id", 0), ("id", 1), ("Unnamed: 0", 0), ("index", 7)])
    def test_a_column_that_counts_the_rows_is_no_feature(self, table, name, start):
        lines = [f"{name},a,b", *(f"{k + start},{a},{b}" for k, (a, b, _) in enumerate(X))]
        data = load(table("\n".join(lines)))
        assert data.facts.features == ("a", "b")
        assert f"left out column '{name}', which counts the rows" in data.description


class TestClasses:
    @pytest.mark.parametrize("name", ["label", "Class", "target"])
    @pytest.mark.parametrize("words", [("cat", "dog", "eel"), ("0", "1", "2")])
    def test_a_column_of_that_name_gives_them_and_it_is_said(self, table, name, words):
        lines = [f"a,{name},b", *(f"{a},{words[k % 3]},{b}" for k, (a, b, _) in enumerate(X))]
        data = load(table("\n".join(lines)))
        assert data.facts.classes == words
        assert data.facts.features == ("a", "b")
        assert f"column '{name}' gives the classes" in data.description
        _, labels = everything(table("\n".join(lines)))
        assert labels.tolist() == (np.argsort(X[:, 0], kind="stable") % 3).tolist()

    @pytest.mark.parametrize("values", [X[:, 2], np.arange(40)])
    def test_many_values_or_fractions_are_a_feature_like_others(self, table, values):
        lines = ["a,target", *(f"{a},{v}" for a, v in zip(X[:, 0], values, strict=True))]
        data = load(table("\n".join(lines)))
        assert data.facts.classes is None
        assert data.facts.features == ("a", "target")

    def test_a_row_without_its_label_is_left_out(self, table):
        lines = ["a,label", *(f"{a},{'' if k == 5 else 'xy'[k % 2]}" for k, a in enumerate(X[:, 0]))]
        data = load(table("\n".join(lines)))
        assert data.facts.classes == ("x", "y")
        assert data.facts.n_train + data.facts.n_held_out == 39


class TestRefusals:
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "holds no rows"),
            (b"a,b,c\n", "holds no rows"),
            (b"a,b\nx,y\nz,w\n", "holds no column of numbers: 'a' holds 'x'"),
            (b"a,b\n1,\n2,\n,3\n,4\n", "no row has a number in every column"),
            (b"a,b\n1,2\n3,\0\n", "line 3 holds a NUL, as no text does"),
            (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "holds a NUL"),
            (b'a,b\n1,"2\n3,4\n5,6\n', "cannot be read as a table"),
            (b'a,b\n1,"2"x\n3,4\n5,6\n', "line 2: "),
            (b"a,b\n1,2\n3,4\n", "at least 3 are needed"),
            (b"a,b\n1,2\n" * 50, "1 different examples"),
        ],
    )
    @pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
    def test_are_one_sentence_that_names_the_file(self, table, content, words, packed):
        name = "table.csv.gz" if packed else "table.csv"
        with pytest.raises(DataError) as caught:
            load(table(gzip.compress(content) if packed else content, name))
        assert str(caught.value).isprintable()
        assert name in str(caught.value)
        if words != "1 different examples":
            assert words in str(caught.value)

    def test_a_line_without_end_is_refused(self, table, monkeypatch):
        monkeypatch.setattr(tables, "MAX_LINE", 1000)
        with pytest.raises(DataError, match="line 2 has 1,000 characters or more"):
            load(table("a\n" + "1" * 5000))

    def test_gzip_that_unpacks_beyond_measure_is_refused(self, table, monkeypatch):
        monkeypatch.setattr(tables, "MODEST", 10_000)
        packed = gzip.compress(b"a,b\n" + b"1,2\n" * 100_000)
        with pytest.raises(DataError, match="unpacks to more than"):
            load(table(packed, "table.csv.gz"))

    def test_cut_gzip_is_refused(self, table):
        with pytest.raises(DataError, match=r"table\.csv\.gz: cannot be read as a table"):
            load(table(gzip.compress(text().encode())[:-20], "table.csv.gz"))


class TestDiamonds:
    @pytest.fixture(autouse=True)
    def there(self):
        if not SHARED.is_dir():
            pytest.skip("no tables in ../shared/data/tables")

    def test_are_53940_rows_of_seven_columns(self):
        data = load(SHARED / "diamonds.csv")
        assert data.facts.n_train + data.facts.n_held_out == 53_940
        assert data.facts.features == ("carat", "depth", "table", "price", "x", "y", "z")
        assert "left out columns without numbers: 'cut', 'color', 'clarity'" in data.description

    def test_penguins_lose_the_two_that_were_not_measured(self):
        data = load(SHARED / "penguins.csv")
        assert data.facts.n_train + data.facts.n_held_out == 342
        assert "left out 2 rows" in data.description


def test_a_table_is_trained_on_sampled_and_measured(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = table(text(np.random.default_rng(1).normal(size=(300, 3)) * [1, 10, 100] + [0, 5, 1000]))
    run = tmp_path / "run"
    options = ["--steps", "3", "--set", "training.batch=32", "--set", "mlp.width=32", "--to", str(run), "--json"]
    trained = CliRunner().invoke(app, ["train", str(path), *options])
    assert trained.exit_code == 0, trained.output
    drawn = CliRunner().invoke(app, ["sample", str(run), "-n", "8", "--steps", "4", "--json"])
    assert drawn.exit_code == 0, drawn.output
    samples = np.load(json.loads(drawn.stdout)["artifacts"]["npy"])
    assert samples.shape == (8, 3)
    measured = CliRunner().invoke(app, ["evaluate", str(run), "--n", "8", "--json"])
    assert measured.exit_code == 0, measured.output
    assert json.loads(measured.stdout)["unit"] == "nats"

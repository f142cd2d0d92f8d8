"""Comparing families: intervals over seeds that hold what they say, who differs from whom, and the report."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from ancestral.apps import comparing
from ancestral.apps.cli import app
from ancestral.apps.output import number
from ancestral.data import load
from ancestral.measure import compare
from ancestral.measure.compare import Contest, Entrant, difference, exponential, logarithm, over_seeds, rows
from ancestral.measure.measured import Measured
from ancestral.measure.metrics import coverage
from ancestral.measure.metrics.intervals import around, of_share, student
from ancestral.measure.record import Interval
from ancestral.rng import stream

DOCS = Path(__file__).parent.parent / "docs"
REPEATS = 2000
SLACK = 3 * (0.95 * 0.05 / REPEATS) ** 0.5
"""Three standard deviations of the share of so many intervals of 95% that hold the truth."""


def families(seeds: int, deviation: float, stderr: float, rng) -> tuple[list[Interval], list[Interval]]:
    """Two families of one mean, 0: seeds of a deviation between them, and an error that all measurements share."""
    shared = rng.normal(0, stderr)
    return tuple([around(float(shared + each), stderr) for each in rng.normal(0, deviation, seeds)] for _ in range(2))


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("deviation", [0.1, 1.0])
def test_an_interval_over_seeds_holds_the_mean_of_other_seeds_and_examples(seeds, deviation):
    """At least as often as it says: deviations between seeds and the error of the examples are both in it."""
    rng = stream(seeds)
    held = [over_seeds(families(seeds, deviation, 0.5, rng)[0]) for _ in range(REPEATS)]
    assert sum(one.low <= 0 <= one.high for one in held) / REPEATS > 0.95 - SLACK


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("p", [0.5, 0.97])
def test_an_interval_of_a_share_over_seeds_holds_it_and_lies_between_0_and_1(seeds, p):
    """Of seeds that differ as a beta law does, each counted on 150 trials, some of them with all hits."""
    rng = stream(seeds)
    held = []
    for _ in range(REPEATS):
        hits = rng.binomial(150, rng.beta(100 * p, 100 * (1 - p), seeds))
        found = over_seeds([of_share(each / 150, 0.0, student(math.inf) ** 2 / 150) for each in hits], share=True)
        assert 0 <= found.low <= found.value <= found.high <= 1
        held.append(found.low <= p <= found.high)
    assert np.mean(held) > 0.95 - SLACK


@pytest.mark.parametrize("seeds", [2, 5])
def test_the_balance_of_classes_of_equal_laws_holds_zero_over_seeds_too(seeds):
    """It is above 0 by chance for every seed, and so is its mean."""
    rng, held = stream(seeds), []
    for _ in range(REPEATS // 20):
        real, *drawn = (torch.from_numpy(rng.integers(10, size=160)) for _ in range(1 + seeds))
        each = [coverage.class_balance(labels, real, classes=10, rng=rng) for labels in drawn]
        held.append(over_seeds(each, share=True).low == 0)
    assert np.mean(held) > 0.9


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_an_interval_of_what_differs_by_factors_holds_its_geometric_mean_and_is_positive(seeds):
    """Of seeds that differ by a factor of three in either direction."""
    rng, held = stream(seeds), []
    for _ in range(REPEATS):
        found = exponential(over_seeds([logarithm(around(math.exp(each), 0.1)) for each in rng.normal(5, 1.1, seeds)]))
        assert 0 < found.low < found.value < found.high
        held.append(found.low <= math.exp(5) <= found.high)
    assert abs(np.mean(held) - 0.95) < SLACK


def test_a_share_that_all_seeds_reach_whole_is_told_with_the_width_of_one():
    """What seeds do not differ in, the examples still bound."""
    one = of_share(1.0, 0.0, 0.025)
    found = over_seeds([one, one, one], share=True)
    assert (found.low, found.high) == pytest.approx((one.low, one.high), rel=1e-9)


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_difference_is_found_where_there_is_none_one_time_in_twenty(seeds):
    """The error that all measurements share goes out of a difference."""
    rng = stream(seeds)
    held = [difference(*families(seeds, 1.0, 5.0, rng)) for _ in range(REPEATS)]
    assert abs(sum(one.low <= 0 <= one.high for one in held) / REPEATS - 0.95) < SLACK + 0.01  # Welch's own error


def entrant(family: str, seed: int, energy: float, rate: float = 10.0, failed: str | None = None) -> Entrant:
    numbers = {} if failed else {"energy": around(energy, 0.01), "rate": around(rate, 0.1)}
    return Entrant(family=family, seed=seed, run=f"{family}-{seed}", failed=failed, numbers=numbers, best=numbers)


def test_who_is_best_who_is_worse_and_who_cannot_be_told():
    runs = [entrant("vae", seed, 0.50 + 0.01 * seed) for seed in range(3)]
    runs += [entrant("flow", seed, 0.48 + 0.02 * seed) for seed in range(3)]
    runs += [entrant("gan", seed, 0.90 + 0.01 * seed, rate=99.0) for seed in range(2)]
    runs += [entrant("gan", 2, 0.0, failed="training has collapsed")]
    vae, flow, gan = rows(runs)
    words = {row.family: row.verdicts["energy"].word for row in (vae, flow, gan)}
    assert words == {"vae": "no difference", "flow": "best", "gan": "worse"}
    assert gan.verdicts["rate"].word == "best"  # more of it is better
    assert vae.verdicts["rate"].word == "worse"
    assert vae.verdicts["rate"].difference.value == pytest.approx(10 / 99)  # of rates, how many times
    assert (gan.runs, gan.failed, vae.failed) == (3, 1, 0)


@pytest.mark.parametrize("seeds", [3, 5])
def test_of_four_families_that_are_alike_one_is_rarely_called_worse(seeds):
    """Though the best is picked from them: less than 8% of 500 comparisons."""
    rng, worse = stream(seeds), 0
    for _ in range(500):
        values = rng.normal(0.5, 0.1, (4, seeds))
        found = rows([entrant(f"{k}", seed, values[k, seed]) for k in range(4) for seed in range(seeds)])
        worse += any(row.verdicts["energy"].word == "worse" for row in found)
    assert worse / 500 < 0.08


def test_a_number_that_not_all_runs_have_is_told_of_none():
    """As the likelihood of the best checkpoint, where one of two runs kept only some."""
    whole, other = (entrant("vae", seed, 0.5) for seed in range(2))
    (row,) = rows([whole.model_copy(update={"best": whole.best | {"likelihood": around(1.0, 0.1)}}), other])
    assert set(row.best) == {"energy", "rate"}


def test_families_that_do_not_differ_between_seeds_differ_by_no_more_than_their_errors():
    one, other = [around(1.0, 0.1)] * 2, [around(0.99, 0.1)] * 2
    assert difference(one, other).low < 0 < difference(one, other).high


def test_the_likelihood_of_the_best_checkpoint_is_not_flattered_by_the_choice():
    """Of checkpoints that are all alike the one that looks best is no better, whatever the noise of the examples."""
    found, flattered, facts, zeros = [], [], load("two-moons").facts, torch.zeros(40)
    for seed in range(200):
        loss = torch.from_numpy(1 + stream(seed).standard_normal((20, 40)))
        measured = [Measured(facts, "exact", nats[:, None], torch.arange(40), zeros, zeros, None, 0.0) for nats in loss]
        found.append(compare.of_best(list(loss[:, : compare.CHOOSING]), measured.__getitem__, measured[-1]))
        flattered.append(float(loss.mean(1).min()))
    values = np.array([one.value for one in found])
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - 1) < 4 * error
    assert np.mean(flattered) < 1 - 20 * error
    assert values.std() == pytest.approx(np.mean([one.stderr for one in found]), rel=0.15)


class Page(HTMLParser):
    """What a page asks for, what it shows, and whether its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.without_words, self.headings, self.ids, self.links, self.open = [], 0, [], [], [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.asked += [found[key] for key in ("src", "srcset", "data", "action") if key in found]
        self.asked += [found["href"]] if tag == "link" else []
        self.without_words += tag == "img" and not found.get("alt")
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        if tag not in {"meta", "link", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in {"h1", "h2"}:
            self.headings.append(data)


def compared(where: Path, *more: str) -> dict:
    arguments = ["compare", "ring-8", "--families", "vae,gan", "--seeds", "2", "--minutes", "0.02", "-n", "200"]
    result = CliRunner().invoke(app, [*arguments, "--to", str(where), "--json", *more])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def contest(tmp_path_factory) -> tuple[Path, dict]:
    where = tmp_path_factory.mktemp("compared") / "ring"
    return where, compared(where)


def test_a_comparison_trains_every_family_from_every_seed_and_is_one_object(contest):
    where, record = contest
    schema = json.loads((DOCS / "comparison.schema.json").read_text())
    Draft202012Validator(schema).validate(record)
    assert json.loads((where / "compare.json").read_text()) == record
    assert {row["family"]: row["runs"] for row in record["rows"]} == {"vae": 2, "gan": 2}
    vae, gan = record["rows"]
    assert "likelihood" in vae["numbers"]
    assert "likelihood" not in gan["numbers"]
    assert record["held_out"]["energy"]["low"] <= 0 <= record["held_out"]["energy"]["high"]
    assert record["training"]["ratio"]["value"] == 0


def test_a_comparison_that_is_there_is_read_again_and_trains_nothing(contest):
    where, record = contest
    final = where / "runs" / "vae-0" / "final" / "weights.safetensors"
    before = final.stat().st_mtime_ns
    again = compared(where)
    assert final.stat().st_mtime_ns == before
    assert again["rows"] == record["rows"]


def test_the_report_needs_nothing_else_and_can_be_read_without_pictures(contest):
    where, record = contest
    page = Page()
    page.feed((where / "report.html").read_text())
    assert page.open == []
    assert all(each.startswith("data:") for each in page.asked)
    assert page.without_words == 0
    assert len(set(page.ids)) == len(page.ids)
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    for heading in ("At a glance", "Samples", "Likelihood", "Memorisation", "Stability over seeds", "Cost"):
        assert heading in page.headings
    text = (where / "report.html").read_text()
    assert "<script" not in text
    for row in record["rows"]:
        shown = number(Interval.model_validate(row["numbers"]["energy"])).split(" ")[0]
        assert shown in text


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no browser is installed")

LOOK = """<pre id="seen"></pre><script>
const box = (each) => each.getBoundingClientRect();
const shown = (each) => each.checkVisibility({visibilityProperty: true, opacityProperty: true}) && box(each).height > 0;
addEventListener("load", () => { document.getElementById("seen").textContent = JSON.stringify({
  sections: [...document.querySelectorAll("section")].filter((each) => shown(each) && box(each).height > 60)
    .map((each) => each.querySelector("h2")).filter(shown).map((each) => each.textContent),
  drawn: [...document.images].map((each) => each.naturalWidth > 0 && shown(each)),
  wider: document.documentElement.scrollWidth - innerWidth}); });
</script>"""
"""What a browser has laid out, told by a script that is put at the end of a copy of the page."""


def opened(page: str, folder: Path, width: int) -> tuple[dict, list[str], list[str]]:
    """A page in a browser: what is seen of it, what the console says, and what it asks for from elsewhere."""
    (folder / "page.html").write_text(page.replace("</body>", f"{LOOK}</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=5000"]
    command += ["--proxy-server=127.0.0.1:9", "--proxy-bypass-list=<-loopback>"]  # where nothing answers
    command += ["--enable-logging=stderr", f"--log-net-log={folder / 'net.json'}", "--dump-dom"]
    done = subprocess.run([*command, (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=240)
    seen = json.loads(done.stdout.split('<pre id="seen">')[1].split("</pre>")[0])
    started = [each.get("params", {}) for each in json.loads((folder / "net.json").read_text())["events"]]
    own = "not an origin"  # of what the browser itself asks for
    asked = [each["url"] for each in started if each.get("initiator", own) != own]
    return seen, [line for line in done.stderr.splitlines() if "CONSOLE" in line], asked


@in_a_browser
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_every_section_of_the_report_without_an_error_or_a_request(contest, tmp_path, width):
    """On a screen and in a narrow window."""
    page = (contest[0] / "report.html").read_text()
    seen, console, asked = opened(page, tmp_path, width)
    parsed = Page()
    parsed.feed(page)
    assert seen["sections"] == parsed.headings[1:]
    assert len(seen["sections"]) >= 9
    assert len(seen["drawn"]) == page.count("<img")
    assert all(seen["drawn"])
    assert seen["wider"] <= 0
    assert console == []
    assert asked == []


@in_a_browser
def test_what_is_hidden_or_asks_for_something_would_be_seen_in_a_browser(tmp_path):
    """So that the test above can fail."""
    seen, console, asked = opened(
        "<html><body><section><h2>Here</h2><p style='height: 90px'></p></section>"
        "<section style='display: none'><h2>Hidden</h2></section><img src='http://example.invalid/x.png'>"
        "<p style='width: 3000px'>wide</p><script>console.error('wrong')</script></body></html>",
        tmp_path,
        500,
    )
    assert seen["sections"] == ["Here"]
    assert seen["drawn"] == [False]
    assert seen["wider"] > 0
    assert any("wrong" in line for line in console)
    assert asked == ["http://example.invalid/x.png"]


def test_other_runs_are_compared_in_another_directory_and_the_same_in_the_same(contest):
    def where(*names: str) -> Path:
        runs = [str(contest[0] / "runs" / name) for name in names]
        return comparing.plan(
            runs, families=[], minutes=1, seeds=1, n=200, features=None, to=None, argv=["ancestral"]
        ).where

    assert where("vae-0", "gan-0") == where("gan-0", "vae-0")
    assert len({where("vae-0", "gan-0"), where("vae-0", "vae-1"), Path("runs/ring-8-compared")}) == 3


def test_finished_runs_are_compared_as_they_are(contest, tmp_path):
    where, record = contest
    runs = [str(where / "runs" / name) for name in ("vae-0", "gan-0")]
    result = CliRunner().invoke(app, ["compare", *runs, "-n", "200", "--to", str(tmp_path / "two"), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["minutes"] is None
    first = next(each for each in record["entrants"] if each["run"] == runs[0])
    assert found["entrants"][0]["numbers"]["energy"] == first["numbers"]["energy"]


KEEP = ("--set", "training.keep=5")
"""What does not enter the weights."""


def trained(to: Path, *more: str) -> str:
    arguments = ["train", "ring-8", "--family", "vae", "--steps", "20", "--to", str(to), *more]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return str(to)


def test_runs_with_the_same_settings_are_seeds_of_one_row_and_others_are_not_mixed_with_them(tmp_path):
    """Runs of one name in two places, of which one has other settings and one another seed."""
    first, second = trained(tmp_path / "a" / "run"), trained(tmp_path / "b" / "run", "--seed", "1", *KEEP)
    wide = trained(tmp_path / "c" / "run", "--set", "vae.width=32")
    arguments = ["compare", first, second, wide, "-n", "120", "--to", str(tmp_path / "x"), "--json"]
    found = [json.loads(CliRunner().invoke(app, arguments).stdout) for _ in range(2)]
    assert found[0]["rows"] == found[1]["rows"]
    assert [(row["family"], row["runs"]) for row in found[0]["rows"]] == [("a/run", 2), ("c/run", 1)]
    of_wide = next(each for each in found[0]["entrants"] if each["run"] == wide)
    assert of_wide["parameters"] < found[0]["entrants"][0]["parameters"]
    assert "c/run" in (tmp_path / "x" / "report.html").read_text()
    both = json.loads(CliRunner().invoke(app, [*arguments[:3], *arguments[4:]]).stdout)
    assert [(row["family"], row["runs"]) for row in both["rows"]] == [("vae", 2)]
    assert both["entrants"][0]["numbers"] == found[0]["entrants"][0]["numbers"]  # read again, under another name


@pytest.mark.parametrize(
    ("record", "words"),
    [('{"status": "training", "seed": 0}', "is not finished (training)"), ('{"status": "fini', "cannot be read")],
)
def test_a_run_that_is_not_finished_or_whose_record_is_damaged_is_named(contest, tmp_path, record, words):
    where, _ = contest
    shutil.copytree(where / "runs" / "gan-0", tmp_path / "gan-0")
    (tmp_path / "gan-0" / "run.json").write_text(record)
    arguments = ["compare", str(where / "runs" / "vae-0"), str(tmp_path / "gan-0"), "--to", str(tmp_path / "x")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert str(tmp_path / "gan-0") in result.stderr
    assert not (tmp_path / "x").exists()


def test_runs_that_were_trained_on_what_the_data_was_before_are_refused(tmp_path):
    table, where = tmp_path / "t.csv", tmp_path / "x"
    rows = [f"{a:.4f},{b:.4f}" for a, b in stream(0).standard_normal((3000, 2))]
    arguments = ["compare", str(table), "--families", "vae", "--seeds", "1", "--minutes", "0.01", "-n", "120"]
    arguments += ["--to", str(where)]
    for n, code in ((2500, 0), (3000, 2)):
        table.write_text("\n".join(["a,b", *rows[:n]]) + "\n")
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == code, result.output
    assert "was trained on other data" in result.stderr


def test_copies_are_asked_of_the_data_that_was_learnt_from_and_of_no_other(contest):
    run = str(contest[0] / "runs" / "vae-0")
    own, other = (
        json.loads(CliRunner().invoke(app, ["evaluate", run, "--samples", "120", "--json", *more]).stdout)["samples"]
        for more in ([], ["--data", "grid-25"])
    )
    asked = {"duplicates", "ratio", "authentic", "data-copying"}
    assert set(own["model"]) - set(other["model"]) == asked
    assert set(other["held_out"]) == set(other["training"]) == set(other["model"])


def test_a_run_that_collapsed_is_counted_and_what_is_wrong_with_the_input_is_said(tmp_path, monkeypatch):
    def ends(code: int | str):
        def started(planned, run, family, seed):
            say = f"import os, sys; print('ancestral: seed {seed} came to nothing', file=sys.stderr); sys.exit({code})"
            path = run.with_name(f"{run.name}.log")
            with path.open("a") as log:
                before = log.tell()
                return comparing.Working(subprocess.Popen([sys.executable, "-c", say], stderr=log), path, before)

        return started

    arguments = ["compare", "ring-8", "--families", "gan", "--seeds", "2", "--to", str(tmp_path / "x"), "--json"]
    monkeypatch.setattr(comparing, "_started", ends(2))
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "seed 0 came to nothing" in refused.stderr
    monkeypatch.setattr(comparing, "_started", ends(1))
    assert CliRunner().invoke(app, arguments).exit_code == 1  # what is wrong with the program is no failure of a family
    monkeypatch.setattr(comparing, "_started", ends("-9 if os.kill(os.getpid(), 9) else 0"))
    killed = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert {each["failed"] for each in killed["entrants"]} == {"killed by signal 9, perhaps for want of memory"}
    monkeypatch.setattr(comparing, "_started", ends(5))
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    (row,) = json.loads(found.stdout)["rows"]
    assert (row["runs"], row["failed"], row["numbers"]) == (2, 2, {})
    assert "seed 1 came to nothing" in (tmp_path / "x" / "report.html").read_text()


def test_a_comparison_that_is_stopped_leaves_nothing_running_and_goes_on(tmp_path):
    where = tmp_path / "x"
    command = [sys.executable, "-m", "ancestral", "compare", "ring-8", "--families", "vae", "--seeds", "1"]
    command += ["--minutes", "0.2", "-n", "200", "--to", str(where), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run = where / "runs" / "vae-0" / "run.json"
    while not (run.is_file() and json.loads(run.read_text())["status"] == "training"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 3
    assert json.loads(run.read_text())["status"] == "stopped"
    again = CliRunner().invoke(app, command[3:])
    assert again.exit_code == 0, again.output
    assert json.loads(run.read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ring-8", "--families", "vae,gann"], "did you mean 'gan'"),
        (["ring-8", "grid-25"], "no runs: ring-8, grid-25"),
        (["nowhere-8"], "no file or folder"),
        (["digits", "-n", "200", "--features", "pixel"], "did you mean 'pixels'"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(arguments, words, tmp_path):
    result = CliRunner().invoke(app, ["compare", *arguments, "--to", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "x").exists()


def test_a_number_is_told_in_as_many_digits_as_its_interval_bears():
    assert number(around(1.23456, 0.1)) == "1.23 (1.04 to 1.43)"
    assert number(around(1234.5, 100.0)) == "1,234 (1,039 to 1,430)"


def test_the_published_schema_is_the_one_in_the_code():
    """Renew with: python -m ancestral.measure.compare > docs/comparison.schema.json."""
    assert json.loads((DOCS / "comparison.schema.json").read_text()) == Contest.model_json_schema()


def test_a_mean_over_no_deviation_is_the_number_itself():
    one = around(2.0, 0.5)
    torch.testing.assert_close(over_seeds([one, one, one]).stderr, one.stderr)

"""The certificate: everything passes it, and what is wrong fails it for the right reason."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from ancestral.apps.cli import app
from ancestral.diffusion import denoise, sample, singlestep
from ancestral.diffusion import process as P
from ancestral.diffusion.denoise import ROWS, NetworkDenoiser
from ancestral.diffusion.flow import flow_likelihood
from ancestral.diffusion.sample import SAMPLERS
from ancestral.errors import OptionError
from ancestral.measure.certification import certify as C
from ancestral.measure.certification import identities, law, order
from ancestral.measure.certification.certificate import Certificate, LikelihoodRow, SamplerRow
from ancestral.measure.certification.subjects import (
    GRIDS,
    LIKELIHOODS,
    STANDARD_ERRORS,
    TARGETS,
    Likelihood,
    known_rows,
    load,
)
from ancestral.rng import randn_like, stream

NAMES = {"sampler": "wrong", "schedule": "cosine", "predicts": "v"}
DOCS = Path(__file__).parent.parent / "docs"


def run(*arguments: object) -> tuple[int, dict]:
    result = CliRunner().invoke(app, ["certify", "--json", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture(scope="module")
def everything() -> tuple[int, dict]:
    return run()


@pytest.fixture(scope="module")
def laws() -> dict[str, law.Oracle]:
    return law.oracles(thorough=False, seed=0)


def test_all_that_is_registered_passes_in_short(everything):
    code, record = everything
    rows = [row for part in ("samplers", "laws", "processes", "likelihoods") for row in record[part]]
    assert [row for row in rows if row["verdict"] != "pass"] == []
    assert (code, record["passed"], record["failures"]) == (0, True, 0)
    assert {row["sampler"] for row in record["samplers"]} == set(SAMPLERS)
    met = {name: {row["oracle"] for row in record["laws"] if row["sampler"] == name} for name in SAMPLERS}
    assert min(len(laws) for laws in met.values()) >= 2
    assert set().union(*met.values()) == set(law.ORACLES)
    assert {row["grid"] for row in record["laws"]} == set(GRIDS)
    assert {row["likelihood"] for row in record["likelihoods"]} == set(LIKELIHOODS)
    undefined = {("straight", "eps"), ("straight", "score")}
    pairs = {(schedule, row) for schedule in P.SCHEDULES for row in ROWS} - undefined
    assert {(row["schedule"], row["predicts"]) for row in record["processes"]} == pairs


def test_the_record_validates_against_the_published_schema(everything):
    schema = json.loads((DOCS / "certify.schema.json").read_text())
    Draft202012Validator(schema).validate(everything[1])
    assert Certificate.model_validate(everything[1]).passed


def test_the_published_schema_is_the_one_in_the_code():
    """Renew with: python -m ancestral.measure.certification.certificate > docs/certify.schema.json."""
    assert json.loads((DOCS / "certify.schema.json").read_text()) == Certificate.model_json_schema()


def test_the_printed_table_has_every_name_and_says_that_all_pass():
    result = CliRunner().invoke(app, ["certify", "--sampler", "heun", "--grid", "uniform", "--schedule", "cosine"])
    assert result.exit_code == 0, result.output
    assert re.search(r"heun +2 +2\.0\d ± 0\.0\d.*pass", result.stdout)
    assert re.search(r"heun, uniform, cosine.*pass", result.stdout)
    assert re.search(r"\d+ verdicts, all pass \(short version, seed 0", result.stdout)


# What is wrong fails, for the right reason. Each of these returns finite samples of the right shape.


def half_weight_step(denoiser, x, t, s, memory, *, rng=None):
    """DPM-Solver++ 2M in data prediction; `weight` is 1/2, and here half of it."""
    return multistep(denoiser, x, t, s, memory, weight=0.25)


def whole_weight_step(denoiser, x, t, s, memory, *, rng=None):
    return multistep(denoiser, x, t, s, memory, weight=0.5)


def even_steps_only(denoiser, x, t, s, memory, *, rng=None):
    """The weight of 2M for steps of one size: right on even grids, and of first order on others."""
    return multistep(denoiser, x, t, s, memory, weight=0.5, even=True)


def multistep(denoiser, x, t, s, memory, *, weight, even=False):
    x_0_hat = denoiser(x, t)
    if s.sigma == 0:
        return x_0_hat, None
    h, guess = (s.log_snr - t.log_snr) / 2, x_0_hat
    if memory is not None:
        before, h_before = memory
        guess = x_0_hat + weight * (1.0 if even else h / h_before) * (x_0_hat - before)
    x_s = s.sigma / t.sigma * x + s.alpha * -math.expm1(-h) * guess
    return x_s, (x_0_hat, h)


def shifted_step(denoiser, x, t, s, memory, *, rng):
    """Ancestral sampling whose noise has mean 0.2: exact on a point mass, off in the mean."""
    mean, var, _ = denoise.reverse(denoiser, x, s, t)
    return (mean, None) if s.sigma == 0 else (mean + var**0.5 * (randn_like(x, rng) + 0.2), None)


def churn_step(denoiser, x, t, s, memory, *, rng, after=True):
    """Euler with churn on a variance-exploding process: noise raises the level by half of what the step lowers it.

    The network has to be asked at the raised level; with `after` the noise comes after it was asked, for the old one.
    """
    if s.sigma == 0:
        return denoiser(x, t), None
    raised = min(t.sigma + 0.5 * (t.sigma - s.sigma), float(denoiser.process(1.0)[1]))
    x_hat = x + (raised**2 - t.sigma**2) ** 0.5 * randn_like(x, rng)
    x_0_hat = denoiser(x, t) if after else denoiser(x_hat, denoiser.process.time(-2 * math.log(raised)))
    return x_0_hat + s.sigma / (t.sigma if after else raised) * (x_hat - x_0_hat), None


def hot_langevin_step(denoiser, x, t, s, memory, *, rng):
    """Annealed Langevin dynamics whose noise has sqrt(delta) where 2 delta is due: its law is the square of the law."""
    for _ in range(5):
        x = x + 0.2 * t.sigma**2 * denoiser.score(x, t) + (0.2 * t.sigma**2) ** 0.5 * randn_like(x, rng)
    return (denoiser(x, t) if s.sigma == 0 else x), None


def nan_step(denoiser, x, t, s, memory, *, rng=None):
    x_s, _ = singlestep.euler_step(denoiser, x, t, s, memory)
    return x_s / (x_s[:, :1] > -1e9) * torch.where(x_s > 1.0, torch.nan, 1.0), memory


def flat_step(denoiser, x, t, s, memory, *, rng=None):
    return singlestep.euler_step(denoiser, x, t, s, memory)[0].flatten(), memory


def global_step(denoiser, x, t, s, memory, *, rng):
    mean, var, _ = denoise.reverse(denoiser, x, s, t)
    return (mean, None) if s.sigma == 0 else (mean + var**0.5 * torch.randn_like(x), None)


def sloppy_step(denoiser, x, t, s, memory, *, rng=None):
    return singlestep.euler_step(denoiser, x, t, s, memory)[0] + 0.01 * (s.sigma == 0), memory


def raising_step(denoiser, x, t, s, memory, *, rng=None):
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("step", "claimed", "reason"),
    [
        (singlestep.euler_step, 2, r"declares order 2 and has 1\.00"),
        (half_weight_step, 2, r"declares order 2 and has 0\.99"),
        (even_steps_only, 2, r"declares order 2 and has [01]\.\d"),
        (nan_step, 1, "not finite"),
        (flat_step, 1, r"returned shape \(32,\)"),
        (raising_step, 1, "SystemExit"),
        (global_step, None, "randomness that is not rng"),
        (sloppy_step, 1, "one step on a point mass ends"),
    ],
)
def test_a_wrong_step_fails_for_its_fault(step, claimed, reason):
    sampler = replace(sample.euler, step=step, order=claimed, stochastic=claimed is None)
    row = C.graded(SamplerRow, NAMES, lambda: order.grade(sampler, P.cosine(), "v"))
    assert row.verdict == "fail"
    assert re.search(reason, row.reason), row.reason


@pytest.mark.parametrize("declared", [1, 3])
def test_evaluations_are_counted_and_a_claim_of_others_fails(declared):
    _, faults = order.grade(replace(sample.heun, evaluations=declared), P.cosine(), "v")
    assert faults == [f"declares {declared} evaluations in a step and takes 2"]


def test_a_grid_of_fewer_times_than_were_asked_for_fails(laws):
    with pytest.raises(OptionError, match="the grid has 1 times where 3 were asked for"):
        law.grade(sample.heun, lambda process, n: GRIDS["uniform"](process, n // 2), P.cosine(), laws["gaussian"], 0)


@pytest.mark.parametrize("predicts", ["eps", "score"])
def test_what_is_undefined_where_no_signal_is_left_is_refused(predicts):
    code, record = run("--sampler", "ddim", "--schedule", "straight", "--predicts", predicts)
    assert code == 2
    assert f"predicting '{predicts}' is undefined on 'straight'" in record["error"]


def test_the_right_weight_passes_where_half_of_it_fails():
    slope, _ = order.measured(replace(sample.euler, step=whole_weight_step, order=2), P.cosine(), "v")
    assert slope == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize(
    ("step", "process", "wrong"),
    [
        (shifted_step, P.cosine(), "mean"),
        (churn_step, P.edm(), "covariance"),
        (hot_langevin_step, P.edm(), "covariance"),
    ],
)
def test_what_is_exact_on_a_point_and_wrong_on_a_law_fails_on_the_law(laws, step, process, wrong):
    sampler = replace(sample.ancestral, step=step, evaluations=5 if step is hot_langevin_step else 1)
    assert order.grade(sampler, process, "v")[1] == []
    _, faults = law.grade(sampler, GRIDS["default"], process, laws["gaussian"], 0)
    assert re.search(rf"the {wrong} is \d+ standard errors off", "; ".join(faults)), faults


def test_the_same_churn_with_the_guess_at_the_raised_level_passes(laws):
    sampler = replace(sample.ancestral, step=partial(churn_step, after=False))
    assert law.grade(sampler, GRIDS["default"], P.edm(), laws["gaussian"], 0)[1] == []


def test_exact_samples_exceed_the_threshold_less_than_once_in_200(laws):
    """Of exact samples in place of a sampler's; a verdict needs it twice, so it errs less than once in 40,000."""
    beyond = []
    for given in laws.values():
        for i in range(70):
            found = law.errors(given.law, given.law.sample(given.samples, rng=stream(9, i)), given.reference)
            beyond.append(bool(((law.even(found) - given.mean) / given.std > STANDARD_ERRORS).any()))
    assert sum(beyond) <= 1


# Processes, parameterizations and likelihoods


def test_a_curve_in_single_precision_fails_bayes():
    """Rounded after it was computed: differences of close times cancel."""
    curve = P.cosine().log_snr_curve
    process = P.Process(lambda t: curve(t).float().double())
    _, faults = identities.grade_process(process, "v", TARGETS["v"])
    assert "time(log_snr(t)) is not t" in "; ".join(faults)


def test_a_process_that_ends_in_signal_fails():
    _, faults = identities.grade_process(P.Process(lambda t: 1 - 2 * t.log()), "v", TARGETS["v"])
    assert "with more signal than noise" in "; ".join(faults)


def test_a_row_of_the_wrong_sign_fails_its_published_target():
    """Through the row and back it is exact, as every row is with its own inverse; the target tells."""
    with known_rows({"flipped": lambda a, s, d: (1 / a, s / a)}):
        found, faults = identities.grade_process(P.cosine(), "flipped", TARGETS["eps"])
    assert found["round_trip"] < 1e-9
    assert [fault.split(":")[0] for fault in faults] == ["x_0 is not what the row makes of its target"]
    assert "flipped" not in ROWS


def test_two_rows_of_one_name_are_two_rows():
    """What is kept of a row for the next walk is that row's, though another had its name before."""
    (t,), x = P.cosine().instants([0.5]), torch.ones(1, 2)
    for scale in (1.0, 2.0):
        with known_rows({"own": lambda a, s, d, scale=scale: (0 * a, 0 * a + scale)}):
            assert torch.equal(NetworkDenoiser(Same(), P.cosine(), "own")(x, t), scale * x)


class Same(torch.nn.Module):
    def forward(self, x, log_snr):
        return x


WRONG_LIKELIHOODS = {
    "claims more than there is": Likelihood(lambda *given: LIKELIHOODS["bound-optimal"].nats(*given) - 0.2, "bound"),
    "leaves out": Likelihood(LIKELIHOODS["bound-beta"].nats, "optimal"),
    "off on single examples": Likelihood(
        lambda d, x, rng: flow_likelihood(d, x[:12], rng=rng, log_snr_max=3.0).nats, "exact"
    ),
    "it takes one number per example": Likelihood(
        lambda *given: LIKELIHOODS["bound-beta"].nats(*given).mean(), "bound"
    ),
}


@pytest.mark.parametrize("reason", WRONG_LIKELIHOODS)
def test_a_wrong_likelihood_fails(reason):
    def measure():
        return identities.grade_likelihood(WRONG_LIKELIHOODS[reason], P.cosine(), identities.independent(), 4096, 0)

    row = C.graded(LikelihoodRow, {"likelihood": "wrong", "schedule": "cosine", "oracle": "independent"}, measure)
    assert row.verdict == "fail"
    assert re.search(reason, row.reason), row.reason


# Plug-ins


def example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "certify.md").read_text(), re.DOTALL)
    return code


def test_the_example_of_the_page_passes_and_fails_when_it_claims_more(tmp_path):
    path = tmp_path / "halfway.py"
    path.write_text(example())
    code, record = run("--plugin", path)
    assert (code, record["failures"]) == (0, 0)
    assert {row["sampler"] for row in record["samplers"]} == {"halfway"}
    assert all(row["measured"] == pytest.approx(2, abs=0.1) for row in record["samplers"])
    assert record["processes"] == record["likelihoods"] == []
    path.write_text(example().replace("step=halfway_step", "step=halfway_step, order=3"))
    code, record = run("--plugin", path, "--schedule", "cosine", "--predicts", "v")
    assert code == 6
    assert re.search(r"declares order 3 and has [12]\.", record["samplers"][0]["reason"])
    Draft202012Validator(json.loads((DOCS / "certify.schema.json").read_text())).validate(record)


BROKEN = """
import sys
from dataclasses import replace
from ancestral.diffusion.sample import ancestral, euler

def nan_step(denoiser, x, t, s, memory, *, rng=None):
    return x * float("nan"), memory

def leaving_step(denoiser, x, t, s, memory, *, rng=None):
    sys.exit(0)

SAMPLERS = {"nan": replace(euler, step=nan_step), "leaving": replace(ancestral, step=leaving_step), "three": 3}
SCHEDULES = {"rising": lambda: __import__("ancestral").diffusion.process.Process(lambda t: t), "none": lambda: None}
ROWS = {"one": lambda a, s, d: a}
GRIDS = {"rising": lambda process, n: 1 / n}
LIKELIHOODS = {"raises": None}
"""


def test_whatever_a_plugin_does_wrong_is_a_row_with_a_reason(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(BROKEN)
    code, record = run("--plugin", path)
    rows = [row for part in ("samplers", "laws", "processes", "likelihoods") for row in record[part]]
    assert code == 6
    assert rows
    assert all(row["verdict"] == "fail" and row["reason"] for row in rows)
    assert {row["sampler"] for row in record["samplers"]} == {"nan", "leaving", "three"}
    result = CliRunner().invoke(app, ["certify", "--plugin", str(path)])
    assert result.exit_code == 6
    assert "FAIL three" in result.stdout


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("1 / 0", "could not be run: ZeroDivisionError"),
        ("import sys; sys.exit(0)", "could not be run: SystemExit: 0"),
        ("x = 1", "defines no table"),
        ("GRIDS = {}", "defines no table"),
        ("TARGETS = {'mine': max}", "TARGETS has 'mine', and ROWS has not"),
        ("SAMPLERS = [1]", "must be a dict of names"),
        ("SAMPLERS = {'heun': 1}", "there is a sampler 'heun' already"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_sentence_and_exit_code_2(tmp_path, code, sentence):
    path = tmp_path / "unusable.py"
    path.write_text(code)
    code, record = run("--plugin", path)
    assert code == 2
    assert sentence in record["error"]
    assert str(path) in record["error"]


def test_a_plugin_can_be_a_module_or_an_object_in_one(tmp_path, monkeypatch):
    (tmp_path / "held.py").write_text(example() + "\nclass Mine:\n    SAMPLERS = {'mine': SAMPLERS['halfway']}\n")
    monkeypatch.chdir(tmp_path)
    assert set(load("held")["SAMPLERS"]) == {"halfway"}
    assert set(load("held:Mine")["SAMPLERS"]) == {"mine"}
    for absent in ("held:Yours", "no_such_module", "no_such_file.py"):
        with pytest.raises(OptionError, match="could not be run"):
            load(absent)


@pytest.mark.parametrize("option", ["sampler", "schedule", "predicts", "grid", "likelihood"])
def test_an_unknown_name_is_refused_with_what_there_is(option):
    code, record = run(f"--{option}", "nothing")
    assert code == 2
    assert re.search(r"unknown \w+ 'nothing': \(one of: ", record["error"])

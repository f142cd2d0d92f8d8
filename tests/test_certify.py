"""The certificate: everything passes it, and what is wrong fails it for the right reason."""

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from ancestral.apps.cli import app
from ancestral.diffusion import denoise, sample
from ancestral.diffusion import process as P
from ancestral.diffusion.denoise import ROWS
from ancestral.diffusion.sample import SAMPLERS, Sampler
from ancestral.measure import certify as C
from ancestral.measure import law, order
from ancestral.measure.certificate import Certificate, SamplerRow
from ancestral.measure.subjects import GRIDS, LIKELIHOODS, STANDARD_ERRORS
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


def plugin(folder: Path, code: str) -> Path:
    path = folder / "mine.py"
    path.write_text(
        "import torch\nfrom ancestral.diffusion.sample import *\nfrom ancestral.diffusion import process as P\n"
        "from ancestral.diffusion.sample import Sampler, euler_step, heun_step, ddim_step\n"
        f"from ancestral.rng import randn_like\n{code}"
    )
    return path


def test_all_that_is_registered_passes_in_short(everything):
    code, record = everything
    rows = [row for part in ("samplers", "laws", "processes", "likelihoods") for row in record[part]]
    assert [row for row in rows if row["verdict"] != "pass"] == []
    assert (code, record["passed"], record["failures"]) == (0, True, 0)
    assert {row["sampler"] for row in record["samplers"]} == set(SAMPLERS)
    assert {(row["sampler"], row["oracle"]) for row in record["laws"]} >= {
        (s, o) for s in SAMPLERS for o in law.ORACLES
    }
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
    """Renew with: python -m ancestral.measure.certificate > docs/certify.schema.json."""
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
    x_s, _ = sample.euler_step(denoiser, x, t, s, memory)
    return x_s / (x_s[:, :1] > -1e9) * torch.where(x_s > 1.0, torch.nan, 1.0), memory


def flat_step(denoiser, x, t, s, memory, *, rng=None):
    return sample.euler_step(denoiser, x, t, s, memory)[0].flatten(), memory


def global_step(denoiser, x, t, s, memory, *, rng):
    mean, var, _ = denoise.reverse(denoiser, x, s, t)
    return (mean, None) if s.sigma == 0 else (mean + var**0.5 * torch.randn_like(x), None)


def sloppy_step(denoiser, x, t, s, memory, *, rng=None):
    return sample.euler_step(denoiser, x, t, s, memory)[0] + 0.01 * (s.sigma == 0), memory


def raising_step(denoiser, x, t, s, memory, *, rng=None):
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("step", "claimed", "reason"),
    [
        (sample.euler_step, 2, r"declares order 2 and has 0\.99"),
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
    sampler = Sampler(step, claimed, stochastic=claimed is None)
    row = C.graded(SamplerRow, NAMES, lambda: order.grade(sampler, P.cosine(), "v"))
    assert row.verdict == "fail"
    assert re.search(reason, row.reason), row.reason


def test_the_right_weight_passes_where_half_of_it_fails():
    slope, _ = order.measured(Sampler(whole_weight_step, 2, stochastic=False), P.cosine(), "v")
    assert slope == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize(
    ("step", "process", "wrong"),
    [
        (shifted_step, P.cosine(), "mean"),
        (churn_step, P.edm(), "covariance"),
        (hot_langevin_step, P.edm(), "covariance"),
    ],
)
def test_what_is_exact_on_a_point_and_wrong_on_a_law_fails_on_the_law(step, process, wrong):
    sampler = Sampler(step, None, stochastic=True)
    assert order.grade(sampler, process, "v")[1] == []
    _, faults = law.grade(sampler, GRIDS["default"], process, law.oracles(False, 0)["gaussian"], 0)
    assert re.search(rf"the {wrong} is \d+ standard errors off", "; ".join(faults)), faults


def test_the_same_churn_with_the_guess_at_the_raised_level_passes():
    sampler = Sampler(partial(churn_step, after=False), None, stochastic=True)
    assert law.grade(sampler, GRIDS["default"], P.edm(), law.oracles(False, 0)["gaussian"], 0)[1] == []


def test_exact_samples_exceed_the_threshold_less_than_once_in_200():
    """Of exact samples in place of a sampler's; a verdict needs it twice, so it errs less than once in 40,000."""
    beyond = []
    for given in law.oracles(False, 0).values():
        for i in range(70):
            found = law.errors(given.law, given.law.sample(given.samples, rng=stream(9, i)), given.reference)
            beyond.append(bool(((law.even(found) - given.mean) / given.std > STANDARD_ERRORS).any()))
    assert sum(beyond) <= 1

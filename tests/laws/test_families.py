"""One parametrised law takes every family and variant through its contract, on data of every kind that it claims."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from ancestral.data import Data, Scale, load
from ancestral.errors import OptionError
from ancestral.flow.model import Flow
from ancestral.gan.model import GAN
from ancestral.protocol import Batch, Generative, HasDensity, HasLatent
from ancestral.rng import Rows
from ancestral.training import checkpoint, loop, recipes, start
from ancestral.vae.model import VAE

SMALL = {
    "digits": ("unet.width=16", "unet.multipliers=[1]", "diffusion.chain=8"),
    "vectors": ("mlp.width=16", "mlp.depth=1", "diffusion.chain=8"),
    "vae": ("vae.width=8", "vae.latents=3"),
    "ladder": ("vae.width=8", "vae.latents=3", "vae.ladder=2"),
    "flow": ("flow.transforms=2", "flow.width=8"),
    "variational-flow": ("flow.transforms=2", "flow.width=8", "flow.dequantization=variational"),
    "coupling-flow": ("flow.transforms=2", "flow.width=8", "flow.kind=coupling"),
    "continuous": ("diffusion.chain=8",),
    "gan": ("gan.width=8",),
    "classic-gan": ("gan.width=8",),
}
"""Settings of each variant that make it small."""

RECIPE = {"variational-flow": "flow", "coupling-flow": "flow"}
"""Where a variant is a setting of a recipe."""

KINDS = ("digits", "two-moons", "colour", "field", "series")
"""Grey images on levels with classes, vectors, coloured images of odd sides, and arrays of real values."""


def source(kind: str, folder: Path) -> str:
    """Data of a kind, written into the folder if it is not built in."""
    shapes = {"colour": (60, 3, 7, 5), "field": (60, 2, 6, 6), "series": (60, 5)}
    if kind not in shapes:
        return kind
    values = np.random.default_rng(0).normal(size=shapes[kind]).astype(np.float32)
    if kind == "colour":
        values = (values * 40 + 128).clip(0, 255).astype(np.uint8)
    np.save(folder / f"{kind}.npy", values)
    return str(folder / f"{kind}.npy")


@dataclass(frozen=True)
class Case:
    """A variant that was trained for a few steps, and what it was trained on."""

    variant: str
    kind: str
    data: Data
    run: Path

    def begin(self, to: Path, steps: int = 4) -> start.Run:
        changes = [*SMALL[self.variant]]
        if self.variant == "continuous":
            changes += SMALL["digits" if self.kind in ("digits", "field") else "vectors"]
        recipe = RECIPE.get(self.variant, self.variant)
        small = ["training.batch=8", "training.checkpoint_every=2", "training.pictures=0", "training.snapshots=0"]
        return start.prepare(self.data, to=to, recipe=recipe, steps=steps, changes=[*changes, *small])

    @property
    def model(self) -> recipes.Model:
        return checkpoint.load(self.run)


def cases() -> list[tuple[str, str]]:
    """Every variant on every kind of data it is for."""
    found = []
    for variant in SMALL:
        for kind in KINDS:
            image = kind in ("digits", "colour")
            if variant == "digits" and not image:
                continue
            if variant == "vectors" and image:
                continue
            if variant == "variational-flow" and not image:
                continue  # real values are not dequantized
            if variant == "coupling-flow" and kind in ("two-moons", "series"):
                continue  # which have no patches
            if variant == "continuous" and kind == "colour":
                continue  # its network is that of "digits" and "vectors", which are here
            found.append((variant, kind))
    return found


@pytest.fixture(scope="module", params=cases(), ids=lambda case: f"{case[0]}-{case[1]}")
def case(request, tmp_path_factory) -> Case:
    variant, kind = request.param
    folder = tmp_path_factory.mktemp(f"{variant}-{kind}")
    made = Case(variant, kind, load(source(kind, folder)), folder / "run")
    for _ in made.begin(made.run).steps():
        pass
    return made


def test_it_is_trained_and_goes_on_to_the_bit(case, tmp_path):
    """Stopped after two steps and gone on with, a run of four ends in the weights of one that was not stopped."""
    records = case.begin(tmp_path / "run").steps()
    next(records), next(records)
    records.close()
    for _ in start.prepare(resume=tmp_path / "run").steps():
        pass
    weights = [(path / "final" / "weights.safetensors").read_bytes() for path in (case.run, tmp_path / "run")]
    assert weights[0] == weights[1]
    untrained = recipes.build(checkpoint.open_run(case.run).setup, case.data.facts).state_dict()
    assert any(not torch.equal(value, untrained[name]) for name, value in case.model.state_dict().items())


def test_what_is_loaded_is_what_was_trained(case, tmp_path):
    run = case.begin(tmp_path / "run")
    for _ in run.steps():
        pass
    kept = checkpoint.averaged(run.state.tensors(), run.setup, run.data.facts)
    loaded = checkpoint.load(tmp_path / "run")
    assert torch.equal(kept.sample(3, rng=1), loaded.sample(3, rng=1))


def test_a_sample_depends_on_its_seed_alone_and_is_in_the_data_s_units(case):
    model, facts = case.model, case.data.facts
    assert isinstance(model, Generative)
    x = model.sample(6, rng=7)
    alone = model.sample(1, rng=7, start=4)
    apart = (x[4:5].double() - alone.double()).abs().max()
    assert apart == 0 if facts.levels else apart < 1e-4 * (1 + x.double().abs().max())
    assert not torch.equal(model.sample(6, rng=8), x)
    if facts.levels:
        assert set(x.unique().tolist()) <= set(range(facts.levels))


def test_a_density_of_an_example_does_not_depend_on_its_batch(case):
    model, x = case.model, case.data.held_out[:5]
    assert isinstance(model, HasDensity) == (not isinstance(model, GAN))
    if isinstance(model, GAN):
        return
    whole = model.log_prob(x, rng=3)
    exact = isinstance(model, Flow) and not case.data.facts.levels
    assert whole.kind == ("exact" if exact else "lower bound")
    assert whole.nats.shape == (5,)
    if exact:
        assert whole.stderr is None
    elif isinstance(model, VAE):
        assert bool((whole.stderr >= 0).all())
    part = model.log_prob(x[2:], rng=3, start=2)
    assert torch.allclose(part.nats, whole.nats[2:], rtol=1e-4)


def test_a_density_is_of_the_data_as_given(case):
    """In units ten times as fine, a density is 10^-D of what it was, and the probability of a level what it was."""
    saved = checkpoint.open_run(case.run)
    if isinstance(saved.model, GAN):
        return
    facts, x = saved.facts, case.data.held_out[:4]
    if facts.levels:
        nats = saved.model.log_prob(x, rng=0).nats
        assert bool((nats < 0).all()), "the logarithm of a probability"
        return
    scale = Scale(offset=tuple(10 * v for v in facts.scale.offset), factor=tuple(10 * v for v in facts.scale.factor))
    finer = recipes.build(saved.setup, facts.model_copy(update={"scale": scale}))
    finer.load_state_dict(saved.model.state_dict())
    apart = finer.eval().log_prob(10 * x, rng=0).nats - saved.model.log_prob(x, rng=0).nats
    assert torch.allclose(apart.double(), torch.full((4,), -facts.dims * float(np.log(10))).double(), atol=1e-3)


def test_a_code_leads_back_where_the_family_says_so(case):
    model, x = case.model, case.data.held_out[:4]
    assert isinstance(model, HasLatent) == (not isinstance(model, GAN))
    if isinstance(model, GAN):
        return
    z = model.encode(x)
    assert torch.equal(z, model.encode(x))
    back = model.decode(z)
    assert back.shape == x.shape
    if isinstance(model, Flow):
        assert torch.allclose(back.double(), x.double(), atol=1e-3 * float(x.double().abs().max()))


TOLD = {**RECIPE, "digits": "unet", "vectors": "mlp", "ladder": "vae", "classic-gan": "gan"}
"""Section of a variant whose `labels` are set, where it has not the variant's name."""


def shades(kind: str, to: Path) -> Data:
    """Examples of two classes, of which the second is brighter, or further to the right."""
    labels, rng = np.arange(400) % 2, np.random.default_rng(0)
    if kind == "images":
        x = rng.integers(0, 5, size=(400, 8, 8)) + 11 * labels[:, None, None]
        x[0, 0, :2] = 0, 15  # both ends of the levels
        np.savez(to / "two.npz", x=x.astype(np.uint8), labels=labels)
    else:
        x = rng.normal(size=(400, 2)) + 11 * labels[:, None]
        np.savez(to / "two.npz", x=x.astype(np.float32), labels=labels)
    return load(str(to / "two.npz"))


def told() -> list[tuple[str, str]]:
    """Every variant on each kind of data that it learns: the game without penalties is not sure to learn vectors."""
    only = {"vectors": "vectors"} | dict.fromkeys(("digits", *RECIPE, "classic-gan"), "images")
    return [(variant, kind) for variant in SMALL for kind in ("images", "vectors") if only.get(variant, kind) == kind]


@pytest.mark.parametrize(("variant", "kind"), told())
def test_a_class_that_was_learnt_is_what_is_drawn_and_one_that_was_not_is_refused(variant, kind, tmp_path):
    """Of dark and of bright examples: what is drawn as bright is brighter, from the same seeds."""
    data, recipe, small = shades(kind, tmp_path), RECIPE.get(variant, variant), list(SMALL[variant])
    section = TOLD.get(variant, variant)
    if variant == "continuous":
        plain = "digits" if kind == "images" else "vectors"
        small, section = [*small, *SMALL[plain]], TOLD[plain]
    rate = 0.002 if variant == "classic-gan" else 0.01  # the one whose training is not stable
    changes = [*small, f"{section}.labels=true", "training.batch=32", f"training.rate={rate}", "training.warmup=0"]
    steps = 600 if section == "gan" else 250
    run = start.train(data, to=tmp_path / "run", recipe=recipe, steps=steps, changes=changes)
    model, n = checkpoint.load(run.path), 8
    dark, bright = (model.sample(n, rng=0, labels=torch.full((n,), label)).double().mean() for label in (0, 1))
    assert bright > dark + 3
    with pytest.raises(OptionError):
        model.sample(n, rng=0, labels=torch.full((n,), 77))
    untold = recipes.build(recipes.change(recipes.choose(data.facts, recipe), small), data.facts)
    with pytest.raises(OptionError, match=r"labels|classes"):
        untold.sample(n, rng=0, labels=torch.zeros(n, dtype=torch.int64))


@pytest.mark.parametrize(("recipe", "degrees"), [("vae", 3), ("ladder", 3), ("flow", 3), ("gan", 8)])
def test_in_bfloat16_a_player_descends_the_same_loss(recipe, degrees):
    """The loss to half a percent, and the direction of the whole gradient: of a game less, which has gradients of
    gradients. What is drawn is the same to the bit."""
    data, family = load("digits"), "vae" if recipe == "ladder" else recipe
    small = [change for change in SMALL[recipe] if change.startswith(f"{family}.width")]
    setup = recipes.change(recipes.choose(data.facts, recipe), [f"{family}.precision=float32", *small])
    model = recipes.build(setup, data.facts)
    for _ in loop.steps(loop.State(model, setup.training), data, 20, seed=0):
        pass
    drawn = model.sample(4, rng=0)
    for player in model.players().values():
        losses, gradients = [], []
        for model.lowered in (False, True):
            loss = player.loss(Batch(data.batch(range(64)), Rows((0, 1), 64)))
            losses.append(loss.item())
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*player.module.parameters()])]))
        assert losses[1] == pytest.approx(losses[0], rel=5e-3)
        assert 0 < _angle(*gradients) < math.radians(degrees)
    assert torch.equal(model.sample(4, rng=0), drawn)


def _angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between two vectors, in radians."""
    a, b = a.double() / a.double().norm(), b.double() / b.double().norm()
    return 2 * math.asin(float((a - b).norm()) / 2)

"""Training: what one step is a function of, what the loss estimates, and what a run leaves behind."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import ancestral
from ancestral.data import load
from ancestral.diffusion import process as P
from ancestral.diffusion.likelihood import mean_and_stderr
from ancestral.diffusion.model import WEIGHTINGS, Diffusion
from ancestral.errors import Diverged, OptionError, RunError, RunWarning
from ancestral.protocol import Batch, Player
from ancestral.rng import Rows, stream
from ancestral.toys import gaussian, named
from ancestral.training import checkpoint, durable, loop, recipes, run, start
from ancestral.training.average import Average
from ancestral.training.loop import State
from ancestral.training.recipes import TrainingSection
from oracles import ExactNetwork, exact_model, plain_facts, squared_errors_of_the_bound

QUICK = ["unet.width=8", "unet.blocks=1", "unet.octaves=1", "training.batch=16"]


@pytest.mark.parametrize("predicts", ["v", "eps", "x0"])
def test_the_bound_weighting_estimates_what_the_bound_has_of_the_squared_error(predicts):
    """Its expectation is L_0 + ... + L_{T-1} in nats per dimension but for the constant of L_0's normal density."""
    model = exact_model("bound", predicts)
    x_0 = named("mixture").sample(4000, rng=stream(0))
    losses = torch.stack([model.loss(Batch(x_0, Rows((1, i), len(x_0)))) for i in range(20)])
    terms = squared_errors_of_the_bound(model, x_0[:1500])
    stderr = (losses.var() / 20 + terms.var() / 1500) ** 0.5
    assert abs(float(losses.mean() - terms.mean())) < 4 * float(stderr)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("predicts", ["v", "eps", "x0", "velocity", "edm"])
def test_the_exact_denoiser_minimises_every_loss(weighting, predicts):
    """The loss's minimiser is E[x_0|x_t]: the gradient with respect to any added error vanishes there."""

    class Nudged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.exact = ExactNetwork(named("mixture"), P.cosine(), predicts)
            self.nudge = nn.Parameter(torch.zeros(6, 2, dtype=torch.float64))

        def forward(self, x, log_snr):
            base = torch.stack([torch.ones_like(x[:, 0]), x[:, 0], x[:, 1], x[:, 0] * x[:, 1], log_snr, log_snr**2], 1)
            return self.exact(x, log_snr) + base @ self.nudge

    net = Nudged()
    model = Diffusion(net, P.cosine(), plain_facts(2), predicts=predicts, weighting=weighting, chain=50)
    grads = []
    for i in range(30):
        x_0 = named("mixture").sample(4000, rng=stream(1, i))
        grads.append(torch.autograd.grad(model.loss(Batch(x_0, Rows((2, i), len(x_0)))), net.nudge)[0])
    mean, stderr = torch.stack(grads).mean(0), torch.stack(grads).std(0) / 30**0.5
    assert (mean.abs() < 4.5 * stderr).all()


class Placed(nn.Module):
    """The exact guess, and everywhere the same place of the reverse variance, which can be learnt."""

    variance = True

    def __init__(self, law, process, v: float) -> None:
        super().__init__()
        self.exact, self.v = ExactNetwork(law, process, "v"), nn.Parameter(torch.tensor(v, dtype=torch.float64))
        self.nudge = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, log_snr):
        return self.halves(x, log_snr)[0]

    def halves(self, x, log_snr):
        return self.exact(x, log_snr) + self.nudge, self.v.expand_as(x)


@pytest.mark.parametrize("weighting", ["simple", "bound"])
def test_the_learned_variance_of_a_unit_gaussian_is_beta(weighting):
    """Its optimum, beta~ + c_0^2 Var[x_0|x_t], is beta at every step: there and only there the gradient vanishes."""
    law = gaussian(torch.zeros(2), torch.eye(2))
    x_0 = law.sample(20_000, rng=stream(0))
    slopes = {}
    for v in (0.5, 1.0, 1.5):
        net = Placed(law, P.cosine(), v)
        model = Diffusion(net, P.cosine(), plain_facts(2), variance="learned", weighting=weighting, chain=20)
        losses = [model.loss(Batch(x_0, Rows((1, i), len(x_0)))) for i in range(8)]
        slopes[v] = torch.stack([torch.autograd.grad(loss, net.v)[0] for loss in losses])
    assert slopes[0.5].max() < 0 < slopes[1.5].min()
    assert abs(float(slopes[1.0].mean())) < 4 * float(slopes[1.0].std()) / 8**0.5


def test_in_the_hybrid_objective_the_bound_does_not_move_the_guess():
    """The gradient of the guess is that of the plain squared error alone, whatever variance the network puts out."""
    law, x_0 = named("mixture"), named("mixture").sample(500, rng=stream(0))
    slopes = []
    for v in (-1.0, 0.7):
        net = Placed(law, P.cosine(), v)
        model = Diffusion(net, P.cosine(), plain_facts(2), variance="learned", weighting="simple", chain=20)
        slopes.append(torch.autograd.grad(model.loss(Batch(x_0, Rows((1,), len(x_0)))), net.nudge)[0])
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("v", "same"), [(1.0, "beta"), (-1.0, "fixed-small")])
def test_the_learned_variance_lies_between_the_fixed_ones(v, same):
    """At its ends it is one of them, in every middle term and in the decoder, up to the rounding of float32."""
    law, x_0 = named("mixture"), named("mixture").sample(100, rng=stream(0))
    model = Diffusion(Placed(law, P.cosine(), v), P.cosine(), plain_facts(2), variance="learned", chain=20)
    learned = model.bound(x_0, rng=1)
    fixed = model.bound(x_0, rng=1, variance=same)
    torch.testing.assert_close(learned.terms, fixed.terms, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(learned.decoder, fixed.decoder, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "data", "preset", "small"),
    [
        ("unet", "digits", None, ["unet.width=8", "unet.blocks=1", "unet.octaves=0"]),
        ("dit", "digits", "dit-tiny", ["dit.width=32", "dit.depth=2", "dit.patch=2", "dit.octaves=0"]),
        ("mlp", "ring-8", None, ["mlp.width=64", "mlp.depth=2"]),
    ],
)
def test_a_network_learns_its_reverse_variance(kind, data, preset, small):
    """After a few steps the bound is below that of the same guess with either fixed variance, on a short chain."""
    data = load(data)
    changes = ["diffusion.variance=learned", "diffusion.weighting=simple", "diffusion.chain=10", "training.warmup=5"]
    setup = recipes.change(recipes.choose(data.facts, preset=preset), [*small, f"{kind}.variance=true", *changes])
    model = recipes.build(setup, data.facts)
    for _ in loop.steps(State(model, setup.training), data, 500 if kind == "mlp" else 150, seed=0):
        pass
    learned, *fixed = (
        model.eval().bound(data.held_out[:300], rng=1, variance=variance).diffusion
        for variance in ("learned", "beta", "fixed-small")
    )
    for other in fixed:
        gain, stderr = mean_and_stderr(other - learned)
        assert float(gain) > 3 * float(stderr)


def test_every_epoch_sees_every_example_once_in_a_new_order():
    n, batch = 50, 8
    seen = torch.cat([loop.batch_indices(n, batch, 3, step) for step in range(1, 26)])
    first, second = seen[:50], seen[50:100]
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(50))
    assert first.tolist() != second.tolist()
    assert torch.equal(loop.batch_indices(n, batch, 3, 17), seen[16 * 8 : 17 * 8])
    assert not torch.equal(loop.batch_indices(n, batch, 4, 1), seen[:8])
    assert len(loop.batch_indices(3, 10, 0, 1)) == 10


def test_the_rate_warms_up_peaks_and_ends_at_zero():
    section = TrainingSection(rate=0.1, warmup=10, steps=100)
    rates = [loop.rate(section, step, 100) for step in range(1, 101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9] == pytest.approx(0.1 * 10 / 11)
    assert max(rates) <= 0.1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_a_batch_comes_from_a_mapped_file_as_from_memory(tmp_path):
    """Examples that stay on the disk, of which a step reads its own, train the same weights to the bit."""
    data = load("digits")
    np.save(tmp_path / "train.npy", data.train.numpy())
    mapped = replace(data, train=torch.from_numpy(np.load(tmp_path / "train.npy", mmap_mode="c")))
    setup = recipes.change(recipes.choose(data.facts), QUICK)
    weights = []
    for source in (data, mapped):
        state = loop.State(recipes.build(setup, data.facts), setup.training)
        assert len(list(loop.steps(state, source, 5, seed=0))) == 5
        weights.append(state.tensors())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_half_of_the_images_are_mirrored_and_vectors_never():
    """Left to right, another half each step, and the same half into however many parts the batch is divided."""
    data = load("digits")
    section = TrainingSection(batch=256, flip=True)

    def batch(step: int, accumulate: int = 1) -> torch.Tensor:
        model = recipes.build(recipes.change(recipes.choose(data.facts), QUICK), data.facts)
        state = loop.State(model, section.model_copy(update={"accumulate": accumulate}))
        return torch.cat([part[0] for part in loop.parts(state, data, 0, step)])

    def mirrored(step: int) -> torch.Tensor:
        plain = data.batch(loop.batch_indices(len(data.train), 256, 0, step))
        flipped = (batch(step) == plain.flip(-1)).flatten(1).all(1)
        assert (flipped | (batch(step) == plain).flatten(1).all(1)).all()
        return flipped

    assert 96 < int(mirrored(1).sum()) < 160  # within four standard deviations of a half
    assert not torch.equal(mirrored(1), mirrored(2))
    assert torch.equal(batch(1), batch(1, accumulate=4))
    vectors = load("ring-8")
    state = loop.State(recipes.build(recipes.choose(vectors.facts), vectors.facts), section)
    (seen,) = loop.parts(state, vectors, 0, 1)
    assert torch.equal(seen[0], vectors.batch(loop.batch_indices(len(vectors.train), 256, 0, 1)))


def trained(tmp_path, name: str, steps: int = 6, seed: int = 0) -> run.Run:
    return ancestral.train("digits", to=tmp_path / name, steps=steps, seed=seed, changes=QUICK)


def test_a_run_is_a_function_of_its_seed(tmp_path):
    """Weights and metrics of two runs with one seed are equal to the bit; another seed gives others."""
    same, again, other = trained(tmp_path, "a"), trained(tmp_path, "b"), trained(tmp_path, "c", seed=1)

    def outcome(made: run.Run) -> tuple[bytes, bytes]:
        return (made.path / "final" / checkpoint.WEIGHTS).read_bytes(), (made.path / "metrics.jsonl").read_bytes()

    assert outcome(same) == outcome(again)
    assert outcome(same)[0] != outcome(other)[0]


def test_a_run_directory_describes_itself(tmp_path):
    made = trained(tmp_path, "run", steps=9)
    record = json.loads((made.path / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["steps"] == 9
    assert record["data"]["digest"] == made.data.facts.digest
    assert recipes.read(json.loads((made.path / "config.json").read_text())) == made.setup
    assert [json.loads(line)["step"] for line in (made.path / "metrics.jsonl").read_text().splitlines()] == [
        *range(1, 10)
    ]
    assert [path.name for path in checkpoint.checkpoints(made.path)][-2:] == ["step-0000008", "step-0000009"]
    shown = sorted(path.name for path in (made.path / "samples").iterdir())
    assert shown == ["data.png", *(f"step-{step:07d}.png" for step in (3, 5, 7, 9))]
    model = ancestral.load(made.path)
    assert model.facts == made.data.facts
    final = checkpoint.load(made.path / "checkpoints" / "step-0000009")
    assert torch.equal(model.sample(3, steps=4), final.sample(3, steps=4))


def test_minutes_become_a_recorded_number_of_steps(tmp_path):
    prepared = start.prepare("digits", to=tmp_path / "run", minutes=0.5, changes=QUICK)
    seconds = prepared.record["seconds_per_step"]
    assert prepared.total == pytest.approx(30 / seconds, abs=1)
    assert prepared.done == 0
    assert checkpoint.newest(tmp_path / "run").name == "step-0000000"


def test_an_interrupted_run_keeps_its_last_step_and_says_so(tmp_path):
    prepared = start.prepare("digits", to=tmp_path / "run", steps=50, changes=QUICK)
    steps = prepared.steps()
    for _ in range(4):
        next(steps)
    steps.close()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["steps"]) == ("stopped", 4)
    assert checkpoint.find(tmp_path / "run").name == "step-0000004"
    assert ancestral.load(tmp_path / "run").sample(2, steps=2).shape == (2, 1, 8, 8)


def test_divergence_stops_before_the_weights_are_lost(tmp_path, monkeypatch):
    """A loss that turns to NaN at step 8 of 10 ends the run there; the checkpoint it names is whole and finite."""
    seen = []

    def loss(self, batch, honest=Diffusion.loss):
        seen.append(batch.rows.of == 16 and torch.is_grad_enabled())
        return honest(self, batch) * (float("nan") if sum(seen) == 8 else 1.0)

    monkeypatch.setattr(Diffusion, "loss", loss)
    with pytest.raises(Diverged, match=r"step 8: .* lower learning rate.*step-0000005 is the last good checkpoint"):
        ancestral.train("digits", to=tmp_path / "run", steps=10, changes=[*QUICK, "training.checkpoint_every=5"])
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "diverged"
    model = ancestral.load(tmp_path / "run")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_what_is_saved_is_the_average_and_not_the_last_weights(tmp_path):
    prepared = start.prepare("digits", to=tmp_path / "run", steps=12, changes=QUICK)
    shadow = Average(prepared.model.network, prepared.setup.training.ema)
    for record in prepared.steps():
        shadow.update(prepared.model.network, record.step)
    saved = ancestral.load(tmp_path / "run").network.state_dict()
    last = prepared.model.network.state_dict()
    for name, value in shadow.module.state_dict().items():
        assert torch.equal(saved[name], value)
    assert any(not torch.equal(saved[name], last[name]) for name in saved)


class Slope(nn.Module):
    """A player whose loss has a constant gradient, and whose steps take a known time."""

    def __init__(self, slope: float, wait: float = 0.0) -> None:
        super().__init__()
        self.weight, self.slope, self.wait = nn.Parameter(torch.zeros(4)), slope, wait

    def players(self):
        return {"slope": Player(self, self.loss)}

    def loss(self, batch):
        time.sleep(self.wait)
        return self.slope * self.weight.sum()


def test_the_pace_is_the_time_of_a_step(monkeypatch):
    """Never less than what a step waits for, and not several times as much."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    pace = loop.pace(Slope(1.0, wait=0.05), load("digits"), TrainingSection(), seed=0, seconds=0.5)
    assert 0.05 < pace < 0.15


def test_the_pace_of_one_thread_is_that_of_its_work(monkeypatch):
    """What it waits for, as for a core that others use, does not count."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    pace = loop.pace(Slope(1.0, wait=0.05), load("digits"), TrainingSection(), seed=0, seconds=0.05)
    assert 0 < pace < 0.02


def test_gradients_are_clipped_and_the_rate_follows_its_schedule(monkeypatch):
    """Plain gradient descent in the optimiser's place: each step moves by the scheduled rate times the clipped norm."""
    monkeypatch.setattr(loop, "_optimiser", lambda player, section: torch.optim.SGD(player.module.parameters(), lr=9.0))
    section = TrainingSection(rate=0.1, warmup=3, clip=0.5, batch=2)
    for slope, norm in ((100.0, 0.5), (0.1, 0.2)):
        model = Slope(slope)
        before = model.weight.detach().clone()
        for record in loop.steps(loop.State(model, section), load("digits"), 8, seed=0):
            moved = float((model.weight.detach() - before).norm())
            before = model.weight.detach().clone()
            assert moved == pytest.approx(loop.rate(section, record.step, 8) * norm, rel=1e-3, abs=1e-7)
            assert record.grad_norm["slope"] == pytest.approx(2 * slope, rel=1e-5)


def test_nothing_that_is_not_this_run_is_overwritten(tmp_path):
    made = trained(tmp_path, "run", steps=1)
    before = (made.path / "final" / checkpoint.WEIGHTS).read_bytes()
    with pytest.raises(RunError, match=r"begun with other settings.*training\.steps 1 -> 2"):
        trained(tmp_path, "run", steps=2)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file"):
        trained(tmp_path, "file")
    assert (made.path / "final" / checkpoint.WEIGHTS).read_bytes() == before


def test_two_runs_at_once_take_two_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (start.prepare("digits", steps=1, changes=QUICK) for _ in range(2))
    assert [str(made.path) for made in (first, second)] == ["runs/digits-0001", "runs/digits-0002"]


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.MODEL, durable.MANIFEST])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_model_is_passed_over_for_the_newest_that_is_whole_or_refused_when_named(tmp_path, name, harm):
    made = trained(tmp_path, "run", steps=2)
    file = made.path / "final" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if harm == "remove":
        file.unlink()
    else:
        file.write_bytes(data if harm == "flip" else data[: len(data) // 3])
    with pytest.warns(RunWarning, match=f"final/{name}.*an earlier checkpoint is used"):
        assert checkpoint.open_run(made.path).path == made.path / "checkpoints" / "step-0000002"
    with pytest.raises(RunError, match=rf"final/{name}: .*step-0000002 can be used in its place"):
        ancestral.load(made.path / "final")


def test_another_schedule_starts_from_constants_of_its_own():
    setup = recipes.Setup(recipe="x", process=recipes.ProcessSection(options={"offset": 0.0}), mlp=recipes.MLPSection())
    assert recipes.change(setup, ["process.schedule=linear"]).process.options == {}
    finer = recipes.change(setup, ["process.schedule=linear", 'process.options={"beta_min": 1e-5}'])
    facts = load("ring-8").facts
    assert float(recipes.build(finer, facts).process.chain(1000).betas[0]) == pytest.approx(1e-5)


def test_a_setting_rescales_any_schedule_to_end_in_pure_noise():
    setup, facts = recipes.Setup(recipe="x", mlp=recipes.MLPSection()), load("ring-8").facts
    for changes in (["process.schedule=linear"], ["process.betas=[0.1, 0.2]"]):
        assert recipes.build(recipes.change(setup, changes), facts).process(1.0)[0] > 0
        rescaled = recipes.build(recipes.change(setup, [*changes, "process.zero_terminal=true"]), facts)
        assert rescaled.process(1.0)[0] == 0


@pytest.mark.parametrize("source", ["digits", "bytes"])
def test_image_recipes_start_finer_than_a_level(source, tmp_path):
    """The first step's noise is below half the spacing of levels, so that the decoder costs next to nothing."""
    if source == "bytes":
        source = tmp_path / "x.npy"
        np.save(source, np.random.default_rng(0).integers(0, 256, (20, 16, 16), dtype=np.uint8))
    facts = load(source).facts
    setup = recipes.choose(facts)
    process = recipes.build(recipes.change(setup, ["unet.width=8"]), facts).process
    assert float(process(1 / setup.diffusion.chain)[1]) < 0.5 / (facts.levels - 1)


def test_changes_reach_the_setup_or_are_refused_with_the_close_match():
    facts = load("digits").facts
    setup = recipes.choose(facts)
    assert recipes.change(setup, ["unet.width=24", "process.schedule=linear"]).unet.width == 24
    for change, sentence in [
        ("unet.widht=24", "did you mean 'unet.width'"),
        ("unet.width", "written section.key=value"),
        ("unet.width=wide", "unet.width = 'wide'"),
        ("diffusion.chain=0", "diffusion.chain = 0"),
        ("training.steps=0", "training.steps = 0"),
        ("mlp.width=3", "unknown setting"),
    ]:
        with pytest.raises(OptionError, match=sentence):
            recipes.change(setup, [change])
    for change, sentence in [
        ("process.schedule=cosin", "did you mean 'cosine'"),
        ('process.options={"ofset": 1}', "constant of the cosine schedule 'ofset': did you mean 'offset'"),
        ("diffusion.predicts=epsilon", "unknown parameterization"),
        ("diffusion.weighting=simpel", "did you mean 'simple'"),
        ("diffusion.variance=fixed_small", "did you mean 'fixed-small'"),
        ("process.betas=[0.1, 2.0]", "step 2 of 2"),
    ]:
        with pytest.raises(OptionError, match=sentence):
            recipes.build(recipes.change(setup, [change]), facts)
    with pytest.raises(OptionError, match="unknown recipe 'digit': did you mean 'digits'"):
        recipes.choose(facts, "digit")

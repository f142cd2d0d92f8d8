"""A schedule that is learnt: a curve that falls whatever its parameters are, and where the gradient takes it."""

import pytest
import torch
from torch import nn

from ancestral.data import load
from ancestral.diffusion import likelihood
from ancestral.diffusion import process as P
from ancestral.diffusion.model import WEIGHTINGS, Diffusion
from ancestral.errors import OptionError
from ancestral.nets import MonotoneCurve
from ancestral.nets.levels import level_posterior
from ancestral.protocol import Batch
from ancestral.rng import Rows, rand, stream
from ancestral.training import loop, recipes
from oracles import plain_facts

LAW = torch.tensor([0.5, 0.1, 0.1, 0.3])
"""Probabilities of the four levels of each value."""

DIMS = 16


class KnowsTheLaw(nn.Module):
    """The posterior over the levels of independent values whose law is known: no network could do better."""

    posterior = True

    def forward(self, x, log_snr):
        return self.moments(x, log_snr)[0]

    def moments(self, x, log_snr):
        prior = LAW.log()[None, :, None, None].expand(len(x), -1, DIMS, 1)
        mean, var = level_posterior(prior, x[:, None, :, None], log_snr)
        return mean[:, 0, :, 0], var[:, 0, :, 0]


def model(high: float, low: float, bins: int = 16) -> Diffusion:
    facts = plain_facts(DIMS).model_copy(update={"levels": len(LAW)})
    schedule = P.learned(high, low, bins=bins)
    options = {"predicts": "x0", "weighting": "bound", "variance": "fixed-small", "decoder": "softmax", "chain": 200}
    return Diffusion(KnowsTheLaw(), schedule, facts, **options)


def examples(n: int, seed: int) -> torch.Tensor:
    index = torch.searchsorted(LAW.cumsum(0), rand((n, DIMS), stream(seed)).float())
    return torch.linspace(-1, 1, len(LAW))[index.clamp(max=3)]


def scrambled(seed: int) -> MonotoneCurve:
    curve = MonotoneCurve(13.0, -8.0, bins=10)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in curve.parameters():
            parameter.copy_(5 * torch.randn(parameter.shape, generator=generator))
    return curve


@pytest.mark.parametrize("seed", range(20))
def test_a_curve_falls_from_the_data_to_its_end_whatever_its_parameters(seed):
    curve = scrambled(seed)
    times = torch.linspace(0, 1, 5001).double()
    log_snr = curve(times)
    assert log_snr[0] == torch.inf
    assert (log_snr.diff() < 0).all()
    high, low = curve.ends().detach()
    torch.testing.assert_close(log_snr[-1], low + 2 * torch.tensor(curve.knee).double().log1p())
    assert high > curve.middle > low


@pytest.mark.parametrize("seed", range(5))
def test_the_time_spent_in_a_bin_is_its_mass(seed):
    curve = scrambled(seed)
    curve.knee = 0.0
    times = (torch.arange(200_000) + 0.5).double() / 200_000
    share = torch.bincount(curve.bin(curve(times)), minlength=10) / len(times)
    torch.testing.assert_close(share.double(), curve.log_mass().detach().exp(), atol=2e-5, rtol=0)
    torch.testing.assert_close(share.sum(), torch.tensor(1.0))


def test_before_it_has_learnt_it_is_the_log_linear_schedule():
    times = torch.linspace(0.001, 1, 100).double()
    torch.testing.assert_close(P.learned().log_snr(times), P.log_linear().log_snr(times))


def test_the_gradient_of_the_ends_is_that_of_the_bound():
    """Over ends that are far too close the bound is steep: its differences are the mean of the loss's gradient."""
    high, low, delta, n = 2.0, 0.5, 0.25, 1000
    schedule = model(high, low)
    gradients = []
    for step in range(300):
        schedule.zero_grad()
        schedule.loss(Batch(examples(64, step), Rows((1, step), 64))).backward()
        gradients.append(schedule.network.curve.moved.grad.clone())
    mean, stderr = torch.stack(gradients).mean(0), torch.stack(gradients).std(0) / len(gradients) ** 0.5

    def bound(high: float, low: float) -> float:
        options = {"variance": "fixed-small", "decoder": "softmax", "levels": len(LAW)}
        found = likelihood.bound(model(high, low).denoiser, examples(n, -1), 200, rng=stream(2), **options)
        return float(found.nats.mean()) / DIMS

    slopes = [
        (bound(high + delta, low) - bound(high - delta, low)) / (2 * delta),
        (bound(high, low - delta) - bound(high, low + delta)) / (2 * delta),  # a curve moves its ends outwards
    ]
    assert min(abs(slope) for slope in slopes) > 0.03
    assert ((mean - torch.tensor(slopes)).abs() < 4 * stderr).all(), (mean, stderr, slopes)


def second_moment(schedule: Diffusion) -> tuple[float, float]:
    """Of a term drawn in the way of training, and the least that any density of log-SNRs has, (E rms)^2."""
    x_0, steps = examples(1000, 7), torch.arange(1, 200)
    weight = WEIGHTINGS["bound"](schedule.network, schedule._times)[1]
    squares = []
    with torch.no_grad():
        for step in steps:
            x_t, _ = schedule.process.marginal(x_0, schedule._times[step], stream(8, int(step)))
            terms = weight[step] * (schedule.network(x_t, schedule._times[step]) - x_0).square().mean(1)
            squares.append(terms.square().mean())
    squares = torch.stack(squares)
    return float(squares.mean()), float(squares.sqrt().mean() ** 2)


def test_the_shape_that_is_learnt_has_nearly_the_least_variance():
    schedule = model(5.0, -6.0)
    schedule.network.curve.moved.requires_grad_(False)
    before, least = second_moment(schedule)
    optimiser = torch.optim.Adam([schedule.network.curve.shape], lr=0.03)
    for step in range(500):
        optimiser.param_groups[0]["lr"] = 0.03 * (1 - step / 500)
        optimiser.zero_grad()
        schedule.loss(Batch(examples(64, step), Rows((3, step), 64))).backward()
        optimiser.step()
    after, _ = second_moment(schedule)
    assert before > 1.3 * least
    assert after < 1.08 * least


def test_the_loss_is_the_whole_bound_of_the_chain():
    """Prior and decoder included, at any ends: in the mean it is what `likelihood.bound` says of all steps."""
    schedule, draws = model(2.0, -1.0), 400
    with torch.no_grad():
        losses = [float(schedule.loss(Batch(examples(64, step), Rows((4, step), 64)))) for step in range(draws)]
    losses = torch.tensor(losses)
    options = {"variance": "fixed-small", "decoder": "softmax", "levels": len(LAW)}
    whole = likelihood.bound(schedule.denoiser, examples(4000, -2), 200, rng=stream(5), draws=10, **options)
    apart = float(DIMS * losses.mean()) - whole.estimate().value
    assert abs(apart) < 4 * ((DIMS * float(losses.std())) ** 2 / draws + whole.estimate().stderr ** 2) ** 0.5


def test_a_run_learns_its_schedule_and_is_measured_on_it():
    """The curve is trained, averaged and loaded with the network; the process that is measured follows it."""
    data = load("digits")
    small = ["unet.width=8", "unet.blocks=1", "training.batch=32", "training.warmup=0", "process.schedule=learned"]
    setup = recipes.change(recipes.choose(data.facts, "digits_bits"), small)
    trained = recipes.build(setup, data.facts)
    before = trained.process.log_snr(torch.linspace(0.1, 1, 10))
    state = loop.State(trained, setup.training)
    for _ in loop.steps(state, data, 30, seed=0):
        pass
    after = trained.process.log_snr(torch.linspace(0.1, 1, 10))
    assert (after - before).abs().max() > 0.01
    loaded = recipes.build(setup, data.facts)
    loaded.network.load_state_dict(trained.network.state_dict())
    assert torch.equal(loaded.process.log_snr(torch.linspace(0.1, 1, 10)), after)
    x = data.held_out[:5]
    assert torch.equal(loaded.bound(x, rng=0).nats, trained.bound(x, rng=0).nats)


@pytest.mark.parametrize("changes", [["diffusion.weighting=simple"], ["diffusion.decoder=gaussian"]])
def test_a_learned_schedule_without_the_costs_of_its_ends_is_refused(changes):
    facts = load("digits").facts
    setup = recipes.change(recipes.choose(facts, "digits_bits"), ["process.schedule=learned", *changes])
    with pytest.raises(OptionError, match="digits_bits"):
        recipes.build(setup, facts)


@pytest.mark.parametrize("change", ["process.schedule=learned", "diffusion.variance=learned"])
def test_what_is_learnt_beside_the_guess_cannot_be_divided_among_processes(change):
    facts = load("digits").facts
    changes = [change, "training.shard=true"]
    changes += ["unet.posterior=false", "unet.variance=true", "diffusion.predicts=v"] if "variance" in change else []
    with pytest.raises(OptionError, match=r"leave training\.shard=true out"):
        recipes.build(recipes.change(recipes.choose(facts, "digits_bits"), changes), facts)

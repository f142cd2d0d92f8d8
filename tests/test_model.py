"""The diffusion family: units, seeds, latents, and the contract it declares."""

from contextlib import nullcontext

import pytest
import torch

from ancestral.data import Scale, load
from ancestral.diffusion import likelihood
from ancestral.diffusion import process as P
from ancestral.diffusion.likelihood import mean_and_stderr
from ancestral.diffusion.model import Diffusion
from ancestral.diffusion.sample import SAMPLERS, ddim, heun
from ancestral.errors import OptionError
from ancestral.nets import MLP
from ancestral.protocol import Batch, Generative, HasDensity, HasLatent
from ancestral.rng import Rows, stream
from ancestral.toys import named
from ancestral.training import loop, recipes
from oracles import COMBINATIONS, ExactNetwork, exact_model, plain_facts, squared_errors_of_the_bound


def test_diffusion_declares_what_it_can_do():
    model = exact_model("simple")
    assert isinstance(model, Generative)
    assert isinstance(model, HasDensity)
    assert isinstance(model, HasLatent)


def test_log_prob_is_a_lower_bound_in_the_units_of_the_data():
    """On data in other units, x -> 3 x + 1, log p moves by -D log 3, and stays below the truth in the mean."""
    model, toy = exact_model("simple", chain=50), named("mixture")
    x = toy.sample(400, rng=stream(0))
    density = model.log_prob(x.float(), rng=0)
    assert density.kind == "lower bound"
    gap, stderr = mean_and_stderr(toy.log_prob(x) - density.nats)
    assert float(gap) > -3 * float(stderr)
    facts = plain_facts(2).model_copy(update={"scale": Scale(offset=(1.0,), factor=(3.0,))})
    moved = Diffusion(model.network.net, P.cosine(), facts, chain=50).log_prob(3 * x.float() + 1, rng=0)
    torch.testing.assert_close(moved.nats, density.nats - 2 * torch.tensor(3.0).log(), rtol=1e-3, atol=1e-3)


def test_encode_and_decode_are_inverse_up_to_the_solver():
    """The round trip's error falls at least as 1/n: the steps are of second order, the one at the data of first."""
    model = exact_model("simple")
    x = named("mixture").sample(200, rng=stream(0)).float()
    errors = [float((model.decode(model.encode(x, steps=n), steps=n) - x).norm(dim=1).median()) for n in (50, 100, 200)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.02


def test_latents_of_data_are_standard_normal():
    z = exact_model("simple").encode(named("mixture").sample(4000, rng=stream(0)).float(), steps=60)
    assert (z.mean(0).abs() < 4 / 4000**0.5 + 0.01).all()
    assert ((z.T.cov() - torch.eye(2)).abs() < 0.12).all()


def test_samples_come_in_the_units_of_the_data():
    facts = load("digits").facts
    model = recipes.build(recipes.change(recipes.choose(facts), ["unet.width=8", "unet.blocks=1"]), facts)
    images = model.sample(5, steps=3)
    assert images.dtype == torch.uint8
    assert images.shape == (5, 1, 8, 8)
    assert int(images.max()) <= 16
    assert torch.equal(model.sample(5, steps=3, rng=4)[2:], model.sample(5, steps=3, rng=4)[2:])
    assert not torch.equal(model.sample(5, steps=3, rng=4), model.sample(5, steps=3, rng=5))


def test_samples_of_the_exact_model_have_the_law_of_the_data():
    toy, model, n = named("mixture"), exact_model("simple"), 20_000
    for sampler, steps in ((heun, 60), (ddim, 200)):
        x = model.sample(n, steps=steps, sampler=sampler, rng=1).double()
        assert ((x.mean(0) - toy.mean).abs() < 5 * (toy.cov.diagonal() / n) ** 0.5 + 0.02).all()
        assert ((x.T.cov() - toy.cov).abs() < 0.05 * toy.cov.diagonal().max()).all()


def test_the_chain_that_is_sampled_is_the_chain_that_is_measured():
    """The reverse variance reaches ancestral sampling: in few steps beta spreads the samples more than beta~."""
    net = exact_model("simple").network.net
    wide, narrow = (Diffusion(net, P.cosine(), plain_facts(2), variance=v) for v in ("beta", "fixed-small"))
    x, y = (model.sample(4000, steps=8, rng=0) for model in (wide, narrow))
    assert not torch.equal(x, y)
    assert float(x.var(0).sum()) > 1.05 * float(y.var(0).sum())


@pytest.mark.parametrize("betas", [[0.01] * 1000, torch.linspace(1e-4, 0.05, 1000).tolist(), [0.9] * 400])
def test_the_bound_weighting_holds_on_chains_that_end_in_hardly_any_signal(betas):
    """Below the cut in log-SNR no step is drawn; above it the loss is still what the bound has of the squared error."""
    process, toy = P.from_betas(betas), named("mixture")
    net = ExactNetwork(toy, process, "v")
    model = Diffusion(net, process, plain_facts(2), weighting="bound", chain=len(betas))
    x_0 = toy.sample(4000, rng=stream(0))
    losses = torch.stack([model.loss(Batch(x_0, Rows((1, i), len(x_0)))) for i in range(20)])
    terms = squared_errors_of_the_bound(model, x_0[:1000])
    stderr = (losses.var() / 20 + terms.var() / 1000) ** 0.5
    assert abs(float(losses.mean() - terms.mean())) < 4 * float(stderr)


def test_what_is_undefined_is_refused():
    net, facts = MLP((2,), 8, 1), plain_facts(2)
    for options, sentence in [
        ({"weighting": "vlb"}, "unknown weighting"),
        ({"variance": "small"}, "unknown reverse variance"),
        ({"chain": 1}, "at least 2 steps"),
        ({"variance": "optimal"}, "only a network with a posterior"),
    ]:
        with pytest.raises(OptionError, match=sentence):
            Diffusion(net, P.cosine(), facts, **options)
    with pytest.raises(OptionError, match="undefined at t = 1"):
        Diffusion(net, P.straight(), facts, predicts="eps")
    with pytest.raises(OptionError, match="3 seeds for 5"):
        Diffusion(net, P.cosine(), facts).sample(5, rng=[1, 2, 3])


@pytest.mark.parametrize(("schedule", "predicts"), [each for each in COMBINATIONS if each[0] != "learned"])
def test_every_schedule_learns_with_every_parameterization_defined_on_it(schedule, predicts):
    """A few steps on a Gaussian tighten the bound by many standard errors, from the CLI's own settings.

    A schedule that is learnt needs data on levels: it has tests of its own.
    """
    data = load("gaussian")
    changes = [f"process.schedule={schedule}", f"diffusion.predicts={predicts}", "diffusion.chain=50"]
    changes += ["mlp.width=32", "mlp.depth=1", "training.batch=256", "training.warmup=5", "training.rate=3e-3"]
    setup = recipes.change(recipes.choose(data.facts), changes)
    model, x = recipes.build(setup, data.facts), data.held_out[:2000]
    before = model.bound(x, rng=0).nats
    for _ in loop.steps(loop.State(model, setup.training), data, 80, seed=0):
        pass
    gain, stderr = mean_and_stderr(before - model.bound(x, rng=0).nats)
    assert float(gain) > 5 * float(stderr)


@pytest.mark.parametrize("preset", [None, "dit-tiny"])
def test_nothing_is_left_on_the_cpu_when_a_model_is_elsewhere(preset, monkeypatch):
    """On torch's device without numbers every sum of tensors of two devices is an error, as it is on a GPU."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no such device
    data = load("digits")
    model = recipes.build(recipes.choose(data.facts, preset=preset), data.facts).to("meta")
    assert model.device.type == "meta"
    model.loss(Batch(data.batch([0, 1]).to("meta"), Rows((0,), 2))).backward()
    assert all(parameter.grad.device.type == "meta" for parameter in model.parameters())
    for name, sampler in SAMPLERS.items():
        if name == "adaptive":  # whose steps depend on numbers
            continue
        assert [point.x.device.type for point in model.sample_path(2, steps=3, sampler=sampler)] == ["meta"] * 4
    x_0 = data.facts.scale.forward(data.held_out[:2]).to("meta")
    measured = likelihood.bound(model.denoiser, x_0, 10, rng=0, levels=17)
    assert {part.device.type for part in (measured.prior, measured.terms, measured.decoder)} == {"meta"}
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(3) + torch.zeros(3, device="meta")

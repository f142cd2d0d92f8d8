"""Networks that know the levels of their data: a posterior by Bayes' rule from a prior that is learnt."""

import pytest
import torch
from torch import nn

from ancestral import ode
from ancestral.data import load
from ancestral.diffusion import process as P
from ancestral.diffusion.denoise import NetworkDenoiser, OracleDenoiser, moments, reverse
from ancestral.diffusion.likelihood import bound, mean_and_stderr
from ancestral.errors import OptionError
from ancestral.measure.evaluate import evaluate
from ancestral.nets import UNet
from ancestral.nets.levels import level_posterior
from ancestral.rng import randn, stream
from ancestral.training import recipes
from ancestral.training.loop import State, steps
from oracles import FiniteSet

LEVELS = 5
PMF = torch.tensor([0.4, 0.05, 0.25, 0.1, 0.2]).double()
VALUES = torch.linspace(-1, 1, LEVELS).double()


class Independent(nn.Module):
    """The network that data of independent pixels would end with: the same prior everywhere."""

    posterior = True

    def prior(self, x):
        B, C, H, W = x.shape
        return PMF.log().float().repeat(C)[:, None, None].expand(B, -1, H, W)

    def moments(self, x, log_snr):
        return level_posterior(self.prior(x), x, log_snr)

    def forward(self, x, log_snr):
        return self.moments(x, log_snr)[0]


def pixels(n, shape=(2, 3, 2)):
    draw = torch.from_numpy(stream(0).choice(LEVELS, (n, *shape), p=PMF.numpy()))
    return VALUES[draw].float()


@pytest.mark.parametrize("name", P.SCHEDULES)
def test_with_the_prior_of_the_data_it_is_the_exact_denoiser(name):
    """Mean and variance of every pixel, from almost no noise to almost nothing else, against all levels weighed."""
    process = P.named(name)
    exact = OracleDenoiser(FiniteSet(VALUES[:, None], PMF), process)
    denoiser, x_0 = NetworkDenoiser(Independent(), process, "x0"), pixels(20)
    for t in (0.003, 0.05, 0.3, 0.7, 0.98):
        x_t, _ = process.marginal(x_0, t, stream(1))
        mean, var = denoiser.moments(x_t, t)
        flat = x_t.reshape(-1, 1).double()
        truth = exact(flat, torch.full((len(flat),), t).double()).view_as(x_t)
        torch.testing.assert_close(mean.double(), truth, rtol=0, atol=2e-5)
        alpha, sigma = process(t)
        log_p = PMF.log() - (flat - alpha * VALUES).square() / (2 * sigma**2)
        second = (log_p.softmax(1) @ VALUES.square()).view_as(x_t)
        torch.testing.assert_close(var.double(), second - truth.square(), rtol=0, atol=5e-5)
        torch.testing.assert_close(denoiser(x_t, t), mean, rtol=0, atol=0)


def test_its_gradients_are_those_of_its_definition():
    """By the prior, by x and by the log-SNR, which are written out by hand, as autograd has them of the parts."""
    prior = randn((3, 2 * LEVELS, 4, 3), stream(0)).requires_grad_()
    x, log_snr = randn((3, 2, 4, 3), stream(1)).requires_grad_(), torch.tensor([-2.0, 1.0, 3.0]).requires_grad_()
    y = x * (1 + (-log_snr).exp()).sqrt()[:, None, None, None]
    log_p = (
        prior.view(3, 2, LEVELS, 4, 3)
        - 0.5 * log_snr.exp()[:, None, None, None, None] * (y[:, :, None] - VALUES.float()[:, None, None]).square()
    )
    parts = (log_p.softmax(2) * VALUES.float()[:, None, None]).sum(2)
    whole, _ = level_posterior(prior, x, log_snr)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)
    by = randn(x.shape, stream(2))
    torch.testing.assert_close(
        torch.autograd.grad(whole, (prior, x, log_snr), by),
        torch.autograd.grad(parts, (prior, x, log_snr), by),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_divergence_of_its_guess_is_its_variance():
    """tr d E[x_0|x_t] / d x_t = alpha / sigma^2 tr Var[x_0|x_t], when pixels are independent."""
    process = P.cosine()
    denoiser, x_0 = NetworkDenoiser(Independent(), process, "x0"), pixels(4)
    t = torch.tensor([0.1, 0.2, 0.4, 0.8]).double()
    x_t, _ = process.marginal(x_0, t, stream(1))
    _, divergence = ode.divergence_exact(lambda x: denoiser(x, t), x_t)
    alpha, sigma = process(t)
    expected = alpha / sigma**2 * denoiser.moments(x_t, t)[1].flatten(1).sum(1).double()
    torch.testing.assert_close(divergence.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_unet_puts_out_levels_between_the_ends_and_knows_how_sure_it_is():
    net = UNet(2, width=8, multipliers=(1, 2), blocks=1, levels=17, posterior=True)
    x, log_snr = randn((3, 2, 7, 5), stream(0)), torch.tensor([-6.0, 0.0, 12.0])
    level = torch.from_numpy(stream(1).integers(0, 17, (2, 7, 5))) / 8 - 1
    x[2] = (level + 0.02) / (1 + torch.tensor(-12.0).exp()).sqrt()
    mean, var = net.moments(x, log_snr)
    assert mean.abs().max() <= 1
    torch.testing.assert_close(mean[2], level.float(), rtol=0, atol=1e-5)  # the prior is even: what is left is rounding
    assert float(var[0].mean()) > 0.3 > 0.01 > float(var[2].mean())


def test_a_model_with_a_posterior_is_measured_with_the_optimal_variance():
    """Which is never worse than fixed-small for the exact denoiser, and gains most on a short chain."""
    process, x_0 = P.cosine(), pixels(2000, (1, 1, 2))
    denoiser = NetworkDenoiser(Independent(), process, "x0")
    gains = {}
    for T in (5, 100):
        options = {"draws": None, "levels": LEVELS, "decoder": "softmax"}
        small, optimal = (
            bound(denoiser, x_0, T, rng=stream(1), variance=variance, **options).nats
            for variance in ("fixed-small", "optimal")
        )
        gains[T], stderr = mean_and_stderr(small - optimal)
        assert float(gains[T]) > 3 * float(stderr)
    assert gains[5] > 3 * gains[100]


@pytest.mark.parametrize("variance", ["fixed-small", "optimal"])
def test_every_evaluation_of_a_network_is_counted_however_it_is_asked(variance):
    digits = load("digits")
    changes = ["unet.width=8", "unet.blocks=1", "unet.posterior=true", "diffusion.predicts=x0"]
    setup = recipes.change(recipes.digits(digits.facts), [*changes, f"diffusion.variance={variance}"])
    model = recipes.build(setup, digits.facts)
    model.sample(3, steps=4)
    assert model.network.asked == 12
    assert model.bound(digits.held_out[:5], draws=2).evaluations == model.network.asked - 12


def test_what_a_posterior_needs_is_said():
    with pytest.raises(OptionError, match="needs data that has levels"):
        UNet(1, posterior=True)
    net = UNet(1, width=8, multipliers=(1,), blocks=1, levels=3, posterior=True)
    with pytest.raises(OptionError, match="predicts 'x0', received 'v'"):
        NetworkDenoiser(net, P.cosine(), "v")
    plain = NetworkDenoiser(UNet(1, width=8, multipliers=(1,), blocks=1), P.cosine())
    with pytest.raises(OptionError, match=r"unet\.posterior=true"):
        moments(plain, torch.zeros(1, 1, 4, 4), 0.5)
    with pytest.raises(OptionError, match=r"unet\.posterior=true"):
        reverse(plain, torch.zeros(1, 1, 4, 4), 0.4, 0.5, "optimal")


def test_digits_learn_faster_with_a_posterior():
    """The same network, chain and number of steps: held-out bits/dim by the plain guess and by Bayes' rule."""
    digits, values = load("digits"), {}
    common = ["unet.width=8", "unet.blocks=1", "training.warmup=5", "training.rate=5e-3", "diffusion.chain=200"]
    for name, changes in {"v": [], "posterior": ["unet.posterior=true", "diffusion.predicts=x0"]}.items():
        setup = recipes.change(recipes.digits(digits.facts), [*common, *changes])
        model = recipes.build(setup, digits.facts)
        state = State(model, setup.training)
        for _ in steps(state, digits, 60, seed=0):
            pass
        values[name] = evaluate(model.eval(), digits, n=100).likelihood()
    assert values["posterior"].value < values["v"].value - 5 * values["v"].stderr

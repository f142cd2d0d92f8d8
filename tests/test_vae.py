"""The variational autoencoder: likelihoods that sum to one, bounds in their order, and the laws of what is drawn."""

import math
from itertools import pairwise, product

import pytest
import torch

from ancestral import gaussian
from ancestral.data import Facts, Scale, load
from ancestral.errors import OptionError
from ancestral.importance import Weights
from ancestral.measure import baselines
from ancestral.nets.ladder import SPREAD
from ancestral.protocol import Batch, Generative, HasDensity, HasLatent
from ancestral.rng import Rows, randn, stream, streams
from ancestral.toys import named
from ancestral.training import loop
from ancestral.vae.aggregate import LatentMixture, fit
from ancestral.vae.bound import AT_ONCE, annealed, temperatures
from ancestral.vae.decoders import FINEST, HASTE, START, Bernoulli, Gaussian, LogisticMixture
from ancestral.vae.model import VAE
from oracles import plain_facts

A_ORTHOGONAL = torch.tensor([[1.0, 0.4], [0.5, -0.8], [-0.2, 0.0]], dtype=torch.float64)
A_OBLIQUE = torch.tensor([[1.0, 0.7], [0.5, 0.6], [-0.2, 0.3]], dtype=torch.float64)
B, DEVIATION = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64), 0.4

SMALL = [
    ((2,), {"latents": 1, "width": 8, "ladder": 0}),
    ((2,), {"latents": 1, "width": 8, "ladder": 1}),
    ((1, 1, 2), {"latents": 2, "width": 4, "ladder": 0}),
]
"""Shapes of two values, and networks of at most two latents for them: what a quadrature can cover."""


@pytest.fixture(autouse=True)
def _seeded():
    """What a model starts with is drawn from the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def on_levels(shape, levels, classes=None):
    return Facts(
        name="tiny", source="tiny", shape=shape, levels=levels, scale=Scale.of_levels(levels), classes=classes,
        n_train=2, n_held_out=1, skipped=0, digest="",
    )  # fmt: skip


def stirred(model, size=0.3, seed=0):
    """The model in float64 with weights that are anything but what it starts with."""
    model.double()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += size * randn(parameter.shape, stream(seed, i), dtype=torch.float64)
    return model


def linear(A, facts=None, spoil=0.0):
    """x = A z + b + sigma eps, of which p(x) and p(z|x) are known, and the exact means and variances of z given x.

    Where the columns of A are orthogonal, so is the posterior's covariance diagonal, and q is exact. `spoil` moves q.
    """
    D, Z = A.shape
    model = VAE(facts or plain_facts(D), latents=Z, width=4, blocks=1).double()
    V = torch.linalg.inv(torch.eye(Z, dtype=torch.float64) + A.T @ A / DEVIATION**2)
    M = V @ A.T / DEVIATION**2
    log_std = 0.5 * V.diagonal().log() + spoil
    net = model.network
    with torch.no_grad():
        net.enter.weight.copy_(torch.eye(4, D))
        net.enter.bias.zero_()
        net.into_top.weight.copy_(torch.eye(4, Z))
        net.into_top.bias.zero_()
        net.leave.weight[:, :Z] = A
        net.leave.bias.copy_(B)
        net.infer_top.weight[:Z, :D] = M
        net.infer_top.bias[:Z] = spoil - M @ B
        net.infer_top.bias[Z:] = SPREAD * (log_std / SPREAD).atanh()
        model.decoder.log_deviation.fill_((math.log(math.expm1(math.log(DEVIATION) - FINEST)) + FINEST - START) / HASTE)
    return model


def exact_law(A):
    """log p(x), and draws of x."""
    law = torch.distributions.MultivariateNormal(B, A @ A.T + DEVIATION**2 * torch.eye(3, dtype=torch.float64))
    z, noise = randn((500, A.shape[1]), stream(8), dtype=torch.float64), randn((500, 3), stream(9), dtype=torch.float64)
    return law.log_prob, z @ A.T + B + DEVIATION * noise


def mean_and_stderr(values):
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


# Decoders


EXTREMES = [0.0, 1.0, -3.0, 30.0, -30.0, 1e4, -1e4]


@pytest.mark.parametrize("levels", [3, 17, 256])
def test_logistic_masses_sum_to_one_at_any_parameters(levels):
    """Over all levels, for all combinations of extreme weights, means and log-scales; their gradient is finite."""
    decoder = LogisticMixture(levels, 2)
    rows = torch.tensor(list(product(EXTREMES, repeat=3)), dtype=torch.float64)
    plain = torch.tensor([0.3, -0.2, -1.0]).double().expand(len(rows), 3)
    parameters = torch.stack([rows, plain], 2).reshape(len(rows), 6, 1)
    values = torch.linspace(-1, 1, levels, dtype=torch.float64)
    with torch.no_grad():
        log_p = torch.stack([decoder.log_prob(value.expand(len(rows), 1), parameters) for value in values])
    assert bool(log_p.isfinite().all())
    assert float((log_p.exp().sum(0) - 1).abs().max()) < 1e-9
    for dtype in (torch.float64, torch.float32):
        cast = parameters.to(dtype).requires_grad_()
        for value in (-1.0, 0.0, 1.0):
            (gradient,) = torch.autograd.grad(decoder.log_prob(torch.full((len(rows), 1), value), cast).sum(), cast)
            assert bool(gradient.isfinite().all())


def test_a_logistic_mass_is_the_integral_of_the_mixture():
    """Against differences of the distribution function in levels, where those have digits left."""
    decoder, levels = LogisticMixture(17, 2), torch.arange(17, dtype=torch.float64)
    parameters = torch.tensor([0.3, -0.6, 0.2, -0.4, -1.0, -2.0], dtype=torch.float64)
    weight = parameters[:2].softmax(0)
    mean = (parameters[2:4] + torch.tensor([-0.5, 0.5]) + 1) * 8
    scale = 1 / 40 * torch.nn.functional.softplus(parameters[4:] + math.log(8) + math.log(40)).exp()
    edges = torch.cat([torch.tensor([-math.inf]), levels[:-1] + 0.5, torch.tensor([math.inf])])
    cumulative = (weight * torch.sigmoid((edges[:, None] - mean) / scale)).sum(1)
    log_p = decoder.log_prob(levels[:, None] / 8 - 1, parameters[None, :, None].expand(17, 6, 1))
    torch.testing.assert_close(log_p.exp(), cumulative.diff(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decoder", [LogisticMixture(5, 3), Bernoulli()], ids=["logistics", "bernoulli"])
def test_mean_and_draws_are_those_of_the_masses(decoder):
    levels = getattr(decoder, "levels", 2)
    values, n = torch.linspace(-1, 1, levels, dtype=torch.float64), 40_000
    parameters = randn((1, decoder.per_value, 1), stream(3), dtype=torch.float64)
    p = decoder.log_prob(values[:, None], parameters.expand(levels, -1, -1)).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert float(decoder.mean(parameters)) == pytest.approx(float(p @ values), abs=1e-9)
    x = decoder.sample(parameters.expand(n, -1, -1), stream(4))[:, 0]
    found = torch.stack([(x - value).abs() < 1e-9 for value in values]).double().mean(1)
    assert float(found.sum()) == 1
    assert ((found - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()


def test_the_deviation_of_a_gaussian_is_what_it_says():
    decoder = Gaussian((2,)).double()
    with torch.no_grad():
        decoder.log_deviation.copy_(torch.tensor([-0.1, 0.05]))
    x, mean = randn((4, 2), stream(0), dtype=torch.float64), randn((4, 1, 2), stream(1), dtype=torch.float64)
    law = torch.distributions.Normal(mean[:, 0], decoder.deviation())
    torch.testing.assert_close(decoder.log_prob(x, mean), law.log_prob(x).sum(1))
    draws = decoder.sample(mean[:1].expand(40_000, -1, -1), stream(2)) - mean[0]
    assert ((draws.std(0) / decoder.deviation() - 1).abs() < 4 / 80_000**0.5).all()


def test_a_feature_that_never_changes_has_a_deviation_all_the_same():
    """Log p of a constant would rise without end, but the deviation has a least value."""
    decoder = Gaussian(())
    with torch.no_grad():
        decoder.log_deviation.fill_(-1e4)
    log_p = decoder.log_prob(torch.zeros(1, 1), torch.zeros(1, 1, 1)).detach()
    assert float(log_p) == pytest.approx(-FINEST - 0.9189, abs=1e-3)


# Bounds where everything is known


def test_with_the_exact_posterior_both_bounds_are_the_truth():
    log_prob, x = exact_law(A_ORTHOGONAL)
    w = linear(A_ORTHOGONAL).bound(x.float(), draws=3)
    for density in (w.elbo, w.importance):
        assert density.kind == "lower bound"
        torch.testing.assert_close(density.nats, log_prob(x.float().double()), rtol=0, atol=1e-9)
        assert float(density.stderr.max()) < 1e-6
    torch.testing.assert_close(w.ess, torch.full((500,), 3.0, dtype=torch.float64))


def test_densities_are_of_the_data_as_given():
    """Of data in other units, x -> 3 x + 1, log p moves by -D log 3; so do annealed weights."""
    log_prob, x = exact_law(A_ORTHOGONAL)
    x = x[:20].float()
    moved = plain_facts(3).model_copy(update={"scale": Scale(offset=(1.0,), factor=(3.0,))})
    model, truth = linear(A_ORTHOGONAL, moved), log_prob(x.double()) - 3 * math.log(3)
    torch.testing.assert_close(model.log_prob(3 * x + 1).nats, truth, rtol=0, atol=1e-5)
    w = model.anneal(3 * x + 1, chains=8, steps=60, leapfrog=3).importance
    assert ((w.nats - truth).abs() < 5 * w.stderr).all()


def test_the_gap_of_the_elbo_is_the_divergence_from_the_posterior():
    """log p(x) - ELBO = KL(q || p(z|x)), in closed form where q is spoilt by a known amount."""
    (log_prob, x), spoil = exact_law(A_ORTHOGONAL), 0.3
    V = 1 / (1 + A_ORTHOGONAL.square().sum(0) / DEVIATION**2)
    kl = gaussian.kl(torch.full_like(V, spoil), V * math.exp(2 * spoil), torch.zeros_like(V), V).sum()
    elbo = linear(A_ORTHOGONAL, spoil=spoil).bound(x, draws=400).elbo
    gap, stderr = mean_and_stderr(log_prob(x.float().double()) - elbo.nats)
    assert abs(gap - float(kl)) < 4 * max(stderr, float(elbo.stderr.square().mean() / 500) ** 0.5)


def test_bounds_rise_with_the_number_of_draws_and_stay_below_the_truth():
    """ELBO < IW-2 < IW-10 < log p in the mean over data, each step seen; q is diagonal where the posterior is not."""
    log_prob, x = exact_law(A_OBLIQUE)
    model, x = linear(A_OBLIQUE, spoil=0.3), x.repeat(4, 1)
    few, more = model.bound(x, draws=2), model.bound(x, draws=10)
    chain = [few.elbo.nats, few.importance.nats, more.importance.nats, log_prob(x.float().double())]
    for lower, upper in pairwise(chain):
        gain, stderr = mean_and_stderr(upper - lower)
        assert gain > 4 * stderr


def test_the_standard_error_is_that_of_other_noise():
    """Over 400 repetitions of one example, the spread of both bounds is what each of them says of itself."""
    model, x = linear(A_OBLIQUE, spoil=0.1), exact_law(A_OBLIQUE)[1][:1].repeat(400, 1)
    w = model.bound(x, draws=200, rng=5)
    for density in (w.elbo, w.importance):
        told = float(density.stderr.square().mean().sqrt())
        assert float(density.nats.std()) == pytest.approx(told, rel=0.15)


@pytest.mark.parametrize("ladder", [0, 1])
@pytest.mark.parametrize("shape", [(3,), (3, 5, 6)])
def test_weights_are_the_same_however_many_at_a_time(shape, ladder):
    """Streamed sums equal the direct ones to 1e-9, whatever the chunk and the examples beside."""
    model = stirred(VAE(on_levels(shape, 7), latents=2, width=4, ladder=ladder, channels=1), 0.1)
    x = (torch.rand(18, *shape, generator=torch.Generator().manual_seed(0)) * 7).to(torch.uint8)
    whole = model.bound(x, draws=33, at_once=10**6)
    for size in (1, 50):
        parts = model.bound(x, draws=33, at_once=size)
        for row in ("mean", "squares", "log_sum", "log_sum_squares"):
            torch.testing.assert_close(getattr(parts, row), getattr(whole, row), rtol=0, atol=1e-9)
    alone = model.bound(x[17:], draws=33, start=17)
    torch.testing.assert_close(alone.log_sum, whole.log_sum[17:], rtol=0, atol=1e-9)


def test_five_thousand_draws_are_decoded_no_more_than_so_many_at_a_time(monkeypatch):
    """What is in memory at once does not grow with K, nor with the examples."""
    data, sizes = load("digits"), []
    model = VAE(data.facts, width=1, latents=2, components=1)
    decoded = model.decoder.log_prob
    monkeypatch.setattr(model.decoder, "log_prob", lambda x, out: sizes.append(len(x)) or decoded(x, out))
    assert model.bound(data.held_out[:2], draws=5000).draws == 5000
    assert sum(sizes) == 2 * 5000
    assert max(sizes) <= AT_ONCE
    sizes.clear()
    model.log_prob(data.held_out[:300], draws=3)
    assert max(sizes) <= AT_ONCE


def test_streamed_sums_are_those_of_all_weights():
    log_w = 30 * randn((4, 1000), stream(0), dtype=torch.float64)
    found = Weights.of(log_w[:, :1])
    for part in log_w[:, 1:].split(7, 1):
        found = found.joined(Weights.of(part))
    torch.testing.assert_close(found.elbo.nats, log_w.mean(1), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.elbo.stderr, log_w.std(1) / 1000**0.5, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.importance.nats, log_w.logsumexp(1) - math.log(1000), rtol=0, atol=1e-9)
    w = (log_w - log_w.amax(1, keepdim=True)).exp()
    torch.testing.assert_close(found.importance.stderr, w.std(1, correction=0) / w.mean(1) / 999**0.5)


# Annealing


def test_annealed_weights_average_to_the_truth_whatever_the_encoder_says():
    """E[w] = p(x): in the mean over examples within four errors, with an encoder that is far off."""
    log_prob, x = exact_law(A_OBLIQUE)
    density = linear(A_OBLIQUE, spoil=2.0).anneal(x[:40], chains=16, steps=60, leapfrog=3).importance
    gap, stderr = mean_and_stderr(density.nats - log_prob(x[:40].float().double()))
    assert abs(gap) < 4 * stderr
    assert float(density.stderr.max()) < 0.5
    assert ((density.nats - log_prob(x[:40].float().double())).abs() < 6 * density.stderr).all()


def test_one_annealed_walk_is_a_lower_bound_that_rises_with_its_steps():
    log_prob, x = exact_law(A_OBLIQUE)
    model, truth = linear(A_OBLIQUE), log_prob(x[:100].float().double())
    gaps = [
        mean_and_stderr(truth - model.anneal(x[:100], chains=8, steps=steps, leapfrog=2).elbo.nats)
        for steps in (3, 9, 27)
    ]
    for (more, stderr), (less, _) in pairwise(gaps):
        assert more > less + 3 * stderr
    assert gaps[-1][0] > 0


def test_tuning_leaves_annealed_weights_unbiased():
    """E[w] / p(x) is 1 within four errors over many walks of two steps: what counts is not tuned by what it did."""
    seen = torch.tensor(1.5, dtype=torch.float64)
    w = annealed(
        lambda z: -8 * (z[..., 0] - seen).square(), 1, 1, chains=40_000, steps=3, leapfrog=2, rng=streams(0, 1),
        dtype=torch.float64,
    ).importance  # fmt: skip
    truth = gaussian.log_density(seen, torch.zeros_like(seen), 1 + 1 / torch.tensor(16.0)) + 0.5 * math.log(math.pi / 8)
    assert abs(float(w.nats - truth)) < 4 * float(w.stderr)
    assert temperatures(2) == pytest.approx([0, 0.5, 1])


# Discrete data


def quadrature(model):
    """log p of every example of two values on three levels, by a grid over two latents, shape (9,)."""
    axis = torch.linspace(-7, 7, 281, dtype=torch.float64)
    z = torch.cartesian_prod(*[axis] * model.latents).view(-1, model.latents)
    log_prior = gaussian.log_density(z, torch.zeros_like(z), torch.ones_like(z)).sum(1) + model.latents * math.log(0.05)
    x = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 2).view(9, *model.facts.shape)
    with torch.no_grad():
        out = model.network.generate(z)
    return torch.stack([(model.decoder.log_prob(v.expand(len(z), *v.shape), out) + log_prior).logsumexp(0) for v in x])


@pytest.mark.parametrize(("shape", "options"), SMALL)
def test_probabilities_sum_to_one_and_the_bound_reaches_them(shape, options):
    """On all nine examples there are: p by quadrature over z, its sum, IW-k, and annealed weights."""
    model = stirred(VAE(on_levels(shape, 3), blocks=1, components=2, **options), 0.15)
    truth = quadrature(model)
    assert float(truth.exp().sum()) == pytest.approx(1, abs=1e-9)
    x = torch.cartesian_prod(*[torch.arange(3)] * 2).view(9, *shape).to(torch.uint8)
    density = model.log_prob(x, draws=4000)
    assert ((density.nats - truth).abs() < 4.5 * density.stderr).all()
    assert float(density.stderr.max()) < 0.1
    walked = model.anneal(x, chains=32, steps=40, leapfrog=3).importance
    assert ((walked.nats - truth).abs() < 4.5 * walked.stderr).all()


@pytest.mark.parametrize(("shape", "options"), SMALL)
def test_draws_have_the_law_that_is_measured(shape, options):
    model, n = stirred(VAE(on_levels(shape, 3), blocks=1, components=2, **options), 0.15), 20_000
    p = quadrature(model).exp()
    x = model.sample(n, rng=stream(1)).flatten(1).long()
    found = (3 * x[:, 0] + x[:, 1]).bincount(minlength=9) / n
    assert ((found - p).abs() < 4.5 * (p * (1 - p) / n).sqrt()).all()


# The model


@pytest.mark.parametrize(
    ("shape", "levels"), [((3,), None), ((1, 5, 6), 2), ((3, 5, 6), 9), ((1, 17, 19), 3), ((2, 3), 4)]
)
@pytest.mark.parametrize("ladder", [0, 1])
def test_the_loss_is_the_negative_bound_per_dimension(shape, levels, ladder):
    """In the mean over noise, in the model's units, with the divergence in closed form; and every weight matters."""
    facts = plain_facts(3) if levels is None else on_levels(shape, levels)
    model = stirred(VAE(facts, latents=2, width=4, ladder=ladder, channels=1, blocks=1), 0.1)
    x = model.facts.scale.inverse(torch.rand(1, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1).round()
    elbo, n = model.bound(x, draws=3000).elbo, 3000
    many = facts.scale.forward(x).expand(n, *shape)
    loss = torch.stack([model.loss(Batch(many[i::30], Rows((1, i), n // 30))) for i in range(30)])
    value, stderr = mean_and_stderr(loss.detach() * facts.dims)
    assert abs(value + float(elbo.nats)) < 4 * (stderr**2 + float(elbo.stderr) ** 2) ** 0.5
    gradients = torch.autograd.grad(loss.mean(), list(model.parameters()))
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)


def test_a_fresh_model_knows_one_law_for_all_data_and_its_posterior_is_the_prior():
    """Nothing is put out yet and nothing is inferred: all bounds are equal, with no noise at all."""
    data = load("digits")
    for ladder in (0, 2):
        w = VAE(data.facts, width=4, ladder=ladder).bound(data.held_out[:3], draws=5)
        assert float(w.elbo.stderr.max()) < 1e-5
        torch.testing.assert_close(w.elbo.nats, w.importance.nats, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_loss_is_the_same_in_one_process_or_two():
    data = load("digits")
    model = stirred(VAE(data.facts, width=4, ladder=1, classes=True), 0.05)
    x, labels = data.batch(range(64)), data.train_labels[:64]
    whole = model.loss(Batch(x, Rows((0, 1), 64), labels))
    halves = [
        model.loss(Batch(x[p], Rows((0, 1), 64, p.start, p.stop), labels[p])) for p in (slice(0, 32), slice(32, 64))
    ]
    assert float(whole) == pytest.approx(float(sum(halves)) / 2, abs=1e-12)


@pytest.mark.parametrize("ladder", [0, 1])
def test_example_i_depends_on_its_own_seed(ladder):
    """In any batch, with either prior, and with a class of its own."""
    data = load("digits")
    model = stirred(VAE(data.facts, width=4, ladder=ladder, classes=True), 0.05)
    mixture = model.aggregate(data.train[:300], components=3)
    labels = torch.arange(6)
    for prior in (None, mixture):
        x = model.sample(6, rng=3, labels=labels, prior=prior)
        assert torch.equal(model.sample(2, rng=3, start=4, labels=labels[4:], prior=prior), x[4:])
        assert not torch.equal(model.sample(6, rng=4, labels=labels, prior=prior), x)
        assert x.dtype == torch.uint8


def test_a_label_changes_what_is_drawn_and_none_stands_for_all():
    data = load("digits")
    model = stirred(VAE(data.facts, width=4, classes=True), 0.1)
    untold, told = model.sample(20), model.sample(20, labels=torch.full((20,), 3))
    assert not torch.equal(untold, told)
    assert torch.equal(untold, model.sample(20, labels=torch.full((20,), len(data.facts.classes))))
    x = data.held_out[:4]
    assert not torch.equal(model.log_prob(x).nats, model.log_prob(x, labels=data.held_out_labels[:4]).nats)
    assert not torch.equal(model.encode(x), model.encode(x, labels=data.held_out_labels[:4]))


def test_the_family_declares_what_it_can_do():
    model = VAE(load("ring-8").facts, width=4)
    for capability in (Generative, HasDensity, HasLatent):
        assert isinstance(model, capability)
    assert {*map(id, model.players()["autoencoder"].module.parameters())} == {*map(id, model.parameters())}


def test_latents_are_encoded_as_their_mean_and_decoded_as_the_mean_of_x():
    _, x = exact_law(A_OBLIQUE)
    model = linear(A_OBLIQUE)
    joint = A_OBLIQUE @ A_OBLIQUE.T + DEVIATION**2 * torch.eye(3, dtype=torch.float64)
    z = model.encode(x.float())
    torch.testing.assert_close(z, (x.float().double() - B) @ torch.linalg.solve(joint, A_OBLIQUE), rtol=0, atol=1e-9)
    torch.testing.assert_close(model.decode(z), (z @ A_OBLIQUE.T + B).float())


@pytest.mark.parametrize("ladder", [0, 1])
def test_lines_through_latents_begin_and_end_where_they_should(ladder):
    """A traversal is the reconstruction where its latent has its own value; a great circle has the examples as ends."""
    data = load("digits")
    model = stirred(VAE(data.facts, width=4, ladder=ladder), 0.2)
    x, y = data.held_out[:3], data.held_out[3:6]
    z = model.encode(x)
    line = model.traverse(x[:1], 5, [-4.0, float(z[0, 5]), 4.0])
    assert line.shape == (1, 3, 1, 8, 8)
    assert torch.equal(line[0, 1], model.decode(z)[0])
    assert not torch.equal(line[0, 0], line[0, 2])
    way = model.interpolate(x, y, 5)
    assert torch.equal(way[:, 0], model.decode(z))
    assert torch.equal(way[:, -1], model.decode(model.encode(y)))
    assert torch.equal(model.interpolate(x, x, 2)[:, 1], model.decode(z))


def test_lines_of_a_class_are_decoded_as_that_class():
    data = load("digits")
    model, x, y = stirred(VAE(data.facts, width=4, classes=True), 0.2), data.held_out[:3], data.held_out[3:6]
    labels = torch.tensor([1, 7, 4])
    way, untold = model.interpolate(x, y, 4, labels=labels), model.interpolate(x, y, 4)
    assert torch.equal(way[:, 0], model.decode(model.encode(x, labels=labels), labels=labels))
    assert torch.equal(way[:, -1], model.decode(model.encode(y, labels=labels), labels=labels))
    assert not torch.equal(way, untold)


def test_a_great_circle_keeps_the_length_of_latents():
    """Of orthogonal latents of one length, the middle is at 45 degrees and just as long: A z with A the identity."""
    model = linear(torch.eye(3, dtype=torch.float64)[:, :2])
    V = 1 / (1 + 1 / DEVIATION**2)
    ends = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]) * DEVIATION**2 / V
    middle = model.interpolate(ends[:1] + B, ends[1:] + B, 3)[0, 1]
    torch.testing.assert_close(middle.double(), torch.tensor([2**0.5, 2**0.5, 0.0]) + B, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (lambda data: VAE(load("ring-8").facts, classes=True), "ring-8 has none"),
        (lambda data: VAE(data.facts, width=0), "received width=0"),
        (lambda data: VAE(data.facts, components=0), "at least 1 component"),
        (lambda data: VAE(data.facts, ladder=-1), "received ladder=-1"),
        (lambda data: VAE(data.facts, width=4).sample(2, labels=torch.zeros(2).long()), "trained without"),
        (lambda data: VAE(data.facts, width=4, classes=True).sample(1, labels=torch.tensor([12])), "classes 0 to 9"),
        (
            lambda data: VAE(data.facts, width=4, classes=True).sample(3, labels=torch.tensor([1])),
            "for 3 examples: give one each",
        ),
        (lambda data: VAE(data.facts, width=4).log_prob(data.held_out[:2], draws=0), "at least 1 draw"),
        (lambda data: VAE(data.facts, width=4).anneal(data.held_out[:2], steps=0), "at least 1 of each"),
        (lambda data: VAE(data.facts, width=4).log_prob(data.held_out[:0]), "no examples"),
        (lambda data: VAE(data.facts, width=4).traverse(data.held_out[:1], 32, [0.0]), "latents 0 to 31"),
        (lambda data: VAE(data.facts, width=4).interpolate(data.held_out[:1], data.held_out[:2], 3), "as many of each"),
        (lambda data: fit(torch.zeros(3, 2), 4), "4 components for 3 latents"),
        (lambda data: fit(torch.zeros(3, 2), 1, strength=0.0), "a positive one"),
    ],
)
def test_what_is_undefined_is_refused_in_a_sentence(run, sentence):
    with pytest.raises(OptionError, match=sentence):
        run(load("digits"))


# The aggregate posterior


TRUE = LatentMixture(
    torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64),
    torch.tensor([[-3.0, 0.0], [3.0, 1.0], [0.0, 4.0]], dtype=torch.float64),
    torch.tensor([[[1.0, 0.5], [0.5, 0.5]], [[0.3, 0.0], [0.0, 0.9]], [[1.0, -0.6], [-0.6, 0.8]]], dtype=torch.float64),
)


def test_a_mixture_is_recovered_and_every_round_of_its_fit_gains():
    z, n = TRUE.sample(6000, rng=stream(0)), 6000
    found = fit(z, 3, strength=1e-3)
    gains = torch.tensor(found.history).diff()
    assert len(gains) > 3
    assert bool((gains > -1e-12).all())
    order = found.means[:, 0].sort().indices[[0, 2, 1]]
    assert ((found.weights[order] - TRUE.weights).abs() < 5 * (0.25 / n) ** 0.5).all()
    assert float((found.means[order] - TRUE.means).abs().max()) < 0.15
    assert float((found.covariances[order] - TRUE.covariances).abs().max()) < 0.15
    assert float(found.log_prob(z).mean()) >= float(TRUE.log_prob(z).mean())


def test_what_rises_is_the_likelihood_with_the_prior_of_the_covariances():
    """With few points in many dimensions too, where the extra points of unit covariance hold it up."""
    z = randn((40, 12), stream(1), dtype=torch.float64)
    found = fit(z, 5)
    assert bool((torch.tensor(found.history).diff() > -1e-12).all())
    C = found.covariances
    prior = torch.linalg.slogdet(C).logabsdet.sum() + torch.linalg.inv(C).diagonal(dim1=1, dim2=2).sum()
    assert float(found.log_prob(z).sum() - 6 * prior) / 40 == pytest.approx(found.history[-1], abs=1e-3)
    assert float(torch.linalg.eigvalsh(C).min()) > 0.05


def test_draws_of_a_mixture_have_its_moments():
    z, n = TRUE.sample(40_000, rng=stream(2)), 40_000
    mean = TRUE.weights @ TRUE.means
    second = TRUE.covariances + TRUE.means[:, :, None] * TRUE.means[:, None, :]
    cov = (TRUE.weights[:, None, None] * second).sum(0) - mean[:, None] * mean
    assert ((z.mean(0) - mean).abs() < 4 * (cov.diagonal() / n) ** 0.5).all()
    assert float((z.T.cov() - cov).abs().max()) < 0.12
    each = TRUE.sample(5, rng=streams(1, 5))
    assert torch.equal(TRUE.sample(2, rng=streams(1, 2, start=3)), each[3:])


def test_the_aggregate_posterior_of_an_exact_model_is_the_prior():
    """The mean of p(z|x) over p(x) is p(z): the mixture that is fitted is the standard normal, whatever its parts."""
    model = linear(A_ORTHOGONAL)
    x = model.sample(4000, rng=1)
    found = model.aggregate(x, components=2)
    mean = found.weights @ found.means
    second = found.covariances + found.means[:, :, None] * found.means[:, None, :]
    assert float(mean.abs().max()) < 4 / 4000**0.5
    moment = (found.weights[:, None, None] * second).sum(0) - torch.eye(2)
    assert float(moment.abs().max()) < 5 * (2 / 4000) ** 0.5


# Training


@pytest.mark.parametrize("ladder", [0, 1])
def test_training_finds_the_law_of_correlated_gaussian_data(ladder):
    """To at most 0.02 nats short of the truth in 300 steps: the deviation finds its size by itself."""
    data, toy = load("gaussian"), named("gaussian")
    model, x = VAE(data.facts, latents=2, width=32, ladder=ladder), data.held_out[:2000]

    section = loop.TrainingSection(batch=64, rate=5e-3, warmup=5)
    for _ in loop.steps(loop.State(model, section), data, 300, seed=0):
        pass
    excess = float((toy.log_prob(x.double()) - model.bound(x, draws=8).elbo.nats).mean())
    assert -0.01 < excess < 0.02


@pytest.mark.parametrize("ladder", [0, 1])
def test_digits_are_soon_better_known_than_by_independent_pixels(ladder):
    """A hundred steps of a narrow network, on held-out digits, against the histogram of each pixel."""
    data = load("digits")
    model, x = VAE(data.facts, latents=8, width=8, ladder=ladder), data.held_out[:100]
    section = loop.TrainingSection(batch=64, rate=1e-2, warmup=5)
    for _ in loop.steps(loop.State(model, section), data, 100, seed=0):
        pass
    gain, stderr = mean_and_stderr(model.log_prob(x).nats + baselines.independent_pixels(data, x))
    assert gain > 4 * stderr

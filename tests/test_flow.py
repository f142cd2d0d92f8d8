"""Normalizing flows: exact densities, exact inverses, and what is said of what they cannot take."""

import math
import subprocess
import sys
from functools import reduce

import pytest
import torch
from torch import nn

from ancestral.data import Scale, load
from ancestral.errors import OptionError
from ancestral.flow import model as flows
from ancestral.flow.bijector import Bijector, Chain, Ends, Tails
from ancestral.flow.causal import Causal
from ancestral.flow.coupling import Coupling, masks
from ancestral.flow.dequantize import Variational
from ancestral.flow.model import FEATURES, Flow
from ancestral.flow.patches import PatchNet
from ancestral.flow.spline import SEQUENTIAL, Splines
from ancestral.gaussian import LOG_2PI
from ancestral.importance import Weights
from ancestral.protocol import Batch, Generative, HasDensity, HasLatent
from ancestral.rng import Rows, rand, randn, stream
from ancestral.training import loop
from ancestral.training.recipes import TrainingSection
from oracles import plain_facts


def facts_of(shape, levels=None, classes=None):
    scale = Scale.of_levels(levels) if levels else Scale(offset=(0.0,), factor=(1.0,))
    return plain_facts(2).model_copy(
        update={"shape": shape, "levels": levels, "classes": classes, "scale": scale, "name": "made"}
    )


def stirred(module, size=0.3, seed=0):
    """The module with every weight moved, so that no block of it is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5
    return module


def build(*args, stir=0.3, seed=0, **options):
    torch.manual_seed(seed)
    return stirred(Flow(*args, **options), stir)


def couplings(shape, patch, n):
    nets = (PatchNet(shape, patch, FEATURES, width=8, depth=1, heads=2) for _ in range(n))
    return Chain(map(Coupling, nets, masks(shape, patch)))


def splines(dims):
    return Splines(dims, FEATURES, transforms=3, bins=8, width=16, depth=2)


BIJECTORS = {
    "tails": (Tails, (6,)),
    "ends": (lambda: Ends(1.5), (6,)),
    "splines": (lambda: splines(4), (4,)),
    "splines in two passes": (lambda: splines(SEQUENTIAL + 2), (SEQUENTIAL + 2,)),
    "splines of one number": (lambda: splines(1), (1,)),
    "splines of an array": (lambda: splines(6), (2, 3)),
    "couplings": (lambda: couplings((1, 4, 4), 2, 8), (1, 4, 4)),
    "couplings of odd sides": (lambda: couplings((3, 3, 2), 1, 8), (3, 3, 2)),
    "couplings of single values": (lambda: couplings((1, 3, 2), 1, 6), (1, 3, 2)),
    "causal": (lambda: Causal((1, 4, 4), 2, FEATURES, width=8, depth=2, heads=2), (1, 4, 4)),
    "causal of single values": (lambda: Causal((2, 2, 3), 1, FEATURES, width=8, depth=1, heads=2), (2, 2, 3)),
    "chain": (lambda: Chain([Tails(), splines(3), Tails(1.0), splines(3)]), (3,)),
}


@pytest.mark.parametrize("name", BIJECTORS)
def test_the_log_determinant_is_that_of_the_jacobian_and_the_inverse_undoes_the_map(name):
    make, shape = BIJECTORS[name]
    torch.manual_seed(0)
    bijector = stirred(make()).double()
    x = 2.5 * randn((6, *shape), stream(0), dtype=torch.float64)
    context = randn((6, FEATURES), stream(1), dtype=torch.float64)
    z, log_det = (found.detach() for found in bijector(x, context))
    for i in range(len(x)):
        one = context[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(lambda v, one=one: bijector(v[None], one)[0][0], x[i])
        sign, expected = torch.linalg.slogdet(jacobian.reshape(x[i].numel(), -1))
        assert float(sign) == 1
        assert abs(float(expected - log_det[i])) < 1e-8
    assert (z - x).abs().max() > 0.01
    assert (bijector.inverse(z, context).detach() - x).abs().max() < 1e-9


WHOLE = {
    "spline": (facts_of((3,)), {"transforms": 3, "width": 16, "bins": 8}),
    "coupling": (facts_of((1, 4, 4)), {"transforms": 8, "width": 8, "heads": 2}),
    "two": (facts_of((2, 1, 1)), {"kind": "coupling", "transforms": 6, "width": 16, "heads": 2}),
}


@pytest.mark.parametrize("name", ["spline", "coupling"])
def test_the_density_is_that_of_the_change_of_variables_from_the_users_units(name):
    """Scale, tails and all: log p(raw) = log N(z) + log |det dz/draw|."""
    facts, options = WHOLE[name]
    factor = tuple((0.5 + rand((facts.dims,), stream(2)) * 3).tolist())
    facts = facts.model_copy(update={"scale": Scale(offset=(1.5,) * facts.dims, factor=factor)})
    flow = build(facts, **options).double()
    raw = 1.5 + 6 * randn((5, *facts.shape), stream(3), dtype=torch.float64)

    def latent(v):
        return flow.law.bijector(facts.scale.forward(v[None], dtype=torch.float64), flow.law.context(1))[0][0]

    density = flow.log_prob(raw)
    for i in range(len(raw)):
        jacobian = torch.autograd.functional.jacobian(latent, raw[i])
        z, log_det = latent(raw[i]).detach(), torch.linalg.slogdet(jacobian.reshape(facts.dims, -1))[1]
        expected = (-0.5 * (z.square() + LOG_2PI)).sum() + log_det
        assert abs(float(density.nats[i] - expected)) < 1e-8
    assert density.kind == "exact"
    assert density.stderr is None


def trained(flow, data, steps, **section):
    section = TrainingSection(**{"steps": steps, "batch": 128, "warmup": 10} | section)
    list(loop.steps(loop.State(flow, section), data, steps, seed=0))
    return flow.eval()


def mass(flow, reach=9.0, n=300):
    """The integral of the density over a square, by the midpoint rule."""
    ticks = (torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 * reach - reach
    raw = torch.cartesian_prod(ticks, ticks).float().reshape(-1, *flow.facts.shape)
    p = torch.cat([flow.log_prob(part).nats for part in raw.split(30_000)]).exp()
    return float(p.sum()) * (2 * reach / n) ** 2


@pytest.mark.parametrize("steps", [0, 60])
@pytest.mark.parametrize("name", ["two", "spline"])
def test_the_density_integrates_to_one(name, steps):
    data = load("mixture")
    facts, options = WHOLE[name]
    facts = data.facts.model_copy(update={"shape": facts.shape if name == "two" else (2,)})
    flow = build(facts, stir=0.0 if steps else 0.3, **options)
    if steps:
        reshaped = type(data)(**(vars(data) | {"facts": facts, "train": data.train.reshape(-1, *facts.shape)}))
        before = float(flow.log_prob(reshaped.train[:500]).nats.mean())
        trained(flow, reshaped, steps, rate=5e-3)
        assert float(flow.log_prob(reshaped.train[:500]).nats.mean()) > before
    assert abs(mass(flow) - 1) < 1e-3


@pytest.mark.parametrize("name", ["spline"])
def test_far_from_the_data_the_density_is_the_analytic_tail(name):
    facts, options = WHOLE[name]
    facts = facts.model_copy(update={"scale": Scale(offset=(1.0,), factor=(2.0,))})
    flow = build(facts, **options)
    for far in (100.0, 1e6, 1e30):
        raw = torch.tensor([[far, -far, far]])
        x = (raw.double() - 1) / 2
        z = 3 + (x.abs() - 3).log1p()
        expected = (-0.5 * (z.square() + LOG_2PI) - (x.abs() - 3).log1p() - math.log(2)).sum()
        assert float(flow.log_prob(raw).nats) == pytest.approx(float(expected), rel=1e-6)


def extremes(facts):
    unit = (2 * rand((40, *facts.shape), stream(5)) - 1).float()
    return {"noise": 5 * unit, "a thousand": 1e3 * unit, "a million": 1e6 * unit, "one wild value": spike(unit)}


def spike(x):
    x = x.clone()
    x.flatten(1)[:, 0] = 1e6
    return x


def deep(kind):
    """A flow of 30 layers that has learnt something, and its data."""
    if kind == "spline":
        data = load("two-moons")
        flow = build(data.facts, transforms=30, bins=8, width=16, depth=1, stir=0.0)
        return trained(flow, data, 25, batch=64, rate=5e-3), data
    data = load("digits")
    flow = build(data.facts, kind=kind, transforms=30, width=16, heads=2, stir=0.05)
    return trained(flow, data, 20, batch=32, rate=5e-3), data


@pytest.mark.parametrize("kind", ["spline", "coupling", "causal"])
def test_a_flow_of_thirty_layers_inverts_in_either_precision(kind):
    flow, data = deep(kind)
    seen = {"train": data.train[:200].float(), "held out": data.held_out[:200].float(), **extremes(data.facts)}
    for name, x in seen.items():
        trip = flow.round_trip(x)
        assert max(trip.float32.data, trip.float32.latent) < 1e-4, (name, trip)
        assert max(trip.float64.data, trip.float64.latent) < 1e-9, (name, trip)
        assert trip.float64.data > 0
        assert trip.float32.data_most <= trip.float32.data


def test_encode_and_decode_undo_each_other_in_the_users_units():
    data = load("ring-8")
    flow = build(data.facts, transforms=3, width=16)
    x = data.held_out[:50]
    z = flow.encode(x)
    assert z.shape == x.shape
    assert (flow.decode(z) - x).abs().max() < 1e-4
    digits = load("digits")
    flow = build(digits.facts, transforms=6, width=8, heads=2)
    assert torch.equal(flow.decode(flow.encode(digits.held_out[:50])), digits.held_out[:50])


class NoInverse(Bijector):
    def forward_and_log_det(self, x, context):
        return x, x.new_zeros(len(x))


def test_what_cannot_be_inverted_cannot_be_built():
    with pytest.raises(OptionError, match=r"made of bijectors, received Linear"):
        Chain([Tails(), nn.Linear(2, 2)])
    with pytest.raises(TypeError, match="inverse"):
        NoInverse()


def test_what_cannot_be_taken_is_named():
    flow = build(facts_of((2,)), transforms=1, width=8)
    with pytest.raises(OptionError, match=r"example 1 .* 1: nan"):
        flow.log_prob(torch.tensor([[0.0, 0.0], [1.0, float("nan")]]))
    with pytest.raises(OptionError, match=r"example 0 .* 0: inf"):
        flow.encode(torch.tensor([[float("inf"), 0.0]]))
    with pytest.raises(OptionError, match=r"latent 2 .* 1: 1000"):
        flow.decode(torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.0, 1000.0]]))
    with pytest.raises(OptionError, match="2 draws"):
        flow.log_prob(torch.zeros(1, 2), draws=2)
    with pytest.raises(OptionError, match=r"shape \(3,\)"):
        flow.log_prob(torch.zeros(1, 3))
    with pytest.raises(OptionError, match="trained without"):
        flow.sample(2, labels=torch.tensor([0, 1]))
    levels = build(facts_of((2,), levels=4), transforms=1, width=8)
    with pytest.raises(OptionError, match=r"0 to 3"):
        levels.log_prob(torch.tensor([[0, 4]]))
    named = build(facts_of((2,), classes=("a", "b")), transforms=1, width=8, classes=True)
    with pytest.raises(OptionError, match="classes 0 to 1"):
        named.sample(2, labels=torch.tensor([0, 3]))


@pytest.mark.parametrize(
    ("facts", "options", "message"),
    [
        (facts_of((2,)), {"kind": "splines"}, "did you mean 'spline'"),
        (facts_of((2,)), {"kind": "coupling"}, "use kind='spline'"),
        (facts_of((2,)), {"classes": True}, "has none"),
        (facts_of((2,), levels=3), {"dequantization": "uniforme"}, "did you mean 'uniform'"),
        (facts_of((1, 6, 4)), {"patch": 3}, "not multiples"),
        (facts_of((1, 4, 4)), {"width": 10, "heads": 4}, "multiple of its 4 heads"),
        (facts_of((2,)), {"transforms": 0}, "at least 1"),
        (facts_of((2,)), {"bins": 1}, "at least 2"),
    ],
)
def test_a_flow_that_is_not_defined_is_refused(facts, options, message):
    with pytest.raises(OptionError, match=message):
        Flow(facts, **options)


@pytest.mark.parametrize("kind", ["spline", "coupling"])
def test_example_i_depends_on_seed_i_alone(kind):
    facts, options = WHOLE["two" if kind == "coupling" else kind]
    flow = build(facts, **options)
    whole = flow.sample(12, rng=3)
    assert torch.allclose(flow.sample(5, rng=3, start=7), whole[7:], atol=1e-5)
    assert torch.allclose(flow.sample(12, rng=[stream(3, i) for i in range(12)]), whole, atol=1e-5)
    assert not torch.allclose(flow.sample(12, rng=4), whole, atol=1e-2)


def test_samples_have_the_law_of_the_density():
    """E_p[q(x)/p(x)] = 1 for any law q whose support p covers; here a normal one, narrower than the flow's."""
    flow = build(facts_of((2,)), transforms=3, width=16, bins=8)
    x = flow.sample(20_000, rng=0)
    log_q = (-0.5 * (x.double() / 0.7).square() - 0.5 * LOG_2PI - math.log(0.7)).sum(1)
    ratio = (log_q - flow.log_prob(x).nats).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / len(ratio) ** 0.5 < 0.1


DISCRETE = facts_of((2, 1, 1), levels=3)
ALL = torch.cartesian_prod(torch.arange(3), torch.arange(3)).reshape(-1, 2, 1, 1)


def discrete(dequantization, kind="coupling", stir=0.4):
    return build(DISCRETE, kind=kind, transforms=4, width=16, heads=2, bins=8, stir=stir, dequantization=dequantization)


def quadrature(flow, n=160):
    """log P of every x: the density integrated over its bin, by the midpoint rule."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    cube = torch.cartesian_prod(u, u).reshape(-1, 2, 1, 1)
    centres = flow.facts.scale.forward(ALL, dtype=torch.float64)
    with torch.no_grad():
        log_p = [flow.law((x + cube - 0.5).float(), flow.law.context(len(cube))) for x in centres]
    return torch.stack(log_p).logsumexp(1) - math.log(len(cube))


def test_a_bound_is_the_same_however_many_examples_go_through_at_once(monkeypatch):
    flow = discrete("variational")
    whole = flow.log_prob(ALL, draws=3, rng=5)
    monkeypatch.setattr(flows, "AT_ONCE", 4)
    parts = flow.log_prob(ALL, draws=3, rng=5)
    torch.testing.assert_close(parts.nats, whole.nats, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.stderr, whole.stderr, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["coupling", "causal", "spline"])
@pytest.mark.parametrize("dequantization", ["uniform", "variational"])
def test_the_probability_of_a_bin_is_the_integral_of_the_density_over_it(dequantization, kind):
    """Mean weights are unbiased for the integral, tell their error, and add up to no more than one over all x."""
    flow, copies = discrete(dequantization, kind, stir=0.2 if kind == "spline" else 0.4), 400
    coarse, P = (quadrature(flow, n).exp() for n in (80, 160))
    bound = flow.log_prob(ALL.repeat_interleave(copies, 0), draws=40)
    p, claimed = bound.nats.exp().reshape(9, copies), (bound.nats.exp() * bound.stderr).reshape(9, copies)
    stderr = p.std(1) / copies**0.5
    assert bound.kind == "lower bound"
    assert ((p.mean(1) - P).abs() < 4 * stderr + 1e-3 * P).all()
    assert (stderr < 0.1 * P).all()
    assert ((claimed.square().mean(1).sqrt() / p.std(1)).log().abs() < math.log(1.5)).all()
    assert float(P.sum()) < 1 + float((P - coarse).abs().sum())  # the rule's own error: nearly all mass is in the cube
    assert float(p.sum(0).mean()) < 1 + 4 * float(stderr.norm())


@pytest.mark.parametrize("dequantization", ["uniform", "variational"])
def test_more_draws_give_a_tighter_bound(dequantization):
    flow, copies = discrete(dequantization, stir=0.9), 500
    x, exact = ALL.repeat_interleave(copies, 0), quadrature(flow).repeat_interleave(copies)
    gaps = torch.stack([exact - flow.log_prob(x, draws=draws, rng=draws).nats for draws in (1, 4, 32)])
    mean, stderr = gaps.mean(1), gaps.std(1) / len(x) ** 0.5
    assert (mean.diff() < -4 * (stderr[1:] ** 2 + stderr[:-1] ** 2).sqrt()).all()
    assert float(mean[-1]) > -4 * float(stderr[-1])


def test_the_learnt_noise_has_the_density_that_it_says():
    """log q(u|x) = -log |det du/dw|, with w the uniform numbers that u was made from; at first u = w."""
    torch.manual_seed(0)
    noise = Variational((1, 2, 2), 1, FEATURES, width=8, heads=2).double()
    x, context = randn((1, 1, 2, 2), stream(0), dtype=torch.float64), torch.zeros(1, FEATURES).double()
    w = rand((1, 1, 2, 2), stream(1))
    u, log_q = noise(x, context, stream(1))
    assert torch.allclose(u, w)
    assert abs(float(log_q.detach())) < 1e-9

    u, log_q = stirred(noise, 0.8)(x, context, stream(1))
    jacobian = torch.autograd.functional.jacobian(lambda w: noise.from_uniform(w, x, context)[0], w).reshape(4, 4)
    assert abs(float(log_q.detach() + torch.linalg.slogdet(jacobian)[1])) < 1e-8
    assert (u - w).abs().max() > 0.01
    assert 0 < float(u.detach().min()) < float(u.detach().max()) < 1


def test_a_mean_of_weights_that_come_one_at_a_time():
    log_w = 3 * randn((50, 4), stream(0), dtype=torch.float64) - 800
    mean = reduce(Weights.joined, (Weights.of(row[:, None]) for row in log_w)).importance
    assert torch.allclose(mean.nats, log_w.logsumexp(0) - math.log(50))
    w = (log_w - mean.nats).exp()
    assert torch.allclose(mean.stderr, w.std(0) / 50**0.5)


@pytest.mark.parametrize("levels", [None, 3])
def test_the_loss_is_the_mean_surprise_per_dimension_however_the_batch_is_divided(levels):
    facts = facts_of((2,), levels=levels)
    flow = build(facts, transforms=2, width=16)
    raw = (3 * rand((64, 2), stream(0))).floor().float()
    x, key = facts.scale.forward(raw), (1, 2)
    whole = float(flow.loss(Batch(x, Rows(key, 64))).detach())
    assert whole == pytest.approx(-float(flow.log_prob(raw, draws=1, rng=Rows(key, 64)).nats.mean()) / 2, rel=1e-6)
    halves = [flow.loss(Batch(x[a : a + 32], Rows(key, 64, a, a + 32))).detach() for a in (0, 32)]
    assert whole == pytest.approx(float(sum(halves)) / 2, rel=1e-6)


def test_a_flow_that_is_told_classes_learns_the_law_of_each():
    """Two classes, a normal law about -2 and one about 2; told nothing, their mixture."""
    facts = facts_of((1,), classes=("low", "high"))
    flow = build(facts, transforms=2, width=16, classes=True, stir=0.0)
    optimiser = torch.optim.Adam(flow.parameters(), 1e-2)
    for step in range(200):
        rows = Rows((0, step), 256)
        labels = rows.index % 2
        x = (4 * labels[:, None] - 2 + 0.5 * randn((256, 1), rows)).float()
        optimiser.zero_grad()
        flow.loss(Batch(x, rows, labels)).backward()
        optimiser.step()
    labels = torch.arange(400) % 2
    x = flow.sample(400, labels=labels, rng=0)[:, 0]
    assert abs(float(x[labels == 0].mean()) + 2) < 0.3
    assert abs(float(x[labels == 1].mean()) - 2) < 0.3
    at = torch.tensor([[-2.0], [2.0]])
    low, high = (flow.log_prob(at, labels=torch.full((2,), c)).nats for c in (0, 1))
    assert float(low[0] - high[0]) > 3
    assert float(high[1] - low[1]) > 3
    mixture = torch.logaddexp(low, high) - math.log(2)
    assert (flow.log_prob(at).nats - mixture).abs().max() < 0.5


@pytest.mark.parametrize("name", WHOLE)
def test_a_flow_is_a_family(name):
    facts, options = WHOLE[name]
    flow = Flow(facts, **options)
    assert isinstance(flow, Generative)
    assert isinstance(flow, HasDensity)
    assert isinstance(flow, HasLatent)
    (player,) = flow.players().values()
    assert {id(p) for p in player.module.parameters()} == {id(p) for p in flow.parameters()}


def test_zuko_is_imported_by_a_flow_of_splines_only():
    """It changes torch.distributions when it is imported."""
    code = (
        "import sys; from ancestral.data import load; from ancestral.flow.model import Flow; "
        "Flow(load('digits').facts, transforms=1, width=8, heads=2); assert 'zuko' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

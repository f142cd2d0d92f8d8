"""Identities that hold to rounding for every process and parameterization, and to their errors for likelihoods.

process       Bayes' rule, composition of transitions, and the ends
row           x_0 from the target that is published, and E[x_0|x_t] through the row and back
likelihood    E[nats + log p(x_0)] is KL(q(x_T) || p(x_T)), or for a bound at least that
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from ancestral import gaussian, toys
from ancestral.diffusion.denoise import NetworkDenoiser, OracleDenoiser, exact
from ancestral.diffusion.flow import end
from ancestral.diffusion.likelihood import mean_and_stderr
from ancestral.diffusion.process import Process
from ancestral.errors import OptionError
from ancestral.measure.certification.order import at, whole
from ancestral.measure.certification.subjects import ROUNDING, STANDARD_ERRORS, Found, Likelihood, Target
from ancestral.rng import rand, randn, stream

SOLVED = 1e-3
"""What a likelihood that is solved for may be off by, in nats."""


def grade_process(process: Process, predicts: str, target: Target | None) -> Found:
    """The numbers of a `certificate.ProcessRow`, and what is wrong with them."""
    (alpha_0, sigma_0), (alpha_1, sigma_1) = (tuple(float(c) for c in process(t)) for t in (0.0, 1.0))
    found = {"alpha_0": alpha_0, "sigma_0": sigma_0, "alpha_1": alpha_1, "sigma_1": sigma_1}
    found |= {"bayes": _bayes(process), "marginal": _marginal(process), "inverse": _inverse(process)}
    found |= {"round_trip": _round_trip(process, predicts)}
    faults = [
        f"{sentence}: off by {found[key]:.1e}"
        for key, sentence in {
            "bayes": "the posterior is not that of Bayes' rule",
            "marginal": "transitions do not compose to the marginal",
            "inverse": "time(log_snr(t)) is not t",
            "round_trip": "the row does not give E[x_0|x_t] back",
        }.items()
        if not found[key] < (ROUNDING if key != "round_trip" else 1e-6)
    ]
    if target is not None:
        found["target"] = _target(process, predicts, target)
        if not found["target"] < 1e-6:
            faults.append(f"x_0 is not what the row makes of its target: off by {found['target']:.1e}")
    if not (alpha_0 == 1 and sigma_0 == 0):
        faults.append(f"it begins at alpha = {alpha_0:.4g} and sigma = {sigma_0:.4g}, and not at the data")
    if not (alpha_1 >= 0 and sigma_1 > alpha_1 and math.isfinite(sigma_1)):
        faults.append(f"it ends at alpha = {alpha_1:.4g} and sigma = {sigma_1:.4g}, with more signal than noise")
    return found, faults


def _bayes(process: Process) -> float:
    """The largest error of log q(x_s|x_t,x_0) + log q(x_t|x_0) = log q(x_t|x_s) + log q(x_s|x_0), relative if large."""
    draw, log = stream(1), gaussian.log_density
    s, t = rand((2, 200), draw).mul(0.99).add(0.005).sort(0).values
    x_0, x_s, x_t = randn((3, 200, 1), draw, dtype=torch.float64)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = ((a[:, None], b[:, None]) for a, b in (process(s), process(t)))
    x_s, x_t = alpha_s * x_0 + sigma_s * x_s, alpha_t * x_0 + sigma_t * x_t
    a, v = (torch.as_tensor(c)[:, None] for c in process.transition(s, t))
    mean, var = process.posterior(x_t, x_0, s, t)
    left = log(x_s, mean, var) + log(x_t, alpha_t * x_0, sigma_t**2)
    right = log(x_t, a * x_s, v) + log(x_s, alpha_s * x_0, sigma_s**2)
    return float(((left - right).abs() / (1 + left.abs())).max())


def _marginal(process: Process) -> float:
    """The relative error of transitions over a random grid, composed, against alpha and sigma^2 at its end."""
    alpha, var = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for s, t in pairwise([0.0, *rand((50,), stream(2)).sort().values.tolist(), 0.999]):
        a, v = process.transition(s, t)
        alpha, var = a * alpha, a**2 * var + v
    alpha_T, sigma_T = process(0.999)
    return max(float((alpha / alpha_T - 1).abs()), float((var / sigma_T**2 - 1).abs()))


def _inverse(process: Process) -> float:
    t = rand((200,), stream(3))
    return float((process.time(process.log_snr(t)) - t).abs().max())


def _round_trip(process: Process, predicts: str) -> float:
    """The largest error of E[x_0|x_t] of the mixture, through the row and back, over ten noise levels."""
    law = toys.named("mixture")
    through, direct = exact(law, process, predicts), OracleDenoiser(law, process)
    errors = []
    for t in torch.linspace(0.02, 0.98, 10, dtype=torch.float64):
        x_t = law.diffused(*process(t)).sample(20, rng=stream(4))
        errors.append(float((whole(through(x_t, t), x_t) - direct(x_t, t)).abs().max()))
    return max(errors)


class _Told(nn.Module):
    """A network that puts out what it was told."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        return self.target


def _target(process: Process, predicts: str, target: Target) -> float:
    """The largest error of x_0 where the network puts out its target at every noise level."""
    t = torch.linspace(0.02, 0.98, 50, dtype=torch.float64)
    x_0, eps = randn((2, 50, 2), stream(5), dtype=torch.float64)
    alpha, sigma = (c[:, None] for c in process(t))
    denoiser = NetworkDenoiser(_Told(target(x_0, eps, alpha, sigma)), process, predicts)
    return float((whole(denoiser(alpha * x_0 + sigma * eps, t), x_0) - x_0).abs().max())


def independent() -> toys.Mixture:
    """A Gaussian of independent coordinates: the only law whose reverse chain is exact at any number of steps."""
    return toys.gaussian([0.3, -0.6], [[0.5, 0.0], [0.0, 0.1]], name="independent")


def grade_likelihood(likelihood: Likelihood, process: Process, law: toys.Toy, n: int, seed: int) -> Found:
    """E[nats + log p(x_0)] on examples of the law, paired, against KL(q(x_T) || p(x_T)) = K.

    Of an exact one, nats + log p = log q(x_T) - log p(x_T) on every example, of mean K and variance about 2 K.
    """
    x_0 = law.sample(n, rng=stream(seed, 5))
    nats = likelihood.nats(OracleDenoiser(law, process), x_0, stream(seed, 6))
    if nats.ndim != 1 or not nats.isfinite().all():
        raise OptionError(f"returned nats of shape {tuple(nats.shape)}, or not finite: it takes one number per example")
    difference = nats.double() + law.log_prob(x_0[: len(nats)])
    gap, stderr = (float(c) for c in mean_and_stderr(difference))
    expected = _terminal_kl(law, process, seed)
    tight = likelihood.claim == "exact" or (likelihood.claim == "optimal" and law.name == "independent")
    slack = STANDARD_ERRORS * stderr + (SOLVED if likelihood.claim == "exact" else ROUNDING)
    faults = []
    if gap < expected - slack:
        faults.append(f"claims more than there is: {gap:.4f} ± {stderr:.4f} nats, and at least {expected:.4f} must be")
    elif tight and gap > expected + slack:
        faults.append(f"leaves out {gap:.4f} ± {stderr:.4f} nats, where {expected:.4f} is all there is to leave out")
    scatter = float(difference.square().mean().sqrt())
    if likelihood.claim == "exact" and not scatter < SOLVED + STANDARD_ERRORS * (2 * expected) ** 0.5:
        faults.append(f"is {scatter:.4f} nats off on single examples, whatever it is on average")
    return {"claim": likelihood.claim, "gap": gap, "stderr": stderr, "expected": expected}, faults


def _terminal_kl(law: toys.Toy, process: Process, seed: int) -> float:
    """KL(q(x_T) || p(x_T)) in nats, over 16,384 draws of x_T: what the end of the process has not forgotten."""
    log_snr_T, _ = end(process)
    q_T = at(law, log_snr_T)
    x_T = q_T.sample(16_384, rng=stream(seed, 7))
    p_T = gaussian.log_density(x_T, torch.zeros(()), torch.ones(())).sum(1)
    return max(0.0, float((q_T.log_prob(x_T) - p_T).mean()))

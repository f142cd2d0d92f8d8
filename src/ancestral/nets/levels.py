"""What a network can know of data that lies on levels: where a value is within its level, and which level it is.

Shapes: B batch, C channels, H height, W width, L levels.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS = 4096
"""Values whose levels are worked out at a time: what they need then stays in the processor's cache."""

LEAST = -40.0
"""Where log-probabilities are cut, relative to the largest: less makes numbers so small that processors slow down."""


class LevelPhases(nn.Module):
    """Where each value lies within its level, as sines and cosines that fade where noise hides it.

    For y = x_t / alpha_t, which is x_0 plus noise of standard deviation rho = sigma_t / alpha_t, and the periods
    P = D, 2D, 4D, ... of the spacing D between levels: sin(2 pi y / P) and cos(2 pi y / P), each times the factor
    exp(-(2 pi rho / P)^2 / 2) by which such noise shrinks its mean. From the first of them a network can round to a
    level, which from the value alone it would have to learn as a staircase.

    Reference: Kingma et al. (2021), appendix C, for Fourier features of the input; the fading is ours.

    Args:
        levels: number of levels in [-1, 1].
        octaves: number of periods.
    """

    def __init__(self, levels: int, octaves: int) -> None:
        super().__init__()
        spacing = 2 / (levels - 1)
        self.frequencies = [2 * math.pi / (spacing * 2**octave) for octave in range(octaves)]

    def forward(self, x_BCHW: Tensor, log_snr: Tensor) -> Tensor:
        """Unit-variance input (B, C, H, W), (B,) -> (B, C (1 + 2 octaves), H, W), the input first."""
        y, rho_squared = unscaled(x_BCHW, log_snr)
        features = [x_BCHW]
        for frequency in self.frequencies:
            fade = (-0.5 * frequency**2 * rho_squared).exp()
            features += [fade * (frequency * y).sin(), fade * (frequency * y).cos()]
        return torch.cat(features, 1)


def unscaled(x_BCHW: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """From unit-variance input, y = x_t / alpha_t = x_0 + rho eps, (B, C, H, W), and rho^2, (B, 1, 1, 1)."""
    rho_squared = (-log_snr).exp()[:, None, None, None]
    return x_BCHW * (1 + rho_squared).sqrt(), rho_squared


def level_posterior(prior_BKHW: Tensor, x_BCHW: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each value of x_0 on L levels, from a prior over them that knows all other values of x_t.

        P(x_0d = v | x_t) = p_d(v) exp(-(y_d - v)^2 / (2 rho^2)) / sum over v',   y = x_t / alpha_t

    Noise is drawn for each value by itself, so Bayes' rule is exact: what a network has to learn is the prior
    p_d(v) = P(x_0d = v | the other values of x_t), and not how to round y to a level.

    Reference: Austin et al. (2021), section 3.3, for a distribution over the levels of x_0 as what is predicted.

    Args:
        prior_BKHW: log p_d(v) up to a constant, shape (B, C L, H, W): L levels of the first channel, of the second, ...
        x_BCHW: unit-variance input.
        log_snr: shape (B,).

    Returns:
        E[x_0 | x_t] and Var[x_0 | x_t] of each value, float32, shape (B, C, H, W). Only the mean has a gradient.

    Example:
        >>> prior, x = torch.zeros(1, 3, 1, 1), torch.full((1, 1, 1, 1), 0.1)
        >>> [round(float(m), 3) for log_snr in (-9.0, 9.0) for m in level_posterior(prior, x, torch.tensor([log_snr]))]
        [0.001, 0.667, 0.0, 0.0]
    """
    B, C, H, W = x_BCHW.shape
    y, rho_squared = unscaled(x_BCHW, log_snr)
    precision = (0.5 / rho_squared).expand_as(y)
    prior, y, precision = (part.permute(0, 2, 3, 1) for part in (prior_BKHW, y, precision))
    rows = prior.reshape(B * H * W * C, -1), y.reshape(-1, 1), precision.reshape(-1, 1)
    moments = _LevelPosterior.apply(*rows)  # type: ignore[no-untyped-call]
    mean, var = (moment.view(B, H, W, C).permute(0, 3, 1, 2) for moment in moments)
    return mean, var


class _LevelPosterior(torch.autograd.Function):
    """Of rows, with k = 1 / (2 rho^2): the gradient of a mean is the covariance of v with that of the log-probability.

    d mean / d log p(v) = P(v) (v - mean),   d mean / d y = 2 k Var[v],   d mean / d k = -Cov[v, (y - v)^2]
    """

    @staticmethod
    def forward(ctx: Any, prior: Tensor, y: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        v = torch.linspace(-1, 1, prior.shape[1], device=prior.device)
        probability = torch.empty(prior.shape, device=prior.device)
        mean, var = torch.empty_like(y), torch.empty_like(y)
        for p, m, s, log_p, y_d, k_d in zip(*_parts(probability, mean, var, prior, y, k), strict=True):
            log_joint = torch.sub(y_d, v).square_().mul_(-k_d).add_(log_p)
            torch.softmax(log_joint.sub_(log_joint.amax(1, keepdim=True)).clamp_(min=LEAST), 1, out=p)
            torch.mv(p, v, out=m[:, 0])
            s[:, 0] = (p * (v - m).square_()).sum(1)
        ctx.save_for_backward(probability, mean, var, y, k, v)
        ctx.dtype = prior.dtype
        ctx.mark_non_differentiable(var)
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        probability, mean, var, y, k, v = ctx.saved_tensors
        grad_prior = torch.empty(probability.shape, dtype=ctx.dtype, device=v.device)
        grad_k = torch.empty_like(k) if ctx.needs_input_grad[2] else None
        for out, p, m, g_d in zip(*_parts(grad_prior, probability, mean, g), strict=True):
            out.copy_(torch.sub(v, m).mul_(p).mul_(g_d))
        if grad_k is not None:
            for out, p, m, g_d, y_d in zip(*_parts(grad_k, probability, mean, g, y), strict=True):
                out[:, 0] = -(torch.sub(v, m).mul_(p) * (y_d - v).square()).sum(1) * g_d[:, 0]
        return grad_prior, g * 2 * k * var, grad_k


def _parts(*rows: Tensor) -> list[tuple[Tensor, ...]]:
    return [torch.split(tensor, ROWS) for tensor in rows]

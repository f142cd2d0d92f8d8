"""Networks: what they promise about shapes, precision, batches and their start."""

import pytest
import torch

from ancestral.errors import OptionError
from ancestral.nets import MLP, UNet
from ancestral.nets.blocks import LevelPhases, NoiseEmbedding, channel_norm
from ancestral.rng import randn, stream


def lively(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The network with the layers that start at zero filled in, so that every branch matters."""
    draw = stream(seed)
    for parameter in net.parameters():
        if not parameter.any():
            parameter.data = 0.1 * randn(parameter.shape, draw)
    return net.eval()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5), (2, 1, 9), (4, 33, 32)])
def test_unet_takes_any_channel_count_and_any_side(shape):
    """The output is as large as the input and depends on every pixel of it, and on the noise level."""
    net = lively(UNet(shape[0], width=8, multipliers=(1, 2, 2), blocks=1, precision="float32"))
    x = randn((1, *shape), stream(1)).requires_grad_()
    out = net(x, torch.zeros(1))
    assert out.shape == x.shape
    (slope,) = torch.autograd.grad(out.square().sum(), x)
    assert (slope != 0).all()
    assert not torch.equal(net(x, torch.ones(1)), out)


@pytest.mark.parametrize("net", [UNet(1, width=16, precision="float32"), MLP((1, 8, 8), width=32)])
def test_an_untrained_network_outputs_zero(net):
    """So that the first guess is what the parameterization skips through, at every noise level."""
    assert not net(torch.randn(3, 1, 8, 8), torch.tensor([-5.0, 0.0, 5.0])).any()


def test_an_image_does_not_depend_on_its_batch():
    net = lively(UNet(1, width=16, levels=17, precision="float32"))
    x, level = randn((6, 1, 8, 8), stream(1)), torch.linspace(-5, 5, 6)
    with torch.no_grad():
        together = net(x, level)
        alone = torch.cat([net(x[i : i + 1], level[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_bfloat16_agrees_with_float32_to_its_own_rounding():
    torch.manual_seed(0)
    net = lively(UNet(1, width=16, levels=17, precision="float32"))
    x, level = randn((4, 1, 8, 8), stream(1)), torch.linspace(-5, 5, 4)
    exact = net(x, level).detach()
    net.lowered = True
    lowered = net(x, level).detach()
    assert lowered.dtype == torch.float32
    assert 0 < float((lowered - exact).norm() / exact.norm()) < 0.02


def test_unknown_precision_is_refused():
    with pytest.raises(OptionError, match="did you mean 'bfloat16'"):
        UNet(1, precision="bfloat")


def test_channel_norm_brings_each_pixel_to_zero_mean_and_unit_variance():
    x = 3 + 2 * randn((2, 64, 5, 4), stream(0))
    y = channel_norm(x)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 5, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(2, 5, 4), rtol=1e-3, atol=0)


@pytest.mark.parametrize("levels", [17, 256])
def test_phases_tell_levels_apart_and_fade_as_noise_does(levels):
    """On a level the first phase is sin 0, cos 1; under noise the features are the mean of the noiseless ones."""
    phases = LevelPhases(levels, octaves=3)
    values = torch.linspace(-1, 1, levels, dtype=torch.float64)
    clean = phases(values.reshape(1, 1, 1, -1), torch.tensor([60.0], dtype=torch.float64))[0, :, 0]
    assert clean.shape == (7, levels)
    sign = torch.cos(torch.tensor((levels - 1) * torch.pi)).double()  # level 0 sits at -1, half the range from 0
    torch.testing.assert_close(clean[1], torch.zeros(levels).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(clean[2], sign.expand(levels), rtol=0, atol=1e-9)

    rho = 0.3 * 2 / (levels - 1)
    log_snr = torch.tensor([-2.0]).double() * torch.tensor(rho).double().log()
    noise = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-(noise**2) / 2)
    x = torch.tensor(0.1234, dtype=torch.float64)
    average = phases((x + rho * noise).reshape(1, 1, 1, -1), torch.tensor([200.0]).double())[0, 1:, 0]
    average = (average * weight).sum(1) / weight.sum()
    scale = (1 + rho**2) ** -0.5
    faded = phases((scale * x).reshape(1, 1, 1, 1), log_snr)[0, 1:, 0, 0]
    torch.testing.assert_close(faded, average, rtol=1e-5, atol=1e-7)


def test_noise_embedding_separates_levels_over_the_whole_range():
    torch.manual_seed(0)
    embedding = NoiseEmbedding(64)
    levels = torch.linspace(-20, 20, 81)
    apart = torch.cdist(embedding(levels), embedding(levels))
    neighbours = apart.diagonal(1)
    assert neighbours.min() > 0.1 * apart.median()

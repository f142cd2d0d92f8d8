"""Train, sample and measure generative models.

A process adds noise, a denoiser guesses what was there, a sampler walks back.

    import ancestral as ac

    run = ac.train("digits", minutes=2)
    model = ac.load(run.path)
    images = model.sample(64, rng=0)
    measured = ac.evaluate(model, run.data)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ancestral import (
        data,
        diffusion,
        errors,
        flow,
        gan,
        gaussian,
        langevin,
        measure,
        nets,
        ode,
        protocol,
        rng,
        toys,
        training,
        vae,
    )
    from ancestral.diffusion.model import Diffusion
    from ancestral.flow.model import Flow
    from ancestral.gan.model import GAN
    from ancestral.measure.evaluate import evaluate
    from ancestral.training.checkpoint import load
    from ancestral.training.start import train
    from ancestral.vae.model import VAE

__version__ = "0.1.0"

_HOME = {
    "Diffusion": "ancestral.diffusion.model",
    "Flow": "ancestral.flow.model",
    "GAN": "ancestral.gan.model",
    "VAE": "ancestral.vae.model",
    "evaluate": "ancestral.measure.evaluate",
    "load": "ancestral.training.checkpoint",
    "train": "ancestral.training.start",
}

__all__ = [  # noqa: RUF022  # in the order of `sorted`
    "Diffusion",
    "Flow",
    "GAN",
    "VAE",
    "data",
    "diffusion",
    "errors",
    "evaluate",
    "flow",
    "gan",
    "gaussian",
    "langevin",
    "load",
    "measure",
    "nets",
    "ode",
    "protocol",
    "rng",
    "toys",
    "train",
    "training",
    "vae",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in __all__:
        return import_module(f"ancestral.{name}")
    raise AttributeError(f"module 'ancestral' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

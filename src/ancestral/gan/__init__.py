"""Generative adversarial networks: a generator and the critic that it has to please, and what keeps the game stable."""

from ancestral.gan import augment, diagnostics, losses, model

__all__ = ["augment", "diagnostics", "losses", "model"]

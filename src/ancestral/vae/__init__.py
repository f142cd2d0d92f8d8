"""Variational autoencoders: decoders that are likelihoods, a ladder of latents, and the bounds from ELBO to AIS."""

from ancestral.vae import aggregate, bound, decoders, model

__all__ = ["aggregate", "bound", "decoders", "model"]

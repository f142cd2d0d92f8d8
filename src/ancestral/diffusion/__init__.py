"""Diffusion: the forward process, the denoiser, the samplers that walk back, and the bound, term by term."""

from ancestral.diffusion import denoise, likelihood, model, process, sample

__all__ = ["denoise", "likelihood", "model", "process", "sample"]

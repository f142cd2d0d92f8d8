"""Diffusion: the forward process, the denoiser, the samplers that walk back, and the bound, term by term."""

from ancestral.diffusion import denoise, flow, grids, likelihood, model, process, respace, sample

__all__ = ["denoise", "flow", "grids", "likelihood", "model", "process", "respace", "sample"]

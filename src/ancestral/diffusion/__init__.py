"""Diffusion: the forward process, the denoiser, the samplers that walk back, and the bound, term by term."""

from ancestral.diffusion import bend, denoise, fit, flow, grids, likelihood, model, process, respace, sample

__all__ = ["bend", "denoise", "fit", "flow", "grids", "likelihood", "model", "process", "respace", "sample"]

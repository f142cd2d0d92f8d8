"""Diffusion: the forward process, the denoiser, the samplers that walk back, and the bound, term by term."""

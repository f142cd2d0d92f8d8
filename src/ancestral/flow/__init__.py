"""Normalizing flows: maps with an exact inverse and log-determinant, chained, and the densities they give."""

from ancestral.flow import bijector, coupling, dequantize, model, spline

__all__ = ["bijector", "coupling", "dequantize", "model", "spline"]

"""Measuring: the likelihood of a trained model, and what it is compared with."""

from ancestral.measure import baselines, certificate, certify, evaluate, features, flow, metrics, modes, record

__all__ = ["baselines", "certificate", "certify", "evaluate", "features", "flow", "metrics", "modes", "record"]

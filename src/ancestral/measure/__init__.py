"""Measuring: the likelihood of a trained model, and what it is compared with."""

from ancestral.measure import baselines, certification, evaluate, features, flow, metrics, modes, record

__all__ = ["baselines", "certification", "evaluate", "features", "flow", "metrics", "modes", "record"]

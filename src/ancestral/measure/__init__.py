"""Measuring: the likelihood of a trained model, and what it is compared with."""

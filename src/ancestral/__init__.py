"""Train, sample and measure generative models."""

__version__ = "0.1.0"

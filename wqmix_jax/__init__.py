"""Weighted QMIX and its baselines in JAX, as one compiled training loop over many seeds."""

__version__ = "0.1.0"

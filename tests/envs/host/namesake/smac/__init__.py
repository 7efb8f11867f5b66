"""PyPI's smac: another package of the same import name."""

__version__ = "2.0.0"

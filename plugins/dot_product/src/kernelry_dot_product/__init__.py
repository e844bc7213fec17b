"""Attention in plain XLA, for every platform."""

__version__ = "0.1.0"

"""Flywheel attention for TPUs."""

__version__ = "0.1.0"

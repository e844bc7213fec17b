"""Flywheel attention for TPUs."""

"""Flywheel's attention over pages."""

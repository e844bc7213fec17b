"""The version of the kernelry core distribution."""

__version__ = "0.1.0"
